/* A stable order of things of few kinds: counted by blocks of neighbouring things, summed up, placed. Three launches:
 *
 *   count   how many things of each kind a block has            count[kind, block]
 *   scan    how many came in the blocks before, for each kind    in place; total[kind]
 *   place   kind's first place + those of blocks, warps and lanes before
 *
 * Things are 0 .. items-1. `Keys` says which kind one is, -1 for those without a place; `Place` takes note of it:
 *   int keys(int64_t item);    void place(int64_t item, int kind, int32_t place);
 */
#pragma once

#include "kernels/cuda/vectors.cuh"

enum { COUNT_WARPS = THREADS / WARP, KINDS_MAX = 2560 }; /* 36 bytes of shared memory each */

struct counting {
    int32_t *count, *total; /* in scratch */
    int64_t items, per_warp;
    int kinds, blocks;
};

/* Without scratch. */
static inline struct counting counting_of(int64_t items, int64_t kinds) {
    CHECK(items <= INT32_MAX && kinds <= KINDS_MAX);
    struct counting c = {NULL, NULL, items, 0, (int)kinds, 0};
    int64_t per_warp = ceil_div(ceil_div(items, (int64_t)COUNT_WARPS * 2048), WARP) * WARP;
    c.per_warp = per_warp > 128 ? per_warp : 128;
    c.blocks = (int)ceil_div(items, COUNT_WARPS * c.per_warp);
    c.blocks += c.blocks == 0;
    return c;
}

static inline size_t round_up_256(size_t bytes) {
    return (bytes + 255) / 256 * 256;
}

static inline size_t counting_bytes(const struct counting *c) {
    return round_up_256((size_t)c->kinds * (size_t)(c->blocks + 1) * sizeof(int32_t));
}

static __device__ __forceinline__ int64_t first_of_warp(const struct counting *c) {
    return ((int64_t)blockIdx.x * COUNT_WARPS + threadIdx.x / WARP) * c->per_warp;
}

/* The lanes that look at things of this lane's kind. */
template <typename Keys>
static __device__ __forceinline__ unsigned lanes_alike(const Keys &keys, const struct counting *c, int64_t item, int *kind) {
    *kind = item < c->items ? keys(item) : -1;
    return __match_any_sync(FULL_WARP, *kind);
}

template <typename Keys> static __global__ void count_kernel(Keys keys, struct counting c) {
    CUDA_SHARED_DYNAMIC(int32_t, count);
    int lane = (int)threadIdx.x % WARP, kind;
    for (int k = (int)threadIdx.x; k < c.kinds; k += THREADS)
        count[k] = 0;
    __syncthreads();
    int64_t first = first_of_warp(&c);
    for (int64_t i = first; i < first + c.per_warp; i += WARP) {
        unsigned alike = lanes_alike(keys, &c, i + lane, &kind);
        if (kind >= 0 && __ffs((int)alike) - 1 == lane)
            atomicAdd(&count[kind], __popc(alike));
    }
    __syncthreads();
    for (int k = (int)threadIdx.x; k < c.kinds; k += THREADS)
        c.count[(int64_t)k * c.blocks + blockIdx.x] = count[k];
}

/* The sum of x of this lane and those before. */
static __device__ __forceinline__ int32_t sum_so_far(int32_t x) {
    int lane = (int)threadIdx.x % WARP;
    for (int distance = 1; distance < WARP; distance *= 2) {
        int32_t other = __shfl_up_sync(FULL_WARP, x, (unsigned)distance);
        x += lane >= distance ? other : 0;
    }
    return x;
}

/* A warp for each kind. */
static __global__ void scan_kernel(struct counting c) {
    int lane = (int)threadIdx.x % WARP, kind = (int)(blockIdx.x * COUNT_WARPS + threadIdx.x / WARP);
    if (kind < c.kinds) {
        int32_t *count = c.count + (int64_t)kind * c.blocks, before = 0;
        for (int b = 0; b < c.blocks; b += WARP) {
            int32_t here = b + lane < c.blocks ? count[b + lane] : 0, sum = sum_so_far(here);
            if (b + lane < c.blocks)
                count[b + lane] = before + sum - here;
            before += __shfl_sync(FULL_WARP, sum, WARP - 1);
        }
        if (lane == 0)
            c.total[kind] = before;
    }
}

/* start[kind] = things of the kinds before; returns how many there are in all. */
static __device__ int32_t start_of_kinds(const struct counting *c, int32_t *start) {
    CUDA_SHARED int32_t part[COUNT_WARPS];
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    int each = (c->kinds + THREADS - 1) / THREADS, first = (int)threadIdx.x * each;
    int32_t here = 0;
    for (int k = first; k < first + each && k < c->kinds; k++)
        here += c->total[k];
    int32_t sum = sum_so_far(here), before = sum - here, all = 0;
    if (lane == WARP - 1)
        part[warp] = sum;
    __syncthreads();
    for (int w = 0; w < COUNT_WARPS; w++) {
        before += w < warp ? part[w] : 0;
        all += part[w];
    }
    for (int k = first; k < first + each && k < c->kinds; k++) {
        start[k] = before;
        before += c->total[k];
    }
    __syncthreads();
    return all;
}

/* next[warp, kind]: the place of the warp's first thing of a kind. */
template <typename Keys>
static __device__ void first_places(const Keys &keys, const struct counting *c, const int32_t *start, int32_t *next) {
    int lane = (int)threadIdx.x % WARP, kind;
    int32_t *own = next + threadIdx.x / WARP * c->kinds;
    for (int k = (int)threadIdx.x; k < COUNT_WARPS * c->kinds; k += THREADS)
        next[k] = 0;
    __syncthreads();
    int64_t first = first_of_warp(c);
    for (int64_t i = first; i < first + c->per_warp; i += WARP) {
        unsigned alike = lanes_alike(keys, c, i + lane, &kind);
        if (kind >= 0 && __ffs((int)alike) - 1 == lane)
            own[kind] += __popc(alike);
        __syncwarp();
    }
    __syncthreads();
    for (int k = (int)threadIdx.x; k < c->kinds; k += THREADS) {
        int32_t place = start[k] + c->count[(int64_t)k * c->blocks + blockIdx.x];
        for (int w = 0; w < COUNT_WARPS; w++) {
            int32_t here = next[w * c->kinds + k];
            next[w * c->kinds + k] = place;
            place += here;
        }
    }
    __syncthreads();
}

/* first [kinds+1] and count [kinds], for who asks for them: the first place of each kind, how many it has. */
template <typename Keys, typename Place>
static __global__ void place_kernel(Keys keys, Place place, struct counting c, int32_t *first, int32_t *count) {
    CUDA_SHARED_DYNAMIC(int32_t, start);
    int32_t *next = start + c.kinds, *own = next + threadIdx.x / WARP * c.kinds;
    int lane = (int)threadIdx.x % WARP, kind;
    int32_t all = start_of_kinds(&c, start);
    if (blockIdx.x == 0) {
        for (int k = (int)threadIdx.x; k < c.kinds; k += THREADS) {
            if (first)
                first[k] = start[k];
            if (count)
                count[k] = c.total[k];
        }
        if (first && threadIdx.x == 0)
            first[c.kinds] = all;
    }
    first_places(keys, &c, start, next);
    int64_t begin = first_of_warp(&c);
    for (int64_t i = begin; i < begin + c.per_warp; i += WARP) {
        unsigned alike = lanes_alike(keys, &c, i + lane, &kind);
        int32_t at = kind >= 0 ? own[kind] + __popc(alike & ((1u << lane) - 1)) : 0;
        __syncwarp();
        if (kind >= 0 && __ffs((int)alike) - 1 == lane)
            own[kind] += __popc(alike);
        __syncwarp();
        if (kind >= 0)
            place(i + lane, kind, at);
    }
}

/* `c` in scratch of counting_bytes. */
template <typename Keys, typename Place>
static void count_and_place(Keys keys, Place place, struct counting c, void *scratch, int32_t *first, int32_t *count) {
    c.count = (int32_t *)scratch;
    c.total = c.count + (int64_t)c.kinds * c.blocks;
    size_t row = (size_t)c.kinds * sizeof(int32_t);
    CUDA_LAUNCH((count_kernel<Keys>), (unsigned)c.blocks, THREADS, row, keys, c);
    if (c.kinds)
        CUDA_LAUNCH(scan_kernel, (unsigned)ceil_div(c.kinds, COUNT_WARPS), THREADS, 0, c);
    CUDA_LAUNCH((place_kernel<Keys, Place>), (unsigned)c.blocks, THREADS, row * (1 + COUNT_WARPS), keys, place, c, first, count);
}
