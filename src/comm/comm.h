/* The table of transports: how bytes pass between the ranks of a communicator.
 *
 * Two collectives move everything: all_gather and all_to_all, both with a count of its own for every rank, both only
 * started by the call and ended by wait. Sums are made of them above (parallel/reduce.h): terms travel, and each rank
 * adds them in rank order, so that a sum has the same bits on every rank and in every run.
 *
 * What holds for every transport:
 *  1. Every function is Collective: all ranks of the communicator call it in the same order, whatever their data; a
 *     rank with nothing to send takes part with counts of zero. Requests may be waited for in any order, and requests of
 *     several communicators may be under way at once.
 *  2. Started transfers make progress while the caller computes; nothing needs to be polled.
 *  3. Buffers belong to the caller and stay untouched from start to wait, which gives them back even where it fails, at least
 *     those in the processor's memory. Send and receive buffers do not overlap. They lie in the processor's memory, or in that of
 *     the one device that the communicator is for.
 *  4. No global state: a process may hold many communicators.
 *  5. A rank that is gone is a failure (STATUS_PEER) on all that wait for it, within seconds, and not a hang.
 *  6. Calls on one communicator come from one thread at a time.
 */
#pragma once

#include "base/status.h"
#include <stddef.h>
#include <stdint.h>

struct comm;

/* A transfer under way. Zeroed: none; waiting for none does nothing. */
struct comm_request {
    int64_t ticket;
};

/* What left this rank and what reached it, bytes; what a rank keeps for itself is not counted. */
struct comm_count {
    int64_t sent_bytes, received_bytes, calls;
};

struct comm_ops {
    const char *name;
    /* Every rank's `send` of counts[rank] bytes arrives on every rank at recv + offsets[rank]. counts and offsets
     * [size], in bytes, are the same on every rank and are read before the call returns. */
    enum status (*all_gather)(struct comm *comm, const void *send, void *recv, const int64_t *counts,
                              const int64_t *offsets, struct comm_request *request) MUST_USE;
    /* send_counts[r] bytes at send + send_offsets[r] arrive on rank r, which expects as many from this rank; what comes
     * from rank r is stored at recv + recv_offsets[r]. All [size], in bytes, read before the call returns. */
    enum status (*all_to_all)(struct comm *comm, const void *send, const int64_t *send_counts,
                              const int64_t *send_offsets, void *recv, const int64_t *recv_counts,
                              const int64_t *recv_offsets, struct comm_request *request) MUST_USE;
    /* Until the transfer is done; the request is none afterwards. */
    enum status (*wait)(struct comm *comm, struct comm_request *request) MUST_USE;
    /* Ranks of equal color become a communicator of their own, ordered as here. Released by its own release, before
     * that of the one it came from. */
    enum status (*split)(struct comm *comm, int color, struct comm *part) MUST_USE;
    void (*release)(struct comm *comm); /* not collective; nothing may be under way */
};

struct comm {
    const struct comm_ops *ops;
    int rank, size;
    void *state; /* the transport's own */
    struct comm_count count;
    struct comm *host; /* of a communicator for the memory of a device (comm/on_device): the same ranks, for the processor's */
};

/* The same ranks, for buffers in the processor's memory: the communicator itself, unless it is one for a device's. */
static inline struct comm *comm_host(struct comm *comm) {
    return comm->host ? comm->host : comm;
}

/* Sent by this rank so far, from any memory. */
static inline int64_t comm_sent_bytes(const struct comm *comm) {
    return comm->count.sent_bytes + (comm->host ? comm->host->count.sent_bytes : 0);
}

/* A single process: rank 0 of 1. Sends nothing. */
struct comm comm_self(void);

/* ---- made of the above, for every transport; Collective, all blocking, for the processor's memory --------------------- */

/* The worst status of all ranks: before anything that one rank must not do alone. Where it is not the caller's own, the
 * message is that of the lowest rank that has it, after "rank N: ". */
enum status comm_agree(struct comm *comm, enum status mine) MUST_USE;

/* Every rank's `bytes` bytes, in rank order, into all [size * bytes]. */
enum status comm_share(struct comm *comm, const void *mine, size_t bytes, void *all) MUST_USE;

/* values[count] = sum over the ranks, in rank order; few. */
enum status comm_sum_f64(struct comm *comm, double *values, int count) MUST_USE;

/* Rank 0's `bytes` bytes to all. */
enum status comm_broadcast(struct comm *comm, void *data, size_t bytes) MUST_USE;

void comm_release(struct comm *comm); /* does nothing for a zeroed one */
