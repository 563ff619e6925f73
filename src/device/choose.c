/* Which device a name means. */
#include "device/cuda/device_cuda.h"
#include "device/device.h"

#include <string.h>

enum status device_choose(const char *name, const struct device **out) {
    if (strcmp(name, "cpu") == 0) {
        *out = device_cpu();
        return STATUS_OK;
    }
    if (strcmp(name, "cuda") != 0)
        return status_fail(STATUS_USAGE, "no device '%s': it is cpu or cuda", name);
#if defined(CADRE_CUDA) || defined(CADRE_CUDA_MODEL)
    return device_cuda(out);
#else
    return status_fail(STATUS_USAGE, "no device 'cuda': this program was built without CUDA");
#endif
}

void device_set_local_rank(int local_rank) {
    CHECK(local_rank >= 0);
    (void)local_rank;
#if defined(CADRE_CUDA) || defined(CADRE_CUDA_MODEL)
    device_cuda_prefer(local_rank);
#endif
}

void device_identify(const struct device *device, unsigned char id[DEVICE_ID_BYTES]) {
    memset(id, 0, DEVICE_ID_BYTES);
    (void)device;
#if defined(CADRE_CUDA) || defined(CADRE_CUDA_MODEL)
    if (device != device_cpu())
        device_cuda_identify(id);
#endif
}

int64_t device_memory_bytes(const struct device *device, int local_size) {
    (void)device, (void)local_size;
#if defined(CADRE_CUDA) || defined(CADRE_CUDA_MODEL)
    if (device != device_cpu())
        return device_cuda_memory_bytes(local_size);
#endif
    return 0;
}

enum status device_plan(const char *name, const struct device **out) {
#if defined(CADRE_CUDA) || defined(CADRE_CUDA_MODEL)
    if (strcmp(name, "cuda") == 0 && device_choose(name, out) != STATUS_OK) {
        *out = device_cuda_absent();
        return STATUS_OK;
    }
#endif
    return device_choose(name, out);
}

const char *device_describe(const struct device *device) {
#if defined(CADRE_CUDA) || defined(CADRE_CUDA_MODEL)
    if (device != device_cpu())
        return device_cuda_describe();
#endif
    return device->name;
}
