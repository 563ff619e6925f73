/* Causal attention. bf16 heads of up to 128 elements, whole eights, go to the matrix units (attention_sm90.cu where the device
 * has what that asks for, else attention_tiles.cuh), operands that are not aligned to 16 bytes by way of scratch; anything else
 * to plain kernels of f32 arithmetic: a warp for each query of a head, or for each key of a key-value head, whose lanes take one
 * key (query) each for the scores, and one column each for the sums. Of few queries and many keys both forms divide the keys
 * (attention_few.cu). */
#include "kernels/cuda/attention_few.cuh"
#include "kernels/cuda/attention_tiles.cuh"

/* ---- plain ---------------------------------------------------------------------------------------------------------- */

enum { PLAIN_WARPS = 4 };

template <typename T> struct plain_job {
    int64_t batch, query_count, key_count;
    int heads, kv_heads, group, width;
    float scale;
    const T *q, *k, *v, *out, *dout;
    T *to, *dq, *dk, *dv;
    float *logsumexp;
    float *delta; /* [B*query_count, H]: sum of dout * out */
    const int32_t *earlier; /* as a tile_job's */
};

static __device__ __forceinline__ void load_four(const float *from, bool is_whole, float x[4]) {
    if (is_whole) {
        float4 v = *(const float4 *)from;
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    } else {
        x[0] = from[0], x[1] = from[1], x[2] = from[2], x[3] = from[3];
    }
}

static __device__ __forceinline__ void load_four(const bf16 *from, bool is_whole, float x[4]) {
    if (is_whole) {
        uint2 v = *(const uint2 *)from;
        x[0] = low_bf16(v.x), x[1] = high_bf16(v.x), x[2] = low_bf16(v.y), x[3] = high_bf16(v.y);
    } else {
        for (int i = 0; i < 4; i++)
            x[i] = to_float(from[i]);
    }
}

/* In one order wherever b lies. */
template <typename T> static __device__ float dot(const float *a, const T *b, int width) {
    float sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
    bool is_whole = (uintptr_t)b % (4 * sizeof(T)) == 0;
    int i = 0;
    for (; i + 4 <= width; i += 4) {
        float x[4];
        load_four(b + i, is_whole, x);
        sum0 += a[i] * x[0];
        sum1 += a[i + 1] * x[1];
        sum2 += a[i + 2] * x[2];
        sum3 += a[i + 3] * x[3];
    }
    for (; i < width; i++)
        sum0 += a[i] * to_float(b[i]);
    return (sum0 + sum1) + (sum2 + sum3);
}

/* Which one this warp has of all, and its part of the shared memory. */
struct plain_warp {
    int64_t index;
    int lane;
    float *shared;
};

static __device__ plain_warp this_warp(float *shared, int floats) {
    int warp = (int)threadIdx.x / WARP;
    plain_warp w = {(int64_t)blockIdx.x * PLAIN_WARPS + warp, (int)threadIdx.x % WARP, shared + (int64_t)warp * floats};
    return w;
}

template <typename T> static __device__ void load_row(float *to, const T *from, int width, int lane) {
    for (int i = lane; i < width; i += WARP)
        to[i] = to_float(from[i]);
}

static __host__ __device__ int forward_floats(int width) {
    return 2 * width + WARP;
}

/* One query of a head, by its number in logsumexp, over keys begin .. end - 1: leaves in shared memory, behind the query's row,
 * the values summed with weights relative to the largest score; of the sum of weights each lane has the share of its keys. */
template <typename T>
static __device__ float *plain_keys(const plain_job<T> &job, plain_warp warp, int64_t query, int64_t begin, int64_t end,
                                    float *largest, float *weights) {
    int width = job.width, lane = warp.lane, head = (int)(query % job.heads);
    int64_t stride = (int64_t)job.kv_heads * width;
    int64_t first = query / job.heads / job.query_count * job.key_count * stride + head / job.group * (int64_t)width;
    float *q = warp.shared, *sum = q + width, *weight = sum + width, most = -INFINITY, all = 0;
    load_row(q, job.q + query * width, width, lane);
    for (int d = lane; d < width; d += WARP)
        sum[d] = 0;
    __syncwarp();
    for (int64_t j = begin; j < end; j += WARP) {
        int count = (int)min(end - j, (int64_t)WARP);
        float s = lane < count ? job.scale * dot(q, job.k + first + (j + lane) * stride, width) : -INFINITY;
        float top = fmaxf(most, warp_max(s)), fall = expf(most - top), p = expf(s - top);
        most = top;
        all = all * fall + p;
        weight[lane] = p;
        __syncwarp();
        for (int d = lane; d < width; d += WARP) {
            float x = sum[d] * fall;
            for (int n = 0; n < count; n++)
                x += weight[n] * to_float(job.v[first + (j + n) * stride + d]);
            sum[d] = x;
        }
        __syncwarp();
    }
    *largest = most;
    *weights = all;
    return sum;
}

template <typename T> static __device__ int64_t keys_seen(const plain_job<T> &job, int64_t query) {
    return keys_there(job) - job.query_count + query / job.heads % job.query_count + 1;
}

template <typename T> static __global__ void plain_forward(plain_job<T> job) {
    CUDA_SHARED_DYNAMIC(float, shared);
    plain_warp warp = this_warp(shared, forward_floats(job.width));
    if (warp.index >= job.batch * job.query_count * job.heads)
        return;
    float most, all, *sum = plain_keys(job, warp, warp.index, 0, keys_seen(job, warp.index), &most, &all);
    all = warp_sum(all);
    for (int d = warp.lane; d < job.width; d += WARP)
        store(job.to + warp.index * job.width + d, sum[d] / all);
    if (warp.lane == 0)
        job.logsumexp[warp.index] = most + logf(all);
}

/* The same of a part of the keys. Warps next to each other have the heads that share them. */
template <typename T> static __global__ void plain_part(plain_job<T> job, const struct key_parts parts) {
    CUDA_SHARED_DYNAMIC(float, shared);
    plain_warp warp = this_warp(shared, forward_floats(job.width));
    if (warp.index >= job.batch * job.query_count * job.heads * parts.count)
        return;
    int part = (int)(warp.index / job.heads % parts.count);
    int64_t query = warp.index / job.heads / parts.count * job.heads + warp.index % job.heads;
    int64_t begin = (int64_t)part * parts.keys, end = min(begin + parts.keys, keys_seen(job, query));
    float most, all, *sum = plain_keys(job, warp, query, begin, end, &most, &all);
    float2 state = {most, warp_sum(all)};
    int64_t at = part_place(parts, query, part);
    for (int d = warp.lane; d < job.width; d += WARP)
        parts.value[at * job.width + d] = sum[d];
    if (warp.lane == 0)
        parts.state[at] = state;
}

template <typename T> static __global__ void plain_delta(plain_job<T> job) {
    plain_warp warp = this_warp(NULL, 0);
    if (warp.index >= job.batch * job.query_count * job.heads)
        return;
    float sum = 0;
    for (int d = warp.lane; d < job.width; d += WARP)
        sum += to_float(job.dout[warp.index * job.width + d]) * to_float(job.out[warp.index * job.width + d]);
    sum = warp_sum(sum);
    if (warp.lane == 0)
        job.delta[warp.index] = sum;
}

static __host__ __device__ int dq_floats(int width) {
    return 3 * width + WARP;
}

template <typename T> static __global__ void plain_dq(plain_job<T> job) {
    CUDA_SHARED_DYNAMIC(float, shared);
    plain_warp warp = this_warp(shared, dq_floats(job.width));
    if (warp.index >= job.batch * job.query_count * job.heads)
        return;
    int width = job.width, lane = warp.lane, head = (int)(warp.index % job.heads);
    int64_t row = warp.index / job.heads, seen = row % job.query_count + 1, stride = (int64_t)job.kv_heads * width;
    int64_t first = row / job.query_count * job.key_count * stride + head / job.group * (int64_t)width;
    float *q = warp.shared, *dout = q + width, *sum = dout + width, *weight = sum + width;
    float lse = job.logsumexp[warp.index], delta = job.delta[warp.index];
    load_row(q, job.q + warp.index * width, width, lane);
    load_row(dout, job.dout + warp.index * width, width, lane);
    for (int d = lane; d < width; d += WARP)
        sum[d] = 0;
    __syncwarp();
    for (int64_t j = 0; j < seen; j += WARP) {
        int count = (int)min(seen - j, (int64_t)WARP);
        if (lane < count) {
            int64_t key = first + (j + lane) * stride;
            float p = expf(job.scale * dot(q, job.k + key, width) - lse);
            weight[lane] = job.scale * p * (dot(dout, job.v + key, width) - delta);
        }
        __syncwarp();
        for (int d = lane; d < width; d += WARP) {
            float x = 0;
            for (int n = 0; n < count; n++)
                x += weight[n] * to_float(job.k[first + (j + n) * stride + d]);
            sum[d] += x;
        }
        __syncwarp();
    }
    for (int d = lane; d < width; d += WARP)
        store(job.dq + warp.index * width + d, sum[d]);
}

static __host__ __device__ int dkv_floats(int width) {
    return 4 * width + 2 * WARP;
}

template <typename T> static __global__ void plain_dkv(plain_job<T> job) {
    CUDA_SHARED_DYNAMIC(float, shared);
    plain_warp warp = this_warp(shared, dkv_floats(job.width));
    if (warp.index >= job.batch * job.key_count * job.kv_heads)
        return;
    int width = job.width, lane = warp.lane, kv_head = (int)(warp.index % job.kv_heads);
    int64_t row = warp.index / job.kv_heads, j = row % job.key_count, batch = row / job.key_count;
    float *k = warp.shared, *v = k + width, *dk = v + width, *dv = dk + width, *p = dv + width, *ds = p + WARP;
    load_row(k, job.k + warp.index * width, width, lane);
    load_row(v, job.v + warp.index * width, width, lane);
    for (int d = lane; d < width; d += WARP)
        dk[d] = dv[d] = 0;
    __syncwarp();
    for (int head = kv_head * job.group; head < (kv_head + 1) * job.group; head++)
        for (int64_t i = j; i < job.query_count; i += WARP) {
            int count = (int)min(job.query_count - i, (int64_t)WARP);
            int64_t first = (batch * job.query_count + i) * job.heads + head;
            if (lane < count) {
                int64_t at = first + (int64_t)lane * job.heads;
                p[lane] = expf(job.scale * dot(k, job.q + at * width, width) - job.logsumexp[at]);
                ds[lane] = job.scale * p[lane] * (dot(v, job.dout + at * width, width) - job.delta[at]);
            }
            __syncwarp();
            for (int d = lane; d < width; d += WARP) {
                float x = 0, y = 0;
                for (int n = 0; n < count; n++) {
                    int64_t at = (first + (int64_t)n * job.heads) * width + d;
                    x += ds[n] * to_float(job.q[at]);
                    y += p[n] * to_float(job.dout[at]);
                }
                dk[d] += x;
                dv[d] += y;
            }
            __syncwarp();
        }
    for (int d = lane; d < width; d += WARP) {
        store(job.dk + warp.index * width + d, dk[d]);
        store(job.dv + warp.index * width + d, dv[d]);
    }
}

/* ---- what is given -------------------------------------------------------------------------------------------------- */

static bool is_operand(struct attention_shape shape, struct tensor t, enum dtype dtype, int64_t rows, int heads) {
    return t.dtype == dtype && t.dim_count == 2 && t.shape[0] == shape.batch * rows &&
           t.shape[1] == (int64_t)heads * shape.head_dim;
}

static bool is_query(struct attention_shape shape, struct tensor t, enum dtype dtype) {
    return is_operand(shape, t, dtype, shape.query_count, shape.head_count);
}

static bool is_key(struct attention_shape shape, struct tensor t, enum dtype dtype) {
    return is_operand(shape, t, dtype, shape.key_count, shape.kv_head_count);
}

static void check_attention(struct attention_shape shape, struct tensor q, struct tensor k, struct tensor v, struct tensor out,
                            struct tensor logsumexp) {
    CHECK(shape.batch >= 0 && shape.query_count >= 0 && shape.head_dim >= 1);
    CHECK_OP(shape.key_count, >=, shape.query_count);
    CHECK(shape.key_count <= INT32_MAX / 2 && shape.head_dim <= HEAD_DIM_MOST); /* shared memory of the plain kernels */
    CHECK(shape.kv_head_count >= 1 && shape.head_count % shape.kv_head_count == 0);
    CHECK(q.dtype == DTYPE_F32 || q.dtype == DTYPE_BF16);
    CHECK(is_query(shape, q, q.dtype) && is_query(shape, out, q.dtype));
    CHECK(is_key(shape, k, q.dtype) && is_key(shape, v, q.dtype));
    CHECK(logsumexp.dtype == DTYPE_F32 &&
          tensor_elements(logsumexp) == shape.batch * shape.query_count * shape.head_count);
}

static unsigned block_count(int64_t blocks) {
    CHECK(blocks <= INT32_MAX);
    return (unsigned)blocks;
}

static bool fits_tiles(struct attention_shape shape, enum dtype dtype) {
    return dtype == DTYPE_BF16 && shape.head_dim % 8 == 0 && shape.head_dim <= 128 && shape.scale > 0;
}

/* ---- operands that are not aligned: copied, so that where they lie changes nothing but the time -------------------------- */

static __global__ void copy_elements(const bf16 *from, bf16 *to, int64_t count) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x)
        to[i] = from[i];
}

static void launch_copy(const void *from, void *to, int64_t count) {
    CUDA_LAUNCH(copy_elements, grid_for(count, 256), 256, 0, (const bf16 *)from, (bf16 *)to, count);
}

/* An operand, where it lies for the kernels. */
struct placed {
    struct tensor tensor;
    bf16 *data;
    bool is_input;
};

static size_t placed_bytes(struct tensor t) {
    return is_aligned(t.data, 16) ? 0 : (size_t)ceil_div((int64_t)tensor_bytes(t), 256) * 256;
}

/* Takes scratch for those that are not aligned, and `bytes` more, a multiple of 256, which are returned. */
static void *place(struct placed *operands, int count, size_t bytes) {
    size_t all = bytes;
    for (int i = 0; i < count; i++)
        all += placed_bytes(operands[i].tensor);
    char *scratch = all > 0 ? (char *)cuda_scratch(all) : NULL, *free = scratch + bytes;
    for (int i = 0; i < count; i++) {
        struct tensor t = operands[i].tensor;
        bool is_copied = placed_bytes(t) > 0;
        operands[i].data = (bf16 *)(is_copied ? free : t.data);
        if (is_copied && operands[i].is_input)
            launch_copy(t.data, free, tensor_elements(t));
        free += placed_bytes(t);
    }
    return scratch;
}

static void put_back(const struct placed *operands, int count) {
    for (int i = 0; i < count; i++)
        if (!operands[i].is_input && operands[i].data != operands[i].tensor.data)
            launch_copy(operands[i].data, operands[i].tensor.data, tensor_elements(operands[i].tensor));
}

/* ---- on the matrix units -------------------------------------------------------------------------------------------- */

static tile_job tile_job_of(struct attention_shape shape, struct tensor logsumexp) {
    tile_job job = {};
    job.query_count = (int)shape.query_count, job.key_count = (int)shape.key_count, job.head_dim = shape.head_dim;
    job.heads = shape.head_count, job.kv_heads = shape.kv_head_count, job.group = shape.head_count / shape.kv_head_count;
    job.batch = shape.batch;
    job.scale = (float)shape.scale, job.scale_log2 = (float)(shape.scale * LOG2_E);
    job.logsumexp = (float *)logsumexp.data;
    return job;
}

static void launch_tile_forward(tile_job job) {
    unsigned blocks = block_count(ceil_div(job.query_count, FORWARD_QUERIES) * job.batch * job.heads);
    if (sm90_attention_forward(job))
        return;
    if (job.head_dim <= 64)
        CUDA_LAUNCH((tile_forward<64>), blocks, FORWARD_THREADS, tile_forward_bytes(64), job);
    else
        CUDA_LAUNCH((tile_forward<128>), blocks, FORWARD_THREADS, tile_forward_bytes(128), job);
}

static void forward_on_tiles(struct attention_shape shape, struct tensor q, struct tensor k, struct tensor v,
                             struct tensor out, struct tensor logsumexp) {
    tile_job job = tile_job_of(shape, logsumexp);
    struct placed operands[] = {{q, NULL, true}, {k, NULL, true}, {v, NULL, true}, {out, NULL, false}};
    place(operands, 4, 0);
    job.q = operands[0].data, job.k = operands[1].data, job.v = operands[2].data, job.to = operands[3].data;
    launch_tile_forward(job);
    put_back(operands, 4);
}

template <int dim> static void launch_tile_backward(tile_job job) {
    int64_t heads = job.batch * job.heads, sums = heads * job.row_sum_stride;
    typedef dkv_tiles<dim> tiles;
    CUDA_LAUNCH(tile_delta, block_count(ceil_div(sums * DELTA_LANES, DELTA_THREADS)), DELTA_THREADS, 0, job);
    if (sm90_attention_backward(job))
        return;
    CUDA_LAUNCH((tile_dkv<dim>), block_count(ceil_div(job.key_count, tiles::KEYS) * job.batch * job.kv_heads), tiles::THREADS,
                tiles::BYTES, job);
    CUDA_LAUNCH((tile_dq<dim>), block_count(ceil_div(job.query_count, DQ_QUERIES) * heads), DQ_THREADS, tile_dq_bytes(dim), job);
}

static void backward_on_tiles(struct attention_shape shape, struct tensor dout, struct tensor q, struct tensor k,
                              struct tensor v, struct tensor out, struct tensor logsumexp, struct tensor dq, struct tensor dk,
                              struct tensor dv) {
    tile_job job = tile_job_of(shape, logsumexp);
    struct placed operands[] = {{q, NULL, true},   {k, NULL, true},   {v, NULL, true},   {out, NULL, true},
                                {dout, NULL, true}, {dq, NULL, false}, {dk, NULL, false}, {dv, NULL, false}};
    job.row_sum_stride = ceil_div(shape.query_count, 64) * 64;
    int64_t sums = shape.batch * shape.head_count * job.row_sum_stride;
    size_t sums_bytes = (size_t)(2 * sums) * sizeof(float), kept_bytes = sm90_attention_backward_bytes(job);
    job.row_lse = (float *)place(operands, 8, sums_bytes + kept_bytes);
    job.row_delta = job.row_lse + sums;
    job.kept = kept_bytes > 0 ? (bf16 *)(job.row_lse + 2 * sums) : NULL;
    job.q = operands[0].data, job.k = operands[1].data, job.v = operands[2].data;
    job.out = operands[3].data, job.dout = operands[4].data;
    job.dq = operands[5].data, job.dk = operands[6].data, job.dv = operands[7].data;
    if (shape.head_dim <= 64)
        launch_tile_backward<64>(job);
    else
        launch_tile_backward<128>(job);
    put_back(operands, 8);
}

/* ---- operations ----------------------------------------------------------------------------------------------------- */

template <typename T>
static plain_job<T> plain_job_of(struct attention_shape shape, struct tensor q, struct tensor k, struct tensor v,
                                 struct tensor logsumexp) {
    plain_job<T> job = {};
    job.batch = shape.batch, job.query_count = shape.query_count, job.key_count = shape.key_count;
    job.heads = shape.head_count, job.kv_heads = shape.kv_head_count, job.group = shape.head_count / shape.kv_head_count;
    job.width = shape.head_dim, job.scale = (float)shape.scale;
    job.q = (const T *)q.data, job.k = (const T *)k.data, job.v = (const T *)v.data;
    job.logsumexp = (float *)logsumexp.data;
    return job;
}

static size_t plain_forward_bytes(struct attention_shape shape) {
    return (size_t)forward_floats(shape.head_dim) * PLAIN_WARPS * sizeof(float);
}

static void forward_in_parts(struct attention_shape shape, struct tensor q, struct tensor k, struct tensor v,
                             const int32_t *kept, struct tensor out, struct tensor logsumexp) {
    struct key_parts parts = key_parts_take(shape);
    if (fits_tiles(shape, q.dtype) && is_aligned(q.data, 16) && is_aligned(k.data, 16) && is_aligned(v.data, 16)) {
        tile_job job = tile_job_of(shape, logsumexp);
        job.q = (const bf16 *)q.data, job.k = (const bf16 *)k.data, job.v = (const bf16 *)v.data, job.earlier = kept;
        key_parts_fill_bf16(job, parts);
    } else {
        int64_t warps = shape.batch * shape.query_count * shape.head_count * parts.count;
        WITH_FLOAT(q.dtype, T, {
            plain_job<T> job = plain_job_of<T>(shape, q, k, v, logsumexp);
            job.earlier = kept;
            CUDA_LAUNCH((plain_part<T>), block_count(ceil_div(warps, PLAIN_WARPS)), PLAIN_WARPS * WARP, plain_forward_bytes(shape),
                        job, parts);
        });
    }
    key_parts_join(shape, parts, out, logsumexp);
}

static void attention_forward(struct attention_shape shape, struct tensor q, struct tensor k, struct tensor v,
                              struct tensor out, struct tensor logsumexp) {
    check_attention(shape, q, k, v, out, logsumexp);
    int64_t heads = shape.batch * shape.head_count, queries = heads * shape.query_count;
    if (queries == 0)
        return;
    if (key_parts_divide(shape)) {
        forward_in_parts(shape, q, k, v, NULL, out, logsumexp);
        return;
    }
    if (fits_tiles(shape, q.dtype)) {
        forward_on_tiles(shape, q, k, v, out, logsumexp);
        return;
    }
    WITH_FLOAT(q.dtype, T, {
        plain_job<T> job = plain_job_of<T>(shape, q, k, v, logsumexp);
        job.to = (T *)out.data;
        CUDA_LAUNCH((plain_forward<T>), block_count(ceil_div(queries, PLAIN_WARPS)), PLAIN_WARPS * WARP,
                    plain_forward_bytes(shape), job);
    });
}

static void attention_kept(struct attention_shape shape, struct tensor q, struct tensor k, struct tensor v, struct tensor kept,
                           struct tensor out, struct tensor logsumexp) {
    check_attention(shape, q, k, v, out, logsumexp);
    CHECK(shape.batch == 1 && kept.dtype == DTYPE_I32 && tensor_elements(kept) == 1);
    if (shape.query_count > 0)
        forward_in_parts(shape, q, k, v, (const int32_t *)kept.data, out, logsumexp);
}

enum { KEEP_THREADS = 256 };

template <typename W>
static __global__ void keep_kernel(const W *key, const W *value, const int32_t *kept, W *keys, W *values, int64_t row_words,
                                   int64_t words) {
    int64_t first = *kept * row_words, step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += step) {
        keys[first + i] = key[i];
        values[first + i] = value[i];
    }
}

template <typename W>
static void launch_keep(struct tensor key, struct tensor value, struct tensor kept, struct tensor keys, struct tensor values) {
    int64_t row_words = key.shape[1] * (int64_t)dtype_size(key.dtype) / (int64_t)sizeof(W), words = key.shape[0] * row_words;
    CUDA_LAUNCH((keep_kernel<W>), grid_for(words, KEEP_THREADS), KEEP_THREADS, 0, (const W *)key.data, (const W *)value.data,
                (const int32_t *)kept.data, (W *)keys.data, (W *)values.data, row_words, words);
}

static void attention_keep(struct tensor key, struct tensor value, struct tensor kept, struct tensor keys, struct tensor values) {
    int64_t width = key.shape[1], row_bytes = width * (int64_t)dtype_size(key.dtype);
    CHECK((key.dtype == DTYPE_F32 || key.dtype == DTYPE_BF16) && tensor_same_shape(key, value) && value.dtype == key.dtype);
    CHECK(keys.dtype == key.dtype && values.dtype == key.dtype && tensor_same_shape(keys, values) && keys.shape[1] == width);
    CHECK(kept.dtype == DTYPE_I32 && tensor_elements(kept) == 1 && key.shape[0] <= keys.shape[0]);
    const void *all[] = {key.data, value.data, keys.data, values.data};
    bool is_wide = row_bytes % 16 == 0;
    for (const void *data : all)
        is_wide = is_wide && is_aligned(data, 16);
    if (tensor_elements(key) == 0)
        return;
    if (is_wide)
        launch_keep<uint4>(key, value, kept, keys, values);
    else if (key.dtype == DTYPE_F32)
        launch_keep<uint32_t>(key, value, kept, keys, values);
    else
        launch_keep<uint16_t>(key, value, kept, keys, values);
}

template <typename T> static void launch_plain_backward(plain_job<T> job) {
    int64_t queries = job.batch * job.query_count * job.heads, keys = job.batch * job.key_count * job.kv_heads;
    size_t warp_bytes = PLAIN_WARPS * sizeof(float);
    CUDA_LAUNCH((plain_delta<T>), block_count(ceil_div(queries, PLAIN_WARPS)), PLAIN_WARPS * WARP, 0, job);
    CUDA_LAUNCH((plain_dq<T>), block_count(ceil_div(queries, PLAIN_WARPS)), PLAIN_WARPS * WARP,
                (size_t)dq_floats(job.width) * warp_bytes, job);
    CUDA_LAUNCH((plain_dkv<T>), block_count(ceil_div(keys, PLAIN_WARPS)), PLAIN_WARPS * WARP,
                (size_t)dkv_floats(job.width) * warp_bytes, job);
}

static void attention_backward(struct attention_shape shape, struct tensor dout, struct tensor q, struct tensor k,
                               struct tensor v, struct tensor out, struct tensor logsumexp, struct tensor dq, struct tensor dk,
                               struct tensor dv) {
    check_attention(shape, q, k, v, out, logsumexp);
    CHECK_OP(shape.key_count, ==, shape.query_count);
    CHECK(is_query(shape, dout, q.dtype) && is_query(shape, dq, q.dtype));
    CHECK(is_key(shape, dk, q.dtype) && is_key(shape, dv, q.dtype));
    int64_t heads = shape.batch * shape.head_count, queries = heads * shape.query_count;
    if (queries == 0)
        return;
    if (fits_tiles(shape, q.dtype)) {
        backward_on_tiles(shape, dout, q, k, v, out, logsumexp, dq, dk, dv);
        return;
    }
    float *delta = (float *)cuda_scratch((size_t)queries * sizeof *delta);
    WITH_FLOAT(q.dtype, T, {
        plain_job<T> job = plain_job_of<T>(shape, q, k, v, logsumexp);
        job.dout = (const T *)dout.data, job.out = (const T *)out.data, job.delta = delta;
        job.dq = (T *)dq.data, job.dk = (T *)dk.data, job.dv = (T *)dv.data;
        launch_plain_backward(job);
    });
}

void attention_fill_cuda(struct kernel_ops *ops) {
    ops->attention_forward = attention_forward;
    ops->attention_kept = attention_kept;
    ops->attention_keep = attention_keep;
    ops->attention_backward = attention_backward;
}
