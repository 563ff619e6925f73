/* What the kernel tests share: tensors between guard bytes, numbers of several kinds, ragged groups.
 *
 * All memory comes from one pool of the test program; test_release gives everything back at once.
 */
#pragma once

#include "base/memory.h"
#include "base/random.h"
#include "kernels/kernels.h"
#include "tensor/tensor_testing.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

enum { TEST_GUARD_BYTES = 64, TEST_POISON = 0xFF }; /* 0xFF.. is NaN in every float dtype */

struct test_block {
    struct test_block *next;
    unsigned char *memory;
    size_t before, bytes; /* guard bytes before the data, bytes of data; TEST_GUARD_BYTES follow */
};

static struct test_block *test_blocks;
static uint64_t test_seed; /* grows with every tensor, so that no two are alike */

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
 * aligned to its elements only: a view of an odd row is no better. */
static inline struct tensor test_tensor(struct tensor like) {
    struct test_block *block = memory_must(1, sizeof *block);
    block->bytes = tensor_bytes(like);
    block->before = TEST_GUARD_BYTES + test_seed++ % 5 * dtype_size(like.dtype);
    size_t all_bytes = block->before + block->bytes + TEST_GUARD_BYTES;
    block->memory = memory_must(all_bytes, 1);
    for (size_t i = 0; i < all_bytes; i++)
        block->memory[i] = test_guard_byte(i);
    memset(block->memory + block->before, TEST_POISON, block->bytes);
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
        free(block->memory);
        free(block);
    }
}

static inline struct tensor test_filled(struct tensor like, double value) {
    struct tensor t = test_tensor(like);
    for (int64_t i = 0; i < tensor_elements(t); i++)
        test_set(t, i, value);
    return t;
}

/* The same numbers in another dtype; integers stay integers. */
static inline struct tensor test_copy(struct tensor from, enum dtype dtype) {
    struct tensor like = from;
    like.dtype = from.dtype == DTYPE_I32 ? DTYPE_I32 : dtype;
    struct tensor t = test_tensor(like);
    for (int64_t i = 0; i < tensor_elements(t); i++)
        test_set(t, i, test_get(from, i));
    return t;
}

/* Normal numbers times scale. */
static inline struct tensor test_random(struct tensor like, double scale) {
    struct tensor t = test_tensor(like);
    for (int64_t i = 0; i < tensor_elements(t); i++)
        test_set(t, i, scale * random_normal(7, test_seed, (uint64_t)i));
    return t;
}

/* i32 numbers in 0..limit-1. */
static inline struct tensor test_indices(struct tensor like, int64_t limit) {
    struct tensor t = test_tensor(like);
    for (int64_t i = 0; i < tensor_elements(t); i++)
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
static inline struct packed test_packed(const struct kernel_ops *ops, struct tensor w, bool backward) {
    int first = w.dim_count == 3;
    struct packed packed = {.dtype = w.dtype, .groups = first ? w.shape[0] : 1, .out = w.shape[first],
                            .in = w.shape[first + 1], .backward = backward};
    packed.data = test_tensor(tensor_1d(NULL, DTYPE_F64, (int64_t)(ops->packed_bytes(packed) + 7) / 8 + 8)).data;
    packed.data = (char *)packed.data + (64 - (uintptr_t)packed.data % 64) % 64;
    ops->pack(w, packed);
    return packed;
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
