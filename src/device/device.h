/* Where tensors live. Level 1: knows bytes, not tensors.
 *
 * An arena is one piece of device memory that is handed out front to back. The same code that takes tensors from an
 * arena can run over one without memory, which only counts: that is how the planner knows, without allocating, exactly
 * what a run will take.
 */
#pragma once

#include "base/status.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { ARENA_BLOCK_BYTES = 4096 };

/* Work that is asked for in the same way again and again is noted once and then repeated, which costs one request: on CUDA a graph.
 *
 * From begin to end what this thread asks of the device is noted and not done. All of it must be work in the device's order: who
 * waits, takes or gives back memory or copies from or to the processor meanwhile makes a mistake of ours. */
struct recording;
struct device_recorder {
    void (*begin)(void);
    struct recording *(*end)(void); /* NULL: what was noted can't be repeated; then nothing was done */
    /* All of it once more, in its order, with what it was asked with: the same addresses and numbers. False: it is out of date,
     * for scratch that it used has moved, and nothing was done. */
    bool (*repeat)(struct recording *recording);
    void (*release)(struct recording *recording); /* waits until it is not under way; NULL: nothing */
};

/* Work that is asked for again and again, and what became of it; all zero in the beginning. */
struct repeated {
    struct recording *recording; /* NULL: none yet */
    bool is_warm;                /* it was done once: kernels are loaded, scratch has its size */
    bool is_refused;             /* the device cannot record it */
};

/* Do what `ask` asks the device for, or repeat what it asked for in a former call: the first call runs it, the second records it
 * and later ones repeat that. A recording that is out of date is made anew; what a device cannot record is asked for each time. */
enum status device_repeat(const struct device_recorder *recorder, struct repeated *work, enum status (*ask)(void *context),
                          void *context) MUST_USE;
/* Gives back the recording; it is made again when it is wanted. */
void device_forget(const struct device_recorder *recorder, struct repeated *work);

/* A kind of memory and how to reach it. Plain functions; one constant struct a device. */
struct device {
    const char *name;
    enum status (*alloc)(void **out, size_t bytes); /* aligned to ARENA_BLOCK_BYTES, zeroed */
    void (*release)(void *data, size_t bytes);
    void (*copy_to_host)(void *host, const void *data, size_t bytes);
    void (*copy_from_host)(void *data, const void *host, size_t bytes);
    /* The same in the order of all that is asked of it, without waiting: `host` is of alloc_host and stays as it is until the
     * device is done. */
    void (*copy_from_host_later)(void *data, const void *host, size_t bytes);
    void (*copy_within)(void *to, const void *from, size_t bytes); /* in the order of all that is asked of it; waits for nothing */
    /* Memory of the processor that copies from and to the device are fastest with. */
    enum status (*alloc_host)(void **out, size_t bytes);
    void (*release_host)(void *data, size_t bytes);
    /* Waits until all that was asked of it is done; what went wrong in between ends the program with one line. */
    void (*finish)(void);
    const struct device_recorder *recorder; /* NULL: there would be nothing to win */
};

const struct device *device_cpu(void);

/* "cpu", or "cuda": of the CUDA devices that the system shows (CUDA_VISIBLE_DEVICES) the one of this process. Fails with
 * STATUS_USAGE where the program was built without CUDA and where the machine has no such device. */
enum status device_choose(const char *name, const struct device **out) MUST_USE;

/* The same for planning only: also one that this machine does not have, as long as the program has kernels for it. Nothing may be
 * asked of it but device_memory_bytes. */
enum status device_plan(const char *name, const struct device **out) MUST_USE;

/* Of several processes on this machine this is number `local_rank`: it takes the device of that number, or, where there are fewer,
 * shares one with others. Before device_choose; without, number 0. */
void device_set_local_rank(int local_rank);

/* What it is: "NVIDIA H100 80GB HBM3", or "cpu". */
const char *device_describe(const struct device *device);

/* Two processes get the same bytes where they use the same device, be they on one machine or on two. */
enum { DEVICE_ID_BYTES = 16 };
void device_identify(const struct device *device, unsigned char id[DEVICE_ID_BYTES]);

/* Of a device's own memory what each of `local_size` processes on this machine has, where they are dealt out as
 * device_set_local_rank says; bytes, 0 where it is the processor's. */
int64_t device_memory_bytes(const struct device *device, int local_size);

struct arena {
    const struct device *device; /* NULL: counts only, hands out NULL */
    char *base;
    size_t size, used, peak;
};

/* An arena that counts and hands out NULL pointers. Nothing to release. */
void arena_init_counting(struct arena *arena);

/* An arena of exactly `size` bytes on a device. Fails with STATUS_MEMORY. Release with arena_release. */
enum status arena_init(struct arena *arena, const struct device *device, size_t size) MUST_USE;
void arena_release(struct arena *arena);

/* The next `bytes`, aligned to 64. Taking more than the arena has is our own mistake: sizes come from a counting
 * pass. */
void *arena_take(struct arena *arena, size_t bytes);

/* The same, but what has a block or more begins at one: it can go to a disk and come from there without a copy (base/file.h). */
void *arena_take_blocks(struct arena *arena, size_t bytes);

/* Give back everything taken after `mark` (a former value of arena->used): scratch that the next step of a plan
 * reuses. */
void arena_rewind(struct arena *arena, size_t mark);
