/* Products one side of which is as narrow as the number of experts: the router's logits, and both gradients of them. There is
 * too little to multiply for them to be anything but a walk over the one large operand, which each reads once:
 *
 *   rows      C [M,N] = A [M,K] B [N,K]^T, N narrow: a warp has 4 rows of A, its lanes the columns in turn
 *   columns   C [M,N] = A [K,M]^T B [K,N], M narrow: a block has some rows of B and leaves a partial sum of C
 *   update    C [M,N] = A [M,K] B [K,N],   K narrow: a warp has 8 rows of 256 columns of C in registers
 *
 * Narrow sides beyond 8 are worked on by eights, which find the large operand in the cache. Which form takes a product, and how
 * it is divided, is told by shapes alone: sums have one order wherever operands lie. */
#include "kernels/cuda/skinny.cuh"

#include "kernels/cuda/eights.cuh"

enum {
    NARROW_MAX = 256,       /* the narrow side */
    NARROW = 8,             /* of it, in registers */
    WIDE_MIN = 256,         /* the others: below it is little to win */
    MANY_MIN = 512,
    WARPS = THREADS / WARP,
    ROWS_ROWS = 4,          /* of A, a warp */
    ROWS_CHUNK = 2048,      /* of K, in shared memory: 64 KiB of B, three blocks to a processor */
    ROWS_BLOCKS = 132 * 3,
    COLUMNS_LANES = 128,    /* threads that have the columns of a block; the other half has the other rows */
    COLUMNS_BLOCK = COLUMNS_LANES * EIGHT,
    COLUMNS_STAGED = 256,   /* rows of A in shared memory */
    COLUMNS_AHEAD = 4,      /* rows of B on their way to a thread */
    COLUMNS_BLOCKS = 132 * 2,
    SPLIT_MIN = 128,        /* rows of K in a split, */
    SPLIT_MAX = 1024,       /* and how many give a sum that is still good, where partial sums take no more than this */
    PART_BYTES_MAX = 64 << 20,
    UPDATE_ROWS = 8,
    UPDATE_COLUMNS = WARP * EIGHT,
    UPDATE_K = 64,          /* of K at once: 64 KiB of B */
    UPDATE_BLOCKS = 132 * 2
};

struct narrow {
    int64_t m, n, k;
    bool accumulate;
};

/* ---- rows ----------------------------------------------------------------------------------------------------------- */

/* Columns k .. k + ROWS_CHUNK - 1 of eight rows of B, those beyond N zeros. */
template <bool aligned>
static __device__ void stage_rows(struct anywhere b, const struct narrow &p, int64_t first_row, int64_t k, float *to) {
    int eights = (int)((p.k - k < ROWS_CHUNK ? p.k - k : ROWS_CHUNK) / EIGHT);
#pragma unroll 4
    for (int i = (int)threadIdx.x; i < NARROW * eights; i += THREADS) {
        int row = i / eights, eight = i % eights;
        int64_t at = (first_row + row) * p.k + k + eight * EIGHT;
        float x[EIGHT] = {0};
        if (first_row + row < p.n && aligned && !b.is_bf16)
            load_eight((const float *)b.data + at, x);
        else if (first_row + row < p.n)
            load_eight(b + at, x);
        float *low = to + row * ROWS_CHUNK + eight * (EIGHT / 2);
        put_halves(low, low + ROWS_CHUNK / 2, x);
    }
}

/* Of 32 sums that each lane has a share of, lane l gets the l-th. */
static __device__ __forceinline__ float spread_sums(float sum[WARP]) {
    share_sums<16, 16>(sum);
    share_sums<8, 8>(sum);
    share_sums<4, 4>(sum);
    share_sums<2, 2>(sum);
    share_sums<1, 1>(sum);
    return sum[0];
}

template <typename A, bool aligned>
static __global__ void __launch_bounds__(THREADS, 3) multiply_rows(const A *a, struct anywhere b, struct anywhere c,
                                                                   const struct narrow p) {
    CUDA_SHARED_DYNAMIC(float, weights); /* [NARROW, 2, ROWS_CHUNK / 2] */
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    int64_t column = (int64_t)blockIdx.x * NARROW, block_rows = WARPS * ROWS_ROWS;
    for (int64_t block_row = blockIdx.y * block_rows; block_row < p.m; block_row += gridDim.y * block_rows) {
        int64_t row = block_row + warp * ROWS_ROWS, first = row + ROWS_ROWS <= p.m ? row : p.m - ROWS_ROWS;
        float sum[ROWS_ROWS * NARROW] = {0};
        for (int64_t k = 0; k < p.k; k += ROWS_CHUNK) {
            if (p.k > ROWS_CHUNK || block_row == blockIdx.y * block_rows) {
                __syncthreads();
                stage_rows<aligned>(b, p, column, k, weights);
                __syncthreads();
            }
            int count = (int)(p.k - k < ROWS_CHUNK ? p.k - k : ROWS_CHUNK);
            const A *from = a + first * p.k + k;
            for (int i = lane * EIGHT; i < count; i += WARP * EIGHT) {
                float x[ROWS_ROWS][EIGHT], w[EIGHT];
#pragma unroll
                for (int r = 0; r < ROWS_ROWS; r++)
                    load_anywhere<EIGHT, aligned>(from + r * p.k + i, x[r]);
#pragma unroll
                for (int n = 0; n < NARROW; n++) {
                    const float *low = weights + n * ROWS_CHUNK + i / 2;
                    get_halves(low, low + ROWS_CHUNK / 2, w);
#pragma unroll
                    for (int r = 0; r < ROWS_ROWS; r++)
#pragma unroll
                        for (int e = 0; e < EIGHT; e++)
                            sum[r * NARROW + n] += x[r][e] * w[e];
                }
            }
        }
        float mine = spread_sums(sum);
        int64_t m = first + lane / NARROW, n = column + lane % NARROW, at = m * p.n + n;
        if (m >= row && row < p.m && n < p.n) /* the last rows: by one warp only */
            store(c + at, p.accumulate ? c[at] + mine : mine);
    }
}

static void rows(struct tensor a, struct tensor b, struct tensor c, struct narrow p) {
    unsigned tiles = (unsigned)ceil_div(p.n, NARROW), most = ROWS_BLOCKS / tiles + 1;
    int64_t row_blocks = ceil_div(p.m, WARPS * ROWS_ROWS);
    dim3 grid(tiles, (unsigned)(row_blocks < most ? row_blocks : most));
    size_t shared = (size_t)NARROW * ROWS_CHUNK * sizeof(float);
    struct anywhere right = anywhere_of(b.data, b.dtype), to = anywhere_of(c.data, c.dtype);
    bool is_whole = is_aligned(a.data, 16) && is_aligned(b.data, 16);
    WITH_FLOAT(a.dtype, A, {
        if (is_whole)
            CUDA_LAUNCH((multiply_rows<A, true>), grid, THREADS, shared, (const A *)a.data, right, to, p);
        else
            CUDA_LAUNCH((multiply_rows<A, false>), grid, THREADS, shared, (const A *)a.data, right, to, p);
    });
}

/* ---- columns -------------------------------------------------------------------------------------------------------- */

/* Rows first .. first + count - 1 of eight columns of A, those beyond M zeros. */
static __device__ void stage_columns(struct anywhere a, const struct narrow &p, int64_t first, int count, int64_t column,
                                     float (*to)[NARROW]) {
    for (int i = (int)threadIdx.x; i < count * NARROW; i += THREADS) {
        int64_t m = column + i % NARROW;
        to[i / NARROW][i % NARROW] = m < p.m ? a[(first + i / NARROW) * p.m + m] : 0;
    }
}

/* The sums of the upper half of the block onto those of the lower one, two rows of C at a time by way of `share`. */
static __device__ void add_upper_half(float sum[NARROW][EIGHT], float (*share)[EIGHT]) {
    int lane = (int)threadIdx.x % COLUMNS_LANES;
    bool is_upper = threadIdx.x >= COLUMNS_LANES;
#pragma unroll
    for (int m = 0; m < NARROW; m += 2) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (is_upper)
                put_halves(&share[i * COLUMNS_LANES + lane][0], &share[i * COLUMNS_LANES + lane][4], sum[m + i]);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2; i++)
            for (int e = 0; e < EIGHT && !is_upper; e++)
                sum[m + i][e] += share[i * COLUMNS_LANES + lane][e];
    }
}

/* part [splits, M, N]: split s has the `each` rows of K from s * each on. */
template <typename B, bool aligned>
static __global__ void __launch_bounds__(THREADS, 2) multiply_columns(struct anywhere a, const B *b, float *part,
                                                                      const struct narrow p, int64_t each) {
    CUDA_SHARED float4 staged[COLUMNS_STAGED * NARROW / 4];
    float (*left)[NARROW] = (float (*)[NARROW])staged;
    int half = (int)threadIdx.x / COLUMNS_LANES;
    int64_t column = (int64_t)blockIdx.y * COLUMNS_BLOCK + (int64_t)threadIdx.x % COLUMNS_LANES * EIGHT;
    int64_t m = (int64_t)blockIdx.x * NARROW, begin = blockIdx.z * each, end = begin + each < p.k ? begin + each : p.k;
    float sum[NARROW][EIGHT] = {{0}};
    for (int64_t first = begin; first < end; first += COLUMNS_STAGED) {
        int count = (int)(end - first < COLUMNS_STAGED ? end - first : COLUMNS_STAGED);
        __syncthreads();
        stage_columns(a, p, first, count, m, left);
        __syncthreads();
        for (int row = half; row < count && column < p.n; row += 2 * COLUMNS_AHEAD) {
            float x[COLUMNS_AHEAD][EIGHT] = {{0}};
#pragma unroll
            for (int i = 0; i < COLUMNS_AHEAD; i++)
                if (row + 2 * i < count)
                    load_anywhere<EIGHT, aligned>(b + (first + row + 2 * i) * p.n + column, x[i]);
#pragma unroll
            for (int i = 0; i < COLUMNS_AHEAD; i++) {
                float l[NARROW];
                if (row + 2 * i >= count)
                    continue;
                get_halves(&left[row + 2 * i][0], &left[row + 2 * i][4], l);
#pragma unroll
                for (int r = 0; r < NARROW; r++)
#pragma unroll
                    for (int e = 0; e < EIGHT; e++)
                        sum[r][e] += l[r] * x[i][e];
            }
        }
    }
    add_upper_half(sum, left);
    if (half == 0 && column < p.n)
#pragma unroll
        for (int r = 0; r < NARROW; r++)
            if (m + r < p.m)
                store_eight(part + (blockIdx.z * p.m + m + r) * p.n + column, sum[r]);
}

/* C = or += the sum of the parts: 32 elements a block, every warp a part in eight. */
static __global__ void add_column_parts(const float *part, int64_t part_count, int64_t elements, struct anywhere c,
                                        bool accumulate) {
    CUDA_SHARED double share[WARPS][WARP];
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    int64_t i = (int64_t)blockIdx.x * WARP + lane;
    double sum = 0;
    if (i < elements) {
#pragma unroll 4
        for (int64_t at = warp; at < part_count; at += WARPS)
            sum += (double)part[at * elements + i];
    }
    share[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && i < elements) {
        for (int other = 1; other < WARPS; other++)
            sum += share[other][lane];
        store(c + i, (float)(accumulate ? (double)c[i] + sum : sum));
    }
}

static int64_t clamped(int64_t x, int64_t least, int64_t most) {
    return x > most ? most : x < least ? least : x;
}

static void columns(struct tensor a, struct tensor b, struct tensor c, struct narrow p) {
    int64_t tiles = ceil_div(p.m, NARROW), blocks = ceil_div(p.n, COLUMNS_BLOCK), elements = p.m * p.n;
    int64_t wanted = clamped(COLUMNS_BLOCKS / (tiles * blocks), ceil_div(p.k, SPLIT_MAX), ceil_div(p.k, SPLIT_MIN));
    int64_t room = PART_BYTES_MAX / (elements * (int64_t)sizeof(float)), splits = clamped(wanted, 1, room > 1 ? room : 1);
    int64_t each = ceil_div(p.k, splits);
    splits = ceil_div(p.k, each);
    float *part = (float *)cuda_scratch((size_t)(splits * elements) * sizeof *part);
    dim3 grid((unsigned)tiles, (unsigned)blocks, (unsigned)splits);
    struct anywhere left = anywhere_of(a.data, a.dtype), to = anywhere_of(c.data, c.dtype);
    WITH_FLOAT(b.dtype, B, {
        if (is_aligned(b.data, 16))
            CUDA_LAUNCH((multiply_columns<B, true>), grid, THREADS, 0, left, (const B *)b.data, part, p, each);
        else
            CUDA_LAUNCH((multiply_columns<B, false>), grid, THREADS, 0, left, (const B *)b.data, part, p, each);
    });
    CUDA_LAUNCH(add_column_parts, (unsigned)ceil_div(elements, WARP), THREADS, 0, part, splits, elements, to, p.accumulate);
}

/* ---- update --------------------------------------------------------------------------------------------------------- */

/* k .. k + count - 1 of K. */
template <typename C, bool aligned>
static __global__ void __launch_bounds__(THREADS, 2) multiply_update(struct anywhere a, struct anywhere b, C *c,
                                                                     const struct narrow p, int64_t k, int count) {
    CUDA_SHARED_DYNAMIC(float, weights); /* [count, 2, UPDATE_COLUMNS / 2], then of each warp [count, UPDATE_ROWS] */
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    int64_t block_column = (int64_t)blockIdx.x * UPDATE_COLUMNS, column = block_column + lane * EIGHT;
    float *left = weights + count * UPDATE_COLUMNS + warp * count * UPDATE_ROWS;
    for (int i = warp; i < count; i += WARPS) {
        float x[EIGHT] = {0}, *low = weights + i * UPDATE_COLUMNS + lane * (EIGHT / 2);
        if (column < p.n)
            load_eight(b + ((k + i) * p.n + column), x);
        put_halves(low, low + UPDATE_COLUMNS / 2, x);
    }
    __syncthreads();
    int64_t stride = gridDim.y * WARPS * UPDATE_ROWS;
    for (int64_t row = (blockIdx.y * WARPS + warp) * UPDATE_ROWS; row < p.m; row += stride) {
        float sum[UPDATE_ROWS][EIGHT] = {{0}};
#pragma unroll
        for (int r = 0; r < UPDATE_ROWS; r++)
            if (p.accumulate && row + r < p.m && column < p.n)
                load_anywhere<EIGHT, aligned>(c + (row + r) * p.n + column, sum[r]);
        __syncwarp();
        for (int i = lane; i < UPDATE_ROWS * count; i += WARP) {
            int r = i / count, at = i % count;
            left[at * UPDATE_ROWS + r] = row + r < p.m ? a[(row + r) * p.k + k + at] : 0;
        }
        __syncwarp();
        for (int i = 0; i < count; i++) {
            float l[UPDATE_ROWS], w[EIGHT];
            const float *low = weights + i * UPDATE_COLUMNS + lane * (EIGHT / 2);
            get_halves(low, low + UPDATE_COLUMNS / 2, w);
            get_halves(left + i * UPDATE_ROWS, left + i * UPDATE_ROWS + 4, l);
#pragma unroll
            for (int r = 0; r < UPDATE_ROWS; r++)
#pragma unroll
                for (int e = 0; e < EIGHT; e++)
                    sum[r][e] += l[r] * w[e];
        }
#pragma unroll
        for (int r = 0; r < UPDATE_ROWS; r++)
            if (row + r < p.m && column < p.n)
                store_anywhere<EIGHT, aligned>(c + (row + r) * p.n + column, sum[r]);
    }
}

static void update(struct tensor a, struct tensor b, struct tensor c, struct narrow p) {
    unsigned column_blocks = (unsigned)ceil_div(p.n, UPDATE_COLUMNS), most = UPDATE_BLOCKS / column_blocks + 1;
    int64_t row_blocks = ceil_div(p.m, WARPS * UPDATE_ROWS);
    dim3 grid(column_blocks, (unsigned)(row_blocks < most ? row_blocks : most));
    struct anywhere left = anywhere_of(a.data, a.dtype), right = anywhere_of(b.data, b.dtype);
    for (int64_t k = 0; k < p.k; k += UPDATE_K) {
        int count = (int)(p.k - k < UPDATE_K ? p.k - k : UPDATE_K);
        size_t shared = (size_t)count * (UPDATE_COLUMNS + WARPS * UPDATE_ROWS) * sizeof(float);
        if (is_aligned(c.data, 16))
            CUDA_LAUNCH((multiply_update<float, true>), grid, THREADS, shared, left, right, (float *)c.data, p, k, count);
        else
            CUDA_LAUNCH((multiply_update<float, false>), grid, THREADS, shared, left, right, (float *)c.data, p, k, count);
        p.accumulate = true;
    }
}

/* ---- which ---------------------------------------------------------------------------------------------------------- */

bool skinny_gemm(struct tensor a, bool transpose_a, struct tensor b, bool transpose_b, struct tensor c, bool accumulate) {
    struct narrow p = {a.shape[transpose_a], b.shape[!transpose_b], a.shape[!transpose_a], accumulate};
    if (p.m == 0 || p.n == 0 || p.k == 0)
        return false;
    if (!transpose_a && transpose_b && p.n <= NARROW_MAX && p.m >= MANY_MIN && p.k >= WIDE_MIN && p.k % EIGHT == 0)
        rows(a, b, c, p);
    else if (transpose_a && !transpose_b && p.m <= NARROW_MAX && p.k >= MANY_MIN && p.n >= WIDE_MIN && p.n % EIGHT == 0)
        columns(a, b, c, p);
    else if (!transpose_a && !transpose_b && p.k <= NARROW_MAX && p.m >= MANY_MIN && p.n >= WIDE_MIN && p.n % EIGHT == 0 &&
             c.dtype == DTYPE_F32) /* sums of several passes are in C itself */
        update(a, b, c, p);
    else
        return false;
    return true;
}
