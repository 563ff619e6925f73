#include "data/corpus.h"

#include "base/log.h"
#include "base/random.h"
#include "data/loader.h"
#include "data/token_shard.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static char root[] = "/tmp/cadre-corpus-XXXXXX";

static char *below(const char *name) {
    return path_join(root, name);
}

static void write_text(const char *name, const char *data, size_t size) {
    char *path = below(name);
    assert_int_equal(file_write(path, data, size), STATUS_OK);
    free(path);
}

/* Numbered sentences, so that every line is found again. */
static void write_lines(const char *name, const char *word, int lines) {
    struct text text = {0};
    for (int i = 0; i < lines; i++)
        text_printf(&text, "%s number %d stands here and nowhere else.\n%s", word, i, i % 5 == 4 ? "\n" : "");
    write_text(name, text.data, text.size);
    text_release(&text);
}

static int set_up(void **state) {
    (void)state;
    log_set_level(LOG_SILENT);
    if (!mkdtemp(root))
        return -1;
    write_lines("first.txt", "alpha", 3000);
    write_lines("second.txt", "beta", 1500);
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    return directory_remove(root) == STATUS_OK ? 0 : -1;
}

static enum status prepare(const char *patterns, const char *directory, bool *reused) {
    char *full = below(patterns), *target = below(directory);
    bool ignored;
    struct corpus_options options = {full, NULL, NULL, 400, target, 1, false};
    enum status status = corpus_prepare(&options, reused ? reused : &ignored);
    free(full);
    free(target);
    return status;
}

static void open_corpus(struct corpus *corpus, const char *directory) {
    char *path = below(directory);
    assert_int_equal(corpus_open(corpus, path), STATUS_OK);
    free(path);
}

static char *decode_split(const struct corpus *corpus, const struct corpus_split *split) {
    struct tokenizer *tokenizer;
    struct text out = {0};
    struct token_decoder decoder = {0};
    int32_t *tokens = malloc((size_t)split->token_count * sizeof *tokens);
    assert_int_equal(tokenizer_open(corpus->tokenizer_path, &tokenizer), STATUS_OK);
    token_shard_copy(&split->shard, 0, split->token_count, tokens);
    for (int64_t i = 0; i < split->token_count; i++)
        if (tokens[i] != tokenizer_end_of_text(tokenizer))
            token_decoder_add(&decoder, tokenizer, tokens[i], &out);
    free(tokens);
    tokenizer_destroy(tokenizer);
    return out.data;
}

/* Every line is in exactly one split, and a tenth of each file is held out. */
static void test_a_tenth_is_held_out(void **state) {
    (void)state;
    struct corpus corpus;
    assert_int_equal(prepare("*.txt", "out", NULL), STATUS_OK);
    open_corpus(&corpus, "out");
    char *train = decode_split(&corpus, &corpus.train), *valid = decode_split(&corpus, &corpus.valid);
    int held_out[2] = {0};
    const char *const words[] = {"alpha", "beta"};
    const int lines[] = {3000, 1500};
    for (int w = 0; w < 2; w++)
        for (int i = 0; i < lines[w]; i++) {
            char line[64];
            snprintf(line, sizeof line, "%s number %d stands", words[w], i);
            bool in_train = strstr(train, line) != NULL, in_valid = strstr(valid, line) != NULL;
            assert_true(in_train != in_valid);
            held_out[w] += in_valid;
        }
    assert_true(held_out[0] > 210 && held_out[0] < 420);
    assert_true(held_out[1] > 105 && held_out[1] < 210);
    assert_int_equal(corpus.domains.count, 2);
    assert_string_equal(corpus.domains.items[0], "first");
    free(train);
    free(valid);
    corpus_close(&corpus);
}

/* None of them has ten blocks; together they have four tenths. */
static void test_of_short_files_too(void **state) {
    (void)state;
    struct corpus corpus;
    char name[32];
    int held_out = 0;
    for (int i = 0; i < 40; i++) {
        snprintf(name, sizeof name, "poem-%02d.short", i);
        write_lines(name, name, 5);
    }
    assert_int_equal(prepare("*.short", "short", NULL), STATUS_OK);
    open_corpus(&corpus, "short");
    char *train = decode_split(&corpus, &corpus.train), *valid = decode_split(&corpus, &corpus.valid);
    for (int i = 0; i < 40; i++) {
        snprintf(name, sizeof name, "poem-%02d.short number 3", i);
        assert_true((strstr(train, name) != NULL) != (strstr(valid, name) != NULL));
        held_out += strstr(valid, name) != NULL;
    }
    assert_int_equal(held_out, 4);
    free(train);
    free(valid);
    corpus_close(&corpus);
}

static void test_second_call_does_nothing(void **state) {
    (void)state;
    bool reused;
    assert_int_equal(prepare("*.txt", "again", &reused), STATUS_OK);
    assert_false(reused);
    assert_int_equal(prepare("*.txt", "again", &reused), STATUS_OK);
    assert_true(reused);
    assert_int_equal(prepare("first.txt", "again", &reused), STATUS_OK); /* other files: made anew */
    assert_false(reused);
}

static void test_refusals(void **state) {
    (void)state;
    write_text("empty.bad", "", 0);
    write_text("binary.bad", "ab\0cd", 5);
    write_text("latin.bad", "caf\xe9 au lait", 12);
    const struct {
        const char *name, *says;
    } cases[] = {{"missing.bad", "no such file"}, {"empty.bad", "is empty"}, {"binary.bad", "byte 2 is zero"},
                 {"latin.bad", "not UTF-8 at byte 3"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_int_not_equal(prepare(cases[i].name, "refused", NULL), STATUS_OK);
        assert_non_null(strstr(status_text(), cases[i].says));
        assert_non_null(strstr(status_text(), cases[i].name));
    }
}

static void test_damaged_shards_are_found(void **state) {
    (void)state;
    char *path = below("shard.tokens"), *data;
    int32_t tokens[100];
    size_t size;
    struct token_shard shard;
    for (int i = 0; i < 100; i++)
        tokens[i] = i % 50;
    assert_int_equal(token_shard_write(path, tokens, 100, 50), STATUS_OK);
    assert_int_equal(token_shard_open(&shard, path, 49), STATUS_FORMAT); /* a token that this vocabulary lacks */
    assert_int_equal(file_read(path, 1 << 20, &data, &size), STATUS_OK);
    for (size_t i = 0; i < size; i++) {
        if (i >= 32 && i < 64)
            continue; /* the vocabulary's size, for people, and zeros */
        data[i] ^= 8;
        write_text("shard.tokens", data, size);
        assert_int_equal(token_shard_open(&shard, path, 50), STATUS_FORMAT);
        data[i] ^= 8;
    }
    for (size_t cut = 0; cut < size; cut += 7) {
        write_text("shard.tokens", data, cut);
        assert_int_equal(token_shard_open(&shard, path, 50), STATUS_FORMAT);
    }
    free(data);
    free(path);
}

/* Any bit of the tokenizer: it is not opened, and made again from the text, as it was. */
static void test_a_damaged_tokenizer_is_made_again(void **state) {
    (void)state;
    bool reused;
    assert_int_equal(prepare("*.txt", "damaged", &reused), STATUS_OK);
    char *directory = below("damaged"), *path = below("damaged/tokenizer.json"), *data, *again;
    size_t size, size_again;
    assert_int_equal(file_read(path, 1 << 20, &data, &size), STATUS_OK);
    for (size_t i = 0; i < size; i += 1 + size / 11) {
        struct corpus corpus;
        data[i] ^= 1;
        write_text("damaged/tokenizer.json", data, size);
        data[i] ^= 1;
        assert_int_equal(corpus_open(&corpus, directory), STATUS_FORMAT);
        assert_non_null(strstr(status_text(), "tokenizer.json: is damaged"));
        assert_int_equal(prepare("*.txt", "damaged", &reused), STATUS_OK);
        assert_false(reused);
        assert_int_equal(file_read(path, 1 << 20, &again, &size_again), STATUS_OK);
        assert_int_equal(size_again, size);
        assert_memory_equal(again, data, size);
        free(again);
    }
    free(data);
    free(path);
    free(directory);
}

static void make_shard(struct token_shard *shard, int64_t count) {
    char *path = below("numbers.tokens");
    int32_t *tokens = malloc((size_t)count * sizeof *tokens);
    for (int64_t i = 0; i < count; i++)
        tokens[i] = (int32_t)i;
    assert_int_equal(token_shard_write(path, tokens, count, 70000), STATUS_OK);
    assert_int_equal(token_shard_open(shard, path, 70000), STATUS_OK);
    free(tokens);
    free(path);
}

/* An epoch draws each window once; targets are inputs shifted by one; another seed gives another order. */
static void test_an_epoch_is_a_permutation(void **state) {
    (void)state;
    enum { T = 7, WINDOWS = 40 };
    struct token_shard shard;
    struct loader *loader, *other;
    int32_t batch[4 * (T + 1)], different[4 * (T + 1)];
    char seen[WINDOWS] = {0};
    int same = 0;
    make_shard(&shard, WINDOWS * T + 1);
    assert_int_equal(loader_open(&loader, &shard, T, 4, 1, 0), STATUS_OK);
    assert_int_equal(loader_open(&other, &shard, T, 4, 2, 0), STATUS_OK);
    for (int b = 0; b < WINDOWS / 4; b++) {
        assert_int_equal(loader_next(loader, batch), STATUS_OK);
        assert_int_equal(loader_next(other, different), STATUS_OK);
        for (int s = 0; s < 4; s++) {
            const int32_t *window = batch + s * (T + 1);
            assert_int_equal(window[0] % T, 0);
            assert_false(seen[window[0] / T]++);
            for (int i = 1; i <= T; i++)
                assert_int_equal(window[i], window[0] + i);
            same += window[0] == different[s * (T + 1)];
        }
    }
    assert_true(same < WINDOWS / 2);
    loader_close(loader);
    loader_close(other);
    token_shard_close(&shard);
}

/* From any cursor the same batches follow as without a break, over several epochs. */
static void test_resumes_at_any_cursor(void **state) {
    (void)state;
    enum { T = 5, BATCHES = 30, TOKENS = 3 * (T + 1) };
    struct token_shard shard;
    struct loader *loader;
    int32_t whole[BATCHES][TOKENS], part[TOKENS];
    make_shard(&shard, 143);
    assert_int_equal(loader_open(&loader, &shard, T, 3, 5, 0), STATUS_OK);
    for (int b = 0; b < BATCHES; b++)
        assert_int_equal(loader_next(loader, whole[b]), STATUS_OK);
    assert_int_equal(loader_cursor(loader), 3 * BATCHES);
    loader_close(loader);
    for (int first = 0; first < BATCHES; first += 7) {
        assert_int_equal(loader_open(&loader, &shard, T, 3, 5, 3 * first), STATUS_OK);
        for (int b = first; b < BATCHES; b++) {
            assert_int_equal(loader_next(loader, part), STATUS_OK);
            assert_memory_equal(part, whole[b], sizeof part);
        }
        loader_close(loader);
    }
    assert_int_equal(loader_open(&loader, &shard, 143, 1, 5, 0), STATUS_FORMAT);
    assert_non_null(strstr(status_text(), "143 tokens, one sequence needs 144"));
    token_shard_close(&shard);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_tenth_is_held_out),     cmocka_unit_test(test_of_short_files_too),
        cmocka_unit_test(test_second_call_does_nothing),
        cmocka_unit_test(test_refusals),                cmocka_unit_test(test_damaged_shards_are_found),
        cmocka_unit_test(test_a_damaged_tokenizer_is_made_again),
        cmocka_unit_test(test_an_epoch_is_a_permutation), cmocka_unit_test(test_resumes_at_any_cursor),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
