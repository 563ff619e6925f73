/* How the sums of a product on Hopper's matrix units leave the registers (product_sm90.cu).
 *
 * A warp has 16 rows of 256 columns. It puts 16 rows of 128 bytes at a time in a strip of shared memory, the 16-byte chunks of
 * row r swapped by r % 8, and stores them from there as rows, 16 bytes a lane; nobody waits until they are in memory. (The copy
 * engine took as long, and had to be waited for before a strip could be filled again.) Two strips take turns. */
#pragma once

#include "kernels/cuda/product_sm90.cuh"

#ifdef CUDA_IS_SM90

struct strips {
    unsigned char *first; /* of this warp */
    int row, row_end;     /* the first of the 16 rows of C, and where the group ends */
    int columns;
};

static __device__ __forceinline__ int lane_index(void) {
    return (int)threadIdx.x % WARP;
}

static __device__ __forceinline__ unsigned char *strip_at(const struct strips &s, int strip) {
    return s.first + strip * STRIP_BYTES;
}

static __device__ __forceinline__ unsigned char *strip_chunk(unsigned char *strip, int row, int chunk) {
    return strip + row * 128 + ((chunk ^ (row & 7)) << 4);
}

/* Of the 8x8 matrices (rows 0-7, j), (8-15, j), (0-7, j+1), (8-15, j+1) the row that this lane names. */
static __device__ __forceinline__ unsigned char *strip_matrix_row(unsigned char *strip, int j) {
    return strip_chunk(strip, lane_index() % 16, j + lane_index() / 16);
}

/* ---- bf16 -------------------------------------------------------------------------------------------------------- */

/* What is in a strip to column n of c and on. */
static __device__ __forceinline__ void store_rows(const struct strips &s, unsigned char *strip, void *c, int64_t stride, int n) {
    int lane = lane_index(), column = n + lane % 8 * 8;
    bf16 *to = (bf16 *)c + (int64_t)(s.row + lane / 8) * stride + column;
#pragma unroll
    for (int i = 0; i < 4; i++, to += 4 * stride) {
        int row = lane / 8 + 4 * i;
        uint4 whole = *(const uint4 *)strip_chunk(strip, row, lane % 8);
        if (s.row + row < s.row_end && column < s.columns)
            *(uint4 *)to = whole;
    }
}

/* pair[j][half]: two columns of row lane / 4 + 8 half, of the j-th 8 columns. */
static __device__ __forceinline__ void put_pairs(unsigned char *strip, const uint32_t pair[8][2]) {
#pragma unroll
    for (int j = 0; j < 8; j += 2)
        store_matrices(strip_matrix_row(strip, j), pair[j][0], pair[j][1], pair[j + 1][0], pair[j + 1][1]);
}

static __device__ __forceinline__ void store_pairs(const struct strips &s, int strip, const uint32_t pair[8][2], void *c,
                                                   int64_t stride, int n) {
    unsigned char *at = strip_at(s, strip % 2);
    put_pairs(at, pair);
    __syncwarp();
    store_rows(s, at, c, stride, n);
}

static __device__ __forceinline__ void store_bf16(const float d[128], const struct problem &p, const struct tile &tile,
                                                  const struct strips &s) {
#pragma unroll
    for (int q = 0; q < 4; q++) {
        uint32_t pair[8][2];
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                pair[j][half] = pack_bf16(d[32 * q + 4 * j + 2 * half], d[32 * q + 4 * j + 2 * half + 1]);
        store_pairs(s, q, pair, p.c, p.stride, tile.n + 64 * q);
    }
}

/* ---- SwiGLU ------------------------------------------------------------------------------------------------------ */

/* By the special-function unit, to about 1e-6: both blocks of a cluster wait for it while nothing is multiplied. */
static __device__ __forceinline__ float sigmoid(float x) {
    const float log2_of_e = 1.44269504f;
    return approximate_inverse(1 + power_of_2(-x * log2_of_e));
}

static __device__ __forceinline__ float silu_times(float gate, float up, float weight) {
    return gate * sigmoid(gate) * up * weight;
}

static __device__ __forceinline__ float weight_of(const struct problem &p, const struct strips &s, int half) {
    int row = s.row + lane_index() / 4 + 8 * half;
    return p.row_weight && row < s.row_end ? p.row_weight[row] : 1;
}

static __device__ __forceinline__ void store_swiglu(const float d[128], const struct problem &p, const struct tile &tile,
                                                    const struct strips &s) {
    float weight[2] = {weight_of(p, s, 0), weight_of(p, s, 1)};
#pragma unroll
    for (int q = 0; q < 2; q++) {
        uint32_t gate[8][2], up[8][2];
        int n = tile.n + 64 * q;
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int at = 32 * q + 4 * j + 2 * half;
                gate[j][half] = pack_bf16(d[at], d[at + 1]);
                up[j][half] = pack_bf16(d[64 + at], d[64 + at + 1]);
            }
        store_pairs(s, q, gate, p.c, p.stride, n);
        store_pairs(s, q + 1, up, p.c_up, p.stride, n);
        if (!p.c_act) {
            __syncwarp();
            continue;
        }
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                gate[j][half] = pack_bf16(silu_times(low_bf16(gate[j][half]), low_bf16(up[j][half]), weight[half]),
                                          silu_times(high_bf16(gate[j][half]), high_bf16(up[j][half]), weight[half]));
        store_pairs(s, q, gate, p.c_act, p.stride, n);
    }
}

/* The sums are the gradient of act = silu(gate) up weight. */
struct swiglu_gradient {
    float act, gate, up, weight;
};

static __device__ __forceinline__ struct swiglu_gradient through_swiglu(float dact, float gate, float up, float weight) {
    float share = sigmoid(gate), silu = gate * share, product = silu * up, scaled = dact * weight;
    return {product * weight, scaled * up * (share + silu * (1 - share)), scaled * silu, dact * product};
}

/* The q-th 64 columns of gate and up, into the pair q % `pairs` of strips, by one lane. */
template <int pairs>
static __device__ __forceinline__ void ask_for_strips(const struct problem &p, const struct maps &maps, const struct tile &tile,
                                                      const struct strips &s, int q, uint64_t *loaded) {
    int n = tile.n + 64 * q, pair = q % pairs;
    if (n >= p.n || s.row >= s.row_end)
        return;
    barrier_arrive_expecting(&loaded[pair], 2 * STRIP_BYTES);
    load_box_3d(strip_at(s, 2 * pair), &maps.c[0], &loaded[pair], n, s.row, 0);
    load_box_3d(strip_at(s, 2 * pair + 1), &maps.c[1], &loaded[pair], n, s.row, 0);
}

/* The lanes have left their strips, and what they did there comes before what the copy engine does next. */
static __device__ __forceinline__ void leave_strips(void) {
    fence_for_engines();
    __syncwarp();
}

/* Into the second-level cache, while the tile is being multiplied: the columns that are asked for last. */
static __device__ __forceinline__ void ask_for_swiglu(const struct problem &p, const struct tile &tile) {
    int thread = (int)threadIdx.x - GROUP_THREADS, row = tile.row_begin + thread / 2, column = tile.n + (2 + thread % 2) * 64;
    if (row < tile.row_end && column < p.n) {
        ask_for((const bf16 *)p.c + row * p.stride + column);
        ask_for((const bf16 *)p.c_up + row * p.stride + column);
    }
}

/* Gate and up in their strips become their gradients. */
static __device__ __forceinline__ void through_strips(const float d[128], int q, unsigned char *gates, unsigned char *ups,
                                                      const float weight[2], uint32_t act[8][2], float sum[2]) {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        uint32_t gate[4], up[4];
        load_matrices(gate, strip_matrix_row(gates, j));
        load_matrices(up, strip_matrix_row(ups, j));
#pragma unroll
        for (int i = 0; i < 4; i++) { /* the 8 columns j + i / 2, the rows of half i % 2 */
            int at = 32 * q + 4 * (j + i / 2) + 2 * (i % 2);
            struct swiglu_gradient a = through_swiglu(d[at], low_bf16(gate[i]), low_bf16(up[i]), weight[i % 2]);
            struct swiglu_gradient b = through_swiglu(d[at + 1], high_bf16(gate[i]), high_bf16(up[i]), weight[i % 2]);
            act[j + i / 2][i % 2] = pack_bf16(a.act, b.act);
            gate[i] = pack_bf16(a.gate, b.gate);
            up[i] = pack_bf16(a.up, b.up);
            sum[i % 2] += a.weight + b.weight;
        }
        store_matrices(strip_matrix_row(gates, j), gate[0], gate[1], gate[2], gate[3]);
        store_matrices(strip_matrix_row(ups, j), up[0], up[1], up[2], up[3]);
    }
}

/* The first pairs of strips were asked for when the tile began; `parity` is that of their barriers. */
template <int pairs>
static __device__ __forceinline__ void store_through_swiglu(const float d[128], const struct problem &p, const struct maps &maps,
                                                            const struct tile &tile, const struct strips &s, uint64_t *loaded,
                                                            uint32_t parity[2]) {
    float weight[2] = {weight_of(p, s, 0), weight_of(p, s, 1)}, sum[2] = {0, 0};
#pragma unroll
    for (int q = 0; q < 4; q++) {
        int n = tile.n + 64 * q, pair = q % pairs;
        unsigned char *gates = strip_at(s, 2 * pair), *ups = strip_at(s, 2 * pair + 1);
        uint32_t act[8][2];
        if (n >= p.n)
            break;
        barrier_wait(&loaded[pair], parity[pair]);
        parity[pair] ^= 1;
        through_strips(d, q, gates, ups, weight, act, sum);
        __syncwarp();
        store_rows(s, gates, p.c, p.stride, n);
        store_rows(s, ups, p.c_up, p.stride, n);
        __syncwarp();
        put_pairs(gates, act);
        __syncwarp();
        store_rows(s, gates, p.c_act, p.stride, n);
        leave_strips();
        if (q + pairs < 4 && lane_index() == 0)
            ask_for_strips<pairs>(p, maps, tile, s, q + pairs, loaded);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int lane = lane_index(), row = s.row + lane / 4 + 8 * half;
        sum[half] += __shfl_xor_sync(FULL_WARP, sum[half], 1);
        sum[half] += __shfl_xor_sync(FULL_WARP, sum[half], 2);
        if (p.row_part && row < s.row_end && tile.n < p.n && lane % 4 == 0)
            p.row_part[(int64_t)(tile.n / TILE_N) * p.rows + row] = sum[half];
    }
}

/* ---- f32 --------------------------------------------------------------------------------------------------------- */

/* 32 columns a strip: of d the pairs of columns 8 j + 2 (lane % 4) of row lane / 4 + 8 half. */
static __device__ __forceinline__ void put_numbers(unsigned char *strip, const float d[16]) {
    int lane = lane_index();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        unsigned char *chunk = strip_chunk(strip, lane / 4 + i % 2 * 8, i / 2 * 2 + lane % 4 / 2);
        *(float2 *)(chunk + lane % 2 * 8) = make_float2(d[2 * i], d[2 * i + 1]);
    }
}

/* Sums are added where they lie, in the second-level cache: nobody here waits for what was there. An element is added to once. */
template <bool adds> static __device__ __forceinline__ void put_four(float *to, float4 x) {
    if (adds)
        add_four(to, x);
    else
        *(float4 *)to = x;
}

template <bool adds>
static __device__ __forceinline__ void store_f32_wide(const float d[128], const struct problem &p, float *c, const struct strips &s,
                                                      int n) {
    int lane = lane_index();
#pragma unroll
    for (int q = 0; q < 8; q++) {
        unsigned char *strip = strip_at(s, q % 2);
        int column = n + 32 * q + lane % 8 * 4;
        float *to = c + (int64_t)(s.row + lane / 8) * p.stride + column;
        put_numbers(strip, d + 16 * q);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++, to += 4 * p.stride) {
            int row = lane / 8 + 4 * i;
            float4 whole = *(const float4 *)strip_chunk(strip, row, lane % 8);
            if (s.row + row < s.row_end && column < p.n)
                put_four<adds>(to, whole);
        }
    }
}

/* 32 columns of the product are rows of C, 16 numbers each: chunks are swapped by bits 1 and 2 of the row. */
template <bool adds>
static __device__ __forceinline__ void store_transposed_wide(const float d[128], const struct problem &p, float *c,
                                                             const struct strips &s, int n) {
    int lane = lane_index();
#pragma unroll
    for (int q = 0; q < 8; q++) {
        unsigned char *strip = strip_at(s, q % 2);
        int row = s.row + lane % 4 * 4;
#pragma unroll
        for (int i = 0; i < 16; i++) { /* the 8 columns i / 4, of a pair i % 2, the rows of half i / 2 % 2 */
            int column = i / 4 * 8 + lane % 4 * 2 + i % 2, chunk = i / 2 % 2 * 2 + lane / 16;
            *(float *)(strip + column * 64 + ((chunk ^ (column >> 1 & 3)) << 4) + lane / 4 % 4 * 4) = d[16 * q + i];
        }
        __syncwarp();
        float *to = c + row + (int64_t)(n + 32 * q + lane / 4) * p.stride;
#pragma unroll
        for (int i = 0; i < 4; i++, to += 8 * p.stride) {
            int column = lane / 4 + 8 * i;
            float4 whole = *(const float4 *)(strip + column * 64 + ((lane % 4 ^ (column >> 1 & 3)) << 4));
            if (row < s.row_end && n + 32 * q + column < p.n)
                put_four<adds>(to, whole);
        }
    }
}

/* Where 16 bytes of C are not aligned. */
static __device__ __forceinline__ void store_f32(const float d[128], const struct problem &p, float *c, const struct strips &s,
                                                 int n, bool adds) {
    int column = n + lane_index() % 4 * 2, row = s.row + lane_index() / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        bool is_inside = row + 8 * half < s.row_end;
        float *to = c + (int64_t)(row + 8 * half) * p.stride + column;
#pragma unroll
        for (int i = 0; i < 32; i++) {
            if (!is_inside || column + 8 * i >= p.n)
                continue;
            if (adds)
                add_pair(to + 8 * i, d[4 * i + 2 * half], d[4 * i + 2 * half + 1]);
            else
                *(float2 *)(to + 8 * i) = make_float2(d[4 * i + 2 * half], d[4 * i + 2 * half + 1]);
        }
    }
}

/* The same, eight lanes of a column write 32 bytes. */
static __device__ __forceinline__ void store_transposed(const float d[128], const struct problem &p, float *c,
                                                        const struct strips &s, int n, bool adds) {
    int64_t stride = p.stride;
    int column = n + lane_index() % 4 * 2, row = s.row + lane_index() / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        bool is_inside = row + 8 * half < s.row_end;
        float *to = c + row + 8 * half + column * stride;
#pragma unroll
        for (int i = 0; i < 32; i++, to += 8 * stride) {
            if (!is_inside || column + 8 * i >= p.n)
                continue;
#pragma unroll
            for (int b = 0; b < 2; b++) {
                if (adds)
                    add_number(to + b * stride, d[4 * i + 2 * half + b]);
                else
                    to[b * stride] = d[4 * i + 2 * half + b];
            }
        }
    }
}

/* Into the second-level cache, while the tile is being multiplied. */
static __device__ __forceinline__ void ask_for_base(const struct problem &p, const struct tile &tile) {
    int thread = (int)threadIdx.x - GROUP_THREADS, row = tile.row_begin + thread / 2;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int column = tile.n + (thread % 2 * 4 + i) * 32;
        if (row < tile.row_end && column < p.n)
            ask_for(p.base + row * p.stride + column);
    }
}

/* Four rows of what a strip is added to, in the order in which it is stored. */
static __device__ __forceinline__ void load_base(const struct problem &p, const struct strips &s, int n, float4 base[4]) {
    int lane = lane_index(), column = n + lane % 8 * 4;
    const float *from = p.base + (int64_t)(s.row + lane / 8) * p.stride + column;
#pragma unroll
    for (int i = 0; i < 4; i++, from += 4 * p.stride)
        base[i] = s.row + lane / 8 + 4 * i < s.row_end && column < p.n ? *(const float4 *)from : make_float4(0, 0, 0, 0);
}

/* What a strip is added to is loaded while the one before it is added. */
static __device__ __forceinline__ void store_onto_wide(const float d[128], const struct problem &p, const struct strips &s, int n) {
    int lane = lane_index();
    float4 base[2][4];
    load_base(p, s, n, base[0]);
#pragma unroll
    for (int q = 0; q < 8; q++) {
        unsigned char *strip = strip_at(s, q % 2);
        int column = n + 32 * q + lane % 8 * 4;
        float *to = (float *)p.c + (int64_t)(s.row + lane / 8) * p.stride + column;
        if (q < 7)
            load_base(p, s, n + 32 * (q + 1), base[(q + 1) % 2]);
        put_numbers(strip, d + 16 * q);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++, to += 4 * p.stride) {
            int row = lane / 8 + 4 * i;
            float4 sum = *(const float4 *)strip_chunk(strip, row, lane % 8), more = base[q % 2][i];
            if (s.row + row < s.row_end && column < p.n)
                *(float4 *)to = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
        }
    }
}

static __device__ __forceinline__ void store_onto(const float d[128], const struct problem &p, const struct strips &s, int n) {
    int column = n + lane_index() % 4 * 2;
    int64_t begin = (int64_t)(s.row + lane_index() / 4) * p.stride + column;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        bool is_inside = s.row + lane_index() / 4 + 8 * half < s.row_end;
#pragma unroll
        for (int i = 0; i < 32; i++) {
            int64_t at = begin + 8 * half * p.stride + 8 * i;
            if (!is_inside || column + 8 * i >= p.n)
                continue;
            float2 base = *(const float2 *)(p.base + at);
            *(float2 *)((float *)p.c + at) = make_float2(base.x + d[4 * i + 2 * half], base.y + d[4 * i + 2 * half + 1]);
        }
    }
}

/* ---- all --------------------------------------------------------------------------------------------------------- */

/* Of a tile's sums d[4 i + 2 half + b]: row lane / 4 + 8 half, column 8 i + 2 (lane % 4) + b of the warp's 16 x 256. */
template <int form, int result>
static __device__ __forceinline__ void store_f32_tile(const float d[128], const struct problem &p, const struct tile &tile,
                                                      const struct strips &s) {
    constexpr bool adds = result == ADD_F32 || result == ADD_F32_TRANSPOSED;
    constexpr bool is_transposed = result == TO_F32_TRANSPOSED || result == ADD_F32_TRANSPOSED;
    float *c = (float *)p.c + (form == WEIGHT ? (int64_t)tile.group * p.group_elements : 0);
    if (result == ONTO_F32) {
        if (p.is_wide)
            store_onto_wide(d, p, s, tile.n);
        else
            store_onto(d, p, s, tile.n);
    } else if (is_transposed) {
        if (p.is_wide)
            store_transposed_wide<adds>(d, p, c, s, tile.n);
        else
            store_transposed(d, p, c, s, tile.n, adds);
    } else {
        if (p.is_wide)
            store_f32_wide<adds>(d, p, c, s, tile.n);
        else
            store_f32(d, p, c, s, tile.n, adds);
    }
}

template <int form, int result, int strips>
static __device__ __forceinline__ void store_tile(const float d[128], const struct problem &p, const struct maps &maps,
                                                  const struct tile &tile, const struct strips &s, uint64_t *loaded,
                                                  uint32_t parity[2]) {
    if (s.row >= s.row_end)
        return;
    if (result == TO_BF16)
        store_bf16(d, p, tile, s);
    else if (result == TO_SWIGLU)
        store_swiglu(d, p, tile, s);
    else if (result == THROUGH_SWIGLU)
        store_through_swiglu<strips / 2>(d, p, maps, tile, s, loaded, parity);
    else
        store_f32_tile<form, result>(d, p, tile, s);
}

#endif
