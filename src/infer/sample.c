#include "infer/sample.h"

#include "base/memory.h"
#include "base/random.h"
#include <math.h>
#include <stdlib.h>

struct choice {
    float logit;
    int32_t id;
};

static int compare_choices(const void *a, const void *b) {
    const struct choice *x = a, *y = b;
    if (x->logit != y->logit)
        return x->logit > y->logit ? -1 : 1;
    return x->id < y->id ? -1 : x->id > y->id;
}

static int32_t most_likely(const float *logits, int count) {
    int32_t best = 0;
    for (int32_t i = 1; i < count; i++)
        if (logits[i] > logits[best] || isnan(logits[best]))
            best = i;
    return best;
}

/* How many of the sorted choices stay, and the sum of their weights. */
static int keep_likely(const struct sample_settings *s, const double *weights, int count, double *sum) {
    double total = 0;
    int kept = s->top_k > 0 && s->top_k < count ? s->top_k : count;
    for (int i = 0; i < kept; i++)
        total += weights[i];
    *sum = 0;
    for (int i = 0; i < kept; i++) {
        *sum += weights[i];
        if (*sum >= s->top_p * total && s->top_p < 1)
            return i + 1;
    }
    return kept;
}

int32_t sample_token(const struct sample_settings *s, float *logits, int count, uint64_t position) {
    if (s->temperature <= 0)
        return most_likely(logits, count);
    struct choice *choices = memory_must((size_t)count, sizeof *choices);
    double *weights = memory_must((size_t)count, sizeof *weights);
    for (int i = 0; i < count; i++)
        choices[i] = (struct choice){isfinite(logits[i]) ? logits[i] : -INFINITY, i};
    qsort(choices, (size_t)count, sizeof *choices, compare_choices);
    for (int i = 0; i < count; i++)
        weights[i] = isfinite(choices[i].logit)
                         ? exp(((double)choices[i].logit - (double)choices[0].logit) / s->temperature)
                         : 0;
    double sum;
    int kept = keep_likely(s, weights, count, &sum), chosen = 0;
    double left = random_uniform(s->seed, random_stream("sample"), position) * sum;
    while (chosen + 1 < kept && left >= weights[chosen])
        left -= weights[chosen++];
    while (chosen > 0 && weights[chosen] == 0)
        chosen--;
    int32_t id = choices[chosen].id;
    free(choices);
    free(weights);
    return id;
}
