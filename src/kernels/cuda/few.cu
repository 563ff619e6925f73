/* Products with few rows: y (m,n) = sum over k of x (m,k) w (n,k), weights read once, by 16 bytes, straight to registers.
 *
 * A warp has 16 columns: lane 4 r + c has columns r and r + 8, of each 32 of k the eight from 8 c on. SwiGLU's two products are
 * one: the columns are 8 of gate and the same 8 of up. The warps of a block divide k among them; their sums meet in shared memory
 * and are added in the order of the warps.
 *
 * bf16 goes to the matrix units: the weights are the left operand, 16 x 16, and 8 rows of x the right one, 16 x 8. That k lies in
 * another order in a lane's registers than the unit thinks is the same for both, so nobody sees it; 8 rows cost what one does. f32
 * goes to the ordinary units, 8 rows for each number that is loaded.
 *
 * Invariants
 *  1. The order of a sum depends on the inner dimension only: not on the other rows, nor on how columns are dealt out.
 *  2. Rows, columns and parts of k that do not exist are zeros in registers: nothing of them is loaded.
 *
 * Arithmetic (H100: 3.35 TB/s, 132 processors; 0.7 us from a load to its data: 2.3 MB must be under way, 18 KB a processor). A
 * lane asks for 16 times 16 bytes before it uses the first: 8 KB a warp, 64 KB a block of eight warps, and registers leave room
 * for two such blocks (of more than 8 rows, for 6 times beside 12 of x). k of 2,048 is one such turn for each warp. A product of
 * 2048 x 2048 is 128 blocks of 64 KB, 8.4 MB: 2.5 us of transfer after 0.7 us of waiting; logits of 32,768 are 2,048 blocks, 134
 * MB: 40 us, of which the end of a block, about 0.2 us of its 5, is under the loads of the other one. Where there are too few
 * columns for the processors, a block has 8. x is read again by every block, from its processor's cache: M times 4 KB beside 64
 * KB of weights.
 *
 * How many rows: 32 rows are 4 x 2 products of 16 x 8 x 16 for 1 KB of weights, 70 cycles of transfer and 16 of the matrix unit's
 * time; but a processor's cache must give 2 KB of x beside them, and beyond, tiles that bring x once win. f32 has 8 rows: 30
 * multiply-adds a cycle of the 128 that a processor has. Grouped, where the host does not know how the rows fall, up to four times
 * as many: when one group has them all, what is read again lies in the second-level cache. */
#include "kernels/cuda/few.cuh"

#include "kernels/cuda/eights.cuh"
#include "kernels/cuda/product_tiles.cuh"

enum {
    STEP = 32,    /* of k: eight for each lane of a column */
    COLUMNS = 16, /* of a warp */
    HALF = COLUMNS / 2,
    ROWS = 8,     /* that the matrix unit takes at once */
    MANY_ROWS = 4 * ROWS,
    GROUPED = 4, /* times as many rows in groups */
    WARPS_MAX = 8,
    WARP_STEPS = 8,            /* of k, that are enough for a warp */
    PART_STRIDE = COLUMNS + 4, /* of rows in shared memory: lanes of a warp write to different banks */
    BUSY = 132                 /* blocks */
};

struct few {
    const void *x, *w, *up_w;       /* up_w: or NULL */
    const int32_t *index, *offsets; /* of rows of x, of groups; or NULL */
    int groups;
    int64_t rows, out, in;
    int64_t share; /* of k, of each warp */
    int columns;   /* of y, of a block: COLUMNS or HALF */
    struct anywhere base, y, up, act; /* y = base + what is summed, base's data may be NULL; with up_w: gate, up, act or NULL */
    const float *row_weight;
};

/* Where this lane's two columns lie, NULL where there is none. */
template <typename W>
static __device__ __forceinline__ void find_columns(const struct few &p, int64_t group, int64_t first, const W *w[2]) {
    UNROLL
    for (int h = 0; h < 2; h++) {
        int64_t column = first + (int)threadIdx.x % WARP / 4 + (p.up_w ? 0 : HALF * h);
        bool is_here = column < p.out && (p.up_w || HALF * h < p.columns);
        const W *matrix = (const W *)(p.up_w && h ? p.up_w : p.w) + group * p.out * p.in;
        w[h] = is_here ? matrix + column * p.in : NULL;
    }
}

/* Which row of x is row i of a tile; negative: there is none. */
static __device__ __forceinline__ int find_row(const struct few &p, const struct place &place, int i) {
    int64_t row = place.begin + i;
    return row >= place.end ? -1 : p.index ? p.index[row] : (int)row;
}

/* ---- bf16 ----------------------------------------------------------------------------------------------------------- */

/* sum[t] [16,8] = this warp's columns, over k .. end - 1, for rows 8 t .. 8 t + 7, as the matrix unit has it. */
template <typename X, int rows>
static __device__ __forceinline__ void multiply(const struct few &p, const struct place &place, const bf16 *const w[2], int64_t k,
                                                int64_t end, float sum[rows / ROWS][4]) {
    enum { TILES = rows / ROWS, STEPS = TILES == 1 ? 8 : 3 /* what registers hold */ };
    const uint4 nothing = {0, 0, 0, 0};
    int lane = (int)threadIdx.x % WARP, piece = lane % 4 * EIGHT, count = (int)(place.end - place.begin);
    const bf16 *x[TILES];
    UNROLL
    for (int t = 0; t < TILES; t++) {
        int row = find_row(p, place, t * ROWS + lane / 4);
        x[t] = row < 0 ? NULL : (const bf16 *)p.x + row * p.in;
    }
    for (k += piece; k - piece < end; k += STEPS * STEP) {
        uint4 left[STEPS][2], right[STEPS][TILES];
        UNROLL
        for (int s = 0; s < STEPS; s++) {
            UNROLL
            for (int h = 0; h < 2; h++)
                left[s][h] = w[h] && k + s * STEP < end ? __ldcs((const uint4 *)(w[h] + k + s * STEP)) : nothing;
            UNROLL
            for (int t = 0; t < TILES; t++)
                right[s][t] = x[t] && k + s * STEP < end ? *(const uint4 *)(x[t] + k + s * STEP) : nothing;
        }
        __syncwarp(); /* the compiler may not ask for the last ones when the first have come */
        UNROLL
        for (int s = 0; s < STEPS; s++) {
            if (k - piece + s * STEP >= end)
                continue;
            uint32_t a[2][4] = {{left[s][0].x, left[s][1].x, left[s][0].y, left[s][1].y},
                                {left[s][0].z, left[s][1].z, left[s][0].w, left[s][1].w}};
            UNROLL
            for (int t = 0; t < TILES; t++) {
                if (t * ROWS >= count)
                    continue;
                uint32_t b[4] = {right[s][t].x, right[s][t].y, right[s][t].z, right[s][t].w};
                mma_bf16(sum[t], a[0], b);
                mma_bf16(sum[t], a[1], b + 2);
            }
        }
    }
}

/* ---- f32 ------------------------------------------------------------------------------------------------------------ */

static __device__ __forceinline__ void load_eight_once(const float *from, float x[EIGHT]) {
    float4 a = __ldcs((const float4 *)from), b = __ldcs((const float4 *)from + 1);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

/* The same of f32, by rows of x one after the other. */
template <typename X, int rows>
static __device__ __forceinline__ void multiply(const struct few &p, const struct place &place, const float *const w[2], int64_t k,
                                                int64_t end, float sum[1][4]) {
    enum { STEPS = 4 };
    int piece = (int)threadIdx.x % 4 * EIGHT;
    static_assert(rows == ROWS, "sums of more do not fit");
    float all[2 * ROWS] = {0}; /* of each row, its two columns */
    int row[ROWS];
    UNROLL
    for (int i = 0; i < ROWS; i++)
        row[i] = find_row(p, place, i);
    for (k += piece; k - piece < end; k += STEPS * STEP) {
        float left[STEPS][2][EIGHT] = {{{0}}};
        UNROLL
        for (int s = 0; s < STEPS; s++)
            UNROLL
            for (int h = 0; h < 2; h++)
                if (w[h] && k + s * STEP < end)
                    load_eight_once(w[h] + k + s * STEP, left[s][h]);
        __syncwarp();
        UNROLL
        for (int i = 0; i < ROWS; i++) {
            if (row[i] < 0)
                continue;
            const X *x = (const X *)p.x + row[i] * p.in + k;
            float right[STEPS][EIGHT] = {{0}};
            UNROLL
            for (int s = 0; s < STEPS; s++)
                if (k + s * STEP < end)
                    load_eight(x + s * STEP, right[s]);
            UNROLL
            for (int s = 0; s < STEPS; s++)
                UNROLL
                for (int h = 0; h < 2; h++)
                    UNROLL
                    for (int e = 0; e < EIGHT; e++)
                        all[2 * i + h] += left[s][h][e] * right[s][e];
        }
    }
    share_sums<8, 2>(all); /* of the four lanes of a column, lane c keeps rows 2 c and 2 c + 1, as the matrix unit would */
    share_sums<4, 1>(all);
    sum[0][0] = all[0], sum[0][1] = all[2], sum[0][2] = all[1], sum[0][3] = all[3];
}

/* ---- both ----------------------------------------------------------------------------------------------------------- */

/* A column of a row, from the parts that the warps left. */
template <int rows> static __device__ __forceinline__ float add_parts(const float *part, int row, int column) {
    float sum = 0;
    for (int warp = 0; warp < (int)blockDim.x / WARP; warp++)
        sum += part[(warp * rows + row) * PART_STRIDE + column];
    return sum;
}

template <int rows>
static __device__ __forceinline__ void put_results(const struct few &p, const struct place &place, int64_t first,
                                                   const float *part) {
    int count = (int)(place.end - place.begin);
    for (int i = (int)threadIdx.x; i < count * p.columns; i += (int)blockDim.x) {
        int row = i / p.columns, column = i % p.columns;
        if (first + column >= p.out)
            continue;
        int64_t at = (place.begin + row) * p.out + first + column;
        float sum = add_parts<rows>(part, row, column);
        if (p.base.data)
            sum += p.base[at];
        store(p.y + at, sum);
        if (!p.up_w)
            continue;
        float up = add_parts<rows>(part, row, HALF + column);
        store(p.up + at, up);
        if (p.act.data)
            store(p.act + at, sum * sigmoid(sum) * up * (p.row_weight ? p.row_weight[place.begin + row] : 1));
    }
}

template <typename X, typename W, int rows>
static __global__ void __launch_bounds__(WARPS_MAX *WARP, 2) multiply_few(const struct few p) {
    CUDA_SHARED_DYNAMIC(float, part); /* [warps, rows, PART_STRIDE] */
    struct place place = {0, 0, p.rows};
    if (p.offsets)
        place = find_place(p.offsets, p.groups, blockIdx.y, rows);
    if (place.begin == place.end)
        return;
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    int64_t first = (int64_t)blockIdx.x * p.columns, begin = warp * p.share, end = min(begin + p.share, p.in);
    float sum[rows / ROWS][4] = {{0}};
    const W *w[2];
    find_columns(p, place.group, first, w);
    multiply<X, rows>(p, place, w, begin, end, sum);
    UNROLL
    for (int t = 0; t < rows / ROWS; t++) {
        float *to = part + (warp * rows + t * ROWS + lane % 4 * 2) * PART_STRIDE + lane / 4;
        to[0] = sum[t][0], to[PART_STRIDE] = sum[t][1], to[HALF] = sum[t][2], to[PART_STRIDE + HALF] = sum[t][3];
    }
    __syncthreads();
    put_results<rows>(p, place, first, part);
}

/* ---- which ---------------------------------------------------------------------------------------------------------- */

static bool fits(struct tensor x, struct tensor offsets, struct packed w, int64_t rows) {
    int64_t most = (w.dtype == DTYPE_BF16 ? MANY_ROWS : ROWS) * (tensor_exists(offsets) ? GROUPED : 1);
    return cuda_has_few() && rows <= most && w.in > 0 && w.in % EIGHT == 0 && is_aligned(x.data, 16) && is_aligned(w.data, 16) &&
           (x.dtype == w.dtype || w.dtype == DTYPE_F32);
}

static struct few few_of(struct tensor x, struct tensor rows, struct tensor offsets, struct packed w, struct tensor y) {
    struct few p = {};
    CHECK(x.shape[1] == w.in && y.shape[1] == w.out);
    p.x = x.data, p.w = w.data, p.index = (const int32_t *)rows.data, p.offsets = (const int32_t *)offsets.data;
    p.groups = (int)w.groups, p.rows = y.shape[0], p.out = w.out, p.in = w.in;
    p.y = anywhere_of(y.data, y.dtype);
    return p;
}

template <typename X, typename W, int rows> static void launch(struct few p) {
    int64_t most = p.groups + p.rows / rows, tiles = !p.offsets ? 1 : p.rows < most ? p.rows : most;
    int warps = 1;
    while (warps < WARPS_MAX && ceil_div(p.in, STEP) > warps * WARP_STEPS)
        warps *= 2;
    p.share = ceil_div(ceil_div(p.in, STEP), warps) * STEP;
    p.columns = p.up_w || ceil_div(p.out, COLUMNS) * tiles < BUSY ? HALF : COLUMNS;
    dim3 grid((unsigned)ceil_div(p.out, p.columns), (unsigned)tiles);
    size_t shared = (size_t)(warps * rows * PART_STRIDE) * sizeof(float);
    CUDA_LAUNCH((multiply_few<X, W, rows>), grid, (unsigned)(warps * WARP), shared, p);
}

static void start(struct few p, enum dtype x, enum dtype w) {
    if (p.rows == 0 || p.out == 0)
        return;
    if (w == DTYPE_BF16 && p.rows <= ROWS)
        launch<bf16, bf16, ROWS>(p);
    else if (w == DTYPE_BF16)
        launch<bf16, bf16, MANY_ROWS>(p);
    else
        WITH_FLOAT(x, X, launch<X, float, ROWS>(p));
}

bool few_forward(struct tensor x, struct tensor rows, struct tensor offsets, struct packed w, struct tensor y, bool accumulate) {
    if (!fits(x, offsets, w, y.shape[0]))
        return false;
    struct few p = few_of(x, rows, offsets, w, y);
    if (accumulate)
        p.base = p.y;
    start(p, x.dtype, w.dtype);
    return true;
}

bool few_forward_onto(struct tensor x, struct packed w, struct tensor base, struct tensor y) {
    if (!fits(x, tensor_none(), w, y.shape[0]))
        return false;
    struct few p = few_of(x, tensor_none(), tensor_none(), w, y);
    p.base = anywhere_of(base.data, base.dtype);
    start(p, x.dtype, w.dtype);
    return true;
}

bool few_swiglu_forward(struct tensor x, struct tensor rows, struct tensor offsets, struct packed gate_weight,
                        struct packed up_weight, struct tensor row_weight, struct tensor gate, struct tensor up,
                        struct tensor act) {
    if (!fits(x, offsets, gate_weight, gate.shape[0]) || !fits(x, offsets, up_weight, gate.shape[0]))
        return false;
    struct few p = few_of(x, rows, offsets, gate_weight, gate);
    CHECK(up_weight.dtype == gate_weight.dtype && up_weight.out == p.out && up_weight.in == p.in && tensor_same_shape(up, gate));
    p.up_w = up_weight.data;
    p.up = anywhere_of(up.data, up.dtype);
    if (tensor_exists(act))
        p.act = anywhere_of(act.data, act.dtype);
    p.row_weight = (const float *)row_weight.data;
    start(p, x.dtype, gate_weight.dtype);
    return true;
}
