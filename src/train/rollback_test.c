/* Whole runs on poisoned data: batches whose loss comes out wrong, wherever and whenever they are met. */
#include "train/trainer.h"

#include "base/file.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/log.h"
#include "base/random.h"
#include "base/text.h"
#include "comm/threads/comm_threads.h"
#include "data/corpus.h"
#include "data/loader.h"
#include "train/guard.h"
#include <math.h>
#include "metrics/metrics_testing.h"
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { LENGTH = 64, BATCH = 4, BATCHES = 100, EVENTS_MAX = 8 };

static char root[] = "/tmp/cadre-rollback-XXXXXX";
static char *corpus_path;

/* ---- poison: the kernels' table is this process's own ---------------------------------------------------------------- */

static struct kernel_ops real;
static uint64_t batch_hash[BATCHES]; /* of the first sequence of what step n + 1 of a clean run learns */
static double poison[BATCHES];       /* added to its loss; 0: none */
static _Thread_local double added;

static uint64_t hash_sequence(const int32_t *ids) {
    return hash_bytes(ids, LENGTH * sizeof *ids, 0);
}

static void embed(struct tensor ids, struct tensor table, struct tensor x) {
    added = 0;
    if (tensor_elements(ids) >= LENGTH)
        for (int i = 0; i < BATCHES; i++)
            if (batch_hash[i] == hash_sequence(ids.data))
                added = poison[i];
    real.embedding_forward(ids, table, x);
}

static void cross_entropy(struct tensor logits, struct tensor target, double scale, struct tensor loss_sum,
                          struct tensor row_loss, struct tensor dlogits) {
    real.cross_entropy(logits, target, scale, loss_sum, row_loss, dlogits);
    if (added != 0)
        *(double *)loss_sum.data += added * LENGTH * BATCH;
}

static void poison_batches(int first, int last, double value) {
    for (int step = first; step <= last; step++)
        poison[step - 1] = value;
}

static void clear_poison(void) {
    memset(poison, 0, sizeof poison);
}

/* ---- runs ---------------------------------------------------------------------------------------------------------------- */

struct call {
    const char *directory, *steps, *every, *spikes, *lr, *replicate, *shard, *mode, *islands;
    int end_at, end_turn; /* the run ends after step end_at, when it is met for the end_turn-th time (from 0); 0: not */
    bool saves;           /* it ends by a signal, and saves */
};

struct ending {
    int step, turn;
    bool saves;
};

static enum status end_run(void *context, struct model *model, const struct tokenizer *tokenizer, struct text *out) {
    struct ending *ending = context;
    (void)model;
    (void)tokenizer;
    if (atoi(text_string(out) + strlen("== step ")) != ending->step || ending->turn-- != 0)
        return STATUS_OK;
    if (!ending->saves)
        return status_fail(STATUS_IO, "killed");
    raise(SIGTERM);
    return STATUS_OK;
}

struct world_call {
    const struct call *call;
    struct train_summary summary;
};

static enum status train_on(void *context, struct comm *world) {
    struct world_call *wanted = context;
    const struct call *c = wanted->call;
    struct train_summary summary;
    char *directory = path_join(root, c->directory);
    const char *width = c->islands ? "64" : "32"; /* when islands tell each other something depends on it */
    const char *pairs[] = {"model.preset", "tiny", "model.hidden_size", width, "model.moe_intermediate_size", width,
                           "data.train", corpus_path, "run.directory", directory,
                           "data.vocab_size", "300", "train.steps", c->steps ? c->steps : "16",
                           "run.threads", "1", "train.precision", "fp32", "optim.lr", c->lr ? c->lr : "1e-3",
                           "optim.warmup_steps", c->lr ? "200" : "5",
                           "checkpoint.every_steps", c->every ? c->every : "4", "train.eval_every_steps", "0",
                           "train.sample_every_steps", "1", "train.spikes", c->spikes ? c->spikes : "skip",
                           "layout.replicate", c->replicate ? c->replicate : "0",
                           "layout.shard", c->shard ? c->shard : "0", "checkpoint.keep", "3",
                           "checkpoint.mode", c->mode ? c->mode : "sync", "diloco.replicas", c->islands ? c->islands : "1",
                           "diloco.sync_steps", c->islands ? "3" : "0"};
    struct run_config config;
    struct ending ending = {c->end_at, c->end_turn, c->saves};
    struct train_hooks hooks = {.write_sample = end_run, .context = &ending, .roof_operations_per_s = 1e9};
    enum status status = run_config_resolve(&config, NULL, pairs, (int)(sizeof pairs / sizeof *pairs / 2));
    if (status == STATUS_OK)
        status = train_run(&config, (struct train_world){world, world->size, 1}, hooks, &summary);
    if (world->rank == 0)
        wanted->summary = summary;
    free(directory);
    return status;
}

static enum status train(struct call call, struct train_summary *summary) {
    struct world_call wanted = {.call = &call};
    struct comm self = comm_self();
    enum status status = train_on(&wanted, &self);
    if (summary)
        *summary = wanted.summary;
    return status;
}

static void learn_hashes(const char *directory) {
    char *path = text_format("%s/%s/data", root, directory);
    struct corpus corpus;
    struct loader *loader;
    int32_t tokens[BATCH * (LENGTH + 1)];
    assert_int_equal(corpus_open(&corpus, path), STATUS_OK);
    assert_int_equal(loader_open(&loader, &corpus.train.shard, LENGTH, BATCH, 1, 0), STATUS_OK);
    for (int i = 0; i < BATCHES; i++) {
        assert_int_equal(loader_next(loader, tokens), STATUS_OK);
        batch_hash[i] = hash_sequence(tokens);
    }
    loader_close(loader);
    corpus_close(&corpus);
    free(path);
}

static int set_up(void **state) {
    (void)state;
    log_set_level(LOG_SILENT);
    if (!mkdtemp(root))
        return -1;
    corpus_path = path_join(root, "corpus.txt");
    struct text text = {0};
    for (int64_t s = 0; s < 6000; s++)
        for (int64_t w = 0; w < 8; w++)
            text_printf(&text, "w%llu%s", (unsigned long long)(random_bits(1, (uint64_t)s, (uint64_t)w) % 50),
                        w == 7 ? ".\n" : " ");
    if (file_write(corpus_path, text.data, text.size) != STATUS_OK)
        return -1;
    text_release(&text);
    const struct kernel_ops *ops;
    if (kernels_choose("auto", &ops) != STATUS_OK || train((struct call){.directory = "clean", .steps = "70"}, NULL))
        return -1;
    learn_hashes("clean");
    real = *ops;
    ((struct kernel_ops *)ops)->embedding_forward = embed; /* a table in memory, filled when the program starts */
    ((struct kernel_ops *)ops)->cross_entropy = cross_entropy;
    return 0;
}

static int tear_down(void **state) {
    (void)state;
    free(corpus_path);
    return directory_remove(root) == STATUS_OK ? 0 : -1;
}

static int clean_up(void **state) {
    (void)state;
    clear_poison();
    return 0;
}

/* ---- what they leave ---------------------------------------------------------------------------------------------------- */

/* metrics.jsonl without what a clock says. */
struct trace {
    int steps, skipped, events;
    int from[EVENTS_MAX], to[EVENTS_MAX];
    struct text numbers; /* step and loss of each line, and events */
};

static void add_line(void *context, json_t *object) {
    struct trace *trace = context;
    int step = (int)json_integer_value(json_object_get(object, "step"));
    if (json_object_get(object, "sent_step")) /* islands met */
        return;
    if (json_object_get(object, "event")) {
        assert_string_equal(json_string_value(json_object_get(object, "event")), "rollback");
        assert_non_null(json_string_value(json_object_get(object, "reason")));
        trace->from[trace->events] = step;
        trace->to[trace->events++] = (int)json_integer_value(json_object_get(object, "to_step"));
        text_printf(&trace->numbers, "%d event\n", step);
    } else if (json_object_get(object, "lr")) {
        trace->steps++;
        if (json_is_true(json_object_get(object, "skipped"))) {
            trace->skipped++;
            assert_non_null(json_string_value(json_object_get(object, "reason")));
        }
        text_printf(&trace->numbers, "%d %a\n", step, json_real_value(json_object_get(object, "loss")));
    }
}

static struct trace read_trace(const char *directory) {
    struct trace trace = {0};
    char *path = text_format("%s/%s/metrics.jsonl", root, directory);
    metrics_each_line(path, add_line, &trace);
    free(path);
    return trace;
}

static void expect_trace(const char *directory, int steps, int skipped, int events) {
    struct trace trace = read_trace(directory);
    assert_int_equal(trace.steps, steps);
    assert_int_equal(trace.skipped, skipped);
    assert_int_equal(trace.events, events);
    text_release(&trace.numbers);
}

static char *read_result(const char *directory, const char *name, size_t *size) {
    char *path = text_format("%s/%s/%s", root, directory, name), *data;
    assert_int_equal(file_read(path, 1 << 26, &data, size), STATUS_OK);
    free(path);
    return data;
}

static void assert_same(const char *a, const char *b, const char *name) {
    size_t a_size, b_size;
    char *a_data = read_result(a, name, &a_size), *b_data = read_result(b, name, &b_size);
    assert_int_equal(a_size, b_size);
    assert_memory_equal(a_data, b_data, a_size);
    free(a_data);
    free(b_data);
}

static void assert_same_end(const char *a, const char *b, const char *step) {
    static const char *const names[] = {"model.safetensors", "training/optimizer.safetensors", "training/state.json"};
    for (int i = 0; i < 3; i++) {
        char *name = text_format("checkpoints/step-%s/%s", step, names[i]);
        assert_same(a, b, name);
        free(name);
    }
}

static int64_t read_sequences(const char *directory, const char *step) {
    char *path = text_format("%s/%s/checkpoints/step-%s/training/state.json", root, directory, step);
    json_t *object;
    assert_int_equal(json_read_file(path, 1 << 20, &object), STATUS_OK);
    int64_t sequences = json_integer_value(json_object_get(object, "sequences"));
    json_decref(object);
    free(path);
    return sequences;
}

static void remove_run(const char *directory) {
    char *path = path_join(root, directory);
    assert_int_equal(directory_remove(path), STATUS_OK);
    free(path);
}

/* ---- tests ---------------------------------------------------------------------------------------------------------------- */

static void test_three_in_a_row_roll_back_once(void **state) {
    (void)state;
    static const double values[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        struct train_summary summary;
        poison_batches(6, 8, values[i]);
        struct call call = {.directory = "three", .mode = i == 0 ? "async" : "sync"};
        assert_int_equal(train(call, &summary), STATUS_OK);
        assert_int_equal(summary.step, 16);
        assert_true(isfinite(summary.valid_loss));
        struct trace trace = read_trace("three");
        assert_true(trace.events == 1 && trace.from[0] == 8 && trace.to[0] == 4);
        assert_int_equal(trace.skipped, 3);
        assert_int_equal(trace.steps, 8 + 12); /* what was given up stands before the event */
        assert_int_equal(read_sequences("three", "000016"), (8 + 12) * BATCH);
        text_release(&trace.numbers);
        remove_run("three");
    }
}

static void test_two_in_a_row_are_passed_over(void **state) {
    (void)state;
    poison_batches(6, 7, NAN);
    poison_batches(9, 10, NAN);
    assert_int_equal(train((struct call){.directory = "two"}, NULL), STATUS_OK);
    expect_trace("two", 16, 4, 0);
}

static void test_back_to_the_start(void **state) {
    (void)state;
    struct train_summary summary;
    poison_batches(1, 3, NAN);
    assert_int_equal(train((struct call){.directory = "early"}, &summary), STATUS_OK);
    struct trace trace = read_trace("early");
    assert_true(trace.events == 1 && trace.from[0] == 3 && trace.to[0] == 0 && summary.step == 16);
    text_release(&trace.numbers);
    assert_int_equal(read_sequences("early", "000016"), (3 + 16) * BATCH);
}

/* A kill leaves what was saved: the run that goes on from there is the uninterrupted one, to the bit, wherever it was. */
static void test_killed_and_resumed(void **state) {
    (void)state;
    static const int ends[][2] = {{3, 0}, {5, 0}, {6, 0}, {7, 0}, {5, 1}, {7, 1}, {8, 0}, {9, 0}, {13, 0}, {15, 0}};
    poison_batches(6, 8, NAN);
    poison_batches(14, 14, NAN);
    assert_int_equal(train((struct call){.directory = "whole"}, NULL), STATUS_OK);
    struct trace whole = read_trace("whole");
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) {
        struct train_summary summary;
        struct call killed = {.directory = "killed", .end_at = ends[i][0], .end_turn = ends[i][1]};
        assert_int_equal(train(killed, NULL), STATUS_IO);
        assert_int_equal(train((struct call){.directory = "killed"}, &summary), STATUS_OK);
        assert_true(summary.step == 16 && summary.resumed == (ends[i][0] > 4 || ends[i][1] > 0));
        assert_same_end("whole", "killed", "000016");
        struct trace trace = read_trace("killed");
        bool undone = ends[i][1] == 1 || ends[i][0] == 8; /* the return itself was lost, and done again; both are told */
        assert_int_equal(trace.events, undone ? 2 : 1);
        if (!undone)
            assert_string_equal(text_string(&trace.numbers), text_string(&whole.numbers));
        text_release(&trace.numbers);
        remove_run("killed");
    }
    text_release(&whole.numbers);
}

/* Who stops in the middle of it saves there, and later goes back to that: it ends all the same. */
static void test_stopped_and_resumed(void **state) {
    (void)state;
    poison_batches(6, 8, NAN);
    for (int step = 5; step <= 9; step++)
        for (int turn = 0; turn < 2; turn++) {
            struct train_summary summary;
            struct call stopped = {.directory = "stopped", .end_at = step, .end_turn = turn, .saves = true};
            if (step >= 8 && turn > 0)
                continue;
            assert_int_equal(train(stopped, &summary), STATUS_OK);
            assert_true(summary.interrupted && summary.step == step);
            assert_int_equal(train((struct call){.directory = "stopped"}, &summary), STATUS_OK);
            assert_int_equal(summary.step, 16);
            struct trace trace = read_trace("stopped");
            assert_int_equal(trace.events, 1);
            assert_int_equal(trace.to[0], turn == 0 && step < 8 ? step : 4);
            text_release(&trace.numbers);
            remove_run("stopped");
        }
}

static void test_poison_without_end(void **state) {
    (void)state;
    struct train_summary summary;
    poison_batches(6, BATCHES, NAN);
    assert_int_equal(train((struct call){.directory = "endless"}, &summary), STATUS_NUMERIC);
    assert_non_null(strstr(status_text(), "endless/checkpoints"));
    assert_non_null(strstr(status_text(), "train.rollback_limit"));
    expect_trace("endless", 4 + 4 + 3 * 3, 4 * 3, 3);
    clear_poison();
    assert_int_equal(train((struct call){.directory = "endless"}, &summary), STATUS_OK);
    assert_true(summary.resumed && summary.step == 16);
}

static void test_poison_from_the_first_batch(void **state) {
    (void)state;
    struct train_summary summary;
    poison_batches(1, BATCHES, NAN);
    assert_int_equal(train((struct call){.directory = "hopeless"}, &summary), STATUS_NUMERIC);
    assert_non_null(strstr(status_text(), "3 returns to the start"));
    assert_non_null(strstr(status_text(), "no checkpoint was saved"));
    assert_null(strstr(status_text(), "hopeless"));
}

static void test_spikes(void **state) {
    (void)state;
    static const char *const names[] = {"skip", "roll_back", "ignore"};
    static const int expected[][3] = {{70, 1, 0}, {70 + 2, 1, 1}, {70, 0, 0}}; /* steps, skipped, events */
    poison_batches(40, 40, 20);
    for (int i = 0; i < 3; i++) {
        struct call call = {.directory = names[i], .steps = "70", .every = "19", .spikes = names[i]};
        assert_int_equal(train(call, NULL), STATUS_OK);
        expect_trace(names[i], expected[i][0], expected[i][1], expected[i][2]);
        char *killed = text_format("%s-killed", names[i]);
        call.directory = killed;
        call.end_at = 39; /* the history comes from step 38's checkpoint */
        assert_int_equal(train(call, NULL), STATUS_IO);
        call.end_at = 0;
        assert_int_equal(train(call, NULL), STATUS_OK);
        assert_same_end(names[i], killed, "000070");
        free(killed);
    }
}

/* No poison: a learning rate that rises until the loss explodes. Whatever is decided, it is decided again after a kill. */
static void test_a_loss_that_explodes(void **state) {
    (void)state;
    struct call whole = {.directory = "wild", .steps = "70", .every = "9", .spikes = "roll_back", .lr = "4"};
    struct call killed = whole;
    killed.directory = "wild-killed";
    killed.end_at = 46; /* no return lies between the save of step 45 and this */
    enum status expected = train(whole, NULL), status = train(killed, NULL);
    if (status == STATUS_IO) {
        killed.end_at = 0;
        status = train(killed, NULL);
    }
    assert_int_equal(status, expected);
    struct trace a = read_trace("wild"), b = read_trace("wild-killed");
    print_message("%d steps, %d skipped, %d returns, status %d\n", a.steps, a.skipped, a.events, (int)expected);
    assert_string_equal(text_string(&a.numbers), text_string(&b.numbers));
    assert_true(a.skipped > 0);
    text_release(&a.numbers);
    text_release(&b.numbers);
}

static void test_several_ranks(void **state) {
    (void)state;
    static const struct {
        int ranks;
        const char *replicate, *shard;
    } layouts[] = {{2, "2", "1"}, {2, "1", "2"}, {4, "2", "2"}};
    poison_batches(6, 8, NAN);
    poison_batches(11, 11, INFINITY);
    for (int i = 0; i < 3; i++) {
        struct call call = {.directory = "ranks", .replicate = layouts[i].replicate, .shard = layouts[i].shard};
        struct world_call wanted = {.call = &call};
        if (comm_threads_run(layouts[i].ranks, train_on, &wanted) != STATUS_OK)
            fail_msg("%s x %s: %s", call.replicate, call.shard, status_text());
        assert_int_equal(wanted.summary.step, 16);
        expect_trace("ranks", 8 + 12, 4, 1);
        assert_int_equal(read_sequences("ranks", "000016"), (8 + 12) * BATCH);
        remove_run("ranks");
    }
}

/* What only the first of two islands meets, for batches are known by their first sequence: it goes on until it tells (so
 * small a model every 6th step, of two ranks an island every 11th) and for one more step, until the other knows; then both go
 * back to what they had saved by then. */
static void test_islands(void **state) {
    (void)state;
    poison_batches(6, 8, NAN);
    for (int ranks = 2; ranks <= 4; ranks += 2) {
        struct call call = {.directory = "isles", .shard = ranks == 4 ? "2" : "1", .islands = "2"};
        struct world_call wanted = {.call = &call};
        int known = ranks == 4 ? 11 + 1 : 12 + 1, again = ranks == 4 ? 16 - 8 : 16 - 12;
        if (comm_threads_run(ranks, train_on, &wanted) != STATUS_OK)
            fail_msg("%d ranks: %s", ranks, status_text());
        assert_int_equal(wanted.summary.step, 16);
        expect_trace("isles", known + again, 3, 1);
        assert_int_equal(read_sequences("isles", "000016"), (known + again) * BATCH);
        remove_run("isles");
    }
}

/* The first island gives up, with messages under way to the second, which loses it. */
static void test_an_island_gives_up(void **state) {
    (void)state;
    poison_batches(6, BATCHES, NAN);
    struct call call = {.directory = "isles", .shard = "1", .steps = "40", .islands = "2"};
    struct world_call wanted = {.call = &call};
    assert_int_equal(comm_threads_run(2, train_on, &wanted), STATUS_NUMERIC);
    assert_non_null(strstr(status_text(), "lower --optim.lr"));
    remove_run("isles");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_three_in_a_row_roll_back_once, clean_up),
        cmocka_unit_test_teardown(test_two_in_a_row_are_passed_over, clean_up),
        cmocka_unit_test_teardown(test_back_to_the_start, clean_up),
        cmocka_unit_test_teardown(test_killed_and_resumed, clean_up),
        cmocka_unit_test_teardown(test_stopped_and_resumed, clean_up),
        cmocka_unit_test_teardown(test_poison_without_end, clean_up),
        cmocka_unit_test_teardown(test_poison_from_the_first_batch, clean_up),
        cmocka_unit_test_teardown(test_spikes, clean_up),
        cmocka_unit_test_teardown(test_a_loss_that_explodes, clean_up),
        cmocka_unit_test_teardown(test_several_ranks, clean_up),
        cmocka_unit_test_teardown(test_islands, clean_up),
        cmocka_unit_test_teardown(test_an_island_gives_up, clean_up),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
