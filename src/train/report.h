/* What a run tells about itself: metrics.jsonl, TensorBoard events, the progress line. */
#pragma once

#include "metrics/metrics_file.h"
#include "metrics/progress.h"
#include "metrics/tensorboard.h"
#include "parallel/step.h"
#include "train/run_config.h"
#include "train/state.h"

struct train_report {
    const struct run_config *config;
    const struct model *model;
    double roof_operations_per_s;
    struct metrics_file metrics;
    struct tensorboard tensorboard;
    struct progress progress;
    bool open;
};

/* Opens the files below run.directory; what they say of steps after first_step is dropped: those will be
 * done again (metrics/metrics_file.h). */
enum status train_report_open(struct train_report *report, const struct run_config *config, const struct model *model,
                              int64_t first_step, double roof_operations_per_s) MUST_USE;
void train_report_close(struct train_report *report);

/* One step; reads the router's statistics of the workspace. */
enum status train_report_step(struct train_report *report, const struct workspace *workspace,
                              const struct train_state *state, const struct step_result *result,
                              double seconds) MUST_USE;
/* The run went back from state step `step`; the line is {"step", "event": "rollback", "to_step", "reason"}. */
enum status train_report_rollback(struct train_report *report, int64_t step, int64_t to_step,
                                  const char *reason) MUST_USE;
/* A fragment was applied after `step`: {"step", "event": "outer", "fragment", "sent_step", "outer_grad_norm", "cosine",
 * "flushed", "outer_bytes", "waited_ms", "loss"}. */
enum status train_report_outer(struct train_report *report, int64_t step, const struct outer_report *outer) MUST_USE;
enum status train_report_evaluation(struct train_report *report, int64_t step, double loss,
                                    double bits_per_byte) MUST_USE;
