#include "parallel/schedule.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <cmocka.h>

static void build(struct schedule *s, struct schedule_options options) {
    assert_int_equal(schedule_build(s, options), STATUS_OK);
}

static int count_kind(const struct schedule *s, enum event_kind kind) {
    int count = 0;
    for (int i = 0; i < s->count; i++)
        count += s->events[i].kind == kind;
    return count;
}

static int find_event(const struct schedule *s, enum event_kind kind, int block, int micro_batch) {
    for (int i = 0; i < s->count; i++)
        if (s->events[i].kind == kind && s->events[i].block == block && s->events[i].micro_batch == micro_batch)
            return i;
    fail_msg("%s of block %d, micro-batch %d is missing", event_kind_name(kind), block, micro_batch);
    return -1;
}

static void test_counts(void **state) {
    (void)state;
    struct schedule s;
    build(&s, (struct schedule_options){.block_count = 3, .micro_batch_count = 2, .recompute = false});
    assert_int_equal(count_kind(&s, EVENT_ATTENTION), 6);
    assert_int_equal(count_kind(&s, EVENT_EXPERTS_GRAD), 6);
    assert_int_equal(count_kind(&s, EVENT_HEAD), 2);
    assert_int_equal(count_kind(&s, EVENT_REDUCE), 5);    /* once a step: three blocks, embedding and head */
    assert_int_equal(count_kind(&s, EVENT_OPTIMIZER), 5);
    assert_int_equal(count_kind(&s, EVENT_RECOMPUTE), 0);
    schedule_release(&s);
}

/* Everything waits only for what stands before it, and each optimizer for the norm of all gradients. */
static void test_order(void **state) {
    (void)state;
    struct schedule s;
    build(&s, (struct schedule_options){.block_count = 4, .micro_batch_count = 3, .recompute = true});
    for (int i = 1; i < s.count; i++) {
        assert_true(s.events[i].wait_count >= 1);
        for (int w = 0; w < s.events[i].wait_count; w++)
            assert_true(s.events[i].waits[w] < i);
    }
    int norm = find_event(&s, EVENT_GRADIENT_NORM, BLOCK_OUTSIDE, -1);
    for (int block = 0; block < 4; block++) {
        assert_true(find_event(&s, EVENT_REDUCE, block, 2) < norm);
        assert_true(find_event(&s, EVENT_OPTIMIZER, block, -1) > norm);
        assert_true(find_event(&s, EVENT_RECOMPUTE, block, 1) < find_event(&s, EVENT_EXCHANGE_BACK_GRAD, block, 1));
        assert_true(find_event(&s, EVENT_EXPERTS, block, 2) < find_event(&s, EVENT_HEAD, BLOCK_OUTSIDE, 2));
    }
    schedule_release(&s);
}

static void test_print(void **state) {
    (void)state;
    struct schedule s;
    struct text out = {0};
    build(&s, (struct schedule_options){.block_count = 1, .micro_batch_count = 1, .recompute = false});
    schedule_print(&s, NULL, &out);
    assert_non_null(strstr(out.data, "exchange back"));
    text_release(&out);
    schedule_release(&s);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_counts), cmocka_unit_test(test_order),
                                       cmocka_unit_test(test_print)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
