/* Loops over threads: every task once, whoever runs it, with threads that sleep, come late, or belong to somebody else. */
#include "base/threads.h"

#include <dirent.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <cmocka.h>

enum { TASKS_MOST = 1000, OWNERS = 4 };

struct loop {
    _Atomic int runs[TASKS_MOST]; /* of each task */
    _Atomic bool index_was_wrong;
    int thread_most;
    int64_t nested; /* tasks of a loop within each task; 0: none */
    long pause_ns;  /* in each task */
};

static void sleep_for(long ns) {
    nanosleep(&(struct timespec){0, ns}, NULL);
}

struct nested {
    pthread_t caller;
    _Atomic int64_t here; /* tasks on the calling thread */
};

static void count_nested(void *context, int64_t index) {
    struct nested *nested = context;
    (void)index;
    nested->here += pthread_equal(pthread_self(), nested->caller) != 0;
}

static void run_task(void *context, int64_t index) {
    struct loop *loop = context;
    struct nested nested = {.caller = pthread_self()};
    loop->runs[index]++;
    if (thread_index() < 0 || thread_index() >= loop->thread_most)
        loop->index_was_wrong = true;
    if (loop->nested > 0)
        parallel_for(loop->nested, count_nested, &nested);
    if (nested.here != loop->nested)
        loop->index_was_wrong = true;
    if (loop->pause_ns > 0)
        sleep_for(loop->pause_ns);
}

static bool ran_once(const struct loop *loop, int64_t task_count) {
    for (int64_t i = 0; i < TASKS_MOST; i++)
        if (loop->runs[i] != (i < task_count))
            return false;
    return !loop->index_was_wrong;
}

static void test_every_task_runs_once(void **state) {
    (void)state;
    struct loop *loop = malloc(sizeof *loop);
    for (int threads = 1; threads <= 9; threads += 2)
        for (int64_t tasks = 0; tasks <= TASKS_MOST; tasks = 3 * tasks / 2 + 1) {
            memset(loop, 0, sizeof *loop);
            threads_set_count(threads);
            loop->thread_most = threads;
            loop->nested = tasks > 1 ? tasks % 3 * 40 : 0;
            parallel_for(tasks, run_task, loop);
            assert_true(ran_once(loop, tasks));
            assert_int_equal(thread_index(), 0);
        }
    free(loop);
}

/* Loops that follow each other at once, and with the others asleep. */
static void test_many_loops(void **state) {
    (void)state;
    struct loop *loop = malloc(sizeof *loop);
    threads_set_count(4);
    for (int i = 0; i < 20000; i++) {
        int64_t tasks = 2 + i % 7;
        memset(loop, 0, sizeof *loop);
        loop->thread_most = 4;
        loop->pause_ns = i % 5000 == 0 ? 1000000 : 0;
        if (i % 1000 == 0)
            sleep_for(1000000);
        parallel_for(tasks, run_task, loop);
        if (!ran_once(loop, tasks))
            fail_msg("loop %d", i);
    }
    free(loop);
}

static int some_owner;

static void *own_loops(void *context) {
    struct loop *loop = calloc(1, sizeof *loop);
    bool good = true;
    for (int i = 0; i < 200 && good; i++) {
        memset(loop, 0, sizeof *loop);
        loop->thread_most = waiting_threads_count();
        parallel_for_waiting(50, run_task, loop);
        good = ran_once(loop, 50);
    }
    free(loop);
    return good ? context : NULL;
}

static int threads_of_process(void) {
    int count = 0;
    DIR *tasks = opendir("/proc/self/task");
    for (const struct dirent *entry; tasks && (entry = readdir(tasks)) != NULL;)
        count += entry->d_name[0] != '.';
    if (tasks)
        closedir(tasks);
    return count;
}

/* One that was joined may stand in the list for a moment. */
static bool has_threads(int count) {
    for (int i = 0; i < 1000 && threads_of_process() != count; i++)
        sleep_for(1000000);
    return threads_of_process() == count;
}

/* Each thread that runs loops has threads of its own, which end with it. */
static void test_several_owners(void **state) {
    (void)state;
    pthread_t owner[OWNERS];
    void *good;
    threads_set_count(2);
    int before = threads_of_process();
    for (int i = 0; i < OWNERS; i++)
        assert_int_equal(pthread_create(&owner[i], NULL, own_loops, &some_owner), 0);
    for (int i = 0; i < OWNERS; i++) {
        assert_int_equal(pthread_join(owner[i], &good), 0);
        assert_non_null(good);
    }
    assert_true(has_threads(before));
}

/* One that no loop wants would be woken by every loop. Kinds of loops do not share. */
static void *shrink(void *context) {
    struct loop *loop = calloc(1, sizeof *loop);
    int before = threads_of_process();
    bool good = true;
    loop->thread_most = 8;
    threads_set_count(6);
    parallel_for(10, run_task, loop);
    good = good && has_threads(before + 5);
    threads_set_count(2);
    parallel_for(10, run_task, loop);
    good = good && has_threads(before + 1);
    parallel_for_waiting(10, run_task, loop);
    good = good && has_threads(before + 1 + waiting_threads_count() - 1);
    free(loop);
    return good ? context : NULL;
}

static void test_no_threads_that_no_loop_wants(void **state) {
    (void)state;
    pthread_t owner;
    void *good;
    assert_int_equal(pthread_create(&owner, NULL, shrink, &some_owner), 0);
    assert_int_equal(pthread_join(owner, &good), 0);
    assert_non_null(good);
}

struct held {
    _Atomic int started, left;
    _Atomic bool go_on;
};

/* The first task that another thread takes holds it until the loop is over for everybody else. */
static void hold_others(void *context, int64_t index) {
    struct held *held = context;
    (void)index;
    if (thread_index() != 0 && atomic_fetch_add(&held->started, 1) == 0)
        while (!held->go_on)
            sleep_for(10000);
    if (atomic_fetch_sub(&held->left, 1) == 2) /* all but the one that is held */
        held->go_on = true;
}

/* A thread that does not get on holds its one task, not the loop: the others' are done by the rest. */
static void test_a_slow_thread(void **state) {
    (void)state;
    threads_set_count(3);
    for (int i = 0; i < 50; i++) {
        struct held held = {.left = 40};
        parallel_for(40, hold_others, &held);
        assert_int_equal(held.left, 0);
    }
}

/* Sums in any number of threads: the same, for tasks write what is theirs. */
static void square(void *context, int64_t index) {
    ((int64_t *)context)[index] = index * index;
}

static void test_results_are_there(void **state) {
    (void)state;
    int64_t results[100];
    for (int i = 0; i < 3000; i++) {
        threads_set_count(2 + i % 3);
        memset(results, 0xFF, sizeof results);
        parallel_for(100, square, results);
        for (int64_t k = 0; k < 100; k++)
            assert_int_equal(results[k], k * k);
    }
}

struct counted {
    int64_t count;
    _Atomic int64_t runs, beyond;
};

static void count_run(void *context, int64_t index) {
    struct counted *counted = context;
    counted->runs++;
    if (index >= counted->count)
        counted->beyond++;
}

/* Who comes late to a short loop takes no task of the longer one that is being made. */
static void test_short_and_long_loops(void **state) {
    (void)state;
    struct counted few = {.count = 2}, many = {.count = 30};
    threads_set_count(4);
    for (int i = 1; i <= 100000; i++) {
        parallel_for(few.count, count_run, &few);
        parallel_for(many.count, count_run, &many);
        if (few.runs != 2 * i || many.runs != 30 * i || few.beyond + many.beyond > 0)
            fail_msg("loop %d: %d, %d tasks", i, (int)few.runs, (int)many.runs);
    }
}

/* Run at the end of the program below, after what the loops themselves leave to be done then. */
static void end_by_threads_left(void) {
    _exit(has_threads(1) ? 0 : 3);
}

/* The first test: a child has none of the threads that its parent has started. */
static void test_threads_end_with_the_program(void **state) {
    (void)state;
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        int64_t results[100];
        atexit(end_by_threads_left);
        threads_set_count(4);
        parallel_for(100, square, results);
        parallel_for_waiting(100, square, results);
        if (!has_threads(1 + 3 + waiting_threads_count() - 1))
            _exit(2);
        exit(1);
    }
    int ended;
    assert_int_equal(waitpid(child, &ended, 0), child);
    assert_true(WIFEXITED(ended));
    assert_int_equal(WEXITSTATUS(ended), 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_threads_end_with_the_program),
        cmocka_unit_test(test_every_task_runs_once), cmocka_unit_test(test_many_loops),
        cmocka_unit_test(test_several_owners),       cmocka_unit_test(test_no_threads_that_no_loop_wants),
        cmocka_unit_test(test_a_slow_thread),        cmocka_unit_test(test_results_are_there),
        cmocka_unit_test(test_short_and_long_loops),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
