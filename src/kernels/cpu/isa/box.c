/* Boxes of tensors: copied, cast and summed. Bound by memory: every term is read once, the result written once. */
#include "kernels/cpu/isa/numbers.h"

#include "base/threads.h"
#include "kernels/cpu/fillers.h"
#include "kernels/cpu/isa.h"

struct box_sum {
    const struct box *terms;
    int term_count;
    struct box to;
    bool accumulate;
    int64_t rows, inner, width; /* rows of elements that lie side by side, how many of them in a chunk, their elements */
    int64_t rows_per_task, pieces, piece; /* long rows are divided into `pieces` pieces of `piece` elements */
};

/* Elements of a task that lie side by side in every operand: from [i,j,k] of the boxes on. */
struct run {
    int64_t i, j, k, count;
};

static inline char *run_at(const struct box *box, struct run run) {
    const int64_t *shape = box->tensor.shape, *first = box->first;
    int64_t at = ((first[0] + run.i) * shape[1] + first[1] + run.j) * shape[2] + first[2] + run.k;
    return (char *)box->tensor.data + at * (box->tensor.dtype == DTYPE_BF16 ? 2 : 4);
}

ALWAYS_INLINE vector_f32 load(enum dtype dtype, const void *array, int64_t at, int64_t count) {
    return dtype == DTYPE_BF16 ? numbers_load(DTYPE_BF16, array, at, count) : numbers_load(DTYPE_F32, array, at, count);
}

/* `vectors` vectors of `count` numbers each, from the element `at` of the run on. */
ALWAYS_INLINE void sum_vectors(const struct box_sum *b, struct run run, int64_t at, int vectors, int64_t count) {
    vector_f32 sum[4] = {{0}};
    for (int t = 0; t < b->term_count; t++) {
        const char *term = run_at(&b->terms[t], run);
        enum dtype dtype = b->terms[t].tensor.dtype;
        for (int v = 0; v < vectors; v++) {
            vector_f32 x = load(dtype, term, at + v * VECTOR_LANES, count);
            sum[v] = t == 0 ? x : sum[v] + x;
        }
    }
    char *to = run_at(&b->to, run);
    for (int v = 0; v < vectors; v++) {
        int64_t place = at + v * VECTOR_LANES;
        if (b->to.tensor.dtype == DTYPE_BF16)
            numbers_store(DTYPE_BF16, to, place, count,
                          b->accumulate ? numbers_load(DTYPE_BF16, to, place, count) + sum[v] : sum[v]);
        else
            numbers_store(DTYPE_F32, to, place, count,
                          b->accumulate ? numbers_load(DTYPE_F32, to, place, count) + sum[v] : sum[v]);
    }
}

static void sum_run(const struct box_sum *b, struct run run) {
    int64_t i = 0;
    for (; i + 4 * VECTOR_LANES <= run.count; i += 4 * VECTOR_LANES)
        sum_vectors(b, run, i, 4, VECTOR_LANES);
    for (; i < run.count; i += VECTOR_LANES)
        sum_vectors(b, run, i, 1, at_most(run.count - i, VECTOR_LANES));
}

/* One term, another dtype. */
ALWAYS_INLINE void cast_run(enum dtype from_dtype, enum dtype to_dtype, const void *from, void *to, int64_t count) {
    int64_t i = 0;
    for (; i + VECTOR_LANES <= count; i += VECTOR_LANES)
        numbers_store(to_dtype, to, i, VECTOR_LANES, numbers_load(from_dtype, from, i, VECTOR_LANES));
    if (i < count)
        numbers_store(to_dtype, to, i, count - i, numbers_load(from_dtype, from, i, count - i));
}

static void copy_run(const struct box_sum *b, struct run run) {
    enum dtype from_dtype = b->terms[0].tensor.dtype, to_dtype = b->to.tensor.dtype;
    const char *from = run_at(&b->terms[0], run);
    char *to = run_at(&b->to, run);
    if (from_dtype == to_dtype)
        memmove(to, from, (size_t)run.count * dtype_size(to_dtype)); /* both may be the same place */
    else if (from_dtype == DTYPE_BF16)
        cast_run(DTYPE_BF16, DTYPE_F32, from, to, run.count);
    else
        cast_run(DTYPE_F32, DTYPE_BF16, from, to, run.count);
}

static void sum_task(void *context, int64_t index) {
    const struct box_sum *b = context;
    int64_t first = index / b->pieces * b->rows_per_task, at = index % b->pieces * b->piece;
    int64_t end = at_most(first + b->rows_per_task, b->rows);
    for (int64_t row = first; row < end; row++) {
        struct run run = {row / b->inner, row % b->inner, at, at_most(b->width - at, b->piece)};
        if (b->term_count == 1 && !b->accumulate)
            copy_run(b, run);
        else
            sum_run(b, run);
    }
}

static void check_box(const struct box *box, const int64_t count[3]) {
    CHECK_OP(box->tensor.shape[3], ==, 1);
    for (int dim = 0; dim < 3; dim++) {
        CHECK(box->first[dim] >= 0 && count[dim] >= 0);
        CHECK_OP(box->first[dim] + count[dim], <=, box->tensor.shape[dim]);
    }
}

/* Whether the elements of dimensions dim-1 and dim lie side by side in every operand: the box has the whole of dim. */
static bool joins(const struct box_sum *b, const int64_t count[3], int dim) {
    bool whole = b->to.tensor.shape[dim] == count[dim];
    for (int t = 0; t < b->term_count; t++)
        whole = whole && b->terms[t].tensor.shape[dim] == count[dim];
    return whole;
}

/* Rows as long as they can be: dimensions that a box has whole in every operand join the one before them. */
static void divide(struct box_sum *b, const int64_t count[3]) {
    b->rows = count[0] * count[1];
    b->inner = count[1];
    b->width = count[2];
    if (joins(b, count, 2)) {
        bool all = joins(b, count, 1);
        b->rows = all ? 1 : count[0];
        b->inner = 1;
        b->width = all ? count[0] * count[1] * count[2] : count[1] * count[2];
    }
    b->piece = part_size(b->width, TASK_ELEMENTS, 4 * VECTOR_LANES);
    b->pieces = divide_up(b->width, b->piece);
    b->rows_per_task = b->pieces > 1 ? 1 : rows_per_task(b->width);
}

static void sum_boxes(const struct box *terms, int term_count, const int64_t count[3], struct box to,
                      bool accumulate) {
    struct box_sum b = {.terms = terms, .term_count = term_count, .to = to, .accumulate = accumulate};
    bool fast = is_fast(to.tensor);
    for (int t = 0; t < term_count; t++)
        fast = fast && is_fast(terms[t].tensor);
    if (!fast || term_count < 1) {
        kernels_ref()->sum_boxes(terms, term_count, count, to, accumulate);
        return;
    }
    check_box(&to, count);
    for (int t = 0; t < term_count; t++)
        check_box(&terms[t], count);
    if (count[0] == 0 || count[1] == 0 || count[2] == 0)
        return;
    divide(&b, count);
    parallel_for(divide_up(b.rows, b.rows_per_task) * b.pieces, sum_task, &b);
}

void ISA_NAME(box_fill)(struct kernel_ops *ops) {
    ops->sum_boxes = sum_boxes;
}
