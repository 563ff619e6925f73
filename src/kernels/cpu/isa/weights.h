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

/* Weights of so many numbers are not in a cache when products read them, packed or not: they are written past it. */
enum { STREAM_ELEMENTS = 1 << 20 };
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

#ifdef __AVX512F__
enum { SQUARE_ROWS = VECTOR_LANES, SQUARE_COLUMNS = TILE_COLUMNS, SQUARES_AHEAD = 4 };

ALWAYS_INLINE void put_word(bool stream, float *to, vector_f32 v) {
    if (stream)
        vector_stream(to, v);
    else
        vector_store(to, v);
}

/* Rows along k become the lanes of a forward panel's words; v is used up. */
ALWAYS_INLINE void put_forward(bool stream, vector_f32 v[VECTOR_LANES], float *forward) {
    vector_transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < VECTOR_LANES; i++)
        put_word(stream, forward + i * TILE_COLUMNS, v[i]);
}

/* A square of w, f32, `stride` from row to row: to the forward panel from its first lane and word on, and, unless NULL, to the
 * words of a backward one. Constants: rounded, to bf16; stream. */
ALWAYS_INLINE void pack_square(bool rounded, bool stream, const float *from, int64_t stride, float *forward, float *backward) {
    vector_f32 v[2][SQUARE_ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < SQUARE_ROWS; i++) {
        const float *row = from + i * stride;
        __builtin_prefetch(row + SQUARES_AHEAD * SQUARE_COLUMNS);
        __builtin_prefetch(row + SQUARES_AHEAD * SQUARE_COLUMNS + VECTOR_LANES);
        v[0][i] = vector_load(row);
        v[1][i] = vector_load(row + VECTOR_LANES);
        if (!rounded && backward) {
            put_word(stream, backward + i * TILE_COLUMNS, v[0][i]);
            put_word(stream, backward + i * TILE_COLUMNS + VECTOR_LANES, v[1][i]);
        }
    }
    if (!rounded) {
        put_forward(stream, v[0], forward);
        put_forward(stream, v[1], forward + VECTOR_LANES * TILE_COLUMNS);
        return;
    }
#ifdef __AVX512BF16__
#pragma GCC unroll 16
    for (int i = 0; i < SQUARE_ROWS; i++)
        v[0][i] = (vector_f32)_mm512_cvtne2ps_pbh((__m512)v[1][i], (__m512)v[0][i]);
    if (backward)
#pragma GCC unroll 8
        for (int i = 0; i < SQUARE_ROWS; i += 2) {
            vector_f32 low, high;
            interleave_vectors((__m512i)v[0][i], (__m512i)v[0][i + 1], &low, &high);
            put_word(stream, backward + i / 2 * TILE_COLUMNS, low);
            put_word(stream, backward + i / 2 * TILE_COLUMNS + VECTOR_LANES, high);
        }
    put_forward(stream, v[0], forward);
#endif
}

/* `count` rows of a group from row `row` on, square by square, those two after each other that share the lines of a forward
 * panel: memory takes neighbours together faster. */
ALWAYS_INLINE void pack_squares(bool rounded, bool stream, const struct packed *w, const float *from, int64_t row, int64_t count,
                                float *forward, float *backward) {
    const int elements = rounded ? 2 : 1;
    for (int64_t i = 0; i < count; i += TILE_COLUMNS) {
        float *f = forward + (row + i) / TILE_COLUMNS * panel_floats(w->in / elements, TILE_COLUMNS);
        float *b = backward ? backward + (row + i) / elements * TILE_COLUMNS : NULL;
        for (int64_t k = 0; k < w->in; k += SQUARE_COLUMNS, f += SQUARE_COLUMNS / elements * TILE_COLUMNS) {
#pragma GCC unroll 2
            for (int lane = 0; lane < TILE_COLUMNS; lane += SQUARE_ROWS)
                pack_square(rounded, stream, from + (i + lane) * w->in + k, w->in, f + lane,
                            b ? b + lane / elements * TILE_COLUMNS : NULL);
            if (b)
                b += panel_floats(w->out / elements, TILE_COLUMNS);
        }
    }
}

/* Where all is whole squares of f32: read once, rounded, and written into both arrangements. False: something is not. */
HEADER_FUNCTION bool pack_whole(const struct pack_job *job, int64_t group, int64_t row, int64_t count, float *forward,
                                float *backward) {
    const struct packed *w = &job->to;
    const bool rounded = w->dtype == DTYPE_BF16;
    const float *from = (const float *)job->source.data + (group * w->out + row) * w->in;
    if (job->source.dtype != DTYPE_F32 || w->in % SQUARE_COLUMNS != 0 || w->out % SQUARE_COLUMNS != 0 ||
        (rounded && (!BF16_PAIRS || BF16_TILES)))
        return false;
    bool stream = w->groups * w->out * w->in >= STREAM_ELEMENTS && (intptr_t)w->data % (VECTOR_LANES * sizeof(float)) == 0;
    if (rounded && stream)
        pack_squares(true, true, w, from, row, count, forward, backward);
    else if (rounded)
        pack_squares(true, false, w, from, row, count, forward, backward);
    else if (stream)
        pack_squares(false, true, w, from, row, count, forward, backward);
    else
        pack_squares(false, false, w, from, row, count, forward, backward);
    if (stream)
        vector_stream_end();
    return true;
}
#else
HEADER_FUNCTION bool pack_whole(const struct pack_job *job, int64_t group, int64_t row, int64_t count, float *forward,
                                float *backward) {
    (void)job, (void)group, (void)row, (void)count, (void)forward, (void)backward;
    return false;
}
#endif

/* Task of 0 .. groups * row_tasks - 1: PACK_ROWS rows of one group, into both arrangements. */
HEADER_FUNCTION void pack_task(const struct pack_job *job, int64_t index) {
    const struct packed *w = &job->to;
    int64_t group = index / job->row_tasks, row = index % job->row_tasks * PACK_ROWS;
    int64_t count = at_most(w->out - row, PACK_ROWS);
    float *groups_backward = (float *)w->data + w->groups * forward_floats(w);
    float *forward_panels = (float *)w->data + group * forward_floats(w);
    float *backward_panels = w->backward ? groups_backward + group * backward_floats(w) : NULL;
    if (pack_whole(job, group, row, count, forward_panels, backward_panels))
        return;
    struct matrix m = rows_to_pack(job, group * w->out + row, count);
    int64_t in_words = words_of(&m, w->in), out_words = words_of(&m, w->out);
    pack_b(LANES_ARE_ROWS, &m, 0, count, 0, w->in, forward_panels + row / TILE_COLUMNS * panel_floats(in_words, TILE_COLUMNS));
    if (!backward_panels)
        return;
    float *backward = backward_panels + row / word_elements(&m) * TILE_COLUMNS;
    if (m.element_bytes == 4)
        pack_columns(4, &m, 0, w->in, 0, count, TILE_COLUMNS, out_words, backward);
    else
        pack_columns(2, &m, 0, w->in, 0, count, TILE_COLUMNS, out_words, backward);
}

HEADER_FUNCTION struct pack_job pack_job_of(struct tensor source, struct packed to) {
    CHECK_OP(tensor_elements(source), ==, to.groups * to.out * to.in);
    return (struct pack_job){.to = to, .source = source, .row_tasks = divide_up(to.out, PACK_ROWS)};
}
