/* The exponential function of a vector. Private to kernels/cpu/isa/. */
#pragma once

#include "kernels/cpu/isa/vector.h"

#include <math.h>

/* exp(x) with a relative error below 2e-7; 0 where it is below 2e-38, infinity where it is beyond floats, NaN for NaN.
 *
 * x = n ln 2 + r with |r| <= ln 2 / 2. exp(r) is a polynomial (of the Cephes library's expf); twice that times 2^(n-1)
 * needs no exponent that a float lacks. Adding 1.5 * 2^23 + 126 rounds to an integer and leaves n + 126 in the lowest
 * bits: shifted up, they are the float 2^(n-1). */
ALWAYS_INLINE vector_f32 vector_exp(vector_f32 x) {
    const vector_f32 round = vector_splat(12583038.0f);
    vector_f32 shifted = x * 1.44269504f + round;
    vector_f32 n = shifted - round;
    vector_f32 power = (vector_f32)((vector_u32)shifted << 23);
    vector_f32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2, the first part exact in few bits */
    vector_f32 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1;
    vector_f32 value = (p + p) * power;
    value = vector_select(x < -86.9f, (vector_f32){0}, value);
    return vector_select(x > 88.72283f, vector_splat(INFINITY), value);
}
