#include "infer/load.h"

#include "base/file.h"
#include "base/log.h"
#include "base/memory.h"
#include "checkpoint/publish.h"
#include "checkpoint/weights.h"
#include "model/names.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool has_file(const char *directory, const char *name) {
    char *path = path_join(directory, name);
    bool exists = file_exists(path);
    free(path);
    return exists;
}

enum status model_find(const char *directory, char **path) {
    int64_t step;
    if (!directory_exists(directory))
        return status_fail(STATUS_NOT_FOUND, "%s: no such directory", directory);
    if (has_file(directory, "config.json")) {
        *path = memory_copy_string(directory);
        return has_file(directory, "training/manifest.json") ? checkpoint_verify_model(directory) : STATUS_OK;
    }
    char *checkpoints = path_join(directory, "checkpoints");
    enum status status = checkpoint_latest(checkpoints, checkpoint_verify_model, path, &step);
    if (status == STATUS_NOT_FOUND)
        status = status_fail(STATUS_NOT_FOUND, "%s: holds neither config.json nor a good checkpoint", directory);
    free(checkpoints);
    return status;
}

/* Newer writers put a block's experts into one tensor: gate_up_proj [E,2F,D] (gate rows first) and down_proj [E,D,F].
 * The item of one expert's matrix is then a slice of it. */
static enum status fill_from_fused(struct weights *weights, const struct model *model, const struct named_tensor *item,
                                   bool *found) {
    char name[TENSOR_NAME_BYTES];
    int layer, expert, used = 0;
    char kind[16];
    *found = false;
    if (sscanf(item->name, "model.layers.%d.mlp.experts.%d.%15[a-z]_proj.weight%n", &layer, &expert, kind, &used) != 3 ||
        item->name[used] != '\0')
        return STATUS_OK;
    bool down = strcmp(kind, "down") == 0;
    snprintf(name, sizeof name, "model.layers.%d.mlp.experts.%s", layer, down ? "down_proj" : "gate_up_proj");
    const struct safetensors *file;
    struct safetensors_entry *entry = weights_find(weights, name, &file);
    if (!entry)
        return STATUS_OK;
    int64_t d = model->config.hidden_size, f = model->config.moe_intermediate_size;
    int64_t rows = down ? d : 2 * f, columns = down ? f : d;
    if (entry->dim_count != 3 || entry->shape[0] != model->config.num_experts || entry->shape[1] != rows ||
        entry->shape[2] != columns || (!down && rows == columns))
        return status_fail(STATUS_FORMAT, "%s: tensor \"%s\" is not [experts, %lld, %lld], or may be transposed",
                           file->path, name, (long long)rows, (long long)columns);
    int64_t elements = tensor_elements(item->tensor), first = expert * rows * columns;
    if (strcmp(kind, "up") == 0)
        first += f * columns;
    void *buffer;
    TRY(memory_alloc(&buffer, (size_t)elements, dtype_size(item->tensor.dtype)));
    enum status status = safetensors_read(file, entry, first, elements, item->tensor.dtype, buffer);
    if (status == STATUS_OK)
        model->device->copy_from_host(item->tensor.data, buffer, tensor_bytes(item->tensor));
    free(buffer);
    entry->used = *found = true;
    return status;
}

static enum status fill_all(struct weights *weights, struct model *model, const struct named_tensor *items, int count) {
    for (int i = 0; i < count; i++) {
        const struct safetensors *file;
        bool found = false;
        if (!weights_find(weights, items[i].name, &file))
            TRY(fill_from_fused(weights, model, &items[i], &found));
        if (!found)
            TRY(weights_fill(weights, &items[i], 1, model->device));
    }
    const struct safetensors *file;
    struct safetensors_entry *head = weights_find(weights, "lm_head.weight", &file);
    if (head && model->config.tie_word_embeddings) /* some who publish keep the tied copy */
        head->used = true;
    const char *unused = weights_first_unused(weights);
    if (unused)
        return status_fail(STATUS_FORMAT, "%s: tensor \"%s\" belongs to no part of this model", weights->directory,
                           unused);
    return STATUS_OK;
}

static enum status read_weights(struct model *model, const char *directory) {
    struct weights weights;
    struct named_tensor *items;
    int count;
    TRY(weights_open(&weights, directory));
    enum status status = model_name_tensors(model, model->own_weight, "", &items, &count);
    if (status == STATUS_OK) {
        status = fill_all(&weights, model, items, count);
        free(items);
    }
    weights_close(&weights);
    model_repack(model);
    return status;
}

static enum status load_parts(struct load_options options, struct loaded_model *out) {
    struct model_config config;
    char *config_path = path_join(out->path, "config.json"), *tokenizer_path = path_join(out->path, "tokenizer.json");
    enum status status = model_config_read(&config, config_path);
    if (status == STATUS_OK)
        status = tokenizer_open(tokenizer_path, &out->tokenizer);
    free(config_path);
    free(tokenizer_path);
    TRY(status);
    if (tokenizer_vocab_size(out->tokenizer) > config.vocab_size)
        return status_fail(STATUS_FORMAT, "%s: the tokenizer has %d tokens, the model only %lld", out->path,
                           tokenizer_vocab_size(out->tokenizer), (long long)config.vocab_size);
    int64_t positions = config.max_position_embeddings;
    if (options.position_count > 0 && options.position_count < positions)
        positions = options.position_count;
    const struct device *device = options.device ? options.device : device_cpu();
    struct model_options model_options = {options.ops, device, options.compute,   DTYPE_F32,
                                          positions,   false,  sharding_single()};
    TRY(model_create(&config, model_options, &out->model));
    if (config.num_experts > 0)
        log_verbose("routing softmax over %lld experts, top %lld%s", (long long)config.num_experts,
                    (long long)config.num_experts_per_tok, config.norm_topk_prob ? ", weights normalised" : "");
    return read_weights(out->model, out->path);
}

enum status model_load(const char *directory, struct load_options options, struct loaded_model *out) {
    *out = (struct loaded_model){0};
    TRY(model_find(directory, &out->path));
    enum status status = load_parts(options, out);
    if (status != STATUS_OK)
        loaded_model_release(out);
    return status;
}

void loaded_model_release(struct loaded_model *loaded) {
    model_destroy(loaded->model);
    tokenizer_destroy(loaded->tokenizer);
    free(loaded->path);
    *loaded = (struct loaded_model){0};
}
