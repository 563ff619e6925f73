#include "model/block.h"

#include "model/dims.h"

struct loss_scales model_loss_scales(const struct model *model, int64_t step_tokens, int64_t tokens_so_far) {
    const struct model_config *c = &model->config;
    double step = (double)step_tokens, so_far = (double)tokens_so_far, blocks = (double)c->num_hidden_layers;
    double balance = c->router_aux_loss_coef * (double)c->num_experts;
    /* Balance, per block: E * sum over e of (count_e / S) * (mean of prob_e); z: mean of logsumexp^2. Both are averaged
     * over the blocks; means are over the step's tokens, the shares count_e / S over those that were routed so far. */
    return (struct loss_scales){
        .token = 1 / step,
        .router = {so_far > 0 ? balance / (step * so_far * blocks) : 0, c->router_z_loss_coef / (step * blocks)},
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

/* Whether backward adds to the gradients of matrices that lie as this one does: else they hold nothing yet. */
static bool adds(const struct model *m, const struct workspace *w, enum parameter_role role, int block) {
    return !w->writes_gradients && !model_gradient_in_slot(m, parameter_find(&m->table, role, block));
}

static struct attention_gradients attention_gradients(const struct model *m, const struct workspace *w, int block) {
    return (struct attention_gradients){
        gradient(m, PARAMETER_ATTENTION_NORM, block), gradient(m, PARAMETER_QUERY_NORM, block),
        gradient(m, PARAMETER_KEY_NORM, block),       gradient(m, PARAMETER_QUERY, block),
        gradient(m, PARAMETER_KEY, block),            gradient(m, PARAMETER_VALUE, block),
        gradient(m, PARAMETER_OUTPUT, block),         adds(m, w, PARAMETER_OUTPUT, block),
    };
}

static struct expert_weights expert_weights(const struct model *m, int block) {
    return (struct expert_weights){packed(m, PARAMETER_GATE, block), packed(m, PARAMETER_UP, block),
                                   packed(m, PARAMETER_DOWN, block)};
}

static struct expert_gradients expert_gradients(const struct model *m, const struct workspace *w, int block) {
    return (struct expert_gradients){gradient(m, PARAMETER_GATE, block), gradient(m, PARAMETER_UP, block),
                                     gradient(m, PARAMETER_DOWN, block), adds(m, w, PARAMETER_GATE, block)};
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
    if (tensor_exists(w->all_balance_counts))
        m->context.ops->fill(w->all_balance_counts, 0);
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

static void count_rows(const struct model *m, struct workspace *w, int block) {
    const struct kernel_ops *ops = m->context.ops;
    struct tensor count = tensor_reshape_2d(w->blocks[block].router.route.count, 1, m->config.num_experts);
    ops->fill(w->expert_count[block], 0);
    ops->add(count, w->expert_count[block]);
    ops->add(count, w->balance_count[block]);
}

static struct exchange_call exchange_call(const struct model *m, const struct block_saved *saved) {
    return (struct exchange_call){&m->context, &saved->router.route, saved->slot, false};
}

enum status block_route_forward(const struct model *m, struct workspace *w, int block, bool with_stats) {
    struct block_saved *saved = &w->blocks[block];
    m->context.ops->rmsnorm_forward(saved->x_middle, weight(m, PARAMETER_MLP_NORM, block), m->config.rms_norm_eps,
                                    saved->mlp_normed, saved->mlp_rstd);
    if (model_is_dense(m))
        return STATUS_OK;
    struct router_dims dims = dims_router(m, row_count(w));
    struct exchange_call call = exchange_call(m, saved);
    router_forward(&m->context, &dims, weight(m, PARAMETER_ROUTER, block), saved->mlp_normed, &saved->router,
                   &w->router, with_stats ? w->stats[block] : tensor_none());
    if (with_stats && w->options.training)
        count_rows(m, w, block);
    return w->exchange->announce(w->exchange_self, &call);
}

static enum status dispatch_round(const struct model *m, struct workspace *w, int block, int round, bool inner_only) {
    struct block_saved *saved = &w->blocks[block];
    struct exchange_call call = exchange_call(m, saved);
    call.inner_only = inner_only;
    return w->exchange->dispatch(w->exchange_self, &call, round, saved->mlp_normed, &saved->rows,
                                         &saved->expert, &w->expert);
}

static enum status combine_round(const struct model *m, struct workspace *w, int block, int round) {
    struct block_saved *saved = &w->blocks[block];
    struct exchange_call call = exchange_call(m, saved);
    return w->exchange->combine(w->exchange_self, &call, round, w->expert.results, saved->x_middle, w->x[block + 1]);
}

/* The first round, where it is the only one. */
static bool has_one_round(const struct model *m, const struct workspace *w, int block) {
    return !model_is_dense(m) && w->blocks[block].rounds == 1;
}

static enum status begin_dispatch(const struct model *m, struct workspace *w, int block, bool inner_only) {
    struct block_saved *saved = &w->blocks[block];
    if (model_is_dense(m))
        return STATUS_OK;
    struct exchange_call call = exchange_call(m, saved);
    TRY(w->exchange->begin(w->exchange_self, &call, saved->mlp_normed, &saved->rounds));
    return saved->rounds == 1 ? dispatch_round(m, w, block, 0, inner_only) : STATUS_OK;
}

enum status block_dispatch(const struct model *m, struct workspace *w, int block) {
    return begin_dispatch(m, w, block, false);
}

static enum status run_experts(const struct model *m, struct workspace *w, int block, int round) {
    struct block_saved *saved = &w->blocks[block];
    struct expert_weights weights = expert_weights(m, block);
    struct exchange_call call = exchange_call(m, saved);
    for (int i = 0; i < saved->rows.part_count; i++) {
        TRY(w->exchange->arrive(w->exchange_self, &call, round, i));
        experts_forward(&m->context, &weights, &saved->rows, &saved->rows.parts[i], &saved->expert, &w->expert);
        TRY(w->exchange->answer(w->exchange_self, &call, round, i, w->expert.results));
    }
    return STATUS_OK;
}

enum status block_experts_forward(const struct model *m, struct workspace *w, int block) {
    struct block_saved *saved = &w->blocks[block];
    struct expert_weights weights = expert_weights(m, block);
    if (model_is_dense(m))
        dense_forward(&m->context, &weights, saved->mlp_normed, &saved->expert, &w->expert, saved->x_middle,
                      w->x[block + 1]);
    else if (has_one_round(m, w, block))
        return run_experts(m, w, block, 0);
    return STATUS_OK;
}

enum status block_combine(const struct model *m, struct workspace *w, int block) {
    if (model_is_dense(m))
        return STATUS_OK;
    if (has_one_round(m, w, block))
        return combine_round(m, w, block, 0);
    for (int round = 0; round < w->blocks[block].rounds; round++) {
        TRY(dispatch_round(m, w, block, round, false));
        TRY(run_experts(m, w, block, round));
        TRY(combine_round(m, w, block, round));
    }
    return STATUS_OK;
}

enum status block_forward(const struct model *m, struct workspace *w, int block, struct attention_cache *cache,
                          bool with_stats) {
    block_attention_forward(m, w, block, cache);
    TRY(block_route_forward(m, w, block, with_stats));
    TRY(block_dispatch(m, w, block));
    TRY(block_experts_forward(m, w, block));
    return block_combine(m, w, block);
}

static enum status run_experts_inner(const struct model *m, struct workspace *w, int block, int round) {
    struct block_saved *saved = &w->blocks[block];
    struct expert_weights weights = expert_weights(m, block);
    struct exchange_call call = exchange_call(m, saved);
    for (int i = 0; i < saved->rows.part_count; i++) {
        TRY(w->exchange->arrive(w->exchange_self, &call, round, i));
        experts_inner_forward(&m->context, &weights, &saved->rows, &saved->rows.parts[i], &saved->expert);
    }
    return STATUS_OK;
}

enum status block_recompute(const struct model *m, struct workspace *w, int block) {
    const struct block_saved *saved = &w->blocks[block];
    block_attention_forward(m, w, block, NULL);
    TRY(block_route_forward(m, w, block, false));
    TRY(begin_dispatch(m, w, block, true));
    if (model_is_dense(m)) {
        struct expert_weights weights = expert_weights(m, block);
        dense_inner_forward(&m->context, &weights, saved->mlp_normed, &saved->expert);
    } else if (has_one_round(m, w, block)) {
        return run_experts_inner(m, w, block, 0);
    }
    return STATUS_OK;
}

void model_head(const struct model *m, struct workspace *w, double token_scale, bool with_gradients) {
    struct head_dims dims = dims_head(m, row_count(w));
    struct head_weights weights = head_weights(m);
    struct head_gradients gradients = {gradient(m, PARAMETER_FINAL_NORM, -1), gradient(m, head_role(m), -1),
                                       adds(m, w, head_role(m), -1)};
    head_loss(&m->context, &dims, &weights, w->x[w->block_count], w->targets, token_scale, &w->head, w->loss_sum,
              w->row_loss, with_gradients ? &gradients : NULL, w->dx, w->attention.dy);
}

void model_logits(const struct model *m, struct workspace *w, int64_t count, struct tensor logits) {
    struct head_dims dims = dims_head(m, row_count(w));
    struct head_weights weights = head_weights(m);
    struct tensor x = tensor_rows(w->x[w->block_count], row_count(w) - count, count);
    head_logits(&m->context, &dims, &weights, x, &w->head, logits);
}

static struct tensor result_gradient(const struct model *m, struct workspace *w) {
    return layer_gradient_as_compute(&m->context, w->dx, w->attention.dy);
}

static enum status combine_round_backward(const struct model *m, struct workspace *w, int block, int round,
                                          struct tensor dy) {
    struct exchange_call call = exchange_call(m, &w->blocks[block]);
    return w->exchange->combine_backward(w->exchange_self, &call, round, dy, &w->drows, &w->expert);
}

static enum status run_experts_backward(const struct model *m, struct workspace *w, int block, int round) {
    struct block_saved *saved = &w->blocks[block];
    struct expert_weights weights = expert_weights(m, block);
    struct expert_gradients gradients = expert_gradients(m, w, block);
    struct exchange_call call = exchange_call(m, saved);
    gradients.accumulate |= round > 0;
    for (int i = 0; i < w->drows.part_count; i++) {
        const struct expert_part *part = &w->drows.parts[i];
        TRY(w->exchange->arrive_backward(w->exchange_self, &call, round, i));
        experts_backward_rows(&m->context, &weights, &saved->rows, &w->drows, part, &saved->expert, &w->expert, &gradients);
        TRY(w->exchange->answer_backward(w->exchange_self, &call, round, i, w->expert.drows, w->expert.drow_weight));
        experts_inner_backward(&m->context, &saved->rows, part, &saved->expert, &gradients);
        gradients.accumulate = true; /* to what the first part has written */
    }
    return STATUS_OK;
}

/* The rows' gradients are summed where those of the router and the norm are. */
static bool sums_late(const struct model *m, const struct workspace *w) {
    return !model_is_dense(m) && w->exchange->keeps_rows && layer_sums_routed(&m->context);
}

static enum status dispatch_round_backward(const struct model *m, struct workspace *w, int block, int round) {
    struct exchange_call call = exchange_call(m, &w->blocks[block]);
    return w->exchange->dispatch_backward(w->exchange_self, &call, round, w->expert.drows,
                                                  w->expert.drow_weight, sums_late(m, w) ? tensor_none() : w->dmlp,
                                                  w->router.dweight);
}

enum status block_combine_backward(const struct model *m, struct workspace *w, int block) {
    return has_one_round(m, w, block) ? combine_round_backward(m, w, block, 0, result_gradient(m, w)) : STATUS_OK;
}

enum status block_experts_backward(const struct model *m, struct workspace *w, int block) {
    struct block_saved *saved = &w->blocks[block];
    struct expert_weights weights = expert_weights(m, block);
    struct expert_gradients gradients = expert_gradients(m, w, block);
    if (model_is_dense(m))
        dense_backward(&m->context, &weights, saved->mlp_normed, result_gradient(m, w), &saved->expert, &w->expert,
                       &gradients, w->dmlp);
    else if (has_one_round(m, w, block))
        return run_experts_backward(m, w, block, 0);
    return STATUS_OK;
}

enum status block_dispatch_backward(const struct model *m, struct workspace *w, int block) {
    if (model_is_dense(m))
        return STATUS_OK;
    if (has_one_round(m, w, block))
        return dispatch_round_backward(m, w, block, 0);
    struct tensor dy = result_gradient(m, w);
    for (int round = 0; round < w->blocks[block].rounds; round++) {
        TRY(dispatch_round(m, w, block, round, true)); /* nothing was kept */
        TRY(run_experts_inner(m, w, block, round));
        TRY(combine_round_backward(m, w, block, round, dy));
        TRY(run_experts_backward(m, w, block, round));
        TRY(dispatch_round_backward(m, w, block, round));
    }
    return STATUS_OK;
}

void block_route_backward(const struct model *m, struct workspace *w, int block, struct router_loss_scales scales) {
    struct block_saved *saved = &w->blocks[block];
    struct tensor norm = weight(m, PARAMETER_MLP_NORM, block), dnorm = gradient(m, PARAMETER_MLP_NORM, block);
    bool is_late = sums_late(m, w);
    if (!model_is_dense(m)) {
        struct router_dims dims = dims_router(m, row_count(w));
        router_backward(&m->context, &dims, weight(m, PARAMETER_ROUTER, block), saved->mlp_normed, &saved->router,
                        &w->router, w->balance_count[block], scales, gradient(m, PARAMETER_ROUTER, block),
                        is_late ? tensor_none() : w->dmlp);
    }
    if (is_late) {
        struct routed_gradient from = {w->expert.drows, saved->router.route.slot_row, w->router.dlogits,
                                       weight(m, PARAMETER_ROUTER, block)};
        layer_routed_norm_backward(&m->context, from, w->dmlp, saved->x_middle, norm, saved->mlp_rstd, w->dx, dnorm,
                                   w->attention.dy);
        return;
    }
    layer_rmsnorm_backward(&m->context, w->dmlp, saved->x_middle, norm, saved->mlp_rstd, w->dx, true, dnorm, w->attention.dy);
}

void block_attention_backward(const struct model *m, struct workspace *w, int block) {
    struct attention_dims dims = dims_attention(m, w->batch, w->sequence_length);
    struct attention_weights weights = attention_weights(m, block);
    struct attention_gradients gradients = attention_gradients(m, w, block);
    attention_backward(&m->context, &dims, &weights, w->x[block], &w->blocks[block].attention, &w->attention,
                       &gradients, w->dx);
}

void model_embed_backward(const struct model *m, struct workspace *w) {
    m->context.ops->embedding_backward(w->ids, w->dx, gradient(m, PARAMETER_EMBEDDING, -1));
}
