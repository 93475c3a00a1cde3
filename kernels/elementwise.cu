// Flat arrays: copies between types, sums, scaling, columns beside each other, and the sum of squares in f64.
// Grid: any number of blocks of 256 threads, each thread takes eight elements at a time; sum_squares one block for each 4096
// elements. No dynamic shared memory. Limited by memory.
#include "rows.cuh"

// out = x
template <class O, class T> __device__ __forceinline__ void copy(O* out, const T* x, long long n) {
    for_chunks(n, [&](long long at, long long left) {
        float value[CHUNK];
        load_chunk(value, x + at, left);
        store_chunk(out + at, value, left);
    });
}

// x += y
template <class O, class T> __device__ __forceinline__ void add(O* x, const T* y, long long n) {
    for_chunks(n, [&](long long at, long long left) {
        float value[CHUNK], other[CHUNK];
        load_chunk(value, x + at, left);
        load_chunk(other, y + at, left);
        for (int i = 0; i < CHUNK; i++) value[i] += other[i];
        store_chunk(x + at, value, left);
    });
}

// x *= factor
template <class T> __device__ __forceinline__ void scale(T* x, long long n, float factor) {
    for_chunks(n, [&](long long at, long long left) {
        float value[CHUNK];
        load_chunk(value, x + at, left);
        for (int i = 0; i < CHUNK; i++) value[i] *= factor;
        store_chunk(x + at, value, left);
    });
}

// out[row, columns] = parts of `width` columns beside each other, each of them [n_rows, width]; one block a row, of up to 512 threads
template <class T> __device__ __forceinline__ void join_columns(T* out, const T* parts, int n_rows, int columns, int width) {
    for (int column = threadIdx.x; column < columns; column += blockDim.x) {
        int part = column / width, first = min(part * width, columns - width);
        out[(long long)blockIdx.x * columns + column] = parts[((long long)part * n_rows + blockIdx.x) * width + column - first];
    }
}

// Squares summed by one block: fixed, so that the sum does not depend on the device.
constexpr int SQUARES = 4096;

#define MIXED(O, out_name, T, name)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) copy_##out_name##_##name(O* out, const T* x, long long n) {                    \
        after_predecessors();                                                                                                        \
        copy(out, x, n);                                                                                                             \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) add_##out_name##_##name(O* x, const T* y, long long n) {                       \
        after_predecessors();                                                                                                        \
        add(x, y, n);                                                                                                                \
    }
MIXED(float, f32, float, f32)
MIXED(float, f32, bf16, bf16)
MIXED(bf16, bf16, float, f32)
MIXED(bf16, bf16, bf16, bf16)

extern "C" __global__ void __launch_bounds__(256) scale_f32(float* x, long long n, float factor) {
    after_predecessors();
    scale(x, n, factor);
}
extern "C" __global__ void __launch_bounds__(256) scale_bf16(bf16* x, long long n, float factor) {
    after_predecessors();
    scale(x, n, factor);
}

#define JOIN(T, name)                                                                                                                \
    extern "C" __global__ void __launch_bounds__(512) join_columns_##name(T* out, const T* parts, int n_rows, int columns, int width) { \
        after_predecessors();                                                                                                        \
        join_columns(out, parts, n_rows, columns, width);                                                                            \
    }
JOIN(float, f32)
JOIN(bf16, bf16)

// partial[block] = sum of x^2 over the block's 4096 elements
extern "C" __global__ void __launch_bounds__(256) sum_squares_f32(double* partial, const float* x, long long n) {
    after_predecessors();
    long long first = (long long)blockIdx.x * SQUARES;
    double sum = 0;
    for (int at = threadIdx.x * CHUNK; at < SQUARES; at += blockDim.x * CHUNK) {
        float value[CHUNK];
        load_chunk(value, x + first + at, n - first - at);
        for (int i = 0; i < CHUNK; i++) sum += (double)value[i] * value[i];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// total[0] = sum of n partial sums; one block
extern "C" __global__ void __launch_bounds__(1024) sum_partial_f64(double* total, const double* partial, long long n) {
    after_predecessors();
    double sum = 0;
    for (long long i = threadIdx.x; i < n; i += blockDim.x) sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) total[0] = sum;
}
