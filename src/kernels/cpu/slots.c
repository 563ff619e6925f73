#include "kernels/cpu/slots.h"

#include "base/status.h"
#include <stdatomic.h>
#include <stdlib.h>

struct buffers {
    void *data[SLOT_COUNT];
    size_t size[SLOT_COUNT];
};

static _Thread_local struct buffers mine;
static atomic_size_t held;

void *slot_take(enum slot slot, size_t bytes) {
    if (bytes > mine.size[slot]) {
        size_t size = (bytes + 4095) / 4096 * 4096;
        free(mine.data[slot]);
        mine.data[slot] = aligned_alloc(64, size);
        CHECK(mine.data[slot] != NULL);
        atomic_fetch_add(&held, size - mine.size[slot]);
        mine.size[slot] = size;
    }
    return mine.data[slot];
}

size_t slots_held_bytes(void) {
    return atomic_load(&held);
}
