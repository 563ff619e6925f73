/* The tensors of a model directory: model.safetensors, or, where that is not there, the shards that
 * model.safetensors.index.json names (the order in which transformers looks too). */
#pragma once

#include "checkpoint/safetensors.h"

struct weights_name {
    const char *name; /* the entry's */
    int file, entry;
};

struct weights {
    struct safetensors *files;
    int file_count;
    struct weights_name *names; /* of all files, sorted */
    int name_count;
    char *directory;
};

/* Open all files of a directory. An index must name plain files beside it and each tensor where it is; a tensor that
 * stands in two of them is refused. STATUS_NOT_FOUND where there is neither file nor index. */
enum status weights_open(struct weights *weights, const char *directory) MUST_USE;

/* The same of STEM.safetensors or STEM.safetensors.index.json. */
enum status weights_open_stem(struct weights *weights, const char *directory, const char *stem) MUST_USE;
void weights_close(struct weights *weights);

/* The file and entry of a name; NULL where there is none. A caller that reads it by itself sets the entry's `used`. */
struct safetensors_entry *weights_find(const struct weights *weights, const char *name,
                                       const struct safetensors **file);

/* Copy the tensors of a file into those of a device, converting dtypes: each item must be there with the shape of its
 * whole; of one that is held in part only those rows are read. Marks what it took, also where no row is held. */
enum status weights_fill(struct weights *weights, const struct named_tensor *items, int count,
                         const struct device *device) MUST_USE;

/* Name of a tensor that nobody took; NULL where all were. Buffers that some writers add (rotary frequencies) do not
 * count. */
const char *weights_first_unused(const struct weights *weights);

/* That it holds exactly these items, with the shapes of their wholes, in exactly these dtypes. Reads no data. */
enum status weights_check_exactly(struct weights *weights, const struct named_tensor *items, int count) MUST_USE;

/* Fill from what holds exactly these items: what a run resumes from bit by bit. */
enum status weights_fill_exactly(struct weights *weights, const struct named_tensor *items, int count,
                                 const struct device *device) MUST_USE;

/* The same from one file, as safetensors_write left it. */
enum status safetensors_fill(const char *path, const struct named_tensor *items, int count,
                             const struct device *device) MUST_USE;
