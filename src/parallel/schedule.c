#include "parallel/schedule.h"

#include "base/memory.h"
#include <stdlib.h>
#include <string.h>

/* At most: of one micro-batch and block, of one micro-batch besides, of a step and block, of a step besides. */
enum { EVENTS_PER_BLOCK_AND_MICRO = 21, EVENTS_PER_MICRO = 9, EVENTS_PER_BLOCK = 7, EVENTS_PER_STEP = 24 };

enum { NO_BLOCK = -3, NO_EVENT = -1 };

/* Where the list stands while it is written. */
struct builder {
    struct schedule *list;
    struct schedule_options options;
    int last;             /* the latest event of the chain that computes */
    int slot_block[2];    /* whose weights a slot holds, or will when its gather is done; NO_BLOCK */
    int gather_event[2];  /* a gather into a slot that nobody waited for yet; NO_EVENT */
    int end_event;        /* the gather of the end of the model */
    int reducing, reduce_event;       /* block whose gradients are under way; NO_BLOCK */
    bool sums_are_final;              /* no later micro-batch adds to them */
    int replicating, replicate_event; /* the same between replicas */
};

static int add(struct builder *b, enum event_kind kind, int block, int micro_batch, int wait0, int wait1) {
    struct schedule *s = b->list;
    CHECK_OP(s->count, <, s->capacity);
    struct event *event = &s->events[s->count];
    *event = (struct event){.kind = kind, .block = block, .micro_batch = micro_batch};
    if (wait0 >= 0)
        event->waits[event->wait_count++] = wait0;
    if (wait1 >= 0)
        event->waits[event->wait_count++] = wait1;
    return s->count++;
}

/* An event of the chain: after the latest one, and after `also`. */
static void chain(struct builder *b, enum event_kind kind, int block, int micro_batch, int also) {
    b->last = add(b, kind, block, micro_batch, b->last, also);
}

/* ---- weights, where they are divided ---------------------------------------------------------------------------------- */

static bool gathers_in_pass(const struct builder *b) {
    return b->options.divided && b->options.zero == 3;
}

/* Start to make a block's weights whole, unless its slot holds them. The block that had the slot has computed. */
static void start_gather(struct builder *b, int block, int micro) {
    if (!gathers_in_pass(b) || block < 0 || block >= b->options.block_count || b->slot_block[block % 2] == block)
        return;
    b->gather_event[block % 2] = add(b, EVENT_GATHER, block, micro, b->last, NO_EVENT);
    b->slot_block[block % 2] = block;
}

static void finish_gather(struct builder *b, int block, int micro) {
    if (!gathers_in_pass(b) || b->gather_event[block % 2] == NO_EVENT)
        return;
    chain(b, EVENT_GATHERED, block, micro, b->gather_event[block % 2]);
    b->gather_event[block % 2] = NO_EVENT;
}

/* The embedding, with the first block behind it. It stays whole for the rest of the step, as the end of the model does. */
static void gather_embedding(struct builder *b, int micro) {
    if (!gathers_in_pass(b) || micro > 0)
        return;
    int started = add(b, EVENT_GATHER, BLOCK_OUTSIDE, micro, b->last, NO_EVENT);
    start_gather(b, 0, micro);
    chain(b, EVENT_GATHERED, BLOCK_OUTSIDE, micro, started);
}

/* The end of the model is asked for in the middle of the first forward pass: later than the blocks that are needed sooner. */
static void start_gather_of_end(struct builder *b, int block, int micro) {
    if (gathers_in_pass(b) && micro == 0 && block == b->options.block_count / 2)
        b->end_event = add(b, EVENT_GATHER, BLOCK_END, micro, b->last, NO_EVENT);
}

static void finish_gather_of_end(struct builder *b, int micro) {
    if (gathers_in_pass(b) && micro == 0)
        chain(b, EVENT_GATHERED, BLOCK_END, micro, b->end_event);
}

/* ---- gradients ---------------------------------------------------------------------------------------------------------- */

static bool reduces_every_micro_batch(const struct builder *b) {
    return b->options.divided && b->options.zero >= 2;
}

static void finish_replicate(struct builder *b) {
    if (b->replicating == NO_BLOCK)
        return;
    chain(b, EVENT_REPLICATED, b->replicating, -1, b->replicate_event);
    b->replicating = NO_BLOCK;
}

static void finish_reduce(struct builder *b, int micro) {
    finish_replicate(b);
    if (b->reducing == NO_BLOCK)
        return;
    chain(b, EVENT_REDUCED, b->reducing, micro, b->reduce_event);
    if (b->sums_are_final && b->options.replicas) {
        b->replicate_event = add(b, EVENT_REPLICATE, b->reducing, -1, b->last, NO_EVENT);
        b->replicating = b->reducing;
    }
    b->reducing = NO_BLOCK;
}

static void start_reduce(struct builder *b, int block, int micro, bool sums_are_final) {
    finish_reduce(b, micro);
    b->sums_are_final = sums_are_final;
    b->reduce_event = add(b, EVENT_REDUCE, block, micro, b->last, NO_EVENT);
    b->reducing = block;
}

/* ---- a micro-batch ------------------------------------------------------------------------------------------------------- */

static void add_forward(struct builder *b, int micro) {
    for (int block = 0; block < b->options.block_count; block++) {
        start_gather(b, block, micro);
        finish_gather(b, block, micro);
        start_gather(b, block + 1, micro);
        start_gather_of_end(b, block, micro);
        chain(b, EVENT_ATTENTION, block, micro, NO_EVENT);
        chain(b, EVENT_ROUTE, block, micro, NO_EVENT);
        chain(b, EVENT_COUNTS, block, micro, NO_EVENT);
        chain(b, EVENT_EXCHANGE, block, micro, NO_EVENT);
        chain(b, EVENT_EXPERTS, block, micro, NO_EVENT);
        chain(b, EVENT_EXCHANGE_BACK, block, micro, NO_EVENT);
    }
}

static void add_block_backward(struct builder *b, int block, int micro) {
    static const enum event_kind kinds[] = {EVENT_EXCHANGE_BACK_GRAD, EVENT_EXPERTS_GRAD, EVENT_EXCHANGE_GRAD,
                                            EVENT_ROUTE_GRAD, EVENT_ATTENTION_GRAD};
    if (reduces_every_micro_batch(b)) { /* of the micro-batch before, gradients may still leave the slot */
        if (b->reducing >= 0 && b->reducing % 2 == block % 2)
            finish_reduce(b, micro);
        chain(b, EVENT_CLEAR_BLOCK, block, micro, NO_EVENT);
    }
    if (b->options.recompute)
        chain(b, EVENT_RECOMPUTE, block, micro, NO_EVENT);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        chain(b, kinds[i], block, micro, NO_EVENT);
}

static void add_backward(struct builder *b, int micro) {
    bool is_last = micro == b->options.micro_batch_count - 1;
    for (int block = b->options.block_count - 1; block >= 0; block--) {
        start_gather(b, block, micro);
        finish_gather(b, block, micro);
        start_gather(b, block - 1, micro);
        add_block_backward(b, block, micro);
        if (is_last || reduces_every_micro_batch(b))
            start_reduce(b, block, micro, is_last);
    }
}

static void add_micro_batch(struct builder *b, int micro) {
    bool is_last = micro == b->options.micro_batch_count - 1;
    chain(b, EVENT_LOAD, BLOCK_OUTSIDE, micro, NO_EVENT);
    gather_embedding(b, micro);
    chain(b, EVENT_EMBED, BLOCK_OUTSIDE, micro, NO_EVENT);
    add_forward(b, micro);
    finish_gather_of_end(b, micro);
    chain(b, EVENT_HEAD, BLOCK_OUTSIDE, micro, NO_EVENT);
    if (is_last)
        start_reduce(b, BLOCK_END, micro, true);
    add_backward(b, micro);
    chain(b, EVENT_EMBED_GRAD, BLOCK_OUTSIDE, micro, NO_EVENT);
    if (!is_last) /* what is under way goes on beside the next micro-batch */
        return;
    start_reduce(b, BLOCK_OUTSIDE, micro, true);
    finish_reduce(b, micro);
    finish_replicate(b);
}

/* Updates; below stage 3 the whole weights follow, the transfer of one block under the update of the next. */
static void add_updates(struct builder *b) {
    bool gathers = b->options.divided && (b->options.zero == 1 || b->options.zero == 2);
    int gathering = NO_BLOCK, started = NO_EVENT;
    for (int block = BLOCK_END; block < b->options.block_count; block++) {
        chain(b, EVENT_OPTIMIZER, block, -1, NO_EVENT);
        if (!gathers)
            continue;
        if (gathering != NO_BLOCK)
            chain(b, EVENT_GATHERED, gathering, -1, started);
        started = add(b, EVENT_GATHER, block, -1, b->last, NO_EVENT);
        gathering = block;
    }
    if (gathering != NO_BLOCK)
        chain(b, EVENT_GATHERED, gathering, -1, started);
}

/* What islands send or mix in when it is due: what goes out before what comes in, for both may be of the same step. */
static void add_outer(struct builder *b) {
    for (int fragment = 0; fragment < b->options.fragment_count; fragment++)
        chain(b, EVENT_OUTER_SEND, fragment, -1, NO_EVENT);
    for (int fragment = 0; fragment < b->options.fragment_count; fragment++)
        chain(b, EVENT_OUTER_APPLY, fragment, -1, NO_EVENT);
}

enum status schedule_build(struct schedule *s, struct schedule_options options) {
    CHECK(options.block_count >= 1 && options.micro_batch_count >= 1);
    size_t blocks = (size_t)options.block_count, micros = (size_t)options.micro_batch_count;
    size_t capacity = (blocks * EVENTS_PER_BLOCK_AND_MICRO + EVENTS_PER_MICRO) * micros + blocks * EVENTS_PER_BLOCK +
                      EVENTS_PER_STEP + 2 * (size_t)options.fragment_count;
    *s = (struct schedule){.capacity = (int)capacity};
    TRY(memory_alloc(&s->events, capacity, sizeof *s->events));
    struct builder b = {s, options, NO_EVENT, {NO_BLOCK, NO_BLOCK}, {NO_EVENT, NO_EVENT}, NO_EVENT,
                        NO_BLOCK, NO_EVENT, false, NO_BLOCK, NO_EVENT};
    chain(&b, EVENT_CLEAR, BLOCK_OUTSIDE, -1, NO_EVENT);
    for (int micro = 0; micro < options.micro_batch_count; micro++)
        add_micro_batch(&b, micro);
    chain(&b, EVENT_GRADIENT_NORM, BLOCK_OUTSIDE, -1, NO_EVENT);
    add_updates(&b);
    add_outer(&b);
    return STATUS_OK;
}

void schedule_release(struct schedule *schedule) {
    free(schedule->events);
    *schedule = (struct schedule){0};
}

const char *event_kind_name(enum event_kind kind) {
    static const char *const names[EVENT_KIND_COUNT] = {
        [EVENT_CLEAR] = "clear",
        [EVENT_LOAD] = "load",
        [EVENT_GATHER] = "gather",
        [EVENT_GATHERED] = "gathered",
        [EVENT_EMBED] = "embed",
        [EVENT_ATTENTION] = "attention",
        [EVENT_ROUTE] = "route",
        [EVENT_COUNTS] = "counts",
        [EVENT_EXCHANGE] = "exchange",
        [EVENT_EXPERTS] = "experts",
        [EVENT_EXCHANGE_BACK] = "exchange back",
        [EVENT_HEAD] = "head",
        [EVENT_CLEAR_BLOCK] = "clear block",
        [EVENT_RECOMPUTE] = "recompute",
        [EVENT_EXCHANGE_BACK_GRAD] = "exchange back grad",
        [EVENT_EXPERTS_GRAD] = "experts grad",
        [EVENT_EXCHANGE_GRAD] = "exchange grad",
        [EVENT_ROUTE_GRAD] = "route grad",
        [EVENT_ATTENTION_GRAD] = "attention grad",
        [EVENT_EMBED_GRAD] = "embed grad",
        [EVENT_REDUCE] = "reduce",
        [EVENT_REDUCED] = "reduced",
        [EVENT_REPLICATE] = "replicate",
        [EVENT_REPLICATED] = "replicated",
        [EVENT_GRADIENT_NORM] = "gradient norm",
        [EVENT_OPTIMIZER] = "optimizer",
        [EVENT_OUTER_SEND] = "outer send",
        [EVENT_OUTER_APPLY] = "outer apply",
    };
    CHECK(kind < EVENT_KIND_COUNT);
    return names[kind];
}

static void print_number(struct text *out, const char *what, int number) {
    if (number >= 0)
        text_printf(out, "  %s %-4d", what, number);
    else
        text_printf(out, "  %*s", (int)strlen(what) + 5, "");
}

/* Transfers and updates outside the blocks say of what. */
static void print_block(struct text *out, const struct event *event) {
    bool of_parameters = event->kind == EVENT_GATHER || event->kind == EVENT_GATHERED || event->kind == EVENT_REDUCE ||
                         event->kind == EVENT_REDUCED || event->kind == EVENT_REPLICATE ||
                         event->kind == EVENT_REPLICATED || event->kind == EVENT_OPTIMIZER;
    if (event->kind == EVENT_OUTER_SEND || event->kind == EVENT_OUTER_APPLY)
        text_printf(out, "  fragment %d", event->block);
    else if (event->block < 0 && of_parameters)
        text_printf(out, "  %-10s", event->block == BLOCK_END ? "head" : "embedding");
    else
        print_number(out, "block", event->block);
}

void schedule_print(const struct schedule *s, const struct schedule_remarks *remarks, struct text *out) {
    for (int i = 0; i < s->count; i++) {
        const struct event *event = &s->events[i];
        text_printf(out, "%5d  %-18s", i, event_kind_name(event->kind));
        print_block(out, event);
        print_number(out, "micro-batch", event->micro_batch);
        if (remarks)
            remarks->write(remarks->context, event, out);
        for (int w = 0; w < event->wait_count; w++)
            text_printf(out, "%s%d", w ? ", " : "  after ", event->waits[w]);
        text_add_string(out, "\n");
    }
}
