/* Costs of reading and writing against counts by hand: D=8, H=4, G=2, P=6, E=4, K=2, F=10, I=12, V=31, L=3. */
#include "infer/token_cost.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <cmocka.h>

enum { CONTEXT = 5 };

static struct model_config config_of(int64_t experts, bool tied) {
    struct model_config c;
    model_config_init(&c);
    c.vocab_size = 31;
    c.hidden_size = 8;
    c.num_hidden_layers = 3;
    c.num_attention_heads = 4;
    c.num_key_value_heads = 2;
    c.head_dim = 6;
    c.num_experts = experts;
    c.num_experts_per_tok = 2;
    c.intermediate_size = 12;
    c.moe_intermediate_size = 10;
    c.tie_word_embeddings = tied;
    assert_int_equal(model_config_check(&c, "test"), STATUS_OK);
    return c;
}

/* Of the reference's packed weights, which are as large as the matrices. */
static double bytes_of(int64_t experts, bool tied, enum dtype compute) {
    struct model_config c = config_of(experts, tied);
    struct model *model;
    struct model_options options = {kernels_ref(), device_cpu(), compute, DTYPE_F32, CONTEXT + 1, false, sharding_single()};
    assert_int_equal(model_create_shapes(&c, options, &model), STATUS_OK);
    double bytes = token_bytes(model, CONTEXT);
    model_destroy(model);
    return bytes;
}

static void test_bytes_counted_by_hand(void **state) {
    (void)state;
    const double attention = 2 * 8 * 24 + 2 * 8 * 12, norms = 2 * 8 + 2 * 6, router = 4 * 8, head = 8 * 31;
    const double cache = 3 * 2 * 2 * 6 * CONTEXT, experts = 2 * 3 * 8 * 10, dense = 3 * 8 * 12;
    const double outside = 4 * (8 + 8); /* a row of the embedding, the last norm */
    for (int tied = 0; tied < 2; tied++) {
        assert_true(bytes_of(4, tied, DTYPE_F32) == 4 * (3 * (attention + norms + router + experts) + head + cache) + outside);
        assert_true(bytes_of(4, tied, DTYPE_BF16) ==
                    2 * (3 * (attention + experts) + head + cache) + 4 * 3 * (norms + router) + outside);
        assert_true(bytes_of(0, tied, DTYPE_F32) == 4 * (3 * (attention + norms + dense) + head + cache) + outside);
    }
}

static void test_operations_counted_by_hand(void **state) {
    (void)state;
    const double weights = 2 * 8 * 24 + 2 * 8 * 12 + 4 * 8 + 2 * 3 * 8 * 10, count = 7;
    struct model_config c = config_of(4, false);
    /* Each token's query meets half of the keys: two products of H P numbers each. */
    double attention = 2 * 2 * 24 * count / 2;
    assert_true(prompt_operations(&c, 7) == count * 3 * (2 * weights + attention) + 2 * 8 * 31);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_bytes_counted_by_hand),
                                       cmocka_unit_test(test_operations_counted_by_hand)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
