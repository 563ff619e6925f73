/* Causal attention of bf16 on the matrix units (arXiv 2205.14135): no T x T matrix, no work above the diagonal tiles.
 *
 * Invariants
 *  1. A number of a result is the work of one warp, in an order that the shapes give: backward makes the weights again in two
 *     kernels, one that owns tiles of keys (dk, dv), one that owns tiles of queries (dq), so that no sums meet.
 *  2. Weights and gradients of scores are rounded to bf16 before they are multiplied; sums over them are of the numbers before.
 *  3. Sums of a product stay where the matrix unit leaves them; as the left operand of the next product they need no more than
 *     rounding. Hence a warp owns whole rows: of queries in forward and dq, of keys (scores transposed) in dk and dv.
 *  4. A tile in shared memory is rows of `dim` elements in units of 16 bytes; unit u of row r lies at u ^ r % 8: eight rows of
 *     one column of units lie in different banks. Columns from head_dim on and rows that do not exist are 0.
 *  5. Scores are scaled by log2(e), too: 2^x is what the device has. */
#pragma once

#include "kernels/cuda/attention.cuh"

/* ---- tiles ---------------------------------------------------------------------------------------------------------- */

template <int dim> static __device__ __forceinline__ bf16 *tile_at(bf16 *tile, int row, int unit) {
    return tile + row * dim + (unit ^ (row & 7)) * 8;
}

/* Starts to copy `rows` rows, of which the first `valid` exist, by all threads of the block. */
template <int dim, int rows, int threads>
static __device__ __forceinline__ void tile_copy(bf16 *tile, const bf16 *from, int64_t stride, int valid, int head_dim) {
    enum { UNITS = dim / 8, STEP = threads / UNITS };
    static_assert(threads % UNITS == 0 && rows % STEP == 0, "whole rows a step");
    int unit = (int)threadIdx.x % UNITS, row = (int)threadIdx.x / UNITS;
    bool is_column = unit * 8 < head_dim;
    const bf16 *at = from + row * stride + unit * 8;
    UNROLL
    for (int i = 0; i < rows / STEP; i++, row += STEP, at += STEP * stride) {
        bool is_here = is_column && row < valid;
        copy_async(tile_at<dim>(tile, row, unit), is_here ? at : from, is_here ? 16 : 0);
    }
}

/* Where lane l reads rows for the matrix unit, in elements of a tile: of 16 rows and 2 units as the left operand, or as the
 * right one of multiply_weights; and as the right one of multiply_rows. Units further on by an even number u are at
 * (offset ^ 8 u). */
template <int dim> static __device__ __forceinline__ int left_offset(void) {
    int lane = (int)threadIdx.x % WARP;
    return lane % 16 * dim + (lane / 16 ^ lane % 8) * 8;
}

template <int dim> static __device__ __forceinline__ int right_offset(void) {
    int lane = (int)threadIdx.x % WARP;
    return (lane / 16 * 8 + lane % 8) * dim + (lane / 8 % 2 ^ lane % 8) * 8;
}

/* s [16 tall, 8 wide] = the rows of tile a from there on times those of tile b, over the columns of both. */
template <int dim, int tall, int wide>
static __device__ __forceinline__ void multiply_rows(float s[tall][wide][4], const bf16 *a, const bf16 *b) {
    int a_offset = left_offset<dim>(), b_offset = right_offset<dim>();
    UNROLL
    for (int m = 0; m < tall; m++)
        UNROLL
        for (int n = 0; n < wide; n++)
            s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0;
    UNROLL_2 /* more only takes registers */
    for (int k = 0; k < dim / 16; k++) {
        uint32_t left[tall][4];
        UNROLL
        for (int m = 0; m < tall; m++)
            load_matrices(left[m], a + m * 16 * dim + (a_offset ^ k * 16));
        UNROLL
        for (int n = 0; n < wide; n += 2) {
            uint32_t right[4];
            load_matrices(right, b + n * 8 * dim + (b_offset ^ k * 16));
            UNROLL
            for (int m = 0; m < tall; m++) {
                mma_bf16(s[m][n], left[m], right);
                mma_bf16(s[m][n + 1], left[m], right + 2);
            }
        }
    }
}

/* sum [16 tall, dim] += w [16 tall, 8 wide] times rows 0.. of tile b. */
template <int dim, int tall, int wide>
static __device__ __forceinline__ void multiply_weights(float sum[tall][dim / 8][4], const uint32_t w[tall][wide][2],
                                                        const bf16 *b) {
    int b_offset = left_offset<dim>();
    UNROLL
    for (int k = 0; k < wide / 2; k++)
        UNROLL
        for (int n = 0; n < dim / 8; n += 2) {
            uint32_t right[4];
            load_matrices_transposed(right, b + k * 16 * dim + (b_offset ^ n * 8));
            UNROLL
            for (int m = 0; m < tall; m++) {
                uint32_t left[4] = {w[m][2 * k][0], w[m][2 * k][1], w[m][2 * k + 1][0], w[m][2 * k + 1][1]};
                mma_bf16(sum[m][n], left, right);
                mma_bf16(sum[m][n + 1], left, right + 2);
            }
        }
}

/* Rounded, as the left operand of multiply_weights. */
template <int tall, int wide>
static __device__ __forceinline__ void round_weights(uint32_t w[tall][wide][2], const float s[tall][wide][4]) {
    UNROLL
    for (int m = 0; m < tall; m++)
        UNROLL
        for (int n = 0; n < wide; n++) {
            w[m][n][0] = pack_bf16(s[m][n][0], s[m][n][1]);
            w[m][n][1] = pack_bf16(s[m][n][2], s[m][n][3]);
        }
}

/* Sums times the factors of their rows, by way of rows row.. of a tile that nobody but this warp uses any more, to rows
 * row.. of `to`, of which `valid` exist. */
template <int dim, int tall>
static __device__ __forceinline__ void store_rows(const float sum[tall][dim / 8][4], const float factor[tall][2], bf16 *tile,
                                                  int row, bf16 *to, int64_t stride, int valid, int head_dim) {
    enum { UNITS = dim / 8 };
    int lane = (int)threadIdx.x % WARP;
    __syncwarp();
    UNROLL
    for (int m = 0; m < tall; m++)
        UNROLL
        for (int n = 0; n < UNITS; n++)
            UNROLL
            for (int h = 0; h < 2; h++) {
                bf16 *at = tile_at<dim>(tile, row + m * 16 + h * 8 + lane / 4, n) + lane % 4 * 2;
                *(uint32_t *)at = pack_bf16(sum[m][n][2 * h] * factor[m][h], sum[m][n][2 * h + 1] * factor[m][h]);
            }
    __syncwarp();
    for (int i = lane; i < tall * 16 * UNITS; i += WARP) {
        int r = row + i / UNITS, unit = i % UNITS;
        if (r < valid && unit * 8 < head_dim)
            *(uint4 *)(to + r * stride + unit * 8) = *(uint4 *)tile_at<dim>(tile, r, unit);
    }
}

template <int tall, int columns> static __device__ __forceinline__ void clear(float sum[tall][columns][4]) {
    UNROLL
    for (int m = 0; m < tall; m++)
        UNROLL
        for (int n = 0; n < columns; n++)
            UNROLL
            for (int e = 0; e < 4; e++)
                sum[m][n][e] = 0;
}

/* ---- places --------------------------------------------------------------------------------------------------------- */

/* Element 0 of row i of a sequence, of head `head`. */
static __device__ __forceinline__ int64_t query_place(const tile_job &job, int64_t batch, int64_t i, int head) {
    return ((batch * job.query_count + i) * job.heads + head) * job.head_dim;
}

static __device__ __forceinline__ int64_t key_place(const tile_job &job, int64_t batch, int64_t i, int kv_head) {
    return ((batch * job.key_count + i) * job.kv_heads + kv_head) * job.head_dim;
}

/* ---- forward -------------------------------------------------------------------------------------------------------- */

enum { FORWARD_QUERIES = 128, FORWARD_KEYS = 64, FORWARD_THREADS = 128 };

static size_t tile_forward_bytes(int dim) {
    return (size_t)(FORWARD_QUERIES + 4 * FORWARD_KEYS) * dim * sizeof(bf16);
}

/* Scores of 32 rows, as they came, to weights; running maximum (scaled) and sum of each row, of which lane l keeps rows
 * 16 m + 8 h + l / 4; what was summed before is brought to the new maximum. Sums are of this lane's columns only. */
template <int dim, int wide>
static __device__ __forceinline__ void soften(float s[2][wide][4], float scale, float most[2][2], float weight[2][2],
                                              float sum[2][dim / 8][4]) {
    UNROLL
    for (int m = 0; m < 2; m++)
        UNROLL
        for (int h = 0; h < 2; h++) {
            float top = s[m][0][2 * h];
            UNROLL
            for (int n = 0; n < wide; n++)
                top = fmaxf(top, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
            top = fmaxf(most[m][h], top * scale);
            float fall = power_of_2(most[m][h] - top), added = 0;
            most[m][h] = top;
            UNROLL
            for (int n = 0; n < wide; n++) {
                s[m][n][2 * h] = power_of_2(fmaf(s[m][n][2 * h], scale, -top));
                s[m][n][2 * h + 1] = power_of_2(fmaf(s[m][n][2 * h + 1], scale, -top));
                added += s[m][n][2 * h] + s[m][n][2 * h + 1];
            }
            weight[m][h] = weight[m][h] * fall + added;
            UNROLL
            for (int n = 0; n < dim / 8; n++) {
                sum[m][n][2 * h] *= fall;
                sum[m][n][2 * h + 1] *= fall;
            }
        }
}

/* Hides what is not seen: column c of row r where c > r + ahead. */
template <int tall, int wide> static __device__ __forceinline__ void hide_columns(float s[tall][wide][4], int ahead) {
    int lane = (int)threadIdx.x % WARP;
    UNROLL
    for (int m = 0; m < tall; m++)
        UNROLL
        for (int n = 0; n < wide; n++)
            UNROLL
            for (int e = 0; e < 4; e++)
                if (n * 8 + lane % 4 * 2 + e % 2 > m * 16 + e / 2 * 8 + lane / 4 + ahead)
                    s[m][n][e] = -INFINITY;
}

/* The same where rows are keys: row r of column c where r > c + ahead. */
template <int tall, int wide> static __device__ __forceinline__ void hide_rows(float s[tall][wide][4], int ahead) {
    int lane = (int)threadIdx.x % WARP;
    UNROLL
    for (int m = 0; m < tall; m++)
        UNROLL
        for (int n = 0; n < wide; n++)
            UNROLL
            for (int e = 0; e < 4; e++)
                if (m * 16 + e / 2 * 8 + lane / 4 > n * 8 + lane % 4 * 2 + e % 2 + ahead)
                    s[m][n][e] = -INFINITY;
}

/* A block has 128 queries of one head, a warp 32 of them. Long rows of tiles first: the short ones fill the end. */
template <int dim> static __global__ void __launch_bounds__(FORWARD_THREADS, 2) tile_forward(tile_job job) {
    enum { KEYS = FORWARD_KEYS, TILE = KEYS * dim, WIDE = KEYS / 8 };
    CUDA_SHARED_DYNAMIC(bf16, q_tile);
    bf16 *k_tile = q_tile + FORWARD_QUERIES * dim, *v_tile = k_tile + 2 * TILE;
    int64_t all_heads = job.batch * job.heads, tiles = (job.query_count + FORWARD_QUERIES - 1) / FORWARD_QUERIES;
    int first = (int)(tiles - 1 - blockIdx.x / all_heads) * FORWARD_QUERIES;
    int64_t batch = blockIdx.x % all_heads / job.heads;
    int head = (int)(blockIdx.x % all_heads % job.heads), kv_head = head / job.group;
    int valid = min(job.query_count - first, (int)FORWARD_QUERIES), ahead = job.key_count - job.query_count + first;
    int key_end = ahead + valid, lane = (int)threadIdx.x % WARP, row = (int)threadIdx.x / WARP * 32;
    int64_t q_stride = (int64_t)job.heads * job.head_dim, k_stride = (int64_t)job.kv_heads * job.head_dim;
    int64_t q_at = query_place(job, batch, first, head), k_at = key_place(job, batch, 0, kv_head);
    tile_copy<dim, FORWARD_QUERIES, FORWARD_THREADS>(q_tile, job.q + q_at, q_stride, valid, job.head_dim);
    tile_copy<dim, KEYS, FORWARD_THREADS>(k_tile, job.k + k_at, k_stride, key_end, job.head_dim);
    tile_copy<dim, KEYS, FORWARD_THREADS>(v_tile, job.v + k_at, k_stride, key_end, job.head_dim);
    copy_async_commit();
    float sum[2][dim / 8][4], most[2][2] = {{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}}, weight[2][2] = {{0}};
    clear<2, dim / 8>(sum);
    for (int key = 0, turn = 0; key < key_end; key += KEYS, turn ^= 1) {
        copy_async_wait<0>();
        __syncthreads(); /* the tiles are there, and nobody reads the ones before any more */
        if (key + KEYS < key_end) {
            int64_t next = k_at + (key + KEYS) * k_stride;
            tile_copy<dim, KEYS, FORWARD_THREADS>(k_tile + (turn ^ 1) * TILE, job.k + next, k_stride, key_end - key - KEYS,
                                                  job.head_dim);
            tile_copy<dim, KEYS, FORWARD_THREADS>(v_tile + (turn ^ 1) * TILE, job.v + next, k_stride, key_end - key - KEYS,
                                                  job.head_dim);
            copy_async_commit();
        }
        int seen = ahead + row - key; /* by the first row of the warp: columns 0 .. seen */
        if (seen + 31 < 0)
            continue;
        float s[2][WIDE][4];
        uint32_t w[2][WIDE][2];
        multiply_rows<dim, 2, WIDE>(s, q_tile + row * dim, k_tile + turn * TILE);
        if (seen < KEYS - 1)
            hide_columns<2, WIDE>(s, seen);
        soften<dim, WIDE>(s, job.scale_log2, most, weight, sum);
        round_weights<2, WIDE>(w, s);
        multiply_weights<dim, 2, WIDE>(sum, w, v_tile + turn * TILE);
    }
    float factor[2][2];
    UNROLL
    for (int m = 0; m < 2; m++)
        UNROLL
        for (int h = 0; h < 2; h++) {
            float all = weight[m][h] + __shfl_xor_sync(FULL_WARP, weight[m][h], 1);
            all += __shfl_xor_sync(FULL_WARP, all, 2);
            factor[m][h] = 1 / all;
            int r = row + m * 16 + h * 8 + lane / 4;
            if (lane % 4 == 0 && r < valid)
                job.logsumexp[(batch * job.query_count + first + r) * job.heads + head] =
                    (most[m][h] + log2f(all)) * (float)LN_2;
        }
    store_rows<dim, 2>(sum, factor, q_tile, row, job.to + q_at, q_stride, valid, job.head_dim);
}

/* ---- backward ------------------------------------------------------------------------------------------------------- */

enum { DELTA_THREADS = 256, DELTA_LANES = 16 /* of a head of a query: eight elements each */ };

/* row_lse and row_delta of all queries, and of the places behind them. */
static __global__ void tile_delta(tile_job job) {
    int64_t index = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / DELTA_LANES;
    int lane = (int)threadIdx.x % DELTA_LANES, head = (int)(index % job.heads);
    int64_t i = index / job.heads % job.row_sum_stride, batch = index / job.heads / job.row_sum_stride;
    bool is_query = batch < job.batch && i < job.query_count;
    float sum = 0;
    if (is_query && lane * 8 < job.head_dim) {
        int64_t at = query_place(job, batch, i, head) + lane * 8;
        uint4 a = *(const uint4 *)(job.dout + at), b = *(const uint4 *)(job.out + at);
        sum = low_bf16(a.x) * low_bf16(b.x) + high_bf16(a.x) * high_bf16(b.x) + low_bf16(a.y) * low_bf16(b.y) +
              high_bf16(a.y) * high_bf16(b.y) + low_bf16(a.z) * low_bf16(b.z) + high_bf16(a.z) * high_bf16(b.z) +
              low_bf16(a.w) * low_bf16(b.w) + high_bf16(a.w) * high_bf16(b.w);
    }
    for (int distance = DELTA_LANES / 2; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(FULL_WARP, sum, distance);
    if (lane == 0 && batch < job.batch) {
        int64_t to = (batch * job.heads + head) * job.row_sum_stride + i;
        job.row_delta[to] = sum;
        job.row_lse[to] =
            is_query ? job.logsumexp[(batch * job.query_count + i) * job.heads + head] * (float)LOG2_E : INFINITY;
    }
}

enum { DQ_QUERIES = 128, DQ_KEYS = 32, DQ_THREADS = 128 };

static size_t tile_dq_bytes(int dim) {
    return (size_t)(2 * DQ_QUERIES + 4 * DQ_KEYS) * dim * sizeof(bf16);
}

/* As forward: 128 queries of one head, a warp 32 of them. */
template <int dim> static __global__ void __launch_bounds__(DQ_THREADS, 2) tile_dq(tile_job job) {
    enum { KEYS = DQ_KEYS, TILE = KEYS * dim, WIDE = KEYS / 8 };
    CUDA_SHARED_DYNAMIC(bf16, q_tile);
    bf16 *dout_tile = q_tile + DQ_QUERIES * dim, *k_tile = dout_tile + DQ_QUERIES * dim, *v_tile = k_tile + 2 * TILE;
    int64_t all_heads = job.batch * job.heads, tiles = (job.query_count + DQ_QUERIES - 1) / DQ_QUERIES;
    int first = (int)(tiles - 1 - blockIdx.x / all_heads) * DQ_QUERIES;
    int64_t batch = blockIdx.x % all_heads / job.heads;
    int head = (int)(blockIdx.x % all_heads % job.heads), kv_head = head / job.group;
    int valid = min(job.query_count - first, (int)DQ_QUERIES), key_end = first + valid;
    int lane = (int)threadIdx.x % WARP, row = (int)threadIdx.x / WARP * 32;
    int64_t q_stride = (int64_t)job.heads * job.head_dim, k_stride = (int64_t)job.kv_heads * job.head_dim;
    int64_t q_at = query_place(job, batch, first, head), k_at = key_place(job, batch, 0, kv_head);
    tile_copy<dim, DQ_QUERIES, DQ_THREADS>(q_tile, job.q + q_at, q_stride, valid, job.head_dim);
    tile_copy<dim, DQ_QUERIES, DQ_THREADS>(dout_tile, job.dout + q_at, q_stride, valid, job.head_dim);
    tile_copy<dim, KEYS, DQ_THREADS>(k_tile, job.k + k_at, k_stride, key_end, job.head_dim);
    tile_copy<dim, KEYS, DQ_THREADS>(v_tile, job.v + k_at, k_stride, key_end, job.head_dim);
    copy_async_commit();
    float sum[2][dim / 8][4], lse[2][2], delta[2][2], factor[2][2];
    clear<2, dim / 8>(sum);
    UNROLL
    for (int m = 0; m < 2; m++)
        UNROLL
        for (int h = 0; h < 2; h++) {
            int r = row + m * 16 + h * 8 + lane / 4;
            int64_t at = (batch * job.heads + head) * job.row_sum_stride + first + r;
            lse[m][h] = r < valid ? job.row_lse[at] : INFINITY;
            delta[m][h] = r < valid ? job.row_delta[at] : 0;
            factor[m][h] = job.scale;
        }
    for (int key = 0, turn = 0; key < key_end; key += KEYS, turn ^= 1) {
        copy_async_wait<0>();
        __syncthreads(); /* the tiles are there, and nobody reads the ones before any more */
        if (key + KEYS < key_end) {
            int64_t next = k_at + (key + KEYS) * k_stride;
            tile_copy<dim, KEYS, DQ_THREADS>(k_tile + (turn ^ 1) * TILE, job.k + next, k_stride, key_end - key - KEYS,
                                             job.head_dim);
            tile_copy<dim, KEYS, DQ_THREADS>(v_tile + (turn ^ 1) * TILE, job.v + next, k_stride, key_end - key - KEYS,
                                             job.head_dim);
            copy_async_commit();
        }
        int seen = first + row - key;
        if (seen + 31 < 0)
            continue;
        float s[2][WIDE][4], ds[2][WIDE][4];
        uint32_t w[2][WIDE][2];
        multiply_rows<dim, 2, WIDE>(s, q_tile + row * dim, k_tile + turn * TILE);
        multiply_rows<dim, 2, WIDE>(ds, dout_tile + row * dim, v_tile + turn * TILE);
        if (seen < KEYS - 1)
            hide_columns<2, WIDE>(s, seen);
        UNROLL
        for (int m = 0; m < 2; m++)
            UNROLL
            for (int n = 0; n < WIDE; n++)
                UNROLL
                for (int e = 0; e < 4; e++)
                    ds[m][n][e] = power_of_2(fmaf(s[m][n][e], job.scale_log2, -lse[m][e / 2])) * (ds[m][n][e] - delta[m][e / 2]);
        round_weights<2, WIDE>(w, ds);
        multiply_weights<dim, 2, WIDE>(sum, w, k_tile + turn * TILE);
    }
    store_rows<dim, 2>(sum, factor, q_tile, row, job.dq + q_at, q_stride, valid, job.head_dim);
}

/* Keys of a block, and how they are divided: a warp has the sums of dk and dv of its keys in registers, 128 a thread. */
template <int dim> struct dkv_tiles {
    enum {
        KEYS = 128,
        TALL = dim == 64 ? 2 : 1, /* 16 keys each, of a warp */
        THREADS = KEYS / (16 * TALL) * WARP,
        QUERIES = 32, /* twice as many are more shared memory than a block of compute capability 8.6, 8.9 or 12 has */
        WIDE = QUERIES / 8,
        TILE = QUERIES * dim,
        BYTES = (2 * KEYS + 4 * QUERIES) * dim * (int)sizeof(bf16) + 4 * QUERIES * (int)sizeof(float)
    };
};

/* Starts to copy a tile of queries, their dout and what belongs to their rows. */
template <int dim>
static __device__ __forceinline__ void dkv_copy(const tile_job &job, int64_t batch, int head, int query, bf16 *q_tile,
                                                bf16 *dout_tile, float *rows) {
    typedef dkv_tiles<dim> tiles;
    int64_t at = query_place(job, batch, query, head), stride = (int64_t)job.heads * job.head_dim;
    int valid = job.query_count - query, unit = (int)threadIdx.x;
    tile_copy<dim, tiles::QUERIES, tiles::THREADS>(q_tile, job.q + at, stride, valid, job.head_dim);
    tile_copy<dim, tiles::QUERIES, tiles::THREADS>(dout_tile, job.dout + at, stride, valid, job.head_dim);
    int64_t row = (batch * job.heads + head) * job.row_sum_stride + query;
    if (unit < tiles::QUERIES / 4)
        copy_async(rows + unit * 4, job.row_lse + row + unit * 4, 16);
    else if (unit < tiles::QUERIES / 2)
        copy_async(rows + unit * 4, job.row_delta + row + (unit - tiles::QUERIES / 4) * 4, 16);
    copy_async_commit();
}

/* What one tile of queries adds to dk and dv of the keys of a warp, whose tiles begin with these; `ahead` is the first query
 * less the first key. Rows are keys here, columns queries. */
template <int dim>
static __device__ __forceinline__ void dkv_tile(const tile_job &job, int ahead, const bf16 *k_tile, const bf16 *v_tile,
                                                const bf16 *q_tile, const bf16 *dout_tile, const float *rows,
                                                float dk[dkv_tiles<dim>::TALL][dim / 8][4],
                                                float dv[dkv_tiles<dim>::TALL][dim / 8][4]) {
    typedef dkv_tiles<dim> tiles;
    enum { TALL = tiles::TALL, WIDE = tiles::WIDE };
    int lane = (int)threadIdx.x % WARP;
    float s[TALL][WIDE][4], ds[TALL][WIDE][4];
    uint32_t w[TALL][WIDE][2];
    multiply_rows<dim, TALL, WIDE>(s, k_tile, q_tile);
    if (ahead < 16 * TALL - 1)
        hide_rows<TALL, WIDE>(s, ahead);
    UNROLL
    for (int n = 0; n < WIDE; n++) {
        float2 lse = *(const float2 *)(rows + n * 8 + lane % 4 * 2);
        UNROLL
        for (int m = 0; m < TALL; m++)
            UNROLL
            for (int e = 0; e < 4; e++)
                s[m][n][e] = power_of_2(fmaf(s[m][n][e], job.scale_log2, -(e % 2 ? lse.y : lse.x)));
    }
    round_weights<TALL, WIDE>(w, s);
    multiply_weights<dim, TALL, WIDE>(dv, w, dout_tile);
    multiply_rows<dim, TALL, WIDE>(ds, v_tile, dout_tile);
    UNROLL
    for (int n = 0; n < WIDE; n++) {
        float2 delta = *(const float2 *)(rows + tiles::QUERIES + n * 8 + lane % 4 * 2);
        UNROLL
        for (int m = 0; m < TALL; m++)
            UNROLL
            for (int e = 0; e < 4; e++)
                ds[m][n][e] = s[m][n][e] * (ds[m][n][e] - (e % 2 ? delta.y : delta.x));
    }
    round_weights<TALL, WIDE>(w, ds);
    multiply_weights<dim, TALL, WIDE>(dk, w, q_tile);
}

/* A block has 128 keys of one key-value head; it goes along the queries of all heads of the group that see them. */
template <int dim>
static __global__ void __launch_bounds__(dkv_tiles<dim>::THREADS, dim == 64 ? 2 : 1) tile_dkv(tile_job job) {
    typedef dkv_tiles<dim> tiles;
    enum { KEYS = tiles::KEYS, QUERIES = tiles::QUERIES, TILE = tiles::TILE, TALL = tiles::TALL };
    CUDA_SHARED_DYNAMIC(bf16, k_tile);
    bf16 *v_tile = k_tile + KEYS * dim, *q_tile = v_tile + KEYS * dim, *dout_tile = q_tile + 2 * TILE;
    float *rows = (float *)(dout_tile + 2 * TILE);
    int64_t all_heads = job.batch * job.kv_heads;
    int first = (int)(blockIdx.x / all_heads) * KEYS, kv_head = (int)(blockIdx.x % all_heads % job.kv_heads);
    int64_t batch = blockIdx.x % all_heads / job.kv_heads;
    int valid = min(job.key_count - first, (int)KEYS), row = (int)threadIdx.x / WARP * (16 * TALL);
    int64_t k_stride = (int64_t)job.kv_heads * job.head_dim, k_at = key_place(job, batch, first, kv_head);
    int head = kv_head * job.group, query = first; /* KEYS is a multiple of QUERIES */
    tile_copy<dim, KEYS, tiles::THREADS>(k_tile, job.k + k_at, k_stride, valid, job.head_dim);
    tile_copy<dim, KEYS, tiles::THREADS>(v_tile, job.v + k_at, k_stride, valid, job.head_dim);
    dkv_copy<dim>(job, batch, head, query, q_tile, dout_tile, rows);
    float dk[TALL][dim / 8][4], dv[TALL][dim / 8][4];
    clear<TALL, dim / 8>(dk);
    clear<TALL, dim / 8>(dv);
    for (int turn = 0, end = head + job.group; head < end; turn ^= 1) {
        copy_async_wait<0>();
        __syncthreads(); /* the tiles are there, and nobody reads the ones before any more */
        int ahead = query - first - row; /* the first query of the tile from the first key of the warp */
        query += QUERIES;
        if (query >= job.query_count) {
            query = first;
            head++;
        }
        int other = turn ^ 1;
        if (head < end)
            dkv_copy<dim>(job, batch, head, query, q_tile + other * TILE, dout_tile + other * TILE, rows + other * 2 * QUERIES);
        if (ahead + QUERIES > 0)
            dkv_tile<dim>(job, ahead, k_tile + row * dim, v_tile + row * dim, q_tile + turn * TILE, dout_tile + turn * TILE,
                          rows + turn * 2 * QUERIES, dk, dv);
    }
    float factor[TALL][2], one[TALL][2];
    for (int m = 0; m < TALL; m++) {
        factor[m][0] = factor[m][1] = job.scale;
        one[m][0] = one[m][1] = 1;
    }
    store_rows<dim, TALL>(dk, factor, k_tile, row, job.dk + k_at, k_stride, valid, job.head_dim);
    store_rows<dim, TALL>(dv, one, v_tile, row, job.dv + k_at, k_stride, valid, job.head_dim);
}
