#include "bench/bench.h"

#include "base/threads.h"
#include "train/roof.h"
#include <stdio.h>

static const size_t BUFFER_BYTES = (size_t)512 << 20;
static const double SECONDS = 0.3;

static void print_multiply(const struct bench *bench, enum dtype dtype) {
    double rate = roof_multiply(bench->ops, bench->device, dtype, SECONDS);
    if (bench->json)
        printf("{\"name\":\"roof\",\"case\":\"multiply\",\"precision\":\"%s\",\"threads\":%d,\"unit\":\"%s\",\"gflops\":%.1f,"
               "\"device\":\"%s\"}\n",
               bench_precision_name(dtype), threads_count(), bench->ops->multiply_unit(dtype), 1e-9 * rate,
               device_describe(bench->device));
    else if (bench_on_device(bench))
        printf("roof       multiply, %s, %-5s %9.1f GFLOP/s by %s\n", device_describe(bench->device),
               bench_precision_name(dtype), 1e-9 * rate, bench->ops->multiply_unit(dtype));
    else
        printf("roof       multiply, %d thread%s, %-5s %9.1f GFLOP/s by %s\n", threads_count(),
               threads_count() > 1 ? "s" : " ", bench_precision_name(dtype), 1e-9 * rate,
               bench->ops->multiply_unit(dtype));
}

static enum status print_bandwidth(const struct bench *bench) {
    struct roof_bandwidth bandwidth;
    TRY(roof_bandwidth(bench->ops, bench->device, BUFFER_BYTES, &bandwidth));
    if (bench->json)
        printf("{\"name\":\"roof\",\"case\":\"memory\",\"threads\":%d,\"read_gb_per_s\":%.2f,\"copy_gb_per_s\":%.2f,"
               "\"device\":\"%s\"}\n",
               threads_count(), 1e-9 * bandwidth.read, 1e-9 * bandwidth.copy, device_describe(bench->device));
    else if (bench_on_device(bench))
        printf("roof       memory,   %s, read %.1f GB/s, copy %.1f GB/s\n", device_describe(bench->device),
               1e-9 * bandwidth.read, 1e-9 * bandwidth.copy);
    else
        printf("roof       memory,   %d thread%s, read %.1f GB/s, copy %.1f GB/s\n", threads_count(),
               threads_count() > 1 ? "s" : " ", 1e-9 * bandwidth.read, 1e-9 * bandwidth.copy);
    return STATUS_OK;
}

enum status bench_roof(const struct bench *bench) {
    int all = threads_count(), first = bench_on_device(bench) ? all : 1;
    enum status status = STATUS_OK;
    for (int threads = first; threads <= all && status == STATUS_OK;
         threads = threads < all && 2 * threads > all ? all : 2 * threads) {
        threads_set_count(threads);
        for (int i = 0; i < bench->precision_count; i++)
            print_multiply(bench, bench->precisions[i]);
        status = print_bandwidth(bench);
    }
    threads_set_count(all);
    return status;
}
