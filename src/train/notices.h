/* What islands tell each other now and then, without waiting for it: some flags of each, which all islands learn of the
 * same number of steps later. So all of them act on it after the same step, and a slow link delays that and nothing
 * else. When is a function of the step's number: a run that is repeated, or resumed, acts after the same steps.
 */
#pragma once

#include "comm/comm.h"
#include <stdbool.h>

struct notices {
    struct comm *comm; /* between islands */
    int64_t interval;  /* something is told after the steps that are multiples of it */
    int64_t delay;     /* steps until what was told is known; 0: at once, by waiting */
    int64_t told, known;           /* exchanges that were begun, and those of them that have ended */
    int64_t last_step;             /* after which the last one was begun */
    int64_t slot_count;            /* that may be under way at once */
    int64_t *sizes;                /* scratch for the transport */
    uint32_t *flags;               /* [slots][1 + islands]: own ones, then those of all */
    struct comm_request *requests; /* [slots] */
};

/* What is known after a step. */
struct notice {
    bool is_new;       /* else nothing became known, and the rest is 0 */
    uint32_t flags;    /* that any island told */
    int64_t told_step; /* after which step they did */
};

/* Borrows comm. interval >= 1. Release with notices_release, also after a failure. */
enum status notices_init(struct notices *notices, struct comm *comm, int64_t interval, int64_t delay) MUST_USE;

/* Collective, after every step, in order. Tell `flags` if it is time, and learn what was told `delay` steps ago. */
enum status notices_exchange(struct notices *notices, int64_t step, uint32_t flags, struct notice *notice) MUST_USE;

/* Collective. Waits for what was told, and forgets it: the next step may be any. */
enum status notices_drain(struct notices *notices) MUST_USE;

bool notices_are_under_way(const struct notices *notices);
void notices_release(struct notices *notices);
