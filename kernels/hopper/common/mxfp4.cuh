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
// bits of an E2M1 at bits 15 and 8..6 of a bf16 gives its value * 2^-126 exactly, subnormal included. In each half of a
// word the four values' (sign; exponent, mantissa) bits lie at (15; 8..6), (12; 5..3), (13; 2..0), (14; 11..9): to get
// there takes 1, 2, 3 or 4, and 4 operations, for two values each. The multiplier's exponent field is the stored scale
// byte, which is the checkpoint's + 94: the scale, times 2^126, times 2^-32 to keep the byte below 255 for scales up to
// 2^33.
//
// SHIFTS_AT_ONCE: the third's two shifts are one multiplication; what it carries into other places is masked out. With
// it a layer of 8 rows is 2 us faster, but ptxas spills in the kernels for 9 to 64 rows, which lose 15 us at 16 rows.
template <bool SHIFTS_AT_ONCE>
__device__ __forceinline__ void dequantize(unsigned word, unsigned multipliers, unsigned* a) {
    constexpr unsigned SIGN = 0x80008000u, REST = 0x01C001C0u, THIRD = 0x20072007u;
    a[0] = mul_bf16x2_low(word & (SIGN | REST), multipliers);          // row g, columns 2 t, + 1
    a[1] = mul_bf16x2_high((word << 3) & (SIGN | REST), multipliers);  // row g + 8
    const unsigned third =
        SHIFTS_AT_ONCE ? ((word & THIRD) * (4 + 64)) & (SIGN | REST) : ((word << 2) & SIGN) | ((word << 6) & REST);
    a[2] = mul_bf16x2_low(third, multipliers);                                         // row g, columns 8 + 2 t, + 1
    a[3] = mul_bf16x2_high(((word << 1) & SIGN) | ((word >> 3) & REST), multipliers);  // row g + 8
}
