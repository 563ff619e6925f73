/* Loops over threads, never nested. Who waits for a loop waits for its tasks, not for threads that get no processor.
 *
 * A task's result may depend on its index only, never on which thread ran it or on how many there are; whoever sums
 * over tasks does it in index order afterwards. That is what makes a run the same for any number of threads.
 */
#pragma once

#include <stdint.h>

/* Threads used from now on; 0 chooses the processors this process may run on. */
void threads_set_count(int count);
int threads_count(void);

/* Processors that this process may run on; at least 1. */
int threads_available(void);

/* Call task(context, i) for every i in 0..task_count-1, spread over the threads as they become free; returns when all
 * are done. Inside a task of a loop of several it runs the loop on the calling thread. */
void parallel_for(int64_t task_count, void (*task)(void *context, int64_t index), void *context);

/* The same for tasks that wait for a disk half of their time: with twice as many threads, up to 8, or as many as there are,
 * so that some of them compute while others wait. One thread stays one. */
void parallel_for_waiting(int64_t task_count, void (*task)(void *context, int64_t index), void *context);
int waiting_threads_count(void);

/* Index of the calling thread among those of the loop that it runs in, from 0 on: for scratch memory, never for results. */
int thread_index(void);
