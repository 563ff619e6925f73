#include "base/file.h"
#include "base/json.h"
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
        cmocka_unit_test(test_file_write_survives_any_failure),
        cmocka_unit_test(test_files),
        cmocka_unit_test(test_json_refusals),
        cmocka_unit_test(test_parallel_for_visits_each_once),
    };
    return cmocka_run_group_tests(tests, make_directory, remove_directory);
}
