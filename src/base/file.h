/* Files and directories, with messages that name the path.
 *
 * Every call into the system goes through one place, so that tests can fail any of them (file_set_fault): the n-th
 * open, write, flush or rename of a save can be made to answer EIO or ENOSPC, and the survivors are looked at.
 */
#pragma once

#include "base/status.h"
#include "base/text.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum file_operation { FILE_OPEN, FILE_READ, FILE_WRITE, FILE_FLUSH, FILE_RENAME, FILE_MAKE, FILE_REMOVE };

enum { FILE_FAULT_SHORT = -1 };

/* Asked before each operation; an answer other than 0 is the errno it fails with, or FILE_FAULT_SHORT: a write of which
 * only a part arrives. NULL switches it off. Tests only. */
void file_set_fault(int (*fault)(void *context, enum file_operation operation, const char *path), void *context);

bool file_exists(const char *path);
bool directory_exists(const char *path);

enum status file_size(const char *path, uint64_t *size) MUST_USE;

/* The whole file, followed by one zero byte that *size does not count. Refuses one larger than limit_bytes before
 * reading it. The caller frees *data. */
enum status file_read(const char *path, uint64_t limit_bytes, char **data, size_t *size) MUST_USE;

/* Replace a file by new contents so that at any moment, also after a crash, the old or the new one is there whole:
 * written beside it, flushed, renamed, directory flushed. */
enum status file_write(const char *path, const void *data, size_t size) MUST_USE;

/* A new file in a directory that nobody reads yet, such as a checkpoint's draft: not whole at any moment, and not flushed; the
 * system begins to bring it to the disk. */
enum status file_write_draft(const char *path, const void *data, size_t size) MUST_USE;

/* Some memory, one of several pieces that stand one after the other in a file. Written to where it is read into. */
struct file_part {
    void *data;
    size_t bytes;
};

/* A file open for reading at any place; several threads may read at once. What lies in memory to the blocks of
 * FILE_BLOCK_BYTES as it does in the file comes from the disk without a copy in between, which is fastest into large pages
 * (into small ones a virtual disk gave half of that); the rest through the system's cache. */
struct file_reader {
    int descriptor; /* -1 when closed */
    char *path;     /* owned */
    int direct;     /* the same file past the cache; 0: the file system does not have that */
};
enum status file_reader_open(struct file_reader *reader, const char *path) MUST_USE;
/* Exactly `size` bytes; STATUS_IO where the file ends before. */
enum status file_reader_at(const struct file_reader *reader, uint64_t position, void *data, size_t size) MUST_USE;
/* The same into parts, one after the other; those that are whole blocks together. */
enum status file_reader_parts(const struct file_reader *reader, uint64_t position, const struct file_part *parts,
                              int count) MUST_USE;
void file_reader_close(struct file_reader *reader);

/* A new file of `size` bytes, all zero, with its room on the disk taken where the file system can do that at once: a full
 * disk is found here. Not flushed. */
enum status file_create(const char *path, uint64_t size) MUST_USE;

/* A file being written from its start (or, with append, at its end; or at any place). */
struct file_writer {
    int descriptor; /* -1 when closed */
    char *path;     /* owned */
    uint64_t position;
    int direct; /* a second descriptor for file_writer_put; 0: none */
};
enum status file_writer_open(struct file_writer *writer, const char *path, bool append) MUST_USE;
enum status file_writer_add(struct file_writer *writer, const void *data, size_t size) MUST_USE;
/* A file that is there, for file_writer_put; others may write other places of it at the same time. */
enum status file_writer_open_at(struct file_writer *writer, const char *path) MUST_USE;
/* Bytes at a place of their own, which the system begins to bring to the disk. Leaves writer->position alone; several threads
 * may put at once. Whole blocks of FILE_BLOCK_BYTES whose place and memory are both aligned to that go straight from memory to
 * the disk, past the system's cache, where the file system can: several times as fast, for less work. */
enum { FILE_BLOCK_BYTES = 4096 };
enum status file_writer_put(struct file_writer *writer, uint64_t position, const void *data, size_t size) MUST_USE;
/* Parts of memory one after the other in the file; those that are whole blocks as above, together. */
enum status file_writer_put_parts(struct file_writer *writer, uint64_t position, const struct file_part *parts,
                                  int count) MUST_USE;
enum status file_writer_flush(struct file_writer *writer) MUST_USE; /* to the disk: fsync */
enum status file_writer_close(struct file_writer *writer) MUST_USE; /* does not flush; also after an error */

/* A whole file mapped for reading; data is NULL for an empty file. Borrowed until file_map_close. */
struct file_map {
    const unsigned char *data;
    uint64_t size;
};
enum status file_map_open(struct file_map *map, const char *path) MUST_USE;
/* Whether a few places of it are looked at next, or all of it: the system reads ahead by megabytes where it is not told. */
void file_map_expect(const struct file_map *map, bool few);
void file_map_close(struct file_map *map);

enum status file_flush(const char *path) MUST_USE; /* what anybody has written to it, to the disk */
enum status file_rename(const char *from, const char *to) MUST_USE; /* atomic on one file system */
enum status file_remove(const char *path) MUST_USE;                 /* not there: also STATUS_OK */
enum status directory_make(const char *path) MUST_USE;              /* with its parents; already there: STATUS_OK */
/* And so that a crash does not lose it: what got a new directory is flushed, and what `path` is in always, since whoever made
 * it may have been killed before he did. */
enum status directory_make_lasting(const char *path) MUST_USE;
enum status directory_flush(const char *path) MUST_USE;             /* makes a rename inside it durable */
enum status directory_remove(const char *path) MUST_USE;            /* with all it holds; links are not followed */

/* Names in a directory, without . and .., sorted. The caller releases the list. */
enum status directory_list(const char *path, struct text_list *names) MUST_USE;

/* Files that match a shell pattern or list of patterns separated by commas, sorted within each pattern; a name
 * without wildcards must exist. Fails with STATUS_NOT_FOUND where a pattern matches nothing. */
enum status file_glob(const char *patterns, struct text_list *paths) MUST_USE;

/* "a/b" in fresh memory; the caller frees it. */
char *path_join(const char *directory, const char *name);
/* The part after the last slash; borrowed from path. */
const char *path_name(const char *path);
