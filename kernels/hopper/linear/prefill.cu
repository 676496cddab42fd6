// Dense layers of a prefill step, where tokens are many, by wgmma: out [T, rows] = x [T, COLUMNS] * weight [rows,
// COLUMNS]^T + bias. The weights are those of the decode kernels. bf16 in and out, float32 inside.
//
// Operations: 2 T K rows, at 2,048 tokens of the 20b 0.11 TFLOP a layer: 0.1 ms at 773 TFLOP/s. The bytes that count are
// those out of the L2: for every 64 columns a block reads its rows' weights and half of its tokens, of which the other
// block of its cluster, which has other rows, brings the other half. So tiles are as large as divides the work evenly
// and registers allow. Of few tokens memory is the limit, and what counts is how many multiprocessors have weights under
// way, and how many each.
//
// An item is CONSUMERS * 64 rows a block by TOKENS tokens. Clusters take items c, c + clusters, ... A block has CONSUMERS
// warpgroups that multiply, and a thread that copies tokens to stages of 64 columns in the shared memory of both blocks,
// STAGES deep, and runs ahead into the next item. What lies past the last token or column is zero there. Warpgroups meet
// only at the stages: while one stores its sums, the others multiply.
//
// Weights are packed in the order of mma's A operand: a warp's 16 of wgmma's 64 rows are laid out alike, so they go
// from memory to the registers from which they multiply, BUFFERS - 1 turns of 64 columns ahead. An item's first are asked
// for when the sums of the one before are done, and a block's before the kernel waits for its predecessor.
//
// A warpgroup always has one product queued behind that under way: it waits for all but the newest, and then asks for
// weights in the registers of the one that has ended. Within UNROLL turns only: ptxas does not see a product under way
// across a loop's edge (tests/kernels/wgmma_hazards.py checks), so all are waited for there.
//
// A token's sums are one chain over its columns in their order, whatever the tile and the tokens beside it: its bytes
// depend on nothing else. They are not the bytes of the decode kernels, which split K.
//
// No block waits in vain: a cluster is scheduled as a whole, its blocks have the same items and turns, and neither ends
// before the other is done with its memory. No block waits for another cluster.
//
// Macros, from kernels.hopper.linear.prefill: COLUMNS, a multiple of 32; CONSUMERS; TOKENS of a tile; CLUSTER, blocks
// that share it; DEPTH, columns of a turn; STAGES; BUFFERS; UNROLL; STAGED_TOKENS, whose outputs are staged at a time;
// CONSUMER_REGISTERS, PRODUCER_REGISTERS; SHARED_BYTES of a launch.

#include "common/ptx.cuh"
#include "common/wgmma.cuh"

constexpr int ROWS = 64 * CONSUMERS;
constexpr int STAGE_BYTES = TOKENS * DEPTH * 2;
constexpr int PART_TOKENS = TOKENS / CLUSTER;  // of a stage, that a block brings
constexpr int CONSUMER_WARPS = 4 * CONSUMERS, CONSUMER_THREADS = 32 * CONSUMER_WARPS;
constexpr int THREADS = CONSUMER_THREADS + 128;
constexpr int STEPS = COLUMNS / 32, TURNS = (COLUMNS + DEPTH - 1) / DEPTH;
constexpr int LOOPS = (TURNS - 1) / UNROLL, TAIL = TURNS - LOOPS * UNROLL;
constexpr int OUT_COLUMNS = 64;             // of the output that a warpgroup's 64 rows make
constexpr int OUT_PITCH = OUT_COLUMNS + 8;  // of a token's outputs in shared memory: lanes meet no bank twice
constexpr int OUT_BYTES = STAGED_TOKENS * OUT_PITCH * 2;

static_assert(COLUMNS % 32 == 0, "columns come in blocks of 32");
static_assert(DEPTH == 64, "a row of a stage is the swizzle's 128 bytes");
static_assert(PART_TOKENS * CLUSTER == TOKENS && PART_TOKENS % 8 == 0, "whole groups of the swizzle");
static_assert(UNROLL % BUFFERS == 0, "places of weights are known when compiled");
static_assert(TOKENS % STAGED_TOKENS == 0 && STAGED_TOKENS % 16 == 0, "matrices are stored for 16 tokens at a time");
static_assert(SHARED_BYTES >= STAGE_ALIGNMENT + STAGES * STAGE_BYTES + CONSUMERS * OUT_BYTES, "what a block needs");

// The arguments of a launch.
struct Layer {
    const uint4* weight;
    const TensorMap* x;
    const bf16* bias;  // or null
    bf16* out;
    int rows, tokens;
};

// Items in order: all rows of a tile of tokens, then the next tile's, so that what runs at a time shares tokens.
struct Item {
    int block, first;  // block of rows; token
    bool there;        // else there are no more items

    __device__ __forceinline__ Item(const Layer& layer, int index) {
        const int row_blocks = (layer.rows + ROWS * CLUSTER - 1) / (ROWS * CLUSTER), tile = index / row_blocks;
        block = (index - tile * row_blocks) * CLUSTER + blockIdx.x % CLUSTER;
        first = tile * TOKENS;
        there = first < layer.tokens;
    }
};

// A warp's weights, as the A operands of BUFFERS turns: [strip of 16 rows][step of 32 columns][2 fragments][32 lanes] of
// 16 bytes.
struct Weights {
    const uint4* strip_at;
    unsigned a[BUFFERS][16];

    // Ask for an item's first turns. Past the last strip, the last one's: sums that are not stored.
    __device__ __forceinline__ void start(const Layer& layer, const Item& item) {
        const int strip = item.block * CONSUMER_WARPS + threadIdx.x / 32;
        strip_at = layer.weight + (size_t)min(strip, (layer.rows + 15) / 16 - 1) * (STEPS * 64) + threadIdx.x % 32;
#pragma unroll
        for (int turn = 0; turn < BUFFERS - 1; ++turn) load(turn, turn);
    }

    __device__ __forceinline__ void load(int turn, int place) {
        if (turn >= TURNS) return;
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // past the end, the last step again: its tokens are zeros
            const int step = COLUMNS % DEPTH == 0 ? turn * 2 + i / 2 : min(turn * 2 + i / 2, STEPS - 1);
            const uint4 words = ld_weight(strip_at + (step * 2 + i % 2) * 32);
            unsigned* const to = a[place] + 4 * i;
            to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
        }
    }
};

// The stages in shared memory and their mbarriers.
struct Ring {
    unsigned stages, full, empty;

    __device__ __forceinline__ void init() const {
        if (threadIdx.x < STAGES) {
            mbarrier_init(full + threadIdx.x * 8, 1);
            mbarrier_init(empty + threadIdx.x * 8, CLUSTER * CONSUMER_WARPS);  // the consumers' of both blocks
        }
        fence_mbarrier_init();
    }
};

// A place in the ring, and the parity of its round.
struct Position {
    int stage = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// Bring the tokens' columns to the stages, in turn: this block's part, to both blocks. One thread.
__device__ __forceinline__ void produce(const Layer& layer, const Ring& ring) {
    const int part = blockIdx.x % CLUSTER * PART_TOKENS;
    Position position;
    for (int index = blockIdx.x / CLUSTER;; index += gridDim.x / CLUSTER) {
        const Item item(layer, index);
        if (!item.there) break;
        for (int turn = 0; turn < TURNS; ++turn) {
            const unsigned full = ring.full + position.stage * 8;
            mbarrier_wait(ring.empty + position.stage * 8, position.parity ^ 1);
            mbarrier_arrive_expect_tx(full, STAGE_BYTES);
            cp_async_bulk_tensor_multicast(ring.stages + position.stage * STAGE_BYTES + part * (DEPTH * 2), layer.x,
                                           turn * DEPTH, item.first + part, full, (1 << CLUSTER) - 1);
            position.advance();
        }
    }
}

// The sums [64 rows, TOKENS] of a warpgroup's 64 rows of an item. empty: that of the block to which this lane reports, or
// 0.
__device__ __forceinline__ void multiply(Weights& weights, const Ring& ring, unsigned empty, Position& position,
                                         float (&sums)[TOKENS / 2]) {
    unsigned last_empty = 0;
    const auto give_back = [&]() {
        if (empty != 0) mbarrier_arrive_cluster(last_empty);
    };
    // The q-th of a run of `turns`.
    const auto multiply_turn = [&](int turn, int q, int turns) {
        mbarrier_wait(ring.full + position.stage * 8, position.parity);
        const unsigned long long b = stage_operand(ring.stages + position.stage * STAGE_BYTES);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) wgmma(sums, weights.a[q % BUFFERS] + 4 * step, b + 2 * step);
        wgmma_commit();
        if (q > 0) {  // the product before has ended
            wgmma_wait<1>();
            hold(weights.a[(q - 1) % BUFFERS]);
            give_back();
        }
        weights.load(turn + BUFFERS - 1, (q + BUFFERS - 1) % BUFFERS);
        last_empty = empty + position.stage * 8;
        position.advance();
        if (q == turns - 1) {
            wgmma_wait<0>();
            hold(weights.a[q % BUFFERS]);
            give_back();
        }
    };
#pragma unroll 1
    for (int loop = 0; loop < LOOPS; ++loop)
#pragma unroll
        for (int q = 0; q < UNROLL; ++q) multiply_turn(loop * UNROLL + q, q, UNROLL);
#pragma unroll
    for (int q = 0; q < TAIL; ++q) multiply_turn(LOOPS * UNROLL + q, q, TAIL);
    hold(sums);
}

// A warpgroup's 64 rows of an item to `out`, by way of shared memory, so that whole lines leave.
__device__ __forceinline__ void store(const Layer& layer, const Item& item, const float (&biases)[2], unsigned staged,
                                      const float (&sums)[TOKENS / 2]) {
    const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    constexpr int CHUNKS = OUT_COLUMNS / 8, ROWS_A_PASS = 32 / CHUNKS;  // a warp stores whole rows at a time
    const int column = (item.block * CONSUMERS + group) * OUT_COLUMNS + lane % CHUNKS * 8;
    // The row of memory that this lane names to stmatrix, for 16 tokens.
    const unsigned to = staged + ((lane / 16 * 8 + lane % 8) * OUT_PITCH + warp * 16 + lane / 8 % 2 * 8) * 2;
    const unsigned from = staged + ((warp * ROWS_A_PASS + lane / CHUNKS) * OUT_PITCH + lane % CHUNKS * 8) * 2;
#pragma unroll
    for (int begin = 0; begin < TOKENS; begin += STAGED_TOKENS) {
        bar_sync<128>(1 + group);  // what was staged before has been read
#pragma unroll
        for (int j = 0; j < STAGED_TOKENS; j += 16) {
            unsigned made[2][2];  // of 8 tokens each: row g, and row g + 8
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float* const two = sums + ((begin + j) / 8 + i) * 4 + half * 2;
                    made[i][half] = round_bf16x2(two[0] + biases[half], two[1] + biases[half]);
                }
            stmatrix_trans(to + j * OUT_PITCH * 2, made[0][0], made[0][1], made[1][0], made[1][1]);
        }
        bar_sync<128>(1 + group);
        constexpr int PASSES = STAGED_TOKENS / (4 * ROWS_A_PASS);
#pragma unroll
        for (int pass = 0; pass < PASSES; ++pass) {
            const int token = item.first + begin + (pass * 4 + warp) * ROWS_A_PASS + lane / CHUNKS;
            if (token < layer.tokens && column < layer.rows)
                *reinterpret_cast<uint4*>(layer.out + (size_t)token * layer.rows + column) =
                    ld_shared(from + pass * (4 * ROWS_A_PASS * OUT_PITCH * 2));
        }
    }
}

// A block's items, of a warpgroup.
__device__ __forceinline__ void consume(const Layer& layer, const Ring& ring, unsigned staged) {
    const int lane = threadIdx.x % 32;
    int index = blockIdx.x / CLUSTER;
    Item item(layer, index);
    Weights weights;
    weights.start(layer, item);
    griddep_wait();
    const unsigned empty = lane < CLUSTER ? mapa(ring.empty, lane) : 0;
    Position position;
    while (item.there) {
        const Item next(layer, index += gridDim.x / CLUSTER);
        float biases[2] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = (item.block * CONSUMER_WARPS + threadIdx.x / 32) * 16 + lane / 4 + half * 8;
            if (layer.bias != nullptr && row < layer.rows) biases[half] = widen(layer.bias[row]);
        }
        float sums[TOKENS / 2] = {};
        multiply(weights, ring, empty, position, sums);
        if (next.there) weights.start(layer, next);
        store(layer, item, biases, staged, sums);
        item = next;
    }
}

// Dynamic shared memory: the stages, aligned, then each consumer's outputs.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    prefill_linear(const uint4* weight, const __grid_constant__ TensorMap x, const bf16* bias, bf16* out, int rows,
                   int tokens) {
    extern __shared__ unsigned char dynamic[];
    __shared__ unsigned long long barriers[2 * STAGES];
    griddep_wait_first();
    griddep_launch_dependents();
    const Layer layer = {weight, &x, bias, out, rows, tokens};
    const unsigned stages = (shared_address(dynamic) + STAGE_ALIGNMENT - 1) / STAGE_ALIGNMENT * STAGE_ALIGNMENT;
    const Ring ring = {stages, shared_address(barriers), shared_address(barriers) + STAGES * 8};
    ring.init();
    cluster_sync();
    if (threadIdx.x >= CONSUMER_THREADS) {
        setmaxnreg_dec<PRODUCER_REGISTERS>();
        griddep_wait();
        if (threadIdx.x == CONSUMER_THREADS) produce(layer, ring);
    } else {
        setmaxnreg_inc<CONSUMER_REGISTERS>();
        consume(layer, ring, stages + STAGES * STAGE_BYTES + threadIdx.x / 128 * OUT_BYTES);
    }
    __syncwarp();
    cluster_sync();  // neither ends while the other may still write to it
}
