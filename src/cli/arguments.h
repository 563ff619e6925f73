/* Command-line arguments: --flag value, --flag=value, --switch, and --section.key value for settings. */
#pragma once

#include "base/status.h"
#include <stdbool.h>
#include <stdint.h>

enum argument_kind { ARGUMENT_STRING, ARGUMENT_INTEGER, ARGUMENT_NUMBER, ARGUMENT_SWITCH };

struct argument {
    const char *name; /* without the dashes */
    enum argument_kind kind;
    void *value;      /* const char *, int64_t, double or bool */
    const char *help;
};

struct arguments {
    const struct argument *known;
    int known_count;
    const char **pairs; /* "section.key", "value", ... in order; NULL: settings are not taken */
    int *pair_count;
    const char **positional; /* one word without dashes; NULL: not taken */
};

enum { ARGUMENT_PAIRS_MAX = 256 };

/* Parse argv[1..]; *help is set by --help or -h. STATUS_USAGE, with the nearest known flag, for what is not understood. */
enum status arguments_parse(struct arguments arguments, int argc, char **argv, bool *help) MUST_USE;

/* One line a flag, on stdout. */
void arguments_print_help(const char *verb, const char *usage, const struct argument *known, int count);
