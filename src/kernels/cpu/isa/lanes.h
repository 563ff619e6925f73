/* Vectors of floats as wide as the instruction set has them, by the compiler's vector extension: one source for all.
 * Private to kernels/cpu/isa/. */
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/cpu/slots.h"
#include "kernels/kernels.h"
#include <math.h>
#include <string.h>

#if defined(__AVX512F__)
enum { LANES = 16, TILE_ROWS = 12 };
#elif defined(__AVX2__)
enum { LANES = 8, TILE_ROWS = 6 };
#else
enum { LANES = 4, TILE_ROWS = 4 };
#endif
enum { TILE_COLUMNS = 2 * LANES };

typedef float vfloat __attribute__((vector_size(LANES * 4)));
typedef int32_t vint __attribute__((vector_size(LANES * 4)));

static inline vfloat vload(const float *p) {
    vfloat v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void vstore(float *p, vfloat v) {
    memcpy(p, &v, sizeof v);
}

static inline vfloat vset(float x) {
    return x - (vfloat){0};
}

/* Lanes added in a fixed tree. */
static inline float vsum(vfloat v) {
    float lanes[LANES];
    vstore(lanes, v);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++)
            lanes[i] += lanes[i + width];
    return lanes[0];
}

/* exp(x), relative error below 2e-7 where the result is normal; 0 far below, infinity far above, NaN for NaN.
 * x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) by its Taylor polynomial, 2^n put into the exponent. */
static inline float fast_exp(float x) {
    float bounded = x < -87.3f ? -87.3f : x > 88.7f ? 88.7f : x;
    float n = rintf(bounded * 1.44269504f);
    float r = fmaf(n, -0.693359375f, bounded);
    r = fmaf(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = fmaf(p, r, 1.3981999507e-3f);
    p = fmaf(p, r, 8.3334519073e-3f);
    p = fmaf(p, r, 4.1665795894e-2f);
    p = fmaf(p, r, 1.6666665459e-1f);
    p = fmaf(p, r, 5.0000001201e-1f);
    p = fmaf(p * r, r, r) + 1.0f;
    union {
        int32_t i;
        float f;
    } half = {((int32_t)n / 2 + 127) << 23}, rest = {((int32_t)n - (int32_t)n / 2 + 127) << 23};
    float value = p * half.f * rest.f;
    value = x < -87.3f ? 0.0f : value;
    value = x > 88.73f ? INFINITY : value;
    return x != x ? x : value;
}

static inline float load_bf16(uint16_t bits) {
    union {
        uint32_t u;
        float f;
    } v = {(uint32_t)bits << 16};
    return v.f;
}

/* A row of floats of either dtype as f32: itself, or converted into `buffer`. */
static inline const float *row_as_float(struct tensor t, int64_t row, int64_t columns, float *buffer) {
    if (t.dtype == DTYPE_F32)
        return (const float *)t.data + row * columns;
    const uint16_t *from = (const uint16_t *)t.data + row * columns;
    for (int64_t i = 0; i < columns; i++)
        buffer[i] = load_bf16(from[i]);
    return buffer;
}

/* Round to nearest even; branch-free, so that the loop around it becomes vectors. */
static inline uint16_t round_bf16(float value) {
    union {
        float f;
        uint32_t u;
    } v = {value};
    uint32_t rounded = (v.u + 0x7FFFu + (v.u >> 16 & 1u)) >> 16, quiet = v.u >> 16 | 0x40u;
    return (uint16_t)(value != value ? quiet : rounded);
}

static inline void store_row(struct tensor t, int64_t row, int64_t columns, const float *values) {
    if (t.dtype == DTYPE_F32) {
        float *to = (float *)t.data + row * columns;
        if (to != values)
            memcpy(to, values, (size_t)columns * sizeof *to);
        return;
    }
    uint16_t *to = (uint16_t *)t.data + row * columns;
    for (int64_t i = 0; i < columns; i++)
        to[i] = round_bf16(values[i]);
}

static inline bool is_f64(struct tensor t) {
    return t.dtype == DTYPE_F64;
}

static inline bool is_fast(struct tensor t) {
    return t.dtype == DTYPE_F32 || t.dtype == DTYPE_BF16;
}

static inline int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}
