/* Vectors as wide as the instruction set that a copy is compiled for. Private to kernels/cpu/isa/.
 *
 * GCC vector extensions: the compiler turns them into this instruction set's instructions, but for the few that it does
 * not find by itself. Loads and stores need no alignment. A "word" is 32 bits: a float, or two neighbouring bf16.
 */
#pragma once

#include "tensor/tensor.h"

#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { VECTOR_LANES = 16 };
#elif defined(__AVX2__)
enum { VECTOR_LANES = 8 };
#else
enum { VECTOR_LANES = 4 };
#endif

/* True where bf16 multiply in tiles, see amx.h. */
#ifdef __AMX_BF16__
enum { BF16_TILES = 1 };
#else
enum { BF16_TILES = 0 };
#endif

/* True where two neighbouring bf16 of each operand multiply and add in one instruction. */
#ifdef __AVX512BF16__
enum { BF16_PAIRS = 1 };
#else
enum { BF16_PAIRS = 0 };
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline))
/* A function of a header that is too large to inline everywhere, and that not every file calls. */
#define HEADER_FUNCTION static __attribute__((unused))

typedef float vector_f32 __attribute__((vector_size(4 * VECTOR_LANES)));
typedef uint32_t vector_u32 __attribute__((vector_size(4 * VECTOR_LANES)));
typedef int32_t vector_i32 __attribute__((vector_size(4 * VECTOR_LANES))); /* comparisons give 0 or -1 a lane */
typedef uint16_t vector_u16 __attribute__((vector_size(2 * VECTOR_LANES)));
typedef uint8_t vector_u8 __attribute__((vector_size(VECTOR_LANES)));
typedef double vector_f64 __attribute__((vector_size(4 * VECTOR_LANES))); /* half as many lanes */
typedef float half_vector __attribute__((vector_size(2 * VECTOR_LANES)));

ALWAYS_INLINE vector_f32 vector_load(const void *from) {
    vector_f32 v;
    memcpy(&v, from, sizeof v);
    return v;
}

ALWAYS_INLINE void vector_store(void *to, vector_f32 v) {
    memcpy(to, &v, sizeof v);
}

/* Past the caches, to an address of whole vectors: for what nobody reads soon. (A store into a cache reads the line first.) Other
 * threads may read it after vector_stream_end. */
ALWAYS_INLINE void vector_stream(void *to, vector_f32 v) {
#ifdef __AVX512F__
    _mm512_stream_ps(to, (__m512)v);
#else
    vector_store(to, v);
#endif
}

ALWAYS_INLINE void vector_stream_end(void) {
#ifdef __AVX512F__
    _mm_sfence();
#endif
}

/* One word in every lane. As an integer where it is a pair: arithmetic on floats may change the bits of a NaN. */
ALWAYS_INLINE vector_f32 vector_splat_word(bool pairs, const float *word) {
    uint32_t bits;
    memcpy(&bits, word, sizeof bits);
    return pairs ? (vector_f32)(bits + (vector_u32){0}) : *word - (vector_f32){0};
}

/* One instruction; the compiler makes four of a __builtin_convertvector. */
ALWAYS_INLINE vector_u32 vector_widen(vector_u16 v) {
#if defined(__AVX512F__)
    return (vector_u32)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
    return (vector_u32)_mm256_cvtepu16_epi32((__m128i)v);
#else
    return __builtin_convertvector(v, vector_u32);
#endif
}

ALWAYS_INLINE vector_u32 vector_load_u16(const uint16_t *from) {
    vector_u16 v;
    memcpy(&v, from, sizeof v);
    return vector_widen(v);
}

/* VECTOR_LANES bf16 as floats. */
ALWAYS_INLINE vector_f32 vector_load_bf16(const uint16_t *from) {
    return (vector_f32)(vector_load_u16(from) << 16);
}

/* VECTOR_LANES bytes, one a lane. */
ALWAYS_INLINE vector_u32 vector_load_u8(const uint8_t *from) {
#if defined(__AVX512F__)
    return (vector_u32)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif defined(__AVX2__)
    return (vector_u32)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    vector_u8 v;
    memcpy(&v, from, sizeof v);
    return __builtin_convertvector(v, vector_u32);
#endif
}

/* The lower and the upper half of the lanes in double. */
ALWAYS_INLINE void vector_to_f64(vector_f32 v, vector_f64 to[2]) {
    half_vector halves[2];
    memcpy(halves, &v, sizeof v);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
#if defined(__AVX512F__) /* the compiler makes two instructions and a merge of it */
        to[i] = (vector_f64)_mm512_cvtps_pd((__m256)halves[i]);
#elif defined(__AVX2__)
        to[i] = (vector_f64)_mm256_cvtps_pd((__m128)halves[i]);
#else
        to[i] = __builtin_convertvector(halves[i], vector_f64);
#endif
    }
}

/* sum += a * b in one rounding, or in two: the same for a and b that were floats, their product is exact. */
ALWAYS_INLINE vector_f64 vector_multiply_add_f64(vector_f64 a, vector_f64 b, vector_f64 sum) {
#if defined(__AVX512F__)
    return (vector_f64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum);
#elif defined(__AVX2__)
    return (vector_f64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)sum);
#else
    return a * b + sum;
#endif
}

/* Rounded to nearest even as float_to_bf16 does it; the instruction for it takes denormals for 0. */
ALWAYS_INLINE void vector_store_bf16(uint16_t *to, vector_f32 value) {
#ifdef __AVX512BF16__
    __m256bh rounded = _mm512_cvtneps_pbh((__m512)value);
    memcpy(to, &rounded, sizeof rounded);
#else
    vector_u32 bits = (vector_u32)value;
    vector_u32 rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    vector_u32 quiet = bits >> 16 | 0x40u;
    vector_u32 is_nan = (vector_u32)(value != value);
    vector_u16 halves = __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), vector_u16);
    memcpy(to, &halves, sizeof halves);
#endif
}

/* sum += a * b; with `pairs`, of both bf16 in every word. */
ALWAYS_INLINE vector_f32 vector_multiply_add(bool pairs, vector_f32 a, vector_f32 b, vector_f32 sum) {
#ifdef __AVX512BF16__
    if (pairs)
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
    (void)pairs;
    return a * b + sum;
}

/* Lanes of a and b in turn: a0 b0 a1 b1 .. from the lower halves, and from the upper halves. */
ALWAYS_INLINE vector_f32 vector_interleave_low(vector_f32 a, vector_f32 b) {
#if defined(__AVX512F__)
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
    return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}

ALWAYS_INLINE vector_f32 vector_interleave_high(vector_f32 a, vector_f32 b) {
#if defined(__AVX512F__)
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

/* Sums of neighbours: a0+a1 a2+a3 .. b0+b1 b2+b3 .. */
ALWAYS_INLINE vector_f32 vector_add_neighbours(vector_f32 a, vector_f32 b) {
#if defined(__AVX512F__)
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX2__)
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

/* v[i] lane j becomes v[j] lane i. One interleaving of rows i and i + lanes/2 rotates the bits of (row, lane) by one;
 * as many of them as a lane number has bits exchange row and lane. */
ALWAYS_INLINE void vector_transpose(vector_f32 v[VECTOR_LANES]) {
#pragma GCC unroll 4
    for (int stage = 1; stage < VECTOR_LANES; stage *= 2) {
        vector_f32 next[VECTOR_LANES];
#pragma GCC unroll 16
        for (int i = 0; i < VECTOR_LANES / 2; i++) {
            next[2 * i] = vector_interleave_low(v[i], v[i + VECTOR_LANES / 2]);
            next[2 * i + 1] = vector_interleave_high(v[i], v[i + VECTOR_LANES / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < VECTOR_LANES; i++)
            v[i] = next[i];
    }
}

/* Lane i of the result is the sum over the lanes of v[i]; v is used up. */
ALWAYS_INLINE vector_f32 vector_sums(vector_f32 v[VECTOR_LANES]) {
#pragma GCC unroll 4
    for (int count = VECTOR_LANES / 2; count > 0; count /= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < count; i++)
            v[i] = vector_add_neighbours(v[2 * i], v[2 * i + 1]);
    }
    return v[0];
}

ALWAYS_INLINE vector_f32 vector_splat(float value) {
    return value - (vector_f32){0};
}

/* Lane by lane: of `yes` where the mask is -1, of `no` where it is 0. */
ALWAYS_INLINE vector_f32 vector_select(vector_i32 mask, vector_f32 yes, vector_f32 no) {
    return (vector_f32)((mask & (vector_i32)yes) | (~mask & (vector_i32)no));
}

/* The larger one of every lane; b's where one is NaN. */
ALWAYS_INLINE vector_f32 vector_max(vector_f32 a, vector_f32 b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#else
    return vector_select(a > b, a, b);
#endif
}

ALWAYS_INLINE vector_i32 vector_max_i32(vector_i32 a, vector_i32 b) {
#if defined(__AVX512F__)
    return (vector_i32)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vector_i32)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    vector_i32 larger = a > b;
    return (larger & a) | (~larger & b);
#endif
}

/* The largest of all lanes, in every lane: halves, then quarters and so on change places. */
ALWAYS_INLINE vector_i32 vector_largest_i32(vector_i32 v) {
#if defined(__AVX512F__)
    v = vector_max_i32(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = vector_max_i32(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = vector_max_i32(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    return vector_max_i32(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif defined(__AVX2__)
    v = vector_max_i32(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
    v = vector_max_i32(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
    return vector_max_i32(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6));
#else
    v = vector_max_i32(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
    return vector_max_i32(v, __builtin_shufflevector(v, v, 1, 0, 3, 2));
#endif
}

/* The smaller one of every lane; b's where one is NaN. */
ALWAYS_INLINE vector_f32 vector_min(vector_f32 a, vector_f32 b) {
#if defined(__AVX512F__)
    return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_min_ps(a, b);
#else
    return vector_select(a < b, a, b);
#endif
}

/* The sum of all lanes, added in a fixed tree. Folding v over itself by interleaving leaves it in every lane. */
ALWAYS_INLINE float vector_sum(vector_f32 v) {
#pragma GCC unroll 4
    for (int stage = 1; stage < VECTOR_LANES; stage *= 2)
        v = vector_interleave_low(v, v) + vector_interleave_high(v, v);
    return v[0];
}

/* The largest of all lanes. */
ALWAYS_INLINE float vector_largest(vector_f32 v) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps(v);
#endif
#pragma GCC unroll 4
    for (int stage = 1; stage < VECTOR_LANES; stage *= 2)
        v = vector_max(vector_interleave_low(v, v), vector_interleave_high(v, v));
    return v[0];
}

/* v with `value` in its lanes from `count` on. */
ALWAYS_INLINE vector_f32 vector_fill_from(vector_f32 v, int64_t count, float value) {
    vector_i32 lane;
#pragma GCC unroll 16
    for (int i = 0; i < VECTOR_LANES; i++)
        lane[i] = i;
    return vector_select(lane < (int32_t)count, v, vector_splat(value));
}
