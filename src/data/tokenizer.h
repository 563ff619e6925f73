/* Byte-level BPE: text to token ids and back, as Hugging Face's tokenizer.json describes it. */
#pragma once

#include "base/status.h"
#include "base/text.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct tokenizer;

/* A growing list of ids. A zeroed struct is an empty one. */
struct token_list {
    int32_t *ids;
    size_t count, capacity;
};
void token_list_add(struct token_list *list, int32_t id);
void token_list_release(struct token_list *list);

/* Read tokenizer.json: model BPE on bytes, pre-tokenizer a regular expression or GPT-2's, normalizer NFC or none. Any
 * other kind is refused by name. Destroy with tokenizer_destroy. */
enum status tokenizer_open(const char *path, struct tokenizer **out) MUST_USE;
void tokenizer_destroy(struct tokenizer *tokenizer);

/* Learn a tokenizer with vocab_size ids from texts of valid UTF-8: 256 bytes, then merges, most frequent pair first (on a
 * tie the lower pair of ids), then <|endoftext|>. Pieces are cut by the pattern of Qwen2. Fewer merges are learnt where
 * no pair occurs twice. Deterministic. Source: arXiv 1508.07909. */
struct text_view {
    const char *data;
    size_t size;
};
enum status tokenizer_train(const struct text_view *texts, size_t text_count, int vocab_size,
                            struct tokenizer **out) MUST_USE;

/* tokenizer.json, and the tokenizer_config.json that transformers wants beside it. */
enum status tokenizer_save(const struct tokenizer *tokenizer, const char *path) MUST_USE;
enum status tokenizer_save_config(const struct tokenizer *tokenizer, const char *path,
                                  int64_t model_max_length) MUST_USE;

int tokenizer_vocab_size(const struct tokenizer *tokenizer);  /* the highest id and one */
int tokenizer_end_of_text(const struct tokenizer *tokenizer); /* id of <|endoftext|>; -1 if it has none */

/* Append the ids of `text`. With parse_special, special tokens written out in it are taken as such. STATUS_FORMAT where
 * it is not UTF-8, with the offset. Safe from several threads. */
enum status tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t size, bool parse_special,
                             struct token_list *out) MUST_USE;

/* The bytes that an id stands for; empty for an id without token. Borrowed from the tokenizer. */
struct text_view tokenizer_token(const struct tokenizer *tokenizer, int32_t id);
bool tokenizer_is_special(const struct tokenizer *tokenizer, int32_t id);

/* Ids back to text as they come: bytes are held back until a character is complete. A zeroed struct is fresh. */
struct token_decoder {
    char held[4];
    int held_count;
};
/* Append what is complete after `id`. Bytes that can never become a character come out as U+FFFD. */
void token_decoder_add(struct token_decoder *decoder, const struct tokenizer *tokenizer, int32_t id, struct text *out);
/* Append what is still held, as U+FFFD. */
void token_decoder_finish(struct token_decoder *decoder, struct text *out);
