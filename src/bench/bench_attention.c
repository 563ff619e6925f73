#include "bench/bench.h"

#include <math.h>
#include <stdio.h>

enum { LABEL_BYTES = 96 };

/* What is measured: heads, and sequences that make up so many tokens. */
struct setup {
    int heads, kv_heads, head_dim;
    int64_t tokens, first_length, last_length;
};
static const struct setup of_processors = {8, 8, 64, 8192, 512, 8192}, of_devices = {16, 4, 128, 16384, 1024, 4096};

static const struct setup *setup_of(const struct bench *bench) {
    return bench_on_device(bench) ? &of_devices : &of_processors;
}

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

static int64_t batch_of(const struct bench *bench, int64_t length) {
    int64_t tokens = setup_of(bench)->tokens;
    return length < tokens ? tokens / length : 1;
}

static void take(const struct bench *bench, int64_t length, enum dtype dtype, struct arena *arena, struct attention *a) {
    const struct setup *setup = setup_of(bench);
    int64_t batch = batch_of(bench, length), rows = batch * length;
    struct tensor wide = tensor_2d(NULL, dtype, rows, setup->heads * setup->head_dim);
    struct tensor narrow = tensor_2d(NULL, dtype, rows, setup->kv_heads * setup->head_dim);
    *a = (struct attention){.ops = bench->ops,
                            .shape = {batch, length, length, setup->heads, setup->kv_heads, setup->head_dim,
                                      1 / sqrt(setup->head_dim)}};
    struct tensor *of_queries[] = {&a->q, &a->out, &a->dout, &a->dq}, *of_keys[] = {&a->k, &a->v, &a->dk, &a->dv};
    for (size_t i = 0; i < sizeof of_queries / sizeof *of_queries; i++) {
        *of_queries[i] = bench_tensor(bench, arena, wide, 1);
        *of_keys[i] = bench_tensor(bench, arena, narrow, 1);
    }
    a->logsumexp = bench_tensor(bench, arena, tensor_2d(NULL, DTYPE_F32, rows, setup->heads), 1);
}

static void print_label(const struct bench *bench, int64_t length, bool backward, char label[LABEL_BYTES]) {
    const struct setup *setup = setup_of(bench);
    char keys[32] = "";
    if (setup->kv_heads < setup->heads)
        snprintf(keys, sizeof keys, ", %d for keys", setup->kv_heads);
    snprintf(label, LABEL_BYTES, "%lld x %lld tokens, %d heads of %d%s, %s", (long long)batch_of(bench, length),
             (long long)length, setup->heads, setup->head_dim, keys, backward ? "backward" : "forward");
}

static bool wants_length(const struct bench *bench, int64_t length) {
    char forward[LABEL_BYTES], backward[LABEL_BYTES];
    print_label(bench, length, false, forward);
    print_label(bench, length, true, backward);
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
    double width = a.shape.head_count * a.shape.head_dim;
    double product = 2.0 * (double)a.shape.batch * width * (double)length * (double)length / 2;
    for (int backward = 0; backward < 2; backward++) {
        char label[LABEL_BYTES];
        print_label(bench, length, backward, label);
        if (!bench_wants(bench, label))
            continue;
        struct bench_figure figure = {.name = "attention", .label = label, .precision = dtype,
                                      .operations = (backward ? 5 : 2) * product};
        figure.time = bench_call_and_roof(bench, backward ? run_backward : run_forward, &a, dtype, &figure.roof);
        bench_print(bench, &figure);
    }
    arena_release(&arena);
    return STATUS_OK;
}

enum status bench_attention(const struct bench *bench) {
    int measured = 0;
    for (int i = 0; i < bench->precision_count; i++) {
        int64_t first = bench->sequence_length > 0 ? bench->sequence_length : setup_of(bench)->first_length;
        int64_t last = bench->sequence_length > 0 ? first : setup_of(bench)->last_length;
        for (int64_t length = first; length <= last; length *= 2)
            if (wants_length(bench, length)) {
                TRY(measure(bench, length, bench->precisions[i]));
                measured++;
            }
    }
    return measured > 0 ? STATUS_OK : bench_no_case(bench);
}
