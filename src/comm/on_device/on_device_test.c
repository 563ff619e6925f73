/* Both ways of transfers between devices do what comm.h says: on a fenced device, on the model of one, and on a real one where
 * there is one; NCCL wants several of those for several ranks. */
#include "comm/comm_testing.h"
#include "comm/fence_testing.h"
#include "comm/on_device/ways.h"
#include "comm/threads/comm_threads.h"
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#if defined(CADRE_CUDA) || defined(CADRE_CUDA_MODEL)
static const bool has_nccl = true;
#else
static const bool has_nccl = false;
#endif
#ifdef CADRE_CUDA
static const bool is_model = false;
#else
static const bool is_model = true;
#endif

struct task {
    struct comm_case to_run;
    struct comm_memory memory;
};

/* A part of all, fenced, becomes one for the device. */
static enum status open_on_device(struct comm *world, struct comm_memory memory, struct comm *out) {
    struct comm part;
    TRY(world->ops->split(world, 0, &part));
    *out = fenced_comm(part);
    return comm_on_device(out, memory);
}

static enum status run_case(void *context, struct comm *world) {
    const struct task *task = context;
    struct comm comm;
    TRY(open_on_device(world, task->memory, &comm));
    enum status status = task->to_run.run(&comm);
    comm_release(&comm);
    return status;
}

static void run_all(struct comm_memory memory, int size, const struct comm_threads_faults *faults) {
    case_device = memory.device;
    for (int i = 0; i < COMM_CASE_COUNT; i++) {
        struct task task = {comm_cases[i], memory};
        if (comm_threads_run_with(size, faults, run_case, &task) != STATUS_OK)
            fail_msg("%s, way %d, %d ranks, %s: %s", memory.device->name, memory.way, size, task.to_run.name, status_text());
    }
}

/* The fenced one, and a CUDA device or its model. */
static int find_devices(const struct device *devices[2]) {
    devices[0] = fenced_device();
    return device_choose("cuda", &devices[1]) == STATUS_OK ? 2 : 1;
}

static void test_through_the_host(void **state) {
    (void)state;
    const struct device *devices[2];
    const struct comm_threads_faults slow = {.seed = 1, .latency_s = 2e-4, .bytes_per_s = 2e9};
    for (int d = find_devices(devices) - 1; d >= 0; d--) {
        for (int size = 1; size <= 6; size++)
            run_all((struct comm_memory){devices[d], COMM_WAY_HOST}, size, NULL);
        run_all((struct comm_memory){devices[d], COMM_WAY_HOST}, 4, &slow);
    }
}

static void test_by_nccl(void **state) {
    (void)state;
    const struct device *devices[2];
    int count = find_devices(devices);
    if (!has_nccl)
        skip();
    if (is_model)
        for (int d = 0; d < count; d++)
            for (int size = 1; size <= 5; size++)
                run_all((struct comm_memory){devices[d], COMM_WAY_NCCL}, size, NULL);
    else if (count == 2)
        run_all((struct comm_memory){devices[1], COMM_WAY_NCCL}, 1, NULL);
}

/* For the processor's memory nothing changes. */
static void test_the_processor(void **state) {
    (void)state;
    struct comm comm = comm_self(), before = comm;
    assert_int_equal(comm_on_device(&comm, (struct comm_memory){0}), STATUS_OK);
    assert_int_equal(comm_on_device(&comm, (struct comm_memory){device_cpu(), COMM_WAY_NCCL}), STATUS_OK);
    assert_ptr_equal(comm.ops, before.ops);
    assert_ptr_equal(comm_host(&comm), &comm);
}

/* A rank that is gone is a failure of those who wait for it; what they started besides ends, too. */
static enum status lose_a_rank(void *context, struct comm *world) {
    const struct task *task = context;
    struct comm comm;
    TRY(open_on_device(world, task->memory, &comm));
    enum status status = case_out_of_order(&comm);
    if (status == STATUS_OK)
        status = case_uneven(&comm);
    comm_release(&comm);
    return status;
}

static void test_a_rank_dies(void **state) {
    (void)state;
    struct task task = {.memory = {fenced_device(), COMM_WAY_HOST}};
    case_device = fenced_device();
    for (int64_t call = 2; call <= 120; call += 13) {
        const struct comm_threads_faults faults = {.dying_rank = 1, .dying_call = call};
        assert_int_equal(comm_threads_run_with(3, &faults, lose_a_rank, &task), STATUS_PEER);
        assert_non_null(strstr(status_text(), "rank 1"));
    }
}

struct choice {
    enum comm_wish wish;
    enum comm_way way;
    enum status status;
    char line[COMM_MEMORY_LINE_BYTES];
};

static enum status choose(void *context, struct comm *comm) {
    const struct choice *wanted = context;
    const struct device *device;
    struct comm_memory memory;
    char line[COMM_MEMORY_LINE_BYTES] = "";
    TRY(device_choose("cuda", &device));
    enum status status = comm_memory_choose(comm, device, wanted->wish, &memory, line);
    EXPECT(status == wanted->status);
    if (!strstr(status == STATUS_OK ? line : status_text(), wanted->line))
        return status_fail(STATUS_NUMERIC, "'%s' is not in '%s'", wanted->line, status == STATUS_OK ? line : status_text());
    EXPECT(status != STATUS_OK || (memory.way == wanted->way && memory.device == device));
    return STATUS_OK;
}

/* Ranks of one process share its device, which NCCL does not do. */
static void test_choosing(void **state) {
    (void)state;
    static const struct choice wanted[] = {
        {COMM_WISH_AUTO, COMM_WAY_HOST, STATUS_OK, "through the processors' memory: ranks 0 and 1 share a device"},
        {COMM_WISH_HOST, COMM_WAY_HOST, STATUS_OK, "as --run.transport says"},
        {COMM_WISH_NCCL, COMM_WAY_NCCL, STATUS_USAGE, "ranks 0 and 1 share a device"},
    };
    const struct device *device;
    if (device_choose("cuda", &device) != STATUS_OK)
        skip();
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        struct choice choice = wanted[i];
        if (comm_threads_run(2, choose, &choice) != STATUS_OK)
            fail_msg("wish %d: %s", choice.wish, status_text());
    }
    struct choice alone = {COMM_WISH_NCCL, COMM_WAY_NCCL, STATUS_OK, "NCCL 2."};
    int version;
    if (on_device_nccl_version(&version) == STATUS_OK && comm_threads_run(1, choose, &alone) != STATUS_OK)
        fail_msg("alone: %s", status_text());
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_through_the_host), cmocka_unit_test(test_by_nccl), cmocka_unit_test(test_the_processor),
        cmocka_unit_test(test_a_rank_dies),      cmocka_unit_test(test_choosing),
    };
    if (is_model)
        use_model_of_nccl();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
