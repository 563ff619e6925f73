/* RMS norms. Forward is one pass a row; the gradient of the weight is summed over fixed chunks of rows first, then over
 * the chunks in order, so that it does not depend on the threads. */
#include "kernels/cpu/isa/lanes.h"

#include "base/threads.h"
#include "kernels/cpu/fillers.h"

enum { ROWS_PER_TASK = 64, PARTS_MAX = 64 };

struct norm {
    struct tensor dy, x, weight, table, y, rstd, dx; /* y or dx is the result */
    double epsilon;
    int64_t rows, width, heads, sequence_length, first_position, rows_per_task;
    bool accumulate;
    float *parts; /* [tasks, width] of dweight */
};

static float square_sum(const float *x, int64_t count) {
    vfloat sum0 = {0}, sum1 = {0};
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        vfloat a = vload(x + i), b = vload(x + i + LANES);
        sum0 += a * a;
        sum1 += b * b;
    }
    float sum = vsum(sum0 + sum1);
    for (; i < count; i++)
        sum += x[i] * x[i];
    return sum;
}

/* 1/sqrt(mean(x^2) + epsilon); in double where the squares leave the range of floats. */
static float row_rstd(const float *x, int64_t count, double epsilon) {
    float sum = square_sum(x, count);
    if (isfinite(sum) && sum > 1e-20f)
        return (float)(1 / sqrt((double)sum / (double)count + epsilon));
    double wide = 0;
    for (int64_t i = 0; i < count; i++)
        wide += (double)x[i] * (double)x[i];
    return (float)(1 / sqrt(wide / (double)count + epsilon));
}

static void forward_task(void *context, int64_t index) {
    const struct norm *n = context;
    const float *weight = n->weight.data;
    float *buffer = slot_take(SLOT_A, (size_t)n->width * sizeof *buffer);
    float *out = slot_take(SLOT_B, (size_t)n->width * sizeof *out);
    int64_t end = smaller((index + 1) * n->rows_per_task, n->rows);
    for (int64_t row = index * n->rows_per_task; row < end; row++) {
        const float *x = row_as_float(n->x, row, n->width, buffer);
        float rstd = row_rstd(x, n->width, n->epsilon);
        ((float *)n->rstd.data)[row] = rstd;
        for (int64_t i = 0; i < n->width; i++)
            out[i] = x[i] * rstd * weight[i];
        store_row(n->y, row, n->width, out);
    }
}

static void run_rows(struct norm *n, void (*task)(void *context, int64_t index), int64_t rows) {
    n->rows_per_task = ROWS_PER_TASK;
    if (rows > PARTS_MAX * ROWS_PER_TASK)
        n->rows_per_task = (rows + PARTS_MAX - 1) / PARTS_MAX;
    parallel_for((rows + n->rows_per_task - 1) / n->rows_per_task, task, n);
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
                     .width = x.shape[1]};
    run_rows(&n, forward_task, n.rows);
}

/* dx = rstd * (dy*w - xhat * mean(dy*w*xhat)), part += dy*xhat, with xhat = x*rstd. */
static void backward_row(const float *dy, const float *x, const float *weight, float rstd, int64_t width, float *dx,
                         float *part) {
    vfloat sum = {0};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES)
        sum += vload(dy + i) * vload(weight + i) * (vload(x + i) * rstd);
    float mean = vsum(sum);
    for (; i < width; i++)
        mean += dy[i] * weight[i] * (x[i] * rstd);
    mean /= (float)width;
    for (i = 0; i < width; i++) {
        float xhat = x[i] * rstd;
        part[i] += dy[i] * xhat;
        dx[i] = rstd * (dy[i] * weight[i] - xhat * mean);
    }
}

static void backward_task(void *context, int64_t index) {
    const struct norm *n = context;
    size_t bytes = (size_t)n->width * sizeof(float);
    float *x_buffer = slot_take(SLOT_A, bytes), *dy_buffer = slot_take(SLOT_B, bytes);
    float *out = slot_take(SLOT_C, bytes), *before = slot_take(SLOT_D, bytes);
    float *part = n->parts + index * n->width;
    memset(part, 0, bytes);
    int64_t end = smaller((index + 1) * n->rows_per_task, n->rows);
    for (int64_t row = index * n->rows_per_task; row < end; row++) {
        const float *x = row_as_float(n->x, row, n->width, x_buffer);
        const float *dy = row_as_float(n->dy, row, n->width, dy_buffer);
        backward_row(dy, x, n->weight.data, ((const float *)n->rstd.data)[row], n->width, out, part);
        if (n->accumulate) {
            const float *dx = row_as_float(n->dx, row, n->width, before);
            for (int64_t i = 0; i < n->width; i++)
                out[i] += dx[i];
        }
        store_row(n->dx, row, n->width, out);
    }
}

static void add_parts(const float *parts, int64_t part_count, int64_t width, float *dweight) {
    for (int64_t i = 0; i < width; i++) {
        double sum = 0;
        for (int64_t p = 0; p < part_count; p++)
            sum += (double)parts[p * width + i];
        dweight[i] += (float)sum;
    }
}

static float *take_parts(int64_t width) {
    return slot_take(SLOT_G, (size_t)(PARTS_MAX * width) * sizeof(float));
}

static void rmsnorm_backward(struct tensor dy, struct tensor x, struct tensor weight, struct tensor rstd,
                             struct tensor dx, bool accumulate, struct tensor dweight) {
    if (!is_fast(x) || !is_fast(dy) || !is_fast(dx)) {
        kernels_ref()->rmsnorm_backward(dy, x, weight, rstd, dx, accumulate, dweight);
        return;
    }
    CHECK(tensor_same_shape(dy, x) && tensor_same_shape(dx, x) && dweight.dtype == DTYPE_F32);
    struct norm n = {.dy = dy, .x = x, .weight = weight, .rstd = rstd, .dx = dx, .rows = x.shape[0],
                     .width = x.shape[1], .accumulate = accumulate, .parts = take_parts(x.shape[1])};
    run_rows(&n, backward_task, n.rows);
    add_parts(n.parts, (n.rows + n.rows_per_task - 1) / n.rows_per_task, n.width, dweight.data);
}

/* ---- per-head norm and rotation ----------------------------------------------------------------------------------------- */

static const float *position_row(const struct norm *n, int64_t row) {
    return (const float *)n->table.data + (n->first_position + row % n->sequence_length) * n->width;
}

static void qknorm_forward_task(void *context, int64_t index) {
    const struct norm *n = context;
    const float *weight = n->weight.data;
    int64_t p = n->width, half = p / 2, line = n->heads * p;
    float *buffer = slot_take(SLOT_A, (size_t)line * sizeof *buffer);
    float *out = slot_take(SLOT_B, (size_t)line * sizeof *out);
    int64_t end = smaller((index + 1) * n->rows_per_task, n->rows);
    for (int64_t row = index * n->rows_per_task; row < end; row++) {
        const float *x = row_as_float(n->x, row, line, buffer), *turn = position_row(n, row);
        for (int64_t h = 0; h < n->heads; h++, x += p) {
            float rstd = row_rstd(x, p, n->epsilon), *y = out + h * p;
            ((float *)n->rstd.data)[row * n->heads + h] = rstd;
            for (int64_t j = 0; j < half; j++) {
                float a = x[j] * rstd * weight[j], b = x[j + half] * rstd * weight[j + half];
                y[j] = a * turn[j] - b * turn[j + half];
                y[j + half] = b * turn[j] + a * turn[j + half];
            }
        }
        store_row(n->y, row, line, out);
    }
}

static void qknorm_rope_forward(struct tensor x, struct tensor weight, double epsilon, struct tensor table,
                                int64_t sequence_length, int64_t first_position, struct tensor y, struct tensor rstd) {
    if (!is_fast(x) || !is_fast(y)) {
        kernels_ref()->qknorm_rope_forward(x, weight, epsilon, table, sequence_length, first_position, y, rstd);
        return;
    }
    int64_t p = tensor_elements(weight);
    CHECK(tensor_same_shape(x, y) && x.shape[1] % p == 0 && table.shape[1] == p);
    CHECK_OP(first_position + sequence_length, <=, table.shape[0]);
    struct norm n = {.x = x, .weight = weight, .table = table, .y = y, .rstd = rstd, .epsilon = epsilon,
                     .rows = x.shape[0], .width = p, .heads = x.shape[1] / p, .sequence_length = sequence_length,
                     .first_position = first_position};
    run_rows(&n, qknorm_forward_task, n.rows);
}

static void qknorm_backward_task(void *context, int64_t index) {
    const struct norm *n = context;
    int64_t p = n->width, half = p / 2, line = n->heads * p;
    size_t bytes = (size_t)line * sizeof(float);
    float *x_buffer = slot_take(SLOT_A, bytes), *dy_buffer = slot_take(SLOT_B, bytes);
    float *out = slot_take(SLOT_C, bytes), *turned = slot_take(SLOT_D, (size_t)p * sizeof(float));
    float *part = n->parts + index * p;
    memset(part, 0, (size_t)p * sizeof *part);
    int64_t end = smaller((index + 1) * n->rows_per_task, n->rows);
    for (int64_t row = index * n->rows_per_task; row < end; row++) {
        const float *x = row_as_float(n->x, row, line, x_buffer), *dy = row_as_float(n->dy, row, line, dy_buffer);
        const float *turn = position_row(n, row);
        for (int64_t h = 0; h < n->heads; h++, x += p, dy += p) {
            for (int64_t j = 0; j < half; j++) { /* the rotation back */
                turned[j] = dy[j] * turn[j] + dy[j + half] * turn[j + half];
                turned[j + half] = dy[j + half] * turn[j] - dy[j] * turn[j + half];
            }
            backward_row(turned, x, n->weight.data, ((const float *)n->rstd.data)[row * n->heads + h], p, out + h * p,
                         part);
        }
        store_row(n->dx, row, line, out);
    }
}

static void qknorm_rope_backward(struct tensor dy, struct tensor x, struct tensor weight, struct tensor rstd,
                                 struct tensor table, int64_t sequence_length, int64_t first_position,
                                 struct tensor dx, struct tensor dweight) {
    if (!is_fast(x) || !is_fast(dy) || !is_fast(dx)) {
        kernels_ref()->qknorm_rope_backward(dy, x, weight, rstd, table, sequence_length, first_position, dx, dweight);
        return;
    }
    int64_t p = tensor_elements(weight);
    CHECK(tensor_same_shape(x, dy) && tensor_same_shape(x, dx) && x.shape[1] % p == 0);
    CHECK_OP(first_position + sequence_length, <=, table.shape[0]);
    struct norm n = {.dy = dy, .x = x, .weight = weight, .table = table, .rstd = rstd, .dx = dx, .rows = x.shape[0],
                     .width = p, .heads = x.shape[1] / p, .sequence_length = sequence_length,
                     .first_position = first_position, .parts = take_parts(p)};
    run_rows(&n, qknorm_backward_task, n.rows);
    add_parts(n.parts, (n.rows + n.rows_per_task - 1) / n.rows_per_task, p, dweight.data);
}

void ISA_NAME(norm_fill)(struct kernel_ops *ops) {
    ops->rmsnorm_forward = rmsnorm_forward;
    ops->rmsnorm_backward = rmsnorm_backward;
    ops->qknorm_rope_forward = qknorm_rope_forward;
    ops->qknorm_rope_backward = qknorm_rope_backward;
}
