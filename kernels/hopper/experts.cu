// The MXFP4 mixture of experts for Hopper: gate/up projection with the clamped SwiGLU, down projection, weighted sum.
//
//   h[pair, u]  = swiglu(x[token] . gate_up[expert] + bias)           experts_up_*    x [T, HIDDEN] -> h [pairs, INTER]
//   y[pair, :]  = weight[pair] * (h[pair] . down[expert] + bias)      experts_down_*  -> y [pairs, HIDDEN]
//   out[token]  = sum of y over the token's choices, in their order   experts_combine -> out [T, HIDDEN]
//
// A pair is (token, choice), pair = token * active + choice. HIDDEN and INTER (this rank's share) come from -D and are
// multiples of 32; activations are bf16, sums float32.
//
// Bytes: 4.25 bits a weight, so 3 * HIDDEN * INTER * 17 / 32 an expert, each read once for a batch that fits a token
// tile. 2880 x 2880 and one token with 4 experts: 52.9 MB, 17.2 us at 3.08 TB/s; all 32 experts of the 20b: 423 MB, 137
// us. Activations are a few hundred KB and stay in L2.
//
// Layout of the weights. They are the A operand of mma.m16n8k16 (16 rows), tokens are N, so that a batch of one wastes
// the least. A tile is 16 rows x 64 columns: 32 lanes x 16 bytes, one coalesced 512 byte load straight into registers;
// the tiles of a strip of 16 rows lie one after the other along K. Which column of the tile stands for which k of the
// fragment is free as long as both operands agree: lane (g, t) = (lane / 4, lane % 4) takes columns 16 t .. 16 t + 15
// of rows g and g + 8. So its activations are 32 contiguous bytes of a row (two 16 byte loads from shared memory, free
// of bank conflicts because the row pitch is 16 modulo 32), and they share one scale a row: 2 bytes a lane and tile.
// Gate and up rows of a unit sit at g and g + 8: both end in one lane's accumulator.
//
// Sums. K is cut into SHARES consecutive parts, a function of K alone. A part is one chain of mma in the order of its
// tiles, and the parts are added in order. Whether different warps hold the parts (small batches: enough loads in
// flight) or one warp runs through them (large batches: activations shared by 8 strips), the bytes are the same; a
// column of an mma does not depend on its neighbours. So a token's result is a function of the token alone.

#include <cuda_bf16.h>

using uint16_t = unsigned short;  // NVRTC has no stdint.h
using uint32_t = unsigned int;

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int LARGE_TOKENS = 64;  // pairs of one expert in a block of the large kernels

// Exponents: see dequantize. Sums carry this factor less, exactly, until the epilogue.
constexpr float DEFERRED_SCALE = 4294967296.0f;  // 2^32

constexpr int shares_of(int tiles) {  // so that a warp's part of a strip is at most 6 tiles, its loads in flight
    int shares = 1;
    while (shares < WARPS && (tiles + shares - 1) / shares > 6) shares *= 2;
    return shares;
}

template <int COLUMNS, int ROWS_>
struct Matrix {
    static constexpr int K = COLUMNS, ROWS = ROWS_;
    static constexpr int TILES = (K + 63) / 64;  // the last one may be half, its other half packed as zeros
    static constexpr int STRIPS = ROWS / 16;
    static constexpr int SHARES = shares_of(TILES);
    static constexpr int GROUPS = WARPS / SHARES;  // strips that a block of the small kernels works on at once
    static constexpr int STRIP_GROUPS = (STRIPS + GROUPS - 1) / GROUPS;
    static constexpr int LEAST = TILES / SHARES, LONGER = TILES % SHARES;  // the first LONGER parts have one tile more
    static constexpr int DEPTH = LEAST + (LONGER > 0);
    static __device__ __forceinline__ int first(int share) { return share * LEAST + min(share, LONGER); }
    static __device__ __forceinline__ int tiles_of(int share) { return LEAST + (share < LONGER); }
};
using Up = Matrix<HIDDEN, 2 * INTER>;
using Down = Matrix<INTER, HIDDEN>;

// --- PTX -------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void wait_for_predecessors() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Weights are read once a batch: they should not push activations out of L1. Volatile keeps the loads where they are
// written, far ahead of their use.
__device__ __forceinline__ uint4 load_values(const uint4* at) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}

__device__ __forceinline__ uint32_t load_scales(const uint16_t* at) {
    uint16_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(at));
    return v;
}

__device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t b) {  // keeps subnormals
    uint32_t product;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

__device__ __forceinline__ void mma(float (&sum)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {  // 16 bytes, of which read: bytes
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int LEFT>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" :: "n"(LEFT) : "memory");
}

__device__ __forceinline__ float least(float a, float b) {  // NaN wins, as in torch.clamp
    float v;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}

__device__ __forceinline__ float most(float a, float b) {
    float v;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}

// A number the compiler knows nothing about. Asking of every tile whether the part has it keeps each tile's work in a
// block of its own: in one block, ptxas puts the loads for the next part behind all of this part's products.
__device__ __forceinline__ int opaque(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// --- One tile --------------------------------------------------------------------------------------------------------

// One packed word, 8 values, to the A fragment of one k16 step. Placing sign and the three exponent and mantissa bits
// of an E2M1 at bits 15 and 8..6 of a bf16 gives its value * 2^-126 exactly, subnormal included. In each half of a word
// the four values' (sign; exponent, mantissa) bits lie at (15; 8..6), (12; 5..3), (13; 2..0), (14; 11..9): those need
// 1, 2, 4 and 4 operations to get there, for two values each. The multiplier's exponent field is the stored scale byte,
// the checkpoint's + 94: that is the scale, the 2^126 and 2^-32 to keep the byte below 255 for scales up to 2^33.
__device__ __forceinline__ void dequantize(uint32_t q, uint32_t scale_low, uint32_t scale_high, uint32_t* a) {
    constexpr uint32_t SIGN = 0x80008000u, REST = 0x01C001C0u;
    a[0] = multiply_pair(q & (SIGN | REST), scale_low);                            // row g, columns 4 step + 0, 1
    a[1] = multiply_pair((q << 3) & (SIGN | REST), scale_high);                    // row g + 8
    a[2] = multiply_pair(((q << 2) & SIGN) | ((q << 6) & REST), scale_low);        // row g, columns 4 step + 2, 3
    a[3] = multiply_pair(((q << 1) & SIGN) | ((q >> 3) & REST), scale_high);       // row g + 8
}

// Add one tile's products to the sums of 8 N_TILES tokens. activations: the lane's 32 bytes of token g, in shared
// memory, the next token `pitch` bytes further. Tokens from `live` on are left out, 16 at a time where there are many:
// every branch keeps the products before it and behind it from overlapping.
template <int N_TILES>
__device__ __forceinline__ void multiply_tile(
    float (&sum)[N_TILES][4], uint4 value, uint32_t scale, const unsigned char* activations, int pitch, int live) {
    const uint32_t low = (scale & 0xFF) * 0x00800080u, high = (scale >> 8) * 0x00800080u;  // two bf16 powers of two
    const uint32_t words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t a[8];
        dequantize(words[2 * half], low, high, a);
        dequantize(words[2 * half + 1], low, high, a + 4);
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
            if (n > 0 && (N_TILES == 2 || n % 2 == 0) && n * 8 >= live) break;
            const uint4 b = *reinterpret_cast<const uint4*>(activations + n * 8 * pitch + half * 16);
            mma(sum[n], a, b.x, b.y);
            mma(sum[n], a + 4, b.z, b.w);
        }
    }
}

// The weights a warp holds in registers: one part of a strip. `aim` names the part that loads take from now on.
template <class M>
struct Stream {
    const uint4* const all_values;
    const uint16_t* const all_scales;
    const int first;         // the expert's first tile
    const uint4* values;     // of this lane, in the part's first tile
    const uint16_t* scales;  // two bytes: rows g and g + 8
    uint4 value[M::DEPTH];
    uint32_t scale[M::DEPTH];

    __device__ __forceinline__ Stream(const uint4* all_values, const uint16_t* all_scales, int expert)
        : all_values(all_values), all_scales(all_scales), first(expert * (M::STRIPS * M::TILES)) {}

    __device__ __forceinline__ void aim(int strip, int share) {  // past the end: the last strip, and nobody minds
        const size_t tile = first + min(strip, M::STRIPS - 1) * M::TILES + M::first(share);
        const int lane = threadIdx.x % 32;
        values = all_values + tile * 32 + lane;
        scales = all_scales + tile * 16 + lane / 4 * 2 + lane % 4 / 2;
    }
    __device__ __forceinline__ void load(int j) {
        value[j] = load_values(values + j * 32);
        scale[j] = load_scales(scales + j * 16);
    }
    __device__ __forceinline__ void load_all(int tiles) {
#pragma unroll
        for (int j = 0; j < M::DEPTH; j++)
            if (j < tiles) load(j);
    }
};

// Copy columns [first_tile * 64, (first_tile + TILES) * 64) of `live` pairs' rows to shared memory; zeros beyond K.
template <class M, bool UP, int TILES>
__device__ __forceinline__ void stage(
    unsigned char* to, const __nv_bfloat16* source, const int* pair, int live, int active, int first_tile) {
    constexpr int PIECES = TILES * 8, PITCH = TILES * 128 + 16;  // a piece is 16 bytes
#pragma unroll 1
    for (int i = threadIdx.x; i < live * PIECES; i += THREADS) {
        const int row = i / PIECES, piece = i % PIECES, column = first_tile * 64 + piece * 8;
        const int from = UP ? (uint32_t)pair[row] / (uint32_t)active : pair[row];
        const bool inside = column < M::K;
        const __nv_bfloat16* const at = source + (size_t)from * M::K + (inside ? column : 0);
        copy_async(to + row * PITCH + piece * 16, at, inside ? 16 : 0);
    }
}

// Bias, then SwiGLU or the routing weight, for the rows g, g + 8 of a strip and two pairs (-1: none).
// sum: row g of both pairs, row g + 8 of both pairs. bias: the expert's.
template <class M, bool UP>
__device__ __forceinline__ void finish(
    float4 sum, int strip, int g, const int (&pair)[2], const __nv_bfloat16* bias, const float* weights, float limit,
    __nv_bfloat16* out) {
    // The packed strip holds a gate_up matrix's rows 16 strip + 2 g (gate) and + 1 (up) at g and g + 8.
    const int row = strip * 16 + (UP ? 2 * g : g), other_row = row + (UP ? 1 : 8);
    const float bias_low = __bfloat162float(bias[row]), bias_high = __bfloat162float(bias[other_row]);
    const float low[2] = {sum.x, sum.y}, high[2] = {sum.z, sum.w};
#pragma unroll
    for (int c = 0; c < 2; c++) {
        if (pair[c] < 0) continue;
        const float a = fmaf(low[c], DEFERRED_SCALE, bias_low), b = fmaf(high[c], DEFERRED_SCALE, bias_high);
        if constexpr (UP) {
            const float gate = least(a, limit), up = most(least(b, limit), -limit);
            const float activated = __fdividef(gate, 1.0f + __expf(-1.702f * gate));
            out[(size_t)pair[c] * INTER + strip * 8 + g] = __float2bfloat16_rn(activated * (up + 1.0f));
        } else {
            const float weight = __ldcg(weights + pair[c]);
            __nv_bfloat16* at = out + (size_t)pair[c] * HIDDEN;
            at[row] = __float2bfloat16_rn(weight * a);
            at[other_row] = __float2bfloat16_rn(weight * b);
        }
    }
}

// --- Small batches: at most 256 pairs --------------------------------------------------------------------------------
// Block (x, y): every gridDim.x-th group of strips of the y-th distinct expert among the pairs. The parts of K are
// spread over the warps, each of which has its next strip's tiles in flight while it multiplies this one's.

// The index of the n-th set bit (from 0) of 32 words, lane i holding the i-th; -1 if there are not so many.
__device__ __forceinline__ int nth_set_bit(uint32_t word, int n, int lane) {
    const int count = __popc(word);
    int end = count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(0xFFFFFFFFu, end, step);
        if (lane >= step) end += below;
    }
    const bool here = n >= end - count && n < end;
    for (int skip = end - count; here && skip < n; skip++) word &= word - 1;
    const uint32_t owner = __ballot_sync(0xFFFFFFFFu, here);
    if (owner == 0) return -1;
    return __shfl_sync(0xFFFFFFFFu, lane * 32 + __ffs(word) - 1, __ffs(owner) - 1);
}

template <class M, bool UP, int N_TILES>
__device__ __forceinline__ void small_batch(
    const __nv_bfloat16* source, __nv_bfloat16* out, const uint4* values, const uint16_t* scales,
    const __nv_bfloat16* bias, const long long* ids, const float* weights, int pairs, int active, float limit) {
    constexpr int TOKENS = 8 * N_TILES, PITCH = M::TILES * 128 + 16;
    extern __shared__ __align__(16) unsigned char shared[];
    unsigned char* const rows = shared;                                      // [TOKENS][PITCH]
    float4* const partial = reinterpret_cast<float4*>(shared + TOKENS * PITCH);  // [2][WARPS][N_TILES][32]
    __shared__ uint32_t chosen[32];    // a bit for each expert
    __shared__ uint32_t votes[WARPS];  // of each warp's pairs, those of this block's expert
    __shared__ int pair_of[THREADS];   // the expert's pairs, ascending
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int share = warp % M::SHARES, group = warp / M::SHARES, tiles = opaque(M::tiles_of(share));

    launch_dependents();
    if (thread < 32) chosen[thread] = 0;
    wait_for_predecessors();
    const int mine = thread < pairs ? (int)__ldcg(ids + thread) : -1;
    __syncthreads();
    if (mine >= 0) atomicOr(&chosen[mine / 32], 1u << (mine % 32));
    __syncthreads();
    const int expert = nth_set_bit(chosen[lane], blockIdx.y, lane);
    if (expert < 0) return;

    Stream<M> stream(values, scales, expert);
    stream.aim(blockIdx.x * M::GROUPS + group, share);
    stream.load_all(M::tiles_of(share));
    const uint32_t vote = __ballot_sync(0xFFFFFFFFu, mine == expert);
    if (lane == 0) votes[warp] = vote;
    __syncthreads();
    int count = 0, rank = __popc(vote & ((1u << lane) - 1));
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        const int of_warp = __popc(votes[w]);
        count += of_warp;
        rank += w < warp ? of_warp : 0;
    }
    if (mine == expert) pair_of[rank] = thread;

    int turn = 0;  // strips done; also which half of `partial` is free, and which warps add up
    for (int base = 0; base < count; base += TOKENS) {
        const int live = min(count - base, TOKENS);
        __syncthreads();  // pair_of is written, and nobody reads `rows` any more
        stage<M, UP, M::TILES>(rows, source, pair_of + base, live, active, 0);
        if (base > 0) {
            stream.aim(blockIdx.x * M::GROUPS + group, share);
            stream.load_all(M::tiles_of(share));
        }
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
        const unsigned char* const activations = rows + g * PITCH + t * 32 + M::first(share) * 128;
        for (int at = blockIdx.x; at < M::STRIP_GROUPS; at += gridDim.x, turn++) {
            const bool more = at + gridDim.x < M::STRIP_GROUPS;
            stream.aim((at + gridDim.x) * M::GROUPS + group, share);
            float sum[N_TILES][4] = {};
#pragma unroll
            for (int j = 0; j < M::DEPTH; j++) {
                if (j >= tiles) break;
                multiply_tile<N_TILES>(sum, stream.value[j], stream.scale[j], activations + j * 128, PITCH, live);
                if (more) stream.load(j);
            }
            float4* const now = partial + turn % 2 * (WARPS * N_TILES * 32);
#pragma unroll
            for (int n = 0; n < N_TILES; n++)
                now[(warp * N_TILES + n) * 32 + lane] = make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]);
            __syncthreads();  // the other half of `partial` has been read, too, by every warp that is here
            for (int job = (warp + turn) % WARPS; job < M::GROUPS * N_TILES; job += WARPS) {
                const int of_group = job / N_TILES, n = job % N_TILES, strip = at * M::GROUPS + of_group;
                if (n * 8 >= live || strip >= M::STRIPS) continue;
                float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 2
                for (int s = 0; s < M::SHARES; s++) {
                    const float4 part = now[((of_group * M::SHARES + s) * N_TILES + n) * 32 + lane];
                    total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
                }
                const int token = n * 8 + 2 * t;
                const int pair[2] = {
                    token < live ? pair_of[base + token] : -1, token + 1 < live ? pair_of[base + token + 1] : -1};
                finish<M, UP>(total, strip, g, pair, bias + (size_t)expert * M::ROWS, weights, limit, out);
            }
        }
    }
}

#define SMALL_BATCH(NAME, MATRIX, UP, N_TILES, BLOCKS)                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(                                                \
        const __nv_bfloat16* source, __nv_bfloat16* out, const uint4* values, const uint16_t* scales,                  \
        const __nv_bfloat16* bias, const long long* ids, const float* weights, int pairs, int active, float limit) {   \
        small_batch<MATRIX, UP, N_TILES>(                                                                              \
            source, out, values, scales, bias, ids, weights, pairs, active, limit);                                    \
    }
SMALL_BATCH(experts_up_8, Up, true, 1, 3)
SMALL_BATCH(experts_down_8, Down, false, 1, 3)
SMALL_BATCH(experts_up_16, Up, true, 2, 2)
SMALL_BATCH(experts_down_16, Down, false, 2, 2)

// --- Large batches ---------------------------------------------------------------------------------------------------

// Sort pairs by expert, each expert's in ascending order, and cut them in tiles of at most LARGE_TOKENS of one expert.
// order [pairs]; tiles [max_tiles]: (expert, first place in order, pairs, 0), pairs = 0 in tiles nobody needs.
// Block e looks at every id and writes expert e's part: no block waits for another.
extern "C" __global__ void __launch_bounds__(1024) experts_group(
    const long long* ids, int* order, int4* tiles, int pairs, int experts, int max_tiles) {
    constexpr int GROUP_WARPS = 32;
    __shared__ int load[1024];  // pairs of each expert
    __shared__ int of_warp[GROUP_WARPS];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, expert = blockIdx.x;
    launch_dependents();
    load[thread] = 0;
    wait_for_predecessors();
    __syncthreads();
    const int segment = (pairs + 1023) / 1024 * 32, begin = warp * segment, end = min(begin + segment, pairs);
    int mine = 0;
    for (int i = begin + lane; i - lane < end; i += 32) {
        const int id = i < end ? (int)__ldcg(ids + i) : -1;
        if (id >= 0) atomicAdd(&load[id], 1);
        mine += __popc(__ballot_sync(0xFFFFFFFFu, id == expert));
    }
    if (lane == 0) of_warp[warp] = mine;
    __syncthreads();
    int first = 0, first_tile = 0, all_tiles = 0;
    for (int e = lane; e < experts; e += 32) {
        const int needed = (load[e] + LARGE_TOKENS - 1) / LARGE_TOKENS;
        all_tiles += needed;
        if (e < expert) first += load[e], first_tile += needed;
    }
    first = __reduce_add_sync(0xFFFFFFFFu, first);
    first_tile = __reduce_add_sync(0xFFFFFFFFu, first_tile);
    all_tiles = __reduce_add_sync(0xFFFFFFFFu, all_tiles);
    int place = first + __reduce_add_sync(0xFFFFFFFFu, lane < warp ? of_warp[lane] : 0);
    for (int i = begin + lane; i - lane < end; i += 32) {
        const bool match = i < end && (int)__ldcg(ids + i) == expert;
        const uint32_t vote = __ballot_sync(0xFFFFFFFFu, match);
        if (match) order[place + __popc(vote & ((1u << lane) - 1))] = i;
        place += __popc(vote);
    }
    for (int i = thread; i * LARGE_TOKENS < load[expert]; i += 1024) {
        const int at = i * LARGE_TOKENS;
        tiles[first_tile + i] = make_int4(expert, first + at, min(load[expert] - at, LARGE_TOKENS), 0);
    }
    if (expert == experts - 1)
        for (int i = all_tiles + thread; i < max_tiles; i += 1024) tiles[i] = make_int4(0, 0, 0, 0);
}

// Block (x, y): strips 8 x .. 8 x + 7, one a warp, for the pairs of tile y. Activations come to shared memory a part of
// K at a time, the next part while this one is multiplied.
template <class M, bool UP>
__device__ __forceinline__ void large_batch(
    const __nv_bfloat16* source, __nv_bfloat16* out, const uint4* values, const uint16_t* scales,
    const __nv_bfloat16* bias, const int4* all_tiles, const int* order, const float* weights, int active, float limit) {
    constexpr int N_TILES = LARGE_TOKENS / 8, PITCH = M::DEPTH * 128 + 16;
    extern __shared__ __align__(16) unsigned char shared[];  // [2][LARGE_TOKENS][PITCH]
    __shared__ int pair_of[LARGE_TOKENS];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int strip = blockIdx.x * WARPS + warp;

    launch_dependents();
    wait_for_predecessors();
    const int4 tile = __ldcg(all_tiles + blockIdx.y);
    const int expert = tile.x, live = tile.z;
    if (live == 0) return;
    if (thread < live) pair_of[thread] = __ldcg(order + tile.y + thread);
    Stream<M> stream(values, scales, expert);
    stream.aim(strip, 0);
    stream.load_all(M::tiles_of(0));
    __syncthreads();
    auto stage_share = [&](int share) {  // always DEPTH tiles: a shorter part's last one is not used
        unsigned char* const to = shared + share % 2 * (LARGE_TOKENS * PITCH);
        stage<M, UP, M::DEPTH>(to, source, pair_of, live, active, M::first(share));
    };
    stage_share(0);
    commit_copies();
    float total[N_TILES][4] = {};
#pragma unroll 1
    for (int share = 0; share < M::SHARES; share++) {
        const int next = share + 1;
        wait_for_copies<0>();
        __syncthreads();
        if (next < M::SHARES) stage_share(next);
        commit_copies();
        const unsigned char* const activations = shared + share % 2 * (LARGE_TOKENS * PITCH) + g * PITCH + t * 32;
        const int tiles = M::tiles_of(share), next_tiles = next < M::SHARES ? M::tiles_of(next) : 0;
        stream.aim(strip, next);
        float sum[N_TILES][4] = {};
#pragma unroll
        for (int j = 0; j < M::DEPTH; j++) {
            if (j >= tiles) break;
            multiply_tile<N_TILES>(sum, stream.value[j], stream.scale[j], activations + j * 128, PITCH, live);
            if (j < next_tiles) stream.load(j);
        }
#pragma unroll
        for (int n = 0; n < N_TILES; n++)
#pragma unroll
            for (int c = 0; c < 4; c++) total[n][c] += sum[n][c];
    }
    if (strip >= M::STRIPS) return;
#pragma unroll
    for (int n = 0; n < N_TILES; n++) {
        const int token = n * 8 + 2 * t;
        const int pair[2] = {token < live ? pair_of[token] : -1, token + 1 < live ? pair_of[token + 1] : -1};
        finish<M, UP>(make_float4(total[n][0], total[n][1], total[n][2], total[n][3]), strip, g, pair,
                      bias + (size_t)expert * M::ROWS, weights, limit, out);
    }
}

#define LARGE_BATCH(NAME, MATRIX, UP)                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME(                                                     \
        const __nv_bfloat16* source, __nv_bfloat16* out, const uint4* values, const uint16_t* scales,                  \
        const __nv_bfloat16* bias, const int4* tiles, const int* order, const float* weights, int active,              \
        float limit) {                                                                                                 \
        large_batch<MATRIX, UP>(source, out, values, scales, bias, tiles, order, weights, active, limit);              \
    }
LARGE_BATCH(experts_up_64, Up, true)
LARGE_BATCH(experts_down_64, Down, false)

// --- Sum over choices ------------------------------------------------------------------------------------------------

// y [T, active, HIDDEN] -> out [T, HIDDEN], 8 columns a thread.
extern "C" __global__ void __launch_bounds__(THREADS) experts_combine(
    const uint4* y, uint4* out, int tokens, int active) {
    constexpr int PIECES = HIDDEN / 8;
    launch_dependents();
    wait_for_predecessors();
    const int at = blockIdx.x * THREADS + threadIdx.x;
    if (at >= tokens * PIECES) return;
    const int token = at / PIECES, piece = at % PIECES;
    float sum[8] = {};
    for (int choice = 0; choice < active; choice++) {
        const uint4 row = __ldcg(y + ((size_t)token * active + choice) * PIECES + piece);
        const uint32_t words[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sum[2 * i] += __uint_as_float(words[i] << 16);  // bf16 is the upper half of a float32
            sum[2 * i + 1] += __uint_as_float(words[i] & 0xFFFF0000u);
        }
    }
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t low = __bfloat16_as_ushort(__float2bfloat16_rn(sum[2 * i]));
        const uint32_t high = __bfloat16_as_ushort(__float2bfloat16_rn(sum[2 * i + 1]));
        words[i] = low | high << 16;
    }
    out[at] = make_uint4(words[0], words[1], words[2], words[3]);
}
