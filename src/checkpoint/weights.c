#include "checkpoint/weights.h"

#include "base/json.h"
#include "base/memory.h"
#include "base/threads.h"
#include <stdlib.h>
#include <string.h>

enum { INDEX_BYTES_MAX = 64 << 20, FILES_MAX = 100000, READ_CHUNK_ELEMENTS = 1 << 20 };

static enum status add_file(struct weights *w, const char *name) {
    TRY(memory_resize(&w->files, (size_t)w->file_count + 1, sizeof *w->files));
    char *path = path_join(w->directory, name);
    enum status status = safetensors_open(&w->files[w->file_count], path);
    free(path);
    if (status == STATUS_OK)
        w->file_count++;
    return status;
}

static int compare_names(const void *a, const void *b) {
    return strcmp(((const struct weights_name *)a)->name, ((const struct weights_name *)b)->name);
}

/* One list over all files. Where two files hold the same tensor nobody can say which is meant. */
static enum status list_names(struct weights *w) {
    size_t count = 0;
    for (int i = 0; i < w->file_count; i++)
        count += (size_t)w->files[i].entry_count;
    TRY(memory_alloc(&w->names, count, sizeof *w->names));
    for (int i = 0; i < w->file_count; i++)
        for (int k = 0; k < w->files[i].entry_count; k++)
            w->names[w->name_count++] = (struct weights_name){w->files[i].entries[k].name, i, k};
    if (count)
        qsort(w->names, count, sizeof *w->names, compare_names);
    for (int i = 1; i < w->name_count; i++)
        if (strcmp(w->names[i - 1].name, w->names[i].name) == 0)
            return status_fail(STATUS_FORMAT, "%s: tensor \"%.100s\" stands in %s and in %s", w->directory,
                               w->names[i].name, path_name(w->files[w->names[i - 1].file].path),
                               path_name(w->files[w->names[i].file].path));
    return STATUS_OK;
}

static const struct safetensors *find_file(const struct weights *w, const char *name) {
    for (int i = 0; i < w->file_count; i++)
        if (strcmp(path_name(w->files[i].path), name) == 0)
            return &w->files[i];
    return NULL;
}

static enum status add_index_entry(struct weights *w, const char *index, const char *tensor, const json_t *value) {
    const char *name = json_string_value(value);
    if (!name || !*name || strchr(name, '/') || strstr(name, ".."))
        return status_fail(STATUS_FORMAT, "%s: the file of tensor \"%.100s\" is not a plain file name", index, tensor);
    const struct safetensors *file = find_file(w, name);
    if (!file) {
        if (w->file_count == FILES_MAX)
            return status_fail(STATUS_FORMAT, "%s: names more than %d files", index, FILES_MAX);
        TRY(add_file(w, name));
        file = &w->files[w->file_count - 1];
    }
    if (!safetensors_find(file, tensor))
        return status_fail(STATUS_FORMAT, "%s: tensor \"%.100s\" is not in %s", index, tensor, name);
    return STATUS_OK;
}

static enum status open_shards(struct weights *w, const char *path, json_t *map) {
    const char *tensor;
    json_t *value;
    if (!json_is_object(map))
        return status_fail(STATUS_FORMAT, "%s: \"weight_map\" is missing", path);
    json_object_foreach(map, tensor, value) {
        TRY(add_index_entry(w, path, tensor, value));
    }
    return STATUS_OK;
}

static enum status open_index(struct weights *w, const char *path, const char *single) {
    json_t *index;
    if (!file_exists(path))
        return status_fail(STATUS_NOT_FOUND, "%s: holds neither %s nor %s", w->directory, single, path_name(path));
    TRY(json_read_file(path, INDEX_BYTES_MAX, &index));
    enum status status = open_shards(w, path, json_object_get(index, "weight_map"));
    json_decref(index);
    return status;
}

enum status weights_open(struct weights *w, const char *directory) {
    return weights_open_stem(w, directory, "model");
}

enum status weights_open_stem(struct weights *w, const char *directory, const char *stem) {
    *w = (struct weights){.directory = memory_copy_string(directory)};
    char *single = text_format("%s/%s.safetensors", directory, stem);
    char *index = text_format("%s.index.json", single);
    enum status status =
        file_exists(single) ? add_file(w, path_name(single)) : open_index(w, index, path_name(single));
    free(single);
    free(index);
    if (status == STATUS_OK)
        status = list_names(w);
    if (status != STATUS_OK)
        weights_close(w);
    return status;
}

void weights_close(struct weights *w) {
    for (int i = 0; i < w->file_count; i++)
        safetensors_close(&w->files[i]);
    free(w->files);
    free(w->names);
    free(w->directory);
    *w = (struct weights){0};
}

struct safetensors_entry *weights_find(const struct weights *w, const char *name, const struct safetensors **file) {
    struct weights_name key = {.name = name};
    const struct weights_name *found =
        w->name_count ? bsearch(&key, w->names, (size_t)w->name_count, sizeof *w->names, compare_names) : NULL;
    if (!found)
        return NULL;
    *file = &w->files[found->file];
    return &w->files[found->file].entries[found->entry];
}

static void print_shape(struct text *out, const int64_t *shape, int dim_count) {
    text_add_string(out, "[");
    for (int i = 0; i < dim_count; i++)
        text_printf(out, "%s%lld", i ? "," : "", (long long)shape[i]);
    text_add_string(out, "]");
}

static enum status check_shape(const struct safetensors *file, const struct safetensors_entry *entry, struct tensor t) {
    bool same = entry->dim_count == t.dim_count;
    for (int i = 0; i < entry->dim_count && same; i++)
        same = entry->shape[i] == t.shape[i];
    if (same)
        return STATUS_OK;
    struct text has = {0}, needs = {0};
    print_shape(&has, entry->shape, entry->dim_count);
    print_shape(&needs, t.shape, t.dim_count);
    enum status status = status_fail(STATUS_FORMAT, "%s: tensor \"%s\" is %s, this model needs %s", file->path,
                                     entry->name, has.data, needs.data);
    text_release(&has);
    text_release(&needs);
    return status;
}

/* A part of an item: elements first .. first+count-1 of it, which begin at element `from` of the entry. */
struct fill_task {
    const struct safetensors *file;
    const struct safetensors_entry *entry;
    struct tensor tensor;
    int64_t from, first, count;
};

struct filling {
    const struct device *device;
    struct fill_task *tasks;
    int64_t task_count, capacity;
    char *buffers; /* [threads][READ_CHUNK_ELEMENTS] of the widest dtype; NULL: straight into host memory */
};

static enum status add_task(struct filling *f, struct fill_task task) {
    if (f->task_count == f->capacity) {
        int64_t capacity = f->capacity ? 2 * f->capacity : 64;
        TRY(memory_resize(&f->tasks, (size_t)capacity, sizeof *f->tasks));
        f->capacity = capacity;
    }
    f->tasks[f->task_count++] = task;
    return STATUS_OK;
}

static enum status plan_item(struct filling *f, const struct safetensors *file, struct safetensors_entry *entry,
                             const struct named_tensor *item) {
    struct tensor t = item->tensor;
    int64_t elements = tensor_elements(t), begin = elements > 0 ? elements / t.shape[0] * item->first_row : 0;
    TRY(check_shape(file, entry, named_tensor_whole(item)));
    TRY(safetensors_read(file, entry, 0, 0, t.dtype, NULL)); /* whether it can be read as that */
    for (int64_t first = 0; first < elements; first += READ_CHUNK_ELEMENTS) {
        int64_t count = elements - first < READ_CHUNK_ELEMENTS ? elements - first : READ_CHUNK_ELEMENTS;
        TRY(add_task(f, (struct fill_task){file, entry, t, begin + first, first, count}));
    }
    entry->used = true;
    return STATUS_OK;
}

static void fill_part(void *context, int64_t index) {
    const struct filling *f = context;
    const struct fill_task *task = &f->tasks[index];
    size_t size = dtype_size(task->tensor.dtype);
    char *to = (char *)task->tensor.data + (size_t)task->first * size;
    char *host = f->buffers ? f->buffers + (size_t)thread_index() * READ_CHUNK_ELEMENTS * sizeof(double) : to;
    enum status status = safetensors_read(task->file, task->entry, task->from, task->count, task->tensor.dtype, host);
    CHECK(status == STATUS_OK); /* plan_item asked */
    if (f->buffers)
        f->device->copy_from_host(to, host, (size_t)task->count * size);
}

static enum status plan_items(struct weights *w, const struct named_tensor *items, int count, struct filling *f) {
    for (int i = 0; i < count; i++) {
        const struct safetensors *file;
        struct safetensors_entry *entry = weights_find(w, items[i].name, &file);
        if (!entry)
            return status_fail(STATUS_FORMAT, "%s: tensor \"%s\" is missing", w->directory, items[i].name);
        TRY(plan_item(f, file, entry, &items[i]));
    }
    if (f->device == device_cpu())
        return STATUS_OK;
    return memory_alloc(&f->buffers, (size_t)threads_count() * READ_CHUNK_ELEMENTS, sizeof(double));
}

enum status weights_fill(struct weights *w, const struct named_tensor *items, int count, const struct device *device) {
    struct filling f = {.device = device};
    enum status status = plan_items(w, items, count, &f);
    if (status == STATUS_OK)
        parallel_for(f.task_count, fill_part, &f);
    free(f.buffers);
    free(f.tasks);
    return status;
}

const char *weights_first_unused(const struct weights *w) {
    for (int i = 0; i < w->file_count; i++)
        for (int k = 0; k < w->files[i].entry_count; k++)
            if (!w->files[i].entries[k].used && !strstr(w->files[i].entries[k].name, "rotary_emb.inv_freq"))
                return w->files[i].entries[k].name;
    return NULL;
}

static enum status open_one(struct weights *w, const char *path) {
    TRY(memory_alloc(&w->files, 1, sizeof *w->files));
    TRY(safetensors_open(&w->files[0], path));
    w->file_count = 1;
    return list_names(w);
}

static enum status check_item(struct weights *w, const struct named_tensor *item) {
    const struct safetensors *file;
    struct safetensors_entry *entry = weights_find(w, item->name, &file);
    enum safetensors_dtype needed = safetensors_dtype_of(item->tensor.dtype);
    if (!entry)
        return status_fail(STATUS_FORMAT, "%s: tensor \"%s\" is missing", w->directory, item->name);
    if (entry->dtype != needed)
        return status_fail(STATUS_FORMAT, "%s: tensor \"%s\" is %s, %s is needed: nothing is converted here", file->path,
                           entry->name, safetensors_dtype_name(entry->dtype), safetensors_dtype_name(needed));
    entry->used = true;
    return check_shape(file, entry, named_tensor_whole(item));
}

enum status weights_check_exactly(struct weights *w, const struct named_tensor *items, int count) {
    for (int i = 0; i < count; i++)
        TRY(check_item(w, &items[i]));
    const char *unused = weights_first_unused(w);
    if (unused)
        return status_fail(STATUS_FORMAT, "%s: tensor \"%s\" belongs to no part of this model", w->directory, unused);
    return STATUS_OK;
}

enum status weights_fill_exactly(struct weights *w, const struct named_tensor *items, int count,
                                 const struct device *device) {
    TRY(weights_check_exactly(w, items, count));
    return weights_fill(w, items, count, device);
}

enum status safetensors_fill(const char *path, const struct named_tensor *items, int count,
                             const struct device *device) {
    struct weights w = {.directory = memory_copy_string(path)}; /* messages name the file */
    enum status status = open_one(&w, path);
    if (status == STATUS_OK)
        status = weights_fill_exactly(&w, items, count, device);
    weights_close(&w);
    return status;
}
