#include "bench/bench.h"

#include "train/roof.h"
#include <math.h>
#include <stdio.h>

enum { HEADS = 8, HEAD_DIM = 64, TOKENS = 8192, LABEL_BYTES = 96 };

struct attention {
    const struct kernel_ops *ops;
    struct attention_shape shape;
    struct tensor q, k, v, out, logsumexp, dout, dq, dk, dv;
};

static void run_forward(void *context) {
    const struct attention *a = context;
    a->ops->attention_forward(a->shape, a->q, a->k, a->v, a->out, a->logsumexp);
}

static void run_backward(void *context) {
    const struct attention *a = context;
    a->ops->attention_backward(a->shape, a->dout, a->q, a->k, a->v, a->out, a->logsumexp, a->dq, a->dk, a->dv);
}

static int64_t batch_of(int64_t length) {
    return length < TOKENS ? TOKENS / length : 1;
}

static void take(const struct bench *bench, int64_t length, enum dtype dtype, struct arena *arena, struct attention *a) {
    int64_t batch = batch_of(length), rows = batch * length;
    struct tensor shape = tensor_2d(NULL, dtype, rows, HEADS * HEAD_DIM);
    *a = (struct attention){.ops = bench->ops,
                            .shape = {batch, length, length, HEADS, HEADS, HEAD_DIM, 1 / sqrt(HEAD_DIM)}};
    struct tensor *all[] = {&a->q, &a->k, &a->v, &a->out, &a->dout, &a->dq, &a->dk, &a->dv};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        *all[i] = bench_tensor(bench, arena, shape, 1);
    a->logsumexp = bench_tensor(bench, arena, tensor_2d(NULL, DTYPE_F32, rows, HEADS), 1);
}

static void print_label(int64_t length, bool backward, char label[LABEL_BYTES]) {
    snprintf(label, LABEL_BYTES, "%lld x %lld tokens, 8 heads of 64, %s", (long long)batch_of(length), (long long)length,
             backward ? "backward" : "forward");
}

static bool wants_length(const struct bench *bench, int64_t length) {
    char forward[LABEL_BYTES], backward[LABEL_BYTES];
    print_label(length, false, forward);
    print_label(length, true, backward);
    return bench_wants(bench, forward) || bench_wants(bench, backward);
}

static enum status measure(const struct bench *bench, int64_t length, enum dtype dtype) {
    struct attention a;
    struct arena arena;
    arena_init_counting(&arena);
    take(bench, length, dtype, &arena, &a);
    TRY(arena_init(&arena, bench->device, arena.used));
    take(bench, length, dtype, &arena, &a);
    /* Only what is below the diagonal counts: two products forward, five backward. */
    double roof = roof_multiply(bench->ops, dtype, 0.2);
    double product = 2.0 * (double)a.shape.batch * HEADS * HEAD_DIM * (double)length * (double)length / 2;
    for (int backward = 0; backward < 2; backward++) {
        char label[LABEL_BYTES];
        print_label(length, backward, label);
        if (!bench_wants(bench, label))
            continue;
        struct bench_figure figure = {.name = "attention", .label = label, .precision = dtype, .roof = roof,
                                      .operations = (backward ? 5 : 2) * product};
        figure.time = bench_call(bench, backward ? run_backward : run_forward, &a);
        bench_print(bench, &figure);
    }
    arena_release(&arena);
    return STATUS_OK;
}

enum status bench_attention(const struct bench *bench) {
    int measured = 0;
    for (int i = 0; i < bench->precision_count; i++) {
        int64_t first = bench->sequence_length > 0 ? bench->sequence_length : 512;
        int64_t last = bench->sequence_length > 0 ? first : 8192;
        for (int64_t length = first; length <= last; length *= 2)
            if (wants_length(bench, length)) {
                TRY(measure(bench, length, bench->precisions[i]));
                measured++;
            }
    }
    return measured > 0 ? STATUS_OK : bench_no_case(bench);
}
