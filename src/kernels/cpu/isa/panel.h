/* Packed panels: the blocks that tile.h multiplies. Private to kernels/cpu/isa/.
 *
 * An operand is packed into panels of words, [k word][lane]: lanes are rows of C for A, columns of C for B. A word is a
 * float, or a pair of bf16 along k where the instruction set multiplies pairs; elsewhere bf16 becomes f32 here. The
 * last pair of an odd k is filled with 0. Lanes beyond an operand hold anything: they only reach numbers of C that
 * are not stored.
 *
 *      A:  panels of several row tiles       B:  column panels of TILE_COLUMNS
 *          [panel][k word][A_LANES]              [panel][k word][TILE_COLUMNS]
 *
 * (A tile of rows is three quarters of a vector, and packing would store all of it. Four tiles are whole vectors; but they
 * spread the tile that is multiplied over four times the lines, which the first cache of AVX2 machines does not hold.)
 * Packing stores whole vectors: what a vector has beyond its panel falls on the next k word, whose own is stored later, or
 * behind the panel, where VECTOR_LANES words are left free. (That also keeps panels from lying on the same cache sets.)
 *
 * Where the copy multiplies bf16 in tiles, A is arranged as amx.h says, and k is filled up with zeros to whole chunks.
 */
#pragma once

#include "kernels/cpu/isa/matrix.h"
#ifdef __AMX_BF16__
#include "kernels/cpu/isa/amx.h"
#endif

/* Words of k between two jumps, and how far ahead of the product the panel of B is asked for. With AVX2 a core has hardly
 * more instructions than it can take: there a word of B is one line, which the processor asks for by itself. */
#if defined(__AVX512F__)
enum { TILE_ROWS = 12, TILE_STEP = 4, A_TILES = 4, PREFETCH_WORDS = 12, TILE_UNROLL = 1 };
#elif defined(__AVX2__)
enum { TILE_ROWS = 6, TILE_STEP = 2, A_TILES = 2, PREFETCH_WORDS = 0, TILE_UNROLL = 4 };
#else
enum { TILE_ROWS = 4, TILE_STEP = 2, A_TILES = 4, PREFETCH_WORDS = 12, TILE_UNROLL = 1 };
#endif
enum { A_LANES = A_TILES * TILE_ROWS };
enum { TILE_VECTORS = 2, TILE_COLUMNS = TILE_VECTORS * VECTOR_LANES };

/* Lanes of a panel when `lanes` are left: the last panel of A may be narrower, in steps, or in whole vectors where it is more
 * than one. */
ALWAYS_INLINE int panel_width(int64_t lanes, int width) {
    if (width == TILE_COLUMNS || lanes >= width)
        return width;
    int step = lanes > VECTOR_LANES ? VECTOR_LANES : TILE_STEP;
    return (int)at_most((lanes + step - 1) / step * step, width);
}

/* From one panel to the next: room for what the last vector stores beyond its panel. */
ALWAYS_INLINE int64_t panel_floats(int64_t words, int width) {
    return words * width + VECTOR_LANES;
}

/* Floats that a packed block of `lanes` lanes takes; of A: room for both of its arrangements. */
ALWAYS_INLINE int64_t block_floats(int64_t lanes, int64_t words, int width) {
    int64_t floats = (lanes + width - 1) / width * panel_floats(words, width);
    int64_t tile_floats = BF16_TILES && width != TILE_COLUMNS ? (lanes + 15) / 16 * 16 * words : 0;
    return floats > tile_floats ? floats : tile_floats;
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

/* Lanes first..first+lane_count-1 of k..k+count-1 into panels of `width` lanes, the last one maybe narrower. The last vector
 * of a panel goes first: what it has beyond the panel falls on the beginning of the next word. */
ALWAYS_INLINE void pack_rows(int element_bytes, const struct matrix *m, int64_t first, int64_t lane_count, int64_t k,
                             int64_t count, int width, float *out) {
    for (int64_t j = 0; j < lane_count; j += width, out += panel_floats(words_of(m, count), width)) {
        int stride = panel_width(lane_count - j, width);
        int last_lane = (int)at_most(stride, lane_count - j) - 1;
        for (int v = last_lane / VECTOR_LANES * VECTOR_LANES; v >= 0; v -= VECTOR_LANES)
            pack_rows_lanes(element_bytes, m, first + j + v, lane_count - j - v, k, count, stride, out + v);
    }
}

/* ---- lanes are columns of the matrix, k runs down them: blocks are copied ---- */

/* A row of VECTOR_LANES elements, of which `lanes` exist, as words; bf16 pairs: in the lower halves. */
ALWAYS_INLINE vector_u32 row_of_columns(int element_bytes, const void *row, int64_t lanes) {
    char padded[4 * VECTOR_LANES];
    if (lanes < VECTOR_LANES) {
        memset(padded, 0, sizeof padded);
        memcpy(padded, row, (size_t)lanes * (size_t)element_bytes);
        row = padded;
    }
    return element_bytes == 4 ? (vector_u32)vector_load(row) : vector_load_u16(row);
}

/* VECTOR_LANES lanes from column `column` of the k word that begins at row k; `end` is where k ends. */
ALWAYS_INLINE vector_u32 word_of_columns(int element_bytes, const struct matrix *m, int64_t k, int64_t end,
                                         int64_t column) {
    int64_t lanes = m->columns - column;
    if (BF16_TILES && k >= end)
        return (vector_u32){0};
    vector_u32 word = row_of_columns(element_bytes, matrix_at(m, k, column), lanes);
    if (element_bytes == 4)
        return word;
    if (!BF16_PAIRS)
        return word << 16;
    return k + 1 < end ? word | row_of_columns(element_bytes, matrix_at(m, k + 1, column), lanes) << 16 : word;
}

#ifdef __AVX512BF16__
enum { PAIR_LANES = 2 * VECTOR_LANES }; /* that two vectors of bf16 make */

/* Two rows of 32 bf16, as the words of 32 lanes. */
ALWAYS_INLINE void interleave_vectors(__m512i even, __m512i odd, vector_f32 *low, vector_f32 *high) {
    static const uint16_t order[PAIR_LANES] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                               8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i lower = _mm512_loadu_si512(order), upper = _mm512_add_epi16(lower, _mm512_set1_epi16(VECTOR_LANES));
    *low = (vector_f32)_mm512_permutex2var_epi16(even, lower, odd);
    *high = (vector_f32)_mm512_permutex2var_epi16(even, upper, odd);
}

ALWAYS_INLINE void interleave(const void *even, const void *odd, vector_f32 *low, vector_f32 *high) {
    interleave_vectors(_mm512_loadu_si512(even), _mm512_loadu_si512(odd), low, high);
}
#endif

/* The same for two vectors of lanes. Where bf16 come in pairs, two rows of 32 are interleaved at once. */
ALWAYS_INLINE void two_words_of_columns(int element_bytes, const struct matrix *m, int64_t k, int64_t end,
                                        int64_t column, vector_f32 *low, vector_f32 *high) {
#ifdef __AVX512BF16__
    if (element_bytes == 2 && column + 2 * VECTOR_LANES <= m->columns && k + 1 < end) {
        interleave(matrix_at(m, k, column), matrix_at(m, k + 1, column), low, high);
        return;
    }
#endif
    *low = (vector_f32)word_of_columns(element_bytes, m, k, end, column);
    *high = (vector_f32)(vector_u32){0};
    if (column + VECTOR_LANES < m->columns)
        *high = (vector_f32)word_of_columns(element_bytes, m, k, end, column + VECTOR_LANES);
}

enum { COPY_WORDS = 4 }; /* k words at a time: memory is read along rows, panels are written in whole lines */

/* Rows k..end-1 are copied next: their `lanes` lanes from `column` on are asked for. */
ALWAYS_INLINE void ask_for_rows(const struct matrix *m, int64_t k, int64_t end, int64_t column, int lanes) {
    for (; k < end; k++)
        for (const char *from = matrix_at(m, k, column), *last = from + (lanes - 1) * m->element_bytes; from <= last;
             from += 64)
            __builtin_prefetch(from);
}

/* `words` words, a constant of at most COPY_WORDS, of all panels of pack_whole_columns. */
ALWAYS_INLINE void copy_words(int element_bytes, const struct matrix *m, int64_t first, int64_t lane_count, int64_t k,
                              int words, int64_t end, int width, int64_t panel_words, float *out) {
    const int bytes = width * element_bytes;
    const char *from[COPY_WORDS], *next[COPY_WORDS];
    for (int i = 0; i < words; i++) {
        from[i] = matrix_at(m, k + i, first);
        next[i] = matrix_at(m, at_most(k + COPY_WORDS + i, end - 1), first);
    }
    for (int64_t at = 0; at < lane_count * element_bytes; at += bytes, out += panel_floats(panel_words, width))
#pragma GCC unroll 4
        for (int i = 0; i < words; i++) {
            for (int line = 0; line < bytes && at % 64 < bytes; line += 64)
                __builtin_prefetch(next[i] + at + line);
#pragma GCC unroll 4
            for (int v = 0; v < width; v += VECTOR_LANES) {
                const char *row = from[i] + at + v * element_bytes;
                vector_store(out + i * width + v,
                             element_bytes == 4 ? vector_load(row) : vector_load_bf16((const uint16_t *)row));
            }
        }
}

/* pack_columns for whole panels, where a word is one element and every vector lies within its row. */
ALWAYS_INLINE void pack_whole_columns(int element_bytes, const struct matrix *m, int64_t first, int64_t lane_count,
                                      int64_t k, int64_t count, int width, int64_t panel_words, float *out) {
    int64_t end = k + count;
    for (; k + COPY_WORDS <= end; k += COPY_WORDS, out += COPY_WORDS * width)
        copy_words(element_bytes, m, first, lane_count, k, COPY_WORDS, end, width, panel_words, out);
    for (; k < end; k++, out += width)
        copy_words(element_bytes, m, first, lane_count, k, 1, end, width, panel_words, out);
}

#ifdef __AVX512BF16__
/* `words` words, a constant of at most COPY_WORDS, of all panels of pack_whole_pairs. */
ALWAYS_INLINE void copy_pairs(const struct matrix *m, int64_t first, int64_t lane_count, int64_t k, int words, int64_t end,
                              int width, int64_t panel_words, float *out) {
    const int panels = width % PAIR_LANES == 0 ? 1 : 2, lanes = panels * width; /* that whole vectors make */
    const int64_t panel = panel_floats(panel_words, width);
    const bool more = k + 2 * words < end;
    const uint16_t *from[2 * COPY_WORDS], *next[2 * COPY_WORDS];
    for (int i = 0; i < 2 * words; i++) {
        from[i] = matrix_at(m, k + i, first);
        next[i] = matrix_at(m, at_most(k + 2 * COPY_WORDS + i, end - 1), first);
    }
    for (int64_t at = 0; at < lane_count; at += lanes, out += panels * panel)
#pragma GCC unroll 4
        for (int i = 0; i < words; i++) {
            const uint16_t *even = from[2 * i] + at, *odd = from[2 * i + 1] + at;
            vector_f32 v[2 * A_LANES / VECTOR_LANES];
#pragma GCC unroll 3
            for (int lane = 0; lane < lanes; lane += PAIR_LANES) {
                if (more) {
                    __builtin_prefetch(next[2 * i] + at + lane);
                    __builtin_prefetch(next[2 * i + 1] + at + lane);
                }
                interleave(even + lane, odd + lane, &v[lane / VECTOR_LANES], &v[lane / VECTOR_LANES + 1]);
            }
#pragma GCC unroll 6
            for (int lane = 0; lane < lanes; lane += VECTOR_LANES)
                vector_store(out + lane / width * panel + i * width + lane % width, v[lane / VECTOR_LANES]);
        }
}

/* pack_columns for whole pairs of rows, and panels whose lanes are whole vectors of bf16: one of B, two of A. */
ALWAYS_INLINE void pack_whole_pairs(const struct matrix *m, int64_t first, int64_t lane_count, int64_t k, int64_t count,
                                    int width, int64_t panel_words, float *out) {
    int64_t end = k + count;
    for (; k + 2 * COPY_WORDS <= end; k += 2 * COPY_WORDS, out += COPY_WORDS * width)
        copy_pairs(m, first, lane_count, k, COPY_WORDS, end, width, panel_words, out);
    for (; k < end; k += 2, out += width)
        copy_pairs(m, first, lane_count, k, 1, end, width, panel_words, out);
}
#endif

/* Lanes first..first+lane_count-1 of rows k..k+count-1 into panels of `width` lanes, the last one maybe narrower.
 * panel_words: of the panels written to, which may be parts of longer ones. */
ALWAYS_INLINE void pack_columns(int element_bytes, const struct matrix *m, int64_t first, int64_t lane_count, int64_t k,
                                int64_t count, int width, int64_t panel_words, float *out) {
    const int elements = BF16_PAIRS && element_bytes == 2 ? 2 : 1;
    int64_t words = words_of(m, count), end = k + count, whole = 0;
    if (elements == 1) {
        const int beyond = (width + VECTOR_LANES - 1) / VECTOR_LANES * VECTOR_LANES - width; /* of a panel's last vector */
        int64_t readable = at_most(lane_count, m->columns - first - beyond);
        whole = readable > 0 ? readable / width * width : 0;
        pack_whole_columns(element_bytes, m, first, whole, k, count, width, panel_words, out);
        if (whole == lane_count)
            return;
    }
#ifdef __AVX512BF16__
    if (elements == 2 && count % 2 == 0 && words == count / 2) {
        const int lanes = width % PAIR_LANES == 0 ? width : 2 * width;
        whole = lane_count / lanes * lanes;
        pack_whole_pairs(m, first, whole, k, count, width, panel_words, out);
        if (whole == lane_count)
            return;
    }
#endif
    for (int64_t word = 0; word < words; word += COPY_WORDS) {
        int64_t word_end = at_most(word + COPY_WORDS, words);
        for (int64_t j = whole; j < lane_count; j += width) {
            int stride = panel_width(lane_count - j, width);
            float *panel = out + j / width * panel_floats(panel_words, width);
            ask_for_rows(m, k + word_end * elements, at_most(end, k + (word_end + COPY_WORDS) * elements), first + j,
                         stride);
            for (int v = 0; v < stride && j + v < lane_count; v += 2 * VECTOR_LANES)
                for (int64_t i = word; i < word_end; i++) {
                    vector_f32 low, high;
                    float *to = panel + i * stride + v;
                    two_words_of_columns(element_bytes, m, k + i * elements, end, first + j + v, &low, &high);
                    vector_store(to, low);
                    if (v + VECTOR_LANES < stride)
                        vector_store(to + VECTOR_LANES, high);
                }
        }
    }
}

/* ---- whole blocks ---- */

/* Which side of the stored matrix the lanes are. */
enum lanes { LANES_ARE_ROWS, LANES_ARE_COLUMNS };

/* Lanes first..first+lane_count-1 of k..k+count-1 into panels of `width` lanes (a constant): A_LANES for A,
 * TILE_COLUMNS for B. */
ALWAYS_INLINE void pack(enum lanes lanes, const struct matrix *m, int64_t first, int64_t lane_count, int64_t k,
                        int64_t count, int width, float *out) {
    if (lanes == LANES_ARE_ROWS && m->element_bytes == 4)
        pack_rows(4, m, first, lane_count, k, count, width, out);
    else if (lanes == LANES_ARE_ROWS)
        pack_rows(2, m, first, lane_count, k, count, width, out);
    else if (m->element_bytes == 4)
        pack_columns(4, m, first, lane_count, k, count, width, words_of(m, count), out);
    else
        pack_columns(2, m, first, lane_count, k, count, width, words_of(m, count), out);
}

#ifdef __AMX_BF16__
/* Columns of the matrix as the rows of A: a chunk of words of 16 lanes is turned round. */
HEADER_FUNCTION void amx_pack_columns(const struct matrix *m, int64_t first, int64_t lane_count, int64_t k, int64_t count,
                             float *out) {
    int64_t chunks = words_of(m, count) / AMX_WORDS, tile = chunks * AMX_TILE_FLOATS;
    for (int64_t lane = 0; lane < lane_count; lane += 2 * AMX_ROWS, out += 2 * tile)
        for (int64_t c = 0; c < chunks; c++) {
            vector_f32 upper[VECTOR_LANES], lower[VECTOR_LANES];
            float *to = out + c * AMX_TILE_FLOATS;
#pragma GCC unroll 16
            for (int i = 0; i < AMX_WORDS; i++)
                two_words_of_columns(2, m, k + 2 * (c * AMX_WORDS + i), k + count, first + lane, &upper[i], &lower[i]);
            vector_transpose(upper);
#pragma GCC unroll 16
            for (int i = 0; i < AMX_ROWS; i++)
                vector_store(to + i * AMX_WORDS, upper[i]);
            if (lane + AMX_ROWS >= lane_count)
                continue;
            vector_transpose(lower);
#pragma GCC unroll 16
            for (int i = 0; i < AMX_ROWS; i++)
                vector_store(to + tile + i * AMX_WORDS, lower[i]);
        }
}
#endif

HEADER_FUNCTION void pack_a(enum lanes lanes, const struct matrix *m, int64_t first, int64_t lane_count, int64_t k,
                   int64_t count, float *out) {
#ifdef __AMX_BF16__
    if (m->element_bytes == 2) {
        (lanes == LANES_ARE_ROWS ? amx_pack_rows : amx_pack_columns)(m, first, lane_count, k, count, out);
        return;
    }
#endif
    pack(lanes, m, first, lane_count, k, count, A_LANES, out);
}

HEADER_FUNCTION void pack_b(enum lanes lanes, const struct matrix *m, int64_t first, int64_t lane_count, int64_t k,
                   int64_t count, float *out) {
    pack(lanes, m, first, lane_count, k, count, TILE_COLUMNS, out);
}
