/* Where a run's parameters lie: from the settings under [layout], the model and the ranks that were started. */
#pragma once

#include "model/sharding.h"
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

/* This machine's memory, or less where this process may not use all of it; bytes, 0 where the system does not tell. */
int64_t placement_machine_bytes(void);
