#include "train/evaluate.h"

#include "base/memory.h"
#include <math.h>
#include <stdlib.h>

static int64_t stat_count(const struct model *model) {
    return 2 + 2 * model->config.num_experts;
}

/* Windows side by side in memory: inputs and targets are one array shifted by one. */
static enum status run_windows(const struct model *model, struct workspace *w, struct traffic *traffic,
                               const int32_t *tokens, int64_t batch, int64_t length) {
    size_t bytes = (size_t)(batch * length) * sizeof *tokens;
    workspace_shape(w, model, batch, length);
    model->device->copy_from_host(w->ids.data, tokens, bytes);
    model->device->copy_from_host(w->targets.data, tokens + 1, bytes);
    return pass_forward(model, w, traffic);
}

/* Whole windows, as many at a time as the ranks hold together; then the last, shorter one on the first rank. */
static enum status run_all_windows(const struct model *model, struct workspace *w, struct traffic *traffic,
                                   const int32_t *tokens, int64_t count) {
    const struct comm *comm = traffic ? traffic_batch_comm(traffic) : NULL;
    int ranks = comm ? comm->size : 1, rank = comm ? comm->rank : 0;
    int64_t length = w->options.sequence_length, done = 0;
    for (int64_t windows = (count - 1) / length; windows > 0;) {
        int64_t now = windows < ranks * w->options.batch ? windows : ranks * w->options.batch;
        struct range mine = range_part(now, ranks, rank);
        TRY(run_windows(model, w, traffic, tokens + done + mine.begin * length, range_count(mine), length));
        windows -= now;
        done += now * length;
    }
    int64_t left = count - 1 - done;
    return left > 0 ? run_windows(model, w, traffic, tokens + done, rank == 0, left) : STATUS_OK;
}

/* Loss and statistics of this rank's windows, summed over the ranks. */
static enum status collect(const struct model *model, struct workspace *w, struct traffic *traffic, int64_t predicted,
                           struct evaluation *evaluation) {
    size_t stats = tensor_exists(w->all_stats) ? (size_t)(w->block_count * stat_count(model)) : 0;
    double *sums;
    if (stats && !evaluation->stats)
        TRY(memory_alloc(&evaluation->stats, stats, sizeof *evaluation->stats));
    TRY(memory_alloc(&sums, 1 + stats, sizeof *sums));
    model->device->copy_to_host(sums, w->loss_sum.data, sizeof *sums);
    if (stats)
        model->device->copy_to_host(sums + 1, w->all_stats.data, stats * sizeof *sums);
    enum status status = STATUS_OK;
    if (traffic)
        status = comm_sum_f64(traffic_batch_comm(traffic), sums, 1 + (int)stats);
    evaluation->loss_sum += sums[0];
    evaluation->token_count += predicted;
    for (size_t i = 0; i < stats; i++)
        evaluation->stats[i] += sums[1 + i];
    free(sums);
    return status;
}

enum status evaluate_tokens(const struct model *model, struct workspace *w, struct traffic *traffic,
                            const int32_t *tokens, int64_t count, struct evaluation *evaluation) {
    workspace_shape(w, model, w->options.batch, w->options.sequence_length);
    model_clear_sums(model, w);
    TRY(run_all_windows(model, w, traffic, tokens, count));
    return collect(model, w, traffic, count > 1 ? count - 1 : 0, evaluation);
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
