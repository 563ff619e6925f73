/* Seeded mutations of a valid safetensors file and of a valid index: whatever is done to them, they are refused, or
 * every entry that is offered lies inside its file. Meant for the sanitizers; the counts at the end show that mutants
 * got behind the JSON parser, to the checks of ours. */
#include "checkpoint/weights.h"

#include "base/random.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { FILE_ROUNDS = 8000, INDEX_ROUNDS = 3000, MUTANT_BYTES_MAX = 4096, VALUES_MAX = 4096 };

static char directory[] = "/tmp/cadre-fuzz-XXXXXX";

static int set_up(void **state) {
    (void)state;
    return mkdtemp(directory) ? 0 : -1;
}

static int tear_down(void **state) {
    (void)state;
    return directory_remove(directory) == STATUS_OK ? 0 : -1;
}

static uint64_t pick(uint64_t round, uint64_t draw, uint64_t below) {
    return random_bits(7, round, draw) % below;
}

/* What parsers of such files stumbled over: bounds, signs, other types, other dtypes, paths. */
static const char *const tokens[] = {
    "0",
    "1",
    "7",
    "-1",
    "4",
    "8",
    "16",
    "4294967296",
    "2305843009213693952",
    "4611686018427387904",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551616",
    "1e3",
    "0.5",
    "null",
    "true",
    "[]",
    "{}",
    "\"\"",
    "\"F64\"",
    "\"BF16\"",
    "\"F4\"",
    "\"F6_E2M3\"",
    "\"U8\"",
    "\"F33\"",
    "\"dtype\"",
    "\"shape\"",
    "\"data_offsets\"",
    "\"__metadata__\"",
    "\"first\"",
    "\"second\"",
    "\"..\"",
    "\"/etc/passwd\"",
    "\"one.safetensors\"",
    "\"two.safetensors\"",
    "[0,0]",
    "[0,48]",
    "[3,4]",
    "[1,1,1,1,1,1,1,1,1]",
    ",",
    ":",
    "\\u0000",
    " ",
};

/* Put `token` in place of the JSON word (number or string) that stands around `at`. Returns the new size. */
static size_t replace_word(char *data, size_t size, size_t at, const char *token) {
    static const char edges[] = "[]{},:";
    size_t begin = at, end = at, length = strlen(token);
    while (begin > 0 && !memchr(edges, data[begin - 1], sizeof edges - 1))
        begin--;
    while (end < size && !memchr(edges, data[end], sizeof edges - 1))
        end++;
    if (size - (end - begin) + length > MUTANT_BYTES_MAX)
        return size;
    memmove(data + begin + length, data + end, size - end);
    memcpy(data + begin, token, length);
    return size - (end - begin) + length;
}

/* Damage a text in memory of MUTANT_BYTES_MAX bytes; returns its new size, at least 1. */
static size_t mutate(char *text, size_t size, uint64_t round) {
    uint64_t change_count = 1 + pick(round, 0, 3);
    for (uint64_t k = 1; k <= change_count; k++) {
        size_t at = pick(round, 10 * k, size);
        switch (pick(round, 10 * k + 1, 4)) {
        case 0:
            text[at] = (char)random_bits(7, round, 10 * k + 2);
            break;
        case 1:
            text[at] ^= (char)(1 << pick(round, 10 * k + 2, 8));
            break;
        default:
            size = replace_word(text, size, at, tokens[pick(round, 10 * k + 2, sizeof tokens / sizeof *tokens)]);
        }
    }
    return size;
}

static void write_bytes(const char *path, const char *data, size_t size) {
    FILE *raw = fopen(path, "wb");
    assert_non_null(raw);
    assert_int_equal(fwrite(data, 1, size, raw), size);
    fclose(raw);
}

/* What a file offers is what it has: the bytes of an entry are there, and are as many as shape and dtype say. */
static void touch_everything(const struct safetensors *file) {
    static double values[VALUES_MAX];
    uint64_t data_bytes = file->map.size - (uint64_t)(file->data - file->map.data);
    uint64_t sum = 0;
    for (int i = 0; i < file->entry_count; i++) {
        const struct safetensors_entry *entry = &file->entries[i];
        assert_true(entry->begin <= entry->end && entry->end <= data_bytes);
        for (uint64_t at = entry->begin; at < entry->end; at++)
            sum += file->data[at];
        int64_t elements = safetensors_elements(entry);
        assert_true(elements >= 0);
        assert_true((unsigned __int128)elements * (unsigned)safetensors_dtype_bits(entry->dtype) ==
                    (unsigned __int128)8 * (entry->end - entry->begin));
        if (elements <= VALUES_MAX)
            assert_true(safetensors_read(file, entry, 0, elements, DTYPE_F64, values) == STATUS_OK ||
                        strstr(status_text(), "cannot be read as"));
        assert_ptr_equal(safetensors_find(file, entry->name), entry);
    }
    assert_true(sum <= 255 * data_bytes);
}

/* Length and header of `text_size` bytes stand in `mutant`; behind them go the data, and now and then a changed length,
 * a cut or something more. Returns the size of the whole. */
static size_t complete(char *mutant, size_t text_size, const char *data, size_t data_size, uint64_t round) {
    uint64_t kind = pick(round, 100, 16), header_size = text_size;
    size_t size = 8 + text_size + data_size;
    memcpy(mutant + 8 + text_size, data, data_size);
    if (kind == 0)
        header_size = random_bits(7, round, 101) >> pick(round, 102, 64);
    if (kind == 1)
        header_size += pick(round, 101, 17) - 8;
    for (int i = 0; i < 8; i++)
        mutant[i] = (char)(header_size >> 8 * i & 0xFF);
    if (kind == 2)
        return pick(round, 101, size);
    if (kind == 3)
        return size - 1 - pick(round, 101, 16);
    return kind == 4 ? size + 1 + pick(round, 101, 16) : size;
}

static void test_files(void **state) {
    (void)state;
    float values[17] = {0};
    struct named_tensor items[] = {{"first", tensor_2d(values, DTYPE_F32, 3, 4), 0, 0},
                                   {"second", tensor_1d(values, DTYPE_F32, 5), 0, 0},
                                   {"third", tensor_1d(values, DTYPE_BF16, 6), 0, 0},
                                   {"fourth", tensor_1d(values, DTYPE_F32, 0), 0, 0}};
    char *path = path_join(directory, "file.safetensors"), *data;
    static char mutant[8 + 2 * MUTANT_BYTES_MAX];
    size_t size;
    int accepted = 0, refused_by_us = 0;
    assert_int_equal(safetensors_write(path, items, 4, device_cpu()), STATUS_OK);
    assert_int_equal(file_read(path, MUTANT_BYTES_MAX, &data, &size), STATUS_OK);
    size_t text_size = (unsigned char)data[0] + 256u * (unsigned char)data[1];
    for (uint64_t round = 0; round < FILE_ROUNDS; round++) {
        memcpy(mutant + 8, data + 8, text_size);
        size_t mutant_size = round % 16 == 0 ? text_size : mutate(mutant + 8, text_size, round);
        mutant_size = complete(mutant, mutant_size, data + 8 + text_size, size - 8 - text_size, round);
        write_bytes(path, mutant, mutant_size);
        struct safetensors file;
        enum status status = safetensors_open(&file, path);
        if (status == STATUS_OK) {
            accepted++;
            touch_everything(&file);
            safetensors_close(&file);
        } else {
            assert_int_equal(status, STATUS_FORMAT);
            refused_by_us += !strstr(status_text(), "not valid JSON");
        }
    }
    assert_true(accepted > FILE_ROUNDS / 50 && refused_by_us > FILE_ROUNDS / 20);
    free(data);
    free(path);
}

static void test_indexes(void **state) {
    (void)state;
    float value = 0;
    struct named_tensor first = {"first", tensor_1d(&value, DTYPE_F32, 1), 0, 0};
    struct named_tensor second = {"second", tensor_1d(&value, DTYPE_F32, 1), 0, 0};
    const char valid[] = "{\"metadata\":{\"total_size\":8},"
                         "\"weight_map\":{\"first\":\"one.safetensors\",\"second\":\"two.safetensors\"}}";
    char *one = path_join(directory, "one.safetensors"), *two = path_join(directory, "two.safetensors");
    char *path = path_join(directory, "model.safetensors.index.json");
    static char mutant[MUTANT_BYTES_MAX];
    int accepted = 0, refused_by_us = 0;
    assert_int_equal(safetensors_write(one, &first, 1, device_cpu()), STATUS_OK);
    assert_int_equal(safetensors_write(two, &second, 1, device_cpu()), STATUS_OK);
    for (uint64_t round = 0; round < INDEX_ROUNDS; round++) {
        memcpy(mutant, valid, sizeof valid - 1);
        size_t size = mutate(mutant, sizeof valid - 1, round);
        write_bytes(path, mutant, round % 8 == 0 ? pick(round, 101, size) : size);
        struct weights w;
        if (weights_open(&w, directory) == STATUS_OK) {
            accepted++;
            for (int i = 0; i < w.file_count; i++)
                touch_everything(&w.files[i]);
            assert_true(w.file_count <= 2 && w.name_count <= 2);
            weights_close(&w);
        } else {
            refused_by_us += !strstr(status_text(), "not valid JSON");
        }
    }
    assert_true(accepted > INDEX_ROUNDS / 50 && refused_by_us > INDEX_ROUNDS / 20);
    free(path);
    free(one);
    free(two);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_files), cmocka_unit_test(test_indexes)};
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
