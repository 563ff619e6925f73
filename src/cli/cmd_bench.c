#include "cli/cli.h"

#include "base/log.h"
#include "base/text.h"
#include "base/threads.h"
#include "bench/bench.h"
#include "cli/arguments.h"
#include <stdio.h>
#include <string.h>

struct bench_verb {
    const char *name, *help;
    enum status (*run)(const struct bench *bench);
};

static const struct bench_verb verbs[] = {
    {"roof", "what this machine can do: multiplications, memory; for 1 .. all threads", bench_roof},
    {"gemm", "dense products over packed weights, forward and both gradients", bench_gemm},
    {"moe", "grouped products over ragged groups, gathered", bench_moe},
    {"attention", "causal attention, forward and backward, sequence 512 to 8192", bench_attention},
    {"outer", "bytes of an outer step and back, and the update; on 1 and on all threads", bench_outer},
    {"comm", "transfers between the ranks that mpirun started, beside MPI's own", bench_comm},
    {"checkpoint", "saving and loading beside the disk's own speed, and saves beside training steps", bench_checkpoint},
    {"decode", "reading a prompt, then writing token by token, by a preset of random weights", bench_decode},
    {"train", "whole training steps of a preset on random tokens", bench_train},
};
enum { VERB_COUNT = sizeof verbs / sizeof *verbs, ROUNDS = 5, ROUNDS_ON_DEVICE = 10 };

struct bench_flags {
    const char *what, *precision, *device, *kernels, *preset, *peer, *part, *directory, *cases;
    int64_t threads, rounds, sequence_length;
    bool json;
};

static enum status choose_precisions(const char *name, struct bench *bench) {
    if (strcmp(name, "fp32") != 0)
        bench->precisions[bench->precision_count++] = DTYPE_BF16;
    if (strcmp(name, "bf16") != 0)
        bench->precisions[bench->precision_count++] = DTYPE_F32;
    if (bench->precision_count == 2 && strcmp(name, "both") != 0)
        return status_fail(STATUS_USAGE, "--precision is fp32, bf16 or both, not \"%s\"", name);
    return STATUS_OK;
}

static enum status find_verb(const char *word, const struct bench_verb **verb) {
    const char *names[VERB_COUNT];
    for (int i = 0; i < VERB_COUNT; i++) {
        names[i] = verbs[i].name;
        if (word && strcmp(word, names[i]) == 0) {
            *verb = &verbs[i];
            return STATUS_OK;
        }
    }
    if (!word)
        return status_fail(STATUS_USAGE,
                           "what to measure is missing: roof, gemm, moe, attention, outer, comm, checkpoint, decode or train");
    int nearest = text_nearest(word, names, VERB_COUNT);
    if (nearest >= 0)
        return status_fail(STATUS_USAGE, "cannot measure \"%s\"; the nearest known word is %s", word, names[nearest]);
    return status_fail(STATUS_USAGE, "cannot measure \"%s\": roof, gemm, moe, attention, outer, comm, checkpoint, decode or train",
                       word);
}

static void print_help(const struct argument *known, int count) {
    arguments_print_help("bench", "roof | gemm | moe | attention | outer | comm | checkpoint | decode | train", known, count);
    printf("\n");
    for (int i = 0; i < VERB_COUNT; i++)
        printf("  %-10s %s\n", verbs[i].name, verbs[i].help);
    printf("\nEvery figure is a median over the rounds, beside the roof that the same call measured: multiply-adds on\n"
           "registers only; on a device its largest dense product. Operations of a training step are 6 a parameter that\n"
           "a token multiplies with, and causal attention; those of a product 2 M N K. A token that is written must read\n"
           "every weight that it meets, and keys and values of all before it: its roof is reading memory, which a model\n"
           "that fits a cache may pass. Leave the machine alone meanwhile.\n");
}

static enum status check_flags(const struct bench_flags *f) {
    if (f->rounds == 0 || f->rounds > 1000)
        return status_fail(STATUS_USAGE, "--rounds is 1 to 1000, not %lld", (long long)f->rounds);
    if (f->threads < 0 || f->threads > 4096)
        return status_fail(STATUS_USAGE, "--threads is 0 to 4096, not %lld", (long long)f->threads);
    if (f->sequence_length < 0 || f->sequence_length > 1 << 20)
        return status_fail(STATUS_USAGE, "--sequence-length is 1 to %d, not %lld", 1 << 20,
                           (long long)f->sequence_length);
    if (f->cases && strcmp(f->what, "gemm") != 0 && strcmp(f->what, "moe") != 0 && strcmp(f->what, "attention") != 0 &&
        strcmp(f->what, "decode") != 0)
        return status_fail(STATUS_USAGE, "--cases is for cadre bench gemm, moe, attention and decode");
    if (f->peer && strcmp(f->what, "train") != 0)
        return status_fail(STATUS_USAGE, "--peer is for cadre bench train");
    if (strcmp(f->part, "step") != 0 && strcmp(f->part, "compute") != 0 && strcmp(f->part, "transfers") != 0)
        return status_fail(STATUS_USAGE, "--part is step, compute or transfers, not \"%s\"", f->part);
    return STATUS_OK;
}

static void print_lost(const char *line) {
    fprintf(stderr, "cadre bench: %s\n", line);
}

static enum status choose_device(const struct bench_flags *f, struct bench *bench) {
    TRY(device_choose(f->device, &bench->device));
    TRY(kernels_choose_for(bench->device, f->kernels, &bench->ops));
    if (bench->rounds < 0)
        bench->rounds = bench->device == device_cpu() ? ROUNDS : ROUNDS_ON_DEVICE;
    return STATUS_OK;
}

/* What is measured by all ranks, each with its share of the machine's processors and devices. */
static enum status run_together(const struct bench_flags *f, struct bench *bench, enum status (*run)(const struct bench *bench)) {
    struct comm_launch launch;
    TRY(comm_launch_open(&launch, print_lost));
    bench->launch = &launch;
    if (bench->threads_follow_launch)
        threads_set_count(launch.thread_count);
    device_set_local_rank(launch.local_rank);
    enum status status = comm_agree(&launch.world, choose_device(f, bench));
    if (status == STATUS_OK)
        status = run(bench);
    if (comm_launch_speaks(&launch, status))
        cli_tell_failure("bench");
    else if (status != STATUS_OK)
        cli_stay_silent();
    comm_launch_close(&launch, status);
    return status;
}

enum status cmd_bench(int argc, char **argv) {
    struct bench_flags f = {
        .precision = "both", .device = "cpu", .kernels = "auto", .preset = "bench", .part = "step", .directory = ".", .rounds = -1};
    bool help;
    const struct argument known[] = {
        {"precision", ARGUMENT_STRING, &f.precision, "fp32, bf16 or both (both)"},
        {"threads", ARGUMENT_INTEGER, &f.threads, "0: one for each processor (0)"},
        {"rounds", ARGUMENT_INTEGER, &f.rounds, "timed rounds, or steps; the median counts (5; 10 on a device)"},
        {"preset", ARGUMENT_STRING, &f.preset, "of train, checkpoint and decode (bench)"},
        {"sequence-length", ARGUMENT_INTEGER, &f.sequence_length, "of train (the preset's), attention and decode (a list)"},
        {"directory", ARGUMENT_STRING, &f.directory, "of checkpoint: written to, on the disk to be measured (.)"},
        {"peer", ARGUMENT_STRING, &f.peer, "of train: a command to alternate with; prints {\"tokens_per_s\": N}"},
        {"part", ARGUMENT_STRING, &f.part, "of train: step, or what it computes or transfers alone (step)"},
        {"cases", ARGUMENT_STRING, &f.cases, "of gemm, moe, attention and decode: only those whose name holds this"},
        {"device", ARGUMENT_STRING, &f.device, "what is measured: cpu or cuda (cpu)"},
        {"kernels", ARGUMENT_STRING, &f.kernels, "instruction set (auto)"},
        {"json", ARGUMENT_SWITCH, &f.json, "one JSON object a line"},
    };
    enum { COUNT = sizeof known / sizeof *known };
    const char *pairs[2 * ARGUMENT_PAIRS_MAX];
    int pair_count = 0;
    struct arguments arguments = {known, COUNT, pairs, &pair_count, &f.what};
    const struct bench_verb *verb = NULL;
    TRY(arguments_parse(arguments, argc, argv, &help));
    if (help) {
        print_help(known, COUNT);
        return STATUS_OK;
    }
    log_set_level(LOG_QUIET);
    TRY(find_verb(f.what, &verb));
    TRY(check_flags(&f));
    bool together = verb->run == bench_comm || verb->run == bench_train || verb->run == bench_checkpoint;
    if (pair_count > 0 && !together && verb->run != bench_decode)
        return status_fail(STATUS_USAGE, "--%s is for cadre bench train, decode, checkpoint and comm", pairs[0]);
    struct bench bench = {.rounds = (int)f.rounds,
                          .json = f.json,
                          .preset = f.preset,
                          .peer = f.peer,
                          .sequence_length = f.sequence_length,
                          .pairs = pairs,
                          .pair_count = pair_count,
                          .part = f.part,
                          .directory = f.directory,
                          .cases = f.cases};
    TRY(choose_precisions(f.precision, &bench));
    threads_set_count((int)f.threads);
    bench.threads_follow_launch = f.threads == 0;
    if (together)
        return run_together(&f, &bench, verb->run);
    TRY(choose_device(&f, &bench));
    return verb->run(&bench);
}
