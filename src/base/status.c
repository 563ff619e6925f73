#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MESSAGE_BYTES 2048

static _Thread_local char message[MESSAGE_BYTES];

/* A message is one line, whatever is in the names and texts that it tells of, and does not speak to a terminal. */
static void keep(const char fresh[MESSAGE_BYTES]) {
    int i = 0;
    for (; fresh[i]; i++)
        message[i] = (unsigned char)fresh[i] < ' ' || fresh[i] == 0x7F ? '?' : fresh[i];
    message[i] = '\0';
}

enum status status_fail(enum status code, const char *format, ...) {
    CHECK(code != STATUS_OK);
    /* The arguments may point into the old message, so the new one is written beside it first. */
    char fresh[MESSAGE_BYTES];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(fresh, sizeof fresh, format, arguments);
    va_end(arguments);
    keep(fresh);
    return code;
}

enum status status_prefix(enum status code, const char *format, ...) {
    if (code == STATUS_OK)
        return code;
    char fresh[MESSAGE_BYTES];
    va_list arguments;
    va_start(arguments, format);
    int used = vsnprintf(fresh, sizeof fresh, format, arguments);
    va_end(arguments);
    if (used >= 0 && used < MESSAGE_BYTES)
        snprintf(fresh + used, (size_t)(MESSAGE_BYTES - used), ": %s", message);
    keep(fresh);
    return code;
}

const char *status_text(void) {
    return message;
}

_Noreturn void check_failed(const char *file, int line, const char *function, const char *condition,
                            int has_values, long long left, long long right) {
    fprintf(stderr, "cadre: internal error at %s:%d in %s: %s does not hold", file, line, function, condition);
    if (has_values)
        fprintf(stderr, " (%lld, %lld)", left, right);
    fputs("; please report this line\n", stderr);
    abort();
}
