/* Steps whose computing a device repeats are, to the last bit, those that ask for it each time. On a device, or a model of one. */
#include "parallel/step.h"

#include "base/random.h"
#include "parallel/repeats_testing.h"
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { LENGTH = 16, STEPS = 4, MICRO_BATCHES_MAX = 32 };

struct run {
    enum dtype compute;
    int64_t experts;
    int micro_batches;
    bool recompute, repeats;
    int evaluated_after; /* a step, after which another thread uses the model, and takes scratch for it; 0: none */
    /* what came out */
    struct step_result results[STEPS];
    uint64_t hash; /* of weights */
};

struct trainee {
    struct model *model;
    struct workspace *workspace, *evaluation;
    struct comm comm;
    struct ranks ranks;
    struct optimizer_settings optimizer;
    struct step_runner runner;
};

static void open_trainee(struct trainee *t, const struct run *run, const struct device *device) {
    t->model = small_model(device, run->compute, run->experts, LENGTH, true, 11);
    struct workspace_options training = {1, LENGTH, true, run->recompute}, evaluation = {1, LENGTH, false, false};
    assert_int_equal(workspace_create(t->model, training, &t->workspace), STATUS_OK);
    assert_int_equal(workspace_create(t->model, evaluation, &t->evaluation), STATUS_OK);
    t->comm = comm_self();
    t->ranks = ranks_single(&t->comm);
    optimizer_settings_init(&t->optimizer);
    t->optimizer.warmup_steps = 0;
    t->optimizer.lr = 1e-2;
    struct step_settings settings = {.micro_batch_count = run->micro_batches, .repeats = run->repeats};
    assert_int_equal(step_runner_init(&t->runner, t->model, t->workspace, &t->ranks, &t->optimizer, settings), STATUS_OK);
}

static void close_trainee(struct trainee *t) {
    step_runner_release(&t->runner);
    workspace_destroy(t->workspace);
    workspace_destroy(t->evaluation);
    model_destroy(t->model);
}

static void *evaluate(void *context) {
    const struct trainee *t = context;
    struct workspace *w = t->evaluation;
    t->model->context.ops->fill(w->ids, 3);
    model_embed_forward(t->model, w);
    for (int block = 0; block < w->block_count; block++)
        if (block_forward(t->model, w, block, NULL, false) != STATUS_OK)
            return NULL;
    t->model->device->finish();
    return w;
}

static void evaluate_elsewhere(struct trainee *t) {
    pthread_t thread;
    void *done;
    assert_int_equal(pthread_create(&thread, NULL, evaluate, t), 0);
    assert_int_equal(pthread_join(thread, &done), 0);
    assert_non_null(done);
}

static uint64_t hash_weights(const struct model *m) {
    uint64_t sum = 14695981039346656037u;
    for (int i = 0; i < m->table.count; i++) {
        size_t bytes = tensor_bytes(m->weight[i]);
        unsigned char *host = malloc(bytes);
        m->device->copy_to_host(host, m->weight[i].data, bytes);
        for (size_t at = 0; at < bytes; at++)
            sum = (sum ^ host[at]) * 1099511628211u;
        free(host);
    }
    return sum;
}

/* Other tokens in every step: other experts have rows. */
static void train(struct run *run, const struct device *device) {
    struct trainee t;
    int32_t tokens[MICRO_BATCHES_MAX * (LENGTH + 1)];
    open_trainee(&t, run, device);
    for (int step = 1; step <= STEPS; step++) {
        for (int i = 0; i < run->micro_batches * (LENGTH + 1); i++)
            tokens[i] = (int32_t)(random_bits(2, (uint64_t)step, (uint64_t)i) % VOCAB);
        struct step_input input = {.tokens = tokens, .step = step, .step_count = STEPS};
        assert_int_equal(step_run(&t.runner, input, &run->results[step - 1]), STATUS_OK);
        assert_int_equal(run->results[step - 1].skipped, STEP_UPDATED);
        if (step == run->evaluated_after)
            evaluate_elsewhere(&t);
    }
    run->hash = hash_weights(t.model);
    close_trainee(&t);
}

static void check_repeated(struct run run, const struct device *device) {
    struct run plain = run, repeated = run;
    repeated.repeats = true;
    train(&plain, device);
    assert_int_equal(seen.begun, 0);
    train(&repeated, device);
    for (int i = 0; i < STEPS; i++) {
        assert_true(plain.results[i].loss == repeated.results[i].loss);
        assert_true(plain.results[i].gradient_norm == repeated.results[i].gradient_norm);
    }
    assert_true(plain.hash == repeated.hash);
}

/* With tokens of its own for every micro-batch, none of which is waited for. */
static void test_the_processor_agrees(void **state) {
    (void)state;
    const struct device *device = watched();
    if (!device)
        skip();
    struct run here = {.compute = DTYPE_F32, .experts = 5, .micro_batches = 3}, there = here;
    train(&here, device_cpu());
    train(&there, device);
    for (int i = 0; i < STEPS; i++)
        assert_true(fabs(here.results[i].loss - there.results[i].loss) <= 1e-5 * here.results[i].loss);
}

/* The first step of each is plain, the second records; a recording for each micro-batch. */
static void test_repeated_steps_are_the_same(void **state) {
    (void)state;
    static const struct run runs[] = {
        {.compute = DTYPE_F32, .experts = 5, .micro_batches = 1},
        {.compute = DTYPE_BF16, .experts = 5, .micro_batches = 3, .recompute = true},
        {.compute = DTYPE_BF16, .experts = 0, .micro_batches = 2},
    };
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        const struct device *device = watched();
        if (!device)
            skip();
        check_repeated(runs[i], device);
        assert_int_equal(seen.begun, runs[i].micro_batches);
        assert_int_equal(seen.repeated, (STEPS - 1) * runs[i].micro_batches);
        assert_int_equal(seen.released, runs[i].micro_batches);
    }
}

/* Of more micro-batches than are repeated the others are asked for each time. */
static void test_many_micro_batches(void **state) {
    (void)state;
    const struct device *device = watched();
    if (!device)
        skip();
    check_repeated((struct run){.compute = DTYPE_F32, .experts = 3, .micro_batches = REPEATS_MAX + 2}, device);
    assert_int_equal(seen.begun, REPEATS_MAX);
}

/* Scratch that recordings used has moved: they are made anew. */
static void test_scratch_that_moves(void **state) {
    (void)state;
    const struct device *device = watched();
    if (!device)
        skip();
    check_repeated((struct run){.compute = DTYPE_F32, .experts = 5, .micro_batches = 2, .evaluated_after = 2}, device);
    assert_int_equal(seen.out_of_date, 2);
    assert_int_equal(seen.begun, 4);
    assert_int_equal(seen.released, 4);
    assert_int_equal(seen.repeated, 2 * (STEPS - 1));
}

/* What a device cannot record is done without, and not tried again. */
static void test_recordings_that_fail(void **state) {
    (void)state;
    for (int good = 0; good < 2; good++) {
        const struct device *device = watched();
        if (!device)
            skip();
        seen.failures = 1;
        check_repeated((struct run){.compute = DTYPE_F32, .experts = 5, .micro_batches = 2 - good}, device);
        assert_int_equal(seen.begun, 1);
        assert_int_equal(seen.repeated, 0);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_processor_agrees),
        cmocka_unit_test(test_repeated_steps_are_the_same),
        cmocka_unit_test(test_many_micro_batches),
        cmocka_unit_test(test_scratch_that_moves),
        cmocka_unit_test(test_recordings_that_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
