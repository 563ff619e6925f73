/* C (+)= A^T B over rows of A and B: the gradient of weights. Private to kernels/cpu/isa/.
 *
 * Both operands are new in every call and neither is the larger, so blocks of both are packed, small enough for the
 * second cache, and C is passed over once for every block of rows.
 */
#pragma once

#include "kernels/cpu/isa/panel.h"
#include "kernels/cpu/scratch.h"

enum {
    OUTER_SIDE_MAX = 256,  /* rows and columns of C in one task */
    OUTER_WORDS_MAX = 256, /* k words of a packed block */
};

/* c [rows, columns] = or += sum over r in first..end-1 of a[r][row..] * b[r][column..], in the order of r. */
static void outer_block(const struct matrix *a, const struct matrix *b, int64_t first, int64_t end, int64_t row,
                        int64_t rows, int64_t column, int64_t columns, float *c, int64_t c_stride, bool add) {
    if (first == end)
        return;
    int64_t block = part_size(end - first, OUTER_WORDS_MAX * word_elements(a), 2), words = words_of(a, block);
    int64_t b_floats = block_floats(columns, words, TILE_COLUMNS);
    int64_t a_floats = block_floats(rows, words, TILE_ROWS);
    float *packed_b = scratch_task(sizeof(float) * (size_t)(a_floats + b_floats)), *packed_a = packed_b + b_floats;
    for (int64_t r = first; r < end; r += block) {
        int64_t count = at_most(end - r, block);
        pack_b(LANES_ARE_COLUMNS, b, column, columns, r, count, packed_b);
        pack_a(LANES_ARE_COLUMNS, a, row, rows, r, count, packed_a);
        block_multiply(word_elements(a) == 2, packed_a, packed_b, words_of(a, count), c, c_stride, rows, columns,
                       add || r > first);
    }
}
