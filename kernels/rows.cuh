// What the kernels over rows and flat arrays share: eight elements at a time, by 16-byte loads and stores where the address allows
// and one by one elsewhere, and sums over a block. Knows nothing of any operation.
#pragma once
#include "common.cuh"

constexpr int CHUNK = 8;

__device__ __forceinline__ bool is_aligned(const void* at) { return ((unsigned long long)at & 15) == 0; }

__device__ __forceinline__ void load_whole(float x[CHUNK], const float* from) {
    uint4 low = *(const uint4*)from, high = *(const uint4*)(from + 4);
    unsigned bits[CHUNK] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    for (int i = 0; i < CHUNK; i++) x[i] = __uint_as_float(bits[i]);
}
// Eight elements of bf16 out of their 16 bytes.
__device__ __forceinline__ void widen_pairs(float x[CHUNK], uint4 all) {
    unsigned pairs[4] = {all.x, all.y, all.z, all.w};
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(pairs[i] << 16);
        x[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
}
__device__ __forceinline__ void load_whole(float x[CHUNK], const bf16* from) { widen_pairs(x, *(const uint4*)from); }
__device__ __forceinline__ void store_whole(float* to, const float x[CHUNK]) {
    unsigned bits[CHUNK];
    for (int i = 0; i < CHUNK; i++) bits[i] = __float_as_uint(x[i]);
    *(uint4*)to = make_uint4(bits[0], bits[1], bits[2], bits[3]);
    *(uint4*)(to + 4) = make_uint4(bits[4], bits[5], bits[6], bits[7]);
}
__device__ __forceinline__ void store_whole(bf16* to, const float x[CHUNK]) {
    *(uint4*)to = make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
}

// The first n of eight elements, zeros behind them; n may be 0 or less.
template <class T> __device__ __forceinline__ void load_chunk(float x[CHUNK], const T* from, long long n) {
    if (n >= CHUNK && is_aligned(from)) return load_whole(x, from);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) x[i] = i < n ? to_float(from[i]) : 0.0f;
}
// The first n of eight elements.
template <class T> __device__ __forceinline__ void store_chunk(T* to, const float x[CHUNK], long long n) {
    if (n >= CHUNK && is_aligned(to)) return store_whole(to, x);
#pragma unroll
    for (int i = 0; i < CHUNK; i++)
        if (i < n) store(to + i, x[i]);
}

// Calls work(at, n) with this thread's chunks of 0..size: n elements from `at`.
template <class Work> __device__ __forceinline__ void for_chunks(long long size, Work work) {
    long long step = (long long)gridDim.x * blockDim.x * CHUNK;
    for (long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * CHUNK; at < size; at += step) work(at, size - at);
}
// The same over one row by one block.
template <class Work> __device__ __forceinline__ void for_row_chunks(int columns, Work work) {
    for (int at = threadIdx.x * CHUNK; at < columns; at += blockDim.x * CHUNK) work(at, columns - at);
}

// Of all threads of the block, in a fixed order, to all of them. Whole warps.
template <class T> __device__ __forceinline__ T block_sum(T x) {
    __shared__ T parts[32];
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    __syncthreads(); // the sum before this one has been read
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    T sum = 0;
    for (int warp = 0; warp < blockDim.x / 32; warp++) sum += parts[warp];
    return sum;
}
__device__ __forceinline__ float block_max(float x) {
    __shared__ float parts[32];
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    for (int warp = 0; warp < blockDim.x / 32; warp++) x = fmaxf(x, parts[warp]);
    return x;
}
