#include "train/evaluate.h"

#include "base/memory.h"
#include <math.h>
#include <stdlib.h>

static int64_t stat_count(const struct model *model) {
    return 2 + 2 * model->config.num_experts;
}

static enum status run_windows(const struct model *model, struct workspace *w, const int32_t *tokens, int64_t batch,
                               int64_t length) {
    size_t bytes = (size_t)(batch * length) * sizeof *tokens;
    workspace_shape(w, model, batch, length);
    model->device->copy_from_host(w->ids.data, tokens, bytes);
    model->device->copy_from_host(w->targets.data, tokens + 1, bytes);
    model_embed_forward(model, w);
    for (int block = 0; block < w->block_count; block++)
        TRY(block_forward(model, w, block, NULL, true));
    model_head(model, w, 1, false);
    return STATUS_OK;
}

static enum status collect(const struct model *model, struct workspace *w, int64_t predicted,
                           struct evaluation *evaluation) {
    double loss_sum;
    model->device->copy_to_host(&loss_sum, w->loss_sum.data, sizeof loss_sum);
    evaluation->loss_sum += loss_sum;
    evaluation->token_count += predicted;
    if (!tensor_exists(w->all_stats))
        return STATUS_OK;
    size_t count = (size_t)(w->block_count * stat_count(model));
    if (!evaluation->stats)
        TRY(memory_alloc(&evaluation->stats, count, sizeof *evaluation->stats));
    double *fresh;
    TRY(memory_alloc(&fresh, count, sizeof *fresh));
    model->device->copy_to_host(fresh, w->all_stats.data, count * sizeof *fresh);
    for (size_t i = 0; i < count; i++)
        evaluation->stats[i] += fresh[i];
    free(fresh);
    return STATUS_OK;
}

enum status evaluate_tokens(const struct model *model, struct workspace *w, const int32_t *tokens, int64_t count,
                            struct evaluation *evaluation) {
    int64_t length = w->options.sequence_length, batch = w->options.batch;
    workspace_shape(w, model, batch, length);
    model_clear_sums(model, w);
    int64_t done = 0;
    while (count - 1 - done > 0) { /* windows side by side in memory: inputs and targets are one array shifted by one */
        int64_t left = count - 1 - done;
        int64_t rows = left / length < batch ? left / length : batch;
        int64_t window = rows > 0 ? length : left;
        if (rows == 0)
            rows = 1;
        TRY(run_windows(model, w, tokens + done, rows, window));
        done += rows * window;
    }
    return collect(model, w, done, evaluation);
}

double evaluation_loss(const struct evaluation *evaluation) {
    return evaluation->token_count ? evaluation->loss_sum / (double)evaluation->token_count : NAN;
}

double evaluation_bits_per_byte(const struct evaluation *evaluation, int64_t byte_count) {
    return byte_count ? evaluation->loss_sum / log(2) / (double)byte_count : NAN;
}

void evaluation_release(struct evaluation *evaluation) {
    free(evaluation->stats);
    *evaluation = (struct evaluation){0};
}

struct router_health router_health_from_stats(const double *stats, int64_t expert_count, int64_t choice_count,
                                              int64_t token_count) {
    const double *prob_sum = stats + 2, *rows = prob_sum + expert_count;
    double s = (double)token_count, most = 0, balance = 0;
    struct router_health health = {0};
    for (int64_t e = 0; e < expert_count; e++) {
        most = fmax(most, rows[e]);
        health.dead_experts += rows[e] == 0;
        balance += rows[e] / s * (prob_sum[e] / s);
    }
    health.load_max_over_mean = most / (s * (double)choice_count / (double)expert_count);
    health.balance_loss = balance * (double)expert_count;
    health.z_loss = stats[0] / s;
    health.entropy = stats[1] / s;
    return health;
}
