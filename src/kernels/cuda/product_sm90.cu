/* Dense and grouped products of bf16 on Hopper's matrix units: one persistent kernel for every form.
 *
 * A cluster of two blocks computes 256 rows and 256 columns of a group's result, a block 128 of the rows. In a block one
 * warp group brings operands, 64 of the inner dimension at a time, into a ring of stages in shared memory; two others
 * multiply, each for 64 rows, and hold the sums in registers. Operand B is the same for both blocks: each brings half of it and
 * gives it to both. Operand A comes through the copy engine, or, where it is gathered, row by row through the index.
 *
 * How many rows a group has is read from `offsets` on the device: every cluster counts the tiles of all groups when it
 * begins, and takes every so many-th. The sums of an element are always added in the same order.
 *
 *   form      C                     A (rows of tile)       B (columns of tile)
 *   FORWARD   y [N,O]               x, inner I             w_e [O,I], inner I
 *   INPUT     dx [N,I]              dy, inner O            w_e, inner O: rows along the inner dimension
 *   WEIGHT    dw_e [O,I] +=         dy or x                x or dy; inner: the rows of the group, for both
 *
 * Of a WEIGHT product the gathered operand, if there is one, is A: then C may be written transposed. */
#include "kernels/cuda/product.cuh"

#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/tensor_map.cuh"

enum {
    TILE_M = 128,
    TILE_N = 256,
    TILE_K = 64,
    CLUSTER = 2,
    STAGES = 4,
    GROUP_THREADS = 128,
    MULTIPLIERS = 2,
    THREADS = (1 + MULTIPLIERS) * GROUP_THREADS,
    GROUPS_MAX = 256,
    BAND = 8, /* tiles of rows that are worked on together, for the second-level cache */
    STRIP_BYTES = 2 * 16 * 128, /* two strips */
    BOX_BYTES = 64 * 128, /* 64 rows of 64 numbers */
    A_BYTES = TILE_M * TILE_K * 2,
    B_BYTES = TILE_N * TILE_K * 2,
    STAGE_BYTES = A_BYTES + B_BYTES,
};

enum form { FORWARD, INPUT, WEIGHT };
enum result { TO_BF16, TO_F32, ADD_F32, ADD_F32_TRANSPOSED, TO_SWIGLU, THROUGH_SWIGLU, ONTO_F32 };

struct rows_operand {
    const bf16 *data;
    const int32_t *index; /* NULL: row r is row r */
    int64_t stride;       /* elements */
    int columns;
};

struct maps {
    CUtensorMap a[PRODUCT_TERMS_MAX], b[PRODUCT_TERMS_MAX];
};

struct problem {
    const int32_t *offsets; /* NULL: one group of all rows */
    int groups;
    int rows;               /* N */
    int group_rows;         /* without offsets: rows of each group but the last; of one group all */
    int m, n;               /* of C: rows (WEIGHT only), columns (of one half where there are two) */
    int inner[PRODUCT_TERMS_MAX], terms; /* FORWARD, INPUT */
    struct rows_operand a[PRODUCT_TERMS_MAX], b;
    void *c, *c_up, *c_act; /* THROUGH_SWIGLU: gate and up, which become their gradients, and act */
    const float *base;      /* ONTO_F32: what the sums are added to, as large as C */
    const float *row_weight;
    float *row_part;        /* THROUGH_SWIGLU [tiles of columns, N]: parts of the gradient of row_weight */
    int64_t stride;         /* of C's rows, elements */
    int64_t group_elements; /* WEIGHT: from one group's C to the next */
};

struct shared {
    unsigned char stage[STAGES][STAGE_BYTES]; /* A, then B */
    unsigned char strip[MULTIPLIERS][GROUP_THREADS / WARP][STRIP_BYTES];
    uint64_t full[STAGES], empty[STAGES];
    int first_row[GROUPS_MAX + 1], first_tile[GROUPS_MAX + 1];
};

struct tile {
    int group, row_begin, row_end; /* FORWARD, INPUT: rows of A and C. WEIGHT: of the group */
    int m, n;                      /* first row (WEIGHT: of C) and column of this block */
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

static __device__ void count_tiles(const struct problem &p, enum form form, int column_tiles, struct shared *s) {
    for (int g = (int)threadIdx.x; g <= p.groups; g += THREADS)
        s->first_row[g] = p.offsets ? p.offsets[g] : g < p.groups ? g * p.group_rows : p.rows;
    __syncthreads();
    if (threadIdx.x < WARP) {
        int before = 0;
        for (int base = 0; base < p.groups; base += WARP) {
            int g = base + (int)threadIdx.x, tiles = 0;
            if (g < p.groups) {
                int rows = s->first_row[g + 1] - s->first_row[g];
                int pairs = form == WEIGHT ? (rows > 0 ? p.m : 0) : rows;
                tiles = (pairs + CLUSTER * TILE_M - 1) / (CLUSTER * TILE_M) * column_tiles;
            }
            int sum = tiles;
            for (int distance = 1; distance < WARP; distance *= 2) {
                int other = __shfl_up_sync(FULL_WARP, sum, distance);
                sum += (int)threadIdx.x >= distance ? other : 0;
            }
            if (g < p.groups)
                s->first_tile[g] = before + sum - tiles;
            before += __shfl_sync(FULL_WARP, sum, WARP - 1);
        }
        if (threadIdx.x == 0)
            s->first_tile[p.groups] = before;
    }
    __syncthreads();
}

/* Tile number t; `group` is one at or before its own. */
static __device__ __forceinline__ struct tile find_tile(const struct problem &p, enum form form, int column_tiles, int columns,
                                                        const struct shared *s, int t, int group, int rank) {
    while (t >= s->first_tile[group + 1])
        group++;
    int within = t - s->first_tile[group], row_begin = s->first_row[group], row_end = s->first_row[group + 1];
    int extent = form == WEIGHT ? p.m : row_end - row_begin;
    int pairs = (extent + CLUSTER * TILE_M - 1) / (CLUSTER * TILE_M);
    int band = within / (BAND * column_tiles), in_band = within - band * BAND * column_tiles;
    int height = pairs - band * BAND < BAND ? pairs - band * BAND : BAND;
    int m = ((band * BAND + in_band % height) * CLUSTER + rank) * TILE_M, n = in_band / height * columns;
    if (form == WEIGHT)
        return {group, row_begin, row_end, m, n};
    return {group, row_begin + m, row_end, m, n};
}

static __device__ __forceinline__ void bringers_sync(void) {
    asm volatile("bar.sync 1, %0;" : : "n"((int)GROUP_THREADS) : "memory");
}

/* ---- bringing ---------------------------------------------------------------------------------------------------- */

struct ring {
    int stage;
    uint32_t parity;
};

static __device__ __forceinline__ void advance(struct ring *ring) {
    if (++ring->stage == STAGES) {
        ring->stage = 0;
        ring->parity ^= 1;
    }
}

/* A group of four warps has about a thousand cycles for a block of 64 of the inner dimension, in which each thread copies 16 bytes
 * eight times: what is the same for all blocks is done once a tile, and the usual block asks no questions.
 *
 * FORWARD, INPUT: a thread copies chunk thread % 8 of rows thread / 8, + 16, ... of A, from here on. */
struct gathered_rows {
    const bf16 *from[TILE_M / 16];
};

/* In the place of rows beyond the group its last one is copied: what they give is not stored. */
static __device__ __forceinline__ void find_rows(const struct rows_operand &a, const struct tile &tile, int thread,
                                                 struct gathered_rows *rows) {
#pragma unroll
    for (int i = 0; i < TILE_M / 16; i++) {
        int row = tile.row_begin + thread / 8 + 16 * i;
        row = row < tile.row_end ? row : tile.row_end - 1;
        rows->from[i] = a.data + (uint64_t)(uint32_t)a.index[row] * (uint32_t)a.stride + thread % 8 * 8;
    }
}

static __device__ __forceinline__ void bring_rows(const struct rows_operand &a, const struct gathered_rows &rows, int k,
                                                  int thread, unsigned char *to) {
    int chunk = thread % 8, row = thread / 8;
    unsigned char *at = to + row * 128 + ((chunk ^ (row & 7)) << 4);
    if (k + TILE_K <= a.columns) {
#pragma unroll
        for (int i = 0; i < TILE_M / 16; i++)
            copy_async(at + i * 16 * 128, rows.from[i] + k, 16);
    } else {
        bool is_there = k + chunk * 8 < a.columns;
        for (int i = 0; i < TILE_M / 16; i++)
            copy_async(at + i * 16 * 128, is_there ? rows.from[i] + k : a.data, is_there ? 16 : 0);
    }
}

/* WEIGHT: a thread copies chunk thread % CHUNKS of rows thread / CHUNKS, + PASS, ... of the next 64 of the inner dimension, of
 * `boxes` * 64 columns, box after box. */
template <int boxes> struct inner_rows {
    enum { CHUNKS = boxes * 8, PASS = GROUP_THREADS / CHUNKS, COUNT = TILE_K / PASS };
    int source[COUNT];
};

/* Of a block that is whole. */
template <int boxes>
static __device__ __forceinline__ void find_inner_rows(const struct rows_operand &a, int row, int thread,
                                                       struct inner_rows<boxes> *rows) {
    const int32_t *index = a.index + row + thread / inner_rows<boxes>::CHUNKS;
#pragma unroll
    for (int i = 0; i < inner_rows<boxes>::COUNT; i++)
        rows->source[i] = index[i * inner_rows<boxes>::PASS];
}

template <int boxes> static __device__ __forceinline__ unsigned char *inner_place(unsigned char *to, int thread, int i) {
    int chunk = thread % inner_rows<boxes>::CHUNKS, k = thread / inner_rows<boxes>::CHUNKS + i * inner_rows<boxes>::PASS;
    return to + chunk / 8 * BOX_BYTES + k * 128 + (((chunk & 7) ^ (k & 7)) << 4);
}

/* is_inside: of the thread's columns, that the operand has them. */
template <int boxes>
static __device__ __forceinline__ void bring_inner_rows(const struct rows_operand &a, const struct inner_rows<boxes> &rows,
                                                        int column, int thread, bool is_inside, unsigned char *to) {
    const bf16 *from = a.data + (is_inside ? column + thread % inner_rows<boxes>::CHUNKS * 8 : 0);
    int bytes = is_inside ? 16 : 0;
#pragma unroll
    for (int i = 0; i < inner_rows<boxes>::COUNT; i++)
        copy_async(inner_place<boxes>(to, thread, i), from + (uint64_t)(uint32_t)rows.source[i] * (uint32_t)a.stride, bytes);
}

/* Rows row..end-1, fewer than a block, and zeros after. */
template <int boxes>
static __device__ __noinline__ void bring_last_rows(const struct rows_operand &a, int row, int end, int column, int thread,
                                                    unsigned char *to) {
    enum { CHUNKS = inner_rows<boxes>::CHUNKS, PASS = inner_rows<boxes>::PASS };
    int at = column + thread % CHUNKS * 8;
    for (int i = 0; i < inner_rows<boxes>::COUNT; i++) {
        int k = row + thread / CHUNKS + i * PASS;
        bool is_there = at < a.columns && k < end;
        int64_t source = is_there ? (a.index ? a.index[k] : k) * a.stride + at : 0;
        copy_async(inner_place<boxes>(to, thread, i), a.data + source, is_there ? 16 : 0);
    }
}

template <int form, int result>
static __device__ __forceinline__ void bring_b(const struct maps &maps, const struct tile &tile, int term, int k, int rank,
                                               unsigned char *b, uint64_t *full) {
    const uint16_t both = (1 << CLUSTER) - 1;
    if (form == FORWARD) {
        int half = TILE_N / 2;
        if (result == TO_SWIGLU)
            share_box_3d(b + rank * (B_BYTES / 2), &maps.b[rank], full, k, tile.n, tile.group, both);
        else
            share_box_3d(b + rank * (B_BYTES / 2), &maps.b[0], full, k, tile.n + rank * half, tile.group, both);
    } else {
#pragma unroll
        for (int i = 2 * rank; i < 2 * rank + 2; i++) {
            if (form == INPUT)
                share_box_3d(b + i * BOX_BYTES, &maps.b[term], full, tile.n + 64 * i, k, tile.group, both);
            else
                share_box_2d(b + i * BOX_BYTES, &maps.b[0], full, tile.n + 64 * i, k, both);
        }
    }
}

template <int form>
static __device__ __forceinline__ void bring_a(const struct maps &maps, const struct tile &tile, int term, int k, unsigned char *a,
                                               uint64_t *full) {
    if (form != WEIGHT) {
        load_box_2d(a, &maps.a[term], full, k, tile.row_begin);
    } else {
        load_box_2d(a, &maps.a[0], full, tile.m, k);
        load_box_2d(a + BOX_BYTES, &maps.a[0], full, tile.m + 64, k);
    }
}

/* The blocks of the inner dimension of a tile, one after the other. */
struct walk {
    int term, k, end;
};

template <int form> static __device__ __forceinline__ struct walk first_block(const struct problem &p, const struct tile &tile) {
    if (form == WEIGHT)
        return {0, tile.row_begin, tile.row_end};
    return {0, 0, p.inner[0]};
}

/* False after the last one. */
template <int form> static __device__ __forceinline__ bool next_block(const struct problem &p, struct walk *walk) {
    walk->k += TILE_K;
    if (walk->k < walk->end)
        return true;
    if (form == WEIGHT || ++walk->term >= p.terms)
        return false;
    walk->k = 0;
    walk->end = p.inner[walk->term];
    return true;
}

/* By one thread: all that the copy engine brings. */
template <int form, bool gathers, int result>
static __device__ __forceinline__ void bring_boxes(const struct maps &maps, const struct tile &tile, const struct walk &walk,
                                                   int rank, unsigned char *stage, uint64_t *full) {
    if (gathers)
        barrier_expect(full, B_BYTES);
    else
        barrier_arrive_expecting(full, STAGE_BYTES);
    bring_b<form, result>(maps, tile, walk.term, walk.k, rank, stage + A_BYTES, full);
    if (!gathers)
        bring_a<form>(maps, tile, walk.term, walk.k, stage, full);
}

/* The last rows of a group are fewer than a block: the copy engine would bring the next group's. */
template <int form> static __device__ __forceinline__ bool is_tail(const struct walk &walk) {
    return form == WEIGHT && walk.k + TILE_K > walk.end;
}

static __device__ __forceinline__ void bring_tail(const struct problem &p, const struct tile &tile, const struct walk &walk,
                                                  int thread, unsigned char *stage) {
    bring_last_rows<TILE_M / 64>(p.a[0], walk.k, walk.end, tile.m, thread, stage);
    bring_last_rows<TILE_N / 64>(p.b, walk.k, walk.end, tile.n, thread, stage + A_BYTES);
}

/* Nothing is gathered: one thread asks the copy engine; the others only help with tails. */
template <int form, int result>
static __device__ __forceinline__ void bring_direct(const struct maps &maps, const struct problem &p, int column_tiles, int columns,
                                                    struct shared *s, int rank) {
    struct ring ring = {0, 1};
    int group = 0, total = s->first_tile[p.groups], thread = (int)threadIdx.x;
    if (form != WEIGHT && thread > 0)
        return;
    for (int t = (int)blockIdx.x / CLUSTER; t < total; t += (int)gridDim.x / CLUSTER) {
        struct tile tile = find_tile(p, (enum form)form, column_tiles, columns, s, t, group, rank);
        struct walk walk = first_block<form>(p, tile);
        group = tile.group;
        do {
            uint64_t *full = &s->full[ring.stage];
            barrier_wait(&s->empty[ring.stage], ring.parity);
            if (is_tail<form>(walk)) {
                bring_tail(p, tile, walk, thread, s->stage[ring.stage]);
                copy_async_commit();
                copy_async_wait<0>();
                fence_for_matrix_units();
                bringers_sync();
                if (thread == 0)
                    barrier_arrive(full);
            } else if (thread == 0) {
                bring_boxes<form, false, result>(maps, tile, walk, rank, s->stage[ring.stage], full);
            }
            advance(&ring);
        } while (next_block<form>(p, &walk));
    }
}

/* A is gathered by all threads of the group; each arrives when its rows are there. */
template <int form, int result>
static __device__ __forceinline__ void bring_gathered(const struct maps &maps, const struct problem &p, int column_tiles,
                                                      int columns, struct shared *s, int rank) {
    struct ring ring = {0, 1};
    int group = 0, total = s->first_tile[p.groups], thread = (int)threadIdx.x;
    for (int t = (int)blockIdx.x / CLUSTER; t < total; t += (int)gridDim.x / CLUSTER) {
        struct tile tile = find_tile(p, (enum form)form, column_tiles, columns, s, t, group, rank);
        struct walk walk = first_block<form>(p, tile);
        struct gathered_rows rows;
        struct inner_rows<TILE_M / 64> inner;
        bool goes_on, is_inside = form == WEIGHT && tile.m + thread % inner.CHUNKS * 8 < p.a[0].columns;
        group = tile.group;
        if (form != WEIGHT)
            find_rows(p.a[0], tile, thread, &rows);
        else if (!is_tail<form>(walk))
            find_inner_rows(p.a[0], walk.k, thread, &inner);
        do {
            unsigned char *stage = s->stage[ring.stage];
            uint64_t *full = &s->full[ring.stage];
            struct walk now = walk;
            barrier_wait(&s->empty[ring.stage], ring.parity);
            if (is_tail<form>(now)) {
                bring_tail(p, tile, now, thread, stage);
            } else {
                if (thread == 0)
                    bring_boxes<form, true, result>(maps, tile, now, rank, stage, full);
                if (form == WEIGHT)
                    bring_inner_rows(p.a[0], inner, tile.m, thread, is_inside, stage);
                else
                    bring_rows(p.a[now.term], rows, now.k, thread, stage);
            }
            barrier_arrive_after_copies(full);
            advance(&ring);
            goes_on = next_block<form>(p, &walk);
            if (form == WEIGHT && goes_on && !is_tail<form>(walk)) /* while the copies are on their way */
                find_inner_rows(p.a[0], walk.k, thread, &inner);
            if (form != WEIGHT && goes_on && walk.term != now.term)
                find_rows(p.a[walk.term], tile, thread, &rows);
        } while (goes_on);
    }
}

/* ---- multiplying ------------------------------------------------------------------------------------------------- */

template <int form>
static __device__ __forceinline__ void multiply_stage(float d[128], uint32_t a, uint32_t b, bool is_first) {
    matrices_begin();
#pragma unroll
    for (int k = 0; k < TILE_K / 16; k++) {
        uint64_t left = form == WEIGHT ? matrix_at(a + k * 16 * 128, BOX_BYTES, 1024) : matrix_at(a + k * 32, 16, 1024);
        uint64_t right = form == FORWARD ? matrix_at(b + k * 32, 16, 1024) : matrix_at(b + k * 16 * 128, BOX_BYTES, 1024);
        multiply_64x256<form == WEIGHT, form != FORWARD>(d, left, right, k > 0 || !is_first);
    }
    matrices_commit();
}

/* ---- storing ----------------------------------------------------------------------------------------------------- */

/* Results of bf16 pass through shared memory, 16 rows of 64 columns of a warp at a time: there they come in the order that the
 * sums have in registers and leave in rows of 128 bytes. `strip` holds them, the 16-byte chunks of row r swapped by r % 8. */
struct strip {
    unsigned char *at;    /* of this warp */
    int row, row_end;     /* the first of the 16, and where the group ends */
    int columns;
};

static __device__ __forceinline__ unsigned char *strip_chunk(const struct strip &s, int row, int chunk) {
    return s.at + row * 128 + ((chunk ^ (row & 7)) << 4);
}

/* Of the 8x8 matrices (rows 0-7, j), (8-15, j), (0-7, j+1), (8-15, j+1) the row that this lane names. */
static __device__ __forceinline__ unsigned char *strip_matrix_row(const struct strip &s, int j) {
    int lane = (int)threadIdx.x % WARP;
    return strip_chunk(s, lane % 16, j + lane / 16);
}

/* As rows, from column `n` of c on. */
static __device__ __forceinline__ void store_rows(const struct strip &s, bf16 *c, int64_t stride, int n) {
    int lane = (int)threadIdx.x % WARP, column = n + lane % 8 * 8;
    bf16 *to = c + (int64_t)(s.row + lane / 8) * stride + column;
#pragma unroll
    for (int i = 0; i < 4; i++, to += 4 * stride) {
        int row = lane / 8 + 4 * i;
        uint4 whole = *(const uint4 *)strip_chunk(s, row, lane % 8);
        if (s.row + row < s.row_end && column < s.columns)
            *(uint4 *)to = whole;
    }
}

/* pair[j][half]: two columns of row lane / 4 + 8 half, of the j-th 8 columns. */
static __device__ __forceinline__ void store_strip(const struct strip &s, const uint32_t pair[8][2], bf16 *c, int64_t stride,
                                                   int n) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 8; j += 2)
        store_matrices(strip_matrix_row(s, j), pair[j][0], pair[j][1], pair[j + 1][0], pair[j + 1][1]);
    __syncwarp();
    store_rows(s, c, stride, n);
}

static __device__ __forceinline__ void store_bf16(const float d[128], const struct problem &p, const struct tile &tile,
                                                  const struct strip &s) {
#pragma unroll
    for (int q = 0; q < 4; q++) {
        uint32_t pair[8][2];
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                pair[j][half] = pack_bf16(d[32 * q + 4 * j + 2 * half], d[32 * q + 4 * j + 2 * half + 1]);
        store_strip(s, pair, (bf16 *)p.c, p.stride, tile.n + 64 * q);
    }
}

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

static __device__ __forceinline__ float weight_of(const struct problem &p, const struct strip &s, int half) {
    int row = s.row + (int)threadIdx.x % WARP / 4 + 8 * half;
    return p.row_weight && row < s.row_end ? p.row_weight[row] : 1;
}

static __device__ __forceinline__ void store_swiglu(const float d[128], const struct problem &p, const struct tile &tile,
                                                    const struct strip &s) {
    float weight[2] = {weight_of(p, s, 0), weight_of(p, s, 1)};
#pragma unroll
    for (int q = 0; q < 2; q++) {
        uint32_t gate[8][2], up[8][2];
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int at = 32 * q + 4 * j + 2 * half;
                gate[j][half] = pack_bf16(d[at], d[at + 1]);
                up[j][half] = pack_bf16(d[64 + at], d[64 + at + 1]);
            }
        store_strip(s, gate, (bf16 *)p.c, p.stride, tile.n + 64 * q);
        store_strip(s, up, (bf16 *)p.c_up, p.stride, tile.n + 64 * q);
        if (!p.c_act)
            continue;
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                gate[j][half] = pack_bf16(silu_times(low_bf16(gate[j][half]), low_bf16(up[j][half]), weight[half]),
                                          silu_times(high_bf16(gate[j][half]), high_bf16(up[j][half]), weight[half]));
        store_strip(s, gate, (bf16 *)p.c_act, p.stride, tile.n + 64 * q);
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

/* Into the second-level cache, while the tile is being multiplied. */
static __device__ __forceinline__ void ask_for_swiglu(const struct problem &p, const struct tile &tile) {
    int thread = (int)threadIdx.x - GROUP_THREADS, row = tile.row_begin + thread / 2;
    if (row >= tile.row_end)
        return;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int column = tile.n + (thread % 2 * 2 + i) * 64;
        if (column < p.n) {
            ask_for((const bf16 *)p.c + row * p.stride + column);
            ask_for((const bf16 *)p.c_up + row * p.stride + column);
        }
    }
}

/* Gate and up of 16 rows of 64 columns in two strips: they come there as rows, are read in the order of the sums, and their
 * gradients take their place. */
static __device__ __forceinline__ void load_rows(const struct strip &s, const bf16 *c, int64_t stride, int n, uint4 whole[4]) {
    int lane = (int)threadIdx.x % WARP, column = n + lane % 8 * 8;
    const bf16 *from = c + (int64_t)(s.row + lane / 8) * stride + column;
#pragma unroll
    for (int i = 0; i < 4; i++, from += 4 * stride) {
        bool is_there = s.row + lane / 8 + 4 * i < s.row_end && column < s.columns;
        whole[i] = is_there ? *(const uint4 *)from : make_uint4(0, 0, 0, 0);
    }
}

static __device__ __forceinline__ void put_rows(const struct strip &s, const uint4 whole[4]) {
    int lane = (int)threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < 4; i++)
        *(uint4 *)strip_chunk(s, lane / 8 + 4 * i, lane % 8) = whole[i];
}

static __device__ __forceinline__ void store_through_swiglu(const float d[128], const struct problem &p, const struct tile &tile,
                                                            const struct strip &gates) {
    int lane = (int)threadIdx.x % WARP;
    struct strip ups = gates;
    float weight[2] = {weight_of(p, gates, 0), weight_of(p, gates, 1)}, sum[2] = {0, 0};
    uint4 gate_rows[4], up_rows[4];
    ups.at += 16 * 128;
#pragma unroll
    for (int q = 0; q < 4; q++) {
        int n = tile.n + 64 * q;
        uint32_t act[8][2];
        load_rows(gates, (const bf16 *)p.c, p.stride, n, gate_rows);
        load_rows(ups, (const bf16 *)p.c_up, p.stride, n, up_rows);
        __syncwarp();
        put_rows(gates, gate_rows);
        put_rows(ups, up_rows);
        __syncwarp();
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
        __syncwarp();
        store_rows(gates, (bf16 *)p.c, p.stride, n);
        store_rows(ups, (bf16 *)p.c_up, p.stride, n);
        store_strip(gates, act, (bf16 *)p.c_act, p.stride, n);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = gates.row + lane / 4 + 8 * half;
        sum[half] += __shfl_xor_sync(FULL_WARP, sum[half], 1);
        sum[half] += __shfl_xor_sync(FULL_WARP, sum[half], 2);
        if (p.row_part && row < gates.row_end && lane % 4 == 0)
            p.row_part[(int64_t)(tile.n / TILE_N) * p.rows + row] = sum[half];
    }
}

/* Sums are added where they lie, in the second-level cache: nobody here waits for what was there. An element is added to once. */
static __device__ __forceinline__ void store_f32(const float d[128], const struct problem &p, float *c, int row, int row_end, int n,
                                                 bool adds) {
    int column = n + (int)threadIdx.x % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        bool is_inside = row + 8 * half < row_end;
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

static __device__ __forceinline__ void store_onto(const float d[128], const struct problem &p, int row, int row_end, int n) {
    enum { BATCH = 8 };
    int lane_column = n + (int)threadIdx.x % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        bool is_inside = row + 8 * half < row_end;
        int64_t begin = (int64_t)(row + 8 * half) * p.stride + lane_column;
#pragma unroll
        for (int first = 0; first < 32; first += BATCH) {
            float2 sum[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; i++)
                sum[i] = is_inside && lane_column + 8 * (first + i) < p.n ? *(const float2 *)(p.base + begin + 8 * (first + i))
                                                                          : make_float2(0, 0);
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                int at = 4 * (first + i) + 2 * half;
                if (is_inside && lane_column + 8 * (first + i) < p.n)
                    *(float2 *)((float *)p.c + begin + 8 * (first + i)) = make_float2(sum[i].x + d[at], sum[i].y + d[at + 1]);
            }
        }
    }
}

/* Eight lanes of a column write 32 bytes. */
static __device__ __forceinline__ void add_transposed(const float d[128], const struct problem &p, float *c, int row, int n) {
    int64_t stride = p.stride;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        bool is_inside = row + 8 * half < p.m;
        int column = n + (int)threadIdx.x % 4 * 2;
        float *to = c + row + 8 * half + column * stride;
#pragma unroll
        for (int i = 0; i < 32; i++, to += 8 * stride)
            if (is_inside && column + 8 * i < p.n) {
                add_number(to, d[4 * i + 2 * half]);
                add_number(to + stride, d[4 * i + 2 * half + 1]);
            }
    }
}

template <int form, int result>
static __device__ __forceinline__ void store_tile(const float d[128], const struct problem &p, const struct tile &tile,
                                                  struct shared *shared, int multiplier) {
    int in_group = (int)threadIdx.x % GROUP_THREADS, warp = in_group / WARP;
    int row = multiplier * 64 + warp * 16 + in_group % WARP / 4;
    struct strip strip = {shared->strip[multiplier][warp], tile.row_begin + multiplier * 64 + warp * 16, tile.row_end, p.n};
    if (result == TO_BF16)
        store_bf16(d, p, tile, strip);
    else if (result == TO_SWIGLU)
        store_swiglu(d, p, tile, strip);
    else if (result == THROUGH_SWIGLU)
        store_through_swiglu(d, p, tile, strip);
    else if (result == ONTO_F32)
        store_onto(d, p, tile.row_begin + row, tile.row_end, tile.n);
    else if (form != WEIGHT)
        store_f32(d, p, (float *)p.c, tile.row_begin + row, tile.row_end, tile.n, result == ADD_F32);
    else if (result == ADD_F32 || result == TO_F32)
        store_f32(d, p, (float *)p.c + (int64_t)tile.group * p.group_elements, tile.m + row, p.m, tile.n, result == ADD_F32);
    else
        add_transposed(d, p, (float *)p.c + (int64_t)tile.group * p.group_elements, tile.m + row, tile.n);
}

static __device__ __forceinline__ void release(struct shared *s, int stage) {
    if (threadIdx.x % GROUP_THREADS < CLUSTER)
        barrier_arrive_at(&s->empty[stage], threadIdx.x % GROUP_THREADS);
}

template <int form, bool gathers, int result>
static __device__ __forceinline__ void multiply_all(const struct problem &p, int column_tiles, int columns, struct shared *s,
                                                    int rank, int multiplier) {
    struct ring ring = {0, 0};
    int group = 0, total = s->first_tile[p.groups];
    float d[128];
    for (int t = (int)blockIdx.x / CLUSTER; t < total; t += (int)gridDim.x / CLUSTER) {
        struct tile tile = find_tile(p, (enum form)form, column_tiles, columns, s, t, group, rank);
        group = tile.group;
        int blocks = 0, before = 0;
        if (result == THROUGH_SWIGLU)
            ask_for_swiglu(p, tile);
        if (result == ONTO_F32)
            ask_for_base(p, tile);
        if (form == WEIGHT)
            blocks = (tile.row_end - tile.row_begin + TILE_K - 1) / TILE_K;
        else
            for (int i = 0; i < p.terms; i++)
                blocks += (p.inner[i] + TILE_K - 1) / TILE_K;
        for (int k = 0; k < blocks; k++) {
            barrier_wait(&s->full[ring.stage], ring.parity);
            if (gathers || form == WEIGHT) /* what threads copied */
                fence_for_matrix_units();
            uint32_t a = shared_address(s->stage[ring.stage]);
            multiply_stage<form>(d, a + multiplier * BOX_BYTES, a + A_BYTES, k == 0);
            if (k > 0) {
                matrices_wait<1>();
                release(s, before);
            }
            before = ring.stage;
            advance(&ring);
        }
        matrices_wait<0>();
        release(s, before);
        store_tile<form, result>(d, p, tile, s, multiplier);
    }
}

#endif

template <int form, bool gathers, int result>
static __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    multiply(const __grid_constant__ struct maps maps, const __grid_constant__ struct problem p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    CUDA_SHARED_DYNAMIC(struct shared, s);
    int columns = result == TO_SWIGLU ? TILE_N / 2 : TILE_N, column_tiles = (p.n + columns - 1) / columns;
    int rank = (int)cluster_rank(), role = (int)threadIdx.x / GROUP_THREADS;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&s->full[i], gathers ? GROUP_THREADS : 1);
            barrier_init(&s->empty[i], CLUSTER * MULTIPLIERS);
        }
        barriers_are_initialized();
    }
    count_tiles(p, (enum form)form, column_tiles, s);
    cluster_sync();
    if (role == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
        if (gathers)
            bring_gathered<form, result>(maps, p, column_tiles, columns, s, rank);
        else
            bring_direct<form, result>(maps, p, column_tiles, columns, s, rank);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
        multiply_all<form, gathers, result>(p, column_tiles, columns, s, rank, role - 1);
    }
    cluster_sync(); /* the other block may still write to this one's memory */
#endif
}

static __global__ void add_row_parts(const float *part, int column_tiles, int64_t rows, float *sum) {
    for (int64_t r = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; r < rows; r += (int64_t)gridDim.x * blockDim.x) {
        float all = 0;
        for (int t = 0; t < column_tiles; t++)
            all += part[t * rows + r];
        sum[r] = all;
    }
}

static __global__ void add_splits(const float *part, int splits, int64_t count, float *sum) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count / 4; i += (int64_t)gridDim.x * blockDim.x) {
        float4 all = *(const float4 *)(sum + 4 * i);
        for (int split = 0; split < splits; split++) {
            float4 more = *(const float4 *)(part + split * count + 4 * i);
            all.x += more.x, all.y += more.y, all.z += more.z, all.w += more.w;
        }
        *(float4 *)(sum + 4 * i) = all;
    }
}

/* ---- calls ------------------------------------------------------------------------------------------------------- */

/* Boxes of 64 numbers by `box_rows` rows of groups of matrices [rows, columns]. */
static void make_map(CUtensorMap *map, const void *data, int64_t groups, int64_t rows, int64_t columns, int box_rows,
                     bool has_groups) {
    cuuint64_t size[3] = {(cuuint64_t)columns, (cuuint64_t)rows, (cuuint64_t)groups};
    cuuint64_t stride[2] = {(cuuint64_t)columns * 2, (cuuint64_t)(rows * columns) * 2};
    cuuint32_t box[3] = {64, (cuuint32_t)box_rows, 1}, step[3] = {1, 1, 1};
    CUresult result = encode()(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, has_groups ? 3 : 2, (void *)data, size, stride, box, step,
                               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    CHECK_OP(result, ==, CUDA_SUCCESS);
}

static bool is_fit(struct tensor t) {
    int64_t columns = t.shape[t.dim_count - 1];
    return t.dtype == DTYPE_BF16 && is_aligned(t.data, 16) && columns % 8 == 0 && columns > 0;
}

static bool is_fit_real(struct tensor t) {
    return t.dtype == DTYPE_F32 && is_aligned(t.data, 8) && t.shape[t.dim_count - 1] % 2 == 0;
}

static bool is_fit_weight(struct packed w) {
    return w.dtype == DTYPE_BF16 && is_aligned(w.data, 16) && w.out % 8 == 0 && w.in % 8 == 0;
}

static unsigned cluster_grid(void);

static int64_t rows_of(struct tensor direct, struct tensor rows) {
    return tensor_exists(rows) ? tensor_elements(rows) : direct.shape[0];
}

static struct problem problem_of(struct tensor offsets, int64_t groups, int64_t rows) {
    struct problem p = {0};
    p.offsets = (const int32_t *)offsets.data;
    p.groups = (int)groups;
    p.rows = (int)rows;
    p.group_rows = (int)rows;
    p.terms = 1;
    return p;
}

static struct rows_operand operand_of(struct tensor t, struct tensor rows) {
    return {(const bf16 *)t.data, (const int32_t *)rows.data, t.shape[1], (int)t.shape[1]};
}

static unsigned cluster_grid(void) {
    static int processors = 0;
    int device;
    if (!processors) {
        cuda_check(cudaGetDevice(&device), "device");
        cuda_check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "device");
    }
    return (unsigned)(processors / CLUSTER * CLUSTER);
}

#define START(form, gathers, result)                                                                             \
    CUDA_LAUNCH((multiply<form, gathers, result>), cluster_grid(), THREADS, sizeof(struct shared), maps, problem)

/* Of rows as they are or gathered, to what a call's to_bf16 and accumulate say. */
#define START_RESULT(form, gathers)                \
    do {                                           \
        if (to_bf16)                               \
            START(form, gathers, TO_BF16);         \
        else if (accumulate)                       \
            START(form, gathers, ADD_F32);         \
        else                                       \
            START(form, gathers, TO_F32);          \
    } while (0)
#define START_ROWS(form)                           \
    do {                                           \
        if (tensor_exists(rows))                   \
            START_RESULT(form, true);              \
        else                                       \
            START_RESULT(form, false);             \
    } while (0)

static bool groups_fit(int64_t groups, int64_t rows) {
    return encode() && groups <= GROUPS_MAX && rows <= INT32_MAX / 2;
}

bool sm90_forward(struct tensor x, struct tensor rows, struct tensor offsets, struct packed w, struct tensor y, bool accumulate) {
    bool to_bf16 = y.dtype == DTYPE_BF16;
    if (!is_fit(x) || !is_fit_weight(w) || !(to_bf16 ? is_fit(y) && !accumulate : is_fit_real(y)) ||
        !groups_fit(w.groups, y.shape[0]))
        return false;
    struct maps maps;
    struct problem problem = problem_of(offsets, w.groups, y.shape[0]);
    problem.n = (int)w.out;
    problem.inner[0] = (int)w.in;
    problem.a[0] = operand_of(x, rows);
    problem.c = y.data;
    problem.stride = w.out;
    make_map(&maps.a[0], x.data, 1, x.shape[0], w.in, TILE_M, false);
    make_map(&maps.b[0], w.data, w.groups, w.out, w.in, TILE_N / 2, true);
    START_ROWS(FORWARD);
    return true;
}

bool sm90_forward_onto(struct tensor x, struct packed w, struct tensor base, struct tensor y) {
    if (!is_fit(x) || !is_fit_weight(w) || !is_fit_real(y) || !is_fit_real(base) || !groups_fit(1, y.shape[0]))
        return false;
    struct maps maps;
    struct problem problem = problem_of(tensor_none(), 1, y.shape[0]);
    problem.n = (int)w.out;
    problem.inner[0] = (int)w.in;
    problem.a[0] = operand_of(x, tensor_none());
    problem.c = y.data;
    problem.base = (const float *)base.data;
    problem.stride = w.out;
    make_map(&maps.a[0], x.data, 1, x.shape[0], w.in, TILE_M, false);
    make_map(&maps.b[0], w.data, 1, w.out, w.in, TILE_N / 2, true);
    START(FORWARD, false, ONTO_F32);
    return true;
}

bool sm90_swiglu_forward(struct tensor x, struct tensor rows, struct tensor offsets, struct packed gate_weight,
                         struct packed up_weight, struct tensor row_weight, struct tensor gate, struct tensor up,
                         struct tensor act) {
    if (!is_fit(x) || !is_fit_weight(gate_weight) || !is_fit_weight(up_weight) || !is_fit(gate) || !is_fit(up) ||
        (tensor_exists(act) && !is_fit(act)) || !groups_fit(gate_weight.groups, gate.shape[0]))
        return false;
    struct maps maps;
    struct problem problem = problem_of(offsets, gate_weight.groups, gate.shape[0]);
    problem.n = (int)gate_weight.out;
    problem.inner[0] = (int)gate_weight.in;
    problem.a[0] = operand_of(x, rows);
    problem.c = gate.data;
    problem.c_up = up.data;
    problem.c_act = act.data;
    problem.row_weight = (const float *)row_weight.data;
    problem.stride = gate_weight.out;
    make_map(&maps.a[0], x.data, 1, x.shape[0], gate_weight.in, TILE_M, false);
    make_map(&maps.b[0], gate_weight.data, gate_weight.groups, gate_weight.out, gate_weight.in, TILE_N / 2, true);
    make_map(&maps.b[1], up_weight.data, up_weight.groups, up_weight.out, up_weight.in, TILE_N / 2, true);
    if (tensor_exists(rows))
        START(FORWARD, true, TO_SWIGLU);
    else
        START(FORWARD, false, TO_SWIGLU);
    return true;
}

bool sm90_swiglu_backward(struct tensor dy, struct tensor rows, struct tensor offsets, struct packed w, struct tensor gate,
                          struct tensor up, struct tensor row_weight, struct tensor act, struct tensor drow_weight) {
    if (!is_fit(dy) || !is_fit_weight(w) || !is_fit(gate) || !is_fit(up) || !is_fit(act) || !groups_fit(w.groups, gate.shape[0]))
        return false;
    struct maps maps;
    struct problem problem = problem_of(offsets, w.groups, gate.shape[0]);
    int column_tiles = (int)ceil_div(w.in, TILE_N);
    problem.n = (int)w.in;
    problem.inner[0] = (int)w.out;
    problem.a[0] = operand_of(dy, rows);
    problem.c = gate.data;
    problem.c_up = up.data;
    problem.c_act = act.data;
    problem.row_weight = (const float *)row_weight.data;
    problem.stride = w.in;
    if (tensor_exists(drow_weight))
        problem.row_part = (float *)cuda_scratch((size_t)column_tiles * (size_t)problem.rows * sizeof(float));
    make_map(&maps.a[0], dy.data, 1, dy.shape[0], w.out, TILE_M, false);
    make_map(&maps.b[0], w.data, w.groups, w.out, w.in, TILE_K, true);
    if (tensor_exists(rows))
        START(INPUT, true, THROUGH_SWIGLU);
    else
        START(INPUT, false, THROUGH_SWIGLU);
    if (tensor_exists(drow_weight))
        CUDA_LAUNCH(add_row_parts, grid_for(problem.rows, 256), 256, 0, problem.row_part, column_tiles, (int64_t)problem.rows,
                    (float *)drow_weight.data);
    return true;
}

bool sm90_backward_inputs(const struct product_term *terms, int term_count, struct tensor rows, struct tensor offsets,
                          struct tensor dx, bool accumulate) {
    bool to_bf16 = dx.dtype == DTYPE_BF16;
    int64_t groups = terms[0].w.groups, in = terms[0].w.in;
    if (!(to_bf16 ? is_fit(dx) && !accumulate : is_fit_real(dx)) || !groups_fit(groups, dx.shape[0]))
        return false;
    struct maps maps;
    struct problem problem = problem_of(offsets, groups, dx.shape[0]);
    problem.n = (int)in;
    problem.terms = term_count;
    problem.c = dx.data;
    problem.stride = in;
    for (int i = 0; i < term_count; i++) {
        struct packed w = terms[i].w;
        if (!is_fit(terms[i].dy) || !is_fit_weight(w))
            return false;
        CHECK(w.groups == groups && w.in == in);
        problem.inner[i] = (int)w.out;
        problem.a[i] = operand_of(terms[i].dy, rows);
        make_map(&maps.a[i], terms[i].dy.data, 1, terms[i].dy.shape[0], w.out, TILE_M, false);
        make_map(&maps.b[i], w.data, w.groups, w.out, w.in, TILE_K, true);
    }
    START_ROWS(INPUT);
    return true;
}

/* A dense gradient with few tiles, and many rows to sum over: parts of the rows are as many groups, whose sums are added in
 * order. */
static int splits_of(int64_t m, int64_t n, int64_t rows) {
    int64_t tiles = ceil_div(m, CLUSTER * TILE_M) * ceil_div(n, TILE_N), clusters = cluster_grid() / CLUSTER;
    int64_t wanted = clusters / tiles, most = rows / (16 * TILE_K);
    int64_t splits = wanted < most ? wanted : most;
    return splits < 2 ? 1 : splits < 16 ? (int)splits : 16;
}

static void start_splits(const struct maps &maps, struct problem problem, int splits, float *dw) {
    int64_t count = problem.group_elements;
    problem.groups = splits;
    problem.group_rows = (int)(ceil_div(problem.rows, splits * TILE_K) * TILE_K);
    problem.groups = (int)ceil_div(problem.rows, problem.group_rows);
    problem.c = cuda_scratch((size_t)(problem.groups * count) * sizeof(float));
    START(WEIGHT, false, TO_F32);
    CUDA_LAUNCH(add_splits, grid_for(count / 4, 256), 256, 0, (const float *)problem.c, problem.groups, count, dw);
}

bool sm90_backward_weight(struct tensor dy, struct tensor dy_rows, struct tensor x, struct tensor x_rows, struct tensor offsets,
                          struct tensor dw, bool accumulate) {
    bool turns = tensor_exists(x_rows); /* the gathered one is A */
    struct tensor left = turns ? x : dy, left_rows = turns ? x_rows : dy_rows, right = turns ? dy : x;
    int64_t groups = tensor_exists(offsets) ? dw.shape[0] : 1;
    int64_t rows = rows_of(right, tensor_none());
    if (!is_fit(dy) || !is_fit(x) || !is_fit_real(dw) || (turns && tensor_exists(dy_rows)) || !groups_fit(groups, rows))
        return false;
    if (!accumulate) /* to be replaced by kernels that write */
        cuda_check(cudaMemsetAsync(dw.data, 0, tensor_bytes(dw), (cudaStream_t)cuda_stream()), "cudaMemset");
    struct maps maps;
    struct problem problem = problem_of(offsets, groups, rows);
    problem.m = (int)left.shape[1];
    problem.n = (int)right.shape[1];
    problem.a[0] = operand_of(left, left_rows);
    problem.b = operand_of(right, tensor_none());
    problem.c = dw.data;
    problem.stride = x.shape[1];
    problem.group_elements = dy.shape[1] * x.shape[1];
    make_map(&maps.a[0], left.data, 1, left.shape[0], left.shape[1], TILE_K, false);
    make_map(&maps.b[0], right.data, 1, right.shape[0], right.shape[1], TILE_K, false);
    bool may_split = !tensor_exists(offsets) && !tensor_exists(left_rows) && is_aligned(dw.data, 16);
    int splits = !may_split ? 1 : splits_of(dw.shape[0], dw.shape[1], rows);
    if (turns)
        START(WEIGHT, true, ADD_F32_TRANSPOSED);
    else if (tensor_exists(left_rows))
        START(WEIGHT, true, ADD_F32);
    else if (splits == 1)
        START(WEIGHT, false, ADD_F32);
    else
        start_splits(maps, problem, splits, (float *)dw.data);
    return true;
}
