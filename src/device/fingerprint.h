/* A hash of bytes in a device's memory, to compare what several ranks hold; on all threads. */
#pragma once

#include "device/device.h"
#include <stdint.h>

/* Of the bytes and their places; the same for any number of threads. */
uint64_t device_fingerprint(const struct device *device, const void *data, size_t bytes);
