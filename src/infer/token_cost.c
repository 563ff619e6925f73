#include "infer/token_cost.h"

double prompt_operations(const struct model_config *c, int64_t token_count) {
    struct model_operations token = model_forward_operations(c, token_count);
    double block = token.attention + token.route + token.experts;
    return (double)token_count * (double)c->num_hidden_layers * block + token.head;
}

/* A tied embedding is looked up and, as the head, multiplied with. */
static double row_bytes(const struct model *model, int row) {
    const struct parameter *p = &model->table.rows[row];
    struct packed packed = model->packed[row];
    double real = (double)dtype_size(model->context.real), bytes = 0;
    if (p->is_expert)
        packed.groups = model->config.num_experts_per_tok;
    if (p->is_packed)
        bytes += (double)model->context.ops->packed_bytes(packed);
    if (p->role == PARAMETER_EMBEDDING)
        bytes += real * (double)model->config.hidden_size;
    else if (!p->is_packed)
        bytes += real * (double)parameter_elements(p);
    return bytes;
}

double token_bytes(const struct model *model, int64_t context) {
    const struct model_config *c = &model->config;
    double values = 2 * (double)(context * c->num_hidden_layers * c->num_key_value_heads * c->head_dim);
    double bytes = values * (double)dtype_size(model->context.compute);
    for (int i = 0; i < model->table.count; i++)
        bytes += row_bytes(model, i);
    return bytes;
}
