/* Cross entropy and the embedding. */
#include "kernels/cpu/isa/exp.h"
#include "kernels/cpu/isa/numbers.h"

#include "base/threads.h"
#include "kernels/cpu/fillers.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/scratch.h"

#include <float.h>

/* ---- cross entropy ---------------------------------------------------------------------------------------------- */

struct cross_entropy {
    struct tensor logits, target, row_loss, dlogits;
    double scale;
    int64_t rows, vocab, rows_per_task;
    double *losses; /* [rows] */
};

enum { BLOCK = 512 };

/* A softmax under way: sum of exp(x - most) over the numbers seen, the largest of which is `most`. For the gradient
 * the exponentials are kept, each block's relative to the largest number until there. */
struct softmax {
    float most;
    double sum;
    float *kept;       /* [vocab], room for a vector more; NULL: not kept */
    float *block_most; /* [blocks] */
};

static int64_t block_count(int64_t vocab) {
    return divide_up(vocab, BLOCK);
}

/* Of this task. */
static struct softmax softmax_of_task(const struct cross_entropy *c) {
    if (!tensor_exists(c->dlogits))
        return (struct softmax){-FLT_MAX, 0, NULL, NULL};
    float *memory = scratch_task((size_t)(c->vocab + VECTOR_LANES + block_count(c->vocab)) * sizeof *memory);
    return (struct softmax){-FLT_MAX, 0, memory, memory + c->vocab + VECTOR_LANES};
}

/* Numbers i .. i+count-1; lanes without one hold what adds nothing. */
ALWAYS_INLINE vector_f32 logits_load(const float *x, int64_t i, int64_t count) {
    vector_f32 v = numbers_load(DTYPE_F32, x, i, count);
    return count < VECTOR_LANES ? vector_fill_from(v, count, -INFINITY) : v;
}

ALWAYS_INLINE float largest_of(const float *x, int64_t count, float most) {
    vector_f32 a = vector_splat(most), b = a;
    int64_t i = 0;
    for (; i + 2 * VECTOR_LANES <= count; i += 2 * VECTOR_LANES) {
        a = vector_max(a, vector_load(x + i));
        b = vector_max(b, vector_load(x + i + VECTOR_LANES));
    }
    for (; i < count; i += VECTOR_LANES)
        a = vector_max(a, logits_load(x, i, at_most(count - i, VECTOR_LANES)));
    return vector_largest(vector_max(a, b));
}

ALWAYS_INLINE vector_f32 exp_kept(vector_f32 x, float *kept) {
    vector_f32 value = vector_exp(x);
    if (kept)
        vector_store(kept, value);
    return value;
}

/* Sum of exp(x - most), two of them so that an addition need not wait for the one before. */
ALWAYS_INLINE float exp_sum(const float *x, int64_t count, float most, float *kept) {
    vector_f32 a = {0}, b = {0};
    int64_t i = 0;
    for (; i + 2 * VECTOR_LANES <= count; i += 2 * VECTOR_LANES) {
        a += exp_kept(vector_load(x + i) - most, kept ? kept + i : NULL);
        b += exp_kept(vector_load(x + i + VECTOR_LANES) - most, kept ? kept + i + VECTOR_LANES : NULL);
    }
    for (; i < count; i += VECTOR_LANES)
        a += exp_kept(logits_load(x, i, at_most(count - i, VECTOR_LANES)) - most, kept ? kept + i : NULL);
    return vector_sum(a + b);
}

/* A block is read twice from the nearest cache and once from memory. Sums of blocks are short enough for floats; what
 * was summed below an older, smaller `most` is scaled down. A NaN fails the comparisons and comes out of the sum. */
static void softmax_row(struct softmax *s, const float *x, int64_t vocab) {
    s->most = -FLT_MAX;
    s->sum = 0;
    for (int64_t block = 0; block < block_count(vocab); block++) {
        const float *from = x + block * BLOCK;
        int64_t count = at_most(vocab - block * BLOCK, BLOCK);
        float most = largest_of(from, count, s->most);
        if (most > s->most) {
            s->sum *= exp((double)s->most - (double)most);
            s->most = most;
        }
        if (s->kept) {
            s->block_most[block] = s->most;
            s->sum += (double)exp_sum(from, count, s->most, s->kept + block * BLOCK);
        } else {
            s->sum += (double)exp_sum(from, count, s->most, NULL);
        }
    }
}

/* Elements first .. of out = scale * p, from the kept exponentials. */
ALWAYS_INLINE void gradient_row(enum dtype dtype, const struct softmax *s, double scale, int64_t vocab, void *out,
                                int64_t first) {
    for (int64_t block = 0; block < block_count(vocab); block++) {
        float factor = (float)(scale / s->sum * exp((double)s->block_most[block] - (double)s->most));
        int64_t i = block * BLOCK, end = at_most(vocab, i + BLOCK);
        for (; i + VECTOR_LANES <= end; i += VECTOR_LANES)
            numbers_store(dtype, out, first + i, VECTOR_LANES, vector_load(s->kept + i) * factor);
        if (i < end)
            numbers_store(dtype, out, first + i, end - i, vector_load(s->kept + i) * factor);
    }
}

ALWAYS_INLINE void zero_row(enum dtype dtype, void *out, int64_t first, int64_t count) {
    const size_t bytes = dtype == DTYPE_BF16 ? 2 : 4;
    memset((char *)out + (size_t)first * bytes, 0, (size_t)count * bytes);
}

/* Returns the loss. dlogits may lie over the logits: it is stored after their last use. */
ALWAYS_INLINE double loss_row(enum dtype dtype, const struct cross_entropy *c, struct softmax *s, int64_t row) {
    int64_t first = row * c->vocab;
    int32_t target = ((const int32_t *)c->target.data)[row];
    const float *x = (const float *)c->logits.data + first;
    void *out = c->dlogits.data;
    if (target < 0) {
        if (out)
            zero_row(dtype, out, first, c->vocab);
        return 0;
    }
    CHECK_OP(target, <, c->vocab);
    softmax_row(s, x, c->vocab);
    double score = (double)x[target] - (double)s->most; /* of the target, 0 at best */
    if (out) {
        gradient_row(dtype, s, c->scale, c->vocab, out, first);
        float gradient = (float)(c->scale * (exp(score) / s->sum - 1));
        numbers_store(dtype, out, first + target, 1, vector_splat(gradient));
    }
    return log(s->sum) - score;
}

ALWAYS_INLINE void loss_rows(enum dtype dtype, const struct cross_entropy *c, int64_t index) {
    struct softmax s = softmax_of_task(c);
    int64_t end = at_most((index + 1) * c->rows_per_task, c->rows);
    for (int64_t row = index * c->rows_per_task; row < end; row++) {
        c->losses[row] = loss_row(dtype, c, &s, row);
        if (tensor_exists(c->row_loss))
            ((float *)c->row_loss.data)[row] = (float)c->losses[row];
    }
}

static void loss_task(void *context, int64_t index) {
    const struct cross_entropy *c = context;
    if (c->dlogits.dtype == DTYPE_BF16)
        loss_rows(DTYPE_BF16, c, index);
    else
        loss_rows(DTYPE_F32, c, index);
}

static void cross_entropy(struct tensor logits, struct tensor target, double scale, struct tensor loss_sum,
                          struct tensor row_loss, struct tensor dlogits) {
    if (logits.dtype != DTYPE_F32 || (tensor_exists(dlogits) && !is_fast(dlogits))) {
        kernels_ref()->cross_entropy(logits, target, scale, loss_sum, row_loss, dlogits);
        return;
    }
    int64_t rows = logits.shape[0], vocab = logits.shape[1];
    CHECK(target.dtype == DTYPE_I32 && loss_sum.dtype == DTYPE_F64);
    CHECK_OP(tensor_elements(target), ==, rows);
    CHECK(!tensor_exists(dlogits) || tensor_same_shape(dlogits, logits));
    CHECK(!tensor_exists(row_loss) || (row_loss.dtype == DTYPE_F32 && tensor_elements(row_loss) == rows));
    struct cross_entropy c = {logits, target, row_loss, dlogits, scale, rows, vocab, rows_per_task(vocab),
                              scratch_call((size_t)rows * sizeof(double))};
    parallel_for(divide_up(rows, c.rows_per_task), loss_task, &c);
    double sum = 0;
    for (int64_t i = 0; i < rows; i++)
        sum += c.losses[i];
    *(double *)loss_sum.data += sum;
}

/* ---- embedding -------------------------------------------------------------------------------------------------- */

enum { COLUMNS_PER_TASK = 64 };

struct embedding {
    struct tensor ids, table, x;
    int64_t rows, width, rows_per_task;
};

static int64_t token_id(const struct embedding *e, int64_t row) {
    int32_t id = ((const int32_t *)e->ids.data)[row];
    CHECK(id >= 0 && id < e->table.shape[0]);
    return id;
}

ALWAYS_INLINE void copy_row(enum dtype table_dtype, enum dtype x_dtype, const struct embedding *e, int64_t from,
                            int64_t to) {
    const void *table = e->table.data;
    void *x = e->x.data;
    int64_t i = 0;
    for (; i + VECTOR_LANES <= e->width; i += VECTOR_LANES)
        numbers_store(x_dtype, x, to + i, VECTOR_LANES, numbers_load(table_dtype, table, from + i, VECTOR_LANES));
    if (i < e->width)
        numbers_store(x_dtype, x, to + i, e->width - i, numbers_load(table_dtype, table, from + i, e->width - i));
}

ALWAYS_INLINE void forward_body(enum dtype table_dtype, enum dtype x_dtype, const void *context, int64_t index) {
    const struct embedding *e = context;
    int64_t end = at_most((index + 1) * e->rows_per_task, e->rows);
    for (int64_t row = index * e->rows_per_task; row < end; row++)
        copy_row(table_dtype, x_dtype, e, token_id(e, row) * e->width, row * e->width);
}

static void forward_task(void *context, int64_t index) {
    const struct embedding *e = context;
    with_dtypes(e->table.dtype, e->x.dtype, forward_body, e, index);
}

static void embedding_forward(struct tensor ids, struct tensor table, struct tensor x) {
    if (!is_fast(table) || !is_fast(x)) {
        kernels_ref()->embedding_forward(ids, table, x);
        return;
    }
    CHECK_OP(table.shape[1], ==, x.shape[1]);
    CHECK_OP(tensor_elements(ids), ==, x.shape[0]);
    struct embedding e = {ids, table, x, x.shape[0], x.shape[1], rows_per_task(x.shape[1])};
    parallel_for(divide_up(e.rows, e.rows_per_task), forward_task, &e);
}

ALWAYS_INLINE void add_numbers(enum dtype dtype, const struct embedding *e, int64_t from, int64_t to, int64_t count) {
    vector_f32 sum = numbers_load(DTYPE_F32, e->table.data, to, count) + numbers_load(dtype, e->x.data, from, count);
    numbers_store(DTYPE_F32, e->table.data, to, count, sum);
}

/* A task owns some columns of the whole table, so that each sum runs over the rows in order. */
ALWAYS_INLINE void backward_columns(enum dtype dtype, const struct embedding *e, int64_t index) {
    int64_t first = index * COLUMNS_PER_TASK, end = at_most(first + COLUMNS_PER_TASK, e->width);
    for (int64_t row = 0; row < e->rows; row++) {
        int64_t from = row * e->width, to = token_id(e, row) * e->width, i = first;
        for (; i + VECTOR_LANES <= end; i += VECTOR_LANES)
            add_numbers(dtype, e, from + i, to + i, VECTOR_LANES);
        if (i < end)
            add_numbers(dtype, e, from + i, to + i, end - i);
    }
}

static void backward_task(void *context, int64_t index) {
    const struct embedding *e = context;
    if (e->x.dtype == DTYPE_BF16)
        backward_columns(DTYPE_BF16, e, index);
    else
        backward_columns(DTYPE_F32, e, index);
}

static void embedding_backward(struct tensor ids, struct tensor dx, struct tensor dtable) {
    if (!is_fast(dx)) {
        kernels_ref()->embedding_backward(ids, dx, dtable);
        return;
    }
    CHECK(dtable.dtype == DTYPE_F32 && tensor_elements(ids) == dx.shape[0]);
    CHECK_OP(dtable.shape[1], ==, dx.shape[1]);
    struct embedding e = {.ids = ids, .table = dtable, .x = dx, .rows = dx.shape[0], .width = dx.shape[1]};
    parallel_for(divide_up(e.width, COLUMNS_PER_TASK), backward_task, &e);
}

void ISA_NAME(loss_fill)(struct kernel_ops *ops) {
    ops->cross_entropy = cross_entropy;
    ops->embedding_forward = embedding_forward;
    ops->embedding_backward = embedding_backward;
}
