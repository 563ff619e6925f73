/* Every layout trains the same run: N ranks in one process against one rank, in fp32 on the processor's own kernels. */
#include "parallel/step.h"

#include "base/random.h"
#include "base/threads.h"
#include "comm/threads/comm_threads.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { LENGTH = 24, VOCAB = 67, STEPS_MAX = 20, RANKS_MAX = 8 };

/* A run to be trained in some layout. */
struct job {
    int replicate, shard, expert, zero;
    int64_t experts, sequences, micro_batch_sequences;
    int steps;
    bool recompute;
    int64_t exchange_limit_bytes;
    enum dtype compute;
    enum { ROUTE_AS_LEARNT, ROUTE_ALL_TO_ONE } routing;
    /* what came out */
    double loss[STEPS_MAX], norm[STEPS_MAX], load[STEPS_MAX];
    int64_t comm_bytes;                 /* of the last step, all ranks */
    int64_t planned_bytes;              /* parameters and gradients of a step, all ranks */
    int64_t state_bytes[RANKS_MAX];     /* weights, gradients and moments */
    uint64_t sums[RANKS_MAX];           /* of the bits of what each rank owns */
};

struct rank {
    struct ranks ranks;
    struct model *model;
    struct workspace *workspace;
    struct expert_parallel *exchange;
    struct optimizer_settings optimizer;
    struct step_runner runner;
    int32_t *tokens;
};

static struct model_config config_of(const struct job *job) {
    struct model_config c;
    model_config_init(&c);
    c.vocab_size = VOCAB;
    c.hidden_size = 32;
    c.num_hidden_layers = 3;
    c.num_attention_heads = 4;
    c.num_key_value_heads = 2;
    c.num_experts = job->experts;
    c.num_experts_per_tok = job->experts ? 2 : c.num_experts_per_tok;
    c.intermediate_size = 48;
    c.moe_intermediate_size = 24;
    c.initializer_range = 0.1;
    c.router_aux_loss_coef = 0.02;
    c.router_z_loss_coef = 0.001;
    assert_int_equal(model_config_check(&c, "test"), STATUS_OK);
    return c;
}

/* Every token prefers the same experts: a router that looks at no token. */
static void route_all_to_one(struct rank *r) {
    for (int i = 0; i < r->model->table.count; i++) {
        struct tensor t = r->model->own_weight[i];
        if (r->model->table.rows[i].role == PARAMETER_ROUTER)
            memset(t.data, 0, tensor_bytes(t));
    }
}

static enum status open_rank(struct rank *r, const struct job *job, struct comm *world) {
    const int size[MESH_AXIS_COUNT] = {1, job->replicate, job->shard, job->expert};
    struct mesh mesh = mesh_make(size, world->rank);
    struct model_config config = config_of(job);
    const struct kernel_ops *ops;
    TRY(kernels_choose("auto", &ops));
    TRY(ranks_open(&r->ranks, &mesh, world));
    struct model_options options = {ops,    device_cpu(), job->compute, DTYPE_F32, LENGTH, true,
                                    {mesh, job->zero}};
    TRY(model_create(&config, options, &r->model));
    struct workspace_options shape = {step_sequences_most(&mesh, job->micro_batch_sequences), LENGTH, true,
                                      job->recompute};
    TRY(step_workspace_create(r->model, &r->ranks, shape, job->exchange_limit_bytes, &r->workspace, &r->exchange));
    optimizer_settings_init(&r->optimizer);
    r->optimizer.warmup_steps = 2;
    r->optimizer.lr = 3e-3;
    struct step_settings settings = {.micro_batch_count = (int)(job->sequences / job->micro_batch_sequences),
                                     .micro_batch_sequences = job->micro_batch_sequences};
    TRY(step_runner_init(&r->runner, r->model, r->workspace, &r->ranks, &r->optimizer, settings));
    TRY(model_initialize(r->model, 17));
    if (job->routing == ROUTE_ALL_TO_ONE)
        route_all_to_one(r);
    TRY(step_refresh(&r->runner));
    r->tokens = calloc((size_t)job->sequences * (LENGTH + 1), sizeof *r->tokens);
    return STATUS_OK;
}

static void close_rank(struct rank *r) {
    free(r->tokens);
    step_runner_release(&r->runner);
    workspace_destroy(r->workspace);
    expert_parallel_destroy(r->exchange);
    model_destroy(r->model);
    ranks_close(&r->ranks);
}

/* Text with something to learn: each token mostly follows from the one before. */
static void draw_tokens(int32_t *tokens, int64_t sequences, int64_t step) {
    for (int64_t s = 0; s < sequences; s++) {
        int32_t token = (int32_t)(random_bits(9, (uint64_t)step, (uint64_t)s) % VOCAB);
        for (int64_t t = 0; t <= LENGTH; t++) {
            uint64_t noise = random_bits(8, (uint64_t)(step * sequences + s), (uint64_t)t);
            tokens[s * (LENGTH + 1) + t] = token;
            token = noise % 5 == 0 ? (int32_t)(noise / 8 % VOCAB) : (token * 7 + 3) % VOCAB;
        }
    }
}

static double worst_load(const struct rank *r) {
    const double *stats = r->workspace->all_stats.data;
    double most = 0;
    int64_t experts = r->model->config.num_experts;
    for (int64_t e = 0; e < experts; e++)
        most = fmax(most, stats[2 + experts + e]);
    return most;
}

static uint64_t hash_tensor(uint64_t sum, struct tensor t) {
    const uint32_t *bits = t.data;
    for (int64_t i = 0; i < tensor_elements(t); i++)
        sum = (sum ^ bits[i]) * 1099511628211u;
    return sum;
}

static void note_rank(struct job *job, const struct rank *r) {
    int me = mesh_rank(&r->ranks.mesh);
    const struct model *m = r->model;
    job->sums[me] = 14695981039346656037u;
    job->state_bytes[me] = 0;
    for (int i = 0; i < m->table.count; i++) {
        job->sums[me] = hash_tensor(hash_tensor(job->sums[me], m->own_weight[i]), m->moment2[i]);
        job->state_bytes[me] += (int64_t)(tensor_bytes(m->own_weight[i]) + tensor_bytes(m->own_gradient[i]) +
                                          tensor_bytes(m->moment1[i]) + tensor_bytes(m->moment2[i]));
    }
}

static enum status run_rank(void *context, struct comm *world) {
    struct job *job = context;
    struct rank r = {0};
    enum status status = open_rank(&r, job, world);
    for (int step = 1; step <= job->steps && status == STATUS_OK; step++) {
        struct step_result result;
        draw_tokens(r.tokens, job->sequences, step);
        status = step_run(&r.runner, (struct step_input){r.tokens, step, job->steps}, &result);
        if (status == STATUS_OK && world->rank == 0) {
            job->loss[step - 1] = result.loss;
            job->norm[step - 1] = result.gradient_norm;
            job->load[step - 1] = job->experts ? worst_load(&r) : 0;
            job->comm_bytes = result.comm_bytes;
        }
    }
    if (status == STATUS_OK)
        note_rank(job, &r);
    close_rank(&r);
    return status;
}

static void run(struct job *job) {
    threads_set_count(1);
    enum status status = comm_threads_run(job->replicate * job->shard * job->expert, run_rank, job);
    if (status != STATUS_OK)
        fail_msg("%d x %d x %d, stage %d: %s", job->replicate, job->shard, job->expert, job->zero, status_text());
}

static struct job alone(struct job job) {
    job.replicate = job.shard = job.expert = 1;
    job.zero = 0;
    job.exchange_limit_bytes = 0;
    run(&job);
    return job;
}

static void compare(const struct job *job, const struct job *one, double tolerance) {
    for (int step = 0; step < job->steps; step++) {
        double loss = fabs(job->loss[step] - one->loss[step]) / one->loss[step];
        double norm = fabs(job->norm[step] - one->norm[step]) / one->norm[step];
        if (!(loss <= tolerance && norm <= 30 * tolerance))
            fail_msg("replicate %d, shard %d, expert %d, stage %d, %d experts: step %d: loss %.9g instead of %.9g, norm "
                     "%.9g instead of %.9g",
                     job->replicate, job->shard, job->expert, job->zero, (int)job->experts, step + 1, job->loss[step],
                     one->loss[step], job->norm[step], one->norm[step]);
    }
}

static void test_every_layout_trains_the_same_run(void **state) {
    (void)state;
    static const int meshes[][3] = {{1, 1, 1}, {2, 1, 1}, {1, 2, 1}, {1, 1, 2}, {3, 1, 1}, {1, 3, 1}, {1, 1, 3},
                                    {4, 1, 1}, {1, 4, 1}, {1, 1, 4}, {2, 2, 1}, {2, 1, 2}, {1, 2, 2}, {1, 2, 3},
                                    {2, 1, 3}, {1, 3, 2}, {2, 3, 1}, {8, 1, 1}, {1, 8, 1}, {1, 2, 4}, {1, 4, 2},
                                    {2, 2, 2}, {2, 1, 4}};
    struct job wanted = {.experts = 5, .sequences = 8, .micro_batch_sequences = 8, .steps = 20, .compute = DTYPE_F32};
    struct job one = alone(wanted);
    assert_true(one.loss[19] < 0.9 * one.loss[0]);
    for (size_t i = 0; i < sizeof meshes / sizeof *meshes; i++) {
        struct job job = wanted;
        job.replicate = meshes[i][0], job.shard = meshes[i][1], job.expert = meshes[i][2];
        for (job.zero = 0; job.zero <= 3; job.zero++) {
            if (job.zero == 1 && i % 2) /* it differs from 2 in what is kept only: every other mesh */
                continue;
            run(&job);
            compare(&job, &one, 1e-5);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_layout_trains_the_same_run),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
