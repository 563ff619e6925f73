/* A training step as data: a flat list of events, each with the events that it waits for.
 *
 * The list does not depend on the data, nor on the routing. The trainer executes it, --dry-run prints it, the profiler
 * draws it. A single process runs the same list as many ranks; its gathers and reductions have nothing to move.
 */
#pragma once

#include "base/status.h"
#include "base/text.h"
#include <stdbool.h>

enum event_kind {
    EVENT_CLEAR,              /* gradients and sums to zero */
    EVENT_LOAD,               /* tokens of a micro-batch to the device */
    EVENT_GATHER,             /* parameters of a block, where they are sharded */
    EVENT_EMBED,
    EVENT_ATTENTION,
    EVENT_ROUTE,
    EVENT_EXCHANGE,           /* routed rows to the owners of their experts */
    EVENT_EXPERTS,
    EVENT_EXCHANGE_BACK,      /* results home, summed */
    EVENT_HEAD,               /* loss, and the backward of the head */
    EVENT_RECOMPUTE,          /* forward of a block again, its activations were not kept */
    EVENT_EXCHANGE_BACK_GRAD, /* backward of EXCHANGE_BACK, and so on */
    EVENT_EXPERTS_GRAD,
    EVENT_EXCHANGE_GRAD,
    EVENT_ROUTE_GRAD,
    EVENT_ATTENTION_GRAD,
    EVENT_EMBED_GRAD,
    EVENT_REDUCE,             /* gradients of a block, summed over the ranks */
    EVENT_GRADIENT_NORM,      /* of all gradients together; here the step is refused if it is not finite */
    EVENT_OPTIMIZER,          /* update the parameters of a block */
    EVENT_KIND_COUNT,
};

enum { EVENT_WAITS_MAX = 3, BLOCK_OUTSIDE = -1 };

struct event {
    enum event_kind kind;
    int block;       /* BLOCK_OUTSIDE: embedding, final norm and head */
    int micro_batch; /* -1 where it has none */
    int wait_count;
    int waits[EVENT_WAITS_MAX]; /* indices of earlier events */
};

struct schedule_options {
    int block_count, micro_batch_count;
    bool recompute;
};

struct schedule {
    struct event *events;
    int count, capacity;
};

/* One step of training. Release with schedule_release. */
enum status schedule_build(struct schedule *schedule, struct schedule_options options) MUST_USE;
void schedule_release(struct schedule *schedule);

const char *event_kind_name(enum event_kind kind);

/* A line an event: index, name, block, micro-batch, what it waits for. */
void schedule_print(const struct schedule *schedule, struct text *out);
