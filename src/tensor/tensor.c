#include "tensor/tensor.h"

size_t dtype_size(enum dtype dtype) {
    static const size_t sizes[DTYPE_COUNT] = {4, 2, 8, 4};
    CHECK(dtype < DTYPE_COUNT);
    return sizes[dtype];
}

const char *dtype_name(enum dtype dtype) {
    static const char *const names[DTYPE_COUNT] = {"f32", "bf16", "f64", "i32"};
    CHECK(dtype < DTYPE_COUNT);
    return names[dtype];
}

struct tensor tensor_make(void *data, enum dtype dtype, int dim_count, int64_t d0, int64_t d1, int64_t d2) {
    CHECK(dim_count >= 1 && dim_count <= 3);
    CHECK(d0 >= 0 && d1 >= 0 && d2 >= 0);
    return (struct tensor){dtype, dim_count, {d0, d1, d2, 1}, data};
}

struct tensor tensor_1d(void *data, enum dtype dtype, int64_t d0) {
    return tensor_make(data, dtype, 1, d0, 1, 1);
}

struct tensor tensor_2d(void *data, enum dtype dtype, int64_t d0, int64_t d1) {
    return tensor_make(data, dtype, 2, d0, d1, 1);
}

struct tensor tensor_3d(void *data, enum dtype dtype, int64_t d0, int64_t d1, int64_t d2) {
    return tensor_make(data, dtype, 3, d0, d1, d2);
}

struct tensor tensor_none(void) {
    return (struct tensor){DTYPE_F32, 1, {0, 1, 1, 1}, NULL};
}

bool tensor_exists(struct tensor t) {
    return t.data != NULL;
}

int64_t tensor_elements(struct tensor t) {
    return t.shape[0] * t.shape[1] * t.shape[2] * t.shape[3];
}

size_t tensor_bytes(struct tensor t) {
    return (size_t)tensor_elements(t) * dtype_size(t.dtype);
}

bool tensor_same_shape(struct tensor a, struct tensor b) {
    for (int i = 0; i < TENSOR_DIMS_MAX; i++)
        if (a.shape[i] != b.shape[i])
            return false;
    return true;
}

struct tensor tensor_reshape_2d(struct tensor t, int64_t rows, int64_t columns) {
    CHECK_OP(rows * columns, ==, tensor_elements(t));
    return tensor_2d(t.data, t.dtype, rows, columns);
}

static int64_t row_elements(struct tensor t) {
    return t.shape[1] * t.shape[2] * t.shape[3];
}

struct tensor tensor_rows(struct tensor t, int64_t first, int64_t count) {
    CHECK(first >= 0 && count >= 0);
    CHECK_OP(first + count, <=, t.shape[0]);
    if (t.data)
        t.data = (char *)t.data + (size_t)(first * row_elements(t)) * dtype_size(t.dtype);
    t.shape[0] = count;
    return t;
}

struct tensor tensor_slice(struct tensor t, int64_t index) {
    CHECK(t.dim_count >= 2 && index >= 0);
    struct tensor row = tensor_rows(t, index, 1);
    return (struct tensor){t.dtype, t.dim_count - 1, {t.shape[1], t.shape[2], t.shape[3], 1}, row.data};
}
