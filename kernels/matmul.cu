// Matrix products whose additions have an order of their own: out[m,n] = op(a)[m,k] op(b)[k,n], k in pieces, each of which is summed
// by itself in f32, in steps of 16 terms from its first one on; then the pieces in pairs, ((p0 + p1) + (p2 + p3)) + .., or in turn,
// out + p0 + p1 + ... An element's bits depend on its row of a, its column of b and the pieces: not on m, n, the tile, the place in
// it, or which of the kernels below works, for all of them give the same instruction the same 16 terms. (Which rows and columns an mma
// has beside an element does not change it.)
//
// bf16, on GPUs that are no Hopper (matmul_hopper.cu): mma.sync m16n8k16 from shared memory, which cp.async fills STAGES - 1 steps
// ahead. One barrier a step: behind it a stage that was waited for is there for all, and the one before has been read by all. Sums that
// wait for others stay in registers. The operands are stored [m,k] or [k,m] and [n,k] or [k,n]; where rows do not
// begin at multiples of 16 bytes, elements are fetched one by one.
// f32: fused multiply-adds, one term after another.
// Grid: x tiles of out, eight rows of tiles at a time so that what they share is in the L2 cache; z: parts of the pieces, each a subtree
// whose sum goes to a plane of its own, for matmul_add. Tiles: 128 x 128 and 128 x 64 of 256 threads for many rows, limited by the
// tensor cores; 64 x 64 and 16 x 64 of 128 threads for few, the latter limited by reading b.
// Registers (sm_90a, nvcc 13.0, no spills): see tests/kernels/compile.rs, which prints them.
#include "matmul.cuh"

// The next terms to fetch.
struct Cursor {
    int piece, last, at, end;
    __device__ __forceinline__ Cursor(const Pieces& pieces, int first, int n) : piece(first), last(first + n) {
        at = pieces.begin(first);
        end = pieces.begin(first + 1);
        settle(pieces);
    }
    __device__ __forceinline__ bool is_here() const { return at < end; }
    __device__ __forceinline__ void settle(const Pieces& pieces) {
        while (at >= end && piece + 1 < last) {
            piece++;
            at = end; // pieces follow each other
            end = pieces.begin(piece + 1);
        }
    }
};

// What waits while pieces are added. After `add` of the last piece `sum` holds all.
// One piece.
template <int N> struct Whole {
    static constexpr bool ADDS_TO_OUT = false;
    __device__ __forceinline__ void add(float (&)[N], int) {}
};
// In pairs, up to eight: sums of 1, 2 and 4 that wait for as many more; which of them wait is the binary number of the pieces before.
template <int N> struct InPairs {
    static constexpr bool ADDS_TO_OUT = false;
    float one[N], two[N], four[N];
    static __device__ __forceinline__ bool pair(float (&waiting)[N], float (&sum)[N], bool is_second) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            if (is_second) sum[i] = waiting[i] + sum[i];
            else waiting[i] = sum[i];
        }
        return is_second;
    }
    __device__ __forceinline__ void add(float (&sum)[N], int i) {
        if (pair(one, sum, i & 1) && pair(two, sum, i & 2)) pair(four, sum, i & 4);
    }
};
// In turn, from what `sum` is set to before the first.
template <int N> struct InTurn {
    static constexpr bool ADDS_TO_OUT = true;
    float before[N];
    bool is_first = true;
    __device__ __forceinline__ void begin(const float (&old)[N]) {
#pragma unroll
        for (int i = 0; i < N; i++) before[i] = old[i];
        is_first = false;
    }
    __device__ __forceinline__ void add(float (&sum)[N], int) {
#pragma unroll
        for (int i = 0; i < N; i++) before[i] = sum[i] = is_first ? sum[i] : before[i] + sum[i];
        is_first = false;
    }
};

// A product and its operands.
template <class T> struct Product {
    void* out; // [m, n]; with several parts f32 [parts, m, n]
    int out_is_bf16;
    int accumulate; // in turn only
    const T* a;
    const T* b;
    int m, n;
    int a_vectors, b_vectors; // whether every eight terms (or rows, columns) of a piece begin at a multiple of 16 bytes
    Pieces pieces;
    int pieces_of_part;
};

// tile[ROWS, WIDTH + 8] = the first n_rows rows and n_columns columns from `from` on, zeros around them. Rows in shared memory are eight
// elements longer, so that ldmatrix meets no bank twice.
template <int ROWS, int WIDTH, int THREADS>
__device__ __forceinline__ void fetch(bf16* tile, const bf16* from, long long stride, int n_rows, int n_columns, bool vectors) {
#pragma unroll
    for (int first = 0; first < ROWS * WIDTH / CHUNK; first += THREADS) {
        int i = first + threadIdx.x, row = i / (WIDTH / CHUNK), column = i % (WIDTH / CHUNK) * CHUNK;
        if (ROWS * WIDTH / CHUNK % THREADS != 0 && row >= ROWS) break;
        bf16* to = tile + row * (WIDTH + 8) + column;
        const bf16* at = from + row * stride + column;
        if (row < n_rows && column + CHUNK <= n_columns && vectors) {
            cp_async_16(to, at);
        } else if (row >= n_rows || column >= n_columns) {
            *(uint4*)to = make_uint4(0, 0, 0, 0);
        } else {
            for (int e = 0; e < CHUNK; e++) to[e] = column + e < n_columns ? at[e] : bf16{0};
        }
    }
}

// How a block is divided: DOWN x ACROSS warps over a tile of ROWS x COLUMNS, DEPTH terms a step.
template <int ROWS_, int COLUMNS_, int DOWN_, int ACROSS_, int DEPTH_> struct Form {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, DOWN = DOWN_, ACROSS = ACROSS_, DEPTH = DEPTH_, STAGES = 4;
    static constexpr int THREADS = 32 * DOWN * ACROSS;
    // Tiles of a warp.
    static constexpr int M = ROWS / DOWN / 16, N = COLUMNS / ACROSS / 8;
    static constexpr int SUMS = M * N * 4;
    static __device__ __forceinline__ constexpr int elements(int across, bool k_outside) {
        return k_outside ? DEPTH * (across + 8) : across * (DEPTH + 8);
    }
};
using Large = Form<128, 128, 2, 4, 32>;
using Wide = Form<128, 64, 4, 2, 32>;
using Small = Form<64, 64, 2, 2, 64>;
using Flat = Form<16, 64, 1, 4, 64>;

template <class F, template <int> class Together, bool TRANS_A, bool TRANS_B>
__device__ __forceinline__ void multiply(const Product<bf16>& p) {
    constexpr int A_ROW = (TRANS_A ? F::ROWS : F::DEPTH) + 8, B_ROW = (TRANS_B ? F::DEPTH : F::COLUMNS) + 8;
    constexpr int A = F::elements(F::ROWS, TRANS_A), B = F::elements(F::COLUMNS, !TRANS_B);
    DYNAMIC_SHARED(memory);
    bf16* tiles = (bf16*)memory;
    const Pieces& pieces = p.pieces;
    Place place(blockIdx.x, p.m, p.n, F::ROWS, F::COLUMNS);
    int rows = p.m - place.row, columns = p.n - place.column;
    auto fetch_next = [&](int stage, Cursor& next) {
        if (next.is_here()) {
            bf16 *a = tiles + stage * (A + B), *b = a + A;
            int n = next.end - next.at;
            if (TRANS_A)
                fetch<F::DEPTH, F::ROWS, F::THREADS>(a, p.a + (size_t)next.at * p.m + place.row, p.m, n, rows, p.a_vectors);
            else
                fetch<F::ROWS, F::DEPTH, F::THREADS>(a, p.a + (size_t)place.row * pieces.k + next.at, pieces.k, rows, n, p.a_vectors);
            if (TRANS_B)
                fetch<F::COLUMNS, F::DEPTH, F::THREADS>(b, p.b + (size_t)place.column * pieces.k + next.at, pieces.k, columns, n, p.b_vectors);
            else
                fetch<F::DEPTH, F::COLUMNS, F::THREADS>(b, p.b + (size_t)next.at * p.n + place.column, p.n, n, columns, p.b_vectors);
            next.at += F::DEPTH;
            next.settle(pieces);
        }
        cp_async_commit(); // empty at the end, so that the number of those under way is always the same
    };

    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int down = warp / F::ACROSS * F::M * 16, across = warp % F::ACROSS * F::N * 8;
    bool even = p.n % 2 == 0 && (unsigned long long)p.out % 8 == 0;
    float sum[F::SUMS];
    Together<F::SUMS> together;
    // Sum `(i * N + j) * 4 + 2 h + e` of a thread is of this row and column of the tile.
    auto row_of = [&](int i, int h) { return down + i * 16 + lane / 4 + 8 * h; };
    auto column_of = [&](int j) { return across + j * 8 + lane % 4 * 2; };
    if constexpr (Together<1>::ADDS_TO_OUT) {
        if (p.accumulate) {
#pragma unroll
            for (int i = 0; i < F::M; i++)
#pragma unroll
                for (int j = 0; j < F::N; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int row = row_of(i, e / 2), column = column_of(j) + e % 2;
                        bool here = row < rows && column < columns;
                        sum[(i * F::N + j) * 4 + e] =
                            here ? ((const float*)p.out)[(size_t)(place.row + row) * p.n + place.column + column] : 0.0f;
                    }
            together.begin(sum);
        }
    }

    int first = blockIdx.z * p.pieces_of_part;
    Cursor next(pieces, first, p.pieces_of_part);
    for (int stage = 0; stage < F::STAGES - 1; stage++) fetch_next(stage, next);
    int step = 0;
    for (int piece = first; piece < first + p.pieces_of_part; piece++) {
#pragma unroll
        for (int i = 0; i < F::SUMS; i++) sum[i] = 0.0f;
        int end = pieces.begin(piece + 1);
        for (int at = pieces.begin(piece); at < end; at += F::DEPTH, step++) {
            cp_async_wait<F::STAGES - 2>();
            __syncthreads();
            fetch_next((step + F::STAGES - 1) % F::STAGES, next);
            const bf16 *a = tiles + step % F::STAGES * (A + B), *b = a + A;
#pragma unroll
            for (int k = 0; k < F::DEPTH; k += 16) {
                if (at + k >= end) break;
                unsigned of_b[F::N][2];
#pragma unroll
                for (int j = 0; j < F::N; j += 2) {
                    unsigned both[4];
                    if (TRANS_B)
                        ldmatrix_x4(both, b + (across + j * 8 + lane % 8 + lane / 16 * 8) * B_ROW + k + lane / 8 % 2 * 8);
                    else
                        ldmatrix_x4_trans(both, b + (k + lane % 16) * B_ROW + across + j * 8 + lane / 16 * 8);
                    of_b[j][0] = both[0];
                    of_b[j][1] = both[1];
                    of_b[j + 1][0] = both[2];
                    of_b[j + 1][1] = both[3];
                }
#pragma unroll
                for (int i = 0; i < F::M; i++) {
                    unsigned of_a[4];
                    if (TRANS_A)
                        ldmatrix_x4_trans(of_a, a + (k + lane % 8 + lane / 16 * 8) * A_ROW + down + i * 16 + lane / 8 % 2 * 8);
                    else
                        ldmatrix_x4(of_a, a + (down + i * 16 + lane % 16) * A_ROW + k + lane / 16 * 8);
#pragma unroll
                    for (int j = 0; j < F::N; j++) mma_m16n8k16_bf16(sum + (i * F::N + j) * 4, of_a, of_b[j]);
                }
            }
        }
        together.add(sum, piece - first);
    }

    size_t plane = gridDim.z > 1 ? (size_t)blockIdx.z * p.m * p.n : 0;
#pragma unroll
    for (int i = 0; i < F::M; i++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int j = 0; j < F::N; j++) {
                int row = row_of(i, h), column = column_of(j);
                const float* both = sum + (i * F::N + j) * 4 + 2 * h;
                if (row < rows && column < columns)
                    put_pair(p.out, p.out_is_bf16, plane + (size_t)(place.row + row) * p.n + place.column + column, columns - column, even,
                             both[0], both[1]);
            }
}

#define ARGUMENTS(T)                                                                                                              \
    void *out, int out_is_bf16, int accumulate, const T *a, const T *b, int m, int n, int a_vectors, int b_vectors, const int *starts, \
        int k, int n_pieces, int pieces_of_part
#define PRODUCT(T) Product<T>{out, out_is_bf16, accumulate, a, b, m, n, a_vectors, b_vectors, Pieces{starts, k, n_pieces}, pieces_of_part}
#define MATMUL(name, threads, form, together, trans_a, trans_b)                                                     \
    extern "C" __global__ void __launch_bounds__(threads, 1) matmul_##name##_bf16(ARGUMENTS(bf16)) {     \
        after_predecessors();                        \
        static_assert(form::THREADS == threads, ""); \
        multiply<form, together, trans_a, trans_b>(PRODUCT(bf16));                                         \
    }
MATMUL(whole_nt, 256, Large, Whole, false, true)
MATMUL(whole_nn, 256, Large, Whole, false, false)
MATMUL(pairs_nt, 256, Wide, InPairs, false, true)
MATMUL(pairs_nn, 256, Wide, InPairs, false, false)
MATMUL(pairs_tn, 256, Wide, InPairs, true, false)
MATMUL(turn_tn, 256, Large, InTurn, true, false)
MATMUL(small_nt, 128, Small, InPairs, false, true)
MATMUL(small_nn, 128, Small, InPairs, false, false)
MATMUL(small_tn, 128, Small, InPairs, true, false)
MATMUL(small_turn_tn, 128, Small, InTurn, true, false)
MATMUL(flat_nt, 128, Flat, InPairs, false, true)
MATMUL(flat_nn, 128, Flat, InPairs, false, false)

// f32: 64 x 64 of out by 256 threads, each four rows and four columns side by side; 16 terms a step, the next on their way in registers.
template <template <int> class Together> __device__ __forceinline__ void multiply_f32(const Product<float>& p, int trans_a, int trans_b) {
    constexpr int TILE = 64, DEPTH = 16, ROW = TILE + 4;
    DYNAMIC_SHARED(memory);
    float *a = (float*)memory, *b = a + DEPTH * ROW; // [DEPTH, ROW] each
    const Pieces& pieces = p.pieces;
    Place place(blockIdx.x, p.m, p.n, TILE, TILE);
    int down = threadIdx.x / 16 * 4, across = threadIdx.x % 16 * 4;
    int rows = p.m - place.row, columns = p.n - place.column;
    // Element i that this thread fetches: the row of op(a), or column of op(b), and the term; neighbours where they lie side by side.
    auto line_of = [&](bool k_outside, int i) { return k_outside ? (threadIdx.x + i * 256) % TILE : (threadIdx.x + i * 256) / DEPTH; };
    auto term_of = [&](bool k_outside, int i) { return k_outside ? (threadIdx.x + i * 256) / TILE : (threadIdx.x + i * 256) % DEPTH; };
    auto read = [&](float to[4], const float* from, bool k_outside, int first, int n_here, int stride, const Cursor& next) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int line = line_of(k_outside, i), term = term_of(k_outside, i);
            bool here = line < n_here && next.at + term < next.end;
            size_t l = first + line, t = next.at + term;
            to[i] = here ? from[k_outside ? t * stride + l : l * stride + t] : 0.0f;
        }
    };
    float of_a[4], of_b[4];
    auto fetch_next = [&](Cursor& next) {
        if (!next.is_here()) return;
        read(of_a, p.a, trans_a, place.row, rows, trans_a ? p.m : pieces.k, next);
        read(of_b, p.b, !trans_b, place.column, columns, trans_b ? pieces.k : p.n, next);
        next.at += DEPTH;
        next.settle(pieces);
    };
    auto out_at = [&](int i) { return (size_t)(place.row + down + i / 4) * p.n + place.column + across + i % 4; };
    auto is_here = [&](int i) { return down + i / 4 < rows && across + i % 4 < columns; };

    float sum[16];
    Together<16> together;
    if constexpr (Together<1>::ADDS_TO_OUT) {
        if (p.accumulate) {
#pragma unroll
            for (int i = 0; i < 16; i++) sum[i] = is_here(i) ? ((const float*)p.out)[out_at(i)] : 0.0f;
            together.begin(sum);
        }
    }
    int first = blockIdx.z * p.pieces_of_part;
    Cursor next(pieces, first, p.pieces_of_part);
    fetch_next(next);
    for (int piece = first; piece < first + p.pieces_of_part; piece++) {
#pragma unroll
        for (int i = 0; i < 16; i++) sum[i] = 0.0f;
        int end = pieces.begin(piece + 1);
        for (int term = pieces.begin(piece); term < end; term += DEPTH) {
            __syncthreads(); // the last terms have been read by all
#pragma unroll
            for (int i = 0; i < 4; i++) {
                a[term_of(trans_a, i) * ROW + line_of(trans_a, i)] = of_a[i];
                b[term_of(!trans_b, i) * ROW + line_of(!trans_b, i)] = of_b[i];
            }
            __syncthreads();
            fetch_next(next);
            int n = min(DEPTH, end - term);
            for (int k = 0; k < n; k++) {
                float4 x = *(const float4*)(a + k * ROW + down), y = *(const float4*)(b + k * ROW + across);
                float of_row[4] = {x.x, x.y, x.z, x.w}, of_column[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
                for (int i = 0; i < 16; i++) sum[i] = fmaf(of_row[i / 4], of_column[i % 4], sum[i]);
            }
        }
        together.add(sum, piece - first);
    }
    float* out = (float*)p.out + (gridDim.z > 1 ? (size_t)blockIdx.z * p.m * p.n : 0);
#pragma unroll
    for (int i = 0; i < 16; i++)
        if (is_here(i)) out[out_at(i)] = sum[i];
}

extern "C" __global__ void __launch_bounds__(256, 1) matmul_pairs_f32(ARGUMENTS(float), int trans_a, int trans_b) {
    after_predecessors();
    multiply_f32<InPairs>(PRODUCT(float), trans_a, trans_b);
}
extern "C" __global__ void __launch_bounds__(256, 2) matmul_turn_f32(ARGUMENTS(float), int trans_a, int trans_b) {
    after_predecessors();
    multiply_f32<InTurn>(PRODUCT(float), trans_a, trans_b);
}

// out[n] = the parts [n_parts, n] added in pairs; 2, 4 or 8 of them.
template <class T> __device__ __forceinline__ void add_parts(T* out, const float* parts, int n_parts, long long n) {
    for_chunks(n, [&](long long at, long long left) {
        float sum[CHUNK];
        InPairs<CHUNK> together;
        for (int part = 0; part < n_parts; part++) {
            load_chunk(sum, parts + part * n + at, left);
            together.add(sum, part);
        }
        store_chunk(out + at, sum, left);
    });
}
extern "C" __global__ void __launch_bounds__(256) matmul_add_f32(float* out, const float* parts, int n_parts, long long n) {
    after_predecessors();
    add_parts(out, parts, n_parts, n);
}
extern "C" __global__ void __launch_bounds__(256) matmul_add_bf16(bf16* out, const float* parts, int n_parts, long long n) {
    after_predecessors();
    add_parts(out, parts, n_parts, n);
}
