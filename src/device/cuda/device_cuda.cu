/* The CUDA device of this process: its memory and the one stream on which all that is asked of it happens in order. On the
 * model of a device that is memory of the processor, and all is done when it returns. */
#include "device/cuda/language.cuh"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#define _Noreturn [[noreturn]] /* of C, in the headers */
extern "C" {
#include "base/log.h"
#include "device/cuda/device_cuda.h"
}

#ifdef CADRE_CUDA_MODEL

void cuda_fail(int error, const char *what) {
    log_progress_end();
    fprintf(stderr, "device model: %s: error %d\n", what, error);
    abort();
}

void *cuda_stream(void) {
    return NULL;
}

enum status device_cuda(const struct device **out) {
    static struct device model;
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, [] {
        model = *device_cpu();
        model.name = "cuda";
    });
    *out = &model;
    return STATUS_OK;
}

const char *device_cuda_describe(void) {
    return "a model of a CUDA device";
}

void *device_cuda_host_memory(size_t bytes) {
    return aligned_alloc(ARENA_BLOCK_BYTES, (bytes + ARENA_BLOCK_BYTES - 1) / ARENA_BLOCK_BYTES * ARENA_BLOCK_BYTES);
}

#else

enum { DEVICE = 0, SMALLEST_BYTES = 2 << 20 }; /* less than that the runtime puts together, at any address */

static pthread_once_t begun = PTHREAD_ONCE_INIT;
static cudaStream_t the_stream;
static struct cudaDeviceProp properties;
static cudaError_t begin_error;
static const char *begin_failed_at;

/* The runtime's current device is one of each thread. */
static void enter(void) {
    static thread_local bool entered;
    if (!entered)
        cuda_check(cudaSetDevice(DEVICE), "cudaSetDevice");
    entered = true;
}

static bool begins(cudaError_t error, const char *what) {
    begin_error = error;
    begin_failed_at = what;
    return error == cudaSuccess;
}

static void begin(void) {
    int count = 0;
    if (begins(cudaGetDeviceCount(&count), "cudaGetDeviceCount") &&
        begins(cudaGetDeviceProperties(&properties, DEVICE), "cudaGetDeviceProperties") &&
        begins(cudaSetDevice(DEVICE), "cudaSetDevice"))
        begins(cudaStreamCreateWithFlags(&the_stream, cudaStreamNonBlocking), "cudaStreamCreate");
    cudaGetLastError(); /* what is said here is not for the next call */
}

void cuda_fail(int error, const char *what) {
    log_progress_end();
    fprintf(stderr, "cadre: CUDA device: %s: %s (%s)\n", what, cudaGetErrorString((cudaError_t)error),
            cudaGetErrorName((cudaError_t)error));
    abort();
}

void *cuda_stream(void) {
    pthread_once(&begun, begin);
    if (begin_error != cudaSuccess)
        cuda_fail((int)begin_error, begin_failed_at);
    enter();
    return the_stream;
}

static void cuda_finish(void) {
    cuda_check(cudaStreamSynchronize((cudaStream_t)cuda_stream()), "waiting for the device");
}

static enum status cuda_alloc(void **out, size_t bytes) {
    cudaStream_t stream = (cudaStream_t)cuda_stream();
    void *data = NULL;
    cudaError_t error = cudaMalloc(&data, bytes < SMALLEST_BYTES ? SMALLEST_BYTES : bytes);
    if (error == cudaErrorMemoryAllocation) {
        size_t free_bytes = 0, all_bytes = 0;
        cudaGetLastError();
        cuda_check(cudaMemGetInfo(&free_bytes, &all_bytes), "cudaMemGetInfo");
        return status_fail(STATUS_MEMORY, "no memory for %.2f GiB of tensors on the CUDA device: %.2f of its %.2f GiB are free",
                           (double)bytes / (1 << 30), (double)free_bytes / (1 << 30), (double)all_bytes / (1 << 30));
    }
    cuda_check(error, "cudaMalloc");
    CHECK((uintptr_t)data % ARENA_BLOCK_BYTES == 0);
    cuda_check(cudaMemsetAsync(data, 0, bytes, stream), "cudaMemset");
    cuda_finish();
    *out = data;
    return STATUS_OK;
}

static void cuda_release(void *data, size_t bytes) {
    (void)bytes;
    if (!data)
        return;
    cuda_finish();
    cuda_check(cudaFree(data), "cudaFree");
}

static void copy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    if (bytes == 0)
        return;
    cuda_check(cudaMemcpyAsync(to, from, bytes, kind, (cudaStream_t)cuda_stream()), "cudaMemcpy");
    cuda_finish();
}

static void cuda_copy_to_host(void *host, const void *data, size_t bytes) {
    copy(host, data, bytes, cudaMemcpyDeviceToHost);
}

static void cuda_copy_from_host(void *data, const void *host, size_t bytes) {
    copy(data, host, bytes, cudaMemcpyHostToDevice);
}

/* The kernels are there in the instructions of 9.0 and of all of 8. */
static bool has_kernels(void) {
    return properties.major == 8 || (properties.major == 9 && properties.minor == 0);
}

enum status device_cuda(const struct device **out) {
    static const struct device cuda = {"cuda", cuda_alloc, cuda_release, cuda_copy_to_host, cuda_copy_from_host, cuda_finish};
    int driver = 0;
    pthread_once(&begun, begin);
    if (begin_error == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0)
        return status_fail(STATUS_USAGE, "no CUDA device on this machine: it has no driver for one");
    if (begin_error != cudaSuccess)
        return status_fail(STATUS_USAGE, "no CUDA device on this machine: %s (%s)", cudaGetErrorString(begin_error),
                           begin_failed_at);
    if (!has_kernels())
        return status_fail(STATUS_USAGE, "%s has compute capability %d.%d; this program has kernels for 8.0 to 9.0 only",
                           properties.name, properties.major, properties.minor);
    *out = &cuda;
    return STATUS_OK;
}

const char *device_cuda_describe(void) {
    return properties.name;
}

void *device_cuda_host_memory(size_t bytes) {
    void *data = NULL;
    cuda_stream();
    return cudaHostAlloc(&data, bytes, cudaHostAllocMapped | cudaHostAllocPortable) == cudaSuccess ? data : NULL;
}

#endif
