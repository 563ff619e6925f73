/* How the copy engine of a Hopper device is told of a tensor: the driver's function that describes one, found at run time, so
 * that the program needs no library of CUDA to start. */
#pragma once

#include "kernels/cuda/common.cuh"

#ifdef CADRE_CUDA_MODEL

#include "device/cuda/model_sm90.cuh"

static bool tensor_maps_exist(void) {
    return !cuda_is_general();
}

#else

#include <cuda.h>
#include <cuda_runtime.h>

typedef CUtensorMap tensor_map;
typedef CUresult (*encode_function)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                    const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                                    CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* NULL where this device has no such engine, or it is not to be used. */
static encode_function find_encode(void) {
    int device, major = 0;
    void *function = NULL;
    cudaDriverEntryPointQueryResult found;
    if (cuda_is_general() || cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess || major != 9)
        return NULL;
#if CUDART_VERSION >= 12050
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found) != cudaSuccess)
        return NULL;
#else
    if (cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found) != cudaSuccess)
        return NULL;
#endif
    return (encode_function)function;
}

static encode_function encode(void) {
    static encode_function function = find_encode();
    return function;
}

static bool tensor_maps_exist(void) {
    return encode() != NULL;
}

/* Of bf16, the fastest dimension first: `size` of each, `stride` bytes of each but the first, and the box that is brought at a
 * time, whose rows of 128 bytes come with their 16-byte chunks swapped by bits 7 to 9 of the address. Beyond the tensor are
 * zeros. */
static void tensor_map_make(tensor_map *map, const void *data, int dims, const uint64_t *size, const uint64_t *stride,
                            const uint32_t *box) {
    const cuuint32_t step[4] = {1, 1, 1, 1};
    CUresult result = encode()(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, (cuuint32_t)dims, (void *)data, size, stride, box, step,
                               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    CHECK_OP(result, ==, CUDA_SUCCESS);
}

#endif
