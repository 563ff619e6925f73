/* The outer step's codec and update.
 *
 * The format is checked against the words of kernels/outer_wire.h with the reference; every backend is then held to the
 * reference bit by bit, whole messages included, for sizes around blocks and tasks, for numbers of every kind and for 1
 * to 4 threads.
 */
#include "base/threads.h"
#include "kernels/kernels_testing.h"

#include <float.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <cmocka.h>

enum { THREADS_MAX = 4, TASK = 1 << 15 };

#define COUNT(array) (sizeof(array) / sizeof *(array))

static struct tensor f32s(int64_t n) {
    return test_tensor(tensor_1d(NULL, DTYPE_F32, n));
}

static struct tensor zeros(enum dtype dtype, int64_t n) {
    return test_filled(tensor_1d(NULL, dtype, n), 0);
}

/* Memory of exactly the bytes of a message, between guards, at an address that is aligned to nothing. */
static uint8_t *take_wire(enum outer_format format, int64_t n) {
    struct tensor t = test_tensor(tensor_1d(NULL, DTYPE_BF16, ((int64_t)outer_wire_bytes(format, n) + 3) / 2));
    size_t spare = tensor_bytes(t) - outer_wire_bytes(format, n);
    uint8_t *end = (uint8_t *)t.data + tensor_bytes(t);
    memset(t.data, 0xA5, spare);
    return end - outer_wire_bytes(format, n);
}

static bool same_bytes(const uint8_t *a, const uint8_t *b, enum outer_format format, int64_t n) {
    return memcmp(a, b, outer_wire_bytes(format, n)) == 0;
}

static double stat(struct tensor stats, int which) {
    return test_get(stats, which);
}

/* The difference of `d` and 0 encoded by the reference, decoded again in place. Returns the stats. */
static struct tensor through_ref(enum outer_format format, struct tensor d) {
    int64_t n = tensor_elements(d);
    struct tensor stats = zeros(DTYPE_F64, OUTER_STATS);
    uint8_t *wire = take_wire(format, n);
    kernels_ref()->outer_encode(d, zeros(DTYPE_F32, n), format, wire, stats);
    kernels_ref()->outer_decode_add(wire, format, d, false);
    return stats;
}

static void for_every_backend(void (*test)(const struct kernel_ops *ops)) {
    for (const struct kernel_ops *const *ops = test_backends(); *ops; ops++) {
        test(*ops);
        test_release();
    }
}

/* ---- the format ---- */

static void test_wire_bytes(void **state) {
    (void)state;
    static const struct {
        int64_t n;
        size_t bytes[OUTER_FORMATS];
    } cases[] = {{0, {0, 0, 0, 0}},
                 {1, {4, 2, 33, 17}},
                 {31, {124, 62, 33, 17}},
                 {32, {128, 64, 33, 17}},
                 {33, {132, 66, 66, 34}},
                 {64, {256, 128, 66, 34}},
                 {1 << 20, {4 << 20, 2 << 20, 33 << 15, 17 << 15}}};
    for (size_t i = 0; i < COUNT(cases); i++)
        for (int format = 0; format < OUTER_FORMATS; format++)
            assert_int_equal(outer_wire_bytes((enum outer_format)format, cases[i].n), cases[i].bytes[format]);
    double payload = (1 << 20) / 2.0, scales = (double)outer_wire_bytes(OUTER_FP4, 1 << 20) - payload;
    assert_true(scales / payload <= 0.065);
}

/* One byte, one code of a block whose first difference fixes the scale at 127: where it lies, what it is worth. */
static void test_layout(void **state) {
    (void)state;
    struct tensor d = zeros(DTYPE_F32, 40);
    float *x = d.data;
    x[0] = 1, x[2] = -0.5f, x[16] = 0.25f, x[31] = -1, x[33] = 8;
    uint8_t *wire = take_wire(OUTER_FP4, 40),
            expected[34] = {[0] = 7 | 5 << 4, [2] = 8 | 6, [15] = (8 | 7) << 4, [17] = 7, [32] = 127, [33] = 130};
    kernels_ref()->outer_encode(d, zeros(DTYPE_F32, 40), OUTER_FP4, wire, zeros(DTYPE_F64, OUTER_STATS));
    assert_memory_equal(wire, expected, sizeof expected);
    uint8_t *wide = take_wire(OUTER_FP8, 40),
            wider[66] = {
                [0] = 0x78, [2] = 0x80 | 0x70, [16] = 0x68, [31] = 0x80 | 0x78, [33] = 0x78, [64] = 127, [65] = 130};
    kernels_ref()->outer_encode(d, zeros(DTYPE_F32, 40), OUTER_FP8, wide, zeros(DTYPE_F64, OUTER_STATS));
    assert_memory_equal(wide, wider, sizeof wider);
    test_release();
}

/* A message of every code beside the largest one, decoded and encoded again, at every scale but 254: there the largest
 * code is beyond what is encoded. */
static void check_codes(const struct kernel_ops *ops, enum outer_format format, int codes, int top, int least_scale) {
    int blocks = (codes + 29) / 30;
    int64_t n = (int64_t)blocks * OUTER_BLOCK;
    for (int scale = least_scale; scale <= 253; scale++) {
        uint8_t *wire = take_wire(format, n), *again = take_wire(format, n);
        memset(wire, 0, outer_wire_bytes(format, n));
        for (int i = 0; i < blocks * 30; i++) {
            int code = i % codes, block = i / 30, place = 1 + i % 30;
            if (format == OUTER_FP8)
                wire[block * 32 + place] = (uint8_t)((code & 0x7F) == 0x7F ? 0 : code); /* NaN: no encoder writes it */
            else
                wire[block * 16 + place % 16] |= (uint8_t)(code << (place < 16 ? 0 : 4));
        }
        for (int block = 0; block < blocks; block++) {
            wire[(size_t)block * outer_code_bytes(format)] |= (uint8_t)top; /* difference 0 keeps the scale */
            wire[(size_t)blocks * outer_code_bytes(format) + (size_t)block] = (uint8_t)scale;
        }
        struct tensor value = f32s(n), stats = zeros(DTYPE_F64, OUTER_STATS);
        ops->outer_decode_add(wire, format, value, false);
        ops->outer_encode(value, zeros(DTYPE_F32, n), format, again, stats);
        assert_true(same_bytes(wire, again, format, n));
        assert_true(stat(stats, OUTER_FLUSHED) == 0 && stat(stats, OUTER_REFUSED) == 0);
        assert_true(test_guards_hold());
        test_release();
    }
}

static void check_all_codes(const struct kernel_ops *ops) {
    check_codes(ops, OUTER_FP4, 16, 7, 9);
    check_codes(ops, OUTER_FP8, 256, 0x7E, 18);
}

static void test_every_code_goes_round(void **state) {
    (void)state;
    for_every_backend(check_all_codes);
}

/* Values of the codes by a table written by hand, scale 1 = 2^0 at the top. */
static void check_values(const struct kernel_ops *ops) {
    static const float powers[8] = {0, 1 / 64.0f, 1 / 32.0f, 1 / 16.0f, 1 / 8.0f, 1 / 4.0f, 1 / 2.0f, 1};
    uint8_t *wire = take_wire(OUTER_FP4, OUTER_BLOCK);
    for (int i = 0; i < 16; i++)
        wire[i] = (uint8_t)(i | (15 - i) << 4);
    wire[16] = 127;
    struct tensor value = f32s(OUTER_BLOCK);
    ops->outer_decode_add(wire, OUTER_FP4, value, false);
    for (int i = 0; i < 16; i++) {
        assert_true(test_get(value, i) == (i & 8 ? -powers[i & 7] : powers[i]));
        assert_true(test_get(value, 16 + i) == ((15 - i) & 8 ? -powers[(15 - i) & 7] : powers[15 - i]));
    }
    static const uint8_t codes[] = {0x01, 0x07, 0x08, 0x0F, 0x38, 0x39, 0x7E, 0xFE, 0x7F};
    static const double worth[] = {1 / 512.0, 7 / 512.0, 8 / 512.0, 15 / 512.0, 1, 1.125, 448, -448};
    uint8_t *wide = take_wire(OUTER_FP8, OUTER_BLOCK);
    memset(wide, 0, 33);
    memcpy(wide, codes, sizeof codes);
    wide[32] = 135;
    ops->outer_decode_add(wide, OUTER_FP8, value, false);
    for (size_t i = 0; i < COUNT(worth); i++)
        assert_true(test_get(value, (int64_t)i) == worth[i]);
    assert_true(isnan(test_get(value, 8)));
}

static void test_values(void **state) {
    (void)state;
    for_every_backend(check_values);
}

/* What is nearest, at both sides of every boundary between codes. */
static void test_boundaries(void **state) {
    (void)state;
    const float up = 0x1.715476p0f, down = nextafterf(up, 0);
    float x[] = {1, up / 2, down / 2, up / 4, up / 256, down / 256, -down / 256, -down / 64, -up / 64, down / 128};
    const float nearest[] = {1, 1, 0.5f, 0.5f, 0x1p-6f, 0, -0.0f, -0x1p-6f, -0x1p-5f, 0x1p-6f};
    struct tensor stats = through_ref(OUTER_FP4, tensor_1d(x, DTYPE_F32, COUNT(x)));
    for (size_t i = 0; i < COUNT(x); i++)
        assert_true(x[i] == nearest[i] && signbit(x[i]) == signbit(nearest[i]));
    assert_true(stat(stats, OUTER_FLUSHED) == 2);
    /* fp8: ties go to even; 464 still fits, what is above takes the next scale. */
    float y[] = {464, 400, 1.0625f, 1.1875f, 0x1p-10f, nextafterf(0x1p-10f, 1), -3 * 0x1p-10f};
    const float even[] = {448, 384, 1, 1.25f, 0, 0x1p-9f, -4 * 0x1p-10f};
    stats = through_ref(OUTER_FP8, tensor_1d(y, DTYPE_F32, COUNT(y)));
    for (size_t i = 0; i < COUNT(y); i++)
        assert_true(y[i] == even[i]);
    assert_true(stat(stats, OUTER_FLUSHED) == 1);
    float z[] = {nextafterf(464, 500), 0x1p-9f};
    through_ref(OUTER_FP8, tensor_1d(z, DTYPE_F32, COUNT(z)));
    assert_true(z[0] == 480 && z[1] == 0);
    test_release();
}

/* ---- errors ---- */

/* Normal differences: the largest relative error of what is not flushed, the bias of the sum of magnitudes. */
static void measure(enum outer_format format, double sigma, double *worst, double *mean, double *bias) {
    enum { N = 1 << 16 };
    struct tensor d = test_random(tensor_1d(NULL, DTYPE_F32, N), sigma), exact = test_copy(d, DTYPE_F32);
    double sum = 0, kept = 0, error_sum = 0;
    *worst = 0;
    through_ref(format, d);
    for (int64_t i = 0; i < N; i++) {
        double x = test_get(exact, i), y = test_get(d, i), error = fabs(y - x) / fabs(x);
        sum += fabs(x);
        kept += fabs(y);
        error_sum += error;
        if (fabs(x) > sigma / 8) /* small ones lose bits to the block's scale */
            *worst = fmax(*worst, error);
    }
    *mean = error_sum / N;
    *bias = kept / sum - 1;
    test_release();
}

static void test_error_bounds(void **state) {
    (void)state;
    /* Half a unit in the last place, by the mantissa; fp4: 1 - ln 2 where it rounds down, 2 ln 2 - 1 where up. */
    static const double worst_allowed[OUTER_FORMATS] = {0, 1 / 256.0, 1 / 16.0, 0.3863};
    static const double mean_allowed[OUTER_FORMATS] = {0, 0.0016, 0.026, 0.2};
    static const double bias_allowed[OUTER_FORMATS] = {0, 1e-4, 2e-3, 4e-3};
    for (int format = 0; format < OUTER_FORMATS; format++) {
        double bias_sum = 0;
        for (int step = 0; step < 8; step++) {
            double worst, mean, bias;
            measure((enum outer_format)format, 1e-3 * exp2(step / 8.0), &worst, &mean, &bias);
            assert_true(worst <= worst_allowed[format] && mean <= mean_allowed[format]);
            assert_true(fabs(bias) <= bias_allowed[format]);
            bias_sum += bias;
        }
        assert_true(fabs(bias_sum / 8) <= bias_allowed[format] / 2);
    }
}

/* ---- hard numbers ---- */

/* `count` numbers of which `refused` may not travel: they are counted, and nothing else suffers. */
static void check_refused_numbers(const struct kernel_ops *ops, enum outer_format format, const float *g,
                                  const float *l, int64_t count, int refused) {
    uint8_t *wire = take_wire(format, count);
    struct tensor stats = zeros(DTYPE_F64, OUTER_STATS), to = f32s(count);
    const float *back = to.data;
    ops->outer_encode(test_numbers(g, DTYPE_F32, count), test_numbers(l, DTYPE_F32, count), format, wire, stats);
    ops->outer_decode_add(wire, format, to, false);
    assert_true(stat(stats, OUTER_REFUSED) == refused && isfinite(stat(stats, OUTER_SQUARES)));
    for (int64_t i = 0; i < count; i++) {
        bool good = fabsf(g[i] - l[i]) < 0x1p127f;
        assert_true(isfinite(back[i]) && (good ? back[i] >= 0x1.8p126f || count > 1 : back[i] == 0));
    }
}

/* Together, and each alone, where it is the largest of its block. */
static void check_refused(const struct kernel_ops *ops) {
    static const float g[] = {1, FLT_MAX, NAN, INFINITY, INFINITY, 0x1p127f, 0x1.fffffep126f, -FLT_MAX, 0};
    static const float l[] = {0.5f, -FLT_MAX, 0, 0, INFINITY, 0, 0, 0, -INFINITY};
    for (int format = 0; format < OUTER_FORMATS; format++) {
        check_refused_numbers(ops, (enum outer_format)format, g, l, COUNT(g), 7);
        for (size_t i = 1; i < COUNT(g); i++)
            check_refused_numbers(ops, (enum outer_format)format, g + i, l + i, 1, i != 6);
    }
}

static void test_refused(void **state) {
    (void)state;
    for_every_backend(check_refused);
}

/* An expert that was hardly used beside one that was: whole blocks of 1e-9 keep their values as blocks of 1 do. */
static void test_rare_experts(void **state) {
    (void)state;
    enum { BLOCKS = 8, N = BLOCKS * OUTER_BLOCK };
    for (int format = OUTER_BF16; format < OUTER_FORMATS; format++) {
        struct tensor d = test_random(tensor_1d(NULL, DTYPE_F32, N), 1);
        for (int64_t i = 0; i < N; i++)
            ((float *)d.data)[i] =
                copysignf(1 + fabsf(((float *)d.data)[i]), ((float *)d.data)[i]) * (i / OUTER_BLOCK % 2 ? 1e-9f : 1);
        struct tensor exact = test_copy(d, DTYPE_F32), stats = through_ref((enum outer_format)format, d);
        assert_true(stat(stats, OUTER_FLUSHED) == 0);
        for (int64_t i = 0; i < N; i++)
            assert_true(fabs(test_get(d, i) / test_get(exact, i) - 1) < 0.39);
    }
    /* In one block the tiny one goes, and is counted. */
    float mixed[] = {1, 1e-9f, 0, -1e-9f};
    struct tensor stats = through_ref(OUTER_FP4, tensor_1d(mixed, DTYPE_F32, 4));
    assert_true(mixed[0] == 1 && mixed[1] == 0 && mixed[3] == 0 && stat(stats, OUTER_FLUSHED) == 2);
    test_release();
}

/* ---- backends against the reference ---- */

enum kind { NORMAL, WIDE, ZEROS, EQUAL, TINY_BESIDE_HUGE, DENORMALS, SPECIAL, ANY_BITS, KINDS };

static float number(enum kind kind, int64_t i, bool local) {
    uint32_t bits = (uint32_t)(random_bits(11, test_seed, (uint64_t)i) >> 32);
    double normal = random_normal(7, test_seed, (uint64_t)i);
    static const float special[] = {
        0.0f,    -0.0f,  NAN,     INFINITY, -INFINITY,     FLT_MAX,       -FLT_MAX,  0x1p127f, 0x1.fffffep126f,
        FLT_MIN, 1e-45f, -1e-45f, 1,        0x1.715476p0f, 0x1.715474p0f, -0x1p-125f};
    float f;
    switch (kind) {
    case NORMAL:
        return (float)(1e-3 * normal);
    case WIDE:
        return (float)(normal * exp2((double)(bits % 256) - 128));
    case ZEROS:
        return bits % 2 ? -0.0f : 0.0f;
    case EQUAL:
        return local ? 0.25f : -0.5f;
    case TINY_BESIDE_HUGE:
        return i % OUTER_BLOCK == 7 ? 1e30f : 1e-30f;
    case DENORMALS:
        memcpy(&f, &(uint32_t){bits & 0x81FFFFFFu}, sizeof f);
        return local ? 0 : f;
    case SPECIAL:
        return local && bits % 4 ? 0 : special[bits / 4 % COUNT(special)];
    default:
        memcpy(&f, &bits, sizeof f);
        return local && i % 3 ? 0 : f;
    }
}

static struct tensor numbers(enum kind kind, int64_t n, bool local) {
    struct tensor t = f32s(n);
    for (int64_t i = 0; i < n; i++)
        ((float *)t.data)[i] = number(kind, i, local);
    return t;
}

static void check_stats(struct tensor found, struct tensor expected) {
    assert_true(stat(found, OUTER_FLUSHED) == stat(expected, OUTER_FLUSHED));
    assert_true(stat(found, OUTER_REFUSED) == stat(expected, OUTER_REFUSED));
    double squares = stat(expected, OUTER_SQUARES);
    assert_true(fabs(stat(found, OUTER_SQUARES) - squares) <= 1e-6 * squares); /* of 32 of them a backend has the sum in f32 */
}

static void check_sums(struct tensor found, struct tensor expected) {
    double scale = sqrt(test_get(expected, 1) * test_get(expected, 2));
    assert_true(fabs(test_get(found, 0) - test_get(expected, 0)) <= 1e-12 * scale);
    for (int i = 1; i < 3; i++)
        assert_true(fabs(test_get(found, i) - test_get(expected, i)) <= 1e-12 * test_get(expected, i));
}

struct codec_results {
    uint8_t *wire;
    struct tensor stats, plain, sum, sums;
};

static struct codec_results run_codec(const struct kernel_ops *ops, enum outer_format format, struct tensor global,
                                      struct tensor local, struct tensor before, const uint8_t *other) {
    int64_t n = tensor_elements(global);
    struct codec_results r = {take_wire(format, n), zeros(DTYPE_F64, OUTER_STATS), f32s(n),
                              test_copy(before, DTYPE_F32), zeros(DTYPE_F64, 3)};
    ops->outer_encode(global, local, format, r.wire, r.stats);
    ops->outer_decode_add(r.wire, format, r.plain, false);
    ops->outer_decode_add(r.wire, format, r.sum, true);
    ops->outer_dot(r.wire, other, format, n, r.sums);
    return r;
}

static void check_codec(const struct kernel_ops *ops, enum outer_format format, enum kind kind, int64_t n) {
    struct tensor global = numbers(kind, n, false), local = numbers(kind, n, true), before = numbers(NORMAL, n, false);
    uint8_t *other = take_wire(format, n);
    kernels_ref()->outer_encode(before, global, format, other, zeros(DTYPE_F64, OUTER_STATS));
    struct codec_results expected = run_codec(kernels_ref(), format, global, local, before, other), first = expected;
    for (int threads = 1, most = test_repetitions(ops, THREADS_MAX); threads <= most; threads++) {
        threads_set_count(threads);
        struct codec_results found = run_codec(ops, format, global, local, before, other);
        assert_true(same_bytes(found.wire, expected.wire, format, n));
        assert_memory_equal(found.plain.data, expected.plain.data, tensor_bytes(found.plain));
        assert_memory_equal(found.sum.data, expected.sum.data, tensor_bytes(found.sum));
        check_stats(found.stats, expected.stats);
        check_sums(found.sums, expected.sums);
        if (threads == 1)
            first = found;
        assert_memory_equal(first.stats.data, found.stats.data, tensor_bytes(found.stats));
        assert_memory_equal(first.sums.data, found.sums.data, tensor_bytes(found.sums));
        assert_true(test_guards_hold());
        if (n <= 1000 && threads == 2)
            break; /* one task */
    }
    test_release();
}

static void check_every_codec(const struct kernel_ops *ops) {
    static const int64_t sizes[] = {0,  1,  2,  15, 16,   17,       31,   32,       33,
                                    63, 64, 65, 95, 1000, TASK - 1, TASK, TASK + 1, 3 * TASK + 45};
    int64_t number = 0;
    for (size_t s = 0; s < COUNT(sizes); s++)
        for (int format = 0; format < OUTER_FORMATS; format++)
            for (int kind = 0; kind<KINDS; kind += sizes[s]> 1000 ? ANY_BITS : 1) /* many: the first and the last */
                if (test_takes(ops, number++))
                    check_codec(ops, (enum outer_format)format, (enum kind)kind, sizes[s]);
}

static void test_codec_of_every_backend(void **state) {
    (void)state;
    for_every_backend(check_every_codec);
}

/* Messages of three replicas, encoded in the order of arrival and added in that of the ranks: each addition is the one
 * of fp32. In f32, since sums of so few bits as the other formats have are mostly exact. */
static void check_rank_order(const struct kernel_ops *ops) {
    enum { N = 1000, M = 3 };
    uint8_t *wire[M];
    struct tensor sum = f32s(N), arrived = f32s(N), plain[M];
    for (int m = 0; m < M; m++) {
        wire[m] = take_wire(OUTER_F32, N);
        plain[m] = f32s(N);
    }
    for (int m = M - 1; m >= 0; m--) { /* as they arrive */
        ops->outer_encode(numbers(NORMAL, N, false), numbers(NORMAL, N, true), OUTER_F32, wire[m],
                          zeros(DTYPE_F64, OUTER_STATS));
        ops->outer_decode_add(wire[m], OUTER_F32, plain[m], false);
    }
    for (int m = 0; m < M; m++) {
        ops->outer_decode_add(wire[m], OUTER_F32, sum, m > 0);
        ops->outer_decode_add(wire[M - 1 - m], OUTER_F32, arrived, m > 0);
    }
    const float *x = plain[0].data, *y = plain[1].data, *z = plain[2].data, *found = sum.data;
    for (int64_t i = 0; i < N; i++)
        assert_true(found[i] == x[i] + y[i] + z[i]);
    assert_memory_not_equal(sum.data, arrived.data, tensor_bytes(sum)); /* why there is an order */
    ops->outer_decode_add(wire[0], OUTER_F32, sum, false);              /* of two there is none */
    ops->outer_decode_add(wire[1], OUTER_F32, sum, true);
    ops->outer_decode_add(wire[1], OUTER_F32, arrived, false);
    ops->outer_decode_add(wire[0], OUTER_F32, arrived, true);
    assert_memory_equal(sum.data, arrived.data, tensor_bytes(sum));
}

static void test_rank_order(void **state) {
    (void)state;
    for_every_backend(check_rank_order);
}

/* ---- the update ---- */

/* A few numbers by hand, exact in f32: M 2, lr 0.5, mu 0.5; then a quarter kept. */
static void check_update_by_hand(const struct kernel_ops *ops) {
    static const float start[][2] = {{4, -8}, {1, 2}, {2, 0}, {4, 0}};
    struct tensor t[4];
    for (int i = 0; i < 4; i++)
        t[i] = test_numbers(start[i], DTYPE_F32, 2);
    const float *global = t[1].data, *momentum = t[2].data, *local = t[3].data;
    ops->outer_update(t[0], (struct outer_settings){2, 0.5, 0.5}, t[1], t[2]);
    ops->outer_mix(t[1], 0.25, t[3]);
    assert_true(momentum[0] == 3 && momentum[1] == -4);
    assert_true(global[0] == 1 - 0.5f * (2 + 1.5f) && global[1] == 2 + 0.5f * (4 + 2));
    assert_true(local[0] == 1 + 0.75f * global[0] && local[1] == 0.75f * global[1]);
}

/* lr 1, mu 0, one replica, nothing kept: the weights are what they were, exactly where the difference is. */
static void check_identity(const struct kernel_ops *ops) {
    enum { N = 4000 };
    struct tensor global = numbers(NORMAL, N, false), local = f32s(N), sum = f32s(N), momentum = zeros(DTYPE_F32, N);
    float *g = global.data, *l = local.data;
    for (int64_t i = 0; i < N; i++)
        l[i] = i % 2 ? g[i] * (float)(0.51 + 1.48 * random_uniform(3, 0, (uint64_t)i)) : number(NORMAL, i, true);
    struct tensor old_global = test_copy(global, DTYPE_F32), old = test_copy(local, DTYPE_F32);
    uint8_t *wire = take_wire(OUTER_F32, N);
    ops->outer_encode(global, local, OUTER_F32, wire, zeros(DTYPE_F64, OUTER_STATS));
    ops->outer_decode_add(wire, OUTER_F32, sum, false);
    ops->outer_update(sum, (struct outer_settings){1, 1, 0}, global, momentum);
    ops->outer_mix(global, 0, local);
    assert_memory_equal(global.data, local.data, tensor_bytes(global));
    for (int64_t i = 0; i < N; i++) {
        double before = test_get(old, i), d = test_get(old_global, i) - before;
        double last_bits = 0.5 * FLT_EPSILON * (fabs(d) + fabs(l[i]));
        assert_true(i % 2 || (float)d == d ? l[i] == (float)before : fabs(l[i] - before) <= last_bits);
    }
}

/* Two replicas, lr 1, mu 0: the mean of their weights. */
static void check_mean(const struct kernel_ops *ops) {
    enum { N = 500 };
    struct tensor global = numbers(NORMAL, N, false), sum = f32s(N), momentum = zeros(DTYPE_F32, N), local[2];
    uint8_t *wire = take_wire(OUTER_F32, N);
    for (int m = 0; m < 2; m++) {
        local[m] = numbers(NORMAL, N, true);
        ops->outer_encode(global, local[m], OUTER_F32, wire, zeros(DTYPE_F64, OUTER_STATS));
        ops->outer_decode_add(wire, OUTER_F32, sum, m > 0);
    }
    struct tensor mean = f32s(N);
    for (int64_t i = 0; i < N; i++)
        test_set(mean, i, 0.5 * (test_get(local[0], i) + test_get(local[1], i)));
    ops->outer_update(sum, (struct outer_settings){2, 1, 0}, global, momentum);
    for (int64_t i = 0; i < N; i++)
        assert_true(fabs(test_get(global, i) - test_get(mean, i)) < 1e-9);
}

static void check_update(const struct kernel_ops *ops, int64_t n, struct outer_settings settings, double keep) {
    struct tensor sum = numbers(NORMAL, n, false), start[3], expected[3], found[3];
    for (int i = 0; i < 3; i++) {
        start[i] = numbers(NORMAL, n, i % 2);
        expected[i] = test_copy(start[i], DTYPE_F32);
    }
    kernels_ref()->outer_update(sum, settings, expected[0], expected[1]);
    kernels_ref()->outer_mix(expected[0], keep, expected[2]);
    for (int threads = 1, most = test_repetitions(ops, THREADS_MAX); threads <= most; threads++) {
        threads_set_count(threads);
        for (int i = 0; i < 3; i++)
            found[i] = test_copy(start[i], DTYPE_F32);
        ops->outer_update(sum, settings, found[0], found[1]);
        ops->outer_mix(found[0], keep, found[2]);
        for (int i = 0; i < 3; i++)
            assert_memory_equal(found[i].data, expected[i].data, tensor_bytes(expected[i]));
        assert_true(test_guards_hold());
    }
    test_release();
}

static void check_every_update(const struct kernel_ops *ops) {
    static const int64_t sizes[] = {0, 1, 7, 33, 1000, TASK + 5, 2 * TASK + 1};
    static const struct outer_settings settings[] = {
        {1, 1, 0}, {2, 0.4, 0.9}, {3, 0.7, 0.9}, {8, 0.8, 0.5}, {7, 0.4, 0.9}};
    static const double keep[] = {0, 0.5, 0, 1, 0.3};
    for (size_t s = 0; s < COUNT(sizes); s++)
        for (size_t i = 0; i < COUNT(settings); i++)
            check_update(ops, sizes[s], settings[i], keep[i]);
}

static void test_update(void **state) {
    (void)state;
    for_every_backend(check_update_by_hand);
    for_every_backend(check_identity);
    for_every_backend(check_mean);
    for_every_backend(check_every_update);
}

int main(void) {
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_wire_bytes),
        cmocka_unit_test(test_layout),
        cmocka_unit_test(test_every_code_goes_round),
        cmocka_unit_test(test_values),
        cmocka_unit_test(test_boundaries),
        cmocka_unit_test(test_error_bounds),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_rare_experts),
        cmocka_unit_test(test_codec_of_every_backend),
        cmocka_unit_test(test_rank_order),
        cmocka_unit_test(test_update),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
