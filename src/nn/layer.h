/* What every layer function of nn/ is handed besides its operands.
 *
 * Layers are plain functions: forward, and beside it backward. They know no rank and no file. `compute` is the dtype
 * that products read (f32, bf16, f64), `real` that of the residual stream, of sums and of gradients of parameters
 * (f32, or f64 in the tests that take finite differences).
 *
 * Naming: a struct *_weights holds what forward reads, *_gradients what backward adds to (+=), *_saved what forward
 * leaves for backward, *_scratch what neither needs afterwards.
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

/* x itself where it has the compute dtype already, else its copy in `scratch` (compute dtype, as large). */
struct tensor layer_as_compute(const struct layer_context *context, struct tensor x, struct tensor scratch);

/* Dense products of a layer: y = x w^T, or += with accumulate; dx = dy w, or +=; dw += dy^T x. */
void layer_product(const struct layer_context *context, struct tensor x, struct packed w, struct tensor y,
                   bool accumulate);
void layer_product_backward_input(const struct layer_context *context, struct tensor dy, struct packed w,
                                  struct tensor dx, bool accumulate);
void layer_product_backward_weight(const struct layer_context *context, struct tensor dy, struct tensor x,
                                   struct tensor dw);
