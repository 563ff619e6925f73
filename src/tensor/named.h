/* Tensors with the names that files give them. */
#pragma once

#include "tensor/tensor.h"

enum { TENSOR_NAME_BYTES = 128 };

/* A tensor of a file, or those of its rows (of its slowest dimension) that this rank holds: `tensor` has their number,
 * 0 or more, and begins at row first_row of whole_rows. whole_rows 0: it is the whole. */
struct named_tensor {
    char name[TENSOR_NAME_BYTES];
    struct tensor tensor;
    int64_t first_row, whole_rows;
};

/* The whole's shape, without data. */
static inline struct tensor named_tensor_whole(const struct named_tensor *item) {
    struct tensor whole = item->tensor;
    if (item->whole_rows > 0)
        whole.shape[0] = item->whole_rows;
    whole.data = NULL;
    return whole;
}
