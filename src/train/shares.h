/* Which bytes of a checkpoint's tensors this rank writes: every byte of it is one rank's.
 *
 * The files are those of train/parts.h. A tensor lies on ranks as its row of the parameter table says
 * (model/sharding.h). Those that hold the same rows of it write equal parts of them, so that replicas share the work,
 * and islands that of what is the same on all of them. Index arithmetic only. Not collective.
 */
#pragma once

#include "checkpoint/sharded.h"
#include "train/parts.h"

struct shares {
    struct sharded_set set;            /* the files of all parts; of all islands */
    struct named_tensor *items;        /* of the set */
    struct sharded_stretch *stretches; /* [count] sorted; in the model's memory, and the files' headers on rank 0 */
    int count;
    uint64_t bytes; /* of all stretches */
};

/* outer: of a run with islands, else NULL; only its global and momentum are looked at. rounded: the model's file is in
 * bf16. file_bytes: see sharded_add. Borrows model and outer. Release with shares_release, also after a failure. */
enum status shares_init(struct shares *shares, const struct model *model, const struct outer *outer, bool rounded,
                        uint64_t file_bytes) MUST_USE;
void shares_release(struct shares *shares);
