#include "train/run_config.h"

#include "base/text.h"
#include <string.h>

enum { PRESET_PAIRS_MAX = 48 };

struct preset {
    const char *name;
    const char *pairs[PRESET_PAIRS_MAX]; /* key, value, key, value, ..., NULL */
};

/* demo: learns to write in about three minutes on two cores; demo-100x: the same text with a hundred times the parameters, for a
 * GPU. bench: the shape that speeds are stated for; bench-dense does the same number of operations a token without routing;
 * moe-1b: the shape for a GPU. tiny: for tests. */
static const struct preset named_presets[] = {
    {"demo",
     {"model.hidden_size", "256", "model.num_hidden_layers", "4", "model.num_attention_heads", "4",
      "model.num_key_value_heads", "2", "model.num_experts", "8", "model.num_experts_per_tok", "2",
      "model.moe_intermediate_size", "256", "model.max_position_embeddings", "1024", "data.vocab_size", "4096",
      "train.sequence_length", "256", "train.batch_sequences", "8", "train.steps", "0", "train.target_minutes", "2.5",
      "train.eval_every_steps", "100", "train.eval_tokens", "16384", "train.sample_every_steps", "200", "optim.lr",
      "4e-3", "optim.warmup_steps", "40", NULL}},
    {"demo-100x",
     {"model.hidden_size", "1536", "model.num_hidden_layers", "14", "model.num_attention_heads", "12",
      "model.num_key_value_heads", "4", "model.head_dim", "128", "model.num_experts", "8", "model.num_experts_per_tok", "2",
      "model.moe_intermediate_size", "1536", "model.max_position_embeddings", "1024", "data.vocab_size", "4096",
      "train.sequence_length", "512", "train.batch_sequences", "16", "train.steps", "1070", "train.eval_every_steps", "50",
      "train.eval_tokens", "0", "train.sample_every_steps", "535", "checkpoint.every_steps", "0", "optim.lr", "6e-4",
      "optim.warmup_steps", "60", "optim.weight_decay", "1", NULL}},
    {"bench",
     {"model.hidden_size", "512", "model.num_hidden_layers", "8", "model.num_attention_heads", "8",
      "model.num_key_value_heads", "8", "model.num_experts", "8", "model.num_experts_per_tok", "2",
      "model.moe_intermediate_size", "1024", "model.vocab_size", "8192", "data.vocab_size", "8192",
      "train.sequence_length", "512", "train.batch_sequences", "8", NULL}},
    {"bench-dense",
     {"model.hidden_size", "512", "model.num_hidden_layers", "8", "model.num_attention_heads", "8",
      "model.num_key_value_heads", "8", "model.num_experts", "0", "model.intermediate_size", "2048",
      "model.vocab_size", "8192", "data.vocab_size", "8192", "train.sequence_length", "512",
      "train.batch_sequences", "8", NULL}},
    {"moe-1b",
     {"model.hidden_size", "2048", "model.num_hidden_layers", "12", "model.num_attention_heads", "16",
      "model.num_key_value_heads", "4", "model.head_dim", "128", "model.num_experts", "8", "model.num_experts_per_tok", "2",
      "model.moe_intermediate_size", "1536", "model.vocab_size", "32768", "data.vocab_size", "32768",
      "model.tie_word_embeddings", "false", "train.sequence_length", "1024", "train.batch_sequences", "32", NULL}},
    {"tiny",
     {"model.hidden_size", "64", "model.num_hidden_layers", "2", "model.num_attention_heads", "4",
      "model.num_key_value_heads", "2", "model.num_experts", "4", "model.num_experts_per_tok", "2",
      "model.moe_intermediate_size", "64", "model.max_position_embeddings", "256", "data.vocab_size", "512",
      "train.sequence_length", "64", "train.batch_sequences", "4", "train.steps", "20", "optim.warmup_steps", "5",
      "train.eval_every_steps", "10", "checkpoint.every_steps", "10", NULL}},
};

/* The ladder of the DiLoCo papers (arXiv 2501.18512, 2503.09799): depth, heads and width are theirs; the feed-forward
 * width is about two thirds of theirs (a multiple of 512), since SwiGLU has three matrices where theirs has two.
 * "-moe": eight experts of half that width, two for each token: the same operations, four times the feed-forward
 * parameters. */
struct rung {
    const char *name;
    const char *moe_name;
    const char *hidden, *layers, *heads, *inner, *expert_inner;
};
static const struct rung ladder[] = {
    {"35m", "35m-moe", "512", "6", "8", "1536", "768"},      {"100m", "100m-moe", "768", "9", "12", "2048", "1024"},
    {"200m", "200m-moe", "1024", "12", "16", "2560", "1280"}, {"300m", "300m-moe", "1280", "15", "20", "3584", "1792"},
    {"500m", "500m-moe", "1536", "18", "24", "4096", "2048"}, {"1b", "1b-moe", "2048", "24", "32", "5632", "2816"},
    {"4b", "4b-moe", "3072", "36", "48", "8192", "4096"},
};

enum { NAMED_COUNT = sizeof named_presets / sizeof *named_presets, RUNG_COUNT = sizeof ladder / sizeof *ladder };

const char *const *preset_names(void) {
    static const char *names[NAMED_COUNT + 2 * RUNG_COUNT + 1];
    int count = 0;
    for (int i = 0; i < NAMED_COUNT; i++)
        names[count++] = named_presets[i].name;
    for (int i = 0; i < RUNG_COUNT; i++) {
        names[count++] = ladder[i].name;
        names[count++] = ladder[i].moe_name;
    }
    names[count] = NULL;
    return names;
}

static enum status apply_pairs(struct run_config *config, const char *name, const char *const *pairs) {
    for (int i = 0; pairs[i]; i += 2)
        TRY(setting_set(run_config_group(), config, pairs[i], pairs[i + 1], name));
    return setting_set(run_config_group(), config, "model.preset", name, name);
}

static enum status apply_rung(struct run_config *config, const char *name, const struct rung *rung) {
    bool moe = strcmp(name, rung->moe_name) == 0;
    const char *const pairs[] = {"model.hidden_size", rung->hidden,
                                 "model.num_hidden_layers", rung->layers,
                                 "model.num_attention_heads", rung->heads,
                                 "model.num_key_value_heads", rung->heads,
                                 "model.intermediate_size", rung->inner,
                                 "model.moe_intermediate_size", rung->expert_inner,
                                 "model.num_experts", moe ? "8" : "0",
                                 "model.num_experts_per_tok", "2",
                                 "model.vocab_size", "32000",
                                 "data.vocab_size", "32000",
                                 "model.tie_word_embeddings", "true",
                                 "train.sequence_length", "1024",
                                 "train.batch_sequences", "64",
                                 "train.micro_batch_sequences", "4",
                                 NULL};
    return apply_pairs(config, name, pairs);
}

enum status preset_apply(struct run_config *config, const char *name) {
    for (int i = 0; i < NAMED_COUNT; i++)
        if (strcmp(name, named_presets[i].name) == 0)
            return apply_pairs(config, name, named_presets[i].pairs);
    for (int i = 0; i < RUNG_COUNT; i++)
        if (strcmp(name, ladder[i].name) == 0 || strcmp(name, ladder[i].moe_name) == 0)
            return apply_rung(config, name, &ladder[i]);
    const char *const *names = preset_names();
    int count = 0;
    while (names[count])
        count++;
    int nearest = text_nearest(name, names, count);
    if (nearest < 0)
        return status_fail(STATUS_USAGE, "unknown preset \"%s\"; cadre inspect --presets lists them", name);
    return status_fail(STATUS_USAGE, "unknown preset \"%s\"; the nearest known one is %s", name, names[nearest]);
}
