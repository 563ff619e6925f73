#include "model/parameter.h"

#include "base/memory.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS_OUTSIDE = 3, ROWS_PER_BLOCK = 12 };

/* Dense: divided over shard and expert together. Expert: its experts over the expert axis, the rest over shard. */
static struct layout make_layout(bool is_expert) {
    struct layout layout = {0};
    layout.axis[MESH_SHARD] = (struct placement){PLACEMENT_SHARD, is_expert ? 1 : 0};
    layout.axis[MESH_EXPERT] = (struct placement){PLACEMENT_SHARD, 0};
    return layout;
}

static struct parameter *add(struct parameter_table *table, enum parameter_role role, int block, const char *suffix) {
    struct parameter *row = &table->rows[table->count++];
    *row = (struct parameter){.role = role, .block = block, .shape = {1, 1, 1}};
    if (block >= 0)
        snprintf(row->name, sizeof row->name, "model.layers.%d.%s", block, suffix);
    else
        snprintf(row->name, sizeof row->name, "%s", suffix);
    return row;
}

static void add_vector(struct parameter_table *table, enum parameter_role role, int block, const char *suffix,
                       int64_t size) {
    struct parameter *row = add(table, role, block, suffix);
    row->dim_count = 1;
    row->shape[0] = size;
    row->layout = make_layout(false);
}

static struct parameter *add_matrix(struct parameter_table *table, enum parameter_role role, int block,
                                    const char *suffix, int64_t rows, int64_t columns, double deviation) {
    struct parameter *row = add(table, role, block, suffix);
    row->dim_count = 2;
    row->shape[0] = rows;
    row->shape[1] = columns;
    row->is_matrix = true;
    row->is_packed = role != PARAMETER_ROUTER; /* the router is multiplied in full precision */
    row->init_deviation = deviation;
    row->layout = make_layout(false);
    return row;
}

static void add_experts(struct parameter_table *table, enum parameter_role role, int block, const char *suffix,
                        int64_t experts, int64_t rows, int64_t columns, double deviation) {
    struct parameter *row = add_matrix(table, role, block, suffix, rows, columns, deviation);
    row->dim_count = 3;
    row->shape[0] = experts;
    row->shape[1] = rows;
    row->shape[2] = columns;
    row->is_expert = true;
    row->layout = make_layout(true);
}

static void add_mlp(struct parameter_table *table, const struct model_config *c, int block, double deviation,
                    double residual_deviation) {
    int64_t d = c->hidden_size, i = c->intermediate_size, e = c->num_experts, f = c->moe_intermediate_size;
    if (e == 0) {
        add_matrix(table, PARAMETER_GATE, block, "mlp.gate_proj.weight", i, d, deviation);
        add_matrix(table, PARAMETER_UP, block, "mlp.up_proj.weight", i, d, deviation);
        add_matrix(table, PARAMETER_DOWN, block, "mlp.down_proj.weight", d, i, residual_deviation);
        return;
    }
    add_matrix(table, PARAMETER_ROUTER, block, "mlp.gate.weight", e, d, deviation);
    add_experts(table, PARAMETER_GATE, block, "mlp.experts.{e}.gate_proj.weight", e, f, d, deviation);
    add_experts(table, PARAMETER_UP, block, "mlp.experts.{e}.up_proj.weight", e, f, d, deviation);
    add_experts(table, PARAMETER_DOWN, block, "mlp.experts.{e}.down_proj.weight", e, d, f, residual_deviation);
}

/* Products that add to the residual stream start smaller, so that its variance does not grow with depth. */
static void add_block(struct parameter_table *table, const struct model_config *c, int block) {
    int64_t d = c->hidden_size, p = c->head_dim;
    int64_t heads = c->num_attention_heads * p, kv = c->num_key_value_heads * p;
    double deviation = c->initializer_range;
    double residual_deviation = deviation / sqrt(2.0 * (double)c->num_hidden_layers);
    add_vector(table, PARAMETER_ATTENTION_NORM, block, "input_layernorm.weight", d);
    add_matrix(table, PARAMETER_QUERY, block, "self_attn.q_proj.weight", heads, d, deviation);
    add_matrix(table, PARAMETER_KEY, block, "self_attn.k_proj.weight", kv, d, deviation);
    add_matrix(table, PARAMETER_VALUE, block, "self_attn.v_proj.weight", kv, d, deviation);
    add_vector(table, PARAMETER_QUERY_NORM, block, "self_attn.q_norm.weight", p);
    add_vector(table, PARAMETER_KEY_NORM, block, "self_attn.k_norm.weight", p);
    add_matrix(table, PARAMETER_OUTPUT, block, "self_attn.o_proj.weight", d, heads, residual_deviation);
    add_vector(table, PARAMETER_MLP_NORM, block, "post_attention_layernorm.weight", d);
    add_mlp(table, c, block, deviation, residual_deviation);
}

enum status parameter_table_init(struct parameter_table *table, const struct model_config *c) {
    *table = (struct parameter_table){.block_count = (int)c->num_hidden_layers};
    size_t rows = ROWS_OUTSIDE + (size_t)c->num_hidden_layers * ROWS_PER_BLOCK;
    TRY(memory_alloc(&table->rows, rows, sizeof *table->rows));
    struct parameter *embedding = add_matrix(table, PARAMETER_EMBEDDING, -1, "model.embed_tokens.weight", c->vocab_size,
                                             c->hidden_size, c->initializer_range);
    embedding->is_packed = c->tie_word_embeddings; /* only looked up otherwise */
    for (int block = 0; block < table->block_count; block++)
        add_block(table, c, block);
    add_vector(table, PARAMETER_FINAL_NORM, -1, "model.norm.weight", c->hidden_size);
    if (!c->tie_word_embeddings)
        add_matrix(table, PARAMETER_HEAD, -1, "lm_head.weight", c->vocab_size, c->hidden_size, c->initializer_range);
    CHECK_OP((size_t)table->count, <=, rows);
    return STATUS_OK;
}

void parameter_table_release(struct parameter_table *table) {
    free(table->rows);
    *table = (struct parameter_table){0};
}

int parameter_find(const struct parameter_table *table, enum parameter_role role, int block) {
    for (int i = 0; i < table->count; i++)
        if (table->rows[i].role == role && table->rows[i].block == block)
            return i;
    return -1;
}

int parameter_group(const struct parameter *parameter) {
    bool at_end = parameter->role == PARAMETER_FINAL_NORM || parameter->role == PARAMETER_HEAD;
    return at_end ? GROUP_HEAD : parameter->block;
}

int64_t parameter_elements(const struct parameter *parameter) {
    return parameter->shape[0] * parameter->shape[1] * parameter->shape[2];
}

struct tensor parameter_tensor(const struct parameter *p, void *data, enum dtype dtype) {
    return tensor_make(data, dtype, p->dim_count, p->shape[0], p->shape[1], p->shape[2]);
}

int64_t parameter_file_tensors(const struct parameter *parameter) {
    return parameter->is_expert ? parameter->shape[0] : 1;
}

void parameter_file_name(const struct parameter *parameter, int64_t index, char name[PARAMETER_NAME_BYTES]) {
    const char *place = strstr(parameter->name, "{e}");
    if (!place)
        snprintf(name, PARAMETER_NAME_BYTES, "%s", parameter->name);
    else
        snprintf(name, PARAMETER_NAME_BYTES, "%.*s%lld%s", (int)(place - parameter->name), parameter->name,
                 (long long)index, place + strlen("{e}"));
}

struct parameter_counts parameter_table_count(const struct parameter_table *table, const struct model_config *c) {
    struct parameter_counts counts = {0};
    for (int i = 0; i < table->count; i++) {
        const struct parameter *row = &table->rows[i];
        int64_t elements = parameter_elements(row);
        counts.total += elements;
        counts.active += row->is_expert ? elements / c->num_experts * c->num_experts_per_tok : elements;
        if (row->role == PARAMETER_EMBEDDING || row->role == PARAMETER_HEAD)
            counts.embedding += elements;
    }
    return counts;
}
