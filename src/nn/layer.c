#include "nn/layer.h"

struct tensor layer_take(struct arena *arena, enum dtype dtype, int64_t rows, int64_t columns) {
    struct tensor t = tensor_2d(NULL, dtype, rows, columns);
    t.data = arena_take(arena, tensor_bytes(t));
    return t;
}

struct tensor layer_as_compute(const struct layer_context *context, struct tensor x, struct tensor scratch) {
    if (x.dtype == context->compute)
        return x;
    context->ops->cast(x, scratch);
    return scratch;
}

void layer_product(const struct layer_context *context, struct tensor x, struct packed w, struct tensor y,
                   bool accumulate) {
    context->ops->product_forward(x, tensor_none(), tensor_none(), w, y, accumulate);
}

void layer_product_onto(const struct layer_context *context, struct tensor x, struct packed w, struct tensor base,
                        struct tensor y) {
    const struct kernel_ops *ops = context->ops;
    if (ops->product_forward_onto) {
        ops->product_forward_onto(x, w, base, y);
        return;
    }
    ops->cast(base, y);
    layer_product(context, x, w, y, true);
}

void layer_product_backward_input(const struct layer_context *context, struct tensor dy, struct packed w,
                                  struct tensor dx, bool accumulate) {
    context->ops->product_backward_input(dy, tensor_none(), tensor_none(), w, dx, accumulate);
}

void layer_product_backward_weight(const struct layer_context *context, struct tensor dy, struct tensor x,
                                   struct tensor dw, bool accumulate) {
    context->ops->product_backward_weight(dy, tensor_none(), x, tensor_none(), tensor_none(), dw, accumulate);
}

void layer_product_backward_inputs(const struct layer_context *context, const struct product_term *terms, int term_count,
                                   struct tensor offsets, struct tensor dx) {
    const struct kernel_ops *ops = context->ops;
    if (ops->product_backward_inputs) {
        ops->product_backward_inputs(terms, term_count, offsets, dx, false);
        return;
    }
    for (int i = 0; i < term_count; i++)
        ops->product_backward_input(terms[i].dy, tensor_none(), offsets, terms[i].w, dx, i > 0);
}

/* Shapes alone may be planned without a table of operations. */
static bool rounds_gradients(const struct layer_context *context) {
    return context->ops && context->ops->rmsnorm_backward_cast && context->compute != context->real;
}

enum dtype layer_gradient_dtype(const struct layer_context *context) {
    return rounds_gradients(context) ? context->compute : context->real;
}

void layer_rmsnorm_backward(const struct layer_context *context, struct tensor dy, struct tensor x, struct tensor weight,
                            struct tensor rstd, struct tensor dx, bool accumulate, struct tensor dweight,
                            struct tensor dx_compute) {
    const struct kernel_ops *ops = context->ops;
    if (rounds_gradients(context))
        ops->rmsnorm_backward_cast(dy, x, weight, rstd, dx, accumulate, dweight, dx_compute);
    else
        ops->rmsnorm_backward(dy, x, weight, rstd, dx, accumulate, dweight);
}

bool layer_sums_routed(const struct layer_context *context) {
    return rounds_gradients(context) && context->ops->routed_norm_backward;
}

void layer_routed_norm_backward(const struct layer_context *context, struct routed_gradient from, struct tensor dy,
                                struct tensor x, struct tensor weight, struct tensor rstd, struct tensor dx,
                                struct tensor dweight, struct tensor dx_compute) {
    context->ops->routed_norm_backward(from, dy, x, weight, rstd, dx, true, dweight, dx_compute);
}

struct tensor layer_gradient_as_compute(const struct layer_context *context, struct tensor dx, struct tensor dx_compute) {
    return rounds_gradients(context) ? dx_compute : layer_as_compute(context, dx, dx_compute);
}

void layer_swiglu_forward(const struct layer_context *context, struct tensor x, struct tensor rows, struct tensor offsets,
                          struct packed gate_weight, struct packed up_weight, struct tensor row_weight, struct tensor gate,
                          struct tensor up, struct tensor act) {
    const struct kernel_ops *ops = context->ops;
    if (ops->product_swiglu_forward) {
        ops->product_swiglu_forward(x, rows, offsets, gate_weight, up_weight, row_weight, gate, up, act);
        return;
    }
    ops->product_forward(x, rows, offsets, gate_weight, gate, false);
    ops->product_forward(x, rows, offsets, up_weight, up, false);
    if (tensor_exists(act))
        ops->swiglu_forward(gate, up, row_weight, act);
}

void layer_swiglu_backward(const struct layer_context *context, struct tensor dy, struct tensor rows, struct tensor offsets,
                           struct packed w, struct tensor gate, struct tensor up, struct tensor row_weight, struct tensor act,
                           struct tensor dact, struct tensor drow_weight) {
    const struct kernel_ops *ops = context->ops;
    if (ops->product_swiglu_backward) {
        ops->product_swiglu_backward(dy, rows, offsets, w, gate, up, row_weight, act, dact, drow_weight);
        return;
    }
    ops->swiglu_forward(gate, up, row_weight, act);
    ops->product_backward_input(dy, rows, offsets, w, dact, false);
    ops->swiglu_backward(dact, gate, up, row_weight, gate, up, drow_weight);
}
