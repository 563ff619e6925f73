/* Dense products: a library's, see gemm_onednn.h; double precision goes to the reference. */
#include "kernels/cpu/isa/lanes.h"

#include "kernels/cpu/fillers.h"
#include "kernels/cpu/gemm_onednn.h"

static void gemm(struct tensor a, bool transpose_a, struct tensor b, bool transpose_b, struct tensor c,
                 bool accumulate) {
    if (is_f64(a)) {
        kernels_ref()->gemm(a, transpose_a, b, transpose_b, c, accumulate);
        return;
    }
    gemm_onednn(a, transpose_a, b, transpose_b, c, accumulate);
}

void ISA_NAME(gemm_fill)(struct kernel_ops *ops) {
    ops->gemm = gemm;
}
