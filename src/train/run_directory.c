#include "train/run_directory.h"

#include "base/file.h"
#include <stdlib.h>
#include <string.h>

char *run_directory_path(const struct run_config *config, const char *name) {
    return path_join(config->run.directory, name);
}

/* Settings that may differ between two calls on one directory. */
static bool may_change(const char *section, const char *key) {
    static const char *const free_keys[] = {"train.steps",
                                            "train.target_minutes",
                                            "train.eval_every_steps",
                                            "train.eval_tokens",
                                            "train.sample_every_steps",
                                            "model.preset",
                                            "run.directory",
                                            "run.device",
                                            "run.threads",
                                            "run.timeout_seconds",
                                            "run.transport",
                                            "run.graph",
                                            "run.kernels",
                                            "train.spikes",
                                            "train.rollback_limit",
                                            "train.verify_steps",
                                            "diloco.replicas",
                                            "diloco.sync_steps",
                                            "diloco.fragments",
                                            "diloco.order",
                                            "diloco.overlap_steps",
                                            "diloco.experts_every",
                                            "diloco.wire",
                                            NULL};
    char *name = text_format("%s.%s", section, key);
    bool found = strcmp(section, "layout") == 0 || strcmp(section, "checkpoint") == 0; /* a run goes on in any */
    for (int i = 0; free_keys[i]; i++)
        found = found || strcmp(name, free_keys[i]) == 0;
    free(name);
    return found;
}

static enum status compare_setting(const struct setting *setting, const char *stored, const char *fresh,
                                   const char *directory) {
    struct text was = {0}, is = {0};
    setting_print(setting, stored + setting->offset, &was);
    setting_print(setting, fresh + setting->offset, &is);
    enum status status = STATUS_OK;
    if (strcmp(text_string(&was), text_string(&is)) != 0)
        status = status_fail(STATUS_USAGE,
                             "%s holds a run with %s.%s = %s, this call says %s; choose another --run.directory",
                             directory, setting->section, setting->key, text_string(&was), text_string(&is));
    text_release(&was);
    text_release(&is);
    return status;
}

static enum status compare(const struct run_config *stored, const struct run_config *fresh) {
    struct setting_group group = run_config_group();
    for (int t = 0; t < group.count; t++)
        for (int i = 0; i < group.tables[t].count; i++) {
            const struct setting *setting = &group.tables[t].settings[i];
            size_t base = group.tables[t].base;
            if (!may_change(setting->section, setting->key))
                TRY(compare_setting(setting, (const char *)stored + base, (const char *)fresh + base,
                                    fresh->run.directory));
        }
    return STATUS_OK;
}

enum status run_directory_write_config(const struct run_config *config) {
    struct text ini = {0};
    char *path = run_directory_path(config, "config.ini");
    setting_write_ini(run_config_group(), config, &ini);
    enum status status = file_write(path, ini.data, ini.size);
    text_release(&ini);
    free(path);
    return status;
}

/* The vocabulary's size and a measured number of steps are decided once, by the run's first call. */
static void take_over(const struct run_config *stored, struct run_config *config) {
    if (config->model.vocab_size == 0)
        config->model.vocab_size = stored->model.vocab_size;
    if (config->train.steps == 0)
        config->train.steps = stored->train.steps;
    if (config->train.precision == PRECISION_AUTO)
        config->train.precision = stored->train.precision;
}

enum status run_directory_open(struct run_config *config) {
    char *path = run_directory_path(config, "config.ini");
    enum status status = STATUS_OK;
    if (file_exists(path)) {
        struct run_config stored;
        run_config_init(&stored);
        status = setting_read_ini(run_config_group(), &stored, path);
        if (status == STATUS_OK) {
            take_over(&stored, config);
            status = compare(&stored, config);
        }
    } else {
        status = directory_make_lasting(config->run.directory);
    }
    free(path);
    return status;
}
