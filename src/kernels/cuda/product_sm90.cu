/* Dense and grouped products of bf16 on Hopper's matrix units: one persistent kernel for every form.
 *
 * A cluster of two blocks computes 256 rows and 256 columns of a group's result, a block 128 of the rows. In a block one
 * warp group brings operands, 64 of the inner dimension at a time, into a ring of stages in shared memory; two others
 * multiply, each for 64 rows, and hold the sums in registers. Operand B is the same for both blocks: each brings half of it and
 * gives it to both. An operand comes in boxes, or, where it is gathered, in boxes of one row each.
 *
 * Of gathered rows the blocks may lie beside each other instead, 128 rows and 512 columns: then A is the same for both, and each
 * asks for half of its boxes, of which the copy engine takes no more than one in 8 cycles; B each brings for itself.
 *
 * How many rows a group has is read from `offsets` on the device: every cluster counts the tiles of all groups when it
 * begins, and knows which are its own (product_schedule.cuh). The sums of an element are always added in the same order.
 *
 *   form      C                     A (rows of tile)       B (columns of tile)
 *   FORWARD   y [N,O]               x, inner I             w_e [O,I], inner I
 *   INPUT     dx [N,I]              dy, inner O            w_e, inner O: rows along the inner dimension
 *   WEIGHT    dw_e [O,I] =, +=      dy or x                x or dy; inner: the rows of the group, for both
 *
 * Of FORWARD and INPUT products A may be gathered. Of a WEIGHT product with a gathered x either that is A, and C is written
 * transposed, or it stays B, and the blocks ask for half of its boxes each. */
#include "kernels/cuda/product_results_sm90.cuh"

#ifdef CUDA_IS_SM90

static __device__ __forceinline__ void bringers_sync(void) {
    group_sync<1, GROUP_THREADS>();
}

/* ---- bringing ---------------------------------------------------------------------------------------------------- */

struct ring {
    int stage;
    uint32_t parity;
};

template <int stages> static __device__ __forceinline__ void advance(struct ring *ring) {
    if (++ring->stage == stages) {
        ring->stage = 0;
        ring->parity ^= 1;
    }
}

/* The last rows of a group that fill no block are copied by threads, chunk thread % CHUNKS of rows thread / CHUNKS, + PASS, ... of
 * `boxes` * 64 columns, box after box. */
template <int boxes> struct inner_rows {
    enum { CHUNKS = boxes * 8, PASS = GROUP_THREADS / CHUNKS, COUNT = TILE_K / PASS };
};

template <int boxes> static __device__ __forceinline__ unsigned char *inner_place(unsigned char *to, int thread, int i) {
    int chunk = thread % inner_rows<boxes>::CHUNKS, k = thread / inner_rows<boxes>::CHUNKS + i * inner_rows<boxes>::PASS;
    return to + chunk / 8 * BOX_BYTES + k * 128 + (((chunk & 7) ^ (k & 7)) << 4);
}

/* Rows row..end-1, fewer than a block, and zeros after. */
template <int boxes>
static __device__ __noinline__ void bring_last_rows(const struct rows_operand &a, int row, int end, int column, int thread,
                                                    unsigned char *to) {
    enum { CHUNKS = inner_rows<boxes>::CHUNKS, PASS = inner_rows<boxes>::PASS };
    int at = column + thread % CHUNKS * 8;
    for (int i = 0; i < inner_rows<boxes>::COUNT; i++) {
        int k = row + thread / CHUNKS + i * PASS;
        bool is_there = at < a.columns && k < end;
        int64_t source = is_there ? (a.index ? a.index[k] : k) * a.stride + at : 0;
        copy_async(inner_place<boxes>(to, thread, i), a.data + source, is_there ? 16 : 0);
    }
}

enum { BOTH = (1 << CLUSTER) - 1 };

/* A box for both blocks of the cluster, or for this one. */
template <bool shares>
static __device__ __forceinline__ void bring_box_2d(void *to, const tensor_map *map, uint64_t *full, int column, int row) {
    if (shares)
        share_box_2d(to, map, full, column, row, BOTH);
    else
        load_box_2d(to, map, full, column, row);
}

template <bool shares>
static __device__ __forceinline__ void bring_box_3d(void *to, const tensor_map *map, uint64_t *full, int column, int row,
                                                    int group) {
    if (shares)
        share_box_3d(to, map, full, column, row, group, BOTH);
    else
        load_box_3d(to, map, full, column, row, group);
}

template <int form, int lie, int result>
static __device__ __forceinline__ void bring_b(const struct maps &maps, const struct tile &tile, int term, int k, int rank,
                                               unsigned char *b, uint64_t *full) {
    constexpr bool shares = lie == ABOVE;
    constexpr int boxes = form == FORWARD ? 2 : TILE_N / 64, count = shares ? boxes / CLUSTER : boxes;
    int first = shares ? rank * count : 0;
#pragma unroll
    for (int i = first; i < first + count; i++) {
        unsigned char *to = b + i * (B_BYTES / boxes);
        if (form == FORWARD && result == TO_SWIGLU)
            bring_box_3d<shares>(to, &maps.b[i], full, k, tile.n, tile.group);
        else if (form == FORWARD)
            bring_box_3d<shares>(to, &maps.b[0], full, k, tile.n + i * (TILE_N / boxes), tile.group);
        else if (form == INPUT)
            bring_box_3d<shares>(to, &maps.b[term], full, tile.n + 64 * i, k, tile.group);
        else
            bring_box_2d<shares>(to, &maps.b[0], full, tile.n + 64 * i, k);
    }
}

template <int form>
static __device__ __forceinline__ void bring_a(const struct maps &maps, const struct tile &tile, int term, int k, unsigned char *a,
                                               uint64_t *full) {
    if (form != WEIGHT) {
        load_box_2d(a, &maps.a[term], full, k, tile.row_begin);
    } else {
        load_box_2d(a, &maps.a[0], full, tile.m, k);
        load_box_2d(a + BOX_BYTES, &maps.a[0], full, tile.m + 64, k);
    }
}

/* The blocks of the inner dimension of a tile, one after the other. */
struct walk {
    int term, k, end;
};

template <int form> static __device__ __forceinline__ struct walk first_block(const struct problem &p, const struct tile &tile) {
    if (form == WEIGHT)
        return {0, tile.row_begin, tile.row_end};
    return {0, 0, p.inner[0]};
}

/* Of a group without rows. */
static __device__ __forceinline__ bool is_empty(const struct walk &walk) {
    return walk.k >= walk.end;
}

/* False after the last one. */
template <int form> static __device__ __forceinline__ bool next_block(const struct problem &p, struct walk *walk) {
    walk->k += TILE_K;
    if (walk->k < walk->end)
        return true;
    if (form == WEIGHT || ++walk->term >= p.terms)
        return false;
    walk->k = 0;
    walk->end = p.inner[walk->term];
    return true;
}

/* By one thread: all that the copy engine brings. */
template <int form, int result>
static __device__ __forceinline__ void bring_boxes(const struct maps &maps, const struct tile &tile, const struct walk &walk,
                                                   int rank, unsigned char *stage, uint64_t *full) {
    barrier_arrive_expecting(full, STAGE_BYTES);
    bring_b<form, ABOVE, result>(maps, tile, walk.term, walk.k, rank, stage + A_BYTES, full);
    bring_a<form>(maps, tile, walk.term, walk.k, stage, full);
}

/* The last rows of a group are fewer than a block: the copy engine would bring the next group's. */
template <int form> static __device__ __forceinline__ bool is_tail(const struct walk &walk) {
    return form == WEIGHT && walk.k + TILE_K > walk.end;
}

/* By all threads; done when it returns. */
static __device__ __forceinline__ void bring_tail(const struct problem &p, const struct tile &tile, const struct walk &walk,
                                                  int thread, unsigned char *stage) {
    bring_last_rows<TILE_M / 64>(p.a[0], walk.k, walk.end, tile.m, thread, stage);
    bring_last_rows<TILE_N / 64>(p.b, walk.k, walk.end, tile.n, thread, stage + A_BYTES);
    copy_async_commit();
    copy_async_wait<0>();
    fence_for_engines();
    bringers_sync();
}

/* Nothing is gathered: one thread asks the copy engine; the others only help with tails. */
template <int form, int result, typename S>
static __device__ __forceinline__ void bring_direct(const struct maps &maps, const struct problem &p, int column_tiles, int columns,
                                                    S *s, int rank) {
    struct ring ring = {0, 1};
    int place = 0, total = s->first_tile[p.groups], thread = (int)threadIdx.x;
    if (form != WEIGHT && thread > 0)
        return;
    for (int t = first_turn(); t < total; t = next_turn<form>(p, s, place, t)) {
        struct tile tile = find_tile(p, (enum form)form, ABOVE, column_tiles, columns, s, t, place, rank);
        struct walk walk = first_block<form>(p, tile);
        place = tile.place;
        if (is_empty(walk))
            continue;
        do {
            uint64_t *full = &s->full[ring.stage];
            barrier_wait(&s->empty[ring.stage], ring.parity);
            if (is_tail<form>(walk)) {
                bring_tail(p, tile, walk, thread, s->stage[ring.stage]);
                if (thread % WARP == 0)
                    barrier_arrive(full);
            } else if (thread == 0) {
                bring_boxes<form, result>(maps, tile, walk, rank, s->stage[ring.stage], full);
            } else if (thread % WARP == 0) {
                barrier_arrive(full); /* so that no warp falls two rounds of the ring behind */
            }
            advance<S::STAGES>(&ring);
        } while (next_block<form>(p, &walk));
    }
}

/* Rows that an index names are boxes of one row each: faster than threads that copy 16 bytes each. A part is what a warp asks for
 * of every 64 of the inner dimension: of FORWARD and INPUT rows part * BOXES .. , of WEIGHT rows part * INNER_ROWS .. of the next
 * 64, in two boxes beside each other. Where an operand is the same for both blocks, each has half of A's rows, or of B's
 * columns. */
template <int lie> struct part_of_rows {
    enum { BOXES = lie == ABOVE ? 32 : 16, INNER_ROWS = BOXES / 2 };
};

/* In the place of rows beyond the group its last one comes: what they give is not stored. */
template <int boxes>
static __device__ __forceinline__ void find_rows(const struct rows_operand &a, const struct tile &tile, int part, int rows[boxes]) {
    int at = tile.row_begin + part * boxes + lane_index() % boxes;
    int mine = a.index[at < tile.row_end ? at : tile.row_end - 1];
#pragma unroll
    for (int i = 0; i < boxes; i++)
        rows[i] = __shfl_sync(FULL_WARP, mine, i);
}

/* Of WEIGHT: the index that lane % count has for the block from k on. */
template <int count>
static __device__ __forceinline__ int find_inner_row(const struct rows_operand &a, const struct walk &walk, int k, int part) {
    int at = k + part * count + lane_index() % count;
    return a.index[at < walk.end ? at : walk.end - 1];
}

/* By one lane; rows are the same for all lanes. */
template <int form, int lie, int gathers>
static __device__ __forceinline__ void bring_rows(const struct maps &maps, const struct tile &tile, const struct walk &walk,
                                                  int rank, int part, const int *rows, unsigned char *stage, uint64_t *full) {
    constexpr bool is_b = gathers == ROWS_OF_B, shares = is_b || lie == BESIDE;
    static_assert(!is_b || (form == WEIGHT && lie == ABOVE), "only there both blocks have the same columns");
    constexpr int boxes = part_of_rows<lie>::BOXES, inner_rows = part_of_rows<lie>::INNER_ROWS;
    if (form != WEIGHT) {
#pragma unroll
        for (int i = 0; i < boxes; i++)
            bring_box_2d<shares>(stage + (part * boxes + i) * 128, &maps.a[walk.term], full, walk.k, rows[i]);
    } else {
        unsigned char *to = is_b ? stage + A_BYTES + rank * (B_BYTES / CLUSTER) : stage;
        int column = is_b ? tile.n + rank * (TILE_N / CLUSTER) : tile.m;
#pragma unroll
        for (int i = 0; i < boxes; i++)
            bring_box_2d<shares>(to + i % 2 * BOX_BYTES + (part * inner_rows + i / 2) * 128, is_b ? &maps.b[0] : &maps.a[0], full,
                                 column + i % 2 * 64, rows[i / 2]);
    }
}

/* By one lane of a warp: its part of the gathered operand, and by the first warp's all of the other. */
template <int form, int lie, int gathers, int result>
static __device__ __forceinline__ void bring_part(const struct maps &maps, const struct tile &tile, const struct walk &walk,
                                                  int rank, int warp, const int *rows, unsigned char *stage, uint64_t *full) {
    constexpr int own = gathers == ROWS_OF_B ? B_BYTES : A_BYTES;
    int part = lie == ABOVE ? warp : rank * WARPS + warp;
    barrier_arrive_expecting(full, own / WARPS + (warp == 0 ? STAGE_BYTES - own : 0));
    if (warp == 0 && gathers == ROWS_OF_B)
        bring_a<form>(maps, tile, walk.term, walk.k, stage, full);
    else if (warp == 0)
        bring_b<form, lie, result>(maps, tile, walk.term, walk.k, rank, stage + A_BYTES, full);
    bring_rows<form, lie, gathers>(maps, tile, walk, rank, part, rows, stage, full);
}

static __device__ __forceinline__ struct tile uniform_tile(const struct tile &tile) {
    return {uniform(tile.place), uniform(tile.group), uniform(tile.row_begin), uniform(tile.row_end), uniform(tile.m),
            uniform(tile.n)};
}

/* An operand is gathered; a lane of each warp arrives. */
template <int form, int lie, int gathers, int result, typename S>
static __device__ __forceinline__ void bring_gathered(const struct maps &maps, const struct problem &p, int column_tiles,
                                                      int columns, S *s, int rank) {
    constexpr int boxes = part_of_rows<lie>::BOXES, inner_rows = part_of_rows<lie>::INNER_ROWS;
    const struct rows_operand &indexed = gathers == ROWS_OF_B ? p.b : p.a[0];
    struct ring ring = {0, 1};
    int place = 0, total = uniform(s->first_tile[p.groups]), thread = (int)threadIdx.x, warp = uniform(thread / WARP);
    int part = lie == ABOVE ? warp : rank * WARPS + warp;
    for (int t = first_turn(); t < total; t = next_turn<form>(p, s, place, t)) {
        struct tile tile = uniform_tile(find_tile(p, (enum form)form, (enum lie)lie, column_tiles, columns, s, t, place, rank));
        struct walk walk = first_block<form>(p, tile);
        int rows[boxes], mine = 0, next = 0;
        place = tile.place;
        if (is_empty(walk))
            continue;
        if (form != WEIGHT) {
            find_rows<boxes>(indexed, tile, part, rows);
        } else {
            mine = find_inner_row<inner_rows>(indexed, walk, walk.k, part);
            next = find_inner_row<inner_rows>(indexed, walk, walk.k + TILE_K, part);
        }
        do {
            unsigned char *stage = s->stage[ring.stage];
            uint64_t *full = &s->full[ring.stage];
            if (form == WEIGHT) {
#pragma unroll
                for (int i = 0; i < inner_rows; i++)
                    rows[i] = __shfl_sync(FULL_WARP, mine, i);
                mine = next;
                next = find_inner_row<inner_rows>(indexed, walk, walk.k + 2 * TILE_K, part);
            }
            barrier_wait(&s->empty[ring.stage], ring.parity);
            bool is_last = is_tail<form>(walk);
            if (is_last)
                bring_tail(p, tile, walk, thread, stage);
            if (elected()) {
                if (is_last)
                    barrier_arrive(full);
                else
                    bring_part<form, lie, gathers, result>(maps, tile, walk, rank, warp, rows, stage, full);
            }
            __syncwarp();
            advance<S::STAGES>(&ring);
        } while (next_block<form>(p, &walk));
    }
}

/* ---- multiplying ------------------------------------------------------------------------------------------------- */

template <int form>
static __device__ __forceinline__ void multiply_stage(float d[128], uint32_t a, uint32_t b, bool is_first) {
    matrices_begin();
#pragma unroll
    for (int k = 0; k < TILE_K / 16; k++) {
        uint64_t left = form == WEIGHT ? matrix_at(a, k * 16 * 128, BOX_BYTES, 1024) : matrix_at(a, k * 32, 16, 1024);
        uint64_t right = form == FORWARD ? matrix_at(b, k * 32, 16, 1024) : matrix_at(b, k * 16 * 128, BOX_BYTES, 1024);
        multiply_64x256<form == WEIGHT, form != FORWARD>(d, left, right, k > 0 || !is_first);
    }
    matrices_commit();
}

template <typename S> static __device__ __forceinline__ void release(S *s, int stage) {
    if (threadIdx.x % GROUP_THREADS < CLUSTER)
        barrier_arrive_at(&s->empty[stage], threadIdx.x % GROUP_THREADS);
}

template <int form> static __device__ __forceinline__ int blocks_of(const struct problem &p, const struct tile &tile) {
    int blocks = form == WEIGHT ? (tile.row_end - tile.row_begin + TILE_K - 1) / TILE_K : 0;
    for (int i = 0; form != WEIGHT && i < p.terms; i++)
        blocks += (p.inner[i] + TILE_K - 1) / TILE_K;
    return blocks;
}

/* The last block may still be multiplied when it returns; it is in stage `before`. After `lead` blocks the other multipliers are
 * told; 0: they are not. */
template <int form, typename S>
static __device__ __forceinline__ int multiply_tile(float d[128], int blocks, int lead, S *s, int multiplier, struct ring *ring) {
    int before = 0;
    for (int k = 0; k < blocks; k++) {
        barrier_wait(&s->full[ring->stage], ring->parity);
        if (form == WEIGHT) /* what threads copied */
            fence_for_engines();
        uint32_t a = shared_address(s->stage[ring->stage]);
        multiply_stage<form>(d, a + multiplier * BOX_BYTES, a + A_BYTES, k == 0);
        if (k > 0) {
            matrices_wait<1>();
            release(s, before);
            if (k == lead && threadIdx.x % GROUP_THREADS == 0)
                barrier_arrive(&s->ahead);
        }
        before = ring->stage;
        advance<S::STAGES>(ring);
    }
    return before;
}

/* A group without rows: its sums. */
static __device__ __forceinline__ void clear_sums(float d[128]) {
#pragma unroll
    for (int i = 0; i < 128; i++)
        d[i] = 0;
}

template <int form, int result, typename S>
static __device__ __forceinline__ struct strips begin_tile(const struct maps &maps, const struct problem &p,
                                                           const struct tile &tile, S *s, int multiplier, int warp) {
    int row = (form == WEIGHT ? tile.m : tile.row_begin) + multiplier * 64 + warp * STRIP_ROWS;
    struct strips strips = {s->strip[multiplier][warp][0], row, form == WEIGHT ? p.m : tile.row_end, p.n};
    if (result == ONTO_F32)
        ask_for_base(p, tile);
    if (result == THROUGH_SWIGLU) {
        ask_for_swiglu(p, tile);
        leave_strips();
        for (int q = 0; q < S::STRIPS / 2 && lane_index() == 0; q++)
            ask_for_strips<S::STRIPS / 2>(p, maps, tile, strips, q, s->loaded[multiplier][warp]);
    }
    return strips;
}

/* How many blocks ahead the first multipliers are when the others begin a tile. Who multiplies alone goes twice as fast, so that
 * nothing is lost, and one may multiply while the other stores. A stage must be left for what is on its way. Not of a tile with so
 * few blocks that the first could be past its next one before the others begin with it: a barrier knows two turns. */
template <typename S> static __device__ __forceinline__ int lead_of(const struct problem &p, int blocks) {
    return blocks <= S::STAGES ? 0 : p.lead < S::STAGES - 2 ? p.lead : S::STAGES - 2;
}

template <int form, int lie, int result, typename S>
static __device__ __forceinline__ void multiply_all(const struct maps &maps, const struct problem &p, int column_tiles, int columns,
                                                    S *s, int rank, int multiplier) {
    struct ring ring = {0, 0};
    int t = first_turn(), total = s->first_tile[p.groups];
    int warp = (int)threadIdx.x % GROUP_THREADS / WARP;
    uint32_t parity[2] = {0, 0}, turn = 0;
    struct tile tile, following;
    float d[128];
    if (t < total)
        tile = find_tile(p, (enum form)form, (enum lie)lie, column_tiles, columns, s, t, 0, rank);
    while (t < total) {
        struct strips strips = begin_tile<form, result>(maps, p, tile, s, multiplier, warp);
        int blocks = blocks_of<form>(p, tile), lead = lead_of<S>(p, blocks);
        if (lead > 0 && multiplier > 0) {
            barrier_wait(&s->ahead, turn);
            turn ^= 1;
        }
        if (form == WEIGHT && blocks == 0)
            clear_sums(d);
        int last = multiply_tile<form>(d, blocks, multiplier == 0 ? lead : 0, s, multiplier, &ring);
        t = next_turn<form>(p, s, tile.place, t);
        if (t < total) /* while the last block is multiplied */
            following = find_tile(p, (enum form)form, (enum lie)lie, column_tiles, columns, s, t, tile.place, rank);
        matrices_wait<0>();
        if (blocks > 0)
            release(s, last);
        store_tile<form, result, S::STRIPS>(d, p, maps, tile, strips, s->loaded[multiplier][warp], parity);
        tile = following;
    }
}

template <typename S> static __device__ void init_barriers(S *s, int full_arrivals) {
    for (int i = 0; i < S::STAGES; i++) {
        barrier_init(&s->full[i], full_arrivals);
        barrier_init(&s->empty[i], CLUSTER * MULTIPLIERS);
    }
    barrier_init(&s->ahead, 1);
    for (int i = 0; i < MULTIPLIERS * WARPS * 2; i++)
        barrier_init(&s->loaded[0][0][0] + i, 1);
    barriers_are_initialized();
}

#endif

template <int form, int gathers, int lie, int result>
static __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    multiply(const __grid_constant__ struct maps maps, const __grid_constant__ struct problem p) {
#ifdef CUDA_IS_SM90
    typedef struct shared_memory<stages_of(result), strips_of(result)> shared;
    CUDA_SHARED_DYNAMIC(shared, s);
    int columns = result == TO_SWIGLU ? TILE_N / 2 : TILE_N;
    int whole = cluster_columns((enum lie)lie, columns), column_tiles = (p.n + whole - 1) / whole;
    int rank = (int)cluster_rank(), role = (int)threadIdx.x / GROUP_THREADS;
    if (threadIdx.x == 0)
        init_barriers(s, gathers != NOTHING || form == WEIGHT ? WARPS : 1);
    count_tiles(p, (enum form)form, (enum lie)lie, result == TO_F32 || result == TO_F32_TRANSPOSED, column_tiles, s);
    if (form == WEIGHT)
        deal_tiles(p, s, (int *)s->strip);
    cluster_sync();
    if (role == 0) {
        registers_keep<gathers == NOTHING ? 40 : 56>();
        if (gathers != NOTHING)
            bring_gathered<form, lie, gathers, result>(maps, p, column_tiles, columns, s, rank);
        else
            bring_direct<form, result>(maps, p, column_tiles, columns, s, rank);
    } else {
        registers_get<gathers == NOTHING ? 232 : 224>();
        multiply_all<form, lie, result>(maps, p, column_tiles, columns, s, rank, role - 1);
    }
    cluster_sync(); /* the other block may still write to this one's memory */
#endif
}

static __global__ void add_row_parts(const float *part, int column_tiles, int64_t rows, float *sum) {
    for (int64_t r = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; r < rows; r += (int64_t)gridDim.x * blockDim.x) {
        float all = 0;
        for (int t = 0; t < column_tiles; t++)
            all += part[t * rows + r];
        sum[r] = all;
    }
}

static __global__ void add_splits(const float *part, int splits, int64_t count, bool accumulate, float *sum) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count / 4; i += (int64_t)gridDim.x * blockDim.x) {
        float4 all = accumulate ? *(const float4 *)(sum + 4 * i) : make_float4(0, 0, 0, 0);
        for (int split = 0; split < splits; split++) {
            float4 more = *(const float4 *)(part + split * count + 4 * i);
            all.x += more.x, all.y += more.y, all.z += more.z, all.w += more.w;
        }
        *(float4 *)(sum + 4 * i) = all;
    }
}

/* ---- calls ------------------------------------------------------------------------------------------------------- */

/* Boxes of 64 numbers by `box_rows` rows of groups of matrices [rows, columns]. */
static void make_map(tensor_map *map, const void *data, int64_t groups, int64_t rows, int64_t columns, int box_rows,
                     bool has_groups) {
    uint64_t size[3] = {(uint64_t)columns, (uint64_t)rows, (uint64_t)groups};
    uint64_t stride[2] = {(uint64_t)columns * 2, (uint64_t)(rows * columns) * 2};
    uint32_t box[3] = {64, (uint32_t)box_rows, 1};
    tensor_map_make(map, data, has_groups ? 3 : 2, size, stride, box);
}

/* Of rows that come one after the other, or by an index. */
static void make_rows_map(tensor_map *map, struct tensor t, struct tensor rows, int box_rows) {
    make_map(map, t.data, 1, t.shape[0], t.shape[1], tensor_exists(rows) ? 1 : box_rows, false);
}

static bool is_wide(const struct problem *p) {
    return is_aligned(p->c, 16) && is_aligned(p->base, 16) && p->stride % 4 == 0;
}

static bool is_fit(struct tensor t) {
    int64_t columns = t.shape[t.dim_count - 1];
    return t.dtype == DTYPE_BF16 && is_aligned(t.data, 16) && columns % 8 == 0 && columns > 0;
}

static bool is_fit_real(struct tensor t) {
    return t.dtype == DTYPE_F32 && is_aligned(t.data, 8) && t.shape[t.dim_count - 1] % 2 == 0;
}

static bool is_fit_weight(struct packed w) {
    return w.dtype == DTYPE_BF16 && is_aligned(w.data, 16) && w.out % 8 == 0 && w.in % 8 == 0;
}

static struct problem problem_of(struct tensor offsets, int64_t groups, int64_t rows) {
    struct problem p = {0};
    p.offsets = (const int32_t *)offsets.data;
    p.groups = (int)groups;
    p.rows = (int)rows;
    p.group_rows = (int)rows;
    p.terms = 1;
    p.lead = cuda_lead();
    return p;
}

static struct rows_operand operand_of(struct tensor t, struct tensor rows) {
    return {(const bf16 *)t.data, (const int32_t *)rows.data, t.shape[1], (int)t.shape[1]};
}

static unsigned cluster_grid(void) {
    int clusters = cuda_processors() / CLUSTER;
    return (unsigned)(CLUSTER * (clusters < CLUSTERS_MAX ? clusters : CLUSTERS_MAX));
}

#define START_LIE(form, gathers, lie, result)                                                            \
    CUDA_LAUNCH_SM90(CLUSTER, (multiply<form, gathers, lie, result>), cluster_grid(), THREADS,           \
                     (sizeof(struct shared_memory<stages_of(result), strips_of(result)>)), maps, problem)

/* Where that is asked for, and there are columns for both. */
static bool lies_beside(int64_t n, enum result result) {
    return cuda_lies_beside() && n > (result == TO_SWIGLU ? TILE_N / 2 : TILE_N);
}

#define START(form, gathers, result)                                                            \
    do {                                                                                        \
        if (gathers == ROWS_OF_A && lies_beside(problem.n, result))                             \
            START_LIE(form, gathers, gathers == ROWS_OF_A ? BESIDE : ABOVE, result);            \
        else                                                                                    \
            START_LIE(form, gathers, ABOVE, result);                                            \
    } while (0)

/* Of rows as they are or gathered, to what a call's to_bf16 and accumulate say. */
#define START_RESULT(form, gathers)                \
    do {                                           \
        if (to_bf16)                               \
            START(form, gathers, TO_BF16);         \
        else if (accumulate)                       \
            START(form, gathers, ADD_F32);         \
        else                                       \
            START(form, gathers, TO_F32);          \
    } while (0)
#define START_ROWS(form)                           \
    do {                                           \
        if (tensor_exists(rows))                   \
            START_RESULT(form, ROWS_OF_A);         \
        else                                       \
            START_RESULT(form, NOTHING);           \
    } while (0)

static bool groups_fit(int64_t groups, int64_t rows) {
    return tensor_maps_exist() && groups <= GROUPS_MAX && rows <= INT32_MAX / 2;
}

bool sm90_forward(struct tensor x, struct tensor rows, struct tensor offsets, struct packed w, struct tensor y, bool accumulate) {
    bool to_bf16 = y.dtype == DTYPE_BF16;
    if (!is_fit(x) || !is_fit_weight(w) || !(to_bf16 ? is_fit(y) && !accumulate : is_fit_real(y)) ||
        !groups_fit(w.groups, y.shape[0]))
        return false;
    struct maps maps;
    struct problem problem = problem_of(offsets, w.groups, y.shape[0]);
    problem.n = (int)w.out;
    problem.inner[0] = (int)w.in;
    problem.a[0] = operand_of(x, rows);
    problem.c = y.data;
    problem.stride = w.out;
    problem.is_wide = is_wide(&problem);
    make_rows_map(&maps.a[0], x, rows, TILE_M);
    make_map(&maps.b[0], w.data, w.groups, w.out, w.in, TILE_N / 2, true);
    START_ROWS(FORWARD);
    return true;
}

bool sm90_forward_onto(struct tensor x, struct packed w, struct tensor base, struct tensor y) {
    if (!is_fit(x) || !is_fit_weight(w) || !is_fit_real(y) || !is_fit_real(base) || !groups_fit(1, y.shape[0]))
        return false;
    struct maps maps;
    struct problem problem = problem_of(tensor_none(), 1, y.shape[0]);
    problem.n = (int)w.out;
    problem.inner[0] = (int)w.in;
    problem.a[0] = operand_of(x, tensor_none());
    problem.c = y.data;
    problem.base = (const float *)base.data;
    problem.stride = w.out;
    problem.is_wide = is_wide(&problem);
    make_rows_map(&maps.a[0], x, tensor_none(), TILE_M);
    make_map(&maps.b[0], w.data, 1, w.out, w.in, TILE_N / 2, true);
    START(FORWARD, NOTHING, ONTO_F32);
    return true;
}

bool sm90_swiglu_forward(struct tensor x, struct tensor rows, struct tensor offsets, struct packed gate_weight,
                         struct packed up_weight, struct tensor row_weight, struct tensor gate, struct tensor up,
                         struct tensor act) {
    if (!is_fit(x) || !is_fit_weight(gate_weight) || !is_fit_weight(up_weight) || !is_fit(gate) || !is_fit(up) ||
        (tensor_exists(act) && !is_fit(act)) || !groups_fit(gate_weight.groups, gate.shape[0]))
        return false;
    struct maps maps;
    struct problem problem = problem_of(offsets, gate_weight.groups, gate.shape[0]);
    problem.n = (int)gate_weight.out;
    problem.inner[0] = (int)gate_weight.in;
    problem.a[0] = operand_of(x, rows);
    problem.c = gate.data;
    problem.c_up = up.data;
    problem.c_act = act.data;
    problem.row_weight = (const float *)row_weight.data;
    problem.stride = gate_weight.out;
    make_rows_map(&maps.a[0], x, rows, TILE_M);
    make_map(&maps.b[0], gate_weight.data, gate_weight.groups, gate_weight.out, gate_weight.in, TILE_N / 2, true);
    make_map(&maps.b[1], up_weight.data, up_weight.groups, up_weight.out, up_weight.in, TILE_N / 2, true);
    if (tensor_exists(rows))
        START(FORWARD, ROWS_OF_A, TO_SWIGLU);
    else
        START(FORWARD, NOTHING, TO_SWIGLU);
    return true;
}

bool sm90_swiglu_backward(struct tensor dy, struct tensor rows, struct tensor offsets, struct packed w, struct tensor gate,
                          struct tensor up, struct tensor row_weight, struct tensor act, struct tensor drow_weight) {
    if (!is_fit(dy) || !is_fit_weight(w) || !is_fit(gate) || !is_fit(up) || !is_fit(act) || !groups_fit(w.groups, gate.shape[0]))
        return false;
    struct maps maps;
    struct problem problem = problem_of(offsets, w.groups, gate.shape[0]);
    int column_tiles = (int)ceil_div(w.in, TILE_N);
    problem.n = (int)w.in;
    problem.inner[0] = (int)w.out;
    problem.a[0] = operand_of(dy, rows);
    problem.c = gate.data;
    problem.c_up = up.data;
    problem.c_act = act.data;
    problem.row_weight = (const float *)row_weight.data;
    problem.stride = w.in;
    if (tensor_exists(drow_weight))
        problem.row_part = (float *)cuda_scratch((size_t)column_tiles * (size_t)problem.rows * sizeof(float));
    make_rows_map(&maps.a[0], dy, rows, TILE_M);
    make_map(&maps.b[0], w.data, w.groups, w.out, w.in, TILE_K, true);
    make_map(&maps.c[0], gate.data, 1, gate.shape[0], w.in, STRIP_ROWS, true);
    make_map(&maps.c[1], up.data, 1, up.shape[0], w.in, STRIP_ROWS, true);
    if (tensor_exists(rows))
        START(INPUT, ROWS_OF_A, THROUGH_SWIGLU);
    else
        START(INPUT, NOTHING, THROUGH_SWIGLU);
    if (tensor_exists(drow_weight))
        CUDA_LAUNCH(add_row_parts, grid_for(problem.rows, 256), 256, 0, problem.row_part, column_tiles, (int64_t)problem.rows,
                    (float *)drow_weight.data);
    return true;
}

bool sm90_backward_inputs(const struct product_term *terms, int term_count, struct tensor rows, struct tensor offsets,
                          struct tensor dx, bool accumulate) {
    bool to_bf16 = dx.dtype == DTYPE_BF16;
    int64_t groups = terms[0].w.groups, in = terms[0].w.in;
    if (!(to_bf16 ? is_fit(dx) && !accumulate : is_fit_real(dx)) || !groups_fit(groups, dx.shape[0]))
        return false;
    struct maps maps;
    struct problem problem = problem_of(offsets, groups, dx.shape[0]);
    problem.n = (int)in;
    problem.terms = term_count;
    problem.c = dx.data;
    problem.stride = in;
    for (int i = 0; i < term_count; i++) {
        struct packed w = terms[i].w;
        if (!is_fit(terms[i].dy) || !is_fit_weight(w))
            return false;
        CHECK(w.groups == groups && w.in == in);
        problem.inner[i] = (int)w.out;
        problem.a[i] = operand_of(terms[i].dy, rows);
        make_rows_map(&maps.a[i], terms[i].dy, rows, TILE_M);
        make_map(&maps.b[i], w.data, w.groups, w.out, w.in, TILE_K, true);
    }
    problem.is_wide = is_wide(&problem);
    START_ROWS(INPUT);
    return true;
}

/* A dense gradient with few tiles, and many rows to sum over: parts of the rows are as many groups, whose sums are added in
 * order. */
static int splits_of(int64_t m, int64_t n, int64_t rows) {
    int64_t tiles = ceil_div(m, CLUSTER * TILE_M) * ceil_div(n, TILE_N), clusters = cluster_grid() / CLUSTER;
    int64_t wanted = clusters / tiles, most = rows / (16 * TILE_K);
    int64_t splits = wanted < most ? wanted : most;
    return splits < 2 ? 1 : splits < 16 ? (int)splits : 16;
}

#define START_WEIGHT(gathers)                      \
    do {                                           \
        if (accumulate)                            \
            START(WEIGHT, gathers, ADD_F32);       \
        else                                       \
            START(WEIGHT, gathers, TO_F32);        \
    } while (0)

static void start_weight(const struct maps &maps, const struct problem &problem, enum gathered gathers, bool accumulate) {
    if (gathers == NOTHING)
        START_WEIGHT(NOTHING);
    else if (gathers == ROWS_OF_A)
        START_WEIGHT(ROWS_OF_A);
    else
        START_WEIGHT(ROWS_OF_B);
}

/* x is A. */
static void start_weight_turned(const struct maps &maps, const struct problem &problem, bool accumulate) {
    if (accumulate)
        START(WEIGHT, ROWS_OF_A, ADD_F32_TRANSPOSED);
    else
        START(WEIGHT, ROWS_OF_A, TO_F32_TRANSPOSED);
}

static void start_splits(const struct maps &maps, struct problem problem, int splits, bool accumulate, float *dw) {
    int64_t count = problem.group_elements;
    problem.groups = splits;
    problem.group_rows = (int)(ceil_div(problem.rows, splits * TILE_K) * TILE_K);
    problem.groups = (int)ceil_div(problem.rows, problem.group_rows);
    problem.c = cuda_scratch((size_t)(problem.groups * count) * sizeof(float));
    start_weight(maps, problem, NOTHING, false);
    CUDA_LAUNCH(add_splits, grid_for(count / 4, 256), 256, 0, (const float *)problem.c, problem.groups, count, accumulate, dw);
}

bool sm90_backward_weight(struct tensor dy, struct tensor dy_rows, struct tensor x, struct tensor x_rows, struct tensor offsets,
                          struct tensor dw, bool accumulate) {
    bool gathers_x = tensor_exists(x_rows), turns = gathers_x && (lies_beside(dy.shape[1], TO_F32) || !cuda_keeps_x_right());
    struct tensor left = turns ? x : dy, left_rows = turns ? x_rows : dy_rows;
    struct tensor right = turns ? dy : x, right_rows = turns ? dy_rows : x_rows;
    int64_t groups = tensor_exists(offsets) ? dw.shape[0] : 1;
    int64_t rows = gathers_x ? tensor_elements(x_rows) : x.shape[0];
    if (!is_fit(dy) || !is_fit(x) || !is_fit_real(dw) || (gathers_x && tensor_exists(dy_rows)) || !groups_fit(groups, rows))
        return false;
    struct maps maps;
    struct problem problem = problem_of(offsets, groups, rows);
    problem.m = (int)left.shape[1];
    problem.n = (int)right.shape[1];
    problem.a[0] = operand_of(left, left_rows);
    problem.b = operand_of(right, right_rows);
    problem.c = dw.data;
    problem.stride = x.shape[1];
    problem.group_elements = dy.shape[1] * x.shape[1];
    problem.is_wide = is_wide(&problem);
    make_rows_map(&maps.a[0], left, left_rows, TILE_K);
    make_rows_map(&maps.b[0], right, right_rows, TILE_K);
    enum gathered gathers = tensor_exists(left_rows) ? ROWS_OF_A : tensor_exists(right_rows) ? ROWS_OF_B : NOTHING;
    bool may_split = !tensor_exists(offsets) && gathers == NOTHING && is_aligned(dw.data, 16);
    int splits = !may_split ? 1 : splits_of(dw.shape[0], dw.shape[1], rows);
    if (splits > 1)
        start_splits(maps, problem, splits, accumulate, (float *)dw.data);
    else if (turns)
        start_weight_turned(maps, problem, accumulate);
    else
        start_weight(maps, problem, gathers, accumulate);
    return true;
}
