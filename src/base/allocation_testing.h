/* Counts every request for memory of a test program. Included by one file of it. */
#pragma once

#include <stdatomic.h>
#include <stdlib.h>

static atomic_long requests;

/* The C library's own allocation stands behind these names; a sanitizer has put its there already. */
#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
#define COUNTS_REQUESTS 1
extern void *__libc_malloc(size_t bytes);
extern void *__libc_calloc(size_t count, size_t bytes);
extern void *__libc_realloc(void *memory, size_t bytes);
extern void *__libc_memalign(size_t alignment, size_t bytes);

void *malloc(size_t bytes) {
    atomic_fetch_add(&requests, 1);
    return __libc_malloc(bytes);
}

void *calloc(size_t count, size_t bytes) {
    atomic_fetch_add(&requests, 1);
    return __libc_calloc(count, bytes);
}

void *realloc(void *memory, size_t bytes) {
    atomic_fetch_add(&requests, 1);
    return __libc_realloc(memory, bytes);
}

void *aligned_alloc(size_t alignment, size_t bytes) {
    atomic_fetch_add(&requests, 1);
    return __libc_memalign(alignment, bytes);
}
#else
#define COUNTS_REQUESTS 0
#endif
