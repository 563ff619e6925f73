/* The joint between a layer of experts and whoever moves its rows: nn declares it, a single process uses the local
 * form, parallel/ supplies the all-to-all (expert_parallel.h). Forward sends each routed row to the rank that owns its
 * expert (dispatch) and brings the results home (combine); backward goes the same ways in reverse. Every call happens
 * for every block and every step, whatever the routing: an expert without rows takes part with a count of zero.
 *
 * An exchange may need several rounds, each with some of the rows, where one would take more memory than it may. The rows
 * of a round come in parts, which the experts work on one after the other: some rows are here while others travel.
 *
 *   forward                     announce, begin;  then for each round: dispatch,
 *                               for each part of rows: arrive, the experts' forward, answer;  combine
 *   backward of one round       combine_backward,
 *                               for each part of drows: arrive_backward, the experts' backward of rows,
 *                               answer_backward, the experts' inner backward;  dispatch_backward;
 *                               what dispatch left, and gate and up, are kept from forward
 *   backward of several         for each round: dispatch, for each part of rows: arrive, the experts' inner forward;
 *                               then as above; nothing is kept
 *
 * Between two calls of a round the caller only computes. All functions are Collective over the ranks that share the
 * experts, also for a part without rows; where a message or memory fails they say so.
 */
#pragma once

#include "nn/layer.h"
#include "tensor/mesh.h"

/* Where the tokens of this rank want to go; all i32, see route_sort. */
struct route {
    struct tensor expert;    /* [S,K] */
    struct tensor weight;    /* real [S,K] */
    struct tensor count;     /* [E] */
    struct tensor offsets;   /* [E+1] */
    struct tensor row_slot;  /* [N] */
    struct tensor row_token; /* [N] */
    struct tensor slot_row;  /* [S,K] */
};

enum { EXPERT_PARTS_MAX = 3 };

/* Some of the rows, grouped by expert. */
struct expert_part {
    struct range range;    /* which: of N, in every tensor that has something for each row */
    struct tensor offsets; /* i32 [E_local + 1], counted from the first of range */
};

/* Rows that the experts of this rank are to work on: routed row r is data[rows[r]]. */
struct expert_rows {
    struct tensor data;   /* compute [any,D] */
    struct tensor rows;   /* i32 [N] */
    struct tensor weight; /* real [N]: the router's weight of each row; saved for backward */
    int part_count;       /* parts in the order in which they are to be worked on; together all rows, each once */
    struct expert_part parts[EXPERT_PARTS_MAX];
};

struct expert_saved;   /* nn/experts.h: what the experts keep of their rows, */
struct expert_scratch; /* and what they need while they work on them */

/* Whose rows: those of one layer's route, in one micro-batch. */
struct exchange_call {
    const struct layer_context *context;
    const struct route *route;
    int slot; /* where the exchange keeps what must last until backward: one for each layer that runs in between */
    bool inner_only; /* of dispatch: the inner forward for backward's sake, no answers follow */
};

struct expert_exchange_ops {
    /* True where the exchange brings the storage of *saved and *scratch: how many rows arrive is not known before. */
    bool brings_storage;
    /* True where rows never leave, are one round and one part: drows by way of the route's slot_row is then all there is of
     * dtokens, and a caller that sums it itself gives none to dispatch_backward. */
    bool keeps_rows;
    /* As soon as the route is known: ranks begin to tell each other how many rows they will send. */
    enum status (*announce)(void *self, const struct exchange_call *call) MUST_USE;
    /* tokens compute [S,D], untouched until the last dispatch. rounds = how many, the same on every rank. */
    enum status (*begin)(void *self, const struct exchange_call *call, struct tensor tokens, int *rounds) MUST_USE;
    /* The rows of this round's tokens -> rows, on their way: what arrive has not been called for may still change. Also
     * saved and scratch where it brings them. */
    enum status (*dispatch)(void *self, const struct exchange_call *call, int round, struct tensor tokens,
                            struct expert_rows *rows, struct expert_saved *saved,
                            struct expert_scratch *scratch) MUST_USE;
    /* Until the rows of a part are here. */
    enum status (*arrive)(void *self, const struct exchange_call *call, int round, int part) MUST_USE;
    /* The results of a part are there: what belongs to other ranks leaves. results compute [N,D], in the order of rows,
     * already multiplied by their weight; untouched until combine. */
    enum status (*answer)(void *self, const struct exchange_call *call, int round, int part,
                          struct tensor results) MUST_USE;
    /* Until the results of this rank's tokens are here. After the last round y = base + the results of all; both real [S,D]. */
    enum status (*combine)(void *self, const struct exchange_call *call, int round, struct tensor results,
                           struct tensor base, struct tensor y) MUST_USE;
    /* dy compute [S,D] -> the gradient of each row's result, on its way, as data, rows and parts of *drows; also scratch
     * where it brings it: other layers have used it since dispatch. Rows are numbered as in dispatch, but parts may be
     * others. */
    enum status (*combine_backward)(void *self, const struct exchange_call *call, int round, struct tensor dy,
                                    struct expert_rows *drows, struct expert_scratch *scratch) MUST_USE;
    enum status (*arrive_backward)(void *self, const struct exchange_call *call, int round, int part) MUST_USE;
    /* drows real [N,D] and drow_weight real [N] of a part are there; untouched until dispatch_backward. The data that
     * combine_backward gave for it is no more. */
    enum status (*answer_backward)(void *self, const struct exchange_call *call, int round, int part,
                                   struct tensor drows, struct tensor drow_weight) MUST_USE;
    /* After the last round dtokens real [S,D] =, dweight real [S,K] = . dtokens may be none where rows are kept. */
    enum status (*dispatch_backward)(void *self, const struct exchange_call *call, int round, struct tensor drows,
                                     struct tensor drow_weight, struct tensor dtokens, struct tensor dweight) MUST_USE;
};

/* All experts live here: nothing moves, rows are read through the permutation, in one round of one part. Its `self` is
 * NULL; it cannot fail. */
const struct expert_exchange_ops *expert_exchange_local(void);
