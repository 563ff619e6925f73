/* Tensors: a dtype, a shape and memory that belongs to a device. Index arithmetic only; nothing here reads the data.
 *
 * Always row-major and dense, slowest dimension first. Views never own. Outside kernels/ and device/ the data pointer
 * is carried, never followed: on another device it is not an address of this process.
 */
#pragma once

#include "base/status.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum dtype { DTYPE_F32, DTYPE_BF16, DTYPE_F64, DTYPE_I32, DTYPE_COUNT };

size_t dtype_size(enum dtype dtype);      /* bytes of one element */
const char *dtype_name(enum dtype dtype); /* "f32", "bf16", "f64", "i32" */

enum { TENSOR_DIMS_MAX = 4 };

struct tensor {
    enum dtype dtype;
    int dim_count;
    int64_t shape[TENSOR_DIMS_MAX]; /* unused ones are 1 */
    void *data;                     /* device memory; NULL for an absent tensor */
};

/* A tensor over memory that somebody else owns. tensor_make(data, DTYPE_F32, 2, rows, columns). */
struct tensor tensor_make(void *data, enum dtype dtype, int dim_count, int64_t d0, int64_t d1, int64_t d2);
struct tensor tensor_1d(void *data, enum dtype dtype, int64_t d0);
struct tensor tensor_2d(void *data, enum dtype dtype, int64_t d0, int64_t d1);
struct tensor tensor_3d(void *data, enum dtype dtype, int64_t d0, int64_t d1, int64_t d2);
struct tensor tensor_none(void); /* stands for an operand that is not given */

bool tensor_exists(struct tensor t);
int64_t tensor_elements(struct tensor t);
size_t tensor_bytes(struct tensor t);
bool tensor_same_shape(struct tensor a, struct tensor b);

/* Same data seen as [rows, columns]; the number of elements must be equal. */
struct tensor tensor_reshape_2d(struct tensor t, int64_t rows, int64_t columns);

/* Rows first .. first+count-1 of the slowest dimension, same columns. */
struct tensor tensor_rows(struct tensor t, int64_t first, int64_t count);

/* Element [index] of the slowest dimension: an [E,F,D] tensor gives the [F,D] one of expert `index`. */
struct tensor tensor_slice(struct tensor t, int64_t index);

/* bf16 is the upper half of a float, rounded to nearest even; NaN stays NaN. */
static inline float bf16_to_float(uint16_t bits) {
    union {
        uint32_t u;
        float f;
    } v = {(uint32_t)bits << 16};
    return v.f;
}

static inline uint16_t float_to_bf16(float value) {
    union {
        float f;
        uint32_t u;
    } v = {value};
    if ((v.u & 0x7FFFFFFFu) > 0x7F800000u)
        return (uint16_t)(v.u >> 16 | 0x40u);
    return (uint16_t)((v.u + 0x7FFFu + (v.u >> 16 & 1u)) >> 16);
}
