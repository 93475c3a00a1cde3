// Attention over a KV cache (Device::attention_cached), three launches: the new keys and values go to the cache; each item
// attends over its share of the keys (split-K, so that a decode fills the machine); shares are combined in order. Where shares end
// depends on the position in the sequence only, and a share of which a row sees nothing adds exactly nothing: so a row has the same
// bits whatever rows it was computed with.
// append: grid (n new tokens), 128 threads. attend: grid (n_items, G), 128 threads; "deep" with four stages of keys in the place of two,
// where blocks are so few that each has a processor for itself. combine: grid (n_rows, G), 128 threads.
// Registers (sm_90a, nvcc 13.0, no spills) and shared memory of attend as of attention_forward.cu: d64 151, d128 186, d192 226,
// fma 96; deep d64 151, 82944 bytes; d128 186, 156672; d192 225, 230400; append 40, combine 32, no shared memory. A decode fills only
// per_kv of the 64 rows of a tile.
#include "attention_tile.cuh"

// tokens[n, 2]: the row of qkv and the row of the cache. keys and values: [n_pages * PAGE_TOKENS, G*D].
template <class T>
__device__ __forceinline__ void append(T* keys, T* values, const T* qkv, const int* tokens, int per_kv, int n_groups, int dim) {
    const T* from = qkv + (size_t)tokens[2 * blockIdx.x] * n_groups * (per_kv + 2) * dim;
    size_t to = (size_t)tokens[2 * blockIdx.x + 1] * n_groups * dim;
    constexpr int WORD = 16 / sizeof(T); // elements that are moved together, where a head begins at a multiple of so many
    if (dim % WORD == 0) {
        for (int i = threadIdx.x * WORD; i < n_groups * dim; i += 128 * WORD) {
            const T* key = from + (i / dim * (per_kv + 2) + per_kv) * dim + i % dim;
            uint4 both[2] = {*(const uint4*)key, *(const uint4*)(key + dim)};
            *(uint4*)(keys + to + i) = both[0];
            *(uint4*)(values + to + i) = both[1];
        }
        return;
    }
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

// out = sum_i exp(lse_i - max) o_i / sum_i exp(lse_i - max): the upper sum with i ascending, the lower by lanes, lane l with those of
// i % 32 = l. What nothing was seen in adds 0 to either, which changes no bit.
template <class T>
__device__ __forceinline__ void combine(T* out, const float* partial, const float* partial_lse, const Combined* rows, int n_partial,
                                        int per_kv, int n_groups, int dim) {
    Combined c = rows[blockIdx.x];
    size_t first = (size_t)blockIdx.y * n_partial + c.partial_row;
    int lane = threadIdx.x % 32;
    float top = MINUS_INFINITY, total = 0.0f, sum[2] = {}; // of two dims: there are at most 256
    for (int i = lane; i < c.n_shares; i += 32) top = fmaxf(top, partial_lse[first + (size_t)i * c.step]);
    top = warp_max(top);
    for (int begin = 0; begin < c.n_shares; begin += 32) {
        float mine = begin + lane < c.n_shares ? expf(partial_lse[first + (size_t)(begin + lane) * c.step] - top) : 0.0f;
        int n = min(32, c.n_shares - begin);
        total += mine;
#pragma unroll 4
        for (int i = 0; i < n; i++) {
            float weight = __shfl_sync(0xffffffffu, mine, i);
            const float* from = partial + (first + (size_t)(begin + i) * c.step) * dim;
            for (int h = 0; h < 2; h++)
                if (threadIdx.x + 128 * h < dim) sum[h] = fmaf(weight, from[threadIdx.x + 128 * h], sum[h]);
        }
    }
    total = warp_sum(total);
    size_t head = blockIdx.y * per_kv + c.row % per_kv, token = c.first_token + c.row / per_kv;
    for (int h = 0; h < 2; h++) {
        int d = threadIdx.x + 128 * h;
        if (d < dim) store(out + (token * n_groups * per_kv + head) * dim + d, sum[h] / total);
    }
}

template <class T>
__device__ __forceinline__ Attend<T> over_cache(T* out, float* partial, float* partial_lse, const T* qkv, const T* keys, const T* values,
                                                const int* pages, int n_partial, int per_kv, int n_groups, int dim) {
    size_t group = (size_t)blockIdx.y * dim;
    return Attend<T>{out, nullptr, partial, partial_lse, qkv, keys + group, values + group, pages, n_groups * dim, 0, n_partial, per_kv,
                     n_groups};
}

// Keys and values that a block reads, hinted at before its queries are there.
template <int D> __device__ __forceinline__ void hint_at_keys(const Attend<bf16>& how, const Item& item) {
    for (int key = item.key_begin + threadIdx.x; key < item.key_end; key += blockDim.x) {
        size_t at = tile_row(how, item, key) * how.stride;
        hint_at(how.keys + at, D * sizeof(bf16));
        hint_at(how.values + at, D * sizeof(bf16));
    }
}

#define CACHED_MMA(name, D, STAGES)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128, STAGES == 2 ? 2 : 1)                                                           \
        attention_##name##_d##D##_bf16(bf16* out, float* partial, float* partial_lse, const bf16* qkv, const bf16* keys,             \
                                     const bf16* values, const int* pages, const Item* items, int n_partial, int per_kv,             \
                                     int n_groups, float scale) {                                                                    \
        let_successor_come();                                                                                                        \
        Item item = items[blockIdx.x];                                                                                               \
        auto how = over_cache(out, partial, partial_lse, qkv, keys, values, pages, n_partial, per_kv, n_groups, D);                  \
        hint_at_keys<D>(how, item);                                                                                                  \
        wait_for_predecessors();                                                                                                     \
        attend_mma<D, STAGES>(how, item, scale);                                                                                     \
    }
CACHED_MMA(cached, 64, 2)
CACHED_MMA(cached, 128, 2)
CACHED_MMA(cached, 192, 2)
CACHED_MMA(cached_deep, 64, 4)
CACHED_MMA(cached_deep, 128, 4)
CACHED_MMA(cached_deep, 192, 4)

#define CACHED(suffix, T)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(128)                                                                                \
        attention_cached_##suffix(T* out, float* partial, float* partial_lse, const T* qkv, const T* keys, const T* values,          \
                                  const int* pages, const Item* items, int n_partial, int per_kv, int n_groups, int dim,             \
                                  float scale) {                                                                                     \
        after_predecessors();                                                                                                        \
        attend_fma<T>(over_cache(out, partial, partial_lse, qkv, keys, values, pages, n_partial, per_kv, n_groups, dim),             \
                      items[blockIdx.x], dim, scale);                                                                                \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(128)                                                                                \
        attention_append_##suffix(T* keys, T* values, const T* qkv, const int* tokens, int per_kv, int n_groups, int dim) {          \
        after_predecessors();                                                                                                        \
        append<T>(keys, values, qkv, tokens, per_kv, n_groups, dim);                                                                 \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(128)                                                                                \
        attention_combine_##suffix(T* out, const float* partial, const float* partial_lse, const Combined* rows, int n_partial,      \
                                   int per_kv, int n_groups, int dim) {                                                              \
        after_predecessors();                                                                                                        \
        combine<T>(out, partial, partial_lse, rows, n_partial, per_kv, n_groups, dim);                                               \
    }
CACHED(f32, float)
CACHED(bf16, bf16)
