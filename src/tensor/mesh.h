/* The mesh of ranks and how a tensor lies on it. Index arithmetic only; sends nothing.
 *
 * A mesh has four named axes, outermost first. A placement says, for one axis, what each rank along it holds. One
 * process is the mesh of size 1 along every axis: there every placement means "the whole tensor".
 */
#pragma once

enum mesh_axis { MESH_ISLAND, MESH_REPLICATE, MESH_SHARD, MESH_EXPERT, MESH_AXIS_COUNT };

struct mesh {
    int size[MESH_AXIS_COUNT];  /* ranks along each axis, 1 or more */
    int coordinate[MESH_AXIS_COUNT]; /* of this rank */
};

enum placement_kind {
    PLACEMENT_REPLICATE, /* every rank holds the same */
    PLACEMENT_SHARD,     /* each rank holds its part of dimension `dim` */
    PLACEMENT_PARTIAL,   /* each rank holds a term; the tensor is their sum */
};

struct placement {
    enum placement_kind kind;
    int dim; /* PLACEMENT_SHARD only */
};

/* How one tensor lies along every axis. */
struct layout {
    struct placement axis[MESH_AXIS_COUNT];
};
