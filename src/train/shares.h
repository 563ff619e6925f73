/* Which bytes of a checkpoint's tensors this rank writes: every byte of it is one rank's.
 *
 * A tensor lies on ranks as its row of the parameter table says (model/sharding.h). Those that hold the same rows of it write
 * equal parts of them, so that replicas share the work. Index arithmetic only. Not collective.
 */
#pragma once

#include "checkpoint/sharded.h"
#include "model/model.h"

struct shares {
    struct sharded_set set;     /* model.safetensors (weights, f32) and training/optimizer.safetensors (moments, f32) */
    struct named_tensor *items; /* of the set */
    struct sharded_stretch *stretches; /* [count] sorted; in the model's memory, and the files' headers on rank 0 */
    int count;
    uint64_t bytes; /* of all stretches */
};

/* file_bytes: see sharded_add. Borrows the model. Release with shares_release, also after a failure. */
enum status shares_init(struct shares *shares, const struct model *model, uint64_t file_bytes) MUST_USE;
void shares_release(struct shares *shares);
