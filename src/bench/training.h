/* A model in training on random tokens: what benchmarks of whole steps share. Collective, all of it. */
#pragma once

#include "bench/bench.h"
#include "parallel/step.h"
#include "train/profile.h"

struct training {
    struct run_config config;
    struct sharding sharding;
    struct ranks ranks;
    struct comm *world;
    struct model *model;
    struct workspace *workspace;
    struct expert_parallel *exchange;
    struct step_runner runner;
    int32_t *tokens;
    int64_t token_count, step, comm_bytes;
    struct profile profile; /* of the timed steps */
};

/* As bench->preset and the settings of the command say, on the ranks of bench->launch. Close it also after a failure. */
enum status training_open(struct training *t, const struct bench *bench, enum dtype dtype) MUST_USE;
void training_close(struct training *t);

/* One step, which all ranks begin together. */
enum status training_step(struct training *t, double *seconds) MUST_USE;
