#include "kernels/cpu/slots.h"

#include "base/status.h"
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

struct buffers {
    void *data[SLOT_COUNT];
    size_t size[SLOT_COUNT];
    bool is_known; /* to the key, whose destructor frees the buffers of a thread that ends */
};

static _Thread_local struct buffers mine;
static atomic_size_t held;
static pthread_key_t key;
static pthread_once_t key_made = PTHREAD_ONCE_INIT;

static void release_buffers(void *context) {
    struct buffers *buffers = context;
    for (int i = 0; i < SLOT_COUNT; i++) {
        free(buffers->data[i]);
        atomic_fetch_sub(&held, buffers->size[i]);
        buffers->data[i] = NULL;
        buffers->size[i] = 0;
    }
}

static void make_key(void) {
    CHECK_OP(pthread_key_create(&key, release_buffers), ==, 0);
}

void *slot_take(enum slot slot, size_t bytes) {
    if (!mine.is_known) {
        pthread_once(&key_made, make_key);
        pthread_setspecific(key, &mine);
        mine.is_known = true;
    }
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
