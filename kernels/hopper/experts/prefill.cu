// The MXFP4 experts of a prefill step, one projection a unit:
//
//   prefill_experts_up     h [pairs, rows / 2]  = swiglu(x[token] . gate_up[expert] + bias)        x [T, COLUMNS]
//   prefill_experts_down   y [pairs, rows]      = weight[pair] * (h[pair] . down[expert] + bias)   h [pairs, COLUMNS]
//
// A pair is (token, choice), pair = token * top_k + choice; experts/group.cu sorts them by expert. The weights are
// those of the decode kernels (layout.cuh). bf16 in and out, float32 inside.
//
// Operations: at 2,048 tokens of the 20b 0.41 TFLOP a layer, 0.5 ms at 773 TFLOP/s. The limit is how fast the L2 feeds a
// multiprocessor. So a tile is as many tokens as there are registers for their sums, the two blocks of a cluster share
// it (each reads half of the tokens and sends them to the other), and weights come by bulk copies, which take no
// registers and few instructions.
//
// An item is CONSUMERS * 64 rows a block by a tile of up to TOKENS tokens. Clusters take items c, c + clusters, ... A
// block has CONSUMERS warpgroups that multiply, and one of producers:
//   - three warps gather tokens into stages of 64 columns (cp.async), and what the epilogue must know of them;
//   - one warp declares full what has landed, and sends it to the other block.
// A consumer warp multiplies a strip of 16 rows. Its lane 0 asks for the strip's weights, LOAD_TURNS turns of 64 columns
// at a time, into a ring of LOADS places of the warp's own; a place that has been read is asked for again, for this item
// or the next. An item with fewer live tokens multiplies by fewer: 32, 64, 96, 112, 128.
//
// A warpgroup makes the A operand of a turn while the turn before is multiplied, and always has one product queued
// behind that: it waits for all but the newest. Within UNROLL turns only: ptxas does not see a product under way across
// a loop's edge: it would overwrite its operand (tests/kernels/wgmma_hazards.py checks) or serialize all products (the
// build refuses that), so all are waited for there.
//
// A token's sums are one chain over its columns in their order, whatever the tile and the tokens beside it.
//
// No block can wait in vain, whatever else holds multiprocessors under programmatic dependent launch:
//   - In griddep_wait for the kernels before. They let this one start only when all of their blocks had started or
//     ended, and so on back to the first: none of them needs a multiprocessor that this kernel holds.
//   - For its start. A cluster is scheduled as a whole or not at all, so a block never waits for one that has not
//     started. The next kernel starts only when all clusters of this one have started (each lets it at its first
//     instruction), so only kernels before it, which end, keep a cluster from its multiprocessors.
//   - At mbarriers, at which only its own threads and copies and the other block of its cluster arrive. No block waits
//     for another cluster: clusters share no counter, take their items by index, and may run one after the other.
//   - Of its cluster, both blocks have the same items and turns, and each sends a part at least in every turn: `full`
//     needs the other's part, `empty` both blocks' consumers, so neither is more than STAGES turns ahead. Neither ends
//     before the other is done with its memory.
//   - In setmaxnreg for registers that the producers of its own block give back before they wait.
//
// Macros, from kernels.hopper.experts: UP, 1 for up and 0 for down; COLUMNS, K; TOKENS of a tile; CLUSTER, 2 blocks;
// CONSUMERS; DEPTH, columns of a turn; STAGES; LOAD_TURNS, LOADS; UNROLL; STAGED_TOKENS, whose outputs are
// staged at a time; CONSUMER_REGISTERS, PRODUCER_REGISTERS; SHARED_BYTES of a launch.

#include "common/mxfp4.cuh"
#include "common/ptx.cuh"
#include "common/wgmma.cuh"
#include "experts/layout.cuh"
#include "experts/swiglu.cuh"

constexpr int ROWS = 64 * CONSUMERS;
constexpr int STAGE_BYTES = TOKENS * DEPTH * 2;
constexpr int PART_TOKENS = 16, PART_BYTES = PART_TOKENS * DEPTH * 2, PARTS = TOKENS / PART_TOKENS;
constexpr int GATHER_WARPS = 3, GATHER_THREADS = 32 * GATHER_WARPS;
constexpr int CONSUMER_WARPS = 4 * CONSUMERS, CONSUMER_THREADS = 32 * CONSUMER_WARPS;
constexpr int THREADS = CONSUMER_THREADS + 128;
constexpr int TURNS = (COLUMNS + DEPTH - 1) / DEPTH;
constexpr int ITEM_LOADS = (TURNS + LOAD_TURNS - 1) / LOAD_TURNS;
constexpr int VALUE_BYTES = 512, SCALE_BYTES = 32;  // of a tile: a strip's turn
constexpr int LOAD_BYTES = LOAD_TURNS * (VALUE_BYTES + SCALE_BYTES);
constexpr int RING_BYTES = LOADS * LOAD_BYTES;
constexpr int TAIL = TURNS % UNROLL ? TURNS % UNROLL : UNROLL, LOOPS = (TURNS - TAIL) / UNROLL;
constexpr int OUT_COLUMNS = UP ? 32 : 64;   // of the output that a warpgroup's 64 rows make
constexpr int OUT_PITCH = OUT_COLUMNS + 8;  // of a token's outputs in shared memory: lanes meet no bank twice
constexpr int OUT_BYTES = STAGED_TOKENS * OUT_PITCH * 2;
constexpr int KNOWN = STAGES / TURNS + 3;  // items whose tokens are known: from the producers' next to the consumers'

static_assert(DEPTH == 64, "a row of a stage is the swizzle's 128 bytes, and a turn is a tile of weights");
static_assert(COLUMNS % 32 == 0, "columns come in blocks of 32");
static_assert(TOKENS % 16 == 0 && TOKENS >= 32 && TOKENS <= 144, "what wgmma and registers take");
static_assert(STAGED_TOKENS % 16 == 0, "matrices are stored for 16 tokens at a time");
static_assert(CLUSTER == 2, "a tile's parts are dealt out to two blocks");
static_assert(UNROLL % LOAD_TURNS == 0, "a turn's place in its load is known when compiled");
static_assert(LOADS <= ITEM_LOADS, "the ring is filled for one item");
static_assert(SHARED_BYTES >=
                  STAGE_ALIGNMENT + STAGES * STAGE_BYTES + CONSUMERS * OUT_BYTES + CONSUMER_WARPS * RING_BYTES,
              "what a block needs");

// The arguments of a launch.
struct Projection {
    const uint4* values;  // of all experts, as are scales and bias
    const unsigned* scales;
    const bf16 *bias, *source;
    bf16* out;
    const int4* tiles;             // (expert, first place in order, pairs, 0), as experts_group makes them
    const int* order;              // pairs by expert
    const float* routing_weights;  // [pairs]
    int rows, top_k, tile_count;   // rows: of an expert's weight
    float limit;
};

__device__ __forceinline__ int block_in_cluster() { return blockIdx.x % CLUSTER; }

// A block's rows by a tile of tokens. Items in order: all rows of a tile, then the next tile's, so that what runs at a
// time shares tokens, and weights of few experts.
struct Item {
    int block, expert, first, live;  // block of rows; live 0: there are no more items

    __device__ __forceinline__ Item(const Projection& projection, int index) {
        const int row_blocks = (projection.rows + ROWS * CLUSTER - 1) / (ROWS * CLUSTER), tile = index / row_blocks;
        block = (index - tile * row_blocks) * CLUSTER + block_in_cluster(), expert = 0, first = 0, live = 0;
        if (tile >= projection.tile_count) return;
        const int4 of_expert = __ldcg(projection.tiles + tile);
        expert = of_expert.x, first = of_expert.y, live = of_expert.z;
    }
};

// What the epilogue must know of an item's tokens, for KNOWN items in turn.
struct Known {
    int pair[KNOWN][TOKENS];
    float weight[KNOWN][TOKENS];
};

// Shared addresses of the mbarriers: one for each stage, each entry of Known, and each place of the warps' rings.
struct Barriers {
    static constexpr int COUNT = 3 * STAGES + KNOWN + CONSUMER_WARPS * LOADS;
    unsigned full, empty, landed, known, loaded;

    __device__ __forceinline__ explicit Barriers(unsigned at)
        : full(at), empty(full + STAGES * 8), landed(empty + STAGES * 8), known(landed + STAGES * 8),
          loaded(known + KNOWN * 8) {}

    __device__ __forceinline__ void init() const {
        if (threadIdx.x < STAGES) {
            mbarrier_init(landed + threadIdx.x * 8, GATHER_THREADS);
            mbarrier_init(full + threadIdx.x * 8, 1);
            mbarrier_init(empty + threadIdx.x * 8, CLUSTER * CONSUMER_WARPS);  // of both blocks
        }
        if (threadIdx.x < KNOWN) mbarrier_init(known + threadIdx.x * 8, GATHER_THREADS);
        if (threadIdx.x < CONSUMER_WARPS * LOADS) mbarrier_init(loaded + threadIdx.x * 8, 1);
        fence_mbarrier_init();
        fence_proxy_async();
    }
};

static_assert(SHARED_BYTES + Barriers::COUNT * 8 + sizeof(Known) <= 227 * 1024, "what a block may have");

// Weights -------------------------------------------------------------------------------------------------------------

// A warp's ring. A place holds LOAD_TURNS tiles of its strip: values [LOAD_TURNS][32 lanes] of 16 bytes, then scales
// [LOAD_TURNS][8] of 4.
struct WeightRing {
    unsigned ring, loaded;  // shared addresses of the places and of their mbarriers
    int parity, place;      // of what is read next
    int asked;              // loads asked for, of the item that was asked for last
    int tile;               // the first of its strip; negative: there is no such item
    unsigned value_at, scale_at;

    __device__ __forceinline__ void aim(const Projection& projection, const Item& item) {
        const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, strips = (projection.rows + 15) / 16;
        const int strip = (item.block * CONSUMERS + group) * 4 + warp;
        // Past the end, the last strip's: sums that are not stored.
        tile = item.live ? (item.expert * strips + min(strip, strips - 1)) * TURNS : -1;
        asked = 0;
    }

    // Into `place`, which the warp has read. By the whole warp.
    __device__ __forceinline__ void ask(const Projection& projection, const Item& next) {
        if (asked == ITEM_LOADS) aim(projection, next);
        if (threadIdx.x % 32 == 0 && tile >= 0) {
            const int first = asked * LOAD_TURNS;
            const int turns = TURNS % LOAD_TURNS ? min(LOAD_TURNS, TURNS - first) : LOAD_TURNS;
            const unsigned barrier = loaded + place * 8, to = ring + place * LOAD_BYTES;
            mbarrier_arrive_expect_tx(barrier, turns * (VALUE_BYTES + SCALE_BYTES));
            const int from = tile + first;
            cp_async_bulk(to, projection.values + value_piece(from), turns * VALUE_BYTES, barrier);
            cp_async_bulk(to + LOAD_TURNS * VALUE_BYTES, projection.scales + scale_word(from), turns * SCALE_BYTES,
                          barrier);
        }
        ++asked;
    }

    __device__ __forceinline__ void advance() {
        if (++place == LOADS) place = 0, parity ^= 1;
    }

    // The A operand of the j-th turn of a load. After its last turn the place is asked for again.
    __device__ __forceinline__ void operand(const Projection& projection, const Item& next, int j, bool last,
                                            unsigned (&a)[16]) {
        if (j == 0) {
            mbarrier_wait(loaded + place * 8, parity);
            const unsigned at = ring + place * LOAD_BYTES;
            value_at = at + threadIdx.x % 32 * 16, scale_at = at + LOAD_TURNS * VALUE_BYTES + threadIdx.x % 32 / 4 * 4;
        }
        const uint4 value = ld_shared(value_at + j * VALUE_BYTES);
        const unsigned scale = ld_shared_u32(scale_at + j * SCALE_BYTES);
        const unsigned first = multipliers_of(scale, 0), second = multipliers_of(scale, 1);
        dequantize(value.x, first, a);
        dequantize(value.y, first, a + 4);
        dequantize(value.z, second, a + 8);
        dequantize(value.w, second, a + 12);
        if (last) {
            __syncwarp();
            ask(projection, next);
            advance();
        }
    }
};

// Tokens --------------------------------------------------------------------------------------------------------------

// Bring the tokens' columns to the stages, in turn. A warp takes a part of 16 tokens at a time, a thread a chunk of 8
// columns of every fourth of them; of a cluster, a block has every other part. Nobody here waits for a copy: the copies
// themselves arrive at `landed`. A fence would wait for all of the thread's copies, so another warp executes it.
__device__ __forceinline__ void gather(const Projection& projection, Known& known, unsigned stages,
                                       const Barriers& barriers) {
    const int thread = threadIdx.x - CONSUMER_THREADS, chunk = thread % 8, in_part = thread % 32 / 8;
    constexpr int STRIDE = GATHER_WARPS * CLUSTER, MINE = (PARTS + STRIDE - 1) / STRIDE, CHUNKS = MINE * 4;
    const int part = block_in_cluster() + thread / 32 * CLUSTER;
    const unsigned to = stages + part * PART_BYTES + in_part * 128 + (chunk ^ in_part) * 16;
    int stage = 0, parity = 1, entry = 0;
    // What the epilogue must know: a thread asks for a few tokens' of the next item, in steps, each long before its use.
    constexpr int EACH = (TOKENS + GATHER_THREADS - 1) / GATHER_THREADS;
    int pair[EACH];
    float weight[EACH];
    const auto load_pairs = [&](const Item& item) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int token = thread + GATHER_THREADS * i;
            pair[i] = token < item.live ? __ldcg(projection.order + item.first + token) : 0;
        }
    };
    const auto store_pairs = [&](int at) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int token = thread + GATHER_THREADS * i;
            if (token < TOKENS) known.pair[at][token] = pair[i];
            if (!UP) weight[i] = __ldcg(projection.routing_weights + pair[i]);
        }
    };
    const auto store_weights = [&](int at) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int token = thread + GATHER_THREADS * i;
            if (!UP && token < TOKENS) known.weight[at][token] = weight[i];
        }
        mbarrier_arrive(barriers.known + at * 8);
    };
    int index = blockIdx.x / CLUSTER;
    Item item(projection, index);
    load_pairs(item), store_pairs(0), store_weights(0);
    while (item.live) {
        const int next_entry = entry + 1 == KNOWN ? 0 : entry + 1;
        bar_sync<GATHER_THREADS>(CONSUMERS + 1);  // known.pair is that of other threads
        unsigned at[CHUNKS];                      // bytes from source
        unsigned live = 0;                        // which of them are there
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
            const int token = (part + i / 4 * STRIDE) * PART_TOKENS + i % 4 * 4 + in_part;
            const int row = token < item.live ? known.pair[entry][token] : 0;
            at[i] = (unsigned)(UP ? row / projection.top_k : row) * (COLUMNS * 2) + chunk * 16;
            if (token < item.live) live |= 1u << i;
        }
        const Item next(projection, index += gridDim.x / CLUSTER);
        const char* source = reinterpret_cast<const char*>(projection.source);
        for (int turn = 0; turn < TURNS; ++turn) {
            mbarrier_wait(barriers.empty + stage * 8, parity);
            const bool inside = COLUMNS % DEPTH == 0 || turn * DEPTH + chunk * 8 < COLUMNS;  // zeros past the last
            const unsigned to_stage = to + stage * STAGE_BYTES;
#pragma unroll
            for (int i = 0; i < CHUNKS; ++i)
                if (live >> i & 1)
                    cp_async((to_stage ^ i % 2 * 64) + i / 4 * (STRIDE * PART_BYTES) + i % 4 * 512,
                             inside ? source + at[i] : source, inside);
            source += DEPTH * 2;
            cp_async_mbarrier_arrive_noinc(barriers.landed + stage * 8);
            if (++stage == STAGES) stage = 0, parity ^= 1;
            if (turn == (TURNS > 12 ? 4 : TURNS - 1)) load_pairs(next);
            if (turn == (TURNS > 12 ? 8 : TURNS - 1)) store_pairs(next_entry);
            if (turn == (TURNS > 12 ? 12 : TURNS - 1)) store_weights(next_entry);
        }
        item = next, entry = next_entry;
    }
    cp_async_wait_all();
}

// Show what has landed to wgmma, which reads through another proxy, and send it to the other block. One warp.
__device__ __forceinline__ void declare_full(const Projection& projection, unsigned stages, const Barriers& barriers) {
    const int lane = threadIdx.x % 32, block = block_in_cluster();
    const unsigned other_stages = mapa(stages, block ^ 1), other_full = mapa(barriers.full, block ^ 1);
    int stage = 0, parity = 0, index = blockIdx.x / CLUSTER;
    Item item(projection, index);
    while (item.live) {
        const Item next(projection, index += gridDim.x / CLUSTER);
        // Each block sends one part at least, of whatever is there: neither may run ahead of the other.
        const int parts = max((item.live + PART_TOKENS - 1) / PART_TOKENS, 2);
        const int expected = (parts + block) / 2 * PART_BYTES;  // from the other block
        for (int turn = 0; turn < TURNS; ++turn) {
            mbarrier_wait(barriers.landed + stage * 8, parity);
            fence_proxy_async();
            if (block + lane * 2 < parts) {
                const unsigned at = stage * STAGE_BYTES + (block + lane * 2) * PART_BYTES;
                cp_async_bulk_cluster(other_stages + at, stages + at, PART_BYTES, other_full + stage * 8);
            }
            if (lane == 0) mbarrier_arrive_expect_tx(barriers.full + stage * 8, expected);
            __syncwarp();
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        item = next;
    }
}

// Products ------------------------------------------------------------------------------------------------------------

// Where a consumer is in the stages.
struct Position {
    int stage, parity;
};

// A warpgroup's 64 rows of one item, by N tokens. empty: that of the block to whose producers this lane reports.
template <int N>
__device__ __forceinline__ void consume(const Projection& projection, const Item& item, const Item& next,
                                        const Known& known, int entry, unsigned known_at, WeightRing& weights,
                                        Position& position, unsigned stages, unsigned full, unsigned empty,
                                        bf16* staged) {
    const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, g = lane / 4;
    float sums[N / 2] = {};
    bf16 biases[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int strip = (item.block * CONSUMERS + group) * 4 + warp;
        const int row = strip * STRIP_ROWS + row_in_strip<UP>(g, half);
        const bf16* const bias = projection.bias + (size_t)item.expert * projection.rows;
        biases[half] = row < projection.rows ? bias[row] : 0;
    }
    unsigned a[2][16];
    weights.operand(projection, next, 0, LOAD_TURNS == 1 || TURNS == 1, a[0]);
    unsigned last_empty = 0;
    const auto give_back = [&]() {
        if (lane < CLUSTER) mbarrier_arrive_cluster(last_empty);
    };
    // The q-th product of a run of `turns`; `more`: runs follow; `one`: a run of a single turn.
    const auto multiply_turn = [&](int q, int turns, bool more, bool one) {
        mbarrier_wait(full + position.stage * 8, position.parity);
        const unsigned long long b = stage_operand(stages + position.stage * STAGE_BYTES);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) wgmma(sums, a[q % 2] + 4 * step, b + 2 * step);
        wgmma_commit();
        if (q > 0) {  // the product before has ended
            wgmma_wait<1>();
            hold(a[(q - 1) % 2]);
            give_back();
        }
        if (q + 1 < turns || more) {
            const int turn = q + 1;
            const bool last =
                turn % LOAD_TURNS == LOAD_TURNS - 1 || (!more && turn == turns - 1) || (one && turn == turns);
            weights.operand(projection, next, turn % LOAD_TURNS, last, a[turn % 2]);
        }
        last_empty = empty + position.stage * 8;
        if (++position.stage == STAGES) position.stage = 0, position.parity ^= 1;
        if (q == turns - 1) {
            wgmma_wait<0>();
            hold(a[q % 2]);
            give_back();
        }
    };
#pragma unroll 1
    for (int loop = 0; loop < LOOPS; ++loop) {
#pragma unroll
        for (int q = 0; q < UNROLL; ++q) multiply_turn(q, UNROLL, true, TAIL == 1 && loop == LOOPS - 1);
        if (UNROLL % 2) {
#pragma unroll
            for (int i = 0; i < 16; ++i) a[0][i] = a[1][i];
        }
    }
#pragma unroll
    for (int q = 0; q < TAIL; ++q) multiply_turn(q, TAIL, false, false);

    // To `out` by way of shared memory, so that whole lines leave.
    mbarrier_wait(known_at & ~1u, known_at & 1);
    hold(sums);
    const float low_bias = widen(biases[0]), high_bias = widen(biases[1]);
    constexpr int CHUNKS = OUT_COLUMNS / 8, ROWS_A_PASS = 32 / CHUNKS;  // a warp stores whole rows at a time
    const int width = UP ? projection.rows / 2 : projection.rows;
    const int column = (item.block * CONSUMERS + group) * OUT_COLUMNS + lane % CHUNKS * 8;
    // The row of memory that this lane names to stmatrix, for 16 tokens; of up's by lanes 0 to 15.
    const unsigned to =
        shared_address(staged) + (UP ? (lane % 16 * OUT_PITCH + warp * 8) * 2
                                     : ((lane / 16 * 8 + lane % 8) * OUT_PITCH + warp * 16 + lane / 8 % 2 * 8) * 2);
#pragma unroll
    for (int begin = 0; begin < N; begin += STAGED_TOKENS) {
        bar_sync<128>(1 + group);  // what was staged before has been read
#pragma unroll
        for (int j = begin / 8; j < N / 8; j += 2) {
            if (j >= (begin + STAGED_TOKENS) / 8) continue;
            unsigned made[2][2];  // of 8 tokens each: row g, and down's row g + 8
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float* const sum = sums + 4 * (j + i);
                float value[2][2];  // row, token
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const float low = fmaf(sum[c], DEFERRED_SCALE, low_bias);
                    const float high = fmaf(sum[2 + c], DEFERRED_SCALE, high_bias);
                    if (UP) {
                        value[0][c] = swiglu(low, high, projection.limit), value[1][c] = 0.0f;
                    } else {
                        const float weight = known.weight[entry][8 * (j + i) + lane % 4 * 2 + c];
                        value[0][c] = weight * low, value[1][c] = weight * high;
                    }
                }
                made[i][0] = round_bf16x2(value[0][0], value[0][1]);
                made[i][1] = round_bf16x2(value[1][0], value[1][1]);
            }
            const unsigned at = to + (8 * j - begin) * OUT_PITCH * 2;
            if (UP)
                stmatrix_trans(at, made[0][0], made[1][0]);
            else
                stmatrix_trans(at, made[0][0], made[0][1], made[1][0], made[1][1]);
        }
        bar_sync<128>(1 + group);
        constexpr int STORED = STAGED_TOKENS < N ? STAGED_TOKENS : N;
#pragma unroll
        for (int pass = 0; pass < (STORED + 4 * ROWS_A_PASS - 1) / (4 * ROWS_A_PASS); ++pass) {
            const int in_pass = (pass * 4 + warp) * ROWS_A_PASS + lane / CHUNKS, token = begin + in_pass;
            if (in_pass < STAGED_TOKENS && token < item.live && column < width)
                *reinterpret_cast<uint4*>(projection.out + (size_t)known.pair[entry][token] * width + column) =
                    *reinterpret_cast<const uint4*>(staged + in_pass * OUT_PITCH + lane % CHUNKS * 8);
        }
    }
}

// By as few tokens as the item has, of 32, 64, 96, 112, 128 and TOKENS.
template <int N, typename... Rest>
__device__ __forceinline__ void consume_by(const Item& item, const Projection& projection, Rest&... rest) {
    constexpr int STEP = N < 96 ? 32 : 16, MORE = N + STEP < TOKENS ? N + STEP : TOKENS;
    if (N < TOKENS && item.live > N)
        consume_by<MORE>(item, projection, rest...);
    else
        consume<N>(projection, item, rest...);
}

// A block's items. Dynamic shared memory: the stages, aligned, then each consumer's outputs, then the warps' rings.
__device__ __forceinline__ void multiply_items(const Projection& projection) {
    extern __shared__ unsigned char dynamic[];
    __shared__ unsigned long long barrier_words[Barriers::COUNT];
    __shared__ Known known;
    const Barriers barriers(shared_address(barrier_words));
    const unsigned stages = (shared_address(dynamic) + STAGE_ALIGNMENT - 1) / STAGE_ALIGNMENT * STAGE_ALIGNMENT;
    barriers.init();
    cluster_sync();
    if (threadIdx.x >= CONSUMER_THREADS) {
        setmaxnreg_dec<PRODUCER_REGISTERS>();
        if (threadIdx.x < CONSUMER_THREADS + GATHER_THREADS)
            gather(projection, known, stages, barriers);
        else
            declare_full(projection, stages, barriers);
    } else {
        setmaxnreg_inc<CONSUMER_REGISTERS>();
        bf16* const staged = reinterpret_cast<bf16*>(dynamic + (stages - shared_address(dynamic)) +
                                                     STAGES * STAGE_BYTES + threadIdx.x / 128 * OUT_BYTES);
        const int warp = threadIdx.x / 32;
        WeightRing weights;
        weights.ring = stages + STAGES * STAGE_BYTES + CONSUMERS * OUT_BYTES + warp * RING_BYTES;
        weights.loaded = barriers.loaded + warp * (LOADS * 8);
        weights.place = weights.parity = 0;
        int index = blockIdx.x / CLUSTER, entry = 0, known_parity = 0;
        Item item(projection, index);
        weights.aim(projection, item);
        for (int i = 0; i < LOADS; ++i) {
            weights.ask(projection, item);
            if (++weights.place == LOADS) weights.place = 0;
        }
        Position position = {0, 0};
        // Lanes 0 and 1 tell either block that a stage has been read.
        const unsigned empty = mapa(barriers.empty, threadIdx.x % CLUSTER);
        while (item.live) {
            const Item next(projection, index += gridDim.x / CLUSTER);
            const unsigned known_at = barriers.known + entry * 8 + known_parity;  // a barrier's address and parity
            consume_by<32>(item, projection, next, known, entry, known_at, weights, position, stages, barriers.full,
                           empty, staged);
            if (++entry == KNOWN) entry = 0, known_parity ^= 1;
            item = next;
        }
    }
    __syncwarp();
    cluster_sync();  // neither ends while the other may still write to it
}

#if UP
#define NAME prefill_experts_up
#else
#define NAME prefill_experts_down
#endif
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    NAME(const uint4* values, const unsigned* scales, const bf16* bias, const bf16* source, bf16* out,
         const int4* tiles, const int* order, const float* routing_weights, int rows, int top_k, int tile_count,
         float limit) {
    griddep_wait_first();
    griddep_launch_dependents();
    griddep_wait();
    multiply_items({values, scales, bias, source, out, tiles, order, routing_weights, rows, top_k, tile_count, limit});
}
