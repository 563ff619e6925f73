#include "train/state.h"

#include "base/file.h"
#include "base/json.h"
#include "base/log.h"
#include "checkpoint/publish.h"
#include "checkpoint/weights.h"
#include "data/tokenizer.h"
#include "model/names.h"
#include "train/gathered.h"
#include <stdlib.h>
#include <string.h>

enum { STATE_VERSION = 1, SMALL_FILE_BYTES_MAX = 64 << 20, PATH_BYTES = CHECKPOINT_PATH_BYTES };

/* ---- saving ------------------------------------------------------------------------------------------------------------ */

static enum status copy_file(const char *from, const char *directory, const char *name) {
    char *data, *to = path_join(directory, name);
    size_t size;
    enum status status = file_read(from, SMALL_FILE_BYTES_MAX, &data, &size);
    if (status == STATUS_OK) {
        status = file_write(to, data, size);
        free(data);
    }
    free(to);
    return status;
}

static enum status write_json(const char *directory, const char *name, json_t *object) {
    char *path = path_join(directory, name);
    enum status status = json_write_file(path, object);
    json_decref(object);
    free(path);
    return status;
}

static enum status write_generation_config(const char *directory, int64_t end_of_text) {
    json_t *object = json_pack("{s:b,s:f,s:f}", "do_sample", 1, "temperature", 0.8, "top_p", 0.95);
    if (end_of_text >= 0) {
        json_object_set_new(object, "bos_token_id", json_integer(end_of_text));
        json_object_set_new(object, "eos_token_id", json_integer(end_of_text));
    }
    return write_json(directory, "generation_config.json", object);
}

static enum status write_state(const char *directory, const struct train_state *state) {
    return write_json(directory, "training/state.json",
                      json_pack("{s:i,s:I,s:I,s:I,s:o}", "version", STATE_VERSION, "step", (json_int_t)state->step,
                                "sequences", (json_int_t)state->sequences, "tokens", (json_int_t)state->tokens,
                                "guard", guard_pack(&state->guard)));
}

/* Both moments in one list, each name after "m." or "v.". */
static enum status name_moments(const struct model *model, struct named_tensor **items, int *count) {
    struct named_tensor *second;
    TRY(model_name_tensors(model, model->moment1, "m.", items, count));
    enum status status = model_name_tensors(model, model->moment2, "v.", &second, count);
    if (status == STATUS_OK) {
        *items = realloc(*items, (size_t)(2 * *count) * sizeof **items);
        CHECK(*items != NULL);
        memcpy(*items + *count, second, (size_t)*count * sizeof *second);
        *count *= 2;
        free(second);
    }
    return status;
}

static enum status write_config(const char *directory, const struct checkpoint_sources *sources) {
    char *path = path_join(directory, "config.json");
    enum status status =
        model_config_write(&sources->model->config, path, tokenizer_end_of_text(sources->tokenizer), "float32");
    free(path);
    return status;
}

static enum status write_tokenizer(const char *directory, const struct checkpoint_sources *sources) {
    TRY(copy_file(sources->tokenizer_path, directory, "tokenizer.json"));
    char *path = path_join(directory, "tokenizer_config.json");
    enum status status =
        tokenizer_save_config(sources->tokenizer, path, sources->model->config.max_position_embeddings);
    free(path);
    return status;
}

/* Everything but tensors. */
static enum status write_small_files(const char *directory, const struct checkpoint_sources *sources) {
    TRY(write_config(directory, sources));
    TRY(write_generation_config(directory, tokenizer_end_of_text(sources->tokenizer)));
    TRY(write_tokenizer(directory, sources));
    TRY(copy_file(sources->config_path, directory, "training/config.ini"));
    return write_state(directory, &sources->state);
}

/* Collective; `directory` is rank 0's draft. */
static enum status write_tensors(const char *directory, const struct checkpoint_sources *sources) {
    const struct model *model = sources->model;
    const struct gathered_array weights[] = {{model->own_weight, ""}};
    const struct gathered_array moments[] = {{model->moment1, "m."}, {model->moment2, "v."}};
    char *weights_path = path_join(directory, "model.safetensors");
    char *moments_path = path_join(directory, "training/optimizer.safetensors");
    enum status status = gathered_write(weights_path, model, sources->ranks, weights, 1);
    if (status == STATUS_OK)
        status = gathered_write(moments_path, model, sources->ranks, moments, 2);
    free(weights_path);
    free(moments_path);
    return status;
}

/* Between two agreements no rank leaves alone; only rank 0 has a draft. */
enum status checkpoint_save(const struct checkpoint_sources *sources) {
    struct checkpoint_draft draft = {0};
    struct comm *world = sources->ranks->world;
    bool writes = world->rank == 0, has_draft = false;
    enum status status = STATUS_OK;
    if (writes) {
        status = checkpoint_begin(&draft, sources->checkpoints_directory, sources->state.step);
        has_draft = status == STATUS_OK;
        if (has_draft)
            status = write_small_files(draft.path, sources);
    }
    status = comm_agree(world, status);
    if (status == STATUS_OK)
        status = write_tensors(writes ? draft.path : "", sources);
    if (status != STATUS_OK) {
        if (has_draft)
            checkpoint_abandon(&draft);
        return status;
    }
    if (writes) {
        status = checkpoint_commit(&draft);
        if (status == STATUS_OK)
            status = checkpoint_keep(sources->checkpoints_directory, sources->keep);
    }
    return comm_agree(world, status);
}

/* ---- resuming ------------------------------------------------------------------------------------------------------------ */

static enum status read_state(const char *directory, struct train_state *state) {
    char *path = path_join(directory, "training/state.json");
    json_t *object;
    int64_t version;
    enum status status = json_read_file(path, SMALL_FILE_BYTES_MAX, &object);
    if (status == STATUS_OK) {
        struct json_source source = {path, object};
        status = json_get_integer(source, "version", true, STATE_VERSION, STATE_VERSION, &version);
        if (status == STATUS_OK)
            status = json_get_integer(source, "step", true, 0, INT64_MAX, &state->step);
        if (status == STATUS_OK)
            status = json_get_integer(source, "sequences", true, 0, INT64_MAX, &state->sequences);
        if (status == STATUS_OK)
            status = json_get_integer(source, "tokens", true, 0, INT64_MAX, &state->tokens);
        if (status == STATUS_OK)
            status = guard_unpack(source, "guard", &state->guard);
        json_decref(object);
    }
    free(path);
    return status;
}

static enum status read_tensors(const char *directory, const char *name, struct named_tensor *items, int count,
                                const struct device *device) {
    char *path = path_join(directory, name);
    enum status status = safetensors_fill(path, items, count, device);
    free(path);
    free(items);
    return status;
}

static enum status read_all(const char *directory, struct model *model, struct train_state *state) {
    struct named_tensor *items;
    int count;
    TRY(read_state(directory, state));
    TRY(model_name_tensors(model, model->own_weight, "", &items, &count));
    TRY(read_tensors(directory, "model.safetensors", items, count, model->device));
    TRY(name_moments(model, &items, &count));
    TRY(read_tensors(directory, "training/optimizer.safetensors", items, count, model->device));
    model_repack(model);
    return STATUS_OK;
}

/* Rank 0 looks for the newest that verifies; *path is empty on all ranks where there is none. */
static enum status find_latest(const char *checkpoints_directory, struct comm *world, char path[PATH_BYTES]) {
    enum status status = STATUS_OK;
    char *found = NULL;
    int64_t step;
    memset(path, 0, PATH_BYTES);
    if (world->rank == 0) {
        status = checkpoint_latest(checkpoints_directory, &found, &step);
        if (status == STATUS_OK && strlen(found) >= PATH_BYTES)
            status = status_fail(STATUS_USAGE, "%s: this path is too long", found);
        if (status == STATUS_OK)
            strcpy(path, found);
        else if (status == STATUS_NOT_FOUND)
            status = STATUS_OK;
    }
    free(found);
    TRY(comm_agree(world, status));
    return comm_broadcast(world, path, PATH_BYTES);
}

enum status checkpoint_resume(const char *checkpoints_directory, struct model *model, struct ranks *ranks,
                              struct train_state *state, char path[CHECKPOINT_PATH_BYTES]) {
    TRY(find_latest(checkpoints_directory, ranks->world, path));
    if (!*path)
        return STATUS_OK;
    enum status status = comm_agree(ranks->world, read_all(path, model, state));
    if (status == STATUS_OK)
        log_info("resume  from %s", path);
    return status;
}
