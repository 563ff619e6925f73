/* Where the time of training goes: the seconds of every kind of event beside what the machine can do at best, as a
 * table for a person, and the last steps as a Chrome trace. It looks on; no number of the run depends on it. On a device that
 * takes work while it computes, a profile waits after each event: the step it shows is longer than one nobody looks at. */
#pragma once

#include "parallel/cost.h"
#include "parallel/step.h"

/* Stretches of the loop that are no events of the schedule. The data is part of the step, the others follow it. */
enum profile_span {
    SPAN_STEP,
    SPAN_DATA,
    SPAN_REPORT,
    SPAN_EVALUATION,
    SPAN_SAMPLE,
    SPAN_CHECKPOINT,
    SPAN_COUNT,
};

enum { PROFILE_TRACE_STEPS = 10 };

struct profile_total {
    int64_t calls;
    double seconds;
};

/* One entry of the trace. */
struct profile_record {
    const char *name;
    int block, micro_batch; /* -1: none */
    int64_t step;
    double begin, seconds;
};

struct profile {
    const struct step_runner *runner;               /* borrowed; NULL: nothing is noted */
    struct event_cost step_costs[EVENT_KIND_COUNT]; /* of one step; a refused one counts as a whole one */
    struct profile_total events[EVENT_KIND_COUNT], spans[SPAN_COUNT];
    int64_t step;                   /* the latest */
    struct profile_record *records; /* a ring that holds the last PROFILE_TRACE_STEPS steps; NULL: no trace */
    size_t record_capacity, record_count;
};

/* What the machine can do at best, measured; see train/roof.h. */
struct profile_roof {
    double operations_per_s, bytes_per_s;
};

/* Takes all memory that noting needs and watches the runner's events until profile_release; the profile must stay where
 * it is. A zeroed profile notes nothing. STATUS_MEMORY. */
enum status profile_init(struct profile *profile, struct step_runner *runner, bool with_trace) MUST_USE;
void profile_release(struct profile *profile);

/* Before the step: its number stands beside everything that is noted until the next. Allocates nothing. */
void profile_begin_step(struct profile *profile, int64_t step);

/* A span that began at `begin` (clock_seconds) ends now. Allocates nothing. */
void profile_note(struct profile *profile, enum profile_span span, double begin);

/* A line a kind of event: calls and milliseconds a step (means of all steps), share of the step's time, rate, and
 * the rate's share of the roof; below the step's own line what came between steps, spread over them. Nothing where no
 * step was noted. The roof of operations is that of the products' dtype, also for the router, which multiplies in fp32;
 * recompute counts its own operations, the step's line does not hold them. A share of memory above 100% means that a
 * cache held part of it, or that something disturbed the measurement of the roof. */
void profile_print(const struct profile *profile, struct profile_roof roof, struct text *out);

/* The last PROFILE_TRACE_STEPS steps as JSON that chrome://tracing and Perfetto open; the file appears whole or not at
 * all. Requires with_trace. */
enum status profile_write_trace(const struct profile *profile, const char *path) MUST_USE;
