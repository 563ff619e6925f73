/* The whole model's backward against central differences of its loss, in double precision, for every parameter. */
#include "model/block.h"

#include "base/random.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { BATCH = 2, LENGTH = 5, ROWS = BATCH * LENGTH, VOCAB = 23, SAMPLES = 12 };

static struct model_config small_config(int64_t experts, int64_t choices) {
    struct model_config c;
    model_config_init(&c);
    c.vocab_size = VOCAB;
    c.hidden_size = 12;
    c.num_hidden_layers = 2;
    c.num_attention_heads = 4;
    c.num_key_value_heads = 2;
    c.head_dim = 6;
    c.intermediate_size = 10;
    c.moe_intermediate_size = 7;
    c.num_experts = experts;
    c.num_experts_per_tok = choices;
    c.initializer_range = 0.3;
    c.router_aux_loss_coef = 0.5;
    c.router_z_loss_coef = 0.25;
    return c;
}

struct fixture {
    struct model *model;
    struct workspace *workspace;
};

static void fixture_init(struct fixture *f, struct model_config config, bool recompute) {
    assert_int_equal(model_config_check(&config, "test"), STATUS_OK);
    struct model_options options = {kernels_ref(), device_cpu(), DTYPE_F64, DTYPE_F64, LENGTH, true, sharding_single()};
    assert_int_equal(model_create(&config, options, &f->model), STATUS_OK);
    assert_int_equal(model_initialize(f->model, 7), STATUS_OK);
    struct workspace_options workspace = {BATCH, LENGTH, true, recompute};
    assert_int_equal(workspace_create(f->model, workspace, &f->workspace), STATUS_OK);
    for (int i = 0; i < f->model->table.count; i++) /* norms away from one */
        if (!f->model->table.rows[i].is_matrix)
            for (int64_t j = 0; j < tensor_elements(f->model->weight[i]); j++)
                ((double *)f->model->weight[i].data)[j] = 1 + 0.3 * random_normal(3, (uint64_t)i, (uint64_t)j);
    int32_t *ids = f->workspace->ids.data, *targets = f->workspace->targets.data;
    for (int i = 0; i < ROWS; i++) {
        ids[i] = (int32_t)(random_bits(1, 1, (uint64_t)i) % VOCAB);
        targets[i] = (int32_t)(random_bits(1, 2, (uint64_t)i) % VOCAB);
    }
    targets[3] = -1; /* a token without a target */
}

static void fixture_release(struct fixture *f) {
    workspace_destroy(f->workspace);
    model_destroy(f->model);
}

static void forward(struct fixture *f) {
    model_repack(f->model); /* the tests write weights directly */
    model_clear_sums(f->model, f->workspace);
    model_embed_forward(f->model, f->workspace);
    for (int block = 0; block < f->workspace->block_count; block++)
        assert_int_equal(block_forward(f->model, f->workspace, block, NULL, true), STATUS_OK);
}

static void backward(struct fixture *f) {
    struct loss_scales scales = model_loss_scales(f->model, ROWS, ROWS);
    memset(f->model->all_gradients.data, 0xFF, tensor_bytes(f->model->all_gradients)); /* NaN: what is not cleared is written */
    memset(f->model->cleared_gradients.data, 0, tensor_bytes(f->model->cleared_gradients));
    f->workspace->writes_gradients = true;
    forward(f);
    model_head(f->model, f->workspace, scales.token, true);
    for (int block = f->workspace->block_count - 1; block >= 0; block--) {
        if (f->workspace->options.recompute)
            assert_int_equal(block_recompute(f->model, f->workspace, block), STATUS_OK);
        assert_int_equal(block_combine_backward(f->model, f->workspace, block), STATUS_OK);
        assert_int_equal(block_experts_backward(f->model, f->workspace, block), STATUS_OK);
        assert_int_equal(block_dispatch_backward(f->model, f->workspace, block), STATUS_OK);
        block_route_backward(f->model, f->workspace, block, scales.router);
        block_attention_backward(f->model, f->workspace, block);
    }
    model_embed_backward(f->model, f->workspace);
}

/* The loss as the papers write it, from the statistics; the counts do not change under a small enough step. */
static double total_loss(struct fixture *f) {
    const struct model_config *c = &f->model->config;
    forward(f);
    model_head(f->model, f->workspace, 1, false);
    double loss = *(double *)f->workspace->loss_sum.data / ROWS, balance = 0, z = 0;
    for (int block = 0; block < f->workspace->block_count && c->num_experts > 0; block++) {
        const double *stats = f->workspace->stats[block].data;
        for (int64_t e = 0; e < c->num_experts; e++)
            balance += (double)c->num_experts * stats[2 + c->num_experts + e] / ROWS * stats[2 + e] / ROWS;
        z += stats[0] / ROWS;
    }
    double blocks = (double)c->num_hidden_layers;
    return loss + c->router_aux_loss_coef * balance / blocks + c->router_z_loss_coef * z / blocks;
}

/* Relative error of sampled elements of one parameter's gradient. */
static double gradient_error(struct fixture *f, int row) {
    double *weight = f->model->weight[row].data, *gradient = f->model->gradient[row].data;
    int64_t elements = tensor_elements(f->model->weight[row]);
    double error = 0, norm = 0, step = 1e-5;
    for (int s = 0; s < SAMPLES; s++) {
        int64_t i = (int64_t)(random_bits(5, (uint64_t)row, (uint64_t)s) % (uint64_t)elements);
        double kept = weight[i], difference;
        weight[i] = kept + step;
        difference = total_loss(f);
        weight[i] = kept - step;
        difference = (difference - total_loss(f)) / (2 * step);
        weight[i] = kept;
        error += (difference - gradient[i]) * (difference - gradient[i]);
        norm += difference * difference;
    }
    return norm > 0 ? sqrt(error / norm) : sqrt(error);
}

static void check_model(struct model_config config, bool recompute) {
    struct fixture f;
    fixture_init(&f, config, recompute);
    backward(&f);
    for (int row = 0; row < f.model->table.count; row++) {
        double error = gradient_error(&f, row);
        if (!(error < 1e-6))
            fail_msg("%s: gradient is off by %.3g", f.model->table.rows[row].name, error);
    }
    fixture_release(&f);
}

static void test_experts(void **state) {
    (void)state;
    for (int64_t choices = 1; choices <= 4; choices++)
        check_model(small_config(4, choices), false);
}

static void test_experts_without_normalised_weights(void **state) {
    (void)state;
    struct model_config c = small_config(5, 2);
    c.norm_topk_prob = false;
    check_model(c, false);
}

static void test_dense_and_tied(void **state) {
    (void)state;
    struct model_config c = small_config(0, 1);
    c.tie_word_embeddings = true;
    check_model(c, false);
}

static void test_recompute(void **state) {
    (void)state;
    check_model(small_config(4, 2), true);
    struct fixture kept, again;
    fixture_init(&kept, small_config(4, 2), false);
    fixture_init(&again, small_config(4, 2), true);
    backward(&kept);
    backward(&again);
    assert_memory_equal(kept.model->all_gradients.data, again.model->all_gradients.data,
                        tensor_bytes(kept.model->all_gradients));
    fixture_release(&kept);
    fixture_release(&again);
}

/* With every expert equal and the weights normalised, it does not matter who is chosen: the dense model. */
static void test_equal_experts_are_the_dense_model(void **state) {
    (void)state;
    struct model_config moe = small_config(4, 3), dense = small_config(0, 1);
    dense.intermediate_size = moe.moe_intermediate_size;
    struct fixture a, b;
    fixture_init(&a, moe, false);
    fixture_init(&b, dense, false);
    for (int i = 0; i < b.model->table.count; i++) {
        const struct parameter *row = &b.model->table.rows[i];
        struct tensor from = b.model->weight[i], to = model_tensor(a.model, a.model->weight, row->role, row->block);
        bool per_expert = row->role == PARAMETER_GATE || row->role == PARAMETER_UP || row->role == PARAMETER_DOWN;
        for (int64_t e = 0; e < (per_expert ? moe.num_experts : 1); e++)
            memcpy((per_expert ? tensor_slice(to, e) : to).data, from.data, tensor_bytes(from));
    }
    forward(&a);
    forward(&b);
    const double *x = a.workspace->x[2].data, *y = b.workspace->x[2].data;
    for (int64_t i = 0; i < tensor_elements(a.workspace->x[2]); i++)
        assert_true(fabs(x[i] - y[i]) <= 1e-12 * (1 + fabs(y[i])));
    fixture_release(&a);
    fixture_release(&b);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_experts),
        cmocka_unit_test(test_experts_without_normalised_weights),
        cmocka_unit_test(test_dense_and_tied),
        cmocka_unit_test(test_recompute),
        cmocka_unit_test(test_equal_experts_are_the_dense_model),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
