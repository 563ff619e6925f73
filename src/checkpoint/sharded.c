#include "checkpoint/sharded.h"

#include "base/json.h"
#include "base/memory.h"
#include <stdlib.h>
#include <string.h>

enum { EXTENT_BYTES = CHECKPOINT_EXTENT_BYTES_MAX };

/* ---- which files
 * --------------------------------------------------------------------------------------------------------- */

/* A tensor and its number among those that are being added. */
struct numbered {
    const struct named_tensor *item;
    int index;
};

static int compare_numbered(const void *a, const void *b) {
    return strcmp(((const struct numbered *)a)->item->name, ((const struct numbered *)b)->item->name);
}

/* By name, so that the tensors of a block stand in few files. */
static enum status number_items(const struct named_tensor *items, int count, struct numbered **out) {
    struct numbered *numbered;
    TRY(memory_alloc(&numbered, (size_t)count, sizeof *numbered));
    for (int i = 0; i < count; i++)
        numbered[i] = (struct numbered){&items[i], i};
    qsort(numbered, (size_t)count, sizeof *numbered, compare_numbered);
    *out = numbered;
    return STATUS_OK;
}

/* How many of the tensors from `first` on fit into one file. */
static int count_fitting(const struct numbered *numbered, int first, int count, uint64_t file_bytes) {
    uint64_t bytes = 0;
    int fitting = 0;
    for (int i = first; i < count; i++) {
        bytes += tensor_bytes(numbered[i].item->tensor);
        if (bytes > file_bytes && fitting > 0)
            break;
        fitting++;
    }
    return fitting;
}

static int count_files(const struct numbered *numbered, int count, uint64_t file_bytes) {
    int files = 0;
    for (int first = 0; first < count; first += count_fitting(numbered, first, count, file_bytes))
        files++;
    return files > 0 ? files : 1;
}

/* The items of one file, next to each other as a plan wants them. */
static enum status plan_file(struct sharded_set *set, const struct numbered *numbered, int count) {
    struct safetensors_plan *plan = &set->plans[set->file_count];
    struct named_tensor *copies;
    TRY(memory_alloc(&copies, (size_t)count, sizeof *copies));
    for (int i = 0; i < count; i++)
        copies[i] = *numbered[i].item;
    enum status status = safetensors_plan_init(plan, copies, count, NULL, 0);
    for (int i = 0; i < count && status == STATUS_OK; i++) {
        int source = (int)(plan->order[i] - copies);
        set->places[set->place_count + numbered[source].index] =
            (struct sharded_place){set->file_count, plan->begins[i]};
        plan->order[i] = numbered[source].item;
    }
    free(copies);
    if (status != STATUS_OK)
        safetensors_plan_release(plan);
    return status;
}

static enum status make_room(struct sharded_set *set, int files, int places, int indices) {
    TRY(memory_resize(&set->plans, (size_t)(set->file_count + files), sizeof *set->plans));
    TRY(memory_resize(&set->names, (size_t)(set->file_count + files), sizeof *set->names));
    TRY(memory_resize(&set->places, (size_t)(set->place_count + places), sizeof *set->places));
    TRY(memory_resize(&set->index_names, (size_t)(set->index_count + indices), sizeof *set->index_names));
    return memory_resize(&set->index_texts, (size_t)(set->index_count + indices), sizeof *set->index_texts);
}

/* {"metadata": {"total_size": N}, "weight_map": {tensor: file}}, as transformers reads it. */
static void add_index(struct sharded_set *set, const char *stem, int first_file, uint64_t total) {
    json_t *map = json_object();
    for (int f = first_file; f < set->file_count; f++)
        for (int i = 0; i < set->plans[f].count; i++)
            json_object_set_new(map, set->plans[f].order[i]->name, json_string(path_name(set->names[f])));
    json_t *index = json_pack("{s:{s:I},s:o}", "metadata", "total_size", (json_int_t)total, "weight_map", map);
    set->index_names[set->index_count] = text_format("%s.safetensors.index.json", stem);
    set->index_texts[set->index_count++] = json_dumps(index, JSON_INDENT(2) | JSON_PRESERVE_ORDER);
    CHECK(set->index_texts[set->index_count - 1] != NULL);
    json_decref(index);
}

static enum status add_files(struct sharded_set *set, const char *stem, const struct numbered *numbered, int count,
                             uint64_t file_bytes) {
    int files = count_files(numbered, count, file_bytes), first_file = set->file_count;
    uint64_t total = 0;
    TRY(make_room(set, files, count, files > 1));
    for (int f = 0, first = 0; f < files; f++) {
        int fitting = count_fitting(numbered, first, count, file_bytes);
        TRY(plan_file(set, numbered + first, fitting));
        set->names[set->file_count++] = files == 1 ? text_format("%s.safetensors", stem)
                                                   : text_format("%s-%05d-of-%05d.safetensors", stem, f + 1, files);
        first += fitting;
    }
    for (int i = 0; i < count; i++)
        total += tensor_bytes(numbered[i].item->tensor);
    set->place_count += count;
    if (files > 1)
        add_index(set, stem, first_file, total);
    return STATUS_OK;
}

enum status sharded_add(struct sharded_set *set, const char *stem, const struct named_tensor *items, int count,
                        uint64_t file_bytes) {
    struct numbered *numbered;
    CHECK(count > 0);
    TRY(number_items(items, count, &numbered));
    enum status status = add_files(set, stem, numbered, count, file_bytes);
    free(numbered);
    return status;
}

void sharded_release(struct sharded_set *set) {
    for (int i = 0; i < set->file_count; i++) {
        safetensors_plan_release(&set->plans[i]);
        free(set->names[i]);
    }
    for (int i = 0; i < set->index_count; i++) {
        free(set->index_names[i]);
        free(set->index_texts[i]);
    }
    free(set->plans);
    free(set->names);
    free(set->places);
    free(set->index_names);
    free(set->index_texts);
    *set = (struct sharded_set){0};
}

uint64_t sharded_bytes(const struct sharded_set *set) {
    uint64_t bytes = 0;
    for (int i = 0; i < set->file_count; i++)
        bytes += set->plans[i].file_bytes;
    return bytes;
}

enum status sharded_create(const struct sharded_set *set, const char *root) {
    enum status status = STATUS_OK;
    for (int i = 0; i < set->file_count && status == STATUS_OK; i++) {
        char *path = path_join(root, set->names[i]);
        status = file_create(path, set->plans[i].file_bytes);
        free(path);
    }
    for (int i = 0; i < set->index_count && status == STATUS_OK; i++) {
        char *path = path_join(root, set->index_names[i]);
        status = file_write(path, set->index_texts[i], strlen(set->index_texts[i]));
        free(path);
    }
    return status;
}

/* ---- stretches
 * ------------------------------------------------------------------------------------------------------------ */

static int compare_stretches(const void *a, const void *b) {
    const struct sharded_stretch *x = a, *y = b;
    if (x->file != y->file)
        return x->file < y->file ? -1 : 1;
    return x->begin < y->begin ? -1 : x->begin > y->begin;
}

int sharded_sort(struct sharded_stretch *stretches, int count) {
    int kept = 0;
    if (count > 0)
        qsort(stretches, (size_t)count, sizeof *stretches, compare_stretches);
    for (int i = 0; i < count; i++) {
        struct sharded_stretch *last = kept > 0 ? &stretches[kept - 1] : NULL, *next = &stretches[i];
        if (next->bytes == 0)
            continue;
        if (last && last->file == next->file && last->begin + last->bytes == next->begin &&
            (const char *)last->data + last->bytes == (const char *)next->data)
            last->bytes += next->bytes;
        else
            stretches[kept++] = *next;
    }
    return kept;
}

void sharded_headers(const struct sharded_set *set, struct sharded_stretch *stretches) {
    for (int i = 0; i < set->file_count; i++)
        stretches[i] = (struct sharded_stretch){i, 0, set->plans[i].header_bytes, set->plans[i].header};
}

/* ---- writing
 * -------------------------------------------------------------------------------------------------------------- */

struct sharded_writing {
    const struct sharded_set *set;
    const char *root;
    const struct device *device;
    const atomic_bool *cancel;
    struct sharded_extents *extents;
    char *buffer; /* [EXTENT_BYTES] */
    struct file_writer writer;
    int file; /* that the writer has open; -1: none */
};

static enum status close_file(struct sharded_writing *w, bool flush) {
    if (w->file < 0)
        return STATUS_OK;
    enum status status = flush ? file_writer_flush(&w->writer) : STATUS_OK;
    enum status closed = file_writer_close(&w->writer);
    w->file = -1;
    return status == STATUS_OK ? closed : status;
}

static enum status open_file(struct sharded_writing *w, int file) {
    if (w->file == file)
        return STATUS_OK;
    TRY(close_file(w, true));
    char *path = path_join(w->root, w->set->names[file]);
    enum status status = file_writer_open_at(&w->writer, path);
    free(path);
    if (status == STATUS_OK)
        w->file = file;
    return status;
}

static enum status note_extent(struct sharded_extents *extents, struct checkpoint_extent extent) {
    if (extents->count == extents->capacity) {
        size_t capacity = extents->capacity ? 2 * extents->capacity : 64;
        TRY(memory_resize(&extents->items, capacity, sizeof *extents->items));
        extents->capacity = capacity;
    }
    extents->items[extents->count++] = extent;
    return STATUS_OK;
}

static enum status write_extent(struct sharded_writing *w, uint64_t begin, const void *data, size_t bytes) {
    struct checkpoint_extent extent = {begin, checkpoint_extent_hash(data, bytes, begin), (uint32_t)bytes, w->file};
    TRY(file_writer_put(&w->writer, begin, data, bytes));
    return note_extent(w->extents, extent);
}

/* Place among the stretches: `done` bytes of stretches[index]. */
struct cursor {
    const struct sharded_stretch *stretches;
    int index, count;
    uint64_t done;
};

static size_t least(uint64_t a, uint64_t b) {
    return (size_t)(a < b ? a : b);
}

static bool continues(const struct cursor *c, int file, uint64_t position) {
    return c->index < c->count && c->stretches[c->index].file == file &&
           c->stretches[c->index].begin + c->done == position;
}

static void advance(struct cursor *c, size_t bytes) {
    c->done += bytes;
    if (c->done == c->stretches[c->index].bytes) {
        c->index++;
        c->done = 0;
    }
}

/* One extent: what is next without a hole, up to a multiple of EXTENT_BYTES. Straight from memory where it lies in one
 * piece. */
static enum status write_next(struct sharded_writing *w, struct cursor *c) {
    const struct sharded_stretch *stretch = &c->stretches[c->index];
    uint64_t begin = stretch->begin + c->done, end = (begin / EXTENT_BYTES + 1) * EXTENT_BYTES;
    TRY(open_file(w, stretch->file));
    if (w->device == device_cpu() && (stretch->begin + stretch->bytes >= end)) {
        const char *data = (const char *)stretch->data + c->done;
        advance(c, (size_t)(end - begin));
        return write_extent(w, begin, data, (size_t)(end - begin));
    }
    size_t filled = 0;
    while (begin + filled < end && continues(c, stretch->file, begin + filled)) {
        const struct sharded_stretch *next = &c->stretches[c->index];
        size_t part = least(next->bytes - c->done, end - begin - filled);
        const char *data = (const char *)next->data + c->done;
        if (next->begin == 0) /* a header is in the host's memory everywhere */
            memcpy(w->buffer + filled, data, part);
        else
            w->device->copy_to_host(w->buffer + filled, data, part);
        filled += part;
        advance(c, part);
    }
    return write_extent(w, begin, w->buffer, filled);
}

enum status sharded_write(const struct sharded_set *set, const char *root, const struct sharded_stretch *stretches,
                          int count, const struct device *device, const atomic_bool *cancel,
                          struct sharded_extents *extents) {
    struct sharded_writing w = {set, root, device, cancel, extents, NULL, {.descriptor = -1}, -1};
    struct cursor cursor = {stretches, 0, count, 0};
    TRY(memory_alloc(&w.buffer, EXTENT_BYTES, 1));
    enum status status = STATUS_OK;
    while (cursor.index < cursor.count && status == STATUS_OK) {
        if (atomic_load(cancel))
            status = status_fail(STATUS_INTERRUPTED, "%s: given up", root);
        else
            status = write_next(&w, &cursor);
    }
    enum status closed = close_file(&w, status == STATUS_OK);
    free(w.buffer);
    return status == STATUS_OK ? closed : status;
}
