/* Text files to token shards: cut into documents, a tenth held out, tokenized once and kept.
 *
 * A corpus directory holds tokenizer.json, train.tokens, valid.tokens and corpus.json. Each input file is a domain, named
 * after it. A document is a run of text that lies together in the file; in the shard <|endoftext|> stands before it.
 */
#pragma once

#include "base/file.h"
#include "data/tokenizer.h"

struct corpus_options {
    const char *train_patterns; /* file_glob */
    const char *valid_patterns; /* NULL: every tenth block of each training file is held out, of short files together */
    const char *tokenizer_path; /* NULL: one is trained, on the training split only */
    int vocab_size;             /* of a tokenizer that is trained */
    const char *directory;
    uint64_t seed;              /* of nothing yet but the name of the result */
    bool keep;                  /* what is there was learnt from: it is not made anew of other text */
};

/* Make the corpus. *reused: a former call made it from the same files and options, nothing was done. Refuses, naming the
 * file: missing, empty, not UTF-8 or with zero bytes (with the offset). */
enum status corpus_prepare(const struct corpus_options *options, bool *reused) MUST_USE;

struct token_shard {
    struct file_map map;
    int bytes_per_token; /* 2 or 4 */
    int64_t token_count;
};

struct corpus_document {
    int domain; /* index into corpus.domains */
    int64_t first_token, token_count; /* its <|endoftext|> included */
    int64_t byte_count;               /* of its text */
};

struct corpus_split {
    struct token_shard shard;
    int64_t token_count, byte_count;
    struct corpus_document *documents;
    int64_t document_count;
};

struct corpus {
    struct corpus_split train, valid;
    struct text_list domains;
    char *tokenizer_path;
    int vocab_size;
};

/* Open what corpus_prepare made, checking hashes, also the tokenizer's, and that every token is below the vocabulary's size. */
enum status corpus_open(struct corpus *corpus, const char *directory) MUST_USE;
void corpus_close(struct corpus *corpus);

/* Tokens first .. first+count-1, which must exist, as ids. */
void token_shard_copy(const struct token_shard *shard, int64_t first, int64_t count, int32_t *out);

/* A whole text file, checked to be non-empty valid UTF-8 without zero bytes. The caller frees *data. */
enum status corpus_read_text(const char *path, char **data, size_t *size) MUST_USE;
