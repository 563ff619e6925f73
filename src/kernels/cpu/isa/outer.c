/* The outer step's codec and update. Bound by memory where it goes well: every operand is read once, the result written
 * once, and a block of 32 differences stays in registers from the subtraction to its codes.
 *
 *  1. All arithmetic on floats is exact or a single rounding that ref/outer.c makes, too, and this file is compiled
 *     without fusing: the same bits on every instruction set.
 *  2. Codes come from the bits of the floats: adding to the mantissa carries into the exponent where it rounds up.
 *  3. A short last block is copied to a whole one filled with zeros; only then is it treated like the others.
 */
#include "kernels/cpu/isa/numbers.h"

#include "base/threads.h"
#include "kernels/cpu/fillers.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/scratch.h"
#include <string.h>

enum { BLOCK_VECTORS = OUTER_BLOCK / VECTOR_LANES, TASK_BLOCKS = TASK_ELEMENTS / OUTER_BLOCK, PREFETCH_BLOCKS = 16 };

enum {
    MAGNITUDE = 0x7FFFFFFF,
    REFUSED_FROM = 0x7F000000,       /* 2^127 */
    SQUARES_FROM = 77 << 23,         /* 2^-50: squares down to 2^-26 of this one are normal numbers */
    SQUARES_TO = 177 << 23,          /* 2^50 */
    FP4_ROUND = 0x800000 - 0x38AA3B, /* mantissas from that of 1/ln 2 on carry */
    FP8_ROUND = 0x7FFFFF - 0x680000, /* mantissas above that of 464 carry */
    FP4_SCALE_LEAST = 9,
    FP8_SCALE_LEAST = 18,
    FP8_LEAST_NORMAL = 121 << 23, /* 2^-6 */
    QUIET_NAN = 0x7FC00000,
};

/* A message, for reading. */
struct message {
    const uint8_t *codes, *scales;
};

static struct message message_of(const void *wire, enum outer_format format, int64_t n) {
    const uint8_t *codes = wire;
    return (struct message){codes, codes + (size_t)outer_block_count(n) * outer_code_bytes(format)};
}

/* ---- encode ---- */

/* A byte for each difference of a block; handed over by address, where registers may be narrower. As pairs they are
 * shifted in one instruction, where nothing crosses over. */
typedef int8_t block_bytes __attribute__((vector_size(OUTER_BLOCK)));
typedef uint16_t block_pairs __attribute__((vector_size(OUTER_BLOCK)));
typedef uint16_t half_pairs __attribute__((vector_size(OUTER_BLOCK / 2)));

/* What a task counted; squares in both halves of the lanes. */
struct tally {
    vector_f64 squares[2];
    int64_t flushed, refused;
};

struct task_stats {
    double squares;
    int64_t flushed, refused;
};

struct encode_job {
    const float *global, *local;
    int64_t n;
    uint8_t *codes, *scales;
    struct task_stats *stats; /* one a task */
};

ALWAYS_INLINE vector_i32 magnitude_of(vector_f32 x) {
    return (vector_i32)x & MAGNITUDE;
}

/* Every lane as the nearest number that fits into a byte. In an order of its own: bytes_in_order. */
ALWAYS_INLINE void bytes_of(const vector_i32 v[BLOCK_VECTORS], block_bytes *to) {
#if defined(__AVX512F__)
    __m128i halves[2] = {_mm512_cvtsepi32_epi8((__m512i)v[0]), _mm512_cvtsepi32_epi8((__m512i)v[1])};
    memcpy(to, halves, sizeof *to);
#elif defined(__AVX2__)
    __m256i low = _mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]),
            high = _mm256_packs_epi32((__m256i)v[2], (__m256i)v[3]);
    *to = (block_bytes)_mm256_packs_epi16(low, high); /* fours of v[0] v[1] v[2] v[3], then their second fours */
#else
    int8_t array[OUTER_BLOCK];
    for (int i = 0; i < BLOCK_VECTORS; i++) {
        vector_i32 least = -128 - (vector_i32){0}, most = 127 - (vector_i32){0};
        vector_u8 part = __builtin_convertvector(-vector_max_i32(-vector_max_i32(v[i], least), -most), vector_u8);
        memcpy(array + i * VECTOR_LANES, &part, sizeof part);
    }
    memcpy(to, array, sizeof *to);
#endif
}

ALWAYS_INLINE void bytes_in_order(block_bytes *bytes) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    *bytes = (block_bytes)_mm256_permutevar8x32_epi32((__m256i)*bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
#else
    (void)bytes;
#endif
}

/* Bytes that are -1 in a mask. */
ALWAYS_INLINE int64_t count_set(const block_bytes *mask) {
#ifdef __AVX2__
    return __builtin_popcount((unsigned)_mm256_movemask_epi8((__m256i)*mask));
#else
    uint64_t words[OUTER_BLOCK / 8], sum = 0;
    memcpy(words, mask, sizeof words);
    for (int i = 0; i < OUTER_BLOCK / 8; i++)
        sum += words[i] & 0x0101010101010101u; /* at most 4 in every byte */
    return (int64_t)(sum * 0x0101010101010101u >> 56);
#endif
}

/* Differences that are not 0 and have a magnitude of 0 among the codes. */
ALWAYS_INLINE int64_t count_flushed(const block_bytes *magnitude_codes, const vector_f32 d[BLOCK_VECTORS]) {
    vector_i32 magnitude[BLOCK_VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < BLOCK_VECTORS; v++)
        magnitude[v] = magnitude_of(d[v]);
    block_bytes flushed;
    bytes_of(magnitude, &flushed);
    flushed = (*magnitude_codes == 0) & (flushed > 0);
    return count_set(&flushed);
}

/* 0x80 where a difference has the sign, else 0. */
ALWAYS_INLINE void signs_of(const vector_f32 d[BLOCK_VECTORS], block_bytes *signs) {
    vector_i32 bits[BLOCK_VECTORS];
    memcpy(bits, d, sizeof bits);
    bytes_of(bits, signs);
    *signs &= -128;
}

ALWAYS_INLINE void refuse(vector_f32 d[BLOCK_VECTORS], struct tally *tally) {
    vector_i32 bad[BLOCK_VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < BLOCK_VECTORS; v++) {
        bad[v] = magnitude_of(d[v]) > REFUSED_FROM - 1;
        d[v] = (vector_f32)((vector_i32)d[v] & ~bad[v]);
    }
    block_bytes refused;
    bytes_of(bad, &refused);
    tally->refused += count_set(&refused);
}

ALWAYS_INLINE vector_i32 block_largest(const vector_f32 d[BLOCK_VECTORS]) {
    vector_i32 largest = magnitude_of(d[0]);
#pragma GCC unroll 8
    for (int v = 1; v < BLOCK_VECTORS; v++)
        largest = vector_max_i32(largest, magnitude_of(d[v]));
    return vector_largest_i32(largest);
}

ALWAYS_INLINE void add_squares_f64(const vector_f32 d[BLOCK_VECTORS], struct tally *tally) {
    vector_f64 squares[2] = {{0}}; /* of this block: the next one need not wait for it */
#pragma GCC unroll 8
    for (int v = 0; v < BLOCK_VECTORS; v++) {
        vector_f64 halves[2];
        vector_to_f64(d[v], halves);
        squares[0] = vector_multiply_add_f64(halves[0], halves[0], squares[0]);
        squares[1] = vector_multiply_add_f64(halves[1], halves[1], squares[1]);
    }
    tally->squares[0] += squares[0];
    tally->squares[1] += squares[1];
}

/* Of a block in whose squares nothing that counts over- or underflows. */
ALWAYS_INLINE void add_squares_f32(const vector_f32 d[BLOCK_VECTORS], struct tally *tally) {
    vector_f32 squares = {0};
    vector_f64 halves[2];
#pragma GCC unroll 8
    for (int v = 0; v < BLOCK_VECTORS; v++)
        squares += d[v] * d[v];
    vector_to_f64(squares, halves);
    tally->squares[0] += halves[0];
    tally->squares[1] += halves[1];
}

/* A block of differences, without those that are refused. Returns the largest magnitude in every lane. */
ALWAYS_INLINE vector_i32 load_differences(const float *global, const float *local, vector_f32 d[BLOCK_VECTORS],
                                          struct tally *tally) {
#pragma GCC unroll 8
    for (int v = 0; v < BLOCK_VECTORS; v++)
        d[v] = vector_load(global + v * VECTOR_LANES) - vector_load(local + v * VECTOR_LANES);
    vector_i32 largest = block_largest(d);
    if (__builtin_expect((uint32_t)largest[0] - SQUARES_FROM < SQUARES_TO - SQUARES_FROM, 1)) {
        add_squares_f32(d, tally);
        return largest;
    }
    if (largest[0] >= REFUSED_FROM) {
        refuse(d, tally);
        largest = block_largest(d);
    }
    add_squares_f64(d, tally);
    return largest;
}

ALWAYS_INLINE void encode_bf16(const vector_f32 d[BLOCK_VECTORS], uint8_t *codes, struct tally *tally) {
    vector_i32 rounded[BLOCK_VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < BLOCK_VECTORS; v++) {
        vector_u32 bits = (vector_u32)d[v];
        vector_u32 half = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
        vector_u16 halves = __builtin_convertvector(half, vector_u16);
        memcpy(codes + 2 * v * VECTOR_LANES, &halves, sizeof halves);
        rounded[v] = (vector_i32)(half & 0x7FFFu);
    }
    block_bytes magnitude_codes;
    bytes_of(rounded, &magnitude_codes);
    tally->flushed += count_flushed(&magnitude_codes, d);
}

/* The largest power of two not above x is 2^e; adding 2^(e+20) rounds x to eighths of 2^e, which are then the lowest
 * bits of the sum. */
ALWAYS_INLINE vector_i32 fp8_code(vector_i32 magnitude, vector_f32 multiplier) {
    vector_f32 x = (vector_f32)magnitude * multiplier;
    vector_i32 power = vector_max_i32((vector_i32)x & 0x7F800000, FP8_LEAST_NORMAL - (vector_i32){0});
    vector_i32 shifter = power + (20 << 23);
    vector_i32 eighths = (vector_i32)(x + (vector_f32)shifter) - shifter;
    return eighths + ((power - FP8_LEAST_NORMAL) >> 20);
}

ALWAYS_INLINE void encode_fp8(const vector_f32 d[BLOCK_VECTORS], vector_i32 largest, uint8_t *codes, uint8_t *scale,
                              struct tally *tally) {
    vector_i32 exponent = vector_max_i32((largest + FP8_ROUND) >> 23, FP8_SCALE_LEAST - (vector_i32){0});
    vector_f32 multiplier = (vector_f32)((127 + 135 - exponent) << 23); /* 2^(135 - scale) */
    *scale = (uint8_t)exponent[0];
    vector_i32 code[BLOCK_VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < BLOCK_VECTORS; v++)
        code[v] = fp8_code(magnitude_of(d[v]), multiplier);
    block_bytes all, signs;
    bytes_of(code, &all);
    signs_of(d, &signs);
    tally->flushed += count_flushed(&all, d);
    all |= signs;
    bytes_in_order(&all);
    memcpy(codes, &all, sizeof all);
}

/* What rounds to half the value of code 1 is 0 here first, as if there were a code for it. */
ALWAYS_INLINE void encode_fp4(const vector_f32 d[BLOCK_VECTORS], vector_i32 largest, uint8_t *codes, uint8_t *scale,
                              struct tally *tally) {
    vector_i32 exponent = vector_max_i32((largest + FP4_ROUND) >> 23, FP4_SCALE_LEAST - (vector_i32){0});
    vector_i32 offset = FP4_ROUND - ((exponent - 7) << 23), code[BLOCK_VECTORS];
    *scale = (uint8_t)exponent[0];
#pragma GCC unroll 8
    for (int v = 0; v < BLOCK_VECTORS; v++)
        code[v] = (magnitude_of(d[v]) + offset) >> 23;
    block_bytes all, signs;
    bytes_of(code, &all);
    signs_of(d, &signs);
    all = (all & (all > 0)) - (all == 0);
    tally->flushed += count_flushed(&all, d);
    all |= (block_bytes)((block_pairs)signs >> 4);
    bytes_in_order(&all);
    half_pairs halves[2];
    memcpy(halves, &all, sizeof all);
    halves[0] |= halves[1] << 4;
    memcpy(codes, &halves[0], sizeof halves[0]);
}

ALWAYS_INLINE void encode_block(enum outer_format format, const float *global, const float *local, uint8_t *codes,
                                uint8_t *scale, struct tally *tally) {
    vector_f32 d[BLOCK_VECTORS];
    vector_i32 largest = load_differences(global, local, d, tally);
    if (format == OUTER_F32)
        memcpy(codes, d, sizeof d);
    else if (format == OUTER_BF16)
        encode_bf16(d, codes, tally);
    else if (format == OUTER_FP8)
        encode_fp8(d, largest, codes, scale, tally);
    else
        encode_fp4(d, largest, codes, scale, tally);
}

/* The short block at the end, of `count` differences. */
ALWAYS_INLINE void encode_rest(enum outer_format format, const struct encode_job *job, int64_t block, int64_t count,
                               struct tally *tally) {
    size_t code_bytes = outer_code_bytes(format);
    float global[OUTER_BLOCK] = {0}, local[OUTER_BLOCK] = {0};
    uint8_t codes[4 * OUTER_BLOCK], scale = 0;
    memcpy(global, job->global + block * OUTER_BLOCK, (size_t)count * sizeof *global);
    memcpy(local, job->local + block * OUTER_BLOCK, (size_t)count * sizeof *local);
    encode_block(format, global, local, codes, &scale, tally);
    bool has_scale = format == OUTER_FP8 || format == OUTER_FP4;
    memcpy(job->codes + (size_t)block * code_bytes, codes,
           has_scale ? code_bytes : code_bytes / OUTER_BLOCK * (size_t)count);
    if (has_scale)
        job->scales[block] = scale;
}

static double sum_f64(const vector_f64 v[2]) {
    double sum = 0;
    for (int lane = 0; lane < VECTOR_LANES / 2; lane++)
        sum += v[0][lane] + v[1][lane];
    return sum;
}

/* The block that comes PREFETCH_BLOCKS after this one: the processor's own prefetching begins anew with every page. */
ALWAYS_INLINE void prefetch(const struct encode_job *job, int64_t block) {
    int64_t first = at_most(block + PREFETCH_BLOCKS, job->n / OUTER_BLOCK) * OUTER_BLOCK;
#pragma GCC unroll 2
    for (int i = 0; i < OUTER_BLOCK; i += 16) { /* floats of a cache line */
        __builtin_prefetch(job->global + first + i);
        __builtin_prefetch(job->local + first + i);
    }
}

ALWAYS_INLINE void encode_body(enum outer_format format, const struct encode_job *job, int64_t index) {
    struct tally tally = {0};
    int64_t block = index * TASK_BLOCKS, whole = at_most(block + TASK_BLOCKS, job->n / OUTER_BLOCK);
    for (; block < whole; block++) {
        prefetch(job, block);
        encode_block(format, job->global + block * OUTER_BLOCK, job->local + block * OUTER_BLOCK,
                     job->codes + (size_t)block * outer_code_bytes(format), job->scales + block, &tally);
    }
    int64_t rest = job->n - block * OUTER_BLOCK;
    if (block < (index + 1) * TASK_BLOCKS && rest > 0)
        encode_rest(format, job, block, rest, &tally);
    job->stats[index] = (struct task_stats){sum_f64(tally.squares), tally.flushed, tally.refused};
}

static void encode_f32_task(void *context, int64_t index) {
    encode_body(OUTER_F32, context, index);
}

static void encode_bf16_task(void *context, int64_t index) {
    encode_body(OUTER_BF16, context, index);
}

static void encode_fp8_task(void *context, int64_t index) {
    encode_body(OUTER_FP8, context, index);
}

static void encode_fp4_task(void *context, int64_t index) {
    encode_body(OUTER_FP4, context, index);
}

static void encode(struct tensor global, struct tensor local, enum outer_format format, void *wire,
                   struct tensor stats) {
    static void (*const tasks[OUTER_FORMATS])(void *context, int64_t index) = {encode_f32_task, encode_bf16_task,
                                                                               encode_fp8_task, encode_fp4_task};
    int64_t n = tensor_elements(global), task_count = divide_up(n, TASK_ELEMENTS);
    CHECK(global.dtype == DTYPE_F32 && local.dtype == DTYPE_F32 && tensor_elements(local) == n);
    CHECK(stats.dtype == DTYPE_F64 && tensor_elements(stats) == OUTER_STATS);
    struct message message = message_of(wire, format, n);
    struct encode_job job = {global.data,
                             local.data,
                             n,
                             wire,
                             (uint8_t *)wire + (message.scales - message.codes),
                             scratch_call((size_t)task_count * sizeof *job.stats)};
    parallel_for(task_count, tasks[format], &job);
    double *total = stats.data;
    for (int64_t i = 0; i < task_count; i++) {
        total[OUTER_SQUARES] += job.stats[i].squares;
        total[OUTER_FLUSHED] += (double)job.stats[i].flushed;
        total[OUTER_REFUSED] += (double)job.stats[i].refused;
    }
}

/* ---- decode ---- */

ALWAYS_INLINE vector_f32 fp8_value(vector_u32 code, vector_f32 multiplier) {
    vector_u32 magnitude = code & 0x7Fu;
    vector_f32 normal = (vector_f32)((magnitude << 20) + (120u << 23));
    /* Below 2^-6: an exponent more, so that the mantissa counts eighths of 2^-6, less the 2^-6 in front of it. */
    vector_f32 small = (vector_f32)((magnitude << 20) + (121u << 23)) - 0x1p-6f;
    vector_f32 value = vector_select((vector_i32)magnitude < 8, small, normal) * multiplier;
    vector_u32 nan = (vector_u32)((vector_i32)magnitude == 0x7F) & (uint32_t)QUIET_NAN;
    return (vector_f32)((vector_u32)value | nan | (code & 0x80u) << 24);
}

ALWAYS_INLINE vector_f32 fp4_value(vector_u32 code, vector_u32 base) {
    vector_u32 magnitude = code & 7u;
    vector_u32 power = (magnitude + base) << 23 & (vector_u32)(magnitude != 0);
    return (vector_f32)(power | (code & 8u) << 28);
}

ALWAYS_INLINE void decode_block(enum outer_format format, const uint8_t *codes, const uint8_t *scale,
                                vector_f32 value[BLOCK_VECTORS]) {
    if (format == OUTER_F32) {
        memcpy(value, codes, 4 * OUTER_BLOCK);
    } else if (format == OUTER_BF16) {
#pragma GCC unroll 8
        for (int v = 0; v < BLOCK_VECTORS; v++) {
            vector_u16 halves;
            memcpy(&halves, codes + 2 * v * VECTOR_LANES, sizeof halves);
            value[v] = (vector_f32)(vector_widen(halves) << 16);
        }
    } else if (format == OUTER_FP8) {
        vector_f32 multiplier = (vector_f32)((*scale - 8u + (vector_u32){0}) << 23);
#pragma GCC unroll 8
        for (int v = 0; v < BLOCK_VECTORS; v++)
            value[v] = fp8_value(vector_load_u8(codes + v * VECTOR_LANES), multiplier);
    } else {
        vector_u32 base = *scale - 7u + (vector_u32){0};
#pragma GCC unroll 4
        for (int v = 0; v < BLOCK_VECTORS / 2; v++) {
            vector_u32 both = vector_load_u8(codes + v * VECTOR_LANES);
            value[v] = fp4_value(both, base);
            value[v + BLOCK_VECTORS / 2] = fp4_value(both >> 4, base);
        }
    }
}

/* Block `block` of a message of n: a whole one, or the rest of it and zeros. */
ALWAYS_INLINE void decode_any(enum outer_format format, const struct message *message, int64_t n, int64_t block,
                              vector_f32 value[BLOCK_VECTORS]) {
    size_t code_bytes = outer_code_bytes(format);
    int64_t count = n - block * OUTER_BLOCK;
    const uint8_t *codes = message->codes + (size_t)block * code_bytes;
    if (count >= OUTER_BLOCK) {
        decode_block(format, codes, message->scales + block, value);
        return;
    }
    uint8_t padded[4 * OUTER_BLOCK] = {0};
    bool has_scale = format == OUTER_FP8 || format == OUTER_FP4;
    memcpy(padded, codes, has_scale ? code_bytes : code_bytes / OUTER_BLOCK * (size_t)count);
    decode_block(format, padded, has_scale ? message->scales + block : padded, value);
    float numbers[OUTER_BLOCK];
    memcpy(numbers, value, sizeof numbers);
    memset(numbers + count, 0, (size_t)(OUTER_BLOCK - count) * sizeof *numbers);
    memcpy(value, numbers, sizeof numbers);
}

struct decode_job {
    struct message message;
    int64_t n;
    float *sum;
    bool accumulate;
};

ALWAYS_INLINE void add_rest(const vector_f32 value[BLOCK_VECTORS], bool accumulate, float *sum, int64_t count) {
    float numbers[OUTER_BLOCK];
    memcpy(numbers, value, sizeof numbers);
    for (int64_t i = 0; i < count; i++)
        sum[i] = accumulate ? sum[i] + numbers[i] : numbers[i];
}

ALWAYS_INLINE void decode_body(enum outer_format format, bool accumulate, const struct decode_job *job, int64_t index) {
    vector_f32 value[BLOCK_VECTORS];
    int64_t block = index * TASK_BLOCKS, whole = at_most(block + TASK_BLOCKS, job->n / OUTER_BLOCK);
    for (; block < whole; block++) {
        float *sum = job->sum + block * OUTER_BLOCK;
        decode_block(format, job->message.codes + (size_t)block * outer_code_bytes(format), job->message.scales + block,
                     value);
#pragma GCC unroll 8
        for (int v = 0; v < BLOCK_VECTORS; v++) {
            float *to = sum + v * VECTOR_LANES;
            vector_store(to, accumulate ? vector_load(to) + value[v] : value[v]);
        }
    }
    int64_t rest = job->n - block * OUTER_BLOCK;
    if (block < (index + 1) * TASK_BLOCKS && rest > 0) {
        decode_any(format, &job->message, job->n, block, value);
        add_rest(value, accumulate, job->sum + block * OUTER_BLOCK, rest);
    }
}

ALWAYS_INLINE void decode_format(enum outer_format format, const struct decode_job *job, int64_t index) {
    if (job->accumulate)
        decode_body(format, true, job, index);
    else
        decode_body(format, false, job, index);
}

static void decode_f32_task(void *context, int64_t index) {
    decode_format(OUTER_F32, context, index);
}

static void decode_bf16_task(void *context, int64_t index) {
    decode_format(OUTER_BF16, context, index);
}

static void decode_fp8_task(void *context, int64_t index) {
    decode_format(OUTER_FP8, context, index);
}

static void decode_fp4_task(void *context, int64_t index) {
    decode_format(OUTER_FP4, context, index);
}

static void decode_add(const void *wire, enum outer_format format, struct tensor sum, bool accumulate) {
    static void (*const tasks[OUTER_FORMATS])(void *context, int64_t index) = {decode_f32_task, decode_bf16_task,
                                                                               decode_fp8_task, decode_fp4_task};
    int64_t n = tensor_elements(sum);
    CHECK(sum.dtype == DTYPE_F32);
    struct decode_job job = {message_of(wire, format, n), n, sum.data, accumulate};
    parallel_for(divide_up(n, TASK_ELEMENTS), tasks[format], &job);
}

/* ---- dot ---- */

struct dot_job {
    struct message a, b;
    int64_t n;
    double (*sums)[3]; /* one a task */
};

ALWAYS_INLINE void dot_body(enum outer_format format, const struct dot_job *job, int64_t index) {
    vector_f64 sums[3][2] = {{{0}}};
    int64_t end = at_most((index + 1) * TASK_BLOCKS, outer_block_count(job->n));
    for (int64_t block = index * TASK_BLOCKS; block < end; block++) {
        vector_f32 a[BLOCK_VECTORS], b[BLOCK_VECTORS];
        decode_any(format, &job->a, job->n, block, a);
        decode_any(format, &job->b, job->n, block, b);
        for (int v = 0; v < BLOCK_VECTORS; v++) {
            vector_f64 x[2], y[2];
            vector_to_f64(a[v], x);
            vector_to_f64(b[v], y);
            for (int half = 0; half < 2; half++) {
                sums[0][half] = vector_multiply_add_f64(x[half], y[half], sums[0][half]);
                sums[1][half] = vector_multiply_add_f64(x[half], x[half], sums[1][half]);
                sums[2][half] = vector_multiply_add_f64(y[half], y[half], sums[2][half]);
            }
        }
    }
    for (int i = 0; i < 3; i++)
        job->sums[index][i] = sum_f64(sums[i]);
}

static void dot_f32_task(void *context, int64_t index) {
    dot_body(OUTER_F32, context, index);
}

static void dot_bf16_task(void *context, int64_t index) {
    dot_body(OUTER_BF16, context, index);
}

static void dot_fp8_task(void *context, int64_t index) {
    dot_body(OUTER_FP8, context, index);
}

static void dot_fp4_task(void *context, int64_t index) {
    dot_body(OUTER_FP4, context, index);
}

static void dot(const void *a, const void *b, enum outer_format format, int64_t n, struct tensor sums) {
    static void (*const tasks[OUTER_FORMATS])(void *context, int64_t index) = {dot_f32_task, dot_bf16_task,
                                                                               dot_fp8_task, dot_fp4_task};
    CHECK(sums.dtype == DTYPE_F64 && tensor_elements(sums) == 3);
    int64_t task_count = divide_up(n, TASK_ELEMENTS);
    struct dot_job job = {message_of(a, format, n), message_of(b, format, n), n,
                          scratch_call((size_t)task_count * sizeof *job.sums)};
    parallel_for(task_count, tasks[format], &job);
    double *total = sums.data;
    for (int64_t t = 0; t < task_count; t++)
        for (int i = 0; i < 3; i++)
            total[i] += job.sums[t][i];
}

/* ---- update and mixture ---- */

struct update_job {
    const float *sum;
    float *global, *momentum;
    int64_t n;
    float replicas, lr, mu;
};

static void update_task(void *context, int64_t index) {
    const struct update_job *job = context;
    int64_t first = index * TASK_ELEMENTS, count = at_most(job->n - first, TASK_ELEMENTS);
    const float *restrict sum = job->sum + first;
    float *restrict g = job->global + first, *restrict b = job->momentum + first;
    for (int64_t i = 0; i < count; i++) {
        float delta = sum[i] / job->replicas;
        b[i] = job->mu * b[i] + delta;
        g[i] = g[i] - job->lr * (delta + job->mu * b[i]);
    }
}

static void update(struct tensor sum, struct outer_settings settings, struct tensor global, struct tensor momentum) {
    int64_t n = tensor_elements(sum);
    CHECK(sum.dtype == DTYPE_F32 && global.dtype == DTYPE_F32 && momentum.dtype == DTYPE_F32);
    CHECK(tensor_elements(global) == n && tensor_elements(momentum) == n);
    CHECK(settings.replica_count >= 1);
    struct update_job job = {sum.data,
                             global.data,
                             momentum.data,
                             n,
                             (float)settings.replica_count,
                             (float)settings.lr,
                             (float)settings.momentum};
    parallel_for(divide_up(n, TASK_ELEMENTS), update_task, &job);
}

struct mix_job {
    const float *global;
    float *local;
    int64_t n;
    float keep, take;
};

static void mix_task(void *context, int64_t index) {
    const struct mix_job *job = context;
    int64_t first = index * TASK_ELEMENTS, count = at_most(job->n - first, TASK_ELEMENTS);
    const float *restrict g = job->global + first;
    float *restrict own = job->local + first;
    if (job->keep == 0) {
        memcpy(own, g, (size_t)count * sizeof *own);
        return;
    }
    for (int64_t i = 0; i < count; i++)
        own[i] = job->keep * own[i] + job->take * g[i];
}

static void mix(struct tensor global, double keep, struct tensor local) {
    int64_t n = tensor_elements(global);
    CHECK(global.dtype == DTYPE_F32 && local.dtype == DTYPE_F32 && tensor_elements(local) == n);
    CHECK(keep >= 0 && keep <= 1);
    struct mix_job job = {global.data, local.data, n, (float)keep, (float)(1 - keep)};
    parallel_for(divide_up(n, TASK_ELEMENTS), mix_task, &job);
}

void ISA_NAME(outer_fill)(struct kernel_ops *ops) {
    ops->outer_encode = encode;
    ops->outer_decode_add = decode_add;
    ops->outer_update = update;
    ops->outer_mix = mix;
    ops->outer_dot = dot;
}
