/* Attention of few queries of bf16 to many keys: k and v are read once, by 16 bytes, straight to registers, for all query heads
 * that share them.
 *
 * A block has a part of the keys of one key-value head and 8 rows, a row being a query of one of the heads that share it. Each of
 * its four warps takes 16 keys at a time, with its own running maximum; they meet once, at the end. Lane 4 r + c, by the matrix
 * unit's order:
 *
 *   scores [16 keys, 8 rows] = k q^T      left operand: keys r and r + 8, of each 32 columns the eight from 8 c on; right: row r
 *   values [128 columns, 8 rows] = v^T w  left operand: columns 8 r + j and 64 + 8 r + j (j: which of eight products) of keys 2 c,
 *                                         2 c + 1 and those 8 further on; right: the weights, turned round among the lanes
 *
 * Of the scores and of the values a lane has rows 2 c and 2 c + 1, so that a change of maximum needs no exchange.
 *
 * Arithmetic: a key is 512 bytes of k and v for 128 columns. 16 loads of 16 bytes a lane are under way, 32 KB a block; registers
 * leave room for three blocks a processor. 4,096 keys of 4 heads are 64 parts of 64 keys, 256 blocks, 8.4 MB: 2.5 us after
 * 0.7 us of waiting. What the parts leave is 528 bytes a row and part, 0.5 MB written and read in the second-level cache for 16
 * heads and one query. More rows than eight (3 queries of 4 heads) are other blocks, which find k and v in that cache: with 16
 * queries 8 times 8.4 MB, 12 us, where one block a head would need 64 turns one after the other. */
#include "kernels/cuda/attention_few.cuh"

#include "kernels/cuda/eights.cuh"

enum {
    QUERIES_MAX = 16,
    KEYS_MIN = 128,
    ROWS = 8, /* of a block */
    WARPS = 4,
    WARP_KEYS = 16,
    TURN_KEYS = WARPS * WARP_KEYS,
    BLOCKS = 132 * 3, /* of all heads and parts: what a device has at once; beyond, dividing keys wins nothing */
    COLUMNS = 128,
    VALUE_STRIDE = COLUMNS + 4, /* of a row in shared memory */
    SHARED_FLOATS = WARPS * ROWS * (VALUE_STRIDE + 2)
};

/* ---- on the matrix units -------------------------------------------------------------------------------------------- */

/* Where a block is. */
struct few_block {
    int64_t batch;
    int kv_head, part, first_row, rows; /* rows: of the head, all blocks */
    int begin, end;                     /* keys */
};

static __device__ __forceinline__ struct few_block this_block(const tile_job &job, const struct key_parts &parts) {
    struct few_block b;
    b.rows = job.query_count * job.group;
    int tiles = (b.rows + ROWS - 1) / ROWS;
    int rest = (int)blockIdx.x / tiles;
    b.first_row = (int)blockIdx.x % tiles * ROWS;
    b.part = rest % parts.count, rest /= parts.count;
    b.kv_head = rest % job.kv_heads, b.batch = rest / job.kv_heads;
    b.begin = b.part * parts.keys;
    b.end = min(b.begin + parts.keys, keys_there(job));
    return b;
}

/* Number of a row among all queries of all heads. */
static __device__ __forceinline__ int64_t query_of(const tile_job &job, const struct few_block &b, int row) {
    return (b.batch * job.query_count + row / job.group) * job.heads + b.kv_head * job.group + row % job.group;
}

/* 16 keys, as the matrix unit's left operands: k [32 columns each][key r, r + 8], v [columns from 8 r, 64 + 8 r][key 2 c ..]. */
struct few_keys {
    uint4 k[4][2], v[2][4];
};

static __device__ __forceinline__ uint4 load_unit(const bf16 *from, bool is_here) {
    const uint4 nothing = {0, 0, 0, 0};
    return is_here ? *(const uint4 *)from : nothing;
}

static __device__ __forceinline__ void load_keys(const tile_job &job, const struct few_block &b, int first,
                                                 struct few_keys *keys) {
    int lane = (int)threadIdx.x % WARP, r = lane / 4, c = lane % 4;
    int64_t stride = (int64_t)job.kv_heads * job.head_dim;
    int64_t at = (b.batch * job.key_count + first) * stride + (int64_t)b.kv_head * job.head_dim;
    UNROLL
    for (int h = 0; h < 2; h++)
        UNROLL
        for (int s = 0; s < 4; s++) {
            int key = r + 8 * h, column = 32 * s + 8 * c;
            keys->k[s][h] = load_unit(job.k + at + key * stride + column, first + key < b.end && column < job.head_dim);
        }
    UNROLL
    for (int n = 0; n < 4; n++)
        UNROLL
        for (int h = 0; h < 2; h++) {
            int key = 2 * c + n % 2 + n / 2 * 8, column = 64 * h + 8 * r;
            keys->v[h][n] = load_unit(job.v + at + key * stride + column, first + key < b.end && column < job.head_dim);
        }
}

static __device__ __forceinline__ uint32_t word_of(const uint4 &unit, int i) {
    return i == 0 ? unit.x : i == 1 ? unit.y : i == 2 ? unit.z : unit.w;
}

/* Element j of each of two units, the first in the lower half. */
static __device__ __forceinline__ uint32_t pair_of(const uint4 &low, const uint4 &high, int j) {
    uint32_t a = word_of(low, j / 2), b = word_of(high, j / 2);
    return j % 2 ? a >> 16 | (b & 0xFFFF0000u) : (a & 0xFFFFu) | b << 16;
}

/* Of an 8 x 8 matrix, a pair of neighbours of row r in lane 4 r + c, the same of its transpose. */
static __device__ __forceinline__ uint32_t turn_round(uint32_t pair) {
    int lane = (int)threadIdx.x % WARP, r = lane / 4, c = lane % 4;
    uint32_t a = __shfl_sync(FULL_WARP, pair, c * 8 + r / 2), b = __shfl_sync(FULL_WARP, pair, c * 8 + 4 + r / 2);
    return r % 2 ? a >> 16 | (b & 0xFFFF0000u) : (a & 0xFFFFu) | b << 16;
}

/* Over the lanes that have the same rows. */
static __device__ __forceinline__ float max_of_keys(float x) {
    for (int distance = 4; distance < WARP; distance *= 2)
        x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, distance));
    return x;
}

static __device__ __forceinline__ float sum_of_keys(float x) {
    for (int distance = 4; distance < WARP; distance *= 2)
        x += __shfl_xor_sync(FULL_WARP, x, distance);
    return x;
}

/* A maximum to subtract: where no key is seen, anything but infinity. */
static __device__ __forceinline__ float base_of(float most) {
    return most == -INFINITY ? 0 : most;
}

/* Of rows 2 c and 2 c + 1: the largest score (scaled, to base 2), this lane's share of the sum of weights, and the values, of
 * which value[j][0..1] are column 8 r + j, value[j][2..3] column 64 + 8 r + j. */
struct few_sums {
    float most[2], weight[2], value[8][4];
};

/* Keys first .. first + 15; each row sees keys 0 .. last. */
static __device__ __forceinline__ void add_keys(const tile_job &job, const uint4 q[4], const struct few_keys &keys, int first,
                                                const int last[2], struct few_sums *sums) {
    float s[4] = {0};
    UNROLL
    for (int i = 0; i < 4; i++) {
        uint32_t a[2][4] = {{keys.k[i][0].x, keys.k[i][1].x, keys.k[i][0].y, keys.k[i][1].y},
                            {keys.k[i][0].z, keys.k[i][1].z, keys.k[i][0].w, keys.k[i][1].w}};
        uint32_t b[4] = {q[i].x, q[i].y, q[i].z, q[i].w};
        mma_bf16(s, a[0], b);
        mma_bf16(s, a[1], b + 2);
    }
    int key = first + (int)threadIdx.x % WARP / 4;
    float fall[2];
    UNROLL
    for (int h = 0; h < 2; h++) {
        float low = key <= last[h] ? s[h] * job.scale_log2 : -INFINITY;
        float high = key + 8 <= last[h] ? s[2 + h] * job.scale_log2 : -INFINITY;
        float top = fmaxf(sums->most[h], max_of_keys(fmaxf(low, high)));
        fall[h] = power_of_2(sums->most[h] - base_of(top));
        sums->most[h] = top;
        s[h] = power_of_2(low - base_of(top));
        s[2 + h] = power_of_2(high - base_of(top));
        sums->weight[h] = sums->weight[h] * fall[h] + s[h] + s[2 + h];
    }
    uint32_t weights[2] = {turn_round(pack_bf16(s[0], s[1])), turn_round(pack_bf16(s[2], s[3]))};
    UNROLL
    for (int j = 0; j < 8; j++) {
        uint32_t a[4] = {pair_of(keys.v[0][0], keys.v[0][1], j), pair_of(keys.v[1][0], keys.v[1][1], j),
                         pair_of(keys.v[0][2], keys.v[0][3], j), pair_of(keys.v[1][2], keys.v[1][3], j)};
        UNROLL
        for (int e = 0; e < 4; e++)
            sums->value[j][e] *= fall[e % 2];
        mma_bf16(sums->value[j], a, weights);
    }
}

/* What a warp found, into shared memory: values [ROWS, VALUE_STRIDE], states [ROWS]. */
static __device__ __forceinline__ void leave_sums(const struct few_sums &sums, float *value, float2 *state) {
    int lane = (int)threadIdx.x % WARP, r = lane / 4, c = lane % 4;
    UNROLL
    for (int h = 0; h < 2; h++) {
        float2 mine = {sums.most[h], sum_of_keys(sums.weight[h])};
        UNROLL
        for (int half = 0; half < 2; half++) {
            float x[EIGHT];
            UNROLL
            for (int j = 0; j < EIGHT; j++)
                x[j] = sums.value[j][2 * half + h];
            store_eight(value + (2 * c + h) * VALUE_STRIDE + 64 * half + 8 * r, x);
        }
        if (r == 0)
            state[2 * c + h] = mine;
    }
}

/* The part's: the sums of the four warps, by all threads, four columns each. */
static __device__ __forceinline__ void add_warps(const tile_job &job, const struct key_parts &parts, const struct few_block &b,
                                                 const float *value, const float2 *state) {
    int count = min(b.rows - b.first_row, (int)ROWS), pieces = job.head_dim / 4;
    for (int i = (int)threadIdx.x; i < count * pieces; i += WARPS * WARP) {
        int row = i / pieces, column = i % pieces * 4;
        float2 all = {-INFINITY, 0};
        float4 sum = {0, 0, 0, 0};
        for (int warp = 0; warp < WARPS; warp++)
            all.x = fmaxf(all.x, state[warp * ROWS + row].x);
        for (int warp = 0; warp < WARPS; warp++) {
            float2 its = state[warp * ROWS + row];
            float4 x = *(const float4 *)(value + (warp * ROWS + row) * VALUE_STRIDE + column);
            float share = power_of_2(its.x - base_of(all.x));
            all.y += share * its.y;
            sum.x += share * x.x, sum.y += share * x.y, sum.z += share * x.z, sum.w += share * x.w;
        }
        int64_t at = part_place(parts, query_of(job, b, b.first_row + row), b.part);
        *(float4 *)(parts.value + at * job.head_dim + column) = sum;
        all.x *= (float)LN_2;
        if (column == 0)
            parts.state[at] = all;
    }
}

static __global__ void __launch_bounds__(WARPS *WARP, 3) attend_part(const tile_job job, const struct key_parts parts) {
    CUDA_SHARED_DYNAMIC(float, value);
    float2 *state = (float2 *)(value + WARPS * ROWS * VALUE_STRIDE);
    const struct few_block b = this_block(job, parts);
    int lane = (int)threadIdx.x % WARP, r = lane / 4, c = lane % 4, warp = (int)threadIdx.x / WARP;
    struct few_sums sums = {{-INFINITY, -INFINITY}, {0}, {{0}}};
    uint4 q[4];
    int last[2], row = b.first_row + r;
    UNROLL
    for (int s = 0; s < 4; s++) {
        int column = 32 * s + 8 * c;
        q[s] = load_unit(job.q + query_of(job, b, row) * job.head_dim + column, row < b.rows && column < job.head_dim);
    }
    UNROLL
    for (int h = 0; h < 2; h++)
        /* Parts end with a turn, or all keys. */
        last[h] = keys_there(job) - job.query_count + (b.first_row + 2 * c + h) / job.group;
    for (int key = b.begin + warp * WARP_KEYS; key < b.end; key += TURN_KEYS) {
        struct few_keys keys;
        load_keys(job, b, key, &keys);
        __syncwarp(); /* the compiler may not ask for v when k has come */
        add_keys(job, q, keys, key, last, &sums);
    }
    leave_sums(sums, value + warp * ROWS * VALUE_STRIDE, state + warp * ROWS);
    __syncthreads();
    add_warps(job, parts, b, value, state);
}

void key_parts_fill_bf16(const tile_job &job, struct key_parts parts) {
    int64_t tiles = ceil_div((int64_t)job.query_count * job.group, ROWS), blocks = tiles * parts.count * job.kv_heads * job.batch;
    CHECK(blocks <= INT32_MAX);
    CUDA_LAUNCH(attend_part, (unsigned)blocks, WARPS * WARP, SHARED_FLOATS * sizeof(float), job, parts);
}

/* ---- parts ---------------------------------------------------------------------------------------------------------- */

/* A block has a query of a head; its warps take the parts in turn, a lane four columns at a time. */
enum { JOIN_WARPS = THREADS / WARP, JOIN_EACH = 4, JOIN_COLUMNS = JOIN_EACH * WARP };

template <typename T>
static __global__ void join_parts(const struct key_parts parts, int width, T *out, float *logsumexp) {
    CUDA_SHARED_DYNAMIC(float, share); /* [JOIN_WARPS, JOIN_COLUMNS] */
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP;
    int64_t query = blockIdx.x, first = part_place(parts, query, 0);
    float top = -INFINITY, all = 0;
    for (int i = lane; i < parts.count; i += WARP)
        top = fmaxf(top, parts.state[first + i].x);
    top = warp_max(top);
    for (int i = lane; i < parts.count; i += WARP)
        all += expf(parts.state[first + i].x - top) * parts.state[first + i].y;
    all = warp_sum(all);
    for (int column = 0; column < width; column += JOIN_COLUMNS) {
        float sum[JOIN_EACH] = {0};
#pragma unroll 4
        for (int i = warp; i < parts.count; i += JOIN_WARPS) {
            float weight = expf(parts.state[first + i].x - top);
            const float *value = parts.value + (first + i) * width + column;
            UNROLL
            for (int e = 0; e < JOIN_EACH; e++)
                if (column + e * WARP + lane < width)
                    sum[e] += weight * value[e * WARP + lane];
        }
        __syncthreads();
        for (int e = 0; e < JOIN_EACH; e++)
            share[warp * JOIN_COLUMNS + e * WARP + lane] = sum[e];
        __syncthreads();
        int mine = (int)threadIdx.x;
        if (mine < JOIN_COLUMNS && column + mine < width) {
            float x = 0;
            for (int other = 0; other < JOIN_WARPS; other++)
                x += share[other * JOIN_COLUMNS + mine];
            store(out + query * width + column + mine, x / all);
        }
    }
    if (threadIdx.x == 0)
        logsumexp[query] = top + logf(all);
}

bool key_parts_divide(struct attention_shape shape) {
    return cuda_has_few() && shape.query_count <= QUERIES_MAX && shape.key_count >= KEYS_MIN &&
           shape.batch * shape.kv_head_count < BLOCKS;
}

struct key_parts key_parts_take(struct attention_shape shape) {
    int64_t turns = ceil_div(shape.key_count, TURN_KEYS), wanted = ceil_div(BLOCKS, shape.batch * shape.kv_head_count);
    int64_t keys = ceil_div(turns, turns < wanted ? turns : wanted) * TURN_KEYS, count = ceil_div(shape.key_count, keys);
    int64_t states = shape.batch * shape.query_count * shape.head_count * count;
    struct key_parts parts = {(int)count, (int)keys, NULL, NULL};
    size_t state_bytes = (size_t)ceil_div(states * (int64_t)sizeof *parts.state, 256) * 256;
    char *scratch = (char *)cuda_scratch(state_bytes + (size_t)(states * shape.head_dim) * sizeof *parts.value);
    parts.state = (float2 *)scratch;
    parts.value = (float *)(scratch + state_bytes);
    return parts;
}

void key_parts_join(struct attention_shape shape, struct key_parts parts, struct tensor out, struct tensor logsumexp) {
    int64_t queries = shape.batch * shape.query_count * shape.head_count;
    CHECK(queries <= INT32_MAX);
    size_t shared = JOIN_WARPS * JOIN_COLUMNS * sizeof(float);
    WITH_FLOAT(out.dtype, T, {
        CUDA_LAUNCH((join_parts<T>), (unsigned)queries, THREADS, shared, parts, shape.head_dim, (T *)out.data,
                    (float *)logsumexp.data);
    });
}
