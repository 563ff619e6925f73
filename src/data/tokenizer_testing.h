/* Text for the tests of the tokenizer: many scripts, the same bytes on every machine. */
#pragma once

#include "base/random.h"
#include "base/text.h"

enum { TESTING_TEXT_BYTES = 1 << 20, TESTING_CHUNK_IDS = 4096 };

static inline void testing_character(struct text *out, uint32_t c) {
    char s[4];
    size_t size = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    if (size == 1)
        s[0] = (char)c;
    for (size_t i = size - 1; i > 0 && size > 1; i--, c >>= 6)
        s[i] = (char)(0x80 | (c & 0x3F));
    if (size > 1)
        s[0] = (char)(0xF00 >> size & 0xFF & ~(0x80 >> size)) | (char)c;
    text_add(out, s, size);
}

/* Runs of one kind each: words of a script, combining accents, digits, punctuation, spaces and line ends, emoji with
 * joiners and skin tones, contractions. */
static inline void testing_text(struct text *out, size_t size) {
    static const struct {
        uint32_t first, count;
    } scripts[] = {{'a', 26},    {'A', 26},    {0xE0, 23},   {0x3B1, 25},   {0x430, 32},   {0x5D0, 27},
                   {0x621, 26},  {0x905, 53},  {0xE01, 46},  {0x3041, 83},  {0x4E00, 3000}, {0xAC00, 9000},
                   {0x1100, 19}, {0x1F600, 60}, {0x2190, 100}};
    static const char *const fragments[] = {"'s", "'ll", "'RE", "'T", " ", "  ", "   \t", "\n", "\r\n", "\n\n\n", " \n ",
                                            "...", "?!", "--", "_", "<|endoftext|", "\xC2\xA0", "\xE3\x80\x80", " '", "\""};
    enum { SCRIPTS = sizeof scripts / sizeof *scripts, FRAGMENTS = sizeof fragments / sizeof *fragments };
    for (uint64_t run = 0; out->size < size; run++) {
        uint64_t kind = random_bits(7, run, 0) % 10, length = 1 + random_bits(7, run, 1) % 9;
        uint64_t script = random_bits(7, run, 2) % SCRIPTS;
        if (kind < 2)
            text_add_string(out, fragments[random_bits(7, run, 3) % FRAGMENTS]);
        for (uint64_t i = 0; i < length && kind >= 2; i++) {
            uint64_t pick = random_bits(7, run, 4 + i);
            if (kind == 2)
                testing_character(out, '0' + (uint32_t)(pick % 10));
            else
                testing_character(out, scripts[script].first + (uint32_t)(pick % scripts[script].count));
            if (kind == 3) /* a combining accent: composed by NFC where there is such a letter */
                testing_character(out, 0x300 + (uint32_t)(pick >> 32) % 20);
            if (kind == 4) { /* a person with a skin tone, joined to a computer */
                testing_character(out, 0x1F469);
                testing_character(out, 0x1F3FB + (uint32_t)(pick >> 32) % 5);
                testing_character(out, 0x200D);
                testing_character(out, 0x1F4BB);
            }
        }
        if (kind >= 5)
            text_add_string(out, " ");
    }
}

/* FNV-1a over the ids as little-endian 32-bit words. */
static inline uint64_t testing_hash(const int32_t *ids, size_t count) {
    uint64_t hash = UINT64_C(0xCBF29CE484222325);
    for (size_t i = 0; i < count; i++)
        for (int b = 0; b < 4; b++)
            hash = (hash ^ ((uint32_t)ids[i] >> 8 * b & 0xFF)) * UINT64_C(0x100000001B3);
    return hash;
}
