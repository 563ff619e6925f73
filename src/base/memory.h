/* Host memory for small, named things. Tensor memory comes from device/. */
#pragma once

#include "base/status.h"
#include <stddef.h>

/* Zeroed memory for count elements of size bytes; *out must be a pointer variable. Fails with STATUS_MEMORY, also when
 * count * size overflows. The caller frees with free(). */
enum status memory_alloc(void *out, size_t count, size_t size) MUST_USE;

/* Resize *inout to count elements of size bytes, contents kept, new bytes undefined; on failure it stays as it was. */
enum status memory_resize(void *inout, size_t count, size_t size) MUST_USE;

/* As memory_alloc, for sizes that the program itself bounds to something small; aborts where there is none left. */
void *memory_must(size_t count, size_t size);

/* Copy of a string; aborts where no memory is left. The caller frees it. */
char *memory_copy_string(const char *text);

/* Ask the system for large pages for memory that is about to be written the first time; only a hint. With small ones that
 * first time, and every way of the memory to a disk, costs as much as copying it. */
void memory_want_large_pages(void *data, size_t bytes);

/* Peak resident size of this process so far, bytes; 0 where the system does not tell. */
size_t memory_peak_bytes(void);

/* Give freed memory back to the system where the C library can: after a stage that needed much and is over. */
void memory_return_freed(void);
