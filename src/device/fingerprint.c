#include "device/fingerprint.h"

#include "base/hash.h"
#include "base/threads.h"
#include <stdatomic.h>

enum { CHUNK_BYTES = 64 << 10 };

struct fingerprint {
    const struct device *device;
    const char *data;
    size_t bytes;
    _Atomic uint64_t sum; /* of the chunks' hashes, each seeded with its number: in any order the same */
};

static void add_chunk(void *context, int64_t index) {
    struct fingerprint *f = context;
    char chunk[CHUNK_BYTES];
    size_t begin = (size_t)index * CHUNK_BYTES, left = f->bytes - begin;
    size_t size = left < CHUNK_BYTES ? left : CHUNK_BYTES;
    f->device->copy_to_host(chunk, f->data + begin, size);
    atomic_fetch_add(&f->sum, hash_bytes(chunk, size, (uint64_t)index));
}

uint64_t device_fingerprint(const struct device *device, const void *data, size_t bytes) {
    struct fingerprint f = {device, data, bytes, 0};
    parallel_for((int64_t)((bytes + CHUNK_BYTES - 1) / CHUNK_BYTES), add_chunk, &f);
    uint64_t parts[] = {f.sum, bytes};
    return hash_bytes(parts, sizeof parts, 0);
}
