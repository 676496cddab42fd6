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
#include "common/ranking.cuh"

namespace {

using uint32_t = unsigned;  // NVRTC has no headers to offer
using uint64_t = unsigned long long;

constexpr int WARPS = THREADS / 32;

static_assert(CHUNK == 8, "logits of a load of 16 bytes");
static_assert(WARPS == 32, "a warp reads what the warps have found");
static_assert(TOP <= WARPS, "the first bound comes from the best of the warps");
static_assert(RANKS * TOP <= THREADS, "a thread takes one of the best tokens of all ranks");

struct Shared {
    uint64_t warp_keys[WARPS];
    float2 warp_sums[WARPS];  // the largest logit, and the sum of exp(logit - largest)
    uint32_t warp_greater[WARPS];
    uint64_t best[RANKS][TOP];  // of each rank's shard, in order; 0 where it has fewer tokens
    uint64_t bound;             // what the shard's TOP best reach
    uint64_t target;
    int count;  // of candidates
    float log_sum;
};

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
        area.send_all(word, not_empty(value));  // the empty word is the key of a NaN if of anything
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
__device__ __forceinline__ float2 read_row(const Row& row, uint64_t target_key, uint64_t& best_key, uint32_t& greater) {
    const float target_logit = value_of(target_key);
    const int target = token_of(target_key);
    float2 sum = make_float2(-MOST, 0.0f);  // finite: exp of a difference of infinities is not a number
    float best = minus_infinity();
    int best_at = threadIdx.x * CHUNK;
    greater = 0;
    for (int at = threadIdx.x * CHUNK; at < row.count; at += THREADS * CHUNK) {
        float x[CHUNK];
        row.load(at, x);
        float largest = sum.x;
#pragma unroll
        for (int i = 0; i < CHUNK; i++) largest = fmaxf(largest, x[i]);
        sum = make_float2(largest, sum.y * expf(sum.x - largest));
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
            sum.y += expf(x[i] - largest);
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
    place_best<THREADS>(candidates, count, TOP, out);
    __syncthreads();
}

// Of all ranks, in thread 0: the sum of exp and how many logits are greater than the target's; and in every thread the
// best tokens, in shared.best.
__device__ __forceinline__ void meet_ranks(Shared& shared, const Exchange& exchange, float2& sum, uint32_t& greater) {
    const int thread = threadIdx.x, rank = exchange.area.rank;
    if (thread < TOP) exchange.send(thread, shared.best[rank][thread]);
    if (thread == 0) {
        exchange.send(WORD_GREATER, greater);
        exchange.send(WORD_SUM, word_of(sum));
        float2 all;
        for (int from = 0; from < RANKS; from++) {  // the same order on every rank
            float2 more = sum;
            if (from != rank) {
                greater += uint32_t(exchange.take(from, WORD_GREATER));
                more = sum_of(exchange.take(from, WORD_SUM));
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
    float2 sum = warp_merge(read_row(row, target_key, best, greater));
    greater = __reduce_add_sync(ALL, greater);
    if (lane == 0) shared.warp_sums[warp] = sum, shared.warp_greater[warp] = greater;
    find_best(shared, candidates, shared.best[RANKS > 1 ? rank : 0], row, best);
    if (warp == 0) {  // the barriers of find_best lie between
        sum = warp_merge(shared.warp_sums[lane]);
        greater = __reduce_add_sync(ALL, shared.warp_greater[lane]);
    }
    if (RANKS > 1) meet_ranks(shared, exchange, sum, greater);
    if (thread == 0) {
        const float log_sum = sum.x + logf(sum.y);
        shared.log_sum = log_sum;
        ranks[blockIdx.x] = greater + 1;
        logprobs[blockIdx.x] = value_of(target_key) - log_sum;
    }
    __syncthreads();
    if (thread < RANKS * TOP) {
        const uint64_t* const all = &shared.best[0][0];
        const int place = greater_than(all[thread], all, RANKS * TOP);
        if (all[thread] != 0 && place < TOP) {
            top_ids[blockIdx.x * TOP + place] = token_of(all[thread]);
            top_logprobs[blockIdx.x * TOP + place] = value_of(all[thread]) - shared.log_sum;
        }
    }
}
