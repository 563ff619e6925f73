/* Transfers between ranks: ours beside MPI's own blocking collectives of the same bytes, in turns; how much of a transfer
 * hides behind computing; what a transfer that does not move costs one that computes. Between devices: ours alone. */
#include "bench/bench.h"

#include "base/clock.h"
#include "base/json.h"
#include "base/memory.h"
#include "base/text.h"
#include "comm/on_device/on_device.h"
#include "train/run_config.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROUNDS_MAX = 1000, CALLS_MAX = 2000 };
static const double ROUND_SECONDS = 0.05, WORK_SECONDS = 0.1;
static const int64_t sizes[] = {64 << 10, 512 << 10, 4 << 20, 16 << 20, 64 << 20};
enum { SIZE_COUNT = sizeof sizes / sizeof *sizes };

/* One exchange of `bytes` a rank. */
struct exchange {
    struct comm_launch *launch;
    const struct device *device; /* where send and recv are */
    struct comm *comm, on_device; /* the world, or one for the device */
    char link[COMM_MEMORY_LINE_BYTES]; /* how devices exchange; empty on the processor */
    bool gathers; /* all ranks' bytes to all; else a part to each */
    int64_t bytes, bytes_most;
    void *send, *recv;
    int64_t *counts, *send_offsets, *offsets; /* [size] each */
};

/* ---- the exchange ---------------------------------------------------------------------------------------------------- */

/* Memory for the largest, every page of it there before the first transfer. */
static enum status exchange_take(const struct bench *bench, int64_t bytes_most, struct exchange *x) {
    size_t size = (size_t)bench->launch->world.size;
    *x = (struct exchange){.launch = bench->launch, .device = bench->device, .comm = &bench->launch->world};
    x->bytes_most = bytes_most;
    TRY(memory_alloc(&x->counts, 3 * size, sizeof *x->counts));
    x->send_offsets = x->counts + size;
    x->offsets = x->send_offsets + size;
    TRY(x->device->alloc(&x->send, (size_t)bytes_most));
    TRY(x->device->alloc(&x->recv, size * (size_t)bytes_most));
    if (x->device != device_cpu())
        return STATUS_OK;
    memset(x->send, 1, (size_t)bytes_most);
    memset(x->recv, 1, size * (size_t)bytes_most);
    return STATUS_OK;
}

/* Collective. Between devices the way that a run with these settings would take. */
static enum status exchange_open(const struct bench *bench, struct exchange *x) {
    struct comm *world = &bench->launch->world;
    struct comm_memory memory;
    struct run_config config;
    if (x->device == device_cpu())
        return STATUS_OK;
    TRY(comm_agree(world, run_config_resolve(&config, NULL, bench->pairs, bench->pair_count)));
    TRY(comm_memory_choose(world, x->device, (enum comm_wish)config.run.transport, &memory, x->link));
    TRY(world->ops->split(world, 0, &x->on_device));
    x->comm = &x->on_device;
    return comm_agree(world, comm_on_device(x->comm, memory));
}

static void exchange_release(struct exchange *x) {
    comm_release(&x->on_device);
    free(x->counts);
    if (x->send)
        x->device->release(x->send, (size_t)x->bytes_most);
    if (x->recv)
        x->device->release(x->recv, (size_t)x->launch->world.size * (size_t)x->bytes_most);
}

static void exchange_shape(struct exchange *x, bool gathers, int64_t bytes) {
    int size = x->launch->world.size;
    x->gathers = gathers;
    x->bytes = bytes;
    for (int r = 0; r < size; r++) {
        x->counts[r] = gathers ? bytes : bytes / size;
        x->offsets[r] = r * x->counts[r];
        x->send_offsets[r] = x->offsets[r];
    }
}

/* What reaches a rank from others. */
static double exchange_bytes(const struct exchange *x) {
    return (double)x->counts[0] * (x->launch->world.size - 1);
}

static enum status exchange_start(struct exchange *x, struct comm_request *request) {
    struct comm *comm = x->comm;
    if (x->gathers)
        return comm->ops->all_gather(comm, x->send, x->recv, x->counts, x->offsets, request);
    return comm->ops->all_to_all(comm, x->send, x->counts, x->send_offsets, x->recv, x->counts, x->offsets, request);
}

static enum status exchange_ours(struct exchange *x) {
    struct comm_request request;
    TRY(exchange_start(x, &request));
    return x->comm->ops->wait(x->comm, &request);
}

static enum status exchange_bare(struct exchange *x) {
    return comm_launch_bare(x->launch, x->send, x->counts, x->gathers ? NULL : x->send_offsets, x->recv, x->counts,
                            x->offsets);
}

/* ---- time together ---------------------------------------------------------------------------------------------------- */

static enum status meet(struct comm *comm) {
    double nothing = 0;
    return comm_sum_f64(comm, &nothing, 1);
}

/* Seconds a call, from the moment all begin to the moment all are done; on every rank the same. */
static enum status time_calls(struct exchange *x, enum status (*call)(struct exchange *x), int calls, double *seconds) {
    struct comm *comm = &x->launch->world;
    TRY(meet(comm));
    double begin = clock_seconds();
    for (int i = 0; i < calls; i++)
        TRY(call(x));
    x->device->finish();
    TRY(meet(comm));
    *seconds = (clock_seconds() - begin) / calls;
    return comm_broadcast(comm, seconds, sizeof *seconds);
}

static enum status count_calls(struct exchange *x, int *calls) {
    double seconds;
    TRY(time_calls(x, exchange_ours, 2, &seconds));
    double count = ROUND_SECONDS / seconds;
    *calls = count < 2 ? 2 : count > CALLS_MAX ? CALLS_MAX : (int)count;
    return STATUS_OK;
}

/* ---- bandwidth -------------------------------------------------------------------------------------------------------- */

static void print_on_device(const struct bench *bench, const struct exchange *x, const char *label, struct bench_time time) {
    double bytes = exchange_bytes(x);
    if (bench->json) {
        json_t *object = json_pack("{s:s,s:s,s:s,s:i,s:i,s:s,s:s,s:f,s:f}", "bench", "comm", "case", label, "precision", "bytes",
                                   "threads", x->launch->thread_count, "ranks", x->launch->world.size, "device",
                                   device_describe(x->device), "link", x->link, "ms_median", 1e3 * time.median, "bytes_per_s",
                                   bytes / time.median);
        CHECK(object != NULL);
        json_dumpf(object, stdout, JSON_COMPACT | JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(6));
        putchar('\n');
        json_decref(object);
    } else {
        printf("comm       %-44s %9.3f ms (%.3f to %.3f) %8.2f GB/s; %s\n", label, 1e3 * time.median, 1e3 * time.least,
               1e3 * time.most, 1e-9 * bytes / time.median, x->link);
    }
    fflush(stdout);
}

static void print_bandwidth(const struct bench *bench, const struct exchange *x, struct bench_time ours,
                            struct bench_time bare) {
    const char *name = x->gathers ? "all_gather" : "all_to_all";
    char label[64], size[32];
    double bytes = exchange_bytes(x);
    if (x->launch->world.rank != 0)
        return;
    snprintf(label, sizeof label, "%s of %s", name, text_bytes(size, x->bytes));
    if (x->device != device_cpu()) {
        print_on_device(bench, x, label, ours);
        return;
    }
    if (bench->json) {
        json_t *object = json_pack("{s:s,s:s,s:s,s:i,s:i,s:f,s:f,s:f,s:f,s:f}", "bench", "comm", "case", label, "precision",
                                   "bytes", "threads", x->launch->thread_count, "ranks", x->launch->world.size, "ms_median",
                                   1e3 * ours.median, "bytes_per_s", bytes / ours.median, "bare_ms_median", 1e3 * bare.median,
                                   "bare_bytes_per_s", bytes / bare.median, "bare_share", bare.median / ours.median);
        CHECK(object != NULL);
        json_dumpf(object, stdout, JSON_COMPACT | JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(6));
        putchar('\n');
        json_decref(object);
    } else {
        printf("comm       %-44s %9.3f ms (%.3f to %.3f) %8.2f GB/s  %5.1f%% of MPI's own, %.3f ms\n", label,
               1e3 * ours.median, 1e3 * ours.least, 1e3 * ours.most, 1e-9 * bytes / ours.median,
               100 * bare.median / ours.median, 1e3 * bare.median);
    }
    fflush(stdout);
}

static enum status measure_bandwidth(const struct bench *bench, struct exchange *x) {
    double ours[ROUNDS_MAX], bare[ROUNDS_MAX];
    bool on_host = x->device == device_cpu();
    int calls;
    if (on_host)
        TRY(exchange_bare(x));
    TRY(count_calls(x, &calls));
    for (int i = 0; i < bench->rounds; i++) {
        TRY(time_calls(x, exchange_ours, calls, &ours[i]));
        bare[i] = ours[i];
        if (on_host)
            TRY(time_calls(x, exchange_bare, calls, &bare[i]));
    }
    print_bandwidth(bench, x, bench_time_of(ours, bench->rounds), bench_time_of(bare, bench->rounds));
    return STATUS_OK;
}

/* ---- progress --------------------------------------------------------------------------------------------------------- */

static volatile double work_result;

/* A fixed amount of work on registers; returns its seconds. */
static double work(int64_t amount) {
    double begin = clock_seconds(), a = 1.0, b = 0.5, c = 0.25, d = 0.125;
    for (int64_t i = 0; i < amount; i++) {
        a = a * 0.999 + 0.5;
        b = b * 0.998 + 0.5;
        c = c * 0.997 + 0.5;
        d = d * 0.996 + 0.5;
    }
    work_result = a + b + c + d;
    return clock_seconds() - begin;
}

/* How much work takes this long. */
static int64_t work_amount(double seconds) {
    int64_t amount = 1000;
    double took = work(amount);
    while (took < 0.02)
        took = work(amount *= 2);
    return (int64_t)(seconds / took * (double)amount);
}

/* Medians over the rounds, of rank 0, seconds. */
struct progress {
    double blocking, work, wait, whole;
};

static enum status measure_progress(const struct bench *bench, struct exchange *x, struct progress *out) {
    struct comm *comm = &x->launch->world;
    double blocking[ROUNDS_MAX], alone[ROUNDS_MAX], waited[ROUNDS_MAX], whole[ROUNDS_MAX], seconds;
    struct comm_request request;
    TRY(time_calls(x, exchange_ours, 2, &seconds));
    int64_t amount = work_amount(4 * seconds);
    TRY(comm_broadcast(comm, &amount, sizeof amount));
    for (int i = 0; i < bench->rounds; i++) {
        TRY(time_calls(x, exchange_ours, 2, &blocking[i]));
        TRY(meet(comm));
        alone[i] = work(amount);
        TRY(meet(comm));
        double begin = clock_seconds();
        TRY(exchange_start(x, &request));
        work(amount);
        double middle = clock_seconds();
        TRY(comm->ops->wait(comm, &request));
        waited[i] = clock_seconds() - middle;
        whole[i] = clock_seconds() - begin;
    }
    *out = (struct progress){bench_time_of(blocking, bench->rounds).median, bench_time_of(alone, bench->rounds).median,
                             bench_time_of(waited, bench->rounds).median, bench_time_of(whole, bench->rounds).median};
    return STATUS_OK;
}

/* The same work with nothing under way, and with a transfer under way for which the odd ranks come only afterwards: what the
 * looking for it costs the even ones, as a share of the work. */
static enum status measure_cost(const struct bench *bench, struct exchange *x, double *share) {
    struct comm *comm = &x->launch->world;
    double shares[ROUNDS_MAX];
    int64_t amount = work_amount(WORK_SECONDS);
    struct comm_request request;
    for (int i = 0; i < bench->rounds; i++) {
        double none = 0, some = 0;
        for (int turn = 0; turn < 4; turn++) { /* in turns, so that what others do to the machine meets both */
            bool early = turn % 2 == 1 && comm->rank % 2 == 0;
            TRY(meet(comm));
            if (early)
                TRY(exchange_start(x, &request));
            double took = work(amount);
            if (turn % 2)
                some += took;
            else
                none += took;
            if (comm->rank % 2) /* surely later than the even ones are done */
                work(amount / 2);
            if (!early)
                TRY(exchange_start(x, &request));
            TRY(comm->ops->wait(comm, &request));
        }
        shares[i] = some / none - 1;
    }
    *share = bench_time_of(shares, bench->rounds).median;
    return STATUS_OK;
}

static void print_progress(const struct bench *bench, const struct exchange *x, const struct progress *p, double cost) {
    char label[64], size[32];
    double hidden = (p->blocking + p->work - p->whole) / p->blocking;
    if (x->launch->world.rank != 0)
        return;
    snprintf(label, sizeof label, "progress of %s", text_bytes(size, x->bytes));
    if (bench->json) {
        json_t *object = json_pack("{s:s,s:s,s:s,s:i,s:i,s:f,s:f,s:f,s:f,s:f,s:f}", "bench", "comm", "case", label,
                                   "precision", "bytes", "threads", x->launch->thread_count, "ranks",
                                   x->launch->world.size, "ms_median", 1e3 * p->blocking, "work_ms", 1e3 * p->work,
                                   "wait_ms", 1e3 * p->wait, "wait_share", p->wait / p->blocking, "hidden_share", hidden,
                                   "looking_cost_share", cost);
        CHECK(object != NULL);
        json_dumpf(object, stdout, JSON_COMPACT | JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(6));
        putchar('\n');
        json_decref(object);
    } else {
        printf("comm       %-44s %9.3f ms; behind %.1f ms of work the wait is %.3f ms, %.0f%% of the transfer is hidden; "
               "looking for one that does not move costs %.1f%%\n",
               label, 1e3 * p->blocking, 1e3 * p->work, 1e3 * p->wait, 100 * hidden, 100 * cost);
    }
    fflush(stdout);
}

static enum status measure_all(const struct bench *bench, struct exchange *x) {
    for (int gathers = 0; gathers < 2; gathers++)
        for (int i = 0; i < SIZE_COUNT; i++) {
            exchange_shape(x, gathers, sizes[i]);
            TRY(measure_bandwidth(bench, x));
        }
    for (int i = 2; i < SIZE_COUNT && x->device == device_cpu(); i++) {
        struct progress progress;
        double cost;
        exchange_shape(x, false, sizes[i]);
        TRY(measure_progress(bench, x, &progress));
        TRY(measure_cost(bench, x, &cost));
        print_progress(bench, x, &progress, cost);
    }
    return STATUS_OK;
}

enum status bench_comm(const struct bench *bench) {
    struct exchange x;
    if (bench->launch->world.size == 1)
        return status_fail(STATUS_USAGE, "transfers need several ranks: mpirun -n 2 cadre bench comm");
    enum status status = comm_agree(&bench->launch->world, exchange_take(bench, sizes[SIZE_COUNT - 1], &x));
    if (status == STATUS_OK)
        status = exchange_open(bench, &x);
    if (status == STATUS_OK)
        status = measure_all(bench, &x);
    exchange_release(&x);
    return status;
}
