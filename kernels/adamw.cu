// AdamW on a shard: f32 master, moments and gradient, and the weight the model computes with written back, in one pass.
// Grid: any number of blocks of 256 threads, each thread takes eight elements at a time. Limited by memory: 28 bytes an element and
// the weight's.
#include "rows.cuh"

template <class T>
__device__ __forceinline__ void adamw(float* master, float* m, float* v, T* weight, const float* grad, long long n, float lr, float beta1,
                                      float beta2, float eps, float weight_decay, float m_scale, float v_scale, float grad_scale) {
    for_chunks(n, [&](long long at, long long left) {
        float w[CHUNK], first[CHUNK], second[CHUNK], g[CHUNK];
        load_chunk(w, master + at, left);
        load_chunk(first, m + at, left);
        load_chunk(second, v + at, left);
        load_chunk(g, grad + at, left);
        for (int i = 0; i < CHUNK; i++) {
            float scaled = g[i] * grad_scale;
            first[i] = beta1 * first[i] + (1.0f - beta1) * scaled;
            second[i] = beta2 * second[i] + (1.0f - beta2) * scaled * scaled;
            float update = first[i] * m_scale / (sqrtf(second[i] * v_scale) + eps);
            w[i] -= lr * (weight_decay * w[i] + update);
        }
        store_chunk(master + at, w, left);
        store_chunk(m + at, first, left);
        store_chunk(v + at, second, left);
        store_chunk(weight + at, w, left);
    });
}

#define KERNEL(T, name)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(256)                                                                                \
        adamw_##name(float* master, float* m, float* v, T* weight, const float* grad, long long n, float lr, float beta1, float beta2, \
                     float eps, float weight_decay, float m_scale, float v_scale, float grad_scale) {                               \
        after_predecessors();                                                                                                       \
        adamw(master, m, v, weight, grad, n, lr, beta1, beta2, eps, weight_decay, m_scale, v_scale, grad_scale);                    \
    }
KERNEL(float, f32)
KERNEL(bf16, bf16)
