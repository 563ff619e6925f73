/* RMS norms of rows, and of heads with the rotary position behind it.
 *
 * Rows of whole eights of elements lie in registers while they are worked on, so that memory is read once; any other row is
 * read twice by plain loops. The gradient of the weight is summed in f32 over the rows of each part, whose
 * number is given by the shape alone, then over the parts in f64, in their order.
 *
 * A gradient that comes from a router and its experts is summed on its way: rows of it are read where the experts left them.
 *
 * What training runs, operands of its dtypes at aligned addresses, has kernels of its own; for all others there is one, where
 * `struct anywhere` stands for every pointer and which adds in the same order. */
#include "kernels/cuda/eights.cuh"

enum {
    ROW_THREADS = 256,
    WARP_WIDTH_MAX = 1024,  /* rows up to it are a warp's; longer ones a block's */
    BLOCK_WIDTH_MAX = 8192, /* 4 vectors of eight for each of 256 threads */
    PART_BLOCKS = 132 * 4,  /* of a backward pass: each leaves sums of dweight for its rows */
    ROUTED_WIDTH = 2048,    /* of routed gradients, by 256 threads; twice and four times as much by 512 */
    ROUTED_WIDTH_MAX = 4 * ROUTED_WIDTH,
    ROUTED_THREADS = 768,   /* of a processor, three blocks for rows of that width */
    ROUTED_AHEAD = 2,       /* rows of experts on their way to a thread */
    ROUTED_EXPERTS = 2,     /* scores of them that are worked on at once */
    ROUTED_EXPERTS_MAX = 8, /* whose weights lie in shared memory, where these bytes hold them */
    ROUTED_SHARED_MAX = 96 << 10,
    HEAD_LANE_ELEMENTS = 16 /* of a head, by one lane: eight of the first half and their partners in the second */
};

/* Squares beyond the range of f32, or so small that they lose digits which epsilon does not hide, are summed again in f64 by
 * each thread alone: rows that hardly occur. */
template <typename X> static __device__ float rstd_of(float sum, X row, int width, float epsilon) {
    if (sum > 3e38f || (sum < 1e-20f && epsilon < 1e-25f)) {
        double wide = 0;
        for (int i = 0; i < width; i++)
            wide += (double)to_float(row[i]) * (double)to_float(row[i]);
        return (float)(1 / sqrt(wide / width + (double)epsilon));
    }
    return 1 / sqrtf(sum / (float)width + epsilon);
}

/* ---- who works on a row: a warp of the block, or the block ---------------------------------------------------------- */

template <bool whole> struct team {
    int rank, size;
    int64_t first, count; /* of all teams of the grid */

    __device__ team() {
        size = whole ? (int)blockDim.x : WARP;
        rank = whole ? (int)threadIdx.x : (int)threadIdx.x % WARP;
        int teams = (int)blockDim.x / size;
        first = (int64_t)blockIdx.x * teams + (int)threadIdx.x / size;
        count = (int64_t)gridDim.x * teams;
    }

    __device__ float sum(float x) const {
        return whole ? block_sum(x) : warp_sum(x);
    }
};

/* ---- rows in registers ---------------------------------------------------------------------------------------------- */

/* X, Y, W and so on: pointers, aligned to 16, or struct anywhere. */
template <typename X, typename Y, typename W, int vectors, bool whole>
static __global__ void norm_forward(X x, W weight, float epsilon, int64_t rows, int width, Y y, float *rstd) {
    team<whole> t;
    for (int64_t row = t.first; row < rows; row += t.count) {
        float v[vectors][8], squares = 0;
        for (int n = 0; n < vectors; n++) {
            int i = (n * t.size + t.rank) * 8;
            if (i < width) {
                load_eight(x + row * width + i, v[n]);
                for (int e = 0; e < 8; e++)
                    squares += v[n][e] * v[n][e];
            }
        }
        float scale = rstd_of(t.sum(squares), x + row * width, width, epsilon);
        if (t.rank == 0)
            rstd[row] = scale;
        for (int n = 0; n < vectors; n++) {
            int i = (n * t.size + t.rank) * 8;
            if (i < width) {
                float w[8];
                load_eight(weight + i, w);
                for (int e = 0; e < 8; e++)
                    v[n][e] *= scale * w[e];
                store_eight(y + row * width + i, v[n]);
            }
        }
    }
}

static __device__ __forceinline__ bool is_given(const bf16 *to) {
    return to != NULL;
}

static __device__ __forceinline__ bool is_given(struct anywhere to) {
    return to.data != NULL;
}

/* Eight elements of a row, the first time: x becomes the normed one, d the gradient of the normed, of whose share in dweight and
 * in the row's mean the sums go on. */
static __device__ __forceinline__ void weigh_eight(float x[8], float d[8], const float w[8], float scale, float dw[8],
                                                   float *mean) {
    for (int e = 0; e < 8; e++) {
        x[e] *= scale;
        dw[e] += d[e] * x[e];
        d[e] *= w[e];
        *mean += d[e] * x[e];
    }
}

/* And the second time, with the mean: dx += . */
static __device__ __forceinline__ void add_eight(const float normed[8], const float d[8], float scale, float mean, float dx[8]) {
    for (int e = 0; e < 8; e++)
        dx[e] += scale * (d[e] - normed[e] * mean);
}

/* parts [teams, width]: of dweight, for the rows of each team. dx may be dy: a row is read before it is written. copy: of dx,
 * where it is given. */
template <typename DY, typename X, typename DX, typename COPY, typename W, int vectors, bool whole>
static __global__ void norm_backward(DY dy, X x, W weight, const float *rstd, int64_t rows, int width, DX dx, COPY copy,
                                     bool accumulate, float *parts) {
    team<whole> t;
    float dw[vectors][8] = {{0}};
    for (int64_t row = t.first; row < rows; row += t.count) {
        float normed[vectors][8], dnormed[vectors][8], before[vectors][8] = {{0}}, scale = rstd[row], mean = 0;
        for (int n = 0; n < vectors; n++) {
            int i = (n * t.size + t.rank) * 8;
            if (i < width) {
                float w[8];
                load_eight(x + row * width + i, normed[n]);
                load_eight(dy + row * width + i, dnormed[n]);
                load_eight(weight + i, w);
                if (accumulate)
                    load_eight(dx + row * width + i, before[n]);
                weigh_eight(normed[n], dnormed[n], w, scale, dw[n], &mean);
            }
        }
        mean = t.sum(mean) / (float)width;
        for (int n = 0; n < vectors; n++) {
            int i = (n * t.size + t.rank) * 8;
            if (i < width) {
                add_eight(normed[n], dnormed[n], scale, mean, before[n]);
                store_eight(dx + row * width + i, before[n]);
                if (is_given(copy))
                    store_eight(copy + row * width + i, before[n]);
            }
        }
    }
    for (int n = 0; n < vectors; n++) {
        int i = (n * t.size + t.rank) * 8;
        if (i < width)
            store_eight(parts + t.first * width + i, dw[n]);
    }
}

/* ---- the gradient from a router and its experts ----------------------------------------------------------------------- */

struct routed {
    const int32_t *slot_row;
    const float *dlogits, *weight; /* of the router */
    const float *base;             /* [S,D]: dlogits weight, where it was made before; else NULL */
    int experts, choices;          /* choices <= WARP */
};

/* What a token has one of for each choice and each expert: one a lane. */
struct routed_token {
    int32_t row;
    float dlogit, rstd;
};

static __device__ __forceinline__ struct routed_token token_of(const struct routed &r, const float *rstd, int64_t s) {
    int lane = (int)threadIdx.x % WARP;
    struct routed_token t = {-1, 0, rstd[s]};
    if (lane < r.choices)
        t.row = r.slot_row[s * r.choices + lane];
    if (!r.base && lane < r.experts)
        t.dlogit = r.dlogits[s * r.experts + lane];
    return t;
}

/* d = the sum of the rows of a token's choices, from column i on. All lanes of a warp come here. */
template <typename ROW>
static __device__ __forceinline__ void sum_choices(const ROW *rows, const struct routed &r, const struct routed_token &t, int width,
                                                   int i, bool is_here, float d[8]) {
    for (int e = 0; e < 8; e++)
        d[e] = 0;
#pragma unroll 1 /* registers are short */
    for (int k = 0; k < r.choices; k += ROUTED_AHEAD) {
        float x[ROUTED_AHEAD][8];
        int32_t at[ROUTED_AHEAD];
#pragma unroll
        for (int n = 0; n < ROUTED_AHEAD; n++) {
            at[n] = __shfl_sync(FULL_WARP, t.row, k + n); /* -1 from lanes beyond the choices */
            if (at[n] >= 0 && is_here)
                load_eight(rows + (int64_t)at[n] * width + i, x[n]);
        }
#pragma unroll
        for (int n = 0; n < ROUTED_AHEAD; n++)
            if (at[n] >= 0 && is_here) {
#pragma unroll
                for (int e = 0; e < 8; e++)
                    d[e] += x[n][e];
            }
    }
}

/* d += the gradient through the scores. weights [experts, 2, width / 2], in shared memory; zeros follow up to ROUTED_EXPERTS. All
 * lanes of a warp come here. */
static __device__ __forceinline__ void add_scores(const float *weights, const struct routed &r, const struct routed_token &t,
                                                  int width, int i, bool is_here, float d[8]) {
#pragma unroll 1
    for (int first = 0; first < r.experts; first += ROUTED_EXPERTS)
#pragma unroll
        for (int n = 0; n < ROUTED_EXPERTS; n++) {
            float w[8], dlogit = __shfl_sync(FULL_WARP, t.dlogit, first + n);
            if (!is_here)
                continue;
            const float *low = weights + (first + n) * width + i / 2;
            get_halves(low, low + width / 2, w);
#pragma unroll
            for (int e = 0; e < 8; e++)
                d[e] += dlogit * w[e];
        }
}

static __device__ void stage_weights(const struct routed &r, int width, float *to) {
    int padded = (r.experts + ROUTED_EXPERTS - 1) / ROUTED_EXPERTS * ROUTED_EXPERTS;
    for (int e = 0; e < padded; e++)
        for (int i = (int)threadIdx.x * 8; i < width; i += (int)blockDim.x * 8) {
            float w[8] = {0}, *low = to + e * width + i / 2;
            if (e < r.experts)
                load_eight(r.weight + (int64_t)e * width + i, w);
            put_halves(low, low + width / 2, w);
        }
    __syncthreads();
}

/* As norm_backward, of a dy that is never written; a row is a block's. What says where a row's gradient lies is loaded a row
 * ahead. */
template <typename ROW, int vectors, int threads, int blocks>
static __global__ void __launch_bounds__(threads, blocks)
    routed_backward(const ROW *from, const struct routed r, const float *x, const float *weight, const float *rstd, int64_t rows,
                    int width, float *dx, bf16 *copy, bool accumulate, float *parts) {
    CUDA_SHARED_DYNAMIC(float, weights);
    if (!r.base)
        stage_weights(r, width, weights);
    team<true> t;
    float dw[vectors][8] = {{0}};
    struct routed_token next = token_of(r, rstd, t.first);
    for (int64_t row = t.first; row < rows; row += t.count) {
        struct routed_token token = next;
        next = token_of(r, rstd, row + t.count < rows ? row + t.count : row);
        float normed[vectors][8], d[vectors][8], before[vectors][8] = {{0}}, scale = token.rstd, mean = 0;
#pragma unroll
        for (int n = 0; n < vectors; n++) {
            int i = (n * t.size + t.rank) * 8;
            bool is_here = i < width;
            int64_t at = row * width + i;
            if (is_here) {
                load_eight(x + at, normed[n]);
                if (accumulate)
                    load_eight(dx + at, before[n]);
            }
            sum_choices(from, r, token, width, i, is_here, d[n]);
            if (!r.base)
                add_scores(weights, r, token, width, i, is_here, d[n]);
            if (is_here) {
                float w[8];
                if (r.base) {
                    load_eight(r.base + at, w);
                    for (int e = 0; e < 8; e++)
                        d[n][e] += w[e];
                }
                load_eight(weight + i, w);
                weigh_eight(normed[n], d[n], w, scale, dw[n], &mean);
            }
        }
        mean = t.sum(mean) / (float)width;
#pragma unroll
        for (int n = 0; n < vectors; n++) {
            int i = (n * t.size + t.rank) * 8;
            if (i < width) {
                add_eight(normed[n], d[n], scale, mean, before[n]);
                store_eight(dx + row * width + i, before[n]);
                store_eight(copy + row * width + i, before[n]);
            }
        }
    }
    for (int n = 0; n < vectors; n++) {
        int i = (n * t.size + t.rank) * 8;
        if (i < width)
            store_eight(parts + t.first * width + i, dw[n]);
    }
}

/* ---- rows of any width and address ---------------------------------------------------------------------------------- */

static __global__ void norm_forward_plain(struct anywhere x, const float *weight, float epsilon, int64_t rows, int width,
                                          struct anywhere y, float *rstd) {
    team<true> t;
    for (int64_t row = t.first; row < rows; row += t.count) {
        float squares = 0;
        for (int i = t.rank; i < width; i += t.size) {
            float v = x[row * width + i];
            squares += v * v;
        }
        float scale = rstd_of(t.sum(squares), x + row * width, width, epsilon);
        if (t.rank == 0)
            rstd[row] = scale;
        for (int i = t.rank; i < width; i += t.size)
            store(y + row * width + i, x[row * width + i] * (scale * weight[i]));
    }
}

static __global__ void norm_backward_plain(struct anywhere dy, struct anywhere x, const float *weight, const float *rstd,
                                           int64_t rows, int width, struct anywhere dx, struct anywhere copy, bool accumulate,
                                           float *parts) {
    team<true> t;
    float *dw = parts + t.first * width; /* a thread comes to the same columns in every row */
    for (int64_t row = t.first; row < rows; row += t.count) {
        float scale = rstd[row], mean = 0;
        for (int i = t.rank; i < width; i += t.size)
            mean += dy[row * width + i] * weight[i] * (x[row * width + i] * scale);
        mean = t.sum(mean) / (float)width;
        for (int i = t.rank; i < width; i += t.size) {
            int64_t at = row * width + i;
            float normed = x[at] * scale, d = dy[at];
            dw[i] = (row == t.first ? 0 : dw[i]) + d * normed;
            store(dx + at, (accumulate ? dx[at] : 0) + scale * (d * weight[i] - normed * mean));
            if (is_given(copy))
                store(copy + at, dx[at]);
        }
    }
}

/* dweight += the sum of the parts: 32 columns a block, every warp a part in eight. */
static __global__ void add_parts(const float *parts, int64_t part_count, int width, float *dweight) {
    CUDA_SHARED double share[8][WARP];
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP, i = (int)blockIdx.x * WARP + lane;
    double sum = 0;
    if (i < width)
        for (int64_t part = warp; part < part_count; part += 8)
            sum += (double)parts[part * width + i];
    share[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && i < width) {
        for (int other = 1; other < 8; other++)
            sum += share[other][lane];
        dweight[i] += (float)sum;
    }
}

static void launch_add_parts(const float *parts, int64_t part_count, int64_t width, float *dweight) {
    CUDA_LAUNCH(add_parts, (unsigned)ceil_div(width, WARP), 8 * WARP, 0, parts, part_count, (int)width, dweight);
}

/* ---- heads ---------------------------------------------------------------------------------------------------------- */

struct rope {
    const float *table; /* [positions, width]: cosines, then sines; where heads are in registers by an argument of its own */
    int64_t rows;       /* heads of all tokens */
    int64_t heads, sequence_length, first_position;
    int width;
};

/* Where the angles of a row begin in the table. */
static __device__ __forceinline__ int64_t angles_of(const struct rope &r, int64_t row) {
    return (r.first_position + row / r.heads % r.sequence_length) * r.width;
}

/* a c - b s, alike in all kernels: which product is fused with the difference is not left to the compiler. */
static __device__ __forceinline__ float turned(float a, float c, float b, float s) {
    return fmaf(a, c, -(b * s));
}

/* `lanes` neighbours have a head together. All lanes of a warp come here. */
template <int lanes> static __device__ __forceinline__ float head_sum(float x) {
    for (int distance = lanes / 2; distance > 0; distance /= 2)
        x += __shfl_xor_sync(FULL_WARP, x, distance);
    return x;
}

template <typename X, typename Y, typename W, int lanes>
static __global__ void rope_forward(X x, W weight, W table, float epsilon, struct rope r, Y y, float *rstd) {
    enum { WIDTH = lanes * HEAD_LANE_ELEMENTS, HALF = WIDTH / 2 };
    int64_t thread = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, row = thread / lanes;
    int i = (int)(thread % lanes) * 8;
    bool is_here = row < r.rows;
    float v[2][8] = {{0}}, squares = 0;
    if (is_here)
        for (int half = 0; half < 2; half++) {
            load_eight(x + row * WIDTH + half * HALF + i, v[half]);
            for (int e = 0; e < 8; e++)
                squares += v[half][e] * v[half][e];
        }
    squares = head_sum<lanes>(squares);
    if (!is_here)
        return;
    float scale = rstd_of(squares, x + row * WIDTH, WIDTH, epsilon), w[8], cosine[8], sine[8];
    if (i == 0)
        rstd[row] = scale;
    for (int half = 0; half < 2; half++) {
        load_eight(weight + half * HALF + i, w);
        for (int e = 0; e < 8; e++)
            v[half][e] *= scale * w[e];
    }
    load_eight(table + angles_of(r, row) + i, cosine);
    load_eight(table + angles_of(r, row) + HALF + i, sine);
    for (int e = 0; e < 8; e++) {
        float a = v[0][e], b = v[1][e];
        v[0][e] = turned(a, cosine[e], b, sine[e]);
        v[1][e] = turned(b, cosine[e], -a, sine[e]);
    }
    store_eight(y + row * WIDTH + i, v[0]);
    store_eight(y + row * WIDTH + HALF + i, v[1]);
}

/* The block's sum of what each thread has for its columns, into part [width]. */
template <int lanes> static __device__ void store_part(float dw[2][8], float *part) {
    enum { WIDTH = lanes * HEAD_LANE_ELEMENTS };
    CUDA_SHARED float share[ROW_THREADS / WARP][WIDTH];
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    for (int half = 0; half < 2; half++)
        for (int e = 0; e < 8; e++) {
            float sum = dw[half][e];
            for (int distance = lanes; distance < WARP; distance *= 2)
                sum += __shfl_xor_sync(FULL_WARP, sum, distance);
            if (lane < lanes)
                share[warp][half * WIDTH / 2 + lane * 8 + e] = sum;
        }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < WIDTH; i += (int)blockDim.x) {
        float sum = 0;
        for (int other = 0; other < ROW_THREADS / WARP; other++)
            sum += share[other][i];
        part[i] = sum;
    }
}

template <typename DY, typename X, typename DX, typename W, int lanes>
static __global__ void rope_backward(DY dy, X x, W weight, W table, const float *rstd, struct rope r, DX dx, float *parts) {
    enum { WIDTH = lanes * HEAD_LANE_ELEMENTS, HALF = WIDTH / 2 };
    int i = (int)threadIdx.x % lanes * 8;
    int64_t block_rows = blockDim.x / lanes, stride = gridDim.x * block_rows;
    float dw[2][8] = {{0}};
    for (int64_t first = blockIdx.x * block_rows; first < r.rows; first += stride) { /* the same rounds for all threads */
        int64_t row = first + threadIdx.x / lanes;
        bool is_here = row < r.rows;
        float normed[2][8] = {{0}}, d[2][8] = {{0}}, scale = 0, mean = 0;
        if (is_here) {
            float cosine[8], sine[8];
            load_eight(x + row * WIDTH + i, normed[0]);
            load_eight(x + row * WIDTH + HALF + i, normed[1]);
            load_eight(dy + row * WIDTH + i, d[0]);
            load_eight(dy + row * WIDTH + HALF + i, d[1]);
            load_eight(table + angles_of(r, row) + i, cosine);
            load_eight(table + angles_of(r, row) + HALF + i, sine);
            scale = rstd[row];
            for (int e = 0; e < 8; e++) {
                float a = d[0][e], b = d[1][e];
                d[0][e] = turned(a, cosine[e], -b, sine[e]);
                d[1][e] = turned(b, cosine[e], a, sine[e]);
            }
            for (int half = 0; half < 2; half++) {
                float w[8];
                load_eight(weight + half * HALF + i, w);
                for (int e = 0; e < 8; e++) {
                    normed[half][e] *= scale;
                    dw[half][e] += d[half][e] * normed[half][e];
                    d[half][e] *= w[e];
                    mean += d[half][e] * normed[half][e];
                }
            }
        }
        mean = head_sum<lanes>(mean) / (float)WIDTH;
        if (is_here)
            for (int half = 0; half < 2; half++) {
                for (int e = 0; e < 8; e++)
                    d[half][e] = scale * (d[half][e] - normed[half][e] * mean);
                store_eight(dx + row * WIDTH + half * HALF + i, d[half]);
            }
    }
    store_part<lanes>(dw, parts + (int64_t)blockIdx.x * WIDTH);
}

/* Any width: a warp for each head. */
static __global__ void rope_forward_plain(struct anywhere x, const float *weight, float epsilon, struct rope r,
                                          struct anywhere y, float *rstd) {
    team<false> t;
    int half = r.width / 2;
    for (int64_t row = t.first; row < r.rows; row += t.count) {
        struct anywhere from = x + row * r.width;
        float squares = 0;
        for (int i = t.rank; i < r.width; i += t.size)
            squares += from[i] * from[i];
        float scale = rstd_of(t.sum(squares), from, r.width, epsilon);
        if (t.rank == 0)
            rstd[row] = scale;
        const float *angles = r.table + angles_of(r, row);
        for (int i = t.rank; i < half; i += t.size) {
            float a = from[i] * (scale * weight[i]), b = from[half + i] * (scale * weight[half + i]);
            store(y + row * r.width + i, a * angles[i] - b * angles[half + i]);
            store(y + row * r.width + half + i, b * angles[i] + a * angles[half + i]);
        }
    }
}

static __global__ void rope_backward_plain(struct anywhere dy, struct anywhere x, const float *weight, const float *rstd,
                                           struct rope r, struct anywhere dx, float *parts) {
    team<false> t;
    int half = r.width / 2;
    float *dw = parts + t.first * r.width; /* a lane comes to the same pairs in every row */
    for (int64_t row = t.first; row < r.rows; row += t.count) {
        const float *angles = r.table + angles_of(r, row);
        float scale = rstd[row], mean = 0;
        for (int round = 0; round < 2; round++) {
            for (int i = t.rank; i < half; i += t.size) {
                int64_t at = row * r.width + i;
                float c = angles[i], s = angles[half + i], da = dy[at], db = dy[at + half];
                float a = x[at] * scale, b = x[at + half] * scale;
                float dna = da * c + db * s, dnb = db * c - da * s;
                if (round == 0) {
                    dw[i] = (row == t.first ? 0 : dw[i]) + dna * a;
                    dw[half + i] = (row == t.first ? 0 : dw[half + i]) + dnb * b;
                    mean += dna * weight[i] * a + dnb * weight[half + i] * b;
                } else {
                    store(dx + at, scale * (dna * weight[i] - a * mean));
                    store(dx + at + half, scale * (dnb * weight[half + i] - b * mean));
                }
            }
            if (round == 0)
                mean = t.sum(mean) / (float)r.width;
        }
    }
}

/* ---- operations ----------------------------------------------------------------------------------------------------- */

static bool is_2d(struct tensor t, int64_t rows, int64_t columns) {
    return t.dim_count == 2 && t.shape[0] == rows && t.shape[1] == columns;
}

static bool is_vector(struct tensor t, int64_t elements) { /* of real numbers */
    return t.dtype == DTYPE_F32 && tensor_elements(t) == elements;
}

static bool is_float(struct tensor t) {
    return t.dtype == DTYPE_F32 || t.dtype == DTYPE_BF16;
}

static bool are_aligned(const void *a, const void *b, const void *c, const void *d) {
    return is_aligned(a, 16) && is_aligned(b, 16) && is_aligned(c, 16) && is_aligned(d, 16);
}

/* CODE with `vectors` and `whole` as a row of the width needs them: at most 8 * vectors elements a thread. */
#define WITH_TEAM_OF(the_vectors, is_whole, ...)                                \
    do {                                                                        \
        constexpr int vectors = the_vectors;                                    \
        constexpr bool whole = is_whole;                                        \
        __VA_ARGS__;                                                            \
    } while (0)
#define WITH_TEAM(width, ...)                                                   \
    do {                                                                        \
        if ((width) <= WARP_WIDTH_MAX / 4)                                      \
            WITH_TEAM_OF(1, false, __VA_ARGS__);                                \
        else if ((width) <= WARP_WIDTH_MAX / 2)                                 \
            WITH_TEAM_OF(2, false, __VA_ARGS__);                                \
        else if ((width) <= WARP_WIDTH_MAX)                                     \
            WITH_TEAM_OF(4, false, __VA_ARGS__);                                \
        else if ((width) <= BLOCK_WIDTH_MAX / 4)                                \
            WITH_TEAM_OF(1, true, __VA_ARGS__);                                 \
        else if ((width) <= BLOCK_WIDTH_MAX / 2)                                \
            WITH_TEAM_OF(2, true, __VA_ARGS__);                                 \
        else                                                                    \
            WITH_TEAM_OF(4, true, __VA_ARGS__);                                 \
    } while (0)
/* The same with as few kernels as will do; vectors beyond the row add nothing. */
#define WITH_LARGEST_TEAM(width, ...)                                           \
    do {                                                                        \
        if ((width) <= WARP_WIDTH_MAX)                                          \
            WITH_TEAM_OF(4, false, __VA_ARGS__);                                \
        else                                                                    \
            WITH_TEAM_OF(4, true, __VA_ARGS__);                                 \
    } while (0)

/* Threads of a block that has one row: no more than the row gives work to. */
static unsigned plain_threads(int64_t width) {
    int64_t warps = ceil_div(width, WARP * 4);
    return (unsigned)((warps < 1 ? 1 : warps > ROW_THREADS / WARP ? ROW_THREADS / WARP : warps) * WARP);
}

static unsigned at_most_blocks(int64_t blocks, int64_t most) {
    return (unsigned)(blocks < most ? blocks : most);
}

static struct anywhere anywhere_of(struct tensor t) {
    return anywhere_of(t.data, t.dtype);
}

static void rmsnorm_forward(struct tensor x, struct tensor weight, double epsilon, struct tensor y, struct tensor rstd) {
    int64_t rows = x.shape[0], width = x.shape[1];
    CHECK(is_float(x) && is_float(y) && is_2d(x, rows, width) && is_2d(y, rows, width));
    CHECK(is_vector(weight, width) && is_vector(rstd, rows) && width <= INT32_MAX);
    if (rows == 0 || width == 0)
        return;
    const float *w = (const float *)weight.data;
    float *r = (float *)rstd.data, e = (float)epsilon;
    struct anywhere from = anywhere_of(x), to = anywhere_of(y), by = anywhere_of(weight);
    int columns = (int)width;
    unsigned one_each = at_most_blocks(rows, INT32_MAX), grid = one_each;
    if (width <= WARP_WIDTH_MAX)
        grid = at_most_blocks(ceil_div(rows, ROW_THREADS / WARP), INT32_MAX);
    if (width % 8 != 0 || width > BLOCK_WIDTH_MAX)
        CUDA_LAUNCH(norm_forward_plain, one_each, plain_threads(width), 0, from, w, e, rows, columns, to, r);
    else if (x.dtype == DTYPE_F32 && are_aligned(x.data, y.data, w, w))
        WITH_FLOAT(y.dtype, Y, {
            typedef const float *X;
            WITH_TEAM(width, CUDA_LAUNCH((norm_forward<X, Y *, X, vectors, whole>), grid, ROW_THREADS, 0, (X)x.data, w, e, rows,
                                         columns, (Y *)y.data, r));
        });
    else
        WITH_LARGEST_TEAM(width, CUDA_LAUNCH((norm_forward<struct anywhere, struct anywhere, struct anywhere, vectors, whole>),
                                             grid, ROW_THREADS, 0, from, by, e, rows, columns, to, r));
}

/* dx_cast may be none. */
static void norm_backward_both(struct tensor dy, struct tensor x, struct tensor weight, struct tensor rstd, struct tensor dx,
                               bool accumulate, struct tensor dweight, struct tensor dx_cast) {
    int64_t rows = x.shape[0], width = x.shape[1];
    CHECK(is_float(dy) && is_float(x) && is_float(dx) && is_2d(dy, rows, width) && is_2d(x, rows, width) &&
          is_2d(dx, rows, width));
    CHECK(is_vector(weight, width) && is_vector(rstd, rows) && is_vector(dweight, width) && width <= INT32_MAX);
    CHECK(dx.data != dy.data || rows == 0 || (!accumulate && dx.dtype == dy.dtype));
    if (rows == 0 || width == 0)
        return;
    const float *w = (const float *)weight.data, *r = (const float *)rstd.data;
    struct anywhere grad = anywhere_of(dy), from = anywhere_of(x), to = anywhere_of(dx), by = anywhere_of(weight);
    struct anywhere copy = {(char *)dx_cast.data, dx_cast.dtype == DTYPE_BF16};
    int columns = (int)width;
    bool is_eights = width % 8 == 0 && width <= BLOCK_WIDTH_MAX, is_warp = is_eights && width <= WARP_WIDTH_MAX;
    int64_t block_teams = is_warp ? ROW_THREADS / WARP : 1;
    unsigned blocks = at_most_blocks(ceil_div(rows, block_teams), PART_BLOCKS);
    int64_t part_count = blocks * block_teams; /* those without a row store zeros */
    float *parts = (float *)cuda_scratch((size_t)(part_count * width) * sizeof *parts);
    bool is_usual = x.dtype == DTYPE_F32 && dx.dtype == DTYPE_F32 && (!copy.data || copy.is_bf16);
    typedef const float *X;
    typedef struct anywhere P;
    if (!is_eights)
        CUDA_LAUNCH(norm_backward_plain, blocks, plain_threads(width), 0, grad, from, w, r, rows, columns, to, copy, accumulate,
                    parts);
    else if (is_usual && are_aligned(dy.data, x.data, dx.data, w) && is_aligned(copy.data, 16))
        WITH_FLOAT(dy.dtype, D, {
            typedef const D *DY;
            WITH_TEAM(width, CUDA_LAUNCH((norm_backward<DY, X, float *, bf16 *, X, vectors, whole>), blocks, ROW_THREADS, 0,
                                         (DY)dy.data, (X)x.data, w, r, rows, columns, (float *)dx.data, (bf16 *)copy.data,
                                         accumulate, parts));
        });
    else
        WITH_LARGEST_TEAM(width, CUDA_LAUNCH((norm_backward<P, P, P, P, P, vectors, whole>), blocks, ROW_THREADS, 0, grad, from,
                                             by, r, rows, columns, to, copy, accumulate, parts));
    launch_add_parts(parts, part_count, width, (float *)dweight.data);
}

static void rmsnorm_backward(struct tensor dy, struct tensor x, struct tensor weight, struct tensor rstd, struct tensor dx,
                             bool accumulate, struct tensor dweight) {
    norm_backward_both(dy, x, weight, rstd, dx, accumulate, dweight, tensor_none());
}

static void rmsnorm_backward_cast(struct tensor dy, struct tensor x, struct tensor weight, struct tensor rstd, struct tensor dx,
                                  bool accumulate, struct tensor dweight, struct tensor dx_cast) {
    CHECK(dx.dtype == DTYPE_F32 && is_float(dx_cast) && tensor_same_shape(dx, dx_cast));
    norm_backward_both(dy, x, weight, rstd, dx, accumulate, dweight, dx_cast);
}

/* CODE with `vectors`, `threads` and `blocks` as a row of the width needs them. */
#define WITH_ROUTED_OF(the_vectors, the_threads, the_blocks, ...)               \
    do {                                                                        \
        constexpr int vectors = the_vectors, threads = the_threads, blocks = the_blocks; \
        __VA_ARGS__;                                                            \
    } while (0)
#define WITH_ROUTED(width, ...)                                                 \
    do {                                                                        \
        if ((width) <= ROUTED_WIDTH)                                            \
            WITH_ROUTED_OF(1, 256, 3, __VA_ARGS__);                             \
        else if ((width) <= 2 * ROUTED_WIDTH)                                   \
            WITH_ROUTED_OF(1, 512, 1, __VA_ARGS__);                             \
        else                                                                    \
            WITH_ROUTED_OF(2, 512, 1, __VA_ARGS__);                             \
    } while (0)

static int64_t routed_shared(struct routed r, int64_t width) {
    return ceil_div(r.experts, ROUTED_EXPERTS) * ROUTED_EXPERTS * width * (int64_t)sizeof(float);
}

static void routed_norm_backward(struct routed_gradient from, struct tensor dy, struct tensor x, struct tensor weight,
                                 struct tensor rstd, struct tensor dx, bool accumulate, struct tensor dweight,
                                 struct tensor dx_cast) {
    const struct kernel_ops *ops = kernels_cuda();
    int64_t rows = x.shape[0], width = x.shape[1], experts = from.dlogits.shape[1], choices = from.slot_row.shape[1];
    CHECK(is_vector(weight, width) && is_vector(rstd, rows) && is_vector(dweight, width) && width <= INT32_MAX);
    CHECK(dx.dtype == DTYPE_F32 && is_2d(dx, rows, width) && is_float(dx_cast) && is_2d(dx_cast, rows, width));
    CHECK(is_float(x) && dy.dtype == DTYPE_F32 && is_2d(dy, rows, width));
    CHECK(is_float(from.rows) && is_2d(from.rows, from.rows.shape[0], width));
    CHECK(from.slot_row.dtype == DTYPE_I32 && is_2d(from.slot_row, rows, choices));
    CHECK(from.dlogits.dtype == DTYPE_F32 && is_2d(from.dlogits, rows, experts));
    CHECK(from.weight.dtype == DTYPE_F32 && is_2d(from.weight, experts, width));
    if (rows == 0 || width == 0)
        return;
    bool is_usual = x.dtype == DTYPE_F32 && dx_cast.dtype == DTYPE_BF16 && choices <= WARP &&
                    are_aligned(from.rows.data, from.weight.data, dy.data, x.data) &&
                    are_aligned(dx.data, dx_cast.data, weight.data, weight.data);
    if (!is_usual || width % 8 != 0 || width > ROUTED_WIDTH_MAX) {
        ops->combine_rows(from.rows, from.slot_row, dy, false);
        ops->gemm(from.dlogits, false, from.weight, false, dy, true);
        norm_backward_both(dy, x, weight, rstd, dx, accumulate, dweight, dx_cast);
        return;
    }
    struct routed r = {(const int32_t *)from.slot_row.data, (const float *)from.dlogits.data, (const float *)from.weight.data, NULL,
                       (int)experts, (int)choices};
    int64_t shared = routed_shared(r, width);
    if (experts > ROUTED_EXPERTS_MAX || shared > ROUTED_SHARED_MAX) {
        ops->gemm(from.dlogits, false, from.weight, false, dy, false);
        r.base = (const float *)dy.data;
        shared = 0;
    }
    const float *w = (const float *)weight.data, *scales = (const float *)rstd.data, *in = (const float *)x.data;
    WITH_FLOAT(from.rows.dtype, ROW, WITH_ROUTED(width, {
                   int64_t block = ceil_div(width, 8 * vectors * WARP) * WARP, most = 132 * (ROUTED_THREADS / block);
                   unsigned grid = at_most_blocks(rows, most);
                   float *parts = (float *)cuda_scratch((size_t)(grid * width) * sizeof *parts);
                   CUDA_LAUNCH((routed_backward<ROW, vectors, threads, blocks>), grid, (unsigned)block, shared,
                               (const ROW *)from.rows.data, r, in, w, scales, rows, (int)width, (float *)dx.data,
                               (bf16 *)dx_cast.data, accumulate, parts);
                   launch_add_parts(parts, grid, width, (float *)dweight.data);
               }));
}

static struct rope rope_of(struct tensor x, struct tensor weight, struct tensor rstd, struct tensor table,
                           int64_t sequence_length, int64_t first_position) {
    int64_t width = tensor_elements(weight), tokens = x.shape[0];
    CHECK(is_float(x) && is_2d(x, tokens, x.shape[1]) && weight.dtype == DTYPE_F32);
    CHECK(width >= 2 && width % 2 == 0 && width <= INT32_MAX && x.shape[1] % width == 0);
    int64_t heads = x.shape[1] / width, used = tokens < sequence_length ? tokens : sequence_length;
    CHECK(is_vector(rstd, tokens * heads) && table.dtype == DTYPE_F32 && is_2d(table, table.shape[0], width));
    CHECK(sequence_length >= 1 && first_position >= 0 && first_position + used <= table.shape[0]);
    struct rope r = {(const float *)table.data, tokens * heads, heads, sequence_length, first_position, (int)width};
    return r;
}

/* Lanes that have a head together in the kernels of heads in registers; 0: heads of another width. */
static int head_lanes(const struct rope &r) {
    return r.width == 64 || r.width == 128 ? r.width / HEAD_LANE_ELEMENTS : 0;
}

/* CODE with `lanes`, for lanes that are not 0. */
#define WITH_HEADS(the_lanes, ...)                             \
    do {                                                       \
        if ((the_lanes) == 4) {                                \
            constexpr int lanes = 4;                           \
            __VA_ARGS__;                                       \
        } else {                                               \
            constexpr int lanes = 8;                           \
            __VA_ARGS__;                                       \
        }                                                      \
    } while (0)

static void qknorm_rope_forward(struct tensor x, struct tensor weight, double epsilon, struct tensor table,
                                int64_t sequence_length, int64_t first_position, struct tensor y, struct tensor rstd) {
    struct rope r = rope_of(x, weight, rstd, table, sequence_length, first_position);
    CHECK(is_float(y) && tensor_same_shape(x, y));
    if (r.rows == 0)
        return;
    const float *w = (const float *)weight.data;
    float *scales = (float *)rstd.data, e = (float)epsilon;
    struct anywhere from = anywhere_of(x), to = anywhere_of(y), by = anywhere_of(weight), angles = anywhere_of(table);
    int row_lanes = head_lanes(r) ? head_lanes(r) : WARP;
    unsigned blocks = at_most_blocks(ceil_div(r.rows * row_lanes, ROW_THREADS), INT32_MAX);
    if (!head_lanes(r))
        CUDA_LAUNCH(rope_forward_plain, blocks, ROW_THREADS, 0, from, w, e, r, to, scales);
    else if (x.dtype == y.dtype && are_aligned(x.data, y.data, r.table, w))
        WITH_FLOAT(x.dtype, X,
                   WITH_HEADS(row_lanes, CUDA_LAUNCH((rope_forward<const X *, X *, const float *, lanes>), blocks, ROW_THREADS, 0,
                                                     (const X *)x.data, w, r.table, e, r, (X *)y.data, scales)));
    else
        WITH_HEADS(row_lanes, CUDA_LAUNCH((rope_forward<struct anywhere, struct anywhere, struct anywhere, lanes>), blocks,
                                          ROW_THREADS, 0, from, by, angles, e, r, to, scales));
}

static void qknorm_rope_backward(struct tensor dy, struct tensor x, struct tensor weight, struct tensor rstd,
                                 struct tensor table, int64_t sequence_length, int64_t first_position, struct tensor dx,
                                 struct tensor dweight) {
    struct rope r = rope_of(x, weight, rstd, table, sequence_length, first_position);
    CHECK(is_float(dy) && is_float(dx) && tensor_same_shape(x, dy) && tensor_same_shape(x, dx));
    CHECK(is_vector(dweight, r.width));
    CHECK(dx.data != dy.data || x.shape[0] == 0 || dx.dtype == dy.dtype);
    if (r.rows == 0)
        return;
    const float *w = (const float *)weight.data, *scales = (const float *)rstd.data;
    struct anywhere grad = anywhere_of(dy), from = anywhere_of(x), to = anywhere_of(dx), by = anywhere_of(weight);
    struct anywhere angles = anywhere_of(table);
    bool is_aligned = are_aligned(dy.data, x.data, dx.data, w) && are_aligned(r.table, r.table, r.table, r.table);
    int row_lanes = head_lanes(r) ? head_lanes(r) : WARP;
    int64_t block_rows = ROW_THREADS / row_lanes;
    unsigned blocks = at_most_blocks(ceil_div(r.rows, block_rows), PART_BLOCKS);
    int64_t plain_parts = blocks * block_rows < r.rows ? blocks * block_rows : r.rows; /* warps that have rows */
    int64_t part_count = head_lanes(r) ? blocks : plain_parts;
    float *parts = (float *)cuda_scratch((size_t)(part_count * r.width) * sizeof *parts);
    if (!head_lanes(r))
        CUDA_LAUNCH(rope_backward_plain, blocks, ROW_THREADS, 0, grad, from, w, scales, r, to, parts);
    else if (dy.dtype == x.dtype && dx.dtype == x.dtype && is_aligned)
        WITH_FLOAT(x.dtype, X, {
            typedef const X *P;
            WITH_HEADS(row_lanes, CUDA_LAUNCH((rope_backward<P, P, X *, const float *, lanes>), blocks, ROW_THREADS, 0,
                                              (P)dy.data, (P)x.data, w, r.table, scales, r, (X *)dx.data, parts));
        });
    else
        WITH_HEADS(row_lanes, CUDA_LAUNCH((rope_backward<struct anywhere, struct anywhere, struct anywhere, struct anywhere,
                                                         lanes>),
                                          blocks, ROW_THREADS, 0, grad, from, by, angles, scales, r, to, parts));
    launch_add_parts(parts, part_count, r.width, (float *)dweight.data);
}

void norm_fill_cuda(struct kernel_ops *ops) {
    ops->rmsnorm_forward = rmsnorm_forward;
    ops->rmsnorm_backward = rmsnorm_backward;
    ops->rmsnorm_backward_cast = rmsnorm_backward_cast;
    ops->routed_norm_backward = routed_norm_backward;
    ops->qknorm_rope_forward = qknorm_rope_forward;
    ops->qknorm_rope_backward = qknorm_rope_backward;
}
