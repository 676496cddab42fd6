// Rotary embedding of rows of bf16, and the scale of the scores: what decode and prefill attention share.
#pragma once

#include "attention/layout.cuh"
#include "common/ptx.cuh"

constexpr float LOG2E = 1.44269504f;
constexpr float SCALE = 0.125f * LOG2E;  // 1 / sqrt(DIM), for powers of two

// x cos + y sin without a fused multiply-add, so that the bytes are those of the plain formula.
__device__ __forceinline__ float turn(float x, float cos, float y, float sin) {
    return __fadd_rn(__fmul_rn(x, cos), __fmul_rn(y, sin));
}

// Elements 2 i and 2 i + 1 of the low and of the high half of a row.
__device__ __forceinline__ void rotate(unsigned& low, unsigned& high, float cos0, float sin0, float cos1, float sin1) {
    const float a0 = widen_low(low), a1 = widen_high(low), b0 = widen_low(high), b1 = widen_high(high);
    low = round_bf16x2(turn(a0, cos0, -b0, sin0), turn(a1, cos1, -b1, sin1));
    high = round_bf16x2(turn(b0, cos0, a0, sin0), turn(b1, cos1, a1, sin1));
}

// Eight elements of the low half and the eight of the high half that they turn with; cos and sin of the eight.
__device__ __forceinline__ void rotate(uint4& low, uint4& high, const float* cos, const float* sin) {
    const float4 cos0 = *reinterpret_cast<const float4*>(cos), cos4 = *reinterpret_cast<const float4*>(cos + 4);
    const float4 sin0 = *reinterpret_cast<const float4*>(sin), sin4 = *reinterpret_cast<const float4*>(sin + 4);
    rotate(low.x, high.x, cos0.x, sin0.x, cos0.y, sin0.y);
    rotate(low.y, high.y, cos0.z, sin0.z, cos0.w, sin0.w);
    rotate(low.z, high.z, cos4.x, sin4.x, cos4.y, sin4.y);
    rotate(low.w, high.w, cos4.z, sin4.z, cos4.w, sin4.w);
}
