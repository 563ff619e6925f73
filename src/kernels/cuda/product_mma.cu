/* Products of bf16 on the matrix units that all devices from sm_80 on have: dense and grouped, forward and both gradients, rows
 * gathered while they are brought.
 *
 * A block makes 128 x 128 of C with four warps, 64 x 64 each, 32 of k a stage, three stages: the copies of two are under way while
 * one is multiplied. An operand lies in memory with k innermost (along_k) or with its own dimension; so it lies in shared memory,
 * and the matrix unit's loads turn it round where it must be.
 *
 * Invariants
 *  1. A number of C is the work of one warp, in the order of k: the same bits every time. Parts of k, where there are few tiles,
 *     are added in their order by a kernel of their own.
 *  2. A tile is rows of whole units of 16 bytes. Rows and columns that do not exist are zeros in shared memory: of both operands
 *     where it is k that ends.
 *  3. Eight rows of one column of units lie in different banks: unit u of row r is at u ^ r / 2 % 4 where rows have four units
 *     (along_k), at u ^ r % 8 where they have sixteen.
 */
#include "kernels/cuda/product_tiles.cuh"

enum { TILE = 128, TILE_K = 32, STAGES = 3, THREADS = 128, SIDE = TILE * TILE_K, UNITS_EACH = SIDE / 8 / THREADS };
enum { WARP_TILE = 64, TALL = WARP_TILE / 16, WIDE = WARP_TILE / 8 };

/* In elements of a tile. */
template <bool along_k> static __device__ __forceinline__ int unit_offset(int row, int unit) {
    return along_k ? row * TILE_K + (unit ^ (row / 2 & 3)) * 8 : row * TILE + (unit ^ (row & 7)) * 8;
}

/* How a thread brings its units of one operand's tiles, stage by stage. */
template <bool along_k> struct carrier {
    const bf16 *data;
    const int32_t *index; /* of rows along k; NULL: none */
    int64_t stride;       /* from one row of a tile to the next, or to the one that an index names */
    int64_t first;        /* along_k: k; else the operand's own dimension: where this thread's units begin */
    int64_t end;          /* of that dimension */
    int64_t rows[UNITS_EACH]; /* along_k: where the rows begin, elements; -1: there is none */

    __device__ __forceinline__ void begin(const struct side &s, int64_t group, int64_t from, int64_t to, int64_t own_end) {
        int thread = (int)threadIdx.x;
        data = (const bf16 *)s.data + group * s.group;
        index = s.index;
        stride = along_k ? s.step : s.inner;
        if (!along_k) {
            first = from + thread % (TILE / 8) * 8;
            end = own_end;
            return;
        }
        first = thread % (TILE_K / 8) * 8;
        UNROLL
        for (int i = 0; i < UNITS_EACH; i++) {
            int64_t row = from + thread / (TILE_K / 8) + i * (THREADS / (TILE_K / 8));
            rows[i] = row >= to ? -1 : (s.index ? s.index[row] : row) * stride;
        }
    }

    /* The stage that begins at k, of which k_end is the end. */
    __device__ __forceinline__ void bring(bf16 *tile, int64_t k, int64_t k_end) const {
        enum { UNITS = along_k ? TILE_K / 8 : TILE / 8 }; /* of a row */
        int row = (int)threadIdx.x / UNITS, unit = (int)threadIdx.x % UNITS;
        UNROLL
        for (int i = 0; i < UNITS_EACH; i++, row += THREADS / UNITS) {
            bool is_here = along_k ? rows[i] >= 0 && k + first < k_end : k + row < k_end && first < end;
            int64_t at = 0;
            if (is_here)
                at = along_k ? rows[i] + k + first : (index ? index[k + row] : k + row) * stride + first;
            copy_async(tile + unit_offset<along_k>(row, unit), data + at, is_here ? 16 : 0);
        }
    }
};

/* 16 rows from `row` on of the left operand, k 16 step .. 16 step + 15. */
template <bool along_k> static __device__ __forceinline__ void load_left(uint32_t r[4], const bf16 *tile, int row, int step) {
    int lane = (int)threadIdx.x % WARP, matrix = lane / 8;
    if (along_k)
        load_matrices(r, tile + unit_offset<true>(row + lane % 16, step * 2 + lane / 16));
    else
        load_matrices_transposed(r, tile + unit_offset<false>(step * 16 + matrix / 2 * 8 + lane % 8, row / 8 + matrix % 2));
}

/* 16 columns from `column` on of the right operand: r[0..1] the first eight, r[2..3] the others. */
template <bool along_k> static __device__ __forceinline__ void load_right(uint32_t r[4], const bf16 *tile, int column, int step) {
    int lane = (int)threadIdx.x % WARP, matrix = lane / 8;
    if (along_k)
        load_matrices(r, tile + unit_offset<true>(column + matrix / 2 * 8 + lane % 8, step * 2 + matrix % 2));
    else
        load_matrices_transposed(r, tile + unit_offset<false>(step * 16 + matrix % 2 * 8 + lane % 8, column / 8 + matrix / 2));
}

template <bool a_along_k, bool b_along_k>
static __device__ __forceinline__ void multiply_stage(float sum[TALL][WIDE][4], const bf16 *a, const bf16 *b, int row, int column) {
    UNROLL
    for (int step = 0; step < TILE_K / 16; step++) {
        uint32_t left[TALL][4];
        UNROLL
        for (int m = 0; m < TALL; m++)
            load_left<a_along_k>(left[m], a, row + m * 16, step);
        UNROLL
        for (int n = 0; n < WIDE; n += 2) {
            uint32_t right[4];
            load_right<b_along_k>(right, b, column + n * 8, step);
            UNROLL
            for (int m = 0; m < TALL; m++) {
                mma_bf16(sum[m][n], left[m], right);
                mma_bf16(sum[m][n + 1], left[m], right + 2);
            }
        }
    }
}

static __device__ __forceinline__ void store_two(float *to, float x, float y) {
    float2 pair = {x, y};
    *(float2 *)to = pair;
}

static __device__ __forceinline__ void store_two(bf16 *to, float x, float y) {
    *(uint32_t *)to = pack_bf16(x, y);
}

/* Two numbers of a row of C, of which `count` exist; together where they are aligned to it. */
template <typename C> static __device__ __forceinline__ void put(C *to, float x, float y, int count, bool accumulate, bool pairs) {
    if (accumulate) {
        x += to_float(to[0]);
        y += count > 1 ? to_float(to[1]) : 0;
    }
    if (pairs && count > 1) {
        store_two(to, x, y);
        return;
    }
    store(to, x);
    if (count > 1)
        store(to + 1, y);
}

template <bool a_along_k, bool b_along_k, typename C>
static __global__ void __launch_bounds__(THREADS, 2) multiply_mma(const struct product p, bool pairs) {
    CUDA_SHARED uint4 shared[STAGES * 2 * SIDE / 8];
    bf16 *tiles = (bf16 *)shared;
    const struct task task = find_task(p, TILE, TILE);
    const struct place rows = task.rows;
    int64_t n = task.n, k = task.k, k_end = task.k_end;
    if (rows.begin == rows.end)
        return;
    struct carrier<a_along_k> a;
    struct carrier<b_along_k> b;
    a.begin(p.a, p.groups_along_k ? 0 : rows.group, rows.begin, rows.end, rows.end);
    b.begin(p.b, p.groups_along_k ? 0 : rows.group, n, p.n, p.n);
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    int row = warp / 2 * WARP_TILE, column = warp % 2 * WARP_TILE;
    float sum[TALL][WIDE][4];
    UNROLL
    for (int i = 0; i < TALL; i++)
        UNROLL
        for (int j = 0; j < WIDE; j++)
            sum[i][j][0] = sum[i][j][1] = sum[i][j][2] = sum[i][j][3] = 0;
    UNROLL
    for (int s = 0; s < STAGES - 1; s++) {
        a.bring(tiles + s * 2 * SIDE, k + s * TILE_K, k_end);
        b.bring(tiles + s * 2 * SIDE + SIDE, k + s * TILE_K, k_end);
        copy_async_commit();
    }
    for (int stage = 0; k < k_end; k += TILE_K) {
        copy_async_wait<STAGES - 2>();
        __syncthreads(); /* the stage is there, and nobody reads the one before any more */
        int next = stage == 0 ? STAGES - 1 : stage - 1;
        a.bring(tiles + next * 2 * SIDE, k + (STAGES - 1) * TILE_K, k_end);
        b.bring(tiles + next * 2 * SIDE + SIDE, k + (STAGES - 1) * TILE_K, k_end);
        copy_async_commit();
        multiply_stage<a_along_k, b_along_k>(sum, tiles + stage * 2 * SIDE, tiles + stage * 2 * SIDE + SIDE, row, column);
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
    copy_async_wait<0>();
    UNROLL
    for (int i = 0; i < TALL; i++)
        UNROLL
        for (int h = 0; h < 2; h++) {
            int64_t m = rows.begin + row + i * 16 + h * 8 + lane / 4;
            if (m >= rows.end)
                continue;
            UNROLL
            for (int j = 0; j < WIDE; j++) {
                int64_t at = n + column + j * 8 + lane % 4 * 2, count = p.n - at;
                if (count <= 0)
                    continue;
                float x = sum[i][j][2 * h], y = sum[i][j][2 * h + 1];
                if (p.splits > 1)
                    put(p.part + ((int64_t)task.split * p.m + m) * p.n + at, x, y, count > 1 ? 2 : 1, false, p.n % 2 == 0);
                else
                    put((C *)p.c + (p.groups_along_k ? rows.group * p.c_group : 0) + m * p.c_m + at, x, y, count > 1 ? 2 : 1,
                        p.accumulate, pairs);
            }
        }
}

/* Whether an operand lies in whole units: along k, or along its own dimension, of which there are so many. */
static bool in_units(const struct side &s, int64_t k, int64_t own) {
    bool along_k = s.inner == 1, gathers_right = !s.index || s.index_along_k != along_k;
    int64_t stride = along_k ? s.step : s.inner, whole = along_k ? k : own;
    return (along_k || s.step == 1) && whole % 8 == 0 && stride % 8 == 0 && s.group % 8 == 0 && is_aligned(s.data, 16) &&
           gathers_right;
}

template <bool a_along_k, bool b_along_k, typename C> static void start(struct product p) {
    bool pairs = p.c_m % 2 == 0 && p.c_group % 2 == 0 && is_aligned(p.c, 2 * sizeof(C));
    dim3 grid = product_grid(&p, TILE, TILE);
    CUDA_LAUNCH((multiply_mma<a_along_k, b_along_k, C>), grid, THREADS, 0, p, pairs);
    product_add_splits<C>(p);
}

template <typename C> static void start_sides(const struct product &p) {
    bool a = p.a.inner == 1, b = p.b.inner == 1;
    if (a && b)
        start<true, true, C>(p);
    else if (a)
        start<true, false, C>(p);
    else if (b)
        start<false, true, C>(p);
    else
        start<false, false, C>(p);
}

bool mma_product(struct product p, enum dtype c) {
    if (p.c_n != 1 || !in_units(p.a, p.k, p.m) || !in_units(p.b, p.k, p.n))
        return false;
    WITH_FLOAT(c, C, start_sides<C>(p));
    return true;
}
