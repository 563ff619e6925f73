/* Islands that train on their own and meet: against a reference that knows one process, one list of weights an island,
 * and the rule as it is written in the paper; in every layout of an island; and what must be found out about the
 * others.
 */
#include "train/ranks_testing.h"

#include <math.h>
#include <stdio.h>

enum { ISLANDS_MAX = 4, ROWS_MAX = 64 };

static const struct test_layout one_rank = {
    .replicate = 1, .shard = 1, .expert = 1, .zero = 3, .compute = DTYPE_F32, .wire = DTYPE_F32};

/* ---- the reference ----------------------------------------------------------------------------------------------- */

struct reference {
    const struct outer_options *o;
    int islands;
    struct test_rank ranks[ISLANDS_MAX];
    struct comm self[ISLANDS_MAX];
    float *global[ROWS_MAX], *momentum[ROWS_MAX], *sum[ROWS_MAX]; /* sum: of what is under way */
};

static float *floats(int64_t n) {
    float *data = calloc((size_t)n + 1, sizeof *data);
    assert_non_null(data);
    return data;
}

static void reference_open(struct reference *ref, const struct outer_options *o, int islands) {
    *ref = (struct reference){.o = o, .islands = islands};
    for (int m = 0; m < islands; m++) {
        ref->self[m] = comm_self();
        assert_int_equal(test_rank_open(&ref->ranks[m], &one_rank, &ref->self[m]), STATUS_OK);
    }
    const struct model *model = ref->ranks[0].model;
    assert_in_range(model->table.count, 1, ROWS_MAX);
    for (int i = 0; i < model->table.count; i++) {
        int64_t n = tensor_elements(model->own_weight[i]);
        ref->global[i] = floats(n);
        ref->momentum[i] = floats(n);
        ref->sum[i] = floats(n);
        memcpy(ref->global[i], model->own_weight[i].data, (size_t)n * sizeof(float));
    }
}

static void reference_close(struct reference *ref) {
    for (int i = 0; i < ROWS_MAX; i++) {
        free(ref->global[i]);
        free(ref->momentum[i]);
        free(ref->sum[i]);
    }
    for (int m = 0; m < ref->islands; m++)
        test_rank_close(&ref->ranks[m]);
}

/* Blocks are dealt over all fragments but the last, which has the rest. */
static int fragment_by_rule(const struct outer_plan *plan, const struct parameter *row) {
    int of_blocks = plan->fragment_count - 1;
    if (of_blocks == 0)
        return 0;
    if (row->block < 0)
        return of_blocks;
    return plan->order == OUTER_STRIDED ? row->block % of_blocks : row->block * of_blocks / plan->block_count;
}

static bool is_due(const struct outer_plan *plan, int fragment, int64_t step) {
    int64_t offset = fragment * plan->sync_steps / plan->fragment_count;
    return step >= offset + plan->sync_steps && (step - offset) % plan->sync_steps == 0;
}

static bool takes_part(const struct reference *ref, const struct parameter *row, int fragment, int64_t sent_step) {
    const struct outer_plan *plan = &ref->o->plan;
    int64_t round = (sent_step - fragment * plan->sync_steps / plan->fragment_count) / plan->sync_steps;
    return fragment_by_rule(plan, row) == fragment && (!row->is_expert || round % plan->experts_every == 0);
}

static void reference_send(struct reference *ref, int fragment, int64_t step) {
    const struct model *model = ref->ranks[0].model;
    double stats[OUTER_STATS] = {0};
    for (int i = 0; i < model->table.count; i++) {
        if (!takes_part(ref, &model->table.rows[i], fragment, step))
            continue;
        int64_t n = tensor_elements(model->own_weight[i]);
        void *wire = floats(n + 64);
        for (int m = 0; m < ref->islands; m++) {
            kernels_ref()->outer_encode(tensor_1d(ref->global[i], DTYPE_F32, n),
                                        tensor_1d(ref->ranks[m].model->own_weight[i].data, DTYPE_F32, n), ref->o->wire,
                                        wire, tensor_1d(stats, DTYPE_F64, OUTER_STATS));
            kernels_ref()->outer_decode_add(wire, ref->o->wire, tensor_1d(ref->sum[i], DTYPE_F32, n), m > 0);
        }
        free(wire);
    }
}

static void reference_apply(struct reference *ref, int fragment, int64_t sent_step) {
    const struct model *model = ref->ranks[0].model;
    float lr = (float)ref->o->lr, mu = (float)ref->o->momentum, keep = (float)ref->o->mix,
          take = (float)(1 - ref->o->mix);
    for (int i = 0; i < model->table.count; i++) {
        if (!takes_part(ref, &model->table.rows[i], fragment, sent_step))
            continue;
        for (int64_t k = 0; k < tensor_elements(model->own_weight[i]); k++) {
            float delta = ref->sum[i][k] / (float)ref->islands;
            ref->momentum[i][k] = mu * ref->momentum[i][k] + delta;
            ref->global[i][k] = ref->global[i][k] - lr * (delta + mu * ref->momentum[i][k]);
            for (int m = 0; m < ref->islands; m++) {
                float *local = (float *)ref->ranks[m].model->own_weight[i].data + k;
                *local = keep == 0 ? ref->global[i][k] : keep * *local + take * ref->global[i][k];
            }
        }
    }
    for (int m = 0; m < ref->islands; m++)
        model_repack(ref->ranks[m].model);
}

static void reference_step(struct reference *ref, int64_t step) {
    const struct outer_plan *plan = &ref->o->plan;
    struct step_result result;
    for (int m = 0; m < ref->islands; m++) {
        struct test_rank *r = &ref->ranks[m];
        test_text(r->tokens, step + STEP_COUNT * m);
        assert_int_equal(step_run(&r->runner, (struct step_input){r->tokens, step, STEP_COUNT, {0, 0}}, &result),
                         STATUS_OK);
    }
    for (int p = 0; p < plan->fragment_count; p++)
        if (is_due(plan, p, step))
            reference_send(ref, p, step);
    for (int p = 0; p < plan->fragment_count; p++)
        if (is_due(plan, p, step - plan->overlap_steps))
            reference_apply(ref, p, step - plan->overlap_steps);
}

/* ---- against it -------------------------------------------------------------------------------------------------- */

struct job {
    const struct outer_options *o;
    int islands;
    struct test_layout layout;
    int64_t steps;
    const struct reference *ref;
    bool settles; /* after every step */
    double worst; /* of all islands: distance from the reference, over the largest weight of the row; -1: bits must
                     agree */
    bool without_momentum; /* which is not looked at */
};

static double distance(const float *a, const float *b, int64_t n) {
    double most = 0, largest = 1e-30;
    for (int64_t k = 0; k < n; k++) {
        most = fmax(most, fabs((double)a[k] - b[k]));
        largest = fmax(largest, fabs((double)b[k]));
    }
    return most / largest;
}

/* What this rank owns of a row, cut out of the reference's. */
static float *cut(const struct test_rank *r, int row, const float *whole) {
    const struct parameter *p = &r->model->table.rows[row];
    struct layout own = sharding_own_layout(&r->model->sharding, p);
    struct parameter_part part = sharding_part(&r->model->sharding, p, &own);
    float *out = floats(parameter_part_elements(&part));
    int64_t at = 0;
    for (int64_t a = 0; a < part.shape[0]; a++)
        for (int64_t b = 0; b < part.shape[1]; b++)
            for (int64_t c = 0; c < part.shape[2]; c++)
                out[at++] =
                    whole[((a + part.first[0]) * p->shape[1] + b + part.first[1]) * p->shape[2] + c + part.first[2]];
    return out;
}

static enum status compare_row(const struct job *job, const struct test_rank *r, int row, const char *what,
                               struct tensor found, const float *whole) {
    float *expected = cut(r, row, whole);
    int64_t n = tensor_elements(found);
    double d = distance(found.data, expected, n);
    bool same = job->worst < 0 ? memcmp(found.data, expected, (size_t)n * sizeof(float)) == 0 : d <= job->worst;
    free(expected);
    if (same)
        return STATUS_OK;
    return status_fail(STATUS_NUMERIC, "island %d: %s of %s is off by %g", r->ranks.mesh.coordinate[MESH_ISLAND], what,
                       r->model->table.rows[row].name, d);
}

static enum status compare(const struct job *job, struct test_rank *r) {
    const struct reference *ref = job->ref;
    TRY(outer_settle(r->outer));
    TRY(outer_verify(r->outer));
    for (int i = 0; i < r->model->table.count; i++) {
        const struct model *local = ref->ranks[r->ranks.mesh.coordinate[MESH_ISLAND]].model;
        TRY(compare_row(job, r, i, "local", r->model->own_weight[i], local->own_weight[i].data));
        TRY(compare_row(job, r, i, "global", r->outer->global[i], ref->global[i]));
        if (!job->without_momentum)
            TRY(compare_row(job, r, i, "momentum", r->outer->momentum[i], ref->momentum[i]));
    }
    return STATUS_OK;
}

static enum status run_islands(void *context, struct comm *world) {
    const struct job *job = context;
    struct test_rank r = {.meetings = job->o, .islands = job->islands};
    struct step_result result;
    enum status status = test_rank_open(&r, &job->layout, world);
    for (int64_t step = 1; step <= job->steps && status == STATUS_OK; step++) {
        status = test_rank_step(&r, step, (struct step_limits){0, 0}, &result);
        if (job->settles && status == STATUS_OK)
            status = outer_settle(r.outer);
    }
    if (status == STATUS_OK)
        status = compare(job, &r);
    test_rank_close(&r);
    return status;
}

static void expect_ok(enum status status) {
    if (status != STATUS_OK)
        fail_msg("%s", status_text());
}

/* At the end nothing may be under way that the reference has not added yet: chosen so. */
static void check(const struct outer_options *o, int islands, int64_t steps) {
    struct reference ref;
    expect_ok(outer_plan_check(&o->plan));
    reference_open(&ref, o, islands);
    for (int64_t step = 1; step <= steps; step++)
        reference_step(&ref, step);
    for (int settles = 0; settles < 2; settles++) {
        struct job job = {o, islands, one_rank, steps, &ref, settles, -1, false};
        expect_ok(comm_threads_run(islands, run_islands, &job));
    }
    reference_close(&ref);
}

static void test_reference(void **state) {
    (void)state;
    static const struct outer_options cases[] = {
        {{3, 1, 2, OUTER_STRIDED, 0, 1}, 0.4, 0.9, 0, OUTER_F32},
        {{4, 2, 2, OUTER_STRIDED, 1, 1}, 0.4, 0.9, 0.5, OUTER_FP4},
        {{6, 3, 2, OUTER_STRIDED, 1, 1}, 0.7, 0.5, 0.5, OUTER_BF16},
        {{7, 3, 2, OUTER_SEQUENTIAL, 1, 1}, 0.4, 0.9, 0.25, OUTER_FP8},
        {{5, 1, 2, OUTER_STRIDED, 4, 1}, 0.6, 0.9, 0.5, OUTER_FP4},
        {{4, 2, 2, OUTER_STRIDED, 1, 2}, 0.4, 0.9, 0.5, OUTER_FP4},
        {{2, 2, 2, OUTER_STRIDED, 0, 3}, 0.4, 0.9, 1, OUTER_F32},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int islands = 1; islands <= ISLANDS_MAX; islands++) {
            int64_t steps = 22, sent;
            while (outer_plan_under_way(&cases[i].plan, steps, &sent) >= 0)
                steps++;
            check(&cases[i], islands, steps);
        }
}

/* In fp32 an island of several ranks does what an island of one does, but for the order of sums within it. */
static void test_layouts(void **state) {
    (void)state;
    static const struct outer_options o = {{4, 2, 2, OUTER_STRIDED, 1, 1}, 0.4, 0.9, 0.5, OUTER_F32};
    static const int layouts[][4] = {{1, 2, 1, 3}, {1, 2, 1, 1}, {1, 1, 2, 2}, {2, 1, 1, 1},
                                     {2, 2, 1, 3}, {1, 2, 2, 3}, {3, 1, 1, 2}};
    struct reference ref;
    reference_open(&ref, &o, 2);
    for (int64_t step = 1; step <= 13; step++)
        reference_step(&ref, step);
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++) {
        struct job job = {&o, 2, one_rank, 13, &ref, false, 1e-4, false};
        job.layout.replicate = layouts[i][0];
        job.layout.shard = layouts[i][1];
        job.layout.expert = layouts[i][2];
        job.layout.zero = layouts[i][3];
        expect_ok(comm_threads_run(2 * layout_ranks(&job.layout), run_islands, &job));
    }
    reference_close(&ref);
}

/* ---- degenerate settings ----------------------------------------------------------------------------------------- */

/* One island that meets itself after every step, outer lr 1, no momentum: plain training, to the rounding of one
 * subtraction and one addition a step. */
static void test_plain(void **state) {
    (void)state;
    static const struct outer_options o = {{1, 1, 2, OUTER_STRIDED, 0, 1}, 1, 0, 0, OUTER_F32};
    struct reference ref;
    struct comm self = comm_self();
    struct test_rank r = {.meetings = &o, .islands = 1};
    struct step_result result, plain;
    reference_open(&ref, &o, 1); /* of which only the inner steps are used */
    expect_ok(test_rank_open(&r, &one_rank, &self));
    for (int64_t step = 1; step <= 10; step++) {
        expect_ok(test_rank_step(&r, step, (struct step_limits){0, 0}, &result));
        expect_ok(test_rank_step(&ref.ranks[0], step, (struct step_limits){0, 0}, &plain));
        assert_true(fabs(result.loss - plain.loss) <= 1e-6 * plain.loss);
    }
    for (int i = 0; i < r.model->table.count; i++) {
        int64_t n = tensor_elements(r.model->own_weight[i]);
        assert_true(distance(r.model->own_weight[i].data, ref.ranks[0].model->own_weight[i].data, n) < 1e-5);
        assert_memory_equal(r.model->own_weight[i].data, r.outer->global[i].data, (size_t)n * sizeof(float));
    }
    test_rank_close(&r);
    reference_close(&ref);
}

/* Two islands, outer lr 1, no momentum, nothing kept: the mean of what both had. */
static void test_mean(void **state) {
    (void)state;
    static const struct outer_options o = {{5, 1, 2, OUTER_STRIDED, 0, 1}, 1, 0, 0, OUTER_F32};
    struct reference ref;
    reference_open(&ref, &o, 2);
    for (int64_t step = 1; step < 5; step++)
        reference_step(&ref, step);
    for (int m = 0; m < 2; m++) { /* the fifth, without the meeting after it */
        struct step_result result;
        test_text(ref.ranks[m].tokens, 5 + STEP_COUNT * m);
        expect_ok(
            step_run(&ref.ranks[m].runner, (struct step_input){ref.ranks[m].tokens, 5, STEP_COUNT, {0, 0}}, &result));
    }
    for (int i = 0; i < ref.ranks[0].model->table.count; i++)
        for (int64_t k = 0; k < tensor_elements(ref.ranks[0].model->own_weight[i]); k++) {
            float *a = (float *)ref.ranks[0].model->own_weight[i].data + k,
                  *b = (float *)ref.ranks[1].model->own_weight[i].data + k;
            *a = *b = ref.global[i][k] = (float)(0.5 * ((double)*a + *b));
        }
    struct job job = {&o, 2, one_rank, 5, &ref, .worst = 1e-6, .without_momentum = true};
    expect_ok(comm_threads_run(2, run_islands, &job));
    reference_close(&ref);
}

/* ---- what must be found out -------------------------------------------------------------------------------------- */

enum fault { FAULT_GLOBAL, FAULT_INFINITE, FAULT_STEP, FAULT_START };

struct fault_job {
    const struct outer_options *o;
    int islands;
    struct test_layout layout;
    enum fault fault;
    const char *words;
};

static enum status break_something(const struct fault_job *job, struct test_rank *r, int64_t step) {
    float *weight = r->model->own_weight[2].data, *global = r->outer->global[2].data;
    if (r->ranks.mesh.coordinate[MESH_ISLAND] != 1 || tensor_elements(r->model->own_weight[2]) == 0)
        return STATUS_OK;
    if (job->fault == FAULT_GLOBAL && step == 3)
        global[0] += 1e-3f;
    if (job->fault == FAULT_INFINITE && step == 3)
        weight[0] = INFINITY;
    if (job->fault == FAULT_START && step == 0)
        global[0] += 1e-3f;
    return STATUS_OK;
}

static enum status run_fault(void *context, struct comm *world) {
    const struct fault_job *job = context;
    struct test_rank r = {.meetings = job->o, .islands = job->islands};
    struct step_result result;
    enum status status = test_rank_open(&r, &job->layout, world);
    bool late = job->fault == FAULT_STEP && r.ranks.mesh.coordinate[MESH_ISLAND] == 1;
    if (status == STATUS_OK)
        status = break_something(job, &r, 0);
    if (status == STATUS_OK && job->fault == FAULT_START)
        status = outer_verify(r.outer);
    for (int64_t step = 1; step <= 16 && status == STATUS_OK; step++) {
        status = test_rank_step(&r, step + (late ? 4 : 0), (struct step_limits){0, 0}, &result);
        if (status == STATUS_OK)
            status = break_something(job, &r, step);
    }
    if (status == STATUS_NUMERIC && strstr(status_text(), job->words))
        status = STATUS_OK;
    else if (status == STATUS_OK)
        status = status_fail(STATUS_FORMAT, "nothing was found");
    test_rank_close(&r);
    return status;
}

static void test_faults(void **state) {
    (void)state;
    static const struct outer_options o = {{4, 2, 2, OUTER_STRIDED, 0, 1}, 0.4, 0.9, 0, OUTER_FP4};
    static const struct outer_options whole = {{4, 1, 2, OUTER_STRIDED, 0, 1}, 0.4, 0.9, 0, OUTER_FP4};
    static const struct {
        enum fault fault;
        const char *words;
    } faults[] = {{FAULT_GLOBAL, "island 1 holds other global weights than island 0 after"},
                  {FAULT_INFINITE, "of island 1 have become infinite"},
                  {FAULT_STEP, "of step 8"},
                  {FAULT_START, "island 1 holds other global weights than island 0"}};
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        for (int shard = 1; shard <= 2; shard++) {
            struct fault_job job = {&o, 2, one_rank, faults[i].fault, faults[i].words};
            job.layout.shard = shard;
            job.o = job.fault == FAULT_STEP ? &whole : &o; /* messages of the same size */
            expect_ok(comm_threads_run(2 * layout_ranks(&job.layout), run_fault, &job));
        }
}

/* ---- bytes ------------------------------------------------------------------------------------------------------- */

struct bytes_job {
    const struct outer_options *o;
    int islands;
    struct test_layout layout;
    int64_t sent; /* by all ranks */
};

static enum status run_bytes(void *context, struct comm *world) {
    struct bytes_job *job = context;
    const struct outer_options *o = job->o;
    struct test_rank r = {.meetings = o, .islands = job->islands};
    struct step_result result;
    int64_t promised = 0, of_island = 0;
    double norm = 0;
    TRY(test_rank_open(&r, &job->layout, world));
    for (int64_t step = 1; step <= 2 * o->plan.sync_steps + 1; step++) {
        TRY(test_rank_step(&r, step, (struct step_limits){0, 0}, &result));
        promised += outer_rank_bytes(r.model, o, step);
        of_island += result.outer_bytes;
        if (result.applied)
            norm += r.outer->report.gradient_norm;
    }
    double sums[] = {(double)r.ranks.islands.count.sent_bytes, (double)promised};
    TRY(outer_drop(r.outer));
    TRY(comm_sum_f64(world, sums, 2));
    if (sums[0] != sums[1] || sums[0] != (double)(of_island * job->islands) || !(norm > 0))
        return status_fail(STATUS_FORMAT, "%g bytes sent, %g promised, %lld by an island; norms %g", sums[0], sums[1],
                           (long long)of_island, norm);
    if (world->rank == 0)
        job->sent = (int64_t)sums[0];
    test_rank_close(&r);
    return STATUS_OK;
}

/* What crosses the link is what was said, and does not grow with the ranks of an island. */
static void test_bytes(void **state) {
    (void)state;
    static const struct outer_options o = {{6, 3, 2, OUTER_STRIDED, 1, 1}, 0.4, 0.9, 0.5, OUTER_FP4};
    static const int layouts[][4] = {{1, 1, 1, 3}, {1, 2, 1, 3}, {2, 1, 1, 1}, {2, 1, 2, 3}};
    int64_t one = 0;
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++) {
        struct bytes_job job = {&o, 2, one_rank, 0};
        job.layout.replicate = layouts[i][0];
        job.layout.shard = layouts[i][1];
        job.layout.expert = layouts[i][2];
        job.layout.zero = layouts[i][3];
        expect_ok(comm_threads_run(2 * layout_ranks(&job.layout), run_bytes, &job));
        one = i == 0 ? job.sent : one;
        assert_true(job.sent <= one + one / 4); /* headers, and blocks that are not full: the model is tiny */
    }
}

/* ---- showing the global weights ---------------------------------------------------------------------------------- */

static enum status run_swap(void *context, struct comm *world) {
    struct test_rank r = {.meetings = context, .islands = 2};
    struct step_result result;
    TRY(test_rank_open(&r, &one_rank, world));
    for (int64_t step = 1; step <= 5; step++)
        TRY(test_rank_step(&r, step, (struct step_limits){0, 0}, &result));
    TRY(outer_settle(r.outer));
    float seen[3][2]; /* before, while they are shown, after: the first weight of local and global */
    for (int k = 0; k < 3; k++) {
        memcpy(&seen[k][0], r.model->own_weight[1].data, sizeof(float));
        memcpy(&seen[k][1], r.outer->global[1].data, sizeof(float));
        TRY(k < 2 ? outer_swap(r.outer) : STATUS_OK);
    }
    if (seen[0][0] == seen[0][1] || seen[0][0] != seen[1][1] || seen[0][1] != seen[1][0] || seen[2][0] != seen[0][0] ||
        seen[2][1] != seen[0][1])
        return status_fail(STATUS_FORMAT, "did not change places");
    TRY(outer_drop(r.outer));
    test_rank_close(&r);
    return STATUS_OK;
}

static void test_swap(void **state) {
    (void)state;
    static struct outer_options o = {{4, 1, 2, OUTER_STRIDED, 1, 1}, 0.4, 0.9, 0.5, OUTER_FP4};
    expect_ok(comm_threads_run(2, run_swap, &o));
}

int main(void) {
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_reference), cmocka_unit_test(test_layouts), cmocka_unit_test(test_plain),
        cmocka_unit_test(test_mean),      cmocka_unit_test(test_faults),  cmocka_unit_test(test_bytes),
        cmocka_unit_test(test_swap),
    };
    threads_set_count(1);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
