/* A training step as data: a flat list of events, each with the events that it waits for.
 *
 * The list depends on the layout, not on the data nor on the routing: every rank has the same one. The trainer executes
 * it in order, --dry-run prints it, the profiler draws it. Transfers are two events: one starts it, the other waits and
 * puts what arrived in place; what stands between them computes meanwhile. A single process runs the same list, with
 * nothing to move.
 *
 * With ZeRO stage 3 the weights of two blocks are whole at a time, in slots b % 2 (model/model.h): the gather of the next
 * block starts before a block computes, and a block that a slot still holds is not gathered again. From stage 2 on the
 * gradients of a block are summed and dropped after each of its backward passes, below it once a step.
 *
 * Where experts are divided over ranks, the time of routed rows on their way stands in three events. EXCHANGE waits for the
 * counts, starts the rows and sorts those that stay here. EXPERTS computes with these, waits for the others' rows (what of
 * their way the computing did not cover), computes with them and starts the results. EXCHANGE_BACK waits for what is left
 * of the results' way. EXCHANGE_BACK_GRAD starts, EXPERTS_GRAD waits and starts, EXCHANGE_GRAD waits in the same way. Where
 * an exchange takes several rounds, all of it is in the last of the three.
 */
#pragma once

#include "base/status.h"
#include "base/text.h"
#include <stdbool.h>

enum event_kind {
    EVENT_CLEAR,              /* sums to zero, gradients too but for those that are written first */
    EVENT_LOAD,               /* tokens of a micro-batch to the device */
    EVENT_GATHER,             /* start: parameters of a block that are divided over the ranks */
    EVENT_GATHERED,           /* wait for them, and pack them for the products */
    EVENT_EMBED,
    EVENT_ATTENTION,
    EVENT_ROUTE,
    EVENT_COUNTS,             /* start: each expert's rows over all ranks, for the balance loss; ROUTE_GRAD waits */
    EVENT_EXCHANGE,           /* start: routed rows to the owners of their experts, see below */
    EVENT_EXPERTS,
    EVENT_EXCHANGE_BACK,      /* wait for the results, and sum them */
    EVENT_HEAD,               /* loss, and the backward of the head */
    EVENT_CLEAR_BLOCK,        /* the same in a block's slot */
    EVENT_RECOMPUTE,          /* forward of a block again, its activations were not kept */
    EVENT_EXCHANGE_BACK_GRAD, /* backward of EXCHANGE_BACK, and so on */
    EVENT_EXPERTS_GRAD,
    EVENT_EXCHANGE_GRAD,
    EVENT_ROUTE_GRAD,
    EVENT_ATTENTION_GRAD,
    EVENT_EMBED_GRAD,
    EVENT_REDUCE,             /* start: gradients of a block to those who own them */
    EVENT_REDUCED,            /* wait, and sum them in rank order */
    EVENT_REPLICATE,          /* start: the same sums between replicas, once a step */
    EVENT_REPLICATED,         /* wait, and sum */
    EVENT_GRADIENT_NORM,      /* of all gradients together; here the step is refused if it is not finite */
    EVENT_OPTIMIZER,          /* update the parameters of a block */
    EVENT_OUTER_SEND,         /* start: a fragment to the other islands; in the steps of parallel/outer_plan.h only */
    EVENT_OUTER_APPLY,        /* wait for a fragment, and mix it in; likewise */
    EVENT_KIND_COUNT,
};

/* Events outside the blocks; of a transfer or an optimizer event: the embedding, and the end of the model (as the groups of
 * model/parameter.h). An outer event has the number of its fragment. */
enum { EVENT_WAITS_MAX = 3, BLOCK_OUTSIDE = -1, BLOCK_END = -2 };

struct event {
    enum event_kind kind;
    int block;       /* 0 and up; BLOCK_OUTSIDE, BLOCK_END */
    int micro_batch; /* -1 where it has none */
    int wait_count;
    int waits[EVENT_WAITS_MAX]; /* indices of earlier events */
};

struct schedule_options {
    int block_count, micro_batch_count;
    bool recompute;
    int zero;      /* stage, see model/sharding.h */
    bool divided;  /* some rows are divided over several ranks */
    bool replicas; /* some gradients are summed between replicas */
    int fragment_count; /* that islands exchange; 0: they do not */
};

struct schedule {
    struct event *events;
    int count, capacity;
};

/* One step of training. Release with schedule_release. */
enum status schedule_build(struct schedule *schedule, struct schedule_options options) MUST_USE;
void schedule_release(struct schedule *schedule);

const char *event_kind_name(enum event_kind kind);

/* What a line of schedule_print tells besides; NULL: nothing. */
struct schedule_remarks {
    void (*write)(const void *context, const struct event *event, struct text *out);
    const void *context;
};

/* A line an event: index, name, block, micro-batch, the remark, what it waits for. */
void schedule_print(const struct schedule *schedule, const struct schedule_remarks *remarks, struct text *out);
