/* What a disk may hold when the power goes while a recorded process (watch_calls.c) works.
 *
 * The model. fsync of a file makes what was written to it before lasting, fsync of a directory the entries that were made,
 * renamed or removed in it before. Whatever was not flushed when the power went may be there or not:
 *   - each write: all of it, zeros in the length that it gave the file, nothing, or some of its blocks of 4 KiB and zeros;
 *   - each change of an entry, a rename as one: all up to some moment in order, as a journal keeps them, or any of them.
 * That fsync of a file on some file systems flushes its entry too is not relied on. Not modelled: damage to what was flushed,
 * disks that lie about a flush, what is mapped into memory.
 */
#pragma once

#include "tree.h"

enum power_cut_style {
    POWER_CUT_NOTHING, /* but what was flushed */
    POWER_CUT_ALL,     /* as after a kill */
    POWER_CUT_EMPTY,   /* all entries, no data: zeros */
    POWER_CUT_JOURNAL, /* entries up to some moment; any data */
    POWER_CUT_ANY      /* any entries, any data */
};

struct power_cut_change;

/* A publication: a draft got the name of a step. */
struct power_cut_save {
    int64_t step;
    size_t renamed_at, relied_at; /* number of calls; relied on when the process went on to change anything in checkpoints/ */
};

struct power_cut_log {
    const struct tree *before;
    struct power_cut_change *changes; /* [change_count] */
    size_t change_count;
    struct power_cut_save *saves; /* [save_count] */
    int save_count;
    size_t call_count;
    int node_count; /* of before, and what was made since */
    bool *is_directory; /* [node_count] */
    char *records;  /* that changes point into */
};

/* The records of a process that began with `before`, which is borrowed. ended: it came to its end and is to be relied on. */
enum status power_cut_open(struct power_cut_log *log, const struct tree *before, const char *records_path,
                           bool ended) MUST_USE;
void power_cut_close(struct power_cut_log *log);

/* What the disk may hold after the first `calls` calls. The same seed gives the same. The caller releases it, before the
 * tree that the log began with. */
void power_cut_image(const struct power_cut_log *log, size_t calls, enum power_cut_style style, uint64_t seed,
                     struct tree *image);

/* Steps that the newest checkpoint may have after so many calls, when `newest` was it before: *low was relied on, *high was
 * named. */
void power_cut_range(const struct power_cut_log *log, size_t calls, int64_t newest, int64_t *low, int64_t *high);
