/* The training loop as a user meets it: golden losses, threads, resume, damage, a full disk, another configuration. */
#include "train/trainer.h"

#include "base/file.h"
#include "base/json.h"
#include "base/log.h"
#include "base/random.h"
#include "base/text.h"
#include "base/threads.h"
#include "metrics/metrics_testing.h"
#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <cmocka.h>

enum { STEPS = 10 };

static char root[] = "/tmp/cadre-train-XXXXXX";
static char *corpus_path;

/* Sentences of made-up words with a little grammar: enough for a loss that falls. */
static void write_corpus(const char *path, int64_t sentences) {
    static const char *const words[] = {"river", "stone", "walks", "under", "bright", "morning", "the", "a",
                                        "keeper", "of", "lamps", "sings", "old", "harbour", "and", "waits"};
    struct text text = {0};
    for (int64_t s = 0; s < sentences; s++) {
        int64_t length = 4 + (int64_t)(random_bits(1, 1, (uint64_t)s) % 9);
        for (int64_t w = 0; w < length; w++)
            text_printf(&text, "%s%s", w ? " " : "", words[random_bits(1, (uint64_t)s + 2, (uint64_t)w) % 16]);
        text_add_string(&text, s % 7 == 6 ? ".\n\n" : ".\n");
    }
    assert_int_equal(file_write(path, text.data, text.size), STATUS_OK);
    text_release(&text);
}

static int set_up(void **state) {
    (void)state;
    log_set_level(LOG_SILENT);
    if (!mkdtemp(root))
        return -1;
    corpus_path = path_join(root, "corpus.txt");
    write_corpus(corpus_path, 3000);
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    free(corpus_path);
    return directory_remove(root) == STATUS_OK ? 0 : -1;
}

struct call {
    const char *directory, *threads, *precision, *steps, *evaluate_every, *more_key, *more_value;
    int64_t interrupt_at; /* 0: never */
    bool profile;
    int interrupt_after; /* so many steps of this call; 0: never */
};

/* What the sampling hook counts: it is called after every interrupt_at-th step. */
struct interruption {
    int calls_left;
};

static enum status interrupt(void *context, struct model *model, const struct tokenizer *tokenizer, struct text *out) {
    (void)model;
    (void)tokenizer;
    (void)out;
    struct interruption *interruption = context;
    if (--interruption->calls_left == 0)
        raise(SIGTERM);
    return STATUS_OK;
}

static enum status train(struct call call, struct train_summary *summary) {
    struct train_summary unused;
    char *directory = path_join(root, call.directory);
    char every[32];
    snprintf(every, sizeof every, "%lld", call.interrupt_after > 0 ? 1 : (long long)call.interrupt_at);
    const char *pairs[] = {"model.preset", "tiny", "data.train", corpus_path, "run.directory", directory,
                           "data.vocab_size", "300", "train.steps", call.steps ? call.steps : "10",
                           "run.threads", call.threads ? call.threads : "2",
                           "train.precision", call.precision ? call.precision : "fp32",
                           "checkpoint.every_steps", "4", "train.eval_tokens", "640",
                           "train.eval_every_steps", call.evaluate_every ? call.evaluate_every : "5",
                           "train.sample_every_steps", every, call.more_key, call.more_value};
    struct run_config config;
    struct interruption interruption = {call.interrupt_after > 0 ? call.interrupt_after : call.interrupt_at > 0};
    struct comm self = comm_self();
    struct train_world world = {&self, 1, 0};
    struct train_hooks hooks = {interrupt, &interruption, .profile = call.profile, .roof_operations_per_s = 1e9};
    enum status status = run_config_resolve(&config, NULL, pairs, call.more_key ? 12 : 11);
    if (status == STATUS_OK)
        status = train_run(&config, world, hooks, summary ? summary : &unused);
    free(directory);
    return status;
}

struct losses {
    double *values; /* [STEPS] */
    int count;
};

static void add_loss(void *context, json_t *object) {
    struct losses *losses = context;
    json_t *loss = json_object_get(object, "loss");
    if (loss && losses->count < STEPS)
        losses->values[losses->count++] = json_real_value(loss);
}

/* Losses of a run, one a step; returns how many. */
static int read_losses(const char *directory, double values[STEPS]) {
    char *path = text_format("%s/%s/metrics.jsonl", root, directory);
    struct losses losses = {values, 0};
    metrics_each_line(path, add_loss, &losses);
    free(path);
    return losses.count;
}

static void assert_same_file(const char *a, const char *b, const char *name) {
    char *path_a = text_format("%s/%s/%s", root, a, name), *path_b = text_format("%s/%s/%s", root, b, name);
    char *data_a, *data_b;
    size_t size_a, size_b;
    assert_int_equal(file_read(path_a, 1 << 26, &data_a, &size_a), STATUS_OK);
    assert_int_equal(file_read(path_b, 1 << 26, &data_b, &size_b), STATUS_OK);
    assert_int_equal(size_a, size_b);
    assert_memory_equal(data_a, data_b, size_a);
    free(data_a);
    free(data_b);
    free(path_a);
    free(path_b);
}

static void assert_same_run(const char *a, const char *b) {
    double losses_a[STEPS], losses_b[STEPS];
    assert_int_equal(read_losses(a, losses_a), STEPS);
    assert_int_equal(read_losses(b, losses_b), STEPS);
    for (int i = 0; i < STEPS; i++)
        assert_true(losses_a[i] == losses_b[i]);
    assert_same_file(a, b, "checkpoints/step-000010/model.safetensors");
    assert_same_file(a, b, "checkpoints/step-000010/training/optimizer.safetensors");
}

/* Recorded with the reference kernels, which compute in double precision and round what they store to fp32. */
static const double golden[STEPS] = {5.69764935, 5.64944067, 5.57870561, 5.47826298, 5.35749721,
                                     5.23392631, 5.18859434, 5.09863202, 5.03590562, 5.05560181};

/* Ten steps of the tiny model, on every instruction set that this processor runs. */
static void test_golden_losses(void **state) {
    (void)state;
    for (const char *const *kernels = kernels_available(); *kernels; kernels++) {
        if (strcmp(*kernels, "ref") == 0)
            continue; /* a minute of it is what the numbers were recorded from */
        char *directory = text_format("golden-%s", *kernels);
        double losses[STEPS];
        struct call call = {.directory = directory, .more_key = "run.kernels", .more_value = *kernels};
        assert_int_equal(train(call, NULL), STATUS_OK);
        assert_int_equal(read_losses(directory, losses), STEPS);
        for (int i = 0; i < STEPS; i++)
            if (!(fabs(losses[i] - golden[i]) <= 2e-6 * golden[i]))
                fail_msg("%s, step %d: loss %.9g is not the golden %.9g", *kernels, i + 1, losses[i], golden[i]);
        free(directory);
    }
}

static void test_threads_do_not_change_a_bit(void **state) {
    (void)state;
    const char *const precisions[] = {"fp32", "bf16"};
    for (int p = 0; p < 2; p++) {
        assert_int_equal(train((struct call){.directory = "one", .threads = "1", .precision = precisions[p]}, NULL), 0);
        assert_int_equal(train((struct call){.directory = "two", .threads = "2", .precision = precisions[p]}, NULL), 0);
        assert_int_equal(train((struct call){.directory = "four", .threads = "4", .precision = precisions[p]}, NULL), 0);
        assert_same_run("one", "two");
        assert_same_run("one", "four");
        const char *const names[] = {"one", "two", "four"};
        for (int i = 0; i < 3; i++) {
            char *path = path_join(root, names[i]);
            assert_int_equal(directory_remove(path), STATUS_OK);
            free(path);
        }
    }
}

static void test_resumed_is_uninterrupted(void **state) {
    (void)state;
    struct train_summary summary;
    assert_int_equal(train((struct call){.directory = "whole"}, NULL), STATUS_OK);
    for (int stop = 1; stop <= 9; stop += 4) {
        char *path = path_join(root, "parts");
        assert_int_equal(directory_remove(path), STATUS_OK);
        assert_int_equal(train((struct call){.directory = "parts", .interrupt_at = stop}, &summary), STATUS_OK);
        assert_true(summary.interrupted && summary.step == stop);
        assert_int_equal(train((struct call){.directory = "parts"}, &summary), STATUS_OK);
        assert_true(summary.resumed && !summary.interrupted && summary.step == STEPS);
        assert_same_run("whole", "parts");
        free(path);
    }
}

static void add_without_timings(void *context, json_t *object) {
    static const char *const timings[] = {"step_time_ms", "tokens_per_s", "flops_share"};
    for (int i = 0; i < 3; i++)
        json_object_del(object, timings[i]);
    char *text = json_dumps(object, JSON_COMPACT | JSON_PRESERVE_ORDER);
    text_printf(context, "%s\n", text);
    free(text);
}

/* metrics.jsonl without what time decides. */
static char *read_metrics(const char *directory) {
    char *path = text_format("%s/%s/metrics.jsonl", root, directory);
    struct text out = {0};
    metrics_each_line(path, add_without_timings, &out);
    free(path);
    return out.data;
}

#ifdef __SANITIZE_ADDRESS__
enum { LONG_STEPS = 200, STOPS = 20 };
#else
enum { LONG_STEPS = 200, STOPS = 50 };
#endif

/* Stopped at 50 (under the sanitizers 20) random steps and resumed, every other time from a checkpoint whose model is in bf16: not
 * a bit differs in weights, optimizer, state and metrics. */
static void test_fifty_stops(void **state) {
    (void)state;
    static const char *const names[] = {"model.safetensors", "training/optimizer.safetensors", "training/state.json"};
    struct train_summary summary;
    /* Only what is saved can be the best so far: what is evaluated is always saved, not only where the run was stopped. */
    struct call call = {.directory = "long", .steps = "200", .threads = "1", .evaluate_every = "4"};
    assert_int_equal(train(call, NULL), STATUS_OK);
    call.directory = "stopped";
    int step = 0, stops = 0;
    while (stops < STOPS) {
        int left = LONG_STEPS - 1 - step, longest = 2 * left / (STOPS - stops);
        longest = longest < left ? longest : left;
        call.interrupt_after = 1 + (int)(random_bits(6, 1, (uint64_t)stops) % (uint64_t)(longest > 1 ? longest - 1 : 1));
        call.more_key = stops % 2 ? "checkpoint.weights" : NULL;
        call.more_value = "bf16";
        assert_int_equal(train(call, &summary), STATUS_OK);
        assert_true(summary.interrupted);
        assert_int_equal(summary.step, step + call.interrupt_after);
        step = (int)summary.step;
        stops++;
    }
    call.interrupt_after = 0;
    call.more_key = NULL;
    assert_int_equal(train(call, &summary), STATUS_OK);
    assert_int_equal(summary.step, LONG_STEPS);
    for (int i = 0; i < 3; i++) {
        char *name = path_join("checkpoints/step-000200", names[i]);
        assert_same_file("long", "stopped", name);
        free(name);
    }
    char *whole = read_metrics("long"), *parts = read_metrics("stopped");
    assert_string_equal(whole, parts);
    free(whole);
    free(parts);
}

/* With a profile the numbers are the same, and the trace is there. */
static void test_profile_changes_no_number(void **state) {
    (void)state;
    assert_int_equal(train((struct call){.directory = "plain"}, NULL), STATUS_OK);
    assert_int_equal(train((struct call){.directory = "profiled", .profile = true}, NULL), STATUS_OK);
    assert_same_run("plain", "profiled");
    char *path = text_format("%s/profiled/trace.json", root);
    json_t *trace;
    assert_int_equal(json_read_file(path, 1 << 24, &trace), STATUS_OK);
    assert_true(json_array_size(json_object_get(trace, "traceEvents")) > 10 * STEPS);
    json_decref(trace);
    assert_int_equal(file_remove(path), STATUS_OK);
    assert_int_equal(train((struct call){.directory = "profiled", .profile = true}, NULL), STATUS_OK);
    assert_false(file_exists(path)); /* complete: no step ran */
    free(path);
}

static int no_room_for_a_trace(void *context, enum file_operation operation, const char *path) {
    (void)context;
    return operation == FILE_WRITE && strstr(path, "trace.json") ? ENOSPC : 0;
}

static void test_trace_on_a_full_disk(void **state) {
    (void)state;
    struct train_summary summary;
    file_set_fault(no_room_for_a_trace, NULL);
    enum status status = train((struct call){.directory = "untraced", .profile = true}, NULL);
    file_set_fault(NULL, NULL);
    assert_int_equal(status, STATUS_IO);
    assert_non_null(strstr(status_text(), "trace.json"));
    assert_int_equal(train((struct call){.directory = "untraced"}, &summary), STATUS_OK);
    assert_true(summary.resumed && summary.step == STEPS); /* the run itself was saved */
}

static void flip_a_byte(const char *name) {
    char *path = path_join(root, name), *data;
    size_t size;
    assert_int_equal(file_read(path, 1 << 26, &data, &size), STATUS_OK);
    data[size / 2] ^= 4;
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, size, file), size);
    fclose(file);
    free(data);
    free(path);
}

static void test_damaged_checkpoint_falls_back_to_the_one_before(void **state) {
    (void)state;
    struct train_summary summary;
    assert_int_equal(train((struct call){.directory = "damaged", .interrupt_at = 6}, &summary), STATUS_OK);
    assert_int_equal(summary.step, 6);
    flip_a_byte("damaged/checkpoints/step-000006/model.safetensors");
    assert_int_equal(train((struct call){.directory = "damaged"}, &summary), STATUS_OK);
    assert_true(summary.resumed && summary.step == STEPS);
    assert_int_equal(train((struct call){.directory = "undamaged"}, NULL), STATUS_OK);
    assert_same_run("undamaged", "damaged");
}

/* Without a save at the end there are those between, and one where it is stopped. */
static void test_no_checkpoint_at_the_end(void **state) {
    (void)state;
    char *between = text_format("%s/no_end/checkpoints/step-000008", root);
    char *end = text_format("%s/no_end/checkpoints/step-000010", root);
    char *stopped = text_format("%s/no_end/checkpoints/step-000003", root);
    struct call call = {.directory = "no_end", .more_key = "checkpoint.at_end", .more_value = "no", .interrupt_at = 3};
    struct train_summary summary;
    assert_int_equal(train(call, &summary), STATUS_OK);
    assert_true(summary.interrupted && directory_exists(stopped));
    call.interrupt_at = 0;
    assert_int_equal(train(call, &summary), STATUS_OK);
    assert_true(summary.step == 10 && directory_exists(between) && !directory_exists(end));
    assert_true(isfinite(summary.valid_loss));
    free(between);
    free(end);
    free(stopped);
}

/* What a save that was cut short left behind goes when the run goes on, also where nothing is left to save. */
static void test_leftovers_are_tidied(void **state) {
    (void)state;
    struct train_summary summary;
    assert_int_equal(train((struct call){.directory = "tidy"}, NULL), STATUS_OK);
    char *draft = text_format("%s/tidy/checkpoints/step-000010.tmp-1/training", root);
    char *left = text_format("%s/tidy/checkpoints/step-000010.tmp-1", root);
    assert_int_equal(directory_make(draft), STATUS_OK);
    assert_int_equal(train((struct call){.directory = "tidy"}, &summary), STATUS_OK);
    assert_true(summary.resumed && summary.step == STEPS);
    assert_false(directory_exists(left));
    free(draft);
    free(left);
}

static int disk_is_full(void *context, enum file_operation operation, const char *path) {
    (void)context;
    return operation == FILE_WRITE && strstr(path, "step-000008") ? ENOSPC : 0;
}

static void test_full_disk_keeps_the_last_checkpoint(void **state) {
    (void)state;
    struct train_summary summary;
    file_set_fault(disk_is_full, NULL);
    enum status status = train((struct call){.directory = "full"}, NULL);
    file_set_fault(NULL, NULL);
    assert_int_equal(status, STATUS_IO);
    assert_non_null(strstr(status_text(), "No space left"));
    assert_int_equal(train((struct call){.directory = "full"}, &summary), STATUS_OK);
    assert_true(summary.resumed);
    assert_int_equal(train((struct call){.directory = "roomy"}, NULL), STATUS_OK);
    assert_same_run("roomy", "full");
}

/* Writing the checkpoint of step 2 takes longer than the steps until the next save. */
static int second_is_slow(void *context, enum file_operation operation, const char *path) {
    (void)context;
    if (operation == FILE_WRITE && strstr(path, "step-000002"))
        nanosleep(&(struct timespec){.tv_nsec = 300 * 1000 * 1000}, NULL);
    return 0;
}

/* Nothing is learnt, so that the first evaluation stays the best. A later save does not take the place of its checkpoint, of which
 * there is no other copy. */
static void test_best_is_not_replaced(void **state) {
    (void)state;
    char *directory = path_join(root, "best"), *best = path_join(directory, "checkpoints/step-000002");
    const char *pairs[] = {"model.preset", "tiny", "data.train", corpus_path, "run.directory", directory, "data.vocab_size", "300",
                           "train.steps", "6", "optim.lr", "1e-30", "checkpoint.every_steps", "2", "train.eval_every_steps", "2",
                           "checkpoint.overlap", "replace", "checkpoint.keep_best", "yes", "checkpoint.keep", "1"};
    struct run_config config;
    struct train_summary summary;
    struct comm self = comm_self();
    assert_int_equal(run_config_resolve(&config, NULL, pairs, sizeof pairs / sizeof *pairs / 2), STATUS_OK);
    file_set_fault(second_is_slow, NULL);
    enum status status = train_run(&config, (struct train_world){&self, 1, 0}, (struct train_hooks){0}, &summary);
    file_set_fault(NULL, NULL);
    assert_int_equal(status, STATUS_OK);
    assert_true(directory_exists(best));
    free(directory);
    free(best);
}

static void test_refusals(void **state) {
    (void)state;
    struct call call = {.directory = "refusal", .more_key = "model.hidden_size", .more_value = "32"};
    assert_int_equal(train((struct call){.directory = "refusal"}, NULL), STATUS_OK);
    assert_int_equal(train(call, NULL), STATUS_USAGE);
    assert_non_null(strstr(status_text(), "model.hidden_size"));
    call = (struct call){.directory = "none", .more_key = "model.num_experts_per_tok", .more_value = "5"};
    assert_int_equal(train(call, NULL), STATUS_USAGE);
    call = (struct call){.directory = "none", .more_key = "model.num_key_value_heads", .more_value = "3"};
    assert_int_equal(train(call, NULL), STATUS_USAGE);
    call = (struct call){.directory = "none", .more_key = "data.train", .more_value = "/nowhere/*.txt"};
    assert_int_equal(train(call, NULL), STATUS_NOT_FOUND);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden_losses),
        cmocka_unit_test(test_threads_do_not_change_a_bit),
        cmocka_unit_test(test_resumed_is_uninterrupted),
        cmocka_unit_test(test_fifty_stops),
        cmocka_unit_test(test_profile_changes_no_number),
        cmocka_unit_test(test_trace_on_a_full_disk),
        cmocka_unit_test(test_damaged_checkpoint_falls_back_to_the_one_before),
        cmocka_unit_test(test_no_checkpoint_at_the_end),
        cmocka_unit_test(test_leftovers_are_tidied),
        cmocka_unit_test(test_best_is_not_replaced),
        cmocka_unit_test(test_full_disk_keeps_the_last_checkpoint),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
