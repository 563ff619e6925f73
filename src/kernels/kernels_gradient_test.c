/* Every backward of the reference against central differences of its forward, in double precision; and the
 * whole MoE layer, composed of operations, against a naive loop over tokens that shares no code with them. */
#include "kernels/kernels_testing.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#define TOLERANCE 1e-8

/* What gradients are added onto where an operation says += . */
#define SUM_START 0.25

enum { OPERANDS_MAX = 8 };

/* A scalar function of tensors: the sum of an operation's outputs times fixed coefficients. */
struct problem {
    const char *name;
    double (*loss)(const struct problem *problem);
    struct tensor in[OPERANDS_MAX];
    struct tensor coefficient;   /* of the output */
    struct tensor rows, offsets; /* grouped products, indices in general */
    struct attention_shape attention;
    struct router_loss_scales scales;
    int64_t sequence_length, first_position;
    bool transpose_a, transpose_b, normalize;
};

#define EPSILON 1e-5

static const struct kernel_ops *ref;

static struct tensor f64_1d(int64_t n) {
    return tensor_1d(NULL, DTYPE_F64, n);
}

static struct tensor f64_2d(int64_t rows, int64_t columns) {
    return tensor_2d(NULL, DTYPE_F64, rows, columns);
}

static struct tensor f64_3d(int64_t d0, int64_t d1, int64_t d2) {
    return tensor_3d(NULL, DTYPE_F64, d0, d1, d2);
}

static struct tensor i32_like(struct tensor like) {
    like.dtype = DTYPE_I32;
    return like;
}

static struct tensor sum_like(struct tensor like) {
    return test_filled(like, SUM_START);
}

static double weighted_sum(struct tensor t, struct tensor coefficient) {
    assert_int_equal(tensor_elements(t), tensor_elements(coefficient));
    double sum = 0;
    for (int64_t i = 0; i < tensor_elements(t); i++)
        sum += test_get(t, i) * test_get(coefficient, i);
    return sum;
}

/* The loss, with the tensors that it takes given back. */
static double evaluate(const struct problem *problem) {
    struct test_block *kept = test_blocks;
    test_blocks = NULL;
    double value = problem->loss(problem);
    assert_true(test_guards_hold());
    test_release();
    test_blocks = kept;
    return value;
}

/* d(loss)/d(x[i]) by the five-point rule. x is one of the problem's tensors. */
static double difference(const struct problem *problem, struct tensor x, int64_t i) {
    static const double factor[4] = {1, -8, 8, -1};
    static const int step[4] = {-2, -1, 1, 2};
    double h = 1e-3, before = test_get(x, i), sum = 0;
    for (int s = 0; s < 4; s++) {
        test_set(x, i, before + step[s] * h);
        sum += factor[s] * evaluate(problem);
    }
    test_set(x, i, before);
    return sum / (12 * h);
}

/* dx - start must be the gradient of the loss by x, relative to the norm of the gradient (or to a hundredth,
 * where it vanishes). */
static void check_gradient(const struct problem *problem, const char *what, struct tensor x, struct tensor dx,
                           double start) {
    assert_true(tensor_same_shape(x, dx));
    double error = 0, norm = 0;
    for (int64_t i = 0; i < tensor_elements(x); i++) {
        double expected = difference(problem, x, i), found = test_get(dx, i) - start;
        error += (found - expected) * (found - expected);
        norm += expected * expected;
    }
    error = sqrt(error), norm = sqrt(norm);
    if (!(error <= TOLERANCE * fmax(norm, 1e-2)))
        fail_msg("%s: gradient of %s off by %.3g of %.3g", problem->name, what, error, norm);
}

static int finish(void **state) {
    (void)state;
    bool hold = test_guards_hold();
    test_release();
    return hold ? 0 : -1;
}

/* ---- products ---- */

static double gemm_loss(const struct problem *p) {
    struct tensor c = test_tensor(p->coefficient);
    ref->gemm(p->in[0], p->transpose_a, p->in[1], p->transpose_b, c, false);
    return weighted_sum(c, p->coefficient);
}

/* dA = dC op(B)^T and dB = op(A)^T dC, each turned the way its operand lies: all forms of gemm take part. */
static void check_gemm(int64_t m, int64_t n, int64_t k, bool transpose_a, bool transpose_b) {
    struct problem p = {
        .name = "gemm", .loss = gemm_loss, .transpose_a = transpose_a, .transpose_b = transpose_b};
    p.in[0] = test_random(transpose_a ? f64_2d(k, m) : f64_2d(m, k), 1);
    p.in[1] = test_random(transpose_b ? f64_2d(n, k) : f64_2d(k, n), 1);
    p.coefficient = test_random(f64_2d(m, n), 1);
    struct tensor a = p.in[0], b = p.in[1], dc = p.coefficient, da = test_tensor(a), db = sum_like(b);
    if (transpose_a)
        ref->gemm(b, transpose_b, dc, true, da, false);
    else
        ref->gemm(dc, false, b, !transpose_b, da, false);
    if (transpose_b)
        ref->gemm(dc, true, a, transpose_a, db, true);
    else
        ref->gemm(a, !transpose_a, dc, false, db, true);
    check_gradient(&p, "a", a, da, 0);
    check_gradient(&p, "b", b, db, SUM_START);
}

static void test_gemm(void **state) {
    (void)state;
    for (int form = 0; form < 4; form++) {
        check_gemm(3, 5, 7, form & 1, form & 2);
        check_gemm(1, 1, 1, form & 1, form & 2);
        check_gemm(4, 1, 2, form & 1, form & 2);
    }
}

/* The reference packs weights as they are. */
static struct packed as_packed(struct tensor w) {
    return (struct packed){w.data, w.dtype, w.shape[0], w.shape[1], w.shape[2], true};
}

static double grouped_loss(const struct problem *p) {
    struct tensor y = test_tensor(p->coefficient);
    ref->product_forward(p->in[0], p->rows, p->offsets, as_packed(p->in[1]), y, false);
    return weighted_sum(y, p->coefficient);
}

/* x is read through rows where those are given: its gradient is then summed from those of the routed rows. */
static struct tensor scatter_rows(struct tensor drows, struct tensor rows, struct tensor like) {
    struct tensor dx = test_filled(like, 0);
    int64_t width = like.shape[1];
    for (int64_t i = 0; i < tensor_elements(drows); i++) {
        int64_t to = (int64_t)test_get(rows, i / width) * width + i % width;
        test_set(dx, to, test_get(dx, to) + test_get(drows, i));
    }
    return dx;
}

static void check_grouped(enum test_spread spread, int64_t experts, int64_t row_count, int64_t out,
                          int64_t in, bool gathered) {
    struct problem p = {.name = "grouped", .loss = grouped_loss};
    int64_t token_count = gathered ? row_count / 2 + 1 : row_count;
    p.in[0] = test_random(f64_2d(token_count, in), 1);
    p.in[1] = test_random(f64_3d(experts, out, in), 1);
    p.rows = gathered ? test_indices(i32_like(f64_1d(row_count)), token_count) : tensor_none();
    p.offsets = test_offsets(spread, row_count, experts);
    p.coefficient = test_random(f64_2d(row_count, out), 1);
    struct tensor dw = sum_like(p.in[1]), dx = test_tensor(f64_2d(row_count, in));
    ref->product_backward_weight(p.coefficient, tensor_none(), p.in[0], p.rows, p.offsets, dw, true);
    ref->product_backward_input(p.coefficient, tensor_none(), p.offsets, as_packed(p.in[1]), dx, false);
    check_gradient(&p, "w", p.in[1], dw, SUM_START);
    if (gathered)
        dx = scatter_rows(dx, p.rows, p.in[0]);
    check_gradient(&p, "x", p.in[0], dx, 0);
}

/* The other way of reading in place: the gradient of the rows is gathered from one of the tokens. */
static void check_grouped_from_tokens(void) {
    struct problem p = {.name = "grouped from tokens", .loss = grouped_loss};
    p.in[0] = test_random(f64_2d(9, 4), 1);
    p.in[1] = test_random(f64_3d(3, 5, 4), 1);
    p.rows = tensor_none();
    p.offsets = test_offsets(SPREAD_RANDOM, 9, 3);
    struct tensor dtoken = test_random(f64_2d(4, 5), 1), row_token = test_indices(i32_like(f64_1d(9)), 4);
    p.coefficient = test_tensor(f64_2d(9, 5));
    for (int64_t i = 0; i < 45; i++)
        test_set(p.coefficient, i, test_get(dtoken, (int64_t)test_get(row_token, i / 5) * 5 + i % 5));
    struct tensor dw = sum_like(p.in[1]), dx = sum_like(p.in[0]);
    ref->product_backward_weight(dtoken, row_token, p.in[0], tensor_none(), p.offsets, dw, true);
    ref->product_backward_input(dtoken, row_token, p.offsets, as_packed(p.in[1]), dx, true);
    check_gradient(&p, "w", p.in[1], dw, SUM_START);
    check_gradient(&p, "x", p.in[0], dx, SUM_START);
}

static void test_grouped(void **state) {
    (void)state;
    for (int spread = 0; spread < SPREAD_COUNT; spread++)
        for (int gathered = 0; gathered < 2; gathered++) {
            check_grouped(spread, 1, 1, 1, 1, gathered);
            check_grouped(spread, 3, 7, 5, 3, gathered);
            check_grouped(spread, 8, 13, 2, 7, gathered);
            check_grouped(spread, 4, 0, 3, 3, gathered);
        }
    check_grouped_from_tokens();
}

/* ---- normalisation ---- */

static double rmsnorm_loss(const struct problem *p) {
    struct tensor y = test_tensor(p->in[0]), rstd = test_tensor(f64_1d(p->in[0].shape[0]));
    ref->rmsnorm_forward(p->in[0], p->in[1], EPSILON, y, rstd);
    return weighted_sum(y, p->coefficient);
}

static void check_rmsnorm(int64_t rows, int64_t width, double scale) {
    struct problem p = {.name = "rmsnorm", .loss = rmsnorm_loss};
    p.in[0] = test_random(f64_2d(rows, width), scale);
    p.in[1] = test_random(f64_1d(width), 1);
    p.coefficient = test_random(p.in[0], 1);
    struct tensor y = test_tensor(p.in[0]), rstd = test_tensor(f64_1d(rows));
    struct tensor dx = test_tensor(p.in[0]), dweight = sum_like(p.in[1]);
    ref->rmsnorm_forward(p.in[0], p.in[1], EPSILON, y, rstd);
    ref->rmsnorm_backward(p.coefficient, p.in[0], p.in[1], rstd, dx, false, dweight);
    check_gradient(&p, "x", p.in[0], dx, 0);
    check_gradient(&p, "weight", p.in[1], dweight, SUM_START);
    dx = sum_like(p.in[0]);
    ref->rmsnorm_backward(p.coefficient, p.in[0], p.in[1], rstd, dx, true, dweight);
    check_gradient(&p, "x, added", p.in[0], dx, SUM_START);
}

static void test_rmsnorm(void **state) {
    (void)state;
    check_rmsnorm(1, 8, 1);
    check_rmsnorm(5, 7, 1);
    check_rmsnorm(3, 16, 3);
}

static double rope_loss(const struct problem *p) {
    struct tensor x = p->in[0], y = test_tensor(x),
                  rstd = test_tensor(f64_1d(tensor_elements(x) / p->in[1].shape[0]));
    ref->qknorm_rope_forward(x, p->in[1], EPSILON, p->in[2], p->sequence_length, p->first_position, y, rstd);
    return weighted_sum(y, p->coefficient);
}

static void check_rope(int64_t rows, int64_t heads, int64_t head_dim, int64_t sequence_length,
                       int64_t first_position) {
    struct problem p = {.name = "qknorm_rope",
                        .loss = rope_loss,
                        .sequence_length = sequence_length,
                        .first_position = first_position};
    p.in[0] = test_random(f64_2d(rows, heads * head_dim), 1);
    p.in[1] = test_random(f64_1d(head_dim), 1);
    p.in[2] = test_rotary_table(DTYPE_F64, first_position + sequence_length, head_dim);
    p.coefficient = test_random(p.in[0], 1);
    struct tensor y = test_tensor(p.in[0]), rstd = test_tensor(f64_1d(rows * heads));
    struct tensor dx = test_tensor(p.in[0]), dweight = sum_like(p.in[1]);
    ref->qknorm_rope_forward(p.in[0], p.in[1], EPSILON, p.in[2], sequence_length, first_position, y, rstd);
    ref->qknorm_rope_backward(p.coefficient, p.in[0], p.in[1], rstd, p.in[2], sequence_length, first_position,
                              dx, dweight);
    check_gradient(&p, "x", p.in[0], dx, 0);
    check_gradient(&p, "weight", p.in[1], dweight, SUM_START);
}

static void test_qknorm_rope(void **state) {
    (void)state;
    check_rope(1, 1, 2, 1, 0);
    check_rope(6, 2, 4, 3, 0);
    check_rope(5, 3, 6, 5, 2);
    check_rope(8, 1, 8, 4, 7);
}

/* The half-split rotation as Hugging Face writes it: pair j is (x[j], x[j + P/2]), turned by position *
 * base^(-2j/P). */
static void test_rope_turns_pairs(void **state) {
    (void)state;
    struct tensor x = test_random(f64_2d(6, 8), 1), weight = test_filled(f64_1d(8), 1), y = test_tensor(x);
    struct tensor table = test_rotary_table(DTYPE_F64, 5, 8), rstd = test_tensor(f64_1d(6));
    ref->qknorm_rope_forward(x, weight, EPSILON, table, 3, 2, y, rstd);
    for (int64_t s = 0; s < 6; s++)
        for (int64_t j = 0; j < 4; j++) {
            double angle = (double)(2 + s % 3) * pow(10000, -0.25 * (double)j), scale = test_get(rstd, s);
            double low = scale * test_get(x, s * 8 + j), high = scale * test_get(x, s * 8 + 4 + j);
            assert_true(fabs(test_get(y, s * 8 + j) - (low * cos(angle) - high * sin(angle))) < 1e-14);
            assert_true(fabs(test_get(y, s * 8 + 4 + j) - (low * sin(angle) + high * cos(angle))) < 1e-14);
        }
}

/* ---- attention ---- */

static double attention_loss(const struct problem *p) {
    struct tensor out = test_tensor(p->in[0]);
    struct tensor lse = test_tensor(f64_2d(out.shape[0], p->attention.head_count));
    ref->attention_forward(p->attention, p->in[0], p->in[1], p->in[2], out, lse);
    return weighted_sum(out, p->coefficient);
}

static void check_attention(int64_t batch, int64_t length, int heads, int kv_heads, int head_dim) {
    struct problem p = {.name = "attention",
                        .loss = attention_loss,
                        .attention = {batch, length, length, heads, kv_heads, head_dim, 1 / sqrt(head_dim)}};
    p.in[0] = test_random(f64_2d(batch * length, heads * head_dim), 1);
    p.in[1] = test_random(f64_2d(batch * length, kv_heads * head_dim), 1);
    p.in[2] = test_random(p.in[1], 1);
    p.coefficient = test_random(p.in[0], 1);
    struct tensor out = test_tensor(p.in[0]), lse = test_tensor(f64_2d(batch * length, heads));
    struct tensor dq = test_tensor(p.in[0]), dk = test_tensor(p.in[1]), dv = test_tensor(p.in[2]);
    ref->attention_forward(p.attention, p.in[0], p.in[1], p.in[2], out, lse);
    ref->attention_backward(p.attention, p.coefficient, p.in[0], p.in[1], p.in[2], out, lse, dq, dk, dv);
    check_gradient(&p, "q", p.in[0], dq, 0);
    check_gradient(&p, "k", p.in[1], dk, 0);
    check_gradient(&p, "v", p.in[2], dv, 0);
}

static void test_attention(void **state) {
    (void)state;
    for (int64_t length = 1; length <= 7; length += length < 2 ? 1 : 5) { /* 1, 2, 7 */
        check_attention(2, length, 1, 1, 4);
        check_attention(1, length, 2, 2, 3);
        check_attention(2, length, 2, 1, 4);
        check_attention(1, length, 4, 2, 2);
        check_attention(1, length, 4, 1, 3);
    }
}

/* Decoding: the last queries against all keys give what the whole sequence gave for them. */
static void test_attention_of_last_queries(void **state) {
    (void)state;
    struct attention_shape whole = {1, 5, 5, 4, 2, 3, 0.5}, last = whole;
    last.query_count = 2;
    struct tensor q = test_random(f64_2d(5, 12), 1), k = test_random(f64_2d(5, 6), 1),
                  v = test_random(f64_2d(5, 6), 1);
    struct tensor out = test_tensor(q), lse = test_tensor(f64_2d(5, 4));
    struct tensor last_out = test_tensor(f64_2d(2, 12)), last_lse = test_tensor(f64_2d(2, 4));
    ref->attention_forward(whole, q, k, v, out, lse);
    ref->attention_forward(last, tensor_rows(q, 3, 2), k, v, last_out, last_lse);
    assert_memory_equal(last_out.data, tensor_rows(out, 3, 2).data, tensor_bytes(last_out));
    assert_memory_equal(last_lse.data, tensor_rows(lse, 3, 2).data, tensor_bytes(last_lse));
}

/* Two queries, one head, by hand. */
static void test_attention_by_hand(void **state) {
    (void)state;
    struct attention_shape shape = {1, 2, 2, 1, 1, 1, 2.0};
    double q[] = {1, 3}, k[] = {0.5, -0.25}, v[] = {10, 20}, out[2], lse[2];
    ref->attention_forward(shape, tensor_2d(q, DTYPE_F64, 2, 1), tensor_2d(k, DTYPE_F64, 2, 1),
                           tensor_2d(v, DTYPE_F64, 2, 1), tensor_2d(out, DTYPE_F64, 2, 1),
                           tensor_2d(lse, DTYPE_F64, 2, 1));
    double a = exp(3.0), b = exp(-1.5);
    assert_true(fabs(out[0] - 10) < 1e-13 && fabs(lse[0] - 1) < 1e-13);
    assert_true(fabs(out[1] - (10 * a + 20 * b) / (a + b)) < 1e-13 && fabs(lse[1] - log(a + b)) < 1e-13);
}

/* ---- routing ---- */

static double logsumexp(const double *x, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++)
        sum += exp(x[i]); /* the tests' logits are small */
    return log(sum);
}

/* Scores that lie apart by more than any step of a difference. */
static struct tensor distinct_logits(int64_t token_count, int64_t experts) {
    struct tensor logits = test_tensor(f64_2d(token_count, experts));
    for (int64_t s = 0; s < token_count; s++)
        for (int64_t e = 0; e < experts; e++) {
            uint64_t rank = random_permute(5, test_seed + (uint64_t)s, (uint64_t)experts, (uint64_t)e);
            double noise = 0.1 * random_uniform(6, test_seed, (uint64_t)(s * experts + e));
            test_set(logits, s * experts + e, 0.3 * (double)rank - 0.5 + noise);
        }
    return logits;
}

/* The two losses of the router, written from their definition: the balance loss with its counts (in[1]) held.
 */
static double router_losses(struct tensor logits, struct tensor count, struct router_loss_scales scales) {
    int64_t experts = logits.shape[1];
    const double *logit = logits.data;
    double loss = 0;
    for (int64_t s = 0; s < logits.shape[0]; s++) {
        double lse = logsumexp(logit + s * experts, experts);
        loss += scales.z_scale * lse * lse;
        for (int64_t e = 0; e < experts; e++)
            loss += scales.balance_scale * test_get(count, e) * exp(logit[s * experts + e] - lse);
    }
    return loss;
}

static double router_loss(const struct problem *p) {
    struct tensor prob = test_tensor(p->in[0]), expert = test_tensor(i32_like(p->coefficient));
    struct tensor weight = test_tensor(p->coefficient);
    ref->router_topk_forward(p->in[0], p->normalize, prob, expert, weight);
    return weighted_sum(weight, p->coefficient) + router_losses(p->in[0], p->in[1], p->scales);
}

static void check_router(int64_t token_count, int64_t experts, int64_t choices, bool normalize,
                         struct router_loss_scales scales) {
    struct problem p = {.name = "router", .loss = router_loss, .normalize = normalize, .scales = scales};
    p.in[0] = distinct_logits(token_count, experts);
    p.coefficient = test_random(f64_2d(token_count, choices), 1);
    struct tensor prob = test_tensor(p.in[0]), dlogits = test_tensor(p.in[0]),
                  weight = test_tensor(p.coefficient);
    struct tensor expert = test_tensor(i32_like(p.coefficient));
    ref->router_topk_forward(p.in[0], normalize, prob, expert, weight);
    p.in[1] = test_filled(i32_like(f64_1d(experts)), 0);
    for (int64_t i = 0; i < tensor_elements(expert); i++)
        ((int32_t *)p.in[1].data)[((int32_t *)expert.data)[i]]++;
    ref->router_topk_backward(p.coefficient, p.in[0], prob, expert, weight, normalize, p.in[1], scales,
                              dlogits);
    check_gradient(&p, "logits", p.in[0], dlogits, 0);
}

static void test_router(void **state) {
    (void)state;
    static const struct router_loss_scales scales[] = {{0, 0}, {0.05, 0}, {0, 0.02}, {0.05, 0.02}};
    for (int i = 0; i < 8; i++) {
        check_router(3, 1, 1, i & 1, scales[i / 2]);
        for (int64_t choices = 1; choices <= 5; choices++)
            check_router(4, 5, choices, i & 1, scales[i / 2]);
    }
}

/* Equal scores: the lower index first, the weights of equals are equal. */
static void test_router_ties(void **state) {
    (void)state;
    double score[] = {1, 1, 1, 1, 0, 2, 2, -1, 3, 0, 3, 3, -4, -2, -2, -2};
    static const int32_t best[] = {0, 1, 2, 1, 2, 0, 0, 2, 3, 1, 2, 3};
    double prob[16], weight[12];
    int32_t expert[12];
    ref->router_topk_forward(tensor_2d(score, DTYPE_F64, 4, 4), true, tensor_2d(prob, DTYPE_F64, 4, 4),
                             tensor_2d(expert, DTYPE_I32, 4, 3), tensor_2d(weight, DTYPE_F64, 4, 3));
    assert_memory_equal(expert, best, sizeof best);
    for (int i = 0; i < 3; i++) {
        assert_true(fabs(weight[i] - 1.0 / 3) < 1e-15);
        assert_true(fabs(weight[9 + i] - 1.0 / 3) < 1e-15);
        assert_true(fabs(prob[i] - 0.25) < 1e-15);
    }
    assert_true(weight[3] == weight[4] && weight[4] > weight[5]);
}

static void test_router_stats(void **state) {
    (void)state;
    struct tensor logits = distinct_logits(5, 3), prob = test_tensor(logits);
    struct tensor expert = test_tensor(i32_like(f64_2d(5, 2))), weight = test_tensor(f64_2d(5, 2));
    struct tensor stats = sum_like(f64_1d(8));
    double expected[8] = {0};
    ref->router_topk_forward(logits, false, prob, expert, weight);
    ref->router_stats(logits, prob, expert, stats);
    for (int64_t s = 0; s < 5; s++) {
        double lse = logsumexp((double *)logits.data + 3 * s, 3);
        expected[0] += lse * lse;
        for (int64_t e = 0; e < 3; e++) {
            double p = exp(test_get(logits, 3 * s + e) - lse);
            expected[1] -= p * log(p);
            expected[2 + e] += p;
            expected[5 + e] +=
                test_get(expert, 2 * s) == (double)e || test_get(expert, 2 * s + 1) == (double)e;
        }
    }
    for (int64_t i = 0; i < 8; i++)
        assert_true(fabs(test_get(stats, i) - SUM_START - expected[i]) < 1e-13);
}

static void test_route_sort(void **state) {
    (void)state;
    int32_t expert[] = {2, 0, 0, 2, 2, 3}, count[5], offsets[6], row_slot[6], row_token[6], slot_row[6];
    static const int32_t counts[] = {2, 0, 3, 1, 0}, starts[] = {0, 2, 2, 5, 6, 6};
    static const int32_t slots[] = {1, 2, 0, 3, 4, 5}, tokens[] = {0, 1, 0, 1, 2, 2},
                         rows[] = {2, 0, 1, 3, 4, 5};
    ref->route_sort(tensor_2d(expert, DTYPE_I32, 3, 2), tensor_1d(count, DTYPE_I32, 5),
                    tensor_1d(offsets, DTYPE_I32, 6), tensor_1d(row_slot, DTYPE_I32, 6),
                    tensor_1d(row_token, DTYPE_I32, 6), tensor_2d(slot_row, DTYPE_I32, 3, 2));
    assert_memory_equal(count, counts, sizeof counts);
    assert_memory_equal(offsets, starts, sizeof starts);
    assert_memory_equal(row_slot, slots, sizeof slots);
    assert_memory_equal(row_token, tokens, sizeof tokens);
    assert_memory_equal(slot_row, rows, sizeof rows);
}

static double combine_loss(const struct problem *p) {
    struct tensor y = sum_like(p->coefficient);
    ref->combine_rows(p->in[0], p->rows, y, true);
    return weighted_sum(y, p->coefficient);
}

/* combine_rows is linear; its gradient is dy read through row_token, as grouped products do it. */
static void test_combine_rows(void **state) {
    (void)state;
    for (int64_t choices = 1; choices <= 3; choices++) {
        int64_t row_count = 4 * choices;
        struct problem p = {.name = "combine_rows", .loss = combine_loss};
        p.in[0] = test_random(f64_2d(row_count, 5), 1);
        p.rows = test_tensor(i32_like(f64_2d(4, choices)));
        p.coefficient = test_random(f64_2d(4, 5), 1);
        struct tensor drows = test_tensor(p.in[0]);
        for (int64_t slot = 0; slot < row_count; slot++) {
            int64_t row = (int64_t)random_permute(1, 2, (uint64_t)row_count, (uint64_t)slot);
            test_set(p.rows, slot, (double)row);
            for (int64_t d = 0; d < 5; d++)
                test_set(drows, row * 5 + d, test_get(p.coefficient, slot / choices * 5 + d));
        }
        check_gradient(&p, "rows", p.in[0], drows, 0);
    }
}

/* ---- expert ---- */

static double swiglu_loss(const struct problem *p) {
    struct tensor act = test_tensor(p->in[0]);
    ref->swiglu_forward(p->in[0], p->in[1], p->in[2], act);
    return weighted_sum(act, p->coefficient);
}

static void check_swiglu(int64_t rows, int64_t width, bool weighted) {
    struct problem p = {.name = "swiglu", .loss = swiglu_loss};
    p.in[0] = test_random(f64_2d(rows, width), 2);
    p.in[1] = test_random(p.in[0], 1);
    p.in[2] = weighted ? test_random(f64_1d(rows), 1) : tensor_none();
    p.coefficient = test_random(p.in[0], 1);
    struct tensor dgate = test_tensor(p.in[0]), dup = test_tensor(p.in[1]);
    struct tensor dweight = weighted ? test_tensor(p.in[2]) : tensor_none();
    ref->swiglu_backward(p.coefficient, p.in[0], p.in[1], p.in[2], dgate, dup, dweight);
    check_gradient(&p, "gate", p.in[0], dgate, 0);
    check_gradient(&p, "up", p.in[1], dup, 0);
    if (weighted)
        check_gradient(&p, "row_weight", p.in[2], dweight, 0);
}

static void test_swiglu(void **state) {
    (void)state;
    for (int weighted = 0; weighted < 2; weighted++) {
        check_swiglu(1, 1, weighted);
        check_swiglu(5, 7, weighted);
    }
}

/* ---- embedding and loss ---- */

static double embedding_loss(const struct problem *p) {
    struct tensor x = test_tensor(p->coefficient);
    ref->embedding_forward(p->rows, p->in[0], x);
    return weighted_sum(x, p->coefficient);
}

static void test_embedding(void **state) {
    (void)state;
    struct problem p = {.name = "embedding", .loss = embedding_loss};
    p.in[0] = test_random(f64_2d(5, 3), 1);
    p.rows = test_indices(i32_like(f64_1d(11)), 4); /* repeated ids, and one that is never seen */
    p.coefficient = test_random(f64_2d(11, 3), 1);
    struct tensor dtable = sum_like(p.in[0]);
    ref->embedding_backward(p.rows, p.coefficient, dtable);
    check_gradient(&p, "table", p.in[0], dtable, SUM_START);
}

static double cross_entropy_loss(const struct problem *p) {
    struct tensor sum = test_filled(f64_1d(1), 0);
    ref->cross_entropy(p->in[0], p->rows, 1, sum, tensor_none(), tensor_none());
    return 0.7 * test_get(sum, 0);
}

static void test_cross_entropy(void **state) {
    (void)state;
    struct problem p = {.name = "cross_entropy", .loss = cross_entropy_loss};
    p.in[0] = test_random(f64_2d(6, 7), 2);
    p.rows = test_indices(i32_like(f64_1d(6)), 7);
    test_set(p.rows, 1, -1);
    test_set(p.rows, 4, -100);
    struct tensor dlogits = test_tensor(p.in[0]), sum = sum_like(f64_1d(1)),
                  row_loss = test_tensor(f64_1d(6));
    ref->cross_entropy(p.in[0], p.rows, 0.7, sum, row_loss, dlogits);
    check_gradient(&p, "logits", p.in[0], dlogits, 0);
    double total = SUM_START;
    for (int64_t r = 0; r < 6; r++) {
        int64_t target = (int64_t)test_get(p.rows, r);
        const double *row = (double *)p.in[0].data + 7 * r;
        double expected = target < 0 ? 0 : logsumexp(row, 7) - row[target];
        assert_true(fabs(test_get(row_loss, r) - expected) < 1e-13);
        total += expected;
    }
    assert_true(fabs(test_get(sum, 0) - total) < 1e-12);
}

/* ---- optimizer ---- */

/* Two updates of one number, step by step as arXiv 1711.05101 has them. */
static void test_adamw(void **state) {
    (void)state;
    double param = 0.5, grad = 4, m = 0, v = 0, copy = 0, p = 0.5, first = 0, second = 0;
    struct adamw_settings settings = {0.1, 0.9, 0.99, 1e-8, 0.02, 1, 0.25};
    for (; settings.step <= 2; settings.step++) {
        ref->adamw(tensor_1d(&param, DTYPE_F64, 1), tensor_1d(&grad, DTYPE_F64, 1),
                   tensor_1d(&m, DTYPE_F64, 1), tensor_1d(&v, DTYPE_F64, 1), settings,
                   (struct packed){&copy, DTYPE_F64, 1, 1, 1, true}, (struct update_hashes){0});
        double g = 0.25 * grad, steps = (double)settings.step;
        first = 0.9 * first + 0.1 * g;
        second = 0.99 * second + 0.01 * g * g;
        double m_hat = first / (1 - pow(0.9, steps)), v_hat = second / (1 - pow(0.99, steps));
        p = p - 0.1 * 0.02 * p - 0.1 * m_hat / (sqrt(v_hat) + 1e-8);
        assert_true(fabs(param - p) < 1e-14 && copy == param);
        assert_true(fabs(m - first) < 1e-14 && fabs(v - second) < 1e-14);
        grad = -1;
    }
}

/* ---- the whole MoE layer against a naive loop over tokens ---- */

enum { MOE_TOKENS = 7, MOE_WIDTH = 5, MOE_HIDDEN = 3, MOE_EXPERTS = 4 };

struct moe {
    struct tensor x, gate, up, down, logits; /* [S,D], [E,F,D], [E,F,D], [E,D,F], [S,E] */
    struct tensor dx, dgate, dup, ddown, dlogits, y;
};

/* The naive choice: how many are better than e, or as good and before it? */
static int naive_rank(const double *logits, int e) {
    int rank = 0;
    for (int other = 0; other < MOE_EXPERTS; other++)
        rank += logits[other] > logits[e] || (logits[other] == logits[e] && other < e);
    return rank;
}

/* y [D] of token s through expert e. */
static void naive_expert(const struct problem *p, int s, int e, double *y) {
    const double *x = (double *)p->in[0].data + s * MOE_WIDTH;
    const double *gate = (double *)p->in[1].data + e * MOE_HIDDEN * MOE_WIDTH;
    const double *up = (double *)p->in[2].data + e * MOE_HIDDEN * MOE_WIDTH;
    const double *down = (double *)p->in[3].data + e * MOE_WIDTH * MOE_HIDDEN;
    memset(y, 0, MOE_WIDTH * sizeof *y);
    for (int f = 0; f < MOE_HIDDEN; f++) {
        double g = 0, u = 0;
        for (int d = 0; d < MOE_WIDTH; d++) {
            g += gate[f * MOE_WIDTH + d] * x[d];
            u += up[f * MOE_WIDTH + d] * x[d];
        }
        for (int d = 0; d < MOE_WIDTH; d++)
            y[d] += down[d * MOE_HIDDEN + f] * g / (1 + exp(-g)) * u;
    }
}

/* The chosen of every token are held in p->rows [S,E] (1 or 0): a choice has no gradient. */
static void naive_moe(const struct problem *p, double *y) {
    const double *logits = p->in[4].data;
    for (int s = 0; s < MOE_TOKENS; s++) {
        double all = 0, chosen = 0, answer[MOE_WIDTH];
        memset(y + s * MOE_WIDTH, 0, MOE_WIDTH * sizeof *y);
        for (int e = 0; e < MOE_EXPERTS; e++) {
            all += exp(logits[s * MOE_EXPERTS + e]);
            chosen += test_get(p->rows, s * MOE_EXPERTS + e) * exp(logits[s * MOE_EXPERTS + e]);
        }
        for (int e = 0; e < MOE_EXPERTS; e++) {
            if (test_get(p->rows, s * MOE_EXPERTS + e) == 0)
                continue;
            naive_expert(p, s, e, answer);
            for (int d = 0; d < MOE_WIDTH; d++)
                y[s * MOE_WIDTH + d] +=
                    exp(logits[s * MOE_EXPERTS + e]) / (p->normalize ? chosen : all) * answer[d];
        }
    }
}

static double naive_moe_loss(const struct problem *p) {
    double y[MOE_TOKENS * MOE_WIDTH];
    naive_moe(p, y);
    struct tensor out = tensor_2d(y, DTYPE_F64, MOE_TOKENS, MOE_WIDTH);
    return weighted_sum(out, p->coefficient) + router_losses(p->in[4], p->offsets, p->scales);
}

struct moe_route {
    struct tensor prob, expert, weight, count, offsets, row_slot, row_token, slot_row, row_weight;
};

static struct moe_route moe_route(struct tensor logits, bool normalize, int64_t choices) {
    int64_t row_count = MOE_TOKENS * choices;
    struct tensor index = i32_like(f64_1d(row_count)), slots = f64_2d(MOE_TOKENS, choices);
    struct moe_route r = {
        test_tensor(logits),
        test_tensor(i32_like(slots)),
        test_tensor(slots),
        test_tensor(i32_like(f64_1d(MOE_EXPERTS))),
        test_tensor(i32_like(f64_1d(MOE_EXPERTS + 1))),
        test_tensor(index),
        test_tensor(index),
        test_tensor(i32_like(slots)),
        test_tensor(f64_1d(row_count)),
    };
    ref->router_topk_forward(logits, normalize, r.prob, r.expert, r.weight);
    ref->route_sort(r.expert, r.count, r.offsets, r.row_slot, r.row_token, r.slot_row);
    ref->gather_scalars(r.weight, r.row_slot, r.row_weight);
    return r;
}

/* The layer as nn/ composes it, forward and backward. */
static void moe_layer(const struct problem *p, int64_t choices, struct moe *m) {
    struct tensor x = p->in[0], gate_w = p->in[1], up_w = p->in[2], down_w = p->in[3], dy = p->coefficient;
    struct tensor none = tensor_none();
    struct moe_route r = moe_route(p->in[4], p->normalize, choices);
    int64_t row_count = MOE_TOKENS * choices;
    struct tensor gate = test_tensor(f64_2d(row_count, MOE_HIDDEN)), up = test_tensor(gate),
                  act = test_tensor(gate);
    struct tensor rows = test_tensor(f64_2d(row_count, MOE_WIDTH)), dact = test_tensor(gate);
    struct tensor drow_weight = test_tensor(r.row_weight), dweight = test_tensor(r.weight);

    ref->product_forward(x, r.row_token, r.offsets, as_packed(gate_w), gate, false);
    ref->product_forward(x, r.row_token, r.offsets, as_packed(up_w), up, false);
    ref->swiglu_forward(gate, up, r.row_weight, act);
    ref->product_forward(act, none, r.offsets, as_packed(down_w), rows, false);
    ref->combine_rows(rows, r.slot_row, m->y, false);

    ref->product_backward_weight(dy, r.row_token, act, none, r.offsets, m->ddown, true);
    ref->product_backward_input(dy, r.row_token, r.offsets, as_packed(down_w), dact, false);
    ref->swiglu_backward(dact, gate, up, r.row_weight, gate, up, drow_weight); /* in place */
    ref->product_backward_weight(gate, none, x, r.row_token, r.offsets, m->dgate, true);
    ref->product_backward_weight(up, none, x, r.row_token, r.offsets, m->dup, true);
    ref->product_backward_input(gate, none, r.offsets, as_packed(gate_w), rows, false);
    ref->product_backward_input(up, none, r.offsets, as_packed(up_w), rows, true);
    ref->combine_rows(rows, r.slot_row, m->dx, false);
    ref->gather_scalars(drow_weight, r.slot_row, dweight);
    ref->router_topk_backward(dweight, p->in[4], r.prob, r.expert, r.weight, p->normalize, r.count, p->scales,
                              m->dlogits);
}

/* Hold the naive choice in p->rows and its counts in p->offsets. */
static void hold_choice(struct problem *p, int64_t choices) {
    p->rows = test_filled(i32_like(p->in[4]), 0);
    p->offsets = test_filled(i32_like(f64_1d(MOE_EXPERTS)), 0);
    for (int i = 0; i < MOE_TOKENS * MOE_EXPERTS; i++) {
        int s = i / MOE_EXPERTS, e = i % MOE_EXPERTS;
        if (naive_rank((double *)p->in[4].data + s * MOE_EXPERTS, e) >= choices)
            continue;
        test_set(p->rows, i, 1);
        test_set(p->offsets, e, test_get(p->offsets, e) + 1);
    }
}

static void check_moe(const char *name, struct tensor logits, int64_t choices, bool normalize) {
    struct problem p = {.name = name, .loss = naive_moe_loss, .normalize = normalize, .scales = {0.03, 0.01}};
    p.in[0] = test_random(f64_2d(MOE_TOKENS, MOE_WIDTH), 1);
    p.in[1] = test_random(f64_3d(MOE_EXPERTS, MOE_HIDDEN, MOE_WIDTH), 0.7);
    p.in[2] = test_random(p.in[1], 0.7);
    p.in[3] = test_random(f64_3d(MOE_EXPERTS, MOE_WIDTH, MOE_HIDDEN), 0.7);
    p.in[4] = logits;
    p.coefficient = test_random(p.in[0], 1);
    hold_choice(&p, choices);
    struct moe m = {.y = test_tensor(p.in[0]),
                    .dx = test_tensor(p.in[0]),
                    .dgate = sum_like(p.in[1]),
                    .dup = sum_like(p.in[2]),
                    .ddown = sum_like(p.in[3]),
                    .dlogits = test_tensor(logits)};
    moe_layer(&p, choices, &m);

    double y[MOE_TOKENS * MOE_WIDTH];
    naive_moe(&p, y);
    for (int i = 0; i < MOE_TOKENS * MOE_WIDTH; i++)
        assert_true(fabs(test_get(m.y, i) - y[i]) < 1e-13);
    check_gradient(&p, "x", p.in[0], m.dx, 0);
    check_gradient(&p, "gate weights", p.in[1], m.dgate, SUM_START);
    check_gradient(&p, "up weights", p.in[2], m.dup, SUM_START);
    check_gradient(&p, "down weights", p.in[3], m.ddown, SUM_START);
    check_gradient(&p, "router logits", p.in[4], m.dlogits, 0);
}

static struct tensor equal_logits(double low, double high) {
    struct tensor logits = test_tensor(f64_2d(MOE_TOKENS, MOE_EXPERTS));
    for (int i = 0; i < MOE_TOKENS * MOE_EXPERTS; i++)
        test_set(logits, i, i % MOE_EXPERTS == 2 ? high : low);
    return logits;
}

static void test_moe(void **state) {
    (void)state;
    for (int normalize = 0; normalize < 2; normalize++)
        for (int64_t choices = 1; choices <= MOE_EXPERTS; choices++) {
            check_moe("moe", distinct_logits(MOE_TOKENS, MOE_EXPERTS), choices, normalize);
            check_moe("moe, equal scores", equal_logits(0.5, 0.5), choices, normalize);
            check_moe("moe, all on one expert first", equal_logits(-1, 1), choices, normalize);
            check_moe("moe, an expert without tokens", equal_logits(0.5, -3), choices, normalize);
        }
}

int main(void) {
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_gemm, finish),
        cmocka_unit_test_teardown(test_grouped, finish),
        cmocka_unit_test_teardown(test_rmsnorm, finish),
        cmocka_unit_test_teardown(test_qknorm_rope, finish),
        cmocka_unit_test_teardown(test_rope_turns_pairs, finish),
        cmocka_unit_test_teardown(test_attention, finish),
        cmocka_unit_test_teardown(test_attention_of_last_queries, finish),
        cmocka_unit_test_teardown(test_attention_by_hand, finish),
        cmocka_unit_test_teardown(test_router, finish),
        cmocka_unit_test_teardown(test_router_ties, finish),
        cmocka_unit_test_teardown(test_router_stats, finish),
        cmocka_unit_test_teardown(test_route_sort, finish),
        cmocka_unit_test_teardown(test_combine_rows, finish),
        cmocka_unit_test_teardown(test_swiglu, finish),
        cmocka_unit_test_teardown(test_embedding, finish),
        cmocka_unit_test_teardown(test_cross_entropy, finish),
        cmocka_unit_test_teardown(test_adamw, finish),
        cmocka_unit_test_teardown(test_moe, finish),
    };
    ref = kernels_ref();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
