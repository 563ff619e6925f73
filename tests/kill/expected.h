/* What an uninterrupted run says and saves, and whether another run of the same settings does. */
#pragma once

#include "base/status.h"
#include <stdint.h>

/* Of a checkpoint. */
struct expected_step {
    uint64_t model_hash, optimizer_hash; /* of the bytes of their files */
    int64_t sequences, tokens;
};

struct expected {
    int64_t steps;
    struct expected_step *at; /* [steps + 1]; of step 0 there is none */
    char *metrics;            /* metrics.jsonl without times */
};

/* From a run that kept the checkpoints of all steps. */
enum status expected_read(struct expected *expected, const char *run_directory, int64_t steps) MUST_USE;
void expected_release(struct expected *expected);

/* After a kill: the newest good checkpoint is one of [low, high] and as it was in the uninterrupted run (low 0: or there is
 * none, and *newest is 0). */
enum status expected_check_newest(const struct expected *expected, const char *checkpoints, int64_t low, int64_t high,
                                  int64_t *newest) MUST_USE;

/* Whatever has a checkpoint's name is one, and as it was; but for one step that was damaged on purpose, or -1. */
enum status expected_check_named(const struct expected *expected, const char *checkpoints, int64_t damaged_step) MUST_USE;

/* The end of a run: the last checkpoint, and nothing left over if the call that ended it went on from an earlier step than the
 * last, and so saved. */
enum status expected_check_end(const struct expected *expected, const char *run_directory, int64_t from_step) MUST_USE;

/* And every line of its metrics, but for times. */
enum status expected_check_metrics(const struct expected *expected, const char *run_directory) MUST_USE;

/* The last step that metrics.jsonl tells of; 0 without any. */
int64_t expected_last_step(const char *run_directory);
