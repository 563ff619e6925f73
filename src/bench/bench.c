#include "bench/bench.h"

#include "base/clock.h"
#include "base/json.h"
#include "base/memory.h"
#include "base/random.h"
#include "base/threads.h"
#include "train/roof.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROUNDS_MAX = 1000, FILL_CHUNK = 1 << 16 };
static const double ROUND_SECONDS = 0.05, ROOF_SECONDS = 0.02;
static const size_t READ_BYTES = (size_t)128 << 20, DEVICE_READ_BYTES = (size_t)512 << 20; /* several times a cache */
enum { ROOF_PRODUCTS = 64 }; /* of a device: a tenth of a second */

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

struct bench_time bench_time_of(double *seconds, int count) {
    qsort(seconds, (size_t)count, sizeof *seconds, compare_doubles);
    double median = count % 2 ? seconds[count / 2] : 0.5 * (seconds[count / 2 - 1] + seconds[count / 2]);
    return (struct bench_time){median, seconds[0], seconds[count - 1]};
}

bool bench_on_device(const struct bench *bench) {
    return bench->device != device_cpu();
}

/* After a first call. */
static void time_on_device(const struct bench *bench, void (*call)(void *context), void *context, double *seconds,
                           int rounds) {
    bench->device->finish();
    double begin = clock_seconds();
    call(context);
    bench->device->finish();
    int64_t calls = 1 + (int64_t)(ROUND_SECONDS / (clock_seconds() - begin));
    for (int i = 0; i < rounds; i++) {
        begin = clock_seconds();
        for (int64_t k = 0; k < calls; k++)
            call(context);
        bench->device->finish();
        seconds[i] = (clock_seconds() - begin) / (double)calls;
    }
}

struct bench_time bench_call(const struct bench *bench, void (*call)(void *context), void *context) {
    double seconds[ROUNDS_MAX];
    int rounds = bench->rounds < ROUNDS_MAX ? bench->rounds : ROUNDS_MAX;
    call(context); /* the first one touches memory */
    if (bench_on_device(bench)) {
        time_on_device(bench, call, context, seconds, rounds);
        return bench_time_of(seconds, rounds);
    }
    for (int i = 0; i < rounds; i++) {
        double begin = clock_seconds(), now = begin;
        int64_t calls = 0;
        do {
            call(context);
            calls++;
            now = clock_seconds();
        } while (now - begin < ROUND_SECONDS);
        seconds[i] = (now - begin) / (double)calls;
    }
    return bench_time_of(seconds, rounds);
}

static double roof_in_turn(const struct bench *bench, enum dtype dtype) {
    if (!bench_on_device(bench))
        return roof_multiply_now(bench->ops, dtype, ROOF_SECONDS);
    double begin = clock_seconds(), operations = bench->ops->multiply_registers(dtype, ROOF_PRODUCTS);
    return operations / (clock_seconds() - begin);
}

static double call_in_turn(const struct bench *bench, void (*call)(void *context), void *context) {
    struct bench once = *bench;
    once.rounds = 1;
    return bench_call(&once, call, context).median;
}

struct bench_time bench_call_and_roof(const struct bench *bench, void (*call)(void *context), void *context, enum dtype dtype,
                                      double *roof) {
    double seconds[ROUNDS_MAX], roofs[ROUNDS_MAX];
    int rounds = bench->rounds < ROUNDS_MAX ? bench->rounds : ROUNDS_MAX;
    for (int i = 0; i < rounds; i++) {
        roofs[i] = roof_in_turn(bench, dtype);
        seconds[i] = call_in_turn(bench, call, context);
    }
    *roof = bench_time_of(roofs, rounds).median;
    return bench_time_of(seconds, rounds);
}

enum status bench_call_and_read(const struct bench *bench, void (*call)(void *context), void *context, struct bench_time *time,
                                double *roof) {
    double seconds[ROUNDS_MAX], roofs[ROUNDS_MAX];
    int rounds = bench->rounds < ROUNDS_MAX ? bench->rounds : ROUNDS_MAX;
    for (int i = 0; i < rounds; i++) {
        struct roof_bandwidth memory;
        TRY(roof_bandwidth(bench->ops, bench->device, bench_on_device(bench) ? DEVICE_READ_BYTES : READ_BYTES, &memory));
        roofs[i] = memory.read;
        seconds[i] = call_in_turn(bench, call, context);
    }
    *roof = bench_time_of(roofs, rounds).median;
    *time = bench_time_of(seconds, rounds);
    return STATUS_OK;
}

bool bench_wants(const struct bench *bench, const char *label) {
    return !bench->cases || strstr(label, bench->cases) != NULL;
}

enum status bench_no_case(const struct bench *bench) {
    return status_fail(STATUS_USAGE, "--cases: no name of a case holds \"%s\"", bench->cases);
}

const char *bench_precision_name(enum dtype precision) {
    return precision == DTYPE_BF16 ? "bf16" : precision == DTYPE_F32 ? "fp32" : dtype_name(precision);
}

enum status bench_read_config(const struct bench *bench, struct run_config *config) {
    const char **pairs;
    TRY(memory_alloc(&pairs, 2 * (size_t)(bench->pair_count + 2), sizeof *pairs));
    pairs[0] = "model.preset", pairs[1] = bench->preset;
    pairs[2] = "run.device", pairs[3] = bench->device->name;
    for (int i = 0; i < 2 * bench->pair_count; i++)
        pairs[4 + i] = bench->pairs[i];
    enum status status = run_config_resolve(config, NULL, pairs, bench->pair_count + 2);
    free(pairs);
    TRY(status);
    if (config->model.vocab_size == 0)
        config->model.vocab_size = config->data.vocab_size;
    return STATUS_OK;
}

static void print_json(const struct bench *bench, const struct bench_figure *f, double rate) {
    bool counts_bytes = f->operations == 0;
    json_t *object = json_pack("{s:s,s:s,s:s,s:s,s:i,s:f,s:f,s:f,s:f,s:f,s:f}", "name", f->name, "case", f->label,
                               "precision", bench_precision_name(f->precision), "kernels", bench->ops->name, "threads",
                               threads_count(), "ms", 1e3 * f->time.median, "ms_least", 1e3 * f->time.least, "ms_most",
                               1e3 * f->time.most, counts_bytes ? "gb_per_s" : "gflops", 1e-9 * rate,
                               counts_bytes ? "roof_gb_per_s" : "roof_gflops", 1e-9 * f->roof, "share",
                               f->roof > 0 ? rate / f->roof : 0);
    CHECK(object != NULL);
    CHECK_OP(json_object_set_new(object, "device", json_string(device_describe(bench->device))), ==, 0);
    if (f->wire_bytes > 0)
        CHECK_OP(json_object_set_new(object, "wire_gbit_per_s", json_real(8e-9 * f->wire_bytes / f->time.median)), ==, 0);
    if (f->tokens > 0) {
        CHECK_OP(json_object_set_new(object, "tokens_per_s", json_real(f->tokens / f->time.median)), ==, 0);
        CHECK_OP(json_object_set_new(object, "ms_per_token", json_real(1e3 * f->time.median / f->tokens)), ==, 0);
        if (counts_bytes)
            CHECK_OP(json_object_set_new(object, "bytes_per_token", json_integer((json_int_t)(f->bytes / f->tokens))), ==, 0);
    }
    json_dumpf(object, stdout, JSON_COMPACT | JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(6));
    putchar('\n');
    json_decref(object);
}

void bench_print(const struct bench *bench, const struct bench_figure *f) {
    double rate = (f->operations > 0 ? f->operations : f->bytes) / f->time.median;
    if (bench->json) {
        print_json(bench, f, rate);
    } else {
        printf("%-10s %-44s %-5s %9.3f ms (%.3f to %.3f) %8.1f %s", f->name, f->label,
               bench_precision_name(f->precision), 1e3 * f->time.median, 1e3 * f->time.least, 1e3 * f->time.most,
               1e-9 * rate, f->operations > 0 ? "GFLOP/s" : "GB/s");
        if (f->wire_bytes > 0)
            printf("  wire %6.1f Gbit/s", 8e-9 * f->wire_bytes / f->time.median);
        if (f->roof > 0)
            printf("  %5.1f%% of %.0f", 100 * rate / f->roof, 1e-9 * f->roof);
        if (f->tokens > 0)
            printf("  %8.1f tokens/s", f->tokens / f->time.median);
        putchar('\n');
    }
    fflush(stdout);
}

struct filling {
    void *values;
    enum dtype dtype;
    int64_t count;
    double scale;
    uint64_t stream;
};

/* Uniform in -scale .. scale: any numbers do, as long as none is special. Two of each draw. */
static void fill_chunk(void *context, int64_t index) {
    const struct filling *f = context;
    uint64_t bits = 0;
    int64_t begin = index * FILL_CHUNK, end = begin + FILL_CHUNK < f->count ? begin + FILL_CHUNK : f->count;
    for (int64_t i = begin; i < end; i++) {
        if (i == begin || i % 2 == 0)
            bits = random_bits(1, f->stream, (uint64_t)i / 2);
        uint32_t half = i % 2 == 0 ? (uint32_t)bits : (uint32_t)(bits >> 32);
        float value = (float)(f->scale * (2 * (double)(half >> 8) / (1 << 24) - 1));
        if (f->dtype == DTYPE_BF16)
            ((uint16_t *)f->values)[i] = float_to_bf16(value);
        else
            ((float *)f->values)[i] = value;
    }
}

struct tensor bench_tensor(const struct bench *bench, struct arena *arena, struct tensor shape, double scale) {
    static uint64_t stream;
    int64_t count = tensor_elements(shape);
    shape.data = arena_take(arena, tensor_bytes(shape));
    if (!shape.data || scale == 0)
        return shape;
    void *values = memory_must((size_t)count, dtype_size(shape.dtype));
    struct filling filling = {values, shape.dtype, count, scale, ++stream};
    parallel_for((count + FILL_CHUNK - 1) / FILL_CHUNK, fill_chunk, &filling);
    bench->device->copy_from_host(shape.data, values, tensor_bytes(shape));
    free(values);
    return shape;
}

struct tensor bench_indices(const struct bench *bench, struct arena *arena, const int32_t *values, int64_t count) {
    struct tensor t = tensor_1d(NULL, DTYPE_I32, count);
    t.data = arena_take(arena, tensor_bytes(t));
    if (t.data)
        bench->device->copy_from_host(t.data, values, tensor_bytes(t));
    return t;
}
