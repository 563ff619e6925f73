/* Products of every dtype, shape and alignment on the ordinary units, and the table's entries: few rows go to few.cu, what Hopper's
 * matrix units can take to product_sm90.cu, other bf16 with whole eights to product_mma.cu. */
#include "kernels/cuda/few.cuh"
#include "kernels/cuda/product.cuh"
#include "kernels/cuda/product_tiles.cuh"
#include "kernels/cuda/skinny.cuh"

enum { THREADS = 256, TILE_K = 16 };

template <typename T>
static __device__ __forceinline__ float load_from(const struct side &s, int64_t group, int64_t row, int64_t k) {
    if (s.index) {
        if (s.index_along_k)
            k = s.index[k];
        else
            row = s.index[row];
    }
    return to_float(((const T *)s.data)[group * s.group + row * s.step + k * s.inner]);
}

/* `rows` rows of a side from `first` on, 16 of k from `k` on, into shared memory [k][row]; zeros outside. */
template <typename T, int rows>
static __device__ __forceinline__ void load_tile(const struct side &s, int64_t group, int64_t first, int64_t end, int64_t k,
                                                 int64_t k_end, float (*to)[rows + 4]) {
    for (int i = (int)threadIdx.x; i < rows * TILE_K; i += THREADS) {
        int row = s.inner == 1 ? i / TILE_K : i % rows, kk = s.inner == 1 ? i % TILE_K : i / rows;
        bool inside = first + row < end && k + kk < k_end;
        to[kk][row] = inside ? load_from<T>(s, group, first + row, k + kk) : 0;
    }
}

template <typename A, typename B, typename C, int tile_m, int tile_n>
static __global__ void multiply(const struct product p) {
    enum { LANES_N = tile_n == 64 ? 16 : 8, LANES_M = THREADS / LANES_N, EACH_M = tile_m / LANES_M, EACH_N = tile_n / LANES_N };
    CUDA_SHARED float a[TILE_K][tile_m + 4];
    CUDA_SHARED float b[TILE_K][tile_n + 4];
    const struct task task = find_task(p, tile_m, tile_n);
    const struct place rows = task.rows;
    int64_t n = task.n, k = task.k, k_end = task.k_end;
    int lane_n = (int)threadIdx.x % LANES_N, lane_m = (int)threadIdx.x / LANES_N;
    float sum[EACH_M][EACH_N];
    for (int i = 0; i < EACH_M; i++)
        for (int j = 0; j < EACH_N; j++)
            sum[i][j] = 0;
    for (; k < k_end; k += TILE_K) {
        load_tile<A, tile_m>(p.a, p.groups_along_k ? 0 : rows.group, rows.begin, rows.end, k, k_end, a);
        load_tile<B, tile_n>(p.b, p.groups_along_k ? 0 : rows.group, n, p.n, k, k_end, b);
        __syncthreads();
#pragma unroll
        for (int kk = 0; kk < TILE_K; kk++) {
            float left[EACH_M], right[EACH_N];
#pragma unroll
            for (int i = 0; i < EACH_M; i++)
                left[i] = a[kk][lane_m + LANES_M * i];
#pragma unroll
            for (int j = 0; j < EACH_N; j++)
                right[j] = b[kk][lane_n + LANES_N * j];
#pragma unroll
            for (int i = 0; i < EACH_M; i++)
#pragma unroll
                for (int j = 0; j < EACH_N; j++)
                    sum[i][j] += left[i] * right[j];
        }
        __syncthreads();
    }
    for (int i = 0; i < EACH_M; i++)
        for (int j = 0; j < EACH_N; j++) {
            int64_t m = rows.begin + lane_m + LANES_M * i, column = n + lane_n + LANES_N * j;
            if (m >= rows.end || column >= p.n)
                continue;
            if (p.splits > 1) {
                p.part[((int64_t)task.split * p.m + m) * p.n + column] = sum[i][j];
            } else {
                C *c = (C *)p.c + (p.groups_along_k ? rows.group * p.c_group : 0) + m * p.c_m + column * p.c_n;
                store(c, p.accumulate ? to_float(*c) + sum[i][j] : sum[i][j]);
            }
        }
}

template <typename A, typename B, typename C, int tile_m, int tile_n> static void start_tiles(struct product p) {
    dim3 grid = product_grid(&p, tile_m, tile_n);
    CUDA_LAUNCH((multiply<A, B, C, tile_m, tile_n>), grid, THREADS, 0, p);
    product_add_splits<C>(p);
}

template <typename A, typename B, typename C> static void start(struct product p) {
    if (p.n <= 16)
        start_tiles<A, B, C, 128, 16>(p);
    else
        start_tiles<A, B, C, 64, 64>(p);
}

static void run(struct product p, enum dtype a, enum dtype b, enum dtype c) {
    if (p.m == 0 || p.n == 0 || (p.k == 0 && p.accumulate))
        return;
    if (a == DTYPE_BF16 && b == DTYPE_BF16 && mma_product(p, c))
        return;
    WITH_FLOAT(a, A, WITH_FLOAT(b, B, WITH_FLOAT(c, C, start<A, B, C>(p))));
}

static void swap_sides(struct product *p) {
    struct side a = p->a;
    int64_t m = p->m, c_m = p->c_m;
    p->a = p->b, p->b = a;
    p->m = p->n, p->n = m;
    p->c_m = p->c_n, p->c_n = c_m;
}

static void gemm(struct tensor a, bool transpose_a, struct tensor b, bool transpose_b, struct tensor c, bool accumulate) {
    struct product p = {};
    p.m = a.shape[transpose_a];
    p.k = a.shape[!transpose_a];
    p.n = b.shape[!transpose_b];
    CHECK_OP(b.shape[transpose_b], ==, p.k);
    CHECK(c.shape[0] == p.m && c.shape[1] == p.n);
    if (skinny_gemm(a, transpose_a, b, transpose_b, c, accumulate))
        return;
    struct packed right = {b.data, b.dtype, 1, p.n, p.k, false};
    if (!transpose_a && transpose_b && few_forward(a, tensor_none(), tensor_none(), right, c, accumulate))
        return;
    enum dtype a_dtype = a.dtype, b_dtype = b.dtype;
    p.a.data = a.data, p.a.step = transpose_a ? 1 : p.k, p.a.inner = transpose_a ? p.m : 1;
    p.b.data = b.data, p.b.step = transpose_b ? p.k : 1, p.b.inner = transpose_b ? 1 : p.n;
    p.c = c.data, p.c_m = p.n, p.c_n = 1;
    p.groups = 1;
    p.accumulate = accumulate;
    if (p.m <= 16 && p.n > 16) {
        swap_sides(&p);
        a_dtype = b.dtype, b_dtype = a.dtype;
    }
    run(p, a_dtype, b_dtype, c.dtype);
}

static const int32_t *index_of(struct tensor rows) {
    return (const int32_t *)rows.data;
}

/* y [N,columns] = x[rows] w: the inner dimension's step and the column's step in w. */
static void rows_product(struct tensor x, struct tensor rows, struct tensor offsets, struct packed w, bool backward,
                         struct tensor y, bool accumulate) {
    struct product p = {};
    p.m = y.shape[0];
    p.n = backward ? w.in : w.out;
    p.k = backward ? w.out : w.in;
    CHECK(x.shape[1] == p.k && y.shape[1] == p.n && x.dtype == w.dtype);
    p.a.data = x.data, p.a.index = index_of(rows), p.a.step = p.k, p.a.inner = 1;
    p.b.data = w.data, p.b.step = backward ? 1 : w.in, p.b.inner = backward ? w.in : 1, p.b.group = w.out * w.in;
    p.c = y.data, p.c_m = p.n, p.c_n = 1;
    p.offsets = index_of(offsets);
    p.groups = (int)w.groups;
    p.accumulate = accumulate;
    run(p, x.dtype, w.dtype, y.dtype);
}

/* ---- the table --------------------------------------------------------------------------------------------------- */

static void product_forward(struct tensor x, struct tensor rows, struct tensor offsets, struct packed w, struct tensor y,
                            bool accumulate) {
    if (y.shape[0] > 0 && !few_forward(x, rows, offsets, w, y, accumulate) && !sm90_forward(x, rows, offsets, w, y, accumulate))
        rows_product(x, rows, offsets, w, false, y, accumulate);
}

static void product_backward_input(struct tensor dy, struct tensor rows, struct tensor offsets, struct packed w, struct tensor dx,
                                   bool accumulate) {
    struct product_term term = {dy, w};
    if (dx.shape[0] > 0 && !sm90_backward_inputs(&term, 1, rows, offsets, dx, accumulate))
        rows_product(dy, rows, offsets, w, true, dx, accumulate);
}

static void product_backward_weight(struct tensor dy, struct tensor dy_rows, struct tensor x, struct tensor x_rows,
                                    struct tensor offsets, struct tensor dw, bool accumulate) {
    int64_t n = tensor_exists(x_rows) ? tensor_elements(x_rows) : x.shape[0];
    if (n == 0 && !accumulate)
        kernels_cuda()->fill(dw, 0);
    if (n == 0 || sm90_backward_weight(dy, dy_rows, x, x_rows, offsets, dw, accumulate))
        return;
    struct product p = {};
    p.m = dy.shape[1];
    p.n = x.shape[1];
    p.k = n;
    p.a.data = dy.data, p.a.index = index_of(dy_rows), p.a.step = 1, p.a.inner = p.m, p.a.index_along_k = true;
    p.b.data = x.data, p.b.index = index_of(x_rows), p.b.step = 1, p.b.inner = p.n, p.b.index_along_k = true;
    p.c = dw.data, p.c_m = p.n, p.c_n = 1, p.c_group = p.m * p.n;
    p.offsets = index_of(offsets);
    p.groups = p.offsets ? (int)dw.shape[0] : 1;
    p.groups_along_k = true;
    p.accumulate = accumulate;
    run(p, dy.dtype, x.dtype, dw.dtype);
}

static void product_forward_onto(struct tensor x, struct packed w, struct tensor base, struct tensor y) {
    if (y.shape[0] == 0 || few_forward_onto(x, w, base, y) || sm90_forward_onto(x, w, base, y))
        return;
    kernels_cuda()->cast(base, y);
    product_forward(x, tensor_none(), tensor_none(), w, y, true);
}

static void product_swiglu_forward(struct tensor x, struct tensor rows, struct tensor offsets, struct packed gate_weight,
                                   struct packed up_weight, struct tensor row_weight, struct tensor gate, struct tensor up,
                                   struct tensor act) {
    if (gate.shape[0] == 0 || few_swiglu_forward(x, rows, offsets, gate_weight, up_weight, row_weight, gate, up, act) ||
        sm90_swiglu_forward(x, rows, offsets, gate_weight, up_weight, row_weight, gate, up, act))
        return;
    product_forward(x, rows, offsets, gate_weight, gate, false);
    product_forward(x, rows, offsets, up_weight, up, false);
    if (tensor_exists(act))
        kernels_cuda()->swiglu_forward(gate, up, row_weight, act);
}

static void product_swiglu_backward(struct tensor dy, struct tensor rows, struct tensor offsets, struct packed w,
                                    struct tensor gate, struct tensor up, struct tensor row_weight, struct tensor act,
                                    struct tensor dact, struct tensor drow_weight) {
    const struct kernel_ops *ops = kernels_cuda();
    if (gate.shape[0] == 0 || sm90_swiglu_backward(dy, rows, offsets, w, gate, up, row_weight, act, drow_weight))
        return;
    ops->swiglu_forward(gate, up, row_weight, act);
    product_backward_input(dy, rows, offsets, w, dact, false);
    ops->swiglu_backward(dact, gate, up, row_weight, gate, up, drow_weight);
}

static void product_backward_inputs(const struct product_term *terms, int term_count, struct tensor offsets, struct tensor dx,
                                    bool accumulate) {
    CHECK(term_count >= 1 && term_count <= PRODUCT_TERMS_MAX);
    if (dx.shape[0] == 0 || sm90_backward_inputs(terms, term_count, tensor_none(), offsets, dx, accumulate))
        return;
    for (int i = 0; i < term_count; i++)
        product_backward_input(terms[i].dy, tensor_none(), offsets, terms[i].w, dx, accumulate || i > 0);
}

void product_fill_cuda(struct kernel_ops *ops) {
    ops->gemm = gemm;
    ops->gemm_mixes_dtypes = true;
    ops->product_forward = product_forward;
    ops->product_backward_input = product_backward_input;
    ops->product_backward_weight = product_backward_weight;
    ops->product_forward_onto = product_forward_onto;
    ops->product_swiglu_forward = product_swiglu_forward;
    ops->product_swiglu_backward = product_swiglu_backward;
    ops->product_backward_inputs = product_backward_inputs;
}
