/* The phases of a pass through a model, in the grain of the schedule's events: a trainer calls them in the order of its
 * event list, and may move data between any two. Index `block` counts from 0. What moves rows between ranks may fail.
 *
 * Forward of a micro-batch:  embed, then per block: attention, route, dispatch, experts, combine; then the head.
 * Backward: the head leaves workspace->dx; per block from the last: combine, experts, dispatch, route, attention, each
 * backward; then embed. In a dense model route, dispatch and combine do nothing and experts is the dense layer. Where the
 * exchange of rows takes several rounds (nn/exchange.h), the last phase of each way does all of them, experts included.
 * Between ranks, dispatch and combine_backward only start the transfer of rows; experts waits for what travels when it
 * has computed what is here, and starts the way back, which combine and dispatch_backward wait for. Where rows are never away,
 * dispatch_backward may leave their sum to route's backward, which then writes all of it at once (layer_sums_routed).
 */
#pragma once

#include "model/workspace.h"

/* Gradients of the losses, scaled so that a step's micro-batches add up to the mean over its tokens. */
struct loss_scales {
    double token;               /* of each token's cross entropy: 1 / tokens of the step */
    struct router_loss_scales router;
};

/* Scales in a step of step_tokens tokens, all micro-batches of all ranks together, for the backward of a micro-batch:
 * tokens_so_far are those of this micro-batch and the ones before it in the step, of all ranks, as
 * workspace->balance_count is. */
struct loss_scales model_loss_scales(const struct model *model, int64_t step_tokens, int64_t tokens_so_far);

/* Sums of losses and statistics to zero: before the first micro-batch of a step. */
void model_clear_sums(const struct model *model, struct workspace *workspace);

void model_embed_forward(const struct model *model, struct workspace *workspace);
void block_attention_forward(const struct model *model, struct workspace *workspace, int block,
                             struct attention_cache *cache);
/* with_stats: adds to the statistics and the counts of the balance loss. */
enum status block_route_forward(const struct model *model, struct workspace *workspace, int block,
                                bool with_stats) MUST_USE;
enum status block_dispatch(const struct model *model, struct workspace *workspace, int block) MUST_USE;
enum status block_experts_forward(const struct model *model, struct workspace *workspace, int block) MUST_USE;
enum status block_combine(const struct model *model, struct workspace *workspace, int block) MUST_USE;
/* All of the above for one block. */
enum status block_forward(const struct model *model, struct workspace *workspace, int block,
                          struct attention_cache *cache, bool with_stats) MUST_USE;

/* Forward of a block again from its kept input, for backward: everything but its output and statistics. */
enum status block_recompute(const struct model *model, struct workspace *workspace, int block) MUST_USE;

/* loss_sum += ; row_loss = ; with_gradients: dx and gradients of head and norm. */
void model_head(const struct model *model, struct workspace *workspace, double token_scale, bool with_gradients);
/* Logits real [count,V] of the last `count` rows of the batch. */
void model_logits(const struct model *model, struct workspace *workspace, int64_t count, struct tensor logits);

enum status block_combine_backward(const struct model *model, struct workspace *workspace, int block) MUST_USE;
enum status block_experts_backward(const struct model *model, struct workspace *workspace, int block) MUST_USE;
enum status block_dispatch_backward(const struct model *model, struct workspace *workspace, int block) MUST_USE;
void block_route_backward(const struct model *model, struct workspace *workspace, int block,
                          struct router_loss_scales scales);
void block_attention_backward(const struct model *model, struct workspace *workspace, int block);
void model_embed_backward(const struct model *model, struct workspace *workspace);
