/* Tensors that several processes write into the same files of a checkpoint draft, each the bytes that it holds.
 *
 * The files follow from the names, dtypes and shapes of the tensors alone: every process plans the same ones, and nothing in
 * them says which process wrote what, or how many there were. One process creates them in their full length; then each
 * writes its stretches, wherever they lie, hashes them from its own memory and flushes. The hashes of all go into the
 * manifest (checkpoint/publish.h). Nothing here is collective; the directory must be one that all processes see.
 */
#pragma once

#include "checkpoint/publish.h"
#include "checkpoint/safetensors.h"
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

/* Where a tensor begins. */
struct sharded_place {
    int file;
    uint64_t begin;
};

/* Files of safetensors, and the indices of those that are one of several. A zeroed struct is an empty set. */
struct sharded_set {
    struct safetensors_plan *plans; /* [file_count] */
    char **names;                   /* [file_count] below the checkpoint */
    int file_count;
    struct sharded_place *places; /* [place_count] of all tensors, in the order in which they were added */
    int place_count;
    char **index_names, **index_texts; /* [index_count] */
    int index_count;
};

/* Add tensors: to STEM.safetensors or, where that would have more than file_bytes, to STEM-00001-of-0000N.safetensors and so
 * on, which STEM.safetensors.index.json lists. A file has at least one tensor. Only name, dtype and shape are looked at; the
 * items are borrowed until sharded_release, and differ in their names. */
enum status sharded_add(struct sharded_set *set, const char *stem, const struct named_tensor *items, int count,
                        uint64_t file_bytes) MUST_USE;
void sharded_release(struct sharded_set *set);

/* Bytes of all files. */
uint64_t sharded_bytes(const struct sharded_set *set);

/* Create the files below `root`, with nothing in them but zeros, and the indices. One process, before any writes. */
enum status sharded_create(const struct sharded_set *set, const char *root) MUST_USE;

/* Bytes that belong somewhere. */
struct sharded_stretch {
    int file;
    uint64_t begin, bytes; /* of the file */
    const void *data;
    bool rounded; /* data are f32, the file has them in bf16, to nearest even: two bytes of four */
};

/* Where byte `skip` of a stretch comes from. */
static inline const void *sharded_data(const struct sharded_stretch *stretch, uint64_t skip) {
    return (const char *)stretch->data + (stretch->rounded ? 2 * skip : skip);
}

/* Bytes skip .. skip+bytes-1 of a stretch, as they are in the file, into the host's memory. Of a rounded one both are
 * even. */
void sharded_fetch(const struct sharded_stretch *stretch, uint64_t skip, size_t bytes, const struct device *device,
                   char *to);

/* Sort by place and join neighbours that are neighbours in memory, too. Returns how many are left. */
int sharded_sort(struct sharded_stretch *stretches, int count);

/* The headers of all files, for the one process that writes them, into stretches [file_count]. */
void sharded_headers(const struct sharded_set *set, struct sharded_stretch *stretches);

/* Extents that were written. */
struct sharded_extents {
    struct checkpoint_extent *items; /* owned; file counts in the set */
    size_t count;
};

/* Lets another thread take away what is being written. It holds the mutex, copies all stretches from the byte at which the
 * writer stands to the host's memory, so that neighbours in a file are neighbours there, and sets moved; from then on the writer
 * reads there. What it was just writing from where it stood is among what is copied, and written once more. */
struct sharded_shelter {
    pthread_mutex_t mutex;
    int stretch; /* the writer needs what begins at byte `skip` of this one, and all after it */
    uint64_t skip;
    const struct sharded_stretch *moved; /* [count] the same stretches, elsewhere, none rounded; NULL: where they were */
};

/* How a share is written. */
struct sharded_way {
    const struct device *device; /* where the data of the stretches lie */
    const atomic_bool *cancel;   /* STATUS_INTERRUPTED soon after it is set */
    bool parallel;               /* by waiting_threads_count(), each with a buffer of 4 MiB; else by the caller alone, in order */
    const struct known_hashes *known; /* of the data's blocks, until they are sheltered; NULL: none */
    struct sharded_shelter *shelter; /* NULL: the data stay as they are. Not with parallel */
    enum status (*beside)(void *context); /* further work: by one of the threads, while the others write; NULL: none */
    void *beside_context;
};

/* Write and flush sorted stretches, which do not overlap those of any other process. extents is an empty list before; the
 * caller frees its items, always. Straight from memory, without a copy, what lies to the blocks of FILE_BLOCK_BYTES in memory as
 * in the file, and meets at blocks; nothing that is rounded does. */
enum status sharded_write(const struct sharded_set *set, const char *root, const struct sharded_stretch *stretches, int count,
                          struct sharded_way way, struct sharded_extents *extents) MUST_USE;
