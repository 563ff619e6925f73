/* The model of a device: fibers, the order in which they run, and what they do together (model.cuh). */
#include "device/cuda/model_threads.h"

#include "device/cuda/model_sm90.cuh"

#include <mutex>
#include <set>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx, blockDim, gridDim;
unsigned char *cuda_model_shared;

#if defined(__x86_64__)
extern "C" void cuda_model_switch(void **save, void *to);
asm(R"(
.text
.type cuda_model_switch, @function
cuda_model_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cuda_model_switch, .-cuda_model_switch
)");
#endif

namespace cuda_model {

/* Somewhere to go on: a fiber, or the thread that launched. */
struct place {
    unsigned char *stack; /* NULL: the launching thread's own */
    size_t stack_bytes;
    void *fake_stack; /* of the sanitizer */
#if defined(__x86_64__)
    void *sp;
#else
    ucontext_t context;
#endif
};

thread threads[THREADS_MAX];
block blocks[BLOCKS_MAX];
running now;
thread *current;

} // namespace cuda_model

using namespace cuda_model;

namespace {

/* What a block has on every device from compute capability 8.0 on is 99 KiB, of which static arrays (a model's do not lie there)
 * get one; on Hopper it is 227. */
enum { PAGE = 4096, SHARED_MAX = 98 * 1024, SHARED_MAX_SM90 = 227 * 1024, SHARED_SPACE = 228 * 1024 };
#ifdef __SANITIZE_ADDRESS__
enum { STACK_BYTES = 256 * 1024 };
#else
enum { STACK_BYTES = 128 * 1024 };
#endif

/* Lanes that wait for the others of their mask. */
struct meeting {
    unsigned mask, arrived;
    cuda_model_action act;
    void *brought[WARP];
};

struct warp {
    unsigned runnable; /* lanes that wait no longer */
    unsigned later;    /* that stand back until the other warps have had their turn */
    int meeting_count;
    meeting meetings[WARP];
};

warp warps[WARPS_MAX];
place launcher;
place fibers[THREADS_MAX];
int fiber_count;
std::vector<place *> idle; /* fibers */
std::set<const char *> names; /* of the kernels that have run */
std::mutex one_launch;
unsigned turn;

/* ---- fibers ---- */

inline void arrived_at(place *here, place *from) {
#ifdef __SANITIZE_ADDRESS__
    const void *bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(here->fake_stack, &bottom, &bytes);
    if (from == &launcher) {
        launcher.stack = (unsigned char *)const_cast<void *>(bottom);
        launcher.stack_bytes = bytes;
    }
#else
    (void)here, (void)from;
#endif
}

inline void go(place *from, place *to) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from->fake_stack, to->stack, to->stack_bytes);
#endif
#if defined(__x86_64__)
    cuda_model_switch(&from->sp, to->sp);
#else
    swapcontext(&from->context, &to->context);
#endif
    arrived_at(from, from == &launcher ? nullptr : &launcher);
}

void release_barrier(int of) {
    for (int t = of * now.block_threads; t < (of + 1) * now.block_threads; t++)
        if (threads[t].state == WAITS_FOR_BLOCK)
            wake(&threads[t]);
    blocks[of].at_barrier = 0;
}

void release_cluster() {
    for (int t = 0; t < now.thread_count; t++)
        if (threads[t].state == WAITS_FOR_CLUSTER)
            wake(&threads[t]);
    now.at_barrier = 0;
}

void go_on_as(thread *t) {
    current = t;
    threadIdx = t->index;
    blockIdx = blocks[t->block].index;
    cuda_model_shared = blocks[t->block].shared;
}

void start(place *fiber) {
    int id = now.descending ? now.thread_count - 1 - now.next : now.next;
    now.next++;
    thread *t = &threads[id];
    t->block = id / now.block_threads;
    unsigned i = (unsigned)(id % now.block_threads);
    t->state = RUNS;
    t->index = uint3{i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    t->warp = id / WARP;
    t->lane = id % WARP;
    t->fiber = fiber;
    t->group = 0;
    t->copies.clear();
    t->unfenced.clear();
    go_on_as(t);
}

void end() {
    block *b = &blocks[current->block];
    current->state = ENDED;
    now.live--;
    b->live--;
    if (b->at_barrier > 0 && b->at_barrier == b->live)
        release_barrier(current->block);
    if (now.at_barrier > 0 && now.at_barrier == now.live)
        release_cluster();
}

/* A fiber runs one thread after the other as long as they end without waiting. */
void fiber_main(place *fiber) {
    arrived_at(fiber, &launcher);
    for (;;) {
        do {
            start(fiber);
            now.body(now.arguments);
            end();
        } while (now.next < now.limit);
        idle.push_back(fiber);
        go(fiber, &launcher);
    }
}

place *new_fiber;

void fiber_entry() {
    fiber_main(new_fiber);
}

place *fiber_make() {
    if (fiber_count == THREADS_MAX)
        cuda_model_die("more fibers than threads of a block");
    place *fiber = &fibers[fiber_count++];
    void *stack = mmap(nullptr, STACK_BYTES + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED || mprotect(stack, PAGE, PROT_NONE) != 0)
        cuda_model_die("no memory for the stacks of a block");
    fiber->stack = (unsigned char *)stack + PAGE;
    fiber->stack_bytes = STACK_BYTES;
#if defined(__x86_64__)
    void **top = (void **)(fiber->stack + STACK_BYTES);
    *--top = nullptr; /* a return address: the stack is where a call leaves it */
    *--top = (void *)fiber_entry;
    top -= 6;
    fiber->sp = top;
#else
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&fiber->context, fiber_entry, 0);
#endif
    return fiber;
}

place *fiber_take() {
    if (idle.empty()) {
        new_fiber = fiber_make(); /* it looks here when it first runs, at once */
        return new_fiber;
    }
    place *fiber = idle.back();
    idle.pop_back();
    return fiber;
}

} // namespace

void cuda_model::wait(enum state state) {
    thread *me = current;
    me->state = state;
    go(me->fiber, &launcher);
}

void cuda_model::stand_back(void) {
    warps[current->warp].later |= 1u << current->lane;
    go(current->fiber, &launcher);
}

void cuda_model::wake(thread *t) {
    t->state = RUNS;
    warps[t->warp].runnable |= 1u << t->lane;
}

namespace {

/* ---- blocks ---- */

/* Starts what of a warp has not started and lets it run until none of its lanes can go on. True when any did. */
bool run_warp(int w) {
    bool any = false;
    while (now.next < now.limit) {
        go(&launcher, fiber_take());
        any = true;
    }
    while (warps[w].runnable) {
        any = true;
        unsigned lanes = warps[w].runnable;
        warps[w].runnable = 0;
        while (lanes) {
            int lane = now.descending ? 31 - __builtin_clz(lanes) : __builtin_ctz(lanes);
            lanes &= ~(1u << lane);
            go_on_as(&threads[w * WARP + lane]);
            go(&launcher, current->fiber);
        }
    }
    warps[w].runnable = warps[w].later;
    warps[w].later = 0;
    return any;
}

[[noreturn]] void deadlock() {
    char text[160];
    for (int w = 0; w < WARPS_MAX && w * WARP < now.thread_count; w++)
        if (warps[w].meeting_count > 0) {
            const meeting *m = &warps[w].meetings[0];
            current = nullptr;
            snprintf(text, sizeof text, "warp %d waits for ever: lanes %08x were named, %08x came", w, m->mask, m->arrived);
            cuda_model_die(text);
        }
    current = nullptr;
    if (now.has_units)
        units_tell(text, sizeof text);
    else
        snprintf(text, sizeof text, "%d of %d threads wait for ever at a barrier", blocks[0].at_barrier, now.live);
    cuda_model_die(text);
}

/* Warp after warp as far as it goes, in the order of the turn. True when any did. */
bool run_warps() {
    int warp_count = (now.thread_count + WARP - 1) / WARP;
    bool any = false;
    for (int i = 0; i < warp_count; i++) {
        int w = now.descending ? warp_count - 1 - i : i;
        if (now.limit < now.thread_count) {
            int ragged = now.thread_count % WARP; /* the last warp, which comes first in descending order */
            now.limit += now.descending && i == 0 && ragged ? ragged : WARP;
            now.limit = now.limit < now.thread_count ? now.limit : now.thread_count;
        } else if (now.has_units && warps[w].runnable && units_hold_up()) {
            any = true;
            continue;
        }
        any |= run_warp(w);
    }
    return any;
}

void run_blocks() {
    now.thread_count = now.live = now.block_count * now.block_threads;
    now.at_barrier = now.next = now.limit = 0;
    now.has_units = false;
    for (int i = 0; i < now.block_count; i++) {
        blocks[i].live = now.block_threads;
        blocks[i].at_barrier = blocks[i].unfenced = 0;
        memset(blocks[i].named, 0, sizeof blocks[i].named);
    }
    if (now.is_sm90)
        units_begin(turn);
    while (now.live > 0) {
        bool any = run_warps();
        if (!(now.has_units && units_work(!any)) && !any)
            deadlock();
    }
    current = nullptr;
    if (now.is_sm90)
        units_end();
}

/* `bytes` of shared memory for a block of the cluster, NaN, aligned to 1024, and as few as can be behind them before what may not
 * be touched. */
unsigned char *shared_memory(int of, size_t bytes) {
    static unsigned char *spaces[BLOCKS_MAX];
    unsigned char *&space = spaces[of];
    if (!space) {
        void *data = mmap(nullptr, SHARED_SPACE + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (data == MAP_FAILED || mprotect((char *)data + SHARED_SPACE, PAGE, PROT_NONE) != 0)
            cuda_model_die("no memory for shared memory");
        space = (unsigned char *)data;
    }
    size_t whole = (bytes + 1023) / 1024 * 1024;
    memset(space + SHARED_SPACE - whole, 0xFF, whole);
    return space + SHARED_SPACE - whole;
}

/* cluster: 0 where the kernel takes nothing of Hopper's own. */
void check_launch(dim3 grid, dim3 block, int cluster, size_t shared_bytes) {
    uint64_t count = (uint64_t)block.x * block.y * block.z;
    if (count == 0 || count > THREADS_MAX || block.z > 64)
        cuda_model_die("no device takes blocks of that many threads");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535)
        cuda_model_die("no device takes a grid of that many blocks");
    if (cluster > BLOCKS_MAX || (cluster > 1 && (grid.x % (unsigned)cluster != 0 || count % WARP != 0)))
        cuda_model_die("clusters that do not divide the grid, or are larger than the model's");
    if (cluster > 1 && count * (unsigned)cluster > THREADS_MAX)
        cuda_model_die("the model has not that many threads for a cluster");
    if (shared_bytes > (cluster > 0 ? SHARED_MAX_SM90 : SHARED_MAX))
        cuda_model_die("no device has that much shared memory for a block");
}

} // namespace

[[noreturn]] void cuda_model_die(const char *what) {
    fprintf(stderr, "device model: %s, block %u,%u,%u", now.kernel ? now.kernel : "no kernel", blockIdx.x, blockIdx.y, blockIdx.z);
    if (current)
        fprintf(stderr, ", thread %u,%u,%u", threadIdx.x, threadIdx.y, threadIdx.z);
    fprintf(stderr, ": %s\n", what);
    abort();
}

static void run_cluster(uint3 first, size_t shared_bytes) {
    now.descending = (turn + first.x / (unsigned)now.block_count + first.y + first.z) % 2;
    for (int i = 0; i < now.block_count; i++) {
        blocks[i].index = uint3{first.x + (unsigned)i, first.y, first.z};
        blocks[i].shared = shared_memory(i, shared_bytes);
        blocks[i].shared_bytes = shared_bytes;
    }
    run_blocks();
    for (int i = 0; i < now.block_count; i++)
        for (size_t at = shared_bytes; at % 1024; at++)
            if (blocks[i].shared[at] != 0xFF)
                cuda_model_die("wrote behind its shared memory");
}

void cuda_model_run(const char *kernel, dim3 grid, dim3 size, int cluster, size_t shared_bytes, void (*body)(void *),
                    void *arguments) {
    std::lock_guard<std::mutex> lock(one_launch);
    cuda_model_arrive();
    now.kernel = kernel;
    names.insert(kernel);
    now.body = body;
    now.arguments = arguments;
    current = nullptr;
    blockIdx = uint3{0, 0, 0};
    check_launch(grid, size, cluster, shared_bytes);
    now.block_threads = (int)(size.x * size.y * size.z);
    now.block_count = cluster > 0 ? cluster : 1;
    now.is_sm90 = cluster > 0;
    gridDim = uint3{grid.x, grid.y, grid.z};
    blockDim = uint3{size.x, size.y, size.z};
    turn++;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x += (unsigned)now.block_count)
                run_cluster(uint3{x, y, z}, shared_bytes);
    now.kernel = nullptr;
}

/* device_cuda.h */
extern "C" bool cuda_model_ran(const char *word) {
    std::lock_guard<std::mutex> lock(one_launch);
    for (const char *name : names)
        if (strstr(name, word))
            return true;
    return false;
}

void __syncthreads(void) {
    block *b = &blocks[current->block];
    if (++b->at_barrier == b->live)
        release_barrier(current->block);
    else
        wait(WAITS_FOR_BLOCK);
}

void cluster_sync(void) {
    if (++now.at_barrier == now.live)
        release_cluster();
    else
        wait(WAITS_FOR_CLUSTER);
}

unsigned cuda_model_lane(void) {
    return (unsigned)current->lane;
}

void cuda_model_meet(unsigned mask, cuda_model_action act, void *mine) {
    thread *me = current;
    warp *w = &warps[me->warp];
    if (!(mask >> me->lane & 1))
        cuda_model_die("a lane that is not in its own mask");
    meeting *m = nullptr;
    for (int i = 0; i < w->meeting_count && !m; i++)
        if (w->meetings[i].mask == mask)
            m = &w->meetings[i];
    if (!m) {
        m = &w->meetings[w->meeting_count++];
        m->mask = mask;
        m->arrived = 0;
        m->act = act;
    }
    if (m->act != act)
        cuda_model_die("lanes of one warp at different operations");
    m->brought[me->lane] = mine;
    m->arrived |= 1u << me->lane;
    if (m->arrived != mask) {
        wait(WAITS_FOR_WARP);
        return;
    }
    act(m->brought, mask);
    for (unsigned others = mask & ~(1u << me->lane); others; others &= others - 1)
        threads[me->warp * WARP + __builtin_ctz(others)].state = RUNS;
    w->runnable |= mask & ~(1u << me->lane);
    *m = w->meetings[--w->meeting_count];
}

/* ---- copies ---- */

static bool aligned_to_16(const void *p) {
    return (uintptr_t)p % 16 == 0;
}

void copy_async(void *shared, const void *global, int bytes) {
    if (!aligned_to_16(shared) || !aligned_to_16(global))
        cuda_model_die("a copy to shared memory that is not aligned to 16");
    if (bytes < 0 || bytes > 16)
        cuda_model_die("a copy to shared memory of other than 0 to 16 bytes");
    memset(shared, 0xFF, 16);
    current->copies.push_back(copy{shared, global, bytes, current->group});
}

void copy_async_commit(void) {
    current->group++;
}

void cuda_model_copy_wait(int newest) {
    std::vector<copy> &copies = current->copies;
    size_t kept = 0;
    for (size_t i = 0; i < copies.size(); i++) {
        const copy c = copies[i];
        if (c.group >= current->group - newest) {
            copies[kept++] = c;
            continue;
        }
        memset(c.to, 0, 16);
        memcpy(c.to, c.from, (size_t)c.bytes);
        if (now.is_sm90) {
            blocks[current->block].unfenced += current->unfenced.empty();
            current->unfenced.push_back(c.to);
        }
    }
    copies.resize(kept);
}

/* ---- matrices ---- */

namespace {

float from_bf16(uint32_t bits) {
    return cuda_model_bits<float>((bits & 0xFFFF) << 16);
}

struct multiply {
    float *d;
    const uint32_t *a, *b;
};

/* sum = a b, without sanitizers: all arrays are the model's own, and much of its time goes here. */
MODEL_ARITHMETIC void multiply_16x8x16(const float a[16][16], const float b[16][8], float sum[16][8]) {
    for (int i = 0; i < 16; i++) {
        float row[8] = {};
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 8; j++)
                row[j] += a[i][k] * b[k][j];
        for (int j = 0; j < 8; j++)
            sum[i][j] = row[j];
    }
}

void multiply_tiles(void *const lanes[32], unsigned) {
    float a[16][16], b[16][8];
    for (int l = 0; l < WARP; l++) {
        const multiply *m = static_cast<const multiply *>(lanes[l]);
        int r = l / 4, c = l % 4 * 2;
        for (int half = 0; half < 2; half++) {
            a[r][c + half] = from_bf16(m->a[0] >> 16 * half);
            a[r + 8][c + half] = from_bf16(m->a[1] >> 16 * half);
            a[r][c + 8 + half] = from_bf16(m->a[2] >> 16 * half);
            a[r + 8][c + 8 + half] = from_bf16(m->a[3] >> 16 * half);
            b[c + half][r] = from_bf16(m->b[0] >> 16 * half);
            b[c + 8 + half][r] = from_bf16(m->b[1] >> 16 * half);
        }
    }
    float sum[16][8];
    multiply_16x8x16(a, b, sum);
    for (int l = 0; l < WARP; l++) {
        float *d = static_cast<const multiply *>(lanes[l])->d;
        int r = l / 4, c = l % 4 * 2;
        d[0] += sum[r][c];
        d[1] += sum[r][c + 1];
        d[2] += sum[r + 8][c];
        d[3] += sum[r + 8][c + 1];
    }
}

struct load {
    uint32_t *r;
    const void *row;
};

void load_rows(void *const lanes[32], unsigned) {
    for (int l = 0; l < WARP; l++)
        for (int i = 0; i < 4; i++)
            memcpy(&static_cast<const load *>(lanes[l])->r[i],
                   static_cast<const char *>(static_cast<const load *>(lanes[i * 8 + l / 4])->row) + l % 4 * 4, 4);
}

void load_columns(void *const lanes[32], unsigned) {
    for (int l = 0; l < WARP; l++)
        for (int i = 0; i < 4; i++)
            for (int half = 0; half < 2; half++)
                memcpy(reinterpret_cast<char *>(&static_cast<const load *>(lanes[l])->r[i]) + 2 * half,
                       static_cast<const char *>(static_cast<const load *>(lanes[i * 8 + l % 4 * 2 + half])->row) + l / 4 * 2, 2);
}

} // namespace

void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    multiply mine = {d, a, b};
    cuda_model_meet(FULL_WARP, multiply_tiles, &mine);
}

void load_matrices(uint32_t r[4], const void *row) {
    if (!aligned_to_16(row))
        cuda_model_die("a row of a matrix in shared memory that is not aligned to 16");
    load mine = {r, row};
    cuda_model_meet(FULL_WARP, load_rows, &mine);
}

void load_matrices_transposed(uint32_t r[4], const void *row) {
    if (!aligned_to_16(row))
        cuda_model_die("a row of a matrix in shared memory that is not aligned to 16");
    load mine = {r, row};
    cuda_model_meet(FULL_WARP, load_columns, &mine);
}
