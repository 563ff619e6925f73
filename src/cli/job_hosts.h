/* The machines that a job may use, and which of them answer. */
#pragma once

#include "base/status.h"
#include <stdbool.h>

struct job_host {
    char *name, *line; /* the line as it stands in the file */
    int slots;
    bool answers;
};
struct job_hosts {
    struct job_host *list;
    int count;
};

/* Lines `name`, `name slots=4` or `name:4`; # begins a comment. STATUS_USAGE names the line that is none of them. */
enum status job_hosts_read(struct job_hosts *hosts, const char *path) MUST_USE;

/* Ask all at once: `command` by the shell, with {host} filled in; who has not ended it with 0 within 15 seconds does not answer.
 * Returns the slots of those that do. */
int job_hosts_probe(struct job_hosts *hosts, const char *command);

/* The lines of those that answer. */
enum status job_hosts_write(const struct job_hosts *hosts, const char *path) MUST_USE;

int job_hosts_slots(const struct job_hosts *hosts); /* of all */
void job_hosts_release(struct job_hosts *hosts);
