/* What a pass of tokens through a model needs besides the model: activations kept for backward, scratch, sums.
 *
 * Everything has a known size, so it is laid out in one arena; a smaller batch or sequence (the last window of an
 * evaluation, one token of a generation) is a new layout in the same memory.
 */
#pragma once

#include "model/model.h"
#include "nn/attention.h"
#include "nn/experts.h"
#include "nn/head.h"
#include "nn/router.h"

struct workspace_options {
    int64_t batch, sequence_length; /* the largest; S = batch * sequence_length */
    bool training;                  /* keep what backward needs */
    bool recompute;                 /* of a block keep only its input; backward runs its forward again */
};

/* Bytes by purpose: kept from forward to backward, and what is reused at once. */
struct workspace_memory {
    size_t activations, scratch, total;
};

/* One block's tensors between forward and backward. With recompute, and without training, all blocks share one. */
struct block_saved {
    struct attention_saved attention;
    struct tensor x_middle;              /* real [S,D]: after attention */
    struct tensor mlp_normed, mlp_rstd;  /* compute [S,D]; real [S] */
    struct router_saved router;
    struct expert_rows rows;
    struct expert_saved expert;          /* of the experts' rows; not the arena's where the exchange brings storage */
    int slot, rounds;                    /* of the exchange */
};

struct workspace {
    struct workspace_options options;
    int64_t batch, sequence_length; /* of the present layout */
    bool writes_gradients; /* this micro-batch is a step's first: see model_gradient_is_written. Else backward adds */
    struct tensor ids, targets;     /* i32 [S] */
    struct tensor *x;               /* L+1 residual streams real [S,D]: input of each block, output of the last */
    struct block_saved *blocks;     /* L */
    struct attention_scratch attention;
    struct router_scratch router;
    struct expert_scratch expert;
    struct head_scratch head;
    struct expert_rows drows;
    struct tensor dmlp;             /* real [S,D]: of mlp_normed; scratch where it is summed on its way (layer_sums_routed) */
    struct tensor dx;               /* real [S,D]: gradient of the residual stream */
    struct tensor loss_sum;         /* f64 [1] */
    struct tensor row_loss;         /* real [S] */
    struct tensor *stats;           /* L of f64 [2+2E], see router_stats; none in a dense model */
    struct tensor all_stats;        /* f64 [L*(2+2E)] */
    /* Rows of each expert, training a MoE only (else none): of this rank in the last micro-batch, and summed over the
     * step's micro-batches so far, for the balance loss. Backward reads the sum; whoever shares the batch with other
     * ranks adds theirs to it before that (parallel/balance.h). */
    struct tensor *expert_count;      /* L of i32 [E] */
    struct tensor *balance_count;     /* L of i32 [E] */
    struct tensor all_balance_counts; /* i32 [L*E] */
    const struct expert_exchange_ops *exchange;
    void *exchange_self;
    struct workspace_memory memory; /* of the largest layout */
    struct arena arena;
    int block_count;
};

/* What workspace_create (exchange NULL) or workspace_create_exchanging would take. */
enum status workspace_plan(const struct model *model, struct workspace_options options,
                           const struct expert_exchange_ops *exchange, struct workspace_memory *memory) MUST_USE;
/* The same from a configuration alone; all experts are here. */
enum status workspace_plan_config(const struct model_config *config, const struct kernel_ops *ops, enum dtype compute,
                                  struct workspace_options options, struct workspace_memory *memory) MUST_USE;

enum status workspace_create(const struct model *model, struct workspace_options options,
                             struct workspace **out) MUST_USE;
/* The same where others move the experts' rows: exchange is borrowed for the life of the workspace. What rows take is not
 * the workspace's where the exchange brings storage. */
enum status workspace_create_exchanging(const struct model *model, struct workspace_options options,
                                        const struct expert_exchange_ops *exchange, void *exchange_self,
                                        struct workspace **out) MUST_USE;
void workspace_destroy(struct workspace *workspace);

/* Lay out for a batch and sequence no larger than the options'. Contents are lost. */
void workspace_shape(struct workspace *workspace, const struct model *model, int64_t batch, int64_t sequence_length);
