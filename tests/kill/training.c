#include "training.h"

#include "base/file.h"
#include "call_record.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { STEPS = 48, LINES = 120, WORDS_MAX = 96, ERROR_BYTES_MAX = 1 << 20 };

/* An expert's matrix is a block of a disk, which is written from where it stands. */
static const char *const settings[] = {
    "--model.hidden_size", "32", "--model.num_hidden_layers", "1", "--model.num_attention_heads", "2",
    "--model.num_key_value_heads", "1", "--model.num_experts", "3", "--model.num_experts_per_tok", "2",
    "--model.moe_intermediate_size", "32", "--model.max_position_embeddings", "32", "--data.vocab_size", "260",
    "--train.sequence_length", "16", "--train.batch_sequences", "8", "--train.precision", "fp32", "--run.threads", "1",
    "--train.eval_every_steps", "12", "--train.eval_tokens", "64", "--quiet", NULL};

static enum status write_text(const char *path) {
    struct text text = {0};
    for (int i = 0; i < LINES; i++)
        text_printf(&text, "The keeper of lamp number %d walks along the harbour, and the river waits %d days.\n%s", i,
                    i * 7919 % 1000, i % 6 == 5 ? "\n" : "");
    enum status status = file_write(path, text.data, text.size);
    text_release(&text);
    return status;
}

enum status training_init(struct training *t, const char *cadre, const char *library, const char *work) {
    *t = (struct training){cadre, library, path_join(work, "text.txt"), path_join(work, "stderr"), STEPS};
    return write_text(t->text);
}

void training_release(struct training *t) {
    free(t->text);
    free(t->errors);
}

char *training_checkpoints(const char *directory) {
    return path_join(directory, "checkpoints");
}

/* ---- in the child, which has no other thread --------------------------------------------------------------------------- */

static void set_number(const char *name, int64_t value) {
    char *text = text_format("%lld", (long long)value);
    setenv(name, text, 1);
    free(text);
}

static void set_environment(const struct training *t, const struct training_call *call) {
    if (!call->watch)
        return;
    setenv("LD_PRELOAD", t->library, 1);
    setenv(CALLS_WATCH, call->watch, 1);
    if (call->record)
        setenv(CALLS_RECORD, call->record, 1);
    set_number(CALLS_DIE_AT, call->die_at);
    set_number(CALLS_DIE_AFTER, call->die_after);
    set_number(CALLS_FROM_DRAFT, call->from_draft);
}

static void redirect(const struct training *t) {
    int nothing = open("/dev/null", O_RDWR), errors = open(t->errors, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    dup2(nothing, STDIN_FILENO);
    dup2(nothing, STDOUT_FILENO);
    dup2(errors, STDERR_FILENO);
}

struct words {
    char *items[WORDS_MAX];
    int count;
};

static void add_word(struct words *words, char *word) {
    CHECK_OP(words->count, <, WORDS_MAX - 1);
    words->items[words->count++] = word;
}

static void add_setting(struct words *words, const char *name, char *value) {
    add_word(words, text_format("%s", name));
    add_word(words, value);
}

static void add_number(struct words *words, const char *name, int64_t value) {
    add_setting(words, name, text_format("%lld", (long long)value));
}

static void add_words(const struct training *t, const struct training_call *call, struct words *words) {
    add_setting(words, t->cadre, text_format("train"));
    for (int i = 0; settings[i]; i++)
        add_word(words, text_format("%s", settings[i]));
    add_setting(words, "--data.train", t->text);
    add_setting(words, "--run.directory", text_format("%s", call->directory));
    add_number(words, "--train.steps", t->steps);
    add_number(words, "--checkpoint.every_steps", call->every_steps);
    add_number(words, "--checkpoint.keep", call->keep);
    add_number(words, "--checkpoint.keep_every_steps", call->keep_every_steps);
    add_setting(words, "--checkpoint.keep_best", text_format("%s", call->keep_best ? "true" : "false"));
    add_setting(words, "--checkpoint.mode", text_format("%s", call->asynchronous ? "async" : "sync"));
    add_setting(words, "--checkpoint.overlap", text_format("%s", call->replaces ? "replace" : "wait"));
}

/* ---- outside ----------------------------------------------------------------------------------------------------------- */

enum status training_start(const struct training *t, const struct training_call *call, pid_t *child) {
    *child = fork();
    if (*child < 0)
        return status_fail(STATUS_IO, "no process for %s: %s", t->cadre, strerror(errno));
    if (*child > 0)
        return STATUS_OK;
    struct words words = {0};
    add_words(t, call, &words);
    redirect(t);
    set_environment(t, call);
    execv(t->cadre, words.items);
    _exit(127);
}

enum status training_end(const struct training *t, pid_t child, bool *killed) {
    int state;
    while (waitpid(child, &state, 0) < 0)
        if (errno != EINTR)
            return status_fail(STATUS_IO, "%s: nothing to wait for: %s", t->cadre, strerror(errno));
    *killed = WIFSIGNALED(state) && WTERMSIG(state) == SIGKILL;
    if (*killed || (WIFEXITED(state) && WEXITSTATUS(state) == 0))
        return STATUS_OK;
    char *errors;
    size_t size;
    TRY(file_read(t->errors, ERROR_BYTES_MAX, &errors, &size));
    enum status status = status_fail(STATUS_FORMAT, "%s ended with %s %d: %s", t->cadre, WIFSIGNALED(state) ? "signal" : "status",
                                     WIFSIGNALED(state) ? WTERMSIG(state) : WEXITSTATUS(state), errors);
    free(errors);
    return status;
}

enum status training_run(const struct training *t, const struct training_call *call, bool *killed) {
    pid_t child;
    TRY(training_start(t, call, &child));
    return training_end(t, child, killed);
}
