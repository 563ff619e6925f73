/* Forward products with few rows: those of one token, or of a few, where the time is that of reading the weights once. */
#pragma once

#include "kernels/cuda/common.cuh"

/* As the operations of kernels.h; false, having done nothing, for more rows, for operands that are not aligned to 16 bytes, and
 * where the inner dimension is not whole eights. x and w: of one dtype, or bf16 and f32. */
bool few_forward(struct tensor x, struct tensor rows, struct tensor offsets, struct packed w, struct tensor y, bool accumulate);
bool few_forward_onto(struct tensor x, struct packed w, struct tensor base, struct tensor y);
bool few_swiglu_forward(struct tensor x, struct tensor rows, struct tensor offsets, struct packed gate_weight,
                        struct packed up_weight, struct tensor row_weight, struct tensor gate, struct tensor up, struct tensor act);
