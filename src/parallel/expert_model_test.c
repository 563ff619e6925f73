/* A whole model's gradient in double precision, experts and sequences divided over ranks that are threads, against one
 * process with all of them: attention, routing, the losses of the router, exchange in one round and in several. */
#include "parallel/balance.h"
#include "parallel/expert_parallel.h"

#include "base/random.h"
#include "base/threads.h"
#include "comm/threads/comm_threads.h"
#include "model/block.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { LENGTH = 5, VOCAB = 23, RANKS_MAX = 6, MICRO_BATCHES = 2, SEQUENCES = 5, BLOCKS = 2 };

struct job {
    int ranks;
    int64_t experts, choices;
    bool recompute, local; /* local: without struct expert_parallel, one rank */
    int64_t limit_bytes;
    struct model *model[RANKS_MAX]; /* with the gradients of the step */
    double loss[RANKS_MAX];
    int rounds[RANKS_MAX]; /* the most of any exchange */
};

static struct model_config config_of(const struct job *job) {
    struct model_config c;
    model_config_init(&c);
    c.vocab_size = VOCAB;
    c.hidden_size = 12;
    c.num_hidden_layers = BLOCKS;
    c.num_attention_heads = 4;
    c.num_key_value_heads = 2;
    c.head_dim = 6;
    c.moe_intermediate_size = 7;
    c.num_experts = job->experts;
    c.num_experts_per_tok = job->choices;
    c.initializer_range = 0.3;
    c.router_aux_loss_coef = 0.5;
    c.router_z_loss_coef = 0.25;
    assert_int_equal(model_config_check(&c, "test"), STATUS_OK);
    return c;
}

struct member {
    struct job *job;
    struct comm *comm;
    struct model *model;
    struct workspace *workspace;
    struct expert_parallel *exchange;
    struct balance balance;
};

static enum status member_open(struct member *m) {
    const struct job *job = m->job;
    const int size[MESH_AXIS_COUNT] = {1, 1, 1, job->ranks};
    struct model_config c = config_of(job);
    struct model_options options = {kernels_ref(), device_cpu(), DTYPE_F64, DTYPE_F64, LENGTH, true,
                                    {mesh_make(size, m->comm->rank), 0}};
    struct workspace_options shape = {SEQUENCES, LENGTH, true, job->recompute};
    TRY(model_create(&c, options, &m->model));
    TRY(model_initialize(m->model, 7));
    if (job->local) {
        TRY(workspace_create(m->model, shape, &m->workspace));
        return balance_init(&m->balance, m->model, m->workspace, m->comm);
    }
    struct expert_parallel_options exchange = {
        m->comm,   device_cpu(), m->model->context, SEQUENCES * LENGTH, c.hidden_size, c.moe_intermediate_size, c.num_experts,
        c.num_experts_per_tok, job->recompute ? 1 : BLOCKS, true, job->limit_bytes};
    TRY(expert_parallel_create(&exchange, &m->exchange));
    TRY(workspace_create_exchanging(m->model, shape, expert_parallel_ops(), m->exchange, &m->workspace));
    return balance_init(&m->balance, m->model, m->workspace, m->comm);
}

static void member_close(struct member *m) {
    balance_release(&m->balance);
    workspace_destroy(m->workspace);
    expert_parallel_destroy(m->exchange);
    m->job->model[m->comm->rank] = m->model;
}

/* This rank's sequences of a micro-batch; some ranks have none where there are more of them than sequences. */
static void load(struct member *m, int micro_batch) {
    struct workspace *w = m->workspace;
    struct range mine = range_part(SEQUENCES, m->job->ranks, m->comm->rank);
    workspace_shape(w, m->model, range_count(mine), LENGTH);
    int32_t *ids = w->ids.data, *targets = w->targets.data;
    for (int64_t i = 0; i < range_count(mine) * LENGTH; i++) {
        uint64_t token = (uint64_t)((micro_batch * SEQUENCES + mine.begin) * LENGTH + i);
        ids[i] = (int32_t)(random_bits(1, 1, token) % VOCAB);
        targets[i] = (int32_t)(random_bits(1, 2, token) % VOCAB);
    }
}

static enum status forward(struct member *m) {
    struct workspace *w = m->workspace;
    model_embed_forward(m->model, w);
    for (int block = 0; block < BLOCKS; block++) {
        block_attention_forward(m->model, w, block, NULL);
        TRY(block_route_forward(m->model, w, block, true));
        TRY(balance_start(&m->balance, w, block));
        TRY(block_dispatch(m->model, w, block));
        TRY(block_experts_forward(m->model, w, block));
        TRY(block_combine(m->model, w, block));
        int *most = &m->job->rounds[m->comm->rank];
        *most = w->blocks[block].rounds > *most ? w->blocks[block].rounds : *most;
    }
    return STATUS_OK;
}

static enum status backward(struct member *m, int micro_batch) {
    struct workspace *w = m->workspace;
    int64_t tokens = SEQUENCES * LENGTH;
    struct loss_scales scales = model_loss_scales(m->model, tokens * MICRO_BATCHES, tokens * (micro_batch + 1));
    model_head(m->model, w, scales.token, true);
    for (int block = BLOCKS - 1; block >= 0; block--) {
        if (m->job->recompute)
            TRY(block_recompute(m->model, w, block));
        TRY(block_combine_backward(m->model, w, block));
        TRY(block_experts_backward(m->model, w, block));
        TRY(block_dispatch_backward(m->model, w, block));
        TRY(balance_finish(&m->balance, m->model, w, block));
        block_route_backward(m->model, w, block, scales.router);
        block_attention_backward(m->model, w, block);
    }
    model_embed_backward(m->model, w);
    return STATUS_OK;
}

static enum status step(struct member *m) {
    TRY(member_open(m));
    m->model->context.ops->fill(m->model->all_gradients, NAN);
    m->model->context.ops->fill(m->model->cleared_gradients, 0);
    model_clear_sums(m->model, m->workspace);
    for (int micro_batch = 0; micro_batch < MICRO_BATCHES; micro_batch++) {
        load(m, micro_batch);
        m->workspace->writes_gradients = micro_batch == 0;
        TRY(forward(m));
        TRY(backward(m, micro_batch));
    }
    m->job->loss[m->comm->rank] = *(const double *)m->workspace->loss_sum.data;
    return STATUS_OK;
}

static enum status run_rank(void *context, struct comm *comm) {
    struct member member = {.job = context, .comm = comm};
    enum status status = step(&member);
    member_close(&member);
    return status;
}

static void run(struct job *job) {
    if (comm_threads_run(job->ranks, run_rank, job) != STATUS_OK)
        fail_msg("%d ranks: %s", job->ranks, status_text());
}

static void job_release(struct job *job) {
    for (int r = 0; r < job->ranks; r++)
        model_destroy(job->model[r]);
}

/* The sum over the ranks of element i of a row's gradient; of the owner alone for an expert's. */
static double gradient_at(const struct job *job, int row, bool is_expert, int64_t i) {
    const double *own;
    double sum = 0;
    for (int r = 0; r < job->ranks && !is_expert; r++) {
        own = job->model[r]->gradient[row].data;
        sum += own[i];
    }
    for (int r = 0; r < job->ranks && is_expert; r++) {
        struct tensor part = job->model[r]->gradient[row];
        own = part.data;
        if (i < tensor_elements(part))
            return own[i];
        i -= tensor_elements(part);
    }
    return sum;
}

static void expect_same(const struct job *job, const struct job *one, double tolerance) {
    const struct parameter_table *table = &one->model[0]->table;
    double loss = 0;
    for (int row = 0; row < table->count; row++) {
        enum parameter_role role = table->rows[row].role;
        bool is_expert = role == PARAMETER_GATE || role == PARAMETER_UP || role == PARAMETER_DOWN;
        const double *expected = one->model[0]->gradient[row].data;
        double error = 0, norm = 0;
        for (int64_t i = 0; i < tensor_elements(one->model[0]->gradient[row]); i++) {
            double difference = gradient_at(job, row, is_expert, i) - expected[i];
            error += difference * difference;
            norm += expected[i] * expected[i];
        }
        if (!(sqrt(error) <= tolerance * sqrt(norm)))
            fail_msg("%d ranks, %d of %d experts, limit %d, recompute %d: %s is off by %.3g", job->ranks, (int)job->choices,
                     (int)job->experts, (int)job->limit_bytes, job->recompute, table->rows[row].name, sqrt(error / norm));
    }
    for (int r = 0; r < job->ranks; r++)
        loss += job->loss[r];
    assert_true(fabs(loss - one->loss[0]) <= 1e-12 * one->loss[0]);
}

static void check(int64_t experts, int64_t choices, bool recompute, int64_t limit_bytes) {
    struct job one = {.ranks = 1, .experts = experts, .choices = choices, .local = true};
    run(&one);
    for (int ranks = 1; ranks <= RANKS_MAX; ranks++) {
        struct job job = {.ranks = ranks, .experts = experts, .choices = choices, .recompute = recompute,
                          .limit_bytes = limit_bytes};
        run(&job);
        for (int r = 0; r < ranks; r++) /* also those that have no token */
            assert_true(job.rounds[r] == job.rounds[0] && (job.rounds[r] > 1) == (limit_bytes > 0));
        expect_same(&job, &one, 1e-11);
        job_release(&job);
    }
    job_release(&one);
}

static void test_ranks(void **state) {
    (void)state;
    check(6, 2, false, 0);
    check(5, 3, false, 0);
    check(4, 4, false, 0);
    check(1, 1, false, 0);
}

static void test_recompute(void **state) {
    (void)state;
    check(6, 2, true, 0);
}

static void test_rounds(void **state) {
    (void)state;
    check(6, 2, false, 1000);
    check(5, 3, true, 1500);
}

/* Shares of experts are taken of the tokens so far, means over the tokens of the step. */
static void test_scales(void **state) {
    (void)state;
    struct job one = {.ranks = 1, .experts = 4, .choices = 1, .local = true};
    run(&one);
    struct model *m = one.model[0];
    struct loss_scales whole = model_loss_scales(m, 100, 100), half = model_loss_scales(m, 100, 50);
    assert_true(half.router.balance_scale == 2 * whole.router.balance_scale);
    assert_true(half.router.z_scale == whole.router.z_scale && half.token == whole.token);
    assert_true(model_loss_scales(m, 100, 0).router.balance_scale == 0);
    job_release(&one);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ranks),
        cmocka_unit_test(test_recompute),
        cmocka_unit_test(test_rounds),
        cmocka_unit_test(test_scales),
    };
    threads_set_count(1);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
