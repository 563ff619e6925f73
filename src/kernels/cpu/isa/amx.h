/* Products of bf16 blocks by the processor's tile registers. Private to kernels/cpu/isa/; included by panel.h where the
 * copy has them.
 *
 * A tile register holds 16 rows of 64 bytes. One instruction adds to a 16 x 16 tile of f32 the product of 16 rows of 16
 * words of A and 16 words of 16 lanes of B. Four sums, two tiles of A and two of B use all eight registers:
 *
 *              B 16 lanes   B 16 lanes
 *      A 16 rows   sum 0        sum 1
 *      A 16 rows   sum 2        sum 3
 *
 * Packed A is [row tile][chunk of 16 words][16 rows][16 words], every tile 1 KiB in one piece. Packed B is a panel as
 * everywhere, [word][32 lanes]. Words come in whole chunks, the missing ones 0 in A and in B.
 */
#pragma once

#include "kernels/cpu/isa/matrix.h"

#include <immintrin.h>
#ifdef CADRE_ISA_AMXMODEL
#include "kernels/cpu/isa/amx_model.h"
#endif

enum { AMX_ROWS = 16, AMX_WORDS = 16, AMX_TILE_FLOATS = AMX_ROWS * AMX_WORDS, AMX_LANES = 32 };

/* Rows of A: where they begin and how far it is to the next row and to the next 16 words, in floats. */
struct amx_rows {
    const float *data;
    int64_t row_floats, chunk_floats;
};

/* Once for a thread: nothing else in this process changes the tiles' shape. */
HEADER_FUNCTION void amx_prepare(void) {
    static _Thread_local bool is_prepared;
    if (is_prepared)
        return;
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shape.row_bytes[i] = 4 * AMX_WORDS;
        shape.rows[i] = AMX_ROWS;
    }
    __asm__ volatile("" : : "r"(&shape) : "memory"); /* GCC 12 believes that only the first bytes are read */
    _tile_loadconfig(&shape);
    is_prepared = true;
}

/* c [32,32] = a [32 rows] times a panel of B; with `add`, +=. The second 16 rows are left out without `both`. */
ALWAYS_INLINE void amx_multiply(struct amx_rows a0, struct amx_rows a1, bool both, const float *b, int64_t chunks,
                                float *c, int64_t c_stride, bool add) {
    const size_t c_bytes = (size_t)c_stride * sizeof *c, a_bytes = (size_t)a0.row_floats * sizeof *c;
    const size_t b_bytes = AMX_LANES * sizeof *b;
    float *c_below = c + AMX_ROWS * c_stride;
    __asm__ volatile("" : : : "memory"); /* GCC does not know that tiles are loaded from memory: what was stored stands */
    if (add) {
        _tile_loadd(0, c, c_bytes);
        _tile_loadd(1, c + AMX_WORDS, c_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
    }
    if (both && add) {
        _tile_loadd(2, c_below, c_bytes);
        _tile_loadd(3, c_below + AMX_WORDS, c_bytes);
    } else {
        _tile_zero(2);
        _tile_zero(3);
    }
    const float *upper = a0.data, *lower = a1.data;
    for (int64_t k = 0; k < chunks; k++, b += AMX_WORDS * AMX_LANES) {
        _tile_loadd(4, upper, a_bytes);
        _tile_loadd(6, b, b_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + AMX_WORDS, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
        if (both) {
            _tile_loadd(5, lower, a_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        upper += a0.chunk_floats;
        lower += a0.chunk_floats;
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + AMX_WORDS, c_bytes);
    if (both) {
        _tile_stored(2, c_below, c_bytes);
        _tile_stored(3, c_below + AMX_WORDS, c_bytes);
    }
}

/* sums [32,32] = the first `rows` rows of packed A times a panel of B; other rows hold anything. */
HEADER_FUNCTION void amx_tile_sums(const float *a, const float *b, int64_t words, float *sums, int64_t rows) {
    const int64_t chunks = words / AMX_WORDS;
    struct amx_rows upper = {a, AMX_WORDS, AMX_TILE_FLOATS};
    struct amx_rows lower = {a + chunks * AMX_TILE_FLOATS, AMX_WORDS, AMX_TILE_FLOATS};
    if (rows > AMX_ROWS)
        amx_multiply(upper, lower, true, b, chunks, sums, AMX_LANES, false);
    else
        amx_multiply(upper, lower, false, b, chunks, sums, AMX_LANES, false);
}

/* c, of rows x columns at most 32 x 32, = or += . With `add` the sum begins at what c holds, whether the tile is whole
 * or not: a number does not depend on how the product was cut into tasks. */
HEADER_FUNCTION void amx_tile(const float *a, const float *b, int64_t words, float *c, int64_t c_stride, int64_t rows,
                            int64_t columns, bool add) {
    const int64_t chunks = words / AMX_WORDS;
    struct amx_rows upper = {a, AMX_WORDS, AMX_TILE_FLOATS};
    struct amx_rows lower = {a + chunks * AMX_TILE_FLOATS, AMX_WORDS, AMX_TILE_FLOATS};
    bool both = rows > AMX_ROWS;
    if (columns == AMX_LANES && (rows == 2 * AMX_ROWS || rows == AMX_ROWS)) {
        if (both)
            amx_multiply(upper, lower, true, b, chunks, c, c_stride, add);
        else
            amx_multiply(upper, lower, false, b, chunks, c, c_stride, add);
        return;
    }
    float spilled[2 * AMX_ROWS][AMX_LANES] __attribute__((aligned(64)));
    const size_t row_bytes = (size_t)columns * sizeof *c;
    if (add) {
        memset(spilled, 0, sizeof spilled);
        for (int64_t i = 0; i < rows; i++)
            memcpy(spilled[i], c + i * c_stride, row_bytes);
    }
    amx_multiply(upper, lower, both, b, chunks, spilled[0], AMX_LANES, add);
    for (int64_t i = 0; i < rows; i++)
        memcpy(c + i * c_stride, spilled[i], row_bytes);
}

/* Rows first..first+row_count-1 of elements k..k+count-1, as the rows of A. */
HEADER_FUNCTION void amx_pack_rows(const struct matrix *m, int64_t first, int64_t row_count, int64_t k, int64_t count,
                          float *out) {
    int64_t whole = count / (2 * AMX_WORDS), rest = count - whole * 2 * AMX_WORDS, chunks = whole + (rest > 0);
    for (int64_t r = 0; r < row_count; r++) {
        const char *from = matrix_at(m, first + r, k);
        float *to = out + r / AMX_ROWS * chunks * AMX_TILE_FLOATS + r % AMX_ROWS * AMX_WORDS;
        for (int64_t c = 0; c < whole; c++, from += 64, to += AMX_TILE_FLOATS)
            vector_store(to, vector_load(from));
        if (rest)
            vector_store(to, words_load(2, from, rest));
    }
}
