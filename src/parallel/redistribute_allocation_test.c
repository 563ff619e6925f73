/* A run of a plan takes no memory: every request of the process is counted while plans of every stage run. */
#include "parallel/redistribute.h"

#include "base/allocation_testing.h"
#include "base/threads.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

/* A transport on which nothing ever arrives. */
static enum status start_nothing(struct comm *comm, const void *send, const int64_t *send_counts,
                                 const int64_t *send_offsets, void *recv, const int64_t *recv_counts,
                                 const int64_t *recv_offsets, struct comm_request *request) {
    (void)send, (void)send_counts, (void)send_offsets, (void)recv, (void)recv_counts, (void)recv_offsets;
    comm->count.calls++;
    *request = (struct comm_request){1};
    return STATUS_OK;
}

static enum status wait_for_nothing(struct comm *comm, struct comm_request *request) {
    (void)comm;
    *request = (struct comm_request){0};
    return STATUS_OK;
}

enum { ITEMS = 3, RUNS = 5 };

static void check(const struct kernel_ops *ops) {
    static const int size[MESH_AXIS_COUNT] = {1, 2, 2, 2};
    static const struct comm_ops nothing = {.name = "nothing", .all_to_all = start_nothing, .wait = wait_for_nothing};
    static float data[2 * ITEMS][40 * 31];
    static _Alignas(64) char staging[1 << 16];
    struct comm comm = {.ops = &nothing, .rank = 3, .size = 8};
    struct mesh mesh = mesh_make(size, 3);
    struct redistribute_item items[ITEMS];
    struct redistribution *plan;
    for (int i = 0; i < ITEMS; i++) { /* a sum for all, a sum for owners, a gather */
        items[i] = (struct redistribute_item){.dim_count = 2, .shape = {40, 31, 1}, .wire = i ? DTYPE_F32 : DTYPE_BF16};
        items[i].from_layout.axis[MESH_SHARD].kind = i < 2 ? PLACEMENT_PARTIAL : PLACEMENT_SHARD;
        items[i].to_layout.axis[MESH_SHARD].kind = i == 1 ? PLACEMENT_SHARD : PLACEMENT_REPLICATE;
        items[i].from = layout_local_tensor(&items[i].from_layout, &mesh, DTYPE_F32, 2, items[i].shape);
        items[i].to = layout_local_tensor(&items[i].to_layout, &mesh, DTYPE_F32, 2, items[i].shape);
        items[i].from.data = data[2 * i];
        items[i].to.data = data[2 * i + 1];
    }
    assert_int_equal(redistribution_create(&mesh, MESH_ALL_AXES, items, ITEMS, &plan), STATUS_OK);
    assert_int_equal(redistribution_exchanges(plan), 2);
    assert_true(redistribution_staging_bytes(plan) <= sizeof staging);
    long before = atomic_load(&requests);
    for (int run = 0; run < RUNS; run++) {
        redistribution_bind(plan, 0, items[0].from, items[0].to);
        assert_int_equal(redistribution_start(plan, &comm, ops, staging), STATUS_OK);
        assert_int_equal(redistribution_advance(plan), STATUS_OK);
        assert_int_equal(redistribution_finish(plan, run % 2), STATUS_OK);
    }
    assert_int_equal(atomic_load(&requests), before);
    redistribution_destroy(plan);
}

static void test_a_run_takes_no_memory(void **state) {
    (void)state;
    threads_set_count(1);
    for (const char *const *name = kernels_available(); *name; name++) {
        const struct kernel_ops *ops;
        assert_int_equal(kernels_choose(*name, &ops), STATUS_OK);
        check(ops);
    }
    if (COUNTS_REQUESTS)
        assert_true(atomic_load(&requests) > 0); /* they are counted */
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_a_run_takes_no_memory)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
