/* What the files of the tokenizer share. Private to data/. */
#pragma once

#define PCRE2_CODE_UNIT_WIDTH 8

#include "data/idmap.h"
#include "data/tokenizer.h"
#include <pcre2.h>

enum { ADDED_TOKENS_MAX = 4096, VOCAB_MAX = 1 << 22 };

struct added_token {
    char *content;
    size_t size;
    int32_t id;
    bool special;
};

struct tokenizer {
    struct text_view *tokens; /* [vocab_size] raw bytes; data NULL where an id has none; owned */
    int vocab_size;
    int32_t byte_ids[256];
    struct idmap merges;      /* left << 32 | right -> rank << 32 | merged id */
    struct idmap by_bytes;    /* hash of a token's bytes -> id; only with ignore_merges */
    char **merge_texts;       /* "a b" in byte-level characters, by rank: for saving; owned */
    int merge_count;
    struct added_token *added;
    int added_count;
    bool normalize_nfc, ignore_merges;
    char *pattern;            /* regular expression that cuts pieces */
    pcre2_code *compiled;
};

extern const char PATTERN_QWEN2[], PATTERN_GPT2[];
extern const char END_OF_TEXT[];

struct tokenizer *tokenizer_new(int vocab_size);
enum status tokenizer_set_pattern(struct tokenizer *tokenizer, const char *label, const char *pattern) MUST_USE;
void tokenizer_set_token(struct tokenizer *tokenizer, int32_t id, const char *bytes, size_t size);
void tokenizer_add_special(struct tokenizer *tokenizer, const char *content, int32_t id, bool special);

/* Call piece(context, data, size) for each piece of valid UTF-8 text, in order. */
enum status tokenizer_cut(const struct tokenizer *tokenizer, const char *text, size_t size,
                          void (*piece)(void *context, const char *data, size_t size), void *context) MUST_USE;

/* NFC of valid UTF-8, in fresh memory; NULL where the text is its own NFC for sure (ASCII). */
enum status tokenizer_normalize(const struct tokenizer *tokenizer, const char *text, size_t size, char **out,
                                size_t *out_size) MUST_USE;
