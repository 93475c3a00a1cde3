// Products of up to four rows with the rows of a matrix (Device::gemm, NT; decode steps), in the shortest order of sums: each weight is
// read once, by 16 bytes, and used for all rows. Of an up projection the output may be that of the activation behind it
// (Device::gemm_activation): the product is rounded to bf16 first, so the bits are those of the two by themselves.
// Grid: 8 warps a block, 8 / parts rows of the matrix; a row's terms are divided over `parts` warps (1, 2 or 4, by k alone: an output's
// bits do not depend on how many rows there are), by turns of 256, whose sums are added in order. k is a multiple of 8, addresses of 16.
// Limited by memory: a warp has 4 KiB under way, so 16 of them, of a processor's 64, are as many bytes as one waits for. Rows of 2048
// terms or more a part are under way as a whole.
// In recorded work the first bytes of each row are hinted at before the wait, so that memory works while the kernels before, which are
// small, wait for each other.
#include "rows.cuh"
#include "activation.cuh"

constexpr int WARPS = 8;
// Loads of a thread under way.
constexpr int AHEAD = 8;
// Of the matrix, hinted at before its input is there: what memory brings in 5 us, the time of the small kernels between two products; a
// third of the L2 cache.
constexpr int HINTED_BYTES = 16 << 20;

// Calls put(row of w, i, sums) with the 1 or, where PAIRS, 2 sums of a row i of x and of a row of w, or of a pair of them: of
// out[M, n] = x[M, k] w[n, k]^T. A thread for each.
template <int M, bool PAIRS, class Put>
__device__ __forceinline__ void gemv(const bf16* x, const bf16* w, int n, int k, int parts, Put put) {
    __shared__ float sums[WARPS][M];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = WARPS / parts;
    int first_row = blockIdx.x * rows, row = first_row + warp / parts, part = warp % parts;
    const bf16* from = w + (long long)row * k;
    let_successor_come();
    int hinted = min(2 * k, HINTED_BYTES / n) / 16 * 16;
    if (row < n && part == 0 && lane == 0 && hinted > 0) hint_at(from, hinted);
    wait_for_predecessors();
    float sum[M] = {};
    int step = parts * 32 * CHUNK;
    for (int first = (part * 32 + lane) * CHUNK; row < n && first < k; first += AHEAD * step) {
        uint4 words[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int at = first + i * step;
            words[i] = at < k ? load_once(from + at) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int at = first + i * step;
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
        if (lane == 0) sums[warp][m] = sum[m];
    }
    __syncthreads();
    constexpr int EACH = PAIRS ? 2 : 1;
    int i = threadIdx.x % M, at = threadIdx.x / M * EACH;
    if (at >= rows || first_row + at >= n) return;
    float all[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        all[e] = sums[(at + e) * parts][i];
        for (int p = 1; p < parts; p++) all[e] += sums[(at + e) * parts + p][i];
    }
    put(first_row + at, i, all);
}

#define PRODUCT(T, name, M)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                                                                \
        gemv_##M##_##name##_bf16(T* out, const bf16* x, const bf16* w, int n, int k, int parts) {                                    \
        gemv<M, false>(x, w, n, k, parts, [&](int row, int i, const float* sum) { store(out + (long long)i * n + row, sum[0]); });   \
    }
#define ACTIVATED(M)                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256)                                                                                \
        gemv_squared_relu_##M##_bf16(bf16* out, const bf16* x, const bf16* w, int n, int k, int parts) {                             \
        gemv<M, false>(x, w, n, k, parts, [&](int row, int i, const float* sum) {                                                    \
            store(out + (long long)i * n + row, squared_relu_of(rounded<bf16>(sum[0])));                                             \
        });                                                                                                                          \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256)                                                                                \
        gemv_swiglu_##M##_bf16(bf16* out, const bf16* x, const bf16* w, int n, int k, int parts) {                                   \
        gemv<M, true>(x, w, n, k, parts, [&](int row, int i, const float* sum) {                                                     \
            float both = swiglu_of(rounded<bf16>(sum[0]), rounded<bf16>(sum[1]));                                                    \
            store(out + (long long)i * (n / 2) + row / 2, both);                                                                     \
        });                                                                                                                          \
    }
#define KERNELS(M) PRODUCT(float, f32, M) PRODUCT(bf16, bf16, M) ACTIVATED(M)
KERNELS(1)
KERNELS(2)
KERNELS(3)
KERNELS(4)
