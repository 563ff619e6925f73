/* What product.cu and product_mma.cu share: C (m,n) = sum over k of A (m,k) B (k,n), tile by tile, operands by their strides. Rows
 * that are gathered are those of m, or, in the product that has the groups along k, those of k. How groups are found is few.cu's,
 * too. */
#pragma once

#include "kernels/cuda/common.cuh"

struct side {
    const void *data;
    const int32_t *index; /* of rows; NULL: none */
    int64_t step, inner;  /* elements from one m or n to the next, from one k to the next */
    int64_t group;        /* from one group's matrix to the next */
    bool index_along_k;
};

struct product {
    struct side a, b;
    void *c;
    int64_t c_m, c_n, c_group; /* strides */
    int64_t m, n, k;           /* of one group; what the groups divide is the whole */
    const int32_t *offsets;
    int groups;
    bool groups_along_k;
    bool accumulate;
    int splits;  /* of k */
    float *part; /* [splits, m, n], where there are several */
};

/* Of bf16 by bf16, in whole eights; false, having done nothing, where they are not made for it. */
bool mma_product(struct product p, enum dtype c);

/* Row begin and end of a block's tile, and its group. */
struct place {
    int64_t group, begin, end;
};

/* Tiles of all groups are numbered one after the other; there are no more than rows / tile + groups of them. By each warp for
 * itself, a lane for a group. */
static __device__ __forceinline__ struct place find_place(const int32_t *offsets, int groups, int64_t tile, int tile_rows) {
    int lane = (int)threadIdx.x % WARP, wanted = (int)tile;
    for (int first = 0; first < groups; first += WARP) {
        bool is_group = first + lane < groups;
        int begin = is_group ? offsets[first + lane] : 0, end = is_group ? offsets[first + lane + 1] : 0;
        int tiles = (end - begin + tile_rows - 1) / tile_rows, all = tiles; /* of the groups up to this one */
        for (int distance = 1; distance < WARP; distance *= 2) {
            int before = __shfl_up_sync(FULL_WARP, all, distance);
            all += lane >= distance ? before : 0;
        }
        unsigned found = __ballot_sync(FULL_WARP, wanted < all);
        if (found) {
            int at = __ffs((int)found) - 1;
            begin = __shfl_sync(FULL_WARP, begin + (wanted - (all - tiles)) * tile_rows, at);
            end = __shfl_sync(FULL_WARP, end, at);
            return {first + at, begin, begin + tile_rows < end ? begin + tile_rows : end};
        }
        wanted -= __shfl_sync(FULL_WARP, all, WARP - 1);
    }
    return {0, 0, 0};
}

enum { SPLITS_MAX = 64, SPLIT_MIN = 512, SPLIT_GRAIN = 32, BUSY_BLOCKS = 264 };

static __device__ __forceinline__ void find_split(const struct product &p, int split, int64_t *begin, int64_t *end) {
    int64_t each = ((p.k + p.splits - 1) / p.splits + SPLIT_GRAIN - 1) / SPLIT_GRAIN * SPLIT_GRAIN;
    *begin = each * split < p.k ? each * split : p.k;
    *end = *begin + each < p.k ? *begin + each : p.k;
}

/* What a block of product_grid has to do: a tile of rows and columns from n on, over k. No rows: nothing. */
struct task {
    struct place rows;
    int64_t n, k, k_end;
    int split;
};

static __device__ __forceinline__ struct task find_task(const struct product &p, int tile_m, int tile_n) {
    struct task task = {{(int64_t)blockIdx.z / p.splits, (int64_t)blockIdx.x * tile_m, p.m},
                        (int64_t)blockIdx.y * tile_n, 0, p.k, (int)blockIdx.z % p.splits};
    if (p.offsets && p.groups_along_k) {
        task.k = p.offsets[task.rows.group];
        task.k_end = p.offsets[task.rows.group + 1];
    } else if (p.offsets) {
        task.rows = find_place(p.offsets, p.groups, blockIdx.x, tile_m);
    }
    if (p.splits > 1)
        find_split(p, task.split, &task.k, &task.k_end);
    return task;
}

/* The grid of a product whose tiles are so large: x along m, y along n, z groups along k, or parts of k where there are few tiles;
 * the parts get scratch. */
static inline dim3 product_grid(struct product *p, int tile_m, int tile_n) {
    bool ragged_rows = p->offsets && !p->groups_along_k;
    int64_t tiles_m = ceil_div(p->m, tile_m) + (ragged_rows ? p->groups : 0), tiles_n = ceil_div(p->n, tile_n);
    p->splits = 1;
    if (!p->offsets && tiles_m * tiles_n < BUSY_BLOCKS && p->k >= 2 * SPLIT_MIN) {
        int64_t most = p->k / SPLIT_MIN < SPLITS_MAX ? p->k / SPLIT_MIN : SPLITS_MAX;
        int64_t wanted = ceil_div(2 * BUSY_BLOCKS, tiles_m * tiles_n);
        p->splits = (int)(wanted < most ? wanted : most);
    }
    if (p->splits > 1)
        p->part = (float *)cuda_scratch((size_t)(p->splits * p->m * p->n) * sizeof(float));
    return dim3((unsigned)tiles_m, (unsigned)tiles_n, (unsigned)((p->groups_along_k ? p->groups : 1) * p->splits));
}

template <typename C> static __global__ void add_splits(const struct product p) {
    int64_t count = p.m * p.n;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x) {
        float sum = 0;
        for (int s = 0; s < p.splits; s++)
            sum += p.part[s * count + i];
        C *c = (C *)p.c + i / p.n * p.c_m + i % p.n * p.c_n;
        store(c, p.accumulate ? to_float(*c) + sum : sum);
    }
}

template <typename C> static inline void product_add_splits(const struct product &p) {
    if (p.splits > 1)
        CUDA_LAUNCH((add_splits<C>), grid_for(p.m * p.n, 256), 256, 0, p);
}
