// out [T, N] = x [T, K] * weight [N, K]^T + bias [N], bf16 in and out, float32 inside. K is the macro COLUMNS.
// SHARES, a macro too, is the number of runs into which K is cut.
//
// Bytes: 2 N K of weights, once, and 2 T (K + N). Floors at 3.08 TB/s: QKV (5120 x 2880) 9.6 us, O (2880 x 4096) 7.7,
// lm_head (201088 x 2880) 376. Up to 64 tokens the weights are all that counts.
//
// Weights are the A operand of mma.m16n8k16 (16 rows), tokens its N (8 a tile): one token wastes the least. They are
// packed as [strip of 16 rows][step of 32 columns][2 fragments][32 lanes][16 bytes], so a warp streams whole kilobytes,
// straight into the registers that the multiply reads. Columns are in natural order; one ldmatrix of 8 tokens by 32
// columns is the B operand of a step's two multiplies.
//
// Every dot product is cut into SHARES runs of columns, each added up in order by one warp, and the runs are added in
// order: whatever the number of tokens, and whichever kernel runs. The two kernels differ in where warps stand:
//   narrow, up to 8 tokens: a block is one strip, its warps the shares. x lies in shared memory: loads of it in the
//     loop would queue behind those of the weights, and their latency be paid at every turn. All blocks of the
//     projections are resident at once, and a multiprocessor with more of them has more loads in flight, so the memory
//     itself evens out what 320 or 180 strips on 132 multiprocessors leave uneven. Up to 2 tokens leave room in shared
//     memory for what registers do not hold of a strip: after the wait for the previous kernel nothing is asked for
//     but x.
//   wide: a cluster of SHARES blocks, one a multiprocessor, keeps x in shared memory, a share of its columns in each
//     block (94 KB for 64 tokens of 2880 in four), and walks over groups of strips, a strip for each warp: else 64
//     tokens of x, read for each strip, would be four times the weights' bytes. The grid is as many clusters as are
//     resident at once, the strips are dealt out evenly. Partial sums are sent to the block that adds them up, and
//     counted there as they arrive: a barrier that ordered memory would wait for the next group's weights, which are on
//     their way. Above 64 tokens the grid tiles them by 64.
//
// With RANKS > 1 the result is this rank's part of a sum, and goes to the other ranks, too, from where it is made: into
// the area of their memory in which add_norm_route of norm.cu waits for it. There is why no flags are needed.
//
// The first loads of weights, which no kernel writes, are in flight before the wait for the previous kernel, whose end
// the memory would otherwise sit out.

#if !defined(COLUMNS) || !defined(SHARES) || !defined(RANKS)
#error "COLUMNS: K, a multiple of 32; SHARES: runs of K; RANKS: that add up their results"
#endif

namespace {

using bf16 = unsigned short;  // its bits: NVRTC has no headers to offer

#define ARGUMENTS const uint4 *weight, const bf16 *x, const bf16 *bias, bf16 *out, int rows, int tokens,             \
                  const unsigned long long *memories, int offset, int rank
#define PASSED weight, x, bias, out, rows, tokens, memories, offset, rank

constexpr int STEP = 32;                // columns of a packed tile: two k16 multiplies
constexpr int STEPS = COLUMNS / STEP;
constexpr int MOST_STEPS = (STEPS + SHARES - 1) / SHARES;  // of the longest share
constexpr int ROWS = 16;                // rows of a strip
constexpr int TILE = ROWS * STEP / 8;   // 16-byte pieces of a packed tile
// A short share has half of itself in flight with 6 steps, and the registers saved make room for a third block on each
// multiprocessor: all 320 of QKV are resident.
constexpr int NARROW_DEPTH = STEPS / SHARES <= 12 ? 6 : 8;
// Further steps that come to shared memory for 1 or 2 tokens; lm_head's blocks are too many to be resident at once.
constexpr int NARROW_KEPT = SHARES == 8 && MOST_STEPS > NARROW_DEPTH ? MOST_STEPS - NARROW_DEPTH : 0;
constexpr int NARROW_BLOCKS = NARROW_DEPTH == 6 ? 24 / SHARES : 20 / SHARES;
// Warps of a wide block. 20 leave 102 registers a lane and take all 320 strips of QKV in one round of 16 clusters; 16
// leave 128, and a longer share has use for more loads in flight.
constexpr int MOST_WARPS = STEPS / SHARES <= 12 ? 20 : 16;
constexpr int WIDE_DEPTH = MOST_WARPS == 20 ? 4 : 6;  // steps in flight with 64 tokens
constexpr int PITCH = ROWS + 4;         // floats from one token's partial sums to the next: lanes meet no bank twice
constexpr int X_PITCH = (COLUMNS * 2 + 127) / 128 * 128 + 16;  // bytes of a narrow token: eight miss each other

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

// These two only meet: they order no memory, and so cost no fence, which would wait for the weights under way too.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait;" ::: "memory"); }

__device__ __forceinline__ unsigned in_block(unsigned at, int block) {  // that place in the cluster's block's memory
    unsigned there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(block));
    return there;
}

// 16 bytes to a block's shared memory, counted by its barrier as they arrive.
__device__ __forceinline__ void send(unsigned at, const float (&sums)[4], unsigned barrier, int block) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
                 :: "r"(in_block(at, block)), "f"(sums[0]), "f"(sums[1]), "f"(sums[2]), "f"(sums[3]),
                    "r"(in_block(barrier, block)) : "memory");
}

__device__ __forceinline__ void expect(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait_for(unsigned barrier, int parity) {
    asm volatile("{\n .reg .pred done;\nagain:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 " @!done bra again;\n}" :: "r"(barrier), "r"(parity) : "memory");
}

// Bytes, a multiple of 16, to this block's shared memory by the copy engine, counted by a barrier that is made for it.
__device__ __forceinline__ void copy_bulk(unsigned to, const uint4* from, int bytes, unsigned barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;"
                 :: "r"(barrier) : "memory");
    expect(barrier, bytes);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// threadIdx.x, asked again: what follows from it is computed anew, not kept in registers through a loop.
__device__ __forceinline__ unsigned thread_again() {
    unsigned thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

// 16 bytes to shared memory, asynchronously; zeros where there are none.
__device__ __forceinline__ void copy_async(unsigned to, const bf16* from, bool there = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most LATER of this thread's groups of copies, the last committed, are under way.
template <int LATER>
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" :: "n"(LATER) : "memory"); }

// The B operand of a step, 8 tokens by 32 columns: lane l points at columns 8 (l / 8) ... of token l % 8.
__device__ __forceinline__ uint4 load_tokens(unsigned at) {
    uint4 b;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b.x), "=r"(b.y), "=r"(b.z), "=r"(b.w) : "r"(at) : "memory");
    return b;
}

__device__ __forceinline__ void multiply(float (&sums)[4], uint4 a, unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// One step of 32 columns: a lane's fragments of its two multiplies.
__device__ __forceinline__ void multiply_step(float (&sums)[4], const uint4 (&a)[2], const uint4& b) {
    multiply(sums, a[0], b.x, b.y);
    multiply(sums, a[1], b.z, b.w);
}

// A warp's sums to partial [8 tokens][PITCH]: sums 0 and 1 are row g of tokens 2t and 2t + 1 (t = lane % 4), sums 2 and
// 3 row g + 8 of them.
__device__ __forceinline__ void store_partial(float* partial, const float (&sums)[4], int lane) {
    const int row = lane / 4, token = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) partial[(token + i % 2) * PITCH + row + i / 2 * 8] = sums[i];
}

__device__ __forceinline__ float value_of(bf16 bits) { return __uint_as_float(unsigned(bits) << 16); }

__device__ __forceinline__ bf16 rounded(float value) {
    bf16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Where the other ranks' areas begin, in their order. All threads meet at a barrier before they ask.
struct Area {
    char* others[RANKS];

    __device__ __forceinline__ void find(const unsigned long long* memories, int offset, int rank) {
        const int other = threadIdx.x;
        if (other < RANKS - 1) others[other] = reinterpret_cast<char*>(memories[other + (other >= rank)]) + offset;
    }
    // A pair of values, `at` values into the rank's slot of all areas.
    __device__ __forceinline__ void send(size_t at, bf16 low, bf16 high) const {
        for (int other = 0; other < RANKS - 1; ++other)
            asm volatile("st.relaxed.sys.global.u32 [%0], %1;"
                         :: "l"(others[other] + at * 2), "r"(low | unsigned(high) << 16) : "memory");
    }
};

__device__ __forceinline__ int share_begin(int share) { return STEPS * share / SHARES; }

// Grid (strips), SHARES warps. Shared memory: tiles [SHARES][KEPT][TILE], then x [tokens][X_PITCH], of which each warp
// copies and reads its columns.
template <int DEPTH, int KEPT>
__device__ __forceinline__ void narrow(ARGUMENTS) {
    extern __shared__ __align__(128) uint4 shared[];
    __shared__ float partial[SHARES][8 * PITCH];
    __shared__ unsigned long long arrived[SHARES];
    __shared__ Area area;
    let_next_start();
    if (RANKS > 1) area.find(memories, offset, rank);
    const int lane = threadIdx.x % 32, share = threadIdx.x / 32, strip = blockIdx.x;
    const int begin = share_begin(share), steps = share_begin(share + 1) - begin;
    const uint4* tile_at = weight + (size_t(strip) * STEPS + begin) * TILE + lane;
    uint4 a[DEPTH][2];
#pragma unroll
    for (int i = 0; i < DEPTH; ++i)
        if (i < steps)
#pragma unroll
            for (int half = 0; half < 2; ++half) a[i][half] = load_weight(tile_at + i * TILE + half * 32);
    uint4* const kept = shared + share * KEPT * TILE;
    const unsigned barrier = unsigned(__cvta_generic_to_shared(&arrived[share]));
    if (KEPT > 0 && lane == 0 && steps > DEPTH)
        copy_bulk(unsigned(__cvta_generic_to_shared(kept)), tile_at + DEPTH * TILE, (steps - DEPTH) * TILE * 16,
                  barrier);

    wait_for_previous();
    const unsigned x_at = unsigned(__cvta_generic_to_shared(shared + SHARES * KEPT * TILE)) + begin * STEP * 2;
    for (int token = 0; token < tokens; ++token)
        for (int i = lane; i < steps * (STEP / 8); i += 32)
            copy_async(x_at + token * X_PITCH + i * 16, x + size_t(token) * COLUMNS + begin * STEP + i * 8);
    commit_copies();
    wait_for_copies<0>();
    __syncwarp();  // a warp reads only what it copied
    // Past the last token the last again: its sums are not stored, and touch no other token's.
    const unsigned token_at = x_at + min(lane % 8, tokens - 1) * X_PITCH + lane / 8 * 16;

    float sums[4] = {};
    for (int base = 0; base < (KEPT > 0 ? DEPTH : steps); base += DEPTH)
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            const int step = base + i;
            if (step < steps) {
                multiply_step(sums, a[i], load_tokens(token_at + step * (STEP * 2)));
                if (KEPT == 0 && step + DEPTH < steps)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        a[i][half] = load_weight(tile_at + (step + DEPTH) * TILE + half * 32);
            }
        }
    if (KEPT > 0 && steps > DEPTH) {
        wait_for(barrier, 0);
#pragma unroll
        for (int i = 0; i < KEPT; ++i)
            if (DEPTH + i < steps) {
                const uint4 tile[2] = {kept[i * TILE + lane], kept[i * TILE + 32 + lane]};
                multiply_step(sums, tile, load_tokens(token_at + (DEPTH + i) * (STEP * 2)));
            }
    }

    store_partial(partial[share], sums, lane);
    __syncthreads();
    for (int i = threadIdx.x; i < 8 * ROWS; i += SHARES * 32) {  // whole warps
        const int row = i % ROWS, token = i / ROWS, at = token * PITCH + row;
        const size_t place = size_t(token) * rows + strip * ROWS + row;
        const bool wanted = token < tokens && strip * ROWS + row < rows;
        bf16 result = 0;
        if (wanted) {
            float sum = partial[0][at];
#pragma unroll
            for (int other = 1; other < SHARES; ++other) sum += partial[other][at];
            if (bias != nullptr) sum += value_of(bias[strip * ROWS + row]);
            out[place] = result = rounded(sum);
        }
        if (RANKS > 1) {
            const bf16 next = __shfl_down_sync(0xffffffffu, result, 1);
            if (wanted && row % 2 == 0) area.send(size_t(rank) * tokens * rows + place, result, next);
        }
    }
}

// Grid (SHARES, tiles of 8 TILES tokens, clusters that share the groups of strips), up to MOST_WARPS warps. A group is
// a strip for each warp: warps x TILES units of 16 rows by 8 tokens, which the blocks of the cluster add up in turn.
// Shared memory: x [MOST_STEPS][TOKENS][64 bytes], then [units of a block][SHARES][32 lanes] of four sums received: in
// the same place in all blocks of a cluster, whose shares may differ by a step.
template <int TILES, int DEPTH>
__device__ __forceinline__ void wide(ARGUMENTS) {
    constexpr int TOKENS = TILES * 8, STEP_BYTES = TOKENS * STEP * 2;
    extern __shared__ uint4 shared[];
    __shared__ unsigned long long arrived;
    __shared__ Area area;
    let_next_start();
    if (RANKS > 1) area.find(memories, offset, rank);
    const unsigned barrier = unsigned(__cvta_generic_to_shared(&arrived));
    if (threadIdx.x == 0)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;"
                     :: "r"(barrier) : "memory");
    cluster_arrive();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, share = blockIdx.x;
    const int begin = share_begin(share);
    int steps = share_begin(share + 1) - begin;
    asm volatile("" : "+r"(steps));  // where all shares are alike ptxas would merge steps, load in clumps, and spill
    const int strips = (rows + ROWS - 1) / ROWS, groups = (strips + warps - 1) / warps, first_group = blockIdx.z;
    const auto tiles_of = [&](int group) {  // past the last strip: that one again, and its sums are not stored
        return weight + (size_t(min(group * warps + warp, strips - 1)) * STEPS + begin) * TILE + lane;
    };
    const uint4* tile_at = tiles_of(first_group);
    uint4 a[DEPTH][2];
#pragma unroll
    for (int i = 0; i < DEPTH; ++i)
        if (i < steps)
#pragma unroll
            for (int half = 0; half < 2; ++half) a[i][half] = load_weight(tile_at + i * TILE + half * 32);

    wait_for_previous();
    const int first = blockIdx.y * TOKENS;
    const unsigned x_at = unsigned(__cvta_generic_to_shared(shared)), received_at = x_at + MOST_STEPS * STEP_BYTES;
    const float4* received = reinterpret_cast<const float4*>(shared) + MOST_STEPS * STEP_BYTES / 16;
    const int units = (warps * TILES - share + SHARES - 1) / SHARES;  // of this block
    unsigned parity = 0;
    // Piece c of 16 bytes of a step's token r lies at c ^ (r / 2 % 4): eight tokens' miss each other. The columns of
    // the first DEPTH steps come first: they are multiplied while the others are under way.
    const auto copy_steps = [&](int from, int to) {
        for (int i = from * TOKENS * 4 + threadIdx.x; i < to * TOKENS * 4; i += blockDim.x) {
            const int piece = i % 4, token = i / 4 % TOKENS, step = i / 4 / TOKENS;
            const bool there = first + token < tokens;  // zeros for tokens past the last
            copy_async(x_at + step * STEP_BYTES + token * (STEP * 2) + (piece ^ token / 2 % 4) * 16,
                       x + size_t(there ? first + token : 0) * COLUMNS + (begin + step) * STEP + piece * 8, there);
        }
        commit_copies();
    };
    copy_steps(0, min(DEPTH, steps));
    copy_steps(min(DEPTH, steps), steps);
    unsigned token_at = x_at + lane % 8 * (STEP * 2) + (lane / 8 ^ lane / 2 % 4) * 16;
    asm volatile("" : "+r"(token_at));  // kept in a register: ptxas would compute it anew at every step

    for (int group = first_group; group < groups; group += gridDim.z) {
        const bool more = group + int(gridDim.z) < groups;
        const uint4* next_at = tiles_of(group + gridDim.z);
        if (threadIdx.x == 0) expect(barrier, units * SHARES * 512);
        float sums[TILES][4] = {};
        for (int base = 0; base < steps; base += DEPTH) {
            if (group == first_group && base <= DEPTH) {  // later all of x is there
                if (base == 0)
                    wait_for_copies<1>();
                else
                    wait_for_copies<0>();
                __syncthreads();
            }
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) {
                const int step = base + i;
                if (step < steps) {
#pragma unroll
                    for (int tile = 0; tile < TILES; ++tile)
                        multiply_step(
                            sums[tile], a[i], load_tokens(token_at + step * STEP_BYTES + tile * 8 * STEP * 2));
                    // The place in the ring takes a later step or, after the last, the next group's step i.
                    const bool within = step + DEPTH < steps;
                    const uint4* from = within ? tile_at + (step + DEPTH) * TILE : next_at + i * TILE;
                    if (within || more)
#pragma unroll
                        for (int half = 0; half < 2; ++half) a[i][half] = load_weight(from + half * 32);
                }
            }
        }
        tile_at = next_at;

        cluster_wait();  // all blocks have begun, and have read what came to them in the group before
        const int thread = thread_again(), lane = thread % 32, warp = thread / 32;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const int unit = warp * TILES + tile;
            send(received_at + ((unit / SHARES * SHARES + share) * 32 + lane) * 16, sums[tile], barrier, unit % SHARES);
        }
        wait_for(barrier, parity);
        parity ^= 1;
        for (int slot = warp; slot < units; slot += warps) {
            const int unit = slot * SHARES + share;
            float total[4] = {};
#pragma unroll
            for (int other = 0; other < SHARES; ++other) {  // in order
                const float4 part = received[(slot * SHARES + other) * 32 + lane];
                const float parts[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) total[i] = other == 0 ? parts[i] : total[i] + parts[i];
            }
            // Sums 0 and 1 are row g of tokens 2t and 2t + 1, sums 2 and 3 row g + 8 of them.
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = (group * warps + unit / TILES) * ROWS + lane / 4 + i / 2 * 8;
                const int token = first + unit % TILES * 8 + lane % 4 * 2 + i % 2;
                const size_t place = size_t(token) * rows + row;
                const bool wanted = token < tokens && row < rows;
                bf16 result = 0;
                if (wanted) {
                    const float sum = bias == nullptr ? total[i] : total[i] + value_of(bias[row]);
                    out[place] = result = rounded(sum);
                }
                if (RANKS > 1) {
                    const bf16 next = __shfl_down_sync(0xffffffffu, result, 4);
                    if (wanted && row % 2 == 0) area.send(size_t(rank) * tokens * rows + place, result, next);
                }
            }
        }
        if (more) cluster_arrive();
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(SHARES * 32, NARROW_BLOCKS) narrow_2(ARGUMENTS) {
    narrow<NARROW_DEPTH, NARROW_KEPT>(PASSED);
}

extern "C" __global__ void __launch_bounds__(SHARES * 32, NARROW_BLOCKS) narrow_8(ARGUMENTS) {
    narrow<NARROW_DEPTH, 0>(PASSED);
}

extern "C" __global__ void __cluster_dims__(SHARES, 1, 1) __launch_bounds__(MOST_WARPS * 32, 1) wide_16(ARGUMENTS) {
    wide<2, WIDE_DEPTH + 2>(PASSED);
}

extern "C" __global__ void __cluster_dims__(SHARES, 1, 1) __launch_bounds__(MOST_WARPS * 32, 1) wide_32(ARGUMENTS) {
    wide<4, WIDE_DEPTH + 2>(PASSED);
}

extern "C" __global__ void __cluster_dims__(SHARES, 1, 1) __launch_bounds__(MOST_WARPS * 32, 1) wide_64(ARGUMENTS) {
    wide<8, WIDE_DEPTH>(PASSED);
}
