// The matrix product of a prefill step's dense layers, where tokens are many, by wgmma. What a `Layer` says: which
// weights, which tokens, and what becomes of the sums. (The experts have a pipeline of their own, experts/prefill.cu.)
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
// A Layer has
//   K                           columns, a multiple of 32
//   OUT_COLUMNS                 of the output that a warpgroup's 64 rows make
//   AHEAD<N>                    turns of weights under way while N tokens are multiplied: as registers allow
//   Weights<AHEAD>              a warp's, see below; weights<AHEAD>(strip) aims them
//   rows, source, bias, out     weight rows; rows of K; null if there is none; rows of out_width()
//   find(item, tile)            set the live tokens of a tile of tokens
//   row_of(item, token)         row of `source` and `out` of an item's token
//   bias_row(strip, g, half)    weight row that a lane has at row g + 8 half of a strip
//   finish(at, low, high, ...)  from the sums of rows g and g + 8 to bf16 at[0], at[8]
// and Weights<AHEAD>, with places known when compiled,
//   load(turn, place)           ask for a turn's weights
//   operand(turn, place, a)     the A operand of the turn in `place`; then ask for what comes AHEAD turns later
//
// Macros, from kernels.hopper.product: CONSUMERS, TOKENS, DEPTH, STAGES, SHARED_BYTES.
#pragma once

#include "common/ptx.cuh"
#include "common/wgmma.cuh"

constexpr int ROWS = 64 * CONSUMERS;
constexpr int BEHIND = 3;  // stages under way before the oldest is declared full
constexpr int STAGE_BYTES = TOKENS * DEPTH * 2;
constexpr int CONSUMER_THREADS = CONSUMERS * 128;
constexpr int THREADS = CONSUMER_THREADS + 128;

static_assert(DEPTH == 64, "a row of a stage is the swizzle's 128 bytes");
static_assert(TOKENS == 128, "items multiply by 32, 64, 96 or 128 tokens");
static_assert(BEHIND < STAGES, "else neither the producer nor the consumers could move");

template <class Layer>
constexpr int TURNS = (Layer::K + DEPTH - 1) / DEPTH;
template <class Layer>
constexpr int OUT_PITCH = Layer::OUT_COLUMNS + 8;  // of a token's outputs in shared memory: lanes meet no bank twice

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
template <class Layer>
__device__ __forceinline__ Item item_at(const Layer& layer, int index, int tile_count) {
    const int row_blocks = (layer.rows + ROWS - 1) / ROWS, tile = index / row_blocks;
    Item item = {index - tile * row_blocks, tile * TOKENS, 0};
    if (tile < tile_count) layer.find(item, tile);
    return item;
}

// Bring the tokens' columns to the stages, in turn. 128 threads: a thread takes a chunk of 8 columns of every 16th row.
template <class Layer>
__device__ __forceinline__ void produce(const Layer& layer, int tile_count, const Pipeline& pipeline) {
    constexpr int K = Layer::K;
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
        for (int i = 0; i < TOKENS / 16; ++i) at[i] = layer.row_of(item, first + 16 * i) * K + chunk * 8;
        for (int turn = 0; turn < TURNS<Layer>; ++turn, ++count) {
            const int stage = count % STAGES, column = turn * DEPTH;
            if (count >= STAGES) mbarrier_wait(pipeline.empty + stage * 8, (count / STAGES - 1) & 1);
            const bool inside = K % DEPTH == 0 || column + chunk * 8 < K;  // zeros past the last
#pragma unroll
            for (int i = 0; i < TOKENS / 16; ++i)
                if (first + 16 * i < item.live)
                    cp_async(to + stage * STAGE_BYTES + i * (16 * 128), layer.source + at[i] + (inside ? column : 0),
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
template <class Layer, int N>
__device__ __forceinline__ void multiply(const Layer& layer, const Item& item, int strip, int count,
                                         const Pipeline& pipeline, float (&sums)[N / 2]) {
    constexpr int AHEAD = Layer::template AHEAD<N>, UNROLL = AHEAD > 2 ? AHEAD : 2, TURNS = ::TURNS<Layer>;
    const int lane = threadIdx.x % 32;
    auto weights = layer.template weights<AHEAD>(strip);
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
template <class Layer, int N>
__device__ __forceinline__ void consume(const Layer& layer, const Item& item, int& count, const Pipeline& pipeline,
                                        bf16* staged) {
    const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, g = lane / 4;
    const int strip = (item.block * CONSUMERS + group) * 4 + warp;
    float sums[N / 2] = {};
    multiply<Layer, N>(layer, item, strip, count, pipeline, sums);
    count += TURNS<Layer>;

    // A lane knows the rows of tokens lane, lane + 32 ... of the item.
    int to[N / 32];
#pragma unroll
    for (int i = 0; i < N / 32; ++i) to[i] = layer.row_of(item, i * 32 + lane);
    const int row = Layer::bias_row(strip, g, 0), other_row = Layer::bias_row(strip, g, 1);
    float bias_low = 0.0f, bias_high = 0.0f;
    if (layer.bias != nullptr) {
        if (row < layer.rows) bias_low = widen(layer.bias[row]);
        if (other_row < layer.rows) bias_high = widen(layer.bias[other_row]);
    }
    bar_sync<128>(1 + group);  // the last item's outputs have been read
    const int in_group = warp * (Layer::OUT_COLUMNS / 4) + g;
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int token = 8 * j + lane % 4 * 2 + c;
            layer.finish(staged + token * OUT_PITCH<Layer> + in_group, sums[4 * j + c], sums[4 * j + 2 + c], bias_low,
                         bias_high);
        }
    bar_sync<128>(1 + group);
    constexpr int CHUNKS = Layer::OUT_COLUMNS / 8, ROWS_A_PASS = 32 / CHUNKS;  // a warp stores whole rows at a time
    const int width = layer.out_width();
    const int column = (item.block * CONSUMERS + group) * Layer::OUT_COLUMNS + lane % CHUNKS * 8;
#pragma unroll
    for (int pass = 0; pass < N / (4 * ROWS_A_PASS); ++pass) {
        const int base = (pass * 4 + warp) * ROWS_A_PASS, token = base + lane / CHUNKS;
        const int to_row = __shfl_sync(0xFFFFFFFFu, to[pass * 4 * ROWS_A_PASS / 32], token % 32);
        if (token < item.live && column < width)
            *reinterpret_cast<uint4*>(layer.out + (size_t)to_row * width + column) =
                *reinterpret_cast<const uint4*>(staged + token * OUT_PITCH<Layer> + lane % CHUNKS * 8);
    }
}

// A block's items. Dynamic shared memory: the stages, aligned, then each consumer's outputs.
template <class Layer>
__device__ __forceinline__ void multiply_tiles(const Layer& layer, int tile_count) {
    constexpr int OUT_BYTES = TOKENS * OUT_PITCH<Layer> * 2;
    static_assert(Layer::K % 32 == 0, "columns come in blocks of 32");
    static_assert(SHARED_BYTES >= STAGE_ALIGNMENT + STAGES * STAGE_BYTES + CONSUMERS * OUT_BYTES, "what a block needs");
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
            consume<Layer, 128>(layer, item, count, pipeline, staged);
        else if (item.live > 64)
            consume<Layer, 96>(layer, item, count, pipeline, staged);
        else if (item.live > 32)
            consume<Layer, 64>(layer, item, count, pipeline, staged);
        else
            consume<Layer, 32>(layer, item, count, pipeline, staged);
    }
}
