/* UTF-8: validity, and the byte-level alphabet of GPT-2's tokenizers. */
#pragma once

#include "base/text.h"
#include <stdbool.h>

/* Bytes before the first that is not valid UTF-8 (no surrogates, no overlong forms); size where all is. */
size_t utf8_valid_prefix(const char *text, size_t size);

/* Bytes of the sequence that a lead byte opens; 0 for a byte that opens none. */
int utf8_sequence_bytes(unsigned char lead);

/* Each byte as the printable character that tokenizer.json writes for it, appended as UTF-8. */
void byte_level_encode(const char *bytes, size_t size, struct text *out);

/* The reverse, appended; characters outside the alphabet stand for their own UTF-8. `text` must be valid UTF-8. */
void byte_level_decode(const char *text, size_t size, struct text *out);

/* The 256 bytes in the order of the alphabet: printable ones first. Source: openai/gpt-2, encoder.py. */
void byte_level_order(unsigned char order[256]);
