#include "base/threads.h"

#include "base/memory.h"
#include "base/status.h"
#include "base/thread_pool.h"
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

enum { WAITING_THREADS_MOST = 8, PROCESSORS_MOST = 8192 };

static int chosen_count;

int threads_available(void) {
    cpu_set_t set[PROCESSORS_MOST / CPU_SETSIZE]; /* a system that knows more processors than a set has does not fill it */
    int count = sched_getaffinity(0, sizeof set, set) == 0 ? CPU_COUNT_S(sizeof set, set) : 0;
    return count > 0 ? count : 1;
}

void threads_set_count(int count) {
    chosen_count = count > 0 ? count : threads_available();
}

int threads_count(void) {
    if (!chosen_count)
        threads_set_count(0);
    return chosen_count;
}

/* Threads that run loops have pools of their own, which end with them: a save is hashed by one while another trains. A pool has no
 * more threads than its loops: one that sleeps would be woken by each loop, only to find that it is not wanted. */
enum loop_kind { LOOPS_THAT_COMPUTE, LOOPS_THAT_WAIT, LOOP_KINDS };
struct pools {
    struct thread_pool *pool[LOOP_KINDS];
    int thread_count[LOOP_KINDS];
};
static pthread_key_t pools_of_thread;
static pthread_once_t key_once = PTHREAD_ONCE_INIT;

static void release_pools(void *context) {
    struct pools *pools = context;
    for (int kind = 0; kind < LOOP_KINDS; kind++)
        thread_pool_destroy(pools->pool[kind]);
    free(pools);
}

/* Who ends the program ends its threads, which give back what they hold: a key's destructor does not run for the main thread, and
 * what other threads alone point to looks lost to who counts memory at the very end. */
static void release_at_exit(void) {
    struct pools *pools = pthread_getspecific(pools_of_thread);
    if (pools) {
        pthread_setspecific(pools_of_thread, NULL);
        release_pools(pools);
    }
}

static void make_key(void) {
    CHECK(pthread_key_create(&pools_of_thread, release_pools) == 0);
    atexit(release_at_exit);
}

static struct thread_pool *my_pool(enum loop_kind kind, int thread_count) {
    pthread_once(&key_once, make_key);
    struct pools *pools = pthread_getspecific(pools_of_thread);
    if (!pools) {
        pools = memory_must(1, sizeof *pools);
        *pools = (struct pools){0};
        CHECK(pthread_setspecific(pools_of_thread, pools) == 0);
    }
    if (pools->thread_count[kind] > thread_count) {
        thread_pool_destroy(pools->pool[kind]);
        pools->pool[kind] = NULL;
    }
    if (!pools->pool[kind])
        pools->pool[kind] = thread_pool_create();
    pools->thread_count[kind] = thread_count;
    return pools->pool[kind];
}

static void run_loop(enum loop_kind kind, int64_t task_count, void (*task)(void *context, int64_t index), void *context,
                     int thread_count) {
    static _Atomic int processors;
    if (task_count <= 1 || thread_count == 1 || thread_pool_in_loop()) {
        for (int64_t i = 0; i < task_count; i++)
            task(context, i);
        return;
    }
    if (!processors)
        processors = threads_available();
    thread_pool_run(my_pool(kind, thread_count), thread_count, thread_count <= processors, task_count, task, context);
}

void parallel_for(int64_t task_count, void (*task)(void *context, int64_t index), void *context) {
    run_loop(LOOPS_THAT_COMPUTE, task_count, task, context, threads_count());
}

int waiting_threads_count(void) {
    int count = threads_count();
    if (count == 1 || count >= WAITING_THREADS_MOST)
        return count;
    return 2 * count < WAITING_THREADS_MOST ? 2 * count : WAITING_THREADS_MOST;
}

void parallel_for_waiting(int64_t task_count, void (*task)(void *context, int64_t index), void *context) {
    run_loop(LOOPS_THAT_WAIT, task_count, task, context, waiting_threads_count());
}

int thread_index(void) {
    return thread_pool_index();
}
