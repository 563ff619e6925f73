/* Operations that look at one element at a time, the gated activation, and the optimizer. */
#include "kernels/ref/ref.h"

#include "base/hash.h"

#include <string.h>

void ref_fill(struct tensor t, double value) {
    for (int64_t i = 0, count = tensor_elements(t); i < count; i++) {
        if (t.dtype == DTYPE_I32)
            ((int32_t *)t.data)[i] = (int32_t)value;
        else
            ref_store(t, i, value);
    }
}

void ref_cast(struct tensor from, struct tensor to) {
    CHECK(ref_is_float(from) && ref_is_float(to) && tensor_same_shape(from, to));
    for (int64_t i = 0, count = tensor_elements(to); i < count; i++)
        ref_store(to, i, ref_load(from, i));
}

void ref_add_tensor(struct tensor x, struct tensor y) {
    CHECK(tensor_same_shape(x, y));
    if (x.dtype == DTYPE_I32 && y.dtype == DTYPE_I32) {
        for (int64_t i = 0, count = tensor_elements(y); i < count; i++)
            ((int32_t *)y.data)[i] += (int32_t)ref_index(x, i);
        return;
    }
    CHECK(ref_is_float(x) && ref_is_float(y));
    for (int64_t i = 0, count = tensor_elements(y); i < count; i++)
        ref_add(y, i, ref_load(x, i));
}

void ref_sum_squares(struct tensor x, struct tensor sum) {
    CHECK(ref_is_float(x) && sum.dtype == DTYPE_F64 && ref_is_1d(sum, 1));
    double total = 0;
    for (int64_t i = 0, count = tensor_elements(x); i < count; i++)
        total += ref_load(x, i) * ref_load(x, i);
    ref_add(sum, 0, total);
}

void ref_gather_scalars(struct tensor from, struct tensor index, struct tensor to) {
    bool is_integer = from.dtype == DTYPE_I32;
    CHECK((is_integer || ref_is_real(from, from.dtype)) && to.dtype == from.dtype && index.dtype == DTYPE_I32);
    CHECK_OP(tensor_elements(index), ==, tensor_elements(to));
    for (int64_t i = 0, count = tensor_elements(to); i < count; i++) {
        int64_t at = ref_index(index, i);
        CHECK(at >= 0 && at < tensor_elements(from));
        if (is_integer)
            ((int32_t *)to.data)[i] = (int32_t)ref_index(from, at);
        else
            ref_store(to, i, ref_load(from, at));
    }
}

void ref_gather_rows(struct tensor from, struct tensor index, struct tensor to) {
    int64_t rows = to.shape[0], width = to.shape[1];
    CHECK(ref_is_float(from) && to.dtype == from.dtype && index.dtype == DTYPE_I32);
    CHECK(ref_is_2d(from, from.shape[0], width) && ref_is_2d(to, rows, width) && ref_is_1d(index, rows));
    for (int64_t i = 0; i < rows; i++) {
        int64_t at = ref_index(index, i);
        CHECK(at >= 0 && at < from.shape[0]);
        memcpy(tensor_rows(to, i, 1).data, tensor_rows(from, at, 1).data, (size_t)width * dtype_size(to.dtype));
    }
}

static double sigmoid(double x) {
    return 1 / (1 + exp(-x));
}

/* Returns the number of rows after the checks that both directions of swiglu share. */
static int64_t check_swiglu(struct tensor gate, struct tensor up, struct tensor row_weight) {
    CHECK(ref_is_float(gate) && ref_is_float(up));
    CHECK(ref_is_2d(gate, gate.shape[0], gate.shape[1]) && tensor_same_shape(gate, up));
    if (tensor_exists(row_weight))
        CHECK(ref_is_real(row_weight, gate.dtype) && ref_is_1d(row_weight, gate.shape[0]));
    return gate.shape[0];
}

void ref_swiglu_forward(struct tensor gate, struct tensor up, struct tensor row_weight, struct tensor act) {
    int64_t row_count = check_swiglu(gate, up, row_weight), width = gate.shape[1];
    CHECK(ref_is_float(act) && tensor_same_shape(act, gate));
    for (int64_t n = 0; n < row_count; n++) {
        double weight = tensor_exists(row_weight) ? ref_load(row_weight, n) : 1;
        for (int64_t i = n * width; i < (n + 1) * width; i++) {
            double g = ref_load(gate, i), u = ref_load(up, i);
            ref_store(act, i, g * sigmoid(g) * u * weight);
        }
    }
}

void ref_swiglu_backward(struct tensor dact, struct tensor gate, struct tensor up, struct tensor row_weight,
                         struct tensor dgate, struct tensor dup, struct tensor drow_weight) {
    int64_t row_count = check_swiglu(gate, up, row_weight), width = gate.shape[1];
    CHECK(ref_is_float(dact) && ref_is_float(dgate) && ref_is_float(dup));
    CHECK(tensor_same_shape(dact, gate) && tensor_same_shape(dgate, gate) && tensor_same_shape(dup, gate));
    if (row_count)
        CHECK(tensor_exists(row_weight) == tensor_exists(drow_weight));
    if (tensor_exists(drow_weight))
        CHECK(ref_is_real(drow_weight, gate.dtype) && ref_is_1d(drow_weight, row_count));
    for (int64_t n = 0; n < row_count; n++) {
        double weight = tensor_exists(row_weight) ? ref_load(row_weight, n) : 1, dweight = 0;
        for (int64_t i = n * width; i < (n + 1) * width; i++) {
            double d = ref_load(dact, i), g = ref_load(gate, i), u = ref_load(up, i), s = sigmoid(g);
            dweight += d * g * s * u;
            ref_store(dgate, i, d * weight * u * s * (1 + g * (1 - s)));
            ref_store(dup, i, d * weight * g * s);
        }
        if (tensor_exists(drow_weight))
            ref_store(drow_weight, n, dweight);
    }
}

static void hash_whole_blocks(struct tensor t, uint64_t *hashes) {
    if (hashes)
        hash_blocks(t.data, tensor_bytes(t) / HASH_BLOCK_BYTES * HASH_BLOCK_BYTES, hashes);
}

void ref_adamw(struct tensor param, struct tensor grad, struct tensor m, struct tensor v,
               struct adamw_settings settings, struct packed packed, struct update_hashes hashes) {
    int64_t count = tensor_elements(param);
    CHECK(ref_is_real(param, param.dtype) && grad.dtype == param.dtype);
    CHECK(m.dtype == param.dtype && v.dtype == param.dtype);
    CHECK(ref_is_1d(grad, count) && ref_is_1d(m, count) && ref_is_1d(v, count));
    CHECK_OP(settings.step, >=, 1);
    double m_bias = 1 - pow(settings.beta1, (double)settings.step);
    double v_bias = 1 - pow(settings.beta2, (double)settings.step);
    for (int64_t i = 0; i < count; i++) {
        double g = ref_load(grad, i) * settings.grad_scale, p = ref_load(param, i);
        double first = settings.beta1 * ref_load(m, i) + (1 - settings.beta1) * g;
        double second = settings.beta2 * ref_load(v, i) + (1 - settings.beta2) * g * g;
        double update = first / m_bias / (sqrt(second / v_bias) + settings.epsilon);
        ref_store(m, i, first);
        ref_store(v, i, second);
        ref_store(param, i, p - settings.lr * (update + settings.weight_decay * p));
    }
    hash_whole_blocks(param, hashes.param);
    hash_whole_blocks(m, hashes.m);
    hash_whole_blocks(v, hashes.v);
    if (packed.data)
        ref_pack(param, packed);
}
