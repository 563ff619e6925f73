#include "train/shares.h"

#include "base/memory.h"
#include "model/names.h"
#include <stdlib.h>
#include <string.h>

/* Rows of the model's table under one prefix. */
struct shares_array {
    const struct tensor *own;
    const char *prefix;
};

/* The axes along which all ranks hold the same part of a row. */
static unsigned copy_axes(const struct sharding *sharding, const struct parameter *row) {
    struct layout own = sharding_own_layout(sharding, row);
    unsigned axes = 0;
    for (int axis = 0; axis < MESH_AXIS_COUNT; axis++)
        if (own.axis[axis].kind == PLACEMENT_REPLICATE)
            axes |= MESH_BIT(axis);
    return axes;
}

/* Of the rows that several ranks hold, those that this one writes. */
static struct sharded_stretch stretch_of(const struct named_tensor *held, const struct mesh *mesh, unsigned axes,
                                         struct sharded_place place) {
    struct tensor whole = named_tensor_whole(held);
    struct range rows = range_part(held->tensor.shape[0], mesh_group_size(mesh, axes), mesh_group_rank(mesh, axes));
    uint64_t row_bytes = whole.shape[0] > 0 ? (uint64_t)tensor_bytes(whole) / (uint64_t)whole.shape[0] : 0;
    const char *data = held->tensor.data;
    return (struct sharded_stretch){place.file, place.begin + (uint64_t)(held->first_row + rows.begin) * row_bytes,
                                    (uint64_t)range_count(rows) * row_bytes,
                                    data ? data + (uint64_t)rows.begin * row_bytes : NULL};
}

static void add_stretches(struct shares *shares, const struct model *model, const struct named_tensor *held,
                          int first_place) {
    int at = 0;
    for (int i = 0; i < model->table.count; i++) {
        const struct parameter *row = &model->table.rows[i];
        unsigned axes = copy_axes(&model->sharding, row);
        for (int64_t k = 0; k < parameter_file_tensors(row); k++, at++)
            shares->stretches[shares->count++] =
                stretch_of(&held[at], &model->sharding.mesh, axes, shares->set.places[first_place + at]);
    }
}

/* The tensors of some arrays, as held here in `held` and whole in shares->items from `first` on. */
static enum status name_arrays(struct shares *shares, const struct model *model, const struct shares_array *arrays,
                               int array_count, struct named_tensor **held, int *count) {
    int before = 0;
    *held = NULL;
    for (int a = 0; a < array_count; a++) {
        struct named_tensor *items;
        TRY(model_name_tensors(model, arrays[a].own, arrays[a].prefix, &items, count));
        enum status status = memory_resize(held, (size_t)(before + *count), sizeof **held);
        if (status == STATUS_OK)
            memcpy(*held + before, items, (size_t)*count * sizeof *items);
        free(items);
        TRY(status);
        before += *count;
    }
    *count = before;
    return memory_resize(&shares->stretches, (size_t)(shares->count + before), sizeof *shares->stretches);
}

static enum status add_group(struct shares *shares, const struct model *model, const char *stem,
                             const struct shares_array *arrays, int array_count, uint64_t file_bytes,
                             struct named_tensor *wholes) {
    struct named_tensor *held;
    int count, first_place = shares->set.place_count;
    enum status status = name_arrays(shares, model, arrays, array_count, &held, &count);
    for (int i = 0; i < count && status == STATUS_OK; i++) {
        wholes[i] = held[i];
        wholes[i].tensor = named_tensor_whole(&held[i]);
    }
    if (status == STATUS_OK)
        status = sharded_add(&shares->set, stem, wholes, count, file_bytes);
    for (int first = 0; first < count && status == STATUS_OK; first += count / array_count)
        add_stretches(shares, model, held + first, first_place + first);
    free(held);
    return status;
}

static enum status add_headers(struct shares *shares) {
    TRY(memory_resize(&shares->stretches, (size_t)(shares->count + shares->set.file_count), sizeof *shares->stretches));
    sharded_headers(&shares->set, shares->stretches + shares->count);
    shares->count += shares->set.file_count;
    return STATUS_OK;
}

static int64_t count_file_tensors(const struct parameter_table *table) {
    int64_t count = 0;
    for (int i = 0; i < table->count; i++)
        count += parameter_file_tensors(&table->rows[i]);
    return count;
}

enum status shares_init(struct shares *shares, const struct model *model, uint64_t file_bytes) {
    const struct shares_array weights[] = {{model->own_weight, ""}};
    const struct shares_array moments[] = {{model->moment1, "m."}, {model->moment2, "v."}};
    int64_t tensors = count_file_tensors(&model->table);
    *shares = (struct shares){0};
    TRY(memory_alloc(&shares->items, 3 * (size_t)tensors, sizeof *shares->items));
    TRY(add_group(shares, model, "model", weights, 1, file_bytes, shares->items));
    TRY(add_group(shares, model, "training/optimizer", moments, 2, file_bytes, shares->items + tensors));
    if (mesh_rank(&model->sharding.mesh) == 0)
        TRY(add_headers(shares));
    shares->count = sharded_sort(shares->stretches, shares->count);
    for (int i = 0; i < shares->count; i++)
        shares->bytes += shares->stretches[i].bytes;
    return STATUS_OK;
}

void shares_release(struct shares *shares) {
    sharded_release(&shares->set);
    free(shares->items);
    free(shares->stretches);
    *shares = (struct shares){0};
}
