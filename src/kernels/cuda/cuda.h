/* The table of the CUDA device. */
#pragma once

#include "kernels/kernels.h"

const struct kernel_ops *kernels_cuda(void);

size_t cuda_scratch_bytes(void);
