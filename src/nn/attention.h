/* The attention layer of Qwen3: RMS norm, projections, per-head norm and rotary positions, causal grouped-query
 * attention, output projection added to the residual stream. Source: Qwen3 technical report, arXiv 2505.09388. */
#pragma once

#include "nn/layer.h"

struct attention_dims {
    int64_t batch, sequence_length; /* S = batch * sequence_length rows */
    int64_t width;                  /* D */
    int head_count, kv_head_count, head_dim;
    double epsilon;
    struct tensor rope; /* real [positions, P], see qknorm_rope_forward */
};

struct attention_weights {
    struct tensor norm, query_norm, key_norm; /* real [D], [P], [P] */
    struct packed query, key, value, output;  /* compute [H*P,D], [G*P,D], [G*P,D], [D,H*P] */
};

struct attention_gradients { /* real, shapes of the weights */
    struct tensor norm, query_norm, key_norm, query, key, value, output;
    bool accumulate;
};

struct attention_saved {
    struct tensor normed, norm_rstd;              /* compute [S,D]; real [S] */
    struct tensor query_raw, key_raw;             /* compute [S,H*P], [S,G*P]: before norm and rotation */
    struct tensor query, key, value;              /* compute: after */
    struct tensor query_rstd, key_rstd;           /* real [S*H], [S*G] */
    struct tensor mixed, logsumexp;               /* compute [S,H*P]; real [S,H] */
};

struct attention_scratch {
    struct tensor dy;                       /* compute [S,D]: dx_compute of layer_rmsnorm_backward */
    struct tensor dmixed;                   /* compute [S,H*P] */
    struct tensor dquery, dkey, dvalue;     /* compute */
    struct tensor dnormed;                  /* layer_gradient_dtype [S,D] */
};

/* Keys and values of one sequence so far, for generation: rows 0 .. length-1 are filled. */
struct attention_cache {
    struct tensor key, value; /* compute [capacity, G*P] */
    int64_t length;
    /* Where rows are asked for once and repeated for other ones, the length is read from the device's memory, and is the caller's
     * to change. */
    int64_t bound;      /* of the keys then, length + S <= bound <= capacity; 0: what is asked for is done once */
    struct tensor kept; /* i32 [1]: length */
    struct tensor rope; /* real [S, P]: of the positions of the rows that come */
};

void attention_saved_take(struct attention_saved *saved, const struct layer_context *context,
                          const struct attention_dims *dims, struct arena *arena);
void attention_scratch_take(struct attention_scratch *scratch, const struct layer_context *context,
                            const struct attention_dims *dims, struct arena *arena);

/* x_out [S,D] = x [S,D] + attention(x); both real; x_out may not be x.
 * With a cache (batch 1): the S rows follow cache->length earlier ones; their keys and values are added to it, and
 * backward is not possible. cache->length grows by S, but with cache->bound. */
void attention_forward(const struct layer_context *context, const struct attention_dims *dims,
                       const struct attention_weights *weights, struct tensor x, struct attention_saved *saved,
                       struct attention_cache *cache, struct tensor x_out);

/* dx [S,D] real, inout: the gradient of x_out becomes that of x. Gradients of the weights += . */
void attention_backward(const struct layer_context *context, const struct attention_dims *dims,
                        const struct attention_weights *weights, struct tensor x, const struct attention_saved *saved,
                        const struct attention_scratch *scratch, const struct attention_gradients *gradients,
                        struct tensor dx);
