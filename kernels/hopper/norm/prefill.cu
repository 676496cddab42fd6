// Between the products of a prefill step: residual add + RMSNorm, and routing by tensor cores.
//
// prefill_add_norm: row.cuh, with two shots. Moves 6 H bytes a token, and 2 H for each expert output that is summed.
// route: the choice of experts for many rows that are normed already. Logits are float32 throughout: rounding them makes
//   ties. Their bytes are not those of add_norm_route in decode.cu, which adds the products up in another order.
//
// Macros: HIDDEN, RANKS, ROW_THREADS, MOST_EXPERTS; ROUTE_TOKENS and ROUTE_WARPS of a block of `route`, ROUTE_EXPERTS
// whose weights it holds at once.

#include "norm/choose.cuh"
#include "norm/row.cuh"

namespace {

constexpr int ROUTE_THREADS = ROUTE_WARPS * 32;
constexpr int ROUNDS = (HIDDEN + ROUTE_WARPS * 64 - 1) / (ROUTE_WARPS * 64);  // runs of 64 columns of a warp
constexpr int TILES = ROUTE_EXPERTS / 16, FRAGMENTS = ROUNDS * TILES * 4;     // of a thread: 16 bytes of weights
constexpr int SUMS_PITCH = ROUTE_EXPERTS + 4;                                 // lanes meet no bank twice

static_assert(ROUTE_TOKENS == 8, "the columns of mma.m16n8k16");

// In a run, lane t = lane % 4 of a row has columns 8 t ... 8 t + 7 of each half of 32: four lanes read 64 bytes. The
// multiply does not care which column stands where as long as both operands agree: step s takes columns 4 (s % 2) ...
// 4 (s % 2) + 3 of a lane's in half s / 2.
__device__ __forceinline__ int column_of(int round, int half) {
    return (round * ROUTE_WARPS + threadIdx.x / 32) * 64 + half * 32 + threadIdx.x % 4 * 8;
}

// A thread's weights of ROUTE_EXPERTS experts from `base` on, for itself alone: [round][tile][rows g, rows g + 8][half].
__device__ __forceinline__ void ask_weights(uint4* fragments, const bf16* weight, int base, int experts) {
#pragma unroll
    for (int i = 0; i < FRAGMENTS; ++i) {
        const int column = column_of(i / (4 * TILES), i % 2),
                  row = base + i / 2 % (2 * TILES) * 8 + threadIdx.x % 32 / 4;
        const bool inside = column < HIDDEN;  // zeros past the last
        cp_async(shared_address(fragments + i * ROUTE_THREADS + threadIdx.x),
                 weight + size_t(min(row, experts - 1)) * HIDDEN + (inside ? column : 0), inside);
    }
}

__device__ __forceinline__ void ask_tokens(uint4 (&piece)[ROUNDS][2], const bf16* x, int first, int tokens) {
    const bf16* const row = x + size_t(min(first + int(threadIdx.x) % 32 / 4, tokens - 1)) * HIDDEN;
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int column = column_of(round, half);
            piece[round][half] = make_uint4(0, 0, 0, 0);
            if (column < HIDDEN) piece[round][half] = ld_relaxed_gpu(reinterpret_cast<const uint4*>(row + column));
        }
}

}  // namespace

// x [T, H] -> ids and routing weights. Blocks take tiles of ROUTE_TOKENS tokens. A warp has a run of 64 columns or two,
// and the warps' sums are added in order, whatever the tile. Weights are the A operand of mma.m16n8k16; a block asks for
// them before its wait, 184 KB at 32 experts, and keeps them for all of its tiles. More experts take turns.
extern "C" __global__ void __launch_bounds__(ROUTE_THREADS)
    route(const bf16* x, const bf16* weight, const bf16* bias, long long* ids, float* weights, int tokens, int experts,
          int top_k) {
    extern __shared__ uint4 fragments[];  // [FRAGMENTS][ROUTE_THREADS], then sums [ROUTE_WARPS][ROUTE_TOKENS][experts]
    __shared__ float logits[ROUTE_TOKENS][MOST_EXPERTS];
    griddep_wait_first();
    griddep_launch_dependents();
    ask_weights(fragments, weight, 0, experts);
    griddep_wait();
    float* const sums_of = reinterpret_cast<float*>(fragments + FRAGMENTS * ROUTE_THREADS);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    uint4 piece[ROUNDS][2];
    ask_tokens(piece, x, blockIdx.x * ROUTE_TOKENS, tokens);
    int held = 0;  // the first expert of those whose weights are there or asked for
    for (int first = blockIdx.x * ROUTE_TOKENS; first < tokens; first += gridDim.x * ROUTE_TOKENS) {
        for (int base = 0; base < experts; base += ROUTE_EXPERTS) {
            if (base != held) ask_weights(fragments, weight, held = base, experts);
            cp_async_wait_all();
            float sums[TILES][4] = {};
#pragma unroll
            for (int i = 0; i < FRAGMENTS; i += 4) {  // a tile of a round
                const int round = i / (4 * TILES), tile = i / 4 % TILES;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint4 upper = fragments[(i + half) * ROUTE_THREADS + threadIdx.x];
                    const uint4 lower = fragments[(i + 2 + half) * ROUTE_THREADS + threadIdx.x];
                    const uint4 of_token = piece[round][half];
                    mma(sums[tile], upper.x, lower.x, upper.y, lower.y, of_token.x, of_token.y);
                    mma(sums[tile], upper.z, lower.z, upper.w, lower.w, of_token.z, of_token.w);
                }
            }
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    sums_of[(warp * ROUTE_TOKENS + t * 2 + i % 2) * SUMS_PITCH + tile * 16 + g + i / 2 * 8] =
                        sums[tile][i];
            __syncthreads();
            for (int i = threadIdx.x; i < ROUTE_TOKENS * ROUTE_EXPERTS; i += ROUTE_THREADS) {
                const int token = i / ROUTE_EXPERTS, expert = i % ROUTE_EXPERTS;
                if (base + expert >= experts) continue;
                const float* const of_warp = sums_of + token * SUMS_PITCH + expert;
                float sum = of_warp[0];
#pragma unroll
                for (int other = 1; other < ROUTE_WARPS; ++other) sum += of_warp[other * ROUTE_TOKENS * SUMS_PITCH];
                logits[token][base + expert] = sum + widen(bias[base + expert]);
            }
            __syncthreads();
        }
        const int next = first + gridDim.x * ROUTE_TOKENS;
        if (next < tokens) ask_tokens(piece, x, next, tokens);
        for (int token = warp; token < min(ROUTE_TOKENS, tokens - first); token += ROUTE_WARPS)
            choose(logits[token], experts, top_k, ids + size_t(first + token) * top_k,
                   weights + size_t(first + token) * top_k);
    }
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    prefill_add_norm(const bf16* x, const bf16* outputs, const float* weight, bf16* residual, bf16* out, int count,
                     float eps, const unsigned long long* memories, int offset, int rank) {
    griddep_wait_first();
    norm_row<false, true>(x, nullptr, outputs, count, weight, residual, out, eps, Area<uint4>(memories, offset, rank));
}
