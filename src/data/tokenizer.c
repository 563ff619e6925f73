#include "data/tokenizer_private.h"

#include "base/hash.h"
#include "base/memory.h"
#include "data/utf8.h"
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

const char PATTERN_QWEN2[] = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
                             "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const char PATTERN_GPT2[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
const char END_OF_TEXT[] = "<|endoftext|>";

enum { MATCH_LIMIT = 10000000 };

void token_list_add(struct token_list *list, int32_t id) {
    if (list->count == list->capacity) {
        list->capacity = list->capacity ? 2 * list->capacity : 256;
        list->ids = realloc(list->ids, list->capacity * sizeof *list->ids);
        CHECK(list->ids != NULL);
    }
    list->ids[list->count++] = id;
}

void token_list_release(struct token_list *list) {
    free(list->ids);
    *list = (struct token_list){0};
}

/* ---- building ---------------------------------------------------------------------------------------------------------- */

struct tokenizer *tokenizer_new(int vocab_size) {
    struct tokenizer *t = memory_must(1, sizeof *t);
    t->vocab_size = vocab_size;
    t->tokens = memory_must((size_t)vocab_size, sizeof *t->tokens);
    for (int i = 0; i < 256; i++)
        t->byte_ids[i] = -1;
    idmap_init(&t->merges);
    idmap_init(&t->by_bytes);
    return t;
}

void tokenizer_destroy(struct tokenizer *t) {
    if (!t)
        return;
    for (int i = 0; i < t->vocab_size; i++)
        free((char *)(uintptr_t)t->tokens[i].data);
    for (int i = 0; i < t->merge_count; i++)
        free(t->merge_texts[i]);
    for (int i = 0; i < t->added_count; i++)
        free(t->added[i].content);
    free(t->tokens);
    free(t->merge_texts);
    free(t->added);
    free(t->pattern);
    pcre2_code_free(t->compiled);
    idmap_release(&t->merges);
    idmap_release(&t->by_bytes);
    free(t);
}

enum status tokenizer_set_pattern(struct tokenizer *t, const char *label, const char *pattern) {
    int error;
    PCRE2_SIZE offset;
    t->compiled = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP, &error, &offset, NULL);
    if (!t->compiled) {
        char reason[256] = "";
        pcre2_get_error_message(error, (PCRE2_UCHAR *)reason, sizeof reason);
        return status_fail(STATUS_FORMAT, "%s: the pre-tokenizer's pattern is not understood: %s", label, reason);
    }
    pcre2_jit_compile(t->compiled, PCRE2_JIT_COMPLETE); /* where there is no JIT, matching is only slower */
    t->pattern = memory_copy_string(pattern);
    return STATUS_OK;
}

void tokenizer_set_token(struct tokenizer *t, int32_t id, const char *bytes, size_t size) {
    CHECK(id >= 0 && id < t->vocab_size && t->tokens[id].data == NULL);
    char *copy = memory_must(size + 1, 1);
    memcpy(copy, bytes, size);
    t->tokens[id] = (struct text_view){copy, size};
}

void tokenizer_add_special(struct tokenizer *t, const char *content, int32_t id, bool special) {
    t->added = realloc(t->added, (size_t)(t->added_count + 1) * sizeof *t->added);
    CHECK(t->added != NULL);
    t->added[t->added_count++] = (struct added_token){memory_copy_string(content), strlen(content), id, special};
}

int tokenizer_vocab_size(const struct tokenizer *t) {
    return t->vocab_size;
}

int tokenizer_end_of_text(const struct tokenizer *t) {
    for (int i = 0; i < t->added_count; i++)
        if (strcmp(t->added[i].content, END_OF_TEXT) == 0)
            return t->added[i].id;
    return -1;
}

struct text_view tokenizer_token(const struct tokenizer *t, int32_t id) {
    return id >= 0 && id < t->vocab_size && t->tokens[id].data ? t->tokens[id] : (struct text_view){"", 0};
}

bool tokenizer_is_special(const struct tokenizer *t, int32_t id) {
    for (int i = 0; i < t->added_count; i++)
        if (t->added[i].id == id)
            return t->added[i].special;
    return false;
}

/* ---- normalising and cutting --------------------------------------------------------------------------------------------- */

enum status tokenizer_normalize(const struct tokenizer *t, const char *text, size_t size, char **out, size_t *out_size) {
    *out = NULL;
    size_t plain = 0;
    while (plain < size && (unsigned char)text[plain] < 0x80)
        plain++;
    if (!t->normalize_nfc || plain == size)
        return STATUS_OK;
    utf8proc_uint8_t *mapped = NULL;
    utf8proc_ssize_t mapped_size = utf8proc_map((const utf8proc_uint8_t *)text, (utf8proc_ssize_t)size, &mapped,
                                                UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    if (mapped_size < 0)
        return status_fail(STATUS_FORMAT, "text cannot be normalised: %s", utf8proc_errmsg(mapped_size));
    *out = (char *)mapped;
    *out_size = (size_t)mapped_size;
    return STATUS_OK;
}

static enum status cut_all(const struct tokenizer *t, const char *text, size_t size, pcre2_match_data *match,
                           pcre2_match_context *limits, void (*piece)(void *context, const char *data, size_t size),
                           void *context) {
    size_t at = 0, begin = 0; /* where to look on; where the text begins that is in no piece yet */
    while (at < size) {
        int found = pcre2_match(t->compiled, (PCRE2_SPTR)text, size, at, PCRE2_NO_UTF_CHECK, match, limits);
        if (found == PCRE2_ERROR_NOMATCH)
            break;
        if (found < 0)
            return status_fail(STATUS_FORMAT, "the tokenizer's pattern gave up at byte %zu (error %d)", at, found);
        const PCRE2_SIZE *bounds = pcre2_get_ovector_pointer(match);
        bool empty = bounds[1] <= bounds[0]; /* which only cuts */
        if (bounds[0] > begin) /* text between matches is a piece too */
            piece(context, text + begin, bounds[0] - begin);
        if (!empty)
            piece(context, text + bounds[0], bounds[1] - bounds[0]);
        begin = at = empty ? bounds[0] : bounds[1];
        if (empty && at < size)
            at += (size_t)utf8_sequence_bytes((unsigned char)text[at]);
    }
    if (begin < size)
        piece(context, text + begin, size - begin);
    return STATUS_OK;
}

enum status tokenizer_cut(const struct tokenizer *t, const char *text, size_t size,
                          void (*piece)(void *context, const char *data, size_t size), void *context) {
    pcre2_match_data *match = pcre2_match_data_create_from_pattern(t->compiled, NULL);
    pcre2_match_context *limits = pcre2_match_context_create(NULL);
    CHECK(match != NULL && limits != NULL);
    pcre2_set_match_limit(limits, MATCH_LIMIT);
    enum status status = cut_all(t, text, size, match, limits, piece, context);
    pcre2_match_context_free(limits);
    pcre2_match_data_free(match);
    return status;
}

/* ---- merging ------------------------------------------------------------------------------------------------------------- */

/* A piece being merged: symbols as a linked list in one array, and a heap of the pairs that may merge next. A heap entry
 * that no longer fits its symbols is passed over. */
struct symbol {
    int32_t id, previous, next; /* next -1: the last; id -1: merged away */
};
struct candidate {
    uint64_t key; /* rank << 32 | position: the lowest rank first, leftmost on a tie */
    int32_t left, right;
};
struct merger {
    struct symbol *symbols;
    struct candidate *heap;
    size_t symbol_capacity, heap_capacity, heap_count;
};

struct encoding {
    const struct tokenizer *tokenizer;
    struct merger merger;
    struct token_list *out;
};

static void heap_add(struct merger *m, struct candidate c) {
    if (m->heap_count == m->heap_capacity) {
        m->heap_capacity = m->heap_capacity ? 2 * m->heap_capacity : 256;
        m->heap = realloc(m->heap, m->heap_capacity * sizeof *m->heap);
        CHECK(m->heap != NULL);
    }
    size_t at = m->heap_count++;
    for (; at > 0 && m->heap[(at - 1) / 2].key > c.key; at = (at - 1) / 2)
        m->heap[at] = m->heap[(at - 1) / 2];
    m->heap[at] = c;
}

static struct candidate heap_take(struct merger *m) {
    struct candidate top = m->heap[0], last = m->heap[--m->heap_count];
    size_t at = 0, child;
    while ((child = 2 * at + 1) < m->heap_count) {
        if (child + 1 < m->heap_count && m->heap[child + 1].key < m->heap[child].key)
            child++;
        if (last.key <= m->heap[child].key)
            break;
        m->heap[at] = m->heap[child];
        at = child;
    }
    m->heap[at] = last;
    return top;
}

static uint64_t pair_key(int32_t left, int32_t right) {
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

static void consider(const struct tokenizer *t, struct merger *m, int32_t position) {
    const struct symbol *left = &m->symbols[position];
    if (left->next < 0)
        return;
    int32_t right_id = m->symbols[left->next].id;
    const uint64_t *merge = idmap_find(&t->merges, pair_key(left->id, right_id));
    if (merge)
        heap_add(m, (struct candidate){(*merge >> 32) << 32 | (uint32_t)position, left->id, right_id});
}

static void load_symbols(const struct tokenizer *t, struct merger *m, const char *data, size_t size) {
    if (size > m->symbol_capacity) {
        m->symbol_capacity = 2 * size + 64;
        free(m->symbols);
        m->symbols = memory_must(m->symbol_capacity, sizeof *m->symbols);
    }
    for (size_t i = 0; i < size; i++)
        m->symbols[i] = (struct symbol){t->byte_ids[(unsigned char)data[i]], (int32_t)i - 1,
                                        i + 1 < size ? (int32_t)i + 1 : -1};
    m->heap_count = 0;
    for (size_t i = 0; i + 1 < size; i++)
        consider(t, m, (int32_t)i);
}

static void merge_symbols(const struct tokenizer *t, struct merger *m) {
    while (m->heap_count > 0) {
        struct candidate c = heap_take(m);
        int32_t position = (int32_t)(uint32_t)c.key;
        struct symbol *left = &m->symbols[position];
        if (left->id != c.left || left->next < 0 || m->symbols[left->next].id != c.right)
            continue;
        struct symbol *right = &m->symbols[left->next];
        left->id = (int32_t)(uint32_t)*idmap_find(&t->merges, pair_key(c.left, c.right));
        left->next = right->next;
        right->id = -1;
        if (left->next >= 0)
            m->symbols[left->next].previous = position;
        consider(t, m, position);
        if (left->previous >= 0)
            consider(t, m, left->previous);
    }
}

static bool encode_whole(struct encoding *e, const char *data, size_t size) {
    const struct tokenizer *t = e->tokenizer;
    if (!t->ignore_merges)
        return false;
    const uint64_t *id = idmap_find(&t->by_bytes, hash_bytes(data, size, 0) >> 1);
    if (!id || t->tokens[*id].size != size || memcmp(t->tokens[*id].data, data, size) != 0)
        return false;
    token_list_add(e->out, (int32_t)*id);
    return true;
}

static void encode_piece(void *context, const char *data, size_t size) {
    struct encoding *e = context;
    if (encode_whole(e, data, size))
        return;
    load_symbols(e->tokenizer, &e->merger, data, size);
    merge_symbols(e->tokenizer, &e->merger);
    for (int32_t i = 0; i >= 0; i = e->merger.symbols[i].next)
        token_list_add(e->out, e->merger.symbols[i].id);
}

static enum status encode_plain(struct encoding *e, const char *text, size_t size) {
    char *normal;
    size_t normal_size = 0;
    TRY(tokenizer_normalize(e->tokenizer, text, size, &normal, &normal_size));
    enum status status = tokenizer_cut(e->tokenizer, normal ? normal : text, normal ? normal_size : size, encode_piece, e);
    free(normal);
    return status;
}

/* Where the next special token begins, the longest of those that begin there; NULL where there is none. */
static const struct added_token *find_special(const struct tokenizer *t, const char *text, size_t size, size_t *at) {
    const struct added_token *best = NULL;
    for (int i = 0; i < t->added_count; i++) {
        const struct added_token *added = &t->added[i];
        const char *found = added->size ? memmem(text, size, added->content, added->size) : NULL;
        size_t place = found ? (size_t)(found - text) : size;
        if (found && (!best || place < *at || (place == *at && added->size > best->size))) {
            best = added;
            *at = place;
        }
    }
    return best;
}

static enum status encode_with_special(struct encoding *e, const char *text, size_t size) {
    while (size > 0) {
        size_t at = size;
        const struct added_token *special = find_special(e->tokenizer, text, size, &at);
        if (at > 0)
            TRY(encode_plain(e, text, at));
        if (!special)
            break;
        token_list_add(e->out, special->id);
        text += at + special->size;
        size -= at + special->size;
    }
    return STATUS_OK;
}

enum status tokenizer_encode(const struct tokenizer *t, const char *text, size_t size, bool parse_special,
                             struct token_list *out) {
    size_t valid = utf8_valid_prefix(text, size);
    if (valid < size)
        return status_fail(STATUS_FORMAT, "text is not UTF-8 at byte %zu", valid);
    if (size > INT32_MAX)
        return status_fail(STATUS_FORMAT, "text of %zu bytes is too long for one call", size);
    struct encoding e = {.tokenizer = t, .out = out};
    enum status status = parse_special ? encode_with_special(&e, text, size) : encode_plain(&e, text, size);
    free(e.merger.symbols);
    free(e.merger.heap);
    return status;
}

/* ---- decoding ---------------------------------------------------------------------------------------------------------- */

static const char REPLACEMENT[] = "\xEF\xBF\xBD";

static void decode_byte(struct token_decoder *d, char byte, struct text *out) {
    d->held[d->held_count++] = byte;
    int wanted = utf8_sequence_bytes((unsigned char)d->held[0]);
    bool continues = d->held_count == 1 || ((unsigned char)byte & 0xC0) == 0x80;
    if (wanted > 0 && continues && d->held_count < wanted)
        return;
    bool whole = wanted > 0 && continues && utf8_valid_prefix(d->held, (size_t)wanted) == (size_t)wanted;
    int count = d->held_count;
    d->held_count = 0;
    if (whole) {
        text_add(out, d->held, (size_t)wanted);
    } else {
        text_add_string(out, REPLACEMENT);
        if (count > 1 && !continues) /* the byte that broke the sequence may open one of its own */
            decode_byte(d, byte, out);
    }
}

void token_decoder_add(struct token_decoder *d, const struct tokenizer *t, int32_t id, struct text *out) {
    struct text_view token = tokenizer_token(t, id);
    for (size_t i = 0; i < token.size; i++)
        decode_byte(d, token.data[i], out);
}

void token_decoder_finish(struct token_decoder *d, struct text *out) {
    if (d->held_count > 0)
        text_add_string(out, REPLACEMENT);
    d->held_count = 0;
}
