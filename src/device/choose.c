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

const char *device_describe(const struct device *device) {
#if defined(CADRE_CUDA) || defined(CADRE_CUDA_MODEL)
    if (device != device_cpu())
        return device_cuda_describe();
#endif
    return device->name;
}
