#include "base/setting.h"

#include "base/file.h"
#include <errno.h>
#include <ini.h>
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

struct ini_reading {
    struct setting_group group;
    void *config;
    const char *path;
    enum status status;
};

/* inih calls this for every pair; 0 stops it. */
static int take_pair(void *context, const char *section, const char *key, const char *value) {
    struct ini_reading *reading = context;
    char *name = text_format("%s.%s", section, key);
    reading->status = setting_set(reading->group, reading->config, name, value, reading->path);
    free(name);
    return reading->status == STATUS_OK;
}

enum status setting_read_ini(struct setting_group group, void *config, const char *path) {
    char *data;
    size_t size;
    TRY(file_read(path, INI_BYTES_MAX, &data, &size));
    struct ini_reading reading = {group, config, path, STATUS_OK};
    int line = memchr(data, '\0', size) ? 1 : ini_parse_string(data, take_pair, &reading);
    free(data);
    TRY(reading.status);
    if (line != 0)
        return status_fail(STATUS_FORMAT, "%s: line %d is not \"[section]\" or \"key = value\"", path, line);
    return STATUS_OK;
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
            setting_print(setting, (const char *)config + group.tables[t].base + setting->offset, out);
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
