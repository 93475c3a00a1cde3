// The products of matmul.cu for bf16 on Hopper's own instructions: TMA copies tiles, wgmma multiplies them. The order of additions has
// the same form: pieces of k, each summed by itself in f32 in steps of 16 terms from its first one on, the pieces in pairs or in turn.
// On a Hopper GPU all products of bf16 in a canonical order are made here, whatever their shape, so that an element's bits are those of
// one kind of instruction: m64nNk16 on the same 16 terms. Whether its operands have k innermost, N, and what the other rows and columns
// of a tile hold must not show in an element; PTX does not promise that. It holds for H100s after Xie et al. 2025 (MMA-Sim: one fused
// sum of 16 products and the old sum, cut to 25 fractional bits, by mma.sync too), and tests/gpu.rs looks at it on the GPU at hand. Other
// GPUs have matmul.cu, whose bits need not be these.
//
// Warpgroups 0 .. CONSUMERS - 1 are consumers, with 64 rows of a tile each; one thread of the last warpgroup is the producer, which copies
// steps of 64 terms (128 bytes, one swizzle) into a ring of stages. `here` of a stage ends when its bytes have come, `free` when every
// warp of the consumers has waited for the products that read it, one step after they were asked for. Blocks stay: each works on tile
// after tile, and the producer is up to STAGES steps ahead of the consumers across pieces and tiles. The large tiles are worked on by
// clusters of two blocks, one below the other: each fetches half of their columns of b for both, and a stage is free when both have read
// it. No sum knows of that. Operands with k outermost ([k, m],
// [k, n]) lie in panels [64 terms, 64 columns], which wgmma reads transposed.
//
// TMA wants rows at multiples of 16 bytes, and what follows a piece must not be added to it: other operands are copied by
// matmul_hopper_space into [.., k'], where pieces begin at multiples of 16 terms with zeros between them. A zero changes no sum, so
// these products have the bits that all others have.
//
// Sums that wait for others are each thread's own, in registers and in shared memory; sums in turn wait in `out`.
// On paper (an SM: 2048 multiply-adds a clock; from L2 48 bytes a clock, of the 64 that it can take; from a H200's memory 20):
//                                  bytes a step:       clocks a step:                 sums of a thread:
//   form    tile       stages      fetched, arriving   tensor cores, L2, arriving     under way, waiting
//   Large   128 x 256  4 x 48 KB   32768, 49152        1024, 683, 768                 128, none
//   Wide    128 x 128  4 x 32 KB   24576, 32768         512, 512, 512                  64, 96 and 96 KB of shared memory a block
//   Small    64 x 64  12 x 16 KB   16384, 16384         128, 341, 256                  32, 48 and 24 KB
// Registers (sm_90a, nvcc 13.0, no spills): 168, which setmaxnreg makes 40 for the producer and 232 for consumers; Small 142, 90 in turn.
// One block an SM. Large can keep the tensor cores busy but for a block's first step and the ends of tiles: 64 KB of bf16 are written
// each 65536 clocks at 4096 terms, 3300 clocks of memory, while the next tile is copied. In turn 256 KB of f32 are read and written,
// 13000 clocks, of which reading is waited for. Wide, for sums over a dim that tp divides, would be limited by L2 to three quarters of
// the tensor cores if each block fetched all of b for itself; as it is nothing is left over, neither of L2 nor of what an SM can take.
// Whole sums may end in squared ReLU (End), which saves the passes over memory that would read them again: of a layer with F = 4 H that is
// 3 of 5 times T F, for 64 KB more that a tile writes (forward) or reads (backward), which the consumers wait for.
// Few rows are limited by reading b: a step brings 8 KB of it, 400 clocks of memory, three times what the tensor cores take for 64 rows,
// empty ones among them; 96 KB are under way on each SM, where 30 KB hide memory's latency. So few rows are rows here too, and not
// columns of a product with its operands exchanged.
#include "hopper.cuh"
#include "matmul.cuh"
#include "activation.cuh"

// Terms of a step.
constexpr int DEPTH = 64;
constexpr int PANEL = 64 * DEPTH;

template <int CONSUMERS_, int COLUMNS_, int STAGES_, int CLUSTER_> struct Form {
    static constexpr int CONSUMERS = CONSUMERS_, ROWS = 64 * CONSUMERS, COLUMNS = COLUMNS_, STAGES = STAGES_, CLUSTER = CLUSTER_;
    static constexpr int SUMS = COLUMNS / 2; // of a consumer's thread
    static constexpr int CONSUMER_THREADS = CONSUMERS * WARPGROUP, THREADS = CONSUMER_THREADS + WARPGROUP;
};
using Large = Form<2, 256, 4, 2>;
using Wide = Form<2, 128, 4, 2>;
using Small = Form<1, 64, 12, 1>;

enum Together { WHOLE, IN_PAIRS, IN_TURN };
// What becomes of whole sums: they are stored; they and their activation are; only their product with the slope of the activation is.
enum End { STORED, ACTIVATED, ACTIVATED_BACK };

template <class F> struct Stages {
    bf16 a[F::STAGES][F::ROWS * DEPTH];
    bf16 b[F::STAGES][F::COLUMNS * DEPTH];
    Mbarrier here[F::STAGES], free[F::STAGES];
};

struct Product {
    void* out; // [m, n]; with several parts f32 [parts, m, n]
    int out_is_bf16;
    int accumulate; // in turn only
    int m, n;
    Pieces pieces;
    int pieces_of_part;
    bf16* other; // [m, n], of ends with an activation: where it goes, or what was activated; n is then a multiple of COLUMNS
};

// A tile's part of the pieces, by turns of the clusters: their blocks have tiles below each other.
template <class F> struct Work {
    static constexpr int ROWS = F::CLUSTER * F::ROWS; // of all blocks
    int at, rank, n_tiles, n;
    __device__ __forceinline__ Work(const Product& p) : at(blockIdx.x / F::CLUSTER), rank(F::CLUSTER > 1 ? cluster_rank() : 0) {
        n_tiles = (p.m + ROWS - 1) / ROWS * ((p.n + F::COLUMNS - 1) / F::COLUMNS);
        n = n_tiles * (p.pieces.n / p.pieces_of_part);
    }
    __device__ __forceinline__ bool is_here() const { return at < n; }
    __device__ __forceinline__ void next() { at += gridDim.x / F::CLUSTER; }
    __device__ __forceinline__ int part() const { return at / n_tiles; }
    // This block's, which for the last block may begin behind the last row.
    __device__ __forceinline__ Place place(const Product& p) const {
        Place place(at % n_tiles, p.m, p.n, ROWS, F::COLUMNS);
        place.row += rank * F::ROWS;
        return place;
    }
};

// A stage of the ring, and the parity of the round.
template <class F> struct Turn {
    int stage = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage < F::STAGES) return;
        stage = 0;
        parity ^= 1;
    }
};

// Terms `term`.. of lines (rows of a, columns of b) `line`.., to all BLOCKS blocks of a cluster.
template <int LINES, bool K_OUTSIDE, int BLOCKS>
__device__ __forceinline__ void fetch(bf16* to, const TensorMap* map, int line, int term, Mbarrier* here) {
    auto load = [&](bf16* to, int dim, int token) {
        if constexpr (BLOCKS > 1) tensor_load_to_all<BLOCKS>(to, map, dim, 0, token, here);
        else tensor_load(to, map, dim, 0, token, here);
    };
    if constexpr (K_OUTSIDE) {
#pragma unroll
        for (int i = 0; i < LINES; i += 64) load(to + i * DEPTH, line + i, term);
    } else {
        load(to, term, line);
    }
}

template <class F, bool TRANS_A, bool TRANS_B>
__device__ __forceinline__ void produce(Stages<F>& stages, const Product& p, const TensorMap* a, const TensorMap* b) {
    tensor_prefetch(a);
    tensor_prefetch(b);
    constexpr int SHARE = F::COLUMNS / F::CLUSTER; // of b's columns, which this block fetches for all
    Turn<F> turn;
    for (Work<F> work(p); work.is_here(); work.next()) {
        Place place = work.place(p);
        int first = work.part() * p.pieces_of_part, end = p.pieces.begin(first + p.pieces_of_part);
        for (int piece = first, next = p.pieces.begin(first); next < end; piece++) {
            int at = next;
            next = p.pieces.begin(piece + 1);
            for (; at < next; at += DEPTH, turn.next()) {
                Mbarrier* here = &stages.here[turn.stage];
                mbarrier_wait(&stages.free[turn.stage], turn.parity ^ 1);
                mbarrier_arrive_expect(here, sizeof stages.a[0] + sizeof stages.b[0]);
                fetch<F::ROWS, TRANS_A, 1>(stages.a[turn.stage], a, place.row, at, here);
                int column = work.rank * SHARE;
                fetch<SHARE, !TRANS_B, F::CLUSTER>(stages.b[turn.stage] + column * DEPTH, b, place.column + column, at, here);
            }
        }
    }
}

// sum += 16 terms; `a` and `b` are the stage's first operands, `term` the first of the 16.
template <class F, bool TRANS_A, bool TRANS_B>
__device__ __forceinline__ void multiply(float (&sum)[F::SUMS], Matrix a, Matrix b, int term) {
    // In units of 16 bytes: two pieces of a row further, or 16 rows of a panel.
    Wgmma<F::COLUMNS>::template add_from<TRANS_A, !TRANS_B>(sum, a + term * (TRANS_A ? 8 : 1) / (TRANS_A ? 1 : 8),
                                                            b + term * (TRANS_B ? 1 : 8) / (TRANS_B ? 8 : 1));
}

// sum = n_terms terms. Takes the stages from `turn` on and frees them.
template <class F, bool TRANS_A, bool TRANS_B>
__device__ __forceinline__ void add_piece(float (&sum)[F::SUMS], Stages<F>& stages, Turn<F>& turn, int n_terms) {
    int consumer = threadIdx.x / WARPGROUP;
    auto a_of = [&](int stage) { return matrix_at(stages.a[stage] + consumer * PANEL, PANEL * 2); };
    auto b_of = [&](int stage) { return matrix_at(stages.b[stage], PANEL * 2); };
#pragma unroll
    for (int i = 0; i < F::SUMS; i++) sum[i] = 0.0f;
    int before = -1; // the stage that the products under way read
    for (; n_terms >= DEPTH; n_terms -= DEPTH, turn.next()) {
        mbarrier_wait(&stages.here[turn.stage], turn.parity);
        Matrix a = a_of(turn.stage), b = b_of(turn.stage);
        wgmma_fence();
#pragma unroll
        for (int term = 0; term < DEPTH; term += 16) multiply<F, TRANS_A, TRANS_B>(sum, a, b, term);
        wgmma_commit();
        wgmma_wait<1>();
        if (before >= 0) release<F::CLUSTER>(&stages.free[before]);
        before = turn.stage;
    }
    wgmma_wait<0>(sum);
    if (before >= 0) release<F::CLUSTER>(&stages.free[before]);
    if (n_terms <= 0) return;
    // What is left, one by one: ptxas would wait after each product of the loop above, too, if these went on beside each other.
    mbarrier_wait(&stages.here[turn.stage], turn.parity);
    Matrix a = a_of(turn.stage), b = b_of(turn.stage);
    for (int term = 0; term < n_terms; term += 16) {
        wgmma_fence();
        multiply<F, TRANS_A, TRANS_B>(sum, a, b, term);
        wgmma_commit();
        wgmma_wait<0>(sum);
    }
    release<F::CLUSTER>(&stages.free[turn.stage]);
    turn.next();
}

// Sums that wait for as many pieces more: KEPT of a thread's in registers, the others in shared memory, beside the next thread's.
template <class F, int KEPT> struct Level {
    static constexpr int SHARED = (F::SUMS - KEPT) * F::CONSUMER_THREADS;
    float kept[KEPT > 0 ? KEPT : 1];
    float* at;
    // Whether `sum` is now that of both; else it waits.
    __device__ __forceinline__ bool pair(float (&sum)[F::SUMS], bool is_second) {
#pragma unroll
        for (int i = 0; i < F::SUMS; i++) {
            float& waiting = i < KEPT ? kept[i < KEPT ? i : 0] : at[(i - KEPT) * F::CONSUMER_THREADS];
            if (is_second) sum[i] = waiting + sum[i];
            else waiting = sum[i];
        }
        return is_second;
    }
};
// Sums of 1, 2 and 4 pieces; which of them wait is the binary number of the pieces before.
template <class F> struct Waiting {
    Level<F, F::SUMS> one;
    Level<F, F::SUMS / 2> two;
    Level<F, 0> four;
    __device__ __forceinline__ explicit Waiting(float* memory) {
        two.at = memory + threadIdx.x;
        four.at = two.at + two.SHARED;
    }
    // Behind the last piece `sum` holds all.
    __device__ __forceinline__ void add(float (&sum)[F::SUMS], int i) {
        if (one.pair(sum, i & 1) && two.pair(sum, i & 2)) four.pair(sum, i & 4);
    }
};

// The tile's sums to plane `part`, onto what is there where `adds`.
template <class F>
__device__ __forceinline__ void put_sums(const Product& p, const Place& place, int part, float (&sum)[F::SUMS], bool adds) {
    int lane = threadIdx.x % 32, column = place.column + lane % 4 * 2, row = place.row + threadIdx.x / 32 * 16 + lane / 4;
    size_t plane = (size_t)part * p.m * p.n;
    if (p.out_is_bf16 && place.column + F::COLUMNS <= p.n && p.n % CHUNK == 0 && is_aligned(p.out)) {
        bf16* to = (bf16*)p.out + plane + (size_t)row * p.n + place.column;
        store_row<F::COLUMNS, 0>(to, sum, 1.0f, row < p.m);
        store_row<F::COLUMNS, 1>(to + (size_t)8 * p.n, sum, 1.0f, row + 8 < p.m);
        return;
    }
    bool even = p.n % 2 == 0 && (unsigned long long)p.out % 8 == 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (row + 8 * h >= p.m) continue;
        size_t at = plane + (size_t)(row + 8 * h) * p.n + column;
#pragma unroll
        for (int j = 0; j < F::COLUMNS / 8; j++, at += 8) {
            int n_here = p.n - column - 8 * j;
            if (n_here <= 0) break;
            float x = sum[4 * j + 2 * h], y = sum[4 * j + 2 * h + 1];
            if (adds) {
                const float* old = (const float*)p.out + at;
                float2 both = n_here >= 2 && even ? *(const float2*)old : make_float2(old[0], n_here >= 2 ? old[1] : 0.0f);
                x = both.x + x;
                y = both.y + y;
            }
            put_pair(p.out, p.out_is_bf16, at, n_here, even, x, y);
        }
    }
}

// The sums rounded, and what squared ReLU makes of them: the bits of its own pass over stored sums (activation.cu).
template <class F> __device__ __forceinline__ void put_activated(const Product& p, const Place& place, float (&sum)[F::SUMS]) {
    int row = place.row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    size_t at = (size_t)row * p.n + place.column, below = (size_t)8 * p.n;
    bf16* to = (bf16*)p.out + at;
#pragma unroll
    for (int i = 0; i < F::SUMS; i++) sum[i] = rounded<bf16>(sum[i]);
    store_row<F::COLUMNS, 0>(to, sum, 1.0f, row < p.m);
    store_row<F::COLUMNS, 1>(to + below, sum, 1.0f, row + 8 < p.m);
#pragma unroll
    for (int i = 0; i < F::SUMS; i++) sum[i] = squared_relu_of(sum[i]);
    store_row<F::COLUMNS, 0>(p.other + at, sum, 1.0f, row < p.m);
    store_row<F::COLUMNS, 1>(p.other + at + below, sum, 1.0f, row + 8 < p.m);
}
// The gradient of what was activated from the sums, which are that of the activation.
template <class F> __device__ __forceinline__ void put_activated_back(const Product& p, const Place& place, float (&sum)[F::SUMS]) {
    int row = place.row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    size_t at = (size_t)row * p.n + place.column, below = (size_t)8 * p.n;
    auto turn = [&](float x, float y, int i) {
        sum[i] = squared_relu_backward_of(x, rounded<bf16>(sum[i]));
        sum[i + 1] = squared_relu_backward_of(y, rounded<bf16>(sum[i + 1]));
    };
    load_row<F::COLUMNS, 0>(p.other + at, row < p.m, turn);
    load_row<F::COLUMNS, 1>(p.other + at + below, row + 8 < p.m, turn);
    bf16* to = (bf16*)p.out + at;
    store_row<F::COLUMNS, 0>(to, sum, 1.0f, row < p.m);
    store_row<F::COLUMNS, 1>(to + below, sum, 1.0f, row + 8 < p.m);
}

template <class F, Together HOW, bool TRANS_A, bool TRANS_B, End END>
__device__ __forceinline__ void consume(Stages<F>& stages, const Product& p) {
    float sum[F::SUMS];
    Waiting<F> waiting((float*)(&stages + 1));
    Turn<F> turn;
    for (Work<F> work(p); work.is_here(); work.next()) {
        Place place = work.place(p);
        int first = work.part() * p.pieces_of_part, next = p.pieces.begin(first);
        for (int i = 0; i < p.pieces_of_part; i++) {
            int begin = next;
            next = p.pieces.begin(first + i + 1);
            add_piece<F, TRANS_A, TRANS_B>(sum, stages, turn, next - begin);
            if (HOW == IN_PAIRS) waiting.add(sum, i);
            if (HOW == IN_TURN) put_sums<F>(p, place, 0, sum, p.accumulate || i > 0);
        }
        if (END == ACTIVATED) put_activated<F>(p, place, sum);
        if (END == ACTIVATED_BACK) put_activated_back<F>(p, place, sum);
        if (END == STORED && HOW != IN_TURN) put_sums<F>(p, place, work.part(), sum, false);
    }
}

// What fills the stages of `b`, hinted at before `a` is there: by one thread.
template <class F> __device__ __forceinline__ void hint_at_weights(const Product& p, const TensorMap& b) {
    Work<F> work(p);
    int first = work.part() * p.pieces_of_part, at = p.pieces.begin(first), end = p.pieces.begin(first + p.pieces_of_part);
    for (int i = 0; i < F::STAGES && at < end; i++, at += DEPTH) tensor_hint(&b, at, 0, work.place(p).column);
}

template <class F, Together HOW, bool TRANS_A, bool TRANS_B, End END = STORED>
__device__ __forceinline__ void multiply_all(const Product& p, const TensorMap& a, const TensorMap& b) {
    DYNAMIC_SHARED(memory);
    auto& stages = *(Stages<F>*)aligned_shared(memory);
    let_successor_come();
    // Few rows are those of a decode step: weights are most of what is read.
    if constexpr (F::CONSUMERS == 1 && !TRANS_A && TRANS_B)
        if (p.m <= F::ROWS && threadIdx.x == F::CONSUMER_THREADS) hint_at_weights<F>(p, b);
    wait_for_predecessors();
    if (threadIdx.x == 0) {
        for (int i = 0; i < F::STAGES; i++) {
            mbarrier_init(&stages.here[i], 1);
            mbarrier_init(&stages.free[i], F::CLUSTER * RELEASES(F::CONSUMERS));
        }
        mbarrier_init_done();
    }
    if constexpr (F::CLUSTER > 1) cluster_wait<F::CLUSTER>();
    else __syncthreads();
    // One consumer has registers enough.
    if (threadIdx.x >= F::CONSUMER_THREADS) {
        if constexpr (F::CONSUMERS > 1) registers_fewer<40>();
        if (threadIdx.x == F::CONSUMER_THREADS) produce<F, TRANS_A, TRANS_B>(stages, p, &a, &b);
    } else {
        if constexpr (F::CONSUMERS > 1) registers_more<232>();
        consume<F, HOW, TRANS_A, TRANS_B, END>(stages, p);
    }
    // What the other blocks send must find this one's shared memory.
    if constexpr (F::CLUSTER > 1) cluster_wait<F::CLUSTER>();
}

// The maps: boxes of 64 terms of as many lines as a block fetches where k is innermost, of 64 lines of 64 terms where it is outermost.
#define MATMUL(name, threads, form, how, trans_a, trans_b)                                                                           \
    extern "C" __cluster_dims__(form::CLUSTER, 1, 1) __global__ void __launch_bounds__(threads, 1)                                   \
        matmul_hopper_##name##_bf16(void* out, int out_is_bf16, int accumulate, const __grid_constant__ TensorMap a,                 \
                                    const __grid_constant__ TensorMap b, int m, int n, const int* starts, int k, int n_pieces,       \
                                    int pieces_of_part) {                                                                            \
        static_assert(form::THREADS == threads, "");                                                                                 \
        multiply_all<form, how, trans_a, trans_b>(                                                                                   \
            {out, out_is_bf16, accumulate, m, n, {starts, k, n_pieces}, pieces_of_part, nullptr}, a, b);                             \
    }
// Whole sums of bf16 that end in squared ReLU.
#define MATMUL_ACTIVATED(name, trans_b, end)                                                                                         \
    extern "C" __cluster_dims__(2, 1, 1) __global__ void __launch_bounds__(384, 1)                                                   \
        matmul_hopper_whole_##name##_bf16(void* out, bf16* other, const __grid_constant__ TensorMap a,                               \
                                          const __grid_constant__ TensorMap b, int m, int n, int k) {                                \
        static_assert(Large::THREADS == 384 && Large::CLUSTER == 2, "");                                                             \
        multiply_all<Large, WHOLE, false, trans_b, end>({out, 1, 0, m, n, {nullptr, k, 1}, 1, other}, a, b);                         \
    }
MATMUL(whole_nt, 384, Large, WHOLE, false, true)
MATMUL(whole_nn, 384, Large, WHOLE, false, false)
MATMUL_ACTIVATED(nt_squared_relu, true, ACTIVATED)
MATMUL_ACTIVATED(nn_squared_relu_backward, false, ACTIVATED_BACK)
MATMUL(pairs_nt, 384, Wide, IN_PAIRS, false, true)
MATMUL(pairs_nn, 384, Wide, IN_PAIRS, false, false)
MATMUL(pairs_tn, 384, Wide, IN_PAIRS, true, false)
MATMUL(turn_tn, 384, Large, IN_TURN, true, false)
MATMUL(small_nt, 256, Small, IN_PAIRS, false, true)
MATMUL(small_nn, 256, Small, IN_PAIRS, false, false)
MATMUL(small_tn, 256, Small, IN_PAIRS, true, false)
MATMUL(small_turn_tn, 256, Small, IN_TURN, true, false)

// to[n_lines, terms'] = from[n_lines, terms], or with k outermost to[terms', to_columns] = from[terms, n_lines], each piece from where it
// begins in `to` on, zeros after it and around. A block a row of `to`.
extern "C" __global__ void __launch_bounds__(256) matmul_hopper_space_bf16(bf16* to, const bf16* from, int k_outside, int n_lines,
                                                                           int to_columns, const int* starts, const int* to_starts,
                                                                           int n_pieces, int k, int to_k) {
    after_predecessors();
    Pieces pieces{starts, k, n_pieces}, to_pieces{to_starts, to_k, n_pieces};
    // Where term `t` of `to` comes from; -1: it is a zero.
    auto source = [&](int t) {
        for (int i = 0; i < n_pieces; i++) {
            int begin = to_pieces.begin(i);
            if (t < begin || t >= to_pieces.begin(i + 1)) continue;
            int term = pieces.begin(i) + t - begin;
            return term < pieces.begin(i + 1) ? term : -1;
        }
        return -1;
    };
    int row = blockIdx.x, of_row = k_outside ? source(row) : row;
    for (int column = threadIdx.x; column < to_columns; column += blockDim.x) {
        int line = k_outside ? column : row, term = k_outside ? of_row : source(column);
        bool here = line < n_lines && term >= 0;
        to[(size_t)row * to_columns + column] = here ? from[k_outside ? (size_t)term * n_lines + line : (size_t)line * k + term] : bf16{0};
    }
}
