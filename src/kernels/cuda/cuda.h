/* The table of the CUDA device. */
#pragma once

#include "kernels/kernels.h"

const struct kernel_ops *kernels_cuda(void);

/* What `name` says is taken from now on; before any operation. False: it is none of CUDA_KERNEL_NAMES. auto and cuda are what a
 * device has (its model leaves out Hopper's own, which take it long); sm80 is nothing that only Hopper has; tiles no kernels of
 * their own for few rows and few queries. Of Hopper's products: beside, the blocks of a cluster beside each other where rows are
 * gathered; right, x that is gathered is the right operand of a weight's gradient; ahead, ahead2, half of a block's multipliers
 * are so many blocks of the inner dimension ahead of the others when a tile begins. */
bool kernels_cuda_take(const char *name);
#define CUDA_KERNEL_NAMES "auto, cuda, tiles, sm80[-tiles], sm90[-tiles][-beside][-right][-ahead or -ahead2]"

size_t cuda_scratch_bytes(void);

/* For tests: of a weight gradient of `groups` results with m rows and column_tiles * 256 columns, which of so many clusters takes
 * which tile. All in the device's memory: offsets [groups + 1]; times [tiles] += 1 for each block that takes it; owner
 * [2, tiles] = the cluster, by either block of it; group [tiles] = whose tile it is. */
void cuda_tell_tiles(const int32_t *offsets, int groups, int m, int column_tiles, int clusters, int32_t *times, int32_t *owner,
                     int32_t *group);
