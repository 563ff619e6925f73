/* What the products on Hopper's matrix units (product_sm90.cu) and the ways their results take (product_results_sm90.cuh) share:
 * tiles, problems, and how a block's shared memory is laid out. */
#pragma once

#include "kernels/cuda/product.cuh"

#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/product_schedule.cuh"
#include "kernels/cuda/tensor_map.cuh"

enum {
    WARPS = GROUP_THREADS / WARP, /* of a group */
    BOX_BYTES = 64 * 128, /* 64 rows of 64 numbers */
    A_BYTES = TILE_M * TILE_K * 2,
    B_BYTES = TILE_N * TILE_K * 2,
    STAGE_BYTES = A_BYTES + B_BYTES,
    STRIP_ROWS = 16,
    STRIP_BYTES = STRIP_ROWS * 128,
    THROUGH_INPUTS = 2,
};

/* Sums written or added as rows, as columns; SwiGLU of them; backward through SwiGLU; their sum with a base. */
enum result { TO_BF16, TO_F32, ADD_F32, TO_F32_TRANSPOSED, ADD_F32_TRANSPOSED, TO_SWIGLU, THROUGH_SWIGLU, ONTO_F32 };

/* Which operand's rows an index names. */
enum gathered { NOTHING, ROWS_OF_A, ROWS_OF_B };

/* Shared memory is stages, and strips in which a warp's results wait. Backward through SwiGLU has two inputs for each sum, which
 * come into strips while the tile is multiplied: it takes a stage less for more of them. */
static constexpr int stages_of(int result) {
    return result == THROUGH_SWIGLU ? 3 : 4;
}

static constexpr int strips_of(int result) {
    return result == THROUGH_SWIGLU ? 4 : 2;
}

struct rows_operand {
    const bf16 *data;
    const int32_t *index; /* NULL: row r is row r */
    int64_t stride;       /* elements */
    int columns;
};

struct maps {
    tensor_map a[PRODUCT_TERMS_MAX], b[PRODUCT_TERMS_MAX], c[THROUGH_INPUTS];
};

struct problem {
    const int32_t *offsets; /* NULL: one group of all rows */
    int groups;
    int rows;               /* N */
    int group_rows;         /* without offsets: rows of each group but the last; of one group all */
    int m, n;               /* of C: rows (WEIGHT only), columns (of one half where there are two) */
    int inner[PRODUCT_TERMS_MAX], terms; /* FORWARD, INPUT */
    struct rows_operand a[PRODUCT_TERMS_MAX], b;
    int lead; /* blocks of the inner dimension by which the first multipliers are ahead of the others when a tile begins; 0: none */
    void *c, *c_up, *c_act; /* THROUGH_SWIGLU: gate and up, which become their gradients, and act */
    bool is_wide;           /* of f32: 16 bytes of C, and of base, are aligned */
    const float *base;      /* ONTO_F32: what the sums are added to, as large as C */
    const float *row_weight;
    float *row_part;        /* THROUGH_SWIGLU [tiles of columns, N]: parts of the gradient of row_weight */
    int64_t stride;         /* of C's rows, elements */
    int64_t group_elements; /* WEIGHT: from one group's C to the next */
};

template <int stages, int strips> struct shared_memory {
    enum { STAGES = stages, STRIPS = strips };
    unsigned char stage[stages][STAGE_BYTES]; /* A, then B */
    unsigned char strip[MULTIPLIERS][WARPS][strips][STRIP_BYTES];
    uint64_t full[stages], empty[stages], ahead;
    uint64_t loaded[MULTIPLIERS][WARPS][2]; /* THROUGH_SWIGLU: gate and up of 64 columns are in two strips */
    int first_row[GROUPS_MAX + 1];
    int first_tile[GROUPS_MAX + 1]; /* of the group that is the i-th in order */
    uint8_t order[GROUPS_MAX], turn[GROUPS_MAX];
};
static_assert(sizeof(struct shared_memory<4, 2>) <= 227 << 10 && sizeof(struct shared_memory<3, 4>) <= 227 << 10,
              "more than a block of a Hopper can have");
