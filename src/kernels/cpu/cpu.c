/* Which table a processor gets. Every table begins as a copy of the reference and is then filled by the copies of
 * kernels/cpu/isa/ for its instruction set. */
#include "device/device.h"
#include "kernels/cpu/fillers.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cuda/cuda.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#ifdef CADRE_X86
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

#ifdef CADRE_X86
/* Each asks for all that cmake/folder.cmake lets the compiler use in that copy. */
static bool avx2_runs(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("bmi2");
}

static bool avx512_runs(void) {
    return avx2_runs() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static bool avx512bf16_runs(void) {
    return avx512_runs() && __builtin_cpu_supports("avx512bf16");
}

/* The system keeps the tiles' registers for processes that ask for them. */
static bool amx_runs(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return avx512bf16_runs() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

/* Slowest first: "auto" is the last one that runs. */
static const struct backend backends[] = {
    {"ref", portable_runs, {NULL}},
    {"portable",
     portable_runs,
     {product_fill_portable, attention_fill_portable, norm_fill_portable, pointwise_fill_portable,
      router_fill_portable, loss_fill_portable, adamw_fill_portable,
      roof_fill_portable, box_fill_portable, outer_fill_portable}},
#ifdef CADRE_AMX_MODEL
    {"amxmodel", /* right, not fast */
     avx512bf16_runs,
     {product_fill_amxmodel, attention_fill_amxmodel, norm_fill_amxmodel, pointwise_fill_amxmodel,
      router_fill_amxmodel, loss_fill_amxmodel, adamw_fill_amxmodel,
      roof_fill_amxmodel, box_fill_amxmodel, outer_fill_amxmodel}},
#endif
#ifdef CADRE_X86
    {"avx2",
     avx2_runs,
     {product_fill_avx2, attention_fill_avx2, norm_fill_avx2, pointwise_fill_avx2, router_fill_avx2,
      loss_fill_avx2, adamw_fill_avx2,
      roof_fill_avx2, box_fill_avx2, outer_fill_avx2}},
    {"avx512",
     avx512_runs,
     {product_fill_avx512, attention_fill_avx512, norm_fill_avx512, pointwise_fill_avx512,
      router_fill_avx512, loss_fill_avx512, adamw_fill_avx512,
      roof_fill_avx512, box_fill_avx512, outer_fill_avx512}},
    {"avx512bf16",
     avx512bf16_runs,
     {product_fill_avx512bf16, attention_fill_avx512bf16, norm_fill_avx512bf16,
      pointwise_fill_avx512bf16, router_fill_avx512bf16, loss_fill_avx512bf16, adamw_fill_avx512bf16,
      roof_fill_avx512bf16, box_fill_avx512bf16, outer_fill_avx512bf16}},
    {"amx",
     amx_runs,
     {product_fill_amx, attention_fill_amx, norm_fill_amx, pointwise_fill_amx, router_fill_amx, loss_fill_amx,
      adamw_fill_amx,
      roof_fill_amx, box_fill_amx, outer_fill_amx}},
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
#ifdef CADRE_X86
    return avx512bf16_runs();
#else
    return false;
#endif
}

#if defined(CADRE_CUDA) || defined(CADRE_CUDA_MODEL)
enum status kernels_choose_for(const struct device *device, const char *name, const struct kernel_ops **out) {
    if (device == device_cpu())
        return kernels_choose(name, out);
    static const struct {
        const char *name;
        bool leaves_out_hopper, leaves_out_few;
    } known[] = {
#ifdef CADRE_CUDA_MODEL /* Hopper's only when asked for: it takes long over them */
        {"sm90-tiles", false, true}, {"auto", true, false}, {"cuda", true, false}, {"tiles", true, true},
#else
        {"auto", false, false}, {"cuda", false, false}, {"tiles", false, true},
#endif
        {"sm80", true, false}, {"sm80-tiles", true, true}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(name, known[i].name) != 0)
            continue;
        kernels_cuda_leave_out(known[i].leaves_out_hopper, known[i].leaves_out_few);
        *out = kernels_cuda();
        return STATUS_OK;
    }
    return status_fail(STATUS_USAGE, "no kernels '%s' for device %s; it runs: auto, cuda, sm80, tiles, sm80-tiles", name,
                       device->name);
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
