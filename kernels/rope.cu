// Rotary embedding of the queries and keys of packed rows, in place.
// Grid: one block of 256 threads for each token; dynamic shared memory for cos and sin of the token's angles, computed in f64,
// times the attention factor, and rounded once. Limited by memory, when there are many heads; by the f64 angles when there are few.
#include "rows.cuh"

// qkv[T, (A+2G)D], positions[T], frequencies[half]; half = rotary_dims / 2; sign -1 rotates back, times the same factor.
template <class T>
__device__ __forceinline__ void rope(T* qkv, const unsigned* positions, const double* frequencies, int per_kv, int n_kv, int dim, int half,
                                     double factor, float sign) {
    DYNAMIC_SHARED(memory);
    float *cosines = (float*)memory, *sines = cosines + half;
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        double angle = (double)positions[blockIdx.x] * frequencies[i];
        cosines[i] = (float)(factor * cos(angle));
        sines[i] = sign * (float)(factor * sin(angle));
    }
    __syncthreads();
    T* row = qkv + (long long)blockIdx.x * n_kv * (per_kv + 2) * dim;
    int chunks = (half + CHUNK - 1) / CHUNK, n_heads = n_kv * (per_kv + 1);
    for (int work = threadIdx.x; work < n_heads * chunks; work += blockDim.x) {
        // Queries and the key of a group are rotated, the value behind them is not.
        int head = work / chunks, at = work % chunks * CHUNK, n = half - at;
        T* first = row + (head / (per_kv + 1) * (per_kv + 2) + head % (per_kv + 1)) * dim + at;
        T* second = first + half;
        float a[CHUNK], b[CHUNK], x[CHUNK], y[CHUNK];
        load_chunk(a, first, n);
        load_chunk(b, second, n);
        for (int i = 0; i < CHUNK; i++) {
            float c = i < n ? cosines[at + i] : 0.0f, s = i < n ? sines[at + i] : 0.0f;
            x[i] = a[i] * c - b[i] * s;
            y[i] = b[i] * c + a[i] * s;
        }
        store_chunk(first, x, n);
        store_chunk(second, y, n);
    }
}

#define KERNEL(T, name)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                                                \
        rope_##name(T* qkv, const unsigned* positions, const double* frequencies, int per_kv, int n_kv, int dim, int half,          \
                    double factor, float sign) {                                                                                     \
        rope(qkv, positions, frequencies, per_kv, n_kv, dim, half, factor, sign);                                                    \
    }
KERNEL(float, f32)
KERNEL(bf16, bf16)
