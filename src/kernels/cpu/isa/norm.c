/* RMS norms. A row is read twice, the second time from the nearest cache. The gradient of the weight is summed over the
 * rows of each task first, then over the tasks in order, so that it does not depend on the threads. */
#include "kernels/cpu/isa/numbers.h"

#include "base/threads.h"
#include "kernels/cpu/fillers.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/scratch.h"

#include <math.h>

enum { PARTS_MAX = 256, WAYS = 4 }; /* several sums, so that an addition need not wait for the one before */

struct norm {
    struct tensor dy, x, weight, table, y, rstd, dx; /* y or dx is the result */
    double epsilon;
    int64_t rows, width, heads, sequence_length, first_position, rows_per_task;
    bool accumulate;
    float *parts; /* [tasks, width] of dweight */
};

static void run_rows(struct norm *n, void (*task)(void *context, int64_t index)) {
    parallel_for(divide_up(n->rows, n->rows_per_task), task, n);
}

/* Squares beyond the range of floats, or so small that they lose digits: rows that hardly occur. */
static __attribute__((noinline)) double wide_square_sum(enum dtype dtype, const void *x, int64_t first, int64_t count) {
    double sum = 0;
    for (int64_t i = first; i < first + count; i++) {
        double value = (double)numbers_load(dtype, x, i, 1)[0];
        sum += value * value;
    }
    return sum;
}

/* 1/sqrt(mean(x^2) + epsilon) of elements first .. first+count-1. */
ALWAYS_INLINE float rstd_of(enum dtype dtype, const void *x, int64_t first, int64_t count, double epsilon) {
    vector_f32 sums[WAYS] = {{0}};
    int64_t i = first, end = first + count;
    for (; i + WAYS * VECTOR_LANES <= end; i += WAYS * VECTOR_LANES) {
#pragma GCC unroll 4
        for (int way = 0; way < WAYS; way++) {
            vector_f32 v = numbers_load(dtype, x, i + way * VECTOR_LANES, VECTOR_LANES);
            sums[way] += v * v;
        }
    }
    for (; i < end; i += VECTOR_LANES) {
        vector_f32 v = numbers_load(dtype, x, i, at_most(end - i, VECTOR_LANES));
        sums[0] += v * v;
    }
    float sum = vector_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (__builtin_expect(!(sum > 1e-20f && sum < 3e38f), 0))
        return (float)(1 / sqrt(wide_square_sum(dtype, x, first, count) / (double)count + epsilon));
    return 1 / sqrtf(sum / (float)count + (float)epsilon);
}

/* ---- rows ------------------------------------------------------------------------------------------------------- */

ALWAYS_INLINE void scale_numbers(enum dtype x_dtype, enum dtype y_dtype, const struct norm *n, int64_t row, float rstd,
                                 int64_t i, int64_t count) {
    vector_f32 x = numbers_load(x_dtype, n->x.data, row * n->width + i, count);
    vector_f32 weight = numbers_load(DTYPE_F32, n->weight.data, i, count);
    numbers_store(y_dtype, n->y.data, row * n->width + i, count, x * rstd * weight);
}

ALWAYS_INLINE void forward_body(enum dtype x_dtype, enum dtype y_dtype, const void *context, int64_t index) {
    const struct norm job = *(const struct norm *)context, *n = &job; /* which no stored result can change */
    int64_t end = at_most((index + 1) * n->rows_per_task, n->rows);
    for (int64_t row = index * n->rows_per_task; row < end; row++) {
        float rstd = rstd_of(x_dtype, n->x.data, row * n->width, n->width, n->epsilon);
        ((float *)n->rstd.data)[row] = rstd;
        int64_t i = 0;
        for (; i + VECTOR_LANES <= n->width; i += VECTOR_LANES)
            scale_numbers(x_dtype, y_dtype, n, row, rstd, i, VECTOR_LANES);
        if (i < n->width)
            scale_numbers(x_dtype, y_dtype, n, row, rstd, i, n->width - i);
    }
}

static void forward_task(void *context, int64_t index) {
    const struct norm *n = context;
    with_dtypes(n->x.dtype, n->y.dtype, forward_body, n, index);
}

static void rmsnorm_forward(struct tensor x, struct tensor weight, double epsilon, struct tensor y,
                            struct tensor rstd) {
    if (!is_fast(x) || !is_fast(y)) {
        kernels_ref()->rmsnorm_forward(x, weight, epsilon, y, rstd);
        return;
    }
    CHECK(weight.dtype == DTYPE_F32 && rstd.dtype == DTYPE_F32 && tensor_same_shape(x, y));
    CHECK_OP(tensor_elements(weight), ==, x.shape[1]);
    struct norm n = {.x = x, .weight = weight, .y = y, .rstd = rstd, .epsilon = epsilon, .rows = x.shape[0],
                     .width = x.shape[1], .rows_per_task = rows_per_task(x.shape[1])};
    run_rows(&n, forward_task);
}

/* What one vector of a normalised row needs on its way back. */
struct gradient {
    vector_f32 dnormed, xhat; /* dy * weight, x * rstd */
};

/* dx = rstd * (dnormed - xhat * mean), mean over the row of dnormed * xhat. */
ALWAYS_INLINE vector_f32 gradient_dx(struct gradient g, float rstd, float mean) {
    return rstd * (g.dnormed - g.xhat * mean);
}

/* Elements i .. i+count-1 of a row; *dy gets the gradient itself. */
ALWAYS_INLINE struct gradient row_gradient(enum dtype dy_dtype, enum dtype x_dtype, const struct norm *n, int64_t row,
                                           int64_t i, int64_t count, vector_f32 *dy) {
    *dy = numbers_load(dy_dtype, n->dy.data, row * n->width + i, count);
    vector_f32 x = numbers_load(x_dtype, n->x.data, row * n->width + i, count);
    float rstd = ((const float *)n->rstd.data)[row];
    return (struct gradient){*dy * numbers_load(DTYPE_F32, n->weight.data, i, count), x * rstd};
}

ALWAYS_INLINE float row_mean(enum dtype dy_dtype, enum dtype x_dtype, const struct norm *n, int64_t row) {
    vector_f32 sums[2] = {{0}}, dy;
    int64_t i = 0;
    for (; i + 2 * VECTOR_LANES <= n->width; i += 2 * VECTOR_LANES) {
#pragma GCC unroll 2
        for (int way = 0; way < 2; way++) {
            struct gradient g = row_gradient(dy_dtype, x_dtype, n, row, i + way * VECTOR_LANES, VECTOR_LANES, &dy);
            sums[way] += g.dnormed * g.xhat;
        }
    }
    for (; i < n->width; i += VECTOR_LANES) {
        struct gradient g = row_gradient(dy_dtype, x_dtype, n, row, i, at_most(n->width - i, VECTOR_LANES), &dy);
        sums[0] += g.dnormed * g.xhat;
    }
    return vector_sum(sums[0] + sums[1]) / (float)n->width;
}

ALWAYS_INLINE void backward_numbers(enum dtype dy_dtype, enum dtype x_dtype, enum dtype dx_dtype, const struct norm *n,
                                    int64_t row, float mean, float *part, int64_t i, int64_t count) {
    vector_f32 dy;
    struct gradient g = row_gradient(dy_dtype, x_dtype, n, row, i, count, &dy);
    vector_f32 dx = gradient_dx(g, ((const float *)n->rstd.data)[row], mean);
    numbers_store(DTYPE_F32, part, i, count, numbers_load(DTYPE_F32, part, i, count) + dy * g.xhat);
    if (n->accumulate)
        dx += numbers_load(dx_dtype, n->dx.data, row * n->width + i, count);
    numbers_store(dx_dtype, n->dx.data, row * n->width + i, count, dx);
}

ALWAYS_INLINE void backward_rows(enum dtype dy_dtype, enum dtype x_dtype, enum dtype dx_dtype, const struct norm *n,
                                 int64_t index) {
    float *part = n->parts + index * n->width;
    memset(part, 0, (size_t)n->width * sizeof *part);
    int64_t end = at_most((index + 1) * n->rows_per_task, n->rows);
    for (int64_t row = index * n->rows_per_task; row < end; row++) {
        float mean = row_mean(dy_dtype, x_dtype, n, row);
        int64_t i = 0;
        for (; i + VECTOR_LANES <= n->width; i += VECTOR_LANES)
            backward_numbers(dy_dtype, x_dtype, dx_dtype, n, row, mean, part, i, VECTOR_LANES);
        if (i < n->width)
            backward_numbers(dy_dtype, x_dtype, dx_dtype, n, row, mean, part, i, n->width - i);
    }
}

ALWAYS_INLINE void backward_body(enum dtype dy_dtype, enum dtype x_dtype, const void *context, int64_t index) {
    const struct norm job = *(const struct norm *)context, *n = &job; /* which no stored result can change */
    if (n->dx.dtype == DTYPE_BF16)
        backward_rows(dy_dtype, x_dtype, DTYPE_BF16, n, index);
    else
        backward_rows(dy_dtype, x_dtype, DTYPE_F32, n, index);
}

static void backward_task(void *context, int64_t index) {
    const struct norm *n = context;
    with_dtypes(n->dy.dtype, n->x.dtype, backward_body, n, index);
}

/* dweight += the parts in order, summed in double. A block of columns at a time, so that rows are read along. */
static void add_parts(const struct norm *n, float *dweight) {
    enum { BLOCK = 64 };
    int64_t part_count = divide_up(n->rows, n->rows_per_task);
    for (int64_t first = 0; first < n->width; first += BLOCK) {
        int64_t count = at_most(n->width - first, BLOCK);
        double sum[BLOCK] = {0};
        for (int64_t p = 0; p < part_count; p++)
            for (int64_t i = 0; i < count; i++)
                sum[i] += (double)n->parts[p * n->width + first + i];
        for (int64_t i = 0; i < count; i++)
            dweight[first + i] += (float)sum[i];
    }
}

/* Tasks for a backward pass and memory for their parts, whose number is bounded. */
static void plan_parts(struct norm *n, int64_t row_elements) {
    int64_t rows = rows_per_task(row_elements), fewest = divide_up(n->rows, PARTS_MAX);
    n->rows_per_task = rows > fewest ? rows : fewest;
    n->parts = scratch_call((size_t)(divide_up(n->rows, n->rows_per_task) * n->width) * sizeof *n->parts);
}

static void rmsnorm_backward(struct tensor dy, struct tensor x, struct tensor weight, struct tensor rstd,
                             struct tensor dx, bool accumulate, struct tensor dweight) {
    if (!is_fast(x) || !is_fast(dy) || !is_fast(dx)) {
        kernels_ref()->rmsnorm_backward(dy, x, weight, rstd, dx, accumulate, dweight);
        return;
    }
    CHECK(tensor_same_shape(dy, x) && tensor_same_shape(dx, x));
    CHECK(weight.dtype == DTYPE_F32 && rstd.dtype == DTYPE_F32 && dweight.dtype == DTYPE_F32);
    CHECK_OP(tensor_elements(weight), ==, x.shape[1]);
    struct norm n = {.dy = dy, .x = x, .weight = weight, .rstd = rstd, .dx = dx, .rows = x.shape[0],
                     .width = x.shape[1], .accumulate = accumulate};
    plan_parts(&n, n.width);
    run_rows(&n, backward_task);
    add_parts(&n, dweight.data);
}

/* ---- per-head norm and rotation --------------------------------------------------------------------------------- */

/* The same, for the widths that most heads have: as constants they let the short loops over a head unroll. */
ALWAYS_INLINE struct norm with_width(int64_t width, struct norm n) {
    n.width = width;
    return n;
}

static const float *position_row(const struct norm *n, int64_t row) {
    return (const float *)n->table.data + (n->first_position + row % n->sequence_length) * n->width;
}

/* Numbers of a pair of halves. */
struct pair {
    vector_f32 low, high;
};

/* Elements j .. and j + half .. of an array from `first` on. */
ALWAYS_INLINE struct pair pair_load(enum dtype dtype, const void *array, int64_t first, int64_t half, int64_t j,
                                    int64_t count) {
    return (struct pair){numbers_load(dtype, array, first + j, count),
                         numbers_load(dtype, array, first + half + j, count)};
}

ALWAYS_INLINE void pair_store(enum dtype dtype, void *array, int64_t first, int64_t half, int64_t j, int64_t count,
                              struct pair p) {
    numbers_store(dtype, array, first + j, count, p.low);
    numbers_store(dtype, array, first + half + j, count, p.high);
}

ALWAYS_INLINE void turn_numbers(enum dtype x_dtype, enum dtype y_dtype, const struct norm *n, const float *angles,
                                int64_t first, float rstd, int64_t j, int64_t count) {
    int64_t half = n->width / 2;
    struct pair x = pair_load(x_dtype, n->x.data, first, half, j, count);
    struct pair weight = pair_load(DTYPE_F32, n->weight.data, 0, half, j, count);
    struct pair turn = pair_load(DTYPE_F32, angles, 0, half, j, count); /* cosines and sines */
    vector_f32 a = x.low * rstd * weight.low, b = x.high * rstd * weight.high;
    pair_store(y_dtype, n->y.data, first, half, j, count,
               (struct pair){a * turn.low - b * turn.high, b * turn.low + a * turn.high});
}

ALWAYS_INLINE void qknorm_forward_rows(enum dtype x_dtype, enum dtype y_dtype, struct norm job, int64_t index) {
    const struct norm *n = &job;
    int64_t half = n->width / 2, end = at_most((index + 1) * n->rows_per_task, n->rows);
    for (int64_t row = index * n->rows_per_task; row < end; row++) {
        const float *angles = position_row(n, row);
        for (int64_t head = row * n->heads; head < (row + 1) * n->heads; head++) {
            int64_t first = head * n->width, j = 0;
            float rstd = rstd_of(x_dtype, n->x.data, first, n->width, n->epsilon);
            ((float *)n->rstd.data)[head] = rstd;
            for (; j + VECTOR_LANES <= half; j += VECTOR_LANES)
                turn_numbers(x_dtype, y_dtype, n, angles, first, rstd, j, VECTOR_LANES);
            if (j < half)
                turn_numbers(x_dtype, y_dtype, n, angles, first, rstd, j, half - j);
        }
    }
}

ALWAYS_INLINE void qknorm_forward_body(enum dtype x_dtype, enum dtype y_dtype, const void *context, int64_t index) {
    const struct norm *n = context;
    if (n->width == 64)
        qknorm_forward_rows(x_dtype, y_dtype, with_width(64, *n), index);
    else if (n->width == 128)
        qknorm_forward_rows(x_dtype, y_dtype, with_width(128, *n), index);
    else
        qknorm_forward_rows(x_dtype, y_dtype, *n, index);
}

static void qknorm_forward_task(void *context, int64_t index) {
    const struct norm *n = context;
    with_dtypes(n->x.dtype, n->y.dtype, qknorm_forward_body, n, index);
}

static void check_rope(const struct norm *n) {
    CHECK(n->width >= 2 && n->width % 2 == 0 && n->x.shape[1] % n->width == 0);
    CHECK(n->weight.dtype == DTYPE_F32 && n->rstd.dtype == DTYPE_F32 && n->table.dtype == DTYPE_F32);
    CHECK_OP(n->table.shape[1], ==, n->width);
    CHECK_OP(tensor_elements(n->rstd), ==, n->rows * n->heads);
    CHECK(n->sequence_length >= 1 && n->first_position >= 0);
    CHECK_OP(n->first_position + at_most(n->rows, n->sequence_length), <=, n->table.shape[0]);
}

static void qknorm_rope_forward(struct tensor x, struct tensor weight, double epsilon, struct tensor table,
                                int64_t sequence_length, int64_t first_position, struct tensor y, struct tensor rstd) {
    if (!is_fast(x) || !is_fast(y)) {
        kernels_ref()->qknorm_rope_forward(x, weight, epsilon, table, sequence_length, first_position, y, rstd);
        return;
    }
    int64_t p = tensor_elements(weight);
    struct norm n = {.x = x, .weight = weight, .table = table, .y = y, .rstd = rstd, .epsilon = epsilon,
                     .rows = x.shape[0], .width = p, .heads = x.shape[1] / p, .sequence_length = sequence_length,
                     .first_position = first_position, .rows_per_task = rows_per_task(x.shape[1])};
    check_rope(&n);
    CHECK(tensor_same_shape(x, y));
    run_rows(&n, qknorm_forward_task);
}

/* One vector of either half of a head on its way back, and what the gradient of the weight gets of it. */
struct head_gradient {
    struct gradient low, high;
    struct pair dweight;
};

/* The rotation back, then as row_gradient. */
ALWAYS_INLINE struct head_gradient head_gradient(enum dtype dy_dtype, enum dtype x_dtype, const struct norm *n,
                                                 const float *angles, int64_t head, int64_t j, int64_t count) {
    int64_t half = n->width / 2, first = head * n->width;
    struct pair dy = pair_load(dy_dtype, n->dy.data, first, half, j, count);
    struct pair x = pair_load(x_dtype, n->x.data, first, half, j, count);
    struct pair weight = pair_load(DTYPE_F32, n->weight.data, 0, half, j, count);
    struct pair turn = pair_load(DTYPE_F32, angles, 0, half, j, count);
    float rstd = ((const float *)n->rstd.data)[head];
    vector_f32 low = dy.low * turn.low + dy.high * turn.high, high = dy.high * turn.low - dy.low * turn.high;
    vector_f32 xhat_low = x.low * rstd, xhat_high = x.high * rstd;
    return (struct head_gradient){{low * weight.low, xhat_low},
                                  {high * weight.high, xhat_high},
                                  {low * xhat_low, high * xhat_high}};
}

ALWAYS_INLINE vector_f32 head_products(struct head_gradient g) {
    return g.low.dnormed * g.low.xhat + g.high.dnormed * g.high.xhat;
}

ALWAYS_INLINE void head_store(enum dtype dx_dtype, const struct norm *n, struct head_gradient g, int64_t head,
                              float mean, float *part, int64_t j, int64_t count) {
    int64_t half = n->width / 2;
    float rstd = ((const float *)n->rstd.data)[head];
    struct pair sum = pair_load(DTYPE_F32, part, 0, half, j, count);
    pair_store(DTYPE_F32, part, 0, half, j, count,
               (struct pair){sum.low + g.dweight.low, sum.high + g.dweight.high});
    pair_store(dx_dtype, n->dx.data, head * n->width, half, j, count,
               (struct pair){gradient_dx(g.low, rstd, mean), gradient_dx(g.high, rstd, mean)});
}

ALWAYS_INLINE void head_backward(enum dtype dy_dtype, enum dtype x_dtype, enum dtype dx_dtype, const struct norm *n,
                                 const float *angles, int64_t head, float *part) {
    int64_t half = n->width / 2, j = 0;
    vector_f32 products = {0};
    for (; j + VECTOR_LANES <= half; j += VECTOR_LANES)
        products += head_products(head_gradient(dy_dtype, x_dtype, n, angles, head, j, VECTOR_LANES));
    if (j < half)
        products += head_products(head_gradient(dy_dtype, x_dtype, n, angles, head, j, half - j));
    float mean = vector_sum(products) / (float)n->width;
    for (j = 0; j + VECTOR_LANES <= half; j += VECTOR_LANES) {
        struct head_gradient g = head_gradient(dy_dtype, x_dtype, n, angles, head, j, VECTOR_LANES);
        head_store(dx_dtype, n, g, head, mean, part, j, VECTOR_LANES);
    }
    if (j < half) {
        struct head_gradient g = head_gradient(dy_dtype, x_dtype, n, angles, head, j, half - j);
        head_store(dx_dtype, n, g, head, mean, part, j, half - j);
    }
}

ALWAYS_INLINE void qknorm_backward_rows(enum dtype dy_dtype, enum dtype x_dtype, enum dtype dx_dtype,
                                        struct norm job, int64_t index) {
    const struct norm *n = &job;
    float *part = n->parts + index * n->width;
    memset(part, 0, (size_t)n->width * sizeof *part);
    int64_t end = at_most((index + 1) * n->rows_per_task, n->rows);
    for (int64_t row = index * n->rows_per_task; row < end; row++) {
        const float *angles = position_row(n, row);
        for (int64_t head = row * n->heads; head < (row + 1) * n->heads; head++)
            head_backward(dy_dtype, x_dtype, dx_dtype, n, angles, head, part);
    }
}

ALWAYS_INLINE void qknorm_backward_widths(enum dtype dy_dtype, enum dtype x_dtype, enum dtype dx_dtype,
                                          const struct norm *n, int64_t index) {
    if (n->width == 64)
        qknorm_backward_rows(dy_dtype, x_dtype, dx_dtype, with_width(64, *n), index);
    else if (n->width == 128)
        qknorm_backward_rows(dy_dtype, x_dtype, dx_dtype, with_width(128, *n), index);
    else
        qknorm_backward_rows(dy_dtype, x_dtype, dx_dtype, *n, index);
}

ALWAYS_INLINE void qknorm_backward_body(enum dtype dy_dtype, enum dtype x_dtype, const void *context, int64_t index) {
    const struct norm *n = context;
    if (n->dx.dtype == DTYPE_BF16)
        qknorm_backward_widths(dy_dtype, x_dtype, DTYPE_BF16, n, index);
    else
        qknorm_backward_widths(dy_dtype, x_dtype, DTYPE_F32, n, index);
}

static void qknorm_backward_task(void *context, int64_t index) {
    const struct norm *n = context;
    with_dtypes(n->dy.dtype, n->x.dtype, qknorm_backward_body, n, index);
}

static void qknorm_rope_backward(struct tensor dy, struct tensor x, struct tensor weight, struct tensor rstd,
                                 struct tensor table, int64_t sequence_length, int64_t first_position,
                                 struct tensor dx, struct tensor dweight) {
    if (!is_fast(x) || !is_fast(dy) || !is_fast(dx)) {
        kernels_ref()->qknorm_rope_backward(dy, x, weight, rstd, table, sequence_length, first_position, dx, dweight);
        return;
    }
    int64_t p = tensor_elements(weight);
    struct norm n = {.dy = dy, .x = x, .weight = weight, .table = table, .rstd = rstd, .dx = dx, .rows = x.shape[0],
                     .width = p, .heads = x.shape[1] / p, .sequence_length = sequence_length,
                     .first_position = first_position};
    check_rope(&n);
    CHECK(tensor_same_shape(x, dy) && tensor_same_shape(x, dx) && dweight.dtype == DTYPE_F32);
    plan_parts(&n, x.shape[1]);
    run_rows(&n, qknorm_backward_task);
    add_parts(&n, dweight.data);
}

void ISA_NAME(norm_fill)(struct kernel_ops *ops) {
    ops->rmsnorm_forward = rmsnorm_forward;
    ops->rmsnorm_backward = rmsnorm_backward;
    ops->qknorm_rope_forward = qknorm_rope_forward;
    ops->qknorm_rope_backward = qknorm_rope_backward;
}
