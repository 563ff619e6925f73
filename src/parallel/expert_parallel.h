/* Experts divided over ranks: the all-to-all form of nn/exchange.h.
 *
 * Rank r of R has the experts range_part(E, R, r); E need not be a multiple of R, and a rank may have none. What holds:
 *
 *  1. Dropless and without padding: ranks tell each other how many rows they send, then send exactly these.
 *  2. A token with several experts on one rank travels once (a pair, see kernels.h), and one row comes back: the sum of
 *     what its experts there made of it. Backward: one row of dy goes, one row of dx comes back. What stays on its rank
 *     does not travel.
 *  3. All collectives happen whatever the routing, in the same order, with counts of zero where there is nothing.
 *  4. What arrives at most decides the memory: storage of arrived rows grows to the largest amount seen, seldom, and never
 *     shrinks. With a limit, an exchange in which some rank's arrived rows would take more goes in as many rounds as make
 *     it fit; nothing that grows with them is then kept until backward. All ranks know all counts, so they agree on the
 *     rounds, and on when somebody grows (and may fail to), without asking.
 *  5. The same routing gives the same bits, however fast anything travels; rounds and parts change none but those of the
 *     experts' weight gradients, which are summed in their order.
 *
 * A round's rows are worked on in parts: this rank's own, which do not travel, while those of others do. Forward: half of
 * the own rows, the arrived ones, whose answers leave then, the other half; backward: all own rows, the arrived ones. In
 * each part the rows of an expert are in the order of source rank, then token, then choice.
 * At home a token's results are added in the order of its first choice on each rank. Rows travel in the compute dtype.
 */
#pragma once

#include "comm/comm.h"
#include "nn/experts.h"

struct expert_parallel_options {
    struct comm *comm;           /* of the ranks that share the experts; borrowed */
    const struct device *device;
    struct layer_context context;
    int64_t token_count;         /* the most tokens of this rank in one exchange; ranks may differ */
    int64_t width, inner;        /* D, F */
    int64_t expert_count, choice_count; /* E of all ranks, K */
    int slot_count;              /* layers whose rows are kept at the same time: 1 with recompute, and without backward */
    bool training;               /* there will be backward */
    int64_t limit_bytes;         /* what the arrived rows of one exchange may take on any rank, about; 0: no limit */
};

struct expert_parallel;

/* Everything of known size is taken here. Not collective. */
enum status expert_parallel_create(const struct expert_parallel_options *options, struct expert_parallel **out) MUST_USE;
void expert_parallel_destroy(struct expert_parallel *exchange);

/* The table; `self` is the struct expert_parallel. */
const struct expert_exchange_ops *expert_parallel_ops(void);

/* The experts of this rank. */
int64_t expert_parallel_local_experts(const struct expert_parallel *exchange);

/* Bytes of device memory held now: what was taken at the start, and what grew with the routing so far. */
size_t expert_parallel_bytes(const struct expert_parallel *exchange);
size_t expert_parallel_grown_bytes(const struct expert_parallel *exchange);

/* What expert_parallel_create would take. */
size_t expert_parallel_plan(const struct expert_parallel_options *options);
