// Causal attention, backward, on Hopper's own instructions (Device::attention_backward on sm_90a), in two passes as
// attention_backward.cu, whose delta = dout . out comes first. No atomics, each sum in a fixed order: the same input gives the same bits.
//   dq:  grid (A, n_tiles): a tile of 128 queries of one head, 64 a consumer, over the keys it sees, the last block first.
//   dkv: grid (G * n_parts, n_tiles): a tile of keys over the queries that see it, for a part of the query heads of the group in order.
//        Scores are made transposed, keys by queries, so that weights and their gradients go from registers into the products that
//        sum over queries. d64, d128: 128 keys, 64 a consumer. d192: 64 keys; one consumer makes dv, the other dk, for both would not
//        fit into a thread's registers; each makes the scores.
//   combine: where there are parts (few groups, few tiles), adds their dk and dv [n_parts, T, G, 2 D] in order.
// All read operands that the copy engine wrote, or registers: nothing that threads write to shared memory goes to the tensor cores.
// Products: 7 where one pass with atomics has 5; d192 8.
// Keys or queries a block, registers (sm_90a, nvcc 13.0, no spills) and shared memory, one block an SM: dq d64 128, 168 registers, 99368
// bytes; d128 96, 164904; d192 80, 222248; dkv d64 96, 168 registers, 84520; d128 64, 133160; d192 96, 199208; combine 64. setmaxnreg
// makes the 168 24 for the producer and 240 for the consumers (dkv: 40 and 232).
// Rows past the sequence's end are those of the next sequence (zero past the last); their weights are 0.
// The scale of the scores multiplies dq and dk at the end, not each of the terms they are summed of.
// Where the forward pass rotated queries and keys (Device::attention_rope_backward) dq and dk are rotated back before they are stored.
#include "attention_hopper.cuh"
#include "rope.cuh"

// Rotary embedding of the gradients in the same pass: angles[T, half] of (cos, sin), as rope_angles makes them; half 0: none.
struct Turn {
    const float2* angles;
    int half;
};

// Sums [64, D] of this thread's rows, `row` of the tile's sequence and 8 further, as they are stored: times `factor` and rounded, then the
// first 2 HALF dims rotated. The bits, once stored, are those that rope.cu makes of stored gradients.
template <int D, int HALF>
__device__ __forceinline__ void turn_rows(float (&sums)[D / 2], const float2* angles, const Tile& tile, int row, float factor) {
    static_assert(HALF % 8 == 0, "both of a pair are this thread's");
#pragma unroll
    for (int j = 0; j < D / 2; j++) sums[j] = rounded<bf16>(sums[j] * factor);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (row + 8 * h >= tile.n_tokens) continue;
        const float4* two = (const float4*)(angles + (size_t)(tile.first_token + row + 8 * h) * HALF) + threadIdx.x % 4;
#pragma unroll
        for (int n = 0; n < HALF / 8; n++) {
            float4 of = two[n * 4];
            int x = 4 * n + 2 * h, y = x + HALF / 2;
            turn_pair(sums[x], sums[y], of.x, of.y);
            turn_pair(sums[x + 1], sums[y + 1], of.z, of.w);
        }
    }
}

// Writes this thread's two rows, times `factor`, rounded, and rotated where that is asked for; rows of `columns` from `to` on.
template <int D>
__device__ __forceinline__ void store_rows(bf16* to, size_t columns, float (&sums)[D / 2], const Turn& turn, const Tile& tile, int row,
                                           float factor) {
    if (turn.half == D / 2) turn_rows<D, D / 2>(sums, turn.angles, tile, row, factor);
    if (turn.half == D / 4) turn_rows<D, D / 4>(sums, turn.angles, tile, row, factor);
    if (turn.half) factor = 1.0f;
    store_row<D, 0>(to, sums, factor, row < tile.n_tokens);
    store_row<D, 1>(to + 8 * columns, sums, factor, row + 8 < tile.n_tokens);
}

template <int D, int KEYS> struct QueryShared {
    bf16 q[128 * D];
    bf16 dout[128 * D];
    bf16 k[STAGES][KEYS * D];
    bf16 v[STAGES][KEYS * D];
    Mbarrier rows_here, here[STAGES], free[STAGES];
};

template <int D, int KEYS>
__device__ __forceinline__ void produce_keys(QueryShared<D, KEYS>& shared, const TensorMap& queries, const TensorMap& douts,
                                             const TensorMap& keys, const Tile& tile, int per_kv, int n_blocks) {
    int head = blockIdx.x, key = key_head(head / per_kv, per_kv), first = tile.first_token + tile.first_row;
    mbarrier_arrive_expect(&shared.rows_here, sizeof shared.q + sizeof shared.dout);
    tile_load<D>(shared.q, &queries, 128, query_head(head, per_kv), first, &shared.rows_here);
    tile_load<D>(shared.dout, &douts, 128, head, first, &shared.rows_here);
#pragma unroll 1
    for (int i = 0; i < n_blocks; i++) {
        int stage = i % STAGES, token = tile.first_token + (n_blocks - 1 - i) * KEYS;
        mbarrier_wait(&shared.free[stage], i / STAGES % 2 ^ 1);
        mbarrier_arrive_expect(&shared.here[stage], sizeof shared.k[0] + sizeof shared.v[0]);
        tile_load<D>(shared.k[stage], &keys, KEYS, key, token, &shared.here[stage]);
        tile_load<D>(shared.v[stage], &keys, KEYS, key + 1, token, &shared.here[stage]);
    }
}

// Products of a step: scores and dp, then dq; the other consumer's run meanwhile.
template <int D, int KEYS>
__device__ __forceinline__ void consume_keys(QueryShared<D, KEYS>& shared, bf16* dqkv, const float* delta, const float* lse,
                                             const Tile& tile, int n_tokens, int per_kv, int n_blocks, float scale, const Turn& turn) {
    int lane = threadIdx.x % 32, head = blockIdx.x, first_row = tile.first_row + consumer_index() * 64;
    int row = first_row + warp_of_group() * 16 + lane / 4;
    const bf16 *q = shared.q + consumer_index() * 64 * 64, *dout = shared.dout + consumer_index() * 64 * 64;
    float dq[D / 2] = {}, s[KEYS / 2], dp[KEYS / 2], row_lse[2], row_delta[2], factor = scale * LOG2_E;
    unsigned ds[KEYS / 4];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        bool here = row + 8 * h < tile.n_tokens;
        size_t at = (size_t)head * n_tokens + tile.first_token + row + 8 * h;
        row_lse[h] = here ? lse[at] * LOG2_E : 0.0f;
        row_delta[h] = here ? delta[at] : 0.0f;
    }
    mbarrier_wait(&shared.rows_here, 0);
    for (int i = 0; i < n_blocks; i++) {
        int stage = i % STAGES, first_key = (n_blocks - 1 - i) * KEYS;
        mbarrier_wait(&shared.here[stage], i / STAGES % 2);
        wgmma_fence();
        product_nt<D, KEYS, 128>(s, q, shared.k[stage]);
        wgmma_commit();
        product_nt<D, KEYS, 128>(dp, dout, shared.v[stage]);
        wgmma_commit();
        wgmma_wait<1>(s);
#pragma unroll
        for (int j = 0; j < KEYS / 2; j++) s[j] = exp2_fast(s[j] * factor - row_lse[j / 2 % 2]);
        if (first_key + KEYS - 1 > first_row) { // skipped where the rows see all keys
#pragma unroll
            for (int j = 0; j < KEYS / 2; j++)
                if (first_key + j / 4 * 8 + lane % 4 * 2 + j % 2 > row + j / 2 % 2 * 8) s[j] = 0.0f;
        }
        wgmma_wait<0>(dp);
#pragma unroll
        for (int j = 0; j < KEYS / 2; j++) s[j] *= dp[j] - row_delta[j / 2 % 2];
        pack_sums(ds, s);
        wgmma_fence();
        product_nn<D, KEYS>(dq, ds, shared.k[stage]);
        wgmma_commit();
        wgmma_wait<0>(dq);
        release(&shared.free[stage]);
    }
    int n_heads = gridDim.x / per_kv * (per_kv + 2);
    bf16* to = dqkv + ((size_t)(tile.first_token + row) * n_heads + query_head(head, per_kv)) * D;
    store_rows<D>(to, (size_t)n_heads * D, dq, turn, tile, row, scale);
}

template <int D, int KEYS>
__device__ __forceinline__ void query_gradient(bf16* dqkv, const float* delta, const float* lse, const TensorMap& queries,
                                               const TensorMap& douts, const TensorMap& keys, const Tile& tile, int n_tokens, int per_kv,
                                               float scale, const Turn& turn) {
    DYNAMIC_SHARED(memory);
    auto& shared = *(QueryShared<D, KEYS>*)aligned_shared(memory);
    int n_rows = min(128, tile.n_tokens - tile.first_row), n_blocks = (tile.first_row + n_rows + KEYS - 1) / KEYS;
    if (threadIdx.x == 0) {
        mbarrier_init(&shared.rows_here, 1);
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(&shared.here[i], 1);
            mbarrier_init(&shared.free[i], RELEASES(2));
        }
        mbarrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        registers_fewer<24>();
        if (threadIdx.x == 0) produce_keys<D, KEYS>(shared, queries, douts, keys, tile, per_kv, n_blocks);
    } else {
        registers_more<240>();
        consume_keys<D, KEYS>(shared, dqkv, delta, lse, tile, n_tokens, per_kv, n_blocks, scale, turn);
    }
}

template <int D, int KEYS, int QUERIES> struct KeyShared {
    bf16 k[KEYS * D];
    bf16 v[KEYS * D];
    bf16 q[STAGES][QUERIES * D];
    bf16 dout[STAGES][QUERIES * D];
    float lse[STAGES][QUERIES]; // times log2 e; infinite past the sequence's end, so that weights are 0 there
    float delta[STAGES][QUERIES];
    Mbarrier keys_here, here[STAGES], free[STAGES];
};

// The steps of a block: the query heads first_head.. in order, in each the blocks of queries from the first key on.
struct Steps {
    int first_head, n_blocks, n;
    __device__ int head(int step) const { return first_head + step / n_blocks; }
    __device__ int block(int step) const { return step % n_blocks; }
};

// One thread copies tiles; the warp after its own, lane by lane, lse and delta. Unrolled, the loops would not fit into its registers.
template <int D, int KEYS, int QUERIES>
__device__ __forceinline__ void produce_queries(KeyShared<D, KEYS, QUERIES>& shared, const float* delta, const float* lse,
                                                const TensorMap& keys, const TensorMap& queries, const TensorMap& douts, const Tile& tile,
                                                int n_tokens, int per_kv, int group, const Steps& steps) {
    int lane = threadIdx.x % 32, first = tile.first_token + tile.first_row;
    if (threadIdx.x == 0) {
        int key = key_head(group, per_kv);
        mbarrier_arrive_expect(&shared.keys_here, sizeof shared.k + sizeof shared.v);
        tile_load<D>(shared.k, &keys, KEYS, key, first, &shared.keys_here);
        tile_load<D>(shared.v, &keys, KEYS, key + 1, first, &shared.keys_here);
#pragma unroll 1
        for (int i = 0; i < steps.n; i++) {
            int stage = i % STAGES, head = steps.head(i), token = first + steps.block(i) * QUERIES;
            mbarrier_wait(&shared.free[stage], i / STAGES % 2 ^ 1);
            mbarrier_arrive_expect(&shared.here[stage], sizeof shared.q[0] + sizeof shared.dout[0]);
            tile_load<D>(shared.q[stage], &queries, QUERIES, query_head(head, per_kv), token, &shared.here[stage]);
            tile_load<D>(shared.dout[stage], &douts, QUERIES, head, token, &shared.here[stage]);
        }
    } else if (threadIdx.x / 32 == 1) {
#pragma unroll 1
        for (int i = 0; i < steps.n; i++) {
            int stage = i % STAGES, row = tile.first_row + steps.block(i) * QUERIES;
            size_t at = (size_t)steps.head(i) * n_tokens + tile.first_token + row;
            mbarrier_wait(&shared.free[stage], i / STAGES % 2 ^ 1);
            for (int j = lane; j < QUERIES; j += 32) {
                bool here = row + j < tile.n_tokens;
                shared.lse[stage][j] = here ? lse[at + j] * LOG2_E : -MINUS_INFINITY;
                shared.delta[stage][j] = here ? delta[at + j] : 0.0f;
            }
            mbarrier_arrive(&shared.here[stage]);
        }
    }
}

// What a consumer makes.
enum Made { DV = 1, DK = 2 };

// Writes sums [64, D] of this thread's rows times `factor`: rounded into dqkv, keys (`value` 0) rotated, or f32 as a part.
template <int D>
__device__ __forceinline__ void store_keys(bf16* dqkv, float* partial, float (&sums)[D / 2], int row, const Tile& tile, int per_kv,
                                           int n_groups, int n_tokens, int n_parts, int value, float factor, const Turn& turn) {
    int group = blockIdx.x / n_parts, part = blockIdx.x % n_parts, lane = threadIdx.x % 32;
    size_t token = tile.first_token + row;
    if (n_parts == 1) {
        size_t columns = (size_t)n_groups * (per_kv + 2) * D;
        bf16* to = dqkv + token * columns + (size_t)(key_head(group, per_kv) + value) * D;
        store_rows<D>(to, columns, sums, value ? Turn{} : turn, tile, row, factor);
        return;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (row + 8 * h >= tile.n_tokens) continue;
        float* to = partial + ((((size_t)part * n_tokens + token + 8 * h) * n_groups + group) * 2 + value) * D + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++) *(float2*)(to + n * 8) = make_float2(sums[4 * n + 2 * h] * factor, sums[4 * n + 2 * h + 1] * factor);
    }
}

// Products of a step: scores and dp; dv as soon as there are weights, dk as soon as there are their gradients. `first_key` is the
// consumer's first in the tile.
template <int D, int KEYS, int QUERIES, int MADE>
__device__ __forceinline__ void consume_queries(KeyShared<D, KEYS, QUERIES>& shared, bf16* dqkv, float* partial, const Tile& tile,
                                                int first_key, int n_tokens, int per_kv, int n_groups, int n_parts, const Steps& steps,
                                                float scale, const Turn& turn) {
    int lane = threadIdx.x % 32, key = tile.first_row + first_key + warp_of_group() * 16 + lane / 4;
    const bf16 *k = shared.k + first_key * 64, *v = shared.v + first_key * 64;
    float dk[D / 2] = {}, dv[D / 2] = {}, s[QUERIES / 2], dp[QUERIES / 2], factor = scale * LOG2_E;
    unsigned p[QUERIES / 4], ds[QUERIES / 4];
    mbarrier_wait(&shared.keys_here, 0);
    for (int i = 0; i < steps.n; i++) {
        int stage = i % STAGES, query = steps.block(i) * QUERIES + tile.first_row;
        mbarrier_wait(&shared.here[stage], i / STAGES % 2);
        wgmma_fence();
        product_nt<D, QUERIES, KEYS>(s, k, shared.q[stage]);
        wgmma_commit();
        if (MADE & DK) {
            product_nt<D, QUERIES, KEYS>(dp, v, shared.dout[stage]);
            wgmma_commit();
            wgmma_wait<1>(s);
        } else {
            wgmma_wait<0>(s);
        }
#pragma unroll
        for (int j = 0; j < QUERIES / 2; j++) s[j] = exp2_fast(s[j] * factor - shared.lse[stage][j / 4 * 8 + lane % 4 * 2 + j % 2]);
        if (tile.first_row + first_key + 63 > query) { // skipped where the queries see all keys
#pragma unroll
            for (int j = 0; j < QUERIES / 2; j++)
                if (key + j / 2 % 2 * 8 > query + j / 4 * 8 + lane % 4 * 2 + j % 2) s[j] = 0.0f;
        }
        if (MADE & DV) {
            pack_sums(p, s);
            wgmma_fence();
            product_nn<D, QUERIES>(dv, p, shared.dout[stage]);
            wgmma_commit();
        }
        if (MADE & DK) {
            wgmma_wait<(MADE & DV) ? 1 : 0>(dp);
#pragma unroll
            for (int j = 0; j < QUERIES / 2; j++) s[j] *= dp[j] - shared.delta[stage][j / 4 * 8 + lane % 4 * 2 + j % 2];
            pack_sums(ds, s);
            wgmma_fence();
            product_nn<D, QUERIES>(dk, ds, shared.q[stage]);
            wgmma_commit();
        }
        if (MADE & DK) wgmma_wait<0>(dk);
        if (MADE & DV) wgmma_wait<0>(dv);
        release(&shared.free[stage]);
    }
    if (MADE & DV) {
        store_keys<D>(dqkv, partial, dv, key, tile, per_kv, n_groups, n_tokens, n_parts, 1, 1.0f, turn);
    }
    if (MADE & DK) {
        store_keys<D>(dqkv, partial, dk, key, tile, per_kv, n_groups, n_tokens, n_parts, 0, scale, turn);
    }
}

template <int D, int KEYS, int QUERIES>
__device__ __forceinline__ void key_gradients(bf16* dqkv, float* partial, const float* delta, const float* lse, const TensorMap& keys,
                                              const TensorMap& queries, const TensorMap& douts, const Tile& tile, int n_tokens, int per_kv,
                                              int n_parts, float scale, const Turn& turn) {
    DYNAMIC_SHARED(memory);
    auto& shared = *(KeyShared<D, KEYS, QUERIES>*)aligned_shared(memory);
    int group = blockIdx.x / n_parts, part = blockIdx.x % n_parts, n_groups = gridDim.x / n_parts;
    int first = part * per_kv / n_parts, n_heads = (part + 1) * per_kv / n_parts - first;
    int n_blocks = (tile.n_tokens - tile.first_row + QUERIES - 1) / QUERIES;
    Steps steps{group * per_kv + first, n_blocks, n_blocks * n_heads};
    if (threadIdx.x == 0) {
        mbarrier_init(&shared.keys_here, 1);
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(&shared.here[i], 1 + 32);
            mbarrier_init(&shared.free[i], RELEASES(2));
        }
        mbarrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        registers_fewer<40>();
        produce_queries<D, KEYS, QUERIES>(shared, delta, lse, keys, queries, douts, tile, n_tokens, per_kv, group, steps);
    } else {
        registers_more<232>();
        if (KEYS == 128)
            consume_queries<D, KEYS, QUERIES, DV | DK>(shared, dqkv, partial, tile, consumer_index() * 64, n_tokens, per_kv, n_groups,
                                                       n_parts, steps, scale, turn);
        else if (consumer_index() == 0)
            consume_queries<D, KEYS, QUERIES, DV>(shared, dqkv, partial, tile, 0, n_tokens, per_kv, n_groups, n_parts, steps, scale, turn);
        else
            consume_queries<D, KEYS, QUERIES, DK>(shared, dqkv, partial, tile, 0, n_tokens, per_kv, n_groups, n_parts, steps, scale, turn);
    }
}

// Maps: qkv as (dim, head, token) in boxes of 128 or KEYS or QUERIES tokens, dout likewise.
#define BACKWARD(D, DQ_KEYS, KEYS, QUERIES)                                                                                          \
    extern "C" __global__ void __launch_bounds__(384, 1)                                                                             \
        attention_hopper_dq_d##D##_bf16(bf16* dqkv, const float* delta, const float* lse, const __grid_constant__ TensorMap queries, \
                                        const __grid_constant__ TensorMap douts, const __grid_constant__ TensorMap keys,             \
                                        const Tile* tiles, int n_tokens, int per_kv, float scale, const float2* angles, int half) {  \
        after_predecessors();                                                                                                        \
        query_gradient<D, DQ_KEYS>(dqkv, delta, lse, queries, douts, keys, tiles[blockIdx.y], n_tokens, per_kv, scale,               \
                                   Turn{angles, half});                                                                              \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(384, 1)                                                                             \
        attention_hopper_dkv_d##D##_bf16(bf16* dqkv, float* partial, const float* delta, const float* lse,                           \
                                         const __grid_constant__ TensorMap keys, const __grid_constant__ TensorMap queries,          \
                                         const __grid_constant__ TensorMap douts, const Tile* tiles, int n_tokens, int per_kv,       \
                                         int n_parts, float scale, const float2* angles, int half) {                                 \
        after_predecessors();                                                                                                        \
        key_gradients<D, KEYS, QUERIES>(dqkv, partial, delta, lse, keys, queries, douts, tiles[blockIdx.y], n_tokens, per_kv,        \
                                        n_parts, scale, Turn{angles, half});                                                         \
    }
BACKWARD(64, 128, 128, 96)
BACKWARD(128, 96, 128, 64)
BACKWARD(192, 80, 64, 96)

// Four elements of the sum of parts [T, G, 2 D].
__device__ __forceinline__ float4 sum_of_parts(const float* partial, size_t at, size_t n, int n_parts) {
    float4 sum = *(const float4*)(partial + at);
    for (int part = 1; part < n_parts; part++) {
        float4 more = *(const float4*)(partial + part * n + at);
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    return sum;
}
__device__ __forceinline__ float4 as_stored(float4 x) {
    return {rounded<bf16>(x.x), rounded<bf16>(x.y), rounded<bf16>(x.z), rounded<bf16>(x.w)};
}
__device__ __forceinline__ void store_four(bf16* to, float4 x) {
    ((unsigned*)to)[0] = pack_bf16(x.x, x.y);
    ((unsigned*)to)[1] = pack_bf16(x.z, x.w);
}

// Four elements of [T, G, 2 D] a thread; of keys that are rotated, those and what they are rotated with.
extern "C" __global__ void __launch_bounds__(256, 4)
    attention_hopper_combine_bf16(bf16* dqkv, const float* partial, int n_tokens, int per_kv, int n_groups, int n_parts, int dim,
                                  const float2* angles, int half) {
    after_predecessors();
    size_t n = (size_t)n_tokens * n_groups * 2 * dim, at = ((size_t)blockIdx.x * 256 + threadIdx.x) * 4;
    if (at >= n) return;
    size_t row = at / (2 * dim), token = row / n_groups, group = row % n_groups;
    int column = at % (2 * dim);
    if (column >= half && column < 2 * half) return; // the thread of what they are rotated with has them
    bf16* to = dqkv + (token * n_groups * (per_kv + 2) + key_head(group, per_kv)) * dim + column;
    float4 x = sum_of_parts(partial, at, n, n_parts);
    if (column < half) {
        float4 y = sum_of_parts(partial, at + half, n, n_parts);
        const float4* of = (const float4*)(angles + token * half + column);
        x = as_stored(x), y = as_stored(y);
        float4 low = of[0], high = of[1];
        turn_pair(x.x, y.x, low.x, low.y);
        turn_pair(x.y, y.y, low.z, low.w);
        turn_pair(x.z, y.z, high.x, high.y);
        turn_pair(x.w, y.w, high.z, high.w);
        store_four(to + half, y);
    }
    store_four(to, x);
}
