/* hash_bytes with the instructions that every processor has, and with AVX2 for those that have it. For hash.c and its test. */
#pragma once

#include <stddef.h>
#include <stdint.h>

enum { HASH_SHORT_BYTES = 240 }; /* up to here XXH3 uses no vectors */

uint64_t hash_bytes_plain(const void *data, size_t size, uint64_t seed);
uint64_t hash_bytes_avx2(const void *data, size_t size, uint64_t seed);
