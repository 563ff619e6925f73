#include "cli/inspect_checkpoint.h"

#include "base/file.h"
#include "base/json.h"
#include "base/memory.h"
#include "base/text.h"
#include "checkpoint/publish.h"
#include "checkpoint/weights.h"
#include "train/parts.h"
#include "train/run_config.h"
#include "train/state.h"
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

/* One checkpoint as far as it can be read. */
struct finding {
    char *path;
    int64_t step;
    enum status status; /* of looking at it */
    char *message;      /* what is wrong; NULL: nothing */
    struct checkpoint_manifest manifest;
    bool has_state;
    struct train_state state;
};

static char *join(const char *a, const char *b) {
    return path_join(a, b);
}

bool inspect_is_checkpoint(const char *directory) {
    char *manifest = join(directory, "training/manifest.json"), *checkpoints = join(directory, "checkpoints");
    bool found = file_exists(manifest) || directory_exists(checkpoints);
    free(checkpoints);
    free(manifest);
    return found;
}

/* ---- looking ----------------------------------------------------------------------------------------------------- */

static enum status check_sizes(const char *path, const struct checkpoint_manifest *manifest) {
    for (size_t i = 0; i < manifest->file_count; i++) {
        char *name = join(path, manifest->files[i].name);
        uint64_t size = 0;
        enum status status = file_size(name, &size);
        if (status == STATUS_OK && size != manifest->files[i].bytes)
            status = status_fail(STATUS_FORMAT, "%s: has %llu bytes, its checkpoint wrote %llu", name,
                                 (unsigned long long)size, (unsigned long long)manifest->files[i].bytes);
        free(name);
        TRY(status);
    }
    return STATUS_OK;
}

static enum status look(struct finding *f, bool verify) {
    TRY(checkpoint_manifest_open(&f->manifest, f->path));
    TRY(check_sizes(f->path, &f->manifest));
    TRY(checkpoint_read_state(f->path, &f->state));
    f->has_state = true;
    return verify ? checkpoint_verify(f->path) : STATUS_OK;
}

static void find_one(struct finding *f, const char *path, bool verify) {
    *f = (struct finding){.path = memory_copy_string(path), .step = checkpoint_step_of(path)};
    f->status = look(f, verify);
    if (f->status != STATUS_OK)
        f->message = memory_copy_string(status_text());
}

static void finding_release(struct finding *f) {
    checkpoint_manifest_close(&f->manifest);
    free(f->path);
    free(f->message);
}

static double bytes_of(const struct checkpoint_manifest *manifest) {
    double bytes = 0;
    for (size_t i = 0; i < manifest->file_count; i++)
        bytes += (double)manifest->files[i].bytes;
    return bytes;
}

/* ---- for a person ------------------------------------------------------------------------------------------------ */

static void print_saved(const char *path) {
    struct stat info;
    struct tm when;
    char line[64] = "";
    char *manifest = join(path, "training/manifest.json");
    if (stat(manifest, &info) == 0 && localtime_r(&info.st_mtime, &when))
        strftime(line, sizeof line, "%Y-%m-%d %H:%M:%S", &when);
    printf("  %-20s", line);
    free(manifest);
}

static void print_list(const struct finding *findings, size_t count, bool verify) {
    for (size_t i = 0; i < count; i++) {
        const struct finding *f = &findings[i];
        char bytes[32];
        printf("%-22s", path_name(f->path));
        print_saved(f->path);
        if (f->message)
            printf("  damaged: %s\n", f->message);
        else
            printf("  %10s  %s%s\n", text_bytes(bytes, bytes_of(&f->manifest)), verify ? "good" : "whole",
                   f->has_state && f->state.best_step == f->step ? ", the best held-out loss so far" : "");
    }
}

static void print_entry(const struct safetensors *file, const struct safetensors_entry *entry) {
    struct text shape = {0};
    for (int d = 0; d < entry->dim_count; d++)
        text_printf(&shape, "%s%" PRId64, d ? "," : "", entry->shape[d]);
    uint64_t data = (uint64_t)(file->data - file->map.data);
    printf("  %-56s %-4s [%s]  %s, byte %" PRIu64 "\n", entry->name, safetensors_dtype_name(entry->dtype),
           text_string(&shape), path_name(file->path), data + entry->begin);
    text_release(&shape);
}

static enum status print_tensors(const char *checkpoint, const char *stem) {
    struct weights weights;
    TRY(checkpoint_part_open(checkpoint, stem, &weights));
    for (int i = 0; i < weights.name_count; i++) {
        const struct safetensors *file = &weights.files[weights.names[i].file];
        print_entry(file, &file->entries[weights.names[i].entry]);
    }
    weights_close(&weights);
    return STATUS_OK;
}

static enum status print_all_tensors(const char *path, struct checkpoint_form form) {
    for (int64_t i = 0; i < checkpoint_part_count(form); i++) {
        char stem[CHECKPOINT_STEM_BYTES];
        checkpoint_part_stem(form, i, stem);
        TRY(print_tensors(path, stem));
    }
    return STATUS_OK;
}

static void print_files(const struct checkpoint_manifest *manifest) {
    for (size_t i = 0; i < manifest->file_count; i++) {
        const struct checkpoint_file *file = &manifest->files[i];
        char bytes[32];
        uint64_t sum = 0;
        for (size_t k = 0; k < file->extent_count; k++)
            sum = sum * 31 + file->extents[k].hash;
        printf("  %-44s %10s  %4zu extent%s  %016" PRIx64 "\n", file->name, text_bytes(bytes, (double)file->bytes),
               file->extent_count, file->extent_count == 1 ? " " : "s",
               file->extent_count == 1 ? file->extents[0].hash : sum);
    }
}

/* Steps that the run was to have; 0 where nobody says. */
static int64_t planned_steps(const char *path) {
    struct run_config config;
    char *ini = join(path, "training/config.ini");
    run_config_init(&config);
    config.train.steps = 0;
    if (!file_exists(ini) || setting_read_ini(run_config_group(), &config, ini) != STATUS_OK)
        config.train.steps = 0;
    free(ini);
    return config.train.steps;
}

static void print_resume(const struct finding *f, const char *run_directory) {
    char sequences[32], tokens[32];
    int64_t steps = planned_steps(f->path);
    if (steps > 0 && f->state.step >= steps)
        printf("resume         nothing is left to do: step %" PRId64 " of %" PRId64 "; more with --train.steps\n",
               f->state.step, steps);
    else
        printf("resume         cadre train --run.directory %s goes on from step %" PRId64 " of %" PRId64 "\n",
               run_directory, f->state.step, steps);
    printf("               %s sequences drawn, %s tokens learnt\n", text_count(sequences, f->state.sequences),
           text_count(tokens, f->state.tokens));
}

static void print_islands(const struct train_state *state) {
    const struct outer_plan *plan = &state->plan;
    int64_t count = state->form.island_count;
    if (count == 0)
        return;
    printf("islands        %" PRId64 ", each with weights and moments of its own; the model's are what they share\n",
           count);
    printf("               they met every %" PRId64 " steps, in %d fragment%s\n", plan->sync_steps,
           plan->fragment_count, plan->fragment_count == 1 ? "" : "s");
    printf("               any number can go on (--diloco.replicas): island i from island i mod %" PRId64
           ", a run without islands from the model\n",
           count);
}

static enum status print_newest(const struct finding *f, const char *run_directory,
                                struct inspect_checkpoint_options options) {
    TRY(options.print_model(f->path));
    print_files(&f->manifest);
    if (f->state.form.rounded)
        printf("weights        the model's in bf16; a resume goes on from those in f32, in training/\n");
    if (options.tensors)
        TRY(print_all_tensors(f->path, f->state.form));
    printf("checked        %s\n", options.verify ? "every byte against the manifest"
                                                 : "the manifest and the files' sizes; --verify reads every byte");
    print_islands(&f->state);
    print_resume(f, run_directory);
    return STATUS_OK;
}

/* ---- for a program ----------------------------------------------------------------------------------------------- */

static json_t *describe(const struct finding *f, bool verify) {
    json_t *object = json_pack("{s:o,s:I,s:b,s:b}", "path", json_name(f->path), "step", (json_int_t)f->step, "good", !f->message,
                               "verified", verify);
    if (f->message)
        json_object_set_new(object, "message", json_name(f->message));
    if (f->has_state) {
        json_object_set_new(object, "sequences", json_integer(f->state.sequences));
        json_object_set_new(object, "tokens", json_integer(f->state.tokens));
        json_object_set_new(object, "weights", json_string(f->state.form.rounded ? "bf16" : "fp32"));
        if (f->state.form.island_count > 0)
            json_object_set_new(object, "islands", json_integer(f->state.form.island_count));
    }
    json_t *files = json_array();
    for (size_t i = 0; i < f->manifest.file_count; i++)
        json_array_append_new(files, json_pack("{s:s,s:I,s:I}", "name", f->manifest.files[i].name, "bytes",
                                               (json_int_t)f->manifest.files[i].bytes, "extents",
                                               (json_int_t)f->manifest.files[i].extent_count));
    json_object_set_new(object, "files", files);
    return object;
}

static void print_json(const struct finding *findings, size_t count, bool verify) {
    for (size_t i = 0; i < count; i++) {
        json_t *object = describe(&findings[i], verify);
        json_dumpf(object, stdout, JSON_COMPACT | JSON_PRESERVE_ORDER);
        putchar('\n');
        json_decref(object);
    }
}

/* ---- all of it --------------------------------------------------------------------------------------------------- */

/* The first failure that is not a lack of memory or the like: what to exit with. */
static enum status conclude(const struct finding *findings, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (findings[i].message)
            return status_fail(findings[i].status, "%s", findings[i].message);
    return STATUS_OK;
}

static enum status report(const struct finding *findings, size_t count, const char *directory, bool is_run,
                          struct inspect_checkpoint_options options) {
    size_t good = 0;
    while (good < count && findings[good].message)
        good++;
    if (options.json)
        print_json(findings, count, options.verify);
    else if (is_run || good == count) {
        print_list(findings, count, options.verify);
        printf("\n");
    }
    if (!options.json && good < count) {
        char *run_directory = is_run ? memory_copy_string(directory) : text_format("%s/../..", directory);
        enum status status = print_newest(&findings[good], run_directory, options);
        free(run_directory);
        TRY(status);
    }
    return conclude(findings, count);
}

enum status inspect_checkpoint(const char *directory, struct inspect_checkpoint_options options) {
    struct text_list paths = {0};
    char *manifest = join(directory, "training/manifest.json"), *checkpoints = join(directory, "checkpoints");
    bool is_run = !file_exists(manifest);
    enum status status = STATUS_OK;
    if (is_run)
        status = checkpoint_list(checkpoints, &paths);
    else
        text_list_add(&paths, directory);
    if (status == STATUS_OK && paths.count == 0)
        status = status_fail(STATUS_NOT_FOUND, "%s: no checkpoint", checkpoints);
    free(checkpoints);
    free(manifest);
    struct finding *findings = NULL;
    size_t count = 0;
    if (status == STATUS_OK)
        status = memory_alloc(&findings, paths.count, sizeof *findings);
    for (; status == STATUS_OK && count < paths.count; count++)
        find_one(&findings[count], paths.items[count], options.verify);
    if (status == STATUS_OK)
        status = report(findings, count, directory, is_run, options);
    for (size_t i = 0; i < count; i++)
        finding_release(&findings[i]);
    free(findings);
    text_list_release(&paths);
    return status;
}
