/* Reading JSON with checks and messages; a thin front over jansson, whose json_t is used directly for the rest. */
#pragma once

#include "base/status.h"
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

/* Parse a file of at most limit_bytes; duplicate keys are refused. The caller json_decrefs *out. */
enum status json_read_file(const char *path, uint64_t limit_bytes, json_t **out) MUST_USE;
enum status json_parse(const char *label, const char *data, size_t size, json_t **out) MUST_USE;

/* A name of the system's, which need not be UTF-8: then with '?' for every byte that is not ASCII. */
json_t *json_name(const char *name);

/* Write indented JSON so that the file is always whole (file_write). */
enum status json_write_file(const char *path, const json_t *value) MUST_USE;
enum status json_write_draft(const char *path, const json_t *value) MUST_USE; /* the same by file_write_draft */

/* Members of `object`. `label` names the file in messages. A missing or null member leaves *out as it was, so that the
 * caller's default stands; `required` makes that an error. A number outside [low, high] or of another type is one. */
struct json_source {
    const char *label;
    const json_t *object;
};
enum status json_get_integer(struct json_source source, const char *key, bool required, int64_t low, int64_t high,
                             int64_t *out) MUST_USE;
enum status json_get_number(struct json_source source, const char *key, bool required, double low, double high,
                            double *out) MUST_USE;
enum status json_get_boolean(struct json_source source, const char *key, bool required, bool *out) MUST_USE;
/* The string is borrowed from the object. */
enum status json_get_string(struct json_source source, const char *key, bool required, const char **out) MUST_USE;
