// Causal attention, forward, on Hopper's own instructions (Device::attention on sm_90a; FlashAttention-3, Shah et al. 2024).
// Grid (A, n_tiles): blockIdx.x is the query head, so that the heads that share keys run side by side; a tile is 64 rows (tokens) a
// consumer, longest first from the launcher.
// Warpgroup 0 is the producer: one thread copies Q once and K and V block by block, the last block first, into two stages. Each other
// warpgroup has 64 rows: scores from shared memory, weights from registers. Its softmax runs while the tensor cores do the
// previous block's values, and, for D <= 128, the other warpgroups' products: they take turns in issuing.
// Keys past the sequence's end in its last block are those of the next sequence (zero past the last); their weights are 0.
// Rows, keys a block; registers (sm_90a, nvcc 13.0, no spills) and shared memory, one block an SM:
//   d64 192, 128; 128, 91208 bytes; d128 128, 128; 168, 164936; d192 128, 112; 168, 222280. setmaxnreg makes that 24 for the producer
//   and 240 for the consumers (d64: 32 and 160).
#include "attention_hopper.cuh"

template <int D, int CONSUMERS, int KEYS> struct ForwardShared {
    bf16 q[CONSUMERS * 64 * D];
    bf16 k[STAGES][KEYS * D];
    bf16 v[STAGES][KEYS * D];
    Mbarrier q_here, k_here[STAGES], v_here[STAGES], k_free[STAGES], v_free[STAGES];
};

// Highest score and sum of weights of the two rows a thread has parts of.
struct Softmax {
    float most[2], sum[2];
};

// Scores to weights; `keep` is what earlier sums are to be multiplied with. `row` is the thread's first row, the second is row + 8;
// keys after a row are masked where `masked`.
template <int KEYS>
__device__ __forceinline__ void weigh(float (&s)[KEYS / 2], Softmax& softmax, float (&keep)[2], float factor, int first_key, int row,
                                      bool masked) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (masked) {
#pragma unroll
            for (int i = 0; i < KEYS / 2; i++)
                if (i / 2 % 2 == h && first_key + i / 4 * 8 + lane % 4 * 2 + i % 2 > row + 8 * h) s[i] = MINUS_INFINITY;
        }
        float top = softmax.most[h];
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++)
            if (i / 2 % 2 == h) top = fmaxf(top, s[i]);
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        float base = top == MINUS_INFINITY ? 0.0f : top * factor, sum = 0.0f;
        keep[h] = exp2_fast(softmax.most[h] * factor - base);
        softmax.most[h] = top;
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++)
            if (i / 2 % 2 == h) {
                s[i] = exp2_fast(s[i] * factor - base);
                sum += s[i];
            }
        softmax.sum[h] = softmax.sum[h] * keep[h] + sum;
    }
}

template <int D, int CONSUMERS, int KEYS>
__device__ __forceinline__ void produce(ForwardShared<D, CONSUMERS, KEYS>& shared, const TensorMap& queries, const TensorMap& keys,
                                        const Tile& tile, int per_kv, int n_blocks) {
    int key = key_head(blockIdx.x / per_kv, per_kv), query = query_head(blockIdx.x, per_kv);
    tensor_prefetch(&queries);
    tensor_prefetch(&keys);
    mbarrier_arrive_expect(&shared.q_here, sizeof shared.q);
    tile_load<D>(shared.q, &queries, CONSUMERS * 64, query, tile.first_token + tile.first_row, &shared.q_here);
#pragma unroll 1
    for (int i = 0; i < n_blocks; i++) {
        int stage = i % STAGES, parity = i / STAGES % 2, token = tile.first_token + (n_blocks - 1 - i) * KEYS;
        mbarrier_wait(&shared.k_free[stage], parity ^ 1);
        mbarrier_arrive_expect(&shared.k_here[stage], sizeof shared.k[0]);
        tile_load<D>(shared.k[stage], &keys, KEYS, key, token, &shared.k_here[stage]);
        mbarrier_wait(&shared.v_free[stage], parity ^ 1);
        mbarrier_arrive_expect(&shared.v_here[stage], sizeof shared.v[0]);
        tile_load<D>(shared.v[stage], &keys, KEYS, key + 1, token, &shared.v_here[stage]);
    }
}

// Turns of the consumers in issuing products: barrier 1 + c is passed when consumer c is at it and the one before has issued its own.
template <int CONSUMERS> __device__ __forceinline__ void wait_turn(int consumer) { barrier_wait(1 + consumer, 2 * WARPGROUP); }
template <int CONSUMERS> __device__ __forceinline__ void pass_turn(int consumer, bool last) {
    if (!last || consumer + 1 < CONSUMERS) barrier_arrive(1 + (consumer + 1) % CONSUMERS, 2 * WARPGROUP);
}

template <int D, int CONSUMERS, int KEYS, bool TURNS>
__device__ __forceinline__ void consume(ForwardShared<D, CONSUMERS, KEYS>& shared, bf16* out, float* lse, const Tile& tile,
                                        int n_tokens, int n_blocks, float scale) {
    int consumer = consumer_index(), lane = threadIdx.x % 32;
    int first_row = tile.first_row + consumer * 64, row = first_row + warp_of_group() * 16 + lane / 4;
    const bf16* q = shared.q + consumer * 64 * 64; // in the first panel
    float o[D / 2] = {}, s[KEYS / 2], keep[2], factor = scale * LOG2_E;
    unsigned p[KEYS / 4];
    Softmax softmax = {{MINUS_INFINITY, MINUS_INFINITY}, {0.0f, 0.0f}};
    auto weights = [&](int block) {
        int first_key = (n_blocks - 1 - block) * KEYS;
        weigh<KEYS>(s, softmax, keep, factor, first_key, row, first_key + KEYS - 1 > first_row);
    };

    if (TURNS && consumer == CONSUMERS - 1) barrier_arrive(1, 2 * WARPGROUP);
    mbarrier_wait(&shared.q_here, 0);
    mbarrier_wait(&shared.k_here[0], 0);
    if (TURNS) wait_turn<CONSUMERS>(consumer);
    wgmma_fence();
    product_nt<D, KEYS, CONSUMERS * 64>(s, q, shared.k[0]);
    wgmma_commit();
    if (TURNS) pass_turn<CONSUMERS>(consumer, n_blocks == 1);
    wgmma_wait<0>(s);
    release(&shared.k_free[0]);
    weights(0);
    pack_sums(p, s);
    for (int i = 1; i < n_blocks; i++) {
        int stage = i % STAGES, before = (i - 1) % STAGES;
        mbarrier_wait(&shared.k_here[stage], i / STAGES % 2);
        mbarrier_wait(&shared.v_here[before], (i - 1) / STAGES % 2);
        if (TURNS) wait_turn<CONSUMERS>(consumer);
        wgmma_fence();
        product_nt<D, KEYS, CONSUMERS * 64>(s, q, shared.k[stage]);
        wgmma_commit();
        product_nn<D, KEYS>(o, p, shared.v[before]);
        wgmma_commit();
        if (TURNS) pass_turn<CONSUMERS>(consumer, i == n_blocks - 1);
        wgmma_wait<1>(s);
        release(&shared.k_free[stage]);
        weights(i);
        // Sums are left alone where no row of the warp has seen a higher score, which after the first blocks is the rule. That the wait
        // stands in both branches keeps the assembler from moving it up, before exponentials that are made while the products go on.
        if (all_of_warp(keep[0] == 1.0f && keep[1] == 1.0f)) {
            wgmma_wait<0>(o);
        } else {
            wgmma_wait<0>(o);
#pragma unroll
            for (int j = 0; j < D / 2; j++) o[j] *= keep[j / 2 % 2];
        }
        release(&shared.v_free[before]);
        pack_sums(p, s);
    }
    int last = (n_blocks - 1) % STAGES;
    mbarrier_wait(&shared.v_here[last], (n_blocks - 1) / STAGES % 2);
    wgmma_fence();
    product_nn<D, KEYS>(o, p, shared.v[last]);
    wgmma_commit();
    wgmma_wait<0>(o);

    size_t head = blockIdx.x, n_heads = gridDim.x;
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float total = softmax.sum[h] + __shfl_xor_sync(0xffffffffu, softmax.sum[h], 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        inverse[h] = 1.0f / total;
        if (lane % 4 == 0 && row + 8 * h < tile.n_tokens)
            lse[head * n_tokens + tile.first_token + row + 8 * h] = softmax.most[h] * scale + logf(total);
    }
    bf16* to = out + ((tile.first_token + row) * n_heads + head) * D;
    store_row<D, 0>(to, o, inverse[0], row < tile.n_tokens);
    store_row<D, 1>(to + 8 * n_heads * D, o, inverse[1], row + 8 < tile.n_tokens);
}

template <int D, int CONSUMERS, int KEYS, int FEWER, int MORE>
__device__ __forceinline__ void forward(bf16* out, float* lse, const TensorMap& queries, const TensorMap& keys, const Tile& tile,
                                        int n_tokens, int per_kv, float scale) {
    DYNAMIC_SHARED(memory);
    auto& shared = *(ForwardShared<D, CONSUMERS, KEYS>*)aligned_shared(memory);
    int n_rows = min(CONSUMERS * 64, tile.n_tokens - tile.first_row), n_blocks = (tile.first_row + n_rows + KEYS - 1) / KEYS;
    if (threadIdx.x == 0) {
        mbarrier_init(&shared.q_here, 1);
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(&shared.k_here[i], 1);
            mbarrier_init(&shared.v_here[i], 1);
            mbarrier_init(&shared.k_free[i], RELEASES(CONSUMERS));
            mbarrier_init(&shared.v_free[i], RELEASES(CONSUMERS));
        }
        mbarrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        registers_fewer<FEWER>();
        if (threadIdx.x == 0) produce<D, CONSUMERS, KEYS>(shared, queries, keys, tile, per_kv, n_blocks);
    } else {
        registers_more<MORE>();
        consume<D, CONSUMERS, KEYS, D <= 128>(shared, out, lse, tile, n_tokens, n_blocks, scale);
    }
}

// `queries` has boxes of 64 dims of a head over the rows of a block, `keys` over the keys of one, both of qkv as (dim, head, token).
#define FORWARD(D, THREADS, CONSUMERS, KEYS, FEWER, MORE)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                                         \
        attention_hopper_d##D##_bf16(bf16* out, float* lse, const __grid_constant__ TensorMap queries,                               \
                                     const __grid_constant__ TensorMap keys, const Tile* tiles, int n_tokens, int per_kv,     \
                                     float scale) {                                                                                  \
        after_predecessors();                                                                                                        \
        forward<D, CONSUMERS, KEYS, FEWER, MORE>(out, lse, queries, keys, tiles[blockIdx.y], n_tokens, per_kv, scale);               \
    }
FORWARD(64, 512, 3, 128, 32, 160)
FORWARD(128, 384, 2, 128, 24, 240)
FORWARD(192, 384, 2, 112, 24, 240)
