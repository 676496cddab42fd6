// How the columns of a projection are cut, a function of their number alone. Index arithmetic, which tests compile for
// the host.
//
// K is cut into SPLITS runs of tiles. A run is one chain of products in the order of its tiles, and the runs' sums are
// added in order. Whether different warps hold the runs (decode.cu) or one runs through them (stream.cu), and whether
// they multiply by mma or wgmma, the bytes are the same; a column of a product does not depend on its neighbours. So a
// token's result is a function of the token alone.
#pragma once

#include "experts/layout.cuh"

template <int COLUMNS, int SPLITS_>
struct Runs {
    static constexpr int TILES = (COLUMNS + 63) / 64;  // the last one may be half, its other half packed as zeros
    static constexpr int SPLITS = SPLITS_;
    static constexpr int LEAST = TILES / SPLITS, LONGER = TILES % SPLITS;  // the first LONGER splits have one tile more
    static constexpr int DEPTH = LEAST + (LONGER > 0);                     // tiles in the longest split

    static LAYOUT int first_of(int split) { return split * LEAST + min(split, LONGER); }
    static LAYOUT int tiles_of(int split) { return LEAST + (split < LONGER); }
};

// The tiles of a strip in order, a run's at most MOST at a time.
template <class R, int MOST>
struct Chunks {
    static constexpr int COUNT =
        R::LONGER * ((R::DEPTH + MOST - 1) / MOST) + (R::SPLITS - R::LONGER) * ((R::LEAST + MOST - 1) / MOST);

    int first = 0, tiles = min(MOST, R::tiles_of(0));  // of this chunk; none past the end
    int split = 0;

    LAYOUT void advance() {
        first += tiles;
        if (first == R::first_of(split + 1)) ++split;
        tiles = split < R::SPLITS ? min(MOST, R::first_of(split + 1) - first) : 0;
    }
};
