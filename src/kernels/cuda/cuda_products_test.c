/* Products of bf16 on a CUDA device (or its model) whose operands are aligned, so that the matrix units take them: sizes
 * around and beyond their tiles, every routing, rows gathered and not, several terms, SwiGLU at once. In the device's own
 * memory; results and what lies behind them are copied back and compared with the reference; twice the same bits.
 * The cases of kernels_test.c are mostly too odd for those units. */
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/cuda_testing.h"

static double weight_bound; /* in the place of f32's usual one */

static struct tensor host_tensor(enum dtype dtype, int64_t d0, int64_t d1, int64_t d2, double scale) {
    struct tensor like = d2 > 0 ? tensor_3d(NULL, dtype, d0, d1, d2) : tensor_2d(NULL, dtype, d0, d1);
    return test_random(like, scale);
}

static struct packed packed_on_device(struct tensor w) {
    bool grouped = w.dim_count == 3;
    struct packed p = {NULL, w.dtype, grouped ? w.shape[0] : 1, w.shape[grouped], w.shape[grouped + 1], true};
    p.data = arena_take(&arena, ops->packed_bytes(p));
    ops->pack(on_device(w), p);
    return p;
}

static struct packed packed_for_ref(struct tensor w) {
    return test_packed(kernels_ref(), w, true);
}

static void check(const char *what, struct tensor made, struct tensor expected) {
    struct tensor found = test_tensor(expected);
    double error = 0, norm = 0, worst = 0;
    int64_t at = 0;
    device->copy_to_host(found.data, made.data, tensor_bytes(expected));
    if (!output_guard_holds(made)) {
        print_error("%s: wrote behind its output\n", what);
        failures++;
    }
    for (int64_t i = 0; i < tensor_elements(expected); i++) {
        double difference = test_get(found, i) - test_get(expected, i);
        error += difference * difference;
        norm += test_get(expected, i) * test_get(expected, i);
        if (!(fabs(difference) <= worst))
            worst = fabs(difference), at = i;
    }
    double bound = expected.dtype == DTYPE_BF16 ? 6e-3 : weight_bound > 0 ? weight_bound : 1e-5;
    if (!(sqrt(error) <= bound * sqrt(norm))) {
        int64_t columns = expected.shape[expected.dim_count - 1];
        print_error("%s: relative error %.3g, largest %.3g at row %lld column %lld\n", what, sqrt(error / norm), worst,
                    (long long)(at / columns), (long long)(at % columns));
        failures++;
    }
}

/* The numbers of an output twice made: the same bits. */
static void check_same(const char *what, struct tensor a, struct tensor b) {
    size_t bytes = tensor_bytes(a);
    char *first = memory_must(bytes + 1, 1), *second = memory_must(bytes + 1, 1);
    device->copy_to_host(first, a.data, bytes);
    device->copy_to_host(second, b.data, bytes);
    if (memcmp(first, second, bytes) != 0) {
        print_error("%s: other bits the second time\n", what);
        failures++;
    }
    free(first);
    free(second);
}

struct problem {
    int64_t experts, rows, out, in; /* experts 0: dense */
    enum test_spread spread;
    bool gathers;
};

static struct tensor poisoned(enum dtype dtype, int64_t rows, int64_t columns) {
    return test_tensor(tensor_2d(NULL, dtype, rows, columns));
}

static struct tensor index_for(const struct problem *p, int64_t *stored) {
    *stored = p->gathers ? p->rows / 2 + 1 : p->rows;
    return p->gathers ? test_indices(tensor_1d(NULL, DTYPE_I32, p->rows), *stored) : tensor_none();
}

static struct tensor offsets_for(const struct problem *p) {
    return p->experts > 0 ? test_offsets(p->spread, p->rows, p->experts) : tensor_none();
}

static struct tensor weight_for(const struct problem *p) {
    return p->experts > 0 ? host_tensor(DTYPE_BF16, p->experts, p->out, p->in, 1) : host_tensor(DTYPE_BF16, p->out, p->in, 0, 1);
}

static void label(const struct problem *p, const char *operation, char text[160]) {
    snprintf(text, 160, "%s, %lld experts, %lld rows, %lld x %lld, spread %d%s", operation, (long long)p->experts,
             (long long)p->rows, (long long)p->out, (long long)p->in, (int)p->spread, p->gathers ? ", gathered" : "");
}

static void check_rows_product(const struct problem *p, bool backward, enum dtype dtype, bool accumulate) {
    char what[160];
    int64_t stored;
    struct tensor index = index_for(p, &stored), offsets = offsets_for(p), w = weight_for(p);
    struct tensor x = host_tensor(DTYPE_BF16, stored, backward ? p->out : p->in, 0, 1);
    int64_t columns = backward ? p->in : p->out;
    struct tensor y = accumulate ? host_tensor(dtype, p->rows, columns, 0, 1) : poisoned(dtype, p->rows, columns);
    label(p, backward ? "input gradient" : "forward", what);
    struct tensor first = output_on_device(y), second = output_on_device(y);
    struct tensor dx = on_device(x), di = on_device(index), doff = on_device(offsets);
    struct packed dw = packed_on_device(w), rw = packed_for_ref(w);
    for (int i = 0; i < 2; i++)
        (backward ? ops->product_backward_input : ops->product_forward)(dx, di, doff, dw, i ? second : first, accumulate);
    const struct kernel_ops *ref = kernels_ref();
    (backward ? ref->product_backward_input : ref->product_forward)(x, index, offsets, rw, y, accumulate);
    check(what, first, y);
    check_same(what, first, second);
}

static void check_weight(const struct problem *p, bool gathers_dy, bool accumulate) {
    char what[160];
    int64_t stored;
    struct tensor index = index_for(p, &stored), offsets = offsets_for(p), none = tensor_none();
    struct tensor dy = host_tensor(DTYPE_BF16, gathers_dy ? stored : p->rows, p->out, 0, 1);
    struct tensor x = host_tensor(DTYPE_BF16, gathers_dy ? p->rows : stored, p->in, 0, 1);
    struct tensor dw = p->experts > 0 ? host_tensor(DTYPE_F32, p->experts, p->out, p->in, 1)
                                      : host_tensor(DTYPE_F32, p->out, p->in, 0, 1);
    if (!accumulate)
        memset(dw.data, TEST_POISON, tensor_bytes(dw));
    label(p, gathers_dy ? "weight gradient, dy" : "weight gradient, x", what);
    struct tensor first = output_on_device(dw), second = output_on_device(dw);
    struct tensor ddy = on_device(dy), dx = on_device(x), di = on_device(index), doff = on_device(offsets);
    for (int i = 0; i < 2; i++)
        ops->product_backward_weight(ddy, gathers_dy ? di : none, dx, gathers_dy ? none : di, doff, i ? second : first,
                                     accumulate);
    kernels_ref()->product_backward_weight(dy, gathers_dy ? index : none, x, gathers_dy ? none : index, offsets, dw, accumulate);
    check(what, first, dw);
    check_same(what, first, second);
}

static void check_swiglu(const struct problem *p) {
    char what[160];
    int64_t stored;
    struct tensor index = index_for(p, &stored), offsets = offsets_for(p), wg = weight_for(p), wu = weight_for(p);
    double scale = 1 / sqrt((double)p->in);
    struct tensor x = host_tensor(DTYPE_BF16, stored, p->in, 0, scale);
    struct tensor weight = test_random(tensor_1d(NULL, DTYPE_F32, p->rows), 1);
    struct tensor gate = poisoned(DTYPE_BF16, p->rows, p->out), up = poisoned(DTYPE_BF16, p->rows, p->out);
    struct tensor act = poisoned(DTYPE_BF16, p->rows, p->out);
    label(p, "swiglu", what);
    struct tensor dg = output_on_device(gate), du = output_on_device(up), da = output_on_device(act);
    ops->product_swiglu_forward(on_device(x), on_device(index), on_device(offsets), packed_on_device(wg), packed_on_device(wu),
                                on_device(weight), dg, du, da);
    const struct kernel_ops *ref = kernels_ref();
    ref->product_forward(x, index, offsets, packed_for_ref(wg), gate, false);
    ref->product_forward(x, index, offsets, packed_for_ref(wu), up, false);
    ref->swiglu_forward(gate, up, weight, act);
    check(what, dg, gate);
    check(what, du, up);
    check(what, da, act);
}

static void check_swiglu_backward(const struct problem *p) {
    char what[160];
    int64_t stored;
    struct tensor index = index_for(p, &stored), offsets = offsets_for(p), w = weight_for(p);
    struct tensor dy = host_tensor(DTYPE_BF16, stored, p->out, 0, 1 / sqrt((double)p->out));
    struct tensor weight = test_random(tensor_1d(NULL, DTYPE_F32, p->rows), 1), dweight = poisoned(DTYPE_F32, p->rows, 1);
    struct tensor gate = host_tensor(DTYPE_BF16, p->rows, p->in, 0, 1), up = host_tensor(DTYPE_BF16, p->rows, p->in, 0, 1);
    struct tensor act = poisoned(DTYPE_BF16, p->rows, p->in), dact = poisoned(DTYPE_F32, p->rows, p->in);
    label(p, "swiglu backward", what);
    struct tensor dg = output_on_device(gate), du = output_on_device(up), da = output_on_device(act);
    struct tensor dw = output_on_device(dweight);
    ops->product_swiglu_backward(on_device(dy), on_device(index), on_device(offsets), packed_on_device(w), dg, du,
                                 on_device(weight), da, output_on_device(act), dw);
    const struct kernel_ops *ref = kernels_ref();
    ref->swiglu_forward(gate, up, weight, act);
    ref->product_backward_input(dy, index, offsets, packed_for_ref(w), dact, false);
    struct tensor gate32 = test_copy(gate, DTYPE_F32), up32 = test_copy(up, DTYPE_F32);
    ref->swiglu_backward(dact, gate32, up32, weight, gate32, up32, dweight);
    check(what, da, act);
    check(what, dg, test_copy(gate32, DTYPE_BF16));
    check(what, du, test_copy(up32, DTYPE_BF16));
    weight_bound = 4e-3; /* of dact rounded on the way, where that is done */
    check(what, dw, dweight);
    weight_bound = 0;
}

static void check_terms(const struct problem *p) {
    char what[160];
    struct tensor offsets = offsets_for(p), dx = poisoned(DTYPE_F32, p->rows, p->in);
    struct product_term terms[PRODUCT_TERMS_MAX];
    label(p, "several terms", what);
    struct tensor ddx = output_on_device(dx);
    for (int i = 0; i < PRODUCT_TERMS_MAX; i++) {
        struct problem part = *p;
        part.out = p->out / (i + 1) / 8 * 8;
        struct tensor dy = host_tensor(DTYPE_BF16, p->rows, part.out, 0, 1), w = weight_for(&part);
        terms[i] = (struct product_term){on_device(dy), packed_on_device(w)};
        kernels_ref()->product_backward_input(dy, tensor_none(), offsets, packed_for_ref(w), dx, i > 0);
    }
    ops->product_backward_inputs(terms, PRODUCT_TERMS_MAX, on_device(offsets), ddx, false);
    check(what, ddx, dx);
}

static void check_onto(const struct problem *p) {
    char what[160];
    struct tensor x = host_tensor(DTYPE_BF16, p->rows, p->in, 0, 1), w = weight_for(p), none = tensor_none();
    struct tensor base = host_tensor(DTYPE_F32, p->rows, p->out, 0, 1), y = poisoned(DTYPE_F32, p->rows, p->out);
    label(p, "onto", what);
    struct tensor first = output_on_device(y), second = output_on_device(y), dx = on_device(x), dbase = on_device(base);
    struct packed dw = packed_on_device(w);
    ops->product_forward_onto(dx, dw, dbase, first);
    ops->product_forward_onto(dx, dw, dbase, second);
    kernels_ref()->product_forward(x, none, none, packed_for_ref(w), base, true);
    check(what, first, base);
    check_same(what, first, second);
}

static void check_problem(const struct problem *p) {
    static const enum dtype outputs[] = {DTYPE_BF16, DTYPE_F32, DTYPE_F32};
    for (int i = 0; i < 3; i++) {
        check_rows_product(p, false, outputs[i], i == 2);
        check_rows_product(p, true, outputs[i], i == 2);
    }
    for (int i = 0; i < 4; i++)
        check_weight(p, i & 1, i & 2);
    check_swiglu(p);
    check_swiglu_backward(p);
    if (!p->gathers)
        check_terms(p);
    if (!p->gathers && p->experts == 0)
        check_onto(p);
    arena_rewind(&arena, 0);
    test_release();
}

static const struct problem shapes[] = {
    {0, 128, 256, 64, 0, false},  {0, 256, 512, 128, 0, false}, {0, 300, 264, 200, 0, false}, {0, 1, 8, 8, 0, false},
    {1, 129, 136, 72, 0, false},  {3, 515, 280, 88, 0, false},  {8, 700, 256, 192, 0, false}, {8, 1300, 96, 320, 0, false},
    {64, 900, 64, 128, 0, false}, {5, 64, 520, 64, 0, false},   {2, 2100, 128, 264, 0, false},
    {0, 8, 40, 1032, 0, false},   {0, 30, 40, 264, 0, false},   {8, 12, 48, 264, 0, false}, {64, 60, 24, 72, 0, false},
    {0, 4200, 72, 64, 0, false}, /* rows enough for a weight gradient in parts */
    {0, 90, 264, 520, 0, false},  {0, 100, 72, 520, 0, false}, {0, 110, 72, 520, 0, false}, /* 520: a block beside has none */
};

#ifdef __SANITIZE_ADDRESS__
static const bool is_sanitized = true;
#else
static const bool is_sanitized = false;
#endif

/* On the model only the smaller ones, under a checker of memory (CADRE_TEST_FEW=1), which takes long over each, a few of those. Of
 * two cases that follow each other one gathers: what is taken of them is every third or fifth, not every other. */
static bool is_for(const struct kernel_ops *the_ops, const struct problem *p, int number) {
    bool takes_few = is_sanitized || getenv("CADRE_TEST_FEW") != NULL;
    bool takes_small = takes_few || strcmp(the_ops->name, "cudamodel") == 0;
    return (!takes_small || p->rows * p->out * p->in < 15 << 20) && number % (takes_few ? 5 : takes_small ? 3 : 1) == 0;
}

static void test_products(void **state) {
    (void)state;
    int number = 0;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int spread = 0; spread < (shapes[i].experts > 0 ? SPREAD_COUNT : 1); spread++)
            for (int gathers = 0; gathers < 2; gathers++) {
                struct problem p = shapes[i];
                p.spread = (enum test_spread)spread;
                p.gathers = gathers;
                if (is_for(ops, &p, number++))
                    check_problem(&p);
            }
    assert_int_equal(failures, 0);
    expect_kernels("THROUGH_SWIGLU", "sm90", true);
    expect_kernels("BESIDE", "beside", true);
    expect_kernels("ROWS_OF_B", "right", true);
    expect_kernels("multiply_few", "tiles", false);
}

/* ---- the schedule of weight gradients ---- */

#if defined(CADRE_CUDA) || defined(CADRE_CUDA_MODEL)

enum { GROUPS_MOST = 256 };

struct routing {
    int groups, clusters, m, column_tiles;
    int64_t rows;
    double skew;      /* the rows of the first group beside another's */
    bool has_empty;   /* every third group has none */
    double share_min; /* that all clusters are busy of the time that the last one takes */
};

/* Of 64 rows; the end of a tile takes as long as five. */
static double blocks_of(const int32_t *offset, int group) {
    return (offset[group + 1] - offset[group] + 63) / 64 + 5;
}

static void route(const struct routing *r, int32_t *offset) {
    double share[GROUPS_MOST], sum = 0, before = 0;
    for (int g = 0; g < r->groups; g++)
        sum += share[g] = r->has_empty && g % 3 == 1 ? 0 : (g == 0 ? r->skew : 1) * (0.8 + 0.4 * random_uniform(8, 0, (uint64_t)g));
    offset[0] = 0;
    for (int g = 0; g < r->groups; g++) {
        before += share[g];
        offset[g + 1] = (int32_t)lround((double)r->rows * before / sum);
    }
}

/* Every tile is taken once, by both blocks of one cluster, and nobody is left to work long alone. */
static void check_schedule(const struct routing *r) {
    enum { CLUSTERS = 96 };
    int of_group = (r->m + 255) / 256 * r->column_tiles, tiles = of_group * r->groups;
    int32_t offset[GROUPS_MOST + 1];
    double load[CLUSTERS] = {0}, all = 0, most = 0;
    route(r, offset);
    struct tensor offsets = test_tensor(tensor_1d(NULL, DTYPE_I32, r->groups + 1));
    memcpy(offsets.data, offset, tensor_bytes(offsets));
    struct tensor told = test_filled(tensor_2d(NULL, DTYPE_I32, 4, tiles), 0), made = output_on_device(told);
    int32_t *times = made.data;
    cuda_tell_tiles(on_device(offsets).data, r->groups, r->m, r->column_tiles, r->clusters, times, times + tiles,
                    times + 3 * tiles);
    device->copy_to_host(told.data, made.data, tensor_bytes(told));
    assert_true(output_guard_holds(made));
    const int32_t *t = told.data, *owner = t + tiles, *group = t + 3 * tiles;
    for (int i = 0; i < tiles; i++) {
        assert_int_equal(t[i], 2);
        assert_int_equal(owner[i], owner[tiles + i]);
        assert_in_range(owner[i], 0, r->clusters - 1);
        assert_in_range(group[i], 0, r->groups - 1);
        load[owner[i]] += blocks_of(offset, group[i]);
        all += blocks_of(offset, group[i]);
    }
    for (int c = 0; c < r->clusters; c++)
        most = fmax(most, load[c]);
    if (all / r->clusters / most < r->share_min)
        fail_msg("%d groups, skew %g: clusters are busy for %.3f of the time", r->groups, r->skew, all / r->clusters / most);
    arena_rewind(&arena, 0);
    test_release();
}

static void test_schedule(void **state) {
    (void)state;
    static const struct routing routings[] = {
        {64, 66, 2048, 4, 262144, 10, false, 0.99}, {64, 66, 2048, 4, 262144, 1, false, 0.97},
        {8, 66, 4096, 8, 65536, 10, false, 0.95},   {128, 66, 1024, 6, 262144, 3, true, 0.98},
        {256, 72, 300, 1, 70000, 30, true, 0.37},   {1, 66, 700, 3, 5000, 1, false, 0},
        {5, 7, 256, 1, 100, 2, false, 0},           {3, 96, 512, 30, 6000, 4, true, 0.65},
    };
    for (size_t i = 0; i < sizeof routings / sizeof *routings; i++)
        if (!is_sanitized || routings[i].groups < 128) /* those take the model half a minute there */
            check_schedule(&routings[i]);
}

#else

static void test_schedule(void **state) {
    (void)state;
}

#endif

/* Names that no kernels have are refused, and what was taken before stays. */
static void test_names(void) {
    static const char *const none[] = {"", "sm9", "sm901", "sm90-", "sm90-no", "sm90--tiles", "sm80-beside", "tiles2", "auto-tiles",
                                       "sm90-tiles-tiles", "sm90-ahead-ahead2", "sm90-ahead2-ahead"};
    for (size_t i = 0; i < sizeof none / sizeof *none; i++) {
        const struct kernel_ops *chosen = NULL;
        assert_int_equal(kernels_choose_for(device, none[i], &chosen), STATUS_USAGE);
        assert_null(chosen);
    }
}

static void test_if_there_is_one(void **state) {
    if (!device)
        return;
    test_names();
    if (!getenv("CADRE_TEST_KERNELS")) /* it is the same for all kernels */
        test_schedule(state);
    test_products(state);
}

int main(void) {
    static const struct CMUnitTest tests[] = {cmocka_unit_test(test_if_there_is_one)};
    return cmocka_run_group_tests(tests, find_device, leave_device);
}
