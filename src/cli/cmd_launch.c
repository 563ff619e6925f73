/* The supervisor: a command is run again until it has ended well, with as many ranks as there are. */
#include "cli/cli.h"

#include "base/clock.h"
#include "base/file.h"
#include "base/json.h"
#include "base/log.h"
#include "cli/arguments.h"
#include "cli/job.h"
#include "cli/job_hosts.h"
#include "cli/job_words.h"
#include "train/run_config.h"
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const double PAUSE_MOST_S = 60;
enum { USAGE_EXIT = 2 };

/* Invariants.
 *  1. A failure counts only without progress: a checkpoint newer than at the job's start resets count and pause.
 *  2. ranks is 0 where the command does not say how many it starts; then it never changes.
 *  3. What the user stopped is never started again.
 */
struct launch {
    int64_t restarts, min_ranks, asked_ranks; /* of the call; 0: not given */
    double first_pause_s;
    const char *directory, *hosts_path, *probe;
    char **words; /* the command */
    struct rank_words place;
    struct job_hosts hosts;
    char *checkpoints, *log_path, *answering_path, *owned_directory;
    int full_ranks, ranks, ranks_most; /* as started first, now, and what earlier attempts leave */
    int attempt, failures;
    long long step; /* of the newest checkpoint when the attempt began; -1: none */
    double pause_s;
};

/* ---- what is known of the run ------------------------------------------------------------------------------------------ */

static long long newest_step(const struct launch *l) {
    struct text_list names = {0};
    long long newest = -1;
    if (!directory_exists(l->checkpoints) || directory_list(l->checkpoints, &names) != STATUS_OK)
        return -1;
    for (size_t i = 0; i < names.count; i++) {
        char *end;
        long long step = strncmp(names.items[i], "step-", 5) == 0 ? strtoll(names.items[i] + 5, &end, 10) : -1;
        if (step > newest && !*end) /* not one that is being written */
            newest = step;
    }
    text_list_release(&names);
    return newest;
}

/* One line in launch.jsonl. end: NULL where no job ended. */
static enum status note(const struct launch *l, const char *event, const struct job_end *end) {
    struct file_writer writer;
    char when[32];
    time_t now = (time_t)clock_wall_seconds();
    strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", gmtime(&now));
    long long step = newest_step(l);
    json_t *object = json_pack("{s:s,s:s,s:i}", "time", when, "event", event, "attempt", l->attempt);
    json_object_set_new(object, "ranks", l->ranks > 0 ? json_integer(l->ranks) : json_null());
    json_object_set_new(object, "step", step >= 0 ? json_integer(step) : json_null());
    if (end && end->signal)
        json_object_set_new(object, "signal", json_integer(end->signal));
    else if (end)
        json_object_set_new(object, "exit_status", json_integer(end->exit_status));
    if (end)
        json_object_set_new(object, "seconds", json_real(1e-3 * (double)(long long)(1e3 * end->seconds)));
    char *line = json_dumps(object, JSON_COMPACT | JSON_PRESERVE_ORDER);
    json_decref(object);
    enum status status = file_writer_open(&writer, l->log_path, true);
    if (status == STATUS_OK) {
        struct text text = {0};
        text_printf(&text, "%s\n", line);
        status = file_writer_add(&writer, text.data, text.size);
        enum status closed = file_writer_close(&writer);
        status = status == STATUS_OK ? closed : status;
        text_release(&text);
    }
    free(line);
    return status;
}

static const char *describe_step(long long step, char text[64]) {
    if (step < 0)
        return "no checkpoint yet";
    snprintf(text, 64, "newest checkpoint step %lld", step);
    return text;
}

static const char *describe_end(const struct job_end *end, char text[64]) {
    if (end->signal)
        snprintf(text, 64, "signal %d (%s)", end->signal, strsignal(end->signal));
    else
        snprintf(text, 64, "exit status %d", end->exit_status);
    return text;
}

static const char *describe_ranks(int ranks, char text[64]) {
    snprintf(text, 64, ranks > 0 ? ", %d ranks" : "", ranks);
    return text;
}

/* ---- what the call says ------------------------------------------------------------------------------------------------ */

/* Where the run of the command is: what the call says, then the command, then its file of settings, then their default. */
static enum status find_directory(struct launch *l) {
    if (!l->directory)
        l->directory = job_words_flag(l->words, "--run.directory");
    if (l->directory)
        return STATUS_OK;
    const char *config_path = job_words_flag(l->words, "--config");
    struct run_config config;
    bool trains = false;
    for (int i = 0; l->words[i]; i++)
        trains = trains || strcmp(l->words[i], "train") == 0;
    if (!trains)
        return status_fail(STATUS_USAGE, "which directory holds the run of this command? name it: --directory DIR");
    run_config_init(&config);
    if (config_path)
        TRY(setting_read_ini(run_config_group(), &config, config_path));
    l->directory = l->owned_directory = text_format("%s", config.run.directory);
    return STATUS_OK;
}

static enum status find_ranks(struct launch *l) {
    if (l->hosts_path && !job_words_hold(l->words, "{hosts}"))
        return status_fail(STATUS_USAGE,
                           "--hosts wants {hosts} in the command, for the file of those that answer: --hostfile {hosts}");
    if (!l->hosts_path && job_words_hold(l->words, "{hosts}"))
        return status_fail(STATUS_USAGE, "{hosts} in the command wants --hosts FILE");
    l->place = job_words_ranks(l->words);
    l->full_ranks = l->asked_ranks > 0 ? (int)l->asked_ranks : l->place.count;
    if (l->hosts_path) {
        TRY(job_hosts_read(&l->hosts, l->hosts_path));
        l->full_ranks = job_hosts_slots(&l->hosts);
    }
    bool named = job_words_hold(l->words, "{ranks}");
    if (named && l->full_ranks == 0)
        return status_fail(STATUS_USAGE, "{ranks} in the command wants --ranks N or --hosts FILE");
    if (named)
        l->place.index = -1;
    if (l->min_ranks > 0 && l->full_ranks == 0)
        return status_fail(STATUS_USAGE, "--min-ranks, but the command has no -n N, -np N, --ntasks=N or {ranks} to make less");
    if (l->min_ranks > l->full_ranks && l->min_ranks > 0)
        return status_fail(STATUS_USAGE, "--min-ranks %lld is more than the %d ranks of the start", (long long)l->min_ranks,
                           l->full_ranks);
    if (l->min_ranks == 0)
        l->min_ranks = l->full_ranks;
    l->ranks = l->ranks_most = l->full_ranks;
    return STATUS_OK;
}

static enum status set_up(struct launch *l) {
    if (!l->words[0])
        return status_fail(STATUS_USAGE, "no command: cadre launch [options] -- mpirun -n 8 cadre train ...");
    if (l->restarts > INT_MAX || l->asked_ranks > 1 << 20 || l->first_pause_s < 0)
        return status_fail(STATUS_USAGE, "--restarts, --ranks or --pause is out of bounds");
    TRY(find_ranks(l));
    TRY(find_directory(l));
    l->checkpoints = path_join(l->directory, "checkpoints");
    l->log_path = path_join(l->directory, "launch.jsonl");
    l->answering_path = path_join(l->directory, "hosts");
    l->pause_s = l->first_pause_s;
    TRY(directory_make(l->directory));
    return job_prepare();
}

static void tear_down(struct launch *l) {
    job_hosts_release(&l->hosts);
    free(l->checkpoints);
    free(l->log_path);
    free(l->answering_path);
    free(l->owned_directory);
}

/* ---- the loop ------------------------------------------------------------------------------------------------------------ */

static enum status fail_stopped(const struct launch *l) {
    char step[64];
    return status_fail(STATUS_INTERRUPTED, "stopped, %s; the same command goes on", describe_step(newest_step(l), step));
}

/* Wait, longer each time. */
static enum status pause_before_next(struct launch *l) {
    if (!job_pause(l->pause_s)) {
        TRY(note(l, "stopped", NULL));
        return fail_stopped(l);
    }
    l->pause_s = 2 * l->pause_s < PAUSE_MOST_S ? 2 * l->pause_s : PAUSE_MOST_S;
    return STATUS_OK;
}

static enum status give_up(struct launch *l, const char *last) {
    char step[64];
    TRY(note(l, "given up", NULL));
    return status_fail(STATUS_PEER, "%d failures without progress, %s; the last: %s", l->failures,
                       describe_step(newest_step(l), step), last);
}

/* One more failure without progress: fewer ranks from the second on, the end after too many. */
static enum status count_failure(struct launch *l, const char *what) {
    if (++l->failures > l->restarts)
        return give_up(l, what);
    if (l->failures >= 2 && l->ranks > l->min_ranks)
        l->ranks_most = l->ranks - 1;
    return STATUS_OK;
}

/* Which hosts answer, into the file that {hosts} names; l->ranks is what they have room for. */
static enum status ask_hosts(struct launch *l, bool *enough) {
    int slots = job_hosts_probe(&l->hosts, l->probe);
    l->ranks = slots < l->ranks_most ? slots : l->ranks_most;
    *enough = l->ranks >= l->min_ranks;
    for (int i = 0; i < l->hosts.count; i++)
        if (!l->hosts.list[i].answers)
            log_info("launch  %s does not answer", l->hosts.list[i].name);
    TRY(note(l, *enough ? "hosts" : "too few hosts", NULL));
    if (*enough)
        return job_hosts_write(&l->hosts, l->answering_path);
    char what[96];
    snprintf(what, sizeof what, "%d slots on the hosts that answer, %lld wanted", slots, (long long)l->min_ranks);
    log_info("launch  %s; again in %g s", what, l->pause_s);
    int most = l->ranks_most;
    TRY(count_failure(l, what));
    l->ranks_most = most;
    return pause_before_next(l);
}

/* The job had the time that its own --max-minutes gave it. */
static bool is_time_over(const struct launch *l, const struct job_end *end) {
    const char *minutes = job_words_flag(l->words, "--max-minutes");
    double seconds = minutes ? 60 * strtod(minutes, NULL) : 0;
    return seconds > 0 && end->exit_status == 1 && end->seconds >= seconds && newest_step(l) > l->step;
}

/* The command does not accept what it was given: on fewer ranks that may be their number. */
static enum status try_next_smaller(struct launch *l) {
    if (l->ranks == 0 || l->ranks == l->full_ranks)
        return status_fail(STATUS_USAGE, "the command ends with exit status 2, a mistake in the call: not tried again");
    if (l->ranks <= l->min_ranks)
        return status_fail(STATUS_USAGE, "the command accepts no number of ranks from here down to %lld", (long long)l->min_ranks);
    l->ranks_most = l->ranks - 1;
    log_info("launch  %d ranks do not fit; trying %d", l->ranks, l->ranks_most);
    return STATUS_OK;
}

static enum status go_on_after(struct launch *l, const struct job_end *end) {
    char how[64], step[64], ranks[64];
    long long newest = newest_step(l);
    if (end->exit_status == USAGE_EXIT)
        return try_next_smaller(l);
    describe_end(end, how);
    if (newest > l->step) {
        l->failures = 0;
        l->pause_s = l->first_pause_s;
    } else {
        TRY(count_failure(l, how));
    }
    log_info("launch  %s after %.0f s, %s; again in %g s%s", how, end->seconds, describe_step(newest, step), l->pause_s,
             describe_ranks(l->ranks_most, ranks));
    return pause_before_next(l);
}

/* One attempt; *over: the run is complete. */
static enum status attempt(struct launch *l, bool *over) {
    struct job_end end;
    bool enough = true;
    char step[64], ranks[64];
    l->ranks = l->ranks_most;
    if (l->hosts_path)
        TRY(ask_hosts(l, &enough));
    if (!enough)
        return STATUS_OK;
    l->step = newest_step(l);
    l->attempt++;
    TRY(note(l, "start", NULL));
    if (l->attempt > 1)
        log_info("launch  attempt %d%s, %s", l->attempt, describe_ranks(l->ranks, ranks), describe_step(l->step, step));
    char **words = job_words_fill(l->words, l->place, l->ranks, l->hosts_path ? l->answering_path : NULL);
    enum status status = job_run(words, &end);
    job_words_free(words);
    TRY(status);
    TRY(note(l, "end", &end));
    *over = end.exit_status == 0;
    if (*over)
        return STATUS_OK;
    if (end.was_stopped || is_time_over(l, &end)) {
        TRY(note(l, "stopped", NULL));
        return fail_stopped(l);
    }
    return go_on_after(l, &end);
}

static enum status run(struct launch *l) {
    bool over = false;
    enum status status = set_up(l);
    while (status == STATUS_OK && !over)
        status = attempt(l, &over);
    tear_down(l);
    return status;
}

static int count_own_words(int argc, char **argv) {
    int count = 0;
    while (count < argc && strcmp(argv[count], "--") != 0)
        count++;
    return count;
}

enum status cmd_launch(int argc, char **argv) {
    struct launch l = {.restarts = 10, .first_pause_s = 1, .probe = "ssh -o ConnectTimeout=5 {host} true"};
    bool help;
    int own = count_own_words(argc, argv);
    l.words = own < argc ? argv + own + 1 : argv + argc;
    const struct argument known[] = {
        {"restarts", ARGUMENT_INTEGER, &l.restarts, "failures in a row without a newer checkpoint before it gives up (10)"},
        {"pause", ARGUMENT_NUMBER, &l.first_pause_s, "seconds before the first restart, doubled up to 60 (1)"},
        {"min-ranks", ARGUMENT_INTEGER, &l.min_ranks,
         "after a second failure without progress go down to so many ranks (as started: never fewer)"},
        {"ranks", ARGUMENT_INTEGER, &l.asked_ranks, "what {ranks} in the command is at first"},
        {"hosts", ARGUMENT_STRING, &l.hosts_path, "a host file: before each start all are asked, {hosts} names those that answer,"
         " {ranks} their slots"},
        {"probe", ARGUMENT_STRING, &l.probe, "how a host is asked (ssh -o ConnectTimeout=5 {host} true)"},
        {"directory", ARGUMENT_STRING, &l.directory, "of the run, where the command does not say --run.directory or --config"},
    };
    enum { COUNT = sizeof known / sizeof *known };
    struct arguments arguments = {known, COUNT, NULL, NULL, NULL};
    TRY(arguments_parse(arguments, own, argv, &help));
    if (!help)
        return run(&l);
    arguments_print_help("launch", "[options] -- COMMAND...", known, COUNT);
    printf("\nRuns the command, and runs it again when it fails: it goes on from its last checkpoint. Signals are passed on; what\n"
           "they stop is not started again. Exit status 2 is not tried again. RUN_DIRECTORY/launch.jsonl tells what happened.\n");
    return STATUS_OK;
}
