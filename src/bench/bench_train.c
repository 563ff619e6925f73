/* Whole training steps of a preset on random tokens, with the time of every kind of event. */
#include "bench/bench.h"

#include "base/clock.h"
#include "base/json.h"
#include "base/memory.h"
#include "base/random.h"
#include "base/threads.h"
#include "parallel/layout_choice.h"
#include "train/placement.h"
#include "train/profile.h"
#include "train/roof.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PEER_LINE_BYTES = 4096 };
static const double ROOF_SECONDS = 0.2;
static const size_t BANDWIDTH_BYTES = (size_t)128 << 20;

struct training {
    struct run_config config;
    struct sharding sharding;
    struct ranks ranks;
    struct comm *world;
    struct model *model;
    struct workspace *workspace;
    struct expert_parallel *exchange;
    struct step_runner runner;
    int32_t *tokens;
    int64_t token_count, step, comm_bytes;
    struct profile profile; /* of the timed steps */
};

static enum status read_config(struct training *t, const struct bench *bench) {
    const char **pairs;
    TRY(memory_alloc(&pairs, 2 * (size_t)(bench->pair_count + 1), sizeof *pairs));
    pairs[0] = "model.preset", pairs[1] = bench->preset;
    for (int i = 0; i < 2 * bench->pair_count; i++)
        pairs[2 + i] = bench->pairs[i];
    enum status status = run_config_resolve(&t->config, NULL, pairs, bench->pair_count + 1);
    free(pairs);
    TRY(status);
    if (t->config.model.vocab_size == 0)
        t->config.model.vocab_size = t->config.data.vocab_size;
    if (bench->sequence_length > 0)
        t->config.train.sequence_length = bench->sequence_length;
    return STATUS_OK;
}

static enum status place(struct training *t, const struct bench *bench) {
    struct placement_world world = {t->world->rank, t->world->size, bench->launch->local_size,
                                    placement_machine_bytes() / bench->launch->local_size};
    TRY(placement_choose(&t->config, world, &t->sharding));
    return ranks_open(&t->ranks, &t->sharding.mesh, t->world);
}

static enum step_part part_named(const char *name) {
    return strcmp(name, "compute") == 0 ? STEP_COMPUTE : strcmp(name, "transfers") == 0 ? STEP_TRANSFERS : STEP_WHOLE;
}

static enum status training_open(struct training *t, const struct bench *bench, enum dtype dtype) {
    t->world = &bench->launch->world;
    TRY(read_config(t, bench));
    TRY(place(t, bench));
    struct run_config *c = &t->config;
    int64_t batch = c->train.batch_sequences, micro = c->train.micro_batch_sequences, length = c->train.sequence_length;
    struct model_options model = {bench->ops, bench->device, dtype, DTYPE_F32, length, true, t->sharding};
    struct workspace_options workspace = {step_sequences_most(&t->sharding.mesh, micro), length, true,
                                          c->train.recompute == RECOMPUTE_BLOCK};
    TRY(model_create(&c->model, model, &t->model));
    TRY(step_workspace_create(t->model, &t->ranks, workspace, c->layout.exchange_limit_bytes, &t->workspace,
                              &t->exchange));
    struct step_settings settings = {.micro_batch_count = (int)(batch / micro),
                                     .micro_batch_sequences = micro,
                                     .gradient_wire = c->layout.grad_wire == GRADIENT_WIRE_BF16 ? DTYPE_BF16 : DTYPE_F32};
    TRY(step_runner_init(&t->runner, t->model, t->workspace, &t->ranks, &c->optim, settings));
    TRY(model_initialize(t->model, 1));
    TRY(step_refresh(&t->runner));
    t->runner.part = part_named(bench->part);
    if (t->runner.part != STEP_WHOLE && t->exchange)
        return status_fail(STATUS_USAGE, "--part is for layouts whose experts are not divided: --layout.expert 1");
    t->token_count = batch * length;
    TRY(memory_alloc(&t->tokens, (size_t)(batch * (length + 1)), sizeof *t->tokens));
    for (int64_t i = 0; i < batch * (length + 1); i++)
        t->tokens[i] = (int32_t)(random_bits(4, 0, (uint64_t)i) % (uint64_t)c->model.vocab_size);
    return STATUS_OK;
}

static void training_close(struct training *t) {
    profile_release(&t->profile);
    if (t->runner.model)
        step_runner_release(&t->runner);
    workspace_destroy(t->workspace);
    expert_parallel_destroy(t->exchange);
    model_destroy(t->model);
    ranks_close(&t->ranks);
    free(t->tokens);
}

static enum status run_step(struct training *t, double *seconds) {
    struct step_result result;
    TRY(comm_agree(t->world, STATUS_OK)); /* all begin together */
    int64_t sent = ranks_sent_bytes(&t->ranks);
    double begin = clock_seconds();
    TRY(step_run(&t->runner, (struct step_input){.tokens = t->tokens, .step = ++t->step, .step_count = 1000000}, &result));
    *seconds = clock_seconds() - begin;
    t->comm_bytes = result.comm_bytes;
    if (t->runner.part != STEP_WHOLE) /* nothing was agreed on: this rank's, for each */
        t->comm_bytes = (ranks_sent_bytes(&t->ranks) - sent) * t->world->size;
    profile_note(&t->profile, SPAN_STEP, begin);
    if (result.skipped && t->runner.part == STEP_WHOLE)
        return status_fail(STATUS_NUMERIC, "step %lld was not finite", (long long)t->step);
    return STATUS_OK;
}

/* Runs the peer's command; its last JSON line names the tokens a second. */
static enum status run_peer(const char *command, double *tokens_per_s) {
    char line[PEER_LINE_BYTES];
    *tokens_per_s = 0;
    FILE *pipe = popen(command, "r");
    if (!pipe)
        return status_fail(STATUS_IO, "cannot run the peer: %s", command);
    while (fgets(line, sizeof line, pipe)) {
        json_t *object = json_loads(line, 0, NULL);
        if (json_is_number(json_object_get(object, "tokens_per_s")))
            *tokens_per_s = json_number_value(json_object_get(object, "tokens_per_s"));
        json_decref(object);
    }
    if (pclose(pipe) != 0 || *tokens_per_s <= 0)
        return status_fail(STATUS_IO, "the peer gave no \"tokens_per_s\": %s", command);
    return STATUS_OK;
}

static enum status print_json(const struct bench *bench, const struct training *t, struct bench_time time,
                              double roof, double operations, double peer) {
    char line[LAYOUT_LINE_BYTES];
    json_t *events = json_object();
    for (int i = 0; i < EVENT_KIND_COUNT; i++)
        if (t->profile.events[i].seconds > 0)
            json_object_set_new(events, event_kind_name((enum event_kind)i),
                                json_real(1e3 * t->profile.events[i].seconds / bench->rounds));
    json_t *object = json_pack(
        "{s:s,s:s,s:s,s:s,s:i,s:i,s:s,s:s,s:I,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:o}", "name", "train", "case", bench->preset,
        "precision", bench_precision_name(t->model->context.compute), "kernels", bench->ops->name, "threads",
        threads_count(), "ranks", t->world->size, "layout", layout_describe(&t->sharding, line), "part", bench->part,
        "comm_bytes", (json_int_t)t->comm_bytes, "tokens_per_s",
        (double)t->token_count / time.median, "ms", 1e3 * time.median, "ms_least", 1e3 * time.least,
        "ms_most", 1e3 * time.most, "gflops", 1e-9 * operations / time.median, "roof_gflops", 1e-9 * roof, "share",
        operations / time.median / roof, "event_ms", events);
    CHECK(object != NULL);
    if (peer > 0) {
        json_object_set_new(object, "peer_tokens_per_s", json_real(peer));
        json_object_set_new(object, "ratio", json_real((double)t->token_count / time.median / peer));
    }
    json_dumpf(object, stdout, JSON_COMPACT | JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(6));
    putchar('\n');
    json_decref(object);
    return STATUS_OK;
}

static enum status print_table(const struct bench *bench, const struct training *t, struct bench_time time,
                               double roof, double operations, double peer) {
    struct roof_bandwidth memory;
    struct text table = {0};
    char line[LAYOUT_LINE_BYTES], bytes[32];
    TRY(roof_bandwidth(bench->ops, bench->device, BANDWIDTH_BYTES, &memory));
    if (t->world->size > 1)
        printf("train      %s, %s sent a step, %s\n", layout_describe(&t->sharding, line),
               text_bytes(bytes, (double)t->comm_bytes), strcmp(bench->part, "step") ? bench->part : "whole steps");
    printf("train      %s, %s, %d threads: %.0f tokens/s, %.1f ms a step (%.1f to %.1f), %.0f GFLOP/s, %.1f%% of %.0f (%s)\n",
           bench->preset, bench_precision_name(t->model->context.compute), threads_count(),
           (double)t->token_count / time.median, 1e3 * time.median, 1e3 * time.least, 1e3 * time.most,
           1e-9 * operations / time.median, 100 * operations / time.median / roof, 1e-9 * roof,
           bench->ops->multiply_unit(t->model->context.compute));
    profile_print(&t->profile, (struct profile_roof){roof / t->world->size, fmax(memory.read, memory.copy)}, &table);
    fputs(text_string(&table), stdout);
    text_release(&table);
    if (peer > 0)
        printf("             peer: %.0f tokens/s; ours is %.2f times as fast\n", peer,
               (double)t->token_count / time.median / peer);
    return STATUS_OK;
}

/* Of all ranks, each measured while the others are, too. */
static enum status measure_roof(const struct bench *bench, struct training *t, double *roof) {
    TRY(comm_agree(t->world, STATUS_OK));
    *roof = roof_multiply(bench->ops, t->model->context.compute, ROOF_SECONDS);
    return comm_sum_f64(t->world, roof, 1);
}

static enum status measure(const struct bench *bench, struct training *t) {
    double *seconds, *peer, roof;
    TRY(measure_roof(bench, t, &roof));
    double operations = model_train_operations_per_token(&t->config.model, t->config.train.sequence_length) *
                        (double)t->token_count;
    TRY(memory_alloc(&seconds, (size_t)bench->rounds, sizeof *seconds));
    TRY(memory_alloc(&peer, (size_t)bench->rounds, sizeof *peer));
    enum status status = STATUS_OK;
    for (int i = 0; i < 2 && status == STATUS_OK; i++) /* warm: memory touched, scratch grown */
        status = run_step(t, &seconds[0]);
    if (status == STATUS_OK)
        status = profile_init(&t->profile, &t->runner, false);
    for (int i = 0; i < bench->rounds && status == STATUS_OK; i++) {
        status = run_step(t, &seconds[i]);
        if (status == STATUS_OK && bench->peer)
            status = run_peer(bench->peer, &peer[i]);
    }
    if (status == STATUS_OK) {
        struct bench_time time = bench_time_of(seconds, bench->rounds);
        double theirs = bench->peer ? bench_time_of(peer, bench->rounds).median : 0;
        if (t->world->rank == 0)
            status = (bench->json ? print_json : print_table)(bench, t, time, roof, operations, theirs);
        status = comm_agree(t->world, status);
    }
    free(seconds);
    free(peer);
    return status;
}

enum status bench_train(const struct bench *bench) {
    enum status status = STATUS_OK;
    if (bench->peer && bench->launch->world.size > 1)
        return status_fail(STATUS_USAGE, "--peer is for one rank");
    for (int i = 0; i < bench->precision_count && status == STATUS_OK; i++) {
        struct training t = {.step = 0};
        status = training_open(&t, bench, bench->precisions[i]);
        if (status == STATUS_OK)
            status = measure(bench, &t);
        training_close(&t);
    }
    return status;
}
