/* Causal attention in blocks: no T x T matrix, no work above the diagonal blocks. Softmax is kept as a running maximum
 * and sum for each query (arXiv 2205.14135); backward makes a block's weights again from the saved logsumexp.
 *
 * Invariants
 *  1. A number of a result is the work of one task, in an order given by the shapes: nothing depends on the threads.
 *  2. All products multiply packed panels of the operands' own dtype, sums in f32. Weights and gradients of scores are
 *     therefore rounded to bf16 where the tensors are bf16; sums over them are of the numbers before that.
 *  3. Keys and values are packed once for all the queries of a task; blocks of them are parts of what is packed, so
 *     they begin at multiples of KEY_BLOCK.
 *  4. In backward all that one pass of queries over CHUNK keys touches again and again fits the second cache (heads of
 *     64: about 0.5 MiB).
 */
#include "base/threads.h"
#include "kernels/cpu/fillers.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa/tile.h"
#include "kernels/cpu/isa/softmax.h"
#include "kernels/cpu/scratch.h"

enum {
    QUERY_BLOCK = 48,
    KEY_BLOCK = 128,          /* whole panels, whole tiles of pairs */
    CHUNK = 384,              /* keys of one pass of backward; a multiple of both blocks */
    CHUNK_STRIDE = CHUNK + 16, /* rows of sums do not all lie on the same cache sets */
    TASKS_WANTED = 64,
    TASK_QUERIES_MIN = 256, /* rows of the heads of a group together: fewer do not repay packing keys and values */
};

struct attention {
    struct attention_shape shape;
    struct tensor out, logsumexp, dq, dk, dv;
    struct matrix q, k, v, dout, kept_out;
    enum dtype dtype;
    int64_t group;         /* query heads of one key-value head */
    int64_t offset;        /* query i sees keys 0 .. offset + i */
    int64_t row_floats;    /* of f32 sums of one head, whole vectors */
    float exponent;        /* 2^(exponent * score) = e^(scale * score) */
    int64_t task_queries, query_tasks;
};

/* ---- scratch: parts of one block, counted first, then placed ---- */

struct parts {
    float *memory; /* NULL: only counted */
    int64_t floats;
};

static float *part_take(struct parts *parts, int64_t floats) {
    float *part = parts->memory ? parts->memory + parts->floats : NULL;
    parts->floats += divide_up(floats, 16) * 16;
    return part;
}

/* A block [QUERY_BLOCK, KEY_BLOCK] of the tensors' dtype that lies over one of floats: every row at the beginning of
 * the row of floats that it is made from. */
static struct matrix block_over(const struct attention *a, float *floats) {
    int element_bytes = a->q.element_bytes;
    return (struct matrix){(char *)floats, KEY_BLOCK * 4 / element_bytes, element_bytes, NULL};
}

static bool is_paired(const struct attention *a) {
    return word_elements(&a->q) == 2;
}

/* Where a packed B of columns of the matrix, as many as a head has, continues at row `row` of what was packed. */
static const float *panel_row(const struct attention *a, const float *packed, int64_t row) {
    return packed + row / word_elements(&a->k) * TILE_COLUMNS;
}

/* Where a packed B of rows of the matrix, k along one head, continues at row `row`, a multiple of KEY_BLOCK. */
static const float *panel_lane(const struct attention *a, const float *packed, int64_t row) {
    return packed + row / TILE_COLUMNS * panel_floats(words_of(&a->k, a->shape.head_dim), TILE_COLUMNS);
}

/* ---- forward ---- */

struct forward_scratch {
    float *keys, *values;    /* packed B: lanes are keys; lanes are columns, k the keys */
    int64_t value_floats;    /* of a panel of values */
    float *queries, *packed; /* packed A: a block of queries; its weights */
    float *scores;           /* [QUERY_BLOCK, KEY_BLOCK] */
    struct matrix weights;   /* over them */
    float *out;              /* [QUERY_BLOCK, row_floats] */
    struct softmax *softmax; /* [QUERY_BLOCK] */
};

static struct forward_scratch forward_scratch_place(const struct attention *a, int64_t keys, struct parts *parts) {
    struct forward_scratch s;
    int64_t p = a->shape.head_dim, words = words_of(&a->k, p), key_words = words_of(&a->v, keys);
    s.softmax = (struct softmax *)part_take(parts, QUERY_BLOCK * (int64_t)(sizeof *s.softmax / sizeof(float)));
    s.keys = part_take(parts, block_floats(keys, words, TILE_COLUMNS));
    s.values = part_take(parts, block_floats(p, key_words, TILE_COLUMNS));
    s.value_floats = panel_floats(key_words, TILE_COLUMNS);
    s.queries = part_take(parts, block_floats(QUERY_BLOCK, words, A_LANES));
    s.packed = part_take(parts, block_floats(QUERY_BLOCK, words_of(&a->k, KEY_BLOCK), A_LANES));
    s.scores = part_take(parts, QUERY_BLOCK * KEY_BLOCK);
    s.weights = block_over(a, s.scores);
    s.out = part_take(parts, QUERY_BLOCK * a->row_floats);
    return s;
}

static struct forward_scratch forward_scratch_take(const struct attention *a, int64_t keys) {
    struct parts parts = {0};
    forward_scratch_place(a, keys, &parts);
    parts = (struct parts){.memory = scratch_task((size_t)parts.floats * sizeof(float))};
    return forward_scratch_place(a, keys, &parts);
}

ALWAYS_INLINE void soften_block(enum dtype dtype, const struct attention *a, const struct forward_scratch *s,
                                int64_t first, int64_t rows, int64_t key, int64_t keys) {
    float most[QUERY_BLOCK];
    for (int64_t r = 0; r < rows; r++) {
        float *scores = s->scores + r * KEY_BLOCK;
        hide_keys(scores, at_most(keys, first + r + a->offset + 1 - key), keys);
        most[r] = softmax_largest(scores, keys) * a->exponent;
    }
    for (int64_t r = 0; r < rows; r++)
        if (most[r] > s->softmax[r].most)
            softmax_raise(&s->softmax[r], most[r], s->out + r * a->row_floats, a->row_floats);
    for (int64_t r = 0; r < rows; r++)
        softmax_weights(dtype, &s->softmax[r], s->scores + r * KEY_BLOCK, keys, a->exponent,
                        (void *)matrix_at(&s->weights, r, 0));
}

/* A block of queries, in s->queries, against a block of keys. */
static void forward_block(const struct attention *a, const struct forward_scratch *s, int64_t first, int64_t rows,
                          int64_t key, int64_t keys) {
    int64_t p = a->shape.head_dim;
    block_multiply(is_paired(a), s->queries, panel_lane(a, s->keys, key), words_of(&a->k, p), s->scores, KEY_BLOCK,
                   rows, keys, false);
    if (a->dtype == DTYPE_F32)
        soften_block(DTYPE_F32, a, s, first, rows, key, keys);
    else
        soften_block(DTYPE_BF16, a, s, first, rows, key, keys);
    pack_a(LANES_ARE_ROWS, &s->weights, 0, rows, 0, keys, s->packed);
    block_multiply_panels(is_paired(a), s->packed, panel_row(a, s->values, key), s->value_floats,
                          words_of(&a->v, keys), s->out, a->row_floats, rows, p, key > 0);
}

/* Results of one query, at row `row` of the outputs. */
static void store_query(const struct attention *a, const struct softmax *softmax, const float *out, int64_t row,
                        int64_t head) {
    int64_t p = a->shape.head_dim, at = row * a->out.shape[1] + head * p;
    float sum = vector_sum(softmax->sum);
    if (a->dtype == DTYPE_F32)
        row_store(DTYPE_F32, a->out.data, at, out, p, 1 / sum);
    else
        row_store(DTYPE_BF16, a->out.data, at, out, p, 1 / sum);
    ((float *)a->logsumexp.data)[row * a->shape.head_count + head] = softmax_logsumexp(softmax, sum);
}

static void forward_rows(const struct attention *a, const struct forward_scratch *s, int64_t batch, int64_t head,
                         int64_t first, int64_t rows) {
    int64_t p = a->shape.head_dim, row = batch * a->shape.query_count + first, end = first + rows + a->offset;
    pack_a(LANES_ARE_ROWS, &a->q, row, rows, head * p, p, s->queries);
    for (int64_t r = 0; r < rows; r++)
        s->softmax[r] = softmax_start();
    for (int64_t key = 0; key < end; key += KEY_BLOCK)
        forward_block(a, s, first, rows, key, at_most(end - key, KEY_BLOCK));
    for (int64_t r = 0; r < rows; r++)
        store_query(a, &s->softmax[r], s->out + r * a->row_floats, row + r, head);
}

/* task_queries queries of all the heads that read one key-value head. The last queries, which see most, come first. */
static void forward_task(void *context, int64_t index) {
    const struct attention *a = context;
    const struct attention_shape *shape = &a->shape;
    int64_t pairs = shape->batch * shape->kv_head_count, p = shape->head_dim;
    int64_t batch = index % pairs / shape->kv_head_count, kv_head = index % shape->kv_head_count;
    int64_t first = (a->query_tasks - 1 - index / pairs) * a->task_queries;
    int64_t end = at_most(first + a->task_queries, shape->query_count), keys = end + a->offset;
    struct forward_scratch s = forward_scratch_take(a, keys);
    pack_b(LANES_ARE_ROWS, &a->k, batch * shape->key_count, keys, kv_head * p, p, s.keys);
    pack_b(LANES_ARE_COLUMNS, &a->v, kv_head * p, p, batch * shape->key_count, keys, s.values);
    for (int64_t head = kv_head * a->group; head < (kv_head + 1) * a->group; head++)
        for (int64_t row = first; row < end; row += QUERY_BLOCK)
            forward_rows(a, &s, batch, head, row, at_most(end - row, QUERY_BLOCK));
}

#include "kernels/cpu/isa/attention_few.h"

/* ---- checks and the calls ---- */

static struct attention attention_of(struct attention_shape s, struct tensor q, struct tensor k, struct tensor v,
                                     struct tensor out, struct tensor logsumexp) {
    int64_t columns = (int64_t)s.head_count * s.head_dim, kv_columns = (int64_t)s.kv_head_count * s.head_dim;
    CHECK(is_fast(q) && k.dtype == q.dtype && v.dtype == q.dtype && out.dtype == q.dtype);
    CHECK(logsumexp.dtype == DTYPE_F32 && s.scale > 0);
    CHECK(s.head_count % s.kv_head_count == 0 && s.key_count >= s.query_count);
    CHECK(q.shape[0] == s.batch * s.query_count && q.shape[1] == columns);
    CHECK(k.shape[0] == s.batch * s.key_count && k.shape[1] == kv_columns);
    CHECK(tensor_same_shape(k, v) && tensor_same_shape(q, out));
    return (struct attention){
        .shape = s,
        .out = out,
        .logsumexp = logsumexp,
        .q = matrix_of(q, columns, tensor_none()),
        .k = matrix_of(k, kv_columns, tensor_none()),
        .v = matrix_of(v, kv_columns, tensor_none()),
        .dtype = q.dtype,
        .group = s.head_count / s.kv_head_count,
        .offset = s.key_count - s.query_count,
        .row_floats = divide_up(s.head_dim, VECTOR_LANES) * VECTOR_LANES,
        .exponent = (float)(s.scale * 1.44269504088896341),
    };
}

/* Tasks as large as leaves enough of them. */
static void cut_queries(struct attention *a) {
    int64_t pairs = a->shape.batch * a->shape.kv_head_count;
    int64_t least = divide_up(divide_up(TASK_QUERIES_MIN, a->group), QUERY_BLOCK) * QUERY_BLOCK;
    int64_t wanted = divide_up(a->shape.query_count, divide_up(TASKS_WANTED, pairs + 1));
    a->task_queries = divide_up(wanted > least ? wanted : least, QUERY_BLOCK) * QUERY_BLOCK;
    a->query_tasks = divide_up(a->shape.query_count, a->task_queries);
}

static void attention_forward(struct attention_shape shape, struct tensor q, struct tensor k, struct tensor v,
                              struct tensor out, struct tensor logsumexp) {
    if (q.dtype == DTYPE_F64) {
        kernels_ref()->attention_forward(shape, q, k, v, out, logsumexp);
        return;
    }
    struct attention a = attention_of(shape, q, k, v, out, logsumexp);
    if (shape.query_count <= FEW_QUERIES_MAX) {
        few_forward(&a);
        return;
    }
    cut_queries(&a);
    parallel_for(shape.batch * shape.kv_head_count * a.query_tasks, forward_task, &a);
}

/* ---- backward ---- */

struct backward_scratch {
    float *keys, *values, *keys_across;   /* packed B of a chunk: lanes are keys, keys; lanes are columns */
    int64_t across_floats;                /* of a panel of keys_across */
    float *queries, *douts;               /* packed A of a block of queries: lanes are queries */
    float *queries_across, *douts_across; /* lanes are columns */
    float *packed;                        /* A or B: a block of weights or gradients of scores */
    float *scores, *dweights;             /* [QUERY_BLOCK, KEY_BLOCK] */
    struct matrix weights, dscores;       /* over scores; over dweights */
    float *delta, *logsumexp;             /* [T], of one head; of base 2 */
    float *dq;                            /* [T, row_floats] of one head */
    float *dk, *dv;                       /* [chunk][row_floats][CHUNK_STRIDE]: a head's columns by a chunk's keys */
};

static struct backward_scratch backward_scratch_place(const struct attention *a, struct parts *parts) {
    struct backward_scratch s;
    int64_t p = a->shape.head_dim, t = a->shape.query_count, chunk = at_most(t, CHUNK);
    int64_t words = words_of(&a->k, p), row_words = words_of(&a->k, QUERY_BLOCK), chunk_words = words_of(&a->k, chunk);
    s.keys = part_take(parts, block_floats(chunk, words, TILE_COLUMNS));
    s.values = part_take(parts, block_floats(chunk, words, TILE_COLUMNS));
    s.keys_across = part_take(parts, block_floats(p, chunk_words, TILE_COLUMNS));
    s.across_floats = panel_floats(chunk_words, TILE_COLUMNS);
    s.queries = part_take(parts, block_floats(QUERY_BLOCK, words, A_LANES));
    s.douts = part_take(parts, block_floats(QUERY_BLOCK, words, A_LANES));
    s.queries_across = part_take(parts, block_floats(p, row_words, A_LANES));
    s.douts_across = part_take(parts, block_floats(p, row_words, A_LANES));
    int64_t as_a = block_floats(QUERY_BLOCK, words_of(&a->k, KEY_BLOCK), A_LANES);
    int64_t as_b = block_floats(KEY_BLOCK, row_words, TILE_COLUMNS);
    s.packed = part_take(parts, as_a > as_b ? as_a : as_b);
    s.scores = part_take(parts, QUERY_BLOCK * KEY_BLOCK);
    s.dweights = part_take(parts, QUERY_BLOCK * KEY_BLOCK);
    s.weights = block_over(a, s.scores);
    s.dscores = block_over(a, s.dweights);
    s.delta = part_take(parts, t);
    s.logsumexp = part_take(parts, t);
    s.dq = part_take(parts, t * a->row_floats);
    s.dk = part_take(parts, divide_up(t, CHUNK) * a->row_floats * CHUNK_STRIDE);
    s.dv = part_take(parts, divide_up(t, CHUNK) * a->row_floats * CHUNK_STRIDE);
    return s;
}

static struct backward_scratch backward_scratch_take(const struct attention *a) {
    struct parts parts = {0};
    backward_scratch_place(a, &parts);
    parts = (struct parts){.memory = scratch_task((size_t)parts.floats * sizeof(float))};
    return backward_scratch_place(a, &parts);
}

/* What every gradient of a query's weights is measured against: sum over i of dout[i] * out[i]. */
static void prepare_queries(const struct attention *a, const struct backward_scratch *s, int64_t batch, int64_t head) {
    int64_t p = a->shape.head_dim, t = a->shape.query_count;
    for (int64_t i = 0; i < t; i++) {
        int64_t row = batch * t + i, at = row * a->dout.columns + head * p;
        s->delta[i] = a->dtype == DTYPE_F32 ? row_dot(DTYPE_F32, a->dout.data, a->kept_out.data, at, p)
                                            : row_dot(DTYPE_BF16, a->dout.data, a->kept_out.data, at, p);
        s->logsumexp[i] = ((const float *)a->logsumexp.data)[row * a->shape.head_count + head] * 1.44269504f;
    }
}

ALWAYS_INLINE void soften_block_backward(enum dtype dtype, const struct attention *a, const struct backward_scratch *s,
                                         int64_t first, int64_t rows, int64_t key, int64_t keys) {
    for (int64_t r = 0; r < rows; r++) {
        float *scores = s->scores + r * KEY_BLOCK;
        hide_keys(scores, at_most(keys, first + r + 1 - key), keys);
        softmax_row_backward(dtype, scores, s->dweights + r * KEY_BLOCK, keys, a->exponent, s->logsumexp[first + r],
                             s->delta[first + r], (void *)matrix_at(&s->weights, r, 0),
                             (void *)matrix_at(&s->dscores, r, 0));
    }
}

/* A block of queries, packed in s, against `keys` keys from `key` on, of the chunk that begins at `chunk`. */
static void backward_block(const struct attention *a, const struct backward_scratch *s, int64_t first, int64_t rows,
                           int64_t chunk, int64_t key, int64_t keys) {
    int64_t p = a->shape.head_dim, words = words_of(&a->k, p), row_words = words_of(&a->k, rows);
    int64_t sums = chunk / CHUNK * a->row_floats * CHUNK_STRIDE + key - chunk;
    bool pairs = is_paired(a);
    block_multiply(pairs, s->queries, panel_lane(a, s->keys, key - chunk), words, s->scores, KEY_BLOCK, rows, keys,
                   false);
    block_multiply(pairs, s->douts, panel_lane(a, s->values, key - chunk), words, s->dweights, KEY_BLOCK, rows, keys,
                   false);
    if (a->dtype == DTYPE_F32)
        soften_block_backward(DTYPE_F32, a, s, first, rows, key, keys);
    else
        soften_block_backward(DTYPE_BF16, a, s, first, rows, key, keys);
    pack_b(LANES_ARE_COLUMNS, &s->weights, 0, keys, 0, rows, s->packed);
    block_multiply(pairs, s->douts_across, s->packed, row_words, s->dv + sums, CHUNK_STRIDE, p, keys, true);
    pack_b(LANES_ARE_COLUMNS, &s->dscores, 0, keys, 0, rows, s->packed);
    block_multiply(pairs, s->queries_across, s->packed, row_words, s->dk + sums, CHUNK_STRIDE, p, keys, true);
    pack_a(LANES_ARE_ROWS, &s->dscores, 0, rows, 0, keys, s->packed);
    block_multiply_panels(pairs, s->packed, panel_row(a, s->keys_across, key - chunk), s->across_floats,
                          words_of(&a->k, keys), s->dq + first * a->row_floats, a->row_floats, rows, p, key > 0);
}

/* All queries of a head that see keys of the chunk. */
static void backward_chunk(const struct attention *a, const struct backward_scratch *s, int64_t batch, int64_t head,
                           int64_t chunk) {
    int64_t p = a->shape.head_dim, t = a->shape.query_count, row = batch * t;
    for (int64_t first = chunk; first < t; first += QUERY_BLOCK) {
        int64_t rows = at_most(t - first, QUERY_BLOCK), end = at_most(first + rows, chunk + CHUNK);
        pack_a(LANES_ARE_ROWS, &a->q, row + first, rows, head * p, p, s->queries);
        pack_a(LANES_ARE_ROWS, &a->dout, row + first, rows, head * p, p, s->douts);
        pack_a(LANES_ARE_COLUMNS, &a->q, head * p, p, row + first, rows, s->queries_across);
        pack_a(LANES_ARE_COLUMNS, &a->dout, head * p, p, row + first, rows, s->douts_across);
        for (int64_t key = chunk; key < end; key += KEY_BLOCK)
            backward_block(a, s, first, rows, chunk, key, at_most(end - key, KEY_BLOCK));
    }
}

static void pack_chunk(const struct attention *a, const struct backward_scratch *s, int64_t batch, int64_t kv_head,
                       int64_t chunk) {
    int64_t p = a->shape.head_dim, t = a->shape.query_count, row = batch * t + chunk, keys = at_most(t - chunk, CHUNK);
    pack_b(LANES_ARE_ROWS, &a->k, row, keys, kv_head * p, p, s->keys);
    pack_b(LANES_ARE_ROWS, &a->v, row, keys, kv_head * p, p, s->values);
    int64_t chunk_words = words_of(&a->k, at_most(t, CHUNK)); /* the last chunk's panels lie as far apart as the others' */
    if (a->k.element_bytes == 4)
        pack_columns(4, &a->k, kv_head * p, p, row, keys, TILE_COLUMNS, chunk_words, s->keys_across);
    else
        pack_columns(2, &a->k, kv_head * p, p, row, keys, TILE_COLUMNS, chunk_words, s->keys_across);
}

/* The gradients of keys or values of one head lie with the keys along the rows: turned round, a square at a time. */
ALWAYS_INLINE void store_across(enum dtype dtype, const struct attention *a, struct tensor t, const float *sums,
                                int64_t batch, int64_t column, float scale) {
    int64_t p = a->shape.head_dim, rows = a->shape.query_count;
    for (int64_t key = 0; key < rows; key += VECTOR_LANES) {
        const float *from = sums + key / CHUNK * a->row_floats * CHUNK_STRIDE + key % CHUNK;
        for (int64_t i = 0; i < p; i += VECTOR_LANES) {
            vector_f32 v[VECTOR_LANES];
#pragma GCC unroll 16
            for (int j = 0; j < VECTOR_LANES; j++)
                v[j] = vector_load(from + (i + j) * CHUNK_STRIDE) * scale;
            vector_transpose(v);
            for (int64_t j = 0; j < at_most(rows - key, VECTOR_LANES); j++)
                numbers_store(dtype, t.data, (batch * rows + key + j) * t.shape[1] + column + i,
                              at_most(p - i, VECTOR_LANES), v[j]);
        }
    }
}

ALWAYS_INLINE void store_gradients(enum dtype dtype, const struct attention *a, const struct backward_scratch *s,
                                   int64_t batch, int64_t kv_head) {
    int64_t column = kv_head * a->shape.head_dim;
    store_across(dtype, a, a->dk, s->dk, batch, column, (float)a->shape.scale);
    store_across(dtype, a, a->dv, s->dv, batch, column, 1);
}

ALWAYS_INLINE void store_dq(enum dtype dtype, const struct attention *a, const struct backward_scratch *s, int64_t batch,
                            int64_t head) {
    int64_t p = a->shape.head_dim, t = a->shape.query_count;
    for (int64_t i = 0; i < t; i++)
        row_store(dtype, a->dq.data, (batch * t + i) * a->dq.shape[1] + head * p, s->dq + i * a->row_floats, p,
                  (float)a->shape.scale);
}

/* All heads that read one key-value head, one after the other: the sums into dk and dv have one order. */
static void backward_task(void *context, int64_t index) {
    const struct attention *a = context;
    int64_t t = a->shape.query_count;
    int64_t batch = index / a->shape.kv_head_count, kv_head = index % a->shape.kv_head_count;
    size_t sum_bytes = (size_t)(divide_up(t, CHUNK) * a->row_floats * CHUNK_STRIDE) * sizeof(float);
    struct backward_scratch s = backward_scratch_take(a);
    memset(s.dk, 0, sum_bytes);
    memset(s.dv, 0, sum_bytes);
    for (int64_t head = kv_head * a->group; head < (kv_head + 1) * a->group; head++) {
        prepare_queries(a, &s, batch, head);
        for (int64_t chunk = 0; chunk < t; chunk += CHUNK) {
            if (t > CHUNK || head == kv_head * a->group)
                pack_chunk(a, &s, batch, kv_head, chunk);
            backward_chunk(a, &s, batch, head, chunk);
        }
        if (a->dtype == DTYPE_F32)
            store_dq(DTYPE_F32, a, &s, batch, head);
        else
            store_dq(DTYPE_BF16, a, &s, batch, head);
    }
    if (a->dtype == DTYPE_F32)
        store_gradients(DTYPE_F32, a, &s, batch, kv_head);
    else
        store_gradients(DTYPE_BF16, a, &s, batch, kv_head);
}

static void attention_backward(struct attention_shape shape, struct tensor dout, struct tensor q, struct tensor k,
                               struct tensor v, struct tensor out, struct tensor logsumexp, struct tensor dq,
                               struct tensor dk, struct tensor dv) {
    if (q.dtype == DTYPE_F64) {
        kernels_ref()->attention_backward(shape, dout, q, k, v, out, logsumexp, dq, dk, dv);
        return;
    }
    struct attention a = attention_of(shape, q, k, v, out, logsumexp);
    CHECK_OP(shape.query_count, ==, shape.key_count);
    CHECK(dout.dtype == q.dtype && dq.dtype == q.dtype && dk.dtype == q.dtype && dv.dtype == q.dtype);
    CHECK(tensor_same_shape(dout, q) && tensor_same_shape(dq, q));
    CHECK(tensor_same_shape(dk, k) && tensor_same_shape(dv, v));
    a.dout = matrix_of(dout, q.shape[1], tensor_none());
    a.kept_out = matrix_of(out, q.shape[1], tensor_none());
    a.dq = dq;
    a.dk = dk;
    a.dv = dv;
    parallel_for(shape.batch * shape.kv_head_count, backward_task, &a);
}

void ISA_NAME(attention_fill)(struct kernel_ops *ops) {
    ops->attention_forward = attention_forward;
    ops->attention_backward = attention_backward;
}
