/* Signs of life. Every rank sends every other a word a few times within the limit, from whatever thread drives MPI, so also
 * while its training thread computes; a rank from which neither a word nor data came for the limit is silent: its process
 * is stopped or starved, its machine is down, or the link to it is dead. TCP alone would say so after minutes, or never.
 *
 * A word also carries for how long the sender's training thread has neither computed nor waited for others: one that sits
 * in a system call that does not end (a hung disk) is told by that, at HANG_FACTOR times the limit.
 *
 * The third use: a rank that has told that another is gone lets the other hosts know, whose ranks the starter ends in the next
 * moment, so that they do not take that for the cause.
 *
 * A rank that was itself not running for a while knows nothing of the others: it counts anew. So a job of which all
 * processes were stopped, and continued, goes on.
 */
#pragma once

#include "base/status.h"
#include <mpi.h>
#include <stdatomic.h>
#include <stdbool.h>

enum { PULSE_HANG_FACTOR = 10 };

struct pulse_peer {
    double heard_s; /* clock_seconds of the last sign of life */
    double idle_s;  /* what its last word said */
    double word;    /* on its way to it */
    MPI_Request sending;
};

struct pulse {
    MPI_Comm comm; /* its own: words are never matched with data */
    int rank, size;
    _Atomic double limit_s;
    double beat_s, next_beat_s;
    double busy_s, processor_s; /* when this process was last seen to work, and its processor time then */
    double arriving;            /* the next word */
    MPI_Request receiving;
    double gone_word;         /* on its way to all whom it concerns */
    int told_gone;            /* a rank that another one told is gone; -1: none */
    struct pulse_peer *peers; /* [size] */
    _Atomic double due_s;     /* when to look next; HUGE_VAL: never */
    _Atomic double looked_s, woke_s; /* the last look, and the last one that came much too late */
};

/* Collective over `world`. Without a limit yet: nothing is sent. */
enum status pulse_open(struct pulse *pulse, MPI_Comm world) MUST_USE;

/* Not collective. Seconds without a sign of life after which a rank is silent; 0: nothing is sent or judged from now on. */
void pulse_set_limit(struct pulse *pulse, double limit_s);

/* Something of rank `rank` arrived. */
void pulse_note(struct pulse *pulse, int rank, double now_s);

/* To be called once due_s is over, by who may call MPI: takes in words and sends those that are due. waits: somebody here
 * waits for others. Returns whether a rank is lost. */
bool pulse_look(struct pulse *pulse, double now_s, bool waits) MUST_USE;

/* Whether `rank` is silent, or hangs. */
bool pulse_is_silent(const struct pulse *pulse, int rank, double now_s);
bool pulse_hangs(const struct pulse *pulse, int rank);

/* Whether this process itself was stopped for longer than the limit until a moment ago: the others have given it up, and
 * have said so. */
bool pulse_was_stopped(const struct pulse *pulse);

/* By who may call MPI: this rank has told that `gone` is gone; let `rank` know, and wait for nothing. */
void pulse_tell_gone(struct pulse *pulse, int rank, int gone);

/* By who may call MPI: whether another rank has told that one is gone. Takes in what has arrived. */
bool pulse_was_told(struct pulse *pulse, double now_s);

/* Collective, with nothing under way any more and no limit. */
void pulse_close(struct pulse *pulse);
