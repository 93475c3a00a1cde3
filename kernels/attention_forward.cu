// Causal attention, forward (Device::attention). Grid (n_items, G), 128 threads; an item is up to 64 rows (mma) or 16 (fma) of
// one sequence, rows being (token, query head of the group). Items come longest first from the launcher.
// Registers (sm_90a, nvcc 13.0, no spills) and shared memory: d64 145, 46080 bytes; d128 186, 87040; d192 220, 128000; fma f32
// 128, bf16 124, (16 D + 32 (D + 1) + 32 D) * 4. By these, 3, 2 and 1 blocks an SM for d64, d128 and d192.
#include "attention_tile.cuh"

template <class T>
__device__ __forceinline__ Attend<T> over_qkv(T* out, float* lse, const T* qkv, int n_tokens, int per_kv, int n_groups, int dim) {
    const T* keys = qkv + (size_t)(blockIdx.y * (per_kv + 2) + per_kv) * dim;
    return Attend<T>{out, lse, nullptr, nullptr, qkv, keys, keys + dim, nullptr, n_groups * (per_kv + 2) * dim,
                     n_tokens, 0, per_kv, n_groups};
}

#define ATTENTION_MMA(D)                                                                                                             \
    extern "C" __global__ void __launch_bounds__(128, 2)                                                                              \
        attention_d##D##_bf16(bf16* out, float* lse, const bf16* qkv, const Item* items, int n_tokens, int per_kv, int n_groups,      \
                              float scale) {                                                                                         \
        after_predecessors();                                                                                                           \
        attend_mma<D, 2, false>(over_qkv(out, lse, qkv, n_tokens, per_kv, n_groups, D), items[blockIdx.x], scale);                      \
    }
ATTENTION_MMA(64)
ATTENTION_MMA(128)
ATTENTION_MMA(192)

#define ATTENTION_FMA(name, T)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(128, 2)                                                                              \
        name(T* out, float* lse, const T* qkv, const Item* items, int n_tokens, int per_kv, int n_groups, int dim, float scale) {     \
        after_predecessors();                                                                                                        \
        attend_fma<T>(over_qkv(out, lse, qkv, n_tokens, per_kv, n_groups, dim), items[blockIdx.x], dim, scale);                      \
    }
ATTENTION_FMA(attention_f32, float)
ATTENTION_FMA(attention_bf16, bf16)
