/* Weights packed for the products: [group][panel][k word][TILE_COLUMNS], the groups in the arrangement of forward (lanes
 * along `out`), behind them in that of backward (lanes along `in`). Private to kernels/cpu/isa/.
 */
#pragma once

#include "kernels/cpu/isa/panel.h"
#include "kernels/cpu/scratch.h"

/* One arrangement of one group: lanes along `lanes`, summed over k. */
static inline int64_t group_floats(enum dtype dtype, int64_t lanes, int64_t k) {
    struct matrix shape = {.element_bytes = (int)dtype_size(dtype)};
    return block_floats(lanes, words_of(&shape, k), TILE_COLUMNS);
}

static inline int64_t forward_floats(const struct packed *w) {
    return group_floats(w->dtype, w->out, w->in);
}

static inline int64_t backward_floats(const struct packed *w) {
    return w->backward ? group_floats(w->dtype, w->in, w->out) : 0;
}

struct pack_job {
    struct packed to;
    struct matrix w; /* all groups below each other, in the products' dtype */
    struct tensor source;
    int64_t row_tasks;
};

enum { PACK_ROWS = 2 * TILE_COLUMNS }; /* rows of w in a task: whole panels of one arrangement, whole words of the other */

/* `count` floats, to bf16 or from it. */
HEADER_FUNCTION void convert_floats(const char *from, enum dtype to_dtype, int64_t count, char *to) {
    int64_t i = 0;
    if (to_dtype == DTYPE_BF16) {
        for (; i + VECTOR_LANES <= count; i += VECTOR_LANES)
            vector_store_bf16((uint16_t *)to + i, vector_load((const float *)from + i));
        for (; i < count; i++)
            ((uint16_t *)to)[i] = float_to_bf16(((const float *)from)[i]);
        return;
    }
    for (; i < count; i++)
        ((float *)to)[i] = bf16_to_float(((const uint16_t *)from)[i]);
}

/* The rows of w in the products' dtype; converted into scratch where the source has another. */
HEADER_FUNCTION struct matrix rows_to_pack(const struct pack_job *job, int64_t first, int64_t count) {
    int64_t in = job->to.in;
    struct matrix m = {.columns = in, .element_bytes = (int)dtype_size(job->to.dtype)};
    const char *from = (const char *)job->source.data + first * in * (int64_t)dtype_size(job->source.dtype);
    if (job->source.dtype == job->to.dtype) {
        m.data = from;
        return m;
    }
    char *scratch = scratch_task((size_t)(count * in) * sizeof(float));
    m.data = scratch;
    convert_floats(from, job->to.dtype, count * in, scratch);
    return m;
}

/* Task of 0 .. groups * row_tasks - 1: PACK_ROWS rows of one group, into both arrangements. */
HEADER_FUNCTION void pack_task(const struct pack_job *job, int64_t index) {
    const struct packed *w = &job->to;
    int64_t group = index / job->row_tasks, row = index % job->row_tasks * PACK_ROWS;
    int64_t count = at_most(w->out - row, PACK_ROWS);
    struct matrix m = rows_to_pack(job, group * w->out + row, count);
    int64_t in_words = words_of(&m, w->in), out_words = words_of(&m, w->out);
    float *forward = (float *)w->data + group * forward_floats(w);
    pack_b(LANES_ARE_ROWS, &m, 0, count, 0, w->in, forward + row / TILE_COLUMNS * panel_floats(in_words, TILE_COLUMNS));
    if (!w->backward)
        return;
    float *backward = (float *)w->data + w->groups * forward_floats(w) + group * backward_floats(w) +
                      row / word_elements(&m) * TILE_COLUMNS;
    if (m.element_bytes == 4)
        pack_columns(4, &m, 0, w->in, 0, count, TILE_COLUMNS, out_words, backward);
    else
        pack_columns(2, &m, 0, w->in, 0, count, TILE_COLUMNS, out_words, backward);
}

HEADER_FUNCTION struct pack_job pack_job_of(struct tensor source, struct packed to) {
    CHECK_OP(tensor_elements(source), ==, to.groups * to.out * to.in);
    return (struct pack_job){.to = to, .source = source, .row_tasks = divide_up(to.out, PACK_ROWS)};
}
