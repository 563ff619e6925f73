/* Small kernels for the model of a device, right ones, and the same with one fault each (model_faults.h). */
#include "device/cuda/language.cuh"

#include "device/cuda/model_sm90.cuh"

extern "C" {
#include "device/cuda/model_faults.h"
}

namespace {

enum { THREADS = 128, ROWS = 64, TILE_BYTES = ROWS * 128, COLUMNS = 64 };

/* The fault that a kernel has; RIGHT is none. */
enum fault {
    RIGHT,
    ARRIVES_TWICE,
    NOT_INITIALIZED,
    BYTES_MISSING,
    NOT_AWAITED,
    NO_FENCE,
    PRODUCT_NOT_AWAITED,
    SUMS_TOUCHED,
    SUMS_READ,
    GIVEN_BACK_EARLY,
    BOX_ASKEW,
    BOX_BEYOND,
    BOX_OF_OTHER_DIMS,
    OTHER_PRODUCTS,
    NOT_SWIZZLED,
    COPY_NOT_FENCED,
    RANK_IN_MATRIX,
    BLOCK_ENDED,
    OTHER_COUNT,
    ALONE_AT_BARRIER,
    PLAIN_LAUNCH,
    LANE_MISSING,
    WRITES_BEHIND,
    TOO_MUCH_SHARED,
    FAULTS
};

const struct model_fault faults[FAULTS + 1] = {
    {"nothing", ""},
    {"an arrival too many", "more arrivals than a barrier counts"},
    {"a barrier that is none", "a barrier that nobody initialized"},
    {"more bytes awaited than come", "16 bytes are missing"},
    {"a box that nobody waits for", "ended before its boxes had come"},
    {"a product without a fence", "a product without a fence"},
    {"a product that nobody waits for", "products that nobody waited for"},
    {"sums written while a product runs", "sums were touched"},
    {"sums read while a product runs", ""},
    {"an operand replaced while a product may read it", ""},
    {"a box at an odd place", "not aligned to 128"},
    {"a box beyond shared memory", "beyond the block's shared memory"},
    {"a box of other dimensions", "other dimensions than its tensor"},
    {"warps of a group with other products", "with other products"},
    {"a matrix that is not swizzled", "chunks of 16 bytes are not swapped"},
    {"a copy by threads without a fence", "copied and did not fence"},
    {"a block's rank in a matrix", "runs into the next field"},
    {"an arrival at a block that has ended", "the memory of a block that has ended"},
    {"threads that count otherwise", "expect other numbers of each other"},
    {"a warp alone at a barrier", "wait for ever"},
    {"Hopper's instructions in a launch for every device", "an instruction of Hopper's"},
    {"a lane that does not come", "waits for ever: lanes"},
    {"a write behind shared memory", "wrote behind its shared memory"},
    {"more shared memory than there is", "no device has that much shared memory"},
    {nullptr, nullptr},
};

struct place {
    unsigned char tile[2][TILE_BYTES];
    uint64_t full, again;
    alignas(128) unsigned char end[128]; /* less than a box */
};

/* What the units are told of a tile whose rows of 128 bytes hold the inner dimension, 16 columns from `step` * 16 on. */
uint64_t matrix_told(uint32_t address, int step, fault f) {
    uint64_t low = f == RANK_IN_MATRIX ? address >> 4 : (address & 0x3FFFF) >> 4;
    return (f == NOT_SWIZZLED ? 0 : 1ull << 62) | (uint64_t)(1024 >> 4) << 32 | 1u << 16 | (low + (uint64_t)step * 2);
}

void bring(struct place *s, const tensor_map &map, fault f) {
    barrier_arrive_expecting(&s->full, 2 * TILE_BYTES + (f == BYTES_MISSING ? 16 : 0));
    if (f == ARRIVES_TWICE)
        barrier_arrive(&s->full);
    if (f == BOX_OF_OTHER_DIMS)
        load_box_3d(s->tile[0], &map, &s->full, 0, 0, 0);
    load_box_2d(f == BOX_BEYOND ? s->end : f == BOX_ASKEW ? s->tile[0] + 64 : s->tile[0], &map, &s->full, 0, 0);
    load_box_2d(s->tile[1], &map, &s->full, 0, 0);
}

/* The tile's first chunk again, by a thread. */
void copy_by_thread(struct place *s, const uint16_t *ones, fault f) {
    copy_async(s->tile[0], ones, 16);
    copy_async_commit();
    copy_async_wait<0>();
    if (f != COPY_NOT_FENCED)
        fence_for_engines();
}

/* sum [64,64] = ones [64,64] ones [64,64], by one warp group of each block. Then the tile comes again. */
void kernel(const tensor_map map, const uint16_t *ones, float *sum, fault f) {
    CUDA_SHARED_DYNAMIC(struct place, s);
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    float d[COLUMNS / 2];
    if (threadIdx.x == 0 && f != NOT_INITIALIZED)
        barrier_init(&s->full, 1);
    if (threadIdx.x == 0)
        barrier_init(&s->again, 1);
    __syncthreads();
    cluster_sync();
    if (threadIdx.x == 0)
        bring(s, map, f);
    if (f == NOT_AWAITED)
        return;
    barrier_wait(&s->full, 0);
    if (threadIdx.x == 0)
        copy_by_thread(s, ones, f);
    cuda_model_named_barrier(1, f == OTHER_COUNT && warp == 1 ? 64 : THREADS, true);
    if (f == ALONE_AT_BARRIER && warp == 0)
        cuda_model_named_barrier(2, 64, true);
    uint32_t a = shared_address(s->tile[0]), b = shared_address(s->tile[1]);
    if (f != NO_FENCE)
        matrices_begin();
    for (int k = 0; k < 4; k++)
        multiply_shared(d, matrix_told(a, f == OTHER_PRODUCTS && warp == 3 ? 0 : k, f), matrix_told(b, k, f), k > 0);
    matrices_commit();
    if (f == SUMS_TOUCHED)
        d[0] = 1;
    if (f == SUMS_READ)
        sum[threadIdx.x] = d[0];
    if (f == GIVEN_BACK_EARLY && threadIdx.x == 0) {
        barrier_arrive_expecting(&s->again, TILE_BYTES);
        load_box_2d(s->tile[1], &map, &s->again, 0, 0);
    }
    if (f == PRODUCT_NOT_AWAITED)
        return;
    matrices_wait<0>();
    __syncthreads();
    if (f != GIVEN_BACK_EARLY && threadIdx.x == 0) {
        barrier_arrive_expecting(&s->again, TILE_BYTES);
        load_box_2d(s->tile[1], &map, &s->again, 0, 0);
    }
    barrier_wait(&s->again, 0);
    for (int i = 0; i < COLUMNS / 2 && f != SUMS_READ; i++) {
        int row = 16 * warp + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        sum[((int)blockIdx.x * ROWS + row) * COLUMNS + column] = d[i];
    }
    if (f == BLOCK_ENDED && blockIdx.x == 1)
        return;
    if (f == BLOCK_ENDED)
        barrier_arrive_at(&s->again, 1);
    cluster_sync();
}

void plain_kernel(float *sum, fault f) {
    CUDA_SHARED_DYNAMIC(unsigned char, bytes);
    int lane = (int)threadIdx.x % WARP;
    if (f == LANE_MISSING && lane == 7)
        return;
    if (f == WRITES_BEHIND && threadIdx.x == 0)
        bytes[1000] = 1;
    int x = 1;
    for (int distance = 1; distance < WARP; distance *= 2)
        x += __shfl_xor_sync(FULL_WARP, x, distance);
    sum[threadIdx.x] = (float)x;
}

bool run_plain(fault f) {
    float sum[THREADS];
    size_t bytes = f == TOO_MUCH_SHARED ? 99 * 1024 : 1000;
    CUDA_LAUNCH(plain_kernel, 1, THREADS, bytes, sum, f);
    for (float each : sum)
        if (each != 32)
            return false;
    return true;
}

bool run_units(fault f) {
    alignas(16) static uint16_t ones[ROWS * 64];
    static float sum[2 * ROWS * COLUMNS];
    for (uint16_t &one : ones)
        one = 0x3F80;
    for (float &each : sum)
        each = 0;
    const uint64_t size[] = {64, ROWS}, stride[] = {128};
    const uint32_t box[] = {64, ROWS};
    tensor_map map;
    tensor_map_make(&map, ones, 2, size, stride, box);
    if (f == PLAIN_LAUNCH)
        CUDA_LAUNCH(kernel, 2, THREADS, sizeof(struct place), map, ones, sum, f);
    CUDA_LAUNCH_SM90(2, kernel, 2, THREADS, sizeof(struct place), map, ones, sum, f);
    for (float each : sum)
        if (each != 64)
            return false;
    return true;
}

} // namespace

const struct model_fault *model_faults(void) {
    return faults;
}

bool model_fault_run(int number, bool wrong) {
    fault f = wrong ? (fault)number : RIGHT;
    return number >= LANE_MISSING ? run_plain(f) : run_units(f);
}
