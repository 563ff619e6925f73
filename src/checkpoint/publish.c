/* Invariants
 *  1. A directory gets a plain name (step-NNNNNN) only by a rename, after all in it was flushed: a plain name is whole.
 *  2. A checkpoint that is replaced or deleted leaves its plain name by a rename too. While it is replaced it is called
 *     .old-PID, and counts as the checkpoint of its step as long as nothing has the plain name.
 *  3. What is called .tmp-PID is worth nothing: a draft that was not committed, or a deletion that was not finished.
 */
#include "checkpoint/publish.h"

#include "base/file.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/threads.h"
#include "device/device.h"
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* BUFFER_BYTES: an extent and the rest of two blocks; a whole number of large pages, so that none is shared by two threads. */
enum { BUFFER_BYTES = CHECKPOINT_EXTENT_BYTES_MAX + (2 << 20) };
enum { EXTENT_BLOCKS_MAX = CHECKPOINT_EXTENT_BYTES_MAX / HASH_BLOCK_BYTES + 1, PARTS_MAX = 64 };
enum { EXTENT_BYTES = CHECKPOINT_EXTENT_BYTES_MAX, MANIFEST_BYTES_MAX = 512 << 20, STEP_DIGITS_MAX = 15, HASH_DIGITS = 16 };
enum { MANIFEST_VERSION = 4, MANIFEST_VERSION_OF_WHOLE_EXTENTS = 3, MANIFEST_VERSION_OF_PIECES = 2 };

static const char MANIFEST[] = "training/manifest.json";
static const char STEP_PREFIX[] = "step-", DRAFT[] = ".tmp-", ASIDE[] = ".old-";

/* ---- names ------------------------------------------------------------------------------------------------------- */

/* Number of digits that follow the "step-" of a name; 0 for any other name. */
static size_t step_digits(const char *name) {
    if (strncmp(name, STEP_PREFIX, sizeof STEP_PREFIX - 1) != 0)
        return 0;
    size_t digits = strspn(name + sizeof STEP_PREFIX - 1, "0123456789");
    return digits <= STEP_DIGITS_MAX ? digits : 0;
}

/* What follows the digits in the name of a step: "" for a checkpoint; NULL where the name is not one of ours. */
static const char *step_suffix(const char *name) {
    size_t digits = step_digits(name);
    return digits ? name + sizeof STEP_PREFIX - 1 + digits : NULL;
}

static bool has_prefix(const char *text, const char *prefix) {
    return text && strncmp(text, prefix, strlen(prefix)) == 0;
}

/* A checkpoint whose replacement did not come takes its name back; other leftovers go. */
static enum status settle_leftover(const char *directory, const char *name) {
    const char *suffix = step_suffix(name);
    if (!has_prefix(suffix, ASIDE) && !has_prefix(suffix, DRAFT))
        return STATUS_OK;
    char *path = path_join(directory, name);
    char *plain = text_format("%s/%.*s", directory, (int)(suffix - name), name);
    enum status status = STATUS_OK;
    if (has_prefix(suffix, ASIDE) && !directory_exists(plain))
        status = file_rename(path, plain);
    else if (directory_remove(path) != STATUS_OK)
        log_warn("%s", status_text()); /* worth nothing, and tried again by the next save */
    free(plain);
    free(path);
    return status;
}

enum status checkpoint_settle(const char *directory) {
    struct text_list names;
    TRY(directory_list(directory, &names));
    enum status status = STATUS_OK;
    for (size_t i = 0; i < names.count && status == STATUS_OK; i++)
        status = settle_leftover(directory, names.items[i]);
    text_list_release(&names);
    return status;
}

static void draft_release(struct checkpoint_draft *draft) {
    free(draft->directory);
    free(draft->path);
    free(draft->final_path);
    *draft = (struct checkpoint_draft){0};
}

enum status checkpoint_begin(struct checkpoint_draft *draft, const char *directory, int64_t step) {
    CHECK_OP(step, >=, 0);
    TRY(directory_make_lasting(directory));
    TRY(checkpoint_settle(directory));
    *draft = (struct checkpoint_draft){
        memory_copy_string(directory),
        text_format("%s/%s%06" PRId64 "%s%d", directory, STEP_PREFIX, step, DRAFT, (int)getpid()),
        text_format("%s/%s%06" PRId64, directory, STEP_PREFIX, step),
    };
    char *training = path_join(draft->path, "training");
    enum status status = directory_exists(draft->path)
                             ? status_fail(STATUS_IO, "%s: stands in the way and cannot be removed", draft->path)
                             : directory_make(training);
    free(training);
    if (status != STATUS_OK)
        checkpoint_abandon(draft);
    return status;
}

void checkpoint_abandon(struct checkpoint_draft *draft) {
    char *reason = memory_copy_string(status_text()); /* what led here matters more than a failed removal */
    if (draft->path && directory_remove(draft->path) != STATUS_OK)
        log_verbose("%s", status_text());
    if (*reason)
        status_fail(STATUS_IO, "%s", reason);
    free(reason);
    draft_release(draft);
}

/* ---- the manifest ------------------------------------------------------------------------------------------------ */

struct contents {
    struct text_list files;       /* all but the manifest; paths below the root */
    struct text_list directories; /* a directory stands before those inside it; the root is "." */
};

static void contents_release(struct contents *contents) {
    text_list_release(&contents->files);
    text_list_release(&contents->directories);
}

static enum status list_contents(const char *root, const char *below, struct contents *contents) {
    char *path = *below ? path_join(root, below) : memory_copy_string(root);
    struct text_list names = {0};
    text_list_add(&contents->directories, *below ? below : ".");
    enum status status = directory_list(path, &names);
    for (size_t i = 0; i < names.count && status == STATUS_OK; i++) {
        char *child = *below ? path_join(below, names.items[i]) : memory_copy_string(names.items[i]);
        char *full = path_join(root, child);
        if (directory_exists(full))
            status = list_contents(root, child, contents);
        else if (strcmp(child, MANIFEST) != 0)
            text_list_add(&contents->files, child);
        free(full);
        free(child);
    }
    text_list_release(&names);
    free(path);
    return status;
}

static uint64_t hash_block(const char *data, size_t bytes, const struct known_hashes *known) {
    const uint64_t *hash = bytes == HASH_BLOCK_BYTES ? known_hashes_at(known, data) : NULL;
    return hash && *hash ? *hash : hash_bytes(data, bytes, 0);
}

uint64_t checkpoint_parts_hash(const struct file_part *parts, int count, uint64_t begin, const struct known_hashes *known) {
    uint64_t hashes[EXTENT_BLOCKS_MAX], at = begin;
    size_t blocks = 0;
    for (int i = 0; i < count; i++)
        for (size_t done = 0, bytes; done < parts[i].bytes; done += bytes, at += bytes) {
            size_t to_block = (size_t)(HASH_BLOCK_BYTES - at % HASH_BLOCK_BYTES), left = parts[i].bytes - done;
            CHECK_OP(blocks, <, EXTENT_BLOCKS_MAX);
            bytes = left < to_block ? left : to_block;
            hashes[blocks++] = hash_block((const char *)parts[i].data + done, bytes, known);
        }
    return hash_bytes(hashes, blocks * sizeof *hashes, begin);
}

uint64_t checkpoint_extent_hash(const void *data, size_t bytes, uint64_t begin) {
    struct file_part part = {(void *)(uintptr_t)data, bytes}; /* not written to */
    return checkpoint_parts_hash(&part, 1, begin, NULL);
}

/* Takes nothing; {"bytes", "extent_bytes", "xxh3_64"} of a file. */
static json_t *describe_extents(const struct checkpoint_extent *extents, size_t count) {
    json_t *sizes = json_array(), *hashes = json_array();
    uint64_t size = 0;
    for (size_t i = 0; i < count; i++) {
        char hash[HASH_DIGITS + 1];
        snprintf(hash, sizeof hash, "%016" PRIx64, extents[i].hash);
        json_array_append_new(sizes, json_integer(extents[i].bytes));
        json_array_append_new(hashes, json_string(hash));
        size += extents[i].bytes;
    }
    return json_pack("{s:I,s:o,s:o}", "bytes", (json_int_t)size, "extent_bytes", sizes, "xxh3_64", hashes);
}

/* Of a file that nobody hashed while writing it. */
static enum status hash_file(const struct file_reader *file, uint64_t size, char *buffer, struct checkpoint_extent *extents) {
    for (uint64_t begin = 0; begin < size; begin += EXTENT_BYTES) {
        uint32_t bytes = (uint32_t)(size - begin < EXTENT_BYTES ? size - begin : EXTENT_BYTES);
        TRY(file_reader_at(file, begin, buffer, bytes));
        extents[begin / EXTENT_BYTES] =
            (struct checkpoint_extent){begin, checkpoint_extent_hash(buffer, bytes, begin), bytes, 0};
    }
    return STATUS_OK;
}

static enum status describe_small_file(const char *path, json_t **described) {
    struct checkpoint_extent extent = {0};
    char *data;
    size_t size;
    TRY(file_read(path, EXTENT_BYTES, &data, &size));
    extent.bytes = (uint32_t)size;
    extent.hash = checkpoint_extent_hash(data, size, 0);
    free(data);
    *described = describe_extents(&extent, size > 0);
    return STATUS_OK;
}

static enum status describe_file(const char *path, json_t **described) {
    struct file_reader file;
    struct checkpoint_extent *extents = NULL;
    char *buffer = NULL;
    uint64_t size;
    TRY(file_size(path, &size));
    if (size <= EXTENT_BYTES)
        return describe_small_file(path, described);
    size_t count = (size_t)((size + EXTENT_BYTES - 1) / EXTENT_BYTES);
    TRY(file_reader_open(&file, path));
    enum status status = memory_alloc(&extents, count, sizeof *extents);
    if (status == STATUS_OK)
        status = memory_alloc(&buffer, EXTENT_BYTES, 1);
    if (status == STATUS_OK)
        status = hash_file(&file, size, buffer, extents);
    if (status == STATUS_OK)
        *described = describe_extents(extents, count);
    free(buffer);
    free(extents);
    file_reader_close(&file);
    return status;
}

static int compare_extents(const void *a, const void *b) {
    const struct checkpoint_extent *x = a, *y = b;
    if (x->file != y->file)
        return x->file < y->file ? -1 : 1;
    return x->begin < y->begin ? -1 : x->begin > y->begin;
}

/* The extents of a file from those of all, sorted. Whatever has no hash would be damage that nobody can see. */
static enum status describe_written(const char *path, const struct checkpoint_written *written, int file, json_t **described) {
    size_t first = 0, count = 0;
    uint64_t covered = 0, size;
    TRY(file_size(path, &size));
    while (first < written->extent_count && written->extents[first].file < file)
        first++;
    const struct checkpoint_extent *of_file = written->extents + first;
    for (; first + count < written->extent_count && of_file[count].file == file; count++) {
        if (of_file[count].begin != covered)
            break;
        covered += of_file[count].bytes;
    }
    bool all = first + count == written->extent_count || of_file[count].file != file;
    if (!all || covered != size)
        return status_fail(STATUS_FORMAT, "%s: what was written ends or overlaps at byte %llu of %llu", path,
                           (unsigned long long)covered, (unsigned long long)size);
    *described = describe_extents(of_file, count);
    return STATUS_OK;
}

/* Index of a name among those written; -1 for another file. */
static int find_written(const struct checkpoint_written *written, const char *name) {
    for (int i = 0; written && i < written->name_count; i++)
        if (strcmp(written->names[i], name) == 0)
            return i;
    return -1;
}

/* The manifest carries a hash of its own text, taken while the digits of that hash are zeros, so that any flipped bit
 * in it is damage and never another truth. The text is hashed, not what it says: no JSON writer needs to write the same
 * way for ever. The seal's key comes first in the file, before any name that somebody else chose. */
static const char SEAL_KEY[] = "\"manifest_xxh3_64\": \"", SEAL_ZEROS[] = "0000000000000000";

/* The digits of the seal inside the text, which is followed by a zero byte; NULL where there is none. */
static char *find_seal(char *text) {
    char *key = strstr(text, SEAL_KEY), *digits = key ? key + sizeof SEAL_KEY - 1 : NULL;
    return digits && strlen(digits) >= HASH_DIGITS ? digits : NULL;
}

/* Leaves zeros in the place of the digits. */
static void seal_hash(char *text, size_t size, char *digits, char out[HASH_DIGITS + 1]) {
    memcpy(digits, SEAL_ZEROS, HASH_DIGITS);
    snprintf(out, HASH_DIGITS + 1, "%016" PRIx64, hash_bytes(text, size, 0));
}

static enum status write_sealed(const char *path, const json_t *manifest) {
    char hash[HASH_DIGITS + 1], *text = json_dumps(manifest, JSON_PRESERVE_ORDER);
    if (!text)
        return status_fail(STATUS_MEMORY, "%s: no memory to write it", path);
    size_t size = strlen(text);
    char *digits = find_seal(text);
    CHECK(digits != NULL);
    seal_hash(text, size, digits, hash);
    memcpy(digits, hash, HASH_DIGITS);
    enum status status = file_write_draft(path, text, size);
    if (status == STATUS_OK)
        status = file_flush(path);
    free(text);
    return status;
}

static enum status describe_all(const char *root, const struct text_list *names, const struct checkpoint_written *written,
                                json_t *files) {
    for (size_t i = 0; i < names->count; i++) {
        char *path = path_join(root, names->items[i]);
        int file = find_written(written, names->items[i]);
        json_t *described = NULL;
        enum status status =
            file < 0 ? describe_file(path, &described) : describe_written(path, written, file, &described);
        free(path);
        TRY(status);
        json_object_set_new(files, names->items[i], described);
    }
    return STATUS_OK;
}

static enum status write_manifest(const char *root, const struct text_list *names, const struct checkpoint_written *written) {
    json_t *files = json_object();
    enum status status = describe_all(root, names, written, files);
    if (status == STATUS_OK) {
        char *path = path_join(root, MANIFEST);
        json_t *manifest = json_pack("{s:s,s:i,s:O}", "manifest_xxh3_64", SEAL_ZEROS, "version", MANIFEST_VERSION, "files",
                                     files);
        CHECK(manifest != NULL);
        status = write_sealed(path, manifest);
        json_decref(manifest);
        free(path);
    }
    json_decref(files);
    return status;
}

static enum status flush_file(const char *root, const char *name) {
    char *path = path_join(root, name);
    enum status status = file_flush(path);
    free(path);
    return status;
}

static enum status flush_directories(const char *root, const struct text_list *names) {
    enum status status = STATUS_OK;
    for (size_t i = names->count; i > 0 && status == STATUS_OK; i--) {
        char *path = path_join(root, names->items[i - 1]);
        status = directory_flush(path);
        free(path);
    }
    return status;
}

/* A directory cannot be renamed over a full one: an older one of the same step steps aside, and whoever looks in
 * between finds it there (invariant 2). */
static enum status rename_draft(const struct checkpoint_draft *draft) {
    char *aside = text_format("%s%s%d", draft->final_path, ASIDE, (int)getpid());
    enum status status = STATUS_OK;
    bool replaces = directory_exists(draft->final_path);
    if (replaces)
        status = file_rename(draft->final_path, aside);
    if (status == STATUS_OK) {
        status = file_rename(draft->path, draft->final_path);
        if (status != STATUS_OK && replaces && rename(aside, draft->final_path) != 0)
            log_verbose("%s: stays under this name until the next save", aside);
    }
    if (status == STATUS_OK)
        status = directory_flush(draft->directory);
    if (status == STATUS_OK && replaces && directory_remove(aside) != STATUS_OK)
        log_verbose("%s", status_text()); /* a leftover; the next save removes it */
    free(aside);
    return status;
}

static enum status commit(struct checkpoint_draft *draft, const struct checkpoint_written *written,
                          struct contents *contents) {
    TRY(list_contents(draft->path, "", contents));
    for (size_t i = 0; i < contents->files.count; i++)
        if (find_written(written, contents->files.items[i]) < 0)
            TRY(flush_file(draft->path, contents->files.items[i]));
    if (written && written->extent_count)
        qsort(written->extents, written->extent_count, sizeof *written->extents, compare_extents);
    TRY(write_manifest(draft->path, &contents->files, written));
    TRY(flush_directories(draft->path, &contents->directories));
    return rename_draft(draft);
}

enum status checkpoint_commit(struct checkpoint_draft *draft, const struct checkpoint_written *written) {
    struct contents contents = {0};
    enum status status = commit(draft, written, &contents);
    contents_release(&contents);
    if (status != STATUS_OK)
        checkpoint_abandon(draft);
    else
        draft_release(draft);
    return status;
}

/* ---- reading a manifest ---------------------------------------------------------------------------------------------- */

void checkpoint_manifest_close(struct checkpoint_manifest *manifest) {
    for (size_t i = 0; i < manifest->file_count; i++) {
        free(manifest->files[i].name);
        free(manifest->files[i].extents);
    }
    free(manifest->files);
    *manifest = (struct checkpoint_manifest){0};
}

static bool read_hash(const json_t *digits, uint64_t *hash) {
    const char *text = json_string_value(digits);
    if (!text || strlen(text) != HASH_DIGITS || strspn(text, "0123456789abcdef") != HASH_DIGITS)
        return false;
    *hash = strtoull(text, NULL, 16);
    return true;
}

/* Bytes of extent `index`, which begins at `begin`; 0 where the manifest is none of ours. sizes NULL: pieces of 4 MiB. */
static uint32_t extent_bytes(const json_t *sizes, size_t index, uint64_t begin, uint64_t file_bytes) {
    uint64_t left = begin < file_bytes ? file_bytes - begin : 0;
    json_int_t bytes = sizes ? json_integer_value(json_array_get(sizes, index)) : EXTENT_BYTES;
    if (bytes < 1 || bytes > EXTENT_BYTES || (sizes && (uint64_t)bytes > left))
        return 0;
    return (uint32_t)((uint64_t)bytes < left ? (uint64_t)bytes : left);
}

static enum status read_extents(const char *path, const json_t *described, const json_t *sizes, struct checkpoint_file *file) {
    const json_t *hashes = json_object_get(described, "xxh3_64");
    uint64_t begin = 0;
    file->extent_count = json_array_size(hashes);
    TRY(memory_alloc(&file->extents, file->extent_count, sizeof *file->extents));
    for (size_t i = 0; i < file->extent_count; i++) {
        struct checkpoint_extent *extent = &file->extents[i];
        *extent = (struct checkpoint_extent){.begin = begin, .bytes = extent_bytes(sizes, i, begin, file->bytes)};
        if (extent->bytes == 0 || !read_hash(json_array_get(hashes, i), &extent->hash))
            return status_fail(STATUS_FORMAT, "%s: extent %zu of \"%.100s\" is none", path, i, file->name);
        begin += extent->bytes;
    }
    if (begin != file->bytes || (sizes && json_array_size(sizes) != file->extent_count))
        return status_fail(STATUS_FORMAT, "%s: does not cover \"%.100s\"", path, file->name);
    return STATUS_OK;
}

static enum status read_file_entry(const char *path, const char *name, const json_t *described, json_int_t version,
                                   struct checkpoint_manifest *manifest) {
    json_int_t bytes = json_integer_value(json_object_get(described, "bytes"));
    const json_t *sizes = json_object_get(described, "extent_bytes");
    if (*name == '/' || strstr(name, ".."))
        return status_fail(STATUS_FORMAT, "%s: the manifest names a file outside", path);
    if (bytes < 0 || (version == MANIFEST_VERSION_OF_PIECES) == json_is_array(sizes))
        return status_fail(STATUS_FORMAT, "%s: does not say how long \"%.100s\" is", path, name);
    struct checkpoint_file *file = &manifest->files[manifest->file_count++];
    *file = (struct checkpoint_file){.name = memory_copy_string(name), .bytes = (uint64_t)bytes};
    return read_extents(path, described, sizes, file);
}

static enum status read_files(const char *path, const json_t *object, struct checkpoint_manifest *manifest) {
    json_t *files = json_object_get(object, "files"), *described;
    const char *name;
    json_int_t version = json_integer_value(json_object_get(object, "version"));
    if (version < MANIFEST_VERSION_OF_PIECES || version > MANIFEST_VERSION || !json_is_object(files))
        return status_fail(STATUS_FORMAT, "%s: is a manifest of version %lld, this program reads versions %d to %d", path,
                           (long long)version, MANIFEST_VERSION_OF_PIECES, MANIFEST_VERSION);
    manifest->hashes_whole_extents = version <= MANIFEST_VERSION_OF_WHOLE_EXTENTS;
    TRY(memory_alloc(&manifest->files, json_object_size(files), sizeof *manifest->files));
    json_object_foreach(files, name, described) {
        TRY(read_file_entry(path, name, described, version, manifest));
    }
    return STATUS_OK;
}

static enum status read_manifest(const char *path, char *text, size_t size, struct checkpoint_manifest *manifest) {
    char known[HASH_DIGITS], hash[HASH_DIGITS + 1], *digits = find_seal(text);
    if (!digits)
        return status_fail(STATUS_FORMAT, "%s: is damaged or of an older version: it has no hash of its own", path);
    memcpy(known, digits, HASH_DIGITS);
    seal_hash(text, size, digits, hash);
    if (memcmp(known, hash, HASH_DIGITS) != 0)
        return status_fail(STATUS_FORMAT, "%s: is damaged: its text does not have the hash that it names", path);
    json_t *object;
    TRY(json_parse(path, text, size, &object));
    enum status status = read_files(path, object, manifest);
    json_decref(object);
    return status;
}

enum status checkpoint_manifest_open(struct checkpoint_manifest *manifest, const char *root) {
    *manifest = (struct checkpoint_manifest){0};
    char *path = path_join(root, MANIFEST), *text;
    size_t size;
    enum status status = file_read(path, MANIFEST_BYTES_MAX, &text, &size);
    if (status == STATUS_OK) {
        status = read_manifest(path, text, size, manifest);
        free(text);
    }
    free(path);
    if (status != STATUS_OK)
        checkpoint_manifest_close(manifest);
    return status;
}

/* ---- reading and verifying ----------------------------------------------------------------------------------------- */

int checkpoint_find_file(const struct checkpoint_manifest *manifest, const char *name) {
    for (size_t i = 0; i < manifest->file_count; i++)
        if (strcmp(manifest->files[i].name, name) == 0)
            return (int)i;
    return -1;
}

static int compare_targets(const void *a, const void *b) {
    const struct checkpoint_target *x = a, *y = b;
    if (x->file != y->file)
        return x->file < y->file ? -1 : 1;
    return x->begin < y->begin ? -1 : x->begin > y->begin;
}

/* An extent that is wanted, and the first target that it meets. */
struct read_task {
    int file;
    size_t extent, target;
};

struct reading {
    const struct checkpoint_manifest *manifest;
    const struct checkpoint_target *targets;
    size_t target_count;
    const struct device *device;
    struct file_reader *readers; /* [file_count]; path NULL: has no target */
    struct read_task *tasks;
    size_t task_count;
    char *buffers;       /* [threads][BUFFER_BYTES] aligned to large pages */
    _Atomic int64_t bad; /* the lowest task that failed, or INT64_MAX */
};

static uint64_t extent_end(const struct checkpoint_extent *extent) {
    return extent->begin + extent->bytes;
}

static uint64_t target_end(const struct checkpoint_target *target) {
    return target->begin + target->bytes;
}

static enum status check_size(const char *path, const struct checkpoint_file *file) {
    uint64_t size;
    if (!file_exists(path))
        return status_fail(STATUS_FORMAT, "%s: is missing, its checkpoint wrote it", path);
    TRY(file_size(path, &size));
    if (size != file->bytes)
        return status_fail(STATUS_FORMAT, "%s: is damaged: it has %llu bytes, its checkpoint wrote %llu", path,
                           (unsigned long long)size, (unsigned long long)file->bytes);
    return STATUS_OK;
}

static enum status open_reader(struct reading *r, const char *root, int file) {
    if (r->readers[file].path)
        return STATUS_OK;
    char *path = path_join(root, r->manifest->files[file].name);
    enum status status = check_size(path, &r->manifest->files[file]);
    if (status == STATUS_OK)
        status = file_reader_open(&r->readers[file], path);
    free(path);
    return status;
}

/* Targets are sorted, extents too: one walk over both. */
static enum status plan_reading(struct reading *r, const char *root) {
    size_t most = 0;
    for (size_t i = 0; i < r->manifest->file_count; i++)
        most += r->manifest->files[i].extent_count;
    TRY(memory_alloc(&r->readers, r->manifest->file_count, sizeof *r->readers));
    TRY(memory_alloc(&r->tasks, most, sizeof *r->tasks));
    TRY(memory_alloc_large_pages(&r->buffers, (size_t)waiting_threads_count() * BUFFER_BYTES));
    size_t extent = 0;
    for (size_t i = 0; i < r->target_count; i++) {
        const struct checkpoint_target *target = &r->targets[i];
        const struct checkpoint_file *file = &r->manifest->files[target->file];
        if (i == 0 || r->targets[i - 1].file != target->file)
            extent = 0;
        TRY(open_reader(r, root, target->file));
        while (extent < file->extent_count && extent_end(&file->extents[extent]) <= target->begin)
            extent++;
        for (; extent < file->extent_count && file->extents[extent].begin < target_end(target); extent++)
            r->tasks[r->task_count++] = (struct read_task){target->file, extent, i};
    }
    return STATUS_OK;
}

/* What the targets want of an extent whose bytes are in `buffer`. */
static void deliver(const struct reading *r, const struct read_task *task, const struct checkpoint_extent *extent,
                    const char *buffer) {
    for (size_t i = task->target; i < r->target_count; i++) {
        const struct checkpoint_target *target = &r->targets[i];
        if (target->file != task->file || target->begin >= extent_end(extent))
            return;
        uint64_t begin = target->begin > extent->begin ? target->begin : extent->begin;
        uint64_t end = target_end(target) < extent_end(extent) ? target_end(target) : extent_end(extent);
        if (target->data && begin < end)
            r->device->copy_from_host((char *)target->data + (begin - target->begin), buffer + (begin - extent->begin),
                                      (size_t)(end - begin));
    }
}

/* With the rest of the blocks that it begins and ends in, so that nothing needs the system's cache but the end of the file. */
static enum status read_blocks(const struct file_reader *reader, const struct checkpoint_file *file,
                               const struct checkpoint_extent *extent, char *buffer) {
    uint64_t first = extent->begin / FILE_BLOCK_BYTES * FILE_BLOCK_BYTES;
    uint64_t end = (extent_end(extent) + FILE_BLOCK_BYTES - 1) / FILE_BLOCK_BYTES * FILE_BLOCK_BYTES;
    return file_reader_at(reader, first, buffer, (size_t)((end < file->bytes ? end : file->bytes) - first));
}

static bool is_as_written(const struct reading *r, const struct checkpoint_extent *extent, const struct file_part *parts,
                          int count) {
    if (r->manifest->hashes_whole_extents)
        return hash_bytes(parts->data, extent->bytes, extent->begin) == extent->hash;
    return checkpoint_parts_hash(parts, count, extent->begin, NULL) == extent->hash;
}

/* Where the targets want the bytes of an extent, if it is all of them and each part lies to the blocks of memory as it does in
 * the file, and meets the next one at a block: then they need no buffer. Returns how many parts; 0: they need one. */
static int find_places(const struct reading *r, const struct read_task *task, const struct checkpoint_extent *extent,
                       struct file_part parts[PARTS_MAX]) {
    uint64_t at = extent->begin;
    int count = 0;
    if (r->device != device_cpu())
        return 0;
    for (size_t i = task->target; i < r->target_count && at < extent_end(extent); i++) {
        const struct checkpoint_target *target = &r->targets[i];
        if (target->file != task->file || target->begin > at || !target->data || count == PARTS_MAX)
            return 0;
        uint64_t end = target_end(target) < extent_end(extent) ? target_end(target) : extent_end(extent);
        char *data = (char *)target->data + (at - target->begin);
        if ((uintptr_t)data % FILE_BLOCK_BYTES != at % FILE_BLOCK_BYTES || (count > 0 && at % FILE_BLOCK_BYTES != 0))
            return 0;
        parts[count++] = (struct file_part){data, (size_t)(end - at)};
        at = end;
    }
    return at == extent_end(extent) && !(r->manifest->hashes_whole_extents && count > 1) ? count : 0;
}

static enum status read_extent(const struct reading *r, const struct read_task *task, char *buffer) {
    const struct checkpoint_file *file = &r->manifest->files[task->file];
    const struct checkpoint_extent *extent = &file->extents[task->extent];
    const struct file_reader *reader = &r->readers[task->file];
    struct file_part parts[PARTS_MAX];
    int count = find_places(r, task, extent, parts);
    bool in_place = count > 0;
    if (in_place) {
        TRY(file_reader_parts(reader, extent->begin, parts, count));
    } else {
        TRY(read_blocks(reader, file, extent, buffer));
        parts[0] = (struct file_part){buffer + extent->begin % FILE_BLOCK_BYTES, extent->bytes};
        count = 1;
    }
    if (!is_as_written(r, extent, parts, count))
        return status_fail(STATUS_FORMAT, "%s: is damaged within %u bytes of byte %llu", reader->path, extent->bytes,
                           (unsigned long long)extent->begin);
    if (!in_place)
        deliver(r, task, extent, parts->data);
    return STATUS_OK;
}

static void read_one(void *context, int64_t index) {
    struct reading *r = context;
    int64_t bad = atomic_load(&r->bad);
    char *buffer = r->buffers + (size_t)thread_index() * BUFFER_BYTES;
    if (index > bad || read_extent(r, &r->tasks[index], buffer) == STATUS_OK)
        return;
    while (index < bad && !atomic_compare_exchange_weak(&r->bad, &bad, index)) {
    }
}

/* A message is its thread's own: what failed first is read once more by this one. */
static enum status tell_failure(const struct reading *r) {
    int64_t bad = atomic_load(&r->bad);
    if (bad == INT64_MAX)
        return STATUS_OK;
    TRY(read_extent(r, &r->tasks[bad], r->buffers));
    return status_fail(STATUS_IO, "%s: reads differently from time to time", r->readers[r->tasks[bad].file].path);
}

/* With targets that follow one upon the other, an extent is met by several of them but read once: it is planned at the first,
 * and the walk goes on behind it. */
enum status checkpoint_read(const char *root, const struct checkpoint_manifest *manifest, struct checkpoint_target *targets,
                            size_t target_count, const struct device *device) {
    struct reading r = {.manifest = manifest, .targets = targets, .target_count = target_count, .device = device};
    atomic_init(&r.bad, INT64_MAX);
    if (target_count)
        qsort(targets, target_count, sizeof *targets, compare_targets);
    enum status status = plan_reading(&r, root);
    if (status == STATUS_OK) {
        parallel_for_waiting((int64_t)r.task_count, read_one, &r);
        status = tell_failure(&r);
    }
    for (size_t i = 0; i < manifest->file_count && r.readers; i++)
        file_reader_close(&r.readers[i]);
    free(r.readers);
    free(r.tasks);
    free(r.buffers);
    return status;
}

static const char TRAINING_FOLDER[] = "training/"; /* what only a resume reads */

static enum status verify_files(const char *root, bool model_only) {
    struct checkpoint_manifest manifest;
    struct checkpoint_target *targets;
    size_t count = 0;
    TRY(checkpoint_manifest_open(&manifest, root));
    enum status status = memory_alloc(&targets, manifest.file_count, sizeof *targets);
    for (size_t i = 0; status == STATUS_OK && i < manifest.file_count; i++)
        if (!model_only || !has_prefix(manifest.files[i].name, TRAINING_FOLDER))
            targets[count++] = (struct checkpoint_target){(int)i, 0, manifest.files[i].bytes, NULL};
    if (status == STATUS_OK) {
        status = checkpoint_read(root, &manifest, targets, count, device_cpu());
        free(targets);
    }
    checkpoint_manifest_close(&manifest);
    return status;
}

enum status checkpoint_verify(const char *root) {
    return verify_files(root, false);
}

enum status checkpoint_verify_model(const char *root) {
    return verify_files(root, true);
}

/* ---- choosing ---------------------------------------------------------------------------------------------------- */

struct candidate {
    int64_t step;
    bool aside; /* replaced, or about to be: invariant 2 */
    char *path; /* owned */
};

struct candidate_list {
    struct candidate *items;
    size_t count;
};

static void candidates_release(struct candidate_list *list) {
    for (size_t i = 0; i < list->count; i++)
        free(list->items[i].path);
    free(list->items);
    *list = (struct candidate_list){0};
}

/* Newest first; of one step the plain name first. */
static int compare_candidates(const void *a, const void *b) {
    const struct candidate *x = a, *y = b;
    if (x->step != y->step)
        return x->step > y->step ? -1 : 1;
    if (x->aside != y->aside)
        return x->aside ? 1 : -1;
    return strcmp(x->path, y->path);
}

static void add_candidate(struct candidate_list *list, const char *directory, const char *name) {
    const char *suffix = step_suffix(name);
    if (!suffix || (*suffix && !has_prefix(suffix, ASIDE)))
        return;
    list->items[list->count++] = (struct candidate){strtoll(name + sizeof STEP_PREFIX - 1, NULL, 10), *suffix != '\0',
                                                    path_join(directory, name)};
}

static enum status list_candidates(const char *directory, struct candidate_list *list) {
    struct text_list names;
    *list = (struct candidate_list){0};
    TRY(directory_list(directory, &names));
    enum status status = memory_alloc(&list->items, names.count, sizeof *list->items);
    for (size_t i = 0; i < names.count && status == STATUS_OK; i++)
        add_candidate(list, directory, names.items[i]);
    text_list_release(&names);
    if (list->count)
        qsort(list->items, list->count, sizeof *list->items, compare_candidates);
    return status;
}

/* Index of the first that verifies, or is of a step that is known to be good; count where there is none. Too little memory
 * says nothing about a checkpoint. */
static enum status find_good(const struct candidate_list *list, enum status (*verify)(const char *path), size_t *index,
                             int64_t good_step) {
    for (*index = 0; *index < list->count; ++*index) {
        if (list->items[*index].step == good_step && !list->items[*index].aside)
            return STATUS_OK;
        enum status status = verify(list->items[*index].path);
        if (status == STATUS_OK || status == STATUS_MEMORY)
            return status;
        log_warn("%s; this checkpoint is passed over", status_text());
    }
    return STATUS_OK;
}

enum status checkpoint_list(const char *directory, struct text_list *paths) {
    struct candidate_list list;
    *paths = (struct text_list){0};
    if (!directory_exists(directory))
        return STATUS_OK;
    TRY(list_candidates(directory, &list));
    for (size_t i = 0; i < list.count; i++)
        text_list_add(paths, list.items[i].path);
    candidates_release(&list);
    return STATUS_OK;
}

int64_t checkpoint_step_of(const char *path) {
    const char *name = path_name(path);
    return step_digits(name) ? strtoll(name + sizeof STEP_PREFIX - 1, NULL, 10) : -1;
}

enum status checkpoint_latest(const char *directory, enum status (*verify)(const char *path), char **path, int64_t *step) {
    struct candidate_list list;
    size_t good;
    if (!directory_exists(directory))
        return status_fail(STATUS_NOT_FOUND, "%s: no checkpoint", directory);
    TRY(list_candidates(directory, &list));
    enum status status = find_good(&list, verify, &good, -1);
    if (status == STATUS_OK && good == list.count)
        status = status_fail(STATUS_NOT_FOUND, "%s: no good checkpoint", directory);
    if (status == STATUS_OK) {
        *path = memory_copy_string(list.items[good].path);
        *step = list.items[good].step;
    }
    candidates_release(&list);
    return status;
}

/* Out of sight first, so that a deletion cut short leaves no half of a checkpoint under a plain name. */
static enum status retire(const char *path) {
    char *hidden = text_format("%s%s%d", path, DRAFT, (int)getpid());
    enum status status = file_rename(path, hidden);
    if (status == STATUS_OK)
        status = directory_remove(hidden);
    free(hidden);
    return status;
}

static bool stays(const struct checkpoint_retention *keep, const struct candidate *candidate, int64_t newer_count) {
    return newer_count < keep->newest || candidate->step == keep->best_step ||
           (keep->every_steps > 0 && candidate->step % keep->every_steps == 0);
}

static enum status retire_others(const struct candidate_list *list, const struct checkpoint_retention *keep) {
    size_t good;
    int64_t plain_count = 0;
    TRY(find_good(list, checkpoint_verify, &good, keep->good_step));
    enum status status = STATUS_OK;
    for (size_t i = 0; i < list->count && good < list->count && status == STATUS_OK; i++)
        if (!list->items[i].aside && !stays(keep, &list->items[i], plain_count++) && i != good)
            status = retire(list->items[i].path);
    return status;
}

enum status checkpoint_keep(const char *directory, struct checkpoint_retention keep) {
    struct candidate_list list;
    CHECK_OP(keep.newest, >=, 1);
    TRY(list_candidates(directory, &list));
    enum status status = (int64_t)list.count > keep.newest ? retire_others(&list, &keep) : STATUS_OK;
    candidates_release(&list);
    return status;
}
