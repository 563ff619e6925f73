/* Index plans of an exchange of rows between ranks, by the counting of counting.cuh. */
#include "kernels/cuda/counting.cuh"

static int32_t *indices(struct tensor t, int64_t count) {
    CHECK(t.dtype == DTYPE_I32 && tensor_elements(t) == count);
    return (int32_t *)t.data;
}

/* ---- the side of the tokens ------------------------------------------------------------------------------------------- */

struct pairs {
    const int32_t *expert;
    int64_t tokens;
    int32_t choices, columns;
    unsigned experts, ranks;
    int32_t *rank_pair, *rank_row, *pair_token, *pair_row, *row_wire, *row_slot, *slot_row, *token_pair;
    int32_t *slot_pair; /* [N], in scratch: the pair of a token's first choice in a rank; the others are undefined */
};

/* As range_owner. */
static __device__ __forceinline__ int owner(const struct pairs &p, int64_t slot) {
    return (int)((((unsigned)p.expert[slot] + 1) * p.ranks - 1) / p.experts);
}

/* The token's first choice in the rank of `slot`. */
static __device__ __forceinline__ int64_t first_in_rank(const struct pairs &p, int64_t slot, int rank) {
    int64_t first = slot - slot % p.choices;
    while (owner(p, first) != rank)
        first++;
    return first;
}

struct row_keys {
    struct pairs p;
    __device__ int operator()(int64_t slot) const {
        return owner(p, slot);
    }
};

struct place_row {
    struct pairs p;
    __device__ void operator()(int64_t slot, int rank, int32_t row) const {
        (void)rank;
        p.row_slot[row] = (int32_t)slot;
        p.slot_row[slot] = row;
    }
};

/* A pair stands where its first choice does. */
struct pair_keys {
    struct pairs p;
    __device__ int operator()(int64_t slot) const {
        int rank = owner(p, slot);
        return first_in_rank(p, slot, rank) == slot ? rank : -1;
    }
};

struct place_pair {
    struct pairs p;
    __device__ void operator()(int64_t slot, int rank, int32_t pair) const {
        (void)rank;
        p.pair_token[pair] = (int32_t)(slot / p.choices);
        p.pair_row[pair] = p.slot_row[slot];
        p.slot_pair[slot] = pair;
    }
};

/* A thread for each token. */
static __global__ void wire_kernel(struct pairs p) {
    if (thread_index() == 0)
        p.pair_row[p.rank_pair[p.ranks]] = (int32_t)(p.tokens * p.choices);
    for (int64_t s = thread_index(); s < p.tokens; s += thread_count()) {
        int32_t *pairs = p.token_pair + s * p.columns, column = 0;
        for (int64_t slot = s * p.choices; slot < (s + 1) * p.choices; slot++) {
            int rank = owner(p, slot);
            int64_t first = first_in_rank(p, slot, rank);
            int32_t pair = p.slot_pair[first], row = p.slot_row[slot];
            if (first == slot)
                pairs[column++] = pair;
            p.row_wire[2 * (int64_t)row] = pair - p.rank_pair[rank];
            p.row_wire[2 * (int64_t)row + 1] = p.expert[slot] - (int32_t)((uint64_t)p.experts * (unsigned)rank / p.ranks);
        }
        while (column < p.columns)
            pairs[column++] = -1;
    }
}

static void route_pairs(struct tensor expert, int64_t expert_count, int rank_count, struct pair_plan plan) {
    struct pairs p = {};
    p.tokens = expert.shape[0], p.choices = (int32_t)expert.shape[1], p.columns = (int32_t)plan.token_pair.shape[1];
    p.experts = (unsigned)expert_count, p.ranks = (unsigned)rank_count;
    CHECK_OP(p.columns, ==, p.choices < rank_count ? p.choices : rank_count);
    CHECK(expert_count >= 1 && rank_count >= 1 && expert_count * rank_count <= INT32_MAX);
    int64_t rows = p.tokens * p.choices, pairs = p.tokens * p.columns;
    p.expert = indices(expert, rows);
    p.rank_pair = indices(plan.rank_pair, rank_count + 1);
    p.rank_row = indices(plan.rank_row, rank_count + 1);
    p.pair_token = indices(plan.pair_token, pairs);
    p.pair_row = indices(plan.pair_row, pairs + 1);
    p.row_wire = indices(plan.row_wire, 2 * rows);
    p.row_slot = indices(plan.row_slot, rows);
    p.slot_row = indices(plan.slot_row, rows);
    p.token_pair = indices(plan.token_pair, pairs);
    struct counting c = counting_of(rows, rank_count);
    char *scratch = (char *)cuda_scratch(counting_bytes(&c) + (size_t)rows * sizeof(int32_t));
    p.slot_pair = (int32_t *)(scratch + counting_bytes(&c));
    struct row_keys row_keys = {p};
    struct place_row place_row = {p};
    struct pair_keys pair_keys = {p};
    struct place_pair place_pair = {p};
    count_and_place(row_keys, place_row, c, scratch, p.rank_row, NULL);
    count_and_place(pair_keys, place_pair, c, scratch, p.rank_pair, NULL);
    CUDA_LAUNCH(wire_kernel, grid_for(p.tokens, THREADS), THREADS, 0, p);
}

/* ---- the side of the experts ------------------------------------------------------------------------------------------ */

struct wire_keys {
    const int32_t *wire;
    __device__ int operator()(int64_t i) const {
        return wire[2 * i + 1];
    }
};

struct place_arrival {
    int32_t *row_wire, *wire_row;
    __device__ void operator()(int64_t i, int expert, int32_t row) const {
        (void)expert;
        row_wire[row] = (int32_t)i;
        wire_row[i] = row;
    }
};

static __global__ void clear_kernel(int32_t *to, int64_t count, int32_t value) {
    for (int64_t i = thread_index(); i < count; i += thread_count())
        to[i] = value;
}

enum { SOURCES_AT_ONCE = 64 };

/* Some of the sources of an exchange: tables in the arguments of a launch. */
struct sources {
    int count;
    int64_t row[SOURCES_AT_ONCE + 1], pair_shift[SOURCES_AT_ONCE]; /* its place here less what it calls itself */
    const int32_t *wire, *wire_row;
    int32_t *row_pair, *pair_row;
    int64_t columns;
};

static __global__ void arrival_pairs_kernel(struct sources s) {
    for (int64_t i = s.row[0] + thread_index(); i < s.row[s.count]; i += thread_count()) {
        int source = 0;
        while (i >= s.row[source + 1])
            source++;
        int32_t own = s.wire[2 * i], row = s.wire_row[i];
        int64_t pair = own + s.pair_shift[source], column = 0; /* rows of a pair are neighbours */
        while (i - column > s.row[source] && s.wire[2 * (i - column - 1)] == own)
            column++;
        s.row_pair[row] = (int32_t)pair;
        if (column < s.columns)
            s.pair_row[pair * s.columns + column] = row;
    }
}

static void sort_arrivals(struct arrivals a) {
    int64_t rows = a.wire.shape[0], experts = tensor_elements(a.offsets) - 1;
    struct wire_keys keys = {indices(a.wire, 2 * rows)};
    struct place_arrival place = {indices(a.row_wire, rows), indices(a.wire_row, rows)};
    CHECK(a.source_row[0] == 0 && a.source_row[a.sources] == rows);
    CHECK(a.source_pair[0] == 0 && a.source_pair[a.sources] == a.pair_row.shape[0]);
    struct counting c = counting_of(rows, experts);
    count_and_place(keys, place, c, cuda_scratch(counting_bytes(&c)), indices(a.offsets, experts + 1), NULL);
    struct sources s = {};
    s.wire = keys.wire, s.wire_row = place.wire_row;
    s.row_pair = indices(a.row_pair, rows);
    s.columns = a.pair_row.shape[1];
    int64_t places = a.pair_row.shape[0] * s.columns;
    s.pair_row = indices(a.pair_row, places);
    if (places)
        CUDA_LAUNCH(clear_kernel, grid_for(places, THREADS), THREADS, 0, s.pair_row, places, -1);
    for (int first = 0; first < a.sources; first += SOURCES_AT_ONCE) {
        s.count = a.sources - first < SOURCES_AT_ONCE ? a.sources - first : SOURCES_AT_ONCE;
        for (int i = 0; i <= s.count; i++)
            s.row[i] = a.source_row[first + i];
        for (int i = 0; i < s.count; i++)
            s.pair_shift[i] = a.source_pair[first + i] - a.first_pair[first + i];
        int64_t here = s.row[s.count] - s.row[0];
        if (here)
            CUDA_LAUNCH(arrival_pairs_kernel, grid_for(here, THREADS), THREADS, 0, s);
    }
}

void pairs_fill_cuda(struct kernel_ops *ops) {
    ops->route_pairs = route_pairs;
    ops->sort_arrivals = sort_arrivals;
}
