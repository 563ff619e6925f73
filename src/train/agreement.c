#include "train/agreement.h"

#include "base/hash.h"
#include "base/memory.h"
#include "train/run_directory.h"
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* Fails on all ranks, in the same words, where one's hash is not rank 0's. */
static enum status compare_hashes(struct comm *world, uint64_t mine, const char *what, const char *advice) {
    uint64_t *all;
    TRY(memory_alloc(&all, (size_t)world->size, sizeof *all));
    enum status status = comm_share(world, &mine, sizeof mine, all);
    for (int r = 1; r < world->size && status == STATUS_OK; r++)
        if (all[r] != all[0])
            status = status_fail(STATUS_USAGE, "rank %d has other %s than rank 0 (%016" PRIx64 ", %016" PRIx64 "): %s", r,
                                 what, all[r], all[0], advice);
    free(all);
    return status;
}

static uint64_t settings_hash(const struct run_config *config) {
    struct text ini = {0};
    setting_write_ini(run_config_group(), config, &ini);
    text_add_string(&ini, CADRE_VERSION);
    uint64_t hash = hash_bytes(ini.data, ini.size, 0);
    text_release(&ini);
    return hash;
}

enum status agreement_settings(struct comm *world, const struct run_config *config) {
    return compare_hashes(world, settings_hash(config), "settings",
                          "start all ranks with the same command, file and version of cadre");
}

enum status agreement_directory(struct comm *world, struct run_config *config) {
    enum status status = STATUS_OK;
    if (world->rank == 0) {
        status = run_directory_open(config);
        config->train.precision = run_config_compute(config) == DTYPE_BF16 ? PRECISION_BF16 : PRECISION_FP32;
    }
    TRY(comm_agree(world, status));
    return comm_broadcast(world, config, sizeof *config);
}

/* Of all tokens: a stretch at a time. */
static uint64_t split_hash(const struct corpus_split *split, uint64_t hash) {
    enum { STRETCH = 4096 };
    int32_t tokens[STRETCH];
    for (int64_t first = 0; first < split->token_count; first += STRETCH) {
        int64_t left = split->token_count - first, count = left < STRETCH ? left : STRETCH;
        token_shard_copy(&split->shard, first, count, tokens);
        hash = hash_bytes(tokens, (size_t)count * sizeof *tokens, hash);
    }
    return hash;
}

enum status agreement_data(struct comm *world, const struct corpus *corpus) {
    if (world->size == 1)
        return STATUS_OK;
    return compare_hashes(world, split_hash(&corpus->valid, split_hash(&corpus->train, 1)), "data",
                          "run.directory must be on a file system that all ranks share");
}
