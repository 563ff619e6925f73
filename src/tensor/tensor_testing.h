/* What tests share that look into tensors of the processor. */
#pragma once

#include "tensor/tensor.h"

/* Elements by flat index, of any dtype. */
static inline double test_get(struct tensor t, int64_t i) {
    switch (t.dtype) {
    case DTYPE_F32:
        return ((const float *)t.data)[i];
    case DTYPE_BF16:
        return bf16_to_float(((const uint16_t *)t.data)[i]);
    case DTYPE_F64:
        return ((const double *)t.data)[i];
    default:
        return ((const int32_t *)t.data)[i];
    }
}

static inline void test_set(struct tensor t, int64_t i, double value) {
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
        ((int32_t *)t.data)[i] = (int32_t)value;
    }
}
