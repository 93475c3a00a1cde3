// Rows of the embedding table gathered, and their gradients added up in token order.
// embed: one block for each token. Backward: embed_order sorts the tokens by row of the table, equal ones in token order, by counting for
// each how many go before it (T^2 comparisons of ids in shared memory: 67 million at T = 8192, 4.3 billion at 65536; nothing is
// done for rows of the table without a token); then embed_backward has a block for each token and 1024 columns, of which the first
// of a run of equal ones adds the run up. No atomics: the order is fixed.
// Limited by memory, and for a token that is very frequent by its run, which one block for each 1024 columns walks along, four rows
// under way at a time.
#include "rows.cuh"

// Row of the table of this rank, or -1.
__device__ __forceinline__ int row_of(unsigned token, int first_row, int n_rows) {
    long long row = (long long)token - first_row;
    return row >= 0 && row < n_rows ? (int)row : -1;
}

// out[T, columns] = table[token - first_row], or -0 for rows of other ranks, whose sum with the rank that has the row is that row
template <class T>
__device__ __forceinline__ void embed(T* out, const unsigned* tokens, const T* table, int columns, int first_row, int n_rows) {
    int row = row_of(tokens[blockIdx.x], first_row, n_rows);
    T* to = out + (long long)blockIdx.x * columns;
    for_row_chunks(columns, [&](int at, int left) {
        float value[CHUNK];
        for (int i = 0; i < CHUNK; i++) value[i] = -0.0f; // x + -0 is x, whatever the sign of its zero
        if (row >= 0) load_chunk(value, table + (long long)row * columns + at, left);
        store_chunk(to + at, value, left);
    });
}

// order[i] = index of the token that comes i-th by (row, index); those of other ranks first, as row -1.
extern "C" __global__ void __launch_bounds__(256) embed_order_u32(int* order, const unsigned* tokens, int n, int first_row, int n_rows) {
    after_predecessors();
    __shared__ int rows[256];
    int me = blockIdx.x * 256 + threadIdx.x, before = 0;
    int mine = me < n ? row_of(tokens[me], first_row, n_rows) : 0;
    for (int first = 0; first < n; first += 256) {
        __syncthreads();
        int other = first + threadIdx.x;
        rows[threadIdx.x] = other < n ? row_of(tokens[other], first_row, n_rows) : 0x7fffffff;
        __syncthreads();
        for (int i = 0; i < 256; i++) before += rows[i] < mine || (rows[i] == mine && first + i < me);
    }
    if (me < n) order[before] = me;
}

// Rows of a run that are under way at a time.
constexpr int AHEAD = 4;

// dtable[n_rows, columns] += dout[T, columns]
template <class T>
__device__ __forceinline__ void embed_backward(float* dtable, const T* dout, const unsigned* tokens, const int* order, int n, int columns,
                                               int first_row, int n_rows) {
    int first = blockIdx.x, row = row_of(tokens[order[first]], first_row, n_rows);
    if (row < 0 || (first > 0 && row_of(tokens[order[first - 1]], first_row, n_rows) == row)) return;
    int at = (blockIdx.y * blockDim.x + threadIdx.x) * CHUNK;
    if (at >= columns) return;
    float sum[CHUNK];
    float* to = dtable + (long long)row * columns + at;
    load_chunk(sum, to, columns - at);
    for (int i = first; i < n;) {
        // Which of the next are in the run, then their rows: loads that do not wait for each other.
        int at_token[AHEAD], n_same = 0;
#pragma unroll
        for (int k = 0; k < AHEAD; k++) at_token[k] = i + k < n ? order[i + k] : -1;
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (at_token[k] >= 0 && row_of(tokens[at_token[k]], first_row, n_rows) == row) n_same = k + 1; // sorted: all before it too
        float value[AHEAD][CHUNK];
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (k < n_same) load_chunk(value[k], dout + (long long)at_token[k] * columns + at, columns - at);
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (k < n_same)
                for (int j = 0; j < CHUNK; j++) sum[j] += value[k][j];
        if (n_same < AHEAD) break;
        i += AHEAD;
    }
    store_chunk(to, sum, columns - at);
}

#define KERNELS(T, name)                                                                                                             \
    extern "C" __global__ void __launch_bounds__(256)                                                                                \
        embed_##name(T* out, const unsigned* tokens, const T* table, int columns, int first_row, int n_rows) {                      \
        after_predecessors();                                                                                                        \
        embed(out, tokens, table, columns, first_row, n_rows);                                                                       \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(128)                                                                                \
        embed_backward_##name(float* dtable, const T* dout, const unsigned* tokens, const int* order, int n, int columns,          \
                              int first_row, int n_rows) {                                                                          \
        after_predecessors();                                                                                                        \
        embed_backward(dtable, dout, tokens, order, n, columns, first_row, n_rows);                                                  \
    }
KERNELS(float, f32)
KERNELS(bf16, bf16)
