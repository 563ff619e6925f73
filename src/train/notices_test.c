/* All learn the same, after the same steps, and nobody waits for what is younger. */
#include "train/notices.h"

#include "base/random.h"
#include "comm/threads/comm_threads.h"
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

enum { STEPS = 40, SEED = 3 };

struct timing {
    int64_t interval, delay;
};

static uint32_t flag_of(int rank, int64_t step) {
    uint64_t bits = random_bits(SEED, (uint64_t)rank, (uint64_t)step);
    return bits % 4 == 0 ? (uint32_t)(bits >> 8) & 7 : 0;
}

/* After `step`, where `first` was the first one since nothing was under way. */
static enum status expect(const struct comm *comm, const struct timing *timing, int64_t first, int64_t step,
                          const struct notice *notice) {
    int64_t told = step - timing->delay;
    bool is_new = told >= first && told % timing->interval == 0;
    uint32_t flags = 0;
    for (int r = 0; r < comm->size && is_new; r++)
        flags |= flag_of(r, told);
    if (notice->is_new == is_new && notice->flags == flags && notice->told_step == (is_new ? told : 0))
        return STATUS_OK;
    return status_fail(STATUS_FORMAT, "every %lld, delay %lld, step %lld: %u of step %lld", (long long)timing->interval,
                       (long long)timing->delay, (long long)step, notice->flags, (long long)notice->told_step);
}

/* Whether something that was told from `first` on is not known after `last`. */
static bool is_under_way(const struct timing *timing, int64_t first, int64_t last) {
    for (int64_t step = first; step <= last; step++)
        if (step % timing->interval == 0 && step + timing->delay > last)
            return true;
    return false;
}

static enum status run_steps(struct notices *notices, const struct timing *timing, int64_t first) {
    for (int64_t step = first; step < first + STEPS; step++) {
        struct notice notice;
        TRY(notices_exchange(notices, step, flag_of(notices->comm->rank, step), &notice));
        TRY(expect(notices->comm, timing, first, step, &notice));
        if (notices_are_under_way(notices) != is_under_way(timing, first, step))
            return status_fail(STATUS_FORMAT, "every %lld, delay %lld, step %lld: under way or not?",
                               (long long)timing->interval, (long long)timing->delay, (long long)step);
    }
    return notices_drain(notices);
}

static enum status run(void *context, struct comm *comm) {
    const struct timing *timing = context;
    struct notices notices;
    enum status status = notices_init(&notices, comm, timing->interval, timing->delay);
    for (int64_t first = 1; first <= 13 && status == STATUS_OK; first += 6) /* a resume, or a return to a checkpoint */
        status = run_steps(&notices, timing, 14 - first);
    notices_release(&notices);
    return status;
}

static void test_timings(void **state) {
    (void)state;
    struct comm_threads_faults slow = {.seed = 5, .latency_s = 0.001};
    for (int size = 1; size <= 4; size++)
        for (struct timing timing = {1, 0}; timing.interval <= 5; timing.interval++)
            for (timing.delay = 0; timing.delay <= 5; timing.delay++)
                if (comm_threads_run_with(size, &slow, run, &timing) != STATUS_OK)
                    fail_msg("%s", status_text());
}

int main(void) {
    static const struct CMUnitTest tests[] = {cmocka_unit_test(test_timings)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
