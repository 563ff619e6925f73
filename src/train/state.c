#include "train/state.h"

#include "base/file.h"
#include "base/json.h"
#include "base/log.h"
#include "base/memory.h"
#include "checkpoint/weights.h"
#include "data/tokenizer.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { STATE_VERSION = 1, SMALL_FILE_BYTES_MAX = 64 << 20, PATH_BYTES = CHECKPOINT_PATH_BYTES };
enum { ISLANDS_MAX = 65536, STATE_BYTES_MAX = 512 << 20 }; /* which their guards fit into */
enum { PART_BYTES = 16 << 20 }; /* of a tensor on its way to other replicas */
enum { FRAGMENTS_MAX = 1 << 16, BLOCKS_MAX = FRAGMENTS_MAX, ROUNDS_MAX = 1000000, STEPS_MAX = 1000000000 };

/* What state.json says of a rounded checkpoint's "weights", and config.json of their dtype. */
#define ROUNDED "bfloat16"

static const char *const order_names[] = {[OUTER_STRIDED] = "strided", [OUTER_SEQUENTIAL] = "sequential"};
enum { ORDER_COUNT = sizeof order_names / sizeof *order_names };

/* ---- saving ------------------------------------------------------------------------------------------------------ */

static enum status copy_file(const char *from, const char *directory, const char *name) {
    char *data, *to = path_join(directory, name);
    size_t size;
    enum status status = file_read(from, SMALL_FILE_BYTES_MAX, &data, &size);
    if (status == STATUS_OK) {
        status = file_write_draft(to, data, size);
        free(data);
    }
    free(to);
    return status;
}

static enum status write_json(const char *directory, const char *name, json_t *object) {
    char *path = path_join(directory, name);
    enum status status = json_write_draft(path, object);
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

static json_t *pack_guards(const struct guard *guards, int64_t count) {
    json_t *list = json_array();
    for (int64_t i = 0; i < count; i++)
        json_array_append_new(list, guard_pack(&guards[i]));
    return list;
}

static json_t *pack_plan(const struct outer_plan *plan) {
    return json_pack("{s:I,s:i,s:i,s:s,s:I,s:I}", "sync_steps", (json_int_t)plan->sync_steps, "fragments",
                     plan->fragment_count, "blocks", plan->block_count, "order", order_names[plan->order],
                     "overlap_steps", (json_int_t)plan->overlap_steps, "experts_every",
                     (json_int_t)plan->experts_every);
}

/* JSON has no number for what is none. */
static json_t *pack_real(double value) {
    return isfinite(value) ? json_real(value) : json_null();
}

/* Without waited_s: a checkpoint says nothing of the machine it was made on. */
static json_t *pack_report(const struct outer_report *r) {
    return json_pack("{s:i,s:I,s:o,s:o,s:o,s:o,s:I}", "fragment", r->fragment, "sent_step", (json_int_t)r->sent_step,
                     "gradient_norm", pack_real(r->gradient_norm), "cosine", pack_real(r->cosine), "flushed",
                     pack_real(r->flushed), "loss", pack_real(r->loss), "sent_bytes", (json_int_t)r->sent_bytes);
}

static json_t *pack_outer(const struct train_state *state) {
    json_t *object = pack_plan(&state->plan);
    if (state->has_report)
        json_object_set_new(object, "report", pack_report(&state->report));
    return object;
}

static enum status write_state(const char *directory, const struct checkpoint_sources *sources) {
    const struct train_state *state = &sources->state;
    json_t *object = json_pack("{s:i,s:I,s:I,s:I}", "version", STATE_VERSION, "step", (json_int_t)state->step,
                               "sequences", (json_int_t)state->sequences, "tokens", (json_int_t)state->tokens);
    if (state->form.island_count == 0) {
        json_object_set_new(object, "guard", guard_pack(&state->guard));
    } else {
        CHECK(sources->island_guards != NULL);
        json_object_set_new(object, "islands", pack_guards(sources->island_guards, state->form.island_count));
        json_object_set_new(object, "outer", pack_outer(state));
    }
    if (state->form.rounded)
        json_object_set_new(object, "weights", json_string(ROUNDED));
    if (state->best_step >= 0) {
        json_object_set_new(object, "best_step", json_integer(state->best_step));
        json_object_set_new(object, "best_valid_loss", json_real(state->best_valid_loss));
    }
    return write_json(directory, "training/state.json", object);
}

static enum status write_config(const char *directory, const struct checkpoint_sources *sources) {
    char *path = path_join(directory, "config.json");
    const char *dtype = sources->state.form.rounded ? ROUNDED : "float32";
    enum status status = model_config_write(sources->model, path, tokenizer_end_of_text(sources->tokenizer), dtype);
    free(path);
    return status;
}

static enum status write_tokenizer(const char *directory, const struct checkpoint_sources *sources) {
    TRY(copy_file(sources->tokenizer_path, directory, "tokenizer.json"));
    char *path = path_join(directory, "tokenizer_config.json");
    enum status status = tokenizer_save_config(sources->tokenizer, path, sources->model->max_position_embeddings);
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
    return write_state(root, sources);
}

/* ---- resuming ---------------------------------------------------------------------------------------------------- */

/* Each of the islands' guards is looked at; that of island `island` mod their number is kept. */
static enum status unpack_guards(struct json_source source, int64_t island, struct train_state *state) {
    const json_t *list = json_object_get(source.object, "islands");
    size_t count = json_array_size(list);
    if (!json_is_array(list) || count < 1 || count > ISLANDS_MAX)
        return status_fail(STATUS_FORMAT, "%s: \"islands\" is not a list of 1 to %d", source.label, ISLANDS_MAX);
    state->form.island_count = (int64_t)count;
    for (size_t i = 0; i < count; i++) {
        struct guard guard;
        char *label = text_format("%s: islands[%zu]", source.label, i);
        enum status status = guard_unpack((struct json_source){label, json_array_get(list, i)}, &guard);
        free(label);
        TRY(status);
        if ((int64_t)i == island % state->form.island_count)
            state->guard = guard;
    }
    return STATUS_OK;
}

static enum status unpack_order(struct json_source source, int *order) {
    const char *name;
    TRY(json_get_string(source, "order", true, &name));
    for (*order = 0; *order < ORDER_COUNT; ++*order)
        if (strcmp(name, order_names[*order]) == 0)
            return STATUS_OK;
    return status_fail(STATUS_FORMAT, "%s: \"order\" is \"%.32s\", neither \"%s\" nor \"%s\"", source.label, name,
                       order_names[OUTER_STRIDED], order_names[OUTER_SEQUENTIAL]);
}

static enum status unpack_plan(struct json_source source, struct outer_plan *plan) {
    int64_t fragments, blocks;
    if (!json_is_object(source.object))
        return status_fail(STATUS_FORMAT, "%s is not an object", source.label);
    TRY(json_get_integer(source, "sync_steps", true, 1, STEPS_MAX, &plan->sync_steps));
    TRY(json_get_integer(source, "fragments", true, 1, FRAGMENTS_MAX, &fragments));
    TRY(json_get_integer(source, "blocks", true, 1, BLOCKS_MAX, &blocks));
    TRY(json_get_integer(source, "overlap_steps", true, 0, STEPS_MAX, &plan->overlap_steps));
    TRY(json_get_integer(source, "experts_every", true, 1, ROUNDS_MAX, &plan->experts_every));
    TRY(unpack_order(source, &plan->order));
    plan->fragment_count = (int)fragments;
    plan->block_count = (int)blocks;
    if (outer_plan_check(plan) != STATUS_OK)
        return status_prefix(STATUS_FORMAT, "%s", source.label);
    return STATUS_OK;
}

static enum status unpack_real(struct json_source source, const char *key, double *value) {
    *value = NAN;
    return json_get_number(source, key, false, -INFINITY, INFINITY, value);
}

static enum status unpack_report(struct json_source source, const struct outer_plan *plan, struct outer_report *r) {
    int64_t fragment;
    TRY(json_get_integer(source, "fragment", true, 0, plan->fragment_count - 1, &fragment));
    r->fragment = (int)fragment;
    TRY(json_get_integer(source, "sent_step", true, 0, INT64_MAX, &r->sent_step));
    TRY(unpack_real(source, "gradient_norm", &r->gradient_norm));
    TRY(unpack_real(source, "cosine", &r->cosine));
    TRY(unpack_real(source, "flushed", &r->flushed));
    TRY(unpack_real(source, "loss", &r->loss));
    return json_get_integer(source, "sent_bytes", true, 0, INT64_MAX, &r->sent_bytes);
}

static enum status unpack_outer(struct json_source source, struct train_state *state) {
    TRY(unpack_plan(source, &state->plan));
    struct json_source report = {source.label, json_object_get(source.object, "report")};
    state->has_report = report.object != NULL;
    return state->has_report ? unpack_report(report, &state->plan, &state->report) : STATUS_OK;
}

static enum status unpack_islands(struct json_source source, int64_t island, struct train_state *state) {
    const json_t *outer = json_object_get(source.object, "outer");
    if (!outer && !json_object_get(source.object, "islands"))
        return guard_unpack((struct json_source){source.label, json_object_get(source.object, "guard")}, &state->guard);
    TRY(unpack_guards(source, island, state));
    char *label = text_format("%s: \"outer\"", source.label);
    enum status status = unpack_outer((struct json_source){label, outer}, state);
    free(label);
    return status;
}

/* Files that do not say it have them in f32. */
static enum status unpack_rounded(struct json_source source, bool *rounded) {
    const char *name = NULL;
    TRY(json_get_string(source, "weights", false, &name));
    *rounded = name != NULL;
    if (name && strcmp(name, ROUNDED) != 0)
        return status_fail(STATUS_FORMAT, "%s: \"weights\" is \"%.32s\", not \"" ROUNDED "\"", source.label, name);
    return STATUS_OK;
}

static enum status unpack_state(struct json_source source, int64_t island, struct train_state *state) {
    int64_t version;
    *state = (struct train_state){.best_step = -1}; /* where it says nothing */
    TRY(json_get_integer(source, "version", true, STATE_VERSION, STATE_VERSION, &version));
    TRY(json_get_integer(source, "step", true, 0, INT64_MAX, &state->step));
    TRY(json_get_integer(source, "sequences", true, 0, INT64_MAX, &state->sequences));
    TRY(json_get_integer(source, "tokens", true, 0, INT64_MAX, &state->tokens));
    TRY(unpack_islands(source, island, state));
    TRY(unpack_rounded(source, &state->form.rounded));
    TRY(json_get_integer(source, "best_step", false, 0, INT64_MAX, &state->best_step));
    state->best_valid_loss = NAN; /* files of older versions name a step whose loss was no number */
    TRY(json_get_number(source, "best_valid_loss", false, -INFINITY, INFINITY, &state->best_valid_loss));
    if (!isfinite(state->best_valid_loss))
        state->best_step = -1;
    return STATUS_OK;
}

static enum status read_state(const char *directory, int64_t island, struct train_state *state) {
    char *path = path_join(directory, "training/state.json");
    json_t *object;
    enum status status = json_read_file(path, STATE_BYTES_MAX, &object);
    if (status == STATUS_OK) {
        status = unpack_state((struct json_source){path, object}, island, state);
        json_decref(object);
    }
    free(path);
    return status;
}

enum status checkpoint_read_state(const char *checkpoint, struct train_state *state) {
    return read_state(checkpoint, 0, state);
}

/* What is filled from a checkpoint, and by whom. */
struct filling {
    struct model *model;
    struct outer *outer; /* NULL: without islands */
    struct ranks *ranks;
    enum checkpoint_read read;
};

static int64_t island_of(const struct filling *f) {
    return f->ranks->mesh.coordinate[MESH_ISLAND];
}

/* The first replica of its island reads for it. */
static bool receives(const struct filling *f) {
    return f->read == CHECKPOINT_READ_BROADCAST && f->ranks->mesh.coordinate[MESH_REPLICATE] > 0;
}

/* What is to be read of a checkpoint, and checked. */
struct wanted {
    const struct filling *filling;
    struct checkpoint_manifest manifest;
    struct checkpoint_target *targets;
    size_t count;
};

static void wanted_release(struct wanted *w) {
    checkpoint_manifest_close(&w->manifest);
    free(w->targets);
}

/* A file of tensors of a part among those of the manifest; -1 where it does not name it. */
static int find_file(const struct wanted *w, const struct checkpoint_part *part, const struct safetensors *file) {
    int below = (int)(path_name(part->stem) - part->stem);
    char *name = text_format("%.*s%s", below, part->stem, path_name(file->path));
    int index = checkpoint_find_file(&w->manifest, name);
    free(name);
    return index;
}

/* Every file has one rank that sees to what nobody's rows cover: where an island of that number is here, its first
 * rank, for it reads that island's file if there is one; what no island reads is dealt out; all else is rank 0's. */
static bool is_checker(const struct wanted *w, int file) {
    const struct mesh *mesh = &w->filling->ranks->mesh;
    int64_t island = checkpoint_island_of_file(w->manifest.files[file].name);
    int ranks = mesh_rank_count(mesh), islands = mesh->size[MESH_ISLAND];
    int64_t checker = island < 0 ? 0 : island < islands ? island * (ranks / islands) : file % ranks;
    return mesh_rank(mesh) == checker;
}

/* The rows of an item that are held here; rounded ones are only checked. The header is looked at before it is checked:
 * what it says must be what this model needs, whoever wrote it. */
static enum status want_item(struct wanted *w, struct weights *weights, const struct checkpoint_part *part,
                             const struct named_tensor *item) {
    const struct safetensors *file;
    const struct safetensors_entry *entry = weights_find(weights, item->name, &file);
    uint64_t bytes = (uint64_t)tensor_bytes(item->tensor);
    if (bytes == 0)
        return STATUS_OK;
    uint64_t row_bytes = bytes / (uint64_t)item->tensor.shape[0];
    int index = find_file(w, part, file);
    if (index < 0)
        return status_fail(STATUS_FORMAT, "%s: its checkpoint's manifest does not name it", file->path);
    w->targets[w->count++] = (struct checkpoint_target){
        index, (uint64_t)(file->data - file->map.data) + entry->begin + (uint64_t)item->first_row * row_bytes, bytes,
        part->rounded ? NULL : item->tensor.data};
    return STATUS_OK;
}

/* How files of tensors begin, for one rank to check. */
static void want_headers(struct wanted *w, const struct weights *weights, const struct checkpoint_part *part) {
    for (int i = 0; i < weights->file_count; i++) {
        const struct safetensors *file = &weights->files[i];
        int index = find_file(w, part, file);
        if (index >= 0 && is_checker(w, index)) /* not named: one of its tensors tells */
            w->targets[w->count++] =
                (struct checkpoint_target){index, 0, (uint64_t)(file->data - file->map.data), NULL};
    }
}

/* The items are all tensors of the part. */
static enum status want_items(struct wanted *w, struct weights *weights, const struct checkpoint_part *part,
                              const struct named_tensor *items, int count) {
    TRY(weights_check_exactly(weights, items, count));
    TRY(memory_resize(&w->targets, w->count + (size_t)count + (size_t)weights->file_count, sizeof *w->targets));
    for (int i = 0; i < count; i++)
        TRY(want_item(w, weights, part, &items[i]));
    want_headers(w, weights, part);
    return STATUS_OK;
}

static enum status want_part(struct wanted *w, const char *directory, const struct checkpoint_part *part) {
    struct named_tensor *items;
    struct weights weights;
    int count;
    TRY(checkpoint_part_open(directory, part->stem, &weights));
    enum status status = checkpoint_part_tensors(w->filling->model, part, &items, &count);
    if (status == STATUS_OK)
        status = want_items(w, &weights, part, items, count);
    free(items);
    weights_close(&weights);
    return status;
}

/* This rank's rows of what is the same on all islands, and of the island that it goes on with. */
static enum status want_rows(struct wanted *w, const char *directory, struct checkpoint_form form) {
    const struct filling *f = w->filling;
    int64_t island = form.island_count > 0 ? island_of(f) % form.island_count : 0;
    for (int64_t i = 0; i < checkpoint_part_count(form); i++) {
        struct checkpoint_part part = checkpoint_part_at(f->model, f->outer, form, i);
        if (checkpoint_part_is_of(&part, island))
            TRY(want_part(w, directory, &part));
    }
    return STATUS_OK;
}

static bool has_target(const struct wanted *w, int file) {
    for (size_t i = 0; i < w->count; i++)
        if (w->targets[i].file == file)
            return true;
    return false;
}

/* All of the files of which nothing is wanted yet and that are this rank's to see to. */
static enum status want_the_rest(struct wanted *w) {
    TRY(memory_resize(&w->targets, w->count + w->manifest.file_count, sizeof *w->targets));
    for (size_t i = 0; i < w->manifest.file_count; i++)
        if (is_checker(w, (int)i) && !has_target(w, (int)i))
            w->targets[w->count++] = (struct checkpoint_target){(int)i, 0, w->manifest.files[i].bytes, NULL};
    return STATUS_OK;
}

/* As the files have it before anything was checked. */
static enum status want_all(struct wanted *w, const char *directory, struct checkpoint_form form) {
    TRY(checkpoint_manifest_open(&w->manifest, directory));
    if (!receives(w->filling))
        TRY(want_rows(w, directory, form));
    return want_the_rest(w);
}

/* What this rank owns, every byte of it checked against the manifest. */
static enum status read_share(const char *directory, const struct filling *f, struct checkpoint_form form) {
    struct wanted wanted = {.filling = f};
    enum status status = want_all(&wanted, directory, form);
    if (status == STATUS_OK)
        status = checkpoint_read(directory, &wanted.manifest, wanted.targets, wanted.count, f->model->device);
    wanted_release(&wanted);
    return status;
}

/* A tensor of the first replica's device to the others', a part at a time through `part` [PART_BYTES]. */
static enum status send_tensor(const struct filling *f, struct tensor t, char *part) {
    const struct device *device = f->model->device;
    struct comm *replicas = &f->ranks->replicas;
    for (size_t begin = 0, bytes = tensor_bytes(t); begin < bytes; begin += PART_BYTES) {
        size_t size = bytes - begin < PART_BYTES ? bytes - begin : PART_BYTES;
        char *data = (char *)t.data + begin;
        if (replicas->rank == 0)
            device->copy_to_host(part, data, size);
        TRY(comm_broadcast(replicas, part, size));
        if (replicas->rank > 0)
            device->copy_from_host(data, part, size);
    }
    return STATUS_OK;
}

/* What the first replica read, to the others: everything that there is, whatever the checkpoint had of it, for that a
 * rank has read something else must not let the others wait. */
static enum status send_to_replicas(const struct filling *f) {
    char *part;
    const struct model *model = f->model;
    const struct tensor *arrays[] = {model->own_weight, model->moment1, model->moment2,
                                     f->outer ? f->outer->global : NULL, f->outer ? f->outer->momentum : NULL};
    if (f->ranks->replicas.size == 1)
        return STATUS_OK;
    enum status status = comm_agree(&f->ranks->replicas, memory_alloc(&part, PART_BYTES, 1));
    if (status != STATUS_OK)
        return status;
    for (int i = 0; i < model->table.count && status == STATUS_OK; i++)
        for (size_t a = 0; a < sizeof arrays / sizeof *arrays && status == STATUS_OK; a++)
            if (arrays[a])
                status = send_tensor(f, arrays[a][i], part);
    free(part);
    return status;
}

/* Collective. One checkpoint; together the ranks read and check all of it. What there is to be read its state says,
 * which is checked with the rest. */
static enum status read_all(const char *directory, const struct filling *f, struct train_state *state) {
    enum status status = read_state(directory, island_of(f), state);
    if (status == STATUS_OK)
        status = read_share(directory, f, state->form);
    TRY(comm_agree(f->ranks->world, status));
    if (f->read == CHECKPOINT_READ_BROADCAST)
        TRY(send_to_replicas(f));
    if (f->outer && state->form.island_count == 0)
        outer_reset(f->outer); /* its weights are those that all islands begin with */
    return STATUS_OK;
}

/* Newest first, as rank 0 sees them; empty lines on the others. */
static enum status list_checkpoints(const char *directory, struct comm *world, struct text_list *paths,
                                    int64_t *count) {
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

/* Collective. Whether every byte of it is as it was written: then what is wrong with it is no damage, and an older one
 * would not do either. */
static enum status is_whole(const char *path, struct comm *world, bool *whole) {
    enum status verdict = world->rank == 0 ? checkpoint_verify(path) : STATUS_OK;
    TRY(comm_agree(world, is_damage(verdict) ? STATUS_OK : verdict));
    int32_t verifies = verdict == STATUS_OK;
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

static enum status read_newest(const struct text_list *paths, int64_t count, const struct filling *f,
                               struct train_state *state, char path[PATH_BYTES]) {
    struct comm *world = f->ranks->world;
    for (int64_t i = 0; i < count; i++) {
        if (world->rank == 0)
            snprintf(path, PATH_BYTES, "%s", paths->items[i]);
        TRY(comm_broadcast(world, path, PATH_BYTES));
        enum status status = read_all(path, f, state);
        if (!is_damage(status))
            return status;
        TRY(pass_over(path, world, status));
        memset(path, 0, PATH_BYTES);
    }
    return STATUS_OK;
}

static void tell(const char *path, int64_t saved_islands, int64_t islands) {
    log_info("resume  from %s", path);
    if (saved_islands != islands)
        log_info("resume  %lld islands saved it, %lld go on", (long long)saved_islands, (long long)islands);
}

enum status checkpoint_resume(const char *checkpoints_directory, struct model *model, struct outer *outer,
                              struct ranks *ranks, enum checkpoint_read read, struct train_state *state,
                              char path[CHECKPOINT_PATH_BYTES]) {
    const struct filling filling = {model, outer, ranks, read};
    struct text_list paths;
    int64_t count;
    memset(path, 0, PATH_BYTES);
    enum status status = list_checkpoints(checkpoints_directory, ranks->world, &paths, &count);
    if (status == STATUS_OK)
        status = read_newest(&paths, count, &filling, state, path);
    text_list_release(&paths);
    if (status == STATUS_OK && *path)
        tell(path, state->form.island_count, checkpoint_island_count(model, outer));
    return status;
}
