/* A row-major operand of a product, f32 or bf16, whose rows may be gathered. Private to kernels/cpu/isa/. */
#pragma once

#include "kernels/cpu/isa/vector.h"

struct matrix {
    const char *data;
    int64_t columns;
    int element_bytes;   /* 4: f32, 2: bf16 */
    const int32_t *rows; /* row r lies at rows[r]; NULL: at r */
};

ALWAYS_INLINE const void *matrix_at(const struct matrix *m, int64_t row, int64_t column) {
    int64_t stored = m->rows ? m->rows[row] : row;
    return m->data + (stored * m->columns + column) * m->element_bytes;
}

static inline int64_t at_most(int64_t value, int64_t limit) {
    return value < limit ? value : limit;
}

static inline int64_t divide_up(int64_t value, int64_t by) {
    return (value + by - 1) / by;
}

/* The size of equal parts of `length`, none above `limit`, in multiples of `grain`. */
static inline int64_t part_size(int64_t length, int64_t limit, int64_t grain) {
    int64_t parts = divide_up(length, limit);
    return parts == 0 ? grain : divide_up(divide_up(length, parts), grain) * grain;
}

/* A matrix over a tensor [.., columns]. */
ALWAYS_INLINE struct matrix matrix_of(struct tensor t, int64_t columns, struct tensor rows) {
    return (struct matrix){t.data, columns, (int)dtype_size(t.dtype), rows.data};
}

/* One word is this many elements of a k side: two where bf16 multiplies in pairs; elsewhere bf16 becomes f32. */
ALWAYS_INLINE int word_elements(const struct matrix *m) {
    return BF16_PAIRS && m->element_bytes == 2 ? 2 : 1;
}

/* Words that `elements` elements of a k side take in a packed block: whole chunks where they multiply in tiles. */
ALWAYS_INLINE int64_t words_of(const struct matrix *m, int64_t elements) {
    int64_t words = (elements + word_elements(m) - 1) / word_elements(m);
    return BF16_TILES && m->element_bytes == 2 ? (words + 15) / 16 * 16 : words;
}

/* VECTOR_LANES words from `from`, of which the first `count` elements exist; the rest is 0. */
ALWAYS_INLINE vector_f32 words_load(int element_bytes, const void *from, int64_t count) {
    const int elements = VECTOR_LANES * (BF16_PAIRS && element_bytes == 2 ? 2 : 1);
    char padded[4 * VECTOR_LANES];
    if (count < elements) {
        memset(padded, 0, sizeof padded);
        memcpy(padded, from, (size_t)count * (size_t)element_bytes);
        from = padded;
    }
    return BF16_PAIRS || element_bytes == 4 ? vector_load(from) : vector_load_bf16(from);
}
