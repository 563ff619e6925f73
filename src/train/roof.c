#include "train/roof.h"

#include "base/clock.h"
#include "base/threads.h"
#include <math.h>
#include <stdlib.h>

enum { ROUNDS = 20000, PASSES = 5 };
enum { DEVICE_WARM_ROUNDS = 2, DEVICE_ROUNDS_MAX = 10000 };
enum { DEVICE_CALLS = 16 }; /* between two looks at the clock: one call is over before it is worth a wait */

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

double roof_multiply_now(const struct kernel_ops *ops, enum dtype compute, double seconds) {
    int count = threads_count();
    double rates[count], sum = 0;
    struct multiply_job job = {ops, compute, seconds, rates};
    parallel_for(count, multiply_task, &job);
    for (int i = 0; i < count; i++)
        sum += rates[i];
    return sum;
}

static double multiply_on_threads(const struct kernel_ops *ops, enum dtype compute, double seconds) {
    double best = 0;
    for (int pass = 0; pass < PASSES; pass++) /* the best: what disturbs the measurement only lowers it */
        best = fmax(best, roof_multiply_now(ops, compute, seconds / PASSES));
    return best;
}

/* A round is a product here, and the call waits for all of them. */
static double multiply_on_device(const struct kernel_ops *ops, enum dtype compute, double seconds) {
    ops->multiply_registers(compute, DEVICE_WARM_ROUNDS);
    double begin = clock_seconds(), best = 0;
    ops->multiply_registers(compute, 1);
    double one = clock_seconds() - begin;
    int64_t rounds = (int64_t)fmin(fmax(1, seconds / PASSES / one), DEVICE_ROUNDS_MAX);
    for (int pass = 0; pass < PASSES; pass++) {
        begin = clock_seconds();
        double operations = ops->multiply_registers(compute, rounds);
        best = fmax(best, operations / (clock_seconds() - begin));
    }
    return best;
}

double roof_multiply(const struct kernel_ops *ops, const struct device *device, enum dtype compute, double seconds) {
    return device == device_cpu() ? multiply_on_threads(ops, compute, seconds)
                                  : multiply_on_device(ops, compute, seconds);
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
    int calls = device == device_cpu() ? 1 : DEVICE_CALLS;
    *bandwidth = (struct roof_bandwidth){0};
    for (int pass = 0; pass < PASSES; pass++) {
        device->finish();
        double begin = clock_seconds();
        for (int i = 0; i < calls; i++)
            ops->sum_squares(a, sum);
        device->finish();
        double between = clock_seconds();
        for (int i = 0; i < calls; i++)
            ops->cast(a, b);
        device->finish();
        double end = clock_seconds();
        bandwidth->read = fmax(bandwidth->read, calls * (double)bytes / (between - begin));
        bandwidth->copy = fmax(bandwidth->copy, calls * 2 * (double)bytes / (end - between));
    }
    arena_release(&arena);
    return STATUS_OK;
}
