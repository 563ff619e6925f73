/* Whole training steps of a preset on random tokens, with the time of every kind of event. */
#include "bench/training.h"

#include "base/clock.h"
#include "base/json.h"
#include "base/memory.h"
#include "base/threads.h"
#include "parallel/layout_choice.h"
#include "train/roof.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PEER_LINE_BYTES = 4096, OBSERVED_STEPS = 3 };
static const double ROOF_SECONDS = 0.05, DEVICE_ROOF_SECONDS = 0.2;
static const size_t BANDWIDTH_BYTES = (size_t)128 << 20;

/* Runs the peer's command; its last JSON line names the tokens a second. */
static enum status run_peer(const char *command, double *tokens_per_s) {
    char line[PEER_LINE_BYTES];
    *tokens_per_s = 0;
    FILE *pipe = popen(command, "r");
    if (!pipe)
        return status_fail(STATUS_IO, "cannot run the peer: %s", command);
    while (fgets(line, sizeof line, pipe)) {
        json_t *object = json_loads(line, 0, NULL);
        if (json_is_number(json_object_get(object, "tokens_per_s")))
            *tokens_per_s = json_number_value(json_object_get(object, "tokens_per_s"));
        json_decref(object);
    }
    if (pclose(pipe) != 0 || *tokens_per_s <= 0)
        return status_fail(STATUS_IO, "the peer gave no \"tokens_per_s\": %s", command);
    return STATUS_OK;
}

static enum status print_json(const struct bench *bench, const struct training *t, struct bench_time time,
                              double roof, double operations, double peer) {
    char line[LAYOUT_LINE_BYTES];
    json_t *events = json_object();
    double steps = (double)t->profile.spans[SPAN_STEP].calls;
    for (int i = 0; i < EVENT_KIND_COUNT; i++)
        if (t->profile.events[i].seconds > 0)
            json_object_set_new(events, event_kind_name((enum event_kind)i),
                                json_real(1e3 * t->profile.events[i].seconds / steps));
    json_t *object = json_pack(
        "{s:s,s:s,s:s,s:s,s:i,s:i,s:s,s:s,s:I,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:o}", "name", "train", "case", bench->preset,
        "precision", bench_precision_name(t->model->context.compute), "kernels", bench->ops->name, "threads",
        threads_count(), "ranks", t->world->size, "layout", layout_describe(&t->sharding, line), "part", bench->part,
        "comm_bytes", (json_int_t)t->comm_bytes, "tokens_per_s",
        (double)t->token_count / time.median, "ms", 1e3 * time.median, "ms_least", 1e3 * time.least,
        "ms_most", 1e3 * time.most, "gflops", 1e-9 * operations / time.median, "roof_gflops", 1e-9 * roof, "share",
        operations / time.median / roof, "event_ms", events);
    CHECK(object != NULL);
    json_object_set_new(object, "device", json_string(device_describe(bench->device)));
    json_object_set_new(object, "tensor_bytes", json_integer((json_int_t)(t->model->memory.total + t->workspace->memory.total)));
    json_object_set_new(object, "kernel_scratch_bytes", json_integer((json_int_t)kernels_scratch_bytes()));
    if (peer > 0) {
        json_object_set_new(object, "peer_tokens_per_s", json_real(peer));
        json_object_set_new(object, "ratio", json_real((double)t->token_count / time.median / peer));
    }
    json_dumpf(object, stdout, JSON_COMPACT | JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(6));
    putchar('\n');
    json_decref(object);
    return STATUS_OK;
}

static enum status print_table(const struct bench *bench, const struct training *t, struct bench_time time,
                               double roof, double operations, double peer) {
    struct roof_bandwidth memory;
    struct text table = {0};
    char line[LAYOUT_LINE_BYTES], bytes[32], scratch[32];
    TRY(roof_bandwidth(bench->ops, bench->device, BANDWIDTH_BYTES, &memory));
    if (t->world->size > 1)
        printf("train      %s, %s sent a step, %s\n", layout_describe(&t->sharding, line),
               text_bytes(bytes, (double)t->comm_bytes), strcmp(bench->part, "step") ? bench->part : "whole steps");
    if (bench_on_device(bench))
        printf("train      %s: %s of tensors, %s of scratch\n", device_describe(bench->device),
               text_bytes(bytes, (double)(t->model->memory.total + t->workspace->memory.total)),
               text_bytes(scratch, (double)kernels_scratch_bytes()));
    printf("train      %s, %s, %d threads: %.0f tokens/s, %.1f ms a step (%.1f to %.1f), %.0f GFLOP/s, %.1f%% of %.0f (%s)\n",
           bench->preset, bench_precision_name(t->model->context.compute), threads_count(),
           (double)t->token_count / time.median, 1e3 * time.median, 1e3 * time.least, 1e3 * time.most,
           1e-9 * operations / time.median, 100 * operations / time.median / roof, 1e-9 * roof,
           bench->ops->multiply_unit(t->model->context.compute));
    profile_print(&t->profile, (struct profile_roof){roof / t->world->size, fmax(memory.read, memory.copy)}, &table);
    fputs(text_string(&table), stdout);
    text_release(&table);
    if (peer > 0)
        printf("             peer: %.0f tokens/s; ours is %.2f times as fast\n", peer,
               (double)t->token_count / time.median / peer);
    return STATUS_OK;
}

/* Of all ranks, each measured while the others are, too. */
static enum status measure_roof(const struct bench *bench, struct training *t, double *roof) {
    TRY(comm_agree(t->world, STATUS_OK));
    *roof = bench_on_device(bench)
                ? roof_multiply(bench->ops, bench->device, t->model->context.compute, DEVICE_ROOF_SECONDS)
                : roof_multiply_now(bench->ops, t->model->context.compute, ROOF_SECONDS);
    return comm_sum_f64(t->world, roof, 1);
}

/* Where the events of a step are looked at, the device is waited for after each: in steps of their own, not in those whose time
 * counts. */
static enum status observe(struct training *t) {
    double ignored;
    TRY(profile_init(&t->profile, &t->runner, false));
    for (int i = 0; i < OBSERVED_STEPS; i++)
        TRY(training_step(t, &ignored));
    return STATUS_OK;
}

static enum status measure(const struct bench *bench, struct training *t) {
    double *seconds, *peer, *roof;
    int roofs = bench_on_device(bench) ? 1 : bench->rounds; /* in turns: what multiplies for long lowers its clock */
    double operations = model_train_operations_per_token(&t->config.model, t->config.train.sequence_length) *
                        (double)t->token_count;
    TRY(memory_alloc(&seconds, (size_t)bench->rounds, sizeof *seconds));
    TRY(memory_alloc(&peer, (size_t)bench->rounds, sizeof *peer));
    TRY(memory_alloc(&roof, (size_t)bench->rounds, sizeof *roof));
    enum status status = STATUS_OK;
    for (int i = 0; i < 2 && status == STATUS_OK; i++) /* warm: memory touched, scratch grown */
        status = training_step(t, &seconds[0]);
    if (status == STATUS_OK && !bench_on_device(bench))
        status = profile_init(&t->profile, &t->runner, false);
    for (int i = 0; i < bench->rounds && status == STATUS_OK; i++) {
        if (i < roofs)
            status = measure_roof(bench, t, &roof[i]);
        if (status == STATUS_OK)
            status = training_step(t, &seconds[i]);
        if (status == STATUS_OK && bench->peer)
            status = run_peer(bench->peer, &peer[i]);
    }
    if (status == STATUS_OK && bench_on_device(bench))
        status = observe(t);
    if (status == STATUS_OK) {
        struct bench_time time = bench_time_of(seconds, bench->rounds);
        double theirs = bench->peer ? bench_time_of(peer, bench->rounds).median : 0;
        if (t->world->rank == 0)
            status = (bench->json ? print_json : print_table)(bench, t, time, bench_time_of(roof, roofs).median, operations,
                                                                     theirs);
        status = comm_agree(t->world, status);
    }
    free(seconds);
    free(peer);
    free(roof);
    return status;
}

enum status bench_train(const struct bench *bench) {
    enum status status = STATUS_OK;
    if (bench->peer && bench->launch->world.size > 1)
        return status_fail(STATUS_USAGE, "--peer is for one rank");
    for (int i = 0; i < bench->precision_count && status == STATUS_OK; i++) {
        struct training t = {.step = 0};
        status = training_open(&t, bench, bench->precisions[i]);
        if (status == STATUS_OK)
            status = measure(bench, &t);
        training_close(&t);
    }
    return status;
}
