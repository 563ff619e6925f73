/* The CUDA device of this process: its memory and the one stream on which all that is asked of it happens in order. On the
 * model of a device that is memory of the processor, and all is done when it returns. */
#include "device/cuda/recording.cuh"

#include <map>
#include <mutex>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

extern "C" {
#include "base/log.h"
}

const struct device *device_cuda_absent(void) {
    static const struct device absent = {"cuda", NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL};
    return &absent;
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

/* What it was asked for, so that copies between other places than it and the processor are found here as they are on a device. */
enum { PIECES_MAX = 4096 };
static pthread_mutex_t pieces_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct {
    const char *begin;
    size_t bytes;
} pieces[PIECES_MAX];
static int piece_count;

static bool is_of_device(const void *data, size_t bytes) {
    bool found = false;
    pthread_mutex_lock(&pieces_mutex);
    for (int i = 0; i < piece_count && !found; i++)
        found = (const char *)data >= pieces[i].begin && (const char *)data + bytes <= pieces[i].begin + pieces[i].bytes;
    pthread_mutex_unlock(&pieces_mutex);
    return found;
}

static enum status model_alloc(void **out, size_t bytes) {
    CHECK(!recording_is_on());
    TRY(device_cpu()->alloc(out, bytes));
    pthread_mutex_lock(&pieces_mutex);
    CHECK(piece_count < PIECES_MAX);
    pieces[piece_count].begin = (const char *)*out;
    pieces[piece_count++].bytes = bytes;
    pthread_mutex_unlock(&pieces_mutex);
    return STATUS_OK;
}

static void model_release(void *data, size_t bytes) {
    CHECK(!recording_is_on());
    pthread_mutex_lock(&pieces_mutex);
    int at = 0;
    while (at < piece_count && pieces[at].begin != data)
        at++;
    CHECK(at < piece_count);
    pieces[at] = pieces[--piece_count];
    pthread_mutex_unlock(&pieces_mutex);
    device_cpu()->release(data, bytes);
}

/* Copies that nobody waited for: they are done as late as they may be. */
struct late_copy {
    void *to;
    const void *from;
    size_t bytes;
};
static thread_local std::vector<struct late_copy> late_copies;

void cuda_model_arrive(void) {
    for (const struct late_copy &copy : late_copies)
        memcpy(copy.to, copy.from, copy.bytes);
    late_copies.clear();
}

static void model_copy_to_host(void *host, const void *data, size_t bytes) {
    CHECK(!recording_is_on());
    cuda_model_arrive();
    CHECK(bytes == 0 || (is_of_device(data, bytes) && !is_of_device(host, 1)));
    memcpy(host, data, bytes);
}

static void model_copy_from_host(void *data, const void *host, size_t bytes) {
    CHECK(!recording_is_on());
    CHECK(bytes == 0 || (is_of_device(data, bytes) && !is_of_device(host, 1)));
    cuda_model_arrive();
    memcpy(data, host, bytes);
}

static void model_copy_from_host_later(void *data, const void *host, size_t bytes) {
    CHECK(!recording_is_on());
    CHECK(bytes == 0 || (is_of_device(data, bytes) && !is_of_device(host, 1)));
    memset(data, 0xFF, bytes);
    late_copies.push_back({data, host, bytes});
}

static void copy_now(void *to, const void *from, size_t bytes) {
    cuda_model_arrive();
    memcpy(to, from, bytes);
}

static void model_copy_within(void *to, const void *from, size_t bytes) {
    CHECK(bytes == 0 || (is_of_device(to, bytes) && is_of_device(from, bytes)));
    if (recording_is_on())
        cuda_model_note([=] { copy_now(to, from, bytes); });
    else
        copy_now(to, from, bytes);
}

static void model_finish(void) {
    CHECK(!recording_is_on());
    cuda_model_arrive();
}

enum status device_cuda(const struct device **out) {
    static struct device model;
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, [] {
        model = *device_cpu();
        model.name = "cuda";
        model.alloc = model_alloc;
        model.release = model_release;
        model.copy_to_host = model_copy_to_host;
        model.copy_from_host = model_copy_from_host;
        model.copy_from_host_later = model_copy_from_host_later;
        model.copy_within = model_copy_within;
        model.finish = model_finish;
        model.recorder = &cuda_recorder;
    });
    *out = &model;
    return STATUS_OK;
}

void device_cuda_prefer(int number) {
    (void)number;
}

const char *device_cuda_describe(void) {
    return "a model of a CUDA device";
}

/* Each process has one of its own. */
void device_cuda_identify(unsigned char id[DEVICE_ID_BYTES]) {
    pid_t process = getpid();
    memset(id, 0, DEVICE_ID_BYTES);
    memcpy(id, &process, sizeof process);
}

int64_t device_cuda_memory_bytes(int local_size) {
    (void)local_size;
    return 0;
}

void *device_cuda_queue_open(void) {
    return NULL;
}

void device_cuda_queue_finish(void *queue) {
    (void)queue;
}

void device_cuda_queue_close(void *queue) {
    (void)queue;
}

void *device_cuda_mark_make(void) {
    return NULL;
}

void device_cuda_mark_free(void *mark) {
    (void)mark;
}

void device_cuda_queue_follow(void *queue, void *mark) {
    (void)queue, (void)mark;
}

void device_cuda_queue_mark(void *queue, void *mark) {
    (void)queue, (void)mark;
}

void device_cuda_follow(void *mark) {
    (void)mark;
}

void *device_cuda_host_memory(size_t bytes) {
    return aligned_alloc(ARENA_BLOCK_BYTES, (bytes + ARENA_BLOCK_BYTES - 1) / ARENA_BLOCK_BYTES * ARENA_BLOCK_BYTES);
}

#else

enum { SMALLEST_BYTES = 2 << 20 }; /* less than that the runtime puts together, at any address */

static pthread_once_t begun = PTHREAD_ONCE_INIT;
static int preferred_device, the_device, device_count;
static cudaStream_t the_stream;
static struct cudaDeviceProp properties;
static cudaError_t begin_error;
static const char *begin_failed_at;

/* The runtime's current device is one of each thread. */
static void enter(void) {
    static thread_local bool entered;
    if (!entered)
        cuda_check(cudaSetDevice(the_device), "cudaSetDevice");
    entered = true;
}

static bool begins(cudaError_t error, const char *what) {
    begin_error = error;
    begin_failed_at = what;
    return error == cudaSuccess;
}

static void begin(void) {
    if (begins(cudaGetDeviceCount(&device_count), "cudaGetDeviceCount"))
        the_device = device_count > 0 ? preferred_device % device_count : 0;
    if (begin_error == cudaSuccess &&
        begins(cudaGetDeviceProperties(&properties, the_device), "cudaGetDeviceProperties") &&
        begins(cudaSetDevice(the_device), "cudaSetDevice"))
        begins(cudaStreamCreateWithFlags(&the_stream, cudaStreamNonBlocking), "cudaStreamCreate");
    cudaGetLastError(); /* what is said here is not for the next call */
}

/* A recording that does not come about is no failure: what it would have done is done without. */
void cuda_fail(int error, const char *what) {
    if (recording_spoil())
        return;
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
    return recording_is_on() ? recording_stream() : the_stream;
}

/* The most that a kernel was ever launched with: never less again, a recording may hold a launch with more. */
void cuda_allow_shared(const void *kernel, size_t bytes, const char *what) {
    static std::map<const void *, size_t> allowed;
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);
    size_t &most = allowed[kernel];
    if (bytes <= most)
        return;
    cuda_stream();
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    cuda_check(error, what);
    if (error == cudaSuccess)
        most = bytes;
}

static void cuda_finish(void) {
    CHECK(!recording_is_on());
    cuda_check(cudaStreamSynchronize((cudaStream_t)cuda_stream()), "waiting for the device");
}

static enum status cuda_alloc(void **out, size_t bytes) {
    CHECK(!recording_is_on());
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

static void cuda_copy_from_host_later(void *data, const void *host, size_t bytes) {
    CHECK(!recording_is_on());
    if (bytes > 0)
        cuda_check(cudaMemcpyAsync(data, host, bytes, cudaMemcpyHostToDevice, (cudaStream_t)cuda_stream()), "cudaMemcpy");
}

static void cuda_copy_within(void *to, const void *from, size_t bytes) {
    if (bytes > 0)
        cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, (cudaStream_t)cuda_stream()), "cudaMemcpy");
}

static enum status cuda_alloc_host(void **out, size_t bytes) {
    void *data = NULL;
    cuda_stream();
    cudaError_t error = cudaHostAlloc(&data, bytes ? bytes : 1, cudaHostAllocPortable);
    if (error == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        return status_fail(STATUS_MEMORY, "no memory for %.2f GiB of copies for the CUDA device", (double)bytes / (1 << 30));
    }
    cuda_check(error, "cudaHostAlloc");
    *out = data;
    return STATUS_OK;
}

static void cuda_release_host(void *data, size_t bytes) {
    (void)bytes;
    cuda_stream();
    cuda_check(cudaFreeHost(data), "cudaFreeHost");
}

/* The kernels are there in the instructions of 9.0 and of all of 8, and in a form that the driver of a newer one translates. */
static bool has_kernels(void) {
    return properties.major >= 8;
}

enum status device_cuda(const struct device **out) {
    static const struct device cuda = {"cuda",
                                       cuda_alloc,
                                       cuda_release,
                                       cuda_copy_to_host,
                                       cuda_copy_from_host,
                                       cuda_copy_from_host_later,
                                       cuda_copy_within,
                                       cuda_alloc_host,
                                       cuda_release_host,
                                       cuda_finish,
                                       &cuda_recorder};
    int driver = 0;
    pthread_once(&begun, begin);
    if (begin_error == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0)
        return status_fail(STATUS_USAGE, "no CUDA device on this machine: it has no driver for one");
    if (begin_error != cudaSuccess)
        return status_fail(STATUS_USAGE, "no CUDA device on this machine: %s (%s)", cudaGetErrorString(begin_error),
                           begin_failed_at);
    if (!has_kernels())
        return status_fail(STATUS_USAGE, "%s has compute capability %d.%d; this program has kernels for 8.0 and newer",
                           properties.name, properties.major, properties.minor);
    *out = &cuda;
    return STATUS_OK;
}

void device_cuda_prefer(int number) {
    preferred_device = number;
}

const char *device_cuda_describe(void) {
    return properties.name;
}

void device_cuda_identify(unsigned char id[DEVICE_ID_BYTES]) {
    static_assert(sizeof properties.uuid == DEVICE_ID_BYTES, "a device's UUID");
    memcpy(id, &properties.uuid, DEVICE_ID_BYTES);
}

int64_t device_cuda_memory_bytes(int local_size) {
    int64_t sharers = device_count > 0 ? (local_size + device_count - 1) / device_count : 1;
    return (int64_t)properties.totalGlobalMem / sharers;
}

void *device_cuda_host_memory(size_t bytes) {
    void *data = NULL;
    cuda_stream();
    return cudaHostAlloc(&data, bytes, cudaHostAllocMapped | cudaHostAllocPortable) == cudaSuccess ? data : NULL;
}

/* Before the device's own kernels where both could begin: transfers are few and short, and others wait for them. */
void *device_cuda_queue_open(void) {
    int least = 0, greatest = 0;
    cudaStream_t queue;
    cuda_stream();
    cuda_check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    cuda_check(cudaStreamCreateWithPriority(&queue, cudaStreamNonBlocking, greatest), "cudaStreamCreate");
    return queue;
}

void device_cuda_queue_finish(void *queue) {
    cuda_stream();
    cuda_check(cudaStreamSynchronize((cudaStream_t)queue), "waiting for transfers");
}

void device_cuda_queue_close(void *queue) {
    device_cuda_queue_finish(queue);
    cuda_check(cudaStreamDestroy((cudaStream_t)queue), "cudaStreamDestroy");
}

void *device_cuda_mark_make(void) {
    cudaEvent_t mark;
    cuda_stream();
    cuda_check(cudaEventCreateWithFlags(&mark, cudaEventDisableTiming), "cudaEventCreate");
    return mark;
}

void device_cuda_mark_free(void *mark) {
    cuda_stream();
    cuda_check(cudaEventDestroy((cudaEvent_t)mark), "cudaEventDestroy");
}

void device_cuda_queue_follow(void *queue, void *mark) {
    cuda_check(cudaEventRecord((cudaEvent_t)mark, (cudaStream_t)cuda_stream()), "cudaEventRecord");
    cuda_check(cudaStreamWaitEvent((cudaStream_t)queue, (cudaEvent_t)mark, 0), "cudaStreamWaitEvent");
}

void device_cuda_queue_mark(void *queue, void *mark) {
    cuda_stream();
    cuda_check(cudaEventRecord((cudaEvent_t)mark, (cudaStream_t)queue), "cudaEventRecord");
}

void device_cuda_follow(void *mark) {
    cuda_check(cudaStreamWaitEvent((cudaStream_t)cuda_stream(), (cudaEvent_t)mark, 0), "cudaStreamWaitEvent");
}

#endif
