/* The outer step's codec and update, on one thread and on all: over memory larger than the caches, which is how a step meets
 * its weights, and over a little that stays in them, which shows the arithmetic alone. */
#include "bench/bench.h"

#include "base/threads.h"
#include "train/roof.h"
#include <stdio.h>

static const int64_t VALUES = (int64_t)16 << 20, CACHED_VALUES = 1 << 15; /* 64 MiB in f32, 128 KiB */
static const size_t ROOF_BYTES = (size_t)256 << 20;

struct codec {
    const struct kernel_ops *ops;
    enum outer_format format;
    struct tensor global, local, momentum, sum, stats;
    void *wire;
};

static void run_encode(void *context) {
    const struct codec *o = context;
    o->ops->outer_encode(o->global, o->local, o->format, o->wire, o->stats);
}

static void run_decode(void *context) {
    const struct codec *o = context;
    o->ops->outer_decode_add(o->wire, o->format, o->sum, false);
}

static void run_decode_add(void *context) {
    const struct codec *o = context;
    o->ops->outer_decode_add(o->wire, o->format, o->sum, true);
}

static void run_dot(void *context) {
    const struct codec *o = context;
    o->ops->outer_dot(o->wire, o->wire, o->format, tensor_elements(o->sum), o->stats);
}

static void run_update(void *context) {
    const struct codec *o = context;
    o->ops->outer_update(o->sum, (struct outer_settings){2, 0.4, 0.9}, o->global, o->momentum);
}

static void run_mix(void *context) {
    const struct codec *o = context;
    o->ops->outer_mix(o->global, 0.5, o->local);
}

static void take(const struct bench *bench, struct arena *arena, struct codec *o) {
    struct tensor shape = tensor_1d(NULL, DTYPE_F32, VALUES), three = tensor_1d(NULL, DTYPE_F64, OUTER_STATS);
    *o = (struct codec){.ops = bench->ops};
    o->global = bench_tensor(bench, arena, shape, 0.05);
    o->local = bench_tensor(bench, arena, shape, 0.05);
    o->momentum = bench_tensor(bench, arena, shape, 0.001);
    o->sum = bench_tensor(bench, arena, shape, 0);
    three.data = arena_take(arena, tensor_bytes(three));
    o->stats = three;
    o->wire = arena_take(arena, outer_wire_bytes(OUTER_F32, VALUES));
}

/* floats: of f32 memory that a call reads and writes, a difference. */
static void measure(const struct bench *bench, struct codec *o, const char *what, void (*run)(void *context), double floats,
                    double roof) {
    char label[64];
    int64_t n = tensor_elements(o->sum);
    bool has_wire = run != run_update && run != run_mix;
    double wire_bytes = has_wire ? (double)outer_wire_bytes(o->format, n) : 0;
    snprintf(label, sizeof label, "%s%s%s, %d thread%s%s", what, has_wire ? " " : "",
             has_wire ? outer_format_name(o->format) : "", threads_count(), threads_count() > 1 ? "s" : "",
             n == CACHED_VALUES ? ", cached" : "");
    struct bench_figure figure = {.name = "outer", .label = label, .precision = DTYPE_F32, .roof = roof,
                                  .wire_bytes = wire_bytes, .bytes = 4 * floats * (double)n + wire_bytes};
    figure.time = bench_call(bench, run, o);
    bench_print(bench, &figure);
}

static void measure_all(const struct bench *bench, struct codec *o, struct roof_bandwidth roof) {
    for (int format = 0; format < OUTER_FORMATS; format++) {
        o->format = (enum outer_format)format;
        measure(bench, o, "encode", run_encode, 2, roof.read);
        measure(bench, o, "decode", run_decode, 1, roof.copy);
        measure(bench, o, "decode and add", run_decode_add, 2, roof.copy);
    }
    measure(bench, o, "dot of two", run_dot, 0, 0);
    measure(bench, o, "update", run_update, 5, roof.copy);
    measure(bench, o, "mix", run_mix, 3, roof.copy);
}

static enum status measure_threads(const struct bench *bench, const struct codec *o, int threads) {
    struct roof_bandwidth roof;
    threads_set_count(threads);
    TRY(roof_bandwidth(bench->ops, bench->device, ROOF_BYTES, &roof));
    struct codec all = *o, cached = *o;
    measure_all(bench, &all, roof);
    if (threads > 1)
        return STATUS_OK;
    struct tensor *views[] = {&cached.global, &cached.local, &cached.momentum, &cached.sum};
    for (size_t i = 0; i < sizeof views / sizeof *views; i++)
        *views[i] = tensor_1d(views[i]->data, DTYPE_F32, CACHED_VALUES);
    measure_all(bench, &cached, (struct roof_bandwidth){0});
    return STATUS_OK;
}

enum status bench_outer(const struct bench *bench) {
    struct codec o;
    struct arena arena;
    int all = threads_count();
    arena_init_counting(&arena);
    take(bench, &arena, &o);
    TRY(arena_init(&arena, bench->device, arena.used));
    take(bench, &arena, &o);
    enum status status = bench_on_device(bench) ? STATUS_OK : measure_threads(bench, &o, 1);
    if ((all > 1 || bench_on_device(bench)) && status == STATUS_OK)
        status = measure_threads(bench, &o, all);
    threads_set_count(all);
    arena_release(&arena);
    return status;
}
