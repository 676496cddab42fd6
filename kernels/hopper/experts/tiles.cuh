// What the decode kernels of the experts do with a strip's split: load its tiles, multiply them, and finish the sums.
#pragma once

#include "common/mxfp4.cuh"
#include "common/ptx.cuh"
#include "experts/matrix.cuh"
#include "experts/swiglu.cuh"

constexpr unsigned ALL_LANES = 0xFFFFFFFFu;

// Add one tile's products to the sums of 8 N_TILES tokens. activations: the address in shared memory that this lane
// names to ldmatrix for the tile's first 32 columns and the first 8 tokens; rows are PITCH bytes apart.
template <int N_TILES, int PITCH>
__device__ __forceinline__ void multiply_tile(float (&sum)[N_TILES][4], uint4 value, unsigned scale,
                                              unsigned activations) {
    const unsigned words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
    for (int block = 0; block < 2; block++) {
        const unsigned multipliers = multipliers_of(scale, block);
        unsigned a[8];
        dequantize(words[2 * block], multipliers, a);
        dequantize(words[2 * block + 1], multipliers, a + 4);
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
            const uint4 b = ldmatrix(activations + n * 8 * PITCH + block * 64);
            mma(sum[n], a, b.x, b.y);
            mma(sum[n], a + 4, b.z, b.w);
        }
    }
}

// What a lane names to ldmatrix. Rows past the last one in shared memory are that one: their products are not used.
template <int PITCH>
__device__ __forceinline__ unsigned matrix_address(const unsigned char* rows, int last_row) {
    const int lane = threadIdx.x % 32;
    return shared_address(rows) + min(lane % 8, last_row) * PITCH + lane / 8 * 16;
}

// The weights a warp holds in registers: one split of a strip. `aim` names the split that loads take from now on.
template <class M>
struct Stream {
    const uint4* const all_values;
    const unsigned* const all_scales;
    unsigned at;  // this lane's piece of the split's first tile; its scales are in word at / 4
    uint4 value[M::DEPTH];
    unsigned scale[M::DEPTH];  // rows g and g + 8 in the tile's first block of columns, then in the second

    __device__ __forceinline__ Stream(const uint4* all_values, const unsigned* all_scales)
        : all_values(all_values), all_scales(all_scales) {}

    __device__ __forceinline__ void aim(int expert, int strip, int split) {  // past the end: the last strip's
        at = value_piece(M::tile(expert, min(strip, M::STRIPS - 1), split)) + threadIdx.x % 32;
    }
    __device__ __forceinline__ void load(int j) {
        value[j] = ld_weight(all_values + at + j * 32);
        scale[j] = ld_weight_u32(all_scales + at / 4 + j * 8);
    }
    __device__ __forceinline__ void load_all(int tiles) {
#pragma unroll
        for (int j = 0; j < M::DEPTH; j++)
            if (j < tiles) load(j);
    }
};

// Copy columns [first_tile * 64, (first_tile + TILES) * 64) of `live` pairs' rows to shared memory; zeros beyond K.
template <class M, bool UP, int TILES, int PITCH, int STRIDE>
__device__ __forceinline__ void stage(unsigned char* to, const bf16* source, const int* pair, int live, int top_k,
                                      int first_tile) {
    constexpr int PIECES = TILES * 8;  // a piece is 16 bytes, a thread takes every STRIDE-th
#pragma unroll 1
    for (int i = opaque(threadIdx.x); i < live * PIECES; i += STRIDE) {
        const int row = i / PIECES, piece = i % PIECES, column = first_tile * 64 + piece * 8;
        const int from = UP ? (unsigned)pair[row] / (unsigned)top_k : pair[row];
        const bool inside = column < M::K;
        const bf16* const at = source + (size_t)from * M::K + (inside ? column : 0);
        cp_async(shared_address(to + row * PITCH + piece * 16), at, inside);
    }
}

// The biases of rows g and g + 8 of a strip, in the low and the high half.
template <class M, bool UP>
__device__ __forceinline__ unsigned biases_of(const bf16* bias, int expert, int strip, int g) {
    const int first_row = expert * M::ROWS + strip * STRIP_ROWS;
    const bf16* const at = bias + first_row + row_in_strip<UP>(g, 0);
    if constexpr (UP) return *reinterpret_cast<const unsigned*>(at);  // neighbours: a gate and its up
    return at[0] | (unsigned)at[8] << 16;
}

// Bias, then SwiGLU or the routing weight, for the rows g, g + 8 of a strip and two pairs (-1: none).
// sum: row g of both pairs, row g + 8 of both pairs.
template <bool UP>
__device__ __forceinline__ void finish(float4 sum, int strip, int g, const int (&pair)[2], const float (&weight)[2],
                                       unsigned biases, float limit, bf16* out) {
    const float bias_low = widen_low(biases), bias_high = widen_high(biases);
    const float low[2] = {sum.x, sum.y}, high[2] = {sum.z, sum.w};
#pragma unroll
    for (int c = 0; c < 2; c++) {
        if (pair[c] < 0) continue;
        const float a = fmaf(low[c], DEFERRED_SCALE, bias_low), b = fmaf(high[c], DEFERRED_SCALE, bias_high);
        if constexpr (UP) {
            out[(size_t)pair[c] * INTER + strip * 8 + g] = round_bf16(swiglu(a, b, limit));
        } else {
            bf16* const at = out + (size_t)pair[c] * HIDDEN + strip * 16 + g;
            at[0] = round_bf16(weight[c] * a);
            at[8] = round_bf16(weight[c] * b);
        }
    }
}
