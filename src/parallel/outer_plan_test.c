/* When what is sent and applied: against the rule written out step by step, and the paper's example. */
#include "parallel/outer_plan.h"

#include "model/parameter.h"
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <cmocka.h>

/* H 100, two fragments: 100, 150, 200, 250; one step later they are applied. */
static void test_example(void **state) {
    (void)state;
    struct outer_plan plan = {100, 2, 6, OUTER_STRIDED, 1, 1};
    assert_int_equal(outer_plan_check(&plan), STATUS_OK);
    for (int64_t step = 1; step < 275; step++) {
        int expected = step >= 100 && step % 50 == 0 ? (int)(step / 50 % 2) : -1;
        assert_int_equal(outer_plan_sends(&plan, step), expected);
        assert_int_equal(outer_plan_applies(&plan, step + 1), expected);
    }
}

/* The fragment that is sent after a step, by trying all. */
static int sent_by_rule(const struct outer_plan *plan, int64_t step) {
    int found = -1;
    for (int p = 0; p < plan->fragment_count; p++) {
        int64_t offset = p * plan->sync_steps / plan->fragment_count;
        if (step >= offset + plan->sync_steps && (step - offset) % plan->sync_steps == 0) {
            assert_int_equal(found, -1);
            found = p;
        }
    }
    return found;
}

static void check_plan(const struct outer_plan *plan) {
    int64_t under_way_until = 0, sent_at = 0;
    int under_way = -1, rounds[40] = {0};
    for (int64_t step = 1; step < 5 * plan->sync_steps; step++) {
        int sent = sent_by_rule(plan, step);
        int64_t found_step = 0;
        assert_int_equal(outer_plan_sends(plan, step), sent);
        if (sent >= 0) {
            assert_true(step >= under_way_until); /* one at a time */
            under_way = sent;
            sent_at = step;
            under_way_until = step + plan->overlap_steps;
            assert_int_equal(outer_plan_round(plan, sent, step), ++rounds[sent]);
            assert_int_equal(outer_plan_step(plan, sent, rounds[sent]), step);
        }
        bool waits = under_way >= 0 && step < under_way_until;
        assert_int_equal(outer_plan_under_way(plan, step, &found_step), waits ? under_way : -1);
        if (waits)
            assert_int_equal(found_step, sent_at);
        assert_int_equal(outer_plan_applies(plan, step), under_way >= 0 && step == under_way_until ? under_way : -1);
    }
    for (int p = 0; p < plan->fragment_count; p++)
        assert_in_range(rounds[p], 3, 4);
}

static void test_every_plan(void **state) {
    (void)state;
    for (int64_t h = 1; h <= 33; h++)
        for (int p = 1; p <= h && p <= 34; p++)
            for (int64_t overlap = 0; overlap < h / p || overlap == 0; overlap++) {
                struct outer_plan plan = {h, p, 40, OUTER_STRIDED, overlap, 1};
                assert_int_equal(outer_plan_check(&plan), STATUS_OK);
                check_plan(&plan);
            }
}

static void test_fragments(void **state) {
    (void)state;
    struct outer_plan plan = {100, 4, 8, OUTER_STRIDED, 1, 1};
    static const int strided[] = {0, 1, 2, 0, 1, 2, 0, 1};
    for (int block = 0; block < 8; block++)
        assert_int_equal(outer_plan_fragment_of(&plan, block), strided[block]);
    assert_int_equal(outer_plan_fragment_of(&plan, GROUP_EMBEDDING), 3);
    assert_int_equal(outer_plan_fragment_of(&plan, GROUP_HEAD), 3);
    plan.order = OUTER_SEQUENTIAL;
    int count[3] = {0}, before = 0;
    for (int block = 0; block < 8; block++) {
        int fragment = outer_plan_fragment_of(&plan, block);
        assert_in_range(fragment, before, before + 1);
        before = fragment;
        count[fragment]++;
    }
    assert_true(count[0] >= 2 && count[1] >= 2 && count[2] >= 2);
    plan.fragment_count = 1;
    assert_int_equal(outer_plan_fragment_of(&plan, 5), 0);
    assert_int_equal(outer_plan_fragment_of(&plan, GROUP_HEAD), 0);
}

/* L/3 + 1; fewer where they could not arrive one after the other. */
static void test_chosen_fragments(void **state) {
    (void)state;
    assert_int_equal(outer_plan_fragments(24, 100, 1), 9);
    assert_int_equal(outer_plan_fragments(6, 30, 1), 3);
    assert_int_equal(outer_plan_fragments(1, 100, 0), 2);
    assert_int_equal(outer_plan_fragments(108, 10, 1), 5);
    assert_int_equal(outer_plan_fragments(4, 1, 0), 1);
    for (int64_t h = 2; h < 60; h++)
        for (int64_t overlap = 0; overlap < h; overlap++) {
            struct outer_plan plan = {h, outer_plan_fragments(12, h, overlap), 12, OUTER_STRIDED, overlap, 1};
            assert_int_equal(outer_plan_check(&plan), STATUS_OK);
        }
}

static void refuse(struct outer_plan plan, const char *words) {
    assert_int_equal(outer_plan_check(&plan), STATUS_USAGE);
    assert_non_null(strstr(status_text(), words));
}

static void test_refused(void **state) {
    (void)state;
    refuse((struct outer_plan){100, 8, 6, OUTER_STRIDED, 1, 1}, "at most 7");
    refuse((struct outer_plan){5, 6, 30, OUTER_STRIDED, 0, 1}, "at most 5 fragments");
    refuse((struct outer_plan){100, 4, 6, OUTER_STRIDED, 25, 1}, "at most 24");
    refuse((struct outer_plan){10, 10, 30, OUTER_STRIDED, 1, 1}, "fewer fragments");
}

int main(void) {
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_example),          cmocka_unit_test(test_every_plan), cmocka_unit_test(test_fragments),
        cmocka_unit_test(test_chosen_fragments), cmocka_unit_test(test_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
