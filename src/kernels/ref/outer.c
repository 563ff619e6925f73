/* The outer step: differences to bytes and back, and what is done with their sum. Codes are found here as the page on the
 * format says it (kernels/outer_wire.h), in double; the update is in float, operation by operation as kernels.h has it. */
#include "kernels/ref/ref.h"

#include <string.h>

static const double REFUSED_FROM = 0x1p127, POWER_MIDPOINT = 0x1.715476p0 /* 1/ln 2 as a float */;
enum { FP4_SCALE_LEAST = 9, FP8_SCALE_LEAST = 18, FP8_NAN = 0x7F };

static bool is_f32(struct tensor t, int64_t n) {
    return t.dtype == DTYPE_F32 && ref_is_1d(t, n);
}

/* ---- fp4 ---- */

/* The exponent of the power of two that a magnitude above 0 rounds to. */
static int round_to_power(double magnitude) {
    int exponent;
    double mantissa = 2 * frexp(magnitude, &exponent);
    return exponent - 1 + (mantissa >= POWER_MIDPOINT);
}

static int fp4_scale(double largest) {
    int scale = largest > 0 ? round_to_power(largest) + 127 : 0;
    return scale > FP4_SCALE_LEAST ? scale : FP4_SCALE_LEAST;
}

static int fp4_code(double magnitude, int scale) {
    int code = magnitude > 0 ? round_to_power(magnitude) - (scale - 134) : -1;
    return code > 0 ? code : code == 0 ? 1 : 0;
}

static double fp4_value(int code, int scale) {
    return code ? ldexp(1, scale + code - 134) : 0;
}

/* ---- fp8 ---- */

static int fp8_scale(double largest) {
    int exponent;
    double mantissa = 2 * frexp(largest, &exponent);
    int scale = largest > 0 ? exponent - 1 + (mantissa > 464.0 / 256) + 127 : 0;
    return scale > FP8_SCALE_LEAST ? scale : FP8_SCALE_LEAST;
}

/* Eighths of the power of two below the magnitude, of 2^-6 where that is larger. */
static int fp8_code(double magnitude, int scale) {
    double x = ldexp(magnitude, 135 - scale);
    int exponent = x < 0x1p-6 ? -6 : ilogb(x);
    return (int)rint(ldexp(x, 3 - exponent)) + 8 * (exponent + 6);
}

static double fp8_value(int code, int scale) {
    int exponent = code >> 3, mantissa = code & 7;
    if (code == FP8_NAN)
        return NAN;
    double value = exponent ? ldexp(8 + mantissa, exponent - 10) : ldexp(mantissa, -9);
    return ldexp(value, scale - 135);
}

/* ---- blocks ---- */

static double block_largest(const float *difference) {
    double largest = 0;
    for (int i = 0; i < OUTER_BLOCK; i++)
        largest = fmax(largest, fabs((double)difference[i]));
    return largest;
}

static uint8_t *scale_of(const void *wire, enum outer_format format, int64_t n, int64_t block) {
    return (uint8_t *)wire + (size_t)outer_block_count(n) * outer_code_bytes(format) + block;
}

static void encode_fp8(const float *difference, uint8_t *codes, uint8_t *scale) {
    *scale = (uint8_t)fp8_scale(block_largest(difference));
    for (int i = 0; i < OUTER_BLOCK; i++)
        codes[i] = (uint8_t)(fp8_code(fabs((double)difference[i]), *scale) | (signbit(difference[i]) ? 0x80 : 0));
}

static void encode_fp4(const float *difference, uint8_t *codes, uint8_t *scale) {
    *scale = (uint8_t)fp4_scale(block_largest(difference));
    memset(codes, 0, OUTER_BLOCK / 2);
    for (int i = 0; i < OUTER_BLOCK; i++) {
        int code = fp4_code(fabs((double)difference[i]), *scale) | (signbit(difference[i]) ? 8 : 0);
        codes[i % (OUTER_BLOCK / 2)] |= (uint8_t)(i < OUTER_BLOCK / 2 ? code : code << 4);
    }
}

/* Differences of block `block`, `count` of them, to their places in the message. */
static void encode_block(const float *difference, enum outer_format format, int64_t n, int64_t block, int64_t count,
                         void *wire) {
    uint8_t *codes = (uint8_t *)wire + (size_t)block * outer_code_bytes(format);
    uint16_t halves[OUTER_BLOCK];
    switch (format) {
    case OUTER_F32:
        memcpy(codes, difference, (size_t)count * sizeof *difference);
        break;
    case OUTER_BF16:
        for (int64_t i = 0; i < count; i++)
            halves[i] = float_to_bf16(difference[i]);
        memcpy(codes, halves, (size_t)count * sizeof *halves);
        break;
    case OUTER_FP8:
        encode_fp8(difference, codes, scale_of(wire, format, n, block));
        break;
    default:
        encode_fp4(difference, codes, scale_of(wire, format, n, block));
    }
}

/* Difference i of a message of n. */
static float decode(const void *wire, enum outer_format format, int64_t n, int64_t i) {
    const uint8_t *bytes = wire;
    int64_t block = i / OUTER_BLOCK, place = i % OUTER_BLOCK;
    const uint8_t *codes = bytes + (size_t)block * outer_code_bytes(format);
    uint16_t half;
    float value;
    int code;
    switch (format) {
    case OUTER_F32:
        memcpy(&value, bytes + 4 * i, sizeof value);
        return value;
    case OUTER_BF16:
        memcpy(&half, bytes + 2 * i, sizeof half);
        return bf16_to_float(half);
    case OUTER_FP8:
        code = codes[place];
        value = (float)fp8_value(code & 0x7F, *scale_of(wire, format, n, block));
        return code & 0x80 ? -value : value;
    default:
        code = codes[place % 16] >> (place < 16 ? 0 : 4) & 15;
        value = (float)fp4_value(code & 7, *scale_of(wire, format, n, block));
        return code & 8 ? -value : value;
    }
}

/* ---- operations ---- */

void ref_outer_encode(struct tensor global, struct tensor local, enum outer_format format, void *wire,
                      struct tensor stats) {
    int64_t n = tensor_elements(global);
    CHECK(is_f32(global, n) && is_f32(local, n));
    CHECK(stats.dtype == DTYPE_F64 && ref_is_1d(stats, OUTER_STATS));
    for (int64_t block = 0; block < outer_block_count(n); block++) {
        int64_t first = block * OUTER_BLOCK, count = n - first < OUTER_BLOCK ? n - first : OUTER_BLOCK;
        float difference[OUTER_BLOCK] = {0};
        for (int64_t i = 0; i < count; i++) {
            difference[i] = ((const float *)global.data)[first + i] - ((const float *)local.data)[first + i];
            if (!(fabs((double)difference[i]) < REFUSED_FROM)) {
                difference[i] = 0;
                ref_add(stats, OUTER_REFUSED, 1);
            }
            ref_add(stats, OUTER_SQUARES, (double)difference[i] * difference[i]);
        }
        encode_block(difference, format, n, block, count, wire);
        for (int64_t i = 0; i < count; i++)
            if (difference[i] != 0 && decode(wire, format, n, first + i) == 0)
                ref_add(stats, OUTER_FLUSHED, 1);
    }
}

void ref_outer_decode_add(const void *wire, enum outer_format format, struct tensor sum, bool accumulate) {
    int64_t n = tensor_elements(sum);
    CHECK(is_f32(sum, n));
    float *to = sum.data;
    for (int64_t i = 0; i < n; i++) {
        float value = decode(wire, format, n, i);
        to[i] = accumulate ? to[i] + value : value;
    }
}

void ref_outer_update(struct tensor sum, struct outer_settings settings, struct tensor global, struct tensor momentum) {
    int64_t n = tensor_elements(sum);
    CHECK(is_f32(sum, n) && is_f32(global, n) && is_f32(momentum, n));
    CHECK(settings.replica_count >= 1);
    float replicas = (float)settings.replica_count, lr = (float)settings.lr, mu = (float)settings.momentum;
    const float *total = sum.data;
    float *g = global.data, *b = momentum.data;
    for (int64_t i = 0; i < n; i++) {
        float delta = total[i] / replicas;
        b[i] = mu * b[i] + delta;
        g[i] = g[i] - lr * (delta + mu * b[i]);
    }
}

void ref_outer_mix(struct tensor global, double keep, struct tensor local) {
    int64_t n = tensor_elements(global);
    CHECK(is_f32(global, n) && is_f32(local, n));
    CHECK(keep >= 0 && keep <= 1);
    float kept = (float)keep, taken = (float)(1 - keep);
    const float *g = global.data;
    float *own = local.data;
    for (int64_t i = 0; i < n; i++)
        own[i] = keep == 0 ? g[i] : kept * own[i] + taken * g[i];
}

void ref_outer_dot(const void *a, const void *b, enum outer_format format, int64_t n, struct tensor sums) {
    CHECK(sums.dtype == DTYPE_F64 && ref_is_1d(sums, 3));
    for (int64_t i = 0; i < n; i++) {
        double x = decode(a, format, n, i), y = decode(b, format, n, i);
        ref_add(sums, 0, x * y);
        ref_add(sums, 1, x * x);
        ref_add(sums, 2, y * y);
    }
}
