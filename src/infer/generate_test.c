#include "infer/generate.h"

#include "base/random.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { VOCAB = 300, CAPACITY = 400 };

static struct model *make_model(int64_t experts, enum dtype compute) {
    struct model_config c;
    struct model *model;
    model_config_init(&c);
    c.vocab_size = VOCAB;
    c.hidden_size = 32;
    c.num_hidden_layers = 3;
    c.num_attention_heads = 4;
    c.num_key_value_heads = 2;
    c.intermediate_size = 48;
    c.moe_intermediate_size = 24;
    c.num_experts = experts;
    c.initializer_range = 0.2;
    const struct kernel_ops *ops;
    assert_int_equal(model_config_check(&c, "test"), STATUS_OK);
    assert_int_equal(kernels_choose("auto", &ops), STATUS_OK);
    struct model_options options = {ops, device_cpu(), compute, DTYPE_F32, CAPACITY, false, sharding_single()};
    assert_int_equal(model_create(&c, options, &model), STATUS_OK);
    assert_int_equal(model_initialize(model, 5), STATUS_OK);
    return model;
}

/* Logits of the last of `count` tokens with everything computed at once and no cache. */
static void logits_without_cache(const struct model *model, const int32_t *tokens, int64_t count, float *logits) {
    struct workspace *w;
    struct workspace_options options = {1, count, false, false};
    assert_int_equal(workspace_create(model, options, &w), STATUS_OK);
    memcpy(w->ids.data, tokens, (size_t)count * sizeof *tokens);
    model_embed_forward(model, w);
    for (int block = 0; block < w->block_count; block++)
        assert_int_equal(block_forward(model, w, block, NULL, false), STATUS_OK);
    model_logits(model, w, 1, tensor_2d(logits, DTYPE_F32, 1, VOCAB));
    workspace_destroy(w);
}

static double relative_error(const float *a, const float *b) {
    double error = 0, norm = 0;
    for (int i = 0; i < VOCAB; i++) {
        error += pow((double)a[i] - (double)b[i], 2);
        norm += pow((double)b[i], 2);
    }
    return sqrt(error / norm);
}

/* One by one, in uneven chunks, or past the size of a chunk: the cache changes nothing. */
static void test_cache_equals_recomputing(void **state) {
    (void)state;
    const int64_t cuts[] = {1, 1, 3, 1, 40, 2, 270, 1};
    for (int64_t experts = 0; experts <= 6; experts += 6) {
        struct model *model = make_model(experts, DTYPE_F32);
        struct generator *g;
        int32_t tokens[CAPACITY];
        float *logits, expected[VOCAB];
        for (int i = 0; i < CAPACITY; i++)
            tokens[i] = (int32_t)(random_bits(1, 1, (uint64_t)i) % VOCAB);
        assert_int_equal(generator_create(&g, model, CAPACITY), STATUS_OK);
        int64_t length = 0;
        for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
            assert_int_equal(generator_read(g, tokens + length, cuts[i], &logits), STATUS_OK);
            length += cuts[i];
            logits_without_cache(model, tokens, length, expected);
            double error = relative_error(logits, expected);
            if (!(error < 1e-5))
                fail_msg("%d experts, %d tokens: logits are off by %.3g", (int)experts, (int)length, error);
        }
        assert_int_equal(generator_length(g), length);
        assert_int_equal(generator_read(g, tokens, CAPACITY, &logits), STATUS_USAGE);
        generator_destroy(g);
        model_destroy(model);
    }
}

/* What was read and forgotten leaves nothing behind: not in front of a token, nor where others take its place. */
static void test_rewound_equals_never_read(void **state) {
    (void)state;
    struct model *model = make_model(6, DTYPE_F32);
    struct generator *g;
    const int32_t tokens[] = {1, 2, 3, 4, 5}, others[] = {6, 7, 8};
    float *logits, expected[VOCAB];
    assert_int_equal(generator_create(&g, model, CAPACITY), STATUS_OK);
    assert_int_equal(generator_read(g, tokens, 3, &logits), STATUS_OK);
    assert_int_equal(generator_read(g, others, 3, &logits), STATUS_OK);
    generator_rewind(g, 3);
    assert_int_equal(generator_length(g), 3);
    assert_int_equal(generator_read(g, tokens + 3, 2, &logits), STATUS_OK);
    logits_without_cache(model, tokens, 5, expected);
    assert_true(relative_error(logits, expected) < 1e-5);
    generator_rewind(g, 0);
    assert_int_equal(generator_read(g, others, 3, &logits), STATUS_OK);
    logits_without_cache(model, others, 3, expected);
    assert_true(relative_error(logits, expected) < 1e-5);
    generator_destroy(g);
    model_destroy(model);
}

static void test_bf16_is_close(void **state) {
    (void)state;
    struct model *exact = make_model(6, DTYPE_F32), *rounded = make_model(6, DTYPE_BF16);
    struct generator *g;
    int32_t tokens[] = {1, 2, 3, 4, 5, 6, 7};
    float *logits, expected[VOCAB];
    logits_without_cache(exact, tokens, 7, expected);
    assert_int_equal(generator_create(&g, rounded, CAPACITY), STATUS_OK);
    assert_int_equal(generator_read(g, tokens, 7, &logits), STATUS_OK);
    assert_true(relative_error(logits, expected) < 0.1);
    generator_destroy(g);
    model_destroy(exact);
    model_destroy(rounded);
}

static int32_t sample(double temperature, int top_k, double top_p, uint64_t position) {
    float logits[5] = {0, 3, NAN, 3, 1};
    struct sample_settings settings = {temperature, top_k, top_p, 9};
    return sample_token(&settings, logits, 5, position);
}

static void test_sampler(void **state) {
    (void)state;
    int counts[5] = {0};
    assert_int_equal(sample(0, 0, 1, 0), 1); /* the lower of two equal ones */
    for (uint64_t i = 0; i < 2000; i++) {
        assert_int_equal(sample(1, 1, 1, i), 1);
        assert_int_equal(sample(1, 0, 1e-9, i), 1);
        int32_t two = sample(1, 0, 0.6, i);
        assert_true(two == 1 || two == 3);
        counts[sample(1, 0, 1, i)]++;
        assert_int_equal(sample(1, 0, 1, i), sample(1, 0, 1, i));
    }
    double total = 2 * exp(3) + exp(1) + 1;
    assert_int_equal(counts[2], 0);
    assert_true(fabs(counts[1] / 2000.0 - exp(3) / total) < 0.04);
    assert_true(fabs(counts[4] / 2000.0 - exp(1) / total) < 0.03);
}

static void collect(void *context, const char *text, size_t size) {
    text_add(context, text, size);
}

static struct tokenizer *make_tokenizer(int vocab_size) {
    struct text_view corpus = {"the cat and the dog and the bird and the fish", 45};
    struct tokenizer *tokenizer;
    assert_int_equal(tokenizer_train(&corpus, 1, vocab_size, &tokenizer), STATUS_OK);
    return tokenizer;
}

static void test_same_seed_same_text(void **state) {
    (void)state;
    struct generation_result result;
    struct tokenizer *tokenizer = make_tokenizer(VOCAB);
    struct model *model = make_model(6, DTYPE_F32);
    struct generator *g;
    assert_int_equal(generator_create(&g, model, CAPACITY), STATUS_OK);
    struct text texts[3] = {{0}};
    for (int i = 0; i < 3; i++) {
        struct generation generation = {tokenizer, "the cat", 30, {1, 0, 1, i < 2 ? 4 : 5}, collect, &texts[i]};
        assert_int_equal(generator_run(g, &generation, &result), STATUS_OK);
        assert_true(result.new_tokens == 30 || result.reached_end);
    }
    assert_string_equal(text_string(&texts[0]), text_string(&texts[1]));
    assert_string_not_equal(text_string(&texts[0]), text_string(&texts[2]));
    for (int i = 0; i < 3; i++)
        text_release(&texts[i]);
    generator_destroy(g);
    model_destroy(model);
    tokenizer_destroy(tokenizer);
}

/* A model with more ids than its tokenizer has tokens: two that are none, one of which is always the likeliest by far. */
static void test_what_is_no_token_is_never_written(void **state) {
    (void)state;
    struct generation_result result;
    struct tokenizer *tokenizer = make_tokenizer(VOCAB - 20);
    assert_true(tokenizer_vocab_size(tokenizer) <= VOCAB - 2);
    struct model *model = make_model(6, DTYPE_F32);
    struct tensor head = model_tensor(model, model->own_weight, PARAMETER_HEAD, -1);
    int64_t width = head.shape[1];
    for (int64_t i = 0; i < width; i++) {
        ((float *)head.data)[(VOCAB - 2) * width + i] = 100;
        ((float *)head.data)[(VOCAB - 1) * width + i] = -100;
    }
    model_repack(model);
    struct generator *g;
    assert_int_equal(generator_create(&g, model, CAPACITY), STATUS_OK);
    for (int temperature = 0; temperature < 2; temperature++) {
        struct text text = {0};
        struct generation generation = {tokenizer, "the cat", 20, {temperature, 0, 1, 4}, collect, &text};
        assert_int_equal(generator_run(g, &generation, &result), STATUS_OK);
        assert_true(result.reached_end || text.size > 0);
        text_release(&text);
    }
    generator_destroy(g);
    model_destroy(model);
    tokenizer_destroy(tokenizer);
}

/* Weights that are no numbers give none: nothing is written, and it is said. */
static void test_no_numbers_no_text(void **state) {
    (void)state;
    struct generation_result result;
    struct tokenizer *tokenizer = make_tokenizer(VOCAB);
    struct model *model = make_model(6, DTYPE_F32);
    struct tensor head = model_tensor(model, model->own_weight, PARAMETER_HEAD, -1);
    for (int64_t i = 0; i < tensor_elements(head); i++)
        ((float *)head.data)[i] = NAN;
    model_repack(model);
    struct generator *g;
    assert_int_equal(generator_create(&g, model, CAPACITY), STATUS_OK);
    for (int temperature = 0; temperature < 2; temperature++) {
        struct text text = {0};
        struct generation generation = {tokenizer, "the cat", 20, {temperature, 0, 1, 4}, collect, &text};
        assert_int_equal(generator_run(g, &generation, &result), STATUS_FORMAT);
        assert_int_equal(text.size, 0);
        text_release(&text);
    }
    generator_destroy(g);
    model_destroy(model);
    tokenizer_destroy(tokenizer);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_cache_equals_recomputing),
                                       cmocka_unit_test(test_rewound_equals_never_read),
                                       cmocka_unit_test(test_bf16_is_close), cmocka_unit_test(test_sampler),
                                       cmocka_unit_test(test_same_seed_same_text),
                                       cmocka_unit_test(test_what_is_no_token_is_never_written),
                                       cmocka_unit_test(test_no_numbers_no_text)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
