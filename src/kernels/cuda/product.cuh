/* The forms of the products: product_sm90.cu for what Hopper's matrix units can take; product_mma.cu for what the matrix units of
 * other devices can, product.cu for everything (both in product_tiles.cuh). */
#pragma once

#include "kernels/cuda/common.cuh"

/* Each returns false, having done nothing, where an operand is not made for it: another dtype, dimension, alignment or
 * device. Arguments as in kernels.h. */
extern "C" {
bool sm90_forward(struct tensor x, struct tensor rows, struct tensor offsets, struct packed w, struct tensor y,
                  bool accumulate);
bool sm90_forward_onto(struct tensor x, struct packed w, struct tensor base, struct tensor y);
bool sm90_swiglu_forward(struct tensor x, struct tensor rows, struct tensor offsets, struct packed gate_weight,
                         struct packed up_weight, struct tensor row_weight, struct tensor gate, struct tensor up,
                         struct tensor act);
bool sm90_swiglu_backward(struct tensor dy, struct tensor rows, struct tensor offsets, struct packed w, struct tensor gate,
                          struct tensor up, struct tensor row_weight, struct tensor act, struct tensor drow_weight);
bool sm90_backward_inputs(const struct product_term *terms, int term_count, struct tensor rows, struct tensor offsets,
                          struct tensor dx, bool accumulate);
bool sm90_backward_weight(struct tensor dy, struct tensor dy_rows, struct tensor x, struct tensor x_rows,
                          struct tensor offsets, struct tensor dw, bool accumulate);
}
