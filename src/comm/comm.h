/* The table of collectives. Every function is Collective: all ranks call it, in the same order, whatever their data. */
#pragma once

#include "tensor/tensor.h"

struct comm;

struct comm_ops {
    const char *name;
    /* t = sum over the ranks of t, in rank order, the same bits on every rank. t f32 or f64. */
    enum status (*all_reduce_sum)(struct comm *comm, struct tensor t) MUST_USE;
    /* The worst status of all ranks. Called before anything that one rank must not do alone. */
    enum status (*agree)(struct comm *comm, enum status mine) MUST_USE;
};

struct comm {
    const struct comm_ops *ops;
    int rank, size;
    void *state; /* the transport's own */
};

/* A single process: rank 0 of 1. Sends nothing; nothing to release. */
struct comm comm_self(void);
