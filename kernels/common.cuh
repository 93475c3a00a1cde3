// What every kernel shares: bf16 storage, conversions, warp sums and the PTX instructions behind small functions. With
// TRIREME_EMULATE the same names run on the CPU (emulate.h). Knows nothing of any operation.
#pragma once

// 16 bits of storage; arithmetic is f32.
struct bf16 {
    unsigned short bits;
};

#ifdef TRIREME_EMULATE
#include "emulate.h"
#else
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

// Two values rounded to nearest even; `low` in the low half.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

__device__ __forceinline__ unsigned shared_address(const void* at) { return (unsigned)__cvta_generic_to_shared(at); }

// d[16,8] += a[16,16] b[16,8]
__device__ __forceinline__ void mma_m16n8k16_bf16(float d[4], const unsigned a[4], const unsigned b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(unsigned r[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned r[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// 16 bytes from global to shared memory, both aligned to 16, not waited for.
__device__ __forceinline__ void cp_async_16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// 16 aligned bytes that this kernel reads once and nobody writes meanwhile: past the L1 cache, which is left to what is read again.
__device__ __forceinline__ uint4 load_once(const void* from) {
    uint4 all;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(all.x), "=r"(all.y), "=r"(all.z), "=r"(all.w)
                 : "l"(from));
    return all;
}
// What another block of this launch reads, which must know that the writers are past their device_fence(): one thread of a block counts
// it after that and a __syncthreads. The reader, who is told how many were counted before, passes a device_fence() too, and loads past
// its L1 cache.
__device__ __forceinline__ void publish(float* to, float x) { *to = x; }
__device__ __forceinline__ void device_fence() { __threadfence(); }
__device__ __forceinline__ unsigned count_published(unsigned* counter) { return atomicAdd(counter, 1u); }
__device__ __forceinline__ float load_published(const float* from) { return __ldcg(from); }
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of the groups this thread committed are under way.
template <int N> __device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Work that is recorded (src/device/cuda/recording.rs) has each kernel come onto the device as soon as all blocks of the one before it
// are there, not when they have ended (programmatic dependent launch, sm_90). Every kernel of this folder may be launched so. The rule,
// which tests/kernels/dependent.rs holds to:
//   all threads of every kernel wait, once, before they read what recorded work writes and before they write anything at all;
//   before that they may hint at memory, and read what this recorded work does not write: tables of the host, and rows of a cache before
//   those of a step's tokens (they are there since an earlier step, which has ended as a whole). Weights are hinted at only,
//   because whoever records may have changed them.
// A wait ends when the kernel before has ended and all it wrote is seen. That one has waited too before it ended, so all work before it
// has ended as well: the rule holds for chains because no kernel is left out. And since a kernel lets the next one come before it waits
// itself, that one may begin before ANY of those before it has ended: what the last but one writes must not be read ahead either.
// Where the launch does not ask for it neither does anything.
__device__ __forceinline__ void let_successor_come() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_predecessors() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// A hint: `bytes` from `at` on, both multiples of 16, will be read. They come to the L2 cache, where all processors see the same.
__device__ __forceinline__ void hint_at(const void* at, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at), "r"(bytes) : "memory");
#endif
}
#endif

// The first statement of a kernel that does nothing ahead.
__device__ __forceinline__ void after_predecessors() {
    let_successor_come();
    wait_for_predecessors();
}

// NVRTC has no <math.h>.
#define MINUS_INFINITY (-__uint_as_float(0x7f800000u))

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ __forceinline__ void store(float* to, float x) { *to = x; }
__device__ __forceinline__ void store(bf16* to, float x) { to->bits = (unsigned short)pack_bf16(x, 0.0f); }
// x as it is stored.
template <class T> __device__ __forceinline__ float rounded(float x) {
    T stored;
    store(&stored, x);
    return to_float(stored);
}

// Whether it is so in all 32 lanes.
__device__ __forceinline__ bool all_of_warp(bool yes) { return __all_sync(0xffffffffu, yes); }
// Of the 32 lanes, in a fixed order.
__device__ __forceinline__ float warp_sum(float x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}
