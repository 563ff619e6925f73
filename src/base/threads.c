#include "base/threads.h"

#include <omp.h>
#include <sched.h>

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
    omp_set_dynamic(0);
    omp_set_max_active_levels(1);
    omp_set_num_threads(chosen_count);
}

int threads_count(void) {
    if (!chosen_count)
        threads_set_count(0);
    return chosen_count;
}

static void run_loop(int64_t task_count, void (*task)(void *context, int64_t index), void *context, int thread_count) {
    if (task_count <= 1 || thread_count == 1 || omp_in_parallel()) {
        for (int64_t i = 0; i < task_count; i++)
            task(context, i);
        return;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(thread_count)
    for (int64_t i = 0; i < task_count; i++)
        task(context, i);
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
    return omp_get_thread_num();
}
