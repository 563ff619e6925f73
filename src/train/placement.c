#include "train/placement.h"

#include "parallel/layout_choice.h"
#include <stdio.h>
#include <unistd.h>

enum status placement_choose(const struct run_config *c, struct placement_world world, struct sharding *out) {
    struct parameter_table table;
    struct layout_wishes wishes = {c->layout.replicate, c->layout.shard, c->layout.expert,
                                   c->layout.zero == LAYOUT_ZERO_AUTO ? LAYOUT_ZERO_CHOOSE
                                                                      : c->layout.zero - LAYOUT_ZERO_0};
    struct layout_facts facts = {
        .ranks = world.rank_count,
        .ranks_per_machine = world.ranks_per_machine,
        .rank_memory_bytes = world.rank_memory_bytes,
        .batch_sequences = 0, /* fewer sequences than ranks is a waste, not a mistake: the run says so */
        .micro_batch_count = c->train.batch_sequences / c->train.micro_batch_sequences,
        .tokens = c->train.batch_sequences * c->train.sequence_length,
    };
    TRY(parameter_table_init(&table, &c->model));
    layout_facts_of_model(&facts, &table, &c->model, run_config_compute(c));
    facts.gradient_bytes = c->layout.grad_wire == GRADIENT_WIRE_BF16 ? 2 : 4;
    parameter_table_release(&table);
    return layout_choose(&wishes, &facts, world.rank, out);
}

/* What the group of processes that this one belongs to may use, where the system limits it: a batch job, a container. */
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

int64_t placement_machine_bytes(void) {
    long pages = sysconf(_SC_PHYS_PAGES), page_bytes = sysconf(_SC_PAGESIZE);
    int64_t machine = pages > 0 && page_bytes > 0 ? (int64_t)pages * page_bytes : 0, limit = group_limit_bytes();
    return limit > 0 && (machine == 0 || limit < machine) ? limit : machine;
}
