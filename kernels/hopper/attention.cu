// Decode attention over pages, for the H100: RoPE, the append of keys and values, and attention, one token a request.
//
// qkv [T, (heads + 2 kv_heads) * 64] bf16, cos and sin [positions, 32] float32, pages [pages, kv_heads, 64 keys, 64] of
// keys and of values, a page table [slots, P] -> [T, heads * 64]. Reads 256 bytes a key, kv head and token: at 3.08
// TB/s and 8 kv heads the floor of one token is 0.7 us for 1k keys, 5.4 for 8k, 43.6 for 64k; of 64 tokens at 1k 43.6.
//
// The work is cut into splits: runs of 4, 8, 16 ... whole pages, the fewest that need no more than 64 splits. A token's
// splits depend on its own position and on the window alone, and each is computed and combined by the same instructions
// in the same order whoever does it, so a token's bytes do not depend on the batch. Four warps share a split page by
// page, each with a page of keys and one of values in shared memory: 64 KB a block, so three blocks share a
// multiprocessor. Of these 192 KB 3 TB/s needs about 20 in flight: a block may compute or combine while the others
// stream; within a block a page's keys make room for the next page's before its values are used, and the last page's
// for the first of the block's next split, so that memory is busy while shares are combined. Partial sums are a
// thirtieth of the bytes of the smallest split, and stay in the L2.
//
// Queries are rotated in registers by whoever loads them. The token's own key and value are rotated and written by the
// warp that has its last page, to the page and to the warp's own copy: nobody else reads them in this launch.
//
// Positions and slots are constant while a graph runs, and pages are what earlier steps left: a block finds its first
// split and asks for its pages before it waits for the kernel before. What then is serial: qkv, the products, the
// combination.
//
// GROUP query heads share a kv head and are the rows of both products (mma.m16n8k16; rows past GROUP are zero): the
// scores' accumulators are then, packed to bf16, the second product's A fragments, and a lane owns one head's softmax.
// Keys past the position (or before the window) are never fetched: cp.async fills their rows with zeros, so that
// neither NaN keys nor 0 * NaN values reach a product; their scores are -inf.

#ifndef GROUP
#error "GROUP: query heads a kv head, 1 to 16"
#endif

constexpr int DIM = 64;
constexpr int PAGE = 64;
constexpr int LOG_WARPS = 2;
constexpr int WARPS = 1 << LOG_WARPS;
constexpr int THREADS = 32 * WARPS;
constexpr int ROW_BYTES = 2 * DIM;
constexpr int PAGE_BYTES = PAGE * ROW_BYTES;  // of one kv head
constexpr int MOST_SPLITS = 64;               // bounds what a combine reads
constexpr int MOST_TOKENS = 2 * THREADS;      // a thread counts the splits of two
constexpr int OUT_STRIDE = DIM + 8;           // floats: 8 heads' rows of an accumulator tile fall into distinct banks
constexpr int ROWS = GROUP > 8 ? 2 : 1;       // of a lane: heads lane / 4 and lane / 4 + 8
constexpr int QUADS = GROUP * DIM / 4;        // a token's outputs of one kv head, four at a time
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

// Four 8x8 matrices of 16 bits; lane 8 i + r holds the address of row r of matrix i. Lane l gets of each matrix
// elements 2 (l % 4) and the next of row l / 4.
__device__ inline void load_matrices(unsigned (&x)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(row)
                 : "memory");
}

// The same of the transposed matrices.
__device__ inline void load_matrices_transposed(unsigned (&x)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(row)
                 : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8]. With g = lane / 4 and t = 2 (lane % 4), pairs of neighbours: a0 row g, k t; a1 row
// g + 8, k t; a2 row g, k t + 8; a3 row g + 8, k t + 8; b0 k t, column g; b1 k t + 8, column g; c0 c1 row g, columns t
// and t + 1; c2 c3 row g + 8.
__device__ inline void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

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

// Add one to a counter that wraps to zero past `last`; what it was. The block's writes before its last barrier come
// before the count for whoever counts later: release and acquire are cumulative over barriers.
__device__ inline unsigned count_one(unsigned* counter, unsigned last) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(last) : "memory");
    return before;
}

// RoPE ---------------------------------------------------------------------------------------------------------------

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

// Attention ----------------------------------------------------------------------------------------------------------

// The keys a token sees, and how they are cut.
struct Keys {
    int first, last;  // the keys themselves, by position
    int first_page;   // entry of the page table row
    int pages;        // entries from there
    int log_split;    // of the pages in a split
    int splits;

    __device__ Keys(int position, int window) {
        first = max(position - window + 1, 0);
        last = position;
        first_page = first / PAGE;
        pages = position / PAGE - first_page + 1;
        log_split = LOG_WARPS;
        while (MOST_SPLITS << log_split < pages) log_split++;
        splits = (pages + (1 << log_split) - 1) >> log_split;
    }
};

// One split of a (token, kv head), and which of its pages are this warp's: warp w takes w, w + 4 ... of them.
struct Item {
    int token, head, split, position;
    int first;  // page of this warp, counted from the token's first
    int count;  // pages of this warp, 0 to 32
    int entry;  // where the l-th of them lies, in lane l

    __device__ void divide(const Keys& seen, int warp) {
        first = (split << seen.log_split) + warp;
        count = (min((split + 1) << seen.log_split, seen.pages) - first + WARPS - 1) / WARPS;
    }
};

// A split's share of one kv head's softmax, for its GROUP heads: peak of the scores (times log2 e), sum of the powers
// above the peak, and values weighted by those powers. Unset where a warp had no page: peak -inf, the rest 0.
struct Share {
    float peak[ROWS], total[ROWS], out[DIM / 8][4];
};

// Fetch one page of one kv head, a commit group of its own. Row r's 16-byte chunk c goes to place c ^ (r % 8): the
// eight rows of a matrix then lie in distinct banks. The token's own row is left alone: `append` writes it.
__device__ inline void fetch(unsigned to, const char* from, int page_key, const Keys& keys, int lane) {
    const int row = lane / 8, chunk = lane % 8;
#pragma unroll
    for (int i = 0; i < PAGE / 4; i++) {
        const int r = 4 * i + row;
        const int key = page_key + r;
        const unsigned place = to + r * ROW_BYTES + ((chunk ^ r % 8) * 16);
        const bool seen = key >= keys.first && key < keys.last;
        if (key != keys.last) copy_async(place, from + r * ROW_BYTES + chunk * 16, seen);
    }
    commit_copies();
}

// One page: scores, softmax, values. `between` is called when the page's keys are no longer needed and must leave one
// commit group more behind it.
template <class Between>
__device__ inline void attend(
    Share& share, const unsigned (&q)[DIM / 16][4], unsigned page_keys, unsigned page_values, int page_key,
    const Keys& keys, int lane, Between between) {
    const int in_matrix = lane % 8, matrix = lane / 8;
    float scores[PAGE / 8][4];  // heads x keys: tile n holds keys 8 n ... 8 n + 7
    wait_copies<1>();           // the values are still under way
    __syncwarp();
#pragma unroll
    for (int n = 0; n < PAGE / 8; n++) {
        scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.f;
#pragma unroll
        for (int half = 0; half < 2; half++) {  // 32 of the 64 dimensions: two steps of 16
            unsigned b[4];
            load_matrices(b, page_keys + (8 * n + in_matrix) * ROW_BYTES + ((4 * half + matrix) ^ in_matrix) * 16);
            multiply(scores[n], q[2 * half], b[0], b[1]);
            multiply(scores[n], q[2 * half + 1], b[2], b[3]);
        }
    }
    __syncwarp();
    between();
    if (page_key < keys.first || page_key + PAGE - 1 > keys.last) {
#pragma unroll
        for (int n = 0; n < PAGE / 8; n++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int key = page_key + 8 * n + lane % 4 * 2 + j % 2;
                if (key < keys.first || key > keys.last) scores[n][j] = minus_infinity();
            }
        }
    }
    unsigned powers[PAGE / 16][4];  // the second product's A: heads x keys
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (r >= ROWS) {
#pragma unroll
            for (int k = 0; k < PAGE / 16; k++) powers[k][r] = powers[k][r + 2] = 0;
            continue;
        }
        float peak = scores[0][2 * r];
#pragma unroll
        for (int n = 0; n < PAGE / 8; n++) peak = fmaxf(peak, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
        peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 1));
        peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 2));
        peak = fmaxf(share.peak[r], peak * SCALE);  // finite: every page holds a key that is seen
        const float shrink = power_of_two(share.peak[r] - peak);
        share.peak[r] = peak;
        float total = 0.f;
#pragma unroll
        for (int n = 0; n < PAGE / 8; n++) {
            const float p0 = power_of_two(__fmaf_rn(scores[n][2 * r], SCALE, -peak));
            const float p1 = power_of_two(__fmaf_rn(scores[n][2 * r + 1], SCALE, -peak));
            total += p0 + p1;
            powers[n / 2][r + n % 2 * 2] = pack(p0, p1);
        }
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        share.total[r] = __fmaf_rn(share.total[r], shrink, total);
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) {
            share.out[n][2 * r] *= shrink;
            share.out[n][2 * r + 1] *= shrink;
        }
    }
    wait_copies<1>();  // the values are here; what `between` began is still under way
    __syncwarp();
#pragma unroll
    for (int k = 0; k < PAGE / 16; k++) {
#pragma unroll
        for (int pair = 0; pair < DIM / 16; pair++) {  // of tiles of 8 dimensions
            unsigned b[4];
            const int row = 16 * k + matrix % 2 * 8 + in_matrix;
            load_matrices_transposed(b, page_values + row * ROW_BYTES + ((2 * pair + matrix / 2) ^ in_matrix) * 16);
            multiply(share.out[2 * pair], powers[k], b[0], b[1]);
            multiply(share.out[2 * pair + 1], powers[k], b[2], b[3]);
        }
    }
    __syncwarp();
}

// A grid of any number of blocks that shares the items evenly. An item is one split of a (token, kv head), found by a
// prefix sum over the tokens, so that long contexts among short ones spread over all blocks and no block is launched
// for splits that a token does not have; the last to finish a token's splits combines them.
//
// most: splits that a token can have. partial [tokens, kv_heads, most, GROUP, 64] and peaks [tokens, kv_heads, most,
// GROUP, 2] (peak, total) float32 hold the splits of tokens with more than one. counters [tokens, kv_heads] count
// finished splits and are zero between launches: the last to finish wraps them.
extern "C" __global__ void __launch_bounds__(THREADS, 3) decode_attention(
    const char* qkv, const float* cos, const float* sin, const int* positions, const int* slots, const int* page_table,
    char* keys, char* values, const float* sinks, char* out, float* partial, float2* peaks, unsigned* counters,
    int tokens, int kv_heads, int table_width, int window, int most) {
    extern __shared__ __align__(128) char pages[];  // [WARPS, 2, PAGE_BYTES]
    __shared__ int begins[MOST_TOKENS + 1], known_positions[MOST_TOKENS], known_slots[MOST_TOKENS];
    __shared__ int scan[WARPS];
    __shared__ bool is_last;
    __shared__ uint4 fresh[2][ROW_BYTES / 16];  // the token's own key and value
    __shared__ float warp_peak[WARPS][16], warp_total[WARPS][16];
    __shared__ float weights[GROUP][MOST_SPLITS];

    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    char* my_pages = pages + warp * 2 * PAGE_BYTES;
    const unsigned my_keys = shared_address(my_pages), my_values = my_keys + PAGE_BYTES;
    float* my_out = reinterpret_cast<float*>(my_pages + PAGE_BYTES);  // a split's end: over the values
    let_successor_start();

    // Where each token's splits begin; a thread counts those of two tokens. One token needs no search, nor do tokens of
    // one split.
    const bool searched = most > 1 && tokens > 1;
    int items = tokens * kv_heads;
    if (searched) {
        int count[2] = {0, 0};
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int token = 2 * thread + j;
            if (token >= tokens) continue;
            known_slots[token] = slots[token];
            known_positions[token] = positions[token];
            count[j] = Keys(known_positions[token], window).splits;
        }
        int end = count[0] + count[1];
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int before = __shfl_up_sync(0xffffffffu, end, distance);
            if (lane >= distance) end += before;
        }
        if (lane == 31) scan[warp] = end;
        __syncthreads();
        int all = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            if (w < warp) end += scan[w];
            all += scan[w];
        }
        begins[2 * thread] = end - count[1] - count[0];
        begins[2 * thread + 1] = end - count[1];
        if (thread == THREADS - 1) begins[MOST_TOKENS] = end;
        __syncthreads();
        items = all * kv_heads;
    } else if (tokens == 1) {
        items = Keys(positions[0], window).splits * kv_heads;
    }
    if (blockIdx.x >= items) return;

    int slot;  // of the item found last
    const auto find = [&](int index) {
        Item item;
        const int unit = index / kv_heads;
        item.head = index % kv_heads;  // neighbours read neighbouring heads of a page
        if (searched) {
            item.token = 0;
            for (int base = 0; base < tokens; base += 32) {
                const int token = base + lane;
                const bool here = token < tokens && begins[token] <= unit && unit < begins[token + 1];
                const unsigned where = __ballot_sync(0xffffffffu, here);
                if (where) item.token = base + __ffs(where) - 1;
            }
            item.split = unit - begins[item.token];
            item.position = known_positions[item.token], slot = known_slots[item.token];
        } else {
            item.token = tokens == 1 ? 0 : unit;
            item.split = tokens == 1 ? unit : 0;
            item.position = positions[item.token], slot = slots[item.token];
        }
        item.divide(Keys(item.position, window), warp);
        item.entry = 0;
        return item;
    };
    // The entries of the item found last.
    const auto look_up = [&](Item& item) {
        const int first_page = Keys(item.position, window).first_page + item.first;
        const int* table = page_table + static_cast<long long>(slot) * table_width + first_page;
        if (lane < item.count) item.entry = table[WARPS * lane];
    };
    const auto begin_fetch = [&](unsigned to, const char* pool, const Item& item, int n) {
        const Keys seen(item.position, window);
        const long long page = __shfl_sync(0xffffffffu, item.entry, n);
        const char* from = pool + (page * kv_heads + item.head) * PAGE_BYTES;
        fetch(to, from, (seen.first_page + item.first + WARPS * n) * PAGE, seen, lane);
    };

    // What earlier steps left, the page table and pages, is asked for before the wait for this step's qkv. The one
    // kernel of the step that writes to the table comes first, and the second lets none start before it has ended.
    int index = blockIdx.x;
    Item next = find(index);
    look_up(next);
    if (next.count > 0) begin_fetch(my_keys, keys, next, 0);
    while (index < items) {
        const Item item = next;
        const int token = item.token, head = item.head, split = item.split, count = item.count;
        const Keys seen(item.position, window);
        if (count > 0) begin_fetch(my_values, values, item, 0);
        wait_for_predecessor();
        const long long query_row = (static_cast<long long>(token) * kv_heads + head) * GROUP;
        const char* token_qkv = qkv + static_cast<long long>(token) * kv_heads * (GROUP + 2) * ROW_BYTES;
        const long long owner = static_cast<long long>(token) * kv_heads + head;
        const long long angle = static_cast<long long>(item.position) * (DIM / 2);

        // The token's own key and value, where this warp has the last page: a lane takes a quarter of each half.
        const int last_page = item.first + WARPS * (count - 1) == seen.pages - 1 ? count - 1 : -1;  // -1: not here
        if (last_page >= 0) {
            const long long page = __shfl_sync(0xffffffffu, item.entry, last_page);
            if (lane < 8) {
                const bool of_values = lane / 4;
                const int quarter = lane % 4, row = kv_heads * (of_values ? GROUP + 1 : GROUP) + head;
                const uint4* from = reinterpret_cast<const uint4*>(token_qkv + row * ROW_BYTES) + quarter;
                uint4 low = from[0], high = from[4];
                if (!of_values) {
                    const float4* turns = reinterpret_cast<const float4*>(cos + angle) + 2 * quarter;
                    const float4 cos0 = turns[0], cos4 = turns[1];
                    turns = reinterpret_cast<const float4*>(sin + angle) + 2 * quarter;
                    const float4 sin0 = turns[0], sin4 = turns[1];
                    rotate(low.x, high.x, cos0.x, sin0.x, cos0.y, sin0.y);
                    rotate(low.y, high.y, cos0.z, sin0.z, cos0.w, sin0.w);
                    rotate(low.z, high.z, cos4.x, sin4.x, cos4.y, sin4.y);
                    rotate(low.w, high.w, cos4.z, sin4.z, cos4.w, sin4.w);
                }
                char* to = (of_values ? values : keys) + (page * kv_heads + head) * PAGE_BYTES;
                uint4* place = reinterpret_cast<uint4*>(to + item.position % PAGE * ROW_BYTES) + quarter;
                place[0] = low, place[4] = high;
                fresh[of_values][quarter] = low, fresh[of_values][quarter + 4] = high;
            }
            __syncwarp();
        }
        const auto append = [&] {  // to this warp's copy of the page: the rest of it is still under way
            const int chunk = lane % 8, row = item.position % PAGE;
            char* to = my_pages + (lane / 8) * PAGE_BYTES + row * ROW_BYTES;
            if (lane < 16) *reinterpret_cast<uint4*>(to + (chunk ^ row % 8) * 16) = fresh[lane / 8][chunk];
        };

        unsigned queries[DIM / 16][4];
#pragma unroll
        for (int k = 0; k < DIM / 16; k++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int row = lane / 4 + j % 2 * 8, dim = 16 * k + lane % 4 * 2 + j / 2 * 8;
                const char* from = token_qkv + (head * GROUP + row) * ROW_BYTES + dim * 2;
                queries[k][j] = row < GROUP ? *reinterpret_cast<const unsigned*>(from) : 0u;
            }
        }
#pragma unroll
        for (int k = 0; k < DIM / 32; k++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int dim = 16 * k + lane % 4 * 2 + half * 8;
                const float2 c = *reinterpret_cast<const float2*>(cos + angle + dim);
                const float2 s = *reinterpret_cast<const float2*>(sin + angle + dim);
#pragma unroll
                for (int j = 0; j < ROWS; j++) {
                    rotate(queries[k][2 * half + j], queries[k + DIM / 32][2 * half + j], c.x, s.x, c.y, s.y);
                }
            }
        }

        index += gridDim.x;
        if (index < items) {
            next = find(index);
            look_up(next);
        } else {
            next.count = 0;
        }

        Share share;
#pragma unroll
        for (int r = 0; r < ROWS; r++) share.peak[r] = minus_infinity(), share.total[r] = 0.f;
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) share.out[n][0] = share.out[n][1] = share.out[n][2] = share.out[n][3] = 0.f;
        for (int n = 0; n < count; n++) {
            const bool more = n + 1 < count;
            const int page_key = (seen.first_page + item.first + WARPS * n) * PAGE;
            if (n == last_page) append();
            attend(share, queries, my_keys, my_values, page_key, seen, lane, [&] {
                if (more) begin_fetch(my_keys, keys, item, n + 1);
                else if (next.count > 0) begin_fetch(my_keys, keys, next, 0);
                else commit_copies();  // an empty group, so that the count of groups behind is the same
            });
            if (more) begin_fetch(my_values, values, item, n + 1);
        }
        if (count == 0 && next.count > 0) begin_fetch(my_keys, keys, next, 0);

        // The four warps' shares to one, by way of shared memory, in the order of the warps.
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int row = lane / 4 + 8 * r;
            if (lane % 4 == 0) warp_peak[warp][row] = share.peak[r], warp_total[warp][row] = share.total[r];
#pragma unroll
            for (int n = 0; n < DIM / 8; n++) {
                *reinterpret_cast<float2*>(my_out + row * OUT_STRIDE + 8 * n + lane % 4 * 2) =
                    make_float2(share.out[n][2 * r], share.out[n][2 * r + 1]);
            }
        }
        __syncthreads();
#pragma unroll
        for (int quad = thread; quad < QUADS; quad += THREADS) {
            const int row = quad / (DIM / 4), dim = quad % (DIM / 4) * 4;
            float peak = warp_peak[0][row], total = 0.f;
#pragma unroll
            for (int w = 1; w < WARPS; w++) peak = fmaxf(peak, warp_peak[w][row]);
            float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float weight = power_of_two(warp_peak[w][row] - peak);
                const float* of_warp = reinterpret_cast<float*>(pages + w * 2 * PAGE_BYTES + PAGE_BYTES);
                const float4 part = *reinterpret_cast<const float4*>(of_warp + row * OUT_STRIDE + dim);
                total = __fmaf_rn(weight, warp_total[w][row], total);
                sum.x = __fmaf_rn(weight, part.x, sum.x), sum.y = __fmaf_rn(weight, part.y, sum.y);
                sum.z = __fmaf_rn(weight, part.z, sum.z), sum.w = __fmaf_rn(weight, part.w, sum.w);
            }
            if (seen.splits == 1) {
                const float sink = sinks[head * GROUP + row] * LOG2E, top = fmaxf(peak, sink);
                const float weight = power_of_two(peak - top);
                const float scale = weight / __fmaf_rn(weight, total, power_of_two(sink - top));
                *reinterpret_cast<uint2*>(out + (query_row + row) * ROW_BYTES + dim * 2) =
                    make_uint2(pack(sum.x * scale, sum.y * scale), pack(sum.z * scale, sum.w * scale));
            } else {
                const long long at = (owner * most + split) * GROUP + row;
                *reinterpret_cast<float4*>(partial + at * DIM + dim) = sum;
                if (dim == 0) peaks[at] = make_float2(peak, total);
            }
        }
        __syncthreads();  // the shared memory is free again
        if (seen.splits == 1) continue;

        if (thread == 0) is_last = count_one(counters + owner, seen.splits - 1) == seen.splits - 1;
        __syncthreads();
        if (!is_last) continue;
        // Combine: half a warp serves a head. Each of its lanes weighs every sixteenth split, then takes four outputs.
#pragma unroll
        for (int quad = thread; quad < (QUADS + THREADS - 1) / THREADS * THREADS; quad += THREADS) {
            const int row = min(quad / (DIM / 4), GROUP - 1), of_row = quad % (DIM / 4), dim = of_row * 4;
            const long long base = owner * most * GROUP + row;  // of the head's row in split 0
            const float sink = sinks[head * GROUP + row] * LOG2E;
            float2 stats[MOST_SPLITS / 16];
            float top = sink, total = 0.f;
#pragma unroll
            for (int n = 0; n < MOST_SPLITS / 16; n++) {
                const int split = 16 * n + of_row;
                stats[n] = split < seen.splits ? __ldcg(peaks + base + split * GROUP)
                                               : make_float2(minus_infinity(), 0.f);
                top = fmaxf(top, stats[n].x);
            }
#pragma unroll
            for (int mask = 8; mask > 0; mask /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, mask));
#pragma unroll
            for (int n = 0; n < MOST_SPLITS / 16; n++) {
                const float weight = power_of_two(stats[n].x - top);
                total = __fmaf_rn(weight, stats[n].y, total);
                weights[row][16 * n + of_row] = weight;
            }
#pragma unroll
            for (int mask = 8; mask > 0; mask /= 2) total += __shfl_xor_sync(0xffffffffu, total, mask);
            __syncwarp();
            const float scale = 1.f / (total + power_of_two(sink - top));
            float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
            constexpr int BATCH = 8;  // loads under way at once; past the last split they repeat it with weight 0
            for (int split = 0; split < seen.splits; split += BATCH) {
                float4 part[BATCH];
#pragma unroll
                for (int n = 0; n < BATCH; n++) {
                    const long long at = base + min(split + n, seen.splits - 1) * GROUP;
                    part[n] = __ldcg(reinterpret_cast<const float4*>(partial + at * DIM + dim));
                }
#pragma unroll
                for (int n = 0; n < BATCH; n++) {
                    const float weight = weights[row][split + n];
                    sum.x = __fmaf_rn(weight, part[n].x, sum.x), sum.y = __fmaf_rn(weight, part[n].y, sum.y);
                    sum.z = __fmaf_rn(weight, part[n].z, sum.z), sum.w = __fmaf_rn(weight, part[n].w, sum.w);
                }
            }
            if (quad < QUADS) {
                *reinterpret_cast<uint2*>(out + (query_row + row) * ROW_BYTES + dim * 2) =
                    make_uint2(pack(sum.x * scale, sum.y * scale), pack(sum.z * scale, sum.w * scale));
            }
        }
    }
}
