/* Cases of what layers, loss and optimizer are made of, in every backend; how they are run: kernels_cases_testing.h. */
#include "base/hash.h"
#include "kernels/kernels_cases_testing.h"

/* ---- normalisation ---- */

static void make_rmsnorm_forward(const struct kernel_ops *ops, const struct call *call,
                                 const struct tensor *t) {
    ops->rmsnorm_forward(t[0], t[1], call->scalar, t[2], t[3]);
}

static void make_rmsnorm_backward(const struct kernel_ops *ops, const struct call *call,
                                  const struct tensor *t) {
    ops->rmsnorm_backward(t[0], t[1], t[2], t[3], t[4], call->accumulate, t[5]);
}

static void make_rmsnorm_backward_cast(const struct kernel_ops *ops, const struct call *call, const struct tensor *t) {
    if (ops->rmsnorm_backward_cast) {
        ops->rmsnorm_backward_cast(t[0], t[1], t[2], t[3], t[4], call->accumulate, t[5], t[6]);
        return;
    }
    make_rmsnorm_backward(ops, call, t);
    ops->cast(t[4], t[6]);
}

/* rstd of groups of `width` elements, rounded to `dtype`: what the forward kept. */
static struct tensor rstd_of(struct tensor x, int64_t width, double epsilon, enum dtype dtype) {
    struct tensor rstd = test_tensor(make_1d(dtype, width ? tensor_elements(x) / width : 0));
    for (int64_t r = 0; r < tensor_elements(rstd); r++) {
        double sum = 0;
        for (int64_t i = r * width; i < (r + 1) * width; i++)
            sum += test_get(x, i) * test_get(x, i);
        test_set(rstd, r, 1 / sqrt(sum / (double)width + epsilon));
    }
    return rstd;
}

static void case_rmsnorm_cast(int64_t rows, int64_t width, enum dtype real, enum dtype copy, bool accumulate) {
    struct call call = {.operation = "rmsnorm_backward_cast",
                        .label = "random",
                        .make = make_rmsnorm_backward_cast,
                        .accumulate = accumulate,
                        .magnitude = 1};
    struct tensor x = test_random(make_2d(real, rows, width), 1);
    add_in(&call, "dy", test_random(make_2d(real, rows, width), 1));
    add_in(&call, "x", x);
    add_in(&call, "weight", test_random(make_1d(real, width), 1));
    add_in(&call, "rstd", rstd_of(x, width, 1e-6, real));
    add_out_or_sum(&call, "dx", make_2d(real, rows, width), 1);
    add_sum(&call, "dweight", test_random(make_1d(real, width), 1));
    add_out(&call, "dx_cast", make_2d(copy, rows, width));
    run(&call);
}

static void case_rmsnorm(int64_t rows, int64_t width, enum dtype in, enum dtype out, double scale,
                         bool in_place, const char *label) {
    enum dtype real = real_of[in];
    struct call forward = {
        .operation = "rmsnorm_forward", .label = label, .make = make_rmsnorm_forward, .scalar = 1e-6};
    add_in(&forward, "x", test_random(make_2d(in, rows, width), scale));
    add_in(&forward, "weight", test_random(make_1d(real, width), 1));
    add_out(&forward, "y", make_2d(out, rows, width));
    add_out(&forward, "rstd", make_1d(real, rows));
    run(&forward);

    struct call backward = {.operation = "rmsnorm_backward",
                            .label = in_place ? "dx over dy" : label,
                            .make = make_rmsnorm_backward,
                            .accumulate = !in_place && rows % 2};
    struct tensor x = test_random(make_2d(in, rows, width), scale), rstd = rstd_of(x, width, 1e-6, real);
    backward.magnitude = rows ? test_get(rstd, 0) : 0;
    int dy = add_in(&backward, "dy", test_random(make_2d(out, rows, width), 1));
    add_in(&backward, "x", x);
    add_in(&backward, "weight", test_random(make_1d(real, width), 1));
    add_in(&backward, "rstd", rstd);
    if (in_place)
        add_out_over(&backward, "dx", make_2d(out, rows, width), dy);
    else
        add_out_or_sum(&backward, "dx", make_2d(in, rows, width), backward.magnitude);
    add_sum(&backward, "dweight", test_random(make_1d(real, width), 1));
    backward.magnitude = fmin(backward.magnitude, 1);
    run(&backward);
}

static void test_rmsnorm(void **state) {
    (void)state;
    for (int i = 0; i < ODD_SIZES; i++)
        for (int d = 0; d < FLOAT_DTYPES; d++) {
            int64_t rows = odd_sizes[i], width = odd_sizes[(i * 4 + 9) % ODD_SIZES];
            case_rmsnorm(rows, width, float_dtypes[d], float_dtypes[d], 1, false, "random");
            case_rmsnorm(rows, width, float_dtypes[d], float_dtypes[d], 1, true, "random");
        }
    for (int d = 0; d < FLOAT_DTYPES; d++) {
        case_rmsnorm(0, 8, float_dtypes[d], float_dtypes[d], 1, false, "no rows");
        case_rmsnorm(7, 33, float_dtypes[d], float_dtypes[d], 0, false, "zeros");
        case_rmsnorm(7, 33, float_dtypes[d], float_dtypes[d], 1e-20, false, "tiny");
        case_rmsnorm(7, 33, float_dtypes[d], float_dtypes[d], 1e15, false, "large");
        case_rmsnorm(1100, 64, float_dtypes[d], float_dtypes[d], 1, false, "many rows");
    }
    case_rmsnorm(17, 31, DTYPE_F32, DTYPE_BF16, 1, false, "f32 to bf16");
    case_rmsnorm(17, 31, DTYPE_BF16, DTYPE_F32, 1, false, "bf16 to f32");
    case_rmsnorm(18, 31, DTYPE_F32, DTYPE_BF16, 1, true, "f32 to bf16");
    expect_no_failures();
}

static void make_rope_forward(const struct kernel_ops *ops, const struct call *call, const struct tensor *t) {
    ops->qknorm_rope_forward(t[0], t[1], call->scalar, t[2], call->sequence_length, call->first_position,
                             t[3], t[4]);
}

static void make_rope_backward(const struct kernel_ops *ops, const struct call *call,
                               const struct tensor *t) {
    ops->qknorm_rope_backward(t[0], t[1], t[2], t[3], t[4], call->sequence_length, call->first_position, t[5],
                              t[6]);
}

static void case_rope(int64_t rows, int64_t heads, int64_t head_dim, int64_t sequence_length,
                      int64_t first_position, enum dtype in, enum dtype out, double scale, bool in_place) {
    enum dtype real = real_of[in];
    int64_t positions = first_position + sequence_length;
    struct call forward = {.operation = "qknorm_rope_forward",
                           .label = "forward",
                           .make = make_rope_forward,
                           .scalar = 1e-6,
                           .sequence_length = sequence_length,
                           .first_position = first_position};
    add_in(&forward, "x", test_random(make_2d(in, rows, heads * head_dim), scale));
    add_in(&forward, "weight", test_random(make_1d(real, head_dim), 1));
    add_in(&forward, "table", test_rotary_table(real, positions, head_dim));
    add_out(&forward, "y", make_2d(out, rows, heads * head_dim));
    add_out(&forward, "rstd", make_1d(real, rows * heads));
    run(&forward);

    struct call backward = {.operation = "qknorm_rope_backward",
                            .label = in_place ? "dx over dy" : "apart",
                            .make = make_rope_backward,
                            .sequence_length = sequence_length,
                            .first_position = first_position};
    struct tensor x = test_random(make_2d(in, rows, heads * head_dim), scale);
    struct tensor rstd = rstd_of(x, head_dim, 1e-6, real);
    backward.magnitude = rows ? fmin(test_get(rstd, 0), 1) : 0;
    int dy = add_in(&backward, "dy", test_random(make_2d(out, rows, heads * head_dim), 1));
    add_in(&backward, "x", x);
    add_in(&backward, "weight", test_random(make_1d(real, head_dim), 1));
    add_in(&backward, "rstd", rstd);
    add_in(&backward, "table", test_rotary_table(real, positions, head_dim));
    add_out_over(&backward, "dx", make_2d(in_place ? out : in, rows, heads * head_dim), in_place ? dy : -1);
    add_sum(&backward, "dweight", test_random(make_1d(real, head_dim), 1));
    run(&backward);
}

static void test_qknorm_rope(void **state) {
    (void)state;
    static const int64_t head_dims[] = {2, 6, 8, 14, 16, 32, 64, 66, 128};
    for (int i = 0; i < 9 * FLOAT_DTYPES; i++) {
        enum dtype dtype = float_dtypes[i / 9];
        int64_t rows = odd_sizes[i % ODD_SIZES] % 66, head_dim = head_dims[i % 9];
        case_rope(rows, 1 + i % 4, head_dim, rows / 2 + 1, 0, dtype, dtype, 1, i & 1);
        case_rope(7, 2, head_dim, 7, 5, dtype, dtype, 1, i & 2);
        case_rope(4, 3, head_dim, 2, 1, dtype, dtype, 1e-20, false);
        case_rope(4, 3, head_dim, 2, 1, dtype, dtype, 1e15, false);
        case_rope(4, 3, head_dim, 4, 0, dtype, dtype, 0, true);
    }
    case_rope(0, 2, 8, 4, 0, DTYPE_F32, DTYPE_F32, 1, false);
    case_rope(600, 3, 16, 100, 0, DTYPE_F32, DTYPE_F32, 1, true);
    case_rope(600, 3, 16, 100, 0, DTYPE_BF16, DTYPE_BF16, 1, true);
    case_rope(17, 2, 8, 17, 3, DTYPE_F32, DTYPE_BF16, 1, false);
    expect_no_failures();
}

/* ---- attention ---- */

static void make_attention_forward(const struct kernel_ops *ops, const struct call *call,
                                   const struct tensor *t) {
    ops->attention_forward(call->attention, t[0], t[1], t[2], t[3], t[4]);
}

static void make_attention_backward(const struct kernel_ops *ops, const struct call *call,
                                    const struct tensor *t) {
    ops->attention_backward(call->attention, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8]);
}

/* Moves queries up and keys down so that all scores fall by about `offset`. */
static double key_shift(struct attention_shape s, double offset) {
    return sqrt(offset / s.head_dim / s.scale);
}

/* q, k and v; with `offset` all scores lie around -offset. */
static void attention_operands(struct attention_shape s, enum dtype dtype, double scale, double offset,
                               struct tensor *q, struct tensor *k, struct tensor *v) {
    *q = test_random(make_2d(dtype, s.batch * s.query_count, s.head_count * s.head_dim), scale);
    *k = test_random(make_2d(dtype, s.batch * s.key_count, s.kv_head_count * s.head_dim), scale);
    *v = test_random(*k, 1);
    double shift = key_shift(s, offset);
    for (int64_t i = 0; i < tensor_elements(*q); i++)
        test_set(*q, i, test_get(*q, i) + shift);
    for (int64_t i = 0; i < tensor_elements(*k); i++)
        test_set(*k, i, test_get(*k, i) - shift);
}

/* For the model of a device: one dtype, and one sequence, is enough of what is long. */
static bool is_long_attention(struct attention_shape s, enum dtype dtype) {
    return s.query_count > 600 || (s.query_count > 190 && (dtype != DTYPE_BF16 || s.batch > 1));
}

static void case_attention_forward(struct attention_shape s, enum dtype dtype, double scale, double offset) {
    struct call call = {.operation = "attention_forward",
                        .label = offset > 0 ? "all scores negative" : "random",
                        .make = make_attention_forward,
                        .attention = s,
                        .is_long = is_long_attention(s, dtype),
                        .slack = 2 + 2 * scale * scale + offset};
    struct tensor q, k, v;
    attention_operands(s, dtype, scale, offset, &q, &k, &v);
    add_in(&call, "q", q);
    add_in(&call, "k", k);
    add_in(&call, "v", v);
    add_out(&call, "out", q);
    add_out(&call, "logsumexp", make_2d(real_of[dtype], s.batch * s.query_count, s.head_count));
    call.magnitude = 1;
    run(&call);
}

static void case_attention_backward(struct attention_shape s, enum dtype dtype, double scale, double offset) {
    struct call call = {.operation = "attention_backward",
                        .label = offset > 0 ? "all scores negative" : "random",
                        .make = make_attention_backward,
                        .attention = s,
                        .is_long = is_long_attention(s, dtype),
                        .slack = 2 + 2 * scale * scale + offset,
                        .magnitude = 0.2};
    if (dtype == DTYPE_BF16) /* what all keys have in common cancels in dq, but not what rounding left of it; of one or two
                                dimensions chance makes keys have much in common */
        call.magnitude = fmax(fmax(call.magnitude, 0.5 / sqrt(s.head_dim)), key_shift(s, offset));
    struct tensor q, k, v;
    attention_operands(s, dtype, scale, offset, &q, &k, &v);
    struct tensor out = test_tensor(q), lse = test_tensor(make_2d(real_of[dtype], q.shape[0], s.head_count));
    kernels_ref()->attention_forward(s, q, k, v, out, lse);
    add_in(&call, "dout", test_random(q, 1));
    add_in(&call, "q", q);
    add_in(&call, "k", k);
    add_in(&call, "v", v);
    add_in(&call, "out", out);
    add_in(&call, "logsumexp", lse);
    add_out(&call, "dq", q);
    add_out(&call, "dk", k);
    add_out(&call, "dv", v);
    run(&call);
}

static struct attention_shape self_attention(int64_t batch, int64_t length, int heads, int kv_heads,
                                             int head_dim) {
    return (struct attention_shape){batch, length, length, heads, kv_heads, head_dim, 1 / sqrt(head_dim)};
}

/* Lengths at the edges of blocks of queries and keys, and of the keys that backward holds at a time. */
static void cases_attention_blocks(enum dtype dtype) {
    static const struct {
        int64_t length;
        int heads, kv_heads, head_dim;
    } blocks[] = {{1, 8, 1, 64},   {4, 2, 2, 128},  {63, 2, 1, 80},  {64, 8, 1, 64}, {66, 4, 1, 128}, {128, 2, 2, 64},
                  {130, 8, 2, 80}, {192, 2, 1, 64}, {200, 4, 1, 8},  {257, 2, 1, 128}, {385, 2, 1, 8}, {512, 1, 1, 64},
                  {570, 2, 1, 64}, {577, 2, 1, 8}};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) {
        struct attention_shape shape =
            self_attention(1, blocks[i].length, blocks[i].heads, blocks[i].kv_heads, blocks[i].head_dim);
        case_attention_forward(shape, dtype, 1, 0);
        case_attention_backward(shape, dtype, 1, 0);
    }
    case_attention_backward(self_attention(2, 520, 2, 1, 8), dtype, 1, 0);
    case_attention_forward(self_attention(1, 700, 2, 1, 8), dtype, 1, 0); /* several tasks for one head */
}

/* Weights that are 1 or nothing, and scores far from 0 that differ little. */
static void cases_attention_extremes(enum dtype dtype) {
    for (int i = 0; i < 4; i++) {
        static const int64_t lengths[] = {2, 33, 130, 200};
        struct attention_shape shape = self_attention(1, lengths[i], 2, 1, i % 2 ? 64 : 8);
        case_attention_forward(shape, dtype, 100, 0);
        case_attention_forward(shape, dtype, 0.5, 1e4);
        case_attention_backward(shape, dtype, 100, 0);
        case_attention_backward(shape, dtype, 0.5, 200); /* farther off, keys cancel in dq */
    }
}

/* Fewer queries than keys: serving. */
static void cases_attention_serving(enum dtype dtype) {
    static const int64_t queries[] = {1, 1, 2, 3, 14, 40, 65, 1};
    static const int64_t keys[] = {2, 300, 129, 128, 65, 65, 321, 65};
    static const int heads[][2] = {{4, 2}, {8, 1}, {3, 3}, {8, 2}};
    for (int i = 0; i < 8; i++) {
        const int *h = heads[i % 4];
        struct attention_shape shape = self_attention(2, keys[i], h[0], h[1], i % 3 ? 16 : 67);
        shape.query_count = queries[i];
        case_attention_forward(shape, dtype, 1, 0);
        case_attention_forward(shape, dtype, 100, 0);
    }
    /* Several parts of the keys; the last one has a key that only the second of two queries sees. */
    static const int64_t many[] = {512, 513, 1025, 2048, 1700};
    for (int i = 0; i < 5; i++) {
        const int *h = heads[i % 4];
        struct attention_shape shape = self_attention(i % 2 + 1, many[i], h[0], h[1], i % 2 ? 16 : 67);
        shape.query_count = 1 + i % 2;
        case_attention_forward(shape, dtype, 1, 0);
        case_attention_forward(shape, dtype, 100, 0);
    }
    static const int shared[][2] = {{7, 1}, {10, 2}}; /* heads of a group: four and two and one at once */
    for (int i = 0; i < 2; i++) {
        struct attention_shape shape = self_attention(1, 600, shared[i][0], shared[i][1], 40 + 88 * i);
        shape.query_count = 1;
        case_attention_forward(shape, dtype, 1, 0);
    }
}

/* One token after the other, aligned: a device divides the keys. Parts of one key, of several turns (where there are many heads),
 * and such as the first queries do not see; rows of one head, of four, of seven, to the limits and beyond. */
static void cases_attention_few(enum dtype dtype) {
    static const struct {
        int64_t batch, queries, keys;
        int heads, kv_heads, head_dim;
    } few[] = {
        {1, 1, 127, 4, 1, 128}, {1, 1, 128, 4, 1, 128}, {1, 1, 129, 7, 1, 128}, {2, 1, 192, 4, 4, 64},   {1, 1, 4097, 4, 1, 16},
        {1, 2, 193, 8, 2, 128}, {3, 3, 191, 14, 2, 8},  {1, 5, 320, 4, 1, 72},  {1, 16, 257, 7, 1, 40},  {1, 16, 128, 2, 2, 104},
        {1, 15, 130, 4, 1, 64}, {1, 17, 256, 4, 1, 24}, {2, 9, 150, 3, 1, 128}, {1, 1, 257, 132, 132, 8}, {1, 2, 321, 264, 132, 16},
        {1, 1, 300, 2, 1, 136}, {1, 3, 200, 4, 2, 12},
    };
    test_aligned = true;
    for (size_t i = 0; i < sizeof few / sizeof *few; i++) {
        struct attention_shape shape = self_attention(few[i].batch, few[i].keys, few[i].heads, few[i].kv_heads, few[i].head_dim);
        shape.query_count = few[i].queries;
        case_attention_forward(shape, dtype, 1, 0);
        if (i % 3 == 0)
            case_attention_forward(shape, dtype, 100, 0);
        if (i % 3 == 1)
            case_attention_forward(shape, dtype, 0.5, 1e4);
    }
    test_aligned = false;
}

static void make_attention_kept(const struct kernel_ops *ops, const struct call *call, const struct tensor *t) {
    ops->attention_kept(call->attention, t[0], t[1], t[2], t[3], t[4], t[5]);
}

static void make_attention_keep(const struct kernel_ops *ops, const struct call *call, const struct tensor *t) {
    (void)call;
    ops->attention_keep(t[0], t[1], t[2], t[3], t[4]);
}

/* Of s.key_count keys `kept` and those of the queries are there; behind them are no numbers. */
static void case_attention_kept(struct attention_shape s, int64_t kept, enum dtype dtype, double scale) {
    struct call call = {.operation = "attention_kept",
                        .label = "random",
                        .make = make_attention_kept,
                        .attention = s,
                        .magnitude = 1,
                        .slack = 2 + 2 * scale * scale};
    struct tensor q, k, v;
    attention_operands(s, dtype, scale, 0, &q, &k, &v);
    for (int64_t i = (kept + s.query_count) * k.shape[1]; i < tensor_elements(k); i++) {
        test_set(k, i, NAN);
        test_set(v, i, NAN);
    }
    add_in(&call, "q", q);
    add_in(&call, "k", k);
    add_in(&call, "v", v);
    add_in(&call, "kept", test_filled(make_1d(DTYPE_I32, 1), (double)kept));
    add_out(&call, "out", q);
    add_out(&call, "logsumexp", make_2d(real_of[dtype], s.query_count, s.head_count));
    run(&call);
}

/* A sequence's first key, parts of it full and not, whole parts and warps without a key; one token after the other, and several. */
static void cases_attention_kept(enum dtype dtype) {
    static const struct {
        int64_t kept, queries, bound;
        int heads, kv_heads, head_dim;
    } cases[] = {
        {0, 1, 1, 2, 1, 16},      {0, 1, 512, 4, 1, 128},   {0, 3, 512, 8, 2, 64},   {63, 1, 64, 4, 2, 128},
        {63, 1, 512, 4, 2, 128},  {64, 1, 512, 7, 1, 128},  {129, 2, 600, 8, 2, 72}, {511, 1, 512, 4, 4, 16},
        {300, 17, 1024, 4, 1, 40}, {200, 5, 300, 14, 2, 12}, {65, 1, 4096, 2, 1, 136}, {900, 1, 1000, 132, 132, 8},
        {5, 2, 40, 3, 1, 67},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct attention_shape s =
            self_attention(1, cases[i].bound, cases[i].heads, cases[i].kv_heads, cases[i].head_dim);
        s.query_count = cases[i].queries;
        test_aligned = i % 3 != 2;
        case_attention_kept(s, cases[i].kept, dtype, 1);
        case_attention_kept(s, cases[i].kept, dtype, 100);
    }
    test_aligned = false;
}

static void test_attention_kept(void **state) {
    (void)state;
    static const int64_t sizes[][4] = {/* rows, columns, kept, capacity */
                                       {1, 128, 0, 1}, {1, 128, 7, 9},      {1, 33, 4, 5}, {3, 24, 5, 8},
                                       {2, 5, 0, 40},  {70, 256, 30, 101}, {0, 16, 3, 3}};
    for (int d = 0; d < FLOAT_DTYPES; d++) {
        cases_attention_kept(float_dtypes[d]);
        for (int i = 0; i < 2 * 7; i++) {
            const int64_t *n = sizes[i / 2];
            struct call call = {.operation = "attention_keep", .label = "random", .make = make_attention_keep};
            test_aligned = i % 2;
            add_in(&call, "key", test_random(make_2d(float_dtypes[d], n[0], n[1]), 1));
            add_in(&call, "value", test_random(make_2d(float_dtypes[d], n[0], n[1]), 1));
            add_in(&call, "kept", test_filled(make_1d(DTYPE_I32, 1), (double)n[2]));
            add_sum(&call, "keys", test_random(make_2d(float_dtypes[d], n[3], n[1]), 1));
            add_sum(&call, "values", test_random(make_2d(float_dtypes[d], n[3], n[1]), 1));
            run(&call);
        }
    }
    test_aligned = false;
    expect_no_failures();
}

static void test_attention(void **state) {
    (void)state;
    static const int heads[][2] = {{1, 1}, {2, 2}, {4, 2}, {4, 1}, {3, 1}};
    static const int head_dims[] = {1, 2, 7, 8, 16, 17, 32, 64, 80, 128};
    for (int i = 0; i < 2 * ODD_SIZES * FLOAT_DTYPES; i++) {
        enum dtype dtype = float_dtypes[i / (2 * ODD_SIZES)];
        int64_t length = odd_sizes[i % ODD_SIZES];
        const int *h = heads[i % 5];
        struct attention_shape shape = self_attention(1 + i % 2, length, h[0], h[1], head_dims[i % 10]);
        case_attention_forward(shape, dtype, 1, 0);
        if (length < 200)
            case_attention_backward(shape, dtype, 1, 0);
    }
    for (int d = 0; d < FLOAT_DTYPES; d++) {
        cases_attention_blocks(float_dtypes[d]);
        cases_attention_extremes(float_dtypes[d]);
        cases_attention_serving(float_dtypes[d]);
        cases_attention_few(float_dtypes[d]);
        struct attention_shape shape = self_attention(1, 33, 2, 1, 16);
        case_attention_forward(shape, float_dtypes[d], 1e-20, 0);
        case_attention_forward(shape, float_dtypes[d], 6, 0);
        case_attention_forward(shape, float_dtypes[d], 0.5, 200);
        case_attention_forward(shape, float_dtypes[d], 0, 0);
        case_attention_backward(shape, float_dtypes[d], 1e-20, 0);
        case_attention_backward(shape, float_dtypes[d], 0, 0);
        case_attention_forward(self_attention(0, 4, 2, 1, 8), float_dtypes[d], 1, 0);
        case_attention_backward(self_attention(0, 4, 2, 1, 8), float_dtypes[d], 1, 0);
    }
    expect_no_failures();
}

/* ---- routing ---- */

static void make_topk_forward(const struct kernel_ops *ops, const struct call *call, const struct tensor *t) {
    ops->router_topk_forward(t[0], call->normalize, t[1], t[2], t[3]);
}

static void make_topk_backward(const struct kernel_ops *ops, const struct call *call,
                               const struct tensor *t) {
    ops->router_topk_backward(t[0], t[1], t[2], t[3], t[4], call->normalize, t[5], call->scales, t[6]);
}

static void make_router_stats(const struct kernel_ops *ops, const struct call *call, const struct tensor *t) {
    (void)call;
    ops->router_stats(t[0], t[1], t[2], t[3]);
}

static void make_route_sort(const struct kernel_ops *ops, const struct call *call, const struct tensor *t) {
    (void)call;
    ops->route_sort(t[0], t[1], t[2], t[3], t[4], t[5]);
}

enum scores {
    SCORES_RANDOM,
    SCORES_EQUAL,
    SCORES_FEW_LEVELS,
    SCORES_TINY,
    SCORES_NEGATIVE,
    SCORES_FAR,
    SCORES_COUNT
};
static const char *const score_names[] = {"random",      "equal scores",        "many ties",
                                          "tiny scores", "all scores negative", "scores far apart"};

static double score(enum scores kind, double normal) {
    switch (kind) {
    case SCORES_RANDOM:
        return normal;
    case SCORES_EQUAL:
        return 0.3;
    case SCORES_FEW_LEVELS:
        return floor(normal);
    case SCORES_TINY:
        return 1e-20 * normal;
    case SCORES_NEGATIVE:
        return normal - 300;
    default:
        return 300 * normal; /* most probabilities vanish: the order is still that of the scores */
    }
}

static struct tensor make_scores(enum scores kind, enum dtype dtype, int64_t tokens, int64_t experts) {
    struct tensor t = test_random(make_2d(dtype, tokens, experts), 1);
    for (int64_t i = 0; i < tensor_elements(t); i++)
        test_set(t, i, score(kind, test_get(t, i)));
    return t;
}

static double score_slack(enum scores kind) {
    return kind == SCORES_NEGATIVE || kind == SCORES_FAR ? 300 : 2;
}

static void case_route(struct tensor expert, int64_t experts) {
    struct call sort = {.operation = "route_sort", .label = "route", .make = make_route_sort};
    int64_t slots = tensor_elements(expert);
    add_in(&sort, "expert", expert);
    add_out(&sort, "count", make_1d(DTYPE_I32, experts));
    add_out(&sort, "offsets", make_1d(DTYPE_I32, experts + 1));
    add_out(&sort, "row_slot", make_1d(DTYPE_I32, slots));
    add_out(&sort, "row_token", make_1d(DTYPE_I32, slots));
    add_out(&sort, "slot_row", expert);
    run(&sort);
}

static struct call router_call(const char *operation, enum scores kind, bool normalize) {
    return (struct call){.operation = operation,
                         .label = score_names[kind],
                         .normalize = normalize,
                         .slack = score_slack(kind),
                         .scales = {0.01, 0.003},
                         .magnitude = 0.01};
}

/* Forward, then backward and statistics from what the reference chose. */
static void case_router(enum scores kind, enum dtype dtype, int64_t tokens, int64_t experts, int64_t choices,
                        bool normalize) {
    struct tensor logits_like = make_2d(dtype, tokens, experts), slots = make_2d(DTYPE_I32, tokens, choices);
    struct tensor weight_like = make_2d(dtype, tokens, choices);
    struct call forward = router_call("router_topk_forward", kind, normalize);
    forward.make = make_topk_forward;
    add_in(&forward, "logits", make_scores(kind, dtype, tokens, experts));
    add_out(&forward, "prob", logits_like);
    add_out(&forward, "expert", slots);
    add_out(&forward, "weight", weight_like);
    run(&forward);

    for (int which = 0; which < 2; which++) {
        struct call call = router_call(which ? "router_stats" : "router_topk_backward", kind, normalize);
        call.make = which ? make_router_stats : make_topk_backward;
        struct tensor logits = make_scores(kind, dtype, tokens, experts), prob = test_tensor(logits_like);
        struct tensor expert = test_tensor(slots), weight = test_tensor(weight_like);
        kernels_ref()->router_topk_forward(logits, normalize, prob, expert, weight);
        if (!which)
            add_in(&call, "dweight", test_random(weight, 1));
        add_in(&call, "logits", logits);
        add_in(&call, "prob", prob);
        add_in(&call, "expert", expert);
        if (which) {
            add_sum(&call, "stats", test_filled(make_1d(DTYPE_F64, 2 + 2 * experts), 0.5));
        } else {
            add_in(&call, "weight", weight);
            add_in(&call, "count", test_indices(make_1d(DTYPE_I32, experts), 2 * tokens + 1));
            add_out(&call, "dlogits", logits_like);
        }
        run(&call);
    }
}

static void test_router(void **state) {
    (void)state;
    static const int64_t shapes[][3] = {{1, 1, 1},   {3, 2, 1},    {5, 7, 7},   {17, 8, 2},
                                        {33, 16, 4}, {2, 17, 3},   {65, 64, 8}, {7, 129, 6},
                                        {600, 8, 2}, {31, 65, 65}, {0, 8, 2},    {300, 1, 1},
                                        {33, 3, 2},  {40, 8, 8},   {260, 64, 8}, {19, 256, 8}};
    for (int i = 0; i < 16; i++)
        for (int kind = 0; kind < SCORES_COUNT; kind++)
            for (int normalize = 0; normalize < 2; normalize++) {
                enum dtype dtype = (i + kind) % 4 ? DTYPE_F32 : DTYPE_F64;
                case_router(kind, dtype, shapes[i][0], shapes[i][1], shapes[i][2], normalize);
            }
    expect_no_failures();
}

/* 0 and -0 are a tie; with numbers that are none, the chosen are still different experts, none of those while others
 * are left. */
static void test_router_special_numbers(void **state) {
    (void)state;
    static const float logits[4][4] = {{-0.0f, 0, -0.0f, 0}, {NAN, 1, -NAN, 2}, {NAN, NAN, NAN, NAN}, {-INFINITY, 3, -INFINITY, 2}};
    static const int32_t expected[4][4] = {{0, 1, 2, 3}, {3, 1, 0, 2}, {0, 1, 2, 3}, {1, 3, 0, 2}};
    struct tensor numbers = test_tensor(make_2d(DTYPE_F32, 4, 4)), prob = test_tensor(numbers), weight = test_tensor(numbers);
    struct tensor expert = test_tensor(make_2d(DTYPE_I32, 4, 4));
    memcpy(numbers.data, logits, sizeof logits);
    for (int b = 0; b < backend_count; b++) {
        backends[b]->router_topk_forward(numbers, true, prob, expert, weight);
        for (int i = 0; i < 16; i++)
            if (i / 4 != 1 || strcmp(backend_names[b], "ref") != 0) /* compares with the first one left, a NaN */
                assert_int_equal(test_get(expert, i), expected[i / 4][i % 4]);
    }
    test_release();
}

static void make_combine_rows(const struct kernel_ops *ops, const struct call *call, const struct tensor *t) {
    ops->combine_rows(t[0], t[1], t[2], call->accumulate);
}

/* A random place for every choice, each row used once. */
static struct tensor random_places(int64_t tokens, int64_t choices) {
    struct tensor t = test_tensor(make_2d(DTYPE_I32, tokens, choices));
    uint64_t count = (uint64_t)(tokens * choices);
    for (uint64_t i = 0; i < count; i++)
        test_set(t, (int64_t)i, (double)random_permute(3, test_seed, count, i));
    return t;
}

static void test_route_and_combine(void **state) {
    (void)state;
    for (int i = 0; i < ODD_SIZES * FLOAT_DTYPES; i++) {
        int64_t tokens = odd_sizes[i % ODD_SIZES], choices = 1 + i % 5,
                width = odd_sizes[(i * 4 + 7) % ODD_SIZES];
        enum dtype dtype = float_dtypes[i / ODD_SIZES], out = i % 4 ? dtype : real_of[dtype];
        struct call combine = {.operation = "combine_rows",
                               .label = "random",
                               .make = make_combine_rows,
                               .accumulate = i & 1,
                               .magnitude = 1};
        add_in(&combine, "rows", test_random(make_2d(dtype, tokens * choices, width), 1));
        add_in(&combine, "slot_row", random_places(tokens, choices));
        add_out_or_sum(&combine, "y", make_2d(out, tokens, width), 1);
        run(&combine);
        case_route(test_indices(make_2d(DTYPE_I32, tokens, choices), 1 + i % 9), 9);
        case_route(test_indices(make_2d(DTYPE_I32, tokens, choices), 64), 64);
        case_route(test_filled(make_2d(DTYPE_I32, tokens, choices), i % 5), 5);
    }
    case_route(test_indices(make_2d(DTYPE_I32, 0, 2), 4), 4);
    case_route(test_indices(make_2d(DTYPE_I32, 5000, 2), 8), 8);
    case_route(test_indices(make_2d(DTYPE_I32, 25000, 2), 32), 33); /* several tasks */
    case_route(test_filled(make_2d(DTYPE_I32, 12000, 3), 4), 5);
    expect_no_failures();
}

/* ---- what is done with another operation at once ---- */

static void make_combine_rows_onto(const struct kernel_ops *ops, const struct call *call, const struct tensor *t) {
    (void)call;
    if (ops->combine_rows_onto) {
        ops->combine_rows_onto(t[0], t[1], t[2], t[3]);
        return;
    }
    ops->cast(t[2], t[3]);
    ops->combine_rows(t[0], t[1], t[3], true);
}

static void test_combine_rows_onto(void **state) {
    (void)state;
    for (int i = 0; i < ODD_SIZES * FLOAT_DTYPES; i++) {
        int64_t tokens = odd_sizes[i % ODD_SIZES], choices = 1 + i % 5;
        int64_t width = i % 2 ? 8 * choices : odd_sizes[(i * 4 + 7) % ODD_SIZES];
        enum dtype dtype = float_dtypes[i / ODD_SIZES], out = i % 4 ? real_of[dtype] : dtype;
        struct call call = {.operation = "combine_rows_onto", .label = "random", .make = make_combine_rows_onto, .magnitude = 1};
        add_in(&call, "rows", test_random(make_2d(dtype, tokens * choices, width), 1));
        add_in(&call, "slot_row", random_places(tokens, choices));
        add_in(&call, "base", test_random(make_2d(out, tokens, width), 1));
        add_out(&call, "y", make_2d(out, tokens, width));
        run(&call);
    }
    expect_no_failures();
}

static void test_rmsnorm_cast(void **state) {
    (void)state;
    static const int64_t widths[] = {31, 64, 512, 1024, 1032, 2048, 4096, 8192, 8200};
    for (size_t i = 0; i < 2 * sizeof widths / sizeof *widths; i++) {
        case_rmsnorm_cast(5 + 3 * (int64_t)i, widths[i / 2], DTYPE_F32, DTYPE_BF16, i % 2);
        case_rmsnorm_cast(5, widths[i / 2], i % 4 ? DTYPE_F32 : DTYPE_F64, DTYPE_F32, i % 2);
    }
    case_rmsnorm_cast(0, 8, DTYPE_F32, DTYPE_BF16, true);
    expect_no_failures();
}

static void make_routed_norm(const struct kernel_ops *ops, const struct call *call, const struct tensor *t) {
    struct routed_gradient from = {t[0], t[1], t[2], t[3]};
    struct tensor dy = t[8];
    dy.data = NULL;
    dy = test_tensor(dy);
    if (ops->routed_norm_backward) {
        ops->routed_norm_backward(from, dy, t[4], t[5], t[6], t[8], call->accumulate, t[7], t[9]);
        return;
    }
    ops->combine_rows(t[0], t[1], dy, false);
    ops->gemm(t[2], false, t[3], false, dy, true);
    ops->rmsnorm_backward(dy, t[4], t[5], t[6], t[8], call->accumulate, t[7]);
    ops->cast(t[8], t[9]);
}

/* Every seventh choice has no row; what would have been its row is NaN. */
static struct tensor drop_places(struct tensor places, struct tensor rows) {
    for (int64_t i = 3; i < tensor_elements(places); i += 7) {
        int64_t row = (int64_t)test_get(places, i), width = rows.shape[1];
        test_set(places, i, i % 2 ? -1 : -5);
        for (int64_t d = 0; d < width; d++)
            test_set(rows, row * width + d, (double)NAN);
    }
    return places;
}

struct routed_shape {
    int64_t tokens, width, experts, choices;
};

static void case_routed_norm(struct routed_shape s, enum dtype dtype, enum dtype copy, bool accumulate) {
    struct call call = {.operation = "routed_norm_backward",
                        .label = test_aligned ? "aligned" : "anywhere",
                        .make = make_routed_norm,
                        .accumulate = accumulate,
                        .is_long = s.tokens * s.width > 300000,
                        .magnitude = 1};
    enum dtype real = real_of[dtype];
    struct tensor x = test_random(make_2d(real, s.tokens, s.width), 1);
    struct tensor rows = test_random(make_2d(dtype, s.tokens * s.choices, s.width), 1);
    struct tensor places = drop_places(random_places(s.tokens, s.choices), rows);
    add_in(&call, "rows", rows);
    add_in(&call, "slot_row", places);
    add_in(&call, "dlogits", test_random(make_2d(real, s.tokens, s.experts), 1));
    add_in(&call, "router", test_random(make_2d(real, s.experts, s.width), 1));
    add_in(&call, "x", x);
    add_in(&call, "weight", test_random(make_1d(real, s.width), 1));
    add_in(&call, "rstd", rstd_of(x, s.width, 1e-6, real));
    add_sum(&call, "dweight", test_random(make_1d(real, s.width), 1));
    add_out_or_sum(&call, "dx", make_2d(real, s.tokens, s.width), 1);
    add_out(&call, "dx_cast", make_2d(copy, s.tokens, s.width));
    run(&call);
}

static void test_routed_norm(void **state) {
    (void)state;
    static const struct routed_shape shapes[] = {
        {5, 31, 1, 1},     {9, 8, 3, 2},      {7, 64, 8, 2},     {33, 200, 5, 3},  {20, 256, 8, 8},   {17, 1032, 8, 2},
        {9, 2048, 8, 2},   {9, 2048, 7, 2},   {5, 2048, 9, 4},   {6, 2056, 8, 2},  {5, 4096, 8, 1},   {5, 4104, 4, 2},
        {4, 8192, 4, 3},   {4, 8192, 8, 2},   {3, 8200, 8, 2},   {40, 264, 16, 4}, {600, 256, 64, 2}, {11, 72, 64, 33},
        {3500, 16, 64, 2}, {3500, 16, 8, 2},  {430, 2048, 8, 2}, {1, 2048, 8, 2},  {18, 2047, 2, 2},  {300, 1024, 1, 1},
        {9, 1536, 8, 2},   {9, 2048, 6, 2},   {5, 3072, 8, 2},   {4, 4096, 6, 2}}; /* 48, 48, 96 and 96 KiB of weights */
    for (size_t i = 0; i < 4 * sizeof shapes / sizeof *shapes; i++) {
        test_aligned = i % 4 != 3;
        case_routed_norm(shapes[i / 4], i % 4 == 1 ? DTYPE_F32 : DTYPE_BF16, DTYPE_BF16, i % 2 == i / 4 % 2);
    }
    test_aligned = true;
    case_routed_norm((struct routed_shape){9, 64, 8, 2}, DTYPE_F32, DTYPE_F32, true);
    case_routed_norm((struct routed_shape){9, 64, 8, 2}, DTYPE_F64, DTYPE_F32, true);
    case_routed_norm((struct routed_shape){0, 64, 8, 2}, DTYPE_BF16, DTYPE_BF16, true);
    test_aligned = false;
    expect_no_failures();
}

/* ---- expert ---- */

static void make_swiglu_forward(const struct kernel_ops *ops, const struct call *call,
                                const struct tensor *t) {
    (void)call;
    ops->swiglu_forward(t[0], t[1], t[2], t[3]);
}

static void make_swiglu_backward(const struct kernel_ops *ops, const struct call *call,
                                 const struct tensor *t) {
    (void)call;
    ops->swiglu_backward(t[0], t[1], t[2], t[3], t[4], t[5], t[6]);
}

static void add_row_weight(struct call *call, enum dtype dtype, int64_t rows, bool weighted) {
    if (weighted)
        add_in(call, "row_weight", test_random(make_1d(dtype, rows), 1));
    else
        add_absent(call);
}

/* over: -1 apart, 0 over gate, 1 over up */
static void case_swiglu_forward(struct tensor like, double scale, bool weighted, int over) {
    struct call call = {.operation = "swiglu_forward",
                        .label = over < 0 ? "apart" : "in place",
                        .make = make_swiglu_forward,
                        .slack = 2};
    add_in(&call, "gate", test_random(like, scale));
    add_in(&call, "up", test_random(like, 1));
    add_row_weight(&call, real_of[like.dtype], like.shape[0], weighted);
    add_out_over(&call, "act", like, over);
    run(&call);
}

/* dgate and dup over operands 0 dact, 1 gate, 2 up; -1 apart */
static void case_swiglu_backward(struct tensor like, double scale, bool weighted, int dgate_over,
                                 int dup_over) {
    struct call call = {.operation = "swiglu_backward",
                        .label = dgate_over < 0 ? "apart" : "in place",
                        .make = make_swiglu_backward,
                        .slack = 2,
                        .magnitude = 0.1};
    add_in(&call, "dact", test_random(like, 1));
    add_in(&call, "gate", test_random(like, scale));
    add_in(&call, "up", test_random(like, 1));
    add_row_weight(&call, real_of[like.dtype], like.shape[0], weighted);
    add_out_over(&call, "dgate", like, dgate_over);
    add_out_over(&call, "dup", like, dup_over);
    if (weighted)
        add_out(&call, "drow_weight", make_1d(real_of[like.dtype], like.shape[0]));
    else
        add_absent(&call);
    run(&call);
}

/* Every operand of its own dtype. */
static void case_swiglu_mixed(int64_t rows, int64_t width) {
    struct tensor f32 = make_2d(DTYPE_F32, rows, width), bf16 = make_2d(DTYPE_BF16, rows, width);
    struct call forward = {.operation = "swiglu_forward", .label = "mixed", .make = make_swiglu_forward, .slack = 2};
    add_in(&forward, "gate", test_random(bf16, 2));
    add_in(&forward, "up", test_random(f32, 1));
    add_row_weight(&forward, DTYPE_F32, rows, true);
    add_out(&forward, "act", bf16);
    run(&forward);

    struct call backward = {.operation = "swiglu_backward",
                            .label = "mixed",
                            .make = make_swiglu_backward,
                            .slack = 2,
                            .magnitude = 0.1};
    int dact = add_in(&backward, "dact", test_random(f32, 1));
    int gate = add_in(&backward, "gate", test_random(bf16, 2));
    add_in(&backward, "up", test_random(bf16, 1));
    add_row_weight(&backward, DTYPE_F32, rows, true);
    add_out_over(&backward, "dgate", f32, dact);
    add_out_over(&backward, "dup", bf16, gate);
    add_out(&backward, "drow_weight", make_1d(DTYPE_F32, rows));
    run(&backward);
}

static void test_swiglu(void **state) {
    (void)state;
    static const int places[][2] = {{-1, -1}, {1, 2}, {0, 2}, {1, 0}, {2, 1}, {0, -1}};
    for (int i = 0; i < 2 * ODD_SIZES * FLOAT_DTYPES; i++) {
        enum dtype dtype = float_dtypes[i / (2 * ODD_SIZES)];
        struct tensor like = make_2d(dtype, odd_sizes[i % ODD_SIZES], odd_sizes[(i * 4 + 3) % ODD_SIZES]);
        case_swiglu_forward(like, 2, i & 1, i % 3 - 1);
        case_swiglu_backward(like, 2, i & 1, places[i % 6][0], places[i % 6][1]);
    }
    for (int d = 0; d < FLOAT_DTYPES; d++) {
        static const double scales[] = {0, 1e-20, 50, 1e4, 1e15};
        for (int i = 0; i < 5; i++) {
            case_swiglu_forward(make_2d(float_dtypes[d], 9, 35), scales[i], true, -1);
            case_swiglu_backward(make_2d(float_dtypes[d], 9, 35), scales[i], true, -1, -1);
        }
        case_swiglu_mixed(17, odd_sizes[5 + d]);
        case_swiglu_forward(make_2d(float_dtypes[d], 0, 35), 1, true, -1);
        case_swiglu_backward(make_2d(float_dtypes[d], 0, 35), 1, true, -1, -1);
    }
    expect_no_failures();
}

/* ---- embedding and loss ---- */

static void make_embedding_forward(const struct kernel_ops *ops, const struct call *call,
                                   const struct tensor *t) {
    (void)call;
    ops->embedding_forward(t[0], t[1], t[2]);
}

static void make_embedding_backward(const struct kernel_ops *ops, const struct call *call,
                                    const struct tensor *t) {
    (void)call;
    ops->embedding_backward(t[0], t[1], t[2]);
}

static void case_embedding(int64_t tokens, int64_t vocabulary, int64_t width, enum dtype table,
                           enum dtype x) {
    struct call forward = {
        .operation = "embedding_forward", .label = "random", .make = make_embedding_forward};
    add_in(&forward, "ids", test_indices(make_1d(DTYPE_I32, tokens), vocabulary));
    add_in(&forward, "table", test_random(make_2d(table, vocabulary, width), 1));
    add_out(&forward, "x", make_2d(x, tokens, width));
    run(&forward);

    struct call backward = {.operation = "embedding_backward",
                            .label = "random",
                            .make = make_embedding_backward,
                            .slack = 2,
                            .magnitude = 1};
    add_in(&backward, "ids", test_indices(make_1d(DTYPE_I32, tokens), vocabulary));
    add_in(&backward, "dx", test_random(make_2d(x, tokens, width), 1));
    add_sum(&backward, "dtable", test_random(make_2d(real_of[x], vocabulary, width), 1));
    run(&backward);
}

static void test_embedding(void **state) {
    (void)state;
    for (int i = 0; i < ODD_SIZES * FLOAT_DTYPES; i++) {
        enum dtype dtype = float_dtypes[i / ODD_SIZES];
        int64_t tokens = odd_sizes[i % ODD_SIZES], vocabulary = odd_sizes[(i * 7 + 3) % ODD_SIZES];
        case_embedding(tokens, vocabulary, odd_sizes[(i * 4 + 1) % ODD_SIZES], dtype, dtype);
    }
    case_embedding(0, 5, 8, DTYPE_F32, DTYPE_F32);
    case_embedding(2000, 300, 24, DTYPE_F32, DTYPE_F32);
    case_embedding(33, 17, 31, DTYPE_F32, DTYPE_BF16);
    case_embedding(33, 17, 31, DTYPE_BF16, DTYPE_F32);
    expect_no_failures();
}

static void make_cross_entropy(const struct kernel_ops *ops, const struct call *call,
                               const struct tensor *t) {
    ops->cross_entropy(t[0], t[1], call->scalar, t[2], t[3], t[4]);
}

static struct tensor make_targets(int64_t rows, int64_t vocabulary, bool all_ignored) {
    struct tensor t = test_indices(make_1d(DTYPE_I32, rows), vocabulary);
    for (int64_t r = 0; r < rows; r++)
        if (all_ignored || r % 5 == 1)
            test_set(t, r, r % 2 ? -1 : -100);
    return t;
}

/* form: 1 with row_loss, 2 with dlogits, 4 dlogits over logits */
static void case_cross_entropy(int64_t rows, int64_t vocabulary, enum dtype real, enum dtype gradient,
                               double scale, double offset, int form, bool all_ignored) {
    struct call call = {.operation = "cross_entropy",
                        .label = form & 4 ? "in place" : "apart",
                        .make = make_cross_entropy,
                        .scalar = 0.37,
                        .slack = 2 + fabs(offset) + scale,
                        .magnitude = 0.01};
    struct tensor logits = test_random(make_2d(real, rows, vocabulary), scale);
    for (int64_t i = 0; i < tensor_elements(logits); i++)
        test_set(logits, i, test_get(logits, i) + offset);
    int over = add_in(&call, "logits", logits);
    add_in(&call, "target", make_targets(rows, vocabulary, all_ignored));
    add_sum(&call, "loss_sum", test_filled(make_1d(DTYPE_F64, 1), 3));
    if (form & 1)
        add_out(&call, "row_loss", make_1d(real, rows));
    else
        add_absent(&call);
    if (form & 4)
        add_out_over(&call, "dlogits", logits, over);
    else if (form & 2)
        add_out(&call, "dlogits", make_2d(gradient, rows, vocabulary));
    else
        add_absent(&call);
    run(&call);
}

/* Logits far apart, and rows of several blocks whose maximum grows until the end. */
static void case_cross_entropy_hard(int64_t vocabulary, double end, double step, enum dtype gradient) {
    struct call call = {.operation = "cross_entropy",
                        .label = end > 0 ? "logits far apart" : "rising logits",
                        .make = make_cross_entropy,
                        .scalar = 1,
                        .slack = 2 + 10 * step,
                        .magnitude = 0.01};
    struct tensor logits = test_tensor(make_2d(DTYPE_F32, 6, vocabulary));
    for (int64_t i = 0; i < tensor_elements(logits); i++)
        test_set(logits, i, end * (i % 3 ? 1 : -1) + step * (double)(i % vocabulary));
    add_in(&call, "logits", logits);
    add_in(&call, "target", make_targets(6, vocabulary, false));
    add_sum(&call, "loss_sum", test_filled(make_1d(DTYPE_F64, 1), 3));
    add_out(&call, "row_loss", make_1d(DTYPE_F32, 6));
    add_out(&call, "dlogits", make_2d(gradient, 6, vocabulary));
    run(&call);
}

static void test_cross_entropy(void **state) {
    (void)state;
    for (int i = 0; i < ODD_SIZES; i++)
        for (int form = 0; form < 6; form++) {
            int64_t rows = odd_sizes[i], vocabulary = odd_sizes[(i * 4 + 5) % ODD_SIZES];
            enum dtype gradient = form == 3 ? DTYPE_BF16 : DTYPE_F32;
            case_cross_entropy(rows, vocabulary, DTYPE_F32, gradient, 1, 0, form, false);
        }
    for (int form = 0; form < 6; form++) {
        case_cross_entropy(9, 33, DTYPE_F64, DTYPE_F64, 1, 0, form, false);
        case_cross_entropy(0, 33, DTYPE_F32, DTYPE_F32, 1, 0, form, false);
        case_cross_entropy(7, 33, DTYPE_F32, DTYPE_F32, 1, 0, form, true);
        case_cross_entropy(7, 33, DTYPE_F32, DTYPE_F32, 0, 0, form, false);
        case_cross_entropy(7, 33, DTYPE_F32, DTYPE_F32, 1e-20, 0, form, false);
        case_cross_entropy(7, 33, DTYPE_F32, DTYPE_F32, 1, -1000, form, false);
        case_cross_entropy(7, 33, DTYPE_F32, DTYPE_F32, 200, 0, form, false);
        case_cross_entropy(5, 5003, DTYPE_F32, DTYPE_F32, 3, 0, form, false);
    }
    for (int d = 0; d < 2; d++) {
        case_cross_entropy_hard(3001, 0, 0.01, float_dtypes[d]);
        case_cross_entropy_hard(1537, 0, 1, float_dtypes[d]);
        case_cross_entropy_hard(35, 1e9, 0, float_dtypes[d]);
    }
    expect_no_failures();
}

/* ---- optimizer ---- */

static const struct update_hashes no_hashes = {NULL, NULL, NULL};

/* What was packed is read back by a product with the identity. */
static void make_adamw(const struct kernel_ops *ops, const struct call *call, const struct tensor *t) {
    if (!tensor_exists(t[4])) {
        ops->adamw(t[0], t[1], t[2], t[3], call->adamw, (struct packed){0}, no_hashes);
        return;
    }
    struct packed packed = test_packed(ops, t[5], true); /* of other weights: all must be written anew */
    ops->adamw(t[0], t[1], t[2], t[3], call->adamw, packed, no_hashes);
    ops->product_forward(t[4], tensor_none(), tensor_none(), packed, t[6], false);
    ops->product_backward_input(t[7], tensor_none(), tensor_none(), packed, t[8], false);
}

static struct tensor identity(enum dtype dtype, int64_t n) {
    struct tensor t = test_filled(make_2d(dtype, n, n), 0);
    for (int64_t i = 0; i < n; i++)
        test_set(t, i * n + i, 1);
    return t;
}

static void case_adamw(int64_t out, int64_t in, enum dtype real, enum dtype copy, double grad_scale, int64_t step) {
    struct call call = {.operation = "adamw",
                        .label = "random",
                        .make = make_adamw,
                        .adamw = {1e-2, 0.9, 0.95, 1e-8, 0.1, step, 0.5}};
    struct tensor second = test_random(make_2d(real, out, in), grad_scale);
    for (int64_t i = 0; i < tensor_elements(second); i++)
        test_set(second, i, test_get(second, i) * test_get(second, i));
    add_sum(&call, "param", test_random(make_2d(real, out, in), 1));
    add_in(&call, "grad", test_random(make_2d(real, out, in), grad_scale));
    add_sum(&call, "m", test_random(make_2d(real, out, in), grad_scale));
    add_sum(&call, "v", second);
    if (copy == DTYPE_COUNT) {
        add_absent(&call);
    } else {
        add_in(&call, "identity of in", identity(copy, in));
        add_in(&call, "packed before", test_random(make_2d(copy, out, in), 1));
        add_out(&call, "packed forward", make_2d(copy, in, out));
        add_in(&call, "identity of out", identity(copy, out));
        add_out(&call, "packed backward", make_2d(copy, out, in));
    }
    run(&call);
}

static void test_adamw(void **state) {
    (void)state;
    for (int i = 0; i < ELEMENT_COUNTS; i++)
        case_adamw(1, element_counts[i], DTYPE_F32, DTYPE_COUNT, i % 2 ? 1e-10 : 1, i % 2 ? 1000 : 1 + i);
    static const int64_t sides[][2] = {{1, 1}, {3, 70}, {64, 32}, {65, 31}, {130, 17}, {200, 96}};
    for (size_t i = 0; i < sizeof sides / sizeof *sides; i++) {
        case_adamw(sides[i][0], sides[i][1], DTYPE_F32, DTYPE_BF16, 1, 1);
        case_adamw(sides[i][0], sides[i][1], DTYPE_F32, DTYPE_F32, 1e-10, 1000);
        case_adamw(sides[i][0], sides[i][1], DTYPE_F32, DTYPE_BF16, 0, 5);
        case_adamw(sides[i][0], sides[i][1], DTYPE_F64, DTYPE_F64, 1, 3);
    }
    expect_no_failures();
}

/* The first step moves by lr whatever beta2 is, and what underflows, or is 0, moves nothing much. */
static void test_adamw_settings(void **state) {
    (void)state;
    static const double beta2[] = {0.95, 0.999, 0.99999, 0.999999}, gradients[] = {1, -1, 1e-3, 0, 1e-24, 1e-30, -1e-30, 1};
    enum { COUNT = 40 };
    for (int b = 0; b < backend_count; b++)
        for (size_t i = 0; i < 2 * sizeof beta2 / sizeof *beta2; i++) {
            bool is_small = i % 2;
            struct tensor t[4]; /* param, grad, m, v */
            for (int k = 0; k < 4; k++)
                t[k] = test_filled(make_1d(DTYPE_F32, COUNT), 0);
            for (int64_t k = 0; k < COUNT; k++)
                test_set(t[1], k, gradients[k % 8]);
            struct adamw_settings settings = {1, 0.9, beta2[i / 2], is_small ? 1e-18 : 1e-10, 0, 1, 1};
            backends[b]->adamw(t[0], t[1], t[2], t[3], settings, (struct packed){0}, no_hashes);
            for (int64_t k = 0; k < COUNT; k++) {
                double g = gradients[k % 8], moved = test_get(t[0], k), expected = g == 0 ? 0 : g > 0 ? -1 : 1;
                bool is_underflow = fabs(g) < 1e-20;
                if (is_underflow ? !(fabs(moved) < (is_small ? 0.05 : 1e-8)) : !(fabs(moved - expected) < 1e-6))
                    fail_msg("%s: beta2 %g, epsilon %g: a gradient of %g moves by %g", backend_names[b], settings.beta2,
                             settings.epsilon, g, moved);
            }
        }
    test_release();
}

/* Of the blocks of what was updated: how many hashes were noted, all of which must be right; where no block ends none may be. */
static int check_hashes(struct tensor t, const uint64_t *hashes) {
    int64_t whole = (int64_t)tensor_bytes(t) / HASH_BLOCK_BYTES;
    int noted = 0;
    for (int64_t block = 0; block < whole; block++) {
        if (hashes[block] == 0)
            continue;
        assert_true(hashes[block] == hash_bytes((const char *)t.data + block * HASH_BLOCK_BYTES, HASH_BLOCK_BYTES, 0));
        noted++;
    }
    assert_true(hashes[whole] == 0);
    return noted;
}

static void case_hashes(const struct kernel_ops *ops, int64_t groups, int64_t out, int64_t in, bool is_packed, int least_noted) {
    enum { BLOCKS_MAX = 256 };
    uint64_t hashes[3][BLOCKS_MAX] = {{0}};
    int64_t bytes = groups * out * in * 4;
    assert_true(bytes / HASH_BLOCK_BYTES < BLOCKS_MAX);
    if (test_is_cuda(ops))
        least_noted = 0; /* what a device wrote is in no cache of the processor */
    struct tensor arrays[4];
    for (int i = 0; i < 4; i++)
        arrays[i] = test_random(tensor_3d(NULL, DTYPE_F32, groups, out, in), 1);
    for (int64_t i = 0; i < groups * out * in; i++)
        test_set(arrays[3], i, fabs(test_get(arrays[3], i)));
    struct packed packed = is_packed ? test_packed(ops, arrays[0], true) : (struct packed){0};
    struct adamw_settings settings = {1e-2, 0.9, 0.95, 1e-8, 0.1, 3, 0.5};
    ops->adamw(arrays[0], arrays[1], arrays[2], arrays[3], settings, packed,
               (struct update_hashes){hashes[0], hashes[1], hashes[2]});
    assert_true(check_hashes(arrays[0], hashes[0]) >= least_noted);
    assert_true(check_hashes(arrays[2], hashes[1]) >= least_noted);
    assert_true(check_hashes(arrays[3], hashes[2]) >= least_noted);
}

static void test_adamw_hashes(void **state) {
    (void)state;
    for (const struct kernel_ops *const *each = test_backends(); *each; each++) {
        const struct kernel_ops *ops = *each;
        for (int is_packed = 0; is_packed < 2; is_packed++) {
            case_hashes(ops, 1, 1, 1, is_packed, 0);
            case_hashes(ops, 1, 1, 1023, is_packed, 0);
            case_hashes(ops, 1, 64, 64, is_packed, 4); /* all */
            case_hashes(ops, 3, 96, 128, is_packed, 36);
            case_hashes(ops, 2, 200, 256, is_packed, 100);
            case_hashes(ops, 1, 130, 71, is_packed, 1); /* some blocks lie across what is updated at once */
            case_hashes(ops, 5, 33, 100, is_packed, 1);
        }
        case_hashes(ops, 1, 1, 25000, false, 24);
    }
    test_release();
}

/* A logit that is no number comes out of the loss of its row, wherever it stands, and of no other row. */
static void case_special_logit(int64_t vocabulary, int64_t column, double value, bool is_number) {
    struct tensor logits = test_random(make_2d(DTYPE_F32, 3, vocabulary), 1), target = test_tensor(make_1d(DTYPE_I32, 3));
    struct tensor row_loss = test_tensor(make_1d(DTYPE_F32, 3)), dlogits = test_tensor(logits);
    test_set(logits, vocabulary + column, value);
    for (int64_t r = 0; r < 3; r++)
        test_set(target, r, (double)((column + 1) % vocabulary));
    for (int b = 0; b < backend_count; b++) {
        struct tensor sum = test_filled(make_1d(DTYPE_F64, 1), 0);
        backends[b]->cross_entropy(logits, target, 1, sum, row_loss, dlogits);
        for (int64_t r = 0; r < 3; r++)
            if (isfinite(test_get(row_loss, r)) != (r != 1 || is_number))
                fail_msg("%s: logit %lld of %lld is %g, the loss of row %lld %g", backend_names[b], (long long)column,
                         (long long)vocabulary, value, (long long)r, test_get(row_loss, r));
        assert_true(isfinite(test_get(sum, 0)) == is_number);
    }
    test_release();
}

static void test_cross_entropy_special_numbers(void **state) {
    (void)state;
    static const int64_t vocabularies[] = {2, 33, 1000, 1001, 8192, 20011};
    for (size_t i = 0; i < sizeof vocabularies / sizeof *vocabularies; i++)
        for (int64_t at = 0; at < 5; at++) {
            int64_t last = vocabularies[i] - 1, column = (int64_t[]){0, last / 300, last / 16, last / 2, last}[at];
            case_special_logit(vocabularies[i], column, NAN, false);
            case_special_logit(vocabularies[i], column, -INFINITY, true);
            case_special_logit(vocabularies[i], column, INFINITY, false);
        }
}

int main(void) {
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rmsnorm),
        cmocka_unit_test(test_qknorm_rope),
        cmocka_unit_test(test_attention),
        cmocka_unit_test(test_attention_kept),
        cmocka_unit_test(test_router),
        cmocka_unit_test(test_router_special_numbers),
        cmocka_unit_test(test_route_and_combine),
        cmocka_unit_test(test_swiglu),
        cmocka_unit_test(test_embedding),
        cmocka_unit_test(test_cross_entropy),
        cmocka_unit_test(test_cross_entropy_special_numbers),
        cmocka_unit_test(test_adamw),
        cmocka_unit_test(test_adamw_settings),
        cmocka_unit_test(test_adamw_hashes),
        cmocka_unit_test(test_combine_rows_onto),
        cmocka_unit_test(test_routed_norm),
        cmocka_unit_test(test_rmsnorm_cast),
        cmocka_unit_test(test_every_backend_had_cases),
    };
    return cmocka_run_group_tests(tests, find_backends, summarize);
}
