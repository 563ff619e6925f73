/* Feed-forward layers: SwiGLU experts over ragged groups of rows, and the dense one. Source: arXiv 2002.05202.
 *
 * The router's weight multiplies the expert's inner activation, which equals multiplying its output (the last product
 * is linear) and spares saving that output: the weight's gradient is the inner product of activation and its
 * gradient. */
#pragma once

#include "nn/exchange.h"

struct expert_dims {
    int64_t rows;   /* N routed rows; S in a dense layer */
    int64_t width;  /* D */
    int64_t inner;  /* F */
};

struct expert_weights { /* compute [E,F,D], [E,F,D], [E,D,F]; dense: without E */
    struct packed gate, up, down;
};

struct expert_gradients { /* real, shapes of the weights */
    struct tensor gate, up, down;
    bool accumulate;
};

struct expert_saved {
    struct tensor gate, up; /* compute [N,F]; backward overwrites them */
    struct tensor weight;   /* real [N]; none in a dense layer */
};

struct expert_scratch {
    struct tensor act, dact;   /* compute [N,F] */
    struct tensor results;     /* compute [N,D] */
    struct tensor drows;       /* layer_gradient_dtype [N,D] */
    struct tensor drow_weight; /* real [N] */
};

void expert_saved_take(struct expert_saved *saved, const struct layer_context *context,
                       const struct expert_dims *dims, bool is_dense, struct arena *arena);
void expert_scratch_take(struct expert_scratch *scratch, const struct layer_context *context,
                         const struct expert_dims *dims, bool is_dense, struct arena *arena);

/* Each of the following works on one part of the rows. Where it has none, gradients that are written (=) become zeros, and
 * nothing else happens. */

/* The first half of forward: what backward needs, saved->gate and saved->up. */
void experts_inner_forward(const struct layer_context *context, const struct expert_weights *weights,
                           const struct expert_rows *rows, const struct expert_part *part,
                           const struct expert_saved *saved);
void dense_inner_forward(const struct layer_context *context, const struct expert_weights *weights, struct tensor x,
                         const struct expert_saved *saved);

/* scratch->results = each row's expert output times its weight. rows->weight is saved->weight. */
void experts_forward(const struct layer_context *context, const struct expert_weights *weights,
                     const struct expert_rows *rows, const struct expert_part *part, const struct expert_saved *saved,
                     const struct expert_scratch *scratch);

/* Backward, in two halves: first all that needs drows, the gradient of the results, up to the gradient of the rows; so
 * that it can leave while the second half runs. rows: as in forward; part: of drows.
 * scratch->drows, scratch->drow_weight = ; gradients->down = or += ; saved->gate and saved->up become their gradients. */
void experts_backward_rows(const struct layer_context *context, const struct expert_weights *weights,
                           const struct expert_rows *rows, const struct expert_rows *drows,
                           const struct expert_part *part, const struct expert_saved *saved,
                           const struct expert_scratch *scratch, const struct expert_gradients *gradients);
/* gradients->gate and gradients->up = or += . */
void experts_inner_backward(const struct layer_context *context, const struct expert_rows *rows,
                            const struct expert_part *part, const struct expert_saved *saved,
                            const struct expert_gradients *gradients);

/* Dense: y = base + down(silu(gate x) * up x); base and y real, x compute [S,D]. */
void dense_forward(const struct layer_context *context, const struct expert_weights *weights, struct tensor x,
                   const struct expert_saved *saved, const struct expert_scratch *scratch, struct tensor base,
                   struct tensor y);

/* dy compute [S,D]; dx real [S,D] = ; gradients = or += . */
void dense_backward(const struct layer_context *context, const struct expert_weights *weights, struct tensor x,
                    struct tensor dy, const struct expert_saved *saved, const struct expert_scratch *scratch,
                    const struct expert_gradients *gradients, struct tensor dx);
