/* Writing text with a model: keys and values of what was read are kept, so that each new token costs one row. */
#pragma once

#include "data/tokenizer.h"
#include "infer/sample.h"
#include "model/block.h"

struct generator;

/* For sequences of up to `capacity` tokens. Borrows the model. Destroy with generator_destroy. */
enum status generator_create(struct generator **out, const struct model *model, int64_t capacity) MUST_USE;
void generator_destroy(struct generator *generator);

/* Whether single tokens are asked for once and repeated, on a device that can (device/device.h): true until it is told. */
void generator_set_repeats(struct generator *generator, bool repeats);

/* Forget all but the first `length` tokens of the sequence, of which there are as many at least. */
void generator_rewind(struct generator *generator, int64_t length);

/* Tokens of the sequence so far. */
int64_t generator_length(const struct generator *generator);

/* Read tokens after those already read, in chunks; logits f32 [V] of what follows the last of them, borrowed until the
 * next call, on the host. STATUS_USAGE where the capacity would be passed. count >= 1. */
enum status generator_read(struct generator *generator, const int32_t *tokens, int64_t count, float **logits) MUST_USE;

struct generation {
    const struct tokenizer *tokenizer;
    const char *prompt;  /* UTF-8; empty: from the start of a text */
    int64_t max_tokens;
    struct sample_settings sample;
    /* Called with each piece of complete UTF-8; may be NULL. */
    void (*piece)(void *context, const char *text, size_t size);
    void *context;
};

struct generation_result {
    int64_t prompt_tokens, new_tokens;
    bool reached_end, reached_capacity; /* end of text was chosen; the sequence is full */
    double prompt_seconds, new_seconds;
};

/* Start a fresh sequence with the prompt (after <|endoftext|>, as in training) and continue it. */
enum status generator_run(struct generator *generator, const struct generation *generation,
                          struct generation_result *result) MUST_USE;
