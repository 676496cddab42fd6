// How tokens are ranked: floats as integers of the same order, keys of a value and its token, and pairs of a largest
// logit and a sum of exp. Knows neither where logits lie nor who takes which.
#pragma once

#include "common/ptx.cuh"

constexpr unsigned ALL = 0xFFFFFFFF;
constexpr float MOST = 0x1.fffffep127f;  // the largest finite float

// 0 .. 2^32 - 1 in the order of the floats.
__device__ __forceinline__ unsigned order_of(float x) {
    const unsigned bits = __float_as_uint(x);
    return bits ^ (bits >> 31 ? 0xFFFFFFFF : 0x80000000);
}

// Greater for the greater value (-0 counts as 0), then for the lower token; never 0, which stands for no token.
__device__ __forceinline__ unsigned long long key_of(float value, int token) {
    return (unsigned long long)order_of(value + 0.0f) << 32 | unsigned(~token);
}

__device__ __forceinline__ int token_of(unsigned long long key) { return int(~unsigned(key)); }

__device__ __forceinline__ float value_of(unsigned long long key) {
    const unsigned order = unsigned(key >> 32);
    return __uint_as_float(order ^ (order >> 31 ? 0x80000000 : 0xFFFFFFFF));
}

__device__ __forceinline__ float of_order(unsigned order) { return value_of((unsigned long long)order << 32); }

// Of a warp's keys, in all lanes.
__device__ __forceinline__ unsigned long long warp_max(unsigned long long key) {
    const unsigned high = __reduce_max_sync(ALL, unsigned(key >> 32));
    const unsigned low = __reduce_max_sync(ALL, unsigned(key >> 32) == high ? unsigned(key) : 0);
    return (unsigned long long)high << 32 | low;
}

// How many of the keys are greater: the key's place among them, because no two are equal.
__device__ __forceinline__ int greater_than(unsigned long long key, const unsigned long long* keys, int count) {
    int greater = 0;
    for (int i = 0; i < count; i++) greater += keys[i] > key;
    return greater;
}

// All of the block's BLOCK threads: the `most` greatest of the keys to `out`, in order; fewer leave the rest as it is.
template <int BLOCK>
__device__ __forceinline__ void place_best(const unsigned long long* keys, int count, int most,
                                           unsigned long long* out) {
    for (int i = threadIdx.x; i < count; i += BLOCK) {
        const int place = greater_than(keys[i], keys, count);
        if (place < most) out[place] = keys[i];
    }
}

// Of two sets: the largest x, and the sum of exp(x - largest). What is fused is written out: these sums are to have the
// same bytes in every build.
__device__ __forceinline__ float2 merge(float2 a, float2 b) {
    const float largest = fmaxf(a.x, b.x);
    return make_float2(largest, fmaf(a.y, expf(a.x - largest), __fmul_rn(b.y, expf(b.x - largest))));
}

__device__ __forceinline__ float2 from_lane(float2 sum, int apart) {
    return make_float2(__shfl_xor_sync(ALL, sum.x, apart), __shfl_xor_sync(ALL, sum.y, apart));
}

// Of 32 lanes, in lane 0: halves first, then their halves.
__device__ __forceinline__ float2 warp_merge(float2 sum) {
    for (int apart = 16; apart > 0; apart /= 2) sum = merge(sum, from_lane(sum, apart));
    return sum;
}

// A pair of merge as a word to send.
__device__ __forceinline__ unsigned long long word_of(float2 sum) {
    return (unsigned long long)__float_as_uint(sum.y) << 32 | __float_as_uint(sum.x);
}

__device__ __forceinline__ float2 sum_of(unsigned long long word) {
    return make_float2(__uint_as_float(unsigned(word)), __uint_as_float(unsigned(word >> 32)));
}
