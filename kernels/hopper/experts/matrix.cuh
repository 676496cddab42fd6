// One projection of all experts as the decode kernels take it: how its columns are split and its rows shared out. Index
// arithmetic alone, which tests compile for the host.
//
// K is cut into SPLITS runs of tiles, a function of K alone. A split is one chain of mma in the order of its tiles, and
// the splits are added in order. Whether different warps hold the splits (small batches: enough loads in flight) or one
// warp runs through them (large batches: activations shared by 8 strips), the bytes are the same; a column of an mma
// does not depend on its neighbours. So a token's result is a function of the token alone.
#pragma once

#include "experts/layout.cuh"

// A row of activations is ROW_PITCH bytes in shared memory, a split of it SPLIT_PITCH: 16 modulo 128, so
// that ldmatrix meets no bank twice.
template <int COLUMNS, int ROWS_, int SPLITS_, int ROW_PITCH_, int SPLIT_PITCH_>
struct Matrix {
    static constexpr int K = COLUMNS, ROWS = ROWS_;
    static constexpr int TILES = (K + 63) / 64;  // the last one may be half, its other half packed as zeros
    static constexpr int STRIPS = ROWS / 16;
    static constexpr int SPLITS = SPLITS_;
    static constexpr int GROUPS = WARPS / SPLITS;  // strips that 8 warps of the small kernels work on at once
    static constexpr int STRIP_GROUPS = (STRIPS + GROUPS - 1) / GROUPS;
    static constexpr int LEAST = TILES / SPLITS, LONGER = TILES % SPLITS;  // the first LONGER splits have one tile more
    static constexpr int DEPTH = LEAST + (LONGER > 0);                     // tiles in the longest split
    static constexpr int ROW_PITCH = ROW_PITCH_, SPLIT_PITCH = SPLIT_PITCH_;
    static_assert(ROW_PITCH >= TILES * 128 && ROW_PITCH % 128 == 16, "a row's tiles");
    static_assert(SPLIT_PITCH >= DEPTH * 128 && SPLIT_PITCH % 128 == 16, "a split's tiles");

    static LAYOUT int first_of(int split) { return split * LEAST + min(split, LONGER); }
    static LAYOUT int tiles_of(int split) { return LEAST + (split < LONGER); }
    static LAYOUT unsigned tile(int expert, int strip, int split) {  // the first of a strip's split
        return (expert * STRIPS + strip) * TILES + first_of(split);
    }
};
using Up = Matrix<HIDDEN, 2 * INTER, UP_SPLITS, UP_ROW_PITCH, UP_SPLIT_PITCH>;
using Down = Matrix<INTER, HIDDEN, DOWN_SPLITS, DOWN_ROW_PITCH, DOWN_SPLIT_PITCH>;
