/* What a checkpoint's training/state.json holds besides tensors: where a run stands. */
#pragma once

#include "checkpoint/publish.h"
#include "model/model.h"
#include "parallel/outer.h"
#include "train/guard.h"
#include "train/parts.h"

struct tokenizer;

struct train_state {
    int64_t step;                /* updates done */
    int64_t sequences;           /* drawn from the loader: its cursor */
    int64_t tokens;              /* learnt from */
    double best_valid_loss;      /* of the checkpoints that were saved at an evaluation */
    int64_t best_step;           /* of that; -1: none yet */
    struct guard guard;          /* what steps are held against, on this rank's island; empty where the file has none */
    struct checkpoint_form form; /* of the checkpoint that was read; without islands it has nothing of what follows */
    struct outer_plan plan;      /* when they met */
    bool has_report;             /* a fragment was received that was not mixed in yet: what came of it */
    struct outer_report report;  /* but for waited_s */
};

/* What a checkpoint says: a Hugging Face directory (config.json, generation_config.json, model.safetensors,
 * tokenizer.json, tokenizer_config.json) with training/ inside (state.json, config.ini, and more tensors). The tensors
 * (train/parts.h) are written by train/saver.h, which also sets the state's form and plan. */
struct checkpoint_sources {
    const char *tokenizer_path; /* copied */
    const char *config_path;    /* config.ini, copied */
    const char *metrics_path;   /* flushed: a power cut takes no line of a step before the checkpoint; NULL: none */
    const struct model_config *model;
    const struct tokenizer *tokenizer;
    struct train_state state;
    struct checkpoint_retention keep;  /* of older ones; good_step is not looked at */
    const struct guard *island_guards; /* [islands] in the place of the state's, on rank 0; NULL without islands */
};

/* All but the tensors, into a draft. Not collective. */
enum status checkpoint_write_files(const char *root, const struct checkpoint_sources *sources) MUST_USE;

/* Where a checkpoint stands: its training/state.json, as island 0 sees it. */
enum status checkpoint_read_state(const char *checkpoint, struct train_state *state) MUST_USE;

/* Who reads the tensors of replicas that hold the same. */
enum checkpoint_read {
    CHECKPOINT_READ_EACH,      /* each what it owns: where the file system is faster than the network */
    CHECKPOINT_READ_BROADCAST, /* the first replica of an island, and the others receive it */
};

/* Collective. Fill model, outer (NULL: a run without islands) and state from the newest good checkpoint, whatever
 * layout and however many islands wrote it: each rank reads the rows that it owns, in one pass, and checks them;
 * together that is all of it.
 *
 *   plain to plain   weights and moments
 *   M islands to N   the global weights and the outer momentum; island i: weights, moments and guard of island i mod M
 *   plain to N       every island: the weights, also as the global ones, the moments and the guard; no outer momentum
 *   M to plain       the global weights; the moments and the guard of island 0
 *
 * A damaged one is passed over with a warning; one that is whole and does not fit the model is an error. path is empty
 * where there is none; model and outer may then be filled with parts of a bad one. What ranks compute with is to be
 * refreshed by the caller, and what the islands had under way is his to go on with (outer_resume). */
enum { CHECKPOINT_PATH_BYTES = 4096 };
enum status checkpoint_resume(const char *checkpoints_directory, struct model *model, struct outer *outer,
                              struct ranks *ranks, enum checkpoint_read read, struct train_state *state,
                              char path[CHECKPOINT_PATH_BYTES]) MUST_USE;
