// What products in a canonical order share, on every GPU (matmul.cu) and on Hopper (matmul_hopper.cu): pieces, tiles, stores.
#pragma once
#include "rows.cuh"

// Which terms belong together.
struct Pieces {
    const int* starts; // [n + 1], or null: n pieces of equal length, as parallel::pieces cuts them
    int k;
    int n;
    __device__ __forceinline__ int begin(int i) const { return starts ? starts[i] : (int)((long long)i * k / n); }
};

// Tile `tile` of out, eight rows of tiles at a time so that what they share is in the L2 cache.
struct Place {
    int row, column;
    __device__ __forceinline__ Place(int tile, int m, int n, int rows, int columns) {
        int n_down = (m + rows - 1) / rows, n_across = (n + columns - 1) / columns;
        int band = tile / (8 * n_across), first = 8 * band, height = min(8, n_down - first), i = tile - band * 8 * n_across;
        row = (first + i % height) * rows;
        column = i / height * columns;
    }
};

// Two neighbours of a row to where they go.
__device__ __forceinline__ void put_pair(void* out, bool is_bf16, size_t at, int n_here, bool even, float x, float y) {
    if (is_bf16) {
        bf16* to = (bf16*)out + at;
        if (n_here >= 2 && even) {
            *(unsigned*)to = pack_bf16(x, y);
            return;
        }
        store(to, x);
        if (n_here >= 2) store(to + 1, y);
    } else {
        float* to = (float*)out + at;
        if (n_here >= 2 && even) {
            *(float2*)to = make_float2(x, y);
            return;
        }
        to[0] = x;
        if (n_here >= 2) to[1] = y;
    }
}
