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

/* All rows are one part. */
static struct expert_rows whole(struct tensor data, const struct route *route, struct tensor weight) {
    struct expert_part part = {{0, tensor_elements(route->row_token)}, route->offsets};
    return (struct expert_rows){data, route->row_token, weight, 1, {part}};
}

static enum status local_dispatch(void *self, const struct exchange_call *call, int round, struct tensor tokens,
                                  struct expert_rows *rows, struct expert_saved *saved,
                                  struct expert_scratch *scratch) {
    (void)self;
    (void)round;
    (void)scratch;
    const struct route *route = call->route;
    *rows = whole(tokens, route, saved->weight);
    call->context->ops->gather_scalars(route->weight, route->row_slot, rows->weight);
    return STATUS_OK;
}

/* Its rows were never away, both ways. */
static enum status local_arrive(void *self, const struct exchange_call *call, int round, int part) {
    (void)self;
    (void)call;
    (void)round;
    (void)part;
    return STATUS_OK;
}

static enum status local_answer(void *self, const struct exchange_call *call, int round, int part,
                                struct tensor results) {
    (void)results;
    return local_arrive(self, call, round, part);
}

static enum status local_answer_backward(void *self, const struct exchange_call *call, int round, int part,
                                         struct tensor drows, struct tensor drow_weight) {
    (void)drows;
    (void)drow_weight;
    return local_arrive(self, call, round, part);
}

static enum status local_combine(void *self, const struct exchange_call *call, int round, struct tensor results,
                                 struct tensor base, struct tensor y) {
    const struct kernel_ops *ops = call->context->ops;
    (void)self;
    (void)round;
    if (ops->combine_rows_onto) {
        ops->combine_rows_onto(results, call->route->slot_row, base, y);
        return STATUS_OK;
    }
    ops->cast(base, y);
    ops->combine_rows(results, call->route->slot_row, y, true);
    return STATUS_OK;
}

static enum status local_combine_backward(void *self, const struct exchange_call *call, int round, struct tensor dy,
                                          struct expert_rows *drows, struct expert_scratch *scratch) {
    (void)self;
    (void)round;
    (void)scratch;
    *drows = whole(dy, call->route, tensor_none());
    return STATUS_OK;
}

static enum status local_dispatch_backward(void *self, const struct exchange_call *call, int round,
                                           struct tensor drows, struct tensor drow_weight, struct tensor dtokens,
                                           struct tensor dweight) {
    (void)self;
    (void)round;
    if (tensor_exists(dtokens))
        call->context->ops->combine_rows(drows, call->route->slot_row, dtokens, false);
    call->context->ops->gather_scalars(drow_weight, call->route->slot_row, dweight);
    return STATUS_OK;
}

const struct expert_exchange_ops *expert_exchange_local(void) {
    static const struct expert_exchange_ops local = {.brings_storage = false,
                                                     .keeps_rows = true,
                                                     .announce = local_announce,
                                                     .begin = local_begin,
                                                     .dispatch = local_dispatch,
                                                     .arrive = local_arrive,
                                                     .answer = local_answer,
                                                     .combine = local_combine,
                                                     .combine_backward = local_combine_backward,
                                                     .arrive_backward = local_arrive,
                                                     .answer_backward = local_answer_backward,
                                                     .dispatch_backward = local_dispatch_backward};
    return &local;
}
