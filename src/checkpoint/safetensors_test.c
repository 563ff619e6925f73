#include "checkpoint/weights.h"

#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
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

static void write_raw_data(const char *header, uint64_t header_size, const void *data, size_t data_size) {
    struct text file = {0};
    for (int i = 0; i < 8; i++) {
        char byte = (char)(header_size >> 8 * i & 0xFF);
        text_add(&file, &byte, 1);
    }
    text_add_string(&file, header);
    text_add(&file, data, data_size);
    assert_int_equal(file_write(file_path, file.data, file.size), STATUS_OK);
    text_release(&file);
}

static void write_raw(const char *header, uint64_t header_size, size_t data_size) {
    char data[64];
    assert_true(data_size <= sizeof data);
    memset(data, 0x3f, sizeof data);
    write_raw_data(header, header_size, data, data_size);
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
    struct named_tensor items[] = {{"z.a", tensor_2d(a, DTYPE_F32, 2, 3), 0, 0},
                                   {"b", tensor_1d(b, DTYPE_F64, 2), 0, 0},
                                   {"a.c", tensor_3d(c, DTYPE_BF16, 3, 1, 1), 0, 0}};
    assert_int_equal(safetensors_write(file_path, items, 3, device_cpu()), STATUS_OK);
    struct named_tensor back[] = {{"z.a", tensor_2d(a_back, DTYPE_F32, 2, 3), 0, 0},
                                  {"b", tensor_1d(b_back, DTYPE_F64, 2), 0, 0},
                                  {"a.c", tensor_3d(c_back, DTYPE_BF16, 3, 1, 1), 0, 0}};
    assert_int_equal(safetensors_fill(file_path, back, 3, device_cpu()), STATUS_OK);
    assert_memory_equal(a, a_back, sizeof a);
    assert_memory_equal(b, b_back, sizeof b);
    assert_memory_equal(c, c_back, sizeof c);
    assert_int_equal(safetensors_fill(file_path, back, 2, device_cpu()), STATUS_FORMAT); /* one is left over */
    back[0].tensor = tensor_2d(a_back, DTYPE_F32, 3, 2);
    assert_int_equal(safetensors_fill(file_path, back, 3, device_cpu()), STATUS_FORMAT);
    assert_non_null(strstr(status_text(), "[2,3]"));
    back[0].tensor = tensor_2d(a_back, DTYPE_BF16, 2, 3);
    assert_int_equal(safetensors_fill(file_path, back, 3, device_cpu()), STATUS_FORMAT); /* would lose bits */
    assert_non_null(strstr(status_text(), "nothing is converted"));
}

/* One file with every dtype that can be read, its data beginning at an odd address. */
static void open_mixed(struct safetensors *file) {
    const char header[] = "{\"h\":{\"dtype\":\"F16\",\"shape\":[3],\"data_offsets\":[1,7]},"
                          "\"b\":{\"dtype\":\"BF16\",\"shape\":[2],\"data_offsets\":[7,11]},"
                          "\"s\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[11,19]},"
                          "\"d\":{\"dtype\":\"F64\",\"shape\":[2],\"data_offsets\":[19,35]},"
                          "\"i\":{\"dtype\":\"I32\",\"shape\":[2],\"data_offsets\":[35,43]},"
                          "\"l\":{\"dtype\":\"I64\",\"shape\":[2],\"data_offsets\":[43,59]},"
                          "\"u\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}";
    const uint16_t h[3] = {0x3e00, 0x0001, 0x7c00}; /* 1.5, the smallest subnormal, infinity */
    const uint16_t b[2] = {0x3fc0, 0xc040};         /* 1.5, -3 */
    const float s[2] = {1.00390625f, -3};           /* halfway between two bf16: to even, down */
    const double d[2] = {1.5, -1e300};
    const int32_t i[2] = {7, INT32_MIN};
    const int64_t l[2] = {-9, (int64_t)1 << 40};
    struct text data = {0};
    text_add(&data, "\7", 1);
    text_add(&data, h, sizeof h);
    text_add(&data, b, sizeof b);
    text_add(&data, s, sizeof s);
    text_add(&data, d, sizeof d);
    text_add(&data, i, sizeof i);
    text_add(&data, l, sizeof l);
    write_raw_data(header, strlen(header), data.data, data.size);
    text_release(&data);
    assert_int_equal(safetensors_open(file, file_path), STATUS_OK);
}

static enum status read_named(const struct safetensors *file, const char *name, int64_t first, int64_t count,
                              enum dtype to, void *host) {
    const struct safetensors_entry *entry = safetensors_find(file, name);
    assert_non_null(entry);
    return safetensors_read(file, entry, first, count, to, host);
}

static void test_conversions(void **state) {
    (void)state;
    struct safetensors file;
    double d[3];
    float f[3];
    uint16_t b[3];
    int32_t i[2];
    open_mixed(&file);
    assert_int_equal(read_named(&file, "h", 0, 3, DTYPE_F64, d), STATUS_OK);
    assert_true(d[0] == 1.5 && d[1] == ldexp(1, -24) && isinf(d[2]));
    assert_int_equal(read_named(&file, "b", 0, 2, DTYPE_F32, f), STATUS_OK);
    assert_true(f[0] == 1.5f && f[1] == -3);
    assert_int_equal(read_named(&file, "b", 0, 2, DTYPE_BF16, b), STATUS_OK);
    assert_true(b[0] == 0x3fc0 && b[1] == 0xc040);
    assert_int_equal(read_named(&file, "s", 0, 2, DTYPE_BF16, b), STATUS_OK);
    assert_true(b[0] == 0x3f80 && b[1] == 0xc040);
    assert_int_equal(read_named(&file, "d", 0, 2, DTYPE_F32, f), STATUS_OK);
    assert_true(f[0] == 1.5f && isinf(f[1]) && f[1] < 0);
    assert_int_equal(read_named(&file, "l", 0, 2, DTYPE_F64, d), STATUS_OK);
    assert_true(d[0] == -9 && d[1] == ldexp(1, 40));
    assert_int_equal(read_named(&file, "i", 0, 2, DTYPE_I32, i), STATUS_OK);
    assert_true(i[0] == 7 && i[1] == INT32_MIN);
    assert_int_equal(read_named(&file, "i", 0, 2, DTYPE_F32, f), STATUS_FORMAT);
    assert_int_equal(read_named(&file, "u", 0, 1, DTYPE_F32, f), STATUS_FORMAT);
    assert_int_equal(read_named(&file, "s", 0, 2, DTYPE_I32, i), STATUS_FORMAT);
    assert_non_null(strstr(status_text(), "\"s\" is F32 and cannot be read as i32"));
    safetensors_close(&file);
}

/* All 65536, against the definition. */
static void test_every_half(void **state) {
    (void)state;
    static uint16_t bits[65536];
    static float got[65536];
    const char header[] = "{\"h\":{\"dtype\":\"F16\",\"shape\":[65536],\"data_offsets\":[0,131072]}}";
    struct safetensors file;
    for (int i = 0; i < 65536; i++)
        bits[i] = (uint16_t)i;
    write_raw_data(header, strlen(header), bits, sizeof bits);
    assert_int_equal(safetensors_open(&file, file_path), STATUS_OK);
    assert_int_equal(read_named(&file, "h", 0, 65536, DTYPE_F32, got), STATUS_OK);
    for (int i = 0; i < 65536; i++) {
        int exponent = i >> 10 & 31, fraction = i & 1023;
        double value = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
        if (exponent == 31)
            value = fraction ? NAN : INFINITY;
        bool same = isnan(value) ? isnan(got[i]) : fabs((double)got[i]) == value;
        if (!same || (signbit(got[i]) != 0) != (i >= 0x8000))
            fail_msg("half %04x read as %g", i, (double)got[i]);
    }
    safetensors_close(&file);
}

/* Any range gives the same values as that part of the whole, and writes nothing beside it. */
static void test_ranges(void **state) {
    (void)state;
    float values[7] = {1, 2, 3, 4, 5, 6, 7}, whole[9], part[9];
    struct named_tensor item = {"x", tensor_1d(values, DTYPE_F32, 7), 0, 0};
    struct safetensors file;
    assert_int_equal(safetensors_write(file_path, &item, 1, device_cpu()), STATUS_OK);
    assert_int_equal(safetensors_open(&file, file_path), STATUS_OK);
    for (enum dtype to = DTYPE_F32; to <= DTYPE_BF16; to++)
        for (int first = 0; first <= 7; first++)
            for (int count = 0; first + count <= 7; count++) {
                size_t size = dtype_size(to);
                memset(part, 0xAB, sizeof part);
                memset(whole, 0xAB, sizeof whole);
                assert_int_equal(read_named(&file, "x", 0, 7, to, whole), STATUS_OK);
                assert_int_equal(read_named(&file, "x", first, count, to, part), STATUS_OK);
                assert_memory_equal(part, (char *)whole + (size_t)first * size, (size_t)count * size);
                assert_true(((unsigned char *)part)[(size_t)count * size] == 0xAB);
            }
    safetensors_close(&file);
}

/* What a plan says, with every item at its place. */
static void write_plan(const struct safetensors_plan *plan, const char *path) {
    char *bytes = calloc(1, plan->file_bytes);
    assert_non_null(bytes);
    memcpy(bytes, plan->header, plan->header_bytes);
    for (int i = 0; i < plan->count; i++)
        memcpy(bytes + plan->begins[i], plan->order[i]->tensor.data, tensor_bytes(plan->order[i]->tensor));
    assert_int_equal(file_write(path, bytes, plan->file_bytes), STATUS_OK);
    free(bytes);
}

static void test_metadata(void **state) {
    (void)state;
    float a = 1;
    struct named_tensor item = {"a", tensor_1d(&a, DTYPE_F32, 1), 0, 0};
    struct safetensors_metadata pair = {(char[]){"step"}, (char[]){"one \"hundred\""}};
    struct safetensors_plan plan;
    struct safetensors file;
    assert_int_equal(safetensors_plan_init(&plan, &item, 1, &pair, 1), STATUS_OK);
    write_plan(&plan, file_path);
    safetensors_plan_release(&plan);
    assert_int_equal(safetensors_open(&file, file_path), STATUS_OK);
    assert_string_equal(safetensors_metadata_find(&file, "format"), "pt");
    assert_string_equal(safetensors_metadata_find(&file, "step"), "one \"hundred\"");
    assert_null(safetensors_metadata_find(&file, "steps"));
    assert_int_equal(file.entry_count, 1);
    safetensors_close(&file);
}

static void test_dtypes(void **state) {
    (void)state;
    for (int dtype = 0; dtype < SAFETENSORS_DTYPE_COUNT; dtype++) {
        const char *name = safetensors_dtype_name((enum safetensors_dtype)dtype);
        int bytes = safetensors_dtype_bits((enum safetensors_dtype)dtype); /* of 8 elements */
        char *header = text_format("{\"a\":{\"dtype\":\"%s\",\"shape\":[2,4],\"data_offsets\":[0,%d]}}", name, bytes);
        assert_int_equal(open_raw(header, (size_t)bytes), STATUS_OK);
        assert_int_equal(open_raw(header, (size_t)bytes - 1), STATUS_FORMAT);
        free(header);
    }
    const char *const unknown = "{\"a\":{\"dtype\":\"F33\",\"shape\":[2],\"data_offsets\":[0,8]}}";
    assert_int_equal(open_raw(unknown, 8), STATUS_FORMAT);
    assert_non_null(strstr(status_text(), "\"F33\""));
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
         "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}",
         4},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
         "\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}",
         8},
        {"{\"a\":{\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,1]}}", 1},
        {"{\"a\":{\"dtype\":\"F6_E2M3\",\"shape\":[2],\"data_offsets\":[0,1]}}", 1},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
         "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,12]}}",
         12},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1.0],\"data_offsets\":[0,4]}}", 4},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[99999999999999999999],\"data_offsets\":[0,4]}}", 4},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2305843009213693952],\"data_offsets\":[0,0]}}", 0},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,4]}}", 4},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[-4,0]}}", 4},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"x\":1}}", 4},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":1,\"data_offsets\":[0,4]}}", 4},
        {"{\"a\\u001b[2J\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4},
        {"{\"a\\u0000\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4},
        {"{\"\xff\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4},
        {" {\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}x", 4},
        {"{\"__metadata__\":7}", 0},
        {"{\"__metadata__\":{\"format\":7}}", 0},
        {"", 0},
        {"{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4},
        {"{\"a\":7}", 0},
        {"[]", 0},
        {"{", 0},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        if (open_raw(bad[i].header, bad[i].data) != STATUS_FORMAT)
            fail_msg("accepted: %s with %zu bytes of data", bad[i].header, bad[i].data);
    struct safetensors file;
    const uint64_t sizes[] = {UINT64_MAX, UINT64_MAX - 7, (uint64_t)1 << 63, 100000001, 3};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        write_raw("{}", sizes[i], 0);
        assert_int_equal(safetensors_open(&file, file_path), STATUS_FORMAT);
        assert_non_null(strstr(status_text(), "cut short")); /* refused before anything is parsed */
    }
    assert_int_equal(file_write(file_path, "short", 5), STATUS_OK);
    assert_int_equal(safetensors_open(&file, file_path), STATUS_FORMAT);
}

/* Bytes where the plan has them give the file that safetensors_write makes: widest first, then by name, header padded so that
 * the data is aligned. */
static void test_plan(void **state) {
    (void)state;
    float a[6] = {1, 2, 3, 4, 5, 6}, e[1] = {12};
    double d[2] = {7, 8};
    uint16_t b[3] = {9, 10, 11};
    const struct named_tensor items[] = {{"a", tensor_1d(b, DTYPE_BF16, 3), 0, 0},    {"z", tensor_1d(d, DTYPE_F64, 2), 0, 0},
                                         {"empty", tensor_1d(e, DTYPE_F32, 0), 0, 0}, {"n", tensor_2d(a, DTYPE_F32, 2, 3), 0, 0},
                                         {"m", tensor_1d(e, DTYPE_F32, 1), 0, 0},     {"last", tensor_1d(e, DTYPE_BF16, 0), 0, 0}};
    const char *const expected[] = {"z", "empty", "m", "n", "a", "last"};
    char *other = path_join(directory, "other.safetensors"), *one, *two;
    size_t one_size, two_size;
    struct safetensors_plan plan;
    assert_int_equal(safetensors_plan_init(&plan, items, 6, NULL, 0), STATUS_OK);
    assert_int_equal(plan.header_bytes % 8, 0);
    for (int i = 0; i < 6; i++) {
        assert_string_equal(plan.order[i]->name, expected[i]);
        uint64_t end = i < 5 ? plan.begins[i + 1] : plan.file_bytes;
        assert_int_equal(plan.begins[i] + tensor_bytes(plan.order[i]->tensor), end);
    }
    write_plan(&plan, other);
    safetensors_plan_release(&plan);
    assert_int_equal(safetensors_write(file_path, items, 6, device_cpu()), STATUS_OK);
    assert_int_equal(file_read(other, 10000, &one, &one_size), STATUS_OK);
    assert_int_equal(file_read(file_path, 10000, &two, &two_size), STATUS_OK);
    assert_int_equal(one_size, two_size);
    assert_memory_equal(one, two, one_size);
    assert_memory_equal(two + two_size - sizeof b, b, sizeof b);
    free(one);
    free(two);
    free(other);
}

struct fault {
    int countdown;
    bool met;
};

static int fail_at(void *context, enum file_operation operation, const char *path) {
    (void)operation;
    (void)path;
    struct fault *fault = context;
    bool now = fault->countdown-- == 0;
    fault->met |= now;
    return now ? ENOSPC : 0;
}

/* Whichever operation fails, the caller is told. */
/* Tensors of whole blocks come first, each at a block; all of them are read back. */
static void test_plan_of_blocks(void **state) {
    (void)state;
    enum { FLOATS = 2 * FILE_BLOCK_BYTES / 4 + 1 };
    static float values[FLOATS], found[FLOATS];
    for (int i = 0; i < FLOATS; i++)
        values[i] = (float)i;
    const struct named_tensor items[] = {{"a", tensor_1d(values, DTYPE_F64, 3), 0, 0},
                                         {"z", tensor_1d(values, DTYPE_F32, FILE_BLOCK_BYTES / 4), 0, 0},
                                         {"none", tensor_1d(values, DTYPE_F32, 0), 0, 0},
                                         {"m", tensor_1d(values, DTYPE_BF16, FILE_BLOCK_BYTES / 2), 0, 0},
                                         {"b", tensor_1d(values, DTYPE_F32, FLOATS), 0, 0},
                                         {"y", tensor_1d(values, DTYPE_F32, FLOATS - 1), 0, 0}};
    const char *const expected[] = {"y", "z", "m", "a", "b", "none"};
    struct safetensors_plan plan;
    struct safetensors file;
    assert_int_equal(safetensors_plan_init(&plan, items, 6, NULL, 0), STATUS_OK);
    for (int i = 0; i < 6; i++) {
        assert_string_equal(plan.order[i]->name, expected[i]);
        assert_true(i > 3 || plan.begins[i] % FILE_BLOCK_BYTES == 0);
    }
    safetensors_plan_release(&plan);
    assert_int_equal(safetensors_write(file_path, items, 6, device_cpu()), STATUS_OK);
    assert_int_equal(safetensors_open(&file, file_path), STATUS_OK);
    for (int i = 0; i < 6; i++) {
        if (items[i].tensor.dtype != DTYPE_F32)
            continue;
        int64_t count = tensor_elements(items[i].tensor);
        const struct safetensors_entry *entry = safetensors_find(&file, items[i].name);
        assert_non_null(entry);
        assert_int_equal(safetensors_read(&file, entry, 0, count, DTYPE_F32, found), STATUS_OK);
        assert_memory_equal(found, values, (size_t)count * sizeof *found);
    }
    safetensors_close(&file);
}

static void test_failing_disk(void **state) {
    (void)state;
    float a[2] = {1, 2};
    struct named_tensor items[] = {{"a", tensor_1d(a, DTYPE_F32, 2), 0, 0}, {"b", tensor_1d(a, DTYPE_F32, 2), 0, 0}};
    int failures = 0;
    for (bool met = true; met;) {
        struct fault fault = {failures, false};
        file_set_fault(fail_at, &fault);
        enum status status = safetensors_write(file_path, items, 2, device_cpu());
        file_set_fault(NULL, NULL);
        met = fault.met;
        assert_int_equal(status, met ? STATUS_IO : STATUS_OK);
        failures += met;
    }
    assert_int_equal(failures, 5); /* open, header, two tensors, flush */
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_write_and_read_back),
                                       cmocka_unit_test(test_conversions),
                                       cmocka_unit_test(test_every_half),
                                       cmocka_unit_test(test_ranges),
                                       cmocka_unit_test(test_metadata),
                                       cmocka_unit_test(test_dtypes),
                                       cmocka_unit_test(test_refusals),
                                       cmocka_unit_test(test_plan),
        cmocka_unit_test(test_plan_of_blocks),
                                       cmocka_unit_test(test_failing_disk)};
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
