/* A model of a CUDA device on the processor: the words of language.cuh for g++ where CADRE_CUDA_MODEL is defined. Included by
 * language.cuh only.
 *
 * Blocks of a launch run one after the other, those of a cluster together; their threads are fibers on the thread that
 * launches, each until it waits, so nothing runs at once and atomics are plain. From launch to launch and block to block
 * the threads go in ascending and in descending order by turns: who forgets a barrier gets other numbers the second time.
 * One launch runs at a time in the process, hence shared memory is static.
 *
 * What a device would do without a word ends the program with one line: lanes of a warp that do not meet, threads that wait
 * for ever, launches that no device takes, writes behind a block's shared memory. Shared memory of a launch starts
 * as NaN, copies to shared memory arrive as late as they may, and what they replace is gone as early as it may. */
#pragma once

#include <cmath>
#include <cstring>
#include <functional>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <tuple>
#include <type_traits>
#include <vector>

#define __global__ __attribute__((unused))
#define __device__ __attribute__((unused))
#define __host__
#define __constant__ __attribute__((unused))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __grid_constant__

#define CUDA_SHARED static
#define CUDA_SHARED_DYNAMIC(type, name) type *name = (type *)cuda_model_shared

#define CUDA_IS_SM90
#define __cluster_dims__(...)

#define CUDA_LAUNCH(kernel, grid, block, shared_bytes, ...) \
    cuda_model_launch(#kernel, kernel, grid, block, 0, (size_t)(shared_bytes)__VA_OPT__(, ) __VA_ARGS__)
#define CUDA_LAUNCH_SM90(cluster, kernel, grid, block, shared_bytes, ...) \
    cuda_model_launch(#kernel, kernel, grid, block, cluster, (size_t)(shared_bytes)__VA_OPT__(, ) __VA_ARGS__)

extern "C" void cuda_fail(int error, const char *what);
extern "C" void *cuda_stream(void);

/* ---- types ------------------------------------------------------------------------------------------------------- */

#define CUDA_MODEL_VECTORS(T, name)                                         \
    struct alignas(2 * sizeof(T)) name##2 {                                 \
        T x, y;                                                             \
    };                                                                      \
    struct name##3 {                                                        \
        T x, y, z;                                                          \
    };                                                                      \
    struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) name##4 {            \
        T x, y, z, w;                                                       \
    };                                                                      \
    static inline name##2 make_##name##2(T x, T y) {                        \
        return name##2{x, y};                                               \
    }                                                                       \
    static inline name##3 make_##name##3(T x, T y, T z) {                   \
        return name##3{x, y, z};                                            \
    }                                                                       \
    static inline name##4 make_##name##4(T x, T y, T z, T w) {              \
        return name##4{x, y, z, w};                                         \
    }

CUDA_MODEL_VECTORS(float, float)
CUDA_MODEL_VECTORS(double, double)
CUDA_MODEL_VECTORS(int, int)
CUDA_MODEL_VECTORS(unsigned, uint)
CUDA_MODEL_VECTORS(unsigned short, ushort)
CUDA_MODEL_VECTORS(unsigned char, uchar)
CUDA_MODEL_VECTORS(long long, longlong)
CUDA_MODEL_VECTORS(unsigned long long, ulonglong)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {
    }
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {
    }
};

/* ---- what model.cpp has ------------------------------------------------------------------------------------------ */

extern uint3 threadIdx, blockIdx, blockDim, gridDim; /* of the thread that runs */
extern unsigned char *cuda_model_shared;

typedef void (*cuda_model_action)(void *const lanes[32], unsigned mask);

[[noreturn]] void cuda_model_die(const char *what);
unsigned cuda_model_lane(void);

/* The lanes of the mask meet; the last one to come acts for all of them on what they brought. */
void cuda_model_meet(unsigned mask, cuda_model_action act, void *mine);

/* Whether the calling thread records, and what it does then with work (device/cuda/recording.cu). */
bool cuda_model_records(void);
void cuda_model_note(std::function<void()> work);
void cuda_model_arrive(void); /* copies of this thread that nobody waited for */

void cuda_model_run(const char *kernel, dim3 grid, dim3 block, int cluster, size_t shared_bytes, void (*body)(void *),
                    void *arguments);

void __syncthreads(void);
void copy_async(void *shared, const void *global, int bytes);
void copy_async_commit(void);
void cuda_model_copy_wait(int newest);

template <int newest> static inline void copy_async_wait(void) {
    cuda_model_copy_wait(newest);
}

void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]);
void load_matrices(uint32_t r[4], const void *row);
void load_matrices_transposed(uint32_t r[4], const void *row);

template <typename... P> struct cuda_model_call {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> arguments;
};

/* Arguments are copied once, as a launch does. */
template <typename... P, typename... A>
static void cuda_model_launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, int cluster, size_t shared_bytes,
                              A... arguments) {
    cuda_model_call<P...> call = {kernel, std::tuple<std::decay_t<P>...>(static_cast<std::decay_t<P>>(arguments)...)};
    void (*body)(void *) = [](void *of) {
        cuda_model_call<P...> *it = static_cast<cuda_model_call<P...> *>(of);
        std::apply(it->kernel, it->arguments);
    };
    if (cuda_model_records())
        cuda_model_note([=]() mutable { cuda_model_run(name, grid, block, cluster, shared_bytes, body, &call); });
    else
        cuda_model_run(name, grid, block, cluster, shared_bytes, body, &call);
}

/* ---- operations of a warp ---------------------------------------------------------------------------------------- */

template <typename T> struct cuda_model_value {
    T value, result;
    int source; /* lane */
};

/* What nobody gave is not a number. */
template <typename T> static void cuda_model_shuffle(void *const lanes[32], unsigned mask) {
    for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1))
            continue;
        cuda_model_value<T> *to = static_cast<cuda_model_value<T> *>(lanes[i]);
        if (mask >> to->source & 1)
            to->result = static_cast<cuda_model_value<T> *>(lanes[to->source])->value;
        else
            memset(static_cast<void *>(&to->result), 0xFF, sizeof to->result);
    }
}

template <typename T> static inline T cuda_model_from(unsigned mask, T x, int source) {
    static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8 && sizeof(T) >= 4, "a shuffle takes a number of 4 or 8 bytes");
    cuda_model_value<T> mine = {x, x, source};
    cuda_model_meet(mask, cuda_model_shuffle<T>, &mine);
    return mine.result;
}

template <typename T> static inline T __shfl_sync(unsigned mask, T x, int source, int width = 32) {
    int lane = (int)cuda_model_lane();
    return cuda_model_from(mask, x, (lane & ~(width - 1)) | (source & (width - 1)));
}

template <typename T> static inline T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32) {
    int lane = (int)cuda_model_lane(), source = lane ^ bits;
    return cuda_model_from(mask, x, source > (lane | (width - 1)) ? lane : source);
}

template <typename T> static inline T __shfl_up_sync(unsigned mask, T x, unsigned distance, int width = 32) {
    int lane = (int)cuda_model_lane(), source = lane - (int)distance;
    return cuda_model_from(mask, x, source < (lane & ~(width - 1)) ? lane : source);
}

template <typename T> static inline T __shfl_down_sync(unsigned mask, T x, unsigned distance, int width = 32) {
    int lane = (int)cuda_model_lane(), source = lane + (int)distance;
    return cuda_model_from(mask, x, source > (lane | (width - 1)) ? lane : source);
}

static inline void cuda_model_vote(void *const lanes[32], unsigned mask) {
    unsigned votes = 0;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1 && static_cast<cuda_model_value<unsigned> *>(lanes[i])->value)
            votes |= 1u << i;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1)
            static_cast<cuda_model_value<unsigned> *>(lanes[i])->result = votes;
}

static inline unsigned __ballot_sync(unsigned mask, int predicate) {
    cuda_model_value<unsigned> mine = {predicate != 0, 0, 0};
    cuda_model_meet(mask, cuda_model_vote, &mine);
    return mine.result;
}

static inline int __any_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) != 0;
}

static inline int __all_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) == mask;
}

template <typename T> static void cuda_model_match(void *const lanes[32], unsigned mask) {
    for (int i = 0; i < 32; i++) {
        if (!(mask >> i & 1))
            continue;
        cuda_model_value<T> *to = static_cast<cuda_model_value<T> *>(lanes[i]);
        unsigned same = 0;
        for (int j = 0; j < 32; j++)
            if (mask >> j & 1 && memcmp(&to->value, &static_cast<cuda_model_value<T> *>(lanes[j])->value, sizeof(T)) == 0)
                same |= 1u << j;
        to->source = (int)same;
    }
}

template <typename T> static inline unsigned __match_any_sync(unsigned mask, T x) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "values that match have 4 or 8 bytes");
    cuda_model_value<T> mine = {x, x, 0};
    cuda_model_meet(mask, cuda_model_match<T>, &mine);
    return (unsigned)mine.source;
}

static inline void cuda_model_nothing(void *const *, unsigned) {
}

static inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
    cuda_model_meet(mask, cuda_model_nothing, nullptr);
}

/* ---- atomics and fences ------------------------------------------------------------------------------------------ */

template <typename T> static inline T atomicAdd(T *to, std::common_type_t<T> x) {
    T before = *to;
    *to = before + x;
    return before;
}

template <typename T> static inline T atomicSub(T *to, std::common_type_t<T> x) {
    T before = *to;
    *to = before - x;
    return before;
}

template <typename T> static inline T atomicMax(T *to, std::common_type_t<T> x) {
    T before = *to;
    *to = before < x ? x : before;
    return before;
}

template <typename T> static inline T atomicMin(T *to, std::common_type_t<T> x) {
    T before = *to;
    *to = x < before ? x : before;
    return before;
}

template <typename T> static inline T atomicOr(T *to, std::common_type_t<T> x) {
    T before = *to;
    *to = before | x;
    return before;
}

template <typename T> static inline T atomicExch(T *to, std::common_type_t<T> x) {
    T before = *to;
    *to = x;
    return before;
}

template <typename T> static inline T atomicCAS(T *to, std::common_type_t<T> expected, std::common_type_t<T> x) {
    T before = *to;
    if (before == expected)
        *to = x;
    return before;
}

static inline void __threadfence(void) {
}

static inline void __threadfence_block(void) {
}

/* ---- numbers ----------------------------------------------------------------------------------------------------- */

/* Macros, for libraries of C have functions of these names. */
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __powf(x, y) powf(x, y)
#define rsqrtf(x) cuda_model_rsqrtf(x)
#define rsqrt(x) cuda_model_rsqrt(x)

static inline float cuda_model_rsqrtf(float x) {
    return 1 / sqrtf(x);
}

static inline double cuda_model_rsqrt(double x) {
    return 1 / sqrt(x);
}

static inline float __fdividef(float x, float y) {
    return x / y;
}

static inline float __fmul_rn(float x, float y) {
    return x * y;
}

static inline float __fadd_rn(float x, float y) {
    return x + y;
}

static inline float __fsub_rn(float x, float y) {
    return x - y;
}

static inline float __fdiv_rn(float x, float y) {
    return x / y;
}

static inline float __fsqrt_rn(float x) {
    return sqrtf(x);
}

static inline float __frcp_rn(float x) {
    return 1 / x;
}

static inline float __fmaf_rn(float x, float y, float z) {
    return fmaf(x, y, z);
}

static inline double __dmul_rn(double x, double y) {
    return x * y;
}

static inline double __dadd_rn(double x, double y) {
    return x + y;
}

static inline double __dsub_rn(double x, double y) {
    return x - y;
}

static inline double __ddiv_rn(double x, double y) {
    return x / y;
}

static inline double __fma_rn(double x, double y, double z) {
    return fma(x, y, z);
}

static inline float __double2float_rn(double x) {
    return (float)x;
}

static inline int __float2int_rn(float x) {
    return (int)lrintf(x);
}

static inline float __int2float_rn(int x) {
    return (float)x;
}

template <typename To, typename From> static inline To cuda_model_bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}

static inline unsigned __float_as_uint(float x) {
    return cuda_model_bits<unsigned>(x);
}

static inline int __float_as_int(float x) {
    return cuda_model_bits<int>(x);
}

static inline float __uint_as_float(unsigned x) {
    return cuda_model_bits<float>(x);
}

static inline float __int_as_float(int x) {
    return cuda_model_bits<float>(x);
}

static inline long long __double_as_longlong(double x) {
    return cuda_model_bits<long long>(x);
}

static inline double __longlong_as_double(long long x) {
    return cuda_model_bits<double>(x);
}

static inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}

static inline int __popcll(unsigned long long x) {
    return __builtin_popcountll(x);
}

static inline int __ffs(int x) {
    return __builtin_ffs(x);
}

static inline int __ffsll(long long x) {
    return __builtin_ffsll(x);
}

static inline int __clz(int x) {
    return x ? __builtin_clz((unsigned)x) : 32;
}

static inline int __clzll(long long x) {
    return x ? __builtin_clzll((unsigned long long)x) : 64;
}

static inline unsigned __umulhi(unsigned x, unsigned y) {
    return (unsigned)((uint64_t)x * y >> 32);
}

static inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return (unsigned long long)((unsigned __int128)x * y >> 64);
}

template <typename A, typename B> static inline std::common_type_t<A, B> min(A a, B b) {
    return b < a ? b : a;
}

template <typename A, typename B> static inline std::common_type_t<A, B> max(A a, B b) {
    return a < b ? b : a;
}

template <typename T> static inline T __ldg(const T *from) {
    return *from;
}

template <typename T> static inline T __ldcs(const T *from) {
    return *from;
}

template <typename T> static inline T __ldcg(const T *from) {
    return *from;
}

template <typename T> static inline void __stcs(T *to, T x) {
    *to = x;
}

template <typename T> static inline void __stcg(T *to, T x) {
    *to = x;
}

[[noreturn]] static inline void __trap(void) {
    cuda_model_die("a kernel ended itself");
}
