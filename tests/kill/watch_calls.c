/* Preloaded into a program: sees the calls that change or flush what is below one directory, and kills the process at the
 * n-th of them or writes all of them down (call_record.h says what the environment holds).
 *
 * A call, its number and its record are one: other threads wait. What is not watched goes to the system as it is.
 */
#include "call_record.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/types.h>
#include <unistd.h>

enum { DESCRIPTORS_MAX = 1024 };
enum watched { WATCHED_NOT, WATCHED_FILE, WATCHED_DIRECTORY };

static const char DRAFT[] = ".tmp-";

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[4096];
static size_t root_bytes;
static int record_descriptor = -1;
static long die_at, call_count;
static bool die_after, counting = true;
static char kinds[DESCRIPTORS_MAX]; /* enum watched */

__attribute__((constructor)) static void read_environment(void) {
    const char *watch = getenv(CALLS_WATCH), *record = getenv(CALLS_RECORD), *at = getenv(CALLS_DIE_AT);
    const char *after = getenv(CALLS_DIE_AFTER), *from_draft = getenv(CALLS_FROM_DRAFT);
    if (!watch || strlen(watch) >= sizeof root)
        return;
    strcpy(root, watch);
    root_bytes = strlen(root);
    die_at = at ? strtol(at, NULL, 10) : 0;
    die_after = after && *after == '1';
    counting = !(from_draft && *from_draft == '1');
    if (record)
        record_descriptor = (int)syscall(SYS_openat, AT_FDCWD, record, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
}

/* The part of a path below the root; NULL for another one. */
static const char *below(const char *path) {
    if (root_bytes == 0 || strncmp(path, root, root_bytes) != 0)
        return NULL;
    return path[root_bytes] == '/' ? path + root_bytes + 1 : path[root_bytes] == '\0' ? path + root_bytes : NULL;
}

static enum watched kind_of(int descriptor) {
    return descriptor >= 0 && descriptor < DESCRIPTORS_MAX ? (enum watched)kinds[descriptor] : WATCHED_NOT;
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

/* ---- a call ---------------------------------------------------------------------------------------------------------- */

/* Whether the process is to die at this call. */
static bool take_turn(bool counts) {
    pthread_mutex_lock(&lock);
    return counts && counting && ++call_count == die_at;
}

static bool begin_call(bool counts) {
    bool last = take_turn(counts);
    if (last && !die_after)
        die();
    return last;
}

static void put(const void *data, size_t bytes) {
    for (const char *at = data; bytes > 0;) {
        ssize_t done = syscall(SYS_write, record_descriptor, at, bytes);
        if (done < 0)
            die();
        at += done;
        bytes -= (size_t)done;
    }
}

static void end_call(bool last, struct call_record record, const char *path, const void *data, bool succeeded) {
    if (last)
        die();
    if (!succeeded) {
        record.kind = CALL_FAILED;
        record.data_bytes = 0;
    }
    if (record_descriptor >= 0) {
        put(&record, sizeof record);
        put(path, record.path_bytes);
        put(data, record.data_bytes);
    }
    pthread_mutex_unlock(&lock);
}

/* ---- by path --------------------------------------------------------------------------------------------------------- */

static int open_watched(const char *path, const char *part, int flags, mode_t mode) {
    bool directory = (flags & O_DIRECTORY) != 0;
    bool last = begin_call(!directory);
    int descriptor = (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
    struct call_record record = {.kind = directory ? CALL_OPEN_DIRECTORY
                                         : flags & O_TRUNC ? CALL_OPEN_TRUNCATED
                                                           : CALL_OPEN,
                                 .descriptor = descriptor,
                                 .path_bytes = (uint32_t)strlen(part),
                                 .counts = !directory};
    if (descriptor >= 0 && descriptor < DESCRIPTORS_MAX)
        kinds[descriptor] = directory ? WATCHED_DIRECTORY : WATCHED_FILE;
    end_call(last, record, part, NULL, descriptor >= 0);
    return descriptor;
}

int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    const char *part = below(path);
    if (part && ((flags & O_ACCMODE) != O_RDONLY || flags & O_DIRECTORY))
        return open_watched(path, part, flags, mode);
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...) __attribute__((alias("open")));

int mkdir(const char *path, mode_t mode) {
    const char *part = below(path);
    if (!part)
        return (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode);
    counting = counting || strstr(part, DRAFT);
    bool last = begin_call(true);
    int result = (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode);
    struct call_record record = {.kind = CALL_MAKE, .path_bytes = (uint32_t)strlen(part), .counts = 1};
    end_call(last, record, part, NULL, result == 0);
    return result;
}

static int remove_by(const char *path, int flags) {
    const char *part = below(path);
    if (!part)
        return (int)syscall(SYS_unlinkat, AT_FDCWD, path, flags);
    bool last = begin_call(true);
    int result = (int)syscall(SYS_unlinkat, AT_FDCWD, path, flags);
    struct call_record record = {.kind = CALL_REMOVE, .path_bytes = (uint32_t)strlen(part), .counts = 1};
    end_call(last, record, part, NULL, result == 0);
    return result;
}

int unlink(const char *path) {
    return remove_by(path, 0);
}

int rmdir(const char *path) {
    return remove_by(path, AT_REMOVEDIR);
}

int rename(const char *from, const char *to) {
    const char *from_part = below(from), *to_part = below(to);
    if (!from_part || !to_part)
        return (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
    size_t from_bytes = strlen(from_part), to_bytes = strlen(to_part);
    char both[2 * sizeof root];
    if (from_bytes + 1 + to_bytes > sizeof both)
        die();
    memcpy(both, from_part, from_bytes + 1);
    memcpy(both + from_bytes + 1, to_part, to_bytes);
    bool last = begin_call(true);
    int result = (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
    struct call_record record = {.kind = CALL_RENAME, .path_bytes = (uint32_t)(from_bytes + 1 + to_bytes), .counts = 1};
    end_call(last, record, both, NULL, result == 0);
    return result;
}

/* ---- by descriptor --------------------------------------------------------------------------------------------------- */

static ssize_t write_at(int descriptor, const void *data, size_t bytes, off_t begin) {
    return syscall(SYS_pwrite64, descriptor, data, bytes, begin);
}

/* A write that the process dies in is torn: half of it arrives. */
static ssize_t write_watched(int descriptor, const void *data, size_t bytes, off_t begin, bool moves) {
    bool last = take_turn(true);
    size_t part = last && !die_after ? bytes / 2 : bytes;
    ssize_t done = moves ? syscall(SYS_write, descriptor, data, part) : write_at(descriptor, data, part, begin);
    struct call_record record = {.kind = CALL_WRITE,
                                 .descriptor = descriptor,
                                 .begin = (uint64_t)begin,
                                 .data_bytes = done > 0 ? (uint64_t)done : 0,
                                 .counts = 1};
    end_call(last, record, NULL, data, done >= 0);
    return done;
}

ssize_t write(int descriptor, const void *data, size_t bytes) {
    if (kind_of(descriptor) != WATCHED_FILE)
        return syscall(SYS_write, descriptor, data, bytes);
    bool appends = (fcntl(descriptor, F_GETFL) & O_APPEND) != 0;
    return write_watched(descriptor, data, bytes, lseek(descriptor, 0, appends ? SEEK_END : SEEK_CUR), true);
}

ssize_t pwrite(int descriptor, const void *data, size_t bytes, off_t begin) {
    if (kind_of(descriptor) != WATCHED_FILE)
        return write_at(descriptor, data, bytes, begin);
    return write_watched(descriptor, data, bytes, begin, false);
}
ssize_t pwrite64(int descriptor, const void *data, size_t bytes, off_t begin) __attribute__((alias("pwrite")));

/* Each part is a call of its own: what arrives of several is what arrives of the first ones, or half of one. */
ssize_t pwritev(int descriptor, const struct iovec *parts, int count, off_t begin) {
    ssize_t all = 0;
    if (kind_of(descriptor) != WATCHED_FILE)
        return syscall(SYS_pwritev, descriptor, parts, count, (long)begin, 0L);
    for (int i = 0; i < count; i++) {
        ssize_t done = write_watched(descriptor, parts[i].iov_base, parts[i].iov_len, begin + all, false);
        if (done < 0)
            return all > 0 ? all : done;
        all += done;
        if ((size_t)done < parts[i].iov_len)
            break;
    }
    return all;
}
ssize_t pwritev64(int descriptor, const struct iovec *parts, int count, off_t begin) __attribute__((alias("pwritev")));

/* What has a descriptor, a length and no data. */
static int watched_call(enum call_kind kind, int descriptor, uint64_t size, long number, long a, long b, long c) {
    if (kind_of(descriptor) == WATCHED_NOT)
        return (int)syscall(number, descriptor, a, b, c);
    bool counts = kind != CALL_CLOSE || kind_of(descriptor) == WATCHED_FILE;
    bool last = begin_call(counts);
    if (kind == CALL_CLOSE)
        kinds[descriptor] = WATCHED_NOT;
    int result = (int)syscall(number, descriptor, a, b, c);
    struct call_record record = {.kind = kind, .descriptor = descriptor, .begin = size, .counts = counts};
    end_call(last, record, NULL, NULL, result == 0);
    return result;
}

int fsync(int descriptor) {
    return watched_call(CALL_FLUSH, descriptor, 0, SYS_fsync, 0, 0, 0);
}

int fdatasync(int descriptor) {
    return watched_call(CALL_FLUSH, descriptor, 0, SYS_fdatasync, 0, 0, 0);
}

int ftruncate(int descriptor, off_t size) {
    return watched_call(CALL_RESIZE, descriptor, (uint64_t)size, SYS_ftruncate, size, 0, 0);
}
int ftruncate64(int descriptor, off_t size) __attribute__((alias("ftruncate")));

int fallocate(int descriptor, int mode, off_t begin, off_t bytes) {
    return watched_call(CALL_GROW, descriptor, (uint64_t)(begin + bytes), SYS_fallocate, mode, begin, bytes);
}
int fallocate64(int descriptor, int mode, off_t begin, off_t bytes) __attribute__((alias("fallocate")));

int sync_file_range(int descriptor, off_t begin, off_t bytes, unsigned flags) {
    return watched_call(CALL_HINT, descriptor, 0, SYS_sync_file_range, begin, bytes, (long)flags);
}

int close(int descriptor) {
    return watched_call(CALL_CLOSE, descriptor, 0, SYS_close, 0, 0, 0);
}
