/* What an event of the schedule takes at least, to hold its time against what the machine can do at best. */
#pragma once

#include "model/workspace.h"
#include "parallel/schedule.h"
#include "parallel/traffic.h"

struct event_cost {
    double operations; /* a multiply-add is two; 0 where an event multiplies nothing worth counting */
    double bytes;      /* read and written in memory, of the events that walk all parameters; 0 for others */
};

/* Over a step without recomputation the operations add up to model_train_operations_per_token times its tokens. Bytes
 * are counted for clear, gradient norm and optimizer, as if no cache held any of them. */
struct event_cost event_cost(const struct event *event, const struct model *model, const struct workspace *workspace);

/* Who sends what in an event; made of a model and its traffic, which may be plans without memory. */
struct event_sending {
    const struct model *model;
    const struct traffic *traffic;
    int64_t tokens; /* of this rank in a micro-batch */
};

/* Bytes that this rank sends to others in an event. Exact, but for the exchanges of rows, which depend on the routing: they
 * count what even routing would send, rows only. */
double event_sent_bytes(const struct event *event, const struct event_sending *sending);

/* True for the events whose bytes depend on the routing. */
bool event_is_exchange(enum event_kind kind);
