#include "model/model.h"

#include "base/memory.h"
#include "base/random.h"
#include "base/threads.h"
#include <math.h>
#include <stdlib.h>

enum { ROW_ALIGNMENT_ELEMENTS = 64, INIT_CHUNK_ELEMENTS = 1 << 16, BLOCK_OUTSIDE_SLOT = -1 };

static int64_t padded(int64_t elements) {
    return (elements + ROW_ALIGNMENT_ELEMENTS - 1) / ROW_ALIGNMENT_ELEMENTS * ROW_ALIGNMENT_ELEMENTS;
}

bool model_row_is_whole(const struct model *model, int row) {
    return sharding_is_whole(&model->sharding, &model->table.rows[row]);
}

static bool weight_in_slot(const struct model *model, int row) {
    return model->sharding.zero == 3 && !model_row_is_whole(model, row);
}

/* Outside the blocks a gradient grows from the head to the embedding: it is whole throughout a step. */
bool model_gradient_in_slot(const struct model *model, int row) {
    return model->sharding.zero >= 2 && model->table.rows[row].block >= 0 && !model_row_is_whole(model, row);
}

bool model_gradient_is_written(const struct model *model, int row) {
    return model->table.rows[row].is_packed;
}

/* Rows 'of slot s': those of the one block whose memory all blocks of that slot share. */
static bool is_slot_block(const struct model *model, int row, int slot) {
    return model->table.rows[row].block == slot;
}

/* What rows are taken, and in which form. */
enum form { FORM_COMPUTE, FORM_OWN };

static struct tensor take_row(const struct model *model, int row, enum form form, enum dtype dtype,
                              struct arena *arena) {
    const struct parameter *p = &model->table.rows[row];
    struct layout layout = form == FORM_OWN ? sharding_own_layout(&model->sharding, p) : sharding_compute_layout(p);
    struct parameter_part part = sharding_part(&model->sharding, p, &layout);
    size_t bytes = (size_t)padded(parameter_part_elements(&part)) * dtype_size(dtype);
    void *data = form == FORM_OWN ? arena_take_blocks(arena, bytes) : arena_take(arena, bytes);
    return tensor_make(data, dtype, p->dim_count, part.shape[0], part.shape[1], part.shape[2]);
}

static struct packed take_packed(const struct model *model, const struct model_options *options, int row,
                                 struct arena *arena) {
    const struct parameter *p = &model->table.rows[row];
    struct layout layout = sharding_compute_layout(p);
    struct parameter_part part = sharding_part(&model->sharding, p, &layout);
    const int64_t *matrix = part.shape + p->dim_count - 2;
    struct packed packed = {.dtype = options->compute,
                            .groups = p->dim_count == 3 ? part.shape[0] : 1,
                            .out = matrix[0],
                            .in = matrix[1],
                            .backward = options->training};
    packed.data = arena_take(arena, options->ops->packed_bytes(packed));
    return packed;
}

/* A gathered weight that nothing but products reads is kept as it travels; norms, the router's scores and the table of
 * the embedding are read in full precision. */
static enum dtype gathered_dtype(const struct model *model, int row) {
    const struct parameter *p = &model->table.rows[row];
    bool read_by_products_only = p->is_packed && p->role != PARAMETER_EMBEDDING;
    return read_by_products_only ? model->context.compute : model->context.real;
}

/* What this rank owns of each row. */
static void take_own_weights(struct model *model, struct arena *arena) {
    for (int i = 0; i < model->table.count; i++) {
        model->own_weight[i] = take_row(model, i, FORM_OWN, model->context.real, arena);
        if (model_row_is_whole(model, i))
            model->weight[i] = model->own_weight[i];
    }
}

/* The computing form of weights that stays: below stage 3, of rows that are divided; and what products read of them. */
static void take_whole_weights(struct model *model, struct arena *arena) {
    for (int i = 0; i < model->table.count; i++)
        if (!model_row_is_whole(model, i) && !weight_in_slot(model, i))
            model->weight[i] = take_row(model, i, FORM_COMPUTE, gathered_dtype(model, i), arena);
}

static void take_whole_packed(struct model *model, const struct model_options *options, struct arena *arena) {
    for (int i = 0; i < model->table.count; i++)
        if (model->table.rows[i].is_packed && !weight_in_slot(model, i))
            model->packed[i] = take_packed(model, options, i, arena);
}

static void take_whole_gradients(struct model *model, bool written, struct arena *arena) {
    for (int i = 0; i < model->table.count; i++)
        if (!model_gradient_in_slot(model, i) && model_gradient_is_written(model, i) == written)
            model->gradient[i] = take_row(model, i, FORM_COMPUTE, model->context.real, arena);
}

static struct tensor taken_since(const struct model *model, size_t begin, const struct arena *arena) {
    size_t elements = (arena->used - begin) / dtype_size(model->context.real);
    return tensor_2d(arena->device ? arena->base + begin : NULL, model->context.real, (int64_t)elements, 1);
}

/* Gradients that last through the step, one after the other: those of whole rows, the computing form below stage 2, and
 * the own part of divided rows, to which what arrives is added. What a step clears comes first. */
static void take_gradients(struct model *model, struct arena *arena) {
    size_t begin = arena->used;
    take_whole_gradients(model, false, arena);
    for (int i = 0; i < model->table.count; i++)
        if (!model_row_is_whole(model, i))
            model->own_gradient[i] = take_row(model, i, FORM_OWN, model->context.real, arena);
    model->cleared_gradients = taken_since(model, begin, arena);
    take_whole_gradients(model, true, arena);
    model->all_gradients = taken_since(model, begin, arena);
    for (int i = 0; i < model->table.count; i++)
        if (model_row_is_whole(model, i))
            model->own_gradient[i] = model->gradient[i];
}

static void take_moments(struct model *model, struct arena *arena) {
    for (int i = 0; i < model->table.count; i++) {
        model->moment1[i] = take_row(model, i, FORM_OWN, model->context.real, arena);
        model->moment2[i] = take_row(model, i, FORM_OWN, model->context.real, arena);
    }
}

/* What block `slot` and all others of its parity compute with while they are whole. */
static void take_slot(struct model *model, const struct model_options *options, int slot, struct arena *arena) {
    for (int i = 0; i < model->table.count; i++) {
        if (!is_slot_block(model, i, slot))
            continue;
        if (weight_in_slot(model, i)) {
            model->weight[i] = take_row(model, i, FORM_COMPUTE, gathered_dtype(model, i), arena);
            if (model->table.rows[i].is_packed)
                model->packed[i] = take_packed(model, options, i, arena);
        }
        if (options->training && model_gradient_in_slot(model, i))
            model->gradient[i] = take_row(model, i, FORM_COMPUTE, model->context.real, arena);
    }
}

/* The other blocks see the memory of their slot. */
static void share_slots(struct model *model, bool training) {
    for (int i = 0; i < model->table.count; i++) {
        const struct parameter *p = &model->table.rows[i];
        if (p->block < 2)
            continue;
        int twin = parameter_find(&model->table, p->role, p->block % 2);
        if (weight_in_slot(model, i)) {
            model->weight[i] = model->weight[twin];
            model->packed[i] = model->packed[twin];
        }
        if (training && model_gradient_in_slot(model, i))
            model->gradient[i] = model->gradient[twin];
    }
}

/* The one place that says what a model takes; run over a counting arena it is the plan. */
static void take_all(struct model *model, const struct model_options *options, struct arena *arena) {
    struct model_memory *memory = &model->memory;
    size_t mark = arena->used;
    take_own_weights(model, arena);
    take_whole_weights(model, arena);
    memory->weights = arena->used - mark, mark = arena->used;
    take_whole_packed(model, options, arena);
    memory->packed = arena->used - mark, mark = arena->used;
    if (options->training)
        take_gradients(model, arena);
    memory->gradients = arena->used - mark, mark = arena->used;
    if (options->training)
        take_moments(model, arena);
    memory->moments = arena->used - mark, mark = arena->used;
    for (int slot = BLOCK_OUTSIDE_SLOT; slot < 2; slot++)
        take_slot(model, options, slot, arena);
    share_slots(model, options->training);
    memory->working = arena->used - mark, mark = arena->used;
    model->rope = layer_take(arena, options->real, options->position_count, model->config.head_dim);
    memory->tables = arena->used - mark;
    memory->total = arena->used;
}

static enum status take_views(struct tensor **views, int count) {
    TRY(memory_alloc(views, (size_t)count, sizeof **views));
    for (int i = 0; i < count; i++)
        (*views)[i] = tensor_none();
    return STATUS_OK;
}

static enum status check_limits(const struct model_config *config, const struct kernel_ops *ops) {
    if (ops->experts_most && config->num_experts > ops->experts_most)
        return status_fail(STATUS_USAGE, "the device takes models of at most %lld experts, not %lld", (long long)ops->experts_most,
                           (long long)config->num_experts);
    if (ops->head_dim_most && config->head_dim > ops->head_dim_most)
        return status_fail(STATUS_USAGE, "the device takes heads of at most %lld numbers, not %lld", (long long)ops->head_dim_most,
                           (long long)config->head_dim);
    return STATUS_OK;
}

static enum status model_prepare(struct model *model, const struct model_config *config,
                                 const struct model_options *options) {
    model->config = *config;
    model->context = (struct layer_context){options->ops, options->compute, options->real};
    model->device = options->device;
    model->sharding = options->sharding.mesh.size[0] ? options->sharding : sharding_single();
    if (options->ops)
        TRY(check_limits(config, options->ops));
    TRY(parameter_table_init(&model->table, config));
    TRY(take_views(&model->weight, model->table.count));
    TRY(take_views(&model->own_weight, model->table.count));
    TRY(take_views(&model->own_gradient, model->table.count));
    TRY(memory_alloc(&model->packed, (size_t)model->table.count, sizeof *model->packed));
    TRY(take_views(&model->gradient, model->table.count));
    TRY(take_views(&model->moment1, model->table.count));
    TRY(take_views(&model->moment2, model->table.count));
    struct arena counting;
    arena_init_counting(&counting);
    take_all(model, options, &counting);
    return STATUS_OK;
}

static void store_real(void *host, enum dtype real, int64_t index, double value) {
    if (real == DTYPE_F64)
        ((double *)host)[index] = value;
    else
        ((float *)host)[index] = (float)value;
}

/* Row t: cos(t f_j) for the P/2 frequencies f_j = theta^(-2j/P), then their sines. Source: arXiv 2104.09864. */
static enum status fill_rope(struct model *model) {
    int64_t positions = model->rope.shape[0], p = model->rope.shape[1], half = p / 2;
    void *host;
    TRY(memory_alloc(&host, (size_t)(positions * p), dtype_size(model->rope.dtype)));
    for (int64_t t = 0; t < positions; t++)
        for (int64_t j = 0; j < half; j++) {
            double angle = (double)t * pow(model->config.rope_theta, -2.0 * (double)j / (double)p);
            store_real(host, model->rope.dtype, t * p + j, cos(angle));
            store_real(host, model->rope.dtype, t * p + half + j, sin(angle));
        }
    model->device->copy_from_host(model->rope.data, host, tensor_bytes(model->rope));
    free(host);
    return STATUS_OK;
}

enum status model_create_shapes(const struct model_config *config, struct model_options options, struct model **out) {
    struct model *model;
    TRY(memory_alloc(&model, 1, sizeof *model));
    enum status status = model_prepare(model, config, &options);
    if (status == STATUS_OK)
        *out = model;
    else
        model_destroy(model);
    return status;
}

enum status model_plan(const struct model_config *config, struct model_options options, struct model_memory *memory) {
    struct model *model;
    TRY(model_create_shapes(config, options, &model));
    *memory = model->memory;
    model_destroy(model);
    return STATUS_OK;
}

static enum status model_take(struct model *model, const struct model_options *options) {
    TRY(arena_init(&model->arena, options->device, model->memory.total));
    take_all(model, options, &model->arena);
    return fill_rope(model);
}

enum status model_create(const struct model_config *config, struct model_options options, struct model **out) {
    struct model *model;
    TRY(memory_alloc(&model, 1, sizeof *model));
    enum status status = model_prepare(model, config, &options);
    if (status == STATUS_OK)
        status = model_take(model, &options);
    if (status != STATUS_OK) {
        model_destroy(model);
        return status;
    }
    *out = model;
    return STATUS_OK;
}

void model_destroy(struct model *model) {
    if (!model)
        return;
    arena_release(&model->arena);
    parameter_table_release(&model->table);
    free(model->weight);
    free(model->packed);
    free(model->gradient);
    free(model->own_weight);
    free(model->own_gradient);
    free(model->moment1);
    free(model->moment2);
    free(model);
}

struct init_task {
    void *host;
    enum dtype real;
    int64_t count;
    double deviation;
    uint64_t seed, stream;
    const struct parameter *row;
    struct parameter_part part;
};

/* The whole row's index of element i of the part. */
static uint64_t whole_index(const struct init_task *task, int64_t i) {
    const int64_t *extent = task->part.shape, *first = task->part.first;
    int64_t d2 = i % extent[2], d1 = i / extent[2] % extent[1], d0 = i / extent[2] / extent[1];
    return (uint64_t)(((d0 + first[0]) * task->row->shape[1] + d1 + first[1]) * task->row->shape[2] + d2 + first[2]);
}

static void init_chunk(void *context, int64_t index) {
    const struct init_task *task = context;
    int64_t end = (index + 1) * INIT_CHUNK_ELEMENTS;
    for (int64_t i = index * INIT_CHUNK_ELEMENTS; i < end && i < task->count; i++) {
        double value = 1;
        if (task->deviation > 0)
            value = task->deviation * random_normal(task->seed, task->stream, whole_index(task, i));
        store_real(task->host, task->real, i, value);
    }
}

int64_t model_largest_own_row(const struct model *model) {
    int64_t largest = 1;
    for (int i = 0; i < model->table.count; i++)
        if (tensor_elements(model->own_weight[i]) > largest)
            largest = tensor_elements(model->own_weight[i]);
    return largest;
}

enum status model_initialize(struct model *model, uint64_t seed) {
    void *host;
    TRY(memory_alloc(&host, (size_t)model_largest_own_row(model), dtype_size(model->context.real)));
    for (int i = 0; i < model->table.count; i++) {
        const struct parameter *row = &model->table.rows[i];
        struct layout layout = sharding_own_layout(&model->sharding, row);
        struct parameter_part part = sharding_part(&model->sharding, row, &layout);
        struct init_task task = {host, model->context.real,     parameter_part_elements(&part), row->init_deviation,
                                 seed, random_stream(row->name), row,                           part};
        parallel_for((task.count + INIT_CHUNK_ELEMENTS - 1) / INIT_CHUNK_ELEMENTS, init_chunk, &task);
        model->device->copy_from_host(model->own_weight[i].data, host, tensor_bytes(model->own_weight[i]));
    }
    free(host);
    model_repack(model);
    return STATUS_OK;
}

static void pack_group(struct model *model, int group, bool whole) {
    for (int i = 0; i < model->table.count; i++)
        if (parameter_group(&model->table.rows[i]) == group && model->packed[i].data && model_row_is_whole(model, i) == whole)
            model->context.ops->pack(model->weight[i], model->packed[i]);
}

void model_pack_whole(struct model *model, int group) {
    pack_group(model, group, true);
}

void model_pack_gathered(struct model *model, int group) {
    pack_group(model, group, false);
}

void model_repack(struct model *model) {
    for (int group = GROUP_FIRST; group < model->table.block_count; group++)
        model_pack_whole(model, group);
}

void model_clear_slot(struct model *model, int block) {
    for (int i = 0; i < model->table.count; i++)
        if (model->table.rows[i].block == block && model_gradient_in_slot(model, i) && !model_gradient_is_written(model, i))
            model->context.ops->fill(model->gradient[i], 0);
}

struct tensor model_tensor(const struct model *model, const struct tensor *array, enum parameter_role role, int block) {
    int row = parameter_find(&model->table, role, block);
    return row < 0 ? tensor_none() : array[row];
}

struct packed model_packed(const struct model *model, enum parameter_role role, int block) {
    int row = parameter_find(&model->table, role, block);
    return row < 0 ? (struct packed){0} : model->packed[row];
}
