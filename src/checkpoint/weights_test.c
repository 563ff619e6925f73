#include "checkpoint/weights.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static char directory[] = "/tmp/cadre-weights-XXXXXX";

static int set_up(void **state) {
    (void)state;
    return mkdtemp(directory) ? 0 : -1;
}

static int tear_down(void **state) {
    (void)state;
    return directory_remove(directory) == STATUS_OK ? 0 : -1;
}

static int empty_directory(void **state) {
    (void)state;
    return directory_remove(directory) == STATUS_OK && directory_make(directory) == STATUS_OK ? 0 : -1;
}

/* A file with one tensor of one value for each letter of names. */
static void write_file(const char *file, const char *names, float value) {
    struct named_tensor items[8];
    int count = (int)strlen(names);
    for (int i = 0; i < count; i++)
        items[i] = (struct named_tensor){{names[i]}, tensor_1d(&value, DTYPE_F32, 1), 0, 0};
    char *path = path_join(directory, file);
    assert_int_equal(safetensors_write(path, items, count, device_cpu()), STATUS_OK);
    free(path);
}

static void write_index(const char *map) {
    char *path = path_join(directory, "model.safetensors.index.json"), *text = text_format("{\"weight_map\":%s}", map);
    assert_int_equal(file_write(path, text, strlen(text)), STATUS_OK);
    free(path);
    free(text);
}

static void test_shards(void **state) {
    (void)state;
    float a, b;
    struct named_tensor back[] = {{"b", tensor_1d(&b, DTYPE_F32, 1), 0, 0}, {"a", tensor_1d(&a, DTYPE_F32, 1), 0, 0}};
    struct weights w;
    write_file("one.safetensors", "a", 1);
    write_file("two.safetensors", "b", 2);
    write_index("{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\"}");
    assert_int_equal(weights_open(&w, directory), STATUS_OK);
    assert_int_equal(weights_fill(&w, back, 1, device_cpu()), STATUS_OK);
    assert_string_equal(weights_first_unused(&w), "a");
    assert_int_equal(weights_fill(&w, back, 2, device_cpu()), STATUS_OK);
    assert_null(weights_first_unused(&w));
    assert_true(a == 1 && b == 2);
    strcpy(back[0].name, "c");
    assert_int_equal(weights_fill(&w, back, 1, device_cpu()), STATUS_FORMAT);
    assert_non_null(strstr(status_text(), "\"c\" is missing"));
    weights_close(&w);
}

static void test_bad_index(void **state) {
    (void)state;
    const char *const bad[] = {"{\"a\":\"../one.safetensors\"}",
                               "{\"a\":\"/one.safetensors\"}",
                               "{\"a\":\"x/one.safetensors\"}",
                               "{\"a\":\"..\"}",
                               "{\"a\":\"\"}",
                               "{\"b\":\"one.safetensors\"}",
                               "{\"a\":7}",
                               "7",
                               "[]",
                               "{\"a\":\"three.safetensors\"}",
                               "{\"a\":\"one.safetensors\",\"a\":\"one.safetensors\"}"};
    struct weights w;
    write_file("one.safetensors", "a", 1);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        write_index(bad[i]);
        if (weights_open(&w, directory) == STATUS_OK)
            fail_msg("accepted: %s", bad[i]);
    }
    write_index("{\"a\":\"one.safetensors\"}");
    assert_int_equal(weights_open(&w, directory), STATUS_OK);
    weights_close(&w);
}

/* The index could mean either: a reader that takes the first one would read another model than transformers. */
static void test_tensor_in_two_shards(void **state) {
    (void)state;
    struct weights w;
    write_file("one.safetensors", "ab", 1);
    write_file("two.safetensors", "bc", 2);
    write_index("{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\",\"c\":\"two.safetensors\"}");
    assert_int_equal(weights_open(&w, directory), STATUS_FORMAT);
    assert_non_null(strstr(status_text(), "tensor \"b\" stands in "));
}

/* As in transformers: the single file comes first, an index that was left behind is not looked at. */
static void test_single_file_comes_first(void **state) {
    (void)state;
    const struct safetensors *file;
    struct weights w;
    assert_int_equal(weights_open(&w, directory), STATUS_NOT_FOUND);
    assert_non_null(strstr(status_text(), "neither model.safetensors nor"));
    write_index("{\"a\":\"gone.safetensors\"}");
    write_file("model.safetensors", "xy", 1);
    assert_int_equal(weights_open(&w, directory), STATUS_OK);
    assert_non_null(weights_find(&w, "x", &file));
    assert_non_null(weights_find(&w, "y", &file));
    assert_null(weights_find(&w, "a", &file));
    weights_close(&w);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test_setup(test_shards, empty_directory),
                                       cmocka_unit_test_setup(test_bad_index, empty_directory),
                                       cmocka_unit_test_setup(test_tensor_in_two_shards, empty_directory),
                                       cmocka_unit_test_setup(test_single_file_comes_first, empty_directory)};
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
