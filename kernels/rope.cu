// Rotary embedding of the queries and keys of packed rows, in place; in a pass over a cache (Device::rope_attention_cached) keys and
// values go to their rows of the cache as well.
// Grid: one block of 256 threads for each token; dynamic shared memory for cos and sin of the token's angles, computed in f64,
// times the attention factor, and rounded once. Limited by memory, when there are many heads; by the f64 angles when there are few.
#include "rows.cuh"
#include "rope.cuh"

// Rotates the queries and keys of a row; calls also(group, at, turned, n) with the chunks of each key head.
template <class T, class Also>
__device__ __forceinline__ void turn(T* row, const float* cosines, int per_kv, int n_kv, int dim, int half, Also also) {
    const float* sines = cosines + half;
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
            x[i] = a[i], y[i] = b[i];
            turn_pair(x[i], y[i], c, s);
        }
        store_chunk(first, x, n);
        store_chunk(second, y, n);
        if (head % (per_kv + 1) < per_kv) continue;
        also(head / (per_kv + 1), at, x, n);
        also(head / (per_kv + 1), at + half, y, n);
    }
}

// qkv[T, (A+2G)D], positions[T], frequencies[half]; half = rotary_dims / 2; sign -1 rotates back, times the same factor.
template <class T>
__device__ __forceinline__ void rope(T* qkv, const unsigned* positions, const double* frequencies, int per_kv, int n_kv, int dim, int half,
                                     double factor, float sign) {
    DYNAMIC_SHARED(memory);
    make_angles((float*)memory, positions[blockIdx.x], frequencies, half, factor, sign);
    __syncthreads();
    T* row = qkv + (long long)blockIdx.x * n_kv * (per_kv + 2) * dim;
    turn(row, (const float*)memory, per_kv, n_kv, dim, half, [](int, int, const float*, int) {});
}

// Dims `at`.. of the keys (head per_kv of each group) or values (per_kv + 1), the bits as they are, by words: to[G, D].
template <class Word, class T>
__device__ __forceinline__ void copy_words(T* to, const T* row, int head, int per_kv, int n_kv, int at, int dim) {
    constexpr int SIZE = sizeof(Word) / sizeof(T);
    int n = (dim - at) / SIZE;
    for (int i = threadIdx.x; i < n_kv * n; i += blockDim.x) {
        int group = i / n, d = at + i % n * SIZE;
        *(Word*)(to + group * dim + d) = *(const Word*)(row + (group * (per_kv + 2) + head) * dim + d);
    }
}
template <class T>
__device__ __forceinline__ void copy_heads(T* to, const T* row, int head, int per_kv, int n_kv, int at, int dim) {
    constexpr int WORD = 16 / sizeof(T); // elements that are moved together, where a head begins at a multiple of so many
    if (dim % WORD == 0 && at % WORD == 0) copy_words<uint4>(to, row, head, per_kv, n_kv, at, dim);
    else copy_words<T>(to, row, head, per_kv, n_kv, at, dim);
}

// The same forward, of the tokens[n, 2] of a pass over a cache: the row of qkv (and its position's) and the row of the cache. keys and
// values: [n_pages * PAGE_TOKENS, G*D].
template <class T>
__device__ __forceinline__ void rope_append(T* qkv, T* keys, T* values, const unsigned* positions, const double* frequencies,
                                            const int* tokens, int per_kv, int n_kv, int dim, int half, double factor) {
    DYNAMIC_SHARED(memory);
    let_successor_come();
    int from = tokens[2 * blockIdx.x], to = tokens[2 * blockIdx.x + 1];
    make_angles((float*)memory, positions[from], frequencies, half, factor, 1.0f);
    wait_for_predecessors();
    __syncthreads();
    T* row = qkv + (size_t)from * n_kv * (per_kv + 2) * dim;
    keys += (size_t)to * n_kv * dim;
    values += (size_t)to * n_kv * dim;
    turn(row, (const float*)memory, per_kv, n_kv, dim, half,
         [&](int group, int at, const float* turned, int n) { store_chunk(keys + group * dim + at, turned, n); });
    copy_heads(keys, row, per_kv, per_kv, n_kv, 2 * half, dim);
    copy_heads(values, row, per_kv + 1, per_kv, n_kv, 0, dim);
}

// angles[T, half] = (cos, sin), for kernels that rotate by them; a thread each.
extern "C" __global__ void __launch_bounds__(256) rope_angles_f32(float2* angles, const unsigned* positions, const double* frequencies,
                                                                  int n_tokens, int half, double factor, float sign) {
    after_predecessors();
    size_t at = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (at < (size_t)n_tokens * half) angles[at] = angle_of(positions[at / half], frequencies[at % half], factor, sign);
}

#define KERNEL(T, name)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                                                \
        rope_##name(T* qkv, const unsigned* positions, const double* frequencies, int per_kv, int n_kv, int dim, int half,           \
                    double factor, float sign) {                                                                                     \
        after_predecessors();                                                                                                        \
        rope(qkv, positions, frequencies, per_kv, n_kv, dim, half, factor, sign);                                                    \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256)                                                                                \
        rope_append_##name(T* qkv, T* keys, T* values, const unsigned* positions, const double* frequencies, const int* tokens,      \
                           int per_kv, int n_kv, int dim, int half, double factor) {                                                 \
        rope_append(qkv, keys, values, positions, frequencies, tokens, per_kv, n_kv, dim, half, factor);                             \
    }
KERNEL(float, f32)
KERNEL(bf16, bf16)
