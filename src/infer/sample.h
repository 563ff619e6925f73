/* Choosing the next token from logits. */
#pragma once

#include <stdint.h>

struct sample_settings {
    double temperature; /* 0: the most likely token, the lower id on a tie */
    int top_k;          /* only the k most likely; 0: all */
    double top_p;       /* only the fewest most likely whose probabilities reach p; 1: all */
    uint64_t seed;
};

/* The token at `position` of a text; the same settings, logits and position give the same token. logits [count] are
 * overwritten; those that are not finite are never chosen. Requires count >= 1. */
int32_t sample_token(const struct sample_settings *settings, float *logits, int count, uint64_t position);
