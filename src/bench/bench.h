/* Measuring: how long a call takes, and what share of the machine's roof that is. A speed is a figure for people, never
 * a test. Every figure stands beside a roof that was measured in the same call. */
#pragma once

#include "comm/launch/launch.h"
#include "device/device.h"
#include "kernels/kernels.h"
#include "train/run_config.h"

enum { BENCH_PRECISIONS_MAX = 2 };

struct bench {
    const struct kernel_ops *ops;
    const struct device *device;
    enum dtype precisions[BENCH_PRECISIONS_MAX];
    int precision_count;
    int rounds; /* timed, the median counts */
    bool json;
    const char *preset;      /* of `train`, `checkpoint` and `decode` */
    const char *peer;        /* shell command that `train` alternates with; NULL: none */
    int64_t sequence_length; /* 0: the benchmark's own list */
    struct comm_launch *launch; /* of `comm` and `train` */
    const char *const *pairs;   /* of `train`: settings, "section.key", "value" */
    int pair_count;
    bool threads_follow_launch; /* no --threads: this rank's share of the processors */
    const char *directory; /* of `checkpoint`: on the disk that is meant */
    const char *part; /* of `train`: "step", or "compute" or "transfers" alone */
    const char *cases; /* of `gemm`, `moe`, `attention` and `decode`: only those whose name holds this; NULL: all */
};

struct bench_time { /* seconds */
    double median, least, most;
};

/* `count` > 0 numbers, which are sorted. */
struct bench_time bench_time_of(double *seconds, int count);

/* A device that takes calls while it computes: what is timed ends with bench->device->finish(). */
bool bench_on_device(const struct bench *bench);

/* Time of one call: in every round it is repeated until a twentieth of a second has passed; on a device, as often as filled that
 * time in a trial, and then waited for once. */
struct bench_time bench_call(const struct bench *bench, void (*call)(void *context), void *context);
/* The same in turns with multiplications as fast as they go, operations a second: what multiplies for long lowers its clock,
 * and what is measured later would seem the slower. */
struct bench_time bench_call_and_roof(const struct bench *bench, void (*call)(void *context), void *context, enum dtype dtype,
                                      double *roof);

/* In turns with reading memory, bytes a second: for what reads all that it needs from there. STATUS_MEMORY. */
enum status bench_call_and_read(const struct bench *bench, void (*call)(void *context), void *context, struct bench_time *time,
                                double *roof) MUST_USE;

/* One figure. roof: operations or bytes a second. */
struct bench_figure {
    const char *name, *label;
    enum dtype precision;
    struct bench_time time;
    double operations, bytes; /* one of them is 0 */
    double wire_bytes;        /* of a message among them; 0: none */
    double tokens;            /* that a call reads or writes; 0: none */
    double roof;
};

/* The preset's settings, and those of the command line over them. */
enum status bench_read_config(const struct bench *bench, struct run_config *config) MUST_USE;

/* Whether a case of that name is to be measured. */
bool bench_wants(const struct bench *bench, const char *label);
enum status bench_no_case(const struct bench *bench) MUST_USE; /* the failure where none was */

/* One line, or one JSON object, on stdout. */
void bench_print(const struct bench *bench, const struct bench_figure *figure);

const char *bench_precision_name(enum dtype precision);

/* A tensor in fresh memory of the arena filled with small random numbers; scale 0: as the arena is, zeroed. */
struct tensor bench_tensor(const struct bench *bench, struct arena *arena, struct tensor shape, double scale);
struct tensor bench_indices(const struct bench *bench, struct arena *arena, const int32_t *values, int64_t count);

/* The benchmarks; each prints its figures. */
enum status bench_roof(const struct bench *bench) MUST_USE;      /* multiply and memory, 1 .. all threads */
enum status bench_gemm(const struct bench *bench) MUST_USE;      /* dense products, packed weights */
enum status bench_moe(const struct bench *bench) MUST_USE;       /* grouped products */
enum status bench_attention(const struct bench *bench) MUST_USE; /* causal */
enum status bench_outer(const struct bench *bench) MUST_USE;     /* codec and update of the outer step, 1 and all threads */
enum status bench_comm(const struct bench *bench) MUST_USE;      /* transfers; Collective, rank 0 prints */
/* Saves, loads and asynchronous saves beside steps of a preset, against the disk of bench->directory; Collective, rank 0
 * prints. In the first of the precisions. */
enum status bench_checkpoint(const struct bench *bench) MUST_USE;
enum status bench_decode(const struct bench *bench) MUST_USE;    /* a preset reads a prompt and writes token by token */
enum status bench_train(const struct bench *bench) MUST_USE;     /* whole steps of a preset on random tokens */
