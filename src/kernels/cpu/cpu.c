/* Which table a processor gets. Every table begins as a copy of the reference and is then filled by the copies of
 * kernels/cpu/isa/ for its instruction set. */
#include "device/device.h"
#include "kernels/cpu/fillers.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cuda/cuda.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#ifdef CADRE_ISA_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { FILLER_COUNT = 10 };

struct backend {
    const char *name;
    bool (*runs)(void);
    void (*fill[FILLER_COUNT])(struct kernel_ops *ops);
};

static bool portable_runs(void) {
    return true;
}

/* Each asks for all that cmake/folder.cmake lets the compiler use in that copy. */
#ifdef CADRE_ISA_AVX2
static bool avx2_runs(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("bmi2");
}
#endif

#ifdef CADRE_ISA_AVX512
static bool avx512_runs(void) {
    return avx2_runs() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#ifdef CADRE_ISA_AVX512BF16
static bool avx512bf16_runs(void) {
    return avx512_runs() && __builtin_cpu_supports("avx512bf16");
}
#endif

#ifdef CADRE_ISA_AMX
/* The system keeps the tiles' registers for processes that ask for them. */
static bool amx_runs(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return avx512bf16_runs() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

#define FILLER(file, isa) file##_fill_##isa,
#define BACKEND(isa, runs) {#isa, runs, {FOR_EACH_FILLER(FILLER, isa)}}

/* Slowest first: "auto" is the last one that runs. */
static const struct backend backends[] = {
    {"ref", portable_runs, {NULL}},
    BACKEND(portable, portable_runs),
#ifdef CADRE_ISA_AMXMODEL /* right, not fast */
    BACKEND(amxmodel, avx512bf16_runs),
#endif
#ifdef CADRE_ISA_AVX2
    BACKEND(avx2, avx2_runs),
#endif
#ifdef CADRE_ISA_AVX512
    BACKEND(avx512, avx512_runs),
#endif
#ifdef CADRE_ISA_AVX512BF16
    BACKEND(avx512bf16, avx512bf16_runs),
#endif
#ifdef CADRE_ISA_AMX
    BACKEND(amx, amx_runs),
#endif
};
enum { BACKEND_COUNT = sizeof backends / sizeof *backends };

static struct kernel_ops tables[BACKEND_COUNT];
static const char *available[BACKEND_COUNT + 1]; /* NULL at the end */
static const struct kernel_ops *fastest;
static pthread_once_t built = PTHREAD_ONCE_INIT;

static void build(void) {
    int count = 0;
    for (int b = 0; b < BACKEND_COUNT; b++) {
        if (!backends[b].runs())
            continue;
        tables[b] = *kernels_ref();
        tables[b].name = backends[b].name;
        for (int f = 0; f < FILLER_COUNT && backends[b].fill[f]; f++)
            backends[b].fill[f](&tables[b]);
        available[count++] = backends[b].name;
        fastest = &tables[b];
    }
}

static enum status choose_named(const char *name, const struct kernel_ops **out) {
    char known[128] = "auto";
    for (int b = 0; b < BACKEND_COUNT; b++) {
        if (tables[b].name && strcmp(name, backends[b].name) == 0) {
            *out = &tables[b];
            return STATUS_OK;
        }
        if (tables[b].name)
            strcat(strcat(known, ", "), backends[b].name);
    }
    return status_fail(STATUS_USAGE, "no kernels '%s' on this processor; it runs: %s", name, known);
}

enum status kernels_choose(const char *name, const struct kernel_ops **out) {
    pthread_once(&built, build);
    if (strcmp(name, "auto") != 0)
        return choose_named(name, out);
    const char *wanted = getenv("CADRE_KERNELS");
    if (wanted && *wanted && strcmp(wanted, "auto") != 0)
        return status_prefix(choose_named(wanted, out), "environment variable CADRE_KERNELS");
    *out = fastest;
    return STATUS_OK;
}

const char *const *kernels_available(void) {
    pthread_once(&built, build);
    return available;
}

bool kernels_prefer_bf16(void) {
#ifdef CADRE_ISA_AVX512BF16
    return avx512bf16_runs();
#else
    return false;
#endif
}

#if defined(CADRE_CUDA) || defined(CADRE_CUDA_MODEL)
enum status kernels_choose_for(const struct device *device, const char *name, const struct kernel_ops **out) {
    if (device == device_cpu())
        return kernels_choose(name, out);
    if (!kernels_cuda_take(name))
        return status_fail(STATUS_USAGE, "no kernels '%s' for device %s; it runs: " CUDA_KERNEL_NAMES, name, device->name);
    *out = kernels_cuda();
    return STATUS_OK;
}

bool kernels_device_prefers_bf16(const struct device *device) {
    return device != device_cpu() || kernels_prefer_bf16();
}

size_t kernels_scratch_bytes(void) {
    return scratch_bytes() + cuda_scratch_bytes();
}
#else
enum status kernels_choose_for(const struct device *device, const char *name, const struct kernel_ops **out) {
    (void)device;
    return kernels_choose(name, out);
}

bool kernels_device_prefers_bf16(const struct device *device) {
    (void)device;
    return kernels_prefer_bf16();
}

size_t kernels_scratch_bytes(void) {
    return scratch_bytes();
}
#endif
