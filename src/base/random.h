/* Random numbers by counter: a number depends on (seed, stream, index) and on nothing else, so that any thread, rank or
 * resumed run can ask for the same one. Philox 4x32-10. Source: Salmon et al., SC 2011, "Parallel random numbers". */
#pragma once

#include <stdint.h>

/* 64 random bits. */
uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t index);

/* Uniform in [0, 1), 53 bits. */
double random_uniform(uint64_t seed, uint64_t stream, uint64_t index);

/* Standard normal. */
double random_normal(uint64_t seed, uint64_t stream, uint64_t index);

/* Position of `index` in a seeded permutation of 0..count-1, in constant memory.
 * Requires index < count. A Feistel network over the next power of four, walked until it lands inside. */
uint64_t random_permute(uint64_t seed, uint64_t stream, uint64_t count, uint64_t index);

/* A 64-bit hash of a string, for naming streams. Stable across versions: checkpoints depend on it. */
uint64_t random_stream(const char *name);
