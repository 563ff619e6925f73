/* What the operations that are bound by memory share: eight elements a thread and step, 16 bytes or more where the operands
 * are aligned to them, and how rows are divided over the threads of a block. */
#pragma once

#include "kernels/cuda/common.cuh"

enum { THREADS = 256, EIGHT = 8 };

/* ---- numbers, in float, or in double where an operand is f64 ----------------------------------------------------- */

static __device__ __forceinline__ float number(float x) {
    return x;
}

static __device__ __forceinline__ float number(bf16 x) {
    return to_float(x);
}

static __device__ __forceinline__ double number(double x) {
    return x;
}

template <typename A> static __device__ __forceinline__ void put(float *to, A x) {
    *to = (float)x;
}

template <typename A> static __device__ __forceinline__ void put(bf16 *to, A x) {
    *to = to_bf16((float)x);
}

template <typename A> static __device__ __forceinline__ void put(double *to, A x) {
    *to = (double)x;
}

static __device__ __forceinline__ float sigmoid(float x) {
    return 1.0f / (1.0f + __expf(-x));
}

/* What numbers of two types are added in. */
template <typename X, typename Y> struct sum_of {
    typedef float type;
};
template <typename Y> struct sum_of<double, Y> {
    typedef double type;
};
template <typename X> struct sum_of<X, double> {
    typedef double type;
};
template <> struct sum_of<double, double> {
    typedef double type;
};

template <typename T, typename A> static __device__ __forceinline__ void load_eight(const T *from, A *x) {
    for (int i = 0; i < EIGHT; i++)
        x[i] = (A)number(from[i]);
}

static __device__ __forceinline__ void load_eight(const float *from, float *x) {
    float4 a = ((const float4 *)from)[0], b = ((const float4 *)from)[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

static __device__ __forceinline__ void load_eight(const bf16 *from, float *x) {
    uint4 v = *(const uint4 *)from;
    x[0] = low_bf16(v.x), x[1] = high_bf16(v.x), x[2] = low_bf16(v.y), x[3] = high_bf16(v.y);
    x[4] = low_bf16(v.z), x[5] = high_bf16(v.z), x[6] = low_bf16(v.w), x[7] = high_bf16(v.w);
}

template <typename T, typename A> static __device__ __forceinline__ void store_eight(T *to, const A *x) {
    for (int i = 0; i < EIGHT; i++)
        put(to + i, x[i]);
}

static __device__ __forceinline__ void store_eight(float *to, const float *x) {
    float4 a = {x[0], x[1], x[2], x[3]}, b = {x[4], x[5], x[6], x[7]};
    ((float4 *)to)[0] = a;
    ((float4 *)to)[1] = b;
}

static __device__ __forceinline__ void store_eight(bf16 *to, const float *x) {
    uint4 v = {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7])};
    *(uint4 *)to = v;
}

/* `count` is 8, for aligned addresses, or 1. */
template <int count, typename T, typename A> static __device__ __forceinline__ void load_some(const T *from, A *x) {
    if (count == EIGHT)
        load_eight(from, x);
    else
        x[0] = (A)number(from[0]);
}

template <int count, typename T, typename A> static __device__ __forceinline__ void store_some(T *to, const A *x) {
    if (count == EIGHT)
        store_eight(to, x);
    else
        put(to, x[0]);
}

/* Eight, or one, of addresses that may be aligned to their elements only: sums that go on in the same order whatever the
 * address read them so. */
template <int count, bool aligned, typename T, typename A>
static __device__ __forceinline__ void load_anywhere(const T *from, A *x) {
    if (aligned)
        load_some<count>(from, x);
    else
        for (int i = 0; i < count; i++)
            x[i] = (A)number(from[i]);
}

template <int count, bool aligned, typename T, typename A>
static __device__ __forceinline__ void store_anywhere(T *to, const A *x) {
    if (aligned)
        store_some<count>(to, x);
    else
        for (int i = 0; i < count; i++)
            put(to + i, x[i]);
}

/* ---- threads ------------------------------------------------------------------------------------------------------ */

static __device__ __forceinline__ int64_t thread_index(void) {
    return (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
}

static __device__ __forceinline__ int64_t thread_count(void) {
    return (int64_t)gridDim.x * blockDim.x;
}

/* Threads of a block that share a row of `pieces`: the power of two that leaves the fewest of them idle. */
static inline int threads_a_row(int64_t pieces) {
    int best = THREADS;
    for (int threads = THREADS; threads >= 1; threads /= 2)
        if (ceil_div(pieces, threads) * threads < ceil_div(pieces, best) * best)
            best = threads;
    while (best < WARP && best < pieces) /* narrow rows that no power of two divides: not one thread for all of a row */
        best *= 2;
    return best;
}

/* Blocks for `rows`, each shared by `threads` threads. */
static inline unsigned grid_for_rows(int64_t rows, int threads) {
    return grid_for(rows, THREADS / threads);
}

/* As WITH_FLOAT, f64 too. */
#define WITH_NUMBER(the_dtype, T, ...)     \
    do {                                   \
        if ((the_dtype) == DTYPE_F64) {    \
            typedef double T;              \
            __VA_ARGS__;                   \
        } else {                           \
            WITH_FLOAT(the_dtype, T, __VA_ARGS__); \
        }                                  \
    } while (0)

/* ---- operations that others of this folder are made of -------------------------------------------------------------- */

void cast_elements(const void *from, enum dtype from_dtype, void *to, enum dtype to_dtype, int64_t count);
/* to[i] = from[index[i]], rows of `row_bytes`; `unit` bytes divide them and all addresses. */
void gather_bytes(const void *from, const int32_t *index, void *to, int64_t rows, int64_t row_bytes, int64_t unit);
