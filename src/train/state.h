/* What a checkpoint's training/state.json holds besides tensors: where a run stands. */
#pragma once

#include "model/model.h"
#include "parallel/ranks.h"
#include "train/guard.h"

struct tokenizer;

struct train_state {
    int64_t step;      /* updates done */
    int64_t sequences; /* drawn from the loader: its cursor */
    int64_t tokens;    /* learnt from */
    struct guard guard; /* what steps are held against; empty where the file has none */
};

/* Collective. Rank 0 publishes checkpoints_dir/step-N: a Hugging Face directory (config.json, generation_config.json,
 * model.safetensors in f32, tokenizer.json, tokenizer_config.json) with training/ inside (state.json,
 * optimizer.safetensors, config.ini). It appears whole or not at all; then all but the newest `keep` are removed. */
struct checkpoint_sources {
    const char *checkpoints_directory;
    const char *tokenizer_path; /* copied */
    const char *config_path;    /* config.ini, copied */
    const struct model *model;
    struct ranks *ranks;
    const struct tokenizer *tokenizer;
    struct train_state state;
    int64_t keep;
};
enum status checkpoint_save(const struct checkpoint_sources *sources) MUST_USE;

/* Collective. Fill model and state from the newest good checkpoint, whatever layout wrote it: every rank reads the rows
 * that it owns. path is empty where there is none. What ranks compute with is to be refreshed by the caller. */
enum { CHECKPOINT_PATH_BYTES = 4096 };
enum status checkpoint_resume(const char *checkpoints_directory, struct model *model, struct ranks *ranks,
                              struct train_state *state, char path[CHECKPOINT_PATH_BYTES]) MUST_USE;
