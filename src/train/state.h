/* What a checkpoint's training/state.json holds besides tensors: where a run stands. */
#pragma once

#include "model/model.h"

struct tokenizer;

struct train_state {
    int64_t step;      /* updates done */
    int64_t sequences; /* drawn from the loader: its cursor */
    int64_t tokens;    /* learnt from */
};

/* Publish checkpoints_dir/step-N: a Hugging Face directory (config.json, generation_config.json, model.safetensors in
 * f32, tokenizer.json, tokenizer_config.json) with training/ inside (state.json, optimizer.safetensors, config.ini). It
 * appears whole or not at all; then all but the newest `keep` are removed. */
struct checkpoint_sources {
    const char *checkpoints_directory;
    const char *tokenizer_path; /* copied */
    const char *config_path;    /* config.ini, copied */
    const struct model *model;
    const struct tokenizer *tokenizer;
    struct train_state state;
    int64_t keep;
};
enum status checkpoint_save(const struct checkpoint_sources *sources) MUST_USE;

/* Fill model and state from the newest good checkpoint. *found is false where there is none. */
enum status checkpoint_resume(const char *checkpoints_directory, struct model *model, struct train_state *state,
                              bool *found) MUST_USE;
