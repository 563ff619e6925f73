/* What moves bytes between this process and the others: pieces by MPI_Isend and MPI_Irecv, driven by whoever waits, or by
 * a thread of its own while all others compute. See engine.c for how. */
#pragma once

#include "base/status.h"
#include "comm/mpi/pulse.h"
#include <mpi.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct stream;
struct transfer;

/* Between this rank and one other, in one direction, on one communicator: streams in the order in which they were started.
 * Their pieces are posted strictly in that order, on both sides, so that MPI matches them without a tag for each. */
struct link {
    struct stream *first, *last;
    int world_rank, tag;
    bool sends;
    int64_t posted_bytes; /* and not yet done */
};

/* What one transfer moves over one link. */
struct stream {
    struct link *link;
    struct transfer *transfer;
    char *data;
    int64_t bytes, posted, done;
    struct stream *next;
};

/* A collective under way, as this rank sees it. */
struct transfer {
    int stream_count, open_count; /* streams that are not done */
    bool done;
    struct transfer *next; /* in the queue of what is not yet posted, or among the spare ones */
    struct stream streams[];
};

struct engine {
    MPI_Comm world;
    int rank, size;
    void (*describe)(void *context, int world_rank, char *text, size_t bytes); /* a rank, for a message */
    void (*silent)(void *context, const bool *ranks, const char *line); /* some do not answer: once, before the engine breaks */
    void (*gone)(void *context); /* another rank has told that one is gone: before the engine breaks */
    void (*broke)(void *context); /* all is lost: once, when the engine is broken; from any thread */
    void *context;

    pthread_mutex_t lock; /* everything below up to `drive` */
    pthread_cond_t done;  /* a transfer is done, or nobody drives, or all is lost */
    pthread_cond_t work;  /* for the thread: there is something to do again */
    struct transfer *queue_first, *queue_last;
    int under_way, inside_count, next_tag, tag_limit;
    double left_s; /* when one of those inside, who wait or begin a transfer, last left */
    bool idle, closing;
    atomic_int failed_rank; /* that MPI could not reach, which broke the engine; -1: none */
    atomic_bool broken; /* nothing is moved any more and MPI is not called; failure says why */
    double broken_s; /* when that was */
    char failure[512];

    pthread_mutex_t drive; /* the right to call MPI, and everything below */
    MPI_Request *requests;
    struct piece *pieces;
    int *indices;
    MPI_Status *statuses;
    int active, capacity;
    double moved_s; /* when the last piece was done */
    struct pulse pulse;
    bool *silent_ranks; /* [size] */
    pthread_t thread;
};

/* Collective. MPI is initialised, MPI_THREAD_SERIALIZED at least; `world` returns errors. Starts the thread. */
enum status engine_open(struct engine *engine, MPI_Comm world) MUST_USE;

/* Collective, unless broken. Ends the thread; nothing is under way, and no limit is set. After a failure it leaves the thread
 * and the memory alone: the thread may hang in MPI, and the process is about to end. */
void engine_close(struct engine *engine);

/* Begin to move the streams of a transfer, of which stream_count and each stream's link, transfer, data and bytes > 0 are
 * filled; it and the data stay until it is waited for. */
enum status engine_start(struct engine *engine, struct transfer *transfer) MUST_USE;

/* After engine_start succeeded, as soon as the caller has done what it does before it computes: until then the engine's
 * thread leaves it the core. */
void engine_started(struct engine *engine);

/* Until the transfer is done, or all is lost (STATUS_PEER), or until deadline_s of clock_seconds (0: none) has passed. When all
 * is lost, engine_start and engine_wait say so only when no thread is inside MPI any more: nothing of what any transfer moves is
 * touched from then on. */
enum status engine_wait(struct engine *engine, struct transfer *transfer, double deadline_s) MUST_USE;

/* From now on a rank that gives no sign of life for so long is a failure (pulse.h): all is lost, as after engine_break, with
 * a line that names it. 0: none is; as from the start. Not collective, but all ranks should. */
void engine_set_limit(struct engine *engine, double limit_s);

/* Let the ranks[size] that are true know that this rank has told that `gone` is gone. Tries for a moment only. */
void engine_tell_gone(struct engine *engine, const bool *ranks, int gone);

/* Whether another rank has told that one is gone, be it this moment. Tries for a moment only. */
bool engine_was_told(struct engine *engine);

/* All is lost: whoever waits now or later fails with STATUS_PEER and this line. The first line stays. */
void engine_break(struct engine *engine, const char *line);

/* The same for who does not drive, until no thread is inside MPI any more: the process may end. */
void engine_leave(struct engine *engine, const char *line);
