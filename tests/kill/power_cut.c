/* Invariants
 *  1. `now` is the tree as the process saw it: paths and descriptors are looked up there, when their call is read.
 *  2. A change names nodes, not paths: it can be made without those before it.
 *  3. A change lasts from the first flush after it of its file, or of the directory that its entry is in.
 */
#include "power_cut.h"

#include "base/file.h"
#include "base/memory.h"
#include "base/random.h"
#include "call_record.h"
#include "checkpoint/publish.h"
#include <stdlib.h>
#include <string.h>

enum { RECORDS_BYTES_MAX = 1 << 30, DESCRIPTORS_MAX = 1024, BLOCK_BYTES = 4096 };
enum { STREAM_ENTRIES = 1, STREAM_DATA, STREAM_BLOCKS, STREAM_CHANCE };

enum change_kind { CHANGE_ENTRY, CHANGE_SIZE, CHANGE_DATA };

struct power_cut_change {
    enum change_kind kind;
    size_t at, lasts_at; /* number of the call; of the flush, SIZE_MAX: none */
    int node;            /* of the file; of what an entry leads to */
    int directory;       /* entry */
    char *from, *to;     /* entry: the name that goes, or NULL; that comes, or NULL */
    bool may_shrink;     /* size */
    size_t begin, bytes; /* size: begin */
    const char *data;    /* data; borrowed from the records */
};

/* ---- reading the records ----------------------------------------------------------------------------------------------- */

struct reading {
    struct power_cut_log *log;
    struct tree now;
    int nodes[DESCRIPTORS_MAX]; /* that descriptors are open on */
    size_t at;                  /* number of this call */
};

static struct power_cut_change *add_change(struct reading *r, struct power_cut_change change) {
    struct power_cut_log *log = r->log;
    log->changes = realloc(log->changes, (log->change_count + 1) * sizeof *log->changes);
    CHECK(log->changes != NULL);
    change.at = r->at;
    change.lasts_at = SIZE_MAX;
    log->changes[log->change_count] = change;
    return &log->changes[log->change_count++];
}

static void make_change(struct tree *tree, const struct power_cut_change *change) {
    size_t size = tree->nodes[change->node].size;
    switch (change->kind) {
    case CHANGE_ENTRY:
        if (change->from)
            tree_clear(tree, change->directory, change->from);
        if (change->to)
            tree_set(tree, change->directory, change->to, change->node);
        break;
    case CHANGE_SIZE:
        if (change->may_shrink || change->begin > size)
            tree_resize(tree, change->node, change->begin);
        break;
    case CHANGE_DATA:
        tree_put(tree, change->node, change->begin, change->data, change->bytes);
        break;
    }
}

static void note_flush(struct reading *r, int node) {
    for (size_t i = 0; i < r->log->change_count; i++) {
        struct power_cut_change *change = &r->log->changes[i];
        int flushed_by = change->kind == CHANGE_ENTRY ? change->directory : change->node;
        if (flushed_by == node && change->lasts_at == SIZE_MAX)
            change->lasts_at = r->at;
    }
}

/* The directory that a path is in, and its last part. */
static int find_parent(const struct tree *tree, const char *path, const char **name) {
    char *parent = memory_copy_string(path), *slash = strrchr(parent, '/');
    *(slash ? slash : parent) = '\0';
    *name = path_name(path);
    int node = tree_find(tree, parent);
    free(parent);
    CHECK(node >= 0);
    return node;
}

static bool is_in_checkpoints(const char *path) {
    return strncmp(path, "checkpoints/", sizeof "checkpoints/" - 1) == 0;
}

/* Whoever goes on to change anything in checkpoints/ relies on what was named before. */
static void note_reliance(struct reading *r, const char *path) {
    for (int i = 0; i < r->log->save_count && is_in_checkpoints(path); i++)
        if (r->log->saves[i].relied_at == SIZE_MAX)
            r->log->saves[i].relied_at = r->at;
}

static void note_save(struct reading *r, const char *to) {
    struct power_cut_log *log = r->log;
    int64_t step = checkpoint_step_of(to);
    if (!is_in_checkpoints(to) || step < 0 || strchr(path_name(to), '.'))
        return;
    log->saves = realloc(log->saves, ((size_t)log->save_count + 1) * sizeof *log->saves);
    CHECK(log->saves != NULL);
    log->saves[log->save_count++] = (struct power_cut_save){step, r->at, SIZE_MAX};
}

static void read_entry(struct reading *r, int node, const char *from, const char *to) {
    const char *from_name = NULL, *to_name = NULL;
    int directory = find_parent(&r->now, from ? from : to, from ? &from_name : &to_name);
    if (from && to)
        CHECK_OP(find_parent(&r->now, to, &to_name), ==, directory);
    note_reliance(r, from ? from : to);
    struct power_cut_change change = {.kind = CHANGE_ENTRY,
                                      .node = node,
                                      .directory = directory,
                                      .from = from_name ? memory_copy_string(from_name) : NULL,
                                      .to = to_name ? memory_copy_string(to_name) : NULL};
    make_change(&r->now, add_change(r, change));
    if (from && to)
        note_save(r, to);
}

static void read_open(struct reading *r, const struct call_record *record, const char *path) {
    int node = tree_find(&r->now, path);
    bool made = node < 0;
    if (made) {
        node = tree_add(&r->now, false);
        read_entry(r, node, NULL, path);
    }
    CHECK_OP(record->descriptor, <, DESCRIPTORS_MAX);
    r->nodes[record->descriptor] = node;
    if (!made && record->kind == CALL_OPEN_TRUNCATED)
        make_change(&r->now, add_change(r, (struct power_cut_change){.kind = CHANGE_SIZE, .node = node, .may_shrink = true}));
}

static void read_make(struct reading *r, const char *path) {
    read_entry(r, tree_add(&r->now, true), NULL, path);
}

static void read_call(struct reading *r, const struct call_record *record, const char *path, const char *data) {
    int node = record->descriptor >= 0 && record->descriptor < DESCRIPTORS_MAX ? r->nodes[record->descriptor] : -1;
    switch ((enum call_kind)record->kind) {
    case CALL_OPEN:
    case CALL_OPEN_TRUNCATED:
    case CALL_OPEN_DIRECTORY:
        read_open(r, record, path);
        break;
    case CALL_WRITE:
        make_change(&r->now, add_change(r, (struct power_cut_change){.kind = CHANGE_DATA,
                                                                     .node = node,
                                                                     .begin = record->begin,
                                                                     .bytes = record->data_bytes,
                                                                     .data = data}));
        break;
    case CALL_RESIZE:
    case CALL_GROW:
        make_change(&r->now, add_change(r, (struct power_cut_change){.kind = CHANGE_SIZE,
                                                                     .node = node,
                                                                     .begin = record->begin,
                                                                     .may_shrink = record->kind == CALL_RESIZE}));
        break;
    case CALL_FLUSH:
        note_flush(r, node);
        break;
    case CALL_RENAME:
        read_entry(r, tree_find(&r->now, path), path, path + strlen(path) + 1);
        break;
    case CALL_MAKE:
        read_make(r, path);
        break;
    case CALL_REMOVE:
        read_entry(r, tree_find(&r->now, path), path, NULL);
        break;
    case CALL_CLOSE:
    case CALL_HINT:
    case CALL_FAILED:
        break;
    }
}

/* A process that was killed may have left a part of a record at the end: it is not looked at. */
static void read_records(struct reading *r, const char *records, size_t size) {
    struct call_record record;
    char path[2 * 4096 + 1];
    for (size_t offset = 0; offset + sizeof record <= size; r->at++) {
        memcpy(&record, records + offset, sizeof record);
        offset += sizeof record;
        if (record.path_bytes >= sizeof path || record.path_bytes + record.data_bytes > size - offset)
            break;
        memcpy(path, records + offset, record.path_bytes);
        path[record.path_bytes] = '\0';
        read_call(r, &record, path, records + offset + record.path_bytes);
        offset += record.path_bytes + record.data_bytes;
    }
}

static void keep_nodes(struct reading *r) {
    r->log->node_count = r->now.count;
    r->log->is_directory = malloc((size_t)r->now.count * sizeof *r->log->is_directory);
    CHECK(r->log->is_directory != NULL);
    for (int i = 0; i < r->now.count; i++)
        r->log->is_directory[i] = r->now.nodes[i].is_directory;
}

enum status power_cut_open(struct power_cut_log *log, const struct tree *before, const char *records_path, bool ended) {
    struct reading reading = {.log = log};
    size_t size;
    *log = (struct power_cut_log){.before = before};
    TRY(file_read(records_path, RECORDS_BYTES_MAX, &log->records, &size));
    tree_copy(&reading.now, before);
    read_records(&reading, log->records, size);
    log->call_count = reading.at;
    if (ended)
        note_reliance(&reading, "checkpoints/");
    keep_nodes(&reading);
    tree_release(&reading.now);
    return STATUS_OK;
}

void power_cut_close(struct power_cut_log *log) {
    for (size_t i = 0; i < log->change_count; i++) {
        free(log->changes[i].from);
        free(log->changes[i].to);
    }
    free(log->changes);
    free(log->saves);
    free(log->is_directory);
    free(log->records);
    *log = (struct power_cut_log){0};
}

/* ---- images ------------------------------------------------------------------------------------------------------------ */

struct cut {
    size_t calls;
    enum power_cut_style style;
    uint64_t seed;
    size_t journal_end; /* number of the last call whose entry is there */
    double chance;      /* of each change that was not flushed */
};

static bool lasts(const struct cut *cut, const struct power_cut_change *change) {
    return change->lasts_at < cut->calls;
}

static bool entry_is_there(const struct cut *cut, const struct power_cut_change *change, size_t index) {
    switch (cut->style) {
    case POWER_CUT_NOTHING:
        return false;
    case POWER_CUT_ALL:
    case POWER_CUT_EMPTY:
        return true;
    case POWER_CUT_JOURNAL:
        return change->at <= cut->journal_end;
    case POWER_CUT_ANY:
        return random_uniform(cut->seed, STREAM_ENTRIES, index) < cut->chance;
    }
    return false;
}

static void put_zeros(struct tree *tree, const struct power_cut_change *change) {
    size_t end = change->begin + change->bytes;
    if (tree->nodes[change->node].size < end)
        tree_resize(tree, change->node, end);
}

static void put_some_blocks(struct tree *tree, const struct power_cut_change *change, const struct cut *cut, size_t index) {
    put_zeros(tree, change);
    for (size_t done = 0, block = 0; done < change->bytes; done += BLOCK_BYTES, block++) {
        size_t bytes = change->bytes - done < BLOCK_BYTES ? change->bytes - done : BLOCK_BYTES;
        if (random_uniform(cut->seed, STREAM_BLOCKS + (index << 8), block) < cut->chance)
            tree_put(tree, change->node, change->begin + done, change->data + done, bytes);
    }
}

static void put_unflushed_data(struct tree *tree, const struct power_cut_change *change, const struct cut *cut, size_t index) {
    if (cut->style == POWER_CUT_NOTHING)
        return;
    if (cut->style == POWER_CUT_ALL) {
        make_change(tree, change);
        return;
    }
    uint64_t fate = cut->style == POWER_CUT_EMPTY ? 0 : random_bits(cut->seed, STREAM_DATA, index) % 4;
    if (fate == 0)
        put_zeros(tree, change);
    else if (fate == 1)
        make_change(tree, change);
    else if (fate == 2)
        put_some_blocks(tree, change, cut, index);
}

static void apply(struct tree *tree, const struct power_cut_change *change, const struct cut *cut, size_t index) {
    if (lasts(cut, change))
        make_change(tree, change);
    else if (change->kind == CHANGE_DATA)
        put_unflushed_data(tree, change, cut, index);
    else if (entry_is_there(cut, change, index))
        make_change(tree, change);
}

/* A journal keeps what is before something that lasts. */
static size_t end_of_journal(const struct power_cut_log *log, const struct cut *cut) {
    size_t least = 0;
    for (size_t i = 0; i < log->change_count; i++)
        if (log->changes[i].kind == CHANGE_ENTRY && lasts(cut, &log->changes[i]))
            least = log->changes[i].at;
    return least + random_bits(cut->seed, STREAM_CHANCE, 1) % (cut->calls - least + 1);
}

void power_cut_image(const struct power_cut_log *log, size_t calls, enum power_cut_style style, uint64_t seed,
                     struct tree *image) {
    static const double chances[] = {0.1, 0.5, 0.9};
    struct cut cut = {.calls = calls, .style = style, .seed = seed};
    cut.chance = chances[random_bits(seed, STREAM_CHANCE, 0) % 3];
    cut.journal_end = end_of_journal(log, &cut);
    tree_copy(image, log->before);
    for (int i = image->count; i < log->node_count; i++)
        tree_add(image, log->is_directory[i]);
    for (size_t i = 0; i < log->change_count && log->changes[i].at < calls; i++)
        apply(image, &log->changes[i], &cut, i);
}

void power_cut_range(const struct power_cut_log *log, size_t calls, int64_t newest, int64_t *low, int64_t *high) {
    *low = *high = newest;
    for (int i = 0; i < log->save_count; i++) {
        const struct power_cut_save *save = &log->saves[i];
        if (save->relied_at < calls && save->step > *low)
            *low = save->step;
        if (save->renamed_at < calls && save->step > *high)
            *high = save->step;
    }
}
