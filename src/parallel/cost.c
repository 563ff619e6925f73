#include "parallel/cost.h"

/* Of one event, per token; see model_forward_operations. */
static double operations_per_token(enum event_kind kind, const struct model_operations *forward) {
    switch (kind) {
    case EVENT_ATTENTION:
        return forward->attention;
    case EVENT_ROUTE:
        return forward->route;
    case EVENT_EXPERTS:
        return forward->experts;
    case EVENT_RECOMPUTE:
        return forward->recompute;
    case EVENT_HEAD: /* forward and backward */
        return 3 * forward->head;
    case EVENT_EXPERTS_GRAD:
        return 2 * forward->experts;
    case EVENT_ROUTE_GRAD:
        return 2 * forward->route;
    case EVENT_ATTENTION_GRAD:
        return 2 * forward->attention;
    default:
        return 0;
    }
}

/* The optimizer reads and writes the weight and two moments, reads the gradient and writes what products read. */
static double optimizer_bytes(const struct model *model, int block) {
    double bytes = 0;
    for (int i = 0; i < model->table.count; i++) {
        if (model->table.rows[i].block != block)
            continue;
        bytes += 2 * (double)(tensor_bytes(model->weight[i]) + tensor_bytes(model->moment1[i]) +
                              tensor_bytes(model->moment2[i])) +
                 (double)tensor_bytes(model->gradient[i]);
        if (model->packed[i].data)
            bytes += (double)model->context.ops->packed_bytes(model->packed[i]);
    }
    return bytes;
}

struct event_cost event_cost(const struct event *event, const struct model *model, const struct workspace *workspace) {
    struct model_operations forward = model_forward_operations(&model->config, workspace->sequence_length);
    double tokens = (double)(workspace->batch * workspace->sequence_length);
    struct event_cost cost = {.operations = tokens * operations_per_token(event->kind, &forward)};
    if (event->kind == EVENT_CLEAR || event->kind == EVENT_GRADIENT_NORM)
        cost.bytes = (double)tensor_bytes(model->all_gradients);
    if (event->kind == EVENT_OPTIMIZER)
        cost.bytes = optimizer_bytes(model, event->block);
    return cost;
}
