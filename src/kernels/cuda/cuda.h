/* The table of the CUDA device. */
#pragma once

#include "kernels/kernels.h"

const struct kernel_ops *kernels_cuda(void);

/* From now on without what only Hopper has: as on every device from sm_80 on. Before any operation. */
void kernels_cuda_general(void);

size_t cuda_scratch_bytes(void);
