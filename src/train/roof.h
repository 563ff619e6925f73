/* How fast this machine can be at best: what speeds are stated as a share of. */
#pragma once

#include "device/device.h"
#include "kernels/kernels.h"

/* Operations per second of all threads together, multiplying operands of `compute` dtype on registers for about
 * `seconds`: no product can be faster. */
double roof_multiply(const struct kernel_ops *ops, enum dtype compute, double seconds);

struct roof_bandwidth { /* bytes per second between the processors and memory, all threads together */
    double read, copy;  /* copy counts what is read and what is written */
};

/* Over buffers of `bytes` each, larger than the caches for an honest answer; best of several passes. STATUS_MEMORY. */
enum status roof_bandwidth(const struct kernel_ops *ops, const struct device *device, size_t bytes,
                           struct roof_bandwidth *bandwidth) MUST_USE;
