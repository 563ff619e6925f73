/* Every operation that works on rows, without any: a rank without tokens, an expert layer without experts. Outputs of rows
 * have no elements, sums stay as they were, what is overwritten (=) becomes the sum of nothing. */
#include "kernels/kernels_testing.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

enum { D = 24, F = 20, E = 4, K = 2, H = 4, G = 2, P = 6, V = 11 };

/* What the operations of one backend and dtype are called with. */
struct fixture {
    const struct kernel_ops *ops;
    enum dtype compute, real;
};

static struct tensor rows(enum dtype dtype, int64_t columns) {
    return test_tensor(tensor_2d(NULL, dtype, 0, columns));
}

static struct tensor none_of(enum dtype dtype) {
    return test_tensor(tensor_1d(NULL, dtype, 0));
}

/* A sum that may not change. */
static struct tensor kept(enum dtype dtype, int64_t d0, int64_t d1) {
    return test_filled(tensor_2d(NULL, dtype, d0, d1), 3);
}

static void expect_all(struct tensor t, double value) {
    for (int64_t i = 0; i < tensor_elements(t); i++)
        assert_true(test_get(t, i) == value);
}

static void check_simple(const struct fixture *f) {
    const struct kernel_ops *ops = f->ops;
    struct tensor sum = kept(DTYPE_F64, 1, 1), x = rows(f->compute, D);
    ops->fill(x, 1);
    ops->fill(rows(DTYPE_I32, 3), 1);
    ops->cast(x, rows(f->real, D));
    ops->add(x, rows(f->real, D));
    ops->add(rows(DTYPE_I32, 3), rows(DTYPE_I32, 3));
    ops->sum_squares(x, sum);
    if (ops->sum_squares_each)
        ops->sum_squares_each(&x, 1, sum);
    ops->gather_scalars(none_of(f->real), none_of(DTYPE_I32), none_of(f->real));
    ops->gather_rows(x, none_of(DTYPE_I32), rows(f->compute, D));
    ops->combine_rows(x, rows(DTYPE_I32, K), rows(f->real, D), true);
    ops->combine_rows(x, rows(DTYPE_I32, 0), rows(f->real, D), false);
    if (ops->combine_rows_onto)
        ops->combine_rows_onto(x, rows(DTYPE_I32, K), rows(f->real, D), rows(f->real, D));
    expect_all(sum, 3);
    struct box box = {x, {0, 0, 0}};
    const int64_t count[3] = {0, D, 1};
    ops->sum_boxes(&box, 1, count, (struct box){rows(f->real, D), {0, 0, 0}}, true);
}

static void check_gemm(const struct fixture *f) {
    struct tensor w = test_random(tensor_2d(NULL, f->real, F, D), 1), sum = kept(f->real, F, D);
    f->ops->gemm(rows(f->real, D), false, w, true, rows(f->real, F), false);
    f->ops->gemm(rows(f->real, F), false, w, false, rows(f->real, D), true);
    f->ops->gemm(rows(f->real, F), true, rows(f->real, D), false, sum, true);
    expect_all(sum, 3);
    f->ops->gemm(rows(f->real, F), true, rows(f->real, D), false, sum, false);
    expect_all(sum, 0);
}

/* Dense, grouped, and grouped without a single group. */
static void check_products(const struct fixture *f) {
    for (int64_t groups = -1; groups <= E; groups += groups < 0 ? 1 : E) {
        bool is_dense = groups < 0;
        struct tensor w = is_dense ? tensor_2d(NULL, f->compute, F, D) : tensor_3d(NULL, f->compute, groups, F, D);
        struct packed packed = test_packed(f->ops, test_random(w, 1), true);
        struct tensor offsets = is_dense ? tensor_none() : test_filled(tensor_1d(NULL, DTYPE_I32, groups + 1), 0);
        struct tensor index = is_dense ? tensor_none() : none_of(DTYPE_I32);
        w.dtype = f->real;
        struct tensor dw = test_filled(w, 3);
        for (int accumulate = 0; accumulate < 2; accumulate++) {
            f->ops->product_forward(rows(f->compute, D), index, offsets, packed, rows(f->compute, F), accumulate);
            f->ops->product_forward(rows(f->compute, D), index, offsets, packed, rows(f->real, F), accumulate);
            f->ops->product_backward_input(rows(f->compute, F), index, offsets, packed, rows(f->real, D), accumulate);
        }
        f->ops->product_backward_weight(rows(f->compute, F), index, rows(f->compute, D), index, offsets, dw, true);
        expect_all(dw, 3);
        f->ops->product_backward_weight(rows(f->compute, F), index, rows(f->compute, D), index, offsets, dw, false);
        expect_all(dw, 0);
    }
}

static void check_norms(const struct fixture *f) {
    struct tensor weight = kept(f->real, D, 1), dweight = kept(f->real, D, 1), table = kept(f->real, 5, P);
    struct tensor head_weight = kept(f->real, P, 1), dhead_weight = kept(f->real, P, 1);
    f->ops->rmsnorm_forward(rows(f->real, D), weight, 1e-6, rows(f->compute, D), none_of(f->real));
    f->ops->rmsnorm_backward(rows(f->real, D), rows(f->real, D), weight, none_of(f->real), rows(f->real, D), true, dweight);
    if (f->ops->rmsnorm_backward_cast)
        f->ops->rmsnorm_backward_cast(rows(f->real, D), rows(f->real, D), weight, none_of(f->real), rows(f->real, D), true, dweight,
                                      rows(f->compute, D));
    if (f->ops->routed_norm_backward) {
        struct routed_gradient from = {rows(f->compute, D), rows(DTYPE_I32, K), rows(f->real, E), kept(f->real, E, D)};
        f->ops->routed_norm_backward(from, rows(f->real, D), rows(f->real, D), weight, none_of(f->real), rows(f->real, D), true,
                                     dweight, rows(f->compute, D));
    }
    f->ops->qknorm_rope_forward(rows(f->compute, H * P), head_weight, 1e-6, table, 5, 0, rows(f->compute, H * P),
                                none_of(f->real));
    f->ops->qknorm_rope_backward(rows(f->compute, H * P), rows(f->compute, H * P), head_weight, none_of(f->real), table, 5,
                                 0, rows(f->compute, H * P), dhead_weight);
    expect_all(dweight, 3);
    expect_all(dhead_weight, 3);
}

static void check_attention(const struct fixture *f) {
    for (int64_t length = 0; length <= 5; length += 5) { /* no sequence; or of no length */
        struct attention_shape shape = {length ? 0 : 3, length, length, H, G, P, 0.4};
        struct tensor q = rows(f->compute, H * P), k = rows(f->compute, G * P), lse = rows(f->real, H);
        f->ops->attention_forward(shape, q, k, k, rows(f->compute, H * P), lse);
        f->ops->attention_backward(shape, q, q, k, k, q, lse, rows(f->compute, H * P), rows(f->compute, G * P),
                                   rows(f->compute, G * P));
    }
    struct attention_shape none = {1, 0, 5, H, G, P, 0.4};
    struct tensor length = test_filled(tensor_1d(NULL, DTYPE_I32, 1), 2), keys = kept(f->compute, 5, G * P);
    f->ops->attention_kept(none, rows(f->compute, H * P), keys, keys, length, rows(f->compute, H * P), rows(f->real, H));
    f->ops->attention_keep(rows(f->compute, G * P), rows(f->compute, G * P), length, keys, keys);
    expect_all(keys, 3);
}

static void check_router(const struct fixture *f) {
    struct tensor logits = rows(f->real, E), expert = rows(DTYPE_I32, K), weight = rows(f->real, K);
    struct tensor count = test_tensor(tensor_1d(NULL, DTYPE_I32, E)), offsets = test_tensor(tensor_1d(NULL, DTYPE_I32, E + 1));
    struct tensor stats = kept(DTYPE_F64, 2 + 2 * E, 1);
    f->ops->router_topk_forward(logits, true, rows(f->real, E), expert, weight);
    f->ops->router_stats(logits, rows(f->real, E), expert, stats);
    expect_all(stats, 3);
    f->ops->route_sort(expert, count, offsets, none_of(DTYPE_I32), none_of(DTYPE_I32), rows(DTYPE_I32, K));
    expect_all(count, 0);
    expect_all(offsets, 0);
    f->ops->router_topk_backward(weight, logits, rows(f->real, E), expert, weight, true, count,
                                 (struct router_loss_scales){1, 1}, rows(f->real, E));
}

static void check_experts(const struct fixture *f) {
    f->ops->swiglu_forward(rows(f->compute, F), rows(f->compute, F), none_of(f->real), rows(f->compute, F));
    f->ops->swiglu_backward(rows(f->compute, F), rows(f->compute, F), rows(f->compute, F), none_of(f->real),
                            rows(f->compute, F), rows(f->compute, F), none_of(f->real));
}

static void check_ends(const struct fixture *f) {
    struct tensor table = kept(f->real, V, D), dtable = kept(f->real, V, D), sum = kept(DTYPE_F64, 1, 1);
    f->ops->embedding_forward(none_of(DTYPE_I32), table, rows(f->real, D));
    f->ops->embedding_backward(none_of(DTYPE_I32), rows(f->real, D), dtable);
    f->ops->cross_entropy(rows(f->real, V), none_of(DTYPE_I32), 1, sum, none_of(f->real), rows(f->compute, V));
    expect_all(dtable, 3);
    expect_all(sum, 3);
}

static void check_all(const struct fixture *f) {
    check_simple(f);
    check_gemm(f);
    check_products(f);
    check_norms(f);
    check_attention(f);
    check_router(f);
    check_experts(f);
    check_ends(f);
    assert_true(test_guards_hold());
    test_release();
}

static void test_all(void **state) {
    (void)state;
    static const enum dtype dtypes[][2] = {{DTYPE_F32, DTYPE_F32}, {DTYPE_BF16, DTYPE_F32}, {DTYPE_F64, DTYPE_F64}};
    for (const struct kernel_ops *const *ops = test_backends(); *ops; ops++)
        for (int i = 0; i < 3; i++) {
            struct fixture f = {*ops, dtypes[i][0], dtypes[i][1]};
            if (test_knows(*ops, f.compute))
                check_all(&f);
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_all)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
