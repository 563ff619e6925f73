/* What of a Hopper device runs beside the threads of the model: barriers with phases, the engine that copies boxes of tensors,
 * the matrix units of a warp group (model_sm90.cuh). */
#include "device/cuda/model_threads.h"

#include "device/cuda/model_sm90.cuh"

#include <algorithm>
#include <deque>
#include <stdio.h>

using namespace cuda_model;

namespace {

/* Where a block's memory begins as instructions name it: the first KiB is not the kernel's. */
enum { SHARED_BEGIN = 1024, RANK_SHIFT = 24, SWIZZLE_ROWS = 8, TRANSACTIONS_MAX = (1 << 20) - 1, INNER = 16, COLUMNS_MAX = 256,
       GROUP_WARPS = 4 };

enum mood { LATE, AT_ONCE, NOW_AND_THEN, MOODS };
mood the_mood;
uint64_t chance_state;

/* True once in `times`. */
bool chance(unsigned times) {
    chance_state ^= chance_state << 13;
    chance_state ^= chance_state >> 7;
    chance_state ^= chance_state << 17;
    return (chance_state >> 20) % times == 0;
}

/* ---- addresses ---- */

uint32_t place_in_block(const void *p) {
    const block *b = &blocks[current->block];
    if (!now.is_sm90)
        cuda_model_die("an instruction of Hopper's in a launch for every device");
    size_t at = (size_t)((const unsigned char *)p - b->shared);
    if ((const unsigned char *)p < b->shared || at >= b->shared_bytes)
        cuda_model_die("an address that is not in the block's shared memory");
    return (uint32_t)at;
}

/* `bytes` of a block at an address without its rank. */
unsigned char *shared_at(int of, uint32_t address, size_t bytes) {
    block *b = &blocks[of];
    if (address < SHARED_BEGIN || address - SHARED_BEGIN + bytes > b->shared_bytes)
        cuda_model_die("a unit goes beyond the block's shared memory");
    return b->shared + (address - SHARED_BEGIN);
}

/* Another block, or what runs beside its threads, has to do with its memory. */
void check_is_there(int of) {
    if (blocks[of].live == 0)
        cuda_model_die("the memory of a block that has ended");
}

/* Rows of 128 bytes have their 16-byte chunks swapped by the row. */
uint32_t swizzled(uint32_t address) {
    return address ^ (address >> 7 & (SWIZZLE_ROWS - 1)) << 4;
}

/* ---- barriers ---- */

/* In its 8 bytes. What shared memory begins with is none. */
struct phase_barrier {
    uint64_t parity : 1, expected : 20, pending : 20;
    int64_t bytes : 22; /* still to come */
    uint64_t is_none : 1;
};
static_assert(sizeof(phase_barrier) == 8, "a barrier's place");

phase_barrier *barrier_at(uint64_t *place) {
    phase_barrier *b = reinterpret_cast<phase_barrier *>(place);
    if ((uintptr_t)place % 8 != 0 || b->is_none)
        cuda_model_die("a barrier that nobody initialized");
    return b;
}

void end_phase_if_complete(phase_barrier *b) {
    if (b->pending > 0 || b->bytes != 0)
        return;
    b->parity ^= 1;
    b->pending = b->expected;
    for (int t = 0; t < now.thread_count; t++)
        if (threads[t].state == WAITS_FOR_PHASE && threads[t].awaited == b)
            wake(&threads[t]);
}

/* Who has arrived may not get on for a while, and who waited for that may. */
void arrive(phase_barrier *b) {
    if (b->pending == 0)
        cuda_model_die("more arrivals than a barrier counts");
    b->pending--;
    end_phase_if_complete(b);
    if (the_mood == LATE || (the_mood == NOW_AND_THEN && chance(3)))
        stand_back();
}

void expect(phase_barrier *b, int64_t bytes) {
    if (b->bytes + bytes > TRANSACTIONS_MAX || b->bytes + bytes < -TRANSACTIONS_MAX)
        cuda_model_die("more bytes than a barrier counts");
    b->bytes += bytes;
}

/* ---- copies ---- */

struct box {
    tensor_map map; /* dims 0: bytes, as they are */
    int at[MODEL_DIMS_MAX];
    const unsigned char *from;
    int block;
    uint32_t to; /* address */
    uint32_t bytes;
    uint64_t *barrier;
};

std::vector<box> boxes; /* on their way */

/* Row r of a box: 64 numbers, zeros where the tensor has none. */
void read_row(const box &b, uint32_t r, uint16_t row[64]) {
    const unsigned char *from = b.map.data;
    bool is_there = true;
    memset(row, 0, 128);
    for (int i = 1; i < b.map.dims; i++) {
        int64_t at = (int64_t)b.at[i] + r % b.map.box[i];
        r /= b.map.box[i];
        is_there = is_there && at >= 0 && at < (int64_t)b.map.size[i];
        from += at * (int64_t)b.map.stride[i];
    }
    int64_t begin = std::max(-(int64_t)b.at[0], (int64_t)0), end = std::min((int64_t)b.map.size[0] - b.at[0], (int64_t)64);
    if (is_there && begin < end)
        memcpy(row + begin, from + (b.at[0] + begin) * 2, (size_t)(end - begin) * 2);
}

void deliver(const box &b) {
    uint16_t row[64];
    check_is_there(b.block);
    if (b.map.dims == 0)
        memcpy(shared_at(b.block, b.to, b.bytes), b.from, b.bytes);
    for (uint32_t r = 0; b.map.dims > 0 && r < b.bytes / 128; r++) {
        read_row(b, r, row);
        for (uint32_t chunk = 0; chunk < 8; chunk++)
            memcpy(shared_at(b.block, swizzled(b.to + r * 128 + chunk * 16), 16), row + chunk * 8, 16);
    }
    phase_barrier *barrier = barrier_at(b.barrier);
    expect(barrier, -(int64_t)b.bytes);
    end_phase_if_complete(barrier);
}

void deliver_number(size_t i) {
    box b = boxes[i];
    boxes[i] = boxes.back();
    boxes.pop_back();
    deliver(b);
}

void send(const box &b) {
    now.has_units = true;
    memset(shared_at(b.block, b.to, b.bytes), 0xFF, b.bytes);
    if (the_mood == AT_ONCE)
        deliver(b);
    else
        boxes.push_back(b);
}

/* ---- products ---- */

/* One product of a warp group: it runs when all four warps have asked for it. */
struct product {
    cuda_model_product what;
    long commit; /* how many were before it */
    unsigned asked; /* warps */
    bool is_done;
    const float *d[GROUP_WARPS]; /* of lane 0 */
    uint32_t a_pairs[GROUP_WARPS][WARP][4]; /* as they were: the translator keeps what a product reads of registers */
};

/* Sums [16, columns] of a warp that are not in its registers: products that add to them are on their way. */
struct sums {
    float *d[WARP];
    int numbers;
    long commit; /* of the last of them */
    std::vector<float> matrix;
};

struct warp_units {
    std::vector<sums> on_their_way;
    long asked, commit, waited_for; /* products; commits */
    bool is_fenced;
};

struct group_units {
    std::deque<product> products; /* that not all warps have waited for */
    long gone;                    /* before them */
};

warp_units units_of[WARPS_MAX];
group_units groups[WARPS_MAX / GROUP_WARPS];

const char RUNS_OVER[] = "a matrix whose address runs into the next field";

/* Of a matrix in shared memory, by what the instruction is told of it: eight numbers that lie beside each other. */
struct matrix {
    uint32_t start, wide, far;
    int block;
};

matrix matrix_of(uint64_t told, int block) {
    if (told >> 62 != 1 || (told >> 46 & 0xFFFF) != 0)
        cuda_model_die("a matrix whose chunks of 16 bytes are not swapped within 128");
    if ((told & 0x3FFF) != (told & 0xFFFF))
        cuda_model_die(RUNS_OVER);
    return {(uint32_t)(told & 0x3FFF) << 4, (uint32_t)(told >> 16 & 0x3FFF) << 4, (uint32_t)(told >> 32 & 0x3FFF) << 4, block};
}

void check_fenced(const matrix &m, const unsigned char *chunk) {
    for (int t = m.block * now.block_threads; t < (m.block + 1) * now.block_threads; t++)
        for (void *copied : threads[t].unfenced)
            if (copied == chunk)
                cuda_model_die("a product reads what a thread copied and did not fence");
}

void read_eight(const matrix &m, uint32_t offset, float to[8]) {
    uint16_t bits[8];
    const unsigned char *chunk = shared_at(m.block, swizzled(m.start + offset), 16);
    if (blocks[m.block].unfenced > 0)
        check_fenced(m, chunk);
    memcpy(bits, chunk, 16);
    for (int i = 0; i < 8; i++)
        to[i] = cuda_model_bits<float>((uint32_t)bits[i] << 16);
}

/* Rows begin.. + count of an operand, to[k][row]; turned: its rows in memory run along the inner dimension. */
void read_matrix(const matrix &m, bool turned, int begin, int count, float to[INNER][COLUMNS_MAX]) {
    float eight[8];
    if (!turned && m.wide != 16) /* which a device does not read there, and kernels say nothing else of */
        cuda_model_die(RUNS_OVER);
    for (int row = 0; row < count; row += turned ? 8 : 1)
        for (int k = 0; k < INNER; k += turned ? 1 : 8) {
            uint32_t r = (uint32_t)(begin + row), kk = (uint32_t)k;
            read_eight(m, turned ? r / 64 * m.wide + kk / 8 * m.far + kk % 8 * 128 + r % 64 * 2
                                 : r / 8 * m.far + r % 8 * 128 + kk * 2, eight);
            for (int i = 0; i < 8; i++)
                to[k + (turned ? 0 : i)][row + (turned ? i : 0)] = eight[i];
        }
}

/* Lane l has of the left operand, in pairs, rows l / 4 and + 8 of columns 2 (l % 4) and the next, then of columns + 8. */
void read_pairs(const uint32_t lanes[WARP][4], float to[INNER][COLUMNS_MAX]) {
    for (int l = 0; l < WARP; l++)
        for (int i = 0; i < 4; i++)
            for (int half = 0; half < 2; half++)
                to[l % 4 * 2 + half + i / 2 * 8][l / 4 + i % 2 * 8] =
                    cuda_model_bits<float>((lanes[l][i] >> 16 * half) << 16);
}

float left[INNER][COLUMNS_MAX], right[INNER][COLUMNS_MAX]; /* operands of the product that runs */

/* row [columns] += factor [INNER] times the right operand. Most of what the model computes is here, all of it on its own arrays:
 * eight columns stay in registers, and sanitizers do not look. */
MODEL_ARITHMETIC void add_products(float *row, const float *factor, int columns) {
    for (int j = 0; j < columns; j += 8) {
        float sum[8];
        for (int i = 0; i < 8; i++)
            sum[i] = row[j + i];
        for (int k = 0; k < INNER; k++)
            for (int i = 0; i < 8; i++)
                sum[i] += factor[k] * right[k][j + i];
        for (int i = 0; i < 8; i++)
            row[j + i] = sum[i];
    }
}

/* One warp's 16 of the 64 rows. */
void multiply(const product &p, int warp_in_group, int block, float *sum) {
    int columns = 2 * p.what.numbers;
    if (p.what.a_pairs)
        read_pairs(p.a_pairs[warp_in_group], left);
    else
        read_matrix(matrix_of(p.what.a, block), p.what.turned_a, 16 * warp_in_group, 16, left);
    for (int i = 0; i < 16; i++) {
        float *row = sum + i * columns;
        if (!p.what.accumulates)
            memset(row, 0, (size_t)columns * sizeof(float));
        float factor[INNER];
        for (int k = 0; k < INNER; k++)
            factor[k] = left[k][i];
        add_products(row, factor, columns);
    }
}

sums *find_sums(warp_units *u, const float *d) {
    for (sums &s : u->on_their_way)
        if (s.d[0] == d)
            return &s;
    return nullptr;
}

/* In order, those of commits up to this one that all warps have asked for. */
void do_products(int group, long newest) {
    for (product &p : groups[group].products) {
        if (p.commit > newest || p.asked != (1u << GROUP_WARPS) - 1)
            return;
        if (p.is_done)
            continue;
        read_matrix(matrix_of(p.what.b, current->block), p.what.turned_b, 0, 2 * p.what.numbers, right);
        for (int w = 0; w < GROUP_WARPS; w++)
            multiply(p, w, current->block, find_sums(&units_of[group * GROUP_WARPS + w], p.d[w])->matrix.data());
        p.is_done = true;
    }
}

/* Whether all of the warp's products of commits up to this one may run. */
bool are_asked_for(int group, long newest) {
    for (const product &p : groups[group].products)
        if (p.commit <= newest && p.asked != (1u << GROUP_WARPS) - 1)
            return false;
    return true;
}

/* Number i of lane l is of row l / 4 + 8 (i / 2 % 2) and column 8 (i / 4) + 2 (l % 4) + i % 2. */
float *sum_of(sums *s, int lane, int i) {
    return &s->matrix[(size_t)((lane / 4 + i / 2 % 2 * 8) * 2 * s->numbers + i / 4 * 8 + lane % 4 * 2 + i % 2)];
}

void take_sums(sums *s) {
    s->matrix.resize((size_t)(WARP * s->numbers));
    for (int l = 0; l < WARP; l++) {
        for (int i = 0; i < s->numbers; i++)
            *sum_of(s, l, i) = s->d[l][i];
        memset(s->d[l], 0xFF, (size_t)s->numbers * sizeof(float));
    }
}

void give_back_sums(sums *s) {
    for (int l = 0; l < WARP; l++)
        for (int i = 0; i < s->numbers; i++) {
            uint32_t bits;
            memcpy(&bits, &s->d[l][i], sizeof bits);
            if (bits != 0xFFFFFFFFu)
                cuda_model_die("sums were touched while products that add to them were on their way");
            s->d[l][i] = *sum_of(s, l, i);
        }
}

sums *sums_for(warp_units *u, void *const lanes[32]) {
    const cuda_model_product *first = static_cast<const cuda_model_product *>(lanes[0]);
    sums *s = find_sums(u, first->d);
    if (!s) {
        u->on_their_way.emplace_back();
        s = &u->on_their_way.back();
        s->numbers = first->numbers;
        for (int l = 0; l < WARP; l++)
            s->d[l] = static_cast<const cuda_model_product *>(lanes[l])->d;
        take_sums(s);
    }
    if (s->numbers != first->numbers)
        cuda_model_die("sums of another size than those on their way");
    s->commit = u->commit;
    return s;
}

/* The one that this warp asks for next, which others of its group may have asked for. */
product *next_product(group_units *group, warp_units *u, const cuda_model_product &what) {
    size_t at = (size_t)(u->asked++ - group->gone);
    if (at == group->products.size()) {
        group->products.emplace_back();
        group->products[at].what = what;
        group->products[at].commit = u->commit;
    }
    return &group->products[at];
}

bool is_same(const cuda_model_product &a, const cuda_model_product &b) {
    return a.a == b.a && a.b == b.b && a.accumulates == b.accumulates && a.numbers == b.numbers;
}

void ask_for_product(void *const lanes[32], unsigned) {
    int number = current->warp / GROUP_WARPS, w = current->warp % GROUP_WARPS;
    warp_units *u = &units_of[current->warp];
    if (!u->is_fenced)
        cuda_model_die("a product without a fence before it");
    product *p = next_product(&groups[number], u, *static_cast<const cuda_model_product *>(lanes[0]));
    for (int l = 0; l < WARP; l++) {
        const cuda_model_product *of_lane = static_cast<const cuda_model_product *>(lanes[l]);
        if (of_lane->a_pairs)
            memcpy(p->a_pairs[w][l], of_lane->a_pairs, sizeof p->a_pairs[w][l]);
        if (!is_same(*of_lane, p->what) || p->commit != u->commit)
            cuda_model_die("warps of a group, or lanes of a warp, with other products");
    }
    p->d[w] = sums_for(u, lanes)->d[0];
    p->asked |= 1u << w;
    if (p->asked != (1u << GROUP_WARPS) - 1)
        return;
    for (int t = number * GROUP_WARPS * WARP; t < (number + 1) * GROUP_WARPS * WARP; t++)
        if (threads[t].state == WAITS_FOR_PRODUCTS)
            wake(&threads[t]);
    if (the_mood == AT_ONCE || (the_mood == NOW_AND_THEN && chance(2)))
        do_products(number, u->commit);
}

void forget_products(int number) {
    group_units *group = &groups[number];
    long all = units_of[number * GROUP_WARPS].waited_for;
    for (int w = 1; w < GROUP_WARPS; w++)
        all = std::min(all, units_of[number * GROUP_WARPS + w].waited_for);
    while (!group->products.empty() && group->products.front().commit <= all) {
        group->products.pop_front();
        group->gone++;
    }
}

void wait_for_products(void *const lanes[32], unsigned) {
    int number = current->warp / GROUP_WARPS;
    warp_units *u = &units_of[current->warp];
    long newest = u->commit - 1 - *static_cast<const int *>(lanes[0]);
    do_products(number, newest);
    for (size_t i = 0; i < u->on_their_way.size();) {
        sums *s = &u->on_their_way[i];
        if (s->commit <= newest) {
            give_back_sums(s);
            u->on_their_way.erase(u->on_their_way.begin() + (long)i);
        } else {
            i++;
        }
    }
    u->waited_for = std::max(u->waited_for, newest);
    forget_products(number);
}

void commit_products(void *const *, unsigned) {
    units_of[current->warp].commit++;
    units_of[current->warp].is_fenced = false;
}

void fence_products(void *const *, unsigned) {
    units_of[current->warp].is_fenced = true;
}

void elect(void *const lanes[32], unsigned) {
    for (int l = 0; l < WARP; l++)
        *static_cast<bool *>(lanes[l]) = l == (now.descending ? WARP - 1 : 0);
}

struct row_and_pairs {
    void *row;
    uint32_t m[4];
};

void store_rows(void *const lanes[32], unsigned) {
    for (int l = 0; l < WARP; l++)
        for (int i = 0; i < 4; i++)
            memcpy(static_cast<char *>(static_cast<const row_and_pairs *>(lanes[i * 8 + l / 4])->row) + l % 4 * 4,
                   &static_cast<const row_and_pairs *>(lanes[l])->m[i], 4);
}

void check_aligned(const void *p, size_t bytes, const char *what) {
    if ((uintptr_t)p % bytes != 0)
        cuda_model_die(what);
}

} // namespace

/* ---- for the threads' side (model_threads.h) ---- */

void cuda_model::units_begin(unsigned turn) {
    the_mood = (mood)(turn % MOODS);
    chance_state = turn * 0x9E3779B97F4A7C15ull + 0x1234567;
    boxes.clear();
    for (warp_units &u : units_of) {
        u = warp_units();
        u.waited_for = -1;
    }
    for (group_units &group : groups)
        group = group_units();
}

bool cuda_model::units_hold_up(void) {
    return the_mood == NOW_AND_THEN && chance(2);
}

bool cuda_model::units_work(bool is_stuck) {
    bool any = false;
    for (size_t i = boxes.size(); the_mood == NOW_AND_THEN && i-- > 0;)
        if (chance(4)) {
            deliver_number(i);
            any = true;
        }
    if (is_stuck && !any && !boxes.empty()) {
        chance(1);
        deliver_number((size_t)((chance_state >> 20) % boxes.size()));
        any = true;
    }
    return any;
}

void cuda_model::units_end(void) {
    if (!boxes.empty())
        cuda_model_die("a block ended before its boxes had come");
    for (const warp_units &u : units_of)
        if (!u.on_their_way.empty())
            cuda_model_die("a block ended with products that nobody waited for");
}

void cuda_model::units_tell(char *text, size_t bytes) {
    for (int t = 0; t < now.thread_count; t++) {
        if (threads[t].state != WAITS_FOR_PHASE)
            continue;
        const block *b = &blocks[threads[t].block];
        const phase_barrier *barrier = static_cast<const phase_barrier *>(threads[t].awaited);
        snprintf(text, bytes, "thread %d of block %d of the cluster waits for ever at the barrier at %zu: %d of %d arrivals and "
                 "%lld bytes are missing in phase %d", t % now.block_threads, threads[t].block,
                 (size_t)((const unsigned char *)barrier - b->shared), (int)barrier->pending, (int)barrier->expected,
                 (long long)barrier->bytes, (int)barrier->parity);
        return;
    }
    snprintf(text, bytes, "%d threads wait for ever for others", now.live);
}

/* ---- words ---- */

void tensor_map_make(tensor_map *map, const void *data, int dims, const uint64_t *size, const uint64_t *stride,
                     const uint32_t *box) {
    bool is_right = dims >= 1 && dims <= MODEL_DIMS_MAX && (uintptr_t)data % 16 == 0 && box[0] == 64;
    *map = tensor_map();
    map->data = static_cast<const unsigned char *>(data);
    map->dims = dims;
    for (int i = 0; i < dims && is_right; i++) {
        map->size[i] = size[i];
        map->stride[i] = i > 0 ? stride[i - 1] : 0;
        map->box[i] = box[i];
        is_right = size[i] >= 1 && size[i] <= 1ull << 32 && box[i] >= 1 && box[i] <= 256 && map->stride[i] % 16 == 0 &&
                   map->stride[i] < 1ull << 40;
    }
    if (!is_right)
        cuda_model_die("a tensor that the copy engine cannot be told of");
}

uint32_t shared_address(const void *p) {
    return (uint32_t)current->block << RANK_SHIFT | (SHARED_BEGIN + place_in_block(p));
}

void barrier_init(uint64_t *barrier, int arrivals) {
    place_in_block(barrier);
    phase_barrier b = {};
    b.expected = b.pending = (uint64_t)arrivals & 0xFFFFF;
    memcpy(barrier, &b, sizeof b);
}

void barrier_arrive(uint64_t *barrier) {
    place_in_block(barrier);
    arrive(barrier_at(barrier));
}

void barrier_arrive_at(uint64_t *barrier, uint32_t rank) {
    if (rank >= (uint32_t)now.block_count)
        cuda_model_die("no such block in the cluster");
    check_is_there((int)rank);
    arrive(barrier_at((uint64_t *)(blocks[rank].shared + place_in_block(barrier))));
}

void barrier_arrive_expecting(uint64_t *barrier, uint32_t bytes) {
    place_in_block(barrier);
    expect(barrier_at(barrier), bytes);
    arrive(barrier_at(barrier));
}

void barrier_wait(uint64_t *barrier, uint32_t parity) {
    place_in_block(barrier);
    now.has_units = true;
    while (barrier_at(barrier)->parity == parity) {
        current->awaited = barrier;
        wait(WAITS_FOR_PHASE);
    }
}

uint32_t cluster_rank(void) {
    return (uint32_t)current->block;
}

void fence_for_engines(void) {
    blocks[current->block].unfenced -= !current->unfenced.empty();
    current->unfenced.clear();
}

void cuda_model_named_barrier(int number, int count, bool waits) {
    block *b = &blocks[current->block];
    if (number < 1 || number >= NAMED_MAX || count % WARP != 0)
        cuda_model_die("no such barrier of some of a block's threads");
    if (b->named[number].arrived == 0)
        b->named[number].threads = count;
    if (b->named[number].threads != count)
        cuda_model_die("threads that expect other numbers of each other at a barrier");
    now.has_units = true;
    if (++b->named[number].arrived < count) {
        if (waits) {
            current->awaited = &b->named[number];
            wait(WAITS_FOR_SOME);
        }
        return;
    }
    b->named[number].arrived = 0;
    for (int t = current->block * now.block_threads; t < (current->block + 1) * now.block_threads; t++)
        if (threads[t].state == WAITS_FOR_SOME && threads[t].awaited == &b->named[number])
            wake(&threads[t]);
}

bool elected(void) {
    bool is_it;
    cuda_model_meet(FULL_WARP, elect, &is_it);
    return is_it;
}

void cuda_model_bring(void *to, const void *map, uint64_t *barrier, int dims, const int *at, unsigned mask) {
    box b = {};
    uint32_t barrier_place = place_in_block(barrier);
    b.map = *static_cast<const tensor_map *>(map);
    if (b.map.dims != dims)
        cuda_model_die("a box of other dimensions than its tensor");
    check_aligned(to, 128, "a box whose place in shared memory is not aligned to 128");
    b.bytes = 128;
    for (int i = 0; i < dims; i++) {
        b.at[i] = at[i];
        b.bytes *= i > 0 ? b.map.box[i] : 1;
    }
    b.to = SHARED_BEGIN + place_in_block(to);
    if (mask == 0 || mask >> now.block_count != 0)
        cuda_model_die("a box for a block that is not of the cluster");
    for (int i = 0; i < now.block_count; i++) {
        if (!(mask >> i & 1))
            continue;
        b.block = i;
        b.barrier = (uint64_t *)(blocks[i].shared + barrier_place);
        send(b);
    }
}

void load_bytes(void *to, const void *from, uint64_t *barrier, uint32_t bytes) {
    box b = {};
    place_in_block(barrier);
    check_aligned(to, 16, "a copy to shared memory that is not aligned to 16");
    check_aligned(from, 16, "a copy from memory that is not aligned to 16");
    if (bytes == 0 || bytes % 16 != 0)
        cuda_model_die("a copy of bytes that are no sixteens");
    b.from = static_cast<const unsigned char *>(from);
    b.block = current->block;
    b.to = SHARED_BEGIN + place_in_block(to);
    b.bytes = bytes;
    b.barrier = barrier;
    send(b);
}

void store_matrices(void *row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
    row_and_pairs mine = {row, {m0, m1, m2, m3}};
    check_aligned(row, 16, "a row of a matrix in shared memory that is not aligned to 16");
    cuda_model_meet(FULL_WARP, store_rows, &mine);
}

void add_number(float *to, float x) {
    *to += x;
}

void add_pair(float *to, float x, float y) {
    check_aligned(to, 8, "a sum of two that is not aligned to 8");
    to[0] += x, to[1] += y;
}

void add_four(float *to, float4 x) {
    check_aligned(to, 16, "a sum of four that is not aligned to 16");
    to[0] += x.x, to[1] += x.y, to[2] += x.z, to[3] += x.w;
}

void matrices_begin(void) {
    cuda_model_meet(FULL_WARP, fence_products, nullptr);
}

void matrices_commit(void) {
    cuda_model_meet(FULL_WARP, commit_products, nullptr);
}

void cuda_model_multiply(struct cuda_model_product mine) {
    now.has_units = true;
    cuda_model_meet(FULL_WARP, ask_for_product, &mine);
}

void cuda_model_matrices_wait(int newest) {
    while (!are_asked_for(current->warp / GROUP_WARPS, units_of[current->warp].commit - 1 - newest))
        wait(WAITS_FOR_PRODUCTS);
    cuda_model_meet(FULL_WARP, wait_for_products, &newest);
}
