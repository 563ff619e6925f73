/* Fast hashes of bytes, for finding damage and naming caches; not for secrets. XXH3-64. */
#pragma once

#include <stddef.h>
#include <stdint.h>

uint64_t hash_bytes(const void *data, size_t size, uint64_t seed);

/* hashes[i] = hash_bytes of block i, with seed 0; the last block may be shorter. */
enum { HASH_BLOCK_BYTES = 4096 };
void hash_blocks(const void *data, size_t size, uint64_t *hashes);

/* Hashes of the blocks of a piece of memory, as far as they are known: 0 where not. */
struct known_hashes {
    const char *base; /* aligned to a block */
    size_t block_count;
    uint64_t *items; /* [block_count] */
};
/* Where that of the block at `data` stands; NULL where nothing is known of it, or known is NULL. */
uint64_t *known_hashes_at(const struct known_hashes *known, const void *data);
