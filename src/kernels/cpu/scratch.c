#include "kernels/cpu/scratch.h"
#include "base/memory.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

enum { SCRATCH_GRAIN_BYTES = 1 << 16 };

struct scratch_block {
    void *data;
    size_t bytes;
};

struct scratch {
    struct scratch_block call, task;
};

static atomic_size_t held_bytes;
static pthread_once_t key_once = PTHREAD_ONCE_INIT;
static pthread_key_t key; /* not a _Thread_local: threads of a pool that shrinks must give theirs back */

static void block_release(struct scratch_block *block) {
    atomic_fetch_sub(&held_bytes, block->bytes);
    free(block->data);
    *block = (struct scratch_block){0};
}

static void scratch_destroy(void *memory) {
    struct scratch *scratch = memory;
    block_release(&scratch->call);
    block_release(&scratch->task);
    free(scratch);
}

/* The main thread's key destructor does not run: leaving main is not ending the thread. */
static void destroy_at_exit(void) {
    struct scratch *scratch = pthread_getspecific(key);
    if (scratch) {
        pthread_setspecific(key, NULL);
        scratch_destroy(scratch);
    }
}

static void key_create(void) {
    CHECK_OP(pthread_key_create(&key, scratch_destroy), ==, 0);
    atexit(destroy_at_exit);
}

static struct scratch *scratch_of_thread(void) {
    pthread_once(&key_once, key_create);
    struct scratch *scratch = pthread_getspecific(key);
    if (!scratch) {
        scratch = memory_must(1, sizeof *scratch);
        CHECK_OP(pthread_setspecific(key, scratch), ==, 0);
    }
    return scratch;
}

static void *block_at_least(struct scratch_block *block, size_t bytes) {
    if (bytes > block->bytes || !block->data) {
        size_t grown = (bytes / SCRATCH_GRAIN_BYTES + 1) * SCRATCH_GRAIN_BYTES;
        block_release(block);
        block->data = aligned_alloc(64, grown);
        CHECK(block->data != NULL);
        block->bytes = grown;
        atomic_fetch_add(&held_bytes, grown);
    }
    return block->data;
}

void *scratch_call(size_t bytes) {
    return block_at_least(&scratch_of_thread()->call, bytes);
}

void *scratch_task(size_t bytes) {
    return block_at_least(&scratch_of_thread()->task, bytes);
}

size_t scratch_bytes(void) {
    return atomic_load(&held_bytes);
}
