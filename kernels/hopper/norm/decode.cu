// Between the products of a decode step: embedding + RMSNorm, residual add + RMSNorm, the same with the router's top-k.
//
// embed_norm (of a prefill step, too), add_norm: row.cuh, with one shot. They move 6 H bytes a token, and 2 H for each
//   expert output that is summed (17 to 40 KB at 2880: 1 us of bandwidth at 64 tokens); up to 256 tokens latency is
//   all: two trips to L2 and a reduction, about 2 us.
// add_norm_route: add_norm, then weight [E, H] bf16 -> the top_k largest logits' experts and the softmax over them.
//   Reads 2 E H bytes of weights (184 KB at 32 experts, 737 KB at 128): 0.1 and 0.2 us for the whole machine, but 2 and
//   7 us for one multiprocessor. So a cluster of 8 blocks takes a token, a warp an expert, whose whole row lies in the
//   warp's registers before the wait for the predecessor. Each of its blocks norms the row for itself: cheaper than a
//   kernel more. Logits meet in the first block's shared memory. They are float32 throughout: rounding them makes ties.
//   The ranks' partial sums are there, or on their way: linear/decode.cu sent them, in one shot.
// add_norm_route_many: the same bytes for more tokens than there is room for such clusters. A cluster takes as many
//   tokens as it has blocks, and a block an eighth of the columns of all of them: nothing is read, added or normed
//   twice. It needs no other order of sums: add_norm_route's lane l adds up the columns of pieces l, l + 32, ... in
//   their order, and then lanes are added by pairs, 16, 8, 4, 2 and 1 apart. Here a block takes four neighbours of the
//   32 lanes (64 bytes of each 512), and the blocks exchange one sum for each token, warp of add_norm_route (squares) or
//   expert (products), and lane. The fastest unit for such sums is that of float32: at 256 tokens and 32 experts 24
//   million products, 0.9 us for the whole machine.
//
// Macros: HIDDEN, RANKS, ROW_THREADS, MOST_EXPERTS; ROUTER_BLOCKS of a router's cluster, as many as are portable.

#include "norm/choose.cuh"
#include "norm/row.cuh"

namespace {

constexpr int LANE_TURNS = (PIECES + 31) / 32;  // pieces of a lane where a warp takes a row
constexpr int ROUTER_WARPS = MOST_EXPERTS / ROUTER_BLOCKS;
constexpr int AHEAD = RANKS <= 2 ? 3 : 1;         // pieces that a thread of the router loads at once
constexpr int ROUTER_LANES = 32 / ROUTER_BLOCKS;  // of a row's 32, that a block takes where it takes columns

static_assert(ROUTER_LANES == 4 && ROUTER_BLOCKS == 8, "sum_blocks adds 8 blocks, and 16 bytes are a block's lanes");

// What a router adds up: the residual stream, and the ranks' partial sums.
struct Addends {
    const bf16 *x, *delta;
    Area<uint4> area;
    int tokens;

    // A piece of a token's row: of x, delta and residual (rank 0), and of a rank's rows in the exchange area.
    __device__ __forceinline__ unsigned place(int rank, int token, int piece) const {
        return unsigned((rank * tokens + token) * PIECES + piece);
    }
    __device__ __forceinline__ void empty(int token, int piece) const {
#pragma unroll
        for (int i = 0; i < RANKS - 1; ++i) area.empty(place(area.rank_of(i), token, piece));
    }
    // Call use(piece, its sum rounded to bf16) for pieces first, first + step, ... of a token's row.
    template <typename Use>
    __device__ __forceinline__ void each_sum(int token, int first, int step, const Use& use) const {
        for (int base = first; base < PIECES; base += AHEAD * step) {
            uint4 given[AHEAD], added[AHEAD], others[AHEAD][RANKS];
#pragma unroll
            for (int turn = 0; turn < AHEAD; ++turn) {
                const int piece = min(base + turn * step, PIECES - 1);
                const unsigned at = place(0, token, piece);
                given[turn] = ld_relaxed_gpu(reinterpret_cast<const uint4*>(x) + at);
                added[turn] = ld_relaxed_gpu(reinterpret_cast<const uint4*>(delta) + at);
#pragma unroll
                for (int i = 0; i < RANKS - 1; ++i) others[turn][i] = area.look(place(area.rank_of(i), token, piece));
            }
#pragma unroll
            for (int turn = 0; turn < AHEAD; ++turn) {
                const int piece = base + turn * step;
                if (piece >= PIECES) continue;
#pragma unroll
                for (int i = 0; i < RANKS - 1; ++i)
                    while (!has_come(others[turn][i]))
                        others[turn][i] = area.look(place(area.rank_of(i), token, piece));
                float sum[8], more[8];
                widen(sum, given[turn]);
                widen(more, RANKS > 1 ? sum_ranks(area, added[turn], others[turn]) : added[turn]);
#pragma unroll
                for (int i = 0; i < 8; ++i) sum[i] += more[i];
                use(piece, round_piece(sum));
            }
        }
    }
};

// Both kernels of the router must round alike: they leave no multiply and add to the compiler, which fuses some.
__device__ __forceinline__ void add_squares(float& squares, uint4 piece) {
    float wide[8];
    widen(wide, piece);
#pragma unroll
    for (int i = 0; i < 8; ++i) squares = __fmaf_rn(wide[i], wide[i], squares);
}

__device__ __forceinline__ float inverse_rms(float squares, float eps) {
    return rsqrtf(__fmaf_rn(squares, 1.0f / HIDDEN, eps));
}

__device__ __forceinline__ void add_products(float& sum, const float (&left)[8], const float (&right)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = __fmaf_rn(left[i], right[i], sum);
}

// The sum of what each block of the cluster sent, `stride` floats apart: as warp_sum adds lanes 16, 8 and 4 apart.
__device__ __forceinline__ float sum_blocks(const float* sums, int stride) {
    float of[ROUTER_BLOCKS];
#pragma unroll
    for (int i = 0; i < ROUTER_BLOCKS; ++i) of[i] = sums[i * stride];
    return ((of[0] + of[4]) + (of[2] + of[6])) + ((of[1] + of[5]) + (of[3] + of[7]));
}

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

// Grid (ROUTER_BLOCKS, tokens); a block has a warp for every ROUTER_BLOCKS-th expert.
extern "C" __global__ void __cluster_dims__(ROUTER_BLOCKS, 1, 1) __launch_bounds__(ROUTER_WARPS * 32, 1)
    add_norm_route(const bf16* x, const bf16* delta, const float* scale, const bf16* weight, const bf16* bias,
                   bf16* residual, bf16* out, long long* ids, float* weights, int tokens, int experts, int top_k,
                   float eps, const unsigned long long* memories, int offset, int rank) {
    __shared__ uint4 normed_row[PIECES], factors[PIECES][2];
    __shared__ float of_warp[ROUTER_WARPS];
    __shared__ float logits[MOST_EXPERTS];  // the first block's takes the whole cluster's
    __shared__ unsigned long long arrived;  // and this counts their bytes: cheaper than a barrier of all
    griddep_wait_first();
    griddep_launch_dependents();
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        mbarrier_init(shared_address(&arrived), 1);
        fence_mbarrier_init();
    }
    cluster_arrive_relaxed();  // nobody writes to a block that is yet to start
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, block = blockIdx.x, token = blockIdx.y;
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
    const Addends addends = {x, delta, Area<uint4>(memories, offset, rank), tokens};
    cluster_wait();
    griddep_wait();

    const unsigned own_arrived = shared_address(&arrived);
    const unsigned first = mapa<0>(shared_address(logits)), first_arrived = mapa<0>(own_arrived);  // the first block's
    if (block == 0 && threadIdx.x == 0) mbarrier_arrive_expect_tx(own_arrived, experts * 4);
    // Each thread's own pieces stay its own until the row is normed: no barrier but the sum's.
    float squares = 0;
    addends.each_sum(token, threadIdx.x, threads, [&](int piece, uint4 sum) {
        normed_row[piece] = sum;
        if (block == 1) reinterpret_cast<uint4*>(residual)[addends.place(0, token, piece)] = sum;
        add_squares(squares, sum);
    });
    squares = warp_sum(squares);
    if (lane == 0) of_warp[warp] = squares;
    __syncthreads();
    float all = 0;
    for (int w = 0; w < threads / 32; ++w) all += of_warp[w];
    const float inverse = inverse_rms(all, eps);
    for (int piece = threadIdx.x; piece < PIECES; piece += threads) {
        float normed[8];
        widen(normed, normed_row[piece]);
        scaled(normed, inverse, factors[piece]);
        const uint4 rounded = round_piece(normed);
        normed_row[piece] = rounded;
        if (block == 2) reinterpret_cast<uint4*>(out)[addends.place(0, token, piece)] = rounded;
    }
    __syncthreads();
    if (busy) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < LANE_TURNS; ++i)
            if (lane + i * 32 < PIECES) {
                float left[8], right[8];
                widen(left, row[i]);
                widen(right, normed_row[lane + i * 32]);
                add_products(sum, left, right);
            }
        sum = warp_sum(sum) + bias_of;
        if (lane == 0) st_async(first + expert * 4, sum, first_arrived);
    }
    if (block == 0) {
        mbarrier_wait(own_arrived, 0);
        if (RANKS > 1)  // every block has a logit to send, and sent it after reading the row
            for (int piece = threadIdx.x; piece < PIECES; piece += threads) addends.empty(token, piece);
        if (warp == 0) choose(logits, experts, top_k, ids + size_t(token) * top_k, weights + size_t(token) * top_k);
    }
}

// Grid (ROUTER_BLOCKS, a cluster for ROUTER_BLOCKS tokens); a block has as many threads as one of add_norm_route. Until
// rows are normed, four threads take what a warp of add_norm_route takes of a token's row, a lane each; then a thread
// takes an expert and a lane. What blocks exchange is collected first, and leaves 16 bytes a thread.
extern "C" __global__ void __cluster_dims__(ROUTER_BLOCKS, 1, 1) __launch_bounds__(ROUTER_WARPS * 32, 1)
    add_norm_route_many(const bf16* x, const bf16* delta, const float* scale, const bf16* weight, const bf16* bias,
                        bf16* residual, bf16* out, long long* ids, float* weights, int tokens, int experts, int top_k,
                        float eps, const unsigned long long* memories, int offset, int rank) {
    constexpr int TOKENS = ROUTER_BLOCKS;  // each block chooses the experts of one
    constexpr int MOST_SQUARES = TOKENS * ROUTER_WARPS, MOST_PRODUCTS = MOST_EXPERTS;  // of a token
    static_assert(MOST_SQUARES <= MOST_PRODUCTS && TOKENS * ROUTER_WARPS >= MOST_EXPERTS, "they share places");
    __shared__ float4 rows[LANE_TURNS][TOKENS][2][ROUTER_LANES];  // of each piece two halves, in float32
    __shared__ uint4 factors[LANE_TURNS][ROUTER_LANES][2];
    // Squares for all blocks and of all blocks, and products for all blocks and of all blocks, of this block's token.
    // Nobody sends products before all squares have come, nor adds them up before all products have left.
    __shared__ __align__(16) float own_squares_products_of[ROUTER_BLOCKS * MOST_PRODUCTS][ROUTER_LANES];
    __shared__ __align__(16) float squares_of_own_products[ROUTER_BLOCKS * MOST_PRODUCTS][ROUTER_LANES];
    __shared__ float of_warp[TOKENS * ROUTER_WARPS];  // and later the logits
    __shared__ unsigned long long arrived[2];         // they count the bytes of both
    griddep_wait_first();
    griddep_launch_dependents();
    const unsigned squares_arrived = shared_address(arrived), products_arrived = squares_arrived + 8;
    const int threads = blockDim.x, warps = threads / 32, block = blockIdx.x;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
        mbarrier_init(squares_arrived, 1);
        mbarrier_init(products_arrived, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(squares_arrived, ROUTER_BLOCKS * TOKENS * warps * 16);
        mbarrier_arrive_expect_tx(products_arrived, ROUTER_BLOCKS * experts * 16);
    }
    cluster_arrive_relaxed();  // nobody writes to a block that is yet to start
    // The lane that is this block's number `own`; its pieces are that and every 32nd more.
    const auto lane_of = [&](int own) { return ROUTER_LANES * block + own; };
    // Two neighbours read the same columns of a token; eight threads, 64 bytes of two experts.
    const int expert = warp * 8 + lane / 8 * 2 + lane % 2, own = lane / 2 % ROUTER_LANES;
    uint4 row[LANE_TURNS];
#pragma unroll
    for (int turn = 0; turn < LANE_TURNS; ++turn) {
        const int piece = lane_of(own) + turn * 32;
        row[turn] = make_uint4(0, 0, 0, 0);
        if (expert < experts && piece < PIECES)
            row[turn] = ld_reused_weight(weight + size_t(expert) * HIDDEN + piece * 8);
    }
    float bias_of[MOST_EXPERTS / 32];
#pragma unroll
    for (int i = 0; i < MOST_EXPERTS / 32; ++i)
        bias_of[i] = lane + i * 32 < experts ? widen(bias[lane + i * 32]) : 0.0f;
    for (int at = threadIdx.x; at < LANE_TURNS * ROUTER_LANES; at += threads) {
        const int turn = at / ROUTER_LANES, piece = lane_of(at % ROUTER_LANES) + turn * 32;
        if (piece >= PIECES) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half)
            factors[turn][at % ROUTER_LANES][half] = ld_reused_weight(scale + piece * 8 + half * 4);
    }
    const Addends addends = {x, delta, Area<uint4>(memories, offset, rank), tokens};
    const int summed = threadIdx.x % ROUTER_LANES, first_turn = threadIdx.x / ROUTER_LANES % warps;
    const int of_token = threadIdx.x / (ROUTER_LANES * warps), token = blockIdx.y * TOKENS + of_token;
    const int first_piece = lane_of(summed) + first_turn * 32;
    const auto own_squares = own_squares_products_of, products_of = own_squares_products_of;
    const auto squares_of = squares_of_own_products, own_products = squares_of_own_products;
    cluster_wait();
    griddep_wait();

    const auto halves_of = [&](int piece) { return &rows[piece / 32][of_token][0][summed]; };
    float squares = 0;
    if (token < tokens)
        addends.each_sum(token, first_piece, threads, [&](int piece, uint4 sum) {
            addends.empty(token, piece);
            reinterpret_cast<uint4*>(residual)[addends.place(0, token, piece)] = sum;
            add_squares(squares, sum);
            float wide[8];
            widen(wide, sum);
            halves_of(piece)[0] = make_float4(wide[0], wide[1], wide[2], wide[3]);
            halves_of(piece)[ROUTER_LANES] = make_float4(wide[4], wide[5], wide[6], wide[7]);
        });
    const int square_at = of_token * warps + first_turn;
    own_squares[square_at][summed] = squares;
    __syncthreads();
    for (int i = threadIdx.x; i < TOKENS * warps * ROUTER_BLOCKS; i += threads) {
        const int sent = i % (TOKENS * warps), to = i / (TOKENS * warps);
        st_async(mapa(shared_address(squares_of[block * MOST_SQUARES + sent]), to), own_squares[sent],
                 mapa(squares_arrived, to));
    }
    mbarrier_wait(squares_arrived, 0);
    squares = sum_blocks(&squares_of[square_at][summed], MOST_SQUARES * ROUTER_LANES);
    squares += __shfl_xor_sync(0xffffffffu, squares, 2);
    squares += __shfl_xor_sync(0xffffffffu, squares, 1);
    if (summed == 0) of_warp[square_at] = squares;
    __syncthreads();
    float all = 0;
    for (int w = 0; w < warps; ++w) all += of_warp[of_token * warps + w];
    const float inverse = inverse_rms(all, eps);
    if (token < tokens)
        for (int piece = first_piece; piece < PIECES; piece += threads) {
            float4* const halves = halves_of(piece);
            const float4 low = halves[0], high = halves[ROUTER_LANES];
            float normed[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            scaled(normed, inverse, factors[piece / 32][summed]);
            const uint4 rounded = round_piece(normed);
            reinterpret_cast<uint4*>(out)[addends.place(0, token, piece)] = rounded;
            widen(normed, rounded);
            halves[0] = make_float4(normed[0], normed[1], normed[2], normed[3]);
            halves[ROUTER_LANES] = make_float4(normed[4], normed[5], normed[6], normed[7]);
        }
    __syncthreads();

    float sums[TOKENS] = {};  // those of tokens that there are not are of no account
#pragma unroll
    for (int turn = 0; turn < LANE_TURNS; ++turn)
        if ((turn + 1) * 32 <= PIECES || lane_of(own) + turn * 32 < PIECES) {
            float left[8];
            widen(left, row[turn]);
#pragma unroll
            for (int i = 0; i < TOKENS; ++i) {
                const float4 low = rows[turn][i][0][own], high = rows[turn][i][1][own];
                const float right[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
                add_products(sums[i], left, right);
            }
        }
    if (expert < experts)
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) own_products[i * experts + expert][own] = sums[i];
    __syncthreads();
    for (int i = threadIdx.x; i < TOKENS * experts; i += threads) {
        const unsigned at = shared_address(products_of[block * MOST_PRODUCTS + i % experts]), to = i / experts;
        st_async(mapa(at, to), own_products[i], mapa(products_arrived, to));
    }
    if (warp == 0) {
        mbarrier_wait(products_arrived, 0);
        const int chosen = blockIdx.y * TOKENS + block;
        if (chosen >= tokens) return;
#pragma unroll
        for (int i = 0; i < MOST_EXPERTS / 32; ++i) {
            const int at = lane + i * 32;
            if (at < experts) {
                float of[ROUTER_LANES];
#pragma unroll
                for (int j = 0; j < ROUTER_LANES; ++j)
                    of[j] = sum_blocks(&products_of[at][j], MOST_PRODUCTS * ROUTER_LANES);
                of_warp[at] = ((of[0] + of[2]) + (of[1] + of[3])) + bias_of[i];
            }
        }
        __syncwarp();
        choose(of_warp, experts, top_k, ids + size_t(chosen) * top_k, weights + size_t(chosen) * top_k);
    }
}
