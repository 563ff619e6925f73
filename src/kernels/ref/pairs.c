/* Index plans of an exchange of rows between ranks. Unlike the rest of ref/ they are linear in what they read, take no
 * memory, and serve every backend: beside the rows that travel they are nothing. */
#include "kernels/ref/ref.h"

#include "tensor/mesh.h"

static int32_t *indices(struct tensor t) {
    CHECK(t.dtype == DTYPE_I32);
    return t.data;
}

/* counts[i+1] things of kind i become the first place of each kind, in place. */
static void sum_up(int32_t *counts, int64_t kinds) {
    for (int64_t i = 0; i < kinds; i++)
        counts[i + 1] += counts[i];
}

/* Places that were counted on while things took them, so that [i] is the end of kind i, become first places again. */
static void step_back(int32_t *places, int64_t kinds) {
    for (int64_t i = kinds; i > 0; i--)
        places[i] = places[i - 1];
    places[0] = 0;
}

static void clear(int32_t *values, int64_t count, int32_t value) {
    for (int64_t i = 0; i < count; i++)
        values[i] = value;
}

/* ---- the side of the tokens ------------------------------------------------------------------------------------------ */

struct pairs {
    const int32_t *expert;
    int64_t tokens, choices, columns, experts, ranks;
    int32_t *rank_pair, *rank_row, *pair_token, *pair_row, *row_wire, *row_slot, *slot_row, *token_pair;
};

static int32_t owner(const struct pairs *p, int64_t slot) {
    CHECK(p->expert[slot] >= 0 && p->expert[slot] < p->experts);
    return range_owner(p->experts, (int)p->ranks, p->expert[slot]);
}

/* Which of the ranks of a token so far is `rank`; the next free place where it is none of them. */
static int64_t find_rank(const struct pairs *p, const int32_t *ranks, int32_t rank) {
    int64_t i = 0;
    while (i < p->columns && ranks[i] >= 0 && ranks[i] != rank)
        i++;
    CHECK_OP(i, <, p->columns);
    return i;
}

/* How many pairs and rows each rank gets; the ranks of each token, in the order of first choices, stand in token_pair. */
static void count_pairs(const struct pairs *p) {
    clear(p->rank_pair, p->ranks + 1, 0);
    clear(p->rank_row, p->ranks + 1, 0);
    clear(p->token_pair, p->tokens * p->columns, -1);
    for (int64_t s = 0; s < p->tokens; s++) {
        int32_t *ranks = p->token_pair + s * p->columns;
        for (int64_t slot = s * p->choices; slot < (s + 1) * p->choices; slot++) {
            int32_t rank = owner(p, slot);
            int64_t i = find_rank(p, ranks, rank);
            p->rank_pair[rank + 1] += ranks[i] < 0;
            p->rank_row[rank + 1]++;
            ranks[i] = rank;
        }
    }
}

static void place_token(const struct pairs *p, int64_t s) {
    int32_t *ranks = p->token_pair + s * p->columns;
    int64_t begun = 0; /* pairs of this token: those of ranks[0] .. ranks[begun-1], each the last one of its rank */
    for (int64_t slot = s * p->choices; slot < (s + 1) * p->choices; slot++) {
        int32_t rank = owner(p, slot), row = p->rank_row[rank]++;
        if (find_rank(p, ranks, rank) == begun) {
            int32_t pair = p->rank_pair[rank]++;
            p->pair_token[pair] = (int32_t)s;
            p->pair_row[pair] = row;
            begun++;
        }
        p->row_wire[2 * row] = p->rank_pair[rank] - 1;
        p->row_wire[2 * row + 1] = p->expert[slot] - (int32_t)range_part(p->experts, (int)p->ranks, rank).begin;
        p->row_slot[row] = (int32_t)slot;
        p->slot_row[slot] = row;
    }
    for (int64_t i = 0; i < begun; i++)
        ranks[i] = p->rank_pair[ranks[i]] - 1;
}

void ref_route_pairs(struct tensor expert, int64_t expert_count, int rank_count, struct pair_plan plan) {
    struct pairs p = {indices(expert), expert.shape[0], expert.shape[1], plan.token_pair.shape[1], expert_count, rank_count,
                      indices(plan.rank_pair), indices(plan.rank_row), indices(plan.pair_token), indices(plan.pair_row),
                      indices(plan.row_wire), indices(plan.row_slot), indices(plan.slot_row), indices(plan.token_pair)};
    int64_t rows = p.tokens * p.choices;
    CHECK_OP(p.columns, ==, p.choices < p.ranks ? p.choices : p.ranks);
    CHECK(ref_is_1d(plan.rank_pair, p.ranks + 1) && ref_is_1d(plan.rank_row, p.ranks + 1));
    CHECK(ref_is_1d(plan.pair_token, p.tokens * p.columns) && ref_is_1d(plan.pair_row, p.tokens * p.columns + 1));
    CHECK(ref_is_1d(plan.row_wire, 2 * rows) && ref_is_1d(plan.row_slot, rows) && ref_is_1d(plan.slot_row, rows));
    CHECK(ref_is_2d(plan.token_pair, p.tokens, p.columns) && rows <= INT32_MAX);
    count_pairs(&p);
    sum_up(p.rank_pair, p.ranks);
    sum_up(p.rank_row, p.ranks);
    for (int64_t s = 0; s < p.tokens; s++)
        place_token(&p, s);
    step_back(p.rank_pair, p.ranks);
    step_back(p.rank_row, p.ranks);
    p.pair_row[p.rank_pair[p.ranks]] = (int32_t)rows;
    for (int64_t r = 0; r < p.ranks; r++)
        for (int64_t row = p.rank_row[r]; row < p.rank_row[r + 1]; row++)
            p.row_wire[2 * row] -= p.rank_pair[r];
}

/* ---- the side of the experts ----------------------------------------------------------------------------------------- */

static void check_arrivals(const struct arrivals *a) {
    int64_t rows = a->wire.shape[0];
    CHECK(ref_is_2d(a->wire, rows, 2) && ref_is_1d(a->row_wire, rows) && ref_is_1d(a->wire_row, rows));
    CHECK(ref_is_1d(a->row_pair, rows) && ref_is_2d(a->pair_row, a->pair_row.shape[0], a->pair_row.shape[1]));
    CHECK(a->source_row[0] == 0 && a->source_row[a->sources] == rows);
    CHECK(a->source_pair[0] == 0 && a->source_pair[a->sources] == a->pair_row.shape[0]);
}

static void count_arrivals(const struct arrivals *a, int64_t experts, int32_t *offsets) {
    const int32_t *wire = indices(a->wire);
    clear(offsets, experts + 1, 0);
    for (int64_t i = 0; i < a->wire.shape[0]; i++) {
        CHECK(wire[2 * i + 1] >= 0 && wire[2 * i + 1] < experts);
        offsets[wire[2 * i + 1] + 1]++;
    }
    sum_up(offsets, experts);
}

static void place_source(const struct arrivals *a, int source, int32_t *next) {
    const int32_t *wire = indices(a->wire);
    int32_t *row_wire = indices(a->row_wire), *wire_row = indices(a->wire_row), *row_pair = indices(a->row_pair);
    int32_t *pair_row = indices(a->pair_row);
    int64_t columns = a->pair_row.shape[1], last = -1, column = 0;
    for (int64_t i = a->source_row[source]; i < a->source_row[source + 1]; i++) {
        int64_t pair = wire[2 * i] - a->first_pair[source] + a->source_pair[source];
        CHECK(pair >= a->source_pair[source] && pair < a->source_pair[source + 1] && pair >= last);
        column = pair == last ? column + 1 : 0;
        CHECK_OP(column, <, columns);
        int32_t row = next[wire[2 * i + 1]]++;
        row_wire[row] = (int32_t)i;
        wire_row[i] = row;
        row_pair[row] = (int32_t)pair;
        pair_row[pair * columns + column] = row;
        last = pair;
    }
}

void ref_sort_arrivals(struct arrivals a) {
    int64_t experts = tensor_elements(a.offsets) - 1;
    int32_t *offsets = indices(a.offsets);
    check_arrivals(&a);
    count_arrivals(&a, experts, offsets);
    clear(indices(a.pair_row), tensor_elements(a.pair_row), -1);
    for (int source = 0; source < a.sources; source++)
        place_source(&a, source, offsets);
    step_back(offsets, experts);
}
