/* Recordings: on a device graphs, captured from a stream that nothing else uses; on the model of one a list of what was asked. */
#include "device/cuda/recording.cuh"

#include <atomic>
#include <stdlib.h>

/* How many times scratch has moved in this process. A recording is of the age that it began at. */
static std::atomic<unsigned> memory_age;

bool device_cuda_may_move(void) {
    if (recording_spoil())
        return false;
    memory_age++;
    return true;
}

#ifdef CADRE_CUDA_MODEL

struct recording {
    std::vector<std::function<void()>> work;
    std::vector<void *> scratch;
    unsigned age;
    bool is_spoilt;
};

static thread_local struct recording *present;

bool recording_is_on(void) {
    return present != NULL;
}

bool recording_spoil(void) {
    if (present)
        present->is_spoilt = true;
    return present != NULL;
}

bool cuda_model_records(void) {
    return present != NULL;
}

void cuda_model_note(std::function<void()> work) {
    present->work.push_back(std::move(work));
}

void *device_cuda_recorded_scratch(size_t bytes) {
    if (!present)
        return NULL;
    void *data = aligned_alloc(256, bytes);
    CHECK(data != NULL);
    present->scratch.push_back(data);
    present->work.push_back([data, bytes] { memset(data, 0xFF, bytes); });
    return data;
}

static void begin(void) {
    CHECK(present == NULL);
    present = new struct recording();
    present->age = memory_age;
}

static void release(struct recording *recording) {
    if (!recording)
        return;
    for (void *data : recording->scratch)
        free(data);
    delete recording;
}

static struct recording *end(void) {
    struct recording *made = present;
    CHECK(made != NULL);
    present = NULL;
    if (!made->is_spoilt)
        return made;
    release(made);
    return NULL;
}

static bool repeat(struct recording *recording) {
    CHECK(present == NULL);
    if (recording->age != memory_age)
        return false;
    for (auto &work : recording->work)
        work();
    return true;
}

#else

struct recording {
    cudaGraphExec_t graph;
    unsigned age;
};

static thread_local struct {
    cudaStream_t stream; /* NULL: nothing is recorded */
    unsigned age;
    bool is_spoilt;
} present;

bool recording_is_on(void) {
    return present.stream != NULL;
}

bool recording_spoil(void) {
    present.is_spoilt = true;
    return present.stream != NULL;
}

cudaStream_t recording_stream(void) {
    return present.stream;
}

/* The device's own stream stays as it is: other threads may copy on it meanwhile. */
static void begin(void) {
    cudaStream_t stream;
    cuda_stream(); /* this thread's device */
    CHECK(present.stream == NULL);
    cuda_check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    cuda_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    present = {stream, memory_age, false};
}

static struct recording *end(void) {
    cudaStream_t stream = present.stream;
    cudaGraph_t graph = NULL;
    cudaGraphExec_t runs = NULL;
    bool is_good;
    CHECK(stream != NULL);
    present.stream = NULL;
    is_good = cudaStreamEndCapture(stream, &graph) == cudaSuccess && !present.is_spoilt &&
              cudaGraphInstantiate(&runs, graph, 0) == cudaSuccess &&
              cudaGraphUpload(runs, (cudaStream_t)cuda_stream()) == cudaSuccess; /* what it takes of the device, it takes now */
    if (graph)
        cuda_check(cudaGraphDestroy(graph), "cudaGraphDestroy");
    cuda_check(cudaStreamDestroy(stream), "cudaStreamDestroy");
    if (!is_good) {
        if (runs)
            cuda_check(cudaGraphExecDestroy(runs), "cudaGraphExecDestroy");
        cudaGetLastError(); /* what is said here is not for the next call */
        return NULL;
    }
    struct recording *made = (struct recording *)malloc(sizeof *made);
    CHECK(made != NULL);
    *made = {runs, present.age};
    return made;
}

static bool repeat(struct recording *recording) {
    CHECK(present.stream == NULL);
    if (recording->age != memory_age)
        return false;
    cuda_check(cudaGraphLaunch(recording->graph, (cudaStream_t)cuda_stream()), "cudaGraphLaunch");
    return true;
}

/* One that still runs goes when it is done. */
static void release(struct recording *recording) {
    if (!recording)
        return;
    cuda_stream();
    cuda_check(cudaGraphExecDestroy(recording->graph), "cudaGraphExecDestroy");
    free(recording);
}

#endif

const struct device_recorder cuda_recorder = {begin, end, repeat, release};
