/* Softmax cross entropy: a block for each row, which it reads twice, the second time mostly from the second cache. Losses of
 * the rows are kept in scratch and added in f64 by one block, in an order that the number of rows gives. */
#include "kernels/cuda/eights.cuh"

enum { LOSS_THREADS = 1024 };

/* The sum of e^(x - most) over what was seen. */
struct softmax_sum {
    float most, sum;
};

static __device__ __forceinline__ void softmax_add(struct softmax_sum *s, const float *x, int count) {
    float most = s->most;
    for (int e = 0; e < count; e++)
        most = fmaxf(most, x[e]);
    float base = most == -INFINITY ? 0 : most; /* of nothing but -INFINITY and NaN, which comes out of the sum */
    float sum = s->sum * expf(s->most - base);
    for (int e = 0; e < count; e++)
        sum += expf(x[e] - base);
    s->most = most;
    s->sum = sum;
}

template <typename D, bool eights, bool aligned>
static __global__ void loss_rows(const float *logits, const int32_t *target, int width, float scale, double *losses,
                                 float *row_loss, D *dlogits) {
    enum { STEP = eights ? 8 : 1 };
    int64_t row = blockIdx.x;
    const float *x = logits + row * width;
    D *to = dlogits ? dlogits + row * width : dlogits;
    int wanted = target[row], first = (int)threadIdx.x * STEP, stride = (int)blockDim.x * STEP;
    float v[STEP];
    if (wanted < 0) { /* the same for the whole block */
        for (int i = first; to && i < width; i += stride)
            for (int e = 0; e < STEP; e++)
                store(to + i + e, 0);
        if (threadIdx.x == 0) {
            losses[row] = 0;
            if (row_loss)
                row_loss[row] = 0;
        }
        return;
    }
    struct softmax_sum s = {-INFINITY, 0};
    for (int i = first; i < width; i += stride) {
        if constexpr (eights)
            get_eight<aligned>(x + i, v);
        else
            v[0] = x[i];
        softmax_add(&s, v, STEP);
    }
    float x_wanted = wanted < width ? x[wanted] : NAN; /* before a gradient may lie over it */
    float most = block_max(s.most);
    float sum = block_sum(s.sum == 0 ? 0 : s.sum * expf(s.most - most));
    if (threadIdx.x == 0) {
        double loss = (double)(most - x_wanted) + log((double)sum);
        losses[row] = loss;
        if (row_loss)
            row_loss[row] = (float)loss;
    }
    if (!to)
        return;
    float factor = scale / sum;
    for (int i = first; i < width; i += stride) {
        if constexpr (eights)
            get_eight<aligned>(x + i, v);
        else
            v[0] = x[i];
        for (int e = 0; e < STEP; e++)
            v[e] = factor * expf(v[e] - most) - (i + e == wanted ? scale : 0);
        if constexpr (eights)
            put_eight<aligned>(to + i, v);
        else
            store(to + i, v[0]);
    }
}

static __global__ void add_losses(const double *losses, int64_t rows, double *loss_sum) {
    double sum = 0;
    for (int64_t row = threadIdx.x; row < rows; row += blockDim.x)
        sum += losses[row];
    sum = block_sum(sum);
    if (threadIdx.x == 0)
        *loss_sum += sum;
}

/* Threads that a row of the width gives work to. */
static unsigned loss_threads(int64_t steps) {
    int64_t warps = ceil_div(steps, WARP);
    return (unsigned)((warps < 1 ? 1 : warps > LOSS_THREADS / WARP ? LOSS_THREADS / WARP : warps) * WARP);
}

static void cross_entropy(struct tensor logits, struct tensor target, double scale, struct tensor loss_sum,
                          struct tensor row_loss, struct tensor dlogits) {
    int64_t rows = logits.shape[0], width = logits.shape[1];
    CHECK(logits.dtype == DTYPE_F32 && logits.dim_count == 2 && width <= INT32_MAX / 2);
    CHECK(target.dtype == DTYPE_I32 && tensor_elements(target) == rows);
    CHECK(loss_sum.dtype == DTYPE_F64 && tensor_elements(loss_sum) == 1);
    if (tensor_exists(row_loss))
        CHECK(row_loss.dtype == DTYPE_F32 && tensor_elements(row_loss) == rows);
    bool has_gradient = tensor_exists(dlogits);
    if (has_gradient)
        CHECK(tensor_same_shape(dlogits, logits));
    CHECK(dlogits.data != logits.data || rows == 0 || dlogits.dtype == logits.dtype);
    if (rows == 0)
        return;
    double *losses = (double *)cuda_scratch((size_t)rows * sizeof *losses);
    const float *x = (const float *)logits.data;
    const int32_t *wanted = (const int32_t *)target.data;
    float *each = tensor_exists(row_loss) ? (float *)row_loss.data : NULL;
    bool are_aligned = is_aligned(x, 16) && (!has_gradient || is_aligned(dlogits.data, 16));
    WITH_FLOAT(has_gradient ? dlogits.dtype : DTYPE_F32, D, {
        D *to = has_gradient ? (D *)dlogits.data : NULL;
        unsigned blocks = (unsigned)rows, threads = loss_threads(width % 8 == 0 ? width / 8 : width);
        if (width % 8 != 0)
            CUDA_LAUNCH((loss_rows<D, false, false>), blocks, threads, 0, x, wanted, (int)width, (float)scale, losses, each, to);
        else if (are_aligned)
            CUDA_LAUNCH((loss_rows<D, true, true>), blocks, threads, 0, x, wanted, (int)width, (float)scale, losses, each, to);
        else
            CUDA_LAUNCH((loss_rows<D, true, false>), blocks, threads, 0, x, wanted, (int)width, (float)scale, losses, each, to);
    });
    CUDA_LAUNCH(add_losses, 1, LOSS_THREADS, 0, losses, rows, (double *)loss_sum.data);
}

void loss_fill_cuda(struct kernel_ops *ops) {
    ops->cross_entropy = cross_entropy;
}
