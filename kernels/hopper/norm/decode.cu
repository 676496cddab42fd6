// What stands between the products: embedding + RMSNorm, residual add + RMSNorm, the same with the router's top-k.
// H is the macro HIDDEN, a multiple of 8.
//
// embed_norm, add_norm: a row [H] bf16 a block, 16 bytes a thread and access, kept in registers. add_norm sums the
//   parts of what is added first: one, or the weighted outputs of a token's experts. They move 6 H and 6 H + 2 H parts
//   bytes a token (17 to 40 KB at 2880: 1 us of bandwidth at 64 tokens); up to 256 tokens latency is all: two trips to
//   L2 and a reduction, about 2 us.
// add_norm_route: add_norm, then weight [E, H] bf16 -> the `active` largest logits' experts and the softmax over them.
//   Reads 2 E H bytes of weights (184 KB at 32 experts, 737 KB at 128): 0.1 and 0.2 us for the whole machine, but 2 and
//   7 us for one multiprocessor. So a cluster of 8 blocks takes a token, a warp an expert, whose whole row lies in the
//   warp's registers before the wait for the previous kernel; a cluster keeps its weights for all of its tokens. Each
//   of its blocks norms the row for itself: cheaper than a kernel more. Logits meet in the first block's shared memory.
//   They are float32 throughout: rounding them makes ties.
// route: the same choice for many rows that are normed already, by tensor cores.
// Every sum has one order, whatever T.
//
// With RANKS > 1 what is added is the sum over the ranks, too, and these kernels exchange it: each rank writes its row,
// in bf16, to the memory of the others, which wait for it there. No flags: a word that is EMPTY has not come yet, no
// rounding gives that word, and the reader of a row makes it EMPTY again. Two areas take turns, one for what follows
// attention, one for what follows the experts. A rank writes to an area again only after an exchange through the other
// one, to which its peers contributed after their kernels that read and emptied the first had ended: so nothing counts
// replays, and buckets may follow each other as they like. Ranks are added in their order, in float32, and the sum is
// rounded to bf16: the same bytes on every rank, and by both ways to exchange:
//   one shot (decode): a row goes to all others; each adds. RANKS - 1 rows out, one hop. add_norm_route finds the rows
//     there, or on their way: linear.cu sent them.
//   two shots (prefill): to the row's owner, which adds and sends the sum to all: 2 (RANKS - 1) / RANKS rows out a row.
// A row waits only for the same row of others, and sends before it waits: blocks of late rows need not be resident.

#if !defined(HIDDEN) || !defined(RANKS)
#error "HIDDEN: columns of x, a multiple of 8; RANKS: that share the model"
#endif

namespace {

using bf16 = unsigned short;  // its bits: NVRTC has no headers to offer

constexpr int PIECES = HIDDEN / 8;  // 16-byte pieces of a row
constexpr int THREADS = 384;        // of a row's block: 360 pieces at 2880
constexpr int WARPS = THREADS / 32;
constexpr int TURNS = (PIECES + THREADS - 1) / THREADS;  // pieces a thread takes: piece = thread + turn * THREADS
constexpr int LANE_TURNS = (PIECES + 31) / 32;           // pieces a lane takes where a warp takes a row

constexpr int ROUTER_BLOCKS = 8;          // blocks of a router's cluster, as many as are portable
constexpr int MOST_EXPERTS = 128;
constexpr int ROUTER_WARPS = MOST_EXPERTS / ROUTER_BLOCKS;
constexpr int MOST_TOKENS = 2;    // that a cluster takes between two barriers
constexpr int AHEAD = RANKS <= 2 ? 3 : 1;  // pieces that a thread of the router loads at once

constexpr int MANY_TOKENS = 16;   // of a block of `route`
constexpr int MANY_WARPS = 8;

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

constexpr unsigned EMPTY = 0xffffffffu;  // two NaNs that no rounding makes

__device__ __forceinline__ bool has_come(uint4 piece) {
    return piece.x != EMPTY && piece.y != EMPTY && piece.z != EMPTY && piece.w != EMPTY;
}

// An area of every rank's memory, in pieces of 16 bytes, as this rank sees them.
struct Area {
    int rank;
    uint4* own;
    uint4* others[RANKS];  // RANKS - 1, in their order

    Area() = default;
    // `memories` holds the addresses, which never change: this may run before the wait for the previous kernel.
    __device__ __forceinline__ Area(const unsigned long long* memories, int offset, int own_rank) : rank(own_rank) {
        if (RANKS == 1) return;
        own = reinterpret_cast<uint4*>(memories[rank] + offset);
#pragma unroll
        for (int i = 0; i < RANKS - 1; ++i) others[i] = reinterpret_cast<uint4*>(memories[rank_of(i)] + offset);
    }
    __device__ __forceinline__ int rank_of(int other) const { return other < rank ? other : other + 1; }
    __device__ __forceinline__ void send(int other, size_t place, uint4 piece) const {
        asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};"
                     :: "l"(others[other] + place), "r"(piece.x), "r"(piece.y), "r"(piece.z), "r"(piece.w) : "memory");
    }
    __device__ __forceinline__ uint4 look(size_t place) const {
        uint4 piece;
        asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w) : "l"(own + place) : "memory");
        return piece;
    }
    __device__ __forceinline__ uint4 wait(size_t place) const {
        uint4 piece = look(place);
        while (!has_come(piece)) piece = look(place);
        return piece;
    }
    __device__ __forceinline__ void empty(size_t place) const { own[place] = make_uint4(EMPTY, EMPTY, EMPTY, EMPTY); }
};

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

// row * inverse * weight, eight of each.
__device__ __forceinline__ void scaled(float (&row)[8], float inverse, const uint4 (&weight)[2]) {
    const unsigned bits[8] = {weight[0].x, weight[0].y, weight[0].z, weight[0].w,
                              weight[1].x, weight[1].y, weight[1].z, weight[1].w};
#pragma unroll
    for (int i = 0; i < 8; ++i) row[i] = row[i] * inverse * __uint_as_float(bits[i]);
}

// The same in every lane: a butterfly adds the same pairs on both sides.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

// The float32 sum of `parts` pieces, each HIDDEN elements after the one before, in their order.
__device__ __forceinline__ void sum_parts(float (&sum)[8], const bf16* first, int parts) {
    constexpr int BATCH = 4;  // loads under way at once
    for (int base = 0; base < parts; base += BATCH) {
        uint4 piece[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            if (base + i < parts) piece[i] = load(first + size_t(base + i) * HIDDEN);
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            if (base + i < parts) {
                float more[8];
                widen(more, piece[i]);
#pragma unroll
                for (int j = 0; j < 8; ++j) sum[j] = base + i == 0 ? more[j] : sum[j] + more[j];
            }
    }
}

// Pieces of all ranks, this one's and those of the others -> their sum in the order of ranks, rounded to bf16.
__device__ __forceinline__ uint4 sum_ranks(const Area& area, uint4 own, const uint4* others) {
    float sum[8], more[8];
#pragma unroll
    for (int rank = 0; rank < RANKS; ++rank) {
        uint4 piece = own;  // this rank's, or that of another: no index known at run time
        if (rank < RANKS - 1 && rank < area.rank) piece = others[rank];
        if (rank > 0 && rank > area.rank) piece = others[rank - 1];
        widen(more, piece);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] = rank == 0 ? more[i] : sum[i] + more[i];
    }
    return narrow(sum);
}

// This rank's piece of a row -> the sum over all ranks.
__device__ __forceinline__ uint4 one_shot(const Area& area, uint4 own, int row, int rows, int piece) {
    auto from = [&](int rank) { return (size_t(rank) * rows + row) * PIECES + piece; };
    uint4 others[RANKS];
#pragma unroll
    for (int i = 0; i < RANKS - 1; ++i) area.send(i, from(area.rank), own);
#pragma unroll
    for (int i = 0; i < RANKS - 1; ++i) {
        others[i] = area.wait(from(area.rank_of(i)));
        area.empty(from(area.rank_of(i)));
    }
    return sum_ranks(area, own, others);
}

__device__ __forceinline__ uint4 two_shots(const Area& area, uint4 own, int row, int rows, int piece) {
    const int each = (rows + RANKS - 1) / RANKS, owner = row % RANKS;  // rows of an owner
    auto from = [&](int rank) { return (size_t(rank) * each + row / RANKS) * PIECES + piece; };
    const size_t of_sum = (size_t(RANKS) * each + row) * PIECES + piece;
    if (area.rank != owner) {
#pragma unroll
        for (int i = 0; i < RANKS - 1; ++i)
            if (area.rank_of(i) == owner) area.send(i, from(area.rank), own);
        const uint4 sum = area.wait(of_sum);
        area.empty(of_sum);
        return sum;
    }
    uint4 others[RANKS];
#pragma unroll
    for (int i = 0; i < RANKS - 1; ++i) {
        others[i] = area.wait(from(area.rank_of(i)));
        area.empty(from(area.rank_of(i)));
    }
    const uint4 sum = sum_ranks(area, own, others);
#pragma unroll
    for (int i = 0; i < RANKS - 1; ++i) area.send(i, of_sum, sum);
    return sum;
}

// residual = the row given, or that plus the sum of parts and ranks, in bf16; out = residual / rms(residual) * weight.
template <bool EMBED, bool TWO_SHOTS>
__device__ __forceinline__ void norm_row(
    const bf16* rows, const int* tokens, const bf16* parts, int count, const float* weight, bf16* residual, bf16* out,
    float eps, Area area = {}
) {
    __shared__ float of_warp[WARPS];
    if (!EMBED) let_next_start();
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
    size_t from = blockIdx.x;
    if (EMBED) {
        let_next_start();  // only now: later kernels read what `advance`, the one before, wrote, and do not wait for it
        int token;
        asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(token) : "l"(tokens + blockIdx.x) : "memory");
        from = token;
    }
    float squares = 0;
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int piece = threadIdx.x + turn * THREADS;
        if (piece < PIECES) {
            uint4 given = load(rows + from * HIDDEN + piece * 8);
            if (!EMBED) {
                float more[8];
                sum_parts(more, parts + (size_t(blockIdx.x) * count * PIECES + piece) * 8, count);
                if (RANKS > 1)
                    widen(more, (TWO_SHOTS ? two_shots : one_shot)(area, narrow(more), blockIdx.x, gridDim.x, piece));
                widen(row[turn], given);
#pragma unroll
                for (int i = 0; i < 8; ++i) row[turn][i] += more[i];
                given = narrow(row[turn]);
            }
            *reinterpret_cast<uint4*>(residual + size_t(blockIdx.x) * HIDDEN + piece * 8) = given;
            widen(row[turn], given);
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
            scaled(row[turn], inverse, scale[turn]);
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
        const unsigned most = __reduce_max_sync(0xffffffffu, unsigned(best >> 32));  // the logit, then the id
        best = unsigned(best >> 32) == most ? best : 0;
        best = (unsigned long long)most << 32 | __reduce_max_sync(0xffffffffu, unsigned(best));
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

extern "C" __global__ void __launch_bounds__(THREADS) embed_norm(
    const int* tokens, const bf16* table, const float* weight, bf16* residual, bf16* out, float eps
) {
    norm_row<true, false>(table, tokens, nullptr, 0, weight, residual, out, eps);
}

extern "C" __global__ void __launch_bounds__(THREADS) add_norm(
    const bf16* x, const bf16* parts, const float* weight, bf16* residual, bf16* out, int count, float eps,
    const unsigned long long* memories, int offset, int rank
) {
    norm_row<false, false>(x, nullptr, parts, count, weight, residual, out, eps, Area(memories, offset, rank));
}

extern "C" __global__ void __launch_bounds__(THREADS) prefill_add_norm(
    const bf16* x, const bf16* parts, const float* weight, bf16* residual, bf16* out, int count, float eps,
    const unsigned long long* memories, int offset, int rank
) {
    norm_row<false, true>(x, nullptr, parts, count, weight, residual, out, eps, Area(memories, offset, rank));
}

// Grid (ROUTER_BLOCKS, clusters); a block has a warp for every ROUTER_BLOCKS-th expert. A cluster takes `group` <=
// MOST_TOKENS tokens at once, then as many again, further on by what all clusters take.
extern "C" __global__ void __cluster_dims__(ROUTER_BLOCKS, 1, 1) __launch_bounds__(ROUTER_WARPS * 32, 1) add_norm_route(
    const bf16* x, const bf16* delta, const float* scale, const bf16* weight, const bf16* bias, bf16* residual,
    bf16* out, long long* ids, float* shares, int tokens, int experts, int active, int group, float eps,
    const unsigned long long* memories, int offset, int rank
) {
    __shared__ uint4 rows[MOST_TOKENS][PIECES], factors[PIECES][2];
    __shared__ float of_warp[MOST_TOKENS][ROUTER_WARPS];
    __shared__ float logits[MOST_TOKENS][MOST_EXPERTS];  // the first block's takes the whole cluster's
    __shared__ unsigned long long arrived;               // and this counts their bytes: cheaper than a barrier of all
    let_next_start();
    if (blockIdx.x == 0 && threadIdx.x == 0)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;"
                     :: "r"(unsigned(__cvta_generic_to_shared(&arrived))) : "memory");
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");  // nobody writes to a block that is yet to start
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, block = blockIdx.x;
    const int expert = warp * ROUTER_BLOCKS + block;
    const int threads = blockDim.x;
    const bool busy = expert < experts;  // the same in a warp
    uint4 row[LANE_TURNS];
    float bias_of = 0;
#pragma unroll
    for (int turn = 0; turn < LANE_TURNS; ++turn) {
        row[turn] = make_uint4(0, 0, 0, 0);
        if (busy && lane + turn * 32 < PIECES)
            row[turn] = load_constant(weight + size_t(expert) * HIDDEN + (lane + turn * 32) * 8);
    }
    if (busy) bias_of = __uint_as_float(unsigned(bias[expert]) << 16);
    for (int piece = threadIdx.x; piece < PIECES; piece += threads)  // read back by the same thread
#pragma unroll
        for (int half = 0; half < 2; ++half) factors[piece][half] = load_constant(scale + piece * 8 + half * 4);
    const Area area(memories, offset, rank);
    asm volatile("barrier.cluster.wait;" ::: "memory");
    wait_for_previous();

    const unsigned own_arrived = unsigned(__cvta_generic_to_shared(&arrived));
    unsigned first, first_arrived;  // the first block's
    asm("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(first) : "r"(unsigned(__cvta_generic_to_shared(logits))));
    asm("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(first_arrived) : "r"(own_arrived));
    const int stride = gridDim.y * group;
    auto place = [&](int rank, int token, int piece) { return unsigned((rank * tokens + token) * PIECES + piece); };
    unsigned parity = 0;
    for (int begin = blockIdx.y * group; begin < tokens; begin += stride, parity ^= 1) {
        const int count = min(group, tokens - begin);
        if (block == 0 && threadIdx.x == 0)
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                         :: "r"(own_arrived), "r"(count * experts * 4) : "memory");
        // Each thread's own pieces stay its own until the row is normed: no barrier but the sum's.
        for (int token = 0; token < count; ++token) {
            float squares = 0;
            for (int base = threadIdx.x; base < PIECES; base += AHEAD * threads) {
                uint4 given[AHEAD], added[AHEAD], others[AHEAD][RANKS];
#pragma unroll
                for (int turn = 0; turn < AHEAD; ++turn) {
                    const int piece = min(base + turn * threads, PIECES - 1);
                    const unsigned at = place(0, begin + token, piece);
                    given[turn] = load(reinterpret_cast<const uint4*>(x) + at);
                    added[turn] = load(reinterpret_cast<const uint4*>(delta) + at);
#pragma unroll
                    for (int i = 0; i < RANKS - 1; ++i)
                        others[turn][i] = area.look(place(area.rank_of(i), begin + token, piece));
                }
#pragma unroll
                for (int turn = 0; turn < AHEAD; ++turn) {
                    const int piece = base + turn * threads;
                    if (piece >= PIECES) continue;
#pragma unroll
                    for (int i = 0; i < RANKS - 1; ++i)
                        while (!has_come(others[turn][i]))
                            others[turn][i] = area.look(place(area.rank_of(i), begin + token, piece));
                    float sum[8], more[8];
                    widen(sum, given[turn]);
                    widen(more, RANKS > 1 ? sum_ranks(area, added[turn], others[turn]) : added[turn]);
#pragma unroll
                    for (int i = 0; i < 8; ++i) sum[i] += more[i];
                    const uint4 rounded = narrow(sum);
                    rows[token][piece] = rounded;
                    if (block == 1) reinterpret_cast<uint4*>(residual)[place(0, begin + token, piece)] = rounded;
                    widen(sum, rounded);
#pragma unroll
                    for (int i = 0; i < 8; ++i) squares += sum[i] * sum[i];
                }
            }
            squares = warp_sum(squares);
            if (lane == 0) of_warp[token][warp] = squares;
        }
        __syncthreads();
#pragma unroll
        for (int token = 0; token < MOST_TOKENS; ++token)
            if (token < count) {
                float all = 0;
                for (int w = 0; w < threads / 32; ++w) all += of_warp[token][w];
                const float inverse = rsqrtf(all * (1.0f / HIDDEN) + eps);
                for (int piece = threadIdx.x; piece < PIECES; piece += threads) {
                    float normed[8];
                    widen(normed, rows[token][piece]);
                    scaled(normed, inverse, factors[piece]);
                    const uint4 rounded = narrow(normed);
                    rows[token][piece] = rounded;
                    if (block == 2)
                        *reinterpret_cast<uint4*>(out + size_t(begin + token) * HIDDEN + piece * 8) = rounded;
                }
            }
        __syncthreads();
        if (busy)
            for (int token = 0; token < count; ++token) {
                float sum = 0;
#pragma unroll
                for (int i = 0; i < LANE_TURNS; ++i)
                    if (lane + i * 32 < PIECES) {
                        float left[8], right[8];
                        widen(left, row[i]);
                        widen(right, rows[token][lane + i * 32]);
#pragma unroll
                        for (int j = 0; j < 8; ++j) sum += left[j] * right[j];
                    }
                sum = warp_sum(sum) + bias_of;
                if (lane == 0)
                    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];"
                                 :: "r"(first + (token * MOST_EXPERTS + expert) * 4), "f"(sum), "r"(first_arrived)
                                 : "memory");
            }
        if (block == 0) {
            asm volatile("{\n .reg .pred done;\nagain:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                         " @!done bra again;\n}" :: "r"(own_arrived), "r"(parity) : "memory");
            if (RANKS > 1)  // every block has a logit to send, and sent it after reading the rows
                for (int at = threadIdx.x; at < count * PIECES; at += threads)
#pragma unroll
                    for (int i = 0; i < RANKS - 1; ++i)
                        area.empty(place(area.rank_of(i), begin + at / PIECES, at % PIECES));
            for (int token = warp; token < count; token += threads / 32)
                choose(logits[token], experts, active, ids + size_t(begin + token) * active,
                       shares + size_t(begin + token) * active);
        }
        if (begin + stride < tokens)  // then logits and rows are written again
            asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
    }
}

// A lane's 32 bytes of a row of 64 columns: columns 16 t ... 16 t + 15, t = lane % 4. The multiply does not care which
// column stands where as long as both operands agree: step s takes columns 4 s ... 4 s + 3 of each lane's.
struct Piece {
    uint4 half[2];

    __device__ __forceinline__ Piece(const bf16* row, int column) {
        const bool inside = column < HIDDEN;  // zeros past the last
        half[0] = half[1] = make_uint4(0, 0, 0, 0);
        if (inside) half[0] = load(row + column);
        if (inside && column + 8 < HIDDEN) half[1] = load(row + column + 8);
    }
    __device__ __forceinline__ unsigned low(int step) const { return step % 2 ? half[step / 2].z : half[step / 2].x; }
    __device__ __forceinline__ unsigned high(int step) const { return step % 2 ? half[step / 2].w : half[step / 2].y; }
};

// Many tokens: x [T, H], normed, -> ids and shares, by tensor cores. A block takes MANY_TOKENS of them; its warps take
// every MANY_WARPS-th run of 64 columns, and their sums are added in order. Weights are the A operand of mma.m16n8k16,
// read from L2 by every block: 184 KB at 32 experts, 24 MB for 2,048 tokens, 5 us.
extern "C" __global__ void __launch_bounds__(MANY_WARPS * 32) route(
    const bf16* x, const bf16* weight, const bf16* bias, long long* ids, float* shares, int tokens, int experts,
    int active
) {
    constexpr int TILES = MOST_EXPERTS / 16, COLUMN_TILES = MANY_TOKENS / 8;
    extern __shared__ float sums_of[];  // [MANY_WARPS][MANY_TOKENS][experts]
    let_next_start();
    wait_for_previous();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.x * MANY_TOKENS;
    float sums[TILES][COLUMN_TILES][4] = {};
    for (int base = warp * 64; base < HIDDEN; base += MANY_WARPS * 64) {
        const int column = base + t * 16;
        const Piece some(x + size_t(min(first + g, tokens - 1)) * HIDDEN, column);
        const Piece more(x + size_t(min(first + 8 + g, tokens - 1)) * HIDDEN, column);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
            if (tile * 16 < experts) {
                const Piece upper(weight + size_t(min(tile * 16 + g, experts - 1)) * HIDDEN, column);
                const Piece lower(weight + size_t(min(tile * 16 + 8 + g, experts - 1)) * HIDDEN, column);
#pragma unroll
                for (int step = 0; step < 4; ++step)
#pragma unroll
                    for (int n = 0; n < COLUMN_TILES; ++n) {
                        const Piece& tokens_of = n == 0 ? some : more;
                        float(&d)[4] = sums[tile][n];
                        asm volatile(
                            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                            "{%8, %9}, {%0, %1, %2, %3};"
                            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                            : "r"(upper.low(step)), "r"(lower.low(step)), "r"(upper.high(step)), "r"(lower.high(step)),
                              "r"(tokens_of.low(step)), "r"(tokens_of.high(step)));
                    }
            }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int expert = tile * 16 + g + i / 2 * 8, token = n * 8 + t * 2 + i % 2;
                if (expert < experts)
                    sums_of[(warp * MANY_TOKENS + token) * experts + expert] = sums[tile][n][i];
            }
    __syncthreads();
    for (int i = threadIdx.x; i < MANY_TOKENS * experts; i += MANY_WARPS * 32) {
        float sum = sums_of[i];
        for (int other = 1; other < MANY_WARPS; ++other) sum += sums_of[other * MANY_TOKENS * experts + i];
        sums_of[i] = sum + __uint_as_float(unsigned(bias[i % experts]) << 16);
    }
    __syncthreads();
    for (int token = warp; token < min(MANY_TOKENS, tokens - first); token += MANY_WARPS)
        choose(sums_of + token * experts, experts, active, ids + size_t(first + token) * active,
               shares + size_t(first + token) * active);
}
