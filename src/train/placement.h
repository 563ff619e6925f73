/* Where a run's parameters lie: from the settings under [layout], the model and the ranks that were started. */
#pragma once

#include "model/sharding.h"
#include "parallel/ranks.h"
#include "train/run_config.h"

/* What is known of the ranks. Zeroed members are unknown. */
struct placement_world {
    int rank, rank_count, ranks_per_machine;
    int64_t rank_memory_bytes; /* of the rank that has least */
};

/* The mesh as this rank sees it and the ZeRO stage; STATUS_USAGE with one line that names what does not fit. The
 * vocabulary's size must be set. Not collective; the same on every rank where the facts are. */
enum status placement_choose(const struct run_config *config, struct placement_world world,
                             struct sharding *out) MUST_USE;

/* Memory for the tensors of each of so many ranks on this machine: of the device, where it has its own, or of the machine, as far
 * as this process may use it; bytes, 0 where the system does not tell. */
int64_t placement_rank_bytes(const struct device *device, int local_size);

/* Collective. The ranks of the mesh, and how they exchange tensors of the device. `line` gets words for a person; empty on the
 * processor. */
enum status placement_open_ranks(struct ranks *ranks, const struct mesh *mesh, struct comm *world, const struct device *device,
                                 const struct run_config *config, char line[COMM_MEMORY_LINE_BYTES]) MUST_USE;
