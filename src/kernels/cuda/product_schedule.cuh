/* Which tiles the products on Hopper's matrix units have (product_sm90.cu), and which cluster of blocks works on which. Nothing
 * here is Hopper's own: it runs on the model of a device, too.
 *
 * P: a problem, of which `offsets` (or NULL: `groups` of `group_rows` rows, the last one to `rows`), `groups` and `m`, rows of a
 * WEIGHT product's result, are read. S: first_row, first_tile, order and turn, as in shared_memory (product_sm90.cuh). */
#pragma once

#include "kernels/cuda/common.cuh"

enum {
    TILE_M = 128,
    TILE_N = 256,
    TILE_K = 64,
    CLUSTER = 2,
    GROUP_THREADS = 128,
    MULTIPLIERS = 2,
    THREADS = (1 + MULTIPLIERS) * GROUP_THREADS,
    GROUPS_MAX = 256,
    BAND_ROWS = 16 * TILE_M, /* that are worked on together, for the second-level cache */
    END_BLOCKS = 5, /* what the end of a WEIGHT tile takes, in blocks of TILE_K rows */
    DEALERS = 4,    /* threads for a cluster */
    CLUSTERS_MAX = THREADS / DEALERS
};

enum form { FORWARD, INPUT, WEIGHT };

/* How the two blocks of a cluster lie in the result: one above the other, with the same columns, or beside each other, with the
 * same rows. */
enum lie { ABOVE, BESIDE };

static __device__ __forceinline__ constexpr int cluster_rows(enum lie lie) {
    return lie == ABOVE ? CLUSTER * TILE_M : TILE_M;
}

/* Of blocks with so many. */
static __device__ __forceinline__ constexpr int cluster_columns(enum lie lie, int columns) {
    return lie == ABOVE ? columns : CLUSTER * columns;
}

struct tile {
    int place;                     /* of its group in the order */
    int group, row_begin, row_end; /* FORWARD, INPUT: rows of A and C. WEIGHT: of the group */
    int m, n;                      /* first row (WEIGHT: of C) and column of this block */
};

static __device__ __forceinline__ int cluster_count(void) {
    return (int)gridDim.x / CLUSTER;
}

/* Groups in the order in which their tiles are worked on. The tiles of a WEIGHT product take as long as their group has rows: long
 * ones first, so that what is left at the end is short. */
template <typename P, typename S> static __device__ void order_groups(const P &p, enum form form, S *s) {
    for (int g = (int)threadIdx.x; g <= p.groups; g += THREADS)
        s->first_row[g] = p.offsets ? p.offsets[g] : g < p.groups ? g * p.group_rows : p.rows;
    __syncthreads();
    for (int g = (int)threadIdx.x; g < p.groups; g += THREADS) {
        int rows = s->first_row[g + 1] - s->first_row[g], place = form == WEIGHT ? 0 : g;
        for (int other = 0; form == WEIGHT && other < p.groups; other++) {
            int others = s->first_row[other + 1] - s->first_row[other];
            place += others > rows || (others == rows && other < g);
        }
        s->order[place] = (uint8_t)g;
    }
    __syncthreads();
}

/* has_empty: groups without rows have a result. */
template <typename P, typename S>
static __device__ void count_tiles(const P &p, enum form form, enum lie lie, bool has_empty, int column_tiles, S *s) {
    order_groups(p, form, s);
    if (threadIdx.x < WARP) {
        int before = 0;
        for (int base = 0; base < p.groups; base += WARP) {
            int i = base + (int)threadIdx.x, tiles = 0;
            if (i < p.groups) {
                int group = s->order[i], rows = s->first_row[group + 1] - s->first_row[group];
                int extent = form != WEIGHT ? rows : rows > 0 || has_empty ? p.m : 0;
                tiles = (extent + cluster_rows(lie) - 1) / cluster_rows(lie) * column_tiles;
            }
            int sum = tiles;
            for (int distance = 1; distance < WARP; distance *= 2) {
                int other = __shfl_up_sync(FULL_WARP, sum, distance);
                sum += (int)threadIdx.x >= distance ? other : 0;
            }
            if (i < p.groups)
                s->first_tile[i] = before + sum - tiles;
            before += __shfl_sync(FULL_WARP, sum, WARP - 1);
        }
        if (threadIdx.x == 0)
            s->first_tile[p.groups] = before;
    }
    __syncthreads();
}

/* Tiles of a WEIGHT product for the clusters: those of a group, which take equally long, in turn for those that have least so far,
 * group after group. `load`, [clusters], is lent. turn[i]: which cluster in that order this one is, for the i-th group. */
template <typename P, typename S> static __device__ void deal_tiles(const P &p, S *s, int *load) {
    int clusters = cluster_count(), mine = (int)blockIdx.x / CLUSTER;
    int cluster = (int)threadIdx.x / DEALERS, part = (int)threadIdx.x % DEALERS;
    for (int i = (int)threadIdx.x; i < clusters; i += THREADS)
        load[i] = 0;
    for (int place = 0; place < p.groups; place++) {
        __syncthreads();
        int group = s->order[place], tiles = s->first_tile[place + 1] - s->first_tile[place], before = 0;
        int blocks = (s->first_row[group + 1] - s->first_row[group] + TILE_K - 1) / TILE_K;
        int own = cluster < clusters ? load[cluster] : 0;
        for (int other = part; other < clusters; other += DEALERS)
            before += load[other] < own || (load[other] == own && other < cluster);
        for (int distance = 1; distance < DEALERS; distance *= 2)
            before += __shfl_xor_sync(FULL_WARP, before, distance);
        __syncthreads();
        if (part > 0 || cluster >= clusters)
            continue;
        load[cluster] = own + (tiles / clusters + (before < tiles % clusters)) * (blocks + END_BLOCKS);
        if (cluster == mine)
            s->turn[place] = (uint8_t)before;
    }
    __syncthreads();
}

/* The first tile of this cluster. Who has none yet is next in the order of clusters, of WEIGHT products, too. */
static __device__ __forceinline__ int first_turn(void) {
    return (int)blockIdx.x / CLUSTER;
}

/* The one after t, whose group is at `place`; at least the number of all tiles where there is none. */
template <int form, typename P, typename S>
static __device__ __forceinline__ int next_turn(const P &p, const S *s, int place, int t) {
    t += cluster_count();
    while (form == WEIGHT && t >= s->first_tile[place + 1]) {
        if (++place == p.groups)
            return s->first_tile[place];
        t = s->first_tile[place] + s->turn[place];
    }
    return t;
}

/* Tile number t; `place` is one at or before that of its group. columns: of a block. */
template <typename P, typename S>
static __device__ __forceinline__ struct tile find_tile(const P &p, enum form form, enum lie lie, int column_tiles, int columns,
                                                        const S *s, int t, int place, int rank) {
    const int rows = cluster_rows(lie), band_tiles = BAND_ROWS / rows;
    while (t >= s->first_tile[place + 1])
        place++;
    int group = s->order[place], within = t - s->first_tile[place];
    int row_begin = s->first_row[group], row_end = s->first_row[group + 1];
    int extent = form == WEIGHT ? p.m : row_end - row_begin;
    int row_tiles = (extent + rows - 1) / rows;
    int band = within / (band_tiles * column_tiles), in_band = within - band * band_tiles * column_tiles;
    int height = row_tiles - band * band_tiles < band_tiles ? row_tiles - band * band_tiles : band_tiles;
    int m = (band * band_tiles + in_band % height) * rows, n = in_band / height * cluster_columns(lie, columns);
    if (lie == ABOVE)
        m += rank * TILE_M;
    else
        n += rank * columns;
    if (form == WEIGHT)
        return {place, group, row_begin, row_end, m, n};
    return {place, group, row_begin + m, row_end, m, n};
}
