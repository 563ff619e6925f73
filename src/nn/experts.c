#include "nn/experts.h"

void expert_saved_take(struct expert_saved *saved, const struct layer_context *context,
                       const struct expert_dims *dims, bool is_dense, struct arena *arena) {
    saved->gate = layer_take(arena, context->compute, dims->rows, dims->inner);
    saved->up = layer_take(arena, context->compute, dims->rows, dims->inner);
    saved->weight = is_dense ? tensor_none() : layer_take(arena, context->real, dims->rows, 1);
}

void expert_scratch_take(struct expert_scratch *scratch, const struct layer_context *context,
                         const struct expert_dims *dims, bool is_dense, struct arena *arena) {
    *scratch = (struct expert_scratch){
        .act = layer_take(arena, context->compute, dims->rows, dims->inner),
        .dact = layer_take(arena, context->compute, dims->rows, dims->inner),
        .results = tensor_none(),
        .drows = tensor_none(),
        .drow_weight = tensor_none(),
    };
    if (is_dense)
        return;
    scratch->results = layer_take(arena, context->compute, dims->rows, dims->width);
    scratch->drows = layer_take(arena, context->real, dims->rows, dims->width);
    scratch->drow_weight = layer_take(arena, context->real, dims->rows, 1);
}

void experts_inner_forward(const struct layer_context *context, const struct expert_weights *w,
                           const struct expert_rows *rows, const struct expert_saved *saved) {
    context->ops->product_forward(rows->data, rows->rows, rows->offsets, w->gate, saved->gate, false);
    context->ops->product_forward(rows->data, rows->rows, rows->offsets, w->up, saved->up, false);
}

void experts_forward(const struct layer_context *context, const struct expert_weights *w,
                     const struct expert_rows *rows, const struct expert_saved *saved,
                     const struct expert_scratch *scratch) {
    const struct kernel_ops *ops = context->ops;
    experts_inner_forward(context, w, rows, saved);
    ops->swiglu_forward(saved->gate, saved->up, rows->weight, scratch->act);
    ops->product_forward(scratch->act, tensor_none(), rows->offsets, w->down, scratch->results, false);
}

void experts_backward(const struct layer_context *context, const struct expert_weights *w,
                      const struct expert_rows *rows, const struct expert_rows *drows,
                      const struct expert_saved *saved, const struct expert_scratch *scratch,
                      const struct expert_gradients *gradients) {
    const struct kernel_ops *ops = context->ops;
    struct tensor offsets = rows->offsets, none = tensor_none();
    ops->swiglu_forward(saved->gate, saved->up, rows->weight, scratch->act);
    ops->product_backward_weight(drows->data, drows->rows, scratch->act, none, offsets, gradients->down);
    ops->product_backward_input(drows->data, drows->rows, offsets, w->down, scratch->dact, false);
    ops->swiglu_backward(scratch->dact, saved->gate, saved->up, rows->weight, saved->gate, saved->up,
                         scratch->drow_weight);
    ops->product_backward_weight(saved->gate, none, rows->data, rows->rows, offsets, gradients->gate);
    ops->product_backward_weight(saved->up, none, rows->data, rows->rows, offsets, gradients->up);
    ops->product_backward_input(saved->gate, none, offsets, w->gate, scratch->drows, false);
    ops->product_backward_input(saved->up, none, offsets, w->up, scratch->drows, true);
}

void dense_inner_forward(const struct layer_context *context, const struct expert_weights *w, struct tensor x,
                         const struct expert_saved *saved) {
    layer_product(context, x, w->gate, saved->gate, false);
    layer_product(context, x, w->up, saved->up, false);
}

void dense_forward(const struct layer_context *context, const struct expert_weights *w, struct tensor x,
                   const struct expert_saved *saved, const struct expert_scratch *scratch, struct tensor y) {
    dense_inner_forward(context, w, x, saved);
    context->ops->swiglu_forward(saved->gate, saved->up, tensor_none(), scratch->act);
    layer_product(context, scratch->act, w->down, y, true);
}

void dense_backward(const struct layer_context *context, const struct expert_weights *w, struct tensor x,
                    struct tensor dy, const struct expert_saved *saved, const struct expert_scratch *scratch,
                    const struct expert_gradients *gradients, struct tensor dx) {
    const struct kernel_ops *ops = context->ops;
    ops->swiglu_forward(saved->gate, saved->up, tensor_none(), scratch->act);
    layer_product_backward_weight(context, dy, scratch->act, gradients->down);
    layer_product_backward_input(context, dy, w->down, scratch->dact, false);
    ops->swiglu_backward(scratch->dact, saved->gate, saved->up, tensor_none(), saved->gate, saved->up, tensor_none());
    layer_product_backward_weight(context, saved->gate, x, gradients->gate);
    layer_product_backward_weight(context, saved->up, x, gradients->up);
    layer_product_backward_input(context, saved->gate, w->gate, dx, false);
    layer_product_backward_input(context, saved->up, w->up, dx, true);
}
