/* The gated activation of vectors: act = silu(gate) * up, silu(x) = x * sigmoid(x). Private to kernels/cpu/isa/. */
#pragma once

#include "kernels/cpu/isa/exp.h"

ALWAYS_INLINE vector_f32 vector_sigmoid(vector_f32 x) {
    return 1 / (1 + vector_exp(-x));
}

ALWAYS_INLINE vector_f32 swiglu_value(vector_f32 gate, vector_f32 up) {
    return gate / (1 + vector_exp(-gate)) * up;
}

/* What the gradient of act meets on its way back: dgate = dact * slope, dup = dact * silu; act once more. */
struct swiglu_factors {
    vector_f32 slope, silu, act;
};

ALWAYS_INLINE struct swiglu_factors swiglu_factors(vector_f32 gate, vector_f32 up) {
    vector_f32 sigmoid = vector_sigmoid(gate), silu = gate * sigmoid;
    return (struct swiglu_factors){up * sigmoid * (1 + gate * (1 - sigmoid)), silu, silu * up};
}
