/* Training: from a configuration to a run directory with a trained model in it. */
#pragma once

#include "parallel/step.h"
#include "train/run_config.h"

struct tokenizer;

/* What others may want to do as training goes on; any may be NULL. */
struct train_hooks {
    /* Write a passage to `out`: called every train.sample_every_steps and at the end. */
    enum status (*write_sample)(void *context, struct model *model, const struct tokenizer *tokenizer,
                                struct text *out);
    void *context;
    /* Time every event: at the end a table on stderr, and trace.json in the run's directory (train/profile.h). */
    bool profile;
    /* The run can go on from this checkpoint: called on every rank when it was resumed from or published. */
    void (*checkpoint_is_good)(const char *path);
    /* Save and leave, as after a signal, when rank 0 has been at it for so long since the call; 0: no limit. */
    double max_seconds;
    /* What this machine does at best, all ranks together, which speeds are shares of; 0: it is measured as the run begins. */
    double roof_operations_per_s;
};

/* What a training process takes beside its tensors: libraries, the code that they generate, working memory of the
 * kernels, the mapped text. Measured: 25 MiB for the smallest models to 45 MiB. */
enum { TRAIN_PROCESS_BYTES = 40 << 20 };

/* Who trains: the communicator of all ranks (comm_self for one process), and this rank's share of the processors. */
struct train_world {
    struct comm *comm;
    int local_size; /* ranks on this machine */
    int threads; /* where run.threads is 0; 0: one for each processor */
};

/* How a run ended. */
struct train_summary {
    int64_t step, step_count, tokens;
    bool resumed, interrupted;
    double valid_loss, valid_bits_per_byte; /* NaN when never evaluated */
    double seconds, tokens_per_s, roof_share;
    double peak_bytes, planned_bytes; /* of this rank, in the host's memory */
    double device_bytes;              /* of tensors and scratch in a device's own memory */
};

/* Collective. Train until config->train.steps, or until the first SIGINT, SIGTERM or SIGUSR1 that reaches any rank, which
 * finishes the step and saves; a second one ends the process. Resumes where run.directory has a checkpoint, whatever layout
 * wrote it. config is completed (steps, vocabulary, precision, layout). Rank 0 alone writes files and lines; what fails on
 * one rank is an error on all. After STATUS_PEER a rank is gone, and with it the run. */
enum status train_run(struct run_config *config, struct train_world world, struct train_hooks hooks,
                      struct train_summary *summary) MUST_USE;

/* Print what rank 0 of `rank_count` would do: the mesh, where every parameter lies, the events of a step with the bytes
 * that each sends, and memory. Without data, weights or memory. */
enum status train_dry_run(struct run_config *config, int rank_count, struct text *out) MUST_USE;
