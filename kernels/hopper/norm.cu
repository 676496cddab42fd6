// What stands between the products: RMSNorm, residual add + RMSNorm, embedding rows, and the router with its top-k.
// H is the macro HIDDEN, a multiple of 8.
//
// rms_norm, add_rms_norm, embed: x [T, H] bf16, a block a row, 16 bytes a thread and access, a row kept in registers.
//   They move 4 H, 8 H and 4 H bytes a token (11.5 to 23 KB at 2880: 0.5 us of bandwidth at 64 tokens); up to 256
//   tokens latency is all: two trips to L2 and a reduction, about 2 us.
// route: x [T, H], weight [E, H] bf16 -> the `active` largest logits' experts and the softmax over them. Reads 2 E H
//   bytes of weights (184 KB at 32 experts, 737 KB at 128): 0.1 and 0.2 us for the whole machine, but 2 and 7 us for
//   one multiprocessor. So a cluster of 8 blocks takes a token, a warp an expert, whose whole row lies in the warp's
//   registers before the wait for the previous kernel; a cluster keeps its weights for all of its tokens. Logits
//   meet in the first block's shared memory. They are float32 throughout: rounding them makes ties.
// Every sum has one order, whatever T.

#ifndef HIDDEN
#error "HIDDEN: columns of x, a multiple of 8"
#endif

namespace {

using bf16 = unsigned short;  // its bits: NVRTC has no headers to offer

constexpr int PIECES = HIDDEN / 8;  // 16-byte pieces of a row
constexpr int THREADS = 384;        // of a row's block: 360 pieces at 2880
constexpr int WARPS = THREADS / 32;
constexpr int TURNS = (PIECES + THREADS - 1) / THREADS;  // pieces a thread takes: piece = thread + turn * THREADS
constexpr int LANE_TURNS = (PIECES + 31) / 32;           // pieces a lane takes where a warp takes a row

constexpr int RANKS = 8;          // blocks of a router's cluster, as many as are portable
constexpr int MOST_EXPERTS = 128;
constexpr int ROUTER_WARPS = MOST_EXPERTS / RANKS;
constexpr int MOST_TOKENS = 2;    // that a cluster takes between two barriers; 4 would ask for more than 48 KB

static_assert(HIDDEN % 8 == 0, "a row is read 16 bytes at a time");

__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Constants: weights. Not .nc, which ptxas moves below griddepcontrol.wait.
__device__ __forceinline__ uint4 load_constant(const void* at) {
    uint4 piece;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w) : "l"(at));
    return piece;
}

// Activations, from L2: while this kernel waits, an earlier one may bring what this place held before into this
// multiprocessor's L1.
__device__ __forceinline__ uint4 load(const void* at) {
    uint4 piece;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w) : "l"(at) : "memory");
    return piece;
}

__device__ __forceinline__ float low(unsigned pair) { return __uint_as_float(pair << 16); }

__device__ __forceinline__ float high(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ unsigned round_pair(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ void widen(float (&wide)[8], uint4 piece) {
    const unsigned pairs[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) wide[2 * i] = low(pairs[i]), wide[2 * i + 1] = high(pairs[i]);
}

__device__ __forceinline__ uint4 narrow(const float (&wide)[8]) {
    return make_uint4(round_pair(wide[0], wide[1]), round_pair(wide[2], wide[3]), round_pair(wide[4], wide[5]),
                      round_pair(wide[6], wide[7]));
}

// The same in every lane: a butterfly adds the same pairs on both sides.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

// out = sum / rms(sum) * weight, where sum is x, or x + delta rounded to bf16 and stored to `residual`.
template <bool ADD>
__device__ __forceinline__ void norm_row(
    const bf16* x, const bf16* delta, const float* weight, bf16* residual, bf16* out, float eps
) {
    __shared__ float of_warp[WARPS];
    let_next_start();
    uint4 scale[TURNS][2];
    float row[TURNS][8];
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int piece = threadIdx.x + turn * THREADS;
        if (piece < PIECES)
#pragma unroll
            for (int half = 0; half < 2; ++half) scale[turn][half] = load_constant(weight + piece * 8 + half * 4);
    }
    wait_for_previous();
    float squares = 0;
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int piece = threadIdx.x + turn * THREADS;
        const size_t at = size_t(blockIdx.x) * HIDDEN + piece * 8;
        if (piece < PIECES) {
            const uint4 given = load(x + at);
            if (ADD) {
                const uint4 added = load(delta + at);
                float more[8];
                widen(row[turn], given);
                widen(more, added);
#pragma unroll
                for (int i = 0; i < 8; ++i) row[turn][i] += more[i];
                const uint4 rounded = narrow(row[turn]);
                *reinterpret_cast<uint4*>(residual + at) = rounded;
                widen(row[turn], rounded);
            } else {
                widen(row[turn], given);
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) squares += row[turn][i] * row[turn][i];
        }
    }
    squares = warp_sum(squares);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = squares;
    __syncthreads();
    squares = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) squares += of_warp[warp];
    const float inverse = rsqrtf(squares * (1.0f / HIDDEN) + eps);
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int piece = threadIdx.x + turn * THREADS;
        if (piece < PIECES) {
            const uint4 first = scale[turn][0], second = scale[turn][1];
            const unsigned bits[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
            for (int i = 0; i < 8; ++i) row[turn][i] = row[turn][i] * inverse * __uint_as_float(bits[i]);
            *reinterpret_cast<uint4*>(out + size_t(blockIdx.x) * HIDDEN + piece * 8) = narrow(row[turn]);
        }
    }
}

// Larger for larger floats; NaN (positive) above all, both zeros alike.
__device__ __forceinline__ unsigned order_of(float value) {
    const unsigned bits = __float_as_uint(value + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(unsigned order) {
    return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

// One warp: logits [experts] in shared memory -> ids and shares of the `active` largest, the lower id first of equals.
__device__ __forceinline__ void choose(const float* logits, int experts, int active, long long* ids, float* shares) {
    const int lane = threadIdx.x % 32;
    unsigned long long keys[MOST_EXPERTS / 32];  // order of the logit, then of the id; unlike, and none is zero
#pragma unroll
    for (int i = 0; i < MOST_EXPERTS / 32; ++i) {
        const int expert = lane + i * 32;
        keys[i] = expert < experts ? (unsigned long long)order_of(logits[expert]) << 32 | (MOST_EXPERTS - expert) : 0;
    }
    float top = 0, share = 0, total = 0;
    for (int rank = 0; rank < active; ++rank) {
        unsigned long long best = 0;
#pragma unroll
        for (int i = 0; i < MOST_EXPERTS / 32; ++i) best = keys[i] > best ? keys[i] : best;
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
            const unsigned long long other = __shfl_xor_sync(0xffffffffu, best, distance);
            best = other > best ? other : best;
        }
#pragma unroll
        for (int i = 0; i < MOST_EXPERTS / 32; ++i) keys[i] = keys[i] == best ? 0 : keys[i];
        const float value = value_of(unsigned(best >> 32));
        if (rank == 0) top = value;
        const float weight = expf(value - top);
        total += weight;  // in the order of choice, the same in every lane
        if (lane == rank) {
            share = weight;
            ids[lane] = MOST_EXPERTS - int(unsigned(best));
        }
    }
    if (lane < active) shares[lane] = share / total;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(
    const bf16* x, const float* weight, bf16* out, float eps
) {
    norm_row<false>(x, nullptr, weight, nullptr, out, eps);
}

extern "C" __global__ void __launch_bounds__(THREADS) add_rms_norm(
    const bf16* x, const bf16* delta, const float* weight, bf16* residual, bf16* out, float eps
) {
    norm_row<true>(x, delta, weight, residual, out, eps);
}

extern "C" __global__ void __launch_bounds__(THREADS) embed(const int* tokens, const bf16* table, bf16* out) {
    let_next_start();
    wait_for_previous();
    int token;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(token) : "l"(tokens + blockIdx.x) : "memory");
    for (int piece = threadIdx.x; piece < PIECES; piece += THREADS)
        *reinterpret_cast<uint4*>(out + size_t(blockIdx.x) * HIDDEN + piece * 8) =
            load_constant(table + size_t(token) * HIDDEN + piece * 8);
}

// Grid (RANKS, clusters); a block has a warp for every RANKS-th expert. A cluster takes `group` <= MOST_TOKENS tokens
// at once, then as many again, further on by what all clusters take.
extern "C" __global__ void __cluster_dims__(RANKS, 1, 1) __launch_bounds__(ROUTER_WARPS * 32, 1) route(
    const bf16* x, const bf16* weight, const bf16* bias, long long* ids, float* shares, int tokens, int experts,
    int active, int group
) {
    // Both are used in turns: what comes next is written while the last is read, with one barrier between turns.
    __shared__ uint4 inputs[2][MOST_TOKENS][PIECES];
    __shared__ float logits[2][MOST_TOKENS][MOST_EXPERTS];  // the first block's takes the whole cluster's
    let_next_start();
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");  // nobody writes to a block that is yet to start
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rank = blockIdx.x, expert = warp * RANKS + rank;
    const bool busy = expert < experts;  // the same in a warp
    uint4 row[LANE_TURNS];
    float offset = 0;
#pragma unroll
    for (int turn = 0; turn < LANE_TURNS; ++turn) {
        row[turn] = make_uint4(0, 0, 0, 0);
        if (busy && lane + turn * 32 < PIECES)
            row[turn] = load_constant(weight + size_t(expert) * HIDDEN + (lane + turn * 32) * 8);
    }
    if (busy) offset = __uint_as_float(unsigned(bias[expert]) << 16);
    asm volatile("barrier.cluster.wait;" ::: "memory");
    wait_for_previous();

    const auto fetch = [&](int begin, int turn) {  // cp.async.cg reads from L2, as `load` does
        const int pieces = min(group, tokens - begin) * PIECES;
        const unsigned to = unsigned(__cvta_generic_to_shared(&inputs[turn][0][0]));
        for (int i = threadIdx.x; i < pieces; i += blockDim.x)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                         :: "r"(to + i * 16), "l"(x + size_t(begin) * HIDDEN + i * 8) : "memory");
    };
    unsigned first;  // the first block's logits
    asm("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(first) : "r"(unsigned(__cvta_generic_to_shared(logits))));
    const int stride = gridDim.y * group;
    int turn = 0;
    if (int(blockIdx.y) * group < tokens) fetch(blockIdx.y * group, turn);
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    for (int begin = blockIdx.y * group; begin < tokens; begin += stride) {
        const int count = min(group, tokens - begin);
        if (begin + stride < tokens) fetch(begin + stride, turn ^ 1);
        if (busy)
            for (int token = 0; token < count; ++token) {
                float sum = 0;
#pragma unroll
                for (int i = 0; i < LANE_TURNS; ++i)
                    if (lane + i * 32 < PIECES) {
                        float left[8], right[8];
                        widen(left, row[i]);
                        widen(right, inputs[turn][token][lane + i * 32]);
#pragma unroll
                        for (int j = 0; j < 8; ++j) sum += left[j] * right[j];
                    }
                sum = warp_sum(sum) + offset;
                if (lane == 0)
                    asm volatile("st.shared::cluster.f32 [%0], %1;"
                                 :: "r"(first + ((turn * MOST_TOKENS + token) * MOST_EXPERTS + expert) * 4), "f"(sum)
                                 : "memory");
            }
        asm volatile("cp.async.wait_all;\nbarrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
        if (rank == 0)
            for (int token = warp; token < count; token += blockDim.x / 32)
                choose(logits[turn][token], experts, active, ids + size_t(begin + token) * active,
                       shares + size_t(begin + token) * active);
        turn ^= 1;
    }
}
