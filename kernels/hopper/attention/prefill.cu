// Attention of packed prompts over pages, by wgmma, for the H100: what decode's kernel does for single tokens.
//
// rope_append: the keys and values of qkv [T, (heads + 2 kv_heads) * 64] bf16 into their pages, keys rotated.
//   One thread takes 8 low elements of a row of 64 and the 8 high ones they rotate with: four accesses of 16 bytes.
//   Moves 512 bytes a token and kv head: at 8 kv heads and 8192 tokens 34 MB, 11 us.
//
// prefill_attention: the queries of qkv, rotated as they are loaded, and pages [pages, kv_heads, 64 keys, 64] of keys
//   and of values, a page table [slots, P] -> out [T, heads * 64]. 256 flops a query head and key that is seen: at 64
//   heads a prompt of 4096 takes 137 GFLOP, at the 773 TFLOP/s of a large matrix product 178 us. Bytes are few: qkv and
//   out once (74 MB), and pages mostly from the L2, 16 KB for 1 MFLOP of each of a block's warpgroups.
//
// A block takes one kv head and a tile of consecutive tokens. A consumer warpgroup holds 64 rows: a few tokens with the
// GROUP query heads that share the kv head. They are the A operand of both products, in registers (the scores'
// accumulators, packed to bf16, are the second product's A fragments); pages of keys and values are the B operand, as
// they come. One more warp, the producer, keeps a ring of pages filled with cp.async. A page of 64 rows takes the
// tensor cores and the exponentials' unit about the same time, so three warpgroups take turns at them. A page's scores
// are asked for while the values of the page before are still multiplied.
//
// A tile is cut into runs of tokens of one slot, taken one after the other, each from an accumulator of zeros: what one
// request's pages hold never touches another's rows. Within a run pages come in ascending order, one at a time, and a
// page of which a row sees no key leaves the row as it is: the peak stays, sums are multiplied by one and get zero
// added. So a token's bytes do not depend on its neighbours, on how its prompt was cut, or on the bucket.
//
// Macros, from kernels.hopper.attention: GROUP (1 to 16), DIM, PAGE; CONSUMERS, WARPGROUP_TOKENS and STAGES;
// APPEND_THREADS and ROW_THREADS of rope_append.

#include "attention/layout.cuh"
#include "attention/rope.cuh"
#include "common/ptx.cuh"
#include "common/wgmma.cuh"

constexpr int CONSUMER_WARPS = 4 * CONSUMERS;
constexpr int THREADS = 32 * (CONSUMER_WARPS + 1);
constexpr int TILE = CONSUMERS * WARPGROUP_TOKENS;
constexpr int LAG = 2;                // pages under way before the oldest is waited for
constexpr int RING_ALIGNMENT = 1024;  // the swizzle is a function of address bits 4 to 9
constexpr int RING_BYTES = STAGES * 2 * PAGE_BYTES;
constexpr unsigned ALL_LANES = 0xffffffffu;

static_assert(TILE <= 32, "a lane knows one token of the tile");
static_assert(WARPGROUP_TOKENS * GROUP <= 64, "rows of a warpgroup");
static_assert(LAG < STAGES, "else neither the producer nor the consumers could move");
static_assert(SHARED_BYTES >= RING_ALIGNMENT + RING_BYTES + 2 * STAGES * 8, "the ring, aligned, and its barriers");
static_assert(ROW_THREADS == 4, "a thread takes an element's 16 bytes of each half of a row");

// RoPE and append ----------------------------------------------------------------------------------------------------

// One thread for each token, row of 64 (keys, then values) and quarter of half a row.
extern "C" __global__ void __launch_bounds__(APPEND_THREADS)
    rope_append(const char* qkv, const float* cos, const float* sin, const int* positions, const int* slots,
                const int* page_table, char* keys, char* values, int tokens, int kv_heads, int table_width) {
    griddep_wait_first();
    griddep_launch_dependents();
    griddep_wait();
    const int index = blockIdx.x * blockDim.x + threadIdx.x;
    const int quarter = index % ROW_THREADS, row = index / ROW_THREADS % (2 * kv_heads);
    const int token = index / ROW_THREADS / (2 * kv_heads);
    if (token >= tokens) return;
    const long long of_qkv = static_cast<long long>(token) * kv_heads * (GROUP + 2) + kv_heads * GROUP + row;
    const char* from = qkv + of_qkv * ROW_BYTES + quarter * 16;
    uint4 low = *reinterpret_cast<const uint4*>(from), high = *reinterpret_cast<const uint4*>(from + ROW_BYTES / 2);
    const int position = positions[token];
    if (row < kv_heads) {
        const long long angle = static_cast<long long>(position) * (DIM / 2) + quarter * 8;
        rotate(low, high, cos + angle, sin + angle);
    }
    const long long page = page_table[static_cast<long long>(slots[token]) * table_width + position / PAGE];
    char* to = row < kv_heads ? keys : values;
    to += (page * kv_heads + row % kv_heads) * PAGE_BYTES + position % PAGE * ROW_BYTES + quarter * 16;
    *reinterpret_cast<uint4*>(to) = low;
    *reinterpret_cast<uint4*>(to + ROW_BYTES / 2) = high;
}

// Attention ----------------------------------------------------------------------------------------------------------

// What a launch works on.
struct Launch {
    const char* qkv;
    const float *cos, *sin;
    const int* page_table;
    const char *keys, *values;
    const float* sinks;
    char* out;
    int kv_heads, table_width;
};

// The ring of pages in shared memory. Steps are a block's pages of all runs in order; step s has stage s % STAGES.
struct Ring {
    unsigned pages;        // [STAGES, keys or values, PAGE_BYTES]
    unsigned full, empty;  // [STAGES] mbarriers: a stage's pages have come; all consumers have read them

    __device__ __forceinline__ explicit Ring(const char* shared) {
        pages = (shared_address(shared) + RING_ALIGNMENT - 1) / RING_ALIGNMENT * RING_ALIGNMENT;
        full = pages + RING_BYTES, empty = full + STAGES * 8;
    }
    __device__ __forceinline__ void init() const {
        for (int stage = 0; stage < STAGES; stage++) {
            mbarrier_init(full + stage * 8, 32);
            mbarrier_init(empty + stage * 8, CONSUMER_WARPS);
        }
    }
    __device__ __forceinline__ unsigned keys_of(int step) const { return pages + step % STAGES * 2 * PAGE_BYTES; }
    __device__ __forceinline__ void wait_full(int step) const {
        mbarrier_wait(full + step % STAGES * 8, step / STAGES % 2);
    }
    __device__ __forceinline__ void wait_empty(int step) const {  // of the step that had the stage before
        if (step >= STAGES) mbarrier_wait(empty + step % STAGES * 8, (step / STAGES - 1) % 2);
    }
    __device__ __forceinline__ void release(int step, int lane) const {
        if (lane == 0) mbarrier_arrive(empty + step % STAGES * 8);
    }
    __device__ __forceinline__ void hand_over(int step) const {
        fence_proxy_async();
        mbarrier_arrive(full + step % STAGES * 8);
    }
};

// The tile's tokens as a warp knows them: lane l the l-th.
struct Token {
    bool real;  // else past the last
    int slot, position, first_key;
};

// Consecutive tokens of one slot; begin and end are places in the tile. `unseen` has a bit for each run to come.
struct Run {
    int begin, end;
    int first_key, last_key;  // that any of its tokens sees

    __device__ __forceinline__ Run(unsigned& unseen, int tokens, const Token& token, int lane) {
        begin = __ffs(unseen) - 1;
        unseen &= unseen - 1;
        end = unseen ? __ffs(unseen) - 1 : tokens;
        keys_of(begin, end, token, lane, first_key, last_key);
    }

    // Of the tokens from `from` to before `to`; none: from the largest to -1.
    __device__ __forceinline__ static void keys_of(int from, int to, const Token& token, int lane, int& first,
                                                   int& last) {
        const bool in = lane >= from && lane < to;
        first = __reduce_min_sync(ALL_LANES, in ? token.first_key : 0x7fffffff);
        last = __reduce_max_sync(ALL_LANES, in ? token.position : -1);
    }
};

// One page of one kv head, keys or values, by a warp. Zeros for keys that no token of the run sees: what lies there may
// be NaN, and 0 * NaN would reach a sum.
__device__ __forceinline__ void fetch(unsigned to, const char* from, int page_key, const Run& run, int lane) {
    const int row = lane / 8, chunk = lane % 8;
#pragma unroll
    for (int i = 0; i < PAGE / 4; i++) {
        const int r = 4 * i + row;
        const bool seen = page_key + r >= run.first_key && page_key + r <= run.last_key;
        cp_async(to + swizzled(r, chunk), from + r * ROW_BYTES + chunk * 16, seen);
    }
}

// The pages of all runs into the ring, in the order in which the consumers take them.
__device__ __forceinline__ void produce(const Launch& launch, const Ring& ring, int head, unsigned runs, int tokens,
                                        const Token& token, int lane) {
    int step = 0;
    while (runs) {
        const Run run(runs, tokens, token, lane);
        const int slot = __shfl_sync(ALL_LANES, token.slot, run.begin);
        const int* table = launch.page_table + static_cast<long long>(slot) * launch.table_width;
        const int first_page = run.first_key / PAGE, last_page = run.last_key / PAGE;
        int entry = 0;  // lane l knows where the l-th of the next 32 pages lies
        for (int page = first_page; page <= last_page; page++, step++) {
            const int nth = (page - first_page) % 32;
            if (nth == 0) entry = page + lane <= last_page ? table[page + lane] : 0;
            const long long at_page = __shfl_sync(ALL_LANES, entry, nth);
            const long long at = (at_page * launch.kv_heads + head) * PAGE_BYTES;
            ring.wait_empty(step);
            const unsigned to = ring.keys_of(step);
            fetch(to, launch.keys + at, page * PAGE, run, lane);
            fetch(to + PAGE_BYTES, launch.values + at, page * PAGE, run, lane);
            cp_async_commit();
            if (step >= LAG) {
                cp_async_wait<LAG>();
                ring.hand_over(step - LAG);
            }
        }
    }
    static_assert(LAG == 2, "the last two are handed over one by one");
    if (step >= 2) {
        cp_async_wait<1>();
        ring.hand_over(step - 2);
    }
    cp_async_wait<0>();
    ring.hand_over(step - 1);
}

// This thread's two rows of a warpgroup's 64, as wgmma lays them out.
struct Rows {
    int of_tile[2];  // each row's token by its place in the tile; TILE, which is in no run, for a row without one
    int position[2], first_key[2];
};

// A warpgroup's rows, and their queries, rotated, as A fragments.
__device__ __forceinline__ void load_queries(const Launch& launch, int head, int tile_begin, int my_begin, int count,
                                             const Token& token, int warp, int lane, Rows& rows,
                                             unsigned (&queries)[DIM / 16][4]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = accumulator_row(warp, lane, r);
        const bool used = row < WARPGROUP_TOKENS * GROUP && my_begin + row / GROUP < count;
        rows.of_tile[r] = used ? my_begin + row / GROUP : TILE;
        rows.position[r] = __shfl_sync(ALL_LANES, token.position, rows.of_tile[r] % 32);
        rows.first_key[r] = __shfl_sync(ALL_LANES, token.first_key, rows.of_tile[r] % 32);
        const long long at = tile_begin + (used ? rows.of_tile[r] : 0);
        const char* from = launch.qkv + (at * launch.kv_heads * (GROUP + 2) + head * GROUP + row % GROUP) * ROW_BYTES;
#pragma unroll
        for (int k = 0; k < DIM / 16; k++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int dim = 16 * k + 8 * half + lane % 4 * 2;
                queries[k][r + 2 * half] = used ? *reinterpret_cast<const unsigned*>(from + dim * 2) : 0u;
            }
        }
        const long long angle = static_cast<long long>(used ? rows.position[r] : 0) * (DIM / 2);
#pragma unroll
        for (int k = 0; k < DIM / 32; k++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int dim = 16 * k + 8 * half + lane % 4 * 2;
                const float2 c = *reinterpret_cast<const float2*>(launch.cos + angle + dim);
                const float2 s = *reinterpret_cast<const float2*>(launch.sin + angle + dim);
                rotate(queries[k][r + 2 * half], queries[k + DIM / 32][r + 2 * half], c.x, s.x, c.y, s.y);
            }
        }
    }
}

// The softmax state of this thread's two rows in one run: peak of the scores (times log2 e), this lane's part of the
// sum of the powers above the peak, and values weighted by those powers, as wgmma leaves them.
struct SoftmaxState {
    int first[2], last[2];  // keys that each row sees; last -1: the row is not of this run
    float peak[2], total[2], sums[32];

    __device__ __forceinline__ SoftmaxState(const Rows& rows, const Run& run) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const bool in = rows.of_tile[r] >= run.begin && rows.of_tile[r] < run.end;
            first[r] = rows.first_key[r], last[r] = in ? rows.position[r] : -1;
            peak[r] = minus_infinity(), total[r] = 0.f;
        }
#pragma unroll
        for (int i = 0; i < 32; i++) sums[i] = 0.f;
    }

    // Take in a page's scores -> its powers, the second product's A fragments.
    __device__ __forceinline__ void raise(float (&scores)[32], int page_key, int lane,
                                          unsigned (&powers)[PAGE / 16][4]) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            if (page_key < first[r] || page_key + PAGE - 1 > last[r]) {
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    const int key = page_key + i / 2 * 8 + lane % 4 * 2 + i % 2;
                    float& score = scores[i / 2 * 4 + 2 * r + i % 2];
                    if (key < first[r] || key > last[r]) score = minus_infinity();
                }
            }
            float top = scores[2 * r];
#pragma unroll
            for (int n = 0; n < 8; n++) top = fmaxf(top, fmaxf(scores[4 * n + 2 * r], scores[4 * n + 2 * r + 1]));
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
            top = fmaxf(peak[r], top * SCALE);
            const float base = top == minus_infinity() ? 0.f : top;  // a row that has seen nothing yet
            const float shrink = ex2(peak[r] - base);
            peak[r] = top;
            float sum = 0.f;
#pragma unroll
            for (int n = 0; n < 8; n++) {
                const float p0 = ex2(__fmaf_rn(scores[4 * n + 2 * r], SCALE, -base));
                const float p1 = ex2(__fmaf_rn(scores[4 * n + 2 * r + 1], SCALE, -base));
                sum += p0 + p1;
                powers[n / 2][r + n % 2 * 2] = round_bf16x2(p0, p1);
            }
            total[r] = __fmaf_rn(total[r], shrink, sum);
#pragma unroll
            for (int n = 0; n < 8; n++) sums[4 * n + 2 * r] *= shrink, sums[4 * n + 2 * r + 1] *= shrink;
        }
    }

    // The sink joins the denominator, and rows of this run leave.
    __device__ __forceinline__ void store(const Launch& launch, const Rows& rows, int head, int tile_begin, int warp,
                                          int lane) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            total[r] += __shfl_xor_sync(ALL_LANES, total[r], 1);
            total[r] += __shfl_xor_sync(ALL_LANES, total[r], 2);
            if (last[r] < 0) continue;
            const int row = accumulator_row(warp, lane, r);
            const long long at = static_cast<long long>(tile_begin + rows.of_tile[r]) * launch.kv_heads + head;
            const long long query_row = at * GROUP + row % GROUP;
            const float sink = launch.sinks[head * GROUP + row % GROUP] * LOG2E, top = fmaxf(peak[r], sink);
            const float weight = ex2(peak[r] - top);
            const float scale = weight / __fmaf_rn(weight, total[r], ex2(sink - top));
#pragma unroll
            for (int n = 0; n < 8; n++) {
                *reinterpret_cast<unsigned*>(launch.out + query_row * ROW_BYTES + (8 * n + lane % 4 * 2) * 2) =
                    round_bf16x2(sums[4 * n + 2 * r] * scale, sums[4 * n + 2 * r + 1] * scale);
            }
        }
    }
};

// A warpgroup's rows over the pages of all runs.
__device__ __forceinline__ void consume(const Launch& launch, const Ring& ring, int head, int tile_begin, unsigned runs,
                                        int count, const Token& token, int warp, int lane) {
    const int my_begin = warp / 4 * WARPGROUP_TOKENS, my_end = my_begin + WARPGROUP_TOKENS;
    Rows rows;
    unsigned queries[DIM / 16][4];
    load_queries(launch, head, tile_begin, my_begin, count, token, warp, lane, rows, queries);

    int step = 0;
    const auto pass_to = [&](int from, int to) {  // pages of which this warpgroup's rows see nothing
#pragma unroll 1
        for (int page = from; page < to; page++, step++) {
            ring.wait_full(step);
            ring.release(step, lane);
        }
    };
    while (runs) {
        const Run run(runs, count, token, lane);
        int my_first, my_last;  // keys that this warpgroup's tokens of the run see
        Run::keys_of(max(run.begin, my_begin), min(run.end, my_end), token, lane, my_first, my_last);
        const int first_page = run.first_key / PAGE, end_page = run.last_key / PAGE + 1;
        const int my_first_page = my_last < 0 ? end_page : my_first / PAGE;
        const int my_end_page = my_last < 0 ? end_page : my_last / PAGE + 1;
        SoftmaxState state(rows, run);

        pass_to(first_page, my_first_page);
        for (int page = my_first_page; page < my_end_page; page++, step++) {
            const unsigned page_keys = ring.keys_of(step);
            ring.wait_full(step);
            float scores[32];
            const unsigned long long b = page_operand(page_keys);
            wgmma_fence();
            wgmma<false>(scores, queries[0], b);
#pragma unroll
            for (int k = 1; k < DIM / 16; k++) wgmma(scores, queries[k], b + SIXTEEN_DIMENSIONS * k);
            wgmma_commit();
            wgmma_wait<0>();
            hold(scores);
            hold(state.sums);
            if (page > my_first_page) ring.release(step - 1, lane);

            unsigned powers[PAGE / 16][4];
            state.raise(scores, page * PAGE, lane, powers);
            const unsigned long long v = page_operand(page_keys + PAGE_BYTES);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < PAGE / 16; k++) wgmma<true, true>(state.sums, powers[k], v + SIXTEEN_KEYS * k);
            wgmma_commit();  // and the next page's scores are asked for before these are done
        }
        wgmma_wait<0>();
        hold(state.sums);
        if (my_first_page < my_end_page) ring.release(step - 1, lane);
        pass_to(my_end_page, end_page);
        state.store(launch, rows, head, tile_begin, warp, lane);
    }
}

// Heavy tiles first: those at the end of a long prompt see most keys, and short ones fill the gaps at the end.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    prefill_attention(const char* qkv, const float* cos, const float* sin, const int* positions, const int* slots,
                      const int* page_table, const char* keys, const char* values, const float* sinks, char* out,
                      int tokens, int kv_heads, int table_width, int window) {
    extern __shared__ char shared[];  // the ring, from a multiple of RING_ALIGNMENT, and its barriers
    griddep_wait_first();
    const Launch launch = {qkv, cos, sin, page_table, keys, values, sinks, out, kv_heads, table_width};
    const Ring ring(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int head = blockIdx.x % kv_heads;
    const int tile_begin = (gridDim.x / kv_heads - 1 - blockIdx.x / kv_heads) * TILE;
    griddep_launch_dependents();
    if (threadIdx.x == 0) ring.init();

    // Positions and slots do not change while a graph runs, and need no wait for the kernels before.
    const int count = min(TILE, tokens - tile_begin);
    Token token = {lane < count, 0, 0, 0};
    if (token.real) {
        token.slot = slots[tile_begin + lane];
        token.position = positions[tile_begin + lane];
        token.first_key = max(token.position - window + 1, 0);
    }
    const int slot_before = __shfl_up_sync(ALL_LANES, token.slot, 1);
    const unsigned runs = __ballot_sync(ALL_LANES, token.real && (lane == 0 || token.slot != slot_before));
    __syncthreads();
    griddep_wait();
    if (warp == CONSUMER_WARPS)
        produce(launch, ring, head, runs, count, token, lane);
    else
        consume(launch, ring, head, tile_begin, runs, count, token, warp, lane);
}
