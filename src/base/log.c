#include "base/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

static enum log_level level = LOG_NORMAL;
static bool progress_open;

void log_set_level(enum log_level new_level) {
    level = new_level;
}

static void print_line(const char *prefix, const char *format, va_list arguments) {
    log_progress_end();
    char line[4096];
    vsnprintf(line, sizeof line, format, arguments);
    fprintf(stderr, "%s%s\n", prefix, line);
}

#define PRINT_LINE(prefix)                                                                                   \
    va_list arguments;                                                                                       \
    va_start(arguments, format);                                                                             \
    print_line(prefix, format, arguments);                                                                   \
    va_end(arguments)

void log_info(const char *format, ...) {
    if (level <= LOG_QUIET)
        return;
    PRINT_LINE("");
}

void log_verbose(const char *format, ...) {
    if (level != LOG_VERBOSE)
        return;
    PRINT_LINE("");
}

void log_warn(const char *format, ...) {
    if (level == LOG_SILENT)
        return;
    PRINT_LINE("warning: ");
}

bool log_progress(const char *format, ...) {
    if (level <= LOG_QUIET || !isatty(STDERR_FILENO))
        return false;
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    fprintf(stderr, "\r\033[K%s", line);
    fflush(stderr);
    progress_open = true;
    return true;
}

void log_progress_end(void) {
    if (progress_open)
        fputc('\n', stderr);
    progress_open = false;
}
