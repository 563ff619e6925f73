#include "base/json.h"

#include "base/file.h"
#include "base/memory.h"
#include <stdlib.h>
#include <string.h>

json_t *json_name(const char *name) {
    json_t *whole = json_string(name);
    if (whole)
        return whole;
    char *ascii = memory_copy_string(name);
    for (char *c = ascii; *c; c++)
        *c = (unsigned char)*c < 0x80 ? *c : '?';
    whole = json_string(ascii);
    free(ascii);
    return whole;
}

enum status json_parse(const char *label, const char *data, size_t size, json_t **out) {
    json_error_t error;
    *out = json_loadb(data, size, JSON_REJECT_DUPLICATES, &error);
    if (!*out)
        return status_fail(STATUS_FORMAT, "%s: not valid JSON at line %d: %s", label, error.line, error.text);
    return STATUS_OK;
}

enum status json_read_file(const char *path, uint64_t limit_bytes, json_t **out) {
    char *data;
    size_t size;
    TRY(file_read(path, limit_bytes, &data, &size));
    enum status status = json_parse(path, data, size, out);
    free(data);
    return status;
}

static enum status write_with(enum status (*write)(const char *path, const void *data, size_t size), const char *path,
                              const json_t *value) {
    char *data = json_dumps(value, JSON_INDENT(2) | JSON_PRESERVE_ORDER | JSON_ENCODE_ANY);
    if (!data)
        return status_fail(STATUS_MEMORY, "%s: no memory to write it", path);
    size_t size = strlen(data);
    data[size++] = '\n'; /* in place of the zero byte: size is passed on */
    enum status status = write(path, data, size);
    free(data);
    return status;
}

enum status json_write_file(const char *path, const json_t *value) {
    return write_with(file_write, path, value);
}

enum status json_write_draft(const char *path, const json_t *value) {
    return write_with(file_write_draft, path, value);
}

static enum status find(struct json_source source, const char *key, bool required, const json_t **member) {
    *member = json_object_get(source.object, key);
    if (*member && json_is_null(*member))
        *member = NULL;
    if (!*member && required)
        return status_fail(STATUS_FORMAT, "%s: \"%s\" is missing", source.label, key);
    return STATUS_OK;
}

enum status json_get_integer(struct json_source source, const char *key, bool required, int64_t low, int64_t high,
                             int64_t *out) {
    const json_t *member;
    TRY(find(source, key, required, &member));
    if (!member)
        return STATUS_OK;
    if (!json_is_integer(member))
        return status_fail(STATUS_FORMAT, "%s: \"%s\" must be a whole number", source.label, key);
    int64_t value = json_integer_value(member);
    if (value < low || value > high)
        return status_fail(STATUS_FORMAT, "%s: \"%s\" is %lld, it must lie in %lld..%lld", source.label, key,
                           (long long)value, (long long)low, (long long)high);
    *out = value;
    return STATUS_OK;
}

enum status json_get_number(struct json_source source, const char *key, bool required, double low, double high,
                            double *out) {
    const json_t *member;
    TRY(find(source, key, required, &member));
    if (!member)
        return STATUS_OK;
    if (!json_is_number(member))
        return status_fail(STATUS_FORMAT, "%s: \"%s\" must be a number", source.label, key);
    double value = json_number_value(member);
    if (!(value >= low && value <= high))
        return status_fail(STATUS_FORMAT, "%s: \"%s\" is %g, it must lie in %g..%g", source.label, key, value, low,
                           high);
    *out = value;
    return STATUS_OK;
}

enum status json_get_boolean(struct json_source source, const char *key, bool required, bool *out) {
    const json_t *member;
    TRY(find(source, key, required, &member));
    if (!member)
        return STATUS_OK;
    if (!json_is_boolean(member))
        return status_fail(STATUS_FORMAT, "%s: \"%s\" must be true or false", source.label, key);
    *out = json_is_true(member);
    return STATUS_OK;
}

enum status json_get_string(struct json_source source, const char *key, bool required, const char **out) {
    const json_t *member;
    TRY(find(source, key, required, &member));
    if (!member)
        return STATUS_OK;
    if (!json_is_string(member))
        return status_fail(STATUS_FORMAT, "%s: \"%s\" must be a string", source.label, key);
    *out = json_string_value(member);
    return STATUS_OK;
}
