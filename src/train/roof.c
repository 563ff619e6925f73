#include "train/roof.h"

#include "base/clock.h"
#include "base/threads.h"
#include <math.h>
#include <stdlib.h>

enum { ROUNDS = 20000, PASSES = 5 };

struct multiply_job {
    const struct kernel_ops *ops;
    enum dtype dtype;
    double seconds;
    double *rates; /* a thread */
};

static void multiply_task(void *context, int64_t index) {
    const struct multiply_job *job = context;
    double operations = 0, begin = clock_seconds(), now = begin;
    while (now - begin < job->seconds) {
        operations += job->ops->multiply_registers(job->dtype, ROUNDS);
        now = clock_seconds();
    }
    job->rates[index] = operations / (now - begin);
}

double roof_multiply(const struct kernel_ops *ops, enum dtype compute, double seconds) {
    int count = threads_count();
    double rates[count], best = 0;
    struct multiply_job job = {ops, compute, seconds / PASSES, rates};
    for (int pass = 0; pass < PASSES; pass++) { /* the best: what disturbs the measurement only lowers it */
        double sum = 0;
        parallel_for(count, multiply_task, &job);
        for (int i = 0; i < count; i++)
            sum += rates[i];
        best = fmax(best, sum);
    }
    return best;
}

enum status roof_bandwidth(const struct kernel_ops *ops, const struct device *device, size_t bytes,
                           struct roof_bandwidth *bandwidth) {
    int64_t count = (int64_t)(bytes / dtype_size(DTYPE_F32));
    struct arena arena;
    TRY(arena_init(&arena, device, 2 * bytes + 256));
    struct tensor a = tensor_1d(arena_take(&arena, bytes), DTYPE_F32, count);
    struct tensor b = tensor_1d(arena_take(&arena, bytes), DTYPE_F32, count);
    struct tensor sum = tensor_1d(arena_take(&arena, sizeof(double)), DTYPE_F64, 1);
    ops->fill(a, 0);
    ops->fill(b, 0);
    *bandwidth = (struct roof_bandwidth){0};
    for (int i = 0; i < PASSES; i++) {
        double begin = clock_seconds();
        ops->sum_squares(a, sum);
        double between = clock_seconds();
        ops->cast(a, b);
        double end = clock_seconds();
        bandwidth->read = fmax(bandwidth->read, (double)bytes / (between - begin));
        bandwidth->copy = fmax(bandwidth->copy, 2 * (double)bytes / (end - between));
    }
    arena_release(&arena);
    return STATUS_OK;
}
