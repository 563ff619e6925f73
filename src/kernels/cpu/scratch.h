/* Scratch memory of the cpu kernels: two blocks for every thread, kept from call to call, growing to the largest
 * amount asked for.
 *
 *  - scratch_call belongs to the operation that the thread is in, until that operation returns;
 *  - scratch_task belongs to the parallel_for task that the thread is in, until that task ends.
 *
 * They are apart because the thread that calls an operation also runs some of its tasks. A block is asked for once per
 * operation or task: a second request takes the first one's memory away. Threads that end give theirs back.
 */
#pragma once

#include <stddef.h>

/* At least `bytes`, aligned to 64, contents undefined. Aborts where there is no memory. */
void *scratch_call(size_t bytes);
void *scratch_task(size_t bytes);

/* Bytes that all threads hold now. */
size_t scratch_bytes(void);
