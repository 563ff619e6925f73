/* Executes one training step: walks the schedule and calls the phases of model/block.h, the transfers of
 * parallel/traffic.h and the optimizer. Collective: all ranks of an island run the same schedule.
 *
 * A step's batch is given whole to every rank. Micro-batch m is a stretch of it, the same in every layout, and is divided
 * over the ranks by sequences, in rank order, as evenly as it goes; with more ranks than sequences some have none and
 * take part in all that is collective. So a layout changes who computes, not what: losses, gradients and the router's
 * statistics are those of the whole batch.
 *
 * With islands the batch is the island's own; what it shares with the others are the outer events after the update.
 */
#pragma once

#include "base/hash.h"
#include "model/block.h"
#include "optim/optimizer.h"
#include "parallel/balance.h"
#include "parallel/expert_parallel.h"
#include "parallel/outer.h"
#include "parallel/ranks.h"
#include "parallel/repeats.h"
#include "parallel/schedule.h"
#include "parallel/traffic.h"

/* Above these a step is refused; 0: no limit. */
struct step_limits {
    double loss, gradient_norm;
};

struct step_input {
    const int32_t *tokens;   /* [micro_batch_count * micro_batch_sequences, T+1], host; the same on every rank */
    int64_t step, step_count; /* 1 is the first update */
    struct step_limits limits; /* the same on every rank */
};

/* Why a step was refused: the same answer on every rank. */
enum step_skip {
    STEP_UPDATED,        /* it was not */
    STEP_NOT_FINITE,     /* the loss, or a gradient of any rank */
    STEP_LOSS_SPIKE,     /* above limits.loss */
    STEP_GRADIENT_SPIKE, /* above limits.gradient_norm */
    STEP_RANKS_DISAGREE, /* owners of the same part hold gradients of another size, or ranks added up other sums */
};
const char *step_skip_reason(enum step_skip skip); /* "not finite", ... */

struct step_result {
    double loss;          /* mean cross entropy per token, nats */
    double gradient_norm; /* before clipping */
    double lr;
    enum step_skip skipped; /* but for STEP_UPDATED: weights and moments untouched */
    int64_t comm_bytes;   /* sent by all ranks of the island: in this step up to its norm, and in the step before after it */
    int64_t outer_bytes;  /* by all ranks of the island to others, of what this step began to send */
    bool applied;         /* a fragment was applied, outer->report is of it */
};

struct step_settings {
    int micro_batch_count;
    int64_t micro_batch_sequences; /* over all ranks; 0: as many as the workspace holds */
    enum dtype gradient_wire;      /* f32 or bf16 */
    int fragment_count;            /* that islands exchange; 0: they do not */
    bool repeats;                  /* a device that can records what micro-batches compute and repeats it: parallel/repeats.h */
};

/* Called after every event with the seconds it took; for profiles. A step that is observed waits after each event until the
 * device is done, and so is slower than others on a device that takes work while it computes. */
struct step_observer {
    void (*event_done)(void *context, const struct event *event, double seconds);
    void *context;
};

/* Called in every step when gradients are whole and nothing of weights, moments and outer state has changed yet. */
struct step_herald {
    void (*before_update)(void *context);
    void *context;
};

/* For measuring what overlaps: a step that only computes (with whatever its buffers hold), or only transfers parameters and
 * gradients. Its numbers mean nothing. Experts must not be divided. */
enum step_part { STEP_WHOLE, STEP_COMPUTE, STEP_TRANSFERS };

struct step_runner {
    struct model *model;
    struct workspace *workspace;
    struct ranks *ranks;
    struct traffic *traffic;
    struct outer *outer; /* borrowed, set by the caller; NULL: outer events do nothing */
    struct balance balance;
    struct schedule schedule;
    struct repeats repeats;
    const struct optimizer_settings *optimizer;
    struct step_settings settings;
    int32_t *host_ids;                 /* [micro_batch_count, 2, S]: tokens and targets on their way to the device */
    size_t host_ids_bytes;
    double *sums;                      /* scratch: what the ranks add up at the end of a step */
    int sum_count;
    uint64_t *seals;                   /* scratch [2 + 2 * ranks]: of those sums */
    struct tensor row_squares;         /* f64 [rows of the table]: of this rank's own gradients */
    double *host_row_squares;          /* scratch [rows] */
    int64_t begin_bytes, norm_bytes;   /* ranks_sent_bytes when the step began, and at its norm */
    int64_t tail_bytes;                /* sent in the last step from its norm on */
    struct arena arena;
    struct step_observer observer; /* event_done NULL: none */
    struct step_herald herald;     /* before_update NULL: none */
    struct known_hashes *hashes;   /* of weights and moments, noted by the update: set before it; NULL: not wanted */
    enum step_part part;           /* STEP_WHOLE, but for measurements */
};

/* Borrows all pointers until step_runner_release. The model's sharding is that of the ranks' mesh. The workspace holds
 * at least this rank's sequences of a micro-batch (step_sequences). */
enum status step_runner_init(struct step_runner *runner, struct model *model, struct workspace *workspace,
                             struct ranks *ranks, const struct optimizer_settings *optimizer,
                             struct step_settings settings) MUST_USE;
void step_runner_release(struct step_runner *runner);

/* This rank's sequences of a micro-batch, and the most that any rank has. */
struct range step_sequences(const struct mesh *mesh, int64_t micro_batch_sequences);
int64_t step_sequences_most(const struct mesh *mesh, int64_t micro_batch_sequences);

/* What a rank needs to compute with `model` on these ranks: its workspace and, where experts are divided, the exchange of
 * their rows (else NULL), which must outlive the workspace. limit_bytes: see expert_parallel.h. Not collective. */
enum status step_workspace_create(const struct model *model, struct ranks *ranks, struct workspace_options options,
                                  int64_t limit_bytes, struct workspace **workspace,
                                  struct expert_parallel **exchange) MUST_USE;

/* How the list of a model on a mesh is written. */
struct schedule_options step_schedule_options(const struct model *model, const struct traffic *traffic,
                                              const struct step_settings *settings, bool recompute);

/* Numbers that the ranks add up at a step's norm, and what each rank then shows of them. */
int64_t step_sum_count(const struct model_config *config);
enum { STEP_SEAL_BYTES = 2 * sizeof(uint64_t) };

/* After own_weight was written by anything but the optimizer: what this rank computes with follows. Collective. */
enum status step_refresh(struct step_runner *runner) MUST_USE;

/* One step. All ranks decide at EVENT_GRADIENT_NORM, before the optimizer, whether they commit it; one that is refused
 * leaves weights and moments as they were, to the bit, on every rank, and says why in result->skipped. A number that
 * reached one rank alone damaged does not divide them: gradients are looked at by all that own them, and the sums that
 * decide are compared before they do. After a failure of a transfer (STATUS_PEER) the ranks may stand at different
 * events: the run is over. */
enum status step_run(struct step_runner *runner, struct step_input input, struct step_result *result) MUST_USE;
