/* The router: choosing experts, ordering rows by expert, and bringing their answers back to the tokens. The scores of a
 * token are a warp's: lane l has those of experts l, l + 32, ... in registers. */
#include "kernels/cuda/counting.cuh"

enum { ROUTER_WARPS = THREADS / WARP, EXPERTS_MAX = EXPERTS_MOST };

struct router {
    const float *logits, *dweight;
    float *prob, *weight, *dlogits;
    int32_t *expert;
    const int32_t *count;
    int64_t tokens, experts, choices;
    bool normalize;
    double balance_scale;
    float z_scale;
    double *parts; /* [blocks, 2 + 2E], of statistics */
    int64_t tokens_per_warp;
};

/* Calls CODE with PER, how many scores a lane has. */
#define WITH_SCORES(experts, PER, ...)          \
    do {                                        \
        if ((experts) <= WARP) {                \
            enum { PER = 1 };                   \
            __VA_ARGS__;                        \
        } else if ((experts) <= 2 * WARP) {     \
            enum { PER = 2 };                   \
            __VA_ARGS__;                        \
        } else if ((experts) <= 4 * WARP) {     \
            enum { PER = 4 };                   \
            __VA_ARGS__;                        \
        } else if ((experts) <= 8 * WARP) {     \
            enum { PER = 8 };                   \
            __VA_ARGS__;                        \
        } else {                                \
            enum { PER = EXPERTS_MAX / WARP };  \
            __VA_ARGS__;                        \
        }                                       \
    } while (0)

/* A token's row of a table; `beyond` where there is no expert. */
template <int per>
static __device__ __forceinline__ void load_row(const float *table, int64_t token, int64_t experts, float beyond, float *x) {
#pragma unroll
    for (int i = 0; i < per; i++) {
        int e = i * WARP + (int)threadIdx.x % WARP;
        x[i] = e < experts ? table[token * experts + e] : beyond;
    }
}

template <int per> static __device__ __forceinline__ float largest_of(const float *score) {
    float most = -INFINITY;
    for (int i = 0; i < per; i++)
        most = fmaxf(most, score[i]);
    return warp_max(most);
}

/* Sum over e of exp(score - most); the exponentials to `out` unless that is NULL. */
template <int per>
static __device__ __forceinline__ float exp_sum(const float *score, int64_t experts, float most, float *out) {
    float sum = 0;
    for (int i = 0; i < per; i++) {
        float x = i * WARP + (int)threadIdx.x % WARP < experts ? expf(score[i] - most) : 0;
        if (out)
            out[i] = x;
        sum += x;
    }
    return warp_sum(sum);
}

/* ---- choosing --------------------------------------------------------------------------------------------------------- */

enum { KEY_TAKEN = INT32_MIN, KEY_NAN };

/* Integers in the order of the scores, equal where these are: the bits of a float, those of negative ones turned around.
 * NaNs come last, so that K different experts are chosen of whatever there is. */
static __device__ __forceinline__ int32_t score_key(float score) {
    union {
        float f;
        int32_t i;
    } bits = {score};
    if (score != score)
        return KEY_NAN;
    return score == 0 ? 0 : bits.i ^ (bits.i >> 31 & INT32_MAX);
}

/* The best of the keys that are left, on a tie the lower expert. Every lane gets its index. */
template <int per> static __device__ __forceinline__ int best_expert(const int32_t *key) {
    int32_t best = KEY_TAKEN, index = 0;
    for (int i = 0; i < per; i++) {
        bool better = key[i] > best;
        best = better ? key[i] : best;
        index = better ? i : index;
    }
    /* one number that is larger for a better key, then for a lower index */
    int64_t rank = (int64_t)best * ((int64_t)1 << 32) + (INT32_MAX - (index * WARP + (int)threadIdx.x % WARP));
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        int64_t other = __shfl_xor_sync(FULL_WARP, rank, distance);
        rank = other > rank ? other : rank;
    }
    return INT32_MAX - (int32_t)(rank & INT32_MAX);
}

/* Scores are compared and not their probabilities: those can be equal after rounding, or all zero far below the best, where
 * the scores still differ. */
template <int per>
static __device__ void choose(const struct router &r, int64_t token, const float *prob, int32_t *key) {
    int lane = (int)threadIdx.x % WARP;
    int32_t *expert = r.expert + token * r.choices;
    float *weight = r.weight + token * r.choices, sum = 0;
    for (int k = 0; k < (int)r.choices; k++) {
        int best = best_expert<per>(key);
        float p = 0;
#pragma unroll
        for (int i = 0; i < per; i++)
            if (i * WARP + lane == best) {
                key[i] = KEY_TAKEN;
                p = prob[i];
            }
        p = __shfl_sync(FULL_WARP, p, best % WARP);
        sum += p;
        if (k % WARP == lane) {
            expert[k] = best;
            weight[k] = p;
        }
    }
    for (int k = lane; r.normalize && k < (int)r.choices; k += WARP) /* what this lane has stored itself */
        weight[k] /= sum;
}

template <int per> static __global__ void topk_forward_kernel(struct router r) {
    int lane = (int)threadIdx.x % WARP;
    int64_t warps = (int64_t)gridDim.x * ROUTER_WARPS;
    for (int64_t s = (int64_t)blockIdx.x * ROUTER_WARPS + threadIdx.x / WARP; s < r.tokens; s += warps) {
        float score[per], prob[per];
        int32_t key[per];
        load_row<per>(r.logits, s, r.experts, -INFINITY, score);
        float most = largest_of<per>(score), share = 1 / exp_sum<per>(score, r.experts, most, prob);
#pragma unroll
        for (int i = 0; i < per; i++) {
            int e = i * WARP + lane;
            prob[i] *= share;
            key[i] = e < r.experts ? score_key(score[i]) : (int32_t)KEY_TAKEN;
            if (e < r.experts)
                r.prob[s * r.experts + e] = prob[i];
        }
        choose<per>(r, s, prob, key);
    }
}

static struct router router_of(struct tensor logits, struct tensor prob, struct tensor expert) {
    struct router r = {};
    r.tokens = logits.shape[0], r.experts = logits.shape[1], r.choices = expert.shape[1];
    CHECK(logits.dtype == DTYPE_F32 && prob.dtype == DTYPE_F32 && expert.dtype == DTYPE_I32);
    CHECK(tensor_elements(logits) == r.tokens * r.experts && tensor_same_shape(prob, logits));
    CHECK(tensor_elements(expert) == r.tokens * r.choices);
    CHECK(r.choices >= 1 && r.choices <= r.experts);
    CHECK_OP(r.experts, <=, EXPERTS_MAX);
    r.logits = (const float *)logits.data;
    r.prob = (float *)prob.data;
    r.expert = (int32_t *)expert.data;
    return r;
}

static void router_topk_forward(struct tensor logits, bool normalize, struct tensor prob, struct tensor expert,
                                struct tensor weight) {
    struct router r = router_of(logits, prob, expert);
    CHECK(weight.dtype == DTYPE_F32 && tensor_same_shape(weight, expert));
    r.weight = (float *)weight.data;
    r.normalize = normalize;
    if (r.tokens > 0)
        WITH_SCORES(r.experts, PER,
                    CUDA_LAUNCH((topk_forward_kernel<PER>), grid_for(r.tokens, ROUTER_WARPS), THREADS, 0, r));
}

/* ---- its gradient ----------------------------------------------------------------------------------------------------- */

/* dprob += the gradient through the weights: a weight is a probability, or that divided by the sum of the chosen. */
template <int per>
static __device__ __forceinline__ void add_weight_gradient(const struct router &r, int64_t token, float *dprob) {
    const int32_t *expert = r.expert + token * r.choices;
    const float *weight = r.weight + token * r.choices, *dweight = r.dweight + token * r.choices;
    int lane = (int)threadIdx.x % WARP;
    float sum = 0, mean = 0;
    for (int k = lane; r.normalize && k < (int)r.choices; k += WARP) {
        sum += r.prob[token * r.experts + expert[k]];
        mean += dweight[k] * weight[k];
    }
    sum = warp_sum(sum);
    mean = warp_sum(mean);
    for (int k = 0; k < (int)r.choices; k++) {
        int e = expert[k];
        float d = r.normalize ? (dweight[k] - mean) / sum : dweight[k];
#pragma unroll
        for (int i = 0; i < per; i++)
            dprob[i] += i * WARP + lane == e ? d : 0;
    }
}

template <int per> static __global__ void topk_backward_kernel(struct router r) {
    int lane = (int)threadIdx.x % WARP;
    int64_t warps = (int64_t)gridDim.x * ROUTER_WARPS;
    for (int64_t s = (int64_t)blockIdx.x * ROUTER_WARPS + threadIdx.x / WARP; s < r.tokens; s += warps) {
        float prob[per], dprob[per], z = 0, mean = 0;
        if (r.z_scale != 0) { /* else the logits are not looked at */
            load_row<per>(r.logits, s, r.experts, -INFINITY, dprob);
            float most = largest_of<per>(dprob);
            z = r.z_scale * (most + logf(exp_sum<per>(dprob, r.experts, most, NULL)));
        }
        load_row<per>(r.prob, s, r.experts, 0, prob);
#pragma unroll
        for (int i = 0; i < per; i++) {
            int e = i * WARP + lane;
            dprob[i] = e < r.experts ? (float)(r.balance_scale * (double)r.count[e]) : 0;
        }
        add_weight_gradient<per>(r, s, dprob);
        for (int i = 0; i < per; i++)
            mean += prob[i] * dprob[i];
        mean = warp_sum(mean);
#pragma unroll
        for (int i = 0; i < per; i++)
            if (i * WARP + lane < r.experts)
                r.dlogits[s * r.experts + i * WARP + lane] = prob[i] * (dprob[i] - mean + z);
    }
}

static void router_topk_backward(struct tensor dweight, struct tensor logits, struct tensor prob, struct tensor expert,
                                 struct tensor weight, bool normalize, struct tensor count, struct router_loss_scales scales,
                                 struct tensor dlogits) {
    struct router r = router_of(logits, prob, expert);
    CHECK(weight.dtype == DTYPE_F32 && tensor_same_shape(weight, expert));
    CHECK(dweight.dtype == DTYPE_F32 && tensor_same_shape(dweight, weight));
    CHECK(dlogits.dtype == DTYPE_F32 && tensor_same_shape(dlogits, logits));
    CHECK(count.dtype == DTYPE_I32 && tensor_elements(count) == r.experts);
    r.weight = (float *)weight.data;
    r.dweight = (const float *)dweight.data;
    r.dlogits = (float *)dlogits.data;
    r.count = (const int32_t *)count.data;
    r.normalize = normalize;
    r.balance_scale = scales.balance_scale;
    r.z_scale = (float)(2 * scales.z_scale);
    if (r.tokens > 0)
        WITH_SCORES(r.experts, PER,
                    CUDA_LAUNCH((topk_backward_kernel<PER>), grid_for(r.tokens, ROUTER_WARPS), THREADS, 0, r));
}

/* ---- statistics ------------------------------------------------------------------------------------------------------- */

/* One token's share. The entropy is the mean of -log prob = (most - logit) + log(sum of exp(logit - most)): two numbers that
 * are not negative, so that nothing cancels, and one logarithm a token. */
template <int per>
static __device__ __forceinline__ void add_token_stats(const struct router &r, int64_t token, double *squares, double *entropy,
                                                       double *prob_sum) {
    float score[per], prob[per], here = 0;
    load_row<per>(r.logits, token, r.experts, -INFINITY, score);
    load_row<per>(r.prob, token, r.experts, 0, prob);
    float most = largest_of<per>(score), log_sum = logf(exp_sum<per>(score, r.experts, most, NULL));
#pragma unroll
    for (int i = 0; i < per; i++) {
        here += prob[i] > 0 ? prob[i] * ((most - score[i]) + log_sum) : 0;
        prob_sum[i] += (double)prob[i];
    }
    double logsumexp = (double)most + (double)log_sum;
    *squares += logsumexp * logsumexp;
    *entropy += (double)here; /* of this lane's experts */
}

/* A block's share of all statistics. Shared: 2 + E sums, then E counts. */
template <int per> static __global__ void stats_kernel(struct router r) {
    CUDA_SHARED_DYNAMIC(double, sums);
    int lane = (int)threadIdx.x % WARP, warp = (int)threadIdx.x / WARP, experts = (int)r.experts;
    int32_t *rows = (int32_t *)(sums + 2 + experts);
    for (int e = (int)threadIdx.x; e < 2 + experts; e += THREADS)
        sums[e] = 0;
    for (int e = (int)threadIdx.x; e < experts; e += THREADS)
        rows[e] = 0;
    __syncthreads();
    double squares = 0, entropy = 0, prob_sum[per];
    for (int i = 0; i < per; i++)
        prob_sum[i] = 0;
    int64_t first = ((int64_t)blockIdx.x * ROUTER_WARPS + warp) * r.tokens_per_warp, end = first + r.tokens_per_warp;
    end = end < r.tokens ? end : r.tokens;
    for (int64_t s = first; s < end; s++)
        add_token_stats<per>(r, s, &squares, &entropy, prob_sum);
    for (int64_t i = first * r.choices + lane; i < end * r.choices; i += WARP)
        atomicAdd(&rows[r.expert[i]], 1);
    entropy = warp_sum(entropy);
    for (int w = 0; w < ROUTER_WARPS; w++) {
        if (w == warp) {
            if (lane == 0) {
                sums[0] += squares;
                sums[1] += entropy;
            }
#pragma unroll
            for (int i = 0; i < per; i++)
                if (i * WARP + lane < experts)
                    sums[2 + i * WARP + lane] += prob_sum[i];
        }
        __syncthreads();
    }
    double *part = r.parts + (int64_t)blockIdx.x * (2 + 2 * experts);
    for (int e = (int)threadIdx.x; e < 2 + experts; e += THREADS)
        part[e] = sums[e];
    for (int e = (int)threadIdx.x; e < experts; e += THREADS)
        part[2 + experts + e] = (double)rows[e];
}

/* A warp for each statistic. */
static __global__ void sum_stats_kernel(const double *parts, int64_t blocks, int64_t stat_count, double *stats) {
    int64_t i = (int64_t)blockIdx.x * ROUTER_WARPS + threadIdx.x / WARP;
    if (i < stat_count) {
        double sum = 0;
        for (int64_t b = threadIdx.x % WARP; b < blocks; b += WARP)
            sum += parts[b * stat_count + i];
        sum = warp_sum(sum);
        if (threadIdx.x % WARP == 0)
            stats[i] += sum;
    }
}

static void router_stats(struct tensor logits, struct tensor prob, struct tensor expert, struct tensor stats) {
    struct router r = router_of(logits, prob, expert);
    int64_t stat_count = 2 + 2 * r.experts;
    CHECK(stats.dtype == DTYPE_F64 && tensor_elements(stats) == stat_count);
    if (r.tokens == 0)
        return;
    int64_t most_warps = 512 * ROUTER_WARPS;
    r.tokens_per_warp = r.tokens > 4 * most_warps ? ceil_div(r.tokens, most_warps) : 4;
    unsigned grid = (unsigned)ceil_div(r.tokens, ROUTER_WARPS * r.tokens_per_warp);
    r.parts = (double *)cuda_scratch((size_t)(grid * stat_count) * sizeof(double));
    size_t shared = (size_t)(2 + r.experts) * sizeof(double) + (size_t)r.experts * sizeof(int32_t);
    WITH_SCORES(r.experts, PER, CUDA_LAUNCH((stats_kernel<PER>), grid, THREADS, shared, r));
    CUDA_LAUNCH(sum_stats_kernel, (unsigned)ceil_div(stat_count, ROUTER_WARPS), THREADS, 0, (const double *)r.parts,
                (int64_t)grid, stat_count, (double *)stats.data);
}

/* ---- order by expert -------------------------------------------------------------------------------------------------- */

struct slot_keys {
    const int32_t *expert;
    __device__ int operator()(int64_t slot) const {
        return expert[slot];
    }
};

struct place_slot {
    int32_t *row_slot, *row_token, *slot_row, choices;
    __device__ void operator()(int64_t slot, int expert, int32_t row) const {
        (void)expert;
        row_slot[row] = (int32_t)slot;
        row_token[row] = (int32_t)slot / choices;
        slot_row[slot] = row;
    }
};

static void route_sort(struct tensor expert, struct tensor count, struct tensor offsets, struct tensor row_slot,
                       struct tensor row_token, struct tensor slot_row) {
    int64_t slots = tensor_elements(expert), experts = tensor_elements(count);
    CHECK(expert.dtype == DTYPE_I32 && count.dtype == DTYPE_I32 && offsets.dtype == DTYPE_I32);
    CHECK(row_slot.dtype == DTYPE_I32 && row_token.dtype == DTYPE_I32 && slot_row.dtype == DTYPE_I32);
    CHECK(tensor_elements(offsets) == experts + 1 && tensor_elements(row_slot) == slots);
    CHECK(tensor_elements(row_token) == slots && tensor_elements(slot_row) == slots);
    CHECK(expert.shape[1] >= 1);
    struct counting c = counting_of(slots, experts);
    struct slot_keys keys = {(const int32_t *)expert.data};
    struct place_slot place = {(int32_t *)row_slot.data, (int32_t *)row_token.data, (int32_t *)slot_row.data,
                               (int32_t)expert.shape[1]};
    count_and_place(keys, place, c, cuda_scratch(counting_bytes(&c)), (int32_t *)offsets.data, (int32_t *)count.data);
}

/* ---- back to the tokens ----------------------------------------------------------------------------------------------- */

/* `count` neighbours of a token's row a thread and step. y = base, which may be none or y itself, + the sum. */
template <int count, typename X, typename Y>
static __global__ void combine_kernel(const X *rows, const int32_t *slot_row, const Y *base, Y *y, int64_t tokens, int64_t width,
                                      int choices, int threads) {
    enum { AHEAD = 4 };
    int64_t tokens_a_block = THREADS / threads, pieces = width / count;
    for (int64_t s = blockIdx.x * tokens_a_block + threadIdx.x / threads; s < tokens; s += gridDim.x * tokens_a_block)
        for (int64_t piece = threadIdx.x % threads; piece < pieces; piece += threads) {
            float sum[EIGHT] = {0}, x[AHEAD][EIGHT], old[EIGHT];
            int64_t at = s * width + piece * count;
            if (base)
                load_some<count>(base + at, old);
            for (int k = 0; k < choices; k += AHEAD) {
                int64_t row[AHEAD];
#pragma unroll
                for (int i = 0; i < AHEAD; i++) {
                    row[i] = k + i < choices ? slot_row[s * choices + k + i] : -1;
                    if (row[i] >= 0)
                        load_some<count>(rows + row[i] * width + piece * count, x[i]);
                }
#pragma unroll
                for (int i = 0; i < AHEAD; i++)
                    for (int j = 0; j < count && row[i] >= 0; j++)
                        sum[j] += x[i][j];
            }
            for (int j = 0; j < count && base; j++)
                sum[j] += old[j];
            store_some<count>(y + at, sum);
        }
}

static void combine(struct tensor rows, struct tensor slot_row, struct tensor base, struct tensor y) {
    int64_t tokens = y.shape[0], width = y.shape[1];
    int choices = (int)slot_row.shape[1];
    const int32_t *row = (const int32_t *)slot_row.data;
    CHECK(slot_row.dtype == DTYPE_I32 && tensor_elements(slot_row) == tokens * choices);
    CHECK(tensor_elements(y) == tokens * width && tensor_elements(rows) == rows.shape[0] * width);
    if (tokens == 0 || width == 0)
        return;
    bool is_wide = width % EIGHT == 0 && is_aligned(rows.data, 16) && is_aligned(base.data, 16) && is_aligned(y.data, 16);
    int threads = threads_a_row(is_wide ? width / EIGHT : width);
    unsigned grid = grid_for_rows(tokens, threads);
    WITH_FLOAT(rows.dtype, X, WITH_FLOAT(y.dtype, Y, {
                   const X *from = (const X *)rows.data;
                   const Y *onto = (const Y *)base.data;
                   Y *to = (Y *)y.data;
                   if (is_wide)
                       CUDA_LAUNCH((combine_kernel<EIGHT, X, Y>), grid, THREADS, 0, from, row, onto, to, tokens, width, choices,
                                   threads);
                   else
                       CUDA_LAUNCH((combine_kernel<1, X, Y>), grid, THREADS, 0, from, row, onto, to, tokens, width, choices,
                                   threads);
               }));
}

static void combine_rows(struct tensor rows, struct tensor slot_row, struct tensor y, bool accumulate) {
    combine(rows, slot_row, accumulate ? y : tensor_none(), y);
}

static void combine_rows_onto(struct tensor rows, struct tensor slot_row, struct tensor base, struct tensor y) {
    CHECK(base.dtype == y.dtype && tensor_same_shape(base, y));
    combine(rows, slot_row, base, y);
}

void router_fill_cuda(struct kernel_ops *ops) {
    ops->router_topk_forward = router_topk_forward;
    ops->router_topk_backward = router_topk_backward;
    ops->router_stats = router_stats;
    ops->route_sort = route_sort;
    ops->combine_rows = combine_rows;
    ops->combine_rows_onto = combine_rows_onto;
}
