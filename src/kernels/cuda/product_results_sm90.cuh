/* How the sums of a product on Hopper's matrix units leave the registers (product_sm90.cu).
 *
 * A warp has 16 rows of 256 columns. It puts them in strips of shared memory, 16 rows of 128 bytes, the 16-byte chunks of row r
 * swapped by r % 8, and the copy engine writes, or adds, a strip to C while the warp fills the next one and while the next tile
 * is multiplied: nothing waits for memory. Strips are filled in turn; one is filled again when the engine has read it.
 * Rows that end within a strip, of a group that the next one follows, are stored by the warp's lanes. */
#pragma once

#include "kernels/cuda/product_sm90.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct strips {
    unsigned char *first; /* of this warp */
    int row, row_end;     /* the first of the 16 rows of C, and where the group ends */
    int columns, group;
    bool is_whole;        /* all rows are there: the engine may write */
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

/* What was sent before the `newest` last strips has been read; all lanes have left them. */
template <int newest> static __device__ __forceinline__ void strips_wait(void) {
    if (lane_index() == 0)
        boxes_wait_read<newest>();
    __syncwarp();
}

/* The lanes have written: one of them may have it sent. */
static __device__ __forceinline__ bool strip_is_written(void) {
    fence_for_engines();
    __syncwarp();
    return lane_index() == 0;
}

/* ---- bf16 -------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void store_rows(const struct strips &s, unsigned char *strip, bf16 *c, int64_t stride, int n) {
    int lane = lane_index(), column = n + lane % 8 * 8;
    bf16 *to = c + (int64_t)(s.row + lane / 8) * stride + column;
#pragma unroll
    for (int i = 0; i < 4; i++, to += 4 * stride) {
        int row = lane / 8 + 4 * i;
        uint4 whole = *(const uint4 *)strip_chunk(strip, row, lane % 8);
        if (s.row + row < s.row_end && column < s.columns)
            *(uint4 *)to = whole;
    }
}

/* What is in a strip to column n of c and on. */
static __device__ __forceinline__ void send_rows(const struct strips &s, unsigned char *strip, const CUtensorMap *map, void *c,
                                                 int64_t stride, int n) {
    bool sends = strip_is_written();
    if (!s.is_whole)
        store_rows(s, strip, (bf16 *)c, stride, n);
    else if (sends)
        store_box(map, strip, n, s.row, 0);
}

/* pair[j][half]: two columns of row lane / 4 + 8 half, of the j-th 8 columns. */
static __device__ __forceinline__ void put_pairs(unsigned char *strip, const uint32_t pair[8][2]) {
#pragma unroll
    for (int j = 0; j < 8; j += 2)
        store_matrices(strip_matrix_row(strip, j), pair[j][0], pair[j][1], pair[j + 1][0], pair[j + 1][1]);
}

/* One strip a group of boxes: `strips` - 1 others may still be on their way when it is filled. */
template <int strips>
static __device__ __forceinline__ void store_pairs(const struct strips &s, int strip, const uint32_t pair[8][2],
                                                   const CUtensorMap *map, void *c, int64_t stride, int n) {
    unsigned char *at = strip_at(s, strip % strips);
    strips_wait<strips - 1>();
    put_pairs(at, pair);
    send_rows(s, at, map, c, stride, n);
    boxes_commit();
}

template <int strips>
static __device__ __forceinline__ void store_bf16(const float d[128], const struct problem &p, const struct maps &maps,
                                                  const struct tile &tile, const struct strips &s) {
#pragma unroll
    for (int q = 0; q < 4; q++) {
        uint32_t pair[8][2];
        if (tile.n + 64 * q >= p.n)
            break;
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                pair[j][half] = pack_bf16(d[32 * q + 4 * j + 2 * half], d[32 * q + 4 * j + 2 * half + 1]);
        store_pairs<strips>(s, q, pair, &maps.c[0], p.c, p.stride, tile.n + 64 * q);
    }
}

/* ---- SwiGLU ------------------------------------------------------------------------------------------------------ */

/* By the special-function unit, to about 1e-6: both blocks of a cluster wait for it while nothing is multiplied. */
static __device__ __forceinline__ float sigmoid(float x) {
    const float log2_of_e = 1.44269504f;
    float power, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-x * log2_of_e));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1 + power));
    return inverse;
}

static __device__ __forceinline__ float silu_times(float gate, float up, float weight) {
    return gate * sigmoid(gate) * up * weight;
}

static __device__ __forceinline__ float weight_of(const struct problem &p, const struct strips &s, int half) {
    int row = s.row + lane_index() / 4 + 8 * half;
    return p.row_weight && row < s.row_end ? p.row_weight[row] : 1;
}

/* Two strips are gate and up on their way out, a third act; with fewer than three they take turns. */
template <int strips>
static __device__ __forceinline__ void store_swiglu(const float d[128], const struct problem &p, const struct maps &maps,
                                                    const struct tile &tile, const struct strips &s) {
    float weight[2] = {weight_of(p, s, 0), weight_of(p, s, 1)};
#pragma unroll
    for (int q = 0; q < 2; q++) {
        uint32_t gate[8][2], up[8][2];
        int n = tile.n + 64 * q;
        if (n >= p.n)
            break;
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int at = 32 * q + 4 * j + 2 * half;
                gate[j][half] = pack_bf16(d[at], d[at + 1]);
                up[j][half] = pack_bf16(d[64 + at], d[64 + at + 1]);
            }
        store_pairs<strips>(s, 3 * q, gate, &maps.c[0], p.c, p.stride, n);
        store_pairs<strips>(s, 3 * q + 1, up, &maps.c[1], p.c_up, p.stride, n);
        if (!p.c_act) {
            boxes_commit(); /* an empty group in its place: strips go on in turn */
            continue;
        }
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                gate[j][half] = pack_bf16(silu_times(low_bf16(gate[j][half]), low_bf16(up[j][half]), weight[half]),
                                          silu_times(high_bf16(gate[j][half]), high_bf16(up[j][half]), weight[half]));
        store_pairs<strips>(s, 3 * q + 2, gate, &maps.c[2], p.c_act, p.stride, n);
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

/* The q-th 64 columns of gate and up, into the pair q % 2 of strips, by one lane. */
static __device__ __forceinline__ void ask_for_strips(const struct problem &p, const struct maps &maps, const struct tile &tile,
                                                      const struct strips &s, int q, uint64_t loaded[2]) {
    int n = tile.n + 64 * q;
    if (n >= p.n || s.row >= s.row_end)
        return;
    barrier_arrive_expecting(&loaded[q % 2], 2 * STRIP_BYTES);
    load_box_3d(strip_at(s, q % 2 * 2), &maps.c[0], &loaded[q % 2], n, s.row, 0);
    load_box_3d(strip_at(s, q % 2 * 2 + 1), &maps.c[1], &loaded[q % 2], n, s.row, 0);
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

/* The first two pairs of strips were asked for when the tile began; `parity` is that of both barriers. */
static __device__ __forceinline__ void store_through_swiglu(const float d[128], const struct problem &p, const struct maps &maps,
                                                            const struct tile &tile, const struct strips &s, uint64_t loaded[2],
                                                            uint32_t parity[2]) {
    enum { ACT = 4 };
    float weight[2] = {weight_of(p, s, 0), weight_of(p, s, 1)}, sum[2] = {0, 0};
#pragma unroll
    for (int q = 0; q < 4; q++) {
        int n = tile.n + 64 * q;
        unsigned char *gates = strip_at(s, q % 2 * 2), *ups = strip_at(s, q % 2 * 2 + 1), *acts = strip_at(s, ACT);
        uint32_t act[8][2];
        if (n >= p.n)
            break;
        barrier_wait(&loaded[q % 2], parity[q % 2]);
        parity[q % 2] ^= 1;
        through_strips(d, q, gates, ups, weight, act, sum);
        send_rows(s, gates, &maps.c[0], p.c, p.stride, n);
        send_rows(s, ups, &maps.c[1], p.c_up, p.stride, n);
        boxes_commit();
        strips_wait<1>(); /* act of before, and the other pair */
        if (q > 0 && q < 3 && lane_index() == 0)
            ask_for_strips(p, maps, tile, s, q + 1, loaded);
        put_pairs(acts, act);
        send_rows(s, acts, &maps.c[2], p.c_act, p.stride, n);
        boxes_commit();
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int lane = lane_index(), row = s.row + lane / 4 + 8 * half;
        sum[half] += __shfl_xor_sync(FULL_WARP, sum[half], 1);
        sum[half] += __shfl_xor_sync(FULL_WARP, sum[half], 2);
        if (p.row_part && row < s.row_end && lane % 4 == 0)
            p.row_part[(int64_t)(tile.n / TILE_N) * p.rows + row] = sum[half];
    }
}

/* ---- f32 --------------------------------------------------------------------------------------------------------- */

/* 32 columns a strip: the pair of columns 8 j + 2 (lane % 4) of row lane / 4 + 8 half. */
static __device__ __forceinline__ float2 *strip_pair(unsigned char *strip, int j, int half) {
    int lane = lane_index();
    return (float2 *)(strip_chunk(strip, lane / 4 + 8 * half, 2 * j + lane % 4 / 2) + lane % 2 * 8);
}

template <bool adds>
static __device__ __forceinline__ void send_numbers(const struct strips &s, unsigned char *strip, const CUtensorMap *map, int c0,
                                                    int c1) {
    if (strip_is_written()) {
        if (adds)
            add_box(map, strip, c0, c1, s.group);
        else
            store_box(map, strip, c0, c1, s.group);
    }
    boxes_commit();
}

/* By the copy engine, sums are added where they lie, in the second-level cache. An element is added to once. */
template <int strips, bool adds>
static __device__ __forceinline__ void send_f32(const float d[128], const struct problem &p, const struct maps &maps, int n,
                                                const struct strips &s) {
#pragma unroll
    for (int q = 0; q < 8; q++) {
        unsigned char *strip = strip_at(s, q % strips);
        if (n + 32 * q >= p.n)
            break;
        strips_wait<strips - 1>();
#pragma unroll
        for (int i = 0; i < 8; i++)
            *strip_pair(strip, i / 2, i % 2) = make_float2(d[16 * q + 2 * i], d[16 * q + 2 * i + 1]);
        send_numbers<adds>(s, strip, &maps.c[0], n + 32 * q, s.row);
    }
}

/* 32 columns of the product are rows of C, 16 numbers each: chunks are swapped by bits 1 and 2 of the row. */
template <int strips, bool adds>
static __device__ __forceinline__ void send_transposed(const float d[128], const struct problem &p, const struct maps &maps, int n,
                                                       const struct strips &s) {
    int lane = lane_index();
#pragma unroll
    for (int q = 0; q < 8; q++) {
        unsigned char *strip = strip_at(s, q % strips);
        if (n + 32 * q >= p.n)
            break;
        strips_wait<strips - 1>();
#pragma unroll
        for (int i = 0; i < 16; i++) { /* the 8 columns i / 4, of a pair i % 2, the rows of half i / 2 % 2 */
            int column = i / 4 * 8 + lane % 4 * 2 + i % 2, chunk = i / 2 % 2 * 2 + lane / 16;
            *(float *)(strip + column * 64 + ((chunk ^ (column >> 1 & 3)) << 4) + lane / 4 % 4 * 4) = d[16 * q + i];
        }
        send_numbers<adds>(s, strip, &maps.c[0], s.row, n + 32 * q);
    }
}

/* By the lanes: where the engine cannot write C, or not all of the rows. */
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

/* What a strip's 32 columns are added to, in the order of strip_pair. */
static __device__ __forceinline__ void load_base(const struct problem &p, const struct strips &s, int n, float2 base[8]) {
    int column = n + lane_index() % 4 * 2;
    int64_t row = s.row + lane_index() / 4;
    const float *from = p.base + row * p.stride + column;
#pragma unroll
    for (int i = 0; i < 8; i++)
        base[i] = row + i % 2 * 8 < s.row_end && column + i / 2 * 8 < p.n
                      ? *(const float2 *)(from + i % 2 * 8 * p.stride + i / 2 * 8)
                      : make_float2(0, 0);
}

/* A strip is loaded while the one before it is added. */
template <int strips>
static __device__ __forceinline__ void send_onto(const float d[128], const struct problem &p, const struct maps &maps, int n,
                                                 const struct strips &s) {
    float2 base[2][8];
    load_base(p, s, n, base[0]);
#pragma unroll
    for (int q = 0; q < 8; q++) {
        unsigned char *strip = strip_at(s, q % strips);
        if (n + 32 * q >= p.n)
            break;
        if (q < 7)
            load_base(p, s, n + 32 * (q + 1), base[(q + 1) % 2]);
        strips_wait<strips - 1>();
#pragma unroll
        for (int i = 0; i < 8; i++)
            *strip_pair(strip, i / 2, i % 2) =
                make_float2(base[q % 2][i].x + d[16 * q + 2 * i], base[q % 2][i].y + d[16 * q + 2 * i + 1]);
        send_numbers<false>(s, strip, &maps.c[0], n + 32 * q, s.row);
    }
}

static __device__ __forceinline__ void store_onto(const float d[128], const struct problem &p, const struct strips &s, int n) {
    int column = n + lane_index() % 4 * 2;
    float2 base[8];
    float *to = (float *)p.c + (int64_t)(s.row + lane_index() / 4) * p.stride + column;
#pragma unroll
    for (int q = 0; q < 8; q++) {
        load_base(p, s, n + 32 * q, base);
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (s.row + lane_index() / 4 + i % 2 * 8 < s.row_end && column + 32 * q + i / 2 * 8 < p.n)
                *(float2 *)(to + i % 2 * 8 * p.stride + 32 * q + i / 2 * 8) =
                    make_float2(base[i].x + d[16 * q + 2 * i], base[i].y + d[16 * q + 2 * i + 1]);
    }
}

/* ---- all --------------------------------------------------------------------------------------------------------- */

/* Of a tile's sums d[4 i + 2 half + b]: row lane / 4 + 8 half, column 8 i + 2 (lane % 4) + b of the warp's 16 x 256. */
template <int form, int result, int strips>
static __device__ __forceinline__ void store_tile(const float d[128], const struct problem &p, const struct maps &maps,
                                                  const struct tile &tile, const struct strips &s, uint64_t loaded[2],
                                                  uint32_t parity[2]) {
    constexpr bool adds = result == ADD_F32 || result == ADD_F32_TRANSPOSED;
    float *c = (float *)p.c + (form == WEIGHT ? (int64_t)tile.group * p.group_elements : 0);
    if (s.row >= s.row_end)
        return;
    if (result != THROUGH_SWIGLU)
        strips_wait<0>(); /* of the tile before: long since */
    if (result == TO_BF16)
        store_bf16<strips>(d, p, maps, tile, s);
    else if (result == TO_SWIGLU)
        store_swiglu<strips>(d, p, maps, tile, s);
    else if (result == THROUGH_SWIGLU)
        store_through_swiglu(d, p, maps, tile, s, loaded, parity);
    else if (result == ONTO_F32 && s.is_whole)
        send_onto<strips>(d, p, maps, tile.n, s);
    else if (result == ONTO_F32)
        store_onto(d, p, s, tile.n);
    else if ((result == TO_F32_TRANSPOSED || result == ADD_F32_TRANSPOSED) && s.is_whole)
        send_transposed<strips, adds>(d, p, maps, tile.n, s);
    else if (result == TO_F32_TRANSPOSED || result == ADD_F32_TRANSPOSED)
        store_transposed(d, p, c, s, tile.n, adds);
    else if (s.is_whole)
        send_f32<strips, adds>(d, p, maps, tile.n, s);
    else
        store_f32(d, p, c, s, tile.n, adds);
}

#endif
