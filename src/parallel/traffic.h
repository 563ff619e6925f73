/* What moves between the ranks of a run besides the rows of tokens: weights of divided rows to those who compute with
 * them, gradients to those who own them. For every group of parameters (parameter_group: a block, the embedding, the end of
 * the model) at most three plans, made once and run every step:
 *
 *   gather     own_weight -> weight        over shard and expert, in the dtype that products read (fp32 where more is read)
 *   reduce     gradient   -> own_gradient  over shard and expert, summed in rank order
 *   replicate  own_gradient, summed over replicate
 *
 * One gather of a block, one reduce and one replicate may be under way at once, besides the gathers of embedding and end.
 */
#pragma once

#include "model/model.h"
#include "parallel/ranks.h"

struct traffic;

/* Bytes that one run of a plan sends from this rank; 0 where nothing moves. */
struct traffic_bytes {
    int64_t gather, reduce, replicate;
};

/* gradient_wire: f32 (f64 in a model of f64), or bf16. Borrows model and ranks. ranks NULL: a plan that sends nothing,
 * of which bytes can be asked; the model may then be one without memory. */
enum status traffic_create(struct model *model, struct ranks *ranks, enum dtype gradient_wire,
                           struct traffic **out) MUST_USE;
void traffic_destroy(struct traffic *traffic);

struct traffic_bytes traffic_bytes_of(const struct traffic *traffic, int group);
int64_t traffic_staging_bytes(const struct traffic *traffic);

/* The ranks that share a batch. */
struct comm *traffic_batch_comm(const struct traffic *traffic);

/* True where some rows are divided; where gradients are summed over shard and expert; between replicas. */
bool traffic_gathers(const struct traffic *traffic);
bool traffic_reduces(const struct traffic *traffic);
bool traffic_replicates(const struct traffic *traffic);

/* Collective, all of them. Finish of a gather also packs what products read. */
enum status traffic_gather_start(struct traffic *traffic, int group) MUST_USE;
enum status traffic_gather_finish(struct traffic *traffic, int group) MUST_USE;
enum status traffic_reduce_start(struct traffic *traffic, int group) MUST_USE;
enum status traffic_reduce_finish(struct traffic *traffic, int group) MUST_USE;
enum status traffic_replicate_start(struct traffic *traffic, int group) MUST_USE;
enum status traffic_replicate_finish(struct traffic *traffic, int group) MUST_USE;

/* After own_weight was written by anything but the optimizer: what this rank computes with follows, in a group, or in all. */
enum status traffic_refresh_group(struct traffic *traffic, int group) MUST_USE;
enum status traffic_refresh(struct traffic *traffic) MUST_USE;
