/* Dense products by oneDNN, with results that do not depend on the number of threads. */
#pragma once

#include "tensor/tensor.h"

/* kernel_ops.gemm for operands of f32 and bf16 whose shapes were checked; M, N and K may be 0.
 *
 * Where oneDNN has no bf16 product (processors without AVX-512) or an unsound one (AMX, K not a multiple of 32),
 * operands become f32 in scratch memory of the call.
 */
void gemm_onednn(struct tensor a, bool transpose_a, struct tensor b, bool transpose_b, struct tensor c,
                 bool accumulate);
