#include "metrics/metrics_file.h"
#include "metrics/progress.h"
#include "metrics/tensorboard.h"

#include "base/memory.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static char directory[] = "/tmp/cadre-metrics-XXXXXX";

static int make_directory(void **state) {
    (void)state;
    return mkdtemp(directory) ? 0 : -1;
}

static int remove_directory(void **state) {
    (void)state;
    return directory_remove(directory) == STATUS_OK ? 0 : -1;
}

static json_t *step_object(int64_t step) {
    return json_pack("{s:I,s:o,s:o}", "step", (json_int_t)step, "loss", metrics_number(0.1 + (double)step), "bad",
                     metrics_number(NAN));
}

static void add_steps(const char *path, int64_t last_step, int64_t first, int64_t end) {
    struct metrics_file file;
    assert_int_equal(metrics_file_open(&file, path, last_step), STATUS_OK);
    for (int64_t step = first; step <= end; step++)
        assert_int_equal(metrics_file_add(&file, step_object(step)), STATUS_OK);
    metrics_file_close(&file);
}

static void test_resumed_file_equals_uninterrupted(void **state) {
    (void)state;
    char *whole = path_join(directory, "whole.jsonl"), *parts = path_join(directory, "parts.jsonl");
    char *a, *b;
    size_t a_size, b_size;
    add_steps(whole, 0, 1, 9);
    add_steps(parts, 0, 1, 7);
    struct file_writer torn;
    assert_int_equal(file_writer_open(&torn, parts, true), STATUS_OK);
    assert_int_equal(file_writer_add(&torn, "{\"step\":8,\"lo", 13), STATUS_OK);
    assert_int_equal(file_writer_close(&torn), STATUS_OK);
    add_steps(parts, 5, 6, 9);
    assert_int_equal(file_read(whole, 1 << 20, &a, &a_size), STATUS_OK);
    assert_int_equal(file_read(parts, 1 << 20, &b, &b_size), STATUS_OK);
    assert_int_equal(a_size, b_size);
    assert_memory_equal(a, b, a_size);
    assert_non_null(strstr(a, "\"bad\":null"));
    free(a);
    free(b);
    free(whole);
    free(parts);
}

static void add_event(const char *path, int64_t step, int64_t to_step) {
    struct metrics_file file;
    assert_int_equal(metrics_file_open(&file, path, INT64_MAX), STATUS_OK);
    assert_int_equal(metrics_file_add(&file, json_pack("{s:I,s:s,s:I}", "step", (json_int_t)step, "event", "rollback",
                                                       "to_step", (json_int_t)to_step)),
                     STATUS_OK);
    metrics_file_close(&file);
}

/* The steps of a file in order, with "<" for each event; freed by the caller. */
static char *read_steps(const char *path) {
    struct text steps = {0};
    char *data, *line;
    size_t size;
    assert_int_equal(file_read(path, 1 << 20, &data, &size), STATUS_OK);
    char *rest = data;
    while ((line = strsep(&rest, "\n")))
        if (*line)
            text_printf(&steps, "%s%d ", strstr(line, "event") ? "<" : "", atoi(line + strlen("{\"step\":")));
    free(data);
    return steps.data;
}

/* 1 to 6, back to 4, 5 to 9, back to 8, 9 and 10: resumed after each step. */
static void test_resumed_after_a_return(void **state) {
    (void)state;
    static const char *const expected[] = {
        [3] = "1 2 3 <6 <9 ",
        [4] = "1 2 3 4 <6 <9 ", /* the checkpoint that was gone back to: it will be gone back to again */
        [5] = "1 2 3 4 5 6 <6 5 <9 ",
        [7] = "1 2 3 4 5 6 <6 5 6 7 <9 ",
        [8] = "1 2 3 4 5 6 <6 5 6 7 8 <9 ",
        [9] = "1 2 3 4 5 6 <6 5 6 7 8 9 <9 9 ",
        [10] = "1 2 3 4 5 6 <6 5 6 7 8 9 <9 9 10 ",
    };
    char *path = path_join(directory, "returned.jsonl");
    for (int64_t last = 3; last <= 10; last++) {
        if (!expected[last])
            continue;
        add_steps(path, 0, 1, 6);
        add_event(path, 6, 4);
        add_steps(path, INT64_MAX, 5, 9);
        add_event(path, 9, 8);
        add_steps(path, INT64_MAX, 9, 10);
        add_steps(path, last, 1, 0);
        char *steps = read_steps(path);
        assert_string_equal(steps, expected[last]);
        free(steps);
        assert_int_equal(file_remove(path), STATUS_OK);
    }
    free(path);
}

static void test_numbers_read_back_bitwise(void **state) {
    (void)state;
    const double value = 0.1 + 0.2;
    char *path = path_join(directory, "exact.jsonl"), *data;
    size_t size;
    struct metrics_file file;
    assert_int_equal(metrics_file_open(&file, path, 0), STATUS_OK);
    assert_int_equal(metrics_file_add(&file, json_pack("{s:f}", "x", value)), STATUS_OK);
    metrics_file_close(&file);
    assert_int_equal(file_read(path, 1 << 20, &data, &size), STATUS_OK);
    json_t *object;
    assert_int_equal(json_parse("x", data, size, &object), STATUS_OK);
    assert_true(json_real_value(json_object_get(object, "x")) == value);
    json_decref(object);
    free(data);
    free(path);
}

/* Vectors of RFC 3720, appendix B.4. */
static void test_crc32c(void **state) {
    (void)state;
    unsigned char bytes[32] = {0};
    assert_int_equal(crc32c(bytes, 32), 0x8A9136AAu);
    memset(bytes, 0xFF, 32);
    assert_int_equal(crc32c(bytes, 32), 0x62A8AB43u);
    for (int i = 0; i < 32; i++)
        bytes[i] = (unsigned char)i;
    assert_int_equal(crc32c(bytes, 32), 0x46DD794Eu);
}

static uint64_t read_little_endian(const char *data, int byte_count) {
    uint64_t value = 0;
    for (int i = byte_count - 1; i >= 0; i--)
        value = value << 8 | (unsigned char)data[i];
    return value;
}

static void test_tensorboard_records(void **state) {
    (void)state;
    struct tensorboard board;
    char *data;
    size_t size, at = 0;
    int records = 0;
    assert_int_equal(tensorboard_open(&board, directory, 1e9), STATUS_OK);
    assert_int_equal(tensorboard_add(&board, "loss", 2.5, 300, 1e9), STATUS_OK);
    char *path = memory_copy_string(board.writer.path);
    tensorboard_close(&board);
    assert_int_equal(file_read(path, 1 << 20, &data, &size), STATUS_OK);
    while (at < size) {
        uint64_t length = read_little_endian(data + at, 8);
        assert_true(at + 16 + length <= size);
        uint32_t crc = crc32c(data + at + 12, length), stored = (uint32_t)read_little_endian(data + at + 12 + length, 4);
        assert_int_equal((crc >> 15 | crc << 17) + 0xA282EAD8u, stored);
        at += 16 + length;
        records++;
    }
    assert_int_equal(records, 2);
    const char expected[] = "\x0a\x0b\x0a\x04loss\x15\x00\x00\x20\x40";
    assert_memory_equal(data + size - 4 - (sizeof expected - 1), expected, sizeof expected - 1);
    free(data);
    free(path);
}

static void test_durations(void **state) {
    (void)state;
    char buffer[32];
    assert_string_equal(progress_duration(buffer, 5), "5s");
    assert_string_equal(progress_duration(buffer, 65), "1m05s");
    assert_string_equal(progress_duration(buffer, 3700), "1h01m");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_resumed_file_equals_uninterrupted), cmocka_unit_test(test_resumed_after_a_return),
        cmocka_unit_test(test_numbers_read_back_bitwise),
        cmocka_unit_test(test_crc32c), cmocka_unit_test(test_tensorboard_records), cmocka_unit_test(test_durations)};
    return cmocka_run_group_tests(tests, make_directory, remove_directory);
}
