#include "metrics/progress.h"

#include "base/clock.h"
#include "base/log.h"
#include <math.h>
#include <stdio.h>

static const double TERMINAL_PAUSE_SECONDS = 0.2, PLAIN_PAUSE_SECONDS = 10;
static const double LOSS_DECAY = 0.9, PACE_DECAY = 0.95;

char *progress_duration(char *buffer, double seconds) {
    long long whole = seconds > 0 ? (long long)(seconds + 0.5) : 0;
    if (whole >= 3600)
        snprintf(buffer, 32, "%lldh%02lldm", whole / 3600, whole / 60 % 60);
    else if (whole >= 60)
        snprintf(buffer, 32, "%lldm%02llds", whole / 60, whole % 60);
    else
        snprintf(buffer, 32, "%llds", whole);
    return buffer;
}

/* Averages that start unbiased: the sum of weights is carried beside the sum of values. */
static void remember(struct progress *p, const struct progress_step *s) {
    if (isfinite(s->loss)) {
        p->loss_average = LOSS_DECAY * p->loss_average + (1 - LOSS_DECAY) * s->loss;
        p->loss_weight = LOSS_DECAY * p->loss_weight + (1 - LOSS_DECAY);
    }
    p->pace_seconds = PACE_DECAY * p->pace_seconds + (1 - PACE_DECAY) * s->step_seconds;
    p->pace_weight = PACE_DECAY * p->pace_weight + (1 - PACE_DECAY);
}

static void format_line(const struct progress *p, const struct progress_step *s, char *line, int size) {
    char left[32], roof[32] = "", balance[64] = "";
    double pace = p->pace_seconds / p->pace_weight;
    if (s->roof_share > 0)
        snprintf(roof, sizeof roof, "  %2.0f%% of roof", 100 * s->roof_share);
    if (s->load_max_over_mean > 0)
        snprintf(balance, sizeof balance, "  balance %.2f  dead %d", s->load_max_over_mean, s->dead_experts);
    snprintf(line, (size_t)size, "step %lld/%lld  %5.1f%%  loss %.3f  %.1fk tok/s%s%s  %s left", (long long)s->step,
             (long long)s->step_count, 100.0 * (double)s->step / (double)s->step_count,
             p->loss_weight > 0 ? p->loss_average / p->loss_weight : NAN, s->tokens_per_s / 1000, roof, balance,
             progress_duration(left, pace * (double)(s->step_count - s->step)));
}

void progress_show(struct progress *p, const struct progress_step *s) {
    char line[256];
    remember(p, s);
    double now = clock_seconds(), waited = now - p->last_shown_seconds;
    bool last = s->step == s->step_count, first = p->last_shown_seconds == 0;
    if (!last && !first && waited < TERMINAL_PAUSE_SECONDS)
        return;
    format_line(p, s, line, sizeof line);
    bool shown = log_progress("%s", line);
    if (!shown && (last || first || waited >= PLAIN_PAUSE_SECONDS)) {
        log_info("%s", line);
        shown = true;
    }
    if (shown)
        p->last_shown_seconds = now;
}
