// From logits [R, V] to a token a row and, where the row asks for them, its log probability and the TOP likeliest
// tokens, in one kernel, with no sort. Logits are bf16 (macro BF16 1) or float32 (0). The mathematics is
// kernels.reference's: penalties, bias, temperature, top_k, top_p, min_p, Gumbel noise and argmax; log probabilities are
// those of the raw logits. A row may have a mask of the tokens that it may draw: the others have a logit of -inf.
//
// Bytes: a row of logits once, 402 KB in bf16 at V = 201088, and 5 V of counts where the row has penalties. The floor at
// 3.08 TB/s is 0.13 us for one row and 33 for 256. The rest is instructions, of which a row pays for what it asks: about
// 20 a logit to be read, 35 more for noise, 160 more for top_p.
//
// A row is a cluster of ROW_BLOCKS blocks, and two blocks share a multiprocessor: one computes while the other waits. A
// block takes a range of the vocabulary; blocks meet through distributed shared memory. What a row needs is decided from
// its parameters, alike in every block of the cluster. Logits are drawn from as they are read, unless something has to
// be known of all first or they are adjusted: only then does a block keep its range (100 KB) in shared memory, where
// filters search. No scratch memory is written.
//
// The range has COLUMNS columns: column c holds logits c, c + COLUMNS, ... Thread t reads columns 2 t and 2 t + 1, GROUP
// logits of each at once. The sum of exp is one sum a column, and all are merged in one order, which depends neither on
// the batch nor on the number of threads.
//
// The likeliest tokens: each thread remembers its own best. The TOP best of these name the only threads that can own
// one of the block's TOP best tokens, so just their logits are read again; places in the order are found by counting
// who is greater, exactly, because a key is the logit and the token: the lower id goes first among equals.
//
// Noise is exact only where it could win: noise = -log(-log1p(-u)) <= -log(u), which costs little when approximate, and
// what the block has drawn so far has to be beaten.
//
// Filters: a threshold is the largest t such that the logits >= t have a count, or a mass in units of 2^-40, of at
// least the target: a search over histograms of integers. Its first digit is the distance from the best in eighths,
// which spreads logits over many bins and so over many banks; the other four are those of the logit's order, and few
// logits are left for them: those are listed. All that is added up is integers, whose sums do not depend on the order.
//
// With RANKS > 1 each rank has a shard of the vocabulary, and its cluster handles that: no logits are gathered. What
// the blocks of a cluster send each other, the ranks do as well, through the exchange area of common/exchange.cuh: the
// best scaled logit where a row has filters, the histograms' sums at each level of a search (2 KB), and at the end the
// token a rank would draw, with its logit, and the best tokens and the sum of exp where they are asked for. A word has
// its own place for the whole kernel; block 0 makes those that were used empty when all blocks have read them. The
// exchanges of the forward lie between this kernel's and its next one's.
//
// Macros, from kernels/hopper/sampler/__init__.py: BF16, TOP, RANKS; PAIRED 1: rows of logits are such that two may be
// loaded at once; BIAS_ENTRIES of a row; ROW_BLOCKS and THREADS; LEVELS and BINS of a search; LISTED logits that it
// lists; WORDS of a row from a rank in the exchange area, where histograms come first, and from WORD_PEAK, WORD_BEST,
// WORD_SUM, WORD_DRAWN and WORD_LOGIT on what follows them.

#include "common/exchange.cuh"
#include "common/ptx.cuh"
#include "common/ranking.cuh"
#include "sampler/penalties.cuh"

namespace {

using uint8_t = unsigned char;  // NVRTC has no headers to offer
using uint32_t = unsigned;
using uint64_t = unsigned long long;

constexpr int WARPS = THREADS / 32;
constexpr int COLUMNS = 2 * THREADS;
constexpr int PARTS = COLUMNS / 32;  // of the columns, 32 each: half a warp's
constexpr int GROUP = 4;             // logits of a column that are handled at once
constexpr float PER_UNIT = 8.0f;     // bins of the first digit to a difference of 1

static_assert(BINS / 32 == ROW_BLOCKS, "a warp's bins of a block's histogram are one block's to send");
static_assert(RANKS * TOP <= THREADS, "a thread takes one of the best tokens of all ranks");
static_assert(TOP <= PARTS, "the bound on a block's best tokens comes from the best of its parts");
static_assert(PARTS == 32, "a lane of a warp takes a part");
static_assert(BINS <= THREADS, "a thread takes a bin");
static_assert(BIAS_ENTRIES <= THREADS, "a thread takes one bias entry");

#if BF16
using Logit = bf16;
using Pair = uint32_t;
#else
using Logit = float;
using Pair = float2;
#endif

// The sampling parameters of all slots, the tokens so far, and the masks.
struct State {
    const float *temperature, *top_p, *min_p, *repetition, *frequency, *presence;
    const int *top_k, *logprobs;
    const uint32_t* seed;
    const int* bias_ids;
    const float* bias_values;
    const int *bias_until, *output_counts;
    const uint8_t* in_prompt;
    const uint32_t* masks;
};

// Those of one row. `mask`: its number in the masks, negative where it has none.
struct Row {
    int slot, position, mask;
    float temperature, top_p, min_p, repetition, frequency, presence;
    int top_k;
    bool drawn, by_count, by_mass, filtered, penalized;
    bool with_logprob, with_top;  // what the row asks for beside its token

    __device__ __forceinline__ Row(const State& state, int slot, int position, int mask, int vocab)
        : slot(slot), position(position), mask(mask), temperature(state.temperature[slot]), top_p(state.top_p[slot]),
          min_p(state.min_p[slot]), repetition(state.repetition[slot]), frequency(state.frequency[slot]),
          presence(state.presence[slot]), top_k(state.top_k[slot]) {
        drawn = temperature > 0.0f;
        by_count = drawn && top_k > 0 && top_k < vocab, by_mass = drawn && top_p < 1.0f;
        filtered = by_count || by_mass || (drawn && min_p > 0.0f);
        penalized = has_penalties(repetition, frequency, presence);
        with_logprob = state.logprobs[slot] > 0, with_top = state.logprobs[slot] > 1;
    }
};

struct Search {
    int digit;
    uint64_t target;
};

struct Shared {
    uint64_t top[ROW_BLOCKS][TOP];  // in block 0: the best tokens of every block
    uint64_t drawn[ROW_BLOCKS];     // in block 0: the token every block would draw
    float2 sums[ROW_BLOCKS];        // in block 0: every block's largest logit and sum of exp(logit - largest)
    float peaks[ROW_BLOCKS];        // in every block: every block's largest scaled logit
    uint64_t part_keys[PARTS];
    float2 part_sums[PARTS];
    uint64_t owners[TOP];  // best tokens of threads that own one of the block's best
    uint64_t bound;        // what such a token must reach
    int group_count, best_count;
    uint32_t to_beat;  // the order of the best that the block has drawn so far
    int listed;        // logits that a search found for its list, which has room for LISTED
    Search search;
    int bias_ids[BIAS_ENTRIES];
    float bias_values[BIAS_ENTRIES];
    uint64_t ranks_top[RANKS][TOP];  // in block 0: the best tokens of every rank
};

// What a search needs beside the logits, in the scratch space behind them.
struct Space {
    uint2 histogram[2][BINS];  // low and high words; a level's is read by others while the next one is filled
    float list[LISTED];
};

// A block's range of a row.
struct Range {
    const Logit* logits;
    int begin, count;  // first token, of the whole vocabulary, and number of tokens
    int block;
};

// Where the ranks write for a row, [RANKS][rows][WORDS] words, as this one sees it.
struct Exchange {
    size_t of_rank;  // words from one rank's to the next one's
    Area<uint64_t> area;

    __device__ __forceinline__ Exchange(const uint64_t* memories, int offset, int rank, int row, int rows)
        : of_rank(size_t(rows) * WORDS),
          area(memories, offset, rank, size_t(row) * WORDS, rank * of_rank + size_t(row) * WORDS) {}
    __device__ __forceinline__ void send(int word, uint64_t value) const {
        area.send_all(word, not_empty(value));  // the empty word is the key of a NaN if of anything
    }
    // From the `other`-th of the other ranks.
    __device__ __forceinline__ uint64_t wait(int other, int word) const {
        uint64_t value;
        do {
            value = area.look(area.rank_of(other) * of_rank + word);
        } while (!has_come(value));
        return value;
    }
    __device__ __forceinline__ void empty(int word) const {
#pragma unroll
        for (int i = 0; i < RANKS - 1; i++) area.empty(area.rank_of(i) * of_rank + word);
    }
};

__device__ __forceinline__ float load(const Logit* at) {
#if BF16
    return widen(*at);
#else
    return *at;
#endif
}

// Tokens at, at + 1 of the range, where `at` is even; -inf past its end.
__device__ __forceinline__ Pair load_pair(const Range& range, int at) {
#if BF16
    constexpr uint32_t NONE = 0xFF80;
    if (at >= range.count) return NONE << 16 | NONE;
    const bool both = at + 1 < range.count;
#if PAIRED
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(range.logits + at);
    return both ? pair : (NONE << 16 | (pair & 0xFFFF));
#else
    return (both ? range.logits[at + 1] : NONE) << 16 | range.logits[at];
#endif
#else
    if (at >= range.count) return make_float2(minus_infinity(), minus_infinity());
    return make_float2(range.logits[at], at + 1 < range.count ? range.logits[at + 1] : minus_infinity());
#endif
}

__device__ __forceinline__ void load_group(const Range& range, int first, Pair (&pairs)[GROUP]) {
    if (first + GROUP * COLUMNS <= range.count) {  // alike in all threads: no logit's place has to be looked at
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            const int at = first + i * COLUMNS + 2 * threadIdx.x;
#if PAIRED
            pairs[i] = *reinterpret_cast<const Pair*>(range.logits + at);
#else
            pairs[i] = load_pair(range, at);
#endif
        }
    } else {
#pragma unroll
        for (int i = 0; i < GROUP; i++) pairs[i] = load_pair(range, first + i * COLUMNS + 2 * threadIdx.x);
    }
}

// Where the i-th of a thread's 2 GROUP logits of a group lies, from the group's first on: in the order of the tokens.
__device__ __forceinline__ int place_in_group(int i) { return i / 2 * COLUMNS + i % 2 + 2 * threadIdx.x; }

__device__ uint64_t block_max(Shared& shared, uint64_t key) {
    key = warp_max(key);
    __syncthreads();  // others may still read the words of the reduction before
    if (threadIdx.x % 32 == 0) shared.part_keys[threadIdx.x / 32] = key;
    __syncthreads();
    return warp_max(shared.part_keys[threadIdx.x % WARPS]);
}

// Of the 32 columns of half a warp, in its first lane, in the order of warp_merge: column c with column c + 16 and so
// on. The half's lower lanes take the even columns, its upper lanes the odd ones.
__device__ __forceinline__ float2 part_merge(const float2 (&sums)[2]) {
    const bool upper = threadIdx.x & 8;
    const float2 got = from_lane(upper ? sums[0] : sums[1], 8);
    float2 sum = merge(upper ? got : sums[0], upper ? sums[1] : got);
    for (int apart = 4; apart > 0; apart /= 2) sum = merge(sum, from_lane(sum, apart));
    return merge(sum, from_lane(sum, 8));
}

// Add a group to the sums of its two columns; what is fused is written out, as in merge.
__device__ __forceinline__ void add_group(float2 (&sums)[2], const float (&x)[2 * GROUP]) {
#pragma unroll
    for (int column = 0; column < 2; column++) {
        float2& sum = sums[column];
        float largest = sum.x;
#pragma unroll
        for (int i = column; i < 2 * GROUP; i += 2) largest = fmaxf(largest, x[i]);
        sum.y = fmaf(sum.y, expf(sum.x - largest), expf(x[column] - largest));
        sum.x = largest;
#pragma unroll
        for (int i = column + 2; i < 2 * GROUP; i += 2) sum.y = __fadd_rn(sum.y, expf(x[i] - largest));
    }
}

// Put the range's TOP best tokens, in order, into block 0. `best` is the thread's best token, 0 where it has none.
// `keys` has room for the best tokens of 16 TOP threads, which may own one of the block's best, and then for all tokens
// of TOP threads.
__device__ void find_top(Shared& shared, uint64_t* keys, const Range& range, uint64_t best) {
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    uint64_t of_part = best;
    for (int apart = 8; apart > 0; apart /= 2) {
        const uint64_t other = __shfl_xor_sync(ALL, of_part, apart);
        of_part = max(of_part, other);
    }
    if (lane % 16 == 0) shared.part_keys[thread / 16] = of_part;
    if (thread == 0) shared.group_count = shared.best_count = 0;
    if (thread < TOP) shared.owners[thread] = 0;
    __syncthreads();
    if (warp == 0) {  // a first bound: the TOP-th best of the parts, 0 where fewer have tokens
        const uint64_t key = shared.part_keys[lane];
        const uint32_t reached = __ballot_sync(ALL, greater_than(key, shared.part_keys, PARTS) == TOP - 1);
        const uint64_t bound = __shfl_sync(ALL, key, reached ? __ffs(reached) - 1 : 0);
        if (lane == 0) shared.bound = reached ? bound : 0;
    }
    __syncthreads();
    if (best != 0 && best >= shared.bound) keys[atomicAdd(&shared.group_count, 1)] = best;
    __syncthreads();
    const int groups = shared.group_count;
    if (thread == 0 && groups < TOP) shared.bound = 0;
    if (thread < groups) {
        const uint64_t key = keys[thread];
        const int place = greater_than(key, keys, groups);
        if (place < TOP) shared.owners[place] = key;
        if (place == TOP - 1) shared.bound = key;  // TOP threads reach it, so the block's TOP best do
    }
    __syncthreads();
    for (int place = warp; place < TOP && shared.owners[place] != 0; place += WARPS) {
        const int owner = (token_of(shared.owners[place]) - range.begin) % COLUMNS / 2;
        for (int row = lane / 2; row * COLUMNS < range.count; row += 16) {
            const int at = row * COLUMNS + 2 * owner + lane % 2;
            if (at >= range.count) continue;
            const uint64_t key = key_of(load(range.logits + at), range.begin + at);
            if (key >= shared.bound) keys[atomicAdd(&shared.best_count, 1)] = key;
        }
    }
    __syncthreads();
    const int count = shared.best_count;
    uint64_t* out = mapa(shared.top[range.block], 0);
    if (thread < TOP && thread >= count) out[thread] = 0;
    place_best<THREADS>(keys, count, TOP, out);
}

// Add to the range's logits the bias entries collected in `shared`; `mine`: this thread's entry is one of them. Entries
// of one token are added in order, by the thread of the first.
__device__ void add_bias(const Shared& shared, float* values, bool mine) {
    if (!mine) return;
    const int entry = threadIdx.x, at = shared.bias_ids[entry];
    for (int i = 0; i < entry; i++)
        if (shared.bias_ids[i] == at) return;
    float value = values[at];
    for (int i = entry; i < BIAS_ENTRIES; i++)
        if (shared.bias_ids[i] == at) value += shared.bias_values[i];
    values[at] = value;
}

// The order of the distance from the row's largest logit: a float operation rounds monotonically, so a larger digit
// means a larger logit.
__device__ __forceinline__ int distance_digit(float x, float peak) {
    return BINS - 1 - int(fminf((peak - x) * PER_UNIT, float(BINS - 1)));
}

__device__ __forceinline__ void add_mass(uint2& bin, uint64_t mass) {
    const uint32_t low = uint32_t(mass);
    uint32_t high = uint32_t(mass >> 32);
    if (atomicAdd(&bin.x, low) > ~low) high++;  // the low word wrapped
    if (high != 0) atomicAdd(&bin.y, high);
}

// The largest t such that the row's logits of order >= t have a count of at least top_k, or (MASS) top_p of the mass of
// all logits of order >= least. `turn` is the histogram to fill first.
template <bool MASS>
__device__ uint32_t threshold(Shared& shared, Space& space, const float* values, const Range& range, int vocab,
                              float peak, uint32_t least, int top_k, float top_p, int& turn, const Exchange& exchange) {
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    uint64_t target = MASS ? 0 : top_k;
    uint32_t prefix = 0;  // digits of the order found so far
    int nearest = 0;      // the first digit
    // All of the vocabulary beyond this distance would have less than 1 - top_p of the best token's mass, and so of the
    // row's: the threshold is nearer, and what is beyond only counts for the whole. Bin 0 takes it.
    int beyond = 0;
    if (MASS) beyond = BINS - 1 - int(fminf((logf(float(vocab) / (1.0f - top_p)) + 0.25f) * PER_UNIT, float(BINS - 1)));
    const float* source = values;
    int count = range.count;
    if (thread == 0) shared.listed = 0;
    for (int level = 0; level < LEVELS; level++, turn ^= 1) {
        uint2* const histogram = space.histogram[turn];
        const int shift = 32 - 8 * level;  // of the level's digit in the order
        if (thread < BINS) histogram[thread] = make_uint2(0, 0);
        __syncthreads();
        uint64_t rest = 0;
#pragma unroll 4
        for (int at = thread; at < count; at += THREADS) {
            const float x = source[at];
            const uint32_t order = order_of(x);
            int digit = distance_digit(x, peak);
            if (MASS && order < least) continue;
            if (level > 0) {
                if (digit != nearest || (level > 1 && order >> (shift + 8) != prefix)) continue;
                digit = order >> shift & BINS - 1;
            }
            if (level == 1 && *const_cast<volatile int*>(&shared.listed) <= LISTED) {
                const int place = atomicAdd(&shared.listed, 1);
                if (place < LISTED) space.list[place] = x;
            }
            if (!MASS) {
                atomicAdd(&histogram[digit].x, 1u);
                continue;
            }
            const uint64_t mass = uint64_t(expf(x - peak) * 0x1p40f);
            if (level == 0 && digit < beyond)
                rest += mass;
            else if (mass != 0)
                add_mass(histogram[digit], mass);
        }
        if (MASS && level == 0) {
            for (int apart = 16; apart > 0; apart /= 2) rest += __shfl_xor_sync(ALL, rest, apart);
            if (lane == 0 && rest != 0) add_mass(histogram[0], rest);
        }
        cluster_sync();
        if (level == 1 && shared.listed <= LISTED) {
            source = space.list;
            count = shared.listed;
        }
        uint64_t here = 0, reached = 0;  // the row's mass in this thread's bin, and from the top down to it
        if (thread < BINS) {
            for (int block = 0; block < ROW_BLOCKS; block++) {
                const uint2 bin = *mapa(&histogram[BINS - 1 - thread], block);
                here += uint64_t(bin.y) << 32 | bin.x;
            }
            const int word = (int(MASS) * LEVELS + level) * BINS + thread;
            if (warp == range.block) exchange.send(word, here);
#pragma unroll
            for (int i = 0; i < RANKS - 1; i++) here += exchange.wait(i, word);
            reached = here;
            for (int apart = 1; apart < 32; apart *= 2) {
                const uint64_t above = __shfl_up_sync(ALL, reached, apart);
                if (lane >= apart) reached += above;
            }
            if (lane == 31) shared.part_keys[warp] = reached;
        }
        if (thread == 0) shared.search = {0, 1};  // for a row of NaN, whose token nobody reads
        __syncthreads();
        uint64_t total = 0;
        for (int i = 0; i < BINS / 32; i++) {
            if (i < warp) reached += shared.part_keys[i];
            total += shared.part_keys[i];
        }
        if (MASS && level == 0) target = max((long long)ceil(double(top_p) * double(total)), 1ll);
        if (thread < BINS && reached >= target && reached - here < target)
            shared.search = {BINS - 1 - thread, target - (reached - here)};
        __syncthreads();
        target = shared.search.target;
        if (level == 0)
            nearest = shared.search.digit;
        else
            prefix = prefix << 8 | shared.search.digit;
    }
    return prefix;
}

__device__ __forceinline__ uint32_t mix(uint32_t x) {
    x = (x ^ x >> 16) * 0x21F0AAADu;
    x = (x ^ x >> 15) * 0x735A2D97u;
    return x ^ x >> 15;
}

// Collect the row's bias entries that count for this range in `shared` -> whether this thread's is one of them.
__device__ __forceinline__ bool collect_bias(Shared& shared, const State& state, const Row& row, const Range& range) {
    bool biased = false;
    if (threadIdx.x < BIAS_ENTRIES) {
        const int entry = row.slot * BIAS_ENTRIES + threadIdx.x, at = state.bias_ids[entry] - range.begin;
        biased = row.position < state.bias_until[entry] && at >= 0 && at < range.count;
        shared.bias_ids[threadIdx.x] = biased ? at : -1;
        shared.bias_values[threadIdx.x] = state.bias_values[entry];
    }
    return biased;
}

// The best of the tokens that a thread has seen.
struct Best {
    float value;
    int at;

    // `at` of the thread's first token, for a row of -inf or NaN.
    __device__ __forceinline__ Best() : value(minus_infinity()), at(2 * threadIdx.x) {}
    // The tokens of a group, which follow those seen so far.
    __device__ __forceinline__ void see(const float (&x)[2 * GROUP], int first) {
        float largest = x[0];
#pragma unroll
        for (int i = 1; i < 2 * GROUP; i++) largest = fmaxf(largest, x[i]);
        if (!(largest > value)) return;
#pragma unroll
        for (int i = 0; i < 2 * GROUP; i++) {
            if (!(x[i] > value)) continue;
            value = x[i];
            at = first + place_in_group(i);
        }
    }
    // 0 where the thread has no tokens.
    __device__ __forceinline__ uint64_t key(const Range& range) const {
        return 2 * threadIdx.x < range.count ? key_of(value, range.begin + at) : 0;
    }
};

// Draws from the logits of a row that has a temperature.
struct Draw {
    uint32_t first_key, second_key;  // of the noise
    float temperature, reciprocal;
    Best best;  // with noise

    // temperature: 1 for logits that were divided by it already.
    __device__ __forceinline__ Draw(const State& state, const Row& row, float temperature)
        : temperature(temperature), reciprocal(1.0f / temperature) {
        const uint32_t low = state.seed[2 * row.slot], high = state.seed[2 * row.slot + 1];
        first_key = mix(mix(low + uint32_t(row.position) * 0x1E3779B1u) ^ high);
        second_key = mix(first_key ^ 0x5BD1E995u);
    }

    // 0 < u <= 1, of the place `at` in the range, times 2^32.
    __device__ __forceinline__ float uniform(const Range& range, int at) const {
        return float(mix(mix(uint32_t(range.begin + at) ^ first_key) + second_key)) + 0.5f;
    }

    // A group of logits, of which those that are NaN cannot be drawn. All threads of the warp.
    __device__ __forceinline__ void see(Shared& shared, const Range& range, const float (&x)[2 * GROUP], int first) {
        constexpr float LN_2 = 0.693147180559945f;
        float to_beat = of_order(*const_cast<volatile uint32_t*>(&shared.to_beat));
        float bounds[2 * GROUP];
        bool hopeful = false;
#pragma unroll
        for (int i = 0; i < 2 * GROUP; i++) {
            // More than the logit with its noise: 1e-6 of it covers the reciprocal's rounding, 1e-3 that of logarithms.
            const float scaled = x[i] * reciprocal,
                        log_uniform = lg2(uniform(range, first + place_in_group(i))) - 32.0f;
            bounds[i] = fmaf(fabsf(scaled), 1e-6f, scaled) + fmaf(-LN_2, log_uniform, 1e-3f);
            hopeful |= bounds[i] >= to_beat;
        }
        while (__any_sync(ALL, hopeful)) {  // most often once or not at all: the most hopeful of each thread
            int chosen = 0;
            float bound = bounds[0], logit = x[0];
#pragma unroll
            for (int i = 1; i < 2 * GROUP; i++) {
                if (!(bound >= bounds[i]) && bounds[i] == bounds[i]) chosen = i, bound = bounds[i], logit = x[i];
            }
            if (bound >= to_beat) {
                const int at = first + place_in_group(chosen);
                const float value = logit / temperature - logf(-log1pf(-uniform(range, at) * 0x1p-32f));
                if (value > best.value || (value == best.value && at < best.at)) best.value = value, best.at = at;
            }
            const uint32_t of_warp = __reduce_max_sync(ALL, order_of(best.value));
            to_beat = fmaxf(to_beat, of_order(of_warp));
            if (threadIdx.x % 32 == 0) atomicMax(&shared.to_beat, of_warp);
            hopeful = false;
#pragma unroll
            for (int i = 0; i < 2 * GROUP; i++) {
                if (i == chosen) bounds[i] = __uint_as_float(0x7FC00000);
                hopeful |= bounds[i] >= to_beat;
            }
        }
    }
};

// A group of logits with -inf for the tokens that the row's mask leaves out.
__device__ __forceinline__ void apply_mask(const State& state, const Row& row, const Range& range, int vocab, int first,
                                           float (&x)[2 * GROUP]) {
    const uint32_t* const mask = state.masks + size_t(row.mask) * ((vocab + 31) / 32);
#pragma unroll
    for (int i = 0; i < 2 * GROUP; i++) {
        const int at = first + place_in_group(i), token = range.begin + at;
        if (at < range.count && (mask[token / 32] >> token % 32 & 1) == 0) x[i] = minus_infinity();
    }
}

// A group of logits with the row's penalties.
__device__ __forceinline__ void penalize(const State& state, const Row& row, const Range& range, int vocab, int first,
                                         float (&x)[2 * GROUP]) {
    const size_t counts = size_t(row.slot) * vocab + range.begin;
#pragma unroll
    for (int half = 0; half < 2 * GROUP; half += GROUP) {
        int written[GROUP], prompted[GROUP];
#pragma unroll
        for (int i = 0; i < GROUP; i++) {  // all loads first
            const int at = first + place_in_group(half + i);
            const bool present = at < range.count;
            written[i] = present ? state.output_counts[counts + at] : 0;
            prompted[i] = present ? state.in_prompt[counts + at] : 0;
        }
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            float& value = x[half + i];
            if (written[i] > 0 || prompted[i] > 0)
                value = value > 0.0f ? value / row.repetition : value * row.repetition;
            // No fused multiply-add: equal logits of the reference stay equal.
            value = __fsub_rn(value, __fmul_rn(row.frequency, float(written[i])));
            value = __fsub_rn(value, written[i] > 0 ? row.presence : 0.0f);
        }
    }
}

// Divide the range by the temperature, and find the order that a logit must reach to be left by top_k and top_p; `peak`
// becomes the row's largest scaled logit.
__device__ __forceinline__ uint32_t filter(Shared& shared, Space& space, const Row& row, const Range& range, int vocab,
                                           const Exchange& exchange, float* values, float& peak) {
    const int thread = threadIdx.x;
    float largest = minus_infinity();
#pragma unroll 4
    for (int at = thread; at < range.count; at += THREADS) {
        const float scaled = values[at] / row.temperature;
        values[at] = scaled;
        largest = fmaxf(largest, scaled);
    }
    largest = value_of(block_max(shared, uint64_t(order_of(largest)) << 32));
    if (thread < ROW_BLOCKS) *mapa(&shared.peaks[range.block], thread) = largest;
    cluster_sync();
    peak = shared.peaks[0];
    for (int block = 1; block < ROW_BLOCKS; block++) peak = fmaxf(peak, shared.peaks[block]);
    if (range.block == 0 && thread == 0) exchange.send(WORD_PEAK, order_of(peak));
#pragma unroll
    for (int i = 0; i < RANKS - 1; i++) peak = fmaxf(peak, of_order(uint32_t(exchange.wait(i, WORD_PEAK))));
    uint32_t least = 0;
    int turn = 0;
    if (row.by_count)
        least = threshold<false>(shared, space, values, range, vocab, peak, 0, row.top_k, 1.0f, turn, exchange);
    // Nothing below top_k's threshold can be the threshold of top_p, a fraction of the mass that top_k left.
    if (row.by_mass)
        least = threshold<true>(shared, space, values, range, vocab, peak, least, 0, row.top_p, turn, exchange);
    return least;
}

// The token to draw of a range that lies in shared memory -> the thread's best, 0 where it has none.
__device__ __forceinline__ uint64_t draw_staged(Shared& shared, Space& space, const State& state, const Row& row,
                                                const Range& range, int vocab, const Exchange& exchange,
                                                float* values) {
    uint32_t least = 0;
    float peak = 0.0f;
    if (row.filtered) least = filter(shared, space, row, range, vocab, exchange, values, peak);
    Best best;
    Draw draw(state, row, row.filtered ? 1.0f : row.temperature);
    for (int first = 0; first < range.count; first += GROUP * COLUMNS) {
        float x[2 * GROUP];
        bool any = false;
#pragma unroll
        for (int i = 0; i < 2 * GROUP; i++) {
            const int at = first + place_in_group(i);
            x[i] = at < range.count ? values[at] : minus_infinity();
            if (!row.filtered) continue;
            const bool kept =
                at < range.count && order_of(x[i]) >= least && (row.min_p <= 0.0f || expf(x[i] - peak) >= row.min_p);
            if (!kept) x[i] = __uint_as_float(0x7FC00000);
            any |= kept;
        }
        if (!row.drawn)
            best.see(x, first);
        else if (!row.filtered || __any_sync(ALL, any))
            draw.see(shared, range, x, first);
    }
    return row.drawn ? draw.best.key(range) : best.key(range);
}

// Of all ranks, in block 0: the sum of exp, the best tokens (to `ranks_top`), and the drawn token with its logit.
__device__ __forceinline__ float2 meet_ranks(Shared& shared, const Row& row, const Exchange& exchange, float2 sum,
                                             uint64_t& token, float& logit) {
    const int thread = threadIdx.x, rank = exchange.area.rank;
    if (row.with_top) {
        const uint64_t* tops = &shared.top[0][0];
        uint64_t* const own_top = shared.ranks_top[rank];
        if (thread < TOP) own_top[thread] = 0;
        __syncthreads();
        if (thread < ROW_BLOCKS * TOP) {
            const int place = greater_than(tops[thread], tops, ROW_BLOCKS * TOP);
            if (tops[thread] != 0 && place < TOP) own_top[place] = tops[thread];
        }
        __syncthreads();
        if (thread < TOP) exchange.send(WORD_BEST + thread, own_top[thread]);
    }
    if (thread == 0) {
        exchange.send(WORD_DRAWN, token);
        if (row.with_logprob) {
            exchange.send(WORD_SUM, word_of(sum));
            exchange.send(WORD_LOGIT, __float_as_uint(logit));
        }
    }
    if (row.with_top && thread < RANKS * TOP && thread / TOP != rank) {
        const int of = thread / TOP;
        shared.ranks_top[of][thread % TOP] = exchange.wait(of - (of > rank), WORD_BEST + thread % TOP);
    }
    if (thread == 0) {
        float2 all;
        for (int of = 0; of < RANKS; of++) {  // the same order on every rank
            float2 more = sum;
            if (of != rank) {
                const int other = of - (of > rank);
                const uint64_t drawn_there = exchange.wait(other, WORD_DRAWN);
                float its_logit = 0.0f;
                if (row.with_logprob) {
                    const uint64_t of_sum = exchange.wait(other, WORD_SUM);
                    its_logit = __uint_as_float(uint32_t(exchange.wait(other, WORD_LOGIT)));
                    more = sum_of(of_sum);
                }
                if (drawn_there > token) token = drawn_there, logit = its_logit;
            }
            all = of == 0 ? more : merge(all, more);
        }
        shared.sums[0] = all;
    }
    __syncthreads();
    return shared.sums[0];
}

}  // namespace

// A cluster a row: grid (ROW_BLOCKS, R). Row r's parameters are those of slot slots[r]. The rank's shard of the
// vocabulary is `shard` tokens from first_token on, of which a block takes range_size; rows of logits are `stride`
// apart. `values` in shared memory has room for the block's range, and for find_top's keys or a Space behind it.
extern "C" __global__ void __cluster_dims__(ROW_BLOCKS, 1, 1) __launch_bounds__(THREADS, 2)
    sample(const Logit* logits, const int* slots, const int* positions, const float* temperatures, const int* top_ks,
           const float* top_ps, const float* min_ps, const float* repetitions, const float* frequencies,
           const float* presences, const uint32_t* seeds, const int* bias_ids, const float* bias_values,
           const int* bias_until, const int* asked_logprobs, const int* output_counts, const uint8_t* in_prompt,
           const int* mask_rows, const uint32_t* masks, int* tokens, float* logprobs, int* top_ids, float* top_logprobs,
           int vocab, int range_size, int first_token, int shard, int stride, const uint64_t* memories, int offset,
           int rank) {
    extern __shared__ __align__(16) float values[];  // [range_size]
    __shared__ Shared shared;
    griddep_wait_first();
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const State state{temperatures, top_ps,     min_ps,         repetitions, frequencies,
                      presences,    top_ks,     asked_logprobs, seeds,       bias_ids,
                      bias_values,  bias_until, output_counts,  in_prompt,   masks};
    Range range;
    range.block = blockIdx.x;
    const int begin = min(range.block * range_size, shard);
    range.begin = first_token + begin;
    range.count = min(range_size, shard - begin);
    range.logits = logits + size_t(blockIdx.y) * stride + begin;
    const Exchange exchange(memories, offset, rank, blockIdx.y, gridDim.y);
    void* const scratch = values + range_size;
    if (thread == 0) shared.to_beat = order_of(minus_infinity());
    cluster_arrive();  // waited for before the first write to another block: by then all have started
    griddep_wait();
    griddep_launch_dependents();

    Pair pairs[GROUP], next[GROUP];
    load_group(range, 0, pairs);
    load_group(range, GROUP * COLUMNS, next);
    const Row row(state, slots[blockIdx.y], positions[blockIdx.y], mask_rows[blockIdx.y], vocab);
    const bool biased = collect_bias(shared, state, row, range);
    // Whether the range has to be changed, or known as a whole, before a token is drawn. The blocks may differ.
    const bool staged = __syncthreads_or(biased) || row.penalized || row.filtered || row.mask >= 0;

    float2 sums[2];  // finite: exp of a difference of infinities is not a number
    sums[0] = sums[1] = make_float2(-MOST, 0.0f);
    Best raw;
    Draw draw(state, row, row.drawn ? row.temperature : 1.0f);
    const bool seeks_best = row.with_top || !(staged || row.drawn);
#pragma unroll 1
    for (int first = 0; first < range.count; first += GROUP * COLUMNS) {
        float x[2 * GROUP];
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
#if BF16
            x[2 * i] = widen_low(pairs[i]), x[2 * i + 1] = widen_high(pairs[i]);
#else
            x[2 * i] = pairs[i].x, x[2 * i + 1] = pairs[i].y;
#endif
            pairs[i] = next[i];
        }
        load_group(range, first + 2 * GROUP * COLUMNS, next);
        if (row.with_logprob) add_group(sums, x);
        if (seeks_best) raw.see(x, first);
        if (staged) {
            if (row.mask >= 0) apply_mask(state, row, range, vocab, first, x);
            if (row.penalized) penalize(state, row, range, vocab, first, x);
#pragma unroll
            for (int i = 0; i < 2 * GROUP; i++) {
                const int at = first + place_in_group(i);
                if (at < range.count) values[at] = x[i];
            }
        } else if (row.drawn) {
            draw.see(shared, range, x, first);
        }
    }
    cluster_wait();

    if (row.with_logprob) {
        const float2 sum = part_merge(sums);
        if (lane % 16 == 0) shared.part_sums[thread / 16] = sum;
        __syncthreads();
        if (warp == 0) {
            const float2 all = warp_merge(shared.part_sums[lane]);
            if (lane == 0) *mapa(&shared.sums[range.block], 0) = all;
        }
    }
    if (row.with_top) find_top(shared, static_cast<uint64_t*>(scratch), range, raw.key(range));

    uint64_t best = row.drawn ? draw.best.key(range) : raw.key(range);
    if (staged) {
        __syncthreads();
        add_bias(shared, values, biased);
        __syncthreads();
        best = draw_staged(shared, *static_cast<Space*>(scratch), state, row, range, vocab, exchange, values);
    }
    const uint64_t winner = block_max(shared, best);
    if (thread == 0) *mapa(&shared.drawn[range.block], 0) = winner;
    cluster_sync();
    if (range.block != 0) return;

    float2 sum = shared.sums[0];
    uint64_t token = shared.drawn[0];
    for (int block = 1; block < ROW_BLOCKS; block++) {
        if (row.with_logprob) sum = merge(sum, shared.sums[block]);
        token = max(token, shared.drawn[block]);
    }
    float logit = minus_infinity();
    if (row.with_logprob && thread == 0 && token != 0)
        logit = load(logits + size_t(blockIdx.y) * stride + token_of(token) - first_token);
    const uint64_t* tops = &shared.top[0][0];
    int top_count = ROW_BLOCKS * TOP;
    if (RANKS > 1) {
        sum = meet_ranks(shared, row, exchange, sum, token, logit);
        tops = &shared.ranks_top[0][0];
        top_count = RANKS * TOP;
        for (int word = thread; word < WORDS; word += THREADS)  // those that this row used
            if (word < LEVELS * BINS ? row.by_count
                : word < WORD_PEAK   ? row.by_mass
                : word == WORD_PEAK  ? row.filtered
                : word < WORD_SUM    ? row.with_top
                : word == WORD_DRAWN ? true
                                     : row.with_logprob)
                exchange.empty(word);
    }
    const float log_sum = sum.x + logf(sum.y);
    if (thread == 0) {
        tokens[blockIdx.y] = token_of(token);
        logprobs[blockIdx.y] = row.with_logprob ? logit - log_sum : 0.0f;
    }
    if (!row.with_top) {
        if (thread < TOP) top_ids[blockIdx.y * TOP + thread] = 0, top_logprobs[blockIdx.y * TOP + thread] = 0.0f;
    } else if (thread < top_count) {
        const int place = greater_than(tops[thread], tops, top_count);
        if (tops[thread] != 0 && place < TOP) {
            top_ids[blockIdx.y * TOP + place] = token_of(tops[thread]);
            top_logprobs[blockIdx.y * TOP + place] = value_of(tops[thread]) - log_sum;
        }
    }
}
