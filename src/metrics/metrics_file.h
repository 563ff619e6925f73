/* metrics.jsonl: one JSON object a line, appended as training goes on. */
#pragma once

#include "base/file.h"
#include "base/json.h"

struct metrics_file {
    struct file_writer writer;
    bool open;
};

/* Open for appending. Lines whose "step" is above last_step, and a last line torn by a crash, are dropped first, so that
 * a resumed run leaves the same file as an uninterrupted one. */
enum status metrics_file_open(struct metrics_file *file, const char *path, int64_t last_step) MUST_USE;

/* Add one object as a line, handed to the system at once; numbers that are not finite become null. Takes the object
 * (json_decref). */
enum status metrics_file_add(struct metrics_file *file, json_t *object) MUST_USE;

void metrics_file_close(struct metrics_file *file);

/* A JSON number, or null where the value is not finite. */
json_t *metrics_number(double value);
