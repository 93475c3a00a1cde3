// The canonical sums that are no products: groups of rows in pairs, squares in pieces added without rounding, exponentials over pieces
// of the vocabulary. The order of every sum follows from its pieces alone: not from the grid, nor from where a piece lies.
// add_groups: a thread for each eight columns. square_pieces: any number of blocks of 256 threads, a warp for each piece of a row.
// cross_entropy_pieces: a block of 256 threads for each token. No dynamic shared memory. Limited by memory.
#include "rows.cuh"

// out[columns] += the groups of `n_pieces` rows in turn, the pieces of each in pairs; at most eight.
extern "C" __global__ void __launch_bounds__(128) add_groups_f32(float* out, const float* rows, int n_groups, int n_pieces, int columns) {
    after_predecessors();
    int at = (blockIdx.x * blockDim.x + threadIdx.x) * CHUNK;
    if (at >= columns) return;
    float total[CHUNK];
    load_chunk(total, out + at, columns - at);
    for (int group = 0; group < n_groups; group++) {
        float sum[CHUNK], waiting[3][CHUNK];
        for (int piece = 0; piece < n_pieces; piece++) {
            load_chunk(sum, rows + ((long long)group * n_pieces + piece) * columns + at, columns - at);
            // Sums of 1, 2 and 4 wait for as many more; which of them wait is the binary number of the pieces before.
#pragma unroll
            for (int level = 0; level < 3; level++) {
                bool is_second = piece >> level & 1;
#pragma unroll
                for (int i = 0; i < CHUNK; i++) {
                    if (is_second) sum[i] = waiting[level][i] + sum[i];
                    else waiting[level][i] = sum[i];
                }
                if (!is_second) break;
            }
        }
        for (int i = 0; i < CHUNK; i++) total[i] += sum[i];
    }
    store_chunk(out + at, total, columns - at);
}

// Limbs of 32 bits of `exact::ExactSum`, then how many terms were infinite and how many were no number.
constexpr int LIMBS = 68, INFINITE = LIMBS, NO_NUMBER = LIMBS + 1, WORDS = LIMBS + 2;

// words += x, which is not negative. Integers: no order.
__device__ __forceinline__ void add_exactly(unsigned long long* words, double x) {
    unsigned long long bits = (unsigned long long)__double_as_longlong(x), fraction = bits & ((1ull << 52) - 1);
    int exponent = (int)(bits >> 52 & 0x7ff);
    if (exponent == 0x7ff) {
        atomicAdd(words + (fraction == 0 ? INFINITE : NO_NUMBER), 1ull);
        return;
    }
    unsigned long long mantissa = exponent == 0 ? fraction : fraction | 1ull << 52;
    // x = mantissa 2^(exponent - 1075); limb i counts units of 2^(32 i - 1088).
    int bit = max(exponent, 1) - 1075 + 1088, limb = bit / 32, shift = bit % 32;
    unsigned long long low = mantissa << shift, high = shift == 0 ? 0 : mantissa >> (64 - shift);
    atomicAdd(words + limb, low & 0xffffffffull);
    atomicAdd(words + limb + 1, low >> 32);
    atomicAdd(words + limb + 2, high);
}

// words[WORDS] += the sums of squares, in f64, of each of `n_pieces` equal pieces of each row of x
extern "C" __global__ void __launch_bounds__(256)
    square_pieces_f32(unsigned long long* words, const float* x, long long n_rows, int columns, int n_pieces) {
    after_predecessors();
    __shared__ unsigned long long mine[WORDS];
    for (int i = threadIdx.x; i < WORDS; i += 256) mine[i] = 0;
    __syncthreads();
    int lane = threadIdx.x % 32;
    for (long long i = (long long)blockIdx.x * 8 + threadIdx.x / 32; i < n_rows * n_pieces; i += (long long)gridDim.x * 8) {
        int piece = (int)(i % n_pieces);
        int begin = (int)((long long)piece * columns / n_pieces), end = (int)((long long)(piece + 1) * columns / n_pieces);
        if (begin == end) continue;
        const float* from = x + i / n_pieces * columns;
        double sum = 0;
        for (int at = begin + lane * CHUNK; at < end; at += 32 * CHUNK) {
            float value[CHUNK];
            load_chunk(value, from + at, end - at);
            for (int k = 0; k < CHUNK; k++) sum += (double)value[k] * value[k];
        }
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (lane == 0) add_exactly(mine, sum);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < WORDS; i += 256)
        if (mine[i] != 0) atomicAdd(words + i, mine[i]);
}

// sum[T] = sum of exp(logit - max) over the first n_valid columns, the row in `n_pieces` equal pieces that are added in pairs, at most
// eight; target_logit[T] = the target's logit, or 0
template <class T>
__device__ __forceinline__ void cross_entropy_pieces(float* sum, float* target_logit, const T* logits, const float* max, const unsigned* targets,
                                                     int columns, int first_row, int n_valid, int n_pieces) {
    const T* row = logits + (long long)blockIdx.x * columns;
    float largest = max[blockIdx.x], total = 0, waiting[3];
    for (int piece = 0; piece < n_pieces; piece++) {
        int begin = (int)((long long)piece * columns / n_pieces), end = min((int)((long long)(piece + 1) * columns / n_pieces), n_valid);
        total = 0;
        for (int at = begin + threadIdx.x * CHUNK; at < end; at += 256 * CHUNK) {
            float value[CHUNK];
            load_chunk(value, row + at, end - at);
            for (int i = 0; i < CHUNK; i++)
                if (i < end - at) total += expf(value[i] - largest);
        }
        total = block_sum(total);
#pragma unroll
        for (int level = 0; level < 3; level++) {
            bool is_second = piece >> level & 1;
            if (is_second) total = waiting[level] + total;
            else waiting[level] = total;
            if (!is_second) break;
        }
    }
    if (threadIdx.x == 0) {
        long long column = (long long)targets[blockIdx.x] - first_row;
        sum[blockIdx.x] = total;
        target_logit[blockIdx.x] = column >= 0 && column < n_valid ? to_float(row[column]) : 0.0f;
    }
}

#define KERNEL(T, name)                                                                                                             \
    extern "C" __global__ void __launch_bounds__(256)                                                                               \
        cross_entropy_pieces_##name(float* sum, float* target_logit, const T* logits, const float* max, const unsigned* targets,   \
                                    int columns, int first_row, int n_valid, int n_pieces) {                                       \
        after_predecessors();                                                                                                       \
        cross_entropy_pieces(sum, target_logit, logits, max, targets, columns, first_row, n_valid, n_pieces);                       \
    }
KERNEL(float, f32)
KERNEL(bf16, bf16)
