#include "infer/sample.h"

#include "base/memory.h"
#include "base/random.h"
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

struct choice {
    double weight;
    float logit;
    int32_t id;
};

/* Choices, the best first, put in order only as far as somebody looks: a few hundred of a large vocabulary. The first `left`
 * are a heap, in which each comes before those at 2i + 1 and 2i + 2; behind them lie the others, the best one last. */
struct ranking {
    struct choice *choices;
    int count, left;
};

static bool comes_before(const struct choice *a, const struct choice *b) {
    return a->logit != b->logit ? a->logit > b->logit : a->id < b->id;
}

static void sink(struct ranking *r, int at) {
    struct choice sinking = r->choices[at];
    for (int child = 2 * at + 1; child < r->left; child = 2 * at + 1) {
        if (child + 1 < r->left && comes_before(&r->choices[child + 1], &r->choices[child]))
            child++;
        if (!comes_before(&r->choices[child], &sinking))
            break;
        r->choices[at] = r->choices[child];
        at = child;
    }
    r->choices[at] = sinking;
}

static const struct choice *choice_at(struct ranking *r, int rank) {
    while (r->left > r->count - 1 - rank) {
        struct choice best = r->choices[0];
        r->choices[0] = r->choices[--r->left];
        r->choices[r->left] = best;
        if (r->left > 0)
            sink(r, 0);
    }
    return &r->choices[r->count - 1 - rank];
}

static int32_t most_likely(const float *logits, int count) {
    int32_t best = 0;
    for (int32_t i = 1; i < count; i++)
        if (logits[i] > logits[best] || isnan(logits[best]))
            best = i;
    return best;
}

static void rank_choices(struct ranking *r, const float *logits, int count, double temperature) {
    *r = (struct ranking){memory_must((size_t)count, sizeof *r->choices), count, count};
    for (int i = 0; i < count; i++)
        r->choices[i] = (struct choice){0, isfinite(logits[i]) ? logits[i] : -INFINITY, i};
    for (int i = count / 2 - 1; i >= 0; i--)
        sink(r, i);
    double best = (double)r->choices[0].logit;
    for (int i = 0; i < count; i++)
        if (isfinite(r->choices[i].logit))
            r->choices[i].weight = exp(((double)r->choices[i].logit - best) / temperature);
}

/* How many of the choices stay, and the sum of their weights. */
static int keep_likely(const struct sample_settings *s, struct ranking *r, double *sum) {
    double total = 0;
    int kept = s->top_k > 0 && s->top_k < r->count ? s->top_k : r->count;
    for (int i = 0; i < kept; i++)
        total += kept < r->count ? choice_at(r, i)->weight : r->choices[i].weight;
    *sum = total;
    if (s->top_p >= 1)
        return kept;
    *sum = 0;
    for (int i = 0; i < kept; i++) {
        *sum += choice_at(r, i)->weight;
        if (*sum >= s->top_p * total)
            return i + 1;
    }
    return kept;
}

int32_t sample_token(const struct sample_settings *s, float *logits, int count, uint64_t position) {
    if (s->temperature <= 0)
        return most_likely(logits, count);
    struct ranking r;
    double sum;
    rank_choices(&r, logits, count, s->temperature);
    int kept = keep_likely(s, &r, &sum), chosen = 0;
    double left = random_uniform(s->seed, random_stream("sample"), position) * sum;
    while (chosen + 1 < kept && left >= choice_at(&r, chosen)->weight)
        left -= choice_at(&r, chosen++)->weight;
    while (chosen > 0 && choice_at(&r, chosen)->weight == 0)
        chosen--;
    int32_t id = choice_at(&r, chosen)->id;
    free(r.choices);
    return id;
}
