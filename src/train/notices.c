#include "train/notices.h"

#include "base/memory.h"
#include <stdlib.h>

enum status notices_init(struct notices *n, struct comm *comm, int64_t interval, int64_t delay) {
    size_t islands = (size_t)comm->size, slots = (size_t)(delay / interval + 1);
    *n = (struct notices){.comm = comm_host(comm), .interval = interval, .delay = delay, .slot_count = (int64_t)slots};
    TRY(memory_alloc(&n->sizes, 2 * islands, sizeof *n->sizes));
    TRY(memory_alloc(&n->flags, slots * (1 + islands), sizeof *n->flags));
    for (int m = 0; m < comm->size; m++) {
        n->sizes[m] = sizeof(uint32_t);
        n->sizes[comm->size + m] = m * (int64_t)sizeof(uint32_t);
    }
    return memory_alloc(&n->requests, slots, sizeof *n->requests);
}

static enum status tell(struct notices *n, int64_t step, uint32_t flags) {
    int64_t slot = n->told % n->slot_count;
    uint32_t *mine = n->flags + slot * (1 + n->comm->size);
    CHECK_OP(n->told - n->known, <, n->slot_count);
    *mine = flags;
    TRY(n->comm->ops->all_gather(n->comm, mine, mine + 1, n->sizes, n->sizes + n->comm->size, &n->requests[slot]));
    n->told++;
    n->last_step = step;
    return STATUS_OK;
}

/* Of the oldest exchange that has not ended. */
static int64_t oldest_step(const struct notices *n) {
    return n->last_step - (n->told - n->known - 1) * n->interval;
}

static enum status learn(struct notices *n, struct notice *notice) {
    int64_t slot = n->known % n->slot_count;
    const uint32_t *all = n->flags + slot * (1 + n->comm->size) + 1;
    *notice = (struct notice){.is_new = true, .told_step = oldest_step(n)};
    TRY(n->comm->ops->wait(n->comm, &n->requests[slot]));
    for (int m = 0; m < n->comm->size; m++)
        notice->flags |= all[m];
    n->known++;
    return STATUS_OK;
}

enum status notices_exchange(struct notices *n, int64_t step, uint32_t flags, struct notice *notice) {
    *notice = (struct notice){.is_new = false};
    if (step % n->interval == 0)
        TRY(tell(n, step, flags));
    return n->known < n->told && oldest_step(n) == step - n->delay ? learn(n, notice) : STATUS_OK;
}

enum status notices_drain(struct notices *n) {
    struct notice forgotten;
    while (n->known < n->told)
        TRY(learn(n, &forgotten));
    return STATUS_OK;
}

bool notices_are_under_way(const struct notices *n) {
    return n->known < n->told;
}

void notices_release(struct notices *n) {
    free(n->sizes);
    free(n->flags);
    free(n->requests);
    *n = (struct notices){0};
}
