/* How fast this machine multiplies at best: what speeds are stated as a share of. */
#pragma once

#include "device/device.h"
#include "kernels/kernels.h"

/* Operations per second of the best of several square products in `compute` dtype, over about `seconds`. */
enum status roof_measure(const struct kernel_ops *ops, const struct device *device, enum dtype compute, double seconds,
                         double *operations_per_s) MUST_USE;
