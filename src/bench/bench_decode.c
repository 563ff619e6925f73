/* Writing text with a preset of random weights: a prompt is read, and single tokens after a context. Tokens are random, so that
 * each is routed to other experts, as those of a text are; choosing the next one is not timed, its logits on the host are. */
#include "bench/bench.h"

#include "base/memory.h"
#include "base/random.h"
#include "infer/generate.h"
#include "infer/token_cost.h"
#include "train/placement.h"
#include <stdio.h>
#include <stdlib.h>

enum { CONTEXTS = 2, LABEL_BYTES = 96 };
static const int64_t PROMPT_TOKENS = 512, CONTEXT_TOKENS[CONTEXTS] = {128, 1024};

struct decoding {
    struct model_config config;
    bool repeats; /* see generator_set_repeats */
    int64_t prompt, contexts[CONTEXTS], capacity; /* tokens */
    int context_count;
    struct model *model;
    struct generator *generator;
    int32_t *ids;    /* [capacity] */
    int64_t context; /* of the calls to be timed */
    int64_t call_count;
    enum status status; /* of the first call that failed */
};

static void read_ids(struct decoding *d, const int32_t *ids, int64_t count) {
    float *logits;
    enum status status = generator_read(d->generator, ids, count, &logits);
    if (d->status == STATUS_OK)
        d->status = status;
}

static void read_context(void *context) {
    struct decoding *d = context;
    generator_rewind(d->generator, 0);
    read_ids(d, d->ids, d->context);
}

/* Always the one after the context, which has the same length for every call. */
static void read_token(void *context) {
    struct decoding *d = context;
    generator_rewind(d->generator, d->context);
    read_ids(d, &d->ids[d->call_count++ % d->capacity], 1);
}

/* What the preset has positions for, or --sequence-length alone. */
static enum status choose_contexts(const struct bench *bench, struct decoding *d) {
    struct run_config config;
    TRY(bench_read_config(bench, &config));
    d->config = config.model;
    d->repeats = config.run.graph;
    int64_t longest = d->config.max_position_embeddings - 1, asked = bench->sequence_length;
    if (asked > longest)
        return status_fail(STATUS_USAGE, "--sequence-length %lld leaves no position for a token after it: %s has %lld",
                           (long long)asked, bench->preset, (long long)longest + 1);
    d->prompt = asked > 0 ? asked : PROMPT_TOKENS < longest ? PROMPT_TOKENS : longest;
    for (int i = 0; i < CONTEXTS; i++) {
        int64_t tokens = asked > 0 ? asked : CONTEXT_TOKENS[i] < longest ? CONTEXT_TOKENS[i] : longest;
        if (i == 0 || tokens > d->contexts[d->context_count - 1])
            d->contexts[d->context_count++] = tokens;
    }
    d->capacity = 1 + d->contexts[d->context_count - 1];
    d->capacity = d->capacity > d->prompt ? d->capacity : d->prompt;
    return STATUS_OK;
}

/* Memory of the processor is refused only when it is touched, by ending the process. */
static enum status check_memory(const struct bench *bench, const struct decoding *d, struct model_options options) {
    struct model_memory memory;
    int64_t there = placement_rank_bytes(bench->device, 1);
    TRY(model_plan(&d->config, options, &memory));
    if (there > 0 && memory.total > (size_t)there)
        return status_fail(STATUS_MEMORY, "no memory for %.2f GiB of tensors of %s in %s: there are %.2f GiB",
                           (double)memory.total / (1 << 30), bench->preset, bench_precision_name(options.compute),
                           (double)there / (1 << 30));
    return STATUS_OK;
}

static enum status decoding_open(struct decoding *d, const struct bench *bench, enum dtype dtype) {
    struct model_options options = {bench->ops, bench->device, dtype, DTYPE_F32, d->capacity, false, sharding_single()};
    TRY(check_memory(bench, d, options));
    TRY(model_create(&d->config, options, &d->model));
    TRY(model_initialize(d->model, 1));
    TRY(generator_create(&d->generator, d->model, d->capacity));
    generator_set_repeats(d->generator, d->repeats);
    TRY(memory_alloc(&d->ids, (size_t)d->capacity, sizeof *d->ids));
    for (int64_t i = 0; i < d->capacity; i++)
        d->ids[i] = (int32_t)(random_bits(5, 0, (uint64_t)i) % (uint64_t)d->config.vocab_size);
    return STATUS_OK;
}

static void decoding_close(struct decoding *d) {
    generator_destroy(d->generator);
    model_destroy(d->model);
    free(d->ids);
}

static void print_label(const struct bench *bench, bool is_prompt, int64_t tokens, char label[LABEL_BYTES]) {
    snprintf(label, LABEL_BYTES, is_prompt ? "%s, a prompt of %lld tokens" : "%s, a token after %lld", bench->preset,
             (long long)tokens);
}

static enum status measure_prompt(const struct bench *bench, struct decoding *d) {
    char label[LABEL_BYTES];
    enum dtype dtype = d->model->context.compute;
    struct bench_figure figure = {.name = "decode", .label = label, .precision = dtype, .tokens = (double)d->prompt,
                                  .operations = prompt_operations(&d->config, d->prompt)};
    print_label(bench, true, d->prompt, label);
    d->context = d->prompt;
    if (!bench_wants(bench, label))
        return STATUS_OK;
    figure.time = bench_call_and_roof(bench, read_context, d, dtype, &figure.roof);
    TRY(d->status);
    bench_print(bench, &figure);
    return STATUS_OK;
}

static enum status measure_token(const struct bench *bench, struct decoding *d, int64_t context) {
    char label[LABEL_BYTES];
    struct bench_figure figure = {.name = "decode", .label = label, .precision = d->model->context.compute, .tokens = 1,
                                  .bytes = token_bytes(d->model, context)};
    print_label(bench, false, context, label);
    d->context = context;
    if (!bench_wants(bench, label))
        return STATUS_OK;
    read_context(d);
    TRY(bench_call_and_read(bench, read_token, d, &figure.time, &figure.roof));
    TRY(d->status);
    bench_print(bench, &figure);
    return STATUS_OK;
}

static bool wants_any(const struct bench *bench, const struct decoding *d) {
    char label[LABEL_BYTES];
    print_label(bench, true, d->prompt, label);
    bool wants = bench_wants(bench, label);
    for (int i = 0; i < d->context_count; i++) {
        print_label(bench, false, d->contexts[i], label);
        wants |= bench_wants(bench, label);
    }
    return wants;
}

static enum status measure(const struct bench *bench, struct decoding *d, enum dtype dtype) {
    TRY(decoding_open(d, bench, dtype));
    TRY(measure_prompt(bench, d));
    for (int i = 0; i < d->context_count; i++)
        TRY(measure_token(bench, d, d->contexts[i]));
    return STATUS_OK;
}

enum status bench_decode(const struct bench *bench) {
    struct decoding asked = {.context = 0};
    TRY(choose_contexts(bench, &asked));
    if (!wants_any(bench, &asked))
        return bench_no_case(bench);
    enum status status = STATUS_OK;
    for (int i = 0; i < bench->precision_count && status == STATUS_OK; i++) {
        struct decoding d = asked;
        status = measure(bench, &d, bench->precisions[i]);
        decoding_close(&d);
    }
    return status;
}
