/* Eight neighbouring elements of a row, by 16 bytes where the row is aligned to them. Who works on eights does so at every
 * address alike: where operands lie must not change the order of sums. */
#pragma once

#include "kernels/cuda/vectors.cuh"

template <bool aligned, typename T> static __device__ __forceinline__ void get_eight(const T *from, float to[8]) {
    if constexpr (aligned) {
        load_eight(from, to);
    } else {
        for (int e = 0; e < 8; e++)
            to[e] = to_float(from[e]);
    }
}

template <bool aligned, typename T> static __device__ __forceinline__ void put_eight(T *to, const float from[8]) {
    if constexpr (aligned) {
        store_eight(to, from);
    } else {
        for (int e = 0; e < 8; e++)
            store(to + e, from[e]);
    }
}

/* Eights in shared memory lie in two halves, so that lanes next to each other read 16 bytes next to each other. */
static __device__ __forceinline__ void put_halves(float *low, float *high, const float x[EIGHT]) {
    float4 a = {x[0], x[1], x[2], x[3]}, b = {x[4], x[5], x[6], x[7]};
    *(float4 *)low = a;
    *(float4 *)high = b;
}

static __device__ __forceinline__ void get_halves(const float *low, const float *high, float x[EIGHT]) {
    float4 a = *(const float4 *)low, b = *(const float4 *)high;
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

/* Elements of either dtype at an address that may be aligned to them only, both told at run time, by a branch that all threads
 * take alike: stands for the pointer where a mix of dtypes or an address is too rare to have code of its own. */
struct anywhere {
    char *data;
    bool is_bf16;

    __device__ struct anywhere operator+(int64_t elements) const {
        struct anywhere moved = {data + elements * (is_bf16 ? 2 : 4), is_bf16};
        return moved;
    }

    __device__ float operator[](int64_t i) const {
        return is_bf16 ? to_float(((const bf16 *)data)[i]) : ((const float *)data)[i];
    }
};

static inline struct anywhere anywhere_of(const void *data, enum dtype dtype) {
    CHECK(dtype == DTYPE_F32 || dtype == DTYPE_BF16);
    struct anywhere a = {(char *)data, dtype == DTYPE_BF16};
    return a;
}

static __device__ __forceinline__ void store(struct anywhere to, float x) {
    if (to.is_bf16)
        store((bf16 *)to.data, x);
    else
        store((float *)to.data, x);
}

static __device__ __forceinline__ void load_eight(struct anywhere from, float *x) {
    if (from.is_bf16)
        get_eight<false>((const bf16 *)from.data, x);
    else
        get_eight<false>((const float *)from.data, x);
}

static __device__ __forceinline__ void store_eight(struct anywhere to, const float *x) {
    if (to.is_bf16)
        put_eight<false>((bf16 *)to.data, x);
    else
        put_eight<false>((float *)to.data, x);
}
