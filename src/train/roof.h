/* How fast this machine can be at best: what speeds are stated as a share of. */
#pragma once

#include "device/device.h"
#include "kernels/kernels.h"

/* Operations per second at best with operands of `compute` dtype, measured for about `seconds`. On processors: all threads
 * together, multiplying on registers; no product can be faster. On another device: dense products of 8192 along each side, by
 * the fastest library for it that is there; what the device's maker promises is more than any product reaches. */
double roof_multiply(const struct kernel_ops *ops, const struct device *device, enum dtype compute, double seconds);

/* The same of processors over one stretch of time, not the best of several: for what is measured in turns with it and meets the
 * same clock and the same neighbours. */
double roof_multiply_now(const struct kernel_ops *ops, enum dtype compute, double seconds);

struct roof_bandwidth { /* bytes per second between what computes and its memory, all threads together */
    double read, copy;  /* copy counts what is read and what is written */
};

/* Over buffers of `bytes` each, larger than the caches for an honest answer; best of several passes. STATUS_MEMORY. */
enum status roof_bandwidth(const struct kernel_ops *ops, const struct device *device, size_t bytes,
                           struct roof_bandwidth *bandwidth) MUST_USE;
