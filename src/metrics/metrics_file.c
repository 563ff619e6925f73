#include "metrics/metrics_file.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { METRICS_BYTES_MAX = 1 << 30 };

json_t *metrics_number(double value) {
    return isfinite(value) ? json_real(value) : json_null();
}

static bool should_keep(const char *line, size_t size, int64_t last_step) {
    json_error_t error;
    json_t *object = json_loadb(line, size, 0, &error);
    const json_t *step = json_object_get(object, "step");
    bool keep = json_is_object(object) && (!step || json_integer_value(step) <= last_step);
    json_decref(object);
    return keep;
}

static enum status drop_later_lines(const char *path, int64_t last_step) {
    char *data;
    size_t size;
    TRY(file_read(path, METRICS_BYTES_MAX, &data, &size));
    struct text kept = {0};
    for (char *line = data, *end; (end = memchr(line, '\n', size - (size_t)(line - data))); line = end + 1)
        if (should_keep(line, (size_t)(end - line), last_step))
            text_add(&kept, line, (size_t)(end - line) + 1);
    enum status status = kept.size == size ? STATUS_OK : file_write(path, text_string(&kept), kept.size);
    text_release(&kept);
    free(data);
    return status;
}

enum status metrics_file_open(struct metrics_file *file, const char *path, int64_t last_step) {
    *file = (struct metrics_file){0};
    if (file_exists(path))
        TRY(drop_later_lines(path, last_step));
    TRY(file_writer_open(&file->writer, path, true));
    file->open = true;
    return STATUS_OK;
}

enum status metrics_file_add(struct metrics_file *file, json_t *object) {
    char *line = json_dumps(object, JSON_COMPACT | JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(17));
    json_decref(object);
    CHECK(line != NULL);
    size_t size = strlen(line);
    line[size++] = '\n'; /* one write a line: a crash tears at most the last one */
    enum status status = file_writer_add(&file->writer, line, size);
    free(line);
    return status;
}

void metrics_file_close(struct metrics_file *file) {
    if (file->open) {
        enum status ignored = file_writer_close(&file->writer);
        (void)ignored; /* every line was handed over when it was added */
    }
    file->open = false;
}
