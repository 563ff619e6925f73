/* Publishing a checkpoint directory whole or not at all.
 *
 * A save writes into step-000100.tmp-PID. When all files stand and are flushed, a manifest with the size and the hashes
 * of every file is written last, and the directory is renamed to step-000100. The newest directory whose manifest
 * verifies is the latest checkpoint; there is no pointer to it that could go stale. What a crash leaves behind is a
 * .tmp directory, which the next save removes, or, in the middle of replacing a step, the older one as
 * step-000100.old-PID, which still counts and gets its name back at the next save.
 *
 * The manifest, training/manifest.json:
 *   {"manifest_xxh3_64": hash of this text with its own digits as zeros, "version": 2, "chunk_bytes": 4194304,
 *    "files": {"model.safetensors": {"bytes": N, "xxh3_64": [one hash for each chunk, seeded with where it begins]},
 * ...}}
 *
 * Nothing here is collective. One process writes into a directory of checkpoints at a time; many may read.
 */
#pragma once

#include "base/status.h"
#include <stdint.h>

struct checkpoint_draft {
    char *directory; /* that checkpoints live in */
    char *path;      /* to write files into; it has a subdirectory training/ */
    char *final_path;
};

/* Make an empty draft of step-NNNNNN in `directory`, which is made if missing; leftovers in it are settled first. Ends
 * with commit or abandon. Requires step >= 0. */
enum status checkpoint_begin(struct checkpoint_draft *draft, const char *directory, int64_t step) MUST_USE;

/* Flush every file and directory below the draft, write the manifest, rename; a checkpoint of the same step is
 * replaced. On failure the draft is removed and everything older stands; only where the last flush of `directory`
 * failed may the new checkpoint be there as well. */
enum status checkpoint_commit(struct checkpoint_draft *draft) MUST_USE;
void checkpoint_abandon(struct checkpoint_draft *draft);

/* Check a published directory against its manifest: every file there, of its size, with its hashes. STATUS_FORMAT names
 * the first file that is not, and where. */
enum status checkpoint_verify(const char *path) MUST_USE;

/* The newest checkpoint that verifies, as a fresh path; those that do not are passed over with a warning that names the
 * file and what is wrong. STATUS_NOT_FOUND where there is none. Reads the whole checkpoint. */
enum status checkpoint_latest(const char *directory, char **path, int64_t *step) MUST_USE;

/* Delete all but the newest keep_count, and never the newest one that verifies (so one more may stay, and nothing is
 * deleted where none verifies). Reads one whole checkpoint where there is something to delete. */
enum status checkpoint_keep(const char *directory, int64_t keep_count) MUST_USE;
