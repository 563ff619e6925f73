/* Instructions of sm_90a that product_sm90.cu is built from: barriers in shared memory, the engine that copies boxes of
 * tensors, products by a group of four warps. Source: PTX ISA 8.x, sections on mbarrier, cp.async.bulk.tensor, wgmma.
 * The same words on the model of a device: device/cuda/model_sm90.cuh. */
#pragma once

#include "device/cuda/language.cuh"

/* A matrix of bf16 in shared memory, `offset` bytes from an address on, in rows of 128 bytes, of which the 16-byte chunks of row r
 * are swapped by r % 8. `far`: bytes from 8 rows to the next 8; `wide`: from 64 columns to the next 64, where rows run along the
 * inner dimension. All but the address is known when this is compiled, so that of matrices beside each other each takes one
 * addition: sixteenths of shared memory have 14 bits, nothing is carried out of them. Of an address only its low 18 bits are
 * where it lies in the block's own memory: from bit 24 on stands which block of the cluster that is. */
static __device__ __forceinline__ constexpr uint64_t matrix_at(uint32_t address, uint32_t offset, uint32_t wide, uint32_t far) {
    uint32_t low = ((address & 0x3FFFFu) >> 4) + ((offset >> 4) + (wide >> 4 << 16)), high = far >> 4 | 1u << 30;
    return (uint64_t)high << 32 | low;
}
static_assert(matrix_at(0x1000400, 0x4000, 8192, 1024) == 0x4000004002000440, "whichever block of the cluster");

/* The same for all lanes, and known to be: what the copy engine is asked with then needs no loop over the lanes. */
static __device__ __forceinline__ int uniform(int x) {
    return __shfl_sync(FULL_WARP, x, 0);
}

#ifdef CADRE_CUDA_MODEL
#include "device/cuda/model_sm90.cuh"
#else

static __device__ __forceinline__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* ---- barriers ---- */

static __device__ __forceinline__ void barrier_init(uint64_t *barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

static __device__ __forceinline__ void barrier_arrive(uint64_t *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(shared_address(barrier)) : "memory");
}

/* At the same barrier of block `rank` of the cluster. */
static __device__ __forceinline__ void barrier_arrive_at(uint64_t *barrier, uint32_t rank) {
    asm volatile("{ .reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there]; }"
                 : : "r"(shared_address(barrier)), "r"(rank) : "memory");
}

/* An arrival at a phase that ends when so many bytes more are there, too. */
static __device__ __forceinline__ void barrier_arrive_expecting(uint64_t *barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(shared_address(barrier)), "r"(bytes) : "memory");
}

static __device__ __forceinline__ void barrier_wait(uint64_t *barrier, uint32_t parity) {
    asm volatile("{ .reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra over;\n"
                 "bra again;\n"
                 "over: }"
                 : : "r"(shared_address(barrier)), "r"(parity) : "memory");
}

static __device__ __forceinline__ uint32_t cluster_rank(void) {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

static __device__ __forceinline__ void cluster_sync(void) {
    asm volatile("barrier.cluster.arrive.release.aligned;\n"
                 "barrier.cluster.wait.acquire.aligned;" : : : "memory");
}

static __device__ __forceinline__ void barriers_are_initialized(void) {
    asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
}

/* What this thread wrote to shared memory may be read by the matrix units and the copy engine. */
static __device__ __forceinline__ void fence_for_engines(void) {
    asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
}

/* All threads of `threads`, a barrier for each number but 0. */
template <int number, int threads> static __device__ __forceinline__ void group_sync(void) {
    asm volatile("bar.sync %0, %1;" : : "n"(number), "n"(threads) : "memory");
}

/* The threads of a group of four warps keep so many registers, or get so many. */
template <int count> static __device__ __forceinline__ void registers_keep(void) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(count));
}

template <int count> static __device__ __forceinline__ void registers_get(void) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(count));
}

/* ---- one warp as one ---- */

/* One lane of a warp that is whole. */
static __device__ __forceinline__ bool elected(void) {
    uint32_t is_it;
    asm volatile("{ .reg .pred it;\n"
                 "elect.sync _|it, 0xFFFFFFFF;\n"
                 "selp.u32 %0, 1, 0, it; }" : "=r"(is_it));
    return is_it;
}

/* ---- boxes of tensors: coordinates fastest first ---- */

static __device__ __forceinline__ void load_box_2d(void *to, const void *map, uint64_t *barrier, int c0, int c1) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 : : "r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1) : "memory");
}

/* To the same place in every block of the cluster that `mask` names, and to its barrier. */
static __device__ __forceinline__ void share_box_2d(void *to, const void *map, uint64_t *barrier, int c0, int c1, uint16_t mask) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%3, %4}], [%2], %5;"
                 : : "r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "h"(mask) : "memory");
}

static __device__ __forceinline__ void share_box_3d(void *to, const void *map, uint64_t *barrier, int c0, int c1, int c2,
                                                    uint16_t mask) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%3, %4, %5}], [%2], %6;"
                 : : "r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "h"(mask)
                 : "memory");
}

static __device__ __forceinline__ void load_box_3d(void *to, const void *map, uint64_t *barrier, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 : : "r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2) : "memory");
}

/* The way back of load_matrices: lane l names row l % 8 of matrix l / 8 in shared memory. */
static __device__ __forceinline__ void store_matrices(void *row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 : : "r"(shared_address(row)), "r"(m0), "r"(m1), "r"(m2), "r"(m3) : "memory");
}

/* The line of memory that `p` is in, into the second-level cache. */
static __device__ __forceinline__ void ask_for(const void *p) {
    asm volatile("prefetch.global.L2 [%0];" : : "l"(p));
}

/* ---- sums in memory ---- */

static __device__ __forceinline__ void add_number(float *to, float x) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" : : "l"(to), "f"(x) : "memory");
}

/* Aligned to 16. */
static __device__ __forceinline__ void add_four(float *to, float4 x) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                 : : "l"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
}

/* Aligned to 8. */
static __device__ __forceinline__ void add_pair(float *to, float x, float y) {
    asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" : : "l"(to), "f"(x), "f"(y) : "memory");
}

/* ---- products by a warp group ---- */

static __device__ __forceinline__ void matrices_begin(void) {
    asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
}

static __device__ __forceinline__ void matrices_commit(void) {
    asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
}

template <int newest> static __device__ __forceinline__ void matrices_wait(void) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(newest) : "memory");
}

#define ACC4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ACC8(d, i) ACC4(d, i), ACC4(d, i + 4)
#define ACC32(d, i) ACC8(d, i), ACC8(d, i + 8), ACC8(d, i + 16), ACC8(d, i + 24)

/* d [64,256] = a [64,16] b [16,256], or +=. turned: rows in shared memory run along the inner dimension. */
template <int turned_a, int turned_b>
static __device__ __forceinline__ void multiply_64x256(float d[128], uint64_t a, uint64_t b, int accumulate) {
    asm volatile("{ .reg .pred add;\n"
                 "setp.ne.b32 add, %130, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
                 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
                 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
                 "%128, %129, add, 1, 1, %131, %132; }"
                 : ACC32(d, 0), ACC32(d, 32), ACC32(d, 64), ACC32(d, 96)
                 : "l"(a), "l"(b), "r"(accumulate), "n"(turned_a), "n"(turned_b));
}

#endif
