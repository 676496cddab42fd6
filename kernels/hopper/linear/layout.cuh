// Where the decode kernels' operands and sums lie. Only index arithmetic, which tests compile for the host and replay.
//
// Macros, all given by kernels/hopper/linear/__init__.py: COLUMNS is K; STRIP_ROWS 16 and STEP_COLUMNS 32 the shape of
// a packed tile; SPLITS the K splits; NARROW_PITCH bytes from one token of x to the next in a narrow block.
#pragma once

#include "common/layout.cuh"

constexpr int STEPS = COLUMNS / STEP_COLUMNS;              // of a strip
constexpr int MOST_STEPS = (STEPS + SPLITS - 1) / SPLITS;  // of the longest split
constexpr int STEP_BYTES = STEP_COLUMNS * 2;               // of one token of x
constexpr int TILE = STRIP_ROWS * STEP_COLUMNS / 8;        // 16-byte pieces of a packed tile
constexpr int PARTIAL_PITCH = STRIP_ROWS + 4;  // floats from one token's partial sums to the next: no bank twice

static_assert(COLUMNS % STEP_COLUMNS == 0, "columns come in whole steps");

// The first step of a split; split SPLITS begins past the last step.
LAYOUT int split_begin(int split) { return STEPS * split / SPLITS; }

// The packed weight, in pieces of 16 bytes: a step's first fragment, for lane 0. Lane l's is l further on, and that of
// the second fragment 32 more.
LAYOUT size_t tile_piece(int strip, int step) { return (size_t(strip) * STEPS + step) * TILE; }

// Accumulator i of a lane, of an mma's 16 rows by 8 tokens.
LAYOUT int accumulator_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
LAYOUT int accumulator_token(int lane, int i) { return lane % 4 * 2 + i % 2; }

// Where a token's 8 columns from 8 * piece on lie in a narrow block's copy of x, which begins at byte `x`: whole rows,
// eight of which begin in different banks.
LAYOUT unsigned narrow_x(unsigned x, int token, int piece) { return x + token * NARROW_PITCH + piece * 16; }

// The same in a wide block's copy, [steps of the split][tokens][32 columns]: piece 0 to 3 of a step. Pieces are swapped
// so that those of eight tokens lie in different banks.
template <int TOKENS>
LAYOUT unsigned wide_x(unsigned x, int step, int token, int piece) {
    return x + step * (TOKENS * STEP_BYTES) + token * STEP_BYTES + (piece ^ token / 2 % 4) * 16;
}

// A narrow block's partial sums, in floats.
LAYOUT int partial_sum(int token, int row) { return token * PARTIAL_PITCH + row; }

// A wide cluster's units of 16 rows by 8 tokens, from 0, are added up by its blocks in turn. The block of split `split`
// adds up `units_of` them; the n-th of them is `unit_of`. It receives a lane's four sums of its n-th unit from split
// `from` in a place counted in pieces of 16 bytes.
LAYOUT int adding_split(int unit) { return unit % SPLITS; }
LAYOUT int units_of(int split, int units) { return (units - split + SPLITS - 1) / SPLITS; }
LAYOUT int unit_of(int split, int n) { return n * SPLITS + split; }
LAYOUT int received(int n, int from, int lane) { return (n * SPLITS + from) * 32 + lane; }
