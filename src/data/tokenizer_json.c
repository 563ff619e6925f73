/* tokenizer.json: reading what Hugging Face wrote, writing what it reads. */
#include "data/tokenizer_private.h"

#include "base/file.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/memory.h"
#include "data/utf8.h"
#include <stdlib.h>
#include <string.h>

enum { TOKENIZER_JSON_BYTES_MAX = 64 << 20 };

/* ---- reading --------------------------------------------------------------------------------------------------------- */

static const char *type_of(const json_t *object) {
    const char *type = json_string_value(json_object_get(object, "type"));
    return type ? type : "";
}

static bool is_true(const json_t *object, const char *key, bool missing) {
    const json_t *member = json_object_get(object, key);
    return member ? json_is_true(member) : missing;
}

static enum status read_normalizer(struct tokenizer *t, const char *path, const json_t *normalizer) {
    if (!normalizer || json_is_null(normalizer))
        return STATUS_OK;
    if (strcmp(type_of(normalizer), "NFC") != 0)
        return status_fail(STATUS_FORMAT, "%s: normalizer \"%.40s\" is not supported, only NFC or none", path,
                           type_of(normalizer));
    t->normalize_nfc = true;
    return STATUS_OK;
}

static enum status read_byte_level(const char *path, const json_t *part) {
    if (strcmp(type_of(part), "ByteLevel") != 0)
        return status_fail(STATUS_FORMAT, "%s: pre_tokenizer \"%.40s\" is not supported", path, type_of(part));
    if (is_true(part, "add_prefix_space", true))
        return status_fail(STATUS_FORMAT, "%s: a ByteLevel pre_tokenizer with add_prefix_space is not supported", path);
    return STATUS_OK;
}

static enum status read_split(struct tokenizer *t, const char *path, const json_t *split) {
    const char *regex = json_string_value(json_object_get(json_object_get(split, "pattern"), "Regex"));
    const char *behavior = json_string_value(json_object_get(split, "behavior"));
    if (strcmp(type_of(split), "Split") != 0 || !regex || !behavior || strcmp(behavior, "Isolated") != 0 ||
        is_true(split, "invert", false))
        return status_fail(STATUS_FORMAT,
                           "%s: pre_tokenizer: only Split by Regex, behavior Isolated, not inverted is supported", path);
    return tokenizer_set_pattern(t, path, regex);
}

static enum status read_pre_tokenizer(struct tokenizer *t, const char *path, const json_t *pre) {
    if (strcmp(type_of(pre), "Sequence") != 0) {
        TRY(read_byte_level(path, pre));
        if (!is_true(pre, "use_regex", true))
            return status_fail(STATUS_FORMAT, "%s: a pre_tokenizer that does not cut is not supported", path);
        return tokenizer_set_pattern(t, path, PATTERN_GPT2);
    }
    const json_t *parts = json_object_get(pre, "pretokenizers"), *last = json_array_get(parts, 1);
    if (json_array_size(parts) != 2)
        return status_fail(STATUS_FORMAT, "%s: pre_tokenizer: only Split followed by ByteLevel is supported", path);
    TRY(read_byte_level(path, last));
    if (is_true(last, "use_regex", true))
        return status_fail(STATUS_FORMAT, "%s: pre_tokenizer: ByteLevel after Split must not cut again", path);
    return read_split(t, path, json_array_get(parts, 0));
}

static enum status check_id(const char *path, const json_t *id, const char *token) {
    if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) >= VOCAB_MAX)
        return status_fail(STATUS_FORMAT, "%s: the id of token \"%.40s\" is not a whole number from 0 to %d", path, token,
                           VOCAB_MAX - 1);
    return STATUS_OK;
}

/* The highest id and one, over vocabulary and added tokens. */
static enum status measure_vocabulary(const char *path, json_t *vocab, const json_t *added, int *size) {
    const char *token;
    json_t *value;
    size_t i;
    json_int_t highest = -1;
    json_object_foreach(vocab, token, value) {
        TRY(check_id(path, value, token));
        highest = json_integer_value(value) > highest ? json_integer_value(value) : highest;
    }
    json_array_foreach((json_t *)(uintptr_t)added, i, value) {
        const json_t *id = json_object_get(value, "id");
        TRY(check_id(path, id, "added"));
        highest = json_integer_value(id) > highest ? json_integer_value(id) : highest;
    }
    *size = (int)highest + 1;
    return STATUS_OK;
}

/* The tokens of single bytes: those of the alphabet, not others that happen to have one byte. */
static enum status read_bytes(struct tokenizer *t, const char *path, const json_t *vocab) {
    for (int byte = 0; byte < 256; byte++) {
        struct text character = {0};
        char single = (char)byte;
        byte_level_encode(&single, 1, &character);
        const json_t *id = json_object_get(vocab, text_string(&character));
        text_release(&character);
        if (!id)
            return status_fail(STATUS_FORMAT, "%s: the vocabulary has no token for byte %d; it is not byte level", path,
                               byte);
        t->byte_ids[byte] = (int32_t)json_integer_value(id);
    }
    return STATUS_OK;
}

static enum status read_vocabulary(struct tokenizer *t, const char *path, json_t *vocab) {
    const char *token;
    json_t *value;
    struct text bytes = {0};
    enum status status = STATUS_OK;
    json_object_foreach(vocab, token, value) {
        int32_t id = (int32_t)json_integer_value(value);
        text_clear(&bytes);
        byte_level_decode(token, strlen(token), &bytes);
        if (t->tokens[id].data) {
            status = status_fail(STATUS_FORMAT, "%s: two tokens have id %d", path, id);
            break;
        }
        tokenizer_set_token(t, id, text_string(&bytes), bytes.size);
    }
    text_release(&bytes);
    TRY(status);
    return read_bytes(t, path, vocab);
}

static enum status find_in_vocabulary(const char *path, const json_t *vocab, const char *token, size_t size, int32_t *id) {
    const json_t *value = json_object_getn(vocab, token, size);
    if (!value)
        return status_fail(STATUS_FORMAT, "%s: a merge speaks of \"%.*s\", which is not in the vocabulary", path,
                           (int)(size < 40 ? size : 40), token);
    *id = (int32_t)json_integer_value(value);
    return STATUS_OK;
}

/* A merge is "a b" or ["a", "b"]; *text becomes "a b", *left_size the size of a. */
static enum status read_merge_text(const char *path, const json_t *merge, char **text, size_t *left_size) {
    const char *whole = json_string_value(merge);
    const char *left = json_string_value(json_array_get(merge, 0)), *right = json_string_value(json_array_get(merge, 1));
    const char *space = whole ? strchr(whole, ' ') : NULL;
    if (space) {
        *text = memory_copy_string(whole);
        *left_size = (size_t)(space - whole);
        return STATUS_OK;
    }
    if (!left || !right || json_array_size(merge) != 2)
        return status_fail(STATUS_FORMAT, "%s: a merge is neither \"a b\" nor [\"a\", \"b\"]", path);
    *text = text_format("%s %s", left, right);
    *left_size = strlen(left);
    return STATUS_OK;
}

static enum status add_merge(struct tokenizer *t, const char *path, const json_t *vocab, const char *text,
                             size_t left_size) {
    int32_t left = 0, right = 0, merged = 0;
    size_t right_size = strlen(text) - left_size - 1;
    char *joined = text_format("%.*s%s", (int)left_size, text, text + left_size + 1);
    enum status status = find_in_vocabulary(path, vocab, text, left_size, &left);
    if (status == STATUS_OK)
        status = find_in_vocabulary(path, vocab, text + left_size + 1, right_size, &right);
    if (status == STATUS_OK)
        status = find_in_vocabulary(path, vocab, joined, left_size + right_size, &merged);
    free(joined);
    TRY(status);
    uint64_t rank = (uint64_t)t->merge_count - 1;
    idmap_at(&t->merges, (uint64_t)(uint32_t)left << 32 | (uint32_t)right, rank << 32 | (uint32_t)merged);
    return STATUS_OK;
}

static enum status read_merges(struct tokenizer *t, const char *path, const json_t *vocab, const json_t *merges) {
    if (!json_is_array(merges) || json_array_size(merges) > VOCAB_MAX)
        return status_fail(STATUS_FORMAT, "%s: \"merges\" is not a list", path);
    TRY(memory_alloc(&t->merge_texts, json_array_size(merges), sizeof *t->merge_texts));
    for (size_t i = 0; i < json_array_size(merges); i++) {
        size_t left_size = 0;
        char *text = NULL;
        TRY(read_merge_text(path, json_array_get(merges, i), &text, &left_size));
        t->merge_texts[t->merge_count++] = text;
        TRY(add_merge(t, path, vocab, text, left_size));
    }
    return STATUS_OK;
}

static enum status read_added(struct tokenizer *t, const char *path, const json_t *added) {
    if (json_array_size(added) > ADDED_TOKENS_MAX)
        return status_fail(STATUS_FORMAT, "%s: more than %d added tokens", path, ADDED_TOKENS_MAX);
    for (size_t i = 0; i < json_array_size(added); i++) {
        const json_t *token = json_array_get(added, i);
        const char *content = json_string_value(json_object_get(token, "content"));
        int32_t id = (int32_t)json_integer_value(json_object_get(token, "id"));
        if (!content || !*content)
            return status_fail(STATUS_FORMAT, "%s: an added token has no content", path);
        if (is_true(token, "lstrip", false) || is_true(token, "rstrip", false) || is_true(token, "single_word", false))
            return status_fail(STATUS_FORMAT, "%s: added token \"%.40s\": lstrip, rstrip and single_word are not supported",
                               path, content);
        tokenizer_add_special(t, content, id, is_true(token, "special", false));
        if (!t->tokens[id].data)
            tokenizer_set_token(t, id, content, strlen(content));
    }
    return STATUS_OK;
}

static void index_bytes(struct tokenizer *t) {
    for (int id = 0; id < t->vocab_size; id++)
        if (t->tokens[id].data)
            idmap_at(&t->by_bytes, hash_bytes(t->tokens[id].data, t->tokens[id].size, 0) >> 1, (uint64_t)id);
}

static enum status read_parts(struct tokenizer *t, const char *path, const json_t *root, json_t *vocab) {
    const json_t *model = json_object_get(root, "model");
    TRY(read_normalizer(t, path, json_object_get(root, "normalizer")));
    TRY(read_pre_tokenizer(t, path, json_object_get(root, "pre_tokenizer")));
    TRY(read_vocabulary(t, path, vocab));
    TRY(read_merges(t, path, vocab, json_object_get(model, "merges")));
    TRY(read_added(t, path, json_object_get(root, "added_tokens")));
    t->ignore_merges = is_true(model, "ignore_merges", false);
    if (t->ignore_merges)
        index_bytes(t);
    return STATUS_OK;
}

/* Marks within or behind a word, of pieces that bytes alone do not make. */
static enum status refuse_affixes(const char *path, const json_t *model) {
    const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    for (size_t i = 0; i < sizeof affixes / sizeof *affixes; i++) {
        const char *affix = json_string_value(json_object_get(model, affixes[i]));
        if (affix && *affix)
            return status_fail(STATUS_FORMAT, "%s: a BPE with %s \"%.40s\" is not supported", path, affixes[i], affix);
    }
    return STATUS_OK;
}

static enum status read_root(const char *path, const json_t *root, struct tokenizer **out) {
    const json_t *model = json_object_get(root, "model");
    json_t *vocab = json_object_get(model, "vocab");
    int size;
    const char *type = json_object_get(model, "type") ? type_of(model) : "BPE"; /* old files leave it out */
    if (!json_is_object(vocab) || strcmp(type, "BPE") != 0)
        return status_fail(STATUS_FORMAT, "%s: model \"%.40s\" is not supported, only BPE", path, type);
    if (is_true(model, "byte_fallback", false))
        return status_fail(STATUS_FORMAT, "%s: a BPE with byte_fallback is not byte level and not supported", path);
    TRY(refuse_affixes(path, model));
    TRY(measure_vocabulary(path, vocab, json_object_get(root, "added_tokens"), &size));
    *out = tokenizer_new(size);
    enum status status = read_parts(*out, path, root, vocab);
    if (status != STATUS_OK) {
        tokenizer_destroy(*out);
        *out = NULL;
    }
    return status;
}

enum status tokenizer_open(const char *path, struct tokenizer **out) {
    json_t *root;
    TRY(json_read_file(path, TOKENIZER_JSON_BYTES_MAX, &root));
    enum status status = read_root(path, root, out);
    json_decref(root);
    return status;
}

/* ---- writing ---------------------------------------------------------------------------------------------------------- */

static bool is_added(const struct tokenizer *t, int32_t id) {
    for (int i = 0; i < t->added_count; i++)
        if (t->added[i].id == id)
            return true;
    return false;
}

static json_t *make_model(const struct tokenizer *t) {
    json_t *vocab = json_object(), *merges = json_array();
    struct text characters = {0};
    for (int32_t id = 0; id < t->vocab_size; id++) {
        if (!t->tokens[id].data || is_added(t, id))
            continue;
        text_clear(&characters);
        byte_level_encode(t->tokens[id].data, t->tokens[id].size, &characters);
        json_object_set_new(vocab, text_string(&characters), json_integer(id));
    }
    text_release(&characters);
    for (int i = 0; i < t->merge_count; i++)
        json_array_append_new(merges, json_string(t->merge_texts[i]));
    return json_pack("{s:s,s:n,s:n,s:n,s:n,s:b,s:b,s:b,s:o,s:o}", "type", "BPE", "dropout", "unk_token",
                     "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", 0, "byte_fallback", 0,
                     "ignore_merges", t->ignore_merges, "vocab", vocab, "merges", merges);
}

static json_t *make_added(const struct tokenizer *t) {
    json_t *added = json_array();
    for (int i = 0; i < t->added_count; i++)
        json_array_append_new(added, json_pack("{s:i,s:s,s:b,s:b,s:b,s:b,s:b}", "id", t->added[i].id, "content",
                                               t->added[i].content, "single_word", 0, "lstrip", 0, "rstrip", 0,
                                               "normalized", 0, "special", t->added[i].special));
    return added;
}

static json_t *make_byte_level(bool use_regex) {
    return json_pack("{s:s,s:b,s:b,s:b}", "type", "ByteLevel", "add_prefix_space", 0, "trim_offsets", 0, "use_regex",
                     use_regex);
}

static json_t *make_pre_tokenizer(const struct tokenizer *t) {
    if (strcmp(t->pattern, PATTERN_GPT2) == 0)
        return make_byte_level(true);
    json_t *split = json_pack("{s:s,s:{s:s},s:s,s:b}", "type", "Split", "pattern", "Regex", t->pattern, "behavior",
                              "Isolated", "invert", 0);
    return json_pack("{s:s,s:[o,o]}", "type", "Sequence", "pretokenizers", split, make_byte_level(false));
}

enum status tokenizer_save(const struct tokenizer *t, const char *path) {
    json_t *normalizer = t->normalize_nfc ? json_pack("{s:s}", "type", "NFC") : json_null();
    json_t *root = json_pack("{s:s,s:n,s:n,s:o,s:o,s:o,s:n,s:o,s:o}", "version", "1.0", "truncation", "padding",
                             "added_tokens", make_added(t), "normalizer", normalizer, "pre_tokenizer",
                             make_pre_tokenizer(t), "post_processor", "decoder", make_byte_level(false), "model",
                             make_model(t));
    CHECK(root != NULL);
    enum status status = json_write_file(path, root);
    json_decref(root);
    return status;
}

enum status tokenizer_save_config(const struct tokenizer *t, const char *path, int64_t model_max_length) {
    json_t *config = json_pack("{s:s,s:I,s:b,s:b}", "tokenizer_class", "PreTrainedTokenizerFast", "model_max_length",
                               (json_int_t)model_max_length, "clean_up_tokenization_spaces", 0, "add_prefix_space", 0);
    if (tokenizer_end_of_text(t) >= 0) {
        json_object_set_new(config, "bos_token", json_string(END_OF_TEXT));
        json_object_set_new(config, "eos_token", json_string(END_OF_TEXT));
        json_object_set_new(config, "pad_token", json_string(END_OF_TEXT));
    }
    enum status status = json_write_draft(path, config);
    json_decref(config);
    return status;
}
