/* A step takes no memory: every request of the process is counted while steps run on the processor's own kernels. */
#include "parallel/step.h"

#include "base/allocation_testing.h"
#include "base/random.h"
#include "base/threads.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { LENGTH = 96, BATCH = 4, VOCAB = 257, WARM_STEPS = 3, STEPS = 8 };

struct training {
    struct model *model;
    struct workspace *workspace;
    struct comm comm;
    struct ranks ranks;
    struct optimizer_settings optimizer;
    struct step_runner runner;
    int32_t tokens[BATCH * (LENGTH + 1)];
};

static void training_init(struct training *t, const struct kernel_ops *ops, enum dtype compute, bool recompute) {
    struct model_config c;
    model_config_init(&c);
    c.vocab_size = VOCAB;
    c.hidden_size = 64;
    c.num_hidden_layers = 2;
    c.num_attention_heads = 4;
    c.num_key_value_heads = 2;
    c.num_experts = 6;
    c.moe_intermediate_size = 48;
    assert_int_equal(model_config_check(&c, "test"), STATUS_OK);
    struct model_options options = {ops, device_cpu(), compute, DTYPE_F32, LENGTH, true, sharding_single()};
    struct workspace_options workspace = {BATCH / 2, LENGTH, true, recompute};
    assert_int_equal(model_create(&c, options, &t->model), STATUS_OK);
    assert_int_equal(model_initialize(t->model, 5), STATUS_OK);
    assert_int_equal(workspace_create(t->model, workspace, &t->workspace), STATUS_OK);
    t->comm = comm_self();
    t->ranks = ranks_single(&t->comm);
    optimizer_settings_init(&t->optimizer);
    assert_int_equal(step_runner_init(&t->runner, t->model, t->workspace, &t->ranks, &t->optimizer,
                                      (struct step_settings){.micro_batch_count = 2}),
                     STATUS_OK);
}

static void training_release(struct training *t) {
    step_runner_release(&t->runner);
    workspace_destroy(t->workspace);
    model_destroy(t->model);
}

/* Other tokens every step, so that other experts are chosen. */
static void run(struct training *t, int64_t step) {
    struct step_result result;
    for (int i = 0; i < BATCH * (LENGTH + 1); i++)
        t->tokens[i] = (int32_t)(random_bits(2, (uint64_t)step, (uint64_t)i) % VOCAB);
    struct step_input input = {.tokens = t->tokens, .step = step, .step_count = 100};
    assert_int_equal(step_run(&t->runner, input, &result), STATUS_OK);
    assert_false(result.skipped);
}

static void check(const char *kernels, enum dtype compute, bool recompute) {
    struct training t;
    const struct kernel_ops *ops;
    assert_int_equal(kernels_choose(kernels, &ops), STATUS_OK);
    training_init(&t, ops, compute, recompute);
    long before = 0;
    for (int64_t step = 1; step <= WARM_STEPS + STEPS; step++) {
        run(&t, step);
        if (step == WARM_STEPS)
            before = atomic_load(&requests);
    }
    long during = atomic_load(&requests) - before;
    if (during != 0)
        print_error("%s, %s: %ld requests for memory in %d steps\n", kernels, dtype_name(compute), during, STEPS);
    assert_int_equal(during, 0);
    training_release(&t);
}

static void test_a_step_takes_no_memory(void **state) {
    (void)state;
    if (!COUNTS_REQUESTS)
        skip();
    assert_true(atomic_load(&requests) > 0); /* they are counted */
    for (int threads = 1; threads <= 3; threads++) {
        threads_set_count(threads);
        for (const char *const *name = kernels_available(); *name; name++) {
            if (strcmp(*name, "ref") == 0)
                continue;
            check(*name, DTYPE_F32, false);
            check(*name, DTYPE_BF16, true);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_a_step_takes_no_memory)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
