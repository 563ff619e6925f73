/* How the parameters of a model lie on a mesh of ranks, by ZeRO stage. Index arithmetic only; sends nothing.
 *
 * Every row of the table has two layouts. Compute: what the products of a block read, and what their gradients look
 * like before they are summed. Own: the part that this rank keeps moments for and updates.
 *
 *   stage   moments   gradients   weights        own layout
 *     0     compute   compute     compute        the compute layout: plain data parallelism
 *     1     own       compute     compute        row->layout: divided over shard (and expert, where it is not an
 *     2     own       own         compute        expert's), the same on every replica
 *     3     own       own         own
 *
 * What stands under "own" is 1/(shard * expert) of the whole and no more; the compute form of it is gathered, or summed
 * away, a block at a time. With one rank along the axes both layouts are the same memory, at any stage.
 */
#pragma once

#include "model/parameter.h"

struct sharding {
    struct mesh mesh;
    int zero; /* 0 to 3 */
};

/* One rank that holds everything. */
struct sharding sharding_single(void);

struct layout sharding_compute_layout(const struct parameter *row);
struct layout sharding_own_layout(const struct sharding *sharding, const struct parameter *row);

/* The gradient as backward leaves it: each rank's term of it, from its own tokens. An expert's gradient is whole over
 * the expert axis, for all its rows come to its owner. */
struct layout sharding_gradient_layout(const struct parameter *row);

/* What this rank holds of a row: extents, and where they begin in the whole. */
struct parameter_part {
    int64_t shape[3], first[3];
};
struct parameter_part sharding_part(const struct sharding *sharding, const struct parameter *row,
                                    const struct layout *layout);
int64_t parameter_part_elements(const struct parameter_part *part);

/* True where what this rank owns of a row is all that it computes with: nothing of it needs to be gathered. */
bool sharding_is_whole(const struct sharding *sharding, const struct parameter *row);
