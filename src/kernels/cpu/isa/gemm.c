/* Dense products. Two forms are ours, everything else is oneDNN's:
 *  - a few rows with weights in their natural layout (decoding), where oneDNN would pack the weights for every call;
 *  - gradients of weights, A^T B: tiles of A and B are parts of wider matrices, which oneDNN's fast product does not
 * take.
 */
#include "base/threads.h"
#include "kernels/cpu/fillers.h"
#include "kernels/cpu/gemm_onednn.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa/dot.h"
#include "kernels/cpu/isa/outer.h"

enum { DOT_TASK_BYTES = 1 << 16 }; /* of weights: a few microseconds */

static bool is_float_2d(struct tensor t) {
    return (t.dtype == DTYPE_F32 || t.dtype == DTYPE_BF16) && t.shape[2] == 1 && t.shape[3] == 1;
}

struct dot_job {
    struct matrix x, w;
    int64_t row_count, column_count, task_columns;
    struct dot_result y;
};

static void dot_task(void *context, int64_t index) {
    const struct dot_job *job = context;
    int64_t first = index * job->task_columns, end = first + job->task_columns;
    dot_block(&job->x, 0, job->row_count, &job->w, first, end < job->column_count ? end : job->column_count, &job->y);
}

static void gemm_few_rows(struct tensor a, struct tensor b, struct tensor c, bool accumulate) {
    struct dot_job job = {
        .x = matrix_of(a, a.shape[1], tensor_none()),
        .w = matrix_of(b, b.shape[1], tensor_none()),
        .row_count = a.shape[0],
        .column_count = b.shape[0],
        .y = {c.data, c.shape[1], c.dtype, accumulate},
    };
    int64_t row_bytes = b.shape[1] * (int64_t)dtype_size(b.dtype);
    int64_t vectors = DOT_TASK_BYTES / (row_bytes * VECTOR_LANES + 1) + 1;
    job.task_columns = vectors * VECTOR_LANES;
    parallel_for(divide_up(job.column_count, job.task_columns), dot_task, &job);
}

struct outer_job {
    struct matrix a, b;
    struct tensor c;
    int64_t k, task_rows, task_columns, column_tasks;
    bool accumulate;
};

static void outer_task(void *context, int64_t index) {
    const struct outer_job *job = context;
    int64_t row = index / job->column_tasks * job->task_rows, rows = at_most(job->c.shape[0] - row, job->task_rows);
    int64_t column = index % job->column_tasks * job->task_columns;
    int64_t columns = at_most(job->c.shape[1] - column, job->task_columns);
    float *c = (float *)job->c.data + row * job->c.shape[1] + column;
    outer_block(&job->a, &job->b, 0, job->k, row, rows, column, columns, c, job->c.shape[1], job->accumulate);
}

static void gemm_outer(struct tensor a, struct tensor b, struct tensor c, bool accumulate) {
    struct outer_job job = {
        .a = matrix_of(a, a.shape[1], tensor_none()),
        .b = matrix_of(b, b.shape[1], tensor_none()),
        .c = c,
        .k = a.shape[0],
        .task_rows = part_size(c.shape[0], OUTER_SIDE_MAX, TILE_ROWS),
        .task_columns = part_size(c.shape[1], OUTER_SIDE_MAX, TILE_COLUMNS),
        .accumulate = accumulate,
    };
    job.column_tasks = divide_up(c.shape[1], job.task_columns);
    parallel_for(divide_up(c.shape[0], job.task_rows) * job.column_tasks, outer_task, &job);
}

static void gemm(struct tensor a, bool transpose_a, struct tensor b, bool transpose_b, struct tensor c,
                 bool accumulate) {
    if (a.dtype == DTYPE_F64 || b.dtype == DTYPE_F64 || c.dtype == DTYPE_F64) {
        kernels_ref()->gemm(a, transpose_a, b, transpose_b, c, accumulate);
        return;
    }
    CHECK(is_float_2d(a) && is_float_2d(b) && is_float_2d(c));
    CHECK(a.dtype == b.dtype && (c.dtype == a.dtype || c.dtype == DTYPE_F32));
    CHECK_OP(b.shape[transpose_b], ==, a.shape[!transpose_a]);
    CHECK_OP(c.shape[0], ==, a.shape[transpose_a]);
    CHECK_OP(c.shape[1], ==, b.shape[!transpose_b]);
    bool empty = tensor_elements(a) == 0 || tensor_elements(b) == 0;
    if (!empty && !transpose_a && transpose_b && c.shape[0] <= DOT_ROWS_MAX)
        gemm_few_rows(a, b, c, accumulate);
    else if (!empty && transpose_a && !transpose_b && c.dtype == DTYPE_F32)
        gemm_outer(a, b, c, accumulate);
    else
        gemm_onednn(a, transpose_a, b, transpose_b, c, accumulate);
}

void ISA_NAME(gemm_fill)(struct kernel_ops *ops) {
    ops->gemm = gemm;
}
