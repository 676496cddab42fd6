// MXFP4 (OCP Microscaling Formats 1.0) to bf16, as kernels.hopper.experts.pack lays the words out.
#pragma once

#include "common/ptx.cuh"

// Sums over dequantised weights carry this factor less, exactly, until the epilogue multiplies by it.
constexpr float DEFERRED_SCALE = 4294967296.0f;  // 2^32

// The multipliers of a tile's block of 32 columns (0 or 1): bf16 powers of two, of row g in the low half and of row g + 8
// in the high one. Their exponent fields are two of a lane's four scale bytes.
__device__ __forceinline__ unsigned multipliers_of(unsigned scales, int block) {
    return __byte_perm(scales, 0, 0x4140 + block * 0x0202) << 7;
}

// One packed word, 8 values, to the A fragment of one k16 step. Placing the sign and the three exponent and mantissa
// bits of an E2M1 at bits 15 and 8..6 of a bf16 gives its value * 2^-126 exactly, subnormal included. The word holds the
// first two values in these places; two more come there by a rotation to the right by 3, two by one by 6. The last two
// have what is left, bits 4, 3, 1, 0 of each half, for their bits 7, 6, 15, 8: one multiplication moves all of them, and
// no two of its products meet. The multiplier's exponent field is the stored scale byte, which is the checkpoint's + 94:
// the scale, times 2^126, times 2^-32 to keep the byte below 255 for scales up to 2^33.
__device__ __forceinline__ void dequantize(unsigned word, unsigned multipliers, unsigned* a) {
    constexpr unsigned PLACES = 0x81C081C0u, LEFT = 0x001B001Bu, MOVES = 1u << 3 | 1u << 8 | 1u << 14;
    const auto rotated = [&](int bits) { return word >> bits | word << (32 - bits); };
    a[0] = mul_bf16x2_low(word & PLACES, multipliers);                      // row g, columns 2 t, + 1
    a[1] = mul_bf16x2_high(rotated(3) & PLACES, multipliers);               // row g + 8
    a[2] = mul_bf16x2_low(rotated(6) & PLACES, multipliers);                // row g, columns 8 + 2 t, + 1
    a[3] = mul_bf16x2_high(((word & LEFT) * MOVES) & PLACES, multipliers);  // row g + 8
}
