// Values of several ranks combined in rank order: one piece of each rank, added (one after another or in pairs, or compared) in f32,
// rounded once. So a sum has the same bits on every rank and in every run, whatever way the pieces travelled.
// Grid: any number of blocks of 256 threads, each thread takes eight elements at a time. No shared memory. Limited by memory.
#include "rows.cuh"

// Piece r is pieces[r * stride ..], but that of `rank`, which is at `own`.
template <class T> __device__ __forceinline__ const T* piece_of(const T* own, const T* pieces, int r, int rank, long long stride) {
    return r == rank ? own : pieces + r * stride;
}

// out = piece 0 + piece 1 + ..; out may be `own`
template <class T>
__device__ __forceinline__ void ordered_sum(T* out, const T* own, const T* pieces, int rank, int n_pieces, long long stride, long long n) {
    for_chunks(n, [&](long long at, long long left) {
        float sum[CHUNK], value[CHUNK];
        load_chunk(sum, piece_of(own, pieces, 0, rank, stride) + at, left);
        for (int r = 1; r < n_pieces; r++) {
            load_chunk(value, piece_of(own, pieces, r, rank, stride) + at, left);
            for (int i = 0; i < CHUNK; i++) sum[i] += value[i];
        }
        store_chunk(out + at, sum, left);
    });
}

// out = ((piece 0 + piece 1) + (piece 2 + piece 3)) + ..; at most 2^PAIRED of them, a power of two
constexpr int PAIRED = 6;
template <class T>
__device__ __forceinline__ void ordered_pairs(T* out, const T* own, const T* pieces, int rank, int n_pieces, long long stride, long long n) {
    for_chunks(n, [&](long long at, long long left) {
        float sum[CHUNK], waiting[PAIRED][CHUNK];
        for (int r = 0; r < n_pieces; r++) {
            load_chunk(sum, piece_of(own, pieces, r, rank, stride) + at, left);
            // Sums of 1, 2, 4 .. wait for as many more; which of them wait is the binary number of the pieces before.
#pragma unroll
            for (int level = 0; level < PAIRED; level++) {
                bool is_second = r >> level & 1;
#pragma unroll
                for (int i = 0; i < CHUNK; i++) {
                    if (is_second) sum[i] = waiting[level][i] + sum[i];
                    else waiting[level][i] = sum[i];
                }
                if (!is_second) break;
            }
        }
        store_chunk(out + at, sum, left);
    });
}

// out = the largest; a NaN stays a NaN
template <class T>
__device__ __forceinline__ void ordered_max(T* out, const T* own, const T* pieces, int rank, int n_pieces, long long stride, long long n) {
    for_chunks(n, [&](long long at, long long left) {
        float most[CHUNK], value[CHUNK];
        load_chunk(most, piece_of(own, pieces, 0, rank, stride) + at, left);
        for (int r = 1; r < n_pieces; r++) {
            load_chunk(value, piece_of(own, pieces, r, rank, stride) + at, left);
            for (int i = 0; i < CHUNK; i++) most[i] = most[i] >= value[i] || most[i] != most[i] ? most[i] : value[i];
        }
        store_chunk(out + at, most, left);
    });
}

#define ORDERED(operation, T, name)                                                                                      \
    extern "C" __global__ void __launch_bounds__(256)                                                                    \
        operation##_##name(T* out, const T* own, const T* pieces, int rank, int n_pieces, long long stride, long long n) { \
        after_predecessors();                                                                                            \
        operation(out, own, pieces, rank, n_pieces, stride, n);                                                          \
    }
ORDERED(ordered_sum, float, f32)
ORDERED(ordered_sum, bf16, bf16)
ORDERED(ordered_pairs, float, f32)
ORDERED(ordered_pairs, bf16, bf16)
ORDERED(ordered_max, float, f32)
ORDERED(ordered_max, bf16, bf16)
