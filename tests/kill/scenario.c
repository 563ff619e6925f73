#include "scenario.h"

#include "base/file.h"
#include <stdlib.h>
#include <string.h>

enum { DAMAGED_BYTE = 5000 };

static const char *const names[] = {"next", "replaces", "leftovers", "fresh"};

static void clear_step(struct tree *tree, int64_t step) {
    char *name = text_format("step-%06lld", (long long)step);
    tree_clear(tree, tree_find(tree, "checkpoints"), name);
    free(name);
}

static void damage_model(struct tree *tree, int64_t step) {
    char *path = text_format("checkpoints/step-%06lld/model.safetensors", (long long)step);
    int node = tree_find(tree, path);
    CHECK(node >= 0);
    char other = (char)(tree->nodes[node].data[DAMAGED_BYTE] ^ 1);
    tree_put(tree, node, DAMAGED_BYTE, &other, 1);
    free(path);
}

static void step_aside(struct tree *tree, int64_t step) {
    char *name = text_format("step-%06lld", (long long)step), *aside = text_format("%s.old-1", name);
    int checkpoints = tree_find(tree, "checkpoints");
    char *path = path_join("checkpoints", name);
    tree_set(tree, checkpoints, aside, tree_find(tree, path));
    tree_clear(tree, checkpoints, name);
    free(path);
    free(aside);
    free(name);
}

static void leave_draft(struct tree *tree, int64_t step) {
    char *name = text_format("step-%06lld.tmp-1", (long long)step);
    tree_set(tree, tree_find(tree, "checkpoints"), name, tree_add(tree, true));
    free(name);
}

enum status scenario_init(struct scenario *s, enum scenario_kind kind, const char *run_directory, int64_t steps) {
    int64_t newest = steps - 2;
    *s = (struct scenario){.name = names[kind], .newest = kind == SCENARIO_FRESH ? 0 : newest, .damaged_step = -1};
    if (kind == SCENARIO_FRESH) {
        tree_init(&s->tree);
        return STATUS_OK;
    }
    TRY(tree_load(&s->tree, run_directory));
    if (kind == SCENARIO_REPLACES) {
        s->damaged_step = newest + 1;
        damage_model(&s->tree, s->damaged_step);
    }
    for (int64_t step = 1; step <= steps; step++)
        if (step < newest - 1 || (step > newest && step != s->damaged_step))
            clear_step(&s->tree, step);
    if (kind == SCENARIO_LEFTOVERS) {
        step_aside(&s->tree, newest);
        leave_draft(&s->tree, newest + 1);
    }
    return STATUS_OK;
}
