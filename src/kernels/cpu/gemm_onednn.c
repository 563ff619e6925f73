/* Invariants
 *  1. oneDNN never sees more than one thread: it may divide K by the number of threads it has. We cut C into tiles by
 *     the shape alone, and every tile is a product of its own, made and executed under omp_set_num_threads(1).
 *  2. K is never cut: a number of C is the work of one oneDNN call.
 *  3. Primitives are shared and immutable; what an execution writes is its own scratchpad, scratch of its task. One is
 *     found once per call and kind of tile, before the tiles start, and cannot be evicted until they are done (users).
 */
#include "kernels/cpu/gemm_onednn.h"
#include "base/threads.h"
#include "kernels/cpu/scratch.h"

#include <omp.h>
#include <oneapi/dnnl/dnnl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { PRIMITIVES_MAX = 256 };

/* One product of a tile: everything that its primitive depends on. No padding, so that memcmp compares it. */
struct product_key {
    int64_t m, n, k;
    int64_t a_strides[2], b_strides[2], c_stride;
    int32_t in_dtype, out_dtype, accumulate, unused;
};

struct product {
    struct product_key key;
    dnnl_primitive_t primitive; /* NULL: the slot is free */
    dnnl_memory_desc_t a, b, c, scratchpad;
    int64_t last_use;
    int users;
};

static struct product products[PRIMITIVES_MAX];
static int64_t use_count;
static pthread_mutex_t products_lock = PTHREAD_MUTEX_INITIALIZER;
static dnnl_engine_t engine;
static bool has_bf16, has_amx;

/* ---- primitives ---- */

static void must(dnnl_status_t status) {
    CHECK_OP(status, ==, dnnl_success);
}

static int one_thread_begin(void) {
    int before = omp_get_max_threads();
    omp_set_num_threads(1);
    return before;
}

static dnnl_data_type_t dnnl_type(int32_t dtype) {
    return dtype == DTYPE_BF16 ? dnnl_bf16 : dnnl_f32;
}

static void describe_memory(struct product *p) {
    const struct product_key *k = &p->key;
    const dnnl_dims_t a_dims = {k->m, k->k}, b_dims = {k->k, k->n}, c_dims = {k->m, k->n};
    const dnnl_dims_t a_strides = {k->a_strides[0], k->a_strides[1]};
    const dnnl_dims_t b_strides = {k->b_strides[0], k->b_strides[1]}, c_strides = {k->c_stride, 1};
    must(dnnl_memory_desc_init_by_strides(&p->a, 2, a_dims, dnnl_type(k->in_dtype), a_strides));
    must(dnnl_memory_desc_init_by_strides(&p->b, 2, b_dims, dnnl_type(k->in_dtype), b_strides));
    must(dnnl_memory_desc_init_by_strides(&p->c, 2, c_dims, dnnl_type(k->out_dtype), c_strides));
}

static dnnl_primitive_attr_t create_attributes(bool accumulate) {
    dnnl_primitive_attr_t attributes;
    dnnl_post_ops_t post_ops;
    must(dnnl_primitive_attr_create(&attributes));
    must(dnnl_primitive_attr_set_scratchpad_mode(attributes, dnnl_scratchpad_mode_user));
    if (accumulate) {
        must(dnnl_post_ops_create(&post_ops));
        must(dnnl_post_ops_append_sum(post_ops, 1));
        must(dnnl_primitive_attr_set_post_ops(attributes, post_ops));
        must(dnnl_post_ops_destroy(post_ops));
    }
    return attributes;
}

/* Makes p->primitive from p->key; false where oneDNN cannot on this processor. */
static bool product_create(struct product *p) {
    dnnl_matmul_desc_t matmul;
    dnnl_primitive_desc_t description;
    describe_memory(p);
    must(dnnl_matmul_desc_init(&matmul, &p->a, &p->b, NULL, &p->c));
    dnnl_primitive_attr_t attributes = create_attributes(p->key.accumulate);
    int threads = one_thread_begin();
    dnnl_status_t status = dnnl_primitive_desc_create(&description, &matmul, attributes, engine, NULL);
    if (status == dnnl_success) {
        p->scratchpad = *dnnl_primitive_desc_query_md(description, dnnl_query_scratchpad_md, 0);
        must(dnnl_primitive_create(&p->primitive, description));
        must(dnnl_primitive_desc_destroy(description));
    }
    omp_set_num_threads(threads);
    must(dnnl_primitive_attr_destroy(attributes));
    return status == dnnl_success;
}

static void product_release(struct product *p) {
    if (p->primitive)
        must(dnnl_primitive_destroy(p->primitive));
    *p = (struct product){0};
}

static void release_all(void) {
    for (int i = 0; i < PRIMITIVES_MAX; i++)
        product_release(&products[i]);
    dnnl_engine_destroy(engine);
}

static void start(void) {
    must(dnnl_engine_create(&engine, dnnl_cpu, 0));
    must(dnnl_set_primitive_cache_capacity(0)); /* ours knows when a primitive may go */
    struct product probe = {.key = {.m = 64,
                                    .n = 64,
                                    .k = 64,
                                    .a_strides = {64, 1},
                                    .b_strides = {64, 1},
                                    .c_stride = 64,
                                    .in_dtype = DTYPE_BF16,
                                    .out_dtype = DTYPE_BF16}};
    has_amx = (dnnl_get_effective_cpu_isa() & dnnl_cpu_isa_avx512_core_amx) == dnnl_cpu_isa_avx512_core_amx;
    has_bf16 = product_create(&probe);
    product_release(&probe);
    atexit(release_all);
}

/* ---- the cache of primitives ---- */

/* The slot of `key`, or else the one to reuse: free, or longest unused. */
static struct product *slot_find(const struct product_key *key) {
    struct product *oldest = NULL;
    for (int i = 0; i < PRIMITIVES_MAX; i++) {
        struct product *p = &products[i];
        if (p->primitive && memcmp(&p->key, key, sizeof *key) == 0)
            return p;
        if (p->users == 0 && (!oldest || p->last_use < oldest->last_use))
            oldest = p;
    }
    CHECK(oldest != NULL);
    return oldest;
}

static struct product *product_acquire(const struct product_key *key) {
    pthread_mutex_lock(&products_lock);
    struct product *p = slot_find(key);
    if (!p->primitive || memcmp(&p->key, key, sizeof *key) != 0) {
        product_release(p);
        p->key = *key;
        CHECK(product_create(p));
    }
    p->users++;
    p->last_use = ++use_count;
    pthread_mutex_unlock(&products_lock);
    return p;
}

static void product_give_back(struct product *p) {
    pthread_mutex_lock(&products_lock);
    p->users--;
    pthread_mutex_unlock(&products_lock);
}

static dnnl_memory_t memory_over(const dnnl_memory_desc_t *description, const void *data) {
    dnnl_memory_t memory;
    must(dnnl_memory_create(&memory, description, engine, (void *)data));
    return memory;
}

static void product_execute(const struct product *p, const void *a, const void *b, void *c, void *scratchpad) {
    int threads = one_thread_begin();
    dnnl_stream_t stream;
    must(dnnl_stream_create(&stream, engine, dnnl_stream_default_flags));
    dnnl_exec_arg_t arguments[] = {
        {DNNL_ARG_SRC, memory_over(&p->a, a)},
        {DNNL_ARG_WEIGHTS, memory_over(&p->b, b)},
        {DNNL_ARG_DST, memory_over(&p->c, c)},
        {DNNL_ARG_SCRATCHPAD, memory_over(&p->scratchpad, scratchpad)},
    };
    enum { ARGUMENTS = sizeof arguments / sizeof *arguments };
    must(dnnl_primitive_execute(p->primitive, stream, ARGUMENTS, arguments));
    must(dnnl_stream_wait(stream));
    for (int i = 0; i < ARGUMENTS; i++)
        must(dnnl_memory_destroy(arguments[i].memory));
    must(dnnl_stream_destroy(stream));
    omp_set_num_threads(threads);
}

/* ---- tiles ---- */

/* A side of C in `count` parts of `size`, the last one shorter. */
struct cut {
    int64_t length, size, count;
};

static struct cut cut_into(int64_t length, int64_t size_max, int64_t grain) {
    int64_t count = (length + size_max - 1) / size_max;
    int64_t size = ((length + count - 1) / count + grain - 1) / grain * grain;
    return (struct cut){length, size, (length + size - 1) / size};
}

static int64_t part_length(const struct cut *cut, int64_t part) {
    int64_t rest = cut->length - part * cut->size;
    return rest < cut->size ? rest : cut->size;
}

enum { TILE_ROWS_MIN = 256, TILE_ROWS_MAX = 512, TILE_COLUMNS_MIN = 64, TILE_GRAIN = 32, TILES_WANTED = 16 };

static int64_t clamp(int64_t value, int64_t low, int64_t high) {
    return value < low ? low : value > high ? high : value;
}

/* Rows are cut first: such tiles are whole rows of A and C, which oneDNN's fast product (brgemm) asks for. Every tile
 * packs its share of B anew, so they are not below TILE_ROWS_MIN; where that leaves too few, columns are cut too. */
static void choose_tiles(int64_t m, int64_t n, struct cut *rows, struct cut *columns) {
    *rows = cut_into(m, clamp(m / TILES_WANTED, TILE_ROWS_MIN, TILE_ROWS_MAX), TILE_GRAIN);
    int64_t parts = (TILES_WANTED + rows->count - 1) / rows->count;
    *columns = cut_into(n, clamp((n + parts - 1) / parts, TILE_COLUMNS_MIN, n), TILE_GRAIN);
}

struct gemm_job {
    struct tensor a, b, c;
    int64_t a_strides[2], b_strides[2]; /* elements */
    struct cut rows, columns;
    bool c_through_scratch;
    struct product *products[2][2]; /* [last row of tiles][last column of tiles] */
};

static char *element(struct tensor t, int64_t index) {
    return (char *)t.data + index * (int64_t)dtype_size(t.dtype);
}

static void copy_rows(char *to, size_t to_stride, const char *from, size_t from_stride, int64_t rows, size_t bytes) {
    for (int64_t row = 0; row < rows; row++, to += to_stride, from += from_stride)
        memcpy(to, from, bytes);
}

static void tile_run(void *context, int64_t index) {
    const struct gemm_job *job = context;
    int64_t i = index / job->columns.count, j = index % job->columns.count;
    int64_t row = i * job->rows.size, column = j * job->columns.size;
    const struct product *p = job->products[i == job->rows.count - 1][j == job->columns.count - 1];
    size_t row_bytes = (size_t)p->key.n * dtype_size(job->c.dtype);
    size_t stride_bytes = (size_t)job->c.shape[1] * dtype_size(job->c.dtype);
    size_t scratchpad_bytes = (dnnl_memory_desc_get_size(&p->scratchpad) + 63) / 64 * 64;
    char *scratchpad = scratch_task(scratchpad_bytes + (job->c_through_scratch ? row_bytes * (size_t)p->key.m : 0));
    char *c = element(job->c, row * job->c.shape[1] + column);
    char *out = job->c_through_scratch ? scratchpad + scratchpad_bytes : c;
    if (job->c_through_scratch && p->key.accumulate)
        copy_rows(out, row_bytes, c, stride_bytes, p->key.m, row_bytes);
    product_execute(p, element(job->a, row * job->a_strides[0]), element(job->b, column * job->b_strides[1]), out,
                    scratchpad);
    if (job->c_through_scratch)
        copy_rows(c, stride_bytes, out, row_bytes, p->key.m, row_bytes);
}

static struct product *acquire_tile(const struct gemm_job *job, bool last_row, bool last_column, int64_t k,
                                    bool accumulate) {
    struct product_key key;
    memset(&key, 0, sizeof key);
    key.m = part_length(&job->rows, last_row ? job->rows.count - 1 : 0);
    key.n = part_length(&job->columns, last_column ? job->columns.count - 1 : 0);
    key.k = k;
    memcpy(key.a_strides, job->a_strides, sizeof key.a_strides);
    memcpy(key.b_strides, job->b_strides, sizeof key.b_strides);
    key.c_stride = job->c_through_scratch ? key.n : job->c.shape[1];
    key.in_dtype = (int32_t)job->a.dtype;
    key.out_dtype = (int32_t)job->c.dtype;
    key.accumulate = accumulate;
    return product_acquire(&key);
}

static void gemm_tiled(struct gemm_job *job, int64_t k, bool accumulate) {
    choose_tiles(job->c.shape[0], job->c.shape[1], &job->rows, &job->columns);
    bool a_and_b_are_dense = job->a_strides[1] == 1 && job->b_strides[0] == 1;
    job->c_through_scratch = a_and_b_are_dense && job->columns.count > 1; /* then brgemm takes the tile */
    for (int i = 0; i < 4; i++)
        job->products[i / 2][i % 2] = acquire_tile(job, i / 2, i % 2, k, accumulate);
    parallel_for(job->rows.count * job->columns.count, tile_run, job);
    for (int i = 0; i < 4; i++)
        product_give_back(job->products[i / 2][i % 2]);
}

/* ---- bf16 through f32 ---- */

enum { CONVERT_ELEMENTS = 1 << 15 };

struct convert_job {
    const struct tensor *from, *to; /* one bf16, the other f32 */
};

static void convert_part(void *context, int64_t index) {
    const struct convert_job *job = context;
    int64_t first = index * CONVERT_ELEMENTS, rest = tensor_elements(*job->from) - first;
    int64_t count = rest < CONVERT_ELEMENTS ? rest : CONVERT_ELEMENTS;
    if (job->from->dtype == DTYPE_BF16) {
        const uint16_t *from = (const uint16_t *)job->from->data + first;
        float *to = (float *)job->to->data + first;
        for (int64_t i = 0; i < count; i++)
            to[i] = bf16_to_float(from[i]);
    } else {
        const float *from = (const float *)job->from->data + first;
        uint16_t *to = (uint16_t *)job->to->data + first;
        for (int64_t i = 0; i < count; i++)
            to[i] = float_to_bf16(from[i]);
    }
}

static void convert(struct tensor from, struct tensor to) {
    struct convert_job job = {&from, &to};
    parallel_for((tensor_elements(from) + CONVERT_ELEMENTS - 1) / CONVERT_ELEMENTS, convert_part, &job);
}

static struct tensor as_f32(struct tensor t, float *data) {
    t.dtype = DTYPE_F32;
    t.data = data;
    return t;
}

static void gemm_widened(struct gemm_job *job, int64_t k, bool accumulate) {
    struct tensor a = job->a, b = job->b, c = job->c;
    bool c_is_bf16 = c.dtype == DTYPE_BF16;
    int64_t a_count = tensor_elements(a), b_count = tensor_elements(b);
    int64_t c_count = c_is_bf16 ? tensor_elements(c) : 0;
    float *scratch = scratch_call(sizeof(float) * (size_t)(a_count + b_count + c_count));
    job->a = as_f32(a, scratch);
    job->b = as_f32(b, scratch + a_count);
    convert(a, job->a);
    convert(b, job->b);
    if (c_is_bf16) {
        job->c = as_f32(c, scratch + a_count + b_count);
        if (accumulate)
            convert(c, job->c);
    }
    gemm_tiled(job, k, accumulate);
    if (c_is_bf16)
        convert(job->c, c);
}

/* On AMX oneDNN goes wrong where K leaves a part of a tile: an illegal instruction at K = 63, M > 128 (its issue 1661,
 * seen here with 2.6.3), a NaN that spreads to other rows (issue 5717). Such products go through f32. */
enum { AMX_K_GRAIN = 32 };

static bool bf16_is_sound(int64_t k) {
    return has_bf16 && (!has_amx || k % AMX_K_GRAIN == 0);
}

void gemm_onednn(struct tensor a, bool transpose_a, struct tensor b, bool transpose_b, struct tensor c,
                 bool accumulate) {
    static pthread_once_t started = PTHREAD_ONCE_INIT;
    pthread_once(&started, start);
    int64_t k = a.shape[!transpose_a];
    if (tensor_elements(c) == 0)
        return;
    if (k == 0) {
        if (!accumulate)
            memset(c.data, 0, tensor_bytes(c));
        return;
    }
    struct gemm_job job = {.a = a, .b = b, .c = c};
    job.a_strides[transpose_a] = a.shape[1];
    job.a_strides[!transpose_a] = 1;
    job.b_strides[transpose_b] = b.shape[1];
    job.b_strides[!transpose_b] = 1;
    if (a.dtype == DTYPE_BF16 && !bf16_is_sound(k))
        gemm_widened(&job, k, accumulate);
    else
        gemm_tiled(&job, k, accumulate);
}
