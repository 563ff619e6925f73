/* Attention of few queries to many keys, as it is when one token after the other is written: the keys are divided into parts, each
 * the work of somebody else, and what the parts found is put together by a kernel of its own (arXiv 2311.01282). */
#pragma once

#include "kernels/cuda/attention.cuh"

/* What a part leaves of each query of a head, numbered as the elements of logsumexp: its largest score (scaled, natural; -INFINITY
 * where it sees no key of the part), the sum of weights relative to that, and the values summed with those weights. */
struct key_parts {
    int count, keys; /* parts, keys of each; the last may have fewer */
    float2 *state;   /* [B*query_count*H, count] */
    float *value;    /* [B*query_count*H, count, width] */
};

/* Whether a call is worth dividing; shapes tell, and how. */
bool key_parts_divide(struct attention_shape shape);
/* Takes scratch. */
struct key_parts key_parts_take(struct attention_shape shape);
/* out and logsumexp from what the parts left. */
void key_parts_join(struct attention_shape shape, struct key_parts parts, struct tensor out, struct tensor logsumexp);

/* Fills the parts on the matrix units: operands of bf16 aligned to 16, heads of up to 128 elements, whole eights. */
void key_parts_fill_bf16(const tile_job &job, struct key_parts parts);

static __device__ __forceinline__ int64_t part_place(const struct key_parts &parts, int64_t query, int part) {
    return query * parts.count + part;
}
