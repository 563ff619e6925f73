#include "parallel/layout_choice.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static struct layout_facts facts_of(int64_t width, int64_t blocks, int64_t experts, int64_t expert_width, int64_t tokens) {
    struct model_config c;
    struct parameter_table table;
    model_config_init(&c);
    c.vocab_size = 8192;
    c.hidden_size = width;
    c.num_hidden_layers = blocks;
    c.num_attention_heads = c.num_key_value_heads = 8;
    c.num_experts = experts;
    c.num_experts_per_tok = 2;
    c.moe_intermediate_size = expert_width;
    c.intermediate_size = 4 * width;
    assert_int_equal(model_config_check(&c, "test"), STATUS_OK);
    assert_int_equal(parameter_table_init(&table, &c), STATUS_OK);
    struct layout_facts facts = {.micro_batch_count = 1, .tokens = tokens, .gradient_bytes = 4};
    layout_facts_of_model(&facts, &table, &c, DTYPE_BF16);
    parameter_table_release(&table);
    return facts;
}

static void expect(struct layout_wishes wishes, struct layout_facts facts, int ranks, const char *line) {
    struct sharding sharding;
    char found[LAYOUT_LINE_BYTES];
    facts.ranks = ranks;
    if (layout_choose(&wishes, &facts, ranks - 1, &sharding) != STATUS_OK)
        fail_msg("%s", status_text());
    assert_string_equal(layout_describe(&sharding, found), line);
    assert_int_equal(mesh_rank(&sharding.mesh), ranks - 1);
    assert_int_equal(mesh_rank_count(&sharding.mesh), ranks);
}

static void expect_failure(struct layout_wishes wishes, struct layout_facts facts, int ranks, const char *line) {
    struct sharding sharding;
    facts.ranks = ranks;
    assert_int_equal(layout_choose(&wishes, &facts, 0, &sharding), STATUS_USAGE);
    assert_string_equal(status_text(), line);
}

static const struct layout_wishes nothing = {.zero = LAYOUT_ZERO_CHOOSE};

static void test_without_wishes(void **state) {
    (void)state;
    struct layout_facts small = facts_of(256, 4, 8, 256, 2048), dense = facts_of(512, 8, 0, 0, 8192);
    expect(nothing, small, 1, "1 rank");
    expect(nothing, small, 2, "2 ranks: replicate 1 x shard 2 x expert 1, ZeRO 2");
    expect(nothing, small, 7, "7 ranks: replicate 1 x shard 7 x expert 1, ZeRO 2");
    expect(nothing, dense, 8, "8 ranks: replicate 1 x shard 8 x expert 1, ZeRO 2");
    small.micro_batch_count = 4; /* gradients would travel four times */
    expect(nothing, small, 8, "8 ranks: replicate 1 x shard 8 x expert 1, ZeRO 1");
    dense.ranks_per_machine = 4;
    expect(nothing, dense, 8, "8 ranks: replicate 2 x shard 4 x expert 1, ZeRO 2");
    dense.ranks_per_machine = 1;
    expect(nothing, dense, 4, "4 ranks: replicate 1 x shard 4 x expert 1, ZeRO 2");
}

/* Large experts and few tokens a rank: the rows travel. As many ranks along expert as divide the experts. */
static void test_large_experts(void **state) {
    (void)state;
    struct layout_facts facts = facts_of(1024, 4, 24, 4096, 4096);
    expect(nothing, facts, 8, "8 ranks: replicate 1 x shard 1 x expert 8, ZeRO 2");
    expect(nothing, facts, 9, "9 ranks: replicate 1 x shard 3 x expert 3, ZeRO 2");
    expect((struct layout_wishes){.shard = 1, .replicate = 1, .zero = 3}, facts, 9,
           "9 ranks: replicate 1 x shard 1 x expert 9, ZeRO 3"); /* uneven, but nothing else is left */
}

/* The less memory, the higher the stage; where nothing fits, the least state. */
static void test_memory(void **state) {
    (void)state;
    struct layout_facts facts = facts_of(512, 8, 0, 0, 8192);
    facts.micro_batch_count = 4;
    double whole = 4 * (double)facts.dense_elements;
    facts.rank_memory_bytes = (int64_t)(2 * whole * 2.6);
    expect(nothing, facts, 4, "4 ranks: replicate 1 x shard 4 x expert 1, ZeRO 1");
    facts.rank_memory_bytes = (int64_t)(2 * whole * 1.8);
    expect(nothing, facts, 4, "4 ranks: replicate 1 x shard 4 x expert 1, ZeRO 2");
    facts.rank_memory_bytes = (int64_t)(2 * whole * 1.1);
    expect(nothing, facts, 4, "4 ranks: replicate 1 x shard 4 x expert 1, ZeRO 3");
    facts.rank_memory_bytes = 1;
    facts.ranks_per_machine = 2;
    expect(nothing, facts, 4, "4 ranks: replicate 1 x shard 4 x expert 1, ZeRO 3");
}

static void test_wishes(void **state) {
    (void)state;
    struct layout_facts facts = facts_of(256, 4, 8, 256, 2048), dense = facts_of(512, 8, 0, 0, 8192);
    expect((struct layout_wishes){2, 2, 2, 3}, facts, 8, "8 ranks: replicate 2 x shard 2 x expert 2, ZeRO 3");
    expect((struct layout_wishes){0, 0, 4, 1}, facts, 8, "8 ranks: replicate 1 x shard 2 x expert 4, ZeRO 1");
    expect((struct layout_wishes){0, 0, 3, 0}, facts, 3, "3 ranks: replicate 1 x shard 1 x expert 3, ZeRO 0");
    expect((struct layout_wishes){8, 0, 0, 0}, facts, 8, "8 ranks: replicate 8 x shard 1 x expert 1, ZeRO 0");
    expect_failure((struct layout_wishes){0, 3, 2, -1}, facts, 8,
                   "layout.shard 3 x layout.expert 2 = 6 ranks, but 8 were started; possible: --layout.shard 4 "
                   "--layout.expert 2, --layout.replicate 2 --layout.shard 2 --layout.expert 2, --layout.replicate 2 "
                   "--layout.shard 4, --layout.shard 2 --layout.expert 4");
    expect_failure((struct layout_wishes){0, 3, 0, -1}, facts, 4,
                   "layout.shard 3 does not divide the 4 ranks started; possible: --layout.shard 4, --layout.shard 2 "
                   "--layout.expert 2, --layout.replicate 2 --layout.shard 2, --layout.expert 4");
    expect_failure((struct layout_wishes){0, 0, 16, -1}, facts, 16,
                   "layout.expert 16, but the model has 8 experts; possible: --layout.shard 2 --layout.expert 8, "
                   "--layout.replicate 2 --layout.expert 8, --layout.shard 4 --layout.expert 4, --layout.replicate 2 "
                   "--layout.shard 2 --layout.expert 4");
    expect_failure((struct layout_wishes){0, 0, 2, -1}, dense, 2,
                   "layout.expert 2, but the model has no experts; possible: --layout.shard 2, --layout.replicate 2");
    expect_failure((struct layout_wishes){0, 2, 0, -1}, dense, 1,
                   "layout.shard 2 does not divide the 1 rank started; possible: --layout.shard 1");
    facts.batch_sequences = 4;
    expect_failure(nothing, facts, 8,
                   "train.batch_sequences 4 leaves some of 8 ranks without work; raise it to 8, or start 4");
}

/* Every combination of wishes gets a mesh that keeps to them, or a failure where there is none. */
static void test_every_wish(void **state) {
    (void)state;
    struct layout_facts facts = facts_of(256, 2, 6, 256, 2048);
    for (int ranks = 1; ranks <= 12; ranks++)
        for (int wish = 0; wish < 13 * 13 * 13; wish++) {
            struct layout_wishes w = {wish % 13, wish / 13 % 13, wish / 169, LAYOUT_ZERO_CHOOSE};
            struct sharding s;
            bool exists = false;
            for (int e = 1; e <= ranks && e <= 6; e++)
                for (int d = 1; d <= ranks; d++)
                    exists |= ranks % (e * d) == 0 && (w.expert == 0 || w.expert == e) && (w.shard == 0 || w.shard == d) &&
                              (w.replicate == 0 || w.replicate == ranks / (e * d));
            facts.ranks = ranks;
            bool chosen = layout_choose(&w, &facts, 0, &s) == STATUS_OK;
            assert_int_equal(chosen, exists);
            if (!chosen)
                continue;
            assert_int_equal(s.mesh.size[MESH_REPLICATE] * s.mesh.size[MESH_SHARD] * s.mesh.size[MESH_EXPERT], ranks);
            assert_true(w.replicate == 0 || w.replicate == s.mesh.size[MESH_REPLICATE]);
            assert_true(w.shard == 0 || w.shard == s.mesh.size[MESH_SHARD]);
            assert_true(w.expert == 0 || w.expert == s.mesh.size[MESH_EXPERT]);
            assert_in_range(s.zero, 0, 3);
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_without_wishes), cmocka_unit_test(test_large_experts), cmocka_unit_test(test_memory),
        cmocka_unit_test(test_wishes),         cmocka_unit_test(test_every_wish),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
