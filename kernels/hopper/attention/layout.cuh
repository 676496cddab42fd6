// Where keys, values and a prefill tile's queries lie: index arithmetic and nothing else, so that tests/kernels
// compiles it for the host and replays it.
#pragma once

#include "common/layout.cuh"

static_assert(DIM == 64 && PAGE == 64, "a row is the swizzle's 128 bytes, a page is a 64 x 64 tile of both products");

constexpr int ROW_BYTES = 2 * DIM;            // of a key or a value
constexpr int PAGE_BYTES = PAGE * ROW_BYTES;  // of one kv head

// Bytes from the start of a page in shared memory to a chunk of 16 bytes of a row: chunk c of row r lies at place c ^ r
// % 8, so that the eight rows of a matrix fall into distinct banks. It is wgmma's swizzle of 128 bytes, too.
LAYOUT int swizzled(int row, int chunk) { return row * ROW_BYTES + (chunk ^ row % 8) * 16; }

// What a lane names to ldmatrix for mma's B fragments, in bytes from the start of a page. Keys: of 8 n ... 8 n + 7 the
// dimensions 32 half ... 32 half + 31, two steps of 16. Values, transposed: of keys 16 k ... 16 k + 15 the dimensions
// 16 pair ... 16 pair + 15, two tiles of 8.
LAYOUT int key_matrix(int n, int half, int lane) { return swizzled(8 * n + lane % 8, 4 * half + lane / 8); }
LAYOUT int value_matrix(int k, int pair, int lane) {
    return swizzled(16 * k + lane / 8 % 2 * 8 + lane % 8, 2 * pair + lane / 8 / 2);
}

// A page in shared memory as wgmma's B operand (PTX ISA, "matrix descriptor"): bits 0-13 the address, 16-29 the leading
// and 32-45 the stride byte offset, all / 16; 62-63 the swizzle, 1 for 128 bytes. The unit of this layout is an atom of
// 8 rows of 128 bytes, 1024 bytes that follow each other; within it 16-byte chunk c of row r lies at c ^ r.
//   Keys (n: a key, a row; k: a dimension, along the row) are K-major: the stride offset leads from 8 keys to the next
//   8, 1024 bytes; the leading offset is not used. 16 dimensions more: 32 bytes along the row, whose sum is swizzled.
//   Values (n: a dimension, along the row; k: a key, a row) are MN-major, "transposed": an atom is 64 n by 8 k; the
//   stride offset leads from 8 k to the next 8, 1024 bytes, the leading offset to the next 64 n, of which there are
//   none. 16 keys more: two atoms, 2048 bytes.
LAYOUT unsigned long long page_operand(unsigned address) {
    constexpr unsigned long long ATOM = 1024 >> 4;
    return 1ull << 62 | ATOM << 32 | ATOM << 16 | (address >> 4 & 0x3fff);
}
constexpr int SIXTEEN_DIMENSIONS = 32 >> 4, SIXTEEN_KEYS = 2048 >> 4;  // in a descriptor

// The row of a warpgroup's 64 that a lane has in the r-th (of 2) of its accumulators' rows. Rows are (token, query
// head) pairs, the heads of a token beside each other: row / GROUP is the token, row % GROUP the head.
LAYOUT int accumulator_row(int warp, int lane, int r) { return warp % 4 * 16 + lane / 4 + 8 * r; }

// What a lane names to ldmatrix for a warp's A fragments of dimensions 16 k ... 16 k + 15, in bytes from the start of a
// warpgroup's 64 rows of queries in shared memory, which lie like a page.
LAYOUT int query_matrix(int warp, int k, int lane) {
    return swizzled(warp % 4 * 16 + lane / 8 % 2 * 8 + lane % 8, 2 * k + lane / 8 / 2);
}
