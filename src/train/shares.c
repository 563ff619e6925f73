#include "train/shares.h"

#include "base/memory.h"
#include <stdlib.h>

/* The model's, those of the other shared part, and of an island: what is listed for one island serves all, for only the
 * stem tells them apart. */
enum { ITEMS_PER_TENSOR = 1 + 2 * CHECKPOINT_PART_ARRAYS };

enum { BLOCKS_LEAST = 16 }; /* of a rank's part, so that no part is much larger than another */

/* The axes along which all ranks hold the same rows of a part: not those of islands where it is an island's own. */
static unsigned copy_axes(const struct sharding *sharding, const struct parameter *row,
                          const struct checkpoint_part *part) {
    struct layout own = sharding_own_layout(sharding, row);
    unsigned axes = 0;
    for (int axis = part->island < 0 ? MESH_ISLAND : MESH_ISLAND + 1; axis < MESH_AXIS_COUNT; axis++)
        if (own.axis[axis].kind == PLACEMENT_REPLICATE)
            axes |= MESH_BIT(axis);
    return axes;
}

/* What is divided over `ranks` ranks: blocks, so that whoever begins at one goes on in whole ones; rows of what has few blocks. */
static uint64_t unit_of(uint64_t bytes, uint64_t row_bytes, int ranks) {
    return bytes / FILE_BLOCK_BYTES >= (uint64_t)ranks * BLOCKS_LEAST ? FILE_BLOCK_BYTES : row_bytes;
}

/* Of the rows that several ranks hold, the part that this one writes. */
static struct sharded_stretch stretch_of(const struct named_tensor *held, const struct mesh *mesh, unsigned axes,
                                         struct sharded_place place, bool rounded) {
    struct tensor whole = named_tensor_whole(held);
    uint64_t row_bytes = whole.shape[0] > 0 ? (uint64_t)tensor_bytes(whole) / (uint64_t)whole.shape[0] : 0;
    uint64_t first = place.begin + (uint64_t)held->first_row * row_bytes, bytes = (uint64_t)held->tensor.shape[0] * row_bytes;
    if (bytes == 0)
        return (struct sharded_stretch){.file = place.file, .begin = first};
    int ranks = mesh_group_size(mesh, axes);
    uint64_t unit = unit_of(bytes, row_bytes, ranks), count = (bytes + unit - 1) / unit;
    struct range mine = range_part((int64_t)count, ranks, mesh_group_rank(mesh, axes));
    uint64_t begin = (uint64_t)mine.begin * unit, end = (uint64_t)mine.end * unit;
    struct sharded_stretch all = {place.file, first, bytes, held->tensor.data, rounded};
    end = end < bytes ? end : bytes;
    return (struct sharded_stretch){place.file, first + begin, begin < end ? end - begin : 0,
                                    all.data ? sharded_data(&all, begin) : NULL, rounded};
}

/* Of one array of a part: held[] are its tensors, places[] where they begin. */
static void add_stretches(struct shares *shares, const struct model *model, const struct checkpoint_part *part,
                          const struct named_tensor *held, const struct sharded_place *places) {
    int at = 0;
    for (int i = 0; i < model->table.count; i++) {
        const struct parameter *row = &model->table.rows[i];
        unsigned axes = copy_axes(&model->sharding, row, part);
        for (int64_t k = 0; k < parameter_file_tensors(row); k++, at++)
            shares->stretches[shares->count++] =
                stretch_of(&held[at], &model->sharding.mesh, axes, places[at], part->rounded);
    }
}

/* What this rank writes of the part that was added last. */
static enum status add_mine(struct shares *shares, const struct model *model, const struct checkpoint_part *part,
                            const struct named_tensor *held, int count) {
    const struct sharded_place *places = shares->set.places + shares->set.place_count - count;
    int array_size = count / part->array_count;
    TRY(memory_resize(&shares->stretches, (size_t)(shares->count + count), sizeof *shares->stretches));
    for (int first = 0; first < count; first += array_size)
        add_stretches(shares, model, part, held + first, places + first);
    return STATUS_OK;
}

static enum status add_part(struct shares *shares, const struct model *model, const struct checkpoint_part *part,
                            uint64_t file_bytes, struct named_tensor *wholes) {
    struct named_tensor *held;
    int count;
    enum status status = checkpoint_part_tensors(model, part, &held, &count);
    for (int i = 0; i < count && status == STATUS_OK; i++) {
        wholes[i] = held[i];
        wholes[i].tensor = named_tensor_whole(&held[i]);
    }
    if (status == STATUS_OK)
        status = sharded_add(&shares->set, part->stem, wholes, count, file_bytes);
    if (status == STATUS_OK && checkpoint_part_is_of(part, model->sharding.mesh.coordinate[MESH_ISLAND]))
        status = add_mine(shares, model, part, held, count);
    free(held);
    return status;
}

static enum status add_parts(struct shares *shares, const struct model *model, const struct outer *outer, bool rounded,
                             uint64_t file_bytes, int64_t tensors) {
    struct checkpoint_form form = {checkpoint_island_count(model, outer), rounded};
    for (int64_t i = 0; i < checkpoint_part_count(form); i++) {
        struct checkpoint_part part = checkpoint_part_at(model, outer, form, i);
        int64_t first = i == 0 ? 0 : i < CHECKPOINT_SHARED_PARTS ? 1 : 1 + CHECKPOINT_PART_ARRAYS;
        TRY(add_part(shares, model, &part, file_bytes, shares->items + first * tensors));
    }
    return STATUS_OK;
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

enum status shares_init(struct shares *shares, const struct model *model, const struct outer *outer, bool rounded,
                        uint64_t file_bytes) {
    int64_t tensors = count_file_tensors(&model->table);
    *shares = (struct shares){0};
    TRY(memory_alloc(&shares->items, ITEMS_PER_TENSOR * (size_t)tensors, sizeof *shares->items));
    TRY(add_parts(shares, model, outer, rounded, file_bytes, tensors));
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
