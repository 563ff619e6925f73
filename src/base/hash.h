/* Fast hashes of bytes, for finding damage and naming caches; not for secrets. XXH3-64. */
#pragma once

#include <stddef.h>
#include <stdint.h>

uint64_t hash_bytes(const void *data, size_t size, uint64_t seed);
