/* sum_boxes of every backend against the sum written element by element, over odd boxes, dtypes and counts of terms; any
 * number of threads gives the same bits; nothing beside the box changes. */
#include "base/threads.h"
#include "kernels/kernels_testing.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

enum { TERMS_MAX = 9 };

static const enum dtype dtypes[] = {DTYPE_F32, DTYPE_BF16, DTYPE_F64};

struct box_case {
    int64_t count[3], before[3], after[3]; /* elements of the tensors around the box */
    int term_count;
    enum dtype term, to;
    bool accumulate, over; /* over: `to` is the first term */
};

static struct tensor around(const struct box_case *c, enum dtype dtype, int pad) {
    int64_t shape[3];
    for (int dim = 0; dim < 3; dim++)
        shape[dim] = c->count[dim] + (pad ? c->before[dim] + c->after[dim] : 0);
    return tensor_3d(NULL, dtype, shape[0], shape[1], shape[2]);
}

static int64_t index_in(struct box box, int64_t i, int64_t j, int64_t k) {
    return ((box.first[0] + i) * box.tensor.shape[1] + box.first[1] + j) * box.tensor.shape[2] + box.first[2] + k;
}

/* Elements of `to` that are not what they should be. */
static int64_t count_wrong(const struct box_case *c, const struct box *terms, struct box start, struct box to) {
    int64_t wrong = 0;
    double tolerance = c->to == DTYPE_BF16 ? 8e-3 : c->to == DTYPE_F64 && c->term == DTYPE_F64 ? 1e-14 : 2e-6;
    for (int64_t i = 0; i < to.tensor.shape[0]; i++)
        for (int64_t j = 0; j < to.tensor.shape[1]; j++)
            for (int64_t k = 0; k < to.tensor.shape[2]; k++) {
                int64_t flat = (i * to.tensor.shape[1] + j) * to.tensor.shape[2] + k;
                int64_t x = i - to.first[0], y = j - to.first[1], z = k - to.first[2];
                bool inside = x >= 0 && y >= 0 && z >= 0 && x < c->count[0] && y < c->count[1] && z < c->count[2];
                double found = test_get(to.tensor, flat), before = test_get(start.tensor, flat);
                double sum = c->accumulate ? before : 0, scale = fabs(sum) + 1e-3;
                for (int t = 0; inside && t < c->term_count; t++) {
                    double term = test_get(terms[t].tensor, index_in(terms[t], x, y, z));
                    sum += term;
                    scale += fabs(term);
                }
                bool exact = !inside || (c->term_count == 1 && !c->accumulate && c->to == c->term);
                wrong += exact ? found != (inside ? sum : before) : !(fabs(found - sum) <= tolerance * scale);
            }
    return wrong;
}

static void run_case(const struct kernel_ops *ops, const struct box_case *c) {
    struct box terms[TERMS_MAX], start, first = {tensor_none(), {0}};
    for (int t = 0; t < c->term_count; t++) {
        enum dtype dtype = t == 1 ? DTYPE_F32 : c->term; /* one of another dtype among them */
        terms[t] = (struct box){test_random(around(c, dtype, t % 2), 1), {0}};
        if (t % 2)
            memcpy(terms[t].first, c->before, sizeof c->before);
    }
    start = (struct box){test_random(around(c, c->to, !c->over), 1), {0}};
    if (c->over)
        start.tensor = terms[0].tensor;
    else
        memcpy(start.first, c->before, sizeof c->before);
    if (!test_knows(ops, c->term) || !test_knows(ops, c->to))
        return;
    for (int threads = 1; threads <= test_repetitions(ops, 4); threads++) {
        struct box to = start, operands[TERMS_MAX];
        to.tensor = test_copy(start.tensor, c->to);
        memcpy(operands, terms, sizeof terms);
        if (c->over)
            operands[0] = to;
        threads_set_count(threads);
        ops->sum_boxes(operands, c->term_count, c->count, to, c->accumulate);
        assert_true(test_guards_hold());
        if (threads == 1) {
            first = to;
            assert_int_equal(count_wrong(c, terms, start, to), 0);
        }
        assert_memory_equal(first.tensor.data, to.tensor.data, tensor_bytes(to.tensor));
    }
    test_release();
}

static const int64_t counts[][3] = {{1, 1, 1},    {3, 5, 7},   {2, 3, 64},  {5, 1, 17},     {1, 1, 40001}, {4, 33, 127},
                                    {7, 57, 65}, {0, 3, 4},   {3, 0, 4},   {3, 4, 0},      {129, 2, 31},  {2, 3, 20000}};
static const int64_t margins[][2][3] = {{{0, 0, 0}, {0, 0, 0}}, {{1, 0, 0}, {2, 0, 0}}, {{0, 1, 0}, {0, 2, 0}},
                                        {{0, 0, 3}, {0, 0, 1}}, {{1, 2, 3}, {3, 2, 1}}};
static const int term_counts[] = {1, 2, 3, 8};

#define COUNT(array) (sizeof(array) / sizeof *(array))

static void run_backend(const struct kernel_ops *ops) {
    size_t serial = 0;
    for (size_t n = 0; n < COUNT(counts); n++)
        for (size_t t = 0; t < COUNT(term_counts); t++)
            for (size_t d = 0; d < 9; d++, serial++) {
                struct box_case c = {.term_count = term_counts[t], .term = dtypes[d / 3], .to = dtypes[d % 3],
                                     .accumulate = serial % 2, .over = serial % 3 != 0 && d / 3 == d % 3};
                size_t m = serial % COUNT(margins);
                if (serial % 12 && counts[n][0] * counts[n][1] * counts[n][2] > 10000)
                    continue; /* the large ones are slow in the reference */
                memcpy(c.count, counts[n], sizeof c.count);
                memcpy(c.before, margins[(m + n) % COUNT(margins)][0], sizeof c.before);
                memcpy(c.after, margins[(m + n) % COUNT(margins)][1], sizeof c.after);
                run_case(ops, &c);
            }
}

static void test_every_backend(void **state) {
    (void)state;
    for (const struct kernel_ops *const *ops = test_backends(); *ops; ops++)
        run_backend(*ops);
}

/* A copy moves bits: NaN, infinities and signed zeros arrive as they are. */
static void test_special_numbers(void **state) {
    (void)state;
    for (const struct kernel_ops *const *each = test_backends(); *each; each++) {
        const struct kernel_ops *ops = *each;
        static const float special[] = {NAN, INFINITY, -INFINITY, -0.0f, 0.0f, 1e-42f, 3.4e38f, -1.0f};
        struct box from = {test_numbers(special, DTYPE_F32, 8), {0}}, to = {test_tensor(from.tensor), {0}};
        struct box narrow = {test_tensor(tensor_1d(NULL, DTYPE_BF16, 8)), {0}};
        const float *copy = to.tensor.data;
        const uint16_t *half = narrow.tensor.data;
        const int64_t count[3] = {8, 1, 1};
        ops->sum_boxes(&from, 1, count, to, false);
        assert_memory_equal(special + 1, copy + 1, 7 * sizeof *copy);
        assert_true(isnan(copy[0]));
        ops->sum_boxes(&from, 1, count, narrow, false);
        for (int i = 1; i < 8; i++)
            assert_int_equal(half[i], float_to_bf16(special[i]));
        assert_true(isnan(bf16_to_float(half[0])));
        test_release();
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_every_backend), cmocka_unit_test(test_special_numbers)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
