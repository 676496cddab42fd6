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
// A tile is one kv head and some consecutive tokens. A block takes tiles one after the other; it has CONSUMERS
// warpgroups that multiply and one that brings what they need, by mbarriers in shared memory:
//   - a warp takes the next tile, announces it, and keeps a ring of pages filled, by the copy engine;
//   - a warp for each consumer loads its queries and rotates them, up to two tiles ahead.
// A consumer holds 64 rows: a few tokens with the GROUP query heads that share the kv head. They are the A operand of
// both products, in registers (the scores' accumulators, packed to bf16, are the second product's A fragments); pages of
// keys and values are the B operand, as they come. A page of 64 rows takes the tensor cores and the exponentials' unit
// about the same time, so the scores of the next page and the values of the one before are multiplied while a page's
// powers are computed: there are two buffers of scores.
//
// A tile is cut into runs of tokens of one slot, taken one after the other, each from an accumulator of zeros: what one
// request's pages hold never touches another's rows. Within a run pages come in ascending order, one at a time, and a
// page of which a row sees no key leaves the row as it is: the peak stays, sums are multiplied by one and get zero
// added. So a token's bytes do not depend on its neighbours, on how its prompt was cut, on the bucket, or on the block.
//
// Macros, from kernels.hopper.attention: GROUP (1 to 16), DIM, PAGE; CONSUMERS, WARPGROUP_TOKENS; STAGES of the ring and
// QUERY_STAGES; CONSUMER_REGISTERS, PRODUCER_REGISTERS; SHARED_BYTES of a launch; APPEND_THREADS and ROW_THREADS of
// rope_append.

#include "attention/layout.cuh"
#include "attention/rope.cuh"
#include "common/ptx.cuh"
#include "common/wgmma.cuh"

constexpr int CONSUMER_WARPS = 4 * CONSUMERS;
constexpr int CONSUMER_THREADS = 32 * CONSUMER_WARPS;
constexpr int THREADS = CONSUMER_THREADS + 128;
constexpr int TILE = CONSUMERS * WARPGROUP_TOKENS;
constexpr int WARPGROUP_ROWS = WARPGROUP_TOKENS * GROUP;
constexpr int QUERY_BYTES = 64 * ROW_BYTES;     // of a consumer
constexpr int ANNOUNCED = 4;                    // tiles that are known at once
constexpr int ANGLES = WARPGROUP_TOKENS * DIM;  // of a consumer's tokens: cosines, then sines
constexpr int RING_ALIGNMENT = 1024;            // the swizzle is a function of address bits 4 to 9
constexpr int RING_BYTES = STAGES * 2 * PAGE_BYTES;
constexpr int STAGE_OPERAND = 2 * PAGE_BYTES >> 4;  // in a descriptor
constexpr unsigned ALL_LANES = 0xffffffffu;

static_assert(TILE <= 32, "a lane knows one token of the tile");
static_assert(WARPGROUP_ROWS <= 64, "rows of a warpgroup");
static_assert(CONSUMERS <= 3, "a warp beside the producer for each");
static_assert(SHARED_BYTES >= RING_ALIGNMENT + RING_BYTES + CONSUMERS * (QUERY_STAGES * QUERY_BYTES + ANGLES * 4),
              "the ring, aligned, queries and angles");
static_assert(ROW_THREADS == 4, "a thread takes an element's 16 bytes of each half of a row");

// RoPE and append ----------------------------------------------------------------------------------------------------

// One thread for each token, row of 64 (keys, then values) and quarter of half a row.
extern "C" __global__ void __launch_bounds__(APPEND_THREADS)
    rope_append(const char* qkv, const float* cos, const float* sin, const int* positions, const int* slots,
                const int* page_table, char* keys, char* values, int* taken, int tokens, int kv_heads,
                int table_width) {
    griddep_wait_first();
    griddep_launch_dependents();
    griddep_wait();
    const int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index == 0) *taken = 0;
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
    const int *positions, *slots, *page_table;
    const TensorMap *key_boxes, *value_boxes;  // a box is a page of a kv head
    const char* values;
    const float* sinks;
    char* out;
    int* taken;  // tiles, but for the first of each block
    int tokens, kv_heads, table_width, window;

    // Of both kinds that a lane may know: of the tile's lane-th token, or of none.
    __device__ __forceinline__ int first_key(int position) const { return max(position - window + 1, 0); }
};

// Heavy tiles first: those at the end of a long prompt see most keys, and short ones fill the gaps at the end.
struct Tile {
    int head, begin, count;  // tokens: from begin; none: there are no more tiles
};

__device__ __forceinline__ Tile tile_of(const Launch& launch, int index) {
    const int tiles = (launch.tokens + TILE - 1) / TILE, from_end = index / launch.kv_heads;
    const int begin = (tiles - 1 - from_end) * TILE;
    return {index % launch.kv_heads, begin, from_end < tiles ? min(TILE, launch.tokens - begin) : 0};
}

// A tile as the producer announces it.
struct Announcement {
    Tile tile;
    unsigned runs;     // bit l: the tile's l-th token is the first of a run
    int position[32];  // of the l-th token; -1: there is none
};

// Consecutive tokens of one slot; begin and end are places in the tile. `unseen` has a bit for each run to come.
struct Run {
    int begin, end;

    __device__ __forceinline__ Run(unsigned& unseen, int tokens) {
        begin = __ffs(unseen) - 1;
        unseen &= unseen - 1;
        end = unseen ? __ffs(unseen) - 1 : tokens;
    }
};

// Keys that the tokens from place `from` to before `to` see: any of them `first` to `last`, all of them `all_first` to
// `all_last`. Of no tokens, last is -1. Lane l knows the tile's l-th token.
struct Seen {
    int first, last, all_first, all_last;

    __device__ __forceinline__ Seen(int from, int to, int first_key, int position, int lane) {
        const bool in = lane >= from && lane < to;
        first = __reduce_min_sync(ALL_LANES, in ? first_key : 0x7fffffff);
        last = __reduce_max_sync(ALL_LANES, in ? position : -1);
        all_first = __reduce_max_sync(ALL_LANES, in ? first_key : 0);
        all_last = __reduce_min_sync(ALL_LANES, in ? position : 0x7fffffff);
    }
};

// What the roles of a block share. Steps are a block's pages of all runs of all its tiles in order; step s has stage
// s % STAGES. The n-th tile has entry n % ANNOUNCED, and stage n % QUERY_STAGES of each consumer's queries.
struct Shared {
    static constexpr int BARRIERS = 2 * (STAGES + ANNOUNCED + QUERY_STAGES * CONSUMERS);
    unsigned pages;    // [STAGES, keys or values, PAGE_BYTES]
    unsigned queries;  // [QUERY_STAGES, CONSUMERS, 64 rows], swizzled
    float* angles;     // [CONSUMERS, WARPGROUP_TOKENS, DIM]: cosines, then sines
    unsigned barriers;
    Announcement* announced;  // [ANNOUNCED]

    __device__ __forceinline__ unsigned full(unsigned step) const { return barriers + step % STAGES * 8; }
    __device__ __forceinline__ unsigned empty(unsigned step) const { return full(step) + STAGES * 8; }
    __device__ __forceinline__ unsigned known(unsigned nth) const {
        return barriers + (2 * STAGES + nth % ANNOUNCED) * 8;
    }
    __device__ __forceinline__ unsigned read(unsigned nth) const { return known(nth) + ANNOUNCED * 8; }
    __device__ __forceinline__ unsigned rotated(unsigned nth, int consumer) const {
        return barriers + (2 * (STAGES + ANNOUNCED) + nth % QUERY_STAGES * CONSUMERS + consumer) * 8;
    }
    __device__ __forceinline__ unsigned held(unsigned nth, int consumer) const {
        return rotated(nth, consumer) + QUERY_STAGES * CONSUMERS * 8;
    }

    __device__ __forceinline__ void init() const {
        for (int i = 0; i < STAGES; i++) mbarrier_init(full(i), 32), mbarrier_init(empty(i), CONSUMER_WARPS);
        for (int i = 0; i < ANNOUNCED; i++)
            mbarrier_init(known(i), 32), mbarrier_init(read(i), CONSUMER_WARPS + CONSUMERS);
        for (int i = 0; i < QUERY_STAGES; i++) {
            for (int consumer = 0; consumer < CONSUMERS; consumer++) {
                mbarrier_init(rotated(i, consumer), 32);
                mbarrier_init(held(i, consumer), 4);
            }
        }
        fence_mbarrier_init();
    }

    __device__ __forceinline__ unsigned keys_of(unsigned step) const { return pages + step % STAGES * 2 * PAGE_BYTES; }
    __device__ __forceinline__ unsigned queries_of(unsigned nth, int consumer) const {
        return queries + (nth % QUERY_STAGES * CONSUMERS + consumer) * QUERY_BYTES;
    }

    // The n-th tile, which is given back by an arrival at `read`.
    __device__ __forceinline__ Announcement* wait_known(unsigned nth) const {
        mbarrier_wait(known(nth), nth / ANNOUNCED % 2);
        return announced + nth % ANNOUNCED;
    }
};

// Arrive once for a warp, all of whose lanes are done.
__device__ __forceinline__ void arrive_for_warp(unsigned barrier, int lane) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
}

// Until the place that step or tile n of a ring of PLACES takes was given back by the one before it.
template <int PLACES>
__device__ __forceinline__ void wait_given_back(unsigned barrier, unsigned n) {
    if (n >= PLACES) mbarrier_wait(barrier, (n / PLACES - 1) % 2);
}

// The same in all lanes, and now the compiler knows it.
__device__ __forceinline__ int same_in_warp(int value) { return __shfl_sync(ALL_LANES, value, 0); }

// Producers ----------------------------------------------------------------------------------------------------------

// A page of which no token of the run sees some keys: what lies there may be NaN, and 0 * NaN would reach a sum.
__device__ __forceinline__ bool is_edge(int page, int first, int last) {
    return page * PAGE < first || page * PAGE + PAGE - 1 > last;
}

// The values of such a page, by a warp: zeros but for rows `first` to `last`.
__device__ __forceinline__ void fetch_values(unsigned to, const char* from, int first, int last, int lane) {
    const int row = lane / 8, chunk = lane % 8;
#pragma unroll 4
    for (int i = 0; i < PAGE / 4; i++) {
        const int r = 4 * i + row;
        cp_async(to + swizzled(r, chunk), from + r * ROW_BYTES + chunk * 16, r >= first && r <= last);
    }
}

// Takes tiles, announces them, and brings the pages of all their runs in the order in which the consumers take them.
// One warp.
__device__ __forceinline__ void produce(const Launch& launch, const Shared& shared, int lane) {
    int index = blockIdx.x;
    unsigned step = 0;
    for (unsigned nth = 0;; nth++) {
        const Tile tile = tile_of(launch, index);
        int slot = 0, position = -1;
        if (lane < tile.count) slot = launch.slots[tile.begin + lane], position = launch.positions[tile.begin + lane];
        const int slot_before = __shfl_up_sync(ALL_LANES, slot, 1);
        unsigned runs = __ballot_sync(ALL_LANES, lane < tile.count && (lane == 0 || slot != slot_before));
        // Positions and slots do not change while a graph runs, and needed no wait for the kernels before.
        if (nth == 0) griddep_wait();
        wait_given_back<ANNOUNCED>(shared.read(nth), nth);
        Announcement& announcement = shared.announced[nth % ANNOUNCED];
        announcement.tile = tile, announcement.runs = runs, announcement.position[lane] = position;
        mbarrier_arrive(shared.known(nth));
        if (tile.count == 0) break;
        int next = 0;
        if (lane == 0) next = atomicAdd(launch.taken, 1);

        const int first_key = launch.first_key(position);
        while (runs) {
            const Run run(runs, tile.count);
            const Seen seen(run.begin, run.end, first_key, position, lane);
            const long long row = __shfl_sync(ALL_LANES, slot, run.begin);
            const int* table = launch.page_table + row * launch.table_width;
            const int first_page = seen.first / PAGE, last_page = seen.last / PAGE;
            int entry = 0;  // lane l knows where the l-th of the next 32 pages lies
            for (int page = first_page; page <= last_page; page++, step++) {
                const int at = (page - first_page) % 32;
                if (at == 0) entry = page + lane <= last_page ? table[page + lane] : 0;
                const int of_pools = __shfl_sync(ALL_LANES, entry, at) * launch.kv_heads + tile.head;
                const unsigned to = shared.keys_of(step), full = shared.full(step);
                wait_given_back<STAGES>(shared.empty(step), step);
                const bool edge = is_edge(page, seen.first, seen.last);
                if (lane == 0) {
                    mbarrier_expect_tx(full, edge ? PAGE_BYTES : 2 * PAGE_BYTES);
                    cp_async_bulk_tensor(to, launch.key_boxes, 0, of_pools * PAGE, full);
                    if (!edge) cp_async_bulk_tensor(to + PAGE_BYTES, launch.value_boxes, 0, of_pools * PAGE, full);
                }
                if (edge) {
                    const char* from = launch.values + static_cast<long long>(of_pools) * PAGE_BYTES;
                    const int begin = page * PAGE;
                    fetch_values(to + PAGE_BYTES, from, seen.first - begin, seen.last - begin, lane);
                    cp_async_mbarrier_arrive_noinc(full);
                } else {
                    mbarrier_arrive(full);
                }
                __syncwarp();
            }
        }
        index = gridDim.x + same_in_warp(next);
    }
    cp_async_wait_all();
}

// Loads a consumer's queries of each tile and rotates them. One warp.
__device__ __forceinline__ void rotate_queries(const Launch& launch, const Shared& shared, int consumer) {
    float* const angles = shared.angles + consumer * ANGLES;
    const int my_begin = consumer * WARPGROUP_TOKENS;
    griddep_wait();
    for (unsigned nth = 0;; nth++) {
        const int lane = thread_again() % 32;
        const Announcement* announcement = shared.wait_known(nth);
        const Tile tile = announcement->tile;
        const int position = announcement->position[lane];
        arrive_for_warp(shared.read(nth), lane);
        if (tile.count == 0) break;
        const unsigned queries = shared.queries_of(nth, consumer);
        wait_given_back<QUERY_STAGES>(shared.held(nth, consumer), nth);

#pragma unroll 1
        for (int i = 0; i < ANGLES; i += 32 * 4) {  // a lane four of them
            const int mine = i + lane * 4, at = __shfl_sync(ALL_LANES, position, (my_begin + mine / DIM) % 32);
            const float* from = mine % DIM < DIM / 2 ? launch.cos : launch.sin;
            from += static_cast<long long>(max(at, 0)) * (DIM / 2) + mine % (DIM / 2);
            if (mine < ANGLES) cp_async(shared_address(angles + mine), from, at >= 0);
        }
        const int quarter = lane % ROW_THREADS;
        const int token_bytes = launch.kv_heads * (GROUP + 2) * ROW_BYTES;
        const char* from = launch.qkv + static_cast<long long>(tile.begin + my_begin) * token_bytes +
                           tile.head * GROUP * ROW_BYTES + quarter * 16;
#pragma unroll 1
        for (int i = 0; i < 8; i++) {
            const int row = 8 * i + lane / ROW_THREADS, token = row / GROUP;
            const bool used = row < WARPGROUP_ROWS && my_begin + token < tile.count;
            const char* at = from + (used ? token * token_bytes + row % GROUP * ROW_BYTES : 0);
            cp_async(queries + swizzled(row, quarter), at, used);
            cp_async(queries + swizzled(row, quarter + ROW_THREADS), at + ROW_BYTES / 2, used);
        }
        cp_async_wait_all();
        __syncwarp();  // angles came by other lanes; a row's halves came by this one
#pragma unroll 1
        for (int i = 0; i < 8; i++) {
            const int row = 8 * i + lane / ROW_THREADS;
            if (row >= WARPGROUP_ROWS) continue;
            const unsigned low_at = queries + swizzled(row, quarter);
            const unsigned high_at = queries + swizzled(row, quarter + ROW_THREADS);
            const float* cos = angles + row / GROUP * DIM + quarter * 8;
            uint4 low = ld_shared(low_at), high = ld_shared(high_at);
            rotate(low, high, cos, cos + DIM / 2);
            st_shared(low_at, low), st_shared(high_at, high);
        }
        mbarrier_arrive(shared.rotated(nth, consumer));
    }
}

// Consumers ----------------------------------------------------------------------------------------------------------

// The softmax state of this thread's two rows in one run: peak of the scores (times log2 e), this lane's part of the
// sum of the powers above the peak, and values weighted by those powers, as wgmma leaves them.
struct SoftmaxState {
    float peak[2], total[2], sums[32];

    __device__ __forceinline__ SoftmaxState() {
#pragma unroll
        for (int r = 0; r < 2; r++) peak[r] = minus_infinity(), total[r] = 0.f;
#pragma unroll
        for (int i = 0; i < 32; i++) sums[i] = 0.f;
    }

    // Take in a page's scores: the new peak, -> `base`, which powers are taken above, and `shrink`, by which the sums of
    // both rows are to be multiplied.
    __device__ __forceinline__ void climb(const float (&scores)[32], float (&base)[2], float (&shrink)[2]) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float top = scores[2 * r];
#pragma unroll
            for (int n = 0; n < 8; n++) top = fmaxf(top, fmaxf(scores[4 * n + 2 * r], scores[4 * n + 2 * r + 1]));
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
            top = fmaxf(peak[r], top * SCALE);
            base[r] = top == minus_infinity() ? 0.f : top;  // a row that has seen nothing yet
            shrink[r] = ex2(peak[r] - base[r]);
            peak[r] = top;
        }
    }

    // Scores become powers.
    __device__ __forceinline__ static void raise(float (&scores)[32], const float (&base)[2]) {
#pragma unroll
        for (int i = 0; i < 32; i++) scores[i] = ex2(__fmaf_rn(scores[i], SCALE, -base[i / 2 % 2]));
    }

    __device__ __forceinline__ void add(const float (&powers)[32], const float (&shrink)[2]) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = 0.f;
#pragma unroll
            for (int n = 0; n < 8; n++) sum += powers[4 * n + 2 * r] + powers[4 * n + 2 * r + 1];
            total[r] = __fmaf_rn(total[r], shrink[r], sum);
        }
    }

    // The second product's A fragments.
    __device__ __forceinline__ static void pack(const float (&scores)[32], unsigned (&powers)[PAGE / 16][4]) {
#pragma unroll
        for (int n = 0; n < 8; n++) {
#pragma unroll
            for (int r = 0; r < 2; r++)
                powers[n / 2][r + n % 2 * 2] = round_bf16x2(scores[4 * n + 2 * r], scores[4 * n + 2 * r + 1]);
        }
    }

    __device__ __forceinline__ void rescale(const float (&shrink)[2]) {
#pragma unroll
        for (int i = 0; i < 32; i++) sums[i] *= shrink[i / 2 % 2];
    }
};

// The place in the tile of the token of a thread's r-th row (of 2); of rows without a token, any.
__device__ __forceinline__ int place_of(int thread, int r) {
    return min(thread / 128 * WARPGROUP_TOKENS + accumulator_row(thread / 32, thread % 32, r) / GROUP, 31);
}

// Hide the keys of a page that this thread's rows do not see. `seen`: by the warpgroup's tokens.
__device__ __forceinline__ void hide(const Launch& launch, const Announcement* announcement, const Seen& seen, int page,
                                     float (&scores)[32]) {
    const int first_key = page * PAGE, last_key = first_key + PAGE - 1;
    const bool before = first_key<seen.all_first, after = last_key> seen.all_last;
    if (!before && !after) return;
    const int thread = thread_again();
    int last[2];  // key that each row sees, counted from the thread's first column
#pragma unroll
    for (int r = 0; r < 2; r++) last[r] = announcement->position[place_of(thread, r)] - first_key - thread % 4 * 2;
    if (before) {
#pragma unroll
        for (int i = 0; i < 32; i++)
            if (i / 4 * 8 + i % 2 <= last[i / 2 % 2] - launch.window) scores[i] = minus_infinity();
    }
    if (after) {
#pragma unroll
        for (int i = 0; i < 32; i++)
            if (i / 4 * 8 + i % 2 > last[i / 2 % 2]) scores[i] = minus_infinity();
    }
}

// The sink joins the denominator, and rows of this run leave.
__device__ __forceinline__ void store(const Launch& launch, SoftmaxState& state, const Tile& tile, const Run& run,
                                      const float (&sinks)[2]) {
    const int thread = thread_again(), lane = thread % 32;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float total = state.total[r];
        total += __shfl_xor_sync(ALL_LANES, total, 1);
        total += __shfl_xor_sync(ALL_LANES, total, 2);
        const int row = accumulator_row(thread / 32, lane, r), place = place_of(thread, r);
        if (row >= WARPGROUP_ROWS || place < run.begin || place >= run.end) continue;
        const long long at = static_cast<long long>(tile.begin + place) * launch.kv_heads + tile.head;
        const long long query_row = at * GROUP + row % GROUP;
        const float sink = sinks[r], top = fmaxf(state.peak[r], sink);
        const float weight = ex2(state.peak[r] - top);
        const float scale = weight / __fmaf_rn(weight, total, ex2(sink - top));
#pragma unroll
        for (int n = 0; n < 8; n++) {
            *reinterpret_cast<unsigned*>(launch.out + query_row * ROW_BYTES + (8 * n + lane % 4 * 2) * 2) =
                round_bf16x2(state.sums[4 * n + 2 * r] * scale, state.sums[4 * n + 2 * r + 1] * scale);
        }
    }
}

// A bool that an argument's type carries.
template <bool V>
struct Is {
    static constexpr bool value = V;
};

// A warpgroup's rows over the pages of all runs of all tiles.
__device__ __forceinline__ void consume(const Launch& launch, const Shared& shared, int warp) {
    const int consumer = warp / 4, my_begin = consumer * WARPGROUP_TOKENS, my_end = my_begin + WARPGROUP_TOKENS;
    const unsigned long long pages = page_operand(same_in_warp(opaque(shared.pages)));
    unsigned step = 0;
    for (unsigned nth = 0;; nth++) {
        const int lane = thread_again() % 32;
        const Announcement* announcement = shared.wait_known(nth);
        Tile tile = announcement->tile;
        tile.head = same_in_warp(tile.head), tile.begin = same_in_warp(tile.begin);
        tile.count = same_in_warp(tile.count);
        unsigned runs = same_in_warp(announcement->runs);
        if (tile.count == 0) break;

        unsigned queries[DIM / 16][4];
        mbarrier_wait(shared.rotated(nth, consumer), nth / QUERY_STAGES % 2);
#pragma unroll
        for (int k = 0; k < DIM / 16; k++) {
            const uint4 a = ldmatrix(shared.queries_of(nth, consumer) + query_matrix(warp, k, lane));
            queries[k][0] = a.x, queries[k][1] = a.y, queries[k][2] = a.z, queries[k][3] = a.w;
        }
        arrive_for_warp(shared.held(nth, consumer), lane);

        while (runs) {
            const Run run(runs, tile.count);
            const int position = announcement->position[lane], first_key = launch.first_key(position);
            const Seen all(run.begin, run.end, first_key, position, lane);
            const Seen mine(max(run.begin, my_begin), min(run.end, my_end), first_key, position, lane);
            const int first_page = all.first / PAGE, last_page = all.last / PAGE;
            const int begin = mine.last < 0 ? last_page + 1 : mine.first / PAGE;
            const int end = mine.last < 0 ? last_page + 1 : mine.last / PAGE + 1;
            const auto pass_to = [&](int from, int to) {  // pages of which this warpgroup's rows see nothing
#pragma unroll 1
                for (int page = from; page < to; page++, step++) {
                    mbarrier_wait(shared.full(step), step / STAGES % 2);
                    if (lane == 0) mbarrier_arrive(shared.empty(step));
                }
            };
            pass_to(first_page, begin);
            if (begin < end) {
                SoftmaxState state;
                unsigned powers[PAGE / 16][4];
                const auto wait_page = [&](int page, unsigned at) {
                    mbarrier_wait(shared.full(at), at / STAGES % 2);
                    if (is_edge(page, all.first, all.last)) fence_proxy_async();  // not all by the copy engine
                };
                const auto ask_scores = [&](float (&scores)[32], unsigned at) {
                    const unsigned long long b = pages + at % STAGES * STAGE_OPERAND;
                    wgmma_fence();
                    wgmma<false>(scores, queries[0], b);
#pragma unroll
                    for (int k = 1; k < DIM / 16; k++) wgmma(scores, queries[k], b + SIXTEEN_DIMENSIONS * k);
                    wgmma_commit();
                };
                const auto ask_values = [&](unsigned at) {
                    const unsigned long long v = pages + at % STAGES * STAGE_OPERAND + STAGE_OPERAND / 2;
                    wgmma_fence();
#pragma unroll
                    for (int k = 0; k < PAGE / 16; k++) wgmma<true, true>(state.sums, powers[k], v + SIXTEEN_KEYS * k);
                    wgmma_commit();
                };
                const auto hold_powers = [&] {
#pragma unroll
                    for (int k = 0; k < PAGE / 16; k++) hold(powers[k]);
                };
                float scores[2][32], shrink[2];
                // A page whose scores are there: their powers, while the next page's scores and the values of the page
                // before are multiplied.
                const auto take = [&](float (&now)[32], float (&next)[32], int page, auto first, auto last) {
                    constexpr bool FIRST = decltype(first)::value, LAST = decltype(last)::value;
                    if constexpr (!LAST) ask_scores(next, step + 1);
                    if constexpr (!FIRST) {
                        state.rescale(shrink);
                        ask_values(step - 1);
                    }
                    hide(launch, announcement, mine, page, now);
                    float base[2];
                    state.climb(now, base, shrink);
                    hold(base);
                    state.raise(now, base);
                    state.add(now, shrink);
                    hold(now), hold(shrink), hold(state.total);
                    // ptxas moves arithmetic past a wait for products, but not past a branch.
                    if (opaque(page) + 2 < end) wait_page(page + 2, step + 2);
                    wgmma_wait<0>();
                    if constexpr (!LAST) hold(next);
                    if constexpr (!FIRST) {
                        hold(state.sums), hold_powers();
                        if (lane == 0) mbarrier_arrive(shared.empty(step - 1));
                    }
                    state.pack(now, powers);
                    step++;
                };
                wait_page(begin, step);
                ask_scores(scores[0], step);
                if (begin + 1 < end) wait_page(begin + 1, step + 1);
                wgmma_wait<0>();
                hold(scores[0]);
                if (begin + 1 == end) {
                    take(scores[0], scores[1], begin, Is<true>(), Is<true>());
                } else {
                    take(scores[0], scores[1], begin, Is<true>(), Is<false>());
#pragma unroll 1
                    for (int page = begin + 1;; page++) {
                        if (page + 1 == end) {
                            take(scores[1], scores[0], page, Is<false>(), Is<true>());
                            break;
                        }
                        take(scores[1], scores[0], page++, Is<false>(), Is<false>());
                        if (page + 1 == end) {
                            take(scores[0], scores[1], page, Is<false>(), Is<true>());
                            break;
                        }
                        take(scores[0], scores[1], page, Is<false>(), Is<false>());
                    }
                }
                state.rescale(shrink);
                ask_values(step - 1);
                float sinks[2];
#pragma unroll
                for (int r = 0; r < 2; r++)
                    sinks[r] =
                        launch.sinks[tile.head * GROUP + accumulator_row(warp, thread_again() % 32, r) % GROUP] * LOG2E;
                hold(sinks);
                wgmma_wait<0>();
                hold(state.sums), hold_powers();
                if (lane == 0) mbarrier_arrive(shared.empty(step - 1));
                store(launch, state, tile, run, sinks);
            }
            pass_to(end, last_page + 1);
        }
        arrive_for_warp(shared.read(nth), lane);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    prefill_attention(const char* qkv, const float* cos, const float* sin, const int* positions, const int* slots,
                      const int* page_table, const char* values, const __grid_constant__ TensorMap key_boxes,
                      const __grid_constant__ TensorMap value_boxes, const float* sinks, char* out, int* taken,
                      int tokens, int kv_heads, int table_width, int window) {
    extern __shared__ char dynamic[];  // pages, from a multiple of RING_ALIGNMENT; queries; angles
    __shared__ unsigned long long barriers[Shared::BARRIERS];
    __shared__ Announcement announced[ANNOUNCED];
    griddep_wait_first();
    griddep_launch_dependents();
    const Launch launch = {qkv,    cos,   sin, positions, slots,  page_table, &key_boxes,  &value_boxes,
                           values, sinks, out, taken,     tokens, kv_heads,   table_width, window};
    const unsigned pages = (shared_address(dynamic) + RING_ALIGNMENT - 1) / RING_ALIGNMENT * RING_ALIGNMENT;
    const unsigned queries = pages + RING_BYTES, end = queries + QUERY_STAGES * CONSUMERS * QUERY_BYTES;
    float* const angles = reinterpret_cast<float*>(dynamic + (end - shared_address(dynamic)));
    const Shared shared = {pages, queries, angles, shared_address(barriers), announced};
    if (threadIdx.x == 0) shared.init();
    __syncthreads();
    const int warp = same_in_warp(threadIdx.x / 32), lane = threadIdx.x % 32;
    if (warp >= CONSUMER_WARPS) {
        setmaxnreg_dec<PRODUCER_REGISTERS>();
        const int role = warp - CONSUMER_WARPS;
        if (role < CONSUMERS)
            rotate_queries(launch, shared, role);
        else if (role == CONSUMERS)
            produce(launch, shared, lane);
    } else {
        setmaxnreg_inc<CONSUMER_REGISTERS>();
        consume(launch, shared, warp);
    }
}
