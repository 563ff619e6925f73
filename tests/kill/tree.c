#include "tree.h"

#include "base/file.h"
#include "base/memory.h"
#include <stdlib.h>
#include <string.h>

enum { FILE_BYTES_MAX = 64 << 20 };

static void *grown(void *items, size_t count, size_t item_bytes) {
    void *larger = realloc(items, count * item_bytes + 1);
    CHECK(larger != NULL);
    return larger;
}

int tree_add(struct tree *tree, bool is_directory) {
    tree->nodes = grown(tree->nodes, (size_t)tree->count + 1, sizeof *tree->nodes);
    tree->nodes[tree->count] = (struct tree_node){.is_directory = is_directory};
    return tree->count++;
}

void tree_init(struct tree *tree) {
    *tree = (struct tree){0};
    tree_add(tree, true);
}

void tree_release(struct tree *tree) {
    for (int i = 0; i < tree->count; i++) {
        struct tree_node *node = &tree->nodes[i];
        for (size_t e = 0; e < node->entry_count; e++)
            free(node->entries[e].name);
        free(node->entries);
        if (!node->borrows)
            free(node->data);
    }
    free(tree->nodes);
    *tree = (struct tree){0};
}

void tree_copy(struct tree *copy, const struct tree *tree) {
    *copy = (struct tree){0};
    for (int i = 0; i < tree->count; i++) {
        const struct tree_node *from = &tree->nodes[i];
        int node = tree_add(copy, from->is_directory);
        copy->nodes[node].borrows = true;
        copy->nodes[node].data = from->data;
        copy->nodes[node].size = from->size;
        for (size_t e = 0; e < from->entry_count; e++)
            tree_set(copy, node, from->entries[e].name, from->entries[e].node);
    }
}

/* ---- entries --------------------------------------------------------------------------------------------------------- */

static struct tree_entry *find_entry(const struct tree_node *node, const char *name, size_t bytes) {
    for (size_t e = 0; e < node->entry_count; e++)
        if (strlen(node->entries[e].name) == bytes && memcmp(node->entries[e].name, name, bytes) == 0)
            return &node->entries[e];
    return NULL;
}

int tree_find(const struct tree *tree, const char *path) {
    int node = 0;
    for (const char *part = path; *part && node >= 0;) {
        size_t bytes = strcspn(part, "/");
        const struct tree_entry *entry = find_entry(&tree->nodes[node], part, bytes);
        if (bytes > 0 && !(bytes == 1 && *part == '.'))
            node = entry ? entry->node : -1;
        part += bytes + (part[bytes] == '/');
    }
    return node;
}

void tree_set(struct tree *tree, int directory, const char *name, int node) {
    struct tree_node *d = &tree->nodes[directory];
    struct tree_entry *entry = find_entry(d, name, strlen(name));
    if (!entry) {
        d->entries = grown(d->entries, d->entry_count + 1, sizeof *d->entries);
        entry = &d->entries[d->entry_count++];
        entry->name = memory_copy_string(name);
    }
    entry->node = node;
}

void tree_clear(struct tree *tree, int directory, const char *name) {
    struct tree_node *d = &tree->nodes[directory];
    struct tree_entry *entry = find_entry(d, name, strlen(name));
    if (!entry)
        return;
    free(entry->name);
    *entry = d->entries[--d->entry_count];
}

/* ---- contents -------------------------------------------------------------------------------------------------------- */

void tree_resize(struct tree *tree, int index, size_t size) {
    struct tree_node *node = &tree->nodes[index];
    char *data = calloc(size + 1, 1);
    CHECK(data != NULL);
    if (node->size > 0 && size > 0)
        memcpy(data, node->data, size < node->size ? size : node->size);
    if (!node->borrows)
        free(node->data);
    node->borrows = false;
    node->data = data;
    node->size = size;
}

void tree_put(struct tree *tree, int index, size_t begin, const void *data, size_t bytes) {
    struct tree_node *node = &tree->nodes[index];
    if (node->borrows || begin + bytes > node->size)
        tree_resize(tree, index, begin + bytes > node->size ? begin + bytes : node->size);
    if (bytes > 0)
        memcpy(node->data + begin, data, bytes);
}

/* ---- from and to a disk ---------------------------------------------------------------------------------------------- */

static enum status load_into(struct tree *tree, int directory, const char *path);

static enum status load_child(struct tree *tree, int directory, const char *path, const char *name) {
    char *child = path_join(path, name);
    bool is_directory = directory_exists(child);
    int node = tree_add(tree, is_directory);
    tree_set(tree, directory, name, node);
    enum status status = is_directory ? load_into(tree, node, child)
                                      : file_read(child, FILE_BYTES_MAX, &tree->nodes[node].data, &tree->nodes[node].size);
    free(child);
    return status;
}

static enum status load_into(struct tree *tree, int directory, const char *path) {
    struct text_list names;
    TRY(directory_list(path, &names));
    enum status status = STATUS_OK;
    for (size_t i = 0; i < names.count && status == STATUS_OK; i++)
        status = load_child(tree, directory, path, names.items[i]);
    text_list_release(&names);
    return status;
}

enum status tree_load(struct tree *tree, const char *directory) {
    tree_init(tree);
    enum status status = load_into(tree, 0, directory);
    if (status != STATUS_OK)
        tree_release(tree);
    return status;
}

static enum status write_file(const char *path, const struct tree_node *node) {
    struct file_writer writer;
    TRY(file_writer_open(&writer, path, false));
    enum status status = file_writer_add(&writer, node->data, node->size);
    enum status closed = file_writer_close(&writer);
    return status == STATUS_OK ? closed : status;
}

static enum status write_node(const struct tree *tree, int index, const char *path) {
    const struct tree_node *node = &tree->nodes[index];
    if (!node->is_directory)
        return write_file(path, node);
    TRY(directory_make(path));
    enum status status = STATUS_OK;
    for (size_t e = 0; e < node->entry_count && status == STATUS_OK; e++) {
        char *child = path_join(path, node->entries[e].name);
        status = write_node(tree, node->entries[e].node, child);
        free(child);
    }
    return status;
}

enum status tree_write(const struct tree *tree, const char *directory) {
    TRY(directory_remove(directory));
    return write_node(tree, 0, directory);
}
