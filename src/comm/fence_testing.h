/* A device for tests whose memory is the processor's, so that any kernels work on it, but fenced: what is no memory of it may not
 * be given as such, and the communicators of a fenced world take none of it. What would fault on a device fails a CHECK here. */
#pragma once

#include "base/memory.h"
#include "comm/comm.h"
#include "device/device.h"
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { FENCE_PIECES_MAX = 4096 };

static struct {
    pthread_mutex_t mutex;
    struct {
        const char *begin, *end;
    } pieces[FENCE_PIECES_MAX];
    int count;
} fence = {.mutex = PTHREAD_MUTEX_INITIALIZER};

/* Whether all, or any, of these bytes are the device's. */
static bool fence_holds(const void *data, size_t bytes, bool all) {
    const char *begin = data, *end = begin + bytes;
    bool found = false;
    pthread_mutex_lock(&fence.mutex);
    for (int i = 0; i < fence.count && !found; i++)
        found = all ? begin >= fence.pieces[i].begin && end <= fence.pieces[i].end
                    : begin < fence.pieces[i].end && end > fence.pieces[i].begin;
    pthread_mutex_unlock(&fence.mutex);
    return found;
}

static void fence_check_device(const void *data, size_t bytes) {
    CHECK(bytes == 0 || fence_holds(data, bytes, true));
}

static void fence_check_host(const void *data, size_t bytes) {
    CHECK(bytes == 0 || !fence_holds(data, bytes, false));
}

static enum status fence_alloc(void **out, size_t bytes) {
    TRY(device_cpu()->alloc(out, bytes));
    pthread_mutex_lock(&fence.mutex);
    CHECK_OP(fence.count, <, FENCE_PIECES_MAX);
    fence.pieces[fence.count].begin = *out;
    fence.pieces[fence.count++].end = (const char *)*out + bytes;
    pthread_mutex_unlock(&fence.mutex);
    return STATUS_OK;
}

static void fence_release(void *data, size_t bytes) {
    if (!data)
        return;
    pthread_mutex_lock(&fence.mutex);
    int at = 0;
    while (at < fence.count && fence.pieces[at].begin != data)
        at++;
    CHECK_OP(at, <, fence.count);
    fence.pieces[at] = fence.pieces[--fence.count];
    pthread_mutex_unlock(&fence.mutex);
    device_cpu()->release(data, bytes);
}

static void fence_copy_to_host(void *host, const void *data, size_t bytes) {
    fence_check_device(data, bytes);
    fence_check_host(host, bytes);
    memcpy(host, data, bytes);
}

static void fence_copy_from_host(void *data, const void *host, size_t bytes) {
    fence_check_device(data, bytes);
    fence_check_host(host, bytes);
    memcpy(data, host, bytes);
}

static void fence_copy_within(void *to, const void *from, size_t bytes) {
    fence_check_device(to, bytes);
    fence_check_device(from, bytes);
    memcpy(to, from, bytes);
}

static const struct device *fenced_device(void) {
    static struct device fenced;
    pthread_mutex_lock(&fence.mutex);
    if (!fenced.name) {
        fenced = *device_cpu();
        fenced.alloc = fence_alloc;
        fenced.release = fence_release;
        fenced.copy_to_host = fence_copy_to_host;
        fenced.copy_from_host = fence_copy_from_host;
        fenced.copy_from_host_later = fence_copy_from_host;
        fenced.copy_within = fence_copy_within;
        fenced.name = "fenced";
    }
    pthread_mutex_unlock(&fence.mutex);
    return &fenced;
}

/* ---- communicators that take the processor's memory only ------------------------------------------------------------------- */

static struct comm fenced_comm(struct comm inner);

static void fence_count(struct comm *comm, struct comm_count before) {
    const struct comm *inner = comm->state;
    comm->count.sent_bytes += inner->count.sent_bytes - before.sent_bytes;
    comm->count.received_bytes += inner->count.received_bytes - before.received_bytes;
    comm->count.calls += inner->count.calls - before.calls;
}

static enum status fenced_all_gather(struct comm *comm, const void *send, void *recv, const int64_t *counts, const int64_t *offsets,
                                     struct comm_request *request) {
    struct comm *inner = comm->state;
    fence_check_host(send, (size_t)counts[comm->rank]);
    for (int r = 0; r < comm->size; r++)
        fence_check_host((char *)recv + offsets[r], (size_t)counts[r]);
    struct comm_count before = inner->count;
    enum status status = inner->ops->all_gather(inner, send, recv, counts, offsets, request);
    fence_count(comm, before);
    return status;
}

static enum status fenced_all_to_all(struct comm *comm, const void *send, const int64_t *send_counts, const int64_t *send_offsets,
                                     void *recv, const int64_t *recv_counts, const int64_t *recv_offsets,
                                     struct comm_request *request) {
    struct comm *inner = comm->state;
    for (int r = 0; r < comm->size; r++) {
        fence_check_host((const char *)send + send_offsets[r], (size_t)send_counts[r]);
        fence_check_host((char *)recv + recv_offsets[r], (size_t)recv_counts[r]);
    }
    struct comm_count before = inner->count;
    enum status status = inner->ops->all_to_all(inner, send, send_counts, send_offsets, recv, recv_counts, recv_offsets, request);
    fence_count(comm, before);
    return status;
}

static enum status fenced_wait(struct comm *comm, struct comm_request *request) {
    struct comm *inner = comm->state;
    return inner->ops->wait(inner, request);
}

static enum status fenced_split(struct comm *comm, int color, struct comm *part) {
    struct comm *inner = comm->state, fresh;
    TRY(inner->ops->split(inner, color, &fresh));
    *part = fenced_comm(fresh);
    return STATUS_OK;
}

static void fenced_release(struct comm *comm) {
    comm_release(comm->state);
    free(comm->state);
}

/* Takes the communicator over. */
static struct comm fenced_comm(struct comm inner) {
    static const struct comm_ops ops = {"fenced", fenced_all_gather, fenced_all_to_all, fenced_wait, fenced_split, fenced_release};
    struct comm *kept;
    if (memory_alloc(&kept, 1, sizeof *kept) != STATUS_OK)
        abort();
    *kept = inner;
    return (struct comm){.ops = &ops, .rank = inner.rank, .size = inner.size, .state = kept};
}

/* So that NCCL is the model of it that stands beside the tests (tests/nccl). Before the first use. */
static inline void use_model_of_nccl(void) {
    setenv("CADRE_NCCL", CADRE_NCCL_MODEL, 1);
}
