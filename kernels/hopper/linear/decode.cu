// out [T, N] = x [T, K] * weight [N, K]^T + bias [N], bf16 in and out, float32 inside: dense layers of a decode step.
//
// Bytes: 2 N K of weights, once, and 2 T (K + N). Floors at 3.08 TB/s: QKV (5120 x 2880) 9.6 us, O (2880 x 4096) 7.7,
// lm_head (201088 x 2880) 376. Up to 64 tokens the weights are all that counts.
//
// Weights are the A operand of mma.m16n8k16 (16 rows), tokens its N (8 a tile): one token wastes the least. They are
// packed as [strip of 16 rows][step of 32 columns][2 fragments][32 lanes][16 bytes], so a warp streams whole kilobytes,
// straight into the registers that the multiply reads. Columns are in natural order; one ldmatrix of 8 tokens by 32
// columns is the B operand of a step's two multiplies.
//
// Split-K: every dot product is cut into SPLITS runs of columns, each added up in order by one warp, and the runs'
// partial sums are added in order: whatever the number of tokens, and whichever kernel runs. The two kernels differ in
// where warps stand:
//   narrow, up to 8 tokens: a block is one strip, each warp takes a split. x lies in shared memory: loads of it in the
//     loop would queue behind those of the weights, and their latency be paid at every turn. All blocks of the
//     projections are resident at once, and a multiprocessor with more of them has more loads in flight, so the memory
//     itself evens out what 320 or 180 strips on 132 multiprocessors leave uneven. Up to 2 tokens leave room in shared
//     memory for what registers do not hold of a strip: after the wait for the predecessor nothing but x is loaded.
//   wide: a cluster of SPLITS blocks, one a multiprocessor, keeps x in shared memory, a split's columns in each block
//     (94 KB for 64 tokens of 2880 in four), and walks over groups of strips, a strip for each warp: else 64 tokens of
//     x, read for each strip, would be four times the weights' bytes. The grid is as many clusters as are resident at
//     once, and strips are dealt out evenly. Partial sums are sent to the block that adds them up, and counted there as
//     they arrive: a barrier that ordered memory would wait for the next group's weights, which are on their way. Above
//     64 tokens the grid tiles them by 64.
//
// With RANKS > 1 the result is this rank's partial sum, and is sent from here to the other ranks, too: into the area of
// their memory in which add_norm_route of norm/decode.cu waits for it. See common/exchange.cuh.
//
// With programmatic dependent launch the first loads of weights, which no kernel writes, are in flight before the wait
// for the predecessor: otherwise the memory would be idle until that ends.
//
// Macros beside those of layout.cuh: RANKS; NARROW_DEPTH and WIDE_DEPTH, steps whose weights a warp has in flight in
// registers (WIDE_DEPTH with 64 tokens); NARROW_KEPT, further steps that come to shared memory for 1 or 2 tokens;
// NARROW_BLOCKS, of a multiprocessor; MOST_WARPS, of a wide block.

#include "common/exchange.cuh"
#include "common/ptx.cuh"
#include "linear/layout.cuh"

namespace {

struct Layer {
    const uint4* weight;
    const bf16* x;
    const bf16* bias;  // or null
    bf16* out;
    int rows, tokens;
    const unsigned long long* memories;  // the exchange area for the sum after attention: see Peers in kernels/ops.py
    int offset, rank;
};

// A step's two fragments of this lane, from its piece of the first one.
__device__ __forceinline__ void load_tile(uint4 (&a)[2], const uint4* at) {
#pragma unroll
    for (int half = 0; half < 2; ++half) a[half] = ld_weight(at + half * 32);
}

// One step of 32 columns: a lane's fragments of its two multiplies.
__device__ __forceinline__ void multiply_step(float (&sums)[4], const uint4 (&a)[2], const uint4& b) {
    mma(sums, a[0].x, a[0].y, a[0].z, a[0].w, b.x, b.y);
    mma(sums, a[1].x, a[1].y, a[1].z, a[1].w, b.z, b.w);
}

__device__ __forceinline__ unsigned pair_of(bf16 low, bf16 high) { return low | unsigned(high) << 16; }

// By the copy engine, counted by a barrier that is made for it.
__device__ __forceinline__ void copy_counted(unsigned to, const uint4* from, int bytes, unsigned barrier) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(barrier, bytes);
    cp_async_bulk(to, from, bytes, barrier);
}

// A thread finds one of the areas; the block meets at a barrier before it sends.
__device__ __forceinline__ void find_areas(OtherAreas& others, const Layer& layer) {
    const int other = threadIdx.x;
    if (other < RANKS - 1) others.find(other, layer.memories, layer.offset, layer.rank);
}

// Grid (strips), SPLITS warps. Shared memory: tiles [SPLITS][KEPT][TILE], then x [tokens][NARROW_PITCH], of which each
// warp copies and reads its split's columns.
template <int DEPTH, int KEPT>
__device__ __forceinline__ void narrow(const Layer& layer) {
    extern __shared__ __align__(128) uint4 shared[];
    __shared__ float partial[SPLITS][8 * PARTIAL_PITCH];
    __shared__ unsigned long long arrived[SPLITS];
    __shared__ OtherAreas others;
    griddep_wait_first();
    griddep_launch_dependents();
    if (RANKS > 1) find_areas(others, layer);
    const int lane = threadIdx.x % 32, split = threadIdx.x / 32, strip = blockIdx.x;
    const int rows = layer.rows, tokens = layer.tokens;
    const int begin = split_begin(split), steps = split_begin(split + 1) - begin;
    const uint4* tile_at = layer.weight + tile_piece(strip, begin) + lane;
    uint4 a[DEPTH][2];
#pragma unroll
    for (int i = 0; i < DEPTH; ++i)
        if (i < steps) load_tile(a[i], tile_at + i * TILE);
    uint4* const kept = shared + split * KEPT * TILE;
    const unsigned barrier = shared_address(&arrived[split]);
    if (KEPT > 0 && lane == 0 && steps > DEPTH)
        copy_counted(shared_address(kept), tile_at + DEPTH * TILE, (steps - DEPTH) * TILE * 16, barrier);

    griddep_wait();
    const unsigned x_at = shared_address(shared + SPLITS * KEPT * TILE) + begin * STEP_BYTES;
    for (int token = 0; token < tokens; ++token)
        for (int i = lane; i < steps * (STEP_COLUMNS / 8); i += 32)
            cp_async(narrow_x(x_at, token, i), layer.x + size_t(token) * COLUMNS + begin * STEP_COLUMNS + i * 8);
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();  // a warp reads only what it copied
    // Lanes of tokens past the last read the last one again: those sums are not stored, and touch no other token's.
    const unsigned token_at = narrow_x(x_at, min(lane % 8, tokens - 1), lane / 8);

    float sums[4] = {};
    for (int base = 0; base < (KEPT > 0 ? DEPTH : steps); base += DEPTH)
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            const int step = base + i;
            if (step < steps) {
                multiply_step(sums, a[i], ldmatrix(token_at + step * STEP_BYTES));
                if (KEPT == 0 && step + DEPTH < steps) load_tile(a[i], tile_at + (step + DEPTH) * TILE);
            }
        }
    if (KEPT > 0 && steps > DEPTH) {
        mbarrier_wait(barrier, 0);
#pragma unroll
        for (int i = 0; i < KEPT; ++i)
            if (DEPTH + i < steps) {
                const uint4 tile[2] = {kept[i * TILE + lane], kept[i * TILE + 32 + lane]};
                multiply_step(sums, tile, ldmatrix(token_at + (DEPTH + i) * STEP_BYTES));
            }
    }

#pragma unroll
    for (int i = 0; i < 4; ++i)
        partial[split][partial_sum(accumulator_token(lane, i), accumulator_row(lane, i))] = sums[i];
    __syncthreads();
    for (int i = threadIdx.x; i < 8 * STRIP_ROWS; i += SPLITS * 32) {  // whole warps
        const int row = i % STRIP_ROWS, token = i / STRIP_ROWS, at = partial_sum(token, row);
        const size_t place = size_t(token) * rows + strip * STRIP_ROWS + row;
        const bool wanted = token < tokens && strip * STRIP_ROWS + row < rows;
        bf16 result = 0;
        if (wanted) {
            float sum = partial[0][at];
#pragma unroll
            for (int other = 1; other < SPLITS; ++other) sum += partial[other][at];
            if (layer.bias != nullptr) sum += widen(layer.bias[strip * STRIP_ROWS + row]);
            layer.out[place] = result = round_bf16(sum);
        }
        if (RANKS > 1) {  // rows in pairs, a word each
            const bf16 next = __shfl_down_sync(0xffffffffu, result, 1);
            if (wanted && row % 2 == 0)
                others.send_all((size_t(layer.rank) * tokens * rows + place) * 2, pair_of(result, next));
        }
    }
}

// Grid (SPLITS, tiles of 8 TILES tokens, clusters that share the groups of strips), up to MOST_WARPS warps. A group is
// a strip for each warp: warps x TILES units of 16 rows by 8 tokens, which the blocks of the cluster add up in turn.
// Shared memory: x [MOST_STEPS][TOKENS][64 bytes], then the sums received, [units of a block][SPLITS][32 lanes] of
// four: in the same place in all blocks of a cluster, whose splits may differ by a step.
template <int TILES, int DEPTH>
__device__ __forceinline__ void wide(const Layer& layer) {
    constexpr int TOKENS = TILES * 8;
    extern __shared__ uint4 shared[];
    __shared__ unsigned long long arrived;
    __shared__ OtherAreas others;
    griddep_wait_first();
    griddep_launch_dependents();
    if (RANKS > 1) find_areas(others, layer);
    const unsigned barrier = shared_address(&arrived);
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        fence_mbarrier_init();
    }
    cluster_arrive_relaxed();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, split = blockIdx.x;
    const int rows = layer.rows, tokens = layer.tokens;
    const int begin = split_begin(split);
    // Where all splits are alike ptxas would merge steps, load in clumps, and spill.
    const int steps = opaque(split_begin(split + 1) - begin);
    const int strips = (rows + STRIP_ROWS - 1) / STRIP_ROWS, groups = (strips + warps - 1) / warps;
    const int first_group = blockIdx.z;
    const auto tiles_of = [&](int group) {  // past the last strip: that one again, and its sums are not stored
        return layer.weight + tile_piece(min(group * warps + warp, strips - 1), begin) + lane;
    };
    const uint4* tile_at = tiles_of(first_group);
    uint4 a[DEPTH][2];
#pragma unroll
    for (int i = 0; i < DEPTH; ++i)
        if (i < steps) load_tile(a[i], tile_at + i * TILE);

    griddep_wait();
    const int first = blockIdx.y * TOKENS;
    const unsigned x_at = shared_address(shared), received_at = x_at + MOST_STEPS * TOKENS * STEP_BYTES;
    const float4* sums_received = reinterpret_cast<const float4*>(shared) + MOST_STEPS * TOKENS * STEP_BYTES / 16;
    const int units = units_of(split, warps * TILES);  // of this block
    unsigned parity = 0;
    // The columns of the first DEPTH steps come first: they are multiplied while the others are under way.
    const auto copy_steps = [&](int from, int to) {
        for (int i = from * TOKENS * 4 + threadIdx.x; i < to * TOKENS * 4; i += blockDim.x) {
            const int piece = i % 4, token = i / 4 % TOKENS, step = i / 4 / TOKENS;
            const bool present = first + token < tokens;  // zeros for tokens past the last
            cp_async(
                wide_x<TOKENS>(x_at, step, token, piece),
                layer.x + size_t(present ? first + token : 0) * COLUMNS + (begin + step) * STEP_COLUMNS + piece * 8,
                present);
        }
        cp_async_commit();
    };
    copy_steps(0, min(DEPTH, steps));
    copy_steps(min(DEPTH, steps), steps);
    // Kept in a register: ptxas would compute it anew at every step.
    const unsigned token_at = opaque(wide_x<TOKENS>(x_at, 0, lane % 8, lane / 8));

    for (int group = first_group; group < groups; group += gridDim.z) {
        const bool more = group + int(gridDim.z) < groups;
        const uint4* next_at = tiles_of(group + gridDim.z);
        if (threadIdx.x == 0) mbarrier_arrive_expect_tx(barrier, units * SPLITS * 512);
        float sums[TILES][4] = {};
        for (int base = 0; base < steps; base += DEPTH) {
            if (group == first_group && base <= DEPTH) {  // later all of x is there
                if (base == 0)
                    cp_async_wait<1>();
                else
                    cp_async_wait<0>();
                __syncthreads();
            }
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) {
                const int step = base + i;
                if (step < steps) {
#pragma unroll
                    for (int tile = 0; tile < TILES; ++tile)
                        multiply_step(sums[tile], a[i], ldmatrix(wide_x<TOKENS>(token_at, step, tile * 8, 0)));
                    // The place in the ring takes a later step or, after the last, the next group's step i.
                    const bool within = step + DEPTH < steps;
                    const uint4* from = within ? tile_at + (step + DEPTH) * TILE : next_at + i * TILE;
                    if (within || more) load_tile(a[i], from);
                }
            }
        }
        tile_at = next_at;

        cluster_wait();  // all blocks have begun, and have read what came to them in the group before
        const int thread = thread_again(), lane = thread % 32, warp = thread / 32;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const int unit = warp * TILES + tile, block = adding_split(unit);
            const unsigned to = mapa(received_at + received(unit / SPLITS, split, lane) * 16, block);
            st_async(to, sums[tile], mapa(barrier, block));
        }
        mbarrier_wait(barrier, parity);
        parity ^= 1;
        for (int n = warp; n < units; n += warps) {
            const int unit = unit_of(split, n);
            float total[4] = {};
#pragma unroll
            for (int other = 0; other < SPLITS; ++other) {  // in order
                const float4 sum = sums_received[received(n, other, lane)];
                const float four[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) total[i] = other == 0 ? four[i] : total[i] + four[i];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = (group * warps + unit / TILES) * STRIP_ROWS + accumulator_row(lane, i);
                const int token = first + unit % TILES * 8 + accumulator_token(lane, i);
                const size_t place = size_t(token) * rows + row;
                const bool wanted = token < tokens && row < rows;
                bf16 result = 0;
                if (wanted) {
                    const float sum = layer.bias == nullptr ? total[i] : total[i] + widen(layer.bias[row]);
                    layer.out[place] = result = round_bf16(sum);
                }
                if (RANKS > 1) {  // rows in pairs, a word each
                    const bf16 next = __shfl_down_sync(0xffffffffu, result, 4);
                    if (wanted && row % 2 == 0)
                        others.send_all((size_t(layer.rank) * tokens * rows + place) * 2, pair_of(result, next));
                }
            }
        }
        if (more) cluster_arrive_relaxed();
    }
}

}  // namespace

#define KERNEL(NAME, ATTRIBUTES, ...)                                                                                  \
    extern "C" __global__ void ATTRIBUTES NAME(const uint4* weight, const bf16* x, const bf16* bias, bf16* out,        \
                                               int rows, int tokens, const unsigned long long* memories, int offset,   \
                                               int rank) {                                                             \
        __VA_ARGS__(Layer{weight, x, bias, out, rows, tokens, memories, offset, rank});                                \
    }
#define NARROW __launch_bounds__(SPLITS * 32, NARROW_BLOCKS)
#define WIDE __cluster_dims__(SPLITS, 1, 1) __launch_bounds__(MOST_WARPS * 32, 1)

// By the most tokens that each takes, or by which it tiles them.
KERNEL(narrow_2, NARROW, narrow<NARROW_DEPTH, NARROW_KEPT>)
KERNEL(narrow_8, NARROW, narrow<NARROW_DEPTH, 0>)
KERNEL(wide_16, WIDE, wide<2, WIDE_DEPTH + 2>)
KERNEL(wide_32, WIDE, wide<4, WIDE_DEPTH + 2>)
KERNEL(wide_64, WIDE, wide<8, WIDE_DEPTH>)
