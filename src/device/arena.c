#include "device/device.h"

enum { ALIGNMENT = 64 };

void arena_init_counting(struct arena *arena) {
    *arena = (struct arena){0};
}

enum status arena_init(struct arena *arena, const struct device *device, size_t size) {
    *arena = (struct arena){.device = device, .size = size};
    void *base = NULL;
    if (size)
        TRY(device->alloc(&base, size));
    arena->base = base;
    return STATUS_OK;
}

void arena_release(struct arena *arena) {
    if (arena->device && arena->base)
        arena->device->release(arena->base, arena->size);
    *arena = (struct arena){0};
}

static size_t align(size_t value, size_t to) {
    return (value + to - 1) / to * to;
}

static void *take_at(struct arena *arena, size_t begin, size_t bytes) {
    size_t end = begin + align(bytes, ALIGNMENT);
    if (arena->device)
        CHECK_OP(end, <=, arena->size);
    arena->used = end;
    if (end > arena->peak)
        arena->peak = end;
    return arena->device ? arena->base + begin : NULL;
}

void *arena_take(struct arena *arena, size_t bytes) {
    return take_at(arena, arena->used, bytes);
}

void *arena_take_blocks(struct arena *arena, size_t bytes) {
    return take_at(arena, bytes < ARENA_BLOCK_BYTES ? arena->used : align(arena->used, ARENA_BLOCK_BYTES), bytes);
}

void arena_rewind(struct arena *arena, size_t mark) {
    CHECK_OP(mark, <=, arena->used);
    arena->used = mark;
}
