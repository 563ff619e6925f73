/* What attention does to the rows of its blocks between the products. Private to kernels/cpu/isa/.
 *
 * A row of scores is read in whole vectors: what lies behind its last key is -infinity, see hide_keys. dtype is a
 * constant where these functions are called.
 */
#pragma once

#include "kernels/cpu/isa/exp2.h"
#include "kernels/cpu/isa/numbers.h"

#include <math.h>

/* to[at .. at+count-1] = scale * from[0 .. count-1]; `from` is read in whole vectors. */
ALWAYS_INLINE void row_store(enum dtype dtype, void *to, int64_t at, const float *from, int64_t count, float scale) {
    int64_t i = 0;
    for (; i + VECTOR_LANES <= count; i += VECTOR_LANES)
        numbers_store(dtype, to, at + i, VECTOR_LANES, vector_load(from + i) * scale);
    if (i < count)
        numbers_store(dtype, to, at + i, count - i, vector_load(from + i) * scale);
}

/* sum over `count` elements of a[at + i] * b[at + i] */
ALWAYS_INLINE float row_dot(enum dtype dtype, const void *a, const void *b, int64_t at, int64_t count) {
    vector_f32 sum = {0};
    int64_t i = 0;
    for (; i + VECTOR_LANES <= count; i += VECTOR_LANES)
        sum += numbers_load(dtype, a, at + i, VECTOR_LANES) * numbers_load(dtype, b, at + i, VECTOR_LANES);
    if (i < count)
        sum += numbers_load(dtype, a, at + i, count - i) * numbers_load(dtype, b, at + i, count - i);
    return vector_sum(sum);
}

/* Keys from `visible` on are hidden from a row of scores of `count` keys. */
ALWAYS_INLINE void hide_keys(float *scores, int64_t visible, int64_t count) {
    int64_t end = divide_up(count, VECTOR_LANES) * VECTOR_LANES;
    for (int64_t j = visible; j < end; j++)
        scores[j] = -INFINITY;
}

/* What a query knows of its scores so far: the highest one times the exponent, and the sum of its weights
 * 2^(exponent * score - most), lane by lane. */
struct softmax {
    vector_f32 sum;
    float most;
};

ALWAYS_INLINE struct softmax softmax_start(void) {
    return (struct softmax){.most = -INFINITY};
}

/* The highest score has risen: the sum and the output so far become relative to the new one. */
static inline void softmax_raise(struct softmax *s, float most, float *out, int64_t out_floats) {
    if (s->most > -INFINITY) {
        vector_f32 keep = vector_exp2(vector_splat(s->most - most));
        s->sum *= keep;
        for (int64_t i = 0; i < out_floats; i += VECTOR_LANES)
            vector_store(out + i, vector_load(out + i) * keep);
    }
    s->most = most;
}

ALWAYS_INLINE float softmax_largest(const float *scores, int64_t count) {
    vector_f32 high = vector_load(scores);
    for (int64_t j = VECTOR_LANES; j < count; j += VECTOR_LANES)
        high = vector_max(high, vector_load(scores + j));
    return vector_largest(high);
}

/* One query's scores, of which the largest is known to be reckoned with (softmax_raise), become weights, which may lie over
 * them; its sum follows. */
ALWAYS_INLINE void softmax_weights(enum dtype dtype, struct softmax *s, const float *scores, int64_t count, float exponent,
                                   void *weights) {
    const float most = s->most;
    vector_f32 sum = s->sum;
    for (int64_t j = 0; j < count; j += VECTOR_LANES) {
        vector_f32 weight = vector_exp2(vector_load(scores + j) * exponent - most);
        sum += weight;
        numbers_store(dtype, weights, j, VECTOR_LANES, weight);
    }
    s->sum = sum;
}

/* All of it for one query; its output so far follows. out_floats is a multiple of VECTOR_LANES. */
ALWAYS_INLINE void softmax_row(enum dtype dtype, struct softmax *s, const float *scores, int64_t count, float exponent,
                               void *weights, float *out, int64_t out_floats) {
    float most = softmax_largest(scores, count) * exponent;
    if (most > s->most)
        softmax_raise(s, most, out, out_floats);
    softmax_weights(dtype, s, scores, count, exponent, weights);
}

/* log of the sum of e^(scale * score), `sum` being that of the lanes. The weights were made with `most` as it is here,
 * so its rounding cancels. */
ALWAYS_INLINE float softmax_logsumexp(const struct softmax *s, float sum) {
    const double log_of_2 = 0.693147180559945309;
    return (float)(((double)s->most + (double)log2f(sum)) * log_of_2);
}

/* One query's scores become weights, and the gradients of its weights become those of its scores, still to be
 * multiplied by the scale; both may lie over what they come from. logsumexp is of base 2. */
ALWAYS_INLINE void softmax_row_backward(enum dtype dtype, const float *scores, const float *dweights, int64_t count,
                                        float exponent, float logsumexp, float delta, void *weights, void *dscores) {
    for (int64_t j = 0; j < count; j += VECTOR_LANES) {
        vector_f32 weight = vector_exp2(vector_load(scores + j) * exponent - logsumexp);
        vector_f32 dscore = weight * (vector_load(dweights + j) - delta);
        numbers_store(dtype, weights, j, VECTOR_LANES, weight);
        numbers_store(dtype, dscores, j, VECTOR_LANES, dscore);
    }
}
