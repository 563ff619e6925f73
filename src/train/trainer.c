#include "train/trainer.h"

#include "base/clock.h"
#include "base/file.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/threads.h"
#include "comm/launch/launch.h"
#include "data/corpus.h"
#include "data/loader.h"
#include "data/tokenizer.h"
#include "train/agreement.h"
#include "parallel/layout_choice.h"
#include "train/evaluate.h"
#include "train/notices.h"
#include "train/placement.h"
#include "train/profile.h"
#include "train/report.h"
#include "train/roof.h"
#include "train/run_directory.h"
#include "train/saver.h"
#include "train/state.h"
#include "train/verify.h"
#include <math.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Invariants.
 *  1. state.step updates are in the weights; state.sequences sequences were drawn for them. A checkpoint is written
 *     only between steps, so that what it holds is always such a pair.
 *  2. The loader's order is a function of the seed and the cursor; nothing else about it needs saving.
 *  3. Evaluation and samples change neither weights, nor moments, nor the cursor.
 *  4. A step that is refused changes neither weights nor moments; its data is passed over. A return to a checkpoint
 *     takes everything from there but the cursor, so that the same data is not met again (train/guard.h).
 *  5. Every rank takes the same way through this file: what one of them learns alone (a file that cannot be written, a
 *     signal, a time that was measured) is agreed on before anybody acts on it.
 *  6. From step to step islands do not wait for each other: what one of them wants of all (to stop, to go back) is
 *     told, and acted on by all after the same later step (train/notices.h). They do wait where something is evaluated
 *     or saved.
 */
struct trainer {
    struct run_config *config;
    struct train_hooks hooks;
    struct train_world world;
    struct ranks ranks;
    struct sharding sharding;
    struct corpus corpus;
    struct tokenizer *tokenizer;
    struct loader *loader;
    struct model *model;
    struct workspace *workspace;
    struct expert_parallel *exchange; /* NULL where experts are not divided */
    struct step_runner runner;
    struct outer *outer; /* NULL without islands */
    struct notices notices;
    int64_t save_step;  /* that the last save is of */
    int64_t stage_step; /* after which the present stage of a save began */
    struct guard *guards; /* [islands] for a checkpoint */
    struct train_state state;
    struct train_report report;
    struct profile profile; /* zeroed without hooks.profile */
    int32_t *tokens;        /* [batch_sequences, T+1] */
    struct saver *saver;
    char *checkpoints, *samples_path, *config_path, *metrics_path;
    double roof_operations_per_s, step_seconds, begin_s;
    int64_t processed_tokens; /* by this call */
    enum step_skip trouble;   /* what this island wants to go back for */
    bool stopping;            /* some rank was asked to stop: agreed on */
};

enum { NOTICE_STOP = 1, NOTICE_BUSY = 2, NOTICE_ROLL_BACK = 4 };

enum { DEVICE_LINE_BYTES = 160, TOKENIZER_BYTES_MAX = 64 << 20 };
enum { TRAIN_STEPS_MAX = 1000000000 }; /* that config.ini may say */
enum { PROBE_STEPS = 4, NOTICE_DELAY_MAX = 64, NOTICE_INTERVAL_MAX = 16 };
static const double NOTICE_WIRE_BYTES = 143, NOTICE_SHARE = 1e-3; /* measured on a link: with the headers of packets; of all */
static const size_t BANDWIDTH_BYTES = (size_t)128 << 20; /* of a buffer that the profile's roof is measured with */

static volatile sig_atomic_t stop_requested;

static void request_stop(int signal_number) {
    stop_requested = 1;
    if (signal_number == SIGTERM)
        comm_launch_note_termination();
    signal(signal_number, SIG_DFL); /* the second one ends the process */
}

static void watch_signals(void) {
    struct sigaction action = {.sa_handler = request_stop};
    stop_requested = 0;
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGUSR1, &action,
              NULL); /* mpirun passes it on and, other than SIGTERM, does not end the ranks soon after */
}

/* ---- setting up -------------------------------------------------------------------------------------------------- */

static bool is_first(const struct trainer *t) {
    return t->world.comm->rank == 0;
}

static enum status prepare_data(struct trainer *t, const char *directory) {
    struct run_config *c = t->config;
    if (!*c->data.train)
        return status_fail(STATUS_USAGE,
                           "data.train is not set; name the text to learn from: --data.train 'texts/*.txt'");
    struct corpus_options options = {.train_patterns = c->data.train,
                                     .valid_patterns = *c->data.valid ? c->data.valid : NULL,
                                     .tokenizer_path = *c->data.tokenizer ? c->data.tokenizer : NULL,
                                     .vocab_size = (int)c->data.vocab_size,
                                     .directory = directory,
                                     .seed = (uint64_t)c->train.seed};
    struct text_list checkpoints = {0};
    bool reused;
    TRY(checkpoint_list(t->checkpoints, &checkpoints));
    options.keep = checkpoints.count > 0;
    text_list_release(&checkpoints);
    enum status status = corpus_prepare(&options, &reused);
    memory_return_freed();
    return status;
}

static enum status open_corpus(struct trainer *t, const char *directory) {
    char line[1024];
    enum status status = corpus_open(&t->corpus, directory);
    snprintf(line, sizeof line, "%s", status_text());
    if (status == STATUS_OK || is_first(t)) /* which has just written it */
        return status;
    return status_fail(status, "%s; run.directory must be on a file system that all ranks share", line);
}

/* Rank 0 turns text into tokens; all read them. */
static enum status open_data(struct trainer *t) {
    char *directory = run_directory_path(t->config, "data");
    enum status status = comm_agree(t->world.comm, is_first(t) ? prepare_data(t, directory) : STATUS_OK);
    if (status == STATUS_OK)
        status = comm_agree(t->world.comm, open_corpus(t, directory));
    free(directory);
    return status == STATUS_OK ? agreement_data(t->world.comm, &t->corpus) : status;
}

static enum status check_vocabulary(struct run_config *config, int64_t tokenizer_size) {
    if (config->model.vocab_size == 0)
        config->model.vocab_size = tokenizer_size;
    if (config->model.vocab_size < tokenizer_size)
        return status_fail(STATUS_USAGE, "model.vocab_size %lld is less than the tokenizer's %lld tokens",
                           (long long)config->model.vocab_size, (long long)tokenizer_size);
    return STATUS_OK;
}

static enum status open_tokenizer(struct trainer *t) {
    TRY(tokenizer_open(t->corpus.tokenizer_path, &t->tokenizer));
    if (t->corpus.vocab_size > tokenizer_vocab_size(t->tokenizer))
        return status_fail(STATUS_FORMAT, "%s has fewer tokens than the text beside it: remove that directory to make it anew",
                           t->corpus.tokenizer_path);
    return check_vocabulary(t->config, tokenizer_vocab_size(t->tokenizer));
}

static enum status open_loader(struct trainer *t, int64_t first_sequence, struct loader **loader) {
    return loader_open(loader, &t->corpus.train.shard, t->config->train.sequence_length,
                       t->config->train.batch_sequences, (uint64_t)t->config->train.seed, first_sequence);
}

static struct model_options model_options_from(const struct run_config *c, struct run_backend backend,
                                               struct sharding sharding) {
    return (struct model_options){backend.ops, backend.device, run_config_compute(c), DTYPE_F32, c->train.sequence_length,
                                  true,        sharding};
}

static struct workspace_options workspace_options_from(const struct run_config *c, const struct mesh *mesh) {
    return (struct workspace_options){step_sequences_most(mesh, c->train.micro_batch_sequences / c->diloco.replicas),
                                      c->train.sequence_length, true, c->train.recompute == RECOMPUTE_BLOCK};
}

static struct step_settings step_settings_from(const struct run_config *c) {
    return (struct step_settings){(int)(c->train.batch_sequences / c->train.micro_batch_sequences),
                                  c->train.micro_batch_sequences / c->diloco.replicas,
                                  c->layout.grad_wire == GRADIENT_WIRE_BF16 ? DTYPE_BF16 : DTYPE_F32,
                                  run_config_outer(c).plan.fragment_count,
                                  c->run.graph};
}

/* What an island sends in sync_steps. */
static int64_t round_bytes(const struct trainer *t, const struct outer_options *options) {
    int64_t bytes = 0;
    for (int fragment = 0; fragment < options->plan.fragment_count; fragment++)
        bytes += outer_island_bytes(t->model, options, outer_plan_step(&options->plan, fragment, 1));
    return bytes;
}

/* Islands know of each other what happened as many steps ago as a fragment travels. They tell it after every step, but
 * those of a small model, whose steps are short, after as many that it is no burden on the link. */
static enum status create_notices(struct trainer *t, const struct outer_options *options) {
    const struct mesh *mesh = &t->sharding.mesh;
    int64_t islands = mesh->size[MESH_ISLAND], overlap = options->plan.overlap_steps;
    if (islands == 1)
        return notices_init(&t->notices, &t->ranks.islands, 1, 0);
    double told = NOTICE_WIRE_BYTES * (double)((islands - 1) * mesh_group_size(mesh, RANKS_BATCH_AXES));
    double interval = ceil(told * (double)options->plan.sync_steps / (NOTICE_SHARE * (double)round_bytes(t, options)));
    int64_t delay = overlap < 1 ? 1 : overlap < NOTICE_DELAY_MAX ? overlap : NOTICE_DELAY_MAX;
    return notices_init(&t->notices, &t->ranks.islands, (int64_t)fmin(interval, NOTICE_INTERVAL_MAX), delay);
}

static enum status create_islands(struct trainer *t) {
    struct outer_options options = run_config_outer(t->config);
    TRY(create_notices(t, &options));
    if (options.plan.sync_steps == 0)
        return STATUS_OK;
    TRY(memory_alloc(&t->guards, (size_t)t->config->diloco.replicas, sizeof *t->guards));
    TRY(outer_create(t->model, &t->ranks, t->runner.traffic, &options, &t->outer));
    t->runner.outer = t->outer;
    return STATUS_OK;
}

static bool is_due(int64_t step, int64_t every) {
    return every > 0 && step % every == 0;
}

static bool is_save_due(const struct trainer *t, int64_t step) {
    bool is_end = step == t->config->train.steps && t->config->checkpoint.at_end;
    return is_end || is_due(step, t->config->checkpoint.every_steps);
}

/* A save that is under way reads what a step changes; one that follows the step wants what it changed hashed. */
static void before_update(void *context) {
    struct trainer *t = context;
    int64_t step = t->state.step + 1;
    if (!t->saver)
        return;
    saver_detach(t->saver);
    t->runner.hashes = is_save_due(t, step) ? saver_expect(t->saver, step) : NULL;
}

static enum status create_model(struct trainer *t) {
    struct run_config *c = t->config;
    struct run_backend backend;
    TRY(run_config_backend(c, &backend));
    TRY(model_create(&c->model, model_options_from(c, backend, t->sharding), &t->model));
    TRY(step_workspace_create(t->model, &t->ranks, workspace_options_from(c, &t->sharding.mesh),
                              c->layout.exchange_limit_bytes, &t->workspace, &t->exchange));
    TRY(step_runner_init(&t->runner, t->model, t->workspace, &t->ranks, &c->optim, step_settings_from(c)));
    t->runner.herald = (struct step_herald){before_update, t};
    TRY(create_islands(t));
    size_t token_count = (size_t)(c->train.batch_sequences * (c->train.sequence_length + 1));
    return memory_alloc(&t->tokens, token_count, sizeof *t->tokens);
}

static enum status create_saver(struct trainer *t) {
    const struct run_config *c = t->config;
    struct saver_settings settings = {t->checkpoints, (uint64_t)c->checkpoint.file_bytes,
                                      c->checkpoint.mode == CHECKPOINT_MODE_ASYNC,
                                      c->checkpoint.weights == CHECKPOINT_WEIGHTS_BF16, t->hooks.checkpoint_is_good};
    return saver_create(&t->saver, t->model, t->outer, &t->ranks, &settings);
}

static void clear_moments(struct model *model) {
    for (int i = 0; i < model->table.count; i++) {
        model->context.ops->fill(model->moment1[i], 0);
        model->context.ops->fill(model->moment2[i], 0);
    }
}

/* Fresh weights and moments: the start of a run. */
static enum status start_fresh(struct trainer *t) {
    t->state = (struct train_state){.best_step = -1};
    clear_moments(t->model);
    TRY(model_initialize(t->model, (uint64_t)t->config->train.seed));
    if (t->outer)
        outer_reset(t->outer);
    return STATUS_OK;
}

/* What ranks compute with follows what they own. */
static enum status agree_and_refresh(struct trainer *t, enum status status) {
    TRY(comm_agree(t->world.comm, status));
    return step_refresh(&t->runner);
}

/* This island's sequences of the batch. */
static const int32_t *island_tokens(const struct trainer *t) {
    int64_t sequences = t->config->train.batch_sequences / t->config->diloco.replicas;
    return t->tokens + t->sharding.mesh.coordinate[MESH_ISLAND] * sequences * (t->config->train.sequence_length + 1);
}

/* So many that all fragments meet in the last H of them. */
static int64_t whole_rounds(const struct run_config *c, int64_t steps) {
    int64_t unit = c->diloco.sync_steps > 10 ? c->diloco.sync_steps : 10;
    return steps < unit ? (steps < 10 ? 10 : steps) : steps / unit * unit;
}

/* How many steps fit the target: a few are run on the first batch and timed; the caller undoes them. */
static enum status measure_steps(struct trainer *t) {
    struct loader *loader;
    t->runner.outer = NULL;
    TRY(open_loader(t, 0, &loader));
    enum status status = loader_next(loader, t->tokens);
    loader_close(loader);
    TRY(comm_agree(t->world.comm, status));
    double fastest = INFINITY;
    for (int i = 1; i <= PROBE_STEPS; i++) {
        struct step_result result;
        double begin = clock_seconds();
        TRY(step_run(&t->runner, (struct step_input){.tokens = island_tokens(t), .step = i, .step_count = PROBE_STEPS},
                     &result));
        t->model->device->finish();
        if (i > 1) /* the first one warms caches and libraries */
            fastest = fmin(fastest, clock_seconds() - begin);
    }
    TRY(comm_broadcast(t->world.comm, &fastest, sizeof fastest));
    t->runner.outer = t->outer;
    t->config->train.steps =
        whole_rounds(t->config, (int64_t)fmin(t->config->train.target_minutes * 60 / fastest, TRAIN_STEPS_MAX));
    log_info("speed   %.0f ms a step: %lld steps fit %g minutes", 1e3 * fastest, (long long)t->config->train.steps,
             t->config->train.target_minutes);
    return STATUS_OK;
}

static struct checkpoint_retention retention(const struct trainer *t) {
    const struct run_config *c = t->config;
    return (struct checkpoint_retention){c->checkpoint.keep, c->checkpoint.keep_every_steps,
                                         c->checkpoint.keep_best ? t->state.best_step : -1, -1};
}

/* What the last call left undone when it was cut short. */
static enum status tidy_checkpoints(const struct trainer *t) {
    struct checkpoint_retention keep = retention(t);
    keep.good_step = t->state.step;
    TRY(checkpoint_settle(t->checkpoints));
    if (checkpoint_keep(t->checkpoints, keep) != STATUS_OK)
        log_warn("%s", status_text()); /* tried again at the next save */
    return STATUS_OK;
}

static void resume_islands(struct trainer *t) {
    outer_resume(t->outer, &t->state.plan, t->state.step);
    t->outer->has_report = t->state.has_report;
    t->outer->report = t->state.report;
}

/* Weights mean nothing with other tokens: a text that changed has its tokenizer learnt anew. */
static enum status check_tokenizer(const struct trainer *t, const char *checkpoint) {
    char *saved = path_join(checkpoint, "tokenizer.json"), *was = NULL, *is = NULL;
    size_t was_size, is_size;
    enum status status = file_read(saved, TOKENIZER_BYTES_MAX, &was, &was_size);
    if (status == STATUS_OK)
        status = file_read(t->corpus.tokenizer_path, TOKENIZER_BYTES_MAX, &is, &is_size);
    if (status == STATUS_OK && (was_size != is_size || memcmp(was, is, is_size) != 0))
        status = status_fail(STATUS_USAGE,
                             "%s is of another text: its tokenizer is not the one of %s; bring the text of data.train back, or "
                             "choose another --run.directory",
                             checkpoint, t->corpus.tokenizer_path);
    free(saved);
    free(was);
    free(is);
    return status;
}

/* The newest good checkpoint, or the start of the run. */
static enum status restore(struct trainer *t, char path[CHECKPOINT_PATH_BYTES]) {
    TRY(checkpoint_resume(t->checkpoints, t->model, t->outer, &t->ranks,
                          (enum checkpoint_read)t->config->checkpoint.read, &t->state, path));
    TRY(comm_agree(t->world.comm, *path && is_first(t) ? check_tokenizer(t, path) : STATUS_OK));
    if (*path && t->hooks.checkpoint_is_good)
        t->hooks.checkpoint_is_good(path);
    if (*path && t->outer)
        resume_islands(t);
    return agree_and_refresh(t, *path ? STATUS_OK : start_fresh(t));
}

/* Before the first step islands must hold the same. */
static enum status verify_islands(struct trainer *t) {
    return t->outer ? outer_verify(t->outer) : STATUS_OK;
}

static enum status start_or_resume(struct trainer *t, bool *resumed) {
    char path[CHECKPOINT_PATH_BYTES];
    if (t->config->train.steps == 0) {
        TRY(agree_and_refresh(t, start_fresh(t)));
        TRY(measure_steps(t));
    }
    TRY(restore(t, path));
    *resumed = *path != '\0';
    if (*resumed)
        TRY(comm_agree(t->world.comm, is_first(t) ? tidy_checkpoints(t) : STATUS_OK));
    TRY(verify_islands(t));
    return comm_agree(t->world.comm, is_first(t) ? run_directory_write_config(t->config) : STATUS_OK);
}

static void describe_islands(const struct trainer *t) {
    const struct outer_options *o = &t->outer->options;
    const struct outer_plan *plan = &o->plan;
    char bytes[32];
    log_info("islands %d, meeting every %lld steps in %d fragment%s, applied %lld step%s later; %s: each sends %s in "
             "that time",
             t->sharding.mesh.size[MESH_ISLAND], (long long)plan->sync_steps, plan->fragment_count,
             plan->fragment_count == 1 ? "" : "s", (long long)plan->overlap_steps, plan->overlap_steps == 1 ? "" : "s",
             outer_format_name(o->wire), text_bytes(bytes, (double)round_bytes(t, o)));
}

static const char *describe_machine(const struct trainer *t, char line[DEVICE_LINE_BYTES]) {
    const struct device *device = t->model->device;
    if (device == device_cpu())
        snprintf(line, DEVICE_LINE_BYTES, "%d threads", threads_count());
    else
        snprintf(line, DEVICE_LINE_BYTES, "%s: %s", device->name, device_describe(device));
    return line;
}

static void describe(const struct trainer *t) {
    const struct run_config *c = t->config;
    struct parameter_counts counts = parameter_table_count(&t->model->table, &c->model);
    char total[32], active[32], tokens[32], held_out[32], bytes[32], name[DEVICE_LINE_BYTES];
    log_info(
        "model   %s parameters, %s active a token; %lld blocks, %lld experts, top %lld, width %lld, vocabulary %lld",
        text_count(total, counts.total), text_count(active, counts.active), (long long)c->model.num_hidden_layers,
        (long long)c->model.num_experts, (long long)c->model.num_experts_per_tok, (long long)c->model.hidden_size,
        (long long)c->model.vocab_size);
    log_info("data    %s tokens to learn from, %s held out", text_count(tokens, t->corpus.train.token_count),
             text_count(held_out, t->corpus.valid.token_count));
    log_info("machine %s, %s, %.0f GFLOP/s at best with %s; %s of tensors", describe_machine(t, name),
             c->train.precision == PRECISION_BF16 ? "bf16" : "fp32", 1e-9 * t->roof_operations_per_s,
             t->model->context.ops->multiply_unit(t->model->context.compute),
             text_bytes(bytes, (double)(t->model->memory.total + t->workspace->memory.total)));
    if (t->outer)
        describe_islands(t);
}

/* Of all ranks together, each measured while the others are, too. */
static enum status measure_roof(struct trainer *t) {
    const struct kernel_ops *ops = t->model->context.ops;
    t->roof_operations_per_s = t->hooks.roof_operations_per_s;
    if (t->roof_operations_per_s > 0)
        return STATUS_OK;
    t->roof_operations_per_s = roof_multiply(ops, t->model->device, t->model->context.compute, 0.2);
    ops->multiply_registers(t->model->context.compute, 0); /* what it holds, too, is for training now */
    return comm_sum_f64(t->world.comm, &t->roof_operations_per_s, 1);
}

/* Every rank chooses by the same facts: those of the rank that has least. */
static enum status choose_layout(struct trainer *t) {
    struct comm *world = t->world.comm;
    char line[LAYOUT_LINE_BYTES], link[COMM_MEMORY_LINE_BYTES];
    struct run_backend backend;
    TRY(run_config_backend(t->config, &backend)); /* as checked by all before */
    int64_t mine[2] = {placement_rank_bytes(backend.device, t->world.local_size), t->world.local_size}, *all;
    TRY(memory_alloc(&all, 2 * (size_t)world->size, sizeof *all));
    enum status status = comm_share(world, mine, sizeof mine, all);
    struct placement_world known = {world->rank, world->size, (int)mine[1], mine[0]};
    for (int r = 0; r < world->size && status == STATUS_OK; r++) {
        known.rank_memory_bytes = all[2 * r] < known.rank_memory_bytes ? all[2 * r] : known.rank_memory_bytes;
        known.ranks_per_machine = all[2 * r + 1] == mine[1] ? known.ranks_per_machine : 0;
    }
    free(all);
    TRY(status);
    TRY(comm_agree(world, placement_choose(t->config, known, &t->sharding)));
    if (world->size > 1)
        log_info("layout  %s", layout_describe(&t->sharding, line));
    if (t->config->train.micro_batch_sequences < world->size) /* as many ranks in each island */
        log_warn("%lld sequences at a time leave %lld of %d ranks without work: raise --train.micro_batch_sequences",
                 (long long)t->config->train.micro_batch_sequences,
                 (long long)(world->size - t->config->train.micro_batch_sequences), world->size);
    TRY(placement_open_ranks(&t->ranks, &t->sharding.mesh, world, backend.device, t->config, link));
    if (*link)
        log_info("link    %s", link);
    return STATUS_OK;
}

/* What cannot be, and a device that is not there, is refused before anything is written; the choice itself waits for the
 * vocabulary, which the data decide. */
static enum status check_layout(const struct trainer *t) {
    struct run_config config = *t->config;
    struct placement_world known = {.rank = t->world.comm->rank, .rank_count = t->world.comm->size};
    struct sharding ignored;
    struct run_backend backend;
    if (config.model.vocab_size == 0)
        config.model.vocab_size = config.data.vocab_size;
    TRY(run_config_backend(&config, &backend));
    return placement_choose(&config, known, &ignored);
}

static enum status set_up(struct trainer *t, struct train_summary *summary) {
    struct run_config *c = t->config;
    struct comm *world = t->world.comm;
    threads_set_count(c->run.threads > 0 ? (int)c->run.threads : t->world.threads);
    if (!is_first(t))
        log_set_level(LOG_SILENT);
    TRY(agreement_settings(world, c));
    TRY(comm_agree(world, check_layout(t)));
    TRY(agreement_directory(world, c));
    t->checkpoints = run_directory_path(c, "checkpoints");
    t->samples_path = run_directory_path(c, "samples.txt");
    t->config_path = run_directory_path(c, "config.ini");
    t->metrics_path = run_directory_path(c, "metrics.jsonl");
    TRY(open_data(t));
    TRY(comm_agree(world, open_tokenizer(t)));
    TRY(choose_layout(t));
    TRY(comm_agree(world, create_model(t)));
    TRY(comm_agree(world, create_saver(t)));
    TRY(measure_roof(t));
    describe(t);
    TRY(start_or_resume(t, &summary->resumed));
    enum status status = open_loader(t, t->state.sequences, &t->loader);
    if (status == STATUS_OK && t->hooks.profile)
        status = profile_init(&t->profile, &t->runner, is_first(t));
    if (status == STATUS_OK && is_first(t))
        status = train_report_open(&t->report, c, t->model, t->state.step, t->roof_operations_per_s);
    return comm_agree(world, status);
}

/* What other islands may still send into when this one has failed: kept until the process ends. */
struct left_behind {
    struct left_behind *next;
    struct outer *outer;
    struct notices notices;
    struct comm islands;
};
static _Atomic(struct left_behind *) all_left_behind;

static void leave_islands(struct trainer *t) {
    struct left_behind *left;
    struct comm islands = ranks_leave_islands(&t->ranks);
    if (memory_alloc(&left, 1, sizeof *left) == STATUS_OK) {
        *left = (struct left_behind){atomic_load(&all_left_behind), t->outer, t->notices, islands};
        while (!atomic_compare_exchange_weak(&all_left_behind, &left->next, left))
            continue;
    }
    t->outer = NULL;
    t->notices = (struct notices){0};
}

/* After a failure what is under way between islands may go on, even after STATUS_PEER: that can be of other transfers only. */
static void tear_down(struct trainer *t, enum status status) {
    bool under_way = notices_are_under_way(&t->notices) || (t->outer && t->outer->travels);
    if (under_way && status != STATUS_OK)
        leave_islands(t);
    saver_destroy(t->saver);
    outer_destroy(t->outer);
    notices_release(&t->notices);
    free(t->guards);
    train_report_close(&t->report);
    loader_close(t->loader);
    profile_release(&t->profile);
    step_runner_release(&t->runner);
    workspace_destroy(t->workspace);
    expert_parallel_destroy(t->exchange);
    model_destroy(t->model);
    tokenizer_destroy(t->tokenizer);
    corpus_close(&t->corpus);
    ranks_close(&t->ranks);
    free(t->tokens);
    free(t->checkpoints);
    free(t->samples_path);
    free(t->config_path);
    free(t->metrics_path);
}

/* ---- what happens between steps ---------------------------------------------------------------------------------- */

/* What islands know of themselves, for the checkpoint; their global weights hold all that was sent. */
static enum status gather_islands(struct trainer *t) {
    if (!t->outer)
        return STATUS_OK;
    TRY(outer_settle(t->outer));
    TRY(outer_verify(t->outer));
    t->state.form.island_count = t->sharding.mesh.size[MESH_ISLAND];
    t->state.plan = t->outer->options.plan;
    t->state.has_report = t->outer->has_report && t->outer->mixing >= 0;
    t->state.report = t->outer->report;
    return comm_share(&t->ranks.islands, &t->state.guard, sizeof t->state.guard, t->guards);
}

/* A save that is still under way is given up or waited for, as the settings say; the last one of a run always ends. */
static enum status save(struct trainer *t) {
    const struct run_config *c = t->config;
    bool is_best = c->checkpoint.keep_best && t->save_step == t->state.best_step; /* there is no other copy of it */
    TRY(c->checkpoint.overlap == CHECKPOINT_OVERLAP_REPLACE && !is_best ? saver_cancel(t->saver) : saver_finish(t->saver));
    TRY(gather_islands(t));
    struct checkpoint_sources sources = {.tokenizer_path = t->corpus.tokenizer_path,
                                         .config_path = t->config_path,
                                         .metrics_path = t->metrics_path,
                                         .model = &c->model,
                                         .tokenizer = t->tokenizer,
                                         .state = t->state,
                                         .keep = retention(t),
                                         .island_guards = t->guards};
    TRY(saver_start(t->saver, &sources));
    t->save_step = t->stage_step = t->state.step;
    return STATUS_OK;
}

/* Bytes of the text that `count` tokens from the document's beginning stand for. */
static int64_t bytes_of_tokens(const struct trainer *t, const struct corpus_document *document, const int32_t *tokens,
                               int64_t count) {
    if (count == document->token_count)
        return document->byte_count;
    int64_t bytes = 0;
    for (int64_t i = 0; i < count; i++)
        if (!tokenizer_is_special(t->tokenizer, tokens[i]))
            bytes += (int64_t)tokenizer_token(t->tokenizer, tokens[i]).size;
    return bytes;
}

/* This island's share of a document of `count` tokens, in whole windows; a token before it is its context. */
static struct range island_windows(const struct trainer *t, int64_t count) {
    int64_t length = t->config->train.sequence_length, predicted = count > 0 ? count - 1 : 0;
    struct range windows = range_part((predicted + length - 1) / length, t->ranks.islands.size, t->ranks.islands.rank);
    int64_t begin = windows.begin * length, end = windows.end * length;
    return (struct range){begin, (end < predicted ? end : predicted) + 1};
}

/* What all islands found. */
static enum status add_up_islands(struct trainer *t, struct evaluation *evaluation) {
    double sums[] = {evaluation->loss_sum, (double)evaluation->token_count};
    if (t->ranks.islands.size == 1)
        return STATUS_OK;
    TRY(comm_sum_f64(&t->ranks.islands, sums, 2));
    evaluation->loss_sum = sums[0];
    evaluation->token_count = (int64_t)sums[1];
    return STATUS_OK;
}

/* The beginning of every held-out document, in the same share, together about token_limit tokens (0: all of it): a
 * short evaluation meets every kind of text as often as a whole one does. */
static enum status evaluate_held_out(struct trainer *t, int64_t token_limit, struct train_summary *summary) {
    const struct corpus_split *split = &t->corpus.valid;
    struct evaluation evaluation = {0};
    double share =
        token_limit > 0 && token_limit < split->token_count ? (double)token_limit / (double)split->token_count : 1;
    int64_t bytes = 0;
    enum status status = STATUS_OK;
    for (int64_t i = 0; i < split->document_count && status == STATUS_OK; i++) {
        const struct corpus_document *document = &split->documents[i];
        int64_t count = (int64_t)ceil(share * (double)document->token_count);
        int32_t *tokens;
        status = memory_alloc(&tokens, (size_t)count, sizeof *tokens);
        if (status != STATUS_OK)
            break;
        token_shard_copy(&split->shard, document->first_token, count, tokens);
        struct range mine = island_windows(t, count);
        status = evaluate_tokens(t->model, t->workspace, t->runner.traffic, tokens + mine.begin, range_count(mine),
                                 &evaluation);
        bytes += bytes_of_tokens(t, document, tokens, count);
        free(tokens);
    }
    if (status == STATUS_OK)
        status = add_up_islands(t, &evaluation);
    summary->valid_loss = evaluation_loss(&evaluation);
    summary->valid_bits_per_byte = evaluation_bits_per_byte(&evaluation, bytes);
    evaluation_release(&evaluation);
    return status;
}

/* What is evaluated, and shown, are the weights that all islands share. */
static enum status show_global(struct trainer *t) {
    if (!t->outer)
        return STATUS_OK;
    saver_detach(t->saver);
    TRY(outer_settle(t->outer));
    return outer_swap(t->outer);
}

static enum status show_local(struct trainer *t) {
    return t->outer ? outer_swap(t->outer) : STATUS_OK;
}

static enum status add_sample(struct trainer *t) {
    if (!t->hooks.write_sample || t->world.comm->size > 1) /* no rank has the whole model */
        return STATUS_OK;
    struct text passage = {0};
    text_printf(&passage, "== step %lld\n", (long long)t->state.step);
    enum status status = t->hooks.write_sample(t->hooks.context, t->model, t->tokenizer, &passage);
    struct file_writer writer;
    if (status == STATUS_OK)
        status = file_writer_open(&writer, t->samples_path, true);
    if (status == STATUS_OK) {
        text_add_string(&passage, "\n\n");
        status = file_writer_add(&writer, passage.data, passage.size);
        enum status closed = file_writer_close(&writer);
        status = status == STATUS_OK ? closed : status;
    }
    text_release(&passage);
    return status;
}

static bool is_time_over(const struct trainer *t) {
    return is_first(t) && t->hooks.max_seconds > 0 && clock_seconds() - t->begin_s >= t->hooks.max_seconds;
}

/* A signal reaches one rank or some, and the time is rank 0's; all save and leave after the same step. And a save that
 * all ranks are done with goes on to its next stage. */
static enum status agree_after_step(struct trainer *t, bool *rolls_back) {
    double asked[] = {stop_requested || is_time_over(t), saver_is_busy(t->saver), t->trouble != STEP_UPDATED};
    struct notice notice;
    TRY(comm_sum_f64(&t->ranks.batch, asked, 3));
    TRY(notices_exchange(&t->notices, t->state.step,
                         (asked[0] > 0 ? NOTICE_STOP : 0) | (asked[1] > 0 ? NOTICE_BUSY : 0) |
                             (asked[2] > 0 ? NOTICE_ROLL_BACK : 0),
                         &notice));
    t->stopping = notice.flags & NOTICE_STOP;
    *rolls_back = notice.flags & NOTICE_ROLL_BACK;
    if (!notice.is_new || (notice.flags & NOTICE_BUSY) || notice.told_step <= t->stage_step)
        return STATUS_OK;
    t->stage_step = t->state.step;
    return saver_advance(t->saver);
}

/* A checkpoint of a step that was evaluated may be the best so far. */
static void note_best(struct trainer *t, double valid_loss) {
    if (isfinite(valid_loss) && (t->state.best_step < 0 || valid_loss < t->state.best_valid_loss)) {
        t->state.best_step = t->state.step;
        t->state.best_valid_loss = valid_loss;
    }
}

/* What reaches a checkpoint was verified. */
static enum status verify(struct trainer *t, bool saves) {
    int64_t every = t->config->train.verify_steps;
    if (every == 0 || !(saves || is_due(t->state.step, every)))
        return STATUS_OK;
    return verify_copies(t->model, &t->ranks, t->state.step, t->checkpoints);
}

static struct guard_settings guard_settings_from(const struct run_config *c) {
    return (struct guard_settings){c->train.spikes, c->train.rollback_limit};
}

static struct step_input next_input(const struct trainer *t) {
    return (struct step_input){island_tokens(t), t->state.step + 1, t->config->train.steps,
                               guard_limits(&t->state.guard, guard_settings_from(t->config))};
}

/* Back to the newest good checkpoint, which a save that is under way becomes. The cursor stays: the data between there
 * and here is passed over. */
static enum status roll_back(struct trainer *t) {
    const struct train_state before = t->state;
    const char *reason = t->trouble ? step_skip_reason(t->trouble) : "another island's trouble";
    char path[CHECKPOINT_PATH_BYTES];
    TRY(saver_finish(t->saver));
    TRY(notices_drain(&t->notices));
    if (t->outer)
        TRY(outer_drop(t->outer));
    TRY(restore(t, path));
    t->trouble = STEP_UPDATED;
    guard_roll_back(&t->state.guard, &before.guard, before.step);
    t->state.sequences = before.sequences;
    loader_close(t->loader);
    t->loader = NULL;
    TRY(comm_agree(t->world.comm, open_loader(t, t->state.sequences, &t->loader)));
    log_warn("step %lld: %s; back to step %lld (%s), the data between is passed over", (long long)before.step, reason,
             (long long)t->state.step, *path ? path : "the start: there is no checkpoint");
    return comm_agree(t->world.comm,
                      is_first(t) ? train_report_rollback(&t->report, before.step, t->state.step, reason) : STATUS_OK);
}

static enum status after_step(struct trainer *t, struct train_summary *summary) {
    const struct run_config *c = t->config;
    int64_t step = t->state.step;
    bool last = step == c->train.steps, evaluated = last || is_due(step, c->train.eval_every_steps);
    enum status status = STATUS_OK;
    double begin = clock_seconds();
    if (evaluated) {
        TRY(show_global(t));
        TRY(evaluate_held_out(t, last ? 0 : c->train.eval_tokens, summary));
        TRY(show_local(t));
        if (is_first(t))
            status = train_report_evaluation(&t->report, step, summary->valid_loss, summary->valid_bits_per_byte);
        TRY(comm_agree(t->world.comm, status));
        profile_note(&t->profile, SPAN_EVALUATION, begin);
    }
    begin = clock_seconds();
    if (is_due(step, c->train.sample_every_steps) || (last && c->train.sample_every_steps > 0)) {
        TRY(show_global(t));
        TRY(add_sample(t));
        TRY(show_local(t));
        profile_note(&t->profile, SPAN_SAMPLE, begin);
    }
    begin = clock_seconds();
    bool rolls_back;
    TRY(agree_after_step(t, &rolls_back));
    if (rolls_back)
        return roll_back(t);
    bool saves = t->stopping || is_save_due(t, step);
    TRY(verify(t, saves));
    if (saves) {
        if (evaluated)
            note_best(t, summary->valid_loss);
        TRY(save(t));
        profile_note(&t->profile, SPAN_CHECKPOINT, begin);
    }
    return STATUS_OK;
}

static enum status give_up(const struct trainer *t, const struct step_result *result) {
    const struct guard *guard = &t->state.guard;
    struct text_list saved;
    bool is_saved = checkpoint_list(t->checkpoints, &saved) == STATUS_OK && saved.count > 0;
    text_list_release(&saved);
    return status_fail(
        STATUS_NUMERIC,
        "step %lld: %s, %lld steps in a row, after %lld returns %s that did not get past it; "
        "lower --optim.lr, look at the data, or allow more by --train.rollback_limit or --train.spikes "
        "ignore; %s%s",
        (long long)t->state.step, step_skip_reason(result->skipped), (long long)guard->skipped_in_a_row,
        (long long)guard->rollbacks, is_saved ? "to a checkpoint" : "to the start",
        is_saved ? "what was learnt is in " : "no checkpoint was saved", is_saved ? t->checkpoints : "");
}

static enum status report_step(struct trainer *t, const struct step_result *result, double seconds) {
    if (result->skipped)
        log_warn("step %lld: loss %g, gradient norm %g: %s, the update is skipped", (long long)t->state.step,
                 result->loss, result->gradient_norm, step_skip_reason(result->skipped));
    enum status status = STATUS_OK;
    if (is_first(t))
        status = train_report_step(&t->report, t->workspace, &t->state, result, seconds);
    if (is_first(t) && status == STATUS_OK && result->applied && t->outer->has_report)
        status = train_report_outer(&t->report, t->state.step, &t->outer->report);
    return comm_agree(&t->ranks.batch, status);
}

/* A device may have work left when the host knows how the step went: it is part of the next step's time, or of this one's where
 * something else comes between. */
static void finish_step(const struct trainer *t) {
    const struct run_config *c = t->config;
    int64_t step = t->state.step + 1;
    if (is_save_due(t, step) || is_due(step, c->train.eval_every_steps) || is_due(step, c->train.sample_every_steps))
        t->model->device->finish();
}

static enum status run_step(struct trainer *t, struct train_summary *summary) {
    struct run_config *c = t->config;
    struct step_result result;
    profile_begin_step(&t->profile, t->state.step + 1);
    double begin = clock_seconds();
    TRY(comm_agree(&t->ranks.batch, loader_next(t->loader, t->tokens)));
    profile_note(&t->profile, SPAN_DATA, begin);
    TRY(step_run(&t->runner, next_input(t), &result));
    finish_step(t);
    double seconds = clock_seconds() - begin;
    profile_note(&t->profile, SPAN_STEP, begin);
    int64_t sequences = c->train.batch_sequences, tokens = sequences * c->train.sequence_length;
    t->state.step++;
    t->state.sequences += sequences;
    t->state.tokens += tokens;
    t->processed_tokens += tokens;
    t->step_seconds += seconds;
    enum guard_verdict verdict = guard_note(&t->state.guard, guard_settings_from(c), t->state.step, &result);
    begin = clock_seconds();
    TRY(report_step(t, &result, seconds));
    profile_note(&t->profile, SPAN_REPORT, begin);
    if (verdict == GUARD_GIVE_UP)
        return give_up(t, &result);
    if (verdict == GUARD_ROLL_BACK)
        t->trouble = result.skipped;
    if (verdict == GUARD_ROLL_BACK && t->ranks.islands.size == 1)
        return roll_back(t);
    return after_step(t, summary);
}

static void finish_summary(const struct trainer *t, double seconds, struct train_summary *summary) {
    summary->step = t->state.step;
    summary->step_count = t->config->train.steps;
    summary->tokens = t->state.tokens;
    summary->seconds = seconds;
    summary->tokens_per_s = t->step_seconds > 0 ? (double)t->processed_tokens / t->step_seconds : 0;
    summary->roof_share = summary->tokens_per_s *
                          model_train_operations_per_token(&t->config->model, t->config->train.sequence_length) /
                          t->roof_operations_per_s;
    summary->peak_bytes = (double)memory_peak_bytes();
    double tensors = (double)(t->model->memory.total + t->workspace->memory.total) +
                     (t->outer ? (double)t->outer->memory_bytes : 0);
    bool on_host = t->model->device == device_cpu();
    summary->device_bytes = on_host ? 0 : tensors + (double)kernels_scratch_bytes();
    summary->planned_bytes = (on_host ? tensors : 0) + TRAIN_PROCESS_BYTES + (double)saver_copy_bytes(t->saver);
    summary->interrupted = t->stopping && t->state.step < t->config->train.steps;
}

static void show_lines(char *lines) {
    for (char *line = strtok(lines, "\n"); line; line = strtok(NULL, "\n"))
        log_info("%s", line);
}

/* The memory's roof is measured last, so that its buffers are not in the run's peak. */
static enum status finish_profile(const struct trainer *t) {
    if (t->profile.spans[SPAN_STEP].calls == 0) {
        log_info("profile: no step was left to run, nothing was measured");
        return STATUS_OK;
    }
    struct roof_bandwidth memory;
    struct text table = {0};
    char *path = run_directory_path(t->config, "trace.json");
    enum status status = roof_bandwidth(t->model->context.ops, t->model->device, BANDWIDTH_BYTES, &memory);
    if (status == STATUS_OK) {
        struct profile_roof roof = {t->roof_operations_per_s, fmax(memory.read, memory.copy)};
        log_info("profile of %lld steps; at best %.0f GFLOP/s, %.1f GB/s of memory; the last steps are in %s",
                 (long long)t->profile.spans[SPAN_STEP].calls, 1e-9 * roof.operations_per_s, 1e-9 * roof.bytes_per_s,
                 path);
        profile_print(&t->profile, roof, &table);
        show_lines(table.data);
        status = profile_write_trace(&t->profile, path);
    }
    text_release(&table);
    free(path);
    return status;
}

static enum status run_all(struct trainer *t, struct train_summary *summary) {
    TRY(set_up(t, summary));
    watch_signals();
    double begin = clock_seconds();
    enum status status = STATUS_OK;
    while (status == STATUS_OK && t->state.step < t->config->train.steps && !t->stopping)
        status = run_step(t, summary);
    if (status == STATUS_OK)
        status = saver_finish(t->saver);
    if (status == STATUS_OK)
        status = notices_drain(&t->notices);
    t->model->device->finish();
    finish_summary(t, clock_seconds() - begin, summary);
    if (t->hooks.profile && status == STATUS_OK)
        status = comm_agree(t->world.comm, is_first(t) ? finish_profile(t) : STATUS_OK);
    return status;
}

enum status train_run(struct run_config *config, struct train_world world, struct train_hooks hooks,
                      struct train_summary *summary) {
    struct trainer trainer = {.config = config, .world = world, .hooks = hooks, .begin_s = clock_seconds()};
    *summary = (struct train_summary){.valid_loss = NAN, .valid_bits_per_byte = NAN};
    enum status status = run_all(&trainer, summary);
    tear_down(&trainer, status);
    return status;
}
