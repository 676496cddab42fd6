// Where the packed experts' words and rows lie, and how K is split: index arithmetic and nothing else, so that
// tests/kernels compiles it for the host and replays it.
//
// Weights are the A operand of mma.m16n8k16 (16 rows), tokens are N, so that a batch of one wastes the least. A tile is
// 16 rows x 64 columns: 32 lanes x 16 bytes, one coalesced load of 512 bytes straight into registers; the tiles of a
// strip of 16 rows lie one after the other along K, then come the next strip's, then the next expert's. Word s of lane
// (g, t) = (lane / 4, lane % 4) is the A fragment of the tile's k16 step s: rows g and g + 8, columns 16 s + 2 t, + 1
// and 16 s + 8 + 2 t, + 1. Columns keep their order, so wgmma can read the same tiles with tokens as they lie in shared
// memory. Four scale bytes a lane: two blocks of 32 columns, rows g and g + 8 of each. Gate and up rows of a unit sit
// at g and g + 8: both end in one lane's accumulator.
#pragma once

#include "common/layout.cuh"

constexpr int STRIP_ROWS = 16;

// Where a tile begins: its values in pieces of 16 bytes, lane l's l further on; its scales in words, lane l's l / 4
// further on. Tiles count through strips and experts.
LAYOUT size_t value_piece(size_t tile) { return tile * 32; }
LAYOUT size_t scale_word(size_t tile) { return tile * 8; }

// The row of a strip, in the checkpoint's order, that lies at row g + 8 half of the packed one. GATE_UP: even rows are
// gates, odd rows ups.
template <bool GATE_UP>
LAYOUT int row_in_strip(int g, int half) {
    return GATE_UP ? 2 * g + half : g + 8 * half;
}
