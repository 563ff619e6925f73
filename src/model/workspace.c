#include "model/dims.h"

#include "base/memory.h"
#include <stdlib.h>

bool model_is_dense(const struct model *model) {
    return model->config.num_experts == 0;
}

struct attention_dims dims_attention(const struct model *model, int64_t batch, int64_t sequence_length) {
    const struct model_config *c = &model->config;
    return (struct attention_dims){batch,
                                   sequence_length,
                                   c->hidden_size,
                                   (int)c->num_attention_heads,
                                   (int)c->num_key_value_heads,
                                   (int)c->head_dim,
                                   c->rms_norm_eps,
                                   model->rope};
}

struct router_dims dims_router(const struct model *model, int64_t rows) {
    const struct model_config *c = &model->config;
    return (struct router_dims){rows, c->hidden_size, c->num_experts, c->num_experts_per_tok, c->norm_topk_prob};
}

struct expert_dims dims_expert(const struct model *model, int64_t rows) {
    const struct model_config *c = &model->config;
    if (model_is_dense(model))
        return (struct expert_dims){rows, c->hidden_size, c->intermediate_size};
    return (struct expert_dims){rows * c->num_experts_per_tok, c->hidden_size, c->moe_intermediate_size};
}

struct head_dims dims_head(const struct model *model, int64_t rows) {
    const struct model_config *c = &model->config;
    int64_t elements = model->context.ops ? model->context.ops->logits_elements : 0;
    return (struct head_dims){rows, c->hidden_size, c->vocab_size, head_chunk_rows(rows, c->vocab_size, elements),
                              c->rms_norm_eps};
}

static void take_block(struct workspace *w, const struct model *model, int block, struct arena *arena) {
    const struct layer_context *context = &model->context;
    struct block_saved *saved = &w->blocks[block];
    int64_t rows = w->batch * w->sequence_length, d = model->config.hidden_size;
    bool is_dense = model_is_dense(model);
    struct attention_dims attention = dims_attention(model, w->batch, w->sequence_length);
    struct expert_dims expert = dims_expert(model, rows);
    saved->slot = block;
    attention_saved_take(&saved->attention, context, &attention, arena);
    saved->x_middle = layer_take(arena, context->real, rows, d);
    saved->mlp_normed = layer_take(arena, context->compute, rows, d);
    saved->mlp_rstd = layer_take(arena, context->real, rows, 1);
    if (!is_dense) {
        struct router_dims router = dims_router(model, rows);
        router_saved_take(&saved->router, context, &router, arena);
    }
    if (is_dense || !w->exchange->brings_storage)
        expert_saved_take(&saved->expert, context, &expert, is_dense, arena);
}

static void take_activations(struct workspace *w, const struct model *model, int64_t rows, struct arena *arena) {
    int64_t d = model->config.hidden_size;
    bool share = w->options.recompute || !w->options.training;
    for (int i = 0; i <= w->block_count; i++) /* without backward two streams take turns */
        w->x[i] = !w->options.training && i >= 2 ? w->x[i - 2] : layer_take(arena, model->context.real, rows, d);
    for (int i = 0; i < w->block_count; i++) {
        if (share && i > 0)
            w->blocks[i] = w->blocks[0];
        else
            take_block(w, model, i, arena);
    }
}

static void take_scratch(struct workspace *w, const struct model *model, int64_t rows, struct arena *arena) {
    const struct layer_context *context = &model->context;
    int64_t d = model->config.hidden_size;
    struct attention_dims attention = dims_attention(model, w->batch, w->sequence_length);
    struct expert_dims expert = dims_expert(model, rows);
    struct head_dims head = dims_head(model, rows);
    if (!model_is_dense(model)) {
        struct router_dims router = dims_router(model, rows);
        router_scratch_take(&w->router, context, &router, arena);
    }
    if (model_is_dense(model) || !w->exchange->brings_storage)
        expert_scratch_take(&w->expert, context, &expert, model_is_dense(model), arena);
    head_scratch_take(&w->head, context, &head, arena);
    w->row_loss = layer_take(arena, context->real, rows, 1);
    if (!w->options.training)
        return;
    attention_scratch_take(&w->attention, context, &attention, arena);
    w->dmlp = layer_take(arena, context->real, rows, d);
    w->dx = layer_take(arena, context->real, rows, d);
}

static void take_counts(struct workspace *w, const struct model *model, struct arena *arena) {
    bool is_taken = w->options.training && !model_is_dense(model);
    struct tensor local = tensor_none();
    w->all_balance_counts = tensor_none();
    if (is_taken) {
        local = layer_take(arena, DTYPE_I32, w->block_count, model->config.num_experts);
        w->all_balance_counts = layer_take(arena, DTYPE_I32, w->block_count, model->config.num_experts);
    }
    for (int i = 0; i < w->block_count; i++) {
        w->expert_count[i] = is_taken ? tensor_rows(local, i, 1) : tensor_none();
        w->balance_count[i] = is_taken ? tensor_rows(w->all_balance_counts, i, 1) : tensor_none();
    }
}

static void take_sums(struct workspace *w, const struct model *model, struct arena *arena) {
    int64_t stat_count = 2 + 2 * model->config.num_experts;
    w->loss_sum = layer_take(arena, DTYPE_F64, 1, 1);
    w->all_stats = tensor_none();
    if (!model_is_dense(model))
        w->all_stats = layer_take(arena, DTYPE_F64, w->block_count, stat_count);
    for (int i = 0; i < w->block_count; i++)
        w->stats[i] = model_is_dense(model) ? tensor_none() : tensor_rows(w->all_stats, i, 1);
    take_counts(w, model, arena);
}

/* The one place that says what a workspace takes. */
static void take_all(struct workspace *w, const struct model *model, struct arena *arena) {
    int64_t rows = w->batch * w->sequence_length;
    take_sums(w, model, arena); /* first: the same place, and so the same sums, in every layout */
    w->ids = layer_take(arena, DTYPE_I32, rows, 1);
    w->targets = layer_take(arena, DTYPE_I32, rows, 1);
    take_activations(w, model, rows, arena);
    w->memory.activations = arena->used;
    take_scratch(w, model, rows, arena);
    w->memory.scratch = arena->used - w->memory.activations;
    w->memory.total = arena->used;
}

static enum status prepare(struct workspace *w, const struct model *model, struct workspace_options options,
                           const struct expert_exchange_ops *exchange) {
    w->options = options;
    w->exchange = exchange;
    w->block_count = (int)model->config.num_hidden_layers;
    w->batch = options.batch;
    w->sequence_length = options.sequence_length;
    TRY(memory_alloc(&w->x, (size_t)w->block_count + 1, sizeof *w->x));
    TRY(memory_alloc(&w->blocks, (size_t)w->block_count, sizeof *w->blocks));
    TRY(memory_alloc(&w->stats, (size_t)w->block_count, sizeof *w->stats));
    TRY(memory_alloc(&w->expert_count, (size_t)w->block_count, sizeof *w->expert_count));
    TRY(memory_alloc(&w->balance_count, (size_t)w->block_count, sizeof *w->balance_count));
    struct arena counting;
    arena_init_counting(&counting);
    take_all(w, model, &counting);
    return STATUS_OK;
}

enum status workspace_plan(const struct model *model, struct workspace_options options,
                           const struct expert_exchange_ops *exchange, struct workspace_memory *memory) {
    struct workspace *w;
    TRY(memory_alloc(&w, 1, sizeof *w));
    enum status status = prepare(w, model, options, exchange ? exchange : expert_exchange_local());
    *memory = w->memory;
    workspace_destroy(w);
    return status;
}

enum status workspace_plan_config(const struct model_config *config, const struct kernel_ops *ops, enum dtype compute,
                                  struct workspace_options options, struct workspace_memory *memory) {
    /* Sizes follow from the configuration and the dtypes; no tensor of this model is ever touched. */
    struct model shape_only = {.config = *config, .context = {.ops = ops, .compute = compute, .real = DTYPE_F32}};
    shape_only.rope = tensor_2d(NULL, DTYPE_F32, 0, config->head_dim);
    return workspace_plan(&shape_only, options, NULL, memory);
}

enum status workspace_create(const struct model *model, struct workspace_options options, struct workspace **out) {
    return workspace_create_exchanging(model, options, expert_exchange_local(), NULL, out);
}

enum status workspace_create_exchanging(const struct model *model, struct workspace_options options,
                                        const struct expert_exchange_ops *exchange, void *exchange_self,
                                        struct workspace **out) {
    struct workspace *w;
    TRY(memory_alloc(&w, 1, sizeof *w));
    enum status status = prepare(w, model, options, exchange);
    w->exchange_self = exchange_self;
    if (status == STATUS_OK)
        status = arena_init(&w->arena, model->device, w->memory.total);
    if (status != STATUS_OK) {
        workspace_destroy(w);
        return status;
    }
    take_all(w, model, &w->arena);
    *out = w;
    return STATUS_OK;
}

void workspace_destroy(struct workspace *w) {
    if (!w)
        return;
    arena_release(&w->arena);
    free(w->x);
    free(w->blocks);
    free(w->stats);
    free(w->expert_count);
    free(w->balance_count);
    free(w);
}

void workspace_shape(struct workspace *w, const struct model *model, int64_t batch, int64_t sequence_length) {
    if (batch == w->batch && sequence_length == w->sequence_length)
        return;
    CHECK_OP(batch * sequence_length, <=, w->options.batch * w->options.sequence_length);
    struct workspace_memory largest = w->memory;
    w->batch = batch;
    w->sequence_length = sequence_length;
    arena_rewind(&w->arena, 0);
    take_all(w, model, &w->arena);
    w->memory = largest;
}
