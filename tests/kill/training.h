/* `cadre train` as another process: a run so small that most of its time is saving. */
#pragma once

#include "base/status.h"
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/* What is the same for all calls. */
struct training {
    const char *cadre, *library; /* the program; watch_calls, to be preloaded */
    char *text, *errors;         /* files: to learn from; for its stderr */
    int64_t steps;
};

enum status training_init(struct training *training, const char *cadre, const char *library, const char *work) MUST_USE;
void training_release(struct training *training);

struct training_call {
    const char *directory; /* of the run */
    int64_t every_steps, keep, keep_every_steps;
    bool keep_best, asynchronous, replaces; /* replaces: --checkpoint.overlap replace */
    const char *watch, *record;             /* call_record.h; NULL: neither */
    int64_t die_at;                         /* 0: not by itself */
    bool die_after, from_draft;
};

enum status training_start(const struct training *training, const struct training_call *call, pid_t *child) MUST_USE;

/* Wait for its end. *killed: by SIGKILL; otherwise it came to the end of the run. A failure tells its last words. */
enum status training_end(const struct training *training, pid_t child, bool *killed) MUST_USE;

/* Start and wait. */
enum status training_run(const struct training *training, const struct training_call *call, bool *killed) MUST_USE;

/* "DIRECTORY/checkpoints" in fresh memory. */
char *training_checkpoints(const char *directory);
