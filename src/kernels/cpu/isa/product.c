/* Products: dense, and grouped over ragged groups as one flat list of tasks over all experts.
 *
 * Weights are packed once an optimizer step into panels (panel.h), in the arrangement of forward, lanes along `out`, and
 * of backward, lanes along `in`: [group][panel][k word][TILE_COLUMNS].
 *
 * Invariants
 *  1. A number of the result is the work of one task, which sums over k in order: nothing depends on the threads.
 *  2. Tasks are cut by the shapes and the offsets alone.
 *  3. A task is (expert, rows, columns). It packs its rows once for all its columns, block by block of k, gathering
 *     them on the way. The block of rows stays in the second cache while panels of weights pass by. What it packs or
 *     meets next, and what the next task begins with, is asked for meanwhile (ahead.h).
 */
#include "base/threads.h"
#include "kernels/cpu/fillers.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/isa/tile.h"
#include "kernels/cpu/isa/weights.h"

#include <math.h>

enum {
    K_WORDS_MAX = 512,       /* of a packed block */
    ROWS_MAX = 256,          /* of a task */
    ROWS_MIN = 64,           /* where there would be too few tasks */
    UNIT_ROWS = 96,          /* packed at a time: whole panels of every copy, whole tiles of AMX */
    ASKING_ROWS = 13,        /* fewer do not multiply for long enough to hide that panels come from far, */
    ASKING_WORDS = 32,       /* nor do fewer words of k that operands of the next task do */
    BLOCK_COLUMNS = 128,     /* that all rows meet before the next ones: their weights stay in the second cache */
    TASK_COLUMNS_MAX = 1024, /* of a task */
    THREAD_TASKS = 8, /* wanted for every thread: enough to even out */
    SIDE_MAX = 512,   /* rows and columns of a task that packs both operands */
    SIDE_MIN = 128,
    STREAM_ROWS = 64, /* of a group, at least, for its gradient to go past the caches */
    PACK_COST = 40, /* packing a number for a task costs as much as so many multiplications */
    STACK_ROWS = 48, /* the same where sums must be rounded, and stand on the stack before: */
    STACK_COLUMNS = 64, /* multiples of every copy's tile */
};

/* ---- checks ---- */

static bool is_float(struct tensor t) {
    return t.dtype == DTYPE_F32 || t.dtype == DTYPE_BF16;
}

static bool is_2d(struct tensor t, int64_t d0, int64_t d1) {
    return t.shape[0] == d0 && t.shape[1] == d1 && t.shape[2] == 1 && t.shape[3] == 1;
}

static void check_offsets(struct tensor offsets, int64_t group_count, int64_t row_count) {
    if (!tensor_exists(offsets)) {
        CHECK_OP(group_count, ==, 1);
        return;
    }
    const int32_t *offset = offsets.data;
    CHECK(offsets.dtype == DTYPE_I32);
    CHECK_OP(tensor_elements(offsets), ==, group_count + 1);
    CHECK_OP(offset[0], ==, 0);
    for (int64_t e = 0; e < group_count; e++)
        CHECK_OP(offset[e], <=, offset[e + 1]);
    CHECK_OP(offset[group_count], ==, row_count);
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

/* First routed row of group e. */
static int64_t group_begin(struct tensor offsets, int64_t e, int64_t row_count) {
    return tensor_exists(offsets) ? ((const int32_t *)offsets.data)[e] : e * row_count;
}

/* ---- packed weights ---- */

static size_t packed_bytes(struct packed w) {
    if (w.dtype == DTYPE_F64)
        return kernels_ref()->packed_bytes(w);
    return sizeof(float) * (size_t)(w.groups * (forward_floats(&w) + backward_floats(&w)));
}

static void run_pack_task(void *context, int64_t index) {
    pack_task(context, index);
}

static void pack_weights(struct tensor source, struct packed to) {
    if (to.dtype == DTYPE_F64 || source.dtype == DTYPE_F64) {
        CHECK(to.dtype == DTYPE_F64);
        kernels_ref()->pack(source, to);
        return;
    }
    CHECK(is_float(source));
    struct pack_job job = pack_job_of(source, to);
    parallel_for(to.groups * job.row_tasks, run_pack_task, &job);
}

/* ---- rows times packed weights ---- */

struct task {
    int64_t expert, row, row_end, column, column_end;
};

struct rows_job {
    struct matrix x;
    const float *panels; /* of group 0 */
    int64_t group_floats, panel_floats;
    int64_t k, k_block; /* summed over; at a time */
    struct tensor y;
    bool accumulate;
    const struct task *tasks;
    int64_t task_count;
    int thread_count;
};

static char *y_at(const struct rows_job *job, int64_t row, int64_t column) {
    return (char *)job->y.data + (row * job->y.shape[1] + column) * (int64_t)dtype_size(job->y.dtype);
}

static const float *panel_at(const struct rows_job *job, int64_t expert, int64_t k, int64_t column) {
    return job->panels + expert * job->group_floats + column / TILE_COLUMNS * job->panel_floats +
           k / word_elements(&job->x) * TILE_COLUMNS;
}

/* Scratch of a task: its packed rows and, for y in bf16 where k comes in several pieces, sums of f32. */
struct rows_scratch {
    float *a, *c;
    int64_t c_stride;
};

static struct rows_scratch rows_scratch_take(const struct rows_job *job, const struct task *task) {
    int64_t rows = task->row_end - task->row, columns = task->column_end - task->column;
    int64_t a_floats = divide_up(block_floats(rows, words_of(&job->x, job->k_block), A_LANES), VECTOR_LANES) * VECTOR_LANES;
    int64_t c_floats = job->y.dtype == DTYPE_BF16 && job->k_block < job->k ? rows * columns : 0;
    float *memory = scratch_task(sizeof(float) * (size_t)(a_floats + c_floats));
    return (struct rows_scratch){memory, memory + a_floats, columns};
}

/* A part of a task: `count` of k; rows and columns, of which the rows count from the task's first one. */
struct step {
    int64_t k, count, row, rows, column, columns;
};

/* What a step asks for. */
struct rows_ahead {
    struct matrix panels;
    struct ahead of_panels, all;
};

/* The panels that rows first..end-1 of `rows` are to ask for, of those that columns from `column` on meet: a share. */
static void panels_ahead(const struct rows_job *job, const struct task *task, int64_t k, int64_t count, int64_t column,
                         int64_t first, int64_t end, int64_t rows, struct rows_ahead *ahead) {
    int64_t panels = divide_up(at_most(task->column_end - column, BLOCK_COLUMNS), TILE_COLUMNS);
    if (rows < ASKING_ROWS)
        return;
    ahead->panels = (struct matrix){(const char *)panel_at(job, task->expert, k, column), job->panel_floats, sizeof(float), NULL};
    ahead->of_panels = ahead_of(&ahead->panels, first * panels / rows, end * panels / rows, 0,
                                words_of(&job->x, count) * TILE_COLUMNS);
}

/* Rows are packed in units while the first columns are multiplied; behind the last columns come the next block of k, and then
 * the task that this thread is likely to get. */
static void step_ahead(const struct rows_job *job, int64_t index, const struct step *s, struct rows_ahead *ahead) {
    const struct task *task = &job->tasks[index], *after = NULL;
    int64_t rows = task->row_end - task->row, end = s->row + s->rows, column = s->column + s->columns;
    int64_t k = s->k + s->count < job->k ? s->k + s->count : 0, count = at_most(job->k - k, job->k_block);
    struct ahead of_rows = {0};
    if (k > 0)
        after = task;
    else if (index + job->thread_count < job->task_count)
        after = task + job->thread_count;
    *ahead = (struct rows_ahead){0};
    if (end < rows)
        of_rows = ahead_of(&job->x, task->row + end, task->row + at_most(end + UNIT_ROWS, rows), s->k, s->count);
    else if (column == task->column_end && after)
        of_rows = ahead_of(&job->x, after->row, at_most(after->row + UNIT_ROWS, after->row_end), k, count);
    if (column < task->column_end)
        panels_ahead(job, task, s->k, s->count, column, s->row, end, rows, ahead);
    else if (end == rows && after)
        panels_ahead(job, after, k, count, after->column, 0, rows, rows, ahead);
    ahead->all = ahead_then(of_rows, &ahead->of_panels);
    ahead_spread(&ahead->all, tile_count(s->rows, s->columns), words_of(&job->x, s->count));
}

static void step_multiply(const struct rows_job *job, const struct task *task, const struct rows_scratch *scratch,
                          const struct step *s, struct ahead *ahead) {
    const bool pairs = word_elements(&job->x) == 2, first = s->k == 0, last = s->k + s->count == job->k;
    const float *panel = panel_at(job, task->expert, s->k, s->column);
    int64_t words = words_of(&job->x, s->count);
    const float *a = scratch->a + a_lane_floats(pairs, words, s->row);
    struct target y = {y_at(job, task->row + s->row, s->column), job->y.shape[1], s->rows, s->columns, job->accumulate};
    if (job->y.dtype == DTYPE_F32) {
        y.add |= !first;
        block_multiply_ahead(pairs, a, panel, job->panel_floats, words, y, ahead);
        return;
    }
    if (first && last) {
        block_multiply_rounded(pairs, a, panel, job->panel_floats, words, y, ahead);
        return;
    }
    float *sums = scratch->c + s->row * scratch->c_stride + s->column - task->column;
    struct target c = {sums, scratch->c_stride, s->rows, s->columns, !first};
    block_multiply_ahead(pairs, a, panel, job->panel_floats, words, c, ahead);
    for (int64_t i = 0; last && i < s->rows; i++)
        round_row(sums + i * c.stride, (uint16_t *)y.c + i * y.stride, s->columns, y.add);
}

static void rows_task(void *context, int64_t index) {
    const struct rows_job *job = context;
    const struct task *task = &job->tasks[index];
    const bool pairs = word_elements(&job->x) == 2;
    struct rows_scratch scratch = rows_scratch_take(job, task);
    struct step s;
    for (s.k = 0; s.k < job->k; s.k += s.count) {
        s.count = at_most(job->k - s.k, job->k_block);
        for (s.column = task->column; s.column < task->column_end; s.column += s.columns) {
            int64_t rows = task->row_end - task->row, unit = s.column == task->column ? UNIT_ROWS : rows;
            s.columns = at_most(task->column_end - s.column, BLOCK_COLUMNS);
            for (s.row = 0; s.row < rows; s.row += s.rows) {
                struct rows_ahead ahead;
                s.rows = at_most(rows - s.row, unit);
                step_ahead(job, index, &s, &ahead);
                if (s.column == task->column)
                    pack_a(LANES_ARE_ROWS, &job->x, task->row + s.row, s.rows, s.k, s.count,
                           scratch.a + a_lane_floats(pairs, words_of(&job->x, s.count), s.row));
                step_multiply(job, task, &scratch, &s, &ahead.all);
            }
        }
    }
}

/* How large tasks are. */
struct cut {
    int64_t rows, columns;
};

/* Lists the tasks, or with tasks == NULL only counts them. */
static int64_t list_tasks(struct tensor offsets, int64_t group_count, struct tensor y, struct cut cut,
                          struct task *tasks) {
    int64_t count = 0, columns = y.shape[1];
    for (int64_t e = 0; e < group_count; e++) {
        int64_t row = group_begin(offsets, e, y.shape[0]), end = group_begin(offsets, e + 1, y.shape[0]);
        int64_t rows = part_size(end - row, cut.rows, TILE_ROWS);
        for (; row < end; row += rows)
            for (int64_t column = 0; column < columns; column += cut.columns, count++)
                if (tasks)
                    tasks[count] = (struct task){e, row, at_most(row + rows, end), column,
                                                 at_most(column + cut.columns, columns)};
    }
    return count;
}

/* Large tasks, or smaller ones where there would be too few: first fewer columns, then fewer rows. It may ask for the
 * number of threads: a number of the result is the same however the rest is cut. */
static struct cut choose_cut(struct tensor offsets, int64_t group_count, struct tensor y) {
    int64_t limit = TASK_COLUMNS_MAX, rows = ROWS_MAX, columns = y.shape[1];
    struct cut cut = {rows, part_size(columns, limit, TILE_COLUMNS)};
    int64_t wanted = (int64_t)THREAD_TASKS * threads_count();
    while (list_tasks(offsets, group_count, y, cut, NULL) < wanted && (limit > BLOCK_COLUMNS || rows > ROWS_MIN)) {
        if (limit > BLOCK_COLUMNS)
            limit /= 2;
        else
            rows /= 2;
        cut = (struct cut){rows, part_size(columns, limit, TILE_COLUMNS)};
    }
    while (list_tasks(offsets, group_count, y, cut, NULL) < wanted / 4 && limit > TILE_COLUMNS) {
        limit /= 2;
        cut.columns = part_size(columns, limit, TILE_COLUMNS);
    }
    return cut;
}

static void multiply_rows(struct rows_job *job, struct tensor offsets, int64_t group_count) {
    if (tensor_elements(job->y) == 0)
        return;
    if (job->k == 0) {
        if (!job->accumulate)
            memset(job->y.data, 0, tensor_bytes(job->y));
        return;
    }
    struct cut cut = choose_cut(offsets, group_count, job->y);
    int64_t count = list_tasks(offsets, group_count, job->y, cut, NULL);
    struct task *tasks = scratch_call((size_t)count * sizeof *tasks);
    list_tasks(offsets, group_count, job->y, cut, tasks);
    job->tasks = tasks;
    job->task_count = count;
    job->thread_count = threads_count();
    job->k_block = part_size(job->k, K_WORDS_MAX * word_elements(&job->x), 2 * VECTOR_LANES);
    parallel_for(count, rows_task, job);
}

static void check_rows_call(struct tensor x, int64_t in, struct tensor rows, struct tensor offsets,
                            const struct packed *w, struct tensor y, int64_t out) {
    CHECK(w->data != NULL && w->dtype == x.dtype && (y.dtype == x.dtype || y.dtype == DTYPE_F32));
    check_offsets(offsets, w->groups, y.shape[0]);
    check_operand(x, in, rows, y.shape[0]);
    CHECK(is_2d(y, y.shape[0], out));
}

static void product_forward(struct tensor x, struct tensor rows, struct tensor offsets, struct packed w, struct tensor y,
                            bool accumulate) {
    if (w.dtype == DTYPE_F64) {
        kernels_ref()->product_forward(x, rows, offsets, w, y, accumulate);
        return;
    }
    check_rows_call(x, w.in, rows, offsets, &w, y, w.out);
    struct rows_job job = {.x = matrix_of(x, w.in, rows),
                           .panels = w.data,
                           .group_floats = forward_floats(&w),
                           .k = w.in,
                           .y = y,
                           .accumulate = accumulate};
    job.panel_floats = panel_floats(words_of(&job.x, w.in), TILE_COLUMNS);
    multiply_rows(&job, offsets, w.groups);
}

static void product_backward_input(struct tensor dy, struct tensor rows, struct tensor offsets, struct packed w,
                                   struct tensor dx, bool accumulate) {
    if (w.dtype == DTYPE_F64) {
        kernels_ref()->product_backward_input(dy, rows, offsets, w, dx, accumulate);
        return;
    }
    CHECK(w.backward);
    check_rows_call(dy, w.out, rows, offsets, &w, dx, w.in);
    struct rows_job job = {.x = matrix_of(dy, w.out, rows),
                           .panels = (float *)w.data + w.groups * forward_floats(&w),
                           .group_floats = backward_floats(&w),
                           .k = w.out,
                           .y = dx,
                           .accumulate = accumulate};
    job.panel_floats = panel_floats(words_of(&job.x, w.out), TILE_COLUMNS);
    multiply_rows(&job, offsets, w.groups);
}

/* ---- both operands new: gradients of weights, small products ---- */

struct operand {
    struct matrix matrix;
    enum lanes lanes; /* the side of the matrix that becomes rows (of A) or columns (of B) of the result */
};

/* A part of a product: rows and columns of the result, summed over k in first..end-1. */
struct part {
    int64_t row, rows, column, columns, first, end;
};

/* Lanes lane..lane+count-1 of k in first..end-1. */
static struct ahead operand_ahead(const struct operand *o, int64_t lane, int64_t count, int64_t first, int64_t end) {
    if (o->lanes == LANES_ARE_COLUMNS)
        return ahead_of(&o->matrix, first, end, lane, count);
    return ahead_of(&o->matrix, lane, lane + count, first, end - first);
}

struct both_scratch {
    float *a, *b;
    int64_t block; /* of k */
};

static struct both_scratch both_scratch_take(const struct operand *a, const struct part *p) {
    int64_t block = part_size(p->end - p->first, K_WORDS_MAX / 4 * word_elements(&a->matrix), 2 * VECTOR_LANES);
    int64_t words = words_of(&a->matrix, block), b_floats = block_floats(p->columns, words, TILE_COLUMNS);
    float *b = scratch_task(sizeof(float) * (size_t)(b_floats + block_floats(p->rows, words, A_LANES)));
    return (struct both_scratch){b + b_floats, b, block};
}

/* The packed operands of k..k+count-1 multiplied into c. The first block of `next` (NULL: none) is asked for by the last rows:
 * by the first ones it would be gone from the second cache when it is packed. */
static void multiply_block(const struct operand *a, const struct operand *b, const struct part *p,
                           const struct both_scratch *scratch, int64_t k, int64_t count, struct target c, bool past,
                           const struct part *next) {
    const bool pairs = word_elements(&a->matrix) == 2;
    int64_t words = words_of(&a->matrix, count), panel = panel_floats(words, TILE_COLUMNS);
    bool asks = next && words >= ASKING_WORDS && !(BF16_TILES && pairs);
    int64_t early = asks ? p->rows * (k + count < p->end ? 3 : 2) / 4 / UNIT_ROWS * UNIT_ROWS : p->rows;
    struct ahead of_a, ahead;
    struct target first = target_part(c, sizeof(float), 0, early, 0, p->columns);
    if (past)
        block_multiply_past(pairs, scratch->a, scratch->b, panel, words, first, NULL);
    else
        block_multiply_panels(pairs, scratch->a, scratch->b, panel, words, c.c, c.stride, early, p->columns, c.add);
    if (early == p->rows)
        return;
    int64_t end = at_most(next->end, next->first + scratch->block);
    of_a = operand_ahead(a, next->row, next->rows, next->first, end);
    ahead = ahead_then(operand_ahead(b, next->column, next->columns, next->first, end), &of_a);
    ahead_spread(&ahead, tile_count(p->rows - early, p->columns), words);
    (past ? block_multiply_past : block_multiply_ahead)(pairs, scratch->a + a_lane_floats(pairs, words, early), scratch->b, panel,
                                                        words, target_part(c, sizeof(float), early, p->rows - early, 0, p->columns),
                                                        &ahead);
}

/* c, at the part's first number, = or += the product of lanes of a and lanes of b; past the caches, where it is wanted, only what
 * is written in one go. next: what this thread is likely to do then, or NULL. */
static void multiply_both(const struct operand *a, const struct operand *b, const struct part *p, float *c, int64_t c_stride,
                          bool add, bool past, const struct part *next) {
    struct both_scratch scratch = both_scratch_take(a, p);
    past &= !add && scratch.block >= p->end - p->first;
    for (int64_t k = p->first; k < p->end; k += scratch.block) {
        int64_t count = at_most(p->end - k, scratch.block);
        struct part rest = *p;
        rest.first = k + count;
        pack_b(b->lanes, &b->matrix, p->column, p->columns, k, count, scratch.b);
        pack_a(a->lanes, &a->matrix, p->row, p->rows, k, count, scratch.a);
        multiply_block(a, b, p, &scratch, k, count, (struct target){c, c_stride, p->rows, p->columns, add || k > p->first}, past,
                       rest.first < p->end ? &rest : next);
    }
    if (past)
        vector_stream_end();
}

struct weight_job {
    struct operand dy, x;
    struct tensor dw, offsets;
    int64_t row_count, out, in;
    int64_t task_rows, task_columns; /* of one expert's dw */
    int64_t row_tasks, column_tasks, task_count;
    int thread_count;
    bool accumulate, past_caches;
};

/* Tasks that run at the same time have rows of dw of their own, as far as there are several: two threads that write beside each
 * other in the same rows fetch each other's lines ahead. */
static int64_t weight_part(const struct weight_job *job, int64_t index, struct part *part) {
    int64_t tasks = job->row_tasks * job->column_tasks, expert = index / tasks;
    int64_t row = index % job->row_tasks * job->task_rows, column = index % tasks / job->row_tasks * job->task_columns;
    *part = (struct part){row, at_most(job->out - row, job->task_rows),
                          column, at_most(job->in - column, job->task_columns),
                          group_begin(job->offsets, expert, job->row_count),
                          group_begin(job->offsets, expert + 1, job->row_count)};
    return expert;
}

/* One expert's part of dw, block by block of routed rows: the first one writes where nothing is added to. */
static void weight_task(void *context, int64_t index) {
    const struct weight_job *job = context;
    struct part part, next;
    int64_t expert = weight_part(job, index, &part);
    bool more = index + job->thread_count < job->task_count;
    if (more)
        weight_part(job, index + job->thread_count, &next);
    float *dw = (float *)job->dw.data + (expert * job->out + part.row) * job->in + part.column;
    if (part.first < part.end)
        multiply_both(&job->dy, &job->x, &part, dw, job->in, job->accumulate, job->past_caches, more ? &next : NULL);
    else if (!job->accumulate)
        for (int64_t i = 0; i < part.rows; i++)
            memset(dw + i * job->in, 0, (size_t)part.columns * sizeof *dw);
}

/* What one group's dw costs when it is cut into row_tasks x column_tasks, in multiplications per routed row and thread:
 * small tasks pack more than they must, large ones leave threads without work at the end. */
static double weight_tasks_cost(const struct weight_job *job, int64_t groups, int64_t row_tasks, int64_t column_tasks) {
    double rows = (double)divide_up(job->out, row_tasks), columns = (double)divide_up(job->in, column_tasks);
    double tasks = (double)(groups * row_tasks * column_tasks), rounds = tasks / threads_count();
    if (rounds < 4)
        rounds = ceil(rounds);
    return (rounds + 0.25) * (rows * columns + PACK_COST * (rows + columns));
}

/* May ask for the number of threads: a number of dw is the same however the rest is cut. Of two cuts that cost the same, the one
 * with more rows of tasks. */
static void cut_weight_tasks(struct weight_job *job, int64_t groups) {
    double least = INFINITY;
    for (int64_t c = divide_up(job->in, SIDE_MAX); c <= divide_up(job->in, SIDE_MIN); c++)
        for (int64_t r = divide_up(job->out, SIDE_MAX); r <= divide_up(job->out, SIDE_MIN); r++) {
            double cost = weight_tasks_cost(job, groups, r, c);
            if (cost >= least)
                continue;
            least = cost;
            job->task_rows = part_size(job->out, divide_up(job->out, r), TILE_ROWS);
            job->task_columns = part_size(job->in, divide_up(job->in, c), TILE_COLUMNS);
        }
    job->row_tasks = divide_up(job->out, job->task_rows);
    job->column_tasks = divide_up(job->in, job->task_columns);
}

/* A large gradient that is written goes past the caches, as long as there are rows enough to multiply meanwhile: it is read again
 * only by the optimizer. */
static bool goes_past_caches(struct tensor dw, enum dtype dtype, int64_t rows) {
    const int64_t vector_bytes = VECTOR_LANES * (int64_t)sizeof(float), columns = dw.shape[dw.dim_count - 1];
    return VECTOR_LANES == 16 && !(BF16_TILES && dtype == DTYPE_BF16) && tensor_elements(dw) >= STREAM_ELEMENTS &&
           rows >= STREAM_ROWS && (intptr_t)dw.data % vector_bytes == 0 && columns % VECTOR_LANES == 0;
}

static void product_backward_weight(struct tensor dy, struct tensor dy_rows, struct tensor x, struct tensor x_rows,
                                    struct tensor offsets, struct tensor dw, bool accumulate) {
    if (dw.dtype == DTYPE_F64) {
        kernels_ref()->product_backward_weight(dy, dy_rows, x, x_rows, offsets, dw, accumulate);
        return;
    }
    struct tensor groups = dw.dim_count < 3 ? tensor_3d(dw.data, dw.dtype, 1, dw.shape[0], dw.shape[1]) : dw;
    int64_t out = groups.shape[1], in = groups.shape[2];
    int64_t row_count = tensor_exists(offsets)   ? ((const int32_t *)offsets.data)[groups.shape[0]]
                        : tensor_exists(dy_rows) ? tensor_elements(dy_rows)
                                                 : dy.shape[0];
    CHECK(dw.dtype == DTYPE_F32 && dy.dtype == x.dtype);
    CHECK_OP(groups.shape[3], ==, 1);
    check_offsets(offsets, groups.shape[0], row_count);
    check_operand(dy, out, dy_rows, row_count);
    check_operand(x, in, x_rows, row_count);
    if (tensor_elements(dw) == 0)
        return;
    struct weight_job job = {.dy = {matrix_of(dy, out, dy_rows), LANES_ARE_COLUMNS},
                             .x = {matrix_of(x, in, x_rows), LANES_ARE_COLUMNS},
                             .dw = dw,
                             .offsets = offsets,
                             .row_count = row_count,
                             .out = out,
                             .in = in,
                             .accumulate = accumulate};
    job.past_caches = !accumulate && goes_past_caches(dw, dy.dtype, row_count / groups.shape[0]);
    cut_weight_tasks(&job, groups.shape[0]);
    job.task_count = groups.shape[0] * job.row_tasks * job.column_tasks;
    job.thread_count = threads_count();
    parallel_for(job.task_count, weight_task, &job);
}

struct gemm_job {
    struct operand a, b;
    struct tensor c;
    int64_t k, task_rows, task_columns, column_tasks;
    bool accumulate;
};

static void gemm_task(void *context, int64_t index) {
    const struct gemm_job *job = context;
    int64_t row = index / job->column_tasks * job->task_rows, column = index % job->column_tasks * job->task_columns;
    int64_t stride = job->c.shape[1];
    struct part part = {row, at_most(job->c.shape[0] - row, job->task_rows), column, at_most(stride - column, job->task_columns),
                        0, job->k};
    if (job->c.dtype == DTYPE_F32) {
        multiply_both(&job->a, &job->b, &part, (float *)job->c.data + row * stride + column, stride, job->accumulate, false,
                      NULL);
        return;
    }
    float sums[STACK_ROWS * STACK_COLUMNS];
    multiply_both(&job->a, &job->b, &part, sums, STACK_COLUMNS, false, false, NULL);
    for (int64_t i = 0; i < part.rows; i++)
        round_row(sums + i * STACK_COLUMNS, (uint16_t *)job->c.data + (row + i) * stride + column, part.columns,
                  job->accumulate);
}

static void gemm(struct tensor a, bool transpose_a, struct tensor b, bool transpose_b, struct tensor c,
                 bool accumulate) {
    if (a.dtype == DTYPE_F64) {
        kernels_ref()->gemm(a, transpose_a, b, transpose_b, c, accumulate);
        return;
    }
    int64_t k = a.shape[!transpose_a];
    bool in_c = c.dtype == DTYPE_F32;
    CHECK(is_float(a) && a.dtype == b.dtype && (c.dtype == a.dtype || c.dtype == DTYPE_F32));
    CHECK(is_2d(a, a.shape[0], a.shape[1]) && is_2d(b, b.shape[0], b.shape[1]));
    CHECK(is_2d(c, a.shape[transpose_a], b.shape[!transpose_b]));
    CHECK_OP(b.shape[transpose_b], ==, k);
    if (tensor_elements(c) == 0)
        return;
    if (k == 0) {
        if (!accumulate)
            memset(c.data, 0, tensor_bytes(c));
        return;
    }
    struct gemm_job job = {.a = {matrix_of(a, a.shape[1], tensor_none()), transpose_a ? LANES_ARE_COLUMNS : LANES_ARE_ROWS},
                           .b = {matrix_of(b, b.shape[1], tensor_none()), transpose_b ? LANES_ARE_ROWS : LANES_ARE_COLUMNS},
                           .c = c,
                           .k = k,
                           .task_rows = part_size(c.shape[0], in_c ? SIDE_MAX / 2 : STACK_ROWS, TILE_ROWS),
                           .task_columns = part_size(c.shape[1], in_c ? SIDE_MAX / 2 : STACK_COLUMNS, TILE_COLUMNS),
                           .accumulate = accumulate};
    job.column_tasks = divide_up(c.shape[1], job.task_columns);
    parallel_for(divide_up(c.shape[0], job.task_rows) * job.column_tasks, gemm_task, &job);
}

void ISA_NAME(product_fill)(struct kernel_ops *ops) {
    ops->gemm = gemm;
    ops->packed_bytes = packed_bytes;
    ops->pack = pack_weights;
    ops->product_forward = product_forward;
    ops->product_backward_input = product_backward_input;
    ops->product_backward_weight = product_backward_weight;
}
