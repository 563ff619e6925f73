#include "comm/on_device/on_device.h"

#include "base/memory.h"
#include "comm/on_device/ways.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void on_device_keep_own(struct comm *comm, const void *send, const int64_t *send_counts, const int64_t *send_offsets, void *recv,
                        const int64_t *recv_counts, const int64_t *recv_offsets) {
    const struct on_device *state = comm->state;
    struct on_device_piece own = on_device_piece_for(comm, comm->rank, send_counts, send_offsets);
    CHECK_OP(own.bytes, ==, recv_counts[comm->rank]);
    if (own.bytes > 0)
        state->memory.device->copy_within((char *)recv + recv_offsets[comm->rank], (const char *)send + own.offset,
                                          (size_t)own.bytes);
    for (int r = 0; r < comm->size; r++)
        if (r != comm->rank) {
            comm->count.sent_bytes += on_device_piece_for(comm, r, send_counts, send_offsets).bytes;
            comm->count.received_bytes += recv_counts[r];
        }
    comm->count.calls++;
}

enum status comm_on_device(struct comm *comm, struct comm_memory memory) {
    CHECK(!comm->host);
    if (!memory.device || memory.device == device_cpu())
        return STATUS_OK;
    return memory.way == COMM_WAY_NCCL ? on_device_nccl(comm, memory) : on_device_staged(comm, memory);
}

enum status on_device_all_gather(struct comm *comm, const void *send, void *recv, const int64_t *counts, const int64_t *offsets,
                                 struct comm_request *request) {
    const struct on_device *state = comm->state;
    return state->start(comm, send, counts, NULL, recv, counts, offsets, request);
}

enum status on_device_all_to_all(struct comm *comm, const void *send, const int64_t *send_counts, const int64_t *send_offsets,
                                 void *recv, const int64_t *recv_counts, const int64_t *recv_offsets,
                                 struct comm_request *request) {
    const struct on_device *state = comm->state;
    return state->start(comm, send, send_counts, send_offsets, recv, recv_counts, recv_offsets, request);
}

enum status on_device_split(struct comm *comm, int color, struct comm *part) {
    const struct on_device *state = comm->state;
    TRY(comm->host->ops->split(comm->host, color, part));
    enum status status = comm_on_device(part, state->memory);
    if (status != STATUS_OK)
        comm_release(part);
    return status;
}

/* ---- which way ------------------------------------------------------------------------------------------------------ */

/* What a rank tells the others. NCCL takes two ranks for two devices where its user says that they are on different hosts. */
struct facts {
    unsigned char device[DEVICE_ID_BYTES];
    char host[64];
    int32_t nccl_version; /* 0: none */
    char why_none[160];
};

static struct facts find_facts(const struct device *device) {
    struct facts facts = {.nccl_version = 0};
    const char *host = getenv("NCCL_HOSTID");
    int version;
    device_identify(device, facts.device);
    snprintf(facts.host, sizeof facts.host, "%s", host ? host : "");
    if (on_device_nccl_version(&version) == STATUS_OK)
        facts.nccl_version = version;
    else
        snprintf(facts.why_none, sizeof facts.why_none, "%s", status_text());
    return facts;
}

/* Releases of one major version speak to each other only where they are the same: bytes of its own pass between them. */
static bool can_use_nccl(const struct facts *all, int size, char *why, size_t bytes) {
    for (int r = 0; r < size; r++)
        if (all[r].nccl_version == 0) {
            snprintf(why, bytes, "rank %d: %s", r, all[r].why_none);
            return false;
        }
    for (int r = 1; r < size; r++) {
        if (all[r].nccl_version != all[0].nccl_version) {
            snprintf(why, bytes, "ranks 0 and %d have different NCCL, %d and %d", r, all[0].nccl_version, all[r].nccl_version);
            return false;
        }
        for (int q = 0; q < r; q++)
            if (memcmp(all[q].device, all[r].device, DEVICE_ID_BYTES) == 0 && strcmp(all[q].host, all[r].host) == 0) {
                snprintf(why, bytes, "ranks %d and %d share a device", q, r);
                return false;
            }
    }
    return true;
}

enum status comm_memory_choose(struct comm *world, const struct device *device, enum comm_wish wish, struct comm_memory *out,
                               char line[COMM_MEMORY_LINE_BYTES]) {
    struct facts mine = find_facts(device), *all;
    char why[200] = "as --run.transport says";
    TRY(comm_agree(world, memory_alloc(&all, (size_t)world->size, sizeof *all)));
    enum status status = comm_share(world, &mine, sizeof mine, all);
    bool can = status == STATUS_OK && wish != COMM_WISH_HOST && can_use_nccl(all, world->size, why, sizeof why);
    int version = status == STATUS_OK ? all[0].nccl_version : 0;
    free(all);
    TRY(status);
    if (wish == COMM_WISH_NCCL && !can)
        return status_fail(STATUS_USAGE, "--run.transport nccl cannot be: %s", why);
    *out = (struct comm_memory){device, can ? COMM_WAY_NCCL : COMM_WAY_HOST};
    if (can)
        snprintf(line, COMM_MEMORY_LINE_BYTES, "NCCL %d.%d.%d from device to device", version / 10000, version / 100 % 100,
                 version % 100);
    else
        snprintf(line, COMM_MEMORY_LINE_BYTES, "tensors pass through the processors' memory: %s", why);
    return STATUS_OK;
}
