/* Started by hand it runs itself under mpirun, once for each test; started with the name of a part it is one of the ranks. */
#include "comm/launch/launch.h"

#include "base/clock.h"
#include "comm/comm_testing.h"
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>
#ifdef CADRE_MPI
#include <mpi.h>
#include <stdatomic.h>
#endif

static const char *program;

#ifdef CADRE_MPI

/* ---- calls that move bytes, seen by the interface that MPI has for profilers ------------------------------------------- */

static _Atomic double stay_s;      /* the next look stays in MPI for so long before it moves anything; 0: it does not */
static atomic_bool is_inside;      /* it does now */
static atomic_bool is_given_back;  /* what moves was freed: nothing may be called any more */
static atomic_int late_call_count; /* that was, all the same */

int MPI_Testsome(int count, MPI_Request requests[], int *done_count, int indices[], MPI_Status statuses[]) {
    double end_s = clock_seconds() + atomic_exchange(&stay_s, 0);
    late_call_count += is_given_back;
    is_inside = true;
    while (clock_seconds() < end_s)
        usleep(10000);
    int code = PMPI_Testsome(count, requests, done_count, indices, statuses);
    is_inside = false;
    return code;
}

int MPI_Isend(const void *data, int count, MPI_Datatype type, int to, int tag, MPI_Comm comm, MPI_Request *request) {
    late_call_count += is_given_back;
    return PMPI_Isend(data, count, type, to, tag, comm, request);
}

int MPI_Irecv(void *data, int count, MPI_Datatype type, int from, int tag, MPI_Comm comm, MPI_Request *request) {
    late_call_count += is_given_back;
    return PMPI_Irecv(data, count, type, from, tag, comm, request);
}

#endif

/* ---- the ranks ----------------------------------------------------------------------------------------------------------- */

static enum status part_cases(struct comm_launch *launch) {
    for (int i = 0; i < COMM_CASE_COUNT; i++)
        if (comm_cases[i].run(&launch->world) != STATUS_OK)
            return status_prefix(STATUS_NUMERIC, "%s", comm_cases[i].name);
    return STATUS_OK;
}

/* All are on this host; the processors are divided. */
static enum status part_place(struct comm_launch *launch) {
    struct comm *comm = &launch->world;
    double threads = launch->thread_count;
    EXPECT(launch->local_size == comm->size && launch->local_rank == comm->rank);
    EXPECT(launch->thread_count >= 1);
    TRY(comm_sum_f64(comm, &threads, 1));
    EXPECT(threads <= sysconf(_SC_NPROCESSORS_ONLN) || threads == comm->size);
    return STATUS_OK;
}

static volatile double sink;

static void compute_until(double end_s) {
    while (clock_seconds() < end_s)
        for (int i = 0; i < 1000; i++)
            sink = sink + i;
}

/* A transfer hides behind computing: the wait afterwards is short. Others use the machine too, hence the best of several. */
static enum status part_progress(struct comm_launch *launch) {
    enum { BYTES = 32 << 20 };
    struct comm *comm = &launch->world;
    struct comm_request request;
    int64_t counts[CASE_RANKS_MAX], offsets[CASE_RANKS_MAX];
    char *send, *recv;
    double best = 1;
    TRY(memory_alloc(&send, BYTES, 1));
    TRY(memory_alloc(&recv, BYTES, 1));
    for (int r = 0; r < comm->size; r++) {
        counts[r] = BYTES / comm->size;
        offsets[r] = r * counts[r];
    }
    for (int i = 0; i < 10 && best > 0.25; i++) {
        memset(send, i, BYTES);
        double begin = clock_seconds();
        TRY(comm->ops->all_to_all(comm, send, counts, offsets, recv, counts, offsets, &request));
        TRY(comm->ops->wait(comm, &request));
        double blocking = clock_seconds() - begin;
        TRY(comm->ops->all_to_all(comm, send, counts, offsets, recv, counts, offsets, &request));
        compute_until(clock_seconds() + 4 * blocking + 0.02);
        begin = clock_seconds();
        TRY(comm->ops->wait(comm, &request));
        double share = (clock_seconds() - begin) / blocking;
        TRY(comm_sum_f64(comm, &share, 1));
        best = share / comm->size < best ? share / comm->size : best;
    }
    free(send);
    free(recv);
    EXPECT(best <= 0.25);
    return STATUS_OK;
}

/* The last rank dies in the midst of it. */
static enum status part_death(struct comm_launch *launch) {
    struct comm *comm = &launch->world;
    for (int round = 0;; round++) {
        if (comm->rank == comm->size - 1 && round == 3)
            kill(getpid(), SIGKILL);
        TRY(case_out_of_order(comm));
    }
}

/* It dies while all others compute and none waits for it. */
static enum status part_death_computing(struct comm_launch *launch) {
    struct comm *comm = &launch->world;
    if (comm->rank == comm->size - 1) {
        usleep(200000);
        kill(getpid(), SIGKILL);
    }
    compute_until(clock_seconds() + 20);
    return case_helpers(comm);
}

/* It dies while all others wait for something that never comes, as a device does for one that is gone. */
static enum status part_death_waiting(struct comm_launch *launch) {
    comm_launch_set_timeout(launch, 2);
    TRY(case_helpers(&launch->world));
    if (launch->world.rank == launch->world.size - 1)
        kill(getpid(), SIGKILL);
    for (;;)
        sleep(100);
}

#ifdef CADRE_MPI

/* Two transfers that do not end: one is under way, the other only begun, since the engine's thread is inside MPI for inside_s. The
 * last rank dies in that time, and who is told of it frees the buffers. told_s, was_inside: how long it took to be told, and
 * whether the thread was inside MPI still. */
static enum status lose_while_inside(struct comm *comm, double inside_s, double *told_s, bool *was_inside) {
    enum { BYTES = 4 << 20 };
    static const int64_t none[CASE_RANKS_MAX];
    struct comm_request requests[2], request;
    int64_t counts[CASE_RANKS_MAX], offsets[CASE_RANKS_MAX];
    char *data[4];
    for (int i = 0; i < 4; i++)
        TRY(memory_alloc(&data[i], BYTES, 1));
    for (int r = 0; r < comm->size; r++) {
        counts[r] = BYTES / comm->size;
        offsets[r] = r * counts[r];
    }
    TRY(case_helpers(comm));
    if (comm->rank == comm->size - 1) {
        usleep(300000);
        kill(getpid(), SIGKILL);
    }
    stay_s = inside_s;
    TRY(comm->ops->all_to_all(comm, data[0], counts, offsets, data[1], counts, offsets, &requests[0]));
    while (!is_inside)
        usleep(1000);
    TRY(comm->ops->all_to_all(comm, data[2], counts, offsets, data[3], counts, offsets, &requests[1]));
    double begin_s = clock_seconds();
    enum status first = comm->ops->wait(comm, &requests[0]);
    *told_s = clock_seconds() - begin_s;
    *was_inside = is_inside;
    enum status second = comm->ops->wait(comm, &requests[1]);
    is_given_back = true;
    for (int i = 0; i < 4; i++)
        free(data[i]);
    EXPECT(first == STATUS_PEER && second == STATUS_PEER);
    EXPECT(comm->ops->all_to_all(comm, NULL, none, none, NULL, none, none, &request) == STATUS_PEER);
    return first;
}

/* Who is told that it died may free what was under way. */
static enum status part_death_inside(struct comm_launch *launch) {
    double told_s;
    bool was_inside;
    enum status status = lose_while_inside(&launch->world, 1, &told_s, &was_inside);
    usleep(1500000);
    if (status == STATUS_PEER)
        fprintf(stderr, "given back: %s, %d calls later\n", was_inside ? "under way" : "at rest", late_call_count);
    return status;
}

/* A thread that never comes back from MPI does not keep the others for ever. */
static enum status part_death_hanging(struct comm_launch *launch) {
    double told_s;
    bool was_inside;
    enum status status = lose_while_inside(&launch->world, 1000, &told_s, &was_inside);
    if (status == STATUS_PEER)
        fprintf(stderr, "hangs: %s\n", was_inside && told_s < 8 ? "told" : "late");
    return status;
}

#endif

/* The last rank is stopped in the midst of it. */
static enum status part_stopped(struct comm_launch *launch) {
    struct comm *comm = &launch->world;
    comm_launch_set_timeout(launch, 2);
    for (int round = 0;; round++) {
        if (comm->rank == comm->size - 1 && round == 3)
            raise(SIGSTOP);
        TRY(case_out_of_order(comm));
    }
}

/* It is stopped while all others compute and none waits for it. */
static enum status part_stopped_computing(struct comm_launch *launch) {
    comm_launch_set_timeout(launch, 2);
    if (launch->world.rank == launch->world.size - 1)
        raise(SIGSTOP);
    compute_until(clock_seconds() + 20);
    return case_helpers(&launch->world);
}

/* Others wait much longer than the limit for one that computes, then for one that sleeps in a system call, then for one that
 * is stopped for less than the limit. */
static enum status part_slow(struct comm_launch *launch) {
    struct comm *comm = &launch->world;
    bool is_slow = comm->rank == comm->size - 1;
    comm_launch_set_timeout(launch, 2);
    if (is_slow)
        compute_until(clock_seconds() + 5);
    TRY(case_helpers(comm));
    if (is_slow)
        usleep(5000000);
    TRY(case_helpers(comm));
    pid_t self = getpid(), waker = is_slow ? fork() : 1;
    if (waker == 0) {
        usleep(1500000);
        _exit(kill(self, SIGCONT));
    }
    if (is_slow) {
        raise(SIGSTOP);
        EXPECT(waitpid(waker, NULL, 0) == waker);
    }
    return case_helpers(comm);
}

/* All are stopped for longer than the limit, as by a batch system that lets others have the machine, and go on. */
static enum status part_suspended(struct comm_launch *launch) {
    struct comm *comm = &launch->world;
    comm_launch_set_timeout(launch, 1);
    for (int round = 0; round < 2; round++) {
        pid_t self = getpid(), waker = round == 0 ? fork() : 1;
        if (waker == 0) {
            usleep(2500000);
            _exit(kill(self, SIGCONT));
        }
        TRY(case_helpers(comm));
        if (round == 0) {
            raise(SIGSTOP);
            EXPECT(waitpid(waker, NULL, 0) == waker);
        }
        TRY(case_helpers(comm));
    }
    return STATUS_OK;
}

/* It answers, but sits in a system call that does not end. */
static enum status part_hanging(struct comm_launch *launch) {
    struct comm *comm = &launch->world;
    comm_launch_set_timeout(launch, 1);
    if (comm->rank == comm->size - 1)
        for (;;)
            sleep(100);
    return case_helpers(comm);
}

/* One rank fails alone and ends; the others wait for it. */
static enum status part_failure(struct comm_launch *launch) {
    if (launch->world.rank == 1)
        return status_fail(STATUS_IO, "the disk is full");
    return case_uneven(&launch->world);
}

/* All fail with one accord, rank 0 last to say so: no other has ended by then. */
static enum status part_accord(struct comm_launch *launch) {
    enum status mine = launch->world.rank == 1 ? status_fail(STATUS_USAGE, "no such layout") : STATUS_OK;
    enum status status = comm_agree(&launch->world, mine);
    if (launch->world.rank == 0)
        usleep(300000);
    return status;
}

/* Pieces in a communicator of a size beyond 2 GiB: run by hand, takes 10 GiB. */
static enum status part_huge(struct comm_launch *launch) {
    struct comm *comm = &launch->world;
    int64_t bytes = ((int64_t)9 << 28) + 12345, counts[CASE_RANKS_MAX] = {0}, offsets[CASE_RANKS_MAX] = {0};
    struct comm_request request;
    char *send, *recv;
    EXPECT(comm->size == 2);
    TRY(memory_alloc(&send, (size_t)bytes, 1));
    TRY(memory_alloc(&recv, (size_t)bytes, 1));
    memset(send, 'a' + comm->rank, (size_t)bytes);
    send[bytes - 1] = '!';
    counts[1 - comm->rank] = bytes;
    TRY(comm->ops->all_to_all(comm, send, counts, offsets, recv, counts, offsets, &request));
    TRY(comm->ops->wait(comm, &request));
    EXPECT(recv[0] == 'b' - comm->rank && recv[bytes - 2] == 'b' - comm->rank && recv[bytes - 1] == '!');
    free(send);
    free(recv);
    return STATUS_OK;
}

static const struct {
    const char *name;
    enum status (*run)(struct comm_launch *launch);
} parts[] = {{"cases", part_cases},     {"place", part_place},
             {"progress", part_progress}, {"death", part_death},
             {"death-computing", part_death_computing}, {"failure", part_failure},
             {"death-waiting", part_death_waiting},
#ifdef CADRE_MPI
             {"death-inside", part_death_inside}, {"death-hanging", part_death_hanging},
#endif
             {"stopped", part_stopped}, {"stopped-computing", part_stopped_computing},
             {"slow", part_slow}, {"suspended", part_suspended}, {"hanging", part_hanging},
             {"accord", part_accord},
             {"huge", part_huge}};

static void print_line(const char *line) {
    char whole[512];
    int length = snprintf(whole, sizeof whole, "told: %s\n", line);
    if (write(2, whole, (size_t)length) < 0)
        abort();
}

static int run_part(const char *name) {
    struct comm_launch launch;
    enum status status = comm_launch_open(&launch, print_line);
    if (status != STATUS_OK) {
        fprintf(stderr, "open: %s\n", status_text());
        return 3;
    }
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (strcmp(parts[i].name, name) == 0)
            status = parts[i].run(&launch);
    if (status != STATUS_OK && comm_launch_speaks(&launch, status))
        fprintf(stderr, "failed: %s\n", status_text());
    if (status == STATUS_OK && launch.world.rank == 0)
        printf("%d ranks: %s: well\n", launch.world.size, name);
    comm_launch_close(&launch, status);
    return status == STATUS_OK ? 0 : 1;
}

/* ---- who starts them ------------------------------------------------------------------------------------------------------- */

static char output[1 << 16];

/* What the command prints, in `output`; returns its exit status. */
static int run(const char *command) {
    size_t length = 0;
    FILE *pipe = popen(command, "r");
    assert_non_null(pipe);
    while (length < sizeof output - 1) {
        size_t got = fread(output + length, 1, sizeof output - 1 - length, pipe);
        if (got == 0)
            break;
        length += got;
    }
    output[length] = 0;
    int how = pclose(pipe);
    return WIFEXITED(how) ? WEXITSTATUS(how) : -1;
}

#ifdef CADRE_MPI
static int run_ranks_with(const char *words, int size, const char *part) {
    char command[1024];
    snprintf(command, sizeof command, "exec timeout -k 5 120 %s %s -n %d '%s' %s 2>&1", CADRE_MPIEXEC, words, size, program, part);
    return run(command);
}

static int run_ranks(int size, const char *part) {
    return run_ranks_with("", size, part);
}

static void expect_well(int size, const char *part) {
    char expected[128];
    snprintf(expected, sizeof expected, "%d ranks: %s: well\n", size, part);
    if (run_ranks(size, part) != 0 || !strstr(output, expected))
        fail_msg("%d ranks, %s: %s", size, part, output);
}

static void test_cases(void **state) {
    (void)state;
    for (int size = 2; size <= 4; size++)
        expect_well(size, "cases");
}

static void test_place(void **state) {
    (void)state;
    expect_well(2, "place");
    expect_well(4, "place");
}

static void test_progress(void **state) {
    (void)state;
    expect_well(2, "progress");
}

static int count_in_output(const char *word) {
    int count = 0;
    for (const char *at = output; (at = strstr(at, word)); at++)
        count++;
    return count;
}

static bool is_mpich(void) {
    char library[128];
    return strncmp(comm_launch_library(library, sizeof library), "MPICH", 5) == 0;
}

/* One line that names the rank, and an end within so many seconds. MPICH's starter may kill all others before they can tell. */
static void expect_told_within(double seconds, int lines_most, const char *part, int gone) {
    char expected[64];
    double begin = clock_seconds();
    snprintf(expected, sizeof expected, "told: rank %d (pid ", gone);
    int status = run_ranks(4, part), told = count_in_output(expected), lines = count_in_output("told: ");
    bool killed = is_mpich() && lines == 0;
    if (status == 0 || clock_seconds() - begin > seconds || (!killed && (told != 1 || lines > lines_most)))
        fail_msg("%s: exit status %d after %.1f s: %s", part, status, clock_seconds() - begin, output);
}

static void expect_told(const char *part, int gone) {
    expect_told_within(15, 1, part, gone);
}

static void test_death(void **state) {
    (void)state;
    for (int i = 0; i < 3; i++)
        expect_told("death", 3);
    assert_int_equal(count_in_output("failed: "), 0);
    for (int i = 0; i < 3; i++)
        expect_told("death-computing", 3);
}

/* Where the starter lets the others live, they end by themselves. It may call that a success. */
static void test_death_waiting(void **state) {
    (void)state;
    if (is_mpich())
        skip();
    double begin = clock_seconds();
    int status = run_ranks_with("--enable-recovery", 4, "death-waiting");
    if (clock_seconds() - begin > 15 || count_in_output("told: rank 3 (pid ") != 1)
        fail_msg("exit status %d after %.1f s: %s", status, clock_seconds() - begin, output);
}

/* A rank is lost while others are inside MPI, with buffers of transfers that will not end. */
static void test_death_inside(void **state) {
    (void)state;
    if (is_mpich())
        skip();
    int status = run_ranks_with("--enable-recovery", 4, "death-inside");
    if (count_in_output("given back: at rest, 0 calls later") != 3 || count_in_output("told: rank 3 (pid ") != 1)
        fail_msg("exit status %d: %s", status, output);
    status = run_ranks_with("--enable-recovery", 4, "death-hanging");
    if (count_in_output("hangs: told") != 3 || count_in_output("told: rank 3 (pid ") != 1)
        fail_msg("exit status %d: %s", status, output);
}

/* One line, from the lowest rank, and an end three seconds later at most; the stopped one does not stay. */
static void test_silence(void **state) {
    (void)state;
    if (is_mpich())
        skip();
    expect_told("stopped", 3);
    assert_int_equal(count_in_output("has not answered for 2 s"), 1);
    assert_int_equal(count_in_output("failed: "), 0);
    expect_told("stopped-computing", 3);
    assert_int_equal(count_in_output("has not answered for 2 s"), 1);
    /* 10 s without work of the processor, which a crowded machine stretches; with a limit of 1 s the one that hangs, whose
     * other threads live, may find the others silent before it is ended */
    expect_told_within(60, 2, "hanging", 3);
    assert_int_equal(count_in_output("answers, but has done nothing for 10 s while others wait"), 1);
}

static void test_no_false_alarm(void **state) {
    (void)state;
    expect_well(4, "slow");
    expect_well(3, "suspended");
}

/* The failed rank says why, then it is gone for the others. */
static void test_failure(void **state) {
    (void)state;
    expect_told("failure", 1);
    assert_int_equal(count_in_output("failed: the disk is full"), 1);
}

static void test_accord(void **state) {
    (void)state;
    for (int i = 0; i < 3; i++) {
        int status = run_ranks(4, "accord");
        if (status != 1 || count_in_output("failed: ") != 1 || count_in_output("failed: rank 1: no such layout") != 1 ||
            count_in_output("told: ") != 0)
            fail_msg("accord: exit status %d: %s", status, output);
    }
}

/* Started by the mpirun of another MPI: not N runs of one rank. */
static void test_foreign_starter(void **state) {
    (void)state;
    char command[1024];
    snprintf(command, sizeof command, "env %s '%s' cases 2>&1",
             is_mpich() ? "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4" : "PMI_RANK=0 PMI_SIZE=4", program);
    assert_int_equal(run(command), 3);
    if (!strstr(output, "started 4 processes, but MPI finds 1"))
        fail_msg("%s", output);
}

#else

static void test_without_mpi(void **state) {
    (void)state;
    char command[1024];
    snprintf(command, sizeof command, "env OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4 '%s' cases 2>&1", program);
    assert_int_equal(run(command), 3);
    if (!strstr(output, "built without MPI"))
        fail_msg("%s", output);
    print_message("built without MPI: several processes are not tested\n");
}

#endif

static void test_alone(void **state) {
    (void)state;
    struct comm_launch launch;
    assert_int_equal(comm_launch_open(&launch, NULL), STATUS_OK);
    assert_string_equal(launch.world.ops->name, "self");
    assert_int_equal(launch.local_size, 1);
    assert_true(launch.thread_count >= 1);
    assert_int_equal(part_cases(&launch), STATUS_OK);
    comm_launch_close(&launch, STATUS_OK);
}

/* srun without an MPI behind it. */
static void test_lonely_tasks(void **state) {
    (void)state;
    char command[1024];
    snprintf(command, sizeof command, "env SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=4 '%s' cases 2>&1", program);
    assert_int_equal(run(command), 3);
    if (!strstr(output, "--mpi=pmix"))
        fail_msg("%s", output);
}

/* For the ranks: mpirun on a machine with few processors, as root in a container; leaks of MPI's own are not ours. */
static void set_environment(void) {
    const char *asan = getenv("ASAN_OPTIONS");
    char options[512];
    snprintf(options, sizeof options, "%s%sdetect_leaks=0", asan ? asan : "", asan ? ":" : "");
    setenv("ASAN_OPTIONS", options, 1);
    setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1);
    setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
    setenv("OMPI_MCA_rmaps_base_oversubscribe", "1", 1);
    setenv("OMPI_MCA_btl_base_warn_component_unused", "0", 1);
}

int main(int argc, char **argv) {
    if (argc > 1)
        return run_part(argv[1]);
    program = argv[0];
    set_environment();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_alone),
        cmocka_unit_test(test_lonely_tasks),
#ifdef CADRE_MPI
        cmocka_unit_test(test_cases),
        cmocka_unit_test(test_place),
        cmocka_unit_test(test_progress),
        cmocka_unit_test(test_death),
        cmocka_unit_test(test_death_waiting),
        cmocka_unit_test(test_death_inside),
        cmocka_unit_test(test_silence),
        cmocka_unit_test(test_no_false_alarm),
        cmocka_unit_test(test_failure),
        cmocka_unit_test(test_accord),
        cmocka_unit_test(test_foreign_starter),
#else
        cmocka_unit_test(test_without_mpi),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
