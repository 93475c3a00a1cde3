// The rotation of a pair by rotary embedding, for rope.cu and for kernels that end in one: the same bits in all, so what is rounded when
// is written out.
#pragma once

__device__ __forceinline__ void turn_pair(float& x, float& y, float cosine, float sine) {
    float a = x, b = y;
    x = fmaf(a, cosine, -(b * sine));
    y = fmaf(b, cosine, a * sine);
}
