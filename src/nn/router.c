#include "nn/router.h"

static struct tensor take_index(struct arena *arena, int64_t rows, int64_t columns) {
    return layer_take(arena, DTYPE_I32, rows, columns);
}

void router_saved_take(struct router_saved *saved, const struct layer_context *context,
                       const struct router_dims *dims, struct arena *arena) {
    int64_t n = dims->rows * dims->choice_count;
    saved->logits = layer_take(arena, context->real, dims->rows, dims->expert_count);
    saved->prob = layer_take(arena, context->real, dims->rows, dims->expert_count);
    saved->route = (struct route){
        .expert = take_index(arena, dims->rows, dims->choice_count),
        .weight = layer_take(arena, context->real, dims->rows, dims->choice_count),
        .count = take_index(arena, dims->expert_count, 1),
        .offsets = take_index(arena, dims->expert_count + 1, 1),
        .row_slot = take_index(arena, n, 1),
        .row_token = take_index(arena, n, 1),
        .slot_row = take_index(arena, dims->rows, dims->choice_count),
    };
}

/* Shapes alone may be planned without a table of operations. */
static bool reads_any(const struct layer_context *context) {
    return context->ops && context->ops->gemm_mixes_dtypes;
}

void router_scratch_take(struct router_scratch *scratch, const struct layer_context *context,
                         const struct router_dims *dims, struct arena *arena) {
    scratch->x = tensor_none();
    if (context->compute != context->real && !reads_any(context))
        scratch->x = layer_take(arena, context->real, dims->rows, dims->width);
    scratch->dweight = layer_take(arena, context->real, dims->rows, dims->choice_count);
    scratch->dlogits = layer_take(arena, context->real, dims->rows, dims->expert_count);
}

/* Scores are computed in full precision: rounding there flips choices. */
static struct tensor as_real(const struct layer_context *context, struct tensor x,
                             const struct router_scratch *scratch) {
    if (x.dtype == context->real || reads_any(context))
        return x;
    context->ops->cast(x, scratch->x);
    return scratch->x;
}

void router_forward(const struct layer_context *context, const struct router_dims *dims, struct tensor weight,
                    struct tensor x, struct router_saved *saved, const struct router_scratch *scratch,
                    struct tensor stats) {
    const struct kernel_ops *ops = context->ops;
    struct route *route = &saved->route;
    ops->gemm(as_real(context, x, scratch), false, weight, true, saved->logits, false);
    ops->router_topk_forward(saved->logits, dims->normalize, saved->prob, route->expert, route->weight);
    ops->route_sort(route->expert, route->count, route->offsets, route->row_slot, route->row_token, route->slot_row);
    if (tensor_exists(stats))
        ops->router_stats(saved->logits, saved->prob, route->expert, stats);
}

void router_backward(const struct layer_context *context, const struct router_dims *dims, struct tensor weight,
                     struct tensor x, const struct router_saved *saved, const struct router_scratch *scratch,
                     struct tensor count, struct router_loss_scales scales, struct tensor dgradient,
                     struct tensor dx) {
    const struct kernel_ops *ops = context->ops;
    const struct route *route = &saved->route;
    ops->router_topk_backward(scratch->dweight, saved->logits, saved->prob, route->expert, route->weight,
                              dims->normalize, count, scales, scratch->dlogits);
    ops->gemm(scratch->dlogits, true, as_real(context, x, scratch), false, dgradient, true);
    if (tensor_exists(dx))
        ops->gemm(scratch->dlogits, false, weight, false, dx, true);
}
