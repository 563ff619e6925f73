/* What watch_calls.c writes down and power_cut.c reads: calls that change or flush what is below one directory.
 *
 * A record is a struct call_record, then path_bytes of a path below that directory (of a rename: from, zero byte, to; "" is
 * the directory itself), then data_bytes that were written.
 */
#pragma once

#include <stdint.h>

enum call_kind {
    CALL_OPEN,           /* for writing; made where it was not there */
    CALL_OPEN_TRUNCATED, /* and emptied where it was */
    CALL_OPEN_DIRECTORY,
    CALL_WRITE,
    CALL_RESIZE, /* to `begin` bytes */
    CALL_GROW,   /* to `begin` bytes, unless it has more */
    CALL_FLUSH,
    CALL_CLOSE,
    CALL_RENAME,
    CALL_MAKE,   /* a directory */
    CALL_REMOVE, /* a file or an empty directory */
    CALL_HINT,   /* changes and promises nothing */
    CALL_FAILED,
};

struct call_record {
    uint32_t kind;
    int32_t descriptor;
    uint64_t begin, data_bytes;
    uint32_t path_bytes;
    uint32_t counts; /* 1: a moment to die at; 0: directories that are opened to be flushed */
};

/* Environment of a watched process. */
#define CALLS_WATCH "CADRE_WATCH"               /* the directory, as its paths begin */
#define CALLS_RECORD "CADRE_RECORD"             /* file for the records */
#define CALLS_DIE_AT "CADRE_DIE_AT"             /* number of the call to die at, from 1 */
#define CALLS_DIE_AFTER "CADRE_DIE_AFTER"       /* 1: when it is done; 0: before it, and half way through a write */
#define CALLS_FROM_DRAFT "CADRE_DIE_FROM_DRAFT" /* 1: counting begins with the first draft that is made */
