#include "bench/training.h"

#include "base/clock.h"
#include "base/memory.h"
#include "base/random.h"
#include "train/placement.h"
#include <stdlib.h>
#include <string.h>

static enum status place(struct training *t, const struct bench *bench) {
    struct placement_world world = {t->world->rank, t->world->size, bench->launch->local_size,
                                    placement_rank_bytes(bench->device, bench->launch->local_size)};
    char ignored[COMM_MEMORY_LINE_BYTES];
    TRY(placement_choose(&t->config, world, &t->sharding));
    return placement_open_ranks(&t->ranks, &t->sharding.mesh, t->world, bench->device, &t->config, ignored);
}

static enum step_part part_named(const char *name) {
    return strcmp(name, "compute") == 0 ? STEP_COMPUTE : strcmp(name, "transfers") == 0 ? STEP_TRANSFERS : STEP_WHOLE;
}

enum status training_open(struct training *t, const struct bench *bench, enum dtype dtype) {
    t->world = &bench->launch->world;
    TRY(bench_read_config(bench, &t->config));
    if (bench->sequence_length > 0)
        t->config.train.sequence_length = bench->sequence_length;
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
                                     .gradient_wire = c->layout.grad_wire == GRADIENT_WIRE_BF16 ? DTYPE_BF16 : DTYPE_F32,
                                     .repeats = c->run.graph};
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

void training_close(struct training *t) {
    profile_release(&t->profile);
    if (t->runner.model)
        step_runner_release(&t->runner);
    workspace_destroy(t->workspace);
    expert_parallel_destroy(t->exchange);
    model_destroy(t->model);
    ranks_close(&t->ranks);
    free(t->tokens);
}

enum status training_step(struct training *t, double *seconds) {
    struct step_result result;
    TRY(comm_agree(t->world, STATUS_OK)); /* all begin together */
    int64_t sent = ranks_sent_bytes(&t->ranks);
    double begin = clock_seconds();
    TRY(step_run(&t->runner, (struct step_input){.tokens = t->tokens, .step = ++t->step, .step_count = 1000000}, &result));
    t->model->device->finish();
    *seconds = clock_seconds() - begin;
    t->comm_bytes = result.comm_bytes;
    if (t->runner.part != STEP_WHOLE) /* nothing was agreed on: this rank's, for each */
        t->comm_bytes = (ranks_sent_bytes(&t->ranks) - sent) * t->world->size;
    profile_note(&t->profile, SPAN_STEP, begin);
    if (result.skipped && t->runner.part == STEP_WHOLE)
        return status_fail(STATUS_NUMERIC, "step %lld was not finite", (long long)t->step);
    return STATUS_OK;
}
