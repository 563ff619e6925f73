#include "checkpoint/weights.h"

#include "base/random.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static char directory[] = "/tmp/cadre-safetensors-XXXXXX";
static char *file_path;

static int set_up(void **state) {
    (void)state;
    if (!mkdtemp(directory))
        return -1;
    file_path = path_join(directory, "model.safetensors");
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    free(file_path);
    return directory_remove(directory) == STATUS_OK ? 0 : -1;
}

static void write_raw(const char *header, uint64_t header_size, size_t data_size) {
    struct text file = {0};
    for (int i = 0; i < 8; i++) {
        char byte = (char)(header_size >> 8 * i & 0xFF);
        text_add(&file, &byte, 1);
    }
    text_add_string(&file, header);
    for (size_t i = 0; i < data_size; i++)
        text_add(&file, "\x3f", 1);
    assert_int_equal(file_write(file_path, file.data, file.size), STATUS_OK);
    text_release(&file);
}

static enum status open_raw(const char *header, size_t data_size) {
    struct safetensors file;
    write_raw(header, strlen(header), data_size);
    enum status status = safetensors_open(&file, file_path);
    if (status == STATUS_OK)
        safetensors_close(&file);
    return status;
}

static void test_write_and_read_back(void **state) {
    (void)state;
    float a[6] = {1, -2, 3.5f, 0, -0.0f, 1e-30f}, a_back[6];
    double b[2] = {1e300, -1}, b_back[2];
    uint16_t c[3] = {float_to_bf16(1.5f), float_to_bf16(-3), 0}, c_back[3];
    struct named_tensor items[] = {{"z.a", tensor_2d(a, DTYPE_F32, 2, 3)},
                                   {"b", tensor_1d(b, DTYPE_F64, 2)},
                                   {"a.c", tensor_3d(c, DTYPE_BF16, 3, 1, 1)}};
    assert_int_equal(safetensors_write(file_path, items, 3, device_cpu()), STATUS_OK);
    struct named_tensor back[] = {{"z.a", tensor_2d(a_back, DTYPE_F32, 2, 3)},
                                  {"b", tensor_1d(b_back, DTYPE_F64, 2)},
                                  {"a.c", tensor_3d(c_back, DTYPE_BF16, 3, 1, 1)}};
    assert_int_equal(safetensors_fill(file_path, back, 3, device_cpu()), STATUS_OK);
    assert_memory_equal(a, a_back, sizeof a);
    assert_memory_equal(b, b_back, sizeof b);
    assert_memory_equal(c, c_back, sizeof c);
    assert_int_equal(safetensors_fill(file_path, back, 2, device_cpu()), STATUS_FORMAT); /* one is left over */
    back[0].tensor = tensor_2d(a_back, DTYPE_F32, 3, 2);
    assert_int_equal(safetensors_fill(file_path, back, 3, device_cpu()), STATUS_FORMAT);
    assert_non_null(strstr(status_text(), "[2,3]"));
}

static void test_conversions(void **state) {
    (void)state;
    /* f16: 1.5, the smallest subnormal, infinity; bf16: 1.5 */
    const char header[] = "{\"h\":{\"dtype\":\"F16\",\"shape\":[3],\"data_offsets\":[0,6]},"
                          "\"b\":{\"dtype\":\"BF16\",\"shape\":[1],\"data_offsets\":[6,8]}}";
    struct safetensors file;
    double h[3];
    float b;
    write_raw(header, strlen(header), 8);
    FILE *raw = fopen(file_path, "r+b");
    assert_non_null(raw);
    fseek(raw, -8, SEEK_END);
    const unsigned char data[8] = {0x00, 0x3e, 0x01, 0x00, 0x00, 0x7c, 0xc0, 0x3f};
    assert_int_equal(fwrite(data, 1, 8, raw), 8);
    fclose(raw);
    assert_int_equal(safetensors_open(&file, file_path), STATUS_OK);
    assert_int_equal(safetensors_read(&file, safetensors_find(&file, "h"), 0, 3, DTYPE_F64, h), STATUS_OK);
    assert_true(h[0] == 1.5 && h[1] == ldexp(1, -24) && isinf(h[2]));
    assert_int_equal(safetensors_read(&file, safetensors_find(&file, "b"), 0, 1, DTYPE_F32, &b), STATUS_OK);
    assert_true(b == 1.5f);
    safetensors_close(&file);
}

static void test_refusals(void **state) {
    (void)state;
    assert_int_equal(open_raw("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8), STATUS_OK);
    assert_int_equal(open_raw("{\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}   ", 4), STATUS_OK);
    assert_int_equal(open_raw("{\"a\":{\"dtype\":\"F32\",\"shape\":[0,7],\"data_offsets\":[0,0]}}", 0), STATUS_OK);
    const struct {
        const char *header;
        size_t data;
    } bad[] = {
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 7},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 9},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[1,9]}}", 9},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", 8},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,8]}}", 8},
        {"{\"a\":{\"dtype\":\"F33\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", 8},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4],\"data_offsets\":[0,0]}}", 0},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,4]}}", 4},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
         "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
         "\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", 8},
        {"{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4},
        {"{\"a\":7}", 0},
        {"[]", 0},
        {"{", 0},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        if (open_raw(bad[i].header, bad[i].data) != STATUS_FORMAT)
            fail_msg("accepted: %s with %zu bytes of data", bad[i].header, bad[i].data);
    struct safetensors file;
    write_raw("{}", UINT64_MAX, 0);
    assert_int_equal(safetensors_open(&file, file_path), STATUS_FORMAT);
    assert_int_equal(file_write(file_path, "short", 5), STATUS_OK);
    assert_int_equal(safetensors_open(&file, file_path), STATUS_FORMAT);
}

/* Whatever is done to a file, it is refused or every entry lies inside it. */
static void test_mutations(void **state) {
    (void)state;
    float a[12] = {0};
    struct named_tensor items[] = {{"first", tensor_2d(a, DTYPE_F32, 3, 4)}, {"second", tensor_1d(a, DTYPE_F32, 5)}};
    char *data;
    size_t size;
    assert_int_equal(safetensors_write(file_path, items, 2, device_cpu()), STATUS_OK);
    assert_int_equal(file_read(file_path, 1 << 20, &data, &size), STATUS_OK);
    char *mutated = malloc(size);
    for (uint64_t round = 0; round < 4000; round++) {
        memcpy(mutated, data, size);
        for (uint64_t k = 0; k <= round % 4; k++)
            mutated[random_bits(1, round, 2 * k) % size] = (char)random_bits(1, round, 2 * k + 1);
        size_t kept = round % 5 == 0 ? random_bits(2, round, 0) % size : size;
        FILE *raw = fopen(file_path, "wb");
        assert_non_null(raw);
        assert_int_equal(fwrite(mutated, 1, kept, raw), kept);
        fclose(raw);
        struct safetensors file;
        if (safetensors_open(&file, file_path) != STATUS_OK)
            continue;
        for (int i = 0; i < file.entry_count; i++) {
            float values[64];
            int64_t elements = safetensors_elements(&file.entries[i]);
            assert_true(file.data + file.entries[i].end <= file.map.data + file.map.size);
            if (elements <= 64 && file.entries[i].dtype <= SAFETENSORS_BF16)
                assert_int_equal(safetensors_read(&file, &file.entries[i], 0, elements, DTYPE_F32, values), STATUS_OK);
        }
        safetensors_close(&file);
    }
    free(mutated);
    free(data);
}

static void write_index(const char *map) {
    char *path = path_join(directory, "model.safetensors.index.json"), *text = text_format("{\"weight_map\":%s}", map);
    assert_int_equal(file_write(path, text, strlen(text)), STATUS_OK);
    free(path);
    free(text);
}

static void test_shards(void **state) {
    (void)state;
    float a = 1, b = 2, a_back, b_back;
    struct named_tensor first = {"a", tensor_1d(&a, DTYPE_F32, 1)}, second = {"b", tensor_1d(&b, DTYPE_F32, 1)};
    char *one = path_join(directory, "one.safetensors"), *two = path_join(directory, "two.safetensors");
    assert_int_equal(safetensors_write(one, &first, 1, device_cpu()), STATUS_OK);
    assert_int_equal(safetensors_write(two, &second, 1, device_cpu()), STATUS_OK);
    struct named_tensor back[] = {{"b", tensor_1d(&b_back, DTYPE_F32, 1)}, {"a", tensor_1d(&a_back, DTYPE_F32, 1)}};
    struct weights w;
    write_index("{\"a\":\"one.safetensors\",\"b\":\"two.safetensors\"}");
    assert_int_equal(weights_open(&w, directory), STATUS_OK);
    assert_int_equal(weights_fill(&w, back, 1, device_cpu()), STATUS_OK);
    assert_string_equal(weights_first_unused(&w), "a");
    assert_int_equal(weights_fill(&w, back, 2, device_cpu()), STATUS_OK);
    assert_null(weights_first_unused(&w));
    assert_true(a_back == 1 && b_back == 2);
    weights_close(&w);
    const char *const bad[] = {"{\"a\":\"../one.safetensors\"}", "{\"b\":\"one.safetensors\"}", "{\"a\":7}", "7",
                               "{\"a\":\"three.safetensors\"}"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        write_index(bad[i]);
        assert_int_not_equal(weights_open(&w, directory), STATUS_OK);
    }
    free(one);
    free(two);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_write_and_read_back), cmocka_unit_test(test_conversions),
                                       cmocka_unit_test(test_refusals), cmocka_unit_test(test_mutations),
                                       cmocka_unit_test(test_shards)};
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
