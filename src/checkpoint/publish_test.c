#include "checkpoint/publish.h"

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
        char *path = path_join(draft->path, names[i]), *text = text_format("%s of step %lld", names[i], (long long)step);
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

static enum status save(int64_t step) {
    struct checkpoint_draft draft;
    TRY(checkpoint_begin(&draft, directory, step));
    enum status status = write_files(&draft, step);
    if (status != STATUS_OK) {
        checkpoint_abandon(&draft);
        return status;
    }
    return checkpoint_commit(&draft);
}

static int64_t latest(void) {
    char *path, *model, *data;
    int64_t step;
    size_t size;
    if (checkpoint_latest(directory, &path, &step) != STATUS_OK)
        return -1;
    char *expected = text_format("model.safetensors of step %lld", (long long)step);
    model = path_join(path, "model.safetensors");
    assert_int_equal(file_read(model, 1000, &data, &size), STATUS_OK);
    assert_string_equal(data, expected);
    free(data);
    free(model);
    free(expected);
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
    assert_int_equal(checkpoint_keep(directory, 2), STATUS_OK);
    struct text_list names;
    assert_int_equal(directory_list(directory, &names), STATUS_OK);
    assert_int_equal(names.count, 2);
    assert_string_equal(names.items[0], "step-000400");
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

/* Whichever operation of a save fails, once or from then on: the checkpoint before it is the latest and whole. */
static void test_every_operation_failing(void **state) {
    (void)state;
    const int errors[] = {EIO, ENOSPC};
    for (int mode = 0; mode < 4; mode++) {
        int failures = 0;
        for (int at = 0;; at++) {
            empty_directory();
            assert_int_equal(save(1), STATUS_OK);
            struct fault fault = {at, errors[mode % 2], mode >= 2};
            file_set_fault(fail_at, &fault);
            enum status status = save(2);
            file_set_fault(NULL, NULL);
            int64_t newest = latest();
            assert_true(newest == 1 || newest == 2);
            assert_true(status != STATUS_OK || newest == 2);
            assert_int_equal(save(3), STATUS_OK);
            assert_int_equal(latest(), 3);
            if (fault.countdown >= 0)
                break; /* the save ended before the failure point */
            failures += status != STATUS_OK;
        }
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
        enum status status = checkpoint_verify(checkpoint);
        data[bit / 8] ^= (char)(1 << bit % 8);
        /* Inside a manifest a changed space is no damage: what it says is the same. */
        if (status == STATUS_OK && strcmp(name, "training/manifest.json") != 0)
            fail_msg("%s: bit %zu flipped and not found", name, bit);
        if (status == STATUS_OK)
            assert_true(data[bit / 8] == ' ' || data[bit / 8] == '\n');
    }
    for (size_t cut = 0; cut + 2 < size; cut++) {
        write_bytes(path, data, cut);
        assert_int_not_equal(checkpoint_verify(checkpoint), STATUS_OK);
    }
    write_bytes(path, data, size);
    assert_int_equal(checkpoint_verify(checkpoint), STATUS_OK);
    free(checkpoint);
    free(data);
    free(path);
}

static void test_damage_is_found(void **state) {
    (void)state;
    empty_directory();
    assert_int_equal(save(1), STATUS_OK);
    damage_everywhere("model.safetensors");
    damage_everywhere("training/state.json");
    damage_everywhere("training/manifest.json");
}

/* A process that saves as fast as it can, killed at a random moment: the latest is always whole. */
static void test_killed_while_saving(void **state) {
    (void)state;
    empty_directory();
    assert_int_equal(save(1), STATUS_OK);
    int64_t before = 1;
    for (uint64_t round = 0; round < 40; round++) {
        pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            for (int64_t step = before + 1;; step++)
                if (save(step) != STATUS_OK)
                    _exit(1);
        }
        usleep((useconds_t)(random_bits(1, 1, round) % 20000));
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
        int64_t newest = latest();
        assert_true(newest >= before);
        before = newest;
        assert_int_equal(checkpoint_keep(directory, 2), STATUS_OK);
    }
    assert_true(before > 1);
}

int main(void) {
    log_set_level(LOG_SILENT);
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_newest_and_retention),
                                       cmocka_unit_test(test_every_operation_failing),
                                       cmocka_unit_test(test_damage_is_found),
                                       cmocka_unit_test(test_killed_while_saving)};
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
