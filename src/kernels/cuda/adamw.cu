/* AdamW in one pass over parameters, gradients and moments: bound by memory. The products' copy of the parameters is in
 * their order, so each is rounded and stored with the new value at hand. */
#include "kernels/cuda/vectors.cuh"

struct adamw {
    float *param, *m, *v;
    const float *grad;
    void *packed;
    int64_t count, fours;
    float beta1, beta2, epsilon, grad_scale, step_size, keep, root_correction;
};

/* p = p (1 - lr wd) - lr * mhat / (sqrt(vhat) + eps), with both corrections folded into factors made once. What is
 * fused is said, so that both loops below give the same bits. */
static __device__ __forceinline__ void update(const struct adamw &a, float grad, float *p, float *m, float *v) {
    float g = grad * a.grad_scale;
    *m = fmaf(a.beta1, *m, (1 - a.beta1) * g);
    *v = fmaf(a.beta2, *v, (1 - a.beta2) * g * g);
    *p = fmaf(a.keep, *p, -(a.step_size * *m / fmaf(sqrtf(*v), a.root_correction, a.epsilon)));
}

static __device__ __forceinline__ void store_four(float *to, float4 x) {
    *(float4 *)to = x;
}

static __device__ __forceinline__ void store_four(bf16 *to, float4 x) {
    uint2 v = {pack_bf16(x.x, x.y), pack_bf16(x.z, x.w)};
    *(uint2 *)to = v;
}

template <typename T> static __global__ void adamw_kernel(struct adamw a) {
    T *packed = (T *)a.packed;
    for (int64_t i = thread_index(); i < a.fours; i += thread_count()) {
        float4 g = ((const float4 *)a.grad)[i], p = ((float4 *)a.param)[i];
        float4 m = ((float4 *)a.m)[i], v = ((float4 *)a.v)[i];
        update(a, g.x, &p.x, &m.x, &v.x);
        update(a, g.y, &p.y, &m.y, &v.y);
        update(a, g.z, &p.z, &m.z, &v.z);
        update(a, g.w, &p.w, &m.w, &v.w);
        ((float4 *)a.param)[i] = p;
        ((float4 *)a.m)[i] = m;
        ((float4 *)a.v)[i] = v;
        if (packed)
            store_four(packed + 4 * i, p);
    }
    for (int64_t i = 4 * a.fours + thread_index(); i < a.count; i += thread_count()) {
        float p = a.param[i], m = a.m[i], v = a.v[i];
        update(a, a.grad[i], &p, &m, &v);
        a.param[i] = p;
        a.m[i] = m;
        a.v[i] = v;
        if (packed)
            put(packed + i, p);
    }
}

static int64_t packed_elements(struct packed p) {
    return p.groups * p.out * p.in;
}

/* Hashes are made where the bytes are read anyway: none here. */
static void adamw(struct tensor param, struct tensor grad, struct tensor m, struct tensor v, struct adamw_settings s,
                  struct packed packed, struct update_hashes hashes) {
    (void)hashes;
    int64_t count = tensor_elements(param);
    CHECK(param.dtype == DTYPE_F32 && grad.dtype == DTYPE_F32 && m.dtype == DTYPE_F32 && v.dtype == DTYPE_F32);
    CHECK(tensor_elements(grad) == count && tensor_elements(m) == count && tensor_elements(v) == count);
    CHECK(!packed.data || packed_elements(packed) == count);
    CHECK_OP(s.step, >=, 1);
    if (count == 0)
        return;
    struct adamw a = {};
    a.param = (float *)param.data, a.m = (float *)m.data, a.v = (float *)v.data, a.grad = (const float *)grad.data;
    a.packed = packed.data;
    a.count = count;
    a.beta1 = (float)s.beta1, a.beta2 = (float)s.beta2, a.epsilon = (float)s.epsilon, a.grad_scale = (float)s.grad_scale;
    a.step_size = (float)(s.lr / (1 - pow((double)a.beta1, (double)s.step))); /* of the betas that the loop has */
    a.keep = (float)(1 - s.lr * s.weight_decay);
    a.root_correction = (float)(1 / sqrt(1 - pow((double)a.beta2, (double)s.step)));
    bool is_wide = is_aligned(a.param, 16) && is_aligned(a.grad, 16) && is_aligned(a.m, 16) && is_aligned(a.v, 16) &&
                   is_aligned(a.packed, 16);
    a.fours = is_wide ? count / 4 : 0;
    WITH_FLOAT(packed.data ? packed.dtype : DTYPE_F32, T,
               CUDA_LAUNCH((adamw_kernel<T>), grid_for(is_wide ? ceil_div(count, 4) : count, THREADS), THREADS, 0, a));
}

/* ---- weights as the products read them: rows of `in`, whatever the direction ---------------------------------------------- */

static size_t packed_bytes(struct packed shape) {
    CHECK(shape.dtype == DTYPE_F32 || shape.dtype == DTYPE_BF16);
    return ((size_t)packed_elements(shape) * dtype_size(shape.dtype) + 255) / 256 * 256;
}

static void pack(struct tensor w, struct packed to) {
    CHECK(tensor_elements(w) == packed_elements(to));
    cast_elements(w.data, w.dtype, to.data, to.dtype, packed_elements(to));
}

void adamw_fill_cuda(struct kernel_ops *ops) {
    ops->adamw = adamw;
    ops->packed_bytes = packed_bytes;
    ops->pack = pack;
}
