#include "metrics/metrics_file.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const size_t METRICS_BYTES_MAX = (size_t)1 << 40;

json_t *metrics_number(double value) {
    return isfinite(value) ? json_real(value) : json_null();
}

/* What one line says about the order of things; -1 where it does not say. */
struct line {
    int64_t step, to_step;
    bool is_object, is_return;
};

static int64_t integer_or_none(const json_t *object, const char *key) {
    const json_t *value = json_object_get(object, key);
    return value ? json_integer_value(value) : -1;
}

static struct line read_line(const char *data, size_t size) {
    json_error_t error;
    json_t *object = json_loadb(data, size, 0, &error);
    struct line line = {integer_or_none(object, "step"), integer_or_none(object, "to_step"), json_is_object(object), false};
    line.is_return = line.to_step >= 0;
    json_decref(object);
    return line;
}

/* The end of the line that begins here; NULL behind the last whole one. */
static const char *end_of_line(const char *begin, const char *end) {
    return memchr(begin, '\n', (size_t)(end - begin));
}

/* Where the stretch begins in which last_step last counted: a step above to_step can only have been saved after it. */
static const char *find_stretch(const char *data, const char *end, int64_t last_step) {
    const char *stretch = data;
    for (const char *begin = data, *stop; (stop = end_of_line(begin, end)); begin = stop + 1) {
        struct line line = read_line(begin, (size_t)(stop - begin));
        if (line.is_return && line.to_step < last_step)
            stretch = stop + 1;
    }
    return stretch;
}

static void keep_lines(const char *data, const char *end, int64_t last_step, struct text *kept) {
    const char *stretch = find_stretch(data, end, last_step);
    bool is_later = false;
    for (const char *begin = data, *stop; (stop = end_of_line(begin, end)); begin = stop + 1) {
        struct line line = read_line(begin, (size_t)(stop - begin));
        is_later = is_later || (begin >= stretch && line.step > last_step);
        if (line.is_object && (line.is_return || !is_later))
            text_add(kept, begin, (size_t)(stop - begin) + 1);
    }
}

static enum status drop_later_lines(const char *path, int64_t last_step) {
    char *data;
    size_t size;
    TRY(file_read(path, METRICS_BYTES_MAX, &data, &size));
    struct text kept = {0};
    keep_lines(data, data + size, last_step, &kept);
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
