/* Tokens that a device repeats from recordings have, to the last bit, the logits of those that are asked for kernel by kernel. On a
 * device, or a model of one. */
#include "infer/generate.h"

#include "base/random.h"
#include "parallel/repeats_testing.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <cmocka.h>

enum { CAPACITY = 530, PROMPT = 500, ALL_FAIL = 1 << 30 };

struct text_reader {
    struct model *model;
    struct generator *generator;
    float *logits; /* of all tokens that were read alone, [VOCAB] each */
    int count;
};

static int32_t token_at(int64_t position) {
    return (int32_t)(random_bits(3, 0, (uint64_t)position) % VOCAB);
}

static void open_reader(struct text_reader *t, const struct device *device, enum dtype compute, int64_t experts) {
    *t = (struct text_reader){.logits = malloc(sizeof *t->logits * VOCAB * 4 * CAPACITY)};
    t->model = small_model(device, compute, experts, CAPACITY, false, 5);
    assert_int_equal(generator_create(&t->generator, t->model, CAPACITY), STATUS_OK);
}

static void close_reader(struct text_reader *t) {
    generator_destroy(t->generator);
    model_destroy(t->model);
    free(t->logits);
}

/* Tokens of the text until it has `length`, all at once or one by one. */
static void read_until(struct text_reader *t, int64_t length, bool at_once) {
    int32_t tokens[CAPACITY];
    float *logits;
    for (int64_t i = 0; i < CAPACITY; i++)
        tokens[i] = token_at(i);
    int64_t begin = generator_length(t->generator);
    for (int64_t i = begin; i < length; i = generator_length(t->generator)) {
        assert_int_equal(generator_read(t->generator, tokens + i, at_once ? length - i : 1, &logits), STATUS_OK);
        if (at_once)
            continue;
        memcpy(t->logits + (int64_t)t->count++ * VOCAB, logits, VOCAB * sizeof *logits);
        assert_int_equal(generator_length(t->generator), i + 1);
    }
}

/* From nothing on; over a bound of keys, up to the capacity; again behind what is kept of it, and behind a prompt that takes more
 * scratch. */
static void read_all(struct text_reader *t) {
    read_until(t, 6, false);
    read_until(t, PROMPT, true);
    read_until(t, CAPACITY, false);
    generator_rewind(t->generator, 3);
    read_until(t, 8, false);
    read_until(t, 10, true);
    read_until(t, 12, false);
}

enum { ALONE = 6 + (CAPACITY - PROMPT) + 5 + 2 };

static double worst_error(const struct text_reader *a, const struct text_reader *b) {
    double worst = 0;
    assert_int_equal(a->count, b->count);
    for (int i = 0; i < a->count; i++) {
        double error = 0, norm = 0;
        for (int j = i * VOCAB; j < (i + 1) * VOCAB; j++) {
            error += pow((double)a->logits[j] - (double)b->logits[j], 2);
            norm += pow((double)b->logits[j], 2);
        }
        worst = fmax(worst, sqrt(error / norm));
    }
    return worst;
}

static void test_repeated_tokens_are_the_same(void **state) {
    (void)state;
    static const struct {
        enum dtype compute;
        int64_t experts;
    } runs[] = {{DTYPE_F32, 5}, {DTYPE_BF16, 5}, {DTYPE_BF16, 0}};
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        struct text_reader repeated, asked, plain, here;
        const struct device *device = watched();
        if (!device)
            skip();
        open_reader(&repeated, device, runs[i].compute, runs[i].experts);
        read_all(&repeated);
        assert_int_equal(repeated.count, ALONE);
        assert_int_equal(seen.begun, 2 + seen.out_of_date);
        assert_int_equal(seen.released, seen.out_of_date);
        assert_int_equal(seen.repeated, ALONE - 2); /* the first token of each bound */
        seen.failures = ALL_FAIL;
        open_reader(&asked, device, runs[i].compute, runs[i].experts);
        read_all(&asked);
        assert_int_equal(seen.repeated, ALONE - 2);
        assert_memory_equal(repeated.logits, asked.logits, ALONE * VOCAB * sizeof(float));
        int begun = seen.begun;
        open_reader(&plain, device, runs[i].compute, runs[i].experts);
        generator_set_repeats(plain.generator, false);
        read_all(&plain);
        assert_int_equal(seen.begun, begun);
        open_reader(&here, device_cpu(), runs[i].compute, runs[i].experts);
        read_all(&here);
        double bound = runs[i].compute == DTYPE_F32 ? 1e-5 : 0.03;
        assert_true(worst_error(&repeated, &plain) < bound);
        assert_true(worst_error(&repeated, &here) < bound);
        int released = seen.released;
        close_reader(&repeated);
        assert_int_equal(seen.released, released + 2);
        close_reader(&asked);
        close_reader(&plain);
        close_reader(&here);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_repeated_tokens_are_the_same),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
