/* What every layer function of nn/ is handed besides its operands.
 *
 * Layers are plain functions: forward, and beside it backward. They know no rank and no file. `compute` is the dtype
 * that products read (f32, bf16, f64), `real` that of the residual stream, of sums and of gradients of parameters
 * (f32, or f64 in the tests that take finite differences).
 *
 * Naming: a struct *_weights holds what forward reads, *_gradients what backward adds to (+=), *_saved what forward
 * leaves for backward, *_scratch what neither needs afterwards. Where *_gradients says `accumulate` false, backward writes
 * (=) the gradients of what products read, whatever they held, and adds to the others all the same.
 */
#pragma once

#include "device/device.h"
#include "kernels/kernels.h"

struct layer_context {
    const struct kernel_ops *ops;
    enum dtype compute, real;
};

/* A tensor of the context taken from an arena; data is NULL where the arena only counts. */
struct tensor layer_take(struct arena *arena, enum dtype dtype, int64_t rows, int64_t columns);

/* Of gradients of activations that one product makes and the next layer reads: compute where the backend is bound by memory, and
 * rounds others too (rmsnorm_backward_cast), else real. */
enum dtype layer_gradient_dtype(const struct layer_context *context);

/* x itself where it has the compute dtype already, else its copy in `scratch` (compute dtype, as large). */
struct tensor layer_as_compute(const struct layer_context *context, struct tensor x, struct tensor scratch);

/* Dense products of a layer: y = x w^T, or += with accumulate; y = base + x w^T, both real; dx = dy w, or +=;
 * dw = dy^T x, or +=. */
void layer_product(const struct layer_context *context, struct tensor x, struct packed w, struct tensor y,
                   bool accumulate);
void layer_product_onto(const struct layer_context *context, struct tensor x, struct packed w, struct tensor base,
                        struct tensor y);
void layer_product_backward_input(const struct layer_context *context, struct tensor dy, struct packed w,
                                  struct tensor dx, bool accumulate);
void layer_product_backward_weight(const struct layer_context *context, struct tensor dy, struct tensor x,
                                   struct tensor dw, bool accumulate);

/* dx = the sum of dy_t w_t over the terms, grouped by offsets (none: dense). */
void layer_product_backward_inputs(const struct layer_context *context, const struct product_term *terms, int term_count,
                                   struct tensor offsets, struct tensor dx);

/* The gradient dx of the residual stream becomes that before a norm, += or =, as rmsnorm_backward has it. Where a backend rounds
 * it on the way, dx_compute, of the compute dtype, has it from then on: layer_gradient_as_compute, the dx_compute or dx that
 * products read, casts only where it was not. */
void layer_rmsnorm_backward(const struct layer_context *context, struct tensor dy, struct tensor x, struct tensor weight,
                            struct tensor rstd, struct tensor dx, bool accumulate, struct tensor dweight,
                            struct tensor dx_compute);
struct tensor layer_gradient_as_compute(const struct layer_context *context, struct tensor dx, struct tensor dx_compute);

/* The same, += , of the gradient that comes from a router and its experts, where the backend sums that on its way: only if
 * layer_sums_routed. dy real [S,D]: scratch. */
bool layer_sums_routed(const struct layer_context *context);
void layer_routed_norm_backward(const struct layer_context *context, struct routed_gradient from, struct tensor dy,
                                struct tensor x, struct tensor weight, struct tensor rstd, struct tensor dx,
                                struct tensor dweight, struct tensor dx_compute);

/* gate, up and, unless it is none, act of x[rows]: product_swiglu_forward, or its parts. */
void layer_swiglu_forward(const struct layer_context *context, struct tensor x, struct tensor rows, struct tensor offsets,
                          struct packed gate_weight, struct packed up_weight, struct tensor row_weight, struct tensor gate,
                          struct tensor up, struct tensor act);

/* act again, and the gradients of gate, up (in their place) and row_weight: product_swiglu_backward, or its parts. */
void layer_swiglu_backward(const struct layer_context *context, struct tensor dy, struct tensor rows, struct tensor offsets,
                           struct packed w, struct tensor gate, struct tensor up, struct tensor row_weight, struct tensor act,
                           struct tensor dact, struct tensor drow_weight);
