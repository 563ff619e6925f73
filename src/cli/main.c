#include "cli/cli.h"

#include "base/text.h"
#include "comm/launch/launch.h"
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

struct verb {
    const char *name, *help;
    enum status (*run)(int argc, char **argv);
};

static const struct verb verbs[] = {
    {"train", "learn a language model from text", cmd_train},
    {"launch", "run a training command again until it is complete", cmd_launch},
    {"generate", "write text with a model", cmd_generate},
    {"eval", "loss and bits per byte of a model on text", cmd_eval},
    {"tokenize", "learn a tokenizer and cut text into tokens", cmd_tokenize},
    {"inspect", "what a model or a preset is and takes", cmd_inspect},
    {"bench", "how fast this machine is, and how close cadre comes", cmd_bench},
};
enum { VERB_COUNT = sizeof verbs / sizeof *verbs };

static int finish_output(int exit_status) {
    if (fflush(stdout) == 0 && !ferror(stdout))
        return exit_status;
    fprintf(stderr, "cadre: cannot write the result to standard output\n");
    return 1;
}

static int print_help(FILE *out, int exit_status) {
    fprintf(out, "cadre %s: trains, studies and serves Mixture-of-Experts language models\n\n", CADRE_VERSION);
    for (int i = 0; i < VERB_COUNT; i++)
        fprintf(out, "  cadre %-10s %s\n", verbs[i].name, verbs[i].help);
    fprintf(out, "\ncadre VERB --help tells more.\n");
    return exit_status;
}

static int print_version(void) {
    char library[128];
    printf("cadre %s, %s\n", CADRE_VERSION, comm_launch_library(library, sizeof library));
    return 0;
}

static int fail_unknown_verb(const char *word) {
    const char *names[VERB_COUNT];
    for (int i = 0; i < VERB_COUNT; i++)
        names[i] = verbs[i].name;
    int nearest = text_nearest(word, names, VERB_COUNT);
    if (nearest >= 0)
        fprintf(stderr, "cadre: unknown verb \"%s\"; the nearest known one is %s\n", word, names[nearest]);
    else
        fprintf(stderr, "cadre: unknown verb \"%s\"; cadre help lists them\n", word);
    return 2;
}

static bool silent;

void cli_stay_silent(void) {
    silent = true;
}

void cli_tell_failure(const char *verb) {
    if (!silent)
        fprintf(stderr, "cadre %s: %s\n", verb, status_text());
    silent = true;
}

static int run_verb(const struct verb *verb, int argc, char **argv) {
    enum status status = verb->run(argc, argv);
    if (status == STATUS_OK && (fflush(stdout) != 0 || ferror(stdout)))
        status = status_fail(STATUS_IO, "cannot write the result to standard output");
    if (status == STATUS_OK)
        return 0;
    cli_tell_failure(verb->name);
    return status == STATUS_USAGE ? 2 : 1;
}

/* What is opened later must not come to lie where progress or the product goes. */
static void open_standard_files(void) {
    int fd;
    do
        fd = open("/dev/null", O_RDWR);
    while (fd >= 0 && fd <= STDERR_FILENO);
    if (fd > STDERR_FILENO)
        close(fd);
}

/* A checkpoint of many files has them all open at once. */
static void allow_files(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

int main(int argc, char **argv) {
    open_standard_files();
    allow_files();
    signal(SIGXFSZ, SIG_IGN); /* a limit on file sizes is a write that fails, with the file's name */
    if (argc < 2)
        return print_help(stderr, 2);
    const char *word = argv[1];
    if (strcmp(word, "help") == 0 || strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0)
        return finish_output(print_help(stdout, 0));
    if (strcmp(word, "version") == 0 || strcmp(word, "--version") == 0)
        return finish_output(print_version());
    for (int i = 0; i < VERB_COUNT; i++)
        if (strcmp(word, verbs[i].name) == 0)
            return run_verb(&verbs[i], argc - 1, argv + 1);
    return fail_unknown_verb(word);
}
