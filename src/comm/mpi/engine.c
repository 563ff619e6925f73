/* Who drives. MPI moves bytes only inside MPI's calls. A thread that waits drives them itself: nothing passes between
 * threads, so that a short transfer costs little more than bare MPI. While nobody waits, a thread of the engine's own does
 * it: again at once as long as bytes move, then after pauses that grow, since every look takes the core from one that
 * computes. Waking it costs as much as a short transfer takes, and a start is often followed by its wait: so it is not
 * woken, but looks of its own accord, until nothing was under way for some time. Then it sleeps for good.
 *
 * Invariants:
 *  1. MPI is called only with `drive` held, so that MPI_THREAD_SERIALIZED suffices. No transfer waits for `drive`, it is
 *     only tried: who does not get it leaves its transfer in the queue, which the holder looks at again before it sleeps.
 *  2. `lock` is held for moments only and never while MPI is called. Order: drive before lock.
 *  3. Pieces are at most PIECE_BYTES, and about WINDOW_BYTES of a link are posted: one look moves a bounded amount, an
 *     MPI that counts in int is enough, and a starter need not wait long for `drive`.
 *  4. Once broken, MPI is not called again: after a failure it may hang or write where it should not. Who was inside it when
 *     the engine broke may be there for a while, and any call moves whatever is posted; so nobody is told of the failure
 *     before that one has left. What is under way is never ended, and touched no more: it is the caller's to free.
 *  5. Signs of life are looked after by whoever drives; the thread wakes up for them where nobody else does.
 */
#include "comm/mpi/engine.h"

#include "base/clock.h"
#include "base/memory.h"
#include <errno.h>
#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>

enum { PIECE_BYTES = 4 << 20, WINDOW_BYTES = 64 << 20 };
enum { SPINS = 50 };                         /* looks of a waiter before it offers the core to others */
static const double TELL_S = 0.1;             /* for telling the other hosts that a rank is gone */
static const double LEAVE_MPI_S = 5;          /* after the break: who is still inside MPI then hangs there, and moves nothing */
static const double PAUSE_LEAST_S = 50e-6;   /* of the thread after a look at which nothing moved, */
static const double PAUSE_MOST_S = 8e-3;     /* doubled until here; waking up takes up to 50 us in a virtual machine */
static const double REST_S = 2e-3;           /* while others drive, or nothing is under way */
static const double ALONE_S = 100e-6;        /* the thread looks once nobody has been in here for so long */
static const double LINGER_S = 10e-3;        /* how long the thread stays awake with nothing under way */
static const double WAITER_PATIENCE_S = 2e-3; /* a waiter that saw nothing move for so long sleeps between looks */
static const double WAITER_PAUSE_S = 30e-6;   /* and after that a share of the time for which nothing moved: who waits for */
static const double WAITER_PAUSE_SHARE = 1.0 / 64; /* a disk must not keep the cores from it, and is late by that share */
static const double WAITER_PAUSE_MOST_S = 2e-3;
static const double LOOK_S = 2e-6;           /* a look that takes longer has moved bytes, or had to give the core away: */
static const double LOOK_PATIENCE_S = 20e-3; /* believed for so long if no piece is done */

enum moved { NOTHING, PERHAPS, SURELY }; /* perhaps: the look took long, which may be cold caches */

/* One message under way. */
struct piece {
    struct stream *stream;
    int64_t bytes;
};

/* ---- driving; with `drive` held ---------------------------------------------------------------------------------------- */

static void describe_failure(struct engine *engine, int code, const struct link *link, char line[512]) {
    char text[MPI_MAX_ERROR_STRING] = "", who[256];
    int length;
    MPI_Error_string(code, text, &length);
    engine->describe(engine->context, link->world_rank, who, sizeof who);
    snprintf(line, 512, "%s cannot be reached: %s", who, text);
}

static void fail_link(struct engine *engine, int code, const struct link *link) {
    char line[512];
    describe_failure(engine, code, link, line);
    engine->failed_rank = link->world_rank;
    engine_break(engine, line);
}

static enum status make_room(struct engine *engine) {
    if (engine->active < engine->capacity)
        return STATUS_OK;
    int capacity = engine->capacity ? 2 * engine->capacity : 64;
    TRY(memory_resize(&engine->requests, (size_t)capacity, sizeof *engine->requests));
    TRY(memory_resize(&engine->pieces, (size_t)capacity, sizeof *engine->pieces));
    TRY(memory_resize(&engine->indices, (size_t)capacity, sizeof *engine->indices));
    TRY(memory_resize(&engine->statuses, (size_t)capacity, sizeof *engine->statuses));
    engine->capacity = capacity;
    return STATUS_OK;
}

/* Post as many pieces as the window lets through. */
static void link_post(struct engine *engine, struct link *link) {
    while (link->first && link->posted_bytes < WINDOW_BYTES && !engine->broken) {
        struct stream *stream = link->first;
        int64_t left = stream->bytes - stream->posted, bytes = left < PIECE_BYTES ? left : PIECE_BYTES;
        char *data = stream->data + stream->posted;
        if (make_room(engine) != STATUS_OK) {
            engine_break(engine, status_text());
            return;
        }
        MPI_Request *request = &engine->requests[engine->active];
        int code = link->sends ? MPI_Isend(data, (int)bytes, MPI_BYTE, link->world_rank, link->tag, engine->world, request)
                               : MPI_Irecv(data, (int)bytes, MPI_BYTE, link->world_rank, link->tag, engine->world, request);
        if (code != MPI_SUCCESS) {
            fail_link(engine, code, link);
            return;
        }
        engine->pieces[engine->active++] = (struct piece){stream, bytes};
        link->posted_bytes += bytes;
        stream->posted += bytes;
        if (stream->posted == stream->bytes)
            link->first = stream->next;
    }
}

static void transfer_post(struct engine *engine, struct transfer *transfer) {
    for (int i = 0; i < transfer->stream_count; i++) {
        struct stream *stream = &transfer->streams[i];
        struct link *link = stream->link;
        stream->next = NULL;
        if (link->first)
            link->last->next = stream;
        else
            link->first = stream;
        link->last = stream;
        link_post(engine, link);
    }
}

static bool post_queue(struct engine *engine) {
    pthread_mutex_lock(&engine->lock);
    struct transfer *transfer = engine->broken ? NULL : engine->queue_first;
    engine->queue_first = engine->queue_last = NULL;
    pthread_mutex_unlock(&engine->lock);
    bool any = transfer != NULL;
    while (transfer) { /* once posted it may be done, waited for and in use again */
        struct transfer *next = transfer->next;
        transfer_post(engine, transfer);
        transfer = next;
    }
    return any;
}

static void transfer_finish(struct engine *engine, struct transfer *transfer) {
    pthread_mutex_lock(&engine->lock);
    transfer->done = true;
    engine->under_way--;
    if (engine->inside_count > 0)
        pthread_cond_broadcast(&engine->done);
    pthread_mutex_unlock(&engine->lock);
}

/* Our own mistake: another number of bytes than the sender's. */
static void check_bytes(const struct engine *engine, const struct piece *piece, int code, MPI_Status *status) {
    int count = -1, class = MPI_SUCCESS;
    if (code != MPI_SUCCESS)
        MPI_Error_class(code, &class);
    else
        MPI_Get_count(status, MPI_BYTE, &count);
    if (class == MPI_ERR_TRUNCATE || (class == MPI_SUCCESS && count != piece->bytes)) {
        char what[160];
        snprintf(what, sizeof what, "what rank %d of the world sends == what rank %d expects of it",
                 piece->stream->link->world_rank, engine->rank);
        check_failed(__FILE__, __LINE__, __func__, what, 1, count, piece->bytes);
    }
}

/* ---- signs of life; with `drive` held -------------------------------------------------------------------------------------- */

enum { NAMES_MOST = 2 };

/* "rank 2 (pid 77 on host a), rank 3 (pid 78 on host a) and 2 more have not answered for 60 s" */
static void describe_silence(struct engine *engine, double now_s, char line[512]) {
    int count = 0, hanging = 0;
    size_t used = 0;
    for (int r = 0; r < engine->size; r++) {
        bool silent = pulse_is_silent(&engine->pulse, r, now_s), hangs = !silent && pulse_hangs(&engine->pulse, r);
        engine->silent_ranks[r] = silent || hangs;
        count += silent || hangs;
        hanging += hangs;
        if ((silent || hangs) && count <= NAMES_MOST) {
            char who[160];
            engine->describe(engine->context, r, who, sizeof who);
            used += (size_t)snprintf(line + used, 512 - used, "%s%s", count > 1 ? ", " : "", who);
        }
    }
    if (count > NAMES_MOST)
        used += (size_t)snprintf(line + used, 512 - used, " and %d more", count - NAMES_MOST);
    double limit_s = engine->pulse.limit_s;
    if (hanging == count)
        snprintf(line + used, 512 - used, " %s, but %s done nothing for %.0f s while others wait (a disk that hangs?)",
                 count > 1 ? "answer" : "answers", count > 1 ? "have" : "has", PULSE_HANG_FACTOR * limit_s);
    else
        snprintf(line + used, 512 - used, " %s not answered for %g s", count > 1 ? "have" : "has", limit_s);
}

static void look_for_life(struct engine *engine, double now_s) {
    pthread_mutex_lock(&engine->lock);
    bool waits = engine->inside_count > 0;
    pthread_mutex_unlock(&engine->lock);
    bool lost = pulse_look(&engine->pulse, now_s, waits);
    char line[512];
    if (engine->pulse.told_gone >= 0) {
        engine->describe(engine->context, engine->pulse.told_gone, line, sizeof line);
        engine->gone(engine->context);
        engine_break(engine, line);
    }
    if (!lost || engine->broken)
        return;
    describe_silence(engine, now_s, line);
    engine->silent(engine->context, engine->silent_ranks, line);
    engine_break(engine, line);
}

/* ---- looking; with `drive` held ---------------------------------------------------------------------------------------------- */

/* Account for a piece that MPI has ended; its place in the list becomes free. */
static void piece_finish(struct engine *engine, int index, int code, MPI_Status *status) {
    struct piece piece = engine->pieces[index];
    struct stream *stream = piece.stream;
    struct link *link = stream->link;
    engine->pieces[index].stream = NULL;
    if (!link->sends)
        check_bytes(engine, &piece, code, status);
    if (code != MPI_SUCCESS) {
        fail_link(engine, code, link);
        return;
    }
    pulse_note(&engine->pulse, link->world_rank, engine->moved_s);
    link->posted_bytes -= piece.bytes;
    stream->done += piece.bytes;
    link_post(engine, link);
    if (stream->done == stream->bytes && --stream->transfer->open_count == 0)
        transfer_finish(engine, stream->transfer);
}

static void close_gaps(struct engine *engine) {
    int kept = 0;
    for (int i = 0; i < engine->active; i++)
        if (engine->pieces[i].stream) {
            engine->pieces[kept] = engine->pieces[i];
            engine->requests[kept++] = engine->requests[i];
        }
    engine->active = kept;
}

/* One look. Returns whether anything moved: nothing does once the engine is broken. */
static enum moved look(struct engine *engine) {
    if (engine->broken)
        return NOTHING;
    enum moved moved = post_queue(engine) ? SURELY : NOTHING;
    int count = 0;
    double begin = clock_seconds();
    if (begin >= engine->pulse.due_s && !engine->broken) {
        look_for_life(engine, begin);
        begin = clock_seconds();
    }
    if (engine->active == 0 || engine->broken)
        return moved;
    int code = MPI_Testsome(engine->active, engine->requests, &count, engine->indices, engine->statuses);
    if (code != MPI_SUCCESS && code != MPI_ERR_IN_STATUS) {
        fail_link(engine, code, engine->pieces[0].stream->link);
        return SURELY;
    }
    if (count <= 0)
        return moved == NOTHING && clock_seconds() - begin > LOOK_S ? PERHAPS : moved;
    engine->moved_s = clock_seconds();
    for (int i = 0; i < count && !engine->broken; i++)
        piece_finish(engine, engine->indices[i], code == MPI_SUCCESS ? MPI_SUCCESS : engine->statuses[i].MPI_ERROR,
                     &engine->statuses[i]);
    close_gaps(engine);
    return SURELY;
}

/* ---- the thread ---------------------------------------------------------------------------------------------------------- */

/* Returns whether it was woken before. */
static bool sleep_for(struct engine *engine, pthread_cond_t *until, double seconds) {
    double due = clock_seconds() + seconds;
    time_t whole = (time_t)due;
    struct timespec time = {.tv_sec = whole, .tv_nsec = (long)(1e9 * (due - (double)whole))};
    return pthread_cond_timedwait(until, &engine->lock, &time) == 0;
}

/* Until there is something to move, or a look at signs of life is due. Returns whether there is something to move. */
static bool rest(struct engine *engine) {
    double due_s = engine->broken ? HUGE_VAL : engine->pulse.due_s, wait_s = due_s - clock_seconds();
    bool woken = true;
    engine->idle = true;
    if (due_s < HUGE_VAL)
        woken = sleep_for(engine, &engine->work, wait_s > REST_S ? wait_s : REST_S);
    else
        pthread_cond_wait(&engine->work, &engine->lock);
    engine->idle = false;
    return woken;
}

/* With `lock` held, released meanwhile. */
static enum moved try_look(struct engine *engine) {
    pthread_mutex_unlock(&engine->lock);
    enum moved moved = NOTHING;
    if (pthread_mutex_trylock(&engine->drive) == 0) {
        moved = look(engine);
        pthread_mutex_unlock(&engine->drive);
    }
    pthread_mutex_lock(&engine->lock);
    return moved;
}

/* What the thread does next, with `lock` held; returns how long it sleeps afterwards. *pause_s: of the next look at which
 * nothing moves. */
static double take_turn(struct engine *engine, double *pause_s) {
    double now = clock_seconds();
    bool alone = engine->under_way > 0 && engine->inside_count == 0 && now - engine->left_s > ALONE_S;
    if (!alone && now >= engine->pulse.due_s)
        (void)try_look(engine);
    if (!alone) {
        *pause_s = PAUSE_LEAST_S;
        return REST_S;
    }
    enum moved moved = try_look(engine);
    if (moved == PERHAPS && try_look(engine) == NOTHING) /* now with warm caches */
        moved = NOTHING;
    if (engine->inside_count > 0) /* it may have failed to get `drive` */
        pthread_cond_broadcast(&engine->done);
    if (moved != NOTHING || engine->queue_first) { /* of one who did not get `drive` */
        *pause_s = PAUSE_LEAST_S;
        return 0;
    }
    double pause = *pause_s;
    *pause_s = 2 * pause < PAUSE_MOST_S ? 2 * pause : PAUSE_MOST_S;
    return pause;
}

static void *thread_main(void *context) {
    struct engine *engine = context;
    double pause_s = PAUSE_LEAST_S, busy_s = clock_seconds();
#ifdef PR_SET_TIMERSLACK
    prctl(PR_SET_TIMERSLACK, 1000UL); /* pauses are to be as short as they say */
#endif
    pthread_mutex_lock(&engine->lock);
    while (!engine->closing) {
        double now = clock_seconds();
        busy_s = engine->under_way > 0 || engine->inside_count > 0 ? now : busy_s;
        if ((engine->broken || now - busy_s > LINGER_S) && rest(engine))
            busy_s = clock_seconds();
        double sleep_s = take_turn(engine, &pause_s);
        if (sleep_s > 0 && !engine->closing)
            sleep_for(engine, &engine->work, sleep_s);
    }
    pthread_mutex_unlock(&engine->lock);
    return NULL;
}

/* ---- for the ranks' threads ------------------------------------------------------------------------------------------------ */

/* The right to drive; false where it is not to be had by then: who has it may hang in MPI. */
static bool drives_by(struct engine *engine, double end_s) {
    while (pthread_mutex_trylock(&engine->drive) != 0) {
        if (clock_seconds() > end_s)
            return false;
        sched_yield();
    }
    return true;
}

/* Once broken: until nobody is inside MPI any more. With no lock held. */
static void await_last_look(struct engine *engine) {
    if (drives_by(engine, engine->broken_s + LEAVE_MPI_S))
        pthread_mutex_unlock(&engine->drive);
}

/* With `lock` held: from now on the thread may have to drive. */
static void leave(struct engine *engine) {
    engine->inside_count--;
    engine->left_s = clock_seconds();
}

enum status engine_start(struct engine *engine, struct transfer *transfer) {
    transfer->open_count = transfer->stream_count;
    transfer->next = NULL;
    bool empty = transfer->done = transfer->stream_count == 0;
    for (int i = 0; i < transfer->stream_count; i++)
        transfer->streams[i].posted = transfer->streams[i].done = 0;
    pthread_mutex_lock(&engine->lock);
    bool broken = engine->broken, idle = engine->idle;
    engine->inside_count++;
    if (broken)
        status_fail(STATUS_PEER, "%s", engine->failure);
    if (!broken && !empty) {
        if (engine->queue_last)
            engine->queue_last->next = transfer;
        else
            engine->queue_first = transfer;
        engine->queue_last = transfer;
        engine->under_way++;
        if (idle)
            pthread_cond_signal(&engine->work);
    }
    pthread_mutex_unlock(&engine->lock);
    if (broken) {
        engine_started(engine);
        await_last_look(engine);
        return STATUS_PEER;
    }
    if (!empty && pthread_mutex_trylock(&engine->drive) == 0) {
        post_queue(engine);
        pthread_mutex_unlock(&engine->drive);
    }
    return STATUS_OK;
}

void engine_started(struct engine *engine) {
    pthread_mutex_lock(&engine->lock);
    leave(engine);
    pthread_mutex_unlock(&engine->lock);
}

/* Between two looks: spin, then offer the core, then sleep. looks: at which nothing moved; still_s: since a piece was done. */
static void pace(int looks, double still_s) {
    if (still_s < (looks == 0 ? LOOK_PATIENCE_S : WAITER_PATIENCE_S)) {
        if (looks >= SPINS)
            sched_yield();
        return;
    }
    double pause_s = WAITER_PAUSE_SHARE * still_s;
    pause_s = pause_s < WAITER_PAUSE_S ? WAITER_PAUSE_S : pause_s > WAITER_PAUSE_MOST_S ? WAITER_PAUSE_MOST_S : pause_s;
    struct timespec time = {.tv_nsec = (long)(1e9 * pause_s)};
    nanosleep(&time, NULL);
}

enum status engine_wait(struct engine *engine, struct transfer *transfer, double deadline_s) {
    int looks = 0;
    double begin_s = clock_seconds();
    enum status status = STATUS_OK;
    pthread_mutex_lock(&engine->lock);
    engine->inside_count++;
    while (!transfer->done && !engine->broken && status == STATUS_OK) {
        pthread_mutex_unlock(&engine->lock);
        if (pthread_mutex_trylock(&engine->drive) == 0) {
            enum moved moved = look(engine);
            double since_s = engine->moved_s > begin_s ? engine->moved_s : begin_s;
            pthread_mutex_unlock(&engine->drive);
            double now = clock_seconds();
            looks = moved != NOTHING ? 0 : looks + 1;
            if (deadline_s > 0 && now > deadline_s)
                status = status_fail(STATUS_PEER, "the other ranks do not come");
            else
                pace(looks, now - since_s);
            pthread_mutex_lock(&engine->lock);
        } else {
            pthread_mutex_lock(&engine->lock);
            if (!transfer->done && !engine->broken)
                sleep_for(engine, &engine->done, REST_S);
        }
    }
    leave(engine);
    bool lost = status == STATUS_OK && !transfer->done;
    if (lost)
        status = status_fail(STATUS_PEER, "%s", engine->failure);
    pthread_mutex_unlock(&engine->lock);
    if (lost)
        await_last_look(engine);
    return status;
}

bool engine_was_told(struct engine *engine) {
    if (!drives_by(engine, clock_seconds() + TELL_S))
        return false;
    bool told = engine->broken ? engine->pulse.told_gone >= 0 : pulse_was_told(&engine->pulse, clock_seconds());
    pthread_mutex_unlock(&engine->drive);
    return told;
}

void engine_tell_gone(struct engine *engine, const bool *ranks, int gone) {
    if (!drives_by(engine, clock_seconds() + TELL_S))
        return;
    for (int r = 0; r < engine->size && !engine->broken; r++)
        if (ranks[r] && r != engine->rank)
            pulse_tell_gone(&engine->pulse, r, gone);
    pthread_mutex_unlock(&engine->drive);
}

void engine_set_limit(struct engine *engine, double limit_s) {
    pthread_mutex_lock(&engine->drive);
    pulse_set_limit(&engine->pulse, limit_s);
    pthread_mutex_unlock(&engine->drive);
    pthread_mutex_lock(&engine->lock);
    pthread_cond_signal(&engine->work);
    pthread_mutex_unlock(&engine->lock);
}

void engine_break(struct engine *engine, const char *line) {
    pthread_mutex_lock(&engine->lock);
    bool is_first = !engine->broken;
    if (is_first) {
        snprintf(engine->failure, sizeof engine->failure, "%s", line);
        engine->broken_s = clock_seconds();
        engine->broken = true;
    }
    pthread_cond_broadcast(&engine->done);
    pthread_mutex_unlock(&engine->lock);
    if (is_first)
        engine->broke(engine->context);
}

void engine_leave(struct engine *engine, const char *line) {
    engine_break(engine, line);
    await_last_look(engine);
}

enum status engine_open(struct engine *engine, MPI_Comm world) {
    pthread_condattr_t monotonic;
    int *limit, found;
    engine->failed_rank = -1;
    engine->world = world;
    MPI_Comm_rank(world, &engine->rank);
    MPI_Comm_size(world, &engine->size);
    MPI_Comm_get_attr(world, MPI_TAG_UB, &limit, &found);
    engine->tag_limit = found ? *limit : 32767;
    TRY(memory_alloc(&engine->silent_ranks, (size_t)engine->size, sizeof *engine->silent_ranks));
    TRY(pulse_open(&engine->pulse, world));
    pthread_mutex_init(&engine->lock, NULL);
    pthread_mutex_init(&engine->drive, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&engine->done, &monotonic);
    pthread_cond_init(&engine->work, &monotonic);
    pthread_condattr_destroy(&monotonic);
    if (pthread_create(&engine->thread, NULL, thread_main, engine) != 0)
        return status_fail(STATUS_MEMORY, "cannot start the thread that moves bytes while others compute");
    return STATUS_OK;
}

void engine_close(struct engine *engine) {
    pthread_mutex_lock(&engine->lock);
    bool broken = engine->broken;
    engine->closing = true;
    pthread_cond_signal(&engine->work);
    pthread_mutex_unlock(&engine->lock);
    if (broken)
        return;
    pthread_join(engine->thread, NULL);
    pulse_close(&engine->pulse);
    free(engine->silent_ranks);
    free(engine->requests);
    free(engine->pieces);
    free(engine->indices);
    free(engine->statuses);
}
