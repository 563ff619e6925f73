/* What every transport must do: one list of cases, run over self, over threads and under mpirun, in the processor's memory and in
 * that of a device. A case is Collective; it returns a failure with a message where something is not as comm.h says. */
#pragma once

#include "base/memory.h"
#include "base/random.h"
#include "comm/comm.h"
#include "device/device.h"
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPECT(condition)                                                                                              \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            return status_fail(STATUS_NUMERIC, "%s:%d: rank %d of %d: %s does not hold", __FILE__, __LINE__, comm->rank, \
                               comm->size, #condition);                                                                \
    } while (0)

enum { CASE_RANKS_MAX = 16, CASE_UNDER_WAY = 5 };

static const struct device *case_device; /* where the buffers are; NULL: in the processor's memory */

/* An all_to_all of random counts, many of them zero: what rank `from` has for rank `to` follows from `seed` alone. The
 * pieces lie apart from each other, in an order of their own, and nothing between them may change. */
struct case_exchange {
    uint64_t seed;
    bool gather; /* all_gather: the same for every `to` */
    int64_t counts[4][CASE_RANKS_MAX];
    unsigned char *send, *recv;
    int64_t send_bytes, recv_bytes;
    void *device_send, *device_recv;
    struct comm_request request;
};

static int64_t case_bytes(const struct case_exchange *x, int from, int to, int64_t most) {
    uint64_t bits = random_bits(x->seed, 1, (uint64_t)(from * CASE_RANKS_MAX + (x->gather ? 0 : to)));
    return bits % 3 == 0 ? 0 : (int64_t)((bits >> 8) % (uint64_t)most);
}

static unsigned char case_byte(const struct case_exchange *x, int from, int to, int64_t at) {
    uint64_t word = x->seed * 0x9e3779b97f4a7c15u + (uint64_t)(from * 131 + (x->gather ? 0 : to) * 31 + at * 7);
    return (unsigned char)(word >> 3 ^ word >> 17);
}

enum { CASE_GAP = 3, CASE_UNTOUCHED = 0xa5 };

static enum status case_take(struct comm *comm, struct case_exchange *x, int64_t most) {
    int64_t send_bytes = 0, recv_bytes = CASE_GAP;
    for (int i = 0; i < comm->size; i++) {
        int r = comm->size - 1 - i; /* from the back, so that an offset is no running sum */
        x->counts[0][r] = case_bytes(x, comm->rank, r, most);
        x->counts[1][r] = x->gather ? 0 : send_bytes;
        x->counts[2][r] = case_bytes(x, r, comm->rank, most);
        x->counts[3][r] = recv_bytes;
        send_bytes = (x->gather ? 0 : send_bytes) + x->counts[0][r];
        recv_bytes += x->counts[2][r] + CASE_GAP;
    }
    TRY(memory_alloc(&x->send, (size_t)send_bytes + 1, 1));
    TRY(memory_alloc(&x->recv, (size_t)recv_bytes, 1));
    memset(x->recv, CASE_UNTOUCHED, (size_t)recv_bytes);
    x->send_bytes = send_bytes + 1;
    x->recv_bytes = recv_bytes;
    for (int to = 0; to < comm->size; to++)
        for (int64_t at = 0; at < x->counts[0][to]; at++)
            x->send[x->counts[1][to] + at] = case_byte(x, comm->rank, to, at);
    return STATUS_OK;
}

/* What the transport gets: the same bytes on the device, where there is one. */
static enum status case_put(struct case_exchange *x) {
    if (!case_device)
        return STATUS_OK;
    TRY(case_device->alloc(&x->device_send, (size_t)x->send_bytes));
    TRY(case_device->alloc(&x->device_recv, (size_t)x->recv_bytes));
    case_device->copy_from_host(x->device_send, x->send, (size_t)x->send_bytes);
    case_device->copy_from_host(x->device_recv, x->recv, (size_t)x->recv_bytes);
    return STATUS_OK;
}

static void case_get(struct case_exchange *x) {
    if (case_device)
        case_device->copy_to_host(x->recv, x->device_recv, (size_t)x->recv_bytes);
}

static void case_free(struct case_exchange *x) {
    if (x->device_send)
        case_device->release(x->device_send, (size_t)x->send_bytes);
    if (x->device_recv)
        case_device->release(x->device_recv, (size_t)x->recv_bytes);
    free(x->send);
    free(x->recv);
    x->send = NULL;
}

static enum status case_start(struct comm *comm, struct case_exchange *x, uint64_t seed, int64_t most) {
    memset(x, 0, sizeof *x);
    x->seed = seed;
    x->gather = random_bits(seed, 2, 0) % 2;
    TRY(case_take(comm, x, most));
    TRY(case_put(x));
    const void *send = case_device ? x->device_send : x->send;
    void *recv = case_device ? x->device_recv : x->recv;
    int64_t copy[4][CASE_RANKS_MAX]; /* the tables are read before the call returns */
    memcpy(copy, x->counts, sizeof copy);
    enum status status =
        x->gather ? comm->ops->all_gather(comm, send, recv, copy[2], copy[3], &x->request)
                  : comm->ops->all_to_all(comm, send, copy[0], copy[1], recv, copy[2], copy[3], &x->request);
    memset(copy, 0xff, sizeof copy);
    if (status != STATUS_OK)
        case_free(x);
    return status;
}

/* Wait for it, compare, and free; nothing for one that was not started. After a failure the buffers are freed too: they
 * are the caller's again. */
static enum status case_finish(struct comm *comm, struct case_exchange *x) {
    if (!x->send)
        return STATUS_OK;
    enum status status = comm->ops->wait(comm, &x->request);
    int64_t wrong = 0, covered = 0;
    case_get(x);
    for (int from = 0; from < comm->size && status == STATUS_OK; from++) {
        for (int64_t at = 0; at < x->counts[2][from]; at++)
            wrong += x->recv[x->counts[3][from] + at] != case_byte(x, from, comm->rank, at);
        for (int64_t at = 1; at <= CASE_GAP; at++)
            wrong += x->recv[x->counts[3][from] - at] != CASE_UNTOUCHED;
        covered += x->counts[2][from] + CASE_GAP;
    }
    bool cleared = x->request.ticket == 0;
    case_free(x);
    TRY(status);
    EXPECT(wrong == 0);
    EXPECT(covered + CASE_GAP == x->recv_bytes);
    EXPECT(cleared);
    return STATUS_OK;
}

/* One after the other, of several sizes. */
static enum status case_uneven(struct comm *comm) {
    static const int64_t most[] = {1, 2, 100, 5000, 70000, 1 << 20};
    struct case_exchange x;
    for (uint64_t seed = 0; seed < 60; seed++) {
        TRY(case_start(comm, &x, 1000 + seed, most[seed % 6]));
        TRY(case_finish(comm, &x));
    }
    return STATUS_OK;
}

/* Order in which a rank waits: its own, whatever the others do. */
static void case_shuffle(int *order, int count, uint64_t seed, int rank) {
    for (int i = 0; i < count; i++)
        order[i] = (int)random_permute(seed, (uint64_t)rank, (uint64_t)count, (uint64_t)i);
}

/* One exchange on each of `of`, all under way at once, ended in an order of each rank's own. All that were started are
 * ended, also after a failure. */
static enum status case_many(struct comm *const *of, int count, uint64_t seed, int64_t most) {
    struct case_exchange x[CASE_UNDER_WAY];
    int order[CASE_UNDER_WAY];
    enum status status = STATUS_OK;
    memset(x, 0, sizeof x);
    for (int i = 0; i < count && status == STATUS_OK; i++)
        status = case_start(of[i], &x[i], seed + (uint64_t)i, i % 2 ? 300 : most);
    case_shuffle(order, count, seed, of[0]->rank);
    for (int i = 0; i < count; i++) {
        enum status one = case_finish(of[order[i]], &x[order[i]]);
        status = status == STATUS_OK ? one : status;
    }
    return status;
}

static enum status case_out_of_order(struct comm *comm) {
    struct comm *of[CASE_UNDER_WAY] = {comm, comm, comm, comm, comm};
    for (uint64_t round = 0; round < 20; round++)
        TRY(case_many(of, CASE_UNDER_WAY, 5000 + 10 * round, 100000));
    return STATUS_OK;
}

/* Counts of bytes: to and from others only. */
static enum status case_counts(struct comm *comm) {
    struct case_exchange x;
    struct comm_count before = comm->count, expected = before;
    for (uint64_t seed = 0; seed < 8; seed++) {
        TRY(case_start(comm, &x, 9000 + seed, 1000));
        for (int r = 0; r < comm->size; r++) {
            expected.sent_bytes += r == comm->rank ? 0 : x.counts[0][r];
            expected.received_bytes += r == comm->rank ? 0 : x.counts[2][r];
        }
        TRY(case_finish(comm, &x));
    }
    EXPECT(comm->count.calls - before.calls == 8);
    EXPECT(comm->count.sent_bytes == expected.sent_bytes);
    EXPECT(comm->count.received_bytes == expected.received_bytes);
    return STATUS_OK;
}

/* A request that is none, and one after wait, which is none again. */
static enum status case_none(struct comm *comm) {
    struct comm_request none = {0};
    TRY(comm->ops->wait(comm, &none));
    struct case_exchange x;
    TRY(case_start(comm, &x, 1, 10));
    struct comm_request *request = &x.request;
    TRY(comm->ops->wait(comm, request));
    TRY(comm->ops->wait(comm, request));
    return case_finish(comm, &x);
}

/* Nothing for nobody, without buffers. */
static enum status case_all_zero(struct comm *comm) {
    int64_t zeros[CASE_RANKS_MAX] = {0};
    struct comm_request request;
    TRY(comm->ops->all_to_all(comm, NULL, zeros, zeros, NULL, zeros, zeros, &request));
    TRY(comm->ops->wait(comm, &request));
    TRY(comm->ops->all_gather(comm, NULL, NULL, zeros, zeros, &request));
    return comm->ops->wait(comm, &request);
}

/* Two ways to cut the ranks, a split of a split, and requests of all of them at once. */
static enum status case_split_and_run(struct comm *comm, struct comm parts[3]) {
    TRY(comm->ops->split(comm, comm->rank % 2, &parts[0]));
    EXPECT(parts[0].size == (comm->size + (comm->rank % 2 == 0)) / 2 && parts[0].rank == comm->rank / 2);
    TRY(comm->ops->split(comm, comm->rank < comm->size / 2 ? 7 : 0, &parts[1]));
    EXPECT(parts[1].rank == (comm->rank < comm->size / 2 ? comm->rank : comm->rank - comm->size / 2));
    TRY(parts[0].ops->split(&parts[0], parts[0].rank / 2, &parts[2]));
    struct comm *of[4] = {comm, &parts[0], &parts[1], &parts[2]};
    for (uint64_t round = 0; round < 10; round++)
        TRY(case_many(of, 4, 20000 + 10 * round, 20000));
    return STATUS_OK;
}

static enum status case_splits(struct comm *comm) {
    struct comm parts[3] = {{0}};
    enum status status = case_split_and_run(comm, parts);
    comm_release(&parts[2]);
    comm_release(&parts[1]);
    comm_release(&parts[0]);
    return status;
}

/* What comm.c makes of the two collectives. */
static enum status case_helpers(struct comm *comm) {
    int mine = 10 * comm->rank, all[CASE_RANKS_MAX];
    TRY(comm_share(comm, &mine, sizeof mine, all));
    for (int r = 0; r < comm->size; r++)
        EXPECT(all[r] == 10 * r);
    double values[2] = {comm->rank + 1, 0.5};
    TRY(comm_sum_f64(comm, values, 2));
    EXPECT(values[0] == comm->size * (comm->size + 1) / 2 && values[1] == 0.5 * comm->size);
    char word[8] = "";
    if (comm->rank == 0)
        strcpy(word, "zero");
    TRY(comm_broadcast(comm, word, sizeof word));
    EXPECT(strcmp(word, "zero") == 0);
    return STATUS_OK;
}

static enum status case_agree(struct comm *comm) {
    EXPECT(comm_agree(comm, STATUS_OK) == STATUS_OK);
    int last = comm->size - 1;
    enum status mine = comm->rank == last ? status_fail(STATUS_IO, "the disk is full") : STATUS_OK;
    EXPECT(comm_agree(comm, mine) == STATUS_IO);
    char expected[64];
    snprintf(expected, sizeof expected, "rank %d: the disk is full", last);
    EXPECT(strcmp(status_text(), comm->rank == last ? "the disk is full" : expected) == 0);
    mine = comm->rank ? status_fail(STATUS_MEMORY, "no memory") : status_fail(STATUS_NOT_FOUND, "no file");
    EXPECT(comm_agree(comm, mine) == (comm->size > 1 ? STATUS_MEMORY : STATUS_NOT_FOUND));
    return STATUS_OK;
}

struct comm_case {
    const char *name;
    enum status (*run)(struct comm *comm);
};

static const struct comm_case comm_cases[] = {
    {"uneven counts", case_uneven}, {"waits out of order", case_out_of_order}, {"counts of bytes", case_counts},
    {"no request", case_none},      {"nothing at all", case_all_zero},         {"splits", case_splits},
    {"helpers", case_helpers},      {"agreeing", case_agree},
};
enum { COMM_CASE_COUNT = sizeof comm_cases / sizeof *comm_cases };
