#include "base/hash.h"

#include "base/hash_avx2.h"
#define XXH_INLINE_ALL
#include <stdbool.h>
#include <xxhash.h>

/* XXH3 is the same with every instruction set; wider ones are twice as fast. */
static bool has_avx2(void) {
#ifdef CADRE_HASH_AVX2
    return __builtin_cpu_supports("avx2");
#else
    return false;
#endif
}

uint64_t hash_bytes_plain(const void *data, size_t size, uint64_t seed) {
    return XXH3_64bits_withSeed(data, size, seed);
}

uint64_t hash_bytes(const void *data, size_t size, uint64_t seed) {
    bool wide = size > HASH_SHORT_BYTES && has_avx2();
    return wide ? hash_bytes_avx2(data, size, seed) : hash_bytes_plain(data, size, seed);
}

void hash_blocks(const void *data, size_t size, uint64_t *hashes) {
    for (size_t done = 0; done < size; done += HASH_BLOCK_BYTES)
        *hashes++ = hash_bytes((const char *)data + done, size - done < HASH_BLOCK_BYTES ? size - done : HASH_BLOCK_BYTES, 0);
}

uint64_t *known_hashes_at(const struct known_hashes *known, const void *data) {
    uintptr_t at = (uintptr_t)data, base = known ? (uintptr_t)known->base : 0;
    if (!known || at < base || (at - base) / HASH_BLOCK_BYTES >= known->block_count)
        return NULL;
    return &known->items[(at - base) / HASH_BLOCK_BYTES];
}
