#include "train/placement.h"

#include "parallel/layout_choice.h"
#include <stdio.h>
#include <unistd.h>

/* The mesh of an island, and the islands around it. */
static enum status choose_island(const struct layout_wishes *wishes, const struct layout_facts *facts, int islands,
                                 int rank, struct sharding *out) {
    TRY(layout_choose(wishes, facts, rank % facts->ranks, out));
    if (out->zero == 0 && islands > 1 && facts->ranks > 1) { /* each rank would send all of it to the other islands */
        struct layout_wishes divided = *wishes;
        if (wishes->zero == 0)
            return status_fail(STATUS_USAGE,
                               "layout.zero 0 has every rank of an island send the whole model to the other "
                               "islands; 1 divides that, or leave it out");
        divided.zero = 1;
        TRY(layout_choose(&divided, facts, rank % facts->ranks, out));
    }
    int size[MESH_AXIS_COUNT];
    for (int axis = 0; axis < MESH_AXIS_COUNT; axis++)
        size[axis] = out->mesh.size[axis];
    size[MESH_ISLAND] = islands;
    out->mesh = mesh_make(size, rank);
    return STATUS_OK;
}

static enum status check_rank_count(int ranks, int islands) {
    if (ranks % islands == 0)
        return STATUS_OK;
    int fewer = ranks / islands * islands;
    return status_fail(STATUS_USAGE, "%d rank%s cannot make diloco.replicas %d islands of the same size; start %d",
                       ranks, ranks == 1 ? "" : "s", islands, fewer > 0 ? fewer : islands);
}

enum status placement_choose(const struct run_config *c, struct placement_world world, struct sharding *out) {
    struct parameter_table table;
    int islands = (int)c->diloco.replicas;
    TRY(check_rank_count(world.rank_count, islands));
    struct layout_wishes wishes = {c->layout.replicate, c->layout.shard, c->layout.expert,
                                   c->layout.zero == LAYOUT_ZERO_AUTO ? LAYOUT_ZERO_CHOOSE
                                                                      : c->layout.zero - LAYOUT_ZERO_0};
    struct layout_facts facts = {
        .ranks = world.rank_count / islands,
        .ranks_per_machine = world.ranks_per_machine,
        .rank_memory_bytes = world.rank_memory_bytes,
        .batch_sequences = 0, /* fewer sequences than ranks is a waste, not a mistake: the run says so */
        .micro_batch_count = c->train.batch_sequences / c->train.micro_batch_sequences,
        .tokens = c->train.batch_sequences / islands * c->train.sequence_length,
    };
    TRY(parameter_table_init(&table, &c->model));
    layout_facts_of_model(&facts, &table, &c->model, run_config_compute(c));
    facts.gradient_bytes = c->layout.grad_wire == GRADIENT_WIRE_BF16 ? 2 : 4;
    parameter_table_release(&table);
    return choose_island(&wishes, &facts, islands, world.rank, out);
}

/* What the group of processes that this one belongs to may use, where the system limits it: a batch job, a container.
 */
static int64_t group_limit_bytes(void) {
    long long bytes = 0;
    FILE *file = fopen("/sys/fs/cgroup/memory.max", "r"); /* "max": no limit */
    if (!file)
        return 0;
    if (fscanf(file, "%lld", &bytes) != 1)
        bytes = 0;
    fclose(file);
    return bytes;
}

static int64_t machine_bytes(void) {
    long pages = sysconf(_SC_PHYS_PAGES), page_bytes = sysconf(_SC_PAGESIZE);
    int64_t machine = pages > 0 && page_bytes > 0 ? (int64_t)pages * page_bytes : 0, limit = group_limit_bytes();
    return limit > 0 && (machine == 0 || limit < machine) ? limit : machine;
}

int64_t placement_rank_bytes(const struct device *device, int local_size) {
    return device == device_cpu() ? machine_bytes() / local_size : device_memory_bytes(device, local_size);
}

enum status placement_open_ranks(struct ranks *ranks, const struct mesh *mesh, struct comm *world, const struct device *device,
                                 const struct run_config *config, char line[COMM_MEMORY_LINE_BYTES]) {
    struct comm_memory memory = {device, COMM_WAY_HOST}; /* alone nothing passes through the host */
    line[0] = '\0';
    if (device != device_cpu() && world->size > 1)
        TRY(comm_memory_choose(world, device, (enum comm_wish)config->run.transport, &memory, line));
    return ranks_open(ranks, mesh, world, memory);
}
