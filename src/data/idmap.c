#include "data/idmap.h"

#include "base/memory.h"
#include <stdlib.h>
#include <string.h>

static const uint64_t EMPTY = UINT64_MAX;

void idmap_init(struct idmap *map) {
    *map = (struct idmap){.capacity = 64};
    map->keys = memory_must(map->capacity, sizeof *map->keys);
    map->values = memory_must(map->capacity, sizeof *map->values);
    memset(map->keys, 0xFF, map->capacity * sizeof *map->keys);
}

void idmap_release(struct idmap *map) {
    free(map->keys);
    free(map->values);
    *map = (struct idmap){0};
}

/* The place of a key, or the empty one where it would go. */
static size_t probe(const struct idmap *map, uint64_t key) {
    uint64_t mixed = (key ^ key >> 31) * UINT64_C(0x9E3779B97F4A7C15);
    size_t place = (mixed ^ mixed >> 29) & (map->capacity - 1);
    while (map->keys[place] != key && map->keys[place] != EMPTY)
        place = (place + 1) & (map->capacity - 1);
    return place;
}

static void grow(struct idmap *map) {
    struct idmap larger = {.capacity = map->capacity * 2, .count = map->count};
    larger.keys = memory_must(larger.capacity, sizeof *larger.keys);
    larger.values = memory_must(larger.capacity, sizeof *larger.values);
    memset(larger.keys, 0xFF, larger.capacity * sizeof *larger.keys);
    for (size_t i = 0; i < map->capacity; i++) {
        if (map->keys[i] == EMPTY)
            continue;
        size_t place = probe(&larger, map->keys[i]);
        larger.keys[place] = map->keys[i];
        larger.values[place] = map->values[i];
    }
    idmap_release(map);
    *map = larger;
}

uint64_t *idmap_at(struct idmap *map, uint64_t key, uint64_t initial) {
    CHECK(key != EMPTY);
    if (2 * (map->count + 1) > map->capacity)
        grow(map);
    size_t place = probe(map, key);
    if (map->keys[place] == EMPTY) {
        map->keys[place] = key;
        map->values[place] = initial;
        map->count++;
    }
    return &map->values[place];
}

const uint64_t *idmap_find(const struct idmap *map, uint64_t key) {
    size_t place = probe(map, key);
    return map->keys[place] == EMPTY ? NULL : &map->values[place];
}
