#include "parallel/traffic.h"

#include "base/memory.h"
#include "parallel/redistribute.h"
#include <stdlib.h>

/* Invariants.
 *  1. A row that is whole here (model_row_is_whole) is in no gather. It is in a reduce only at stage 0, where the sum
 *     replaces the term; a divided row's sum is added to own_gradient, for earlier micro-batches left theirs there.
 *  2. The kind of a row, whole or divided, is the same on every rank, and so is the list of a plan's rows.
 *  3. Staging is shared by the plans of a kind; what is outside the blocks has its own for gathers, because a block's gather
 *     is under way beside it.
 */
enum kind { KIND_GATHER, KIND_REDUCE, KIND_REPLICATE, KIND_COUNT };

struct traffic {
    struct model *model;
    struct ranks *ranks;
    enum dtype gradient_wire;
    struct redistribution **plans[KIND_COUNT]; /* [L+2], by group - GROUP_FIRST; NULL where nothing moves */
    void *staging[KIND_COUNT], *staging_outside[-GROUP_FIRST]; /* by -1 - group */
    struct arena arena;
};

static int block_count(const struct traffic *t) {
    return t->model->table.block_count;
}

/* ---- plans ----------------------------------------------------------------------------------------------------------- */

static enum dtype wire_dtype(const struct traffic *t) {
    return t->model->context.real == DTYPE_F64 ? DTYPE_F64 : t->gradient_wire;
}

/* Partial between replicas, where both ends of a reduce leave the sum to be made. */
static struct layout partial_over_replicas(struct layout layout) {
    layout.axis[MESH_REPLICATE].kind = PLACEMENT_PARTIAL;
    return layout;
}

/* The row as an item of a plan of this kind; false where it is not in it. */
static bool make_item(const struct traffic *t, enum kind kind, int row, struct redistribute_item *item) {
    struct model *m = t->model;
    const struct parameter *p = &m->table.rows[row];
    const struct mesh *mesh = &m->sharding.mesh;
    struct layout own = sharding_own_layout(&m->sharding, p);
    bool whole = model_row_is_whole(m, row);
    *item = (struct redistribute_item){.dim_count = p->dim_count, .shape = {p->shape[0], p->shape[1], p->shape[2]}};
    switch (kind) {
    case KIND_GATHER:
        item->from_layout = own;
        item->to_layout = sharding_compute_layout(p);
        item->from = m->own_weight[row];
        item->to = m->weight[row];
        item->wire = m->weight[row].dtype;
        return !whole;
    case KIND_REDUCE:
        item->from_layout = sharding_gradient_layout(p);
        item->to_layout = partial_over_replicas(own);
        item->from = m->gradient[row];
        item->to = m->own_gradient[row];
        item->wire = wire_dtype(t);
        if (p->is_expert && mesh->size[MESH_SHARD] == 1) /* all of its rows came here */
            return false;
        return mesh_group_size(mesh, RANKS_SHARD_AXES) > 1;
    case KIND_REPLICATE:
        item->from_layout = partial_over_replicas(own);
        item->to_layout = own;
        item->from = item->to = m->own_gradient[row];
        item->wire = wire_dtype(t);
        return mesh->size[MESH_REPLICATE] > 1;
    case KIND_COUNT:
        break;
    }
    return false;
}

static enum status make_plan(struct traffic *t, enum kind kind, int group, struct redistribute_item *items) {
    static const unsigned axes[KIND_COUNT] = {RANKS_SHARD_AXES, RANKS_SHARD_AXES, MESH_BIT(MESH_REPLICATE)};
    int count = 0;
    for (int row = 0; row < t->model->table.count; row++)
        if (parameter_group(&t->model->table.rows[row]) == group && make_item(t, kind, row, &items[count]))
            count++;
    if (count == 0)
        return STATUS_OK;
    return redistribution_create(&t->model->sharding.mesh, axes[kind], items, count, &t->plans[kind][group - GROUP_FIRST]);
}

static enum status make_plans(struct traffic *t) {
    struct redistribute_item *items;
    TRY(memory_alloc(&items, (size_t)t->model->table.count, sizeof *items));
    enum status status = STATUS_OK;
    for (int kind = 0; kind < KIND_COUNT && status == STATUS_OK; kind++) {
        status = memory_alloc(&t->plans[kind], (size_t)block_count(t) - GROUP_FIRST, sizeof *t->plans[kind]);
        for (int group = GROUP_FIRST; group < block_count(t) && status == STATUS_OK; group++)
            status = make_plan(t, (enum kind)kind, group, items);
    }
    free(items);
    return status;
}

static size_t plan_staging_bytes(const struct traffic *t, enum kind kind, int group) {
    const struct redistribution *plan = t->plans[kind][group - GROUP_FIRST];
    return plan ? redistribution_staging_bytes(plan) : 0;
}

static void take_staging(struct traffic *t, struct arena *arena) {
    for (int kind = 0; kind < KIND_COUNT; kind++) {
        size_t most = 0;
        for (int group = kind == KIND_GATHER ? 0 : GROUP_FIRST; group < block_count(t); group++) {
            size_t bytes = plan_staging_bytes(t, (enum kind)kind, group);
            most = bytes > most ? bytes : most;
        }
        t->staging[kind] = arena_take(arena, most);
    }
    for (int group = GROUP_FIRST; group < 0; group++)
        t->staging_outside[-1 - group] = arena_take(arena, plan_staging_bytes(t, KIND_GATHER, group));
}

enum status traffic_create(struct model *model, struct ranks *ranks, enum dtype gradient_wire, struct traffic **out) {
    struct traffic *t;
    struct arena counting;
    TRY(memory_alloc(&t, 1, sizeof *t));
    *t = (struct traffic){.model = model, .ranks = ranks, .gradient_wire = gradient_wire};
    enum status status = make_plans(t);
    if (status == STATUS_OK) {
        arena_init_counting(&counting);
        take_staging(t, &counting);
        t->arena.peak = counting.used;
        if (ranks)
            status = arena_init(&t->arena, model->device, counting.used);
    }
    if (status != STATUS_OK) {
        traffic_destroy(t);
        return status;
    }
    if (ranks)
        take_staging(t, &t->arena);
    *out = t;
    return STATUS_OK;
}

void traffic_destroy(struct traffic *t) {
    if (!t)
        return;
    for (int kind = 0; kind < KIND_COUNT; kind++) {
        for (int group = GROUP_FIRST; t->plans[kind] && group < block_count(t); group++)
            redistribution_destroy(t->plans[kind][group - GROUP_FIRST]);
        free(t->plans[kind]);
    }
    arena_release(&t->arena);
    free(t);
}

/* ---- what is planned -------------------------------------------------------------------------------------------------- */

static int64_t plan_sent_bytes(const struct traffic *t, enum kind kind, int group) {
    const struct redistribution *plan = t->plans[kind][group - GROUP_FIRST];
    return plan ? redistribution_sent_bytes(plan) : 0;
}

struct traffic_bytes traffic_bytes_of(const struct traffic *t, int group) {
    return (struct traffic_bytes){plan_sent_bytes(t, KIND_GATHER, group), plan_sent_bytes(t, KIND_REDUCE, group),
                                  plan_sent_bytes(t, KIND_REPLICATE, group)};
}

int64_t traffic_staging_bytes(const struct traffic *t) {
    return (int64_t)t->arena.peak;
}

struct comm *traffic_batch_comm(const struct traffic *t) {
    return &t->ranks->batch;
}

static bool any_plan(const struct traffic *t, enum kind kind) {
    for (int group = GROUP_FIRST; group < block_count(t); group++)
        if (t->plans[kind][group - GROUP_FIRST])
            return true;
    return false;
}

bool traffic_gathers(const struct traffic *t) {
    return any_plan(t, KIND_GATHER);
}

bool traffic_reduces(const struct traffic *t) {
    return any_plan(t, KIND_REDUCE);
}

bool traffic_replicates(const struct traffic *t) {
    return any_plan(t, KIND_REPLICATE);
}

/* ---- what moves ---------------------------------------------------------------------------------------------------------- */

static enum status start(struct traffic *t, enum kind kind, int group) {
    struct redistribution *plan = t->plans[kind][group - GROUP_FIRST];
    struct comm *comm = kind == KIND_REPLICATE ? &t->ranks->replicas : &t->ranks->shards;
    void *staging = kind == KIND_GATHER && group < 0 ? t->staging_outside[-1 - group] : t->staging[kind];
    return plan ? redistribution_start(plan, comm, t->model->context.ops, staging) : STATUS_OK;
}

static enum status finish(struct traffic *t, enum kind kind, int group, bool accumulate) {
    struct redistribution *plan = t->plans[kind][group - GROUP_FIRST];
    return plan ? redistribution_finish(plan, accumulate) : STATUS_OK;
}

enum status traffic_gather_start(struct traffic *t, int group) {
    return start(t, KIND_GATHER, group);
}

enum status traffic_gather_finish(struct traffic *t, int group) {
    TRY(finish(t, KIND_GATHER, group, false));
    model_pack_gathered(t->model, group);
    return STATUS_OK;
}

enum status traffic_reduce_start(struct traffic *t, int group) {
    return start(t, KIND_REDUCE, group);
}

enum status traffic_reduce_finish(struct traffic *t, int group) {
    return finish(t, KIND_REDUCE, group, t->model->sharding.zero > 0);
}

enum status traffic_replicate_start(struct traffic *t, int group) {
    return start(t, KIND_REPLICATE, group);
}

enum status traffic_replicate_finish(struct traffic *t, int group) {
    return finish(t, KIND_REPLICATE, group, false);
}

/* At stage 3 divided rows are gathered when they are needed. */
enum status traffic_refresh_group(struct traffic *t, int group) {
    model_pack_whole(t->model, group);
    if (t->model->sharding.zero == 3)
        return STATUS_OK;
    TRY(traffic_gather_start(t, group));
    return traffic_gather_finish(t, group);
}

enum status traffic_refresh(struct traffic *t) {
    for (int group = GROUP_FIRST; group < block_count(t); group++)
        TRY(traffic_refresh_group(t, group));
    return STATUS_OK;
}
