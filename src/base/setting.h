/* Settings: tables that say which "section.key" fills which member of a struct, with bounds and help. One table serves
 * the configuration file, the command line, the resolved copy that a run keeps, and the message for a mistyped key. */
#pragma once

#include "base/status.h"
#include "base/text.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { SETTING_STRING_BYTES = 512 };

enum setting_kind {
    SETTING_INTEGER, /* int64_t */
    SETTING_NUMBER,  /* double */
    SETTING_BOOLEAN, /* bool; true/false, yes/no, 1/0 */
    SETTING_STRING,  /* char[SETTING_STRING_BYTES] */
    SETTING_CHOICE,  /* int: index into choices */
};

struct setting {
    const char *section, *key;
    enum setting_kind kind;
    size_t offset; /* of the member, in the struct that the table is about */
    double low, high;
    const char *const *choices; /* SETTING_CHOICE: names, NULL at the end */
    const char *help;           /* one line, with the unit */
};

/* Several tables over one struct: each table's offsets count from base bytes into it. */
struct setting_table {
    const struct setting *settings;
    int count;
    size_t base;
};
struct setting_group {
    const struct setting_table *tables;
    int count;
};

/* Give "section.key" a value. `origin` names where it came from in messages ("run.ini line 3", "command line").
 * STATUS_USAGE for an unknown key (with the nearest known one), a value of the wrong kind or out of bounds. */
enum status setting_set(struct setting_group group, void *config, const char *name, const char *value,
                        const char *origin) MUST_USE;

/* Every value of an INI file; keys the file does not name stay as they are. */
enum status setting_read_ini(struct setting_group group, void *config, const char *path) MUST_USE;

/* The configuration as INI text, every key. */
void setting_write_ini(struct setting_group group, const void *config, struct text *out);

/* Value of one key as text, appended; the key must exist. */
void setting_print(const struct setting *setting, const void *member, struct text *out);

/* Help: one line a key with its value in `config` as the default. */
void setting_write_help(struct setting_group group, const void *config, struct text *out);
