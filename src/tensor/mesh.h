/* The mesh of ranks and how a tensor lies on it. Index arithmetic only; sends nothing.
 *
 * A mesh has four named axes, outermost first; ranks fill it in that order, so that ranks next to each other along the
 * expert axis, which exchange most, are neighbours. A placement says, for one axis, what each rank along it holds. One
 * process is the mesh of size 1 along every axis: there every placement means "the whole tensor".
 */
#pragma once

#include <stdint.h>

enum mesh_axis { MESH_ISLAND, MESH_REPLICATE, MESH_SHARD, MESH_EXPERT, MESH_AXIS_COUNT };

/* A set of axes: MESH_BIT(MESH_SHARD) | MESH_BIT(MESH_EXPERT). */
#define MESH_BIT(axis) (1u << (axis))
enum { MESH_ALL_AXES = (1 << MESH_AXIS_COUNT) - 1 };

struct mesh {
    int size[MESH_AXIS_COUNT];  /* ranks along each axis, 1 or more */
    int coordinate[MESH_AXIS_COUNT]; /* of this rank */
};

const char *mesh_axis_name(enum mesh_axis axis); /* "island", "replicate", "shard", "expert" */

/* The mesh of these sizes seen from `rank`, 0 <= rank < the product of the sizes. */
struct mesh mesh_make(const int size[MESH_AXIS_COUNT], int rank);
struct mesh mesh_single(void); /* one rank */
int mesh_rank_count(const struct mesh *mesh);
int mesh_rank(const struct mesh *mesh);

/* The ranks that differ from this one along `axes` (a set) only form its group over them: its size, this rank's place in
 * it (in rank order), and a number that is the same for the members of a group and differs between groups. */
int mesh_group_size(const struct mesh *mesh, unsigned axes);
int mesh_group_rank(const struct mesh *mesh, unsigned axes);
int mesh_group_color(const struct mesh *mesh, unsigned axes);

/* Part `part` of `total` things divided over part_count: begin .. end-1. Parts differ by one at most, may be empty, and
 * are in order. */
struct range {
    int64_t begin, end;
};
struct range range_part(int64_t total, int part_count, int part);
/* The part that thing `index` of 0 .. total-1 is in: index is in range_part(total, part_count, range_owner(..)). */
static inline int32_t range_owner(int64_t total, int part_count, int64_t index) {
    return (int32_t)(((uint64_t)(index + 1) * (uint64_t)part_count - 1) / (uint64_t)total);
}
static inline int64_t range_count(struct range range) {
    return range.end - range.begin;
}

enum placement_kind {
    PLACEMENT_REPLICATE, /* every rank holds the same */
    PLACEMENT_SHARD,     /* each rank holds its part of dimension `dim` */
    PLACEMENT_PARTIAL,   /* each rank holds a term; the tensor is their sum */
};

struct placement {
    enum placement_kind kind;
    int dim; /* PLACEMENT_SHARD only */
};

/* How one tensor lies along every axis. Where several axes shard one dimension, it is divided over their group as a
 * whole, the outer axis first: as over one axis of as many ranks. */
struct layout {
    struct placement axis[MESH_AXIS_COUNT];
};

struct layout layout_replicated(void);

/* The axes, as a set, that shard dimension `dim`. */
unsigned layout_shard_axes(const struct layout *layout, int dim);

/* What a rank of the mesh holds of dimension `dim` of extent `extent`. */
struct range layout_local_range(const struct layout *layout, const struct mesh *mesh, int dim, int64_t extent);
