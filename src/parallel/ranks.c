#include "parallel/ranks.h"

enum status ranks_open(struct ranks *ranks, const struct mesh *mesh, struct comm *world) {
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
        enum status status = world->ops->split(world, mesh_group_color(mesh, groups[i].axes), groups[i].comm);
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
    return ranks->batch.count.sent_bytes + ranks->shards.count.sent_bytes + ranks->replicas.count.sent_bytes +
           ranks->experts.count.sent_bytes;
}
