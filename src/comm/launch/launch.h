/* How this process was started, and the communicator that follows from it: alone, or as one of several ranks by mpirun,
 * srun or their like. Alone, MPI is not even initialised. */
#pragma once

#include "comm/comm.h"
#include <stdbool.h>

struct comm_launch {
    struct comm world;
    int local_rank, local_size; /* among the ranks on this host */
    int thread_count;           /* processors that this process may use, divided among the ranks that share them; >= 1 */
    void *state;                /* the transport's own */
};

/* Join the others. Collective where there are others. Once in a process, and closed by the same thread.
 *   lost: called by a thread of the transport, on one of the remaining ranks, as soon as a rank is seen to be gone that
 *         has not closed, or not to answer; gets the line that says which. It prints the line: the job's end may be a moment
 *         away. NULL: none.
 * Fails with STATUS_USAGE where the process is one of several by its environment but cannot be: the program is built
 * without MPI, or with one that the starter does not belong to. */
enum status comm_launch_open(struct comm_launch *out, void (*lost)(const char *line)) MUST_USE;

/* A rank that has given no sign of life for so many seconds is as good as gone: a process that is stopped or gets no processor,
 * a machine that is down, a link that is dead. It is told and ended as one that is gone, and every remaining rank ends within
 * three seconds. 0: never. A rank that computes, or writes to a slow disk, does give signs of life; only one that for ten times
 * as long neither computes nor waits for others, while others wait, counts as gone, too. Not collective, but all ranks should
 * call it; without, it is COMM_LAUNCH_TIMEOUT_S. Does nothing for one process. */
void comm_launch_set_timeout(struct comm_launch *launch, double limit_s);
enum { COMM_LAUNCH_TIMEOUT_S = 60 };

/* To be called by a handler of SIGTERM: the starter may be ending the ranks because it lost one elsewhere, and it says which.
 * Ranks that are gone from now on are not told. From a signal handler, too; in any process. */
void comm_launch_note_termination(void);

/* Whether this process is the one that says how the work failed: of ranks that fail together rank 0; also one that failed
 * alone, which shows by the others not coming for some seconds; none where `lost` was called for a rank that is gone, and
 * none that was itself stopped until the others gave it up.
 * Collective of the ranks that are done, and what they say before comm_launch_close is said before any of them exits: a
 * starter ends the others as soon as one did. false after STATUS_OK. */
bool comm_launch_speaks(struct comm_launch *launch, enum status status);

/* Leave. status: how the work ended here. After STATUS_OK this waits for the other ranks; after a failure for at most
 * some seconds, since they may not come; it never hangs on a rank that is gone. The process should exit soon. */
void comm_launch_close(struct comm_launch *launch, enum status status);

/* Which MPI the program is built with, or that it is built without; for a person. Writes at most `bytes`. */
const char *comm_launch_library(char *buffer, size_t bytes);

/* ---- for measuring ------------------------------------------------------------------------------------------------- */

/* The same bytes as ops->all_to_all or ops->all_gather (send_offsets of NULL), by MPI's own blocking call. Counts and
 * offsets below 2 GiB; on the world only; nothing may be under way. STATUS_USAGE without MPI. */
enum status comm_launch_bare(struct comm_launch *launch, const void *send, const int64_t *send_counts,
                             const int64_t *send_offsets, void *recv, const int64_t *recv_counts,
                             const int64_t *recv_offsets) MUST_USE;
