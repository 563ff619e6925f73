/* The table of the CUDA device, and the scratch memory of its operations. Nothing of it is the reference's: what is not filled
 * in would read the device's memory on the processor. */
#include "kernels/cuda/common.cuh"

#include <atomic>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
extern "C" {
#include "base/log.h"
#include "device/cuda/device_cuda.h"
#include "kernels/cuda/cuda.h"
}

enum { SCRATCH_GRAIN_BYTES = 1 << 20 };

static struct kernel_ops table;
static pthread_once_t built = PTHREAD_ONCE_INIT;
static std::atomic<size_t> held_bytes;

static void build(void) {
    struct kernel_ops ops = {};
    ops.logits_elements = (int64_t)1 << 28;
    ops.experts_most = EXPERTS_MOST;
    ops.head_dim_most = HEAD_DIM_MOST;
#ifdef CADRE_CUDA_MODEL
    ops.name = "cudamodel";
#else
    ops.name = "cuda";
#endif
    void (*const fill[])(struct kernel_ops *) = {product_fill_cuda, attention_fill_cuda, norm_fill_cuda, simple_fill_cuda,
                                                 pointwise_fill_cuda, router_fill_cuda, pairs_fill_cuda, loss_fill_cuda,
                                                 adamw_fill_cuda, outer_fill_cuda, roof_fill_cuda};
    for (auto each : fill)
        each(&ops);
    /* All but what may be missing: those that do several products at once, which follow each other. */
    size_t optional = offsetof(struct kernel_ops, product_swiglu_forward),
           last_optional = offsetof(struct kernel_ops, product_backward_inputs);
    for (size_t at = offsetof(struct kernel_ops, gemm); at < sizeof ops; at += sizeof(void *)) {
        void *operation;
        memcpy(&operation, (const char *)&ops + at, sizeof operation);
        CHECK(operation != NULL || (at >= optional && at <= last_optional));
    }
    table = ops;
}

const struct kernel_ops *kernels_cuda(void) {
    pthread_once(&built, build);
    return &table;
}

enum way { WITHOUT_HOPPER = 1, WITHOUT_FEW = 2, BLOCKS_BESIDE = 4, X_IS_RIGHT = 8, AHEAD = 16, AHEAD_TWICE = 32 };

#ifdef CADRE_CUDA_MODEL
enum { USUAL_WAYS = WITHOUT_HOPPER };
#else
enum { USUAL_WAYS = 0 };
#endif

static unsigned taken_ways = USUAL_WAYS;

/* The way that the word up to the next '-' or the end names; 0: none. */
static unsigned way_of(const char *word, size_t length) {
    static const struct {
        const char *word;
        unsigned way;
    } known[] = {{"tiles", WITHOUT_FEW}, {"beside", BLOCKS_BESIDE}, {"right", X_IS_RIGHT}, {"ahead", AHEAD},
                 {"ahead2", AHEAD | AHEAD_TWICE}};
    for (const auto &each : known)
        if (strlen(each.word) == length && memcmp(each.word, word, length) == 0)
            return each.way;
    return 0;
}

bool kernels_cuda_take(const char *name) {
    bool is_sm80 = strncmp(name, "sm80", 4) == 0, is_sm90 = strncmp(name, "sm90", 4) == 0;
    unsigned ways = is_sm80 ? WITHOUT_HOPPER : is_sm90 ? 0 : USUAL_WAYS;
    if (strcmp(name, "tiles") == 0)
        ways |= WITHOUT_FEW;
    else if (!is_sm80 && !is_sm90 && strcmp(name, "auto") != 0 && strcmp(name, "cuda") != 0)
        return false;
    for (const char *rest = name + 4; (is_sm80 || is_sm90) && *rest;) {
        size_t length = *rest == '-' ? strcspn(rest + 1, "-") : 0;
        unsigned way = way_of(rest + 1, length);
        if (way == 0 || (ways & way) || (is_sm80 && way != WITHOUT_FEW)) /* each at most once */
            return false;
        ways |= way;
        rest += 1 + length;
    }
    taken_ways = ways;
    return true;
}

bool cuda_is_general(void) {
    return taken_ways & WITHOUT_HOPPER;
}

bool cuda_has_few(void) {
    return !(taken_ways & WITHOUT_FEW);
}

bool cuda_lies_beside(void) {
    return taken_ways & BLOCKS_BESIDE;
}

bool cuda_keeps_x_right(void) {
    return taken_ways & X_IS_RIGHT;
}

int cuda_lead(void) {
    return taken_ways & AHEAD_TWICE ? 2 : taken_ways & AHEAD ? 1 : 0;
}

/* The model's are few, so that each has several tiles to go through. */
int cuda_processors(void) {
#ifdef CADRE_CUDA_MODEL
    return 6;
#else
    static int count;
    int device;
    if (!count) {
        cuda_check(cudaGetDevice(&device), "device");
        cuda_check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "device");
    }
    return count;
#endif
}

size_t cuda_scratch_bytes(void) {
    return held_bytes;
}

/* Threads are ranks that share the device, each in an operation of its own. */
#ifdef CADRE_CUDA_MODEL

struct scratch {
    void *data = NULL;
    size_t bytes = 0;
    ~scratch() {
        free(data);
        held_bytes -= bytes;
    }
};

/* Each request gets memory of its own and of no more bytes, not a number everywhere: so the sanitizer sees who goes beyond, and
 * tests who reads what nobody wrote. */
void *cuda_scratch(size_t bytes) {
    static thread_local struct scratch scratch;
    static thread_local size_t most;
    size_t whole = bytes ? (bytes + 255) / 256 * 256 : 256;
    if (void *recorded = device_cuda_recorded_scratch(whole))
        return recorded;
    if (whole > most) { /* where a device's would move */
        most = whole;
        device_cuda_may_move();
    }
    free(scratch.data);
    held_bytes += whole - scratch.bytes;
    CHECK((scratch.data = aligned_alloc(256, whole)) != NULL);
    scratch.bytes = whole;
    memset(scratch.data, 0xFF, whole);
    return scratch.data;
}

#else

void *cuda_scratch(size_t bytes) {
    static thread_local void *data;
    static thread_local size_t size;
    if ((bytes <= size && data) || !device_cuda_may_move())
        return data;
    const struct device *device;
    CHECK(device_cuda(&device) == STATUS_OK);
    if (data)
        device->release(data, size); /* waits for what still uses it */
    held_bytes -= size;
    size = (bytes / SCRATCH_GRAIN_BYTES + 1) * SCRATCH_GRAIN_BYTES;
    if (device->alloc(&data, size) != STATUS_OK) {
        log_progress_end();
        fprintf(stderr, "cadre: scratch memory of kernels: %s\n", status_text());
        abort();
    }
    held_bytes += size;
    return data;
}

#endif
