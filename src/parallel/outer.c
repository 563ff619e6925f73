/* Invariants.
 *  1. At most one fragment is between its sending and its mixing: mixing >= 0. While it travels, message and arrived
 *     are the transport's.
 *  2. global and momentum have the same bits on all islands whenever nothing travels: they are written from messages
 *     alone, by operations that every processor rounds alike, in the order of the islands.
 *  3. A message is a header, then for each row of the fragment that meets in this round the part of this rank's
 *     differences that its replica sends: whole blocks of the codec. Sizes follow from the plan and the mesh, never
 *     from the data.
 */
#include "parallel/outer.h"

#include "base/clock.h"
#include "base/hash.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/threads.h"
#include "device/fingerprint.h"
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

enum { SWAP_BYTES = 32 << 10 };

struct header {
    int64_t step, fragment, format, bytes;
    uint64_t global_hash; /* see last_hash */
    double stats[OUTER_STATS];
    double elements, loss;
};

/* What the ranks of an island add up about a fragment; the squares of each island's differences follow. */
enum { SUM_SQUARES, SUM_FLUSHED, SUM_ELEMENTS, SUM_COUNT };

/* ---- what is in a message ---------------------------------------------------------------------------------------- */

static bool meets(const struct outer_options *o, const struct parameter *row, int fragment, int64_t step) {
    if (outer_plan_fragment_of(&o->plan, parameter_group(row)) != fragment)
        return false;
    return !row->is_expert || outer_plan_round(&o->plan, fragment, step) % o->plan.experts_every == 0;
}

/* Of n differences those that replica `replica` sends. */
static struct range piece_of(int64_t n, const struct mesh *mesh, int replica) {
    struct range blocks = range_part(outer_block_count(n), mesh->size[MESH_REPLICATE], replica);
    int64_t begin = blocks.begin * OUTER_BLOCK, end = blocks.end * OUTER_BLOCK;
    return (struct range){begin < n ? begin : n, end < n ? end : n};
}

static struct tensor piece_tensor(struct tensor whole, struct range piece) {
    char *data = whole.data;
    return tensor_1d(data + piece.begin * (int64_t)sizeof(float), DTYPE_F32, range_count(piece));
}

static int64_t own_elements(const struct model *model, const struct mesh *mesh, int row) {
    struct sharding sharding = {*mesh, model->sharding.zero};
    struct layout own = sharding_own_layout(&sharding, &model->table.rows[row]);
    struct parameter_part part = sharding_part(&sharding, &model->table.rows[row], &own);
    return parameter_part_elements(&part);
}

/* Of the message that the rank which sees this mesh sends, if it were replica `replica`. */
static int64_t message_bytes(const struct model *model, const struct outer_options *o, const struct mesh *mesh,
                             int replica, int fragment, int64_t step) {
    int64_t bytes = (int64_t)sizeof(struct header);
    for (int i = 0; i < model->table.count; i++)
        if (meets(o, &model->table.rows[i], fragment, step)) {
            struct range piece = piece_of(own_elements(model, mesh, i), mesh, replica);
            bytes += (int64_t)outer_wire_bytes(o->wire, range_count(piece));
        }
    return bytes;
}

/* The largest message of replica `replica`: of rounds in which experts meet. */
static int64_t most_bytes(const struct model *model, const struct outer_options *o, int replica) {
    int64_t most = 0;
    for (int fragment = 0; fragment < o->plan.fragment_count; fragment++) {
        int64_t step = outer_plan_step(&o->plan, fragment, o->plan.experts_every);
        int64_t bytes = message_bytes(model, o, &model->sharding.mesh, replica, fragment, step);
        most = bytes > most ? bytes : most;
    }
    return most;
}

int64_t outer_rank_bytes(const struct model *model, const struct outer_options *o, int64_t step) {
    const struct mesh *mesh = &model->sharding.mesh;
    int fragment = outer_plan_sends(&o->plan, step);
    if (fragment < 0)
        return 0;
    return (mesh->size[MESH_ISLAND] - 1) *
           message_bytes(model, o, mesh, mesh->coordinate[MESH_REPLICATE], fragment, step);
}

int64_t outer_island_bytes(const struct model *model, const struct outer_options *o, int64_t step) {
    const struct mesh *mesh = &model->sharding.mesh;
    int fragment = outer_plan_sends(&o->plan, step), island_ranks = mesh_group_size(mesh, RANKS_BATCH_AXES);
    int64_t bytes = 0;
    for (int r = 0; r < island_ranks && fragment >= 0; r++) {
        struct mesh seen = mesh_make(mesh->size, r);
        bytes += message_bytes(model, o, &seen, seen.coordinate[MESH_REPLICATE], fragment, step);
    }
    return (mesh->size[MESH_ISLAND] - 1) * bytes;
}

/* ---- memory ------------------------------------------------------------------------------------------------------ */

static struct tensor take_like(struct tensor own, struct arena *arena) {
    own.data = arena_take_blocks(arena, tensor_bytes(own));
    return own;
}

/* Without arrays to note them in they are counted all the same. */
static void take_tensors(struct outer *outer, struct arena *arena) {
    const struct model *m = outer->model;
    const struct mesh *mesh = &m->sharding.mesh;
    int64_t islands = mesh->size[MESH_ISLAND], replicas = mesh->size[MESH_REPLICATE], all = 0, n = model_largest_own_row(m);
    for (int i = 0; i < m->table.count; i++) {
        struct tensor global = take_like(m->own_weight[i], arena), momentum = take_like(m->own_weight[i], arena);
        if (outer->global) {
            outer->global[i] = global;
            outer->momentum[i] = momentum;
        }
    }
    outer->sum = tensor_1d(arena_take(arena, (size_t)n * sizeof(float)), DTYPE_F32, n);
    outer->stats = tensor_1d(arena_take(arena, OUTER_STATS * sizeof(double)), DTYPE_F64, OUTER_STATS);
    for (int q = 0; q < replicas; q++)
        all += most_bytes(m, &outer->options, q);
    int64_t mine = most_bytes(m, &outer->options, mesh->coordinate[MESH_REPLICATE]);
    outer->message = arena_take(arena, (size_t)mine);
    outer->arrived = arena_take(arena, (size_t)(islands * mine));
    outer->shared = replicas > 1 ? arena_take(arena, (size_t)(islands * all)) : outer->arrived;
}

size_t outer_memory_bytes(const struct model *model, const struct outer_options *options) {
    struct outer probe = {.options = *options, .model = (struct model *)model};
    struct arena counting;
    arena_init_counting(&counting);
    take_tensors(&probe, &counting);
    return counting.used;
}

static enum status take_memory(struct outer *outer) {
    const struct model *m = outer->model;
    size_t rows = (size_t)m->table.count, islands = (size_t)m->sharding.mesh.size[MESH_ISLAND];
    size_t ranks = islands + (size_t)m->sharding.mesh.size[MESH_REPLICATE];
    TRY(memory_alloc(&outer->global, rows, sizeof *outer->global));
    TRY(memory_alloc(&outer->momentum, rows, sizeof *outer->momentum));
    TRY(memory_alloc(&outer->counts, 2 * ranks, sizeof *outer->counts));
    TRY(memory_alloc(&outer->bytes, (size_t)m->sharding.mesh.size[MESH_REPLICATE], sizeof *outer->bytes));
    TRY(memory_alloc(&outer->norms, islands + SUM_COUNT, sizeof *outer->norms));
    outer->memory_bytes = outer_memory_bytes(m, &outer->options);
    TRY(arena_init(&outer->arena, m->device, outer->memory_bytes));
    take_tensors(outer, &outer->arena);
    return STATUS_OK;
}

enum status outer_create(struct model *model, struct ranks *ranks, struct traffic *traffic,
                         const struct outer_options *options, struct outer **out) {
    struct outer *outer;
    CHECK(model->context.real == DTYPE_F32);
    TRY(memory_alloc(&outer, 1, sizeof *outer));
    *outer = (struct outer){.options = *options, .model = model, .ranks = ranks, .traffic = traffic, .mixing = -1};
    enum status status = take_memory(outer);
    if (status != STATUS_OK)
        outer_destroy(outer);
    else
        *out = outer;
    return status;
}

void outer_destroy(struct outer *outer) {
    if (!outer)
        return;
    if (outer->travels && outer->ranks->islands.ops->wait(&outer->ranks->islands, &outer->request) != STATUS_OK)
        log_verbose("a fragment was on its way when a rank was lost"); /* what failed first has been told */
    arena_release(&outer->arena);
    free(outer->global);
    free(outer->momentum);
    free(outer->counts);
    free(outer->bytes);
    free(outer->norms);
    free(outer);
}

/* ---- sending ----------------------------------------------------------------------------------------------------- */

static const struct mesh *mesh_of(const struct outer *outer) {
    return &outer->model->sharding.mesh;
}

/* Rows of the fragment that is between sending and mixing. */
static bool is_mixing(const struct outer *outer, int row) {
    return meets(&outer->options, &outer->model->table.rows[row], outer->mixing, outer->sent_step);
}

static void encode(struct outer *outer, struct header *header) {
    struct model *m = outer->model;
    const struct kernel_ops *ops = m->context.ops;
    char *wire = outer->message;
    wire += sizeof *header;
    ops->fill(outer->stats, 0);
    for (int i = 0; i < m->table.count; i++) {
        if (!is_mixing(outer, i))
            continue;
        struct range piece =
            piece_of(tensor_elements(m->own_weight[i]), mesh_of(outer), mesh_of(outer)->coordinate[MESH_REPLICATE]);
        ops->outer_encode(piece_tensor(outer->global[i], piece), piece_tensor(m->own_weight[i], piece),
                          outer->options.wire, wire, outer->stats);
        wire += outer_wire_bytes(outer->options.wire, range_count(piece));
        header->elements += (double)range_count(piece);
    }
    header->bytes = wire - (char *)outer->message;
    m->device->copy_to_host(header->stats, outer->stats.data, sizeof header->stats);
    m->device->copy_from_host(outer->message, header, sizeof *header);
}

enum status outer_send(struct outer *outer, int64_t step, double loss) {
    struct comm *islands = &outer->ranks->islands;
    CHECK(outer->mixing < 0);
    outer->mixing = outer_plan_sends(&outer->options.plan, step);
    CHECK(outer->mixing >= 0);
    outer->sent_step = step;
    outer->has_report = false;
    struct header header = {.step = step,
                            .fragment = outer->mixing,
                            .format = outer->options.wire,
                            .global_hash = outer->last_hash,
                            .loss = loss};
    encode(outer, &header);
    int64_t *counts = outer->counts, *offsets = counts + islands->size;
    for (int q = 0; q < mesh_of(outer)->size[MESH_REPLICATE]; q++)
        outer->bytes[q] = message_bytes(outer->model, &outer->options, mesh_of(outer), q, outer->mixing, step);
    for (int m = 0; m < islands->size; m++) {
        counts[m] = header.bytes;
        offsets[m] = m * header.bytes;
    }
    TRY(islands->ops->all_gather(islands, outer->message, outer->arrived, counts, offsets, &outer->request));
    outer->travels = true;
    return STATUS_OK;
}

/* ---- receiving --------------------------------------------------------------------------------------------------- */

static const char *message_at(const struct outer *outer, int island, int replica) {
    const char *at = outer->shared;
    for (int q = 0; q < replica; q++)
        at += mesh_of(outer)->size[MESH_ISLAND] * outer->bytes[q];
    return at + island * outer->bytes[replica];
}

/* What each replica received, to all of them. */
static enum status share_pieces(struct outer *outer) {
    struct comm *replicas = &outer->ranks->replicas;
    int islands = mesh_of(outer)->size[MESH_ISLAND];
    int64_t *counts = outer->counts, *offsets = counts + replicas->size, total = 0;
    struct comm_request request;
    if (replicas->size == 1)
        return STATUS_OK;
    for (int q = 0; q < replicas->size; q++) {
        counts[q] = islands * outer->bytes[q];
        offsets[q] = total;
        total += counts[q];
    }
    TRY(replicas->ops->all_gather(replicas, outer->arrived, outer->shared, counts, offsets, &request));
    return replicas->ops->wait(replicas, &request);
}

static struct header header_at(const struct outer *outer, int island, int replica) {
    struct header header;
    outer->model->device->copy_to_host(&header, message_at(outer, island, replica), sizeof header);
    return header;
}

/* Whether an island stands where this one stands, and may be added up; the hash as island 0 has it. */
static enum status check_header(const struct outer *outer, int island, const struct header *h, int64_t bytes,
                                uint64_t hash) {
    if (h->step != outer->sent_step || h->fragment != outer->mixing || h->format != (int64_t)outer->options.wire ||
        h->bytes != bytes)
        return status_fail(
            STATUS_NUMERIC,
            "island %d sent fragment %lld of step %lld, %lld bytes in wire format %lld, where %d of step %lld, %lld "
            "bytes in %d were expected: start all islands with the same command and data",
            island, (long long)h->fragment, (long long)h->step, (long long)h->bytes, (long long)h->format,
            outer->mixing, (long long)outer->sent_step, (long long)bytes, (int)outer->options.wire);
    if (h->global_hash != hash)
        return status_fail(
            STATUS_NUMERIC,
            "step %lld: island %d holds other global weights than island 0 after the outer step before (%016" PRIx64
            ", %016" PRIx64 "): the memory, processor or program of one is not to be trusted",
            (long long)h->step, island, h->global_hash, hash);
    if (h->stats[OUTER_REFUSED] > 0)
        return status_fail(STATUS_NUMERIC, "step %lld: %.0f weights of island %d have become infinite or not a number",
                           (long long)h->step, h->stats[OUTER_REFUSED], island);
    return STATUS_OK;
}

static enum status check_headers(const struct outer *outer) {
    const struct mesh *mesh = mesh_of(outer);
    for (int island = 0; island < mesh->size[MESH_ISLAND]; island++)
        for (int q = 0; q < mesh->size[MESH_REPLICATE]; q++) {
            struct header header = header_at(outer, island, q);
            TRY(check_header(outer, island, &header, outer->bytes[q], header_at(outer, 0, q).global_hash));
        }
    return STATUS_OK;
}

/* Adds up row i of all islands' messages from replica q, which lie `before` bytes behind the headers; the same for
 * their squares. Returns the bytes that it has of the row. */
static int64_t add_piece(struct outer *outer, int row, int q, int64_t before) {
    const struct kernel_ops *ops = outer->model->context.ops;
    const struct outer_options *o = &outer->options;
    struct range piece = piece_of(tensor_elements(outer->global[row]), mesh_of(outer), q);
    double dots[3];
    for (int island = 0; island < mesh_of(outer)->size[MESH_ISLAND]; island++) {
        const char *wire = message_at(outer, island, q) + sizeof(struct header) + before;
        ops->outer_decode_add(wire, o->wire, piece_tensor(outer->sum, piece), island > 0);
        ops->fill(outer->stats, 0);
        ops->outer_dot(wire, wire, o->wire, range_count(piece), outer->stats);
        outer->model->device->copy_to_host(dots, outer->stats.data, sizeof dots);
        outer->norms[SUM_COUNT + island] += dots[1];
    }
    return (int64_t)outer_wire_bytes(o->wire, range_count(piece));
}

static double sum_of_squares(struct outer *outer, struct tensor of) {
    const struct model *m = outer->model;
    double squares;
    struct tensor one = tensor_1d(outer->stats.data, DTYPE_F64, 1);
    m->context.ops->fill(one, 0);
    m->context.ops->sum_squares(of, one);
    m->device->copy_to_host(&squares, one.data, sizeof squares);
    return squares;
}

static void update(struct outer *outer) {
    const struct model *m = outer->model;
    const struct mesh *mesh = mesh_of(outer);
    struct outer_settings settings = {mesh->size[MESH_ISLAND], outer->options.lr, outer->options.momentum};
    int64_t *before = outer->counts; /* of each replica's messages what was read */
    for (int q = 0; q < mesh->size[MESH_REPLICATE]; q++)
        before[q] = 0;
    for (int i = 0; i < m->table.count; i++) {
        int64_t n = tensor_elements(outer->global[i]);
        if (!is_mixing(outer, i) || n == 0)
            continue;
        for (int q = 0; q < mesh->size[MESH_REPLICATE]; q++)
            before[q] += add_piece(outer, i, q, before[q]);
        struct range all = {0, n};
        struct tensor sum = piece_tensor(outer->sum, all);
        m->context.ops->outer_update(sum, settings, piece_tensor(outer->global[i], all),
                                     piece_tensor(outer->momentum[i], all));
        outer->norms[SUM_SQUARES] += sum_of_squares(outer, sum);
    }
}

/* Of the rows that were just updated. */
static uint64_t hash_global(const struct outer *outer) {
    uint64_t hash = 1;
    for (int i = 0; i < outer->model->table.count; i++)
        if (is_mixing(outer, i)) {
            uint64_t row =
                device_fingerprint(outer->model->device, outer->global[i].data, tensor_bytes(outer->global[i]));
            hash = hash_bytes(&row, sizeof row, hash);
        }
    return hash;
}

/* Over all pairs of islands: sum of a.b over sum of |a| |b|. */
static double mean_cosine(double sum_squares, const double *squares, int count) {
    double own = 0, norms = 0;
    for (int m = 0; m < count; m++) {
        own += squares[m];
        norms += sqrt(squares[m]);
    }
    return count > 1 && norms * norms > own ? (sum_squares - own) / (norms * norms - own) : NAN;
}

static enum status fill_report(struct outer *outer) {
    const struct mesh *mesh = mesh_of(outer);
    struct outer_report *r = &outer->report;
    int islands = mesh->size[MESH_ISLAND];
    double *sums = outer->norms;
    r->loss = 0;
    for (int island = 0; island < islands; island++)
        for (int q = 0; q < mesh->size[MESH_REPLICATE]; q++) {
            struct header header = header_at(outer, island, q);
            sums[SUM_FLUSHED] += header.stats[OUTER_FLUSHED];
            sums[SUM_ELEMENTS] += header.elements;
            r->loss += header.loss / (islands * mesh->size[MESH_REPLICATE]);
        }
    TRY(comm_sum_f64(&outer->ranks->shards, sums, SUM_COUNT + islands));
    r->fragment = outer->mixing;
    r->sent_step = outer->sent_step;
    r->gradient_norm = sqrt(sums[SUM_SQUARES]) / islands;
    r->cosine = mean_cosine(sums[SUM_SQUARES], sums + SUM_COUNT, islands);
    r->flushed = sums[SUM_ELEMENTS] > 0 ? sums[SUM_FLUSHED] / sums[SUM_ELEMENTS] : 0;
    r->sent_bytes = outer_island_bytes(outer->model, &outer->options, outer->sent_step);
    outer->has_report = true;
    return STATUS_OK;
}

static enum status receive(struct outer *outer) {
    double begin = clock_seconds();
    outer->travels = false;
    TRY(outer->ranks->islands.ops->wait(&outer->ranks->islands, &outer->request));
    outer->report.waited_s = clock_seconds() - begin;
    return share_pieces(outer);
}

enum status outer_settle(struct outer *outer) {
    if (!outer->travels)
        return STATUS_OK;
    TRY(receive(outer));
    TRY(comm_agree(&outer->ranks->batch, check_headers(outer)));
    for (int i = 0; i < SUM_COUNT + mesh_of(outer)->size[MESH_ISLAND]; i++)
        outer->norms[i] = 0;
    update(outer);
    outer->last_hash = hash_global(outer);
    return fill_report(outer);
}

enum status outer_drop(struct outer *outer) {
    if (outer->travels)
        TRY(receive(outer));
    outer->mixing = -1;
    outer->has_report = false;
    return STATUS_OK;
}

/* ---- applying ---------------------------------------------------------------------------------------------------- */

static void mix(struct outer *outer) {
    const struct model *m = outer->model;
    for (int i = 0; i < m->table.count; i++) {
        struct range all = {0, tensor_elements(outer->global[i])};
        if (is_mixing(outer, i))
            m->context.ops->outer_mix(piece_tensor(outer->global[i], all), outer->options.mix,
                                      piece_tensor(m->own_weight[i], all));
    }
}

enum status outer_apply(struct outer *outer) {
    if (outer->mixing < 0)
        return STATUS_OK;
    TRY(outer_settle(outer));
    mix(outer);
    for (int group = GROUP_FIRST; group < outer->model->table.block_count; group++)
        if (outer_plan_fragment_of(&outer->options.plan, group) == outer->mixing)
            TRY(traffic_refresh_group(outer->traffic, group));
    outer->mixing = -1;
    return STATUS_OK;
}

void outer_reset(struct outer *outer) {
    const struct model *m = outer->model;
    CHECK(!outer->travels);
    for (int i = 0; i < m->table.count; i++) {
        struct range all = {0, tensor_elements(outer->global[i])};
        m->context.ops->outer_mix(piece_tensor(m->own_weight[i], all), 0, piece_tensor(outer->global[i], all));
        m->context.ops->fill(outer->momentum[i], 0);
    }
    outer->mixing = -1;
    outer->has_report = false;
    outer->last_hash = 0;
}

void outer_resume(struct outer *outer, const struct outer_plan *before, int64_t step) {
    struct outer_plan plan = outer->options.plan;
    CHECK(!outer->travels);
    outer->has_report = false;
    outer->last_hash = 0;
    outer->mixing = before->sync_steps > 0 ? outer_plan_under_way(before, step, &outer->sent_step) : -1;
    if (outer->mixing < 0 || outer_plan_equal(before, &plan))
        return;
    outer->options.plan = *before;
    mix(outer);
    outer->options.plan = plan;
    outer->mixing = -1;
}

/* ---- the same everywhere ----------------------------------------------------------------------------------------- */

enum status outer_verify(struct outer *outer) {
    const struct model *m = outer->model;
    struct comm *islands = &outer->ranks->islands;
    uint64_t mine = 1, *all = NULL;
    CHECK(!outer->travels);
    for (int i = 0; i < m->table.count; i++) {
        uint64_t row[] = {device_fingerprint(m->device, outer->global[i].data, tensor_bytes(outer->global[i])),
                          device_fingerprint(m->device, outer->momentum[i].data, tensor_bytes(outer->momentum[i]))};
        mine = hash_bytes(row, sizeof row, mine);
    }
    enum status status = comm_agree(outer->ranks->world, memory_alloc(&all, (size_t)islands->size, sizeof *all));
    if (status != STATUS_OK) {
        free(all);
        return status;
    }
    status = comm_share(islands, &mine, sizeof mine, all);
    for (int island = 1; island < islands->size && status == STATUS_OK; island++)
        if (all[island] != all[0])
            status =
                status_fail(STATUS_NUMERIC,
                            "island %d holds other global weights than island 0 (%016" PRIx64 ", %016" PRIx64
                            "): they began with other weights, or the memory or processor of one is not to be trusted",
                            island, all[island], all[0]);
    free(all);
    return status == STATUS_PEER ? status : comm_agree(outer->ranks->world, status);
}

struct swapping {
    const struct device *device;
    char *a, *b;
    int64_t bytes;
};

static void swap_chunk(void *context, int64_t index) {
    const struct swapping *s = context;
    char a[SWAP_BYTES], b[SWAP_BYTES];
    int64_t begin = index * SWAP_BYTES, left = s->bytes - begin;
    size_t size = (size_t)(left < SWAP_BYTES ? left : SWAP_BYTES);
    s->device->copy_to_host(a, s->a + begin, size);
    s->device->copy_to_host(b, s->b + begin, size);
    s->device->copy_from_host(s->a + begin, b, size);
    s->device->copy_from_host(s->b + begin, a, size);
}

enum status outer_swap(struct outer *outer) {
    const struct model *m = outer->model;
    for (int i = 0; i < m->table.count; i++) {
        struct swapping s = {m->device, m->own_weight[i].data, outer->global[i].data,
                             (int64_t)tensor_bytes(m->own_weight[i])};
        parallel_for((s.bytes + SWAP_BYTES - 1) / SWAP_BYTES, swap_chunk, &s);
    }
    return traffic_refresh(outer->traffic);
}
