/* Choosing experts, ordering rows by expert, and bringing their answers back to the tokens. */
#include "kernels/ref/ref.h"

#include <string.h>

static void store_index(struct tensor t, int64_t i, int64_t value) {
    ((int32_t *)t.data)[i] = (int32_t)value;
}

/* The best of E scores that is not taken yet. The scores and not their probabilities are compared: those can
 * be equal after rounding, or all zero far below the best, where the scores still differ. */
static int64_t best_expert(const double *logits, const bool *taken, int64_t expert_count) {
    int64_t best = -1;
    for (int64_t e = 0; e < expert_count; e++)
        if (!taken[e] && (best < 0 || logits[e] > logits[best]))
            best = e;
    return best;
}

static void check_router(struct tensor logits, struct tensor prob, struct tensor expert,
                         struct tensor weight) {
    int64_t token_count = logits.shape[0], expert_count = logits.shape[1];
    CHECK(ref_is_real(logits, logits.dtype) && prob.dtype == logits.dtype && weight.dtype == logits.dtype);
    CHECK(ref_is_2d(logits, token_count, expert_count) && tensor_same_shape(prob, logits));
    CHECK(expert.dtype == DTYPE_I32 && ref_is_2d(expert, token_count, expert.shape[1]));
    CHECK(expert.shape[1] >= 1 && expert.shape[1] <= expert_count);
    CHECK(tensor_same_shape(weight, expert));
}

void ref_router_topk_forward(struct tensor logits, bool normalize, struct tensor prob, struct tensor expert,
                             struct tensor weight) {
    check_router(logits, prob, expert, weight);
    int64_t token_count = logits.shape[0], expert_count = logits.shape[1], choices = expert.shape[1];
    double *scores = ref_read(logits), *p = ref_zeros(expert_count);
    bool *taken = memory_must((size_t)expert_count, sizeof *taken);
    for (int64_t s = 0; s < token_count; s++) {
        const double *row = scores + s * expert_count;
        double lse = ref_logsumexp(row, expert_count), sum = 0;
        for (int64_t e = 0; e < expert_count; e++)
            p[e] = exp(row[e] - lse);
        ref_write(prob, s * expert_count, expert_count, p, false);
        memset(taken, 0, (size_t)expert_count * sizeof *taken);
        for (int64_t k = 0; k < choices; k++) {
            int64_t e = best_expert(row, taken, expert_count);
            taken[e] = true;
            sum += p[e];
            store_index(expert, s * choices + k, e);
        }
        for (int64_t i = s * choices; i < (s + 1) * choices; i++)
            ref_store(weight, i, p[ref_index(expert, i)] / (normalize ? sum : 1));
    }
    free(scores);
    free(p);
    free(taken);
}

/* dprob [E] of one token from dweight: weight = prob, or prob / sum of the chosen. */
static void add_weight_gradient(const double *dweight, const double *weight, struct tensor expert,
                                int64_t first, const double *prob, bool normalize, double *dprob) {
    double sum = 0, mean = 0;
    for (int64_t k = 0; k < expert.shape[1]; k++) {
        sum += prob[ref_index(expert, first + k)];
        mean += dweight[k] * weight[k];
    }
    for (int64_t k = 0; k < expert.shape[1]; k++)
        dprob[ref_index(expert, first + k)] += normalize ? (dweight[k] - mean) / sum : dweight[k];
}

void ref_router_topk_backward(struct tensor dweight, struct tensor logits, struct tensor prob,
                              struct tensor expert, struct tensor weight, bool normalize, struct tensor count,
                              struct router_loss_scales scales, struct tensor dlogits) {
    check_router(logits, prob, expert, weight);
    CHECK(dweight.dtype == logits.dtype && tensor_same_shape(dweight, weight));
    CHECK(dlogits.dtype == logits.dtype && tensor_same_shape(dlogits, logits));
    CHECK(count.dtype == DTYPE_I32 && ref_is_1d(count, logits.shape[1]));
    int64_t expert_count = logits.shape[1], choices = expert.shape[1];
    double *scores = ref_read(logits), *p = ref_read(prob), *w = ref_read(weight), *dw = ref_read(dweight);
    double *dp = ref_zeros(expert_count);
    for (int64_t s = 0; s < logits.shape[0]; s++) {
        const double *ps = p + s * expert_count;
        double lse = ref_logsumexp(scores + s * expert_count, expert_count), mean = 0;
        for (int64_t e = 0; e < expert_count; e++)
            dp[e] = scales.balance_scale * (double)ref_index(count, e);
        add_weight_gradient(dw + s * choices, w + s * choices, expert, s * choices, ps, normalize, dp);
        for (int64_t e = 0; e < expert_count; e++)
            mean += ps[e] * dp[e];
        for (int64_t e = 0; e < expert_count; e++)
            ref_store(dlogits, s * expert_count + e, ps[e] * (dp[e] - mean + 2 * scales.z_scale * lse));
    }
    free(scores);
    free(p);
    free(w);
    free(dw);
    free(dp);
}

void ref_router_stats(struct tensor logits, struct tensor prob, struct tensor expert, struct tensor stats) {
    int64_t expert_count = logits.shape[1];
    CHECK(ref_is_real(logits, logits.dtype) && prob.dtype == logits.dtype && tensor_same_shape(prob, logits));
    CHECK(ref_is_2d(logits, logits.shape[0], expert_count));
    CHECK(expert.dtype == DTYPE_I32 && ref_is_2d(expert, logits.shape[0], expert.shape[1]));
    CHECK(stats.dtype == DTYPE_F64 && ref_is_1d(stats, 2 + 2 * expert_count));
    double *scores = ref_read(logits), *p = ref_read(prob);
    double *sum = ref_zeros(2 + 2 * expert_count), *prob_sum = sum + 2, *rows = sum + 2 + expert_count;
    for (int64_t s = 0; s < logits.shape[0]; s++) {
        double lse = ref_logsumexp(scores + s * expert_count, expert_count);
        sum[0] += lse * lse;
        for (int64_t e = 0; e < expert_count; e++) {
            double ps = p[s * expert_count + e];
            sum[1] -= ps > 0 ? ps * log(ps) : 0;
            prob_sum[e] += ps;
        }
    }
    for (int64_t i = 0; i < tensor_elements(expert); i++) {
        CHECK(ref_index(expert, i) >= 0 && ref_index(expert, i) < expert_count);
        rows[ref_index(expert, i)] += 1;
    }
    ref_write(stats, 0, 2 + 2 * expert_count, sum, true);
    free(scores);
    free(p);
    free(sum);
}

void ref_route_sort(struct tensor expert, struct tensor count, struct tensor offsets, struct tensor row_slot,
                    struct tensor row_token, struct tensor slot_row) {
    int64_t choices = expert.shape[1], slot_count = tensor_elements(expert),
            expert_count = tensor_elements(count);
    CHECK(expert.dtype == DTYPE_I32 && count.dtype == DTYPE_I32 && offsets.dtype == DTYPE_I32);
    CHECK(row_slot.dtype == DTYPE_I32 && row_token.dtype == DTYPE_I32 && slot_row.dtype == DTYPE_I32);
    CHECK(ref_is_2d(expert, expert.shape[0], choices) && ref_is_1d(offsets, expert_count + 1));
    CHECK(ref_is_1d(row_slot, slot_count) && ref_is_1d(row_token, slot_count) &&
          ref_is_1d(slot_row, slot_count));
    int64_t row = 0;
    for (int64_t e = 0; e < expert_count; e++) {
        store_index(offsets, e, row);
        for (int64_t slot = 0; slot < slot_count; slot++) {
            if (ref_index(expert, slot) != e)
                continue;
            store_index(row_slot, row, slot);
            store_index(row_token, row, slot / choices);
            store_index(slot_row, slot, row);
            row++;
        }
        store_index(count, e, row - ref_index(offsets, e));
    }
    store_index(offsets, expert_count, row);
    CHECK_OP(row, ==, slot_count); /* else a choice is no expert */
}

void ref_combine_rows(struct tensor rows, struct tensor slot_row, struct tensor y, bool accumulate) {
    int64_t token_count = y.shape[0], width = y.shape[1], choices = slot_row.shape[1];
    CHECK(ref_is_float(rows) && ref_is_float(y) && slot_row.dtype == DTYPE_I32);
    CHECK(ref_is_2d(y, token_count, width) && ref_is_2d(slot_row, token_count, choices));
    CHECK(ref_is_2d(rows, rows.shape[0], width));
    double *values = ref_read(rows), *sum = ref_zeros(width);
    for (int64_t s = 0; s < token_count; s++) {
        memset(sum, 0, (size_t)width * sizeof *sum);
        for (int64_t k = 0; k < choices; k++) {
            int64_t row = ref_index(slot_row, s * choices + k);
            CHECK(row < rows.shape[0]);
            for (int64_t d = 0; d < width && row >= 0; d++)
                sum[d] += values[row * width + d];
        }
        ref_write(y, s * width, width, sum, accumulate);
    }
    free(values);
    free(sum);
}
