/* Opening a model that somebody trained. */
#pragma once

#include "data/tokenizer.h"
#include "model/model.h"

struct load_options {
    const struct kernel_ops *ops;
    const struct device *device; /* NULL: the processor */
    enum dtype compute;     /* DTYPE_F32 or DTYPE_BF16 */
    int64_t position_count; /* longest sequence to be run; at most the model's */
};

struct loaded_model {
    struct model *model;
    struct tokenizer *tokenizer;
    char *path; /* the directory that was opened */
};

/* Open DIR: a Hugging Face directory, or a run directory, whose newest good checkpoint it then is. Of a checkpoint with a
 * manifest the model is verified first, not what only a resume reads. Fails on any tensor that is missing, of another shape, or
 * belongs to no part of the model. Release with loaded_model_release. */
enum status model_load(const char *directory, struct load_options options, struct loaded_model *out) MUST_USE;
void loaded_model_release(struct loaded_model *loaded);

/* The directory that model_load would open, in fresh memory; the caller frees it. */
enum status model_find(const char *directory, char **path) MUST_USE;
