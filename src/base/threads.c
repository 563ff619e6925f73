#include "base/threads.h"

#include <omp.h>
#include <sched.h>

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

void parallel_for(int64_t task_count, void (*task)(void *context, int64_t index), void *context) {
    int thread_count = threads_count();
    if (task_count <= 1 || thread_count == 1 || omp_in_parallel()) {
        for (int64_t i = 0; i < task_count; i++)
            task(context, i);
        return;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(thread_count)
    for (int64_t i = 0; i < task_count; i++)
        task(context, i);
}

int thread_index(void) {
    return omp_get_thread_num();
}
