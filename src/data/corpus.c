#include "data/corpus.h"

#include "base/hash.h"
#include "base/json.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/threads.h"
#include "data/token_shard.h"
#include "data/utf8.h"
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    CORPUS_VERSION = 1,
    BLOCK_BYTES = 32 << 10,     /* a block that is held out or not */
    BLOCK_BYTES_MIN = 1 << 10,
    BLOCKS_WANTED = 40,         /* of a file: then a tenth is several places, not one */
    HELD_OUT_EVERY = 10,
    HELD_OUT_FIRST = 4,
    CORPUS_JSON_BYTES_MAX = 256 << 20,
};
static const uint64_t TEXT_BYTES_MAX = UINT64_C(8) << 30;

/* A block of a file: its text, where it belongs, its tokens. */
struct block {
    struct text_view text;
    int domain;
    bool held_out;
    struct token_list tokens;
    enum status status;
    char *message; /* of a failure, from the thread that met it */
};

struct preparation {
    const struct corpus_options *options;
    struct text_list domains;
    char **files; /* contents, one a domain or validation file */
    size_t file_count;
    struct block *blocks;
    size_t block_count, short_blocks; /* short_blocks: of files too short to have a tenth */
    struct tokenizer *tokenizer;
    uint64_t source_hash;
};

/* ---- reading text ---------------------------------------------------------------------------------------------------- */

enum status corpus_read_text(const char *path, char **data, size_t *size) {
    TRY(file_read(path, TEXT_BYTES_MAX, data, size));
    enum status status = STATUS_OK;
    const char *zero = memchr(*data, '\0', *size);
    size_t valid = utf8_valid_prefix(*data, *size);
    if (*size == 0)
        status = status_fail(STATUS_FORMAT, "%s: is empty", path);
    else if (zero)
        status = status_fail(STATUS_FORMAT, "%s: is not a text file: byte %zu is zero", path, (size_t)(zero - *data));
    else if (valid < *size)
        status = status_fail(STATUS_FORMAT, "%s: is not UTF-8 at byte %zu; convert it first", path, valid);
    if (status != STATUS_OK)
        free(*data);
    return status;
}

/* Where a block that should have `wanted` bytes ends: after an empty line, else after a line, else between characters. */
static size_t block_end(const char *text, size_t size, size_t wanted) {
    if (wanted >= size)
        return size;
    const char *from = text + wanted, *limit = text + (2 * wanted < size ? 2 * wanted : size);
    const char *paragraph = memmem(from, (size_t)(limit - from), "\n\n", 2);
    if (paragraph)
        return (size_t)(paragraph - text) + 2;
    const char *line = memchr(from, '\n', (size_t)(limit - from));
    if (line)
        return (size_t)(line - text) + 1;
    while (from < text + size && ((unsigned char)*from & 0xC0) == 0x80)
        from++;
    return (size_t)(from - text);
}

/* Of a file too short to have a tenth the blocks are counted on from one such file to the next. */
static void hold_out_tenth(struct preparation *p, size_t first) {
    size_t own = 0, *index = p->block_count - first > HELD_OUT_FIRST ? &own : &p->short_blocks;
    for (size_t i = first; i < p->block_count; i++)
        p->blocks[i].held_out = (*index)++ % HELD_OUT_EVERY == HELD_OUT_FIRST;
}

static void add_blocks(struct preparation *p, const char *text, size_t size, int domain, bool cut, bool held_out) {
    size_t wanted = size / BLOCKS_WANTED, first = p->block_count;
    wanted = wanted > BLOCK_BYTES ? BLOCK_BYTES : wanted < BLOCK_BYTES_MIN ? BLOCK_BYTES_MIN : wanted;
    while (size > 0) {
        size_t end = block_end(text, size, wanted);
        p->blocks = realloc(p->blocks, (p->block_count + 1) * sizeof *p->blocks);
        CHECK(p->blocks != NULL);
        p->blocks[p->block_count++] = (struct block){.text = {text, end}, .domain = domain, .held_out = held_out};
        text += end;
        size -= end;
    }
    if (cut)
        hold_out_tenth(p, first);
}

/* "texts/moby-dick.txt" is the domain "moby-dick"; the same name twice is the same domain. */
static int find_domain(struct preparation *p, const char *path) {
    char *name = memory_copy_string(path_name(path)), *dot = strrchr(name, '.');
    if (dot && dot != name)
        *dot = '\0';
    size_t index = 0;
    while (index < p->domains.count && strcmp(p->domains.items[index], name) != 0)
        index++;
    if (index == p->domains.count)
        text_list_add(&p->domains, name);
    free(name);
    return (int)index;
}

static enum status read_files(struct preparation *p, const char *patterns, bool cut, bool held_out) {
    struct text_list paths;
    TRY(file_glob(patterns, &paths));
    enum status status = STATUS_OK;
    for (size_t i = 0; i < paths.count && status == STATUS_OK; i++) {
        char *data = NULL;
        size_t size = 0;
        status = corpus_read_text(paths.items[i], &data, &size);
        if (status != STATUS_OK)
            break;
        p->files = realloc(p->files, (p->file_count + 1) * sizeof *p->files);
        CHECK(p->files != NULL);
        p->files[p->file_count++] = data;
        p->source_hash = hash_bytes(data, size, p->source_hash + held_out);
        add_blocks(p, data, size, find_domain(p, paths.items[i]), cut, held_out);
    }
    text_list_release(&paths);
    return status;
}

static enum status read_sources(struct preparation *p) {
    const struct corpus_options *o = p->options;
    char *settings = text_format("%d %d %d", CORPUS_VERSION, o->valid_patterns != NULL,
                                 o->tokenizer_path ? 0 : o->vocab_size);
    p->source_hash = hash_bytes(settings, strlen(settings), 0);
    free(settings);
    if (o->tokenizer_path) {
        char *data;
        size_t size;
        TRY(file_read(o->tokenizer_path, CORPUS_JSON_BYTES_MAX, &data, &size));
        p->source_hash = hash_bytes(data, size, p->source_hash);
        free(data);
    }
    TRY(read_files(p, o->train_patterns, o->valid_patterns == NULL, false));
    if (o->valid_patterns)
        TRY(read_files(p, o->valid_patterns, false, true));
    return STATUS_OK;
}

/* ---- tokenizing ---------------------------------------------------------------------------------------------------------- */

static enum status get_tokenizer(struct preparation *p) {
    if (p->options->tokenizer_path)
        return tokenizer_open(p->options->tokenizer_path, &p->tokenizer);
    struct text_view *texts;
    size_t count = 0;
    TRY(memory_alloc(&texts, p->block_count, sizeof *texts));
    for (size_t i = 0; i < p->block_count; i++)
        if (!p->blocks[i].held_out)
            texts[count++] = p->blocks[i].text;
    log_info("data    learning a tokenizer of %d tokens", p->options->vocab_size);
    enum status status = tokenizer_train(texts, count, p->options->vocab_size, &p->tokenizer);
    free(texts);
    return status;
}

static void encode_block(void *context, int64_t index) {
    struct preparation *p = context;
    struct block *block = &p->blocks[index];
    int end_of_text = tokenizer_end_of_text(p->tokenizer);
    if (end_of_text >= 0)
        token_list_add(&block->tokens, end_of_text);
    block->status = tokenizer_encode(p->tokenizer, block->text.data, block->text.size, false, &block->tokens);
    if (block->status != STATUS_OK)
        block->message = memory_copy_string(status_text());
}

static enum status encode_all(struct preparation *p) {
    parallel_for((int64_t)p->block_count, encode_block, p);
    for (size_t i = 0; i < p->block_count; i++)
        if (p->blocks[i].status != STATUS_OK)
            return status_fail(p->blocks[i].status, "%s: %s", p->domains.items[p->blocks[i].domain],
                               p->blocks[i].message);
    return STATUS_OK;
}

/* Write one split; blocks that are neighbours in their file become one document each. */
static enum status write_split(const struct preparation *p, bool held_out, json_t *root) {
    const char *name = held_out ? "valid" : "train";
    int64_t token_count = 0, byte_count = 0, done = 0;
    for (size_t i = 0; i < p->block_count; i++)
        if (p->blocks[i].held_out == held_out)
            token_count += (int64_t)p->blocks[i].tokens.count;
    int32_t *tokens;
    TRY(memory_alloc(&tokens, (size_t)token_count, sizeof *tokens));
    json_t *documents = json_array();
    for (size_t i = 0; i < p->block_count; i++) {
        const struct block *block = &p->blocks[i];
        if (block->held_out != held_out)
            continue;
        memcpy(tokens + done, block->tokens.ids, block->tokens.count * sizeof *tokens);
        json_array_append_new(documents, json_pack("[i,I,I,I]", block->domain, (json_int_t)done,
                                                   (json_int_t)block->tokens.count, (json_int_t)block->text.size));
        done += (int64_t)block->tokens.count;
        byte_count += (int64_t)block->text.size;
    }
    json_object_set_new(root, name, json_pack("{s:I,s:I,s:o}", "tokens", (json_int_t)token_count, "bytes",
                                              (json_int_t)byte_count, "documents", documents));
    char *path = text_format("%s/%s.tokens", p->options->directory, name);
    enum status status = token_shard_write(path, tokens, token_count, tokenizer_vocab_size(p->tokenizer));
    free(path);
    free(tokens);
    return status;
}

enum { HASH_DIGITS = 16 };

static const char *write_hash(char text[HASH_DIGITS + 1], uint64_t hash) {
    snprintf(text, HASH_DIGITS + 1, "%016" PRIx64, hash);
    return text;
}

static enum status hash_file(const char *path, char text[HASH_DIGITS + 1]) {
    char *data;
    size_t size;
    TRY(file_read(path, CORPUS_JSON_BYTES_MAX, &data, &size));
    write_hash(text, hash_bytes(data, size, 0));
    free(data);
    return STATUS_OK;
}

static enum status save_tokenizer(const struct preparation *p, json_t *root) {
    char *path = path_join(p->options->directory, "tokenizer.json"), hash[HASH_DIGITS + 1];
    enum status status = tokenizer_save(p->tokenizer, path);
    if (status == STATUS_OK)
        status = hash_file(path, hash);
    if (status == STATUS_OK)
        json_object_set_new(root, "tokenizer", json_string(hash));
    free(path);
    return status;
}

static enum status write_all(const struct preparation *p) {
    char *index_path = path_join(p->options->directory, "corpus.json"), hash[HASH_DIGITS + 1];
    json_t *root = json_object(), *domains = json_array();
    for (size_t i = 0; i < p->domains.count; i++)
        json_array_append_new(domains, json_name(p->domains.items[i]));
    json_object_set_new(root, "version", json_integer(CORPUS_VERSION));
    json_object_set_new(root, "source", json_string(write_hash(hash, p->source_hash)));
    json_object_set_new(root, "vocab_size", json_integer(tokenizer_vocab_size(p->tokenizer)));
    json_object_set_new(root, "domains", domains);
    enum status status = save_tokenizer(p, root);
    if (status == STATUS_OK)
        status = write_split(p, false, root);
    if (status == STATUS_OK)
        status = write_split(p, true, root);
    if (status == STATUS_OK) /* last: a corpus without it is not there */
        status = json_write_file(index_path, root);
    json_decref(root);
    free(index_path);
    return status;
}

/* *other: there is one, of other text or options. */
static bool is_made(const struct preparation *p, bool *other) {
    struct corpus corpus;
    json_t *root;
    char *path = path_join(p->options->directory, "corpus.json"), hash[HASH_DIGITS + 1];
    write_hash(hash, p->source_hash);
    bool same = file_exists(path) && json_read_file(path, CORPUS_JSON_BYTES_MAX, &root) == STATUS_OK;
    *other = false;
    if (same) {
        const char *stored = json_string_value(json_object_get(root, "source"));
        same = stored && strcmp(stored, hash) == 0;
        *other = stored && !same;
        json_decref(root);
    }
    free(path);
    if (!same || corpus_open(&corpus, p->options->directory) != STATUS_OK)
        return false;
    corpus_close(&corpus);
    return true;
}

static enum status prepare(struct preparation *p, bool *reused) {
    bool other;
    TRY(read_sources(p));
    *reused = is_made(p, &other);
    if (*reused)
        return STATUS_OK;
    if (other && p->options->keep)
        return status_fail(STATUS_USAGE, "%s was made of other text, or another tokenizer, than is named now, and the run has "
                           "learnt from it: name that again, or choose another --run.directory", p->options->directory);
    TRY(get_tokenizer(p));
    TRY(encode_all(p));
    TRY(directory_make(p->options->directory));
    return write_all(p);
}

enum status corpus_prepare(const struct corpus_options *options, bool *reused) {
    struct preparation p = {.options = options};
    *reused = false;
    enum status status = prepare(&p, reused);
    for (size_t i = 0; i < p.block_count; i++) {
        token_list_release(&p.blocks[i].tokens);
        free(p.blocks[i].message);
    }
    for (size_t i = 0; i < p.file_count; i++)
        free(p.files[i]);
    free(p.files);
    free(p.blocks);
    text_list_release(&p.domains);
    tokenizer_destroy(p.tokenizer);
    return status;
}

/* ---- opening ---------------------------------------------------------------------------------------------------------------- */

static enum status open_document(struct corpus *c, struct corpus_split *split, const char *path, const json_t *row) {
    struct corpus_document *document = &split->documents[split->document_count];
    document->domain = (int)json_integer_value(json_array_get(row, 0));
    document->first_token = json_integer_value(json_array_get(row, 1));
    document->token_count = json_integer_value(json_array_get(row, 2));
    document->byte_count = json_integer_value(json_array_get(row, 3));
    int64_t expected = split->document_count ? document[-1].first_token + document[-1].token_count : 0;
    if (document->domain < 0 || (size_t)document->domain >= c->domains.count || document->first_token != expected ||
        document->token_count < 0 || document->token_count > split->shard.token_count - expected ||
        document->byte_count < 0)
        return status_fail(STATUS_FORMAT, "%s: document %lld does not fit its shard", path,
                           (long long)split->document_count);
    split->document_count++;
    return STATUS_OK;
}

static enum status open_split(struct corpus *c, struct corpus_split *split, const char *directory, const char *name,
                              const char *index_path, const json_t *root) {
    const json_t *described = json_object_get(root, name), *documents = json_object_get(described, "documents");
    char *path = text_format("%s/%s.tokens", directory, name);
    enum status status = token_shard_open(&split->shard, path, c->vocab_size);
    free(path);
    TRY(status);
    split->token_count = split->shard.token_count;
    split->byte_count = json_integer_value(json_object_get(described, "bytes"));
    TRY(memory_alloc(&split->documents, json_array_size(documents), sizeof *split->documents));
    for (size_t i = 0; i < json_array_size(documents); i++)
        TRY(open_document(c, split, index_path, json_array_get(documents, i)));
    return STATUS_OK;
}

/* A corpus of before this was noted has no hash of it. */
static enum status check_tokenizer(const struct corpus *c, const json_t *root) {
    const char *noted = json_string_value(json_object_get(root, "tokenizer"));
    char found[HASH_DIGITS + 1];
    if (!noted)
        return STATUS_OK;
    TRY(hash_file(c->tokenizer_path, found));
    if (strcmp(noted, found) != 0)
        return status_fail(STATUS_FORMAT, "%s: is damaged, or not that of the text beside it; remove its directory to "
                           "prepare the data again", c->tokenizer_path);
    return STATUS_OK;
}

static enum status open_all(struct corpus *c, const char *directory, const char *path, const json_t *root) {
    struct json_source source = {path, root};
    int64_t version = 0, vocab_size = 0;
    TRY(json_get_integer(source, "version", true, CORPUS_VERSION, CORPUS_VERSION, &version));
    TRY(json_get_integer(source, "vocab_size", true, 1, 1 << 24, &vocab_size));
    c->vocab_size = (int)vocab_size;
    TRY(check_tokenizer(c, root));
    const json_t *domains = json_object_get(root, "domains");
    for (size_t i = 0; i < json_array_size(domains); i++) {
        const char *name = json_string_value(json_array_get(domains, i));
        text_list_add(&c->domains, name ? name : "?");
    }
    TRY(open_split(c, &c->train, directory, "train", path, root));
    return open_split(c, &c->valid, directory, "valid", path, root);
}

enum status corpus_open(struct corpus *c, const char *directory) {
    *c = (struct corpus){.tokenizer_path = path_join(directory, "tokenizer.json")};
    char *path = path_join(directory, "corpus.json");
    json_t *root;
    enum status status = json_read_file(path, CORPUS_JSON_BYTES_MAX, &root);
    if (status == STATUS_OK) {
        status = open_all(c, directory, path, root);
        json_decref(root);
    }
    free(path);
    if (status != STATUS_OK)
        corpus_close(c);
    return status;
}

void corpus_close(struct corpus *c) {
    token_shard_close(&c->train.shard);
    token_shard_close(&c->valid.shard);
    free(c->train.documents);
    free(c->valid.documents);
    free(c->tokenizer_path);
    text_list_release(&c->domains);
    *c = (struct corpus){0};
}
