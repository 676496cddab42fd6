// Rows between the products: residual add and RMSNorm, with the sums over expert outputs and over ranks.
//
// A block takes a row [H] bf16, H the macro HIDDEN: 16 bytes a thread and access, kept in registers. Every sum has one
// order, whatever the number of rows. ROW_THREADS is a macro, too.
//
// With RANKS > 1 what is added to the residual stream is summed over the ranks, and the kernels exchange it themselves,
// in bf16, through the areas of common/exchange.cuh. Ranks are added in their order, in float32, and the sum is rounded
// to bf16: the same bytes on every rank, and by both ways to exchange:
//   one shot (decode): every rank sends its row to all others, and each adds up. RANKS - 1 rows out, one hop.
//   two shots (prefill): every rank sends its row to the row's owner, which adds up and sends the sum to all: 2 (RANKS -
//     1) / RANKS rows out a row.
// A row waits only for the same row of other ranks, and is sent before the wait: blocks of later rows need not be
// resident.
#pragma once

#include "common/exchange.cuh"
#include "common/ptx.cuh"

constexpr int PIECES = HIDDEN / 8;  // 16-byte pieces of a row
constexpr int ROW_WARPS = ROW_THREADS / 32;
constexpr int TURNS = (PIECES + ROW_THREADS - 1) / ROW_THREADS;  // pieces of a thread: thread + turn * ROW_THREADS

static_assert(HIDDEN % 8 == 0, "a row is read 16 bytes at a time");

__device__ __forceinline__ void widen(float (&wide)[8], uint4 piece) {
    const unsigned pairs[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) wide[2 * i] = widen_low(pairs[i]), wide[2 * i + 1] = widen_high(pairs[i]);
}

__device__ __forceinline__ uint4 round_piece(const float (&wide)[8]) {
    return make_uint4(round_bf16x2(wide[0], wide[1]), round_bf16x2(wide[2], wide[3]), round_bf16x2(wide[4], wide[5]),
                      round_bf16x2(wide[6], wide[7]));
}

// row * inverse * weight, eight of each.
__device__ __forceinline__ void scaled(float (&row)[8], float inverse, const uint4 (&weight)[2]) {
    const unsigned bits[8] = {weight[0].x, weight[0].y, weight[0].z, weight[0].w,
                              weight[1].x, weight[1].y, weight[1].z, weight[1].w};
#pragma unroll
    for (int i = 0; i < 8; ++i) row[i] = row[i] * inverse * __uint_as_float(bits[i]);
}

// The same in every lane: a butterfly adds the same pairs on both sides.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

// The float32 sum of a token's expert outputs, `count` pieces each HIDDEN elements after the one before, in their order.
__device__ __forceinline__ void sum_outputs(float (&sum)[8], const bf16* first, int count) {
    constexpr int BATCH = 4;  // loads under way at once
    for (int base = 0; base < count; base += BATCH) {
        uint4 piece[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            if (base + i < count)
                piece[i] = ld_relaxed_gpu(reinterpret_cast<const uint4*>(first + size_t(base + i) * HIDDEN));
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            if (base + i < count) {
                float more[8];
                widen(more, piece[i]);
#pragma unroll
                for (int j = 0; j < 8; ++j) sum[j] = base + i == 0 ? more[j] : sum[j] + more[j];
            }
    }
}

// Pieces of all ranks, this one's and those of the others -> their sum in the order of ranks, rounded to bf16.
__device__ __forceinline__ uint4 sum_ranks(const Area<uint4>& area, uint4 own, const uint4* others) {
    float sum[8], more[8];
#pragma unroll
    for (int rank = 0; rank < RANKS; ++rank) {
        uint4 piece = own;  // or another's: selected without an index that is known at run time only
        if (rank < RANKS - 1 && rank < area.rank) piece = others[rank];
        if (rank > 0 && rank > area.rank) piece = others[rank - 1];
        widen(more, piece);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] = rank == 0 ? more[i] : sum[i] + more[i];
    }
    return round_piece(sum);
}

// This rank's piece of a row -> the sum over all ranks.
__device__ __forceinline__ uint4 one_shot(const Area<uint4>& area, uint4 own, int row, int rows, int piece) {
    auto from = [&](int rank) { return (size_t(rank) * rows + row) * PIECES + piece; };
    uint4 others[RANKS];
    area.send_all(from(area.rank), own);
#pragma unroll
    for (int i = 0; i < RANKS - 1; ++i) {
        others[i] = area.wait(from(area.rank_of(i)));
        area.empty(from(area.rank_of(i)));
    }
    return sum_ranks(area, own, others);
}

__device__ __forceinline__ uint4 two_shots(const Area<uint4>& area, uint4 own, int row, int rows, int piece) {
    const int each = (rows + RANKS - 1) / RANKS, owner = row % RANKS;  // rows of an owner
    auto from = [&](int rank) { return (size_t(rank) * each + row / RANKS) * PIECES + piece; };
    const size_t of_sum = (size_t(RANKS) * each + row) * PIECES + piece;
    if (area.rank != owner) {
#pragma unroll
        for (int i = 0; i < RANKS - 1; ++i)
            if (area.rank_of(i) == owner) area.send(i, from(area.rank), own);
        const uint4 sum = area.wait(of_sum);
        area.empty(of_sum);
        return sum;
    }
    uint4 others[RANKS];
#pragma unroll
    for (int i = 0; i < RANKS - 1; ++i) {
        others[i] = area.wait(from(area.rank_of(i)));
        area.empty(from(area.rank_of(i)));
    }
    const uint4 sum = sum_ranks(area, own, others);
    area.send_all(of_sum, sum);
    return sum;
}

// EMBED: residual = table row of the token. Otherwise residual = x + the sum of `count` expert outputs and over ranks,
// in bf16. Then out = residual / rms(residual) * weight. x: the table, or the residual stream so far.
template <bool EMBED, bool TWO_SHOTS>
__device__ __forceinline__ void norm_row(const bf16* x, const int* tokens, const bf16* outputs, int count,
                                         const float* weight, bf16* residual, bf16* out, float eps,
                                         Area<uint4> area = {}) {
    __shared__ float of_warp[ROW_WARPS];
    if (!EMBED) griddep_launch_dependents();
    uint4 scale[TURNS][2];
    float row[TURNS][8];
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int piece = threadIdx.x + turn * ROW_THREADS;
        if (piece < PIECES)
#pragma unroll
            for (int half = 0; half < 2; ++half) scale[turn][half] = ld_reused_weight(weight + piece * 8 + half * 4);
    }
    griddep_wait();
    size_t from = blockIdx.x;
    if (EMBED) {
        // Only after the wait: attention reads the page table, which `advance` before this kernel wrote, before its own.
        griddep_launch_dependents();
        from = ld_relaxed_gpu(tokens + blockIdx.x);
    }
    float squares = 0;
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int piece = threadIdx.x + turn * ROW_THREADS;
        if (piece < PIECES) {
            uint4 given = ld_relaxed_gpu(reinterpret_cast<const uint4*>(x + from * HIDDEN + piece * 8));
            if (!EMBED) {
                float more[8];
                sum_outputs(more, outputs + (size_t(blockIdx.x) * count * PIECES + piece) * 8, count);
                if (RANKS > 1) {
                    const auto exchange = TWO_SHOTS ? two_shots : one_shot;
                    widen(more, exchange(area, round_piece(more), blockIdx.x, gridDim.x, piece));
                }
                widen(row[turn], given);
#pragma unroll
                for (int i = 0; i < 8; ++i) row[turn][i] += more[i];
                given = round_piece(row[turn]);
            }
            *reinterpret_cast<uint4*>(residual + size_t(blockIdx.x) * HIDDEN + piece * 8) = given;
            widen(row[turn], given);
#pragma unroll
            for (int i = 0; i < 8; ++i) squares += row[turn][i] * row[turn][i];
        }
    }
    squares = warp_sum(squares);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = squares;
    __syncthreads();
    squares = 0;
#pragma unroll
    for (int warp = 0; warp < ROW_WARPS; ++warp) squares += of_warp[warp];
    const float inverse = rsqrtf(squares * (1.0f / HIDDEN) + eps);
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int piece = threadIdx.x + turn * ROW_THREADS;
        if (piece < PIECES) {
            scaled(row[turn], inverse, scale[turn]);
            *reinterpret_cast<uint4*>(out + size_t(blockIdx.x) * HIDDEN + piece * 8) = round_piece(row[turn]);
        }
    }
}
