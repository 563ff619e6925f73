#include "train/verify.h"

#include "base/memory.h"
#include "base/text.h"
#include "device/fingerprint.h"
#include <stdlib.h>
#include <string.h>

enum { KINDS = 4 };

/* Something that several ranks hold in common. */
struct item {
    const char *name, *kind; /* of the row; "" for its weight */
    struct tensor tensor;
    unsigned copy_axes; /* ranks that differ along these only hold the same */
};

struct verification {
    const struct model *model;
    struct comm *comm;   /* all ranks of the island */
    struct mesh *meshes; /* [ranks] as each of them sees it */
    struct item *items;
    int item_count;
    uint64_t *mine, *all; /* [items]; [ranks, items] */
};

/* ---- what there is to compare ------------------------------------------------------------------------------------------ */

static unsigned copy_axes(const struct model *model, const struct layout *layout) {
    unsigned axes = 0;
    for (int axis = MESH_REPLICATE; axis < MESH_AXIS_COUNT; axis++)
        if (layout->axis[axis].kind == PLACEMENT_REPLICATE && model->sharding.mesh.size[axis] > 1)
            axes |= MESH_BIT(axis);
    return axes;
}

/* At stage 3 what is gathered does not outlive its use; else it stays whole from one update to the next. */
static bool has_whole_copy(const struct model *model, int row) {
    return model->sharding.zero < 3 && !model_row_is_whole(model, row);
}

static int list_row(const struct model *model, int i, struct item items[KINDS]) {
    const struct parameter *row = &model->table.rows[i];
    struct layout own = sharding_own_layout(&model->sharding, row), compute = sharding_compute_layout(row);
    unsigned own_axes = copy_axes(model, &own), compute_axes = copy_axes(model, &compute);
    int count = 0;
    if (own_axes) {
        items[count++] = (struct item){row->name, "", model->own_weight[i], own_axes};
        items[count++] = (struct item){row->name, " (first moment)", model->moment1[i], own_axes};
        items[count++] = (struct item){row->name, " (second moment)", model->moment2[i], own_axes};
    }
    if (compute_axes && has_whole_copy(model, i))
        items[count++] = (struct item){row->name, " (the copy it computes with)", model->weight[i], compute_axes};
    return count;
}

bool verify_has_copies(const struct model *model) {
    struct item ignored[KINDS];
    int count = 0;
    for (int i = 0; i < model->table.count; i++)
        count += list_row(model, i, ignored);
    return count > 0;
}

static enum status take_memory(struct verification *v, const struct mesh *mesh) {
    size_t ranks = (size_t)v->comm->size;
    TRY(memory_alloc(&v->items, (size_t)v->model->table.count * KINDS, sizeof *v->items));
    for (int i = 0; i < v->model->table.count; i++)
        v->item_count += list_row(v->model, i, v->items + v->item_count);
    TRY(memory_alloc(&v->mine, (size_t)v->item_count, sizeof *v->mine));
    TRY(memory_alloc(&v->all, ranks * (size_t)v->item_count, sizeof *v->all));
    TRY(memory_alloc(&v->meshes, ranks, sizeof *v->meshes));
    int first = mesh_rank(mesh) - v->comm->rank; /* islands are the outermost axis */
    for (int r = 0; r < v->comm->size; r++)
        v->meshes[r] = mesh_make(mesh->size, first + r);
    return STATUS_OK;
}

static void release(struct verification *v) {
    free(v->items);
    free(v->mine);
    free(v->all);
    free(v->meshes);
}

/* ---- who is in the minority --------------------------------------------------------------------------------------------- */

static uint64_t hash_of(const struct verification *v, int rank, int item) {
    return v->all[(size_t)rank * (size_t)v->item_count + (size_t)item];
}

/* True where rank r should hold of an item what rank `other` holds. */
static bool are_equals(const struct verification *v, int item, int r, int other) {
    unsigned axes = v->items[item].copy_axes;
    return mesh_group_color(&v->meshes[r], axes) == mesh_group_color(&v->meshes[other], axes);
}

/* Equals of a rank that hold what it holds; all of them. */
struct votes {
    int same, all;
};

static struct votes count_votes(const struct verification *v, int item, int rank) {
    struct votes votes = {0, 0};
    for (int r = 0; r < v->comm->size; r++)
        if (are_equals(v, item, rank, r)) {
            votes.all++;
            votes.same += hash_of(v, r, item) == hash_of(v, rank, item);
        }
    return votes;
}

/* Each rank against the first that should hold the same: every item in one pass over the ranks. */
static bool has_difference(const struct verification *v, int item, int *first_of_color) {
    for (int r = 0; r < v->comm->size; r++)
        first_of_color[mesh_group_color(&v->meshes[r], v->items[item].copy_axes)] = -1;
    for (int r = 0; r < v->comm->size; r++) {
        int *first = &first_of_color[mesh_group_color(&v->meshes[r], v->items[item].copy_axes)];
        if (*first < 0)
            *first = r;
        if (hash_of(v, r, item) != hash_of(v, *first, item))
            return true;
    }
    return false;
}

/* A rank whose equals differ from it or among each other, lowest first. */
static int find_divided(const struct verification *v, int item) {
    for (int r = 0; r < v->comm->size; r++) {
        struct votes votes = count_votes(v, item, r);
        if (votes.same < votes.all)
            return r;
    }
    CHECK(!"equals differ");
    return 0;
}

/* ---- the line that says so ---------------------------------------------------------------------------------------------- */

enum { NAMED_MAX = 6 };

/* "rank 3 (replica 1)", "ranks 1, 5": equals of `rank` that are in the majority, or those that are not. */
static int name_ranks(const struct verification *v, int item, int rank, bool majority, struct text *out) {
    int count = 0, named[NAMED_MAX];
    for (int r = 0; r < v->comm->size; r++) {
        struct votes votes = count_votes(v, item, r);
        if (!are_equals(v, item, rank, r) || (2 * votes.same > votes.all) != majority)
            continue;
        if (count < NAMED_MAX)
            named[count] = r;
        count++;
    }
    text_add_string(out, count == 1 ? "rank " : "ranks ");
    for (int i = 0; i < count && i < NAMED_MAX; i++) {
        const struct mesh *mesh = &v->meshes[named[i]];
        text_printf(out, "%s%d", i ? ", " : "", mesh_rank(mesh));
        if (!majority && mesh->size[MESH_REPLICATE] > 1)
            text_printf(out, " (replica %d)", mesh->coordinate[MESH_REPLICATE]);
    }
    if (count > NAMED_MAX)
        text_printf(out, " and %d more", count - NAMED_MAX);
    return count;
}

static void tell_difference(const struct verification *v, int item, struct text *out) {
    int rank = find_divided(v, item), equals = count_votes(v, item, rank).all;
    const struct item *what = &v->items[item];
    int wrong = name_ranks(v, item, rank, false, out);
    if (wrong == equals) {
        text_printf(out, " hold different %s%s and cannot be told apart: the memory or processor of one is not to be trusted",
                    what->name, what->kind);
        return;
    }
    text_printf(out, " %s another %s%s than ", wrong == 1 ? "holds" : "hold", what->name, what->kind);
    name_ranks(v, item, rank, true, out);
    text_printf(out, ": %s memory or processor is not to be trusted", wrong == 1 ? "its" : "their");
}

static enum status compare(const struct verification *v, int64_t step, const char *checkpoints) {
    int *scratch, first = -1, differing = 0;
    TRY(memory_alloc(&scratch, (size_t)mesh_rank_count(&v->meshes[0]), sizeof *scratch));
    for (int i = 0; i < v->item_count; i++)
        if (has_difference(v, i, scratch) && differing++ == 0)
            first = i;
    free(scratch);
    if (differing == 0)
        return STATUS_OK;
    struct text line = {0};
    tell_difference(v, first, &line);
    if (differing > 1)
        text_printf(&line, " (so with %d more tensors)", differing - 1);
    text_printf(&line, "; the same command goes on from the newest checkpoint in %s", checkpoints);
    enum status status = status_fail(STATUS_NUMERIC, "step %lld: %s", (long long)step, text_string(&line));
    text_release(&line);
    return status;
}

enum status verify_copies(const struct model *model, struct ranks *ranks, int64_t step, const char *checkpoints) {
    struct verification v = {.model = model, .comm = &ranks->batch};
    if (!verify_has_copies(model))
        return STATUS_OK;
    enum status status = comm_agree(v.comm, take_memory(&v, &ranks->mesh));
    if (status == STATUS_OK) {
        for (int i = 0; i < v.item_count; i++)
            v.mine[i] = device_fingerprint(model->device, v.items[i].tensor.data, tensor_bytes(v.items[i].tensor));
        status = comm_share(v.comm, v.mine, (size_t)v.item_count * sizeof *v.mine, v.all);
        if (status == STATUS_OK)
            status = compare(&v, step, checkpoints);
        if (status != STATUS_PEER)
            status = comm_agree(v.comm, status);
    }
    release(&v);
    return status;
}
