/* A small training run on ranks that are threads, for tests of what may go wrong in it. */
#pragma once

#include "parallel/step.h"

#include "base/random.h"
#include "base/threads.h"
#include "comm/threads/comm_threads.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { LENGTH = 16, VOCAB = 67, SEQUENCES = 8, STEP_COUNT = 1000, RANKS_MAX = 8 };

struct test_layout {
    int replicate, shard, expert, zero;
    enum dtype compute, wire;
};

struct test_rank {
    const struct outer_options *meetings; /* NULL: no islands; set before it is opened */
    int islands;                          /* with meetings */
    struct ranks ranks;
    struct model *model;
    struct workspace *workspace;
    struct expert_parallel *exchange;
    struct optimizer_settings optimizer;
    struct step_runner runner;
    struct outer *outer;
    int32_t tokens[SEQUENCES * (LENGTH + 1)];
};

static inline int layout_ranks(const struct test_layout *l) {
    return l->replicate * l->shard * l->expert;
}

static inline struct model_config test_model_config(void) {
    struct model_config c;
    model_config_init(&c);
    c.vocab_size = VOCAB;
    c.hidden_size = 32;
    c.num_hidden_layers = 2;
    c.num_attention_heads = 4;
    c.num_key_value_heads = 2;
    c.num_experts = 5;
    c.num_experts_per_tok = 2;
    c.moe_intermediate_size = 16;
    c.initializer_range = 0.1;
    assert_int_equal(model_config_check(&c, "test"), STATUS_OK);
    return c;
}

/* Collective. Close with test_rank_close, also after a failure. */
static inline enum status test_rank_open(struct test_rank *r, const struct test_layout *l, struct comm *world) {
    const int size[MESH_AXIS_COUNT] = {r->meetings ? r->islands : 1, l->replicate, l->shard, l->expert};
    struct mesh mesh = mesh_make(size, world->rank);
    struct model_config config = test_model_config();
    const struct kernel_ops *ops;
    TRY(kernels_choose("auto", &ops));
    TRY(ranks_open(&r->ranks, &mesh, world, (struct comm_memory){0}));
    struct model_options options = {ops, device_cpu(), l->compute, DTYPE_F32, LENGTH, true, {mesh, l->zero}};
    TRY(model_create(&config, options, &r->model));
    struct workspace_options shape = {step_sequences_most(&mesh, SEQUENCES), LENGTH, true, false};
    TRY(step_workspace_create(r->model, &r->ranks, shape, 0, &r->workspace, &r->exchange));
    optimizer_settings_init(&r->optimizer);
    r->optimizer.warmup_steps = 2;
    r->optimizer.lr = 2e-3;
    struct step_settings settings = {.micro_batch_count = 1, .micro_batch_sequences = SEQUENCES, .gradient_wire = l->wire,
                                     .fragment_count = r->meetings ? r->meetings->plan.fragment_count : 0};
    TRY(step_runner_init(&r->runner, r->model, r->workspace, &r->ranks, &r->optimizer, settings));
    TRY(model_initialize(r->model, 17));
    if (r->meetings) {
        TRY(outer_create(r->model, &r->ranks, r->runner.traffic, r->meetings, &r->outer));
        outer_reset(r->outer);
        r->runner.outer = r->outer;
    }
    return step_refresh(&r->runner);
}

static inline void test_rank_close(struct test_rank *r) {
    outer_destroy(r->outer);
    step_runner_release(&r->runner);
    workspace_destroy(r->workspace);
    expert_parallel_destroy(r->exchange);
    model_destroy(r->model);
    ranks_close(&r->ranks);
}

/* Text with something to learn: each token mostly follows from the one before. Another one for each `key`. */
static inline void test_text(int32_t tokens[SEQUENCES * (LENGTH + 1)], int64_t key) {
    for (int64_t s = 0; s < SEQUENCES; s++) {
        int32_t token = (int32_t)(random_bits(9, (uint64_t)key, (uint64_t)s) % VOCAB);
        for (int64_t t = 0; t <= LENGTH; t++) {
            uint64_t noise = random_bits(8, (uint64_t)(key * SEQUENCES + s), (uint64_t)t);
            tokens[s * (LENGTH + 1) + t] = token;
            token = noise % 5 == 0 ? (int32_t)(noise / 8 % VOCAB) : (token * 7 + 3) % VOCAB;
        }
    }
}

/* Islands have texts of their own. */
static inline enum status test_rank_step(struct test_rank *r, int64_t step, struct step_limits limits,
                                         struct step_result *result) {
    test_text(r->tokens, step + STEP_COUNT * r->ranks.mesh.coordinate[MESH_ISLAND]);
    return step_run(&r->runner, (struct step_input){r->tokens, step, STEP_COUNT, limits}, result);
}
