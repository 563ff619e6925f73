/* A layer of experts divided over ranks that are threads, forward and backward, against the same layer with all experts
 * and the concatenated tokens in one process. Two layers run between each other's forward and backward, as in a model. */
#include "parallel/expert_parallel.h"

#include "base/memory.h"
#include "base/random.h"
#include "base/threads.h"
#include "comm/threads/comm_threads.h"
#include "tensor/mesh.h"
#include "tensor/tensor_testing.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <cmocka.h>

enum { RANKS_MAX = 8, LAYERS = 2, WIDTH = 20, INNER = 13, ARENA_BYTES = 16 << 20 };

/* ---- problems -------------------------------------------------------------------------------------------------------- */

enum routing {
    ROUTE_RANDOM,
    ROUTE_ONE_EXPERT,   /* every token's first choice is one expert, the others follow it */
    ROUTE_SPREAD,       /* a token's experts as far apart as they can be: on different ranks */
    ROUTE_ALTERNATING,  /* halves of the tokens prefer opposite ends */
    ROUTE_OWN,          /* to the experts of the token's own rank, as far as it has enough */
    ROUTE_AWAY,         /* to those of the next rank */
    ROUTING_COUNT
};

struct problem {
    const struct kernel_ops *ops;
    enum dtype compute, real;
    int ranks;
    int64_t tokens[RANKS_MAX]; /* of each rank */
    int64_t experts, choices;
    enum routing routing;
    int64_t limit_bytes;
    uint64_t seed;
};

static int64_t all_tokens(const struct problem *p) {
    int64_t sum = 0;
    for (int r = 0; r < p->ranks; r++)
        sum += p->tokens[r];
    return sum;
}

static int64_t first_token(const struct problem *p, int rank) {
    int64_t first = 0;
    for (int r = 0; r < rank; r++)
        first += p->tokens[r];
    return first;
}

static int rank_of(const struct problem *p, int64_t s) {
    int rank = 0;
    while (s >= first_token(p, rank + 1))
        rank++;
    return rank;
}

/* Choice k of token s: all different for one token. */
static int32_t choice(const struct problem *p, int layer, int64_t s, int64_t k) {
    int64_t e = p->experts, stride = e / p->choices, all = all_tokens(p);
    uint64_t stream = p->seed * 100 + (uint64_t)(layer * 50);
    switch (p->routing) {
    case ROUTE_RANDOM:
        return (int32_t)random_permute(stream, (uint64_t)s, (uint64_t)e, (uint64_t)k);
    case ROUTE_ONE_EXPERT:
        return (int32_t)((e / 2 + k) % e);
    case ROUTE_SPREAD:
        return (int32_t)((s + k * stride) % e);
    case ROUTE_OWN:
        return (int32_t)((range_part(e, p->ranks, rank_of(p, s)).begin + k) % e);
    case ROUTE_AWAY:
        return (int32_t)((range_part(e, p->ranks, (rank_of(p, s) + 1) % p->ranks).begin + k) % e);
    default:
        return (int32_t)(2 * s < all ? k : e - 1 - k);
    }
}

/* Rows first .. of a tensor whose numbers depend on their place in the whole. */
static void fill(struct tensor t, uint64_t seed, uint64_t stream, int64_t first_row, double scale) {
    int64_t columns = t.shape[1] * t.shape[2];
    for (int64_t i = 0; i < tensor_elements(t); i++)
        test_set(t, i, scale * random_normal(seed, stream, (uint64_t)(first_row * columns + i)));
}

/* ---- one rank's layers ----------------------------------------------------------------------------------------------- */

/* What a run leaves behind; of the tokens and experts of one rank, or of all. */
struct outcome {
    struct tensor y, dtokens, dweight;       /* [S,D], [S,D], [S,K] */
    struct tensor dgate, dup, ddown;         /* [E,F,D], [E,F,D], [E,D,F] */
};

struct layer {
    struct tensor tokens, base, dy;
    struct route route;
    struct expert_weights weights;
    struct expert_gradients gradients;
    struct expert_rows rows;
    struct expert_saved saved;
    struct outcome outcome;
    int rounds;
};

/* Rank 0 has computed with its own rows so often; the others start no transfer of tokens before. */
struct turns {
    atomic_int taken;
    bool holds;
};

struct member {
    const struct problem *problem;
    struct turns *turns; /* or NULL */
    int rank, turn;
    struct layer_context context;
    const struct expert_exchange_ops *exchange;
    void *self;
    int64_t first_token, token_count;
    struct range experts;
    struct arena arena;
    struct expert_scratch scratch;
    struct layer layers[LAYERS];
};

static struct tensor take(struct member *m, enum dtype dtype, int64_t d0, int64_t d1, int64_t d2) {
    struct tensor t = tensor_make(NULL, dtype, d2 > 1 ? 3 : 2, d0, d1, d2);
    t.data = arena_take(&m->arena, tensor_bytes(t));
    return t;
}

static struct packed take_packed(struct member *m, uint64_t stream, int64_t out, int64_t in) {
    struct tensor w = take(m, m->context.compute, range_count(m->experts), out, in);
    struct packed packed = {.dtype = m->context.compute, .groups = w.shape[0], .out = out, .in = in, .backward = true};
    w.dim_count = 3;
    fill(w, m->problem->seed, stream, m->experts.begin, 0.4);
    packed.data = arena_take(&m->arena, m->context.ops->packed_bytes(packed));
    m->context.ops->pack(w, packed);
    return packed;
}

static struct tensor take_gradient(struct member *m, int64_t out, int64_t in) {
    struct tensor t = take(m, m->context.real, range_count(m->experts), out, in);
    t.dim_count = 3;
    memset(t.data, 0, tensor_bytes(t));
    return t;
}

static void take_route(struct member *m, struct layer *layer, int index) {
    const struct problem *p = m->problem;
    int64_t s = m->token_count, k = p->choices, n = s * k;
    struct route *route = &layer->route;
    *route = (struct route){take(m, DTYPE_I32, s, k, 1),
                            take(m, m->context.real, s, k, 1),
                            take(m, DTYPE_I32, p->experts, 1, 1),
                            take(m, DTYPE_I32, p->experts + 1, 1, 1),
                            take(m, DTYPE_I32, n, 1, 1),
                            take(m, DTYPE_I32, n, 1, 1),
                            take(m, DTYPE_I32, s, k, 1)};
    for (int64_t i = 0; i < n; i++)
        ((int32_t *)route->expert.data)[i] = choice(p, index, m->first_token + i / k, i % k);
    fill(route->weight, p->seed, (uint64_t)(index * 10 + 3), m->first_token, 1);
    m->context.ops->route_sort(route->expert, route->count, route->offsets, route->row_slot, route->row_token,
                               route->slot_row);
}

static void take_layer(struct member *m, int index) {
    const struct problem *p = m->problem;
    struct layer *layer = &m->layers[index];
    int64_t s = m->token_count;
    uint64_t stream = (uint64_t)(index * 10);
    enum dtype compute = m->context.compute, real = m->context.real;
    layer->tokens = take(m, compute, s, WIDTH, 1);
    layer->base = take(m, real, s, WIDTH, 1);
    layer->dy = take(m, compute, s, WIDTH, 1);
    fill(layer->tokens, p->seed, stream + 1, m->first_token, 1);
    fill(layer->dy, p->seed, stream + 2, m->first_token, 1);
    take_route(m, layer, index);
    layer->weights = (struct expert_weights){take_packed(m, stream + 4, INNER, WIDTH), take_packed(m, stream + 5, INNER, WIDTH),
                                             take_packed(m, stream + 6, WIDTH, INNER)};
    layer->gradients = (struct expert_gradients){take_gradient(m, INNER, WIDTH), take_gradient(m, INNER, WIDTH),
                                                 take_gradient(m, WIDTH, INNER), true};
    layer->outcome = (struct outcome){take(m, real, s, WIDTH, 1), take(m, real, s, WIDTH, 1), take(m, real, s, p->choices, 1),
                                      layer->gradients.gate, layer->gradients.up, layer->gradients.down};
    fill(layer->base, p->seed, stream + 7, m->first_token, 1);
}

/* All layers of the tokens and experts given; scratch and saved are the arena's for the local form. */
static enum status member_init(struct member *m, const struct problem *p, int64_t first, int64_t count,
                               struct range experts) {
    *m = (struct member){.problem = p, .context = {p->ops, p->compute, p->real}, .exchange = expert_exchange_local(),
                         .first_token = first, .token_count = count, .experts = experts};
    TRY(arena_init(&m->arena, device_cpu(), ARENA_BYTES));
    struct expert_dims dims = {count * p->choices, WIDTH, INNER};
    expert_scratch_take(&m->scratch, &m->context, &dims, false, &m->arena);
    for (int i = 0; i < LAYERS; i++) {
        take_layer(m, i);
        expert_saved_take(&m->layers[i].saved, &m->context, &dims, false, &m->arena);
    }
    return STATUS_OK;
}

/* With turns: before a rank starts to send its tokens. */
static enum status await_turn(struct member *m) {
    for (int i = 0; m->turns && m->turns->holds && m->rank > 0 && atomic_load(&m->turns->taken) <= m->turn; i++) {
        if (i == 10000)
            return status_fail(STATUS_FORMAT, "rank 0 waits for others before it works on its own rows");
        nanosleep(&(struct timespec){0, 1000000}, NULL);
    }
    m->turn++;
    return STATUS_OK;
}

/* After the work on a part. */
static void take_turn(const struct member *m, int part) {
    if (m->turns && m->rank == 0 && part == 0)
        atomic_fetch_add(&m->turns->taken, 1);
}

/* As model/block.c runs them. */
static enum status layer_forward(struct member *m, int index) {
    struct layer *l = &m->layers[index];
    struct exchange_call call = {&m->context, &l->route, index, false};
    TRY(m->exchange->announce(m->self, &call));
    TRY(m->exchange->begin(m->self, &call, l->tokens, &l->rounds));
    for (int round = 0; round < l->rounds; round++) {
        TRY(await_turn(m));
        TRY(m->exchange->dispatch(m->self, &call, round, l->tokens, &l->rows, &l->saved, &m->scratch));
        for (int i = 0; i < l->rows.part_count; i++) {
            TRY(m->exchange->arrive(m->self, &call, round, i));
            experts_forward(&m->context, &l->weights, &l->rows, &l->rows.parts[i], &l->saved, &m->scratch);
            take_turn(m, i);
            TRY(m->exchange->answer(m->self, &call, round, i, m->scratch.results));
        }
        TRY(m->exchange->combine(m->self, &call, round, m->scratch.results, l->base, l->outcome.y));
    }
    return STATUS_OK;
}

/* Gate and up once more, of a round that was not kept. */
static enum status round_again(struct member *m, struct layer *l, const struct exchange_call *call, int round) {
    struct exchange_call again = *call;
    again.inner_only = true;
    TRY(m->exchange->dispatch(m->self, &again, round, l->tokens, &l->rows, &l->saved, &m->scratch));
    for (int i = 0; i < l->rows.part_count; i++) {
        TRY(m->exchange->arrive(m->self, &again, round, i));
        experts_inner_forward(&m->context, &l->weights, &l->rows, &l->rows.parts[i], &l->saved);
    }
    return STATUS_OK;
}

static enum status round_backward(struct member *m, struct layer *l, const struct exchange_call *call, int round) {
    struct expert_rows drows;
    TRY(await_turn(m));
    TRY(m->exchange->combine_backward(m->self, call, round, l->dy, &drows, &m->scratch));
    for (int i = 0; i < drows.part_count; i++) {
        const struct expert_part *part = &drows.parts[i];
        TRY(m->exchange->arrive_backward(m->self, call, round, i));
        experts_backward_rows(&m->context, &l->weights, &l->rows, &drows, part, &l->saved, &m->scratch, &l->gradients);
        take_turn(m, i);
        TRY(m->exchange->answer_backward(m->self, call, round, i, m->scratch.drows, m->scratch.drow_weight));
        experts_inner_backward(&m->context, &l->rows, part, &l->saved, &l->gradients);
    }
    return m->exchange->dispatch_backward(m->self, call, round, m->scratch.drows, m->scratch.drow_weight,
                                          l->outcome.dtokens, l->outcome.dweight);
}

static enum status layer_backward(struct member *m, int index) {
    struct layer *l = &m->layers[index];
    struct exchange_call call = {&m->context, &l->route, index, false};
    for (int round = 0; round < l->rounds; round++) {
        if (l->rounds > 1)
            TRY(round_again(m, l, &call, round));
        TRY(round_backward(m, l, &call, round));
    }
    return STATUS_OK;
}

static enum status member_run(struct member *m) {
    for (int i = 0; i < LAYERS; i++)
        TRY(layer_forward(m, i));
    for (int i = LAYERS - 1; i >= 0; i--)
        TRY(layer_backward(m, i));
    return STATUS_OK;
}

/* ---- all ranks ------------------------------------------------------------------------------------------------------- */

/* A device that has no more memory after so many pieces; each rank is a thread. */
static _Thread_local int pieces_left;

static enum status failing_alloc(void **out, size_t bytes) {
    if (pieces_left-- <= 0)
        return status_fail(STATUS_MEMORY, "no memory for %zu bytes", bytes);
    return device_cpu()->alloc(out, bytes);
}

static struct device failing_device(void) {
    struct device device = *device_cpu();
    device.alloc = failing_alloc;
    return device;
}

struct run {
    const struct problem *problem;
    int failing_rank, pieces; /* its device has so many pieces of memory; 0: no limit */
    struct member members[RANKS_MAX];
    struct turns turns;
    struct comm_count counts[RANKS_MAX];
    int64_t grown_bytes[RANKS_MAX], known_bytes[RANKS_MAX];
    int repeats; /* more than 1: the buffers have been used before */
};

static enum status run_rank(void *context, struct comm *comm) {
    struct run *run = context;
    const struct problem *p = run->problem;
    struct member *m = &run->members[comm->rank];
    struct expert_parallel *exchange;
    struct device device = failing_device();
    pieces_left = run->pieces && comm->rank == run->failing_rank ? run->pieces : 1 << 20;
    struct expert_parallel_options options = {comm, &device, {p->ops, p->compute, p->real}, p->tokens[comm->rank],
                                              WIDTH, INNER, p->experts, p->choices, LAYERS, true, p->limit_bytes};
    TRY(expert_parallel_create(&options, &exchange));
    enum status status = STATUS_OK;
    for (int i = 0; i < run->repeats && status == STATUS_OK; i++) {
        arena_release(&m->arena);
        status = member_init(m, p, first_token(p, comm->rank), p->tokens[comm->rank],
                             range_part(p->experts, comm->size, comm->rank));
        m->exchange = expert_parallel_ops();
        m->self = exchange;
        m->turns = &run->turns;
        m->rank = comm->rank;
        struct comm_count before = comm->count;
        if (status == STATUS_OK)
            status = member_run(m);
        run->counts[comm->rank] = (struct comm_count){comm->count.sent_bytes - before.sent_bytes,
                                                      comm->count.received_bytes - before.received_bytes,
                                                      comm->count.calls - before.calls};
    }
    run->grown_bytes[comm->rank] = (int64_t)expert_parallel_grown_bytes(exchange);
    run->known_bytes[comm->rank] = (int64_t)(expert_parallel_bytes(exchange) - expert_parallel_grown_bytes(exchange));
    if (run->known_bytes[comm->rank] != (int64_t)expert_parallel_plan(&options))
        status = status_fail(STATUS_FORMAT, "the plan is not what was taken");
    expert_parallel_destroy(exchange);
    return status;
}

static void run_with(struct run *run, const struct problem *p, int repeats, const struct comm_threads_faults *faults,
                     bool in_turns) {
    memset(run, 0, sizeof *run);
    run->problem = p;
    run->repeats = repeats;
    run->turns.holds = in_turns;
    if (comm_threads_run_with(p->ranks, faults, run_rank, run) != STATUS_OK)
        fail_msg("%d ranks, %d of %d experts: %s", p->ranks, (int)p->choices, (int)p->experts, status_text());
}

static void run_all(struct run *run, const struct problem *p, int repeats) {
    run_with(run, p, repeats, NULL, false);
}

static void run_release(struct run *run) {
    for (int r = 0; r < run->problem->ranks; r++)
        arena_release(&run->members[r].arena);
}

/* ---- comparing ------------------------------------------------------------------------------------------------------- */

struct difference {
    double error, norm;
};

/* Of a rank's tensor and the rows from `first` on of the whole. */
static void compare(struct difference *d, struct tensor part, struct tensor whole, int64_t first) {
    int64_t columns = whole.shape[1] * whole.shape[2];
    for (int64_t i = 0; i < tensor_elements(part); i++) {
        double expected = test_get(whole, first * columns + i), error = test_get(part, i) - expected;
        d->error += error * error;
        d->norm += expected * expected;
        if (isnan(error))
            d->error = INFINITY;
    }
}

static void expect_close(const struct problem *p, const char *what, struct difference d, double tolerance) {
    if (sqrt(d.error) <= tolerance * sqrt(d.norm))
        return;
    fail_msg("%s, %d ranks, %d of %d experts, routing %d, limit %d: %s is off by %.3g", p->ops->name, p->ranks,
             (int)p->choices, (int)p->experts, (int)p->routing, (int)p->limit_bytes, what, sqrt(d.error / d.norm));
}

static void compare_with_one(const struct run *run, double tolerance) {
    static const char *const names[6] = {"y", "dtokens", "dweight", "dgate", "dup", "ddown"};
    const struct problem *p = run->problem;
    struct member one;
    assert_int_equal(member_init(&one, p, 0, all_tokens(p), (struct range){0, p->experts}), STATUS_OK);
    assert_int_equal(member_run(&one), STATUS_OK);
    for (int i = 0; i < LAYERS; i++) {
        struct difference d[6] = {{0, 0}};
        for (int r = 0; r < p->ranks; r++) {
            const struct member *m = &run->members[r];
            const struct outcome *part = &m->layers[i].outcome, *whole = &one.layers[i].outcome;
            compare(&d[0], part->y, whole->y, m->first_token);
            compare(&d[1], part->dtokens, whole->dtokens, m->first_token);
            compare(&d[2], part->dweight, whole->dweight, m->first_token);
            compare(&d[3], part->dgate, whole->dgate, m->experts.begin);
            compare(&d[4], part->dup, whole->dup, m->experts.begin);
            compare(&d[5], part->ddown, whole->ddown, m->experts.begin);
        }
        for (int t = 0; t < 6; t++)
            expect_close(p, names[t], d[t], tolerance);
    }
    arena_release(&one.arena);
}

static bool same_bits(struct tensor a, struct tensor b) {
    return tensor_same_shape(a, b) && memcmp(a.data, b.data, tensor_bytes(a)) == 0;
}

/* Two runs of one problem; weight gradients may be summed in another order. */
static void expect_same(const struct run *a, const struct run *b, bool gradients_too, double tolerance) {
    for (int r = 0; r < a->problem->ranks; r++)
        for (int i = 0; i < LAYERS; i++) {
            const struct outcome *x = &a->members[r].layers[i].outcome, *y = &b->members[r].layers[i].outcome;
            assert_true(same_bits(x->y, y->y) && same_bits(x->dtokens, y->dtokens) && same_bits(x->dweight, y->dweight));
            if (gradients_too)
                assert_true(same_bits(x->dgate, y->dgate) && same_bits(x->dup, y->dup) && same_bits(x->ddown, y->ddown));
            struct difference d = {0, 0};
            compare(&d, x->dgate, y->dgate, 0);
            compare(&d, x->dup, y->dup, 0);
            compare(&d, x->ddown, y->ddown, 0);
            expect_close(b->problem, "a weight gradient", d, tolerance);
        }
}

/* ---- tests ----------------------------------------------------------------------------------------------------------- */

static const int rank_counts[] = {1, 2, 3, 4, 6, 8};
static const int64_t expert_counts[] = {1, 5, 6, 8};
enum { RANK_CASES = sizeof rank_counts / sizeof *rank_counts, EXPERT_CASES = sizeof expert_counts / sizeof *expert_counts };

/* Uneven, some without any. */
static void set_tokens(struct problem *p, uint64_t seed, int64_t most) {
    for (int r = 0; r < p->ranks; r++) {
        uint64_t bits = random_bits(seed, 77, (uint64_t)r);
        p->tokens[r] = bits % 4 == 0 && p->ranks > 1 ? 0 : 1 + (int64_t)((bits >> 8) % (uint64_t)most);
    }
}

static void check_all(const struct kernel_ops *ops, enum dtype compute, enum dtype real, double tolerance, int64_t most) {
    uint64_t seed = 1;
    for (int a = 0; a < RANK_CASES; a++)
        for (int b = 0; b < EXPERT_CASES; b++)
            for (int64_t choices = 1; choices <= expert_counts[b]; choices++, seed++) {
                struct problem p = {.ops = ops, .compute = compute, .real = real, .ranks = rank_counts[a],
                                    .experts = expert_counts[b], .choices = choices, .seed = seed,
                                    .routing = seed % ROUTING_COUNT, .limit_bytes = seed % 3 == 1 ? 3000 : 0};
                struct run run;
                set_tokens(&p, seed, most);
                run_all(&run, &p, 1);
                compare_with_one(&run, tolerance);
                run_release(&run);
            }
}

static void test_double(void **state) {
    (void)state;
    check_all(kernels_ref(), DTYPE_F64, DTYPE_F64, 1e-12, 11);
}

static const struct kernel_ops *fast_ops(void) {
    const struct kernel_ops *ops;
    assert_int_equal(kernels_choose("auto", &ops), STATUS_OK);
    return ops;
}

static void test_single(void **state) {
    (void)state;
    check_all(fast_ops(), DTYPE_F32, DTYPE_F32, 3e-6, 90);
}

static void test_bf16(void **state) {
    (void)state;
    check_all(fast_ops(), DTYPE_BF16, DTYPE_F32, 2e-2, 40);
}

static struct problem larger_problem(int ranks, enum routing routing) {
    struct problem p = {.ops = fast_ops(), .compute = DTYPE_F32, .real = DTYPE_F32, .ranks = ranks, .experts = 6,
                        .choices = 3, .routing = routing, .seed = 5};
    set_tokens(&p, 3, 60);
    p.tokens[0] = 60;
    return p;
}

/* Rounds change nothing but the order in which weight gradients are summed; memory stays below the limit. */
static void test_limit(void **state) {
    (void)state;
    static const int64_t limits[] = {1, 5000, 20000, 50000, 1 << 30};
    for (int routing = 0; routing < ROUTING_COUNT; routing++)
        for (int ranks = 1; ranks <= 4; ranks++) {
            struct problem p = larger_problem(ranks, (enum routing)routing), limited = p;
            struct run whole, parts;
            run_all(&whole, &p, 1);
            for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
                limited.limit_bytes = limits[i];
                run_all(&parts, &limited, 1);
                bool one_round = parts.members[0].layers[0].rounds == 1 && parts.members[0].layers[1].rounds == 1;
                assert_true(limits[i] > 5000 || !one_round);
                expect_same(&whole, &parts, one_round, 1e-6);
                for (int r = 0; r < ranks && limits[i] > 20000; r++) /* rows of rounds are nearly even, and an eighth is slack */
                    assert_true(one_round || parts.grown_bytes[r] < limits[i] + limits[i] / 2);
                run_release(&parts);
            }
            run_release(&whole);
        }
}

/* The same run twice; and once more in buffers that another has left behind. */
static void test_bitwise(void **state) {
    (void)state;
    for (int routing = 0; routing < ROUTING_COUNT; routing++)
        for (int ranks = 1; ranks <= 4; ranks++) {
            struct problem p = larger_problem(ranks, (enum routing)routing);
            p.limit_bytes = routing % 2 ? 30000 : 0;
            struct run a, b;
            run_all(&a, &p, 1);
            run_all(&b, &p, 2);
            expect_same(&a, &b, true, 0);
            for (int r = 0; r < ranks; r++)
                assert_int_equal(a.grown_bytes[r], b.grown_bytes[r]);
            run_release(&a);
            run_release(&b);
        }
}

/* Rows that arrive long after the others were worked on: the same bits as from those that are there at once. What a buffer
 * holds in their place is another step's. */
static void test_late(void **state) {
    (void)state;
    const struct comm_threads_faults faults = {.seed = 9, .latency_s = 4e-3};
    for (int routing = 0; routing < ROUTING_COUNT; routing++)
        for (int ranks = 2; ranks <= 4; ranks++) {
            struct problem p = larger_problem(ranks, (enum routing)routing);
            p.limit_bytes = routing % 2 && ranks == 3 ? 50000 : 0;
            struct run soon, late;
            run_all(&soon, &p, 1);
            run_with(&late, &p, 1, &faults, false);
            expect_same(&soon, &late, true, 0);
            run_release(&soon);
            run_release(&late);
        }
}

/* Rank 0 works on its own rows, forward and backward, before any other rank has sent one. */
static void test_own_rows_first(void **state) {
    (void)state;
    for (int routing = 0; routing < ROUTING_COUNT; routing++)
        for (int ranks = 2; ranks <= 4; ranks++) {
            struct problem p = larger_problem(ranks, (enum routing)routing);
            struct run free, held;
            run_all(&free, &p, 1);
            run_with(&held, &p, 1, NULL, true);
            assert_int_equal(held.turns.taken, 2 * LAYERS);
            expect_same(&free, &held, true, 0);
            run_release(&free);
            run_release(&held);
        }
}

static int64_t rows_in(const struct run *run, int rank, int part) {
    return range_count(run->members[rank].layers[0].rows.parts[part].range);
}

/* Ranks whose rows are all their own, all others', all of one expert, or none: what the comparisons above are about. */
static void test_parts(void **state) {
    (void)state;
    struct problem p = {.ops = fast_ops(), .compute = DTYPE_F32, .real = DTYPE_F32, .ranks = 3, .tokens = {7, 12, 30},
                        .experts = 6, .choices = 2};
    struct run run;
    for (p.routing = 0; p.routing < ROUTING_COUNT; p.routing++) {
        run_all(&run, &p, 1);
        for (int r = 0; r < p.ranks; r++) {
            int64_t own = rows_in(&run, r, 0), arrived = rows_in(&run, r, 1), rest = rows_in(&run, r, 2);
            if (p.routing == ROUTE_OWN) /* each token has both experts: halves */
                assert_true(own == p.tokens[r] && arrived == 0 && rest == own);
            if (p.routing == ROUTE_AWAY)
                assert_true(own == 0 && arrived == 2 * p.tokens[(r + 2) % 3] && rest == 0);
            if (p.routing == ROUTE_ONE_EXPERT && r == 0)
                assert_true(own + arrived + rest == 0);
        }
        compare_with_one(&run, 3e-6);
        run_release(&run);
    }
}

/* Pairs and rows that `from` has for `to`, counted from the routing. */
static void count_pairs(const struct problem *p, int layer, int from, int to, int64_t *pairs, int64_t *rows) {
    struct range experts = range_part(p->experts, p->ranks, to);
    for (int64_t s = 0; s < p->tokens[from]; s++) {
        int64_t here = 0;
        for (int64_t k = 0; k < p->choices; k++) {
            int32_t e = choice(p, layer, first_token(p, from) + s, k);
            here += e >= experts.begin && e < experts.end;
        }
        *pairs += here > 0;
        *rows += here;
    }
}

/* What a rank sends, in one round: counts; for each row its two numbers and its weight out, the weight's gradient back; for
 * each pair the token, its answer, dy and dx. */
static void test_bytes(void **state) {
    (void)state;
    for (int routing = 0; routing < ROUTING_COUNT; routing++)
        for (int ranks = 1; ranks <= 4; ranks++) {
            struct problem p = larger_problem(ranks, (enum routing)routing);
            struct run run;
            run_all(&run, &p, 2); /* the second time nobody grows, and has nothing to agree on */
            for (int r = 0; r < ranks; r++) {
                int64_t out_pairs = 0, out_rows = 0, in_pairs = 0, in_rows = 0;
                for (int i = 0; i < LAYERS * ranks; i++)
                    if (i % ranks != r) {
                        count_pairs(&p, i / ranks, r, i % ranks, &out_pairs, &out_rows);
                        count_pairs(&p, i / ranks, i % ranks, r, &in_pairs, &in_rows);
                    }
                int64_t row_bytes = WIDTH * 4, counts = (int64_t)LAYERS * (ranks - 1) * ranks * 16;
                assert_int_equal(run.counts[r].sent_bytes,
                                 counts + out_rows * (8 + 4) + in_rows * 4 + 2 * (out_pairs + in_pairs) * row_bytes);
                assert_int_equal(run.counts[r].calls, LAYERS * (1 + 3 + 1 + 1 + 2));
                assert_true(routing != ROUTE_ONE_EXPERT || out_pairs <= LAYERS * p.tokens[r] * 2);
            }
            run_release(&run);
        }
}

/* Memory that ends on one rank ends the step of all, in the same place and with its message. */
static void test_memory_ends(void **state) {
    (void)state;
    int failures = 0;
    for (int pieces = 2; pieces < 9; pieces++)
        for (int limited = 0; limited < 2; limited++) {
            struct problem p = larger_problem(3, ROUTE_RANDOM);
            p.limit_bytes = limited ? 20000 : 0;
            struct run run = {.problem = &p, .failing_rank = 1, .pieces = pieces, .repeats = 1};
            enum status status = comm_threads_run(p.ranks, run_rank, &run);
            assert_true(status == STATUS_OK || (status == STATUS_MEMORY && strstr(status_text(), "rows that arrived")));
            failures += status != STATUS_OK;
            run_release(&run);
        }
    assert_in_range(failures, 2, 12); /* it has some memory, and not enough */
}

/* A rank that dies at any call: the others learn it, and nothing is left behind. */
static void test_rank_dies(void **state) {
    (void)state;
    for (int limited = 0; limited < 2; limited++) {
        struct problem p = larger_problem(3, ROUTE_RANDOM);
        p.limit_bytes = limited ? 60000 : 0;
        enum status status = STATUS_PEER;
        int64_t call = 1;
        for (; status != STATUS_OK; call++) {
            struct comm_threads_faults faults = {.seed = 3, .dying_rank = 2, .dying_call = call};
            struct run run = {.problem = &p, .repeats = 1};
            status = comm_threads_run_with(p.ranks, &faults, run_rank, &run);
            assert_true(status == STATUS_OK || status == STATUS_PEER);
            run_release(&run);
        }
        assert_true(call > LAYERS * 15);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_double), cmocka_unit_test(test_single),  cmocka_unit_test(test_bf16),
        cmocka_unit_test(test_limit),  cmocka_unit_test(test_bitwise), cmocka_unit_test(test_late),
        cmocka_unit_test(test_own_rows_first), cmocka_unit_test(test_parts), cmocka_unit_test(test_bytes),
        cmocka_unit_test(test_memory_ends), cmocka_unit_test(test_rank_dies),
    };
    threads_set_count(1);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
