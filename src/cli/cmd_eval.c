#include "cli/cli.h"

#include "base/clock.h"
#include "base/json.h"
#include "base/log.h"
#include "base/memory.h"
#include "cli/arguments.h"
#include "cli/common.h"
#include "data/corpus.h"
#include "metrics/metrics_file.h"
#include "train/evaluate.h"
#include "train/run_config.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SEQUENCE_LENGTH_DEFAULT = 512, BATCH_TOKENS = 4096 };

struct eval_flags {
    struct model_flags model;
    const char *data;
    int64_t sequence_length;
    bool experts, json, quiet;
};

/* One text domain: a file, or the held-out part of one. */
struct domain {
    char *name;
    struct evaluation evaluation;
    int64_t byte_count;
};

struct eval {
    const struct eval_flags *flags;
    struct loaded_model loaded;
    struct workspace *workspace;
    struct domain *domains;
    size_t domain_count;
    double seconds;
};

static struct domain *find_domain(struct eval *e, const char *name) {
    for (size_t i = 0; i < e->domain_count; i++)
        if (strcmp(e->domains[i].name, name) == 0)
            return &e->domains[i];
    e->domains = realloc(e->domains, (e->domain_count + 1) * sizeof *e->domains);
    CHECK(e->domains != NULL);
    e->domains[e->domain_count] = (struct domain){.name = memory_copy_string(name)};
    return &e->domains[e->domain_count++];
}

static enum status evaluate_file(struct eval *e, const char *path) {
    char *text;
    size_t size;
    struct token_list tokens = {0};
    int end_of_text = tokenizer_end_of_text(e->loaded.tokenizer);
    TRY(corpus_read_text(path, &text, &size));
    if (end_of_text >= 0) /* as in training: so the first token of the text is predicted too */
        token_list_add(&tokens, end_of_text);
    enum status status = tokenizer_encode(e->loaded.tokenizer, text, size, false, &tokens);
    free(text);
    if (status == STATUS_OK) {
        struct domain *domain = find_domain(e, path_name(path));
        domain->byte_count += (int64_t)size;
        status = evaluate_tokens(e->loaded.model, e->workspace, NULL, tokens.ids, (int64_t)tokens.count, &domain->evaluation);
    }
    token_list_release(&tokens);
    return status;
}

static enum status evaluate_files(struct eval *e) {
    struct text_list paths;
    TRY(file_glob(e->flags->data, &paths));
    enum status status = STATUS_OK;
    for (size_t i = 0; i < paths.count && status == STATUS_OK; i++)
        status = evaluate_file(e, paths.items[i]);
    text_list_release(&paths);
    return status;
}

static enum status evaluate_document(struct eval *e, const struct corpus *corpus,
                                     const struct corpus_document *document) {
    int32_t *tokens;
    struct domain *domain = find_domain(e, corpus->domains.items[document->domain]);
    TRY(memory_alloc(&tokens, (size_t)document->token_count, sizeof *tokens));
    token_shard_copy(&corpus->valid.shard, document->first_token, document->token_count, tokens);
    domain->byte_count += document->byte_count;
    enum status status =
        evaluate_tokens(e->loaded.model, e->workspace, NULL, tokens, document->token_count, &domain->evaluation);
    free(tokens);
    return status;
}

/* The part of a run's own text that it never learnt from. */
static enum status evaluate_held_out(struct eval *e) {
    struct corpus corpus;
    char *directory = path_join(e->flags->model.model, "data");
    if (!directory_exists(directory)) {
        free(directory);
        return status_fail(STATUS_USAGE, "%s: is not a run directory; name the text with --data FILES",
                           e->flags->model.model);
    }
    enum status status = corpus_open(&corpus, directory);
    free(directory);
    TRY(status);
    if (corpus.vocab_size > e->loaded.model->config.vocab_size)
        status = status_fail(STATUS_FORMAT, "%s: its text is of %d tokens, the model knows %lld", e->flags->model.model,
                             corpus.vocab_size, (long long)e->loaded.model->config.vocab_size);
    for (int64_t i = 0; i < corpus.valid.document_count && status == STATUS_OK; i++)
        status = evaluate_document(e, &corpus, &corpus.valid.documents[i]);
    corpus_close(&corpus);
    return status;
}

/* ---- printing ---------------------------------------------------------------------------------------------------------- */

static struct domain sum_domains(const struct eval *e) {
    static char everything[] = "all";
    struct domain sum = {.name = everything};
    for (size_t i = 0; i < e->domain_count; i++) {
        sum.byte_count += e->domains[i].byte_count;
        sum.evaluation.token_count += e->domains[i].evaluation.token_count;
        sum.evaluation.loss_sum += e->domains[i].evaluation.loss_sum;
    }
    return sum;
}

static void print_json(const struct eval *e, const struct domain *d, bool is_sum) {
    json_t *object = json_object();
    if (!is_sum)
        json_object_set_new(object, "domain", json_string(d->name));
    json_object_set_new(object, "tokens", json_integer(d->evaluation.token_count));
    json_object_set_new(object, "bytes", json_integer(d->byte_count));
    json_object_set_new(object, "loss", metrics_number(evaluation_loss(&d->evaluation)));
    json_object_set_new(object, "bits_per_byte", metrics_number(evaluation_bits_per_byte(&d->evaluation, d->byte_count)));
    if (is_sum)
        json_object_set_new(object, "tokens_per_s", json_real((double)d->evaluation.token_count / e->seconds));
    json_dumpf(object, stdout, JSON_COMPACT | JSON_PRESERVE_ORDER);
    putchar('\n');
    json_decref(object);
}

static void print_row(const struct domain *d) {
    char tokens[32], bytes[32];
    printf("%-24.24s %12s %14s %8.4f %15.4f\n", d->name, text_count(tokens, d->evaluation.token_count),
           text_count(bytes, d->byte_count), evaluation_loss(&d->evaluation),
           evaluation_bits_per_byte(&d->evaluation, d->byte_count));
}

/* How each block spreads each domain's rows over its experts, percent. An even spread gives 100/E everywhere. */
static void print_experts(const struct eval *e) {
    const struct model_config *c = &e->loaded.model->config;
    int64_t experts = c->num_experts, stats = 2 + 2 * experts;
    printf("\nrows of each expert, %% of the block's (even: %.1f; * is half as much again)\n\n%-5s %-18s",
           100.0 / (double)experts, "block", "domain");
    for (int64_t x = 0; x < experts; x++)
        printf(" %6lld", (long long)x);
    printf("\n");
    for (int64_t l = 0; l < c->num_hidden_layers; l++)
        for (size_t i = 0; i < e->domain_count; i++) {
            const double *rows = e->domains[i].evaluation.stats + l * stats + 2 + experts;
            double sum = 0;
            for (int64_t x = 0; x < experts; x++)
                sum += rows[x];
            printf("%-5lld %-18.18s", (long long)l, e->domains[i].name);
            for (int64_t x = 0; x < experts; x++)
                printf(" %5.1f%c", 100 * rows[x] / sum, rows[x] * (double)experts > 1.5 * sum ? '*' : ' ');
            printf("\n");
        }
}

static void print_all(const struct eval *e) {
    struct domain sum = sum_domains(e);
    if (e->flags->json) {
        for (size_t i = 0; i < e->domain_count && e->domain_count > 1; i++)
            print_json(e, &e->domains[i], false);
        print_json(e, &sum, true);
        return;
    }
    printf("%-24s %12s %14s %8s %15s\n", "text", "tokens", "bytes", "loss", "bits per byte");
    for (size_t i = 0; i < e->domain_count; i++)
        print_row(&e->domains[i]);
    if (e->domain_count > 1)
        print_row(&sum);
    if (e->flags->experts && e->loaded.model->config.num_experts > 0)
        print_experts(e);
}

/* ---- running ------------------------------------------------------------------------------------------------------------ */

/* The length that the model was trained with, where its checkpoint says so. */
static int64_t choose_length(const struct loaded_model *loaded, int64_t asked) {
    int64_t longest = loaded->model->rope.shape[0], length = SEQUENCE_LENGTH_DEFAULT;
    struct run_config config;
    char *path = path_join(loaded->path, "training/config.ini");
    run_config_init(&config);
    if (file_exists(path) && setting_read_ini(run_config_group(), &config, path) == STATUS_OK)
        length = config.train.sequence_length;
    free(path);
    length = asked > 0 ? asked : length;
    return length < longest ? length : longest;
}

static enum status run(struct eval *e) {
    int64_t length = choose_length(&e->loaded, e->flags->sequence_length);
    int64_t batch = BATCH_TOKENS / length > 0 ? BATCH_TOKENS / length : 1;
    struct workspace_options options = {batch, length, false, false};
    TRY(workspace_create(e->loaded.model, options, &e->workspace));
    double begin = clock_seconds();
    TRY(e->flags->data ? evaluate_files(e) : evaluate_held_out(e));
    e->seconds = clock_seconds() - begin;
    if (sum_domains(e).evaluation.token_count == 0)
        return status_fail(STATUS_FORMAT, "the text holds no token to predict");
    print_all(e);
    return STATUS_OK;
}

enum status cmd_eval(int argc, char **argv) {
    struct eval_flags f = {.model = {.precision = "fp32", .device = "cpu", .kernels = "auto"}};
    bool help;
    const struct argument known[] = {
        {"model", ARGUMENT_STRING, &f.model.model, "a model or run directory"},
        {"data", ARGUMENT_STRING, &f.data, "UTF-8 text files, shell patterns; none: the run's held-out text"},
        {"sequence-length", ARGUMENT_INTEGER, &f.sequence_length, "tokens of a window (as trained, else 512)"},
        {"experts", ARGUMENT_SWITCH, &f.experts, "a table of where each block sends each text"},
        {"precision", ARGUMENT_STRING, &f.model.precision, "auto: bf16 where that is faster; fp32, bf16 (fp32)"},
        {"device", ARGUMENT_STRING, &f.model.device, "what computes: cpu or cuda (cpu)"},
        {"kernels", ARGUMENT_STRING, &f.model.kernels, "instruction set (auto)"},
        {"threads", ARGUMENT_INTEGER, &f.model.threads, "0: one for each processor (0)"},
        {"json", ARGUMENT_SWITCH, &f.json, "one JSON object a line"},
        {"quiet", ARGUMENT_SWITCH, &f.quiet, "only the result"},
    };
    enum { COUNT = sizeof known / sizeof *known };
    struct arguments arguments = {known, COUNT, NULL, NULL, NULL};
    TRY(arguments_parse(arguments, argc, argv, &help));
    if (help) {
        arguments_print_help("eval", "--model DIR [--data FILES]", known, COUNT);
        return STATUS_OK;
    }
    log_set_level(f.quiet ? LOG_QUIET : LOG_NORMAL);
    struct eval e = {.flags = &f};
    TRY(common_load(&f.model, f.sequence_length, &e.loaded));
    enum status status = run(&e);
    for (size_t i = 0; i < e.domain_count; i++) {
        evaluation_release(&e.domains[i].evaluation);
        free(e.domains[i].name);
    }
    free(e.domains);
    workspace_destroy(e.workspace);
    loaded_model_release(&e.loaded);
    return status;
}
