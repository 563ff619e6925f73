/* The sizes that the layers of a model ask for, made from its configuration in one place. Private to model/. */
#pragma once

#include "model/workspace.h"

struct attention_dims dims_attention(const struct model *model, int64_t batch, int64_t sequence_length);
struct router_dims dims_router(const struct model *model, int64_t rows);
struct expert_dims dims_expert(const struct model *model, int64_t rows);
struct head_dims dims_head(const struct model *model, int64_t rows);
bool model_is_dense(const struct model *model);
