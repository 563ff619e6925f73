/* Forward attention of a few queries to many keys, as when a text is written token by token: keys and values are read once, as
 * they lie, for all query heads that share them. Part of attention.c.
 *
 * A task has a part of the keys of one key-value head, and all rows of it: a row is a query of one of its heads. What the parts
 * found of a row is put together in their order. Memory is read ahead: values while the same keys are scored, the next keys while
 * values are added; the pieces of a head lie too far apart for the processor to find the pattern.
 */
#pragma once

enum {
    PART_KEYS = 512,     /* a multiple of KEY_BLOCK */
    FEW_QUERIES_MAX = 2, /* more are worth packing keys for */
    FOUND_FLOATS = 16,   /* before a row's sums: the highest score and the sum of weights */
};

struct few {
    const struct attention *a;
    int64_t rows;       /* of a key-value head: query * group + head in the group */
    int64_t part_count;
    float *found;       /* [B * G, rows, part_count, FOUND_FLOATS + row_floats]; NULL where there is one part */
};

/* A task's memory. */
struct few_scratch {
    float *queries, *out;    /* [rows, row_floats] */
    float *scores;           /* [rows, KEY_BLOCK] */
    struct softmax *softmax; /* [rows] */
};

static struct few_scratch few_scratch_place(const struct few *f, struct parts *parts) {
    struct few_scratch s;
    s.softmax = (struct softmax *)part_take(parts, f->rows * (int64_t)(sizeof *s.softmax / sizeof(float)));
    s.queries = part_take(parts, f->rows * f->a->row_floats);
    s.out = part_take(parts, f->rows * f->a->row_floats);
    s.scores = part_take(parts, f->rows * KEY_BLOCK);
    return s;
}

static struct few_scratch few_scratch_take(const struct few *f) {
    struct parts parts = {0};
    few_scratch_place(f, &parts);
    parts = (struct parts){.memory = scratch_task((size_t)parts.floats * sizeof(float))};
    return few_scratch_place(f, &parts);
}

/* scores[0 .. count-1] of keys from row `row` on, at most VECTOR_LANES. */
ALWAYS_INLINE void score_keys(enum dtype dtype, const struct attention *a, const float *query, int64_t row, int64_t column,
                              int64_t count, float *scores) {
    int64_t p = a->shape.head_dim;
    vector_f32 sum[VECTOR_LANES] = {{0}};
    for (int64_t i = 0; i < p; i += VECTOR_LANES) {
        vector_f32 left = vector_load(query + i);
#pragma GCC unroll 16
        for (int j = 0; j < VECTOR_LANES; j++) {
            const void *key = matrix_at(&a->k, row + (j < count ? j : 0), column + i);
            sum[j] += left * numbers_load(dtype, key, 0, at_most(p - i, VECTOR_LANES));
        }
    }
    vector_store(scores, vector_sums(sum));
}

/* Of `rows` rows `vectors` vectors from column i on: out += weights * values, `count` values from row `row` on. rows and vectors
 * are constants, and as many sums as fit the registers. */
ALWAYS_INLINE void add_values(enum dtype dtype, const struct attention *a, int64_t row, int64_t column, int64_t count,
                              const float *weights, float *out, int rows, int vectors, int64_t i) {
    vector_f32 sum[4][4];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sum[r][v] = vector_load(out + r * a->row_floats + i + v * VECTOR_LANES);
    for (int64_t j = 0; j < count; j++)
        for (int v = 0; v < vectors; v++) {
            int64_t at = i + v * VECTOR_LANES;
            const void *values = matrix_at(&a->v, row + j, column + at);
            vector_f32 value = numbers_load(dtype, values, 0, at_most(a->shape.head_dim - at, VECTOR_LANES));
            for (int r = 0; r < rows; r++)
                sum[r][v] += value * weights[r * KEY_BLOCK + j];
        }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            vector_store(out + r * a->row_floats + i + v * VECTOR_LANES, sum[r][v]);
}

ALWAYS_INLINE void add_values_to(enum dtype dtype, const struct attention *a, int64_t row, int64_t column, int64_t count,
                                 const float *weights, float *out, int rows, int vectors) {
    int64_t i = 0;
    for (; i + vectors * VECTOR_LANES <= a->row_floats; i += vectors * VECTOR_LANES)
        add_values(dtype, a, row, column, count, weights, out, rows, vectors, i);
    for (; i < a->row_floats; i += VECTOR_LANES)
        add_values(dtype, a, row, column, count, weights, out, rows, 1, i);
}

ALWAYS_INLINE void add_values_to_all(enum dtype dtype, const struct few *f, const struct few_scratch *s, int64_t row,
                                     int64_t column, int64_t count, const float *weights) {
    int64_t r = 0, floats = f->a->row_floats;
    for (; r + 4 <= f->rows; r += 4)
        add_values_to(dtype, f->a, row, column, count, weights + r * KEY_BLOCK, s->out + r * floats, 4, 2);
    for (; r + 2 <= f->rows; r += 2)
        add_values_to(dtype, f->a, row, column, count, weights + r * KEY_BLOCK, s->out + r * floats, 2, 4);
    for (; r < f->rows; r++)
        add_values_to(dtype, f->a, row, column, count, weights + r * KEY_BLOCK, s->out + r * floats, 1, 4);
}

/* Keys key .. key + keys - 1 of a sequence, `first` being its first row; `ahead` keys follow. */
ALWAYS_INLINE void few_block(enum dtype dtype, const struct few *f, const struct few_scratch *s, int64_t first, int64_t column,
                             int64_t key, int64_t keys, int64_t ahead) {
    const struct attention *a = f->a;
    const int64_t begin = first + key, end = begin + keys;
    for (int64_t j = 0; j < keys; j += VECTOR_LANES) {
        ask_for_rows(&a->v, begin + j, at_most(begin + j + VECTOR_LANES, end), column, a->shape.head_dim);
        for (int64_t r = 0; r < f->rows; r++)
            score_keys(dtype, a, s->queries + r * a->row_floats, begin + j, column, keys - j, s->scores + r * KEY_BLOCK + j);
    }
    for (int64_t r = 0; r < f->rows; r++) {
        float *scores = s->scores + r * KEY_BLOCK;
        int64_t visible = a->offset + r / a->group + 1 - key;
        if (visible > 0) {
            hide_keys(scores, at_most(visible, keys), keys);
            softmax_row(DTYPE_F32, &s->softmax[r], scores, keys, a->exponent, scores, s->out + r * a->row_floats, a->row_floats);
        } else {
            memset(scores, 0, KEY_BLOCK * sizeof *scores);
        }
    }
    for (int64_t j = 0; j < keys; j += VECTOR_LANES) {
        ask_for_rows(&a->k, end + j, at_most(end + j + VECTOR_LANES, end + ahead), column, a->shape.head_dim);
        add_values_to_all(dtype, f, s, begin + j, column, at_most(keys - j, VECTOR_LANES), s->scores + j);
    }
}

/* The place of what the parts found of a row. */
static float *few_found(const struct few *f, int64_t pair, int64_t row, int64_t part) {
    return f->found + ((pair * f->rows + row) * f->part_count + part) * (FOUND_FLOATS + f->a->row_floats);
}

/* Of a row of a key-value head: of which query and head. */
static void few_store(const struct few *f, int64_t pair, int64_t row, const struct softmax *softmax, const float *out) {
    const struct attention *a = f->a;
    int64_t batch = pair / a->shape.kv_head_count, kv_head = pair % a->shape.kv_head_count;
    store_query(a, softmax, out, batch * a->shape.query_count + row / a->group, kv_head * a->group + row % a->group);
}

static void few_leave(const struct few *f, const struct few_scratch *s, int64_t pair, int64_t part) {
    for (int64_t r = 0; r < f->rows; r++) {
        const float *out = s->out + r * f->a->row_floats;
        if (f->part_count == 1) {
            few_store(f, pair, r, &s->softmax[r], out);
            continue;
        }
        float *found = few_found(f, pair, r, part);
        found[0] = s->softmax[r].most;
        found[1] = vector_sum(s->softmax[r].sum);
        memcpy(found + FOUND_FLOATS, out, (size_t)f->a->row_floats * sizeof *out);
    }
}

ALWAYS_INLINE void few_part(enum dtype dtype, const struct few *f, int64_t pair, int64_t part) {
    const struct attention *a = f->a;
    struct few_scratch s = few_scratch_take(f);
    int64_t p = a->shape.head_dim, batch = pair / a->shape.kv_head_count, kv_head = pair % a->shape.kv_head_count;
    int64_t end = at_most((part + 1) * PART_KEYS, a->shape.key_count);
    for (int64_t r = 0; r < f->rows; r++) {
        int64_t row = batch * a->shape.query_count + r / a->group, column = (kv_head * a->group + r % a->group) * p;
        s.softmax[r] = softmax_start();
        for (int64_t i = 0; i < p; i += VECTOR_LANES) {
            vector_store(s.queries + r * a->row_floats + i,
                         numbers_load(dtype, matrix_at(&a->q, row, column), i, at_most(p - i, VECTOR_LANES)));
            vector_store(s.out + r * a->row_floats + i, (vector_f32){0});
        }
    }
    for (int64_t key = part * PART_KEYS; key < end; key += KEY_BLOCK)
        few_block(dtype, f, &s, batch * a->shape.key_count, kv_head * p, key, at_most(end - key, KEY_BLOCK), end - key - KEY_BLOCK);
    few_leave(f, &s, pair, part);
}

static void few_task(void *context, int64_t index) {
    const struct few *f = context;
    if (f->a->dtype == DTYPE_F32)
        few_part(DTYPE_F32, f, index / f->part_count, index % f->part_count);
    else
        few_part(DTYPE_BF16, f, index / f->part_count, index % f->part_count);
}

/* The first part's sums become those of all parts. */
static void few_join(const struct few *f, int64_t pair, int64_t row) {
    int64_t floats = f->a->row_floats;
    struct softmax all = softmax_start();
    float *out = few_found(f, pair, row, 0) + FOUND_FLOATS, sum = 0;
    for (int64_t part = 0; part < f->part_count; part++)
        all.most = fmaxf(all.most, few_found(f, pair, row, part)[0]);
    for (int64_t part = 0; part < f->part_count; part++) {
        const float *found = few_found(f, pair, row, part);
        vector_f32 share = vector_exp2(vector_splat(found[0] - all.most)); /* 0 where it saw no key */
        sum += found[1] * share[0];
        for (int64_t i = 0; i < floats; i += VECTOR_LANES) {
            vector_f32 more = vector_load(found + FOUND_FLOATS + i) * share;
            vector_store(out + i, part == 0 ? more : vector_load(out + i) + more);
        }
    }
    all.sum[0] = sum;
    few_store(f, pair, row, &all, out);
}

static void few_forward(const struct attention *a) {
    int64_t pairs = a->shape.batch * a->shape.kv_head_count;
    struct few f = {a, a->shape.query_count * a->group, divide_up(a->shape.key_count, PART_KEYS), NULL};
    if (f.part_count > 1)
        f.found = scratch_call((size_t)(pairs * f.rows * f.part_count * (FOUND_FLOATS + a->row_floats)) * sizeof *f.found);
    parallel_for(pairs * f.part_count, few_task, &f);
    for (int64_t i = 0; f.part_count > 1 && i < pairs * f.rows; i++)
        few_join(&f, i / f.rows, i % f.rows);
}
