/* Sampling against the same choice among a list that is sorted whole. */
#include "infer/sample.h"

#include "base/random.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { COUNT = 200, POSITIONS = 50 };

static const float *sorted_logits;

static int by_logit_then_id(const void *a, const void *b) {
    int x = *(const int *)a, y = *(const int *)b;
    float left = sorted_logits[x], right = sorted_logits[y];
    return left != right ? (left > right ? -1 : 1) : x - y;
}

static int32_t sample_sorted(const struct sample_settings *s, const float *logits, int count, uint64_t position) {
    int id[COUNT], chosen = 0, kept = s->top_k > 0 && s->top_k < count ? s->top_k : count;
    double weight[COUNT], total = 0, sum = 0;
    for (int i = 0; i < count; i++)
        id[i] = i;
    sorted_logits = logits;
    qsort(id, (size_t)count, sizeof *id, by_logit_then_id);
    for (int i = 0; i < kept; i++)
        total += weight[i] = exp(((double)logits[id[i]] - (double)logits[id[0]]) / s->temperature);
    for (int i = 0; i < kept; i++) {
        sum += weight[i];
        if (s->top_p < 1 && sum >= s->top_p * total)
            kept = i + 1;
    }
    double left = random_uniform(s->seed, random_stream("sample"), position) * sum;
    while (chosen + 1 < kept && left >= weight[chosen])
        left -= weight[chosen++];
    return id[chosen];
}

/* Flat and peaked, with ties, and with fewer choices than any tree is deep. */
static void test_equals_sorting_all(void **state) {
    (void)state;
    const struct sample_settings settings[] = {{1, 0, 1, 2}, {0.3, 0, 0.95, 3}, {1, 7, 1, 4}, {2, 40, 0.5, 5},
                                               {1, COUNT, 0.999, 6}};
    const int counts[] = {1, 2, 3, 6, COUNT};
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
        for (size_t c = 0; c < sizeof counts / sizeof *counts; c++)
            for (uint64_t position = 0; position < POSITIONS; position++) {
                float logits[COUNT], given[COUNT];
                for (int k = 0; k < COUNT; k++)
                    logits[k] = (float)(round(8 * random_normal(1, position, (uint64_t)k)) / 4);
                memcpy(given, logits, sizeof given);
                assert_int_equal(sample_token(&settings[i], given, counts[c], position),
                                 sample_sorted(&settings[i], logits, counts[c], position));
            }
}

static void test_nothing_finite_is_the_first(void **state) {
    (void)state;
    const struct sample_settings all = {1, 0, 1, 2}, likely = {1, 0, 0.9, 2};
    float logits[3] = {NAN, INFINITY, -INFINITY};
    assert_int_equal(sample_token(&all, logits, 3, 0), 0);
    assert_int_equal(sample_token(&likely, logits, 3, 0), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_equals_sorting_all),
                                       cmocka_unit_test(test_nothing_finite_is_the_first)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
