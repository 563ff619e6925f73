#include "model/config.h"

#include "base/json.h"
#include <stddef.h>
#include <string.h>

enum { CONFIG_JSON_BYTES_MAX = 1 << 20 };

static const double DIM_MAX = 1 << 20;
static const double PARAMETERS_MAX = 1e15; /* so many that their bytes can still be counted */

const struct setting model_settings[] = {
#define MODEL(member) "model", #member
    {MODEL(vocab_size), SETTING_INTEGER, offsetof(struct model_config, vocab_size), 0, 1 << 24, NULL,
     "tokens in the vocabulary; 0: as many as the tokenizer has"},
    {MODEL(hidden_size), SETTING_INTEGER, offsetof(struct model_config, hidden_size), 1, DIM_MAX, NULL,
     "width of the residual stream"},
    {MODEL(num_hidden_layers), SETTING_INTEGER, offsetof(struct model_config, num_hidden_layers), 1, 4096, NULL,
     "blocks"},
    {MODEL(num_attention_heads), SETTING_INTEGER, offsetof(struct model_config, num_attention_heads), 1, 65536, NULL,
     "query heads"},
    {MODEL(num_key_value_heads), SETTING_INTEGER, offsetof(struct model_config, num_key_value_heads), 1, 65536, NULL,
     "key-value heads"},
    {MODEL(head_dim), SETTING_INTEGER, offsetof(struct model_config, head_dim), 0, 4096, NULL,
     "width of a head; 0: hidden_size / num_attention_heads"},
    {MODEL(intermediate_size), SETTING_INTEGER, offsetof(struct model_config, intermediate_size), 1, DIM_MAX, NULL,
     "width of the dense MLP (num_experts = 0)"},
    {MODEL(num_experts), SETTING_INTEGER, offsetof(struct model_config, num_experts), 0, 65536, NULL,
     "experts in each block; 0: a dense model"},
    {MODEL(num_experts_per_tok), SETTING_INTEGER, offsetof(struct model_config, num_experts_per_tok), 1, 65536, NULL,
     "experts that each token is sent through"},
    {MODEL(moe_intermediate_size), SETTING_INTEGER, offsetof(struct model_config, moe_intermediate_size), 1, DIM_MAX,
     NULL, "width of one expert"},
    {MODEL(max_position_embeddings), SETTING_INTEGER, offsetof(struct model_config, max_position_embeddings), 1,
     1 << 24, NULL, "longest sequence, tokens"},
    {MODEL(norm_topk_prob), SETTING_BOOLEAN, offsetof(struct model_config, norm_topk_prob), 0, 1, NULL,
     "divide the chosen experts' probabilities by their sum"},
    {MODEL(tie_word_embeddings), SETTING_BOOLEAN, offsetof(struct model_config, tie_word_embeddings), 0, 1, NULL,
     "the output head is the embedding"},
    {MODEL(rms_norm_eps), SETTING_NUMBER, offsetof(struct model_config, rms_norm_eps), 0, 1, NULL,
     "added to the mean square before the root"},
    {MODEL(rope_theta), SETTING_NUMBER, offsetof(struct model_config, rope_theta), 1, 1e12, NULL,
     "base of the rotary positions"},
    {MODEL(initializer_range), SETTING_NUMBER, offsetof(struct model_config, initializer_range), 0, 10, NULL,
     "standard deviation of fresh weights"},
    {MODEL(router_aux_loss_coef), SETTING_NUMBER, offsetof(struct model_config, router_aux_loss_coef), 0, 100, NULL,
     "coefficient of the load-balancing loss"},
    {MODEL(router_z_loss_coef), SETTING_NUMBER, offsetof(struct model_config, router_z_loss_coef), 0, 100, NULL,
     "coefficient of the router's z-loss"},
#undef MODEL
};
const int model_setting_count = sizeof model_settings / sizeof *model_settings;

void model_config_init(struct model_config *config) {
    *config = (struct model_config){
        .hidden_size = 512,
        .num_hidden_layers = 8,
        .num_attention_heads = 8,
        .num_key_value_heads = 8,
        .intermediate_size = 2048,
        .num_experts = 8,
        .num_experts_per_tok = 2,
        .moe_intermediate_size = 1024,
        .max_position_embeddings = 4096,
        .norm_topk_prob = true,
        .rms_norm_eps = 1e-6,
        .rope_theta = 10000,
        .initializer_range = 0.02,
        .router_aux_loss_coef = 0.01,
        .router_z_loss_coef = 0.001,
    };
}

/* But for the norms. In double, for sizes that each are possible together need not be. */
static double parameters_of(const struct model_config *c) {
    double d = (double)c->hidden_size, heads = (double)(c->num_attention_heads * c->head_dim);
    double kv_heads = (double)(c->num_key_value_heads * c->head_dim), experts = (double)c->num_experts;
    double mlp = experts > 0 ? experts * (3 * (double)c->moe_intermediate_size + 1) : 3 * (double)c->intermediate_size;
    return d * ((double)c->num_hidden_layers * (2 * heads + 2 * kv_heads + mlp) + 2 * (double)c->vocab_size);
}

enum status model_config_check(struct model_config *c, const char *origin) {
    if (c->num_attention_heads % c->num_key_value_heads != 0)
        return status_fail(STATUS_USAGE, "%s: num_attention_heads %lld is not a multiple of num_key_value_heads %lld",
                           origin, (long long)c->num_attention_heads, (long long)c->num_key_value_heads);
    if (c->head_dim == 0 && c->hidden_size % c->num_attention_heads != 0)
        return status_fail(STATUS_USAGE,
                           "%s: hidden_size %lld is not a multiple of num_attention_heads %lld; set head_dim", origin,
                           (long long)c->hidden_size, (long long)c->num_attention_heads);
    if (c->head_dim == 0)
        c->head_dim = c->hidden_size / c->num_attention_heads;
    if (c->head_dim % 2 != 0)
        return status_fail(STATUS_USAGE, "%s: head_dim %lld is odd; rotary positions turn pairs", origin,
                           (long long)c->head_dim);
    if (c->num_experts > 0 && c->num_experts_per_tok > c->num_experts)
        return status_fail(STATUS_USAGE, "%s: num_experts_per_tok %lld is more than num_experts %lld", origin,
                           (long long)c->num_experts_per_tok, (long long)c->num_experts);
    if (parameters_of(c) > PARAMETERS_MAX)
        return status_fail(STATUS_USAGE, "%s: a model of %.3g parameters; at most %.0e can be counted", origin, parameters_of(c),
                           PARAMETERS_MAX);
    return STATUS_OK;
}

/* A feature that another file may ask for and that would change the numbers: refused, never ignored. */
static enum status refuse_features(struct json_source source) {
    const char *hidden_act = "silu";
    bool attention_bias = false, sliding = false;
    int64_t sparse_step = 1;
    TRY(json_get_string(source, "hidden_act", false, &hidden_act));
    TRY(json_get_boolean(source, "attention_bias", false, &attention_bias));
    TRY(json_get_boolean(source, "use_sliding_window", false, &sliding));
    TRY(json_get_integer(source, "decoder_sparse_step", false, 0, 1 << 20, &sparse_step));
    if (strcmp(hidden_act, "silu") != 0)
        return status_fail(STATUS_FORMAT, "%s: hidden_act \"%s\" is not supported, only silu", source.label,
                           hidden_act);
    if (attention_bias || sliding)
        return status_fail(STATUS_FORMAT, "%s: %s is not supported", source.label,
                           attention_bias ? "attention_bias" : "use_sliding_window");
    if (sparse_step != 1 || json_array_size(json_object_get(source.object, "mlp_only_layers")) > 0)
        return status_fail(STATUS_FORMAT, "%s: blocks with and without experts in one model are not supported",
                           source.label);
    const json_t *scaling = json_object_get(source.object, "rope_scaling");
    if (scaling && !json_is_null(scaling))
        return status_fail(STATUS_FORMAT, "%s: rope_scaling is not supported", source.label);
    return STATUS_OK;
}

static enum status read_dims(struct json_source source, struct model_config *c) {
    int64_t heads = 0;
    TRY(json_get_integer(source, "vocab_size", true, 1, 1 << 24, &c->vocab_size));
    TRY(json_get_integer(source, "hidden_size", true, 1, (int64_t)DIM_MAX, &c->hidden_size));
    TRY(json_get_integer(source, "num_hidden_layers", true, 1, 4096, &c->num_hidden_layers));
    TRY(json_get_integer(source, "num_attention_heads", true, 1, 65536, &heads));
    c->num_attention_heads = heads;
    c->num_key_value_heads = heads;
    c->head_dim = 0;
    TRY(json_get_integer(source, "num_key_value_heads", false, 1, 65536, &c->num_key_value_heads));
    TRY(json_get_integer(source, "head_dim", false, 1, 4096, &c->head_dim));
    TRY(json_get_integer(source, "max_position_embeddings", false, 1, 1 << 24, &c->max_position_embeddings));
    TRY(json_get_number(source, "rms_norm_eps", false, 0, 1, &c->rms_norm_eps));
    TRY(json_get_number(source, "initializer_range", false, 0, 10, &c->initializer_range));
    TRY(json_get_boolean(source, "tie_word_embeddings", false, &c->tie_word_embeddings));
    return STATUS_OK;
}

/* transformers 4 writes rope_theta at the top, transformers 5 inside rope_parameters. */
static enum status read_rope(struct json_source source, struct model_config *c) {
    c->rope_theta = 10000;
    TRY(json_get_number(source, "rope_theta", false, 1, 1e12, &c->rope_theta));
    struct json_source inner = {source.label, json_object_get(source.object, "rope_parameters")};
    if (!inner.object || json_is_null(inner.object))
        return STATUS_OK;
    const char *type = "default";
    TRY(json_get_string(inner, "rope_type", false, &type));
    if (strcmp(type, "default") != 0)
        return status_fail(STATUS_FORMAT, "%s: rope_type \"%s\" is not supported", source.label, type);
    return json_get_number(inner, "rope_theta", false, 1, 1e12, &c->rope_theta);
}

static enum status read_experts(struct json_source source, struct model_config *c) {
    c->norm_topk_prob = false; /* the class default of Qwen3-MoE; its published files say true */
    c->router_aux_loss_coef = 0.001;
    TRY(json_get_integer(source, "num_local_experts", false, 1, 65536, &c->num_experts));
    TRY(json_get_integer(source, "num_experts", c->num_experts == 0, 1, 65536, &c->num_experts));
    TRY(json_get_integer(source, "num_experts_per_tok", true, 1, 65536, &c->num_experts_per_tok));
    TRY(json_get_integer(source, "moe_intermediate_size", true, 1, (int64_t)DIM_MAX, &c->moe_intermediate_size));
    TRY(json_get_integer(source, "intermediate_size", false, 1, (int64_t)DIM_MAX, &c->intermediate_size));
    TRY(json_get_boolean(source, "norm_topk_prob", false, &c->norm_topk_prob));
    TRY(json_get_number(source, "router_aux_loss_coef", false, 0, 100, &c->router_aux_loss_coef));
    return json_get_number(source, "router_z_loss_coef", false, 0, 100, &c->router_z_loss_coef);
}

static enum status read_config(struct json_source source, struct model_config *c) {
    const char *family = "";
    if (!json_is_object(source.object))
        return status_fail(STATUS_FORMAT, "%s: is not a JSON object", source.label);
    TRY(json_get_string(source, "model_type", true, &family));
    bool experts = strcmp(family, "qwen3_moe") == 0;
    if (!experts && strcmp(family, "qwen3") != 0)
        return status_fail(STATUS_FORMAT, "%s: model_type \"%s\" is not supported, only qwen3_moe and qwen3",
                           source.label, family);
    model_config_init(c);
    TRY(refuse_features(source));
    TRY(read_dims(source, c));
    TRY(read_rope(source, c));
    c->num_experts = 0;
    if (experts)
        return read_experts(source, c);
    return json_get_integer(source, "intermediate_size", true, 1, (int64_t)DIM_MAX, &c->intermediate_size);
}

enum status model_config_read(struct model_config *config, const char *path) {
    json_t *object;
    TRY(json_read_file(path, CONFIG_JSON_BYTES_MAX, &object));
    enum status status = read_config((struct json_source){path, object}, config);
    json_decref(object);
    TRY(status);
    return model_config_check(config, path) == STATUS_OK ? STATUS_OK : status_fail(STATUS_FORMAT, "%s", status_text());
}

static void write_experts(const struct model_config *c, json_t *object) {
    json_object_set_new(object, "num_experts", json_integer(c->num_experts));
    json_object_set_new(object, "num_experts_per_tok", json_integer(c->num_experts_per_tok));
    json_object_set_new(object, "moe_intermediate_size", json_integer(c->moe_intermediate_size));
    json_object_set_new(object, "norm_topk_prob", json_boolean(c->norm_topk_prob));
    json_object_set_new(object, "router_aux_loss_coef", json_real(c->router_aux_loss_coef));
    json_object_set_new(object, "router_z_loss_coef", json_real(c->router_z_loss_coef));
    json_object_set_new(object, "decoder_sparse_step", json_integer(1));
    json_object_set_new(object, "mlp_only_layers", json_array());
    json_object_set_new(object, "output_router_logits", json_false());
}

enum status model_config_write(const struct model_config *c, const char *path, int64_t end_of_text, const char *dtype) {
    bool experts = c->num_experts > 0;
    json_t *object = json_object();
    json_object_set_new(object, "architectures",
                        json_pack("[s]", experts ? "Qwen3MoeForCausalLM" : "Qwen3ForCausalLM"));
    json_object_set_new(object, "model_type", json_string(experts ? "qwen3_moe" : "qwen3"));
    json_object_set_new(object, "vocab_size", json_integer(c->vocab_size));
    json_object_set_new(object, "hidden_size", json_integer(c->hidden_size));
    json_object_set_new(object, "num_hidden_layers", json_integer(c->num_hidden_layers));
    json_object_set_new(object, "num_attention_heads", json_integer(c->num_attention_heads));
    json_object_set_new(object, "num_key_value_heads", json_integer(c->num_key_value_heads));
    json_object_set_new(object, "head_dim", json_integer(c->head_dim));
    json_object_set_new(object, "intermediate_size", json_integer(c->intermediate_size));
    if (experts)
        write_experts(c, object);
    json_object_set_new(object, "hidden_act", json_string("silu"));
    json_object_set_new(object, "max_position_embeddings", json_integer(c->max_position_embeddings));
    json_object_set_new(object, "rms_norm_eps", json_real(c->rms_norm_eps));
    json_object_set_new(object, "rope_theta", json_real(c->rope_theta));
    json_object_set_new(object, "initializer_range", json_real(c->initializer_range));
    json_object_set_new(object, "tie_word_embeddings", json_boolean(c->tie_word_embeddings));
    json_object_set_new(object, "attention_bias", json_false());
    json_object_set_new(object, "attention_dropout", json_real(0));
    json_object_set_new(object, "use_sliding_window", json_false());
    json_object_set_new(object, "use_cache", json_true());
    json_object_set_new(object, "torch_dtype", json_string(dtype));
    if (end_of_text >= 0) {
        json_object_set_new(object, "bos_token_id", json_integer(end_of_text));
        json_object_set_new(object, "eos_token_id", json_integer(end_of_text));
    }
    enum status status = json_write_draft(path, object);
    json_decref(object);
    return status;
}

struct model_operations model_forward_operations(const struct model_config *c, int64_t sequence_length) {
    double d = (double)c->hidden_size, heads = (double)(c->num_attention_heads * c->head_dim);
    double kv = (double)(c->num_key_value_heads * c->head_dim);
    double inner = (double)c->intermediate_size;
    if (c->num_experts > 0)
        inner = (double)(c->num_experts_per_tok * c->moe_intermediate_size);
    struct model_operations forward = {
        .attention = 2 * (2 * d * heads + 2 * d * kv) + 2 * heads * (double)sequence_length,
        .route = 2 * d * (double)c->num_experts,
        .experts = 2 * 3 * d * inner,
        .head = 2 * d * (double)c->vocab_size,
    };
    forward.recompute = forward.attention + forward.route + 2 * 2 * d * inner;
    return forward;
}

double model_train_operations_per_token(const struct model_config *c, int64_t sequence_length) {
    struct model_operations forward = model_forward_operations(c, sequence_length);
    double block = forward.attention + forward.route + forward.experts;
    return 3 * ((double)c->num_hidden_layers * block + forward.head);
}
