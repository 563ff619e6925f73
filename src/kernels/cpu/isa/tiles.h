/* Products of blocks that fit the caches: operands are packed into panels as wide as the register tile, gathered and
 * converted on the way, then multiplied tile by tile. Private to kernels/cpu/isa/.
 *
 * A panel of width W holds, for each k in turn, the W values that one step of the tile needs. In the bf16 copy the
 * values of two k's lie side by side, as the processor's dot product of pairs takes them.
 */
#pragma once

#include "kernels/cpu/isa/lanes.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

/* A matrix [count, depth] as the product sees it: element (i, k). */
struct operand {
    const void *data;
    enum dtype dtype;    /* f32 or bf16 */
    int64_t stride;      /* elements from one row in memory to the next */
    const int32_t *rows; /* which row in memory stands for row i (or k); NULL: itself */
    int64_t first_row;   /* added to i (or k) before `rows` is asked */
    int64_t first_column;
    bool depth_in_rows;  /* false: element (i,k) is row i, column k; true: row k, column i */
};

/* True where panels of this dtype hold pairs of bf16. */
static inline bool packs_pairs(enum dtype dtype) {
#if defined(__AVX512BF16__)
    return dtype == DTYPE_BF16;
#else
    (void)dtype;
    return false;
#endif
}

static inline int64_t operand_row(const struct operand *o, int64_t i) {
    return o->rows ? o->rows[o->first_row + i] : o->first_row + i;
}

/* Bytes of `panels` panels of width W and depth kc; both forms take 4 bytes for each (i, k) or pair, rounded up. */
static inline size_t panel_bytes(int64_t count, int width, int64_t kc) {
    return (size_t)((count + width - 1) / width * width) * (size_t)(kc + 1) * sizeof(float) + 64;
}

static inline void pack_floats(const struct operand *o, int64_t i0, int64_t count, int width, int64_t k0, int64_t kc,
                               float *out) {
    if (count < width)
        memset(out, 0, (size_t)(width * kc) * sizeof *out);
    if (o->depth_in_rows) {
        for (int64_t k = 0; k < kc; k++) {
            int64_t at = operand_row(o, k0 + k) * o->stride + o->first_column + i0;
            if (o->dtype == DTYPE_F32) {
                memcpy(out + k * width, (const float *)o->data + at, (size_t)count * sizeof *out);
            } else {
                const uint16_t *from = (const uint16_t *)o->data + at;
                for (int64_t i = 0; i < count; i++)
                    out[k * width + i] = load_bf16(from[i]);
            }
        }
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        int64_t at = operand_row(o, i0 + i) * o->stride + o->first_column + k0;
        if (o->dtype == DTYPE_F32) {
            const float *from = (const float *)o->data + at;
            for (int64_t k = 0; k < kc; k++)
                out[k * width + i] = from[k];
        } else {
            const uint16_t *from = (const uint16_t *)o->data + at;
            for (int64_t k = 0; k < kc; k++)
                out[k * width + i] = load_bf16(from[k]);
        }
    }
}

/* Pairs (k, k+1) of bf16 in one 32-bit word; an odd last k is paired with zero. */
static inline void pack_pairs(const struct operand *o, int64_t i0, int64_t count, int width, int64_t k0, int64_t kc,
                              uint32_t *out) {
    const uint16_t *data = o->data;
    int64_t pairs = (kc + 1) / 2;
    if (count < width || kc % 2)
        memset(out, 0, (size_t)(width * pairs) * sizeof *out);
    if (o->depth_in_rows) {
        for (int64_t p = 0; p < pairs; p++) {
            const uint16_t *low = data + operand_row(o, k0 + 2 * p) * o->stride + o->first_column + i0;
            bool has_high = 2 * p + 1 < kc;
            const uint16_t *high = has_high ? data + operand_row(o, k0 + 2 * p + 1) * o->stride + o->first_column + i0 : low;
            uint32_t mask = has_high ? 0xFFFF0000u : 0;
            for (int64_t i = 0; i < count; i++)
                out[p * width + i] = low[i] | ((uint32_t)high[i] << 16 & mask);
        }
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        const uint16_t *from = data + operand_row(o, i0 + i) * o->stride + o->first_column + k0;
        for (int64_t p = 0; p < kc / 2; p++) {
            uint32_t pair;
            memcpy(&pair, from + 2 * p, sizeof pair); /* little-endian: the lower k in the lower half */
            out[p * width + i] = pair;
        }
        if (kc % 2)
            out[(pairs - 1) * width + i] = from[kc - 1];
    }
}

/* Rows i0.. of an operand, as many panels as `count` needs, each `panel_stride` floats after the other. */
static inline int64_t panel_stride(int width, int64_t kc, enum dtype dtype) {
    return width * (packs_pairs(dtype) ? (kc + 1) / 2 : kc);
}

static inline void pack_panels(const struct operand *o, int64_t i0, int64_t count, int width, int64_t k0, int64_t kc,
                        float *out) {
    int64_t stride = panel_stride(width, kc, o->dtype);
    for (int64_t i = 0; i < count; i += width, out += stride) {
        int64_t here = smaller(width, count - i);
        if (packs_pairs(o->dtype))
            pack_pairs(o, i0 + i, here, width, k0, kc, (uint32_t *)out);
        else
            pack_floats(o, i0 + i, here, width, k0, kc, out);
    }
}

/* acc [TILE_ROWS][2 vectors] of one tile. */
static inline void tile_floats(int64_t kc, const float *a, const float *b, vfloat acc[TILE_ROWS][2]) {
    for (int64_t k = 0; k < kc; k++, a += TILE_ROWS, b += TILE_COLUMNS) {
        vfloat b0 = vload(b), b1 = vload(b + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < TILE_ROWS; r++) {
            vfloat x = vset(a[r]);
            acc[r][0] += x * b0;
            acc[r][1] += x * b1;
        }
    }
}

static inline void tile_pairs(int64_t pairs, const float *a, const float *b, vfloat acc[TILE_ROWS][2]) {
#if defined(__AVX512BF16__)
    for (int64_t p = 0; p < pairs; p++, a += TILE_ROWS, b += TILE_COLUMNS) {
        __m512bh b0 = (__m512bh)vload(b), b1 = (__m512bh)vload(b + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < TILE_ROWS; r++) {
            __m512bh x = (__m512bh)_mm512_set1_ps(a[r]);
            acc[r][0] = (vfloat)_mm512_dpbf16_ps((__m512)acc[r][0], x, b0);
            acc[r][1] = (vfloat)_mm512_dpbf16_ps((__m512)acc[r][1], x, b1);
        }
    }
#else
    (void)pairs;
    (void)a;
    (void)b;
    (void)acc;
#endif
}

static inline void store_tile(vfloat acc[TILE_ROWS][2], float *c, int64_t ldc, int64_t rows, int64_t columns,
                              bool accumulate) {
    for (int64_t r = 0; r < rows; r++) {
        float line[TILE_COLUMNS];
        vstore(line, acc[r][0]);
        vstore(line + LANES, acc[r][1]);
        for (int64_t j = 0; j < columns; j++)
            c[r * ldc + j] = accumulate ? c[r * ldc + j] + line[j] : line[j];
    }
}

static inline void store_full_tile(vfloat acc[TILE_ROWS][2], float *c, int64_t ldc, bool accumulate) {
#pragma GCC unroll 12
    for (int r = 0; r < TILE_ROWS; r++, c += ldc) {
        vstore(c, accumulate ? vload(c) + acc[r][0] : acc[r][0]);
        vstore(c + LANES, accumulate ? vload(c + LANES) + acc[r][1] : acc[r][1]);
    }
}

/* C [m,n] (ldc) = (or +=) packed A times packed B over kc. */
static inline void multiply_panels(int64_t m, int64_t n, int64_t kc, bool pairs, const float *a, const float *b, float *c,
                            int64_t ldc, bool accumulate) {
    int64_t steps = pairs ? (kc + 1) / 2 : kc;
    for (int64_t j = 0; j < n; j += TILE_COLUMNS)
        for (int64_t i = 0; i < m; i += TILE_ROWS) {
            vfloat acc[TILE_ROWS][2] = {{{0}}};
            const float *pa = a + i * steps, *pb = b + j * steps;
            int64_t rows = smaller(TILE_ROWS, m - i), columns = smaller(TILE_COLUMNS, n - j);
            if (pairs)
                tile_pairs(steps, pa, pb, acc);
            else
                tile_floats(steps, pa, pb, acc);
            if (rows == TILE_ROWS && columns == TILE_COLUMNS)
                store_full_tile(acc, c + i * ldc + j, ldc, accumulate);
            else
                store_tile(acc, c + i * ldc + j, ldc, rows, columns, accumulate);
        }
}
