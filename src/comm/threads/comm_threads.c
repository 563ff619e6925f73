/* Invariants:
 *  1. Everything but the bytes themselves is read and written under the group's one lock.
 *  2. An exchange is one collective on one channel (a communicator as all its ranks see it), found by its number: the
 *     calls of a rank on a channel are numbered, and equal numbers belong together. It goes back to the channel's spare
 *     ones when all ranks have waited for it.
 *  3. A piece is what one rank has for another in one exchange. It becomes ready when both have started; the mover takes
 *     ready pieces off the list when they are due. A rank is done with an exchange when `pending` of it is 0.
 *  4. A rank fails in an exchange when a piece that it waits for has at its other end a rank that is gone, or that failed
 *     in this exchange. Its own pieces are then taken off the list, and the failure is returned only when the mover holds
 *     none of them: the buffers are the caller's again.
 */
#include "comm/threads/comm_threads.h"

#include "base/clock.h"
#include "base/memory.h"
#include "base/random.h"
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { NOBODY = -1 };

struct piece {
    struct exchange *exchange;
    int from, to; /* ranks of the channel */
    const char *source;
    char *target;
    int64_t bytes;
    double due_s;
    bool moved;
    struct piece *next;
};

/* What one rank brought to an exchange. */
struct post {
    bool started, waited, failed;
    const char *send;
    char *recv;
    const int64_t **plan; /* four tables: what to send, from where, what to expect, where to put it */
    int pending;          /* pieces from and to this rank that are not yet moved, started by the other or not */
};

struct exchange {
    struct channel *channel;
    int64_t number;
    const char *kind;
    int waited_count;
    struct post *posts;   /* [size] */
    struct piece *pieces; /* [size * size] */
    int64_t *tables;      /* [size * 4 * size] */
    struct exchange *next;
};

struct channel {
    struct comm_threads *group;
    int size, end_count; /* ends that are not yet released, or not yet made */
    int *world;          /* [size] rank in the group */
    struct exchange *open, *spare;
    struct channel *parent; /* with split_number and color: the name under which the ranks of a split find it */
    int64_t split_number;
    int color;
    struct channel *next;
};

/* A channel as one rank sees it: comm->state. */
struct end {
    struct channel *channel;
    int64_t started, under_way, splits;
};

struct comm_threads {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    pthread_t mover;
    int size;
    bool closing;
    struct comm_threads_faults faults;
    struct channel *channels;
    struct piece *ready;
    struct piece *copying; /* what the mover holds, or NULL */
    int64_t drawn;         /* delays drawn so far */
    double *link_free_s;   /* [size] when the last piece for this rank will have come */
    int64_t *calls;        /* [size] */
    bool *gone;            /* [size] */
    int *culprit;          /* [size] on whose account this rank failed, or NOBODY */
    int first_gone;        /* or NOBODY */
};

static const struct comm_ops threads_ops;

/* ---- the mover ------------------------------------------------------------------------------------------------------- */

static void finish_piece(struct piece *piece) {
    piece->moved = true;
    piece->exchange->posts[piece->from].pending--;
    piece->exchange->posts[piece->to].pending--;
}

static struct piece **earliest_ready(struct comm_threads *group) {
    struct piece **best = &group->ready;
    for (struct piece **at = &group->ready; *at; at = &(*at)->next)
        if ((*at)->due_s < (*best)->due_s)
            best = at;
    return best;
}

static void sleep_until(struct comm_threads *group, double due_s) {
    time_t whole = (time_t)due_s;
    struct timespec until = {.tv_sec = whole, .tv_nsec = (long)(1e9 * (due_s - (double)whole))};
    pthread_cond_timedwait(&group->changed, &group->lock, &until);
}

static void *mover_main(void *context) {
    struct comm_threads *group = context;
    pthread_mutex_lock(&group->lock);
    while (!group->closing) {
        struct piece **at = earliest_ready(group), *piece = *at;
        if (!piece) {
            pthread_cond_wait(&group->changed, &group->lock);
        } else if (piece->due_s > clock_seconds()) {
            sleep_until(group, piece->due_s);
        } else {
            *at = piece->next;
            group->copying = piece;
            pthread_mutex_unlock(&group->lock);
            memcpy(piece->target, piece->source, (size_t)piece->bytes);
            pthread_mutex_lock(&group->lock);
            group->copying = NULL;
            finish_piece(piece);
            pthread_cond_broadcast(&group->changed);
        }
    }
    pthread_mutex_unlock(&group->lock);
    return NULL;
}

static double draw_due(struct comm_threads *group, int to, int64_t bytes) {
    const struct comm_threads_faults *faults = &group->faults;
    double now = clock_seconds(), factor = 0.5 + random_uniform(faults->seed, 0, (uint64_t)group->drawn++);
    double *link_free_s = &group->link_free_s[to];
    if (faults->bytes_per_s > 0) {
        *link_free_s = (*link_free_s > now ? *link_free_s : now) + (double)bytes / faults->bytes_per_s;
        now = *link_free_s;
    }
    return now + factor * faults->latency_s;
}

static void make_ready(struct exchange *exchange, int from, int to) {
    struct channel *channel = exchange->channel;
    const struct post *sender = &exchange->posts[from], *receiver = &exchange->posts[to];
    int64_t bytes = sender->plan[0][to];
    if (bytes != receiver->plan[2][from]) {
        char what[160];
        snprintf(what, sizeof what, "%s, call %lld of a communicator of %d: what rank %d sends == what rank %d expects of it",
                 exchange->kind, (long long)exchange->number, channel->size, from, to);
        check_failed(__FILE__, __LINE__, __func__, what, 1, bytes, receiver->plan[2][from]);
    }
    if (!bytes)
        return;
    struct piece *piece = &exchange->pieces[from * channel->size + to];
    *piece = (struct piece){exchange, from, to, sender->send + sender->plan[1][to], receiver->recv + receiver->plan[3][from],
                            bytes, draw_due(channel->group, channel->world[to], bytes), false, channel->group->ready};
    channel->group->ready = piece;
}

/* ---- channels and exchanges ------------------------------------------------------------------------------------------- */

static void exchange_free_list(struct exchange *list) {
    while (list) {
        struct exchange *next = list->next;
        free(list->posts);
        free(list->pieces);
        free(list->tables);
        free(list);
        list = next;
    }
}

static enum status channel_create(struct comm_threads *group, int size, struct channel **out) {
    struct channel *channel;
    TRY(memory_alloc(&channel, 1, sizeof *channel));
    enum status status = memory_alloc(&channel->world, (size_t)size, sizeof *channel->world);
    if (status != STATUS_OK) {
        free(channel);
        return status;
    }
    channel->group = group;
    channel->size = size;
    channel->end_count = size;
    channel->next = group->channels;
    group->channels = channel;
    *out = channel;
    return STATUS_OK;
}

static void channel_destroy(struct channel *channel) {
    struct channel **at = &channel->group->channels;
    while (*at != channel)
        at = &(*at)->next;
    *at = channel->next;
    exchange_free_list(channel->open);
    exchange_free_list(channel->spare);
    free(channel->world);
    free(channel);
}

static enum status exchange_create(struct channel *channel, struct exchange **out) {
    size_t size = (size_t)channel->size;
    struct exchange *exchange;
    const int64_t **plans;
    TRY(memory_alloc(&exchange, 1, sizeof *exchange));
    exchange->channel = channel;
    enum status status = memory_alloc(&exchange->posts, size, sizeof *exchange->posts + 4 * sizeof *plans);
    if (status == STATUS_OK)
        status = memory_alloc(&exchange->pieces, size * size, sizeof *exchange->pieces);
    if (status == STATUS_OK)
        status = memory_alloc(&exchange->tables, size * 4 * size, sizeof *exchange->tables);
    if (status != STATUS_OK) {
        exchange_free_list(exchange);
        return status;
    }
    plans = (const int64_t **)(exchange->posts + size);
    for (size_t i = 0; i < 4 * size; i++)
        plans[i] = exchange->tables + i * size;
    *out = exchange;
    return STATUS_OK;
}

/* The exchange of this number: the one that another rank has opened, or a fresh one. */
static enum status exchange_open(struct channel *channel, int64_t number, const char *kind, struct exchange **out) {
    struct exchange *exchange;
    for (exchange = channel->open; exchange; exchange = exchange->next)
        if (exchange->number == number) {
            if (strcmp(exchange->kind, kind) != 0) {
                char what[160];
                snprintf(what, sizeof what, "call %lld of a communicator of %d: %s on one rank == %s on another",
                         (long long)number, channel->size, exchange->kind, kind);
                check_failed(__FILE__, __LINE__, __func__, what, 0, 0, 0);
            }
            *out = exchange;
            return STATUS_OK;
        }
    if (channel->spare) {
        exchange = channel->spare;
        channel->spare = exchange->next;
    } else {
        TRY(exchange_create(channel, &exchange));
    }
    exchange->number = number;
    exchange->kind = kind;
    exchange->waited_count = 0;
    memset(exchange->pieces, 0, (size_t)(channel->size * channel->size) * sizeof *exchange->pieces);
    for (int r = 0; r < channel->size; r++)
        exchange->posts[r] = (struct post){.plan = (const int64_t **)(exchange->posts + channel->size) + 4 * r};
    exchange->next = channel->open;
    channel->open = exchange;
    *out = exchange;
    return STATUS_OK;
}

static void exchange_close(struct exchange *exchange) {
    struct channel *channel = exchange->channel;
    struct exchange **at = &channel->open;
    while (*at != exchange)
        at = &(*at)->next;
    *at = exchange->next;
    exchange->next = channel->spare;
    channel->spare = exchange;
}

/* ---- death ------------------------------------------------------------------------------------------------------------ */

static bool piece_is_of(const struct piece *piece, const struct exchange *exchange, int rank) {
    return piece && piece->exchange == exchange && (piece->from == rank || piece->to == rank);
}

/* The rank's pieces that are not yet moved will not be. */
static void exchange_fail(struct exchange *exchange, int rank) {
    struct comm_threads *group = exchange->channel->group;
    struct piece **at = &group->ready;
    exchange->posts[rank].failed = true;
    while (*at)
        if (piece_is_of(*at, exchange, rank))
            *at = (*at)->next;
        else
            at = &(*at)->next;
    pthread_cond_broadcast(&group->changed);
    while (piece_is_of(group->copying, exchange, rank))
        pthread_cond_wait(&group->changed, &group->lock);
}

static int channel_rank(const struct channel *channel, int world_rank) {
    for (int r = 0; r < channel->size; r++)
        if (channel->world[r] == world_rank)
            return r;
    return NOBODY;
}

/* With the lock held; the list of channels and their exchanges may change while this waits for the mover, so that every
 * failure begins the search anew. */
static void leave(struct comm_threads *group, int world_rank) {
    if (group->first_gone == NOBODY)
        group->first_gone = world_rank;
    group->gone[world_rank] = true;
    pthread_cond_broadcast(&group->changed);
    for (struct channel *channel = group->channels; channel;) {
        int rank = channel_rank(channel, world_rank);
        struct exchange *exchange = rank == NOBODY ? NULL : channel->open;
        while (exchange && !(exchange->posts[rank].pending > 0 && !exchange->posts[rank].failed))
            exchange = exchange->next;
        if (exchange)
            exchange_fail(exchange, rank);
        channel = exchange ? group->channels : channel->next;
    }
}

/* A rank of the channel for which this one waits in vain, or NOBODY. */
static int find_lost(const struct exchange *exchange, int rank) {
    const struct channel *channel = exchange->channel;
    const struct post *mine = &exchange->posts[rank];
    for (int r = 0; r < channel->size; r++) {
        bool waits = (mine->plan[0][r] > 0 && !exchange->pieces[rank * channel->size + r].moved) ||
                     (mine->plan[2][r] > 0 && !exchange->pieces[r * channel->size + rank].moved);
        bool lost = exchange->posts[r].failed || (channel->group->gone[channel->world[r]] && !exchange->posts[r].waited);
        if (r != rank && waits && lost)
            return r;
    }
    return NOBODY;
}

/* Fail on account of `lost`, or of the one on whose account that one failed. */
static enum status fail_lost(struct exchange *exchange, int rank, int lost) {
    struct comm_threads *group = exchange->channel->group;
    int world_rank = exchange->channel->world[rank], culprit = exchange->channel->world[lost];
    if (group->culprit[culprit] != NOBODY)
        culprit = group->culprit[culprit];
    if (group->culprit[world_rank] == NOBODY)
        group->culprit[world_rank] = culprit;
    exchange_fail(exchange, rank);
    return status_fail(STATUS_PEER, "rank %d is gone", culprit);
}

/* At the begin of every call, with the lock held. */
static enum status count_call(const struct comm *comm) {
    const struct end *end = comm->state;
    struct comm_threads *group = end->channel->group;
    int world_rank = end->channel->world[comm->rank];
    const struct comm_threads_faults *faults = &group->faults;
    if (++group->calls[world_rank] == faults->dying_call && faults->dying_rank == world_rank)
        leave(group, world_rank);
    if (group->gone[world_rank])
        return status_fail(STATUS_PEER, "rank %d is gone: it takes no part in its call %lld", world_rank,
                           (long long)group->calls[world_rank]);
    return STATUS_OK;
}

/* ---- the table -------------------------------------------------------------------------------------------------------- */

/* Where to write the plan of this rank's next exchange. With the lock held, which stays held where this succeeds. */
static enum status start_begin(struct comm *comm, const char *kind, struct exchange **out, int64_t *plan[4]) {
    struct end *end = comm->state;
    TRY(count_call(comm));
    TRY(exchange_open(end->channel, end->started + 1, kind, out));
    end->started++;
    end->under_way++;
    for (int i = 0; i < 4; i++)
        plan[i] = (*out)->tables + (4 * comm->rank + i) * comm->size;
    return STATUS_OK;
}

/* The plan stands: what this rank keeps for itself is copied, what others have started too becomes ready. */
static void start_finish(struct comm *comm, struct exchange *exchange, const void *send, void *recv,
                         struct comm_request *request) {
    struct post *mine = &exchange->posts[comm->rank];
    mine->started = true;
    mine->send = send;
    mine->recv = recv;
    for (int r = 0; r < comm->size; r++) {
        if (r == comm->rank)
            continue;
        mine->pending += (mine->plan[0][r] > 0) + (mine->plan[2][r] > 0);
        comm->count.sent_bytes += mine->plan[0][r];
        comm->count.received_bytes += mine->plan[2][r];
        if (exchange->posts[r].started && !exchange->posts[r].failed) {
            make_ready(exchange, r, comm->rank);
            make_ready(exchange, comm->rank, r);
        }
    }
    comm->count.calls++;
    request->ticket = exchange->number;
    CHECK_OP(mine->plan[0][comm->rank], ==, mine->plan[2][comm->rank]);
    if (mine->plan[0][comm->rank])
        memcpy((char *)recv + mine->plan[3][comm->rank], (const char *)send + mine->plan[1][comm->rank],
               (size_t)mine->plan[0][comm->rank]);
    pthread_cond_broadcast(&exchange->channel->group->changed);
}

static struct comm_threads *group_of(const struct comm *comm) {
    return ((const struct end *)comm->state)->channel->group;
}

static enum status threads_all_gather(struct comm *comm, const void *send, void *recv, const int64_t *counts,
                                      const int64_t *offsets, struct comm_request *request) {
    struct comm_threads *group = group_of(comm);
    struct exchange *exchange;
    int64_t *plan[4];
    *request = (struct comm_request){0};
    pthread_mutex_lock(&group->lock);
    enum status status = start_begin(comm, "all_gather", &exchange, plan);
    if (status == STATUS_OK) {
        for (int r = 0; r < comm->size; r++) {
            plan[0][r] = counts[comm->rank];
            plan[1][r] = 0;
            plan[2][r] = counts[r];
            plan[3][r] = offsets[r];
        }
        start_finish(comm, exchange, send, recv, request);
    }
    pthread_mutex_unlock(&group->lock);
    return status;
}

static enum status threads_all_to_all(struct comm *comm, const void *send, const int64_t *send_counts,
                                      const int64_t *send_offsets, void *recv, const int64_t *recv_counts,
                                      const int64_t *recv_offsets, struct comm_request *request) {
    struct comm_threads *group = group_of(comm);
    struct exchange *exchange;
    int64_t *plan[4];
    *request = (struct comm_request){0};
    pthread_mutex_lock(&group->lock);
    enum status status = start_begin(comm, "all_to_all", &exchange, plan);
    if (status == STATUS_OK) {
        const int64_t *given[4] = {send_counts, send_offsets, recv_counts, recv_offsets};
        for (int i = 0; i < 4; i++)
            memcpy(plan[i], given[i], (size_t)comm->size * sizeof *given[i]);
        start_finish(comm, exchange, send, recv, request);
    }
    pthread_mutex_unlock(&group->lock);
    return status;
}

static enum status threads_wait(struct comm *comm, struct comm_request *request) {
    struct end *end = comm->state;
    struct channel *channel = end->channel;
    struct comm_threads *group = channel->group;
    if (!request->ticket)
        return STATUS_OK;
    pthread_mutex_lock(&group->lock);
    enum status status = count_call(comm);
    struct exchange *exchange = channel->open;
    while (exchange && exchange->number != request->ticket)
        exchange = exchange->next;
    CHECK(exchange && !exchange->posts[comm->rank].waited);
    struct post *mine = &exchange->posts[comm->rank];
    while (status == STATUS_OK && mine->pending > 0) {
        int lost = find_lost(exchange, comm->rank);
        if (lost != NOBODY)
            status = fail_lost(exchange, comm->rank, lost);
        else
            pthread_cond_wait(&group->changed, &group->lock);
    }
    mine->waited = true;
    end->under_way--;
    if (++exchange->waited_count == channel->size)
        exchange_close(exchange);
    pthread_mutex_unlock(&group->lock);
    *request = (struct comm_request){0};
    return status;
}

/* The channel of those who gave this color in this split; made by the first of them. */
static enum status find_part(const struct comm *comm, const int *colors, struct channel **out) {
    const struct end *end = comm->state;
    struct channel *parent = end->channel, *part = parent->group->channels;
    int color = colors[comm->rank], size = 0;
    while (part && !(part->parent == parent && part->split_number == end->splits && part->color == color))
        part = part->next;
    if (!part) {
        for (int r = 0; r < comm->size; r++)
            size += colors[r] == color;
        TRY(channel_create(parent->group, size, &part));
        part->parent = parent;
        part->split_number = end->splits;
        part->color = color;
        for (int r = 0, at = 0; r < comm->size; r++)
            if (colors[r] == color)
                part->world[at++] = parent->world[r];
    }
    *out = part;
    return STATUS_OK;
}

static enum status threads_split(struct comm *comm, int color, struct comm *part) {
    struct end *end = comm->state, *fresh = NULL;
    struct comm_count count = comm->count;
    struct channel *channel = NULL;
    int *colors, rank = 0;
    *part = (struct comm){0};
    TRY(memory_alloc(&colors, (size_t)comm->size, sizeof *colors));
    enum status status = comm_share(comm, &color, sizeof color, colors);
    comm->count = count;
    end->splits++;
    if (status == STATUS_OK)
        status = memory_alloc(&fresh, 1, sizeof *fresh);
    if (status == STATUS_OK) {
        pthread_mutex_lock(&group_of(comm)->lock);
        status = find_part(comm, colors, &channel);
        fresh->channel = channel;
        pthread_mutex_unlock(&group_of(comm)->lock);
    }
    for (int r = 0; r < comm->rank; r++)
        rank += colors[r] == color;
    free(colors);
    if (status != STATUS_OK) {
        free(fresh);
        return status;
    }
    *part = (struct comm){.ops = &threads_ops, .rank = rank, .size = channel->size, .state = fresh};
    return STATUS_OK;
}

static void threads_release(struct comm *comm) {
    struct end *end = comm->state;
    struct comm_threads *group = end->channel->group;
    pthread_mutex_lock(&group->lock);
    bool failed = group->culprit[end->channel->world[comm->rank]] != NOBODY || group->gone[end->channel->world[comm->rank]];
    CHECK(failed || end->under_way == 0);
    if (--end->channel->end_count == 0)
        channel_destroy(end->channel);
    pthread_mutex_unlock(&group->lock);
    free(end);
}

static const struct comm_ops threads_ops = {"threads",    threads_all_gather, threads_all_to_all,
                                            threads_wait, threads_split,      threads_release};

/* ---- the group -------------------------------------------------------------------------------------------------------- */

static void group_free(struct comm_threads *group) {
    while (group->channels)
        channel_destroy(group->channels);
    free(group->link_free_s);
    free(group->calls);
    free(group->gone);
    free(group->culprit);
    pthread_cond_destroy(&group->changed);
    pthread_mutex_destroy(&group->lock);
    free(group);
}

static enum status group_take(struct comm_threads *group, int size) {
    struct channel *world;
    TRY(memory_alloc(&group->link_free_s, (size_t)size, sizeof *group->link_free_s));
    TRY(memory_alloc(&group->calls, (size_t)size, sizeof *group->calls));
    TRY(memory_alloc(&group->gone, (size_t)size, sizeof *group->gone));
    TRY(memory_alloc(&group->culprit, (size_t)size, sizeof *group->culprit));
    TRY(channel_create(group, size, &world));
    for (int r = 0; r < size; r++) {
        group->culprit[r] = NOBODY;
        world->world[r] = r;
    }
    return STATUS_OK;
}

enum status comm_threads_create(int size, const struct comm_threads_faults *faults, struct comm_threads **out) {
    struct comm_threads *group;
    pthread_condattr_t monotonic;
    CHECK_OP(size, >=, 1);
    TRY(memory_alloc(&group, 1, sizeof *group));
    group->size = size;
    group->first_gone = NOBODY;
    if (faults)
        group->faults = *faults;
    pthread_mutex_init(&group->lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&group->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    enum status status = group_take(group, size);
    if (status == STATUS_OK && pthread_create(&group->mover, NULL, mover_main, group) != 0)
        status = status_fail(STATUS_MEMORY, "cannot start a thread that moves the bytes of %d ranks", size);
    if (status != STATUS_OK) {
        group_free(group);
        return status;
    }
    *out = group;
    return STATUS_OK;
}

void comm_threads_destroy(struct comm_threads *group) {
    pthread_mutex_lock(&group->lock);
    group->closing = true;
    pthread_cond_broadcast(&group->changed);
    pthread_mutex_unlock(&group->lock);
    pthread_join(group->mover, NULL);
    group_free(group);
}

struct comm comm_threads_rank(struct comm_threads *group, int rank) {
    struct end *end = memory_must(1, sizeof *end);
    pthread_mutex_lock(&group->lock);
    end->channel = group->channels;
    while (end->channel->parent) /* the group's own is the only one without */
        end->channel = end->channel->next;
    pthread_mutex_unlock(&group->lock);
    return (struct comm){.ops = &threads_ops, .rank = rank, .size = group->size, .state = end};
}

void comm_threads_leave(struct comm_threads *group, int rank) {
    pthread_mutex_lock(&group->lock);
    if (!group->gone[rank])
        leave(group, rank);
    pthread_mutex_unlock(&group->lock);
}

/* ---- running ---------------------------------------------------------------------------------------------------------- */

struct run {
    struct comm_threads *group;
    struct comm comm;
    enum status (*function)(void *context, struct comm *comm);
    void *context;
    pthread_t thread;
    bool started;
    enum status status;
    char text[1024];
};

static void *run_main(void *context) {
    struct run *run = context;
    int rank = run->comm.rank;
    run->status = run->function(run->context, &run->comm);
    if (run->status != STATUS_OK)
        snprintf(run->text, sizeof run->text, "%s", status_text());
    comm_threads_leave(run->group, rank);
    comm_release(&run->comm);
    return NULL;
}

static enum status tell_worst(const struct run *runs, int size, int first_gone) {
    const struct run *worst = NULL;
    for (int r = 0; r < size; r++)
        if (runs[r].status != STATUS_OK && runs[r].status != STATUS_PEER && (!worst || runs[r].status > worst->status))
            worst = &runs[r];
    if (!worst && first_gone != NOBODY && runs[first_gone].status != STATUS_OK)
        worst = &runs[first_gone];
    for (int r = 0; r < size && !worst; r++)
        if (runs[r].status != STATUS_OK)
            worst = &runs[r];
    return worst ? status_fail(worst->status, "%s", worst->text) : STATUS_OK;
}

enum status comm_threads_run_with(int size, const struct comm_threads_faults *faults,
                                  enum status (*function)(void *context, struct comm *comm), void *context) {
    struct comm_threads *group;
    struct run *runs;
    TRY(comm_threads_create(size, faults, &group));
    enum status status = memory_alloc(&runs, (size_t)size, sizeof *runs);
    if (status != STATUS_OK) {
        comm_threads_destroy(group);
        return status;
    }
    for (int r = 0; r < size; r++)
        runs[r] = (struct run){.group = group, .comm = comm_threads_rank(group, r), .function = function, .context = context};
    for (int r = 0; r < size; r++) {
        runs[r].started = pthread_create(&runs[r].thread, NULL, run_main, &runs[r]) == 0;
        if (!runs[r].started) {
            runs[r].status = STATUS_MEMORY;
            snprintf(runs[r].text, sizeof runs[r].text, "cannot start a thread for rank %d of %d", r, size);
            comm_threads_leave(group, r);
            comm_release(&runs[r].comm);
        }
    }
    for (int r = 0; r < size; r++)
        if (runs[r].started)
            pthread_join(runs[r].thread, NULL);
    status = tell_worst(runs, size, group->first_gone);
    comm_threads_destroy(group);
    free(runs);
    return status;
}

enum status comm_threads_run(int size, enum status (*function)(void *context, struct comm *comm), void *context) {
    return comm_threads_run_with(size, NULL, function, context);
}
