/* What a rank holds of the models that speeds are stated for, over every mesh of up to eight ranks. */
#include "parallel/layout_choice.h"
#include "train/run_config.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <cmocka.h>

enum { RANKS_MAX = 8, STATES = 4 /* weight, gradient, two moments */ };

static void read_preset(const char *name, struct run_config *c, struct parameter_table *table) {
    run_config_init(c);
    assert_int_equal(preset_apply(c, name), STATUS_OK);
    c->model.vocab_size = c->data.vocab_size;
    assert_int_equal(run_config_check(c), STATUS_OK);
    assert_int_equal(parameter_table_init(table, &c->model), STATUS_OK);
}

/* Elements of what is kept from step to step, each as its stage says. */
static double held_elements(const struct sharding *s, const struct parameter_table *table) {
    double elements = 0;
    for (int i = 0; i < table->count; i++) {
        const struct parameter *row = &table->rows[i];
        struct layout own = sharding_own_layout(s, row), compute = sharding_compute_layout(row);
        struct parameter_part mine = sharding_part(s, row, &own), whole = sharding_part(s, row, &compute);
        int divided = s->zero == 0 ? 0 : s->zero + 1; /* of the four states */
        elements += divided * (double)parameter_part_elements(&mine);
        elements += (STATES - divided) * (double)parameter_part_elements(&whole);
    }
    return elements;
}

static void check_mesh(const struct run_config *c, const struct parameter_table *table, const int *size) {
    int ranks = size[MESH_SHARD] * size[MESH_EXPERT];
    bool even = c->model.num_experts % size[MESH_EXPERT] == 0;
    struct layout_facts facts = {.ranks = ranks};
    layout_facts_of_model(&facts, table, &c->model, DTYPE_F32);
    for (int zero = 0; zero <= 3; zero++) {
        double sum = 0, most = 0, expected = 0;
        for (int rank = 0; rank < ranks; rank++) {
            struct sharding s = {mesh_make(size, rank), zero};
            double held = held_elements(&s, table);
            sum += held;
            most = fmax(most, held);
            expected = layout_state_bytes(&s, &facts) / 4;
        }
        double all = STATES * (double)(facts.dense_elements + facts.expert_elements);
        assert_true(fabs(sum / ranks - expected) <= 1e-3 * expected);
        if (zero == 3) {
            assert_true(sum == all); /* each element is owned once */
            assert_true(!even || most <= 1.05 * all / ranks);
        }
        if (even)
            assert_true(most <= 1.05 * expected);
    }
}

static void test_state_is_divided(void **state) {
    (void)state;
    static const char *const presets[] = {"demo", "bench", "bench-dense"};
    for (int p = 0; p < 3; p++) {
        struct run_config c;
        struct parameter_table table;
        read_preset(presets[p], &c, &table);
        for (int shard = 1; shard <= RANKS_MAX; shard++)
            for (int expert = 1; expert * shard <= RANKS_MAX; expert++) {
                const int size[MESH_AXIS_COUNT] = {1, 1, shard, expert};
                if (expert == 1 || expert <= c.model.num_experts)
                    check_mesh(&c, &table, size);
            }
        parameter_table_release(&table);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_state_is_divided)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
