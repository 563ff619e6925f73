#include "checkpoint/publish.h"

#include "base/file.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/log.h"
#include "base/memory.h"
#include <ctype.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { CHUNK_BYTES = 4 << 20, MANIFEST_BYTES_MAX = 64 << 20 };

static const char MANIFEST[] = "training/manifest.json";

/* ---- names ----------------------------------------------------------------------------------------------------------- */

/* Step of "step-000100"; -1 for any other name. */
static int64_t parse_step(const char *name) {
    static const char prefix[] = "step-";
    size_t size = strlen(name), prefix_size = sizeof prefix - 1;
    if (strncmp(name, prefix, prefix_size) != 0 || size <= prefix_size || size > prefix_size + 15)
        return -1;
    for (size_t i = prefix_size; i < size; i++)
        if (!isdigit((unsigned char)name[i]))
            return -1;
    return strtoll(name + prefix_size, NULL, 10);
}

static bool is_leftover(const char *name) {
    return strncmp(name, "step-", 5) == 0 && (strstr(name, ".tmp-") || strstr(name, ".old-"));
}

static enum status remove_leftovers(const char *directory) {
    struct text_list names;
    TRY(directory_list(directory, &names));
    enum status status = STATUS_OK;
    for (size_t i = 0; i < names.count && status == STATUS_OK; i++)
        if (is_leftover(names.items[i])) {
            char *path = path_join(directory, names.items[i]);
            status = directory_remove(path);
            free(path);
        }
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
    TRY(directory_make(directory));
    TRY(remove_leftovers(directory));
    *draft = (struct checkpoint_draft){
        memory_copy_string(directory),
        text_format("%s/step-%06" PRId64 ".tmp-%d", directory, step, (int)getpid()),
        text_format("%s/step-%06" PRId64, directory, step),
    };
    char *training = path_join(draft->path, "training");
    enum status status = directory_make(training);
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

/* ---- the manifest ---------------------------------------------------------------------------------------------------- */

static enum status list_files(const char *root, const char *below, struct text_list *files) {
    char *path = *below ? path_join(root, below) : memory_copy_string(root);
    struct text_list names = {0};
    enum status status = directory_list(path, &names);
    for (size_t i = 0; i < names.count && status == STATUS_OK; i++) {
        char *child = *below ? path_join(below, names.items[i]) : memory_copy_string(names.items[i]);
        char *full = path_join(root, child);
        if (directory_exists(full))
            status = list_files(root, child, files);
        else if (strcmp(child, MANIFEST) != 0)
            text_list_add(files, child);
        free(full);
        free(child);
    }
    text_list_release(&names);
    free(path);
    return status;
}

/* Hash of a chunk; its place in the file is part of it. */
static void chunk_hash(const void *data, size_t size, uint64_t first, char out[17]) {
    snprintf(out, 17, "%016" PRIx64, hash_bytes(data, size, first));
}

struct description {
    json_t *hashes;
    uint64_t size;
};

static enum status describe_chunk(void *context, const void *data, size_t size) {
    struct description *d = context;
    char hash[17];
    chunk_hash(data, size, d->size, hash);
    json_array_append_new(d->hashes, json_string(hash));
    d->size += size;
    return STATUS_OK;
}

static enum status describe_file(const char *root, const char *name, json_t *files) {
    struct description d = {.hashes = json_array()};
    char *path = path_join(root, name);
    enum status status = file_read_pieces(path, CHUNK_BYTES, describe_chunk, &d);
    free(path);
    json_t *described = json_pack("{s:I,s:o}", "bytes", (json_int_t)d.size, "xxh3_64", d.hashes);
    json_object_set_new(files, name, described);
    return status;
}

/* The manifest also carries a hash of its own list, so that a flipped bit in it is damage too, not another truth. */
static void hash_list(const json_t *files, char out[17]) {
    char *text = json_dumps(files, JSON_COMPACT | JSON_SORT_KEYS);
    CHECK(text != NULL);
    snprintf(out, 17, "%016" PRIx64, hash_bytes(text, strlen(text), 0));
    free(text);
}

static enum status write_manifest(const char *root, const struct text_list *names) {
    json_t *files = json_object();
    enum status status = STATUS_OK;
    for (size_t i = 0; i < names->count && status == STATUS_OK; i++)
        status = describe_file(root, names->items[i], files);
    if (status == STATUS_OK) {
        char hash[17], *path = path_join(root, MANIFEST);
        hash_list(files, hash);
        json_t *manifest = json_pack("{s:i,s:i,s:s,s:O}", "version", 1, "chunk_bytes", CHUNK_BYTES, "list_xxh3_64", hash,
                                     "files", files);
        status = json_write_file(path, manifest);
        json_decref(manifest);
        free(path);
    }
    json_decref(files);
    return status;
}

static enum status flush_file(const char *root, const char *name) {
    struct file_writer writer;
    char *path = path_join(root, name);
    enum status status = file_writer_open(&writer, path, true);
    free(path);
    TRY(status);
    status = file_writer_flush(&writer);
    enum status closed = file_writer_close(&writer);
    return status == STATUS_OK ? closed : status;
}

/* An older directory of the same step steps aside first: a directory cannot be renamed over a full one. */
static enum status rename_draft(const struct checkpoint_draft *draft) {
    char *aside = text_format("%s.old-%d", draft->final_path, (int)getpid());
    enum status status = STATUS_OK;
    bool replaces = directory_exists(draft->final_path);
    if (replaces)
        status = file_rename(draft->final_path, aside);
    if (status == STATUS_OK) {
        status = file_rename(draft->path, draft->final_path);
        if (status != STATUS_OK && replaces && rename(aside, draft->final_path) != 0)
            log_warn("%s: the checkpoint that stood here is now %s", draft->final_path, aside);
    }
    if (status == STATUS_OK)
        status = directory_flush(draft->directory);
    if (status == STATUS_OK && replaces && directory_remove(aside) != STATUS_OK)
        log_verbose("%s", status_text()); /* a leftover; the next save removes it */
    free(aside);
    return status;
}

static enum status commit(struct checkpoint_draft *draft, struct text_list *names) {
    TRY(list_files(draft->path, "", names));
    for (size_t i = 0; i < names->count; i++)
        TRY(flush_file(draft->path, names->items[i]));
    TRY(write_manifest(draft->path, names));
    TRY(directory_flush(draft->path));
    return rename_draft(draft);
}

enum status checkpoint_commit(struct checkpoint_draft *draft) {
    struct text_list names = {0};
    enum status status = commit(draft, &names);
    text_list_release(&names);
    if (status != STATUS_OK)
        checkpoint_abandon(draft);
    else
        draft_release(draft);
    return status;
}

/* ---- verifying --------------------------------------------------------------------------------------------------------- */

struct verification {
    const char *path;
    const json_t *hashes;
    uint64_t size;
};

static enum status verify_chunk(void *context, const void *data, size_t size) {
    struct verification *v = context;
    char hash[17];
    const char *known = json_string_value(json_array_get(v->hashes, (size_t)(v->size / CHUNK_BYTES)));
    chunk_hash(data, size, v->size, hash);
    if (!known || strcmp(known, hash) != 0)
        return status_fail(STATUS_FORMAT, "%s: is damaged within 4 MiB of byte %llu", v->path,
                           (unsigned long long)v->size);
    v->size += size;
    return STATUS_OK;
}

static enum status verify_contents(const char *path, const json_t *described) {
    struct verification v = {path, json_object_get(described, "xxh3_64"), 0};
    uint64_t expected = (uint64_t)json_integer_value(json_object_get(described, "bytes")), size;
    TRY(file_size(path, &size));
    if (size != expected)
        return status_fail(STATUS_FORMAT, "%s: is damaged: it has %llu bytes, its checkpoint wrote %llu", path,
                           (unsigned long long)size, (unsigned long long)expected);
    if (json_array_size(v.hashes) != (size + CHUNK_BYTES - 1) / CHUNK_BYTES)
        return status_fail(STATUS_FORMAT, "%s: the manifest does not cover it", path);
    return file_read_pieces(path, CHUNK_BYTES, verify_chunk, &v);
}

static enum status verify_file(const char *root, const char *name, const json_t *described) {
    if (*name == '/' || strstr(name, ".."))
        return status_fail(STATUS_FORMAT, "%s: the manifest names a file outside", root);
    char *path = path_join(root, name);
    enum status status = verify_contents(path, described);
    free(path);
    return status;
}

static enum status verify_manifest(const char *root, const char *path, const json_t *manifest) {
    json_t *files = json_object_get(manifest, "files"), *described;
    const char *name, *known = json_string_value(json_object_get(manifest, "list_xxh3_64"));
    char hash[17];
    if (json_integer_value(json_object_get(manifest, "version")) != 1 || !json_is_object(files) ||
        json_integer_value(json_object_get(manifest, "chunk_bytes")) != CHUNK_BYTES)
        return status_fail(STATUS_FORMAT, "%s: is not a manifest of version 1", path);
    hash_list(files, hash);
    if (!known || strcmp(known, hash) != 0)
        return status_fail(STATUS_FORMAT, "%s: is damaged", path);
    json_object_foreach(files, name, described) {
        TRY(verify_file(root, name, described));
    }
    return STATUS_OK;
}

enum status checkpoint_verify(const char *root) {
    char *path = path_join(root, MANIFEST);
    json_t *manifest;
    enum status status = json_read_file(path, MANIFEST_BYTES_MAX, &manifest);
    if (status == STATUS_OK) {
        status = verify_manifest(root, path, manifest);
        json_decref(manifest);
    }
    free(path);
    return status;
}

/* ---- choosing ------------------------------------------------------------------------------------------------------------ */

static int compare_steps_down(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x > y ? -1 : x < y;
}

/* Steps that have a directory, newest first. */
static enum status list_steps(const char *directory, int64_t **steps, size_t *count) {
    struct text_list names;
    *count = 0;
    TRY(directory_list(directory, &names));
    enum status status = memory_alloc(steps, names.count, sizeof **steps);
    for (size_t i = 0; i < names.count && status == STATUS_OK; i++)
        if (parse_step(names.items[i]) >= 0)
            (*steps)[(*count)++] = parse_step(names.items[i]);
    text_list_release(&names);
    if (*count)
        qsort(*steps, *count, sizeof **steps, compare_steps_down);
    return status;
}

enum status checkpoint_latest(const char *directory, char **path, int64_t *step) {
    int64_t *steps;
    size_t count;
    if (!directory_exists(directory))
        return status_fail(STATUS_NOT_FOUND, "%s: no checkpoint", directory);
    TRY(list_steps(directory, &steps, &count));
    bool found = false;
    for (size_t i = 0; i < count && !found; i++) {
        char *candidate = text_format("%s/step-%06" PRId64, directory, steps[i]);
        found = checkpoint_verify(candidate) == STATUS_OK;
        if (found) {
            *path = candidate;
            *step = steps[i];
        } else {
            log_warn("%s; this checkpoint is passed over", status_text());
            free(candidate);
        }
    }
    free(steps);
    return found ? STATUS_OK : status_fail(STATUS_NOT_FOUND, "%s: no good checkpoint", directory);
}

enum status checkpoint_keep(const char *directory, int64_t keep_count) {
    int64_t *steps;
    size_t count;
    CHECK_OP(keep_count, >=, 1);
    TRY(list_steps(directory, &steps, &count));
    enum status status = STATUS_OK;
    for (size_t i = (size_t)keep_count; i < count && status == STATUS_OK; i++) {
        char *path = text_format("%s/step-%06" PRId64, directory, steps[i]);
        status = directory_remove(path);
        free(path);
    }
    free(steps);
    return status;
}
