// out [T, N] = x [T, K] * weight [N, K]^T + bias [N], bf16 in and out, float32 inside. K is the macro COLUMNS.
// SHARES, a macro too, is the number of runs into which K is cut.
//
// Bytes: 2 N K of weights, once, and 2 T (K + N). Floors at 3.08 TB/s: QKV (5120 x 2880) 9.6 us, O (2880 x 4096) 7.7,
// lm_head (201088 x 2880) 376. Up to 64 tokens the weights are all that counts.
//
// Weights are the A operand of mma.m16n8k16 (16 rows), tokens its N (8 a tile): one token wastes the least. They are
// packed as [strip of 16 rows][step of 32 columns][2 fragments][32 lanes][16 bytes], so a warp streams whole kilobytes,
// straight into the registers that the multiply reads. The multiply does not care in which order it sees the columns,
// as long as both operands agree: lane (g, t) = (lane / 4, lane % 4) has columns 8t ... 8t + 7 of a step, 4 for each
// fragment. So 16 neighbouring bytes of token g are its part of B for both, read as they lie.
//
// Every dot product is cut into SHARES runs of columns, each added up in order by one warp, and the runs are added in
// order: whatever the number of tokens, and whichever kernel runs. The two kernels differ in where warps stand:
//   narrow, up to 8 tokens: a block is one strip, its warps the shares. x lies in shared memory: loads of it in the
//     loop would queue behind those of the weights, and their latency be paid at every turn. All blocks of the
//     projections are resident at once, and a multiprocessor with more of them has more loads in flight, so the memory
//     itself evens out what 320 or 180 strips on 132 multiprocessors leave uneven.
//   wide: a cluster of SHARES blocks takes 8 strips, a block one share of each and that share of x in shared memory
//     (92 KB for 64 tokens of 2880): else 64 tokens of x, read for each strip, would be four times the weights' bytes.
//     The partial sums meet through distributed shared memory. Above 64 tokens the grid tiles them by 64.
//
// The first loads of weights, which no kernel writes, are in flight before the wait for the previous kernel.

namespace {

using bf16 = unsigned short;  // its bits: NVRTC has no headers to offer

#define ARGUMENTS const uint4 *weight, const bf16 *x, const bf16 *bias, bf16 *out, int rows, int tokens

constexpr int STEP = 32;                // columns of a packed tile: two k16 multiplies
constexpr int STEPS = COLUMNS / STEP;
constexpr int ROWS = 16;                // rows of a strip
constexpr int TILE = ROWS * STEP / 8;   // 16-byte pieces of a packed tile
// A short share has half of itself in flight with 6 steps, and the registers saved make room for a third block on each
// multiprocessor: all 320 of QKV are resident.
constexpr int NARROW_DEPTH = STEPS / SHARES <= 12 ? 6 : 8;
constexpr int NARROW_BLOCKS = NARROW_DEPTH == 6 ? 24 / SHARES : 20 / SHARES;
constexpr int WIDE_STRIPS = 8;          // of a wide cluster
constexpr int PITCH = ROWS + 4;         // floats from one token's partial sums to the next: lanes meet no bank twice
constexpr int X_PITCH = (COLUMNS * 2 + 127) / 128 * 128 + 64;  // bytes of a token: two tokens' 64 bytes miss each other

static_assert(COLUMNS % STEP == 0, "columns come in steps of 32");

// Not .nc, though weights never change: ptxas moves .nc loads below griddepcontrol.wait (seen in CUDA 13.0's SASS).
__device__ __forceinline__ uint4 load_weight(const uint4* at) {
    uint4 piece;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w) : "l"(at));
    return piece;
}

__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Shared memory written before is seen by the cluster's other blocks after.
__device__ __forceinline__ void cluster_exchange() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Only waits: orders no memory, and so costs no fence.
__device__ __forceinline__ void cluster_meet() {
    asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
}

__device__ __forceinline__ float load_remote(unsigned at, int rank) {
    float value;
    asm volatile("{\n .reg .u32 there;\n mapa.shared::cluster.u32 there, %1, %2;\n"
                 " ld.shared::cluster.f32 %0, [there];\n}"
                 : "=f"(value) : "r"(at), "r"(rank) : "memory");
    return value;
}

__device__ __forceinline__ void multiply(float (&sums)[4], uint4 a, unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// One step of 32 columns: a lane's fragments of its two multiplies, and its 16 bytes of token g = lane / 4.
__device__ __forceinline__ void multiply_step(float (&sums)[4], const uint4 (&fragments)[2], const uint4& token) {
    multiply(sums, fragments[0], token.x, token.y);
    multiply(sums, fragments[1], token.z, token.w);
}

// A warp's sums to partial [8 TILES tokens][PITCH]: sums 0 and 1 are row g of tokens 2t and 2t + 1 (t = lane % 4), sums
// 2 and 3 row g + 8 of them.
template <int TILES>
__device__ __forceinline__ void store_partial(float* partial, const float (&sums)[TILES][4], int lane) {
    const int row = lane / 4, token = lane % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) partial[(tile * 8 + token + i % 2) * PITCH + row + i / 2 * 8] = sums[tile][i];
}

__device__ __forceinline__ void store_output(bf16* out, const bf16* bias, float sum, int token, int row, int rows) {
    if (bias != nullptr) sum += __uint_as_float(unsigned(bias[row]) << 16);
    bf16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(sum));
    out[size_t(token) * rows + row] = rounded;
}

__device__ __forceinline__ int share_begin(int share) { return STEPS * share / SHARES; }

// Grid (strips), SHARES warps. Shared memory: x [tokens][X_PITCH], all of its columns.
template <int DEPTH>
__device__ __forceinline__ void narrow(ARGUMENTS) {
    extern __shared__ uint4 shared[];
    __shared__ float partial[SHARES][8 * PITCH];
    let_next_start();
    const int lane = threadIdx.x % 32, share = threadIdx.x / 32, strip = blockIdx.x;
    const int begin = share_begin(share), steps = share_begin(share + 1) - begin;
    const uint4* tile_at = weight + (size_t(strip) * STEPS + begin) * TILE + lane;
    uint4 a[DEPTH][2];
#pragma unroll
    for (int i = 0; i < DEPTH; ++i)
        if (i < steps)
#pragma unroll
            for (int half = 0; half < 2; ++half) a[i][half] = load_weight(tile_at + i * TILE + half * 32);

    wait_for_previous();
    const unsigned shared_at = unsigned(__cvta_generic_to_shared(shared));
    for (int i = threadIdx.x; i < tokens * (COLUMNS / 8); i += SHARES * 32)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                     :: "r"(shared_at + i / (COLUMNS / 8) * X_PITCH + i % (COLUMNS / 8) * 16), "l"(x + size_t(i) * 8)
                     : "memory");
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    const bool there = lane / 4 < tokens;
    const uint4* token_at = shared + (lane / 4 * X_PITCH + begin * STEP * 2) / 16 + lane % 4;

    float sums[1][4] = {};
    for (int base = 0; base < steps; base += DEPTH)
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            const int step = base + i;
            if (step < steps) {
                uint4 b = make_uint4(0, 0, 0, 0);  // zeros for tokens past the last
                if (there) b = token_at[step * (STEP / 8)];
                multiply_step(sums[0], a[i], b);
                if (step + DEPTH < steps)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        a[i][half] = load_weight(tile_at + (step + DEPTH) * TILE + half * 32);
            }
        }

    store_partial<1>(partial[share], sums, lane);
    __syncthreads();
    for (int i = threadIdx.x; i < 8 * ROWS; i += SHARES * 32) {
        const int row = i % ROWS, token = i / ROWS, at = token * PITCH + row;
        if (token < tokens && strip * ROWS + row < rows) {
            float sum = partial[0][at];
#pragma unroll
            for (int other = 1; other < SHARES; ++other) sum += partial[other][at];
            store_output(out, bias, sum, token, strip * ROWS + row, rows);
        }
    }
}

// Grid (SHARES, tiles of 8 TILES tokens, groups of WIDE_STRIPS strips): neighbours in time share a group's weights. A
// warp takes WARP_STRIPS strips: two, and what it reads of x from shared memory serves twice, as registers allow.
template <int TILES, int DEPTH, int WARP_STRIPS>
__device__ __forceinline__ void wide(ARGUMENTS) {
    constexpr int TOKENS = TILES * 8, THREADS = WIDE_STRIPS / WARP_STRIPS * 32;
    extern __shared__ uint4 shared[];  // [steps of the share][TOKENS][32] of x, later [WIDE_STRIPS][TOKENS][PITCH] sums
    let_next_start();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, share = blockIdx.x;
    const int begin = share_begin(share), steps = share_begin(share + 1) - begin;
    const uint4* tile_at[WARP_STRIPS];
#pragma unroll
    for (int s = 0; s < WARP_STRIPS; ++s) {  // past the last strip: that one again, and its sums are not stored
        const int strip = min(int(blockIdx.z) * WIDE_STRIPS + warp * WARP_STRIPS + s, (rows - 1) / ROWS);
        tile_at[s] = weight + (size_t(strip) * STEPS + begin) * TILE + lane;
    }
    uint4 a[DEPTH][WARP_STRIPS][2];
#pragma unroll
    for (int i = 0; i < DEPTH; ++i)
        if (i < steps)
#pragma unroll
            for (int s = 0; s < WARP_STRIPS; ++s)
#pragma unroll
                for (int half = 0; half < 2; ++half) a[i][s][half] = load_weight(tile_at[s] + i * TILE + half * 32);

    wait_for_previous();
    const int first = blockIdx.y * TOKENS;
    const unsigned shared_at = unsigned(__cvta_generic_to_shared(shared));
    for (int i = threadIdx.x; i < steps * TOKENS * 4; i += THREADS) {
        const int token = first + i / 4 % TOKENS, step = i / 4 / TOKENS;
        const bool there = token < tokens;  // zeros for tokens past the last
        const bf16* from = x + size_t(there ? token : 0) * COLUMNS + (begin + step) * STEP + i % 4 * 8;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(shared_at + i * 16), "l"(from), "r"(there ? 16 : 0) : "memory");
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();

    float sums[WARP_STRIPS][TILES][4] = {};
    for (int base = 0; base < steps; base += DEPTH)
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            const int step = base + i;
            if (step < steps) {
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile) {
                    const uint4 b = shared[(step * TILES + tile) * 32 + lane];
#pragma unroll
                    for (int s = 0; s < WARP_STRIPS; ++s) multiply_step(sums[s][tile], a[i][s], b);
                }
                if (step + DEPTH < steps)
#pragma unroll
                    for (int s = 0; s < WARP_STRIPS; ++s)
#pragma unroll
                        for (int half = 0; half < 2; ++half)
                            a[i][s][half] = load_weight(tile_at[s] + (step + DEPTH) * TILE + half * 32);
            }
        }

    __syncthreads();  // x is no longer needed: its place takes the sums
#pragma unroll
    for (int s = 0; s < WARP_STRIPS; ++s)
        store_partial<TILES>(
            reinterpret_cast<float*>(shared) + (warp * WARP_STRIPS + s) * TOKENS * PITCH, sums[s], lane);
    cluster_exchange();
    for (int i = share * THREADS + threadIdx.x; i < WIDE_STRIPS * TOKENS * ROWS; i += SHARES * THREADS) {
        const int token = i / ROWS % TOKENS, slot = i / ROWS / TOKENS;
        const int row = (blockIdx.z * WIDE_STRIPS + slot) * ROWS + i % ROWS;
        if (first + token < tokens && row < rows) {
            const unsigned at = shared_at + ((slot * TOKENS + token) * PITCH + i % ROWS) * sizeof(float);
            float parts[SHARES];
#pragma unroll
            for (int other = 0; other < SHARES; ++other) parts[other] = load_remote(at, other);
            float sum = parts[0];
#pragma unroll
            for (int other = 1; other < SHARES; ++other) sum += parts[other];
            store_output(out, bias, sum, first + token, row, rows);
        }
    }
    cluster_meet();  // a block that left would take its sums with it; what was read of them is in registers already
}

}  // namespace

extern "C" __global__ void __launch_bounds__(SHARES * 32, NARROW_BLOCKS) narrow_8(ARGUMENTS) {
    narrow<NARROW_DEPTH>(weight, x, bias, out, rows, tokens);
}

extern "C" __global__ void __cluster_dims__(SHARES, 1, 1) __launch_bounds__(WIDE_STRIPS * 16, 4) wide_16(ARGUMENTS) {
    wide<2, 4, 2>(weight, x, bias, out, rows, tokens);
}

extern "C" __global__ void __cluster_dims__(SHARES, 1, 1) __launch_bounds__(WIDE_STRIPS * 16, 4) wide_32(ARGUMENTS) {
    wide<4, 4, 2>(weight, x, bias, out, rows, tokens);
}

extern "C" __global__ void __cluster_dims__(SHARES, 1, 1) __launch_bounds__(WIDE_STRIPS * 32, 2) wide_64(ARGUMENTS) {
    wide<8, 5, 1>(weight, x, bias, out, rows, tokens);
}
