/* CUDA C as the kernels of this project are written in it: what the compiler for the device gives, and the same words on a
 * model of a device that runs on the processor (model.cuh, for Hopper's own instructions model_sm90.cuh), so that every
 * kernel is tested where no device is.
 *
 * Both forms know: __global__, __device__, threadIdx, blockIdx, blockDim, gridDim, __syncthreads, __syncwarp, __shfl_sync,
 * __shfl_xor_sync, __shfl_up_sync, __shfl_down_sync, __ballot_sync, __match_any_sync, __popc, __ffs, atomicAdd (int,
 * unsigned, float), atomicMax (int), __threadfence, dim3, float2, float4, uint2, uint4, int4, float's intrinsics (__expf,
 * __logf, rsqrtf, __fmul_rn, __fadd_rn, __fsub_rn, __fdiv_rn), and what stands below. Lanes that take part in a warp's
 * operation are all 32 of it (FULL_WARP), or those of its mask; nobody has returned before.
 *
 *   CUDA_SHARED float rows[32];          shared memory of a block
 *   CUDA_SHARED_DYNAMIC(float, rows);    the same, as much as the launch says, aligned to 16 (1024 on sm_90 where asked)
 *   CUDA_LAUNCH((kernel<float>), grid, block, shared_bytes, arguments...);   on the stream of the device
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef CADRE_CUDA_MODEL
#include "device/cuda/model.cuh"
#else

#include <cuda_runtime.h>

#define CUDA_SHARED __shared__
#define CUDA_SHARED_DYNAMIC(type, name)                    \
    extern __shared__ __align__(1024) unsigned char cuda_shared_bytes[]; \
    type *name = (type *)cuda_shared_bytes

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CUDA_IS_SM90
#endif

/* Checks the launch itself; what a kernel does wrong later is found by the next call that waits. */
#define CUDA_LAUNCH(kernel, grid, block, shared_bytes, ...)                                             \
    do {                                                                                                \
        if ((size_t)(shared_bytes) > SHARED_UNASKED)                                                    \
            cuda_allow_shared((const void *)(kernel), (size_t)(shared_bytes), #kernel);                 \
        kernel<<<grid, block, shared_bytes, (cudaStream_t)cuda_stream()>>>(__VA_ARGS__);                \
        cuda_check(cudaGetLastError(), #kernel);                                                        \
    } while (0)

/* Of a kernel with Hopper's own instructions, in clusters of so many blocks, as its __cluster_dims__ says. */
#define CUDA_LAUNCH_SM90(cluster, ...) CUDA_LAUNCH(__VA_ARGS__)

extern "C" void cuda_fail(int error, const char *what);
extern "C" void *cuda_stream(void);

/* A block has 48 KiB, static and dynamic together, unless the kernel was allowed more. */
enum { SHARED_UNASKED = 32 << 10 };
extern "C" void cuda_allow_shared(const void *kernel, size_t bytes, const char *what);

static inline void cuda_check(cudaError_t error, const char *what) {
    if (error != cudaSuccess)
        cuda_fail((int)error, what);
}

/* ---- matrix units, from sm_80 on --------------------------------------------------------------------------------- */

/* d [16,8] += a [16,16] b [16,8], bf16 operands in pairs, f32 sums, by the 32 lanes of a warp. Lane l, r = l / 4, c = l % 4:
 * a[0] = A[r][2c..2c+1], a[1] = A[r+8][2c..], a[2] = A[r][2c+8..], a[3] = A[r+8][2c+8..];
 * b[0] = B[2c..2c+1][r], b[1] = B[2c+8..2c+9][r];  d[0..1] = D[r][2c..2c+1], d[2..3] = D[r+8][2c..2c+1]. */
static __device__ __forceinline__ void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* Four 8x8 matrices of 16-bit numbers from shared memory: lane l names a row of 16 bytes, row l % 8 of matrix l / 8;
 * r[i] of lane l is elements 2 (l % 4) and the next of row l / 4 of matrix i; transposed: of the transpose. */
static __device__ __forceinline__ void load_matrices(uint32_t r[4], const void *row) {
    uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

static __device__ __forceinline__ void load_matrices_transposed(uint32_t r[4], const void *row) {
    uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

/* 16 bytes from global to shared memory, both aligned to 16, without passing registers; the first `bytes` of them, 0..16,
 * the others become 0. Copies since the last commit are a group; wait<n> until all but the n newest groups are there, for
 * this thread. */
static __device__ __forceinline__ void copy_async(void *shared, const void *global, int bytes) {
    uint32_t address = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(address), "l"(global), "r"(bytes) : "memory");
}

static __device__ __forceinline__ void copy_async_commit(void) {
    asm volatile("cp.async.commit_group;" : : : "memory");
}

template <int newest> static __device__ __forceinline__ void copy_async_wait(void) {
    asm volatile("cp.async.wait_group %0;" : : "n"(newest) : "memory");
}

#endif

enum { WARP = 32 };
#define FULL_WARP 0xFFFFFFFFu
