#include "cli/cli.h"

#include "base/log.h"
#include "base/text.h"
#include "cli/arguments.h"
#include "comm/launch/launch.h"
#include "infer/generate.h"
#include "metrics/metrics_file.h"
#include "metrics/progress.h"
#include "train/trainer.h"
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SAMPLE_TOKENS = 120 };
enum { TASK_TRAIN, TASK_DRY_RUN, TASK_HELP };

/* What was asked for. */
struct train_call {
    int argc;
    char **argv, *command; /* as it was given */
    int task;
    int64_t rank_count; /* of a dry run; 0: as many as were started */
    double max_minutes; /* 0: no limit */
    bool profile, json;
    struct run_config config;
};

static void collect(void *context, const char *text, size_t size) {
    text_add(context, text, size);
}

/* A passage that begins a text, with the weights as they are. */
static enum status write_sample(void *context, struct model *model, const struct tokenizer *tokenizer,
                                struct text *out) {
    (void)context;
    struct generator *generator;
    struct generation_result result;
    TRY(generator_create(&generator, model, model->rope.shape[0]));
    struct generation generation = {tokenizer, "", SAMPLE_TOKENS, {0.8, 0, 0.95, 1}, collect, out};
    enum status status = generator_run(generator, &generation, &result);
    generator_destroy(generator);
    return status;
}

/* Where the run would go on. Written by the training thread, read by a thread of the transport when a rank is lost. */
static char good_checkpoint[4096];
static pthread_mutex_t good_checkpoint_lock = PTHREAD_MUTEX_INITIALIZER;

static void note_checkpoint(const char *path) {
    pthread_mutex_lock(&good_checkpoint_lock);
    snprintf(good_checkpoint, sizeof good_checkpoint, "%s", path);
    pthread_mutex_unlock(&good_checkpoint_lock);
}

/* One line, at once: the starter may end all other ranks in the next moment. */
static void tell_lost_rank(const char *line) {
    pthread_mutex_lock(&good_checkpoint_lock);
    if (*good_checkpoint)
        fprintf(stderr, "cadre train: %s; the same command goes on from %s\n", line, good_checkpoint);
    else
        fprintf(stderr, "cadre train: %s; no checkpoint was saved yet\n", line);
    pthread_mutex_unlock(&good_checkpoint_lock);
}

/* The words as a shell reads them. */
static char *command_text(int argc, char **argv) {
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./:=,+@%^-";
    struct text text = {0};
    for (int i = 0; i < argc; i++) {
        const char *word = argv[i];
        text_add_string(&text, " ");
        if (*word != '\0' && word[strspn(word, plain)] == '\0') {
            text_add_string(&text, word);
            continue;
        }
        text_add_string(&text, "'");
        for (const char *c = word; *c; c++)
            text_add(&text, *c == '\'' ? "'\\''" : c, *c == '\'' ? 4 : 1);
        text_add_string(&text, "'");
    }
    return text.data;
}

static void print_summary(const struct train_summary *s) {
    char time[32], tokens[32], peak[32], planned[32], device[32];
    log_info("trained %s tokens in %s at %.0f tokens/s, %.0f%% of this machine's roof; peak memory %s, planned %s",
             text_count(tokens, s->tokens), progress_duration(time, s->seconds), s->tokens_per_s, 100 * s->roof_share,
             text_bytes(peak, s->peak_bytes), text_bytes(planned, s->planned_bytes));
    if (s->device_bytes > 0)
        log_info("%s of tensors and scratch on the device", text_bytes(device, s->device_bytes));
    if (isfinite(s->valid_bits_per_byte))
        log_info("held out: loss %.4f nats a token, %.4f bits per byte", s->valid_loss, s->valid_bits_per_byte);
}

static void print_json(const struct run_config *config, const struct train_summary *s) {
    json_t *object = json_pack("{s:o,s:I,s:I,s:I,s:f,s:f,s:f,s:f,s:f,s:f,s:s}", "directory",
                               json_name(config->run.directory), "step", (json_int_t)s->step, "steps",
                               (json_int_t)s->step_count, "tokens", (json_int_t)s->tokens, "seconds", s->seconds,
                               "tokens_per_s", s->tokens_per_s, "roof_share", s->roof_share, "peak_bytes", s->peak_bytes,
                               "planned_bytes", s->planned_bytes, "device_bytes", s->device_bytes, "device",
                               config->run.device);
    json_object_set_new(object, "valid_loss", metrics_number(s->valid_loss));
    json_object_set_new(object, "valid_bits_per_byte", metrics_number(s->valid_bits_per_byte));
    json_dumpf(object, stdout, JSON_COMPACT | JSON_PRESERVE_ORDER);
    putchar('\n');
    json_decref(object);
}

static enum status finish(const struct train_call *call, const struct comm *world, const struct train_summary *summary) {
    const struct run_config *config = &call->config;
    if (world->rank > 0)
        return summary->interrupted ? status_fail(STATUS_INTERRUPTED, "interrupted") : STATUS_OK;
    if (summary->interrupted) {
        log_info("stopped and saved at step %lld of %lld; the same command goes on%s:", (long long)summary->step,
                 (long long)summary->step_count, world->size == 1 ? "" : ", with as many ranks or any other number");
        fprintf(stderr, "  cadre%s\n", call->command);
        return status_fail(STATUS_INTERRUPTED, "interrupted");
    }
    if (summary->tokens_per_s > 0)
        print_summary(summary);
    else
        log_info("%s is complete: %lld steps", config->run.directory, (long long)summary->step);
    if (call->json)
        print_json(config, summary);
    else
        printf("%s\n", config->run.directory);
    return STATUS_OK;
}

/* As if call->rank_count ranks had been started (0: as many as were). */
static enum status dry_run(struct train_call *call, const struct comm *world) {
    struct text out = {0};
    if (call->rank_count < 0 || call->rank_count > 1 << 20)
        return status_fail(STATUS_USAGE, "--ranks is 1 to %d, not %lld", 1 << 20, (long long)call->rank_count);
    TRY(train_dry_run(&call->config, call->rank_count > 0 ? (int)call->rank_count : world->size, &out));
    fputs(text_string(&out), stdout);
    text_release(&out);
    return STATUS_OK;
}

static void print_help(const struct argument *known, int count) {
    struct run_config defaults;
    struct text out = {0};
    run_config_init(&defaults);
    arguments_print_help("train", "[--config FILE] [--section.key VALUE ...]", known, count);
    setting_write_help(run_config_group(), &defaults, &out);
    printf("\n%s", text_string(&out));
    text_release(&out);
}

/* What the words of the command ask for; with --help it is printed by rank 0. */
static enum status read_call(struct train_call *call, const struct comm *world) {
    const char *config_path = NULL, *device = NULL, *pairs[2 * ARGUMENT_PAIRS_MAX + 2];
    bool help, quiet = false, verbose = false, dry = false;
    int pair_count = 0;
    const struct argument known[] = {
        {"config", ARGUMENT_STRING, &config_path, "settings from an INI file; the command line wins"},
        {"dry-run", ARGUMENT_SWITCH, &dry, "print mesh, placements, the schedule of a step and memory; train nothing"},
        {"ranks", ARGUMENT_INTEGER, &call->rank_count, "of --dry-run: as if so many ranks had been started"},
        {"quiet", ARGUMENT_SWITCH, &quiet, "only warnings and errors"},
        {"verbose", ARGUMENT_SWITCH, &verbose, "more lines"},
        {"device", ARGUMENT_STRING, &device, "what computes: cpu or cuda (run.device)"},
        {"profile", ARGUMENT_SWITCH, &call->profile,
         "time every kind of event: a table at the end, the last steps in trace.json for chrome://tracing; on a device "
         "that makes steps slower: it is waited for after each event"},
        {"max-minutes", ARGUMENT_NUMBER, &call->max_minutes,
         "save and leave after so long, as after a signal; the same command goes on"},
        {"json", ARGUMENT_SWITCH, &call->json, "how the run ended as one JSON object, instead of its directory"},
    };
    enum { COUNT = sizeof known / sizeof *known };
    struct arguments arguments = {known, COUNT, pairs, &pair_count, NULL};
    TRY(arguments_parse(arguments, call->argc, call->argv, &help));
    call->task = help ? TASK_HELP : dry ? TASK_DRY_RUN : TASK_TRAIN;
    if (help && world->rank == 0)
        print_help(known, COUNT);
    if (help)
        return STATUS_OK;
    if (call->max_minutes < 0)
        return status_fail(STATUS_USAGE, "--max-minutes is at least 0, not %g", call->max_minutes);
    log_set_level(quiet ? LOG_QUIET : verbose ? LOG_VERBOSE : LOG_NORMAL);
    if (device) {
        pairs[2 * pair_count] = "run.device";
        pairs[2 * pair_count++ + 1] = device;
    }
    return run_config_resolve(&call->config, config_path, pairs, pair_count);
}

/* All do what rank 0 does, or nobody does anything. */
static enum status agree_on_task(struct comm *world, int task) {
    int first = task;
    TRY(comm_broadcast(world, &first, sizeof first));
    enum status status = STATUS_OK;
    if (task != first)
        status = status_fail(STATUS_USAGE, "its --help or --dry-run is not rank 0's: start all ranks with the same command");
    return comm_agree(world, status);
}

static enum status run_call(struct train_call *call, struct comm_launch *launch, struct comm *world) {
    struct train_summary summary;
    TRY(comm_agree(world, read_call(call, world)));
    TRY(agree_on_task(world, call->task));
    if (call->task == TASK_HELP)
        return STATUS_OK;
    if (call->task == TASK_DRY_RUN)
        return comm_agree(world, world->rank == 0 ? dry_run(call, world) : STATUS_OK);
    comm_launch_set_timeout(launch, call->config.run.timeout_seconds);
    struct train_world of_ranks = {world, launch->local_size, launch->thread_count};
    struct train_hooks hooks = {.write_sample = write_sample,
                                .profile = call->profile,
                                .checkpoint_is_good = note_checkpoint,
                                .max_seconds = 60 * call->max_minutes};
    TRY(train_run(&call->config, of_ranks, hooks, &summary));
    return finish(call, world, &summary);
}

/* Ranks that fail together do so in the same words: one of them says so, before any leaves. */
static void tell_failure(struct comm_launch *launch, enum status status) {
    bool speaks = comm_launch_speaks(launch, status);
    if (speaks && status == STATUS_PEER)
        tell_lost_rank(status_text());
    else if (speaks)
        cli_tell_failure("train");
    cli_stay_silent();
}

enum status cmd_train(int argc, char **argv) {
    struct train_call call = {.argc = argc, .argv = argv, .command = command_text(argc, argv)};
    struct comm_launch launch;
    enum status status = comm_launch_open(&launch, tell_lost_rank);
    if (status == STATUS_OK) {
        device_set_local_rank(launch.local_rank);
        status = run_call(&call, &launch, &launch.world);
        if (status != STATUS_OK)
            tell_failure(&launch, status);
        comm_launch_close(&launch, status);
    }
    free(call.command);
    return status;
}
