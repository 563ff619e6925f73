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

/* Memory for much that comes from a disk or goes there, in large pages where the system has them, and aligned to them; not
 * zeroed. In small ones to touch it the first time, and every way between it and a disk, costs as much as copying it. *out
 * must be a pointer variable; the caller frees with free(). */
enum status memory_alloc_large_pages(void *out, size_t bytes) MUST_USE;

/* Peak resident size of this process so far, bytes; 0 where the system does not tell. */
size_t memory_peak_bytes(void);

/* Give freed memory back to the system where the C library can: after a stage that needed much and is over. */
void memory_return_freed(void);
