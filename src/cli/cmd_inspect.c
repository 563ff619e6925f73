#include "cli/cli.h"

#include "base/file.h"
#include "base/json.h"
#include "base/log.h"
#include "base/text.h"
#include "checkpoint/weights.h"
#include "cli/arguments.h"
#include "cli/inspect_checkpoint.h"
#include "model/workspace.h"
#include "train/run_config.h"
#include "train/trainer.h"
#include <stdio.h>
#include <stdlib.h>

struct inspect_flags {
    const char *directory, *preset, *device;
    bool presets, json, verify, tensors;
    const char *pairs[2 * ARGUMENT_PAIRS_MAX + 4];
    int pair_count;
};

/* What a training run of a configuration takes, without taking it. */
struct cost {
    struct parameter_counts counts;
    double operations_per_token;
    struct model_memory model;
    struct workspace_memory kept, recomputed;
    bool on_host; /* or on a device */
};

static enum status price(const struct run_config *c, struct cost *cost) {
    struct parameter_table table;
    TRY(parameter_table_init(&table, &c->model));
    cost->counts = parameter_table_count(&table, &c->model);
    parameter_table_release(&table);
    cost->operations_per_token = model_train_operations_per_token(&c->model, c->train.sequence_length);
    enum dtype compute = run_config_compute(c);
    struct run_backend backend;
    TRY(run_config_planned_backend(c, &backend));
    cost->on_host = backend.device == device_cpu();
    struct model_options options = {backend.ops, backend.device, compute, DTYPE_F32, c->train.sequence_length, true,
                                    sharding_single()};
    TRY(model_plan(&c->model, options, &cost->model));
    struct workspace_options workspace = {c->train.micro_batch_sequences, c->train.sequence_length, true, false};
    TRY(workspace_plan_config(&c->model, backend.ops, compute, workspace, &cost->kept));
    workspace.recompute = true;
    return workspace_plan_config(&c->model, backend.ops, compute, workspace, &cost->recomputed);
}

/* What an asynchronous save copies: weights and moments. */
static double copy_bytes(const struct run_config *c, const struct cost *cost) {
    return c->checkpoint.mode == CHECKPOINT_MODE_ASYNC ? (double)(cost->model.weights + cost->model.moments) : 0;
}

/* Of the memory that tensors are in: a device's own holds nothing else. */
static double total_bytes(const struct run_config *c, const struct cost *cost) {
    const struct workspace_memory *w = c->train.recompute == RECOMPUTE_BLOCK ? &cost->recomputed : &cost->kept;
    double tensors = (double)(cost->model.total + w->total);
    return cost->on_host ? tensors + TRAIN_PROCESS_BYTES + copy_bytes(c, cost) : tensors;
}

static void print_cost_json(const struct run_config *c, const struct cost *k) {
    json_t *object = json_pack(
        "{s:s,s:I,s:I,s:I,s:f,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:f,s:f}", "preset", c->preset, "parameters",
        (json_int_t)k->counts.total, "active_parameters", (json_int_t)k->counts.active, "embedding_parameters",
        (json_int_t)k->counts.embedding, "operations_per_token", k->operations_per_token, "weight_bytes",
        (json_int_t)k->model.weights, "packed_bytes", (json_int_t)k->model.packed, "gradient_bytes",
        (json_int_t)k->model.gradients, "optimizer_bytes", (json_int_t)k->model.moments, "activation_bytes",
        (json_int_t)k->kept.activations, "activation_bytes_recomputed", (json_int_t)k->recomputed.activations,
        "scratch_bytes", (json_int_t)k->kept.scratch, "process_bytes", (json_int_t)TRAIN_PROCESS_BYTES,
        "checkpoint_copy_bytes", copy_bytes(c, k), "total_bytes", total_bytes(c, k));
    json_dumpf(object, stdout, JSON_COMPACT | JSON_PRESERVE_ORDER);
    putchar('\n');
    json_decref(object);
}

static void print_line(const char *name, double bytes, const char *remark) {
    char text[32];
    printf("  %-14s %12s   %s\n", name, text_bytes(text, bytes), remark);
}

static void print_shape(const struct model_config *m) {
    printf("%lld blocks, width %lld, %lld heads of %lld (%lld for keys and values), vocabulary %lld%s\n",
           (long long)m->num_hidden_layers, (long long)m->hidden_size, (long long)m->num_attention_heads,
           (long long)m->head_dim, (long long)m->num_key_value_heads, (long long)m->vocab_size,
           m->tie_word_embeddings ? ", tied" : "");
    if (m->num_experts > 0)
        printf("%lld experts of width %lld, top %lld%s\n", (long long)m->num_experts,
               (long long)m->moe_intermediate_size, (long long)m->num_experts_per_tok,
               m->norm_topk_prob ? ", weights normalised" : "");
    else
        printf("dense, width %lld\n", (long long)m->intermediate_size);
}

static void print_counts(const struct parameter_counts *counts) {
    char total[32], active[32], embedding[32];
    printf("parameters     %s, of which %s meet a token; %s in embedding and head\n", text_count(total, counts->total),
           text_count(active, counts->active), text_count(embedding, counts->embedding));
}

static void print_cost(const struct run_config *c, const struct cost *k) {
    char sequences[96];
    print_shape(&c->model);
    print_counts(&k->counts);
    printf("operations     %.1f million a token to train (sequence %lld)\n", 1e-6 * k->operations_per_token,
           (long long)c->train.sequence_length);
    printf("memory to train\n");
    print_line("weights", (double)k->model.weights, "fp32");
    print_line("packed", (double)k->model.packed, "as the products read the weights, for forward and backward");
    print_line("gradients", (double)k->model.gradients, "fp32");
    print_line("optimizer", (double)k->model.moments, "AdamW's two moments, fp32");
    snprintf(sequences, sizeof sequences, "%lld sequences at a time", (long long)c->train.micro_batch_sequences);
    print_line("activations", (double)k->kept.activations, sequences);
    print_line("", (double)k->recomputed.activations, "with train.recompute = block");
    print_line("scratch", (double)k->kept.scratch, "");
    print_line("saving", copy_bytes(c, k), "a copy to write checkpoints from while training goes on");
    print_line("process", TRAIN_PROCESS_BYTES, "libraries, generated code, working memory of the kernels");
    print_line("total", total_bytes(c, k), k->on_host ? "" : "on the device; saving and process are the host's");
}

static enum status inspect_preset(struct inspect_flags *f) {
    struct run_config config;
    struct cost cost;
    f->pairs[2 * f->pair_count] = "model.preset";
    f->pairs[2 * f->pair_count++ + 1] = f->preset;
    if (f->device) {
        f->pairs[2 * f->pair_count] = "run.device";
        f->pairs[2 * f->pair_count++ + 1] = f->device;
    }
    TRY(run_config_resolve(&config, NULL, f->pairs, f->pair_count));
    if (config.model.vocab_size == 0)
        config.model.vocab_size = config.data.vocab_size;
    TRY(price(&config, &cost));
    if (f->json)
        print_cost_json(&config, &cost);
    else
        print_cost(&config, &cost);
    return STATUS_OK;
}

static void print_tensors(const struct weights *weights) {
    for (int i = 0; i < weights->file_count; i++) {
        const struct safetensors *file = &weights->files[i];
        char bytes[32];
        double sum = 0;
        for (int k = 0; k < file->entry_count; k++)
            sum += (double)(file->entries[k].end - file->entries[k].begin);
        printf("%-14s %d tensors, %s", path_name(file->path), file->entry_count, text_bytes(bytes, sum));
        if (file->entry_count)
            printf(", %s", safetensors_dtype_name(file->entries[0].dtype));
        printf("\n");
    }
}

static enum status print_model(const char *path) {
    struct model_config config;
    struct weights weights;
    struct parameter_table table;
    char *config_path = path_join(path, "config.json");
    enum status status = file_exists(config_path)
                             ? model_config_read(&config, config_path)
                             : status_fail(STATUS_NOT_FOUND, "%s: holds neither config.json nor a checkpoint", path);
    free(config_path);
    TRY(status);
    TRY(weights_open(&weights, path));
    status = parameter_table_init(&table, &config);
    if (status == STATUS_OK) {
        struct parameter_counts counts = parameter_table_count(&table, &config);
        parameter_table_release(&table);
        printf("%s\n", path);
        print_shape(&config);
        print_counts(&counts);
        print_tensors(&weights);
    }
    weights_close(&weights);
    return status;
}

/* A model, and where it is a checkpoint or a run has some, what a resume needs. */
static enum status inspect_directory(const struct inspect_flags *f) {
    struct inspect_checkpoint_options options = {f->verify, f->tensors, f->json, print_model};
    if (!directory_exists(f->directory))
        return status_fail(STATUS_NOT_FOUND, "%s: no such directory", f->directory);
    if (inspect_is_checkpoint(f->directory))
        return inspect_checkpoint(f->directory, options);
    if (f->verify || f->json || f->tensors)
        return status_fail(STATUS_USAGE, "%s: is no checkpoint and has none", f->directory);
    return print_model(f->directory);
}

static void list_presets(void) {
    for (const char *const *name = preset_names(); *name; name++)
        printf("%s\n", *name);
}

enum status cmd_inspect(int argc, char **argv) {
    struct inspect_flags f = {0};
    bool help;
    const struct argument known[] = {
        {"preset", ARGUMENT_STRING, &f.preset, "what a named model is and takes; with --section.key VALUE to change it"},
        {"presets", ARGUMENT_SWITCH, &f.presets, "the names there are"},
        {"device", ARGUMENT_STRING, &f.device, "what a named model would be trained on: cpu or cuda (cpu)"},
        {"verify", ARGUMENT_SWITCH, &f.verify, "read every byte of a checkpoint, or of all that a run has, and check it"},
        {"tensors", ARGUMENT_SWITCH, &f.tensors, "list the tensors of a checkpoint and where they lie"},
        {"json", ARGUMENT_SWITCH, &f.json, "one JSON object, or one a line for each checkpoint"},
    };
    enum { COUNT = sizeof known / sizeof *known };
    struct arguments arguments = {known, COUNT, f.pairs, &f.pair_count, &f.directory};
    TRY(arguments_parse(arguments, argc, argv, &help));
    if (help) {
        arguments_print_help("inspect", "DIR | --preset NAME | --presets", known, COUNT);
        return STATUS_OK;
    }
    if (f.presets) {
        list_presets();
        return STATUS_OK;
    }
    if (f.preset)
        return inspect_preset(&f);
    if (!f.directory)
        return status_fail(STATUS_USAGE, "name a directory or a --preset; see --help");
    return inspect_directory(&f);
}
