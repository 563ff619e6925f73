/* Causal attention in blocks: no T x T matrix, no work above the diagonal. Softmax is kept as a running maximum and sum
 * for each query (arXiv 2205.14135); backward recomputes a block's probabilities from the saved logsumexp. Operands of
 * either dtype are widened to f32 while they are packed.
 */
#include "kernels/cpu/isa/tiles.h"

#include "base/threads.h"
#include "kernels/cpu/fillers.h"

enum { QUERY_BLOCK = 96, KEY_BLOCK = 128 };

struct attention {
    struct attention_shape shape;
    struct tensor q, k, v, out, logsumexp, dout, dq, dk, dv;
    int64_t query_blocks;
};

/* Columns of one head, rows of one sequence from `first` on, as element (row, column) or the reverse. */
static struct operand head_operand(struct tensor t, int64_t sequence_first, int64_t first, int64_t column,
                                   bool depth_in_rows) {
    return (struct operand){t.data, t.dtype, t.shape[1], NULL, sequence_first + first, column, depth_in_rows};
}

static struct operand block_operand(const float *data, int64_t stride, bool depth_in_rows) {
    return (struct operand){data, DTYPE_F32, stride, NULL, 0, 0, depth_in_rows};
}

static void pack_wide(const struct operand *o, int64_t count, int width, int64_t depth, float *out) {
    for (int64_t i = 0; i < count; i += width, out += width * depth)
        pack_floats(o, i, smaller(width, count - i), width, 0, depth, out);
}

/* c [m,n] = (or +=) a b^T over depth, both packed here. */
static void block_product(int64_t m, int64_t n, int64_t depth, struct operand a, struct operand b, float *c,
                          int64_t ldc, bool accumulate) {
    float *packed_a = slot_take(SLOT_A, panel_bytes(m, TILE_ROWS, depth));
    float *packed_b = slot_take(SLOT_B, panel_bytes(n, TILE_COLUMNS, depth));
    pack_wide(&a, m, TILE_ROWS, depth, packed_a);
    pack_wide(&b, n, TILE_COLUMNS, depth, packed_b);
    multiply_panels(m, n, depth, false, packed_a, packed_b, c, ldc, accumulate);
}

/* ---- forward ------------------------------------------------------------------------------------------------------------ */

/* Scores of one query against `count` keys become weights; the running maximum and sum, and the row of output so far,
 * follow. `visible` keys of the block are at or before the query. */
static void soften_row(float *scores, int64_t count, int64_t visible, float scale, float *most, float *sum, float *out,
                       int64_t p) {
    float block_most = *most;
    for (int64_t j = 0; j < visible; j++) {
        scores[j] *= scale;
        block_most = scores[j] > block_most ? scores[j] : block_most;
    }
    float keep = fast_exp(*most - block_most), block_sum = 0;
    for (int64_t j = 0; j < visible; j++)
        scores[j] = fast_exp(scores[j] - block_most);
    for (int64_t j = 0; j < visible; j++)
        block_sum += scores[j];
    memset(scores + visible, 0, (size_t)(count - visible) * sizeof *scores);
    for (int64_t i = 0; i < p; i++)
        out[i] *= keep;
    *sum = *sum * keep + block_sum;
    *most = block_most;
}

static void forward_task(void *context, int64_t index) {
    const struct attention *a = context;
    const struct attention_shape *s = &a->shape;
    int64_t p = s->head_dim, block = index % a->query_blocks, head = index / a->query_blocks % s->head_count;
    int64_t batch = index / a->query_blocks / s->head_count, first = block * QUERY_BLOCK;
    int64_t rows = smaller(QUERY_BLOCK, s->query_count - first), offset = s->key_count - s->query_count;
    int64_t kv_column = head / (s->head_count / s->kv_head_count) * p;
    float *scores = slot_take(SLOT_C, QUERY_BLOCK * KEY_BLOCK * sizeof *scores);
    float *out = slot_take(SLOT_D, (size_t)(QUERY_BLOCK * p) * sizeof *out);
    float most[QUERY_BLOCK], sum[QUERY_BLOCK];
    memset(out, 0, (size_t)(QUERY_BLOCK * p) * sizeof *out);
    for (int64_t r = 0; r < rows; r++) {
        most[r] = -INFINITY;
        sum[r] = 0;
    }
    for (int64_t key = 0; key < first + rows + offset; key += KEY_BLOCK) {
        int64_t keys = smaller(KEY_BLOCK, first + rows + offset - key);
        block_product(rows, keys, p, head_operand(a->q, batch * s->query_count, first, head * p, false),
                      head_operand(a->k, batch * s->key_count, key, kv_column, false), scores, KEY_BLOCK, false);
        for (int64_t r = 0; r < rows; r++) {
            int64_t visible = first + r + offset + 1 - key;
            visible = visible < 0 ? 0 : smaller(visible, keys);
            if (visible > 0)
                soften_row(scores + r * KEY_BLOCK, keys, visible, (float)s->scale, &most[r], &sum[r], out + r * p, p);
            else
                memset(scores + r * KEY_BLOCK, 0, (size_t)keys * sizeof *scores);
        }
        block_product(rows, p, keys, block_operand(scores, KEY_BLOCK, false),
                      head_operand(a->v, batch * s->key_count, key, kv_column, true), out, p, true);
    }
    for (int64_t r = 0; r < rows; r++) {
        int64_t row = batch * s->query_count + first + r;
        float scale = 1 / sum[r];
        for (int64_t i = 0; i < p; i++)
            out[r * p + i] *= scale;
        struct tensor to = a->out;
        to.data = (char *)to.data + (size_t)(row * to.shape[1] + head * p) * dtype_size(to.dtype);
        store_row(to, 0, p, out + r * p);
        ((float *)a->logsumexp.data)[row * s->head_count + head] = most[r] + logf(sum[r]);
    }
}

static void check_shapes(const struct attention_shape *s, struct tensor q, struct tensor k, struct tensor v) {
    CHECK(q.dtype == k.dtype && q.dtype == v.dtype && is_fast(q));
    CHECK(s->head_count % s->kv_head_count == 0 && s->key_count >= s->query_count);
    CHECK(q.shape[0] == s->batch * s->query_count && q.shape[1] == (int64_t)s->head_count * s->head_dim);
    CHECK(k.shape[0] == s->batch * s->key_count && k.shape[1] == (int64_t)s->kv_head_count * s->head_dim);
    CHECK(tensor_same_shape(k, v));
}

static void attention_forward(struct attention_shape shape, struct tensor q, struct tensor k, struct tensor v,
                              struct tensor out, struct tensor logsumexp) {
    if (is_f64(q)) {
        kernels_ref()->attention_forward(shape, q, k, v, out, logsumexp);
        return;
    }
    check_shapes(&shape, q, k, v);
    CHECK(tensor_same_shape(q, out) && is_fast(out) && logsumexp.dtype == DTYPE_F32);
    struct attention a = {.shape = shape, .q = q, .k = k, .v = v, .out = out, .logsumexp = logsumexp,
                          .query_blocks = (shape.query_count + QUERY_BLOCK - 1) / QUERY_BLOCK};
    parallel_for(shape.batch * shape.head_count * a.query_blocks, forward_task, &a);
}

/* ---- backward ------------------------------------------------------------------------------------------------------------ */

/* sum over i of dout[row,i] * out[row,i] for one head: what every score's gradient is measured against. */
static void row_products(const struct attention *a, int64_t sequence_first, int64_t column, int64_t count, float *delta) {
    int64_t p = a->shape.head_dim, width = a->dout.shape[1];
    float *x_buffer = slot_take(SLOT_A, (size_t)p * sizeof *x_buffer), *y_buffer = slot_take(SLOT_B, (size_t)p * sizeof *y_buffer);
    for (int64_t r = 0; r < count; r++) {
        struct tensor x = a->dout, y = a->out;
        size_t at = (size_t)((sequence_first + r) * width + column);
        x.data = (char *)x.data + at * dtype_size(x.dtype);
        y.data = (char *)y.data + at * dtype_size(y.dtype);
        const float *dout = row_as_float(x, 0, p, x_buffer), *out = row_as_float(y, 0, p, y_buffer);
        double sum = 0;
        for (int64_t i = 0; i < p; i++)
            sum += (double)dout[i] * (double)out[i];
        delta[r] = (float)sum;
    }
}

struct backward_buffers {
    float *scores, *dscores; /* [QUERY_BLOCK, KEY_BLOCK] */
    float *dq, *dk, *dv;     /* [T,P] */
    float *delta;            /* [T] */
};

/* One block of queries against one block of keys. */
static void backward_block(const struct attention *a, const struct backward_buffers *b, int64_t batch, int64_t head,
                           int64_t first, int64_t rows, int64_t key, int64_t keys) {
    const struct attention_shape *s = &a->shape;
    int64_t p = s->head_dim, base = batch * s->query_count, column = head * p;
    int64_t kv_column = head / (s->head_count / s->kv_head_count) * p;
    struct operand q = head_operand(a->q, base, first, column, false), k = head_operand(a->k, base, key, kv_column, false);
    struct operand v = head_operand(a->v, base, key, kv_column, false), dout = head_operand(a->dout, base, first, column, false);
    block_product(rows, keys, p, q, k, b->scores, KEY_BLOCK, false);
    block_product(rows, keys, p, dout, v, b->dscores, KEY_BLOCK, false);
    for (int64_t r = 0; r < rows; r++) {
        float *scores = b->scores + r * KEY_BLOCK, *dscores = b->dscores + r * KEY_BLOCK, scale = (float)s->scale;
        float logsumexp = ((const float *)a->logsumexp.data)[(base + first + r) * s->head_count + head];
        int64_t visible = smaller(keys, first + r + 1 - key);
        visible = visible < 0 ? 0 : visible;
        for (int64_t j = 0; j < visible; j++) {
            scores[j] = fast_exp(scores[j] * scale - logsumexp);
            dscores[j] = scores[j] * (dscores[j] - b->delta[first + r]) * scale;
        }
        memset(scores + visible, 0, (size_t)(keys - visible) * sizeof *scores);
        memset(dscores + visible, 0, (size_t)(keys - visible) * sizeof *dscores);
    }
    dout.depth_in_rows = q.depth_in_rows = k.depth_in_rows = true;
    block_product(keys, p, rows, block_operand(b->scores, KEY_BLOCK, true), dout, b->dv + key * p, p, true);
    block_product(keys, p, rows, block_operand(b->dscores, KEY_BLOCK, true), q, b->dk + key * p, p, true);
    block_product(rows, p, keys, block_operand(b->dscores, KEY_BLOCK, false), k, b->dq + first * p, p, true);
}

static void store_head(struct tensor t, int64_t sequence_first, int64_t column, int64_t count, int64_t p,
                       const float *values) {
    for (int64_t r = 0; r < count; r++) {
        struct tensor to = t;
        to.data = (char *)t.data + (size_t)((sequence_first + r) * t.shape[1] + column) * dtype_size(t.dtype);
        store_row(to, 0, p, values + r * p);
    }
}

/* All heads that read one key-value head, one after the other: the sums into dk and dv have one order. */
static void backward_task(void *context, int64_t index) {
    const struct attention *a = context;
    const struct attention_shape *s = &a->shape;
    int64_t p = s->head_dim, t = s->query_count, batch = index / s->kv_head_count, kv_head = index % s->kv_head_count;
    int64_t heads = s->head_count / s->kv_head_count;
    size_t bytes = (size_t)(t * p) * sizeof(float);
    struct backward_buffers b = {
        .scores = slot_take(SLOT_C, 2 * QUERY_BLOCK * KEY_BLOCK * sizeof(float)),
        .dq = slot_take(SLOT_D, bytes),
        .dk = slot_take(SLOT_E, bytes),
        .dv = slot_take(SLOT_F, bytes),
        .delta = slot_take(SLOT_G, (size_t)t * sizeof(float)),
    };
    b.dscores = b.scores + QUERY_BLOCK * KEY_BLOCK;
    memset(b.dk, 0, bytes);
    memset(b.dv, 0, bytes);
    for (int64_t h = 0; h < heads; h++) {
        int64_t head = kv_head * heads + h;
        memset(b.dq, 0, bytes);
        row_products(a, batch * t, head * p, t, b.delta);
        for (int64_t first = 0; first < t; first += QUERY_BLOCK) {
            int64_t rows = smaller(QUERY_BLOCK, t - first);
            for (int64_t key = 0; key < first + rows; key += KEY_BLOCK)
                backward_block(a, &b, batch, head, first, rows, key, smaller(KEY_BLOCK, first + rows - key));
        }
        store_head(a->dq, batch * t, head * p, t, p, b.dq);
    }
    store_head(a->dk, batch * t, kv_head * p, t, p, b.dk);
    store_head(a->dv, batch * t, kv_head * p, t, p, b.dv);
}

static void attention_backward(struct attention_shape shape, struct tensor dout, struct tensor q, struct tensor k,
                               struct tensor v, struct tensor out, struct tensor logsumexp, struct tensor dq,
                               struct tensor dk, struct tensor dv) {
    if (is_f64(q)) {
        kernels_ref()->attention_backward(shape, dout, q, k, v, out, logsumexp, dq, dk, dv);
        return;
    }
    check_shapes(&shape, q, k, v);
    CHECK_OP(shape.query_count, ==, shape.key_count);
    struct attention a = {.shape = shape, .q = q, .k = k, .v = v, .out = out, .logsumexp = logsumexp, .dout = dout,
                          .dq = dq, .dk = dk, .dv = dv};
    parallel_for(shape.batch * shape.kv_head_count, backward_task, &a);
}

void ISA_NAME(attention_fill)(struct kernel_ops *ops) {
    ops->attention_forward = attention_forward;
    ops->attention_backward = attention_backward;
}
