/* Tensors with the names that files give them. */
#pragma once

#include "tensor/tensor.h"

enum { TENSOR_NAME_BYTES = 128 };

struct named_tensor {
    char name[TENSOR_NAME_BYTES];
    struct tensor tensor;
};
