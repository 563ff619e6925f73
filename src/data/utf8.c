#include "data/utf8.h"

#include <stdint.h>

int utf8_sequence_bytes(unsigned char lead) {
    if (lead < 0x80)
        return 1;
    if (lead >= 0xC2 && lead < 0xE0)
        return 2;
    if (lead >= 0xE0 && lead < 0xF0)
        return 3;
    return lead >= 0xF0 && lead < 0xF5 ? 4 : 0;
}

static bool valid_sequence(const unsigned char *s, int bytes) {
    for (int i = 1; i < bytes; i++)
        if ((s[i] & 0xC0) != 0x80)
            return false;
    if (bytes == 3) /* overlong forms, surrogates */
        return !(s[0] == 0xE0 && s[1] < 0xA0) && !(s[0] == 0xED && s[1] >= 0xA0);
    if (bytes == 4) /* overlong forms, beyond U+10FFFF */
        return !(s[0] == 0xF0 && s[1] < 0x90) && !(s[0] == 0xF4 && s[1] >= 0x90);
    return true;
}

size_t utf8_valid_prefix(const char *text, size_t size) {
    const unsigned char *s = (const unsigned char *)text;
    size_t at = 0;
    while (at < size) {
        int bytes = utf8_sequence_bytes(s[at]);
        if (bytes == 0 || at + (size_t)bytes > size || !valid_sequence(s + at, bytes))
            break;
        at += (size_t)bytes;
    }
    return at;
}

static bool is_printable_byte(int byte) {
    return (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
}

void byte_level_order(unsigned char order[256]) {
    int count = 0;
    for (int pass = 0; pass < 2; pass++)
        for (int byte = 0; byte < 256; byte++)
            if (is_printable_byte(byte) == (pass == 0))
                order[count++] = (unsigned char)byte;
}

/* Printable bytes stand for themselves, the others follow from U+0100 on. */
static void make_alphabet(uint32_t code[256]) {
    uint32_t next = 0x100;
    for (int byte = 0; byte < 256; byte++)
        code[byte] = is_printable_byte(byte) ? (uint32_t)byte : next++;
}

void byte_level_encode(const char *bytes, size_t size, struct text *out) {
    uint32_t code[256];
    make_alphabet(code);
    for (size_t i = 0; i < size; i++) {
        uint32_t c = code[(unsigned char)bytes[i]];
        char utf8[2] = {(char)(0xC0 | c >> 6), (char)(0x80 | (c & 0x3F))};
        if (c < 0x80)
            utf8[0] = (char)c;
        text_add(out, utf8, c < 0x80 ? 1 : 2);
    }
}

/* Byte that a character of the alphabet stands for; -1 outside it. */
static int decode_character(const unsigned char *s, int bytes, const uint32_t code[256]) {
    uint32_t c = bytes == 1 ? s[0] : bytes == 2 ? (uint32_t)(s[0] & 0x1F) << 6 | (s[1] & 0x3F) : UINT32_MAX;
    for (int byte = 0; byte < 256; byte++)
        if (code[byte] == c)
            return byte;
    return -1;
}

void byte_level_decode(const char *text, size_t size, struct text *out) {
    uint32_t code[256];
    make_alphabet(code);
    for (size_t at = 0; at < size;) {
        int bytes = utf8_sequence_bytes((unsigned char)text[at]);
        CHECK(bytes > 0 && at + (size_t)bytes <= size);
        int byte = decode_character((const unsigned char *)text + at, bytes, code);
        char single = (char)byte;
        text_add(out, byte >= 0 ? &single : text + at, byte >= 0 ? 1 : (size_t)bytes);
        at += (size_t)bytes;
    }
}
