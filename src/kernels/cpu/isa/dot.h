/* Products of a few rows with weights in their natural layout: y[r][o] = dot(x row r, w row o), nothing packed. Private
 * to kernels/cpu/isa/.
 *
 * Both operands are contiguous along k, so lanes run along k. VECTOR_LANES dot products are kept at a time, as a tile
 * of 4, 2 or 1 rows of x; their sums over lanes come out of one vector.
 */
#pragma once

#include "kernels/cpu/isa/matrix.h"

enum { DOT_ROWS_MAX = 4 };

/* y of rows x columns, f32 or bf16. */
struct dot_result {
    char *data;
    int64_t stride; /* elements */
    enum dtype dtype;
    bool accumulate;
};

static inline void dot_store(const struct dot_result *y, int64_t row, int64_t column, float value) {
    int64_t i = row * y->stride + column;
    if (y->dtype == DTYPE_F32) {
        float *to = (float *)y->data + i;
        *to = y->accumulate ? *to + value : value;
    } else {
        uint16_t *to = (uint16_t *)y->data + i;
        *to = float_to_bf16(y->accumulate ? bf16_to_float(*to) + value : value);
    }
}

/* `rows` (a constant) rows of x from `row`, VECTOR_LANES / rows rows of w from `column`, of which column_count exist.
 */
ALWAYS_INLINE void dot_tile(int rows, int element_bytes, const struct matrix *x, int64_t row, const struct matrix *w,
                            int64_t column, int64_t column_count, const struct dot_result *y) {
    const int columns = VECTOR_LANES / rows;
    const bool pairs = BF16_PAIRS && element_bytes == 2;
    const int step = pairs ? 2 * VECTOR_LANES : VECTOR_LANES;
    const char *x_row[DOT_ROWS_MAX], *w_row[VECTOR_LANES];
    for (int r = 0; r < rows; r++)
        x_row[r] = matrix_at(x, row + r, 0);
    for (int c = 0; c < columns; c++)
        w_row[c] = matrix_at(w, column + (c < column_count ? c : 0), 0);
    vector_f32 sum[VECTOR_LANES] = {{0}};
    int64_t k = 0;
    for (; k + step <= x->columns; k += step) {
        vector_f32 left[DOT_ROWS_MAX];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            left[r] = words_load(element_bytes, x_row[r] + k * element_bytes, step);
#pragma GCC unroll 16
        for (int c = 0; c < columns; c++) {
            vector_f32 right = words_load(element_bytes, w_row[c] + k * element_bytes, step);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                sum[r * columns + c] = vector_multiply_add(pairs, left[r], right, sum[r * columns + c]);
        }
    }
    if (k < x->columns) {
#pragma GCC unroll 16
        for (int c = 0; c < columns; c++) {
            vector_f32 right = words_load(element_bytes, w_row[c] + k * element_bytes, x->columns - k);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                vector_f32 left = words_load(element_bytes, x_row[r] + k * element_bytes, x->columns - k);
                sum[r * columns + c] = vector_multiply_add(pairs, left, right, sum[r * columns + c]);
            }
        }
    }
    vector_f32 sums = vector_sums(sum);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns && c < column_count; c++)
            dot_store(y, row + r, column + c, sums[r * columns + c]);
}

ALWAYS_INLINE void dot_columns(int rows, int element_bytes, const struct matrix *x, int64_t row, const struct matrix *w,
                               int64_t column, int64_t end, const struct dot_result *y) {
    for (; column < end; column += VECTOR_LANES / rows)
        dot_tile(rows, element_bytes, x, row, w, column, end - column, y);
}

ALWAYS_INLINE void dot_rows(int element_bytes, const struct matrix *x, int64_t row, int64_t row_end,
                            const struct matrix *w, int64_t column, int64_t column_end, const struct dot_result *y) {
    for (; row + 4 <= row_end; row += 4)
        dot_columns(4, element_bytes, x, row, w, column, column_end, y);
    for (; row + 2 <= row_end; row += 2)
        dot_columns(2, element_bytes, x, row, w, column, column_end, y);
    for (; row < row_end; row++)
        dot_columns(1, element_bytes, x, row, w, column, column_end, y);
}

/* y[row..row_end)[column..column_end) (+)= x w^T; x and w have one number of columns and one dtype. All rows are done
 * for a few columns at a time, whose weights stay in the first cache meanwhile. */
static void dot_block(const struct matrix *x, int64_t row, int64_t row_end, const struct matrix *w, int64_t column,
                      int64_t column_end, const struct dot_result *y) {
    for (; column < column_end; column += VECTOR_LANES) {
        int64_t end = column + VECTOR_LANES < column_end ? column + VECTOR_LANES : column_end;
        if (x->element_bytes == 4)
            dot_rows(4, x, row, row_end, w, column, end, y);
        else
            dot_rows(2, x, row, row_end, w, column, end, y);
    }
}
