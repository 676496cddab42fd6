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
// That is decode_attention, for few tokens. Its warps wait for each other at each split, and four of them are as fast
// as the last. Of many tokens there are splits enough for every warp to have its own: decode_attention_many. A warp takes
// a split's four pages one after the other and combines them by itself, to the same bytes. It takes the keys of all four
// first: then it knows how much each page weighs, and adds up their values as they come. Of the splits of long contexts,
// whose parts have several pages, it keeps the four states in local memory; of the others that would be an eighth more
// bytes to write. Warps take equal runs of the splits, those of a (token, kv head) beside each other, so that many need
// no other warp.
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
    unsigned* counters;  // [tokens, kv_heads] finished splits: zero between launches, since the last one empties them
    int tokens, kv_heads, table_width, window;
    int most_splits;  // that a token can have in this launch
};

constexpr int WHOLE = -1;

// One split of a (token, kv head), WHOLE or a part of it: every WARPS-th of its pages.
struct Item {
    int token, head, split, part, position;
    int first;  // of its pages, counted from the token's first
    int count;  // of its pages, 0 to 32
    int entry;  // where the l-th of them lies, in lane l

    __device__ __forceinline__ int page_key(const Keys& seen, int n) const {  // position of the n-th page's first key
        return (seen.first_page + first + step() * n) * PAGE;
    }
    __device__ __forceinline__ int step() const { return part == WHOLE ? 1 : WARPS; }  // from page to page
    // Which of its pages is the token's last, with its own key; -1: none.
    __device__ __forceinline__ int last_page(const Keys& seen) const {
        return first + step() * (count - 1) == seen.pages - 1 ? count - 1 : -1;
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

    // BY_HEAD: the splits of a (token, kv head) follow each other, or else the heads of a token's split: then
    // neighbours read neighbouring heads of a page.
    template <bool BY_HEAD>
    __device__ __forceinline__ Item find(int index, int part) {
        const int lane = lane_of_warp(), unit = index / launch.kv_heads;
        Item item;
        int before = 0, splits = 1;  // of the tokens before, of the token
        item.token = launch.tokens == 1 ? 0 : unit;
        if (searched) {
            for (int base = 0; base < launch.tokens; base += 32) {
                const int token = base + lane;
                const bool here = token < launch.tokens && begins[token] <= unit && unit < begins[token + 1];
                const unsigned where = __ballot_sync(ALL_LANES, here);
                if (where) item.token = base + __ffs(where) - 1;
            }
            before = begins[item.token], splits = begins[item.token + 1] - before;
            item.position = positions[item.token], slot = slots[item.token];
        } else {
            if (launch.tokens > 1)
                before = unit;
            else
                splits = count / launch.kv_heads;
            item.position = launch.positions[item.token], slot = launch.slots[item.token];
        }
        const int of_token = index - before * launch.kv_heads;
        item.head = BY_HEAD ? of_token / splits : of_token % launch.kv_heads;
        item.split = BY_HEAD ? of_token % splits : of_token / launch.kv_heads;
        item.part = part;
        return item;
    }

    // The pages of a part of the item found last, and the page table's entries of them.
    __device__ __forceinline__ void look_up(Item& item) const {
        const Keys seen(item.position, launch.window);
        if (item.part == WHOLE) {
            item.first = item.split * WARPS;
            item.count = min(seen.pages - item.first, WARPS);
        } else {
            item.first = seen.first_of(item.split, item.part);
            item.count = seen.count_of(item.split, item.part);
        }
        item.entry = 0;
        const int lane = lane_of_warp(), first_page = seen.first_page + item.first;
        const int* table = launch.page_table + static_cast<long long>(slot) * launch.table_width + first_page;
        if (lane < item.count) item.entry = table[item.step() * lane];
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
        if (key != seen.last) cp_async_once(to + swizzled(r, chunk), from + r * ROW_BYTES + chunk * 16, is_seen);
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

// The token's own key or value to this warp's copy of its page, whose other rows may still be under way.
__device__ __forceinline__ void copy_own(char* page, int position, const uint4 (&row)[ROW_BYTES / 16]) {
    const int lane = lane_of_warp();
    if (lane < 8) *reinterpret_cast<uint4*>(page + swizzled(position % PAGE, lane)) = row[lane];
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

using Scores = float[PAGE / 8][4];      // heads x keys: tile n holds keys 8 n ... 8 n + 7
using Powers = unsigned[PAGE / 16][4];  // the second product's A: heads x keys

__device__ __forceinline__ void multiply_keys(Scores& scores, const unsigned (&q)[DIM / 16][4], unsigned page_keys) {
    const int lane = lane_of_warp();
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
}

__device__ __forceinline__ void hide_unseen(Scores& scores, int page_key, const Keys& keys) {
    if (page_key >= keys.first && page_key + PAGE - 1 <= keys.last) return;
    const int lane = lane_of_warp();
#pragma unroll
    for (int n = 0; n < PAGE / 8; n++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int key = page_key + 8 * n + lane % 4 * 2 + j % 2;
            if (key < keys.first || key > keys.last) scores[n][j] = minus_infinity();
        }
    }
}

// A page's scores of row r of a lane to powers, relative to the peak so far -> what earlier powers shrink by.
__device__ __forceinline__ float soften(int r, const Scores& scores, Powers& powers, float& state_peak,
                                        float& state_total) {
    float peak = scores[0][2 * r];
#pragma unroll
    for (int n = 0; n < PAGE / 8; n++) peak = fmaxf(peak, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
    peak = fmaxf(peak, __shfl_xor_sync(ALL_LANES, peak, 1));
    peak = fmaxf(peak, __shfl_xor_sync(ALL_LANES, peak, 2));
    peak = fmaxf(state_peak, peak * SCALE);  // finite: every page holds a key that is seen
    const float shrink = ex2(state_peak - peak);
    state_peak = peak;
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
    state_total = __fmaf_rn(state_total, shrink, total);
    return shrink;
}

__device__ __forceinline__ void multiply_values(float (&out)[DIM / 8][4], const Powers& powers, unsigned page_values) {
    const int lane = lane_of_warp();
#pragma unroll
    for (int k = 0; k < PAGE / 16; k++) {
#pragma unroll
        for (int pair = 0; pair < DIM / 16; pair++) {  // of tiles of 8 dimensions
            const uint4 b = ldmatrix_trans(page_values + value_matrix(k, pair, lane));
            mma(out[2 * pair], powers[k], b.x, b.y);
            mma(out[2 * pair + 1], powers[k], b.z, b.w);
        }
    }
}

// One page: scores, softmax, values. `between` is called when the page's keys are no longer needed and must leave one
// commit group more behind it.
template <class Between>
__device__ __forceinline__ void attend(SoftmaxState& state, const unsigned (&q)[DIM / 16][4], unsigned page_keys,
                                       unsigned page_values, int page_key, const Keys& keys, Between between) {
    Scores scores;
    Powers powers = {};  // of heads past GROUP: zero
    cp_async_wait<1>();  // the values are still under way
    __syncwarp();
    multiply_keys(scores, q, page_keys);
    __syncwarp();
    between();
    hide_unseen(scores, page_key, keys);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float shrink = soften(r, scores, powers, state.peak[r], state.total[r]);
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) {
            state.out[n][2 * r] *= shrink;
            state.out[n][2 * r + 1] *= shrink;
        }
    }
    cp_async_wait<1>();  // the values are here; what `between` began is still under way
    __syncwarp();
    multiply_values(state.out, powers, page_values);
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

// What makes an only split's values the output.
__device__ __forceinline__ float scale_of_all(float peak, float total, float sink) {
    const float top = fmaxf(peak, sink), weight = ex2(peak - top);
    return weight / __fmaf_rn(weight, total, ex2(sink - top));
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
            const float scale = scale_of_all(peak, total, launch.sinks[item.head * GROUP + row] * LOG2E);
            store_out(launch, owner * GROUP + row, dim, sum, scale);
        } else {
            const long long at = (owner * launch.most_splits + item.split) * GROUP + row;
            *reinterpret_cast<float4*>(launch.partial + at * DIM + dim) = sum;
            if (dim == 0) launch.stats[at] = make_float2(peak, total);
        }
    }
}

// What a lane has of a split in decode_attention_many.
struct SplitState {
    float peak[ROWS], total[ROWS];
    float2 sum[ROWS][DIM / 8];

    __device__ __forceinline__ void add(int r, float weight, int n, float x, float y) {
        sum[r][n].x = __fmaf_rn(weight, x, sum[r][n].x), sum[r][n].y = __fmaf_rn(weight, y, sum[r][n].y);
    }
};

// As combine_warps does: a token's only split to `out`, others to `partial`.
__device__ __forceinline__ void store_split(const Launch& launch, const Item& item, int splits,
                                            const SplitState& state) {
    const long long owner = static_cast<long long>(item.token) * launch.kv_heads + item.head;
    const int lane = lane_of_warp();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int row = lane / 4 + 8 * r;
        if (row >= GROUP) continue;
        const float2(&sum)[DIM / 8] = state.sum[r];
        if (splits == 1) {
            const float sink = launch.sinks[item.head * GROUP + row] * LOG2E;
            const float scale = scale_of_all(state.peak[r], state.total[r], sink);
            char* to = launch.out + (owner * GROUP + row) * ROW_BYTES + lane % 4 * 4;
#pragma unroll
            for (int n = 0; n < DIM / 8; n++)
                *reinterpret_cast<unsigned*>(to + n * 16) = round_bf16x2(sum[n].x * scale, sum[n].y * scale);
        } else {
            const long long at = (owner * launch.most_splits + item.split) * GROUP + row;
            float2* to = reinterpret_cast<float2*>(launch.partial + at * DIM) + lane % 4;
#pragma unroll
            for (int n = 0; n < DIM / 8; n++) to[n * 4] = sum[n];
            if (lane % 4 == 0) launch.stats[at] = make_float2(state.peak[r], state.total[r]);
        }
    }
}

// The states of a split's parts, where they have several pages: in local memory.
struct Parts {
    float peak[WARPS][ROWS], total[WARPS][ROWS];
    float2 out[WARPS][ROWS][DIM / 8];

    __device__ __forceinline__ void keep(int part, const SoftmaxState& state) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            peak[part][r] = state.peak[r], total[part][r] = state.total[r];
#pragma unroll
            for (int n = 0; n < DIM / 8; n++)
                out[part][r][n] = make_float2(state.out[n][2 * r], state.out[n][2 * r + 1]);
        }
    }

    // The first `count` to one, as combine_warps does; the others are those of warps without a page.
    __device__ __forceinline__ SplitState combine(int count) const {
        SplitState state = {};
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            state.peak[r] = peak[0][r];
            for (int part = 1; part < count; part++) state.peak[r] = fmaxf(state.peak[r], peak[part][r]);
#pragma unroll 1
            for (int part = 0; part < WARPS; part++) {
                const bool there = part < count;
                const float weight = there ? ex2(peak[part][r] - state.peak[r]) : 0.f;
                state.total[r] = __fmaf_rn(weight, there ? total[part][r] : 0.f, state.total[r]);
#pragma unroll
                for (int n = 0; n < DIM / 8; n++)
                    state.add(r, weight, n, there ? out[part][r][n].x : 0.f, there ? out[part][r][n].y : 0.f);
            }
        }
        return state;
    }
};

// All splits of a (token, kv head) to `out`, by a block or a warp: half a warp serves a head at a time. Each of its lanes
// weighs every sixteenth split, then takes four outputs. Whoever has several heads to serve loads for all at once.
template <int BY_THREADS>
__device__ __forceinline__ void combine_splits(const Launch& launch, const Item& item, int splits) {
    constexpr int TURNS = (QUADS + BY_THREADS - 1) / BY_THREADS, HEAD_QUADS = DIM / 4;
    static_assert(HEAD_QUADS == 16, "half a warp");
    const long long owner = static_cast<long long>(item.token) * launch.kv_heads + item.head;
    const int first = threadIdx.x % BY_THREADS, of_row = threadIdx.x % HEAD_QUADS;
    const auto row_of = [&](int turn) { return min((first + turn * BY_THREADS) / HEAD_QUADS, GROUP - 1); };
    const long long base = owner * launch.most_splits * GROUP;  // of the first head's row in split 0
    float weights[TURNS][MOST_SPLITS / 16], sinks[TURNS], scale[TURNS];
    float2 stats[TURNS][MOST_SPLITS / 16];
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        sinks[turn] = launch.sinks[item.head * GROUP + row_of(turn)] * LOG2E;
#pragma unroll
        for (int n = 0; n < MOST_SPLITS / 16; n++) {
            const int split = 16 * n + of_row;
            stats[turn][n] = split < splits ? __ldcg(launch.stats + base + row_of(turn) + split * GROUP)
                                            : make_float2(minus_infinity(), 0.f);
        }
    }
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        float top = sinks[turn], total = 0.f;
#pragma unroll
        for (int n = 0; n < MOST_SPLITS / 16; n++) top = fmaxf(top, stats[turn][n].x);
#pragma unroll
        for (int mask = 8; mask > 0; mask /= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, mask));
#pragma unroll
        for (int n = 0; n < MOST_SPLITS / 16; n++) {
            weights[turn][n] = ex2(stats[turn][n].x - top);
            total = __fmaf_rn(weights[turn][n], stats[turn][n].y, total);
        }
#pragma unroll
        for (int mask = 8; mask > 0; mask /= 2) total += __shfl_xor_sync(ALL_LANES, total, mask);
        scale[turn] = 1.f / (total + ex2(sinks[turn] - top));
    }
    float4 sums[TURNS] = {};
    constexpr int BATCH = 8;  // loads under way at once; past the last split they repeat it with weight 0
    for (int split = 0; split < splits; split += BATCH) {
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            float4 values[BATCH];
#pragma unroll
            for (int n = 0; n < BATCH; n++) {
                const long long at = base + row_of(turn) + min(split + n, splits - 1) * GROUP;
                values[n] = __ldcg(reinterpret_cast<const float4*>(launch.partial + at * DIM + of_row * 4));
            }
#pragma unroll
            for (int n = 0; n < BATCH; n++)
                add_weighted(sums[turn], __shfl_sync(ALL_LANES, weights[turn][0], (split + n) % 16, 16), values[n]);
            if (split % 16 == 16 - BATCH) {  // the next sixteen splits
#pragma unroll
                for (int n = 0; n + 1 < MOST_SPLITS / 16; n++) weights[turn][n] = weights[turn][n + 1];
            }
        }
    }
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++)
        if (first + turn * BY_THREADS < QUADS)
            store_out(launch, owner * GROUP + row_of(turn), of_row * 4, sums[turn], scale[turn]);
}

// Of a (token, kv head) `mine` more splits are done: were they the last?
__device__ __forceinline__ bool count_splits(const Launch& launch, const Item& item, int splits, int mine) {
    unsigned* const finished = launch.counters + static_cast<long long>(item.token) * launch.kv_heads + item.head;
    const bool last = atom_add_acq_rel_gpu(finished, mine) + mine == splits;
    if (last) *finished = 0;
    return last;
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
    Item next = items.find<false>(index, warp);
    items.look_up(next);
    if (next.count > 0) fetch(launch, my_keys, keys, next, 0);
    while (index < items.count) {
        const Item item = next;
        const int count = item.count;
        const Keys seen(item.position, window);
        if (count > 0) fetch(launch, my_values, values, item, 0);
        griddep_wait();
        const char* token_qkv = qkv + static_cast<long long>(item.token) * kv_heads * (GROUP + 2) * ROW_BYTES;
        const int last_page = item.last_page(seen);
        if (last_page >= 0) append_own(launch, item, token_qkv, __shfl_sync(ALL_LANES, item.entry, last_page), fresh);
        unsigned queries[DIM / 16][4];
        load_queries(launch, item, token_qkv, queries);

        index += gridDim.x;
        if (index < items.count) {
            next = items.find<false>(index, warp);
            items.look_up(next);
        } else {
            next.count = 0;
        }

        SoftmaxState state;
        for (int n = 0; n < count; n++) {
            const bool more = n + 1 < count;
            if (n == last_page) {
                copy_own(my_pages, item.position, fresh[0]);
                copy_own(my_pages + PAGE_BYTES, item.position, fresh[1]);
            }
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

        if (thread == 0) is_last = count_splits(launch, item, seen.splits, 1);
        __syncthreads();
        if (is_last) combine_splits<THREADS>(launch, item, seen.splits);
    }
}

// The same in which a warp takes whole splits: of equal runs of all of them, one.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    decode_attention_many(const char* qkv, const float* cos, const float* sin, const int* positions, const int* slots,
                          const int* page_table, char* keys, char* values, const float* sinks, char* out,
                          float* partial, float2* stats, unsigned* counters, int tokens, int kv_heads, int table_width,
                          int window, int most_splits) {
    extern __shared__ __align__(128) char pages[];  // [WARPS, 2, PAGE_BYTES]
    __shared__ int begins[MOST_TOKENS + 1], known_positions[MOST_TOKENS], known_slots[MOST_TOKENS];
    __shared__ int warp_sums[WARPS];
    __shared__ uint4 all_fresh[WARPS][2][ROW_BYTES / 16];

    griddep_wait_first();
    const Launch launch = {qkv, cos,     sin,   positions, slots,  page_table, keys,        values, sinks,
                           out, partial, stats, counters,  tokens, kv_heads,   table_width, window, most_splits};
    const int warp = warp_of_block();
    char* my_pages = pages + warp * 2 * PAGE_BYTES;
    const unsigned my_keys = shared_address(my_pages), my_values = my_keys + PAGE_BYTES;
    uint4(&fresh)[2][ROW_BYTES / 16] = all_fresh[warp];
    griddep_launch_dependents();

    ItemList items(launch, begins, known_positions, known_slots, warp_sums);
    const int runs = WARPS * gridDim.x, run = warp * gridDim.x + blockIdx.x;  // the longer ones in all blocks
    const int each = items.count / runs, longer = items.count % runs;
    int index = run * each + min(run, longer);
    const int end = index + each + (run < longer ? 1 : 0);
    if (index == end) return;

    // An item is read in `2 count` pages: of a whole split all keys, then all values; of a part each page's keys and
    // values. They take turns in this warp's two pages of shared memory, and the next two are always under way.
    const auto find = [&] {
        Item item = items.find<true>(index, WHOLE);
        if (Keys(item.position, window).log_split > LOG_WARPS) item.part = 0;
        return item;
    };
    const auto ask = [&](const Item& item, int place) {
        const bool whole = item.part == WHOLE, is_value = whole ? place >= item.count : place % 2;
        const int n = whole ? place - (is_value ? item.count : 0) : place / 2;
        fetch(launch, place % 2 ? my_values : my_keys, is_value ? values : keys, item, n);
    };
    Item next = find();
    items.look_up(next);
    ask(next, 0);
    ask(next, 1);
    griddep_wait();
    int first_split = next.split;  // that this warp takes of the (token, kv head)
    unsigned queries[DIM / 16][4];
    Parts parts;
    while (index < end) {
        const Item item = next;
        const Keys seen(item.position, window);
        const char* token_qkv = qkv + static_cast<long long>(item.token) * kv_heads * (GROUP + 2) * ROW_BYTES;
        const int last_page = item.last_page(seen);
        if (last_page >= 0) append_own(launch, item, token_qkv, __shfl_sync(ALL_LANES, item.entry, last_page), fresh);
        if (item.part <= 0 && item.split == first_split) load_queries(launch, item, token_qkv, queries);

        const bool ends_split =
            item.part == WHOLE || item.part + 1 == WARPS || seen.count_of(item.split, item.part + 1) <= 0;
        if (!ends_split)
            ++next.part;
        else if (++index < end)
            next = find();
        const bool continues = index < end;
        if (continues) items.look_up(next);
        const auto ask_next = [&](int place) {  // what takes the place of this one
            if (place + 2 < 2 * item.count)
                ask(item, place + 2);
            else if (continues)
                ask(next, place + 2 - 2 * item.count);
            else
                cp_async_commit();  // an empty group, so that the count of groups behind is the same
        };

        SplitState split = {};
        if (item.part == WHOLE) {
            // Of the last pages, up to WARPS, the newest last; before the first: those of warps without a page.
            float peaks[WARPS][ROWS], totals[WARPS][ROWS];
            unsigned kept[WARPS][PAGE / 16][2 * ROWS];
            const auto shift = [&] {
#pragma unroll
                for (int i = 0; i + 1 < WARPS; i++) {
#pragma unroll
                    for (int r = 0; r < ROWS; r++) peaks[i][r] = peaks[i + 1][r], totals[i][r] = totals[i + 1][r];
#pragma unroll
                    for (int k = 0; k < PAGE / 16; k++)
#pragma unroll
                        for (int j = 0; j < 2 * ROWS; j++) kept[i][k][j] = kept[i + 1][k][j];
                }
#pragma unroll
                for (int r = 0; r < ROWS; r++) peaks[WARPS - 1][r] = minus_infinity(), totals[WARPS - 1][r] = 0.f;
            };
#pragma unroll 1
            for (int n = 0; n < WARPS; n++) {
                shift();
                if (n >= item.count) continue;
                const unsigned page = my_keys + n % 2 * PAGE_BYTES;
                if (n == last_page) copy_own(my_pages + n % 2 * PAGE_BYTES, item.position, fresh[0]);
                cp_async_wait<1>();
                __syncwarp();
                Scores scores;
                multiply_keys(scores, queries, page);
                __syncwarp();
                ask_next(n);
                hide_unseen(scores, item.page_key(seen, n), seen);
                Powers powers;
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    soften(r, scores, powers, peaks[WARPS - 1][r], totals[WARPS - 1][r]);
#pragma unroll
                    for (int k = 0; k < PAGE / 16; k++)
                        kept[WARPS - 1][k][2 * r] = powers[k][r], kept[WARPS - 1][k][2 * r + 1] = powers[k][r + 2];
                }
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                split.peak[r] = peaks[0][r];
#pragma unroll
                for (int i = 1; i < WARPS; i++) split.peak[r] = fmaxf(split.peak[r], peaks[i][r]);
#pragma unroll
                for (int i = 0; i < WARPS; i++) {
                    peaks[i][r] = ex2(peaks[i][r] - split.peak[r]);  // a weight from here on
                    split.total[r] = __fmaf_rn(peaks[i][r], totals[i][r], split.total[r]);
                }
            }
#pragma unroll 1
            for (int n = 0; n < item.count; n++) {
                const int place = item.count + n;
                if (n == last_page) copy_own(my_pages + place % 2 * PAGE_BYTES, item.position, fresh[1]);
                cp_async_wait<1>();
                __syncwarp();
                Powers powers = {};  // of heads past GROUP: zero
#pragma unroll
                for (int k = 0; k < PAGE / 16; k++)
#pragma unroll
                    for (int r = 0; r < ROWS; r++)
                        powers[k][r] = kept[0][k][2 * r], powers[k][r + 2] = kept[0][k][2 * r + 1];
                float out[DIM / 8][4] = {};
                multiply_values(out, powers, my_keys + place % 2 * PAGE_BYTES);
                __syncwarp();
                ask_next(place);
#pragma unroll
                for (int r = 0; r < ROWS; r++)
#pragma unroll
                    for (int i = 0; i < DIM / 8; i++) split.add(r, peaks[0][r], i, out[i][2 * r], out[i][2 * r + 1]);
                shift();
            }
            if (item.count < WARPS)  // what warps without a page add to
#pragma unroll
                for (int r = 0; r < ROWS; r++)
#pragma unroll
                    for (int i = 0; i < DIM / 8; i++) split.add(r, 0.f, i, 0.f, 0.f);
        } else {
            SoftmaxState state;
            for (int n = 0; n < item.count; n++) {
                if (n == last_page) {
                    copy_own(my_pages, item.position, fresh[0]);
                    copy_own(my_pages + PAGE_BYTES, item.position, fresh[1]);
                }
                attend(state, queries, my_keys, my_values, item.page_key(seen, n), seen, [&] { ask_next(2 * n); });
                ask_next(2 * n + 1);
            }
            parts.keep(item.part, state);
            if (!ends_split) continue;
            split = parts.combine(item.part + 1);
        }

        store_split(launch, item, seen.splits, split);
        const bool ends_all = item.split == seen.splits - 1;
        if (seen.splits > 1 && (ends_all || !continues)) {
            const int mine = item.split - first_split + 1;
            bool last = mine == seen.splits;
            __syncwarp();  // all of the warp's partial sums are written
            if (!last) {
                if (lane_of_warp() == 0) last = count_splits(launch, item, seen.splits, mine);
                last = __shfl_sync(ALL_LANES, last, 0);
                __syncwarp();  // what the first lane may read, all may
            }
            if (last) combine_splits<32>(launch, item, seen.splits);
        }
        if (ends_all) first_split = 0;
    }
}
