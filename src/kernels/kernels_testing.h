/* What the kernel tests share: the backends, tensors between guard bytes, numbers of several kinds, ragged groups.
 *
 * All memory comes from one pool of the test program; test_release gives everything back at once. Where there is a CUDA
 * device it is memory that the device reaches, too, and every launch is done when it returns, so that a test sees a backend
 * of the device as it sees those of the processor. Tensors on a test's stack are for the processor only.
 */
#pragma once

#include "base/memory.h"
#include "base/random.h"
#include "device/cuda/device_cuda.h"
#include "kernels/kernels.h"
#include "tensor/tensor_testing.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

/* Numbers of threads, 1 and on; of how many cases the model of a device gets one, where many are alike, and of all others. The
 * sanitizers look for what no number of them should do: fewer are enough. */
#ifdef __SANITIZE_ADDRESS__
enum { TEST_THREADS_STEP = 2, TEST_MODEL_ALIKE = 7, TEST_MODEL_SHARE = 3 };
#else
enum { TEST_THREADS_STEP = 1, TEST_MODEL_ALIKE = 3, TEST_MODEL_SHARE = 1 };
#endif

enum { TEST_GUARD_BYTES = 64, TEST_POISON = 0xFF }; /* 0xFF.. is NaN in every float dtype */

/* ---- backends ---- */

/* Of the environment, a list with commas; without it all. */
static inline bool test_wants(const char *name) {
    const char *wanted = getenv("CADRE_TEST_BACKENDS");
    if (!wanted || !*wanted)
        return true;
    size_t length = strlen(name);
    for (const char *at = wanted; (at = strstr(at, name)) != NULL; at += length)
        if ((at == wanted || at[-1] == ',') && (at[length] == 0 || at[length] == ','))
            return true;
    return false;
}

/* The CUDA device, or NULL: not in this build, or not on this machine. */
static inline const struct device *test_cuda(void) {
    static const struct device *device;
    static bool asked;
    if (!asked) {
        setenv("CUDA_LAUNCH_BLOCKING", "1", 1);
        if (device_choose("cuda", &device) != STATUS_OK)
            device = NULL;
    }
    asked = true;
    return device;
}

static inline bool test_is_cuda(const struct kernel_ops *ops) {
    return strncmp(ops->name, "cuda", 4) == 0;
}

/* Every backend that runs here and is wanted, NULL at the end. */
static inline const struct kernel_ops *const *test_backends(void) {
    enum { MOST = 16 };
    static const struct kernel_ops *list[MOST + 1];
    int count = 0;
    for (const char *const *name = kernels_available(); *name; name++)
        if (test_wants(*name) && count < MOST && kernels_choose(*name, &list[count]) == STATUS_OK)
            count++;
    const char *of_device = getenv("CADRE_TEST_KERNELS") ? getenv("CADRE_TEST_KERNELS") : "cuda"; /* or another */
    if (test_cuda() && test_wants("cuda") && count < MOST && kernels_choose_for(test_cuda(), of_device, &list[count]) == STATUS_OK)
        count++;
    list[count] = NULL;
    if (count == 0) { /* not a test that passes */
        fprintf(stderr, "no backend that CADRE_TEST_BACKENDS names runs here; %s\n", status_text());
        exit(1);
    }
    return list;
}

/* How often a case is run: with every number of threads, or twice where there are none; on the slow model mostly once. The bits
 * are the same each time. Ask once a case. */
static inline int test_repetitions(const struct kernel_ops *ops, int threads_max) {
#ifdef CADRE_CUDA_MODEL
    static int cases;
    if (test_is_cuda(ops))
        return cases++ % 8 == 0 ? 2 : 1;
#endif
    return test_is_cuda(ops) ? 2 : threads_max;
}

/* Whether the backend gets the case of that number: the model of a device is slow, and gets one of `share`. They are drawn: cases
 * come in twos and threes, and of each kind it is to get some. */
static inline bool test_takes_one_of(const struct kernel_ops *ops, int64_t number, int share) {
    return strcmp(ops->name, "cudamodel") != 0 || random_bits(9, 0, (uint64_t)number) % (uint64_t)share == 0;
}

/* Of many cases that are alike. */
static inline bool test_takes(const struct kernel_ops *ops, int64_t number) {
    return test_takes_one_of(ops, number, TEST_MODEL_ALIKE);
}

/* Of a device, f64 is for sums only. */
static inline bool test_knows(const struct kernel_ops *ops, enum dtype dtype) {
    return dtype != DTYPE_F64 || !test_is_cuda(ops);
}

/* ---- tensors ---- */

struct test_block {
    struct test_block *next;
    unsigned char *memory;
    size_t before, bytes; /* guard bytes before the data, bytes of data; TEST_GUARD_BYTES follow */
};

static struct test_block *test_blocks;
static uint64_t test_seed; /* grows with every tensor, so that no two are alike */
static bool test_aligned;  /* tensors lie at multiples of 16, as those of an arena, and not anywhere */

/* Memory that all backends reach, zeroed or not. From the device's in pieces that are never given back, else by malloc. */
enum { TEST_PIECES = 64, TEST_PIECE_BYTES = 64 << 20 };
static struct test_piece {
    char *base;
    size_t size, used;
} test_pieces[TEST_PIECES];

static inline bool test_memory_is_pool(void) {
#ifdef CADRE_CUDA
    return test_cuda() != NULL;
#else
    return false; /* the model reaches all memory */
#endif
}

static inline void *test_memory(size_t bytes) {
    if (!test_memory_is_pool())
        return memory_must(bytes, 1);
#if defined(CADRE_CUDA) || defined(CADRE_CUDA_MODEL)
    bytes = (bytes + 255) / 256 * 256;
    for (struct test_piece *piece = test_pieces; piece < test_pieces + TEST_PIECES; piece++) {
        if (!piece->base) {
            piece->size = bytes > TEST_PIECE_BYTES ? bytes : TEST_PIECE_BYTES;
            piece->base = device_cuda_host_memory(piece->size);
            CHECK(piece->base != NULL);
        }
        if (piece->size - piece->used < bytes)
            continue;
        piece->used += bytes;
        return piece->base + piece->used - bytes;
    }
#endif
    CHECK(!"memory for tests");
    return NULL;
}

/* 0xFFF5.. , a NaN in every float dtype: who reads beyond an operand does not stay unseen either. */
static inline unsigned char test_guard_byte(size_t i) {
    return i % 2 ? 0xFF : 0xF5;
}

/* Under the address sanitizer, guards may not even be touched. */
static inline void test_close_guards(const struct test_block *block, bool close) {
#ifdef __SANITIZE_ADDRESS__
    unsigned char *after = block->memory + block->before + block->bytes;
    if (close) {
        ASAN_POISON_MEMORY_REGION(block->memory, block->before);
        ASAN_POISON_MEMORY_REGION(after, TEST_GUARD_BYTES);
    } else {
        ASAN_UNPOISON_MEMORY_REGION(block->memory, block->before + block->bytes + TEST_GUARD_BYTES);
    }
#else
    (void)block, (void)close;
#endif
}

/* A tensor of the shape and dtype of `like` (whose data is ignored), poisoned, between guards. The data is
 * aligned to its elements only, unless test_aligned says more: a view of an odd row is no better. */
static inline struct tensor test_tensor(struct tensor like) {
    struct test_block *block = memory_must(1, sizeof *block);
    block->bytes = tensor_bytes(like);
    block->before = TEST_GUARD_BYTES + (test_aligned ? 0 : test_seed % 5 * dtype_size(like.dtype));
    test_seed++;
    size_t all_bytes = block->before + block->bytes + TEST_GUARD_BYTES;
    block->memory = test_memory(all_bytes);
    for (size_t i = 0; i < block->before; i++)
        block->memory[i] = test_guard_byte(i);
    memset(block->memory + block->before, TEST_POISON, block->bytes);
    for (size_t i = block->before + block->bytes; i < all_bytes; i++)
        block->memory[i] = test_guard_byte(i);
    test_close_guards(block, true);
    block->next = test_blocks;
    test_blocks = block;
    like.data = block->memory + block->before;
    return like;
}

static inline bool test_block_holds(const struct test_block *block) {
    bool hold = true;
    test_close_guards(block, false);
    for (size_t i = 0; i < block->before; i++)
        hold &= block->memory[i] == test_guard_byte(i);
    for (size_t i = block->before + block->bytes, end = i + TEST_GUARD_BYTES; i < end; i++)
        hold &= block->memory[i] == test_guard_byte(i);
    test_close_guards(block, true);
    return hold;
}

/* True while nobody wrote outside of any tensor. */
static inline bool test_guards_hold(void) {
    for (const struct test_block *block = test_blocks; block; block = block->next)
        if (!test_block_holds(block))
            return false;
    return true;
}

static inline void test_release(void) {
    while (test_blocks) {
        struct test_block *block = test_blocks;
        test_blocks = block->next;
        test_close_guards(block, false);
        if (!test_memory_is_pool())
            free(block->memory);
        free(block);
    }
    for (struct test_piece *piece = test_pieces; piece < test_pieces + TEST_PIECES; piece++)
        piece->used = 0;
}

static inline struct tensor test_filled(struct tensor like, double value) {
    struct tensor t = test_tensor(like);
    for (int64_t i = 0, count = tensor_elements(t); i < count; i++)
        test_set(t, i, value);
    return t;
}

/* These numbers. */
static inline struct tensor test_numbers(const void *numbers, enum dtype dtype, int64_t count) {
    struct tensor t = test_tensor(tensor_1d(NULL, dtype, count));
    if (count > 0)
        memcpy(t.data, numbers, tensor_bytes(t));
    return t;
}

/* The same numbers in another dtype; integers stay integers. */
static inline struct tensor test_copy(struct tensor from, enum dtype dtype) {
    struct tensor like = from;
    like.dtype = from.dtype == DTYPE_I32 ? DTYPE_I32 : dtype;
    struct tensor t = test_tensor(like);
    int64_t count = tensor_elements(t);
    if (t.dtype == from.dtype && count > 0)
        memcpy(t.data, from.data, tensor_bytes(t));
    for (int64_t i = 0; t.dtype != from.dtype && i < count; i++)
        test_set(t, i, test_get(from, i));
    return t;
}

/* Normal numbers times scale. */
static inline struct tensor test_random(struct tensor like, double scale) {
    struct tensor t = test_tensor(like);
    for (int64_t i = 0, count = tensor_elements(t); i < count; i++)
        test_set(t, i, scale * random_normal(7, test_seed, (uint64_t)i));
    return t;
}

/* i32 numbers in 0..limit-1. */
static inline struct tensor test_indices(struct tensor like, int64_t limit) {
    struct tensor t = test_tensor(like);
    for (int64_t i = 0, count = tensor_elements(t); i < count; i++)
        test_set(t, i, (double)(random_bits(8, test_seed, (uint64_t)i) % (uint64_t)limit));
    return t;
}

/* Table of the rotary angles: [positions, P], cosines then sines. */
static inline struct tensor test_rotary_table(enum dtype dtype, int64_t positions, int64_t head_dim) {
    struct tensor t = test_tensor(tensor_2d(NULL, dtype, positions, head_dim));
    for (int64_t i = 0; i < positions; i++)
        for (int64_t j = 0; j < head_dim / 2; j++) {
            double angle = (double)i * pow(10000, -2.0 * (double)j / (double)head_dim);
            test_set(t, i * head_dim + j, cos(angle));
            test_set(t, i * head_dim + head_dim / 2 + j, sin(angle));
        }
    return t;
}

/* How N rows fall on E groups. */
enum test_spread { SPREAD_EVEN, SPREAD_RANDOM, SPREAD_HALF_EMPTY, SPREAD_ONE_HAS_ALL, SPREAD_COUNT };

static inline int64_t test_group_of_row(enum test_spread spread, int64_t r, int64_t groups) {
    uint64_t random = random_bits(9, test_seed, (uint64_t)r);
    switch (spread) {
    case SPREAD_EVEN:
        return r % groups;
    case SPREAD_RANDOM:
        return (int64_t)(random % (uint64_t)groups);
    case SPREAD_HALF_EMPTY:
        return (int64_t)(random % (uint64_t)groups) / 2 * 2;
    default:
        return groups / 2;
    }
}

/* w packed by a backend, in memory that test_release gives back. */
static inline struct packed test_packed_as(const struct kernel_ops *ops, struct tensor w, enum dtype dtype, bool backward) {
    int first = w.dim_count == 3;
    struct packed packed = {.dtype = dtype, .groups = first ? w.shape[0] : 1, .out = w.shape[first],
                            .in = w.shape[first + 1], .backward = backward};
    packed.data = test_tensor(tensor_1d(NULL, DTYPE_F64, (int64_t)(ops->packed_bytes(packed) + 7) / 8 + 8)).data;
    packed.data = (char *)packed.data + (64 - (uintptr_t)packed.data % 64) % 64;
    ops->pack(w, packed);
    return packed;
}

static inline struct packed test_packed(const struct kernel_ops *ops, struct tensor w, bool backward) {
    return test_packed_as(ops, w, w.dtype, backward);
}

/* i32 [groups+1] offsets of row_count rows. */
static inline struct tensor test_offsets(enum test_spread spread, int64_t row_count, int64_t groups) {
    struct tensor t = test_filled(tensor_1d(NULL, DTYPE_I32, groups + 1), 0);
    int32_t *offset = t.data;
    for (int64_t r = 0; r < row_count; r++)
        offset[test_group_of_row(spread, r, groups) + 1]++;
    for (int64_t e = 0; e < groups; e++)
        offset[e + 1] += offset[e];
    return t;
}
