/* Directories, a small model and comparisons for tests of checkpoints. */
#pragma once

#include "base/file.h"
#include "base/log.h"
#include "base/threads.h"
#include "checkpoint/publish.h"
#include "data/tokenizer.h"
#include "model/config.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static char in_memory[] = "/dev/shm/cadre-checkpoint-XXXXXX", on_disk[] = "/tmp/cadre-checkpoint-XXXXXX";
static char *root = in_memory; /* thousands of saves, each flushed several times */
static char *tokenizer_path, *config_path;

/* A tokenizer of bytes and little else. */
static inline void write_tokenizer(const char *path) {
    struct tokenizer *tokenizer;
    struct text_view text = {"the river", 9};
    assert_int_equal(tokenizer_train(&text, 1, 258, &tokenizer), STATUS_OK);
    assert_int_equal(tokenizer_save(tokenizer, path), STATUS_OK);
    tokenizer_destroy(tokenizer);
}

static inline int set_up(void **state) {
    (void)state;
    log_set_level(LOG_SILENT);
    threads_set_count(1);
    if (!mkdtemp(on_disk))
        return -1;
    if (!mkdtemp(in_memory))
        root = on_disk;
    tokenizer_path = path_join(root, "tokenizer.json");
    config_path = path_join(root, "config.ini");
    write_tokenizer(tokenizer_path);
    return file_write(config_path, "[run]\n", 6) == STATUS_OK ? 0 : -1;
}

static inline int tear_down(void **state) {
    (void)state;
    free(tokenizer_path);
    free(config_path);
    enum status status = directory_remove(on_disk);
    return status == STATUS_OK && (root == on_disk || directory_remove(root) == STATUS_OK) ? 0 : -1;
}

/* Of pairs of layouts, readers and failing operations, and of flipped bits: under the sanitizers every third, or nineteenth, takes
 * long enough. */
#ifdef __SANITIZE_ADDRESS__
enum { EVERY_CASE = 3, EVERY_BIT = 19 };
#else
enum { EVERY_CASE = 1, EVERY_BIT = 1 };
#endif

static inline struct model_config small_config(bool dense) {
    struct model_config c;
    model_config_init(&c);
    c.vocab_size = 37;
    c.hidden_size = 16;
    c.num_hidden_layers = 2;
    c.num_attention_heads = 2;
    c.num_key_value_heads = 1;
    c.num_experts = dense ? 0 : 5;
    c.num_experts_per_tok = dense ? c.num_experts_per_tok : 2;
    c.intermediate_size = 24;
    c.moe_intermediate_size = 12;
    assert_int_equal(model_config_check(&c, "test"), STATUS_OK);
    return c;
}

static inline void assert_same_file(const char *a, const char *b, const char *name) {
    char *path_a = path_join(a, name), *path_b = path_join(b, name), *data_a, *data_b;
    size_t size_a, size_b;
    assert_int_equal(file_read(path_a, 1 << 26, &data_a, &size_a), STATUS_OK);
    assert_int_equal(file_read(path_b, 1 << 26, &data_b, &size_b), STATUS_OK);
    if (size_a != size_b || memcmp(data_a, data_b, size_a) != 0)
        fail_msg("%s is not %s", path_b, path_a);
    free(data_a);
    free(data_b);
    free(path_a);
    free(path_b);
}

/* All files but the manifest, which says who wrote what, are the same. */
static inline void assert_same_checkpoint(const char *a, const char *b) {
    struct checkpoint_manifest manifest;
    assert_int_equal(checkpoint_verify(b), STATUS_OK);
    assert_int_equal(checkpoint_manifest_open(&manifest, a), STATUS_OK);
    assert_true(manifest.file_count >= 7);
    for (size_t i = 0; i < manifest.file_count; i++)
        assert_same_file(a, b, manifest.files[i].name);
    checkpoint_manifest_close(&manifest);
}

/* On the disk, where blocks go straight from memory. */
static inline char *disk_directory_of(const char *name, int number) {
    return text_format("%s/%s-%d", on_disk, name, number);
}

static inline char *directory_of(const char *name, int number) {
    return text_format("%s/%s-%d", root, name, number);
}

static inline char *checkpoint_in(const char *directory, int64_t step) {
    return text_format("%s/step-%06lld", directory, (long long)step);
}

static inline void remove_all(const char *directory) {
    assert_int_equal(directory_remove(directory), STATUS_OK);
}

static inline void flip(const char *path, uint64_t bit) {
    FILE *file = fopen(path, "r+b");
    assert_non_null(file);
    assert_int_equal(fseek(file, (long)(bit / 8), SEEK_SET), 0);
    int byte = fgetc(file);
    assert_int_equal(fseek(file, (long)(bit / 8), SEEK_SET), 0);
    assert_true(fputc(byte ^ 1 << bit % 8, file) != EOF);
    fclose(file);
}
