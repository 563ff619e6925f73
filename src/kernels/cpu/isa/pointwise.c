/* Operations that read and write each element once. */
#include "kernels/cpu/isa/activation.h"
#include "kernels/cpu/isa/numbers.h"

#include "base/threads.h"
#include "kernels/cpu/fillers.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/scratch.h"

/* ---- flat ------------------------------------------------------------------------------------------------------ */

struct flat {
    struct tensor from, to, index;
    int64_t elements;
    double value;
    double *sums; /* one a task */
};

static void run_flat(const struct flat *f, void (*task)(void *context, int64_t index)) {
    parallel_for(divide_up(f->elements, TASK_ELEMENTS), task, (void *)f);
}

/* Elements of task `index`: from *first on, how many. */
static int64_t task_elements(const struct flat *f, int64_t index, int64_t *first) {
    *first = index * TASK_ELEMENTS;
    return at_most(f->elements - *first, TASK_ELEMENTS);
}

static void *element_at(struct tensor t, int64_t at) {
    return (char *)t.data + (size_t)at * dtype_size(t.dtype);
}

ALWAYS_INLINE void fill_numbers(enum dtype dtype, void *to, int64_t count, vector_f32 value) {
    int64_t i = 0;
    for (; i + VECTOR_LANES <= count; i += VECTOR_LANES)
        numbers_store(dtype, to, i, VECTOR_LANES, value);
    if (i < count)
        numbers_store(dtype, to, i, count - i, value);
}

static void fill_task(void *context, int64_t index) {
    const struct flat *f = context;
    int64_t first, count = task_elements(f, index, &first);
    vector_f32 value = vector_splat((float)f->value);
    if (f->to.dtype == DTYPE_BF16)
        fill_numbers(DTYPE_BF16, element_at(f->to, first), count, value);
    else
        fill_numbers(DTYPE_F32, element_at(f->to, first), count, value);
}

static void fill(struct tensor t, double value) {
    if (!is_fast(t)) {
        kernels_ref()->fill(t, value);
        return;
    }
    run_flat(&(struct flat){.to = t, .value = value, .elements = tensor_elements(t)}, fill_task);
}

ALWAYS_INLINE void cast_body(enum dtype from_dtype, enum dtype to_dtype, const void *context, int64_t index) {
    const struct flat *f = context;
    int64_t first, count = task_elements(f, index, &first), i = 0;
    const void *from = element_at(f->from, first);
    void *to = element_at(f->to, first);
    if (from_dtype == to_dtype) {
        memcpy(to, from, (size_t)count * dtype_size(to_dtype));
        return;
    }
    for (; i + VECTOR_LANES <= count; i += VECTOR_LANES)
        numbers_store(to_dtype, to, i, VECTOR_LANES, numbers_load(from_dtype, from, i, VECTOR_LANES));
    if (i < count)
        numbers_store(to_dtype, to, i, count - i, numbers_load(from_dtype, from, i, count - i));
}

static void cast_task(void *context, int64_t index) {
    const struct flat *f = context;
    with_dtypes(f->from.dtype, f->to.dtype, cast_body, f, index);
}

static void cast(struct tensor from, struct tensor to) {
    if (!is_fast(from) || !is_fast(to)) {
        kernels_ref()->cast(from, to);
        return;
    }
    CHECK_OP(tensor_elements(from), ==, tensor_elements(to));
    run_flat(&(struct flat){.from = from, .to = to, .elements = tensor_elements(to)}, cast_task);
}

ALWAYS_INLINE void add_numbers(enum dtype x_dtype, enum dtype y_dtype, const void *x, void *y, int64_t at,
                               int64_t count) {
    vector_f32 sum = numbers_load(x_dtype, x, at, count) + numbers_load(y_dtype, y, at, count);
    numbers_store(y_dtype, y, at, count, sum);
}

ALWAYS_INLINE void add_body(enum dtype x_dtype, enum dtype y_dtype, const void *context, int64_t index) {
    const struct flat *f = context;
    int64_t first, count = task_elements(f, index, &first), i = 0;
    const void *x = element_at(f->from, first);
    void *y = element_at(f->to, first);
    for (; i + VECTOR_LANES <= count; i += VECTOR_LANES)
        add_numbers(x_dtype, y_dtype, x, y, i, VECTOR_LANES);
    if (i < count)
        add_numbers(x_dtype, y_dtype, x, y, i, count - i);
}

static void add_task(void *context, int64_t index) {
    const struct flat *f = context;
    with_dtypes(f->from.dtype, f->to.dtype, add_body, f, index);
}

static void add(struct tensor x, struct tensor y) {
    if (!is_fast(x) || !is_fast(y)) {
        kernels_ref()->add(x, y);
        return;
    }
    CHECK_OP(tensor_elements(x), ==, tensor_elements(y));
    run_flat(&(struct flat){.from = x, .to = y, .elements = tensor_elements(x)}, add_task);
}

/* Squares are summed in double: no overflow, and a gradient norm that is exact enough to compare. */
struct squares {
    vector_f64 low, high; /* of either half of the lanes */
};

ALWAYS_INLINE void add_squares(vector_f32 x, struct squares *sum) {
    vector_f64 halves[2];
    vector_to_f64(x, halves);
    sum->low = vector_multiply_add_f64(halves[0], halves[0], sum->low);
    sum->high = vector_multiply_add_f64(halves[1], halves[1], sum->high);
}

/* Several sums, so that an addition need not wait for the one before. */
enum { WAYS = 4 };

ALWAYS_INLINE double square_sum(enum dtype dtype, const void *x, int64_t count) {
    struct squares sums[WAYS] = {{{0}, {0}}};
    int64_t i = 0;
    for (; i + WAYS * VECTOR_LANES <= count; i += WAYS * VECTOR_LANES) {
#pragma GCC unroll 4
        for (int way = 0; way < WAYS; way++)
            add_squares(numbers_load(dtype, x, i + way * VECTOR_LANES, VECTOR_LANES), &sums[way]);
    }
    for (; i < count; i += VECTOR_LANES)
        add_squares(numbers_load(dtype, x, i, at_most(count - i, VECTOR_LANES)), &sums[0]);
    vector_f64 all = {0};
    for (int way = 0; way < WAYS; way++)
        all += sums[way].low + sums[way].high;
    double sum = 0;
    for (int lane = 0; lane < VECTOR_LANES / 2; lane++)
        sum += all[lane];
    return sum;
}

static void sum_squares_task(void *context, int64_t index) {
    const struct flat *f = context;
    int64_t first, count = task_elements(f, index, &first);
    const void *x = element_at(f->from, first);
    bool half = f->from.dtype == DTYPE_BF16;
    f->sums[index] = half ? square_sum(DTYPE_BF16, x, count) : square_sum(DTYPE_F32, x, count);
}

static void sum_squares(struct tensor x, struct tensor sum) {
    if (!is_fast(x)) {
        kernels_ref()->sum_squares(x, sum);
        return;
    }
    CHECK(sum.dtype == DTYPE_F64 && tensor_elements(sum) == 1);
    int64_t elements = tensor_elements(x), tasks = divide_up(elements, TASK_ELEMENTS);
    double *sums = scratch_call((size_t)tasks * sizeof *sums), total = 0;
    run_flat(&(struct flat){.from = x, .elements = elements, .sums = sums}, sum_squares_task);
    for (int64_t i = 0; i < tasks; i++)
        total += sums[i];
    *(double *)sum.data += total;
}

static void gather_task(void *context, int64_t task) {
    const struct flat *f = context;
    int64_t first, count = task_elements(f, task, &first), limit = tensor_elements(f->from);
    const float *from = f->from.data;
    const int32_t *index = (const int32_t *)f->index.data + first;
    float *to = (float *)f->to.data + first;
    for (int64_t i = 0; i < count; i++) {
        CHECK(index[i] >= 0 && index[i] < limit);
        to[i] = from[index[i]];
    }
}

static void gather_scalars(struct tensor from, struct tensor index, struct tensor to) {
    if (from.dtype != DTYPE_F32) {
        kernels_ref()->gather_scalars(from, index, to);
        return;
    }
    CHECK(to.dtype == DTYPE_F32 && index.dtype == DTYPE_I32);
    CHECK_OP(tensor_elements(index), ==, tensor_elements(to));
    run_flat(&(struct flat){.from = from, .index = index, .to = to, .elements = tensor_elements(to)}, gather_task);
}

/* ---- rows of tokens -------------------------------------------------------------------------------------------- */

struct row_gather {
    struct tensor from, index, to;
    int64_t rows_per_task;
    size_t row_bytes;
};

static void gather_rows_task(void *context, int64_t task) {
    const struct row_gather *g = context;
    const int32_t *index = g->index.data;
    const char *from = g->from.data;
    char *to = g->to.data;
    int64_t end = at_most((task + 1) * g->rows_per_task, g->to.shape[0]);
    for (int64_t row = task * g->rows_per_task; row < end; row++) {
        CHECK(index[row] >= 0 && index[row] < g->from.shape[0]);
        memcpy(to + (size_t)row * g->row_bytes, from + (size_t)index[row] * g->row_bytes, g->row_bytes);
    }
}

static void gather_rows(struct tensor from, struct tensor index, struct tensor to) {
    CHECK(to.dtype == from.dtype && from.dtype != DTYPE_I32 && index.dtype == DTYPE_I32);
    CHECK_OP(from.shape[1], ==, to.shape[1]);
    CHECK_OP(tensor_elements(index), ==, to.shape[0]);
    struct row_gather g = {from, index, to, rows_per_task(to.shape[1]), (size_t)to.shape[1] * dtype_size(to.dtype)};
    parallel_for(divide_up(to.shape[0], g.rows_per_task), gather_rows_task, &g);
}

struct combine {
    struct tensor rows, slot_row, y;
    int64_t width, choices, tokens_per_task;
    bool accumulate;
};

/* One token's elements from `at` on: `vectors` vectors of `count` numbers each. */
ALWAYS_INLINE void combine_numbers(enum dtype dtype, enum dtype y_dtype, const struct combine *c, int64_t token,
                                   int64_t at, int vectors, int64_t count) {
    const int32_t *row = (const int32_t *)c->slot_row.data + token * c->choices;
    vector_f32 sum[WAYS] = {{0}};
    for (int64_t k = 0; k < c->choices; k++) {
        int64_t from = row[k] * c->width + at;
        if (row[k] < 0)
            continue;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sum[v] += numbers_load(dtype, c->rows.data, from + v * VECTOR_LANES, count);
    }
    int64_t to = token * c->width + at;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++, to += VECTOR_LANES) {
        if (c->accumulate)
            sum[v] += numbers_load(y_dtype, c->y.data, to, count);
        numbers_store(y_dtype, c->y.data, to, count, sum[v]);
    }
}

ALWAYS_INLINE void combine_body(enum dtype dtype, enum dtype y_dtype, const void *context, int64_t index) {
    const struct combine *c = context;
    int64_t end = at_most((index + 1) * c->tokens_per_task, c->y.shape[0]);
    for (int64_t token = index * c->tokens_per_task; token < end; token++) {
        const int32_t *row = (const int32_t *)c->slot_row.data + token * c->choices;
        for (int64_t k = 0; k < c->choices; k++)
            CHECK(row[k] < c->rows.shape[0]);
        int64_t i = 0;
        for (; i + WAYS * VECTOR_LANES <= c->width; i += WAYS * VECTOR_LANES)
            combine_numbers(dtype, y_dtype, c, token, i, WAYS, VECTOR_LANES);
        for (; i + VECTOR_LANES <= c->width; i += VECTOR_LANES)
            combine_numbers(dtype, y_dtype, c, token, i, 1, VECTOR_LANES);
        if (i < c->width)
            combine_numbers(dtype, y_dtype, c, token, i, 1, c->width - i);
    }
}

static void combine_task(void *context, int64_t index) {
    const struct combine *c = context;
    with_dtypes(c->rows.dtype, c->y.dtype, combine_body, c, index);
}

static void combine_rows(struct tensor rows, struct tensor slot_row, struct tensor y, bool accumulate) {
    if (!is_fast(rows) || !is_fast(y)) {
        kernels_ref()->combine_rows(rows, slot_row, y, accumulate);
        return;
    }
    CHECK_OP(rows.shape[1], ==, y.shape[1]);
    CHECK_OP(slot_row.shape[0], ==, y.shape[0]);
    struct combine c = {rows, slot_row, y, y.shape[1], slot_row.shape[1],
                        rows_per_task(y.shape[1] * slot_row.shape[1]), accumulate};
    parallel_for(divide_up(y.shape[0], c.tokens_per_task), combine_task, &c);
}

/* ---- gated activation ------------------------------------------------------------------------------------------ */

struct swiglu {
    struct tensor dact, gate, up, row_weight, act, dgate, dup, drow_weight;
    int64_t rows, width, rows_per_task;
    enum dtype dtype; /* that all of dact, gate, up and the results have; DTYPE_COUNT where they differ */
};

static enum dtype common_dtype(struct tensor a, struct tensor b, struct tensor c) {
    return a.dtype == b.dtype && b.dtype == c.dtype ? a.dtype : DTYPE_COUNT;
}

/* The same, in a form that lets the compiler know the dtypes of all operands. */
ALWAYS_INLINE struct swiglu swiglu_of(enum dtype dtype, const struct swiglu *s) {
    struct swiglu known = *s;
    known.gate.dtype = known.up.dtype = known.act.dtype = dtype;
    known.dact.dtype = known.dgate.dtype = known.dup.dtype = dtype;
    return known;
}

static float weight_of(const struct swiglu *s, int64_t row) {
    return tensor_exists(s->row_weight) ? ((const float *)s->row_weight.data)[row] : 1;
}

ALWAYS_INLINE void forward_numbers(const struct swiglu *s, float weight, int64_t at, int64_t count) {
    vector_f32 gate = numbers_load(s->gate.dtype, s->gate.data, at, count);
    vector_f32 up = numbers_load(s->up.dtype, s->up.data, at, count);
    numbers_store(s->act.dtype, s->act.data, at, count, swiglu_value(gate, up) * weight);
}

ALWAYS_INLINE void forward_rows(struct swiglu s, int64_t index) {
    int64_t end = at_most((index + 1) * s.rows_per_task, s.rows);
    for (int64_t row = index * s.rows_per_task; row < end; row++) {
        float weight = weight_of(&s, row);
        int64_t i = row * s.width, row_end = i + s.width;
        for (; i + VECTOR_LANES <= row_end; i += VECTOR_LANES)
            forward_numbers(&s, weight, i, VECTOR_LANES);
        if (i < row_end)
            forward_numbers(&s, weight, i, row_end - i);
    }
}

static void forward_task(void *context, int64_t index) {
    const struct swiglu *s = context;
    if (s->dtype == DTYPE_BF16)
        forward_rows(swiglu_of(DTYPE_BF16, s), index);
    else if (s->dtype == DTYPE_F32)
        forward_rows(swiglu_of(DTYPE_F32, s), index);
    else
        forward_rows(*s, index);
}

static void swiglu_forward(struct tensor gate, struct tensor up, struct tensor row_weight, struct tensor act) {
    if (!is_fast(gate) || !is_fast(up) || !is_fast(act)) {
        kernels_ref()->swiglu_forward(gate, up, row_weight, act);
        return;
    }
    CHECK(tensor_same_shape(gate, up) && tensor_same_shape(gate, act));
    struct swiglu s = {.gate = gate, .up = up, .row_weight = row_weight, .act = act, .rows = gate.shape[0],
                       .width = gate.shape[1], .rows_per_task = rows_per_task(gate.shape[1]),
                       .dtype = common_dtype(gate, up, act)};
    parallel_for(divide_up(s.rows, s.rows_per_task), forward_task, &s);
}

/* Returns dact * act: the terms of drow_weight. All is read before anything is stored, because dgate and dup may lie
 * over the inputs. */
ALWAYS_INLINE vector_f32 backward_numbers(const struct swiglu *s, float weight, int64_t at, int64_t count) {
    vector_f32 gate = numbers_load(s->gate.dtype, s->gate.data, at, count);
    vector_f32 up = numbers_load(s->up.dtype, s->up.data, at, count);
    vector_f32 dact = numbers_load(s->dact.dtype, s->dact.data, at, count);
    struct swiglu_factors factors = swiglu_factors(gate, up);
    numbers_store(s->dgate.dtype, s->dgate.data, at, count, dact * weight * factors.slope);
    numbers_store(s->dup.dtype, s->dup.data, at, count, dact * weight * factors.silu);
    return dact * factors.act;
}

ALWAYS_INLINE void backward_rows(struct swiglu s, int64_t index) {
    int64_t end = at_most((index + 1) * s.rows_per_task, s.rows);
    for (int64_t row = index * s.rows_per_task; row < end; row++) {
        float weight = weight_of(&s, row);
        vector_f32 sum = {0};
        int64_t i = row * s.width, row_end = i + s.width;
        for (; i + VECTOR_LANES <= row_end; i += VECTOR_LANES)
            sum += backward_numbers(&s, weight, i, VECTOR_LANES);
        if (i < row_end)
            sum += backward_numbers(&s, weight, i, row_end - i);
        if (tensor_exists(s.drow_weight))
            ((float *)s.drow_weight.data)[row] = vector_sum(sum);
    }
}

static void backward_task(void *context, int64_t index) {
    const struct swiglu *s = context;
    if (s->dtype == DTYPE_BF16)
        backward_rows(swiglu_of(DTYPE_BF16, s), index);
    else if (s->dtype == DTYPE_F32)
        backward_rows(swiglu_of(DTYPE_F32, s), index);
    else
        backward_rows(*s, index);
}

static void swiglu_backward(struct tensor dact, struct tensor gate, struct tensor up, struct tensor row_weight,
                            struct tensor dgate, struct tensor dup, struct tensor drow_weight) {
    if (!is_fast(gate) || !is_fast(up) || !is_fast(dact) || !is_fast(dgate) || !is_fast(dup)) {
        kernels_ref()->swiglu_backward(dact, gate, up, row_weight, dgate, dup, drow_weight);
        return;
    }
    CHECK(tensor_same_shape(gate, up) && tensor_same_shape(gate, dact));
    CHECK(tensor_same_shape(gate, dgate) && tensor_same_shape(gate, dup));
    struct swiglu s = {.dact = dact, .gate = gate, .up = up, .row_weight = row_weight, .dgate = dgate,
                       .dup = dup, .drow_weight = drow_weight, .rows = gate.shape[0], .width = gate.shape[1],
                       .rows_per_task = rows_per_task(gate.shape[1])};
    enum dtype inputs = common_dtype(dact, gate, up);
    s.dtype = inputs == common_dtype(gate, dgate, dup) ? inputs : DTYPE_COUNT;
    parallel_for(divide_up(s.rows, s.rows_per_task), backward_task, &s);
}

void ISA_NAME(pointwise_fill)(struct kernel_ops *ops) {
    ops->fill = fill;
    ops->cast = cast;
    ops->add = add;
    ops->sum_squares = sum_squares;
    ops->gather_scalars = gather_scalars;
    ops->gather_rows = gather_rows;
    ops->combine_rows = combine_rows;
    ops->swiglu_forward = swiglu_forward;
    ops->swiglu_backward = swiglu_backward;
}
