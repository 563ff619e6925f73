/* Powers of two for whole vectors. Private to kernels/cpu/isa/. */
#pragma once

#include "kernels/cpu/isa/vector.h"

/* 2^x, relative error below 2e-7 for -126 <= x < 127.5; 0 below -126.5, infinity above 127.5, NaN for NaN, 1 for 0.
 *
 * 2^x = 2^n 2^r, n the nearest integer. Adding 1.5 * 2^23 rounds x to n and leaves n in the lowest bits, from where it
 * is shifted into an exponent. 2^r - 1 is a minimax polynomial over |r| <= 1/2. The bounds of x become the exponents
 * that stand for 0 and for infinity. */
ALWAYS_INLINE vector_f32 vector_exp2(vector_f32 x) {
    const float rounder = 0x1.8p23f;
    x = vector_min(vector_splat(128), vector_max(vector_splat(-127), x));
    vector_f32 rounded = x + rounder;
    vector_f32 r = x - (rounded - rounder);
    vector_f32 power = (vector_f32)(((vector_u32)rounded << 23) + 0x3F800000u);
    vector_f32 p = r * 0.00132647296f + 0.00967151579f;
    p = p * r + 0.0555073358f;
    p = p * r + 0.240222424f;
    p = p * r + 0.693147004f;
    p = p * r + 1.0f;
    return p * power;
}
