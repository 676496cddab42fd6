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
// A block: 192 rows (three warpgroups of 64) by up to 128 tokens. A fourth warpgroup brings tokens to shared memory,
// 64 columns at a time, STAGES deep; rows of MXFP4 pairs are gathered as they come. While one product of 64 columns
// runs, each warpgroup makes the A operand of the next. A tile with fewer live tokens multiplies by 32, 64 or 96.
//
// A token's sums are one chain over its columns in their order, whatever the tile and the tokens beside it: its bytes
// depend on nothing else. They are not the bytes of the decode kernels, which cut K.

#include <cuda_bf16.h>

#define DENSE 0
#define UP 1
#define DOWN 2

namespace {

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
constexpr int UNITS = KIND == UP ? ROWS / 2 : ROWS;  // columns of the output that a block makes
constexpr int OUT_PITCH = UNITS + 8;                 // of a token's outputs in shared memory: lanes meet no bank twice
constexpr float DEFERRED_SCALE = 4294967296.0f;      // 2^32: see dequantize in experts.cu

static_assert(COLUMNS % 32 == 0, "columns come in blocks of 32");
static_assert(TOKENS * OUT_PITCH * 2 <= STAGES * STAGE_BYTES, "outputs take the place of the stages");

// --- PTX -------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ unsigned shared_address(const void* at) { return unsigned(__cvta_generic_to_shared(at)); }

__device__ __forceinline__ void copy_async(unsigned to, const void* from, int bytes) {  // 16 bytes, of which read: bytes
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
#define MULTIPLY(N, SUMS, OPERANDS, A, B, ...)                                                                         \
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

// A stage as wgmma's B operand: rows of 128 bytes (a token's 64 columns), 16-byte chunk c of row r at c ^ (r % 8), eight
// rows every 1024 bytes. In units of 16 bytes: start in bits 0-13, the stride of eight rows in 32-45, and 1 << 62 for
// this swizzle. A step of 16 columns is 32 bytes on.
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

#if KIND == DENSE

// A lane's weights: [strip of 16 rows][step of 32 columns][2 fragments][32 lanes] of 16 bytes. Loaded a turn ahead.
struct Weights {
    static constexpr int STEPS = COLUMNS / 32;
    const uint4* strip_at;
    uint4 next[4];

    __device__ __forceinline__ Weights(const uint4* weight, const unsigned*, int, int strip)
        : strip_at(weight + (size_t)strip * (STEPS * 64) + threadIdx.x % 32) {}

    __device__ __forceinline__ void load(int turn) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // past the end, the last step again: its tokens are zeros
            const int step = COLUMNS % DEPTH == 0 ? turn * 2 + i / 2 : min(turn * 2 + i / 2, STEPS - 1);
            next[i] = load_weight(strip_at + (step * 2 + i % 2) * 32);
        }
    }

    __device__ __forceinline__ void start() { load(0); }

    // The operand of a turn; and what a later one needs is asked for.
    __device__ __forceinline__ void operand(int turn, unsigned (&a)[16]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // copies that ptxas keeps: it waits for a product whose operand a load writes
            const unsigned words[4] = {next[i].x, next[i].y, next[i].z, next[i].w};
#pragma unroll
            for (int j = 0; j < 4; ++j) asm volatile("mov.b32 %0, %1;" : "=r"(a[4 * i + j]) : "r"(words[j]));
        }
        if (turn + 1 < TURNS) load(turn + 1);
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

// A lane's weights: tiles of 16 rows by 64 columns, [strip][tile][32 lanes] of 16 bytes, and for each of 8 rows g the
// scale bytes of rows g and g + 8, of the first 32 columns and of the others. Loaded two turns ahead.
struct Weights {
    const uint4* values;
    const unsigned* scales;
    uint4 value[2];
    unsigned scale[2];

    __device__ __forceinline__ Weights(const uint4* all_values, const unsigned* all_scales, int strips, int strip)
        : values(all_values + (size_t)strip * TURNS * 32 + threadIdx.x % 32),
          scales(all_scales + (size_t)strip * TURNS * 8 + threadIdx.x % 32 / 4) {}

    __device__ __forceinline__ void load(int turn, int place) {
        value[place] = load_weight(values + turn * 32);
        asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(scale[place]) : "l"(scales + turn * 8));
    }

    __device__ __forceinline__ void start() {
        load(0, 0);
        if (TURNS > 1) load(1, 1);
    }

    __device__ __forceinline__ void operand(int turn, unsigned (&a)[16]) {
        const unsigned s = scale[0];
        const unsigned low[2] = {(s & 0xFF) * 0x00800080u, (s >> 16 & 0xFF) * 0x00800080u};
        const unsigned high[2] = {(s >> 8 & 0xFF) * 0x00800080u, (s >> 24) * 0x00800080u};
        dequantize(value[0].x, low[0], high[0], a);
        dequantize(value[0].y, low[0], high[0], a + 4);
        dequantize(value[0].z, low[1], high[1], a + 8);
        dequantize(value[0].w, low[1], high[1], a + 12);
        value[0] = value[1], scale[0] = scale[1];
        if (turn + 2 < TURNS) load(turn + 2, 1);
    }
};

#endif

// --- A block ---------------------------------------------------------------------------------------------------------

struct Tile {
    const __nv_bfloat16* source;  // rows of COLUMNS
    __nv_bfloat16* out;           // rows of `width`
    const uint4* weight;          // of the expert
    const unsigned* scales;       // likewise; dense weights have none
    const __nv_bfloat16* bias;    // likewise
    int rows, width, live;
    float limit;
};

struct Shared {
    unsigned long long full[STAGES], empty[STAGES];
    int from[TOKENS], to[TOKENS];  // rows of source and of out
    float share[TOKENS];           // DOWN: the routing weight
};

// Bring the tokens' columns to the stages, in turn. 128 threads: a thread takes a chunk of 8 columns of every 16th row.
__device__ __forceinline__ void produce(const Tile& tile, Shared& shared, unsigned stages) {
    const int thread = threadIdx.x - CONSUMER_THREADS, chunk = thread % 8, first = thread / 8;
    const unsigned full = shared_address(shared.full), empty = shared_address(shared.empty);
    const unsigned to = stages + first * 128 + (chunk ^ first % 8) * 16;
    unsigned at[TOKENS / 16];  // elements from source
#pragma unroll
    for (int i = 0; i < TOKENS / 16; ++i) {
        const int row = first + 16 * i;
        at[i] = row < tile.live ? shared.from[row] * COLUMNS + chunk * 8 : 0;
    }
    for (int turn = 0; turn < TURNS + BEHIND; ++turn) {
        if (turn < TURNS) {
            const int stage = turn % STAGES, column = turn * DEPTH;
            if (turn >= STAGES) barrier_wait(empty + stage * 8, (turn / STAGES - 1) & 1);
            const bool inside = COLUMNS % DEPTH == 0 || column + chunk * 8 < COLUMNS;  // zeros past the last
#pragma unroll
            for (int i = 0; i < TOKENS / 16; ++i)
                if (first + 16 * i < tile.live)
                    copy_async(to + stage * STAGE_BYTES + i * (16 * 128), tile.source + at[i] + (inside ? column : 0),
                               inside ? 16 : 0);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        if (turn >= BEHIND) {
            // The copies are ordinary writes, wgmma reads through another proxy.
            asm volatile("cp.async.wait_group %0;\nfence.proxy.async.shared::cta;" :: "n"(BEHIND) : "memory");
            __syncwarp();
            if (thread % 32 == 0) barrier_arrive(full + (turn - BEHIND) % STAGES * 8);
        }
    }
}

// Sums of a warpgroup's 64 rows and N tokens, then out: through shared memory, so that rows leave whole.
template <int N>
__device__ __forceinline__ void consume(const Tile& tile, Shared& shared, unsigned stages, __nv_bfloat16* staged) {
    const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, g = lane / 4;
    const unsigned full = shared_address(shared.full), empty = shared_address(shared.empty);
    const int strips = (tile.rows + 15) / 16, strip = (blockIdx.x * CONSUMERS + group) * 4 + warp;
    Weights weights(tile.weight, tile.scales, strips, min(strip, strips - 1));  // past the end: the last, never stored
    weights.start();
    float sums[N / 2] = {};
    unsigned a[2][16];
    weights.operand(0, a[0]);
    const auto multiply_turn = [&](int turn, int place) {
        const int stage = turn % STAGES;
        barrier_wait(full + stage * 8, turn / STAGES & 1);
        const unsigned long long b = describe(stages + stage * STAGE_BYTES);
        product_begin();
#pragma unroll
        for (int step = 0; step < 4; ++step) multiply(sums, a[place] + 4 * step, b + 2 * step);
        product_commit();
        if (turn + 1 < TURNS) weights.operand(turn + 1, a[1 - place]);  // while the product runs
        product_wait<0>();
        hold(a[place]);
        if (lane == 0) barrier_arrive(empty + stage * 8);
    };
#pragma unroll 1
    for (int turn = 0; turn + 1 < TURNS; turn += 2) {
        multiply_turn(turn, 0);
        multiply_turn(turn + 1, 1);
    }
    if (TURNS % 2 == 1) multiply_turn(TURNS - 1, 0);
    hold(sums);

    asm volatile("bar.sync 1, %0;" :: "n"(CONSUMER_THREADS) : "memory");  // nobody reads the stages any more
    // Rows g and g + 8 of the strip; packed gate_up strips hold gate 16 strip + 2g and up 16 strip + 2g + 1 there.
    const int row = strip * 16 + (KIND == UP ? 2 * g : g), other_row = row + (KIND == UP ? 1 : 8);
    float bias_low = 0.0f, bias_high = 0.0f;
    if (tile.bias != nullptr) {
        if (row < tile.rows) bias_low = __bfloat162float(tile.bias[row]);
        if (other_row < tile.rows) bias_high = __bfloat162float(tile.bias[other_row]);
    }
    const int in_block = (group * 4 + warp) * (KIND == UP ? 8 : 16) + g;
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int token = 8 * j + lane % 4 * 2 + c;
            __nv_bfloat16* const at = staged + token * OUT_PITCH + in_block;
            float low = sums[4 * j + c], high = sums[4 * j + 2 + c];
            if (KIND == DENSE) {
                at[0] = __float2bfloat16_rn(low + bias_low), at[8] = __float2bfloat16_rn(high + bias_high);
                continue;
            }
            low = fmaf(low, DEFERRED_SCALE, bias_low), high = fmaf(high, DEFERRED_SCALE, bias_high);
            if (KIND == UP) {  // NaN wins, as in torch.clamp
                float gate, up;
                asm("min.NaN.f32 %0, %1, %2;" : "=f"(gate) : "f"(low), "f"(tile.limit));
                asm("min.NaN.f32 %0, %1, %2;" : "=f"(up) : "f"(high), "f"(tile.limit));
                asm("max.NaN.f32 %0, %1, %2;" : "=f"(up) : "f"(up), "f"(-tile.limit));
                const float activated = __fdividef(gate, 1.0f + __expf(-1.702f * gate));
                at[0] = __float2bfloat16_rn(activated * (up + 1.0f));
            } else {
                const float share = shared.share[token];
                at[0] = __float2bfloat16_rn(share * low), at[8] = __float2bfloat16_rn(share * high);
            }
        }
    asm volatile("bar.sync 1, %0;" :: "n"(CONSUMER_THREADS) : "memory");
    constexpr int CHUNKS = UNITS / 8;
    const int column = blockIdx.x * UNITS;
    for (int i = threadIdx.x; i < tile.live * CHUNKS; i += CONSUMER_THREADS) {
        const int token = i / CHUNKS, chunk = i % CHUNKS;
        if (column + chunk * 8 < tile.width)
            *reinterpret_cast<uint4*>(tile.out + (size_t)shared.to[token] * tile.width + column + chunk * 8) =
                *reinterpret_cast<const uint4*>(staged + token * OUT_PITCH + chunk * 8);
    }
}

// Every thread has filled its part of `shared`.
__device__ __forceinline__ void work(const Tile& tile, Shared& shared) {
    extern __shared__ unsigned char dynamic[];
    const unsigned stages = (shared_address(dynamic) + 1023) / 1024 * 1024;  // the swizzle's pattern repeats so
    if (threadIdx.x < STAGES) {
        barrier_init(shared_address(shared.full + threadIdx.x), 4);                 // the producer's warps
        barrier_init(shared_address(shared.empty + threadIdx.x), CONSUMERS * 4);    // the consumers'
    }
    __syncthreads();
    __nv_bfloat16* const staged = reinterpret_cast<__nv_bfloat16*>(dynamic + (stages - shared_address(dynamic)));
    if (threadIdx.x >= CONSUMER_THREADS) produce(tile, shared, stages);
    else if (tile.live > 96) consume<128>(tile, shared, stages, staged);
    else if (tile.live > 64) consume<96>(tile, shared, stages, staged);
    else if (tile.live > 32) consume<64>(tile, shared, stages, staged);
    else consume<32>(tile, shared, stages, staged);
}

}  // namespace

#if KIND == DENSE

// Grid (blocks of 192 rows, tiles of 128 tokens). bias may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 1) prefill(
    const uint4* weight, const __nv_bfloat16* x, const __nv_bfloat16* bias, __nv_bfloat16* out, int rows, int tokens) {
    __shared__ Shared shared;
    asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
    const int first = blockIdx.y * TOKENS, live = min(tokens - first, TOKENS);
    if (threadIdx.x < TOKENS) shared.from[threadIdx.x] = shared.to[threadIdx.x] = first + threadIdx.x;
    work(Tile{x, out, weight, nullptr, bias, rows, rows, live, 0.0f}, shared);
}

#else

// Grid (blocks of 192 rows, tiles). tiles and order as experts_group in experts.cu makes them; values and scales of all
// experts, as packed; source x [T, COLUMNS] (UP) or h [pairs, COLUMNS] (DOWN); weights [pairs] float32.
extern "C" __global__ void __launch_bounds__(THREADS, 1) prefill(
    const uint4* values, const unsigned* scales, const __nv_bfloat16* bias, const __nv_bfloat16* source,
    __nv_bfloat16* out, const int4* tiles, const int* order, const float* weights, int rows, int active, float limit) {
    __shared__ Shared shared;
    asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
    const int4 tile = __ldcg(tiles + blockIdx.y);
    const int expert = tile.x, live = tile.z;
    if (live == 0) return;
    if (threadIdx.x < TOKENS) {
        const int pair = threadIdx.x < live ? __ldcg(order + tile.y + threadIdx.x) : 0;
        shared.from[threadIdx.x] = KIND == UP ? pair / active : pair;
        shared.to[threadIdx.x] = pair;
        shared.share[threadIdx.x] = KIND == DOWN ? __ldcg(weights + pair) : 0.0f;
    }
    const size_t packed = (size_t)expert * (rows / 16) * TURNS;
    work(Tile{source, out, values + packed * 32, scales + packed * 8, bias + (size_t)expert * rows, rows,
              KIND == UP ? rows / 2 : rows, live, limit}, shared);
}

#endif
