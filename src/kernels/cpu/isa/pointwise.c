/* Operations that read and write each element once. */
#include "kernels/cpu/isa/lanes.h"

#include "base/threads.h"
#include "kernels/cpu/fillers.h"

enum { CHUNK = 1 << 14 };

struct pointwise {
    struct tensor a, b, c, out, out2, extra;
    double value;
    int64_t columns, choices;
    bool accumulate;
    double *sums;
};

static void run_chunks(struct pointwise *p, int64_t elements, void (*task)(void *context, int64_t index)) {
    parallel_for((elements + CHUNK - 1) / CHUNK, task, p);
}

/* A chunk of a flat tensor as a one-row matrix, for row_as_float and store_row. */
static struct tensor chunk_of(struct tensor t, int64_t index, int64_t *count) {
    int64_t elements = tensor_elements(t);
    *count = smaller(CHUNK, elements - index * CHUNK);
    return tensor_2d((char *)t.data + (size_t)(index * CHUNK) * dtype_size(t.dtype), t.dtype, 1, *count);
}

static void fill_task(void *context, int64_t index) {
    const struct pointwise *p = context;
    int64_t count;
    struct tensor out = chunk_of(p->out, index, &count);
    float value = (float)p->value;
    if (out.dtype == DTYPE_F32) {
        for (int64_t i = 0; i < count; i++)
            ((float *)out.data)[i] = value;
    } else {
        for (int64_t i = 0; i < count; i++)
            ((uint16_t *)out.data)[i] = round_bf16(value);
    }
}

static void fill(struct tensor t, double value) {
    if (!is_fast(t)) {
        kernels_ref()->fill(t, value);
        return;
    }
    struct pointwise p = {.out = t, .value = value};
    run_chunks(&p, tensor_elements(t), fill_task);
}

static void cast_task(void *context, int64_t index) {
    const struct pointwise *p = context;
    int64_t count;
    struct tensor a = chunk_of(p->a, index, &count), out = chunk_of(p->out, index, &count);
    if (a.dtype == out.dtype) {
        memcpy(out.data, a.data, (size_t)count * dtype_size(a.dtype));
        return;
    }
    float *buffer = slot_take(SLOT_A, CHUNK * sizeof *buffer);
    store_row(out, 0, count, row_as_float(a, 0, count, buffer));
}

static void cast(struct tensor from, struct tensor to) {
    if (!is_fast(from) || !is_fast(to)) {
        kernels_ref()->cast(from, to);
        return;
    }
    CHECK_OP(tensor_elements(from), ==, tensor_elements(to));
    struct pointwise p = {.a = from, .out = to};
    run_chunks(&p, tensor_elements(to), cast_task);
}

static void add_task(void *context, int64_t index) {
    const struct pointwise *p = context;
    int64_t count;
    struct tensor a = chunk_of(p->a, index, &count), out = chunk_of(p->out, index, &count);
    float *x_buffer = slot_take(SLOT_A, CHUNK * sizeof(float)), *y_buffer = slot_take(SLOT_B, CHUNK * sizeof(float));
    float *sum = slot_take(SLOT_C, CHUNK * sizeof(float));
    const float *x = row_as_float(a, 0, count, x_buffer), *y = row_as_float(out, 0, count, y_buffer);
    for (int64_t i = 0; i < count; i++)
        sum[i] = x[i] + y[i];
    store_row(out, 0, count, sum);
}

static void add(struct tensor x, struct tensor y) {
    if (!is_fast(x) || !is_fast(y)) {
        kernels_ref()->add(x, y);
        return;
    }
    CHECK_OP(tensor_elements(x), ==, tensor_elements(y));
    struct pointwise p = {.a = x, .out = y};
    run_chunks(&p, tensor_elements(x), add_task);
}

static void sum_squares_task(void *context, int64_t index) {
    const struct pointwise *p = context;
    int64_t count;
    struct tensor a = chunk_of(p->a, index, &count);
    float *buffer = slot_take(SLOT_A, CHUNK * sizeof *buffer);
    const float *x = row_as_float(a, 0, count, buffer);
    double lanes[8] = {0}; /* in double: no overflow, and a gradient norm that is exact enough to compare */
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (int j = 0; j < 8; j++)
            lanes[j] += (double)x[i + j] * (double)x[i + j];
    double sum = ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
    for (; i < count; i++)
        sum += (double)x[i] * (double)x[i];
    p->sums[index] = sum;
}

static void sum_squares(struct tensor x, struct tensor sum) {
    int64_t chunks = (tensor_elements(x) + CHUNK - 1) / CHUNK;
    if (!is_fast(x)) {
        kernels_ref()->sum_squares(x, sum);
        return;
    }
    struct pointwise p = {.a = x, .sums = slot_take(SLOT_G, (size_t)(chunks + 1) * sizeof(double))};
    run_chunks(&p, tensor_elements(x), sum_squares_task);
    double total = 0;
    for (int64_t i = 0; i < chunks; i++)
        total += p.sums[i];
    *(double *)sum.data += total;
}

/* ---- rows of tokens --------------------------------------------------------------------------------------------------- */

static void combine_task(void *context, int64_t token) {
    const struct pointwise *p = context;
    const int32_t *slot_row = (const int32_t *)p->extra.data + token * p->choices;
    float *buffer = slot_take(SLOT_A, (size_t)p->columns * sizeof *buffer);
    float *sum = slot_take(SLOT_B, (size_t)p->columns * sizeof *sum);
    float *before = slot_take(SLOT_C, (size_t)p->columns * sizeof *before);
    memset(sum, 0, (size_t)p->columns * sizeof *sum);
    for (int64_t k = 0; k < p->choices; k++) {
        const float *row = row_as_float(p->a, slot_row[k], p->columns, buffer);
        for (int64_t i = 0; i < p->columns; i++)
            sum[i] += row[i];
    }
    if (p->accumulate) {
        const float *y = row_as_float(p->out, token, p->columns, before);
        for (int64_t i = 0; i < p->columns; i++)
            sum[i] += y[i];
    }
    store_row(p->out, token, p->columns, sum);
}

static void combine_rows(struct tensor rows, struct tensor slot_row, struct tensor y, bool accumulate) {
    if (!is_fast(rows) || !is_fast(y)) {
        kernels_ref()->combine_rows(rows, slot_row, y, accumulate);
        return;
    }
    CHECK_OP(rows.shape[1], ==, y.shape[1]);
    CHECK_OP(slot_row.shape[0], ==, y.shape[0]);
    struct pointwise p = {.a = rows, .extra = slot_row, .out = y, .columns = y.shape[1],
                          .choices = slot_row.shape[1], .accumulate = accumulate};
    parallel_for(y.shape[0], combine_task, &p);
}

static void swiglu_forward_task(void *context, int64_t row) {
    const struct pointwise *p = context;
    size_t bytes = (size_t)p->columns * sizeof(float);
    float *gate_buffer = slot_take(SLOT_A, bytes), *up_buffer = slot_take(SLOT_B, bytes);
    float *act = slot_take(SLOT_C, bytes);
    const float *gate = row_as_float(p->a, row, p->columns, gate_buffer);
    const float *up = row_as_float(p->b, row, p->columns, up_buffer);
    float weight = tensor_exists(p->extra) ? ((const float *)p->extra.data)[row] : 1;
    for (int64_t i = 0; i < p->columns; i++)
        act[i] = gate[i] / (1 + fast_exp(-gate[i])) * up[i] * weight;
    store_row(p->out, row, p->columns, act);
}

static void swiglu_forward(struct tensor gate, struct tensor up, struct tensor row_weight, struct tensor act) {
    if (!is_fast(gate) || !is_fast(up) || !is_fast(act)) {
        kernels_ref()->swiglu_forward(gate, up, row_weight, act);
        return;
    }
    CHECK(tensor_same_shape(gate, up) && tensor_same_shape(gate, act));
    struct pointwise p = {.a = gate, .b = up, .extra = row_weight, .out = act, .columns = gate.shape[1]};
    parallel_for(gate.shape[0], swiglu_forward_task, &p);
}

static void swiglu_backward_task(void *context, int64_t row) {
    const struct pointwise *p = context;
    size_t bytes = (size_t)p->columns * sizeof(float);
    float *gate_buffer = slot_take(SLOT_A, bytes), *up_buffer = slot_take(SLOT_B, bytes);
    float *dact_buffer = slot_take(SLOT_C, bytes), *dgate = slot_take(SLOT_D, bytes);
    float *dup = slot_take(SLOT_E, bytes), *product = slot_take(SLOT_F, bytes);
    const float *gate = row_as_float(p->a, row, p->columns, gate_buffer);
    const float *up = row_as_float(p->b, row, p->columns, up_buffer);
    const float *dact = row_as_float(p->c, row, p->columns, dact_buffer);
    float weight = tensor_exists(p->extra) ? ((const float *)p->extra.data)[row] : 1;
    for (int64_t i = 0; i < p->columns; i++) {
        float sigmoid = 1 / (1 + fast_exp(-gate[i])), silu = gate[i] * sigmoid, scaled = dact[i] * weight;
        product[i] = dact[i] * silu * up[i];
        dgate[i] = scaled * up[i] * sigmoid * (1 + gate[i] * (1 - sigmoid));
        dup[i] = scaled * silu;
    }
    if (tensor_exists(p->extra)) {
        double sum = 0;
        for (int64_t i = 0; i < p->columns; i++)
            sum += (double)product[i];
        ((float *)p->sums)[row] = (float)sum;
    }
    store_row(p->out, row, p->columns, dgate);
    store_row(p->out2, row, p->columns, dup);
}

static void swiglu_backward(struct tensor dact, struct tensor gate, struct tensor up, struct tensor row_weight,
                            struct tensor dgate, struct tensor dup, struct tensor drow_weight) {
    if (!is_fast(gate) || !is_fast(up) || !is_fast(dact)) {
        kernels_ref()->swiglu_backward(dact, gate, up, row_weight, dgate, dup, drow_weight);
        return;
    }
    CHECK(tensor_same_shape(gate, up) && tensor_same_shape(gate, dact) && tensor_same_shape(gate, dgate));
    struct pointwise p = {.a = gate, .b = up, .c = dact, .extra = row_weight, .out = dgate, .out2 = dup,
                          .columns = gate.shape[1], .sums = drow_weight.data};
    parallel_for(gate.shape[0], swiglu_backward_task, &p);
}

void ISA_NAME(pointwise_fill)(struct kernel_ops *ops) {
    ops->fill = fill;
    ops->cast = cast;
    ops->add = add;
    ops->sum_squares = sum_squares;
    ops->combine_rows = combine_rows;
    ops->swiglu_forward = swiglu_forward;
    ops->swiglu_backward = swiglu_backward;
}
