/* Through the processor's memory. Invariants:
 *  1. A hop is one transfer under way, or spare. It holds what is sent and what arrives, packed by rank, in memory that copies are
 *     fast with; it grows to the largest transfer it has had.
 *  2. What a rank keeps for itself never leaves its device.
 *  3. The transport below counts nothing of it: comm->count does, as for every other way.
 */
#include "comm/on_device/ways.h"

#include "base/memory.h"
#include <stdbool.h>
#include <stdlib.h>

struct hop {
    struct hop *next;
    char *send, *recv;
    int64_t send_room, recv_room;
    char *to;                                                                   /* on the device */
    int64_t *send_counts, *send_offsets, *recv_counts, *recv_offsets, *to_offsets; /* [size] each */
    struct comm_request request;
};

struct staged {
    struct on_device base;
    struct hop *spare;
    int under_way;
    bool broken; /* a rank is gone: what is under way may never end */
};

static enum status grow(const struct device *device, char **data, int64_t *room, int64_t bytes) {
    void *fresh;
    if (bytes <= *room)
        return STATUS_OK;
    bytes += bytes / 8; /* so that it seldom grows again */
    TRY(device->alloc_host(&fresh, (size_t)bytes));
    if (*data)
        device->release_host(*data, (size_t)*room);
    *data = fresh;
    *room = bytes;
    return STATUS_OK;
}

static enum status take_hop(struct staged *s, int size, struct hop **out) {
    struct hop *hop = s->spare;
    if (hop) {
        s->spare = hop->next;
    } else {
        TRY(memory_alloc(&hop, 1, sizeof *hop + 5 * (size_t)size * sizeof(int64_t)));
        *hop = (struct hop){.send_counts = (int64_t *)(hop + 1)};
        hop->send_offsets = hop->send_counts + size;
        hop->recv_counts = hop->send_offsets + size;
        hop->recv_offsets = hop->recv_counts + size;
        hop->to_offsets = hop->recv_offsets + size;
    }
    *out = hop;
    return STATUS_OK;
}

static void put_back(struct staged *s, struct hop *hop) {
    hop->next = s->spare;
    s->spare = hop;
}

/* Bytes that lie one after the other on the device, as they always do in the hop, so that one copy takes them. */
struct stretch {
    int64_t device_offset, host_offset, bytes;
};

static bool extends(struct stretch *s, int64_t device_offset, int64_t host_offset, int64_t bytes) {
    if (s->bytes > 0 && device_offset != s->device_offset + s->bytes)
        return false;
    if (s->bytes == 0)
        *s = (struct stretch){device_offset, host_offset, 0};
    s->bytes += bytes;
    return true;
}

static void copy_out(const struct device *device, struct hop *hop, const char *send, const struct stretch *s) {
    if (s->bytes > 0)
        device->copy_to_host(hop->send + s->host_offset, send + s->device_offset, (size_t)s->bytes);
}

static void copy_in(const struct device *device, const struct hop *hop, const struct stretch *s) {
    if (s->bytes > 0)
        device->copy_from_host(hop->to + s->device_offset, hop->recv + s->host_offset, (size_t)s->bytes);
}

/* The place among what is sent, where another rank gets the same bytes; -1: none does. */
static int64_t place_of_same(const struct hop *hop, const int64_t *from_offsets, int rank, int64_t offset) {
    for (int r = 0; r < rank; r++)
        if (hop->send_counts[r] == hop->send_counts[rank] && from_offsets[r] == offset)
            return hop->send_offsets[r];
    return -1;
}

/* Where each rank's bytes lie in the hop; room for them. from_offsets [size]: where on the device. */
static enum status lay_out(const struct comm *comm, struct hop *hop, const int64_t *send_counts, const int64_t *send_offsets,
                           const int64_t *recv_counts, const int64_t *recv_offsets) {
    const struct device *device = ((const struct staged *)comm->state)->base.memory.device;
    int64_t sent = 0, received = 0, *from_offsets = hop->to_offsets; /* lent until the others are known */
    for (int r = 0; r < comm->size; r++) {
        struct on_device_piece piece = on_device_piece_for(comm, r, send_counts, send_offsets);
        hop->send_counts[r] = r == comm->rank ? 0 : piece.bytes;
        from_offsets[r] = piece.offset;
        int64_t same = place_of_same(hop, from_offsets, r, piece.offset);
        hop->send_offsets[r] = same >= 0 ? same : sent;
        sent += same >= 0 ? 0 : hop->send_counts[r];
        hop->recv_counts[r] = r == comm->rank ? 0 : recv_counts[r];
        hop->recv_offsets[r] = received;
        received += hop->recv_counts[r];
    }
    for (int r = 0; r < comm->size; r++)
        hop->to_offsets[r] = recv_offsets[r];
    TRY(grow(device, &hop->send, &hop->send_room, sent));
    return grow(device, &hop->recv, &hop->recv_room, received);
}

static void pack(const struct comm *comm, struct hop *hop, const char *send, const int64_t *send_counts,
                 const int64_t *send_offsets) {
    const struct device *device = ((const struct staged *)comm->state)->base.memory.device;
    struct stretch stretch = {0};
    int64_t packed = 0;
    for (int r = 0; r < comm->size; r++) {
        struct on_device_piece piece = on_device_piece_for(comm, r, send_counts, send_offsets);
        int64_t at = hop->send_offsets[r];
        if (hop->send_counts[r] == 0 || at < packed) /* nothing, or there already */
            continue;
        packed = at + piece.bytes;
        if (!extends(&stretch, piece.offset, at, piece.bytes)) {
            copy_out(device, hop, send, &stretch);
            stretch = (struct stretch){piece.offset, at, piece.bytes};
        }
    }
    copy_out(device, hop, send, &stretch);
}

static void unpack(const struct comm *comm, const struct hop *hop) {
    const struct device *device = ((const struct staged *)comm->state)->base.memory.device;
    struct stretch stretch = {0};
    for (int r = 0; r < comm->size; r++) {
        int64_t bytes = hop->recv_counts[r];
        if (bytes > 0 && !extends(&stretch, hop->to_offsets[r], hop->recv_offsets[r], bytes)) {
            copy_in(device, hop, &stretch);
            stretch = (struct stretch){hop->to_offsets[r], hop->recv_offsets[r], bytes};
        }
    }
    copy_in(device, hop, &stretch);
}

static enum status start(struct comm *comm, const void *send, const int64_t *send_counts, const int64_t *send_offsets, void *recv,
                         const int64_t *recv_counts, const int64_t *recv_offsets, struct comm_request *request) {
    struct staged *s = comm->state;
    struct comm *host = comm->host;
    struct hop *hop;
    *request = (struct comm_request){0};
    TRY(take_hop(s, comm->size, &hop));
    enum status status = lay_out(comm, hop, send_counts, send_offsets, recv_counts, recv_offsets);
    if (status == STATUS_OK) {
        struct comm_count count = host->count;
        pack(comm, hop, send, send_counts, send_offsets);
        status = host->ops->all_to_all(host, hop->send, hop->send_counts, hop->send_offsets, hop->recv, hop->recv_counts,
                                       hop->recv_offsets, &hop->request);
        host->count = count;
    }
    if (status != STATUS_OK) {
        s->broken = s->broken || status == STATUS_PEER;
        put_back(s, hop);
        return status;
    }
    on_device_keep_own(comm, send, send_counts, send_offsets, recv, recv_counts, recv_offsets);
    hop->to = recv;
    s->under_way++;
    request->ticket = (int64_t)(intptr_t)hop;
    return STATUS_OK;
}

static enum status staged_wait(struct comm *comm, struct comm_request *request) {
    struct staged *s = comm->state;
    struct hop *hop = (struct hop *)(intptr_t)request->ticket;
    if (!hop)
        return STATUS_OK;
    *request = (struct comm_request){0};
    enum status status = comm->host->ops->wait(comm->host, &hop->request);
    if (status == STATUS_OK)
        unpack(comm, hop);
    else
        s->broken = true;
    s->under_way--;
    put_back(s, hop);
    return status;
}

static void staged_release(struct comm *comm) {
    struct staged *s = comm->state;
    CHECK(s->under_way == 0 || s->broken);
    while (s->spare) {
        struct hop *hop = s->spare;
        s->spare = hop->next;
        if (hop->send)
            s->base.memory.device->release_host(hop->send, (size_t)hop->send_room);
        if (hop->recv)
            s->base.memory.device->release_host(hop->recv, (size_t)hop->recv_room);
        free(hop);
    }
    comm_release(&s->base.host);
    free(s);
}

static const struct comm_ops staged_ops = {"through the host", on_device_all_gather, on_device_all_to_all,
                                           staged_wait,        on_device_split,      staged_release};

enum status on_device_staged(struct comm *comm, struct comm_memory memory) {
    struct staged *s;
    TRY(memory_alloc(&s, 1, sizeof *s));
    *s = (struct staged){.base = {memory, start, *comm}};
    *comm = (struct comm){.ops = &staged_ops, .rank = comm->rank, .size = comm->size, .state = s, .host = &s->base.host};
    return STATUS_OK;
}
