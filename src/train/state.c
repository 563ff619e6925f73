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
            status = guard_unpack((struct json_source){path, json_object_get(object, "guard")}, &state->guard);
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

/* What is to be read of a checkpoint, and checked. */
struct wanted {
    struct checkpoint_manifest manifest;
    struct checkpoint_target *targets;
    size_t count;
};

static void wanted_release(struct wanted *w) {
    checkpoint_manifest_close(&w->manifest);
    free(w->targets);
}

/* The rows of an item that are held here. The header is looked at before it is checked: what it says must be what this model
 * needs, whoever wrote it. */
static enum status want_item(struct wanted *w, struct weights *weights, const char *below, const struct named_tensor *item) {
    const struct safetensors *file;
    const struct safetensors_entry *entry = weights_find(weights, item->name, &file);
    uint64_t bytes = (uint64_t)tensor_bytes(item->tensor);
    if (bytes == 0)
        return STATUS_OK;
    uint64_t row_bytes = bytes / (uint64_t)item->tensor.shape[0];
    char *name = text_format("%s%s", below, path_name(file->path));
    int index = checkpoint_find_file(&w->manifest, name);
    free(name);
    if (index < 0)
        return status_fail(STATUS_FORMAT, "%s: its checkpoint's manifest does not name it", file->path);
    w->targets[w->count++] = (struct checkpoint_target){
        index, (uint64_t)(file->data - file->map.data) + entry->begin + (uint64_t)item->first_row * row_bytes, bytes,
        item->tensor.data};
    return STATUS_OK;
}

static enum status want_items(struct wanted *w, struct weights *weights, const char *below, const struct named_tensor *items,
                              int count) {
    TRY(weights_check_exactly(weights, items, count));
    for (int i = 0; i < count; i++)
        TRY(want_item(w, weights, below, &items[i]));
    return STATUS_OK;
}

/* How files of tensors begin. */
static enum status want_headers(struct wanted *w, const struct weights *weights, const char *below) {
    for (int i = 0; i < weights->file_count; i++) {
        const struct safetensors *file = &weights->files[i];
        char *name = text_format("%s%s", below, path_name(file->path));
        int index = checkpoint_find_file(&w->manifest, name);
        free(name);
        if (index >= 0) /* else one of its tensors tells */
            w->targets[w->count++] =
                (struct checkpoint_target){index, 0, (uint64_t)(file->data - file->map.data), NULL};
    }
    return STATUS_OK;
}

/* Takes the items, which are all tensors of the files of a stem. */
static enum status want_tensors(struct wanted *w, const char *directory, const char *below, const char *stem,
                                struct named_tensor *items, int count, bool headers) {
    struct weights weights;
    char *path = path_join(directory, below);
    enum status status = weights_open_stem(&weights, path, stem);
    free(path);
    if (status == STATUS_OK) {
        status = memory_resize(&w->targets, w->count + (size_t)count + (size_t)weights.file_count, sizeof *w->targets);
        if (status == STATUS_OK)
            status = want_items(w, &weights, below, items, count);
        if (status == STATUS_OK && headers)
            status = want_headers(w, &weights, below);
        weights_close(&weights);
    }
    free(items);
    return status;
}

static bool has_target(const struct wanted *w, int file) {
    for (size_t i = 0; i < w->count; i++)
        if (w->targets[i].file == file)
            return true;
    return false;
}

/* All of the files of which nothing is wanted yet. */
static enum status want_the_rest(struct wanted *w) {
    TRY(memory_resize(&w->targets, w->count + w->manifest.file_count, sizeof *w->targets));
    for (size_t i = 0; i < w->manifest.file_count; i++)
        if (!has_target(w, (int)i))
            w->targets[w->count++] = (struct checkpoint_target){(int)i, 0, w->manifest.files[i].bytes, NULL};
    return STATUS_OK;
}

/* This rank's rows, as the files have them before anything was checked; and, checks_rest, what no rank owns. */
static enum status want_all(struct wanted *w, const char *directory, const struct model *model, bool has_rows,
                            bool checks_rest) {
    struct named_tensor *items;
    int count;
    TRY(checkpoint_manifest_open(&w->manifest, directory));
    if (has_rows) {
        TRY(model_name_tensors(model, model->own_weight, "", &items, &count));
        TRY(want_tensors(w, directory, "", "model", items, count, checks_rest));
        TRY(name_moments(model, &items, &count));
        TRY(want_tensors(w, directory, "training/", "optimizer", items, count, checks_rest));
    }
    return checks_rest ? want_the_rest(w) : STATUS_OK;
}

/* What this rank owns, every byte of it checked against the manifest. */
static enum status read_share(const char *directory, struct model *model, bool has_rows, bool checks_rest) {
    struct wanted wanted = {.count = 0};
    enum status status = want_all(&wanted, directory, model, has_rows, checks_rest);
    if (status == STATUS_OK)
        status = checkpoint_read(directory, &wanted.manifest, wanted.targets, wanted.count, model->device);
    wanted_release(&wanted);
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

/* Collective. One checkpoint; together the ranks read and check all of it. */
static enum status read_all(const char *directory, struct model *model, struct ranks *ranks, enum checkpoint_read read,
                            struct train_state *state) {
    bool receives = read == CHECKPOINT_READ_BROADCAST && ranks->mesh.coordinate[MESH_REPLICATE] > 0;
    enum status status = read_share(directory, model, !receives, ranks->world->rank == 0);
    if (status == STATUS_OK)
        status = read_state(directory, state);
    TRY(comm_agree(ranks->world, status));
    if (read == CHECKPOINT_READ_BROADCAST)
        TRY(send_to_replicas(model, &ranks->replicas));
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

/* A checkpoint that is none is passed over; too little memory, or a rank that is gone, says nothing about it. */
static bool is_damage(enum status status) {
    return status != STATUS_OK && status != STATUS_MEMORY && status != STATUS_PEER;
}

/* Collective. Whether every byte of it is as it was written: then what is wrong with it is no damage, and an older one would
 * not do either. */
static enum status is_whole(const char *path, struct comm *world, bool *whole) {
    int32_t verifies = world->rank == 0 && checkpoint_verify(path) == STATUS_OK;
    TRY(comm_broadcast(world, &verifies, sizeof verifies));
    *whole = verifies != 0;
    return STATUS_OK;
}

/* Goes on to an older one after damage only. */
static enum status pass_over(const char *path, struct comm *world, enum status failure) {
    bool whole;
    char line[1024];
    snprintf(line, sizeof line, "%s", status_text());
    TRY(is_whole(path, world, &whole));
    if (whole)
        return status_fail(failure, "%s: does not fit this run: %s", path, line);
    log_warn("%s; this checkpoint is passed over", line);
    return STATUS_OK;
}

static enum status read_newest(const struct text_list *paths, int64_t count, struct model *model, struct ranks *ranks,
                               enum checkpoint_read read, struct train_state *state, char path[PATH_BYTES]) {
    for (int64_t i = 0; i < count; i++) {
        if (ranks->world->rank == 0)
            snprintf(path, PATH_BYTES, "%s", paths->items[i]);
        TRY(comm_broadcast(ranks->world, path, PATH_BYTES));
        enum status status = read_all(path, model, ranks, read, state);
        if (!is_damage(status))
            return status;
        TRY(pass_over(path, ranks->world, status));
        memset(path, 0, PATH_BYTES);
    }
    return STATUS_OK;
}

enum status checkpoint_resume(const char *checkpoints_directory, struct model *model, struct ranks *ranks,
                              enum checkpoint_read read, struct train_state *state, char path[CHECKPOINT_PATH_BYTES]) {
    struct text_list paths;
    int64_t count;
    memset(path, 0, PATH_BYTES);
    enum status status = list_checkpoints(checkpoints_directory, ranks->world, &paths, &count);
    if (status == STATUS_OK)
        status = read_newest(&paths, count, model, ranks, read, state, path);
    text_list_release(&paths);
    if (status == STATUS_OK && *path)
        log_info("resume  from %s", path);
    return status;
}
