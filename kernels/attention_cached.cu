// Attention over a KV cache (Device::attention_cached), two launches: the new keys and values go to the cache; each item attends over its
// share of the keys (split-K, so that a decode fills the machine), and the last of a row's shares to be done combines them. A decode step
// (Device::rope_attention_cached of one token a sequence) is one launch: each block rotates its queries itself, and the one in whose share
// the new token is its key too. Where shares end depends on the position in the sequence only, and a share of which a row sees nothing adds
// exactly nothing: so a row has the same bits whatever rows it was computed with.
// append: grid (n new tokens), 128 threads. attend, and rope_attend of a decode step: grid (n_items, G), 128 threads; "deep" with four
// stages of keys in the place of two, where blocks are so few that each has a processor for itself.
// Registers (sm_90a, nvcc 13.0, no spills) and shared memory of attend as of attention_forward.cu and a word: d64 142, d128 182, d192 220,
// fma 120; deep d64 157, 82944 bytes; d128 193, 156672; d192 234, 230400; append 40, no shared memory. rope_attend: d64 95, d128 117, d192
// 127, and 119 where d128 is deep; 40 bytes of stack for angles past 2^31. A decode fills only per_kv of the 64 rows of a tile.
#include "attention_tile.cuh"
#include "rope.cuh"
#include "rows.cuh"

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

// How the keys of a block of rows are shared out, for each item.
struct Shares {
    int n;
    int partial_row; // of the first share and the first row; n_rows further are those of the next share
    int counter;     // of its groups: shares that are done; 0 before and after a launch
};

// A row of a group: out = sum_i exp(lse_i - max) o_i / sum_i exp(lse_i - max), i over its shares from row `first` of the partial results
// on, `step` rows apart: the upper sum with i ascending, the lower by lanes, lane l with those of i % 32 = l. What nothing was seen in
// adds 0 to either, which changes no bit. By one warp.
template <class T>
__device__ __forceinline__ void combine(T* out, const float* partial, const float* partial_lse, size_t first, int step, int n_shares,
                                        int dim) {
    constexpr int MOST = 8; // dims of a lane
    int lane = threadIdx.x % 32;
    float top = MINUS_INFINITY, total = 0.0f, sum[MOST] = {};
    for (int i = lane; i < n_shares; i += 32) top = fmaxf(top, load_published(partial_lse + first + (size_t)i * step));
    top = warp_max(top);
    for (int begin = 0; begin < n_shares; begin += 32) {
        float mine = begin + lane < n_shares ? expf(load_published(partial_lse + first + (size_t)(begin + lane) * step) - top) : 0.0f;
        int n = min(32, n_shares - begin);
        total += mine;
#pragma unroll 4
        for (int i = 0; i < n; i++) {
            float weight = __shfl_sync(0xffffffffu, mine, i);
            const float* from = partial + (first + (size_t)(begin + i) * step) * dim;
#pragma unroll
            for (int h = 0; h < MOST; h++)
                if (lane + 32 * h < dim) sum[h] = fmaf(weight, load_published(from + lane + 32 * h), sum[h]);
        }
    }
    total = warp_sum(total);
#pragma unroll
    for (int h = 0; h < MOST; h++)
        if (lane + 32 * h < dim) store(out + lane + 32 * h, sum[h] / total);
}

// After a block's share: the block whose share is the last to be done combines those of all of its rows, in their order, so that no bit
// depends on which it is. `tile` is the most rows of an item.
template <class T>
__device__ __forceinline__ void combine_by_the_last(const Attend<T>& how, const Item& item, const Shares& shares, unsigned* counters, int dim,
                                                    int tile) {
    __shared__ bool is_last;
    if (shares.n == 1) return;
    device_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
        unsigned* counter = counters + shares.counter * gridDim.y + blockIdx.y;
        is_last = count_published(counter) == shares.n - 1;
        if (is_last) *counter = 0; // for the next launch
    }
    __syncthreads();
    if (!is_last) return;
    device_fence();
    int n_rows = min(tile, item.n_tokens * how.per_kv - item.first_row);
    for (int i = threadIdx.x / 32; i < n_rows; i += blockDim.x / 32) {
        int row = item.first_row + i;
        size_t head = blockIdx.y * how.per_kv + row % how.per_kv, token = item.first_token + row / how.per_kv;
        T* out = how.out + (token * how.n_groups * how.per_kv + head) * dim;
        combine(out, how.partial, how.partial_lse, (size_t)blockIdx.y * how.n_partial + shares.partial_row + i, n_rows, shares.n, dim);
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
template <int D> __device__ __forceinline__ void hint_at_keys(const Attend<bf16>& how, const Item& item, int begin, int end) {
    for (int key = begin + threadIdx.x; key < end; key += blockDim.x) {
        size_t at = tile_row(how, item, key) * how.stride;
        hint_at(how.keys + at, D * sizeof(bf16));
        hint_at(how.values + at, D * sizeof(bf16));
    }
}

// Zeros in 16 rows of Q.
template <int D, int STAGES> __device__ __forceinline__ void clear_queries(Ring<D, STAGES> ring) {
    load_tile<D, 128, 16>(ring.q, 0, [](int) { return (const bf16*)nullptr; });
}

// Of a sequence's one new token, out of its row of qkv, where `past` keys are in the cache: the query heads of this block's group, rotated,
// to the first rows of Q; and where the token is in this block's share, its key, rotated, and its value to own[2, D] and to the cache.
template <int D, int STAGES>
__device__ __forceinline__ void bring_token(Ring<D, STAGES> ring, bf16* own, bf16* keys, bf16* values, const Attend<bf16>& how,
                                            const Item& item, const float* cosines, int half) {
    const bf16* heads = query_row(how, item, 0, D); // queries of the group, its key, its value
    const float* sines = cosines + half;
    bool is_here = item.key_begin <= item.past && item.past < item.key_end;
    size_t to = is_here ? tile_row(how, item, item.past) * how.stride + (size_t)blockIdx.y * D : 0;
    bool has_value = is_here && threadIdx.x < D / CHUNK;
    uint4 value = {};
    if (has_value) value = *(const uint4*)(heads + (how.per_kv + 1) * D + threadIdx.x * CHUNK);
    // Chunks of the first half of what is rotated, each with its partner, then those of what is not.
    int turned = half / CHUNK, chunks = D / CHUNK - turned;
    for (int work = threadIdx.x; work < (how.per_kv + is_here) * chunks; work += 128) {
        int head = work / chunks, chunk = work % chunks, at = chunk * CHUNK;
        bool is_key = head == how.per_kv;
        const bf16* from = heads + head * D;
        bf16* row = is_key ? own : ring.q + head * ring.ROW;
        if (chunk < turned) {
            float x[CHUNK], y[CHUNK];
            load_whole(x, from + at);
            load_whole(y, from + half + at);
            for (int i = 0; i < CHUNK; i++) turn_pair(x[i], y[i], cosines[at + i], sines[at + i]);
            store_whole(row + at, x);
            store_whole(row + half + at, y);
            if (is_key) store_whole(keys + to + at, x);
            if (is_key) store_whole(keys + to + half + at, y);
        } else {
            uint4 same = *(const uint4*)(from + half + at);
            *(uint4*)(row + half + at) = same;
            if (is_key) *(uint4*)(keys + to + half + at) = same;
        }
    }
    if (has_value) {
        *(uint4*)(own + D + threadIdx.x * CHUNK) = value;
        *(uint4*)(values + to + threadIdx.x * CHUNK) = value;
    }
}

// Rotation, new row of the cache and attention of an item of at most 16 rows, all of a sequence's one new token. half: a multiple of
// CHUNK. Ahead of qkv a block fetches keys that were there before the step: recorded work writes the rows of its own tokens alone, which
// follow them.
template <int D, int STAGES>
__device__ __forceinline__ void rope_attend(bf16* out, float* partial, float* partial_lse, const bf16* qkv, bf16* keys, bf16* values,
                                            const int* pages, const Item* items, const Shares* shares, unsigned* counters, int n_partial,
                                            int per_kv, int n_groups, const unsigned* positions, const double* frequencies, int half,
                                            double factor, float scale) {
    DYNAMIC_SHARED(memory);
    let_successor_come();
    Ring<D, STAGES> ring = {(bf16*)memory};
    static_assert(ring.SPARE_BYTES >= D * sizeof(float) + 2 * D * sizeof(bf16), "no room for angles and own");
    float* angles = ring.spare();
    bf16* own = (bf16*)(angles + D);
    Item item = items[blockIdx.x];
    auto how = over_cache(out, partial, partial_lse, qkv, keys, values, pages, n_partial, per_kv, n_groups, D);
    int end = min(item.key_end, item.past), n_tiles = 0; // in the cache; of those that were asked for
    auto fetch = [&](int first) { fetch_tiles(ring, how, item, first, end, own); };
    for (; n_tiles < STAGES - 1 && item.key_begin + (n_tiles + 1) * 64 <= end; n_tiles++) {
        fetch(item.key_begin + n_tiles * 64);
        cp_async_commit();
    }
    hint_at_keys<D>(how, item, item.key_begin + n_tiles * 64, end);
    clear_queries(ring);
    make_angles(angles, positions[item.first_token], frequencies, half, factor, 1.0f);
    wait_for_predecessors();
    __syncthreads(); // angles and zeros are there
    bring_token(ring, own, keys, values, how, item, angles, half);
    __syncthreads(); // own is there
    for (; n_tiles < STAGES - 1; n_tiles++) {
        if (item.key_begin + n_tiles * 64 < item.key_end) fetch(item.key_begin + n_tiles * 64);
        cp_async_commit();
    }
    attend_tiles<D, STAGES, true>(ring, how, item, per_kv, item.key_end, scale, fetch);
    combine_by_the_last(how, item, shares[blockIdx.x], counters, D, 64);
}

#define CACHED_MMA(name, D, STAGES)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128, STAGES == 2 ? 2 : 1)                                                           \
        attention_##name##_d##D##_bf16(bf16* out, float* partial, float* partial_lse, const bf16* qkv, const bf16* keys,             \
                                     const bf16* values, const int* pages, const Item* items, const Shares* shares,                  \
                                     unsigned* counters, int n_partial, int per_kv, int n_groups, float scale) {                     \
        let_successor_come();                                                                                                        \
        Item item = items[blockIdx.x];                                                                                               \
        auto how = over_cache(out, partial, partial_lse, qkv, keys, values, pages, n_partial, per_kv, n_groups, D);                  \
        hint_at_keys<D>(how, item, item.key_begin, item.key_end);                                                                    \
        wait_for_predecessors();                                                                                                     \
        if (item.n_tokens * per_kv - item.first_row <= 16) attend_mma<D, STAGES, true>(how, item, scale);                            \
        else attend_mma<D, STAGES, false>(how, item, scale);                                                                         \
        combine_by_the_last(how, item, shares[blockIdx.x], counters, D, 64);                                                         \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(128, STAGES == 2 ? 2 : 1)                                                           \
        attention_rope_##name##_d##D##_bf16(bf16* out, float* partial, float* partial_lse, const bf16* qkv, bf16* keys,              \
                                            bf16* values, const int* pages, const Item* items, const Shares* shares,                 \
                                            unsigned* counters, int n_partial, int per_kv, int n_groups, const unsigned* positions,  \
                                            const double* frequencies, int half, double factor, float scale) {                       \
        rope_attend<D, STAGES>(out, partial, partial_lse, qkv, keys, values, pages, items, shares, counters, n_partial, per_kv,      \
                               n_groups, positions, frequencies, half, factor, scale);                                               \
    }
CACHED_MMA(cached, 64, 2)
CACHED_MMA(cached, 128, 2)
CACHED_MMA(cached, 192, 2)
CACHED_MMA(cached_deep, 64, 4)
CACHED_MMA(cached_deep, 128, 4)
CACHED_MMA(cached_deep, 192, 4)

#define CACHED(suffix, T)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(128, 4)                                                                             \
        attention_cached_##suffix(T* out, float* partial, float* partial_lse, const T* qkv, const T* keys, const T* values,          \
                                  const int* pages, const Item* items, const Shares* shares, unsigned* counters, int n_partial,      \
                                  int per_kv, int n_groups, int dim, float scale) {                                                  \
        after_predecessors();                                                                                                        \
        Item item = items[blockIdx.x];                                                                                               \
        auto how = over_cache(out, partial, partial_lse, qkv, keys, values, pages, n_partial, per_kv, n_groups, dim);                \
        attend_fma<T>(how, item, dim, scale);                                                                                        \
        combine_by_the_last(how, item, shares[blockIdx.x], counters, dim, 16);                                                       \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(128)                                                                                \
        attention_append_##suffix(T* keys, T* values, const T* qkv, const int* tokens, int per_kv, int n_groups, int dim) {          \
        after_predecessors();                                                                                                        \
        append<T>(keys, values, qkv, tokens, per_kv, n_groups, dim);                                                                 \
    }
CACHED(f32, float)
CACHED(bf16, bf16)
