/* The gated activation and the embedding: bound by memory. */
#include "kernels/cuda/counting.cuh"

/* ---- gated activation ----------------------------------------------------------------------------------------------- */

/* An operand of either dtype; kernels for operands all of one know at compile time which. */
struct floats {
    void *data;
    bool is_bf16;
};

enum dtypes { ALL_F32, ALL_BF16, MIXED };

template <int dtypes, int count, bool aligned>
static __device__ __forceinline__ void load_floats(struct floats from, int64_t i, float *x) {
    if (dtypes == MIXED ? from.is_bf16 : dtypes == ALL_BF16)
        load_anywhere<count, aligned>((const bf16 *)from.data + i, x);
    else
        load_anywhere<count, aligned>((const float *)from.data + i, x);
}

template <int dtypes, int count, bool aligned>
static __device__ __forceinline__ void store_floats(struct floats to, int64_t i, const float *x) {
    if (dtypes == MIXED ? to.is_bf16 : dtypes == ALL_BF16)
        store_anywhere<count, aligned>((bf16 *)to.data + i, x);
    else
        store_anywhere<count, aligned>((float *)to.data + i, x);
}

/* A row is a warp's; a block's where there are few. */
struct swiglu {
    struct floats dact, gate, up, act, dgate, dup;
    const float *row_weight;
    float *drow_weight;
    int64_t rows, width;
    int threads; /* of a row */
};

template <int dtypes, int count, bool aligned> static __global__ void swiglu_forward_kernel(struct swiglu s) {
    int64_t rows_a_block = THREADS / s.threads, pieces = s.width / count;
    for (int64_t n = blockIdx.x * rows_a_block + threadIdx.x / s.threads; n < s.rows; n += gridDim.x * rows_a_block) {
        float weight = s.row_weight ? s.row_weight[n] : 1;
#pragma unroll 2
        for (int64_t piece = threadIdx.x % s.threads; piece < pieces; piece += s.threads) {
            float g[EIGHT], u[EIGHT];
            int64_t at = n * s.width + piece * count;
            load_floats<dtypes, count, aligned>(s.gate, at, g);
            load_floats<dtypes, count, aligned>(s.up, at, u);
            for (int i = 0; i < count; i++)
                u[i] = g[i] * sigmoid(g[i]) * u[i] * weight;
            store_floats<dtypes, count, aligned>(s.act, at, u);
        }
    }
}

/* One row; returns this thread's share of its drow_weight, whose order does not depend on addresses. Every element is read by
 * who writes it, before. */
template <int dtypes, int count, bool aligned>
static __device__ __forceinline__ float backward_row(const struct swiglu &s, int64_t n) {
    float weight = s.row_weight ? s.row_weight[n] : 1, dweight = 0;
    int64_t pieces = s.width / count;
    for (int64_t piece = threadIdx.x % s.threads; piece < pieces; piece += s.threads) {
        float d[EIGHT], g[EIGHT], u[EIGHT], here = 0;
        int64_t at = n * s.width + piece * count;
        load_floats<dtypes, count, aligned>(s.dact, at, d);
        load_floats<dtypes, count, aligned>(s.gate, at, g);
        load_floats<dtypes, count, aligned>(s.up, at, u);
        for (int i = 0; i < count; i++) {
            float share = sigmoid(g[i]), silu = g[i] * share;
            float dg = d[i] * weight * u[i] * share * fmaf(g[i], 1 - share, 1);
            here = fmaf(d[i] * silu, u[i], here);
            u[i] = d[i] * weight * silu;
            g[i] = dg;
        }
        dweight += here;
        store_floats<dtypes, count, aligned>(s.dgate, at, g);
        store_floats<dtypes, count, aligned>(s.dup, at, u);
    }
    return dweight;
}

template <int dtypes, int count, bool aligned> static __global__ void swiglu_backward_kernel(struct swiglu s) {
    int64_t rows_a_block = THREADS / s.threads;
    for (int64_t n = blockIdx.x * rows_a_block + threadIdx.x / s.threads; n < s.rows; n += gridDim.x * rows_a_block) {
        float dweight = backward_row<dtypes, count, aligned>(s, n);
        dweight = s.threads == WARP ? warp_sum(dweight) : block_sum(dweight);
        if (s.drow_weight && threadIdx.x % s.threads == 0)
            s.drow_weight[n] = dweight;
    }
}

static struct floats floats_of(struct tensor t, struct tensor like) {
    CHECK((t.dtype == DTYPE_F32 || t.dtype == DTYPE_BF16) && tensor_same_shape(t, like));
    struct floats f = {t.data, t.dtype == DTYPE_BF16};
    return f;
}

/* Whether all operands of a kernel are aligned, and how many are bf16. */
struct forms {
    bool is_aligned;
    int bf16_count, count;
};

static void add_form(struct forms *forms, struct floats f) {
    forms->is_aligned &= is_aligned(f.data, 16);
    forms->bf16_count += f.is_bf16;
    forms->count++;
}

static struct swiglu swiglu_of(struct tensor gate, struct tensor up, struct tensor row_weight, struct forms *forms) {
    struct swiglu s = {};
    s.rows = gate.shape[0];
    s.width = gate.shape[1];
    CHECK(tensor_elements(gate) == s.rows * s.width);
    if (tensor_exists(row_weight)) {
        CHECK(row_weight.dtype == DTYPE_F32 && tensor_elements(row_weight) == s.rows);
        s.row_weight = (const float *)row_weight.data;
    }
    s.gate = floats_of(gate, gate);
    s.up = floats_of(up, gate);
    s.threads = s.rows >= 132 * 8 ? (int)WARP : (int)THREADS;
    struct forms f = {true, 0, 0};
    add_form(&f, s.gate);
    add_form(&f, s.up);
    *forms = f;
    return s;
}

#define LAUNCH_SWIGLU(kernel, s, forms)                                            \
    do {                                                                           \
        unsigned grid_ = grid_for_rows((s).rows, (s).threads);                     \
        if ((s).width % EIGHT != 0)                                                \
            CUDA_LAUNCH((kernel<MIXED, 1, false>), grid_, THREADS, 0, s);          \
        else if (!(forms).is_aligned)                                              \
            CUDA_LAUNCH((kernel<MIXED, EIGHT, false>), grid_, THREADS, 0, s);      \
        else if ((forms).bf16_count == (forms).count)                              \
            CUDA_LAUNCH((kernel<ALL_BF16, EIGHT, true>), grid_, THREADS, 0, s);    \
        else if ((forms).bf16_count == 0)                                          \
            CUDA_LAUNCH((kernel<ALL_F32, EIGHT, true>), grid_, THREADS, 0, s);     \
        else                                                                       \
            CUDA_LAUNCH((kernel<MIXED, EIGHT, true>), grid_, THREADS, 0, s);       \
    } while (0)

static void swiglu_forward(struct tensor gate, struct tensor up, struct tensor row_weight, struct tensor act) {
    struct forms forms;
    struct swiglu s = swiglu_of(gate, up, row_weight, &forms);
    s.act = floats_of(act, gate);
    add_form(&forms, s.act);
    if (s.rows > 0 && s.width > 0)
        LAUNCH_SWIGLU(swiglu_forward_kernel, s, forms);
}

static void swiglu_backward(struct tensor dact, struct tensor gate, struct tensor up, struct tensor row_weight,
                            struct tensor dgate, struct tensor dup, struct tensor drow_weight) {
    struct forms forms;
    struct swiglu s = swiglu_of(gate, up, row_weight, &forms);
    s.dact = floats_of(dact, gate);
    s.dgate = floats_of(dgate, gate);
    s.dup = floats_of(dup, gate);
    add_form(&forms, s.dact);
    add_form(&forms, s.dgate);
    add_form(&forms, s.dup);
    if (s.rows)
        CHECK(tensor_exists(row_weight) == tensor_exists(drow_weight));
    if (tensor_exists(drow_weight)) {
        CHECK(drow_weight.dtype == DTYPE_F32 && tensor_elements(drow_weight) == s.rows);
        s.drow_weight = (float *)drow_weight.data;
    }
    if (s.rows > 0)
        LAUNCH_SWIGLU(swiglu_backward_kernel, s, forms);
}

/* ---- embedding ------------------------------------------------------------------------------------------------------ */

template <int count, typename X, typename Y>
static __global__ void embed_kernel(const int32_t *ids, const X *table, Y *x, int64_t rows, int64_t width, int threads) {
    int64_t rows_a_block = THREADS / threads, pieces = width / count;
    for (int64_t s = blockIdx.x * rows_a_block + threadIdx.x / threads; s < rows; s += gridDim.x * rows_a_block) {
        const X *from = table + ids[s] * width;
        for (int64_t piece = threadIdx.x % threads; piece < pieces; piece += threads) {
            float v[EIGHT];
            load_some<count>(from + piece * count, v);
            store_some<count>(x + s * width + piece * count, v);
        }
    }
}

static void embedding_forward(struct tensor ids, struct tensor table, struct tensor x) {
    int64_t rows = x.shape[0], width = x.shape[1];
    const int32_t *id = (const int32_t *)ids.data;
    CHECK(ids.dtype == DTYPE_I32 && tensor_elements(ids) == rows && tensor_elements(x) == rows * width);
    CHECK(tensor_elements(table) == table.shape[0] * width);
    if (rows == 0 || width == 0)
        return;
    if (table.dtype == x.dtype) {
        int64_t size = (int64_t)dtype_size(x.dtype);
        gather_bytes(table.data, id, x.data, rows, width * size, size);
        return;
    }
    bool is_wide = width % EIGHT == 0 && is_aligned(table.data, 16) && is_aligned(x.data, 16);
    int threads = threads_a_row(is_wide ? width / EIGHT : width);
    unsigned grid = grid_for_rows(rows, threads);
    if (is_wide)
        WITH_FLOAT(table.dtype, X, WITH_FLOAT(x.dtype, Y, CUDA_LAUNCH((embed_kernel<EIGHT, X, Y>), grid, THREADS, 0, id,
                                                                       (const X *)table.data, (Y *)x.data, rows, width, threads)));
    else
        WITH_FLOAT(table.dtype, X, WITH_FLOAT(x.dtype, Y, CUDA_LAUNCH((embed_kernel<1, X, Y>), grid, THREADS, 0, id,
                                                                       (const X *)table.data, (Y *)x.data, rows, width, threads)));
}

/* ---- its gradient --------------------------------------------------------------------------------------------------- */

/* The tokens are ordered by id, stable, one digit after the other. */
struct digit_keys {
    const int32_t *ids;
    int shift, mask;
    __device__ int operator()(int64_t item) const {
        return ids[item] >> shift & mask;
    }
};

/* Thing `item` is token from_token[item], or token `item`. */
struct place_token {
    const int32_t *from_ids, *from_token;
    int32_t *ids, *token;
    __device__ void operator()(int64_t item, int kind, int32_t place) const {
        (void)kind;
        ids[place] = from_ids[item];
        token[place] = from_token ? from_token[item] : (int32_t)item;
    }
};

/* Ordered tokens are summed by tiles. What of a tile is not all of an id becomes a part, in `parts` [tiles, 2, width]: the
 * first one of those that go on from the tile before, the second one of those that begin in the tile and go on. */
enum { TILE = 32 };

struct embedding_sum {
    const int32_t *ids, *token; /* in order */
    const void *dx;
    float *dtable, *parts;
    int64_t tokens, tiles, width, column_blocks;
};

/* Of tokens begin .. end-1 of a tile, all of one id. */
template <int count>
static __device__ __forceinline__ void store_run(const struct embedding_sum &e, int64_t tile, int64_t begin, int64_t end,
                                                 int64_t column, int32_t id, const float *sum) {
    bool is_begun = begin == tile * TILE && begin > 0 && e.ids[begin - 1] == id;
    bool goes_on = end == (tile + 1) * TILE && end < e.tokens && e.ids[end] == id;
    if (is_begun || goes_on) {
        store_some<count>(e.parts + (2 * tile + !is_begun) * e.width + column, sum);
    } else {
        float old[EIGHT], *to = e.dtable + id * e.width + column;
        load_some<count>((const float *)to, old);
        for (int i = 0; i < count; i++)
            old[i] += sum[i];
        store_some<count>(to, old);
    }
}

template <int count, typename T> static __global__ void embedding_tiles_kernel(struct embedding_sum e) {
    enum { AHEAD = 4 };
    CUDA_SHARED int32_t ids[TILE], tokens[TILE];
    int64_t tile = blockIdx.x / e.column_blocks, first = tile * TILE;
    int64_t column = (blockIdx.x % e.column_blocks * blockDim.x + threadIdx.x) * count;
    int rows = e.tokens - first < TILE ? (int)(e.tokens - first) : (int)TILE, begin = 0;
    for (int i = (int)threadIdx.x; i < rows; i += (int)blockDim.x) {
        ids[i] = e.ids[first + i];
        tokens[i] = e.token[first + i];
    }
    __syncthreads();
    float sum[EIGHT] = {0}, x[AHEAD][EIGHT];
    for (int group = 0; group < rows && column < e.width; group += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (group + i < rows)
                load_some<count>((const T *)e.dx + tokens[group + i] * e.width + column, x[i]);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int row = group + i;
            if (row >= rows)
                break;
            for (int j = 0; j < count; j++)
                sum[j] += x[i][j];
            if (row + 1 == rows || ids[row + 1] != ids[row]) {
                store_run<count>(e, tile, first + begin, first + row + 1, column, ids[row], sum);
                begin = row + 1;
                for (int j = 0; j < count; j++)
                    sum[j] = 0;
            }
        }
    }
}

/* The parts of the id that begins in a tile and goes on, in their order. */
template <int count> static __global__ void embedding_parts_kernel(struct embedding_sum e) {
    int64_t tile = blockIdx.x / e.column_blocks, end = (tile + 1) * TILE;
    int64_t column = (blockIdx.x % e.column_blocks * blockDim.x + threadIdx.x) * count;
    if (end >= e.tokens || column >= e.width)
        return;
    int32_t id = e.ids[end];
    if (e.ids[end - 1] != id || (tile > 0 && e.ids[end - TILE - 1] == id))
        return;
    int64_t last = tile + 1, beyond = e.tiles; /* the last tile that begins with the id is at least one, below another */
    while (beyond - last > 1) {
        int64_t middle = (last + beyond) / 2;
        if (e.ids[middle * TILE] == id)
            last = middle;
        else
            beyond = middle;
    }
    float sum[EIGHT], x[EIGHT], *to = e.dtable + id * e.width + column;
    load_some<count>((const float *)e.parts + (2 * tile + 1) * e.width + column, sum);
#pragma unroll 4
    for (int64_t t = tile + 1; t <= last; t++) {
        load_some<count>((const float *)e.parts + 2 * t * e.width + column, x);
        for (int i = 0; i < count; i++)
            sum[i] += x[i];
    }
    load_some<count>((const float *)to, x);
    for (int i = 0; i < count; i++)
        x[i] += sum[i];
    store_some<count>(to, x);
}

template <int count, typename T> static void sum_embedding(struct embedding_sum e) {
    int64_t pieces = e.width / count, threads = ceil_div(pieces, WARP) * WARP;
    threads = threads < THREADS ? threads : (int64_t)THREADS;
    e.column_blocks = ceil_div(pieces, threads);
    CHECK_OP(e.tiles * e.column_blocks, <=, INT32_MAX);
    unsigned grid = (unsigned)(e.tiles * e.column_blocks);
    CUDA_LAUNCH((embedding_tiles_kernel<count, T>), grid, (unsigned)threads, 0, e);
    if (e.tiles > 1)
        CUDA_LAUNCH((embedding_parts_kernel<count>), grid, (unsigned)threads, 0, e);
}

static void embedding_backward(struct tensor ids, struct tensor dx, struct tensor dtable) {
    int64_t tokens = dx.shape[0], width = dx.shape[1], vocabulary = dtable.shape[0];
    CHECK(ids.dtype == DTYPE_I32 && tensor_elements(ids) == tokens && tensor_elements(dx) == tokens * width);
    CHECK(dtable.dtype == DTYPE_F32 && tensor_elements(dtable) == vocabulary * width);
    if (tokens == 0 || width == 0)
        return;
    int bits = 1, digits, digit_bits;
    while (bits < 31 && (int64_t)1 << bits < vocabulary)
        bits++;
    digits = (bits + 9) / 10;
    digit_bits = (bits + digits - 1) / digits;
    struct counting c = counting_of(tokens, (int64_t)1 << digit_bits);
    size_t order = round_up_256((size_t)tokens * sizeof(int32_t)), counts = counting_bytes(&c);
    struct embedding_sum e = {};
    e.tokens = tokens, e.width = width, e.tiles = ceil_div(tokens, TILE);
    e.dx = dx.data, e.dtable = (float *)dtable.data;
    char *scratch = (char *)cuda_scratch(counts + 4 * order + (size_t)(e.tiles * 2 * width) * sizeof(float));
    e.parts = (float *)(scratch + counts + 4 * order);
    const int32_t *from_ids = (const int32_t *)ids.data, *from_token = NULL;
    for (int digit = 0; digit < digits; digit++) {
        int32_t *to_ids = (int32_t *)(scratch + counts + (size_t)(digit % 2 * 2) * order);
        int32_t *to_token = to_ids + order / sizeof(int32_t);
        struct digit_keys keys = {from_ids, digit * digit_bits, (1 << digit_bits) - 1};
        struct place_token place = {from_ids, from_token, to_ids, to_token};
        count_and_place(keys, place, c, scratch, NULL, NULL);
        from_ids = to_ids;
        from_token = to_token;
    }
    e.ids = from_ids;
    e.token = from_token;
    bool is_wide = width % EIGHT == 0 && is_aligned(dx.data, 16) && is_aligned(dtable.data, 16);
    if (is_wide)
        WITH_FLOAT(dx.dtype, T, sum_embedding<EIGHT, T>(e));
    else
        WITH_FLOAT(dx.dtype, T, sum_embedding<1, T>(e));
}

void pointwise_fill_cuda(struct kernel_ops *ops) {
    ops->swiglu_forward = swiglu_forward;
    ops->swiglu_backward = swiglu_backward;
    ops->embedding_forward = embedding_forward;
    ops->embedding_backward = embedding_backward;
}
