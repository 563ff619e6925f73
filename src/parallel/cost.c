#include "parallel/cost.h"

#include "parallel/step.h"
#include <math.h>

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
static double optimizer_bytes(const struct model *model, int group) {
    double bytes = 0;
    for (int i = 0; i < model->table.count; i++) {
        if (parameter_group(&model->table.rows[i]) != group)
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
    if (event->kind == EVENT_CLEAR)
        cost.bytes = (double)tensor_bytes(model->cleared_gradients);
    if (event->kind == EVENT_GRADIENT_NORM)
        cost.bytes = (double)tensor_bytes(model->all_gradients);
    if (event->kind == EVENT_OPTIMIZER)
        cost.bytes = optimizer_bytes(model, event->block);
    return cost;
}

bool event_is_exchange(enum event_kind kind) {
    return kind == EVENT_EXCHANGE || kind == EVENT_EXCHANGE_BACK || kind == EVENT_EXCHANGE_BACK_GRAD ||
           kind == EVENT_EXCHANGE_GRAD;
}

/* The share of tokens that have at least one of their K choices among `local` of E experts, if all sets of K are equally
 * likely: 1 - C(E - local, K) / C(E, K). */
static double share_that_meets(int64_t local, int64_t experts, int64_t choices) {
    double misses = 1;
    for (int64_t k = 0; k < choices; k++)
        misses *= fmax(0, (double)(experts - local - k)) / (double)(experts - k);
    return 1 - misses;
}

/* One row for each token and each other rank that has an expert of its choice. */
static double exchange_bytes(const struct event_sending *s) {
    const struct model *m = s->model;
    const struct mesh *mesh = &m->sharding.mesh;
    double rows = 0;
    for (int r = 0; r < mesh->size[MESH_EXPERT]; r++) {
        int64_t local = range_count(range_part(m->config.num_experts, mesh->size[MESH_EXPERT], r));
        if (r != mesh->coordinate[MESH_EXPERT])
            rows += (double)s->tokens * share_that_meets(local, m->config.num_experts, m->config.num_experts_per_tok);
    }
    return rows * (double)m->config.hidden_size * (double)dtype_size(m->context.compute);
}

double event_sent_bytes(const struct event *event, const struct event_sending *s) {
    const struct model_config *c = &s->model->config;
    int others = mesh_group_size(&s->model->sharding.mesh, RANKS_BATCH_AXES) - 1;
    switch (event->kind) {
    case EVENT_GATHER:
        return (double)traffic_bytes_of(s->traffic, event->block).gather;
    case EVENT_REDUCE:
        return (double)traffic_bytes_of(s->traffic, event->block).reduce;
    case EVENT_REPLICATE:
        return (double)traffic_bytes_of(s->traffic, event->block).replicate;
    case EVENT_COUNTS:
        return (double)(others * c->num_experts) * sizeof(int32_t);
    case EVENT_GRADIENT_NORM:
        return (double)others * (sizeof(double) * (double)step_sum_count(c) + STEP_SEAL_BYTES);
    default:
        return event_is_exchange(event->kind) && c->num_experts > 0 ? exchange_bytes(s) : 0;
    }
}
