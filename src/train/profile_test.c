/* The profile of a small model's steps: every event is counted, the table names it, the trace holds the last steps. */
#include "train/profile.h"

#include "base/clock.h"
#include "base/file.h"
#include "base/json.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { LENGTH = 6, BATCH = 4, MICRO_BATCHES = 2, STEPS = PROFILE_TRACE_STEPS + 3 };

struct run {
    struct model *model;
    struct workspace *workspace;
    struct comm comm;
    struct ranks ranks;
    struct optimizer_settings optimizer;
    struct step_runner runner;
    struct profile profile;
    double losses[STEPS];
};

static void run_init(struct run *r) {
    struct model_config c;
    *r = (struct run){.comm = comm_self()};
    r->ranks = ranks_single(&r->comm);
    model_config_init(&c);
    c.vocab_size = 31;
    c.hidden_size = 8;
    c.num_hidden_layers = 2;
    c.num_attention_heads = 2;
    c.num_key_value_heads = 1;
    c.num_experts = 4;
    c.moe_intermediate_size = 6;
    assert_int_equal(model_config_check(&c, "test"), STATUS_OK);
    struct model_options options = {kernels_ref(), device_cpu(), DTYPE_F64, DTYPE_F64, LENGTH, true, sharding_single()};
    assert_int_equal(model_create(&c, options, &r->model), STATUS_OK);
    assert_int_equal(model_initialize(r->model, 11), STATUS_OK);
    struct workspace_options workspace = {BATCH / MICRO_BATCHES, LENGTH, true, false};
    assert_int_equal(workspace_create(r->model, workspace, &r->workspace), STATUS_OK);
    optimizer_settings_init(&r->optimizer);
    assert_int_equal(step_runner_init(&r->runner, r->model, r->workspace, &r->ranks, &r->optimizer,
                                      (struct step_settings){.micro_batch_count = MICRO_BATCHES}),
                     STATUS_OK);
}

static void run_release(struct run *r) {
    profile_release(&r->profile);
    step_runner_release(&r->runner);
    workspace_destroy(r->workspace);
    model_destroy(r->model);
}

static void run_steps(struct run *r) {
    int32_t tokens[BATCH * (LENGTH + 1)];
    for (int i = 0; i < BATCH * (LENGTH + 1); i++)
        tokens[i] = (i * i + 3 * i) % 31;
    for (int step = 1; step <= STEPS; step++) {
        struct step_result result;
        profile_begin_step(&r->profile, step);
        double begin = clock_seconds();
        profile_note(&r->profile, SPAN_DATA, begin);
        struct step_input input = {.tokens = tokens, .step = step, .step_count = STEPS};
        assert_int_equal(step_run(&r->runner, input, &result), STATUS_OK);
        profile_note(&r->profile, SPAN_STEP, begin);
        r->losses[step - 1] = result.loss;
    }
}

static void test_every_event_is_counted_and_no_loss_changes(void **state) {
    (void)state;
    struct run watched, alone;
    run_init(&watched);
    run_init(&alone);
    assert_int_equal(profile_init(&watched.profile, &watched.runner, true), STATUS_OK);
    run_steps(&watched);
    run_steps(&alone); /* its profile is zeroed: notes nothing */
    assert_memory_equal(watched.losses, alone.losses, sizeof alone.losses);
    assert_int_equal(alone.profile.spans[SPAN_STEP].calls, 0);
    int64_t calls = 0;
    double seconds = 0, step_seconds = watched.profile.spans[SPAN_STEP].seconds;
    for (int kind = 0; kind < EVENT_KIND_COUNT; kind++) {
        calls += watched.profile.events[kind].calls;
        seconds += watched.profile.events[kind].seconds;
    }
    assert_int_equal(calls, (int64_t)STEPS * watched.runner.schedule.count);
    assert_true(seconds > 0 && seconds <= step_seconds);
    run_release(&watched);
    run_release(&alone);
}

static void test_table(void **state) {
    (void)state;
    struct run r;
    struct text table = {0};
    run_init(&r);
    assert_int_equal(profile_init(&r.profile, &r.runner, false), STATUS_OK);
    profile_print(&r.profile, (struct profile_roof){1e9, 1e9}, &table);
    assert_int_equal(table.size, 0); /* no step yet */
    run_steps(&r);
    struct profile *p = &r.profile;
    p->spans[SPAN_STEP] = (struct profile_total){STEPS, STEPS * 0.5};
    p->events[EVENT_EXPERTS].seconds = STEPS * 0.125;
    p->step_costs[EVENT_EXPERTS].operations = 2e8;
    p->events[EVENT_OPTIMIZER].seconds = STEPS * 0.25;
    p->step_costs[EVENT_OPTIMIZER].bytes = 5e8;
    profile_print(p, (struct profile_roof){8e9, 4e9}, &table);
    assert_non_null(strstr(table.data, "experts                     4     125.00   25.0%       1.6 GFLOP/s    20.0%"));
    assert_non_null(strstr(table.data, "optimizer                   4     250.00   50.0%       2.0 GB/s       50.0%"));
    for (int kind = 0; kind < EVENT_KIND_COUNT; kind++)
        if (p->events[kind].calls > 0)
            assert_non_null(strstr(table.data, event_kind_name((enum event_kind)kind)));
    assert_null(strstr(table.data, "recompute"));
    assert_null(strstr(table.data, "gather")); /* one process: nothing is divided */
    text_release(&table);
    run_release(&r);
}

static double member(const json_t *object, const char *key) {
    const json_t *value = json_object_get(object, key);
    if (!json_is_number(value))
        fail_msg("%s is missing or no number", key);
    return json_number_value(value);
}

/* Every entry of the trace is complete, inside the step that it belongs to, and of one of the last steps. */
static void check_entries(const json_t *entries, const struct schedule *schedule) {
    const json_t *entry, *step_entries[STEPS + 1] = {0};
    size_t i, events = 0;
    json_array_foreach(entries, i, entry)
        if (strcmp(json_string_value(json_object_get(entry, "name")), "step") == 0)
            step_entries[(int)member(json_object_get(entry, "args"), "step")] = entry;
    json_array_foreach(entries, i, entry) {
        const json_t *args = json_object_get(entry, "args");
        int step = (int)member(args, "step");
        double begin = member(entry, "ts"), end = begin + member(entry, "dur");
        assert_string_equal(json_string_value(json_object_get(entry, "ph")), "X");
        assert_in_range(step, STEPS - PROFILE_TRACE_STEPS + 1, STEPS);
        assert_non_null(step_entries[step]);
        double first = member(step_entries[step], "ts"), last = first + member(step_entries[step], "dur");
        assert_true(begin >= first - 0.01 && end <= last + 0.01); /* microseconds, printed to the nanosecond */
        if (strcmp(json_string_value(json_object_get(entry, "name")), "experts") != 0)
            continue;
        assert_in_range((int)member(args, "block"), 0, 1);
        assert_in_range((int)member(args, "micro_batch"), 0, MICRO_BATCHES - 1);
        events++;
    }
    assert_int_equal(json_array_size(entries), PROFILE_TRACE_STEPS * (schedule->count + 2));
    assert_int_equal(events, PROFILE_TRACE_STEPS * 2 * MICRO_BATCHES);
}

static void test_trace(void **state) {
    (void)state;
    char directory[] = "/tmp/cadre-profile-XXXXXX";
    struct run r;
    json_t *trace;
    assert_non_null(mkdtemp(directory));
    char *path = path_join(directory, "trace.json");
    run_init(&r);
    assert_int_equal(profile_init(&r.profile, &r.runner, true), STATUS_OK);
    run_steps(&r);
    assert_int_equal(profile_write_trace(&r.profile, path), STATUS_OK);
    assert_int_equal(json_read_file(path, 1 << 24, &trace), STATUS_OK);
    check_entries(json_object_get(trace, "traceEvents"), &r.runner.schedule);
    json_decref(trace);
    run_release(&r);
    free(path);
    assert_int_equal(directory_remove(directory), STATUS_OK);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_event_is_counted_and_no_loss_changes),
        cmocka_unit_test(test_table),
        cmocka_unit_test(test_trace),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
