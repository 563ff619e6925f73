/* Every ordered pair of layouts over small meshes, on ranks that are threads: a value is a function of its place in the
 * whole tensor and of the coordinates that its layout repeats or adds over, small enough that every sum is exact in every
 * dtype, so that what each rank must end with is known exactly. */
#include "parallel/redistribute.h"

#include "base/memory.h"
#include "base/random.h"
#include "base/threads.h"
#include "comm/threads/comm_threads.h"
#include "tensor/tensor_testing.h"
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

enum { RANKS_MAX = 8, AXIS_SETS = 1 << MESH_AXIS_COUNT, DIMS = 3 };

/* ---- one rank of a mesh --------------------------------------------------------------------------------------------- */

struct member {
    struct mesh mesh;
    struct comm comms[AXIS_SETS]; /* over every set of axes */
    const struct kernel_ops *ops;
    long cases;
};

static enum status member_init(struct member *m, const int size[MESH_AXIS_COUNT], struct comm *comm) {
    *m = (struct member){.mesh = mesh_make(size, comm->rank)};
    for (unsigned axes = 0; axes < AXIS_SETS; axes++)
        TRY(comm->ops->split(comm, mesh_group_color(&m->mesh, axes), &m->comms[axes]));
    return kernels_choose("auto", &m->ops);
}

static void member_release(struct member *m) {
    for (unsigned axes = 0; axes < AXIS_SETS; axes++)
        comm_release(&m->comms[axes]);
}

/* The first wrong thing that a rank finds ends its test as a failed status, with this line. */
#define EXPECT(condition)                                                                                              \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            return status_fail(STATUS_FORMAT, "line %d: %s", __LINE__, #condition);                                    \
    } while (0)

static void *take(size_t bytes) {
    return aligned_alloc(64, (bytes + 64) / 64 * 64);
}

/* ---- cases ---------------------------------------------------------------------------------------------------------- */

static const struct {
    enum dtype from, to, wire;
} dtypes[] = {
    {DTYPE_F32, DTYPE_F32, DTYPE_F32},   {DTYPE_F64, DTYPE_F64, DTYPE_F64}, {DTYPE_F32, DTYPE_BF16, DTYPE_BF16},
    {DTYPE_F32, DTYPE_F32, DTYPE_BF16},  {DTYPE_BF16, DTYPE_F32, DTYPE_BF16}, {DTYPE_F64, DTYPE_F32, DTYPE_F32},
    {DTYPE_BF16, DTYPE_BF16, DTYPE_F32}, {DTYPE_F32, DTYPE_F32, DTYPE_F64},
};
enum { DTYPES = sizeof dtypes / sizeof *dtypes };

static const int64_t shapes[DIMS][2][DIMS] = {
    {{11, 1, 1}, {3, 1, 1}}, {{5, 9, 1}, {13, 2, 1}}, {{5, 3, 7}, {2, 9, 3}}};

static unsigned axes_of(const struct layout *layout, enum placement_kind kind) {
    unsigned axes = 0;
    for (int axis = 0; axis < MESH_AXIS_COUNT; axis++)
        if (layout->axis[axis].kind == kind)
            axes |= MESH_BIT(axis);
    return axes;
}

/* What a rank at `mesh` holds of flat element `index` before: 0..28. */
static double value_at(const struct redistribute_item *item, const struct mesh *mesh, int64_t index) {
    unsigned repeats = ~axes_of(&item->from_layout, PLACEMENT_SHARD) & MESH_ALL_AXES;
    return (double)((index * 7 + mesh_group_rank(mesh, repeats) * 5) % 29);
}

/* What it must hold after: the sum over the axes that are Partial before and not after. */
static double expected_at(const struct redistribute_item *item, const struct mesh *mesh, int64_t index) {
    unsigned sum_axes = axes_of(&item->from_layout, PLACEMENT_PARTIAL) & ~axes_of(&item->to_layout, PLACEMENT_PARTIAL);
    double sum = 0;
    for (int term = 0; term < mesh_group_size(mesh, sum_axes); term++) {
        struct mesh other = *mesh;
        int rest = term;
        for (int axis = 0; axis < MESH_AXIS_COUNT; axis++)
            if (sum_axes & MESH_BIT(axis)) {
                other.coordinate[axis] = rest % mesh->size[axis];
                rest /= mesh->size[axis];
            }
        sum += value_at(item, &other, index);
    }
    return sum;
}

/* Flat index in the whole tensor of local element `local`. */
static int64_t whole_index(const struct redistribute_item *item, const struct layout *layout, const struct mesh *mesh,
                           struct tensor t, int64_t local) {
    int64_t place[DIMS] = {local / (t.shape[1] * t.shape[2]), local / t.shape[2] % t.shape[1], local % t.shape[2]};
    for (int dim = 0; dim < DIMS; dim++)
        place[dim] += layout_local_range(layout, mesh, dim, item->shape[dim]).begin;
    return (place[0] * item->shape[1] + place[1]) * item->shape[2] + place[2];
}

/* What `to` holds before, for +=: 1 or 2. */
static double before_at(int64_t index) {
    return (double)(1 + index % 2);
}

static void place_item(struct redistribute_item *item, const struct mesh *mesh) {
    item->from = layout_local_tensor(&item->from_layout, mesh, item->from.dtype, item->dim_count, item->shape);
    item->to = layout_local_tensor(&item->to_layout, mesh, item->to.dtype, item->dim_count, item->shape);
}

static void fill_item(struct redistribute_item *item, const struct mesh *mesh) {
    item->from.data = take(tensor_bytes(item->from));
    item->to.data = take(tensor_bytes(item->to));
    for (int64_t i = 0; i < tensor_elements(item->from); i++)
        test_set(item->from, i, value_at(item, mesh, whole_index(item, &item->from_layout, mesh, item->from, i)));
    for (int64_t i = 0; i < tensor_elements(item->to); i++)
        test_set(item->to, i, before_at(whole_index(item, &item->to_layout, mesh, item->to, i)));
}

static enum status check_item(const struct redistribute_item *item, const struct mesh *mesh, bool accumulate) {
    for (int64_t i = 0; i < tensor_elements(item->to); i++) {
        int64_t index = whole_index(item, &item->to_layout, mesh, item->to, i);
        double expected = expected_at(item, mesh, index) + (accumulate ? before_at(index) : 0);
        if (test_get(item->to, i) != expected)
            return status_fail(STATUS_FORMAT, "element %lld is %g, not %g", (long long)index, test_get(item->to, i), expected);
    }
    return STATUS_OK;
}

static void free_item(struct redistribute_item *item) {
    free(item->from.data);
    free(item->to.data);
}

static const char *placement_text(struct placement p) {
    static const char *const shard[DIMS] = {"S0", "S1", "S2"};
    return p.kind == PLACEMENT_REPLICATE ? "R" : p.kind == PLACEMENT_PARTIAL ? "P" : shard[p.dim];
}

static enum status name_case(enum status status, const struct redistribute_item *item, const struct mesh *mesh,
                             unsigned axes) {
    const struct placement *f = item->from_layout.axis, *t = item->to_layout.axis;
    return status_prefix(status, "mesh %d x %d x %d, axes %u, [%lld,%lld,%lld] %s, %s, %s -> %s, %s, %s (%s %s %s)",
                         mesh->size[1], mesh->size[2], mesh->size[3], axes, (long long)item->shape[0],
                         (long long)item->shape[1], (long long)item->shape[2], placement_text(f[1]), placement_text(f[2]),
                         placement_text(f[3]), placement_text(t[1]), placement_text(t[2]), placement_text(t[3]),
                         dtype_name(item->from.dtype), dtype_name(item->wire), dtype_name(item->to.dtype));
}

/* The axes that must take part at least: those whose placement changes, and those that share a dimension with one. */
static unsigned axes_needed(const struct redistribute_item *item) {
    unsigned axes = 0;
    for (int axis = 0; axis < MESH_AXIS_COUNT; axis++) {
        struct placement from = item->from_layout.axis[axis], to = item->to_layout.axis[axis];
        if (from.kind != to.kind || (from.kind == PLACEMENT_SHARD && from.dim != to.dim))
            axes |= MESH_BIT(axis);
    }
    for (int turn = 0; turn < MESH_AXIS_COUNT; turn++)
        for (int dim = 0; dim < DIMS; dim++) {
            unsigned shared = layout_shard_axes(&item->from_layout, dim) | layout_shard_axes(&item->to_layout, dim);
            axes |= shared & axes ? shared : 0;
        }
    return axes;
}

/* Bytes that reach this rank in a plan of one exchange, counted element by element. */
static int64_t count_arriving(const struct redistribute_item *item, const struct mesh *mesh) {
    unsigned kept = axes_of(&item->to_layout, PLACEMENT_PARTIAL);
    unsigned own_axes = axes_of(&item->from_layout, PLACEMENT_REPLICATE) | kept;
    int64_t elements = 0;
    for (int64_t i = 0; i < tensor_elements(item->to); i++) {
        int64_t index = whole_index(item, &item->to_layout, mesh, item->to, i), rest = index;
        int64_t place[DIMS];
        for (int dim = DIMS - 1; dim >= 0; dim--) {
            place[dim] = rest % item->shape[dim];
            rest /= item->shape[dim];
        }
        for (int rank = 0; rank < mesh_rank_count(mesh); rank++) {
            struct mesh other = mesh_make(mesh->size, rank);
            bool holds = rank != mesh_rank(mesh) && mesh_group_rank(&other, own_axes) == mesh_group_rank(mesh, own_axes);
            for (int dim = 0; dim < DIMS && holds; dim++) {
                struct range range = layout_local_range(&item->from_layout, &other, dim, item->shape[dim]);
                holds = place[dim] >= range.begin && place[dim] < range.end;
            }
            elements += holds;
        }
    }
    return elements * (int64_t)dtype_size(item->wire);
}

static bool sums_for_several(const struct redistribute_item *item) {
    return axes_of(&item->from_layout, PLACEMENT_PARTIAL) & axes_of(&item->to_layout, PLACEMENT_REPLICATE);
}

/* Runs a plan and compares what passed with what it said. */
static enum status run_plan(struct member *m, unsigned axes, struct redistribution *plan, bool accumulate) {
    struct comm *comm = &m->comms[axes];
    struct comm_count before = comm->count;
    void *staging = take(redistribution_staging_bytes(plan));
    enum status status = redistribution_start(plan, comm, m->ops, staging);
    if (status == STATUS_OK)
        status = redistribution_finish(plan, accumulate);
    free(staging);
    TRY(status);
    EXPECT(comm->count.sent_bytes - before.sent_bytes == redistribution_sent_bytes(plan));
    EXPECT(comm->count.received_bytes - before.received_bytes == redistribution_received_bytes(plan));
    EXPECT(comm->count.calls - before.calls == redistribution_exchanges(plan));
    return STATUS_OK;
}

static enum status run_items(struct member *m, unsigned axes, struct redistribute_item *items, int count,
                             bool accumulate) {
    struct redistribution *plan;
    int64_t arriving = 0;
    bool once = true;
    for (int i = 0; i < count; i++)
        place_item(&items[i], &m->mesh);
    TRY(redistribution_create(&m->mesh, axes, items, count, &plan));
    for (int i = 0; i < count; i++) {
        fill_item(&items[i], &m->mesh);
        redistribution_bind(plan, i, items[i].from, items[i].to);
        once = once && !sums_for_several(&items[i]);
        if (m->cases % 4 == 0)
            arriving += count_arriving(&items[i], &m->mesh);
    }
    enum status status = run_plan(m, axes, plan, accumulate);
    for (int i = 0; i < count && status == STATUS_OK; i++)
        status = name_case(check_item(&items[i], &m->mesh, accumulate), &items[i], &m->mesh, axes);
    if (status == STATUS_OK && once && m->cases % 4 == 0 && redistribution_received_bytes(plan) != arriving)
        status = name_case(status_fail(STATUS_FORMAT, "%lld bytes arrive, %lld are needed",
                                       (long long)redistribution_received_bytes(plan), (long long)arriving),
                           &items[0], &m->mesh, axes);
    redistribution_destroy(plan);
    for (int i = 0; i < count; i++)
        free_item(&items[i]);
    m->cases++;
    return status;
}

/* ---- every pair of layouts ------------------------------------------------------------------------------------------ */

/* Pair `pair` of placements along an axis, of dims + 2 times dims + 1, and Partial kept: false where there is none. */
static bool choose_pair(int dims, int pair, struct placement *from, struct placement *to) {
    int choices = dims + 1, left = pair / choices, right = pair % choices;
    if (pair == (dims + 2) * choices) {
        *from = *to = (struct placement){PLACEMENT_PARTIAL, 0};
        return true;
    }
    if (pair > (dims + 2) * choices)
        return false;
    *from = left == 0      ? (struct placement){PLACEMENT_REPLICATE, 0}
            : left <= dims ? (struct placement){PLACEMENT_SHARD, left - 1}
                           : (struct placement){PLACEMENT_PARTIAL, 0};
    *to = right == 0 ? (struct placement){PLACEMENT_REPLICATE, 0} : (struct placement){PLACEMENT_SHARD, right - 1};
    return true;
}

static int pair_count(int dims) {
    return (dims + 2) * (dims + 1) + 1;
}

static void set_pairs(struct redistribute_item *item, const struct mesh *mesh, int number) {
    for (int axis = MESH_REPLICATE; axis < MESH_AXIS_COUNT; axis++) {
        int pairs = mesh->size[axis] > 1 ? pair_count(item->dim_count) : 1;
        choose_pair(item->dim_count, number % pairs, &item->from_layout.axis[axis], &item->to_layout.axis[axis]);
        number /= pairs;
    }
}

static int layout_pair_count(const struct mesh *mesh, int dims) {
    int count = 1;
    for (int axis = MESH_REPLICATE; axis < MESH_AXIS_COUNT; axis++)
        count *= mesh->size[axis] > 1 ? pair_count(dims) : 1;
    return count;
}

static struct redistribute_item make_item(const struct mesh *mesh, int dims, int number, long serial) {
    struct redistribute_item item = {.dim_count = dims};
    memcpy(item.shape, shapes[dims - 1][serial / DTYPES % 2], sizeof item.shape);
    item.from.dtype = dtypes[serial % DTYPES].from;
    item.to.dtype = dtypes[serial % DTYPES].to;
    item.wire = dtypes[serial % DTYPES].wire;
    set_pairs(&item, mesh, number);
    return item;
}

static enum status run_every_pair(void *context, struct comm *comm) {
    struct member m;
    TRY(member_init(&m, context, comm));
    enum status status = STATUS_OK;
    for (int dims = 1; dims <= DIMS && status == STATUS_OK; dims++)
        for (int number = 0; number < layout_pair_count(&m.mesh, dims) && status == STATUS_OK; number++) {
            struct redistribute_item item = make_item(&m.mesh, dims, number, m.cases);
            unsigned axes = m.cases % 3 ? MESH_ALL_AXES : axes_needed(&item);
            status = run_items(&m, axes, &item, 1, m.cases % 2);
        }
    member_release(&m);
    return status;
}

/* Lists of items with layouts, dtypes and shapes of every kind in one plan. */
static enum status run_lists(void *context, struct comm *comm) {
    enum { LIST = 9, TURNS = 60 };
    struct member m;
    TRY(member_init(&m, context, comm));
    enum status status = STATUS_OK;
    for (int turn = 0; turn < TURNS && status == STATUS_OK; turn++) {
        struct redistribute_item items[LIST];
        int count = turn % (LIST + 1);
        for (int i = 0; i < count; i++) {
            uint64_t random = random_bits(5, (uint64_t)turn, (uint64_t)i);
            int dims = 1 + (int)(random % DIMS);
            int number = (int)(random / 8 % (uint64_t)layout_pair_count(&m.mesh, dims));
            items[i] = make_item(&m.mesh, dims, number, (long)(random >> 40));
        }
        status = run_items(&m, MESH_ALL_AXES, items, count, turn % 2);
    }
    member_release(&m);
    return status;
}

static void run_meshes(enum status (*function)(void *, struct comm *), const struct comm_threads_faults *faults) {
    static const int rank_counts[] = {1, 2, 3, 4, 6, 8};
    threads_set_count(1);
    for (size_t r = 0; r < sizeof rank_counts / sizeof *rank_counts; r++)
        for (int replicate = 1; replicate <= rank_counts[r]; replicate++)
            for (int shard = 1; shard <= rank_counts[r] / replicate; shard++) {
                int size[MESH_AXIS_COUNT] = {1, replicate, shard, rank_counts[r] / (replicate * shard)};
                if (size[1] * size[2] * size[3] != rank_counts[r])
                    continue;
                if (comm_threads_run_with(rank_counts[r], faults, function, size) != STATUS_OK)
                    fail_msg("mesh %d x %d x %d: %s", size[1], size[2], size[3], status_text());
            }
}

static void test_every_pair(void **state) {
    (void)state;
    run_meshes(run_every_pair, NULL);
}

static void test_lists(void **state) {
    (void)state;
    const struct comm_threads_faults late = {.seed = 4, .latency_s = 1e-4};
    run_meshes(run_lists, NULL);
    run_meshes(run_lists, &late);
}

/* ---- plans under way at once, and bits ------------------------------------------------------------------------------ */

enum { AT_ONCE = 3 };

/* Plans over all ranks and over some, started together, advanced and finished in another order. */
static enum status run_at_once(void *context, struct comm *comm) {
    struct member m;
    TRY(member_init(&m, context, comm));
    static const unsigned axes[AT_ONCE] = {MESH_ALL_AXES, MESH_BIT(MESH_EXPERT), MESH_ALL_AXES};
    static const int order[AT_ONCE] = {2, 0, 1};
    struct redistribute_item items[AT_ONCE];
    struct redistribution *plans[AT_ONCE];
    void *staging[AT_ONCE];
    for (int p = 0; p < AT_ONCE; p++) {
        struct redistribute_item item = {.dim_count = 3, .shape = {5, 3, 7}, .wire = DTYPE_F32};
        item.from_layout.axis[MESH_EXPERT] = (struct placement){p == 2 ? PLACEMENT_PARTIAL : PLACEMENT_SHARD, p};
        item.from_layout.axis[MESH_SHARD] = (struct placement){p == 0 ? PLACEMENT_PARTIAL : PLACEMENT_SHARD, p == 1};
        item.to_layout.axis[MESH_SHARD] = item.from_layout.axis[MESH_SHARD];
        if (p == 0)
            item.to_layout.axis[MESH_SHARD] = (struct placement){PLACEMENT_SHARD, 1};
        items[p] = item;
        place_item(&items[p], &m.mesh);
        fill_item(&items[p], &m.mesh);
        TRY(redistribution_create(&m.mesh, p == 1 ? axes_needed(&items[p]) : axes[p], &items[p], 1, &plans[p]));
        staging[p] = take(redistribution_staging_bytes(plans[p]));
    }
    for (int p = 0; p < AT_ONCE; p++)
        TRY(redistribution_start(plans[p], &m.comms[p == 1 ? axes_needed(&items[p]) : axes[p]], m.ops, staging[p]));
    TRY(redistribution_advance(plans[2]));
    for (int i = 0; i < AT_ONCE; i++) {
        int p = order[i];
        TRY(redistribution_finish(plans[p], true));
        TRY(name_case(check_item(&items[p], &m.mesh, true), &items[p], &m.mesh, (unsigned)p));
        free_item(&items[p]);
        free(staging[p]);
        redistribution_destroy(plans[p]);
    }
    member_release(&m);
    return STATUS_OK;
}

static void test_at_once(void **state) {
    (void)state;
    const struct comm_threads_faults late = {.seed = 8, .latency_s = 1e-3};
    run_meshes(run_at_once, NULL);
    run_meshes(run_at_once, &late);
}

static double noise(uint64_t rank, int64_t i) {
    return random_normal(3, rank, (uint64_t)i) * (i % 3 ? 1 : 1e-3);
}

/* Numbers that round: f32 ends, a bf16 wire. All ranks end with the same bits, twice; sums are near enough. */
static enum status run_bits(void *context, struct comm *comm) {
    enum { ROWS = 13, COLUMNS = 37, ELEMENTS = ROWS * COLUMNS };
    static const enum placement_kind kinds[2] = {PLACEMENT_SHARD, PLACEMENT_PARTIAL};
    struct member m;
    TRY(member_init(&m, context, comm));
    for (int turn = 0; turn < 16; turn++) {
        struct redistribute_item item = {.dim_count = 2, .shape = {ROWS, COLUMNS, 1}};
        struct redistribution *plan;
        float results[2][ELEMENTS], all[RANKS_MAX][ELEMENTS];
        item.wire = turn % 2 ? DTYPE_BF16 : DTYPE_F32;
        for (int axis = MESH_REPLICATE; axis < MESH_AXIS_COUNT; axis++)
            item.from_layout.axis[axis] = (struct placement){kinds[turn >> axis & 1], 0};
        place_item(&item, &m.mesh);
        item.from.data = take(tensor_bytes(item.from));
        for (int64_t i = 0; i < tensor_elements(item.from); i++)
            test_set(item.from, i, noise((uint64_t)comm->rank, i));
        TRY(redistribution_create(&m.mesh, MESH_ALL_AXES, &item, 1, &plan));
        for (int twice = 0; twice < 2; twice++) {
            memset(results[twice], 0xFF, sizeof results[twice]);
            item.to.data = results[twice];
            redistribution_bind(plan, 0, item.from, item.to);
            TRY(run_plan(&m, MESH_ALL_AXES, plan, false));
        }
        EXPECT(memcmp(results[0], results[1], sizeof results[0]) == 0);
        TRY(comm_share(comm, results[0], sizeof results[0], all));
        for (int rank = 1; rank < comm->size; rank++)
            EXPECT(memcmp(all[0], all[rank], sizeof all[0]) == 0);
        redistribution_destroy(plan);
        free(item.from.data);
    }
    member_release(&m);
    return STATUS_OK;
}

static void test_bits(void **state) {
    (void)state;
    const struct comm_threads_faults late = {.seed = 9, .latency_s = 1e-4};
    run_meshes(run_bits, NULL);
    run_meshes(run_bits, &late);
}

/* Terms whose sum depends on their order: it is that of the ranks. */
static enum status run_order(void *context, struct comm *comm) {
    struct member m;
    TRY(member_init(&m, context, comm));
    struct redistribute_item item = {.dim_count = 1, .shape = {64, 1, 1}, .wire = DTYPE_F32};
    struct redistribution *plan;
    float from[64], to[64];
    for (int axis = MESH_REPLICATE; axis < MESH_AXIS_COUNT; axis++)
        item.from_layout.axis[axis].kind = PLACEMENT_PARTIAL;
    item.from = tensor_1d(from, DTYPE_F32, 64);
    item.to = tensor_1d(to, DTYPE_F32, 64);
    for (int i = 0; i < 64; i++)
        from[i] = (float)noise((uint64_t)comm->rank, i);
    TRY(redistribution_create(&m.mesh, MESH_ALL_AXES, &item, 1, &plan));
    TRY(run_plan(&m, MESH_ALL_AXES, plan, false));
    for (int i = 0; i < 64; i++) {
        float sum = (float)noise(0, i);
        for (int rank = 1; rank < comm->size; rank++)
            sum += (float)noise((uint64_t)rank, i);
        EXPECT(sum == to[i]);
    }
    redistribution_destroy(plan);
    member_release(&m);
    return STATUS_OK;
}

static void test_order(void **state) {
    (void)state;
    run_meshes(run_order, NULL);
}

/* ---- bytes, places, failures ---------------------------------------------------------------------------------------- */

/* Partial to Replicate: 2(R-1)/R of the bytes. Shard to Replicate: (R-1)/R, and the staging holds what is sent once. */
static void test_bytes(void **state) {
    (void)state;
    enum { R = 4, ELEMENTS = 4096 };
    static const int size[MESH_AXIS_COUNT] = {1, 1, R, 1};
    struct mesh mesh = mesh_make(size, 1);
    struct redistribution *plan;
    struct redistribute_item item = {.dim_count = 2, .shape = {ELEMENTS / 8, 8, 1}, .wire = DTYPE_F32};
    item.from_layout.axis[MESH_SHARD].kind = PLACEMENT_PARTIAL;
    place_item(&item, &mesh);
    assert_int_equal(redistribution_create(&mesh, MESH_BIT(MESH_SHARD), &item, 1, &plan), STATUS_OK);
    assert_int_equal(redistribution_sent_bytes(plan), 2 * (R - 1) * ELEMENTS / R * 4);
    assert_int_equal(redistribution_received_bytes(plan), 2 * (R - 1) * ELEMENTS / R * 4);
    assert_int_equal(redistribution_exchanges(plan), 2);
    redistribution_destroy(plan);
    item.from_layout.axis[MESH_SHARD] = (struct placement){PLACEMENT_SHARD, 0};
    item.wire = DTYPE_BF16;
    place_item(&item, &mesh);
    assert_int_equal(redistribution_create(&mesh, MESH_BIT(MESH_SHARD), &item, 1, &plan), STATUS_OK);
    assert_int_equal(redistribution_sent_bytes(plan), (R - 1) * ELEMENTS / R * 2);
    assert_int_equal(redistribution_staging_bytes(plan), ELEMENTS * 2);
    assert_int_equal(redistribution_exchanges(plan), 1);
    redistribution_destroy(plan);
    item.to_layout = item.from_layout;
    item.from_layout = layout_replicated();
    place_item(&item, &mesh);
    assert_int_equal(redistribution_create(&mesh, MESH_BIT(MESH_SHARD), &item, 1, &plan), STATUS_OK);
    assert_int_equal(redistribution_sent_bytes(plan) + redistribution_exchanges(plan), 0);
    assert_int_equal(redistribution_staging_bytes(plan), 0);
    redistribution_destroy(plan);
}

/* `from` in the memory of `to`, and the other way round: gather, sum for all, sum for the owner, none of it. */
static enum status run_in_place(void *context, struct comm *comm) {
    enum { ROWS = 11, COLUMNS = 5 };
    static const struct {
        enum placement_kind from, to;
    } cases[] = {{PLACEMENT_SHARD, PLACEMENT_REPLICATE},
                 {PLACEMENT_PARTIAL, PLACEMENT_REPLICATE},
                 {PLACEMENT_PARTIAL, PLACEMENT_SHARD},
                 {PLACEMENT_REPLICATE, PLACEMENT_REPLICATE},
                 {PLACEMENT_REPLICATE, PLACEMENT_SHARD}};
    struct member m;
    TRY(member_init(&m, context, comm));
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        struct redistribute_item item = {.dim_count = 2, .shape = {ROWS, COLUMNS, 1}, .wire = DTYPE_F32};
        struct redistribution *plan;
        float whole[ROWS * COLUMNS];
        for (int axis = MESH_REPLICATE; axis < MESH_AXIS_COUNT; axis++) {
            item.from_layout.axis[axis].kind = cases[c].from;
            item.to_layout.axis[axis].kind = cases[c].to;
        }
        place_item(&item, &m.mesh);
        item.from.data = whole + COLUMNS * layout_local_range(&item.from_layout, &m.mesh, 0, ROWS).begin;
        item.to.data = whole + COLUMNS * layout_local_range(&item.to_layout, &m.mesh, 0, ROWS).begin;
        for (int64_t i = 0; i < tensor_elements(item.from); i++)
            test_set(item.from, i, value_at(&item, &m.mesh, whole_index(&item, &item.from_layout, &m.mesh, item.from, i)));
        TRY(redistribution_create(&m.mesh, MESH_ALL_AXES, &item, 1, &plan));
        TRY(run_plan(&m, MESH_ALL_AXES, plan, false));
        TRY(name_case(check_item(&item, &m.mesh, false), &item, &m.mesh, MESH_ALL_AXES));
        redistribution_destroy(plan);
    }
    member_release(&m);
    return STATUS_OK;
}

static void test_in_place(void **state) {
    (void)state;
    run_meshes(run_in_place, NULL);
}

static enum status run_beside_the_dying(void *context, struct comm *comm) {
    (void)context;
    static const int size[MESH_AXIS_COUNT] = {1, 1, 4, 1};
    struct mesh mesh = mesh_make(size, comm->rank);
    struct redistribute_item item = {.dim_count = 1, .shape = {10, 1, 1}, .wire = DTYPE_F32};
    struct redistribution *plan;
    item.from_layout.axis[MESH_SHARD].kind = PLACEMENT_PARTIAL;
    place_item(&item, &mesh);
    fill_item(&item, &mesh);
    TRY(redistribution_create(&mesh, MESH_ALL_AXES, &item, 1, &plan));
    const struct kernel_ops *ops;
    TRY(kernels_choose("auto", &ops));
    void *staging = take(redistribution_staging_bytes(plan));
    enum status status = redistribution_start(plan, comm, ops, staging);
    if (status == STATUS_OK)
        status = redistribution_finish(plan, false);
    redistribution_destroy(plan); /* it is not under way any more */
    free(staging);
    free_item(&item);
    return status;
}

static void test_a_dying_rank(void **state) {
    (void)state;
    for (int call = 1; call <= 4; call++) {
        const struct comm_threads_faults faults = {.dying_rank = 2, .dying_call = call};
        assert_int_equal(comm_threads_run_with(4, &faults, run_beside_the_dying, NULL), STATUS_PEER);
    }
}

/* ---- wrong use ------------------------------------------------------------------------------------------------------ */

static struct mesh pair_mesh(void) {
    static const int size[MESH_AXIS_COUNT] = {1, 1, 2, 2};
    return mesh_make(size, 0);
}

static struct redistribute_item sharded_item(void) {
    struct mesh mesh = pair_mesh();
    struct redistribute_item item = {.dim_count = 1, .shape = {8, 1, 1}, .wire = DTYPE_F32};
    item.from_layout.axis[MESH_SHARD] = item.from_layout.axis[MESH_EXPERT] = (struct placement){PLACEMENT_SHARD, 0};
    place_item(&item, &mesh);
    return item;
}

static void create(struct redistribute_item item, unsigned axes, struct redistribution **plan) {
    struct mesh mesh = pair_mesh();
    enum status status = redistribution_create(&mesh, axes, &item, 1, plan);
    _exit(status == STATUS_OK && *plan ? 0 : 3);
}

static void use_wrong_shape(void) {
    struct redistribution *plan;
    struct redistribute_item item = sharded_item();
    item.from.shape[0]++;
    create(item, MESH_ALL_AXES, &plan);
}

static void use_other_axis_differs(void) {
    struct redistribution *plan;
    create(sharded_item(), MESH_BIT(MESH_SHARD), &plan);
}

/* Shard and expert share dimension 0: gathering along one of them needs parts that other groups have. */
static void use_axes_too_few(void) {
    struct mesh mesh = pair_mesh();
    struct redistribution *plan;
    struct redistribute_item item = sharded_item();
    item.to_layout.axis[MESH_EXPERT] = item.from_layout.axis[MESH_EXPERT];
    place_item(&item, &mesh);
    create(item, MESH_BIT(MESH_SHARD), &plan);
}

static void use_partial_wanted(void) {
    struct redistribution *plan;
    struct redistribute_item item = sharded_item();
    item.to_layout.axis[MESH_SHARD].kind = PLACEMENT_PARTIAL;
    create(item, MESH_ALL_AXES, &plan);
}

static void use_integer_wire(void) {
    struct redistribution *plan;
    struct redistribute_item item = sharded_item();
    item.wire = DTYPE_I32;
    create(item, MESH_ALL_AXES, &plan);
}

static void use_wrong_comm(void) {
    struct mesh mesh = pair_mesh();
    struct redistribution *plan;
    struct redistribute_item item = sharded_item();
    struct comm comm = comm_self();
    char staging[1024];
    if (redistribution_create(&mesh, MESH_ALL_AXES, &item, 1, &plan) == STATUS_OK)
        _exit((int)redistribution_start(plan, &comm, kernels_ref(), staging));
}

static void use_finish_unstarted(void) {
    struct mesh mesh = pair_mesh();
    struct redistribution *plan;
    struct redistribute_item item = sharded_item();
    if (redistribution_create(&mesh, MESH_ALL_AXES, &item, 1, &plan) == STATUS_OK)
        _exit((int)redistribution_finish(plan, false));
}

static void use_accumulate_in_place(void) {
    struct mesh mesh = mesh_single();
    struct redistribution *plan;
    float data[8] = {0};
    struct redistribute_item item = {.dim_count = 1, .shape = {8, 1, 1}, .wire = DTYPE_F32};
    item.from = item.to = tensor_1d(data, DTYPE_F32, 8);
    if (redistribution_create(&mesh, MESH_ALL_AXES, &item, 1, &plan) == STATUS_OK &&
        redistribution_start(plan, NULL, kernels_ref(), NULL) == STATUS_OK)
        _exit((int)redistribution_finish(plan, true));
}

static void use_without_data(void) {
    struct mesh mesh = mesh_single();
    struct redistribution *plan;
    struct redistribute_item item = {.dim_count = 1, .shape = {8, 1, 1}, .wire = DTYPE_F32};
    item.from = item.to = tensor_1d(NULL, DTYPE_F32, 8);
    if (redistribution_create(&mesh, MESH_ALL_AXES, &item, 1, &plan) == STATUS_OK &&
        redistribution_start(plan, NULL, kernels_ref(), NULL) == STATUS_OK)
        _exit((int)redistribution_finish(plan, false));
}

static void use_rightly(void) {
    struct redistribution *plan;
    create(sharded_item(), MESH_BIT(MESH_SHARD) | MESH_BIT(MESH_EXPERT), &plan);
}

/* Whether the function aborts, in a process of its own. */
static bool aborts(void (*use)(void)) {
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        signal(SIGABRT, SIG_DFL);
        (void)!freopen("/dev/null", "w", stderr);
        use();
        _exit(0);
    }
    int how;
    assert_int_equal(waitpid(child, &how, 0), child);
    return WIFSIGNALED(how) && WTERMSIG(how) == SIGABRT;
}

static void test_wrong_use(void **state) {
    (void)state;
    static void (*const uses[])(void) = {use_wrong_shape,  use_other_axis_differs, use_axes_too_few,
                                         use_partial_wanted, use_integer_wire,     use_wrong_comm,
                                         use_finish_unstarted, use_accumulate_in_place, use_without_data};
    assert_false(aborts(use_rightly));
    for (size_t i = 0; i < sizeof uses / sizeof *uses; i++)
        if (!aborts(uses[i]))
            fail_msg("wrong use %zu passes", i);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_wrong_use), cmocka_unit_test(test_bytes),    cmocka_unit_test(test_every_pair),
        cmocka_unit_test(test_lists),     cmocka_unit_test(test_at_once),  cmocka_unit_test(test_bits),
        cmocka_unit_test(test_order),     cmocka_unit_test(test_in_place), cmocka_unit_test(test_a_dying_rank),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
