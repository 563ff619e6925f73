/* A forward pass through a model whose weights may be divided over ranks. */
#pragma once

#include "model/block.h"
#include "parallel/traffic.h"

/* From workspace->ids to loss_sum and row_loss of its targets; statistics are added up where the model has experts. The next
 * block's weights are gathered while a block computes. Collective where `traffic` is one of several ranks, also for a rank
 * whose workspace has no row; NULL: a model of one process. */
enum status pass_forward(const struct model *model, struct workspace *workspace, struct traffic *traffic) MUST_USE;
