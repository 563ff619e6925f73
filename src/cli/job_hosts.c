#include "cli/job_hosts.h"

#include "base/clock.h"
#include "base/file.h"
#include "base/memory.h"
#include "base/text.h"
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { FILE_BYTES_MOST = 1 << 24, SLOTS_MOST = 1 << 16 };
static const double PROBE_S = 15, LOOK_S = 0.02;
static const char NAME_LETTERS[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";

/* Slots after `name`: ":4", " slots=4", or nothing, which is one. 0: something else. */
static int read_slots(const char *rest) {
    const char *number = *rest == ':' ? rest + 1 : strstr(rest, "slots=") ? strstr(rest, "slots=") + 6 : NULL;
    if (*rest && *rest != ':' && *rest != ' ' && *rest != '\t')
        return 0;
    long slots = number ? strtol(number, NULL, 10) : 1;
    return slots >= 1 && slots <= SLOTS_MOST ? (int)slots : 0;
}

static enum status add_line(struct job_hosts *hosts, const char *path, int line_number, char *line) {
    line[strcspn(line, "#\r")] = 0;
    line += strspn(line, " \t");
    size_t size = strspn(line, NAME_LETTERS);
    if (!*line)
        return STATUS_OK;
    int slots = size > 0 && *line != '-' ? read_slots(line + size) : 0;
    if (slots == 0)
        return status_fail(STATUS_USAGE, "%s line %d: \"%s\" is not \"name slots=N\"", path, line_number, line);
    TRY(memory_resize(&hosts->list, (size_t)hosts->count + 1, sizeof *hosts->list));
    hosts->list[hosts->count++] = (struct job_host){text_format("%.*s", (int)size, line), memory_copy_string(line), slots, false};
    return STATUS_OK;
}

enum status job_hosts_read(struct job_hosts *hosts, const char *path) {
    char *data;
    size_t size;
    int line_number = 0;
    *hosts = (struct job_hosts){0};
    enum status status = file_read(path, FILE_BYTES_MOST, &data, &size);
    if (status != STATUS_OK)
        return status == STATUS_NOT_FOUND ? STATUS_USAGE : status;
    for (char *line = data; line && status == STATUS_OK;) {
        char *next = strchr(line, '\n');
        if (next)
            *next++ = 0;
        status = add_line(hosts, path, ++line_number, line);
        line = next;
    }
    free(data);
    if (status == STATUS_OK && hosts->count == 0)
        status = status_fail(STATUS_USAGE, "%s names no host", path);
    return status;
}

static pid_t ask(const char *host, const char *command) {
    struct text filled = {0};
    for (const char *c = command; *c;)
        if (strncmp(c, "{host}", 6) == 0) {
            text_add_string(&filled, host);
            c += 6;
        } else {
            text_add(&filled, c++, 1);
        }
    pid_t pid = fork();
    if (pid == 0) {
        int nothing = open("/dev/null", O_RDWR);
        sigset_t none;
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        setpgid(0, 0);
        for (int fd = 0; fd < 3 && nothing >= 0; fd++)
            dup2(nothing, fd);
        execl("/bin/sh", "sh", "-c", text_string(&filled), (char *)NULL);
        _exit(127);
    }
    if (pid > 0)
        setpgid(pid, pid);
    text_release(&filled);
    return pid;
}

int job_hosts_probe(struct job_hosts *hosts, const char *command) {
    double end_s = clock_seconds() + PROBE_S;
    pid_t *asked = memory_must((size_t)hosts->count, sizeof *asked);
    int open_count = 0, slots = 0;
    for (int i = 0; i < hosts->count; i++) {
        hosts->list[i].answers = false;
        asked[i] = ask(hosts->list[i].name, command);
        open_count += asked[i] > 0;
    }
    for (bool late = false; open_count > 0; late = clock_seconds() > end_s) {
        for (int i = 0; i < hosts->count; i++) {
            int how;
            if (asked[i] <= 0)
                continue;
            if (late)
                kill(-asked[i], SIGKILL);
            if (waitpid(asked[i], &how, late ? 0 : WNOHANG) != asked[i])
                continue;
            hosts->list[i].answers = WIFEXITED(how) && WEXITSTATUS(how) == 0;
            asked[i] = 0;
            open_count--;
        }
        if (open_count > 0)
            usleep((useconds_t)(1e6 * LOOK_S));
    }
    for (int i = 0; i < hosts->count; i++)
        slots += hosts->list[i].answers ? hosts->list[i].slots : 0;
    free(asked);
    return slots;
}

enum status job_hosts_write(const struct job_hosts *hosts, const char *path) {
    struct text lines = {0};
    for (int i = 0; i < hosts->count; i++)
        if (hosts->list[i].answers)
            text_printf(&lines, "%s\n", hosts->list[i].line);
    enum status status = file_write(path, text_string(&lines), lines.size);
    text_release(&lines);
    return status;
}

int job_hosts_slots(const struct job_hosts *hosts) {
    int slots = 0;
    for (int i = 0; i < hosts->count; i++)
        slots += hosts->list[i].slots;
    return slots;
}

void job_hosts_release(struct job_hosts *hosts) {
    for (int i = 0; i < hosts->count; i++) {
        free(hosts->list[i].name);
        free(hosts->list[i].line);
    }
    free(hosts->list);
    *hosts = (struct job_hosts){0};
}
