/* What runs a case over every backend that this machine can run.
 *
 * A case is a call: operands with their numbers, and the operation. It is made once in f64 by the reference,
 * from operands already rounded to their dtypes, and then by every backend with 1, 2, 3 and 4 threads, or twice on a device
 * (under the sanitizers with 1 and 3, or once):
 *  - outputs, poisoned before, agree with the reference by norm(error) / norm(reference); integers exactly
 *  - any number of threads gives the same bits, wherever operands lie; on a device, where these are aligned alike
 *  - nothing beside the outputs is written: guard bytes and inputs stay as they were
 *  - outputs that may lie over an input do so where the case says it (OVER)
 */
#pragma once

#include "base/threads.h"
#include "kernels/kernels_testing.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <cmocka.h>

enum { OPERANDS_MAX = 12, BACKENDS_MAX = 10, THREADS_MAX = 4, FAILURES_SHOWN = 12 };

enum role {
    ABSENT,
    IN,
    OUT,  /* poisoned before */
    SUM,  /* += : starts from the operand's numbers */
    OVER, /* an output in the memory of the operand `over`, which is an input */
};

struct operand {
    const char *name;
    enum role role;
    struct tensor start; /* numbers before the call; for OUT the shape only */
    int over;
};

struct call {
    const char *operation, *label;
    void (*make)(const struct kernel_ops *ops, const struct call *call, const struct tensor *t);
    struct operand operands[OPERANDS_MAX];
    int operand_count;
    double slack;     /* times the usual bound: for cases that are ill-conditioned by nature */
    double magnitude; /* rms below which an output counts as rounding of something that cancelled */

    bool transpose_a, transpose_b, accumulate, normalize;
    int64_t sequence_length, first_position;
    struct attention_shape attention;
    struct router_loss_scales scales;
    struct adamw_settings adamw;
    double scalar; /* epsilon, value or scale */
    bool is_long;  /* not for the model of a device, which is slow */
};

static const struct kernel_ops *backends[BACKENDS_MAX];
static const char *backend_names[BACKENDS_MAX];
static int backend_count, failure_count;
static long cases_made[BACKENDS_MAX], calls_made[BACKENDS_MAX];
static double worst_share[BACKENDS_MAX]; /* largest error over its bound */

static const enum dtype real_of[DTYPE_COUNT] = {DTYPE_F32, DTYPE_F32, DTYPE_F64, DTYPE_I32};

/* ---- operands ---- */

static inline struct tensor make_1d(enum dtype dtype, int64_t n) {
    return tensor_1d(NULL, dtype, n);
}

static inline struct tensor make_2d(enum dtype dtype, int64_t rows, int64_t columns) {
    return tensor_2d(NULL, dtype, rows, columns);
}

static inline struct tensor make_3d(enum dtype dtype, int64_t d0, int64_t d1, int64_t d2) {
    return tensor_3d(NULL, dtype, d0, d1, d2);
}

static inline int add_operand(struct call *call, const char *name, enum role role, struct tensor start, int over) {
    assert_in_range(call->operand_count, 0, OPERANDS_MAX - 1);
    call->operands[call->operand_count] = (struct operand){name, role, start, over};
    return call->operand_count++;
}

static inline int add_in(struct call *call, const char *name, struct tensor numbers) {
    return add_operand(call, name, IN, numbers, -1);
}

static inline int add_out(struct call *call, const char *name, struct tensor like) {
    return add_operand(call, name, OUT, like, -1);
}

static inline int add_sum(struct call *call, const char *name, struct tensor numbers) {
    return add_operand(call, name, SUM, numbers, -1);
}

static inline int add_out_or_sum(struct call *call, const char *name, struct tensor like, double scale) {
    return call->accumulate ? add_sum(call, name, test_random(like, scale)) : add_out(call, name, like);
}

/* An output of its own, or over operand `over` where that is not negative. */
static inline int add_out_over(struct call *call, const char *name, struct tensor like, int over) {
    return over < 0 ? add_out(call, name, like) : add_operand(call, name, OVER, like, over);
}

static inline int add_absent(struct call *call) {
    return add_operand(call, "absent", ABSENT, tensor_none(), -1);
}

/* ---- the runner ---- */

static inline void report(const struct call *call, const char *backend, const char *format, ...) PRINTF_LIKE(3, 4);

static inline void report(const struct call *call, const char *backend, const char *format, ...) {
    if (failure_count++ >= FAILURES_SHOWN)
        return;
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    print_error("%s of %s (%s): %s\n", call->operation, backend, call->label, text);
    for (int i = 0; i < call->operand_count; i++) {
        struct tensor t = call->operands[i].start;
        print_error("    %s %s [%lld,%lld,%lld]\n", call->operands[i].name, dtype_name(t.dtype),
                    (long long)t.shape[0], (long long)t.shape[1], (long long)t.shape[2]);
    }
}

/* Memory for every operand: as given, or all in f64 for the reference. */
static inline void place_operands(const struct call *call, bool in_f64, struct tensor *t) {
    for (int i = 0; i < call->operand_count; i++) {
        const struct operand *operand = &call->operands[i];
        struct tensor like = operand->start;
        if (in_f64 && like.dtype != DTYPE_I32)
            like.dtype = DTYPE_F64;
        if (operand->role == ABSENT)
            t[i] = tensor_none();
        else if (operand->role == OUT)
            t[i] = test_tensor(like);
        else if (operand->role == OVER)
            t[i] = in_f64 ? test_tensor(like) : t[operand->over];
        else
            t[i] = test_copy(operand->start, like.dtype);
    }
}

static inline bool is_output(const struct call *call, int i) {
    return call->operands[i].role >= OUT;
}

static inline bool is_overwritten(const struct call *call, int i) {
    for (int j = 0; j < call->operand_count; j++)
        if (call->operands[j].role == OVER && call->operands[j].over == i)
            return true;
    return false;
}

/* What an output may be off, relative to the norm of the reference. */
static inline double bound_of(const struct call *call, struct tensor out) {
    bool any_f32 = false, any_bf16 = false;
    for (int i = 0; i < call->operand_count; i++) {
        any_f32 |= call->operands[i].role != ABSENT && call->operands[i].start.dtype == DTYPE_F32;
        any_bf16 |= call->operands[i].start.dtype == DTYPE_BF16;
    }
    double bound = any_bf16 ? 1e-5 : any_f32 ? 2e-6 : 1e-12;
    return bound * call->slack + (out.dtype == DTYPE_BF16 ? 4e-3 : 0);
}

static inline void compare(const struct call *call, int backend, int i, struct tensor found,
                    struct tensor expected) {
    double error = 0, norm = 0, bound = bound_of(call, found), count = (double)tensor_elements(found);
    for (int64_t j = 0, end = tensor_elements(found); j < end; j++) {
        double wanted = test_get(expected, j), difference = test_get(found, j) - wanted;
        error += difference * difference;
        norm += wanted * wanted;
    }
    if (found.dtype == DTYPE_I32) {
        if (error != 0)
            report(call, backend_names[backend], "%s: integers differ", call->operands[i].name);
        return;
    }
    double allowed = bound * fmax(sqrt(norm), call->magnitude * sqrt(count));
    if (!(sqrt(error) <= allowed))
        report(call, backend_names[backend], "%s: error %.3g, norm %.3g, allowed %.3g",
               call->operands[i].name, sqrt(error), sqrt(norm), allowed);
    else if (allowed > 0)
        worst_share[backend] = fmax(worst_share[backend], sqrt(error) / allowed);
}

static inline bool same_bytes(struct tensor a, struct tensor b) {
    return memcmp(a.data, b.data, tensor_bytes(a)) == 0;
}

static inline void check_untouched(const struct call *call, int backend, const struct tensor *t) {
    if (!test_guards_hold())
        report(call, backend_names[backend], "wrote outside of its outputs");
    for (int i = 0; i < call->operand_count; i++)
        if (call->operands[i].role == IN && !is_overwritten(call, i) &&
            !same_bytes(t[i], call->operands[i].start))
            report(call, backend_names[backend], "changed its input %s", call->operands[i].name);
}

/* Whether a backend knows the dtypes of a call; sums are f64 everywhere. */
static inline bool knows_dtypes(const struct call *call, int backend) {
    for (int i = 0; i < call->operand_count; i++) {
        const struct operand *operand = &call->operands[i];
        bool is_sum = strcmp(operand->name, "sum") == 0 || strcmp(operand->name, "loss_sum") == 0 ||
                      strcmp(operand->name, "stats") == 0;
        if (operand->role != ABSENT && !is_sum && !test_knows(backends[backend], operand->start.dtype))
            return false;
    }
    return true;
}

static inline void run_backend(const struct call *call, int backend, const struct tensor *expected) {
    struct tensor first[OPERANDS_MAX], t[OPERANDS_MAX];
    static int64_t number;
    if (!knows_dtypes(call, backend) || (call->is_long && strcmp(backend_names[backend], "cudamodel") == 0) ||
        !test_takes_one_of(backends[backend], number++, TEST_MODEL_SHARE))
        return;
    int repetitions = test_repetitions(backends[backend], THREADS_MAX);
    uint64_t seed = test_seed;
    for (int threads = 1; threads <= repetitions; threads += TEST_THREADS_STEP) {
        struct tensor *placed = threads == 1 ? first : t;
        if (test_is_cuda(backends[backend]))
            test_seed = seed; /* the same alignments again: rule 1 of kernels.h */
        place_operands(call, false, placed);
        threads_set_count(threads);
        call->make(backends[backend], call, placed);
        check_untouched(call, backend, placed);
        calls_made[backend]++;
        for (int i = 0; i < call->operand_count; i++) {
            if (!is_output(call, i))
                continue;
            if (threads == 1)
                compare(call, backend, i, first[i], expected[i]);
            else if (!same_bytes(first[i], t[i]))
                report(call, backend_names[backend], "%s: repetition %d, of as many threads, gives other bits than the first",
                       call->operands[i].name, threads);
        }
    }
    cases_made[backend]++;
}

/* Run the case everywhere and give its memory back. */
static inline void run(struct call *call) {
    struct tensor expected[OPERANDS_MAX];
    uint64_t seed = test_seed;
    if (call->slack == 0)
        call->slack = 1;
    place_operands(call, true, expected);
    call->make(kernels_ref(), call, expected);
    for (int b = 0; b < backend_count; b++)
        run_backend(call, b, expected);
    test_seed = seed; /* the numbers of later cases are the same whichever backends run here */
    test_release();
}

static inline void expect_no_failures(void) {
    int count = failure_count;
    failure_count = 0;
    if (count)
        fail_msg("%d failures", count);
}

/* ---- lists that cases are drawn from ---- */

/* Around and between the tiles that a fast kernel may have. */
static const int64_t odd_sizes[] = {1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255};
enum { ODD_SIZES = sizeof odd_sizes / sizeof *odd_sizes };

static const int64_t element_counts[] = {0, 1, 2, 7, 15, 16, 17, 31, 33, 255, 1000, 70001};
enum { ELEMENT_COUNTS = sizeof element_counts / sizeof *element_counts };

/* dtype of the inputs and of the output. */
struct dtype_pair {
    enum dtype in, out;
};
static const struct dtype_pair product_dtypes[] = {
    {DTYPE_F32, DTYPE_F32}, {DTYPE_BF16, DTYPE_F32}, {DTYPE_BF16, DTYPE_BF16}, {DTYPE_F64, DTYPE_F64}};
enum { PRODUCT_DTYPES = sizeof product_dtypes / sizeof *product_dtypes };

static const enum dtype float_dtypes[] = {DTYPE_F32, DTYPE_BF16, DTYPE_F64};
enum { FLOAT_DTYPES = 3 };

/* ---- backends ---- */

static inline bool is_available(const char *name) {
    for (int b = 0; b < backend_count; b++)
        if (strcmp(backend_names[b], name) == 0)
            return true;
    return false;
}

static inline int find_backends(void **state) {
    (void)state;
    for (const struct kernel_ops *const *ops = test_backends(); *ops && backend_count < BACKENDS_MAX; ops++) {
        backends[backend_count] = *ops;
        backend_names[backend_count++] = (*ops)->name;
    }
    return backend_count > 0 ? 0 : -1;
}

/* The last test: what is spared cases is not to be spared all. */
static inline void test_every_backend_had_cases(void **state) {
    (void)state;
    for (int b = 0; b < backend_count; b++)
        if (cases_made[b] == 0)
            fail_msg("%s had no case", backend_names[b]);
}

static inline int summarize(void **state) {
    (void)state;
    static const char *const all[] = {"ref", "portable", "avx2", "avx512", "avx512bf16", "amx", "cuda"};
    for (int b = 0; b < backend_count; b++)
        printf("%s: %ld cases, %ld calls, largest error %.2f of its bound\n", backend_names[b],
               cases_made[b], calls_made[b], worst_share[b]);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        char model[32];
        snprintf(model, sizeof model, "%smodel", all[i]);
        if (!is_available(all[i]))
            printf("%s: not exercised here%s\n", all[i], is_available(model) ? "; its code ran on a model in software" : "");
    }
    test_release();
    return 0;
}
