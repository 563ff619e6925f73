/* Every layout trains the same run: N ranks in one process against one rank, in fp32 on the processor's own kernels. */
#include "parallel/cost.h"
#include "parallel/step.h"

#include "base/random.h"
#include "base/threads.h"
#include "comm/fence_testing.h"
#include "comm/threads/comm_threads.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#ifdef CADRE_CUDA_MODEL
static const bool has_nccl = true;
#else
static const bool has_nccl = false; /* none for a device that is none */
#endif

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
    struct comm_memory memory; /* zeroed: the processor's */
    /* what came out */
    double loss[STEPS_MAX], norm[STEPS_MAX], load[STEPS_MAX];
    int64_t comm_bytes;                 /* of the last step, all ranks */
    double planned_bytes[RANKS_MAX];    /* what the events of a step are said to send */
    int64_t state_bytes[RANKS_MAX];     /* weights, gradients and moments */
    uint64_t sums[RANKS_MAX];           /* of the bits of what each rank owns */
};

struct rank {
    struct comm fenced; /* where tensors are on a device */
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
        if (r->model->table.rows[i].role == PARAMETER_ROUTER)
            r->model->context.ops->fill(r->model->own_weight[i], 0);
    }
}

/* On a device no byte of a tensor may reach the world. */
static enum status open_ranks(struct rank *r, const struct job *job, const struct mesh *mesh, struct comm *world) {
    struct comm part;
    if (!job->memory.device)
        return ranks_open(&r->ranks, mesh, world, job->memory);
    TRY(world->ops->split(world, 0, &part));
    r->fenced = fenced_comm(part);
    return ranks_open(&r->ranks, mesh, &r->fenced, job->memory);
}

static enum status open_rank(struct rank *r, const struct job *job, struct comm *world) {
    const int size[MESH_AXIS_COUNT] = {1, job->replicate, job->shard, job->expert};
    struct mesh mesh = mesh_make(size, world->rank);
    struct model_config config = config_of(job);
    const struct kernel_ops *ops;
    TRY(open_ranks(r, job, &mesh, world));
    const struct device *device = job->memory.device ? job->memory.device : device_cpu();
    if (device == device_cpu() || device == fenced_device())
        TRY(kernels_choose("auto", &ops));
    else
        TRY(kernels_choose_for(device, "auto", &ops));
    struct model_options options = {ops, device, job->compute, DTYPE_F32, LENGTH, true, {mesh, job->zero}};
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
    comm_release(&r->fenced);
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
    struct tensor all = r->workspace->all_stats;
    double *stats = malloc(tensor_bytes(all)), most = 0;
    int64_t experts = r->model->config.num_experts;
    r->model->device->copy_to_host(stats, all.data, tensor_bytes(all));
    for (int64_t e = 0; e < experts; e++)
        most = fmax(most, stats[2 + experts + e]);
    free(stats);
    return most;
}

static uint64_t hash_tensor(const struct device *device, uint64_t sum, struct tensor t) {
    uint32_t *bits = malloc(tensor_bytes(t) + 1);
    device->copy_to_host(bits, t.data, tensor_bytes(t));
    for (int64_t i = 0; i < tensor_elements(t); i++)
        sum = (sum ^ bits[i]) * 1099511628211u;
    free(bits);
    return sum;
}

static void note_rank(struct job *job, const struct rank *r) {
    int me = mesh_rank(&r->ranks.mesh);
    const struct model *m = r->model;
    struct event_sending sending = {m, r->runner.traffic, 0};
    job->planned_bytes[me] = 0;
    for (int i = 0; i < r->runner.schedule.count; i++)
        if (!event_is_exchange(r->runner.schedule.events[i].kind))
            job->planned_bytes[me] += event_sent_bytes(&r->runner.schedule.events[i], &sending);
    job->sums[me] = 14695981039346656037u;
    job->state_bytes[me] = 0;
    for (int i = 0; i < m->table.count; i++) {
        job->sums[me] = hash_tensor(m->device, hash_tensor(m->device, job->sums[me], m->own_weight[i]), m->moment2[i]);
        job->state_bytes[me] += (int64_t)(tensor_bytes(m->own_weight[i]) + tensor_bytes(m->own_gradient[i]) +
                                          tensor_bytes(m->moment1[i]) + tensor_bytes(m->moment2[i]));
    }
}

/* A step needs nothing of what gradients hold before it. */
static void poison_gradients(const struct rank *r) {
    r->model->context.ops->fill(r->model->all_gradients, NAN);
    for (int i = 0; i < r->model->table.count; i++) /* also those in slots */
        r->model->context.ops->fill(r->model->gradient[i], NAN);
}

static enum status run_rank(void *context, struct comm *world) {
    struct job *job = context;
    struct rank r = {0};
    enum status status = open_rank(&r, job, world);
    for (int step = 1; step <= job->steps && status == STATUS_OK; step++) {
        struct step_result result;
        draw_tokens(r.tokens, job->sequences, step);
        poison_gradients(&r);
        status = step_run(&r.runner, (struct step_input){.tokens = r.tokens, .step = step, .step_count = job->steps}, &result);
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
    job.memory = (struct comm_memory){0};
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

/* Under the sanitizers a mesh has every other stage, and the model of a device four ranks in bf16 only, once. */
#ifdef __SANITIZE_ADDRESS__
enum { EVERY_STAGE = 2, CUDA_MESHES_IN_F32 = 1, REPEATS_CUDA = 0 };
#else
enum { EVERY_STAGE = 1, CUDA_MESHES_IN_F32 = 2, REPEATS_CUDA = 1 };
#endif

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
            if ((i / 2 + (size_t)job.zero) % EVERY_STAGE)
                continue;
            run(&job);
            compare(&job, &one, 1e-5);
        }
    }
}

static void try_layout(struct job job, const struct job *one, int replicate, int shard, int expert, int zero) {
    job.replicate = replicate, job.shard = shard, job.expert = expert, job.zero = zero;
    run(&job);
    compare(&job, one, 1e-5);
}

/* More ranks than sequences, and more ranks than experts: some have no token, no expert, no row of a small parameter. */
static void test_ranks_without_tokens(void **state) {
    (void)state;
    for (int64_t sequences = 1; sequences <= 3; sequences += 2) {
        struct job wanted = {.experts = 5, .sequences = sequences, .micro_batch_sequences = sequences, .steps = 20};
        struct job one = alone(wanted);
        try_layout(wanted, &one, 1, 1, 6, 0);
        try_layout(wanted, &one, 2, 2, 2, 2);
        try_layout(wanted, &one, 1, 2, 4, 3);
        try_layout(wanted, &one, 1, 8, 1, 3);
        try_layout(wanted, &one, 1, 1, 8, 3);
    }
}

static void test_micro_batches_and_recomputation(void **state) {
    (void)state;
    struct job wanted = {.experts = 6, .sequences = 8, .micro_batch_sequences = 4, .steps = 20, .recompute = true};
    for (int turn = 0; turn < 2; turn++, wanted.recompute = false) {
        struct job one = alone(wanted);
        try_layout(wanted, &one, 2, 1, 1, 0);
        try_layout(wanted, &one, 1, 2, 1, 1);
        try_layout(wanted, &one, 2, 2, 1, 2);
        try_layout(wanted, &one, 1, 3, 1, 3);
        try_layout(wanted, &one, 1, 2, 2, 3);
        try_layout(wanted, &one, 2, 1, 3, 3);
        try_layout(wanted, &one, 1, 1, 4, 2);
    }
}

/* The worst imbalance, with no room for it: rounds change nothing but the time. */
static void test_all_tokens_on_one_expert(void **state) {
    (void)state;
    struct job wanted = {.experts = 6, .sequences = 8, .micro_batch_sequences = 8, .steps = 20};
    wanted.routing = ROUTE_ALL_TO_ONE;
    struct job one = alone(wanted);
    assert_true(one.load[0] == 8 * LENGTH); /* every token chose it */
    for (int64_t limit = 0; limit <= 6000; limit += 3000) {
        wanted.exchange_limit_bytes = limit;
        try_layout(wanted, &one, 1, 1, 3, 0);
        try_layout(wanted, &one, 1, 2, 2, 3);
        try_layout(wanted, &one, 2, 1, 4, 2);
    }
}

static void test_the_same_layout_twice_is_bitwise_the_same(void **state) {
    (void)state;
    static const int meshes[][4] = {{1, 1, 4, 0}, {2, 2, 1, 1}, {1, 2, 3, 2}, {2, 2, 2, 3}, {1, 4, 1, 3}};
    for (size_t i = 0; i < sizeof meshes / sizeof *meshes; i++) {
        struct job first = {.experts = 5, .sequences = 8, .micro_batch_sequences = 4, .steps = 6};
        first.replicate = meshes[i][0], first.shard = meshes[i][1], first.expert = meshes[i][2];
        first.zero = meshes[i][3];
        struct job second = first;
        run(&first);
        run(&second);
        assert_memory_equal(first.loss, second.loss, sizeof first.loss);
        assert_memory_equal(first.norm, second.norm, sizeof first.norm);
        assert_memory_equal(first.sums, second.sums, sizeof first.sums);
        assert_int_equal(first.comm_bytes, second.comm_bytes);
    }
}

/* Replicas hold the same bits. */
static void test_replicas_agree(void **state) {
    (void)state;
    struct job job = {.experts = 5, .sequences = 8, .micro_batch_sequences = 8, .steps = 6};
    job.replicate = 2, job.shard = 2, job.expert = 2, job.zero = 3;
    run(&job);
    for (int r = 0; r < 4; r++)
        assert_true(job.sums[r] == job.sums[r + 4]);
    assert_true(job.sums[0] != job.sums[1]);
}

static void test_state_falls_with_the_ranks(void **state) {
    (void)state;
    static const int meshes[][2] = {{2, 1}, {1, 2}, {4, 1}, {2, 2}, {1, 4}, {8, 1}, {4, 2}, {2, 4}, {1, 8}};
    struct job wanted = {.experts = 8, .sequences = 8, .micro_batch_sequences = 8, .steps = 1};
    struct job one = alone(wanted);
    for (size_t i = 0; i < sizeof meshes / sizeof *meshes; i++) {
        struct job job = wanted;
        job.replicate = 1, job.shard = meshes[i][0], job.expert = meshes[i][1], job.zero = 3;
        run(&job);
        int ranks = job.shard * job.expert;
        for (int r = 0; r < ranks; r++)
            if ((double)job.state_bytes[r] > 1.05 * (double)one.state_bytes[0] / ranks)
                fail_msg("shard %d, expert %d: rank %d holds %lld bytes of %lld", job.shard, job.expert, r,
                         (long long)job.state_bytes[r], (long long)one.state_bytes[0]);
    }
}

/* Counted at the transports, against what the events are said to send. What rows send depends on the routing and is held to
 * its formula in expert_parallel_test. */
static void test_bytes_are_those_of_the_plan(void **state) {
    (void)state;
    static const int meshes[][2] = {{2, 1}, {1, 2}, {3, 1}, {2, 2}, {1, 4}, {2, 4}, {1, 8}};
    for (size_t i = 0; i < sizeof meshes / sizeof *meshes; i++)
        for (int zero = 0; zero <= 3; zero++)
            for (int experts = 0; experts <= 5; experts += 5) {
                struct job job = {.experts = experts, .sequences = 8, .micro_batch_sequences = 4, .steps = 3};
                job.replicate = meshes[i][0], job.shard = meshes[i][1], job.expert = 1, job.zero = zero;
                run(&job);
                double planned = 0;
                for (int r = 0; r < job.replicate * job.shard; r++)
                    planned += job.planned_bytes[r];
                if ((double)job.comm_bytes != planned)
                    fail_msg("replicate %d, shard %d, stage %d, %d experts: %lld bytes, %.0f are planned", job.replicate,
                             job.shard, zero, experts, (long long)job.comm_bytes, planned);
            }
}

/* Rounding to bf16 is the same wherever a weight lies; what differs is the order of sums. */
static void test_bf16(void **state) {
    (void)state;
    struct job wanted = {.experts = 5, .sequences = 8, .micro_batch_sequences = 8, .steps = 20, .compute = DTYPE_BF16};
    struct job one = alone(wanted);
    for (int zero = 0; zero <= 3; zero++) {
        struct job job = wanted;
        job.replicate = 1, job.shard = 2, job.expert = 2, job.zero = zero;
        run(&job);
        compare(&job, &one, 2e-3);
    }
}

/* Where tensors are does not change a bit, nor a byte that is sent: processor against devices, through the host and by NCCL (a
 * model of it), in layouts that use every transfer there is. */
static void test_devices(void **state) {
    (void)state;
    static const int meshes[][4] = {{2, 1, 1, 0}, {1, 3, 1, 3}, {1, 1, 4, 2}, {2, 2, 1, 1}, {2, 1, 3, 3}, {2, 2, 2, 3}};
    int ways = has_nccl ? 2 : 1;
    for (size_t i = 0; i < sizeof meshes / sizeof *meshes; i++)
        for (int limited = 0; limited < 2; limited++) {
            struct job wanted = {.experts = 5, .sequences = 8, .micro_batch_sequences = 4, .steps = 4};
            wanted.replicate = meshes[i][0], wanted.shard = meshes[i][1], wanted.expert = meshes[i][2];
            wanted.zero = meshes[i][3];
            wanted.exchange_limit_bytes = limited ? 6000 : 0;
            struct job on_processor = wanted;
            run(&on_processor);
            for (int way = 0; way < ways; way++) {
                struct job job = wanted;
                job.memory.device = fenced_device();
                job.memory.way = way ? COMM_WAY_NCCL : COMM_WAY_HOST;
                run(&job);
                assert_memory_equal(job.loss, on_processor.loss, sizeof job.loss);
                assert_memory_equal(job.norm, on_processor.norm, sizeof job.norm);
                assert_memory_equal(job.sums, on_processor.sums, sizeof job.sums);
                assert_int_equal(job.comm_bytes, on_processor.comm_bytes);
            }
        }
}

static void test_ranks_without_tokens_on_devices(void **state) {
    (void)state;
    struct job wanted = {.experts = 5, .sequences = 1, .micro_batch_sequences = 1, .steps = 4};
    struct job one = alone(wanted);
    for (int way = 0; way <= has_nccl; way++) {
        wanted.memory = (struct comm_memory){fenced_device(), way ? COMM_WAY_NCCL : COMM_WAY_HOST};
        try_layout(wanted, &one, 1, 1, 6, 0);
        try_layout(wanted, &one, 2, 1, 2, 2);
        try_layout(wanted, &one, 1, 2, 3, 3);
    }
}

/* Between islands a slow link may lie: NCCL would keep a part of a device waiting for it. */
static enum status open_groups(void *context, struct comm *world) {
    const char **names = context;
    const int size[MESH_AXIS_COUNT] = {2, 1, 2, 1};
    struct mesh mesh = mesh_make(size, world->rank);
    struct ranks ranks;
    TRY(ranks_open(&ranks, &mesh, world, (struct comm_memory){fenced_device(), COMM_WAY_NCCL}));
    if (world->rank == 0)
        names[0] = ranks.islands.ops->name, names[1] = ranks.shards.ops->name;
    ranks_close(&ranks);
    return STATUS_OK;
}

static void test_islands_never_take_nccl(void **state) {
    (void)state;
    const char *names[2];
    if (!has_nccl)
        skip();
    assert_int_equal(comm_threads_run(4, open_groups, names), STATUS_OK);
    assert_string_equal(names[0], "through the host");
    assert_string_equal(names[1], "nccl");
}

/* The device's own kernels, or their model, between ranks that share it. */
static void test_cuda(void **state) {
    (void)state;
    static const int meshes[][4] = {{2, 1, 1, 1}, {1, 2, 2, 3}};
    const struct device *device;
    if (device_choose("cuda", &device) != STATUS_OK)
        skip();
    for (int bf16 = 0; bf16 < 2; bf16++) {
        struct job one = {.experts = 5, .sequences = 8, .micro_batch_sequences = 4, .steps = 2};
        one.compute = bf16 ? DTYPE_BF16 : DTYPE_F32;
        one.replicate = one.shard = one.expert = 1;
        one.memory = (struct comm_memory){device, COMM_WAY_HOST};
        run(&one);
        for (int i = bf16; i < (bf16 ? 2 : CUDA_MESHES_IN_F32); i++) {
            struct job job = one;
            job.replicate = meshes[i][0], job.shard = meshes[i][1], job.expert = meshes[i][2], job.zero = meshes[i][3];
            run(&job);
            compare(&job, &one, bf16 ? 2e-3 : 1e-5);
            if (!bf16 || !REPEATS_CUDA)
                continue;
            struct job again = job;
            run(&again);
            assert_memory_equal(job.sums, again.sums, sizeof job.sums);
        }
    }
}

/* A rank that is gone in the middle of a step is a failure on all that wait for it, and no hang. */
static void test_a_rank_dies(void **state) {
    (void)state;
    for (int64_t call = 20; call <= 290; call += 45) {
        struct job job = {.experts = 5, .sequences = 8, .micro_batch_sequences = 8, .steps = 20};
        job.replicate = 1, job.shard = 2, job.expert = 2, job.zero = 3;
        if (call > 200)
            job.memory.device = fenced_device();
        struct comm_threads_faults faults = {.dying_rank = 2, .dying_call = call};
        threads_set_count(1);
        assert_int_equal(comm_threads_run_with(4, &faults, run_rank, &job), STATUS_PEER);
        assert_non_null(strstr(status_text(), "rank 2"));
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_layout_trains_the_same_run),
        cmocka_unit_test(test_ranks_without_tokens),
        cmocka_unit_test(test_micro_batches_and_recomputation),
        cmocka_unit_test(test_all_tokens_on_one_expert),
        cmocka_unit_test(test_the_same_layout_twice_is_bitwise_the_same),
        cmocka_unit_test(test_replicas_agree),
        cmocka_unit_test(test_state_falls_with_the_ranks),
        cmocka_unit_test(test_bytes_are_those_of_the_plan),
        cmocka_unit_test(test_bf16),
        cmocka_unit_test(test_devices),
        cmocka_unit_test(test_ranks_without_tokens_on_devices),
        cmocka_unit_test(test_islands_never_take_nccl),
        cmocka_unit_test(test_cuda),
        cmocka_unit_test(test_a_rank_dies),
    };
    use_model_of_nccl();
    if (getenv("CADRE_TEST_FILTER")) /* on a device only test_cuda has anything of it */
        cmocka_set_test_filter(getenv("CADRE_TEST_FILTER"));
    return cmocka_run_group_tests(tests, NULL, NULL);
}
