/* Operations that look at one element at a time, and rows and boxes copied from one place to another: bound by memory.
 * Here, other than elsewhere in this folder, f64 is known: the sums that last are kept in it. */
#include "kernels/cuda/vectors.cuh"

/* Eights of elements where every operand is aligned to 16, else none. */
static int64_t eights_of(const void *a, const void *b, int64_t count) {
    return is_aligned(a, 16) && is_aligned(b, 16) ? count / EIGHT : 0;
}

/* ---- fill ----------------------------------------------------------------------------------------------------------- */

template <typename W> static __global__ void fill_kernel(W *to, int64_t count, W word, int64_t vectors, uint4 pattern) {
    for (int64_t i = thread_index(); i < vectors; i += thread_count())
        ((uint4 *)to)[i] = pattern;
    for (int64_t i = vectors * (int64_t)(16 / sizeof(W)) + thread_index(); i < count; i += thread_count())
        to[i] = word;
}

template <typename W> static void fill_words(void *to, int64_t count, W word) {
    union {
        W words[16 / sizeof(W)];
        uint4 all;
    } pattern;
    for (size_t i = 0; i < 16 / sizeof(W); i++)
        pattern.words[i] = word;
    int64_t vectors = is_aligned(to, 16) ? count / (int64_t)(16 / sizeof(W)) : 0;
    CUDA_LAUNCH((fill_kernel<W>), grid_for(vectors ? vectors : count, THREADS), THREADS, 0, (W *)to, count, word, vectors,
                pattern.all);
}

static void fill(struct tensor t, double value) {
    int64_t count = tensor_elements(t);
    union {
        double f64;
        float f32;
        uint64_t u64;
        uint32_t u32;
    } bits = {0};
    if (count == 0)
        return;
    if (t.dtype == DTYPE_F64) {
        bits.f64 = value;
        fill_words<uint64_t>(t.data, count, bits.u64);
    } else if (t.dtype == DTYPE_BF16) {
        fill_words<uint16_t>(t.data, count, float_to_bf16((float)value));
    } else if (t.dtype == DTYPE_I32) {
        fill_words<uint32_t>(t.data, count, (uint32_t)(int32_t)value);
    } else {
        CHECK(t.dtype == DTYPE_F32);
        bits.f32 = (float)value;
        fill_words<uint32_t>(t.data, count, bits.u32);
    }
}

/* ---- cast, add ------------------------------------------------------------------------------------------------------ */

template <typename X, typename Y> static __global__ void cast_kernel(const X *from, Y *to, int64_t count, int64_t eights) {
    typename sum_of<X, Y>::type x[EIGHT];
    for (int64_t i = thread_index(); i < eights; i += thread_count()) {
        load_eight(from + EIGHT * i, x);
        store_eight(to + EIGHT * i, x);
    }
    for (int64_t i = EIGHT * eights + thread_index(); i < count; i += thread_count())
        put(to + i, number(from[i]));
}

void cast_elements(const void *from, enum dtype from_dtype, void *to, enum dtype to_dtype, int64_t count) {
    if (count == 0)
        return;
    int64_t eights = eights_of(from, to, count);
    unsigned grid = grid_for(eights ? eights : count, THREADS);
    WITH_NUMBER(from_dtype, X, WITH_NUMBER(to_dtype, Y, CUDA_LAUNCH((cast_kernel<X, Y>), grid, THREADS, 0, (const X *)from,
                                                                     (Y *)to, count, eights)));
}

static void cast(struct tensor from, struct tensor to) {
    CHECK(tensor_same_shape(from, to));
    cast_elements(from.data, from.dtype, to.data, to.dtype, tensor_elements(to));
}

template <typename X, typename Y> static __global__ void add_kernel(const X *x, Y *y, int64_t count, int64_t eights) {
    typename sum_of<X, Y>::type a[EIGHT], b[EIGHT];
    for (int64_t i = thread_index(); i < eights; i += thread_count()) {
        load_eight(x + EIGHT * i, a);
        load_eight(y + EIGHT * i, b);
        for (int j = 0; j < EIGHT; j++)
            b[j] += a[j];
        store_eight(y + EIGHT * i, b);
    }
    for (int64_t i = EIGHT * eights + thread_index(); i < count; i += thread_count())
        put(y + i, number(x[i]) + number(y[i]));
}

static __global__ void add_integers_kernel(const int32_t *x, int32_t *y, int64_t count) {
    for (int64_t i = thread_index(); i < count; i += thread_count())
        y[i] += x[i];
}

static void add(struct tensor x, struct tensor y) {
    int64_t count = tensor_elements(y), eights = eights_of(x.data, y.data, count);
    unsigned grid = grid_for(eights ? eights : count, THREADS);
    CHECK(tensor_same_shape(x, y) && (x.dtype == DTYPE_I32) == (y.dtype == DTYPE_I32));
    if (count == 0)
        return;
    if (y.dtype == DTYPE_I32)
        CUDA_LAUNCH(add_integers_kernel, grid_for(count, THREADS), THREADS, 0, (const int32_t *)x.data, (int32_t *)y.data,
                    count);
    else
        WITH_NUMBER(x.dtype, X, WITH_NUMBER(y.dtype, Y, CUDA_LAUNCH((add_kernel<X, Y>), grid, THREADS, 0, (const X *)x.data,
                                                                     (Y *)y.data, count, eights)));
}

/* ---- sums of squares ------------------------------------------------------------------------------------------------ */

enum { SQUARES_TENSORS = 96, SQUARES_BLOCKS = 132 * 8, SQUARES_AHEAD = 2 };

/* Tensors of one dtype: tensor i is walked over by blocks first_block[i] .. first_block[i+1]-1, as many as its size asks for.
 * All in one launch: the end of one is hidden by the next. */
struct squares {
    const void *x[SQUARES_TENSORS];
    int64_t count[SQUARES_TENSORS];
    int32_t first_block[SQUARES_TENSORS + 1];
    int tensors;
};

/* The last tensor that begins at the block or before it: those without a block begin where the next one does. */
static __device__ __forceinline__ int tensor_of_block(const struct squares &s) {
    int low = 0, high = s.tensors;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (s.first_block[middle] <= (int)blockIdx.x)
            low = middle;
        else
            high = middle;
    }
    return low;
}

template <typename A> static __device__ __forceinline__ void add_squares(const A *a, double *part) {
#pragma unroll
    for (int j = 0; j < EIGHT; j++) {
        double x = (double)a[j];
        part[j % 4] = fma(x, x, part[j % 4]);
    }
}

/* Every block's share to parts[block]. In f64, for squares of finite numbers must not become infinite; conversions, the slowest
 * part of it, take a fifth of the time that memory does. The order is that of eights at any address. */
template <bool aligned, typename T>
static __global__ void __launch_bounds__(THREADS, 4) squares_kernel(const struct squares s, double *parts) {
    typename sum_of<T, T>::type a[SQUARES_AHEAD][EIGHT];
    double part[4] = {0, 0, 0, 0};
    int tensor = tensor_of_block(s), first = s.first_block[tensor];
    int64_t count = s.count[tensor], eights = count / EIGHT;
    int64_t thread = ((int)blockIdx.x - first) * THREADS + (int)threadIdx.x;
    int64_t threads = (s.first_block[tensor + 1] - first) * THREADS, i = thread;
    const T *x = (const T *)s.x[tensor];
    for (; i + (SQUARES_AHEAD - 1) * threads < eights; i += SQUARES_AHEAD * threads) {
#pragma unroll
        for (int n = 0; n < SQUARES_AHEAD; n++)
            load_anywhere<EIGHT, aligned>(x + EIGHT * (i + n * threads), a[n]);
#pragma unroll
        for (int n = 0; n < SQUARES_AHEAD; n++)
            add_squares(a[n], part);
    }
    for (; i < eights; i += threads) {
        load_anywhere<EIGHT, aligned>(x + EIGHT * i, a[0]);
        add_squares(a[0], part);
    }
    for (i = EIGHT * eights + thread; i < count; i += threads)
        part[0] = fma((double)number(x[i]), (double)number(x[i]), part[0]);
    double total = block_sum((part[0] + part[1]) + (part[2] + part[3]));
    if (threadIdx.x == 0)
        parts[blockIdx.x] = total;
}

/* A block for each tensor. */
static __global__ void sum_parts_kernel(const struct squares s, const double *parts, double *sums) {
    double part = 0;
    for (int i = s.first_block[blockIdx.x] + (int)threadIdx.x; i < s.first_block[blockIdx.x + 1]; i += THREADS)
        part += parts[i];
    part = block_sum(part);
    if (threadIdx.x == 0)
        sums[blockIdx.x] += part;
}

static bool is_like(struct tensor a, struct tensor b) {
    return a.dtype == b.dtype && is_aligned(a.data, 16) == is_aligned(b.data, 16);
}

/* As many tensors, from the first on, as one launch takes. */
static struct squares squares_of(const struct tensor *x, int count) {
    struct squares s = {};
    for (; s.tensors < count && s.tensors < SQUARES_TENSORS && is_like(x[s.tensors], x[0]); s.tensors++) {
        int64_t elements = tensor_elements(x[s.tensors]), blocks = ceil_div(elements, SQUARES_AHEAD * EIGHT * THREADS);
        s.x[s.tensors] = x[s.tensors].data;
        s.count[s.tensors] = elements;
        s.first_block[s.tensors + 1] = s.first_block[s.tensors] + (int32_t)(blocks < SQUARES_BLOCKS ? blocks : SQUARES_BLOCKS);
    }
    return s;
}

static void sum_squares_each(const struct tensor *x, int count, struct tensor sums) {
    CHECK(sums.dtype == DTYPE_F64 && tensor_elements(sums) == count);
    for (int first = 0; first < count;) {
        struct squares s = squares_of(x + first, count - first);
        unsigned grid = (unsigned)s.first_block[s.tensors];
        double *parts = grid ? (double *)cuda_scratch(grid * sizeof *parts) : NULL;
        if (grid && is_aligned(x[first].data, 16))
            WITH_NUMBER(x[first].dtype, T, CUDA_LAUNCH((squares_kernel<true, T>), grid, THREADS, 0, s, parts));
        else if (grid)
            WITH_NUMBER(x[first].dtype, T, CUDA_LAUNCH((squares_kernel<false, T>), grid, THREADS, 0, s, parts));
        if (grid)
            CUDA_LAUNCH(sum_parts_kernel, (unsigned)s.tensors, THREADS, 0, s, parts, (double *)sums.data + first);
        first += s.tensors;
    }
}

static void sum_squares(struct tensor x, struct tensor sum) {
    sum_squares_each(&x, 1, sum);
}

/* ---- gather --------------------------------------------------------------------------------------------------------- */

template <typename W>
static __global__ void gather_scalars_kernel(const W *from, const int32_t *index, W *to, int64_t count) {
    for (int64_t i = thread_index(); i < count; i += thread_count())
        to[i] = from[index[i]];
}

static void gather_scalars(struct tensor from, struct tensor index, struct tensor to) {
    int64_t count = tensor_elements(to);
    CHECK(from.dtype != DTYPE_BF16 && to.dtype == from.dtype && index.dtype == DTYPE_I32);
    CHECK_OP(tensor_elements(index), ==, count);
    if (count == 0)
        return;
    if (to.dtype == DTYPE_F64)
        CUDA_LAUNCH((gather_scalars_kernel<double>), grid_for(count, THREADS), THREADS, 0, (const double *)from.data,
                    (const int32_t *)index.data, (double *)to.data, count);
    else
        CUDA_LAUNCH((gather_scalars_kernel<uint32_t>), grid_for(count, THREADS), THREADS, 0, (const uint32_t *)from.data,
                    (const int32_t *)index.data, (uint32_t *)to.data, count);
}

/* Rows of `words`, each copied by `threads` threads. */
template <typename W>
static __global__ void gather_rows_kernel(const W *from, const int32_t *index, W *to, int64_t rows, int64_t words, int threads) {
    int64_t step = (int64_t)gridDim.x * (THREADS / threads);
    for (int64_t row = (int64_t)blockIdx.x * (THREADS / threads) + threadIdx.x / threads; row < rows; row += step) {
        const W *source = from + index[row] * words;
#pragma unroll 4
        for (int64_t i = threadIdx.x % threads; i < words; i += threads)
            to[row * words + i] = source[i];
    }
}

template <typename W>
static void gather_words(const void *from, const int32_t *index, void *to, int64_t rows, int64_t words) {
    int threads = threads_a_row(words);
    CUDA_LAUNCH((gather_rows_kernel<W>), grid_for_rows(rows, threads), THREADS, 0, (const W *)from, index, (W *)to, rows, words,
                threads);
}

void gather_bytes(const void *from, const int32_t *index, void *to, int64_t rows, int64_t row_bytes, int64_t unit) {
    if (rows == 0 || row_bytes == 0)
        return;
    if (row_bytes % 16 == 0 && is_aligned(from, 16) && is_aligned(to, 16))
        gather_words<uint4>(from, index, to, rows, row_bytes / 16);
    else if (unit % 4 == 0)
        gather_words<uint32_t>(from, index, to, rows, row_bytes / 4);
    else
        gather_words<uint16_t>(from, index, to, rows, row_bytes / 2);
}

static void gather_rows(struct tensor from, struct tensor index, struct tensor to) {
    int64_t rows = to.shape[0], width = to.shape[1], size = (int64_t)dtype_size(to.dtype);
    CHECK(to.dtype == from.dtype && to.dtype != DTYPE_I32 && index.dtype == DTYPE_I32);
    CHECK(tensor_elements(from) == from.shape[0] * width && tensor_elements(to) == rows * width);
    CHECK_OP(tensor_elements(index), ==, rows);
    gather_bytes(from.data, (const int32_t *)index.data, to.data, rows, width * size, size);
}

/* ---- boxes ---------------------------------------------------------------------------------------------------------- */

enum { TERMS_MAX = 64 };

struct box_view {
    void *data; /* of the box's first element */
    int64_t stride[2];
    enum dtype dtype;
};

/* A box of [outer, middle, width] elements, the last ones neighbours in every operand. `running` keeps sums in f32 between
 * the launches that more than TERMS_MAX terms need. */
struct boxes {
    struct box_view to, terms[TERMS_MAX];
    int term_count;
    int64_t outer, middle, width;
    bool accumulate, is_first, is_last;
    void *running;
};

template <int count, typename A>
static __device__ __forceinline__ void load_view(const struct box_view *view, int64_t i, int64_t j, int64_t k, A *x) {
    int64_t at = i * view->stride[0] + j * view->stride[1] + k;
    if (view->dtype == DTYPE_F32)
        load_some<count>((const float *)view->data + at, x);
    else if (view->dtype == DTYPE_BF16)
        load_some<count>((const bf16 *)view->data + at, x);
    else
        load_some<count>((const double *)view->data + at, x);
}

template <int count, typename A>
static __device__ __forceinline__ void store_view(const struct box_view *view, int64_t i, int64_t j, int64_t k, const A *x) {
    int64_t at = i * view->stride[0] + j * view->stride[1] + k;
    if (view->dtype == DTYPE_F32)
        store_some<count>((float *)view->data + at, x);
    else if (view->dtype == DTYPE_BF16)
        store_some<count>((bf16 *)view->data + at, x);
    else
        store_some<count>((double *)view->data + at, x);
}

/* `count` neighbours a thread and step, summed in A. */
template <int count, typename A> static __global__ void sum_boxes_kernel(struct boxes b) {
    int64_t pieces = b.width / count, all = b.outer * b.middle * pieces;
    A *running = (A *)b.running;
    for (int64_t index = thread_index(); index < all; index += thread_count()) {
        int64_t row = index / pieces, k = (index - row * pieces) * count, i = row / b.middle, j = row - i * b.middle;
        A sum[EIGHT], x[EIGHT];
        if (b.is_first)
            load_view<count>(&b.terms[0], i, j, k, sum);
        else
            load_some<count>(running + index * count, sum);
        for (int t = b.is_first; t < b.term_count; t++) {
            load_view<count>(&b.terms[t], i, j, k, x);
            for (int c = 0; c < count; c++)
                sum[c] += x[c];
        }
        if (b.is_last && b.accumulate) {
            load_view<count>(&b.to, i, j, k, x);
            for (int c = 0; c < count; c++)
                sum[c] += x[c];
        }
        if (b.is_last)
            store_view<count>(&b.to, i, j, k, sum);
        else
            store_some<count>(running + index * count, sum);
    }
}

static struct box_view view_of(struct box box, const int64_t count[3]) {
    const int64_t *shape = box.tensor.shape, *first = box.first;
    CHECK(box.tensor.dtype != DTYPE_I32 && shape[3] == 1);
    for (int dim = 0; dim < 3; dim++) {
        CHECK(first[dim] >= 0 && count[dim] >= 0);
        CHECK_OP(first[dim] + count[dim], <=, shape[dim]);
    }
    struct box_view view = {NULL, {shape[1] * shape[2], shape[2]}, box.tensor.dtype};
    int64_t at = first[0] * view.stride[0] + first[1] * view.stride[1] + first[2];
    view.data = (char *)box.tensor.data + at * (int64_t)dtype_size(view.dtype);
    return view;
}

/* May eights of it be read at once? Rows that are never stepped over may have any length. */
static bool is_wide(const struct box_view *view, const struct boxes *b) {
    int64_t size = (int64_t)dtype_size(view->dtype);
    return view->dtype != DTYPE_F64 && is_aligned(view->data, 16) && (b->outer == 1 || view->stride[0] * size % 16 == 0) &&
           (b->middle == 1 || view->stride[1] * size % 16 == 0);
}

/* Dimensions that are neighbours in all operands become one. */
static void merge_dimensions(struct boxes *b, const struct box *terms, int term_count, const int64_t count[3],
                             const struct box *to) {
    int whole = 2; /* dimensions from the last that every box has all of */
    for (int t = -1; t < term_count; t++) {
        const int64_t *shape = (t < 0 ? to : &terms[t])->tensor.shape;
        int here = count[2] != shape[2] ? 0 : count[1] != shape[1] ? 1 : 2;
        whole = here < whole ? here : whole;
    }
    b->outer = whole == 2 ? 1 : count[0];
    b->middle = whole >= 1 ? 1 : count[1];
    b->width = whole == 2 ? count[0] * count[1] * count[2] : whole == 1 ? count[1] * count[2] : count[2];
}

static void launch_boxes(const struct boxes *b, bool any_f64, bool all_wide) {
    int64_t all = b->outer * b->middle * b->width;
    if (any_f64)
        CUDA_LAUNCH((sum_boxes_kernel<1, double>), grid_for(all, THREADS), THREADS, 0, *b);
    else if (all_wide)
        CUDA_LAUNCH((sum_boxes_kernel<EIGHT, float>), grid_for(all / EIGHT, THREADS), THREADS, 0, *b);
    else
        CUDA_LAUNCH((sum_boxes_kernel<1, float>), grid_for(all, THREADS), THREADS, 0, *b);
}

static void sum_boxes(const struct box *terms, int term_count, const int64_t count[3], struct box to, bool accumulate) {
    CHECK_OP(term_count, >=, 1);
    struct boxes b = {};
    b.to = view_of(to, count);
    b.accumulate = accumulate;
    merge_dimensions(&b, terms, term_count, count, &to);
    bool any_f64 = b.to.dtype == DTYPE_F64, all_wide = b.width % EIGHT == 0 && is_wide(&b.to, &b);
    for (int t = 0; t < term_count; t++) {
        struct box_view view = view_of(terms[t], count);
        any_f64 |= view.dtype == DTYPE_F64;
        all_wide &= is_wide(&view, &b);
    }
    int64_t all = b.outer * b.middle * b.width;
    if (all == 0)
        return;
    if (term_count > TERMS_MAX)
        b.running = cuda_scratch((size_t)all * (any_f64 ? sizeof(double) : sizeof(float)));
    for (int first = 0; first < term_count; first += TERMS_MAX) {
        b.term_count = term_count - first < TERMS_MAX ? term_count - first : TERMS_MAX;
        b.is_first = first == 0;
        b.is_last = first + b.term_count == term_count;
        for (int t = 0; t < b.term_count; t++)
            b.terms[t] = view_of(terms[first + t], count);
        launch_boxes(&b, any_f64, all_wide);
    }
}

void simple_fill_cuda(struct kernel_ops *ops) {
    ops->fill = fill;
    ops->cast = cast;
    ops->add = add;
    ops->sum_squares = sum_squares;
    ops->sum_squares_each = sum_squares_each;
    ops->gather_scalars = gather_scalars;
    ops->gather_rows = gather_rows;
    ops->sum_boxes = sum_boxes;
}
