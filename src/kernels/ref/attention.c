/* Causal attention. One sequence and one key-value head with all its query heads is one task: no two tasks
 * then add to the same dk and dv. */
#include "kernels/ref/ref.h"

#include <string.h>

struct attention_job {
    struct attention_shape shape;
    const double *q, *k, *v, *out, *dout, *logsumexp;
    double *dq, *dk, *dv;                 /* backward */
    struct tensor out_tensor, lse_tensor; /* forward */
};

static double dot(const double *a, const double *b, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++)
        sum += a[i] * b[i];
    return sum;
}

/* Flat index of the head vector of query i: [B, query_count, H, P]. */
static int64_t query_at(struct attention_shape shape, int64_t batch, int64_t i, int64_t head) {
    return ((batch * shape.query_count + i) * shape.head_count + head) * shape.head_dim;
}

/* The same for key or value j: [B, key_count, G, P]. */
static int64_t key_at(struct attention_shape shape, int64_t batch, int64_t j, int64_t kv_head) {
    return ((batch * shape.key_count + j) * shape.kv_head_count + kv_head) * shape.head_dim;
}

static void forward_query(const struct attention_job *job, int64_t batch, int64_t i, int64_t head) {
    struct attention_shape shape = job->shape;
    int64_t width = shape.head_dim, kv_head = head / (shape.head_count / shape.kv_head_count);
    int64_t seen = shape.key_count - shape.query_count + i + 1, at = query_at(shape, batch, i, head);
    double *score = ref_zeros(seen), *sum = ref_zeros(width);
    for (int64_t j = 0; j < seen; j++)
        score[j] = shape.scale * dot(job->q + at, job->k + key_at(shape, batch, j, kv_head), width);
    double lse = ref_logsumexp(score, seen);
    for (int64_t j = 0; j < seen; j++)
        ref_add_scaled(sum, exp(score[j] - lse), job->v + key_at(shape, batch, j, kv_head), width);
    ref_write(job->out_tensor, at, width, sum, false);
    ref_store(job->lse_tensor, at / width, lse);
    free(score);
    free(sum);
}

static void backward_query(const struct attention_job *job, int64_t batch, int64_t i, int64_t head) {
    struct attention_shape shape = job->shape;
    int64_t width = shape.head_dim, kv_head = head / (shape.head_count / shape.kv_head_count);
    int64_t at = query_at(shape, batch, i, head);
    /* sum_j p_j dp_j, by way of out_i = sum_j p_j v_j */
    double delta = dot(job->dout + at, job->out + at, width);
    for (int64_t j = 0; j <= i; j++) {
        int64_t key = key_at(shape, batch, j, kv_head);
        double p = exp(shape.scale * dot(job->q + at, job->k + key, width) - job->logsumexp[at / width]);
        double dscore = p * (dot(job->dout + at, job->v + key, width) - delta);
        ref_add_scaled(job->dv + key, p, job->dout + at, width);
        ref_add_scaled(job->dq + at, shape.scale * dscore, job->k + key, width);
        ref_add_scaled(job->dk + key, shape.scale * dscore, job->q + at, width);
    }
}

/* task = batch * G + kv_head */
static void attention_group(void *context, int64_t task) {
    const struct attention_job *job = context;
    int64_t batch = task / job->shape.kv_head_count, kv_head = task % job->shape.kv_head_count;
    int64_t group = job->shape.head_count / job->shape.kv_head_count;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (int64_t i = 0; i < job->shape.query_count; i++) {
            if (job->dq)
                backward_query(job, batch, i, head);
            else
                forward_query(job, batch, i, head);
        }
}

static bool is_query(struct attention_shape shape, struct tensor t, enum dtype dtype) {
    return t.dtype == dtype &&
           ref_is_2d(t, shape.batch * shape.query_count, (int64_t)shape.head_count * shape.head_dim);
}

static bool is_key(struct attention_shape shape, struct tensor t, enum dtype dtype) {
    return t.dtype == dtype &&
           ref_is_2d(t, shape.batch * shape.key_count, (int64_t)shape.kv_head_count * shape.head_dim);
}

static void check_attention(struct attention_shape shape, struct tensor q, struct tensor k, struct tensor v,
                            struct tensor out, struct tensor logsumexp) {
    CHECK(shape.batch >= 0 && shape.query_count >= 0 && shape.head_dim >= 1);
    CHECK_OP(shape.key_count, >=, shape.query_count);
    CHECK(shape.kv_head_count >= 1 && shape.head_count % shape.kv_head_count == 0);
    CHECK(ref_is_float(q) && is_query(shape, q, q.dtype) && is_query(shape, out, q.dtype));
    CHECK(is_key(shape, k, q.dtype) && is_key(shape, v, q.dtype));
    CHECK(ref_is_real(logsumexp, q.dtype));
    CHECK(ref_is_1d(logsumexp, shape.batch * shape.query_count * shape.head_count));
}

void ref_attention_forward(struct attention_shape shape, struct tensor q, struct tensor k, struct tensor v,
                           struct tensor out, struct tensor logsumexp) {
    check_attention(shape, q, k, v, out, logsumexp);
    double *qs = ref_read(q), *ks = ref_read(k), *vs = ref_read(v);
    struct attention_job job = {
        .shape = shape, .q = qs, .k = ks, .v = vs, .out_tensor = out, .lse_tensor = logsumexp};
    parallel_for(shape.batch * shape.kv_head_count, attention_group, &job);
    free(qs);
    free(ks);
    free(vs);
}

void ref_attention_kept(struct attention_shape shape, struct tensor q, struct tensor k, struct tensor v, struct tensor kept,
                        struct tensor out, struct tensor logsumexp) {
    check_attention(shape, q, k, v, out, logsumexp);
    CHECK_OP(shape.batch, ==, 1);
    CHECK(kept.dtype == DTYPE_I32 && ref_is_1d(kept, 1));
    int64_t count = ref_index(kept, 0) + shape.query_count;
    CHECK(count >= shape.query_count && count <= shape.key_count);
    shape.key_count = count;
    ref_attention_forward(shape, q, tensor_rows(k, 0, count), tensor_rows(v, 0, count), out, logsumexp);
}

void ref_attention_keep(struct tensor key, struct tensor value, struct tensor kept, struct tensor keys, struct tensor values) {
    int64_t rows = key.shape[0], width = key.shape[1], capacity = keys.shape[0];
    CHECK(ref_is_float(key) && ref_is_2d(key, rows, width) && tensor_same_shape(key, value) && value.dtype == key.dtype);
    CHECK(ref_is_2d(keys, capacity, width) && tensor_same_shape(keys, values));
    CHECK(keys.dtype == key.dtype && values.dtype == key.dtype && kept.dtype == DTYPE_I32 && ref_is_1d(kept, 1));
    int64_t first = ref_index(kept, 0);
    CHECK(first >= 0 && first + rows <= capacity);
    memcpy(tensor_rows(keys, first, rows).data, key.data, tensor_bytes(key));
    memcpy(tensor_rows(values, first, rows).data, value.data, tensor_bytes(value));
}

void ref_attention_backward(struct attention_shape shape, struct tensor dout, struct tensor q,
                            struct tensor k, struct tensor v, struct tensor out, struct tensor logsumexp,
                            struct tensor dq, struct tensor dk, struct tensor dv) {
    check_attention(shape, q, k, v, out, logsumexp);
    CHECK_OP(shape.key_count, ==, shape.query_count);
    CHECK(is_query(shape, dout, q.dtype) && is_query(shape, dq, q.dtype));
    CHECK(is_key(shape, dk, q.dtype) && is_key(shape, dv, q.dtype));
    double *qs = ref_read(q), *ks = ref_read(k), *vs = ref_read(v);
    double *outs = ref_read(out), *douts = ref_read(dout), *lse = ref_read(logsumexp);
    int64_t query_elements = tensor_elements(q), key_elements = tensor_elements(k);
    double *dqs = ref_zeros(query_elements), *dks = ref_zeros(key_elements), *dvs = ref_zeros(key_elements);
    struct attention_job job = {.shape = shape,
                                .q = qs,
                                .k = ks,
                                .v = vs,
                                .out = outs,
                                .dout = douts,
                                .logsumexp = lse,
                                .dq = dqs,
                                .dk = dks,
                                .dv = dvs};
    parallel_for(shape.batch * shape.kv_head_count, attention_group, &job);
    ref_write(dq, 0, query_elements, dqs, false);
    ref_write(dk, 0, key_elements, dks, false);
    ref_write(dv, 0, key_elements, dvs, false);
    double *scratch[] = {qs, ks, vs, outs, douts, lse, dqs, dks, dvs};
    for (size_t i = 0; i < sizeof scratch / sizeof *scratch; i++)
        free(scratch[i]);
}
