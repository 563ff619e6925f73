#include "device/device.h"

#include <string.h>
#include <sys/mman.h>

/* Anonymous mappings are zeroed by the system and take physical memory only when touched. */
static enum status cpu_alloc(void **out, size_t bytes) {
    void *data = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED)
        return status_fail(STATUS_MEMORY, "no memory for %.2f GiB of tensors", (double)bytes / (1 << 30));
    madvise(data, bytes, MADV_HUGEPAGE); /* only a hint: large pages save address translation */
    *out = data;
    return STATUS_OK;
}

static void cpu_release(void *data, size_t bytes) {
    munmap(data, bytes);
}

static void cpu_copy_to_host(void *host, const void *data, size_t bytes) {
    memcpy(host, data, bytes);
}

static void cpu_copy_from_host(void *data, const void *host, size_t bytes) {
    memcpy(data, host, bytes);
}

static void cpu_copy_within(void *to, const void *from, size_t bytes) {
    memcpy(to, from, bytes);
}

static void cpu_finish(void) {
}

const struct device *device_cpu(void) {
    static const struct device cpu = {
        .name = "cpu",
        .alloc = cpu_alloc,
        .release = cpu_release,
        .copy_to_host = cpu_copy_to_host,
        .copy_from_host = cpu_copy_from_host,
        .copy_from_host_later = cpu_copy_from_host,
        .copy_within = cpu_copy_within,
        .alloc_host = cpu_alloc,
        .release_host = cpu_release,
        .finish = cpu_finish,
    };
    return &cpu;
}
