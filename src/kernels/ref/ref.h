/* What the files of the reference backend share. Private to kernels/ref/.
 *
 * Every operation here reads like its formula in kernels.h: operands are read into double, all arithmetic is
 * done in double, results are rounded once when they are stored. Scratch is taken per call and given back:
 * clarity before speed. Reading a whole operand before the first result is stored is also what makes the
 * permitted overlaps safe.
 */
#pragma once

#include "base/memory.h"
#include "base/threads.h"
#include "kernels/kernels.h"

#include <math.h>
#include <stdlib.h>

/* ---- predicates for CHECK ---- */

bool ref_is_float(struct tensor t);
/* True where t has the dtype of sums beside floats of `beside`: f64 beside f64, else f32. */
bool ref_is_real(struct tensor t, enum dtype beside);
bool ref_is_float_or_real(struct tensor t, enum dtype beside); /* of dtype `beside`, or real beside it */
bool ref_is_1d(struct tensor t, int64_t d0);                   /* d0 elements in any number of dimensions */
bool ref_is_2d(struct tensor t, int64_t d0, int64_t d1);
bool ref_is_3d(struct tensor t, int64_t d0, int64_t d1, int64_t d2);

/* ---- elements, by their flat index ---- */

double ref_load(struct tensor t, int64_t i);
void ref_store(struct tensor t, int64_t i, double value);
void ref_add(struct tensor t, int64_t i, double value); /* t[i] += value, rounded once */
int64_t ref_index(struct tensor t, int64_t i);          /* of an i32 tensor */

/* All elements of t as doubles, in fresh memory; the caller frees it. */
double *ref_read(struct tensor t);
/* Zeroed doubles; the caller frees them. Aborts where there is no memory: the reference serves small
 * problems. */
double *ref_zeros(int64_t count);
/* Elements first .. first+count-1 of t = values, or += with accumulate. */
void ref_write(struct tensor t, int64_t first, int64_t count, const double *values, bool accumulate);

/* ---- arithmetic ---- */

/* acc[0..count) += factor * row[0..count) */
void ref_add_scaled(double *acc, double factor, const double *row, int64_t count);

/* log(sum of exp(x)) over count elements, without overflow. */
double ref_logsumexp(const double *x, int64_t count);

/* ---- the operations, as kernels.h has them ---- */

void ref_gemm(struct tensor a, bool transpose_a, struct tensor b, bool transpose_b, struct tensor c,
              bool accumulate);
size_t ref_packed_bytes(struct packed shape);
void ref_pack(struct tensor w, struct packed to);
void ref_product_forward(struct tensor x, struct tensor rows, struct tensor offsets, struct packed w,
                         struct tensor y, bool accumulate);
void ref_product_backward_input(struct tensor dy, struct tensor rows, struct tensor offsets, struct packed w,
                                struct tensor dx, bool accumulate);
void ref_product_backward_weight(struct tensor dy, struct tensor dy_rows, struct tensor x,
                                 struct tensor x_rows, struct tensor offsets, struct tensor dw, bool accumulate);

void ref_fill(struct tensor t, double value);
void ref_cast(struct tensor from, struct tensor to);
void ref_add_tensor(struct tensor x, struct tensor y);
void ref_sum_squares(struct tensor x, struct tensor sum);
void ref_gather_scalars(struct tensor from, struct tensor index, struct tensor to);
void ref_gather_rows(struct tensor from, struct tensor index, struct tensor to);
void ref_sum_boxes(const struct box *terms, int term_count, const int64_t count[3], struct box to, bool accumulate);

void ref_rmsnorm_forward(struct tensor x, struct tensor weight, double epsilon, struct tensor y,
                         struct tensor rstd);
void ref_rmsnorm_backward(struct tensor dy, struct tensor x, struct tensor weight, struct tensor rstd,
                          struct tensor dx, bool accumulate, struct tensor dweight);
void ref_qknorm_rope_forward(struct tensor x, struct tensor weight, double epsilon, struct tensor table,
                             int64_t sequence_length, int64_t first_position, struct tensor y,
                             struct tensor rstd);
void ref_qknorm_rope_backward(struct tensor dy, struct tensor x, struct tensor weight, struct tensor rstd,
                              struct tensor table, int64_t sequence_length, int64_t first_position,
                              struct tensor dx, struct tensor dweight);

void ref_attention_forward(struct attention_shape shape, struct tensor q, struct tensor k, struct tensor v,
                           struct tensor out, struct tensor logsumexp);
void ref_attention_kept(struct attention_shape shape, struct tensor q, struct tensor k, struct tensor v, struct tensor kept,
                        struct tensor out, struct tensor logsumexp);
void ref_attention_keep(struct tensor key, struct tensor value, struct tensor kept, struct tensor keys, struct tensor values);
void ref_attention_backward(struct attention_shape shape, struct tensor dout, struct tensor q,
                            struct tensor k, struct tensor v, struct tensor out, struct tensor logsumexp,
                            struct tensor dq, struct tensor dk, struct tensor dv);

void ref_router_topk_forward(struct tensor logits, bool normalize, struct tensor prob, struct tensor expert,
                             struct tensor weight);
void ref_router_topk_backward(struct tensor dweight, struct tensor logits, struct tensor prob,
                              struct tensor expert, struct tensor weight, bool normalize, struct tensor count,
                              struct router_loss_scales scales, struct tensor dlogits);
void ref_router_stats(struct tensor logits, struct tensor prob, struct tensor expert, struct tensor stats);
void ref_route_sort(struct tensor expert, struct tensor count, struct tensor offsets, struct tensor row_slot,
                    struct tensor row_token, struct tensor slot_row);
void ref_combine_rows(struct tensor rows, struct tensor slot_row, struct tensor y, bool accumulate);
void ref_route_pairs(struct tensor expert, int64_t expert_count, int rank_count, struct pair_plan plan);
void ref_sort_arrivals(struct arrivals arrivals);

void ref_swiglu_forward(struct tensor gate, struct tensor up, struct tensor row_weight, struct tensor act);
void ref_swiglu_backward(struct tensor dact, struct tensor gate, struct tensor up, struct tensor row_weight,
                         struct tensor dgate, struct tensor dup, struct tensor drow_weight);

void ref_embedding_forward(struct tensor ids, struct tensor table, struct tensor x);
void ref_embedding_backward(struct tensor ids, struct tensor dx, struct tensor dtable);
void ref_cross_entropy(struct tensor logits, struct tensor target, double scale, struct tensor loss_sum,
                       struct tensor row_loss, struct tensor dlogits);
void ref_adamw(struct tensor param, struct tensor grad, struct tensor m, struct tensor v,
               struct adamw_settings settings, struct packed packed, struct update_hashes hashes);
void ref_outer_encode(struct tensor global, struct tensor local, enum outer_format format, void *wire,
                      struct tensor stats);
void ref_outer_decode_add(const void *wire, enum outer_format format, struct tensor sum, bool accumulate);
void ref_outer_update(struct tensor sum, struct outer_settings settings, struct tensor global, struct tensor momentum);
void ref_outer_mix(struct tensor global, double keep, struct tensor local);
void ref_outer_dot(const void *a, const void *b, enum outer_format format, int64_t n, struct tensor sums);
double ref_multiply_registers(enum dtype dtype, int64_t rounds);
const char *ref_multiply_unit(enum dtype dtype);
