// Decode attention over pages, for the H100: RoPE, the append of keys and values, and attention, one token a request.
//
// qkv [T, (heads + 2 kv_heads) * 64] bf16, cos and sin [positions, 32] float32, pages [pages, kv_heads, 64 keys, 64] of
// keys and of values, a page table [slots, P] -> [T, heads * 64]. Reads 256 bytes a key, kv head and token: at 3.08
// TB/s and 8 kv heads the floor of one token is 0.7 us for 1k keys, 5.4 for 8k, 43.6 for 64k; of 64 tokens at 1k 43.6.
//
// The work is cut into KV splits (splits.cuh), each computed and combined by the same instructions in the same order
// whichever block does it. Four warps take a split's pages in turn, each with a page of keys and one of values in
// shared memory: 64 KB a block, so three blocks share a multiprocessor. Of these 192 KB 3 TB/s needs about 20 in
// flight: a block may compute or combine while the others stream; within a block a page's keys make room for the next
// page's before its values are used, and the last page's for the first of the block's next split, so that memory is
// busy while softmax states are combined. Those are a thirtieth of the bytes of the smallest split, and stay in the L2.
//
// Queries are rotated in registers by the warps that load them. The token's own key and value are rotated and written
// by the warp that has its last page, to the page and to the warp's own copy: no other warp reads them in this launch.
//
// Programmatic dependent launch: positions and slots are constant while a graph runs, and pages are what earlier steps
// left, so a block finds its first split and asks for its pages before it waits for the predecessor. What is left to be
// done after the wait: qkv, the products, the combination.
//
// GROUP query heads share a kv head and are the rows of both products (mma.m16n8k16; rows past GROUP are zero): the
// scores' accumulators, packed to bf16, are the second product's A fragments, and a lane holds one head's softmax.
// Keys past the position (or before the window) are never fetched: cp.async fills their rows with zeros, so that
// neither NaN keys nor 0 * NaN values reach a product; their scores are -inf.
//
// Macros, from kernels.hopper.attention: GROUP (1 to 16), DIM, PAGE, WARPS and BLOCKS (of a multiprocessor),
// MOST_SPLITS (bounds what a combination reads) and MOST_TOKENS.

#include "attention/layout.cuh"
#include "attention/rope.cuh"
#include "attention/splits.cuh"
#include "common/ptx.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int OUT_STRIDE = DIM + 8;      // floats: 8 heads' rows of an accumulator tile fall into distinct banks
constexpr int ROWS = GROUP > 8 ? 2 : 1;  // of a lane: heads lane / 4 and lane / 4 + 8
constexpr int QUADS = GROUP * DIM / 4;   // a token's outputs of one kv head, four at a time
constexpr unsigned ALL_LANES = 0xffffffffu;

static_assert(MOST_TOKENS == 2 * THREADS, "a thread counts the splits of two tokens");
static_assert(SHARED_BYTES >= WARPS * 2 * PAGE_BYTES, "each warp has a page of keys and one of values");

__device__ __forceinline__ int lane_of_warp() { return threadIdx.x % 32; }

__device__ __forceinline__ int warp_of_block() { return threadIdx.x / 32; }

// What a launch works on.
struct Launch {
    const char* qkv;
    const float *cos, *sin;
    const int *positions, *slots, *page_table;
    char *keys, *values;
    const float* sinks;
    char* out;
    float* partial;      // [tokens, kv_heads, most_splits, GROUP, 64]: values of the splits of tokens with several
    float2* stats;       // [tokens, kv_heads, most_splits, GROUP] (peak, total) of those
    unsigned* counters;  // [tokens, kv_heads] finished splits: zero between launches, since the last one wraps them
    int tokens, kv_heads, table_width, window;
    int most_splits;  // that a token can have in this launch
};

// One split of a (token, kv head), and which of its pages are this warp's.
struct Item {
    int token, head, split, position;
    int first;  // page of this warp, counted from the token's first
    int count;  // pages of this warp, 0 to 32
    int entry;  // where the l-th of them lies, in lane l

    __device__ __forceinline__ int page_key(const Keys& seen, int n) const {  // position of the n-th page's first key
        return (seen.first_page + first + WARPS * n) * PAGE;
    }
};

// The launch's items in order, found by a prefix sum over the tokens' splits: long contexts among short ones spread
// over all blocks, and no block is launched for splits that a token does not have.
struct ItemList {
    const Launch& launch;
    int (&begins)[MOST_TOKENS + 1], (&positions)[MOST_TOKENS], (&slots)[MOST_TOKENS];  // in shared memory
    bool searched;  // one token needs no search, nor do tokens of one split each
    int count;
    int slot;  // of the item found last

    __device__ __forceinline__ ItemList(const Launch& launch, int (&begins)[MOST_TOKENS + 1],
                                        int (&positions)[MOST_TOKENS], int (&slots)[MOST_TOKENS],
                                        int (&warp_sums)[WARPS])
        : launch(launch), begins(begins), positions(positions), slots(slots) {
        searched = launch.most_splits > 1 && launch.tokens > 1;
        count = launch.tokens * launch.kv_heads;
        if (searched) {
            count = add_up_splits(warp_sums) * launch.kv_heads;
        } else if (launch.tokens == 1) {
            count = Keys(launch.positions[0], launch.window).splits * launch.kv_heads;
        }
    }

    // Where each token's splits begin -> splits of all tokens. A thread counts those of two tokens.
    __device__ __forceinline__ int add_up_splits(int (&warp_sums)[WARPS]) {
        const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
        int splits[2] = {0, 0};
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int token = 2 * thread + j;
            if (token >= launch.tokens) continue;
            slots[token] = launch.slots[token];
            positions[token] = launch.positions[token];
            splits[j] = Keys(positions[token], launch.window).splits;
        }
        int end = splits[0] + splits[1];
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int before = __shfl_up_sync(ALL_LANES, end, distance);
            if (lane >= distance) end += before;
        }
        if (lane == 31) warp_sums[warp] = end;
        __syncthreads();
        int all = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            if (w < warp) end += warp_sums[w];
            all += warp_sums[w];
        }
        begins[2 * thread] = end - splits[1] - splits[0];
        begins[2 * thread + 1] = end - splits[1];
        if (thread == THREADS - 1) begins[MOST_TOKENS] = end;
        __syncthreads();
        return all;
    }

    __device__ __forceinline__ Item find(int index) {
        const int warp = warp_of_block(), lane = lane_of_warp();
        Item item;
        const int unit = index / launch.kv_heads;
        item.head = index % launch.kv_heads;  // neighbours read neighbouring heads of a page
        if (searched) {
            item.token = 0;
            for (int base = 0; base < launch.tokens; base += 32) {
                const int token = base + lane;
                const bool here = token < launch.tokens && begins[token] <= unit && unit < begins[token + 1];
                const unsigned where = __ballot_sync(ALL_LANES, here);
                if (where) item.token = base + __ffs(where) - 1;
            }
            item.split = unit - begins[item.token];
            item.position = positions[item.token], slot = slots[item.token];
        } else {
            item.token = launch.tokens == 1 ? 0 : unit;
            item.split = launch.tokens == 1 ? unit : 0;
            item.position = launch.positions[item.token], slot = launch.slots[item.token];
        }
        const Keys seen(item.position, launch.window);
        item.first = seen.first_of(item.split, warp);
        item.count = seen.count_of(item.split, warp);
        item.entry = 0;
        return item;
    }

    // The page table's entries of the item found last.
    __device__ __forceinline__ void look_up(Item& item) const {
        const int lane = lane_of_warp();
        const int first_page = Keys(item.position, launch.window).first_page + item.first;
        const int* table = launch.page_table + static_cast<long long>(slot) * launch.table_width + first_page;
        if (lane < item.count) item.entry = table[WARPS * lane];
    }
};

// Fetch the item's n-th page of keys or of values, a commit group of its own. The row of the token's own key is left
// alone: `copy_own` writes it.
__device__ __forceinline__ void fetch(const Launch& launch, unsigned to, const char* pool, const Item& item, int n) {
    const Keys seen(item.position, launch.window);
    const long long page = __shfl_sync(ALL_LANES, item.entry, n);
    const char* from = pool + (page * launch.kv_heads + item.head) * PAGE_BYTES;
    const int page_key = item.page_key(seen, n), row = lane_of_warp() / 8, chunk = lane_of_warp() % 8;
#pragma unroll
    for (int i = 0; i < PAGE / 4; i++) {
        const int r = 4 * i + row;
        const int key = page_key + r;
        const bool is_seen = key >= seen.first && key < seen.last;
        if (key != seen.last) cp_async(to + swizzled(r, chunk), from + r * ROW_BYTES + chunk * 16, is_seen);
    }
    cp_async_commit();
}

// Rotate the token's own key, and write it and its value to page `page` and to `fresh`. A lane takes a quarter of each
// half of a row, four lanes the key and four the value.
__device__ __forceinline__ void append_own(const Launch& launch, const Item& item, const char* token_qkv,
                                           long long page, uint4 (&fresh)[2][ROW_BYTES / 16]) {
    const int lane = lane_of_warp();
    if (lane < 8) {
        const bool of_values = lane / 4;
        const int quarter = lane % 4, row = launch.kv_heads * (of_values ? GROUP + 1 : GROUP) + item.head;
        const uint4* from = reinterpret_cast<const uint4*>(token_qkv + row * ROW_BYTES) + quarter;
        uint4 low = from[0], high = from[4];
        if (!of_values) {
            const long long angle = static_cast<long long>(item.position) * (DIM / 2) + 8 * quarter;
            rotate(low, high, launch.cos + angle, launch.sin + angle);
        }
        char* to = (of_values ? launch.values : launch.keys) + (page * launch.kv_heads + item.head) * PAGE_BYTES;
        uint4* place = reinterpret_cast<uint4*>(to + item.position % PAGE * ROW_BYTES) + quarter;
        place[0] = low, place[4] = high;
        fresh[of_values][quarter] = low, fresh[of_values][quarter + 4] = high;
    }
    __syncwarp();
}

// The token's own key and value to this warp's copies of their pages, whose other rows are still under way.
__device__ __forceinline__ void copy_own(char* my_pages, int position, const uint4 (&fresh)[2][ROW_BYTES / 16]) {
    const int lane = lane_of_warp(), chunk = lane % 8, row = position % PAGE;
    char* to = my_pages + (lane / 8) * PAGE_BYTES;
    if (lane < 16) *reinterpret_cast<uint4*>(to + swizzled(row, chunk)) = fresh[lane / 8][chunk];
}

// The GROUP query heads of the kv head, rotated, as A fragments: heads x dimensions.
__device__ __forceinline__ void load_queries(const Launch& launch, const Item& item, const char* token_qkv,
                                             unsigned (&queries)[DIM / 16][4]) {
    const int lane = lane_of_warp();
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int row = lane / 4 + j % 2 * 8, dim = 16 * k + lane % 4 * 2 + j / 2 * 8;
            const char* from = token_qkv + (item.head * GROUP + row) * ROW_BYTES + dim * 2;
            queries[k][j] = row < GROUP ? *reinterpret_cast<const unsigned*>(from) : 0u;
        }
    }
    const long long angle = static_cast<long long>(item.position) * (DIM / 2);
#pragma unroll
    for (int k = 0; k < DIM / 32; k++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int dim = 16 * k + lane % 4 * 2 + half * 8;
            const float2 c = *reinterpret_cast<const float2*>(launch.cos + angle + dim);
            const float2 s = *reinterpret_cast<const float2*>(launch.sin + angle + dim);
#pragma unroll
            for (int j = 0; j < ROWS; j++) {
                rotate(queries[k][2 * half + j], queries[k + DIM / 32][2 * half + j], c.x, s.x, c.y, s.y);
            }
        }
    }
}

// A warp's softmax state of one kv head, for its GROUP heads: peak of the scores (times log2 e), sum of the powers
// above the peak, and values weighted by those powers. A warp without a page leaves the peak at -inf and the rest 0.
struct SoftmaxState {
    float peak[ROWS], total[ROWS], out[DIM / 8][4];

    __device__ __forceinline__ SoftmaxState() {
#pragma unroll
        for (int r = 0; r < ROWS; r++) peak[r] = minus_infinity(), total[r] = 0.f;
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) out[n][0] = out[n][1] = out[n][2] = out[n][3] = 0.f;
    }
};

// One page: scores, softmax, values. `between` is called when the page's keys are no longer needed and must leave one
// commit group more behind it.
template <class Between>
__device__ __forceinline__ void attend(SoftmaxState& state, const unsigned (&q)[DIM / 16][4], unsigned page_keys,
                                       unsigned page_values, int page_key, const Keys& keys, Between between) {
    const int lane = lane_of_warp();
    float scores[PAGE / 8][4];  // heads x keys: tile n holds keys 8 n ... 8 n + 7
    cp_async_wait<1>();         // the values are still under way
    __syncwarp();
#pragma unroll
    for (int n = 0; n < PAGE / 8; n++) {
        scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.f;
#pragma unroll
        for (int half = 0; half < 2; half++) {  // 32 of the 64 dimensions: two steps of 16
            const uint4 b = ldmatrix(page_keys + key_matrix(n, half, lane));
            mma(scores[n], q[2 * half], b.x, b.y);
            mma(scores[n], q[2 * half + 1], b.z, b.w);
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
        peak = fmaxf(peak, __shfl_xor_sync(ALL_LANES, peak, 1));
        peak = fmaxf(peak, __shfl_xor_sync(ALL_LANES, peak, 2));
        peak = fmaxf(state.peak[r], peak * SCALE);  // finite: every page holds a key that is seen
        const float shrink = ex2(state.peak[r] - peak);
        state.peak[r] = peak;
        float total = 0.f;
#pragma unroll
        for (int n = 0; n < PAGE / 8; n++) {
            const float p0 = ex2(__fmaf_rn(scores[n][2 * r], SCALE, -peak));
            const float p1 = ex2(__fmaf_rn(scores[n][2 * r + 1], SCALE, -peak));
            total += p0 + p1;
            powers[n / 2][r + n % 2 * 2] = round_bf16x2(p0, p1);
        }
        total += __shfl_xor_sync(ALL_LANES, total, 1);
        total += __shfl_xor_sync(ALL_LANES, total, 2);
        state.total[r] = __fmaf_rn(state.total[r], shrink, total);
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) {
            state.out[n][2 * r] *= shrink;
            state.out[n][2 * r + 1] *= shrink;
        }
    }
    cp_async_wait<1>();  // the values are here; what `between` began is still under way
    __syncwarp();
#pragma unroll
    for (int k = 0; k < PAGE / 16; k++) {
#pragma unroll
        for (int pair = 0; pair < DIM / 16; pair++) {  // of tiles of 8 dimensions
            const uint4 b = ldmatrix_trans(page_values + value_matrix(k, pair, lane));
            mma(state.out[2 * pair], powers[k], b.x, b.y);
            mma(state.out[2 * pair + 1], powers[k], b.z, b.w);
        }
    }
    __syncwarp();
}

__device__ __forceinline__ void add_weighted(float4& sum, float weight, float4 values) {
    sum.x = __fmaf_rn(weight, values.x, sum.x), sum.y = __fmaf_rn(weight, values.y, sum.y);
    sum.z = __fmaf_rn(weight, values.z, sum.z), sum.w = __fmaf_rn(weight, values.w, sum.w);
}

__device__ __forceinline__ void store_out(const Launch& launch, long long row, int dim, float4 sum, float scale) {
    *reinterpret_cast<uint2*>(launch.out + row * ROW_BYTES + dim * 2) =
        make_uint2(round_bf16x2(sum.x * scale, sum.y * scale), round_bf16x2(sum.z * scale, sum.w * scale));
}

// This warp's state to shared memory, its values over its page of values.
__device__ __forceinline__ void share_state(const SoftmaxState& state, float* my_out, float (&warp_peak)[WARPS][16],
                                            float (&warp_total)[WARPS][16]) {
    const int warp = warp_of_block(), lane = lane_of_warp();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int row = lane / 4 + 8 * r;
        if (lane % 4 == 0) warp_peak[warp][row] = state.peak[r], warp_total[warp][row] = state.total[r];
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) {
            *reinterpret_cast<float2*>(my_out + row * OUT_STRIDE + 8 * n + lane % 4 * 2) =
                make_float2(state.out[n][2 * r], state.out[n][2 * r + 1]);
        }
    }
}

// The four warps' states to one, in the order of the warps: a token's only split to `out`, others to `partial`.
__device__ __forceinline__ void combine_warps(const Launch& launch, const Item& item, int splits, char* pages,
                                              const float (&warp_peak)[WARPS][16],
                                              const float (&warp_total)[WARPS][16]) {
    const long long owner = static_cast<long long>(item.token) * launch.kv_heads + item.head;
#pragma unroll
    for (int quad = int(threadIdx.x); quad < QUADS; quad += THREADS) {
        const int row = quad / (DIM / 4), dim = quad % (DIM / 4) * 4;
        float peak = warp_peak[0][row], total = 0.f;
#pragma unroll
        for (int w = 1; w < WARPS; w++) peak = fmaxf(peak, warp_peak[w][row]);
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float weight = ex2(warp_peak[w][row] - peak);
            const float* of_warp = reinterpret_cast<float*>(pages + w * 2 * PAGE_BYTES + PAGE_BYTES);
            const float4 values = *reinterpret_cast<const float4*>(of_warp + row * OUT_STRIDE + dim);
            total = __fmaf_rn(weight, warp_total[w][row], total);
            add_weighted(sum, weight, values);
        }
        if (splits == 1) {
            const float sink = launch.sinks[item.head * GROUP + row] * LOG2E, top = fmaxf(peak, sink);
            const float weight = ex2(peak - top);
            const float scale = weight / __fmaf_rn(weight, total, ex2(sink - top));
            store_out(launch, owner * GROUP + row, dim, sum, scale);
        } else {
            const long long at = (owner * launch.most_splits + item.split) * GROUP + row;
            *reinterpret_cast<float4*>(launch.partial + at * DIM + dim) = sum;
            if (dim == 0) launch.stats[at] = make_float2(peak, total);
        }
    }
}

// All splits of a (token, kv head) to `out`: half a warp serves a head. Each of its lanes weighs every sixteenth split,
// then takes four outputs.
__device__ __forceinline__ void combine_splits(const Launch& launch, const Item& item, int splits,
                                               float (&weights)[GROUP][MOST_SPLITS]) {
    const long long owner = static_cast<long long>(item.token) * launch.kv_heads + item.head;
#pragma unroll
    for (int quad = int(threadIdx.x); quad < (QUADS + THREADS - 1) / THREADS * THREADS; quad += THREADS) {
        const int row = min(quad / (DIM / 4), GROUP - 1), of_row = quad % (DIM / 4), dim = of_row * 4;
        const long long base = owner * launch.most_splits * GROUP + row;  // of the head's row in split 0
        const float sink = launch.sinks[item.head * GROUP + row] * LOG2E;
        float2 stats[MOST_SPLITS / 16];
        float top = sink, total = 0.f;
#pragma unroll
        for (int n = 0; n < MOST_SPLITS / 16; n++) {
            const int split = 16 * n + of_row;
            stats[n] =
                split < splits ? __ldcg(launch.stats + base + split * GROUP) : make_float2(minus_infinity(), 0.f);
            top = fmaxf(top, stats[n].x);
        }
#pragma unroll
        for (int mask = 8; mask > 0; mask /= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, mask));
#pragma unroll
        for (int n = 0; n < MOST_SPLITS / 16; n++) {
            const float weight = ex2(stats[n].x - top);
            total = __fmaf_rn(weight, stats[n].y, total);
            weights[row][16 * n + of_row] = weight;
        }
#pragma unroll
        for (int mask = 8; mask > 0; mask /= 2) total += __shfl_xor_sync(ALL_LANES, total, mask);
        __syncwarp();
        const float scale = 1.f / (total + ex2(sink - top));
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        constexpr int BATCH = 8;  // loads under way at once; past the last split they repeat it with weight 0
        for (int split = 0; split < splits; split += BATCH) {
            float4 values[BATCH];
#pragma unroll
            for (int n = 0; n < BATCH; n++) {
                const long long at = base + min(split + n, splits - 1) * GROUP;
                values[n] = __ldcg(reinterpret_cast<const float4*>(launch.partial + at * DIM + dim));
            }
#pragma unroll
            for (int n = 0; n < BATCH; n++) add_weighted(sum, weights[row][split + n], values[n]);
        }
        if (quad < QUADS) store_out(launch, owner * GROUP + row, dim, sum, scale);
    }
}

// A grid of any number of blocks: block b takes items b, b + blocks, b + 2 blocks ..., and the block that finishes the
// last of a token's splits combines them.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    decode_attention(const char* qkv, const float* cos, const float* sin, const int* positions, const int* slots,
                     const int* page_table, char* keys, char* values, const float* sinks, char* out, float* partial,
                     float2* stats, unsigned* counters, int tokens, int kv_heads, int table_width, int window,
                     int most_splits) {
    extern __shared__ __align__(128) char pages[];  // [WARPS, 2, PAGE_BYTES]
    __shared__ int begins[MOST_TOKENS + 1], known_positions[MOST_TOKENS], known_slots[MOST_TOKENS];
    __shared__ int warp_sums[WARPS];
    __shared__ bool is_last;
    __shared__ uint4 fresh[2][ROW_BYTES / 16];  // the token's own key and value
    __shared__ float warp_peak[WARPS][16], warp_total[WARPS][16];
    __shared__ float weights[GROUP][MOST_SPLITS];

    griddep_wait_first();
    const Launch launch = {qkv, cos,     sin,   positions, slots,  page_table, keys,        values, sinks,
                           out, partial, stats, counters,  tokens, kv_heads,   table_width, window, most_splits};
    const int thread = threadIdx.x, warp = thread / 32;
    char* my_pages = pages + warp * 2 * PAGE_BYTES;
    const unsigned my_keys = shared_address(my_pages), my_values = my_keys + PAGE_BYTES;
    float* my_out = reinterpret_cast<float*>(my_pages + PAGE_BYTES);
    griddep_launch_dependents();

    ItemList items(launch, begins, known_positions, known_slots, warp_sums);
    if (blockIdx.x >= items.count) return;

    // What earlier steps left, the page table and pages, is asked for before the wait for this step's qkv. The one
    // kernel of the step that writes to the table comes first, and the second lets none start before it has ended.
    int index = blockIdx.x;
    Item next = items.find(index);
    items.look_up(next);
    if (next.count > 0) fetch(launch, my_keys, keys, next, 0);
    while (index < items.count) {
        const Item item = next;
        const int count = item.count;
        const Keys seen(item.position, window);
        if (count > 0) fetch(launch, my_values, values, item, 0);
        griddep_wait();
        const char* token_qkv = qkv + static_cast<long long>(item.token) * kv_heads * (GROUP + 2) * ROW_BYTES;
        // Which of this warp's pages is the token's last, with its own key; -1: none.
        const int last_page = item.first + WARPS * (count - 1) == seen.pages - 1 ? count - 1 : -1;
        if (last_page >= 0) append_own(launch, item, token_qkv, __shfl_sync(ALL_LANES, item.entry, last_page), fresh);
        unsigned queries[DIM / 16][4];
        load_queries(launch, item, token_qkv, queries);

        index += gridDim.x;
        if (index < items.count) {
            next = items.find(index);
            items.look_up(next);
        } else {
            next.count = 0;
        }

        SoftmaxState state;
        for (int n = 0; n < count; n++) {
            const bool more = n + 1 < count;
            if (n == last_page) copy_own(my_pages, item.position, fresh);
            attend(state, queries, my_keys, my_values, item.page_key(seen, n), seen, [&] {
                if (more)
                    fetch(launch, my_keys, keys, item, n + 1);
                else if (next.count > 0)
                    fetch(launch, my_keys, keys, next, 0);
                else
                    cp_async_commit();  // an empty group, so that the count of groups behind is the same
            });
            if (more) fetch(launch, my_values, values, item, n + 1);
        }
        if (count == 0 && next.count > 0) fetch(launch, my_keys, keys, next, 0);

        share_state(state, my_out, warp_peak, warp_total);
        __syncthreads();
        combine_warps(launch, item, seen.splits, pages, warp_peak, warp_total);
        __syncthreads();  // the shared memory is free again
        if (seen.splits == 1) continue;

        unsigned* const finished = counters + static_cast<long long>(item.token) * kv_heads + item.head;
        if (thread == 0) is_last = atom_inc_acq_rel_gpu(finished, seen.splits - 1) == seen.splits - 1;
        __syncthreads();
        if (is_last) combine_splits(launch, item, seen.splits, weights);
    }
}
