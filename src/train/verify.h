/* Silent corruption: ranks that hold the same thing compare hashes of it.
 *
 * A rank's memory or processor may change a number without anybody's notice; with ECC memory seldom, on thousands of
 * machines every week. Ranks that are replicas of each other compute the same bits, so that any difference is damage.
 *
 * Covered: weights and both moments that more than one rank owns (with replicas; at stage 0 also along shard, and dense
 * rows along expert), and at stages 1 and 2 the whole copy of weights that a rank computes with. Any changed bit is found.
 * Not covered: what one rank alone owns (no replicas: nothing to compare with); what lives within a step (activations,
 * gradients: parallel/step.h compares the latter's size at every step; at stage 3 gathered weights); the packed form that
 * products read, which every update writes anew; damage that reaches all replicas alike, such as a wrong gradient summed
 * into all of them.
 *
 * Cost: one pass over what this rank owns, on all threads, 5 to 7.5 GB/s on one core as measured (12 bytes a parameter: a
 * fifth of a second for 100 million parameters on one core), and 8 bytes a tensor to every rank.
 */
#pragma once

#include "model/model.h"
#include "parallel/ranks.h"

/* True where ranks of this mesh hold something in common, so that there is something to compare. */
bool verify_has_copies(const struct model *model);

/* Collective, between steps. STATUS_NUMERIC on all ranks where one holds something else than its equals; the line names
 * the step, the rank or ranks (of the world) that are in the minority, the tensor, and that the run goes on from the
 * newest checkpoint in `checkpoints`, a directory. Of two ranks, or of two halves, it cannot tell which is wrong, and names
 * all. Sends nothing where there are no copies. */
enum status verify_copies(const struct model *model, struct ranks *ranks, int64_t step,
                          const char *checkpoints) MUST_USE;
