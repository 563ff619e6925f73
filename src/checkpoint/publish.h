/* Publishing a checkpoint directory whole or not at all.
 *
 * A save writes into step-000100.tmp-PID. When all files stand and are flushed, a manifest with the size and the hashes of
 * every file is written last, and the directory is renamed to step-000100. The newest directory whose manifest verifies
 * is the latest checkpoint; there is no pointer to it that could go stale. What a crash leaves behind is a .tmp directory,
 * which the next save removes.
 */
#pragma once

#include "base/status.h"
#include <stdint.h>

struct checkpoint_draft {
    char *directory; /* that checkpoints live in */
    char *path;      /* to write files into; it has a subdirectory training/ */
    char *final_path;
};

/* Make an empty draft of step-NNNNNN in `directory`, which is made if missing. Ends with commit or abandon. */
enum status checkpoint_begin(struct checkpoint_draft *draft, const char *directory, int64_t step) MUST_USE;

/* Flush, write the manifest, rename. On failure the draft is removed and everything older stands. */
enum status checkpoint_commit(struct checkpoint_draft *draft) MUST_USE;
void checkpoint_abandon(struct checkpoint_draft *draft);

/* Check a published directory against its manifest: every file there, of its size, with its hashes. STATUS_FORMAT names
 * the first file that is not, and where. */
enum status checkpoint_verify(const char *path) MUST_USE;

/* The newest checkpoint that verifies, as a fresh path; those that do not are passed over with a warning.
 * STATUS_NOT_FOUND where there is none. */
enum status checkpoint_latest(const char *directory, char **path, int64_t *step) MUST_USE;

/* Remove all but the newest keep_count. Never touches the newest. */
enum status checkpoint_keep(const char *directory, int64_t keep_count) MUST_USE;
