/* The guard on series that are made to fool it: what must pass passes, what must not is refused, and nothing is
 * forgotten on the way through a file. */
#include "train/guard.h"

#include "base/random.h"
#include "base/text.h"
#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static const struct guard_settings skips = {SPIKES_SKIP, 3}, rolls_back = {SPIKES_ROLL_BACK, 3},
                                   ignores = {SPIKES_IGNORE, 3};

/* As step_run answers. */
static struct step_result judge(const struct guard *guard, struct guard_settings settings, double loss, double norm) {
    struct step_limits limits = guard_limits(guard, settings);
    struct step_result result = {.loss = loss, .gradient_norm = norm};
    if (!isfinite(loss) || !isfinite(norm))
        result.skipped = STEP_NOT_FINITE;
    else if (limits.loss > 0 && loss > limits.loss)
        result.skipped = STEP_LOSS_SPIKE;
    else if (limits.gradient_norm > 0 && norm > limits.gradient_norm)
        result.skipped = STEP_GRADIENT_SPIKE;
    return result;
}

struct run {
    struct guard guard;
    struct guard_settings settings;
    int64_t step, skipped;
    enum guard_verdict verdict;
};

static enum step_skip go(struct run *run, double loss, double norm) {
    struct step_result result = judge(&run->guard, run->settings, loss, norm);
    run->verdict = guard_note(&run->guard, run->settings, ++run->step, &result);
    run->skipped += result.skipped != STEP_UPDATED;
    return result.skipped;
}

static struct run run_of(struct guard_settings settings, int steps, double loss, double norm) {
    struct run run = {.settings = settings};
    for (int i = 0; i < steps; i++)
        go(&run, loss, norm);
    return run;
}

static void test_a_constant_loss_has_room(void **state) {
    (void)state;
    struct run run = run_of(skips, 500, 3, 1);
    assert_int_equal(run.skipped, 0);
    assert_int_equal(go(&run, 3.14, 9.9), STEP_UPDATED);
    assert_int_equal(go(&run, 3.16, 1), STEP_LOSS_SPIKE);
    assert_int_equal(go(&run, 3, 10.1), STEP_GRADIENT_SPIKE);
    run = run_of(skips, 500, 0.25, 1); /* 5 % of it would be next to nothing */
    assert_int_equal(go(&run, 0.34, 1), STEP_UPDATED);
    assert_int_equal(go(&run, 0.36, 1), STEP_LOSS_SPIKE);
}

static void test_nothing_is_a_spike_before_there_is_a_history(void **state) {
    (void)state;
    struct run run = run_of(skips, GUARD_HISTORY_LEAST - 1, 3, 1);
    assert_int_equal(go(&run, 1e30, 1e30), STEP_UPDATED);
    assert_int_equal(go(&run, 1e30, 1), STEP_LOSS_SPIKE); /* of 32 values, one is far off: the median does not care */
    run = run_of(skips, 3, 3, 1);
    assert_int_equal(go(&run, NAN, 1), STEP_NOT_FINITE);
    assert_int_equal(go(&run, 3, -INFINITY), STEP_NOT_FINITE);
}

/* Falling, rising within reason, and through a sharp warm-up, with the noise of small batches. */
static void test_trends_pass(void **state) {
    (void)state;
    for (int series = 0; series < 4; series++) {
        struct run run = {.settings = skips};
        for (int i = 0; i < 5000; i++) {
            double noise = random_normal(7, (uint64_t)series, (uint64_t)i);
            const double losses[] = {3 + 8 * exp(-i / 40.0), 2 + 0.002 * i, 4 - 0.0007 * i,
                                     10.8 - 7 * (i > 50) * (1 - exp((50 - i) / 9.0))};
            go(&run, losses[series] + 0.05 * noise, exp(0.4 * noise) * (series == 0 ? 5 * exp(-i / 20.0) + 1 : 1));
            assert_int_equal(run.verdict, GUARD_GO_ON);
        }
        assert_in_range(run.skipped, 0, 3);
    }
}

/* Normal noise, wider than the floors: some in ten thousand are refused, never three in a row. */
static void test_false_alarms_are_rare(void **state) {
    (void)state;
    const int64_t steps = 200000;
    struct run run = {.settings = skips};
    for (int64_t i = 0; i < steps; i++) {
        go(&run, 3 + 0.2 * random_normal(11, 0, (uint64_t)i), exp(0.5 * random_normal(11, 1, (uint64_t)i)));
        assert_int_equal(run.verdict, GUARD_GO_ON);
    }
    print_message("%lld of %lld steps of normal noise are taken for spikes\n", (long long)run.skipped,
                  (long long)steps);
    assert_in_range(run.skipped, 0, 100);
}

static void test_outliers_leave_no_trace(void **state) {
    (void)state;
    struct run run = run_of(skips, 100, 3, 1);
    struct step_limits before = guard_limits(&run.guard, skips);
    assert_int_equal(go(&run, 5, 1), STEP_LOSS_SPIKE);
    assert_int_equal(run.verdict, GUARD_GO_ON);
    assert_int_equal(go(&run, 5, 40), STEP_LOSS_SPIKE);
    assert_int_equal(run.verdict, GUARD_GO_ON);
    struct step_limits after = guard_limits(&run.guard, skips);
    assert_memory_equal(&before, &after, sizeof before);
    assert_int_equal(go(&run, 3, 1), STEP_UPDATED);
    assert_int_equal(run.guard.skipped_in_a_row, 0);
}

static void test_three_in_a_row_roll_back(void **state) {
    (void)state;
    struct run run = run_of(skips, 100, 3, 1);
    go(&run, NAN, 1), go(&run, 9, 1);
    assert_int_equal(run.verdict, GUARD_GO_ON);
    go(&run, 3, 99);
    assert_int_equal(run.verdict, GUARD_ROLL_BACK);
    run = run_of(rolls_back, 100, 3, 1);
    go(&run, NAN, 1);
    assert_int_equal(run.verdict, GUARD_GO_ON);
    go(&run, 9, 1);
    assert_int_equal(run.verdict, GUARD_ROLL_BACK);
    run = run_of(ignores, 100, 3, 1);
    assert_int_equal(go(&run, 1e30, 1e30), STEP_UPDATED);
    go(&run, NAN, 1), go(&run, NAN, 1);
    assert_int_equal(run.verdict, GUARD_GO_ON);
    go(&run, NAN, 1);
    assert_int_equal(run.verdict, GUARD_ROLL_BACK);
}

/* Back to step 90 again and again: an end after the third, whatever is accepted on the way, until it is past. */
static void test_no_circles(void **state) {
    (void)state;
    for (int accepted = 0; accepted < 100; accepted += 33) {
        struct run checkpoint = run_of(skips, 90, 3, 1), run = checkpoint;
        int rollbacks = 0;
        for (;; rollbacks++) {
            for (int i = 0; i < accepted; i++)
                go(&run, 3, 1);
            go(&run, NAN, 1), go(&run, NAN, 1), go(&run, NAN, 1);
            if (run.verdict != GUARD_ROLL_BACK)
                break;
            struct run before = run;
            run = checkpoint;
            guard_roll_back(&run.guard, &before.guard, before.step);
            assert_int_equal(run.guard.skipped_in_a_row, 0);
        }
        assert_int_equal(run.verdict, GUARD_GIVE_UP);
        assert_int_equal(rollbacks, 3);
        run = checkpoint;
        guard_roll_back(&run.guard, &checkpoint.guard, 120);
        for (int i = 0; i < 30 + GUARD_HISTORY; i++) {
            assert_int_equal(run.guard.rollbacks, 1);
            go(&run, 3, 1);
        }
        assert_int_equal(run.guard.rollbacks, 0); /* 64 steps past 120 */
    }
}

static void test_degenerate_series(void **state) {
    (void)state;
    struct run run = run_of(skips, 100, -0.0, 0); /* no gradient at all: no limit on it can be derived */
    assert_int_equal(go(&run, 0.0, 5), STEP_UPDATED);
    assert_int_equal(go(&run, 0.2, 0), STEP_LOSS_SPIKE);
    run = run_of(skips, 100, DBL_MAX, DBL_MAX);
    assert_int_equal(go(&run, DBL_MAX, DBL_MAX), STEP_UPDATED);
    run = run_of(skips, 100, DBL_TRUE_MIN, DBL_TRUE_MIN);
    assert_int_equal(go(&run, 0.05, DBL_TRUE_MIN), STEP_UPDATED);
    for (int i = 0; i < 64; i++) /* half of the values far away: MAD is half the distance */
        go(&run, i % 2 ? 1 : 0, DBL_TRUE_MIN);
    assert_true(isfinite(guard_limits(&run.guard, skips).loss));
}

static json_t *through_text(const struct guard *guard) {
    json_t *object = json_pack("{s:o}", "guard", guard_pack(guard)), *read;
    char *text = json_dumps(object, JSON_INDENT(2)); /* as json_write_file */
    assert_int_equal(json_parse("text", text, strlen(text), &read), STATUS_OK);
    json_decref(object);
    free(text);
    return read;
}

static enum status unpack(const json_t *object, struct guard *guard) {
    return guard_unpack((struct json_source){"text", json_object_get(object, "guard")}, guard);
}

static void test_through_a_file(void **state) {
    (void)state;
    static const double odd[] = {-0.0, DBL_TRUE_MIN, DBL_MAX, 0.1, 1.0 / 3, 5e-320, 1e22, 3, -DBL_MAX};
    for (int count = 0; count <= GUARD_HISTORY + 5; count++) {
        struct guard guard = {.skipped_in_a_row = 2, .rollbacks = 1, .furthest_step = 1LL << 60}, back;
        for (int i = 0; i < count; i++) {
            double any = i < 9 ? odd[i] : random_normal(3, (uint64_t)count, (uint64_t)i);
            struct step_result result = {.loss = any, .gradient_norm = any * 1e-3};
            guard_note(&guard, skips, 1, &result);
        }
        json_t *object = through_text(&guard);
        assert_int_equal(unpack(object, &back), STATUS_OK);
        assert_memory_equal(&guard, &back, sizeof guard);
        json_decref(object);
    }
}

static void refuse(const char *text) {
    json_t *object;
    struct guard guard;
    assert_int_equal(json_parse("text", text, strlen(text), &object), STATUS_OK);
    assert_int_equal(unpack(object, &guard), STATUS_FORMAT);
    json_decref(object);
}

static void refuse_lists(const char *losses, const char *norms, int skipped) {
    char *text = text_format("{\"guard\": {\"losses\": %s, \"gradient_norms\": %s, \"skipped_in_a_row\": %d, "
                             "\"rollbacks\": 0, \"furthest_step\": 0}}",
                             losses, norms, skipped);
    refuse(text);
    free(text);
}

static void test_damaged_files(void **state) {
    (void)state;
    struct guard guard = {.count = 7};
    json_t *old = json_object();
    assert_int_equal(unpack(old, &guard), STATUS_OK);
    assert_int_equal(guard.count, 0); /* of a version that knew of none */
    json_decref(old);
    refuse("{\"guard\": {}}");
    refuse_lists("[1]", "[]", 0);
    refuse_lists("[null]", "[1]", 0);
    refuse_lists("[]", "[]", -1);
    struct guard full = {.count = GUARD_HISTORY};
    json_t *packed = guard_pack(&full), *object;
    json_array_append_new(json_object_get(packed, "losses"), json_real(1));
    object = json_pack("{s:o}", "guard", packed);
    assert_int_equal(unpack(object, &guard), STATUS_FORMAT);
    json_decref(object);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_constant_loss_has_room),
        cmocka_unit_test(test_nothing_is_a_spike_before_there_is_a_history),
        cmocka_unit_test(test_trends_pass),
        cmocka_unit_test(test_false_alarms_are_rare),
        cmocka_unit_test(test_outliers_leave_no_trace),
        cmocka_unit_test(test_three_in_a_row_roll_back),
        cmocka_unit_test(test_no_circles),
        cmocka_unit_test(test_degenerate_series),
        cmocka_unit_test(test_through_a_file),
        cmocka_unit_test(test_damaged_files),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
