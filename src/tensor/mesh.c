#include "tensor/mesh.h"

#include "base/status.h"

const char *mesh_axis_name(enum mesh_axis axis) {
    static const char *const names[MESH_AXIS_COUNT] = {"island", "replicate", "shard", "expert"};
    CHECK(axis < MESH_AXIS_COUNT);
    return names[axis];
}

int mesh_rank_count(const struct mesh *mesh) {
    return mesh_group_size(mesh, MESH_ALL_AXES);
}

int mesh_rank(const struct mesh *mesh) {
    return mesh_group_rank(mesh, MESH_ALL_AXES);
}

struct mesh mesh_make(const int size[MESH_AXIS_COUNT], int rank) {
    struct mesh mesh;
    int rest = rank;
    for (int axis = MESH_AXIS_COUNT - 1; axis >= 0; axis--) {
        CHECK_OP(size[axis], >=, 1);
        mesh.size[axis] = size[axis];
        mesh.coordinate[axis] = rest % size[axis];
        rest /= size[axis];
    }
    CHECK(rank >= 0 && rest == 0);
    return mesh;
}

struct mesh mesh_single(void) {
    static const int ones[MESH_AXIS_COUNT] = {1, 1, 1, 1};
    return mesh_make(ones, 0);
}

int mesh_group_size(const struct mesh *mesh, unsigned axes) {
    int size = 1;
    for (int axis = 0; axis < MESH_AXIS_COUNT; axis++)
        if (axes & MESH_BIT(axis))
            size *= mesh->size[axis];
    return size;
}

int mesh_group_rank(const struct mesh *mesh, unsigned axes) {
    int rank = 0;
    for (int axis = 0; axis < MESH_AXIS_COUNT; axis++)
        if (axes & MESH_BIT(axis))
            rank = rank * mesh->size[axis] + mesh->coordinate[axis];
    return rank;
}

int mesh_group_color(const struct mesh *mesh, unsigned axes) {
    return mesh_group_rank(mesh, ~axes & MESH_ALL_AXES);
}

struct range range_part(int64_t total, int part_count, int part) {
    CHECK(part_count >= 1 && part >= 0 && part < part_count && total >= 0);
    return (struct range){total * part / part_count, total * (part + 1) / part_count};
}

struct layout layout_replicated(void) {
    return (struct layout){0};
}

unsigned layout_shard_axes(const struct layout *layout, int dim) {
    unsigned axes = 0;
    for (int axis = 0; axis < MESH_AXIS_COUNT; axis++)
        if (layout->axis[axis].kind == PLACEMENT_SHARD && layout->axis[axis].dim == dim)
            axes |= MESH_BIT(axis);
    return axes;
}

struct range layout_local_range(const struct layout *layout, const struct mesh *mesh, int dim, int64_t extent) {
    unsigned axes = layout_shard_axes(layout, dim);
    return range_part(extent, mesh_group_size(mesh, axes), mesh_group_rank(mesh, axes));
}
