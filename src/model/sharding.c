#include "model/sharding.h"

#include <string.h>

struct sharding sharding_single(void) {
    return (struct sharding){mesh_single(), 0};
}

struct layout sharding_compute_layout(const struct parameter *row) {
    struct layout layout = layout_replicated();
    if (row->is_expert)
        layout.axis[MESH_EXPERT] = row->layout.axis[MESH_EXPERT];
    return layout;
}

struct layout sharding_own_layout(const struct sharding *sharding, const struct parameter *row) {
    return sharding->zero == 0 ? sharding_compute_layout(row) : row->layout;
}

struct layout sharding_gradient_layout(const struct parameter *row) {
    struct layout layout = sharding_compute_layout(row);
    for (int axis = MESH_REPLICATE; axis < MESH_AXIS_COUNT; axis++)
        if (layout.axis[axis].kind == PLACEMENT_REPLICATE)
            layout.axis[axis].kind = PLACEMENT_PARTIAL;
    return layout;
}

struct parameter_part sharding_part(const struct sharding *sharding, const struct parameter *row,
                                    const struct layout *layout) {
    struct parameter_part part;
    for (int dim = 0; dim < 3; dim++) {
        struct range range = layout_local_range(layout, &sharding->mesh, dim, row->shape[dim]);
        part.first[dim] = range.begin;
        part.shape[dim] = range_count(range);
    }
    return part;
}

int64_t parameter_part_elements(const struct parameter_part *part) {
    return part->shape[0] * part->shape[1] * part->shape[2];
}

/* Over the axes alone, and not over this rank's extents, so that all ranks say the same: with more ranks than rows one
 * of them may own a whole row by chance. */
bool sharding_is_whole(const struct sharding *sharding, const struct parameter *row) {
    struct layout compute = sharding_compute_layout(row), own = sharding_own_layout(sharding, row);
    for (int axis = 0; axis < MESH_AXIS_COUNT; axis++)
        if (sharding->mesh.size[axis] > 1 && compute.axis[axis].kind != own.axis[axis].kind)
            return false;
    return true;
}
