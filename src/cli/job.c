/* Signals are blocked and waited for by name, so that none comes at a bad moment. Processes that outlive the command are
 * found as what is below this process in /proc: a starter gives its ranks process groups of their own, but as a subreaper
 * this process is the parent of all that lost theirs. */
#include "cli/job.h"

#include "base/clock.h"
#include "base/log.h"
#include "base/memory.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static const double SECOND_STOP_S = 5;                         /* from the second signal to the end */
static const double LEAVE_S = 0.3, TERM_S = 2, KILL_S = 10;    /* for what is left: alone, after SIGTERM, after SIGKILL */
static const double LOOK_S = 0.02;
enum { PROCESSES_MOST = 1 << 16 };

static sigset_t waited_for, usual_mask;

enum status job_prepare(void) {
    static const int signals[] = {SIGCHLD, SIGTERM, SIGINT, SIGUSR1, SIGHUP};
    sigemptyset(&waited_for);
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++)
        sigaddset(&waited_for, signals[i]);
    if (sigprocmask(SIG_BLOCK, &waited_for, &usual_mask) != 0 || prctl(PR_SET_CHILD_SUBREAPER, 1) != 0)
        return status_fail(STATUS_IO, "cannot look after processes: %s", strerror(errno));
    return STATUS_OK;
}

/* The next signal within that time; 0: none came. */
static int next_signal(double seconds) {
    struct timespec time = {.tv_sec = (time_t)seconds, .tv_nsec = (long)(1e9 * (seconds - (double)(time_t)seconds))};
    int number = sigtimedwait(&waited_for, NULL, &time);
    return number > 0 ? number : 0;
}

bool job_pause(double seconds) {
    double end_s = clock_seconds() + seconds;
    for (double left_s = seconds; left_s > 0; left_s = end_s - clock_seconds()) {
        int number = next_signal(left_s);
        if (number && number != SIGCHLD)
            return false;
    }
    return true;
}

/* ---- what is below this process -------------------------------------------------------------------------------------- */

struct process {
    pid_t pid, parent;
    bool below;
};

static bool read_process(const char *name, struct process *out) {
    char path[64], text[512], state = 'Z';
    int parent = 0;
    if (snprintf(path, sizeof path, "/proc/%.20s/stat", name) < 0)
        return false;
    FILE *file = fopen(path, "r");
    size_t size = file ? fread(text, 1, sizeof text - 1, file) : 0;
    if (file)
        fclose(file);
    text[size] = 0;
    char *after_name = strrchr(text, ')'); /* the name may hold anything */
    if (!after_name || sscanf(after_name + 1, " %c %d", &state, &parent) != 2 || state == 'Z')
        return false;
    *out = (struct process){.pid = (pid_t)atoi(name), .parent = parent};
    return true;
}

static int list_processes(struct process *list) {
    DIR *directory = opendir("/proc");
    int count = 0;
    for (struct dirent *entry; directory && count < PROCESSES_MOST && (entry = readdir(directory));)
        if (entry->d_name[0] >= '0' && entry->d_name[0] <= '9' && read_process(entry->d_name, &list[count]))
            count++;
    if (directory)
        closedir(directory);
    return count;
}

static bool is_below(const struct process *list, int count, pid_t parent) {
    if (parent == getpid())
        return true;
    for (int i = 0; i < count; i++)
        if (list[i].pid == parent)
            return list[i].below;
    return false;
}

/* Send a signal (0: none) to all processes below this one that have not ended; returns how many, and one of them. */
static int signal_below(int number, pid_t *one) {
    struct process *list = memory_must(PROCESSES_MOST, sizeof *list);
    int count = list_processes(list), found = 0;
    for (bool more = true; more;) {
        more = false;
        for (int i = 0; i < count; i++)
            if (!list[i].below && is_below(list, count, list[i].parent))
                list[i].below = more = true;
    }
    for (int i = 0; i < count; i++)
        if (list[i].below) {
            found++;
            *one = list[i].pid;
            kill(list[i].pid, number);
        }
    free(list);
    return found;
}

/* Take note of every child that has ended; the one that is waited for is kept. */
static void reap(pid_t child, int *how, bool *ended) {
    int state;
    for (pid_t pid; (pid = waitpid(-1, &state, WNOHANG)) > 0;)
        if (pid == child) {
            *how = state;
            *ended = true;
        }
}

/* Until nothing is below this process, at most so long; `number` is sent to all there is, again and again where it kills. */
static int wait_for_rest(double seconds, int number, pid_t *one) {
    double end_s = clock_seconds() + seconds;
    bool ended;
    int how, left = signal_below(number, one);
    while (left > 0 && clock_seconds() < end_s) {
        usleep((useconds_t)(1e6 * LOOK_S));
        reap(-1, &how, &ended);
        left = signal_below(number == SIGKILL ? SIGKILL : 0, one);
    }
    reap(-1, &how, &ended);
    return left;
}

static enum status end_rest(void) {
    pid_t one = 0;
    if (wait_for_rest(LEAVE_S, 0, &one) == 0 || wait_for_rest(TERM_S, SIGTERM, &one) == 0 ||
        wait_for_rest(KILL_S, SIGKILL, &one) == 0)
        return STATUS_OK;
    return status_fail(STATUS_PEER, "process %d of the job cannot be ended; it hangs in the system", (int)one);
}

/* ---- the command ------------------------------------------------------------------------------------------------------- */

_Noreturn static void become(char *const *words, pid_t supervisor, int report) {
    int nothing = open("/dev/null", O_RDONLY);
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != supervisor)
        _exit(1);
    if (nothing > 0) { /* from a group of its own it may not read a terminal */
        dup2(nothing, 0);
        close(nothing);
    }
    sigprocmask(SIG_SETMASK, &usual_mask, NULL);
    signal(SIGXFSZ, SIG_DFL);
    execvp(words[0], words);
    int reason = errno;
    if (write(report, &reason, sizeof reason) < 0)
        _exit(126);
    _exit(127);
}

static enum status start(char *const *words, pid_t *child) {
    int ends[2], reason;
    pid_t self = getpid();
    if (pipe2(ends, O_CLOEXEC) != 0)
        return status_fail(STATUS_IO, "cannot start %s: %s", words[0], strerror(errno));
    *child = fork();
    if (*child == 0)
        become(words, self, ends[1]);
    close(ends[1]);
    bool failed = *child > 0 && read(ends[0], &reason, sizeof reason) == sizeof reason;
    close(ends[0]);
    if (*child < 0)
        return status_fail(STATUS_IO, "cannot start %s: %s", words[0], strerror(errno));
    if (!failed)
        return STATUS_OK;
    waitpid(*child, NULL, 0);
    return status_fail(STATUS_USAGE, "cannot start %s: %s", words[0], strerror(reason));
}

static void wait_for_end(pid_t child, int *how, bool *was_stopped) {
    bool ended = false;
    double kill_s = 0;
    pid_t one;
    for (reap(child, how, &ended); !ended; reap(child, how, &ended)) {
        int number = next_signal(kill_s > 0 ? LOOK_S : 60);
        if (number && number != SIGCHLD) {
            kill(child, number);
            kill_s = *was_stopped && kill_s == 0 ? clock_seconds() + SECOND_STOP_S : kill_s;
            *was_stopped = true;
        }
        if (kill_s > 0 && clock_seconds() > kill_s)
            signal_below(SIGKILL, &one);
    }
}

enum status job_run(char *const *words, struct job_end *end) {
    pid_t child = -1;
    int how = 0;
    double begin_s = clock_seconds();
    *end = (struct job_end){0};
    TRY(start(words, &child));
    wait_for_end(child, &how, &end->was_stopped);
    end->seconds = clock_seconds() - begin_s;
    end->exit_status = WIFEXITED(how) ? WEXITSTATUS(how) : -1;
    end->signal = WIFSIGNALED(how) ? WTERMSIG(how) : 0;
    return end_rest();
}
