// What a model thinks of given tokens: of each row of bf16 logits [R, V] the target's log probability and rank, and the
// TOP likeliest tokens. The mathematics and the order are kernels.reference's: greater logits first, of equal ones the
// lower token.
//
// Bytes: a row's logits once, 402 KB at V = 201088, and once more of the few threads that own one of the likeliest. 256
// rows, a tile of a prompt, are 103 MB: 34 us at 3 TB/s, beside 0.5 ms for the product that makes them.
//
// A row is a block: rows are many, so they fill the multiprocessors. Thread t owns the chunks of 8 logits t, t +
// THREADS, ... and every reduction has one order, so a row's bytes do not depend on the others.
//
// Keys: a logit and its token in one number, so no two are equal. Each thread remembers its best. The TOP best of these
// are owned by TOP threads; the least of them bounds the row's TOP best from below, and no other thread owns a token
// that reaches it: these threads alone read their logits again, and places among what reaches the bound are found by
// counting who is greater.
//
// With RANKS > 1 each rank has a shard of the vocabulary. A rank sends its part of a row through the exchange area of
// common/exchange.cuh: the target's key where the target is in its shard, then the number of greater keys, the sum of
// exp, and its best tokens. The words of a row of a step have a place of their own, so the tiles of a step need no order
// among themselves, and between two steps lie the exchanges of a forward.
//
// Macros, from kernels.hopper.scorer: TOP, RANKS, THREADS, CHUNK; WORDS of a row from a rank in the exchange area, where
// WORD_TARGET, WORD_GREATER and WORD_SUM stand behind the TOP best.

#include "common/exchange.cuh"
#include "common/ptx.cuh"

namespace {

using uint32_t = unsigned;  // NVRTC has no headers to offer
using uint64_t = unsigned long long;

constexpr int WARPS = THREADS / 32;
constexpr uint32_t ALL = 0xFFFFFFFF;
constexpr float MOST = 0x1.fffffep127f;  // the largest finite float

static_assert(CHUNK == 8, "logits of a load of 16 bytes");
static_assert(WARPS == 32, "a warp reads what the warps have found");
static_assert(TOP <= WARPS, "the first bound comes from the best of the warps");
static_assert(RANKS * TOP <= THREADS, "a thread takes one of the best tokens of all ranks");

struct Sum {
    float largest, total;  // of some logits: the largest, and the sum of exp(logit - largest)
};

struct Shared {
    uint64_t warp_keys[WARPS];
    Sum warp_sums[WARPS];
    uint32_t warp_greater[WARPS];
    uint64_t best[RANKS][TOP];  // of each rank's shard, in order; 0 where it has fewer tokens
    uint64_t bound;             // what the shard's TOP best reach
    uint64_t target;
    int count;  // of candidates
    float log_sum;
};

// Greater for the greater logit (-0 counts as 0), then for the lower token; never 0, which stands for no token.
__device__ __forceinline__ uint64_t key_of(float logit, int token) {
    const uint32_t bits = __float_as_uint(logit + 0.0f);
    return uint64_t(bits ^ (bits >> 31 ? 0xFFFFFFFF : 0x80000000)) << 32 | uint32_t(~token);
}

__device__ __forceinline__ int token_of(uint64_t key) { return int(~uint32_t(key)); }

__device__ __forceinline__ float logit_of(uint64_t key) {
    const uint32_t order = uint32_t(key >> 32);
    return __uint_as_float(order ^ (order >> 31 ? 0x80000000 : 0xFFFFFFFF));
}

__device__ __forceinline__ uint64_t warp_max(uint64_t key) {
    const uint32_t high = __reduce_max_sync(ALL, uint32_t(key >> 32));
    const uint32_t low = __reduce_max_sync(ALL, uint32_t(key >> 32) == high ? uint32_t(key) : 0);
    return uint64_t(high) << 32 | low;
}

__device__ __forceinline__ Sum merge(Sum a, Sum b) {
    const float largest = fmaxf(a.largest, b.largest);
    return {largest, a.total * expf(a.largest - largest) + b.total * expf(b.largest - largest)};
}

__device__ __forceinline__ Sum warp_merge(Sum sum) {
    for (int apart = 16; apart > 0; apart /= 2)
        sum = merge(sum, {__shfl_xor_sync(ALL, sum.largest, apart), __shfl_xor_sync(ALL, sum.total, apart)});
    return sum;
}

__device__ __forceinline__ int greater_than(uint64_t key, const uint64_t* keys, int count) {
    int greater = 0;
    for (int i = 0; i < count; i++) greater += keys[i] > key;
    return greater;
}

// A row's part in this rank's shard: `count` tokens from `first_token` on.
struct Row {
    const bf16* logits;
    int first_token, count;

    // The eight logits from `at` on, minus infinity past the end; `at` is a multiple of 8, the row aligned.
    __device__ __forceinline__ void load(int at, float (&x)[CHUNK]) const {
        const uint4 words = *reinterpret_cast<const uint4*>(logits + at);
        const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            const float value = i % 2 ? widen_high(pairs[i / 2]) : widen_low(pairs[i / 2]);
            x[i] = at + i < count ? value : minus_infinity();
        }
    }
};

// Where the ranks write for a row, [rows of a step][RANKS][WORDS] words, as this one sees it.
struct Exchange {
    Area<uint64_t> area;

    __device__ __forceinline__ Exchange(const uint64_t* memories, int offset, int rank, int row)
        : area(memories, offset, rank, size_t(row) * RANKS * WORDS, (size_t(row) * RANKS + rank) * WORDS) {}
    __device__ __forceinline__ void send(int word, uint64_t value) const {
        area.send_all(word, min(value, ~0ull - 1));  // never the empty word, which is the key of a NaN if of anything
    }
    // What another rank has sent; its place is empty then.
    __device__ __forceinline__ uint64_t take(int from, int word) const {
        const size_t place = from * WORDS + word;
        const uint64_t value = area.wait(place);
        area.empty(place);
        return value;
    }
};

// The target's key, in every thread; 0 where no rank has it.
__device__ __forceinline__ uint64_t find_target(Shared& shared, const Row& row, int target, const Exchange& exchange) {
    if (threadIdx.x == 0) {
        const int at = target - row.first_token;
        uint64_t key = at >= 0 && at < row.count ? key_of(widen(row.logits[at]), target) : 0;
        if (RANKS > 1) {
            exchange.send(WORD_TARGET, key);
            for (int from = 0; from < RANKS; from++)
                if (from != exchange.area.rank) key = max(key, exchange.take(from, WORD_TARGET));
        }
        shared.target = key;
    }
    __syncthreads();
    return shared.target;
}

// Read the shard once: the thread's sum, its best token (a key, 0 where it has none), and how many of its logits are
// greater than the target's.
__device__ __forceinline__ Sum read_row(const Row& row, uint64_t target_key, uint64_t& best_key, uint32_t& greater) {
    const float target_logit = logit_of(target_key);
    const int target = token_of(target_key);
    Sum sum = {-MOST, 0.0f};  // finite: exp of a difference of infinities is not a number
    float best = minus_infinity();
    int best_at = threadIdx.x * CHUNK;
    greater = 0;
    for (int at = threadIdx.x * CHUNK; at < row.count; at += THREADS * CHUNK) {
        float x[CHUNK];
        row.load(at, x);
        float largest = sum.largest;
#pragma unroll
        for (int i = 0; i < CHUNK; i++) largest = fmaxf(largest, x[i]);
        sum = {largest, sum.total * expf(sum.largest - largest)};
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            sum.total += expf(x[i] - largest);
            if (x[i] > best) best = x[i], best_at = at + i;
            const bool equal_before = x[i] == target_logit && at + i < row.count && row.first_token + at + i < target;
            greater += x[i] > target_logit || equal_before;
        }
    }
    best_key = threadIdx.x * CHUNK < row.count ? key_of(best, row.first_token + best_at) : 0;
    return sum;
}

// The shard's TOP best tokens to `out`, in order. `best`: the thread's best, 0 where it has none. `candidates` has room
// for all tokens of TOP threads, and for the best of TOP warps' threads.
__device__ __forceinline__ void find_best(Shared& shared, uint64_t* candidates, uint64_t* out, const Row& row,
                                          uint64_t best) {
    const int thread = threadIdx.x, lane = thread % 32;
    const uint64_t of_warp = warp_max(best);
    if (lane == 0) shared.warp_keys[thread / 32] = of_warp;
    if (thread == 0) shared.count = 0, shared.bound = 0;
    if (thread < TOP) out[thread] = 0;
    __syncthreads();
    if (thread < WARPS) {  // a first bound, the TOP-th best of the warps, leaves few threads
        const uint64_t key = shared.warp_keys[thread];
        if (key != 0 && greater_than(key, shared.warp_keys, WARPS) == TOP - 1) shared.bound = key;
    }
    __syncthreads();
    if (best != 0 && best >= shared.bound) candidates[atomicAdd(&shared.count, 1)] = best;
    __syncthreads();
    const int threads = shared.count;
    const bool is_bound = thread < threads && greater_than(candidates[thread], candidates, threads) == TOP - 1;
    const uint64_t candidate = is_bound ? candidates[thread] : 0;
    __syncthreads();
    if (is_bound) shared.bound = candidate;  // TOP threads reach it, so the shard's TOP best do
    if (thread == 0) shared.count = 0;
    __syncthreads();
    const uint64_t bound = shared.bound;
    if (best != 0 && best >= bound) {
        for (int at = thread * CHUNK; at < row.count; at += THREADS * CHUNK) {
            float x[CHUNK];
            row.load(at, x);
#pragma unroll
            for (int i = 0; i < CHUNK; i++) {
                const uint64_t key = key_of(x[i], row.first_token + at + i);
                if (at + i < row.count && key >= bound) candidates[atomicAdd(&shared.count, 1)] = key;
            }
        }
    }
    __syncthreads();
    const int count = shared.count;
    for (int i = thread; i < count; i += THREADS) {
        const int place = greater_than(candidates[i], candidates, count);
        if (place < TOP) out[place] = candidates[i];
    }
    __syncthreads();
}

// Of all ranks, in thread 0: the sum of exp and how many logits are greater than the target's; and in every thread the
// best tokens, in shared.best.
__device__ __forceinline__ void meet_ranks(Shared& shared, const Exchange& exchange, Sum& sum, uint32_t& greater) {
    const int thread = threadIdx.x, rank = exchange.area.rank;
    if (thread < TOP) exchange.send(thread, shared.best[rank][thread]);
    if (thread == 0) {
        exchange.send(WORD_GREATER, greater);
        exchange.send(WORD_SUM, uint64_t(__float_as_uint(sum.total)) << 32 | __float_as_uint(sum.largest));
        Sum all;
        for (int from = 0; from < RANKS; from++) {  // the same order on every rank
            Sum more = sum;
            if (from != rank) {
                greater += uint32_t(exchange.take(from, WORD_GREATER));
                const uint64_t bits = exchange.take(from, WORD_SUM);
                more = {__uint_as_float(uint32_t(bits)), __uint_as_float(uint32_t(bits >> 32))};
            }
            all = from == 0 ? more : merge(all, more);
        }
        sum = all;
    }
    if (thread < RANKS * TOP && thread / TOP != rank)
        shared.best[thread / TOP][thread % TOP] = exchange.take(thread / TOP, thread % TOP);
    __syncthreads();
}

}  // namespace

// A block a row: grid (R). The rank's shard of the vocabulary is `shard` tokens from first_token on; rows of logits are
// `stride` apart, a multiple of 8. first_row: the number of the launch's first row among the step's.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    score(const bf16* logits, const int* targets, int* ranks, float* logprobs, int* top_ids, float* top_logprobs,
          int first_token, int shard, int stride, int first_row, const uint64_t* memories, int offset, int rank) {
    extern __shared__ uint64_t candidates[];
    __shared__ Shared shared;
    griddep_wait_first();
    griddep_launch_dependents();
    griddep_wait();
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, target = targets[blockIdx.x];
    if (target < 0) return;  // on every rank
    const Row row = {logits + size_t(blockIdx.x) * stride, first_token, shard};
    const Exchange exchange(memories, offset, rank, first_row + blockIdx.x);
    const uint64_t target_key = find_target(shared, row, target, exchange);

    uint64_t best;
    uint32_t greater;
    Sum sum = warp_merge(read_row(row, target_key, best, greater));
    greater = __reduce_add_sync(ALL, greater);
    if (lane == 0) shared.warp_sums[warp] = sum, shared.warp_greater[warp] = greater;
    find_best(shared, candidates, shared.best[RANKS > 1 ? rank : 0], row, best);
    if (warp == 0) {  // the barriers of find_best lie between
        sum = warp_merge(shared.warp_sums[lane]);
        greater = __reduce_add_sync(ALL, shared.warp_greater[lane]);
    }
    if (RANKS > 1) meet_ranks(shared, exchange, sum, greater);
    if (thread == 0) {
        const float log_sum = sum.largest + logf(sum.total);
        shared.log_sum = log_sum;
        ranks[blockIdx.x] = greater + 1;
        logprobs[blockIdx.x] = logit_of(target_key) - log_sum;
    }
    __syncthreads();
    if (thread < RANKS * TOP) {
        const uint64_t* const all = &shared.best[0][0];
        const int place = greater_than(all[thread], all, RANKS * TOP);
        if (all[thread] != 0 && place < TOP) {
            top_ids[blockIdx.x * TOP + place] = token_of(all[thread]);
            top_logprobs[blockIdx.x * TOP + place] = logit_of(all[thread]) - shared.log_sum;
        }
    }
}
