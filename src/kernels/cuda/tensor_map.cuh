/* How the copy engine of a Hopper device is told of a tensor: the driver's function that describes one, found at run time, so
 * that the program needs no library of CUDA to start. */
#pragma once

#include "kernels/cuda/common.cuh"

#include <cuda.h>
#include <cuda_runtime.h>

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
