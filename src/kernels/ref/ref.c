#include "kernels/ref/ref.h"

bool ref_is_float(struct tensor t) {
    return t.dtype == DTYPE_F32 || t.dtype == DTYPE_BF16 || t.dtype == DTYPE_F64;
}

bool ref_is_real(struct tensor t, enum dtype beside) {
    return t.dtype == (beside == DTYPE_F64 ? DTYPE_F64 : DTYPE_F32);
}

bool ref_is_float_or_real(struct tensor t, enum dtype beside) {
    return ref_is_float(t) && (t.dtype == beside || ref_is_real(t, beside));
}

bool ref_is_1d(struct tensor t, int64_t d0) {
    return tensor_elements(t) == d0;
}

bool ref_is_2d(struct tensor t, int64_t d0, int64_t d1) {
    return ref_is_3d(t, d0, d1, 1);
}

bool ref_is_3d(struct tensor t, int64_t d0, int64_t d1, int64_t d2) {
    return t.shape[0] == d0 && t.shape[1] == d1 && t.shape[2] == d2 && t.shape[3] == 1;
}

double ref_load(struct tensor t, int64_t i) {
    switch (t.dtype) {
    case DTYPE_F32:
        return ((const float *)t.data)[i];
    case DTYPE_BF16:
        return bf16_to_float(((const uint16_t *)t.data)[i]);
    case DTYPE_F64:
        return ((const double *)t.data)[i];
    default:
        CHECK(!"a float");
        return 0;
    }
}

void ref_store(struct tensor t, int64_t i, double value) {
    switch (t.dtype) {
    case DTYPE_F32:
        ((float *)t.data)[i] = (float)value;
        break;
    case DTYPE_BF16:
        ((uint16_t *)t.data)[i] = float_to_bf16((float)value);
        break;
    case DTYPE_F64:
        ((double *)t.data)[i] = value;
        break;
    default:
        CHECK(!"a float");
    }
}

void ref_add(struct tensor t, int64_t i, double value) {
    ref_store(t, i, ref_load(t, i) + value);
}

int64_t ref_index(struct tensor t, int64_t i) {
    return ((const int32_t *)t.data)[i];
}

double *ref_read(struct tensor t) {
    int64_t count = tensor_elements(t);
    double *values = ref_zeros(count);
    for (int64_t i = 0; i < count; i++)
        values[i] = ref_load(t, i);
    return values;
}

double *ref_zeros(int64_t count) {
    return memory_must((size_t)count, sizeof(double));
}

void ref_write(struct tensor t, int64_t first, int64_t count, const double *values, bool accumulate) {
    for (int64_t i = 0; i < count; i++) {
        if (accumulate)
            ref_add(t, first + i, values[i]);
        else
            ref_store(t, first + i, values[i]);
    }
}

void ref_add_scaled(double *acc, double factor, const double *row, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        acc[i] += factor * row[i];
}

double ref_logsumexp(const double *x, int64_t count) {
    double largest = x[0];
    for (int64_t i = 1; i < count; i++)
        if (x[i] > largest)
            largest = x[i];
    double sum = 0;
    for (int64_t i = 0; i < count; i++)
        sum += exp(x[i] - largest);
    return largest + log(sum);
}

const struct kernel_ops *kernels_ref(void) {
    static const struct kernel_ops ref = {
        .name = "ref",
        .gemm = ref_gemm,
        .packed_bytes = ref_packed_bytes,
        .pack = ref_pack,
        .product_forward = ref_product_forward,
        .product_backward_input = ref_product_backward_input,
        .product_backward_weight = ref_product_backward_weight,
        .fill = ref_fill,
        .cast = ref_cast,
        .add = ref_add_tensor,
        .sum_squares = ref_sum_squares,
        .gather_scalars = ref_gather_scalars,
        .gather_rows = ref_gather_rows,
        .sum_boxes = ref_sum_boxes,
        .rmsnorm_forward = ref_rmsnorm_forward,
        .rmsnorm_backward = ref_rmsnorm_backward,
        .qknorm_rope_forward = ref_qknorm_rope_forward,
        .qknorm_rope_backward = ref_qknorm_rope_backward,
        .attention_forward = ref_attention_forward,
        .attention_kept = ref_attention_kept,
        .attention_keep = ref_attention_keep,
        .attention_backward = ref_attention_backward,
        .router_topk_forward = ref_router_topk_forward,
        .router_topk_backward = ref_router_topk_backward,
        .router_stats = ref_router_stats,
        .route_sort = ref_route_sort,
        .combine_rows = ref_combine_rows,
        .route_pairs = ref_route_pairs,
        .sort_arrivals = ref_sort_arrivals,
        .swiglu_forward = ref_swiglu_forward,
        .swiglu_backward = ref_swiglu_backward,
        .embedding_forward = ref_embedding_forward,
        .embedding_backward = ref_embedding_backward,
        .cross_entropy = ref_cross_entropy,
        .adamw = ref_adamw,
        .outer_encode = ref_outer_encode,
        .outer_decode_add = ref_outer_decode_add,
        .outer_update = ref_outer_update,
        .outer_mix = ref_outer_mix,
        .outer_dot = ref_outer_dot,
        .multiply_registers = ref_multiply_registers,
        .multiply_unit = ref_multiply_unit,
    };
    return &ref;
}
