/* The gating network: softmax over the experts' scores, the best K of them, the rows sorted by expert.
 * Dropless: every choice becomes a row. Source: arXiv 1701.06538 eq. 3-5; losses: 2101.03961 eq. 4, 2202.08906 eq. 5.
 * */
#pragma once

#include "nn/exchange.h"

struct router_dims {
    int64_t rows;  /* S */
    int64_t width; /* D */
    int64_t expert_count, choice_count; /* E, K */
    bool normalize; /* norm_topk_prob */
};

struct router_saved {
    struct tensor logits, prob; /* real [S,E] */
    struct route route;
};

struct router_scratch {
    struct tensor x;                /* real [S,D] */
    struct tensor dweight, dlogits; /* real [S,K], [S,E] */
};

void router_saved_take(struct router_saved *saved, const struct layer_context *context,
                       const struct router_dims *dims, struct arena *arena);
void router_scratch_take(struct router_scratch *scratch, const struct layer_context *context,
                         const struct router_dims *dims, struct arena *arena);

/* x compute [S,D], weight real [E,D] -> saved. stats f64 [2+2E] += (see router_stats), or none. */
void router_forward(const struct layer_context *context, const struct router_dims *dims, struct tensor weight,
                    struct tensor x, struct router_saved *saved, const struct router_scratch *scratch,
                    struct tensor stats);

/* From scratch->dweight and the losses: dgradient real [E,D] +=, dx real [S,D] += . dx none: what it lacks is scratch->dlogits
 * weight. count i32 [E]: rows of each expert of all tokens that the balance loss is over. */
void router_backward(const struct layer_context *context, const struct router_dims *dims, struct tensor weight,
                     struct tensor x, const struct router_saved *saved, const struct router_scratch *scratch,
                     struct tensor count, struct router_loss_scales scales, struct tensor dgradient,
                     struct tensor dx);
