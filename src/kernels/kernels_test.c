/* Cases of products and of what walks over numbers, in every backend; how they are run: kernels_cases_testing.h. */
#include "kernels/kernels_cases_testing.h"

/* ---- products ---- */

static void make_gemm(const struct kernel_ops *ops, const struct call *call, const struct tensor *t) {
    ops->gemm(t[0], call->transpose_a, t[1], call->transpose_b, t[2], call->accumulate);
}

static void case_gemm(int64_t m, int64_t n, int64_t k, int form, struct dtype_pair dtypes, double a_scale,
                      double b_scale, const char *label) {
    struct call call = {.operation = "gemm",
                        .label = label,
                        .make = make_gemm,
                        .transpose_a = form & 1,
                        .transpose_b = form & 2,
                        .accumulate = form & 4};
    call.magnitude = sqrt((double)k) * a_scale * b_scale;
    add_in(&call, "a", test_random(form & 1 ? make_2d(dtypes.in, k, m) : make_2d(dtypes.in, m, k), a_scale));
    add_in(&call, "b", test_random(form & 2 ? make_2d(dtypes.in, n, k) : make_2d(dtypes.in, k, n), b_scale));
    add_out_or_sum(&call, "c", make_2d(dtypes.out, m, n), a_scale * b_scale);
    run(&call);
}

static void test_gemm(void **state) {
    (void)state;
    for (int i = 0; i < ODD_SIZES; i++)
        for (int form = 0; form < 8; form++) {
            int64_t m = odd_sizes[i], n = odd_sizes[(i * 4 + form * 3) % ODD_SIZES];
            int64_t k = odd_sizes[(i * 7 + form * 2 + 5) % ODD_SIZES];
            for (int d = 0; d < PRODUCT_DTYPES; d++)
                case_gemm(m, n, k, form, product_dtypes[d], 1, 1, "odd sizes");
        }
    for (int d = 0; d < PRODUCT_DTYPES; d++)
        for (int form = 0; form < 8; form++) {
            case_gemm(0, 5, 7, form, product_dtypes[d], 1, 1, "M = 0");
            case_gemm(5, 0, 7, form, product_dtypes[d], 1, 1, "N = 0");
            case_gemm(5, 7, 0, form, product_dtypes[d], 1, 1, "K = 0");
            case_gemm(17, 33, 65, form, product_dtypes[d], 0, 1, "zeros");
            case_gemm(17, 33, 65, form, product_dtypes[d], 1e-20, 1, "tiny");
            case_gemm(17, 33, 65, form, product_dtypes[d], 1e18, 1e16, "large");
            case_gemm(130, 70, 530, form, product_dtypes[d], 1, 1, "several blocks");
        }
    expect_no_failures();
}

/* Two dtypes only where a backend takes them. */
static void make_narrow(const struct kernel_ops *ops, const struct call *call, const struct tensor *t) {
    bool widen = t[0].dtype != t[1].dtype && !ops->gemm_mixes_dtypes;
    struct tensor a = widen ? test_copy(t[0], real_of[t[0].dtype]) : t[0], b = widen ? test_copy(t[1], real_of[t[1].dtype]) : t[1];
    ops->gemm(a, call->transpose_a, b, call->transpose_b, t[2], call->accumulate);
}

/* One side is that of the experts: what a router multiplies. form: as in case_gemm, without the bit of accumulate. */
struct narrow {
    int form;
    int64_t m, n, k;
    enum dtype a, b, c;
};
static const struct narrow narrow_products[] = {
    {2, 515, 8, 256, DTYPE_BF16, DTYPE_F32, DTYPE_F32},  {2, 601, 13, 2056, DTYPE_BF16, DTYPE_F32, DTYPE_F32},
    {2, 512, 1, 520, DTYPE_F32, DTYPE_F32, DTYPE_F32},   {2, 514, 65, 264, DTYPE_BF16, DTYPE_BF16, DTYPE_BF16},
    {1, 8, 264, 700, DTYPE_F32, DTYPE_BF16, DTYPE_F32},  {1, 13, 1032, 515, DTYPE_F32, DTYPE_BF16, DTYPE_F32},
    {1, 1, 256, 3001, DTYPE_F32, DTYPE_F32, DTYPE_F32},  {1, 64, 256, 1100, DTYPE_BF16, DTYPE_BF16, DTYPE_F32},
    {0, 515, 264, 8, DTYPE_F32, DTYPE_F32, DTYPE_F32},   {0, 520, 520, 131, DTYPE_F32, DTYPE_F32, DTYPE_F32},
    {0, 513, 1032, 1, DTYPE_BF16, DTYPE_F32, DTYPE_F32}, {0, 512, 256, 64, DTYPE_BF16, DTYPE_BF16, DTYPE_F32},
};
enum { NARROW_PRODUCTS = sizeof narrow_products / sizeof *narrow_products, PLACES = 5 };

/* The router's logits of a few tokens, aligned. */
static const struct narrow few_products[] = {
    {2, 1, 8, 2056, DTYPE_BF16, DTYPE_F32, DTYPE_F32}, {2, 7, 64, 264, DTYPE_BF16, DTYPE_F32, DTYPE_F32},
    {2, 8, 13, 520, DTYPE_F32, DTYPE_F32, DTYPE_F32},  {2, 9, 8, 520, DTYPE_BF16, DTYPE_F32, DTYPE_F32},
    {2, 20, 33, 520, DTYPE_BF16, DTYPE_BF16, DTYPE_BF16},
};
enum { FEW_PRODUCTS = sizeof few_products / sizeof *few_products };

static void case_narrow(const struct narrow *p, bool accumulate) {
    struct call call = {.operation = "gemm",
                        .label = "narrow",
                        .make = make_narrow,
                        .transpose_a = p->form & 1,
                        .transpose_b = p->form & 2,
                        .accumulate = accumulate,
                        .magnitude = sqrt((double)p->k)};
    add_in(&call, "a", test_random(p->form & 1 ? make_2d(p->a, p->k, p->m) : make_2d(p->a, p->m, p->k), 1));
    add_in(&call, "b", test_random(p->form & 2 ? make_2d(p->b, p->n, p->k) : make_2d(p->b, p->k, p->n), 1));
    add_out_or_sum(&call, "c", make_2d(p->c, p->m, p->n), 1);
    run(&call);
}

/* On a device, too, where operands lie does not change what comes out. */
static void expect_same_at_all_places(const struct kernel_ops *ops, const struct narrow *p) {
    struct tensor a = test_random(p->form & 1 ? make_2d(p->a, p->k, p->m) : make_2d(p->a, p->m, p->k), 1);
    struct tensor b = test_random(p->form & 2 ? make_2d(p->b, p->n, p->k) : make_2d(p->b, p->k, p->n), 1), first;
    for (int place = 0; place < PLACES; place++) {
        test_seed = (uint64_t)(PLACES * place + place); /* all three at the same distance from 16 bytes */
        struct tensor left = test_copy(a, a.dtype), right, c;
        test_seed = (uint64_t)(PLACES * place + place);
        right = test_copy(b, b.dtype);
        test_seed = (uint64_t)(PLACES * place + place);
        c = test_tensor(make_2d(p->c, p->m, p->n));
        ops->gemm(left, p->form & 1, right, p->form & 2, c, false);
        if (place == 0)
            first = c;
        assert_true(same_bytes(first, c));
    }
    test_release();
}

static void test_narrow_gemm(void **state) {
    (void)state;
    for (int i = 0; i < NARROW_PRODUCTS; i++)
        for (int accumulate = 0; accumulate < 2; accumulate++)
            case_narrow(&narrow_products[i], accumulate);
    test_aligned = true;
    for (int i = 0; i < 2 * FEW_PRODUCTS; i++)
        case_narrow(&few_products[i / 2], i % 2);
    test_aligned = false;
    for (int b = 0; b < backend_count; b++)
        for (int i = 0; i < NARROW_PRODUCTS && test_is_cuda(backends[b]); i += 2)
            expect_same_at_all_places(backends[b], &narrow_products[i]);
    expect_no_failures();
}

/* E (0: dense, no offsets), N, O, I */
struct groups {
    int64_t experts, rows, out, in;
};
static const struct groups group_shapes[] = {
    {1, 1, 1, 1},      {2, 3, 5, 7},      {4, 17, 33, 15},   {8, 127, 65, 31}, {8, 129, 16, 64},
    {64, 100, 24, 40}, {3, 255, 129, 63}, {5, 0, 8, 8},      {4, 33, 127, 17}, {2, 63, 255, 3},
    {4, 16, 1, 129},   {4, 64, 32, 1},    {2, 300, 96, 144}, {7, 31, 48, 130}, {8, 65, 2, 5},
    {0, 1, 70, 200},   {0, 300, 33, 1100}, {0, 65, 1060, 97},
};
enum { GROUP_SHAPES = sizeof group_shapes / sizeof *group_shapes };

/* A matrix of `rows` rows, or one of half as many with the indices that gather them. */
static void add_gathered(struct call *call, const char *name, enum dtype dtype, int64_t rows, int64_t columns,
                         bool gathered) {
    int64_t stored = gathered ? rows / 2 + 1 : rows;
    add_in(call, name, test_random(make_2d(dtype, stored, columns), 1));
    if (gathered)
        add_in(call, "rows", test_indices(make_1d(DTYPE_I32, rows), stored));
    else
        add_absent(call);
}

static void make_product_forward(const struct kernel_ops *ops, const struct call *call, const struct tensor *t) {
    ops->product_forward(t[0], t[1], t[2], test_packed(ops, t[3], false), t[4], call->accumulate);
}

static void make_product_backward_input(const struct kernel_ops *ops, const struct call *call,
                                        const struct tensor *t) {
    ops->product_backward_input(t[0], t[1], t[2], test_packed(ops, t[3], true), t[4], call->accumulate);
}

static void make_product_backward_weight(const struct kernel_ops *ops, const struct call *call,
                                         const struct tensor *t) {
    ops->product_backward_weight(t[0], t[1], t[2], t[3], t[4], t[5], call->accumulate);
}

static void add_offsets(struct call *call, enum test_spread spread, struct groups g) {
    if (g.experts > 0)
        add_in(call, "offsets", test_offsets(spread, g.rows, g.experts));
    else
        add_absent(call);
}

static void case_grouped_rows(struct groups g, enum test_spread spread, bool gathered,
                              struct dtype_pair dtypes, bool backward, bool accumulate) {
    struct call call = {.operation = backward ? "product_backward_input" : "product_forward",
                        .label = gathered ? "gathered" : "in order",
                        .make = backward ? make_product_backward_input : make_product_forward,
                        .accumulate = accumulate};
    int64_t inner = backward ? g.out : g.in;
    call.magnitude = sqrt((double)inner);
    add_gathered(&call, backward ? "dy" : "x", dtypes.in, g.rows, inner, gathered);
    add_offsets(&call, spread, g);
    add_in(&call, "w", test_random(g.experts > 0 ? make_3d(dtypes.in, g.experts, g.out, g.in)
                                                 : make_2d(dtypes.in, g.out, g.in), 1));
    add_out_or_sum(&call, backward ? "dx" : "y", make_2d(dtypes.out, g.rows, backward ? g.in : g.out), 1);
    run(&call);
}

static void case_grouped_weight(struct groups g, enum test_spread spread, bool dy_gathered, bool x_gathered,
                                enum dtype dtype, bool accumulate) {
    struct call call = {.operation = "product_backward_weight",
                        .label = x_gathered ? "x gathered" : "x in order",
                        .make = make_product_backward_weight,
                        .accumulate = accumulate,
                        .magnitude = 1};
    add_gathered(&call, "dy", dtype, g.rows, g.out, dy_gathered);
    add_gathered(&call, "x", dtype, g.rows, g.in, x_gathered);
    add_offsets(&call, spread, g);
    add_out_or_sum(&call, "dw", g.experts > 0 ? make_3d(real_of[dtype], g.experts, g.out, g.in)
                                              : make_2d(real_of[dtype], g.out, g.in), 1);
    run(&call);
}

static void make_product_onto(const struct kernel_ops *ops, const struct call *call, const struct tensor *t) {
    struct packed w = test_packed(ops, t[1], false);
    (void)call;
    if (ops->product_forward_onto) {
        ops->product_forward_onto(t[0], w, t[2], t[3]);
        return;
    }
    ops->cast(t[2], t[3]);
    ops->product_forward(t[0], tensor_none(), tensor_none(), w, t[3], true);
}

static void test_product_onto(void **state) {
    (void)state;
    for (int i = 0; i < 2 * GROUP_SHAPES; i++)
        for (int d = 0; d < FLOAT_DTYPES; d++) {
            struct groups g = group_shapes[i / 2];
            test_aligned = i % 2;
            struct call call = {.operation = "product_forward_onto",
                                .label = "dense",
                                .make = make_product_onto,
                                .magnitude = sqrt((double)g.in)};
            add_in(&call, "x", test_random(make_2d(float_dtypes[d], g.rows, g.in), 1));
            add_in(&call, "w", test_random(make_2d(float_dtypes[d], g.out, g.in), 1));
            add_in(&call, "base", test_random(make_2d(real_of[float_dtypes[d]], g.rows, g.out), 1));
            add_out(&call, "y", make_2d(real_of[float_dtypes[d]], g.rows, g.out));
            run(&call);
        }
    test_aligned = false;
    expect_no_failures();
}

static void make_product_swiglu(const struct kernel_ops *ops, const struct call *call, const struct tensor *t) {
    struct packed gate = test_packed(ops, t[3], false), up = test_packed(ops, t[4], false);
    (void)call;
    if (ops->product_swiglu_forward) {
        ops->product_swiglu_forward(t[0], t[1], t[2], gate, up, t[5], t[6], t[7], t[8]);
        return;
    }
    ops->product_forward(t[0], t[1], t[2], gate, t[6], false);
    ops->product_forward(t[0], t[1], t[2], up, t[7], false);
    if (tensor_exists(t[8]))
        ops->swiglu_forward(t[6], t[7], t[5], t[8]);
}

static void case_product_swiglu(struct groups g, enum test_spread spread, bool gathered, enum dtype dtype, bool weighted,
                                bool has_act) {
    struct call call = {.operation = "product_swiglu_forward",
                        .label = gathered ? "gathered" : "in order",
                        .make = make_product_swiglu,
                        .slack = dtype == DTYPE_BF16 ? 400 : 2, /* gate and up may be rounded on the way to act */
                        .magnitude = 0.1};
    struct tensor w = g.experts > 0 ? make_3d(dtype, g.experts, g.out, g.in) : make_2d(dtype, g.out, g.in);
    double scale = 1 / sqrt((double)g.in);
    add_gathered(&call, "x", dtype, g.rows, g.in, gathered);
    add_offsets(&call, spread, g);
    add_in(&call, "gate weight", test_random(w, scale));
    add_in(&call, "up weight", test_random(w, scale));
    if (weighted)
        add_in(&call, "row weight", test_random(make_1d(real_of[dtype], g.rows), 1));
    else
        add_absent(&call);
    add_out(&call, "gate", make_2d(dtype, g.rows, g.out));
    add_out(&call, "up", make_2d(dtype, g.rows, g.out));
    if (has_act)
        add_out(&call, "act", make_2d(dtype, g.rows, g.out));
    else
        add_absent(&call);
    run(&call);
}

/* Few rows, aligned: what a device has kernels of their own for. Inner dimensions that one warp has, several, and more than once;
 * columns that fill no block, and more blocks than there are processors; rows to the limits, and beyond. */
static const struct groups few_shapes[] = {
    {0, 1, 1, 8},     {0, 1, 40, 264},  {0, 2, 17, 2056}, {0, 7, 8, 4104},   {0, 8, 70, 520},  {0, 9, 33, 520},  {0, 31, 13, 1032},
    {0, 32, 24, 776}, {0, 33, 24, 264}, {0, 3, 2201, 16}, {0, 16, 9, 32},    {1, 1, 40, 264},  {8, 2, 33, 520},  {2, 8, 16, 1032},
    {8, 9, 24, 264},  {64, 64, 9, 40},  {3, 129, 17, 40}, {40, 128, 17, 72}, {4, 32, 56, 104}, {7, 100, 8, 264}, {300, 20, 16, 24},
    {1, 128, 5, 8},   {2, 3, 1100, 40},
};
enum { FEW_SHAPES = sizeof few_shapes / sizeof *few_shapes };

/* A row comes out the same, to the bit, whichever others there are. */
static void expect_rows_alone(const struct kernel_ops *ops, struct groups g, enum dtype dtype) {
    struct tensor none = tensor_none(), x = test_random(make_2d(dtype, g.rows, g.in), 1);
    struct packed w = test_packed(ops, test_random(make_2d(dtype, g.out, g.in), 1), false);
    struct tensor all = test_tensor(make_2d(DTYPE_F32, g.rows, g.out)), one = test_tensor(make_2d(DTYPE_F32, 1, g.out));
    ops->product_forward(x, none, none, w, all, false);
    for (int64_t row = 0; row < g.rows; row++) {
        ops->product_forward(tensor_rows(x, row, 1), none, none, w, one, false);
        assert_true(same_bytes(tensor_rows(all, row, 1), one));
    }
    test_release();
}

static void test_few_rows(void **state) {
    (void)state;
    test_aligned = true;
    for (int i = 0; i < FEW_SHAPES; i++)
        for (int spread = 0; spread < (few_shapes[i].experts > 1 ? SPREAD_COUNT : 1); spread += 1 + i % 2)
            for (int d = 0; d < PRODUCT_DTYPES - 1; d++) { /* f64 is the last */
                bool odd = (i + spread + d) % 2, gathered = few_shapes[i].experts > 0 && (spread ^ d) & 1;
                case_grouped_rows(few_shapes[i], spread, gathered, product_dtypes[d], false, odd);
                if (d < 2)
                    case_product_swiglu(few_shapes[i], spread, gathered, product_dtypes[d].in, odd, spread % 3 != 1);
            }
    for (int b = 0; b < backend_count; b++)
        if (test_is_cuda(backends[b])) {
            expect_rows_alone(backends[b], (struct groups){0, 32, 21, 2080}, DTYPE_BF16);
            expect_rows_alone(backends[b], (struct groups){0, 8, 21, 2080}, DTYPE_F32);
        }
    test_aligned = false;
    expect_no_failures();
}

static void test_product_forward(void **state) {
    (void)state;
    for (int i = 0; i < GROUP_SHAPES * SPREAD_COUNT * PRODUCT_DTYPES; i++)
        case_grouped_rows(group_shapes[i % GROUP_SHAPES], i / GROUP_SHAPES % SPREAD_COUNT, i & 1,
                          product_dtypes[i / (GROUP_SHAPES * SPREAD_COUNT)], false, false);
    expect_no_failures();
}

static void test_product_backward_input(void **state) {
    (void)state;
    for (int i = 0; i < GROUP_SHAPES * SPREAD_COUNT * PRODUCT_DTYPES; i++)
        case_grouped_rows(group_shapes[i % GROUP_SHAPES], i / GROUP_SHAPES % SPREAD_COUNT, i & 1,
                          product_dtypes[i / (GROUP_SHAPES * SPREAD_COUNT)], true, i % 3 == 0);
    expect_no_failures();
}

static void test_product_backward_weight(void **state) {
    (void)state;
    for (int i = 0; i < GROUP_SHAPES * SPREAD_COUNT * FLOAT_DTYPES; i++)
        for (int accumulate = 0; accumulate < 2; accumulate++)
            case_grouped_weight(group_shapes[i % GROUP_SHAPES], i / GROUP_SHAPES % SPREAD_COUNT, i & 1, i % 3 == 0,
                                float_dtypes[i / (GROUP_SHAPES * SPREAD_COUNT)], accumulate);
    expect_no_failures();
}

/* ---- simple ---- */

static void make_fill(const struct kernel_ops *ops, const struct call *call, const struct tensor *t) {
    ops->fill(t[0], call->scalar);
}

static void make_cast(const struct kernel_ops *ops, const struct call *call, const struct tensor *t) {
    (void)call;
    ops->cast(t[0], t[1]);
}

static void make_add(const struct kernel_ops *ops, const struct call *call, const struct tensor *t) {
    (void)call;
    ops->add(t[0], t[1]);
}

static void make_sum_squares(const struct kernel_ops *ops, const struct call *call, const struct tensor *t) {
    (void)call;
    ops->sum_squares(t[0], t[1]);
}

static void make_gather_scalars(const struct kernel_ops *ops, const struct call *call,
                                const struct tensor *t) {
    (void)call;
    ops->gather_scalars(t[0], t[1], t[2]);
}


static void case_elements(int64_t count, enum dtype from, enum dtype to, double scale, const char *label) {
    struct call cast = {.operation = "cast", .label = label, .make = make_cast};
    add_in(&cast, "from", test_random(make_1d(from, count), scale));
    add_out(&cast, "to", make_1d(to, count));
    run(&cast);

    struct call add = {.operation = "add", .label = label, .make = make_add};
    add_in(&add, "x", test_random(make_1d(from, count), scale));
    add_sum(&add, "y", test_random(make_1d(to, count), scale));
    run(&add);

    struct call squares = {.operation = "sum_squares", .label = label, .make = make_sum_squares};
    add_in(&squares, "x", test_random(make_1d(from, count), scale));
    add_sum(&squares, "sum", test_filled(make_1d(DTYPE_F64, 1), scale * scale));
    run(&squares);
}

static void case_scalars(int64_t count, enum dtype dtype) {
    struct call fill = {.operation = "fill", .label = "1.5", .make = make_fill, .scalar = 1.5};
    add_out(&fill, "t", make_1d(dtype, count));
    run(&fill);
    fill = (struct call){.operation = "fill", .label = "0", .make = make_fill};
    add_out(&fill, "t", make_1d(dtype, count));
    run(&fill);
    if (dtype == DTYPE_BF16)
        return;
    struct call gather = {.operation = "gather_scalars", .label = "random", .make = make_gather_scalars};
    add_in(&gather, "from", test_random(make_1d(dtype, count + 3), 1));
    add_in(&gather, "index", test_indices(make_1d(DTYPE_I32, count), count + 3));
    add_out(&gather, "to", make_1d(dtype, count));
    run(&gather);
}

static void test_simple(void **state) {
    (void)state;
    for (int i = 0; i < ELEMENT_COUNTS; i++)
        for (int d = 0; d < FLOAT_DTYPES; d++) {
            case_scalars(element_counts[i], float_dtypes[d]);
            for (int to = 0; to < FLOAT_DTYPES; to++) {
                case_elements(element_counts[i], float_dtypes[d], float_dtypes[to], 1, "random");
                case_elements(element_counts[i], float_dtypes[d], float_dtypes[to], 0, "zeros");
            }
            case_elements(element_counts[i], float_dtypes[d], float_dtypes[d], 1e-15, "tiny");
            case_elements(element_counts[i], float_dtypes[d], float_dtypes[d], 1e15, "large");
        }
    expect_no_failures();
}

/* What a comparison of norms cannot see: cast rounds to nearest even and keeps NaN and infinity; a NaN or an
 * infinity reaches sum_squares. */
static void test_special_numbers(void **state) {
    (void)state;
    struct tensor x = test_tensor(make_1d(DTYPE_F32, 70)), y = test_tensor(make_1d(DTYPE_BF16, 70));
    struct tensor sum = test_tensor(make_1d(DTYPE_F64, 1));
    uint32_t *bits = x.data;
    const uint16_t *rounded = y.data;
    for (uint32_t i = 0; i < 70; i++)
        bits[i] = 0x3F800000u + i * 0x4000u; /* quarters of a bf16 step: ties among them */
    bits[3] = 0x7F800000u, bits[20] = 0xFF800000u, bits[35] = 0x7FC00001u, bits[68] = 0x7F7FFFFFu;
    for (int b = 0; b < backend_count; b++) {
        backends[b]->cast(x, y);
        for (int64_t i = 0; i < 70; i++) {
            uint16_t expected = float_to_bf16((float)test_get(x, i));
            assert_true(i == 35 ? isnan(test_get(y, i)) : rounded[i] == expected);
        }
        test_set(sum, 0, 0);
        backends[b]->sum_squares(x, sum);
        assert_true(isnan(test_get(sum, 0)));
        test_set(sum, 0, 0);
        backends[b]->sum_squares(tensor_rows(x, 0, 33), sum);
        assert_true(isinf(test_get(sum, 0)));
    }
    test_release();
}

/* Many tensors at once: empty ones among them, long ones, of two dtypes and at any address, to the same sums as one by one. */
static void test_sum_squares_each(void **state) {
    (void)state;
    enum { COUNT = 230 };
    struct tensor x[COUNT], sums = test_tensor(make_1d(DTYPE_F64, COUNT));
    double expected[COUNT];
    for (int i = 0; i < COUNT; i++) {
        test_aligned = i < 150;
        int64_t elements = i == 2 ? 4400123 : element_counts[(i * 7 + 3) % (ELEMENT_COUNTS - (i > 2))];
        x[i] = test_random(make_1d(i > 180 ? DTYPE_BF16 : DTYPE_F32, elements), 1e20);
        if (i > 150 && i % 5 == 0)
            x[i] = tensor_none();
        struct tensor one = test_filled(make_1d(DTYPE_F64, 1), (double)i * 1e40);
        if (tensor_exists(x[i]))
            kernels_ref()->sum_squares(x[i], one);
        expected[i] = test_get(one, 0);
    }
    test_aligned = false;
    test_set(x[40], 0, NAN);
    test_set(x[77], 0, INFINITY);
    for (int b = 0; b < backend_count; b++) {
        if (!backends[b]->sum_squares_each)
            continue;
        for (int i = 0; i < COUNT; i++)
            test_set(sums, i, (double)i * 1e40);
        backends[b]->sum_squares_each(x, COUNT, sums);
        for (int i = 0; i < COUNT; i++) {
            double found = test_get(sums, i);
            assert_true(i == 40 ? isnan(found) : i == 77 ? isinf(found) : fabs(found - expected[i]) <= 1e-11 * expected[i]);
        }
        backends[b]->sum_squares_each(x, 0, test_tensor(make_1d(DTYPE_F64, 0)));
        assert_true(test_guards_hold());
    }
    test_release();
}

/* Names that no processor has are refused, with a message. */
static void test_choose(void **state) {
    (void)state;
    const struct kernel_ops *ops = NULL;
    assert_int_equal(kernels_choose("abacus", &ops), STATUS_USAGE);
    assert_non_null(strstr(status_text(), "abacus"));
    assert_int_equal(kernels_choose("auto", &ops), STATUS_OK);
    assert_non_null(ops);
}

int main(void) {
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_choose),
        cmocka_unit_test(test_gemm),
        cmocka_unit_test(test_product_forward),
        cmocka_unit_test(test_product_backward_input),
        cmocka_unit_test(test_product_backward_weight),
        cmocka_unit_test(test_simple),
        cmocka_unit_test(test_special_numbers),
        cmocka_unit_test(test_sum_squares_each),
        cmocka_unit_test(test_narrow_gemm),
        cmocka_unit_test(test_product_onto),
        cmocka_unit_test(test_few_rows),
        cmocka_unit_test(test_every_backend_had_cases),
    };
    return cmocka_run_group_tests(tests, find_backends, summarize);
}
