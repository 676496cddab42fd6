// One projection of all experts as the decode kernels take it: how its columns are split and its rows shared out. Index
// arithmetic alone, which tests compile for the host.
//
// Different warps hold the runs of K (runs.cuh), so that enough loads are in flight.
#pragma once

#include "experts/runs.cuh"

// A row of activations is ROW_PITCH bytes in shared memory: 16 modulo 128, so that ldmatrix meets no bank twice.
template <int COLUMNS, int ROWS_, int SPLITS_, int ROW_PITCH_>
struct Matrix : Runs<COLUMNS, SPLITS_> {
    using Base = Runs<COLUMNS, SPLITS_>;
    using Base::first_of, Base::SPLITS, Base::TILES;
    static constexpr int K = COLUMNS, ROWS = ROWS_;
    static constexpr int STRIPS = ROWS / 16;
    static constexpr int GROUPS = WARPS / SPLITS;  // strips that 8 warps work on at once
    static constexpr int STRIP_GROUPS = (STRIPS + GROUPS - 1) / GROUPS;
    static constexpr int ROW_PITCH = ROW_PITCH_;
    static_assert(ROW_PITCH >= TILES * 128 && ROW_PITCH % 128 == 16, "a row's tiles");

    static LAYOUT unsigned tile(int expert, int strip, int split) {  // the first of a strip's split
        return (expert * STRIPS + strip) * TILES + first_of(split);
    }
};
using Up = Matrix<HIDDEN, 2 * INTER, UP_SPLITS, UP_ROW_PITCH>;
using Down = Matrix<INTER, HIDDEN, DOWN_SPLITS, DOWN_ROW_PITCH>;
