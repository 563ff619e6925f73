/* A bit that changes in what one of several ranks holds is found, and the rank named; ranks that are well are left alone. */
#include "train/ranks_testing.h"
#include "train/verify.h"

#include <stdio.h>

enum { CLEAN_STEPS = 6, TRIALS = 60, SEED = 41 };

struct job {
    struct test_layout layout;
    int found, silent_copies;
};

static struct tensor array_of(const struct model *m, int array, int row) {
    const struct tensor *arrays[] = {m->own_weight, m->moment1, m->moment2, m->weight};
    return arrays[array][row];
}

/* Ranks that hold the same part of a row as rank r, by extents alone; a bit for each. */
static unsigned same_part(const struct model *m, int row, bool whole_copy, int r) {
    const struct sharding *mine = &m->sharding;
    struct parameter_part parts[RANKS_MAX];
    unsigned set = 0;
    int count = mesh_rank_count(&mine->mesh);
    for (int i = 0; i < count; i++) {
        struct sharding s = {mesh_make(mine->mesh.size, i), mine->zero};
        struct layout layout = whole_copy ? sharding_compute_layout(&m->table.rows[row])
                                          : sharding_own_layout(&s, &m->table.rows[row]);
        parts[i] = sharding_part(&s, &m->table.rows[row], &layout);
    }
    for (int i = 0; i < count; i++)
        if (memcmp(&parts[i], &parts[r], sizeof parts[i]) == 0)
            set |= 1u << i;
    return set;
}

static int expect(enum status status, const char *text, unsigned set, int rank) {
    char alone[32];
    snprintf(alone, sizeof alone, "step 7: rank %d", rank);
    if (status != STATUS_NUMERIC || !strstr(text, "goes on from the newest checkpoint in runs/x/checkpoints"))
        return 0;
    if (__builtin_popcount(set) >= 3)
        return strncmp(text, alone, strlen(alone)) == 0 && strstr(text, " holds another ");
    char both[64] = "step 7: ranks";
    return strncmp(text, both, strlen(both)) == 0 && strstr(text, "cannot be told apart");
}

static enum status flip(struct job *job, struct test_rank *r, int trial) {
    const struct model *m = r->model;
    int size = r->ranks.world->size, array = (int)(random_bits(SEED, 1, (uint64_t)trial) % 4);
    int row = (int)(random_bits(SEED, 2, (uint64_t)trial) % (uint64_t)m->table.count);
    int rank = (int)(random_bits(SEED, 3, (uint64_t)trial) % (uint64_t)size);
    bool whole_copy = array == 3 && !model_row_is_whole(m, row);
    if (whole_copy && m->sharding.zero == 3)
        return STATUS_OK; /* not between steps */
    unsigned set = same_part(m, row, whole_copy, rank);
    struct tensor t = array_of(m, array, row);
    uint64_t bits = 8 * tensor_bytes(t), bit = bits ? random_bits(SEED, 4, (uint64_t)trial) % bits : 0;
    double exists = r->ranks.world->rank == rank && bits > 0;
    TRY(comm_sum_f64(r->ranks.world, &exists, 1));
    if (exists == 0 || __builtin_popcount(set) == 1) {
        job->silent_copies += r->ranks.world->rank == 0;
        return STATUS_OK;
    }
    if (r->ranks.world->rank == rank)
        ((unsigned char *)t.data)[bit / 8] ^= (unsigned char)(1u << bit % 8);
    enum status status = verify_copies(m, &r->ranks, 7, "runs/x/checkpoints");
    if (!expect(status, status_text(), set, rank))
        return status_fail(STATUS_FORMAT, "trial %d, array %d, row %d, rank %d: %s", trial, array, row, rank,
                           status == STATUS_OK ? "not found" : status_text());
    job->found += r->ranks.world->rank == 0;
    if (r->ranks.world->rank == rank)
        ((unsigned char *)t.data)[bit / 8] ^= (unsigned char)(1u << bit % 8);
    return verify_copies(m, &r->ranks, 7, "runs/x/checkpoints");
}

static enum status run_rank(void *context, struct comm *world) {
    struct job *job = context;
    struct test_rank r = {0};
    struct step_result result;
    enum status status = test_rank_open(&r, &job->layout, world);
    for (int step = 1; step <= CLEAN_STEPS && status == STATUS_OK; step++) {
        status = test_rank_step(&r, step, (struct step_limits){0}, &result);
        if (status == STATUS_OK && result.skipped)
            status = status_fail(STATUS_NUMERIC, "step %d: %s", step, step_skip_reason(result.skipped));
        if (status == STATUS_OK)
            status = verify_copies(r.model, &r.ranks, step, "runs/x/checkpoints");
    }
    for (int trial = 0; trial < TRIALS && status == STATUS_OK; trial++)
        status = flip(job, &r, trial);
    test_rank_close(&r);
    return status;
}

static void test_every_flipped_bit_is_found(void **state) {
    (void)state;
    static const struct test_layout layouts[] = {
        {2, 1, 1, 0, DTYPE_F32, DTYPE_F32},  {3, 1, 1, 0, DTYPE_F32, DTYPE_F32},  {3, 1, 1, 3, DTYPE_F32, DTYPE_F32},
        {1, 3, 1, 0, DTYPE_F32, DTYPE_BF16}, {1, 4, 1, 1, DTYPE_BF16, DTYPE_F32}, {1, 1, 4, 0, DTYPE_F32, DTYPE_F32},
        {2, 2, 1, 3, DTYPE_F32, DTYPE_BF16}, {3, 2, 1, 2, DTYPE_F32, DTYPE_F32},  {4, 1, 2, 3, DTYPE_BF16, DTYPE_BF16},
        {2, 2, 2, 1, DTYPE_F32, DTYPE_F32},  {2, 1, 3, 0, DTYPE_BF16, DTYPE_BF16},
    };
    int found = 0;
    threads_set_count(1);
    for (size_t i = 0; i < sizeof layouts / sizeof *layouts; i++) {
        struct job job = {.layout = layouts[i]};
        enum status status = comm_threads_run(layout_ranks(&job.layout), run_rank, &job);
        if (status != STATUS_OK)
            fail_msg("%d x %d x %d, stage %d: %s", job.layout.replicate, job.layout.shard, job.layout.expert,
                     job.layout.zero, status_text());
        found += job.found;
    }
    print_message("%d flipped bits, all found\n", found);
    assert_true(found >= 300);
}

static enum status run_alone(void *context, struct comm *world) {
    struct test_layout *layout = context;
    struct test_rank r = {0};
    TRY(test_rank_open(&r, layout, world));
    int64_t sent = ranks_sent_bytes(&r.ranks);
    enum status status = verify_copies(r.model, &r.ranks, 1, "runs/x/checkpoints");
    if (verify_has_copies(r.model) || ranks_sent_bytes(&r.ranks) != sent)
        status = status_fail(STATUS_FORMAT, "where each rank owns its own there is nothing to compare");
    test_rank_close(&r);
    return status;
}

static void test_nothing_to_compare(void **state) {
    (void)state;
    struct test_layout one = {1, 1, 1, 0, DTYPE_F32, DTYPE_F32}, divided = {1, 2, 1, 3, DTYPE_F32, DTYPE_F32};
    assert_int_equal(comm_threads_run(1, run_alone, &one), STATUS_OK);
    assert_int_equal(comm_threads_run(2, run_alone, &divided), STATUS_OK);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_flipped_bit_is_found),
        cmocka_unit_test(test_nothing_to_compare),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
