/* Numbers that go wrong at random places of a step, on one rank: in the loss, a gradient, an activation, in what a
 * collective delivers. Whatever is written, wherever: the ranks stay of one mind; a step that is refused changes no bit; one
 * that is accepted has done no harm; the run goes on as if nothing had been.
 *
 * NaN and infinity: the step is refused, or the number was never read, and the step is to the bit that of a clean run.
 * 1e30: the same, or what came of it is finite and within what any step may do: each weight moves by no more than
 * AdamW's bound, and the losses of the steps after it stay beside those of the clean run. */
#include "train/guard.h"
#include "train/ranks_testing.h"
#include "train/verify.h"

#include <math.h>

enum { WARM_STEPS = 40, RUN_STEPS = 6, TRIALS = 60, SEED = 77, PENDING_MAX = 64 };

enum place { PLACE_LOSS, PLACE_GRADIENT, PLACE_ACTIVATION, PLACE_COLLECTIVE, PLACE_COUNT };
static const char *const place_names[] = {"loss", "gradient", "activation", "collective"};
static const struct guard_settings settings = {SPIKES_SKIP, 3};

struct injection {
    enum place place;
    int rank;
    int64_t step;
    double value;
    uint64_t where, element;
};

/* ---- the state of a run, to begin again from --------------------------------------------------------------------------- */

struct snapshot {
    char *own; /* weights and both moments, row by row */
    size_t bytes;
    struct guard guard;
    int64_t step;
};

static size_t copy_own(const struct model *m, char *to, const char *from) {
    const struct tensor *const arrays[] = {m->own_weight, m->moment1, m->moment2};
    size_t at = 0;
    for (int a = 0; a < 3; a++)
        for (int i = 0; i < m->table.count; i++) {
            size_t bytes = tensor_bytes(arrays[a][i]);
            if (to && bytes)
                memcpy(to + at, arrays[a][i].data, bytes);
            if (from && bytes)
                memcpy(arrays[a][i].data, from + at, bytes);
            at += bytes;
        }
    return at;
}

static void snapshot_take(struct snapshot *s, const struct model *m) {
    if (!s->own) {
        s->bytes = copy_own(m, NULL, NULL);
        s->own = malloc(s->bytes + 1);
    }
    copy_own(m, s->own, NULL);
}

static bool is_unchanged(const struct snapshot *s, const struct model *m) {
    char *now = malloc(s->bytes + 1);
    copy_own(m, now, NULL);
    bool same = memcmp(now, s->own, s->bytes) == 0;
    free(now);
    return same;
}

/* ---- writing wrong numbers ----------------------------------------------------------------------------------------------- */

/* What a rank has under way, and what is to be done to it. One for each rank: ranks are threads. */
struct delivery {
    const struct comm *comm;
    int64_t ticket, number;
    char *from_other; /* bytes that another rank sent; none: not one to be touched */
    int64_t bytes, element_bytes;
};

struct injector {
    struct test_rank *rank;
    const struct comm_ops *real_ops;
    const struct injection *armed; /* NULL: nothing */
    int norm_event;                /* EVENT_GRADIENT_NORM */
    int event, all_to_alls;        /* of the step, begun last; of the event */
    int64_t deliveries, wanted;    /* so far in this step; the number of the one to be damaged */
    bool done, late;               /* late: after the decision, in what the next step computes with */
    struct delivery pending[PENDING_MAX];
    int pending_count;
};
static _Thread_local struct injector injector;

static void write_number(void *at, int64_t element_bytes, double value) {
    if (element_bytes == 8)
        memcpy(at, &value, 8);
    else
        memcpy(at, &(float){(float)value}, 4);
    injector.done = true;
    injector.late = injector.event > injector.norm_event;
}

static void write_into(struct tensor t, const struct injection *in) {
    int64_t size = (int64_t)dtype_size(t.dtype);
    if (tensor_exists(t) && tensor_elements(t) > 0)
        write_number((char *)t.data + (int64_t)(in->element % (uint64_t)tensor_elements(t)) * size, size, in->value);
}

static const struct event *event_begun(void) {
    return &injector.rank->runner.schedule.events[injector.event];
}

static bool is_in_step(void) {
    return injector.event < injector.rank->runner.schedule.count;
}

/* Bytes of a number in what the present event's collectives bring; 0 where they bring counts and places. */
static int64_t number_bytes(bool is_all_to_all) {
    if (!is_in_step())
        return 0;
    switch (event_begun()->kind) {
    case EVENT_GATHER:
    case EVENT_REDUCE:
    case EVENT_REPLICATE:
    case EVENT_EXCHANGE_BACK:
    case EVENT_EXCHANGE_BACK_GRAD:
    case EVENT_EXCHANGE_GRAD:
        return is_all_to_all || event_begun()->kind == EVENT_GATHER || event_begun()->kind == EVENT_REPLICATE ? 4 : 0;
    case EVENT_EXCHANGE: /* first which row goes where, then weights and rows */
        return is_all_to_all && injector.all_to_alls > 1 ? 4 : 0;
    case EVENT_GRADIENT_NORM:
        return 8;
    default:
        return 0;
    }
}

static void note_delivery(const struct comm *comm, char *recv, const int64_t *counts, const int64_t *offsets,
                          bool is_all_to_all, int64_t ticket) {
    struct delivery d = {.comm = comm, .ticket = ticket, .element_bytes = number_bytes(is_all_to_all)};
    uint64_t element = injector.armed ? injector.armed->element : 0;
    for (int i = 0; i < comm->size; i++) {
        int r = (int)((element + (uint64_t)i) % (uint64_t)comm->size);
        if (d.element_bytes && r != comm->rank && counts[r] >= d.element_bytes && !d.from_other) {
            d.from_other = recv + offsets[r];
            d.bytes = counts[r];
        }
    }
    if (!d.from_other)
        return;
    d.number = injector.deliveries++;
    CHECK_OP(injector.pending_count, <, PENDING_MAX);
    injector.pending[injector.pending_count++] = d;
}

static enum status all_gather(struct comm *comm, const void *send, void *recv, const int64_t *counts,
                              const int64_t *offsets, struct comm_request *request) {
    TRY(injector.real_ops->all_gather(comm, send, recv, counts, offsets, request));
    note_delivery(comm, recv, counts, offsets, false, request->ticket);
    return STATUS_OK;
}

static enum status all_to_all(struct comm *comm, const void *send, const int64_t *send_counts,
                              const int64_t *send_offsets, void *recv, const int64_t *recv_counts,
                              const int64_t *recv_offsets, struct comm_request *request) {
    injector.all_to_alls++;
    TRY(injector.real_ops->all_to_all(comm, send, send_counts, send_offsets, recv, recv_counts, recv_offsets, request));
    note_delivery(comm, recv, recv_counts, recv_offsets, true, request->ticket);
    return STATUS_OK;
}

static void damage(const struct delivery *d) {
    const struct injection *in = injector.armed;
    if (!in || in->place != PLACE_COLLECTIVE || d->number != injector.wanted)
        return;
    int64_t element = (int64_t)(in->element % (uint64_t)(d->bytes / d->element_bytes));
    write_number(d->from_other + element * d->element_bytes, d->element_bytes, in->value);
}

static enum status wait_for(struct comm *comm, struct comm_request *request) {
    int64_t ticket = request->ticket;
    TRY(injector.real_ops->wait(comm, request));
    for (int i = 0; i < injector.pending_count; i++) {
        struct delivery d = injector.pending[i];
        if (d.comm != comm || d.ticket != ticket)
            continue;
        injector.pending[i--] = injector.pending[--injector.pending_count];
        damage(&d);
    }
    return STATUS_OK;
}

static void damage_gradient(const struct injection *in) {
    const struct model *m = injector.rank->model;
    for (int i = 0; i < m->table.count && !injector.done; i++)
        write_into(m->own_gradient[(in->where + (uint64_t)i) % (uint64_t)m->table.count], in);
}

/* Streams of activations, by what has just been computed, and of their gradients. */
static struct tensor activation_after(const struct event *event) {
    struct workspace *w = injector.rank->workspace;
    switch (event->kind) {
    case EVENT_EMBED:
        return w->x[0];
    case EVENT_ATTENTION:
        return w->blocks[event->block].x_middle;
    case EVENT_ROUTE:
        return w->blocks[event->block].mlp_normed;
    case EVENT_EXCHANGE:
        return w->blocks[event->block].rows.weight;
    case EVENT_EXPERTS:
        return w->blocks[event->block].expert.gate;
    case EVENT_EXCHANGE_BACK:
        return w->x[event->block + 1];
    case EVENT_HEAD:
    case EVENT_ROUTE_GRAD:
    case EVENT_ATTENTION_GRAD:
        return w->dx;
    default:
        return tensor_none();
    }
}

static void event_done(void *context, const struct event *event, double seconds) {
    (void)context;
    (void)seconds;
    const struct injection *in = injector.armed;
    if (in && !injector.done) {
        if (in->place == PLACE_LOSS && event->kind == EVENT_HEAD)
            write_into(injector.rank->workspace->loss_sum, in);
        if (in->place == PLACE_GRADIENT && injector.event == injector.norm_event - 1)
            damage_gradient(in);
        if (in->place == PLACE_ACTIVATION && injector.event >= (int)in->where)
            write_into(activation_after(event), in);
    }
    injector.event++;
    injector.all_to_alls = 0;
}

/* Up to the last after which there is an activation. */
static int event_count(const struct schedule *schedule) {
    int count = schedule->count;
    while (schedule->events[count - 1].kind != EVENT_ATTENTION_GRAD)
        count--;
    return count;
}

static struct injection draw(const struct test_rank *r, uint64_t trial) {
    static const double values[] = {NAN, INFINITY, 1e30, -INFINITY, -1e30};
    int ranks = r->ranks.world->size;
    struct injection in = {.place = (enum place)(trial % (ranks > 1 ? PLACE_COUNT : PLACE_COLLECTIVE)),
                           .rank = (int)(random_bits(SEED, 1, trial) % (uint64_t)ranks),
                           .step = 1 + (int64_t)(random_bits(SEED, 2, trial) % 3),
                           .value = values[random_bits(SEED, 3, trial) % 5],
                           .where = random_bits(SEED, 4, trial),
                           .element = random_bits(SEED, 5, trial)};
    if (in.place == PLACE_ACTIVATION)
        in.where %= (uint64_t)event_count(&r->runner.schedule);
    return in;
}

/* ---- a run of some steps ------------------------------------------------------------------------------------------------- */

struct outcome {
    enum step_skip skipped;
    double loss;
};

struct job {
    struct test_layout layout;
    uint64_t first_trial;
    int counts[PLACE_COUNT][5]; /* by enum step_skip */
    int unread;                 /* accepted, and to the bit the clean step */
    int late;                   /* delivered after the decision */
};

/* All ranks took the same decision on the same numbers. */
static enum status agree_on(struct test_rank *r, const struct step_result *result) {
    double mine[3] = {result->loss, result->gradient_norm, result->skipped}, all[3 * RANKS_MAX];
    TRY(comm_share(r->ranks.world, mine, sizeof mine, all));
    for (int i = 1; i < r->ranks.world->size; i++)
        if (result->skipped == STEP_RANKS_DISAGREE ? all[3 * i + 2] != all[2]
                                                   : memcmp(all, all + 3 * i, sizeof mine) != 0)
            return status_fail(STATUS_FORMAT, "rank %d decided otherwise", i);
    return STATUS_OK;
}

/* One in three of the last few, where the decision and what comes after it are. */
static int64_t choose_delivery(uint64_t where, int64_t count) {
    uint64_t most = where % 3 == 0 && count > 6 ? 6 : (uint64_t)count;
    return count - 1 - (int64_t)(where / 3 % most);
}

static enum status step(struct test_rank *r, struct guard *guard, int64_t number, const struct injection *in,
                        struct step_result *result) {
    injector.armed = in && in->rank == r->ranks.world->rank ? in : NULL;
    injector.event = injector.all_to_alls = injector.pending_count = 0;
    int64_t last = injector.deliveries; /* as many as in the step before */
    injector.wanted = in && last > 0 ? choose_delivery(in->where, last) : 0;
    injector.deliveries = 0;
    injector.done = injector.late = false;
    TRY(test_rank_step(r, number, guard_limits(guard, settings), result));
    injector.armed = NULL;
    TRY(agree_on(r, result));
    guard_note(guard, settings, number, result);
    return STATUS_OK;
}

static enum status begin_again(struct test_rank *r, const struct snapshot *from) {
    copy_own(r->model, NULL, from->own);
    model_repack(r->model);
    return step_refresh(&r->runner);
}

/* No weight moved further than AdamW moves one, whatever its gradient: |m| / sqrt(v) <= 1.17 for betas of 0.9 and 0.95,
 * times at most 1.6 in the first steps, where both are scaled up. */
static bool is_harmless(const struct snapshot *before, const struct test_rank *r, const struct step_result *result) {
    const struct model *m = r->model;
    const float *was = (const float *)before->own;
    for (int i = 0; i < m->table.count; i++) {
        const float *is = m->own_weight[i].data, *m1 = m->moment1[i].data, *m2 = m->moment2[i].data;
        for (int64_t k = 0; k < tensor_elements(m->own_weight[i]); k++, was++) {
            double most = result->lr * (2 + r->optimizer.weight_decay * fabs(*was));
            if (!(fabs((double)is[k] - *was) <= most && fabsf(m1[k]) <= 1 && m2[k] <= 1))
                return false;
        }
    }
    return true;
}

static enum status check_step(struct job *job, struct test_rank *r, const struct snapshot *before,
                              const struct snapshot *clean, const struct injection *in,
                              bool is_echo, const struct step_result *result) {
    bool first = r->ranks.world->rank == 0, refused = result->skipped != STEP_UPDATED;
    double unchanged = is_unchanged(before, r->model), same = is_unchanged(clean, r->model);
    double harmless = is_harmless(before, r, result), ranks = r->ranks.world->size, done = injector.done;
    TRY(comm_sum_f64(r->ranks.world, &unchanged, 1));
    TRY(comm_sum_f64(r->ranks.world, &same, 1));
    TRY(comm_sum_f64(r->ranks.world, &harmless, 1));
    TRY(comm_sum_f64(r->ranks.world, &done, 1));
    if (done != !is_echo)
        return status_fail(STATUS_FORMAT, "nothing was injected");
    if (first && !is_echo)
        job->counts[in->place][result->skipped]++;
    if (refused)
        return unchanged == ranks ? STATUS_OK : status_fail(STATUS_FORMAT, "a refused step changed weights or moments");
    job->unread += first && !is_echo && same == ranks;
    if (same < ranks && !(isfinite(in->value) && harmless == ranks))
        return status_fail(STATUS_FORMAT, "accepted, but it is not the clean step (loss %g, norm %g)", result->loss,
                           result->gradient_norm);
    return STATUS_OK;
}

/* The steps of a trial, the clean ones where `in` is NULL; clean[k] is the state after step k + 1 of the clean ones. */
static enum status run_trial(struct job *job, struct test_rank *r, const struct snapshot *from,
                             const struct snapshot *clean, struct outcome outcomes[RUN_STEPS],
                             const struct injection *in) {
    struct guard guard = from->guard;
    struct snapshot before = {0};
    enum status status = begin_again(r, from);
    bool is_echo = false; /* the step after a number that came late */
    for (int k = 0; k < RUN_STEPS && status == STATUS_OK; k++) {
        struct step_result result;
        bool hit = in && in->step == k + 1;
        snapshot_take(&before, r->model);
        status = step(r, &guard, from->step + k + 1, hit ? in : NULL, &result);
        double late = injector.late;
        if (status == STATUS_OK)
            status = comm_sum_f64(r->ranks.world, &late, 1);
        if (status == STATUS_OK && (hit || is_echo))
            status = check_step(job, r, &before, &clean[k], in, is_echo, &result);
        else if (status == STATUS_OK && result.skipped)
            status = status_fail(STATUS_FORMAT, "step %d: %s", k + 1, step_skip_reason(result.skipped));
        is_echo = late > 0;
        job->late += is_echo && r->ranks.world->rank == 0;
        outcomes[k] = (struct outcome){result.skipped, result.loss};
    }
    free(before.own);
    return status == STATUS_OK ? verify_copies(r->model, &r->ranks, in ? in->step : 0, "runs/x/checkpoints") : status;
}

static enum status try_injection(struct job *job, struct test_rank *r, const struct snapshot *from,
                                 const struct snapshot *clean, const struct outcome *expected, uint64_t trial) {
    struct outcome outcomes[RUN_STEPS];
    struct injection in = draw(r, trial);
    enum status status = run_trial(job, r, from, clean, outcomes, &in);
    for (int k = (int)in.step + 1; k < RUN_STEPS && status == STATUS_OK; k++) /* the steps after it and its echo */
        if (!(fabs(outcomes[k].loss - expected[k].loss) <= 0.05 * expected[k].loss))
            status = status_fail(STATUS_FORMAT, "loss %g instead of about %g", outcomes[k].loss, expected[k].loss);
    return status_prefix(status, "trial %d, %s, rank %d, %g in step %d", (int)trial, place_names[in.place], in.rank,
                         in.value, (int)in.step);
}

static enum status run_trials(struct job *job, struct test_rank *r, const struct snapshot *from, uint64_t first,
                              uint64_t end) {
    struct outcome expected[RUN_STEPS];
    struct snapshot clean[RUN_STEPS] = {{0}};
    struct guard guard = from->guard;
    enum status status = begin_again(r, from);
    for (int k = 0; k < RUN_STEPS && status == STATUS_OK; k++) {
        struct step_result result;
        status = step(r, &guard, from->step + k + 1, NULL, &result);
        expected[k] = (struct outcome){result.skipped, result.loss};
        snapshot_take(&clean[k], r->model);
    }
    for (uint64_t trial = first; trial < end && status == STATUS_OK; trial++)
        status = try_injection(job, r, from, clean, expected, trial);
    for (int k = 0; k < RUN_STEPS; k++)
        free(clean[k].own);
    return status;
}

static enum status run_all(struct job *job, struct test_rank *r) {
    struct snapshot young = {.step = 2}, warm = {.step = WARM_STEPS};
    struct guard guard = {0};
    enum status status = STATUS_OK;
    for (int64_t k = 1; k <= WARM_STEPS && status == STATUS_OK; k++) {
        struct step_result result;
        status = step(r, &guard, k, NULL, &result);
        struct snapshot *here = k == young.step ? &young : k == warm.step ? &warm : NULL;
        if (here) {
            snapshot_take(here, r->model);
            here->guard = guard;
        }
    }
    if (status == STATUS_OK)
        status = run_trials(job, r, &warm, job->first_trial, job->first_trial + TRIALS * 3 / 4);
    if (status == STATUS_OK)
        status = run_trials(job, r, &young, job->first_trial + TRIALS * 3 / 4, job->first_trial + TRIALS);
    free(young.own);
    free(warm.own);
    return status;
}

static enum status run_rank(void *context, struct comm *world) {
    struct job *job = context;
    struct test_rank r = {0};
    injector = (struct injector){.rank = &r, .event = INT32_MAX};
    enum status status = test_rank_open(&r, &job->layout, world);
    struct comm *const inner[] = {&r.ranks.batch, &r.ranks.shards, &r.ranks.replicas, &r.ranks.experts};
    const struct comm_ops wrapping = {"wrapping", all_gather, all_to_all, wait_for, world->ops->split, world->ops->release};
    injector.real_ops = world->ops;
    for (int i = 0; i < 4; i++)
        inner[i]->ops = &wrapping;
    while (status == STATUS_OK && r.runner.schedule.events[injector.norm_event].kind != EVENT_GRADIENT_NORM)
        injector.norm_event++;
    r.runner.observer = (struct step_observer){event_done, NULL};
    if (status == STATUS_OK)
        status = run_all(job, &r);
    test_rank_close(&r); /* while `wrapping` stands */
    return status;
}

static void report(const struct job *job, int counts[PLACE_COUNT][5]) {
    for (int p = 0; p < PLACE_COUNT; p++)
        for (int k = 0; k < 5; k++)
            counts[p][k] += job->counts[p][k];
}

static void test_wrong_numbers(void **state) {
    (void)state;
    static const struct test_layout layouts[] = {
        {1, 1, 1, 0, DTYPE_F32, DTYPE_F32}, {2, 1, 1, 0, DTYPE_F32, DTYPE_F32}, {2, 1, 1, 3, DTYPE_F32, DTYPE_F32},
        {1, 2, 1, 3, DTYPE_F32, DTYPE_F32}, {1, 1, 2, 0, DTYPE_F32, DTYPE_F32}, {2, 1, 2, 2, DTYPE_F32, DTYPE_F32},
        {1, 2, 2, 1, DTYPE_F32, DTYPE_F32}, {3, 1, 1, 1, DTYPE_F32, DTYPE_F32},
    };
    int counts[PLACE_COUNT][5] = {{0}}, unread = 0, late = 0;
    threads_set_count(1);
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++) {
        struct job job = {.layout = layouts[i], .first_trial = i * TRIALS};
        enum status status = comm_threads_run(layout_ranks(&job.layout), run_rank, &job);
        if (status != STATUS_OK)
            fail_msg("%d x %d x %d, stage %d: %s", job.layout.replicate, job.layout.shard, job.layout.expert,
                     job.layout.zero, status_text());
        report(&job, counts);
        unread += job.unread;
        late += job.late;
    }
    for (int p = 0; p < PLACE_COUNT; p++)
        print_message("%-10s  accepted %3d, not finite %3d, loss %3d, gradient %3d, ranks disagree %3d\n", place_names[p],
                      counts[p][0], counts[p][1], counts[p][2], counts[p][3], counts[p][4]);
    print_message("of those accepted %d were to the bit the clean step; %d numbers came after the decision\n", unread, late);
    assert_true(late > 0);
    for (int k = 1; k < 5; k++)
        assert_true(counts[0][k] + counts[1][k] + counts[2][k] + counts[3][k] > 0); /* every reason was met */
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_wrong_numbers)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
