/* Communicators are tags on one duplicate of MPI_COMM_WORLD: a split needs no call of MPI that could block on a rank that
 * is gone, and a release none at all. A new part gets the least tag that none of its members has used. */
#include "comm/mpi/comm_mpi.h"

#include "base/clock.h"
#include "base/memory.h"
#include "base/threads.h"
#include "comm/mpi/engine.h"
#include "comm/mpi/watch.h"
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const double FAREWELL_S = 5; /* how long a rank that failed waits for the others to fail too */
enum { FAREWELLS = 2 };            /* after the first one of them says how all failed, after the second they may exit */
enum { START_S = 600 };             /* how long ranks may take to find each other */
static const double AFTER_KILL_S = 0.1;
static const double LINGER_S = 0.5; /* how long one that lost another stays, so that the others see that one gone, not this */

/* This process among the others. */
struct site {
    struct engine engine;
    struct watch watch;
    struct peer *peers;
    bool watched;
    double limit_s; /* without a sign of life; 0: none */
    int farewell_count; /* of FAREWELLS; more than those after one to which the others did not come */
    struct comm farewell; /* of all ranks, with a tag of its own: who leaves alone must not meet what others still wait for */
};

/* A communicator: comm->state. */
struct end {
    struct engine *engine;
    int *world;         /* [size] rank in the world */
    struct link *links; /* [2 * size] to each rank, then from each */
    struct transfer *spare;
    int under_way;
};

static const struct comm_ops mpi_ops;

static enum status end_create(struct engine *engine, int tag, const int *world, int size, struct end **out) {
    struct end *end;
    TRY(memory_alloc(&end, 1, sizeof *end));
    enum status status = memory_alloc(&end->world, (size_t)size, sizeof *end->world);
    if (status == STATUS_OK)
        status = memory_alloc(&end->links, 2 * (size_t)size, sizeof *end->links);
    if (status != STATUS_OK) {
        free(end->world);
        free(end);
        return status;
    }
    end->engine = engine;
    for (int r = 0; r < size; r++) {
        end->world[r] = world ? world[r] : r;
        end->links[r] = (struct link){.world_rank = end->world[r], .tag = tag, .sends = true};
        end->links[size + r] = (struct link){.world_rank = end->world[r], .tag = tag};
    }
    *out = end;
    return STATUS_OK;
}

static enum status take_transfer(struct comm *comm, struct transfer **out) {
    struct end *end = comm->state;
    struct transfer *transfer = end->spare;
    if (transfer)
        end->spare = transfer->next;
    else
        TRY(memory_alloc(&transfer, 1, sizeof *transfer + 2 * (size_t)comm->size * sizeof *transfer->streams));
    transfer->stream_count = 0;
    *out = transfer;
    return STATUS_OK;
}

static void add_stream(struct transfer *transfer, struct link *link, const void *data, int64_t bytes) {
    if (bytes > 0)
        transfer->streams[transfer->stream_count++] =
            (struct stream){.link = link, .transfer = transfer, .data = (char *)data, .bytes = bytes};
}

/* send_offsets of NULL: send_counts[rank] bytes at `send` go to everybody. Receives are posted first, and each rank begins
 * with its right neighbour, so that not all send to one. */
static enum status start(struct comm *comm, const void *send, const int64_t *send_counts, const int64_t *send_offsets,
                         void *recv, const int64_t *recv_counts, const int64_t *recv_offsets,
                         struct comm_request *request) {
    struct end *end = comm->state;
    struct transfer *transfer;
    int size = comm->size, me = comm->rank;
    *request = (struct comm_request){0};
    CHECK_OP(send_counts[me], ==, recv_counts[me]);
    TRY(take_transfer(comm, &transfer));
    struct comm_count count = comm->count;
    for (int i = 1; i < size; i++) {
        int from = (me + size - i) % size;
        add_stream(transfer, &end->links[size + from], (char *)recv + recv_offsets[from], recv_counts[from]);
        count.received_bytes += recv_counts[from];
    }
    for (int i = 1; i < size; i++) {
        int to = (me + i) % size;
        int64_t bytes = send_counts[send_offsets ? to : me];
        add_stream(transfer, &end->links[to], (const char *)send + (send_offsets ? send_offsets[to] : 0), bytes);
        count.sent_bytes += bytes;
    }
    count.calls++;
    enum status status = engine_start(end->engine, transfer);
    if (status != STATUS_OK) {
        transfer->next = end->spare;
        end->spare = transfer;
        return status;
    }
    comm->count = count;
    end->under_way++;
    request->ticket = (int64_t)(intptr_t)transfer;
    if (send_counts[me])
        memcpy((char *)recv + recv_offsets[me], (const char *)send + (send_offsets ? send_offsets[me] : 0),
               (size_t)send_counts[me]);
    engine_started(end->engine);
    return STATUS_OK;
}

static enum status mpi_all_gather(struct comm *comm, const void *send, void *recv, const int64_t *counts,
                                  const int64_t *offsets, struct comm_request *request) {
    return start(comm, send, counts, NULL, recv, counts, offsets, request);
}

static enum status mpi_all_to_all(struct comm *comm, const void *send, const int64_t *send_counts,
                                  const int64_t *send_offsets, void *recv, const int64_t *recv_counts,
                                  const int64_t *recv_offsets, struct comm_request *request) {
    return start(comm, send, send_counts, send_offsets, recv, recv_counts, recv_offsets, request);
}

static enum status wait_until(struct comm *comm, struct comm_request *request, double deadline_s) {
    struct end *end = comm->state;
    struct transfer *transfer = (struct transfer *)(intptr_t)request->ticket;
    if (!transfer)
        return STATUS_OK;
    enum status status = engine_wait(end->engine, transfer, deadline_s);
    *request = (struct comm_request){0};
    end->under_way--;
    if (status == STATUS_OK) { /* after a failure the engine may still hold it */
        transfer->next = end->spare;
        end->spare = transfer;
    }
    return status;
}

static enum status mpi_wait(struct comm *comm, struct comm_request *request) {
    return wait_until(comm, request, 0);
}

struct split_vote {
    int color, next_tag;
};

static int find_part(const struct comm *comm, const struct split_vote *votes, int color, int *world, int *rank) {
    const struct end *end = comm->state;
    int size = 0;
    for (int r = 0; r < comm->size; r++) {
        if (r == comm->rank)
            *rank = size;
        if (votes[r].color == color)
            world[size++] = end->world[r];
    }
    return size;
}

static enum status mpi_split(struct comm *comm, int color, struct comm *part) {
    struct end *end = comm->state, *fresh = NULL;
    struct engine *engine = end->engine;
    struct comm_count count = comm->count;
    struct split_vote mine = {color, engine->next_tag}, *votes;
    int *world, rank = 0, tag = 0;
    *part = (struct comm){0};
    TRY(memory_alloc(&votes, (size_t)comm->size, sizeof *votes + sizeof *world));
    world = (int *)(votes + comm->size);
    enum status status = comm_share(comm, &mine, sizeof mine, votes);
    comm->count = count;
    for (int r = 0; r < comm->size && status == STATUS_OK; r++)
        tag = votes[r].next_tag > tag ? votes[r].next_tag : tag;
    if (status == STATUS_OK && tag > engine->tag_limit)
        status = status_fail(STATUS_USAGE, "more than %d communicators: this MPI has no more tags", engine->tag_limit);
    if (status == STATUS_OK) {
        engine->next_tag = tag + 1;
        int size = find_part(comm, votes, color, world, &rank);
        status = end_create(engine, tag, world, size, &fresh);
        if (status == STATUS_OK)
            *part = (struct comm){.ops = &mpi_ops, .rank = rank, .size = size, .state = fresh};
    }
    free(votes);
    return status;
}

static void mpi_release(struct comm *comm) {
    struct end *end = comm->state;
    CHECK(end->under_way == 0 || end->engine->broken);
    while (end->spare) {
        struct transfer *next = end->spare->next;
        free(end->spare);
        end->spare = next;
    }
    if (!end->engine->broken) { /* else pieces may still point to the links */
        free(end->links);
        free(end->world);
        free(end);
    }
}

static const struct comm_ops mpi_ops = {"mpi", mpi_all_gather, mpi_all_to_all, mpi_wait, mpi_split, mpi_release};

/* ---- joining and leaving ------------------------------------------------------------------------------------------------- */

static void describe_peer(void *context, int rank, char *text, size_t bytes) {
    const struct site *site = context;
    if (site->peers)
        peer_print(site->peers, rank, text, bytes);
    else
        snprintf(text, bytes, "rank %d", rank);
}

static void give_up_silent(void *context, const bool *ranks, const char *line) {
    watch_give_up(&((struct site *)context)->watch, ranks, line);
}

static void note_gone(void *context) {
    ((struct site *)context)->watch.told = true;
}

static void note_broken(void *context) {
    (void)context;
    watch_note_broken();
}

/* ---- where nobody watches: while the ranks find each other, and while they leave ---------------------------------------- */

static const char *alarm_line; /* NULL: another rank says it */

static void end_by_alarm(int signal_number) {
    (void)signal_number;
    if (alarm_line && write(2, alarm_line, strlen(alarm_line)) < 0)
        _exit(1);
    _exit(1);
}

/* The process ends unless that is called again within so many seconds; 0: it does not. */
static void set_alarm(double seconds, const char *line) {
    struct sigaction action = {.sa_handler = seconds > 0 ? end_by_alarm : SIG_DFL};
    alarm_line = line;
    sigaction(SIGALRM, &action, NULL);
    alarm((unsigned)ceil(seconds));
}

static void set_limit(struct site *site, double limit_s) {
    site->limit_s = site->watch.limit_s = limit_s;
    engine_set_limit(&site->engine, limit_s);
}

static void count_processors(const struct peer *peers, int size, struct comm_launch *out) {
    const struct peer *self = &peers[out->world.rank];
    double share = 0;
    out->local_rank = out->local_size = 0;
    for (int r = 0; r < size; r++)
        if (peers[r].host_id == self->host_id) {
            out->local_rank += r < out->world.rank;
            out->local_size++;
        }
    enum { BYTES = sizeof self->processors };
    for (int p = 0; p < 8 * BYTES; p++) {
        int users = 0;
        for (int r = 0; r < size && CPU_ISSET_S(p, BYTES, self->processors); r++)
            users += peers[r].host_id == self->host_id && CPU_ISSET_S(p, BYTES, peers[r].processors);
        share += users ? 1.0 / users : 0;
    }
    out->thread_count = share + 1e-6 >= 1 ? (int)(share + 1e-6) : 1;
}

static enum status open_mpi(int expected_size, const char *starter, struct engine *engine) {
    int provided, size;
    MPI_Comm world;
    if (MPI_Init_thread(NULL, NULL, MPI_THREAD_SERIALIZED, &provided) != MPI_SUCCESS)
        return status_fail(STATUS_PEER, "MPI does not start");
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (expected_size > 0 && size != expected_size) {
        char library[128];
        comm_mpi_library(library, sizeof library);
        return status_fail(STATUS_USAGE, "%s started %d processes, but MPI finds %d: the program is built with %s; use its "
                           "own mpirun", starter, expected_size, size, library);
    }
    if (provided < MPI_THREAD_SERIALIZED)
        return status_fail(STATUS_USAGE, "this MPI does not let two threads take turns (MPI_THREAD_SERIALIZED)");
    if (MPI_Comm_dup(MPI_COMM_WORLD, &world) != MPI_SUCCESS)
        return status_fail(STATUS_PEER, "MPI cannot duplicate its world");
    MPI_Comm_set_errhandler(world, MPI_ERRORS_RETURN);
    return engine_open(engine, world);
}

static enum status join(struct site *site, int expected_size, const char *starter, void (*lost)(const char *line),
                        struct comm_launch *out) {
    struct engine *engine = &site->engine;
    struct peer self, *peers;
    struct end *end;
    engine->describe = describe_peer;
    engine->silent = give_up_silent;
    engine->gone = note_gone;
    engine->broke = note_broken;
    engine->context = site;
    set_alarm(START_S, "cadre: the ranks did not all find each other within 600 s\n");
    TRY(open_mpi(expected_size, starter, engine));
    TRY(end_create(engine, engine->next_tag++, NULL, engine->size, &end));
    out->world = (struct comm){.ops = &mpi_ops, .rank = engine->rank, .size = engine->size, .state = end};
    TRY(end_create(engine, engine->next_tag++, NULL, engine->size, &end));
    site->farewell = (struct comm){.ops = &mpi_ops, .rank = engine->rank, .size = engine->size, .state = end};
    TRY(memory_alloc(&peers, (size_t)engine->size, sizeof *peers));
    peer_describe_self(&self);
    TRY(comm_share(&out->world, &self, sizeof self, peers));
    site->peers = peers;
    out->world.count = (struct comm_count){0};
    count_processors(peers, engine->size, out);
    TRY(watch_open(&site->watch, engine, peers, lost));
    site->watched = true;
    set_alarm(0, NULL);
    set_limit(site, COMM_LAUNCH_TIMEOUT_S);
    return STATUS_OK;
}

enum status comm_mpi_open(int expected_size, const char *starter, void (*lost)(const char *line), struct comm_launch *out) {
    struct site *site;
    TRY(memory_alloc(&site, 1, sizeof *site));
    enum status status = join(site, expected_size, starter, lost, out);
    out->state = site; /* also after a failure: a process that leaves without a word is what the others then see */
    return status;
}

void comm_mpi_set_timeout(struct comm_launch *launch, double limit_s) {
    set_limit(launch->state, limit_s);
}

/* One round of all: nobody goes on before all are here. */
static enum status meet(struct comm *world, enum status status) {
    struct comm_request request;
    int64_t *tables;
    char mine = 1, *all;
    size_t size = (size_t)world->size;
    TRY(memory_alloc(&tables, 2 * size, sizeof *tables));
    TRY(memory_alloc(&all, size, 1));
    for (int r = 0; r < world->size; r++) {
        tables[r] = 1;
        tables[size + (size_t)r] = r;
    }
    enum status left = world->ops->all_gather(world, &mine, all, tables, tables + size, &request);
    if (left == STATUS_OK)
        left = wait_until(world, &request, status == STATUS_OK ? 0 : clock_seconds() + FAREWELL_S);
    if (left == STATUS_OK)
        free(all); /* else MPI may still write there */
    free(tables);
    return left;
}

static void sleep_s(double seconds) {
    double whole = floor(seconds);
    struct timespec time = {.tv_sec = (time_t)whole, .tv_nsec = (long)(1e9 * (seconds - whole))};
    nanosleep(&time, NULL);
}

/* All have come: from now on nobody gives signs of life, and what is left takes no time. */
static void stop_watching_for_silence(struct site *site) {
    if (site->limit_s <= 0)
        return;
    engine_set_limit(&site->engine, 0);
    set_alarm(site->limit_s, site->engine.rank == 0 ? "cadre: another rank does not come to the end of the run\n" : NULL);
}

/* Take leave of all, so that nobody enters MPI_Finalize, which waits for all, before all can. */
static bool take_leave(struct site *site, int rounds, enum status status) {
    site->watch.leaving = true;
    while (site->farewell_count < rounds) {
        site->farewell_count = meet(&site->farewell, status) == STATUS_OK ? site->farewell_count + 1 : FAREWELLS + 1;
        if (site->farewell_count == 1)
            stop_watching_for_silence(site);
    }
    return site->farewell_count <= FAREWELLS;
}

bool comm_mpi_speaks(struct comm_launch *launch, enum status status) {
    struct site *site = launch->state;
    if (!launch->world.state || !site->watched)
        return status != STATUS_OK;
    if (status == STATUS_PEER) { /* an error of MPI may show before the watch sees why */
        if (!site->watch.told)
            sleep_s(LINGER_S);
        return !site->watch.told && !pulse_was_stopped(&site->engine.pulse);
    }
    char line[1024];
    snprintf(line, sizeof line, "%s", status_text());
    bool together = take_leave(site, 1, status);
    if (status != STATUS_OK && !together)
        status_fail(status, "%s", line); /* and not that the others did not come */
    return status != STATUS_OK && (launch->world.rank == 0 || !together);
}

void comm_mpi_close(struct comm_launch *launch, enum status status) {
    struct site *site = launch->state;
    if (!launch->world.state || !site->watched)
        return;
    if (!take_leave(site, FAREWELLS, status)) {
        if (site->watch.told)
            sleep_s(site->watch.silent ? WATCH_KILL_S + AFTER_KILL_S : LINGER_S);
        engine_leave(&site->engine, "this rank has left");
        return; /* MPI_Finalize would wait for ranks that do not come: the process ends without */
    }
    watch_close(&site->watch);
    engine_close(&site->engine);
    comm_release(&launch->world);
    comm_release(&site->farewell);
    MPI_Comm_free(&site->engine.world);
    MPI_Finalize();
    set_alarm(0, NULL);
    free(site->peers);
    free(site);
}

void comm_mpi_library(char *buffer, size_t bytes) {
    char text[MPI_MAX_LIBRARY_VERSION_STRING] = "";
    int length;
    MPI_Get_library_version(text, &length);
    if (strncmp(text, "MPICH Version:", 14) == 0)
        memmove(text + 5, text + 14, strlen(text + 14) + 1);
    for (char *c = text; *c; c++)
        *c = *c == '\t' ? ' ' : *c;
    snprintf(buffer, bytes, "%.*s", (int)strcspn(text, ",\n"), text);
}

/* ---- for measuring --------------------------------------------------------------------------------------------------------- */

static void narrow(const int64_t *from, int *to, int size) {
    for (int r = 0; r < size; r++) {
        CHECK(from[r] <= INT_MAX);
        to[r] = (int)from[r];
    }
}

enum status comm_mpi_bare(struct comm_launch *launch, const void *send, const int64_t *send_counts,
                          const int64_t *send_offsets, void *recv, const int64_t *recv_counts,
                          const int64_t *recv_offsets) {
    struct engine *engine = &((struct site *)launch->state)->engine;
    int *tables, size = engine->size, code;
    TRY(memory_alloc(&tables, 4 * (size_t)size, sizeof *tables));
    narrow(send_counts, tables, size);
    narrow(recv_counts, tables + 2 * size, size);
    narrow(recv_offsets, tables + 3 * size, size);
    if (send_offsets)
        narrow(send_offsets, tables + size, size);
    pthread_mutex_lock(&engine->drive);
    if (send_offsets)
        code = MPI_Alltoallv(send, tables, tables + size, MPI_BYTE, recv, tables + 2 * size, tables + 3 * size, MPI_BYTE,
                             engine->world);
    else
        code = MPI_Allgatherv(send, tables[engine->rank], MPI_BYTE, recv, tables + 2 * size, tables + 3 * size, MPI_BYTE,
                              engine->world);
    pthread_mutex_unlock(&engine->drive);
    free(tables);
    return code == MPI_SUCCESS ? STATUS_OK : status_fail(STATUS_PEER, "MPI's own collective failed");
}
