#include "cli/arguments.h"

#include "base/text.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct argument *find(struct arguments a, const char *name, size_t size) {
    for (int i = 0; i < a.known_count; i++)
        if (strlen(a.known[i].name) == size && strncmp(a.known[i].name, name, size) == 0)
            return &a.known[i];
    return NULL;
}

static enum status fail_unknown(struct arguments a, const char *word) {
    const char *names[64];
    int count = 0;
    for (int i = 0; i < a.known_count && count < 64; i++)
        names[count++] = a.known[i].name;
    int nearest = text_nearest(word + 2, names, count);
    if (nearest >= 0)
        return status_fail(STATUS_USAGE, "unknown flag %s; the nearest known one is --%s", word, names[nearest]);
    return status_fail(STATUS_USAGE, "unknown flag %s; see --help", word);
}

static enum status set_value(const struct argument *argument, const char *value) {
    char *end;
    double number = strtod(value, &end);
    switch (argument->kind) {
    case ARGUMENT_STRING:
        *(const char **)argument->value = value;
        return STATUS_OK;
    case ARGUMENT_NUMBER:
    case ARGUMENT_INTEGER:
        if (end == value || *end || !isfinite(number) || fabs(number) > 9e15)
            return status_fail(STATUS_USAGE, "--%s must be a number, not \"%s\"", argument->name, value);
        if (argument->kind == ARGUMENT_NUMBER) {
            *(double *)argument->value = number;
            return STATUS_OK;
        }
        if (number != floor(number) || number < 0)
            return status_fail(STATUS_USAGE, "--%s must be a whole number of at least 0, not \"%s\"", argument->name,
                               value);
        *(int64_t *)argument->value = (int64_t)number;
        return STATUS_OK;
    case ARGUMENT_SWITCH:
        break;
    }
    return status_fail(STATUS_USAGE, "--%s takes no value", argument->name);
}

/* One flag at argv[*at]; moves *at past its value. */
static enum status parse_flag(struct arguments a, int argc, char **argv, int *at) {
    char *word = argv[*at], *name = word + 2, *equals = strchr(name, '=');
    size_t size = equals ? (size_t)(equals - name) : strlen(name);
    const struct argument *argument = find(a, name, size);
    bool is_setting = !argument && a.pairs && memchr(name, '.', size);
    if (!argument && !is_setting)
        return fail_unknown(a, word);
    if (argument && argument->kind == ARGUMENT_SWITCH && !equals) {
        *(bool *)argument->value = true;
        return STATUS_OK;
    }
    if (!equals && *at + 1 >= argc)
        return status_fail(STATUS_USAGE, "%s wants a value", word);
    const char *value = equals ? equals + 1 : argv[++*at];
    if (argument)
        return set_value(argument, value);
    if (*a.pair_count == ARGUMENT_PAIRS_MAX)
        return status_fail(STATUS_USAGE, "more than %d settings", ARGUMENT_PAIRS_MAX);
    if (equals)
        *equals = '\0';
    a.pairs[2 * *a.pair_count] = name;
    a.pairs[2 * (*a.pair_count)++ + 1] = value;
    return STATUS_OK;
}

enum status arguments_parse(struct arguments a, int argc, char **argv, bool *help) {
    *help = false;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            *help = true;
        } else if (strncmp(argv[i], "--", 2) == 0 && argv[i][2]) {
            TRY(parse_flag(a, argc, argv, &i));
        } else if (a.positional && !*a.positional) {
            *a.positional = argv[i];
        } else {
            return status_fail(STATUS_USAGE, "unexpected word \"%s\"; see --help", argv[i]);
        }
    }
    return STATUS_OK;
}

void arguments_print_help(const char *verb, const char *usage, const struct argument *known, int count) {
    printf("cadre %s %s\n\n", verb, usage);
    for (int i = 0; i < count; i++)
        printf("  --%-24s %s\n", known[i].name, known[i].help);
}
