#include "nn/exchange.h"

static void local_dispatch(void *self, const struct layer_context *context, const struct route *route,
                           struct tensor tokens, struct expert_rows *rows) {
    (void)self;
    rows->data = tokens;
    rows->rows = route->row_token;
    rows->offsets = route->offsets;
    context->ops->gather_scalars(route->weight, route->row_slot, rows->weight);
}

static void local_combine(void *self, const struct layer_context *context, const struct route *route,
                          struct tensor results, struct tensor y) {
    (void)self;
    context->ops->combine_rows(results, route->slot_row, y, true);
}

static void local_combine_backward(void *self, const struct layer_context *context, const struct route *route,
                                   struct tensor dy, struct expert_rows *drows) {
    (void)self;
    (void)context;
    drows->data = dy;
    drows->rows = route->row_token;
    drows->offsets = route->offsets;
}

static void local_dispatch_backward(void *self, const struct layer_context *context, const struct route *route,
                                    struct tensor drows, struct tensor drow_weight, struct tensor dtokens,
                                    struct tensor dweight) {
    (void)self;
    context->ops->combine_rows(drows, route->slot_row, dtokens, false);
    context->ops->gather_scalars(drow_weight, route->slot_row, dweight);
}

const struct expert_exchange_ops *expert_exchange_local(void) {
    static const struct expert_exchange_ops local = {local_dispatch, local_combine, local_combine_backward,
                                                     local_dispatch_backward};
    return &local;
}
