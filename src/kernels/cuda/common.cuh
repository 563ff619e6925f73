/* What the kernels of this folder share: dtypes, sums over a warp and a block, and how operations check what they get.
 *
 * Operations know floats of f32 and bf16, real is f32, sums that last are f64. Tensors may lie at any address that their
 * elements allow: paths of 16 bytes are for operands that are aligned to them. */
#pragma once

#include "device/cuda/language.cuh"

#include <math.h>

#define _Noreturn [[noreturn]] /* of C, in the headers */
extern "C" {
#include "kernels/kernels.h"
}

#ifdef CADRE_CUDA_MODEL
#define UNROLL
#define UNROLL_2
#else
#define UNROLL _Pragma("unroll")
#define UNROLL_2 _Pragma("unroll 2")
#endif

/* Of a model: what the registers of a lane bear (router.cu), and shared memory on every device (attention.cu). */
enum { EXPERTS_MOST = 1024, HEAD_DIM_MOST = 1536 };

typedef struct {
    uint16_t bits;
} bf16;

static __device__ __forceinline__ float to_float(float x) {
    return x;
}

static __device__ __forceinline__ float to_float(bf16 x) {
    union {
        uint32_t u;
        float f;
    } v = {(uint32_t)x.bits << 16};
    return v.f;
}

/* To nearest even; NaN stays NaN. */
static __device__ __forceinline__ bf16 to_bf16(float x) {
#if defined(__CUDA_ARCH__)
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    bf16 y = {float_to_bf16(x)};
    return y;
#endif
}

/* Two of them in a word, the first in the lower half. */
static __device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#if defined(__CUDA_ARCH__)
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
#else
    return (uint32_t)to_bf16(low).bits | (uint32_t)to_bf16(high).bits << 16;
#endif
}

static __device__ __forceinline__ float low_bf16(uint32_t pair) {
    bf16 x = {(uint16_t)pair};
    return to_float(x);
}

static __device__ __forceinline__ float high_bf16(uint32_t pair) {
    bf16 x = {(uint16_t)(pair >> 16)};
    return to_float(x);
}

/* By the special-function unit, to about 1e-7 of the result. */
static __device__ __forceinline__ float power_of_2(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

static __device__ __forceinline__ float approximate_inverse(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1 / x;
#endif
}

static __device__ __forceinline__ void store(float *to, float x) {
    *to = x;
}

static __device__ __forceinline__ void store(bf16 *to, float x) {
    *to = to_bf16(x);
}

/* Sums in a fixed order: the same bits every time. All lanes get the result. */
template <typename T> static __device__ __forceinline__ T warp_sum(T x) {
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        x += __shfl_xor_sync(FULL_WARP, x, distance);
    return x;
}

static __device__ __forceinline__ float warp_max(float x) {
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, distance));
    return x;
}

/* Of 2 * half sums a lane keeps half, its partner at that distance the others: the upper of the two lanes the upper half. */
template <int half, int distance> static __device__ __forceinline__ void share_sums(float *sum) {
    bool is_upper = threadIdx.x & distance;
    UNROLL
    for (int i = 0; i < half; i++) {
        float mine = is_upper ? sum[half + i] : sum[i], other = is_upper ? sum[i] : sum[half + i];
        sum[i] = mine + __shfl_xor_sync(FULL_WARP, other, distance);
    }
}

/* Over a block of whole warps, at most 32 of them. All threads get the result and may call again at once. */
template <typename T> static __device__ T block_sum(T x) {
    CUDA_SHARED T part[WARP];
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP, warps = (int)blockDim.x / WARP;
    x = warp_sum(x);
    if (lane == 0)
        part[warp] = x;
    __syncthreads();
    T sum = warp_sum(lane < warps ? part[lane] : (T)0);
    __syncthreads();
    return sum;
}

static __device__ float block_max(float x) {
    CUDA_SHARED float part[WARP];
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP, warps = (int)blockDim.x / WARP;
    x = warp_max(x);
    if (lane == 0)
        part[warp] = x;
    __syncthreads();
    float most = warp_max(lane < warps ? part[lane] : -INFINITY);
    __syncthreads();
    return most;
}

static inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

/* Blocks for `count` threads' worth of work, no more than keep a large device busy: kernels go on in strides of the grid. */
static inline unsigned grid_for(int64_t count, int64_t threads) {
    int64_t blocks = ceil_div(count, threads), most = 132 * 16;
    return (unsigned)(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

static inline bool is_aligned(const void *data, size_t bytes) {
    return (uintptr_t)data % bytes == 0;
}

/* Calls CODE with `T` the element type of a float tensor: WITH_FLOAT(x.dtype, T, CUDA_LAUNCH((kernel<T>), ...)). */
#define WITH_FLOAT(the_dtype, T, ...)            \
    do {                                         \
        CHECK((the_dtype) == DTYPE_F32 || (the_dtype) == DTYPE_BF16); \
        if ((the_dtype) == DTYPE_F32) {          \
            typedef float T;                     \
            __VA_ARGS__;                         \
        } else {                                 \
            typedef bf16 T;                      \
            __VA_ARGS__;                         \
        }                                        \
    } while (0)

/* Scratch of the device for the operation that runs, contents undefined, aligned to 256: one request an operation. It may be the
 * same memory as the operation before had: operations follow each other on one stream. */
extern "C" void *cuda_scratch(size_t bytes);

/* What each file of this folder fills in, and the table. */
extern "C" {
const struct kernel_ops *kernels_cuda(void);
bool cuda_is_general(void); /* nothing that only Hopper has */
int cuda_processors(void);
bool cuda_lies_beside(void); /* of products that gather: product_sm90.cu */
bool cuda_keeps_x_right(void);
int cuda_lead(void);        /* blocks that half of the multipliers are ahead there */
bool cuda_has_few(void);    /* few rows and few queries have kernels of their own */
void product_fill_cuda(struct kernel_ops *ops);
void attention_fill_cuda(struct kernel_ops *ops);
void norm_fill_cuda(struct kernel_ops *ops);
void simple_fill_cuda(struct kernel_ops *ops);
void pointwise_fill_cuda(struct kernel_ops *ops);
void router_fill_cuda(struct kernel_ops *ops);
void pairs_fill_cuda(struct kernel_ops *ops);
void loss_fill_cuda(struct kernel_ops *ops);
void adamw_fill_cuda(struct kernel_ops *ops);
void outer_fill_cuda(struct kernel_ops *ops);
void roof_fill_cuda(struct kernel_ops *ops);
}
