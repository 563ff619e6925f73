/* A command that is run to its end, and nothing of which stays. */
#pragma once

#include "base/status.h"
#include <stdbool.h>

/* How it ended. */
struct job_end {
    int exit_status; /* -1: by a signal */
    int signal;      /* 0: none */
    bool was_stopped; /* a signal to stop came while it ran, and was passed on */
    double seconds;
};

/* From now on signals to stop (SIGTERM, SIGINT, SIGUSR1, SIGHUP) wait until job_run or job_pause looks, and processes below
 * this one that lose their parent become its children. Once in a process, before any thread. */
enum status job_prepare(void) MUST_USE;

/* Run words (NULL at the end) in a process group of its own, without standard input, until it ends, however long that takes.
 * Signals to stop are passed on to the command alone; after the second one it has five seconds. What is left below this
 * process afterwards is ended by SIGTERM, then by SIGKILL. The command gets SIGTERM when this process dies.
 * STATUS_USAGE where it cannot be started, STATUS_PEER where a process of it cannot be ended. */
enum status job_run(char *const *words, struct job_end *end) MUST_USE;

/* Returns false as soon as a signal to stop comes, or one has come since the last job. */
bool job_pause(double seconds);
