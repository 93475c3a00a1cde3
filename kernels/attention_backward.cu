// Causal attention, backward (Device::attention_backward; FlashAttention-2, Dao 2023, algorithm 2 in two passes): weights are
// recomputed from the kept log-sum-exp. Three launches, no atomics, so the same input gives the same bits:
//   delta: 128 threads for 16 rows of [T, A], eight a row: delta[A, T] = dout . out.
//   dq:    grid (n_tiles, A), 128 threads: a tile of queries of one head over the keys it sees.
//   dkv:   grid (n_tiles, G), 256 threads (mma) or 128 (fma): a tile of keys over the queries that see it, the query heads of
//          the group in order, so dk and dv are whole in one block.
// Scores and the gradients of weights are computed in both passes: 7 products where one pass with atomics has 5.
// Tiles: 64 rows (mma), 16 rows (fma), made by the launcher.
// Registers (sm_90a, nvcc 13.0, no spills) and shared memory: dq d64 127, 55296 bytes; d128 169, 104448; d192 239, 153600;
// dkv d64 128, 73728; d128 160, 122880; d192 216, 172032; fma dq 125, dkv f32 156, bf16 159, (32 D + 64 (D + 1)) * 4; delta 32.
#include "rows.cuh"

#define LOG2_E 1.4426950408889634f

// Rows first_row.. of the sequence of n_tokens rows from first_token.
struct Tile {
    int first_token;
    int n_tokens;
    int first_row;
};

template <class T> struct Backward {
    T* dqkv;            // [T, columns]
    const T* dout;      // [T, A*D]
    const float* delta; // [A, T]
    const float* lse;   // [A, T]
    const T* qkv;       // [T, columns]
    int n_tokens;       // T
    int per_kv;
    int n_groups;
};

template <class T>
__device__ __forceinline__ void row_dots(float* delta, const T* dout, const T* out, int n_tokens, int n_heads, int dim) {
    long long row = (long long)blockIdx.x * 16 + threadIdx.x / 8, n_rows = (long long)n_tokens * n_heads;
    int lane = threadIdx.x % 8;
    float sum = 0.0f;
    for (int at = lane * CHUNK; row < n_rows && at < dim; at += 8 * CHUNK) {
        float x[CHUNK], y[CHUNK];
        load_chunk(x, dout + row * dim + at, dim - at);
        load_chunk(y, out + row * dim + at, dim - at);
        for (int i = 0; i < CHUNK; i++) sum = fmaf(x[i], y[i], sum);
    }
    for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0 && row < n_rows) delta[row % n_heads * n_tokens + row / n_heads] = sum;
}

// A tile [64, D] in rows of D + 8 (ldmatrix meets no bank twice); zeros past n_rows.
template <int D, int THREADS> __device__ __forceinline__ void load_tile(bf16* tile, int n_rows, const bf16* from, size_t stride) {
    for (int i = threadIdx.x; i < 64 * (D / 8); i += THREADS) {
        int row = i / (D / 8), column = i % (D / 8) * 8;
        bf16* to = tile + row * (D + 8) + column;
        if (row < n_rows)
            cp_async_16(to, from + row * stride + column);
        else
            *(uint4*)to = make_uint4(0, 0, 0, 0);
    }
}

// c[16, 8 N] = a[16 rows of `a`, D] b[8 N rows of `b`, D]^T, rows of D + 8 in shared memory.
template <int D, int N> __device__ __forceinline__ void product_nt(float (*c)[4], const bf16* a, const bf16* b) {
    constexpr int ROW = D + 8;
    int lane = threadIdx.x % 32;
#pragma unroll 4
    for (int d = 0; d < D; d += 16) {
        unsigned x[4], y[4];
        ldmatrix_x4(x, a + lane % 16 * ROW + d + lane / 16 * 8);
#pragma unroll
        for (int n = 0; n < N / 2; n++) {
            ldmatrix_x4(y, b + (n * 16 + lane % 8 + lane / 16 * 8) * ROW + d + lane / 8 % 2 * 8);
            mma_m16n8k16_bf16(c[2 * n], x, y);
            mma_m16n8k16_bf16(c[2 * n + 1], x, y + 2);
        }
    }
}

// c[16, 8 N] += x[16, 16] b[16 rows of `b`, 8 N]
template <int ROW, int N> __device__ __forceinline__ void product_nn(float (*c)[4], const unsigned x[4], const bf16* b) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < N / 2; n++) {
        unsigned y[4];
        ldmatrix_x4_trans(y, b + lane % 16 * ROW + n * 16 + lane / 16 * 8);
        mma_m16n8k16_bf16(c[2 * n], x, y);
        mma_m16n8k16_bf16(c[2 * n + 1], x, y + 2);
    }
}

// Shared: Q, dO, two stages of K and V: 6 * 64 * (D + 8) * 2 bytes.
template <int D> __device__ __forceinline__ void dq_mma(const Backward<bf16>& b, Tile tile, float scale) {
    constexpr int ROW = D + 8, TILE = 64 * ROW;
    DYNAMIC_SHARED(memory);
    bf16 *q = (bf16*)memory, *dout = q + TILE;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, group = head / b.per_kv;
    size_t columns = (size_t)b.n_groups * (b.per_kv + 2) * D, width = (size_t)b.n_groups * b.per_kv * D;
    size_t q_column = (size_t)(group * (b.per_kv + 2) + head % b.per_kv) * D;
    const bf16* keys = b.qkv + tile.first_token * columns + (size_t)(group * (b.per_kv + 2) + b.per_kv) * D;
    size_t first = tile.first_token + tile.first_row;
    int n_rows = min(64, tile.n_tokens - tile.first_row), key_end = tile.first_row + n_rows;
    auto fetch = [&](int key) {
        bf16* k = q + (2 + key / 64 % 2 * 2) * TILE;
        load_tile<D, 128>(k, key_end - key, keys + key * columns, columns);
        load_tile<D, 128>(k + TILE, key_end - key, keys + key * columns + D, columns);
        cp_async_commit();
    };
    load_tile<D, 128>(q, n_rows, b.qkv + first * columns + q_column, columns);
    load_tile<D, 128>(dout, n_rows, b.dout + first * width + (size_t)head * D, width);
    fetch(0);
    float dq[D / 8][4] = {}, lse[2], delta[2];
    int row = warp * 16 + lane / 4;
    for (int h = 0; h < 2; h++) {
        bool here = row + 8 * h < n_rows;
        size_t at = (size_t)head * b.n_tokens + first + row + 8 * h;
        lse[h] = here ? b.lse[at] * LOG2_E : 0.0f;
        delta[h] = here ? b.delta[at] : 0.0f;
    }
    for (int key = 0; key < key_end; key += 64) {
        cp_async_wait<0>();
        __syncthreads(); // this stage is here, and nobody reads the other any more
        if (key + 64 < key_end) fetch(key + 64);
        const bf16* k = q + (2 + key / 64 % 2 * 2) * TILE;
        float s[8][4] = {}, dp[8][4] = {};
        product_nt<D, 8>(s, q + warp * 16 * ROW, k);
        product_nt<D, 8>(dp, dout + warp * 16 * ROW, k + TILE);
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                bool seen = key + n * 8 + lane % 4 * 2 + e % 2 <= tile.first_row + row + e / 2 * 8;
                float p = seen ? exp2f(s[n][e] * (scale * LOG2_E) - lse[e / 2]) : 0.0f;
                s[n][e] = p * (dp[n][e] - delta[e / 2]) * scale;
            }
#pragma unroll
        for (int c = 0; c < 4; c++) {
            unsigned x[4] = {pack_bf16(s[2 * c][0], s[2 * c][1]), pack_bf16(s[2 * c][2], s[2 * c][3]),
                             pack_bf16(s[2 * c + 1][0], s[2 * c + 1][1]), pack_bf16(s[2 * c + 1][2], s[2 * c + 1][3])};
            product_nn<ROW, D / 8>(dq, x, k + c * 16 * ROW);
        }
    }
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
        if (row + e * 4 >= n_rows) continue;
        unsigned* to = (unsigned*)(b.dqkv + (first + row + e * 4) * columns + q_column + lane % 4 * 2);
#pragma unroll
        for (int n = 0; n < D / 8; n++) to[n * 4] = pack_bf16(dq[n][e], dq[n][e + 1]);
    }
}

// 8 warps: warp w has keys 16 (w % 4).. of the tile, and half w / 4 of the queries in the scores, of the dims in dk and dv; the
// weights and their gradients change hands through shared memory, so no product is made twice.
// Shared: K, V, two stages of Q and dO, weights and gradients [64, 72]: 6 * 64 * (D + 8) * 2 + 2 * 64 * 72 * 2 bytes.
template <int D> __device__ __forceinline__ void dkv_mma(const Backward<bf16>& b, Tile tile, float scale) {
    constexpr int ROW = D + 8, TILE = 64 * ROW, P_ROW = 72;
    DYNAMIC_SHARED(memory);
    bf16 *k = (bf16*)memory, *v = k + TILE, *weights = k + 6 * TILE, *dscores = weights + 64 * P_ROW;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = warp % 4 * 16, half = warp / 4, group = blockIdx.y;
    size_t columns = (size_t)b.n_groups * (b.per_kv + 2) * D, width = (size_t)b.n_groups * b.per_kv * D, start = tile.first_token;
    size_t group_column = (size_t)group * (b.per_kv + 2) * D, key_column = group_column + (size_t)b.per_kv * D;
    int n_keys = min(64, tile.n_tokens - tile.first_row);
    // Steps: the heads of the group in order, in each the tiles of queries from this one on.
    int n_tiles = (tile.n_tokens - tile.first_row + 63) / 64, n_steps = n_tiles * b.per_kv;
    auto fetch = [&](int step) {
        int head = step / n_tiles, query = tile.first_row + step % n_tiles * 64;
        bf16* q = k + (2 + step % 2 * 2) * TILE;
        load_tile<D, 256>(q, tile.n_tokens - query, b.qkv + (start + query) * columns + group_column + (size_t)head * D, columns);
        load_tile<D, 256>(q + TILE, tile.n_tokens - query,
                          b.dout + (start + query) * width + (size_t)(group * b.per_kv + head) * D, width);
        cp_async_commit();
    };
    load_tile<D, 256>(k, n_keys, b.qkv + (start + tile.first_row) * columns + key_column, columns);
    load_tile<D, 256>(v, n_keys, b.qkv + (start + tile.first_row) * columns + key_column + D, columns);
    fetch(0);
    float dk[D / 16][4] = {}, dv[D / 16][4] = {};
    for (int step = 0; step < n_steps; step++) {
        cp_async_wait<0>();
        __syncthreads(); // this stage is here; nobody reads the other, nor the weights, any more
        if (step + 1 < n_steps) fetch(step + 1);
        int query = tile.first_row + step % n_tiles * 64;
        const bf16 *q = k + (2 + step % 2 * 2) * TILE, *dout = q + TILE;
        size_t head_at = (size_t)(group * b.per_kv + step / n_tiles) * b.n_tokens + start;
        float s[4][4] = {}, dp[4][4] = {};
        product_nt<D, 4>(s, k + rows * ROW, q + half * 32 * ROW);
        product_nt<D, 4>(dp, v + rows * ROW, dout + half * 32 * ROW);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            int column = half * 32 + n * 8 + lane % 4 * 2;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int row = query + column + e % 2, key = tile.first_row + rows + lane / 4 + e / 2 * 8;
                bool seen = key <= row && row < tile.n_tokens;
                float lse = seen ? b.lse[head_at + row] : 0.0f, delta = seen ? b.delta[head_at + row] : 0.0f;
                float p = seen ? exp2f(s[n][e] * (scale * LOG2_E) - lse * LOG2_E) : 0.0f;
                dp[n][e] = p * (dp[n][e] - delta) * scale;
                s[n][e] = p;
            }
            int at = (rows + lane / 4) * P_ROW + column;
            *(unsigned*)(weights + at) = pack_bf16(s[n][0], s[n][1]);
            *(unsigned*)(weights + at + 8 * P_ROW) = pack_bf16(s[n][2], s[n][3]);
            *(unsigned*)(dscores + at) = pack_bf16(dp[n][0], dp[n][1]);
            *(unsigned*)(dscores + at + 8 * P_ROW) = pack_bf16(dp[n][2], dp[n][3]);
        }
        __syncthreads();
#pragma unroll
        for (int c = 0; c < 4; c++) {
            unsigned x[4];
            int at = (rows + lane % 16) * P_ROW + c * 16 + lane / 16 * 8;
            ldmatrix_x4(x, weights + at);
            product_nn<ROW, D / 16>(dv, x, dout + c * 16 * ROW + half * (D / 2));
            ldmatrix_x4(x, dscores + at);
            product_nn<ROW, D / 16>(dk, x, q + c * 16 * ROW + half * (D / 2));
        }
    }
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
        int key = rows + lane / 4 + e * 4;
        if (key >= n_keys) continue;
        unsigned* to = (unsigned*)(b.dqkv + (start + tile.first_row + key) * columns + key_column + half * (D / 2) + lane % 4 * 2);
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            to[n * 4] = pack_bf16(dk[n][e], dk[n][e + 1]);
            to[D / 2 + n * 4] = pack_bf16(dv[n][e], dv[n][e + 1]);
        }
    }
}

// The FMA form of both passes, any dim <= 256: 4 warps of 4 rows of the tile (queries of head blockIdx.y, or keys of group
// blockIdx.y), lanes are the 32 rows of the other side in the scores and dims in the sums.
// Shared, f32: two arrays [16, D] of the tile, two [32, D + 1] of the other side.
template <class T, bool KEYS> __device__ __forceinline__ void backward_fma(const Backward<T>& b, Tile tile, int dim, float scale) {
    DYNAMIC_SHARED(memory);
    float *mine = (float*)memory, *mine_too = mine + 16 * dim, *other = mine_too + 16 * dim, *other_too = other + 32 * (dim + 1);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int group = KEYS ? blockIdx.y : blockIdx.y / b.per_kv;
    size_t columns = (size_t)b.n_groups * (b.per_kv + 2) * dim, width = (size_t)b.n_groups * b.per_kv * dim;
    size_t key_column = (size_t)(group * (b.per_kv + 2) + b.per_kv) * dim, start = tile.first_token;
    int n_rows = min(16, tile.n_tokens - tile.first_row), n_heads = KEYS ? b.per_kv : 1;
    int begin = KEYS ? tile.first_row / 32 * 32 : 0, end = KEYS ? tile.n_tokens : tile.first_row + n_rows;
    // Two vectors of token `row`: key and value, or query and dout.
    auto load = [&](float* x, float* y, int row, int i, bool keys, int head) {
        const T* from = b.qkv + (start + row) * columns;
        *x = to_float(from[keys ? key_column + i : (size_t)(group * (b.per_kv + 2) + head) * dim + i]);
        *y = keys ? to_float(from[key_column + dim + i]) : to_float(b.dout[(start + row) * width + (size_t)(group * b.per_kv + head) * dim + i]);
    };
    float sums[4][8] = {}, sums_too[4][8] = {};
    for (int h = 0; h < n_heads; h++) {
        int head = KEYS ? h : blockIdx.y % b.per_kv;
        const float* lse = b.lse + (size_t)(group * b.per_kv + head) * b.n_tokens + start;
        const float* delta = b.delta + (size_t)(group * b.per_kv + head) * b.n_tokens + start;
        for (int first = begin; first < end; first += 32) {
            __syncthreads();
            for (int i = threadIdx.x; i < 16 * dim; i += 128) {
                mine[i] = mine_too[i] = 0.0f;
                if (i / dim < n_rows) load(mine + i, mine_too + i, tile.first_row + i / dim, i % dim, KEYS, head);
            }
            for (int i = threadIdx.x; i < 32 * dim; i += 128) {
                int at = i / dim * (dim + 1) + i % dim;
                other[at] = other_too[at] = 0.0f;
                if (first + i / dim < end) load(other + at, other_too + at, first + i / dim, i % dim, !KEYS, head);
            }
            __syncthreads();
#pragma unroll
            for (int r = 0; r < 4; r++) {
                float s = 0.0f, dp = 0.0f;
                for (int i = 0; i < dim; i++) {
                    s = fmaf(mine[(warp * 4 + r) * dim + i], other[lane * (dim + 1) + i], s);
                    dp = fmaf(mine_too[(warp * 4 + r) * dim + i], other_too[lane * (dim + 1) + i], dp);
                }
                int here = tile.first_row + warp * 4 + r, there = first + lane;
                int query = KEYS ? there : here, key = KEYS ? here : there;
                bool seen = key <= query && query < tile.n_tokens;
                float p = seen ? expf(s * scale - lse[query]) : 0.0f, ds = seen ? p * (dp - delta[query]) * scale : 0.0f;
                for (int j = 0; j < 32; j++) {
                    float ds_j = __shfl_sync(0xffffffffu, ds, j), p_j = KEYS ? __shfl_sync(0xffffffffu, p, j) : 0.0f;
#pragma unroll
                    for (int i = 0; i < 8; i++)
                        if (lane + 32 * i < dim) {
                            sums[r][i] = fmaf(ds_j, other[j * (dim + 1) + lane + 32 * i], sums[r][i]);
                            if (KEYS) sums_too[r][i] = fmaf(p_j, other_too[j * (dim + 1) + lane + 32 * i], sums_too[r][i]);
                        }
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
        if (warp * 4 + r >= n_rows) continue;
        T* to = b.dqkv + (start + tile.first_row + warp * 4 + r) * columns;
        to += KEYS ? key_column : (size_t)(group * (b.per_kv + 2) + blockIdx.y % b.per_kv) * dim;
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (lane + 32 * i < dim) {
                store(to + lane + 32 * i, sums[r][i]);
                if (KEYS) store(to + dim + lane + 32 * i, sums_too[r][i]);
            }
    }
}

#define BACKWARD_MMA(D)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(128)                                                                                \
        attention_dq_d##D##_bf16(bf16* dqkv, const bf16* dout, const float* delta, const float* lse, const bf16* qkv,                \
                                 const Tile* tiles, int n_tokens, int per_kv, int n_groups, float scale) {                           \
        after_predecessors();                                                                                                        \
        dq_mma<D>(Backward<bf16>{dqkv, dout, delta, lse, qkv, n_tokens, per_kv, n_groups}, tiles[blockIdx.x], scale);                \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256)                                                                                \
        attention_dkv_d##D##_bf16(bf16* dqkv, const bf16* dout, const float* delta, const float* lse, const bf16* qkv,               \
                                  const Tile* tiles, int n_tokens, int per_kv, int n_groups, float scale) {                          \
        after_predecessors();                                                                                                        \
        dkv_mma<D>(Backward<bf16>{dqkv, dout, delta, lse, qkv, n_tokens, per_kv, n_groups}, tiles[blockIdx.x], scale);               \
    }
BACKWARD_MMA(64)
BACKWARD_MMA(128)
BACKWARD_MMA(192)

#define BACKWARD_FMA(pass, suffix, T, KEYS)                                                                                          \
    extern "C" __global__ void __launch_bounds__(128, 2)                                                                                \
        attention_##pass##_##suffix(T* dqkv, const T* dout, const float* delta, const float* lse, const T* qkv, const Tile* tiles,   \
                                    int n_tokens, int per_kv, int n_groups, int dim, float scale) {                                  \
        after_predecessors();                                                                                                        \
        backward_fma<T, KEYS>(Backward<T>{dqkv, dout, delta, lse, qkv, n_tokens, per_kv, n_groups}, tiles[blockIdx.x], dim, scale);  \
    }
#define DELTA(suffix, T)                                                                                                             \
    extern "C" __global__ void __launch_bounds__(128)                                                                                \
        attention_delta_##suffix(float* delta, const T* dout, const T* out, int n_tokens, int n_heads, int dim) {                    \
        after_predecessors();                                                                                                        \
        row_dots<T>(delta, dout, out, n_tokens, n_heads, dim);                                                                       \
    }
DELTA(f32, float)
DELTA(bf16, bf16)
BACKWARD_FMA(dq, f32, float, false)
BACKWARD_FMA(dq, bf16, bf16, false)
BACKWARD_FMA(dkv, f32, float, true)
BACKWARD_FMA(dkv, bf16, bf16, true)
