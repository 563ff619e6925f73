/* What comes next: lines that will be packed or multiplied soon are asked for while tiles are multiplied, a few at a time.
 * A product that begins with waiting for its operands waits as long as it multiplies. Private to kernels/cpu/isa/.
 */
#pragma once

#include "kernels/cpu/isa/matrix.h"

/* Stretches of rows, one list after the other. */
struct ahead {
    const struct matrix *matrix;         /* NULL: nothing */
    int64_t row, row_end, column, bytes; /* of each row so many from `column` on */
    const struct ahead *then;            /* after these; NULL: nothing */
    int64_t lines;                       /* to ask for at a time */
    const char *at;                      /* of the row that is being asked for: what comes next, */
    int64_t left;                        /* and how many bytes are left */
};

enum { ASK_WORDS = 16, LINE_BYTES = 64 }; /* words of k that a tile multiplies between two times */

/* Elements column..column+count-1 of rows row..row_end-1. */
static inline struct ahead ahead_of(const struct matrix *m, int64_t row, int64_t row_end, int64_t column, int64_t count) {
    if (row >= row_end)
        return (struct ahead){0};
    return (struct ahead){.matrix = m, .row = row, .row_end = row_end, .column = column, .bytes = count * m->element_bytes};
}

static inline struct ahead ahead_then(struct ahead first, const struct ahead *then) {
    if (!then->matrix)
        return first;
    if (!first.matrix)
        return *then;
    first.then = then;
    return first;
}

/* Spreads all of it over the multiplication of `tiles` tiles of `words` words. */
static inline void ahead_spread(struct ahead *ahead, int64_t tiles, int64_t words) {
    int64_t lines = 0, times = tiles * divide_up(words, ASK_WORDS);
    for (const struct ahead *part = ahead; part; part = part->then)
        lines += (part->row_end - part->row) * divide_up(part->bytes, LINE_BYTES);
    ahead->lines = times > 0 ? divide_up(lines, times) : 0;
}

ALWAYS_INLINE void ahead_ask(struct ahead *ahead) {
    for (int64_t i = 0; i < ahead->lines; i++) {
        if (ahead->left <= 0) {
            if (ahead->row == ahead->row_end) {
                int64_t lines = ahead->then ? ahead->lines : 0;
                if (lines > 0)
                    *ahead = *ahead->then;
                ahead->lines = lines;
                if (lines == 0)
                    return;
            }
            ahead->at = matrix_at(ahead->matrix, ahead->row++, ahead->column);
            ahead->left = ahead->bytes;
        }
        __builtin_prefetch(ahead->at, 0, 2); /* into the second cache: the first one is full */
        ahead->at += LINE_BYTES;
        ahead->left -= LINE_BYTES;
    }
}
