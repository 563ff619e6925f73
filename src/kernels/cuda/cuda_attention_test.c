/* Attention of bf16 on a CUDA device (or its model) whose operands are aligned, in the device's own memory, so that they go to
 * the matrix units from where they lie: lengths around the tiles, heads that share keys, few items and more than the device
 * has processors; and of few queries to many keys. Outputs are poisoned and guarded, compared with the reference, and made twice:
 * the same bits. */
#include "kernels/cuda/cuda_testing.h"

struct problem {
    struct attention_shape shape;
    double size; /* of the numbers of q and k */
};

static void complain(const struct problem *p, const char *what, const char *how) {
    print_error("%lld x %lld, %lld keys, %d heads, %d for keys, of %d, size %g: %s %s\n", (long long)p->shape.batch,
                (long long)p->shape.query_count, (long long)p->shape.key_count, p->shape.head_count, p->shape.kv_head_count,
                p->shape.head_dim, p->size, what, how);
    failures++;
}

/* Two makings of an output against that of the reference: the error of all, and the largest of a row, which rows of a tile that
 * went wrong do not hide in. */
static void check(const struct problem *p, const char *what, const struct tensor made[2], struct tensor expected) {
    struct tensor found = test_tensor(expected), again = test_tensor(expected);
    size_t bytes = tensor_bytes(expected);
    double error = 0, norm = 0, worst = 0, bound = expected.dtype == DTYPE_BF16 ? 6e-3 : 1e-5;
    int64_t columns = expected.shape[1], count = tensor_elements(expected), at = 0;
    char text[160];
    if (!output_guard_holds(made[0]))
        complain(p, what, "was written behind its end");
    device->copy_to_host(found.data, made[0].data, bytes);
    device->copy_to_host(again.data, made[1].data, bytes);
    if (memcmp(found.data, again.data, bytes) != 0)
        complain(p, what, "has other bits the second time");
    for (int64_t i = 0; i < count; i++)
        norm += test_get(expected, i) * test_get(expected, i) / (double)count;
    for (int64_t row = 0; row < count / columns; row++) {
        double sum = 0, row_norm = 0;
        for (int64_t i = row * columns; i < (row + 1) * columns; i++) {
            double difference = test_get(found, i) - test_get(expected, i);
            sum += difference * difference;
            row_norm += test_get(expected, i) * test_get(expected, i);
        }
        error += sum / (double)count;
        /* The first rows of a gradient are far above the others. */
        double share = sum / (16 * (norm + 0.01) * (double)columns + row_norm);
        if (!(share <= worst))
            worst = share, at = row;
    }
    if (!(sqrt(error) <= bound * sqrt(norm + 1e-6)) || !(sqrt(worst) <= bound)) {
        snprintf(text, sizeof text, "has relative error %.3g, most in row %lld: %.3g, bound %.3g", sqrt(error / norm),
                 (long long)at, sqrt(worst), bound);
        complain(p, what, text);
    }
}

struct operands {
    struct tensor q, k, v, dout, out, lse, dq, dk, dv;
};

static struct operands operands_for(const struct problem *p) {
    struct attention_shape s = p->shape;
    struct operands o;
    struct tensor wide = tensor_2d(NULL, DTYPE_BF16, s.batch * s.query_count, s.head_count * s.head_dim);
    struct tensor narrow = tensor_2d(NULL, DTYPE_BF16, s.batch * s.key_count, s.kv_head_count * s.head_dim);
    o.q = test_random(wide, p->size), o.k = test_random(narrow, p->size), o.v = test_random(narrow, 1);
    o.dout = test_random(wide, 1);
    o.out = test_tensor(wide), o.dq = test_tensor(wide), o.dk = test_tensor(narrow), o.dv = test_tensor(narrow);
    o.lse = test_tensor(tensor_2d(NULL, DTYPE_F32, s.batch * s.query_count, s.head_count));
    return o;
}

/* The reference has filled `expected` already: what is found must not begin so. */
static struct tensor poisoned_output(struct tensor expected) {
    return output_on_device(test_tensor(expected));
}

static void check_forward(const struct problem *p, const struct operands *o) {
    struct tensor q = on_device(o->q), k = on_device(o->k), v = on_device(o->v), out[2], lse[2];
    for (int i = 0; i < 2; i++) {
        out[i] = poisoned_output(o->out), lse[i] = poisoned_output(o->lse);
        ops->attention_forward(p->shape, q, k, v, out[i], lse[i]);
    }
    check(p, "out", out, o->out);
    check(p, "logsumexp", lse, o->lse);
}

static void check_backward(const struct problem *p, const struct operands *o) {
    struct tensor q = on_device(o->q), k = on_device(o->k), v = on_device(o->v), dout = on_device(o->dout);
    struct tensor out = on_device(o->out), lse = on_device(o->lse), dq[2], dk[2], dv[2];
    for (int i = 0; i < 2; i++) {
        dq[i] = poisoned_output(o->dq), dk[i] = poisoned_output(o->dk), dv[i] = poisoned_output(o->dv);
        ops->attention_backward(p->shape, dout, q, k, v, out, lse, dq[i], dk[i], dv[i]);
    }
    check(p, "dq", dq, o->dq);
    check(p, "dk", dk, o->dk);
    check(p, "dv", dv, o->dv);
}

/* Few queries, many keys: forward only. */
static void check_serving(int64_t queries, int64_t keys, int heads, int kv_heads, int head_dim, double size) {
    struct problem p = {{1, queries, keys, heads, kv_heads, head_dim, 1 / sqrt(head_dim)}, size};
    struct operands o = operands_for(&p);
    kernels_ref()->attention_forward(p.shape, o.q, o.k, o.v, o.out, o.lse);
    check_forward(&p, &o);
    arena_rewind(&arena, 0);
    test_release();
}

static void check_problem(int64_t batch, int64_t length, int heads, int kv_heads, int head_dim, double size) {
    struct problem p = {{batch, length, length, heads, kv_heads, head_dim, 1 / sqrt(head_dim)}, size};
    struct operands o = operands_for(&p);
    const struct kernel_ops *ref = kernels_ref();
    ref->attention_forward(p.shape, o.q, o.k, o.v, o.out, o.lse);
    ref->attention_backward(p.shape, o.dout, o.q, o.k, o.v, o.out, o.lse, o.dq, o.dk, o.dv);
    check_forward(&p, &o);
    check_backward(&p, &o);
    arena_rewind(&arena, 0);
    test_release();
}

static void test_attention(void **state) {
    (void)state;
    static const struct {
        int batch, length, heads, kv_heads, head_dim;
    } shapes[] = {
        {1, 1, 2, 1, 128},   {2, 2, 2, 1, 64},    {2, 63, 2, 1, 128},  {1, 64, 4, 1, 128},  {2, 65, 2, 2, 128},
        {1, 100, 3, 1, 96},  {1, 127, 3, 1, 64},  {1, 128, 2, 1, 128}, {2, 129, 4, 2, 128}, {1, 191, 2, 1, 72},
        {1, 193, 2, 1, 128}, {1, 200, 2, 1, 8},   {1, 255, 1, 1, 128}, {1, 256, 2, 1, 64},  {2, 257, 2, 1, 128},
        {1, 320, 4, 1, 128}, {1, 384, 1, 1, 128}, {2, 385, 2, 2, 64},  {1, 513, 2, 1, 128}, {1, 520, 4, 2, 128},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        check_problem(shapes[i].batch, shapes[i].length, shapes[i].heads, shapes[i].kv_heads, shapes[i].head_dim, 1);
    check_problem(1, 300, 2, 1, 128, 3); /* a few keys have all the weight */
    check_serving(1, 4097, 4, 1, 128, 1);
    check_serving(1, 1000, 7, 1, 64, 3);
    check_serving(4, 513, 8, 2, 128, 1);
    check_serving(16, 300, 4, 4, 128, 1);
#ifndef CADRE_CUDA_MODEL
    check_serving(1, 30000, 16, 4, 128, 1); /* several turns a part */
    check_serving(16, 4100, 16, 4, 128, 1);
    check_problem(30, 300, 4, 4, 128, 1); /* several items a block */
    check_problem(17, 390, 12, 4, 64, 1);
    check_problem(1, 2100, 4, 1, 128, 1); /* long rows of tiles */
#endif
    assert_int_equal(failures, 0);
    expect_kernels("backward_keys", "sm90", true);
    expect_kernels("attend_part", "tiles", false);
}

static void test_if_there_is_one(void **state) {
    if (device)
        test_attention(state);
}

int main(void) {
    static const struct CMUnitTest tests[] = {cmocka_unit_test(test_if_there_is_one)};
    return cmocka_run_group_tests(tests, find_device, leave_device);
}
