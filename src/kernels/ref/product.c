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

/* ---- packed weights: here simply themselves ---- */

static struct tensor unpacked(struct packed w) {
    return tensor_3d(w.data, w.dtype, w.groups, w.out, w.in);
}

size_t ref_packed_bytes(struct packed shape) {
    return tensor_bytes(unpacked(shape));
}

void ref_pack(struct tensor w, struct packed to) {
    CHECK_OP(tensor_elements(w), ==, to.groups * to.out * to.in);
    struct tensor target = tensor_1d(to.data, to.dtype, tensor_elements(w));
    ref_cast(tensor_1d(w.data, w.dtype, tensor_elements(w)), target);
}

/* Requires ascending offsets from 0, or none for one group of row_count rows, and rows, where given, one for each
 * routed row. */
static void check_groups(struct tensor offsets, int64_t group_count, struct tensor rows, int64_t row_count) {
    if (tensor_exists(offsets)) {
        CHECK(offsets.dtype == DTYPE_I32 && ref_is_1d(offsets, group_count + 1));
        CHECK_OP(ref_index(offsets, 0), ==, 0);
        for (int64_t e = 0; e < group_count; e++)
            CHECK_OP(ref_index(offsets, e), <=, ref_index(offsets, e + 1));
        CHECK_OP(ref_index(offsets, group_count), ==, row_count);
    } else {
        CHECK_OP(group_count, ==, 1);
    }
    if (tensor_exists(rows))
        CHECK(rows.dtype == DTYPE_I32 && ref_is_1d(rows, row_count));
}

/* The row of `operand` that stands for routed row r. */
static int64_t operand_row(struct tensor rows, int64_t r, struct tensor operand) {
    int64_t row = tensor_exists(rows) ? ref_index(rows, r) : r;
    CHECK(row >= 0 && row < operand.shape[0]);
    return row;
}

static int64_t group_begin(struct tensor offsets, int64_t e, int64_t row_count) {
    return tensor_exists(offsets) ? ref_index(offsets, e) : e * row_count;
}

struct rows_job {
    struct tensor operand, rows, offsets, result;
    const double *x; /* operand, [any, in] */
    const double *w; /* [E, out, in] forward, [E, in, out] backward */
    int64_t in, out, row_count;
    bool forward, accumulate;
};

static int64_t group_of_row(const struct rows_job *job, int64_t r) {
    int64_t e = 0;
    while (group_begin(job->offsets, e + 1, job->row_count) <= r)
        e++;
    return e;
}

/* result[r] = x[rows[r]] times the weight of r's group. */
static void product_row(void *context, int64_t r) {
    const struct rows_job *job = context;
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

static void multiply_rows(struct rows_job job, struct packed w) {
    CHECK(ref_is_float(job.operand) && w.dtype == job.operand.dtype);
    CHECK(ref_is_float_or_real(job.result, job.operand.dtype));
    CHECK(ref_is_2d(job.operand, job.operand.shape[0], job.in));
    CHECK(ref_is_2d(job.result, job.row_count, job.out));
    check_groups(job.offsets, w.groups, job.rows, job.row_count);
    double *x = ref_read(job.operand), *weight = ref_read(unpacked(w));
    job.x = x;
    job.w = weight;
    parallel_for(job.row_count, product_row, &job);
    free(x);
    free(weight);
}

void ref_product_forward(struct tensor x, struct tensor rows, struct tensor offsets, struct packed w,
                         struct tensor y, bool accumulate) {
    struct rows_job job = {.operand = x, .rows = rows, .offsets = offsets, .result = y, .in = w.in, .out = w.out,
                           .row_count = y.shape[0], .forward = true, .accumulate = accumulate};
    multiply_rows(job, w);
}

void ref_product_backward_input(struct tensor dy, struct tensor rows, struct tensor offsets, struct packed w,
                                struct tensor dx, bool accumulate) {
    CHECK(w.backward);
    struct rows_job job = {.operand = dy, .rows = rows, .offsets = offsets, .result = dx, .in = w.out, .out = w.in,
                           .row_count = dx.shape[0], .accumulate = accumulate};
    multiply_rows(job, w);
}

struct weight_job {
    struct tensor dy_tensor, dy_rows, x_tensor, x_rows, offsets, dw;
    const double *dy, *x; /* [any, O], [any, I] */
    int64_t row_count;
    bool accumulate;
};

/* One row of dw: task = e*O + o. */
static void weight_row(void *context, int64_t task) {
    const struct weight_job *job = context;
    int64_t out = job->dw.shape[1], in = job->dw.shape[2], e = task / out, o = task % out;
    double *acc = ref_zeros(in);
    int64_t end = group_begin(job->offsets, e + 1, job->row_count);
    for (int64_t r = group_begin(job->offsets, e, job->row_count); r < end; r++) {
        int64_t dy_row = operand_row(job->dy_rows, r, job->dy_tensor);
        int64_t x_row = operand_row(job->x_rows, r, job->x_tensor);
        ref_add_scaled(acc, job->dy[dy_row * out + o], job->x + x_row * in, in);
    }
    ref_write(job->dw, task * in, in, acc, job->accumulate);
    free(acc);
}

/* N of a call: from the offsets, or from the operands of one group. */
static int64_t routed_rows(struct tensor dy, struct tensor dy_rows, struct tensor offsets, int64_t group_count) {
    if (tensor_exists(offsets))
        return ref_index(offsets, group_count);
    return tensor_exists(dy_rows) ? tensor_elements(dy_rows) : dy.shape[0];
}

void ref_product_backward_weight(struct tensor dy, struct tensor dy_rows, struct tensor x,
                                 struct tensor x_rows, struct tensor offsets, struct tensor dw, bool accumulate) {
    if (dw.dim_count < 3)
        dw = tensor_3d(dw.data, dw.dtype, 1, dw.shape[0], dw.shape[1]);
    CHECK(ref_is_float(x) && dy.dtype == x.dtype && ref_is_real(dw, x.dtype));
    CHECK(ref_is_2d(dy, dy.shape[0], dw.shape[1]) && ref_is_2d(x, x.shape[0], dw.shape[2]));
    int64_t row_count = routed_rows(dy, dy_rows, offsets, dw.shape[0]);
    check_groups(offsets, dw.shape[0], dy_rows, row_count);
    check_groups(offsets, dw.shape[0], x_rows, row_count);
    double *dy_values = ref_read(dy), *x_values = ref_read(x);
    struct weight_job job = {dy, dy_rows, x, x_rows, offsets, dw, dy_values, x_values, row_count, accumulate};
    parallel_for(dw.shape[0] * dw.shape[1], weight_row, &job);
    free(dy_values);
    free(x_values);
}

/* ---- roof ---- */

double ref_multiply_registers(enum dtype dtype, int64_t rounds) {
    (void)dtype;
    volatile double sum = 0;
    for (int64_t i = 0; i < rounds; i++)
        sum = sum + 0.5 * 0.5;
    return 2 * (double)rounds;
}

const char *ref_multiply_unit(enum dtype dtype) {
    (void)dtype;
    return "double scalars";
}
