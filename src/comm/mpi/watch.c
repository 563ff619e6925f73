/* A thread sleeps on handles of the other processes of this host, which the system wakes at the moment one ends: no polling,
 * and sooner than any starter reacts. Where the system has no such handles it asks for the pids a few times a second.
 * Ranks on other hosts show as errors of MPI, and to their own host's ranks. Ranks that are there and do not answer are found
 * by the engine (pulse.h) on every rank at about the same time. */
#include "comm/mpi/watch.h"

#include "base/clock.h"
#include "base/hash.h"
#include "base/memory.h"
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { ASK_MS = 200, LEAVING_MS = 300, TERMINATION_MS = 300, WORD_NS = 120000000 };
static const double STARTER_S = 0.25; /* who is gone so long after SIGTERM was perhaps ended by the starter; who before, was not */
static const double STARTER_MOST_S = 10; /* and so long after it, it was somebody else who asked to save and leave */
enum { STARTER_MS = 2500 }; /* after that a starter that should have ended is killed */
const double WATCH_KILL_S = 1, WATCH_SILENCE_S = 2.5;

/* ---- who is who -------------------------------------------------------------------------------------------------------- */

static void read_line(const char *path, char *text, size_t bytes) {
    FILE *file = fopen(path, "r");
    if (!file || !fgets(text, (int)bytes, file))
        text[0] = 0;
    if (file)
        fclose(file);
}

void peer_describe_self(struct peer *self) {
    char boot[128];
    struct stat space;
    memset(self, 0, sizeof *self);
    self->pid = getpid();
    gethostname(self->host, sizeof self->host - 1);
    read_line("/proc/sys/kernel/random/boot_id", boot, sizeof boot);
    if (!boot[0])
        snprintf(boot, sizeof boot, "%s", self->host);
    self->host_id = hash_bytes(boot, strlen(boot), 0);
    self->pid_space = stat("/proc/self/ns/pid", &space) == 0 ? (uint64_t)space.st_ino : 0;
    sched_getaffinity(0, sizeof self->processors, self->processors);
}

void peer_print(const struct peer *peers, int rank, char *text, size_t bytes) {
    snprintf(text, bytes, "rank %d (pid %d on host %s)", rank, (int)peers[rank].pid, peers[rank].host);
}

static atomic_int wake_fd; /* of the one watch of the process, for its signal handler */
static volatile sig_atomic_t terminated;
static _Atomic double asked_to_end_s; /* the first SIGTERM; 0: none */

/* ---- the thread ---------------------------------------------------------------------------------------------------------- */

static int open_process(pid_t pid) {
#ifdef SYS_pidfd_open
    return (int)syscall(SYS_pidfd_open, pid, 0);
#else
    (void)pid;
    errno = ENOSYS;
    return -1;
#endif
}

static bool can_watch(const struct watch *watch, int rank) {
    const struct peer *self = &watch->peers[watch->engine->rank], *other = &watch->peers[rank];
    return rank != watch->engine->rank && other->host_id == self->host_id && other->pid_space == self->pid_space;
}

/* Whether the process has ended, whether or not its parent has taken note. */
static bool is_gone(const struct watch *watch, int rank) {
    if (!can_watch(watch, rank))
        return false;
    struct pollfd one = {.fd = watch->polled[rank].fd, .events = POLLIN};
    if (one.fd >= 0)
        return poll(&one, 1, 0) > 0;
    return kill(watch->peers[rank].pid, 0) != 0 && errno == ESRCH;
}

static int find_gone(const struct watch *watch) {
    for (int r = 0; r < watch->engine->size; r++)
        if (is_gone(watch, r))
            return r;
    return -1;
}

/* The lowest rank of the host that is left speaks for all. */
static bool is_speaker(const struct watch *watch) {
    for (int r = 0; r < watch->engine->rank; r++)
        if (can_watch(watch, r) && !is_gone(watch, r))
            return false;
    return true;
}

/* Not one that the starter is ending, nor one that the others have given up: somebody has told already. */
static bool may_tell(const struct watch *watch) {
    double since_s = clock_seconds() - asked_to_end_s;
    bool is_ended = asked_to_end_s > 0 && since_s > STARTER_S && since_s < STARTER_MOST_S;
    return !is_ended && !pulse_was_stopped(&watch->engine->pulse);
}

static void tell_other_hosts(struct watch *watch, int gone) {
    int size = watch->engine->size;
    bool *elsewhere = memory_must((size_t)size, sizeof *elsewhere);
    for (int r = 0; r < size; r++)
        elsewhere[r] = r != watch->engine->rank && !can_watch(watch, r);
    engine_tell_gone(watch->engine, elsewhere, gone);
    free(elsewhere);
}

/* Another host's rank is what MPI has lost, or somebody has told of one: whoever is gone here has but left because of that, and
 * spoke where that was his part. */
static bool is_told_of(const struct watch *watch) {
    int failed = watch->engine->failed_rank;
    return (failed >= 0 && failed != watch->engine->rank && !can_watch(watch, failed)) || engine_was_told(watch->engine);
}

/* On another host somebody may be gone whom MPI has just lost, and the word of it on its way: the one that is seen to be gone here
 * may have left because of that. */
static void wait_for_word(const struct watch *watch) {
    for (int r = 0; r < watch->engine->size; r++)
        if (r != watch->engine->rank && !can_watch(watch, r)) {
            struct timespec pause = {.tv_nsec = WORD_NS};
            nanosleep(&pause, NULL);
            return;
        }
}

static void tell(struct watch *watch, int rank) {
    char who[192], line[256];
    peer_print(watch->peers, rank, who, sizeof who);
    snprintf(line, sizeof line, "%s is gone", who);
    bool first = !atomic_exchange(&watch->told, true);
    if (first)
        wait_for_word(watch);
    if (first && watch->lost && may_tell(watch) && is_speaker(watch) && !is_told_of(watch)) {
        watch->lost(line);
        tell_other_hosts(watch, rank);
    }
    engine_break(watch->engine, line);
}

static void kill_rank(const struct watch *watch, int rank) {
#ifdef SYS_pidfd_send_signal
    if (watch->polled[rank].fd >= 0) { /* by its pid it might be another process by now */
        (void)syscall(SYS_pidfd_send_signal, watch->polled[rank].fd, SIGKILL, NULL, 0);
        return;
    }
#endif
    kill(watch->peers[rank].pid, SIGKILL);
}

/* Whether the watch is closed within that time. */
static bool is_over_within(const struct watch *watch, double seconds) {
    struct pollfd wake = watch->polled[watch->engine->size];
    double end_s = clock_seconds() + seconds;
    while (!watch->over && !terminated && clock_seconds() < end_s)
        if (poll(&wake, 1, (int)(1e3 * (end_s - clock_seconds())) + 1) > 0) {
            char byte;
            if (read(wake.fd, &byte, 1) < 0)
                break;
        }
    return watch->over;
}

static bool is_starter(pid_t pid) {
    static const char *const names[] = {"mpirun", "mpiexec",       "orterun",         "prterun",
                                        "orted",  "mpiexec.hydra", "hydra_pmi_proxy", "prted"};
    char path[64], name[64];
    snprintf(path, sizeof path, "/proc/%d/comm", (int)pid);
    read_line(path, name, sizeof name);
    name[strcspn(name, "\n")] = 0;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(name, names[i]) == 0)
            return true;
    return false;
}

/* A starter asks its helper on the other machine to end the ranks there, and waits for the answer, which a dead link keeps from
 * it for a quarter of an hour. A process of its own outlives this rank, and kills the starter unless it has ended by then. */
static void end_starter_later(void) {
    pid_t starter = getppid();
    int handle = is_starter(starter) ? open_process(starter) : -1;
    if (handle < 0 || getppid() != starter || fork() != 0) {
        if (handle >= 0)
            close(handle);
        return;
    }
    setsid();
    for (int fd = 0; fd < 1024; fd++) /* a starter waits for the end of what its ranks write */
        if (fd != handle)
            close(fd);
    struct pollfd one = {.fd = handle, .events = POLLIN};
    if (poll(&one, 1, STARTER_MS) == 0)
        kill(starter, SIGKILL);
    _exit(0);
}

/* Some do not answer, and one of us has said so. */
static void end_silence(const struct watch *watch) {
    bool some_are_elsewhere = false;
    for (int r = 0; r < watch->engine->size; r++)
        some_are_elsewhere = some_are_elsewhere || (watch->silent[r] && !can_watch(watch, r));
    if (some_are_elsewhere)
        end_starter_later();
    if (is_over_within(watch, WATCH_KILL_S))
        return;
    for (int r = 0; r < watch->engine->size; r++)
        if (watch->silent[r] && can_watch(watch, r))
            kill_rank(watch, r);
    if (!is_over_within(watch, WATCH_SILENCE_S - WATCH_KILL_S))
        _exit(1);
}

static void handle_termination(int signal_number) {
    int saved = errno;
    (void)signal_number;
    terminated = 1;
    watch_note_termination();
    if (write(wake_fd, "t", 1) < 0) {
        /* nothing can be done here */
    }
    errno = saved;
}

/* SIGTERM came and nobody else handles it: the process ends of it after all, once the others had time to show as gone. */
static void end_by_termination(void) {
    struct sigaction usual = {.sa_handler = SIG_DFL};
    sigaction(SIGTERM, &usual, NULL);
    kill(getpid(), SIGTERM);
}

/* All was lost at that time (0: it is not), and what this process still does takes too long: a device that waits for one that is
 * gone waits for ever. */
static bool is_overdue(const struct watch *watch, double lost_s) {
    double limit_s = watch->limit_s;
    return lost_s > 0 && limit_s > 0 && clock_seconds() > lost_s + fmax(limit_s, WATCH_SILENCE_S);
}

/* One is gone, and that was told. */
static void end_in_time(const struct watch *watch) {
    struct pollfd wake = watch->polled[watch->engine->size];
    double lost_s = clock_seconds();
    while (!watch->over && !is_overdue(watch, lost_s)) {
        char byte;
        if (poll(&wake, 1, ASK_MS) > 0 && read(wake.fd, &byte, 1) < 0)
            break;
    }
    if (!watch->over)
        _exit(1);
}

static void *watch_main(void *context) {
    struct watch *watch = context;
    int size = watch->engine->size;
    double lost_s = 0;
    bool all_have_handles = true;
    for (int r = 0; r < size; r++)
        all_have_handles = all_have_handles && (watch->polled[r].fd >= 0 || !can_watch(watch, r));
    while (!watch->over) {
        if (lost_s == 0 && watch->engine->broken)
            lost_s = clock_seconds();
        if (is_overdue(watch, lost_s))
            _exit(1);
        int wait_ms = terminated ? TERMINATION_MS : all_have_handles && lost_s == 0 ? -1 : ASK_MS;
        int ready = poll(watch->polled, (nfds_t)size + 1, wait_ms);
        if (watch->polled[size].revents) {
            char byte;
            if (read(watch->polled[size].fd, &byte, 1) < 0)
                break;
            if (watch->over)
                break;
            if (watch->silent) {
                end_silence(watch);
                break;
            }
        }
        int gone = find_gone(watch);
        if (gone >= 0 && watch->leaving) { /* it may have gone because all was done; what it sent is still coming in */
            poll(&watch->polled[size], 1, LEAVING_MS);
            if (watch->over)
                break;
        }
        if (gone >= 0)
            tell(watch, gone);
        if (terminated && (gone >= 0 || ready == 0))
            end_by_termination();
        if (gone >= 0) {
            end_in_time(watch);
            break;
        }
    }
    return NULL;
}

void watch_give_up(struct watch *watch, const bool *ranks, const char *line) {
    size_t size = (size_t)watch->engine->size;
    int speaker = 0;
    if (atomic_exchange(&watch->told, true))
        return;
    while (ranks[speaker])
        speaker++;
    if (watch->lost && may_tell(watch) && speaker == watch->engine->rank)
        watch->lost(line);
    bool *copy = memory_must(size, sizeof *copy);
    memcpy(copy, ranks, size * sizeof *copy);
    watch->silent = copy;
    if (write(wake_fd, "s", 1) < 0)
        _exit(1);
}

void watch_note_broken(void) {
    int fd = wake_fd;
    if (fd > 0 && write(fd, "b", 1) < 0) {
        /* nothing can be done here */
    }
}

void watch_note_termination(void) {
    if (asked_to_end_s == 0)
        asked_to_end_s = clock_seconds();
}

static enum status fail_watch(struct watch *watch) {
    free(watch->polled);
    watch->polled = NULL;
    return status_fail(STATUS_IO, "cannot watch the other ranks: %s", strerror(errno));
}

enum status watch_open(struct watch *watch, struct engine *engine, struct peer *peers, void (*lost)(const char *line)) {
    int ends[2];
    struct sigaction now, ours = {.sa_handler = handle_termination, .sa_flags = SA_RESTART};
    watch->engine = engine;
    watch->peers = peers;
    watch->lost = lost;
    TRY(memory_alloc(&watch->polled, (size_t)engine->size + 1, sizeof *watch->polled));
    if (pipe2(ends, O_CLOEXEC) != 0)
        return fail_watch(watch);
    for (int r = 0; r < engine->size; r++)
        watch->polled[r] = (struct pollfd){.fd = can_watch(watch, r) ? open_process(peers[r].pid) : -1, .events = POLLIN};
    watch->polled[engine->size] = (struct pollfd){.fd = ends[0], .events = POLLIN};
    wake_fd = ends[1];
    if (pthread_create(&watch->thread, NULL, watch_main, watch) != 0)
        return fail_watch(watch);
    if (sigaction(SIGTERM, NULL, &now) == 0 && now.sa_handler == SIG_DFL) {
        sigaction(SIGTERM, &ours, NULL);
        watch->handles_termination = true;
    }
    return STATUS_OK;
}

void watch_close(struct watch *watch) {
    struct sigaction now, usual = {.sa_handler = SIG_DFL};
    watch->over = true;
    if (write(wake_fd, "o", 1) < 0)
        return;
    pthread_join(watch->thread, NULL);
    if (watch->handles_termination && sigaction(SIGTERM, NULL, &now) == 0 && now.sa_handler == handle_termination)
        sigaction(SIGTERM, &usual, NULL);
    for (int r = 0; r <= watch->engine->size; r++)
        if (watch->polled[r].fd >= 0)
            close(watch->polled[r].fd);
    close(atomic_exchange(&wake_fd, 0));
    free(watch->polled);
}
