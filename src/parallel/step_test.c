/* A whole step on the reference kernels in double precision. */
#include "parallel/step.h"

#include "base/random.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { LENGTH = 6, BATCH = 4, VOCAB = 31 };

struct bench {
    struct model *model;
    struct workspace *workspace;
    struct comm comm;
    struct ranks ranks;
    struct optimizer_settings optimizer;
    struct step_runner runner;
    int32_t tokens[BATCH * (LENGTH + 1)];
};

static void bench_init_with(struct bench *b, int64_t experts, int micro_batches, bool recompute, bool tied) {
    struct model_config c;
    model_config_init(&c);
    c.vocab_size = VOCAB;
    c.hidden_size = 8;
    c.num_hidden_layers = 2;
    c.num_attention_heads = 2;
    c.num_key_value_heads = 1;
    c.num_experts = experts;
    c.tie_word_embeddings = tied;
    c.intermediate_size = 12;
    c.moe_intermediate_size = 6;
    c.initializer_range = 0.2;
    assert_int_equal(model_config_check(&c, "test"), STATUS_OK);
    struct model_options options = {kernels_ref(), device_cpu(), DTYPE_F64, DTYPE_F64, LENGTH, true, sharding_single()};
    assert_int_equal(model_create(&c, options, &b->model), STATUS_OK);
    assert_int_equal(model_initialize(b->model, 11), STATUS_OK);
    struct workspace_options workspace = {BATCH / micro_batches, LENGTH, true, recompute};
    assert_int_equal(workspace_create(b->model, workspace, &b->workspace), STATUS_OK);
    b->comm = comm_self();
    b->ranks = ranks_single(&b->comm);
    optimizer_settings_init(&b->optimizer);
    b->optimizer.warmup_steps = 0;
    b->optimizer.lr = 1e-2;
    assert_int_equal(step_runner_init(&b->runner, b->model, b->workspace, &b->ranks, &b->optimizer,
                                      (struct step_settings){.micro_batch_count = micro_batches}),
                     STATUS_OK);
    for (int i = 0; i < BATCH * (LENGTH + 1); i++)
        b->tokens[i] = (int32_t)(random_bits(2, 3, (uint64_t)i) % VOCAB);
}

static void bench_init(struct bench *b, int64_t experts, int micro_batches, bool recompute) {
    bench_init_with(b, experts, micro_batches, recompute, false);
}

static void bench_release(struct bench *b) {
    step_runner_release(&b->runner);
    workspace_destroy(b->workspace);
    model_destroy(b->model);
}

static struct step_result run(struct bench *b, int64_t step) {
    struct step_result result;
    struct step_input input = {.tokens = b->tokens, .step = step, .step_count = 30};
    assert_int_equal(step_run(&b->runner, input, &result), STATUS_OK);
    return result;
}

static void test_learns_one_batch_by_heart(void **state) {
    (void)state;
    struct bench b;
    bench_init(&b, 4, 1, false);
    double first = run(&b, 1).loss, last = first;
    for (int step = 2; step <= 30; step++)
        last = run(&b, step).loss;
    assert_true(fabs(first - log(VOCAB)) < 0.7);
    assert_true(last < 0.6 * first);
    bench_release(&b);
}

/* The loss and the gradient of a dense model do not depend on how the batch is cut. */
static void test_micro_batches_add_up(void **state) {
    (void)state;
    struct bench whole, parts;
    bench_init(&whole, 0, 1, false);
    bench_init(&parts, 0, 4, false);
    for (int step = 1; step <= 3; step++) {
        struct step_result a = run(&whole, step), b = run(&parts, step);
        assert_true(fabs(a.loss - b.loss) <= 1e-12 * fabs(a.loss));
        assert_true(fabs(a.gradient_norm - b.gradient_norm) <= 1e-11 * a.gradient_norm);
    }
    bench_release(&whole);
    bench_release(&parts);
}

static void test_recompute_changes_nothing(void **state) {
    (void)state;
    struct bench kept, again;
    bench_init(&kept, 4, 2, false);
    bench_init(&again, 4, 2, true);
    for (int step = 1; step <= 3; step++) {
        struct step_result a = run(&kept, step), b = run(&again, step);
        assert_true(a.loss == b.loss && a.gradient_norm == b.gradient_norm);
    }
    assert_true(again.workspace->memory.activations < kept.workspace->memory.activations);
    bench_release(&kept);
    bench_release(&again);
}

static void test_step_that_is_not_finite_changes_no_weight(void **state) {
    (void)state;
    struct bench b;
    bench_init(&b, 4, 1, false);
    struct tensor norm = model_tensor(b.model, b.model->weight, PARAMETER_FINAL_NORM, -1);
    ((double *)norm.data)[2] = INFINITY;
    struct tensor head = model_tensor(b.model, b.model->weight, PARAMETER_HEAD, -1);
    double *before = malloc(tensor_bytes(head));
    memcpy(before, head.data, tensor_bytes(head));
    assert_true(run(&b, 1).skipped);
    assert_memory_equal(before, head.data, tensor_bytes(head));
    free(before);
    bench_release(&b);
}

static bool some_expert_has_no_row(const struct workspace *w, int64_t experts) {
    const int32_t *count = w->balance_count[0].data; /* of all micro-batches */
    for (int64_t e = 0; e < experts; e++)
        if (count[e] == 0)
            return true;
    return false;
}

/* The same steps, one bench with gradients that hold NaN before each. */
static void check_poisoned(int64_t experts, int micro_batches, bool recompute, bool tied) {
    struct bench clean, poisoned;
    bench_init_with(&clean, experts, micro_batches, recompute, tied);
    bench_init_with(&poisoned, experts, micro_batches, recompute, tied);
    struct model *a = clean.model, *b = poisoned.model;
    for (int step = 1; step <= 3; step++) {
        memset(a->all_gradients.data, 0, tensor_bytes(a->all_gradients));
        memset(b->all_gradients.data, 0xFF, tensor_bytes(b->all_gradients));
        struct step_result x = run(&clean, step), y = run(&poisoned, step);
        assert_int_equal(y.skipped, STEP_UPDATED);
        assert_true(x.loss == y.loss && x.gradient_norm == y.gradient_norm);
        if (experts > 8)
            assert_true(some_expert_has_no_row(poisoned.workspace, experts));
    }
    for (int i = 0; i < a->table.count; i++)
        assert_memory_equal(a->weight[i].data, b->weight[i].data, tensor_bytes(a->weight[i]));
    bench_release(&clean);
    bench_release(&poisoned);
}

static void test_a_step_reads_no_old_gradient(void **state) {
    (void)state;
    for (int micro_batches = 1; micro_batches <= 4; micro_batches *= 2)
        for (int tied = 0; tied < 2; tied++) {
            check_poisoned(0, micro_batches, false, tied);
            check_poisoned(4, micro_batches, tied, tied);
            check_poisoned(100, micro_batches, !tied, tied); /* more than there are rows for */
        }
}

static void count_event(void *context, const struct event *event, double seconds) {
    assert_true(seconds >= 0);
    ((int *)context)[event->kind]++;
}

static void test_observer_sees_every_event(void **state) {
    (void)state;
    struct bench b;
    int seen[EVENT_KIND_COUNT] = {0}, total = 0;
    bench_init(&b, 4, 2, true);
    b.runner.observer = (struct step_observer){count_event, seen};
    run(&b, 1);
    for (int i = 0; i < EVENT_KIND_COUNT; i++)
        total += seen[i];
    assert_int_equal(total, b.runner.schedule.count);
    bench_release(&b);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_learns_one_batch_by_heart),
        cmocka_unit_test(test_micro_batches_add_up),
        cmocka_unit_test(test_recompute_changes_nothing),
        cmocka_unit_test(test_step_that_is_not_finite_changes_no_weight),
        cmocka_unit_test(test_a_step_reads_no_old_gradient),
        cmocka_unit_test(test_observer_sees_every_event),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
