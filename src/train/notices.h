/* What islands tell each other after every step, without waiting for it: some flags of each, which all islands learn of
 * the same number of steps later. So all of them act on it after the same step, and a slow link delays that and nothing
 * else.
 */
#pragma once

#include "comm/comm.h"
#include <stdbool.h>

struct notices {
    struct comm *comm;             /* between islands */
    int delay;                     /* exchanges until what was told is known; 0: at once, by waiting */
    int64_t count;                 /* exchanges so far */
    int64_t *sizes;                /* scratch for the transport */
    uint32_t *told;                /* [delay + 1][1 + islands]: own flags, then those of all */
    struct comm_request *requests; /* [delay + 1] */
};

/* Borrows comm. Release with notices_release, also after a failure. */
enum status notices_init(struct notices *notices, struct comm *comm, int delay) MUST_USE;

/* Collective. Tell `flags` to all; *known: those that any island told `delay` exchanges ago, and 0 in the first ones.
 */
enum status notices_exchange(struct notices *notices, uint32_t flags, uint32_t *known) MUST_USE;

/* Collective. Waits for what was told, and forgets it: the next exchange is the first again. */
enum status notices_drain(struct notices *notices) MUST_USE;

bool notices_are_under_way(const struct notices *notices);
void notices_release(struct notices *notices);
