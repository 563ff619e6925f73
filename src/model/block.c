#include "model/block.h"

#include "model/dims.h"

struct loss_scales model_loss_scales(const struct model *model, int64_t rows, int64_t micro_batches) {
    const struct model_config *c = &model->config;
    double s = (double)rows, blocks = (double)c->num_hidden_layers, parts = (double)micro_batches;
    /* Balance, per block: E * sum over e of (count_e / S) * (mean of prob_e); z: mean of logsumexp^2. Both are averaged
     * over the blocks and the micro-batches. */
    return (struct loss_scales){
        .token = 1 / (s * parts),
        .router = {c->router_aux_loss_coef * (double)c->num_experts / (s * s * blocks * parts),
                   c->router_z_loss_coef / (s * blocks * parts)},
    };
}

static struct tensor weight(const struct model *m, enum parameter_role role, int block) {
    return model_tensor(m, m->weight, role, block);
}

static struct packed packed(const struct model *m, enum parameter_role role, int block) {
    return model_packed(m, role, block);
}

static struct tensor gradient(const struct model *m, enum parameter_role role, int block) {
    return model_tensor(m, m->gradient, role, block);
}

static struct attention_weights attention_weights(const struct model *m, int block) {
    return (struct attention_weights){
        weight(m, PARAMETER_ATTENTION_NORM, block), weight(m, PARAMETER_QUERY_NORM, block),
        weight(m, PARAMETER_KEY_NORM, block),       packed(m, PARAMETER_QUERY, block),
        packed(m, PARAMETER_KEY, block),              packed(m, PARAMETER_VALUE, block),
        packed(m, PARAMETER_OUTPUT, block),
    };
}

static struct attention_gradients attention_gradients(const struct model *m, int block) {
    return (struct attention_gradients){
        gradient(m, PARAMETER_ATTENTION_NORM, block), gradient(m, PARAMETER_QUERY_NORM, block),
        gradient(m, PARAMETER_KEY_NORM, block),       gradient(m, PARAMETER_QUERY, block),
        gradient(m, PARAMETER_KEY, block),            gradient(m, PARAMETER_VALUE, block),
        gradient(m, PARAMETER_OUTPUT, block),
    };
}

static struct expert_weights expert_weights(const struct model *m, int block) {
    return (struct expert_weights){packed(m, PARAMETER_GATE, block), packed(m, PARAMETER_UP, block),
                                   packed(m, PARAMETER_DOWN, block)};
}

static struct expert_gradients expert_gradients(const struct model *m, int block) {
    return (struct expert_gradients){gradient(m, PARAMETER_GATE, block), gradient(m, PARAMETER_UP, block),
                                     gradient(m, PARAMETER_DOWN, block)};
}

/* The head's row of the table, or the embedding's where they are tied. */
static enum parameter_role head_role(const struct model *m) {
    return m->config.tie_word_embeddings ? PARAMETER_EMBEDDING : PARAMETER_HEAD;
}

static struct head_weights head_weights(const struct model *m) {
    return (struct head_weights){weight(m, PARAMETER_FINAL_NORM, -1), packed(m, head_role(m), -1)};
}

static int64_t row_count(const struct workspace *w) {
    return w->batch * w->sequence_length;
}

void model_clear_sums(const struct model *m, struct workspace *w) {
    m->context.ops->fill(w->loss_sum, 0);
    if (tensor_exists(w->all_stats))
        m->context.ops->fill(w->all_stats, 0);
}

void model_embed_forward(const struct model *m, struct workspace *w) {
    m->context.ops->embedding_forward(w->ids, weight(m, PARAMETER_EMBEDDING, -1), w->x[0]);
}

void block_attention_forward(const struct model *m, struct workspace *w, int block, struct attention_cache *cache) {
    struct attention_dims dims = dims_attention(m, w->batch, w->sequence_length);
    struct attention_weights weights = attention_weights(m, block);
    struct block_saved *saved = &w->blocks[block];
    attention_forward(&m->context, &dims, &weights, w->x[block], &saved->attention, cache, saved->x_middle);
}

void block_route_forward(const struct model *m, struct workspace *w, int block, bool with_stats) {
    struct block_saved *saved = &w->blocks[block];
    m->context.ops->rmsnorm_forward(saved->x_middle, weight(m, PARAMETER_MLP_NORM, block), m->config.rms_norm_eps,
                                    saved->mlp_normed, saved->mlp_rstd);
    if (model_is_dense(m))
        return;
    struct router_dims dims = dims_router(m, row_count(w));
    router_forward(&m->context, &dims, weight(m, PARAMETER_ROUTER, block), saved->mlp_normed, &saved->router,
                   &w->router, with_stats ? w->stats[block] : tensor_none());
}

void block_dispatch(const struct model *m, struct workspace *w, int block) {
    struct block_saved *saved = &w->blocks[block];
    if (!model_is_dense(m))
        w->exchange->dispatch(w->exchange_self, &m->context, &saved->router.route, saved->mlp_normed, &saved->rows);
}

void block_experts_forward(const struct model *m, struct workspace *w, int block) {
    struct block_saved *saved = &w->blocks[block];
    struct expert_weights weights = expert_weights(m, block);
    m->context.ops->cast(saved->x_middle, w->x[block + 1]);
    if (model_is_dense(m))
        dense_forward(&m->context, &weights, saved->mlp_normed, &saved->expert, &w->expert, w->x[block + 1]);
    else
        experts_forward(&m->context, &weights, &saved->rows, &saved->expert, &w->expert);
}

void block_combine(const struct model *m, struct workspace *w, int block) {
    if (!model_is_dense(m))
        w->exchange->combine(w->exchange_self, &m->context, &w->blocks[block].router.route, w->expert.results,
                             w->x[block + 1]);
}

void block_forward(const struct model *m, struct workspace *w, int block, struct attention_cache *cache,
                   bool with_stats) {
    block_attention_forward(m, w, block, cache);
    block_route_forward(m, w, block, with_stats);
    block_dispatch(m, w, block);
    block_experts_forward(m, w, block);
    block_combine(m, w, block);
}

void block_recompute(const struct model *m, struct workspace *w, int block) {
    const struct block_saved *saved = &w->blocks[block];
    struct expert_weights weights = expert_weights(m, block);
    block_attention_forward(m, w, block, NULL);
    block_route_forward(m, w, block, false);
    block_dispatch(m, w, block);
    if (model_is_dense(m))
        dense_inner_forward(&m->context, &weights, saved->mlp_normed, &saved->expert);
    else
        experts_inner_forward(&m->context, &weights, &saved->rows, &saved->expert);
}

void model_head(const struct model *m, struct workspace *w, double token_scale, bool with_gradients) {
    struct head_dims dims = dims_head(m, row_count(w));
    struct head_weights weights = head_weights(m);
    struct head_gradients gradients = {gradient(m, PARAMETER_FINAL_NORM, -1), gradient(m, head_role(m), -1)};
    head_loss(&m->context, &dims, &weights, w->x[w->block_count], w->targets, token_scale, &w->head, w->loss_sum,
              w->row_loss, with_gradients ? &gradients : NULL, w->dx);
}

void model_logits(const struct model *m, struct workspace *w, int64_t count, struct tensor logits) {
    struct head_dims dims = dims_head(m, row_count(w));
    struct head_weights weights = head_weights(m);
    struct tensor x = tensor_rows(w->x[w->block_count], row_count(w) - count, count);
    head_logits(&m->context, &dims, &weights, x, &w->head, logits);
}

void block_combine_backward(const struct model *m, struct workspace *w, int block) {
    if (model_is_dense(m))
        return;
    struct tensor dy = layer_as_compute(&m->context, w->dx, w->attention.dy);
    w->exchange->combine_backward(w->exchange_self, &m->context, &w->blocks[block].router.route, dy, &w->drows);
}

void block_experts_backward(const struct model *m, struct workspace *w, int block) {
    struct block_saved *saved = &w->blocks[block];
    struct expert_weights weights = expert_weights(m, block);
    struct expert_gradients gradients = expert_gradients(m, block);
    if (!model_is_dense(m)) {
        experts_backward(&m->context, &weights, &saved->rows, &w->drows, &saved->expert, &w->expert, &gradients);
        return;
    }
    struct tensor dy = layer_as_compute(&m->context, w->dx, w->attention.dy);
    dense_backward(&m->context, &weights, saved->mlp_normed, dy, &saved->expert, &w->expert, &gradients, w->dmlp);
}

void block_dispatch_backward(const struct model *m, struct workspace *w, int block) {
    if (!model_is_dense(m))
        w->exchange->dispatch_backward(w->exchange_self, &m->context, &w->blocks[block].router.route, w->expert.drows,
                                       w->expert.drow_weight, w->dmlp, w->router.dweight);
}

void block_route_backward(const struct model *m, struct workspace *w, int block, struct router_loss_scales scales) {
    struct block_saved *saved = &w->blocks[block];
    if (!model_is_dense(m)) {
        struct router_dims dims = dims_router(m, row_count(w));
        router_backward(&m->context, &dims, weight(m, PARAMETER_ROUTER, block), saved->mlp_normed, &saved->router,
                        &w->router, scales, gradient(m, PARAMETER_ROUTER, block), w->dmlp);
    }
    m->context.ops->rmsnorm_backward(w->dmlp, saved->x_middle, weight(m, PARAMETER_MLP_NORM, block), saved->mlp_rstd,
                                     w->dx, true, gradient(m, PARAMETER_MLP_NORM, block));
}

void block_attention_backward(const struct model *m, struct workspace *w, int block) {
    struct attention_dims dims = dims_attention(m, w->batch, w->sequence_length);
    struct attention_weights weights = attention_weights(m, block);
    struct attention_gradients gradients = attention_gradients(m, block);
    attention_backward(&m->context, &dims, &weights, w->x[block], &w->blocks[block].attention, &w->attention,
                       &gradients, w->dx);
}

void model_embed_backward(const struct model *m, struct workspace *w) {
    m->context.ops->embedding_backward(w->ids, w->dx, gradient(m, PARAMETER_EMBEDDING, -1));
}
