// From logits [R, V] to a token, its log probability and the TOP likeliest tokens of each row, in one kernel, with no
// sort. Logits are bf16 (macro BF16 1) or float32 (0). The mathematics is kernels.reference's: penalties, bias,
// temperature, top_k, top_p, min_p, Gumbel noise and argmax; log probabilities are those of the raw logits.
//
// Bytes: a row of logits once, 402 KB in bf16 at V = 201088, and 5 V of counts where the row has penalties. The floors
// at 3.08 TB/s, 0.13 us for one row and 8.4 for 64, are far away: what counts is instructions, about 30 a logit for the
// log probabilities, 60 more for noise, 10 and an atomic for each level of a filter's search.
//
// A row is a cluster of ROW_BLOCKS blocks: its instructions are spread over 8 multiprocessors, and 16 rows run at once.
// A block takes a range of the vocabulary and keeps its adjusted logits (100 KB) in shared memory, so filters search
// there and no scratch memory is written; blocks meet through distributed shared memory. What a row needs is decided
// from its parameters, alike in every block of the cluster. Thread t owns logits t, t + THREADS, ... of its block's
// range, and every reduction has one order, so the same row gives the same bytes in any batch.
//
// The likeliest tokens: each thread remembers its own best. The TOP best of these name the only threads that can own
// one of the block's TOP best tokens, so just their logits are read again; places in the order are found by counting
// who is greater, exactly, because a key is the logit and the token: the lower id goes first among equals.
//
// Filters: a threshold is the largest t such that the logits >= t have a count, or a mass in units of 2^-40, of at
// least the target: a search over histograms of integers. Its first digit is the distance from the best in eighths,
// which spreads logits over many bins and so over many banks; the other four are those of the logit's order.
//
// With RANKS > 1 each rank has a shard of the vocabulary, and its cluster handles that: no logits are gathered. What
// the blocks of a cluster send each other, the ranks do as well, through the exchange area of common/exchange.cuh: the
// best scaled logit where a row has filters, the histograms' sums at each level of a search (2 KB), and at the end the
// best tokens, the sum of exp and the token a rank would draw, TOP + 3 words. A word has its own place for the whole
// kernel; block 0 makes those that were used empty when all blocks have read them. The exchanges of the forward lie
// between this kernel's and its next one's.
//
// Macros, from kernels/hopper/sampler/__init__.py: BF16, TOP, RANKS; BIAS_ENTRIES of a row; ROW_BLOCKS and THREADS;
// LEVELS and BINS of a search; WORDS of a row from a rank in the exchange area, where histograms come first, and from
// WORD_PEAK, WORD_BEST, WORD_SUM, WORD_DRAWN and WORD_LOGIT on what follows them.

#include "common/exchange.cuh"
#include "common/ptx.cuh"

namespace {

using uint8_t = unsigned char;  // NVRTC has no headers to offer
using uint32_t = unsigned;
using uint64_t = unsigned long long;

constexpr int WARPS = THREADS / 32;
constexpr int UNROLL = 4;         // logits a thread loads at once
constexpr float PER_UNIT = 8.0f;  // bins of the first digit to a difference of 1
constexpr uint32_t ALL = 0xFFFFFFFF;
constexpr float MOST = 0x1.fffffep127f;  // the largest finite float

static_assert(BINS / 32 == ROW_BLOCKS, "a warp's bins of a block's histogram are one block's to send");
static_assert(RANKS * TOP <= THREADS, "a thread takes one of the best tokens of all ranks");
static_assert(TOP <= WARPS, "the bound on a block's best tokens comes from the best of its warps");
static_assert(BIAS_ENTRIES <= THREADS, "a thread takes one bias entry");

#if BF16
using Logit = bf16;
#else
using Logit = float;
#endif

// The sampling parameters of all slots, and the tokens so far.
struct State {
    const float *temperature, *top_p, *min_p, *repetition, *frequency, *presence;
    const int* top_k;
    const uint32_t* seed;
    const int* bias_ids;
    const float* bias_values;
    const int *bias_until, *output_counts;
    const uint8_t* in_prompt;
};

// Those of one row.
struct Row {
    int slot, position;
    float temperature, top_p, min_p, repetition, frequency, presence;
    int top_k;
    bool drawn, by_count, by_mass, filtered, penalized;

    __device__ __forceinline__ Row(const State& state, int slot, int position, int vocab)
        : slot(slot), position(position), temperature(state.temperature[slot]), top_p(state.top_p[slot]),
          min_p(state.min_p[slot]), repetition(state.repetition[slot]), frequency(state.frequency[slot]),
          presence(state.presence[slot]), top_k(state.top_k[slot]) {
        drawn = temperature > 0.0f;
        by_count = drawn && top_k > 0 && top_k < vocab, by_mass = drawn && top_p < 1.0f;
        filtered = by_count || by_mass || (drawn && min_p > 0.0f);
        // The padding slot's repetition is 0.
        penalized = (repetition > 0.0f && repetition != 1.0f) || frequency != 0.0f || presence != 0.0f;
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
    uint2 histogram[2][BINS];       // low and high words; a level's is read by others while the next one is filled
    uint64_t warp_keys[WARPS];
    float2 warp_sums[WARPS];
    uint64_t groups[TOP * 32];  // best tokens of threads that may own one of the block's best
    uint64_t owners[TOP];       // of them those that do
    uint64_t bound;             // what such a token must reach
    int group_count, best_count;
    Search search;
    int bias_ids[BIAS_ENTRIES];
    float bias_values[BIAS_ENTRIES];
    uint64_t ranks_top[RANKS][TOP];  // in block 0: the best tokens of every rank
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
        area.send_all(word, min(value, ~0ull - 1));  // never the empty word, which is the key of a NaN if of anything
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

// 0 .. 2^32 - 1 in the order of the floats.
__device__ __forceinline__ uint32_t order_of(float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits ^ (bits >> 31 ? 0xFFFFFFFF : 0x80000000);
}

__device__ __forceinline__ float of_order(uint32_t order) {
    return __uint_as_float(order ^ (order >> 31 ? 0x80000000 : 0xFFFFFFFF));
}

// Greater for the greater value (-0 counts as 0), then for the lower token; never 0, which stands for no token.
__device__ __forceinline__ uint64_t key_of(float value, int token) {
    return uint64_t(order_of(value + 0.0f)) << 32 | uint32_t(~token);
}

__device__ __forceinline__ int token_of(uint64_t key) { return int(~uint32_t(key)); }

__device__ __forceinline__ uint64_t warp_max(uint64_t key) {
    const uint32_t high = __reduce_max_sync(ALL, uint32_t(key >> 32));
    const uint32_t low = __reduce_max_sync(ALL, uint32_t(key >> 32) == high ? uint32_t(key) : 0);
    return uint64_t(high) << 32 | low;
}

__device__ uint64_t block_max(Shared& shared, uint64_t key) {
    key = warp_max(key);
    __syncthreads();  // others may still read the words of the reduction before
    if (threadIdx.x % 32 == 0) shared.warp_keys[threadIdx.x / 32] = key;
    __syncthreads();
    return warp_max(shared.warp_keys[threadIdx.x % 32]);
}

// Of two sets: the largest x, and the sum of exp(x - largest).
__device__ __forceinline__ float2 merge(float2 a, float2 b) {
    const float largest = fmaxf(a.x, b.x);
    return make_float2(largest, a.y * expf(a.x - largest) + b.y * expf(b.x - largest));
}

__device__ float2 warp_merge(float2 sum) {
    for (int apart = 16; apart > 0; apart /= 2)
        sum = merge(sum, make_float2(__shfl_xor_sync(ALL, sum.x, apart), __shfl_xor_sync(ALL, sum.y, apart)));
    return sum;
}

__device__ int greater_than(uint64_t key, const uint64_t* keys, int count) {
    int greater = 0;
    for (int i = 0; i < count; i++) greater += keys[i] > key;
    return greater;
}

// Put the range's TOP best tokens, in order, into block 0. `best` is the thread's best token, 0 where it has none;
// `candidates` has room for all tokens of TOP threads.
__device__ void find_top(Shared& shared, uint64_t* candidates, const Range& range, uint64_t best) {
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const uint64_t of_warp = warp_max(best);
    if (lane == 0) shared.warp_keys[warp] = of_warp;
    if (thread == 0) shared.group_count = shared.best_count = 0;
    if (thread < TOP) shared.owners[thread] = 0;
    __syncthreads();
    if (warp == 0) {  // a first bound: the TOP-th best of the warps, 0 where fewer have tokens
        const uint64_t key = shared.warp_keys[lane];
        const uint32_t reached = __ballot_sync(ALL, greater_than(key, shared.warp_keys, WARPS) == TOP - 1);
        const uint64_t bound = __shfl_sync(ALL, key, reached ? __ffs(reached) - 1 : 0);
        if (lane == 0) shared.bound = reached ? bound : 0;
    }
    __syncthreads();
    if (best != 0 && best >= shared.bound) shared.groups[atomicAdd(&shared.group_count, 1)] = best;
    __syncthreads();
    const int groups = shared.group_count;
    if (thread == 0 && groups < TOP) shared.bound = 0;
    if (thread < groups) {
        const uint64_t key = shared.groups[thread];
        const int place = greater_than(key, shared.groups, groups);
        if (place < TOP) shared.owners[place] = key;
        if (place == TOP - 1) shared.bound = key;  // TOP threads reach it, so the block's TOP best do
    }
    __syncthreads();
    if (warp < TOP && shared.owners[warp] != 0) {
        const int owner = (token_of(shared.owners[warp]) - range.begin) % THREADS;
        for (int at = owner + lane * THREADS; at < range.count; at += 32 * THREADS) {
            const uint64_t key = key_of(load(range.logits + at), range.begin + at);
            if (key >= shared.bound) candidates[atomicAdd(&shared.best_count, 1)] = key;
        }
    }
    __syncthreads();
    const int count = shared.best_count;
    uint64_t* out = mapa(shared.top[range.block], 0);
    if (thread < TOP && thread >= count) out[thread] = 0;
    for (int i = thread; i < count; i += THREADS) {
        const int place = greater_than(candidates[i], candidates, count);
        if (place < TOP) out[place] = candidates[i];
    }
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

// The largest t such that the row's logits of order >= t have a count of at least top_k, or (MASS) top_p of the mass of all
// logits of order >= least. `turn` is the histogram to fill first.
template <bool MASS>
__device__ uint32_t threshold(Shared& shared, const float* values, const Range& range, float peak, uint32_t least,
                              int top_k, float top_p, int& turn, const Exchange& exchange) {
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    uint64_t target = MASS ? 0 : top_k;
    uint32_t prefix = 0;  // digits of the order found so far
    int nearest = 0;      // the first digit
    for (int level = 0; level < LEVELS; level++, turn ^= 1) {
        uint2* const histogram = shared.histogram[turn];
        const int shift = 32 - 8 * level;  // of the level's digit in the order
        if (thread < BINS) histogram[thread] = make_uint2(0, 0);
        __syncthreads();
        for (int at = thread; at < range.count; at += THREADS) {
            const float x = values[at];
            const uint32_t order = order_of(x);
            int digit = distance_digit(x, peak);
            if (level > 0) {
                if (digit != nearest || (level > 1 && order >> (shift + 8) != prefix)) continue;
                digit = order >> shift & BINS - 1;
            }
            if (!MASS) {
                atomicAdd(&histogram[digit].x, 1u);
            } else if (order >= least) {
                const uint64_t mass = uint64_t(expf(x - peak) * 0x1p40f);
                const uint32_t low = uint32_t(mass);
                uint32_t high = uint32_t(mass >> 32);
                if (mass == 0) continue;
                if (atomicAdd(&histogram[digit].x, low) > ~low) high++;  // the low word wrapped
                if (high != 0) atomicAdd(&histogram[digit].y, high);
            }
        }
        cluster_sync();
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
            if (lane == 31) shared.warp_keys[warp] = reached;
        }
        if (thread == 0) shared.search = {0, 1};  // for a row of NaN, whose token nobody reads
        __syncthreads();
        uint64_t total = 0;
        for (int i = 0; i < BINS / 32; i++) {
            if (i < warp) reached += shared.warp_keys[i];
            total += shared.warp_keys[i];
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

// Read the range once: to `values` with penalties. -> the thread's largest logit and sum of exp; and its best token, 0
// where it has none.
__device__ __forceinline__ float2 read_logits(const State& state, const Row& row, const Range& range, int vocab,
                                              float* values, uint64_t& best_key) {
    const int thread = threadIdx.x;
    const size_t counts = size_t(row.slot) * vocab + range.begin;
    float2 sum = make_float2(-MOST, 0.0f);  // finite: exp of a difference of infinities is not a number
    float best = minus_infinity();
    int best_at = thread;
    for (int first = thread; first < range.count; first += UNROLL * THREADS) {
        float x[UNROLL];
        float largest = sum.x;
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            const int at = first + i * THREADS;
            x[i] = at < range.count ? load(range.logits + at) : minus_infinity();
        }
#pragma unroll
        for (int i = 0; i < UNROLL; i++) largest = fmaxf(largest, x[i]);
        sum = make_float2(largest, sum.y * expf(sum.x - largest));
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            const int at = first + i * THREADS;
            sum.y += expf(x[i] - largest);
            if (x[i] > best) {
                best = x[i];
                best_at = at;
            }
            if (at >= range.count) continue;
            float value = x[i];
            if (row.penalized) {
                const int written = state.output_counts[counts + at];
                if (written > 0 || state.in_prompt[counts + at] > 0)
                    value = value > 0.0f ? value / row.repetition : value * row.repetition;
                // No fused multiply-add: equal logits of the reference stay equal.
                value = __fsub_rn(value, __fmul_rn(row.frequency, float(written)));
                value = __fsub_rn(value, written > 0 ? row.presence : 0.0f);
            }
            values[at] = value;
        }
    }
    best_key = thread < range.count ? key_of(best, range.begin + best_at) : 0;
    return sum;
}

// Temperature and filters for a row that is drawn -> the order that a logit must reach to be left; `peak` becomes the
// row's largest scaled logit where it has filters.
__device__ __forceinline__ uint32_t filter(Shared& shared, const Row& row, const Range& range, const Exchange& exchange,
                                           float* values, float& peak) {
    const int thread = threadIdx.x;
    uint32_t least = 0;
    float largest = minus_infinity();
    for (int at = thread; at < range.count; at += THREADS) {
        const float scaled = values[at] / row.temperature;
        values[at] = scaled;
        largest = fmaxf(largest, scaled);
    }
    if (row.filtered) {
        largest = of_order(uint32_t(block_max(shared, uint64_t(order_of(largest)) << 32) >> 32));
        if (thread < ROW_BLOCKS) *mapa(&shared.peaks[range.block], thread) = largest;
        cluster_sync();
        peak = shared.peaks[0];
        for (int block = 1; block < ROW_BLOCKS; block++) peak = fmaxf(peak, shared.peaks[block]);
        if (range.block == 0 && thread == 0) exchange.send(WORD_PEAK, order_of(peak));
#pragma unroll
        for (int i = 0; i < RANKS - 1; i++) peak = fmaxf(peak, of_order(uint32_t(exchange.wait(i, WORD_PEAK))));
    }
    int turn = 0;
    if (row.by_count) least = threshold<false>(shared, values, range, peak, 0, row.top_k, 1.0f, turn, exchange);
    // Nothing below top_k's threshold can be the threshold of top_p, a fraction of the mass that top_k left.
    if (row.by_mass) least = threshold<true>(shared, values, range, peak, least, 0, row.top_p, turn, exchange);
    return least;
}

// The range's token of the largest logit, with noise where the row is drawn -> the thread's best, 0 where it has none.
// Most logits cannot win whatever the last bits of their noise: noise = -log(-log1p(-u)) <= -log(u), which costs little
// when approximate.
__device__ __forceinline__ uint64_t draw(const State& state, const Row& row, const Range& range, const float* values,
                                         uint32_t least, float peak) {
    const int thread = threadIdx.x;
    const uint32_t low = state.seed[2 * row.slot], high = state.seed[2 * row.slot + 1];
    const uint32_t key = mix(mix(low + uint32_t(row.position) * 0x1E3779B1u) ^ high);
    const uint32_t second = mix(key ^ 0x5BD1E995u);
    float to_beat = minus_infinity();  // the warp's best
    float best = minus_infinity();
    int best_at = thread;
    for (int first = 0; first < range.count; first += THREADS) {
        const int at = first + thread;
        float value = at < range.count ? values[at] : minus_infinity();
        if (row.drawn) {
            const uint32_t bits = mix(mix(uint32_t(range.begin + at) ^ key) + second);
            const float uniform = (float(bits) + 0.5f) * 0x1p-32f;
            const bool kept = order_of(value) >= least && (row.min_p <= 0.0f || expf(value - peak) >= row.min_p);
            if (kept && value + (1e-3f - __logf(uniform)) >= to_beat)
                value += -logf(-log1pf(-uniform));
            else
                value = minus_infinity();
        }
        if (value > best) {
            best = value;
            best_at = at;
        }
        if (row.drawn) to_beat = of_order(__reduce_max_sync(ALL, order_of(best)));
    }
    return thread < range.count ? key_of(best, range.begin + best_at) : 0;
}

// Of all ranks, in block 0: the sum of exp, the best tokens (to `ranks_top`), and the drawn token with its logit.
__device__ __forceinline__ float2 meet_ranks(Shared& shared, const Row& row, const Exchange& exchange, float2 sum,
                                             uint64_t& token, float& logit) {
    const int thread = threadIdx.x, rank = exchange.area.rank;
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
    if (thread == 0) {
        exchange.send(WORD_SUM, uint64_t(__float_as_uint(sum.y)) << 32 | __float_as_uint(sum.x));
        exchange.send(WORD_DRAWN, token);
        exchange.send(WORD_LOGIT, __float_as_uint(logit));
    }
    if (thread < RANKS * TOP && thread / TOP != rank) {
        const int of = thread / TOP;
        shared.ranks_top[of][thread % TOP] = exchange.wait(of - (of > rank), WORD_BEST + thread % TOP);
    }
    if (thread == 0) {
        float2 all;
        for (int of = 0; of < RANKS; of++) {  // the same order on every rank
            float2 more = sum;
            if (of != rank) {
                const int other = of - (of > rank);
                const uint64_t bits = exchange.wait(other, WORD_SUM), drawn_there = exchange.wait(other, WORD_DRAWN);
                const float its_logit = __uint_as_float(uint32_t(exchange.wait(other, WORD_LOGIT)));
                more = make_float2(__uint_as_float(uint32_t(bits)), __uint_as_float(uint32_t(bits >> 32)));
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
// apart. `values` in shared memory takes the block's range, and behind it the candidates for the best tokens.
extern "C" __global__ void __cluster_dims__(ROW_BLOCKS, 1, 1) __launch_bounds__(THREADS, 1)
    sample(const Logit* logits, const int* slots, const int* positions, const float* temperatures, const int* top_ks,
           const float* top_ps, const float* min_ps, const float* repetitions, const float* frequencies,
           const float* presences, const uint32_t* seeds, const int* bias_ids, const float* bias_values,
           const int* bias_until, const int* output_counts, const uint8_t* in_prompt, int* tokens, float* logprobs,
           int* top_ids, float* top_logprobs, int vocab, int range_size, int first_token, int shard, int stride,
           const uint64_t* memories, int offset, int rank) {
    extern __shared__ __align__(16) float values[];  // [range_size]
    __shared__ Shared shared;
    griddep_wait_first();
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const State state{temperatures, top_ps,   min_ps,      repetitions, frequencies,   presences, top_ks,
                      seeds,        bias_ids, bias_values, bias_until,  output_counts, in_prompt};
    Range range;
    range.block = blockIdx.x;
    const int begin = min(range.block * range_size, shard);
    range.begin = first_token + begin;
    range.count = min(range_size, shard - begin);
    range.logits = logits + size_t(blockIdx.y) * stride + begin;
    const Exchange exchange(memories, offset, rank, blockIdx.y, gridDim.y);
    uint64_t* const candidates = reinterpret_cast<uint64_t*>(values + range_size);
    cluster_arrive();  // waited for before the first write to another block: by then all have started
    griddep_wait();
    griddep_launch_dependents();

    const Row row(state, slots[blockIdx.y], positions[blockIdx.y], vocab);
    const bool biased = collect_bias(shared, state, row, range);
    uint64_t best;
    float2 sum = read_logits(state, row, range, vocab, values, best);
    cluster_wait();

    sum = warp_merge(sum);
    if (lane == 0) shared.warp_sums[warp] = sum;
    find_top(shared, candidates, range, best);
    if (warp == 0) {  // the barriers of find_top lie between
        sum = warp_merge(shared.warp_sums[lane]);
        if (lane == 0) *mapa(&shared.sums[range.block], 0) = sum;
    }
    if (__syncthreads_or(biased)) {
        add_bias(shared, values, biased);
        __syncthreads();
    }

    uint32_t least = 0;
    float peak = 0.0f;
    if (row.drawn) least = filter(shared, row, range, exchange, values, peak);
    const uint64_t winner = block_max(shared, draw(state, row, range, values, least, peak));
    if (thread == 0) *mapa(&shared.drawn[range.block], 0) = winner;
    cluster_sync();
    if (range.block != 0) return;

    sum = shared.sums[0];
    uint64_t token = shared.drawn[0];
    for (int block = 1; block < ROW_BLOCKS; block++) {
        sum = merge(sum, shared.sums[block]);
        token = max(token, shared.drawn[block]);
    }
    float logit = minus_infinity();
    if (thread == 0 && token != 0) logit = load(logits + size_t(blockIdx.y) * stride + token_of(token) - first_token);
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
                                     : true)
                exchange.empty(word);
    }
    const float log_sum = sum.x + logf(sum.y);
    if (thread == 0) {
        tokens[blockIdx.y] = token_of(token);
        logprobs[blockIdx.y] = logit - log_sum;
    }
    if (thread < top_count) {
        const int place = greater_than(tops[thread], tops, top_count);
        if (tops[thread] != 0 && place < TOP) {
            top_ids[blockIdx.y * TOP + place] = token_of(tops[thread]);
            top_logprobs[blockIdx.y * TOP + place] = of_order(uint32_t(tops[thread] >> 32)) - log_sum;
        }
    }
}
