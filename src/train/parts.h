/* Which tensors a checkpoint holds, and in which files: the one description that saving, resuming and inspecting read.
 *
 *   without islands   model                the weights
 *                     training/optimizer   "m." and "v.", the moments of AdamW
 *   with M islands    model                the global weights, which all islands share
 *                     training/outer       "b.", the momentum of the outer optimizer, likewise
 *                     training/island-N    "w.", "m." and "v." of island N: its weights and their moments; N = 0 .. M-1
 *   rounded           model                in bf16, read by nobody but to be checked; training/optimizer, or with islands
 *                                          training/outer, has the same weights in f32 as well, "w."
 *
 * A part is the file STEM.safetensors, or several with an index (checkpoint/sharded.h), of all tensors of the model
 * under each of its prefixes. It follows from the model and the checkpoint's form alone. Not collective.
 */
#pragma once

#include "checkpoint/weights.h"
#include "model/model.h"
#include "parallel/outer.h"

enum { CHECKPOINT_STEM_BYTES = 64, CHECKPOINT_PART_ARRAYS = 3, CHECKPOINT_SHARED_PARTS = 2 };

/* What a checkpoint's parts follow from besides the model. */
struct checkpoint_form {
    int64_t island_count; /* 0: it has no islands */
    bool rounded;         /* the model's file is in bf16 */
};

struct checkpoint_array {
    const struct tensor *rows; /* [rows of the table] as model->own_weight */
    const char *prefix;
    bool has_no_place; /* only the shapes of `rows` are its own */
};

struct checkpoint_part {
    char stem[CHECKPOINT_STEM_BYTES]; /* below the checkpoint */
    struct checkpoint_array arrays[CHECKPOINT_PART_ARRAYS];
    int array_count;
    int64_t island; /* whose it is; -1: the same on all */
    bool rounded;   /* its file is in bf16, its rows in f32 */
};

/* Islands of a checkpoint that a run writes; outer NULL: 0, none. */
int64_t checkpoint_island_count(const struct model *model, const struct outer *outer);

int64_t checkpoint_part_count(struct checkpoint_form form);
void checkpoint_part_stem(struct checkpoint_form form, int64_t index, char stem[CHECKPOINT_STEM_BYTES]);

/* Part `index` of a checkpoint of such a form, as this rank holds it, or is to: a run without islands (outer
 * NULL) takes the global weights for its own and has no place for the outer momentum and for local weights. Of outer
 * only global and momentum are looked at. */
struct checkpoint_part checkpoint_part_at(const struct model *model, const struct outer *outer,
                                          struct checkpoint_form form, int64_t index);

/* Whether an island writes it or, of as many islands as the checkpoint has, reads it. */
bool checkpoint_part_is_of(const struct checkpoint_part *part, int64_t island);

/* What this rank holds of a part (model_name_tensors), one array after the other; without data where there is no place.
 * Of a rounded part they have the file's dtype, and their data are f32. The caller frees *items, also after a failure. */
enum status checkpoint_part_tensors(const struct model *model, const struct checkpoint_part *part,
                                    struct named_tensor **items, int *count) MUST_USE;

/* Open the files that a stem has in a checkpoint. Close with weights_close. */
enum status checkpoint_part_open(const char *checkpoint, const char *stem, struct weights *weights) MUST_USE;

/* The island that a file of a checkpoint belongs to, by its name below the checkpoint; -1: to none. */
int64_t checkpoint_island_of_file(const char *name);
