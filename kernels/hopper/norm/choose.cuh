// The choice of experts from a token's logits. MOST_EXPERTS is a macro.
#pragma once

#include "common/ptx.cuh"

// Larger for larger floats; NaN (positive) above all, both zeros alike.
__device__ __forceinline__ unsigned order_of(float value) {
    const unsigned bits = __float_as_uint(value + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float of_order(unsigned order) {
    return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

// One warp: logits [experts] in shared memory -> ids and routing weights of the top_k largest, the likeliest first, and
// of equal ones the lower id first. The weights are the softmax over the chosen logits.
__device__ __forceinline__ void choose(const float* logits, int experts, int top_k, long long* ids, float* weights) {
    const int lane = threadIdx.x % 32;
    unsigned long long keys[MOST_EXPERTS / 32];  // order of the logit, then of the id; unlike, and none is zero
#pragma unroll
    for (int i = 0; i < MOST_EXPERTS / 32; ++i) {
        const int expert = lane + i * 32;
        keys[i] = expert < experts ? (unsigned long long)order_of(logits[expert]) << 32 | (MOST_EXPERTS - expert) : 0;
    }
    float top = 0, own = 0, total = 0;  // own: of the expert whose rank is this lane
    for (int rank = 0; rank < top_k; ++rank) {
        unsigned long long best = 0;
#pragma unroll
        for (int i = 0; i < MOST_EXPERTS / 32; ++i) best = keys[i] > best ? keys[i] : best;
        const unsigned most = __reduce_max_sync(0xffffffffu, unsigned(best >> 32));  // the logit, then the id
        best = unsigned(best >> 32) == most ? best : 0;
        best = (unsigned long long)most << 32 | __reduce_max_sync(0xffffffffu, unsigned(best));
#pragma unroll
        for (int i = 0; i < MOST_EXPERTS / 32; ++i) keys[i] = keys[i] == best ? 0 : keys[i];
        const float value = of_order(unsigned(best >> 32));
        if (rank == 0) top = value;
        const float weight = expf(value - top);
        total += weight;  // in the order of choice, the same in every lane
        if (lane == rank) {
            own = weight;
            ids[lane] = MOST_EXPERTS - int(unsigned(best));
        }
    }
    if (lane < top_k) weights[lane] = own / total;
}
