/* Publishing a checkpoint directory whole or not at all.
 *
 * A save writes into step-000100.tmp-PID. When all files stand and are flushed, a manifest with the size and the hashes
 * of every file is written last, and the directory is renamed to step-000100. The newest directory whose manifest
 * verifies is the latest checkpoint; there is no pointer to it that could go stale. What a crash leaves behind is a
 * .tmp directory, which the next save removes, or, in the middle of replacing a step, the older one as
 * step-000100.old-PID, which still counts and gets its name back at the next save.
 *
 * The manifest, training/manifest.json:
 *   {"manifest_xxh3_64": hash of this text with its own digits as zeros, "version": 4,
 *    "files": {"model.safetensors": {"bytes": N, "extent_bytes": [...], "xxh3_64": [...]}, ...}}
 * A file is covered by extents without holes, each with a hash of what was written there. How it is cut says nothing: whoever
 * wrote a part hashed it from his own memory. The hash of an extent is that of the hashes of its blocks (what lies of it in each
 * block of 4096 bytes of the file; u64, little-endian), seeded with where it begins: blocks can be hashed long before it is
 * known how a file is cut. Still read: version 3, where it is the hash of the extent itself, likewise seeded; version 2, which
 * moreover has no extent_bytes, and cuts every file into pieces of 4 MiB.
 *
 * Nothing here is collective. One process at a time begins, commits and deletes in a directory of checkpoints; many may
 * read, and many may write into the files of a draft (checkpoint/sharded.h).
 */
#pragma once

#include "base/hash.h"
#include "base/status.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { CHECKPOINT_EXTENT_BYTES_MAX = 4 << 20 };

/* A stretch of a file: at most CHECKPOINT_EXTENT_BYTES_MAX. */
struct checkpoint_extent {
    uint64_t begin, hash;
    uint32_t bytes;
    int32_t file; /* index among some names */
};

/* The hash of an extent that begins at `begin` of its file, from its bytes. Or from parts of it, which meet at blocks of the
 * file; known, where not NULL, spares hashing blocks that lie to the blocks of memory as in the file. */
struct file_part;
uint64_t checkpoint_extent_hash(const void *data, size_t bytes, uint64_t begin);
uint64_t checkpoint_parts_hash(const struct file_part *parts, int count, uint64_t begin, const struct known_hashes *known);

struct checkpoint_draft {
    char *directory; /* that checkpoints live in */
    char *path;      /* to write files into; it has a subdirectory training/ */
    char *final_path;
};

/* Remove what saves that did not end have left in a directory that is there, and give a checkpoint that was being replaced its
 * name back. Every save begins with it. */
enum status checkpoint_settle(const char *directory) MUST_USE;

/* Make an empty draft of step-NNNNNN in `directory`, which is made if missing; leftovers in it are settled first. Ends
 * with commit or abandon. Requires step >= 0. */
enum status checkpoint_begin(struct checkpoint_draft *draft, const char *directory, int64_t step) MUST_USE;

/* Files of a draft that were flushed by those who wrote them, and the hashes of what they wrote. */
struct checkpoint_written {
    const char *const *names; /* [name_count] below the root */
    int name_count;
    struct checkpoint_extent *extents; /* [extent_count], in any order; sorted by commit; together all of these files */
    size_t extent_count;
};

/* Flush every other file and every directory below the draft, write the manifest, rename; a checkpoint of the same step is
 * replaced. written NULL: nothing was. On failure the draft is removed and everything older stands; only where the last
 * flush of `directory` failed may the new checkpoint be there as well. STATUS_FORMAT where extents do not cover a file. */
enum status checkpoint_commit(struct checkpoint_draft *draft, const struct checkpoint_written *written) MUST_USE;
void checkpoint_abandon(struct checkpoint_draft *draft);

/* What a manifest says. */
struct checkpoint_file {
    char *name; /* below the root */
    uint64_t bytes;
    struct checkpoint_extent *extents; /* [extent_count], from front to back */
    size_t extent_count;
};
struct checkpoint_manifest {
    struct checkpoint_file *files; /* in the order of the manifest */
    size_t file_count;
    bool hashes_whole_extents; /* before version 4 */
};

/* Read the manifest of a published directory and check it against its own hash. */
enum status checkpoint_manifest_open(struct checkpoint_manifest *manifest, const char *path) MUST_USE;
void checkpoint_manifest_close(struct checkpoint_manifest *manifest);

/* Bytes of a file that somebody wants. */
struct checkpoint_target {
    int file; /* of the manifest */
    uint64_t begin, bytes;
    void *data; /* where they go, in the memory of a device; NULL: they are only checked */
};

/* Index of a file among those of the manifest; -1 where there is none. */
int checkpoint_find_file(const struct checkpoint_manifest *manifest, const char *name);

/* Read every extent that meets a target, once and whole, check its hash, and put the bytes where they are wanted; sorts the
 * targets, which do not overlap. Files that have a target must be there in their size. STATUS_FORMAT names the first file that
 * is not as it was written, and where; what the targets point to is then partly filled. Uses the threads. */
struct device;
enum status checkpoint_read(const char *path, const struct checkpoint_manifest *manifest, struct checkpoint_target *targets,
                            size_t target_count, const struct device *device) MUST_USE;

/* Check a published directory against its manifest: every file there, of its size, with its hashes. */
enum status checkpoint_verify(const char *path) MUST_USE;

/* The same of the model alone, which is all but the folder training/: of the moments nothing is read. */
enum status checkpoint_verify_model(const char *path) MUST_USE;

/* Paths of all checkpoints of a directory, newest first, whether good or not; an empty list where there is none. */
struct text_list;
enum status checkpoint_list(const char *directory, struct text_list *paths) MUST_USE;

/* The step that a path ends with; -1 where it is not a checkpoint's. */
int64_t checkpoint_step_of(const char *path);

/* The newest checkpoint that `verify`, one of the two above, finds good, as a fresh path; others are passed over with a warning
 * that names the file and what is wrong. STATUS_NOT_FOUND where there is none. */
enum status checkpoint_latest(const char *directory, enum status (*verify)(const char *path), char **path,
                              int64_t *step) MUST_USE;

/* Which checkpoints stay. */
struct checkpoint_retention {
    int64_t newest;      /* so many of the newest, 1 or more */
    int64_t every_steps; /* and those of every step that this divides; 0: none */
    int64_t best_step;   /* and that of this step; -1: none */
    int64_t good_step;   /* known to be good, e.g. just written: spares reading it; -1: none */
};

/* Delete all others, and never the newest one that verifies (so one more may stay, and nothing is deleted where none
 * verifies). Reads one whole checkpoint where there is something to delete and the newest is not the good one. */
enum status checkpoint_keep(const char *directory, struct checkpoint_retention keep) MUST_USE;
