/* The phases of a pass through a model, in the grain of the schedule's events: a trainer calls them in the order of its
 * event list, and may move data between any two. Index `block` counts from 0.
 *
 * Forward of a micro-batch:  embed, then per block: attention, route, dispatch, experts, combine; then the head.
 * Backward: the head leaves workspace->dx; per block from the last: combine, experts, dispatch, route, attention, each
 * backward; then embed. In a dense model route, dispatch and combine do nothing and experts is the dense layer.
 */
#pragma once

#include "model/workspace.h"

/* Gradients of the losses, scaled so that a step's micro-batches add up to the mean over its tokens. */
struct loss_scales {
    double token;               /* of each token's cross entropy: 1 / tokens of the step */
    struct router_loss_scales router;
};

/* Scales of a step of micro_batches equal micro-batches of `rows` tokens. */
struct loss_scales model_loss_scales(const struct model *model, int64_t rows, int64_t micro_batches);

/* Sums of losses and statistics to zero: before the first micro-batch of a step. */
void model_clear_sums(const struct model *model, struct workspace *workspace);

void model_embed_forward(const struct model *model, struct workspace *workspace);
void block_attention_forward(const struct model *model, struct workspace *workspace, int block,
                             struct attention_cache *cache);
void block_route_forward(const struct model *model, struct workspace *workspace, int block, bool with_stats);
void block_dispatch(const struct model *model, struct workspace *workspace, int block);
void block_experts_forward(const struct model *model, struct workspace *workspace, int block);
void block_combine(const struct model *model, struct workspace *workspace, int block);
/* All of the above for one block. */
void block_forward(const struct model *model, struct workspace *workspace, int block, struct attention_cache *cache,
                   bool with_stats);

/* Forward of a block again from its kept input, for backward: everything but its output and statistics. */
void block_recompute(const struct model *model, struct workspace *workspace, int block);

/* loss_sum += ; row_loss = ; with_gradients: dx and gradients of head and norm. */
void model_head(const struct model *model, struct workspace *workspace, double token_scale, bool with_gradients);
/* Logits real [count,V] of the last `count` rows of the batch. */
void model_logits(const struct model *model, struct workspace *workspace, int64_t count, struct tensor logits);

void block_combine_backward(const struct model *model, struct workspace *workspace, int block);
void block_experts_backward(const struct model *model, struct workspace *workspace, int block);
void block_dispatch_backward(const struct model *model, struct workspace *workspace, int block);
void block_route_backward(const struct model *model, struct workspace *workspace, int block,
                          struct router_loss_scales scales);
void block_attention_backward(const struct model *model, struct workspace *workspace, int block);
void model_embed_backward(const struct model *model, struct workspace *workspace);
