// Dense layers of a prefill step, where tokens are many, by wgmma: out [T, rows] = x [T, COLUMNS] * weight [rows,
// COLUMNS]^T + bias. The weights are those of the decode kernels. bf16 in and out, float32 inside.
//
// Operations: 2 T K rows, at 2,048 tokens of the 20b 0.11 TFLOP a layer: 0.1 ms at 773 TFLOP/s. The bytes that count are
// those out of the L2, not memory's: a block of 192 rows by 128 tokens reads 512 + 768 bytes for every two columns, that
// is 77 operations a byte; the L2 gives about 5 TB/s.
//
// An item is 192 rows (three warpgroups of 64) by up to 128 tokens. There are as many blocks as multiprocessors, and
// block b takes items b, b + blocks, b + 2 blocks ... A fourth warpgroup brings tokens to shared memory, 64 columns at
// a time, STAGES deep, and runs ahead into the next item. While one product of 64 columns runs, each warpgroup makes the
// A operand of the next. An item with fewer live tokens multiplies by 32, 64 or 96. Warpgroups meet only at the stages:
// while one stores its sums, the others multiply.
//
// Weights are packed in the order of mma's A operand: a warp's 16 of wgmma's 64 rows are laid out alike, so they go
// from memory to registers and multiply from there.
//
// A token's sums are one chain over its columns in their order, whatever the tile and the tokens beside it: its bytes
// depend on nothing else. They are not the bytes of the decode kernels, which split K.
//
// Macros, from kernels.hopper.linear.prefill: COLUMNS, a multiple of 32; CONSUMERS, TOKENS, DEPTH, STAGES, SHARED_BYTES.

#include "common/ptx.cuh"
#include "common/wgmma.cuh"

constexpr int ROWS = 64 * CONSUMERS;
constexpr int BEHIND = 3;  // stages under way before the oldest is declared full
constexpr int STAGE_BYTES = TOKENS * DEPTH * 2;
constexpr int CONSUMER_THREADS = CONSUMERS * 128;
constexpr int THREADS = CONSUMER_THREADS + 128;
constexpr int STEPS = COLUMNS / 32, TURNS = (COLUMNS + DEPTH - 1) / DEPTH;
constexpr int OUT_COLUMNS = 64;             // of the output that a warpgroup's 64 rows make
constexpr int OUT_PITCH = OUT_COLUMNS + 8;  // of a token's outputs in shared memory: lanes meet no bank twice
constexpr int OUT_BYTES = TOKENS * OUT_PITCH * 2;

static_assert(COLUMNS % 32 == 0, "columns come in blocks of 32");
static_assert(DEPTH == 64, "a row of a stage is the swizzle's 128 bytes");
static_assert(TOKENS == 128, "items multiply by 32, 64, 96 or 128 tokens");
static_assert(BEHIND < STAGES, "else neither the producer nor the consumers could move");
static_assert(SHARED_BYTES >= STAGE_ALIGNMENT + STAGES * STAGE_BYTES + CONSUMERS * OUT_BYTES, "what a block needs");

// The arguments of a launch.
struct Layer {
    const uint4* weight;
    const bf16* bias;  // or null
    const bf16* x;
    bf16* out;
    int rows, tokens;
};

// A warp's weights, AHEAD turns of them under way: [strip of 16 rows][step of 32 columns][2 fragments][32 lanes] of 16
// bytes.
template <int AHEAD>
struct Weights {
    const uint4* strip_at;
    uint4 next[AHEAD][4];

    // Past the last strip, the last one's: sums that are not stored.
    __device__ __forceinline__ Weights(const Layer& layer, int strip)
        : strip_at(layer.weight + (size_t)min(strip, (layer.rows + 15) / 16 - 1) * (STEPS * 64) + threadIdx.x % 32) {}

    // Ask for a turn's weights. Places are known when compiled.
    __device__ __forceinline__ void load(int turn, int place) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // past the end, the last step again: its tokens are zeros
            const int step = COLUMNS % DEPTH == 0 ? turn * 2 + i / 2 : min(turn * 2 + i / 2, STEPS - 1);
            next[place][i] = ld_weight_nc(strip_at + (step * 2 + i % 2) * 32);
        }
    }

    // The A operand of the turn in `place`; then ask for what comes AHEAD turns later.
    __device__ __forceinline__ void operand(int turn, int place, unsigned (&a)[16]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // copies that ptxas keeps: it waits for a product whose operand a load writes
            const uint4 words = next[place][i];
            a[4 * i] = mov(words.x), a[4 * i + 1] = mov(words.y);
            a[4 * i + 2] = mov(words.z), a[4 * i + 3] = mov(words.w);
        }
        if (turn + AHEAD < TURNS) load(turn + AHEAD, place);
    }
};

// The stages in shared memory and their mbarriers. Turns count on over a block's items; turn t has stage t % STAGES.
struct Pipeline {
    unsigned stages, full, empty;

    __device__ __forceinline__ void init() const {
        if (threadIdx.x < STAGES) {
            mbarrier_init(full + threadIdx.x * 8, 4);               // the producer's warps
            mbarrier_init(empty + threadIdx.x * 8, CONSUMERS * 4);  // the consumers'
        }
    }
};

// 192 rows by a tile of tokens.
struct Item {
    int block, first, live;  // block of rows; live 0: there are no more items
};

// Items in order: all blocks of rows of a tile of tokens, then the next tile's, so that what runs at a time shares
// tokens.
__device__ __forceinline__ Item item_at(const Layer& layer, int index, int tile_count) {
    const int row_blocks = (layer.rows + ROWS - 1) / ROWS, tile = index / row_blocks;
    Item item = {index - tile * row_blocks, tile * TOKENS, 0};
    if (tile < tile_count) item.live = min(layer.tokens - item.first, TOKENS);
    return item;
}

// Bring the tokens' columns to the stages, in turn. 128 threads: a thread takes a chunk of 8 columns of every 16th row.
__device__ __forceinline__ void produce(const Layer& layer, int tile_count, const Pipeline& pipeline) {
    const int thread = threadIdx.x - CONSUMER_THREADS, chunk = thread % 8, first = thread / 8;
    const unsigned to = pipeline.stages + first * 128 + (chunk ^ first % 8) * 16;
    int count = 0;  // turns so far, over all items
    const auto declare_full = [&](int turn) {
        fence_proxy_async();
        __syncwarp();
        if (thread % 32 == 0) mbarrier_arrive(pipeline.full + turn % STAGES * 8);
    };
    for (int index = blockIdx.x;; index += gridDim.x) {
        const Item item = item_at(layer, index, tile_count);
        if (item.live == 0) break;
        unsigned at[TOKENS / 16];  // elements from source
#pragma unroll
        for (int i = 0; i < TOKENS / 16; ++i) at[i] = (item.first + first + 16 * i) * COLUMNS + chunk * 8;
        for (int turn = 0; turn < TURNS; ++turn, ++count) {
            const int stage = count % STAGES, column = turn * DEPTH;
            if (count >= STAGES) mbarrier_wait(pipeline.empty + stage * 8, (count / STAGES - 1) & 1);
            const bool inside = COLUMNS % DEPTH == 0 || column + chunk * 8 < COLUMNS;  // zeros past the last
#pragma unroll
            for (int i = 0; i < TOKENS / 16; ++i)
                if (first + 16 * i < item.live)
                    cp_async(to + stage * STAGE_BYTES + i * (16 * 128), layer.x + at[i] + (inside ? column : 0),
                             inside);
            cp_async_commit();
            if (count >= BEHIND) {
                cp_async_wait<BEHIND>();
                declare_full(count - BEHIND);
            }
        }
    }
    cp_async_wait_all();
    for (int turn = max(count - BEHIND, 0); turn < count; ++turn) declare_full(turn);
}

// The sums [64 rows, N tokens] of a warpgroup's 64 rows of an item. count: turns before this item's.
template <int N>
__device__ __forceinline__ void multiply(const Layer& layer, const Item& item, int strip, int count,
                                         const Pipeline& pipeline, float (&sums)[N / 2]) {
    constexpr int AHEAD = N <= 64 ? 2 : 1;  // turns of weights under way: as registers allow
    constexpr int UNROLL = 2;               // places of weights and of `a` are then known when compiled
    const int lane = threadIdx.x % 32;
    Weights<AHEAD> weights(layer, strip);
#pragma unroll
    for (int turn = 0; turn < AHEAD; ++turn)
        if (turn < TURNS) weights.load(turn, turn);
    unsigned a[2][16];
    weights.operand(0, 0, a[0]);
    const auto multiply_turn = [&](int turn, int place) {  // place: turn % UNROLL
        const int stage = (count + turn) % STAGES;
        mbarrier_wait(pipeline.full + stage * 8, (count + turn) / STAGES & 1);
        const unsigned long long b = stage_operand(pipeline.stages + stage * STAGE_BYTES);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) wgmma(sums, a[place % 2] + 4 * step, b + 2 * step);
        wgmma_commit();
        if (turn + 1 < TURNS) weights.operand(turn + 1, (place + 1) % AHEAD, a[1 - place % 2]);  // while it runs
        wgmma_wait<0>();
        hold(a[place % 2]);
        if (lane == 0) mbarrier_arrive(pipeline.empty + stage * 8);
    };
#pragma unroll 1
    for (int turn = 0; turn + UNROLL <= TURNS; turn += UNROLL)
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) multiply_turn(turn + i, i);
#pragma unroll
    for (int i = 0; i < TURNS % UNROLL; ++i) multiply_turn(TURNS / UNROLL * UNROLL + i, i);
    hold(sums);
}

// A warpgroup's 64 rows of one item to `out`, by way of shared memory, so that whole lines leave.
template <int N>
__device__ __forceinline__ void consume(const Layer& layer, const Item& item, int& count, const Pipeline& pipeline,
                                        bf16* staged) {
    const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, g = lane / 4;
    const int strip = (item.block * CONSUMERS + group) * 4 + warp;
    float sums[N / 2] = {};
    multiply<N>(layer, item, strip, count, pipeline, sums);
    count += TURNS;

    // A lane computes the rows of tokens lane, lane + 32 ... of the item, and others ask it: with rows computed where
    // they are needed, ptxas places registers otherwise and QKV takes 7 % longer.
    int to[N / 32];
#pragma unroll
    for (int i = 0; i < N / 32; ++i) to[i] = item.first + i * 32 + lane;
    const int row = strip * 16 + g, other_row = row + 8;
    float bias_low = 0.0f, bias_high = 0.0f;
    if (layer.bias != nullptr) {
        if (row < layer.rows) bias_low = widen(layer.bias[row]);
        if (other_row < layer.rows) bias_high = widen(layer.bias[other_row]);
    }
    bar_sync<128>(1 + group);  // the last item's outputs have been read
    const int in_group = warp * (OUT_COLUMNS / 4) + g;
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int token = 8 * j + lane % 4 * 2 + c;
            bf16* const at = staged + token * OUT_PITCH + in_group;
            at[0] = round_bf16(sums[4 * j + c] + bias_low), at[8] = round_bf16(sums[4 * j + 2 + c] + bias_high);
        }
    bar_sync<128>(1 + group);
    constexpr int CHUNKS = OUT_COLUMNS / 8, ROWS_A_PASS = 32 / CHUNKS;  // a warp stores whole rows at a time
    const int width = layer.rows;
    const int column = (item.block * CONSUMERS + group) * OUT_COLUMNS + lane % CHUNKS * 8;
#pragma unroll
    for (int pass = 0; pass < N / (4 * ROWS_A_PASS); ++pass) {
        const int base = (pass * 4 + warp) * ROWS_A_PASS, token = base + lane / CHUNKS;
        const int to_row = __shfl_sync(0xFFFFFFFFu, to[pass * 4 * ROWS_A_PASS / 32], token % 32);
        if (token < item.live && column < width)
            *reinterpret_cast<uint4*>(layer.out + (size_t)to_row * width + column) =
                *reinterpret_cast<const uint4*>(staged + token * OUT_PITCH + lane % CHUNKS * 8);
    }
}

// A block's items. Dynamic shared memory: the stages, aligned, then each consumer's outputs.
__device__ __forceinline__ void multiply_tiles(const Layer& layer, int tile_count) {
    extern __shared__ unsigned char dynamic[];
    __shared__ unsigned long long barriers[2 * STAGES];
    const unsigned stages = (shared_address(dynamic) + STAGE_ALIGNMENT - 1) / STAGE_ALIGNMENT * STAGE_ALIGNMENT;
    const Pipeline pipeline = {stages, shared_address(barriers), shared_address(barriers) + STAGES * 8};
    pipeline.init();
    __syncthreads();
    if (threadIdx.x >= CONSUMER_THREADS) {
        produce(layer, tile_count, pipeline);
        return;
    }
    bf16* const staged = reinterpret_cast<bf16*>(dynamic + (stages - shared_address(dynamic)) + STAGES * STAGE_BYTES +
                                                 threadIdx.x / 128 * OUT_BYTES);
    int count = 0;
    for (int index = blockIdx.x;; index += gridDim.x) {
        const Item item = item_at(layer, index, tile_count);
        if (item.live == 0) break;
        if (item.live > 96)
            consume<128>(layer, item, count, pipeline, staged);
        else if (item.live > 64)
            consume<96>(layer, item, count, pipeline, staged);
        else if (item.live > 32)
            consume<64>(layer, item, count, pipeline, staged);
        else
            consume<32>(layer, item, count, pipeline, staged);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    prefill_linear(const uint4* weight, const bf16* x, const bf16* bias, bf16* out, int rows, int tokens) {
    griddep_wait_first();
    griddep_launch_dependents();
    griddep_wait();
    multiply_tiles({weight, bias, x, out, rows, tokens}, (tokens + TOKENS - 1) / TOKENS);
}
