// What becomes of an element in LayerNorm1P and RMSNorm, for every kernel that normalises: products and sums are fused by name, so that
// all of them round alike.
#pragma once
#include "rows.cuh"

// sum + (x - mean)^2
__device__ __forceinline__ float add_square(float sum, float x, float mean) { return fmaf(x - mean, x - mean, sum); }
__device__ __forceinline__ float rstd_of(float squares, int columns, float eps) { return 1.0f / sqrtf(squares / columns + eps); }
// `factor` is the gain, plus 1 in LayerNorm1P.
__device__ __forceinline__ float normed(float x, float mean, float rstd, float factor, float bias) {
    return fmaf((x - mean) * rstd, factor, bias);
}
