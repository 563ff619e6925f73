/* Learning merges. Pieces are counted once; each merge then touches only the pieces that hold its pair. */
#include "data/tokenizer_private.h"

#include "base/hash.h"
#include "base/memory.h"
#include "data/utf8.h"
#include <stdlib.h>
#include <string.h>

enum { PAIR_COUNT_MIN = 2 };

/* A distinct piece: its symbols, and how often it occurs. */
struct word {
    int32_t *symbols;
    uint32_t size;
    int64_t count;
    char *bytes; /* while pieces are being counted */
    uint32_t byte_count;
};

/* A pair of neighbouring symbols, its count, and the words that hold it (some no longer do). */
struct pair {
    int32_t left, right;
    int64_t count;
    uint32_t *words;
    uint32_t word_count, word_capacity;
};

/* Entries whose count is no longer the pair's are passed over. */
struct heap_entry {
    int64_t count;
    uint32_t pair;
};

struct trainer {
    struct word *words;
    size_t word_count, word_capacity;
    struct idmap word_index; /* hash of bytes -> word */
    struct pair *pairs;
    size_t pair_count, pair_capacity;
    struct idmap pair_index; /* left << 32 | right -> pair */
    struct heap_entry *heap;
    size_t heap_count, heap_capacity;
    struct idmap token_index; /* hash of bytes -> token made by a merge */
    size_t merge_capacity;
    struct tokenizer *tokenizer;
};

static void *grow(void *array, size_t count, size_t *capacity, size_t size) {
    if (count < *capacity)
        return array;
    *capacity = *capacity ? 2 * *capacity : 1024;
    array = realloc(array, *capacity * size);
    CHECK(array != NULL);
    return array;
}

/* ---- counting pieces -------------------------------------------------------------------------------------------------- */

static void count_piece(void *context, const char *data, size_t size) {
    struct trainer *t = context;
    uint64_t hash = hash_bytes(data, size, 0) >> 1;
    for (;; hash = (hash + 1) & UINT64_MAX >> 1) { /* another piece may have the same hash: look under the next */
        uint64_t *place = idmap_at(&t->word_index, hash, UINT64_MAX);
        if (*place == UINT64_MAX) {
            *place = t->word_count;
            t->words = grow(t->words, t->word_count, &t->word_capacity, sizeof *t->words);
            char *bytes = memory_must(size, 1);
            memcpy(bytes, data, size);
            t->words[t->word_count++] = (struct word){.count = 1, .bytes = bytes, .byte_count = (uint32_t)size};
            return;
        }
        struct word *word = &t->words[*place];
        if (word->byte_count == size && memcmp(word->bytes, data, size) == 0) {
            word->count++;
            return;
        }
    }
}

static enum status count_pieces(struct trainer *t, const struct text_view *texts, size_t text_count) {
    for (size_t i = 0; i < text_count; i++) {
        char *normal;
        size_t size = texts[i].size;
        TRY(tokenizer_normalize(t->tokenizer, texts[i].data, texts[i].size, &normal, &size));
        enum status status = tokenizer_cut(t->tokenizer, normal ? normal : texts[i].data, size, count_piece, t);
        free(normal);
        TRY(status);
    }
    for (size_t i = 0; i < t->word_count; i++) {
        struct word *word = &t->words[i];
        word->size = word->byte_count;
        word->symbols = memory_must(word->size, sizeof *word->symbols);
        for (uint32_t k = 0; k < word->size; k++)
            word->symbols[k] = t->tokenizer->byte_ids[(unsigned char)word->bytes[k]];
    }
    return STATUS_OK;
}

/* ---- the heap of pairs -------------------------------------------------------------------------------------------------- */

/* Higher count first, then the lower pair of ids: the order does not depend on how the heap came about. */
static bool is_before(const struct trainer *t, struct heap_entry a, struct heap_entry b) {
    if (a.count != b.count)
        return a.count > b.count;
    const struct pair *x = &t->pairs[a.pair], *y = &t->pairs[b.pair];
    return x->left != y->left ? x->left < y->left : x->right < y->right;
}

static void heap_add(struct trainer *t, uint32_t pair) {
    struct heap_entry entry = {t->pairs[pair].count, pair};
    t->heap = grow(t->heap, t->heap_count, &t->heap_capacity, sizeof *t->heap);
    size_t at = t->heap_count++;
    for (; at > 0 && is_before(t, entry, t->heap[(at - 1) / 2]); at = (at - 1) / 2)
        t->heap[at] = t->heap[(at - 1) / 2];
    t->heap[at] = entry;
}

static struct heap_entry heap_take(struct trainer *t) {
    struct heap_entry top = t->heap[0], last = t->heap[--t->heap_count];
    size_t at = 0, child;
    while ((child = 2 * at + 1) < t->heap_count) {
        if (child + 1 < t->heap_count && is_before(t, t->heap[child + 1], t->heap[child]))
            child++;
        if (!is_before(t, t->heap[child], last))
            break;
        t->heap[at] = t->heap[child];
        at = child;
    }
    t->heap[at] = last;
    return top;
}

/* ---- merging --------------------------------------------------------------------------------------------------------------- */

static uint32_t find_pair(struct trainer *t, int32_t left, int32_t right) {
    uint64_t *place = idmap_at(&t->pair_index, (uint64_t)(uint32_t)left << 32 | (uint32_t)right, UINT64_MAX);
    if (*place == UINT64_MAX) {
        *place = t->pair_count;
        t->pairs = grow(t->pairs, t->pair_count, &t->pair_capacity, sizeof *t->pairs);
        t->pairs[t->pair_count++] = (struct pair){.left = left, .right = right};
    }
    return (uint32_t)*place;
}

static uint32_t change_pair(struct trainer *t, int32_t left, int32_t right, int64_t change, uint32_t word) {
    uint32_t index = find_pair(t, left, right);
    struct pair *pair = &t->pairs[index];
    pair->count += change;
    if (change > 0 && (pair->word_count == 0 || pair->words[pair->word_count - 1] != word)) {
        size_t capacity = pair->word_capacity;
        pair->words = grow(pair->words, pair->word_count, &capacity, sizeof *pair->words);
        pair->word_capacity = (uint32_t)capacity;
        pair->words[pair->word_count++] = word;
    }
    return index;
}

static void count_pairs(struct trainer *t) {
    for (size_t w = 0; w < t->word_count; w++)
        for (uint32_t k = 0; k + 1 < t->words[w].size; k++)
            change_pair(t, t->words[w].symbols[k], t->words[w].symbols[k + 1], t->words[w].count, (uint32_t)w);
    for (size_t i = 0; i < t->pair_count; i++)
        heap_add(t, (uint32_t)i);
}

static bool is_pair(const struct word *word, uint32_t k, int32_t left, int32_t right) {
    return k + 1 < word->size && word->symbols[k] == left && word->symbols[k + 1] == right;
}

/* Replace the pair in one word. Only pairs that touch a place where it stands change. */
static void merge_in_word(struct trainer *t, uint32_t index, int32_t left, int32_t right, int32_t merged) {
    struct word *word = &t->words[index];
    bool here, before = false; /* the pair begins at k; it ends there */
    for (uint32_t k = 0; k < word->size; k += 1 + here, before = here) {
        here = is_pair(word, k, left, right);
        if (k > 0 && (here || before))
            change_pair(t, word->symbols[k - 1], word->symbols[k], -word->count, index);
        if (here)
            change_pair(t, left, right, -word->count, index);
    }
    uint32_t size = 0;
    before = false;
    for (uint32_t k = 0; k < word->size; k += 1 + here, before = here) {
        here = is_pair(word, k, left, right);
        word->symbols[size++] = here ? merged : word->symbols[k];
        if (size > 1 && (here || before))
            heap_add(t, change_pair(t, word->symbols[size - 2], word->symbols[size - 1], word->count, index));
    }
    word->size = size;
}

/* Id of the merged symbol. Two pairs may spell the same bytes: then the token that is there serves both. */
static int32_t merged_id(struct trainer *t, int32_t left, int32_t right, int32_t *next_id) {
    struct tokenizer *tokenizer = t->tokenizer;
    struct text bytes = {0};
    text_add(&bytes, tokenizer->tokens[left].data, tokenizer->tokens[left].size);
    text_add(&bytes, tokenizer->tokens[right].data, tokenizer->tokens[right].size);
    uint64_t hash = hash_bytes(bytes.data, bytes.size, 1) >> 1;
    for (;; hash = (hash + 1) & UINT64_MAX >> 1) {
        uint64_t *place = idmap_at(&t->token_index, hash, UINT64_MAX);
        if (*place == UINT64_MAX) {
            *place = (uint64_t)*next_id;
            tokenizer_set_token(tokenizer, (*next_id)++, bytes.data, bytes.size);
        }
        struct text_view token = tokenizer->tokens[*place];
        if (token.size == bytes.size && memcmp(token.data, bytes.data, bytes.size) == 0) {
            text_release(&bytes);
            return (int32_t)*place;
        }
    }
}

static void record_merge(struct trainer *t, int32_t left, int32_t right, int32_t merged) {
    struct tokenizer *tokenizer = t->tokenizer;
    struct text characters = {0};
    byte_level_encode(tokenizer->tokens[left].data, tokenizer->tokens[left].size, &characters);
    text_add_string(&characters, " ");
    byte_level_encode(tokenizer->tokens[right].data, tokenizer->tokens[right].size, &characters);
    idmap_at(&tokenizer->merges, (uint64_t)(uint32_t)left << 32 | (uint32_t)right,
             (uint64_t)tokenizer->merge_count << 32 | (uint32_t)merged);
    tokenizer->merge_texts =
        grow(tokenizer->merge_texts, (size_t)tokenizer->merge_count, &t->merge_capacity, sizeof(char *));
    tokenizer->merge_texts[tokenizer->merge_count++] = characters.data; /* owned from here on */
}

/* Merge until the vocabulary is full or no pair occurs often enough; returns the first id that is free. */
static int32_t learn_merges(struct trainer *t, int32_t id_limit) {
    int32_t next_id = 256;
    while (next_id < id_limit && t->heap_count > 0) {
        struct heap_entry top = heap_take(t);
        struct pair pair = t->pairs[top.pair];
        if (pair.count < PAIR_COUNT_MIN)
            continue;
        if (top.count != pair.count) {
            if (pair.count < top.count) /* other words lost it meanwhile: it comes again where it belongs now */
                heap_add(t, top.pair);
            continue;
        }
        int32_t merged = merged_id(t, pair.left, pair.right, &next_id);
        record_merge(t, pair.left, pair.right, merged);
        /* The list is taken off first: merging may find the pair again and start a new one. */
        t->pairs[top.pair].words = NULL;
        t->pairs[top.pair].word_count = t->pairs[top.pair].word_capacity = 0;
        for (uint32_t i = 0; i < pair.word_count; i++)
            merge_in_word(t, pair.words[i], pair.left, pair.right, merged);
        free(pair.words);
    }
    return next_id;
}

static void trainer_release(struct trainer *t) {
    for (size_t i = 0; i < t->word_count; i++) {
        free(t->words[i].symbols);
        free(t->words[i].bytes);
    }
    for (size_t i = 0; i < t->pair_count; i++)
        free(t->pairs[i].words);
    free(t->words);
    free(t->pairs);
    free(t->heap);
    idmap_release(&t->word_index);
    idmap_release(&t->pair_index);
    idmap_release(&t->token_index);
}

enum status tokenizer_train(const struct text_view *texts, size_t text_count, int vocab_size, struct tokenizer **out) {
    CHECK_OP(vocab_size, >=, 257);
    struct trainer t = {.tokenizer = tokenizer_new(vocab_size)};
    unsigned char order[256];
    byte_level_order(order);
    for (int i = 0; i < 256; i++) {
        tokenizer_set_token(t.tokenizer, i, (const char *)&order[i], 1);
        t.tokenizer->byte_ids[order[i]] = i;
    }
    t.tokenizer->normalize_nfc = true;
    idmap_init(&t.word_index);
    idmap_init(&t.pair_index);
    idmap_init(&t.token_index);
    enum status status = tokenizer_set_pattern(t.tokenizer, "tokenizer", PATTERN_QWEN2);
    if (status == STATUS_OK)
        status = count_pieces(&t, texts, text_count);
    if (status == STATUS_OK) {
        count_pairs(&t);
        int32_t end_of_text = learn_merges(&t, vocab_size - 1);
        t.tokenizer->vocab_size = end_of_text + 1; /* a short text may not hold as many pairs as asked for */
        tokenizer_add_special(t.tokenizer, END_OF_TEXT, end_of_text, true);
        tokenizer_set_token(t.tokenizer, end_of_text, END_OF_TEXT, strlen(END_OF_TEXT));
        *out = t.tokenizer;
    } else {
        tokenizer_destroy(t.tokenizer);
    }
    trainer_release(&t);
    return status;
}
