// The MXFP4 mixture of experts for Hopper: gate/up projection with the clamped SwiGLU, down projection, routing weight.
//
//   h[pair, u]  = swiglu(x[token] . gate_up[expert] + bias)           experts_up_*    x [T, HIDDEN] -> h [pairs, INTER]
//   y[pair, :]  = weight[pair] * (h[pair] . down[expert] + bias)      experts_down_*  -> y [pairs, HIDDEN]
//
// A pair is (token, choice), pair = token * active + choice; who reads y adds a token's choices up. HIDDEN and INTER
// (this rank's share) come from -D and are multiples of 32; activations are bf16, sums float32. Without them the file
// holds experts_group alone, which sorts pairs by expert.
//
// Bytes: 4.25 bits a weight, so 3 * HIDDEN * INTER * 17 / 32 an expert, each read once for a batch that fits a token
// tile. 2880 x 2880 and one token with 4 experts: 52.9 MB, 17.2 us at 3.08 TB/s; all 32 experts of the 20b: 423 MB, 137
// us. Activations are a few hundred KB and stay in L2.
//
// Layout of the weights. They are the A operand of mma.m16n8k16 (16 rows), tokens are N, so that a batch of one wastes
// the least. A tile is 16 rows x 64 columns: 32 lanes x 16 bytes, one coalesced 512 byte load straight into registers;
// the tiles of a strip of 16 rows lie one after the other along K. Word s of lane (g, t) = (lane / 4, lane % 4) is the
// A fragment of the tile's k16 step s: rows g and g + 8, columns 16 s + 2 t, + 1 and 16 s + 8 + 2 t, + 1. Columns keep
// their order, so wgmma can read the same tiles with tokens as they lie in shared memory. Four scale bytes a lane: two
// blocks of 32 columns, rows g and g + 8 of each. Gate and up rows of a unit sit at g and g + 8: both end in one lane's
// accumulator. Activations are read by ldmatrix, 8 tokens x 32 columns at once, from rows a pitch of 16 modulo 128
// bytes apart: no bank conflicts.
//
// Sums. K is cut into SHARES consecutive parts, a function of K alone. A part is one chain of mma in the order of its
// tiles, and the parts are added in order. Whether different warps hold the parts (small batches: enough loads in
// flight) or one warp runs through them (large batches: activations shared by 8 strips), the bytes are the same; a
// column of an mma does not depend on its neighbours. So a token's result is a function of the token alone.

using bf16 = unsigned short;  // its bits: NVRTC has no headers to offer
using uint32_t = unsigned int;

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int MOST_PAIRS = 256;   // of a small batch: a thread looks at one
constexpr int LARGE_TOKENS = 64;  // pairs of one expert in a block of the large kernels

__device__ __forceinline__ void wait_for_predecessors() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// --- Pairs by expert -------------------------------------------------------------------------------------------------

// Sort pairs by expert, each expert's in ascending order, and cut them in tiles of at most tile_pairs of one expert.
// order [pairs]; tiles [max_tiles]: (expert, first place in order, pairs, 0), pairs = 0 in tiles nobody needs.
// Block e looks at every id and writes expert e's part: no block waits for another.
extern "C" __global__ void __launch_bounds__(1024) experts_group(
    const long long* ids, int* order, int4* tiles, int pairs, int experts, int max_tiles, int tile_pairs) {
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
        const int needed = (load[e] + tile_pairs - 1) / tile_pairs;
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
    for (int i = thread; i * tile_pairs < load[expert]; i += 1024) {
        const int at = i * tile_pairs;
        tiles[first_tile + i] = make_int4(expert, first + at, min(load[expert] - at, tile_pairs), 0);
    }
    if (expert == experts - 1)
        for (int i = all_tiles + thread; i < max_tiles; i += 1024) tiles[i] = make_int4(0, 0, 0, 0);
}

#ifdef HIDDEN

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
    static constexpr int GROUPS = WARPS / SHARES;  // strips that 8 warps of the small kernels work on at once
    static constexpr int STRIP_GROUPS = (STRIPS + GROUPS - 1) / GROUPS;
    static constexpr int LEAST = TILES / SHARES, LONGER = TILES % SHARES;  // the first LONGER parts have one tile more
    static constexpr int DEPTH = LEAST + (LONGER > 0);
    static __device__ __forceinline__ int first(int share) { return share * LEAST + min(share, LONGER); }
    static __device__ __forceinline__ int tiles_of(int share) { return LEAST + (share < LONGER); }
};
using Up = Matrix<HIDDEN, 2 * INTER>;
using Down = Matrix<INTER, HIDDEN>;

// --- PTX -------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float widen(bf16 bits) { return __uint_as_float((unsigned)bits << 16); }

__device__ __forceinline__ bf16 narrow(float value) {
    bf16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
    return rounded;
}

// Weights are read once a batch: they should not push activations out of L1. Volatile keeps the loads where they are
// written, far ahead of their use. Not .nc: ptxas moves such loads below griddepcontrol.wait.
__device__ __forceinline__ uint4 load_values(const uint4* at) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}

__device__ __forceinline__ uint32_t load_scales(const uint32_t* at) {
    uint32_t v;
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(at));
    return v;
}

// Four 8 x 8 matrices of bf16; lane l names row l % 8 of matrix l / 8, and lane (g, t) gets columns 2 t, + 1 of row g.
__device__ __forceinline__ uint4 load_matrices(uint32_t at) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}

__device__ __forceinline__ uint32_t shared_address(const void* at) { return (uint32_t)__cvta_generic_to_shared(at); }

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
                 :: "r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
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

// Of the 8 warps of one of two teams; barrier 0 is the block's.
__device__ __forceinline__ void wait_for_team(int team) {
    if (team == 0) asm volatile("bar.sync 1, %0;" :: "n"(THREADS) : "memory");
    else asm volatile("bar.sync 2, %0;" :: "n"(THREADS) : "memory");
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
    a[0] = multiply_pair(q & (SIGN | REST), scale_low);                            // row g, columns 2 t, + 1
    a[1] = multiply_pair((q << 3) & (SIGN | REST), scale_high);                    // row g + 8
    a[2] = multiply_pair(((q << 2) & SIGN) | ((q << 6) & REST), scale_low);        // row g, columns 8 + 2 t, + 1
    a[3] = multiply_pair(((q << 1) & SIGN) | ((q >> 3) & REST), scale_high);       // row g + 8
}

// Add one tile's products to the sums of 8 N_TILES tokens. activations: the address in shared memory that this lane
// names to load_matrices for the tile's first 32 columns and the first 8 tokens; rows are PITCH bytes apart. Tokens
// from `live` on are left out, 16 at a time: every branch keeps the products before it and behind it from overlapping.
template <int N_TILES, int PITCH>
__device__ __forceinline__ void multiply_tile(
    float (&sum)[N_TILES][4], uint4 value, uint32_t scale, uint32_t activations, int live) {
    const uint32_t words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
    for (int block = 0; block < 2; block++) {
        // Two bf16 powers of two each: rows g and g + 8.
        const uint32_t low = __byte_perm(scale, 0, 0x4040 + block * 0x0202) << 7;
        const uint32_t high = __byte_perm(scale, 0, 0x4141 + block * 0x0202) << 7;
        uint32_t a[8];
        dequantize(words[2 * block], low, high, a);
        dequantize(words[2 * block + 1], low, high, a + 4);
#pragma unroll
        for (int n = 0; n < N_TILES; n++) {
            if (n > 0 && n % 2 == 0 && n * 8 >= live) break;
            const uint4 b = load_matrices(activations + n * 8 * PITCH + block * 64);
            mma(sum[n], a, b.x, b.y);
            mma(sum[n], a + 4, b.z, b.w);
        }
    }
}

// What a lane names to load_matrices. Rows past the last one in shared memory are that one: nobody uses their products.
template <int PITCH>
__device__ __forceinline__ uint32_t matrix_address(const unsigned char* rows, int last_row) {
    const int lane = threadIdx.x % 32;
    return shared_address(rows) + min(lane % 8, last_row) * PITCH + lane / 8 * 16;
}

// The weights a warp holds in registers: one part of a strip. `aim` names the part that loads take from now on.
template <class M>
struct Stream {
    const uint4* const all_values;
    const uint32_t* const all_scales;
    uint32_t at;  // this lane's piece of the part's first tile; its four scale bytes begin at byte at / 4 * 4
    uint4 value[M::DEPTH];
    uint32_t scale[M::DEPTH];  // rows g and g + 8 in the tile's first block of columns, then in the second

    __device__ __forceinline__ Stream(const uint4* all_values, const uint32_t* all_scales)
        : all_values(all_values), all_scales(all_scales) {}

    __device__ __forceinline__ void aim(int expert, int strip, int share) {  // past the end: the last strip's
        at = ((expert * M::STRIPS + min(strip, M::STRIPS - 1)) * M::TILES + M::first(share)) * 32 + threadIdx.x % 32;
    }
    __device__ __forceinline__ void load(int j) {
        value[j] = load_values(all_values + at + j * 32);
        scale[j] = load_scales(all_scales + at / 4 + j * 8);
    }
    __device__ __forceinline__ void load_all(int tiles) {
#pragma unroll
        for (int j = 0; j < M::DEPTH; j++)
            if (j < tiles) load(j);
    }
};

// Copy columns [first_tile * 64, (first_tile + TILES) * 64) of `live` pairs' rows to shared memory; zeros beyond K.
template <class M, bool UP, int TILES, int STRIDE>
__device__ __forceinline__ void stage(
    unsigned char* to, const bf16* source, const int* pair, int live, int active, int first_tile) {
    constexpr int PIECES = TILES * 8, PITCH = TILES * 128 + 16;  // a piece is 16 bytes, a thread takes every STRIDE-th
#pragma unroll 1
    for (int i = opaque(threadIdx.x); i < live * PIECES; i += STRIDE) {
        const int row = i / PIECES, piece = i % PIECES, column = first_tile * 64 + piece * 8;
        const int from = UP ? (uint32_t)pair[row] / (uint32_t)active : pair[row];
        const bool inside = column < M::K;
        const bf16* const at = source + (size_t)from * M::K + (inside ? column : 0);
        copy_async(to + row * PITCH + piece * 16, at, inside ? 16 : 0);
    }
}

// The biases of rows g and g + 8 of a strip, in the low and the high half. There, the packed strip holds a gate_up
// matrix's rows 16 strip + 2 g (gate) and + 1 (up).
template <class M, bool UP>
__device__ __forceinline__ uint32_t biases_of(const bf16* bias, int expert, int strip, int g) {
    const int row = expert * M::ROWS + strip * 16;
    if constexpr (UP) return *reinterpret_cast<const uint32_t*>(bias + row + 2 * g);
    const bf16* const at = reinterpret_cast<const bf16*>(bias) + row + g;
    return at[0] | (uint32_t)at[8] << 16;
}

// Bias, then SwiGLU or the routing weight, for the rows g, g + 8 of a strip and two pairs (-1: none).
// sum: row g of both pairs, row g + 8 of both pairs.
template <bool UP>
__device__ __forceinline__ void finish(
    float4 sum, int strip, int g, const int (&pair)[2], const float (&weight)[2], uint32_t biases, float limit,
    bf16* out) {
    const float bias_low = __uint_as_float(biases << 16), bias_high = __uint_as_float(biases & 0xFFFF0000u);
    const float low[2] = {sum.x, sum.y}, high[2] = {sum.z, sum.w};
#pragma unroll
    for (int c = 0; c < 2; c++) {
        if (pair[c] < 0) continue;
        const float a = fmaf(low[c], DEFERRED_SCALE, bias_low), b = fmaf(high[c], DEFERRED_SCALE, bias_high);
        if constexpr (UP) {
            const float gate = least(a, limit), up = most(least(b, limit), -limit);
            const float activated = __fdividef(gate, 1.0f + __expf(-1.702f * gate));
            out[(size_t)pair[c] * INTER + strip * 8 + g] = narrow(activated * (up + 1.0f));
        } else {
            bf16* const at = out + (size_t)pair[c] * HIDDEN + strip * 16 + g;
            at[0] = narrow(weight[c] * a);
            at[8] = narrow(weight[c] * b);
        }
    }
}

// --- Few tokens: at most 8, and 32 pairs -----------------------------------------------------------------------------
// The work is a list: for each distinct expert among the pairs, its strips, in groups of GROUPS. A block takes one run
// of it: all blocks are resident at once, start once and stream equally much. The parts of K are spread over its warps,
// each of which has its next strip's tiles in flight while it multiplies this one's: 3 KB, so 76 KB a multiprocessor
// with three blocks, as many as 80 registers and up to 58 KB of shared memory allow. A lane knows one pair: what there
// is to find about experts, warps find among their lanes, each for itself, since a run is only some strips long.
//
// `down` asks for its first strips before `up` has ended, as its blocks take the places of `up`'s one by one.

template <class M, bool UP>
__device__ __forceinline__ void few_tokens(
    const bf16* source, bf16* out, const uint4* values, const uint32_t* scales,
    const bf16* bias, const long long* ids, const float* weights, int pairs, int active, float limit) {
    constexpr uint32_t ALL = 0xFFFFFFFFu;
    constexpr int PITCH = M::TILES * 128 + 16, PIECES = M::TILES * 8;
    extern __shared__ __align__(16) unsigned char rows[];  // UP: [tokens][PITCH]. DOWN: [pairs of an expert][PITCH]
    __shared__ float4 partial[2][WARPS][32];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int share = warp % M::SHARES, group = warp / M::SHARES, tiles = opaque(M::tiles_of(share));

    // The router has ended and its ids are visible when this returns. `down` starts once every block of `up` is past
    // it, and so may read the ids, and weights, before it waits for `up` to end.
    if constexpr (UP) wait_for_predecessors();
    launch_dependents();
    const int id = lane < pairs ? (int)__ldcg(ids + lane) : -1;
    const float weight_of_pair = !UP && lane < pairs ? __ldcg(weights + lane) : 0.0f;
    const uint32_t peers = __match_any_sync(ALL, id);  // the pairs of this lane's expert
    uint32_t left = __ballot_sync(ALL, id >= 0 && (peers & ((1u << lane) - 1)) == 0);  // the first pair of each expert
    const uint32_t work = __popc(left) * M::STRIP_GROUPS;
    int item = blockIdx.x * work / gridDim.x;
    const int end = (blockIdx.x + 1) * work / gridDim.x;
    if (item == end) return;
    int at = item % M::STRIP_GROUPS;  // group of strips
    for (int skip = item / M::STRIP_GROUPS; skip > 0; skip--) left &= left - 1;
    int expert = __shfl_sync(ALL, id, __ffs(left) - 1);

    uint4 value[M::DEPTH];
    uint32_t scale[M::DEPTH];  // rows g and g + 8 in the tile's first block of columns, then in the second
    const uint4* value_at;
    const uint32_t* scale_at;
    const auto aim = [&](int expert, int at) {  // past the end: the last strip's
        const int strip = min(at * M::GROUPS + group, M::STRIPS - 1);
        const uint32_t tile = (expert * M::STRIPS + strip) * M::TILES + M::first(share);
        value_at = values + (size_t)tile * 32 + lane;
        scale_at = scales + (size_t)tile * 8 + g;
    };
    const auto load = [&](int j) {
        value[j] = load_values(value_at + j * 32);
        scale[j] = load_scales(scale_at + j * 8);
    };
    aim(expert, at);
#pragma unroll
    for (int j = 0; j < M::DEPTH; j++)
        if (j < tiles) load(j);

    const auto stage = [&](int to, int from) {
        for (int piece = thread; piece < PIECES; piece += THREADS) {
            const bool inside = piece * 8 < M::K;  // zeros past the last column
            copy_async(rows + to * PITCH + piece * 16, source + (size_t)from * M::K + (inside ? piece * 8 : 0),
                       inside ? 16 : 0);
        }
    };
    if constexpr (UP) {
        for (int token = 0; token * active < pairs; token++) stage(token, token);
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
    } else {
        wait_for_predecessors();  // `up` has ended, h is visible
    }
    for (int turn = 0; item < end;) {
        // The expert's pairs: lane l knows the (l % 8)-th; past the last one, the first, and nobody uses its products.
        uint32_t others = __shfl_sync(ALL, peers, __ffs(left) - 1);
        const int live = __popc(others);
        int pair = __ffs(others) - 1;
        for (int i = 1; i < live; i++) {
            others &= others - 1;
            if (lane % 8 == i) pair = __ffs(others) - 1;
        }
        if constexpr (!UP) {  // every warp is past the last turn's barrier, and reads the last expert's rows no more
            for (int i = 0; i < live; i++) stage(i, __shfl_sync(ALL, pair, i));
            commit_copies();
            wait_for_copies<0>();
            __syncthreads();
        }
        const int row = UP ? pair / active : lane % 8 < live ? lane % 8 : 0;
        const uint32_t activations = shared_address(rows) + row * PITCH + lane / 8 * 16 + M::first(share) * 128;
        const int until = min(end, item + M::STRIP_GROUPS - at);
        left &= left - 1;
        const int next_expert = __shfl_sync(ALL, id, left != 0 ? __ffs(left) - 1 : 0);
#pragma unroll 1
        for (; item < until; item++, at++, turn++) {
            const bool more = item + 1 < end;
            if (item + 1 < until) aim(expert, at + 1);
            else if (more) aim(next_expert, 0);
            const int job = (warp + turn) % WARPS, strip = at * M::GROUPS + job;  // which warps add up
            const bool busy = job < M::GROUPS && strip < M::STRIPS;
            uint32_t biases = 0;  // asked for well before they are needed
            if (busy) biases = biases_of<M, UP>(bias, expert, strip, g);
            float sum[1][4] = {};
#pragma unroll
            for (int j = 0; j < M::DEPTH; j++) {
                if (j >= tiles) break;
                multiply_tile<1, PITCH>(sum, value[j], scale[j], activations + j * 128, 8);
                if (more) load(j);
            }
            partial[turn % 2][warp][lane] = make_float4(sum[0][0], sum[0][1], sum[0][2], sum[0][3]);
            __syncthreads();  // the other half of `partial` has been read, too, by every warp that is here
            if (busy) {
                float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
                for (int s = 0; s < M::SHARES; s++) {
                    const float4 part = partial[turn % 2][job * M::SHARES + s][lane];
                    total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
                }
                int pair_of[2];
                float weight[2];
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const int of_token = __shfl_sync(ALL, pair, 2 * t + c);
                    weight[c] = __shfl_sync(ALL, weight_of_pair, of_token);
                    pair_of[c] = 2 * t + c < live ? of_token : -1;
                }
                finish<UP>(total, strip, g, pair_of, weight, biases, limit, out);
            }
        }
        at = 0, expert = next_expert;
    }
}

#define FEW_TOKENS(NAME, MATRIX, UP)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) NAME(                                                     \
        const bf16* source, bf16* out, const uint4* values, const uint32_t* scales,                  \
        const bf16* bias, const long long* ids, const float* weights, int pairs, int active, float limit) {   \
        few_tokens<MATRIX, UP>(source, out, values, scales, bias, ids, weights, pairs, active, limit);                 \
    }
FEW_TOKENS(experts_up_8, Up, true)
FEW_TOKENS(experts_down_8, Down, false)

// --- Small batches: at most 256 pairs --------------------------------------------------------------------------------
// As above, with 128 registers x 512 threads, one block a multiprocessor: 24 pairs of an expert at once, 139 KB, and 48
// KB of sums. Two teams of 8 warps take turns in a block's run, which is long: 87 strips when all 32 experts are
// chosen. One copy of the activations serves both; where a run goes on with the next expert it changes, while weights
// keep arriving.

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

template <int N>
struct Number {
    static constexpr int value = N;
};

// capacity: rows of activations in shared memory, at most 8 MOST_N. Reads of rows past them end in the sums.
template <class M, bool UP>
__device__ __forceinline__ void small_batch(
    const bf16* source, bf16* out, const uint4* values, const uint32_t* scales,
    const bf16* bias, const long long* ids, const float* weights, int pairs, int active, int capacity,
    float limit) {
    constexpr int TEAMS = 2, MOST_N = 3, PITCH = M::TILES * 128 + 16, PARTIAL = WARPS * MOST_N * 32;
    extern __shared__ __align__(16) unsigned char shared[];
    unsigned char* const rows = shared;  // [capacity][PITCH]
    __shared__ uint32_t chosen[32];       // a bit for each expert
    __shared__ uint32_t votes[WARPS];     // of each warp's pairs, those of this expert
    __shared__ int expert_of[MOST_PAIRS];
    __shared__ int pair_of[MOST_PAIRS];   // the expert's pairs, ascending
    __shared__ float weight_of[MOST_PAIRS];  // of every pair
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int team = warp / WARPS, in_team = warp % WARPS;
    const int share = in_team % M::SHARES, group = in_team / M::SHARES, tiles = opaque(M::tiles_of(share));
    float4* const partial = reinterpret_cast<float4*>(shared + capacity * PITCH) + team * 2 * PARTIAL;

    if (thread < 32) chosen[thread] = 0;
    __syncthreads();
    if constexpr (UP) wait_for_predecessors();  // and `down` may read ids before it waits: see few_tokens
    launch_dependents();
    if (thread < pairs) {
        const int id = (int)__ldcg(ids + thread);
        if (!UP) weight_of[thread] = __ldcg(weights + thread);
        expert_of[thread] = id;
        atomicOr(&chosen[id / 32], 1u << (id % 32));
    }
    __syncthreads();
    const uint32_t work = __reduce_add_sync(0xFFFFFFFFu, __popc(chosen[lane])) * M::STRIP_GROUPS;
    const int begin = blockIdx.x * work / gridDim.x, end = (blockIdx.x + 1) * work / gridDim.x;
    if (begin == end) return;

    Stream<M> stream(values, scales);
    int item = begin + team;  // the team's next group of strips: its first tiles are in flight
    if (item < end) {
        const int n = item / M::STRIP_GROUPS;
        stream.aim(nth_set_bit(chosen[lane], n, lane), (item - n * M::STRIP_GROUPS) * M::GROUPS + group, share);
        stream.load_all(M::tiles_of(share));
    }
    int turn = 0;  // groups done; also which half of `partial` is free, and which warps add up
    for (int n = begin / M::STRIP_GROUPS; n * M::STRIP_GROUPS < end; n++) {
        const int expert = nth_set_bit(chosen[lane], n, lane), until = min((n + 1) * M::STRIP_GROUPS, end);
        const bool mine = thread < pairs && expert_of[thread] == expert;
        const uint32_t vote = __ballot_sync(0xFFFFFFFFu, mine);
        __syncthreads();  // nobody reads the last expert's votes and pairs any more
        if (lane == 0 && warp < WARPS) votes[warp] = vote;
        __syncthreads();
        int count = 0, rank = __popc(vote & ((1u << lane) - 1));
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const int of_warp = __popc(votes[w]);
            count += of_warp;
            rank += w < warp ? of_warp : 0;
        }
        if (mine) pair_of[rank] = thread;
        if (!UP && n == begin / M::STRIP_GROUPS) wait_for_predecessors();  // `up` has ended, h is visible

        for (int base = 0; base < count; base += capacity) {
            const int live = min(count - base, capacity);
            const bool again = base + capacity < count;  // the same strips for more pairs
            __syncthreads();  // pair_of is written, and nobody reads `rows` any more
            stage<M, UP, M::TILES, TEAMS * THREADS>(rows, source, pair_of + base, live, active, 0);
            commit_copies();
            wait_for_copies<0>();
            __syncthreads();
            const uint32_t activations = matrix_address<PITCH>(rows, capacity - 1) + M::first(share) * 128;
            auto run = [&](auto number) {
                constexpr int N_TILES = decltype(number)::value, JOBS = M::GROUPS * N_TILES;
#pragma unroll 1
                for (int at = item; at < until; at += TEAMS, turn++) {
                    const int next = at + TEAMS >= until && again ? item : at + TEAMS, next_n = next / M::STRIP_GROUPS;
                    const bool more = next < end;
                    stream.aim(more && next_n != n ? nth_set_bit(chosen[lane], next_n, lane) : expert,
                               (next - next_n * M::STRIP_GROUPS) * M::GROUPS + group, share);
                    const int first_strip = (at - n * M::STRIP_GROUPS) * M::GROUPS;
                    const int first_job = (in_team + turn) % WARPS;
                    uint32_t biases = 0;  // asked for well before they are needed
                    if (first_job < JOBS && first_strip + first_job / N_TILES < M::STRIPS)
                        biases = biases_of<M, UP>(bias, expert, first_strip + first_job / N_TILES, g);
                    float sum[N_TILES][4] = {};
#pragma unroll
                    for (int j = 0; j < M::DEPTH; j++) {
                        if (j >= tiles) break;
                        multiply_tile<N_TILES, PITCH>(
                            sum, stream.value[j], stream.scale[j], activations + j * 128, 8 * N_TILES);
                        if (more) stream.load(j);
                    }
                    float4* const now = partial + turn % 2 * PARTIAL;
#pragma unroll
                    for (int i = 0; i < N_TILES; i++)
                        now[(in_team * N_TILES + i) * 32 + lane] =
                            make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
                    wait_for_team(team);  // every warp that is here has read the other half of `partial`, too
#pragma unroll 1
                    for (int job = first_job; job < JOBS; job += WARPS) {
                        const int of_group = job / N_TILES, i = job % N_TILES, strip = first_strip + of_group;
                        if (i * 8 >= live || strip >= M::STRIPS) continue;
                        if (job != first_job) biases = biases_of<M, UP>(bias, expert, strip, g);
                        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 2
                        for (int s = 0; s < M::SHARES; s++) {
                            const float4 part = now[((of_group * M::SHARES + s) * N_TILES + i) * 32 + lane];
                            total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
                        }
                        const int token = i * 8 + 2 * t;
                        const int pair[2] = {
                            token < live ? pair_of[base + token] : -1,
                            token + 1 < live ? pair_of[base + token + 1] : -1};
                        float weight[2] = {};
#pragma unroll
                        for (int c = 0; c < 2; c++)
                            if (!UP && pair[c] >= 0) weight[c] = weight_of[pair[c]];
                        finish<UP>(total, strip, g, pair, weight, biases, limit, out);
                    }
                }
            };
            if (live <= 8) run(Number<1>());
            else if (live <= 16) run(Number<2>());
            else run(Number<3>());
        }
        while (item < until) item += TEAMS;
    }
}

#define SMALL_BATCH(NAME, MATRIX, UP)                                                                                  \
    extern "C" __global__ void __launch_bounds__(2 * THREADS, 1) NAME(                                                 \
        const bf16* source, bf16* out, const uint4* values, const uint32_t* scales,                  \
        const bf16* bias, const long long* ids, const float* weights, int pairs, int active, int capacity,    \
        float limit) {                                                                                                 \
        small_batch<MATRIX, UP>(                                                                                       \
            source, out, values, scales, bias, ids, weights, pairs, active, capacity, limit);                          \
    }
SMALL_BATCH(experts_up_24, Up, true)
SMALL_BATCH(experts_down_24, Down, false)

// --- Large batches ---------------------------------------------------------------------------------------------------

// Block (x, y): strips 8 x .. 8 x + 7, one a warp, for the pairs of tile y. Activations come to shared memory a part of
// K at a time, the next part while this one is multiplied.
template <class M, bool UP>
__device__ __forceinline__ void large_batch(
    const bf16* source, bf16* out, const uint4* values, const uint32_t* scales,
    const bf16* bias, const int4* all_tiles, const int* order, const float* weights, int active, float limit) {
    constexpr int N_TILES = LARGE_TOKENS / 8, PITCH = M::DEPTH * 128 + 16;
    extern __shared__ __align__(16) unsigned char shared[];  // [2][LARGE_TOKENS][PITCH]
    __shared__ int pair_of[LARGE_TOKENS];
    __shared__ float weight_of[LARGE_TOKENS];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int strip = blockIdx.x * WARPS + warp;

    launch_dependents();
    wait_for_predecessors();
    const int4 tile = __ldcg(all_tiles + blockIdx.y);
    const int expert = tile.x, live = tile.z;
    if (live == 0) return;
    Stream<M> stream(values, scales);
    stream.aim(expert, strip, 0);
    stream.load_all(M::tiles_of(0));
    if (thread < live) {
        const int pair = __ldcg(order + tile.y + thread);
        pair_of[thread] = pair;
        if (!UP) weight_of[thread] = __ldcg(weights + pair);
    }
    __syncthreads();
    auto stage_share = [&](int share) {  // always DEPTH tiles: a shorter part's last one is not used
        unsigned char* const to = shared + share % 2 * (LARGE_TOKENS * PITCH);
        stage<M, UP, M::DEPTH, THREADS>(to, source, pair_of, live, active, M::first(share));
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
        const uint32_t activations = matrix_address<PITCH>(shared + share % 2 * (LARGE_TOKENS * PITCH), 7);
        const int tiles = M::tiles_of(share), next_tiles = next < M::SHARES ? M::tiles_of(next) : 0;
        stream.aim(expert, strip, next);
        float sum[N_TILES][4] = {};
#pragma unroll
        for (int j = 0; j < M::DEPTH; j++) {
            if (j >= tiles) break;
            multiply_tile<N_TILES, PITCH>(sum, stream.value[j], stream.scale[j], activations + j * 128, live);
            if (j < next_tiles) stream.load(j);
        }
#pragma unroll
        for (int n = 0; n < N_TILES; n++)
#pragma unroll
            for (int c = 0; c < 4; c++) total[n][c] += sum[n][c];
    }
    if (strip >= M::STRIPS) return;
    const uint32_t biases = biases_of<M, UP>(bias, expert, strip, g);
#pragma unroll
    for (int n = 0; n < N_TILES; n++) {
        const int token = n * 8 + 2 * t;
        const int pair[2] = {token < live ? pair_of[token] : -1, token + 1 < live ? pair_of[token + 1] : -1};
        const float weight[2] = {UP ? 0.0f : weight_of[token], UP ? 0.0f : weight_of[token + 1]};
        finish<UP>(make_float4(total[n][0], total[n][1], total[n][2], total[n][3]), strip, g, pair, weight, biases,
                   limit, out);
    }
}

#define LARGE_BATCH(NAME, MATRIX, UP)                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME(                                                     \
        const bf16* source, bf16* out, const uint4* values, const uint32_t* scales,                  \
        const bf16* bias, const int4* tiles, const int* order, const float* weights, int active,              \
        float limit) {                                                                                                 \
        large_batch<MATRIX, UP>(source, out, values, scales, bias, tiles, order, weights, active, limit);              \
    }
LARGE_BATCH(experts_up_64, Up, true)
LARGE_BATCH(experts_down_64, Down, false)

#endif  // HIDDEN
