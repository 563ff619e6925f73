#include "base/file.h"

#include "base/memory.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { GATHER_MAX = 64 }; /* parts of one call */

static int (*fault_hook)(void *context, enum file_operation operation, const char *path);
static void *fault_context;

void file_set_fault(int (*fault)(void *context, enum file_operation operation, const char *path), void *context) {
    fault_hook = fault;
    fault_context = context;
}

/* True, with errno set, when a test wants this operation to fail. */
static bool faulted(enum file_operation operation, const char *path) {
    int error = fault_hook ? fault_hook(fault_context, operation, path) : 0;
    if (error)
        errno = error;
    return error != 0;
}

static enum status fail_errno(const char *verb, const char *path) {
    int error = errno;
    bool none_left = error == EMFILE || error == ENFILE || error == ENOMEM; /* which says nothing about the file */
    enum status code = error == ENOENT ? STATUS_NOT_FOUND : none_left ? STATUS_MEMORY : STATUS_IO;
    return status_fail(code, "%s: cannot %s: %s", path, verb, strerror(error));
}

bool file_exists(const char *path) {
    struct stat info;
    return stat(path, &info) == 0 && S_ISREG(info.st_mode);
}

bool directory_exists(const char *path) {
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

enum status file_size(const char *path, uint64_t *size) {
    struct stat info;
    if (stat(path, &info) != 0)
        return fail_errno("look at", path);
    if (S_ISDIR(info.st_mode))
        return status_fail(STATUS_FORMAT, "%s: is a directory, a file is needed", path);
    *size = (uint64_t)info.st_size;
    return STATUS_OK;
}

static enum status read_all(int descriptor, const char *path, char *data, size_t size) {
    size_t done = 0;
    while (done < size) {
        ssize_t got = faulted(FILE_READ, path) ? -1 : read(descriptor, data + done, size - done);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return fail_errno("read", path);
        if (got == 0)
            return status_fail(STATUS_IO, "%s: shrank while it was read", path);
        done += (size_t)got;
    }
    return STATUS_OK;
}

enum status file_read(const char *path, uint64_t limit_bytes, char **data, size_t *size) {
    uint64_t bytes;
    TRY(file_size(path, &bytes));
    if (bytes > limit_bytes)
        return status_fail(STATUS_FORMAT, "%s: has %llu bytes, at most %llu are read", path,
                           (unsigned long long)bytes, (unsigned long long)limit_bytes);
    int descriptor = faulted(FILE_OPEN, path) ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    if (descriptor < 0)
        return fail_errno("open", path);
    char *contents;
    enum status status = memory_alloc(&contents, bytes + 1, 1);
    if (status == STATUS_OK) {
        status = read_all(descriptor, path, contents, bytes);
        if (status != STATUS_OK)
            free(contents);
    }
    close(descriptor);
    if (status == STATUS_OK) {
        *data = contents;
        *size = bytes;
    }
    return status;
}

static bool is_block(uint64_t value) {
    return value % FILE_BLOCK_BYTES == 0;
}

/* Of `size` bytes at `position` of a file and at `data`, how many go at once, and whether past the system's cache: whole blocks
 * that are aligned in both; else up to the next block, or all. */
static size_t choose_way(uint64_t position, const void *data, size_t size, bool *direct) {
    size_t blocks = size / FILE_BLOCK_BYTES * FILE_BLOCK_BYTES;
    uint64_t to_block = (FILE_BLOCK_BYTES - position % FILE_BLOCK_BYTES) % FILE_BLOCK_BYTES;
    bool can = *direct && is_block((uintptr_t)data + to_block);
    *direct = can && to_block == 0 && blocks > 0;
    if (*direct)
        return blocks;
    return can && to_block > 0 && to_block < size ? (size_t)to_block : size;
}

/* The whole blocks that begin the parts, the first without its `skip` bytes, for one call past the system's cache. Ends with a
 * part that has more than whole blocks. */
static int gather_blocks(const struct file_part *parts, int count, size_t skip, struct iovec blocks[GATHER_MAX], size_t *total) {
    int gathered = 0;
    for (*total = 0; gathered < count && gathered < GATHER_MAX; skip = 0) {
        char *data = (char *)parts[gathered].data + skip;
        size_t left = parts[gathered].bytes - skip, whole = left / FILE_BLOCK_BYTES * FILE_BLOCK_BYTES;
        if (!is_block((uintptr_t)data) || whole == 0)
            break;
        blocks[gathered++] = (struct iovec){data, whole};
        *total += whole;
        if (whole < left)
            break;
    }
    return gathered;
}

enum status file_reader_open(struct file_reader *reader, const char *path) {
    *reader = (struct file_reader){.descriptor = faulted(FILE_OPEN, path) ? -1 : open(path, O_RDONLY | O_CLOEXEC)};
    if (reader->descriptor < 0)
        return fail_errno("open", path);
    reader->path = memory_copy_string(path);
    int direct = open(path, O_RDONLY | O_CLOEXEC | O_DIRECT); /* not every file system has it */
    reader->direct = direct > 0 ? direct : 0;
    posix_fadvise(reader->descriptor, 0, 0, reader->direct ? POSIX_FADV_RANDOM : POSIX_FADV_SEQUENTIAL);
    return STATUS_OK;
}

enum status file_reader_at(const struct file_reader *reader, uint64_t position, void *data, size_t size) {
    for (size_t done = 0; done < size;) {
        char *to = (char *)data + done;
        off_t at = (off_t)(position + done);
        bool direct = reader->direct > 0;
        size_t part = choose_way(position + done, to, size - done, &direct);
        ssize_t got = faulted(FILE_READ, reader->path) ? -1 : pread(direct ? reader->direct : reader->descriptor, to, part, at);
        if (got < 0 && direct && errno == EINVAL) /* it takes larger blocks, or none */
            got = pread(reader->descriptor, to, part, at);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return fail_errno("read", reader->path);
        if (got == 0)
            return status_fail(STATUS_IO, "%s: shrank while it was read", reader->path);
        done += (size_t)got;
    }
    return STATUS_OK;
}

/* How much of it was read: the rest, after a read that was not whole or could not be, comes one by one. */
static enum status read_gathered(const struct file_reader *reader, uint64_t position, const struct iovec *blocks, int count,
                                 size_t *done) {
    ssize_t got = faulted(FILE_READ, reader->path) ? -1 : preadv(reader->direct, blocks, count, (off_t)position);
    bool other_way = got < 0 && (errno == EINVAL || errno == EINTR);
    if (got < 0 && !other_way)
        return fail_errno("read", reader->path);
    *done = other_way ? 0 : (size_t)got;
    return STATUS_OK;
}

enum status file_reader_parts(const struct file_reader *reader, uint64_t position, const struct file_part *parts, int count) {
    size_t skip = 0; /* of the first of the parts */
    while (count > 0) {
        struct iovec blocks[GATHER_MAX];
        size_t total, done = 0;
        bool direct = reader->direct > 0 && is_block(position);
        int gathered = direct ? gather_blocks(parts, count, skip, blocks, &total) : 0;
        if (gathered > 1)
            TRY(read_gathered(reader, position, blocks, gathered, &done));
        if (done == 0) {
            done = parts->bytes - skip;
            TRY(file_reader_at(reader, position, (char *)parts->data + skip, done));
        }
        position += done;
        for (skip += done; count > 0 && skip >= parts->bytes; parts++, count--)
            skip -= parts->bytes;
    }
    return STATUS_OK;
}

void file_reader_close(struct file_reader *reader) {
    if (reader->path)
        close(reader->descriptor);
    if (reader->direct > 0)
        close(reader->direct);
    free(reader->path);
    *reader = (struct file_reader){.descriptor = -1};
}

/* Room for the whole file; where the file system cannot take it at once, writing will show whether there is some. */
static enum status take_room(int descriptor, const char *path, uint64_t size) {
    if (faulted(FILE_MAKE, path) || ftruncate(descriptor, (off_t)size) != 0)
        return fail_errno("write", path);
    if (size > 0 && fallocate(descriptor, 0, 0, (off_t)size) != 0 && errno != EOPNOTSUPP && errno != ENOSYS && errno != EINTR)
        return fail_errno("write", path);
    return STATUS_OK;
}

enum status file_create(const char *path, uint64_t size) {
    int descriptor = faulted(FILE_OPEN, path) ? -1 : open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (descriptor < 0)
        return fail_errno("open for writing", path);
    enum status status = take_room(descriptor, path, size);
    if (close(descriptor) != 0 && status == STATUS_OK)
        status = fail_errno("close", path);
    return status;
}

enum status file_writer_open(struct file_writer *writer, const char *path, bool append) {
    int flags = O_WRONLY | O_CREAT | O_CLOEXEC | (append ? O_APPEND : O_TRUNC);
    int descriptor = faulted(FILE_OPEN, path) ? -1 : open(path, flags, 0644);
    if (descriptor < 0)
        return fail_errno("open for writing", path);
    off_t end = append ? lseek(descriptor, 0, SEEK_END) : 0;
    *writer = (struct file_writer){descriptor, memory_copy_string(path), end > 0 ? (uint64_t)end : 0, 0};
    return STATUS_OK;
}

enum status file_writer_open_at(struct file_writer *writer, const char *path) {
    int descriptor = faulted(FILE_OPEN, path) ? -1 : open(path, O_WRONLY | O_CLOEXEC);
    if (descriptor < 0)
        return fail_errno("open for writing", path);
    int direct = open(path, O_WRONLY | O_CLOEXEC | O_DIRECT); /* not every file system has it */
    *writer = (struct file_writer){descriptor, memory_copy_string(path), 0, direct > 0 ? direct : 0};
    return STATUS_OK;
}

/* As much of `size` as the next write is given: less where a test wants a short one; 0, with errno set, for a failure. */
static size_t size_to_write(const struct file_writer *writer, size_t size) {
    if (!faulted(FILE_WRITE, writer->path))
        return size;
    return errno == FILE_FAULT_SHORT ? (size + 1) / 2 : 0;
}

/* Bytes that are in the system's cache begin their way to the disk. */
static void hurry(const struct file_writer *writer, uint64_t position, size_t size) {
    sync_file_range(writer->descriptor, (off_t)position, (off_t)size, SYNC_FILE_RANGE_WRITE);
}

/* A write that is not whole leaves the blocks: the rest goes the other way. */
static enum status put_one(const struct file_writer *writer, uint64_t position, const char *bytes, size_t size) {
    while (size > 0) {
        bool direct = writer->direct > 0;
        size_t part = size_to_write(writer, choose_way(position, bytes, size, &direct));
        direct = direct && is_block(part);
        ssize_t put = part == 0 ? -1 : pwrite(direct ? writer->direct : writer->descriptor, bytes, part, (off_t)position);
        if (put < 0 && direct && part > 0 && errno == EINVAL) { /* it takes larger blocks, or none */
            direct = false;
            put = pwrite(writer->descriptor, bytes, part, (off_t)position);
        }
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return fail_errno("write", writer->path);
        if (!direct)
            hurry(writer, position, (size_t)put);
        bytes += put;
        size -= (size_t)put;
        position += (uint64_t)put;
    }
    return STATUS_OK;
}

/* How much of it was written, at least a byte. */
static enum status put_gathered(const struct file_writer *writer, uint64_t position, struct iovec *blocks, int count,
                                size_t total, size_t *done) {
    size_t part = size_to_write(writer, total);
    if (part < total) { /* a test's short write */
        count = 1;
        blocks->iov_len = part < blocks->iov_len ? part : blocks->iov_len;
    }
    bool direct = is_block(blocks->iov_len);
    ssize_t put;
    do {
        put = part == 0 ? -1 : pwritev(direct ? writer->direct : writer->descriptor, blocks, count, (off_t)position);
        if (put < 0 && direct && part > 0 && errno == EINVAL) { /* it takes larger blocks, or none */
            direct = false;
            put = pwritev(writer->descriptor, blocks, count, (off_t)position);
        }
    } while (put < 0 && errno == EINTR);
    if (put < 0)
        return fail_errno("write", writer->path);
    if (!direct)
        hurry(writer, position, (size_t)put);
    *done = (size_t)put;
    return STATUS_OK;
}

/* Several parts at once where they are whole blocks, else one after the other. */
enum status file_writer_put_parts(struct file_writer *writer, uint64_t position, const struct file_part *parts, int count) {
    size_t skip = 0; /* of the first of the parts */
    while (count > 0) {
        struct iovec blocks[GATHER_MAX];
        size_t total, done = parts->bytes - skip;
        bool direct = writer->direct > 0 && is_block(position);
        int gathered = direct ? gather_blocks(parts, count, skip, blocks, &total) : 0;
        if (gathered > 1)
            TRY(put_gathered(writer, position, blocks, gathered, total, &done));
        else
            TRY(put_one(writer, position, (char *)parts->data + skip, done));
        position += done;
        for (skip += done; count > 0 && skip >= parts->bytes; parts++, count--)
            skip -= parts->bytes;
    }
    return STATUS_OK;
}

enum status file_writer_put(struct file_writer *writer, uint64_t position, const void *data, size_t size) {
    struct file_part part = {(void *)(uintptr_t)data, size}; /* not written to */
    return file_writer_put_parts(writer, position, &part, 1);
}

enum status file_writer_add(struct file_writer *writer, const void *data, size_t size) {
    const char *bytes = data;
    while (size > 0) {
        size_t part = size_to_write(writer, size);
        ssize_t put = part == 0 ? -1 : write(writer->descriptor, bytes, part);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return fail_errno("write", writer->path);
        bytes += put;
        size -= (size_t)put;
        writer->position += (uint64_t)put;
    }
    return STATUS_OK;
}

enum status file_writer_flush(struct file_writer *writer) {
    if (faulted(FILE_FLUSH, writer->path) || fsync(writer->descriptor) != 0)
        return fail_errno("flush to disk", writer->path);
    return STATUS_OK;
}

enum status file_writer_close(struct file_writer *writer) {
    enum status status = STATUS_OK;
    if (writer->descriptor >= 0 && close(writer->descriptor) != 0)
        status = fail_errno("close", writer->path);
    if (writer->direct > 0)
        close(writer->direct);
    free(writer->path);
    *writer = (struct file_writer){.descriptor = -1};
    return status;
}

enum status file_flush(const char *path) {
    struct file_writer writer = {.descriptor = -1};
    TRY(file_writer_open(&writer, path, true));
    enum status status = file_writer_flush(&writer);
    enum status closed = file_writer_close(&writer);
    return status == STATUS_OK ? closed : status;
}

enum status file_write_draft(const char *path, const void *data, size_t size) {
    struct file_writer writer = {.descriptor = -1};
    TRY(file_writer_open(&writer, path, false));
    enum status status = file_writer_add(&writer, data, size);
    sync_file_range(writer.descriptor, 0, 0, SYNC_FILE_RANGE_WRITE); /* a hint: what follows finds it done */
    enum status closed = file_writer_close(&writer);
    return status == STATUS_OK ? closed : status;
}

static enum status write_and_flush(const char *path, const void *data, size_t size) {
    struct file_writer writer = {.descriptor = -1};
    TRY(file_writer_open(&writer, path, false));
    enum status status = file_writer_add(&writer, data, size);
    if (status == STATUS_OK)
        status = file_writer_flush(&writer);
    if (status != STATUS_OK) {
        enum status ignored = file_writer_close(&writer);
        (void)ignored; /* the first failure is the one to tell */
        return status;
    }
    return file_writer_close(&writer);
}

/* The directory that a path is in. */
static char *parent_of(const char *path) {
    const char *slash = strrchr(path, '/');
    if (!slash)
        return memory_copy_string(".");
    return text_format("%.*s", slash == path ? 1 : (int)(slash - path), path);
}

static enum status flush_parent(const char *path) {
    char *parent = parent_of(path);
    enum status status = directory_flush(parent);
    free(parent);
    return status;
}

enum status file_write(const char *path, const void *data, size_t size) {
    char *temporary = text_format("%s.tmp", path);
    enum status status = write_and_flush(temporary, data, size);
    if (status == STATUS_OK)
        status = file_rename(temporary, path);
    else
        unlink(temporary);
    if (status == STATUS_OK)
        status = flush_parent(path);
    free(temporary);
    return status;
}

enum status file_map_open(struct file_map *map, const char *path) {
    *map = (struct file_map){0};
    uint64_t size;
    TRY(file_size(path, &size));
    int descriptor = faulted(FILE_OPEN, path) ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    if (descriptor < 0)
        return fail_errno("open", path);
    void *data = size ? mmap(NULL, size, PROT_READ, MAP_PRIVATE, descriptor, 0) : NULL;
    if (data == MAP_FAILED) {
        enum status status = fail_errno("map", path);
        close(descriptor);
        return status;
    }
    close(descriptor);
    *map = (struct file_map){data, size};
    return STATUS_OK;
}

void file_map_expect(const struct file_map *map, bool few) {
    if (map->data)
        madvise((void *)(uintptr_t)map->data, map->size, few ? MADV_RANDOM : MADV_NORMAL);
}

void file_map_close(struct file_map *map) {
    if (map->data)
        munmap((void *)(uintptr_t)map->data, map->size);
    *map = (struct file_map){0};
}

enum status file_rename(const char *from, const char *to) {
    if (faulted(FILE_RENAME, to) || rename(from, to) != 0)
        return fail_errno("rename to its final name", to);
    return STATUS_OK;
}

enum status file_remove(const char *path) {
    if (faulted(FILE_REMOVE, path) || (unlink(path) != 0 && errno != ENOENT))
        return fail_errno("remove", path);
    return STATUS_OK;
}

static enum status make_one(const char *path, bool lasting) {
    bool made = !faulted(FILE_MAKE, path) && mkdir(path, 0755) == 0;
    if (!made && !(errno == EEXIST && directory_exists(path)))
        return fail_errno("make directory", path);
    return made && lasting ? flush_parent(path) : STATUS_OK;
}

static enum status make_with_parents(const char *path, bool lasting) {
    char *partial = memory_copy_string(path);
    enum status status = STATUS_OK;
    for (char *slash = partial + 1; *partial && status == STATUS_OK && (slash = strchr(slash, '/')); slash++) {
        *slash = '\0';
        status = make_one(partial, lasting);
        *slash = '/';
    }
    if (status == STATUS_OK)
        status = make_one(path, false);
    free(partial);
    return status;
}

enum status directory_make(const char *path) {
    return make_with_parents(path, false);
}

enum status directory_make_lasting(const char *path) {
    TRY(make_with_parents(path, true));
    return flush_parent(path);
}

enum status directory_flush(const char *path) {
    int descriptor = faulted(FILE_FLUSH, path) ? -1 : open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor < 0)
        return fail_errno("open to flush", path);
    enum status status = fsync(descriptor) == 0 ? STATUS_OK : fail_errno("flush to disk", path);
    close(descriptor);
    return status;
}

enum status directory_remove(const char *path) {
    struct stat info;
    if (lstat(path, &info) != 0)
        return errno == ENOENT ? STATUS_OK : fail_errno("look at", path);
    if (!S_ISDIR(info.st_mode))
        return file_remove(path);
    struct text_list names = {0};
    TRY(directory_list(path, &names));
    enum status status = STATUS_OK;
    for (size_t i = 0; i < names.count && status == STATUS_OK; i++) {
        char *child = path_join(path, names.items[i]);
        status = directory_remove(child);
        free(child);
    }
    text_list_release(&names);
    TRY(status);
    if (faulted(FILE_REMOVE, path) || rmdir(path) != 0)
        return fail_errno("remove", path);
    return STATUS_OK;
}

static int compare_names(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

enum status directory_list(const char *path, struct text_list *names) {
    *names = (struct text_list){0};
    DIR *directory = opendir(path);
    if (!directory)
        return fail_errno("list", path);
    for (struct dirent *entry; (entry = readdir(directory));) {
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            text_list_add(names, entry->d_name);
    }
    closedir(directory);
    if (names->count)
        qsort(names->items, names->count, sizeof *names->items, compare_names);
    return STATUS_OK;
}

static enum status glob_one(const char *pattern, struct text_list *paths) {
    glob_t found = {0};
    int result = glob(pattern, 0, NULL, &found);
    if (result == GLOB_NOMATCH)
        return status_fail(STATUS_NOT_FOUND, "%s: no such file", pattern);
    if (result != 0)
        return status_fail(STATUS_IO, "%s: cannot be searched", pattern);
    for (size_t i = 0; i < found.gl_pathc; i++)
        text_list_add(paths, found.gl_pathv[i]);
    globfree(&found);
    return STATUS_OK;
}

enum status file_glob(const char *patterns, struct text_list *paths) {
    *paths = (struct text_list){0};
    char *copy = memory_copy_string(patterns), *rest = copy;
    enum status status = STATUS_OK;
    for (char *pattern; status == STATUS_OK && (pattern = strsep(&rest, ","));) {
        if (*pattern)
            status = glob_one(pattern, paths);
    }
    if (status == STATUS_OK && paths->count == 0)
        status = status_fail(STATUS_NOT_FOUND, "no file is named");
    if (status != STATUS_OK)
        text_list_release(paths);
    free(copy);
    return status;
}

char *path_join(const char *directory, const char *name) {
    size_t size = strlen(directory);
    return text_format("%s%s%s", directory, size && directory[size - 1] == '/' ? "" : "/", name);
}

const char *path_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}
