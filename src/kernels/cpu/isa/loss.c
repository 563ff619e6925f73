/* Cross entropy and the embedding. */
#include "kernels/cpu/isa/lanes.h"

#include "base/threads.h"
#include "kernels/cpu/fillers.h"

struct cross_entropy {
    struct tensor logits, target, row_loss, dlogits;
    double scale;
    double *losses; /* [R] */
    int64_t vocab;
};

static float row_max(const float *x, int64_t count) {
    float most = -INFINITY;
    for (int64_t i = 0; i < count; i++)
        most = x[i] > most || x[i] != x[i] ? x[i] : most;
    return most;
}

static void row_task(void *context, int64_t row) {
    const struct cross_entropy *c = context;
    int64_t v = c->vocab;
    int32_t target = ((const int32_t *)c->target.data)[row];
    const float *logits = (const float *)c->logits.data + row * v;
    float *p = slot_take(SLOT_A, (size_t)v * sizeof *p);
    c->losses[row] = 0;
    if (target < 0) {
        memset(p, 0, (size_t)v * sizeof *p);
    } else {
        CHECK_OP(target, <, v);
        float most = row_max(logits, v);
        double sum = 0;
        for (int64_t i = 0; i < v; i++)
            p[i] = fast_exp(logits[i] - most);
        for (int64_t i = 0; i < v; i += 64) { /* short sums in float, their sum in double: fast and exact enough */
            float part = 0;
            for (int64_t j = i; j < smaller(i + 64, v); j++)
                part += p[j];
            sum += (double)part;
        }
        c->losses[row] = log(sum) + (double)most - (double)logits[target];
        float factor = (float)(c->scale / sum);
        for (int64_t i = 0; i < v; i++)
            p[i] *= factor;
        p[target] -= (float)c->scale;
    }
    if (tensor_exists(c->row_loss))
        ((float *)c->row_loss.data)[row] = (float)c->losses[row];
    if (tensor_exists(c->dlogits))
        store_row(c->dlogits, row, v, p);
}

static void cross_entropy(struct tensor logits, struct tensor target, double scale, struct tensor loss_sum,
                          struct tensor row_loss, struct tensor dlogits) {
    if (is_f64(logits)) {
        kernels_ref()->cross_entropy(logits, target, scale, loss_sum, row_loss, dlogits);
        return;
    }
    int64_t rows = logits.shape[0];
    CHECK(logits.dtype == DTYPE_F32 && target.dtype == DTYPE_I32 && loss_sum.dtype == DTYPE_F64);
    CHECK_OP(tensor_elements(target), ==, rows);
    struct cross_entropy c = {logits, target, row_loss, dlogits, scale,
                              slot_take(SLOT_G, (size_t)(rows + 1) * sizeof(double)), logits.shape[1]};
    parallel_for(rows, row_task, &c);
    double sum = 0;
    for (int64_t i = 0; i < rows; i++)
        sum += c.losses[i];
    *(double *)loss_sum.data += sum;
}

/* ---- embedding ---------------------------------------------------------------------------------------------------------- */

enum { COLUMNS_PER_TASK = 64 };

struct embedding {
    struct tensor ids, table, x;
    int64_t rows, width;
};

static void forward_task(void *context, int64_t row) {
    const struct embedding *e = context;
    int32_t id = ((const int32_t *)e->ids.data)[row];
    CHECK(id >= 0 && id < e->table.shape[0]);
    float *buffer = slot_take(SLOT_A, (size_t)e->width * sizeof *buffer);
    store_row(e->x, row, e->width, row_as_float(e->table, id, e->width, buffer));
}

static void embedding_forward(struct tensor ids, struct tensor table, struct tensor x) {
    if (!is_fast(table) || !is_fast(x)) {
        kernels_ref()->embedding_forward(ids, table, x);
        return;
    }
    CHECK_OP(table.shape[1], ==, x.shape[1]);
    CHECK_OP(tensor_elements(ids), ==, x.shape[0]);
    struct embedding e = {ids, table, x, x.shape[0], x.shape[1]};
    parallel_for(e.rows, forward_task, &e);
}

/* A task owns some columns of the whole table, so that each sum runs over the rows in order. */
static void backward_task(void *context, int64_t index) {
    const struct embedding *e = context;
    const int32_t *ids = e->ids.data;
    int64_t first = index * COLUMNS_PER_TASK, count = smaller(COLUMNS_PER_TASK, e->width - first);
    for (int64_t row = 0; row < e->rows; row++) {
        CHECK(ids[row] >= 0 && ids[row] < e->table.shape[0]);
        float *to = (float *)e->table.data + ids[row] * e->width + first;
        int64_t at = row * e->width + first;
        if (e->x.dtype == DTYPE_F32) {
            const float *from = (const float *)e->x.data + at;
            for (int64_t i = 0; i < count; i++)
                to[i] += from[i];
        } else {
            const uint16_t *from = (const uint16_t *)e->x.data + at;
            for (int64_t i = 0; i < count; i++)
                to[i] += load_bf16(from[i]);
        }
    }
}

static void embedding_backward(struct tensor ids, struct tensor dx, struct tensor dtable) {
    if (is_f64(dx)) {
        kernels_ref()->embedding_backward(ids, dx, dtable);
        return;
    }
    CHECK(is_fast(dx) && dtable.dtype == DTYPE_F32);
    CHECK_OP(dtable.shape[1], ==, dx.shape[1]);
    struct embedding e = {ids, dtable, dx, dx.shape[0], dx.shape[1]};
    parallel_for((e.width + COLUMNS_PER_TASK - 1) / COLUMNS_PER_TASK, backward_task, &e);
}

void ISA_NAME(loss_fill)(struct kernel_ops *ops) {
    ops->cross_entropy = cross_entropy;
    ops->embedding_forward = embedding_forward;
    ops->embedding_backward = embedding_backward;
}
