/* Products. Operands are turned into double matrices once; each row of a result is then one task. */
#include "kernels/ref/ref.h"

/* t as doubles, [rows, columns] where t is [columns, rows]. */
static double *read_transposed(struct tensor t) {
    int64_t rows = t.shape[1], columns = t.shape[0];
    double *values = ref_zeros(rows * columns);
    for (int64_t j = 0; j < columns; j++)
        for (int64_t i = 0; i < rows; i++)
            values[i * columns + j] = ref_load(t, j * rows + i);
    return values;
}

struct gemm_job {
    const double *a, *b; /* [M,K], [K,N] */
    int64_t n, k;
    struct tensor c;
    bool accumulate;
};

static void gemm_row(void *context, int64_t m) {
    const struct gemm_job *job = context;
    double *acc = ref_zeros(job->n);
    for (int64_t k = 0; k < job->k; k++)
        ref_add_scaled(acc, job->a[m * job->k + k], job->b + k * job->n, job->n);
    ref_write(job->c, m * job->n, job->n, acc, job->accumulate);
    free(acc);
}

void ref_gemm(struct tensor a, bool transpose_a, struct tensor b, bool transpose_b, struct tensor c,
              bool accumulate) {
    int64_t m = a.shape[transpose_a], k = a.shape[!transpose_a], n = b.shape[!transpose_b];
    CHECK(ref_is_float(a) && b.dtype == a.dtype && ref_is_float_or_real(c, a.dtype));
    CHECK(ref_is_2d(a, a.shape[0], a.shape[1]) && ref_is_2d(b, b.shape[0], b.shape[1]));
    CHECK_OP(b.shape[transpose_b], ==, k);
    CHECK(ref_is_2d(c, m, n));
    double *left = transpose_a ? read_transposed(a) : ref_read(a);
    double *right = transpose_b ? read_transposed(b) : ref_read(b);
    struct gemm_job job = {left, right, n, k, c, accumulate};
    parallel_for(m, gemm_row, &job);
    free(left);
    free(right);
}

/* Requires ascending offsets from 0, and rows, where given, one for each routed row. Returns N. */
static int64_t check_groups(struct tensor offsets, int64_t expert_count, struct tensor rows) {
    CHECK(offsets.dtype == DTYPE_I32 && ref_is_1d(offsets, expert_count + 1));
    CHECK_OP(ref_index(offsets, 0), ==, 0);
    for (int64_t e = 0; e < expert_count; e++)
        CHECK_OP(ref_index(offsets, e), <=, ref_index(offsets, e + 1));
    int64_t row_count = ref_index(offsets, expert_count);
    if (tensor_exists(rows))
        CHECK(rows.dtype == DTYPE_I32 && ref_is_1d(rows, row_count));
    return row_count;
}

/* The row of `operand` that stands for routed row r. */
static int64_t operand_row(struct tensor rows, int64_t r, struct tensor operand) {
    int64_t row = tensor_exists(rows) ? ref_index(rows, r) : r;
    CHECK(row >= 0 && row < operand.shape[0]);
    return row;
}

struct grouped_job {
    struct tensor operand, rows, offsets, result;
    const double *x; /* operand, [any, in] */
    const double *w; /* [E, out, in] forward, [E, in, out] backward */
    int64_t in, out, expert_count;
    bool forward, accumulate;
};

static int64_t group_of_row(const struct grouped_job *job, int64_t r) {
    int64_t e = 0;
    while (ref_index(job->offsets, e + 1) <= r)
        e++;
    return e;
}

/* result[r] = x[rows[r]] times the weight of r's group. */
static void grouped_row(void *context, int64_t r) {
    const struct grouped_job *job = context;
    const double *x = job->x + operand_row(job->rows, r, job->operand) * job->in;
    const double *w = job->w + group_of_row(job, r) * job->in * job->out;
    double *acc = ref_zeros(job->out);
    if (job->forward) {
        for (int64_t o = 0; o < job->out; o++)
            for (int64_t i = 0; i < job->in; i++)
                acc[o] += x[i] * w[o * job->in + i];
    } else {
        for (int64_t i = 0; i < job->in; i++)
            ref_add_scaled(acc, x[i], w + i * job->out, job->out);
    }
    ref_write(job->result, r * job->out, job->out, acc, job->accumulate);
    free(acc);
}

static void grouped_rows(struct grouped_job job, struct tensor w) {
    CHECK(ref_is_float(job.operand) && w.dtype == job.operand.dtype);
    CHECK(ref_is_float_or_real(job.result, job.operand.dtype));
    CHECK(ref_is_2d(job.operand, job.operand.shape[0], job.in));
    int64_t row_count = check_groups(job.offsets, job.expert_count, job.rows);
    CHECK(ref_is_2d(job.result, row_count, job.out));
    double *x = ref_read(job.operand), *weight = ref_read(w);
    job.x = x;
    job.w = weight;
    parallel_for(row_count, grouped_row, &job);
    free(x);
    free(weight);
}

void ref_grouped_forward(struct tensor x, struct tensor rows, struct tensor offsets, struct tensor w,
                         struct tensor y) {
    CHECK(ref_is_3d(w, w.shape[0], w.shape[1], w.shape[2]));
    grouped_rows((struct grouped_job){.operand = x,
                                      .rows = rows,
                                      .offsets = offsets,
                                      .result = y,
                                      .in = w.shape[2],
                                      .out = w.shape[1],
                                      .expert_count = w.shape[0],
                                      .forward = true},
                 w);
}

void ref_grouped_backward_input(struct tensor dy, struct tensor rows, struct tensor offsets, struct tensor w,
                                struct tensor dx, bool accumulate) {
    CHECK(ref_is_3d(w, w.shape[0], w.shape[1], w.shape[2]));
    grouped_rows((struct grouped_job){.operand = dy,
                                      .rows = rows,
                                      .offsets = offsets,
                                      .result = dx,
                                      .in = w.shape[1],
                                      .out = w.shape[2],
                                      .expert_count = w.shape[0],
                                      .accumulate = accumulate},
                 w);
}

struct weight_job {
    struct tensor dy_tensor, dy_rows, x_tensor, x_rows, offsets, dw;
    const double *dy, *x; /* [any, O], [any, I] */
};

/* One row of dw: task = e*O + o. */
static void weight_row(void *context, int64_t task) {
    const struct weight_job *job = context;
    int64_t out = job->dw.shape[1], in = job->dw.shape[2], e = task / out, o = task % out;
    double *acc = ref_zeros(in);
    for (int64_t r = ref_index(job->offsets, e); r < ref_index(job->offsets, e + 1); r++) {
        int64_t dy_row = operand_row(job->dy_rows, r, job->dy_tensor);
        int64_t x_row = operand_row(job->x_rows, r, job->x_tensor);
        ref_add_scaled(acc, job->dy[dy_row * out + o], job->x + x_row * in, in);
    }
    ref_write(job->dw, task * in, in, acc, true);
    free(acc);
}

void ref_grouped_backward_weight(struct tensor dy, struct tensor dy_rows, struct tensor x,
                                 struct tensor x_rows, struct tensor offsets, struct tensor dw) {
    CHECK(ref_is_float(x) && dy.dtype == x.dtype && ref_is_real(dw, x.dtype));
    CHECK(ref_is_3d(dw, dw.shape[0], dw.shape[1], dw.shape[2]));
    CHECK(ref_is_2d(dy, dy.shape[0], dw.shape[1]) && ref_is_2d(x, x.shape[0], dw.shape[2]));
    check_groups(offsets, dw.shape[0], dy_rows);
    check_groups(offsets, dw.shape[0], x_rows);
    double *dy_values = ref_read(dy), *x_values = ref_read(x);
    struct weight_job job = {dy, dy_rows, x, x_rows, offsets, dw, dy_values, x_values};
    parallel_for(dw.shape[0] * dw.shape[1], weight_row, &job);
    free(dy_values);
    free(x_values);
}
