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
// GROUP query heads that share the kv head; for both products they are the A operand in registers (the scores'
// accumulators are, packed to bf16, the second product's A fragments), and pages of keys and values the B operand, as
// they come. One more warp, the producer, keeps a ring of pages filled with cp.async. A page of 64 rows costs the
// tensor cores and the exponentials' unit about the same time, so three warpgroups share them: while one multiplies,
// another raises. A page's scores are asked for while the values of the one before are still multiplied.
//
// A tile is cut into runs of tokens of one slot, taken one after the other, each from an accumulator of zeros: what one
// request's pages hold never touches another's rows. Within a run pages come in ascending order, each of them alone,
// and a page of which a row sees nothing changes nothing in the row: the peak stays, sums are multiplied by one and get
// zero added. So a token's bytes do not depend on its neighbours, on how its prompt was cut, or on the bucket.

#ifndef GROUP
#error "GROUP: query heads a kv head, 1 to 16"
#endif

constexpr int DIM = 64;
constexpr int PAGE = 64;
constexpr int ROW_BYTES = 2 * DIM;
constexpr int PAGE_BYTES = PAGE * ROW_BYTES;  // of one kv head
constexpr int CONSUMERS = 3;                  // warpgroups
constexpr int CONSUMER_WARPS = 4 * CONSUMERS;
constexpr int THREADS = 32 * (CONSUMER_WARPS + 1);
constexpr int MOST_TOKENS = 32 / CONSUMERS;   // of a warpgroup: a lane knows one token of the tile
constexpr int GROUP_TOKENS = 64 / GROUP < MOST_TOKENS ? 64 / GROUP : MOST_TOKENS;
constexpr int TILE = CONSUMERS * GROUP_TOKENS;
constexpr int STAGES = 8;  // pages of keys and values in the ring
constexpr int LAG = 2;     // pages under way before the oldest is waited for; below STAGES, else nobody could move
constexpr int RING_ALIGNMENT = 1024;  // the swizzle is a function of address bits 4 to 9
constexpr float LOG2E = 1.44269504f;
constexpr float SCALE = 0.125f * LOG2E;  // 1 / sqrt(64), for powers of two

// Instructions -------------------------------------------------------------------------------------------------------

__device__ inline void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ inline void let_successor_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__device__ inline unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// 16 bytes to shared memory, zeros instead where !valid: then nothing is read.
__device__ inline void copy_async(unsigned to, const char* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the newest `LEFT` committed groups of this thread have arrived.
template <int LEFT>
__device__ inline void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

__device__ inline void init_barrier(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Until the phase of that parity is complete; the first phase's is 0.
__device__ inline void wait_barrier(unsigned barrier, int parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}

// This thread's copies to shared memory become visible to wgmma, which reads by the async proxy.
__device__ inline void show_to_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

#define EIGHT(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define ACCUMULATOR(d) EIGHT(d, 0), EIGHT(d, 8), EIGHT(d, 16), EIGHT(d, 24)

// Until all committed multiplies are done. They name their accumulators, so that no use of these moves above.
__device__ inline void wgmma_wait(float (&d)[32]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : ACCUMULATOR(d)::"memory");
}
__device__ inline void wgmma_wait(float (&d)[32], float (&e)[32]) {
    wgmma_wait(d);
    asm volatile("" : ACCUMULATOR(e)::"memory");
}

// d [64, 64] = or += a [64, 16] b [16, 64]. A warp holds 16 rows; with g = lane / 4 and t = 2 (lane % 4), pairs of
// neighbours: a0 row g, k t; a1 row g + 8, k t; a2 row g, k t + 8; a3 row g + 8, k t + 8. d[4 n] row g, column 8 n + t
// and the next; d[4 n + 2] row g + 8.
template <bool ACCUMULATE, bool TRANSPOSED>
__device__ inline void multiply(float (&d)[32], const unsigned (&a)[4], unsigned long long b) {
    asm volatile(
        "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
        "%23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, accumulate, 1, 1, %38;\n}"
        : ACCUMULATOR(d)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ACCUMULATE ? 1 : 0), "n"(TRANSPOSED ? 1 : 0));
}

// A page in shared memory, 64 rows of 128 bytes swizzled by 128, as wgmma's B operand (PTX ISA, "matrix descriptor"):
// bits 0-13 the address, 16-29 the leading and 32-45 the stride byte offset, all / 16; 62-63 the swizzle, 1 for 128
// bytes. The unit of this layout is an atom of 8 rows of 128 bytes, 1024 bytes that follow each other; within it
// 16-byte chunk c of row r lies at c ^ r.
//   Keys (n: a key, a row; k: a dimension, along the row) are K-major: the stride offset leads from 8 keys to the next
//   8, 1024 bytes; the leading offset is not used. 16 dimensions more: 32 bytes along the row, whose sum is swizzled.
//   Values (n: a dimension, along the row; k: a key, a row) are MN-major, "transposed": an atom is 64 n by 8 k; the
//   stride offset leads from 8 k to the next 8, 1024 bytes, the leading offset to the next 64 n, of which there are
//   none. 16 keys more: two atoms, 2048 bytes.
__device__ inline unsigned long long page_operand(unsigned address) {
    constexpr unsigned long long ATOM = 1024 >> 4;
    return 1ull << 62 | ATOM << 32 | ATOM << 16 | (address >> 4 & 0x3fff);
}
constexpr int SIXTEEN_DIMENSIONS = 32 >> 4, SIXTEEN_KEYS = 2048 >> 4;  // in a descriptor

__device__ inline float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two floats to bf16, rounded to nearest; `low` in the low half: the lower address, the smaller index.
__device__ inline unsigned pack(float low, float high) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

__device__ inline float minus_infinity() { return __uint_as_float(0xff800000u); }

__device__ inline float low_half(unsigned pair) { return __uint_as_float(pair << 16); }

__device__ inline float high_half(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

// RoPE and append ----------------------------------------------------------------------------------------------------

// No fused multiply-add, so that the bytes are those of the plain formula.
__device__ inline float turn(float x, float cos, float y, float sin) {
    return __fadd_rn(__fmul_rn(x, cos), __fmul_rn(y, sin));
}

// Elements 2 i and 2 i + 1 of the low and of the high half of a row.
__device__ inline void rotate(unsigned& low, unsigned& high, float cos0, float sin0, float cos1, float sin1) {
    const float a0 = low_half(low), a1 = high_half(low), b0 = low_half(high), b1 = high_half(high);
    low = pack(turn(a0, cos0, -b0, sin0), turn(a1, cos1, -b1, sin1));
    high = pack(turn(b0, cos0, a0, sin0), turn(b1, cos1, a1, sin1));
}

// One thread for each token, row of 64 (keys, then values) and quarter of half a row.
extern "C" __global__ void __launch_bounds__(128) rope_append(
    const char* qkv, const float* cos, const float* sin, const int* positions, const int* slots, const int* page_table,
    char* keys, char* values, int tokens, int kv_heads, int table_width) {
    let_successor_start();
    wait_for_predecessor();
    const int index = blockIdx.x * blockDim.x + threadIdx.x;
    const int quarter = index % 4, row = index / 4 % (2 * kv_heads), token = index / 4 / (2 * kv_heads);
    if (token >= tokens) return;
    const long long of_qkv = static_cast<long long>(token) * kv_heads * (GROUP + 2) + kv_heads * GROUP + row;
    const char* from = qkv + of_qkv * ROW_BYTES + quarter * 16;
    uint4 low = *reinterpret_cast<const uint4*>(from), high = *reinterpret_cast<const uint4*>(from + ROW_BYTES / 2);
    const int position = positions[token];
    if (row < kv_heads) {
        const long long angle = static_cast<long long>(position) * (DIM / 2) + quarter * 8;
        const float4 cos0 = *reinterpret_cast<const float4*>(cos + angle);
        const float4 cos4 = *reinterpret_cast<const float4*>(cos + angle + 4);
        const float4 sin0 = *reinterpret_cast<const float4*>(sin + angle);
        const float4 sin4 = *reinterpret_cast<const float4*>(sin + angle + 4);
        rotate(low.x, high.x, cos0.x, sin0.x, cos0.y, sin0.y);
        rotate(low.y, high.y, cos0.z, sin0.z, cos0.w, sin0.w);
        rotate(low.z, high.z, cos4.x, sin4.x, cos4.y, sin4.y);
        rotate(low.w, high.w, cos4.z, sin4.z, cos4.w, sin4.w);
    }
    const long long page = page_table[static_cast<long long>(slots[token]) * table_width + position / PAGE];
    char* to = row < kv_heads ? keys : values;
    to += (page * kv_heads + row % kv_heads) * PAGE_BYTES + position % PAGE * ROW_BYTES + quarter * 16;
    *reinterpret_cast<uint4*>(to) = low;
    *reinterpret_cast<uint4*>(to + ROW_BYTES / 2) = high;
}

// Attention ----------------------------------------------------------------------------------------------------------

// The tile's tokens as a warp knows them: lane l the l-th.
struct Token {
    bool real;  // else past the last
    int slot, position, first_key;
};

// Consecutive tokens of one slot; begin and end are places in the tile. `unseen` has a bit for each run to come.
struct Run {
    int begin, end;
    int first_key, last_key;  // that any of its tokens sees

    __device__ Run(unsigned& unseen, int tokens, const Token& token, int lane) {
        begin = __ffs(unseen) - 1;
        unseen &= unseen - 1;
        end = unseen ? __ffs(unseen) - 1 : tokens;
        keys_of(begin, end, token, lane, first_key, last_key);
    }

    // Of the tokens from `from` to before `to`; none: from the largest to -1.
    __device__ static void keys_of(int from, int to, const Token& token, int lane, int& first, int& last) {
        const bool in = lane >= from && lane < to;
        first = __reduce_min_sync(0xffffffffu, in ? token.first_key : 0x7fffffff);
        last = __reduce_max_sync(0xffffffffu, in ? token.position : -1);
    }
};

// Half a stage: one page of one kv head, by a warp. Chunk c of row r goes to place c ^ (r % 8). Zeros for keys that no
// token of the run sees: what lies there may be NaN, and 0 * NaN would reach a sum.
__device__ inline void fetch(unsigned to, const char* from, int page_key, const Run& run, int lane) {
    const int row = lane / 8, chunk = lane % 8;
#pragma unroll
    for (int i = 0; i < PAGE / 4; i++) {
        const int r = 4 * i + row;
        const bool seen = page_key + r >= run.first_key && page_key + r <= run.last_key;
        copy_async(to + r * ROW_BYTES + ((chunk ^ r % 8) * 16), from + r * ROW_BYTES + chunk * 16, seen);
    }
}

// The pages of all runs into the ring, in the order in which the consumers take them.
__device__ inline void produce(
    unsigned ring, unsigned full, unsigned empty, const char* keys, const char* values, const int* page_table,
    int table_width, int kv_heads, int head, unsigned runs, int tokens, const Token& token, int lane) {
    int step = 0;
    const auto hand_over = [&](int of_step) {
        show_to_async_proxy();
        arrive(full + of_step % STAGES * 8);
    };
    while (runs) {
        const Run run(runs, tokens, token, lane);
        const int slot = __shfl_sync(0xffffffffu, token.slot, run.begin);
        const int* table = page_table + static_cast<long long>(slot) * table_width;
        const int first_page = run.first_key / PAGE, last_page = run.last_key / PAGE;
        int entry = 0;  // lane l knows where the l-th of the next 32 pages lies
        for (int page = first_page; page <= last_page; page++, step++) {
            const int nth = (page - first_page) % 32;
            if (nth == 0) entry = page + lane <= last_page ? table[page + lane] : 0;
            const long long at_page = __shfl_sync(0xffffffffu, entry, nth);
            const long long at = (at_page * kv_heads + head) * PAGE_BYTES;
            if (step >= STAGES) wait_barrier(empty + step % STAGES * 8, (step / STAGES - 1) % 2);
            const unsigned to = ring + step % STAGES * 2 * PAGE_BYTES;
            fetch(to, keys + at, page * PAGE, run, lane);
            fetch(to + PAGE_BYTES, values + at, page * PAGE, run, lane);
            commit_copies();
            if (step >= LAG) {
                wait_copies<LAG>();
                hand_over(step - LAG);
            }
        }
    }
    static_assert(LAG == 2, "the last two are handed over one by one");
    if (step >= 2) {
        wait_copies<1>();
        hand_over(step - 2);
    }
    wait_copies<0>();
    hand_over(step - 1);
}

// Heavy tiles first: those at the end of a long prompt see most keys, and short ones fill the gaps at the end.
extern "C" __global__ void __launch_bounds__(THREADS, 1) prefill_attention(
    const char* qkv, const float* cos, const float* sin, const int* positions, const int* slots, const int* page_table,
    const char* keys, const char* values, const float* sinks, char* out, int tokens, int kv_heads, int table_width,
    int window) {
    extern __shared__ char shared[];  // [STAGES, 2, PAGE_BYTES] from a multiple of RING_ALIGNMENT, then the barriers
    const unsigned ring = (shared_address(shared) + RING_ALIGNMENT - 1) / RING_ALIGNMENT * RING_ALIGNMENT;
    const unsigned full = ring + STAGES * 2 * PAGE_BYTES, empty = full + STAGES * 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int head = blockIdx.x % kv_heads;
    const int tile_begin = (gridDim.x / kv_heads - 1 - blockIdx.x / kv_heads) * TILE;
    let_successor_start();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; stage++) {
            init_barrier(full + stage * 8, 32);
            init_barrier(empty + stage * 8, CONSUMER_WARPS);
        }
    }

    // Positions and slots do not change while a graph runs, and need no wait for the kernels before.
    const int count = min(TILE, tokens - tile_begin);
    Token token = {lane < count, 0, 0, 0};
    if (token.real) {
        token.slot = slots[tile_begin + lane];
        token.position = positions[tile_begin + lane];
        token.first_key = max(token.position - window + 1, 0);
    }
    const int slot_before = __shfl_up_sync(0xffffffffu, token.slot, 1);
    unsigned runs = __ballot_sync(0xffffffffu, token.real && (lane == 0 || token.slot != slot_before));
    __syncthreads();
    wait_for_predecessor();

    if (warp == CONSUMER_WARPS) {
        produce(
            ring, full, empty, keys, values, page_table, table_width, kv_heads, head, runs, count, token, lane);
        return;
    }

    // This thread's two rows, as wgmma lays them out.
    const int my_begin = warp / 4 * GROUP_TOKENS, my_end = my_begin + GROUP_TOKENS;  // this warpgroup's tokens
    int of_tile[2], row_position[2], row_first[2];
    unsigned queries[DIM / 16][4];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = warp % 4 * 16 + lane / 4 + 8 * r;
        const bool used = row < GROUP_TOKENS * GROUP && my_begin + row / GROUP < count;
        of_tile[r] = used ? my_begin + row / GROUP : TILE;  // TILE: in no run
        row_position[r] = __shfl_sync(0xffffffffu, token.position, of_tile[r] % 32);
        row_first[r] = __shfl_sync(0xffffffffu, token.first_key, of_tile[r] % 32);
        const long long at = tile_begin + (used ? of_tile[r] : 0);
        const char* from = qkv + (at * kv_heads * (GROUP + 2) + head * GROUP + row % GROUP) * ROW_BYTES;
#pragma unroll
        for (int k = 0; k < DIM / 16; k++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int dim = 16 * k + 8 * half + lane % 4 * 2;
                queries[k][r + 2 * half] = used ? *reinterpret_cast<const unsigned*>(from + dim * 2) : 0u;
            }
        }
        const long long angle = static_cast<long long>(used ? row_position[r] : 0) * (DIM / 2);
#pragma unroll
        for (int k = 0; k < DIM / 32; k++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int dim = 16 * k + 8 * half + lane % 4 * 2;
                const float2 c = *reinterpret_cast<const float2*>(cos + angle + dim);
                const float2 s = *reinterpret_cast<const float2*>(sin + angle + dim);
                rotate(queries[k][r + 2 * half], queries[k + DIM / 32][r + 2 * half], c.x, s.x, c.y, s.y);
            }
        }
    }

    const auto release = [&](int of_step) {
        if (lane == 0) arrive(empty + of_step % STAGES * 8);
    };
    int step = 0;
    const auto pass_to = [&](int from, int to) {  // pages of which this warpgroup's rows see nothing
#pragma unroll 1
        for (int page = from; page < to; page++, step++) {
            wait_barrier(full + step % STAGES * 8, step / STAGES % 2);
            release(step);
        }
    };
    while (runs) {
        const Run run(runs, count, token, lane);
        int my_first, my_last;  // keys that this warpgroup's tokens of the run see
        Run::keys_of(max(run.begin, my_begin), min(run.end, my_end), token, lane, my_first, my_last);
        const int first_page = run.first_key / PAGE, end_page = run.last_key / PAGE + 1;
        const int my_first_page = my_last < 0 ? end_page : my_first / PAGE;
        const int my_end_page = my_last < 0 ? end_page : my_last / PAGE + 1;
        int first[2], last[2];  // and each row; none outside the run
        float peak[2], total[2], sums[32];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const bool in = of_tile[r] >= run.begin && of_tile[r] < run.end;
            first[r] = row_first[r], last[r] = in ? row_position[r] : -1;
            peak[r] = minus_infinity(), total[r] = 0.f;
        }
#pragma unroll
        for (int i = 0; i < 32; i++) sums[i] = 0.f;

        pass_to(first_page, my_first_page);
        for (int page = my_first_page; page < my_end_page; page++, step++) {
            const int page_key = page * PAGE;
            const unsigned page_keys = ring + step % STAGES * 2 * PAGE_BYTES;
            wait_barrier(full + step % STAGES * 8, step / STAGES % 2);
            float scores[32];
            const unsigned long long b = page_operand(page_keys);
            wgmma_fence();
            multiply<false, false>(scores, queries[0], b);
#pragma unroll
            for (int k = 1; k < DIM / 16; k++) multiply<true, false>(scores, queries[k], b + SIXTEEN_DIMENSIONS * k);
            wgmma_commit();
            wgmma_wait(scores, sums);
            if (page > my_first_page) release(step - 1);

            unsigned powers[PAGE / 16][4];
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
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
                top = fmaxf(peak[r], top * SCALE);
                const float base = top == minus_infinity() ? 0.f : top;  // a row that has seen nothing yet
                const float shrink = power_of_two(peak[r] - base);
                peak[r] = top;
                float sum = 0.f;
#pragma unroll
                for (int n = 0; n < 8; n++) {
                    const float p0 = power_of_two(__fmaf_rn(scores[4 * n + 2 * r], SCALE, -base));
                    const float p1 = power_of_two(__fmaf_rn(scores[4 * n + 2 * r + 1], SCALE, -base));
                    sum += p0 + p1;
                    powers[n / 2][r + n % 2 * 2] = pack(p0, p1);
                }
                total[r] = __fmaf_rn(total[r], shrink, sum);
#pragma unroll
                for (int n = 0; n < 8; n++) sums[4 * n + 2 * r] *= shrink, sums[4 * n + 2 * r + 1] *= shrink;
            }

            const unsigned long long v = page_operand(page_keys + PAGE_BYTES);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < PAGE / 16; k++) multiply<true, true>(sums, powers[k], v + SIXTEEN_KEYS * k);
            wgmma_commit();  // and the next page's scores are asked for before these are done
        }
        wgmma_wait(sums);
        if (my_first_page < my_end_page) release(step - 1);
        pass_to(my_end_page, end_page);

#pragma unroll
        for (int r = 0; r < 2; r++) {
            total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
            total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
            if (last[r] < 0) continue;
            const int row = warp % 4 * 16 + lane / 4 + 8 * r;
            const long long at = static_cast<long long>(tile_begin + of_tile[r]) * kv_heads + head;
            const long long query_row = at * GROUP + row % GROUP;
            const float sink = sinks[head * GROUP + row % GROUP] * LOG2E, top = fmaxf(peak[r], sink);
            const float weight = power_of_two(peak[r] - top);
            const float scale = weight / __fmaf_rn(weight, total[r], power_of_two(sink - top));
#pragma unroll
            for (int n = 0; n < 8; n++) {
                *reinterpret_cast<unsigned*>(out + query_row * ROW_BYTES + (8 * n + lane % 4 * 2) * 2) =
                    pack(sums[4 * n + 2 * r] * scale, sums[4 * n + 2 * r + 1] * scale);
            }
        }
    }
}
