#include "infer/generate.h"

#include "base/clock.h"
#include "base/memory.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A recording of a token serves as long as its keys are not more than a whole number of this; it costs about what a token asked
 * for kernel by kernel does. */
enum { CHUNK_TOKENS = 256, BOUND_KEYS = 512 };

struct generator {
    const struct model *model;
    struct workspace *workspace;
    struct attention_cache *caches; /* [L] */
    struct tensor logits;           /* real [1,V] */
    float *host_logits;             /* [V] */
    int64_t capacity;
    struct arena arena;
    /* One token at a time on a device that repeats recordings. */
    const struct device_recorder *recorder; /* NULL: it is asked for each kernel of a token */
    struct repeated *tokens;                /* [bounds of keys] */
    struct tensor next;                     /* i32 [2]: id of the token that comes, and its position */
    struct tensor rope;                     /* real [1,P]: of that position */
    int32_t *host_next;
};

static void take_all(struct generator *g, struct arena *arena) {
    const struct model_config *c = &g->model->config;
    int64_t kv_width = c->num_key_value_heads * c->head_dim;
    g->logits = layer_take(arena, DTYPE_F32, 1, c->vocab_size);
    g->next = layer_take(arena, DTYPE_I32, 2, 1);
    g->rope = layer_take(arena, g->model->rope.dtype, 1, g->model->rope.shape[1]);
    for (int64_t l = 0; l < c->num_hidden_layers; l++)
        g->caches[l] = (struct attention_cache){
            .key = layer_take(arena, g->model->context.compute, g->capacity, kv_width),
            .value = layer_take(arena, g->model->context.compute, g->capacity, kv_width),
            .kept = tensor_rows(g->next, 1, 1),
            .rope = g->rope,
        };
}

static enum status generator_take(struct generator *g) {
    const struct model_config *c = &g->model->config;
    struct workspace_options options = {1, g->capacity < CHUNK_TOKENS ? g->capacity : CHUNK_TOKENS, false, false};
    struct arena counting;
    TRY(memory_alloc(&g->caches, (size_t)c->num_hidden_layers, sizeof *g->caches));
    TRY(memory_alloc(&g->host_logits, (size_t)c->vocab_size, sizeof *g->host_logits));
    TRY(workspace_create(g->model, options, &g->workspace));
    arena_init_counting(&counting);
    take_all(g, &counting);
    TRY(arena_init(&g->arena, g->model->device, counting.used));
    take_all(g, &g->arena);
    if (!g->model->device->recorder)
        return STATUS_OK;
    TRY(memory_alloc(&g->tokens, (size_t)((g->capacity - 1) / BOUND_KEYS + 1), sizeof *g->tokens));
    TRY(g->model->device->alloc_host((void **)&g->host_next, tensor_bytes(g->next)));
    generator_set_repeats(g, true);
    return STATUS_OK;
}

void generator_set_repeats(struct generator *g, bool repeats) {
    g->recorder = repeats && g->tokens ? g->model->device->recorder : NULL;
}

enum status generator_create(struct generator **out, const struct model *model, int64_t capacity) {
    struct generator *g;
    CHECK_OP(capacity, >=, 1);
    CHECK_OP(capacity, <=, model->rope.shape[0]);
    TRY(memory_alloc(&g, 1, sizeof *g));
    g->model = model;
    g->capacity = capacity;
    enum status status = generator_take(g);
    if (status != STATUS_OK) {
        generator_destroy(g);
        return status;
    }
    *out = g;
    return STATUS_OK;
}

void generator_destroy(struct generator *g) {
    if (!g)
        return;
    for (int64_t i = 0; g->tokens && i <= (g->capacity - 1) / BOUND_KEYS; i++)
        device_forget(g->model->device->recorder, &g->tokens[i]);
    if (g->host_next)
        g->model->device->release_host(g->host_next, tensor_bytes(g->next));
    free(g->tokens);
    workspace_destroy(g->workspace);
    arena_release(&g->arena);
    free(g->caches);
    free(g->host_logits);
    free(g);
}

void generator_rewind(struct generator *g, int64_t length) {
    CHECK_OP(length, >=, 0);
    CHECK_OP(length, <=, generator_length(g));
    for (int64_t l = 0; l < g->model->config.num_hidden_layers; l++)
        g->caches[l].length = length;
}

int64_t generator_length(const struct generator *g) {
    return g->caches[0].length;
}

static enum status run_blocks(struct generator *g) {
    model_embed_forward(g->model, g->workspace);
    for (int block = 0; block < g->workspace->block_count; block++)
        TRY(block_forward(g->model, g->workspace, block, &g->caches[block], false));
    return STATUS_OK;
}

static enum status read_chunk(struct generator *g, const int32_t *tokens, int64_t count) {
    workspace_shape(g->workspace, g->model, 1, count);
    g->model->device->copy_from_host(g->workspace->ids.data, tokens, (size_t)count * sizeof *tokens);
    return run_blocks(g);
}

static enum status read_chunks(struct generator *g, const int32_t *tokens, int64_t count) {
    for (int64_t done = 0; done < count; done += CHUNK_TOKENS)
        TRY(read_chunk(g, tokens + done, count - done < CHUNK_TOKENS ? count - done : CHUNK_TOKENS));
    model_logits(g->model, g->workspace, 1, g->logits);
    return STATUS_OK;
}

static enum status ask_for_token(void *context) {
    struct generator *g = context;
    g->model->context.ops->gather_rows(g->model->rope, g->caches[0].kept, g->rope);
    TRY(run_blocks(g));
    model_logits(g->model, g->workspace, 1, g->logits);
    return STATUS_OK;
}

/* All that changes from token to token is in the device's memory before, so that the rest can be repeated. */
static enum status read_token(struct generator *g, int32_t token) {
    int64_t length = generator_length(g), part = length / BOUND_KEYS, end = (part + 1) * BOUND_KEYS;
    g->host_next[0] = token;
    g->host_next[1] = (int32_t)length;
    g->model->device->copy_from_host_later(g->next.data, g->host_next, tensor_bytes(g->next));
    workspace_shape(g->workspace, g->model, 1, 1);
    g->workspace->ids = tensor_rows(g->next, 0, 1);
    for (int64_t l = 0; l < g->model->config.num_hidden_layers; l++)
        g->caches[l].bound = end < g->capacity ? end : g->capacity;
    enum status status = device_repeat(g->recorder, &g->tokens[part], ask_for_token, g);
    for (int64_t l = 0; l < g->model->config.num_hidden_layers; l++) {
        g->caches[l].bound = 0;
        g->caches[l].length = length + (status == STATUS_OK);
    }
    return status;
}

enum status generator_read(struct generator *g, const int32_t *tokens, int64_t count, float **logits) {
    CHECK_OP(count, >=, 1);
    if (generator_length(g) + count > g->capacity)
        return status_fail(STATUS_USAGE, "the text has %lld tokens, this model reads at most %lld",
                           (long long)(generator_length(g) + count), (long long)g->capacity);
    TRY(count == 1 && g->recorder ? read_token(g, tokens[0]) : read_chunks(g, tokens, count));
    g->model->device->copy_to_host(g->host_logits, g->logits.data, tensor_bytes(g->logits));
    *logits = g->host_logits;
    return STATUS_OK;
}

/* Ids that are no token of the tokenizer are never written. */
static void find_unknown(const struct generator *g, const struct tokenizer *tokenizer, struct token_list *unknown) {
    for (int64_t id = 0; id < g->model->config.vocab_size; id++)
        if (tokenizer_token(tokenizer, (int32_t)id).size == 0)
            token_list_add(unknown, (int32_t)id);
}

static void mask_unknown(const struct generator *g, const struct token_list *unknown) {
    for (size_t i = 0; i < unknown->count; i++)
        g->host_logits[unknown->ids[i]] = -INFINITY;
}

static void hand_over(const struct generation *generation, struct text *text) {
    if (generation->piece && text->size > 0)
        generation->piece(generation->context, text->data, text->size);
    text_clear(text);
}

static enum status continue_text(struct generator *g, const struct generation *generation, float *logits,
                                 struct generation_result *result) {
    const struct tokenizer *tokenizer = generation->tokenizer;
    struct token_decoder decoder = {0};
    struct token_list unknown = {0};
    struct text text = {0};
    enum status status = STATUS_OK;
    find_unknown(g, tokenizer, &unknown);
    while (status == STATUS_OK && result->new_tokens < generation->max_tokens) {
        mask_unknown(g, &unknown);
        int32_t id = sample_token(&generation->sample, logits, (int)g->model->config.vocab_size,
                                  (uint64_t)generator_length(g));
        if (!isfinite(logits[id])) {
            status = status_fail(STATUS_FORMAT, "the model's scores are no numbers: its weights are damaged, or too large for "
                                                "this precision");
            break;
        }
        result->reached_end = id == tokenizer_end_of_text(tokenizer);
        if (result->reached_end)
            break;
        result->new_tokens++;
        token_decoder_add(&decoder, tokenizer, id, &text);
        hand_over(generation, &text);
        result->reached_capacity = generator_length(g) == g->capacity;
        if (result->reached_capacity || result->new_tokens == generation->max_tokens)
            break;
        status = generator_read(g, &id, 1, &logits);
    }
    token_decoder_finish(&decoder, &text);
    hand_over(generation, &text);
    text_release(&text);
    token_list_release(&unknown);
    return status;
}

enum status generator_run(struct generator *g, const struct generation *generation, struct generation_result *result) {
    struct token_list tokens = {0};
    float *logits = NULL;
    int end_of_text = tokenizer_end_of_text(generation->tokenizer);
    *result = (struct generation_result){0};
    generator_rewind(g, 0);
    if (end_of_text >= 0)
        token_list_add(&tokens, end_of_text);
    double begin = clock_seconds();
    enum status status = tokenizer_encode(generation->tokenizer, generation->prompt, strlen(generation->prompt), true,
                                          &tokens);
    if (status == STATUS_OK && tokens.count == 0)
        status = status_fail(STATUS_USAGE, "the prompt is empty and this tokenizer has no token to begin with");
    if (status == STATUS_OK)
        status = generator_read(g, tokens.ids, (int64_t)tokens.count, &logits);
    result->prompt_tokens = (int64_t)tokens.count;
    result->prompt_seconds = clock_seconds() - begin;
    begin = clock_seconds();
    if (status == STATUS_OK)
        status = continue_text(g, generation, logits, result);
    result->new_seconds = clock_seconds() - begin;
    token_list_release(&tokens);
    return status;
}
