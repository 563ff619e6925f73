#include "train/parts.h"

#include "base/memory.h"
#include "model/names.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ISLAND_STEM "training/island-"

int64_t checkpoint_island_count(const struct model *model, const struct outer *outer) {
    return outer ? model->sharding.mesh.size[MESH_ISLAND] : 0;
}

int64_t checkpoint_part_count(struct checkpoint_form form) {
    return CHECKPOINT_SHARED_PARTS + form.island_count;
}

void checkpoint_part_stem(struct checkpoint_form form, int64_t index, char stem[CHECKPOINT_STEM_BYTES]) {
    static const char *const shared[2][CHECKPOINT_SHARED_PARTS] = {{"model", "training/optimizer"},
                                                                   {"model", "training/outer"}};
    CHECK_OP(index, <, checkpoint_part_count(form));
    if (index < CHECKPOINT_SHARED_PARTS)
        snprintf(stem, CHECKPOINT_STEM_BYTES, "%s", shared[form.island_count > 0][index]);
    else
        snprintf(stem, CHECKPOINT_STEM_BYTES, ISLAND_STEM "%lld", (long long)(index - CHECKPOINT_SHARED_PARTS));
}

static void add_array(struct checkpoint_part *part, const char *prefix, const struct tensor *rows, bool has_place) {
    part->arrays[part->array_count++] = (struct checkpoint_array){rows, prefix, !has_place};
}

static void add_moments(struct checkpoint_part *part, const struct model *model) {
    add_array(part, "m.", model->moment1, true);
    add_array(part, "v.", model->moment2, true);
}

struct checkpoint_part checkpoint_part_at(const struct model *model, const struct outer *outer,
                                          struct checkpoint_form form, int64_t index) {
    const struct tensor *own = model->own_weight, *weights = outer && form.island_count > 0 ? outer->global : own;
    struct checkpoint_part part = {.island = -1, .rounded = form.rounded && index == 0};
    checkpoint_part_stem(form, index, part.stem);
    if (form.rounded && index == 1)
        add_array(&part, "w.", weights, true);
    if (index >= CHECKPOINT_SHARED_PARTS) {
        part.island = index - CHECKPOINT_SHARED_PARTS;
        add_array(&part, "w.", own, outer != NULL);
        add_moments(&part, model);
    } else if (index == 0) {
        add_array(&part, "", weights, true);
    } else if (form.island_count > 0) {
        add_array(&part, "b.", outer ? outer->momentum : own, outer != NULL);
    } else {
        add_moments(&part, model);
    }
    return part;
}

bool checkpoint_part_is_of(const struct checkpoint_part *part, int64_t island) {
    return part->island < 0 || part->island == island;
}

enum status checkpoint_part_tensors(const struct model *model, const struct checkpoint_part *part,
                                    struct named_tensor **items, int *count) {
    *items = NULL;
    *count = 0;
    for (int a = 0; a < part->array_count; a++) {
        struct named_tensor *more;
        int more_count;
        TRY(model_name_tensors(model, part->arrays[a].rows, part->arrays[a].prefix, &more, &more_count));
        for (int i = 0; i < more_count; i++) {
            if (part->arrays[a].has_no_place)
                more[i].tensor.data = NULL;
            if (part->rounded)
                more[i].tensor.dtype = DTYPE_BF16;
        }
        enum status status = memory_resize(items, (size_t)(*count + more_count), sizeof **items);
        if (status == STATUS_OK)
            memcpy(*items + *count, more, (size_t)more_count * sizeof *more);
        free(more);
        TRY(status);
        *count += more_count;
    }
    return STATUS_OK;
}

enum status checkpoint_part_open(const char *checkpoint, const char *stem, struct weights *weights) {
    const char *name = path_name(stem);
    char *directory = text_format("%s/%.*s", checkpoint, (int)(name - stem), stem);
    enum status status = weights_open_stem(weights, directory, name);
    free(directory);
    return status;
}

int64_t checkpoint_island_of_file(const char *name) {
    size_t size = sizeof ISLAND_STEM - 1;
    if (strncmp(name, ISLAND_STEM, size) != 0 || name[size] < '0' || name[size] > '9')
        return -1;
    return strtoll(name + size, NULL, 10);
}
