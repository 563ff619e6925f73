#include "train/roof.h"

#include "base/clock.h"

enum { ROOF_SIZE = 1024 };

enum status roof_measure(const struct kernel_ops *ops, const struct device *device, enum dtype compute, double seconds,
                         double *operations_per_s) {
    struct tensor a = tensor_2d(NULL, compute, ROOF_SIZE, ROOF_SIZE), b = a, c = a;
    c.dtype = compute == DTYPE_F64 ? DTYPE_F64 : DTYPE_F32;
    struct arena arena;
    TRY(arena_init(&arena, device, 2 * tensor_bytes(a) + tensor_bytes(c) + 3 * 64));
    a.data = arena_take(&arena, tensor_bytes(a));
    b.data = arena_take(&arena, tensor_bytes(b));
    c.data = arena_take(&arena, tensor_bytes(c));
    ops->fill(a, 1e-3);
    ops->fill(b, 1e-3);
    ops->gemm(a, false, b, true, c, false); /* the first call builds what the library needs */
    double best = 0, begin = clock_seconds();
    do {
        double call_begin = clock_seconds();
        ops->gemm(a, false, b, true, c, false);
        double rate = 2.0 * ROOF_SIZE * ROOF_SIZE * ROOF_SIZE / (clock_seconds() - call_begin);
        best = rate > best ? rate : best;
    } while (clock_seconds() - begin < seconds);
    arena_release(&arena);
    *operations_per_s = best;
    return STATUS_OK;
}
