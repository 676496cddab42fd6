// Between the products of a decode step: embedding + RMSNorm, residual add + RMSNorm, the same with the router's top-k.
//
// embed_norm (of a prefill step, too), add_norm: row.cuh, with one shot. They move 6 H bytes a token, and 2 H for each
//   expert output that is summed (17 to 40 KB at 2880: 1 us of bandwidth at 64 tokens); up to 256 tokens latency is
//   all: two trips to L2 and a reduction, about 2 us.
// add_norm_route: add_norm, then weight [E, H] bf16 -> the top_k largest logits' experts and the softmax over them.
//   Reads 2 E H bytes of weights (184 KB at 32 experts, 737 KB at 128): 0.1 and 0.2 us for the whole machine, but 2 and
//   7 us for one multiprocessor. So a cluster of 8 blocks takes a token, a warp an expert, whose whole row lies in the
//   warp's registers before the wait for the predecessor; a cluster keeps its weights for all of its tokens. Each of
//   its blocks norms the row for itself: cheaper than a kernel more. Logits meet in the first block's shared memory.
//   They are float32 throughout: rounding them makes ties. The ranks' partial sums are there, or on their way:
//   linear/decode.cu sent them, in one shot.
//
// Macros: HIDDEN, RANKS, ROW_THREADS, MOST_EXPERTS; ROUTER_BLOCKS of a router's cluster, as many as are portable, and
// ROUTER_TOKENS, the most that a cluster takes between two barriers.

#include "norm/choose.cuh"
#include "norm/row.cuh"

namespace {

constexpr int LANE_TURNS = (PIECES + 31) / 32;  // pieces of a lane where a warp takes a row
constexpr int ROUTER_WARPS = MOST_EXPERTS / ROUTER_BLOCKS;
constexpr int AHEAD = RANKS <= 2 ? 3 : 1;  // pieces that a thread of the router loads at once

}  // namespace

extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    embed_norm(const int* tokens, const bf16* table, const float* weight, bf16* residual, bf16* out, float eps) {
    griddep_wait_first();
    norm_row<true, false>(table, tokens, nullptr, 0, weight, residual, out, eps);
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    add_norm(const bf16* x, const bf16* outputs, const float* weight, bf16* residual, bf16* out, int count, float eps,
             const unsigned long long* memories, int offset, int rank) {
    griddep_wait_first();
    norm_row<false, false>(x, nullptr, outputs, count, weight, residual, out, eps, Area<uint4>(memories, offset, rank));
}

// Grid (ROUTER_BLOCKS, clusters); a block has a warp for every ROUTER_BLOCKS-th expert. A cluster takes `group` <=
// ROUTER_TOKENS tokens at once, then as many again, further on by what all clusters take.
extern "C" __global__ void __cluster_dims__(ROUTER_BLOCKS, 1, 1) __launch_bounds__(ROUTER_WARPS * 32, 1)
    add_norm_route(const bf16* x, const bf16* delta, const float* scale, const bf16* weight, const bf16* bias,
                   bf16* residual, bf16* out, long long* ids, float* weights, int tokens, int experts, int top_k,
                   int group, float eps, const unsigned long long* memories, int offset, int rank) {
    __shared__ uint4 rows[ROUTER_TOKENS][PIECES], factors[PIECES][2];
    __shared__ float of_warp[ROUTER_TOKENS][ROUTER_WARPS];
    __shared__ float logits[ROUTER_TOKENS][MOST_EXPERTS];  // the first block's takes the whole cluster's
    __shared__ unsigned long long arrived;                 // and this counts their bytes: cheaper than a barrier of all
    griddep_wait_first();
    griddep_launch_dependents();
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        mbarrier_init(shared_address(&arrived), 1);
        fence_mbarrier_init();
    }
    cluster_arrive_relaxed();  // nobody writes to a block that is yet to start
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, block = blockIdx.x;
    const int expert = warp * ROUTER_BLOCKS + block;
    const int threads = blockDim.x;
    const bool busy = expert < experts;  // the same in a warp
    uint4 row[LANE_TURNS];
    float bias_of = 0;
#pragma unroll
    for (int turn = 0; turn < LANE_TURNS; ++turn) {
        row[turn] = make_uint4(0, 0, 0, 0);
        if (busy && lane + turn * 32 < PIECES)
            row[turn] = ld_reused_weight(weight + size_t(expert) * HIDDEN + (lane + turn * 32) * 8);
    }
    if (busy) bias_of = widen(bias[expert]);
    for (int piece = threadIdx.x; piece < PIECES; piece += threads)  // read back by the same thread
#pragma unroll
        for (int half = 0; half < 2; ++half) factors[piece][half] = ld_reused_weight(scale + piece * 8 + half * 4);
    const Area<uint4> area(memories, offset, rank);
    cluster_wait();
    griddep_wait();

    const unsigned own_arrived = shared_address(&arrived);
    const unsigned first = mapa<0>(shared_address(logits)), first_arrived = mapa<0>(own_arrived);  // the first block's
    const int stride = gridDim.y * group;
    // A piece of a token's row: of x, delta and residual (rank 0), and of a rank's rows in the exchange area.
    auto place = [&](int rank, int token, int piece) { return unsigned((rank * tokens + token) * PIECES + piece); };
    unsigned parity = 0;
    for (int begin = blockIdx.y * group; begin < tokens; begin += stride, parity ^= 1) {
        const int count = min(group, tokens - begin);
        if (block == 0 && threadIdx.x == 0) mbarrier_arrive_expect_tx(own_arrived, count * experts * 4);
        // Each thread's own pieces stay its own until the row is normed: no barrier but the sum's.
        for (int token = 0; token < count; ++token) {
            float squares = 0;
            for (int base = threadIdx.x; base < PIECES; base += AHEAD * threads) {
                uint4 given[AHEAD], added[AHEAD], others[AHEAD][RANKS];
#pragma unroll
                for (int turn = 0; turn < AHEAD; ++turn) {
                    const int piece = min(base + turn * threads, PIECES - 1);
                    const unsigned at = place(0, begin + token, piece);
                    given[turn] = ld_relaxed_gpu(reinterpret_cast<const uint4*>(x) + at);
                    added[turn] = ld_relaxed_gpu(reinterpret_cast<const uint4*>(delta) + at);
#pragma unroll
                    for (int i = 0; i < RANKS - 1; ++i)
                        others[turn][i] = area.look(place(area.rank_of(i), begin + token, piece));
                }
#pragma unroll
                for (int turn = 0; turn < AHEAD; ++turn) {
                    const int piece = base + turn * threads;
                    if (piece >= PIECES) continue;
#pragma unroll
                    for (int i = 0; i < RANKS - 1; ++i)
                        while (!has_come(others[turn][i]))
                            others[turn][i] = area.look(place(area.rank_of(i), begin + token, piece));
                    float sum[8], more[8];
                    widen(sum, given[turn]);
                    widen(more, RANKS > 1 ? sum_ranks(area, added[turn], others[turn]) : added[turn]);
#pragma unroll
                    for (int i = 0; i < 8; ++i) sum[i] += more[i];
                    const uint4 rounded = round_piece(sum);
                    rows[token][piece] = rounded;
                    if (block == 1) reinterpret_cast<uint4*>(residual)[place(0, begin + token, piece)] = rounded;
                    widen(sum, rounded);
#pragma unroll
                    for (int i = 0; i < 8; ++i) squares += sum[i] * sum[i];
                }
            }
            squares = warp_sum(squares);
            if (lane == 0) of_warp[token][warp] = squares;
        }
        __syncthreads();
#pragma unroll
        for (int token = 0; token < ROUTER_TOKENS; ++token)
            if (token < count) {
                float all = 0;
                for (int w = 0; w < threads / 32; ++w) all += of_warp[token][w];
                const float inverse = rsqrtf(all * (1.0f / HIDDEN) + eps);
                for (int piece = threadIdx.x; piece < PIECES; piece += threads) {
                    float normed[8];
                    widen(normed, rows[token][piece]);
                    scaled(normed, inverse, factors[piece]);
                    const uint4 rounded = round_piece(normed);
                    rows[token][piece] = rounded;
                    if (block == 2)
                        *reinterpret_cast<uint4*>(out + size_t(begin + token) * HIDDEN + piece * 8) = rounded;
                }
            }
        __syncthreads();
        if (busy)
            for (int token = 0; token < count; ++token) {
                float sum = 0;
#pragma unroll
                for (int i = 0; i < LANE_TURNS; ++i)
                    if (lane + i * 32 < PIECES) {
                        float left[8], right[8];
                        widen(left, row[i]);
                        widen(right, rows[token][lane + i * 32]);
#pragma unroll
                        for (int j = 0; j < 8; ++j) sum += left[j] * right[j];
                    }
                sum = warp_sum(sum) + bias_of;
                if (lane == 0) st_async(first + (token * MOST_EXPERTS + expert) * 4, sum, first_arrived);
            }
        if (block == 0) {
            mbarrier_wait(own_arrived, parity);
            if (RANKS > 1)  // every block has a logit to send, and sent it after reading the rows
                for (int at = threadIdx.x; at < count * PIECES; at += threads)
#pragma unroll
                    for (int i = 0; i < RANKS - 1; ++i)
                        area.empty(place(area.rank_of(i), begin + at / PIECES, at % PIECES));
            for (int token = warp; token < count; token += threads / 32)
                choose(logits[token], experts, top_k, ids + size_t(begin + token) * top_k,
                       weights + size_t(begin + token) * top_k);
        }
        if (begin + stride < tokens) cluster_sync();  // then logits and rows are written again
    }
}
