/* What several verbs share: opening a model with the flags --precision, --device, --kernels and --threads. */
#pragma once

#include "base/text.h"
#include "infer/load.h"

struct model_flags {
    const char *model, *precision, *device, *kernels;
    int64_t threads;
};

/* All of standard input, after what `out` has. */
enum status common_read_stdin(struct text *out) MUST_USE;

/* --precision auto is bf16 where the device multiplies it faster and no kernels were named. Fails with STATUS_USAGE where --model
 * is missing or a flag makes no sense. */
enum status common_load(const struct model_flags *flags, int64_t position_count, struct loaded_model *out) MUST_USE;
