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

void layer_product_backward_input(const struct layer_context *context, struct tensor dy, struct packed w,
                                  struct tensor dx, bool accumulate) {
    context->ops->product_backward_input(dy, tensor_none(), tensor_none(), w, dx, accumulate);
}

void layer_product_backward_weight(const struct layer_context *context, struct tensor dy, struct tensor x,
                                   struct tensor dw) {
    context->ops->product_backward_weight(dy, tensor_none(), x, tensor_none(), tensor_none(), dw);
}
