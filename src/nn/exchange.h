/* The joint between a layer of experts and whoever moves its rows: nn declares it, a single process uses the local
 * form, parallel/ supplies the all-to-all. Forward sends each routed row to the rank that owns its expert (dispatch)
 * and brings the results home (combine); backward goes the same ways in reverse. Every call happens for every block
 * and every step, whatever the routing: an expert without rows takes part with a count of zero. */
#pragma once

#include "nn/layer.h"

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

/* Rows that the experts of this rank are to work on, grouped by expert: routed row r is data[rows[r]]. */
struct expert_rows {
    struct tensor data;    /* compute [any,D] */
    struct tensor rows;    /* i32 [N], or none: row r itself */
    struct tensor offsets; /* i32 [E_local + 1] */
    struct tensor weight;  /* real [N]: the router's weight of each row; saved for backward */
};

struct expert_exchange_ops {
    /* tokens compute [S,D] -> rows. */
    void (*dispatch)(void *self, const struct layer_context *context, const struct route *route, struct tensor tokens,
                     struct expert_rows *rows);
    /* results compute [N,D], in the order of rows, already multiplied by their weight: y real [S,D] += . */
    void (*combine)(void *self, const struct layer_context *context, const struct route *route,
                    struct tensor results, struct tensor y);
    /* dy compute [S,D] -> the gradient of each row's result, as data and rows of *drows. */
    void (*combine_backward)(void *self, const struct layer_context *context, const struct route *route,
                             struct tensor dy, struct expert_rows *drows);
    /* drows real [N,D], drow_weight real [N] -> dtokens real [S,D] =, dweight real [S,K] = . */
    void (*dispatch_backward)(void *self, const struct layer_context *context, const struct route *route,
                              struct tensor drows, struct tensor drow_weight, struct tensor dtokens,
                              struct tensor dweight);
};

/* All experts live here: nothing moves, rows are read through the permutation. Its `self` is NULL. */
const struct expert_exchange_ops *expert_exchange_local(void);
