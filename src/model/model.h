/* A model's tensors in a device's memory: weights, what the products read of them (packed), gradients, AdamW's moments.
 * One entry of each array stands for one row of the parameter table.
 *
 * On a mesh of ranks a row has two forms (model/sharding.h): the one that layers compute with (weight, packed, gradient)
 * and the part that this rank owns and updates (own_weight, own_gradient, moment1, moment2). Where nothing is divided
 * both are the same memory. Else the computing form of weights (stage 3) and of gradients (stages 2 and 3) exists for
 * two blocks at a time: block b uses the memory of slot b % 2, which parallel/ fills before the block computes and empties
 * after. The rows outside the blocks have memory of their own.
 */
#pragma once

#include "model/parameter.h"
#include "model/sharding.h"
#include "nn/layer.h"

struct model_options {
    const struct kernel_ops *ops;
    const struct device *device;
    enum dtype compute, real; /* see nn/layer.h */
    int64_t position_count;   /* longest sequence that will be run */
    bool training;            /* gradients and moments are needed */
    struct sharding sharding; /* zeroed: one rank */
};

/* Bytes by purpose. State is what this rank owns, or holds whole because its stage says so; working memory is the
 * computing form of rows that are divided. */
struct model_memory {
    size_t weights, packed, gradients, moments, tables;
    size_t working;
    size_t total;
};

struct model {
    struct model_config config;
    struct parameter_table table;
    struct layer_context context;
    const struct device *device;
    struct sharding sharding;
    struct model_memory memory;
    struct tensor rope; /* real [position_count, P] */
    /* One view a row of the table; none (packed: no data) where a row has no such thing. Gradients that last through a
     * step are one flat tensor, too, which begins with those that must be zeros when it begins. A gathered weight that only
     * products read has the compute dtype. */
    struct tensor all_gradients, cleared_gradients;
    struct tensor *weight, *gradient;
    struct packed *packed; /* in the compute dtype, of the rows that products read */
    struct tensor *own_weight, *own_gradient, *moment1, *moment2; /* real */
    struct arena arena;
};

/* What model_create would take, without taking it. */
enum status model_plan(const struct model_config *config, struct model_options options,
                       struct model_memory *memory) MUST_USE;

/* The model without its memory: shapes, but no data. For plans of what a run would do. Destroy with model_destroy. */
enum status model_create_shapes(const struct model_config *config, struct model_options options,
                                struct model **out) MUST_USE;

/* All tensors zero. The configuration must be checked. Destroy with model_destroy. */
enum status model_create(const struct model_config *config, struct model_options options, struct model **out) MUST_USE;
void model_destroy(struct model *model);

/* Fresh weights: each depends on the seed, the parameter's name and its index only. */
enum status model_initialize(struct model *model, uint64_t seed) MUST_USE;

/* Pack the weights again after they were written by anything but the optimizer: of the rows that are whole here. */
void model_repack(struct model *model);

/* The same for those of a group (parameter_group): for the rows that are whole here, and for those that were gathered. */
void model_pack_whole(struct model *model, int group);
void model_pack_gathered(struct model *model, int group);

/* Elements of the largest row of own_weight, 1 at least: what one row needs as scratch. */
int64_t model_largest_own_row(const struct model *model);

/* True where what this rank owns of a row is all that it computes with. */
bool model_row_is_whole(const struct model *model, int row);

/* True where a row's gradient lives in a slot: it is empty before the block's backward, and handed on after it. */
bool model_gradient_in_slot(const struct model *model, int row);

/* True where the first backward writes a row's gradient, of a step or, in a slot, of each micro-batch: one product makes it.
 * Nothing clears those, later ones add. All other gradients are sums from the beginning. What the embedding adds where it is
 * the head too comes after the head. */
bool model_gradient_is_written(const struct model *model, int row);
/* Gradients of a block's slot that are not written to zero: before its backward. */
void model_clear_slot(struct model *model, int block);

/* The view of a role in a block in one of the arrays above; none where the model has no such parameter. */
struct tensor model_tensor(const struct model *model, const struct tensor *array, enum parameter_role role, int block);
struct packed model_packed(const struct model *model, enum parameter_role role, int block);
