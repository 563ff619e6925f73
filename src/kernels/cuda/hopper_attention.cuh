/* Instructions of sm_90a that attention_sm90.cu needs beside those of hopper.cuh: products with 64 and 128 columns, left
 * operands from registers or from shared memory, boxes of tensors of four dimensions, barriers of some of a block's warps. */
#pragma once

#include "kernels/cuda/hopper.cuh"

#ifdef CADRE_CUDA_MODEL

static inline void await(uint64_t *barrier, uint32_t parity) {
    barrier_wait(barrier, parity);
}

#else

/* ---- barriers ---- */

/* Built with CADRE_CUDA_TRAP, who waits for seconds stops the program: an error in the place of a device that hangs. */
static __device__ __forceinline__ void await(uint64_t *barrier, uint32_t parity) {
#ifdef CADRE_CUDA_TRAP
    asm volatile("{ .reg .pred done, late;\n"
                 ".reg .b32 polls, nowhere;\n"
                 "mov.b32 polls, 0;\n"
                 "mov.b32 nowhere, 0xFFFFFFF0;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "add.u32 polls, polls, 1;\n"
                 "setp.gt.u32 late, polls, 0x100000;\n"
                 "@late st.shared.b32 [nowhere], polls;\n" /* trap itself would make the compiler wait for products */
                 "@done bra over;\n"
                 "bra again;\n"
                 "over: }"
                 : : "r"(shared_address(barrier)), "r"(parity) : "memory");
#else
    barrier_wait(barrier, parity);
#endif
}

/* Two groups of four warps take turns: a turn begins when one waits for it and the other has given it. */
static __device__ __forceinline__ void turn_wait(int number) {
    asm volatile("bar.sync %0, 256;" : : "r"(number) : "memory");
}

static __device__ __forceinline__ void turn_give(int number) {
    asm volatile("bar.arrive %0, 256;" : : "r"(number) : "memory");
}

/* ---- copies ---- */

static __device__ __forceinline__ void load_box_4d(void *to, const void *map, uint64_t *barrier, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
                 : : "r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}

/* Both sides and the size aligned to 16. */
static __device__ __forceinline__ void load_bytes(void *to, const void *from, uint64_t *barrier, uint32_t bytes) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %3, [%2];"
                 : : "r"(shared_address(to)), "l"(from), "r"(shared_address(barrier)), "r"(bytes) : "memory");
}

static __device__ __forceinline__ void ask_for_map(const void *map) {
    asm volatile("prefetch.tensormap [%0];" : : "l"(map) : "memory");
}

/* ---- products by a warp group ---- */

/* Sums stay where they are while products run that the compiler does not see the end of. */
template <int count> static __device__ __forceinline__ void pin(float *d) {
#pragma unroll
    for (int i = 0; i < count; i++)
        asm volatile("" : "+f"(d[i]) : : "memory");
}

#define SUMS_32                                                                                        \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                          \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define SUMS_64                                                                                        \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                          \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                 \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                 \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "

/* d [64,64] or [64,128] = a [64,16] b [16,...], or +=; rows of both in shared memory run across the inner dimension. */
static __device__ __forceinline__ void multiply_shared(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
    asm volatile("{ .reg .pred add;\n"
                 "setp.ne.b32 add, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SUMS_32 "%32, %33, add, 1, 1, 0, 0; }"
                 : ACC32(d, 0) : "l"(a), "l"(b), "r"(accumulate));
}

static __device__ __forceinline__ void multiply_shared(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
    asm volatile("{ .reg .pred add;\n"
                 "setp.ne.b32 add, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " SUMS_64 "%64, %65, add, 1, 1, 0, 0; }"
                 : ACC32(d, 0), ACC32(d, 32) : "l"(a), "l"(b), "r"(accumulate));
}

/* d += a [16,64]^T b [16,...]; rows of both in shared memory run along the inner dimension. */
static __device__ __forceinline__ void multiply_turned(float (&d)[32], uint64_t a, uint64_t b) {
    asm volatile("{ .reg .pred add;\n"
                 "setp.eq.b32 add, 0, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SUMS_32 "%32, %33, add, 1, 1, 1, 1; }"
                 : ACC32(d, 0) : "l"(a), "l"(b));
}

static __device__ __forceinline__ void multiply_turned(float (&d)[64], uint64_t a, uint64_t b) {
    asm volatile("{ .reg .pred add;\n"
                 "setp.eq.b32 add, 0, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " SUMS_64 "%64, %65, add, 1, 1, 1, 1; }"
                 : ACC32(d, 0), ACC32(d, 32) : "l"(a), "l"(b));
}

/* d += a b, where lane l of warp w has of a, in pairs, rows 16 w + l / 4 and + 8 of columns 2 (l % 4) and the next, then of
 * columns + 8; rows of b in shared memory run along the inner dimension. */
static __device__ __forceinline__ void multiply_registers(float (&d)[32], const uint32_t *a, uint64_t b) {
    asm volatile("{ .reg .pred add;\n"
                 "setp.eq.b32 add, 0, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SUMS_32 "{%32, %33, %34, %35}, %36, add, 1, 1, 1; }"
                 : ACC32(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

static __device__ __forceinline__ void multiply_registers(float (&d)[64], const uint32_t *a, uint64_t b) {
    asm volatile("{ .reg .pred add;\n"
                 "setp.eq.b32 add, 0, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " SUMS_64 "{%64, %65, %66, %67}, %68, add, 1, 1, 1; }"
                 : ACC32(d, 0), ACC32(d, 32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#endif
