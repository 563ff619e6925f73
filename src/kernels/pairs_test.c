/* What an exchange of rows between ranks asks of the kernels, against what the words of kernels.h say: plans of pairs,
 * the order of arrivals, rows gathered and combined. */
#include "kernels/kernels_testing.h"
#include "tensor/mesh.h"

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

static void for_all_backends(void (*check)(const struct kernel_ops *ops)) {
    for (const struct kernel_ops *const *ops = test_backends(); *ops; ops++) {
        check(*ops);
        assert_true(test_guards_hold());
        test_release();
    }
}

static struct tensor make(enum dtype dtype, int64_t d0, int64_t d1) {
    return test_tensor(tensor_2d(NULL, dtype, d0, d1));
}

static int at(struct tensor t, int64_t i) {
    return ((const int32_t *)t.data)[i];
}

/* K different experts of E for each token; even tokens are alike. */
static struct tensor random_experts(int64_t tokens, int64_t choices, int64_t experts, uint64_t seed) {
    struct tensor t = make(DTYPE_I32, tokens, choices);
    for (int64_t i = 0; i < tokens * choices; i++) {
        uint64_t token = (uint64_t)(i / choices);
        test_set(t, i, (double)random_permute(seed, token % 2 ? token : 0, (uint64_t)experts, (uint64_t)(i % choices)));
    }
    return t;
}

static struct pair_plan make_plan(int64_t tokens, int64_t choices, int ranks) {
    int64_t columns = choices < ranks ? choices : ranks, n = tokens * choices;
    return (struct pair_plan){make(DTYPE_I32, ranks + 1, 1), make(DTYPE_I32, ranks + 1, 1),
                              make(DTYPE_I32, tokens * columns, 1), make(DTYPE_I32, tokens * columns + 1, 1),
                              make(DTYPE_I32, n, 2), make(DTYPE_I32, n, 1), make(DTYPE_I32, tokens, choices),
                              make(DTYPE_I32, tokens, columns)};
}

static int owner_of(int64_t experts, int ranks, int expert) {
    for (int r = 0; r < ranks; r++) {
        struct range range = range_part(experts, ranks, r);
        if (expert >= range.begin && expert < range.end)
            return r;
    }
    return -1;
}

static void test_range_owner(void **state) {
    (void)state;
    for (int64_t total = 1; total < 40; total++)
        for (int parts = 1; parts < 50; parts++)
            for (int64_t i = 0; i < total; i++)
                assert_int_equal(range_owner(total, parts, i), owner_of(total, parts, (int)i));
}

/* The plan, step by step as a reader would make it: for each rank, each token, each choice. */
static void check_plan(struct tensor expert, int64_t experts, int ranks, const struct pair_plan *plan) {
    int64_t tokens = expert.shape[0], choices = expert.shape[1], columns = plan->token_pair.shape[1];
    int pair = 0, row = 0;
    for (int r = 0; r < ranks; r++) {
        int first = pair;
        assert_int_equal(at(plan->rank_pair, r), pair);
        assert_int_equal(at(plan->rank_row, r), row);
        for (int64_t s = 0; s < tokens; s++) {
            int rows = 0;
            for (int64_t slot = s * choices; slot < (s + 1) * choices; slot++) {
                if (owner_of(experts, ranks, at(expert, slot)) != r)
                    continue;
                if (rows++ == 0) {
                    assert_int_equal(at(plan->pair_token, pair), s);
                    assert_int_equal(at(plan->pair_row, pair), row);
                    pair++;
                }
                assert_int_equal(at(plan->row_wire, 2 * row), pair - 1 - first);
                assert_int_equal(at(plan->row_wire, 2 * row + 1), at(expert, slot) - range_part(experts, ranks, r).begin);
                assert_int_equal(at(plan->row_slot, row), slot);
                assert_int_equal(at(plan->slot_row, slot), row++);
            }
        }
    }
    assert_int_equal(at(plan->rank_pair, ranks), pair);
    assert_int_equal(at(plan->rank_row, ranks), row);
    assert_int_equal(at(plan->pair_row, pair), row);
    for (int64_t s = 0; s < tokens; s++) {
        int64_t last = -1, count = 0; /* pairs of a token: those of its first choice, its first choice elsewhere, .. */
        for (int64_t i = 0; i < columns && at(plan->token_pair, s * columns + i) >= 0; i++, count++) {
            int p = at(plan->token_pair, s * columns + i), slot = at(plan->row_slot, at(plan->pair_row, p));
            assert_int_equal(at(plan->pair_token, p), s);
            assert_true(slot > last);
            last = slot;
        }
        int64_t distinct = 0;
        for (int r = 0; r < ranks; r++) {
            bool is_used = false;
            for (int64_t k = 0; k < choices; k++)
                is_used |= owner_of(experts, ranks, at(expert, s * choices + k)) == r;
            distinct += is_used;
        }
        assert_int_equal(count, distinct);
    }
}

/* Those of processors have it from the reference, as it is. */
static bool has_own_plans(const struct kernel_ops *ops) {
    return strcmp(ops->name, "ref") == 0 || test_is_cuda(ops);
}

static void check_plans(const struct kernel_ops *ops) {
    if (!has_own_plans(ops))
        return;
    int64_t number = 0;
    for (int ranks = 1; ranks <= 9; ranks++)
        for (int64_t experts = 1; experts <= 8; experts++)
            for (int64_t choices = 1; choices <= experts; choices++)
                for (int64_t tokens = 0; tokens <= 17; tokens = 3 * tokens + 2) {
                    if (!test_takes(ops, number++ / 2))
                        continue;
                    struct tensor expert = random_experts(tokens, choices, experts, (uint64_t)(ranks * 100 + experts));
                    struct pair_plan plan = make_plan(tokens, choices, ranks);
                    ops->route_pairs(expert, experts, ranks, plan);
                    check_plan(expert, experts, ranks, &plan);
                    assert_true(test_guards_hold());
                    test_release();
                }
}

static void check_large_plan(const struct kernel_ops *ops) {
    if (!has_own_plans(ops))
        return;
    struct tensor expert = random_experts(5003, 4, 37, 5);
    struct pair_plan plan = make_plan(5003, 4, 6);
    ops->route_pairs(expert, 37, 6, plan);
    check_plan(expert, 37, 6, &plan);
}

static void test_plans(void **state) {
    (void)state;
    for_all_backends(check_plans);
    for_all_backends(check_large_plan);
}

/* What `sources` ranks of `tokens` tokens each send rank `to`, joined: wire, and the tables of struct arrivals. */
struct delivery {
    int64_t source_row[10], source_pair[10], first_pair[10];
    struct tensor wire;
    int64_t pairs, rows;
};

/* Of each source the pairs range_part(n, rounds, round). */
static struct delivery deliver(int sources, int to, int64_t tokens, int64_t choices, int64_t experts, int rounds,
                               int round) {
    struct delivery d = {{0}, {0}, {0}, make(DTYPE_I32, sources * tokens * choices, 2), 0, 0};
    for (int s = 0; s < sources; s++) {
        struct tensor expert = random_experts(s == 1 ? 0 : tokens, choices, experts, (uint64_t)s);
        struct pair_plan plan = make_plan(expert.shape[0], choices, sources);
        kernels_ref()->route_pairs(expert, experts, sources, plan);
        int first = at(plan.rank_pair, to), pairs = at(plan.rank_pair, to + 1) - first;
        struct range mine = range_part(pairs, rounds, round);
        int begin = at(plan.pair_row, first + mine.begin), end = at(plan.pair_row, first + mine.end);
        for (int i = 2 * begin; i < 2 * end; i++)
            test_set(d.wire, 2 * d.rows + i - 2 * begin, at(plan.row_wire, i));
        d.first_pair[s] = mine.begin;
        d.rows += end - begin;
        d.pairs += range_count(mine);
        d.source_row[s + 1] = d.rows;
        d.source_pair[s + 1] = d.pairs;
    }
    d.wire = tensor_rows(d.wire, 0, d.rows);
    return d;
}

static void check_arrivals(const struct arrivals *a, int64_t experts) {
    int row = 0;
    int64_t columns = a->pair_row.shape[1];
    for (int e = 0; e < experts; e++) {
        assert_int_equal(at(a->offsets, e), row);
        for (int s = 0; s < a->sources; s++)
            for (int64_t i = a->source_row[s]; i < a->source_row[s + 1]; i++) {
                if (at(a->wire, 2 * i + 1) != e)
                    continue;
                assert_int_equal(at(a->row_wire, row), i);
                assert_int_equal(at(a->wire_row, i), row);
                assert_int_equal(at(a->row_pair, row), at(a->wire, 2 * i) - a->first_pair[s] + a->source_pair[s]);
                row++;
            }
    }
    assert_int_equal(at(a->offsets, experts), row);
    int64_t i = 0; /* pairs have their rows in the order of arrival, all of them */
    for (int64_t p = 0; p < a->pair_row.shape[0]; p++)
        for (int64_t c = 0; c < columns; c++) {
            bool is_next = i < a->wire.shape[0] && at(a->row_pair, at(a->wire_row, i)) == p;
            assert_int_equal(at(a->pair_row, p * columns + c), is_next ? at(a->wire_row, i++) : -1);
        }
    assert_int_equal(i, a->wire.shape[0]);
}

static void check_all_arrivals(const struct kernel_ops *ops) {
    if (!has_own_plans(ops))
        return;
    int64_t number = 0;
    for (int sources = 1; sources <= 8; sources++)
        for (int64_t experts = 1; experts <= 9; experts += 2)
            for (int64_t choices = 1; choices <= experts; choices++)
                for (int to = 0; to < sources; to++)
                    for (int rounds = 1; rounds <= 3; rounds++) {
                        if (!test_takes(ops, number++ / 4))
                            continue;
                        struct delivery d = deliver(sources, to, 7, choices, experts, rounds, rounds / 2);
                        int64_t local = range_count(range_part(experts, sources, to));
                        struct arrivals a = {sources, d.source_row, d.source_pair, d.first_pair, d.wire,
                                             make(DTYPE_I32, local + 1, 1), make(DTYPE_I32, d.rows, 1),
                                             make(DTYPE_I32, d.rows, 1), make(DTYPE_I32, d.rows, 1),
                                             make(DTYPE_I32, d.pairs, choices < local ? choices : local)};
                        ops->sort_arrivals(a);
                        check_arrivals(&a, local);
                        assert_true(test_guards_hold());
                        test_release();
                    }
}

static void test_arrivals(void **state) {
    (void)state;
    for_all_backends(check_all_arrivals);
}

static void check_gather(const struct kernel_ops *ops) {
    static const enum dtype dtypes[] = {DTYPE_F32, DTYPE_BF16, DTYPE_F64};
    static const int64_t widths[] = {1, 3, 16, 33, 700}, counts[] = {0, 1, 5, 130};
    for (int i = 0; i < 3 * 5 * 4; i++) {
        int64_t width = widths[i / 3 % 5], count = counts[i / 15];
        if (!test_knows(ops, dtypes[i % 3]))
            continue;
        struct tensor from = test_random(tensor_2d(NULL, dtypes[i % 3], 40, width), 1);
        struct tensor index = test_indices(tensor_1d(NULL, DTYPE_I32, count), 40), to = make(dtypes[i % 3], count, width);
        ops->gather_rows(from, index, to);
        for (int64_t j = 0; j < count * width; j++)
            assert_true(test_get(to, j) == test_get(from, at(index, j / width) * width + j % width));
    }
    struct tensor from = test_indices(tensor_1d(NULL, DTYPE_I32, 50), 1 << 30), to = make(DTYPE_I32, 70, 1);
    struct tensor index = test_indices(tensor_1d(NULL, DTYPE_I32, 70), 50);
    ops->gather_scalars(from, index, to);
    for (int i = 0; i < 70; i++)
        assert_int_equal(at(to, i), at(from, at(index, i)));
}

static void test_gather(void **state) {
    (void)state;
    for_all_backends(check_gather);
}

/* Without its negative places, a sum has the bits of one that never had them. */
static void check_absent_rows(const struct kernel_ops *ops) {
    static const enum dtype dtypes[] = {DTYPE_F32, DTYPE_BF16, DTYPE_F64};
    for (int i = 0; i < 18; i++) {
        int64_t tokens = 1 + 7 * (i / 3), width = i % 2 ? 37 : 80;
        enum dtype dtype = dtypes[i % 3];
        if (!test_knows(ops, dtype))
            continue;
        struct tensor rows = test_random(tensor_2d(NULL, dtype, 30, width), 1);
        struct tensor sparse = make(DTYPE_I32, tokens, 4), dense = test_indices(tensor_2d(NULL, DTYPE_I32, tokens, 2), 30);
        for (int64_t s = 0; s < tokens; s++)
            for (int64_t k = 0, taken = 0; k < 4; k++) {
                bool here = taken < 2 && (k >= 2 + taken || random_bits(1, (uint64_t)i, (uint64_t)(4 * s + k)) % 2);
                test_set(sparse, 4 * s + k, here ? at(dense, 2 * s + taken) : -1 - (int)k);
                taken += here;
            }
        for (int accumulate = 0; accumulate < 2; accumulate++) {
            struct tensor y = test_filled(tensor_2d(NULL, dtype, tokens, width), 0.5), z = test_copy(y, dtype);
            ops->combine_rows(rows, sparse, y, accumulate);
            ops->combine_rows(rows, dense, z, accumulate);
            assert_memory_equal(y.data, z.data, tensor_bytes(y));
        }
    }
    struct tensor none = test_filled(tensor_2d(NULL, DTYPE_I32, 3, 2), -1), y = make(DTYPE_F32, 3, 9);
    ops->combine_rows(make(DTYPE_F32, 0, 9), none, y, false);
    for (int i = 0; i < 27; i++)
        assert_true(test_get(y, i) == 0);
}

static void test_absent_rows(void **state) {
    (void)state;
    for_all_backends(check_absent_rows);
}

static void check_integer_sum(const struct kernel_ops *ops) {
    struct tensor x = test_indices(tensor_1d(NULL, DTYPE_I32, 77), 1 << 29), y = test_copy(x, DTYPE_I32);
    ops->add(x, y);
    for (int i = 0; i < 77; i++)
        assert_int_equal(at(y, i), 2 * at(x, i)); /* beyond what a float tells apart */
}

static void test_integer_sum(void **state) {
    (void)state;
    for_all_backends(check_integer_sum);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_range_owner), cmocka_unit_test(test_plans),       cmocka_unit_test(test_arrivals),
        cmocka_unit_test(test_gather),      cmocka_unit_test(test_absent_rows), cmocka_unit_test(test_integer_sum),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
