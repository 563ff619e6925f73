/* The table of the CUDA device. */
#pragma once

#include "kernels/kernels.h"

const struct kernel_ops *kernels_cuda(void);

/* From now on without what only Hopper has, as on every device from sm_80 on; without kernels of their own for few rows and few
 * queries, whose place tiles take; Hopper's products of gathered rows with the blocks of a cluster beside each other; the first of
 * a block's two groups of multipliers one block of the inner dimension ahead of the other, or two. */
enum cuda_way { WITHOUT_HOPPER = 1, WITHOUT_FEW = 2, BLOCKS_BESIDE = 4, ONE_AHEAD = 8, TWO_AHEAD = 16 };

/* ways: the sum of some. Before any operation. */
void kernels_cuda_take(unsigned ways);

size_t cuda_scratch_bytes(void);

/* For tests: of a weight gradient of `groups` results with m rows and column_tiles * 256 columns, which of so many clusters takes
 * which tile. All in the device's memory: offsets [groups + 1]; times [tiles] += 1 for each block that takes it; owner
 * [2, tiles] = the cluster, by either block of it; group [tiles] = whose tile it is. */
void cuda_tell_tiles(const int32_t *offsets, int groups, int m, int column_tiles, int clusters, int32_t *times, int32_t *owner,
                     int32_t *group);
