// The activations of one output. For activation.cu, and for products that end in one.
#pragma once

// max(x, 0), and NaN of NaN, which fmaxf would hide.
__device__ __forceinline__ float relu(float x) { return x < 0.0f ? 0.0f : x; }
__device__ __forceinline__ float squared_relu_of(float x) { return relu(x) * relu(x); }
__device__ __forceinline__ float squared_relu_backward_of(float x, float dout) { return 2.0f * relu(x) * dout; }

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float swiglu_of(float gate, float up) { return gate * sigmoid(gate) * up; }
