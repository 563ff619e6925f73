/* The balance loss of the global batch: its counts of rows per expert, summed over ranks and micro-batches.
 *
 * The loss that keeps experts evenly used is over a step's whole batch; per rank or per micro-batch it would change with
 * the layout and forbid experts to specialise on what one rank happens to hold (arXiv 2501.11873). A rank adds its own
 * counts when it routes (workspace->expert_count, balance_count); here the others' are added to balance_count before
 * backward reads it, while other work runs.
 */
#pragma once

#include "comm/comm.h"
#include "model/workspace.h"

struct balance {
    struct comm *comm;     /* of all ranks that share the batch; borrowed */
    struct tensor *counts; /* L of i32 [R,E]: what every rank routed in this micro-batch; none in a dense model */
    struct comm_request *requests; /* L */
    int64_t *bytes, *offsets;      /* R, R */
    int block_count;
    struct arena arena;
};

/* For micro-batches of `workspace`, which trains `model`. A dense model has nothing to balance: start and finish do
 * nothing. Release with balance_release. Not collective. */
enum status balance_init(struct balance *balance, const struct model *model, const struct workspace *workspace,
                         struct comm *comm) MUST_USE;
void balance_release(struct balance *balance);

/* After block_route_forward of this block; what it counted may not be counted anew until finish. Collective. */
enum status balance_start(struct balance *balance, const struct workspace *workspace, int block) MUST_USE;

/* workspace->balance_count[block] += the counts of all other ranks; before block_route_backward of this block. Once for
 * each start. Collective. */
enum status balance_finish(struct balance *balance, const struct model *model, struct workspace *workspace,
                           int block) MUST_USE;
