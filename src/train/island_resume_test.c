/* Runs with islands that stop and go on: as if they had not stopped, and with any other number of islands. */
#include "train/trainer.h"

#include "base/random.h"
#include "comm/threads/comm_threads.h"
#include "train/checkpoint_testing.h"
#include "train/state.h"
#include <math.h>

enum { STEPS = 12, CALL_FIRST = 10, CALL_STRIDE = 17 };

static char *corpus_path;

/* How a run is called. */
struct call {
    const char *directory;
    int ranks, islands;
    const char *shard, *sync_steps, *overlap, *read;
    struct train_summary summary; /* of rank 0 */
};

static int write_corpus_and_set_up(void **state) {
    struct text text = {0};
    if (set_up(state) != 0)
        return -1;
    corpus_path = path_join(root, "corpus.txt");
    for (int64_t s = 0; s < 3000; s++)
        for (int64_t w = 0; w < 8; w++)
            text_printf(&text, "w%llu%s", (unsigned long long)(random_bits(1, (uint64_t)s, (uint64_t)w) % 50),
                        w == 7 ? ".\n" : " ");
    enum status status = file_write(corpus_path, text.data, text.size);
    text_release(&text);
    return status == STATUS_OK ? 0 : -1;
}

static int forget_corpus_and_tear_down(void **state) {
    free(corpus_path);
    return tear_down(state);
}

static enum status train_on(void *context, struct comm *world) {
    struct call *c = context;
    char islands[16];
    snprintf(islands, sizeof islands, "%d", c->islands);
    const char *pairs[][2] = {
        {"model.preset", "tiny"},
        {"model.hidden_size", "32"},
        {"model.moe_intermediate_size", "32"},
        {"data.train", corpus_path},
        {"data.vocab_size", "300"},
        {"run.directory", c->directory},
        {"run.threads", "1"},
        {"train.steps", "12"},
        {"train.precision", "fp32"},
        {"train.batch_sequences", "8"},
        {"train.micro_batch_sequences", "8"},
        {"train.eval_every_steps", "5"},
        {"train.eval_tokens", "640"},
        {"layout.shard", c->shard},
        {"checkpoint.every_steps", "1"},
        {"checkpoint.keep", "99"},
        {"checkpoint.read", c->read ? c->read : "each"},
        {"diloco.replicas", islands},
        {"diloco.sync_steps", c->sync_steps},
        {"diloco.overlap_steps", c->overlap},
    };
    struct run_config config;
    struct train_summary summary;
    TRY(run_config_resolve(&config, NULL, pairs[0], (int)(sizeof pairs / sizeof *pairs)));
    struct train_hooks hooks = {.roof_operations_per_s = 1e9};
    enum status status = train_run(&config, (struct train_world){world, world->size, 1}, hooks, &summary);
    if (world->rank == 0)
        c->summary = summary;
    return status;
}

static void train(struct call *call) {
    if (comm_threads_run(call->ranks, train_on, call) != STATUS_OK)
        fail_msg("%s, %d islands: %s", call->directory, call->islands, status_text());
    assert_int_equal(call->summary.step, STEPS);
    assert_true(isfinite(call->summary.valid_loss));
}

static char *checkpoint_of(const char *directory, int64_t step) {
    return text_format("%s/checkpoints/step-%06lld", directory, (long long)step);
}

/* As if the run had ended after `step`. */
static void cut(const char *directory, int64_t step) {
    for (int64_t later = step + 1; later <= STEPS; later++) {
        char *checkpoint = checkpoint_of(directory, later);
        remove_all(checkpoint);
        free(checkpoint);
    }
}

static void expect_same_end(const char *a, const char *b) {
    struct checkpoint_manifest manifest;
    char *end_a = checkpoint_of(a, STEPS), *end_b = checkpoint_of(b, STEPS);
    assert_int_equal(checkpoint_manifest_open(&manifest, end_a), STATUS_OK);
    for (size_t i = 0; i < manifest.file_count; i++)
        if (!strstr(manifest.files[i].name, "config.ini")) /* which names the directory */
            assert_same_file(end_a, end_b, manifest.files[i].name);
    checkpoint_manifest_close(&manifest);
    free(end_a);
    free(end_b);
}

/* At any step, also between a sending and its mixing, and before the first meeting. */
static void test_resumed_is_uninterrupted(void **state) {
    (void)state;
    static const struct call calls[] = {{.ranks = 2, .islands = 2, .shard = "1", .sync_steps = "4", .overlap = "1"},
                                        {.ranks = 4, .islands = 2, .shard = "2", .sync_steps = "3", .overlap = "0"},
                                        {.ranks = 4, .islands = 2, .shard = "1", .sync_steps = "7", .overlap = "2"},
                                        {.ranks = 1, .islands = 1, .shard = "1", .sync_steps = "4", .overlap = "1"}};
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        char *whole = directory_of("whole", (int)i), *stopped = directory_of("stopped", (int)i);
        struct call call = calls[i];
        call.directory = whole;
        train(&call);
        call.directory = stopped;
        train(&call);
        expect_same_end(whole, stopped);
        for (int64_t step = STEPS - 1; step > 0; step -= 1 + step % 2) {
            cut(stopped, step);
            call.read = step % 2 ? "broadcast" : "each";
            train(&call);
            assert_true(call.summary.resumed);
            expect_same_end(whole, stopped);
        }
        remove_all(whole);
        remove_all(stopped);
        free(whole);
        free(stopped);
    }
}

/* A rank is gone from any of its calls on, with all kinds of transfers between islands under way: all fail, and what is given back
 * is touched by nobody any more. The run goes on each time, and in the end is as if that had not been. */
static void test_lost_and_resumed(void **state) {
    (void)state;
    char *whole = directory_of("whole", 0), *lossy = directory_of("lossy", 0);
    struct call call = {.directory = whole, .ranks = 4, .islands = 4, .shard = "1", .sync_steps = "4", .overlap = "2"};
    struct comm_threads_faults faults = {.seed = 5, .latency_s = 2e-4, .dying_rank = 2, .dying_call = CALL_FIRST};
    enum status status = STATUS_PEER;
    train(&call);
    call.directory = lossy;
    for (; status != STATUS_OK; faults.dying_call += CALL_STRIDE) {
        status = comm_threads_run_with(call.ranks, &faults, train_on, &call);
        if (status != STATUS_OK && status != STATUS_PEER)
            fail_msg("call %lld: %s", (long long)faults.dying_call, status_text());
    }
    expect_same_end(whole, lossy);
    remove_all(whole);
    remove_all(lossy);
    free(whole);
    free(lossy);
}

static void expect_islands(const char *directory, int64_t islands) {
    struct train_state state;
    char *end = checkpoint_of(directory, STEPS);
    assert_int_equal(checkpoint_verify(end), STATUS_OK);
    assert_int_equal(checkpoint_read_state(end, &state), STATUS_OK);
    assert_int_equal(state.form.island_count, islands);
    assert_int_equal(state.step, STEPS);
    free(end);
}

/* One run is cut short again and again, and goes on with fewer islands, more, none, and some again. */
static void test_another_number_of_islands(void **state) {
    (void)state;
    static const struct call calls[] = {{.ranks = 2, .islands = 2, .shard = "1", .sync_steps = "4", .overlap = "1"},
                                        {.ranks = 4, .islands = 4, .shard = "1", .sync_steps = "4", .overlap = "1"},
                                        {.ranks = 1, .islands = 1, .shard = "1", .sync_steps = "4", .overlap = "1"},
                                        {.ranks = 2, .islands = 1, .shard = "2", .sync_steps = "0", .overlap = "1"},
                                        {.ranks = 4, .islands = 2, .shard = "2", .sync_steps = "2", .overlap = "0"},
                                        {.ranks = 2, .islands = 2, .shard = "1", .sync_steps = "8", .overlap = "3"}};
    char *directory = directory_of("other", 0);
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        struct call call = calls[i];
        call.directory = directory;
        train(&call);
        assert_int_equal(call.summary.resumed, i > 0);
        expect_islands(directory, strcmp(call.sync_steps, "0") == 0 ? 0 : call.islands);
        cut(directory, 5 + (int64_t)i); /* the next one goes on from what this one saved */
    }
    remove_all(directory);
    free(directory);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_resumed_is_uninterrupted),
        cmocka_unit_test(test_another_number_of_islands),
        cmocka_unit_test(test_lost_and_resumed),
    };
    return cmocka_run_group_tests(tests, write_corpus_and_set_up, forget_corpus_and_tear_down);
}
