/* What the device can multiply at best: dense products of two matrices of 8192 x 8192 by cuBLASLt, the fastest of the
 * algorithms that it proposes, loaded at run time; without it our own product. And such products of other shapes, for benchmarks.
 *
 * cuBLASLt's matrices lie by columns: what is [rows,columns] here is [columns,rows] there, and C = A B is C' = B' A'. */
#include "kernels/cuda/common.cuh"

#ifndef CADRE_CUDA_MODEL
#include <cublasLt.h>
#include <dlfcn.h>

enum { SIDE = 8192, SIDE_LEAST = 1024, PROPOSALS = 8, TRIES = 3, THREADS = 256 };
static const size_t WORKSPACE_BYTES = (size_t)64 << 20;

static struct {
    void *library;
    cublasStatus_t (*create)(cublasLtHandle_t *);
    cublasStatus_t (*desc_create)(cublasLtMatmulDesc_t *, cublasComputeType_t, cudaDataType_t);
    cublasStatus_t (*desc_destroy)(cublasLtMatmulDesc_t);
    cublasStatus_t (*desc_set)(cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t, const void *, size_t);
    cublasStatus_t (*layout_create)(cublasLtMatrixLayout_t *, cudaDataType, uint64_t, uint64_t, int64_t);
    cublasStatus_t (*layout_destroy)(cublasLtMatrixLayout_t);
    cublasStatus_t (*preference_create)(cublasLtMatmulPreference_t *);
    cublasStatus_t (*preference_set)(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, const void *, size_t);
    cublasStatus_t (*preference_destroy)(cublasLtMatmulPreference_t);
    cublasStatus_t (*heuristic)(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int,
                                cublasLtMatmulHeuristicResult_t *, int *);
    cublasStatus_t (*multiply)(cublasLtHandle_t, cublasLtMatmulDesc_t, const void *, const void *, cublasLtMatrixLayout_t,
                               const void *, cublasLtMatrixLayout_t, const void *, const void *, cublasLtMatrixLayout_t, void *,
                               cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t *, void *, size_t, cudaStream_t);
} blas;

struct dense {
    bool is_ready; /* the algorithm is chosen */
    enum dtype dtype;
    enum dense_form form;
    int64_t rows, out, in;
    void *a, *b, *c, *workspace; /* as cuBLASLt names them */
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t layout_a, layout_b, layout_c;
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
               find(&blas.desc_destroy, "cublasLtMatmulDescDestroy") &&
               find(&blas.desc_set, "cublasLtMatmulDescSetAttribute") &&
               find(&blas.layout_create, "cublasLtMatrixLayoutCreate") &&
               find(&blas.layout_destroy, "cublasLtMatrixLayoutDestroy") &&
               find(&blas.preference_create, "cublasLtMatmulPreferenceCreate") &&
               find(&blas.preference_destroy, "cublasLtMatmulPreferenceDestroy") &&
               find(&blas.preference_set, "cublasLtMatmulPreferenceSetAttribute") &&
               find(&blas.heuristic, "cublasLtMatmulAlgoGetHeuristic") && find(&blas.multiply, "cublasLtMatmul");
    return is_there;
}

static bool good(cublasStatus_t status) {
    return status == CUBLAS_STATUS_SUCCESS;
}

static bool multiply(const struct dense *d, const cublasLtMatmulAlgo_t *algorithm) {
    const float one = 1, zero = 0;
    return good(blas.multiply(d->handle, d->desc, &one, d->a, d->layout_a, d->b, d->layout_b, &zero, d->c, d->layout_c, d->c,
                              d->layout_c, algorithm, d->workspace, WORKSPACE_BYTES, (cudaStream_t)cuda_stream()));
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
        if (!multiply(d, algorithm))
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
    if (!good(blas.preference_create(&preference)))
        return false;
    if (!good(blas.preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES,
                                  sizeof WORKSPACE_BYTES)) ||
        !good(blas.heuristic(d->handle, d->desc, d->layout_a, d->layout_b, d->layout_c, d->layout_c, preference, PROPOSALS,
                             proposals, &count)))
        count = 0;
    blas.preference_destroy(preference);
    for (int i = 0; i < count; i++) {
        float ms = time_of(d, &proposals[i].algo);
        if (ms < best) {
            best = ms;
            d->algorithm = proposals[i].algo;
        }
    }
    return best < INFINITY;
}

/* NULL: the device has not that much. */
static void *take(size_t bytes) {
    void *data = NULL;
    cuda_stream(); /* this thread's device */
    cudaError_t error = cudaMalloc(&data, bytes);
    if (error == cudaErrorMemoryAllocation)
        cudaGetLastError(); /* what is said here is not for the next call */
    else
        cuda_check(error, "memory for the roof");
    return data;
}

static enum dtype result_dtype(const struct dense *d) {
    return d->form == DENSE_WEIGHT ? DTYPE_F32 : d->dtype;
}

static bool take_operands(struct dense *d, int64_t a_count, int64_t b_count, int64_t c_count) {
    bool f32 = d->dtype == DTYPE_F32;
    size_t size = dtype_size(d->dtype);
    d->a = take((size_t)a_count * size), d->b = take((size_t)b_count * size);
    d->c = take((size_t)c_count * dtype_size(result_dtype(d)));
    d->workspace = take(WORKSPACE_BYTES);
    if (!d->a || !d->b || !d->c || !d->workspace)
        return false;
    CUDA_LAUNCH(fill_random, grid_for(a_count, THREADS), THREADS, 0, (uint16_t *)d->a, a_count, 1u, f32);
    CUDA_LAUNCH(fill_random, grid_for(b_count, THREADS), THREADS, 0, (uint16_t *)d->b, b_count, 2u, f32);
    return true;
}

/* A matrix [rows,columns], which is not transposed here. */
static bool lay_out(cublasLtMatrixLayout_t *layout, enum dtype dtype, int64_t rows, int64_t columns) {
    cudaDataType_t type = dtype == DTYPE_BF16 ? CUDA_R_16BF : CUDA_R_32F;
    return good(blas.layout_create(layout, type, (uint64_t)columns, (uint64_t)rows, columns));
}

static bool describe(struct dense *d) {
    cublasOperation_t transpose_a = d->form == DENSE_FORWARD ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasOperation_t transpose_b = d->form == DENSE_WEIGHT ? CUBLAS_OP_T : CUBLAS_OP_N;
    return load_library() && (d->handle || good(blas.create(&d->handle))) &&
           good(blas.desc_create(&d->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F)) &&
           good(blas.desc_set(d->desc, CUBLASLT_MATMUL_DESC_TRANSA, &transpose_a, sizeof transpose_a)) &&
           good(blas.desc_set(d->desc, CUBLASLT_MATMUL_DESC_TRANSB, &transpose_b, sizeof transpose_b));
}

/* FORWARD y' = (w')^T x', INPUT dx' = w' dy', WEIGHT dw' = x' (dy')^T: what stands first is cuBLASLt's A. False: no memory. */
static bool prepare(struct dense *d, enum dtype dtype, enum dense_form form, int64_t rows, int64_t out, int64_t in) {
    int64_t w = out * in, x = rows * in, y = rows * out;
    d->dtype = dtype, d->form = form, d->rows = rows, d->out = out, d->in = in;
    if (!take_operands(d, form == DENSE_WEIGHT ? x : w, form == DENSE_FORWARD ? x : y,
                       form == DENSE_FORWARD ? y : form == DENSE_INPUT ? x : w))
        return false;
    d->is_ready = describe(d) &&
                  lay_out(&d->layout_a, dtype, form == DENSE_WEIGHT ? rows : out, in) &&
                  lay_out(&d->layout_b, dtype, rows, form == DENSE_FORWARD ? in : out) &&
                  lay_out(&d->layout_c, result_dtype(d), form == DENSE_WEIGHT ? out : rows, form == DENSE_FORWARD ? out : in) &&
                  choose_algorithm(d);
    return true;
}

/* All but the handle. */
static void release(struct dense *d) {
    void *const data[] = {d->a, d->b, d->c, d->workspace};
    cublasLtMatrixLayout_t layouts[] = {d->layout_a, d->layout_b, d->layout_c};
    for (void *each : data)
        cuda_check(cudaFree(each), "memory for the roof");
    for (cublasLtMatrixLayout_t each : layouts)
        if (each)
            blas.layout_destroy(each);
    if (d->desc)
        blas.desc_destroy(d->desc);
    *d = {.handle = d->handle};
}

/* Memory is taken for one shape at a time. */
static bool multiply_dense(enum dtype dtype, enum dense_form form, int64_t rows, int64_t out, int64_t in) {
    static struct dense last;
    bool is_last = last.a && last.dtype == dtype && last.form == form && last.rows == rows && last.out == out && last.in == in;
    if (!is_last) {
        release(&last);
        if (!prepare(&last, dtype, form, rows, out, in))
            release(&last);
    }
    return last.is_ready && multiply(&last, &last.algorithm);
}

/* Smaller matrices where others leave no room for those of SIDE: less than the best, but a measure. */
static double multiply_registers(enum dtype dtype, int64_t rounds) {
    static struct dense ready[2];
    struct dense *d = &ready[dtype == DTYPE_BF16];
    if (rounds == 0) {
        release(d);
        return 0;
    }
    for (int64_t side = SIDE; !d->a; side /= 2)
        if (!prepare(d, dtype, DENSE_FORWARD, side, side, side)) {
            release(d);
            if (side == SIDE_LEAST)
                cuda_fail((int)cudaErrorMemoryAllocation, "memory for the roof");
        }
    int64_t side = d->rows;
    struct tensor x = tensor_2d(d->b, dtype, side, side), y = tensor_2d(d->c, dtype, side, side);
    struct packed w = {d->a, dtype, 1, side, side, false};
    for (int64_t i = 0; i < rounds; i++) {
        if (d->is_ready)
            CHECK(multiply(d, &d->algorithm));
        else
            kernels_cuda()->product_forward(x, tensor_none(), tensor_none(), w, y, false);
    }
    cuda_check(cudaStreamSynchronize((cudaStream_t)cuda_stream()), "the roof");
    return 2 * (double)side * (double)side * (double)side * (double)rounds;
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

static bool multiply_dense(enum dtype, enum dense_form, int64_t, int64_t, int64_t) {
    return false;
}

#endif

void roof_fill_cuda(struct kernel_ops *ops) {
    ops->multiply_registers = multiply_registers;
    ops->multiply_unit = multiply_unit;
    ops->multiply_dense = multiply_dense;
}
