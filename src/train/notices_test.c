/* All learn the same, after the same exchange, and nobody waits for what is younger. */
#include "train/notices.h"

#include "base/random.h"
#include "comm/threads/comm_threads.h"
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

enum { EXCHANGES = 40, SEED = 3 };

static uint32_t flag_of(int rank, int64_t exchange) {
    uint64_t bits = random_bits(SEED, (uint64_t)rank, (uint64_t)exchange);
    return bits % 4 == 0 ? (uint32_t)(bits >> 8) & 7 : 0;
}

static enum status expect(const struct comm *comm, int64_t exchange, int delay, uint32_t known) {
    uint32_t expected = 0;
    for (int r = 0; r < comm->size && exchange >= delay; r++)
        expected |= flag_of(r, exchange - delay);
    return known == expected ? STATUS_OK
                             : status_fail(STATUS_FORMAT, "delay %d, exchange %lld: %u, not %u", delay,
                                           (long long)exchange, known, expected);
}

static enum status run(void *context, struct comm *comm) {
    const int *delay = context;
    struct notices notices;
    uint32_t known;
    TRY(notices_init(&notices, comm, *delay));
    for (int round = 0; round < 2; round++) {
        for (int64_t i = 0; i < EXCHANGES; i++) {
            TRY(notices_exchange(&notices, flag_of(comm->rank, i), &known));
            TRY(expect(comm, i, *delay, known));
        }
        if (notices_are_under_way(&notices) != (*delay > 0))
            return status_fail(STATUS_FORMAT, "delay %d: under way or not?", *delay);
        TRY(notices_drain(&notices)); /* and again from the beginning */
    }
    notices_release(&notices);
    return STATUS_OK;
}

static void test_delays(void **state) {
    (void)state;
    struct comm_threads_faults slow = {.seed = 5, .latency_s = 0.002};
    for (int size = 1; size <= 4; size++)
        for (int delay = 0; delay <= 5; delay++)
            if (comm_threads_run_with(size, &slow, run, &delay) != STATUS_OK)
                fail_msg("%s", status_text());
}

int main(void) {
    static const struct CMUnitTest tests[] = {cmocka_unit_test(test_delays)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
