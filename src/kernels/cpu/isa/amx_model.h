/* The tile instructions in vectors: what amx.h asks of the processor, for machines that have no tiles. Only the copy
 * `amxmodel` includes it, which only development builds have: kernels_test holds the whole tile path against the
 * reference on any AVX-512 processor with bf16. Never chosen by "auto".
 *
 * Like the registers, a thread's tiles keep what the last instruction left; a tile without a shape is an error there
 * and here. Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, LDTILECFG, TDPBF16PS.
 */
#pragma once

#include "base/status.h"

enum { MODEL_TILES = 8, MODEL_ROWS = 16, MODEL_BYTES = 64 };

struct model_tile {
    __m512 row[MODEL_ROWS];
};

static _Thread_local struct model_tile model_tiles[MODEL_TILES];
static _Thread_local bool model_is_shaped;

static inline void model_loadconfig(const void *config) {
    const unsigned char *bytes = config; /* palette, first row, 14 reserved, 16 x u16 bytes a row, 16 x u8 rows */
    CHECK_OP(bytes[0], ==, 1);
    for (int i = 0; i < MODEL_TILES; i++)
        CHECK(bytes[16 + 2 * i] == MODEL_BYTES && bytes[17 + 2 * i] == 0 && bytes[48 + i] == MODEL_ROWS);
    model_is_shaped = true;
}

static inline void model_loadd(int tile, const void *base, size_t stride) {
    CHECK(model_is_shaped);
    for (int i = 0; i < MODEL_ROWS; i++)
        model_tiles[tile].row[i] = _mm512_loadu_ps((const char *)base + (size_t)i * stride);
}

static inline void model_stored(int tile, void *base, size_t stride) {
    CHECK(model_is_shaped);
    for (int i = 0; i < MODEL_ROWS; i++)
        _mm512_storeu_ps((char *)base + (size_t)i * stride, model_tiles[tile].row[i]);
}

static inline void model_zero(int tile) {
    CHECK(model_is_shaped);
    model_tiles[tile] = (struct model_tile){0};
}

/* sum [16 x 16 f32] += a [16 rows of 16 pairs] times b [16 pairs of 16 columns]. */
static inline void model_dpbf16ps(int sum, int a, int b) {
    for (int m = 0; m < MODEL_ROWS; m++) {
        const __m512i pairs = _mm512_castps_si512(model_tiles[a].row[m]);
        __m512 row = model_tiles[sum].row[m];
        for (int k = 0; k < MODEL_ROWS; k++) {
            __m512i pair = _mm512_permutexvar_epi32(_mm512_set1_epi32(k), pairs);
            row = _mm512_dpbf16_ps(row, (__m512bh)pair, (__m512bh)model_tiles[b].row[k]);
        }
        model_tiles[sum].row[m] = row;
    }
}

#undef _tile_loadconfig
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) model_loadconfig(config)
#define _tile_loadd(tile, base, stride) model_loadd(tile, base, stride)
#define _tile_stored(tile, base, stride) model_stored(tile, base, stride)
#define _tile_zero(tile) model_zero(tile)
#define _tile_dpbf16ps(sum, a, b) model_dpbf16ps(sum, a, b)
