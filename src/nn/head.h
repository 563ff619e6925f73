/* The end of the model: final norm, output head, loss. Logits exist for a chunk of rows at a time, never for a batch:
 * with their gradient they would be the largest tensors of a small model. */
#pragma once

#include "nn/layer.h"

struct head_dims {
    int64_t rows, width, vocab; /* S, D, V */
    int64_t chunk_rows;         /* logits at a time */
    double epsilon;
};

struct head_weights {
    struct tensor norm; /* real [D] */
    struct packed head; /* compute [V,D] */
};

struct head_gradients { /* real */
    struct tensor norm, head;
    bool accumulate;
};

struct head_scratch {
    struct tensor normed, rstd; /* compute [S,D]; real [S] */
    struct tensor logits;       /* real [chunk,V] */
    struct tensor dlogits;      /* compute [chunk,V]; the logits themselves where compute is real */
    struct tensor dnormed;      /* layer_gradient_dtype [S,D] */
};

void head_scratch_take(struct head_scratch *scratch, const struct layer_context *context,
                       const struct head_dims *dims, struct arena *arena);

/* Rows of logits that fit a fixed budget of memory, of `elements` (ops->logits_elements), or 0: of what suits a processor. The
 * same for any number of threads. */
int64_t head_chunk_rows(int64_t rows, int64_t vocab, int64_t elements);

/* loss_sum f64 [1] += cross entropy of x real [S,D] with target i32 [S]; row_loss real [S] or none.
 * With gradients: dx real [S,D] = gradient of scale * loss_sum, and the weights' gradients (head: = or +=). NULL: loss only.
 * dx_compute: see layer_rmsnorm_backward. */
void head_loss(const struct layer_context *context, const struct head_dims *dims, const struct head_weights *weights,
               struct tensor x, struct tensor target, double scale, const struct head_scratch *scratch,
               struct tensor loss_sum, struct tensor row_loss, const struct head_gradients *gradients,
               struct tensor dx, struct tensor dx_compute);

/* logits real [rows,V] of x real [rows,D], rows <= dims->rows and <= the rows of `logits`. */
void head_logits(const struct layer_context *context, const struct head_dims *dims,
                 const struct head_weights *weights, struct tensor x, const struct head_scratch *scratch,
                 struct tensor logits);
