/* AdamW's settings over a run: learning-rate schedule, clipping by the global norm, decay on matrices only. */
#pragma once

#include "base/setting.h"
#include "kernels/kernels.h"

enum optimizer_schedule {
    OPTIMIZER_COSINE,   /* warm-up, then half a cosine down to min_lr_ratio */
    OPTIMIZER_WSD,      /* warm-up, stable, linear decay over the last decay_share of the steps */
    OPTIMIZER_CONSTANT, /* warm-up, then constant */
};

struct optimizer_settings {
    double lr;
    int64_t warmup_steps;
    int schedule; /* enum optimizer_schedule */
    double min_lr_ratio, decay_share;
    double weight_decay, beta1, beta2, epsilon;
    double clip; /* largest norm of the whole gradient; 0: no clipping */
};

/* Settings "optim.*"; offsets count from a struct optimizer_settings. */
extern const struct setting optimizer_setting_list[];
extern const int optimizer_setting_count;
void optimizer_settings_init(struct optimizer_settings *settings);

/* Learning rate of update `step` (1 is the first) of step_count. */
double optimizer_lr(const struct optimizer_settings *settings, int64_t step, int64_t step_count);

/* What every gradient is multiplied by, given the norm of all of them together. */
double optimizer_clip_scale(const struct optimizer_settings *settings, double gradient_norm);

/* What the update of one parameter is to be told. `decays` for matrices. */
struct adamw_settings optimizer_update_settings(const struct optimizer_settings *settings, int64_t step,
                                                int64_t step_count, double gradient_norm, bool decays);
