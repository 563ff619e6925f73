/* Grouped products over ragged groups.
 *
 * The work is a flat list of tasks (group, chunk of rows, block of columns), known from the offsets alone; one task packs
 * its block of weights once, walks over the rows of its chunk, gathers them while packing, and collects in a block of
 * f32. A few rows (generation) are done as inner products straight from the weights.
 */
#include "kernels/cpu/isa/tiles.h"

#include "base/threads.h"
#include "kernels/cpu/fillers.h"

enum {
    DEPTH_BLOCK = 512,   /* k's packed at a time */
    COLUMN_BLOCK = 256,  /* columns of a task */
    CHUNK_ROWS = 768,    /* rows of a task: enough to repay packing the weights */
    PACK_ROWS = 96,      /* rows of A packed at a time; a multiple of every tile */
    FEW_ROWS = 6,        /* up to here packing the weights costs more than it saves */
    SUM_ROWS = 192,      /* backward_weight: rows of dw in a task */
};

enum form { FORWARD, BACKWARD_INPUT };

struct grouped {
    enum form form;
    struct tensor a, rows, w, c; /* the routed operand, its rows or none, weights, result [N, columns] */
    const int32_t *offsets;
    int64_t group_count, depth, columns, column_blocks, chunk_count;
    bool accumulate;
    int64_t *chunk_group, *chunk_first; /* [chunk_count] */
};

static const int32_t *index_data(struct tensor rows) {
    return tensor_exists(rows) ? rows.data : NULL;
}

/* Chunks of CHUNK_ROWS of each group that has rows. */
static void list_chunks(struct grouped *g) {
    int64_t most = g->group_count + g->offsets[g->group_count] / CHUNK_ROWS;
    g->chunk_group = slot_take(SLOT_F, (size_t)(2 * most + 2) * sizeof(int64_t));
    g->chunk_first = g->chunk_group + most + 1;
    g->chunk_count = 0;
    for (int64_t e = 0; e < g->group_count; e++)
        for (int64_t first = g->offsets[e]; first < g->offsets[e + 1]; first += CHUNK_ROWS) {
            g->chunk_group[g->chunk_count] = e;
            g->chunk_first[g->chunk_count++] = first;
        }
}

static struct operand weight_operand(const struct grouped *g, int64_t group, int64_t first_column) {
    size_t size = dtype_size(g->w.dtype);
    const char *w = (const char *)g->w.data + (size_t)(group * g->w.shape[1] * g->w.shape[2]) * size;
    struct operand o = {.data = w, .dtype = g->w.dtype, .stride = g->w.shape[2]};
    if (g->form == FORWARD) { /* element (o, i) is row o, column i */
        o.first_row = first_column;
    } else { /* element (i, o) is row o, column i */
        o.depth_in_rows = true;
        o.first_column = first_column;
    }
    return o;
}

static void store_block(const struct grouped *g, int64_t first, int64_t rows, int64_t column, int64_t columns,
                        const float *block) {
    for (int64_t r = 0; r < rows; r++, block += COLUMN_BLOCK) {
        int64_t at = (first + r) * g->columns + column;
        if (g->c.dtype == DTYPE_F32) {
            float *c = (float *)g->c.data + at;
            for (int64_t j = 0; j < columns; j++)
                c[j] = g->accumulate ? c[j] + block[j] : block[j];
        } else {
            uint16_t *c = (uint16_t *)g->c.data + at;
            for (int64_t j = 0; j < columns; j++)
                c[j] = round_bf16(g->accumulate ? load_bf16(c[j]) + block[j] : block[j]);
        }
    }
}

static void multiply_chunk(const struct grouped *g, int64_t group, int64_t first, int64_t rows, int64_t column,
                           int64_t columns, float *block) {
    struct operand a = {g->a.data, g->a.dtype, g->depth, index_data(g->rows), first, 0, false};
    struct operand w = weight_operand(g, group, column);
    bool pairs = packs_pairs(a.dtype);
    float *packed_a = slot_take(SLOT_A, panel_bytes(PACK_ROWS, TILE_ROWS, DEPTH_BLOCK));
    float *packed_w = slot_take(SLOT_B, panel_bytes(COLUMN_BLOCK, TILE_COLUMNS, DEPTH_BLOCK));
    for (int64_t k = 0; k < g->depth; k += DEPTH_BLOCK) {
        int64_t kc = smaller(DEPTH_BLOCK, g->depth - k);
        pack_panels(&w, 0, columns, TILE_COLUMNS, k, kc, packed_w);
        for (int64_t r = 0; r < rows; r += PACK_ROWS) {
            int64_t here = smaller(PACK_ROWS, rows - r);
            pack_panels(&a, r, here, TILE_ROWS, k, kc, packed_a);
            multiply_panels(here, columns, kc, pairs, packed_a, packed_w, block + r * COLUMN_BLOCK, COLUMN_BLOCK, k > 0);
        }
    }
}

static float dot(const float *x, const float *y, int64_t count) {
    vfloat sum0 = {0}, sum1 = {0};
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        sum0 += vload(x + i) * vload(y + i);
        sum1 += vload(x + i + LANES) * vload(y + i + LANES);
    }
    float sum = vsum(sum0 + sum1);
    for (; i < count; i++)
        sum += x[i] * y[i];
    return sum;
}

/* Forward of a few rows: each weight row is read once, as it lies. */
static void multiply_few(const struct grouped *g, int64_t group, int64_t first, int64_t rows, int64_t column,
                         int64_t columns, float *block) {
    const int32_t *index = index_data(g->rows);
    float *x = slot_take(SLOT_A, (size_t)(rows * g->depth) * sizeof *x);
    float *line = slot_take(SLOT_B, (size_t)g->depth * sizeof *line);
    struct tensor a = tensor_2d(g->a.data, g->a.dtype, g->a.shape[0], g->depth);
    struct tensor w = tensor_2d(g->w.data, g->w.dtype, g->w.shape[0] * g->w.shape[1], g->depth);
    for (int64_t r = 0; r < rows; r++) {
        const float *row = row_as_float(a, index ? index[first + r] : first + r, g->depth, x + r * g->depth);
        if (row != x + r * g->depth)
            memcpy(x + r * g->depth, row, (size_t)g->depth * sizeof *x);
    }
    for (int64_t j = 0; j < columns; j++) {
        const float *weights = row_as_float(w, group * g->w.shape[1] + column + j, g->depth, line);
        for (int64_t r = 0; r < rows; r++)
            block[r * COLUMN_BLOCK + j] = dot(x + r * g->depth, weights, g->depth);
    }
}

static void run_task(void *context, int64_t index) {
    const struct grouped *g = context;
    int64_t chunk = index / g->column_blocks, column = index % g->column_blocks * COLUMN_BLOCK;
    int64_t group = g->chunk_group[chunk], first = g->chunk_first[chunk];
    int64_t rows = smaller(CHUNK_ROWS, g->offsets[group + 1] - first), columns = smaller(COLUMN_BLOCK, g->columns - column);
    float *block = slot_take(SLOT_C, (size_t)(rows * COLUMN_BLOCK) * sizeof *block);
    if (g->depth == 0)
        memset(block, 0, (size_t)(rows * COLUMN_BLOCK) * sizeof *block);
    else if (g->form == FORWARD && rows <= FEW_ROWS)
        multiply_few(g, group, first, rows, column, columns, block);
    else
        multiply_chunk(g, group, first, rows, column, columns, block);
    store_block(g, first, rows, column, columns, block);
}

static void run_grouped(struct grouped *g) {
    g->column_blocks = (g->columns + COLUMN_BLOCK - 1) / COLUMN_BLOCK;
    list_chunks(g);
    parallel_for(g->chunk_count * g->column_blocks, run_task, g);
}

static void grouped_forward(struct tensor x, struct tensor rows, struct tensor offsets, struct tensor w,
                            struct tensor y) {
    if (is_f64(x)) {
        kernels_ref()->grouped_forward(x, rows, offsets, w, y);
        return;
    }
    CHECK(is_fast(x) && x.dtype == w.dtype && is_fast(y));
    CHECK_OP(x.shape[1], ==, w.shape[2]);
    CHECK_OP(y.shape[1], ==, w.shape[1]);
    struct grouped g = {.form = FORWARD, .a = x, .rows = rows, .w = w, .c = y, .offsets = offsets.data,
                        .group_count = w.shape[0], .depth = w.shape[2], .columns = w.shape[1]};
    CHECK_OP(y.shape[0], ==, g.offsets[g.group_count]);
    run_grouped(&g);
}

static void grouped_backward_input(struct tensor dy, struct tensor rows, struct tensor offsets, struct tensor w,
                                   struct tensor dx, bool accumulate) {
    if (is_f64(dy)) {
        kernels_ref()->grouped_backward_input(dy, rows, offsets, w, dx, accumulate);
        return;
    }
    CHECK(is_fast(dy) && dy.dtype == w.dtype && is_fast(dx));
    CHECK_OP(dy.shape[1], ==, w.shape[1]);
    CHECK_OP(dx.shape[1], ==, w.shape[2]);
    struct grouped g = {.form = BACKWARD_INPUT, .a = dy, .rows = rows, .w = w, .c = dx, .offsets = offsets.data,
                        .group_count = w.shape[0], .depth = w.shape[1], .columns = w.shape[2],
                        .accumulate = accumulate};
    CHECK_OP(dx.shape[0], ==, g.offsets[g.group_count]);
    run_grouped(&g);
}

/* ---- gradient of the weights ------------------------------------------------------------------------------------------ */

struct grouped_sum {
    struct tensor dy, dy_rows, x, x_rows, dw;
    const int32_t *offsets;
    int64_t row_blocks, column_blocks;
};

/* A block [SUM_ROWS, COLUMN_BLOCK] of one group's dw: all its rows, in order. */
static void run_sum_task(void *context, int64_t index) {
    const struct grouped_sum *g = context;
    int64_t out = g->dw.shape[1], in = g->dw.shape[2];
    int64_t group = index / (g->row_blocks * g->column_blocks), rest = index % (g->row_blocks * g->column_blocks);
    int64_t o = rest / g->column_blocks * SUM_ROWS, i = rest % g->column_blocks * COLUMN_BLOCK;
    int64_t m = smaller(SUM_ROWS, out - o), n = smaller(COLUMN_BLOCK, in - i);
    int64_t first = g->offsets[group], rows = g->offsets[group + 1] - first;
    struct operand dy = {g->dy.data, g->dy.dtype, out, index_data(g->dy_rows), first, o, true};
    struct operand x = {g->x.data, g->x.dtype, in, index_data(g->x_rows), first, i, true};
    float *packed_dy = slot_take(SLOT_A, panel_bytes(SUM_ROWS, TILE_ROWS, DEPTH_BLOCK));
    float *packed_x = slot_take(SLOT_B, panel_bytes(COLUMN_BLOCK, TILE_COLUMNS, DEPTH_BLOCK));
    float *dw = (float *)g->dw.data + (group * out + o) * in + i;
    for (int64_t k = 0; k < rows; k += DEPTH_BLOCK) {
        int64_t kc = smaller(DEPTH_BLOCK, rows - k);
        pack_panels(&dy, 0, m, TILE_ROWS, k, kc, packed_dy);
        pack_panels(&x, 0, n, TILE_COLUMNS, k, kc, packed_x);
        multiply_panels(m, n, kc, packs_pairs(dy.dtype), packed_dy, packed_x, dw, in, true);
    }
}

static void grouped_backward_weight(struct tensor dy, struct tensor dy_rows, struct tensor x, struct tensor x_rows,
                                    struct tensor offsets, struct tensor dw) {
    if (is_f64(dy)) {
        kernels_ref()->grouped_backward_weight(dy, dy_rows, x, x_rows, offsets, dw);
        return;
    }
    CHECK(is_fast(dy) && dy.dtype == x.dtype && dw.dtype == DTYPE_F32);
    CHECK_OP(dy.shape[1], ==, dw.shape[1]);
    CHECK_OP(x.shape[1], ==, dw.shape[2]);
    struct grouped_sum g = {dy, dy_rows, x, x_rows, dw, offsets.data, (dw.shape[1] + SUM_ROWS - 1) / SUM_ROWS,
                            (dw.shape[2] + COLUMN_BLOCK - 1) / COLUMN_BLOCK};
    parallel_for(dw.shape[0] * g.row_blocks * g.column_blocks, run_sum_task, &g);
}

void ISA_NAME(grouped_fill)(struct kernel_ops *ops) {
    ops->grouped_forward = grouped_forward;
    ops->grouped_backward_input = grouped_backward_input;
    ops->grouped_backward_weight = grouped_backward_weight;
}
