/* Held-out loss: how surprised a model is by tokens it was not trained on. */
#pragma once

#include "parallel/pass.h"

struct evaluation {
    int64_t token_count; /* predicted tokens */
    double loss_sum;     /* nats */
    double *stats;       /* [L, 2+2E] as router_stats, summed over the tokens; NULL in a dense model; owned */
};

/* Every token after the first is predicted once, in windows of the workspace's sequence length that follow one another,
 * each with the tokens before it in its window as context; the first token is context only. tokens: host, [count] in
 * 0..V-1. Adds to *evaluation; start from a zeroed struct. Collective with `traffic`: ranks share the windows, and all get the
 * sums; NULL: one process. */
enum status evaluate_tokens(const struct model *model, struct workspace *workspace, struct traffic *traffic,
                            const int32_t *tokens, int64_t count, struct evaluation *evaluation) MUST_USE;

double evaluation_loss(const struct evaluation *evaluation); /* nats per token; NaN where nothing was predicted */
/* byte_count: bytes of the text that the predicted tokens stand for. */
double evaluation_bits_per_byte(const struct evaluation *evaluation, int64_t byte_count);
void evaluation_release(struct evaluation *evaluation);

/* The balance of one block, from a row of stats. */
struct router_health {
    double load_max_over_mean; /* rows of the busiest expert over the mean */
    double entropy;            /* mean entropy of the router's distribution, nats */
    int dead_experts;          /* those without a row */
    double balance_loss;       /* K at perfect balance */
    double z_loss;             /* mean logsumexp^2 */
};
struct router_health router_health_from_stats(const double *stats, int64_t expert_count, int64_t choice_count,
                                              int64_t token_count);
