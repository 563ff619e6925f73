/* Who the ranks are, noticing at once that one on this host is gone, and ending those that do not answer. */
#pragma once

#include "comm/mpi/engine.h"
#include <sched.h>
#include <stdatomic.h>

struct peer {
    int32_t pid;
    uint64_t host_id, pid_space; /* the running system, and the space in which its pid means something */
    char host[64];
    cpu_set_t processors[8]; /* 8,192 of them: a system that knows more than a set has does not fill it */
};

struct watch {
    struct engine *engine;
    struct peer *peers; /* [size] in rank order */
    struct pollfd *polled; /* [size + 1] a handle of each process that can be watched, and what wakes the thread */
    void (*lost)(const char *line);
    atomic_bool told;    /* a rank was lost, and one of the remaining ranks says so */
    atomic_bool leaving; /* the ranks take leave: one that is gone has perhaps but gone first */
    atomic_bool over;
    _Atomic double limit_s; /* how long this process may still take when all is lost; 0: as long as it does */
    bool *_Atomic silent; /* [size] ranks that do not answer; NULL while all do */
    bool handles_termination;
    pthread_t thread;
};

/* What this process tells the others. */
void peer_describe_self(struct peer *self);

/* "rank 3 (pid 1234 on host x)" */
void peer_print(const struct peer *peers, int rank, char *text, size_t bytes);

/* Watch the peers [size] until watch_close. Takes over SIGTERM where nobody handles it yet: it still ends the process,
 * but a starter that ends the others because one is gone leaves them the time to say which. One watch a process. */
enum status watch_open(struct watch *watch, struct engine *engine, struct peer *peers, void (*lost)(const char *line)) MUST_USE;
void watch_close(struct watch *watch);

/* All is lost, somebody has found: this process ends within the limit, whatever it is waiting for. */
void watch_note_broken(void);

/* SIGTERM came, and another handler than the watch's has it. Whoever is gone from now on was perhaps ended by the starter, which
 * knows the cause: this process does not tell of it. From a signal handler, too. */
void watch_note_termination(void);

/* The ranks[size] that are true do not answer, as `line` says: the lowest of the others tells. A moment later, when all others
 * have seen it, too, those on this host are killed, and after WATCH_SILENCE_S at most this process ends, whatever it computes. */
void watch_give_up(struct watch *watch, const bool *ranks, const char *line);
extern const double WATCH_SILENCE_S, WATCH_KILL_S;
