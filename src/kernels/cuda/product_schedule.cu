/* Who works on which tile of a weight gradient, told by the schedule itself: for tests. */
#include "kernels/cuda/product_schedule.cuh"

extern "C" {
#include "kernels/cuda/cuda.h"
}

struct schedule_problem {
    const int32_t *offsets;
    int groups, rows, group_rows, m;
};

struct schedule_memory {
    int first_row[GROUPS_MAX + 1], first_tile[GROUPS_MAX + 1], load[CLUSTERS_MAX];
    uint8_t order[GROUPS_MAX], turn[GROUPS_MAX];
};

/* times [tiles], owner [CLUSTER, tiles], group [tiles]: how often a tile was taken, by which cluster, whose it is. */
static __global__ void __launch_bounds__(THREADS)
    tell_tiles(const struct schedule_problem p, int column_tiles, int32_t *times, int32_t *owner, int32_t *group) {
    CUDA_SHARED struct schedule_memory memory;
    struct schedule_memory *s = &memory;
    count_tiles(p, WEIGHT, ABOVE, true, column_tiles, s);
    deal_tiles(p, s, s->load);
    int place = 0, total = s->first_tile[p.groups], rank = (int)blockIdx.x % CLUSTER;
    if (threadIdx.x > 0)
        return;
    for (int t = first_turn(); t < total; t = next_turn<WEIGHT>(p, s, place, t)) {
        struct tile tile = find_tile(p, WEIGHT, ABOVE, column_tiles, TILE_N, s, t, place, rank);
        place = tile.place;
        atomicAdd(&times[t], 1);
        owner[rank * total + t] = (int32_t)blockIdx.x / CLUSTER;
        group[t] = tile.group;
    }
}

void cuda_tell_tiles(const int32_t *offsets, int groups, int m, int column_tiles, int clusters, int32_t *times, int32_t *owner,
                     int32_t *group) {
    struct schedule_problem p = {offsets, groups, 0, 0, m};
    CHECK(groups <= GROUPS_MAX && clusters <= CLUSTERS_MAX);
    CUDA_LAUNCH(tell_tiles, (unsigned)(clusters * CLUSTER), THREADS, 0, p, column_tiles, times, owner, group);
}
