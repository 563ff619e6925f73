/* Moving tensors from one layout to another: a plan made once and run every step.
 *
 * A plan takes a list of tensors (all parameters of a block, say), each from its layout to another, over the ranks that
 * differ along a set of axes; along all other axes the two layouts are the same. Every run of it is one all_to_all, or
 * two where terms are summed for several ranks that all want the whole sum. For each axis of the set:
 *
 *   from        to                what a rank does
 *   Replicate   Replicate, Shard  takes from the replica with its own coordinate: itself
 *   Shard       any               takes each part from its owner; what it owns itself it copies
 *   Partial     Shard             receives every coordinate's term of its part and adds them
 *   Partial     Replicate         the same for its share of the tensor, then gathers the others' shares: reduce-scatter
 *                                 and gather, 2(R-1)/R of the bytes
 *   Partial     Partial           keeps its term
 *
 * Partial in `to` needs Partial in `from`.
 *
 * What holds:
 *  1. Terms are added in rank order, in f32 (f64 where an operand is), once for all ranks: a sum has the same bits on
 *     every rank and in every run.
 *  2. What travels has the item's wire dtype. Along an axis that is Replicate in `to` all ranks get the same bits, also
 *     where the wire is narrower than both ends: what a rank gives to others it then takes rounded itself. Terms of a sum
 *     that a rank keeps to itself are not rounded.
 *  3. Nothing is sent that the receiver has. Ranks that are sent the same boxes are sent the same packed bytes.
 *  4. A run allocates nothing; it works in staging memory of the caller, from start to finish. Several plans may share
 *     it when they are not under way at once.
 *  5. Extents need not be divisible by the ranks; parts may be empty.
 */
#pragma once

#include "comm/comm.h"
#include "kernels/kernels.h"
#include "tensor/mesh.h"

struct redistribute_item {
    int dim_count;
    int64_t shape[3]; /* of the whole tensor; unused ones are 1 */
    struct layout from_layout, to_layout;
    struct tensor from, to; /* what this rank holds: layout_local_tensor; data may be NULL until redistribution_bind */
    enum dtype wire;        /* f32, bf16 or f64 */
};

struct redistribution;

/* What this rank holds of a tensor in a layout: its shape, without memory. */
struct tensor layout_local_tensor(const struct layout *layout, const struct mesh *mesh, enum dtype dtype, int dim_count,
                                  const int64_t shape[3]);

/* Plan `count` items over the ranks that differ along `axes`, a set. `items` and `mesh` are copied. Index arithmetic only:
 * sends nothing and needs no tensor memory. Every rank of the group makes the same plan. Fails with STATUS_MEMORY; items
 * whose layouts this group cannot serve are our own mistake (CHECK). Release with redistribution_destroy. */
enum status redistribution_create(const struct mesh *mesh, unsigned axes, const struct redistribute_item *items, int count,
                                  struct redistribution **out) MUST_USE;
/* Where something is under way, because another transfer failed, it is waited for. NULL does nothing. */
void redistribution_destroy(struct redistribution *plan);

/* Other local tensors for item i, of the shapes and dtypes it has. Not while under way. */
void redistribution_bind(struct redistribution *plan, int i, struct tensor from, struct tensor to);

/* Bytes of device memory that a run works in. */
size_t redistribution_staging_bytes(const struct redistribution *plan);

/* What one run sends to, and receives from, other ranks: what comm->count grows by. */
int64_t redistribution_sent_bytes(const struct redistribution *plan);
int64_t redistribution_received_bytes(const struct redistribution *plan);
int redistribution_exchanges(const struct redistribution *plan); /* all_to_alls of one run: 0, 1 or 2 */

/* Collective over `comm`, whose ranks are the mesh's group over the plan's axes in rank order (mesh_group_rank). Packs and
 * starts; returns at once. `staging` is 64-byte aligned. The `from` tensors stay as they are until finish. comm may be
 * NULL where the group is one rank. The status of comm is passed on; a plan that failed is not under way. */
enum status redistribution_start(struct redistribution *plan, struct comm *comm, const struct kernel_ops *ops,
                                 void *staging) MUST_USE;

/* Collective. Where the plan has two exchanges: waits for the first, adds, and starts the second, so that the second, too,
 * can pass while something else is computed. Calling it is optional, once, between start and finish. */
enum status redistribution_advance(struct redistribution *plan) MUST_USE;

/* Collective. Waits; to = (or += with accumulate) what arrived and what was here. Where `from` and `to` are the same
 * memory, what is in place already stays untouched (accumulate is not allowed then). Otherwise they do not overlap, but
 * for a sum's own term, which may lie where the sum goes. */
enum status redistribution_finish(struct redistribution *plan, bool accumulate) MUST_USE;
