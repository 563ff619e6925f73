/* The router. Its rows are short, so a group of tokens is worked on at once: a lane is a token, and the E scores of the
 * group lie transposed in a table [E] of vectors. Every lane does the same whatever its neighbours are.
 *
 * Lanes without a token hold the last one's numbers and are not stored.
 */
#include "kernels/cpu/isa/exp.h"
#include "kernels/cpu/isa/numbers.h"

#include "base/threads.h"
#include "kernels/cpu/fillers.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/scratch.h"

enum { TOKENS_PER_TASK = 256, SLOTS_PER_TASK = 1 << 14 };

struct router {
    struct tensor logits, prob, expert, weight, dweight, count, dlogits;
    int64_t tokens, experts, choices;
    bool normalize;
    struct router_loss_scales scales;
    double *stats; /* [tasks, 2 + 2E] */
};

/* Up to VECTOR_LANES neighbouring tokens. */
struct group {
    int64_t first, tokens;
};

/* Group `index` of a task's tokens; false after the last one. */
static bool group_next(const struct router *r, int64_t task, int64_t index, struct group *group) {
    int64_t end = at_most((task + 1) * TOKENS_PER_TASK, r->tokens);
    group->first = task * TOKENS_PER_TASK + index * VECTOR_LANES;
    group->tokens = at_most(end - group->first, VECTOR_LANES);
    return group->tokens > 0;
}

static int64_t router_tasks(const struct router *r) {
    return divide_up(r->tokens, TOKENS_PER_TASK);
}

/* Tables of this task, one after the other. Transposing stores whole blocks, hence room for a block more. */
static vector_f32 *take_tables(const struct router *r, int64_t count) {
    return scratch_task((size_t)(count * (r->experts + VECTOR_LANES)) * sizeof(vector_f32));
}

/* table[e] lane i = from[first + i, e] */
static void table_load(const float *from, int64_t experts, struct group g, vector_f32 *table) {
    for (int64_t e = 0; e < experts; e += VECTOR_LANES) {
        vector_f32 v[VECTOR_LANES];
        int64_t count = at_most(experts - e, VECTOR_LANES);
        for (int64_t i = 0; i < VECTOR_LANES; i++)
            v[i] = numbers_load(DTYPE_F32, from, (g.first + at_most(i, g.tokens - 1)) * experts + e, count);
        vector_transpose(v);
        for (int64_t i = 0; i < count; i++)
            table[e + i] = v[i];
    }
}

/* to[first + i, e] = table[e] lane i */
static void table_store(const vector_f32 *table, float *to, int64_t experts, struct group g) {
    for (int64_t e = 0; e < experts; e += VECTOR_LANES) {
        vector_f32 v[VECTOR_LANES];
        for (int64_t i = 0; i < VECTOR_LANES; i++)
            v[i] = table[e + i];
        vector_transpose(v);
        for (int64_t i = 0; i < g.tokens; i++)
            numbers_store(DTYPE_F32, to, (g.first + i) * experts + e, at_most(experts - e, VECTOR_LANES), v[i]);
    }
}

static vector_f32 table_max(const vector_f32 *table, int64_t experts) {
    vector_f32 most = table[0];
    for (int64_t e = 1; e < experts; e++)
        most = vector_max(most, table[e]);
    return most;
}

/* Sum over e of exp(score - most); the exponentials to `out` unless that is NULL. */
ALWAYS_INLINE vector_f32 table_exp_sum(const vector_f32 *scores, int64_t experts, vector_f32 most, vector_f32 *out) {
    vector_f32 sum = {0};
    for (int64_t e = 0; e < experts; e++) {
        vector_f32 value = vector_exp(scores[e] - most);
        if (out)
            out[e] = value;
        sum += value;
    }
    return sum;
}

/* ---- choosing --------------------------------------------------------------------------------------------------- */

enum { KEY_TAKEN = INT32_MIN, KEY_NAN };

/* Integers in the order of the scores, equal where these are: the bits of a float, those of negative ones turned
 * around. NaNs come last, so that K different experts are chosen of whatever there is. */
static vector_i32 score_keys(vector_f32 score) {
    vector_i32 bits = (vector_i32)(score + 0.0f); /* -0 becomes 0 */
    vector_i32 keys = bits ^ (bits >> 31 & INT32_MAX);
    vector_i32 is_nan = score != score;
    return (keys & ~is_nan) | (is_nan & KEY_NAN);
}

/* The index of the first largest key in every lane. */
static vector_i32 best_keys(const vector_i32 *keys, int64_t experts) {
    vector_i32 best = keys[0], index = {0};
    for (int32_t e = 1; e < experts; e++) {
        vector_i32 better = keys[e] > best;
        best = (better & keys[e]) | (~better & best);
        index = (better & e) | (~better & index);
    }
    return index;
}

/* Scores are compared and not their probabilities: those can be equal after rounding, or all zero far below the best,
 * where the scores still differ. */
static void choose(const struct router *r, struct group g, const vector_f32 *prob, vector_i32 *keys) {
    int32_t *expert = (int32_t *)r->expert.data + g.first * r->choices;
    float *weight = (float *)r->weight.data + g.first * r->choices;
    float sum[VECTOR_LANES] = {0};
    for (int64_t k = 0; k < r->choices; k++) {
        vector_i32 best = best_keys(keys, r->experts);
        for (int64_t i = 0; i < g.tokens; i++) {
            int32_t e = best[i];
            keys[e][i] = KEY_TAKEN;
            expert[i * r->choices + k] = e;
            weight[i * r->choices + k] = prob[e][i];
            sum[i] += prob[e][i];
        }
    }
    for (int64_t i = 0; r->normalize && i < g.tokens; i++)
        for (int64_t k = 0; k < r->choices; k++)
            weight[i * r->choices + k] /= sum[i];
}

static void topk_forward_task(void *context, int64_t task) {
    const struct router *r = context;
    vector_f32 *scores = take_tables(r, 2), *prob = scores + r->experts + VECTOR_LANES;
    vector_i32 *keys = (vector_i32 *)scores; /* in their place */
    struct group g;
    for (int64_t index = 0; group_next(r, task, index, &g); index++) {
        table_load(r->logits.data, r->experts, g, scores);
        vector_f32 most = table_max(scores, r->experts);
        vector_f32 share = 1 / table_exp_sum(scores, r->experts, most, prob);
        for (int64_t e = 0; e < r->experts; e++) {
            prob[e] *= share;
            keys[e] = score_keys(scores[e]);
        }
        table_store(prob, r->prob.data, r->experts, g);
        choose(r, g, prob, keys);
    }
}

static void check_router(const struct router *r) {
    CHECK(r->logits.dtype == DTYPE_F32 && r->prob.dtype == DTYPE_F32 && r->expert.dtype == DTYPE_I32);
    CHECK(tensor_same_shape(r->prob, r->logits) && r->expert.shape[0] == r->tokens);
    CHECK(r->choices >= 1 && r->choices <= r->experts);
}

static void router_topk_forward(struct tensor logits, bool normalize, struct tensor prob, struct tensor expert,
                                struct tensor weight) {
    if (logits.dtype != DTYPE_F32) {
        kernels_ref()->router_topk_forward(logits, normalize, prob, expert, weight);
        return;
    }
    struct router r = {.logits = logits, .prob = prob, .expert = expert, .weight = weight, .tokens = logits.shape[0],
                       .experts = logits.shape[1], .choices = expert.shape[1], .normalize = normalize};
    check_router(&r);
    CHECK(weight.dtype == DTYPE_F32 && tensor_same_shape(weight, expert));
    parallel_for(router_tasks(&r), topk_forward_task, &r);
}

/* ---- its gradient ----------------------------------------------------------------------------------------------- */

/* dprob += the gradient through the weights: a weight is a probability, or that divided by the sum of the chosen. */
static void add_weight_gradient(const struct router *r, struct group g, const vector_f32 *prob, vector_f32 *dprob) {
    for (int64_t i = 0; i < g.tokens; i++) {
        int64_t first = (g.first + i) * r->choices;
        const int32_t *expert = (const int32_t *)r->expert.data + first;
        const float *weight = (const float *)r->weight.data + first, *dweight = (const float *)r->dweight.data + first;
        float sum = 0, mean = 0;
        for (int64_t k = 0; k < r->choices; k++) {
            CHECK(expert[k] >= 0 && expert[k] < r->experts);
            sum += prob[expert[k]][i];
            mean += dweight[k] * weight[k];
        }
        for (int64_t k = 0; k < r->choices; k++)
            dprob[expert[k]][i] += r->normalize ? (dweight[k] - mean) / sum : dweight[k];
    }
}

static vector_f32 vector_log(vector_f32 x) {
    for (int i = 0; i < VECTOR_LANES; i++)
        x[i] = logf(x[i]);
    return x;
}

/* 2 z_scale logsumexp(logits); the logits are not looked at where that is nothing. `table` is used up. */
static vector_f32 z_gradient(const struct router *r, struct group g, vector_f32 *table) {
    if (r->scales.z_scale == 0)
        return (vector_f32){0};
    table_load(r->logits.data, r->experts, g, table);
    vector_f32 most = table_max(table, r->experts);
    vector_f32 logsumexp = most + vector_log(table_exp_sum(table, r->experts, most, NULL));
    return logsumexp * (float)(2 * r->scales.z_scale);
}

static void topk_backward_task(void *context, int64_t task) {
    const struct router *r = context;
    vector_f32 *prob = take_tables(r, 2), *dprob = prob + r->experts + VECTOR_LANES;
    const int32_t *count = r->count.data;
    struct group g;
    for (int64_t index = 0; group_next(r, task, index, &g); index++) {
        vector_f32 mean = {0}, z = z_gradient(r, g, dprob);
        table_load(r->prob.data, r->experts, g, prob);
        for (int64_t e = 0; e < r->experts; e++)
            dprob[e] = vector_splat((float)(r->scales.balance_scale * (double)count[e]));
        add_weight_gradient(r, g, prob, dprob);
        for (int64_t e = 0; e < r->experts; e++)
            mean += prob[e] * dprob[e];
        for (int64_t e = 0; e < r->experts; e++)
            dprob[e] = prob[e] * (dprob[e] - mean + z);
        table_store(dprob, r->dlogits.data, r->experts, g);
    }
}

static void router_topk_backward(struct tensor dweight, struct tensor logits, struct tensor prob, struct tensor expert,
                                 struct tensor weight, bool normalize, struct tensor count,
                                 struct router_loss_scales scales, struct tensor dlogits) {
    if (logits.dtype != DTYPE_F32) {
        kernels_ref()->router_topk_backward(dweight, logits, prob, expert, weight, normalize, count, scales, dlogits);
        return;
    }
    struct router r = {.logits = logits, .prob = prob, .expert = expert, .weight = weight, .dweight = dweight,
                       .count = count, .dlogits = dlogits, .tokens = logits.shape[0], .experts = logits.shape[1],
                       .choices = expert.shape[1], .normalize = normalize, .scales = scales};
    check_router(&r);
    CHECK(weight.dtype == DTYPE_F32 && tensor_same_shape(weight, expert));
    CHECK(dweight.dtype == DTYPE_F32 && tensor_same_shape(dweight, weight));
    CHECK(dlogits.dtype == DTYPE_F32 && tensor_same_shape(dlogits, logits));
    CHECK(count.dtype == DTYPE_I32 && tensor_elements(count) == r.experts);
    parallel_for(router_tasks(&r), topk_backward_task, &r);
}

/* ---- statistics ------------------------------------------------------------------------------------------------- */

static double lanes_sum(vector_f32 v, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++)
        sum += (double)v[i];
    return sum;
}

/* One group's share. The entropy is the mean of -log prob = (most - logit) + log(sum of exp(logit - most)): two numbers
 * that are not negative, so that nothing cancels, and one logarithm a token. */
static void add_group_stats(const struct router *r, struct group g, const vector_f32 *scores, const vector_f32 *prob,
                            double *stats) {
    vector_f32 most = table_max(scores, r->experts), entropy = {0};
    vector_f32 log_sum = vector_log(table_exp_sum(scores, r->experts, most, NULL));
    for (int64_t e = 0; e < r->experts; e++) {
        entropy += vector_select(prob[e] > 0, prob[e] * ((most - scores[e]) + log_sum), (vector_f32){0});
        stats[2 + e] += lanes_sum(prob[e], g.tokens);
    }
    for (int64_t i = 0; i < g.tokens; i++) {
        double logsumexp = (double)most[i] + (double)log_sum[i];
        stats[0] += logsumexp * logsumexp;
    }
    stats[1] += lanes_sum(entropy, g.tokens);
}

static void stats_task(void *context, int64_t task) {
    const struct router *r = context;
    vector_f32 *scores = take_tables(r, 2), *prob = scores + r->experts + VECTOR_LANES;
    double *stats = r->stats + task * (2 + 2 * r->experts), *rows = stats + 2 + r->experts;
    memset(stats, 0, (size_t)(2 + 2 * r->experts) * sizeof *stats);
    struct group g;
    for (int64_t index = 0; group_next(r, task, index, &g); index++) {
        table_load(r->logits.data, r->experts, g, scores);
        table_load(r->prob.data, r->experts, g, prob);
        add_group_stats(r, g, scores, prob, stats);
        const int32_t *expert = (const int32_t *)r->expert.data + g.first * r->choices;
        for (int64_t i = 0; i < g.tokens * r->choices; i++) {
            CHECK(expert[i] >= 0 && expert[i] < r->experts);
            rows[expert[i]] += 1;
        }
    }
}

static void router_stats(struct tensor logits, struct tensor prob, struct tensor expert, struct tensor stats) {
    if (logits.dtype != DTYPE_F32) {
        kernels_ref()->router_stats(logits, prob, expert, stats);
        return;
    }
    struct router r = {.logits = logits, .prob = prob, .expert = expert, .tokens = logits.shape[0],
                       .experts = logits.shape[1], .choices = expert.shape[1]};
    int64_t stat_count = 2 + 2 * r.experts;
    check_router(&r);
    CHECK(stats.dtype == DTYPE_F64 && tensor_elements(stats) == stat_count);
    r.stats = scratch_call((size_t)(router_tasks(&r) * stat_count) * sizeof *r.stats);
    parallel_for(router_tasks(&r), stats_task, &r);
    for (int64_t task = 0; task < router_tasks(&r); task++)
        for (int64_t i = 0; i < stat_count; i++)
            ((double *)stats.data)[i] += r.stats[task * stat_count + i];
}

/* ---- order by expert -------------------------------------------------------------------------------------------- */

/* A stable counting sort: every task counts the experts of its slots, a prefix sum over (expert, task) says where each
 * task's rows of an expert begin, every task places its slots. */
struct sort {
    const int32_t *expert;
    int32_t *row_slot, *row_token, *slot_row;
    int64_t tokens, choices, experts, tokens_per_task;
    int32_t *next; /* [tasks, E]: counts, then the next row */
};

static void count_task(void *context, int64_t task) {
    const struct sort *s = context;
    int32_t *count = s->next + task * s->experts;
    memset(count, 0, (size_t)s->experts * sizeof *count);
    int64_t end = at_most((task + 1) * s->tokens_per_task, s->tokens) * s->choices;
    for (int64_t slot = task * s->tokens_per_task * s->choices; slot < end; slot++) {
        CHECK(s->expert[slot] >= 0 && s->expert[slot] < s->experts);
        count[s->expert[slot]]++;
    }
}

static void place_task(void *context, int64_t task) {
    const struct sort *s = context;
    int32_t *next = s->next + task * s->experts;
    int64_t end = at_most((task + 1) * s->tokens_per_task, s->tokens);
    int32_t slot = (int32_t)(task * s->tokens_per_task * s->choices);
    for (int64_t token = task * s->tokens_per_task; token < end; token++) {
        for (int64_t k = 0; k < s->choices; k++, slot++) {
            int32_t row = next[s->expert[slot]]++;
            s->row_slot[row] = slot;
            s->row_token[row] = (int32_t)token;
            s->slot_row[slot] = row;
        }
    }
}

static void prefix_sums(const struct sort *s, int64_t tasks, int32_t *count, int32_t *offsets) {
    int32_t row = 0;
    for (int64_t e = 0; e < s->experts; e++) {
        offsets[e] = row;
        for (int64_t task = 0; task < tasks; task++) {
            int32_t *next = &s->next[task * s->experts + e], rows = *next;
            *next = row;
            row += rows;
        }
        count[e] = row - offsets[e];
    }
    offsets[s->experts] = row;
}

static void route_sort(struct tensor expert, struct tensor count, struct tensor offsets, struct tensor row_slot,
                       struct tensor row_token, struct tensor slot_row) {
    int64_t slots = tensor_elements(expert), experts = tensor_elements(count);
    CHECK(expert.dtype == DTYPE_I32 && count.dtype == DTYPE_I32 && offsets.dtype == DTYPE_I32);
    CHECK(row_slot.dtype == DTYPE_I32 && row_token.dtype == DTYPE_I32 && slot_row.dtype == DTYPE_I32);
    CHECK(tensor_elements(offsets) == experts + 1 && tensor_elements(row_slot) == slots);
    CHECK(tensor_elements(row_token) == slots && tensor_elements(slot_row) == slots);
    CHECK(expert.shape[1] >= 1 && slots <= INT32_MAX);
    struct sort s = {.expert = expert.data, .row_slot = row_slot.data, .row_token = row_token.data,
                     .slot_row = slot_row.data, .tokens = expert.shape[0], .choices = expert.shape[1],
                     .experts = experts, .tokens_per_task = divide_up(SLOTS_PER_TASK, expert.shape[1])};
    int64_t tasks = divide_up(s.tokens, s.tokens_per_task);
    s.next = scratch_call((size_t)(tasks * experts) * sizeof *s.next);
    parallel_for(tasks, count_task, &s);
    prefix_sums(&s, tasks, count.data, offsets.data);
    parallel_for(tasks, place_task, &s);
}

void ISA_NAME(router_fill)(struct kernel_ops *ops) {
    ops->router_topk_forward = router_topk_forward;
    ops->router_topk_backward = router_topk_backward;
    ops->router_stats = router_stats;
    ops->route_sort = route_sort;
}
