/* What the forms of causal attention of bf16 on matrix units share: one call, and how the two meet (attention.cu). */
#pragma once

#include "kernels/cuda/common.cuh"

#define LOG2_E 1.4426950408889634
#define LN_2 0.6931471805599453

/* One call. */
struct tile_job {
    int query_count, key_count, head_dim, heads, kv_heads, group;
    int64_t batch;
    const int32_t *earlier; /* how many keys are before those of the queries, or NULL: all but those (attention_kept) */
    int64_t row_sum_stride; /* of row_lse and row_delta, [B*H, row_sum_stride], a multiple of 64 */
    float scale, scale_log2;
    const bf16 *q, *k, *v, *out, *dout;
    bf16 *to, *dq, *dk, *dv; /* to: the output of forward */
    float *logsumexp;
    float *row_lse, *row_delta; /* logsumexp to base 2, infinite where no query is; sum of dout * out, 0 there */
    bf16 *kept;                 /* memory for gradients of scores, or NULL */
};

/* The keys that are there: of a plain_job, too. */
template <typename J> static __device__ __forceinline__ int keys_there(const J &job) {
    return job.earlier ? *job.earlier + (int)job.query_count : (int)job.key_count;
}

/* On Hopper's matrix units, for as many queries as keys. False: not made for this device or these operands, nothing was done.
 * Backward: row_lse and row_delta are there (tile_delta). */
bool sm90_attention_forward(const tile_job &job);
bool sm90_attention_backward(const tile_job &job);
size_t sm90_attention_backward_bytes(const tile_job &job); /* that it wants to have at `kept`; 0: none */
