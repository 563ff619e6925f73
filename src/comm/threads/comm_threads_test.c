#include "comm/threads/comm_threads.h"

#include "base/clock.h"
#include "comm/comm_testing.h"
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

static const int sizes[] = {1, 2, 3, 4, 6, 8};
enum { SIZE_COUNT = sizeof sizes / sizeof *sizes };

static enum status run_case(void *context, struct comm *comm) {
    const struct comm_case *c = context;
    return c->run(comm);
}

static void test_cases_self(void **state) {
    (void)state;
    for (int i = 0; i < COMM_CASE_COUNT; i++) {
        struct comm comm = comm_self();
        if (comm_cases[i].run(&comm) != STATUS_OK)
            fail_msg("self, %s: %s", comm_cases[i].name, status_text());
        comm_release(&comm);
    }
}

static void run_all(const struct comm_threads_faults *faults, int size) {
    for (int i = 0; i < COMM_CASE_COUNT; i++) {
        struct comm_case c = comm_cases[i];
        if (comm_threads_run_with(size, faults, run_case, &c) != STATUS_OK)
            fail_msg("%d threads, %s: %s", size, c.name, status_text());
    }
}

static void test_cases_threads(void **state) {
    (void)state;
    for (int i = 0; i < SIZE_COUNT; i++)
        run_all(NULL, sizes[i]);
}

/* Transfers that overtake each other give the same bytes. */
static void test_cases_delayed(void **state) {
    (void)state;
    for (uint64_t seed = 1; seed <= 2; seed++) {
        const struct comm_threads_faults faults = {.seed = seed, .latency_s = 2e-4, .bytes_per_s = 2e9};
        run_all(&faults, 4);
    }
}

enum { LATE_BYTES = 4000 };

static enum status exchange_late(void *context, struct comm *comm) {
    double *took = context;
    char send[LATE_BYTES] = {1}, recv[2 * LATE_BYTES];
    int64_t counts[2] = {LATE_BYTES, LATE_BYTES}, offsets[2] = {0, LATE_BYTES};
    struct comm_request request;
    double begin = clock_seconds();
    TRY(comm->ops->all_gather(comm, send, recv, counts, offsets, &request));
    took[2 * comm->rank] = clock_seconds() - begin;
    TRY(comm->ops->wait(comm, &request));
    took[2 * comm->rank + 1] = clock_seconds() - begin;
    return STATUS_OK;
}

/* Starting takes no time, waiting what the delay asks for: 0.05 to 0.15 s of latency, and 4000 bytes at 40 kB/s. */
static void test_delay(void **state) {
    (void)state;
    double took[4];
    const struct comm_threads_faults slow = {.seed = 3, .latency_s = 0.1}, narrow = {.bytes_per_s = 40000};
    assert_int_equal(comm_threads_run_with(2, &slow, exchange_late, took), STATUS_OK);
    assert_true(took[0] < 0.05 && took[2] < 0.05);
    assert_true(took[1] >= 0.05 && took[3] >= 0.05);
    assert_int_equal(comm_threads_run_with(2, &narrow, exchange_late, took), STATUS_OK);
    assert_true(took[0] < 0.05 && took[1] >= 0.1 && took[3] >= 0.1);
}

/* Who waits computes meanwhile: a transfer of 0.1 s hides behind 0.2 s, and the wait is short. */
static enum status compute_meanwhile(void *context, struct comm *comm) {
    double *took = context;
    char send[LATE_BYTES] = {1}, recv[2 * LATE_BYTES];
    int64_t counts[2] = {LATE_BYTES, LATE_BYTES}, offsets[2] = {0, LATE_BYTES};
    struct comm_request request;
    TRY(comm->ops->all_gather(comm, send, recv, counts, offsets, &request));
    usleep(200000);
    double begin = clock_seconds();
    TRY(comm->ops->wait(comm, &request));
    took[comm->rank] = clock_seconds() - begin;
    return STATUS_OK;
}

static void test_progress(void **state) {
    (void)state;
    double took[2];
    const struct comm_threads_faults narrow = {.bytes_per_s = 40000};
    assert_int_equal(comm_threads_run_with(2, &narrow, compute_meanwhile, took), STATUS_OK);
    assert_true(took[0] < 0.05 && took[1] < 0.05);
}

/* Death at every call of a run that uses several communicators: never a hang, never a wrong number, and the one that is
 * gone is named. */
static enum status several(void *context, struct comm *comm) {
    (void)context;
    TRY(case_splits(comm));
    TRY(case_helpers(comm));
    return case_out_of_order(comm);
}

static void test_death(void **state) {
    (void)state;
    int64_t survived = 0;
    for (int64_t call = 1; call < 400 && survived < 2; call += 1 + call / 8) {
        const struct comm_threads_faults faults = {.dying_rank = (int)(call % 4), .dying_call = call};
        double begin = clock_seconds();
        enum status status = comm_threads_run_with(4, &faults, several, NULL);
        assert_true(clock_seconds() - begin < 5);
        if (status == STATUS_OK) {
            survived++;
            continue;
        }
        char expected[32];
        snprintf(expected, sizeof expected, "rank %d is gone", (int)(call % 4));
        assert_int_equal(status, STATUS_PEER);
        if (strncmp(status_text(), expected, strlen(expected)) != 0)
            fail_msg("call %lld: %s", (long long)call, status_text());
    }
    assert_true(survived > 0); /* the loop went past the last call */
}

struct seen {
    enum status status[4];
    char text[4][64];
    double took[4];
};

/* Rank 2 ends early; rank 3 has nothing to do with it and finishes. */
static enum status one_is_gone(void *context, struct comm *comm) {
    struct seen *seen = context;
    if (comm->rank == 2)
        return status_fail(STATUS_IO, "cannot read");
    char send[4] = {0}, recv[4];
    int64_t counts[4] = {0}, offsets[4] = {0, 1, 2, 3};
    struct comm_request request;
    if (comm->rank < 2)
        counts[0] = counts[1] = counts[2] = 1;
    else
        counts[3] = 1;
    double begin = clock_seconds();
    TRY(comm->ops->all_to_all(comm, send, counts, offsets, recv, counts, offsets, &request));
    seen->status[comm->rank] = comm->ops->wait(comm, &request);
    seen->took[comm->rank] = clock_seconds() - begin;
    snprintf(seen->text[comm->rank], sizeof seen->text[0], "%s", status_text());
    return seen->status[comm->rank];
}

static void test_one_is_gone(void **state) {
    (void)state;
    struct seen seen = {0};
    assert_int_equal(comm_threads_run(4, one_is_gone, &seen), STATUS_IO);
    assert_string_equal(status_text(), "cannot read");
    assert_int_equal(seen.status[3], STATUS_OK);
    for (int r = 0; r < 2; r++) {
        assert_int_equal(seen.status[r], STATUS_PEER);
        assert_string_equal(seen.text[r], "rank 2 is gone");
        assert_true(seen.took[r] < 1);
    }
}

/* Who waits for one that failed on account of another names that other. */
static enum status chain(void *context, struct comm *comm) {
    struct seen *seen = context;
    int64_t counts[3] = {0}, offsets[3] = {0, 1, 2};
    char send[3] = {0}, recv[3];
    struct comm_request request;
    if (comm->rank == 0)
        return status_fail(STATUS_IO, "cannot read");
    counts[comm->rank - 1] = 1;
    if (comm->rank == 1)
        counts[2] = 1;
    TRY(comm->ops->all_to_all(comm, send, counts, offsets, recv, counts, offsets, &request));
    if (comm->rank == 1)
        usleep(20000);
    seen->status[comm->rank] = comm->ops->wait(comm, &request);
    snprintf(seen->text[comm->rank], sizeof seen->text[0], "%s", status_text());
    return seen->status[comm->rank];
}

static void test_chain(void **state) {
    (void)state;
    struct seen seen = {0};
    const struct comm_threads_faults slow = {.latency_s = 0.5};
    assert_int_equal(comm_threads_run_with(3, &slow, chain, &seen), STATUS_IO);
    for (int r = 1; r < 3; r++) {
        assert_int_equal(seen.status[r], STATUS_PEER);
        assert_string_equal(seen.text[r], "rank 0 is gone");
    }
}

/* The worst status and its message reach the caller's thread. */
static enum status fail_differently(void *context, struct comm *comm) {
    (void)context;
    if (comm->rank == 1)
        return status_fail(STATUS_MEMORY, "one");
    return comm->rank == 2 ? status_fail(STATUS_IO, "two") : STATUS_OK;
}

static void test_worst(void **state) {
    (void)state;
    assert_int_equal(comm_threads_run(4, fail_differently, NULL), STATUS_MEMORY);
    assert_string_equal(status_text(), "one");
}

/* Counts that do not match, and different functions: abort with both numbers. */
static enum status mismatch(void *context, struct comm *comm) {
    const bool *functions = context;
    int64_t counts[2] = {4, 4}, offsets[2] = {0, 8}, expected[2] = {4, 4 + 3 * (comm->rank == 1)};
    char send[16] = {0}, recv[16];
    struct comm_request request;
    expected[comm->rank] = 4;
    if (comm->rank == 1)
        expected[0] = 7;
    if (*functions && comm->rank == 1)
        TRY(comm->ops->all_gather(comm, send, recv, counts, offsets, &request));
    else
        TRY(comm->ops->all_to_all(comm, send, counts, offsets, recv, expected, offsets, &request));
    return comm->ops->wait(comm, &request);
}

static void expect_abort(bool functions, const char *expected) {
    int ends[2];
    char line[512] = "";
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    if (child == 0) {
        signal(SIGABRT, SIG_DFL);
        dup2(ends[1], 2);
        _exit(comm_threads_run(2, mismatch, &functions) == STATUS_OK ? 0 : 1);
    }
    close(ends[1]);
    for (ssize_t at = 0, got; (got = read(ends[0], line + at, sizeof line - 1 - (size_t)at)) > 0;)
        at += got;
    close(ends[0]);
    int how;
    assert_int_equal(waitpid(child, &how, 0), child);
    assert_true(WIFSIGNALED(how) && WTERMSIG(how) == SIGABRT);
    if (!strstr(line, expected))
        fail_msg("%s", line);
}

static void test_mismatch(void **state) {
    (void)state;
    expect_abort(false, "what rank 0 sends == what rank 1 expects of it does not hold (4, 7)");
    expect_abort(true, "on another does not hold");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_cases_self), cmocka_unit_test(test_cases_threads), cmocka_unit_test(test_cases_delayed),
        cmocka_unit_test(test_delay),      cmocka_unit_test(test_progress),      cmocka_unit_test(test_death),
        cmocka_unit_test(test_one_is_gone), cmocka_unit_test(test_chain),        cmocka_unit_test(test_worst),
        cmocka_unit_test(test_mismatch),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
