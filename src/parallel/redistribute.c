/* Invariants:
 *  1. A stage is one exchange. An item whose terms are summed for several ranks has two: the first leaves this rank's
 *     share of the sum in `middle`, a tensor of the wire's dtype in the staging memory; the second gathers the shares.
 *     All others have the first only.
 *  2. One side of a stage gives every rank one box of an item; so at most one box of it passes from one rank to another.
 *  3. Sender and receiver list the boxes that pass between them in the same order, widest wire first (all are aligned
 *     then), so the bytes need no description.
 *  4. Staging memory: the middles, then what the first stage sends and receives, then the same of the second. The
 *     second lies over the first where nothing of the first is needed when the second starts.
 */
#include "parallel/redistribute.h"

#include "base/log.h"
#include "base/memory.h"
#include <stdlib.h>
#include <string.h>

enum { STAGES_MAX = 2, DIMS = 3, ALIGNMENT = 64 };

/* What every rank holds of an item at one side of a stage: its part in a layout; of that, where `divided` is not empty,
 * its part of dimension `dim` among the ranks that differ along those axes. */
struct side {
    struct layout layout;
    unsigned divided;
    int dim;
};

/* How one item takes part in a stage. */
struct move {
    bool active, from_middle, to_middle;
    struct side from, to;
    unsigned own_axes; /* along these a rank takes from ranks with its own coordinate */
    unsigned sum_axes; /* along these from all, and adds */
    bool rounded;      /* a rank takes what it has itself through the wire's dtype, too */
};

/* A box that goes into the staging memory. */
struct parcel {
    int item;
    int64_t first[DIMS], count[DIMS]; /* in the local tensor that it is taken from */
    int64_t offset;                   /* in the staging memory, bytes */
};

/* A box of what this rank is to hold, and where its terms lie. */
struct landing {
    int item;
    int64_t from_first[DIMS], to_first[DIMS], count[DIMS];
    int64_t first_term, term_count;
};
enum { TERM_HERE = -1 }; /* a term at from_first of the local tensor; others are offsets in the staging memory */

struct stage {
    struct move *moves; /* one an item */
    bool exchanges;     /* whether any rank of the group needs something of another */
    struct parcel *parcels;
    struct landing *landings;
    int64_t *terms;
    int64_t parcel_count, landing_count, term_count;
    int64_t *send_counts, *send_offsets, *receive_counts, *receive_offsets; /* [group size], offsets in staging */
    int64_t begin, end;                                                     /* of its staging memory */
};

struct redistribution {
    struct mesh mesh;
    unsigned axes;
    int group_size, group_rank;
    struct mesh *peers; /* the mesh as each rank of the group sees it */
    struct redistribute_item *items;
    int count;
    int *order; /* of the items, widest wire first */
    int64_t *middle_offsets;
    struct stage stages[STAGES_MAX];
    int stage_count;
    struct box *term_boxes; /* room for the terms of one landing */
    int64_t staging_bytes;

    /* under way */
    struct comm *comm;
    const struct kernel_ops *ops;
    char *staging;
    int passing; /* the stage that was started last; -1: none */
    struct comm_request request;
};

/* ---- boxes ---------------------------------------------------------------------------------------------------------- */

/* Ranges of an item's dimensions. */
struct extent {
    struct range dims[DIMS];
};

static struct extent side_extent(const struct side *side, const struct mesh *mesh, const struct redistribute_item *item) {
    struct extent extent;
    for (int dim = 0; dim < DIMS; dim++)
        extent.dims[dim] = layout_local_range(&side->layout, mesh, dim, item->shape[dim]);
    if (side->divided) {
        struct range *range = &extent.dims[side->dim];
        struct range part = range_part(range_count(*range), mesh_group_size(mesh, side->divided),
                                       mesh_group_rank(mesh, side->divided));
        *range = (struct range){range->begin + part.begin, range->begin + part.end};
    }
    return extent;
}

static int64_t extent_elements(const struct extent *extent) {
    int64_t elements = 1;
    for (int dim = 0; dim < DIMS; dim++)
        elements *= range_count(extent->dims[dim]);
    return elements;
}

/* False where nothing is common. */
static bool intersect(const struct extent *a, const struct extent *b, struct extent *out) {
    for (int dim = 0; dim < DIMS; dim++) {
        struct range x = a->dims[dim], y = b->dims[dim];
        out->dims[dim] = (struct range){x.begin > y.begin ? x.begin : y.begin, x.end < y.end ? x.end : y.end};
        if (out->dims[dim].begin >= out->dims[dim].end)
            return false;
    }
    return true;
}

static void place_inside(const struct extent *box, const struct extent *whole, int64_t first[DIMS]) {
    for (int dim = 0; dim < DIMS; dim++)
        first[dim] = box->dims[dim].begin - whole->dims[dim].begin;
}

static bool same_coordinates(const struct mesh *a, const struct mesh *b, unsigned axes) {
    return mesh_group_rank(a, axes) == mesh_group_rank(b, axes);
}

/* What `to` takes of `from` in a move, if anything. */
static bool passing_box(const struct move *move, const struct redistribute_item *item, const struct mesh *from,
                        const struct mesh *to, struct extent *box) {
    if (!move->active || !same_coordinates(from, to, move->own_axes))
        return false;
    struct extent have = side_extent(&move->from, from, item), want = side_extent(&move->to, to, item);
    return intersect(&have, &want, box);
}

static int64_t box_bytes(const struct extent *box, const struct redistribute_item *item) {
    return extent_elements(box) * (int64_t)dtype_size(item->wire);
}

static int64_t align(int64_t bytes) {
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

struct tensor layout_local_tensor(const struct layout *layout, const struct mesh *mesh, enum dtype dtype, int dim_count,
                                  const int64_t shape[3]) {
    int64_t local[DIMS] = {1, 1, 1};
    for (int dim = 0; dim < dim_count; dim++)
        local[dim] = range_count(layout_local_range(layout, mesh, dim, shape[dim]));
    return tensor_make(NULL, dtype, dim_count, local[0], local[1], local[2]);
}

/* ---- what an item asks for ------------------------------------------------------------------------------------------ */

/* One rank along an axis: it holds everything, whatever the placement says. */
static void forget_single_axes(struct layout *layout, const struct mesh *mesh) {
    for (int axis = 0; axis < MESH_AXIS_COUNT; axis++)
        if (mesh->size[axis] == 1)
            layout->axis[axis] = (struct placement){PLACEMENT_REPLICATE, 0};
}

static bool is_float(enum dtype dtype) {
    return dtype == DTYPE_F32 || dtype == DTYPE_BF16 || dtype == DTYPE_F64;
}

static void check_item(const struct redistribute_item *item, const struct mesh *mesh, unsigned axes) {
    CHECK(item->dim_count >= 1 && item->dim_count <= DIMS);
    for (int dim = item->dim_count; dim < DIMS; dim++)
        CHECK_OP(item->shape[dim], ==, 1);
    CHECK(is_float(item->wire) && is_float(item->from.dtype) && is_float(item->to.dtype));
    for (int axis = 0; axis < MESH_AXIS_COUNT; axis++) {
        struct placement from = item->from_layout.axis[axis], to = item->to_layout.axis[axis];
        CHECK(from.kind != PLACEMENT_SHARD || (from.dim >= 0 && from.dim < item->dim_count));
        CHECK(to.kind != PLACEMENT_SHARD || (to.dim >= 0 && to.dim < item->dim_count));
        CHECK(to.kind != PLACEMENT_PARTIAL || from.kind == PLACEMENT_PARTIAL);
        if (!(axes & MESH_BIT(axis)))
            CHECK(from.kind == to.kind && (from.kind != PLACEMENT_SHARD || from.dim == to.dim));
    }
    const struct tensor *held[2] = {&item->from, &item->to};
    const struct layout *layouts[2] = {&item->from_layout, &item->to_layout};
    for (int i = 0; i < 2; i++) {
        struct tensor wanted = layout_local_tensor(layouts[i], mesh, held[i]->dtype, item->dim_count, item->shape);
        CHECK(tensor_same_shape(*held[i], wanted));
    }
}

/* The dimension to divide over `parts` ranks: the slowest one with some elements for each, else the longest. */
static int choose_divided_dim(const struct redistribute_item *item, const struct mesh *mesh, int parts) {
    int best = 0;
    int64_t best_length = -1;
    for (int dim = 0; dim < item->dim_count; dim++) {
        int64_t length = item->shape[dim] / mesh_group_size(mesh, layout_shard_axes(&item->to_layout, dim));
        if (length >= 8 * (int64_t)parts)
            return dim;
        if (length > best_length) {
            best = dim;
            best_length = length;
        }
    }
    return best;
}

/* The axes of a set whose placement is of a kind. */
static unsigned axes_of_kind(const struct layout *layout, unsigned axes, enum placement_kind kind) {
    unsigned found = 0;
    for (int axis = 0; axis < MESH_AXIS_COUNT; axis++)
        if ((axes & MESH_BIT(axis)) && layout->axis[axis].kind == kind)
            found |= MESH_BIT(axis);
    return found;
}

/* Ranks that want the same must get the same bits: where some take from others what one takes from itself, that one
 * rounds it as the wire does. */
static bool must_round(const struct redistribute_item *item, unsigned axes, const struct move *move) {
    unsigned alike = axes_of_kind(&move->to.layout, axes, PLACEMENT_REPLICATE) & ~move->to.divided;
    if (!(alike & ~axes_of_kind(&move->from.layout, axes, PLACEMENT_REPLICATE)) || move->from_middle)
        return false;
    enum dtype end = move->to_middle ? item->wire : item->to.dtype;
    return dtype_size(item->wire) < dtype_size(item->from.dtype) && (move->sum_axes || item->wire != end);
}

/* Fills the item's moves; returns the number of stages it takes part in. */
static int plan_item(const struct redistribute_item *item, const struct mesh *mesh, unsigned axes, struct move *first,
                     struct move *second) {
    unsigned partial = axes_of_kind(&item->from_layout, axes, PLACEMENT_PARTIAL);
    unsigned kept = axes_of_kind(&item->to_layout, axes, PLACEMENT_PARTIAL);
    unsigned gathered = axes_of_kind(&item->to_layout, partial & ~kept, PLACEMENT_REPLICATE);
    unsigned alike = axes_of_kind(&item->to_layout, axes, PLACEMENT_REPLICATE) & ~gathered;
    *first = (struct move){.active = true, .from = {.layout = item->from_layout}, .to = {.layout = item->to_layout}};
    first->own_axes = axes_of_kind(&item->from_layout, axes, PLACEMENT_REPLICATE) | kept;
    first->sum_axes = partial & ~kept;
    if (gathered) {
        first->to_middle = true;
        first->to.divided = gathered;
        first->to.dim = choose_divided_dim(item, mesh, mesh_group_size(mesh, gathered));
        *second = (struct move){.active = true, .from_middle = true, .from = first->to, .own_axes = alike | kept};
        second->to.layout = item->to_layout;
    }
    first->rounded = must_round(item, axes, first);
    return gathered ? 2 : 1;
}

/* ---- making a plan -------------------------------------------------------------------------------------------------- */

static const struct mesh *own(const struct redistribution *plan) {
    return &plan->peers[plan->group_rank];
}

/* Whether a rank of the group takes all it wants from itself. */
static bool serves_itself(const struct redistribution *plan, const struct stage *stage, const struct mesh *rank) {
    for (int i = 0; i < plan->count; i++) {
        const struct move *move = &stage->moves[i];
        struct extent want, have, common;
        if (!move->active)
            continue;
        want = side_extent(&move->to, rank, &plan->items[i]);
        have = side_extent(&move->from, rank, &plan->items[i]);
        bool any = extent_elements(&want) > 0;
        if (any && (move->sum_axes || !intersect(&have, &want, &common) ||
                    extent_elements(&common) != extent_elements(&want)))
            return false;
    }
    return true;
}

/* The boxes for one rank, packed one after another from `offset` on, appended to the parcels. Returns their bytes. */
static int64_t list_parcels(const struct redistribution *plan, struct stage *stage, int to, int64_t offset) {
    int64_t begin = offset;
    for (int o = 0; o < plan->count; o++) {
        int i = plan->order[o];
        const struct move *move = &stage->moves[i];
        struct extent box, whole;
        if ((to == plan->group_rank && !move->rounded) ||
            !passing_box(move, &plan->items[i], own(plan), &plan->peers[to], &box))
            continue;
        struct parcel *parcel = &stage->parcels[stage->parcel_count++];
        *parcel = (struct parcel){.item = i, .offset = offset};
        whole = side_extent(&move->from, own(plan), &plan->items[i]);
        place_inside(&box, &whole, parcel->first);
        for (int dim = 0; dim < DIMS; dim++)
            parcel->count[dim] = range_count(box.dims[dim]);
        offset += box_bytes(&box, &plan->items[i]);
    }
    return offset - begin;
}

static bool same_parcels(const struct parcel *a, const struct parcel *b, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (a[i].item != b[i].item || memcmp(a[i].first, b[i].first, sizeof a[i].first) != 0 ||
            memcmp(a[i].count, b[i].count, sizeof a[i].count) != 0)
            return false;
    return true;
}

/* A list of boxes that one or more ranks get. */
struct segment {
    int64_t first, count, offset, bytes;
};

/* What this rank packs, from `offset` on; returns the end. own_offsets [count]: where boxes that it takes from itself
 * through the wire lie. */
static int64_t plan_sends(struct redistribution *plan, struct stage *stage, struct segment *segments, int64_t offset,
                          int64_t *own_offsets) {
    int segment_count = 0;
    for (int to = 0; to < plan->group_size; to++) {
        struct segment new = {.first = stage->parcel_count, .offset = offset};
        new.bytes = list_parcels(plan, stage, to, offset);
        new.count = stage->parcel_count - new.first;
        int s = 0;
        while (s < segment_count &&
               (segments[s].count != new.count ||
                !same_parcels(stage->parcels + segments[s].first, stage->parcels + new.first, new.count)))
            s++;
        if (s < segment_count) {
            stage->parcel_count = new.first;
        } else {
            segments[segment_count++] = new;
            offset = align(offset + new.bytes);
        }
        if (to != plan->group_rank) {
            stage->send_counts[to] = segments[s].bytes;
            stage->send_offsets[to] = segments[s].offset;
            continue;
        }
        for (int64_t p = segments[s].first; p < segments[s].first + segments[s].count; p++)
            own_offsets[stage->parcels[p].item] = stage->parcels[p].offset;
    }
    return offset;
}

/* Where the boxes of every other rank arrive: offsets [group size, count]. Returns the end. */
static int64_t plan_receives(struct redistribution *plan, struct stage *stage, int64_t offset, int64_t *offsets) {
    for (int from = 0; from < plan->group_size; from++) {
        int64_t begin = offset;
        if (from == plan->group_rank)
            continue;
        for (int o = 0; o < plan->count; o++) {
            int i = plan->order[o];
            struct extent box;
            if (!passing_box(&stage->moves[i], &plan->items[i], &plan->peers[from], own(plan), &box))
                continue;
            offsets[(int64_t)from * plan->count + i] = offset;
            offset += box_bytes(&box, &plan->items[i]);
        }
        stage->receive_counts[from] = offset - begin;
        stage->receive_offsets[from] = begin;
        offset = align(offset);
    }
    return offset;
}

/* The rank of the group that has the coordinates of term `term` along sum_axes, and `at`'s along all others. */
static int term_rank(const struct redistribution *plan, const struct mesh *at, unsigned sum_axes, int term) {
    struct mesh mesh = *at;
    for (int axis = MESH_AXIS_COUNT - 1; axis >= 0; axis--)
        if (sum_axes & MESH_BIT(axis)) {
            mesh.coordinate[axis] = term % mesh.size[axis];
            term /= mesh.size[axis];
        }
    return mesh_group_rank(&mesh, plan->axes);
}

/* What this rank is to hold of item i: one landing for every box that arrives or is here, with all its terms. */
static void plan_landings(struct redistribution *plan, struct stage *stage, int i, const int64_t *offsets,
                          const int64_t *own_offsets) {
    const struct move *move = &stage->moves[i];
    struct extent box, whole = side_extent(&move->to, own(plan), &plan->items[i]);
    struct extent here = side_extent(&move->from, own(plan), &plan->items[i]);
    int term_count = mesh_group_size(&plan->mesh, move->sum_axes);
    int64_t landed = 0;
    for (int from = 0; from < plan->group_size; from++) {
        if (mesh_group_rank(&plan->peers[from], move->sum_axes) != 0 ||
            !passing_box(move, &plan->items[i], &plan->peers[from], own(plan), &box))
            continue;
        struct landing *landing = &stage->landings[stage->landing_count++];
        *landing = (struct landing){.item = i, .first_term = stage->term_count, .term_count = term_count};
        place_inside(&box, &here, landing->from_first);
        place_inside(&box, &whole, landing->to_first);
        for (int dim = 0; dim < DIMS; dim++)
            landing->count[dim] = range_count(box.dims[dim]);
        for (int term = 0; term < term_count; term++) {
            int rank = term_rank(plan, &plan->peers[from], move->sum_axes, term);
            bool is_own = rank == plan->group_rank;
            int64_t own_offset = move->rounded ? own_offsets[i] : TERM_HERE;
            stage->terms[stage->term_count++] = is_own ? own_offset : offsets[(int64_t)rank * plan->count + i];
        }
        landed += extent_elements(&box);
    }
    CHECK_OP(landed, ==, extent_elements(&whole)); /* else the axes are too few for these layouts */
}

static enum status plan_stage(struct redistribution *plan, struct stage *stage, int64_t begin) {
    size_t ranks = (size_t)plan->group_size, boxes = ranks * (size_t)plan->count;
    int64_t *offsets, *own_offsets;
    struct segment *segments;
    TRY(memory_alloc(&stage->parcels, boxes, sizeof *stage->parcels));
    TRY(memory_alloc(&stage->landings, boxes, sizeof *stage->landings));
    TRY(memory_alloc(&stage->terms, boxes, sizeof *stage->terms));
    TRY(memory_alloc(&stage->send_counts, 4 * ranks, sizeof *stage->send_counts));
    stage->send_offsets = stage->send_counts + ranks;
    stage->receive_counts = stage->send_offsets + ranks;
    stage->receive_offsets = stage->receive_counts + ranks;
    TRY(memory_alloc(&offsets, boxes + (size_t)plan->count, sizeof *offsets));
    own_offsets = offsets + boxes;
    enum status status = memory_alloc(&segments, ranks, sizeof *segments);
    if (status == STATUS_OK) {
        for (int rank = 0; rank < plan->group_size; rank++)
            stage->exchanges |= !serves_itself(plan, stage, &plan->peers[rank]);
        stage->begin = begin;
        int64_t sent_end = plan_sends(plan, stage, segments, begin, own_offsets);
        stage->end = plan_receives(plan, stage, sent_end, offsets);
        for (int i = 0; i < plan->count; i++)
            if (stage->moves[i].active)
                plan_landings(plan, stage, i, offsets, own_offsets);
        free(segments);
    }
    free(offsets);
    return status;
}

static void order_items(struct redistribution *plan) {
    static const enum dtype widest_first[] = {DTYPE_F64, DTYPE_F32, DTYPE_BF16};
    int placed = 0;
    for (int d = 0; d < 3; d++)
        for (int i = 0; i < plan->count; i++)
            if (plan->items[i].wire == widest_first[d])
                plan->order[placed++] = i;
}

static void find_peers(struct redistribution *plan) {
    for (int rank = 0; rank < plan->group_size; rank++) {
        struct mesh mesh = plan->mesh;
        int rest = rank;
        for (int axis = MESH_AXIS_COUNT - 1; axis >= 0; axis--)
            if (plan->axes & MESH_BIT(axis)) {
                mesh.coordinate[axis] = rest % mesh.size[axis];
                rest /= mesh.size[axis];
            }
        plan->peers[rank] = mesh;
    }
}

/* Where this rank's shares of the sums lie: from 0 on; returns the end. */
static int64_t place_middles(struct redistribution *plan) {
    int64_t offset = 0;
    for (int i = 0; i < plan->count; i++)
        if (plan->stages[0].moves[i].to_middle) {
            struct extent share = side_extent(&plan->stages[0].moves[i].to, own(plan), &plan->items[i]);
            plan->middle_offsets[i] = offset;
            offset = align(offset + box_bytes(&share, &plan->items[i]));
        }
    return offset;
}

static enum status plan_all(struct redistribution *plan, const struct redistribute_item *items) {
    size_t count = (size_t)plan->count;
    TRY(memory_alloc(&plan->items, count + 1, sizeof *items));
    TRY(memory_alloc(&plan->order, count + 1, sizeof *plan->order));
    TRY(memory_alloc(&plan->middle_offsets, count + 1, sizeof *plan->middle_offsets));
    TRY(memory_alloc(&plan->peers, (size_t)plan->group_size, sizeof *plan->peers));
    TRY(memory_alloc(&plan->term_boxes, (size_t)plan->group_size, sizeof *plan->term_boxes));
    for (int s = 0; s < STAGES_MAX; s++)
        TRY(memory_alloc(&plan->stages[s].moves, count + 1, sizeof(struct move)));
    bool all_twice = true;
    find_peers(plan);
    for (int i = 0; i < plan->count; i++) {
        struct redistribute_item *item = &plan->items[i];
        *item = items[i];
        forget_single_axes(&item->from_layout, &plan->mesh);
        forget_single_axes(&item->to_layout, &plan->mesh);
        check_item(item, &plan->mesh, plan->axes);
        int stages = plan_item(item, &plan->mesh, plan->axes, &plan->stages[0].moves[i], &plan->stages[1].moves[i]);
        plan->stage_count = stages > plan->stage_count ? stages : plan->stage_count;
        all_twice = all_twice && stages == 2;
    }
    order_items(plan);
    int64_t begin = place_middles(plan);
    for (int s = 0; s < plan->stage_count; s++) {
        TRY(plan_stage(plan, &plan->stages[s], s > 0 && !all_twice ? plan->stages[0].end : begin));
        if (plan->stages[s].end > plan->staging_bytes)
            plan->staging_bytes = plan->stages[s].end;
    }
    return STATUS_OK;
}

enum status redistribution_create(const struct mesh *mesh, unsigned axes, const struct redistribute_item *items, int count,
                                  struct redistribution **out) {
    struct redistribution *plan;
    CHECK_OP(count, >=, 0);
    CHECK((axes & ~(unsigned)MESH_ALL_AXES) == 0);
    TRY(memory_alloc(&plan, 1, sizeof *plan));
    plan->mesh = *mesh;
    plan->axes = axes;
    plan->group_size = mesh_group_size(mesh, axes);
    plan->group_rank = mesh_group_rank(mesh, axes);
    plan->count = count;
    plan->passing = -1;
    enum status status = plan_all(plan, items);
    if (status == STATUS_OK)
        *out = plan;
    else
        redistribution_destroy(plan);
    return status;
}

void redistribution_destroy(struct redistribution *plan) {
    if (!plan)
        return;
    if (plan->passing >= 0 && plan->stages[plan->passing].exchanges &&
        plan->comm->ops->wait(plan->comm, &plan->request) != STATUS_OK)
        log_verbose("a transfer of parameters ended with a rank gone"); /* what failed first has been told */
    for (int s = 0; s < STAGES_MAX; s++) {
        free(plan->stages[s].moves);
        free(plan->stages[s].parcels);
        free(plan->stages[s].landings);
        free(plan->stages[s].terms);
        free(plan->stages[s].send_counts);
    }
    free(plan->items);
    free(plan->order);
    free(plan->middle_offsets);
    free(plan->peers);
    free(plan->term_boxes);
    free(plan);
}

void redistribution_bind(struct redistribution *plan, int i, struct tensor from, struct tensor to) {
    CHECK(i >= 0 && i < plan->count);
    CHECK_OP(plan->passing, ==, -1);
    struct redistribute_item *item = &plan->items[i];
    CHECK(from.dtype == item->from.dtype && tensor_same_shape(from, item->from));
    CHECK(to.dtype == item->to.dtype && tensor_same_shape(to, item->to));
    item->from = from;
    item->to = to;
}

/* ---- what it will take ---------------------------------------------------------------------------------------------- */

size_t redistribution_staging_bytes(const struct redistribution *plan) {
    return (size_t)plan->staging_bytes;
}

int64_t redistribution_sent_bytes(const struct redistribution *plan) {
    int64_t bytes = 0;
    for (int s = 0; s < plan->stage_count; s++)
        for (int rank = 0; rank < plan->group_size; rank++)
            bytes += plan->stages[s].send_counts[rank];
    return bytes;
}

int64_t redistribution_received_bytes(const struct redistribution *plan) {
    int64_t bytes = 0;
    for (int s = 0; s < plan->stage_count; s++)
        for (int rank = 0; rank < plan->group_size; rank++)
            bytes += plan->stages[s].receive_counts[rank];
    return bytes;
}

int redistribution_exchanges(const struct redistribution *plan) {
    int exchanges = 0;
    for (int s = 0; s < plan->stage_count; s++)
        exchanges += plan->stages[s].exchanges;
    return exchanges;
}

/* ---- running -------------------------------------------------------------------------------------------------------- */

static struct tensor staged(const struct redistribution *plan, int item, int64_t offset, const int64_t shape[DIMS]) {
    return tensor_3d(plan->staging + offset, plan->items[item].wire, shape[0], shape[1], shape[2]);
}

static struct tensor middle(const struct redistribution *plan, int item) {
    struct extent share = side_extent(&plan->stages[0].moves[item].to, own(plan), &plan->items[item]);
    const int64_t shape[DIMS] = {range_count(share.dims[0]), range_count(share.dims[1]), range_count(share.dims[2])};
    return staged(plan, item, plan->middle_offsets[item], shape);
}

static struct box box_at(struct tensor tensor, const int64_t first[DIMS]) {
    return (struct box){tensor, {first[0], first[1], first[2]}};
}

static enum status start_stage(struct redistribution *plan, int s) {
    static const int64_t origin[DIMS] = {0, 0, 0};
    struct stage *stage = &plan->stages[s];
    for (int64_t p = 0; p < stage->parcel_count; p++) {
        const struct parcel *parcel = &stage->parcels[p];
        bool from_middle = stage->moves[parcel->item].from_middle;
        struct tensor from = from_middle ? middle(plan, parcel->item) : plan->items[parcel->item].from;
        struct box term = box_at(from, parcel->first);
        struct box to = box_at(staged(plan, parcel->item, parcel->offset, parcel->count), origin);
        CHECK(from.data);
        plan->ops->sum_boxes(&term, 1, parcel->count, to, false);
    }
    plan->request = (struct comm_request){0};
    plan->passing = s;
    if (!stage->exchanges)
        return STATUS_OK;
    enum status status =
        plan->comm->ops->all_to_all(plan->comm, plan->staging, stage->send_counts, stage->send_offsets, plan->staging,
                                    stage->receive_counts, stage->receive_offsets, &plan->request);
    if (status != STATUS_OK)
        plan->passing = -1;
    return status;
}

static enum status end_stage(struct redistribution *plan) {
    enum status status = STATUS_OK;
    if (plan->stages[plan->passing].exchanges)
        status = plan->comm->ops->wait(plan->comm, &plan->request);
    if (status != STATUS_OK)
        plan->passing = -1;
    return status;
}

static char *first_element(const struct box *box) {
    const int64_t *shape = box->tensor.shape, *first = box->first;
    int64_t at = (first[0] * shape[1] + first[1]) * shape[2] + first[2];
    return (char *)box->tensor.data + at * (int64_t)dtype_size(box->tensor.dtype);
}

/* Whether every element of one box lies where that of the other does. */
static bool same_place(const struct box *a, const struct box *b, const int64_t count[DIMS]) {
    const int64_t *x = a->tensor.shape, *y = b->tensor.shape;
    return a->tensor.dtype == b->tensor.dtype && first_element(a) == first_element(b) &&
           (count[1] == 1 || x[2] == y[2]) && (count[0] == 1 || x[1] * x[2] == y[1] * y[2]);
}

static void land(struct redistribution *plan, const struct stage *stage, const struct landing *landing, bool accumulate) {
    static const int64_t origin[DIMS] = {0, 0, 0};
    const struct move *move = &stage->moves[landing->item];
    const struct redistribute_item *item = &plan->items[landing->item];
    struct box here = box_at(move->from_middle ? middle(plan, landing->item) : item->from, landing->from_first);
    struct box to = box_at(move->to_middle ? middle(plan, landing->item) : item->to, landing->to_first);
    bool in_place = false;
    CHECK(to.tensor.data);
    for (int64_t t = 0; t < landing->term_count; t++) {
        int64_t offset = stage->terms[landing->first_term + t];
        if (offset != TERM_HERE) {
            plan->term_boxes[t] = box_at(staged(plan, landing->item, offset, landing->count), origin);
            continue;
        }
        CHECK(here.tensor.data);
        plan->term_boxes[t] = here;
        in_place = same_place(&here, &to, landing->count);
    }
    CHECK(!(in_place && accumulate));
    if (!in_place || landing->term_count > 1)
        plan->ops->sum_boxes(plan->term_boxes, (int)landing->term_count, landing->count, to, accumulate);
}

/* The boxes of a stage that go to the middle, or those that do not. */
static void land_all(struct redistribution *plan, int s, bool to_middle, bool accumulate) {
    struct stage *stage = &plan->stages[s];
    for (int64_t i = 0; i < stage->landing_count; i++)
        if (stage->moves[stage->landings[i].item].to_middle == to_middle)
            land(plan, stage, &stage->landings[i], accumulate);
}

enum status redistribution_start(struct redistribution *plan, struct comm *comm, const struct kernel_ops *ops,
                                 void *staging) {
    CHECK_OP(plan->passing, ==, -1);
    if (comm || plan->group_size > 1) {
        CHECK_OP(comm->size, ==, plan->group_size);
        CHECK_OP(comm->rank, ==, plan->group_rank);
    }
    CHECK(staging || plan->staging_bytes == 0);
    if (plan->stage_count == 0)
        return STATUS_OK;
    plan->comm = comm;
    plan->ops = ops;
    plan->staging = staging;
    return start_stage(plan, 0);
}

enum status redistribution_advance(struct redistribution *plan) {
    if (plan->stage_count < 2)
        return STATUS_OK;
    CHECK_OP(plan->passing, ==, 0);
    TRY(end_stage(plan));
    land_all(plan, 0, true, false);
    return start_stage(plan, 1);
}

enum status redistribution_finish(struct redistribution *plan, bool accumulate) {
    if (plan->stage_count == 0)
        return STATUS_OK;
    CHECK_OP(plan->passing, >=, 0);
    if (plan->stage_count == 1) {
        TRY(end_stage(plan));
    } else {
        if (plan->passing == 0)
            TRY(redistribution_advance(plan));
    }
    land_all(plan, 0, false, accumulate);
    if (plan->stage_count == 2) {
        TRY(end_stage(plan));
        land_all(plan, 1, false, accumulate);
    }
    plan->passing = -1;
    return STATUS_OK;
}
