/* Hopper's own instructions on the model of a device: the words of kernels/cuda/hopper.cuh, hopper_attention.cuh and tensor_map.cuh
 * for g++. What runs beside the threads there runs here between them (model_sm90.cpp): boxes of tensors on their way to shared
 * memory, and products of the matrix units.
 *
 * Of each launch one of three moods says when: as late as anybody waits for it, at once, or now and then, while warps are held
 * up at random. Boxes arrive in any order. What a box will replace is gone when it is asked for; sums of products on their way
 * are no numbers, and matrices in shared memory are read when the products are done.
 *
 * What a device would do without a word ends the program with one line: arrivals beyond what a barrier counts, boxes and
 * products that nobody waits for, products without a fence before them, sums that are touched while products run, reads of
 * what threads copied and did not fence, addresses and strides that no device takes. */
#pragma once

#include "device/cuda/language.cuh"

/* A tensor of bf16, of which boxes of 64 numbers of the fastest dimension are brought. */
enum { MODEL_DIMS_MAX = 4 };

struct tensor_map {
    const unsigned char *data;
    int dims;
    uint64_t size[MODEL_DIMS_MAX], stride[MODEL_DIMS_MAX]; /* numbers; bytes, [0] unused */
    uint32_t box[MODEL_DIMS_MAX];
};

void tensor_map_make(tensor_map *map, const void *data, int dims, const uint64_t *size, const uint64_t *stride,
                     const uint32_t *box);

/* ---- barriers ---- */

uint32_t shared_address(const void *p); /* with the block's rank in the cluster from bit 24 on */
void barrier_init(uint64_t *barrier, int arrivals);
void barrier_arrive(uint64_t *barrier);
void barrier_arrive_at(uint64_t *barrier, uint32_t rank);
void barrier_arrive_expecting(uint64_t *barrier, uint32_t bytes);
void barrier_wait(uint64_t *barrier, uint32_t parity);
uint32_t cluster_rank(void);
void cluster_sync(void);
void fence_for_engines(void);

static inline void barriers_are_initialized(void) {
}

void cuda_model_named_barrier(int number, int threads, bool waits);

template <int number, int threads> static inline void group_sync(void) {
    cuda_model_named_barrier(number, threads, true);
}

static inline void turn_wait(int number) {
    cuda_model_named_barrier(number, 256, true);
}

static inline void turn_give(int number) {
    cuda_model_named_barrier(number, 256, false);
}

template <int count> static inline void registers_keep(void) {
    static_assert(count % 8 == 0 && count >= 24 && count <= 256, "registers of a thread");
}

template <int count> static inline void registers_get(void) {
    static_assert(count % 8 == 0 && count >= 24 && count <= 256, "registers of a thread");
}

bool elected(void);

/* ---- copies ---- */

void cuda_model_bring(void *to, const void *map, uint64_t *barrier, int dims, const int *at, unsigned blocks);
void load_bytes(void *to, const void *from, uint64_t *barrier, uint32_t bytes);

static inline void share_box_2d(void *to, const void *map, uint64_t *barrier, int c0, int c1, uint16_t mask) {
    const int at[] = {c0, c1};
    cuda_model_bring(to, map, barrier, 2, at, mask);
}

static inline void share_box_3d(void *to, const void *map, uint64_t *barrier, int c0, int c1, int c2, uint16_t mask) {
    const int at[] = {c0, c1, c2};
    cuda_model_bring(to, map, barrier, 3, at, mask);
}

static inline void load_box_2d(void *to, const void *map, uint64_t *barrier, int c0, int c1) {
    share_box_2d(to, map, barrier, c0, c1, (uint16_t)(1u << cluster_rank()));
}

static inline void load_box_3d(void *to, const void *map, uint64_t *barrier, int c0, int c1, int c2) {
    share_box_3d(to, map, barrier, c0, c1, c2, (uint16_t)(1u << cluster_rank()));
}

static inline void load_box_4d(void *to, const void *map, uint64_t *barrier, int c0, int c1, int c2, int c3) {
    const int at[] = {c0, c1, c2, c3};
    cuda_model_bring(to, map, barrier, 4, at, 1u << cluster_rank());
}

void store_matrices(void *row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3);

static inline void ask_for(const void *) {
}

static inline void ask_for_map(const void *) {
}

/* ---- sums in memory ---- */

void add_number(float *to, float x);
void add_pair(float *to, float x, float y);
void add_four(float *to, float4 x);

/* ---- products by a warp group ---- */

/* d [64, 2 * numbers] = or += a b: what a lane brings. */
struct cuda_model_product {
    float *d;
    int numbers;             /* of d, in a lane */
    const uint32_t *a_pairs; /* NULL: operand a is a matrix in shared memory, too */
    uint64_t a, b;
    bool turned_a, turned_b, accumulates;
};

void cuda_model_multiply(struct cuda_model_product product);
void cuda_model_matrices_wait(int newest);
void matrices_begin(void);
void matrices_commit(void);

template <int newest> static inline void matrices_wait(void) {
    cuda_model_matrices_wait(newest);
}

template <int turned_a, int turned_b> static inline void multiply_64x256(float d[128], uint64_t a, uint64_t b, int accumulate) {
    cuda_model_multiply({d, 128, NULL, a, b, turned_a != 0, turned_b != 0, accumulate != 0});
}

template <int numbers> static inline void multiply_shared(float (&d)[numbers], uint64_t a, uint64_t b, int accumulate) {
    cuda_model_multiply({d, numbers, NULL, a, b, false, false, accumulate != 0});
}

template <int numbers> static inline void multiply_turned(float (&d)[numbers], uint64_t a, uint64_t b) {
    cuda_model_multiply({d, numbers, NULL, a, b, true, true, true});
}

template <int numbers> static inline void multiply_registers(float (&d)[numbers], const uint32_t *a, uint64_t b) {
    cuda_model_multiply({d, numbers, a, 0, b, false, true, true});
}

template <int count> static inline void pin(float *) {
}
