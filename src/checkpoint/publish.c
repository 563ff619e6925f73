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
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { CHUNK_BYTES = 4 << 20, MANIFEST_BYTES_MAX = 64 << 20, MANIFEST_VERSION = 2, STEP_DIGITS_MAX = 15 };
enum { HASH_DIGITS = 16 };

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
    enum status status =
        has_prefix(suffix, ASIDE) && !directory_exists(plain) ? file_rename(path, plain) : directory_remove(path);
    free(plain);
    free(path);
    return status;
}

static enum status settle_leftovers(const char *directory) {
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
    TRY(directory_make(directory));
    TRY(settle_leftovers(directory));
    *draft = (struct checkpoint_draft){
        memory_copy_string(directory),
        text_format("%s/%s%06" PRId64 "%s%d", directory, STEP_PREFIX, step, DRAFT, (int)getpid()),
        text_format("%s/%s%06" PRId64, directory, STEP_PREFIX, step),
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

/* Hash of a chunk; its place in the file is part of it. */
static void chunk_hash(const void *data, size_t size, uint64_t first, char out[HASH_DIGITS + 1]) {
    snprintf(out, HASH_DIGITS + 1, "%016" PRIx64, hash_bytes(data, size, first));
}

struct description {
    json_t *hashes;
    uint64_t size;
};

static enum status describe_chunk(void *context, const void *data, size_t size) {
    struct description *d = context;
    char hash[HASH_DIGITS + 1];
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
    char hash[HASH_DIGITS + 1], *text = json_dumps(manifest, JSON_INDENT(2) | JSON_PRESERVE_ORDER);
    if (!text)
        return status_fail(STATUS_MEMORY, "%s: no memory to write it", path);
    size_t size = strlen(text);
    char *digits = find_seal(text);
    CHECK(digits != NULL);
    seal_hash(text, size, digits, hash);
    memcpy(digits, hash, HASH_DIGITS);
    enum status status = file_write(path, text, size);
    free(text);
    return status;
}

static enum status write_manifest(const char *root, const struct text_list *names) {
    json_t *files = json_object();
    enum status status = STATUS_OK;
    for (size_t i = 0; i < names->count && status == STATUS_OK; i++)
        status = describe_file(root, names->items[i], files);
    if (status == STATUS_OK) {
        char *path = path_join(root, MANIFEST);
        json_t *manifest = json_pack("{s:s,s:i,s:i,s:O}", "manifest_xxh3_64", SEAL_ZEROS, "version", MANIFEST_VERSION,
                                     "chunk_bytes", CHUNK_BYTES, "files", files);
        CHECK(manifest != NULL);
        status = write_sealed(path, manifest);
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

static enum status commit(struct checkpoint_draft *draft, struct contents *contents) {
    TRY(list_contents(draft->path, "", contents));
    for (size_t i = 0; i < contents->files.count; i++)
        TRY(flush_file(draft->path, contents->files.items[i]));
    TRY(write_manifest(draft->path, &contents->files));
    TRY(flush_directories(draft->path, &contents->directories));
    return rename_draft(draft);
}

enum status checkpoint_commit(struct checkpoint_draft *draft) {
    struct contents contents = {0};
    enum status status = commit(draft, &contents);
    contents_release(&contents);
    if (status != STATUS_OK)
        checkpoint_abandon(draft);
    else
        draft_release(draft);
    return status;
}

/* ---- verifying --------------------------------------------------------------------------------------------------- */

struct verification {
    const char *path;
    const json_t *hashes;
    uint64_t size;
};

static enum status verify_chunk(void *context, const void *data, size_t size) {
    struct verification *v = context;
    char hash[HASH_DIGITS + 1];
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
    if (!file_exists(path))
        return status_fail(STATUS_FORMAT, "%s: is missing, its checkpoint wrote it", path);
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

static enum status verify_files(const char *root, const char *path, const json_t *manifest) {
    json_t *files = json_object_get(manifest, "files"), *described;
    const char *name;
    json_int_t version = json_integer_value(json_object_get(manifest, "version"));
    if (version != MANIFEST_VERSION || !json_is_object(files) ||
        json_integer_value(json_object_get(manifest, "chunk_bytes")) != CHUNK_BYTES)
        return status_fail(STATUS_FORMAT, "%s: is a manifest of version %lld, this program reads version %d", path,
                           (long long)version, MANIFEST_VERSION);
    json_object_foreach(files, name, described) {
        TRY(verify_file(root, name, described));
    }
    return STATUS_OK;
}

static enum status verify_manifest(const char *root, const char *path, char *text, size_t size) {
    char known[HASH_DIGITS], hash[HASH_DIGITS + 1], *digits = find_seal(text);
    if (!digits)
        return status_fail(STATUS_FORMAT, "%s: is damaged or of an older version: it has no hash of its own", path);
    memcpy(known, digits, HASH_DIGITS);
    seal_hash(text, size, digits, hash);
    if (memcmp(known, hash, HASH_DIGITS) != 0)
        return status_fail(STATUS_FORMAT, "%s: is damaged: its text does not have the hash that it names", path);
    json_t *manifest;
    TRY(json_parse(path, text, size, &manifest));
    enum status status = verify_files(root, path, manifest);
    json_decref(manifest);
    return status;
}

enum status checkpoint_verify(const char *root) {
    char *path = path_join(root, MANIFEST), *text;
    size_t size;
    enum status status = file_read(path, MANIFEST_BYTES_MAX, &text, &size);
    if (status == STATUS_OK) {
        status = verify_manifest(root, path, text, size);
        free(text);
    }
    free(path);
    return status;
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

/* Index of the first that verifies; count where none does. Too little memory says nothing about a checkpoint. */
static enum status find_good(const struct candidate_list *list, size_t *index) {
    for (*index = 0; *index < list->count; ++*index) {
        enum status status = checkpoint_verify(list->items[*index].path);
        if (status == STATUS_OK || status == STATUS_MEMORY)
            return status;
        log_warn("%s; this checkpoint is passed over", status_text());
    }
    return STATUS_OK;
}

enum status checkpoint_latest(const char *directory, char **path, int64_t *step) {
    struct candidate_list list;
    size_t good;
    if (!directory_exists(directory))
        return status_fail(STATUS_NOT_FOUND, "%s: no checkpoint", directory);
    TRY(list_candidates(directory, &list));
    enum status status = find_good(&list, &good);
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

static enum status retire_beyond(const struct candidate_list *list, size_t keep_count) {
    size_t good, plain_count = 0;
    TRY(find_good(list, &good));
    enum status status = STATUS_OK;
    for (size_t i = 0; i < list->count && good < list->count && status == STATUS_OK; i++)
        if (!list->items[i].aside && plain_count++ >= keep_count && i != good)
            status = retire(list->items[i].path);
    return status;
}

enum status checkpoint_keep(const char *directory, int64_t keep_count) {
    struct candidate_list list;
    CHECK_OP(keep_count, >=, 1);
    TRY(list_candidates(directory, &list));
    enum status status = (int64_t)list.count > keep_count ? retire_beyond(&list, (size_t)keep_count) : STATUS_OK;
    candidates_release(&list);
    return status;
}
