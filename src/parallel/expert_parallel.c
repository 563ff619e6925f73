/* What lies where, for one exchange. Pairs and rows as in kernels.h (struct pair_plan, struct arrivals):
 *
 *   home (known size)   plan, one a slot        which token goes where
 *                       pairs [S*C,D]           a pair's row goes out of its place here, its answer comes into it
 *   owner (grows)       store, one a slot       arrived tokens [P,D], their rows by expert, gate and up
 *                       work, one for all       wire [N,2], activations, answers [P,D] on their way back
 *
 * Invariants:
 *  1. Source s sends rank d in round j of J the pairs range_part(n, J, j) of its n for d; a pair's rows go with it.
 *  2. Arrived pairs and rows stand one source after the other; behind them this rank's own, which do not travel.
 *  3. Several rounds share one store, that of the slot after the last.
 *  4. held_bytes says for every rank, on every rank alike, a size that its storage has at least; whoever would need more
 *     makes all of them agree on the outcome.
 *  5. From dispatch until arrive, and from combine_backward until arrive_backward, the pairs of others here and what is to
 *     arrive are the transport's; from answer and answer_backward until the end of the round, both again. Between them only
 *     what is this rank's own is touched.
 */
#include "parallel/expert_parallel.h"

#include "base/log.h"
#include "base/memory.h"
#include "tensor/mesh.h"
#include <stdlib.h>

enum { REQUESTS = 3 }; /* the most under way at once, besides the counts */

/* Parts of a round's rows, in their order; the last only where answers follow (split_own). */
enum { PART_OWN, PART_ARRIVED, PART_OWN_REST };

/* Tables of offsets: of the arrived rows, of all own rows, and of both parts of these. */
enum { OFFSETS_ARRIVED, OFFSETS_OWN, OFFSETS_OWN_FIRST, OFFSETS_OWN_REST, OFFSETS_COUNT };

/* Of one rank, in pairs and rows: what one source sends it, or what it gets from all. */
struct amount {
    int64_t pairs, rows;
};

/* Tensors of arrived rows that last until backward. */
struct store {
    struct arena arena;
    struct tensor arrived;            /* compute [P,D] */
    struct tensor offsets;            /* i32 [OFFSETS_COUNT, E_local + 1] */
    struct tensor row_pair, wire_row; /* i32 [N] */
    struct tensor pair_row;           /* i32 [P,C] */
    struct tensor weight;             /* real [N] */
    struct tensor gate, up;           /* compute [N,F] */
};

/* And those that do not. */
struct work {
    struct arena arena;
    struct tensor wire, row_wire;      /* i32 [N,2], [N] */
    struct tensor weight;              /* real [N]: of the arrived rows; in backward its gradient; in order of arrival */
    struct tensor act, dact;           /* compute [N,F] */
    struct tensor results, drows;      /* compute, real [N,D]: the same memory */
    struct tensor drow_weight;         /* real [N] */
    struct tensor answers;             /* compute [P,D] */
};

struct slot {
    struct pair_plan plan;          /* views of the present S */
    struct pair_plan largest;
    int64_t tokens;                 /* S */
    int rounds;
    int32_t *rank_pair, *rank_row;  /* host copies of the plan's [R+1] */
    struct amount *from;            /* [R]: what each source sends this rank */
    int64_t *cuts, *cut_rows;       /* several rounds: [R,J+1] first row of each to a rank; [R,J] rows from a source */
    size_t cut_count;               /* room of each */
    struct store store;
};

struct expert_parallel {
    struct expert_parallel_options options;
    int rank, size;
    int64_t columns;                /* C: most pairs of a token */
    struct arena arena;
    struct tensor pairs;            /* compute [S*C,D] */
    struct tensor wire_weight;      /* real [N]: out with the rows; in backward their gradients come back */
    struct slot *slots;             /* slot_count, and one whose store several rounds share */
    struct work work;
    bool is_packed;                 /* pairs hold all tokens of the exchange that has begun */
    /* Host tables. */
    struct amount *mine, *matrix;   /* [R]: to each rank; [R,R]: of each source to each rank */
    int64_t *held_bytes;            /* [slot_count + 1, R]: of each store, then of work */
    int64_t *send_counts, *send_offsets, *recv_counts, *recv_offsets; /* [R], bytes */
    int32_t *host_offsets;                                            /* [OFFSETS_COUNT, E_local + 1] */
    /* Of the present round: what goes to each rank, struct arrivals of the others, and the places of this rank's own. */
    struct range *to_pairs, *to_rows;               /* [R], [R] */
    int64_t *source_row, *source_pair, *first_pair; /* [R+1], [R+1], [R]; this rank has none among them */
    struct range own_pairs, own_rows;
    struct comm_request counts, requests[REQUESTS];
};

/* ---- memory ---------------------------------------------------------------------------------------------------------- */

static int64_t at_most(int64_t value, int64_t most) {
    return value < most ? value : most;
}

static int64_t experts_of(const struct expert_parallel_options *o, int rank) {
    return range_count(range_part(o->expert_count, o->comm->size, rank));
}

int64_t expert_parallel_local_experts(const struct expert_parallel *x) {
    return experts_of(&x->options, x->rank);
}

static struct tensor take_index(struct arena *arena, int64_t rows, int64_t columns) {
    return layer_take(arena, DTYPE_I32, rows, columns);
}

/* Rows of rank `rank`: what a rank knows about others' storage, too. */
static void take_store(const struct expert_parallel_options *o, int rank, struct amount amount, struct store *s,
                       struct arena *arena) {
    int64_t experts = experts_of(o, rank), columns = at_most(o->choice_count, experts);
    s->arrived = layer_take(arena, o->context.compute, amount.pairs, o->width);
    s->offsets = take_index(arena, OFFSETS_COUNT, experts + 1);
    s->row_pair = take_index(arena, amount.rows, 1);
    s->wire_row = take_index(arena, amount.rows, 1);
    s->pair_row = take_index(arena, amount.pairs, columns);
    s->weight = layer_take(arena, o->context.real, amount.rows, 1);
    s->gate = layer_take(arena, o->context.compute, amount.rows, o->inner);
    s->up = layer_take(arena, o->context.compute, amount.rows, o->inner);
}

static void take_work(const struct expert_parallel_options *o, struct amount amount, struct work *w,
                      struct arena *arena) {
    enum dtype compute = o->context.compute, real = o->context.real;
    w->wire = take_index(arena, amount.rows, 2);
    w->row_wire = take_index(arena, amount.rows, 1);
    w->weight = layer_take(arena, real, amount.rows, 1);
    w->act = layer_take(arena, compute, amount.rows, o->inner);
    w->dact = w->drow_weight = w->drows = tensor_none();
    w->answers = layer_take(arena, compute, amount.pairs, o->width);
    if (!o->training) {
        w->results = layer_take(arena, compute, amount.rows, o->width);
        return;
    }
    w->dact = layer_take(arena, compute, amount.rows, o->inner);
    w->drow_weight = layer_take(arena, real, amount.rows, 1);
    w->drows = layer_take(arena, real, amount.rows, o->width);
    w->results = tensor_2d(w->drows.data, compute, amount.rows, o->width);
}

static size_t store_bytes(const struct expert_parallel_options *o, int rank, struct amount amount) {
    struct store store;
    struct arena counting;
    arena_init_counting(&counting);
    take_store(o, rank, amount, &store, &counting);
    return counting.used;
}

static size_t work_bytes(const struct expert_parallel_options *o, struct amount amount) {
    struct work work;
    struct arena counting;
    arena_init_counting(&counting);
    take_work(o, amount, &work, &counting);
    return counting.used;
}

static void take_plan(const struct expert_parallel_options *o, struct pair_plan *plan, struct arena *arena) {
    int64_t ranks = o->comm->size, s = o->token_count, n = s * o->choice_count;
    int64_t columns = at_most(o->choice_count, ranks);
    *plan = (struct pair_plan){
        .rank_pair = take_index(arena, ranks + 1, 1),
        .rank_row = take_index(arena, ranks + 1, 1),
        .pair_token = take_index(arena, s * columns, 1),
        .pair_row = take_index(arena, s * columns + 1, 1),
        .row_wire = take_index(arena, n, 2),
        .row_slot = take_index(arena, n, 1),
        .slot_row = take_index(arena, s, o->choice_count),
        .token_pair = take_index(arena, s, columns),
    };
}

/* Device memory of known size. */
static void take_known(struct expert_parallel *x, struct arena *arena) {
    const struct expert_parallel_options *o = &x->options;
    int64_t columns = at_most(o->choice_count, o->comm->size);
    for (int i = 0; i < o->slot_count; i++)
        take_plan(o, &x->slots[i].largest, arena);
    x->pairs = layer_take(arena, o->context.compute, o->token_count * columns, o->width);
    x->wire_weight = layer_take(arena, o->context.real, o->token_count * o->choice_count, 1);
}

size_t expert_parallel_plan(const struct expert_parallel_options *options) {
    struct expert_parallel x = {.options = *options};
    struct arena counting;
    x.slots = memory_must((size_t)options->slot_count + 1, sizeof *x.slots);
    arena_init_counting(&counting);
    take_known(&x, &counting);
    free(x.slots);
    return counting.used;
}

static enum status take_tables(struct expert_parallel *x) {
    size_t ranks = (size_t)x->size, slots = (size_t)x->options.slot_count;
    TRY(memory_alloc(&x->slots, slots + 1, sizeof *x->slots));
    for (size_t i = 0; i < slots; i++) {
        TRY(memory_alloc(&x->slots[i].rank_pair, ranks + 1, sizeof(int32_t)));
        TRY(memory_alloc(&x->slots[i].rank_row, ranks + 1, sizeof(int32_t)));
        TRY(memory_alloc(&x->slots[i].from, ranks, sizeof(struct amount)));
    }
    TRY(memory_alloc(&x->mine, ranks, sizeof *x->mine));
    TRY(memory_alloc(&x->matrix, ranks * ranks, sizeof *x->matrix));
    TRY(memory_alloc(&x->held_bytes, (slots + 1) * ranks, sizeof *x->held_bytes));
    TRY(memory_alloc(&x->send_counts, ranks, sizeof(int64_t)));
    TRY(memory_alloc(&x->send_offsets, ranks, sizeof(int64_t)));
    TRY(memory_alloc(&x->recv_counts, ranks, sizeof(int64_t)));
    TRY(memory_alloc(&x->recv_offsets, ranks, sizeof(int64_t)));
    TRY(memory_alloc(&x->source_row, ranks + 1, sizeof(int64_t)));
    TRY(memory_alloc(&x->source_pair, ranks + 1, sizeof(int64_t)));
    TRY(memory_alloc(&x->first_pair, ranks, sizeof(int64_t)));
    TRY(memory_alloc(&x->host_offsets, OFFSETS_COUNT * ((size_t)expert_parallel_local_experts(x) + 1), sizeof(int32_t)));
    TRY(memory_alloc(&x->to_pairs, ranks, sizeof *x->to_pairs));
    return memory_alloc(&x->to_rows, ranks, sizeof *x->to_rows);
}

enum status expert_parallel_create(const struct expert_parallel_options *options, struct expert_parallel **out) {
    struct expert_parallel *x;
    TRY(memory_alloc(&x, 1, sizeof *x));
    x->options = *options;
    x->rank = options->comm->rank;
    x->size = options->comm->size;
    x->columns = at_most(options->choice_count, x->size);
    enum status status = take_tables(x);
    if (status == STATUS_OK)
        status = arena_init(&x->arena, options->device, expert_parallel_plan(options));
    if (status != STATUS_OK) {
        expert_parallel_destroy(x);
        return status;
    }
    take_known(x, &x->arena);
    *out = x;
    return STATUS_OK;
}

static enum status finish(struct expert_parallel *x, enum status status);

void expert_parallel_destroy(struct expert_parallel *x) {
    if (!x)
        return;
    struct comm *host = comm_host(x->options.comm);
    if (finish(x, host->ops->wait(host, &x->counts)) != STATUS_OK)
        log_verbose("expert exchange: ended while rows were under way");
    for (int i = 0; x->slots && i <= x->options.slot_count; i++) {
        arena_release(&x->slots[i].store.arena);
        free(x->slots[i].rank_pair);
        free(x->slots[i].rank_row);
        free(x->slots[i].from);
        free(x->slots[i].cuts);
        free(x->slots[i].cut_rows);
    }
    arena_release(&x->work.arena);
    arena_release(&x->arena);
    void *tables[] = {x->slots, x->mine, x->matrix, x->held_bytes, x->send_counts, x->send_offsets, x->recv_counts,
                      x->recv_offsets, x->source_row, x->source_pair, x->first_pair, x->to_pairs, x->to_rows,
                      x->host_offsets};
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++)
        free(tables[i]);
    free(x);
}

size_t expert_parallel_grown_bytes(const struct expert_parallel *x) {
    size_t bytes = x->work.arena.size;
    for (int i = 0; i <= x->options.slot_count; i++)
        bytes += x->slots[i].store.arena.size;
    return bytes;
}

size_t expert_parallel_bytes(const struct expert_parallel *x) {
    return x->arena.size + expert_parallel_grown_bytes(x);
}

/* An eighth more than is needed, so that it seldom grows again. */
static size_t with_slack(size_t bytes) {
    return bytes + bytes / 8;
}

static enum status grow(const struct expert_parallel *x, struct arena *arena, size_t bytes, const char *what) {
    if (bytes <= arena->size)
        return STATUS_OK;
    arena_release(arena);
    TRY(status_prefix(arena_init(arena, x->options.device, with_slack(bytes)), "rows that arrived from other ranks"));
    log_verbose("expert exchange: rank %d takes %.1f MiB for %s of arrived rows", x->rank,
                (double)arena->size / (1 << 20), what);
    return STATUS_OK;
}

/* Room for `amount` in the store and the work. Collective where is_sure is false: somebody may fail. */
static enum status reserve(struct expert_parallel *x, struct store *store, struct amount amount, bool is_sure) {
    enum status status = grow(x, &store->arena, store_bytes(&x->options, x->rank, amount), "storage");
    if (status == STATUS_OK)
        status = grow(x, &x->work.arena, work_bytes(&x->options, amount), "scratch");
    return is_sure ? status : comm_agree(x->options.comm, status);
}

/* The views of what `amount` takes. */
static void lay_out(struct expert_parallel *x, struct store *store, struct amount amount) {
    arena_rewind(&store->arena, 0);
    arena_rewind(&x->work.arena, 0);
    take_store(&x->options, x->rank, amount, store, &store->arena);
    take_work(&x->options, amount, &x->work, &x->work.arena);
}

/* ---- counts ---------------------------------------------------------------------------------------------------------- */

static void shape_plan(struct expert_parallel *x, struct slot *slot, int64_t tokens) {
    int64_t n = tokens * x->options.choice_count;
    const struct pair_plan *largest = &slot->largest;
    CHECK_OP(tokens, <=, x->options.token_count);
    slot->tokens = tokens;
    slot->plan = (struct pair_plan){
        .rank_pair = largest->rank_pair,
        .rank_row = largest->rank_row,
        .pair_token = tensor_rows(largest->pair_token, 0, tokens * x->columns),
        .pair_row = tensor_rows(largest->pair_row, 0, tokens * x->columns + 1),
        .row_wire = tensor_rows(largest->row_wire, 0, n),
        .row_slot = tensor_rows(largest->row_slot, 0, n),
        .slot_row = tensor_rows(largest->slot_row, 0, tokens),
        .token_pair = tensor_rows(largest->token_pair, 0, tokens),
    };
}

static struct slot *slot_of(struct expert_parallel *x, const struct exchange_call *call) {
    CHECK(call->slot >= 0 && call->slot < x->options.slot_count);
    return &x->slots[call->slot];
}

/* Where a slot's arrived rows are: several rounds share one place. */
static struct store *store_of(struct expert_parallel *x, struct slot *slot) {
    return slot->rounds > 1 ? &x->slots[x->options.slot_count].store : &slot->store;
}

static enum status announce(void *self, const struct exchange_call *call) {
    struct expert_parallel *x = self;
    struct slot *slot = slot_of(x, call);
    struct comm *host = comm_host(x->options.comm);
    size_t bytes = ((size_t)x->size + 1) * sizeof(int32_t);
    shape_plan(x, slot, call->route->expert.shape[0]);
    call->context->ops->route_pairs(call->route->expert, x->options.expert_count, x->size, slot->plan);
    x->options.device->copy_to_host(slot->rank_pair, slot->plan.rank_pair.data, bytes);
    x->options.device->copy_to_host(slot->rank_row, slot->plan.rank_row.data, bytes);
    for (int r = 0; r < x->size; r++) {
        x->mine[r] = (struct amount){slot->rank_pair[r + 1] - slot->rank_pair[r], slot->rank_row[r + 1] - slot->rank_row[r]};
        x->recv_counts[r] = (int64_t)sizeof *x->mine * x->size;
        x->recv_offsets[r] = (int64_t)sizeof *x->mine * x->size * r;
    }
    x->is_packed = false;
    return host->ops->all_gather(host, x->mine, x->matrix, x->recv_counts, x->recv_offsets, &x->counts);
}

static struct amount arriving_at(const struct expert_parallel *x, int rank) {
    struct amount sum = {0, 0};
    for (int source = 0; source < x->size; source++) {
        sum.pairs += x->matrix[source * x->size + rank].pairs;
        sum.rows += x->matrix[source * x->size + rank].rows;
    }
    return sum;
}

/* So many that the arrived rows of each take no more than the limit, and no more than there are pairs of any source for
 * any rank. Rows are taken to be spread evenly over the pairs. */
static int count_rounds(const struct expert_parallel *x) {
    int64_t limit = x->options.limit_bytes, rounds = 1, most = 1;
    for (int rank = 0; rank < x->size && limit > 0; rank++) {
        struct amount amount = arriving_at(x, rank);
        int64_t bytes = (int64_t)(store_bytes(&x->options, rank, amount) + work_bytes(&x->options, amount));
        int64_t needed = (bytes + limit - 1) / limit;
        rounds = needed > rounds ? needed : rounds;
    }
    for (int i = 0; i < x->size * x->size; i++)
        most = x->matrix[i].pairs > most ? x->matrix[i].pairs : most;
    return (int)at_most(rounds, most);
}

/* True where no rank has to grow for an exchange of one round; remembers what all hold after it. */
static bool all_have_room(struct expert_parallel *x, int slot) {
    bool is_sure = true;
    int64_t *held[] = {x->held_bytes + slot * x->size, x->held_bytes + x->options.slot_count * x->size};
    for (int rank = 0; rank < x->size; rank++) {
        struct amount amount = arriving_at(x, rank);
        int64_t needed[] = {(int64_t)store_bytes(&x->options, rank, amount), (int64_t)work_bytes(&x->options, amount)};
        for (int i = 0; i < 2; i++) {
            if (needed[i] <= held[i][rank])
                continue;
            held[i][rank] = (int64_t)with_slack((size_t)needed[i]);
            is_sure = false;
        }
    }
    return is_sure;
}

static int64_t pairs_to(const struct slot *slot, int rank) {
    return slot->rank_pair[rank + 1] - slot->rank_pair[rank];
}

/* Room for the tables of rounds. */
static enum status reserve_cuts(const struct expert_parallel *x, struct slot *slot) {
    size_t count = (size_t)x->size * ((size_t)slot->rounds + 1);
    if (count <= slot->cut_count)
        return STATUS_OK;
    TRY(memory_resize(&slot->cuts, count, sizeof *slot->cuts));
    TRY(memory_resize(&slot->cut_rows, count, sizeof *slot->cut_rows));
    slot->cut_count = count;
    return STATUS_OK;
}

/* Where the rows of each round to each rank begin. */
static void find_cuts(const struct expert_parallel *x, struct slot *slot) {
    for (int r = 0; r < x->size; r++)
        for (int j = 0; j <= slot->rounds; j++) {
            int64_t pairs = pairs_to(slot, r);
            int64_t pair = j < slot->rounds ? range_part(pairs, slot->rounds, j).begin : pairs;
            struct tensor at = tensor_rows(slot->plan.pair_row, slot->rank_pair[r] + pair, 1);
            int32_t row;
            x->options.device->copy_to_host(&row, at.data, sizeof row);
            slot->cuts[r * (slot->rounds + 1) + j] = row;
        }
}

/* Every source tells every rank the rows of each round. */
static enum status exchange_cuts(struct expert_parallel *x, struct slot *slot) {
    struct comm *comm = comm_host(x->options.comm);
    struct comm_request request;
    int64_t *counts = NULL, bytes = slot->rounds * (int64_t)sizeof *counts;
    enum status status = reserve_cuts(x, slot);
    if (status == STATUS_OK)
        status = memory_alloc(&counts, (size_t)(x->size * slot->rounds), sizeof *counts);
    status = comm_agree(comm, status);
    if (status == STATUS_OK) {
        find_cuts(x, slot);
        for (int r = 0; r < x->size; r++) {
            const int64_t *cut = slot->cuts + r * (slot->rounds + 1);
            x->send_counts[r] = bytes;
            x->send_offsets[r] = r * bytes;
            for (int j = 0; j < slot->rounds; j++)
                counts[r * slot->rounds + j] = cut[j + 1] - cut[j];
        }
        status = comm->ops->all_to_all(comm, counts, x->send_counts, x->send_offsets, slot->cut_rows, x->send_counts,
                                       x->send_offsets, &request);
        if (status == STATUS_OK)
            status = comm->ops->wait(comm, &request);
    }
    free(counts);
    return status;
}

/* ---- rounds ---------------------------------------------------------------------------------------------------------- */

static int64_t first_row_to(const struct slot *slot, int rank, int round) {
    return slot->rounds == 1 ? slot->rank_row[rank + round] : slot->cuts[rank * (slot->rounds + 1) + round];
}

/* What goes where in a round: to_pairs, to_rows, source_*, first_pair, own_*. Returns what is here in the end. */
static struct amount find_round(struct expert_parallel *x, const struct slot *slot, int round) {
    for (int r = 0; r < x->size; r++) {
        struct range mine = range_part(pairs_to(slot, r), slot->rounds, round);
        struct range theirs = range_part(slot->from[r].pairs, slot->rounds, round);
        int64_t rows = slot->rounds == 1 ? slot->from[r].rows : slot->cut_rows[r * slot->rounds + round];
        bool arrives = r != x->rank;
        x->to_pairs[r] = (struct range){slot->rank_pair[r] + mine.begin, slot->rank_pair[r] + mine.end};
        x->to_rows[r] = (struct range){first_row_to(slot, r, round), first_row_to(slot, r, round + 1)};
        x->first_pair[r] = theirs.begin;
        x->source_pair[r + 1] = x->source_pair[r] + (arrives ? range_count(theirs) : 0);
        x->source_row[r + 1] = x->source_row[r] + (arrives ? rows : 0);
    }
    int64_t pairs = x->source_pair[x->size], rows = x->source_row[x->size];
    x->own_pairs = (struct range){pairs, pairs + range_count(x->to_pairs[x->rank])};
    x->own_rows = (struct range){rows, rows + range_count(x->to_rows[x->rank])};
    return (struct amount){x->own_pairs.end, x->own_rows.end};
}

static struct tensor rows_of(struct tensor t, struct range range) {
    return tensor_rows(t, range.begin, range_count(range));
}

/* Of a tensor with something for each pair, or each row: what other ranks sent. */
static struct tensor arrived_pairs(const struct expert_parallel *x, struct tensor t) {
    return tensor_rows(t, 0, x->own_pairs.begin);
}

static struct tensor arrived_rows(const struct expert_parallel *x, struct tensor t) {
    return tensor_rows(t, 0, x->own_rows.begin);
}

/* The same of this rank's tokens for its own experts: here, and at home among all that it has for somebody. */
static struct tensor own_pairs(const struct expert_parallel *x, struct tensor t) {
    return rows_of(t, x->own_pairs);
}

static struct tensor own_rows(const struct expert_parallel *x, struct tensor t) {
    return rows_of(t, x->own_rows);
}

static struct tensor own_pairs_at_home(const struct expert_parallel *x, struct tensor t) {
    return rows_of(t, x->to_pairs[x->rank]);
}

static struct tensor own_rows_at_home(const struct expert_parallel *x, struct tensor t) {
    return rows_of(t, x->to_rows[x->rank]);
}

/* Whether a thing of the wire is a pair or a row, and which way it goes. */
enum unit { PAIRS, ROWS };
enum way { TO_EXPERTS, TO_TOKENS };

/* Start to move a round's things between their places at home and where they arrived; what stays on its rank is left
 * out. */
static enum status start(struct expert_parallel *x, enum way way, enum unit unit, struct tensor home,
                         struct tensor here, int request) {
    const struct comm_ops *ops = x->options.comm->ops;
    const struct range *to = unit == PAIRS ? x->to_pairs : x->to_rows;
    const int64_t *from = unit == PAIRS ? x->source_pair : x->source_row;
    int64_t bytes = home.shape[1] * (int64_t)dtype_size(home.dtype);
    for (int r = 0; r < x->size; r++) {
        x->send_counts[r] = r == x->rank ? 0 : range_count(to[r]) * bytes;
        x->send_offsets[r] = to[r].begin * bytes;
        x->recv_counts[r] = (from[r + 1] - from[r]) * bytes;
        x->recv_offsets[r] = from[r] * bytes;
    }
    if (way == TO_EXPERTS)
        return ops->all_to_all(x->options.comm, home.data, x->send_counts, x->send_offsets, here.data, x->recv_counts,
                               x->recv_offsets, &x->requests[request]);
    return ops->all_to_all(x->options.comm, here.data, x->recv_counts, x->recv_offsets, home.data, x->send_counts,
                           x->send_offsets, &x->requests[request]);
}

/* Wait for all that was started; the first failure. Buffers are nobody else's afterwards. */
static enum status finish(struct expert_parallel *x, enum status status) {
    for (int i = 0; i < REQUESTS; i++) {
        enum status one = x->options.comm->ops->wait(x->options.comm, &x->requests[i]);
        status = status == STATUS_OK ? one : status;
    }
    return status;
}

/* A round's rows of `from` [S,D] for other ranks, into their places. */
static void pack_round(struct expert_parallel *x, const struct kernel_ops *ops, const struct slot *slot,
                       struct tensor from) {
    for (int r = 0; r < x->size; r++)
        if (r != x->rank)
            ops->gather_rows(from, rows_of(slot->plan.pair_token, x->to_pairs[r]), rows_of(x->pairs, x->to_pairs[r]));
}

static void pack_range(struct expert_parallel *x, const struct kernel_ops *ops, const struct slot *slot,
                       struct tensor from, struct range range) {
    ops->gather_rows(from, rows_of(slot->plan.pair_token, range), rows_of(x->pairs, range));
}

/* The same for all rounds at once. */
static void pack_all(struct expert_parallel *x, const struct kernel_ops *ops, const struct slot *slot,
                     struct tensor from) {
    pack_range(x, ops, slot, from, (struct range){0, slot->rank_pair[x->rank]});
    pack_range(x, ops, slot, from, (struct range){slot->rank_pair[x->rank + 1], slot->rank_pair[x->size]});
    x->is_packed = true;
}

/* Rows of this rank's own pairs straight to their places among those that arrive. */
static void keep_own(struct expert_parallel *x, const struct kernel_ops *ops, const struct slot *slot,
                     struct tensor from, struct tensor here) {
    ops->gather_rows(from, own_pairs_at_home(x, slot->plan.pair_token), own_pairs(x, here));
}

/* The sums of each arrived pair's rows, on their way home. */
static enum status send_answers(struct expert_parallel *x, const struct kernel_ops *ops, const struct store *store,
                                struct tensor rows) {
    ops->combine_rows(arrived_rows(x, rows), arrived_pairs(x, store->pair_row), arrived_pairs(x, x->work.answers), false);
    return start(x, TO_TOKENS, PAIRS, x->pairs, x->work.answers, 0);
}

static void sum_own(struct expert_parallel *x, const struct kernel_ops *ops, const struct store *store,
                    struct tensor rows) {
    ops->combine_rows(own_rows(x, rows), own_pairs(x, store->pair_row), own_pairs_at_home(x, x->pairs), false);
}

/* y = or += the answers to all pairs. */
static void collect(struct expert_parallel *x, const struct kernel_ops *ops, const struct slot *slot, struct tensor y,
                    bool accumulate) {
    ops->combine_rows(tensor_rows(x->pairs, 0, slot->rank_pair[x->size]), slot->plan.token_pair, y, accumulate);
    x->is_packed = false;
}

/* ---- the table ------------------------------------------------------------------------------------------------------- */

/* The largest of the rounds. */
static struct amount most_of_a_round(struct expert_parallel *x, const struct slot *slot) {
    struct amount most = {0, 0};
    for (int round = 0; round < slot->rounds; round++) {
        struct amount amount = find_round(x, slot, round);
        most.pairs = amount.pairs > most.pairs ? amount.pairs : most.pairs;
        most.rows = amount.rows > most.rows ? amount.rows : most.rows;
    }
    return most;
}

static enum status begin(void *self, const struct exchange_call *call, struct tensor tokens, int *rounds) {
    struct expert_parallel *x = self;
    struct slot *slot = slot_of(x, call);
    pack_all(x, call->context->ops, slot, tokens);
    struct comm *host = comm_host(x->options.comm);
    TRY(host->ops->wait(host, &x->counts));
    for (int source = 0; source < x->size; source++)
        slot->from[source] = x->matrix[source * x->size + x->rank];
    *rounds = slot->rounds = count_rounds(x);
    bool is_sure = slot->rounds == 1 && all_have_room(x, call->slot);
    if (slot->rounds > 1)
        TRY(exchange_cuts(x, slot));
    return reserve(x, store_of(x, slot), most_of_a_round(x, slot), is_sure);
}

static void lend_scratch(const struct expert_parallel *x, struct expert_scratch *scratch) {
    const struct work *w = &x->work;
    *scratch = (struct expert_scratch){w->act, w->dact, w->results, w->drows, w->drow_weight};
}

static struct tensor offsets_of(const struct store *store, int which) {
    return tensor_rows(tensor_reshape_2d(store->offsets, tensor_elements(store->offsets), 1),
                       which * store->offsets.shape[1], store->offsets.shape[1]);
}

/* Who is first, which row is whose, among this rank's own: nothing of it travels. To sort_arrivals they are the second of
 * two sources, the first of which has pairs, those of all others, but no rows. */
static void sort_own(struct expert_parallel *x, const struct kernel_ops *ops, const struct slot *slot,
                     const struct store *store) {
    const struct work *w = &x->work;
    const int64_t first_row[] = {0, 0, range_count(x->own_rows)};
    const int64_t place[] = {0, x->own_pairs.begin, x->own_pairs.end}, first_pair[] = {0, x->first_pair[x->rank]};
    ops->sort_arrivals((struct arrivals){2, first_row, place, first_pair, own_rows_at_home(x, slot->plan.row_wire),
                                         offsets_of(store, OFFSETS_OWN), own_rows(x, w->row_wire),
                                         own_rows(x, store->wire_row), own_rows(x, store->row_pair), store->pair_row});
    ops->gather_scalars(own_rows_at_home(x, x->wire_weight), own_rows(x, w->row_wire), own_rows(x, store->weight));
}

/* The same of what others send, while their tokens travel. */
static enum status sort_arrived(struct expert_parallel *x, const struct kernel_ops *ops, const struct store *store) {
    const struct work *w = &x->work;
    struct comm *comm = x->options.comm;
    TRY(comm->ops->wait(comm, &x->requests[0]));
    ops->sort_arrivals((struct arrivals){x->size, x->source_row, x->source_pair, x->first_pair, arrived_rows(x, w->wire),
                                         offsets_of(store, OFFSETS_ARRIVED), arrived_rows(x, w->row_wire),
                                         arrived_rows(x, store->wire_row), arrived_rows(x, store->row_pair),
                                         arrived_pairs(x, store->pair_row)});
    TRY(comm->ops->wait(comm, &x->requests[1]));
    ops->gather_scalars(arrived_rows(x, w->weight), arrived_rows(x, w->row_wire), arrived_rows(x, store->weight));
    return STATUS_OK;
}

/* Own rows in two parts, at the border between two experts that is nearest to half of them: the groups of the products are
 * then no smaller. Returns the rows of the first part. */
static int64_t split_own(struct expert_parallel *x, const struct store *store) {
    int64_t experts = expert_parallel_local_experts(x), border = 0, total = range_count(x->own_rows);
    struct tensor offsets = offsets_of(store, OFFSETS_OWN);
    int32_t *own = x->host_offsets, *first = own + experts + 1, *rest = first + experts + 1;
    x->options.device->copy_to_host(own, offsets.data, tensor_bytes(offsets));
    for (int64_t e = 1; e <= experts; e++)
        if (llabs(2 * own[e] - total) < llabs(2 * own[border] - total))
            border = e;
    for (int64_t e = 0; e <= experts; e++) {
        first[e] = own[e < border ? e : border];
        rest[e] = own[e > border ? e : border] - own[border];
    }
    x->options.device->copy_from_host(offsets_of(store, OFFSETS_OWN_FIRST).data, first, tensor_bytes(offsets));
    x->options.device->copy_from_host(offsets_of(store, OFFSETS_OWN_REST).data, rest, tensor_bytes(offsets));
    return own[border];
}

/* Own rows while the others' travel here, then these; with answers the own rows in halves, the second while the answers to
 * others, and theirs, travel home. */
static struct expert_rows parts_of(struct expert_parallel *x, const struct store *store, struct tensor data,
                                   bool in_halves) {
    struct expert_rows rows = {.data = data, .rows = store->row_pair, .weight = store->weight, .part_count = 2};
    rows.parts[PART_OWN] = (struct expert_part){x->own_rows, offsets_of(store, OFFSETS_OWN)};
    rows.parts[PART_ARRIVED] = (struct expert_part){{0, x->own_rows.begin}, offsets_of(store, OFFSETS_ARRIVED)};
    if (!in_halves)
        return rows;
    int64_t border = x->own_rows.begin + split_own(x, store);
    rows.part_count = 3;
    rows.parts[PART_OWN] = (struct expert_part){{x->own_rows.begin, border}, offsets_of(store, OFFSETS_OWN_FIRST)};
    rows.parts[PART_OWN_REST] = (struct expert_part){{border, x->own_rows.end}, offsets_of(store, OFFSETS_OWN_REST)};
    return rows;
}

static enum status dispatch(void *self, const struct exchange_call *call, int round, struct tensor tokens,
                            struct expert_rows *rows, struct expert_saved *saved, struct expert_scratch *scratch) {
    struct expert_parallel *x = self;
    struct slot *slot = slot_of(x, call);
    struct store *store = store_of(x, slot);
    const struct kernel_ops *ops = call->context->ops;
    lay_out(x, store, find_round(x, slot, round));
    if (round == 0)
        ops->gather_scalars(call->route->weight, slot->plan.row_slot,
                            tensor_rows(x->wire_weight, 0, tensor_elements(slot->plan.row_slot)));
    if (!x->is_packed)
        pack_round(x, ops, slot, tokens);
    enum status status = start(x, TO_EXPERTS, ROWS, slot->plan.row_wire, x->work.wire, 0);
    if (status == STATUS_OK)
        status = start(x, TO_EXPERTS, ROWS, x->wire_weight, x->work.weight, 1);
    if (status == STATUS_OK)
        status = start(x, TO_EXPERTS, PAIRS, x->pairs, store->arrived, 2);
    if (status != STATUS_OK)
        return finish(x, status);
    keep_own(x, ops, slot, tokens, store->arrived);
    sort_own(x, ops, slot, store);
    *rows = parts_of(x, store, store->arrived, !call->inner_only);
    *saved = (struct expert_saved){store->gate, store->up, store->weight};
    lend_scratch(x, scratch);
    return STATUS_OK;
}

static enum status arrive(void *self, const struct exchange_call *call, int round, int part) {
    struct expert_parallel *x = self;
    (void)round;
    if (part != PART_ARRIVED)
        return STATUS_OK;
    return finish(x, sort_arrived(x, call->context->ops, store_of(x, slot_of(x, call))));
}

static enum status answer(void *self, const struct exchange_call *call, int round, int part, struct tensor results) {
    struct expert_parallel *x = self;
    (void)round;
    if (part != PART_ARRIVED)
        return STATUS_OK;
    return send_answers(x, call->context->ops, store_of(x, slot_of(x, call)), results);
}

static enum status combine(void *self, const struct exchange_call *call, int round, struct tensor results,
                           struct tensor base, struct tensor y) {
    struct expert_parallel *x = self;
    struct slot *slot = slot_of(x, call);
    sum_own(x, call->context->ops, store_of(x, slot), results);
    if (round == slot->rounds - 1)
        call->context->ops->cast(base, y); /* while answers travel */
    TRY(finish(x, STATUS_OK));
    if (round == slot->rounds - 1)
        collect(x, call->context->ops, slot, y, true);
    return STATUS_OK;
}

static enum status combine_backward(void *self, const struct exchange_call *call, int round, struct tensor dy,
                                    struct expert_rows *drows, struct expert_scratch *scratch) {
    struct expert_parallel *x = self;
    struct slot *slot = slot_of(x, call);
    const struct store *store = store_of(x, slot);
    arena_rewind(&x->work.arena, 0);
    take_work(&x->options, find_round(x, slot, round), &x->work, &x->work.arena);
    pack_round(x, call->context->ops, slot, dy);
    x->is_packed = false;
    enum status status = start(x, TO_EXPERTS, PAIRS, x->pairs, x->work.answers, 0);
    if (status != STATUS_OK)
        return finish(x, status);
    keep_own(x, call->context->ops, slot, dy, x->work.answers);
    *drows = parts_of(x, store, x->work.answers, false);
    lend_scratch(x, scratch);
    return STATUS_OK;
}

static enum status arrive_backward(void *self, const struct exchange_call *call, int round, int part) {
    (void)call;
    (void)round;
    return part == PART_ARRIVED ? finish(self, STATUS_OK) : STATUS_OK;
}

static enum status answer_backward(void *self, const struct exchange_call *call, int round, int part,
                                   struct tensor drows, struct tensor drow_weight) {
    struct expert_parallel *x = self;
    const struct store *store = store_of(x, slot_of(x, call));
    const struct kernel_ops *ops = call->context->ops;
    (void)round;
    if (part != PART_ARRIVED)
        return STATUS_OK;
    ops->gather_scalars(arrived_rows(x, drow_weight), arrived_rows(x, store->wire_row), arrived_rows(x, x->work.weight));
    enum status status = start(x, TO_TOKENS, ROWS, x->wire_weight, x->work.weight, 1);
    if (status == STATUS_OK)
        status = send_answers(x, ops, store, drows);
    return status == STATUS_OK ? status : finish(x, status);
}

static enum status dispatch_backward(void *self, const struct exchange_call *call, int round, struct tensor drows,
                                     struct tensor drow_weight, struct tensor dtokens, struct tensor dweight) {
    struct expert_parallel *x = self;
    struct slot *slot = slot_of(x, call);
    const struct store *store = store_of(x, slot);
    const struct kernel_ops *ops = call->context->ops;
    ops->gather_scalars(own_rows(x, drow_weight), own_rows(x, store->wire_row), own_rows_at_home(x, x->wire_weight));
    sum_own(x, ops, store, drows);
    TRY(finish(x, STATUS_OK));
    if (round < slot->rounds - 1)
        return STATUS_OK;
    collect(x, ops, slot, dtokens, false);
    ops->gather_scalars(tensor_rows(x->wire_weight, 0, tensor_elements(slot->plan.row_slot)), slot->plan.slot_row,
                        dweight);
    return STATUS_OK;
}

const struct expert_exchange_ops *expert_parallel_ops(void) {
    static const struct expert_exchange_ops ops = {.brings_storage = true,
                                                   .announce = announce,
                                                   .begin = begin,
                                                   .dispatch = dispatch,
                                                   .arrive = arrive,
                                                   .answer = answer,
                                                   .combine = combine,
                                                   .combine_backward = combine_backward,
                                                   .arrive_backward = arrive_backward,
                                                   .answer_backward = answer_backward,
                                                   .dispatch_backward = dispatch_backward};
    return &ops;
}
