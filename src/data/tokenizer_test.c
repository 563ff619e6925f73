#include "data/tokenizer.h"

#include "base/file.h"
#include "base/hash.h"
#include "base/random.h"
#include "data/tokenizer_testing.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static char directory[] = "/tmp/cadre-tokenizer-XXXXXX";

static int make_directory(void **state) {
    (void)state;
    return mkdtemp(directory) ? 0 : -1;
}

static int remove_directory(void **state) {
    (void)state;
    return directory_remove(directory) == STATUS_OK ? 0 : -1;
}

static struct tokenizer *train_on(const char *text, int vocab_size) {
    struct text_view view = {text, strlen(text)};
    struct tokenizer *tokenizer;
    assert_int_equal(tokenizer_train(&view, 1, vocab_size, &tokenizer), STATUS_OK);
    return tokenizer;
}

static void assert_token(const struct tokenizer *tokenizer, int32_t id, const char *expected) {
    struct text_view token = tokenizer_token(tokenizer, id);
    assert_int_equal(token.size, strlen(expected));
    assert_memory_equal(token.data, expected, token.size);
}

/* "low low low lower lowest": ' low' is the most frequent piece; the merges can be worked out by hand. */
static void test_merges_by_hand(void **state) {
    (void)state;
    struct tokenizer *t = train_on("low low low low lowest", 256 + 3 + 1);
    /* Pairs: l-o and o-w occur 5 times; " "-l 4 times. Ids of bytes follow the alphabet, so (l,o) is lower than (o,w). */
    assert_token(t, 256, "lo");
    assert_token(t, 257, "low");
    assert_token(t, 258, " low");
    assert_int_equal(tokenizer_vocab_size(t), 260);
    assert_int_equal(tokenizer_end_of_text(t), 259);
    assert_true(tokenizer_is_special(t, 259) && !tokenizer_is_special(t, 258));
    struct token_list ids = {0};
    assert_int_equal(tokenizer_encode(t, "low slow<|endoftext|>", 21, true, &ids), STATUS_OK);
    const char *const pieces[] = {"low", " ", "s", "low", "<|endoftext|>"};
    assert_int_equal(ids.count, 5);
    for (int i = 0; i < 5; i++)
        assert_token(t, ids.ids[i], pieces[i]);
    token_list_release(&ids);
    tokenizer_destroy(t);
}

/* Merging as it is defined: all pairs of all words counted anew for every merge. Words of a few letters, each behind a space. */
enum { BRUTE_WORDS = 400, BRUTE_LETTERS = 12, BRUTE_TOKENS = 700 };
struct brute {
    int symbols[BRUTE_WORDS][BRUTE_LETTERS + 1], size[BRUTE_WORDS], count[BRUTE_WORDS];
    char token[BRUTE_TOKENS][BRUTE_LETTERS + 2];
    int token_count;
};

static bool brute_best(const struct brute *b, int best[2]) {
    static int counts[BRUTE_TOKENS][BRUTE_TOKENS];
    int most = 1;
    memset(counts, 0, sizeof counts);
    for (int w = 0; w < BRUTE_WORDS; w++)
        for (int k = 0; k + 1 < b->size[w]; k++)
            counts[b->symbols[w][k]][b->symbols[w][k + 1]] += b->count[w];
    for (int left = 0; left < b->token_count; left++)
        for (int right = 0; right < b->token_count; right++)
            if (counts[left][right] > most) {
                most = counts[left][right];
                best[0] = left, best[1] = right;
            }
    return most > 1;
}

static bool brute_merge(struct brute *b) {
    int best[2], merged = 0;
    char text[2 * BRUTE_LETTERS + 4];
    if (b->token_count == BRUTE_TOKENS || !brute_best(b, best))
        return false;
    snprintf(text, sizeof text, "%s%s", b->token[best[0]], b->token[best[1]]);
    while (merged < b->token_count && strcmp(b->token[merged], text) != 0)
        merged++;
    if (merged == b->token_count)
        strcpy(b->token[b->token_count++], text);
    for (int w = 0; w < BRUTE_WORDS; w++) {
        int size = 0;
        for (int k = 0; k < b->size[w]; k++) {
            bool here = k + 1 < b->size[w] && b->symbols[w][k] == best[0] && b->symbols[w][k + 1] == best[1];
            b->symbols[w][size++] = here ? merged : b->symbols[w][k];
            k += here;
        }
        b->size[w] = size;
    }
    return true;
}

static void test_merges_as_defined(void **state) {
    (void)state;
    static struct brute b;
    struct tokenizer *bytes = train_on("x", 257);
    struct text text = {0};
    b.token_count = 256;
    for (int id = 0; id < 256; id++)
        snprintf(b.token[id], 2, "%c", *tokenizer_token(bytes, id).data);
    for (int w = 0; w < BRUTE_WORDS; w++) {
        char word[BRUTE_LETTERS + 2] = " ";
        int length = 1 + (int)(random_bits(5, 1, (uint64_t)w) % (BRUTE_LETTERS - 1));
        for (int k = 0; k < length; k++)
            word[1 + k] = "aeinorst"[random_bits(6, (uint64_t)w, (uint64_t)k) % 8];
        b.count[w] = 1 + 600 / (w + 5);
        b.size[w] = length + 1;
        for (int k = 0; k <= length; k++)
            for (int id = 0; id < 256; id++)
                if (b.token[id][0] == word[k])
                    b.symbols[w][k] = id;
        for (int n = 0; n < b.count[w]; n++)
            text_add_string(&text, word);
    }
    while (brute_merge(&b))
        continue;
    struct tokenizer *t = train_on(text.data, b.token_count + 1);
    assert_true(b.token_count > 500);
    for (int id = 256; id < b.token_count; id++)
        assert_token(t, id, b.token[id]);
    text_release(&text);
    tokenizer_destroy(bytes);
    tokenizer_destroy(t);
}

static void test_short_text_gives_a_small_vocabulary(void **state) {
    (void)state;
    struct tokenizer *t = train_on("abc", 1000);
    assert_int_equal(tokenizer_vocab_size(t), 257);
    tokenizer_destroy(t);
}

/* Whatever valid text goes in comes out again, in its normal form. */
static void test_round_trip(void **state) {
    (void)state;
    struct text text = {0}, back = {0};
    testing_text(&text, 60000);
    struct tokenizer *t = train_on(text.data, 700);
    struct token_list ids = {0};
    struct token_decoder decoder = {0};
    /* NFC text is not changed again: encode, decode, encode gives the same ids. */
    assert_int_equal(tokenizer_encode(t, text.data, text.size, false, &ids), STATUS_OK);
    for (size_t i = 0; i < ids.count; i++)
        token_decoder_add(&decoder, t, ids.ids[i], &back);
    token_decoder_finish(&decoder, &back);
    struct token_list again = {0};
    assert_int_equal(tokenizer_encode(t, back.data, back.size, false, &again), STATUS_OK);
    assert_int_equal(ids.count, again.count);
    assert_memory_equal(ids.ids, again.ids, ids.count * sizeof *ids.ids);
    const char ascii[] = "Plain text, 1234 and   spaces\n\n\tit's we'll ...!?\r\n";
    text_clear(&back);
    ids.count = 0;
    assert_int_equal(tokenizer_encode(t, ascii, strlen(ascii), false, &ids), STATUS_OK);
    for (size_t i = 0; i < ids.count; i++)
        token_decoder_add(&decoder, t, ids.ids[i], &back);
    assert_string_equal(text_string(&back), ascii);
    token_list_release(&ids);
    token_list_release(&again);
    text_release(&text);
    text_release(&back);
    tokenizer_destroy(t);
}

static void test_decoder_holds_characters_back(void **state) {
    (void)state;
    struct tokenizer *t = train_on("x", 257);
    struct token_decoder decoder = {0};
    struct text out = {0};
    struct token_list ids = {0};
    assert_int_equal(tokenizer_encode(t, "\xe2\x82\xac", 3, false, &ids), STATUS_OK); /* the euro sign, three bytes */
    assert_int_equal(ids.count, 3);
    token_decoder_add(&decoder, t, ids.ids[0], &out);
    token_decoder_add(&decoder, t, ids.ids[1], &out);
    assert_int_equal(out.size, 0);
    token_decoder_add(&decoder, t, ids.ids[2], &out);
    assert_string_equal(text_string(&out), "\xe2\x82\xac");
    text_clear(&out);
    token_decoder_add(&decoder, t, ids.ids[0], &out); /* broken off by another character */
    token_decoder_add(&decoder, t, 0, &out);          /* '!' */
    assert_string_equal(text_string(&out), "\xef\xbf\xbd!");
    text_release(&out);
    token_list_release(&ids);
    tokenizer_destroy(t);
}

static void test_refuses_what_is_not_utf8(void **state) {
    (void)state;
    struct tokenizer *t = train_on("x", 257);
    struct token_list ids = {0};
    const char *const bad[] = {"ab\xff", "ab\xc0\x80", "ab\xed\xa0\x80", "ab\xf5\x80\x80\x80", "ab\xe2\x82"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(tokenizer_encode(t, bad[i], strlen(bad[i]), false, &ids), STATUS_FORMAT);
        assert_non_null(strstr(status_text(), "byte 2"));
    }
    token_list_release(&ids);
    tokenizer_destroy(t);
}

static void test_saved_tokenizer_is_the_same(void **state) {
    (void)state;
    struct text text = {0};
    testing_text(&text, 40000);
    struct tokenizer *t = train_on(text.data, 600), *same = train_on(text.data, 600), *back;
    char *path = path_join(directory, "tokenizer.json"), *other = path_join(directory, "other.json"), *a, *b;
    size_t a_size, b_size;
    assert_int_equal(tokenizer_save(t, path), STATUS_OK);
    assert_int_equal(tokenizer_open(path, &back), STATUS_OK);
    assert_int_equal(tokenizer_save(back, other), STATUS_OK);
    assert_int_equal(file_read(path, 1 << 24, &a, &a_size), STATUS_OK);
    assert_int_equal(file_read(other, 1 << 24, &b, &b_size), STATUS_OK);
    assert_string_equal(a, b);
    free(b);
    assert_int_equal(tokenizer_save(same, other), STATUS_OK); /* training twice gives the same file */
    assert_int_equal(file_read(other, 1 << 24, &b, &b_size), STATUS_OK);
    assert_string_equal(a, b);
    struct token_list x = {0}, y = {0};
    assert_int_equal(tokenizer_encode(t, text.data, text.size, false, &x), STATUS_OK);
    assert_int_equal(tokenizer_encode(back, text.data, text.size, false, &y), STATUS_OK);
    assert_int_equal(x.count, y.count);
    assert_memory_equal(x.ids, y.ids, x.count * sizeof *x.ids);
    token_list_release(&x);
    token_list_release(&y);
    tokenizer_destroy(t);
    tokenizer_destroy(same);
    tokenizer_destroy(back);
    text_release(&text);
    free(a);
    free(b);
    free(path);
    free(other);
}

/* A damaged tokenizer.json is refused or works; it never does harm. */
static void test_mutations(void **state) {
    (void)state;
    struct tokenizer *t = train_on("the cat and the hat and the bat", 270), *mutant;
    char *path = path_join(directory, "mutant.json"), *data;
    size_t size;
    int opened = 0;
    assert_int_equal(tokenizer_save(t, path), STATUS_OK);
    assert_int_equal(file_read(path, 1 << 20, &data, &size), STATUS_OK);
    char *copy = malloc(size);
    for (uint64_t round = 0; round < 1500; round++) {
        memcpy(copy, data, size);
        for (uint64_t k = 0; k <= round % 3; k++) {
            size_t at = random_bits(3, round, 2 * k) % size;
            copy[at] = round % 2 ? (char)random_bits(3, round, 2 * k + 1) : copy[random_bits(4, round, k) % size];
        }
        FILE *file = fopen(path, "wb");
        assert_non_null(file);
        assert_int_equal(fwrite(copy, 1, size, file), size);
        fclose(file);
        if (tokenizer_open(path, &mutant) != STATUS_OK)
            continue;
        struct token_list ids = {0};
        struct text out = {0};
        struct token_decoder decoder = {0};
        if (tokenizer_encode(mutant, "the cat <|endoftext|> 42", 24, true, &ids) == STATUS_OK)
            for (size_t i = 0; i < ids.count; i++)
                token_decoder_add(&decoder, mutant, ids.ids[i], &out);
        token_list_release(&ids);
        text_release(&out);
        tokenizer_destroy(mutant);
        opened++;
    }
    assert_true(opened > 0);
    free(copy);
    free(data);
    free(path);
    tokenizer_destroy(t);
}

static void test_refuses_other_kinds_by_name(void **state) {
    (void)state;
    const char *const kinds[][2] = {
        {"{\"model\":{\"type\":\"WordPiece\",\"vocab\":{}}}", "WordPiece"},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[]},\"normalizer\":{\"type\":\"Lowercase\"}}", "Lowercase"},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[]},\"pre_tokenizer\":{\"type\":\"Metaspace\"}}", "Metaspace"},
        {"{\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,\"vocab\":{},\"merges\":[]}}", "byte_fallback"},
        {"{\"model\":{\"type\":\"BPE\",\"end_of_word_suffix\":\"</w>\",\"vocab\":{},\"merges\":[]}}", "end_of_word_suffix"},
        {"{\"model\":{\"type\":\"BPE\",\"continuing_subword_prefix\":\"##\",\"vocab\":{},\"merges\":[]}}", "\"##\""},
    };
    char *path = path_join(directory, "kind.json");
    struct tokenizer *t;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        assert_int_equal(file_write(path, kinds[i][0], strlen(kinds[i][0])), STATUS_OK);
        assert_int_equal(tokenizer_open(path, &t), STATUS_FORMAT);
        assert_non_null(strstr(status_text(), kinds[i][1]));
    }
    free(path);
}

/* A megabyte of mixed scripts: the ids of Hugging Face's `tokenizers` on the same tokenizer.json, kept as hashes of
 * 4096 ids each. tests/parity/make_tokenizer_fixture.py made the fixture. */
static void test_ids_equal_hugging_face(void **state) {
    (void)state;
    struct text text = {0};
    struct tokenizer *t;
    struct token_list ids = {0};
    char *data, *line, *rest;
    size_t size, checked = 0;
    testing_text(&text, TESTING_TEXT_BYTES);
    assert_int_equal(tokenizer_open("tests/fixtures/tokenizer.json", &t), STATUS_OK);
    assert_int_equal(tokenizer_encode(t, text.data, text.size, true, &ids), STATUS_OK);
    assert_int_equal(file_read("tests/fixtures/tokenizer_ids.txt", 1 << 20, &data, &size), STATUS_OK);
    rest = data;
    assert_int_equal(strtoll(strsep(&rest, "\n"), NULL, 10), text.size);
    assert_int_equal(strtoll(strsep(&rest, "\n"), NULL, 10), ids.count);
    while ((line = strsep(&rest, "\n")) && *line) {
        size_t count = ids.count - checked < TESTING_CHUNK_IDS ? ids.count - checked : TESTING_CHUNK_IDS;
        if (strtoull(line, NULL, 16) != testing_hash(ids.ids + checked, count))
            fail_msg("ids %zu to %zu are not those of the fixture", checked, checked + count);
        checked += count;
    }
    assert_int_equal(checked, ids.count);
    free(data);
    token_list_release(&ids);
    text_release(&text);
    tokenizer_destroy(t);
}

/* Called by the script that makes the fixture: writes the text and a tokenizer learnt on its first tenth. */
static int write_fixture(const char *target) {
    struct text text = {0};
    struct tokenizer *t;
    char *text_path = path_join(target, "text.txt"), *tokenizer_path = path_join(target, "tokenizer.json");
    testing_text(&text, TESTING_TEXT_BYTES);
    size_t part = text.size / 10;
    while (((unsigned char)text.data[part] & 0xC0) == 0x80)
        part++;
    struct text_view view = {text.data, part};
    bool done = file_write(text_path, text.data, text.size) == STATUS_OK &&
                tokenizer_train(&view, 1, 1200, &t) == STATUS_OK && tokenizer_save(t, tokenizer_path) == STATUS_OK;
    return done ? 0 : 1;
}

int main(int argc, char **argv) {
    if (argc == 3 && strcmp(argv[1], "--write-fixture") == 0)
        return write_fixture(argv[2]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_merges_by_hand),
        cmocka_unit_test(test_merges_as_defined),
        cmocka_unit_test(test_short_text_gives_a_small_vocabulary),
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_decoder_holds_characters_back),
        cmocka_unit_test(test_refuses_what_is_not_utf8),
        cmocka_unit_test(test_saved_tokenizer_is_the_same),
        cmocka_unit_test(test_mutations),
        cmocka_unit_test(test_refuses_other_kinds_by_name),
        cmocka_unit_test(test_ids_equal_hugging_face),
    };
    return cmocka_run_group_tests(tests, make_directory, remove_directory);
}
