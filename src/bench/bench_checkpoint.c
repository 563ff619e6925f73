/* Saving and resuming against the disk's own speed, and what an asynchronous save takes from the steps beside it. */
#include "bench/training.h"

#include "base/clock.h"
#include "base/file.h"
#include "base/json.h"
#include "base/memory.h"
#include "base/threads.h"
#include "data/tokenizer.h"
#include "parallel/layout_choice.h"
#include "train/saver.h"
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PIECE_BYTES = 4 << 20, STEPS_LEAST = 3 };

struct saving {
    struct training training;
    struct saver *sync, *async;
    struct tokenizer *tokenizer;
    char directory[CHECKPOINT_PATH_BYTES]; /* of the benchmark: rank 0's, on all */
    char *checkpoints, *tokenizer_path, *config_path, *raw_path;
    char *piece; /* [PIECE_BYTES] aligned, not zeros */
    int64_t step;      /* of the last save */
    int steps;         /* that a save beside them takes at most */
    bool saves_next;   /* a save begins after this step of training */
    double update_s;   /* of the last step */
    uint64_t share_bytes, all_bytes; /* of this rank, of all */
    enum status raw_status;          /* of the thread that writes beside steps */
    char raw_message[512];
};

/* Seconds of each round, and steps. */
struct saving_times {
    double *write, *write_direct, *save, *read, *read_direct, *load, *plain, *beside, *start;
    double *disk_beside;                      /* steps beside the bytes alone */
    double *thread, *update, *update_hashing; /* processor time of the save's thread; the update of a step, also with hashes */
};
enum { TIMES = 13 };

/* ---- the disk alone ---------------------------------------------------------------------------------------------- */

static enum status fail_raw(const char *what, const char *path) {
    return status_fail(STATUS_IO, "%s: cannot %s: %s", path, what, strerror(errno));
}

static enum status open_raw(const char *path, int flags, int *descriptor) {
    *descriptor = open(path, flags | O_CLOEXEC, 0600);
    return *descriptor < 0 ? fail_raw("open", path) : STATUS_OK;
}

/* As many bytes as this rank saves, front to back, flushed; direct: past the system's cache. */
static enum status write_raw(const struct saving *s, bool direct) {
    int file;
    enum status status = STATUS_OK;
    TRY(open_raw(s->raw_path, O_WRONLY | O_CREAT | O_TRUNC | (direct ? O_DIRECT : 0), &file));
    for (uint64_t done = 0; done < s->share_bytes && status == STATUS_OK; done += PIECE_BYTES)
        if (write(file, s->piece, PIECE_BYTES) != PIECE_BYTES)
            status = fail_raw("write", s->raw_path);
    if (status == STATUS_OK && fsync(file) != 0)
        status = fail_raw("flush", s->raw_path);
    close(file);
    return status;
}

static enum status read_raw(const struct saving *s, bool direct) {
    int file;
    enum status status = STATUS_OK;
    TRY(open_raw(s->raw_path, O_RDONLY | (direct ? O_DIRECT : 0), &file));
    posix_fadvise(file, 0, 0, POSIX_FADV_SEQUENTIAL);
    for (uint64_t done = 0; done < s->share_bytes && status == STATUS_OK; done += PIECE_BYTES)
        if (read(file, s->piece, PIECE_BYTES) != PIECE_BYTES)
            status = fail_raw("read", s->raw_path);
    close(file);
    return status;
}

/* What is on the disk leaves the system's cache. */
static void forget_file(const char *path) {
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return;
    posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
    close(file);
}

static enum status forget_checkpoint(const char *path) {
    struct checkpoint_manifest manifest;
    TRY(checkpoint_manifest_open(&manifest, path));
    for (size_t i = 0; i < manifest.file_count; i++) {
        char *name = path_join(path, manifest.files[i].name);
        forget_file(name);
        free(name);
    }
    checkpoint_manifest_close(&manifest);
    return STATUS_OK;
}

/* ---- one of each ------------------------------------------------------------------------------------------------- */

/* Seconds until all ranks are done. */
static enum status timed(struct saving *s, enum status (*work)(struct saving *s), double *seconds) {
    TRY(comm_agree(s->training.world, STATUS_OK));
    double begin = clock_seconds();
    TRY(comm_agree(s->training.world, work(s)));
    *seconds = clock_seconds() - begin;
    return STATUS_OK;
}

static enum status work_write(struct saving *s) {
    return write_raw(s, false);
}

static enum status work_write_direct(struct saving *s) {
    return write_raw(s, true);
}

static enum status work_read(struct saving *s) {
    return read_raw(s, false);
}

static enum status work_read_direct(struct saving *s) {
    return read_raw(s, true);
}

static enum status start(struct saving *s, struct saver *saver) {
    struct checkpoint_sources sources = {.tokenizer_path = s->tokenizer_path,
                                         .config_path = s->config_path,
                                         .model = &s->training.config.model,
                                         .tokenizer = s->tokenizer,
                                         .state = {.step = ++s->step, .best_step = -1},
                                         .keep = {1000000, 0, -1, -1}};
    return saver_start(saver, &sources);
}

static enum status work_save(struct saving *s) {
    return start(s, s->sync);
}

static enum status work_load(struct saving *s) {
    struct train_state state;
    char path[CHECKPOINT_PATH_BYTES];
    TRY(checkpoint_resume(s->checkpoints, s->training.model, NULL, &s->training.ranks, CHECKPOINT_READ_EACH, &state,
                          path));
    return *path ? STATUS_OK : status_fail(STATUS_NOT_FOUND, "%s: what was saved is not there", s->checkpoints);
}

/* Rank 0 empties the directory of checkpoints. */
static enum status clear_checkpoints(struct saving *s) {
    return comm_agree(s->training.world, s->training.world->rank == 0 ? directory_remove(s->checkpoints) : STATUS_OK);
}

static enum status measure_disk(struct saving *s, struct saving_times *t, int round) {
    TRY(timed(s, work_write_direct, &t->write_direct[round]));
    unlink(s->raw_path);
    TRY(timed(s, work_write, &t->write[round]));
    TRY(timed(s, work_save, &t->save[round]));
    char *path = text_format("%s/step-%06lld", s->checkpoints, (long long)s->step);
    enum status status = forget_checkpoint(path);
    free(path);
    TRY(status);
    forget_file(s->raw_path);
    TRY(timed(s, work_read_direct, &t->read_direct[round]));
    TRY(timed(s, work_read, &t->read[round]));
    unlink(s->raw_path);
    TRY(timed(s, work_load, &t->load[round]));
    TRY(step_refresh(&s->training.runner));
    return clear_checkpoints(s);
}

/* A step as the trainer does it, with what it asks after each. */
static enum status run_step(struct saving *s) {
    double unused;
    TRY(training_step(&s->training, &unused));
    double busy = saver_is_busy(s->async);
    TRY(comm_sum_f64(s->training.world, &busy, 1));
    return busy == 0 ? saver_advance(s->async) : STATUS_OK;
}

/* A step that a save follows, then steps until it is over. */
static enum status measure_beside(struct saving *s, struct saving_times *t, int round) {
    int steps = 1;
    double begin = clock_seconds();
    s->saves_next = true;
    TRY(run_step(s));
    s->saves_next = false;
    t->update_hashing[round] = s->update_s;
    double start_begin = clock_seconds();
    TRY(start(s, s->async));
    t->start[round] = clock_seconds() - start_begin;
    for (; saver_is_under_way(s->async) || steps < s->steps; steps++)
        TRY(run_step(s));
    t->beside[round] = (clock_seconds() - begin) * s->steps / steps; /* seldom more than s->steps */
    t->thread[round] = saver_thread_seconds(s->async);
    s->steps = steps > s->steps ? steps : s->steps;
    return STATUS_OK;
}

static enum status measure_plain(struct saving *s, struct saving_times *t, int round) {
    double begin = clock_seconds();
    for (int i = 0; i < s->steps; i++)
        TRY(run_step(s));
    t->plain[round] = clock_seconds() - begin;
    t->update[round] = s->update_s;
    return STATUS_OK;
}

static void *run_raw(void *context) {
    struct saving *s = context;
    s->raw_status = write_raw(s, true);
    if (s->raw_status != STATUS_OK)
        snprintf(s->raw_message, sizeof s->raw_message, "%s", status_text());
    return NULL;
}

/* The least that any save takes: a thread does nothing but write as many bytes from one buffer past the cache, and flush. */
static enum status measure_disk_beside(struct saving *s, struct saving_times *t, int round) {
    pthread_t thread;
    double begin = clock_seconds();
    TRY(run_step(s));
    if (pthread_create(&thread, NULL, run_raw, s) != 0)
        return status_fail(STATUS_MEMORY, "no thread to write with");
    enum status status = STATUS_OK;
    for (int i = 1; i < s->steps && status == STATUS_OK; i++)
        status = run_step(s);
    pthread_join(thread, NULL);
    t->disk_beside[round] = clock_seconds() - begin;
    unlink(s->raw_path);
    TRY(status);
    return s->raw_status == STATUS_OK ? STATUS_OK : status_fail(s->raw_status, "%s", s->raw_message);
}

/* Which of them is first takes turns, since a machine becomes slower or faster. */
static enum status measure_steps(struct saving *s, struct saving_times *t, int round) {
    enum status (*const measures[])(struct saving *s, struct saving_times *t, int round) = {measure_beside, measure_plain,
                                                                                            measure_disk_beside};
    for (int i = 0; i < 3; i++)
        TRY(measures[(round + i) % 3](s, t, round));
    return clear_checkpoints(s);
}

/* ---- all of it --------------------------------------------------------------------------------------------------- */

static enum status make_places(struct saving *s, const struct bench *bench) {
    struct comm *world = s->training.world;
    struct text_view text = {"the river", 9};
    if (world->rank == 0 && !directory_exists(bench->directory))
        return comm_agree(world, status_fail(STATUS_NOT_FOUND, "%s: no such directory", bench->directory));
    TRY(comm_agree(world, STATUS_OK));
    if (world->rank == 0)
        snprintf(s->directory, sizeof s->directory, "%s/cadre-bench-%d", bench->directory, (int)getpid());
    TRY(comm_broadcast(world, s->directory, sizeof s->directory));
    s->checkpoints = path_join(s->directory, "checkpoints");
    s->tokenizer_path = path_join(s->directory, "tokenizer.json");
    s->config_path = path_join(s->directory, "config.ini");
    s->raw_path = text_format("%s/raw-%d", s->directory, world->rank);
    TRY(tokenizer_train(&text, 1, 258, &s->tokenizer));
    enum status status = STATUS_OK;
    if (world->rank == 0) {
        status = directory_make(s->directory);
        if (status == STATUS_OK)
            status = tokenizer_save(s->tokenizer, s->tokenizer_path);
        if (status == STATUS_OK)
            status = file_write(s->config_path, "[run]\n", 6);
    }
    return comm_agree(world, status);
}

/* As the trainer does it. */
static void before_update(void *context) {
    struct saving *s = context;
    s->update_s = 0;
    saver_detach(s->async);
    s->training.runner.hashes = s->saves_next ? saver_expect(s->async, s->step + 1) : NULL;
}

static void event_done(void *context, const struct event *event, double seconds) {
    struct saving *s = context;
    if (event->kind == EVENT_OPTIMIZER)
        s->update_s += seconds;
}

static enum status saving_open(struct saving *s, const struct bench *bench, enum dtype dtype) {
    TRY(training_open(&s->training, bench, dtype));
    TRY(make_places(s, bench));
    const struct run_config *c = &s->training.config;
    struct saver_settings settings = {.directory = s->checkpoints,
                                      .file_bytes = (uint64_t)c->checkpoint.file_bytes,
                                      .rounded = c->checkpoint.weights == CHECKPOINT_WEIGHTS_BF16};
    TRY(saver_create(&s->sync, s->training.model, NULL, &s->training.ranks, &settings));
    settings.asynchronous = true;
    TRY(saver_create(&s->async, s->training.model, NULL, &s->training.ranks, &settings));
    s->training.runner.herald = (struct step_herald){before_update, s};
    s->training.runner.observer = (struct step_observer){event_done, s};
    s->share_bytes = saver_share_bytes(s->sync);
    double sum = (double)s->share_bytes;
    TRY(comm_sum_f64(s->training.world, &sum, 1));
    s->all_bytes = (uint64_t)sum;
    TRY(memory_alloc_large_pages(&s->piece, PIECE_BYTES));
    for (int i = 0; i < PIECE_BYTES; i++)
        s->piece[i] = (char)(unsigned char)((uint32_t)i * 2654435761u >> 13);
    return STATUS_OK;
}

static void saving_close(struct saving *s) {
    saver_destroy(s->async);
    saver_destroy(s->sync);
    tokenizer_destroy(s->tokenizer);
    if (s->raw_path)
        unlink(s->raw_path);
    if (*s->directory && s->training.world->rank == 0 && directory_remove(s->directory) != STATUS_OK)
        fprintf(stderr, "%s\n", status_text());
    free(s->checkpoints);
    free(s->tokenizer_path);
    free(s->config_path);
    free(s->raw_path);
    free(s->piece);
    training_close(&s->training);
}

struct saving_result {
    double write, save, read, load; /* bytes a second */
    double sync_s, start_s, slowed_s; /* what a save takes: of a run that waits; to begin one beside it; in all beside it, */
    double slowed_error_s;            /* with the standard error of that; */
    double thread_s, hashing_s;       /* processor time of its thread; longer update before it */
    double step_s;
    double disk_s, disk_error_s;      /* what the bytes alone, written by a thread that does nothing else, take beside steps */
};

static double median(double *values, int count) {
    return bench_time_of(values, count).median;
}

/* Standard error of a median, from the median distance to it as if the values were normal. Changes them. */
static double median_error(double *values, int count) {
    double middle = median(values, count);
    for (int i = 0; i < count; i++)
        values[i] = fabs(values[i] - middle);
    return 1.2533 * 1.4826 * median(values, count) / sqrt(count);
}

static struct saving_result conclude(const struct saving *s, struct saving_times *t, int rounds) {
    double bytes = (double)s->all_bytes, *slowed = t->beside;
    for (int i = 0; i < rounds; i++) {
        slowed[i] = t->beside[i] - t->plain[i];
        t->disk_beside[i] -= t->plain[i];
        t->plain[i] /= s->steps;
    }
    double slowed_s = median(slowed, rounds), disk_s = median(t->disk_beside, rounds);
    return (struct saving_result){bytes / fmin(median(t->write, rounds), median(t->write_direct, rounds)),
                                  bytes / median(t->save, rounds),
                                  bytes / fmin(median(t->read, rounds), median(t->read_direct, rounds)),
                                  bytes / median(t->load, rounds),
                                  median(t->save, rounds),
                                  median(t->start, rounds),
                                  slowed_s,
                                  median_error(slowed, rounds),
                                  median(t->thread, rounds),
                                  median(t->update_hashing, rounds) - median(t->update, rounds),
                                  median(t->plain, rounds),
                                  disk_s,
                                  median_error(t->disk_beside, rounds)};
}

static void print_result(const struct bench *bench, const struct saving *s, const struct saving_result *r) {
    char bytes[32], line[LAYOUT_LINE_BYTES];
    if (!bench->json) {
        printf("checkpoint %s, %s, %s: save %.0f MB/s, the disk alone %.0f (%.0f%%); load %.0f MB/s, the disk alone "
               "%.0f (%.0f%%)\n",
               bench->preset, text_bytes(bytes, (double)s->all_bytes), layout_describe(&s->training.sharding, line),
               1e-6 * r->save, 1e-6 * r->write, 100 * r->save / r->write, 1e-6 * r->load, 1e-6 * r->read,
               100 * r->load / r->read);
        printf("             beside %d steps of %.0f ms a save takes %.1f +- %.1f ms (%.1f of them to begin), %.1f%% of the "
               "%.0f ms that it takes alone; the bytes alone take %.1f +- %.1f ms\n",
               s->steps, 1e3 * r->step_s, 1e3 * r->slowed_s, 1e3 * r->slowed_error_s, 1e3 * r->start_s,
               100 * r->slowed_s / r->sync_s, 1e3 * r->sync_s, 1e3 * r->disk_s, 1e3 * r->disk_error_s);
        printf("             the save's thread takes %.1f ms of processor time, hashes in the update before it %.1f ms\n",
               1e3 * r->thread_s, 1e3 * r->hashing_s);
        return;
    }
    json_t *object = json_pack(
        "{s:s,s:s,s:s,s:s,s:i,s:i,s:I,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:i,s:f,s:f}", "name", "checkpoint",
        "case", bench->preset, "layout", layout_describe(&s->training.sharding, line), "precision",
        bench_precision_name(s->training.model->context.compute), "threads", threads_count(), "ranks",
        s->training.world->size, "bytes", (json_int_t)s->all_bytes, "disk_write_mb_s", 1e-6 * r->write, "save_mb_s",
        1e-6 * r->save, "save_share", r->save / r->write, "disk_read_mb_s", 1e-6 * r->read, "load_mb_s", 1e-6 * r->load,
        "load_share", r->load / r->read, "sync_ms", 1e3 * r->sync_s, "async_ms", 1e3 * r->slowed_s, "async_error_ms",
        1e3 * r->slowed_error_s, "async_begin_ms", 1e3 * r->start_s, "async_thread_ms", 1e3 * r->thread_s, "async_hashing_ms",
        1e3 * r->hashing_s, "disk_beside_ms", 1e3 * r->disk_s, "disk_beside_error_ms", 1e3 * r->disk_error_s, "steps",
        s->steps, "step_ms", 1e3 * r->step_s, "async_share", r->slowed_s / r->sync_s);
    CHECK(object != NULL);
    json_dumpf(object, stdout, JSON_COMPACT | JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(6));
    putchar('\n');
    json_decref(object);
}

static enum status measure(const struct bench *bench, struct saving *s, struct saving_times *t) {
    int rounds = bench->rounds;
    double unused;
    for (int i = 0; i < rounds; i++)
        TRY(measure_disk(s, t, i));
    for (int i = 0; i < 2; i++) /* the first ones warm */
        TRY(training_step(&s->training, &unused));
    s->steps = STEPS_LEAST;
    TRY(measure_beside(s, t, 0)); /* how many steps a save takes */
    TRY(clear_checkpoints(s));
    s->steps++;
    for (int i = 0; i < rounds; i++)
        TRY(measure_steps(s, t, i));
    struct saving_result result = conclude(s, t, rounds);
    if (s->training.world->rank == 0)
        print_result(bench, s, &result);
    return STATUS_OK;
}

static enum status measure_dtype(const struct bench *bench, enum dtype dtype) {
    struct saving s = {.step = 0};
    size_t rounds = (size_t)bench->rounds;
    double *memory;
    TRY(memory_alloc(&memory, TIMES * rounds, sizeof *memory));
    struct saving_times times = {memory,
                                 memory + rounds,
                                 memory + 2 * rounds,
                                 memory + 3 * rounds,
                                 memory + 4 * rounds,
                                 memory + 5 * rounds,
                                 memory + 6 * rounds,
                                 memory + 7 * rounds,
                                 memory + 8 * rounds,
                                 memory + 9 * rounds,
                                 memory + 10 * rounds,
                                 memory + 11 * rounds,
                                 memory + 12 * rounds};
    enum status status = saving_open(&s, bench, dtype);
    if (status == STATUS_OK)
        status = measure(bench, &s, &times);
    saving_close(&s);
    free(memory);
    return status;
}

enum status bench_checkpoint(const struct bench *bench) {
    return measure_dtype(bench, bench->precisions[0]);
}
