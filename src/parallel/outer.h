/* The outer step of DiLoCo: islands train on their own and meet now and then over a slow link.
 *
 * Every island holds, beside the weights that it trains (local), the weights that all islands share (global), and the
 * momentum of the outer optimizer; both are divided over its ranks like own_weight. A fragment (parallel/outer_plan.h) is sent
 * after an inner step: each rank encodes global - local of what it owns and starts an all_gather among the ranks that have its
 * coordinates in the other islands. While it travels, training goes on. `overlap` steps later the messages are decoded and
 * added up in f32, in the order of the islands, global takes a step of SGD with Nesterov momentum, and local becomes a mixture
 * of both. What replicas of an island hold in common crosses the link once: each of them sends a part, and they share
 * what arrived.
 *
 * The global weights after inner step t are those to which every fragment contributed that was sent at t or before; who wants
 * them (an evaluation, a checkpoint) calls outer_settle first. That does not change what is mixed, nor when.
 *
 * Islands are told apart by a header in each message: step, fragment, and a hash of the global weights that the last fragment
 * left behind, so that islands that do not stand where the others stand, or hold other global weights, are found out before
 * their differences are used.
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
    int64_t experts_every; /* experts meet in every so many-th round of their fragment; 1: in each */
};

/* What came of a fragment; of all ranks of an island, the same on all. */
struct outer_report {
    int fragment;
    int64_t sent_step;
    double gradient_norm; /* of the mean difference */
    double cosine;        /* between islands' differences, as sent: mean over pairs, weighted by their norms; NaN for one island */
    double flushed;       /* share of the differences that became 0 */
    int64_t sent_bytes;   /* by all ranks of an island */
    double waited_s;      /* by this rank */
    double loss;          /* mean over the islands, of the step it was sent after */
};

struct outer {
    struct outer_options options;
    struct model *model;
    struct ranks *ranks;
    struct traffic *traffic;
    struct tensor *global, *momentum; /* [rows of the table], as model->own_weight */
    size_t memory_bytes;              /* of all that follows, too */

    int mixing;          /* the fragment that is to be mixed in yet, -1: none */
    int travelling;      /* the fragment that is under way, -1: none; then it is also to be mixed in */
    int64_t sent_step;   /* of both */
    bool shows_global;   /* see outer_show */
    uint64_t last_hash;  /* of the global weights that the last fragment left behind, on this rank; 0: none yet */
    struct outer_report report;
    struct comm_request request;
    void *message, *arrived, *pieces; /* sent; of all islands; of all replicas */
    struct tensor sum, stats;
    int64_t begin_bytes;
    struct arena arena;
    int64_t *counts;
};

/* Borrows all pointers. The options were checked; the mesh of the ranks has the islands. */
enum status outer_create(struct model *model, struct ranks *ranks, struct traffic *traffic,
                         const struct outer_options *options, struct outer **out) MUST_USE;
void outer_destroy(struct outer *outer);

/* Bytes that a rank takes for it, without taking them; and those that one sending of a fragment takes from this rank. */
size_t outer_plan_bytes(const struct model *model, const struct outer_options *options);
int64_t outer_message_bytes(const struct model *model, const struct outer_options *options, int fragment, int64_t step);

/* Collective over all islands. Local weights become the global ones, without momentum: the start of a run. What is under way is
 * waited for and dropped. */
enum status outer_reset(struct outer *outer) MUST_USE;

/* Not collective. After global, momentum and local were read from a checkpoint of `step`, written with the plan `before`: what
 * was not mixed in there will be, or, with another plan, is now. own_weight may have changed then. What is under way was
 * dropped before (outer_drop). */
enum status outer_resume(struct outer *outer, const struct outer_plan *before, int64_t step) MUST_USE;
enum status outer_drop(struct outer *outer) MUST_USE; /* collective */

/* Collective. After inner step `step`, whose loss was `loss` on this island: what the plan says is sent, or is applied. report is
 * filled where a fragment was applied. STATUS_NUMERIC on all islands where one's differences may not be sent or its global
 * weights are not those of the others. */
enum status outer_send(struct outer *outer, int fragment, int64_t step, double loss) MUST_USE;
enum status outer_apply(struct outer *outer, int fragment, int64_t step) MUST_USE;

/* Collective. Until what is under way is in the global weights. */
enum status outer_settle(struct outer *outer) MUST_USE;

/* Collective; after outer_settle. STATUS_NUMERIC on all where islands do not hold the same global weights and momentum. */
enum status outer_verify(struct outer *outer) MUST_USE;

/* Collective in an island. What ranks compute with becomes the global weights, or the local ones again; global and own_weight
 * change places until then. */
enum status outer_show(struct outer *outer, bool global) MUST_USE;
