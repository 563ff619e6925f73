/* AdamW in one pass over parameters, gradients and moments: bound by memory. */
#include "kernels/cpu/isa/lanes.h"

#include "base/threads.h"
#include "kernels/cpu/fillers.h"

enum { CHUNK = 1 << 13 };

struct adamw {
    struct tensor param, grad, m, v, copy;
    float beta1, beta2, epsilon, grad_scale, step_size, keep, root_correction;
};

/* p = p (1 - lr wd) - lr * mhat / (sqrt(vhat) + eps), with both corrections folded into factors made once. */
static void update_task(void *context, int64_t index) {
    const struct adamw *a = context;
    int64_t first = index * CHUNK, count = smaller(CHUNK, tensor_elements(a->param) - first);
    float *restrict p = (float *)a->param.data + first, *restrict m = (float *)a->m.data + first;
    float *restrict v = (float *)a->v.data + first;
    const float *restrict grad = (const float *)a->grad.data + first;
    for (int64_t i = 0; i < count; i++) {
        float g = grad[i] * a->grad_scale;
        m[i] = a->beta1 * m[i] + (1 - a->beta1) * g;
        v[i] = a->beta2 * v[i] + (1 - a->beta2) * g * g;
        p[i] = a->keep * p[i] - a->step_size * m[i] / (sqrtf(v[i]) * a->root_correction + a->epsilon);
    }
    if (!tensor_exists(a->copy))
        return;
    struct tensor copy = tensor_2d((char *)a->copy.data + (size_t)first * dtype_size(a->copy.dtype), a->copy.dtype, 1,
                                   count);
    store_row(copy, 0, count, p);
}

static void adamw(struct tensor param, struct tensor grad, struct tensor m, struct tensor v, struct adamw_settings s,
                  struct tensor copy) {
    if (is_f64(param) || (tensor_exists(copy) && !is_fast(copy))) {
        kernels_ref()->adamw(param, grad, m, v, s, copy);
        return;
    }
    CHECK(param.dtype == DTYPE_F32 && grad.dtype == DTYPE_F32 && m.dtype == DTYPE_F32 && v.dtype == DTYPE_F32);
    CHECK_OP(tensor_elements(param), ==, tensor_elements(grad));
    struct adamw a = {.param = param, .grad = grad, .m = m, .v = v, .copy = copy,
                      .beta1 = (float)s.beta1, .beta2 = (float)s.beta2, .epsilon = (float)s.epsilon,
                      .grad_scale = (float)s.grad_scale,
                      .step_size = (float)(s.lr / (1 - pow(s.beta1, (double)s.step))),
                      .keep = (float)(1 - s.lr * s.weight_decay),
                      .root_correction = (float)(1 / sqrt(1 - pow(s.beta2, (double)s.step)))};
    parallel_for((tensor_elements(param) + CHUNK - 1) / CHUNK, update_task, &a);
}

void ISA_NAME(adamw_fill)(struct kernel_ops *ops) {
    ops->adamw = adamw;
}
