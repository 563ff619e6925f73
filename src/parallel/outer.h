/* The outer step of DiLoCo: islands train on their own and meet now and then over a slow link.
 *
 * Every island holds, beside the weights that it trains (local), the weights that all islands share (global), and the
 * momentum of the outer optimizer; both are divided over its ranks like own_weight. A fragment (parallel/outer_plan.h)
 * is sent after an inner step: each rank encodes global - local of what it owns and starts an all_gather among the
 * ranks that have its place in the other islands. While it travels, training goes on. When it is applied the messages
 * are decoded and added up in f32, in the order of the islands, global takes a step of SGD with Nesterov momentum, and
 * local becomes a mixture of both. What replicas of an island hold in common crosses the link once: each of them sends
 * a part, and they share what arrived.
 *
 * The global weights after inner step t are those to which every fragment contributed that was sent at t or before; who
 * wants them (an evaluation, a checkpoint) calls outer_settle first. That changes neither what is mixed nor when.
 *
 * Each message begins with the step, the fragment, and a hash of the global weights that the last fragment left behind,
 * so that islands that do not stand where the others stand, or hold other global weights, are found out before their
 * differences are used.
 *
 * Source: arXiv 2311.08105, 2501.18512; docs/design/diloco.md.
 */
#pragma once

#include "model/model.h"
#include "parallel/outer_plan.h"
#include "parallel/ranks.h"
#include "parallel/traffic.h"

struct outer_options {
    struct outer_plan plan;
    double lr, momentum, mix; /* of SGD; mix: the share of local weights that an apply keeps */
    enum outer_format wire;
};

/* What came of a fragment: the same on all ranks of an island, but for waited_s. */
struct outer_report {
    int fragment;
    int64_t sent_step;
    double gradient_norm; /* of the mean difference */
    double cosine;   /* between islands' differences as they arrived: over all pairs, weighted by their norms; NaN: no
                        pair */
    double flushed;  /* share of all differences that became 0 */
    double loss;     /* mean over the islands, of the step that it was sent after */
    double waited_s; /* by this rank */
    int64_t sent_bytes; /* by all ranks of an island */
};

struct outer {
    struct outer_options options;
    struct model *model;
    struct ranks *ranks;
    struct traffic *traffic;
    struct tensor *global, *momentum; /* [rows of the table], real, as model->own_weight */
    size_t memory_bytes;              /* of all tensors and messages */

    int mixing;         /* the fragment that is to be mixed in yet; -1: none */
    bool travels;       /* and has not been received yet */
    int64_t sent_step;  /* of it */
    bool has_report;    /* of a fragment that was received: until the next is sent */
    uint64_t last_hash; /* of the global weights that the last fragment left behind, on this rank; 0: none yet */
    struct outer_report report;

    struct arena arena;
    struct tensor sum, stats;         /* of one row; f64 [OUTER_STATS] */
    void *message, *arrived, *shared; /* this rank's, those of all islands; those of all islands and replicas */
    struct comm_request request;
    int64_t *counts; /* scratch for the transport */
    int64_t *bytes;  /* [replicas] of the messages of each that arrive */
    double *norms;   /* scratch [islands + a few] */
};

/* Borrows all pointers. The plan was checked; the mesh of the ranks has the islands. Not collective. */
enum status outer_create(struct model *model, struct ranks *ranks, struct traffic *traffic,
                         const struct outer_options *options, struct outer **out) MUST_USE;
void outer_destroy(struct outer *outer);

/* Bytes that a rank takes for it. The model may be one without memory. */
size_t outer_memory_bytes(const struct model *model, const struct outer_options *options);
/* Bytes that a rank sends, and that all ranks of an island send, of what goes out after `step`; 0: nothing does. */
int64_t outer_rank_bytes(const struct model *model, const struct outer_options *options, int64_t step);
int64_t outer_island_bytes(const struct model *model, const struct outer_options *options, int64_t step);

/* Local weights become the global ones, without momentum: the start of a run. Nothing may be under way. */
void outer_reset(struct outer *outer);

/* Collective over the islands. What is under way is waited for and forgotten. */
enum status outer_drop(struct outer *outer) MUST_USE;

/* After global, momentum and local were read from a checkpoint of `step` that was written under the plan `before`: what
 * was not mixed in there yet will be or, under another plan, is now. Nothing may be under way. */
void outer_resume(struct outer *outer, const struct outer_plan *before, int64_t step);

/* Collective over all ranks of all islands, after inner step `step`, when the plan says so. loss: of that step. */
enum status outer_send(struct outer *outer, int64_t step, double loss) MUST_USE;
enum status outer_apply(struct outer *outer) MUST_USE;

/* Collective. What is under way is in the global weights when it returns, and outer->report is of it. STATUS_NUMERIC
 * where an island's differences may not be sent, or its global weights are not those of the others. */
enum status outer_settle(struct outer *outer) MUST_USE;

/* Collective, after outer_settle. STATUS_NUMERIC on all where islands do not hold the same global weights and momentum.
 */
enum status outer_verify(struct outer *outer) MUST_USE;

/* Collective in an island. global and own_weight change places, and what ranks compute with follows. Twice: as before.
 */
enum status outer_swap(struct outer *outer) MUST_USE;
