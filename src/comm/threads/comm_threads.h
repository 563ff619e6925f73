/* N ranks in one process, each a thread: for tests of everything that several ranks do together, with delay and death
 * on demand.
 *
 * A thread of the group moves the bytes while the ranks compute, so that a buffer touched between start and wait shows
 * as a wrong number, and as a race under the thread sanitizer. A transfer between two ranks is done once both started
 * it, whether or not either waits; a rank does not wait for one with which it exchanges nothing.
 *
 * Counts that do not match between two ranks, or ranks that call different functions, are our own mistake: CHECK.
 * A rank that is gone is STATUS_PEER for those who still wait for something to or from it, in the exchange in which they
 * do, and for those who wait for these in turn. Who got a failure still waits for its other requests, or leaves. */
#pragma once

#include "comm/comm.h"

struct comm_threads;

/* What goes wrong on demand. Zeroed: nothing. */
struct comm_threads_faults {
    uint64_t seed;
    double latency_s;   /* every transfer between two ranks takes half of this to one and a half, drawn from the seed */
    double bytes_per_s; /* 0: no limit; what reaches one rank comes one after the other at this speed */
    int dying_rank;     /* it is gone from its dying_call-th call on: all_gather, all_to_all, wait and split count */
    int64_t dying_call; /* 1 is the first; 0: never */
};

/* A group of `size` >= 1 ranks; its communicators are released before comm_threads_destroy. faults is copied; NULL: none. */
enum status comm_threads_create(int size, const struct comm_threads_faults *faults, struct comm_threads **out) MUST_USE;
void comm_threads_destroy(struct comm_threads *group);

/* The communicator of all ranks as `rank` sees it; once for each rank. */
struct comm comm_threads_rank(struct comm_threads *group, int rank);

/* The rank takes no further part, as a process that has ended: for whoever waits for it, it is gone. */
void comm_threads_leave(struct comm_threads *group, int rank);

/* Run function(context, comm) on `size` threads, one for each rank; comm is released here, what was split from it by the
 * function. A rank whose function has returned is gone for the others. Returns STATUS_OK where all did; else the worst
 * status and its message from the lowest rank that has it, where STATUS_PEER counts least: it mostly is but the echo of
 * another's failure. Where there is no other, the rank that failed first is told. */
enum status comm_threads_run(int size, enum status (*function)(void *context, struct comm *comm), void *context) MUST_USE;
enum status comm_threads_run_with(int size, const struct comm_threads_faults *faults,
                                  enum status (*function)(void *context, struct comm *comm), void *context) MUST_USE;
