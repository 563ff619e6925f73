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

/* Of a tensor with something for each row. */
static struct tensor part_of(struct tensor t, const struct expert_part *part) {
    return tensor_rows(t, part->range.begin, range_count(part->range));
}

static bool is_empty(const struct expert_part *part) {
    return range_count(part->range) == 0;
}

void experts_inner_forward(const struct layer_context *context, const struct expert_weights *w,
                           const struct expert_rows *rows, const struct expert_part *part,
                           const struct expert_saved *saved) {
    if (is_empty(part))
        return;
    struct tensor index = part_of(rows->rows, part);
    context->ops->product_forward(rows->data, index, part->offsets, w->gate, part_of(saved->gate, part), false);
    context->ops->product_forward(rows->data, index, part->offsets, w->up, part_of(saved->up, part), false);
}

void experts_forward(const struct layer_context *context, const struct expert_weights *w,
                     const struct expert_rows *rows, const struct expert_part *part, const struct expert_saved *saved,
                     const struct expert_scratch *scratch) {
    if (is_empty(part))
        return;
    const struct kernel_ops *ops = context->ops;
    struct tensor act = part_of(scratch->act, part);
    experts_inner_forward(context, w, rows, part, saved);
    ops->swiglu_forward(part_of(saved->gate, part), part_of(saved->up, part), part_of(rows->weight, part), act);
    ops->product_forward(act, tensor_none(), part->offsets, w->down, part_of(scratch->results, part), false);
}

void experts_backward_rows(const struct layer_context *context, const struct expert_weights *w,
                           const struct expert_rows *rows, const struct expert_rows *drows,
                           const struct expert_part *part, const struct expert_saved *saved,
                           const struct expert_scratch *scratch, const struct expert_gradients *gradients) {
    if (is_empty(part))
        return;
    const struct kernel_ops *ops = context->ops;
    struct tensor offsets = part->offsets, none = tensor_none(), index = part_of(drows->rows, part);
    struct tensor gate = part_of(saved->gate, part), up = part_of(saved->up, part), weight = part_of(rows->weight, part);
    struct tensor act = part_of(scratch->act, part), dact = part_of(scratch->dact, part);
    ops->swiglu_forward(gate, up, weight, act);
    ops->product_backward_weight(drows->data, index, act, none, offsets, gradients->down);
    ops->product_backward_input(drows->data, index, offsets, w->down, dact, false);
    ops->swiglu_backward(dact, gate, up, weight, gate, up, part_of(scratch->drow_weight, part));
    ops->product_backward_input(gate, none, offsets, w->gate, part_of(scratch->drows, part), false);
    ops->product_backward_input(up, none, offsets, w->up, part_of(scratch->drows, part), true);
}

void experts_inner_backward(const struct layer_context *context, const struct expert_rows *rows,
                            const struct expert_part *part, const struct expert_saved *saved,
                            const struct expert_gradients *gradients) {
    if (is_empty(part))
        return;
    const struct kernel_ops *ops = context->ops;
    struct tensor none = tensor_none(), index = part_of(rows->rows, part);
    ops->product_backward_weight(part_of(saved->gate, part), none, rows->data, index, part->offsets, gradients->gate);
    ops->product_backward_weight(part_of(saved->up, part), none, rows->data, index, part->offsets, gradients->up);
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
