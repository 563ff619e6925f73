/* The ranks of a run: its mesh, and a communicator for every group of ranks that exchange something.
 *
 * A transfer runs in the smallest group that needs it: pieces of dense parameters between the ranks of shard and expert
 * together, rows of tokens along the expert axis, sums between replicas along replicate. What crosses islands is
 * parallel/outer.h's, and goes between ranks that have the same place in theirs.
 */
#pragma once

#include "comm/on_device/on_device.h"
#include "tensor/mesh.h"

enum {
    RANKS_SHARD_AXES = MESH_BIT(MESH_SHARD) | MESH_BIT(MESH_EXPERT),
    RANKS_BATCH_AXES = RANKS_SHARD_AXES | MESH_BIT(MESH_REPLICATE),
};

struct ranks {
    struct mesh mesh;
    struct comm *world;   /* borrowed */
    struct comm batch;    /* all that share a batch: one island */
    struct comm shards;   /* those that a replica's parameters are divided over */
    struct comm replicas; /* those that own the same part */
    struct comm experts;  /* those that a block's experts are divided over */
    struct comm islands;  /* those of the same place in all islands */
};

/* Collective. The world, for the processor's memory, must have as many ranks as the mesh, and stay until ranks_close. memory: where
 * the tensors are that the groups exchange. */
enum status ranks_open(struct ranks *ranks, const struct mesh *mesh, struct comm *world, struct comm_memory memory) MUST_USE;
void ranks_close(struct ranks *ranks);

/* After a failure of this island alone, with something under way to the others, who will not end it: the communicator is the
 * caller's, to be kept with the buffers until the process ends. */
struct comm ranks_leave_islands(struct ranks *ranks);

/* One process; nothing to close. `world` is a comm_self that the caller keeps. */
struct ranks ranks_single(struct comm *world);

/* Sent by this rank so far within its island, through all of its communicators but the world's. */
int64_t ranks_sent_bytes(const struct ranks *ranks);
