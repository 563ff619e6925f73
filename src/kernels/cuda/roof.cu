/* What the device can multiply at best: dense products of two matrices of 8192 x 8192 by cuBLASLt, the fastest of the
 * algorithms that it proposes, loaded at run time; without it our own product. */
#include "kernels/cuda/common.cuh"

#ifndef CADRE_CUDA_MODEL
#include <cublasLt.h>
#include <dlfcn.h>

enum { SIDE = 8192, PROPOSALS = 8, TRIES = 3, THREADS = 256 };
static const size_t WORKSPACE_BYTES = (size_t)64 << 20;

static struct {
    void *library;
    cublasStatus_t (*create)(cublasLtHandle_t *);
    cublasStatus_t (*desc_create)(cublasLtMatmulDesc_t *, cublasComputeType_t, cudaDataType_t);
    cublasStatus_t (*desc_set)(cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t, const void *, size_t);
    cublasStatus_t (*layout_create)(cublasLtMatrixLayout_t *, cudaDataType, uint64_t, uint64_t, int64_t);
    cublasStatus_t (*preference_create)(cublasLtMatmulPreference_t *);
    cublasStatus_t (*preference_set)(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, const void *, size_t);
    cublasStatus_t (*heuristic)(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int,
                                cublasLtMatmulHeuristicResult_t *, int *);
    cublasStatus_t (*multiply)(cublasLtHandle_t, cublasLtMatmulDesc_t, const void *, const void *, cublasLtMatrixLayout_t,
                               const void *, cublasLtMatrixLayout_t, const void *, const void *, cublasLtMatrixLayout_t, void *,
                               cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t *, void *, size_t, cudaStream_t);
} blas;

struct dense {
    bool is_ready;
    enum dtype dtype;
    void *a, *b, *c, *workspace;
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t layout;
    cublasLtMatmulAlgo_t algorithm;
};

static __global__ void fill_random(uint16_t *to, int64_t count, uint32_t seed, bool f32) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (int64_t)gridDim.x * blockDim.x) {
        uint32_t x = (uint32_t)i * 2654435761u + seed;
        x = (x ^ x >> 16) * 0x85EBCA6Bu;
        x = (x ^ x >> 13) * 0xC2B2AE35u;
        float value = (float)(x >> 8) / (1 << 23) - 1;
        if (f32)
            ((float *)to)[i] = value;
        else
            ((bf16 *)to)[i] = to_bf16(value);
    }
}

static bool find(void *function, const char *name) {
    *(void **)function = dlsym(blas.library, name);
    return *(void **)function != NULL;
}

static bool load_library(void) {
    static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so",
                                        "/usr/local/cuda/lib64/libcublasLt.so"};
    static bool was_tried, is_there;
    if (was_tried)
        return is_there;
    was_tried = true;
    for (size_t i = 0; i < sizeof names / sizeof *names && !blas.library; i++)
        blas.library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    is_there = blas.library && find(&blas.create, "cublasLtCreate") && find(&blas.desc_create, "cublasLtMatmulDescCreate") &&
               find(&blas.desc_set, "cublasLtMatmulDescSetAttribute") &&
               find(&blas.layout_create, "cublasLtMatrixLayoutCreate") &&
               find(&blas.preference_create, "cublasLtMatmulPreferenceCreate") &&
               find(&blas.preference_set, "cublasLtMatmulPreferenceSetAttribute") &&
               find(&blas.heuristic, "cublasLtMatmulAlgoGetHeuristic") && find(&blas.multiply, "cublasLtMatmul");
    return is_there;
}

static bool multiply_dense(const struct dense *d, const cublasLtMatmulAlgo_t *algorithm) {
    const float one = 1, zero = 0;
    return blas.multiply(d->handle, d->desc, &one, d->a, d->layout, d->b, d->layout, &zero, d->c, d->layout, d->c, d->layout,
                         algorithm, d->workspace, WORKSPACE_BYTES, (cudaStream_t)cuda_stream()) == CUBLAS_STATUS_SUCCESS;
}

/* Milliseconds of the best of a few. */
static float time_of(const struct dense *d, const cublasLtMatmulAlgo_t *algorithm) {
    cudaStream_t stream = (cudaStream_t)cuda_stream();
    cudaEvent_t begin, end;
    float best = INFINITY, ms;
    cuda_check(cudaEventCreate(&begin), "event");
    cuda_check(cudaEventCreate(&end), "event");
    for (int i = 0; i < TRIES; i++) {
        cuda_check(cudaEventRecord(begin, stream), "event");
        if (!multiply_dense(d, algorithm))
            break;
        cuda_check(cudaEventRecord(end, stream), "event");
        cuda_check(cudaEventSynchronize(end), "product");
        cuda_check(cudaEventElapsedTime(&ms, begin, end), "event");
        best = ms < best ? ms : best;
    }
    cuda_check(cudaEventDestroy(begin), "event");
    cuda_check(cudaEventDestroy(end), "event");
    return best;
}

static bool choose_algorithm(struct dense *d) {
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t proposals[PROPOSALS];
    int count = 0;
    float best = INFINITY;
    if (blas.preference_create(&preference) != CUBLAS_STATUS_SUCCESS ||
        blas.preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES, sizeof WORKSPACE_BYTES) !=
            CUBLAS_STATUS_SUCCESS ||
        blas.heuristic(d->handle, d->desc, d->layout, d->layout, d->layout, d->layout, preference, PROPOSALS, proposals, &count) !=
            CUBLAS_STATUS_SUCCESS)
        return false;
    for (int i = 0; i < count; i++) {
        float ms = time_of(d, &proposals[i].algo);
        if (ms < best) {
            best = ms;
            d->algorithm = proposals[i].algo;
        }
    }
    return best < INFINITY;
}

static void take_matrices(struct dense *d) {
    int64_t count = (int64_t)SIDE * SIDE;
    size_t bytes = (size_t)count * dtype_size(d->dtype);
    cuda_check(cudaMalloc(&d->a, bytes), "memory for the roof");
    cuda_check(cudaMalloc(&d->b, bytes), "memory for the roof");
    cuda_check(cudaMalloc(&d->c, bytes), "memory for the roof");
    cuda_check(cudaMalloc(&d->workspace, WORKSPACE_BYTES), "memory for the roof");
    CUDA_LAUNCH(fill_random, grid_for(count, THREADS), THREADS, 0, (uint16_t *)d->a, count, 1u, d->dtype == DTYPE_F32);
    CUDA_LAUNCH(fill_random, grid_for(count, THREADS), THREADS, 0, (uint16_t *)d->b, count, 2u, d->dtype == DTYPE_F32);
}

/* The form of a forward pass, both operands along the inner dimension. */
static bool prepare(struct dense *d, enum dtype dtype) {
    cudaDataType_t type = dtype == DTYPE_BF16 ? CUDA_R_16BF : CUDA_R_32F;
    cublasOperation_t transpose = CUBLAS_OP_T;
    d->dtype = dtype;
    take_matrices(d);
    return load_library() && blas.create(&d->handle) == CUBLAS_STATUS_SUCCESS &&
           blas.desc_create(&d->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS &&
           blas.desc_set(d->desc, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof transpose) == CUBLAS_STATUS_SUCCESS &&
           blas.layout_create(&d->layout, type, SIDE, SIDE, SIDE) == CUBLAS_STATUS_SUCCESS && choose_algorithm(d);
}

static double multiply_registers(enum dtype dtype, int64_t rounds) {
    static struct dense ready[2];
    static bool has_library[2];
    int which = dtype == DTYPE_BF16;
    struct dense *d = &ready[which];
    if (!d->is_ready) {
        has_library[which] = prepare(d, dtype);
        d->is_ready = true;
    }
    struct tensor a = tensor_2d(d->a, dtype, SIDE, SIDE), c = tensor_2d(d->c, dtype, SIDE, SIDE);
    struct packed b = {d->b, dtype, 1, SIDE, SIDE, false};
    for (int64_t i = 0; i < rounds; i++) {
        if (has_library[which])
            CHECK(multiply_dense(d, &d->algorithm));
        else
            kernels_cuda()->product_forward(a, tensor_none(), tensor_none(), b, c, false);
    }
    cuda_check(cudaStreamSynchronize((cudaStream_t)cuda_stream()), "the roof");
    return 2.0 * SIDE * SIDE * SIDE * (double)rounds;
}

static const char *multiply_unit(enum dtype) {
    return load_library() ? "a dense product by cuBLASLt" : "our own dense product";
}

#else

static double multiply_registers(enum dtype dtype, int64_t rounds) {
    return kernels_ref()->multiply_registers(dtype, rounds);
}

static const char *multiply_unit(enum dtype) {
    return "the model";
}

#endif

void roof_fill_cuda(struct kernel_ops *ops) {
    ops->multiply_registers = multiply_registers;
    ops->multiply_unit = multiply_unit;
}
