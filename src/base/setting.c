#include "base/setting.h"

#include "base/file.h"
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { INI_BYTES_MAX = 1 << 20 };

static const struct setting *find(struct setting_group group, const char *name, size_t *base) {
    for (int t = 0; t < group.count; t++)
        for (int i = 0; i < group.tables[t].count; i++) {
            const struct setting *setting = &group.tables[t].settings[i];
            size_t section_size = strlen(setting->section);
            if (strncmp(name, setting->section, section_size) == 0 && name[section_size] == '.' &&
                strcmp(name + section_size + 1, setting->key) == 0) {
                *base = group.tables[t].base;
                return setting;
            }
        }
    return NULL;
}

static enum status fail_unknown(struct setting_group group, const char *name, const char *origin) {
    struct text_list names = {0};
    for (int t = 0; t < group.count; t++)
        for (int i = 0; i < group.tables[t].count; i++) {
            char *full = text_format("%s.%s", group.tables[t].settings[i].section, group.tables[t].settings[i].key);
            text_list_add(&names, full);
            free(full);
        }
    int nearest = text_nearest(name, (const char *const *)names.items, (int)names.count);
    enum status status =
        nearest >= 0 ? status_fail(STATUS_USAGE, "%s: unknown key %s; the nearest known one is %s", origin, name,
                                   names.items[nearest])
                     : status_fail(STATUS_USAGE, "%s: unknown key %s", origin, name);
    text_list_release(&names);
    return status;
}

static enum status fail_value(const struct setting *setting, const char *value, const char *origin,
                              const char *wanted) {
    return status_fail(STATUS_USAGE, "%s: %s.%s must be %s, not \"%s\"", origin, setting->section, setting->key,
                       wanted, value);
}

static enum status set_number(const struct setting *setting, const char *value, const char *origin, double *out) {
    char *end;
    errno = 0;
    double number = strtod(value, &end);
    if (end == value || *end || errno == ERANGE || !isfinite(number))
        return fail_value(setting, value, origin, "a number");
    if (number < setting->low || number > setting->high)
        return status_fail(STATUS_USAGE, "%s: %s.%s is %s, it must lie in %g..%g", origin, setting->section,
                           setting->key, value, setting->low, setting->high);
    *out = number;
    return STATUS_OK;
}

static enum status set_integer(const struct setting *setting, const char *value, const char *origin, int64_t *out) {
    double number;
    TRY(set_number(setting, value, origin, &number));
    if (number != floor(number) || fabs(number) > 9e15)
        return fail_value(setting, value, origin, "a whole number");
    *out = (int64_t)number;
    return STATUS_OK;
}

static enum status set_boolean(const struct setting *setting, const char *value, const char *origin, bool *out) {
    static const char *const yes[] = {"true", "yes", "1", "on"}, *const no[] = {"false", "no", "0", "off"};
    for (size_t i = 0; i < sizeof yes / sizeof *yes; i++) {
        if (strcasecmp(value, yes[i]) == 0 || strcasecmp(value, no[i]) == 0) {
            *out = strcasecmp(value, yes[i]) == 0;
            return STATUS_OK;
        }
    }
    return fail_value(setting, value, origin, "true or false");
}

static enum status set_choice(const struct setting *setting, const char *value, const char *origin, int *out) {
    struct text wanted = {0};
    for (int i = 0; setting->choices[i]; i++) {
        if (strcmp(value, setting->choices[i]) == 0) {
            *out = i;
            text_release(&wanted);
            return STATUS_OK;
        }
        text_printf(&wanted, "%s%s", i ? " | " : "", setting->choices[i]);
    }
    enum status status = fail_value(setting, value, origin, text_string(&wanted));
    text_release(&wanted);
    return status;
}

enum status setting_set(struct setting_group group, void *config, const char *name, const char *value,
                        const char *origin) {
    size_t base = 0;
    const struct setting *setting = find(group, name, &base);
    if (!setting)
        return fail_unknown(group, name, origin);
    void *member = (char *)config + base + setting->offset;
    switch (setting->kind) {
    case SETTING_INTEGER:
        return set_integer(setting, value, origin, member);
    case SETTING_NUMBER:
        return set_number(setting, value, origin, member);
    case SETTING_BOOLEAN:
        return set_boolean(setting, value, origin, member);
    case SETTING_CHOICE:
        return set_choice(setting, value, origin, member);
    case SETTING_STRING:
        if (strlen(value) >= SETTING_STRING_BYTES || strchr(value, '\n'))
            return fail_value(setting, "...", origin, "one line of at most 511 bytes");
        strcpy(member, value);
        return STATUS_OK;
    }
    CHECK(!"a kind of setting that does not exist");
    return STATUS_USAGE;
}

/* Files of settings. They are read here and not by inih, which cuts lines at 200 bytes and has no way to write a value that
 * begins or ends with a blank, or has a semicolon behind one: what was written would not be what is read. */

/* The text between leading and trailing blanks, cut in place. */
static char *trim(char *text) {
    text += strspn(text, " \t\r");
    size_t size = strlen(text);
    while (size > 0 && strchr(" \t\r", text[size - 1]))
        text[--size] = '\0';
    return text;
}

static char *find_remark(char *text) {
    for (char *c = text; *c; c++)
        if (*c == ';' && (c == text || c[-1] == ' ' || c[-1] == '\t'))
            return c;
    return NULL;
}

/* What follows '='. What a blank or a semicolon would change stands in quotes, as write_string puts it. */
static char *read_value(char *text) {
    text = trim(text);
    char *last = *text == '"' ? strrchr(text, '"') : text, *rest = last > text ? last + 1 + strspn(last + 1, " \t") : NULL;
    if (rest && (*rest == '\0' || *rest == ';')) {
        *last = '\0';
        return text + 1;
    }
    char *remark = find_remark(text);
    if (remark)
        *remark = '\0';
    return trim(text);
}

static enum status read_ini_line(struct setting_group group, void *config, const char *origin, char *line, char **section) {
    line = trim(line);
    if (*line == '\0' || *line == ';' || *line == '#')
        return STATUS_OK;
    char *end = *line == '[' ? strchr(line, ']') : strchr(line, '=');
    if (!end)
        return status_fail(STATUS_FORMAT, "%s is not \"[section]\" or \"key = value\"", origin);
    *end = '\0';
    if (*line == '[') {
        *section = line + 1;
        return STATUS_OK;
    }
    char *name = text_format("%s.%s", *section, trim(line));
    enum status status = setting_set(group, config, name, read_value(end + 1), origin);
    free(name);
    return status;
}

enum status setting_read_ini(struct setting_group group, void *config, const char *path) {
    static char none[] = "";
    char *data, *section = none;
    size_t size;
    TRY(file_read(path, INI_BYTES_MAX, &data, &size));
    enum status status = memchr(data, '\0', size) ? status_fail(STATUS_FORMAT, "%s: holds a zero byte", path) : STATUS_OK;
    char *line = data + (strncmp(data, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0);
    for (int number = 1; line && status == STATUS_OK; number++) {
        char *next = strchr(line, '\n'), *origin = text_format("%s line %d", path, number);
        if (next)
            *next++ = '\0';
        status = read_ini_line(group, config, origin, line, &section);
        free(origin);
        line = next;
    }
    free(data);
    return status;
}

static void write_string(const char *value, struct text *out) {
    size_t size = strlen(value);
    bool quoted = size > 0 && (strchr(" \t\r\";", value[0]) || strchr(" \t\r\"", value[size - 1]) || strstr(value, " ;") ||
                               strstr(value, "\t;"));
    text_printf(out, quoted ? "\"%s\"" : "%s", value);
}

void setting_print(const struct setting *setting, const void *member, struct text *out) {
    switch (setting->kind) {
    case SETTING_INTEGER:
        text_printf(out, "%lld", (long long)*(const int64_t *)member);
        return;
    case SETTING_NUMBER:
        text_printf(out, "%.17g", *(const double *)member);
        return;
    case SETTING_BOOLEAN:
        text_add_string(out, *(const bool *)member ? "true" : "false");
        return;
    case SETTING_CHOICE:
        text_add_string(out, setting->choices[*(const int *)member]);
        return;
    case SETTING_STRING:
        text_add_string(out, member);
        return;
    }
}

void setting_write_ini(struct setting_group group, const void *config, struct text *out) {
    const char *section = "";
    for (int t = 0; t < group.count; t++)
        for (int i = 0; i < group.tables[t].count; i++) {
            const struct setting *setting = &group.tables[t].settings[i];
            if (strcmp(section, setting->section) != 0)
                text_printf(out, "%s[%s]\n", *section ? "\n" : "", setting->section);
            section = setting->section;
            text_printf(out, "%s = ", setting->key);
            const char *member = (const char *)config + group.tables[t].base + setting->offset;
            if (setting->kind == SETTING_STRING)
                write_string(member, out);
            else
                setting_print(setting, member, out);
            text_add_string(out, "\n");
        }
}

void setting_write_help(struct setting_group group, const void *config, struct text *out) {
    for (int t = 0; t < group.count; t++)
        for (int i = 0; i < group.tables[t].count; i++) {
            const struct setting *setting = &group.tables[t].settings[i];
            char *name = text_format("--%s.%s", setting->section, setting->key);
            text_printf(out, "  %-34s %s (", name, setting->help);
            setting_print(setting, (const char *)config + group.tables[t].base + setting->offset, out);
            text_add_string(out, ")\n");
            free(name);
        }
}
