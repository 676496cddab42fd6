// GPT-OSS's clamped SwiGLU.
#pragma once

#include "common/ptx.cuh"

// gate sigmoid(1.702 gate) (up + 1), both clamped at limit first.
__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
    gate = min_nan(gate, limit), up = max_nan(min_nan(up, limit), -limit);
    const float activated = __fdividef(gate, 1.0f + __expf(-1.702f * gate));
    return activated * (up + 1.0f);
}
