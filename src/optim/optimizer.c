#include "optim/optimizer.h"

#include <math.h>
#include <stddef.h>

static const char *const schedule_names[] = {"cosine", "wsd", "constant", NULL};

const struct setting optimizer_setting_list[] = {
    {"optim", "lr", SETTING_NUMBER, offsetof(struct optimizer_settings, lr), 0, 10, NULL, "highest learning rate"},
    {"optim", "warmup_steps", SETTING_INTEGER, offsetof(struct optimizer_settings, warmup_steps), 0, 1e9, NULL,
     "steps over which the learning rate rises from 0"},
    {"optim", "schedule", SETTING_CHOICE, offsetof(struct optimizer_settings, schedule), 0, 2, schedule_names,
     "learning rate after the warm-up: cosine, wsd or constant"},
    {"optim", "min_lr_ratio", SETTING_NUMBER, offsetof(struct optimizer_settings, min_lr_ratio), 0, 1, NULL,
     "last learning rate as a share of the highest"},
    {"optim", "decay_share", SETTING_NUMBER, offsetof(struct optimizer_settings, decay_share), 0, 1, NULL,
     "share of the steps over which wsd decays"},
    {"optim", "weight_decay", SETTING_NUMBER, offsetof(struct optimizer_settings, weight_decay), 0, 10, NULL,
     "decoupled decay of matrices"},
    {"optim", "beta1", SETTING_NUMBER, offsetof(struct optimizer_settings, beta1), 0, 0.999999, NULL,
     "decay of the gradient's mean"},
    {"optim", "beta2", SETTING_NUMBER, offsetof(struct optimizer_settings, beta2), 0, 0.999999, NULL,
     "decay of the gradient's mean square"},
    {"optim", "epsilon", SETTING_NUMBER, offsetof(struct optimizer_settings, epsilon), 1e-18, 1, NULL,
     "added to the root of the mean square; with less than 1e-18 squares that underflow would move weights"},
    {"optim", "clip", SETTING_NUMBER, offsetof(struct optimizer_settings, clip), 0, 1e9, NULL,
     "largest norm of the gradient; 0: not clipped"},
};
const int optimizer_setting_count = sizeof optimizer_setting_list / sizeof *optimizer_setting_list;

void optimizer_settings_init(struct optimizer_settings *settings) {
    *settings = (struct optimizer_settings){
        .lr = 1e-3,
        .warmup_steps = 100,
        .schedule = OPTIMIZER_COSINE,
        .min_lr_ratio = 0.05,
        .decay_share = 0.2,
        .weight_decay = 0.1,
        .beta1 = 0.9,
        .beta2 = 0.95,
        .epsilon = 1e-8,
        .clip = 1,
    };
}

double optimizer_lr(const struct optimizer_settings *s, int64_t step, int64_t step_count) {
    if (step < s->warmup_steps)
        return s->lr * (double)step / (double)s->warmup_steps;
    double done = 1, low = s->min_lr_ratio;
    if (step_count > s->warmup_steps)
        done = (double)(step - s->warmup_steps) / (double)(step_count - s->warmup_steps);
    if (done > 1)
        done = 1;
    if (s->schedule == OPTIMIZER_CONSTANT)
        return s->lr;
    if (s->schedule == OPTIMIZER_COSINE)
        return s->lr * (low + (1 - low) * 0.5 * (1 + cos(3.14159265358979323846 * done)));
    double decay_begin = 1 - s->decay_share;
    if (done <= decay_begin || s->decay_share <= 0)
        return s->lr;
    return s->lr * (1 - (1 - low) * (done - decay_begin) / s->decay_share);
}

double optimizer_clip_scale(const struct optimizer_settings *settings, double gradient_norm) {
    if (settings->clip <= 0 || gradient_norm <= settings->clip)
        return 1;
    return settings->clip / gradient_norm;
}

struct adamw_settings optimizer_update_settings(const struct optimizer_settings *s, int64_t step, int64_t step_count,
                                                double gradient_norm, bool decays) {
    return (struct adamw_settings){
        .lr = optimizer_lr(s, step, step_count),
        .beta1 = s->beta1,
        .beta2 = s->beta2,
        .epsilon = s->epsilon,
        .weight_decay = decays ? s->weight_decay : 0,
        .step = step,
        .grad_scale = optimizer_clip_scale(s, gradient_norm),
    };
}
