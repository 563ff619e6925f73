/* Nothing is lost: a training run is killed at random moments and at every call of a save, and the power is cut while it
 * saves. The directory always holds a good checkpoint, and the run that goes on is, to the last bit, the uninterrupted one.
 *   kill_test PATH_TO_CADRE PATH_TO_WATCH_CALLS [KILLS INSIDE IMAGES [SEED]]
 *
 * KILLS in all, INSIDE of them at a call of a save: first a sweep over the calls of one save (all of them, where INSIDE
 * allows it), before and after each; then anywhere. IMAGES of a disk after a power cut (power_cut.h). What fails leaves its
 * directory behind and says where.
 */
#include "base/clock.h"
#include "base/file.h"
#include "base/log.h"
#include "base/random.h"
#include "call_record.h"
#include "expected.h"
#include "power_cut.h"
#include "scenario.h"
#include "training.h"
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SHORT_KILLS = 100, SHORT_INSIDE = 32, SHORT_IMAGES = 200, RESUMED_IMAGES_SHARE = 50 };
enum { STREAM_MOMENT = 1, STREAM_CALL, STREAM_SETTINGS, STREAM_IMAGE };
static const double TRAINING_S = 0.35; /* after its start a run is killed within so many seconds */

struct harness {
    int64_t kills, inside, images;
    uint64_t seed;
    char *work, *reference, *run, *records; /* directories; a file */
    char *image;                            /* directory, in memory where there is such a place */
    struct training training;
    struct expected expected;
    double start_s; /* of a run until it trains */
    int64_t save_calls[2]; /* of a save in the scenarios of the sweep */
    int64_t kill_count, inside_count, lap_count, start_kill_count, resumed_image_count;
};

static uint64_t draw(const struct harness *h, uint64_t stream, int64_t index) {
    return random_bits(h->seed, stream, (uint64_t)index);
}

/* ---- the uninterrupted run ------------------------------------------------------------------------------------------- */

static enum status run_reference(struct harness *h) {
    struct training_call call = {.directory = h->reference, .every_steps = 1, .keep = h->training.steps};
    bool killed;
    TRY(training_run(&h->training, &call, &killed));
    TRY(expected_read(&h->expected, h->reference, h->training.steps));
    double begin = clock_seconds();
    TRY(training_run(&h->training, &call, &killed)); /* nothing is left to do */
    h->start_s = clock_seconds() - begin;
    return STATUS_OK;
}

/* ---- killed at each call of one save --------------------------------------------------------------------------------- */

static bool begins_draft(const struct call_record *record, const char *path) {
    return record->kind == CALL_MAKE && strstr(path, ".tmp-") && !strchr(path, '/');
}

/* Calls to die at from one draft to the next. */
static int64_t count_save_calls(const char *records, size_t size) {
    struct call_record record;
    int64_t calls = 0;
    int drafts = 0;
    for (size_t offset = 0; offset + sizeof record <= size; offset += record.path_bytes + record.data_bytes) {
        memcpy(&record, records + offset, sizeof record);
        offset += sizeof record;
        char *path = text_format("%.*s", (int)record.path_bytes, records + offset);
        drafts += begins_draft(&record, path);
        free(path);
        calls += drafts == 1 && record.counts;
    }
    return calls;
}

static enum status record_run(struct harness *h, const struct scenario *scenario, struct training_call call,
                              const char *watch, bool *killed) {
    call.directory = h->run;
    call.every_steps = 1;
    call.keep = 2;
    call.watch = watch;
    call.record = h->records;
    TRY(file_remove(h->records));
    TRY(tree_write(&scenario->tree, h->run));
    return training_run(&h->training, &call, killed);
}

static enum status measure_save(struct harness *h, const struct scenario *scenario, int64_t *calls) {
    char *checkpoints = training_checkpoints(h->run), *records;
    bool killed;
    size_t size;
    enum status status = record_run(h, scenario, (struct training_call){0}, checkpoints, &killed);
    free(checkpoints);
    TRY(status);
    TRY(file_read(h->records, (uint64_t)1 << 30, &records, &size));
    *calls = count_save_calls(records, size);
    free(records);
    return STATUS_OK;
}

static enum status kill_at_call(struct harness *h, const struct scenario *scenario, struct training_call call,
                                int64_t point, int64_t *newest) {
    char *checkpoints = training_checkpoints(h->run);
    bool killed;
    call.watch = checkpoints;
    call.die_at = point / 2 + 1;
    call.die_after = point % 2;
    call.from_draft = true;
    enum status status = training_run(&h->training, &call, &killed);
    if (status == STATUS_OK && !killed)
        status = status_fail(STATUS_FORMAT, "call %lld of a save was not made", (long long)call.die_at);
    if (status == STATUS_OK)
        status = expected_check_newest(&h->expected, checkpoints, scenario->newest, scenario->newest + 1, newest);
    if (status == STATUS_OK)
        status = expected_check_named(&h->expected, checkpoints, scenario->damaged_step);
    free(checkpoints);
    h->kill_count++;
    h->inside_count++;
    return status;
}

/* Kill at one call, look, go on to the end, look. */
static enum status sweep_call(struct harness *h, const struct scenario *scenario, int64_t point) {
    struct training_call call = {.directory = h->run, .every_steps = 1, .keep = 2, .asynchronous = point % 4 < 2};
    int64_t newest;
    bool killed;
    TRY(tree_write(&scenario->tree, h->run));
    TRY(kill_at_call(h, scenario, call, point, &newest));
    TRY(training_run(&h->training, &call, &killed));
    TRY(expected_check_end(&h->expected, h->run, newest));
    return expected_check_metrics(&h->expected, h->run);
}

static enum status sweep(struct harness *h, enum scenario_kind kind, int64_t wanted, int64_t *calls) {
    struct scenario scenario;
    TRY(scenario_init(&scenario, kind, h->reference, h->training.steps));
    enum status status = measure_save(h, &scenario, calls);
    int64_t points = 2 * *calls, count = wanted < points ? wanted : points;
    for (int64_t i = 0; i < count && status == STATUS_OK; i++) {
        int64_t point = i * points / count;
        status = status_prefix(sweep_call(h, &scenario, point), "scenario \"%s\", killed %s call %lld of a save of %lld",
                               scenario.name, point % 2 ? "after" : "before", (long long)point / 2 + 1, (long long)*calls);
    }
    tree_release(&scenario.tree);
    return status;
}

/* Three quarters of the kills inside a save, in both of the first scenarios. */
static enum status sweep_saves(struct harness *h) {
    for (int kind = 0; kind < 2; kind++) {
        int64_t before = h->inside_count;
        TRY(sweep(h, (enum scenario_kind)kind, h->inside * 3 / 8, &h->save_calls[kind]));
        printf("sweep %d: a save of %lld calls, killed at %lld points\n", kind, (long long)h->save_calls[kind],
               (long long)(h->inside_count - before));
    }
    return STATUS_OK;
}

/* ---- killed anywhere, again and again -------------------------------------------------------------------------------- */

/* Where a run stands that is started, killed and started again. */
struct lap {
    int64_t newest;        /* checkpoint; 0: none */
    int64_t last_step;     /* in the metrics */
    ino_t metrics_inode;   /* another one when they were cut back to the checkpoint */
};

static ino_t metrics_inode(const struct harness *h) {
    char *path = path_join(h->run, "metrics.jsonl");
    struct stat info;
    ino_t inode = stat(path, &info) == 0 ? info.st_ino : 0;
    free(path);
    return inode;
}

static struct training_call draw_call(const struct harness *h, int64_t round) {
    uint64_t bits = draw(h, STREAM_SETTINGS, round);
    bool replaces = bits % 8 == 0;
    return (struct training_call){.directory = h->run,
                                  .every_steps = replaces ? 16 : (int64_t)(1 + (bits >> 8) % 3),
                                  .keep = (int64_t)(2 + (bits >> 16) % 2),
                                  .keep_every_steps = (bits >> 24) % 2 ? 10 : 0,
                                  .keep_best = (bits >> 32) % 2,
                                  .asynchronous = replaces || (bits >> 40) % 2,
                                  .replaces = replaces};
}

/* The checkpoint that must be there by what the metrics say: a save is over before the next step, or where training goes on
 * meanwhile, before the next save. */
static int64_t least_newest(const struct harness *h, const struct lap *before, const struct training_call *call) {
    int64_t last = expected_last_step(h->run);
    bool was_cut_back = before->last_step <= before->newest || metrics_inode(h) != before->metrics_inode;
    if (!was_cut_back || call->replaces || last <= before->newest)
        return before->newest;
    int64_t due = (last - 1) / call->every_steps * call->every_steps;
    due -= call->asynchronous ? call->every_steps : 0;
    return due > before->newest ? due : before->newest;
}

static void wait_for_moment(struct harness *h, int64_t round) {
    double share = (double)(draw(h, STREAM_MOMENT, round) % 10000) / 10000;
    bool in_start = draw(h, STREAM_MOMENT, ~round) % 8 == 0;
    usleep((useconds_t)(1e6 * (in_start ? share * h->start_s : h->start_s + share * TRAINING_S)));
    h->start_kill_count += in_start;
}

static enum status run_until_killed(struct harness *h, int64_t round, bool inside, struct training_call call, bool *killed) {
    char *checkpoints = training_checkpoints(h->run);
    pid_t child;
    if (inside) {
        call.watch = checkpoints;
        call.die_at = 1 + (int64_t)(draw(h, STREAM_CALL, round) % (3 * (uint64_t)h->save_calls[0]));
        call.die_after = draw(h, STREAM_CALL, ~round) % 2;
    }
    enum status status = training_start(&h->training, &call, &child);
    free(checkpoints);
    TRY(status);
    if (!inside) {
        wait_for_moment(h, round);
        kill(child, SIGKILL);
    }
    return training_end(&h->training, child, killed);
}

static enum status check_killed(struct harness *h, struct lap *lap, const struct training_call *call) {
    char *checkpoints = training_checkpoints(h->run);
    int64_t least = least_newest(h, lap, call);
    enum status status = expected_check_newest(&h->expected, checkpoints, least, h->expected.steps, &lap->newest);
    if (status == STATUS_OK)
        status = expected_check_named(&h->expected, checkpoints, -1);
    free(checkpoints);
    lap->last_step = expected_last_step(h->run);
    lap->metrics_inode = metrics_inode(h);
    return status;
}

static enum status end_lap(struct harness *h, struct lap *lap) {
    TRY(expected_check_end(&h->expected, h->run, lap->newest));
    TRY(expected_check_metrics(&h->expected, h->run));
    h->lap_count++;
    *lap = (struct lap){0};
    return directory_remove(h->run);
}

static enum status run_round(struct harness *h, struct lap *lap, int64_t round) {
    struct training_call call = draw_call(h, round);
    bool killed, inside = h->inside_count * h->kills < h->inside * (h->kill_count + 1);
    TRY(run_until_killed(h, round, inside, call, &killed));
    if (!killed)
        return end_lap(h, lap);
    h->kill_count++;
    h->inside_count += inside;
    return check_killed(h, lap, &call);
}

/* All kills that are left, then to the end. */
static enum status kill_anywhere(struct harness *h) {
    struct lap lap = {0};
    struct training_call call = {.directory = h->run, .every_steps = 2, .keep = 2};
    bool killed;
    TRY(directory_remove(h->run));
    for (int64_t round = 0; h->kill_count < h->kills; round++)
        TRY(status_prefix(run_round(h, &lap, round), "round %lld", (long long)round));
    TRY(training_run(&h->training, &call, &killed));
    return end_lap(h, &lap);
}

/* ---- power cuts ------------------------------------------------------------------------------------------------------ */

static enum power_cut_style draw_style(const struct harness *h, int64_t index) {
    static const enum power_cut_style styles[] = {POWER_CUT_NOTHING, POWER_CUT_ALL,     POWER_CUT_EMPTY, POWER_CUT_JOURNAL,
                                                  POWER_CUT_JOURNAL, POWER_CUT_JOURNAL, POWER_CUT_ANY,   POWER_CUT_ANY};
    return styles[draw(h, STREAM_IMAGE, ~index) % (sizeof styles / sizeof *styles)];
}

/* The image is where a run would look: is it good, and now and then, does the run go on to the same end? Its metrics are not
 * flushed at saves: a power cut may take lines of them. */
static enum status check_image(struct harness *h, const struct scenario *scenario, int64_t low, int64_t high, bool in_order,
                               bool resumes) {
    char *checkpoints = training_checkpoints(h->image);
    struct training_call call = {.directory = h->image, .every_steps = 1, .keep = 2};
    int64_t newest;
    bool killed;
    enum status status = expected_check_newest(&h->expected, checkpoints, low, high, &newest);
    if (status == STATUS_OK && in_order)
        status = expected_check_named(&h->expected, checkpoints, scenario->damaged_step);
    free(checkpoints);
    if (status != STATUS_OK || !resumes)
        return status;
    h->resumed_image_count++;
    TRY(training_run(&h->training, &call, &killed));
    return expected_check_end(&h->expected, h->image, newest);
}

static enum status cut_power(struct harness *h, const struct scenario *scenario, const struct power_cut_log *log,
                             int64_t index) {
    struct tree image;
    int64_t low, high;
    uint64_t bits = draw(h, STREAM_IMAGE, index);
    size_t calls = 1 + (size_t)(bits % (log->call_count + 1));
    enum power_cut_style style = draw_style(h, index);
    power_cut_range(log, calls, scenario->newest, &low, &high);
    power_cut_image(log, calls, style, bits, &image);
    enum status status = tree_write(&image, h->image);
    tree_release(&image);
    if (status == STATUS_OK)
        status = check_image(h, scenario, low, high, style != POWER_CUT_ANY, index % RESUMED_IMAGES_SHARE == 0);
    return status_prefix(status, "scenario \"%s\", image %lld: cut after %zu of %zu calls, style %d", scenario->name,
                         (long long)index, calls, log->call_count, (int)style);
}

static enum status cut_power_often(struct harness *h, enum scenario_kind kind, int64_t first, int64_t count) {
    struct scenario scenario;
    struct power_cut_log log = {0};
    struct training_call call = {.asynchronous = kind == SCENARIO_NEXT, .from_draft = true};
    bool killed;
    if (kind == SCENARIO_FRESH) /* its first saves are enough */
        call.die_at = 5 * h->save_calls[0] / 2;
    TRY(scenario_init(&scenario, kind, h->reference, h->training.steps));
    enum status status = record_run(h, &scenario, call, h->run, &killed);
    if (status == STATUS_OK)
        status = power_cut_open(&log, &scenario.tree, h->records, !killed);
    for (int64_t i = 0; i < count && status == STATUS_OK; i++)
        status = cut_power(h, &scenario, &log, first + i);
    if (status == STATUS_OK)
        printf("power cuts, \"%s\": %zu calls, %d saves, %lld images\n", scenario.name, log.call_count, log.save_count,
               (long long)count);
    power_cut_close(&log);
    tree_release(&scenario.tree);
    return status;
}

static enum status cut_power_everywhere(struct harness *h) {
    for (int kind = 0; kind < SCENARIO_KINDS; kind++)
        TRY(cut_power_often(h, (enum scenario_kind)kind, kind * h->images / SCENARIO_KINDS,
                            (kind + 1) * h->images / SCENARIO_KINDS - kind * h->images / SCENARIO_KINDS));
    return STATUS_OK;
}

/* ---- all ------------------------------------------------------------------------------------------------------------- */

static enum status timed(struct harness *h, const char *what, enum status (*part)(struct harness *h)) {
    double begin = clock_seconds();
    enum status status = part(h);
    printf("%s: %.1f s\n", what, clock_seconds() - begin);
    fflush(stdout);
    return status;
}

static enum status run_all(struct harness *h) {
    TRY(timed(h, "the uninterrupted run", run_reference));
    TRY(timed(h, "killed at the calls of a save", sweep_saves));
    TRY(timed(h, "killed anywhere", kill_anywhere));
    return timed(h, "power cuts", cut_power_everywhere);
}

static void harness_release(struct harness *h) {
    training_release(&h->training);
    expected_release(&h->expected);
    free(h->reference);
    free(h->run);
    free(h->image);
    free(h->records);
}

static int64_t argument(int argc, char **argv, int index, int64_t otherwise) {
    return index < argc ? strtoll(argv[index], NULL, 10) : otherwise;
}

/* Thousands of images are written, each of some forty files: not to a disk, where it can be helped. */
static char *make_image_directory(const char *work) {
    char *memory = text_format("/dev/shm/cadre-kill-XXXXXX");
    if (mkdtemp(memory))
        return memory;
    free(memory);
    return path_join(work, "image");
}

int main(int argc, char **argv) {
    char work[] = "/tmp/cadre-kill-XXXXXX";
    if (argc < 3 || !mkdtemp(work)) {
        fprintf(stderr, "usage: %s PATH_TO_CADRE PATH_TO_WATCH_CALLS [KILLS INSIDE IMAGES [SEED]]\n", argv[0]);
        return 2;
    }
    log_set_level(LOG_SILENT);
    struct harness h = {.kills = argument(argc, argv, 3, SHORT_KILLS),
                        .inside = argument(argc, argv, 4, SHORT_INSIDE),
                        .images = argument(argc, argv, 5, SHORT_IMAGES),
                        .seed = (uint64_t)argument(argc, argv, 6, 1),
                        .work = work,
                        .reference = path_join(work, "reference"),
                        .run = path_join(work, "run"),
                        .records = path_join(work, "records"),
                        .image = make_image_directory(work)};
    enum status status = training_init(&h.training, argv[1], argv[2], work);
    if (status == STATUS_OK)
        status = run_all(&h);
    printf("%lld kills (%lld inside a save, %lld while starting), %lld runs to the end, %lld images of which %lld went on\n",
           (long long)h.kill_count, (long long)h.inside_count, (long long)h.start_kill_count, (long long)h.lap_count,
           (long long)h.images, (long long)h.resumed_image_count);
    if (status == STATUS_OK)
        status = directory_remove(h.image);
    if (status == STATUS_OK)
        status = directory_remove(work);
    if (status != STATUS_OK)
        printf("FAILED, seed %llu: %s; left in %s and %s\n", (unsigned long long)h.seed, status_text(), work, h.image);
    harness_release(&h);
    return status == STATUS_OK ? 0 : 1;
}
