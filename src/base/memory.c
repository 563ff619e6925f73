#include "base/memory.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <sys/mman.h>
#include <sys/resource.h>

static const size_t LARGE_PAGE_BYTES = (size_t)2 << 20;

enum status memory_alloc(void *out, size_t count, size_t size) {
    void *memory = calloc(count ? count : 1, size ? size : 1);
    if (!memory)
        return status_fail(STATUS_MEMORY, "no memory for %zu x %zu bytes", count, size);
    memcpy(out, &memory, sizeof memory);
    return STATUS_OK;
}

enum status memory_resize(void *inout, size_t count, size_t size) {
    void *memory;
    memcpy(&memory, inout, sizeof memory);
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes))
        return status_fail(STATUS_MEMORY, "no memory for %zu x %zu bytes", count, size);
    void *fresh = realloc(memory, bytes ? bytes : 1);
    if (!fresh)
        return status_fail(STATUS_MEMORY, "no memory for %zu bytes", bytes);
    memcpy(inout, &fresh, sizeof fresh);
    return STATUS_OK;
}

void *memory_must(size_t count, size_t size) {
    void *memory = calloc(count ? count : 1, size ? size : 1);
    CHECK(memory != NULL);
    return memory;
}

char *memory_copy_string(const char *text) {
    size_t bytes = strlen(text) + 1;
    return memcpy(memory_must(bytes, 1), text, bytes);
}

size_t memory_peak_bytes(void) {
    struct rusage usage;
    if (getrusage(RUSAGE_SELF, &usage) != 0)
        return 0;
    return (size_t)usage.ru_maxrss * 1024; /* Linux counts kilobytes */
}

void memory_return_freed(void) {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

enum status memory_alloc_large_pages(void *out, size_t bytes) {
    size_t whole = (bytes / LARGE_PAGE_BYTES + (bytes % LARGE_PAGE_BYTES > 0 || bytes == 0)) * LARGE_PAGE_BYTES;
    void *memory = whole >= bytes ? aligned_alloc(LARGE_PAGE_BYTES, whole) : NULL;
    if (!memory)
        return status_fail(STATUS_MEMORY, "no memory for %zu bytes", bytes);
    madvise(memory, whole, MADV_HUGEPAGE); /* only a hint */
    memcpy(out, &memory, sizeof memory);
    return STATUS_OK;
}
