#include "parallel/ranks.h"

static enum status open_group(struct comm *world, int color, struct comm_memory memory, struct comm *out) {
    TRY(world->ops->split(world, color, out));
    return memory.device ? comm_on_device(out, memory) : STATUS_OK;
}

/* Between islands there may be a slow link: what waits for one must not occupy a device. */
static struct comm_memory memory_for(struct comm_memory memory, unsigned axes) {
    if (axes == MESH_BIT(MESH_ISLAND))
        memory.way = COMM_WAY_HOST;
    return memory;
}

enum status ranks_open(struct ranks *ranks, const struct mesh *mesh, struct comm *world, struct comm_memory memory) {
    CHECK_OP(mesh_rank_count(mesh), ==, world->size);
    CHECK_OP(mesh_rank(mesh), ==, world->rank);
    *ranks = (struct ranks){.mesh = *mesh, .world = world};
    const struct {
        struct comm *comm;
        unsigned axes;
    } groups[] = {
        {&ranks->batch, RANKS_BATCH_AXES},
        {&ranks->shards, RANKS_SHARD_AXES},
        {&ranks->replicas, MESH_BIT(MESH_REPLICATE)},
        {&ranks->experts, MESH_BIT(MESH_EXPERT)},
        {&ranks->islands, MESH_BIT(MESH_ISLAND)},
    };
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++) {
        enum status status = open_group(world, mesh_group_color(mesh, groups[i].axes), memory_for(memory, groups[i].axes),
                                        groups[i].comm);
        if (status != STATUS_OK) {
            ranks_close(ranks);
            return status;
        }
        CHECK_OP(groups[i].comm->rank, ==, mesh_group_rank(mesh, groups[i].axes));
    }
    return STATUS_OK;
}

void ranks_close(struct ranks *ranks) {
    comm_release(&ranks->islands);
    comm_release(&ranks->experts);
    comm_release(&ranks->replicas);
    comm_release(&ranks->shards);
    comm_release(&ranks->batch);
    *ranks = (struct ranks){0};
}

struct comm ranks_leave_islands(struct ranks *ranks) {
    struct comm islands = ranks->islands;
    ranks->islands = (struct comm){0};
    return islands;
}

struct ranks ranks_single(struct comm *world) {
    return (struct ranks){mesh_single(), world, comm_self(), comm_self(), comm_self(), comm_self(), comm_self()};
}

int64_t ranks_sent_bytes(const struct ranks *ranks) {
    return comm_sent_bytes(&ranks->batch) + comm_sent_bytes(&ranks->shards) + comm_sent_bytes(&ranks->replicas) +
           comm_sent_bytes(&ranks->experts);
}
