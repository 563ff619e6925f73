/* The register tile: C (+)= A B for packed blocks that fit the caches. Private to kernels/cpu/isa/. */
#pragma once

#include "kernels/cpu/isa/ahead.h"
#include "kernels/cpu/isa/panel.h"

/* Where a product goes: c [rows, columns], f32 or bf16, = or += . */
struct target {
    void *c;
    int64_t stride; /* elements from row to row */
    int64_t rows, columns;
    bool add;
};

/* The part that begins at row i, column j, of at most so many. */
ALWAYS_INLINE struct target target_part(struct target t, int element_bytes, int64_t i, int64_t rows, int64_t j,
                                        int64_t columns) {
    return (struct target){(char *)t.c + (i * t.stride + j) * element_bytes, t.stride, at_most(t.rows - i, rows),
                           at_most(t.columns - j, columns), t.add};
}

/* to = or += from, rounded once. */
ALWAYS_INLINE void round_row(const float *from, uint16_t *to, int64_t count, bool add) {
    int64_t j = 0;
    for (; j + VECTOR_LANES <= count; j += VECTOR_LANES) {
        vector_f32 value = vector_load(from + j);
        vector_store_bf16(to + j, add ? value + vector_load_bf16(to + j) : value);
    }
    for (; j < count; j++)
        to[j] = float_to_bf16(add ? from[j] + bf16_to_float(to[j]) : from[j]);
}

/* One row of a whole tile. */
ALWAYS_INLINE void store_row(bool rounded, void *to, vector_f32 v0, vector_f32 v1, bool add) {
    if (rounded) {
        uint16_t *c = to;
        if (add) {
            v0 += vector_load_bf16(c);
            v1 += vector_load_bf16(c + VECTOR_LANES);
        }
#ifdef __AVX512BF16__
        __m512bh both = _mm512_cvtne2ps_pbh((__m512)v1, (__m512)v0);
        memcpy(c, &both, sizeof both);
#else
        vector_store_bf16(c, v0);
        vector_store_bf16(c + VECTOR_LANES, v1);
#endif
        return;
    }
    float *c = to;
    vector_store(c, add ? v0 + vector_load(c) : v0);
    vector_store(c + VECTOR_LANES, add ? v1 + vector_load(c + VECTOR_LANES) : v1);
}

/* A tile that is not whole. */
ALWAYS_INLINE void store_part(bool rounded, struct target t, const float *sums) {
    for (int64_t i = 0; i < t.rows; i++, sums += TILE_COLUMNS) {
        if (rounded) {
            round_row(sums, (uint16_t *)t.c + i * t.stride, t.columns, t.add);
            continue;
        }
        float *c = (float *)t.c + i * t.stride;
        for (int64_t j = 0; j < t.columns; j++)
            c[j] = t.add ? c[j] + sums[j] : sums[j];
    }
}

/* sum += the words k..end-1 of a panel of A, a_lanes apart, times those of a panel of B. */
ALWAYS_INLINE void tile_words(int height, bool pairs, const float *a, int64_t a_lanes, const float *b, int64_t k, int64_t end,
                              vector_f32 sum[TILE_ROWS][TILE_VECTORS]) {
    a += k * a_lanes;
    b += k * TILE_COLUMNS;
#pragma GCC unroll TILE_UNROLL
    for (; k < end; k++, a += a_lanes, b += TILE_COLUMNS) {
        vector_f32 right0 = vector_load(b), right1 = vector_load(b + VECTOR_LANES);
        if (PREFETCH_WORDS > 0) {
            __builtin_prefetch(b + PREFETCH_WORDS * TILE_COLUMNS);
            __builtin_prefetch(b + PREFETCH_WORDS * TILE_COLUMNS + VECTOR_LANES);
        }
#pragma GCC unroll 12
        for (int i = 0; i < height; i++) {
            vector_f32 left = vector_splat_word(pairs, a + i);
            sum[i][0] = vector_multiply_add(pairs, left, right0, sum[i][0]);
            sum[i][1] = vector_multiply_add(pairs, left, right1, sum[i][1]);
        }
    }
}

/* Whole tiles of sums: to f32; to bf16; to f32 past the caches, written only, rows aligned to vectors. */
enum way { TO_F32, TO_BF16, PAST_CACHES };

/* One tile; t has at most height x TILE_COLUMNS. Constants: height; pairs; way; ahead, if it is NULL.
 * a_lanes: of the panel that the rows stand in. */
ALWAYS_INLINE void tile_multiply(int height, bool pairs, enum way way, const float *a, int64_t a_lanes, const float *b,
                                 int64_t words, struct target t, struct ahead *ahead) {
    const bool rounded = way == TO_BF16;
    const int64_t bytes = rounded ? 2 : 4, row_bytes = t.stride * bytes;
    vector_f32 sum[TILE_ROWS][TILE_VECTORS] = {{{0}}};
    for (int64_t i = 0; i < (t.add ? t.rows : 0); i++) { /* c may come from far: it does so while we multiply */
        __builtin_prefetch((char *)t.c + i * row_bytes, 1);
        __builtin_prefetch((char *)t.c + i * row_bytes + (TILE_COLUMNS - 1) * bytes, 1);
    }
    if (ahead)
        for (int64_t k = 0; k < words; k += ASK_WORDS) {
            ahead_ask(ahead);
            tile_words(height, pairs, a, a_lanes, b, k, at_most(words, k + ASK_WORDS), sum);
        }
    else
        tile_words(height, pairs, a, a_lanes, b, 0, words, sum);
    if (way == PAST_CACHES && t.rows == height && t.columns == TILE_COLUMNS) {
#pragma GCC unroll 12
        for (int i = 0; i < height; i++) {
            vector_stream((float *)t.c + i * t.stride, sum[i][0]);
            vector_stream((float *)t.c + i * t.stride + VECTOR_LANES, sum[i][1]);
        }
        return;
    }
    if (t.rows == height && t.columns == TILE_COLUMNS) {
#pragma GCC unroll 12
        for (int i = 0; i < height; i++)
            store_row(rounded, (char *)t.c + i * row_bytes, sum[i][0], sum[i][1], t.add);
        return;
    }
    float spilled[TILE_ROWS][TILE_COLUMNS];
    memcpy(spilled, sum, sizeof sum);
    store_part(rounded, t, spilled[0]);
}

ALWAYS_INLINE void tile_multiply_any(bool pairs, enum way way, const float *a, int64_t a_lanes, const float *b, int64_t words,
                                     struct target t, struct ahead *ahead) {
    switch (panel_width(t.rows, TILE_ROWS) / TILE_STEP) {
    case 1:
        tile_multiply(TILE_STEP, pairs, way, a, a_lanes, b, words, t, ahead);
        break;
    case 2:
        tile_multiply(2 * TILE_STEP, pairs, way, a, a_lanes, b, words, t, ahead);
        break;
    default:
        tile_multiply(TILE_ROWS, pairs, way, a, a_lanes, b, words, t, ahead);
    }
}

/* How many tiles a block has. */
static inline int64_t tile_count(int64_t rows, int64_t columns) {
    return divide_up(rows, TILE_ROWS) * divide_up(columns, TILE_COLUMNS);
}

/* Where lane `lane` of packed A begins, a multiple of A_LANES. */
ALWAYS_INLINE int64_t a_lane_floats(bool pairs, int64_t words, int64_t lane) {
    return BF16_TILES && pairs ? lane * words : lane / A_LANES * panel_floats(words, A_LANES);
}

ALWAYS_INLINE void block_multiply_of(bool pairs, enum way way, const float *a, const float *b, int64_t b_panel_floats,
                                     int64_t words, struct target t, struct ahead *ahead) {
    for (int64_t i = 0; i < t.rows; i += TILE_ROWS) {
        int64_t panel = i / A_LANES * A_LANES, a_lanes = panel_width(t.rows - panel, A_LANES);
        for (int64_t j = 0; j < t.columns; j += TILE_COLUMNS)
            tile_multiply_any(pairs, way, a + panel / A_LANES * panel_floats(words, A_LANES) + (i - panel), a_lanes,
                              b + j / TILE_COLUMNS * b_panel_floats, words,
                              target_part(t, way == TO_BF16 ? 2 : 4, i, TILE_ROWS, j, TILE_COLUMNS), ahead);
    }
}

/* Packed a times panels of b that lie b_panel_floats apart, over `words` words of k, into t, which is f32. */
ALWAYS_INLINE void block_multiply_into(bool pairs, const float *a, const float *b, int64_t b_panel_floats, int64_t words,
                                       struct target t, struct ahead *ahead) {
#ifdef __AMX_BF16__
    if (pairs) {
        amx_prepare();
        for (int64_t j = 0; j < t.columns; j += AMX_LANES) /* a panel of B stays in the first cache, A passes by */
            for (int64_t i = 0; i < t.rows; i += 2 * AMX_ROWS)
                amx_tile(a + i * words, b + j / AMX_LANES * b_panel_floats, words, (float *)t.c + i * t.stride + j, t.stride,
                         at_most(t.rows - i, 2 * AMX_ROWS), at_most(t.columns - j, AMX_LANES), t.add);
        return;
    }
#endif
    if (BF16_PAIRS && pairs)
        block_multiply_of(true, TO_F32, a, b, b_panel_floats, words, t, ahead);
    else
        block_multiply_of(false, TO_F32, a, b, b_panel_floats, words, t, ahead);
}

/* The same while what is ahead is asked for (not where bf16 multiply in tiles). */
HEADER_FUNCTION void block_multiply_ahead(bool pairs, const float *a, const float *b, int64_t b_panel_floats, int64_t words,
                                          struct target t, struct ahead *ahead) {
    block_multiply_into(pairs, a, b, b_panel_floats, words, t, ahead);
}

/* The same past the caches: t is written, its rows are aligned to vectors. Not where bf16 multiply in tiles. */
HEADER_FUNCTION void block_multiply_past(bool pairs, const float *a, const float *b, int64_t b_panel_floats, int64_t words,
                                         struct target t, struct ahead *ahead) {
    if (BF16_PAIRS && pairs)
        block_multiply_of(true, PAST_CACHES, a, b, b_panel_floats, words, t, ahead);
    else
        block_multiply_of(false, PAST_CACHES, a, b, b_panel_floats, words, t, ahead);
}

/* The same for t in bf16. */
HEADER_FUNCTION void block_multiply_rounded(bool pairs, const float *a, const float *b, int64_t b_panel_floats, int64_t words,
                                            struct target t, struct ahead *ahead) {
#ifdef __AMX_BF16__
    if (pairs) { /* every tile of sums is rounded while it is in the first cache */
        float sums[2 * AMX_ROWS * AMX_LANES] __attribute__((aligned(64)));
        amx_prepare();
        for (int64_t j = 0; j < t.columns; j += AMX_LANES)
            for (int64_t i = 0; i < t.rows; i += 2 * AMX_ROWS) {
                struct target part = target_part(t, 2, i, 2 * AMX_ROWS, j, AMX_LANES);
                amx_tile_sums(a + i * words, b + j / AMX_LANES * b_panel_floats, words, sums, part.rows);
                for (int64_t r = 0; r < part.rows; r++)
                    round_row(sums + r * AMX_LANES, (uint16_t *)part.c + r * t.stride, part.columns, t.add);
            }
        return;
    }
#endif
    if (BF16_PAIRS && pairs)
        block_multiply_of(true, TO_BF16, a, b, b_panel_floats, words, t, ahead);
    else
        block_multiply_of(false, TO_BF16, a, b, b_panel_floats, words, t, ahead);
}

/* c [rows, columns] = or += packed a times panels of b. */
HEADER_FUNCTION void block_multiply_panels(bool pairs, const float *a, const float *b, int64_t b_panel_floats, int64_t words,
                                           float *c, int64_t c_stride, int64_t rows, int64_t columns, bool add) {
    block_multiply_into(pairs, a, b, b_panel_floats, words, (struct target){c, c_stride, rows, columns, add}, NULL);
}

/* The same with both blocks packed over the same words. */
HEADER_FUNCTION void block_multiply(bool pairs, const float *a, const float *b, int64_t words, float *c, int64_t c_stride,
                                    int64_t rows, int64_t columns, bool add) {
    block_multiply_panels(pairs, a, b, panel_floats(words, TILE_COLUMNS), words, c, c_stride, rows, columns, add);
}
