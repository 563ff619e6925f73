#include "checkpoint/publish.h"

#include "base/clock.h"
#include "base/file.h"
#include "base/log.h"
#include "base/random.h"
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

static char directory[] = "/tmp/cadre-publish-XXXXXX";

static int set_up(void **state) {
    (void)state;
    return mkdtemp(directory) ? 0 : -1;
}

static int tear_down(void **state) {
    (void)state;
    return directory_remove(directory) == STATUS_OK ? 0 : -1;
}

/* Contents that name their step, so that a mixture of two saves would show. */
static enum status write_files(struct checkpoint_draft *draft, int64_t step) {
    static const char *const names[] = {"config.json", "model.safetensors", "training/state.json"};
    enum status status = STATUS_OK;
    for (int i = 0; i < 3 && status == STATUS_OK; i++) {
        char *path = path_join(draft->path, names[i]),
             *text = text_format("%s of step %lld", names[i], (long long)step);
        struct file_writer writer;
        status = file_writer_open(&writer, path, false);
        if (status == STATUS_OK) {
            status = file_writer_add(&writer, text, strlen(text));
            enum status closed = file_writer_close(&writer);
            status = status == STATUS_OK ? closed : status;
        }
        free(path);
        free(text);
    }
    return status;
}

/* Step `step`, its files filled with another number. */
static enum status save_version(int64_t step, int64_t version) {
    struct checkpoint_draft draft;
    TRY(checkpoint_begin(&draft, directory, step));
    enum status status = write_files(&draft, version);
    if (status != STATUS_OK) {
        checkpoint_abandon(&draft);
        return status;
    }
    return checkpoint_commit(&draft, NULL);
}

static enum status save(int64_t step) {
    return save_version(step, step);
}

static enum status verify_step(int64_t step) {
    char *path = text_format("%s/step-%06lld", directory, (long long)step);
    enum status status = checkpoint_verify(path);
    free(path);
    return status;
}

static void damage_model(int64_t step) {
    char *path = text_format("%s/step-%06lld/model.safetensors", directory, (long long)step);
    FILE *file = fopen(path, "r+b");
    assert_non_null(file);
    assert_int_equal(fputc('X', file), 'X');
    fclose(file);
    free(path);
}

/* The names in the directory of checkpoints are these, separated by spaces. */
static void assert_names(const char *expected) {
    struct text_list names;
    struct text found = {0};
    assert_int_equal(directory_list(directory, &names), STATUS_OK);
    for (size_t i = 0; i < names.count; i++)
        text_printf(&found, "%s%s", i ? " " : "", names.items[i]);
    assert_string_equal(text_string(&found), expected);
    text_list_release(&names);
    text_release(&found);
}

/* Number inside the model file of a checkpoint. */
static int64_t read_version(const char *checkpoint) {
    char *model = path_join(checkpoint, "model.safetensors"), *data;
    size_t size;
    long long version;
    assert_int_equal(file_read(model, 1000, &data, &size), STATUS_OK);
    assert_int_equal(sscanf(data, "model.safetensors of step %lld", &version), 1);
    free(data);
    free(model);
    return version;
}

static enum status keep(int64_t newest) {
    return checkpoint_keep(directory, (struct checkpoint_retention){newest, 0, -1, -1});
}

static int64_t latest(void) {
    char *path;
    int64_t step;
    if (checkpoint_latest(directory, checkpoint_verify, &path, &step) != STATUS_OK)
        return -1;
    assert_int_equal(read_version(path), step);
    free(path);
    return step;
}

static void empty_directory(void) {
    assert_int_equal(directory_remove(directory), STATUS_OK);
    assert_int_equal(directory_make(directory), STATUS_OK);
}

static void test_newest_and_retention(void **state) {
    (void)state;
    assert_int_equal(latest(), -1);
    for (int64_t step = 100; step <= 500; step += 100)
        assert_int_equal(save(step), STATUS_OK);
    assert_int_equal(latest(), 500);
    assert_int_equal(save(500), STATUS_OK); /* again: replaces */
    assert_int_equal(latest(), 500);
    assert_int_equal(keep(2), STATUS_OK);
    assert_names("step-000400 step-000500");
}

/* The newest, every step that a number divides, and the best; what is known to be good need not be read. */
static void test_which_stay(void **state) {
    (void)state;
    empty_directory();
    for (int64_t step = 10; step <= 80; step += 10)
        assert_int_equal(save(step), STATUS_OK);
    assert_int_equal(checkpoint_keep(directory, (struct checkpoint_retention){2, 30, 50, -1}), STATUS_OK);
    assert_names("step-000030 step-000050 step-000060 step-000070 step-000080");
    damage_model(80); /* and with it the one that is kept for being good */
    assert_int_equal(checkpoint_keep(directory, (struct checkpoint_retention){1, 0, -1, 80}), STATUS_OK);
    assert_names("step-000080");
    assert_int_equal(save(90), STATUS_OK);
    damage_model(90);
    assert_int_equal(checkpoint_keep(directory, (struct checkpoint_retention){1, 0, -1, -1}), STATUS_OK);
    assert_names("step-000080 step-000090"); /* none is good: nothing goes */
}

/* However few are kept, and however many damaged ones are newer: the newest good one stays. */
static void test_the_last_good_one_is_kept(void **state) {
    (void)state;
    empty_directory();
    for (int64_t step = 1; step <= 5; step++)
        assert_int_equal(save(step), STATUS_OK);
    damage_model(4);
    damage_model(5);
    assert_int_equal(keep(1), STATUS_OK);
    assert_names("step-000003 step-000005");
    assert_int_equal(latest(), 3);
    damage_model(3); /* none is good: nothing is deleted */
    assert_int_equal(keep(1), STATUS_OK);
    assert_names("step-000003 step-000005");
    assert_int_equal(latest(), -1);
}

/* What a kill leaves between the two renames of a replacement. */
static void test_cut_short_between_two_renames(void **state) {
    (void)state;
    empty_directory();
    assert_int_equal(save(7), STATUS_OK);
    char *plain = path_join(directory, "step-000007"), *aside = path_join(directory, "step-000007.old-1");
    assert_int_equal(file_rename(plain, aside), STATUS_OK);
    assert_int_equal(latest(), 7);
    assert_int_equal(save(6), STATUS_OK);
    assert_names("step-000006 step-000007");
    assert_int_equal(latest(), 7);
    assert_int_equal(verify_step(7), STATUS_OK);
    free(plain);
    free(aside);
}

static void test_leftovers(void **state) {
    (void)state;
    static const char *const made[] = {"step-000001.tmp-99/training",
                                       "step-000009.tmp-1",
                                       "step-000002.old-5/x",
                                       "step-000002",
                                       "step-",
                                       "step-12x",
                                       "notes.tmp-1",
                                       "other"};
    empty_directory();
    for (size_t i = 0; i < sizeof made / sizeof *made; i++) {
        char *path = path_join(directory, made[i]);
        assert_int_equal(directory_make(path), STATUS_OK);
        free(path);
    }
    assert_int_equal(save(3), STATUS_OK);
    assert_names("notes.tmp-1 other step- step-000002 step-000003 step-12x");
    assert_int_equal(latest(), 3);
    struct checkpoint_draft draft;
    assert_int_equal(checkpoint_begin(&draft, directory, 4), STATUS_OK);
    checkpoint_abandon(&draft);
    assert_names("notes.tmp-1 other step- step-000002 step-000003 step-12x");
}

static int record(void *context, enum file_operation operation, const char *path) {
    if (operation == FILE_FLUSH || operation == FILE_RENAME)
        text_printf(context, "%s %s\n", operation == FILE_FLUSH ? "flush" : "rename", path_name(path));
    return 0;
}

/* Every file and directory is flushed before the name is given, and that name afterwards. */
static void test_flushes(void **state) {
    (void)state;
    static const char *const before[] = {"flush deep.txt\n",   "flush config.json\n",       "flush model.safetensors\n",
                                         "flush state.json\n", "flush manifest.json\n",     "flush b\n",
                                         "flush a\n",          "flush training\n",          "flush .\n"};
    struct checkpoint_draft draft;
    struct text log = {0};
    empty_directory();
    assert_int_equal(checkpoint_begin(&draft, directory, 1), STATUS_OK);
    assert_int_equal(write_files(&draft, 1), STATUS_OK);
    char *deep = path_join(draft.path, "a/b"), *file = path_join(deep, "deep.txt"), *after;
    assert_int_equal(directory_make(deep), STATUS_OK);
    assert_int_equal(file_write(file, "deep", 4), STATUS_OK);
    file_set_fault(record, &log);
    assert_int_equal(checkpoint_commit(&draft, NULL), STATUS_OK);
    file_set_fault(NULL, NULL);
    char *renamed = strstr(log.data, "rename step-000001\n");
    assert_non_null(renamed);
    for (size_t i = 0; i < sizeof before / sizeof *before; i++) {
        char *found = strstr(log.data, before[i]);
        if (!found || found > renamed)
            fail_msg("not before the rename: %s", before[i]);
    }
    after = text_format("flush %s\n", path_name(directory));
    assert_non_null(strstr(renamed, after));
    damage_model(1);
    assert_int_equal(verify_step(1), STATUS_FORMAT);
    text_release(&log);
    free(after);
    free(file);
    free(deep);
}

/* The way to the first checkpoint of a run lasts, too. */
static void test_new_directories_are_flushed(void **state) {
    (void)state;
    struct checkpoint_draft draft;
    struct text log = {0};
    empty_directory();
    char *above = path_join(directory, "above"), *checkpoints = path_join(above, "checkpoints");
    char *expected = text_format("flush %s\nflush above\n", path_name(directory));
    file_set_fault(record, &log);
    assert_int_equal(checkpoint_begin(&draft, checkpoints, 1), STATUS_OK);
    file_set_fault(NULL, NULL);
    assert_string_equal(text_string(&log), expected);
    checkpoint_abandon(&draft);
    text_release(&log);
    free(expected);
    free(checkpoints);
    free(above);
}

static void assert_no_draft(void) {
    struct text_list names;
    assert_int_equal(directory_list(directory, &names), STATUS_OK);
    for (size_t i = 0; i < names.count; i++)
        assert_null(strstr(names.items[i], ".tmp-"));
    text_list_release(&names);
}

struct fault {
    int countdown, error;
    bool all_later;
};

static int fail_at(void *context, enum file_operation operation, const char *path) {
    (void)operation;
    (void)path;
    struct fault *fault = context;
    fault->countdown--;
    return fault->countdown == -1 || (fault->all_later && fault->countdown < 0) ? fault->error : 0;
}

/* Save 1, then step `step` with a failure point; whether the failure point was reached. */
static bool fail_one_save(int64_t step, struct fault fault, int *failures) {
    empty_directory();
    assert_int_equal(save_version(1, 1), STATUS_OK);
    struct fault running = fault;
    file_set_fault(fail_at, &running);
    enum status status = save_version(step, 2);
    file_set_fault(NULL, NULL);
    char *path;
    int64_t found;
    assert_int_equal(checkpoint_latest(directory, checkpoint_verify, &path, &found), STATUS_OK);
    int64_t version = read_version(path);
    free(path);
    assert_true(version == 1 || version == 2);
    assert_true(status != STATUS_OK || version == 2);
    if (step != 1) {
        assert_int_equal(found, version);
        assert_int_equal(verify_step(1), STATUS_OK);
    }
    if (status != STATUS_OK && !fault.all_later)
        assert_no_draft();
    *failures += status != STATUS_OK;
    assert_int_equal(save(3), STATUS_OK);
    assert_int_equal(latest(), 3);
    assert_int_equal(verify_step(1), STATUS_OK);
    assert_names(step != 1 && verify_step(2) == STATUS_OK ? "step-000001 step-000002 step-000003"
                                                          : "step-000001 step-000003");
    return running.countdown < 0;
}

/* Whichever operation of a save fails, once or from then on: the checkpoint before it is the latest and whole, also
 * when the save was to replace that one; the next save cleans up. */
static void test_every_operation_failing(void **state) {
    (void)state;
    const int errors[] = {EIO, ENOSPC};
    for (int mode = 0; mode < 8; mode++) {
        struct fault fault = {0, errors[mode % 2], mode % 4 >= 2};
        int failures = 0;
        while (fail_one_save(mode < 4 ? 2 : 1, fault, &failures))
            fault.countdown++;
        assert_true(failures > 15);
    }
}

static void write_bytes(const char *path, const char *data, size_t size) {
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, size, file), size);
    fclose(file);
}

static void damage_everywhere(const char *name) {
    char *path = text_format("%s/step-000001/%s", directory, name), *data;
    char *checkpoint = path_join(directory, "step-000001");
    size_t size;
    assert_int_equal(file_read(path, 1 << 20, &data, &size), STATUS_OK);
    for (size_t bit = 0; bit < 8 * size; bit++) {
        data[bit / 8] ^= (char)(1 << bit % 8);
        write_bytes(path, data, size);
        enum status of_model = checkpoint_verify_model(checkpoint), status = checkpoint_verify(checkpoint);
        data[bit / 8] ^= (char)(1 << bit % 8);
        if (status != STATUS_FORMAT)
            fail_msg("%s: bit %zu flipped and not found", name, bit);
        assert_int_equal(of_model, strcmp(name, "training/state.json") == 0 ? STATUS_OK : STATUS_FORMAT);
        if (strcmp(name, "training/manifest.json") != 0)
            assert_non_null(strstr(status_text(), name));
    }
    for (size_t cut = 0; cut < size; cut++) {
        write_bytes(path, data, cut);
        assert_int_not_equal(checkpoint_verify(checkpoint), STATUS_OK);
    }
    assert_int_equal(file_remove(path), STATUS_OK);
    assert_int_not_equal(checkpoint_verify(checkpoint), STATUS_OK);
    write_bytes(path, data, size);
    assert_int_equal(checkpoint_verify(checkpoint), STATUS_OK);
    free(checkpoint);
    free(data);
    free(path);
}

/* The manifest of a checkpoint as an older program wrote it: hashes of extents as a whole; version 2: of pieces of 4 MiB. */
static void write_older_manifest(const char *checkpoint, int version) {
    struct checkpoint_manifest manifest;
    struct text text = {0};
    char *path = path_join(checkpoint, "training/manifest.json"), seal[17];
    assert_int_equal(checkpoint_manifest_open(&manifest, checkpoint), STATUS_OK);
    text_printf(&text, "{\"manifest_xxh3_64\": \"%016d\", \"version\": %d, \"files\": {", 0, version);
    for (size_t i = 0; i < manifest.file_count; i++) {
        const struct checkpoint_file *file = &manifest.files[i];
        char *name = path_join(checkpoint, file->name), *data;
        size_t size;
        assert_int_equal(file_read(name, 1 << 20, &data, &size), STATUS_OK);
        text_printf(&text, "%s\"%s\": {\"bytes\": %zu, ", i ? ", " : "", file->name, size);
        if (version == 3)
            text_printf(&text, "\"extent_bytes\": [5, %zu], \"xxh3_64\": [\"%016llx\", \"%016llx\"]}", size - 5,
                        (unsigned long long)hash_bytes(data, 5, 0), (unsigned long long)hash_bytes(data + 5, size - 5, 5));
        else
            text_printf(&text, "\"xxh3_64\": [\"%016llx\"]}", (unsigned long long)hash_bytes(data, size, 0));
        free(data);
        free(name);
    }
    text_add_string(&text, "}}");
    snprintf(seal, sizeof seal, "%016llx", (unsigned long long)hash_bytes(text.data, text.size, 0));
    memcpy(strstr(text.data, "0000000000000000"), seal, 16);
    write_bytes(path, text.data, text.size);
    checkpoint_manifest_close(&manifest);
    text_release(&text);
    free(path);
}

static void test_older_manifests(void **state) {
    (void)state;
    for (int version = 2; version <= 5; version++) {
        empty_directory();
        assert_int_equal(save(1), STATUS_OK);
        char *checkpoint = path_join(directory, "step-000001");
        if (version != 4)
            write_older_manifest(checkpoint, version);
        assert_int_equal(checkpoint_verify(checkpoint), version == 5 ? STATUS_FORMAT : STATUS_OK);
        damage_model(1);
        assert_int_equal(checkpoint_verify(checkpoint), STATUS_FORMAT);
        free(checkpoint);
    }
}

static void test_damage_is_found(void **state) {
    (void)state;
    empty_directory();
    assert_int_equal(save(1), STATUS_OK);
    damage_everywhere("model.safetensors");
    damage_everywhere("training/state.json");
    damage_everywhere("training/manifest.json");
}

enum { LARGE_BYTES = (9 << 20) + 12345, CHUNK_BYTES = 4 << 20 };

static void flip_bit(FILE *file, uint64_t bit) {
    assert_int_equal(fseek(file, (long)(bit / 8), SEEK_SET), 0);
    int byte = fgetc(file);
    assert_int_equal(fseek(file, (long)(bit / 8), SEEK_SET), 0);
    assert_true(fputc(byte ^ 1 << bit % 8, file) != EOF);
    assert_int_equal(fflush(file), 0);
}

/* Three chunks: the message says in which one the damage is; a file cut at a chunk is found by its size. */
static void test_damage_in_a_large_file(void **state) {
    (void)state;
    struct checkpoint_draft draft;
    char *data = calloc(1, LARGE_BYTES);
    assert_non_null(data);
    for (uint64_t i = 0; i < LARGE_BYTES / 8; i++) {
        uint64_t bits = i * 0x9E3779B97F4A7C15u;
        memcpy(data + 8 * i, &bits, 8);
    }
    empty_directory();
    assert_int_equal(checkpoint_begin(&draft, directory, 1), STATUS_OK);
    char *large = path_join(draft.path, "large");
    write_bytes(large, data, LARGE_BYTES);
    free(large);
    assert_int_equal(checkpoint_commit(&draft, NULL), STATUS_OK);
    large = path_join(directory, "step-000001/large");
    FILE *file = fopen(large, "r+b");
    assert_non_null(file);
    for (uint64_t round = 0; round < 40; round++) {
        uint64_t bit = random_bits(3, 1, round) % (8u * (uint64_t)LARGE_BYTES);
        flip_bit(file, bit);
        assert_int_equal(verify_step(1), STATUS_FORMAT);
        char *place = text_format("of byte %llu", (unsigned long long)(bit / 8 / CHUNK_BYTES * CHUNK_BYTES));
        assert_non_null(strstr(status_text(), place));
        free(place);
        flip_bit(file, bit);
    }
    assert_int_equal(verify_step(1), STATUS_OK);
    for (long cut = LARGE_BYTES - 1; cut > 0; cut -= CHUNK_BYTES / 2 + 1) {
        assert_int_equal(truncate(large, cut), 0);
        assert_int_equal(verify_step(1), STATUS_FORMAT);
    }
    fclose(file);
    free(large);
    free(data);
}

/* Seconds of one save on this disk: what flushing costs differs a hundredfold between disks. */
static double save_seconds(void) {
    enum { SAVES = 5 };
    double begin = clock_seconds();
    for (int i = 0; i < SAVES; i++) {
        assert_int_equal(save(1), STATUS_OK);
        assert_int_equal(keep(1), STATUS_OK);
    }
    return (clock_seconds() - begin) / SAVES;
}

/* A process that saves as fast as it can, killed at a random moment: the latest is always whole. In every second round
 * it replaces one step over and over. At least 60 rounds, and more until 20 saves came through. */
static void test_killed_while_saving(void **state) {
    (void)state;
    enum { ROUNDS = 60, ROUNDS_MAX = 600, SAVES = 20 };
    empty_directory();
    int64_t before = 1;
    double longest = 4 * save_seconds();
    for (uint64_t round = 0; round < ROUNDS || (before <= SAVES && round < ROUNDS_MAX); round++) {
        pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            for (int64_t step = before + 1;; step += round % 2)
                if (save(step) != STATUS_OK || keep(1) != STATUS_OK)
                    _exit(1);
        }
        usleep((useconds_t)(1e6 * longest * (double)(random_bits(1, 1, round) % 1000) / 1000));
        assert_int_equal(kill(child, SIGKILL), 0);
        int status;
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        int64_t newest = latest();
        assert_true(newest >= before);
        before = newest;
    }
    assert_true(before > SAVES);
    assert_int_equal(save(before + 1), STATUS_OK);
    assert_int_equal(keep(1), STATUS_OK);
    char *only = text_format("step-%06lld", (long long)before + 1);
    assert_names(only);
    free(only);
}

int main(void) {
    log_set_level(LOG_SILENT);
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_newest_and_retention),
                                       cmocka_unit_test(test_which_stay),
                                       cmocka_unit_test(test_the_last_good_one_is_kept),
                                       cmocka_unit_test(test_cut_short_between_two_renames),
                                       cmocka_unit_test(test_leftovers),
                                       cmocka_unit_test(test_flushes),
                                       cmocka_unit_test(test_new_directories_are_flushed),
                                       cmocka_unit_test(test_every_operation_failing),
                                       cmocka_unit_test(test_older_manifests),
        cmocka_unit_test(test_damage_is_found),
                                       cmocka_unit_test(test_damage_in_a_large_file),
                                       cmocka_unit_test(test_killed_while_saving)};
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
