/* Lines for a person, on stderr. stdout carries the product only. */
#pragma once

#include "base/status.h"
#include <stdbool.h>

/* LOG_SILENT hides warnings too: for tests of what is warned about. */
enum log_level { LOG_SILENT, LOG_QUIET, LOG_NORMAL, LOG_VERBOSE };

void log_set_level(enum log_level level); /* once, from cli/, before any thread starts */
void log_info(const char *format, ...) PRINTF_LIKE(1, 2);    /* hidden by LOG_QUIET */
void log_verbose(const char *format, ...) PRINTF_LIKE(1, 2); /* shown by LOG_VERBOSE */
void log_warn(const char *format, ...) PRINTF_LIKE(1, 2);    /* "warning: ..."; always shown */

/* A line that replaces the one before it on a terminal; finish it with log_progress_end. On anything that is not a
 * terminal nothing is printed and false is returned: print plain lines there, at a calmer pace. */
bool log_progress(const char *format, ...) PRINTF_LIKE(1, 2);
void log_progress_end(void);
