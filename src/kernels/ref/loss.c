/* The two ends of the model: embedding and cross entropy. */
#include "kernels/ref/ref.h"

static int64_t token_id(struct tensor ids, int64_t s, struct tensor table) {
    int64_t id = ref_index(ids, s);
    CHECK(id >= 0 && id < table.shape[0]);
    return id;
}

void ref_embedding_forward(struct tensor ids, struct tensor table, struct tensor x) {
    int64_t width = table.shape[1];
    CHECK(ids.dtype == DTYPE_I32 && ref_is_float(table) && ref_is_float(x));
    CHECK(ref_is_2d(table, table.shape[0], width) && ref_is_2d(x, tensor_elements(ids), width));
    for (int64_t s = 0; s < x.shape[0]; s++)
        for (int64_t d = 0; d < width; d++)
            ref_store(x, s * width + d, ref_load(table, token_id(ids, s, table) * width + d));
}

void ref_embedding_backward(struct tensor ids, struct tensor dx, struct tensor dtable) {
    int64_t width = dtable.shape[1];
    CHECK(ids.dtype == DTYPE_I32 && ref_is_float(dx) && ref_is_real(dtable, dx.dtype));
    CHECK(ref_is_2d(dtable, dtable.shape[0], width) && ref_is_2d(dx, tensor_elements(ids), width));
    for (int64_t s = 0; s < dx.shape[0]; s++)
        for (int64_t d = 0; d < width; d++)
            ref_add(dtable, token_id(ids, s, dtable) * width + d, ref_load(dx, s * width + d));
}

struct loss_job {
    struct tensor logits, target, dlogits;
    double scale;
    double *row_loss; /* [R] */
};

static void loss_row(void *context, int64_t r) {
    const struct loss_job *job = context;
    int64_t width = job->logits.shape[1], target = ref_index(job->target, r);
    CHECK_OP(target, <, width);
    double *row = ref_zeros(width); /* logits, then p - onehot */
    if (target >= 0) {
        for (int64_t i = 0; i < width; i++)
            row[i] = ref_load(job->logits, r * width + i);
        double lse = ref_logsumexp(row, width);
        job->row_loss[r] = lse - row[target];
        for (int64_t i = 0; i < width; i++)
            row[i] = job->scale * (exp(row[i] - lse) - (i == target));
    }
    if (tensor_exists(job->dlogits))
        ref_write(job->dlogits, r * width, width, row, false);
    free(row);
}

void ref_cross_entropy(struct tensor logits, struct tensor target, double scale, struct tensor loss_sum,
                       struct tensor row_loss, struct tensor dlogits) {
    int64_t row_count = logits.shape[0];
    CHECK(ref_is_real(logits, logits.dtype) && ref_is_2d(logits, row_count, logits.shape[1]));
    CHECK(target.dtype == DTYPE_I32 && ref_is_1d(target, row_count));
    CHECK(loss_sum.dtype == DTYPE_F64 && ref_is_1d(loss_sum, 1));
    if (tensor_exists(row_loss))
        CHECK(row_loss.dtype == logits.dtype && ref_is_1d(row_loss, row_count));
    if (tensor_exists(dlogits))
        CHECK(ref_is_float(dlogits) && tensor_same_shape(dlogits, logits));
    CHECK(dlogits.data != logits.data || row_count == 0 || dlogits.dtype == logits.dtype);
    struct loss_job job = {logits, target, dlogits, scale, ref_zeros(row_count)};
    parallel_for(row_count, loss_row, &job);
    double sum = 0;
    for (int64_t r = 0; r < row_count; r++)
        sum += job.row_loss[r];
    ref_add(loss_sum, 0, sum);
    if (tensor_exists(row_loss))
        ref_write(row_loss, 0, row_count, job.row_loss, false);
    free(job.row_loss);
}
