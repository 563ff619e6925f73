/* A model's tensors under the names of Hugging Face files: one a parameter, one an expert. */
#pragma once

#include "model/model.h"
#include "tensor/named.h"

/* Views of `array` (model->weight, model->moment1, ...) in the order of the table, each name after `prefix`.
 * The caller frees *items. */
enum status model_name_tensors(const struct model *model, const struct tensor *array, const char *prefix,
                               struct named_tensor **items, int *count) MUST_USE;
