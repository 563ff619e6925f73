/* The costs of a step's events add up to what the model says of a step. */
#include "parallel/cost.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <cmocka.h>

enum { LENGTH = 6, BATCH = 4 };

struct case_of_cost {
    int64_t experts;
    bool tied, recompute;
    int micro_batches;
};

/* Norms, the router and an embedding that is only looked up; rows are padded to 64 numbers. */
static void check_cleared(const struct model *m, const struct event *event, const struct workspace *workspace) {
    double elements = 0;
    for (int i = 0; i < m->table.count; i++)
        if (!m->table.rows[i].is_packed)
            elements += (double)((parameter_elements(&m->table.rows[i]) + 63) / 64 * 64);
    assert_int_equal(event->kind, EVENT_CLEAR);
    assert_true(event_cost(event, m, workspace).bytes == elements * sizeof(double));
}

static struct event_cost add_up(struct case_of_cost wanted, double *expected) {
    struct model_config c;
    struct model *model;
    struct workspace *workspace;
    struct schedule schedule;
    model_config_init(&c);
    c.vocab_size = 31;
    c.hidden_size = 8;
    c.num_hidden_layers = 3;
    c.num_attention_heads = 4;
    c.num_key_value_heads = 2;
    c.head_dim = 6;
    c.num_experts = wanted.experts;
    c.intermediate_size = 12;
    c.moe_intermediate_size = 10;
    c.tie_word_embeddings = wanted.tied;
    assert_int_equal(model_config_check(&c, "test"), STATUS_OK);
    struct model_options options = {kernels_ref(), device_cpu(), DTYPE_F64, DTYPE_F64, LENGTH, true, sharding_single()};
    assert_int_equal(model_create(&c, options, &model), STATUS_OK);
    struct workspace_options shape = {BATCH / wanted.micro_batches, LENGTH, true, wanted.recompute};
    assert_int_equal(workspace_create(model, shape, &workspace), STATUS_OK);
    struct schedule_options events = {.block_count = (int)c.num_hidden_layers,
                                      .micro_batch_count = wanted.micro_batches,
                                      .recompute = wanted.recompute};
    assert_int_equal(schedule_build(&schedule, events), STATUS_OK);
    struct event_cost sum = {0};
    for (int i = 0; i < schedule.count; i++) {
        struct event_cost cost = event_cost(&schedule.events[i], model, workspace);
        sum.operations += cost.operations;
        sum.bytes += schedule.events[i].kind == EVENT_OPTIMIZER ? cost.bytes : 0;
    }
    check_cleared(model, &schedule.events[0], workspace);
    *expected = BATCH * LENGTH * model_train_operations_per_token(&c, LENGTH);
    /* One optimizer pass over seven numbers a parameter, and what is packed. */
    double least = 7 * (double)sizeof(double) * (double)parameter_table_count(&model->table, &c).total;
    assert_true(sum.bytes >= least && sum.bytes <= least + (double)model->memory.packed);
    schedule_release(&schedule);
    workspace_destroy(workspace);
    model_destroy(model);
    return sum;
}

static void test_operations_add_up_to_the_step(void **state) {
    (void)state;
    const struct case_of_cost cases[] = {{4, false, false, 1}, {4, true, false, 2}, {0, false, false, 4}};
    for (int i = 0; i < 3; i++) {
        double expected;
        assert_true(add_up(cases[i], &expected).operations == expected); /* whole numbers: exact */
    }
}

/* The forward of the blocks again, a third of what a step spends there, less the experts' last product. */
static void test_recompute_costs_more_than_the_step(void **state) {
    (void)state;
    double expected, sum = add_up((struct case_of_cost){4, false, true, 2}, &expected).operations;
    assert_true(sum > expected && sum < expected * 4 / 3);
}

/* By hand: D=8, H=4, G=2, P=6, E=4, K=2, F=10, V=31, T=6, L=3. */
static void test_a_step_counted_by_hand(void **state) {
    (void)state;
    double expected, block = 8 * 24 * 2 + 8 * 12 * 2 + 8 * 4 + 3 * 8 * 20;
    add_up((struct case_of_cost){4, false, false, 1}, &expected);
    assert_true(expected == BATCH * LENGTH * (6 * (3 * block + 8 * 31) + 6 * 3 * 24 * LENGTH));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_operations_add_up_to_the_step),
        cmocka_unit_test(test_recompute_costs_more_than_the_step),
        cmocka_unit_test(test_a_step_counted_by_hand),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
