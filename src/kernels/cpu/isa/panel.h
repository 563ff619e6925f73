/* Packed panels and the register tile: C (+)= A B for blocks that fit the caches. Private to kernels/cpu/isa/.
 *
 * An operand is packed into panels of words, [k word][lane]: lanes are rows of C for A, columns of C for B. A word is a
 * float, or a pair of bf16 along k where the instruction set multiplies pairs; elsewhere bf16 becomes f32 here. The
 * last pair of an odd k is filled with 0. Lanes beyond an operand hold anything: they only reach numbers of C that
 * are not stored.
 *
 *      A:  row tiles of TILE_ROWS            B:  column panels of TILE_COLUMNS
 *          [tile][k word][TILE_ROWS]             [panel][k word][TILE_COLUMNS]
 *
 * Packing stores whole vectors, one k word after the other: what a vector has beyond its tile is overwritten by the
 * next one. So a packed block needs VECTOR_LANES words of room after its end.
 */
#pragma once

#include "kernels/cpu/isa/matrix.h"

#if defined(__AVX512F__)
enum { TILE_ROWS = 12, TILE_STEP = 4 };
#elif defined(__AVX2__)
enum { TILE_ROWS = 6, TILE_STEP = 2 };
#else
enum { TILE_ROWS = 4, TILE_STEP = 2 };
#endif
enum { TILE_VECTORS = 2, TILE_COLUMNS = TILE_VECTORS * VECTOR_LANES };

/* Rows of packed A that `rows` rows of C take: the last tile may be lower by multiples of TILE_STEP. */
ALWAYS_INLINE int tile_height(int64_t rows) {
    return rows >= TILE_ROWS ? TILE_ROWS : (int)((rows + TILE_STEP - 1) / TILE_STEP * TILE_STEP);
}

ALWAYS_INLINE int64_t words_of(const struct matrix *m, int64_t elements) {
    return (elements + word_elements(m) - 1) / word_elements(m);
}

/* ---- lanes are rows of the matrix, k runs along them: blocks are transposed ---- */

/* Lanes first..first+lanes-1 (at most VECTOR_LANES) of k .. k+count-1, to out[word * stride + lane]. */
ALWAYS_INLINE void pack_rows_lanes(int element_bytes, const struct matrix *m, int64_t first, int64_t lanes, int64_t k,
                                   int64_t count, int stride, float *out) {
    const int step = BF16_PAIRS && element_bytes == 2 ? 2 * VECTOR_LANES : VECTOR_LANES;
    const char *from[VECTOR_LANES];
    for (int i = 0; i < VECTOR_LANES; i++)
        from[i] = matrix_at(m, first + (i < lanes ? i : 0), k);
    for (; count >= step; count -= step, out += VECTOR_LANES * stride) {
        vector_f32 v[VECTOR_LANES];
#pragma GCC unroll 16
        for (int i = 0; i < VECTOR_LANES; i++) {
            v[i] = words_load(element_bytes, from[i], step);
            from[i] += step * element_bytes;
        }
        vector_transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < VECTOR_LANES; i++)
            vector_store(out + i * stride, v[i]);
    }
    if (count > 0) {
        vector_f32 v[VECTOR_LANES];
        for (int i = 0; i < VECTOR_LANES; i++)
            v[i] = words_load(element_bytes, from[i], count);
        vector_transpose(v);
        for (int i = 0; i < words_of(m, count); i++)
            vector_store(out + i * stride, v[i]);
    }
}

static void pack_rows_tile(const struct matrix *m, int64_t first, int64_t lanes, int64_t k, int64_t count,
                           int stride, float *out) {
    if (m->element_bytes == 4)
        pack_rows_lanes(4, m, first, lanes, k, count, stride, out);
    else
        pack_rows_lanes(2, m, first, lanes, k, count, stride, out);
}

/* ---- lanes are columns of the matrix, k runs down them: blocks are copied ---- */

/* VECTOR_LANES lanes of one k word, of which `lanes` exist: row k, and row k+1 beside it where `pair` says so. */
ALWAYS_INLINE vector_f32 word_of_columns(int element_bytes, const char *row, const char *next_row, int64_t lanes) {
    const size_t bytes = (size_t)(VECTOR_LANES * element_bytes);
    char padded[2][4 * VECTOR_LANES];
    if (lanes < VECTOR_LANES) {
        memcpy(padded[0], row, (size_t)lanes * (size_t)element_bytes);
        memset(padded[0] + lanes * element_bytes, 0, bytes - (size_t)(lanes * element_bytes));
        row = padded[0];
        if (next_row) {
            memcpy(padded[1], next_row, (size_t)lanes * (size_t)element_bytes);
            memset(padded[1] + lanes * element_bytes, 0, bytes - (size_t)(lanes * element_bytes));
            next_row = padded[1];
        }
    }
    if (element_bytes == 4)
        return vector_load(row);
    if (!BF16_PAIRS)
        return vector_load_bf16((const uint16_t *)row);
    vector_u32 word = vector_load_u16((const uint16_t *)row);
    if (next_row)
        word |= vector_load_u16((const uint16_t *)next_row) << 16;
    return (vector_f32)word;
}

ALWAYS_INLINE void pack_columns_lanes(int element_bytes, const struct matrix *m, int64_t first, int64_t k,
                                      int64_t count, int stride, float *out) {
    int64_t lanes = m->columns - first;
    if (BF16_PAIRS && element_bytes == 2) {
        int64_t i = 0;
        for (; i + 2 <= count; i += 2, out += stride)
            vector_store(out, word_of_columns(2, matrix_at(m, k + i, first), matrix_at(m, k + i + 1, first), lanes));
        if (i < count)
            vector_store(out, word_of_columns(2, matrix_at(m, k + i, first), NULL, lanes));
        return;
    }
    for (int64_t i = 0; i < count; i++, out += stride)
        vector_store(out, word_of_columns(element_bytes, matrix_at(m, k + i, first), NULL, lanes));
}

static void pack_columns_tile(const struct matrix *m, int64_t first, int64_t k, int64_t count, int stride,
                              float *out) {
    if (m->element_bytes == 4)
        pack_columns_lanes(4, m, first, k, count, stride, out);
    else
        pack_columns_lanes(2, m, first, k, count, stride, out);
}

/* ---- whole blocks ---- */

/* Which side of the stored matrix the lanes are. */
enum lanes { LANES_ARE_ROWS, LANES_ARE_COLUMNS };

static void pack_tile(enum lanes lanes, const struct matrix *m, int64_t first, int64_t lane_count, int64_t k,
                      int64_t count, int stride, float *out) {
    if (lanes == LANES_ARE_ROWS)
        pack_rows_tile(m, first, lane_count, k, count, stride, out);
    else
        pack_columns_tile(m, first, k, count, stride, out);
}

/* Lanes first..first+lane_count-1 as A. */
static void pack_a(enum lanes lanes, const struct matrix *m, int64_t first, int64_t lane_count, int64_t k,
                   int64_t count, float *out) {
    int64_t words = words_of(m, count);
    for (int64_t i = 0; i < lane_count; i += TILE_ROWS) {
        int64_t rest = lane_count - i;
        pack_tile(lanes, m, first + i, rest < TILE_ROWS ? rest : TILE_ROWS, k, count, tile_height(rest), out);
        out += words * TILE_ROWS;
    }
}

/* Lanes first..first+lane_count-1 as B. */
static void pack_b(enum lanes lanes, const struct matrix *m, int64_t first, int64_t lane_count, int64_t k,
                   int64_t count, float *out) {
    int64_t words = words_of(m, count);
    for (int64_t j = 0; j < lane_count; j += TILE_COLUMNS) {
        for (int v = 0; v < TILE_COLUMNS; v += VECTOR_LANES) {
            int64_t rest = lane_count - j - v;
            if (rest > 0)
                pack_tile(lanes, m, first + j + v, rest < VECTOR_LANES ? rest : VECTOR_LANES, k, count, TILE_COLUMNS,
                          out + v);
        }
        out += words * TILE_COLUMNS;
    }
}

/* ---- the register tile ---- */

/* c, of rows x columns at most height x TILE_COLUMNS, = or += with add. height and pairs are constants. */
ALWAYS_INLINE void tile_multiply(int height, bool pairs, const float *a, const float *b, int64_t words, float *c,
                                 int64_t c_stride, int64_t rows, int64_t columns, bool add) {
    vector_f32 sum[TILE_ROWS][TILE_VECTORS] = {{{0}}};
    for (int64_t k = 0; k < words; k++, a += height, b += TILE_COLUMNS) {
        vector_f32 right0 = vector_load(b), right1 = vector_load(b + VECTOR_LANES);
#pragma GCC unroll 12
        for (int i = 0; i < height; i++) {
            vector_f32 left = vector_splat(a[i]);
            sum[i][0] = vector_multiply_add(pairs, left, right0, sum[i][0]);
            sum[i][1] = vector_multiply_add(pairs, left, right1, sum[i][1]);
        }
    }
    if (rows == height && columns == TILE_COLUMNS) {
#pragma GCC unroll 12
        for (int i = 0; i < height; i++) {
#pragma GCC unroll 2
            for (int v = 0; v < TILE_VECTORS; v++) {
                float *to = c + i * c_stride + v * VECTOR_LANES;
                vector_store(to, add ? sum[i][v] + vector_load(to) : sum[i][v]);
            }
        }
        return;
    }
    float spilled[TILE_ROWS][TILE_COLUMNS];
    memcpy(spilled, sum, sizeof sum);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++)
            c[i * c_stride + j] = add ? c[i * c_stride + j] + spilled[i][j] : spilled[i][j];
}

ALWAYS_INLINE void tile_multiply_any(bool pairs, const float *a, const float *b, int64_t words, float *c,
                                     int64_t c_stride, int64_t rows, int64_t columns, bool add) {
    switch (tile_height(rows) / TILE_STEP) {
    case 1:
        tile_multiply(TILE_STEP, pairs, a, b, words, c, c_stride, rows, columns, add);
        break;
    case 2:
        tile_multiply(2 * TILE_STEP, pairs, a, b, words, c, c_stride, rows, columns, add);
        break;
    default:
        tile_multiply(TILE_ROWS, pairs, a, b, words, c, c_stride, rows, columns, add);
    }
}

ALWAYS_INLINE void block_multiply_of(bool pairs, const float *a, const float *b, int64_t words, float *c,
                                     int64_t c_stride, int64_t rows, int64_t columns, bool add) {
    for (int64_t i = 0; i < rows; i += TILE_ROWS) {
        int64_t height = rows - i < TILE_ROWS ? rows - i : TILE_ROWS;
        for (int64_t j = 0; j < columns; j += TILE_COLUMNS) {
            int64_t width = columns - j < TILE_COLUMNS ? columns - j : TILE_COLUMNS;
            tile_multiply_any(pairs, a + i * words, b + j * words, words, c + i * c_stride + j, c_stride, height,
                              width, add);
        }
    }
}

/* c [rows, columns] = or += packed a times packed b, over `words` words of k. */
static void block_multiply(bool pairs, const float *a, const float *b, int64_t words, float *c, int64_t c_stride,
                           int64_t rows, int64_t columns, bool add) {
    if (BF16_PAIRS && pairs)
        block_multiply_of(true, a, b, words, c, c_stride, rows, columns, add);
    else
        block_multiply_of(false, a, b, words, c, c_stride, rows, columns, add);
}
