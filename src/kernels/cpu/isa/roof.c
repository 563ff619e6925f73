/* How fast this instruction set multiplies when nothing else is in the way: multiply-adds on registers, no memory. */
#include "kernels/cpu/fillers.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa/panel.h"

/* Independent sums: more than hide the latency of one addition. With just as many the processor's scheduler loses a tenth of
 * bf16 on Zen 5; with all registers the compiler keeps some in memory. */
#ifdef __AVX512F__
enum { CHAINS = 16 };
#else
enum { CHAINS = 12 };
#endif

#if defined(__x86_64__)
#define KEEP_IN_REGISTER(v) __asm__ volatile("" : "+v"(v))
#else
#define KEEP_IN_REGISTER(v) __asm__ volatile("" : "+w"(v))
#endif

/* Multiply-adds of vectors, of pairs of bf16 where `pairs`. */
ALWAYS_INLINE double multiply_vectors(bool pairs, int64_t rounds) {
    vector_f32 sum[CHAINS] = {{0}}, a = {0}, b = {0};
    for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 16
        for (int j = 0; j < CHAINS; j++)
            sum[j] = vector_multiply_add(pairs, a, b, sum[j]);
#pragma GCC unroll 16
        for (int j = 0; j < CHAINS; j++)
            KEEP_IN_REGISTER(sum[j]);
    }
    return 2.0 * (pairs ? 2 : 1) * VECTOR_LANES * CHAINS * (double)rounds;
}

#ifdef __AMX_BF16__
static double multiply_tiles(int64_t rounds) {
    static const float zeros[AMX_TILE_FLOATS];
    amx_prepare();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, zeros, 64);
    _tile_loadd(5, zeros, 64);
    _tile_loadd(6, zeros, 64);
    _tile_loadd(7, zeros, 64);
    for (int64_t i = 0; i < rounds; i++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    return 4.0 * 2 * AMX_ROWS * AMX_ROWS * 2 * AMX_WORDS * (double)rounds;
}
#endif

static double multiply_registers(enum dtype dtype, int64_t rounds) {
#ifdef __AMX_BF16__
    if (dtype == DTYPE_BF16)
        return multiply_tiles(rounds);
#endif
    if (dtype == DTYPE_F64)
        return kernels_ref()->multiply_registers(dtype, rounds);
    if (BF16_PAIRS && dtype == DTYPE_BF16)
        return multiply_vectors(true, rounds);
    return multiply_vectors(false, rounds);
}

static const char *multiply_unit(enum dtype dtype) {
    if (dtype == DTYPE_BF16 && BF16_TILES)
        return "matrix tiles";
    if (dtype == DTYPE_BF16 && BF16_PAIRS)
        return "bf16 vectors";
    return "fp32 vectors";
}

void ISA_NAME(roof_fill)(struct kernel_ops *ops) {
    ops->multiply_registers = multiply_registers;
    ops->multiply_unit = multiply_unit;
}
