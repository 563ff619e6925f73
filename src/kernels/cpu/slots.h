/* Scratch memory for tasks that need several rows or blocks at once: for each thread a few buffers that grow to the
 * largest size asked for and stay. */
#pragma once

#include <stddef.h>

enum slot { SLOT_A, SLOT_B, SLOT_C, SLOT_D, SLOT_E, SLOT_F, SLOT_G, SLOT_COUNT };

/* At least `bytes`, 64-byte aligned, contents undefined; the calling thread's own until it asks for the slot again.
 * Aborts where there is no memory: sizes are bounded by block sizes and widths. */
void *slot_take(enum slot slot, size_t bytes);

/* Held by all threads together, bytes. */
size_t slots_held_bytes(void);
