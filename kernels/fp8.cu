// Floats as E4M3 (1 sign, 4 exponent, 3 mantissa bits, largest 448, no infinity; Micikevicius et al. 2022) with a scale, a power of
// two: the smallest with largest <= 448 scale; element = x / scale to nearest even. A scale of its own for every row, or one for all
// rows; or one for every column, the elements then transposed, because tensor cores sum 8 bits along rows only.
// Grid: row_most, rows, quantise and widen a block for each row; column_most a block for 64 columns of a part of the rows; columns a
// block for 64 x 64 elements; most one block; most_of_parts and scale a thread for each. No dynamic shared memory. Limited by memory.
#include "rows.cuh"

constexpr int TILE = 64;

// By integers: below 2^-6 (no leading one) the sum with 2^14, whose last bit is 2^-9, rounds; above, the 20 bits that go.
__device__ __forceinline__ unsigned char e4m3(float x) {
    unsigned bits = __float_as_uint(x), sign = bits >> 24 & 0x80u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return (unsigned char)(sign | 0x7fu);
    if (size > 0x43e00000u) size = 0x43e00000u;
    if (size < 0x3c800000u) return (unsigned char)(sign | (__float_as_uint(__uint_as_float(size) + 16384.0f) - 0x46800000u));
    return (unsigned char)(sign | ((size + 0x7ffffu + (size >> 20 & 1u) >> 20) - 960u));
}

// The number behind a code.
__device__ __forceinline__ float widened(unsigned char code) {
    unsigned size = code & 0x7fu, sign = (code & 0x80u) << 24;
    float x = size < 8 ? (float)size / 512.0f : __uint_as_float(size == 0x7fu ? 0x7fc00000u : size + 960u << 20);
    return __uint_as_float(__float_as_uint(x) | sign);
}

// Of the largest size: 2^-117 at least, so that every code times it is a normal number of bf16 and f32; 1 for zeros; what is not
// finite stays, and makes its elements NaN.
__device__ __forceinline__ float scale_of(float most) {
    unsigned bits = __float_as_uint(most), exponent = (bits >> 23) + ((bits & 0x7fffffu) > 0x600000u); // 448 = 1.75 * 2^8
    if (bits == 0) return 1.0f;
    if (bits >= 0x7f800000u) return most;
    return __uint_as_float((exponent > 18 ? exponent - 8 : 10) << 23);
}

// The largest of |x[row]|, to all threads.
template <class T> __device__ __forceinline__ float row_largest(const T* row, int columns) {
    float mine = 0.0f;
    for_row_chunks(columns, [&](int at, int left) {
        float value[CHUNK];
        load_chunk(value, row + at, left);
        for (int i = 0; i < CHUNK; i++) mine = fmaxf(mine, fabsf(value[i]));
    });
    return block_max(mine);
}

// Eight codes to where they belong, as one word where the address allows.
__device__ __forceinline__ void store_codes(unsigned char* to, const unsigned char code[CHUNK], int n) {
    if (n >= CHUNK && ((unsigned long long)to & 7) == 0) {
        unsigned long long word = 0;
#pragma unroll
        for (int i = 0; i < CHUNK; i++) word |= (unsigned long long)code[i] << 8 * i;
        *(unsigned long long*)to = word;
        return;
    }
#pragma unroll
    for (int i = 0; i < CHUNK; i++)
        if (i < n) to[i] = code[i];
}

// Eight codes, as one word where the address allows, zeros behind the first n.
__device__ __forceinline__ void load_codes(unsigned char code[CHUNK], const unsigned char* from, int n) {
    if (n >= CHUNK && ((unsigned long long)from & 7) == 0) {
        unsigned long long word = *(const unsigned long long*)from;
#pragma unroll
        for (int i = 0; i < CHUNK; i++) code[i] = (unsigned char)(word >> 8 * i);
        return;
    }
#pragma unroll
    for (int i = 0; i < CHUNK; i++) code[i] = i < n ? from[i] : 0;
}

// out[row] = E4M3(x[row] / scale): the quotient is exact.
template <class T> __device__ __forceinline__ void quantise_row(unsigned char* out, float scale, const T* row, int columns) {
    float by = 1.0f / scale;
    for_row_chunks(columns, [&](int at, int left) {
        float value[CHUNK];
        unsigned char code[CHUNK];
        load_chunk(value, row + at, left);
        for (int i = 0; i < CHUNK; i++) code[i] = e4m3(value[i] * by);
        store_codes(out + at, code, left);
    });
}

// most[part][column] = the largest of |x[row][column]| of the rows of a part
template <class T>
__device__ __forceinline__ void column_most(float* most, const T* x, int rows, int columns, int part_rows) {
    __shared__ float largest[32][TILE];
    int lane = threadIdx.x % (TILE / CHUNK) * CHUNK, group = threadIdx.x / (TILE / CHUNK); // 32 rows at a time
    int first = blockIdx.x * TILE, left = columns - first - lane;
    int begin = blockIdx.y * part_rows, end = min(begin + part_rows, rows);
    float mine[CHUNK] = {};
    for (int row = begin + group; row < end; row += 32) {
        float value[CHUNK];
        load_chunk(value, x + (long long)row * columns + first + lane, left);
        for (int i = 0; i < CHUNK; i++) mine[i] = fmaxf(mine[i], fabsf(value[i]));
    }
    for (int i = 0; i < CHUNK; i++) largest[group][lane + i] = mine[i];
    __syncthreads();
    int column = threadIdx.x;
    if (column >= TILE || first + column >= columns) return;
    float all = 0.0f;
    for (int i = 0; i < 32; i++) all = fmaxf(all, largest[i][column]);
    most[(long long)blockIdx.y * columns + first + column] = all;
}

// out[column][row] = E4M3(x[row][column] / scale[column * step]); step 0: one scale for all
template <class T>
__device__ __forceinline__ void quantise_columns(unsigned char* out, const float* scale, const T* x, int rows, int columns, int step) {
    __shared__ unsigned char tile[TILE][TILE + 4]; // [column][row]
    int first_column = blockIdx.x * TILE, first_row = blockIdx.y * TILE;
    for (int at = threadIdx.x; at < TILE * TILE / CHUNK; at += blockDim.x) {
        int row = at / (TILE / CHUNK), column = at % (TILE / CHUNK) * CHUNK;
        int left = first_row + row < rows ? columns - first_column - column : 0;
        float value[CHUNK];
        load_chunk(value, x + (long long)(first_row + row) * columns + first_column + column, left);
        for (int i = 0; i < CHUNK; i++)
            if (i < left) tile[column + i][row] = e4m3(value[i] * (1.0f / scale[(first_column + column + i) * step]));
    }
    __syncthreads();
    for (int at = threadIdx.x; at < TILE * TILE / CHUNK; at += blockDim.x) {
        int column = at / (TILE / CHUNK), row = at % (TILE / CHUNK) * CHUNK;
        if (first_column + column >= columns) continue;
        unsigned char code[CHUNK];
        for (int i = 0; i < CHUNK; i++) code[i] = tile[column][row + i];
        store_codes(out + (long long)(first_column + column) * rows + first_row + row, code, rows - first_row - row);
    }
}

// out[row] = the numbers behind the codes, times scale[row * step]; step 0: one scale for all
template <class T> __device__ __forceinline__ void widen(T* out, const unsigned char* codes, const float* scale, int columns, int step) {
    long long first = (long long)blockIdx.x * columns;
    float by = scale[(long long)blockIdx.x * step];
    for_row_chunks(columns, [&](int at, int left) {
        float value[CHUNK];
        unsigned char code[CHUNK];
        load_codes(code, codes + first + at, left);
        for (int i = 0; i < CHUNK; i++) value[i] = widened(code[i]) * by;
        store_chunk(out + first + at, value, left);
    });
}

#define FP8(T, name)                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(512) fp8_row_most_##name(float* most, const T* x, int columns) {                      \
        after_predecessors();                                                                                                          \
        float largest = row_largest(x + (long long)blockIdx.x * columns, columns);                                                     \
        if (threadIdx.x == 0) most[blockIdx.x] = largest;                                                                              \
    }                                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                                  \
        fp8_column_most_##name(float* most, const T* x, int rows, int columns, int part_rows) {                                        \
        after_predecessors();                                                                                                          \
        column_most(most, x, rows, columns, part_rows);                                                                                \
    }                                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512)                                                                                  \
        fp8_quantise_##name(unsigned char* out, const float* scale, const T* x, int columns, int step) {                               \
        after_predecessors();                                                                                                          \
        long long first = (long long)blockIdx.x * columns;                                                                             \
        quantise_row(out + first, scale[(long long)blockIdx.x * step], x + first, columns);                                            \
    }                                                                                                                                  \
    /* sizes, scales and codes of each row in one go: its second reading comes from the cache */                                       \
    extern "C" __global__ void __launch_bounds__(512) fp8_rows_##name(unsigned char* out, float* scale, const T* x, int columns) {      \
        after_predecessors();                                                                                                          \
        long long first = (long long)blockIdx.x * columns;                                                                             \
        float by = scale_of(row_largest(x + first, columns));                                                                          \
        if (threadIdx.x == 0) scale[blockIdx.x] = by;                                                                                  \
        quantise_row(out + first, by, x + first, columns);                                                                             \
    }                                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                                  \
        fp8_columns_##name(unsigned char* out, const float* scale, const T* x, int rows, int columns, int step) {                      \
        after_predecessors();                                                                                                          \
        quantise_columns(out, scale, x, rows, columns, step);                                                                          \
    }                                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(512)                                                                                  \
        fp8_widen_##name(T* out, const unsigned char* codes, const float* scale, int columns, int step) {                              \
        after_predecessors();                                                                                                          \
        widen(out, codes, scale, columns, step);                                                                                       \
    }
FP8(float, f32)
FP8(bf16, bf16)

// most[0] = the largest of n
extern "C" __global__ void __launch_bounds__(512) fp8_most_f32(float* most, const float* of, int n) {
    after_predecessors();
    float largest = row_largest(of, n);
    if (threadIdx.x == 0) most[0] = largest;
}

// most[i] = the largest of[part * n + i]
extern "C" __global__ void __launch_bounds__(256) fp8_most_of_parts_f32(float* most, const float* of, int parts, int n) {
    after_predecessors();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float largest = 0.0f;
    for (int part = 0; part < parts; part++) largest = fmaxf(largest, of[(long long)part * n + i]);
    most[i] = largest;
}

// scale[i], the largest size, becomes the scale
extern "C" __global__ void __launch_bounds__(256) fp8_scale_f32(float* scale, int n) {
    after_predecessors();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) scale[i] = scale_of(scale[i]);
}
