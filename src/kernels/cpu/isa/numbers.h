/* Tensors of f32 or bf16 as vectors of floats, and tasks of a good size over them. Private to kernels/cpu/isa/.
 *
 * Loops run over whole vectors, with VECTOR_LANES for `count`, and once more over what is left. A dtype and a count
 * that are constants where these functions are called cost nothing at run time.
 */
#pragma once

#include "kernels/cpu/isa/matrix.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

/* A task reads and writes about so many elements: some tens of microseconds. */
enum { TASK_ELEMENTS = 1 << 15 };

static inline bool is_fast(struct tensor t) {
    return t.dtype == DTYPE_F32 || t.dtype == DTYPE_BF16;
}

static inline int64_t rows_per_task(int64_t width) {
    return divide_up(TASK_ELEMENTS, width + 1);
}

#ifdef __AVX512F__
/* A bit for each of the first `count` lanes. */
ALWAYS_INLINE __mmask16 first_lanes(int64_t count) {
    return (__mmask16)((1u << count) - 1);
}
#endif

/* Elements at .. at+count-1 (1 to VECTOR_LANES of them) of an array; 0 in the other lanes. */
ALWAYS_INLINE vector_f32 numbers_load(enum dtype dtype, const void *array, int64_t at, int64_t count) {
    const void *from = (const char *)array + at * (dtype == DTYPE_BF16 ? 2 : 4);
    if (count >= VECTOR_LANES)
        return dtype == DTYPE_BF16 ? vector_load_bf16(from) : vector_load(from);
#ifdef __AVX512F__
    if (dtype == DTYPE_BF16) {
        vector_u16 halves = (vector_u16)_mm256_maskz_loadu_epi16(first_lanes(count), from);
        return (vector_f32)(__builtin_convertvector(halves, vector_u32) << 16);
    }
    return (vector_f32)_mm512_maskz_loadu_ps(first_lanes(count), from);
#else
    float padded[VECTOR_LANES] = {0};
    memcpy(padded, from, (size_t)count * (dtype == DTYPE_BF16 ? 2 : 4));
    return dtype == DTYPE_BF16 ? vector_load_bf16((const uint16_t *)padded) : vector_load(padded);
#endif
}

/* The first `count` lanes into elements at .. at+count-1. */
ALWAYS_INLINE void numbers_store(enum dtype dtype, void *array, int64_t at, int64_t count, vector_f32 v) {
    char *to = (char *)array + at * (dtype == DTYPE_BF16 ? 2 : 4);
    float padded[VECTOR_LANES];
    void *target = count >= VECTOR_LANES ? (void *)to : padded;
    if (dtype == DTYPE_BF16)
        vector_store_bf16(target, v);
    else
        vector_store(target, v);
    if (count < VECTOR_LANES)
        memcpy(to, padded, (size_t)count * (dtype == DTYPE_BF16 ? 2 : 4));
}

/* A part of an operation, with the dtypes of two of its operands. */
typedef void dtypes_body(enum dtype a, enum dtype b, const void *context, int64_t index);

/* Call `body`, an ALWAYS_INLINE function, with the two dtypes as constants: one copy of it for each combination. */
ALWAYS_INLINE void with_dtypes(enum dtype a, enum dtype b, dtypes_body *body, const void *context, int64_t index) {
    if (a == DTYPE_BF16 && b == DTYPE_BF16)
        body(DTYPE_BF16, DTYPE_BF16, context, index);
    else if (a == DTYPE_BF16)
        body(DTYPE_BF16, DTYPE_F32, context, index);
    else if (b == DTYPE_BF16)
        body(DTYPE_F32, DTYPE_BF16, context, index);
    else
        body(DTYPE_F32, DTYPE_F32, context, index);
}
