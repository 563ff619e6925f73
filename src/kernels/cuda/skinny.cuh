/* Products one side of which is as narrow as the number of experts: those of the router. */
#pragma once

#include "kernels/cuda/common.cuh"

/* As gemm of kernels.h; false, having done nothing, for other shapes. */
bool skinny_gemm(struct tensor a, bool transpose_a, struct tensor b, bool transpose_b, struct tensor c, bool accumulate);
