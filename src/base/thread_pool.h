/* Threads that share loops with the one that owns them. For base/threads.c; everybody else calls parallel_for. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

struct thread_pool;

/* A pool without threads yet; never fails (memory_must). The thread that makes it owns it and is the only one that runs loops. */
struct thread_pool *thread_pool_create(void);
void thread_pool_destroy(struct thread_pool *pool);

/* Call task(context, i) for every i in 0..task_count-1 on up to thread_count threads, the owner among them; those that do not exist
 * yet are started, and where the system has none left there are fewer. Returns when all tasks are done. It waits for tasks only: a
 * thread that gets no processor takes none, and holds nobody up. `is_patient`: who waits spins a while before it sleeps; for
 * threads that have a processor each. */
void thread_pool_run(struct thread_pool *pool, int thread_count, bool is_patient, int64_t task_count,
                     void (*task)(void *context, int64_t index), void *context);

/* Whether the calling thread is in a loop, and its index among the threads of that loop: 0 for the owner, and outside. */
bool thread_pool_in_loop(void);
int thread_pool_index(void);
