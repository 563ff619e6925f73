/* Directories of runs that stand shortly before their end, cut out of the uninterrupted one. */
#pragma once

#include "tree.h"

enum scenario_kind {
    SCENARIO_NEXT,      /* two checkpoints: the next save deletes the older one */
    SCENARIO_REPLACES,  /* and a third one, damaged: the next save takes its place */
    SCENARIO_LEFTOVERS, /* the newer one stepped aside and the draft after it is empty: the next save settles both */
    SCENARIO_FRESH,     /* nothing */
    SCENARIO_KINDS
};

struct scenario {
    const char *name;
    struct tree tree;
    int64_t newest;       /* its newest good checkpoint; 0: none */
    int64_t damaged_step; /* -1: none */
};

/* From the run directory of one that kept the checkpoints of all `steps` steps. The caller releases scenario->tree. */
enum status scenario_init(struct scenario *scenario, enum scenario_kind kind, const char *run_directory,
                          int64_t steps) MUST_USE;
