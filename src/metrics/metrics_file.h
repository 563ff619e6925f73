/* metrics.jsonl: one JSON object a line, appended as training goes on.
 *
 * Lines are in the order in which things happened. Where a run went back, a line with "to_step" says so, and
 * "step" goes on from to_step; what was written of the steps given up stands before it. Who wants the run as it counts
 * takes the last line of every step. */
#pragma once

#include "base/file.h"
#include "base/json.h"

struct metrics_file {
    struct file_writer writer;
    bool open;
};

/* Open for appending, to go on after last_step. What was written after it, and a last line torn by a crash, is dropped
 * first, so that a resumed run leaves the same file as an uninterrupted one; but lines with "to_step" are never dropped.
 * After last_step: in the stretch of the file in which that step last counted, which begins behind the last return to an
 * earlier one. */
enum status metrics_file_open(struct metrics_file *file, const char *path, int64_t last_step) MUST_USE;

/* Add one object as a line, handed to the system at once; numbers that are not finite become null. Takes the object
 * (json_decref). */
enum status metrics_file_add(struct metrics_file *file, json_t *object) MUST_USE;

void metrics_file_close(struct metrics_file *file);

/* A JSON number, or null where the value is not finite. */
json_t *metrics_number(double value);
