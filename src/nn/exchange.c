#include "nn/experts.h"

static enum status local_announce(void *self, const struct exchange_call *call) {
    (void)self;
    (void)call;
    return STATUS_OK;
}

static enum status local_begin(void *self, const struct exchange_call *call, struct tensor tokens, int *rounds) {
    (void)self;
    (void)call;
    (void)tokens;
    *rounds = 1;
    return STATUS_OK;
}

static enum status local_dispatch(void *self, const struct exchange_call *call, int round, struct tensor tokens,
                                  struct expert_rows *rows, struct expert_saved *saved,
                                  struct expert_scratch *scratch) {
    (void)self;
    (void)round;
    (void)scratch;
    const struct route *route = call->route;
    *rows = (struct expert_rows){tokens, route->row_token, route->offsets, saved->weight};
    call->context->ops->gather_scalars(route->weight, route->row_slot, rows->weight);
    return STATUS_OK;
}

static enum status local_combine(void *self, const struct exchange_call *call, int round, struct tensor results,
                                 struct tensor y) {
    (void)self;
    (void)round;
    call->context->ops->combine_rows(results, call->route->slot_row, y, true);
    return STATUS_OK;
}

static enum status local_combine_backward(void *self, const struct exchange_call *call, int round, struct tensor dy,
                                          struct expert_rows *drows, struct expert_scratch *scratch) {
    (void)self;
    (void)round;
    (void)scratch;
    *drows = (struct expert_rows){dy, call->route->row_token, call->route->offsets, tensor_none()};
    return STATUS_OK;
}

static enum status local_dispatch_backward(void *self, const struct exchange_call *call, int round,
                                           struct tensor drows, struct tensor drow_weight, struct tensor dtokens,
                                           struct tensor dweight) {
    (void)self;
    (void)round;
    call->context->ops->combine_rows(drows, call->route->slot_row, dtokens, false);
    call->context->ops->gather_scalars(drow_weight, call->route->slot_row, dweight);
    return STATUS_OK;
}

const struct expert_exchange_ops *expert_exchange_local(void) {
    static const struct expert_exchange_ops local = {false,         local_announce,         local_begin,
                                                     local_dispatch, local_combine, local_combine_backward,
                                                     local_dispatch_backward};
    return &local;
}
