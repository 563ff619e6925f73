/* Executes one training step: walks the schedule and calls the phases of model/block.h, the collectives and the
 * optimizer. Collective: all ranks of the communicator run the same schedule. */
#pragma once

#include "comm/comm.h"
#include "model/block.h"
#include "optim/optimizer.h"
#include "parallel/schedule.h"

struct step_input {
    const int32_t *tokens;   /* [micro_batch_count * B, T+1], host */
    int64_t step, step_count; /* 1 is the first update */
};

struct step_result {
    double loss;          /* mean cross entropy per token, nats */
    double gradient_norm; /* before clipping */
    double lr;
    bool skipped;         /* the loss or the norm was not finite: weights untouched */
};

/* Called after every event with the seconds it took; for profiles. */
struct step_observer {
    void (*event_done)(void *context, const struct event *event, double seconds);
    void *context;
};

struct step_runner {
    struct model *model;
    struct workspace *workspace;
    struct comm *comm;
    struct schedule schedule;
    const struct optimizer_settings *optimizer;
    int micro_batch_count;
    int32_t *host_ids;                 /* [S] scratch for EVENT_LOAD */
    struct tensor gradient_square_sum; /* f64 [1] */
    struct arena arena;
    struct step_observer observer; /* event_done NULL: none */
};

/* Borrows all pointers until step_runner_release. */
enum status step_runner_init(struct step_runner *runner, struct model *model, struct workspace *workspace,
                             struct comm *comm, const struct optimizer_settings *optimizer,
                             int micro_batch_count) MUST_USE;
void step_runner_release(struct step_runner *runner);

/* One step. A loss or gradient that is not finite leaves the weights as they were and sets result->skipped. */
enum status step_run(struct step_runner *runner, struct step_input input, struct step_result *result) MUST_USE;
