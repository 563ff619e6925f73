/* The model of a device finds what a device would pass over in silence, or hang at: small kernels, each right, then with one fault.
 * A launch has one of three moods, so each is launched three times and the fault is told in one of them at least. Some faults
 * only show in the numbers. */
#include "device/cuda/model_faults.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#ifdef CADRE_CUDA_MODEL

enum { LAUNCHES = 3, WRONG_NUMBERS = 3 };

/* In a process of its own: how it ended, and what it said. */
static int run_alone(int number, bool wrong, char *said, size_t bytes) {
    int ends[2], how;
    assert_int_equal(pipe(ends), 0);
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        bool right = true;
        dup2(ends[1], STDERR_FILENO);
        for (int i = 0; i < LAUNCHES; i++)
            right = model_fault_run(number, wrong) && right;
        _exit(right ? 0 : WRONG_NUMBERS);
    }
    close(ends[1]);
    size_t count = 0;
    for (ssize_t got; (got = read(ends[0], said + count, bytes - 1 - count)) > 0;)
        count += (size_t)got;
    said[count] = '\0';
    close(ends[0]);
    assert_int_equal(waitpid(child, &how, 0), child);
    return how;
}

static void test_faults_are_told(void **state) {
    (void)state;
    static char said[1 << 16];
    const struct model_fault *faults = model_faults();
    int failures = 0, number = 0;
    for (; faults[number].what; number++) {
        int how = run_alone(number, false, said, sizeof said);
        if (!WIFEXITED(how) || WEXITSTATUS(how) != 0) {
            print_error("%s: the right kernel ended with %d: %s\n", faults[number].what, how, said);
            failures++;
        }
        if (number == 0)
            continue;
        how = run_alone(number, true, said, sizeof said);
        bool shows = faults[number].told[0] ? WIFSIGNALED(how) && strstr(said, faults[number].told)
                                            : WIFEXITED(how) && WEXITSTATUS(how) == WRONG_NUMBERS;
        if (!shows) {
            print_error("%s: not found (%d): %s\n", faults[number].what, how, said);
            failures++;
        }
    }
    assert_true(number > 20);
    assert_int_equal(failures, 0);
}

#else

static void test_faults_are_told(void **state) {
    (void)state;
    printf("not exercised here: no model of a device in this build\n");
}

#endif

int main(void) {
    static const struct CMUnitTest tests[] = {cmocka_unit_test(test_faults_are_told)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
