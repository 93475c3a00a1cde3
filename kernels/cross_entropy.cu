// The vocabulary's part of a rank in the cross entropy: maximum, sum of exponentials, both in one pass, gradient in place.
// Grid: one block for each token, whole warps, a thread for eight columns at a time. Limited by memory; the sum and the gradient by
// the exponentials where the logits are bf16.
#include "rows.cuh"

// The column of this rank that is the target, or -1.
__device__ __forceinline__ int target_column(unsigned target, int first_row, int n_valid) {
    long long column = (long long)target - first_row;
    return column >= 0 && column < n_valid ? (int)column : -1;
}

// max[T] = largest of the first n_valid columns
template <class T> __device__ __forceinline__ void cross_entropy_max(float* max, const T* logits, int columns, int n_valid) {
    const T* row = logits + (long long)blockIdx.x * columns;
    float largest = MINUS_INFINITY;
    for_row_chunks(n_valid, [&](int at, int left) {
        float value[CHUNK];
        load_chunk(value, row + at, left);
        for (int i = 0; i < CHUNK; i++)
            if (i < left) largest = fmaxf(largest, value[i]);
    });
    largest = block_max(largest);
    if (threadIdx.x == 0) max[blockIdx.x] = largest;
}

// sum[T] = sum of exp(logit - max); target_logit[T] = the target's logit, or 0
template <class T>
__device__ __forceinline__ void cross_entropy_sum(float* sum, float* target_logit, const T* logits, const float* max, const unsigned* targets,
                                                  int columns, int first_row, int n_valid) {
    const T* row = logits + (long long)blockIdx.x * columns;
    float largest = max[blockIdx.x], total = 0;
    for_row_chunks(n_valid, [&](int at, int left) {
        float value[CHUNK];
        load_chunk(value, row + at, left);
        for (int i = 0; i < CHUNK; i++)
            if (i < left) total += expf(value[i] - largest);
    });
    total = block_sum(total);
    if (threadIdx.x == 0) {
        int target = target_column(targets[blockIdx.x], first_row, n_valid);
        sum[blockIdx.x] = total;
        target_logit[blockIdx.x] = target >= 0 ? to_float(row[target]) : 0.0f;
    }
}

// What a maximum is taken off as: where all is minus infinity so far nothing, whose exponentials are 0 then and not those of no number.
__device__ __forceinline__ float shift_of(float largest) { return largest == MINUS_INFINITY ? 0.0f : largest; }

// max[T] = largest of the first n_valid columns, sum[T] = sum of their exp(logit - max), target_logit[T] = the target's logit, or 0. A
// thread's sum belongs to the largest logit it has met: it is scaled where a larger one comes, a few times a row.
template <class T>
__device__ __forceinline__ void cross_entropy_forward(float* max, float* sum, float* target_logit, const T* logits, const unsigned* targets,
                                                      int columns, int first_row, int n_valid) {
    const T* row = logits + (long long)blockIdx.x * columns;
    float largest = MINUS_INFINITY, total = 0;
    for_row_chunks(n_valid, [&](int at, int left) {
        float value[CHUNK];
        load_chunk(value, row + at, left);
        float most = largest;
        for (int i = 0; i < CHUNK; i++)
            if (i < left) most = fmaxf(most, value[i]);
        float shift = shift_of(most);
        if (most > largest) {
            total *= expf(largest - shift);
            largest = most;
        }
        for (int i = 0; i < CHUNK; i++)
            if (i < left) total += expf(value[i] - shift);
    });
    float of_all = block_max(largest);
    total = block_sum(total * expf(largest - shift_of(of_all)));
    if (threadIdx.x == 0) {
        int target = target_column(targets[blockIdx.x], first_row, n_valid);
        max[blockIdx.x] = of_all;
        sum[blockIdx.x] = total;
        target_logit[blockIdx.x] = target >= 0 ? to_float(row[target]) : 0.0f;
    }
}

// logits = weight (exp(logit - max) / sum - [target]); 0 behind n_valid and in rows of weight 0
template <class T>
__device__ __forceinline__ void cross_entropy_gradient(T* logits, const float* max, const float* sum, const unsigned* targets,
                                                       const float* weights, int columns, int first_row, int n_valid) {
    T* row = logits + (long long)blockIdx.x * columns;
    float largest = max[blockIdx.x], weight = weights[blockIdx.x], factor = 1.0f / sum[blockIdx.x];
    int target = target_column(targets[blockIdx.x], first_row, n_valid);
    for_row_chunks(columns, [&](int at, int left) {
        float value[CHUNK] = {};
        if (weight != 0.0f) {
            load_chunk(value, row + at, left);
            for (int i = 0; i < CHUNK; i++) {
                float p = expf(value[i] - largest) * factor - (at + i == target ? 1.0f : 0.0f);
                value[i] = at + i < n_valid ? weight * p : 0.0f;
            }
        }
        store_chunk(row + at, value, left);
    });
}

#define KERNELS(T, name)                                                                                                             \
    extern "C" __global__ void __launch_bounds__(512) cross_entropy_max_##name(float* max, const T* logits, int columns, int n_valid) { \
        after_predecessors();                                                                                                        \
        cross_entropy_max(max, logits, columns, n_valid);                                                                            \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(512)                                                                                \
        cross_entropy_sum_##name(float* sum, float* target_logit, const T* logits, const float* max, const unsigned* targets,       \
                                 int columns, int first_row, int n_valid) {                                                         \
        after_predecessors();                                                                                                        \
        cross_entropy_sum(sum, target_logit, logits, max, targets, columns, first_row, n_valid);                                     \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(512)                                                                                \
        cross_entropy_forward_##name(float* max, float* sum, float* target_logit, const T* logits, const unsigned* targets,         \
                                     int columns, int first_row, int n_valid) {                                                     \
        after_predecessors();                                                                                                        \
        cross_entropy_forward(max, sum, target_logit, logits, targets, columns, first_row, n_valid);                                 \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(512)                                                                                \
        cross_entropy_gradient_##name(T* logits, const float* max, const float* sum, const unsigned* targets, const float* weights, \
                                      int columns, int first_row, int n_valid) {                                                    \
        after_predecessors();                                                                                                        \
        cross_entropy_gradient(logits, max, sum, targets, weights, columns, first_row, n_valid);                                     \
    }
KERNELS(float, f32)
KERNELS(bf16, bf16)
