// Products of up to four rows with the rows of a matrix (Device::gemm, NT; decode steps), in the shortest order of sums: each weight is
// read once, by 16 bytes, and used for all rows. Of an up projection the output may be that of the activation behind it
// (Device::gemm_activation): the product is rounded to bf16 first, so the bits are those of the two by themselves. The norm before a
// product may be within (Device::add_norm_gemm): each block normalises the rows for itself while its first weights are on their way.
// Grid: 8 warps a block, 8 / parts rows of the matrix; a row's terms are divided over `parts` warps (1, 2 or 4, by k alone: an output's
// bits do not depend on how many rows there are), by turns of 256, whose sums are added in order. k is a multiple of 8, addresses of 16.
// Limited by memory: a warp has 4 KiB under way, so 16 of them, of a processor's 64, are as many bytes as one waits for. Rows of 2048
// terms or more a part are under way as a whole.
// In recorded work the first bytes of each row are hinted at before the wait, so that memory works while the kernels before, which are
// small, wait for each other.
#include "norm.cuh"
#include "activation.cuh"

constexpr int WARPS = 8;
// Loads of a thread under way.
constexpr int AHEAD = 8;
// Of the matrix, hinted at before its input is there: what memory brings in 5 us, the time of the small kernels between two products; a
// third of the L2 cache.
constexpr int HINTED_BYTES = 16 << 20;

// Calls work(u, first column) with the chunks of a row that thread threadIdx.x + 256 u of `threads` has, u = 0, 1.
template <class Work> __device__ __forceinline__ void for_chunks_of(int threads, int columns, Work work) {
#pragma unroll
    for (int u = 0; u < 2; u++) {
        int me = threadIdx.x + u * 32 * WARPS;
        for (int at = me * CHUNK; me < threads && at < columns; at += threads * CHUNK) work(u, at);
    }
}

// sum[M, k] = x + delta, which the first block stores, and in shared memory norm(sum), by 256 threads with the sums of the `threads` that
// kernels/norm.cu has for such a row: each of ours is in the place of one of them or two.
template <int M>
__device__ __forceinline__ const bf16* add_norm(bf16* sum, const bf16* x, const bf16* delta, const bf16* gain, const bf16* bias, int k,
                                                int threads, int is_layer, float eps) {
    DYNAMIC_SHARED(memory);
    __shared__ float parts[M][2 * WARPS];
    bf16* rows = (bf16*)memory; // [M, k]
    int warp = threadIdx.x / 32;
    float of[M][2] = {};
    // Of row m over all threads, as block_sum adds.
    auto sum_of = [&](int m) {
        float all = 0;
        for (int i = 0; i < threads / 32; i++) all += parts[m][i];
        return all;
    };
    auto share = [&] {
        __syncthreads(); // the sums before these have been read
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int u = 0; u < 2; u++) {
                float all = warp_sum(of[m][u]);
                if (threadIdx.x % 32 == 0) parts[m][warp + u * WARPS] = all;
                of[m][u] = 0;
            }
        __syncthreads();
    };
    for_chunks_of(threads, k, [&](int u, int at) {
#pragma unroll
        for (int m = 0; m < M; m++) {
            float value[CHUNK], other[CHUNK];
            load_whole(value, x + (long long)m * k + at);
            load_whole(other, delta + (long long)m * k + at);
            for (int i = 0; i < CHUNK; i++) of[m][u] += value[i] = rounded<bf16>(value[i] + other[i]);
            store_whole(rows + m * k + at, value);
            if (blockIdx.x == 0) store_whole(sum + (long long)m * k + at, value);
        }
    });
    float mean[M] = {}, rstd[M];
    if (is_layer) {
        share();
#pragma unroll
        for (int m = 0; m < M; m++) mean[m] = sum_of(m) / k;
    }
#pragma unroll
    for (int m = 0; m < M; m++) of[m][0] = of[m][1] = 0;
    for_chunks_of(threads, k, [&](int u, int at) {
#pragma unroll
        for (int m = 0; m < M; m++) {
            float value[CHUNK];
            load_whole(value, rows + m * k + at);
            for (int i = 0; i < CHUNK; i++) of[m][u] = add_square(of[m][u], value[i], mean[m]);
        }
    });
    share();
#pragma unroll
    for (int m = 0; m < M; m++) rstd[m] = rstd_of(sum_of(m), k, eps);
    float plus = is_layer ? 1.0f : 0.0f;
    for_chunks_of(threads, k, [&](int, int at) {
        float g[CHUNK], b[CHUNK] = {};
        load_whole(g, gain + at);
        if (bias != nullptr) load_whole(b, bias + at);
#pragma unroll
        for (int m = 0; m < M; m++) {
            float value[CHUNK];
            load_whole(value, rows + m * k + at);
            for (int i = 0; i < CHUNK; i++) value[i] = normed(value[i], mean[m], rstd[m], g[i] + plus, b[i]);
            store_whole(rows + m * k + at, value);
        }
    });
    __syncthreads();
    return rows;
}

// Calls put(row of w, i, sums) with the 1 or, where PAIRS, 2 sums of a row i of x and of a row of w, or of a pair of them: of
// out[M, n] = x[M, k] w[n, k]^T. A thread for each. input() is x, made by all threads.
template <int M, bool PAIRS, class Input, class Put>
__device__ __forceinline__ void gemv(Input input, const bf16* w, int n, int k, int parts, Put put) {
    __shared__ float sums[WARPS][M];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = WARPS / parts;
    int first_row = blockIdx.x * rows, row = first_row + warp / parts, part = warp % parts;
    const bf16* from = w + (long long)row * k;
    let_successor_come();
    int hinted = min(2 * k, HINTED_BYTES / n) / 16 * 16;
    if (row < n && part == 0 && lane == 0 && hinted > 0) hint_at(from, hinted);
    wait_for_predecessors();
    float sum[M] = {};
    int step = parts * 32 * CHUNK, first = (part * 32 + lane) * CHUNK, end = row < n ? k : 0;
    uint4 words[AHEAD];
    auto fetch = [&] {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int at = first + i * step;
            words[i] = at < end ? load_once(from + at) : make_uint4(0, 0, 0, 0);
        }
    };
    fetch();
    const bf16* x = input();
    while (first < end) {
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
        first += AHEAD * step;
        fetch();
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

// What becomes of the sums.
template <class T> __device__ __forceinline__ auto to_product(T* out, int n) {
    return [=](int row, int i, const float* sum) { store(out + (long long)i * n + row, sum[0]); };
}
__device__ __forceinline__ auto to_squared_relu(bf16* out, int n) {
    return [=](int row, int i, const float* sum) { store(out + (long long)i * n + row, squared_relu_of(rounded<bf16>(sum[0]))); };
}
__device__ __forceinline__ auto to_swiglu(bf16* out, int n) {
    return [=](int row, int i, const float* sum) {
        store(out + (long long)i * (n / 2) + row / 2, swiglu_of(rounded<bf16>(sum[0]), rounded<bf16>(sum[1])));
    };
}

#define OF_X(T, name, M, PAIRS, to)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, M < 4 ? 4 : 3)                                                                 \
        gemv_##name##_bf16(T* out, const bf16* x, const bf16* w, int n, int k, int parts) {                                          \
        gemv<M, PAIRS>([&] { return x; }, w, n, k, parts, to(out, n));                                                               \
    }
#define OF_NORM(name, M, PAIRS, to)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, M < 2 ? 4 : M < 3 ? 3 : 2)                                                     \
        gemv_norm_##name##_bf16(bf16* out, bf16* sum, const bf16* x, const bf16* delta, const bf16* gain, const bf16* bias,          \
                                const bf16* w, int n, int k, int parts, int threads, int is_layer, float eps) {                      \
        gemv<M, PAIRS>([&] { return add_norm<M>(sum, x, delta, gain, bias, k, threads, is_layer, eps); }, w, n, k, parts,            \
                       to(out, n));                                                                                                  \
    }
#define KERNELS(M)                                                                                                                   \
    OF_X(float, M##_f32, M, false, to_product)                                                                                       \
    OF_X(bf16, M##_bf16, M, false, to_product)                                                                                       \
    OF_X(bf16, squared_relu_##M, M, false, to_squared_relu)                                                                          \
    OF_X(bf16, swiglu_##M, M, true, to_swiglu)                                                                                       \
    OF_NORM(M, M, false, to_product)                                                                                                 \
    OF_NORM(squared_relu_##M, M, false, to_squared_relu)                                                                             \
    OF_NORM(swiglu_##M, M, true, to_swiglu)
KERNELS(1)
KERNELS(2)
KERNELS(3)
KERNELS(4)
