// Attention of a block of query rows over a range of keys, shared by attention_forward.cu and attention_cached.cu: tensor-core
// tiles with an online softmax in registers (FlashAttention-2, Dao 2023), and a plain FMA form for f32 and any other head dim.
//
// A row is (new token, query head of the group), token-major, so that the heads of a group share the keys a block reads. Row r
// of an item is token r / per_kv; it sees the keys below past + r / per_kv + 1. Knows nothing of the cache or of sequences.
#pragma once
#include "common.cuh"

// One block's work, made by the launcher; ints in this order.
struct Item {
    int first_token; // row of qkv and out of the item's token 0
    int n_tokens;    // new tokens of the sequence
    int past;        // keys before token 0
    int first_row;   // of this block's rows
    int key_begin;   // keys of this block
    int key_end;
    int key_row;     // row of key 0 in the key and value arrays; with pages, the sequence's first entry in their table
    int partial_row; // where the partial results of first_row go; -1: the result is whole
};

template <class T> struct Attend {
    T* out;           // [T, A*D]
    float* lse;       // [A, T] or null
    float* partial;   // [G, n_partial, D]
    float* partial_lse; // [G, n_partial]
    const T* qkv;     // [T, columns]
    const T* keys;    // of this block's group; rows of `stride`
    const T* values;
    const int* pages; // of the key and value arrays, for each sequence; null: a sequence's keys follow one another
    int stride;
    int n_tokens;     // T
    int n_partial;
    int per_kv;
    int n_groups;
};

#define PAGE_TOKENS 64

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

// Rows [0, ROWS) of a tile [64, D] in shared memory, rows of D + 8 so that ldmatrix meets no bank twice; past n_rows zeros, but in row
// `known` of them what `own`[D] holds. `row_at(i)` is the address of row i.
template <int D, int THREADS, int ROWS = 64, class RowAt>
__device__ __forceinline__ void load_tile(bf16* tile, int n_rows, RowAt row_at, int known = -1, const bf16* own = nullptr) {
    for (int i = threadIdx.x; i < ROWS * (D / 8); i += THREADS) {
        int row = i / (D / 8), column = i % (D / 8) * 8;
        bf16* to = tile + row * (D + 8) + column;
        if (row < n_rows)
            cp_async_16(to, row_at(row) + column);
        else
            *(uint4*)to = row == known ? *(const uint4*)(own + column) : make_uint4(0, 0, 0, 0);
    }
}

template <class T> __device__ __forceinline__ const T* query_row(const Attend<T>& how, const Item& item, int row, int dim) {
    size_t columns = (size_t)how.n_groups * (how.per_kv + 2) * dim;
    return how.qkv + (item.first_token + row / how.per_kv) * columns + (size_t)(blockIdx.y * (how.per_kv + 2) + row % how.per_kv) * dim;
}

// Row of the key that a tile begins with; the others follow it. A tile's size divides that of a page.
template <class T> __device__ __forceinline__ size_t tile_row(const Attend<T>& how, const Item& item, int first) {
    if (!how.pages) return (size_t)item.key_row + first;
    return (size_t)how.pages[item.key_row + first / PAGE_TOKENS] * PAGE_TOKENS + first % PAGE_TOKENS;
}

// Where a row's result goes: element `i` of the head, and its log-sum-exp.
template <class T> __device__ __forceinline__ void put(const Attend<T>& how, const Item& item, int row, int dim, int i, float x) {
    int head = blockIdx.y * how.per_kv + row % how.per_kv;
    size_t token = item.first_token + row / how.per_kv;
    if (item.partial_row < 0)
        store(how.out + (token * how.n_groups * how.per_kv + head) * dim + i, x + 0.0f); // no -0, as where shares are combined
    else
        publish(how.partial + ((size_t)blockIdx.y * how.n_partial + item.partial_row + row - item.first_row) * dim + i, x);
}
template <class T> __device__ __forceinline__ void put_lse(const Attend<T>& how, const Item& item, int row, float lse) {
    size_t head = blockIdx.y * how.per_kv + row % how.per_kv;
    if (item.partial_row >= 0)
        publish(how.partial_lse + (size_t)blockIdx.y * how.n_partial + item.partial_row + row - item.first_row, lse);
    else if (how.lse)
        how.lse[head * how.n_tokens + item.first_token + row / how.per_kv] = lse;
}

// What a block has in shared memory: Q, then a ring of STAGES tiles of K and V: (1 + 2 STAGES) * 64 * (D + 8) * 2 bytes. Where Q has 16
// rows there are, in the place of the others, the scores of 64 keys, 8 keys after 8, lane by lane, and room for the caller.
template <int D, int STAGES> struct Ring {
    static constexpr int ROW = D + 8, TILE = 64 * ROW;
    bf16* q;
    __device__ __forceinline__ bf16* keys(const Item& item, int first) const {
        return q + TILE + ((first - item.key_begin) / 64 % STAGES) * 2 * TILE;
    }
    __device__ __forceinline__ float4* scores() const { return (float4*)(q + 16 * ROW); }
    __device__ __forceinline__ float* spare() const { return (float*)(scores() + 8 * 32); }
    static constexpr int SPARE_BYTES = 2 * (TILE - 16 * ROW) - 8 * 32 * 16;
};

// The tiles of K and V from key `first` on, not waited for; zeros from `key_end` on. With `own`, key `past` behind them and its value are
// own[2, D].
template <int D, int STAGES>
__device__ __forceinline__ void fetch_tiles(Ring<D, STAGES> ring, const Attend<bf16>& how, const Item& item, int first, int key_end,
                                            const bf16* own = nullptr) {
    bf16* k = ring.keys(item, first);
    size_t row = tile_row(how, item, first);
    int known = own ? item.past - first : -1;
    auto at = [&](const bf16* from) {
        return [=](int i) { return from + (row + i) * how.stride; };
    };
    load_tile<D, 128>(k, key_end - first, at(how.keys), known, own);
    load_tile<D, 128>(k + Ring<D, STAGES>::TILE, key_end - first, at(how.values), known, own ? own + D : nullptr);
}

// 64 rows by 4 warps of 16, over tiles of 64 keys up to key_end of which all but one stage are under way: fetched by `fetch(first)`, a
// group of copies each, the first STAGES - 1 and Q by the caller. The bits do not depend on how many stages there are.
// FEW: at most 16 rows, as in decode steps, which one warp would work on while three have none. Each warp scores 16 of a tile's keys,
// hands its scores to the others through shared memory (in the place of Q's other rows), weighs all keys as the others do, and sums up a
// quarter of the dims: the same sums in the same order, so the same bits.
template <int D, int STAGES, bool FEW, class Fetch>
__device__ __forceinline__ void attend_tiles(Ring<D, STAGES> ring, const Attend<bf16>& how, const Item& item, int n_rows, int key_end,
                                             float scale, Fetch fetch) {
    constexpr int ROW = Ring<D, STAGES>::ROW, TILE = Ring<D, STAGES>::TILE;
    constexpr int OWN_KEYS = FEW ? 16 : 64, OWN_DIMS = FEW ? D / 4 : D;
    bf16* q = ring.q;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int warp_row = FEW ? 0 : warp * 16, first_key = FEW ? warp * OWN_KEYS : 0, first_dim = FEW ? warp * OWN_DIMS : 0;
    float4* scores = ring.scores();

    float o[OWN_DIMS / 8][4] = {}, most[2] = {MINUS_INFINITY, MINUS_INFINITY}, sum[2] = {0, 0};
    int row[2], visible[2];
    for (int h = 0; h < 2; h++) {
        row[h] = item.first_row + warp_row + lane / 4 + 8 * h;
        visible[h] = item.past + row[h] / how.per_kv + 1;
    }
    float factor = scale * LOG2_E;
    for (int first = item.key_begin; first < key_end; first += 64) {
        cp_async_wait<STAGES - 2>();
        __syncthreads(); // this stage is here, and nobody reads the one before any more
        if (first + (STAGES - 1) * 64 < key_end) fetch(first + (STAGES - 1) * 64);
        cp_async_commit();
        const bf16* k = ring.keys(item, first);
        float s[8][4] = {};
#pragma unroll
        for (int c = 0; c < D; c += 16) {
            unsigned a[4], b[4];
            ldmatrix_x4(a, q + (warp_row + lane % 16) * ROW + c + lane / 16 * 8);
#pragma unroll
            for (int n = 0; n < OWN_KEYS / 16; n++) {
                ldmatrix_x4(b, k + (first_key + n * 16 + lane % 8 + lane / 16 * 8) * ROW + c + lane / 8 % 2 * 8);
                mma_m16n8k16_bf16(s[2 * n], a, b);
                mma_m16n8k16_bf16(s[2 * n + 1], a, b + 2);
            }
        }
        if (FEW) {
            for (int n = 0; n < 2; n++) scores[(2 * warp + n) * 32 + lane] = make_float4(s[n][0], s[n][1], s[n][2], s[n][3]);
            __syncthreads(); // read before the next tile is here for all
#pragma unroll
            for (int n = 0; n < 8; n++) {
                float4 of = scores[n * 32 + lane];
                s[n][0] = of.x, s[n][1] = of.y, s[n][2] = of.z, s[n][3] = of.w;
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = most[h];
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    int key = first + n * 8 + lane % 4 * 2 + e;
                    if (key >= visible[h] || key >= key_end) s[n][2 * h + e] = MINUS_INFINITY;
                    top = fmaxf(top, s[n][2 * h + e]);
                }
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
            float base = top == MINUS_INFINITY ? 0.0f : top * factor;
            // 1 exactly where nothing larger came: a tile that a row does not see leaves no trace in it.
            float keep = most[h] == top ? 1.0f : exp2f(most[h] * factor - base);
            most[h] = top;
            sum[h] *= keep;
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    s[n][2 * h + e] = exp2f(s[n][2 * h + e] * factor - base);
                    sum[h] += s[n][2 * h + e];
                }
#pragma unroll
            for (int n = 0; n < OWN_DIMS / 8; n++) {
                o[n][2 * h] *= keep;
                o[n][2 * h + 1] *= keep;
            }
        }
#pragma unroll
        for (int c = 0; c < 4; c++) {
            unsigned a[4] = {pack_bf16(s[2 * c][0], s[2 * c][1]), pack_bf16(s[2 * c][2], s[2 * c][3]),
                             pack_bf16(s[2 * c + 1][0], s[2 * c + 1][1]), pack_bf16(s[2 * c + 1][2], s[2 * c + 1][3])};
#pragma unroll
            for (int n = 0; n < OWN_DIMS / 16; n++) {
                unsigned b[4];
                ldmatrix_x4_trans(b, k + TILE + (c * 16 + lane % 16) * ROW + first_dim + n * 16 + lane / 16 * 8);
                mma_m16n8k16_bf16(o[2 * n], a, b);
                mma_m16n8k16_bf16(o[2 * n + 1], a, b + 2);
            }
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float total = sum[h] + __shfl_xor_sync(0xffffffffu, sum[h], 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        if (row[h] - item.first_row >= n_rows) continue;
        float inverse = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
        for (int n = 0; n < OWN_DIMS / 8; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) put(how, item, row[h], D, first_dim + n * 8 + lane % 4 * 2 + e, o[n][2 * h + e] * inverse);
        if (lane % 4 == 0 && (!FEW || warp == 0)) put_lse(how, item, row[h], most[h] * scale + logf(total));
    }
}

// Of queries as they lie in qkv and keys that are all there.
template <int D, int STAGES, bool FEW> __device__ __forceinline__ void attend_mma(const Attend<bf16>& how, const Item& item, float scale) {
    DYNAMIC_SHARED(memory);
    Ring<D, STAGES> ring = {(bf16*)memory};
    int n_rows = min(64, item.n_tokens * how.per_kv - item.first_row);
    int key_end = min(item.key_end, item.past + (item.first_row + n_rows - 1) / how.per_kv + 1);
    auto fetch = [&](int first) { fetch_tiles(ring, how, item, first, key_end); };
    load_tile<D, 128, FEW ? 16 : 64>(ring.q, n_rows, [&](int i) { return query_row(how, item, item.first_row + i, D); });
    for (int i = 0; i < STAGES - 1; i++) {
        if (item.key_begin + i * 64 < key_end) fetch(item.key_begin + i * 64);
        cp_async_commit();
    }
    attend_tiles<D, STAGES, FEW>(ring, how, item, n_rows, key_end, scale, fetch);
}

// 16 rows by 4 warps of 4; lanes are keys in the scores and dims in the sums. Any dim <= 256.
// Shared: Q[16, D], K[32, D + 1], V[32, D], f32.
template <class T> __device__ __forceinline__ void attend_fma(const Attend<T>& how, const Item& item, int dim, float scale) {
    DYNAMIC_SHARED(memory);
    float *q = (float*)memory, *k = q + 16 * dim, *v = k + 32 * (dim + 1);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int n_rows = min(16, item.n_tokens * how.per_kv - item.first_row);
    int key_end = min(item.key_end, item.past + (item.first_row + n_rows - 1) / how.per_kv + 1);
    for (int i = threadIdx.x; i < 16 * dim; i += 128)
        q[i] = i / dim < n_rows ? to_float(query_row(how, item, item.first_row + i / dim, dim)[i % dim]) * scale : 0.0f;
    float o[4][8] = {}, most[4], sum[4] = {};
    for (int r = 0; r < 4; r++) most[r] = MINUS_INFINITY;
    for (int first = item.key_begin; first < key_end; first += 32) {
        __syncthreads();
        size_t row = tile_row(how, item, first);
        for (int i = threadIdx.x; i < 32 * dim; i += 128) {
            int key = i / dim, c = i % dim;
            bool here = first + key < key_end;
            size_t at = (row + key) * how.stride + c;
            k[key * (dim + 1) + c] = here ? to_float(how.keys[at]) : 0.0f;
            v[i] = here ? to_float(how.values[at]) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < 4; r++) {
            int visible = min(key_end, item.past + (item.first_row + warp * 4 + r) / how.per_kv + 1);
            float s = 0.0f;
            for (int c = 0; c < dim; c++) s = fmaf(q[(warp * 4 + r) * dim + c], k[lane * (dim + 1) + c], s);
            if (first + lane >= visible) s = MINUS_INFINITY;
            float top = fmaxf(most[r], warp_max(s)), base = top == MINUS_INFINITY ? 0.0f : top;
            float keep = expf(most[r] - base), p = expf(s - base);
            most[r] = top;
            sum[r] = sum[r] * keep + warp_sum(p);
#pragma unroll
            for (int i = 0; i < 8; i++) o[r][i] *= keep;
            for (int key = 0; key < 32; key++) {
                float weight = __shfl_sync(0xffffffffu, p, key);
#pragma unroll
                for (int i = 0; i < 8; i++)
                    if (lane + 32 * i < dim) o[r][i] = fmaf(weight, v[key * dim + lane + 32 * i], o[r][i]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
        if (warp * 4 + r >= n_rows) continue;
        int row = item.first_row + warp * 4 + r;
        float inverse = sum[r] > 0.0f ? 1.0f / sum[r] : 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (lane + 32 * i < dim) put(how, item, row, dim, lane + 32 * i, o[r][i] * inverse);
        if (lane == 0) put_lse(how, item, row, most[r] + logf(sum[r]));
    }
}
