/* A hash map from 64-bit keys to 64-bit values; open addressing, grows, never forgets. Keys other than UINT64_MAX. */
#pragma once

#include <stddef.h>
#include <stdint.h>

struct idmap {
    uint64_t *keys, *values;
    size_t capacity, count;
};

void idmap_init(struct idmap *map);
void idmap_release(struct idmap *map);

/* Place of a key's value; a fresh one holds `initial`. Borrowed until the next idmap_at. */
uint64_t *idmap_at(struct idmap *map, uint64_t key, uint64_t initial);

/* NULL where the key is not there. Safe from several threads while nobody adds. */
const uint64_t *idmap_find(const struct idmap *map, uint64_t key);
