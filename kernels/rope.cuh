// The angles of rotary embedding and the rotation of a pair, for rope.cu and for kernels that begin or end in one: the same bits in all, so
// what is rounded when is written out.
#pragma once

__device__ __forceinline__ void turn_pair(float& x, float& y, float cosine, float sine) {
    float a = x, b = y;
    x = fmaf(a, cosine, -(b * sine));
    y = fmaf(b, cosine, a * sine);
}

// Cos and sin of an angle.
__device__ __forceinline__ float2 angle_of(unsigned position, double frequency, double factor, float sign) {
    double angle = (double)position * frequency;
    return make_float2((float)(factor * cos(angle)), sign * (float)(factor * sin(angle)));
}

// Those of the token's angles; positions and frequencies are tables of the host, so this may be done ahead. A __syncthreads goes
// before their use.
__device__ __forceinline__ void make_angles(float* cosines, unsigned position, const double* frequencies, int half, double factor,
                                            float sign) {
    float* sines = cosines + half;
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        float2 angle = angle_of(position, frequencies[i], factor, sign);
        cosines[i] = angle.x;
        sines[i] = angle.y;
    }
}
