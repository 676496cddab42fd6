// The MXFP4 experts for 49 to 256 rows of decode and for short prompts, where an expert has few tokens and the weights
// are to flow without a pause. One projection a unit:
//
//   stream_experts_up     h [pairs, rows / 2]  = swiglu(x[token] . gate_up[expert] + bias)        x [T, K_COLUMNS]
//   stream_experts_down   y [pairs, rows]      = weight[pair] * (h[pair] . down[expert] + bias)   h [pairs, K_COLUMNS]
//
// A pair is (token, choice), pair = token * top_k + choice; experts/group.cu sorts them by expert. bf16 in and out,
// float32 inside. The weights are those of the other kernels (layout.cuh).
//
// Bytes: as in decode.cu; all 32 experts of the 20b are 423 MB, 137 us at 3.08 TB/s. Beside them a block reads an
// expert's tokens from the L2 for every CONSUMERS * 64 rows.
//
// The work is a list: for every tile of up to TOKENS pairs of an expert, its rows in units of 64, CONSUMERS of them an
// item. An item takes nearly as long as another, whatever its units: what is under way limits a block, not bytes. So all
// blocks take equally many whole items, and then what is left, in halves where that gives no block two (Items). A block
// has CONSUMERS warpgroups that multiply a unit each, and four warps that bring what they need, in chunks of up to CHUNK
// turns of 64 columns:
//   - two gather the item's tokens (cp.async);
//   - one declares them full when they have landed, and notes what all must know of the next item;
//   - one asks for the weights: of 4 strips a box of values and one of scales, of whole chunks.
// A stage holds a chunk of both. Producers run ahead over the ends of items, so that memory stays busy.
// A consumer warp multiplies a strip of 16 rows: it makes the A operand of a turn while the turn before is multiplied.
//
// K is cut into K_SPLITS runs (runs.cuh), as in the kernels for fewer tokens: their sums are added in order, so that a
// token has the same bytes in all of them. K_SPLITS = 1 gives the one chain of prefill.cu. Either way a token's sums do
// not depend on its tile and the tokens beside it.
//
// `down` may read tiles, order and routing weights before it waits for `up`, which lets it start after its own wait.
//
// A block waits for its own threads and copies only, and for the kernels before, which need no multiprocessor that it
// holds.
//
// Macros, from kernels.hopper.experts: UP, 1 for up and 0 for down; K_COLUMNS, K; K_SPLITS; TOKENS of a tile; CONSUMERS;
// CHUNK; STAGES; CONSUMER_REGISTERS, PRODUCER_REGISTERS; SHARED_BYTES of a launch.

#include "common/mxfp4.cuh"
#include "common/ptx.cuh"
#include "common/wgmma.cuh"
#include "experts/layout.cuh"
#include "experts/runs.cuh"
#include "experts/swiglu.cuh"

using Columns = Runs<K_COLUMNS, K_SPLITS>;
using ItemChunks = Chunks<Columns, CHUNK>;

constexpr unsigned ALL_LANES = 0xFFFFFFFFu;
constexpr int TURN_BYTES = TOKENS * 128, STAGE_BYTES = CHUNK * TURN_BYTES;  // of tokens
constexpr int CONSUMER_WARPS = 4 * CONSUMERS, CONSUMER_THREADS = 32 * CONSUMER_WARPS;
constexpr int GATHER_WARPS = 2, GATHER_THREADS = 32 * GATHER_WARPS;
constexpr int THREADS = CONSUMER_THREADS + 128;
constexpr int VALUE_BYTES = 512, SCALE_BYTES = 32;  // of a tile: a strip's turn
constexpr int UNIT_BYTES = 4 * CHUNK * (VALUE_BYTES + SCALE_BYTES), WEIGHT_BYTES = CONSUMERS * UNIT_BYTES;
constexpr int OUT_COLUMNS = UP ? 32 : 64;   // of the output that a unit's 64 rows make
constexpr int OUT_PITCH = OUT_COLUMNS + 8;  // of a token's outputs in shared memory: lanes meet no bank twice
constexpr int OUT_BYTES = TOKENS * OUT_PITCH * 2;
constexpr int KNOWN = STAGES / ItemChunks::COUNT + 3;  // items whose tokens are known: from the producers' next to the
                                                       // consumers'

static_assert(K_COLUMNS % 32 == 0, "columns come in blocks of 32");
static_assert(TOKENS % 16 == 0 && TOKENS >= 32 && TOKENS <= 64, "what wgmma and registers take");
static_assert(CHUNK * SCALE_BYTES % 16 == 0 && 4 * CHUNK * SCALE_BYTES % 128 == 0, "what boxes of a tensor map need");
static_assert(CONSUMERS % 2 == 0 && CONSUMERS <= 4,
              "halves of an item, a lane for each consumer warp, and its warpgroup's barrier");
static_assert(SHARED_BYTES >= STAGE_ALIGNMENT + STAGES * (STAGE_BYTES + WEIGHT_BYTES) + CONSUMERS * OUT_BYTES,
              "what a block needs");

// The arguments of a launch.
struct Projection {
    const TensorMap *values, *scales;  // of all experts' strips, in words of 8 bytes
    const bf16 *bias, *source;
    bf16* out;
    const int4* tiles;             // (expert, first place in order, pairs, tiles that have pairs), by experts_group
    const int* order;              // pairs by expert
    const float* routing_weights;  // [pairs]
    int rows, top_k;               // rows: of an expert's weight
    float limit;
};

// Up to CONSUMERS units of one tile's rows.
struct Item {
    int expert, first, live;  // the tile
    int unit, units;          // units 0: there are no more items
};

// A block's items in order: first as many whole ones as every block has, then some of the rest, which are the parts of
// the whole ones that do not go round and the units at the tiles' ends that make no whole one.
struct Items {
    int whole, whole_end, rest, rest_end;  // this block's, in the two lists
    int of_tile, ends;                     // whole items of a tile, and units left at its end
    int shared, parts, first_end;          // whole items that all blocks have; parts of one of the others; of them all

    __device__ __forceinline__ explicit Items(const Projection& projection) {
        const int units = (projection.rows + 63) / 64, tiles = __ldcg(&projection.tiles->w);
        const int block = blockIdx.x, blocks = gridDim.x;
        of_tile = units / CONSUMERS, ends = units % CONSUMERS;
        const int round = tiles * of_tile / blocks, left = tiles * of_tile - round * blocks, of_ends = ends ? tiles : 0;
        parts = 2 * left + of_ends <= blocks ? 2 : 1;
        shared = round * blocks, first_end = parts * left;
        whole = block * round, whole_end = whole + round;
        rest = block * (first_end + of_ends) / blocks, rest_end = (block + 1) * (first_end + of_ends) / blocks;
    }

    __device__ __forceinline__ Item next(const Projection& projection) {
        int tile, unit, units = CONSUMERS;
        if (whole < whole_end) {
            tile = whole / of_tile, unit = whole++ % of_tile * CONSUMERS;
        } else if (rest == rest_end) {
            return {};
        } else if (rest < first_end) {
            const int item = shared + rest / parts, part = rest++ % parts;
            units = CONSUMERS / parts, tile = item / of_tile, unit = item % of_tile * CONSUMERS + part * units;
        } else {
            tile = rest++ - first_end, unit = of_tile * CONSUMERS, units = ends;
        }
        const int4 of_expert = __ldcg(projection.tiles + tile);
        return {of_expert.x, of_expert.y, of_expert.z, unit, units};
    }
};

// What consumers must know of an item, for KNOWN items in turn.
struct Known {
    Item item[KNOWN];
    int pair[KNOWN][TOKENS];      // of its tokens
    unsigned row[KNOWN][TOKENS];  // bytes from source to theirs
    float weight[KNOWN][TOKENS];
};

// Shared addresses of the mbarriers: tokens have landed in a stage; it is full for each consumer; all have read it; and
// each entry of Known is there.
struct Barriers {
    static constexpr int COUNT = (2 + CONSUMERS) * STAGES + KNOWN;
    unsigned landed, full, empty, known;

    __device__ __forceinline__ explicit Barriers(unsigned at)
        : landed(at), full(landed + STAGES * 8), empty(full + STAGES * CONSUMERS * 8), known(empty + STAGES * 8) {}

    __device__ __forceinline__ unsigned full_for(int group, int stage) const {
        return full + (stage * CONSUMERS + group) * 8;
    }

    __device__ __forceinline__ void init() const {
        if (threadIdx.x < STAGES) {
            mbarrier_init(landed + threadIdx.x * 8, GATHER_THREADS);
            mbarrier_init(empty + threadIdx.x * 8, CONSUMER_WARPS);
        }
        if (threadIdx.x < STAGES * CONSUMERS) mbarrier_init(full + threadIdx.x * 8, 2);  // tokens, and weights
        if (threadIdx.x < KNOWN) mbarrier_init(known + threadIdx.x * 8, 32);
        fence_mbarrier_init();
        fence_proxy_async();
    }
};

static_assert(SHARED_BYTES + Barriers::COUNT * 8 + sizeof(Known) <= 227 * 1024, "what a block may have");

// Where a thread is in a circle of places, each with an mbarrier whose phases have alternating parity.
template <int PLACES>
struct Place {
    int index = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        if (++index == PLACES) index = 0, parity ^= 1;
    }
};

// The same in all lanes, and now the compiler knows it: addresses are computed once a warp.
__device__ __forceinline__ int same_in_warp(int value) { return __shfl_sync(ALL_LANES, value, 0); }

// Producers -----------------------------------------------------------------------------------------------------------

// Note what consumers and gatherers must know of the block's items, and show what has landed to wgmma, which reads
// through another proxy. One warp. It asks for what it notes of the next item in steps, each long before its use.
__device__ __forceinline__ void declare_full(const Projection& projection, Known& known, const Barriers& barriers) {
    constexpr int EACH = (TOKENS + 31) / 32, LAST = ItemChunks::COUNT - 1;
    const int lane = threadIdx.x % 32;
    int pair[EACH];
    float weight[EACH];
    const auto load_pairs = [&](const Item& item) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int token = lane + 32 * i;
            pair[i] = token < item.live ? __ldcg(projection.order + item.first + token) : 0;
        }
    };
    const auto load_weights = [&]() {
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (!UP) weight[i] = __ldcg(projection.routing_weights + pair[i]);
    };
    const auto note = [&](const Item& item, int entry) {
        if (lane == 0) known.item[entry] = item;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int token = lane + 32 * i;
            if (token >= TOKENS) continue;
            known.pair[entry][token] = pair[i];
            known.row[entry][token] = (unsigned)(UP ? pair[i] / projection.top_k : pair[i]) * (K_COLUMNS * 2);
            if (!UP) known.weight[entry][token] = weight[i];
        }
        mbarrier_arrive(barriers.known + entry * 8);
    };
    Items items(projection);
    Item item = items.next(projection);
    load_pairs(item), load_weights(), note(item, 0);
    Place<STAGES> stage;
    int entry = 0;
    while (item.units) {
        item = items.next(projection), entry = entry + 1 == KNOWN ? 0 : entry + 1;
#pragma unroll 1
        for (int chunk = 0; chunk <= LAST; ++chunk, stage.advance()) {
            mbarrier_wait(barriers.landed + stage.index * 8, stage.parity);
            fence_proxy_async();
            if (lane < CONSUMERS) mbarrier_arrive(barriers.full_for(lane, stage.index));
            __syncwarp();
            if (chunk == min(1, LAST)) load_pairs(item);
            if (chunk == min(3, LAST)) load_weights();
            if (chunk == min(5, LAST)) note(item, entry);
        }
    }
}

// Bring the tokens' columns to the stages: a thread takes 8 columns of every eighth token. Nobody here waits for a copy:
// the copies themselves arrive at `landed`. A fence would wait for all of the thread's, so another warp executes it.
__device__ __forceinline__ void gather(const Projection& projection, const Known& known, unsigned stages,
                                       const Barriers& barriers) {
    const int thread = threadIdx.x - CONSUMER_THREADS, piece = thread % 8, row = thread / 8;
    const unsigned to = stages + row * 128 + (piece ^ row) * 16;
    const char* const source = reinterpret_cast<const char*>(projection.source) + piece * 16;
    if (!UP) griddep_wait();
    Place<STAGES> stage;
    for (Place<KNOWN> entry;; entry.advance()) {
        mbarrier_wait(barriers.known + entry.index * 8, entry.parity);
        if (known.item[entry.index].units == 0) break;
        const int live = known.item[entry.index].live;
#pragma unroll 1
        for (ItemChunks chunk; chunk.tiles; chunk.advance(), stage.advance()) {
            mbarrier_wait(barriers.empty + stage.index * 8, stage.parity ^ 1);
#pragma unroll
            for (int i = 0; i < TOKENS / 8; ++i) {
                if (i * 8 + row >= live) continue;
                const char* const from = source + known.row[entry.index][i * 8 + row];
#pragma unroll
                for (int turn = 0; turn < CHUNK; ++turn) {
                    const int column = (chunk.first + turn) * 64;
                    const bool inside = K_COLUMNS % 64 == 0 || column + piece * 8 < K_COLUMNS;  // zeros past the last
                    if (turn < chunk.tiles)
                        cp_async(to + stage.index * STAGE_BYTES + turn * TURN_BYTES + i * 1024,
                                 inside ? from + column * 2 : from, inside);
                }
            }
            cp_async_mbarrier_arrive_noinc(barriers.landed + stage.index * 8);
        }
    }
    cp_async_wait_all();
}

// Ask for weights: lane g for consumer g's unit. Of a unit a stage holds values [4 strips][CHUNK][32 lanes] of 16 bytes,
// then scales [4 strips][CHUNK][8] of 4. What lies past a run's end or an expert's is not used. One warp.
__device__ __forceinline__ void ask_weights(const Projection& projection, unsigned weights, const Barriers& barriers) {
    const int group = threadIdx.x % 32, strips = (projection.rows + 15) / 16;
    Items items(projection);
    Place<STAGES> stage;
    for (Item item = items.next(projection); item.units; item = items.next(projection)) {
        const int strip = item.expert * strips + (item.unit + group) * 4;
        for (ItemChunks chunk; chunk.tiles; chunk.advance(), stage.advance()) {
            mbarrier_wait(barriers.empty + stage.index * 8, stage.parity ^ 1);
            const unsigned full = barriers.full_for(group, stage.index);
            if (group < item.units) {
                const unsigned to = weights + stage.index * WEIGHT_BYTES + group * UNIT_BYTES;
                mbarrier_arrive_expect_tx(full, UNIT_BYTES);
                cp_async_bulk_tensor(to, projection.values, chunk.first * (VALUE_BYTES / 8), strip, full);
                cp_async_bulk_tensor(to + 4 * CHUNK * VALUE_BYTES, projection.scales, chunk.first * (SCALE_BYTES / 8),
                                     strip, full);
            } else if (group < CONSUMERS) {
                mbarrier_arrive(full);
            }
            __syncwarp();
        }
    }
}

// Products ------------------------------------------------------------------------------------------------------------

// A turn of a strip's weights, as a lane has it.
struct Packed {
    uint4 value;
    unsigned scale;

    // The j-th of its chunk; unit: the shared address of the chunk's weights for all 4 strips.
    __device__ __forceinline__ void load(unsigned unit, int strip, int j) {
        value = ld_shared(unit + (strip * CHUNK + j) * VALUE_BYTES + threadIdx.x % 32 * 16);
        scale = ld_shared_u32(unit + 4 * CHUNK * VALUE_BYTES + (strip * CHUNK + j) * SCALE_BYTES +
                              threadIdx.x % 32 / 4 * 4);
    }

    __device__ __forceinline__ void operand(unsigned (&a)[16]) const {
        const unsigned first = multipliers_of(scale, 0), second = multipliers_of(scale, 1);
        dequantize(value.x, first, a);
        dequantize(value.y, first, a + 4);
        dequantize(value.z, second, a + 8);
        dequantize(value.w, second, a + 12);
    }
};

// Those of this lane's rows g and g + 8, in the low and the high half.
__device__ __forceinline__ unsigned biases_of(const Projection& projection, const Item& item) {
    const int strip = (item.unit + threadIdx.x / 128) * 4 + threadIdx.x % 128 / 32, g = threadIdx.x % 32 / 4;
    if (strip * STRIP_ROWS >= projection.rows) return 0;
    const bf16* const bias = projection.bias + (size_t)item.expert * projection.rows + strip * STRIP_ROWS;
    return bias[row_in_strip<UP>(g, 0)] | (unsigned)bias[row_in_strip<UP>(g, 1)] << 16;
}

template <int N>
struct Number {
    static constexpr int value = N;
};

// A warpgroup's 64 rows of one item, by N tokens.
template <int N>
__device__ __forceinline__ void consume(const Projection& projection, const Known& known, int entry,
                                        Place<STAGES>& stage, unsigned stages, unsigned weights,
                                        const Barriers& barriers, bf16* staged) {
    float total[N / 2] = {}, run[N / 2];
    float (&sums)[N / 2] = K_SPLITS == 1 ? total : run;
    const unsigned biases = biases_of(projection, known.item[entry]);
    unsigned a[2][16];
    Packed packed;
    const int strip = same_in_warp(threadIdx.x / 32);
    const unsigned long long first_b = stage_operand(stages);  // of the first stage: no carry leaves its address
    const auto load = [&](int j) {
        if (j == 0) mbarrier_wait(barriers.full_for(strip / 4, stage.index), stage.parity);
        packed.load(weights + stage.index * WEIGHT_BYTES + strip / 4 * UNIT_BYTES, strip % 4, j);
    };
    const auto give_back = [&](int index) {
        if (threadIdx.x % 32 == 0) mbarrier_arrive(barriers.empty + index * 8);
    };
    // `turns` products in order, each made ready while the one before is under way. The first operand is in a[0], and
    // the first one of what follows is left there, if `more` follows.
    const auto multiply = [&](auto number, bool more) {
        constexpr int turns = decltype(number)::value;
#pragma unroll
        for (int q = 0; q < turns; ++q) {
            const int next = q + 1 < turns ? q + 1 : 0;
            const bool any = q + 1 < turns || more;
            const int now = stage.index, before = (now ? now : STAGES) - 1;
            const unsigned long long b = first_b + (now * STAGE_BYTES + q % CHUNK * TURN_BYTES) / 16u;
            wgmma_fence();
            if (K_SPLITS > 1 && q == 0)
                wgmma<false>(sums, a[0], b);
            else
                wgmma(sums, a[q % 2], b);
#pragma unroll
            for (int step = 1; step < 4; ++step) wgmma(sums, a[q % 2] + 4 * step, b + 2 * step);
            wgmma_commit();
            if (next % CHUNK == 0) stage.advance();
            if (any) load(next % CHUNK);
            if (q > 0) {  // the product before has ended
                wgmma_wait<1>();
                hold(a[(q - 1) % 2]);
                if (q % CHUNK == 0) give_back(before);
            }
            if (any) packed.operand(a[(q + 1) % 2]);
            if (q == turns - 1) {
                wgmma_wait<0>();
                hold(a[q % 2]);
                give_back(now);
            }
        }
        if (turns % 2) {
#pragma unroll
            for (int i = 0; i < 16; ++i) a[0][i] = a[1][i];
        }
    };
    load(0);
    packed.operand(a[0]);
    if constexpr (K_SPLITS == 1) {
        constexpr int TAIL = (Columns::TILES - 1) % CHUNK + 1, LOOPS = Columns::TILES / CHUNK - (TAIL == CHUNK);
#pragma unroll 1
        for (int loop = 0; loop < LOOPS; ++loop) multiply(Number<CHUNK>(), true);
        multiply(Number<TAIL>(), false);
    } else {
        const auto multiply_run = [&](auto number, bool more) {
            multiply(number, more);
            hold(sums);
#pragma unroll
            for (int i = 0; i < N / 2; ++i) total[i] += sums[i];
        };
#pragma unroll 1
        for (int split = 0; split < Columns::LONGER; ++split) multiply_run(Number<Columns::DEPTH>(), true);
#pragma unroll 1
        for (int split = Columns::LONGER; split < K_SPLITS; ++split)
            multiply_run(Number<Columns::LEAST>(), split + 1 < K_SPLITS);
    }

    // To `out` by way of shared memory, so that whole lines leave.
    hold(total);
    const int thread = thread_again(), group = thread / 128, warp = thread % 128 / 32, lane = thread % 32;
    const Item item = known.item[entry];
    const float low_bias = widen_low(biases), high_bias = widen_high(biases);
    constexpr int PIECES = OUT_COLUMNS / 8, ROWS_A_PASS = 128 / PIECES;  // the warpgroup stores whole rows
    const int width = UP ? projection.rows / 2 : projection.rows;
    const int column = (item.unit + group) * OUT_COLUMNS + lane % PIECES * 8;
    // The row of memory that this lane names to stmatrix, for 16 tokens; of up's by lanes 0 to 15.
    const unsigned to =
        shared_address(staged) + (UP ? (lane % 16 * OUT_PITCH + warp * 8) * 2
                                     : ((lane / 16 * 8 + lane % 8) * OUT_PITCH + warp * 16 + lane / 8 % 2 * 8) * 2);
    bar_sync<128>(1 + group);  // what was staged before has been read
#pragma unroll
    for (int j = 0; j < N / 8; j += 2) {
        unsigned made[2][2];  // of 8 tokens each: row g, and down's row g + 8
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float* const sum = total + 4 * (j + i);
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
        const unsigned at = to + 8 * j * OUT_PITCH * 2;
        if (UP)
            stmatrix_trans(at, made[0][0], made[1][0]);
        else
            stmatrix_trans(at, made[0][0], made[0][1], made[1][0], made[1][1]);
    }
    bar_sync<128>(1 + group);
#pragma unroll
    for (int begin = 0; begin < N; begin += ROWS_A_PASS) {
        const int token = begin + thread % 128 / PIECES;
        if (token < item.live && column < width)
            *reinterpret_cast<uint4*>(projection.out + (size_t)known.pair[entry][token] * width + column) =
                *reinterpret_cast<const uint4*>(staged + token * OUT_PITCH + lane % PIECES * 8);
    }
}

// By as few tokens as the item has, of 16, 32, 48, 64.
template <int N, typename... Rest>
__device__ __forceinline__ void consume_by(int live, const Projection& projection, Rest&... rest) {
    if constexpr (N < TOKENS) {
        if (live > N) return consume_by<N + 16>(live, projection, rest...);
    }
    consume<N>(projection, rest...);
}

// A block's items. Dynamic shared memory: the stages of tokens, aligned, then those of weights, then each consumer's
// outputs.
__device__ __forceinline__ void multiply_items(const Projection& projection) {
    extern __shared__ unsigned char dynamic[];
    __shared__ unsigned long long barrier_words[Barriers::COUNT];
    __shared__ Known known;
    const Barriers barriers(shared_address(barrier_words));
    const unsigned stages = (shared_address(dynamic) + STAGE_ALIGNMENT - 1) / STAGE_ALIGNMENT * STAGE_ALIGNMENT;
    const unsigned weights = stages + STAGES * STAGE_BYTES, outputs = weights + STAGES * WEIGHT_BYTES;
    barriers.init();
    __syncthreads();
    if (UP) {
        griddep_wait();
        griddep_launch_dependents();
    }
    if (threadIdx.x >= CONSUMER_THREADS) {
        setmaxnreg_dec<PRODUCER_REGISTERS>();
        const int warp = threadIdx.x / 32 - CONSUMER_WARPS;
        if (warp < GATHER_WARPS)
            gather(projection, known, stages, barriers);
        else if (warp == GATHER_WARPS)
            declare_full(projection, known, barriers);
        else
            ask_weights(projection, weights, barriers);
    } else {
        setmaxnreg_inc<CONSUMER_REGISTERS>();
        if (!UP) griddep_wait();
        const int group = same_in_warp(threadIdx.x / 128);
        bf16* const staged = reinterpret_cast<bf16*>(dynamic + (outputs - shared_address(dynamic)) + group * OUT_BYTES);
        Place<STAGES> stage;
        for (Place<KNOWN> entry;; entry.advance()) {
            mbarrier_wait(barriers.known + entry.index * 8, entry.parity);
            const int units = same_in_warp(known.item[entry.index].units);
            if (units == 0) break;
            if (group < units) {
                consume_by<16>(same_in_warp(known.item[entry.index].live), projection, known, entry.index, stage,
                               stages, weights, barriers, staged);
            } else {
#pragma unroll 1
                for (int chunk = 0; chunk < ItemChunks::COUNT; ++chunk, stage.advance()) {
                    mbarrier_wait(barriers.full_for(group, stage.index), stage.parity);
                    if (threadIdx.x % 32 == 0) mbarrier_arrive(barriers.empty + stage.index * 8);
                }
            }
        }
    }
}

#if UP
#define NAME stream_experts_up
#else
#define NAME stream_experts_down
#endif
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    NAME(const __grid_constant__ TensorMap values, const __grid_constant__ TensorMap scales, const bf16* bias,
         const bf16* source, bf16* out, const int4* tiles, const int* order, const float* routing_weights, int rows,
         int top_k, float limit) {
    griddep_wait_first();
    if (!UP) griddep_launch_dependents();
    multiply_items({&values, &scales, bias, source, out, tiles, order, routing_weights, rows, top_k, limit});
}
