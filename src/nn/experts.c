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
    scratch->drows = layer_take(arena, layer_gradient_dtype(context), dims->rows, dims->width);
    scratch->drow_weight = layer_take(arena, context->real, dims->rows, 1);
}

/* Of a tensor with something for each row. */
static struct tensor part_of(struct tensor t, const struct expert_part *part) {
    return tensor_rows(t, part->range.begin, range_count(part->range));
}

static bool is_empty(const struct expert_part *part) {
    return range_count(part->range) == 0;
}

/* The gradient of a matrix that no row of this part meets. */
static void write_nothing(const struct layer_context *context, const struct expert_gradients *gradients,
                          struct tensor gradient) {
    if (!gradients->accumulate)
        context->ops->fill(gradient, 0);
}

void experts_inner_forward(const struct layer_context *context, const struct expert_weights *w,
                           const struct expert_rows *rows, const struct expert_part *part,
                           const struct expert_saved *saved) {
    if (is_empty(part))
        return;
    layer_swiglu_forward(context, rows->data, part_of(rows->rows, part), part->offsets, w->gate, w->up, tensor_none(),
                         part_of(saved->gate, part), part_of(saved->up, part), tensor_none());
}

void experts_forward(const struct layer_context *context, const struct expert_weights *w,
                     const struct expert_rows *rows, const struct expert_part *part, const struct expert_saved *saved,
                     const struct expert_scratch *scratch) {
    if (is_empty(part))
        return;
    struct tensor act = part_of(scratch->act, part);
    layer_swiglu_forward(context, rows->data, part_of(rows->rows, part), part->offsets, w->gate, w->up,
                         part_of(rows->weight, part), part_of(saved->gate, part), part_of(saved->up, part), act);
    context->ops->product_forward(act, tensor_none(), part->offsets, w->down, part_of(scratch->results, part), false);
}

void experts_backward_rows(const struct layer_context *context, const struct expert_weights *w,
                           const struct expert_rows *rows, const struct expert_rows *drows,
                           const struct expert_part *part, const struct expert_saved *saved,
                           const struct expert_scratch *scratch, const struct expert_gradients *gradients) {
    if (is_empty(part)) {
        write_nothing(context, gradients, gradients->down);
        return;
    }
    struct tensor offsets = part->offsets, none = tensor_none(), index = part_of(drows->rows, part);
    struct tensor gate = part_of(saved->gate, part), up = part_of(saved->up, part), weight = part_of(rows->weight, part);
    struct tensor act = part_of(scratch->act, part), dact = part_of(scratch->dact, part);
    layer_swiglu_backward(context, drows->data, index, offsets, w->down, gate, up, weight, act, dact,
                          part_of(scratch->drow_weight, part));
    context->ops->product_backward_weight(drows->data, index, act, none, offsets, gradients->down, gradients->accumulate);
    const struct product_term terms[] = {{gate, w->gate}, {up, w->up}};
    layer_product_backward_inputs(context, terms, 2, offsets, part_of(scratch->drows, part));
}

void experts_inner_backward(const struct layer_context *context, const struct expert_rows *rows,
                            const struct expert_part *part, const struct expert_saved *saved,
                            const struct expert_gradients *gradients) {
    if (is_empty(part)) {
        write_nothing(context, gradients, gradients->gate);
        write_nothing(context, gradients, gradients->up);
        return;
    }
    const struct kernel_ops *ops = context->ops;
    const bool add = gradients->accumulate;
    struct tensor none = tensor_none(), index = part_of(rows->rows, part);
    ops->product_backward_weight(part_of(saved->gate, part), none, rows->data, index, part->offsets, gradients->gate, add);
    ops->product_backward_weight(part_of(saved->up, part), none, rows->data, index, part->offsets, gradients->up, add);
}

void dense_inner_forward(const struct layer_context *context, const struct expert_weights *w, struct tensor x,
                         const struct expert_saved *saved) {
    layer_swiglu_forward(context, x, tensor_none(), tensor_none(), w->gate, w->up, tensor_none(), saved->gate, saved->up,
                         tensor_none());
}

void dense_forward(const struct layer_context *context, const struct expert_weights *w, struct tensor x,
                   const struct expert_saved *saved, const struct expert_scratch *scratch, struct tensor base,
                   struct tensor y) {
    layer_swiglu_forward(context, x, tensor_none(), tensor_none(), w->gate, w->up, tensor_none(), saved->gate, saved->up,
                         scratch->act);
    layer_product_onto(context, scratch->act, w->down, base, y);
}

void dense_backward(const struct layer_context *context, const struct expert_weights *w, struct tensor x,
                    struct tensor dy, const struct expert_saved *saved, const struct expert_scratch *scratch,
                    const struct expert_gradients *gradients, struct tensor dx) {
    struct tensor none = tensor_none();
    layer_swiglu_backward(context, dy, none, none, w->down, saved->gate, saved->up, none, scratch->act, scratch->dact, none);
    layer_product_backward_weight(context, dy, scratch->act, gradients->down, gradients->accumulate);
    layer_product_backward_weight(context, saved->gate, x, gradients->gate, gradients->accumulate);
    layer_product_backward_weight(context, saved->up, x, gradients->up, gradients->accumulate);
    const struct product_term terms[] = {{saved->gate, w->gate}, {saved->up, w->up}};
    layer_product_backward_inputs(context, terms, 2, tensor_none(), dx);
}
