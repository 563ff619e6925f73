#include "model/model.h"

#include "base/memory.h"
#include "base/random.h"
#include "base/threads.h"
#include <math.h>
#include <stdlib.h>

enum { ROW_ALIGNMENT_ELEMENTS = 64, INIT_CHUNK_ELEMENTS = 1 << 16 };

static int64_t padded_elements(const struct parameter *row) {
    return (parameter_elements(row) + ROW_ALIGNMENT_ELEMENTS - 1) / ROW_ALIGNMENT_ELEMENTS * ROW_ALIGNMENT_ELEMENTS;
}

/* One flat tensor for all rows, and views into it. */
static struct tensor take_rows(struct model *model, struct arena *arena, enum dtype dtype, struct tensor *views) {
    int64_t total = 0;
    for (int i = 0; i < model->table.count; i++)
        total += padded_elements(&model->table.rows[i]);
    struct tensor flat = layer_take(arena, dtype, total, 1);
    char *next = flat.data;
    for (int i = 0; i < model->table.count; i++) {
        const struct parameter *row = &model->table.rows[i];
        views[i] = parameter_tensor(row, next, dtype);
        if (next)
            next += (size_t)padded_elements(row) * dtype_size(dtype);
    }
    return flat;
}

static void take_packed(struct model *model, const struct model_options *options, struct arena *arena) {
    for (int i = 0; i < model->table.count; i++) {
        const struct parameter *row = &model->table.rows[i];
        if (!row->is_packed)
            continue;
        const int64_t *matrix = row->shape + row->dim_count - 2;
        struct packed *packed = &model->packed[i];
        *packed = (struct packed){.dtype = options->compute,
                                  .groups = row->dim_count == 3 ? row->shape[0] : 1,
                                  .out = matrix[0],
                                  .in = matrix[1],
                                  .backward = options->training};
        packed->data = arena_take(arena, options->ops->packed_bytes(*packed));
    }
}

/* The one place that says what a model takes; run over a counting arena it is the plan. */
static void take_all(struct model *model, const struct model_options *options, struct arena *arena) {
    enum dtype real = options->real;
    struct model_memory *memory = &model->memory;
    size_t mark = arena->used;
    take_rows(model, arena, real, model->weight);
    memory->weights = arena->used - mark, mark = arena->used;
    take_packed(model, options, arena);
    memory->packed = arena->used - mark, mark = arena->used;
    if (options->training)
        model->all_gradients = take_rows(model, arena, real, model->gradient);
    memory->gradients = arena->used - mark, mark = arena->used;
    if (options->training) {
        take_rows(model, arena, real, model->moment1);
        take_rows(model, arena, real, model->moment2);
    }
    memory->moments = arena->used - mark, mark = arena->used;
    model->rope = layer_take(arena, real, options->position_count, model->config.head_dim);
    memory->tables = arena->used - mark;
    memory->total = arena->used;
}

static enum status take_views(struct tensor **views, int count) {
    TRY(memory_alloc(views, (size_t)count, sizeof **views));
    for (int i = 0; i < count; i++)
        (*views)[i] = tensor_none();
    return STATUS_OK;
}

static enum status model_prepare(struct model *model, const struct model_config *config,
                                 const struct model_options *options) {
    model->config = *config;
    model->context = (struct layer_context){options->ops, options->compute, options->real};
    model->device = options->device;
    TRY(parameter_table_init(&model->table, config));
    TRY(take_views(&model->weight, model->table.count));
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

enum status model_plan(const struct model_config *config, struct model_options options, struct model_memory *memory) {
    struct model *model;
    TRY(memory_alloc(&model, 1, sizeof *model));
    enum status status = model_prepare(model, config, &options);
    *memory = model->memory;
    model_destroy(model);
    return status;
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
};

static void init_chunk(void *context, int64_t index) {
    const struct init_task *task = context;
    int64_t end = (index + 1) * INIT_CHUNK_ELEMENTS;
    for (int64_t i = index * INIT_CHUNK_ELEMENTS; i < end && i < task->count; i++) {
        double value = task->deviation > 0 ? task->deviation * random_normal(task->seed, task->stream, (uint64_t)i) : 1;
        store_real(task->host, task->real, i, value);
    }
}

enum status model_initialize(struct model *model, uint64_t seed) {
    int64_t largest = 0;
    for (int i = 0; i < model->table.count; i++)
        if (parameter_elements(&model->table.rows[i]) > largest)
            largest = parameter_elements(&model->table.rows[i]);
    void *host;
    TRY(memory_alloc(&host, (size_t)largest, dtype_size(model->context.real)));
    for (int i = 0; i < model->table.count; i++) {
        const struct parameter *row = &model->table.rows[i];
        struct init_task task = {host, model->context.real, parameter_elements(row), row->init_deviation, seed,
                                 random_stream(row->name)};
        parallel_for((task.count + INIT_CHUNK_ELEMENTS - 1) / INIT_CHUNK_ELEMENTS, init_chunk, &task);
        model->device->copy_from_host(model->weight[i].data, host, tensor_bytes(model->weight[i]));
    }
    free(host);
    model_repack(model);
    return STATUS_OK;
}

void model_repack(struct model *model) {
    for (int i = 0; i < model->table.count; i++)
        if (model->packed[i].data)
            model->context.ops->pack(model->weight[i], model->packed[i]);
}

struct tensor model_tensor(const struct model *model, const struct tensor *array, enum parameter_role role, int block) {
    int row = parameter_find(&model->table, role, block);
    return row < 0 ? tensor_none() : array[row];
}

struct packed model_packed(const struct model *model, enum parameter_role role, int block) {
    int row = parameter_find(&model->table, role, block);
    return row < 0 ? (struct packed){0} : model->packed[row];
}
