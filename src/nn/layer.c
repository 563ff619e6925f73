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
