/* The table of the CUDA device. */
#pragma once

#include "kernels/kernels.h"

const struct kernel_ops *kernels_cuda(void);

/* From now on without what only Hopper has, as on every device from sm_80 on; without kernels of their own for few rows and few
 * queries, whose place tiles take. Before any operation. */
void kernels_cuda_leave_out(bool hopper, bool few);

size_t cuda_scratch_bytes(void);
