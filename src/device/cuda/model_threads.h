/* What the files of the model of a device share: the threads of the blocks that run, and how they wait. */
#pragma once

#include "device/cuda/language.cuh"

/* Of loops over the model's own arrays that take most of its time. */
#define MODEL_ARITHMETIC __attribute__((no_sanitize("address", "undefined")))

namespace cuda_model {

enum { THREADS_MAX = 1024, WARPS_MAX = THREADS_MAX / WARP, BLOCKS_MAX = 2 /* of a cluster */, NAMED_MAX = 16 };

struct place; /* somewhere to go on */

struct copy {
    void *to;
    const void *from;
    int bytes;
    long group;
};

enum state { RUNS, WAITS_FOR_WARP, WAITS_FOR_BLOCK, WAITS_FOR_CLUSTER, WAITS_FOR_SOME, WAITS_FOR_PHASE, WAITS_FOR_PRODUCTS, ENDED };

struct thread {
    enum state state;
    uint3 index;
    int block, warp, lane; /* block: of the cluster; warp: of all its blocks */
    place *fiber;
    std::vector<copy> copies;     /* not yet there */
    std::vector<void *> unfenced; /* there, but not for what runs beside the threads */
    long group;                   /* commits so far */
    const void *awaited;          /* WAITS_FOR_SOME, WAITS_FOR_PHASE */
};

struct block {
    uint3 index;
    unsigned char *shared;
    size_t shared_bytes;
    int live, at_barrier;
    int unfenced; /* threads that have some */
    struct {
        int arrived, threads;
    } named[NAMED_MAX];
};

/* The blocks that run at once: one, or a cluster. */
struct running {
    const char *kernel;
    void (*body)(void *);
    void *arguments;
    int block_count, block_threads, thread_count, live, at_barrier;
    int next, limit; /* threads before `next`, counted in the order of the turn, have started; those before `limit` may */
    bool descending;
    bool is_sm90;
    bool has_units; /* what runs beside the threads is used */
};

extern thread threads[THREADS_MAX];
extern block blocks[BLOCKS_MAX];
extern running now;
extern thread *current; /* NULL: nobody runs */

void wait(enum state state);
void wake(thread *t);
void stand_back(void); /* the other warps go first */

/* ---- model_sm90.cpp ---- */

void units_begin(unsigned turn);
bool units_hold_up(void);              /* whether a warp that could go on is not to, now */
bool units_work(bool is_stuck);        /* true where something was done that threads may wait for */
void units_end(void);
void units_tell(char *text, size_t bytes); /* what waits, of a deadlock */

} // namespace cuda_model
