/* A model's tensors in a device's memory: weights, what the products read of them (packed), gradients, AdamW's moments.
 * One entry of each array stands for one row of the parameter table. */
#pragma once

#include "model/parameter.h"
#include "nn/layer.h"

struct model_options {
    const struct kernel_ops *ops;
    const struct device *device;
    enum dtype compute, real; /* see nn/layer.h */
    int64_t position_count;   /* longest sequence that will be run */
    bool training;            /* gradients and moments are needed */
};

/* Bytes by purpose. */
struct model_memory {
    size_t weights, packed, gradients, moments, tables;
    size_t total;
};

struct model {
    struct model_config config;
    struct parameter_table table;
    struct layer_context context;
    const struct device *device;
    struct model_memory memory;
    struct tensor rope; /* real [position_count, P] */
    /* One view a row of the table; none (packed: no data) where a row has no such thing. Gradients are flat over all
     * rows, too. */
    struct tensor all_gradients;
    struct tensor *weight, *gradient, *moment1, *moment2;
    struct packed *packed; /* in the compute dtype, of the rows that products read */
    struct arena arena;
};

/* What model_create would take, without taking it. */
enum status model_plan(const struct model_config *config, struct model_options options,
                       struct model_memory *memory) MUST_USE;

/* All tensors zero. The configuration must be checked. Destroy with model_destroy. */
enum status model_create(const struct model_config *config, struct model_options options, struct model **out) MUST_USE;
void model_destroy(struct model *model);

/* Fresh weights: each depends on the seed, the parameter's name and its index only. */
enum status model_initialize(struct model *model, uint64_t seed) MUST_USE;

/* Pack the weights again after they were written by anything but the optimizer. */
void model_repack(struct model *model);

/* The view of a role in a block in one of the arrays above; none where the model has no such parameter. */
struct tensor model_tensor(const struct model *model, const struct tensor *array, enum parameter_role role, int block);
struct packed model_packed(const struct model *model, enum parameter_role role, int block);
