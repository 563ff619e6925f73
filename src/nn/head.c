#include "nn/head.h"

enum { LOGITS_BUDGET_ELEMENTS = 1 << 21, CHUNK_ROWS_MIN = 64 };

int64_t head_chunk_rows(int64_t rows, int64_t vocab, int64_t elements) {
    int64_t chunk = (elements > 0 ? elements : LOGITS_BUDGET_ELEMENTS) / vocab;
    if (chunk < CHUNK_ROWS_MIN)
        chunk = CHUNK_ROWS_MIN;
    return chunk < rows ? chunk : rows;
}

void head_scratch_take(struct head_scratch *scratch, const struct layer_context *context,
                       const struct head_dims *dims, struct arena *arena) {
    scratch->normed = layer_take(arena, context->compute, dims->rows, dims->width);
    scratch->rstd = layer_take(arena, context->real, dims->rows, 1);
    scratch->logits = layer_take(arena, context->real, dims->chunk_rows, dims->vocab);
    scratch->dlogits = context->compute == context->real
                           ? scratch->logits
                           : layer_take(arena, context->compute, dims->chunk_rows, dims->vocab);
    scratch->dnormed = layer_take(arena, layer_gradient_dtype(context), dims->rows, dims->width);
}

void head_loss(const struct layer_context *context, const struct head_dims *dims, const struct head_weights *w,
               struct tensor x, struct tensor target, double scale, const struct head_scratch *scratch,
               struct tensor loss_sum, struct tensor row_loss, const struct head_gradients *gradients,
               struct tensor dx, struct tensor dx_compute) {
    const struct kernel_ops *ops = context->ops;
    ops->rmsnorm_forward(x, w->norm, dims->epsilon, scratch->normed, scratch->rstd);
    for (int64_t first = 0; first < dims->rows; first += dims->chunk_rows) {
        int64_t count = dims->rows - first < dims->chunk_rows ? dims->rows - first : dims->chunk_rows;
        struct tensor normed = tensor_rows(scratch->normed, first, count);
        struct tensor logits = tensor_rows(scratch->logits, 0, count);
        struct tensor dlogits = gradients ? tensor_rows(scratch->dlogits, 0, count) : tensor_none();
        layer_product(context, normed, w->head, logits, false);
        ops->cross_entropy(logits, tensor_rows(target, first, count), scale, loss_sum,
                           tensor_exists(row_loss) ? tensor_rows(row_loss, first, count) : row_loss, dlogits);
        if (gradients) {
            layer_product_backward_weight(context, dlogits, normed, gradients->head, gradients->accumulate || first > 0);
            layer_product_backward_input(context, dlogits, w->head, tensor_rows(scratch->dnormed, first, count),
                                         false);
        }
    }
    if (gradients && !gradients->accumulate && dims->rows == 0) /* there was no chunk to write it */
        ops->fill(gradients->head, 0);
    if (gradients)
        layer_rmsnorm_backward(context, scratch->dnormed, x, w->norm, scratch->rstd, dx, false, gradients->norm, dx_compute);
}

void head_logits(const struct layer_context *context, const struct head_dims *dims, const struct head_weights *w,
                 struct tensor x, const struct head_scratch *scratch, struct tensor logits) {
    struct tensor normed = tensor_rows(scratch->normed, 0, x.shape[0]);
    context->ops->rmsnorm_forward(x, w->norm, dims->epsilon, normed, tensor_rows(scratch->rstd, 0, x.shape[0]));
    layer_product(context, normed, w->head, logits, false);
}
