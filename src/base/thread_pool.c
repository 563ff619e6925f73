/* Invariants
 *  1. The upper half of `claim` is the number of the newest loop, the lower one its next task. Who takes a task by exchanging the
 *     whole word knows that what it read of the loop is that loop's: a loop does not end before the task is done.
 *  2. Before the owner writes what the next loop is, it closes the claim: no exchange with an older word succeeds any more. What
 *     belongs to a loop is stored with release and loaded with acquire, so that who saw a newer loop's sees the closed claim.
 *  3. The owner waits until all tasks are done, not until all threads have come.
 *  4. Who sleeps says so first and then looks once more; who changes what is slept upon changes it first and then looks for
 *     sleepers. All four are sequentially consistent: one of the two sees the other.
 */
#include "base/thread_pool.h"

#include "base/clock.h"
#include "base/memory.h"
#include "base/status.h"
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>

enum { THREADS_MOST = 4096, PAUSES = 64, LINE_BYTES = 128 };
static const uint64_t CLOSED = UINT32_MAX;
static const double PATIENCE_SECONDS = 200e-6; /* a thread that sleeps needs 20 to 50 to wake up */

typedef void (*task_function)(void *context, int64_t index);

struct thread_pool {
    /* Each of these lines is written by many threads. */
    _Alignas(LINE_BYTES) _Atomic uint64_t claim;
    _Alignas(LINE_BYTES) _Atomic int64_t done; /* tasks of the loop */
    /* The loop. */
    _Alignas(LINE_BYTES) _Atomic int64_t task_count;
    _Atomic(task_function) task;
    _Atomic(void *) context;
    _Atomic int thread_limit;
    _Atomic bool is_patient;
    /* Sleeping. */
    _Atomic int sleepers;
    _Atomic bool owner_sleeps, is_ending;
    pthread_mutex_t mutex;
    pthread_cond_t loop_begins, loop_ends;
    int thread_count; /* without the owner */
    pthread_t *threads;
};

static _Thread_local bool is_in_loop;
static _Thread_local int my_index;

bool thread_pool_in_loop(void) {
    return is_in_loop;
}

int thread_pool_index(void) {
    return my_index;
}

/* ---- waiting ------------------------------------------------------------------------------------------------------- */

static void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

struct patience {
    double until;
    int pauses;
};

/* False when it is time to sleep. */
static bool is_worth_spinning(const struct thread_pool *pool, struct patience *patience) {
    pause_briefly();
    if (++patience->pauses % PAUSES != 0)
        return true;
    double now = clock_seconds();
    if (patience->until == 0)
        patience->until = now + (atomic_load(&pool->is_patient) ? PATIENCE_SECONDS : 0);
    return now < patience->until;
}

static uint32_t newest_loop(struct thread_pool *pool) {
    return (uint32_t)(atomic_load(&pool->claim) >> 32);
}

/* Until there is a loop other than this one, or the end. */
static void wait_for_loop(struct thread_pool *pool, uint32_t seen) {
    struct patience patience = {0};
    while (newest_loop(pool) == seen && !atomic_load(&pool->is_ending))
        if (!is_worth_spinning(pool, &patience))
            break;
    if (newest_loop(pool) != seen)
        return;
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleepers, 1);
    while (newest_loop(pool) == seen && !atomic_load(&pool->is_ending))
        pthread_cond_wait(&pool->loop_begins, &pool->mutex);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
}

static void wait_for_tasks(struct thread_pool *pool, int64_t task_count) {
    struct patience patience = {0};
    while (atomic_load(&pool->done) < task_count)
        if (!is_worth_spinning(pool, &patience))
            break;
    if (atomic_load(&pool->done) == task_count)
        return;
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->owner_sleeps, true);
    while (atomic_load(&pool->done) < task_count)
        pthread_cond_wait(&pool->loop_ends, &pool->mutex);
    atomic_store(&pool->owner_sleeps, false);
    pthread_mutex_unlock(&pool->mutex);
}

static void wake(struct thread_pool *pool, pthread_cond_t *condition) {
    pthread_mutex_lock(&pool->mutex);
    pthread_cond_broadcast(condition);
    pthread_mutex_unlock(&pool->mutex);
}

/* ---- working ------------------------------------------------------------------------------------------------------- */

/* Takes tasks of the newest loop until there are none left; the number of that loop. */
static uint32_t run_tasks(struct thread_pool *pool) {
    for (;;) {
        uint64_t claim = atomic_load(&pool->claim);
        int64_t index = (int64_t)(claim & UINT32_MAX);
        int64_t task_count = atomic_load_explicit(&pool->task_count, memory_order_acquire);
        task_function task = atomic_load_explicit(&pool->task, memory_order_acquire);
        void *context = atomic_load_explicit(&pool->context, memory_order_acquire);
        int limit = atomic_load_explicit(&pool->thread_limit, memory_order_acquire);
        if (index >= task_count || my_index >= limit)
            return (uint32_t)(claim >> 32);
        if (!atomic_compare_exchange_weak(&pool->claim, &claim, claim + 1))
            continue;
        task(context, index);
        if (atomic_fetch_add(&pool->done, 1) + 1 == task_count && atomic_load(&pool->owner_sleeps))
            wake(pool, &pool->loop_ends);
    }
}

struct beginning {
    struct thread_pool *pool;
    int index;
};

static void *work(void *context) {
    struct beginning *beginning = context;
    struct thread_pool *pool = beginning->pool;
    my_index = beginning->index;
    is_in_loop = true; /* loops within its tasks are its own */
    free(beginning);
    while (!atomic_load(&pool->is_ending))
        wait_for_loop(pool, run_tasks(pool));
    return NULL;
}

/* False where the system has no thread left. Signals are for the threads that the program has without it. */
static bool start_thread(struct thread_pool *pool) {
    struct beginning *beginning = memory_must(1, sizeof *beginning);
    sigset_t all, before;
    *beginning = (struct beginning){pool, pool->thread_count + 1};
    sigfillset(&all);
    CHECK(pthread_sigmask(SIG_SETMASK, &all, &before) == 0);
    bool is_started = pthread_create(&pool->threads[pool->thread_count], NULL, work, beginning) == 0;
    if (is_started)
        pool->thread_count++;
    else
        free(beginning);
    CHECK(pthread_sigmask(SIG_SETMASK, &before, NULL) == 0);
    return is_started;
}

struct thread_pool *thread_pool_create(void) {
    struct thread_pool *pool = aligned_alloc(LINE_BYTES, sizeof *pool);
    CHECK(pool != NULL);
    *pool = (struct thread_pool){.thread_count = 0};
    CHECK(pthread_mutex_init(&pool->mutex, NULL) == 0);
    CHECK(pthread_cond_init(&pool->loop_begins, NULL) == 0 && pthread_cond_init(&pool->loop_ends, NULL) == 0);
    pool->threads = memory_must(THREADS_MOST, sizeof *pool->threads);
    return pool;
}

void thread_pool_destroy(struct thread_pool *pool) {
    if (!pool)
        return;
    atomic_store(&pool->is_ending, true);
    wake(pool, &pool->loop_begins);
    for (int i = 0; i < pool->thread_count; i++)
        pthread_join(pool->threads[i], NULL);
    pthread_mutex_destroy(&pool->mutex);
    pthread_cond_destroy(&pool->loop_begins);
    pthread_cond_destroy(&pool->loop_ends);
    free(pool->threads);
    free(pool);
}

void thread_pool_run(struct thread_pool *pool, int thread_count, bool is_patient, int64_t task_count,
                     void (*task)(void *context, int64_t index), void *context) {
    CHECK(task_count < (int64_t)CLOSED && thread_count <= THREADS_MOST && !is_in_loop);
    while (pool->thread_count < thread_count - 1 && start_thread(pool))
        ;
    uint64_t loop = newest_loop(pool);
    atomic_store(&pool->claim, loop << 32 | CLOSED);
    atomic_store(&pool->done, 0);
    atomic_store_explicit(&pool->task_count, task_count, memory_order_release);
    atomic_store_explicit(&pool->task, task, memory_order_release);
    atomic_store_explicit(&pool->context, context, memory_order_release);
    atomic_store_explicit(&pool->thread_limit, thread_count, memory_order_release);
    atomic_store_explicit(&pool->is_patient, is_patient, memory_order_release);
    atomic_store(&pool->claim, (loop + 1) << 32);
    if (atomic_load(&pool->sleepers) > 0)
        wake(pool, &pool->loop_begins);
    is_in_loop = true;
    run_tasks(pool);
    is_in_loop = false;
    wait_for_tasks(pool, task_count);
}
