#include "cli/cli.h"

#include "base/json.h"
#include "base/log.h"
#include "cli/arguments.h"
#include "cli/common.h"
#include "infer/generate.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct generate_flags {
    struct model_flags model;
    const char *prompt;
    int64_t max_tokens, top_k, seed, context_length;
    double temperature, top_p;
    bool json, quiet;
};

static void print_piece(void *context, const char *text, size_t size) {
    (void)context;
    fwrite(text, 1, size, stdout);
    fflush(stdout);
}

static void collect_piece(void *context, const char *text, size_t size) {
    text_add(context, text, size);
}

static enum status read_prompt(struct text *out) {
    TRY(common_read_stdin(out));
    const char *zero = out->size > 0 ? memchr(text_string(out), '\0', out->size) : NULL;
    if (zero)
        return status_fail(STATUS_FORMAT, "the prompt is no text: byte %zu is zero", (size_t)(zero - text_string(out)));
    return STATUS_OK;
}

static const char *precision_name(const struct loaded_model *loaded) {
    return loaded->model->context.compute == DTYPE_BF16 ? "bf16" : "fp32";
}

static void print_json(const char *prompt, const struct text *text, const struct generation_result *result,
                       const char *precision) {
    json_t *object = json_pack("{s:o,s:s%,s:I,s:I,s:b,s:f,s:s}", "prompt", json_name(prompt), "text", text_string(text), text->size,
                               "prompt_tokens", (json_int_t)result->prompt_tokens, "new_tokens",
                               (json_int_t)result->new_tokens, "end_of_text", result->reached_end, "tokens_per_s",
                               (double)result->new_tokens / result->new_seconds, "precision", precision);
    json_dumpf(object, stdout, JSON_COMPACT | JSON_PRESERVE_ORDER);
    putchar('\n');
    json_decref(object);
}

static enum status run(const struct generate_flags *flags, const char *prompt, const struct loaded_model *loaded) {
    struct generator *generator;
    struct generation_result result;
    struct text text = {0};
    int64_t capacity = loaded->model->rope.shape[0];
    TRY(generator_create(&generator, loaded->model, capacity));
    struct generation generation = {loaded->tokenizer,
                                    prompt,
                                    flags->max_tokens,
                                    {flags->temperature, (int)flags->top_k, flags->top_p, (uint64_t)flags->seed},
                                    flags->json ? collect_piece : print_piece,
                                    &text};
    if (!flags->json)
        print_piece(NULL, prompt, strlen(prompt));
    enum status status = generator_run(generator, &generation, &result);
    generator_destroy(generator);
    if (!flags->json)
        putchar('\n');
    if (status == STATUS_OK && flags->json)
        print_json(prompt, &text, &result, precision_name(loaded));
    text_release(&text);
    TRY(status);
    if (result.reached_capacity)
        log_warn("the model reads at most %lld tokens: the text ends here", (long long)capacity);
    log_info("%lld tokens at %.0f tokens/s in %s after %lld of prompt", (long long)result.new_tokens,
             (double)result.new_tokens / result.new_seconds, precision_name(loaded), (long long)result.prompt_tokens);
    return STATUS_OK;
}

static enum status check(const struct generate_flags *flags) {
    if (flags->temperature < 0 || flags->top_p <= 0 || flags->top_p > 1)
        return status_fail(STATUS_USAGE, "--temperature must be at least 0 and --top-p in (0, 1]");
    if (flags->top_k > INT32_MAX || flags->context_length < 1)
        return status_fail(STATUS_USAGE, "--top-k is too large or --context-length is 0");
    return STATUS_OK;
}

static enum status load_and_run(const struct generate_flags *flags) {
    struct text typed = {0};
    struct loaded_model loaded;
    bool from_stdin = !flags->prompt || strcmp(flags->prompt, "-") == 0;
    enum status status = from_stdin ? read_prompt(&typed) : STATUS_OK;
    if (status == STATUS_OK)
        status = common_load(&flags->model, flags->context_length, &loaded);
    if (status == STATUS_OK) {
        status = run(flags, from_stdin ? text_string(&typed) : flags->prompt, &loaded);
        loaded_model_release(&loaded);
    }
    text_release(&typed);
    return status;
}

enum status cmd_generate(int argc, char **argv) {
    struct generate_flags f = {.model = {.precision = "auto", .device = "cpu", .kernels = "auto"}, .max_tokens = 200, .top_p = 0.95,
                               .temperature = 0.8, .context_length = 4096};
    bool help;
    const struct argument known[] = {
        {"model", ARGUMENT_STRING, &f.model.model, "a model or run directory"},
        {"prompt", ARGUMENT_STRING, &f.prompt, "text to continue; - or none: read from standard input"},
        {"max-tokens", ARGUMENT_INTEGER, &f.max_tokens, "tokens to write (200)"},
        {"temperature", ARGUMENT_NUMBER, &f.temperature, "0: the most likely token; higher: more varied (0.8)"},
        {"top-k", ARGUMENT_INTEGER, &f.top_k, "choose among the k most likely; 0: all (0)"},
        {"top-p", ARGUMENT_NUMBER, &f.top_p, "choose among those that make up p of the probability (0.95)"},
        {"seed", ARGUMENT_INTEGER, &f.seed, "the same seed writes the same text, in the same precision (0)"},
        {"context-length", ARGUMENT_INTEGER, &f.context_length, "tokens that prompt and text may have (4096, or the model's)"},
        {"precision", ARGUMENT_STRING, &f.model.precision, "auto: bf16 where that is faster; fp32, bf16 (auto)"},
        {"device", ARGUMENT_STRING, &f.model.device, "what computes: cpu or cuda (cpu)"},
        {"kernels", ARGUMENT_STRING, &f.model.kernels, "instruction set (auto)"},
        {"threads", ARGUMENT_INTEGER, &f.model.threads, "0: one for each processor (0)"},
        {"json", ARGUMENT_SWITCH, &f.json, "one JSON object instead of the text"},
        {"quiet", ARGUMENT_SWITCH, &f.quiet, "only the text"},
    };
    enum { COUNT = sizeof known / sizeof *known };
    struct arguments arguments = {known, COUNT, NULL, NULL, NULL};
    TRY(arguments_parse(arguments, argc, argv, &help));
    if (help) {
        arguments_print_help("generate", "--model DIR [--prompt TEXT]", known, COUNT);
        return STATUS_OK;
    }
    log_set_level(f.quiet ? LOG_QUIET : LOG_NORMAL);
    TRY(check(&f));
    return load_and_run(&f);
}
