#include "train/notices.h"

#include "base/memory.h"
#include <stdlib.h>

enum status notices_init(struct notices *n, struct comm *comm, int delay) {
    size_t slots = (size_t)delay + 1, islands = (size_t)comm->size;
    *n = (struct notices){.comm = comm, .delay = delay};
    TRY(memory_alloc(&n->sizes, 2 * islands, sizeof *n->sizes));
    TRY(memory_alloc(&n->told, slots * (1 + islands), sizeof *n->told));
    for (int m = 0; m < comm->size; m++) {
        n->sizes[m] = sizeof(uint32_t);
        n->sizes[comm->size + m] = m * (int64_t)sizeof(uint32_t);
    }
    return memory_alloc(&n->requests, slots, sizeof *n->requests);
}

static uint32_t *slot_of(const struct notices *n, int64_t exchange) {
    return n->told + exchange % (n->delay + 1) * (1 + n->comm->size);
}

static enum status wait_for(struct notices *n, int64_t exchange, uint32_t *known) {
    const uint32_t *all = slot_of(n, exchange) + 1;
    TRY(n->comm->ops->wait(n->comm, &n->requests[exchange % (n->delay + 1)]));
    for (int m = 0; m < n->comm->size; m++)
        *known |= all[m];
    return STATUS_OK;
}

enum status notices_exchange(struct notices *n, uint32_t flags, uint32_t *known) {
    uint32_t *slot = slot_of(n, n->count);
    struct comm_request *request = &n->requests[n->count % (n->delay + 1)];
    *known = 0;
    *slot = flags;
    TRY(n->comm->ops->all_gather(n->comm, slot, slot + 1, n->sizes, n->sizes + n->comm->size, request));
    n->count++;
    return n->count > n->delay ? wait_for(n, n->count - 1 - n->delay, known) : STATUS_OK;
}

enum status notices_drain(struct notices *n) {
    uint32_t forgotten = 0;
    for (int64_t i = n->count > n->delay ? n->count - n->delay : 0; i < n->count; i++)
        TRY(wait_for(n, i, &forgotten));
    n->count = 0;
    return STATUS_OK;
}

bool notices_are_under_way(const struct notices *n) {
    return n->delay > 0 && n->count > 0;
}

void notices_release(struct notices *n) {
    free(n->sizes);
    free(n->told);
    free(n->requests);
    *n = (struct notices){0};
}
