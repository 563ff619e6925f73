/* How a replica's outer difference travels: the bytes of a message of n differences, and nothing else.
 *
 *   f32   n floats
 *   bf16  n halves, rounded to nearest even
 *   fp8   blocks of 32: a code of 8 bits for each difference, and a scale of 8 bits
 *   fp4   blocks of 32: a code of 4 bits for each difference, and a scale of 8 bits
 *
 * All little-endian. fp8 and fp4 have the codes of all blocks first, then the scales of all blocks: with B = ceil(n/32)
 * blocks of C = 32 (fp8) or 16 (fp4) bytes, the codes of block b lie at C b and its scale at C B + b. The last block is
 * filled up with differences of 0, so that every block has the same size. Pieces that are to travel one by one are
 * messages of their own.
 *
 * fp8: byte i of a block is difference i: sign, 4 bits of exponent, 3 of mantissa (E4M3 as processors have it: 448 is the
 * largest, 0x7F and 0xFF are NaN). A code stands for its value times 2^(scale - 135). The scale is the smallest from 18
 * on for which the block's largest magnitude is at most 464 before rounding, which is to nearest even.
 *
 * fp4: byte i of a block has difference i in its lower and difference i + 16 in its upper half: sign and 3 bits of
 * exponent (E3M0). Magnitude 0 is zero, c = 1 .. 7 is 2^(scale + c - 134). The scale is the smallest from 9 on for which
 * the block's largest magnitude is not above code 7. A magnitude m 2^e with 1 <= m < 2 is first rounded to a power of two,
 * up from m = 1/ln 2 on (as a float, 0x3FB8AA3B), else down: see docs/design/diloco.md. Half of what code 1 stands for then
 * becomes code 1, less becomes 0.
 *
 * The sign of a zero is kept. An encoder writes neither NaN nor infinity, and only scales within 9 .. 254 (fp4) or 18 ..
 * 254 (fp8): all that it writes decodes to normal floats or zeros, exactly. Other bytes decode to some number or NaN.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

enum outer_format { OUTER_F32, OUTER_BF16, OUTER_FP8, OUTER_FP4, OUTER_FORMATS };

enum { OUTER_BLOCK = 32 };

static inline const char *outer_format_name(enum outer_format format) {
    static const char *const names[OUTER_FORMATS] = {"f32", "bf16", "fp8", "fp4"};
    return names[format];
}

static inline int64_t outer_block_count(int64_t n) {
    return (n + OUTER_BLOCK - 1) / OUTER_BLOCK;
}

/* Bytes of the codes of one whole block. */
static inline size_t outer_code_bytes(enum outer_format format) {
    static const uint8_t bits[OUTER_FORMATS] = {32, 16, 8, 4};
    return (size_t)bits[format] * OUTER_BLOCK / 8;
}

/* Bytes of a message of n differences. */
static inline size_t outer_wire_bytes(enum outer_format format, int64_t n) {
    size_t blocks = (size_t)outer_block_count(n);
    switch (format) {
    case OUTER_F32:
        return 4 * (size_t)n;
    case OUTER_BF16:
        return 2 * (size_t)n;
    default:
        return blocks * (outer_code_bytes(format) + 1);
    }
}
