/* The CUDA device of this process, for device/ and for tests of kernels. */
#pragma once

#include "device/device.h"

enum status device_cuda(const struct device **out) MUST_USE;
const char *device_cuda_describe(void); /* after device_cuda */

/* Memory that host and device both reach, at the same address; slow for the device, hence for tests only. Stays until the
 * program ends. NULL where there is none. */
void *device_cuda_host_memory(size_t bytes);
