#include "comm/mpi/pulse.h"

#include "base/clock.h"
#include "base/memory.h"
#include <math.h>
#include <stdlib.h>
#include <time.h>

static const double BEATS_A_LIMIT = 8, BEAT_MOST_S = 2; /* words within the limit; at least one in so long */
static const double LOOKS_A_BEAT = 4;
static const double WORK_SHARE = 0.01;  /* of a processor: less than that between two words is not work */
static const double QUIET_S = 5;        /* how long one that was stopped leaves the talking to the others */

enum { TELL_LOOKS = 1000 };

static double processor_seconds(void) {
    struct timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

enum status pulse_open(struct pulse *pulse, MPI_Comm world) {
    *pulse = (struct pulse){.due_s = HUGE_VAL, .receiving = MPI_REQUEST_NULL, .woke_s = -HUGE_VAL, .told_gone = -1};
    if (MPI_Comm_dup(world, &pulse->comm) != MPI_SUCCESS)
        return status_fail(STATUS_PEER, "MPI cannot duplicate its world");
    MPI_Comm_set_errhandler(pulse->comm, MPI_ERRORS_RETURN);
    MPI_Comm_rank(world, &pulse->rank);
    MPI_Comm_size(world, &pulse->size);
    TRY(memory_alloc(&pulse->peers, (size_t)pulse->size, sizeof *pulse->peers));
    for (int r = 0; r < pulse->size; r++)
        pulse->peers[r].sending = MPI_REQUEST_NULL;
    return STATUS_OK;
}

/* What was heard before counts no more. */
static void count_anew(struct pulse *pulse, double now_s) {
    for (int r = 0; r < pulse->size; r++) {
        pulse->peers[r].heard_s = now_s;
        pulse->peers[r].idle_s = 0;
    }
    pulse->busy_s = now_s;
}

void pulse_set_limit(struct pulse *pulse, double limit_s) {
    double now_s = clock_seconds();
    pulse->limit_s = limit_s;
    pulse->beat_s = fmin(limit_s / BEATS_A_LIMIT, BEAT_MOST_S);
    pulse->next_beat_s = pulse->looked_s = now_s;
    pulse->processor_s = processor_seconds();
    count_anew(pulse, now_s);
    pulse->due_s = limit_s > 0 ? now_s : HUGE_VAL;
}

void pulse_note(struct pulse *pulse, int rank, double now_s) {
    pulse->peers[rank].heard_s = now_s;
}

/* All words that have arrived. Returns false where MPI fails: then its errors tell more than silence does. */
static bool take_in(struct pulse *pulse, double now_s) {
    for (;;) {
        MPI_Status status;
        int arrived = 0;
        if (pulse->receiving == MPI_REQUEST_NULL &&
            MPI_Irecv(&pulse->arriving, 1, MPI_DOUBLE, MPI_ANY_SOURCE, 0, pulse->comm, &pulse->receiving) != MPI_SUCCESS)
            return false;
        if (MPI_Test(&pulse->receiving, &arrived, &status) != MPI_SUCCESS)
            return false;
        if (!arrived)
            return true;
        pulse->peers[status.MPI_SOURCE].heard_s = now_s;
        if (pulse->arriving < 0)
            pulse->told_gone = (int)(-1 - pulse->arriving);
        else
            pulse->peers[status.MPI_SOURCE].idle_s = pulse->arriving;
    }
}

/* A word to everybody to whom none is still on its way. */
static bool send_words(struct pulse *pulse, double idle_s) {
    for (int r = 0; r < pulse->size; r++) {
        struct pulse_peer *peer = &pulse->peers[r];
        int sent = 1;
        if (r == pulse->rank)
            continue;
        if (peer->sending != MPI_REQUEST_NULL && MPI_Test(&peer->sending, &sent, MPI_STATUS_IGNORE) != MPI_SUCCESS)
            return false;
        if (!sent)
            continue;
        peer->word = idle_s;
        if (MPI_Isend(&peer->word, 1, MPI_DOUBLE, r, 0, pulse->comm, &peer->sending) != MPI_SUCCESS)
            return false;
    }
    return true;
}

/* For how long this process has neither worked nor waited for others. */
static double measure_idleness(struct pulse *pulse, double now_s, bool waits) {
    double processor_s = processor_seconds();
    if (waits || processor_s - pulse->processor_s > WORK_SHARE * pulse->beat_s)
        pulse->busy_s = now_s;
    pulse->processor_s = processor_s;
    return now_s - pulse->busy_s;
}

bool pulse_look(struct pulse *pulse, double now_s, bool waits) {
    bool works = true;
    double gap_s = now_s - pulse->looked_s;
    if (gap_s > pulse->limit_s / 2) /* this process did not run: it is no judge of the others */
        count_anew(pulse, now_s);
    if (gap_s > pulse->limit_s)
        pulse->woke_s = now_s;
    works = take_in(pulse, now_s);
    if (works && now_s >= pulse->next_beat_s) {
        works = send_words(pulse, measure_idleness(pulse, now_s, waits));
        pulse->next_beat_s = now_s + pulse->beat_s;
    }
    pulse->looked_s = now_s;
    pulse->due_s = works ? now_s + pulse->beat_s / LOOKS_A_BEAT : HUGE_VAL;
    bool lost = false;
    for (int r = 0; r < pulse->size && works; r++)
        lost = lost || pulse_is_silent(pulse, r, now_s) || (waits && pulse_hangs(pulse, r));
    return lost;
}

bool pulse_is_silent(const struct pulse *pulse, int rank, double now_s) {
    return rank != pulse->rank && now_s - pulse->peers[rank].heard_s > pulse->limit_s;
}

bool pulse_hangs(const struct pulse *pulse, int rank) {
    return rank != pulse->rank && pulse->peers[rank].idle_s > PULSE_HANG_FACTOR * pulse->limit_s;
}

bool pulse_was_stopped(const struct pulse *pulse) {
    double now_s = clock_seconds();
    return pulse->due_s < HUGE_VAL && (now_s - pulse->looked_s > pulse->limit_s || now_s - pulse->woke_s < QUIET_S);
}

void pulse_tell_gone(struct pulse *pulse, int rank, int gone) {
    MPI_Request request;
    int sent = 0;
    pulse->gone_word = -1 - (double)gone;
    if (pulse->limit_s <= 0 || MPI_Isend(&pulse->gone_word, 1, MPI_DOUBLE, rank, 0, pulse->comm, &request) != MPI_SUCCESS)
        return;
    for (int i = 0; i < TELL_LOOKS && !sent; i++) /* nobody will call MPI after this */
        if (MPI_Test(&request, &sent, MPI_STATUS_IGNORE) != MPI_SUCCESS)
            return;
}

bool pulse_was_told(struct pulse *pulse, double now_s) {
    if (pulse->limit_s > 0 && !take_in(pulse, now_s))
        return false;
    return pulse->told_gone >= 0;
}

void pulse_close(struct pulse *pulse) {
    if (pulse->receiving != MPI_REQUEST_NULL) {
        MPI_Cancel(&pulse->receiving);
        MPI_Wait(&pulse->receiving, MPI_STATUS_IGNORE);
    }
    for (int r = 0; r < pulse->size; r++)
        if (pulse->peers[r].sending != MPI_REQUEST_NULL)
            MPI_Request_free(&pulse->peers[r].sending);
    MPI_Comm_free(&pulse->comm);
    free(pulse->peers);
}
