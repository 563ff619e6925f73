/* The line that a person watches while a model trains. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

struct progress_step {
    int64_t step, step_count;
    double loss, tokens_per_s;
    double roof_share;         /* of the machine's measured rate; 0 or less: unknown */
    double load_max_over_mean; /* of the worst block; 0: a dense model */
    int dead_experts;
    double step_seconds;
};

/* What the line remembers: a smoothed loss and a recent pace. Zeroed before the first step. */
struct progress {
    double loss_average, loss_weight;
    double pace_seconds, pace_weight;
    double last_shown_seconds;
};

/* Show a step: in place on a terminal, a line now and then elsewhere, always at the last step. */
void progress_show(struct progress *progress, const struct progress_step *step);

/* "1m05s" into buffer of 32 bytes; returns it. */
char *progress_duration(char *buffer, double seconds);
