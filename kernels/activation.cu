// Squared ReLU and SwiGLU, forward and backward.
// Grid: any number of blocks of 256 threads, each thread makes eight outputs at a time. Limited by memory.
#include "rows.cuh"
#include "activation.cuh"

// out = max(x, 0)^2
template <class T> __device__ __forceinline__ void squared_relu(T* out, const T* x, long long n) {
    for_chunks(n, [&](long long at, long long left) {
        float value[CHUNK];
        load_chunk(value, x + at, left);
        for (int i = 0; i < CHUNK; i++) value[i] = squared_relu_of(value[i]);
        store_chunk(out + at, value, left);
    });
}

// dx = 2 max(x, 0) dout
template <class T> __device__ __forceinline__ void squared_relu_backward(T* dx, const T* dout, const T* x, long long n) {
    for_chunks(n, [&](long long at, long long left) {
        float value[CHUNK], d[CHUNK];
        load_chunk(value, x + at, left);
        load_chunk(d, dout + at, left);
        for (int i = 0; i < CHUNK; i++) value[i] = squared_relu_backward_of(value[i], d[i]);
        store_chunk(dx + at, value, left);
    });
}

// Eight (gate, up) pairs.
template <class T> __device__ __forceinline__ void load_pairs(float gate[CHUNK], float up[CHUNK], const T* x, long long n_pairs) {
    float both[2 * CHUNK];
    load_chunk(both, x, 2 * n_pairs);
    load_chunk(both + CHUNK, x + CHUNK, 2 * n_pairs - CHUNK);
    for (int i = 0; i < CHUNK; i++) {
        gate[i] = both[2 * i];
        up[i] = both[2 * i + 1];
    }
}

// out_i = silu(x_2i) x_2i+1
template <class T> __device__ __forceinline__ void swiglu(T* out, const T* x, long long n) {
    for_chunks(n, [&](long long at, long long left) {
        float gate[CHUNK], up[CHUNK];
        load_pairs(gate, up, x + 2 * at, left);
        for (int i = 0; i < CHUNK; i++) up[i] = swiglu_of(gate[i], up[i]);
        store_chunk(out + at, up, left);
    });
}

// dx_2i = dout_i x_2i+1 s (1 + x_2i (1 - s)), dx_2i+1 = dout_i x_2i s, with s = sigmoid(x_2i)
template <class T> __device__ __forceinline__ void swiglu_backward(T* dx, const T* dout, const T* x, long long n) {
    for_chunks(n, [&](long long at, long long left) {
        float gate[CHUNK], up[CHUNK], d[CHUNK], both[2 * CHUNK];
        load_pairs(gate, up, x + 2 * at, left);
        load_chunk(d, dout + at, left);
        for (int i = 0; i < CHUNK; i++) {
            float s = sigmoid(gate[i]);
            both[2 * i] = d[i] * up[i] * (s * (1.0f + gate[i] * (1.0f - s)));
            both[2 * i + 1] = d[i] * gate[i] * s;
        }
        store_chunk(dx + 2 * at, both, 2 * left);
        store_chunk(dx + 2 * at + CHUNK, both + CHUNK, 2 * left - CHUNK);
    });
}

#define KERNELS(T, name)                                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) squared_relu_##name(T* out, const T* x, long long n) {                        \
        after_predecessors();                                                                                                        \
        squared_relu(out, x, n);                                                                                                     \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) squared_relu_backward_##name(T* dx, const T* dout, const T* x, long long n) { \
        after_predecessors();                                                                                                        \
        squared_relu_backward(dx, dout, x, n);                                                                                       \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) swiglu_##name(T* out, const T* x, long long n) {                               \
        after_predecessors();                                                                                                        \
        swiglu(out, x, n);                                                                                                           \
    }                                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) swiglu_backward_##name(T* dx, const T* dout, const T* x, long long n) {       \
        after_predecessors();                                                                                                        \
        swiglu_backward(dx, dout, x, n);                                                                                             \
    }
KERNELS(float, f32)
KERNELS(bf16, bf16)
