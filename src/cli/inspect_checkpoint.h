/* What `cadre inspect` says of a checkpoint or of all that a run has. */
#pragma once

#include "base/status.h"
#include <stdbool.h>

struct inspect_checkpoint_options {
    bool verify;  /* read every byte */
    bool tensors; /* list them */
    bool json;
    enum status (*print_model)(const char *path); /* what the model in a directory is */
};

/* True for a checkpoint (it has a manifest) and for a run's directory (it has checkpoints). */
bool inspect_is_checkpoint(const char *directory);

/* Print one checkpoint, or a run's: each in a line, what the newest good one holds, and what a resume would do. Looks at the
 * manifests and the files' sizes, or at everything. STATUS_FORMAT where one of them is damaged, after all was printed. */
enum status inspect_checkpoint(const char *directory, struct inspect_checkpoint_options options) MUST_USE;
