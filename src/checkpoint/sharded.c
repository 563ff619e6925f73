#include "checkpoint/sharded.h"

#include "base/json.h"
#include "base/memory.h"
#include "base/threads.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { EXTENT_BYTES = CHECKPOINT_EXTENT_BYTES_MAX, PARTS_MAX = 64, OWN_WRITE_BYTES = 64 << 10, STAGED_FLOATS = 16 << 10 };

/* ---- which files ------------------------------------------------------------------------------------------------- */

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
        status = file_write_draft(path, set->index_texts[i], strlen(set->index_texts[i]));
        free(path);
    }
    return status;
}

/* ---- stretches --------------------------------------------------------------------------------------------------- */

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
            last->rounded == next->rounded && sharded_data(last, last->bytes) == next->data)
            last->bytes += next->bytes;
        else
            stretches[kept++] = *next;
    }
    return kept;
}

void sharded_headers(const struct sharded_set *set, struct sharded_stretch *stretches) {
    for (int i = 0; i < set->file_count; i++)
        stretches[i] = (struct sharded_stretch){i, 0, set->plans[i].header_bytes, set->plans[i].header, false};
}

static void round_floats(const float *from, size_t count, char *to) {
    for (size_t i = 0; i < count; i++) {
        uint16_t bits = float_to_bf16(from[i]);
        memcpy(to + 2 * i, &bits, sizeof bits);
    }
}

static void fetch_rounded(const float *from, size_t count, const struct device *device, char *to) {
    float staged[STAGED_FLOATS];
    for (size_t done = 0, part; done < count; done += part) {
        part = count - done < STAGED_FLOATS ? count - done : STAGED_FLOATS;
        device->copy_to_host(staged, from + done, part * sizeof *staged);
        round_floats(staged, part, to + 2 * done);
    }
}

void sharded_fetch(const struct sharded_stretch *stretch, uint64_t skip, size_t bytes, const struct device *device,
                   char *to) {
    const void *from = sharded_data(stretch, skip);
    CHECK(!stretch->rounded || (skip % 2 == 0 && bytes % 2 == 0));
    if (stretch->rounded && device == device_cpu())
        round_floats(from, bytes / 2, to);
    else if (stretch->rounded)
        fetch_rounded(from, bytes / 2, device, to);
    else if (stretch->begin == 0) /* a header is in the host's memory everywhere */
        memcpy(to, from, bytes);
    else
        device->copy_to_host(to, from, bytes);
}

/* ---- writing ----------------------------------------------------------------------------------------------------- */

/* An extent that is to be written, and the stretch and byte of it that it begins with. */
struct task {
    struct checkpoint_extent extent;
    int stretch, stretch_count; /* of at most PARTS_MAX stretches, */
    uint64_t skip;
    bool in_place; /* which lie to the blocks of memory as they do in the file, and meet at blocks: they need no buffer */
};

struct sharded_writing {
    const struct sharded_set *set;
    const char *root;
    const struct sharded_stretch *stretches;
    int stretch_count;
    struct sharded_way way;
    struct task *tasks;
    size_t task_count, capacity;
    struct file_writer *writers; /* [file_count]; descriptor -1: not of this share */
    char *buffers;               /* [threads][EXTENT_BYTES] aligned to large pages */
    atomic_int failure;          /* the first status that was not good, */
    char message[512];           /* and its line: a message is a thread's own */
};

static void note_failure(struct sharded_writing *w, enum status status) {
    int none = STATUS_OK;
    if (status != STATUS_OK && atomic_compare_exchange_strong(&w->failure, &none, (int)status))
        snprintf(w->message, sizeof w->message, "%s", status_text());
}

static enum status add_task(struct sharded_writing *w, struct task task) {
    if (w->task_count == w->capacity) {
        size_t capacity = w->capacity ? 2 * w->capacity : 64;
        TRY(memory_resize(&w->tasks, capacity, sizeof *w->tasks));
        w->capacity = capacity;
    }
    w->tasks[w->task_count++] = task;
    return STATUS_OK;
}

/* Whether a stretch lies to the blocks as in the file, and is worth a write of its own where its neighbours do not. */
static bool is_in_place(const struct device *device, const struct sharded_stretch *stretch) {
    bool blocks = stretch->begin % FILE_BLOCK_BYTES == 0 && stretch->bytes % FILE_BLOCK_BYTES == 0;
    return !stretch->rounded && device == device_cpu() &&
           (uintptr_t)stretch->data % FILE_BLOCK_BYTES == stretch->begin % FILE_BLOCK_BYTES &&
           (blocks || stretch->bytes >= OWN_WRITE_BYTES);
}

/* Whether a stretch that begins at `at` belongs to an extent that ends there. */
static bool goes_on(const struct task *open, const struct sharded_stretch *stretch, uint64_t at, bool in_place) {
    const struct checkpoint_extent *extent = &open->extent;
    return extent->file == stretch->file && extent->begin + extent->bytes == at && at % EXTENT_BYTES != 0 &&
           open->stretch_count < PARTS_MAX && open->in_place == in_place && (!in_place || at % FILE_BLOCK_BYTES == 0);
}

/* Extents end at multiples of EXTENT_BYTES, where what follows belongs to somebody else, and between what needs a buffer and what
 * does not. */
static enum status cut_extents(struct sharded_writing *w) {
    struct task open = {.extent.file = -1};
    for (int i = 0; i < w->stretch_count; i++) {
        const struct sharded_stretch *stretch = &w->stretches[i];
        bool in_place = is_in_place(w->way.device, stretch);
        for (uint64_t done = 0; done < stretch->bytes;) {
            uint64_t at = stretch->begin + done, end = (at / EXTENT_BYTES + 1) * EXTENT_BYTES;
            uint64_t part = stretch->bytes - done < end - at ? stretch->bytes - done : end - at;
            bool joins = goes_on(&open, stretch, at, in_place);
            if (!joins && open.extent.file >= 0)
                TRY(add_task(w, open));
            if (!joins)
                open = (struct task){{.begin = at, .file = stretch->file}, i, 0, done, in_place};
            open.extent.bytes += (uint32_t)part;
            open.stretch_count++;
            done += part;
        }
    }
    return open.extent.file >= 0 ? add_task(w, open) : STATUS_OK;
}

/* Where the bytes of an extent lie in some stretches; neighbours in memory are one part. Returns how many there are. */
static int find_parts(const struct sharded_stretch *stretches, const struct task *task, struct file_part parts[PARTS_MAX]) {
    const struct sharded_stretch *stretch = &stretches[task->stretch];
    uint64_t skip = task->skip;
    int count = 0;
    for (size_t found = 0; found < task->extent.bytes; stretch++, skip = 0) {
        uint64_t has = stretch->bytes - skip, left = task->extent.bytes - found;
        size_t bytes = (size_t)(has < left ? has : left);
        char *data = (char *)(uintptr_t)sharded_data(stretch, skip); /* not written to; none is rounded */
        if (count > 0 && (char *)parts[count - 1].data + parts[count - 1].bytes == data)
            parts[count - 1].bytes += bytes;
        else
            parts[count++] = (struct file_part){data, bytes};
        found += bytes;
    }
    return count;
}

/* Its bytes one after the other in a buffer that lies to the blocks as the file does. */
static struct file_part assemble(const struct sharded_writing *w, const struct task *task, char *buffer) {
    char *to = buffer + task->extent.begin % FILE_BLOCK_BYTES;
    const struct sharded_stretch *stretch = &w->stretches[task->stretch];
    uint64_t skip = task->skip;
    for (size_t filled = 0; filled < task->extent.bytes; stretch++, skip = 0) {
        uint64_t has = stretch->bytes - skip, left = task->extent.bytes - filled;
        size_t part = (size_t)(has < left ? has : left);
        sharded_fetch(stretch, skip, part, w->way.device, to + filled);
        filled += part;
    }
    return (struct file_part){to, task->extent.bytes};
}

static enum status put_extent(struct sharded_writing *w, const struct task *task, const struct file_part *parts, int count) {
    return file_writer_put_parts(&w->writers[task->extent.file], task->extent.begin, parts, count);
}

static enum status put_hashed(struct sharded_writing *w, struct task *task, const struct file_part *parts, int count,
                              const struct known_hashes *known) {
    task->extent.hash = checkpoint_parts_hash(parts, count, task->extent.begin, known);
    return put_extent(w, task, parts, count);
}

/* Of stretches that stay as they are. */
static enum status write_in_place(struct sharded_writing *w, struct task *task, const struct sharded_stretch *stretches,
                                  const struct known_hashes *known) {
    struct file_part parts[PARTS_MAX];
    int count = find_parts(stretches, task, parts);
    return put_hashed(w, task, parts, count, known);
}

/* The writer stands at what follows a task. */
static void advance(const struct sharded_writing *w, const struct task *task) {
    bool is_last = task + 1 == w->tasks + w->task_count;
    w->way.shelter->stretch = is_last ? w->stretch_count : task[1].stretch;
    w->way.shelter->skip = is_last ? 0 : task[1].skip;
}

/* What stands where others change it is copied under the mutex where it needs a buffer anyway. */
static enum status write_sheltered_copy(struct sharded_writing *w, struct task *task, char *buffer) {
    struct sharded_shelter *shelter = w->way.shelter;
    struct file_part copy;
    pthread_mutex_lock(&shelter->mutex);
    const struct sharded_stretch *moved = shelter->moved;
    if (!moved) {
        copy = assemble(w, task, buffer);
        advance(w, task);
    }
    pthread_mutex_unlock(&shelter->mutex);
    return moved ? write_in_place(w, task, moved, NULL) : put_hashed(w, task, &copy, 1, NULL);
}

/* Else it is hashed under the mutex and written from where it stands. Was it taken away meanwhile, then the disk may have got
 * some of it from before a change and some from after: it is written again, from the shelter. */
static enum status write_sheltered_live(struct sharded_writing *w, struct task *task) {
    struct sharded_shelter *shelter = w->way.shelter;
    struct file_part parts[PARTS_MAX];
    int count = find_parts(w->stretches, task, parts);
    pthread_mutex_lock(&shelter->mutex);
    const struct sharded_stretch *moved = shelter->moved;
    if (!moved)
        task->extent.hash = checkpoint_parts_hash(parts, count, task->extent.begin, w->way.known);
    pthread_mutex_unlock(&shelter->mutex);
    if (!moved) {
        TRY(put_extent(w, task, parts, count));
        pthread_mutex_lock(&shelter->mutex);
        moved = shelter->moved;
        if (!moved)
            advance(w, task);
        pthread_mutex_unlock(&shelter->mutex);
    }
    return moved ? write_in_place(w, task, moved, NULL) : STATUS_OK;
}

static enum status write_task(struct sharded_writing *w, struct task *task, char *buffer) {
    if (w->way.shelter)
        return task->in_place ? write_sheltered_live(w, task) : write_sheltered_copy(w, task, buffer);
    if (task->in_place)
        return write_in_place(w, task, w->stretches, w->way.known);
    struct file_part copy = assemble(w, task, buffer);
    return put_hashed(w, task, &copy, 1, NULL);
}

static enum status write_extent(struct sharded_writing *w, struct task *task, char *buffer) {
    if (atomic_load(w->way.cancel))
        return status_fail(STATUS_INTERRUPTED, "%s: given up", w->root);
    return write_task(w, task, buffer);
}

/* The work beside, if there is some, is the first task. */
static void extent_task(void *context, int64_t index) {
    struct sharded_writing *w = context;
    if (w->way.beside && index-- == 0) {
        note_failure(w, w->way.beside(w->way.beside_context));
        return;
    }
    char *buffer = w->buffers + (w->way.parallel ? (size_t)thread_index() : 0) * EXTENT_BYTES;
    if (atomic_load(&w->failure) == STATUS_OK)
        note_failure(w, write_extent(w, &w->tasks[index], buffer));
}

static void flush_task(void *context, int64_t file) {
    struct sharded_writing *w = context;
    if (w->writers[file].path && atomic_load(&w->failure) == STATUS_OK)
        note_failure(w, file_writer_flush(&w->writers[file]));
}

static void run_tasks(struct sharded_writing *w, int64_t count, void (*task)(void *context, int64_t index)) {
    if (w->way.parallel)
        parallel_for_waiting(count, task, w);
    else
        for (int64_t i = 0; i < count; i++)
            task(w, i);
}

static enum status open_writers(struct sharded_writing *w) {
    TRY(memory_alloc(&w->writers, (size_t)w->set->file_count, sizeof *w->writers));
    for (size_t i = 0; i < w->task_count; i++) {
        int file = w->tasks[i].extent.file;
        if (w->writers[file].path)
            continue;
        char *path = path_join(w->root, w->set->names[file]);
        enum status status = file_writer_open_at(&w->writers[file], path);
        free(path);
        TRY(status);
    }
    return STATUS_OK;
}

/* An extent ends at a multiple of EXTENT_BYTES or before, so that it fits wherever in a block it begins. */
static enum status take_buffers(struct sharded_writing *w) {
    size_t threads = w->way.parallel ? (size_t)waiting_threads_count() : 1;
    return memory_alloc_large_pages(&w->buffers, threads * EXTENT_BYTES);
}

static enum status write_all(struct sharded_writing *w) {
    TRY(cut_extents(w));
    TRY(open_writers(w));
    TRY(take_buffers(w));
    run_tasks(w, (int64_t)w->task_count + (w->way.beside != NULL), extent_task);
    run_tasks(w, w->set->file_count, flush_task);
    enum status status = (enum status)atomic_load(&w->failure);
    return status == STATUS_OK ? STATUS_OK : status_fail(status, "%s", w->message);
}

static enum status close_writers(struct sharded_writing *w, enum status status) {
    for (int i = 0; i < w->set->file_count && w->writers; i++) {
        enum status closed = w->writers[i].path ? file_writer_close(&w->writers[i]) : STATUS_OK;
        status = status == STATUS_OK ? closed : status;
    }
    return status;
}

static enum status list_extents(const struct sharded_writing *w, struct sharded_extents *extents) {
    TRY(memory_alloc(&extents->items, w->task_count, sizeof *extents->items));
    extents->count = w->task_count;
    for (size_t i = 0; i < w->task_count; i++)
        extents->items[i] = w->tasks[i].extent;
    return STATUS_OK;
}

enum status sharded_write(const struct sharded_set *set, const char *root, const struct sharded_stretch *stretches, int count,
                          struct sharded_way way, struct sharded_extents *extents) {
    struct sharded_writing w = {.set = set, .root = root, .stretches = stretches, .stretch_count = count, .way = way};
    CHECK(!(way.parallel && way.shelter));
    enum status status = close_writers(&w, write_all(&w));
    if (status == STATUS_OK)
        status = list_extents(&w, extents);
    free(w.writers);
    free(w.tasks);
    free(w.buffers);
    return status;
}
