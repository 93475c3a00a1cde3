// Products of up to four rows with the rows of a matrix (Device::gemm, NT; decode steps), in the shortest order of sums: each weight is
// read once, by 16 bytes, and used for all rows.
// Grid: a warp for each row of the matrix, eight a block of 256 threads; k is a multiple of 8, addresses of 16. Limited by memory: a warp
// has 4 KiB under way, so 16 of them, of a processor's 64, are as many bytes as one waits for.
#include "rows.cuh"

// Loads of a thread under way.
constexpr int AHEAD = 8;

// out[M, n] = x[M, k] w[n, k]^T
template <class T, int M> __device__ __forceinline__ void gemv(T* out, const bf16* x, const bf16* w, int n, int k) {
    int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= n) return;
    const bf16* from = w + (long long)row * k;
    float sum[M] = {};
    for (int first = lane * CHUNK; first < k; first += AHEAD * 32 * CHUNK) {
        uint4 words[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int at = first + i * 32 * CHUNK;
            words[i] = at < k ? load_once(from + at) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int at = first + i * 32 * CHUNK;
            if (at >= k) break;
            float weight[CHUNK];
            widen_pairs(weight, words[i]);
#pragma unroll
            for (int m = 0; m < M; m++) {
                float value[CHUNK];
                load_whole(value, x + (long long)m * k + at);
                for (int j = 0; j < CHUNK; j++) sum[m] = fmaf(weight[j], value[j], sum[m]);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
        sum[m] = warp_sum(sum[m]);
        if (lane == 0) store(out + (long long)m * n + row, sum[m]);
    }
}

#define KERNEL(T, name, M)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(256)                                                                                \
        gemv_##M##_##name##_bf16(T* out, const bf16* x, const bf16* w, int n, int k) {                                               \
        gemv<T, M>(out, x, w, n, k);                                                                                                 \
    }
#define KERNELS(M) KERNEL(float, f32, M) KERNEL(bf16, bf16, M)
KERNELS(1)
KERNELS(2)
KERNELS(3)
KERNELS(4)
