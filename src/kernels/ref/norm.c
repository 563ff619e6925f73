/* Root-mean-square norms over rows, and over heads with the rotary position behind it. */
#include "kernels/ref/ref.h"

static double mean_square(const double *x, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++)
        sum += x[i] * x[i];
    return sum / (double)count;
}

/* y = x * rstd * weight. Returns rstd. */
static double norm_row(const double *x, const double *weight, int64_t count, double epsilon, double *y) {
    double rstd = 1 / sqrt(mean_square(x, count) + epsilon);
    for (int64_t i = 0; i < count; i++)
        y[i] = x[i] * rstd * weight[i];
    return rstd;
}

/* dx of norm_row from dy; dweight +=. */
static void norm_row_backward(const double *dy, const double *x, const double *weight, double rstd,
                              int64_t count, double *dx, double *dweight) {
    double mean = 0; /* of dy * weight * (x * rstd) */
    for (int64_t i = 0; i < count; i++)
        mean += dy[i] * weight[i] * x[i] * rstd / (double)count;
    for (int64_t i = 0; i < count; i++) {
        dx[i] = rstd * (dy[i] * weight[i] - x[i] * rstd * mean);
        dweight[i] += dy[i] * x[i] * rstd;
    }
}

/* The pairs (n[j], n[j + P/2]) turned by the angles whose cosines and sines `table` holds; sign -1 turns
 * back. */
static void rotate(const double *n, const double *table, int64_t head_dim, double sign, double *y) {
    int64_t half = head_dim / 2;
    for (int64_t j = 0; j < half; j++) {
        double cosine = table[j], sine = sign * table[half + j];
        y[j] = n[j] * cosine - n[j + half] * sine;
        y[j + half] = n[j + half] * cosine + n[j] * sine;
    }
}

void ref_rmsnorm_forward(struct tensor x, struct tensor weight, double epsilon, struct tensor y,
                         struct tensor rstd) {
    int64_t rows = x.shape[0], width = x.shape[1];
    CHECK(ref_is_float(x) && ref_is_float(y) && ref_is_real(weight, x.dtype) && ref_is_real(rstd, x.dtype));
    CHECK(ref_is_2d(x, rows, width) && ref_is_2d(y, rows, width));
    CHECK(ref_is_1d(weight, width) && ref_is_1d(rstd, rows));
    double *xs = ref_read(x), *w = ref_read(weight), *row = ref_zeros(width);
    for (int64_t r = 0; r < rows; r++) {
        ref_store(rstd, r, norm_row(xs + r * width, w, width, epsilon, row));
        ref_write(y, r * width, width, row, false);
    }
    free(xs);
    free(w);
    free(row);
}

void ref_rmsnorm_backward(struct tensor dy, struct tensor x, struct tensor weight, struct tensor rstd,
                          struct tensor dx, bool accumulate, struct tensor dweight) {
    int64_t rows = x.shape[0], width = x.shape[1];
    CHECK(ref_is_float(dy) && ref_is_float(x) && ref_is_float(dx));
    CHECK(ref_is_real(weight, x.dtype) && ref_is_real(rstd, x.dtype) && ref_is_real(dweight, x.dtype));
    CHECK(ref_is_2d(x, rows, width) && ref_is_2d(dy, rows, width) && ref_is_2d(dx, rows, width));
    CHECK(ref_is_1d(weight, width) && ref_is_1d(rstd, rows) && ref_is_1d(dweight, width));
    CHECK(dx.data != dy.data || rows == 0 || (!accumulate && dx.dtype == dy.dtype));
    double *dys = ref_read(dy), *xs = ref_read(x), *w = ref_read(weight);
    double *row = ref_zeros(width), *dw = ref_zeros(width);
    for (int64_t r = 0; r < rows; r++) {
        norm_row_backward(dys + r * width, xs + r * width, w, ref_load(rstd, r), width, row, dw);
        ref_write(dx, r * width, width, row, accumulate);
    }
    ref_write(dweight, 0, width, dw, true);
    free(dys);
    free(xs);
    free(w);
    free(row);
    free(dw);
}

/* Returns the number of heads in a row of x. */
static int64_t check_rope(struct tensor x, struct tensor weight, struct tensor rstd, struct tensor table,
                          int64_t sequence_length, int64_t first_position) {
    int64_t head_dim = tensor_elements(weight);
    CHECK(ref_is_float(x) && ref_is_2d(x, x.shape[0], x.shape[1]));
    CHECK(head_dim >= 2 && head_dim % 2 == 0 && x.shape[1] % head_dim == 0);
    CHECK(ref_is_real(weight, x.dtype) && ref_is_real(rstd, x.dtype) && ref_is_real(table, x.dtype));
    CHECK(ref_is_1d(rstd, x.shape[0] * (x.shape[1] / head_dim)));
    CHECK(ref_is_2d(table, table.shape[0], head_dim));
    CHECK(sequence_length >= 1 && first_position >= 0);
    int64_t used = x.shape[0] < sequence_length ? x.shape[0] : sequence_length;
    CHECK_OP(first_position + used, <=, table.shape[0]);
    return x.shape[1] / head_dim;
}

void ref_qknorm_rope_forward(struct tensor x, struct tensor weight, double epsilon, struct tensor table,
                             int64_t sequence_length, int64_t first_position, struct tensor y,
                             struct tensor rstd) {
    int64_t heads = check_rope(x, weight, rstd, table, sequence_length, first_position);
    int64_t head_dim = tensor_elements(weight);
    CHECK(ref_is_float(y) && tensor_same_shape(x, y));
    double *xs = ref_read(x), *w = ref_read(weight), *angles = ref_read(table);
    double *normed = ref_zeros(head_dim), *turned = ref_zeros(head_dim);
    for (int64_t i = 0; i < x.shape[0] * heads; i++) { /* i = s * heads + head */
        int64_t position = first_position + i / heads % sequence_length;
        ref_store(rstd, i, norm_row(xs + i * head_dim, w, head_dim, epsilon, normed));
        rotate(normed, angles + position * head_dim, head_dim, 1, turned);
        ref_write(y, i * head_dim, head_dim, turned, false);
    }
    free(xs);
    free(w);
    free(angles);
    free(normed);
    free(turned);
}

void ref_qknorm_rope_backward(struct tensor dy, struct tensor x, struct tensor weight, struct tensor rstd,
                              struct tensor table, int64_t sequence_length, int64_t first_position,
                              struct tensor dx, struct tensor dweight) {
    int64_t heads = check_rope(x, weight, rstd, table, sequence_length, first_position);
    int64_t head_dim = tensor_elements(weight);
    CHECK(ref_is_float(dy) && ref_is_float(dx) && tensor_same_shape(x, dy) && tensor_same_shape(x, dx));
    CHECK(ref_is_real(dweight, x.dtype) && ref_is_1d(dweight, head_dim));
    CHECK(dx.data != dy.data || x.shape[0] == 0 || dx.dtype == dy.dtype);
    double *dys = ref_read(dy), *xs = ref_read(x), *w = ref_read(weight), *angles = ref_read(table);
    double *dnormed = ref_zeros(head_dim), *row = ref_zeros(head_dim), *dw = ref_zeros(head_dim);
    for (int64_t i = 0; i < x.shape[0] * heads; i++) {
        int64_t position = first_position + i / heads % sequence_length;
        rotate(dys + i * head_dim, angles + position * head_dim, head_dim, -1, dnormed);
        norm_row_backward(dnormed, xs + i * head_dim, w, ref_load(rstd, i), head_dim, row, dw);
        ref_write(dx, i * head_dim, head_dim, row, false);
    }
    ref_write(dweight, 0, head_dim, dw, true);
    free(dys);
    free(xs);
    free(w);
    free(angles);
    free(dnormed);
    free(row);
    free(dw);
}
