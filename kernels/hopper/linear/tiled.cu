// out [T, rows] = x [T, COLUMNS] * weight [rows, COLUMNS]^T + bias, bf16 in and out, float32 inside: dense layers of a
// decode step of many tokens. The weights, and the bytes of the result, are those of decode.cu.
//
// Bytes: 2 rows COLUMNS of weights, which are read once, and 2 T (COLUMNS + rows). Operations: 2 T rows COLUMNS, at 256
// tokens of QKV (5120 x 2880) 7.5 GFLOP: 9.5 us at 790 TFLOP/s, as long as its weights take from memory. The limit is a
// multiprocessor's shared memory: every operand is written to it once and read from it at least once.
//
// An item of a block is CONSUMERS * 64 rows, 64 for each of its warpgroups, by TILE_TOKENS tokens. The blocks of a cluster
// are CLUSTER_ROWS neighbours in rows by CLUSTER_TOKENS in tokens, all that there are: each brings a part of the weights
// for its neighbours in tokens, and of the tokens for its neighbours in rows, so that nothing is read twice from the L2
// within a cluster. Clusters take items c, c + clusters, ...
//
// Two more warps of a block ask for what comes, in stages of 64 columns, STAGES ahead and on into the next item: one for
// weights, which no kernel writes, before the wait for the predecessor; the other for tokens, after it.
//
// Split-K as in decode.cu: every dot product is cut into SPLITS runs of columns, each added up in order from zero, and
// the runs' sums are added in order, here by one warpgroup after the other. wgmma adds up as mma does. A run begins a
// stage; its last one may be half empty.
//
// A warpgroup reads the A operand of a stage while the stage before is multiplied, and always has one product queued
// behind that. Within a run only, which is unrolled: ptxas does not see a product under way across a loop's edge.
//
// No block can wait in vain. Clusters share nothing; a cluster is scheduled as a whole. Within one, `full` of a stage
// needs the copies of blocks whose producers wait for `empty` only, and `empty` needs the consumers of blocks that wait
// for `full` of the same turn: all blocks of a cluster have the same turns in the same order. None ends before the
// others are done with its memory.
//
// With RANKS > 1 the result is this rank's partial sum, and is sent from here to the other ranks, too, as in decode.cu.
//
// Macros beside those of layout.cuh: RANKS; CONSUMERS, warpgroups that multiply; TILE_TOKENS of a block; CLUSTER_ROWS,
// CLUSTER_TOKENS; STAGES; OUT_PITCH, from a token's 16 rows to the next in a warp's staged outputs; CONSUMER_REGISTERS,
// PRODUCER_REGISTERS; SHARED_BYTES of a launch.

#include "common/exchange.cuh"
#include "common/ptx.cuh"
#include "common/wgmma.cuh"
#include "linear/layout.cuh"

constexpr int BLOCKS = CLUSTER_ROWS * CLUSTER_TOKENS;  // of a cluster
constexpr int WARPS = 4 * CONSUMERS;                   // that multiply, a strip each
constexpr int CONSUMER_THREADS = WARPS * 32, THREADS = CONSUMER_THREADS + 128;
constexpr int ROWS = 64 * CONSUMERS;
constexpr int STAGE_STEPS = 2;  // of 32 columns
constexpr int STRIP_BYTES = STAGE_STEPS * TILE * 16;
constexpr int TOKEN_BYTES = TILE_TOKENS * STAGE_STEPS * STEP_BYTES;
constexpr int STAGE_BYTES = TOKEN_BYTES + WARPS * STRIP_BYTES;
constexpr int OWN_TOKENS = TILE_TOKENS / CLUSTER_ROWS;  // that a block brings
constexpr int SENDERS = CLUSTER_ROWS + CLUSTER_TOKENS - 1;
constexpr int PART_STEPS = CONSUMERS > 2 ? 1 : 2;  // multiplied at a time: as registers allow
constexpr int FEWEST_STEPS = STEPS / SPLITS;       // of a run
constexpr int OUT_BYTES = 2 * 16 * OUT_PITCH * 2;

static_assert(STEP_BYTES * STAGE_STEPS == 128, "a token's row of a stage is the swizzle's 128 bytes");
static_assert(FEWEST_STEPS > 0, "no run is empty");
static_assert(TILE_TOKENS % 16 == 0 && TILE_TOKENS <= 128, "outputs are staged by 16 tokens; registers");
static_assert(OWN_TOKENS * CLUSTER_ROWS == TILE_TOKENS && OWN_TOKENS % 8 == 0, "whole groups of the swizzle");
static_assert(SHARED_BYTES >= STAGE_ALIGNMENT + STAGES * STAGE_BYTES + WARPS * OUT_BYTES, "what a block needs");

struct Layer {
    const uint4* weight;
    const TensorMap* x;
    const bf16* bias;  // or null
    bf16* out;
    int rows, tokens;
    const unsigned long long* memories;  // the exchange area for the sum after attention: see Peers in kernels/ops.py
    int offset, rank;
};

// Where a block stands in its cluster, and which blocks share its rows and its tokens.
struct Place {
    int row, token;

    __device__ __forceinline__ Place()
        : row(blockIdx.x % BLOCKS % CLUSTER_ROWS), token(blockIdx.x % BLOCKS / CLUSTER_ROWS) {}
    __device__ __forceinline__ unsigned short with_rows() const {
        unsigned mask = 0;
#pragma unroll
        for (int i = 0; i < CLUSTER_TOKENS; ++i) mask |= 1u << (i * CLUSTER_ROWS);
        return mask << row;
    }
    __device__ __forceinline__ unsigned short with_tokens() const {
        return ((1u << CLUSTER_ROWS) - 1) << (token * CLUSTER_ROWS);
    }
    // One of the SENDERS blocks that bring something for this one.
    __device__ __forceinline__ int sender(int i) const {
        if (i < CLUSTER_ROWS) return token * CLUSTER_ROWS + i;
        const int other = i - CLUSTER_ROWS;
        return (other < token ? other : other + 1) * CLUSTER_ROWS + row;
    }
};

// A place in the ring of stages, and the parity of its round.
struct Position {
    int stage = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// Shared addresses: the stages, [tokens][strips] each, and their mbarriers.
struct Ring {
    unsigned stages, full, empty;

    __device__ __forceinline__ void init() const {
        if (threadIdx.x < STAGES) {
            mbarrier_init(full + threadIdx.x * 8, 2);                 // the producers'
            mbarrier_init(empty + threadIdx.x * 8, WARPS * SENDERS);  // the warps that read what this block brings
        }
        fence_mbarrier_init();
    }
};

__device__ __forceinline__ int items_of(const Layer& layer) {
    return (layer.rows + ROWS * CLUSTER_ROWS - 1) / (ROWS * CLUSTER_ROWS);
}

// Call visit(item, step, steps, stage) for what fills a stage, all over the block's items, when that stage is empty.
template <typename Visit>
__device__ __forceinline__ void produce(const Layer& layer, const Ring& ring, const Visit& visit) {
    Position position;
    const int items = items_of(layer);
    for (int item = blockIdx.x / BLOCKS; item < items; item += gridDim.x / BLOCKS)
        for (int run = 0; run < SPLITS; ++run) {
            const int end = split_begin(run + 1);
            for (int step = split_begin(run); step < end; step += STAGE_STEPS) {
                mbarrier_wait(ring.empty + position.stage * 8, position.parity ^ 1);
                visit(item, step, min(end - step, STAGE_STEPS), position.stage);
                position.advance();
            }
        }
}

// One warp. Of the strips that it shares with its neighbours in tokens a block asks for every CLUSTER_TOKENS-th.
__device__ __forceinline__ void produce_weights(const Layer& layer, const Ring& ring, const Place& place) {
    const int lane = threadIdx.x % 32, strips = (layer.rows + STRIP_ROWS - 1) / STRIP_ROWS;
    const bool mine = lane < WARPS && lane % CLUSTER_TOKENS == place.token;
    produce(layer, ring, [&](int item, int step, int steps, int stage) {
        const unsigned full = ring.full + stage * 8;
        const int bytes = steps * (TILE * 16);
        if (lane == 0) mbarrier_arrive_expect_tx(full, WARPS * bytes);
        if (mine) {  // past the last strip: that one again, and its sums are not stored
            const int strip = min((item * CLUSTER_ROWS + place.row) * WARPS + lane, strips - 1);
            const unsigned to = ring.stages + stage * STAGE_BYTES + TOKEN_BYTES + lane * STRIP_BYTES;
            const uint4* from = layer.weight + tile_piece(strip, step);
            if (CLUSTER_TOKENS == 1)
                cp_async_bulk(to, from, bytes, full);
            else
                cp_async_bulk_multicast(to, from, bytes, full, place.with_rows());
        }
        __syncwarp();
    });
}

// One thread.
__device__ __forceinline__ void produce_tokens(const Layer& layer, const Ring& ring, const Place& place) {
    const int first = place.token * TILE_TOKENS + place.row * OWN_TOKENS;
    produce(layer, ring, [&](int, int step, int, int stage) {
        const unsigned full = ring.full + stage * 8;
        mbarrier_arrive_expect_tx(full, TOKEN_BYTES);  // zeros, where there are no such tokens or columns
        const unsigned to = ring.stages + stage * STAGE_BYTES + place.row * (OWN_TOKENS * 128);
        cp_async_bulk_tensor_multicast(to, layer.x, step * STEP_COLUMNS, first, full, place.with_tokens());
    });
}

// The sums [64 rows, TILE_TOKENS] of a warpgroup over one run. empty: that of the sender to which this lane reports, or
// 0.
template <int RUN_STEPS>
__device__ __forceinline__ void multiply_run(const Ring& ring, unsigned empty, Position& position,
                                             float (&sums)[TILE_TOKENS / 2]) {
    constexpr int PARTS = STAGE_STEPS / PART_STEPS;  // of a stage, multiplied one by one
    constexpr int FRAGMENTS = PART_STEPS * 2, RUN_PARTS = (RUN_STEPS + PART_STEPS - 1) / PART_STEPS;
    unsigned a[2][FRAGMENTS * 4];
    unsigned last_empty = 0;
    const auto give_back = [&]() {
        if (empty != 0) mbarrier_arrive_cluster(last_empty);
    };
    const unsigned strip_at = TOKEN_BYTES + threadIdx.x / 32 * STRIP_BYTES + threadIdx.x % 32 * 16;
#pragma unroll
    for (int part = 0; part < RUN_PARTS; ++part) {
        const int fragments = min(RUN_STEPS * 2 - part * FRAGMENTS, FRAGMENTS), in_stage = part % PARTS * FRAGMENTS;
        if (in_stage == 0) mbarrier_wait(ring.full + position.stage * 8, position.parity);
        const unsigned at = ring.stages + position.stage * STAGE_BYTES;
#pragma unroll
        for (int i = 0; i < fragments; ++i) {
            const uint4 fragment = ld_shared(at + strip_at + (in_stage + i) * (TILE * 8));
            unsigned* const to = a[part % 2] + 4 * i;
            to[0] = fragment.x, to[1] = fragment.y, to[2] = fragment.z, to[3] = fragment.w;
        }
        const unsigned long long b = stage_operand(at) + in_stage * 2;
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < fragments; ++i) {
            if (part == 0 && i == 0)
                wgmma<false>(sums, a[part % 2] + 4 * i, b + 2 * i);
            else
                wgmma(sums, a[part % 2] + 4 * i, b + 2 * i);
        }
        wgmma_commit();
        if (part > 0) {  // the product before has ended
            wgmma_wait<1>();
            hold(a[(part - 1) % 2]);
            if (in_stage == 0) give_back();
        }
        if (part % PARTS == PARTS - 1 || part + 1 == RUN_PARTS) {
            last_empty = empty + position.stage * 8;
            position.advance();
        }
    }
    wgmma_wait<0>();
    hold(a[(RUN_PARTS - 1) % 2]);
    hold(sums);
    give_back();
}

// A warp's 16 rows of its sums to `out`, 16 tokens at a time by way of shared memory, so that whole sectors leave.
__device__ __forceinline__ void store(const Layer& layer, const OtherAreas& others, int strip, int first,
                                      unsigned staged, const float (&sums)[TILE_TOKENS / 2]) {
    const int lane = threadIdx.x % 32, row = strip * STRIP_ROWS + lane / 4;
    float bias[2] = {-0.0f, -0.0f};  // which changes nothing
#pragma unroll
    for (int half = 0; half < 2; ++half)
        if (layer.bias != nullptr && row + 8 * half < layer.rows) bias[half] = widen(layer.bias[row + 8 * half]);
    // A lane names to stmatrix a token's 8 rows: of tokens 0 to 7 rows 0 and 8, of tokens 8 to 15 the same.
    const unsigned to = staged + ((lane / 16 * 8 + lane % 8) * OUT_PITCH + lane / 8 % 2 * 8) * 2;
    const unsigned from = staged + (lane / 2 * OUT_PITCH + lane % 2 * 8) * 2;
    const int column = strip * STRIP_ROWS + lane % 2 * 8;
#pragma unroll
    for (int begin = 0; begin < TILE_TOKENS; begin += 16) {
        const int place = begin / 16 % 2 * (OUT_BYTES / 2);
        unsigned made[2][2];  // tokens from 8 i on, rows from 8 half on
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float* const two = sums + (begin / 8 + i) * 4 + half * 2;
                made[i][half] = round_bf16x2(two[0] + bias[half], two[1] + bias[half]);
            }
        stmatrix_trans(to + place, made[0][0], made[0][1], made[1][0], made[1][1]);
        __syncwarp();
        const int token = first + begin + lane / 2;
        if (token < layer.tokens && column < layer.rows) {
            const uint4 rows = ld_shared(from + place);
            const size_t at = size_t(token) * layer.rows + column;
            *reinterpret_cast<uint4*>(layer.out + at) = rows;
            if (RANKS > 1) others.send_all((size_t(layer.rank) * layer.tokens * layer.rows + at) * 2, rows);
        }
    }
}

// The block's items, of a warpgroup.
__device__ __forceinline__ void consume(const Layer& layer, const OtherAreas& others, const Ring& ring,
                                        const Place& place, unsigned staged) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, items = items_of(layer);
    const unsigned empty = lane < SENDERS ? mapa(ring.empty, place.sender(lane)) : 0;
    Position position;
    for (int item = blockIdx.x / BLOCKS; item < items; item += gridDim.x / BLOCKS) {
        float total[TILE_TOKENS / 2];
#pragma unroll
        for (int i = 0; i < TILE_TOKENS / 2; ++i) total[i] = -0.0f;  // plus the first run's sums: these sums
#pragma unroll 1
        for (int run = 0; run < SPLITS; ++run) {
            float sums[TILE_TOKENS / 2];
            if (FEWEST_STEPS == MOST_STEPS || split_begin(run + 1) - split_begin(run) == FEWEST_STEPS)
                multiply_run<FEWEST_STEPS>(ring, empty, position, sums);
            else
                multiply_run<MOST_STEPS>(ring, empty, position, sums);
#pragma unroll
            for (int i = 0; i < TILE_TOKENS / 2; ++i) total[i] += sums[i];
        }
        const int strip = (item * CLUSTER_ROWS + place.row) * WARPS + warp;
        store(layer, others, strip, place.token * TILE_TOKENS, staged + warp * OUT_BYTES, total);
    }
}

// Dynamic shared memory: the stages, aligned, then each warp's staged outputs.
extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, CONSUMERS == 1 ? 2 : 1)
    tiled(const uint4* weight, const __grid_constant__ TensorMap x, const bf16* bias, bf16* out, int rows, int tokens,
          const unsigned long long* memories, int offset, int rank) {
    extern __shared__ unsigned char dynamic[];
    __shared__ unsigned long long barriers[2 * STAGES];
    __shared__ OtherAreas others;
    griddep_wait_first();
    griddep_launch_dependents();
    const Layer layer = {weight, &x, bias, out, rows, tokens, memories, offset, rank};
    const unsigned stages = (shared_address(dynamic) + STAGE_ALIGNMENT - 1) / STAGE_ALIGNMENT * STAGE_ALIGNMENT;
    const Ring ring = {stages, shared_address(barriers), shared_address(barriers) + STAGES * 8};
    const Place place;
    if (RANKS > 1 && threadIdx.x < RANKS - 1) others.find(threadIdx.x, memories, offset, rank);
    ring.init();
    cluster_sync();
    const int warp = threadIdx.x / 32;
    if (warp < WARPS) {
        setmaxnreg_inc<CONSUMER_REGISTERS>();
        griddep_wait();
        consume(layer, others, ring, place, stages + STAGES * STAGE_BYTES);
    } else {
        setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (warp == WARPS) produce_weights(layer, ring, place);
        griddep_wait();
        if (threadIdx.x == CONSUMER_THREADS + 32) produce_tokens(layer, ring, place);
    }
    __syncwarp();
    cluster_sync();
}
