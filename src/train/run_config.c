#include "train/run_config.h"

#include <stddef.h>
#include <stdio.h>
#include <string.h>

static const char *const precision_names[] = {"auto", "fp32", "bf16", NULL};
static const char *const recompute_names[] = {"none", "block", NULL};
static const char *const spike_names[] = {"skip", "roll_back", "ignore", NULL};
static const char *const zero_names[] = {"auto", "0", "1", "2", "3", NULL};
static const char *const wire_names[] = {"fp32", "bf16", NULL};
static const char *const order_names[] = {"strided", "sequential", NULL};
static const char *const outer_wire_names[] = {"fp32", "bf16", "fp8", "fp4", NULL}; /* as enum outer_format */
static const char *const mode_names[] = {"async", "sync", NULL};
static const char *const overlap_names[] = {"wait", "replace", NULL};
static const char *const read_names[] = {"each", "broadcast", NULL};
static const char *const transport_names[] = {"auto", "nccl", "host", NULL}; /* as enum comm_wish */

#define AT(member) offsetof(struct run_config, member)

static const struct setting preset_setting[] = {
    {"model", "preset", SETTING_STRING, AT(preset), 0, 0, NULL, "a named model with its training settings"},
};

static const struct setting run_settings[] = {
    {"data", "train", SETTING_STRING, AT(data.train), 0, 0, NULL, "UTF-8 text files to learn from, shell patterns"},
    {"data", "valid", SETTING_STRING, AT(data.valid), 0, 0, NULL,
     "held-out text files; empty: a tenth of data.train, by block"},
    {"data", "tokenizer", SETTING_STRING, AT(data.tokenizer), 0, 0, NULL,
     "a tokenizer.json; empty: one is trained on data.train"},
    {"data", "vocab_size", SETTING_INTEGER, AT(data.vocab_size), 257, 1 << 20, NULL,
     "tokens of a tokenizer that is trained"},
    {"train", "steps", SETTING_INTEGER, AT(train.steps), 0, 1e9, NULL,
     "updates; 0: as many as train.target_minutes hold"},
    {"train", "target_minutes", SETTING_NUMBER, AT(train.target_minutes), 0, 1e6, NULL,
     "with steps = 0: minutes to train for, measured once at the start"},
    {"train", "sequence_length", SETTING_INTEGER, AT(train.sequence_length), 1, 1 << 24, NULL, "tokens in a sequence"},
    {"train", "batch_sequences", SETTING_INTEGER, AT(train.batch_sequences), 1, 1 << 20, NULL, "sequences in a step"},
    {"train", "micro_batch_sequences", SETTING_INTEGER, AT(train.micro_batch_sequences), 0, 1 << 20, NULL,
     "sequences at a time, over all ranks; 0: the whole batch"},
    {"train", "precision", SETTING_CHOICE, AT(train.precision), 0, 2, precision_names,
     "of products: fp32, bf16 (master weights stay fp32), or auto: bf16 where the processor or the device has it"},
    {"train", "recompute", SETTING_CHOICE, AT(train.recompute), 0, 1, recompute_names,
     "none keeps activations, block keeps each block's input only"},
    {"train", "seed", SETTING_INTEGER, AT(train.seed), 0, 9e15, NULL, "of weights and of the order of the data"},
    {"train", "eval_every_steps", SETTING_INTEGER, AT(train.eval_every_steps), 0, 1e9, NULL,
     "steps between held-out losses; 0: only at the end"},
    {"train", "eval_tokens", SETTING_INTEGER, AT(train.eval_tokens), 0, 1e12, NULL,
     "held-out tokens looked at during training; 0: all"},
    {"train", "sample_every_steps", SETTING_INTEGER, AT(train.sample_every_steps), 0, 1e9, NULL,
     "steps between passages written to samples.txt; 0: none"},
    {"train", "spikes", SETTING_CHOICE, AT(train.spikes), 0, 2, spike_names,
     "of loss or gradient: skip refuses the step (3 in a row roll back), roll_back does so at once, ignore"},
    {"train", "rollback_limit", SETTING_INTEGER, AT(train.rollback_limit), 0, 1e9, NULL,
     "returns to a checkpoint without getting past the trouble, before the run ends"},
    {"train", "verify_steps", SETTING_INTEGER, AT(train.verify_steps), 0, 1e9, NULL,
     "steps between comparisons of what several ranks hold in common, which is also before a save; 0: never"},
};

static const struct setting layout_settings[] = {
    {"layout", "replicate", SETTING_INTEGER, AT(layout.replicate), 0, 1 << 20, NULL,
     "ranks that hold the same parameters; 0: chosen"},
    {"layout", "shard", SETTING_INTEGER, AT(layout.shard), 0, 1 << 20, NULL,
     "ranks that parameters are divided over; 0: chosen"},
    {"layout", "expert", SETTING_INTEGER, AT(layout.expert), 0, 1 << 20, NULL,
     "ranks that the experts of a block are divided over, rows travel to them; 0: chosen"},
    {"layout", "zero", SETTING_CHOICE, AT(layout.zero), 0, 4, zero_names,
     "what is divided: 1 moments, 2 and gradients, 3 and weights; 0 nothing; auto: as memory asks for"},
    {"layout", "grad_wire", SETTING_CHOICE, AT(layout.grad_wire), 0, 1, wire_names,
     "of gradients that travel between ranks: fp32, or bf16 (half the bytes; sums stay fp32)"},
    {"layout", "exchange_limit_bytes", SETTING_INTEGER, AT(layout.exchange_limit_bytes), 0, 9e15, NULL,
     "rows of tokens that may arrive at a rank at once, bytes; more come in rounds; 0: no limit"},
};

static const struct setting diloco_settings[] = {
    {"diloco", "replicas", SETTING_INTEGER, AT(diloco.replicas), 1, 1 << 16, NULL,
     "islands of ranks that train on their own and meet every diloco.sync_steps"},
    {"diloco", "sync_steps", SETTING_INTEGER, AT(diloco.sync_steps), 0, 1e9, NULL,
     "steps between two meetings of a fragment; 0: no islands"},
    {"diloco", "fragments", SETTING_INTEGER, AT(diloco.fragments), 0, 1 << 20, NULL,
     "parts of the model that meet one after the other; 1: all at once; 0: one for 3 blocks, and one for the rest"},
    {"diloco", "order", SETTING_CHOICE, AT(diloco.order), 0, 1, order_names,
     "of blocks in fragments: every so many-th one, or neighbours"},
    {"diloco", "overlap_steps", SETTING_INTEGER, AT(diloco.overlap_steps), 0, 1e9, NULL,
     "steps that go on while a fragment travels"},
    {"diloco", "mix", SETTING_NUMBER, AT(diloco.mix), DILOCO_MIX_AUTO, 1, NULL,
     "share of an island's own weights that a meeting leaves; -1: 0.5, without overlap 0"},
    {"diloco", "outer_lr", SETTING_NUMBER, AT(diloco.outer_lr), 0, 10, NULL, "learning rate of the outer optimizer"},
    {"diloco", "outer_momentum", SETTING_NUMBER, AT(diloco.outer_momentum), 0, 1, NULL, "its momentum, Nesterov's"},
    {"diloco", "wire", SETTING_CHOICE, AT(diloco.wire), 0, OUTER_FORMATS - 1, outer_wire_names,
     "of differences that travel: fp32, bf16, fp8 or fp4"},
    {"diloco", "experts_every", SETTING_INTEGER, AT(diloco.experts_every), 1, 1e6, NULL,
     "experts meet in every so many-th meeting of their fragment"},
};

static const struct setting place_settings[] = {
    {"checkpoint", "every_steps", SETTING_INTEGER, AT(checkpoint.every_steps), 0, 1e9, NULL,
     "steps between checkpoints; 0: only at the end"},
    {"checkpoint", "at_end", SETTING_BOOLEAN, AT(checkpoint.at_end), 0, 1, NULL,
     "and one when the run is complete; no: where its numbers are all that is wanted"},
    {"checkpoint", "keep", SETTING_INTEGER, AT(checkpoint.keep), 1, 1e6, NULL, "newest checkpoints kept"},
    {"checkpoint", "keep_every_steps", SETTING_INTEGER, AT(checkpoint.keep_every_steps), 0, 1e9, NULL,
     "and those of every step that this divides; 0: none"},
    {"checkpoint", "keep_best", SETTING_BOOLEAN, AT(checkpoint.keep_best), 0, 1, NULL,
     "and the one with the lowest held-out loss, of those saved at an evaluation"},
    {"checkpoint", "mode", SETTING_CHOICE, AT(checkpoint.mode), 0, 1, mode_names,
     "async: written while training goes on, from a copy in memory; sync: training waits"},
    {"checkpoint", "overlap", SETTING_CHOICE, AT(checkpoint.overlap), 0, 1, overlap_names,
     "a save that is due while another is written waits for it, or replaces it"},
    {"checkpoint", "file_bytes", SETTING_INTEGER, AT(checkpoint.file_bytes), 1, 1e15, NULL,
     "bytes of tensors in one file; more are divided into several, with an index"},
    {"checkpoint", "weights", SETTING_CHOICE, AT(checkpoint.weights), 0, 1, wire_names,
     "of model.safetensors: fp32, or bf16 for other tools, with those to go on from in training/"},
    {"checkpoint", "read", SETTING_CHOICE, AT(checkpoint.read), 0, 1, read_names,
     "on resume replicas read each for itself, or one reads and sends it to the others"},
    {"run", "directory", SETTING_STRING, AT(run.directory), 0, 0, NULL, "where everything of this run is kept"},
    {"run", "device", SETTING_STRING, AT(run.device), 0, 0, NULL, "what computes: cpu or cuda"},
    {"run", "transport", SETTING_CHOICE, AT(run.transport), 0, 2, transport_names,
     "of tensors between devices: nccl, host (through the processors' memory), or auto: nccl where each rank has its device"},
    {"run", "graph", SETTING_BOOLEAN, AT(run.graph), 0, 1, NULL,
     "of a CUDA device of one rank: what a micro-batch computes is recorded as a graph and repeated"},
    {"run", "kernels", SETTING_STRING, AT(run.kernels), 0, 0, NULL,
     "instruction set: auto, ref, portable, avx2, avx512, avx512bf16; of a device: auto, cuda, sm80 (nothing of "
     "Hopper's own), tiles (nothing of its own for few rows), sm80-tiles, and sm90-... for measurements"},
    {"run", "timeout_seconds", SETTING_NUMBER, AT(run.timeout_seconds), 0, 1e6, NULL,
     "a rank that gives no sign of life for so long ends the run: stopped, or its link is dead; 0: none does"},
    {"run", "threads", SETTING_INTEGER, AT(run.threads), 0, 4096, NULL, "threads; 0: one for each processor"},
};

#undef AT
#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

struct setting_group run_config_group(void) {
    static struct setting_table tables[] = {
        {preset_setting, COUNT(preset_setting), 0},   {model_settings, 0, offsetof(struct run_config, model)},
        {run_settings, COUNT(run_settings), 0},       {optimizer_setting_list, 0, offsetof(struct run_config, optim)},
        {layout_settings, COUNT(layout_settings), 0}, {diloco_settings, COUNT(diloco_settings), 0},
        {place_settings, COUNT(place_settings), 0},
    };
    tables[1].count = model_setting_count;
    tables[3].count = optimizer_setting_count;
    return (struct setting_group){tables, COUNT(tables)};
}

void run_config_init(struct run_config *config) {
    memset(config, 0, sizeof *config);
    model_config_init(&config->model);
    optimizer_settings_init(&config->optim);
    config->data.vocab_size = 4096;
    config->train.steps = 1000;
    config->train.sequence_length = 256;
    config->train.batch_sequences = 16;
    config->train.seed = 1;
    config->train.eval_every_steps = 100;
    config->train.eval_tokens = 65536;
    config->train.sample_every_steps = 0;
    config->train.rollback_limit = 3;
    config->train.verify_steps = 100;
    config->diloco.replicas = 1;
    config->diloco.overlap_steps = 1;
    config->diloco.mix = DILOCO_MIX_AUTO;
    config->diloco.outer_lr = 0.4;
    config->diloco.outer_momentum = 0.9;
    config->diloco.wire = OUTER_FP4;
    config->diloco.experts_every = 1;
    config->checkpoint.every_steps = 200;
    config->checkpoint.keep = 2;
    config->checkpoint.at_end = true;
    config->run.graph = true;
    config->run.timeout_seconds = 60;
    config->checkpoint.file_bytes = 5000000000; /* as transformers writes */
    strcpy(config->run.directory, "runs/cadre");
    strcpy(config->run.kernels, "auto");
    strcpy(config->run.device, "cpu");
}

/* The preset that file or command line name; the line wins. */
static enum status find_preset(const char *ini_path, const char *const *pairs, int pair_count, char *name) {
    struct run_config probe;
    run_config_init(&probe);
    if (ini_path)
        TRY(setting_read_ini(run_config_group(), &probe, ini_path));
    strcpy(name, probe.preset);
    for (int i = 0; i < pair_count; i++)
        if (strcmp(pairs[2 * i], "model.preset") == 0)
            snprintf(name, SETTING_STRING_BYTES, "%s", pairs[2 * i + 1]);
    return STATUS_OK;
}

enum status run_config_resolve(struct run_config *config, const char *ini_path, const char *const *pairs,
                               int pair_count) {
    char preset[SETTING_STRING_BYTES];
    TRY(find_preset(ini_path, pairs, pair_count, preset));
    run_config_init(config);
    if (*preset)
        TRY(preset_apply(config, preset));
    if (ini_path)
        TRY(setting_read_ini(run_config_group(), config, ini_path));
    for (int i = 0; i < pair_count; i++)
        TRY(setting_set(run_config_group(), config, pairs[2 * i], pairs[2 * i + 1], "command line"));
    return run_config_check(config);
}

struct outer_options run_config_outer(const struct run_config *c) {
    struct outer_plan plan = {.sync_steps = c->diloco.sync_steps,
                              .fragment_count = (int)c->diloco.fragments,
                              .block_count = (int)c->model.num_hidden_layers,
                              .order = c->diloco.order,
                              .overlap_steps = c->diloco.overlap_steps,
                              .experts_every = c->diloco.experts_every};
    if (plan.fragment_count == 0 && plan.sync_steps > 0)
        plan.fragment_count = outer_plan_fragments(plan.block_count, plan.sync_steps, plan.overlap_steps);
    double mix = c->diloco.mix == DILOCO_MIX_AUTO ? (plan.overlap_steps > 0 ? 0.5 : 0) : c->diloco.mix;
    return (struct outer_options){plan, c->diloco.outer_lr, c->diloco.outer_momentum, mix,
                                  (enum outer_format)c->diloco.wire};
}

static enum status check_islands(const struct run_config *c) {
    long long islands = c->diloco.replicas, batch = c->train.batch_sequences, micro = c->train.micro_batch_sequences;
    if (islands > 1 && c->diloco.sync_steps == 0)
        return status_fail(STATUS_USAGE,
                           "diloco.replicas %lld, but they never meet: set --diloco.sync_steps, 100 for example",
                           islands);
    if (c->diloco.sync_steps == 0)
        return STATUS_OK;
    if (batch % islands != 0)
        return status_fail(
            STATUS_USAGE,
            "train.batch_sequences %lld is not a multiple of diloco.replicas %lld: each island takes as many; "
            "%lld or %lld would do",
            batch, islands, batch < islands ? islands : batch / islands * islands, (batch / islands + 1) * islands);
    if (micro % islands != 0)
        return status_fail(
            STATUS_USAGE,
            "train.micro_batch_sequences %lld is not a multiple of diloco.replicas %lld: it counts the sequences "
            "of all islands",
            micro, islands);
    if (c->diloco.mix != DILOCO_MIX_AUTO && c->diloco.mix < 0)
        return status_fail(STATUS_USAGE, "diloco.mix is -1 or from 0 to 1, not %g", c->diloco.mix);
    if (c->diloco.outer_lr <= 0)
        return status_fail(STATUS_USAGE,
                           "diloco.outer_lr %g would never move the weights that islands share; 0.4 is usual",
                           c->diloco.outer_lr);
    if (c->diloco.outer_momentum >= 1)
        return status_fail(STATUS_USAGE, "diloco.outer_momentum is less than 1, not %g; 0.9 is usual",
                           c->diloco.outer_momentum);
    struct outer_options outer = run_config_outer(c);
    return outer_plan_check(&outer.plan);
}

enum status run_config_check(struct run_config *c) {
    TRY(model_config_check(&c->model, "model"));
    if (c->train.micro_batch_sequences == 0)
        c->train.micro_batch_sequences = c->train.batch_sequences;
    if (c->train.batch_sequences % c->train.micro_batch_sequences != 0)
        return status_fail(STATUS_USAGE,
                           "train.batch_sequences %lld is not a multiple of train.micro_batch_sequences %lld",
                           (long long)c->train.batch_sequences, (long long)c->train.micro_batch_sequences);
    if (c->train.sequence_length > c->model.max_position_embeddings)
        return status_fail(STATUS_USAGE, "train.sequence_length %lld is longer than model.max_position_embeddings %lld",
                           (long long)c->train.sequence_length, (long long)c->model.max_position_embeddings);
    if (c->train.steps == 0 && c->train.target_minutes <= 0)
        return status_fail(STATUS_USAGE, "train.steps is 0; set it, or train.target_minutes");
    if (c->run.timeout_seconds > 0 && c->run.timeout_seconds < 1)
        return status_fail(STATUS_USAGE, "run.timeout_seconds is 0 or at least 1, not %g", c->run.timeout_seconds);
    TRY(check_islands(c));
    if (!*c->run.directory)
        return status_fail(STATUS_USAGE, "run.directory is empty");
    return STATUS_OK;
}

enum status run_config_backend(const struct run_config *config, struct run_backend *backend) {
    TRY(device_choose(config->run.device, &backend->device));
    return kernels_choose_for(backend->device, config->run.kernels, &backend->ops);
}

enum status run_config_planned_backend(const struct run_config *config, struct run_backend *backend) {
    TRY(device_plan(config->run.device, &backend->device));
    return kernels_choose_for(backend->device, config->run.kernels, &backend->ops);
}

/* A name that is no device's is told of where the device is chosen. */
static bool prefers_bf16(const struct run_config *config) {
    const struct device *device;
    if (device_plan(config->run.device, &device) != STATUS_OK)
        return false;
    return kernels_device_prefers_bf16(device);
}

enum dtype run_config_compute(const struct run_config *config) {
    if (config->train.precision == PRECISION_AUTO)
        return prefers_bf16(config) ? DTYPE_BF16 : DTYPE_F32;
    return config->train.precision == PRECISION_BF16 ? DTYPE_BF16 : DTYPE_F32;
}
