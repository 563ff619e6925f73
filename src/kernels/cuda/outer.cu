/* The outer step: differences to bytes and back, and what is done with their sum. A warp has blocks of 32 differences, lane i
 * difference i. All is found in the bits of floats and by products with powers of two, so that every bit is the
 * specification's; sums and products that round are written so that none is fused. */
#include "kernels/cuda/vectors.cuh"

enum { BLOCKS_AT_ONCE = 4, FP4_SCALE_LEAST = 9, FP8_SCALE_LEAST = 18 };

/* ---- numbers -------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ uint32_t bits_of(float x) {
    union {
        float f;
        uint32_t u;
    } v = {x};
    return v.u;
}

static __device__ __forceinline__ float of_bits(uint32_t u) {
    union {
        uint32_t u;
        float f;
    } v = {u};
    return v.f;
}

/* 2^exponent for -149 .. 128; the last is infinity. */
static __device__ __forceinline__ float power_of_two(int exponent) {
    return of_bits(exponent >= -126 ? (uint32_t)(exponent + 127) << 23 : 1u << (exponent + 149));
}

/* The exponent field of the power of two that a magnitude rounds to, up from 1/ln 2 on. Right for normal floats; of smaller
 * ones it is 1 at most, which is all that matters. */
static __device__ __forceinline__ int rounded_exponent(float magnitude) {
    uint32_t bits = bits_of(magnitude);
    return (int)(bits >> 23) + ((bits & 0x7FFFFF) >= 0x38AA3B);
}

static __device__ __forceinline__ int at_least(int x, int least) {
    return x > least ? x : least;
}

static __device__ __forceinline__ int fp4_scale(float largest) {
    return at_least(rounded_exponent(largest), FP4_SCALE_LEAST);
}

static __device__ __forceinline__ int fp4_code(float magnitude, int scale) {
    int code = rounded_exponent(magnitude) + 7 - scale;
    return code > 0 ? code : code == 0;
}

static __device__ __forceinline__ float fp4_value(int code, int scale) {
    return code ? power_of_two(scale + code - 134) : 0;
}

/* The largest magnitude is at most 464 / 256 of the power of two that the scale stands for. */
static __device__ __forceinline__ int fp8_scale(float largest) {
    uint32_t bits = bits_of(largest);
    return at_least((int)(bits >> 23) + ((bits & 0x7FFFFF) > 0x680000), FP8_SCALE_LEAST);
}

/* Eighths of the power of two below the magnitude, of 2^-6 where that is larger. The product is exact, or so small that it
 * rounds to 0 whatever its last bits are. */
static __device__ __forceinline__ int fp8_code(float magnitude, int scale) {
    float x = __fmul_rn(magnitude, power_of_two(135 - scale));
    int exponent = at_least((int)(bits_of(x) >> 23) - 127, -6);
    return (int)rintf(__fmul_rn(x, power_of_two(3 - exponent))) + 8 * (exponent + 6);
}

static __device__ __forceinline__ float fp8_value(int code, int scale) {
    int exponent = code >> 3, mantissa = code & 7;
    float value = exponent ? __fmul_rn((float)(8 + mantissa), power_of_two(exponent - 10)) : (float)mantissa * 0x1p-9f;
    return code == 0x7F ? NAN : __fmul_rn(value, power_of_two(scale - 135));
}

/* ---- messages ------------------------------------------------------------------------------------------------------- */

/* A message of n differences at any address: halves and floats are moved at once where they may be. */
struct wire {
    uint8_t *bytes, *scales;
    int64_t n, blocks;
    bool is_aligned;
};

static struct wire wire_of(const void *bytes, enum outer_format format, int64_t n) {
    struct wire w = {(uint8_t *)bytes, NULL, n, outer_block_count(n), false};
    w.scales = w.bytes + (size_t)w.blocks * outer_code_bytes(format);
    w.is_aligned = is_aligned(bytes, format == OUTER_F32 ? 4 : 2);
    return w;
}

static __device__ __forceinline__ void store_bytes(const struct wire &w, int64_t i, float x) {
    uint32_t bits = bits_of(x);
    if (w.is_aligned)
        ((uint32_t *)w.bytes)[i] = bits;
    else
        for (int b = 0; b < 4; b++)
            w.bytes[4 * i + b] = (uint8_t)(bits >> 8 * b);
}

static __device__ __forceinline__ void store_bytes(const struct wire &w, int64_t i, bf16 x) {
    if (w.is_aligned) {
        ((bf16 *)w.bytes)[i] = x;
    } else {
        w.bytes[2 * i] = (uint8_t)x.bits;
        w.bytes[2 * i + 1] = (uint8_t)(x.bits >> 8);
    }
}

/* Difference `lane` of a block, by all lanes of the warp: those beyond the last one bring 0. True where it became 0. */
template <int format> static __device__ __forceinline__ bool encode(const struct wire &w, int64_t block, float d) {
    int lane = (int)threadIdx.x % WARP, code = 0, scale;
    int64_t i = block * OUTER_BLOCK + lane;
    if (format == OUTER_F32) {
        if (i < w.n)
            store_bytes(w, i, d);
        return false;
    }
    if (format == OUTER_BF16) {
        bf16 half = to_bf16(d);
        if (i < w.n)
            store_bytes(w, i, half);
        return d != 0 && (half.bits & 0x7FFF) == 0;
    }
    float magnitude = fabsf(d), largest = warp_max(magnitude);
    int sign = (int)(bits_of(d) >> 31);
    if (format == OUTER_FP8) {
        scale = fp8_scale(largest);
        code = fp8_code(magnitude, scale);
        w.bytes[block * OUTER_BLOCK + lane] = (uint8_t)(code | sign << 7);
    } else {
        scale = fp4_scale(largest);
        code = fp4_code(magnitude, scale);
        int own = code | sign << 3, other = __shfl_down_sync(FULL_WARP, own, OUTER_BLOCK / 2);
        if (lane < OUTER_BLOCK / 2)
            w.bytes[block * (OUTER_BLOCK / 2) + lane] = (uint8_t)(own | other << 4);
    }
    if (lane == 0)
        w.scales[block] = (uint8_t)scale;
    return d != 0 && code == 0;
}

/* Difference i. */
template <int format> static __device__ __forceinline__ float decode(const struct wire &w, int64_t i) {
    int64_t block = i / OUTER_BLOCK;
    int place = (int)(i % OUTER_BLOCK), code;
    if (format == OUTER_F32) {
        if (w.is_aligned)
            return ((const float *)w.bytes)[i];
        const uint8_t *b = w.bytes + 4 * i;
        return of_bits(b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24);
    }
    if (format == OUTER_BF16) {
        if (w.is_aligned)
            return to_float(((const bf16 *)w.bytes)[i]);
        return of_bits((uint32_t)w.bytes[2 * i] << 16 | (uint32_t)w.bytes[2 * i + 1] << 24);
    }
    int scale = w.scales[block];
    if (format == OUTER_FP8) {
        code = w.bytes[i];
        float value = fp8_value(code & 0x7F, scale);
        return code & 0x80 ? -value : value;
    }
    code = w.bytes[block * (OUTER_BLOCK / 2) + place % (OUTER_BLOCK / 2)] >> (place < OUTER_BLOCK / 2 ? 0 : 4) & 15;
    float value = fp4_value(code & 7, scale);
    return code & 8 ? -value : value;
}

#define WITH_FORMAT(the_format, FORMAT, ...)         \
    do {                                             \
        if ((the_format) == OUTER_F32) {             \
            enum { FORMAT = OUTER_F32 };             \
            __VA_ARGS__;                             \
        } else if ((the_format) == OUTER_BF16) {     \
            enum { FORMAT = OUTER_BF16 };            \
            __VA_ARGS__;                             \
        } else if ((the_format) == OUTER_FP8) {      \
            enum { FORMAT = OUTER_FP8 };             \
            __VA_ARGS__;                             \
        } else {                                     \
            CHECK((the_format) == OUTER_FP4);        \
            enum { FORMAT = OUTER_FP4 };             \
            __VA_ARGS__;                             \
        }                                            \
    } while (0)

/* ---- sums ----------------------------------------------------------------------------------------------------------- */

/* Three sums of a block to its place in `parts` [blocks, 3]. */
static __device__ __forceinline__ void store_parts(double *parts, double a, double b, double c) {
    a = block_sum(a);
    b = block_sum(b);
    c = block_sum(c);
    if (threadIdx.x == 0) {
        parts[3 * (int64_t)blockIdx.x] = a;
        parts[3 * (int64_t)blockIdx.x + 1] = b;
        parts[3 * (int64_t)blockIdx.x + 2] = c;
    }
}

/* A block for each of the three. */
static __global__ void sum_parts_kernel(const double *parts, int64_t blocks, double *sums) {
    double sum = 0;
    for (int64_t b = threadIdx.x; b < blocks; b += THREADS)
        sum += parts[3 * b + blockIdx.x];
    sum = block_sum(sum);
    if (threadIdx.x == 0)
        sums[blockIdx.x] += sum;
}

static void sum_parts(const double *parts, unsigned blocks, struct tensor sums) {
    CUDA_LAUNCH(sum_parts_kernel, 3, THREADS, 0, parts, (int64_t)blocks, (double *)sums.data);
}

/* ---- operations ----------------------------------------------------------------------------------------------------- */

template <int format>
static __global__ void encode_kernel(const float *global, const float *local, struct wire w, double *parts) {
    int lane = (int)threadIdx.x % WARP, flushed = 0, refused = 0;
    int64_t warp = thread_index() / WARP, warps = thread_count() / WARP;
    double squares = 0;
    for (int64_t first = warp * BLOCKS_AT_ONCE; first < w.blocks; first += warps * BLOCKS_AT_ONCE) {
        float d[BLOCKS_AT_ONCE];
#pragma unroll
        for (int b = 0; b < BLOCKS_AT_ONCE; b++) {
            int64_t i = (first + b) * OUTER_BLOCK + lane;
            d[b] = i < w.n ? __fsub_rn(global[i], local[i]) : 0;
        }
#pragma unroll
        for (int b = 0; b < BLOCKS_AT_ONCE; b++) {
            if (!(fabsf(d[b]) < 0x1p127f)) {
                d[b] = 0;
                refused++;
            }
            squares += (double)d[b] * (double)d[b];
            if (first + b < w.blocks)
                flushed += encode<format>(w, first + b, d[b]);
        }
    }
    store_parts(parts, squares, (double)flushed, (double)refused);
}

static bool is_f32(struct tensor t, int64_t n) {
    return t.dtype == DTYPE_F32 && tensor_elements(t) == n;
}

static unsigned grid_for_blocks(int64_t n) {
    return grid_for(n, THREADS * BLOCKS_AT_ONCE);
}

static void outer_encode(struct tensor global, struct tensor local, enum outer_format format, void *wire, struct tensor stats) {
    int64_t n = tensor_elements(global);
    CHECK(is_f32(global, n) && is_f32(local, n));
    CHECK(stats.dtype == DTYPE_F64 && tensor_elements(stats) == OUTER_STATS);
    static_assert(OUTER_SQUARES == 0 && OUTER_FLUSHED == 1 && OUTER_REFUSED == 2 && OUTER_STATS == 3, "the order of sums");
    if (n == 0)
        return;
    unsigned grid = grid_for_blocks(n);
    double *parts = (double *)cuda_scratch((size_t)grid * 3 * sizeof(double));
    WITH_FORMAT(format, FORMAT, CUDA_LAUNCH((encode_kernel<FORMAT>), grid, THREADS, 0, (const float *)global.data,
                                            (const float *)local.data, wire_of(wire, format, n), parts));
    sum_parts(parts, grid, stats);
}

template <int format> static __global__ void decode_kernel(struct wire w, float *sum, bool accumulate) {
    int64_t step = thread_count();
    for (int64_t first = thread_index(); first < w.n; first += step * BLOCKS_AT_ONCE) {
        float x[BLOCKS_AT_ONCE], old[BLOCKS_AT_ONCE];
#pragma unroll
        for (int b = 0; b < BLOCKS_AT_ONCE; b++) {
            int64_t i = first + b * step;
            x[b] = i < w.n ? decode<format>(w, i) : 0;
            old[b] = accumulate && i < w.n ? sum[i] : 0;
        }
#pragma unroll
        for (int b = 0; b < BLOCKS_AT_ONCE; b++)
            if (first + b * step < w.n)
                sum[first + b * step] = accumulate ? __fadd_rn(old[b], x[b]) : x[b];
    }
}

static void outer_decode_add(const void *wire, enum outer_format format, struct tensor sum, bool accumulate) {
    int64_t n = tensor_elements(sum);
    CHECK(is_f32(sum, n));
    if (n)
        WITH_FORMAT(format, FORMAT, CUDA_LAUNCH((decode_kernel<FORMAT>), grid_for_blocks(n), THREADS, 0,
                                                wire_of(wire, format, n), (float *)sum.data, accumulate));
}

struct outer_update {
    const float *sum;
    float *global, *momentum;
    int64_t n, eights;
    float replicas, lr, mu;
};

static __device__ __forceinline__ void update(const struct outer_update &u, float sum, float *global, float *momentum) {
    float delta = __fdiv_rn(sum, u.replicas);
    *momentum = __fadd_rn(__fmul_rn(u.mu, *momentum), delta);
    *global = __fsub_rn(*global, __fmul_rn(u.lr, __fadd_rn(delta, __fmul_rn(u.mu, *momentum))));
}

static __global__ void update_kernel(struct outer_update u) {
    for (int64_t i = thread_index(); i < u.eights; i += thread_count()) {
        float s[EIGHT], g[EIGHT], b[EIGHT];
        load_eight(u.sum + EIGHT * i, s);
        load_eight(u.global + EIGHT * i, g);
        load_eight(u.momentum + EIGHT * i, b);
        for (int j = 0; j < EIGHT; j++)
            update(u, s[j], &g[j], &b[j]);
        store_eight(u.global + EIGHT * i, g);
        store_eight(u.momentum + EIGHT * i, b);
    }
    for (int64_t i = EIGHT * u.eights + thread_index(); i < u.n; i += thread_count())
        update(u, u.sum[i], &u.global[i], &u.momentum[i]);
}

static void outer_update(struct tensor sum, struct outer_settings settings, struct tensor global, struct tensor momentum) {
    int64_t n = tensor_elements(sum);
    CHECK(is_f32(sum, n) && is_f32(global, n) && is_f32(momentum, n));
    CHECK(settings.replica_count >= 1);
    struct outer_update u = {(const float *)sum.data, (float *)global.data, (float *)momentum.data, n, 0,
                             (float)settings.replica_count, (float)settings.lr, (float)settings.momentum};
    if (is_aligned(u.sum, 16) && is_aligned(u.global, 16) && is_aligned(u.momentum, 16))
        u.eights = n / EIGHT;
    if (n)
        CUDA_LAUNCH(update_kernel, grid_for(u.eights ? u.eights : n, THREADS), THREADS, 0, u);
}

static __device__ __forceinline__ float mix(float global, float local, float kept, float taken) {
    return __fadd_rn(__fmul_rn(kept, local), __fmul_rn(taken, global));
}

/* With nothing kept what was there is not read: it may be no number. */
static __global__ void mix_kernel(const float *global, float *local, int64_t n, int64_t eights, float kept, float taken,
                                  bool is_copy) {
    for (int64_t i = thread_index(); i < eights; i += thread_count()) {
        float g[EIGHT], own[EIGHT];
        load_eight(global + EIGHT * i, g);
        if (!is_copy) {
            load_eight(local + EIGHT * i, own);
            for (int j = 0; j < EIGHT; j++)
                g[j] = mix(g[j], own[j], kept, taken);
        }
        store_eight(local + EIGHT * i, g);
    }
    for (int64_t i = EIGHT * eights + thread_index(); i < n; i += thread_count())
        local[i] = is_copy ? global[i] : mix(global[i], local[i], kept, taken);
}

static void outer_mix(struct tensor global, double keep, struct tensor local) {
    int64_t n = tensor_elements(global);
    CHECK(is_f32(global, n) && is_f32(local, n));
    CHECK(keep >= 0 && keep <= 1);
    int64_t eights = is_aligned(global.data, 16) && is_aligned(local.data, 16) ? n / EIGHT : 0;
    if (n)
        CUDA_LAUNCH(mix_kernel, grid_for(eights ? eights : n, THREADS), THREADS, 0, (const float *)global.data,
                    (float *)local.data, n, eights, (float)keep, (float)(1 - keep), keep == 0);
}

template <int format> static __global__ void dot_kernel(struct wire a, struct wire b, double *parts) {
    double ab = 0, aa = 0, bb = 0;
#pragma unroll 4
    for (int64_t i = thread_index(); i < a.n; i += thread_count()) {
        double x = (double)decode<format>(a, i), y = (double)decode<format>(b, i);
        ab += x * y;
        aa += x * x;
        bb += y * y;
    }
    store_parts(parts, ab, aa, bb);
}

static void outer_dot(const void *a, const void *b, enum outer_format format, int64_t n, struct tensor sums) {
    CHECK(sums.dtype == DTYPE_F64 && tensor_elements(sums) == 3);
    if (n == 0)
        return;
    unsigned grid = grid_for_blocks(n);
    double *parts = (double *)cuda_scratch((size_t)grid * 3 * sizeof(double));
    WITH_FORMAT(format, FORMAT, CUDA_LAUNCH((dot_kernel<FORMAT>), grid, THREADS, 0, wire_of(a, format, n),
                                            wire_of(b, format, n), parts));
    sum_parts(parts, grid, sums);
}

void outer_fill_cuda(struct kernel_ops *ops) {
    ops->outer_encode = outer_encode;
    ops->outer_decode_add = outer_decode_add;
    ops->outer_update = outer_update;
    ops->outer_mix = outer_mix;
    ops->outer_dot = outer_dot;
}
