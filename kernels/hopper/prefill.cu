// The matrix products of a prefill step, where tokens are many: dense layers, experts up and experts down by wgmma.
//
//   DENSE  out [T, rows]            = x [T, K] * weight [rows, K]^T + bias
//   UP     h [pairs, rows / 2]      = swiglu(x[token] . gate_up[expert] + bias)
//   DOWN   y [pairs, rows]          = weight[pair] * (h[pair] . down[expert] + bias)
//
// The macro KIND is one of the three, COLUMNS is K, a multiple of 32. bf16 in and out, float32 inside. The weights are
// those of linear.cu and experts.cu, packed in the order of mma's A operand: a warp's 16 of wgmma's 64 rows are laid
// out alike, so they go from memory to registers, MXFP4 through a few integer operations, and multiply from there.
//
// Operations: 2 T K rows, at 2,048 tokens of the 20b 0.11 TFLOP a layer dense and 0.41 experts: 0.1 and 0.5 ms at 773
// TFLOP/s. Bytes past the L2 do not count here, those out of it do: a block of 192 rows by 128 tokens reads 512 + 320
// (DENSE: 512 + 768) bytes for every two columns, that is 118 (77) operations a byte, and the L2 gives about 5 TB/s.
//
// A block takes items, 192 rows (three warpgroups of 64) by up to 128 tokens, one after the other: as many blocks as
// multiprocessors, each with every so-manyth item. A fourth warpgroup brings tokens to shared memory, 64 columns at a
// time, STAGES deep, and runs ahead into the next item; rows of pairs are gathered as they come. While one product of
// 64 columns runs, each warpgroup makes the A operand of the next. An item with fewer live tokens multiplies by 32, 64
// or 96. Warpgroups meet only at the stages: while one brings its sums out, the others multiply.
//
// A token's sums are one chain over its columns in their order, whatever the tile and the tokens beside it: its bytes
// depend on nothing else. They are not the bytes of the decode kernels, which cut K.

#define DENSE 0
#define UP 1
#define DOWN 2

namespace {

using bf16 = unsigned short;  // its bits: NVRTC has no headers to offer

constexpr int CONSUMERS = 3;                    // warpgroups, 64 rows each
constexpr int ROWS = 64 * CONSUMERS;
constexpr int TOKENS = 128;
constexpr int DEPTH = 64;                       // columns of a stage: 128 bytes, the swizzle's width
constexpr int STAGES = 6;
constexpr int BEHIND = 3;                       // stages under way before the oldest is declared full
constexpr int STAGE_BYTES = TOKENS * DEPTH * 2;
constexpr int CONSUMER_THREADS = CONSUMERS * 128;
constexpr int THREADS = CONSUMER_THREADS + 128;
constexpr int TURNS = (COLUMNS + DEPTH - 1) / DEPTH;
constexpr int UNITS = KIND == UP ? 32 : 64;  // columns of the output that a warpgroup makes
constexpr int OUT_PITCH = UNITS + 8;         // of a token's outputs in shared memory: lanes meet no bank twice
constexpr int OUT_BYTES = TOKENS * OUT_PITCH * 2;
constexpr float DEFERRED_SCALE = 4294967296.0f;  // 2^32: see dequantize in experts.cu

static_assert(COLUMNS % 32 == 0, "columns come in blocks of 32");

// --- PTX -------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float widen(bf16 bits) { return __uint_as_float((unsigned)bits << 16); }

__device__ __forceinline__ bf16 narrow(float value) {
    bf16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
    return rounded;
}

__device__ __forceinline__ unsigned shared_address(const void* at) { return unsigned(__cvta_generic_to_shared(at)); }

// 16 bytes, of which read: bytes.
__device__ __forceinline__ void copy_async(unsigned to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_init(unsigned barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(unsigned barrier, int parity) {
    asm volatile("{\n .reg .pred done;\nagain:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 " @!done bra again;\n}" :: "r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void product_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int LEFT>
__device__ __forceinline__ void product_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory");
}

// Until here these registers belong to a product under way: the compiler must not think otherwise.
template <int COUNT>
__device__ __forceinline__ void hold(unsigned (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(registers[i]) :: "memory");
}

template <int COUNT>
__device__ __forceinline__ void hold(float (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(registers[i]) :: "memory");
}

// sums [64, N] += a [64, 16] b [16, N]: a warp has 16 of the rows, a lane of them what mma.m16n8k16 gives it; b by its
// descriptor. d[4j ... 4j + 3] are row g of tokens 8j + 2t and the next, then row g + 8 of both (PTX ISA, wgmma).
#define F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F16(i) F4(i), F4(i + 4), F4(i + 8), F4(i + 12)
#define D0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define D16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define D32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define D48 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MULTIPLY(N, SUMS, OPERANDS, A, B)                                                                              \
    __device__ __forceinline__ void multiply(float (&d)[N / 2], const unsigned* a, unsigned long long b) {             \
        asm volatile("{\n .reg .pred add;\n setp.eq.u32 add, 0, 0;\n"                                                  \
                     " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" SUMS "}, {" A "}, " B               \
                     ", add, 1, 1, 0;\n}"                                                                              \
                     : OPERANDS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                 \
    }
#define LIST(...) __VA_ARGS__
MULTIPLY(32, D0, F16(0), "%16, %17, %18, %19", "%20")
MULTIPLY(64, D0 ", " D16, LIST(F16(0), F16(16)), "%32, %33, %34, %35", "%36")
MULTIPLY(96, D0 ", " D16 ", " D32, LIST(F16(0), F16(16), F16(32)), "%48, %49, %50, %51", "%52")
MULTIPLY(128, D0 ", " D16 ", " D32 ", " D48, LIST(F16(0), F16(16), F16(32), F16(48)), "%64, %65, %66, %67", "%68")

// A stage as wgmma's B operand: rows of 128 bytes (a token's 64 columns), 16-byte chunk c of row r at c ^ (r % 8),
// eight rows every 1024 bytes. In units of 16 bytes: start in bits 0-13, the stride of eight rows in 32-45, and 1 << 62
// for this swizzle. A step of 16 columns is 32 bytes on.
__device__ __forceinline__ unsigned long long describe(unsigned at) {
    return (unsigned long long)(at >> 4 & 0x3FFF) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// --- The A operand ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint4 load_weight(const uint4* at) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}

// A warp's weights, AHEAD turns of them under way, in places known when compiled.

#if KIND == DENSE

template <int N>
constexpr int AHEAD_OF = N <= 64 ? 2 : 1;

// [strip of 16 rows][step of 32 columns][2 fragments][32 lanes] of 16 bytes.
template <int AHEAD>
struct Weights {
    static constexpr int STEPS = COLUMNS / 32;
    const uint4* strip_at;
    uint4 next[AHEAD][4];

    __device__ __forceinline__ void aim(const uint4* weight, const unsigned*, int strip) {
        strip_at = weight + (size_t)strip * (STEPS * 64) + threadIdx.x % 32;
    }

    __device__ __forceinline__ void load(int turn, int place) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // past the end, the last step again: its tokens are zeros
            const int step = COLUMNS % DEPTH == 0 ? turn * 2 + i / 2 : min(turn * 2 + i / 2, STEPS - 1);
            next[place][i] = load_weight(strip_at + (step * 2 + i % 2) * 32);
        }
    }

    // The operand of the turn in `place`; and what a later one needs is asked for.
    __device__ __forceinline__ void operand(int turn, int place, unsigned (&a)[16]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // copies that ptxas keeps: it waits for a product whose operand a load writes
            const unsigned words[4] = {next[place][i].x, next[place][i].y, next[place][i].z, next[place][i].w};
#pragma unroll
            for (int j = 0; j < 4; ++j) asm volatile("mov.b32 %0, %1;" : "=r"(a[4 * i + j]) : "r"(words[j]));
        }
        if (turn + AHEAD < TURNS) load(turn + AHEAD, place);
    }
};

#else

__device__ __forceinline__ unsigned multiply_pair(unsigned a, unsigned b) {  // keeps subnormals
    unsigned product;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

// As in experts.cu: one packed word, 8 values, to the A fragment of 16 columns.
__device__ __forceinline__ void dequantize(unsigned q, unsigned low, unsigned high, unsigned* a) {
    constexpr unsigned SIGN = 0x80008000u, REST = 0x01C001C0u;
    a[0] = multiply_pair(q & (SIGN | REST), low);
    a[1] = multiply_pair((q << 3) & (SIGN | REST), high);
    a[2] = multiply_pair(((q << 2) & SIGN) | ((q << 6) & REST), low);
    a[3] = multiply_pair(((q << 1) & SIGN) | ((q >> 3) & REST), high);
}

template <int N>
constexpr int AHEAD_OF = N <= 64 ? 4 : 2;

// Tiles of 16 rows by 64 columns, [strip][tile][32 lanes] of 16 bytes, and for each of 8 rows g the scale bytes of rows
// g and g + 8, of the first 32 columns and of the others.
template <int AHEAD>
struct Weights {
    const uint4* values;
    const unsigned* scales;
    uint4 value[AHEAD];
    unsigned scale[AHEAD];

    __device__ __forceinline__ void aim(const uint4* all_values, const unsigned* all_scales, int strip) {
        values = all_values + (size_t)strip * TURNS * 32 + threadIdx.x % 32;
        scales = all_scales + (size_t)strip * TURNS * 8 + threadIdx.x % 32 / 4;
    }

    __device__ __forceinline__ void load(int turn, int place) {
        value[place] = load_weight(values + turn * 32);
        asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(scale[place]) : "l"(scales + turn * 8));
    }

    __device__ __forceinline__ void operand(int turn, int place, unsigned (&a)[16]) {
        const unsigned s = scale[place];
        const unsigned low[2] = {__byte_perm(s, 0, 0x4040) << 7, __byte_perm(s, 0, 0x4242) << 7};
        const unsigned high[2] = {__byte_perm(s, 0, 0x4141) << 7, __byte_perm(s, 0, 0x4343) << 7};
        dequantize(value[place].x, low[0], high[0], a);
        dequantize(value[place].y, low[0], high[0], a + 4);
        dequantize(value[place].z, low[1], high[1], a + 8);
        dequantize(value[place].w, low[1], high[1], a + 12);
        if (turn + AHEAD < TURNS) load(turn + AHEAD, place);
    }
};

#endif

// --- Items -----------------------------------------------------------------------------------------------------------

// What a launch works on, and how it is divided. Items in order: all blocks of rows of a tile of tokens, then the next
// tile's, so that what runs at a time shares tokens, and weights of few experts.
struct Work {
    const uint4* weight;          // of all experts
    const unsigned* scales;       // likewise; dense weights have none
    const bf16* bias;    // likewise; null: none
    const bf16* source;  // rows of COLUMNS
    bf16* out;           // rows of `rows`, UP: of rows / 2
    const int4* tiles;            // experts: (expert, first place in order, pairs, 0)
    const int* order;             // experts: pairs by expert
    const float* shares;          // DOWN: the routing weights by pair
    int rows, tokens, active;     // weight rows of an expert; tokens: dense only
    float limit;

    __device__ __forceinline__ int row_blocks() const { return (rows + ROWS - 1) / ROWS; }
};

struct Item {
    int block, expert, first, live;  // live 0: there are no more

    __device__ __forceinline__ Item(const Work& work, int index, int tile_count) {
        const int tile = index / work.row_blocks();
        block = index - tile * work.row_blocks(), expert = 0, first = tile * TOKENS, live = 0;
        if (tile >= tile_count) return;
        if (KIND == DENSE) {
            live = min(work.tokens - first, TOKENS);
        } else {
            const int4 of_expert = __ldcg(work.tiles + tile);
            expert = of_expert.x, first = of_expert.y, live = of_expert.z;
        }
    }
    // Row of out, and of source but for UP, of the item's token: its pair.
    __device__ __forceinline__ int row_of(const Work& work, int token) const {
        if (KIND == DENSE) return first + token;
        return token < live ? __ldcg(work.order + first + token) : 0;
    }
};

// Bring the tokens' columns to the stages, in turn. 128 threads: a thread takes a chunk of 8 columns of every 16th row.
__device__ __forceinline__ void produce(
    const Work& work, int tile_count, unsigned stages, unsigned full, unsigned empty) {
    const int thread = threadIdx.x - CONSUMER_THREADS, chunk = thread % 8, first = thread / 8;
    const unsigned to = stages + first * 128 + (chunk ^ first % 8) * 16;
    int count = 0;  // turns so far, over all items
    const auto declare_full = [&](int turn) {  // the copies are ordinary writes, wgmma reads through another proxy
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
        if (thread % 32 == 0) barrier_arrive(full + turn % STAGES * 8);
    };
    for (int index = blockIdx.x;; index += gridDim.x) {
        const Item item(work, index, tile_count);
        if (item.live == 0) break;
        unsigned at[TOKENS / 16];  // elements from source
#pragma unroll
        for (int i = 0; i < TOKENS / 16; ++i) {
            const int row = item.row_of(work, first + 16 * i);
            at[i] = (KIND == UP ? row / work.active : row) * COLUMNS + chunk * 8;
        }
        for (int turn = 0; turn < TURNS; ++turn, ++count) {
            const int stage = count % STAGES, column = turn * DEPTH;
            if (count >= STAGES) barrier_wait(empty + stage * 8, (count / STAGES - 1) & 1);
            const bool inside = COLUMNS % DEPTH == 0 || column + chunk * 8 < COLUMNS;  // zeros past the last
#pragma unroll
            for (int i = 0; i < TOKENS / 16; ++i)
                if (first + 16 * i < item.live)
                    copy_async(to + stage * STAGE_BYTES + i * (16 * 128), work.source + at[i] + (inside ? column : 0),
                               inside ? 16 : 0);
            asm volatile("cp.async.commit_group;" ::: "memory");
            if (count >= BEHIND) {
                asm volatile("cp.async.wait_group %0;" :: "n"(BEHIND) : "memory");
                declare_full(count - BEHIND);
            }
        }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    for (int turn = max(count - BEHIND, 0); turn < count; ++turn) declare_full(turn);
}

// A warpgroup's 64 rows of one item: N tokens' sums, then out: through shared memory, so that whole lines leave.
template <int N>
__device__ __forceinline__ void consume(
    const Work& work, const Item& item, int& count, unsigned stages, unsigned full, unsigned empty,
    bf16* staged) {
    constexpr int AHEAD = AHEAD_OF<N>, UNROLL = AHEAD > 2 ? AHEAD : 2;
    const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, g = lane / 4;
    const int strips = (work.rows + 15) / 16, strip = (item.block * CONSUMERS + group) * 4 + warp;
    const size_t expert_strips = (size_t)item.expert * strips;
    Weights<AHEAD> weights;  // past the end: the last strip's, and its sums are not stored
    weights.aim(work.weight + (KIND == DENSE ? 0 : expert_strips * TURNS * 32),
                work.scales + (KIND == DENSE ? 0 : expert_strips * TURNS * 8), min(strip, strips - 1));
#pragma unroll
    for (int turn = 0; turn < AHEAD; ++turn)
        if (turn < TURNS) weights.load(turn, turn);
    float sums[N / 2] = {};
    unsigned a[2][16];
    weights.operand(0, 0, a[0]);
    const auto multiply_turn = [&](int turn, int place) {  // place: turn % UNROLL
        const int stage = (count + turn) % STAGES;
        barrier_wait(full + stage * 8, (count + turn) / STAGES & 1);
        const unsigned long long b = describe(stages + stage * STAGE_BYTES);
        product_begin();
#pragma unroll
        for (int step = 0; step < 4; ++step) multiply(sums, a[place % 2] + 4 * step, b + 2 * step);
        product_commit();
        if (turn + 1 < TURNS) weights.operand(turn + 1, (place + 1) % AHEAD, a[1 - place % 2]);  // while it runs
        product_wait<0>();
        hold(a[place % 2]);
        if (lane == 0) barrier_arrive(empty + stage * 8);
    };
#pragma unroll 1
    for (int turn = 0; turn + UNROLL <= TURNS; turn += UNROLL)
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) multiply_turn(turn + i, i);
#pragma unroll
    for (int i = 0; i < TURNS % UNROLL; ++i) multiply_turn(TURNS / UNROLL * UNROLL + i, i);
    hold(sums);
    count += TURNS;

    // A lane knows the rows of tokens lane, lane + 32 ... of the item.
    int to[N / 32];
    float share[N / 32];
#pragma unroll
    for (int i = 0; i < N / 32; ++i) {
        to[i] = item.row_of(work, i * 32 + lane);
        share[i] = KIND == DOWN ? __ldcg(work.shares + to[i]) : 0.0f;
    }
    // Rows g and g + 8 of the strip; packed gate_up strips hold gate 16 strip + 2g and up 16 strip + 2g + 1 there.
    const int row = strip * 16 + (KIND == UP ? 2 * g : g), other_row = row + (KIND == UP ? 1 : 8);
    float bias_low = 0.0f, bias_high = 0.0f;
    if (work.bias != nullptr) {
        const bf16* const bias = work.bias + (size_t)item.expert * work.rows;
        if (row < work.rows) bias_low = widen(bias[row]);
        if (other_row < work.rows) bias_high = widen(bias[other_row]);
    }
    asm volatile("bar.sync %0, 128;" :: "r"(1 + group) : "memory");  // the last item's outputs have been read
    const int in_group = warp * (KIND == UP ? 8 : 16) + g;
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int token = 8 * j + lane % 4 * 2 + c;
            bf16* const at = staged + token * OUT_PITCH + in_group;
            float low = sums[4 * j + c], high = sums[4 * j + 2 + c];
            if (KIND == DENSE) {
                at[0] = narrow(low + bias_low), at[8] = narrow(high + bias_high);
                continue;
            }
            low = fmaf(low, DEFERRED_SCALE, bias_low), high = fmaf(high, DEFERRED_SCALE, bias_high);
            if (KIND == UP) {  // NaN wins, as in torch.clamp
                float gate, up;
                asm("min.NaN.f32 %0, %1, %2;" : "=f"(gate) : "f"(low), "f"(work.limit));
                asm("min.NaN.f32 %0, %1, %2;" : "=f"(up) : "f"(high), "f"(work.limit));
                asm("max.NaN.f32 %0, %1, %2;" : "=f"(up) : "f"(up), "f"(-work.limit));
                const float activated = __fdividef(gate, 1.0f + __expf(-1.702f * gate));
                at[0] = narrow(activated * (up + 1.0f));
            } else {
                const float weight = __shfl_sync(0xFFFFFFFFu, share[j / 4], token % 32);
                at[0] = narrow(weight * low), at[8] = narrow(weight * high);
            }
        }
    asm volatile("bar.sync %0, 128;" :: "r"(1 + group) : "memory");
    constexpr int CHUNKS = UNITS / 8, ROWS_A_PASS = 32 / CHUNKS;  // a warp stores some whole rows at a time
    const int width = KIND == UP ? work.rows / 2 : work.rows;
    const int column = (item.block * CONSUMERS + group) * UNITS + lane % CHUNKS * 8;
#pragma unroll
    for (int pass = 0; pass < N / (4 * ROWS_A_PASS); ++pass) {
        const int base = (pass * 4 + warp) * ROWS_A_PASS, token = base + lane / CHUNKS;
        const int to_row = __shfl_sync(0xFFFFFFFFu, to[pass * 4 * ROWS_A_PASS / 32], token % 32);
        if (token < item.live && column < width)
            *reinterpret_cast<uint4*>(work.out + (size_t)to_row * width + column) =
                *reinterpret_cast<const uint4*>(staged + token * OUT_PITCH + lane % CHUNKS * 8);
    }
}

__device__ __forceinline__ void run(const Work& work, int tile_count) {
    extern __shared__ unsigned char dynamic[];  // the stages, on a multiple of 1024; then each consumer's outputs
    __shared__ unsigned long long barriers[2 * STAGES];
    const unsigned full = shared_address(barriers), empty = full + STAGES * 8;
    const unsigned stages = (shared_address(dynamic) + 1023) / 1024 * 1024;  // the swizzle's pattern repeats so
    if (threadIdx.x < STAGES) {
        barrier_init(full + threadIdx.x * 8, 4);               // the producer's warps
        barrier_init(empty + threadIdx.x * 8, CONSUMERS * 4);  // the consumers'
    }
    __syncthreads();
    if (threadIdx.x >= CONSUMER_THREADS) {
        produce(work, tile_count, stages, full, empty);
        return;
    }
    bf16* const staged = reinterpret_cast<bf16*>(
        dynamic + (stages - shared_address(dynamic)) + STAGES * STAGE_BYTES + threadIdx.x / 128 * OUT_BYTES);
    int count = 0;
    for (int index = blockIdx.x;; index += gridDim.x) {
        const Item item(work, index, tile_count);
        if (item.live == 0) break;
        if (item.live > 96) consume<128>(work, item, count, stages, full, empty, staged);
        else if (item.live > 64) consume<96>(work, item, count, stages, full, empty, staged);
        else if (item.live > 32) consume<64>(work, item, count, stages, full, empty, staged);
        else consume<32>(work, item, count, stages, full, empty, staged);
    }
}

}  // namespace

#if KIND == DENSE

// bias may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 1) prefill(
    const uint4* weight, const bf16* x, const bf16* bias, bf16* out, int rows, int tokens) {
    asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
    run(Work{weight, nullptr, bias, x, out, nullptr, nullptr, nullptr, rows, tokens, 1, 0.0f},
        (tokens + TOKENS - 1) / TOKENS);
}

#else

// tiles and order as experts_group in experts.cu makes them; values and scales of all experts, as packed; source x [T,
// COLUMNS] (UP) or h [pairs, COLUMNS] (DOWN); shares [pairs] float32.
extern "C" __global__ void __launch_bounds__(THREADS, 1) prefill(
    const uint4* values, const unsigned* scales, const bf16* bias, const bf16* source,
    bf16* out, const int4* tiles, const int* order, const float* shares, int rows, int active, int tile_count,
    float limit) {
    asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
    run(Work{values, scales, bias, source, out, tiles, order, shares, rows, 0, active, limit}, tile_count);
}

#endif
