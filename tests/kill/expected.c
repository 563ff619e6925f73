#include "expected.h"

#include "base/file.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/memory.h"
#include "checkpoint/publish.h"
#include "training.h"
#include <stdlib.h>
#include <string.h>

enum { FILE_BYTES_MAX = 64 << 20 };

/* ---- a checkpoint ------------------------------------------------------------------------------------------------------ */

static enum status hash_file(const char *directory, const char *name, uint64_t *hash) {
    char *path = path_join(directory, name), *data;
    size_t size;
    enum status status = file_read(path, FILE_BYTES_MAX, &data, &size);
    free(path);
    TRY(status);
    *hash = hash_bytes(data, size, 0);
    free(data);
    return STATUS_OK;
}

static enum status read_state(const char *directory, int64_t *step, struct expected_step *out) {
    char *path = path_join(directory, "training/state.json");
    json_t *object;
    enum status status = json_read_file(path, FILE_BYTES_MAX, &object);
    if (status == STATUS_OK) {
        struct json_source source = {path, object};
        status = json_get_integer(source, "step", true, 0, INT64_MAX, step);
        if (status == STATUS_OK)
            status = json_get_integer(source, "sequences", true, 0, INT64_MAX, &out->sequences);
        if (status == STATUS_OK)
            status = json_get_integer(source, "tokens", true, 0, INT64_MAX, &out->tokens);
        json_decref(object);
    }
    free(path);
    return status;
}

static enum status read_checkpoint(const char *path, int64_t *step, struct expected_step *out) {
    TRY(checkpoint_verify(path));
    TRY(read_state(path, step, out));
    TRY(hash_file(path, "model.safetensors", &out->model_hash));
    return hash_file(path, "training/optimizer.safetensors", &out->optimizer_hash);
}

static enum status check_checkpoint(const struct expected *expected, const char *path, int64_t step) {
    struct expected_step found;
    int64_t says;
    TRY(read_checkpoint(path, &says, &found));
    if (says != step || step < 1 || step > expected->steps)
        return status_fail(STATUS_FORMAT, "%s: says that it is of step %lld", path, (long long)says);
    const struct expected_step *wanted = &expected->at[step];
    if (found.model_hash != wanted->model_hash || found.optimizer_hash != wanted->optimizer_hash)
        return status_fail(STATUS_FORMAT, "%s: other weights or moments than in the uninterrupted run", path);
    if (found.sequences != wanted->sequences || found.tokens != wanted->tokens)
        return status_fail(STATUS_FORMAT, "%s: another state than in the uninterrupted run", path);
    return STATUS_OK;
}

/* ---- metrics ----------------------------------------------------------------------------------------------------------- */

static enum status add_without_times(const char *path, const char *line, size_t size, struct text *out) {
    static const char *const times[] = {"step_time_ms", "tokens_per_s", "flops_share"};
    json_t *object;
    TRY(json_parse(path, line, size, &object));
    for (size_t i = 0; i < sizeof times / sizeof *times; i++)
        json_object_del(object, times[i]);
    char *text = json_dumps(object, JSON_COMPACT | JSON_PRESERVE_ORDER);
    text_printf(out, "%s\n", text);
    free(text);
    json_decref(object);
    return STATUS_OK;
}

static enum status read_metrics(const char *run_directory, struct text *out) {
    char *path = path_join(run_directory, "metrics.jsonl"), *data = NULL;
    size_t size = 0;
    enum status status = file_read(path, FILE_BYTES_MAX, &data, &size);
    for (char *line = data, *end; status == STATUS_OK && line < data + size; line = end + 1) {
        end = memchr(line, '\n', size - (size_t)(line - data));
        if (!end)
            status = status_fail(STATUS_FORMAT, "%s: its last line has no end", path);
        else
            status = add_without_times(path, line, (size_t)(end - line), out);
        if (!end)
            break;
    }
    free(data);
    free(path);
    return status;
}

int64_t expected_last_step(const char *run_directory) {
    char *path = path_join(run_directory, "metrics.jsonl"), *data;
    size_t size;
    long long last = 0, step;
    if (file_exists(path) && file_read(path, FILE_BYTES_MAX, &data, &size) == STATUS_OK) {
        for (char *line = data, *end; (end = strchr(line, '\n')); line = end + 1)
            if (sscanf(line, "{\"step\":%lld,", &step) == 1 && step > last)
                last = step;
        free(data);
    }
    free(path);
    return last;
}

/* ---- what is expected -------------------------------------------------------------------------------------------------- */

enum status expected_read(struct expected *expected, const char *run_directory, int64_t steps) {
    struct text metrics = {0};
    *expected = (struct expected){.steps = steps};
    TRY(memory_alloc(&expected->at, (size_t)steps + 1, sizeof *expected->at));
    enum status status = read_metrics(run_directory, &metrics);
    expected->metrics = metrics.data;
    for (int64_t step = 1; step <= steps && status == STATUS_OK; step++) {
        char *path = text_format("%s/checkpoints/step-%06lld", run_directory, (long long)step);
        int64_t says;
        status = read_checkpoint(path, &says, &expected->at[step]);
        if (status == STATUS_OK && says != step)
            status = status_fail(STATUS_FORMAT, "%s: says that it is of step %lld", path, (long long)says);
        free(path);
    }
    return status;
}

void expected_release(struct expected *expected) {
    free(expected->at);
    free(expected->metrics);
}

/* ---- checks ------------------------------------------------------------------------------------------------------------ */

enum status expected_check_newest(const struct expected *expected, const char *checkpoints, int64_t low, int64_t high,
                                  int64_t *newest) {
    char *path = NULL;
    *newest = 0;
    enum status status = checkpoint_latest(checkpoints, checkpoint_verify, &path, newest);
    if (status == STATUS_NOT_FOUND && low == 0)
        return STATUS_OK;
    TRY(status);
    status = check_checkpoint(expected, path, *newest);
    if (status == STATUS_OK && (*newest < low || *newest > high))
        status = status_fail(STATUS_FORMAT, "%s: is the newest good one, but must be of step %lld to %lld", path,
                             (long long)low, (long long)high);
    free(path);
    return status;
}

enum status expected_check_named(const struct expected *expected, const char *checkpoints, int64_t damaged_step) {
    struct text_list paths;
    TRY(checkpoint_list(checkpoints, &paths));
    enum status status = STATUS_OK;
    for (size_t i = 0; i < paths.count && status == STATUS_OK; i++) {
        int64_t step = checkpoint_step_of(paths.items[i]);
        bool has_name = !strchr(path_name(paths.items[i]), '.'); /* not stepped aside */
        if (!has_name || (step == damaged_step && checkpoint_verify(paths.items[i]) != STATUS_OK))
            continue;
        status = check_checkpoint(expected, paths.items[i], step);
    }
    text_list_release(&paths);
    return status;
}

static enum status check_nothing_left(const char *checkpoints) {
    struct text_list names;
    TRY(directory_list(checkpoints, &names));
    enum status status = STATUS_OK;
    for (size_t i = 0; i < names.count && status == STATUS_OK; i++)
        if (strchr(names.items[i], '.'))
            status = status_fail(STATUS_FORMAT, "%s/%s: is left over", checkpoints, names.items[i]);
    text_list_release(&names);
    return status;
}

enum status expected_check_end(const struct expected *expected, const char *run_directory, int64_t from_step) {
    char *checkpoints = training_checkpoints(run_directory);
    int64_t newest;
    enum status status = expected_check_newest(expected, checkpoints, expected->steps, expected->steps, &newest);
    if (status == STATUS_OK)
        status = expected_check_named(expected, checkpoints, -1);
    if (status == STATUS_OK && from_step < expected->steps)
        status = check_nothing_left(checkpoints);
    free(checkpoints);
    return status;
}

enum status expected_check_metrics(const struct expected *expected, const char *run_directory) {
    struct text metrics = {0};
    enum status status = read_metrics(run_directory, &metrics);
    if (status == STATUS_OK && strcmp(text_string(&metrics), expected->metrics) != 0)
        status = status_fail(STATUS_FORMAT, "%s/metrics.jsonl: other lines than in the uninterrupted run", run_directory);
    text_release(&metrics);
    return status;
}
