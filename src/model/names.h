/* A model's tensors under the names of Hugging Face files: one a parameter, one an expert. */
#pragma once

#include "model/model.h"
#include "tensor/named.h"

/* Views of `array` (model->own_weight, moment1 or moment2: what this rank owns) in the order of the table, each name after
 * `prefix`; all names of the whole model, those of which nothing is held here with 0 rows. The caller frees *items. */
enum status model_name_tensors(const struct model *model, const struct tensor *array, const char *prefix,
                               struct named_tensor **items, int *count) MUST_USE;

/* File tensor `index` of a row as held under a sharding: rows and where they begin, data in `own` (the row's view, or none).
 * Name left empty. */
struct named_tensor model_file_part(const struct sharding *sharding, const struct parameter *row, int64_t index,
                                    struct tensor own);
