/* The exponential function of a vector. Private to kernels/cpu/isa/. */
#pragma once

#include "kernels/cpu/isa/vector.h"

#include <math.h>

/* exp(x) with a relative error below 2e-7; 0 where it is below 2e-38, infinity where it is beyond floats, NaN for NaN.
 *
 * x = n ln 2 + r with |r| <= ln 2 / 2; exp(r) is a polynomial (of the Cephes library's expf). Adding 1.5 * 2^23 + 126
 * to x / ln 2 rounds it to an integer and leaves n + 126 in the lowest bits: shifted up, they are the float 2^(n-1),
 * which every n in question has; twice the polynomial is multiplied by it. */
ALWAYS_INLINE vector_f32 vector_exp(vector_f32 x) {
    const vector_f32 round = vector_splat(12583038.0f);
#ifdef __AVX512F__
    __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, (__m512)vector_splat(-86.9f), _CMP_NLT_UQ);
    x = (vector_f32)_mm512_min_ps((__m512)vector_splat(89.0f), (__m512)x); /* x where it is NaN */
#endif
    vector_f32 shifted = x * 1.44269504f + round;
    vector_f32 n = shifted - round;
    vector_f32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2, the first part exact in few bits */
    vector_f32 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r + 1) * r + 1;
#ifdef __AVX512F__
    return (vector_f32)_mm512_maskz_scalef_ps(counts, (__m512)p, (__m512)n); /* p 2^n, infinity included */
#else
    vector_f32 value = (p + p) * (vector_f32)((vector_u32)shifted << 23);
    value = vector_select(x < -86.9f, (vector_f32){0}, value);
    return vector_select(x > 88.72283f, vector_splat(INFINITY), value);
#endif
}
