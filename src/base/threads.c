#include "base/threads.h"

#include "base/status.h"
#include "base/thread_pool.h"
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

enum { WAITING_THREADS_MOST = 8 };

static int chosen_count;

int threads_available(void) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0)
        return CPU_COUNT(&set);
    return 1;
}

void threads_set_count(int count) {
    chosen_count = count > 0 ? count : threads_available();
}

int threads_count(void) {
    if (!chosen_count)
        threads_set_count(0);
    return chosen_count;
}

/* Threads that run loops have a pool each: a save is hashed by one while another trains. It ends with its thread. */
static pthread_key_t pool_of_thread;
static pthread_once_t key_once = PTHREAD_ONCE_INIT;

static void release_pool(void *pool) {
    thread_pool_destroy(pool);
}

static void make_key(void) {
    CHECK(pthread_key_create(&pool_of_thread, release_pool) == 0);
}

static struct thread_pool *my_pool(void) {
    pthread_once(&key_once, make_key);
    struct thread_pool *pool = pthread_getspecific(pool_of_thread);
    if (!pool) {
        pool = thread_pool_create();
        CHECK(pthread_setspecific(pool_of_thread, pool) == 0);
    }
    return pool;
}

static void run_loop(int64_t task_count, void (*task)(void *context, int64_t index), void *context, int thread_count) {
    static _Atomic int processors;
    if (task_count <= 1 || thread_count == 1 || thread_pool_in_loop()) {
        for (int64_t i = 0; i < task_count; i++)
            task(context, i);
        return;
    }
    if (!processors)
        processors = threads_available();
    thread_pool_run(my_pool(), thread_count, thread_count <= processors, task_count, task, context);
}

void parallel_for(int64_t task_count, void (*task)(void *context, int64_t index), void *context) {
    run_loop(task_count, task, context, threads_count());
}

int waiting_threads_count(void) {
    int count = threads_count();
    if (count == 1 || count >= WAITING_THREADS_MOST)
        return count;
    return 2 * count < WAITING_THREADS_MOST ? 2 * count : WAITING_THREADS_MOST;
}

void parallel_for_waiting(int64_t task_count, void (*task)(void *context, int64_t index), void *context) {
    run_loop(task_count, task, context, waiting_threads_count());
}

int thread_index(void) {
    return thread_pool_index();
}
