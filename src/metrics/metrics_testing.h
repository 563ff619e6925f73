/* Reading a run's metrics.jsonl in tests. */
#pragma once

#include "base/file.h"
#include "base/json.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

/* Calls line(context, object) for every line, from the first to the last. */
static inline void metrics_each_line(const char *path, void (*line)(void *context, json_t *object), void *context) {
    char *data, *text;
    size_t size;
    assert_int_equal(file_read(path, 1 << 24, &data, &size), STATUS_OK);
    for (char *rest = data; (text = strsep(&rest, "\n"));) {
        json_t *object;
        if (!*text)
            continue;
        assert_int_equal(json_parse(path, text, strlen(text), &object), STATUS_OK);
        line(context, object);
        json_decref(object);
    }
    free(data);
}
