/* Grouped products over ragged groups: one flat list of tasks over all experts.
 *
 * Invariants
 *  1. A number of the result is the work of one task, which sums over k in order: nothing depends on the threads.
 *  2. Tasks are cut by the shapes and the offsets alone.
 *  3. A task is (expert, rows, columns). It packs its share of the weights once for all its rows, block by block of k,
 *     and its rows once for all its columns, so both are kept large: ROWS_MAX rows, COLUMNS_MAX columns.
 *  4. A packed block of B and one of A fit the second cache together (1 MiB).
 *  5. An expert with few rows does not repay packing: its products run on the weights as they lie (dot.h), forward
 * only.
 */
#include "base/threads.h"
#include "kernels/cpu/fillers.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa/dot.h"
#include "kernels/cpu/isa/outer.h"
#include "kernels/cpu/isa/panel.h"
#include "kernels/cpu/scratch.h"

enum {
    K_WORDS_MAX = 512, /* of a packed block */
    ROWS_MAX = 384,    /* of a task */
    BLOCK_ROWS = 96,   /* packed at a time, a multiple of TILE_ROWS */
    COLUMNS_MAX = 256, /* of a task */
    COLUMNS_MIN = 64,  /* where there would be too few tasks */
    TASKS_WANTED = 64,
    DOT_GROUP_ROWS_MAX = 16, /* experts with at most as many rows go unpacked */
};

struct task {
    int64_t expert, row, row_end, column, column_end;
};

/* ---- checks ---- */

static bool is_float(struct tensor t) {
    return t.dtype == DTYPE_F32 || t.dtype == DTYPE_BF16;
}

static bool is_2d(struct tensor t, int64_t d0, int64_t d1) {
    return t.shape[0] == d0 && t.shape[1] == d1 && t.shape[2] == 1 && t.shape[3] == 1;
}

/* Returns N, the number of routed rows. */
static int64_t check_offsets(struct tensor offsets, int64_t expert_count) {
    const int32_t *offset = offsets.data;
    CHECK(offsets.dtype == DTYPE_I32);
    CHECK_OP(tensor_elements(offsets), ==, expert_count + 1);
    CHECK_OP(offset[0], ==, 0);
    for (int64_t e = 0; e < expert_count; e++)
        CHECK_OP(offset[e], <=, offset[e + 1]);
    return offset[expert_count];
}

/* Every routed row has a row of `operand`, [any, columns]. */
static void check_operand(struct tensor operand, int64_t columns, struct tensor rows, int64_t row_count) {
    CHECK(is_float(operand) && is_2d(operand, operand.shape[0], columns));
    if (!tensor_exists(rows)) {
        CHECK_OP(operand.shape[0], >=, row_count);
        return;
    }
    const int32_t *row = rows.data;
    CHECK(rows.dtype == DTYPE_I32);
    CHECK_OP(tensor_elements(rows), ==, row_count);
    for (int64_t r = 0; r < row_count; r++)
        CHECK(row[r] >= 0 && row[r] < operand.shape[0]);
}

/* ---- forward and backward_input: rows times the weights of their expert ---- */

struct rows_job {
    struct matrix x, w; /* w: all experts below each other */
    enum lanes w_lanes; /* the side of w that becomes columns of y */
    int64_t w_rows;     /* of one expert */
    int64_t k;          /* summed over */
    struct tensor y;
    bool accumulate;
    const struct task *tasks;
};

static struct matrix expert_weights(const struct rows_job *job, int64_t expert) {
    struct matrix w = job->w;
    w.data += expert * job->w_rows * w.columns * w.element_bytes;
    return w;
}

static char *y_at(const struct rows_job *job, int64_t row, int64_t column) {
    return (char *)job->y.data + (row * job->y.shape[1] + column) * (int64_t)dtype_size(job->y.dtype);
}

/* y rows = or += c, rounded once. */
static void store_bf16(const struct rows_job *job, const float *c, int64_t row, int64_t rows, int64_t column,
                       int64_t columns, int64_t c_stride) {
    for (int64_t i = 0; i < rows; i++, c += c_stride) {
        uint16_t *y = (uint16_t *)y_at(job, row + i, column);
        int64_t j = 0;
        for (; j + VECTOR_LANES <= columns; j += VECTOR_LANES) {
            vector_f32 value = vector_load(c + j);
            vector_store_bf16(y + j, job->accumulate ? value + vector_load_bf16(y + j) : value);
        }
        for (; j < columns; j++)
            y[j] = float_to_bf16(job->accumulate ? c[j] + bf16_to_float(y[j]) : c[j]);
    }
}

/* What a task has in its scratch: packed A, packed B and, for y in bf16, sums of f32. */
struct rows_scratch {
    float *a, *b, *c;
    int64_t c_stride;
};

static struct rows_scratch rows_scratch_take(const struct rows_job *job, const struct task *task, int64_t k_block) {
    int64_t words = words_of(&job->x, k_block), columns = task->column_end - task->column;
    int64_t a_floats = block_floats(BLOCK_ROWS, words, TILE_ROWS);
    int64_t b_floats = block_floats(columns, words, TILE_COLUMNS);
    int64_t c_floats = job->y.dtype == DTYPE_BF16 ? (task->row_end - task->row) * columns : 0;
    float *memory = scratch_task(sizeof(float) * (size_t)(a_floats + b_floats + c_floats));
    return (struct rows_scratch){memory + b_floats, memory, memory + b_floats + a_floats, columns};
}

/* One block of k for all rows of the task. */
static void rows_task_block(const struct rows_job *job, const struct task *task, struct rows_scratch *scratch,
                            int64_t k, int64_t count) {
    struct matrix w = expert_weights(job, task->expert);
    int64_t columns = task->column_end - task->column, words = words_of(&w, count);
    bool in_y = job->y.dtype == DTYPE_F32, last = k + count == job->k;
    pack_b(job->w_lanes, &w, task->column, columns, k, count, scratch->b);
    for (int64_t row = task->row; row < task->row_end; row += BLOCK_ROWS) {
        int64_t rows = at_most(task->row_end - row, BLOCK_ROWS);
        float *sums = scratch->c + (last && k == 0 ? 0 : (row - task->row) * scratch->c_stride);
        pack_a(LANES_ARE_ROWS, &job->x, row, rows, k, count, scratch->a);
        block_multiply(word_elements(&w) == 2, scratch->a, scratch->b, words,
                       in_y ? (float *)y_at(job, row, task->column) : sums, in_y ? job->y.shape[1] : scratch->c_stride,
                       rows, columns, k > 0 || (in_y && job->accumulate));
        if (!in_y && last)
            store_bf16(job, sums, row, rows, task->column, columns, scratch->c_stride);
    }
}

static void rows_task(void *context, int64_t index) {
    const struct rows_job *job = context;
    const struct task *task = &job->tasks[index];
    if (job->w_lanes == LANES_ARE_ROWS && task->row_end - task->row <= DOT_GROUP_ROWS_MAX) {
        struct matrix w = expert_weights(job, task->expert);
        struct dot_result y = {job->y.data, job->y.shape[1], job->y.dtype, job->accumulate};
        dot_block(&job->x, task->row, task->row_end, &w, task->column, task->column_end, &y);
        return;
    }
    int64_t k_block = part_size(job->k, K_WORDS_MAX * word_elements(&job->x), 2 * VECTOR_LANES);
    struct rows_scratch scratch = rows_scratch_take(job, task, k_block);
    for (int64_t k = 0; k < job->k; k += k_block)
        rows_task_block(job, task, &scratch, k, at_most(job->k - k, k_block));
}

/* Lists the tasks, or with tasks == NULL only counts them. */
static int64_t list_rows_tasks(const int32_t *offset, int64_t expert_count, int64_t columns, int64_t task_columns,
                               struct task *tasks) {
    int64_t count = 0;
    for (int64_t e = 0; e < expert_count; e++) {
        int64_t rows = part_size(offset[e + 1] - offset[e], ROWS_MAX, TILE_ROWS);
        for (int64_t row = offset[e]; row < offset[e + 1]; row += rows)
            for (int64_t column = 0; column < columns; column += task_columns, count++)
                if (tasks)
                    tasks[count] = (struct task){e, row, at_most(row + rows, offset[e + 1]), column,
                                                 at_most(column + task_columns, columns)};
    }
    return count;
}

/* Columns of a task: COLUMNS_MAX, or fewer where that gives too few tasks. */
static int64_t choose_columns(const int32_t *offset, int64_t expert_count, int64_t columns) {
    int64_t limit = COLUMNS_MAX;
    while (limit > COLUMNS_MIN && list_rows_tasks(offset, expert_count, columns, limit, NULL) < TASKS_WANTED)
        limit /= 2;
    return part_size(columns, limit, TILE_COLUMNS);
}

static void clear_rows(struct tensor y) {
    memset(y.data, 0, tensor_bytes(y));
}

static void multiply_rows(struct rows_job *job, struct tensor offsets, int64_t expert_count) {
    int64_t columns = job->y.shape[1];
    if (tensor_elements(job->y) == 0)
        return;
    if (job->k == 0) {
        if (!job->accumulate)
            clear_rows(job->y);
        return;
    }
    int64_t task_columns = choose_columns(offsets.data, expert_count, columns);
    int64_t count = list_rows_tasks(offsets.data, expert_count, columns, task_columns, NULL);
    struct task *tasks = scratch_call((size_t)count * sizeof *tasks);
    list_rows_tasks(offsets.data, expert_count, columns, task_columns, tasks);
    job->tasks = tasks;
    parallel_for(count, rows_task, job);
}

static void check_rows_call(struct tensor x, int64_t in, struct tensor rows, struct tensor offsets, struct tensor w,
                            struct tensor y, int64_t out) {
    CHECK_OP(w.shape[3], ==, 1);
    CHECK(w.dtype == x.dtype && (y.dtype == x.dtype || y.dtype == DTYPE_F32));
    int64_t row_count = check_offsets(offsets, w.shape[0]);
    check_operand(x, in, rows, row_count);
    CHECK(is_2d(y, row_count, out));
}

static void grouped_forward(struct tensor x, struct tensor rows, struct tensor offsets, struct tensor w,
                            struct tensor y) {
    if (x.dtype == DTYPE_F64 || w.dtype == DTYPE_F64 || y.dtype == DTYPE_F64) {
        kernels_ref()->grouped_forward(x, rows, offsets, w, y);
        return;
    }
    int64_t out = w.shape[1], in = w.shape[2];
    check_rows_call(x, in, rows, offsets, w, y, out);
    struct rows_job job = {.x = matrix_of(x, in, rows),
                           .w = matrix_of(w, in, tensor_none()),
                           .w_lanes = LANES_ARE_ROWS,
                           .w_rows = out,
                           .k = in,
                           .y = y};
    multiply_rows(&job, offsets, w.shape[0]);
}

static void grouped_backward_input(struct tensor dy, struct tensor rows, struct tensor offsets, struct tensor w,
                                   struct tensor dx, bool accumulate) {
    if (dy.dtype == DTYPE_F64 || w.dtype == DTYPE_F64 || dx.dtype == DTYPE_F64) {
        kernels_ref()->grouped_backward_input(dy, rows, offsets, w, dx, accumulate);
        return;
    }
    int64_t out = w.shape[1], in = w.shape[2];
    check_rows_call(dy, out, rows, offsets, w, dx, in);
    struct rows_job job = {.x = matrix_of(dy, out, rows),
                           .w = matrix_of(w, in, tensor_none()),
                           .w_lanes = LANES_ARE_COLUMNS,
                           .w_rows = out,
                           .k = out,
                           .y = dx,
                           .accumulate = accumulate};
    multiply_rows(&job, offsets, w.shape[0]);
}

/* ---- backward_weight: the rows of an expert are what is summed over ---- */

struct weight_job {
    struct matrix dy, x;
    struct tensor dw;
    const int32_t *offset;
    int64_t task_rows, task_columns; /* of one expert's dw */
    int64_t row_tasks, column_tasks;
};

/* One expert's part of dw, block by block of routed rows. */
static void weight_task(void *context, int64_t index) {
    const struct weight_job *job = context;
    int64_t out = job->dw.shape[1], in = job->dw.shape[2], tasks = job->row_tasks * job->column_tasks;
    int64_t expert = index / tasks, row = index % tasks / job->column_tasks * job->task_rows;
    int64_t column = index % job->column_tasks * job->task_columns;
    int64_t rows = at_most(out - row, job->task_rows), columns = at_most(in - column, job->task_columns);
    outer_block(&job->dy, &job->x, job->offset[expert], job->offset[expert + 1], row, rows, column, columns,
                (float *)job->dw.data + (expert * out + row) * in + column, in, true);
}

static void grouped_backward_weight(struct tensor dy, struct tensor dy_rows, struct tensor x, struct tensor x_rows,
                                    struct tensor offsets, struct tensor dw) {
    if (dy.dtype == DTYPE_F64 || x.dtype == DTYPE_F64 || dw.dtype == DTYPE_F64) {
        kernels_ref()->grouped_backward_weight(dy, dy_rows, x, x_rows, offsets, dw);
        return;
    }
    int64_t out = dw.shape[1], in = dw.shape[2];
    CHECK(dw.dtype == DTYPE_F32 && dy.dtype == x.dtype);
    CHECK_OP(dw.shape[3], ==, 1);
    int64_t row_count = check_offsets(offsets, dw.shape[0]);
    check_operand(dy, out, dy_rows, row_count);
    check_operand(x, in, x_rows, row_count);
    if (tensor_elements(dw) == 0)
        return;
    struct weight_job job = {.dy = matrix_of(dy, out, dy_rows),
                             .x = matrix_of(x, in, x_rows),
                             .dw = dw,
                             .offset = offsets.data,
                             .task_rows = part_size(out, OUTER_SIDE_MAX, TILE_ROWS),
                             .task_columns = part_size(in, OUTER_SIDE_MAX, TILE_COLUMNS)};
    job.row_tasks = divide_up(out, job.task_rows);
    job.column_tasks = divide_up(in, job.task_columns);
    parallel_for(dw.shape[0] * job.row_tasks * job.column_tasks, weight_task, &job);
}

void ISA_NAME(grouped_fill)(struct kernel_ops *ops) {
    ops->grouped_forward = grouped_forward;
    ops->grouped_backward_input = grouped_backward_input;
    ops->grouped_backward_weight = grouped_backward_weight;
}
