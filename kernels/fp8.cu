// Floats as E4M3 (1 sign, 4 exponent, 3 mantissa bits, largest 448, no infinity; Micikevicius et al. 2022) with a scale: scale =
// largest / 448, element = x / scale to nearest even, at most 448. A scale of its own for every row, or one for all rows.
// Grid: a block for each row; fp8_scale a block for each scale. No dynamic shared memory. Limited by memory.
#include "rows.cuh"

constexpr float LARGEST = 448.0f;

// By integers: below 2^-6 (no leading one) the sum with 2^14, whose last bit is 2^-9, rounds; above, the 20 bits that go.
__device__ __forceinline__ unsigned char e4m3(float x) {
    unsigned bits = __float_as_uint(x), sign = bits >> 24 & 0x80u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return (unsigned char)(sign | 0x7fu);
    if (size > 0x43e00000u) size = 0x43e00000u;
    if (size < 0x3c800000u) return (unsigned char)(sign | (__float_as_uint(__uint_as_float(size) + 16384.0f) - 0x46800000u));
    return (unsigned char)(sign | ((size + 0x7ffffu + (size >> 20 & 1u) >> 20) - 960u));
}

// most[row] = largest of |x[row]|
template <class T> __device__ __forceinline__ void row_most(float* most, const T* x, int columns) {
    const T* row = x + (long long)blockIdx.x * columns;
    float mine = 0.0f;
    for_row_chunks(columns, [&](int at, int left) {
        float value[CHUNK];
        load_chunk(value, row + at, left);
        for (int i = 0; i < CHUNK; i++) mine = fmaxf(mine, fabsf(value[i]));
    });
    mine = block_max(mine);
    if (threadIdx.x == 0) most[blockIdx.x] = mine;
}

// out[row] = E4M3(x[row] / scale[row * step]); step 0: one scale for all
template <class T> __device__ __forceinline__ void quantise(unsigned char* out, const float* scale, const T* x, int columns, int step) {
    long long first = (long long)blockIdx.x * columns;
    float by = scale[(long long)blockIdx.x * step];
    for_row_chunks(columns, [&](int at, int left) {
        float value[CHUNK];
        load_chunk(value, x + first + at, left);
        for (int i = 0; i < CHUNK; i++)
            if (i < left) out[first + at + i] = e4m3(value[i] / by);
    });
}

#define FP8(T, name)                                                                                                \
    extern "C" __global__ void __launch_bounds__(512) fp8_row_most_##name(float* most, const T* x, int columns) {   \
        row_most(most, x, columns);                                                                                 \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(512)                                                               \
        fp8_quantise_##name(unsigned char* out, const float* scale, const T* x, int columns, int step) {            \
        quantise(out, scale, x, columns, step);                                                                     \
    }
FP8(float, f32)
FP8(bf16, bf16)

// scale[block] = largest of its n values / 448; 1 when they are zero
extern "C" __global__ void __launch_bounds__(512) fp8_scale_f32(float* scale, const float* most, int n) {
    float mine = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) mine = fmaxf(mine, most[(long long)blockIdx.x * n + i]);
    mine = block_max(mine);
    if (threadIdx.x == 0) scale[blockIdx.x] = mine > 0.0f ? mine / LARGEST : 1.0f;
}
