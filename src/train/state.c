#include "train/state.h"

#include "base/file.h"
#include "base/json.h"
#include "base/log.h"
#include "base/memory.h"
#include "checkpoint/weights.h"
#include "data/tokenizer.h"
#include "model/names.h"
#include <math.h>
#include <stdio.h>
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
    json_t *object = json_pack("{s:i,s:I,s:I,s:I,s:o}", "version", STATE_VERSION, "step", (json_int_t)state->step, "sequences",
                               (json_int_t)state->sequences, "tokens", (json_int_t)state->tokens, "guard",
                               guard_pack(&state->guard));
    if (state->best_step >= 0) {
        json_object_set_new(object, "best_step", json_integer(state->best_step));
        json_object_set_new(object, "best_valid_loss", json_real(state->best_valid_loss));
    }
    return write_json(directory, "training/state.json", object);
}

static enum status write_config(const char *directory, const struct checkpoint_sources *sources) {
    char *path = path_join(directory, "config.json");
    enum status status =
        model_config_write(sources->model, path, tokenizer_end_of_text(sources->tokenizer), "float32");
    free(path);
    return status;
}

static enum status write_tokenizer(const char *directory, const struct checkpoint_sources *sources) {
    TRY(copy_file(sources->tokenizer_path, directory, "tokenizer.json"));
    char *path = path_join(directory, "tokenizer_config.json");
    enum status status =
        tokenizer_save_config(sources->tokenizer, path, sources->model->max_position_embeddings);
    free(path);
    return status;
}

enum status checkpoint_write_files(const char *root, const struct checkpoint_sources *sources) {
    TRY(write_config(root, sources));
    TRY(write_generation_config(root, tokenizer_end_of_text(sources->tokenizer)));
    TRY(write_tokenizer(root, sources));
    TRY(copy_file(sources->config_path, root, "training/config.ini"));
    if (sources->metrics_path)
        TRY(file_flush(sources->metrics_path));
    return write_state(root, &sources->state);
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
        state->best_step = -1; /* where it says nothing */
        if (status == STATUS_OK)
            status = json_get_integer(source, "best_step", false, 0, INT64_MAX, &state->best_step);
        if (status == STATUS_OK)
            status = json_get_number(source, "best_valid_loss", state->best_step >= 0, -INFINITY, INFINITY,
                                     &state->best_valid_loss);
        json_decref(object);
    }
    free(path);
    return status;
}

enum status checkpoint_read_state(const char *checkpoint, struct train_state *state) {
    return read_state(checkpoint, state);
}

/* Both moments in one list, each name after "m." or "v.". */
static enum status name_moments(const struct model *model, struct named_tensor **items, int *count) {
    struct named_tensor *second;
    TRY(model_name_tensors(model, model->moment1, "m.", items, count));
    enum status status = model_name_tensors(model, model->moment2, "v.", &second, count);
    if (status == STATUS_OK)
        status = memory_resize(items, 2 * (size_t)*count, sizeof **items);
    if (status == STATUS_OK) {
        memcpy(*items + *count, second, (size_t)*count * sizeof *second);
        *count *= 2;
        free(second);
    }
    return status;
}

/* Takes the items. */
static enum status read_tensors(const char *directory, const char *stem, struct named_tensor *items, int count,
                                const struct device *device) {
    struct weights weights;
    enum status status = weights_open_stem(&weights, directory, stem);
    if (status == STATUS_OK) {
        status = weights_fill_exactly(&weights, items, count, device);
        weights_close(&weights);
    }
    free(items);
    return status;
}

static enum status read_model(const char *directory, struct model *model) {
    struct named_tensor *items;
    int count;
    char *training = path_join(directory, "training");
    enum status status = model_name_tensors(model, model->own_weight, "", &items, &count);
    if (status == STATUS_OK)
        status = read_tensors(directory, "model", items, count, model->device);
    if (status == STATUS_OK)
        status = name_moments(model, &items, &count);
    if (status == STATUS_OK)
        status = read_tensors(training, "optimizer", items, count, model->device);
    free(training);
    return status;
}

/* What the first replica read, to the others. */
static enum status send_to_replicas(struct model *model, struct comm *replicas) {
    for (int i = 0; i < model->table.count; i++) {
        TRY(comm_broadcast(replicas, model->own_weight[i].data, tensor_bytes(model->own_weight[i])));
        TRY(comm_broadcast(replicas, model->moment1[i].data, tensor_bytes(model->moment1[i])));
        TRY(comm_broadcast(replicas, model->moment2[i].data, tensor_bytes(model->moment2[i])));
    }
    return STATUS_OK;
}

static enum status read_all(const char *directory, struct model *model, struct ranks *ranks, enum checkpoint_read read,
                            struct train_state *state) {
    bool receives = read == CHECKPOINT_READ_BROADCAST && ranks->mesh.coordinate[MESH_REPLICATE] > 0;
    enum status status = read_state(directory, state);
    if (status == STATUS_OK && !receives)
        status = read_model(directory, model);
    TRY(comm_agree(ranks->world, status));
    if (read == CHECKPOINT_READ_BROADCAST)
        TRY(send_to_replicas(model, &ranks->replicas));
    model_repack(model);
    return STATUS_OK;
}

/* Newest first, as rank 0 sees them; empty lines on the others. */
static enum status list_checkpoints(const char *directory, struct comm *world, struct text_list *paths, int64_t *count) {
    *paths = (struct text_list){0};
    enum status status = world->rank == 0 ? checkpoint_list(directory, paths) : STATUS_OK;
    for (size_t i = 0; i < paths->count && status == STATUS_OK; i++)
        if (strlen(paths->items[i]) >= PATH_BYTES)
            status = status_fail(STATUS_USAGE, "%s: this path is too long", paths->items[i]);
    *count = (int64_t)paths->count;
    TRY(comm_agree(world, status));
    return comm_broadcast(world, count, sizeof *count);
}

/* Each rank checks a part of every file. A checkpoint that is none is passed over; too little memory, or a rank that is gone,
 * says nothing about it. */
static enum status find_latest(const char *checkpoints_directory, struct comm *world, char path[PATH_BYTES]) {
    struct text_list paths;
    int64_t count;
    memset(path, 0, PATH_BYTES);
    enum status status = list_checkpoints(checkpoints_directory, world, &paths, &count);
    for (int64_t i = 0; i < count && status == STATUS_OK; i++) {
        if (world->rank == 0)
            snprintf(path, PATH_BYTES, "%s", paths.items[i]);
        status = comm_broadcast(world, path, PATH_BYTES);
        if (status == STATUS_OK)
            status = comm_agree(world, checkpoint_verify_part(path, world->rank, world->size));
        if (status == STATUS_OK || status == STATUS_MEMORY || status == STATUS_PEER)
            break;
        log_warn("%s; this checkpoint is passed over", status_text());
        memset(path, 0, PATH_BYTES);
        status = STATUS_OK;
    }
    text_list_release(&paths);
    return status;
}

enum status checkpoint_resume(const char *checkpoints_directory, struct model *model, struct ranks *ranks,
                              enum checkpoint_read read, struct train_state *state, char path[CHECKPOINT_PATH_BYTES]) {
    TRY(find_latest(checkpoints_directory, ranks->world, path));
    if (!*path)
        return STATUS_OK;
    TRY(read_all(path, model, ranks, read, state));
    log_info("resume  from %s", path);
    return STATUS_OK;
}
