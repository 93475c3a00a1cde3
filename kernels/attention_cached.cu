// Attention over a KV cache (Device::attention_cached), three launches: the new keys and values go to the cache; each item
// attends over its share of the keys (split-K, so that a decode fills the machine); shares are combined in order. Where shares end
// depends on the position in the sequence only, and a share of which a row sees nothing adds exactly nothing: so a row has the same
// bits whatever rows it was computed with.
// append: grid (n new tokens), 128 threads. attend: grid (n_items, G), 128 threads. combine: grid (n_rows, G), 32 threads.
// Registers (sm_90a, nvcc 13.0, no spills) and shared memory of attend as of attention_forward.cu: d64 145, d128 186, d192 223,
// fma 96; append 32, combine f32 54, bf16 50, no shared memory. A decode fills only per_kv of the 64 rows of a tile.
#include "attention_tile.cuh"

// tokens[n, 2]: the row of qkv and the row of the cache. keys and values: [n_pages * PAGE_TOKENS, G*D].
template <class T>
__device__ __forceinline__ void append(T* keys, T* values, const T* qkv, const int* tokens, int per_kv, int n_groups, int dim) {
    const T* from = qkv + (size_t)tokens[2 * blockIdx.x] * n_groups * (per_kv + 2) * dim;
    size_t to = (size_t)tokens[2 * blockIdx.x + 1] * n_groups * dim;
    for (int i = threadIdx.x; i < n_groups * dim; i += 128) {
        const T* key = from + (i / dim * (per_kv + 2) + per_kv) * dim + i % dim;
        keys[to + i] = key[0];
        values[to + i] = key[dim];
    }
}

// A row and its shares.
struct Combined {
    int first_token;
    int row;         // (token, head) of the item
    int partial_row; // of the first share
    int step;        // rows from a share to the next
    int n_shares;
};

// out = sum_i exp(lse_i - max) o_i / sum_i exp(lse_i - max), i ascending.
template <class T>
__device__ __forceinline__ void combine(T* out, const float* partial, const float* partial_lse, const Combined* rows, int n_partial,
                                        int per_kv, int n_groups, int dim) {
    Combined c = rows[blockIdx.x];
    size_t first = (size_t)blockIdx.y * n_partial + c.partial_row;
    float top = MINUS_INFINITY, total = 0.0f;
    for (int i = 0; i < c.n_shares; i++) top = fmaxf(top, partial_lse[first + (size_t)i * c.step]);
    for (int i = 0; i < c.n_shares; i++) total += expf(partial_lse[first + (size_t)i * c.step] - top);
    size_t head = blockIdx.y * per_kv + c.row % per_kv, token = c.first_token + c.row / per_kv;
    for (int d = threadIdx.x; d < dim; d += 32) {
        float sum = 0.0f;
        for (int i = 0; i < c.n_shares; i++) {
            size_t at = first + (size_t)i * c.step;
            sum = fmaf(expf(partial_lse[at] - top), partial[at * dim + d], sum);
        }
        store(out + (token * n_groups * per_kv + head) * dim + d, sum / total);
    }
}

template <class T>
__device__ __forceinline__ Attend<T> over_cache(T* out, float* partial, float* partial_lse, const T* qkv, const T* keys, const T* values,
                                                const int* pages, int n_partial, int per_kv, int n_groups, int dim) {
    size_t group = (size_t)blockIdx.y * dim;
    return Attend<T>{out, nullptr, partial, partial_lse, qkv, keys + group, values + group, pages, n_groups * dim, 0, n_partial, per_kv,
                     n_groups};
}

#define CACHED_MMA(D)                                                                                                                \
    extern "C" __global__ void __launch_bounds__(128, 2)                                                                              \
        attention_cached_d##D##_bf16(bf16* out, float* partial, float* partial_lse, const bf16* qkv, const bf16* keys,               \
                                     const bf16* values, const int* pages, const Item* items, int n_partial, int per_kv,             \
                                     int n_groups, float scale) {                                                                    \
        attend_mma<D>(over_cache(out, partial, partial_lse, qkv, keys, values, pages, n_partial, per_kv, n_groups, D),               \
                      items[blockIdx.x], scale);                                                                                     \
    }
CACHED_MMA(64)
CACHED_MMA(128)
CACHED_MMA(192)

#define CACHED(suffix, T)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(128)                                                                                \
        attention_cached_##suffix(T* out, float* partial, float* partial_lse, const T* qkv, const T* keys, const T* values,          \
                                  const int* pages, const Item* items, int n_partial, int per_kv, int n_groups, int dim,             \
                                  float scale) {                                                                                     \
        attend_fma<T>(over_cache(out, partial, partial_lse, qkv, keys, values, pages, n_partial, per_kv, n_groups, dim),             \
                      items[blockIdx.x], dim, scale);                                                                                \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(128)                                                                                \
        attention_append_##suffix(T* keys, T* values, const T* qkv, const int* tokens, int per_kv, int n_groups, int dim) {           \
        append<T>(keys, values, qkv, tokens, per_kv, n_groups, dim);                                                                 \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(32)                                                                                 \
        attention_combine_##suffix(T* out, const float* partial, const float* partial_lse, const Combined* rows, int n_partial,      \
                                   int per_kv, int n_groups, int dim) {                                                              \
        combine<T>(out, partial, partial_lse, rows, n_partial, per_kv, n_groups, dim);                                               \
    }
CACHED(f32, float)
CACHED(bf16, bf16)
