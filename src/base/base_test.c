#include "base/file.h"
#include "base/hash_avx2.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/memory.h"
#include "base/random.h"
#include "base/setting.h"
#include "base/text.h"
#include "base/threads.h"

#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static char directory[] = "/tmp/cadre-base-XXXXXX";

static int make_directory(void **state) {
    (void)state;
    return mkdtemp(directory) ? 0 : -1;
}

static int remove_directory(void **state) {
    (void)state;
    return directory_remove(directory) == STATUS_OK ? 0 : -1;
}

static void test_nearest(void **state) {
    (void)state;
    const char *const words[] = {"train.steps", "train.seed", "optim.lr"};
    assert_int_equal(text_nearest("train.step", words, 3), 0);
    assert_int_equal(text_nearest("optim.l", words, 3), 2);
    assert_int_equal(text_nearest("zzzzzz", words, 3), -1);
}

static void test_numbers_as_text(void **state) {
    (void)state;
    char buffer[32];
    assert_string_equal(text_count(buffer, 1234567), "1,234,567");
    assert_string_equal(text_count(buffer, -1000), "-1,000");
    assert_string_equal(text_count(buffer, 999), "999");
    assert_string_equal(text_bytes(buffer, 1536), "1.50 KiB");
    assert_string_equal(text_bytes(buffer, 12), "12 B");
}

/* The published vectors of Random123 for philox4x32-10: key and counter all zero, and all ones. */
static void test_random_known_answers(void **state) {
    (void)state;
    assert_true(random_bits(0, 0, 0) == UINT64_C(0xe169c58d6627e8d5));
    assert_true(random_bits(UINT64_MAX, UINT64_MAX, UINT64_MAX) == UINT64_C(0x41c83b0e408f276d));
}

static void test_random_moments(void **state) {
    (void)state;
    double sum = 0, square = 0, low = 1, high = 0;
    enum { COUNT = 20000 };
    for (uint64_t i = 0; i < COUNT; i++) {
        double n = random_normal(1, 2, i), u = random_uniform(1, 3, i);
        sum += n;
        square += n * n;
        low = fmin(low, u);
        high = fmax(high, u);
    }
    assert_true(fabs(sum / COUNT) < 0.03 && fabs(square / COUNT - 1) < 0.05);
    assert_true(low >= 0 && low < 0.001 && high < 1 && high > 0.999);
}

static void test_permutation(void **state) {
    (void)state;
    for (uint64_t count = 1; count <= 70; count += 3) {
        char seen[70] = {0};
        for (uint64_t i = 0; i < count; i++) {
            uint64_t place = random_permute(9, count, count, i);
            assert_true(place < count && !seen[place]);
            seen[place] = 1;
        }
    }
}

struct sample {
    int64_t steps;
    double lr;
    bool fast;
    int mode;
    char name[SETTING_STRING_BYTES];
};
static const char *const modes[] = {"slow", "quick", NULL};
static const struct setting sample_settings[] = {
    {"train", "steps", SETTING_INTEGER, offsetof(struct sample, steps), 1, 100, NULL, "steps"},
    {"train", "lr", SETTING_NUMBER, offsetof(struct sample, lr), 0, 1, NULL, "rate"},
    {"run", "fast", SETTING_BOOLEAN, offsetof(struct sample, fast), 0, 1, NULL, "fast"},
    {"run", "mode", SETTING_CHOICE, offsetof(struct sample, mode), 0, 1, modes, "mode"},
    {"run", "name", SETTING_STRING, offsetof(struct sample, name), 0, 0, NULL, "name"},
};
static const struct setting_table sample_table = {sample_settings, 5, 0};
static const struct setting_group sample_group = {&sample_table, 1};

static void test_settings(void **state) {
    (void)state;
    struct sample s = {.steps = 1};
    assert_int_equal(setting_set(sample_group, &s, "train.steps", "7", "test"), STATUS_OK);
    assert_int_equal(setting_set(sample_group, &s, "train.lr", "1e-3", "test"), STATUS_OK);
    assert_int_equal(setting_set(sample_group, &s, "run.fast", "yes", "test"), STATUS_OK);
    assert_int_equal(setting_set(sample_group, &s, "run.mode", "quick", "test"), STATUS_OK);
    assert_true(s.steps == 7 && s.lr == 1e-3 && s.fast && s.mode == 1);
    assert_int_equal(setting_set(sample_group, &s, "train.step", "7", "test"), STATUS_USAGE);
    assert_non_null(strstr(status_text(), "train.steps"));
    const char *const bad[][2] = {{"train.steps", "7.5"}, {"train.steps", "0"},   {"train.steps", "many"},
                                  {"train.lr", "nan"},    {"train.lr", "1e999"},  {"run.fast", "perhaps"},
                                  {"run.mode", "fast"},   {"train.steps", "101"}, {"train.steps", ""}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(setting_set(sample_group, &s, bad[i][0], bad[i][1], "test"), STATUS_USAGE);
}

static void test_settings_round_trip(void **state) {
    (void)state;
    struct sample s = {.steps = 42, .lr = 0.1, .fast = true, .mode = 1, .name = "a b"}, back = {0};
    struct text ini = {0};
    setting_write_ini(sample_group, &s, &ini);
    char *path = path_join(directory, "settings.ini");
    assert_int_equal(file_write(path, ini.data, ini.size), STATUS_OK);
    assert_int_equal(setting_read_ini(sample_group, &back, path), STATUS_OK);
    assert_true(back.steps == s.steps && back.lr == s.lr && back.fast && back.mode == 1);
    assert_string_equal(back.name, "a b");
    assert_int_equal(file_write(path, "[train]\nsteps 7\n", 16), STATUS_OK);
    assert_int_not_equal(setting_read_ini(sample_group, &back, path), STATUS_OK);
    text_release(&ini);
    free(path);
}

/* Whatever a value is, it is read as it was written; blanks, semicolons and quotes at its edges, too. */
static void test_values_round_trip(void **state) {
    (void)state;
    static const char letters[] = " \t;\"=[]#\\':ab";
    char *path = path_join(directory, "values.ini");
    for (uint64_t i = 0; i < 2000; i++) {
        struct sample s = {.steps = 42, .lr = 0.1}, back = {0};
        size_t size = random_bits(1, 0, i) % (i % 20 ? 6 : sizeof s.name);
        for (size_t k = 0; k < size; k++)
            s.name[k] = letters[random_bits(2, i, k) % (sizeof letters - 1)];
        struct text ini = {0};
        setting_write_ini(sample_group, &s, &ini);
        assert_int_equal(file_write(path, ini.data, ini.size), STATUS_OK);
        assert_int_equal(setting_read_ini(sample_group, &back, path), STATUS_OK);
        assert_string_equal(back.name, s.name);
        text_release(&ini);
    }
    free(path);
}

static void expect_ini(const char *text, enum status wanted, const char *said) {
    struct sample s = {.steps = 42, .lr = 0.1};
    char *path = path_join(directory, "lines.ini");
    assert_int_equal(file_write(path, text, strlen(text)), STATUS_OK);
    assert_int_equal(setting_read_ini(sample_group, &s, path), wanted);
    if (wanted == STATUS_OK)
        assert_string_equal(s.name, said);
    else if (!strstr(status_text(), said))
        fail_msg("%s", status_text());
    free(path);
}

static void test_ini_lines(void **state) {
    (void)state;
    expect_ini("\xEF\xBB\xBF; remark\r\n[run]\r\n  name =  a b  ; remark\r\n# another\r\n", STATUS_OK, "a b");
    expect_ini("[run]\nname = \" a;b \" ; remark\n", STATUS_OK, " a;b ");
    expect_ini("[run] of it\nname=a;b", STATUS_OK, "a;b");
    expect_ini("[train]\nstpes = 3\n\nsteps = 7\n", STATUS_USAGE, "train.stpes; the nearest known one is train.steps");
    expect_ini("[run]\nname = a,\n   b\n", STATUS_FORMAT, "line 3 is not");
    expect_ini("steps = 3\n", STATUS_USAGE, "");
}

static int fail_from(void *context, enum file_operation operation, const char *path) {
    (void)operation;
    (void)path;
    int *countdown = context;
    return (*countdown)-- == 0 ? ENOSPC : 0;
}

/* Whichever operation of a replacement fails, the file holds the old contents or the new, and says so. */
static void test_file_write_survives_any_failure(void **state) {
    (void)state;
    char *path = path_join(directory, "kept");
    assert_int_equal(file_write(path, "old", 3), STATUS_OK);
    int failures = 0;
    for (int at = 0;; at++) {
        int countdown = at;
        file_set_fault(fail_from, &countdown);
        enum status status = file_write(path, "new", 3);
        file_set_fault(NULL, NULL);
        char *data;
        size_t size;
        assert_int_equal(file_read(path, 10, &data, &size), STATUS_OK);
        assert_true(size == 3 && (memcmp(data, "old", 3) == 0 || memcmp(data, "new", 3) == 0));
        free(data);
        if (status == STATUS_OK)
            break;
        failures++;
        assert_non_null(strstr(status_text(), directory));
        assert_int_equal(file_write(path, "old", 3), STATUS_OK);
    }
    assert_true(failures >= 4);
    free(path);
}

static void test_files(void **state) {
    (void)state;
    char *deep = path_join(directory, "a/b/c"), *file = path_join(deep, "x.txt"), *pattern = path_join(deep, "*.txt");
    assert_int_equal(directory_make(deep), STATUS_OK);
    assert_int_equal(file_write(file, "1234567", 7), STATUS_OK);
    char *data;
    size_t size;
    assert_int_equal(file_read(file, 6, &data, &size), STATUS_FORMAT);
    struct text_list paths;
    assert_int_equal(file_glob(pattern, &paths), STATUS_OK);
    assert_int_equal(paths.count, 1);
    text_list_release(&paths);
    assert_int_equal(file_glob("/nowhere/at/all*", &paths), STATUS_NOT_FOUND);
    assert_int_equal(file_read("/nowhere/at/all", 6, &data, &size), STATUS_NOT_FOUND);
    free(deep);
    free(file);
    free(pattern);
}

/* Answers the n-th question with a short write, or all of them. */
struct short_writes {
    int countdown;
    bool always;
};

static int write_short(void *context, enum file_operation operation, const char *path) {
    (void)path;
    struct short_writes *writes = context;
    bool hit = operation == FILE_WRITE && (writes->always || writes->countdown-- == 0);
    return hit ? FILE_FAULT_SHORT : 0;
}

enum { BLOCK = FILE_BLOCK_BYTES, PIECES = 70, MEMORY_BYTES = (3 * PIECES + 8) * BLOCK };

/* The same places are filled from the file, and nothing between them is touched. */
static void read_and_check(const char *path, uint64_t position, const char *expected, const struct file_part *parts,
                           char *memory) {
    struct file_reader reader;
    memset(memory, 'x', MEMORY_BYTES);
    assert_int_equal(file_reader_open(&reader, path), STATUS_OK);
    assert_int_equal(file_reader_parts(&reader, position, parts, PIECES), STATUS_OK);
    const char *between = memory;
    for (int i = 0; i < PIECES; expected += parts[i++].bytes) {
        for (; between < (char *)parts[i].data; between++)
            assert_int_equal(*between, 'x');
        assert_memory_equal(parts[i].data, expected, parts[i].bytes);
        between += parts[i].bytes;
    }
    int countdown = 1; /* the file is open: of the reads that follow the second one fails */
    file_set_fault(fail_from, &countdown);
    assert_int_equal(file_reader_parts(&reader, position, parts, PIECES), STATUS_IO);
    file_set_fault(NULL, NULL);
    const struct file_part beyond[] = {{memory, BLOCK}, {memory + BLOCK, BLOCK}};
    uint64_t size;
    assert_int_equal(file_size(path, &size), STATUS_OK);
    assert_int_equal(file_reader_parts(&reader, size - BLOCK - 1, beyond, 2), STATUS_IO);
    assert_int_equal(file_reader_parts(&reader, size / BLOCK * BLOCK - BLOCK, beyond, 2), STATUS_IO);
    file_reader_close(&reader);
}

/* Parts of whole blocks that lie apart in memory, the last one longer than blocks, behind a place within a block or at one;
 * and parts that do not lie to the blocks at all. */
static void put_and_check(const char *path, uint64_t position, size_t shift, bool ragged, struct short_writes *writes) {
    char *memory, *found;
    struct file_part parts[PIECES];
    size_t total = 0, size;
    assert_int_equal(memory_alloc_large_pages(&memory, MEMORY_BYTES), STATUS_OK);
    for (size_t i = 0; i < MEMORY_BYTES; i++)
        memory[i] = (char)random_bits(3, 1, i / 8);
    for (int i = 0; i < PIECES; i++) {
        parts[i] = (struct file_part){memory + (size_t)3 * (size_t)i * BLOCK + shift, (size_t)(1 + i % 2) * BLOCK};
        if (ragged && i % 3 == 0)
            parts[i].bytes -= 7;
        total += parts[i].bytes;
    }
    parts[PIECES - 1].bytes += 100;
    total += 100;
    assert_int_equal(file_create(path, position + total), STATUS_OK);
    struct file_writer writer;
    assert_int_equal(file_writer_open_at(&writer, path), STATUS_OK);
    file_set_fault(writes ? write_short : NULL, writes);
    assert_int_equal(file_writer_put_parts(&writer, position, parts, PIECES), STATUS_OK);
    file_set_fault(NULL, NULL);
    assert_int_equal(file_writer_close(&writer), STATUS_OK);
    assert_int_equal(file_read(path, 1 << 30, &found, &size), STATUS_OK);
    assert_int_equal(size, position + total);
    const char *at = found + position;
    for (int i = 0; i < PIECES; at += parts[i++].bytes)
        assert_memory_equal(at, parts[i].data, parts[i].bytes);
    read_and_check(path, position, found + position, parts, memory);
    for (uint64_t i = 0; i < position; i++)
        assert_int_equal(found[i], 0);
    free(found);
    free(memory);
}

static void test_parts(void **state) {
    (void)state;
    char *path = path_join(directory, "parts");
    static const uint64_t positions[] = {0, 3 * BLOCK, 123};
    for (int p = 0; p < 3; p++)
        for (int form = 0; form < 4; form++)
            put_and_check(path, positions[p], form % 2 ? 123 : 0, form > 1, NULL);
    for (int at = 0; at < 8; at++) {
        struct short_writes writes = {at, false};
        put_and_check(path, BLOCK, 0, at % 2, &writes);
    }
    struct short_writes always = {0, true};
    put_and_check(path, 2 * BLOCK, 0, false, &always);
    free(path);
}

static void test_parts_fail(void **state) {
    (void)state;
    char *path = path_join(directory, "parts"), *memory;
    assert_int_equal(memory_alloc_large_pages(&memory, 4 * BLOCK), STATUS_OK);
    memset(memory, 1, 4 * BLOCK);
    const struct file_part parts[] = {{memory, BLOCK}, {memory + 2 * BLOCK, BLOCK}};
    struct file_writer writer;
    int countdown = 0;
    assert_int_equal(file_create(path, 2 * BLOCK), STATUS_OK);
    assert_int_equal(file_writer_open_at(&writer, path), STATUS_OK);
    file_set_fault(fail_from, &countdown);
    assert_int_equal(file_writer_put_parts(&writer, 0, parts, 2), STATUS_IO);
    file_set_fault(NULL, NULL);
    assert_non_null(strstr(status_text(), path));
    assert_int_equal(file_writer_close(&writer), STATUS_OK);
    free(memory);
    free(path);
}

/* Whatever the instructions, and wherever the bytes lie. */
static void test_hashes(void **state) {
    (void)state;
    enum { SIZE = 3 * HASH_BLOCK_BYTES + 77, HASHES = 4 };
    static char data[SIZE + 1];
    for (size_t i = 0; i < SIZE + 1; i++)
        data[i] = (char)random_bits(5, 1, i);
    assert_true(hash_bytes("", 0, 0) == 0x2d06800538d394c2); /* XXH3-64 of nothing, from its specification */
    uint64_t hashes[HASHES + 1] = {[HASHES] = 1}, moved[HASHES];
    hash_blocks(data, SIZE, hashes);
    assert_true(hashes[HASHES] == 1);
    for (size_t i = 0; i < HASHES; i++) {
        size_t bytes = i < 3 ? HASH_BLOCK_BYTES : 77;
        assert_true(hashes[i] == hash_bytes(data + i * HASH_BLOCK_BYTES, bytes, 0));
    }
    memmove(data + 1, data, SIZE);
    hash_blocks(data + 1, SIZE, moved);
    assert_memory_equal(hashes, moved, sizeof moved);
#ifdef __x86_64__
    for (size_t size = 0; size < 3000 && __builtin_cpu_supports("avx2"); size += 1 + size / 9)
        assert_true(hash_bytes_avx2(data, size, size % 5) == hash_bytes_plain(data, size, size % 5));
#endif
    struct known_hashes known = {data + HASH_BLOCK_BYTES, 2, hashes};
    assert_ptr_equal(known_hashes_at(&known, data + 2 * HASH_BLOCK_BYTES), hashes + 1);
    assert_null(known_hashes_at(&known, data + 3 * HASH_BLOCK_BYTES));
    assert_null(known_hashes_at(&known, data));
    assert_null(known_hashes_at(NULL, data));
}

static void test_json_refusals(void **state) {
    (void)state;
    json_t *value;
    assert_int_equal(json_parse("x", "{\"a\":1,\"a\":2}", 13, &value), STATUS_FORMAT);
    assert_int_equal(json_parse("x", "{\"a\":12}", 8, &value), STATUS_OK);
    int64_t number = 5;
    struct json_source source = {"x", value};
    assert_int_equal(json_get_integer(source, "b", false, 0, 9, &number), STATUS_OK);
    assert_int_equal(number, 5);
    assert_int_equal(json_get_integer(source, "b", true, 0, 9, &number), STATUS_FORMAT);
    assert_int_equal(json_get_integer(source, "a", true, 0, 9, &number), STATUS_FORMAT);
    json_decref(value);
}

static void add_index(void *context, int64_t index) {
    ((int *)context)[index]++;
}

static void test_parallel_for_visits_each_once(void **state) {
    (void)state;
    for (int threads = 1; threads <= 4; threads++) {
        int visits[100] = {0};
        threads_set_count(threads);
        parallel_for(100, add_index, visits);
        for (int i = 0; i < 100; i++)
            assert_int_equal(visits[i], 1);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_nearest),
        cmocka_unit_test(test_numbers_as_text),
        cmocka_unit_test(test_random_known_answers),
        cmocka_unit_test(test_random_moments),
        cmocka_unit_test(test_permutation),
        cmocka_unit_test(test_settings),
        cmocka_unit_test(test_settings_round_trip),
        cmocka_unit_test(test_values_round_trip),
        cmocka_unit_test(test_ini_lines),
        cmocka_unit_test(test_file_write_survives_any_failure),
        cmocka_unit_test(test_files),
        cmocka_unit_test(test_parts),
        cmocka_unit_test(test_parts_fail),
        cmocka_unit_test(test_hashes),
        cmocka_unit_test(test_json_refusals),
        cmocka_unit_test(test_parallel_for_visits_each_once),
    };
    return cmocka_run_group_tests(tests, make_directory, remove_directory);
}
