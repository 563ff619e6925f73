#include "parallel/schedule.h"

#include "base/memory.h"
#include <stdlib.h>
#include <string.h>

/* Events of one micro-batch and block: gather, five forward, gather, recompute, five backward, reduce, optimizer. */
enum { EVENTS_PER_BLOCK_AND_MICRO = 14, EVENTS_PER_MICRO = 6 };

static int add(struct schedule *s, enum event_kind kind, int block, int micro_batch, int wait0, int wait1) {
    CHECK_OP(s->count, <, s->capacity);
    struct event *event = &s->events[s->count];
    *event = (struct event){.kind = kind, .block = block, .micro_batch = micro_batch};
    if (wait0 >= 0)
        event->waits[event->wait_count++] = wait0;
    if (wait1 >= 0)
        event->waits[event->wait_count++] = wait1;
    return s->count++;
}

/* A run of events of one block, each waiting for the one before; the first also for `also`. */
static int add_chain(struct schedule *s, const enum event_kind *kinds, int kind_count, int block, int micro_batch,
                     int after, int also) {
    for (int i = 0; i < kind_count; i++)
        after = add(s, kinds[i], block, micro_batch, after, i == 0 ? also : -1);
    return after;
}

static int add_forward(struct schedule *s, struct schedule_options options, int micro, int after) {
    static const enum event_kind kinds[] = {EVENT_ATTENTION, EVENT_ROUTE, EVENT_EXCHANGE, EVENT_EXPERTS,
                                            EVENT_EXCHANGE_BACK};
    for (int block = 0; block < options.block_count; block++) {
        int gathered = add(s, EVENT_GATHER, block, micro, after, -1);
        after = add_chain(s, kinds, 5, block, micro, after, gathered);
    }
    return after;
}

static int add_backward(struct schedule *s, struct schedule_options options, int micro, int after) {
    static const enum event_kind kinds[] = {EVENT_EXCHANGE_BACK_GRAD, EVENT_EXPERTS_GRAD, EVENT_EXCHANGE_GRAD,
                                            EVENT_ROUTE_GRAD, EVENT_ATTENTION_GRAD};
    for (int block = options.block_count - 1; block >= 0; block--) {
        int gathered = add(s, EVENT_GATHER, block, micro, after, -1);
        if (options.recompute)
            after = add(s, EVENT_RECOMPUTE, block, micro, after, gathered);
        after = add_chain(s, kinds, 5, block, micro, after, gathered);
        if (micro == options.micro_batch_count - 1)
            add(s, EVENT_REDUCE, block, -1, after, -1);
    }
    return after;
}

static int add_micro_batch(struct schedule *s, struct schedule_options options, int micro, int after) {
    after = add(s, EVENT_LOAD, BLOCK_OUTSIDE, micro, after, -1);
    int gathered = add(s, EVENT_GATHER, BLOCK_OUTSIDE, micro, after, -1);
    after = add(s, EVENT_EMBED, BLOCK_OUTSIDE, micro, after, gathered);
    after = add_forward(s, options, micro, after);
    after = add(s, EVENT_HEAD, BLOCK_OUTSIDE, micro, after, -1);
    after = add_backward(s, options, micro, after);
    after = add(s, EVENT_EMBED_GRAD, BLOCK_OUTSIDE, micro, after, -1);
    if (micro == options.micro_batch_count - 1)
        after = add(s, EVENT_REDUCE, BLOCK_OUTSIDE, -1, after, -1);
    return after;
}

enum status schedule_build(struct schedule *s, struct schedule_options options) {
    CHECK(options.block_count >= 1 && options.micro_batch_count >= 1);
    size_t capacity = ((size_t)options.block_count * EVENTS_PER_BLOCK_AND_MICRO + EVENTS_PER_MICRO) *
                          (size_t)options.micro_batch_count +
                      (size_t)options.block_count + 4;
    *s = (struct schedule){.capacity = (int)capacity};
    TRY(memory_alloc(&s->events, capacity, sizeof *s->events));
    int after = add(s, EVENT_CLEAR, BLOCK_OUTSIDE, -1, -1, -1);
    for (int micro = 0; micro < options.micro_batch_count; micro++)
        after = add_micro_batch(s, options, micro, after);
    after = add(s, EVENT_GRADIENT_NORM, BLOCK_OUTSIDE, -1, after, -1);
    for (int block = BLOCK_OUTSIDE; block < options.block_count; block++)
        add(s, EVENT_OPTIMIZER, block, -1, after, -1);
    return STATUS_OK;
}

void schedule_release(struct schedule *schedule) {
    free(schedule->events);
    *schedule = (struct schedule){0};
}

const char *event_kind_name(enum event_kind kind) {
    static const char *const names[EVENT_KIND_COUNT] = {
        "clear",        "load",          "gather",    "embed",         "attention",          "route",
        "exchange",     "experts",       "exchange back", "head",      "recompute",          "exchange back grad",
        "experts grad", "exchange grad", "route grad", "attention grad", "embed grad",       "reduce",
        "gradient norm", "optimizer"};
    CHECK(kind < EVENT_KIND_COUNT);
    return names[kind];
}

static void print_number(struct text *out, const char *what, int number) {
    if (number >= 0)
        text_printf(out, "  %s %-4d", what, number);
    else
        text_printf(out, "  %*s", (int)strlen(what) + 5, "");
}

void schedule_print(const struct schedule *s, struct text *out) {
    for (int i = 0; i < s->count; i++) {
        const struct event *event = &s->events[i];
        text_printf(out, "%5d  %-18s", i, event_kind_name(event->kind));
        print_number(out, "block", event->block);
        print_number(out, "micro-batch", event->micro_batch);
        for (int w = 0; w < event->wait_count; w++)
            text_printf(out, "%s%d", w ? ", " : "  after ", event->waits[w]);
        text_add_string(out, "\n");
    }
}
