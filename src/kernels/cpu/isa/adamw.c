/* AdamW in one pass over parameters, gradients and moments: bound by memory. Weights that products read are packed while
 * their new values are in the cache. */
#include "base/hash.h"
#include "base/threads.h"
#include "kernels/cpu/fillers.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa/weights.h"

#include <math.h>

enum { CHUNK = 1 << 13 };

struct adamw {
    float *param, *m, *v;
    const float *grad;
    int64_t count;
    float beta1, beta2, epsilon, grad_scale, step_size, keep, root_correction;
    struct pack_job pack;
    struct update_hashes hashes;
};

/* p = p (1 - lr wd) - lr * mhat / (sqrt(vhat) + eps), with both corrections folded into factors made once. */
static void update(const struct adamw *a, int64_t first, int64_t count) {
    float *restrict p = a->param + first, *restrict m = a->m + first, *restrict v = a->v + first;
    const float *restrict grad = a->grad + first;
    for (int64_t i = 0; i < count; i++) {
        float g = grad[i] * a->grad_scale;
        m[i] = a->beta1 * m[i] + (1 - a->beta1) * g;
        v[i] = a->beta2 * v[i] + (1 - a->beta2) * g * g;
        p[i] = a->keep * p[i] - a->step_size * m[i] / (sqrtf(v[i]) * a->root_correction + a->epsilon);
    }
}

/* The blocks that lie within elements first .. first+count-1. */
static void hash_updated(const float *of, int64_t first, int64_t count, uint64_t *hashes) {
    const int64_t block = HASH_BLOCK_BYTES / (int64_t)sizeof *of;
    int64_t begin = divide_up(first, block), end = (first + count) / block;
    if (hashes && begin < end)
        hash_blocks(of + begin * block, (size_t)(end - begin) * HASH_BLOCK_BYTES, hashes + begin);
}

static void update_and_hash(const struct adamw *a, int64_t first, int64_t count) {
    update(a, first, count);
    hash_updated(a->param, first, count, a->hashes.param);
    hash_updated(a->m, first, count, a->hashes.m);
    hash_updated(a->v, first, count, a->hashes.v);
}

static void chunk_task(void *context, int64_t index) {
    const struct adamw *a = context;
    update_and_hash(a, index * CHUNK, at_most(CHUNK, a->count - index * CHUNK));
}

/* The rows of weights that one task packs. */
static void rows_task(void *context, int64_t index) {
    const struct adamw *a = context;
    const struct packed *w = &a->pack.to;
    int64_t group = index / a->pack.row_tasks, row = index % a->pack.row_tasks * PACK_ROWS;
    update_and_hash(a, (group * w->out + row) * w->in, at_most(w->out - row, PACK_ROWS) * w->in);
    pack_task(&a->pack, index);
}

static void adamw(struct tensor param, struct tensor grad, struct tensor m, struct tensor v, struct adamw_settings s,
                  struct packed packed, struct update_hashes hashes) {
    if (param.dtype == DTYPE_F64) {
        kernels_ref()->adamw(param, grad, m, v, s, packed, hashes);
        return;
    }
    int64_t count = tensor_elements(param);
    CHECK(param.dtype == DTYPE_F32 && grad.dtype == DTYPE_F32 && m.dtype == DTYPE_F32 && v.dtype == DTYPE_F32);
    CHECK(tensor_elements(grad) == count && tensor_elements(m) == count && tensor_elements(v) == count);
    struct adamw a = {.param = param.data, .grad = grad.data, .m = m.data, .v = v.data, .count = count,
                      .beta1 = (float)s.beta1, .beta2 = (float)s.beta2, .epsilon = (float)s.epsilon,
                      .grad_scale = (float)s.grad_scale,
                      .step_size = (float)(s.lr / (1 - pow((double)(float)s.beta1, (double)s.step))), /* of the betas above */
                      .keep = (float)(1 - s.lr * s.weight_decay),
                      .root_correction = (float)(1 / sqrt(1 - pow((double)(float)s.beta2, (double)s.step))), .hashes = hashes};
    if (packed.data) {
        a.pack = pack_job_of(param, packed);
        parallel_for(packed.groups * a.pack.row_tasks, rows_task, &a);
    } else {
        parallel_for(divide_up(count, CHUNK), chunk_task, &a);
    }
}

void ISA_NAME(adamw_fill)(struct kernel_ops *ops) {
    ops->adamw = adamw;
}
