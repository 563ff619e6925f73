#include "nn/attention.h"

#include <math.h>

static int64_t query_width(const struct attention_dims *dims) {
    return (int64_t)dims->head_count * dims->head_dim;
}

static int64_t kv_width(const struct attention_dims *dims) {
    return (int64_t)dims->kv_head_count * dims->head_dim;
}

void attention_saved_take(struct attention_saved *saved, const struct layer_context *context,
                          const struct attention_dims *dims, struct arena *arena) {
    int64_t rows = dims->batch * dims->sequence_length;
    enum dtype compute = context->compute, real = context->real;
    saved->normed = layer_take(arena, compute, rows, dims->width);
    saved->norm_rstd = layer_take(arena, real, rows, 1);
    saved->query_raw = layer_take(arena, compute, rows, query_width(dims));
    saved->key_raw = layer_take(arena, compute, rows, kv_width(dims));
    saved->query = layer_take(arena, compute, rows, query_width(dims));
    saved->key = layer_take(arena, compute, rows, kv_width(dims));
    saved->value = layer_take(arena, compute, rows, kv_width(dims));
    saved->query_rstd = layer_take(arena, real, rows * dims->head_count, 1);
    saved->key_rstd = layer_take(arena, real, rows * dims->kv_head_count, 1);
    saved->mixed = layer_take(arena, compute, rows, query_width(dims));
    saved->logsumexp = layer_take(arena, real, rows, dims->head_count);
}

void attention_scratch_take(struct attention_scratch *scratch, const struct layer_context *context,
                            const struct attention_dims *dims, struct arena *arena) {
    int64_t rows = dims->batch * dims->sequence_length;
    scratch->dy = layer_take(arena, context->compute, rows, dims->width);
    scratch->dmixed = layer_take(arena, context->compute, rows, query_width(dims));
    scratch->dquery = layer_take(arena, context->compute, rows, query_width(dims));
    scratch->dkey = layer_take(arena, context->compute, rows, kv_width(dims));
    scratch->dvalue = layer_take(arena, context->compute, rows, kv_width(dims));
    scratch->dnormed = layer_take(arena, layer_gradient_dtype(context), rows, dims->width);
}

static struct attention_shape make_shape(const struct attention_dims *dims, int64_t key_count) {
    return (struct attention_shape){
        .batch = dims->batch,
        .query_count = dims->sequence_length,
        .key_count = key_count,
        .head_count = dims->head_count,
        .kv_head_count = dims->kv_head_count,
        .head_dim = dims->head_dim,
        .scale = 1 / sqrt((double)dims->head_dim),
    };
}

/* Where keys and values go, and which there are then. */
struct keys {
    struct tensor key, value, all_keys, all_values, rope;
    int64_t first, count; /* position of the first row; keys */
};

static struct keys keys_of(const struct attention_dims *dims, const struct attention_saved *saved, struct attention_cache *cache) {
    int64_t rows = dims->batch * dims->sequence_length;
    struct keys own = {saved->key, saved->value, saved->key, saved->value, dims->rope, 0, dims->sequence_length};
    if (!cache)
        return own;
    CHECK_OP(dims->batch, ==, 1);
    int64_t length = cache->length, count = cache->bound > 0 ? cache->bound : length + rows;
    CHECK_OP(length + rows, <=, count);
    struct tensor all_keys = tensor_rows(cache->key, 0, count), all_values = tensor_rows(cache->value, 0, count);
    if (cache->bound > 0)
        return (struct keys){saved->key, saved->value, all_keys, all_values, cache->rope, 0, count};
    cache->length = count;
    return (struct keys){tensor_rows(cache->key, length, rows), tensor_rows(cache->value, length, rows), all_keys, all_values,
                         dims->rope, length, count};
}

void attention_forward(const struct layer_context *context, const struct attention_dims *dims,
                       const struct attention_weights *w, struct tensor x, struct attention_saved *saved,
                       struct attention_cache *cache, struct tensor x_out) {
    const struct kernel_ops *ops = context->ops;
    struct keys keys = keys_of(dims, saved, cache);
    ops->rmsnorm_forward(x, w->norm, dims->epsilon, saved->normed, saved->norm_rstd);
    layer_product(context, saved->normed, w->query, saved->query_raw, false);
    layer_product(context, saved->normed, w->key, saved->key_raw, false);
    layer_product(context, saved->normed, w->value, keys.value, false);
    ops->qknorm_rope_forward(saved->query_raw, w->query_norm, dims->epsilon, keys.rope, dims->sequence_length, keys.first,
                             saved->query, saved->query_rstd);
    ops->qknorm_rope_forward(saved->key_raw, w->key_norm, dims->epsilon, keys.rope, dims->sequence_length, keys.first, keys.key,
                             saved->key_rstd);
    struct attention_shape shape = make_shape(dims, keys.count);
    if (cache && cache->bound > 0) {
        ops->attention_keep(keys.key, keys.value, cache->kept, keys.all_keys, keys.all_values);
        ops->attention_kept(shape, saved->query, keys.all_keys, keys.all_values, cache->kept, saved->mixed, saved->logsumexp);
    } else {
        ops->attention_forward(shape, saved->query, keys.all_keys, keys.all_values, saved->mixed, saved->logsumexp);
    }
    layer_product_onto(context, saved->mixed, w->output, x, x_out);
}

void attention_backward(const struct layer_context *context, const struct attention_dims *dims,
                        const struct attention_weights *w, struct tensor x, const struct attention_saved *saved,
                        const struct attention_scratch *scratch, const struct attention_gradients *gradients,
                        struct tensor dx) {
    const struct kernel_ops *ops = context->ops;
    const bool add = gradients->accumulate;
    struct tensor dy = layer_gradient_as_compute(context, dx, scratch->dy);
    layer_product_backward_weight(context, dy, saved->mixed, gradients->output, add);
    layer_product_backward_input(context, dy, w->output, scratch->dmixed, false);
    ops->attention_backward(make_shape(dims, dims->sequence_length), scratch->dmixed, saved->query, saved->key,
                            saved->value, saved->mixed, saved->logsumexp, scratch->dquery, scratch->dkey,
                            scratch->dvalue);
    ops->qknorm_rope_backward(scratch->dquery, saved->query_raw, w->query_norm, saved->query_rstd, dims->rope,
                              dims->sequence_length, 0, scratch->dquery, gradients->query_norm);
    ops->qknorm_rope_backward(scratch->dkey, saved->key_raw, w->key_norm, saved->key_rstd, dims->rope,
                              dims->sequence_length, 0, scratch->dkey, gradients->key_norm);
    layer_product_backward_weight(context, scratch->dquery, saved->normed, gradients->query, add);
    layer_product_backward_weight(context, scratch->dkey, saved->normed, gradients->key, add);
    layer_product_backward_weight(context, scratch->dvalue, saved->normed, gradients->value, add);
    const struct product_term terms[] = {{scratch->dquery, w->query}, {scratch->dkey, w->key}, {scratch->dvalue, w->value}};
    layer_product_backward_inputs(context, terms, 3, tensor_none(), scratch->dnormed);
    layer_rmsnorm_backward(context, scratch->dnormed, x, w->norm, saved->norm_rstd, dx, true, gradients->norm, scratch->dy);
}
