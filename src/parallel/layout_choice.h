/* Which mesh a run gets: from what the user asked for, the number of ranks and the size of the model.
 *
 * What is left open is chosen by an estimate of the time that a step's transfers take, among all meshes and stages whose
 * weights, gradients and moments fit into half of a rank's memory (the other half is for activations). Bytes that reach a
 * rank in a step, W a byte count of weights on the wire, G of gradients:
 *
 *   stage 0       2G (R-1)/R: gradients are summed for everybody
 *   stage 1       G + W: each sums and updates its part, then weights are gathered once
 *   stage 2       the gradients once for every micro-batch
 *   stage 3       W twice (forward and backward) for every micro-batch, too
 *   replicate     2G/(shard * expert): sums between replicas, of the part that a rank owns
 *   expert        an expert's weights and gradients stay where they are; instead the rows of tokens travel, four times:
 *                 there and back, forward and backward
 *
 * Rows count 4 times their bytes, for the experts cannot begin before they are there, while weights and gradients travel
 * beside the computing. And the rank whose experts are asked for most is waited for: a quarter of the experts' computing,
 * 20 operations counted as a byte. So the expert axis is for many or large experts and few tokens a rank; else experts are
 * gathered like the rest. Bytes that pass between machines count 8 times: where several ranks share a machine, replicate
 * goes over machines and shard stays inside, as far as memory allows.
 *
 * Index arithmetic only; sends nothing. The same on every rank, if the facts are.
 */
#pragma once

#include "model/sharding.h"

enum { LAYOUT_ZERO_CHOOSE = -1 };

/* What the user asked for, layout.*; 0: to be chosen. */
struct layout_wishes {
    int64_t replicate, shard, expert;
    int zero; /* 0 to 3; LAYOUT_ZERO_CHOOSE */
};

struct layout_facts {
    int ranks;               /* of one island: what the mesh is made of */
    int ranks_per_machine;   /* where all machines have as many; 0: not known, taken for one machine */
    int64_t rank_memory_bytes; /* of the rank that has least; 0: not known, taken for enough */
    int64_t batch_sequences; /* in a step; 0: not known */
    int64_t micro_batch_count, tokens; /* in a step, of all ranks */
    int64_t experts;         /* E; 0: dense */
    int64_t dense_elements, expert_elements;
    int64_t token_row_bytes; /* of the rows of a token that go to experts, in all blocks */
    double token_expert_operations; /* of the experts of all blocks, forward and backward */
    int weight_bytes, gradient_bytes; /* of one element on the wire */
};

/* What the facts need to know of a model whose products run in `compute`; the other members stay. */
void layout_facts_of_model(struct layout_facts *facts, const struct parameter_table *table,
                           const struct model_config *config, enum dtype compute);

/* The mesh as `rank` sees it, and the stage. STATUS_USAGE with one line that says what does not fit, and the nearest
 * meshes that do. */
enum status layout_choose(const struct layout_wishes *wishes, const struct layout_facts *facts, int rank,
                          struct sharding *out) MUST_USE;

/* Bytes of weights, gradients and two moments that a rank holds from step to step, on average over the ranks, in f32.
 * What it gathers for the time of a block is not among them. */
double layout_state_bytes(const struct sharding *sharding, const struct layout_facts *facts);

enum { LAYOUT_LINE_BYTES = 96 };

/* "8 ranks: replicate 1 x shard 2 x expert 4, ZeRO 3"; "1 rank". Returns line. */
char *layout_describe(const struct sharding *sharding, char line[LAYOUT_LINE_BYTES]);
