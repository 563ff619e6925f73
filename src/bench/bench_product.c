/* Products: dense ones over packed weights, and grouped ones over the routings that a model meets. */
#include "bench/bench.h"

#include "base/memory.h"
#include "base/random.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { GROUPS_MAX = 256 };

/* E (0: dense), N routed rows from `tokens` rows of x, O, I; the busiest expert has `skew` times the rows of another. */
struct shape {
    const char *label;
    int64_t experts, rows, tokens, out, in;
    double skew;
};

struct product {
    const struct kernel_ops *ops;
    struct tensor x, dy, y, dx, dw, rows, offsets, w, m, v;
    struct packed packed;
    bool has_dense; /* the library did what it was asked for */
};

static void run_pack(void *context) {
    const struct product *p = context;
    p->ops->pack(p->w, p->packed);
}

static void run_forward(void *context) {
    const struct product *p = context;
    p->ops->product_forward(p->x, p->rows, p->offsets, p->packed, p->y, false);
}

static void run_backward_input(void *context) {
    const struct product *p = context;
    p->ops->product_backward_input(p->dy, tensor_none(), p->offsets, p->packed, p->dx, false);
}

/* As the first micro-batch of a step does it: written. Others add. */
static void run_backward_weight(void *context) {
    const struct product *p = context;
    p->ops->product_backward_weight(p->dy, tensor_none(), p->x, p->rows, p->offsets, p->dw, false);
}

static void run_adding_weight(void *context) {
    const struct product *p = context;
    p->ops->product_backward_weight(p->dy, tensor_none(), p->x, p->rows, p->offsets, p->dw, true);
}

static void run_products(void *context) {
    run_forward(context);
    run_backward_input(context);
    run_backward_weight(context);
}

static void run_pack_and_products(void *context) {
    run_pack(context);
    run_products(context);
}

static void update(const struct product *p, struct packed packed) {
    const struct adamw_settings still = {.lr = 0, .beta1 = 0.9, .beta2 = 0.95, .epsilon = 1e-8, .step = 1, .grad_scale = 1};
    p->ops->adamw(p->w, p->dw, p->m, p->v, still, packed, (struct update_hashes){0});
}

static void run_update(void *context) {
    update(context, (struct packed){0});
}

static void run_update_and_pack(void *context) {
    const struct product *p = context;
    update(p, p->packed);
}

/* What the library that the roof is measured by makes of the same numbers without experts. */
static void run_dense(struct product *p, enum dense_form form) {
    p->has_dense &= p->ops->multiply_dense(p->packed.dtype, form, p->dy.shape[0], p->packed.out, p->packed.in);
}

static void run_dense_forward(void *context) {
    run_dense(context, DENSE_FORWARD);
}

static void run_dense_input(void *context) {
    run_dense(context, DENSE_INPUT);
}

static void run_dense_weight(void *context) {
    run_dense(context, DENSE_WEIGHT);
}

/* Rows per expert: even but for the first one, with some unevenness as a router has it. */
static void make_offsets(const struct shape *s, int32_t *offset) {
    double share[GROUPS_MAX], sum = 0;
    for (int64_t e = 0; e < s->experts; e++)
        sum += share[e] = (e == 0 ? s->skew : 1) * (s->skew == 1 ? 1 : 0.8 + 0.4 * random_uniform(2, 0, (uint64_t)e));
    double before = 0;
    offset[0] = 0;
    for (int64_t e = 0; e < s->experts; e++) {
        before += share[e];
        offset[e + 1] = (int32_t)lround((double)s->rows * before / sum);
    }
}

static void take(const struct bench *bench, const struct shape *s, enum dtype dtype, struct arena *arena,
                 struct product *p) {
    int64_t groups = s->experts > 0 ? s->experts : 1;
    int32_t offset[GROUPS_MAX + 1], *row = memory_must((size_t)s->rows, sizeof *row);
    make_offsets(s, offset);
    for (int64_t r = 0; r < s->rows; r++)
        row[r] = (int32_t)(random_bits(3, 0, (uint64_t)r) % (uint64_t)s->tokens);
    *p = (struct product){.ops = bench->ops, .rows = tensor_none(), .offsets = tensor_none()};
    p->x = bench_tensor(bench, arena, tensor_2d(NULL, dtype, s->tokens, s->in), 1);
    p->dy = bench_tensor(bench, arena, tensor_2d(NULL, dtype, s->rows, s->out), 1);
    p->y = bench_tensor(bench, arena, tensor_2d(NULL, dtype, s->rows, s->out), 0);
    p->dx = bench_tensor(bench, arena, tensor_2d(NULL, dtype, s->rows, s->in), 0);
    p->w = bench_tensor(bench, arena, tensor_3d(NULL, DTYPE_F32, groups, s->out, s->in), 0.05);
    p->dw = bench_tensor(bench, arena, p->w, 0);
    p->m = bench_tensor(bench, arena, p->w, 0);
    p->v = bench_tensor(bench, arena, p->w, 0);
    if (s->experts > 0) {
        p->rows = bench_indices(bench, arena, row, s->rows);
        p->offsets = bench_indices(bench, arena, offset, s->experts + 1);
    }
    p->packed = (struct packed){NULL, dtype, groups, s->out, s->in, true};
    p->packed.data = arena_take(arena, bench->ops->packed_bytes(p->packed));
    free(row);
}

static const struct part {
    const char *label;
    void (*run)(void *context);
    double products;
} parts[] = {{"forward", run_forward, 1},
             {"input gradient", run_backward_input, 1},
             {"weight gradient", run_backward_weight, 1},
             {"weight gradient, added", run_adding_weight, 1},
             {"packing and all three", run_pack_and_products, 3},
             /* What a training step does with these weights: the optimizer's pass writes them packed, too. */
             {"all three, packed by the update", run_products, 3},
             {"dense, by the roof's library, forward", run_dense_forward, 1},
             {"dense, by the roof's library, input gradient", run_dense_input, 1},
             {"dense, by the roof's library, weight gradient", run_dense_weight, 1}};
enum { PACKED_BY_UPDATE = 5, DENSE_PARTS = 6 };
enum { PARTS = sizeof parts / sizeof *parts, LABEL_BYTES = 96 };

static void print_label(const struct shape *s, int part, char label[LABEL_BYTES]) {
    snprintf(label, LABEL_BYTES, "%s, %s", s->label, parts[part].label);
}

/* A dense product of as many rows is the same for even and for uneven routing. */
static bool wants_part(const struct bench *bench, const struct shape *s, int part) {
    char label[LABEL_BYTES];
    print_label(s, part, label);
    return bench_wants(bench, label) && (part < DENSE_PARTS || (bench->ops->multiply_dense && s->skew == 1));
}

static bool wants_shape(const struct bench *bench, const struct shape *s) {
    bool wants = false;
    for (int i = 0; i < PARTS && !wants; i++)
        wants = wants_part(bench, s, i);
    return wants;
}

/* How much longer an update takes when it packs. */
static double packing_in_update(const struct bench *bench, struct product *p) {
    double *longer = memory_must((size_t)bench->rounds, sizeof *longer);
    struct bench once = *bench;
    once.rounds = 1;
    for (int i = 0; i < bench->rounds; i++)
        longer[i] = bench_call(&once, run_update_and_pack, p).median - bench_call(&once, run_update, p).median;
    double median = bench_time_of(longer, bench->rounds).median;
    free(longer);
    return fmax(median, 0);
}

static void measure(const struct bench *bench, const char *name, const struct shape *s, struct product *p) {
    double operations = 2 * (double)s->rows * (double)s->out * (double)s->in;
    run_pack(p);
    for (int i = 0; i < PARTS; i++) {
        char label[LABEL_BYTES];
        if (!wants_part(bench, s, i))
            continue;
        print_label(s, i, label);
        p->has_dense = true;
        struct bench_figure figure = {.name = name, .label = label, .precision = p->packed.dtype,
                                      .operations = parts[i].products * operations};
        figure.time = bench_call_and_roof(bench, parts[i].run, p, p->packed.dtype, &figure.roof);
        if (i >= DENSE_PARTS && !p->has_dense)
            continue;
        double packing = i == PACKED_BY_UPDATE ? packing_in_update(bench, p) : 0;
        figure.time = (struct bench_time){figure.time.median + packing, figure.time.least + packing, figure.time.most + packing};
        bench_print(bench, &figure);
    }
}

static enum status measure_shape(const struct bench *bench, const char *name, const struct shape *s, enum dtype dtype) {
    struct product p;
    struct arena arena;
    arena_init_counting(&arena);
    take(bench, s, dtype, &arena, &p);
    TRY(arena_init(&arena, bench->device, arena.used));
    take(bench, s, dtype, &arena, &p);
    measure(bench, name, s, &p);
    arena_release(&arena);
    return STATUS_OK;
}

static enum status measure_all(const struct bench *bench, const char *name, const struct shape *shapes, int count) {
    int measured = 0;
    for (int i = 0; i < bench->precision_count; i++)
        for (int k = 0; k < count; k++)
            if (wants_shape(bench, &shapes[k])) {
                TRY(measure_shape(bench, name, &shapes[k], bench->precisions[i]));
                measured++;
            }
    return measured > 0 ? STATUS_OK : bench_no_case(bench);
}

enum status bench_gemm(const struct bench *bench) {
    static const struct shape shapes[] = {
        {"4096 x 512 -> 1536", 0, 4096, 4096, 1536, 512, 1}, {"4096 x 512 -> 512", 0, 4096, 4096, 512, 512, 1},
        {"4096 x 512 -> 8192", 0, 4096, 4096, 8192, 512, 1}, {"512 x 512 -> 1536", 0, 512, 512, 1536, 512, 1},
        {"128 x 512 -> 1536", 0, 128, 128, 1536, 512, 1},    {"37 x 512 -> 1536", 0, 37, 37, 1536, 512, 1},
        {"1 x 768 -> 2048", 0, 1, 1, 2048, 768, 1},
    };
    static const struct shape of_devices[] = {
        {"32768 x 2048 -> 4096", 0, 32768, 32768, 4096, 2048, 1},
        {"32768 x 2048 -> 32768", 0, 32768, 32768, 32768, 2048, 1},
        {"8192 x 8192 -> 8192", 0, 8192, 8192, 8192, 8192, 1},
        {"4096 x 2048 -> 2048", 0, 4096, 4096, 2048, 2048, 1},
    };
    return bench_on_device(bench) ? measure_all(bench, "gemm", of_devices, sizeof of_devices / sizeof *of_devices)
                                  : measure_all(bench, "gemm", shapes, sizeof shapes / sizeof *shapes);
}

enum status bench_moe(const struct bench *bench) {
    static const struct shape shapes[] = {
        {"8 experts top-2 of 4096", 8, 8192, 4096, 1024, 512, 1},
        {"8 experts top-2 of 4096, 10:1", 8, 8192, 4096, 1024, 512, 10},
        {"8 experts top-2 of 512", 8, 1024, 512, 1024, 512, 1},
        {"64 experts top-8 of 1024", 64, 8192, 1024, 256, 512, 1},
        {"64 experts top-8 of 1024, 10:1", 64, 8192, 1024, 256, 512, 10},
        {"64 experts top-8 of 128", 64, 1024, 128, 256, 512, 1},
    };
    static const struct shape of_devices[] = {
        {"8 experts top-2 of 32768", 8, 65536, 32768, 4096, 2048, 1},
        {"8 experts top-2 of 32768, 10:1", 8, 65536, 32768, 4096, 2048, 10},
        {"64 experts top-8 of 32768", 64, 262144, 32768, 1024, 2048, 1},
        {"64 experts top-8 of 32768, 10:1", 64, 262144, 32768, 1024, 2048, 10},
    };
    return bench_on_device(bench) ? measure_all(bench, "moe", of_devices, sizeof of_devices / sizeof *of_devices)
                                  : measure_all(bench, "moe", shapes, sizeof shapes / sizeof *shapes);
}
