/* A directory with all it holds, in memory: to put it back as it was, and to change it as a disk would. */
#pragma once

#include "base/status.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct tree_entry {
    char *name;
    int node;
};

/* A file or directory. One that no entry leads to stays here until the tree is released. */
struct tree_node {
    bool is_directory, borrows; /* borrows: data belong to another tree */
    char *data;
    size_t size;
    struct tree_entry *entries;
    size_t entry_count;
};

struct tree {
    struct tree_node *nodes; /* [0] is the directory itself */
    int count;
};

enum status tree_load(struct tree *tree, const char *directory) MUST_USE; /* the caller releases it */
void tree_init(struct tree *tree);                                       /* an empty directory */
void tree_copy(struct tree *copy, const struct tree *tree); /* borrows the data of files: release the copy first */
void tree_release(struct tree *tree);

/* In place of what is there. */
enum status tree_write(const struct tree *tree, const char *directory) MUST_USE;

int tree_add(struct tree *tree, bool is_directory);       /* a node that no entry leads to yet */
int tree_find(const struct tree *tree, const char *path); /* -1: not there; "" is the directory itself */
void tree_set(struct tree *tree, int directory, const char *name, int node); /* also in place of another */
void tree_clear(struct tree *tree, int directory, const char *name);
void tree_resize(struct tree *tree, int node, size_t size); /* grows with zeros */
void tree_put(struct tree *tree, int node, size_t begin, const void *data, size_t bytes);
