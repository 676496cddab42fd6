// Between the products of a prefill step: residual add + RMSNorm, and routing by tensor cores.
//
// prefill_add_norm: row.cuh, with two shots. Moves 6 H bytes a token, and 2 H for each expert output that is summed.
// route: the choice of experts for many rows that are normed already. Logits are float32 throughout: rounding them makes
//   ties. Their bytes are not those of add_norm_route in decode.cu, which adds the products up in another order.
//
// Macros: HIDDEN, RANKS, ROW_THREADS, MOST_EXPERTS; ROUTE_TOKENS and ROUTE_WARPS of a block of `route`.

#include "norm/choose.cuh"
#include "norm/row.cuh"

namespace {

// A lane's 32 bytes of a row of 64 columns: columns 16 t ... 16 t + 15, t = lane % 4. The multiply does not care which
// column stands where as long as both operands agree: step s takes columns 4 s ... 4 s + 3 of each lane's.
struct Piece {
    uint4 half[2];

    __device__ __forceinline__ Piece(const bf16* row, int column) {
        const bool inside = column < HIDDEN;  // zeros past the last
        half[0] = half[1] = make_uint4(0, 0, 0, 0);
        if (inside) half[0] = ld_relaxed_gpu(reinterpret_cast<const uint4*>(row + column));
        if (inside && column + 8 < HIDDEN) half[1] = ld_relaxed_gpu(reinterpret_cast<const uint4*>(row + column + 8));
    }
    __device__ __forceinline__ unsigned low(int step) const { return step % 2 ? half[step / 2].z : half[step / 2].x; }
    __device__ __forceinline__ unsigned high(int step) const { return step % 2 ? half[step / 2].w : half[step / 2].y; }
};

}  // namespace

// x [T, H] -> ids and routing weights. A block takes ROUTE_TOKENS tokens; its warps take every ROUTE_WARPS-th run of 64
// columns, and their sums are added in order. Weights are the A operand of mma.m16n8k16,
// read from L2 by every block: 184 KB at 32 experts, 24 MB for 2,048 tokens, 5 us.
extern "C" __global__ void __launch_bounds__(ROUTE_WARPS * 32)
    route(const bf16* x, const bf16* weight, const bf16* bias, long long* ids, float* weights, int tokens, int experts,
          int top_k) {
    constexpr int TILES = MOST_EXPERTS / 16, COLUMN_TILES = ROUTE_TOKENS / 8;
    extern __shared__ float sums_of[];  // [ROUTE_WARPS][ROUTE_TOKENS][experts]
    griddep_wait_first();
    griddep_launch_dependents();
    griddep_wait();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.x * ROUTE_TOKENS;
    float sums[TILES][COLUMN_TILES][4] = {};
    for (int base = warp * 64; base < HIDDEN; base += ROUTE_WARPS * 64) {
        const int column = base + t * 16;
        const Piece some(x + size_t(min(first + g, tokens - 1)) * HIDDEN, column);
        const Piece more(x + size_t(min(first + 8 + g, tokens - 1)) * HIDDEN, column);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
            if (tile * 16 < experts) {
                const Piece upper(weight + size_t(min(tile * 16 + g, experts - 1)) * HIDDEN, column);
                const Piece lower(weight + size_t(min(tile * 16 + 8 + g, experts - 1)) * HIDDEN, column);
#pragma unroll
                for (int step = 0; step < 4; ++step)
#pragma unroll
                    for (int n = 0; n < COLUMN_TILES; ++n) {
                        const Piece& tokens_of = n == 0 ? some : more;
                        mma(sums[tile][n], upper.low(step), lower.low(step), upper.high(step), lower.high(step),
                            tokens_of.low(step), tokens_of.high(step));
                    }
            }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int expert = tile * 16 + g + i / 2 * 8, token = n * 8 + t * 2 + i % 2;
                if (expert < experts) sums_of[(warp * ROUTE_TOKENS + token) * experts + expert] = sums[tile][n][i];
            }
    __syncthreads();
    for (int i = threadIdx.x; i < ROUTE_TOKENS * experts; i += ROUTE_WARPS * 32) {
        float sum = sums_of[i];
        for (int other = 1; other < ROUTE_WARPS; ++other) sum += sums_of[other * ROUTE_TOKENS * experts + i];
        sums_of[i] = sum + widen(bias[i % experts]);
    }
    __syncthreads();
    for (int token = warp; token < min(ROUTE_TOKENS, tokens - first); token += ROUTE_WARPS)
        choose(sums_of + token * experts, experts, top_k, ids + size_t(first + token) * top_k,
               weights + size_t(first + token) * top_k);
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    prefill_add_norm(const bf16* x, const bf16* outputs, const float* weight, bf16* residual, bf16* out, int count,
                     float eps, const unsigned long long* memories, int offset, int rank) {
    griddep_wait_first();
    norm_row<false, true>(x, nullptr, outputs, count, weight, residual, out, eps, Area<uint4>(memories, offset, rank));
}
