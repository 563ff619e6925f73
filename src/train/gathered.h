/* Writing tensors that lie on many ranks into one file: each comes to rank 0 when its turn is, and goes to the file. */
#pragma once

#include "model/model.h"
#include "parallel/ranks.h"

/* Rows of the model's table under one prefix: { model->moment1, "m." }. */
struct gathered_array {
    const struct tensor *own; /* own_weight, moment1 or moment2 */
    const char *prefix;
};

/* Collective. One safetensors file of all arrays, written by rank 0 of the world and flushed; the others send what they
 * own. Every rank learns how it ended. */
enum status gathered_write(const char *path, const struct model *model, struct ranks *ranks,
                           const struct gathered_array *arrays, int array_count) MUST_USE;
