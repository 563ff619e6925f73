/* Causal attention of bf16 on Hopper's matrix units, for heads of up to 128 elements and as many queries as keys.
 *
 * Kernels of one build: forward; the gradients of keys and values; the gradient of queries. In a block one thread brings tiles
 * by the copy engine, two groups of four warps multiply: 64 queries each, of one head, or 64 keys each, of one key-value head
 * (dk, dv). Blocks stay as long as there are items and take the next one by counting: which block has an item changes nothing,
 * as an item's results are the work of one warp group in an order that the shape gives.
 *
 * No sums of queries meet those of keys. The kernel of dk and dv writes the gradients of scores, rounded as it multiplies them
 * itself, to memory, for some key-value heads at a time, and dq is their product with the keys (sum_queries): five products
 * in all. Of sequences so long that this memory is too much they are made again (backward_queries): seven.
 *
 * Scores come out of the matrix units in registers and go back, rounded, from registers: where rows are queries as left operand
 * of the sums over keys, where rows are keys (scores transposed) of the sums over queries. No product waits for shared memory
 * to be written.
 *
 * A tile in shared memory is boxes of 64 columns, a box its rows of 128 bytes, whose 16-byte chunks are swapped by row % 8.
 * Rows beyond a sequence and columns beyond a head come as zeros. */
#include "kernels/cuda/attention.cuh"

#include "kernels/cuda/hopper_attention.cuh"
#include "kernels/cuda/tensor_map.cuh"

enum {
    GROUP_THREADS = 128,
    GROUPS = 2, /* that multiply */
    THREADS = (1 + GROUPS) * GROUP_THREADS,
    GROUP_ROWS = 64,
    ROWS = GROUPS * GROUP_ROWS, /* of the tiles that a block holds, and of those it goes along in forward and dq */
    STAGES = 2,
    STEP = 64, /* queries of the tiles that dk and dv go along */
    STEP_STAGES = 4,
    RELEASES = GROUPS * GROUP_THREADS / WARP, /* a tile is free when each warp has said so */
    CACHE_BYTES = 24 << 20, /* of the second-level cache, for what is read again and again */
};

/* Of gradients of scores between two kernels, at most. Where not even those of one key-value head fit, or built with 0, they are
 * made again. */
#if !defined(KEPT_BYTES) && defined(CADRE_CUDA_MODEL)
#define KEPT_BYTES (1ll << 19) /* tests go all ways: all at a time, some, none */
#elif !defined(KEPT_BYTES)
#define KEPT_BYTES (9ll << 27)
#endif

/* Of a thread, once a block has divided what its 384 threads began with. */
enum { BRINGER_REGISTERS = 24, MULTIPLIER_REGISTERS = 240 };

/* Which items there are, and in what order: some key-value heads at a time, of these the long rows of tiles first. */
struct items {
    int count, tiles; /* in a sequence */
    int pairs, span;  /* sequences times key-value heads; how many at a time */
    int per_pair;     /* heads, where items are of single heads */
    int first_pair;
};

struct item {
    int batch, kv_head, head; /* head: the first, where the item has all of the group */
    int rank;                 /* 0: the longest row of tiles */
    int place;                /* of the head among those of all items */
};

/* Both 0 between kernels. */
static __device__ int items_taken, blocks_done;

#ifdef CUDA_IS_SM90

/* ---- items ------------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ struct item find_item(const tile_job &job, const struct items &items, int number) {
    int together = items.span * items.per_pair * items.tiles, part = number / together, in_part = number - part * together;
    int pairs = min(items.pairs - part * items.span, items.span), row = pairs * items.per_pair;
    int rank = in_part / row, in_row = in_part - rank * row, pair = part * items.span + in_row / items.per_pair;
    int all = items.first_pair + pair, batch = all / job.kv_heads, kv_head = all - batch * job.kv_heads;
    return {batch, kv_head, kv_head * job.group + in_row % items.per_pair, rank, pair * job.group + in_row % items.per_pair};
}

static __device__ __forceinline__ int take_item(void) {
    return (int)gridDim.x + atomicAdd(&items_taken, 1);
}

static __device__ __forceinline__ void take_no_more(void) {
    __threadfence();
    if (atomicAdd(&blocks_done, 1) == (int)gridDim.x - 1)
        items_taken = blocks_done = 0;
}

/* ---- tiles ------------------------------------------------------------------------------------------------------- */

template <int dim, int rows>
static __device__ __forceinline__ void bring_tile(unsigned char *to, const tensor_map *map, uint64_t *full, int batch, int row,
                                                  int head) {
#pragma unroll
    for (int i = 0; i < dim / 64; i++)
        load_box_4d(to + i * rows * 128, map, full, 64 * i, head, row, batch);
}

/* s [64, columns] = 64 rows of a tile of rows_a from `a` on, times the rows of one of rows_b. */
template <int dim, int rows_a, int rows_b, int numbers>
static __device__ __forceinline__ void multiply_rows(float (&s)[numbers], uint32_t a, uint32_t b) {
#pragma unroll
    for (int k = 0; k < dim / 16; k++)
        multiply_shared(s, matrix_at(a, k / 4 * rows_a * 128 + k % 4 * 32, 16, 1024),
                        matrix_at(b, k / 4 * rows_b * 128 + k % 4 * 32, 16, 1024), k > 0);
}

/* sum [64, dim] += weights [64, rows] times a tile of so many rows. */
template <int rows, int numbers>
static __device__ __forceinline__ void multiply_weights(float (&sum)[numbers], const uint32_t (&w)[rows / 4], uint32_t b) {
#pragma unroll
    for (int k = 0; k < rows / 16; k++)
        multiply_registers(sum, w + 4 * k, matrix_at(b, k * 16 * 128, rows * 128, 1024));
}

template <int numbers> static __device__ __forceinline__ void round_weights(uint32_t (&w)[numbers / 2], const float (&s)[numbers]) {
#pragma unroll
    for (int i = 0; i < numbers / 2; i++)
        w[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
}

template <int numbers> static __device__ __forceinline__ void clear(float (&sum)[numbers]) {
#pragma unroll
    for (int i = 0; i < numbers; i++)
        sum[i] = 0;
}

/* Number i of a thread is of row + 8 (i / 2 % 2) and column + 8 (i / 4) + i % 2 of its group's, these: */
static __device__ __forceinline__ int first_row(void) {
    return (int)threadIdx.x % GROUP_THREADS / WARP * 16 + (int)threadIdx.x % WARP / 4;
}

static __device__ __forceinline__ int first_column(void) {
    return (int)threadIdx.x % 4 * 2;
}

/* Hides what is not seen, that is columns where column > row + ahead; of scores transposed, where row > column. */
template <int numbers> static __device__ __forceinline__ void hide_columns(float (&s)[numbers], int ahead) {
    int distance = first_row() + ahead - first_column();
#pragma unroll
    for (int i = 0; i < numbers; i++)
        if (i / 4 * 8 + i % 2 - i / 2 % 2 * 8 > distance)
            s[i] = -INFINITY;
}

template <int numbers> static __device__ __forceinline__ void hide_rows(float (&s)[numbers]) {
    int distance = first_row() - first_column();
#pragma unroll
    for (int i = 0; i < numbers; i++)
        if (i / 4 * 8 + i % 2 - i / 2 % 2 * 8 < distance)
            s[i] = -INFINITY;
}

static __device__ __forceinline__ void release(uint64_t *empty) {
    __syncwarp();
    if (threadIdx.x % WARP == 0)
        barrier_arrive(empty);
}

/* Of four times 8 columns of a row, of which a lane has two of each, to the 8 of one of them. */
static __device__ __forceinline__ void gather_eight(uint32_t p[4]) {
    int lane = (int)threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        uint32_t received = __shfl_xor_sync(FULL_WARP, lane & 1 ? p[i] : p[i + 1], 1);
        p[i] = lane & 1 ? received : p[i];
        p[i + 1] = lane & 1 ? p[i + 1] : received;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t received = __shfl_xor_sync(FULL_WARP, lane & 2 ? p[i] : p[i + 2], 2);
        p[i] = lane & 2 ? received : p[i];
        p[i + 2] = lane & 2 ? p[i + 2] : received;
    }
}

/* Sums times the factors of their rows, to the rows from `to` on of which `valid` exist. */
template <int numbers>
static __device__ __forceinline__ void store_rows(const float (&sum)[numbers], float factor0, float factor1, bf16 *to,
                                                  int64_t stride, int valid, int head_dim) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = first_row() + 8 * half;
        float factor = half ? factor1 : factor0;
#pragma unroll
        for (int q = 0; q < numbers / 16; q++) {
            uint32_t pair[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                pair[i] = pack_bf16(sum[16 * q + 4 * i + 2 * half] * factor, sum[16 * q + 4 * i + 2 * half + 1] * factor);
            gather_eight(pair);
            int column = 32 * q + (int)threadIdx.x % 4 * 8;
            if (row < valid && column < head_dim)
                *(uint4 *)(to + row * stride + column) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
        }
    }
}

static __device__ __forceinline__ int64_t query_place(const tile_job &job, const struct item &item, int row) {
    return (((int64_t)item.batch * job.query_count + row) * job.heads + item.head) * job.head_dim;
}

static __device__ __forceinline__ int64_t key_place(const tile_job &job, const struct item &item, int row) {
    return (((int64_t)item.batch * job.key_count + row) * job.kv_heads + item.kv_head) * job.head_dim;
}

#endif

/* ---- forward ----------------------------------------------------------------------------------------------------- */

struct forward_maps {
    tensor_map q, k, v;
};

template <int dim> struct forward_shared {
    unsigned char q[2][ROWS * dim * 2], k[STAGES][ROWS * dim * 2], v[STAGES][ROWS * dim * 2];
    uint64_t q_full[2], q_empty[2], k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    int item[2];
};

#ifdef CUDA_IS_SM90

/* One thread. Tiles of keys come from the diagonal on backwards. */
template <int dim>
static __device__ __forceinline__ void forward_bring(const struct forward_maps &maps, const tile_job &job,
                                                     const struct items &items, struct forward_shared<dim> *s) {
    const uint32_t bytes = ROWS * dim * 2;
    int next = (int)blockIdx.x, step = 0;
    for (int turn = 0;; turn++) {
        int at = turn & 1, number = next;
        await(&s->q_empty[at], (turn >> 1 & 1) ^ 1);
        s->item[at] = number < items.count ? number : -1;
        if (number >= items.count) {
            barrier_arrive(&s->q_full[at]);
            break;
        }
        next = take_item();
        struct item item = find_item(job, items, number);
        int tile = items.tiles - 1 - item.rank;
        barrier_arrive_expecting(&s->q_full[at], bytes);
        bring_tile<dim, ROWS>(s->q[at], &maps.q, &s->q_full[at], item.batch, tile * ROWS, item.head);
#pragma unroll 1
        for (int key = tile; key >= 0; key--, step++) {
            int stage = step % STAGES;
            uint32_t parity = (step / STAGES & 1) ^ 1;
            await(&s->k_empty[stage], parity);
            barrier_arrive_expecting(&s->k_full[stage], bytes);
            bring_tile<dim, ROWS>(s->k[stage], &maps.k, &s->k_full[stage], item.batch, key * ROWS, item.kv_head);
            await(&s->v_empty[stage], parity);
            barrier_arrive_expecting(&s->v_full[stage], bytes);
            bring_tile<dim, ROWS>(s->v[stage], &maps.v, &s->v_full[stage], item.batch, key * ROWS, item.kv_head);
        }
    }
    take_no_more();
}

/* Running maximum (scaled) and sum of the weights of a thread's two rows; the sum is of its columns only. */
struct softmax {
    float most[2], weight[2];
};

/* What stands behind this stays behind: the translator moves a wait for products up over all that does not need them, which they
 * were to hide, but not over a loop. The barrier's phase is one that was waited for, of a stage that is still held. */
static __device__ __forceinline__ void stay_behind(uint64_t *barrier, uint32_t parity) {
    await(barrier, parity);
}

/* Scores, as they came, to weights; fall: what sums so far are worth now. */
static __device__ __forceinline__ void soften(float (&s)[64], float scale, struct softmax *rows, float fall[2]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float top = fmaxf(s[2 * h], s[2 * h + 1]), added = 0;
#pragma unroll
        for (int i = 1; i < 16; i++)
            top = fmaxf(top, fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]));
        top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
        top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
        top = fmaxf(rows->most[h], top * scale);
        fall[h] = power_of_2(rows->most[h] - top);
        rows->most[h] = top;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            s[4 * i + 2 * h] = power_of_2(fmaf(s[4 * i + 2 * h], scale, -top));
            s[4 * i + 2 * h + 1] = power_of_2(fmaf(s[4 * i + 2 * h + 1], scale, -top));
            added += s[4 * i + 2 * h] + s[4 * i + 2 * h + 1];
        }
        rows->weight[h] = rows->weight[h] * fall[h] + added;
    }
}

/* 64 queries of an item whose Q lies at `q`. Scores of the next keys are on their way before this one's weights are multiplied;
 * the two groups take turns, so that one has products running while the other one softens. `step`: of the ring. */
template <int dim>
static __device__ __forceinline__ void forward_item(const tile_job &job, const struct item &item, int tile, int group, uint32_t q,
                                                    uint64_t *q_empty, struct forward_shared<dim> *s, int *ring) {
    float scores[64], sum[dim / 2], fall[2];
    uint32_t weights[32];
    struct softmax rows = {{-INFINITY, -INFINITY}, {0, 0}};
    int step = *ring, end = step + tile;
    q += group * GROUP_ROWS * 128;
    clear(sum);
    await(&s->k_full[step % STAGES], step / STAGES & 1);
    matrices_begin();
    multiply_rows<dim, ROWS, ROWS>(scores, q, shared_address(s->k[step % STAGES]));
    matrices_commit();
    matrices_wait<0>();
    pin<64>(scores);
    release(&s->k_empty[step % STAGES]);
    hide_columns(scores, group * GROUP_ROWS);
    soften(scores, job.scale_log2, &rows, fall);
    round_weights(weights, scores);
    for (; step < end; step++) { /* weights are of this step, scores of the next */
        int stage = step % STAGES, next = (step + 1) % STAGES;
        await(&s->k_full[next], (step + 1) / STAGES & 1);
        turn_wait(1 + group);
        pin<64>(scores);
        pin<dim / 2>(sum);
        matrices_begin();
        multiply_rows<dim, ROWS, ROWS>(scores, q, shared_address(s->k[next]));
        matrices_commit();
        await(&s->v_full[stage], step / STAGES & 1);
        matrices_begin();
        multiply_weights<ROWS>(sum, weights, shared_address(s->v[stage]));
        matrices_commit();
        turn_give(2 - group);
        matrices_wait<1>();
        pin<64>(scores);
        release(&s->k_empty[next]);
        soften(scores, job.scale_log2, &rows, fall);
        stay_behind(&s->v_full[stage], step / STAGES & 1);
        matrices_wait<0>();
        pin<dim / 2>(sum);
        release(&s->v_empty[stage]);
#pragma unroll
        for (int i = 0; i < dim / 2; i++)
            sum[i] *= fall[i / 2 % 2];
        round_weights(weights, scores);
    }
    release(q_empty);
    await(&s->v_full[step % STAGES], step / STAGES & 1);
    pin<dim / 2>(sum);
    matrices_begin();
    multiply_weights<ROWS>(sum, weights, shared_address(s->v[step % STAGES]));
    matrices_commit();
    float factor[2];
    int first = tile * ROWS + group * GROUP_ROWS, valid = job.query_count - first;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float all = rows.weight[h] + __shfl_xor_sync(FULL_WARP, rows.weight[h], 1);
        all += __shfl_xor_sync(FULL_WARP, all, 2);
        factor[h] = 1 / all;
        int row = first_row() + 8 * h;
        if (threadIdx.x % 4 == 0 && row < valid)
            job.logsumexp[((int64_t)item.batch * job.query_count + first + row) * job.heads + item.head] =
                (rows.most[h] + log2f(all)) * (float)LN_2;
    }
    matrices_wait<0>();
    pin<dim / 2>(sum);
    release(&s->v_empty[step % STAGES]);
    store_rows(sum, factor[0], factor[1], job.to + query_place(job, item, first), (int64_t)job.heads * job.head_dim, valid,
               job.head_dim);
    *ring = step + 1;
}

template <int dim>
static __device__ __forceinline__ void forward_multiply(const tile_job &job, const struct items &items,
                                                        struct forward_shared<dim> *s, int group) {
    int step = 0;
    if (group == 1)
        turn_give(1);
    for (int turn = 0;; turn++) {
        int at = turn & 1;
        await(&s->q_full[at], turn >> 1 & 1);
        int number = s->item[at];
        if (number < 0)
            break;
        struct item item = find_item(job, items, number);
        forward_item<dim>(job, item, items.tiles - 1 - item.rank, group, shared_address(s->q[at]), &s->q_empty[at], s, &step);
    }
}

#endif

template <int dim>
static __global__ void __launch_bounds__(THREADS, 1)
    forward(const __grid_constant__ struct forward_maps maps, const __grid_constant__ tile_job job,
            const __grid_constant__ struct items items) {
#ifdef CUDA_IS_SM90
    CUDA_SHARED_DYNAMIC(struct forward_shared<dim>, s);
    int role = __shfl_sync(FULL_WARP, (int)threadIdx.x / GROUP_THREADS, 0);
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            barrier_init(&s->q_full[i], 1);
            barrier_init(&s->q_empty[i], RELEASES);
        }
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&s->k_full[i], 1);
            barrier_init(&s->v_full[i], 1);
            barrier_init(&s->k_empty[i], RELEASES);
            barrier_init(&s->v_empty[i], RELEASES);
        }
        barriers_are_initialized();
    }
    __syncthreads();
    if (role == 0) {
        registers_keep<BRINGER_REGISTERS>();
        if (threadIdx.x == 0)
            forward_bring<dim>(maps, job, items, s);
    } else {
        registers_get<MULTIPLIER_REGISTERS>();
        forward_multiply<dim>(job, items, s, role - 1);
    }
#endif
}

/* ---- backward: keys and values ----------------------------------------------------------------------------------- */

struct backward_maps {
    tensor_map q, dout, k, v;
};

template <int dim> struct dkv_shared {
    unsigned char k[ROWS * dim * 2], v[ROWS * dim * 2], q[STEP_STAGES][STEP * dim * 2], dout[STEP_STAGES][STEP * dim * 2];
    float lse[STEP_STAGES][STEP], delta[STEP_STAGES][STEP];
    uint64_t held_full, held_empty, full[STEP_STAGES], empty[STEP_STAGES];
    int item;
};

#ifdef CUDA_IS_SM90

/* One thread: for each item the keys and values, then the queries of all heads of the group from the diagonal on. */
template <int dim>
static __device__ __forceinline__ void dkv_bring(const struct backward_maps &maps, const tile_job &job, const struct items &items,
                                                 struct dkv_shared<dim> *s) {
    int next = (int)blockIdx.x, step = 0;
    for (int turn = 0;; turn++) {
        int number = next;
        await(&s->held_empty, (turn & 1) ^ 1);
        s->item = number < items.count ? number : -1;
        if (number >= items.count) {
            barrier_arrive(&s->held_full);
            break;
        }
        next = take_item();
        struct item item = find_item(job, items, number);
        barrier_arrive_expecting(&s->held_full, 2 * ROWS * dim * 2);
        bring_tile<dim, ROWS>(s->k, &maps.k, &s->held_full, item.batch, item.rank * ROWS, item.kv_head);
        bring_tile<dim, ROWS>(s->v, &maps.v, &s->held_full, item.batch, item.rank * ROWS, item.kv_head);
        int head = item.head, query = item.rank * ROWS;
#pragma unroll 1
        while (head < item.head + job.group) {
            int stage = step % STEP_STAGES;
            int64_t row = ((int64_t)item.batch * job.heads + head) * job.row_sum_stride + query;
            await(&s->empty[stage], (step / STEP_STAGES & 1) ^ 1);
            barrier_arrive_expecting(&s->full[stage], 2 * STEP * dim * 2 + 2 * STEP * 4);
            bring_tile<dim, STEP>(s->q[stage], &maps.q, &s->full[stage], item.batch, query, head);
            load_bytes(s->lse[stage], job.row_lse + row, &s->full[stage], STEP * 4);
            bring_tile<dim, STEP>(s->dout[stage], &maps.dout, &s->full[stage], item.batch, query, head);
            load_bytes(s->delta[stage], job.row_delta + row, &s->full[stage], STEP * 4);
            step++;
            query += STEP;
            if (query >= job.query_count) {
                query = item.rank * ROWS;
                head++;
            }
        }
    }
    take_no_more();
}

/* Scores transposed, as they came, to weights; rows of `lse` are columns here. */
static __device__ __forceinline__ void weigh_transposed(float (&s)[STEP / 2], float scale, const float *lse) {
#pragma unroll
    for (int i = 0; i < STEP / 8; i++) {
        float2 pair = *(const float2 *)(lse + i * 8 + first_column());
        s[4 * i] = power_of_2(fmaf(s[4 * i], scale, -pair.x));
        s[4 * i + 1] = power_of_2(fmaf(s[4 * i + 1], scale, -pair.y));
        s[4 * i + 2] = power_of_2(fmaf(s[4 * i + 2], scale, -pair.x));
        s[4 * i + 3] = power_of_2(fmaf(s[4 * i + 3], scale, -pair.y));
    }
}

/* Gradients of weights to those of scores. */
static __device__ __forceinline__ void to_scores_transposed(float (&d)[STEP / 2], const float (&weight)[STEP / 2],
                                                            const float *delta) {
#pragma unroll
    for (int i = 0; i < STEP / 8; i++) {
        float2 pair = *(const float2 *)(delta + i * 8 + first_column());
        d[4 * i] = weight[4 * i] * (d[4 * i] - pair.x);
        d[4 * i + 1] = weight[4 * i + 1] * (d[4 * i + 1] - pair.y);
        d[4 * i + 2] = weight[4 * i + 2] * (d[4 * i + 2] - pair.x);
        d[4 * i + 3] = weight[4 * i + 3] * (d[4 * i + 3] - pair.y);
    }
}

/* Where gradients of scores are kept: of each head, for every 64 queries the 64 numbers of each key that they see. */
static __device__ __forceinline__ int kept_row(const tile_job &job, int place, int block) {
    int blocks = (job.query_count + STEP - 1) / STEP;
    return (place * (blocks * (blocks + 1) / 2) + block * (block + 1) / 2) * STEP;
}

static __device__ __forceinline__ void keep_gradients(const uint32_t (&w)[STEP / 4], bf16 *to) {
    to += first_row() * STEP + (int)threadIdx.x % 4 * 8;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int q = 0; q < STEP / 32; q++) {
            uint32_t pair[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                pair[i] = w[2 * (4 * q + i) + half];
            gather_eight(pair);
            __stcs((uint4 *)(to + half * 8 * STEP + q * 32), make_uint4(pair[0], pair[1], pair[2], pair[3]));
        }
}

/* What 64 queries add to the gradients of 64 keys. The products for dk are left on their way; those of the step before are
 * done when the first ones here are, and its tile is given back: `before`, or NULL. */
template <int dim, bool keeps>
static __device__ __forceinline__ void dkv_step(float scale, uint32_t k, uint32_t v, struct dkv_shared<dim> *s, int stage,
                                                bool is_diagonal, uint64_t *before, bf16 *kept, float (&dk)[dim / 2],
                                                float (&dv)[dim / 2]) {
    float scores[STEP / 2], d[STEP / 2];
    uint32_t weights[STEP / 4], gradients[STEP / 4];
    uint32_t q = shared_address(s->q[stage]), dout = shared_address(s->dout[stage]);
    pin<dim / 2>(dk);
    pin<dim / 2>(dv);
    matrices_begin();
    multiply_rows<dim, ROWS, STEP>(scores, k, q);
    matrices_commit();
    matrices_wait<0>();
    pin<STEP / 2>(scores);
    pin<dim / 2>(dk);
    if (before)
        release(before);
    matrices_begin();
    multiply_rows<dim, ROWS, STEP>(d, v, dout);
    matrices_commit();
    if (is_diagonal)
        hide_rows(scores);
    weigh_transposed(scores, scale, s->lse[stage]);
    round_weights(weights, scores);
    matrices_begin();
    multiply_weights<STEP>(dv, weights, dout);
    matrices_commit();
    matrices_wait<1>();
    pin<STEP / 2>(d);
    to_scores_transposed(d, scores, s->delta[stage]);
    round_weights(gradients, d);
    if (keeps)
        keep_gradients(gradients, kept);
    matrices_begin();
    multiply_weights<STEP>(dk, gradients, q);
    matrices_commit();
}

template <int dim, bool keeps>
static __device__ __forceinline__ void dkv_multiply(const tile_job &job, const struct items &items, struct dkv_shared<dim> *s,
                                                    int group) {
    int step = 0;
    uint32_t k = shared_address(s->k) + group * GROUP_ROWS * 128, v = shared_address(s->v) + group * GROUP_ROWS * 128;
    for (int turn = 0;; turn++) {
        await(&s->held_full, turn & 1);
        int number = s->item;
        if (number < 0)
            break;
        struct item item = find_item(job, items, number);
        int first = item.rank * ROWS, steps = (job.query_count - first + STEP - 1) / STEP, in_head = 0, place = item.place;
        float dk[dim / 2], dv[dim / 2];
        uint64_t *before = NULL;
        clear(dk);
        clear(dv);
#pragma unroll 1
        for (int end = step + steps * job.group; step < end; step++) {
            int stage = step % STEP_STAGES, ahead = in_head * STEP - group * GROUP_ROWS;
            bf16 *kept = NULL;
            if (keeps)
                kept = job.kept + ((int64_t)kept_row(job, place, first / STEP + in_head) + first + group * GROUP_ROWS) * STEP;
            if (++in_head == steps) {
                in_head = 0;
                place++;
            }
            await(&s->full[stage], step / STEP_STAGES & 1);
            if (ahead < 0) { /* none of these queries sees a key of this group */
                release(&s->empty[stage]);
                continue;
            }
            dkv_step<dim, keeps>(job.scale_log2, k, v, s, stage, ahead == 0, before, kept, dk, dv);
            before = &s->empty[stage];
        }
        release(&s->held_empty);
        matrices_wait<0>();
        pin<dim / 2>(dk);
        pin<dim / 2>(dv);
        if (before)
            release(before);
        int64_t to = key_place(job, item, first + group * GROUP_ROWS), stride = (int64_t)job.kv_heads * job.head_dim;
        int valid = job.key_count - first - group * GROUP_ROWS;
        store_rows(dk, job.scale, job.scale, job.dk + to, stride, valid, job.head_dim);
        store_rows(dv, 1, 1, job.dv + to, stride, valid, job.head_dim);
    }
}

#endif

template <int dim, bool keeps>
static __global__ void __launch_bounds__(THREADS, 1)
    backward_keys(const __grid_constant__ struct backward_maps maps, const __grid_constant__ tile_job job,
                  const __grid_constant__ struct items items) {
#ifdef CUDA_IS_SM90
    CUDA_SHARED_DYNAMIC(struct dkv_shared<dim>, s);
    int role = __shfl_sync(FULL_WARP, (int)threadIdx.x / GROUP_THREADS, 0);
    if (threadIdx.x == 0) {
        barrier_init(&s->held_full, 1);
        barrier_init(&s->held_empty, RELEASES);
        for (int i = 0; i < STEP_STAGES; i++) {
            barrier_init(&s->full[i], 1);
            barrier_init(&s->empty[i], RELEASES);
        }
        barriers_are_initialized();
    }
    __syncthreads();
    if (role == 0) {
        registers_keep<BRINGER_REGISTERS>();
        if (threadIdx.x == 0)
            dkv_bring<dim>(maps, job, items, s);
    } else {
        registers_get<MULTIPLIER_REGISTERS>();
        dkv_multiply<dim, keeps>(job, items, s, role - 1);
    }
#endif
}

/* ---- backward: queries ------------------------------------------------------------------------------------------- */

template <int dim> struct dq_shared {
    unsigned char q[ROWS * dim * 2], dout[ROWS * dim * 2], k[STAGES][ROWS * dim * 2], v[STAGES][ROWS * dim * 2];
    uint64_t held_full, held_empty, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    int item;
};

#ifdef CUDA_IS_SM90

template <int dim>
static __device__ __forceinline__ void dq_bring(const struct backward_maps &maps, const tile_job &job, const struct items &items,
                                                struct dq_shared<dim> *s) {
    const uint32_t bytes = ROWS * dim * 2;
    int next = (int)blockIdx.x, step = 0;
    for (int turn = 0;; turn++) {
        int number = next;
        await(&s->held_empty, (turn & 1) ^ 1);
        s->item = number < items.count ? number : -1;
        if (number >= items.count) {
            barrier_arrive(&s->held_full);
            break;
        }
        next = take_item();
        struct item item = find_item(job, items, number);
        int tile = items.tiles - 1 - item.rank;
        barrier_arrive_expecting(&s->held_full, 2 * bytes);
        bring_tile<dim, ROWS>(s->q, &maps.q, &s->held_full, item.batch, tile * ROWS, item.head);
        bring_tile<dim, ROWS>(s->dout, &maps.dout, &s->held_full, item.batch, tile * ROWS, item.head);
#pragma unroll 1
        for (int key = tile; key >= 0; key--, step++) {
            int stage = step % STAGES;
            uint32_t parity = (step / STAGES & 1) ^ 1;
            await(&s->k_empty[stage], parity);
            barrier_arrive_expecting(&s->k_full[stage], bytes);
            bring_tile<dim, ROWS>(s->k[stage], &maps.k, &s->k_full[stage], item.batch, key * ROWS, item.kv_head);
            await(&s->v_empty[stage], parity);
            barrier_arrive_expecting(&s->v_full[stage], bytes);
            bring_tile<dim, ROWS>(s->v[stage], &maps.v, &s->v_full[stage], item.batch, key * ROWS, item.kv_head);
        }
    }
    take_no_more();
}

/* 64 queries of an item, as forward's, but each tile of keys for itself: sums and scores of two kinds are all that registers
 * hold. The other group has products running meanwhile. */
template <int dim>
static __device__ __forceinline__ void dq_item(const tile_job &job, const struct item &item, int tile, int group,
                                               struct dq_shared<dim> *s, int *ring) {
    float sum[dim / 2], lse[2], delta[2];
    uint32_t q = shared_address(s->q) + group * GROUP_ROWS * 128, dout = shared_address(s->dout) + group * GROUP_ROWS * 128;
    int first = tile * ROWS + group * GROUP_ROWS, valid = job.query_count - first, begin = *ring, end = begin + tile + 1;
    int64_t rows = ((int64_t)item.batch * job.heads + item.head) * job.row_sum_stride + first;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int row = first_row() + 8 * h;
        lse[h] = row < valid ? job.row_lse[rows + row] : INFINITY;
        delta[h] = row < valid ? job.row_delta[rows + row] : 0;
    }
    clear(sum);
#pragma unroll 1
    for (int step = begin; step < end; step++) {
        int stage = step % STAGES;
        uint32_t parity = step / STAGES & 1, weights[32];
        float scores[64], d[64];
        await(&s->k_full[stage], parity);
        pin<dim / 2>(sum);
        matrices_begin();
        multiply_rows<dim, ROWS, ROWS>(scores, q, shared_address(s->k[stage]));
        matrices_commit();
        matrices_wait<0>();
        pin<64>(scores);
        pin<dim / 2>(sum);
        if (step > begin)
            release(&s->k_empty[(step - 1) % STAGES]);
        await(&s->v_full[stage], parity);
        matrices_begin();
        multiply_rows<dim, ROWS, ROWS>(d, dout, shared_address(s->v[stage]));
        matrices_commit();
        if (step == begin)
            hide_columns(scores, group * GROUP_ROWS);
#pragma unroll
        for (int i = 0; i < 64; i++)
            scores[i] = power_of_2(fmaf(scores[i], job.scale_log2, -lse[i / 2 % 2]));
        stay_behind(&s->v_full[stage], parity);
        matrices_wait<0>();
        pin<64>(d);
        release(&s->v_empty[stage]);
#pragma unroll
        for (int i = 0; i < 64; i++)
            d[i] = scores[i] * (d[i] - delta[i / 2 % 2]);
        round_weights(weights, d);
        matrices_begin();
        multiply_weights<ROWS>(sum, weights, shared_address(s->k[stage]));
        matrices_commit();
    }
    release(&s->held_empty);
    matrices_wait<0>();
    pin<dim / 2>(sum);
    release(&s->k_empty[(end - 1) % STAGES]);
    store_rows(sum, job.scale, job.scale, job.dq + query_place(job, item, first), (int64_t)job.heads * job.head_dim, valid,
               job.head_dim);
    *ring = end;
}

template <int dim>
static __device__ __forceinline__ void dq_multiply(const tile_job &job, const struct items &items, struct dq_shared<dim> *s,
                                                   int group) {
    int step = 0;
    for (int turn = 0;; turn++) {
        await(&s->held_full, turn & 1);
        int number = s->item;
        if (number < 0)
            break;
        struct item item = find_item(job, items, number);
        dq_item<dim>(job, item, items.tiles - 1 - item.rank, group, s, &step);
    }
}

#endif

template <int dim>
static __global__ void __launch_bounds__(THREADS, 1)
    backward_queries(const __grid_constant__ struct backward_maps maps, const __grid_constant__ tile_job job,
                     const __grid_constant__ struct items items) {
#ifdef CUDA_IS_SM90
    CUDA_SHARED_DYNAMIC(struct dq_shared<dim>, s);
    int role = __shfl_sync(FULL_WARP, (int)threadIdx.x / GROUP_THREADS, 0);
    if (threadIdx.x == 0) {
        barrier_init(&s->held_full, 1);
        barrier_init(&s->held_empty, RELEASES);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&s->k_full[i], 1);
            barrier_init(&s->v_full[i], 1);
            barrier_init(&s->k_empty[i], RELEASES);
            barrier_init(&s->v_empty[i], RELEASES);
        }
        barriers_are_initialized();
    }
    __syncthreads();
    if (role == 0) {
        registers_keep<BRINGER_REGISTERS>();
        if (threadIdx.x == 0)
            dq_bring<dim>(maps, job, items, s);
    } else {
        registers_get<MULTIPLIER_REGISTERS>();
        dq_multiply<dim>(job, items, s, role - 1);
    }
#endif
}

/* ---- backward: queries, from gradients of scores that were kept -------------------------------------------------- */

enum { SUM_STAGES = 6 };

struct sum_maps {
    tensor_map kept, k;
};

template <int dim> struct sum_shared {
    unsigned char kept[SUM_STAGES][GROUPS][STEP * STEP * 2], k[SUM_STAGES][STEP * dim * 2];
    uint64_t full[SUM_STAGES], empty[SUM_STAGES], item_full, item_empty;
    int item;
};

#ifdef CUDA_IS_SM90

/* Of a tile of queries: blocks of 64 keys that they see. The second half of the queries may not exist. */
static __device__ __forceinline__ int sum_steps(const tile_job &job, int tile) {
    int blocks = (job.query_count + STEP - 1) / STEP;
    return min(blocks, GROUPS * (tile + 1));
}

template <int dim>
static __device__ __forceinline__ void sum_bring(const struct sum_maps &maps, const tile_job &job, const struct items &items,
                                                 struct sum_shared<dim> *s) {
    int next = (int)blockIdx.x, step = 0;
    for (int turn = 0;; turn++) {
        int number = next;
        await(&s->item_empty, (turn & 1) ^ 1);
        s->item = number < items.count ? number : -1;
        barrier_arrive(&s->item_full);
        if (number >= items.count)
            break;
        next = take_item();
        struct item item = find_item(job, items, number);
        int tile = items.tiles - 1 - item.rank, steps = sum_steps(job, tile), row[GROUPS];
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
            row[g] = kept_row(job, item.place, GROUPS * tile + g);
#pragma unroll 1
        for (int key = 0; key < steps; key++, step++) {
            int stage = step % SUM_STAGES;
            bool is_first = key <= GROUPS * tile, is_second = steps > GROUPS * tile + 1;
            await(&s->empty[stage], (step / SUM_STAGES & 1) ^ 1);
            barrier_arrive_expecting(&s->full[stage], STEP * dim * 2 + (is_first + is_second) * STEP * STEP * 2);
            if (is_first)
                bring_tile<STEP, STEP>(s->kept[stage][0], &maps.kept, &s->full[stage], 0, row[0] + key * STEP, 0);
            if (is_second)
                bring_tile<STEP, STEP>(s->kept[stage][1], &maps.kept, &s->full[stage], 0, row[1] + key * STEP, 0);
            bring_tile<dim, STEP>(s->k[stage], &maps.k, &s->full[stage], item.batch, key * STEP, item.kv_head);
        }
    }
    take_no_more();
}

template <int dim>
static __device__ __forceinline__ void sum_multiply(const tile_job &job, const struct items &items, struct sum_shared<dim> *s,
                                                    int group) {
    int step = 0;
    for (int turn = 0;; turn++) {
        await(&s->item_full, turn & 1);
        int number = s->item;
        release(&s->item_empty);
        if (number < 0)
            break;
        struct item item = find_item(job, items, number);
        int tile = items.tiles - 1 - item.rank, block = GROUPS * tile + group;
        int end = step + sum_steps(job, tile), own = step + block + 1; /* beyond, no query of this group sees a key */
        float sum[dim / 2];
        clear(sum);
        if (own > end)
            own = step;
        for (int begin = step; step < end; step++) {
            int stage = step % SUM_STAGES;
            await(&s->full[stage], step / SUM_STAGES & 1);
            if (step < own) {
                uint32_t kept = shared_address(s->kept[stage][group]), k = shared_address(s->k[stage]);
                pin<dim / 2>(sum);
                matrices_begin();
#pragma unroll
                for (int i = 0; i < STEP / 16; i++)
                    multiply_turned(sum, matrix_at(kept, i * 16 * 128, STEP * 128, 1024),
                                    matrix_at(k, i * 16 * 128, STEP * 128, 1024));
                matrices_commit();
                matrices_wait<1>();
                if (step > begin)
                    release(&s->empty[(step - 1) % SUM_STAGES]);
            } else {
                matrices_wait<0>();
                if (step > begin && step == own)
                    release(&s->empty[(step - 1) % SUM_STAGES]);
                release(&s->empty[stage]);
            }
        }
        matrices_wait<0>();
        pin<dim / 2>(sum);
        if (own == end)
            release(&s->empty[(end - 1) % SUM_STAGES]);
        int first = block * GROUP_ROWS;
        store_rows(sum, job.scale, job.scale, job.dq + query_place(job, item, first), (int64_t)job.heads * job.head_dim,
                   job.query_count - first, job.head_dim);
    }
}

#endif

template <int dim>
static __global__ void __launch_bounds__(THREADS, 1)
    sum_queries(const __grid_constant__ struct sum_maps maps, const __grid_constant__ tile_job job,
                const __grid_constant__ struct items items) {
#ifdef CUDA_IS_SM90
    CUDA_SHARED_DYNAMIC(struct sum_shared<dim>, s);
    int role = __shfl_sync(FULL_WARP, (int)threadIdx.x / GROUP_THREADS, 0);
    if (threadIdx.x == 0) {
        barrier_init(&s->item_full, 1);
        barrier_init(&s->item_empty, RELEASES);
        for (int i = 0; i < SUM_STAGES; i++) {
            barrier_init(&s->full[i], 1);
            barrier_init(&s->empty[i], RELEASES);
        }
        barriers_are_initialized();
    }
    __syncthreads();
    if (role > 0)
        sum_multiply<dim>(job, items, s, role - 1);
    else if (threadIdx.x == 0)
        sum_bring<dim>(maps, job, items, s);
#endif
}

/* ---- calls ------------------------------------------------------------------------------------------------------- */

/* Boxes of 64 columns of a head by `box_rows` rows, of [batch, rows, heads, head_dim]. */
static void make_map(tensor_map *map, const bf16 *data, int64_t batch, int64_t rows, int heads, int head_dim, int box_rows) {
    uint64_t row_bytes = (uint64_t)heads * (uint64_t)head_dim * 2;
    uint64_t size[4] = {(uint64_t)head_dim, (uint64_t)heads, (uint64_t)rows, (uint64_t)batch};
    uint64_t stride[3] = {(uint64_t)head_dim * 2, row_bytes, (uint64_t)rows * row_bytes};
    uint32_t box[4] = {64, 1, (uint32_t)box_rows, 1};
    tensor_map_make(map, data, 4, size, stride, box);
}

static void map_queries(tensor_map *map, const tile_job &job, const bf16 *data, int box_rows) {
    make_map(map, data, job.batch, job.query_count, job.heads, job.head_dim, box_rows);
}

static void map_keys(tensor_map *map, const tile_job &job, const bf16 *data, int box_rows) {
    make_map(map, data, job.batch, job.key_count, job.kv_heads, job.head_dim, box_rows);
}

static bool is_fit(const tile_job &job) {
    int64_t rows = job.batch * job.heads * ceil_div(job.query_count, GROUP_ROWS);
    return tensor_maps_exist() && job.query_count == job.key_count && job.head_dim % 8 == 0 && job.head_dim <= 128 &&
           job.scale > 0 && rows <= INT32_MAX / 2;
}

/* Of key-value heads first_pair .. + pairs - 1 of all sequences; pair_bytes: what the items of one read again and again. So many
 * heads at a time that this stays in the second-level cache, but two items for each processor: less, and the longest items of the
 * last heads would begin when other processors run out of work. */
static struct items items_of(const tile_job &job, int first_pair, int pairs, int per_pair, int64_t pair_bytes) {
    struct items items;
    items.tiles = (int)ceil_div(job.query_count, ROWS);
    int64_t cached = CACHE_BYTES / pair_bytes, busy = ceil_div(2 * cuda_processors(), items.tiles * per_pair);
    int64_t most = cached > busy ? cached : busy;
    items.first_pair = first_pair;
    items.pairs = pairs;
    items.span = (int)ceil_div(pairs, ceil_div(pairs, most));
    items.per_pair = per_pair;
    items.count = pairs * per_pair * items.tiles;
    return items;
}

static int all_pairs(const tile_job &job) {
    return (int)job.batch * job.kv_heads;
}

static unsigned grid_of(struct items items) {
    return (unsigned)(items.count < cuda_processors() ? items.count : cuda_processors());
}

template <int dim> static void launch_forward(const tile_job &job) {
    struct forward_maps maps;
    struct items items = items_of(job, 0, all_pairs(job), job.group, 2 * (int64_t)job.key_count * job.head_dim * 2);
    map_queries(&maps.q, job, job.q, ROWS);
    map_keys(&maps.k, job, job.k, ROWS);
    map_keys(&maps.v, job, job.v, ROWS);
    CUDA_LAUNCH_SM90(1, (forward<dim>), grid_of(items), THREADS, sizeof(struct forward_shared<dim>), maps, job, items);
}

bool sm90_attention_forward(const tile_job &job) {
    if (!is_fit(job))
        return false;
    if (job.head_dim <= 64)
        launch_forward<64>(job);
    else
        launch_forward<128>(job);
    return true;
}

static int64_t kept_rows(const tile_job &job) { /* of a head */
    int64_t blocks = ceil_div(job.query_count, STEP);
    return blocks * (blocks + 1) / 2 * STEP;
}

/* How many key-value heads are worked on at a time when gradients of scores are kept; 0: they are too many for that. */
static int kept_pairs(const tile_job &job) {
    int64_t most = KEPT_BYTES / (kept_rows(job) * job.group * STEP * 2), pairs = all_pairs(job);
    return most < 1 ? 0 : (int)ceil_div(pairs, ceil_div(pairs, most));
}

size_t sm90_attention_backward_bytes(const tile_job &job) {
    return is_fit(job) ? (size_t)kept_pairs(job) * (size_t)(job.group * kept_rows(job) * STEP * 2) : 0;
}

/* The gradient of queries from those of scores, which were kept. */
template <int dim> static void launch_in_parts(const tile_job &job, const struct backward_maps &of_keys) {
    int at_once = kept_pairs(job), all = all_pairs(job);
    struct sum_maps of_sums;
    map_keys(&of_sums.k, job, job.k, STEP);
    make_map(&of_sums.kept, job.kept, 1, at_once * job.group * kept_rows(job), 1, STEP, STEP);
    for (int first = 0; first < all; first += at_once) {
        int pairs = all - first < at_once ? all - first : at_once;
        struct items keys = items_of(job, first, pairs, 1, 2 * (int64_t)job.query_count * job.group * job.head_dim * 2);
        struct items sums = items_of(job, first, pairs, job.group, (int64_t)job.key_count * job.head_dim * 2);
        CUDA_LAUNCH_SM90(1, (backward_keys<dim, true>), grid_of(keys), THREADS, sizeof(struct dkv_shared<dim>), of_keys, job, keys);
        CUDA_LAUNCH_SM90(1, (sum_queries<dim>), grid_of(sums), THREADS, sizeof(struct sum_shared<dim>), of_sums, job, sums);
    }
}

template <int dim> static void launch_backward(const tile_job &job) {
    struct backward_maps of_keys, of_queries;
    map_queries(&of_keys.q, job, job.q, STEP);
    map_queries(&of_keys.dout, job, job.dout, STEP);
    map_keys(&of_keys.k, job, job.k, ROWS);
    map_keys(&of_keys.v, job, job.v, ROWS);
    if (job.kept) {
        launch_in_parts<dim>(job, of_keys);
        return;
    }
    of_queries = of_keys;
    map_queries(&of_queries.q, job, job.q, ROWS);
    map_queries(&of_queries.dout, job, job.dout, ROWS);
    struct items keys = items_of(job, 0, all_pairs(job), 1, 2 * (int64_t)job.query_count * job.group * job.head_dim * 2);
    struct items queries = items_of(job, 0, all_pairs(job), job.group, 2 * (int64_t)job.key_count * job.head_dim * 2);
    CUDA_LAUNCH_SM90(1, (backward_keys<dim, false>), grid_of(keys), THREADS, sizeof(struct dkv_shared<dim>), of_keys, job, keys);
    CUDA_LAUNCH_SM90(1, (backward_queries<dim>), grid_of(queries), THREADS, sizeof(struct dq_shared<dim>), of_queries, job,
                     queries);
}

bool sm90_attention_backward(const tile_job &job) {
    if (!is_fit(job))
        return false;
    if (job.head_dim <= 64)
        launch_backward<64>(job);
    else
        launch_backward<128>(job);
    return true;
}
