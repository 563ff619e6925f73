/* What a model is: the settings of the Qwen3-MoE family and of its dense sibling Qwen3, under Hugging Face's names. */
#pragma once

#include "base/setting.h"
#include "base/status.h"
#include <stdbool.h>
#include <stdint.h>

struct model_config {
    int64_t vocab_size;              /* V */
    int64_t hidden_size;             /* D */
    int64_t num_hidden_layers;       /* L */
    int64_t num_attention_heads;     /* H */
    int64_t num_key_value_heads;     /* G */
    int64_t head_dim;                /* P; 0: hidden_size / num_attention_heads */
    int64_t intermediate_size;       /* width of the dense MLP, num_experts = 0 */
    int64_t num_experts;             /* E; 0: dense */
    int64_t num_experts_per_tok;     /* K */
    int64_t moe_intermediate_size;   /* F, width of one expert */
    int64_t max_position_embeddings; /* longest sequence, tokens */
    bool norm_topk_prob;             /* the K chosen probabilities are divided by their sum */
    bool tie_word_embeddings;        /* the output head is the embedding */
    double rms_norm_eps;
    double rope_theta;
    double initializer_range;
    double router_aux_loss_coef; /* load balance; the loss is K at perfect balance, as Hugging Face counts it */
    double router_z_loss_coef;   /* mean of logsumexp^2 of the router's logits; ours, ignored by others */
};

/* Defaults for every member. */
void model_config_init(struct model_config *config);

/* Fill in head_dim and check that such a model can exist: STATUS_USAGE with the member that is wrong. `origin` names
 * the file or call in the message. */
enum status model_config_check(struct model_config *config, const char *origin) MUST_USE;

/* Hugging Face's config.json. Reading refuses other families and features by name, fills in the family's defaults and
 * checks. end_of_text: id of <|endoftext|>, -1 if none. dtype: "float32" or "bfloat16", of the saved weights. */
enum status model_config_read(struct model_config *config, const char *path) MUST_USE;
enum status model_config_write(const struct model_config *config, const char *path, int64_t end_of_text,
                               const char *dtype) MUST_USE;

/* Settings "model.*"; offsets count from a struct model_config. */
extern const struct setting model_settings[];
extern const int model_setting_count;

/* Operations (a multiply-add is two) that each phase's forward spends on a token at sequence length T: 2 for each
 * parameter that the token is multiplied with, and causal attention counted as half of the square. The backward of a
 * phase takes twice as many. The phases that are not here (embedding, exchange, norms) only move and add. */
struct model_operations {
    double attention, route; /* of one block */
    double experts;          /* of one block: K experts, or the dense layer */
    double recompute;        /* of one block: its forward again, without the experts' last product */
    double head;
};
struct model_operations model_forward_operations(const struct model_config *config, int64_t sequence_length);

/* Forward and backward of all phases together, per token: 6 for each parameter that a token is multiplied with
 * (attention, router, K experts, output head; not the embedding's lookup), and attention. Recomputation is not
 * counted. */
double model_train_operations_per_token(const struct model_config *config, int64_t sequence_length);
