/* Products large enough to cross every cut: several blocks of k, of rows and of columns, several tasks and tiles.
 * kernels_test.c has the small and odd shapes; here one call of each kind is compared with the reference in double.
 */
#include "base/threads.h"
#include "kernels/kernels_testing.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <cmocka.h>

enum { EXPERTS = 4, ROWS = 430, WIDE = 1100, NARROW = 290, THREADS_MAX = 4, OPERANDS_MAX = 5 };

static const enum dtype input_dtypes[] = {DTYPE_F32, DTYPE_BF16, DTYPE_BF16};
static const enum dtype output_dtypes[] = {DTYPE_F32, DTYPE_F32, DTYPE_BF16};
enum { DTYPES = 3 };

/* A call: its operands, the last of them is the result. */
struct product {
    struct tensor t[OPERANDS_MAX];
    int count;
    bool transpose_a, transpose_b, accumulate;
    void (*make)(const struct kernel_ops *ops, const struct product *product, const struct tensor *t);
};

/* One expert with more rows than a task takes, one with none, a middle one, one with few. */
static struct tensor make_offsets(void) {
    static const int32_t offset[EXPERTS + 1] = {0, 395, 395, 425, ROWS};
    struct tensor t = test_filled(tensor_1d(NULL, DTYPE_I32, EXPERTS + 1), 0);
    memcpy(t.data, offset, sizeof offset);
    return t;
}

static struct tensor in_f64(struct tensor t) {
    return tensor_exists(t) ? test_copy(t, DTYPE_F64) : t;
}

static void check_close(struct tensor found, struct tensor expected, double bound) {
    double error = 0, norm = 0;
    for (int64_t i = 0; i < tensor_elements(found); i++) {
        double difference = test_get(found, i) - test_get(expected, i);
        error += difference * difference;
        norm += test_get(expected, i) * test_get(expected, i);
    }
    if (!(error <= bound * bound * norm))
        fail_msg("relative error %g, allowed %g", sqrt(error / norm), bound);
}

/* The result of one call on a fresh copy of the result's first numbers. */
static struct tensor make_product(const struct kernel_ops *ops, const struct product *product, int threads) {
    int last = product->count - 1;
    struct tensor t[OPERANDS_MAX];
    memcpy(t, product->t, sizeof t);
    t[last] = test_copy(t[last], t[last].dtype);
    threads_set_count(threads);
    product->make(ops, product, t);
    return t[last];
}

static void run_backend(const struct kernel_ops *ops, const struct product *product, struct tensor expected) {
    struct tensor first = make_product(ops, product, 1);
    check_close(first, expected, first.dtype == DTYPE_BF16 ? 4e-3 : 2e-6);
    size_t scratch_bytes = kernels_scratch_bytes();
    for (int threads = 1; threads <= test_repetitions(ops, THREADS_MAX); threads += TEST_THREADS_STEP) {
        struct tensor again = make_product(ops, product, threads);
        assert_memory_equal(first.data, again.data, tensor_bytes(first));
        if (threads == 1) /* less, where threads of an earlier pool have ended meanwhile */
            assert_true(kernels_scratch_bytes() <= scratch_bytes);
    }
    assert_true(test_guards_hold());
}

/* Every backend against the reference in double; gives all memory back. */
static void run(struct product *product) {
    static int64_t number;
    struct product exact = *product;
    for (int i = 0; i < product->count; i++)
        exact.t[i] = in_f64(product->t[i]);
    struct tensor expected = make_product(kernels_ref(), &exact, THREADS_MAX);
    for (const struct kernel_ops *const *ops = test_backends(); *ops; ops++)
        if (strcmp((*ops)->name, "ref") != 0 && test_takes(*ops, number))
            run_backend(*ops, product, expected);
    number++;
    test_release();
}

static struct tensor random_2d(enum dtype dtype, int64_t rows, int64_t columns) {
    return test_random(tensor_2d(NULL, dtype, rows, columns), 1);
}

/* ---- cases ---- */

static void make_forward(const struct kernel_ops *ops, const struct product *product, const struct tensor *t) {
    ops->product_forward(t[0], t[1], t[2], test_packed_as(ops, t[3], t[0].dtype, false), t[4], product->accumulate);
}

static void make_backward_input(const struct kernel_ops *ops, const struct product *product, const struct tensor *t) {
    ops->product_backward_input(t[0], t[1], t[2], test_packed_as(ops, t[3], t[0].dtype, true), t[4], product->accumulate);
}

/* Forward through weights that are packed for both directions. */
static void make_forward_of_both(const struct kernel_ops *ops, const struct product *product, const struct tensor *t) {
    ops->product_forward(t[0], t[1], t[2], test_packed_as(ops, t[3], t[0].dtype, true), t[4], product->accumulate);
}

static void make_backward_weight(const struct kernel_ops *ops, const struct product *product, const struct tensor *t) {
    ops->product_backward_weight(t[0], tensor_none(), t[1], t[2], t[3], t[4], product->accumulate);
}

static void make_gemm(const struct kernel_ops *ops, const struct product *product, const struct tensor *t) {
    ops->gemm(t[0], product->transpose_a, t[1], product->transpose_b, t[2], product->accumulate);
}

/* k above the longest packed block, rows and columns above those of one task. */
static void test_forward(void **state) {
    (void)state;
    for (int d = 0; d < DTYPES; d++) {
        enum dtype in = input_dtypes[d];
        run(&(struct product){{random_2d(in, ROWS / 2, WIDE), test_indices(tensor_1d(NULL, DTYPE_I32, ROWS), ROWS / 2),
                               make_offsets(), test_random(tensor_3d(NULL, in, EXPERTS, NARROW, WIDE), 1),
                               random_2d(output_dtypes[d], ROWS, NARROW)},
                              .count = 5,
                              .make = make_forward});
    }
}

static void test_backward_input(void **state) {
    (void)state;
    for (int d = 0; d < DTYPES; d++) {
        enum dtype in = input_dtypes[d];
        run(&(struct product){{random_2d(in, ROWS, WIDE), tensor_none(), make_offsets(),
                               test_random(tensor_3d(NULL, in, EXPERTS, WIDE, NARROW), 1),
                               random_2d(output_dtypes[d], ROWS, NARROW)},
                              .count = 5,
                              .accumulate = d != 1,
                              .make = make_backward_input});
    }
}

/* Weights in f32 whose sides are whole squares, as models have them: packed at once in both arrangements, past the caches where
 * there are many. Their values are bf16, so that rounding them changes nothing. */
static void case_squares(int64_t out, int64_t in, int d) {
    enum dtype dtype = input_dtypes[d];
    for (int direction = 0; direction < 3; direction++) {
        int64_t k = direction == 2 ? out : in, columns = direction == 2 ? in : out;
        struct tensor w = test_copy(test_random(tensor_3d(NULL, DTYPE_BF16, EXPERTS, out, in), 1), DTYPE_F32);
        run(&(struct product){{random_2d(dtype, ROWS, k), tensor_none(), make_offsets(), w,
                               random_2d(output_dtypes[d], ROWS, columns)},
                              .count = 5,
                              .accumulate = direction > 0,
                              .make = direction == 0   ? make_forward
                                      : direction == 1 ? make_forward_of_both
                                                       : make_backward_input});
    }
}

static void test_squares(void **state) {
    (void)state;
    for (int d = 0; d < DTYPES; d++) {
        case_squares(96, 64, d);
        case_squares(1088, 288, d);
    }
}

static struct product backward_weight(enum dtype in, bool accumulate) {
    struct tensor like = tensor_3d(NULL, DTYPE_F32, EXPERTS, NARROW, NARROW + 9);
    return (struct product){{random_2d(in, ROWS, NARROW), random_2d(in, ROWS / 2, NARROW + 9),
                             test_indices(tensor_1d(NULL, DTYPE_I32, ROWS), ROWS / 2), make_offsets(),
                             accumulate ? test_random(like, 1) : test_tensor(like)},
                            .count = 5,
                            .accumulate = accumulate,
                            .make = make_backward_weight};
}

/* More rows than one packed block sums over; added to numbers, and written over what is none. */
static void test_backward_weight(void **state) {
    (void)state;
    for (int d = 0; d < 2; d++)
        for (int accumulate = 0; accumulate < 2; accumulate++) {
            struct product product = backward_weight(input_dtypes[d], accumulate);
            run(&product);
        }
}

/* What is written is what is added to zeros. */
static void test_backward_weight_from_nothing(void **state) {
    (void)state;
    for (const struct kernel_ops *const *ops = test_backends(); *ops; ops++)
        for (int d = 0; d < 2; d++) {
            struct product product = backward_weight(input_dtypes[d], false);
            struct tensor written = make_product(*ops, &product, THREADS_MAX), added;
            product.accumulate = true;
            (*ops)->fill(product.t[4], 0);
            added = make_product(*ops, &product, THREADS_MAX);
            for (int64_t i = 0; i < tensor_elements(added); i++)
                assert_true(test_get(written, i) == test_get(added, i));
            test_release();
        }
}

/* A gradient large enough to go past the caches where its rows are aligned, in groups of few rows and of many: the same bits as at
 * an address where it may not, zeros for the group without rows, and nothing behind it. */
static void case_large_gradient(enum dtype in, int threads) {
    enum { OUT = 600, IN = 448, ALIGNMENT = 64, BEHIND = 16 };
    struct tensor like = tensor_3d(NULL, DTYPE_F32, EXPERTS, OUT, IN);
    struct tensor dy = random_2d(in, ROWS, OUT), x = random_2d(in, ROWS / 2, IN);
    struct tensor rows = test_indices(tensor_1d(NULL, DTYPE_I32, ROWS), ROWS / 2), offsets = make_offsets();
    size_t count = (size_t)tensor_elements(like), numbers = count + BEHIND + ALIGNMENT;
    float *memory[2] = {memory_must(numbers, sizeof **memory), memory_must(numbers, sizeof **memory)};
    threads_set_count(threads);
    for (const struct kernel_ops *const *ops = test_backends(); *ops; ops++) {
        float *at[2];
        for (int i = 0; i < 2; i++) {
            at[i] = (float *)(((uintptr_t)memory[i] + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT) + i;
            for (size_t k = 0; k < count + BEHIND; k++)
                at[i][k] = NAN;
            like.data = at[i];
            (*ops)->product_backward_weight(dy, tensor_none(), x, rows, offsets, like, false);
        }
        assert_memory_equal(at[0], at[1], tensor_bytes(like));
        for (size_t k = 0; k < OUT * IN; k++)
            assert_true(at[0][OUT * IN + k] == 0);
        for (size_t k = 0; k < BEHIND; k++)
            assert_true(isnan(at[0][count + k]));
    }
    free(memory[0]);
    free(memory[1]);
    test_release();
}

static void test_large_gradient(void **state) {
    (void)state;
    for (int threads = 1; threads <= THREADS_MAX; threads += 2)
        for (int d = 0; d < 2; d++)
            case_large_gradient(input_dtypes[d], threads);
}

static void case_gemm(int64_t m, int64_t n, int64_t k, int form, int d) {
    enum dtype in = input_dtypes[d];
    run(&(struct product){{form & 1 ? random_2d(in, k, m) : random_2d(in, m, k),
                           form & 2 ? random_2d(in, n, k) : random_2d(in, k, n), random_2d(output_dtypes[d], m, n)},
                          .count = 3,
                          .transpose_a = form & 1,
                          .transpose_b = form & 2,
                          .accumulate = form & 4,
                          .make = make_gemm});
}

/* Tiles of rows and of columns, with short ones at the ends; a single tile with a long k; k that fits the
 * processor's tiles, and 63, which does not. */
static void test_gemm(void **state) {
    (void)state;
    for (int d = 0; d < DTYPES; d++)
        for (int form = 0; form < 8; form++) {
            case_gemm(530, 203, 96, form, d);
            case_gemm(129, 129, 63, form, d);
            case_gemm(19, 1100, 64, form, d);
            case_gemm(33, 50, 2080, form, d);
        }
}

int main(void) {
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_forward),
        cmocka_unit_test(test_backward_input),
        cmocka_unit_test(test_squares),
        cmocka_unit_test(test_backward_weight),
        cmocka_unit_test(test_backward_weight_from_nothing),
        cmocka_unit_test(test_large_gradient),
        cmocka_unit_test(test_gemm),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
