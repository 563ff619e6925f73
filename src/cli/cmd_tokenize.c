#include "cli/cli.h"

#include "base/json.h"
#include "base/log.h"
#include "base/memory.h"
#include "cli/arguments.h"
#include "cli/common.h"
#include "data/corpus.h"
#include "infer/load.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct tokenize_flags {
    const char *data, *valid, *tokenizer, *out, *model, *text;
    int64_t vocab_size;
    bool pieces, json, quiet;
};

static void print_split(const char *name, const struct corpus_split *split) {
    char tokens[32], bytes[32];
    if (split->token_count == 0)
        printf("%-8s %14s tokens\n", name, "0");
    else
        printf("%-8s %14s tokens %12s  %.3f bytes a token\n", name, text_count(tokens, split->token_count),
           text_bytes(bytes, (double)split->byte_count), (double)split->byte_count / (double)split->token_count);
}

/* Text files into a corpus directory. */
static enum status prepare(const struct tokenize_flags *f) {
    struct corpus_options options = {f->data, f->valid, f->tokenizer, (int)f->vocab_size, f->out, 0, false};
    struct corpus corpus;
    bool reused;
    if (!f->out)
        return status_fail(STATUS_USAGE, "--out DIR is missing: where the tokens go");
    if (f->vocab_size < 257 || f->vocab_size > 1 << 20)
        return status_fail(STATUS_USAGE, "--vocab-size must lie in 257..1048576");
    TRY(corpus_prepare(&options, &reused));
    TRY(corpus_open(&corpus, f->out));
    if (f->json) {
        json_t *object = json_pack("{s:o,s:i,s:I,s:I}", "directory", json_name(f->out), "vocab_size", corpus.vocab_size,
                                   "train_tokens", (json_int_t)corpus.train.token_count, "valid_tokens",
                                   (json_int_t)corpus.valid.token_count);
        json_dumpf(object, stdout, JSON_COMPACT | JSON_PRESERVE_ORDER);
        putchar('\n');
        json_decref(object);
    } else {
        print_split("train", &corpus.train);
        print_split("held out", &corpus.valid);
        printf("%s: %d tokens in the vocabulary%s\n", f->out, corpus.vocab_size, reused ? " (was there already)" : "");
    }
    corpus_close(&corpus);
    return STATUS_OK;
}

static void print_tokens(const struct tokenize_flags *f, const struct tokenizer *tokenizer,
                         const struct token_list *tokens) {
    const char *separator = f->pieces ? "\n" : " ";
    if (f->json)
        putchar('[');
    for (size_t i = 0; i < tokens->count; i++) {
        struct text_view piece = tokenizer_token(tokenizer, tokens->ids[i]);
        printf("%s%d", i == 0 ? "" : f->json ? "," : separator, tokens->ids[i]);
        if (f->pieces && !f->json)
            printf("\t%.*s", (int)piece.size, piece.data);
    }
    printf(f->json ? "]\n" : "\n");
}

/* The ids of a text. */
static enum status encode(const struct tokenize_flags *f) {
    char *path = NULL, *directory = NULL;
    struct tokenizer *tokenizer;
    struct token_list tokens = {0};
    struct text typed = {0};
    if (f->tokenizer)
        path = memory_copy_string(f->tokenizer);
    else
        TRY(model_find(f->model, &directory));
    if (!path)
        path = path_join(directory, "tokenizer.json");
    enum status status = tokenizer_open(path, &tokenizer);
    free(path);
    free(directory);
    TRY(status);
    if (!f->text)
        status = common_read_stdin(&typed);
    const char *text = f->text ? f->text : text_string(&typed);
    if (status == STATUS_OK)
        status = tokenizer_encode(tokenizer, text, f->text ? strlen(text) : typed.size, true, &tokens);
    if (status == STATUS_OK)
        print_tokens(f, tokenizer, &tokens);
    text_release(&typed);
    token_list_release(&tokens);
    tokenizer_destroy(tokenizer);
    return status;
}

enum status cmd_tokenize(int argc, char **argv) {
    struct tokenize_flags f = {.vocab_size = 4096};
    bool help;
    const struct argument known[] = {
        {"data", ARGUMENT_STRING, &f.data, "UTF-8 text files, shell patterns: make a corpus of them"},
        {"valid", ARGUMENT_STRING, &f.valid, "held-out text files; none: a tenth of --data, by block"},
        {"out", ARGUMENT_STRING, &f.out, "directory for tokenizer.json and token shards"},
        {"vocab-size", ARGUMENT_INTEGER, &f.vocab_size, "tokens of the tokenizer that is learnt (4096)"},
        {"tokenizer", ARGUMENT_STRING, &f.tokenizer, "use this tokenizer.json instead of learning one"},
        {"model", ARGUMENT_STRING, &f.model, "print ids with this model's tokenizer"},
        {"text", ARGUMENT_STRING, &f.text, "text to print ids of; none: standard input"},
        {"pieces", ARGUMENT_SWITCH, &f.pieces, "a line an id, with its text"},
        {"json", ARGUMENT_SWITCH, &f.json, "JSON"},
        {"quiet", ARGUMENT_SWITCH, &f.quiet, "no progress"},
    };
    enum { COUNT = sizeof known / sizeof *known };
    struct arguments arguments = {known, COUNT, NULL, NULL, NULL};
    TRY(arguments_parse(arguments, argc, argv, &help));
    if (help) {
        arguments_print_help("tokenize", "--data FILES --out DIR | --model DIR [--text TEXT]", known, COUNT);
        return STATUS_OK;
    }
    log_set_level(f.quiet ? LOG_QUIET : LOG_NORMAL);
    if (f.data)
        return prepare(&f);
    if (!f.model && !f.tokenizer)
        return status_fail(STATUS_USAGE, "--data FILES or --model DIR is missing; see --help");
    return encode(&f);
}
