// What the attention kernels for Hopper share: the work of a block and the roles of its warpgroups. Warpgroup 0 is the producer,
// which copies tiles into stages of shared memory; the others consume them.
#pragma once
#include "hopper.cuh"

#define STAGES 2

// Rows first_row.. of the sequence of n_tokens rows from first_token.
struct Tile {
    int first_token;
    int n_tokens;
    int first_row;
};

// Index of the consumer among its kind, of its warp in it.
__device__ __forceinline__ int consumer_index() { return threadIdx.x / WARPGROUP - 1; }
__device__ __forceinline__ int warp_of_group() { return threadIdx.x / 32 % 4; }

// Head of a query head's or group's rows in [T, G * (per_kv + 2)]: queries of a group, then its key and its value.
__device__ __forceinline__ int query_head(int head, int per_kv) { return head / per_kv * (per_kv + 2) + head % per_kv; }
__device__ __forceinline__ int key_head(int group, int per_kv) { return group * (per_kv + 2) + per_kv; }
