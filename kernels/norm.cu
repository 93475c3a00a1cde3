// LayerNorm1P and RMSNorm over rows, with the residual sum before it, and backward.
// Forward: one block for each row, which stays in registers: V chunks of eight columns a thread, 1 to 5 by the row's length (20,480
// columns at most); the variance is taken in a second pass over the registers. Backward: one block for a fixed number of rows, one
// after another; each thread adds up the gradients of its columns' gains and biases over those rows; norm_sum adds the blocks in order.
// Threads: whole warps, up to 512. Limited by memory; the second reading of a row in the backward pass comes from the L1 cache.
#include "norm.cuh"

// First column of a thread's chunk v.
__device__ __forceinline__ int chunk_at(int v) { return (threadIdx.x + v * blockDim.x) * CHUNK; }

// out = norm(x), stats = (mean, rstd) of the row; x += delta first unless that is null.
template <class T, int V>
__device__ __forceinline__ void norm(T* x, const T* delta, T* out, float* stats, const T* gain, const T* bias, int columns, int is_layer,
                                     float eps) {
    long long first = (long long)blockIdx.x * columns;
    float value[V][CHUNK], sum = 0;
#pragma unroll
    for (int v = 0; v < V; v++) {
        int at = chunk_at(v), left = columns - at;
        load_chunk(value[v], x + first + at, left);
        if (delta != nullptr) {
            float other[CHUNK];
            load_chunk(other, delta + first + at, left);
            for (int i = 0; i < CHUNK; i++) value[v][i] = rounded<T>(value[v][i] + other[i]);
            store_chunk(x + first + at, value[v], left);
        }
        for (int i = 0; i < CHUNK; i++) sum += value[v][i];
    }
    float mean = is_layer ? block_sum(sum) / columns : 0.0f, squares = 0;
#pragma unroll
    for (int v = 0; v < V; v++)
        for (int i = 0; i < CHUNK; i++)
            if (i < columns - chunk_at(v)) squares = add_square(squares, value[v][i], mean);
    float rstd = rstd_of(block_sum(squares), columns, eps), plus = is_layer ? 1.0f : 0.0f;
#pragma unroll
    for (int v = 0; v < V; v++) {
        int at = chunk_at(v), left = columns - at;
        float g[CHUNK], b[CHUNK] = {};
        load_chunk(g, gain + at, left);
        if (bias != nullptr) load_chunk(b, bias + at, left);
        for (int i = 0; i < CHUNK; i++) value[v][i] = normed(value[v][i], mean, rstd, g[i] + plus, b[i]);
        store_chunk(out + first + at, value[v], left);
    }
    if (threadIdx.x == 0) {
        stats[2 * blockIdx.x] = mean;
        stats[2 * blockIdx.x + 1] = rstd;
    }
}

// Sums of a thread, 2 V chunks: registers.
template <int V> struct Sums {
    float of[2 * V][CHUNK] = {};
    __device__ __forceinline__ explicit Sums(unsigned char*) {}
    __device__ __forceinline__ float& at(int chunk, int i) { return of[chunk][i]; }
};
// As many as there are no registers for: shared memory, neighbours side by side.
template <> struct Sums<5> {
    float* of;
    __device__ __forceinline__ explicit Sums(unsigned char* memory) : of((float*)memory + threadIdx.x) {
        for (int i = 0; i < 2 * 5 * CHUNK; i++) of[i * blockDim.x] = 0;
    }
    __device__ __forceinline__ float& at(int chunk, int i) { return of[(chunk * CHUNK + i) * blockDim.x]; }
};

// dx += gradient through the norm; partial[block, 2, columns] = sums over the block's rows of dy hat and dy.
template <class T, int V>
__device__ __forceinline__ void norm_backward(T* dx, float* partial, const T* dy, const T* x, const T* gain, const float* stats, int n_rows,
                                              int columns, int rows_per_block, int is_layer) {
    constexpr int UNROLL = V <= 3 ? V : 1; // sums in registers must be named at compile time, others need not
    DYNAMIC_SHARED(memory);
    Sums<V> sums(memory);
    float plus = is_layer ? 1.0f : 0.0f;
    int begin = blockIdx.x * rows_per_block, end = min(begin + rows_per_block, n_rows);
    for (int row = begin; row < end; row++) {
        long long first = (long long)row * columns;
        float mean = stats[2 * row], rstd = stats[2 * row + 1], along = 0, offset = 0;
#pragma unroll UNROLL
        for (int v = 0; v < V; v++) {
            int at = chunk_at(v), left = columns - at;
            float d[CHUNK], hat[CHUNK], g[CHUNK];
            load_chunk(d, dy + first + at, left); // zeros behind the row add nothing
            load_chunk(hat, x + first + at, left);
            load_chunk(g, gain + at, left);
            for (int i = 0; i < CHUNK; i++) {
                float h = (hat[i] - mean) * rstd, dh = d[i] * (g[i] + plus);
                along += dh * h;
                offset += dh;
                sums.at(v, i) += d[i] * h;
                sums.at(V + v, i) += d[i];
            }
        }
        along = block_sum(along) / columns;
        offset = is_layer ? block_sum(offset) / columns : 0.0f;
#pragma unroll UNROLL
        for (int v = 0; v < V; v++) {
            int at = chunk_at(v), left = columns - at;
            float d[CHUNK], hat[CHUNK], g[CHUNK], to[CHUNK];
            load_chunk(d, dy + first + at, left);
            load_chunk(hat, x + first + at, left);
            load_chunk(g, gain + at, left);
            load_chunk(to, dx + first + at, left);
            for (int i = 0; i < CHUNK; i++) {
                float h = (hat[i] - mean) * rstd;
                to[i] += rstd * (d[i] * (g[i] + plus) - offset - h * along);
            }
            store_chunk(dx + first + at, to, left);
        }
    }
    float* to = partial + (long long)blockIdx.x * 2 * columns;
#pragma unroll
    for (int v = 0; v < V; v++) {
        float dgain[CHUNK], dbias[CHUNK];
        for (int i = 0; i < CHUNK; i++) {
            dgain[i] = sums.at(v, i);
            dbias[i] = sums.at(V + v, i);
        }
        store_chunk(to + chunk_at(v), dgain, columns - chunk_at(v));
        store_chunk(to + columns + chunk_at(v), dbias, columns - chunk_at(v));
    }
}

// dgain[columns] += and, unless null, dbias[columns] += the blocks' sums in order; a thread for each column.
extern "C" __global__ void __launch_bounds__(128) norm_sum_f32(float* dgain, float* dbias, const float* partial, int n_blocks, int columns) {
    after_predecessors();
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    float gain = 0, bias = 0;
#pragma unroll 16 // loads that do not wait for each other
    for (int block = 0; block < n_blocks; block++) {
        const float* from = partial + (long long)block * 2 * columns + column;
        gain += from[0];
        bias += from[columns];
    }
    dgain[column] += gain;
    if (dbias != nullptr) dbias[column] += bias;
}

#define KERNELS(T, name, V)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(512, 1)                                                                             \
        norm_##V##_##name(T* out, float* stats, const T* x, const T* gain, const T* bias, int columns, int is_layer, float eps) {   \
        after_predecessors();                                                                                                        \
        norm<T, V>(const_cast<T*>(x), nullptr, out, stats, gain, bias, columns, is_layer, eps);                                      \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(512)                                                                                \
        add_norm_##V##_##name(T* x, const T* delta, T* out, float* stats, const T* gain, const T* bias, int columns, int is_layer,  \
                              float eps) {                                                                                          \
        after_predecessors();                                                                                                        \
        norm<T, V>(x, delta, out, stats, gain, bias, columns, is_layer, eps);                                                        \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(512)                                                                                \
        norm_backward_##V##_##name(T* dx, float* partial, const T* dy, const T* x, const T* gain, const float* stats, int n_rows,   \
                                   int columns, int rows_per_block, int is_layer) {                                                 \
        after_predecessors();                                                                                                        \
        norm_backward<T, V>(dx, partial, dy, x, gain, stats, n_rows, columns, rows_per_block, is_layer);                             \
    }
#define FORMS(T, name) KERNELS(T, name, 1) KERNELS(T, name, 2) KERNELS(T, name, 3) KERNELS(T, name, 5)
FORMS(float, f32)
FORMS(bf16, bf16)
