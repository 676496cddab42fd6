// The MXFP4 mixture of experts for Hopper: gate/up projection with the clamped SwiGLU, down projection, routing weight.
//
//   h[pair, u]  = swiglu(x[token] . gate_up[expert] + bias)           experts_up_*    x [T, HIDDEN] -> h [pairs, INTER]
//   y[pair, :]  = weight[pair] * (h[pair] . down[expert] + bias)      experts_down_*  -> y [pairs, HIDDEN]
//
// A pair is (token, choice), pair = token * top_k + choice; the kernel that reads y adds up a token's choices.
// Activations are bf16, sums float32. Two kernels of each projection, for few tokens and for a small batch, give the
// same bytes, as stream.cu does for more (matrix.cuh).
//
// Bytes: 4.25 bits a weight, so 3 * HIDDEN * INTER * 17 / 32 an expert, each read once for a batch that fits a token
// tile. 2880 x 2880 and one token with 4 experts: 52.9 MB, 17.2 us at 3.08 TB/s; all 32 experts of the 20b: 423 MB, 137
// us. Activations are a few hundred KB and stay in L2.
//
// Weights lie as layout.cuh says. Activations are read by ldmatrix, 8 tokens x 32 columns at once.
//
// Macros, from kernels.hopper.experts: HIDDEN and INTER (this rank's shard), multiples of 32; WARPS (8, of a block or
// team); of each projection UP_ and DOWN_ SPLITS and ROW_PITCH; FEW_BLOCKS; TEAMS, TOKEN_TILES, SMALL_PAIRS, SUMS_BYTES.

#include "common/ptx.cuh"
#include "experts/matrix.cuh"
#include "experts/tiles.cuh"

constexpr int THREADS = 32 * WARPS;

// Of the 8 warps of one of two teams; barrier 0 is the block's.
__device__ __forceinline__ void wait_for_team(int team) {
    if (team == 0)
        asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
    else
        asm volatile("bar.sync 2, %0;" ::"n"(THREADS) : "memory");
}

// The partial sums of SPLITS splits, `stride` apart, in their order.
template <int SPLITS, int UNROLL>
__device__ __forceinline__ float4 add_splits(const float4* sums, int stride) {
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll UNROLL
    for (int s = 0; s < SPLITS; s++) {
        const float4 sum = sums[s * stride];
        total.x += sum.x, total.y += sum.y, total.z += sum.z, total.w += sum.w;
    }
    return total;
}

// --- Few tokens: at most 8, and 32 pairs -----------------------------------------------------------------------------
// The work is a list: for each distinct expert among the pairs, its strips, in groups of GROUPS. A block takes one run
// of it: all blocks are resident at once, start once and stream equally much. The splits of K are spread over its
// warps, each of which has its next strip's tiles in flight while it multiplies this one's: 3 KB, so 76 KB a
// multiprocessor with three blocks, as many as 80 registers and up to 58 KB of shared memory allow. A lane knows one
// pair: warps find experts among their lanes, each for itself, since a run is only some strips long.
//
// `down` asks for its first strips before `up` has ended, as its blocks take the places of `up`'s one by one.

template <class M, bool UP>
__device__ __forceinline__ void few_tokens(const bf16* source, bf16* out, const uint4* values, const unsigned* scales,
                                           const bf16* bias, const long long* ids, const float* weights, int pairs,
                                           int top_k, float limit) {
    constexpr int PITCH = M::ROW_PITCH, PIECES = M::TILES * 8;
    extern __shared__ __align__(16) unsigned char rows[];  // UP: [tokens][PITCH]. DOWN: [pairs of an expert][PITCH]
    __shared__ float4 partial[2][WARPS][32];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int split = warp % M::SPLITS, group = warp / M::SPLITS, tiles = opaque(M::tiles_of(split));

    // The router has ended and its ids are visible when this returns. `down` starts once every block of `up` is past
    // it, and so may read the ids, and weights, before it waits for `up` to end.
    if constexpr (UP) griddep_wait();
    griddep_launch_dependents();
    const int id = lane < pairs ? (int)__ldcg(ids + lane) : -1;
    const float weight_of_pair = !UP && lane < pairs ? __ldcg(weights + lane) : 0.0f;
    const unsigned same = __match_any_sync(ALL_LANES, id);  // the pairs of this lane's expert
    unsigned left = __ballot_sync(ALL_LANES, id >= 0 && (same & ((1u << lane) - 1)) == 0);  // first pair of each expert
    const unsigned work = __popc(left) * M::STRIP_GROUPS;
    int item = blockIdx.x * work / gridDim.x;
    const int end = (blockIdx.x + 1) * work / gridDim.x;
    if (item == end) return;
    int at = item % M::STRIP_GROUPS;  // group of strips
    for (int skip = item / M::STRIP_GROUPS; skip > 0; skip--) left &= left - 1;
    int expert = __shfl_sync(ALL_LANES, id, __ffs(left) - 1);

    uint4 value[M::DEPTH];
    unsigned scale[M::DEPTH];  // rows g and g + 8 in the tile's first block of columns, then in the second
    const uint4* value_at;
    const unsigned* scale_at;
    const auto aim = [&](int expert, int at) {  // past the end: the last strip's
        const unsigned tile = M::tile(expert, min(at * M::GROUPS + group, M::STRIPS - 1), split);
        value_at = values + value_piece(tile) + lane;
        scale_at = scales + scale_word(tile) + g;
    };
    const auto load = [&](int j) {
        value[j] = ld_weight(value_at + j * 32);
        scale[j] = ld_weight_u32(scale_at + j * 8);
    };
    aim(expert, at);
#pragma unroll
    for (int j = 0; j < M::DEPTH; j++)
        if (j < tiles) load(j);

    const auto stage = [&](int to, int from) {
        for (int piece = thread; piece < PIECES; piece += THREADS) {
            const bool inside = piece * 8 < M::K;  // zeros past the last column
            cp_async(shared_address(rows + to * PITCH + piece * 16),
                     source + (size_t)from * M::K + (inside ? piece * 8 : 0), inside);
        }
    };
    if constexpr (UP) {
        for (int token = 0; token * top_k < pairs; token++) stage(token, token);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
    } else {
        griddep_wait();  // `up` has ended, h is visible
    }
    for (int turn = 0; item < end;) {
        // The expert's pairs: lane l knows the (l % 8)-th; past the last one, the first: its products are not used.
        unsigned others = __shfl_sync(ALL_LANES, same, __ffs(left) - 1);
        const int live = __popc(others);
        int pair = __ffs(others) - 1;
        for (int i = 1; i < live; i++) {
            others &= others - 1;
            if (lane % 8 == i) pair = __ffs(others) - 1;
        }
        if constexpr (!UP) {  // every warp is past the last turn's barrier, and reads the last expert's rows no more
            for (int i = 0; i < live; i++) stage(i, __shfl_sync(ALL_LANES, pair, i));
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads();
        }
        const int row = UP ? pair / top_k : lane % 8 < live ? lane % 8 : 0;
        const unsigned activations = shared_address(rows) + row * PITCH + lane / 8 * 16 + M::first_of(split) * 128;
        const int until = min(end, item + M::STRIP_GROUPS - at);
        left &= left - 1;
        const int next_expert = __shfl_sync(ALL_LANES, id, left != 0 ? __ffs(left) - 1 : 0);
#pragma unroll 1
        for (; item < until; item++, at++, turn++) {
            const bool more = item + 1 < end;
            if (item + 1 < until)
                aim(expert, at + 1);
            else if (more)
                aim(next_expert, 0);
            const int job = (warp + turn) % WARPS, strip = at * M::GROUPS + job;  // which warps add up
            const bool busy = job < M::GROUPS && strip < M::STRIPS;
            unsigned biases = 0;  // asked for well before they are needed
            if (busy) biases = biases_of<M, UP>(bias, expert, strip, g);
            float sum[1][4] = {};
#pragma unroll
            for (int j = 0; j < M::DEPTH; j++) {
                if (j >= tiles) break;
                multiply_tile<1, PITCH>(sum, value[j], scale[j], activations + j * 128);
                if (more) load(j);
            }
            partial[turn % 2][warp][lane] = make_float4(sum[0][0], sum[0][1], sum[0][2], sum[0][3]);
            __syncthreads();  // the other half of `partial` has been read, too, by every warp that is here
            if (busy) {
                const float4 total = add_splits<M::SPLITS, M::SPLITS>(&partial[turn % 2][job * M::SPLITS][lane], 32);
                int pair_of[2];
                float weight[2];
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const int of_token = __shfl_sync(ALL_LANES, pair, 2 * t + c);
                    weight[c] = __shfl_sync(ALL_LANES, weight_of_pair, of_token);
                    pair_of[c] = 2 * t + c < live ? of_token : -1;
                }
                finish<UP>(total, strip, g, pair_of, weight, biases, limit, out);
            }
        }
        at = 0, expert = next_expert;
    }
}

#define FEW_TOKENS(NAME, MATRIX, UP)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, FEW_BLOCKS)                                                  \
        NAME(const bf16* source, bf16* out, const uint4* values, const unsigned* scales, const bf16* bias,             \
             const long long* ids, const float* weights, int pairs, int top_k, float limit) {                          \
        griddep_wait_first();                                                                                          \
        few_tokens<MATRIX, UP>(source, out, values, scales, bias, ids, weights, pairs, top_k, limit);                  \
    }
FEW_TOKENS(experts_up_few, Up, true)
FEW_TOKENS(experts_down_few, Down, false)

// --- Small batches: at most 256 pairs --------------------------------------------------------------------------------
// As above, with 128 registers x 512 threads, one block a multiprocessor: 24 pairs of an expert at once, 139 KB, and 48
// KB of sums. Two teams of 8 warps take turns in a block's run, which is long: 87 strips when all 32 experts are
// chosen. One copy of the activations serves both; where a run goes on with the next expert it changes, while weights
// keep arriving.

// The index of the n-th set bit (from 0) of 32 words, lane i holding the i-th; -1 if there are not so many.
__device__ __forceinline__ int nth_set_bit(unsigned word, int n, int lane) {
    const int count = __popc(word);
    int end = count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(ALL_LANES, end, step);
        if (lane >= step) end += below;
    }
    const bool here = n >= end - count && n < end;
    for (int skip = end - count; here && skip < n; skip++) word &= word - 1;
    const unsigned owner = __ballot_sync(ALL_LANES, here);
    if (owner == 0) return -1;
    return __shfl_sync(ALL_LANES, lane * 32 + __ffs(word) - 1, __ffs(owner) - 1);
}

template <int N>
struct Number {
    static constexpr int value = N;
};

// A block's run of groups of strips, numbered over all chosen experts; a team takes every TEAMS-th.
struct SmallRun {
    int end;
    int item;  // the team's next: its first tiles are in flight
    int turn;  // groups done; also which half of the team's sums is free, and which warps add up
};

// The pairs of an expert that are in shared memory.
struct SmallPairs {
    const int* pair;         // ascending
    const float* weight_of;  // of every pair of the batch
    unsigned rows;           // what this lane names to ldmatrix for the first of them and the split's first tile
    int live;
    bool again;  // the same strips are needed once more, for more pairs
};

// The strips of an expert, until `until`, for up to 8 N_TILES pairs. n: the expert's number among the chosen ones.
template <class M, bool UP, int N_TILES>
__device__ __forceinline__ void small_run(SmallRun& run, Stream<M>& stream, const SmallPairs& pairs, float4* sums,
                                          int tiles, int n, int expert, int until, unsigned chosen, const bf16* bias,
                                          float limit, bf16* out) {
    constexpr int JOBS = M::GROUPS * N_TILES, HALF = SUMS_BYTES / (2 * TEAMS * sizeof(float4));
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int team = warp / WARPS, in_team = warp % WARPS, split = in_team % M::SPLITS, group = in_team / M::SPLITS;
#pragma unroll 1
    for (int at = run.item; at < until; at += TEAMS, run.turn++) {
        const int next = at + TEAMS >= until && pairs.again ? run.item : at + TEAMS, next_n = next / M::STRIP_GROUPS;
        const bool more = next < run.end;
        stream.aim(more && next_n != n ? nth_set_bit(chosen, next_n, lane) : expert,
                   (next - next_n * M::STRIP_GROUPS) * M::GROUPS + group, split);
        const int first_strip = (at - n * M::STRIP_GROUPS) * M::GROUPS;
        const int first_job = (in_team + run.turn) % WARPS;
        unsigned biases = 0;  // asked for well before they are needed
        if (first_job < JOBS && first_strip + first_job / N_TILES < M::STRIPS)
            biases = biases_of<M, UP>(bias, expert, first_strip + first_job / N_TILES, g);
        float sum[N_TILES][4] = {};
#pragma unroll
        for (int j = 0; j < M::DEPTH; j++) {
            if (j >= tiles) break;
            multiply_tile<N_TILES, M::ROW_PITCH>(sum, stream.value[j], stream.scale[j], pairs.rows + j * 128);
            if (more) stream.load(j);
        }
        float4* const now = sums + run.turn % 2 * HALF;
#pragma unroll
        for (int i = 0; i < N_TILES; i++)
            now[(in_team * N_TILES + i) * 32 + lane] = make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
        wait_for_team(team);  // every warp that is here has read the other half of `sums`, too
#pragma unroll 1
        for (int job = first_job; job < JOBS; job += WARPS) {
            const int of_group = job / N_TILES, i = job % N_TILES, strip = first_strip + of_group;
            if (i * 8 >= pairs.live || strip >= M::STRIPS) continue;
            if (job != first_job) biases = biases_of<M, UP>(bias, expert, strip, g);
            const float4 total =
                add_splits<M::SPLITS, 2>(now + (of_group * M::SPLITS * N_TILES + i) * 32 + lane, N_TILES * 32);
            const int token = i * 8 + 2 * t;
            const int pair[2] = {token < pairs.live ? pairs.pair[token] : -1,
                                 token + 1 < pairs.live ? pairs.pair[token + 1] : -1};
            float weight[2] = {};
#pragma unroll
            for (int c = 0; c < 2; c++)
                if (!UP && pair[c] >= 0) weight[c] = pairs.weight_of[pair[c]];
            finish<UP>(total, strip, g, pair, weight, biases, limit, out);
        }
    }
}

// capacity: rows of activations in shared memory, at most 8 TOKEN_TILES. Reads of rows past them end in the sums.
template <class M, bool UP>
__device__ __forceinline__ void small_batch(const bf16* source, bf16* out, const uint4* values, const unsigned* scales,
                                            const bf16* bias, const long long* ids, const float* weights, int pairs,
                                            int top_k, int capacity, float limit) {
    static_assert(TEAMS == 2 && TOKEN_TILES == 3, "the barriers and the numbers of token tiles below");
    static_assert(SUMS_BYTES == 2 * TEAMS * WARPS * TOKEN_TILES * 32 * sizeof(float4), "two turns of each team");
    constexpr int PITCH = M::ROW_PITCH;
    extern __shared__ __align__(16) unsigned char shared[];
    unsigned char* const rows = shared;  // [capacity][PITCH]
    __shared__ unsigned chosen[32];      // a bit for each expert
    __shared__ unsigned votes[WARPS];    // of each warp's pairs, those of this expert
    __shared__ int expert_of[SMALL_PAIRS];
    __shared__ int pair_of[SMALL_PAIRS];      // the expert's pairs, ascending
    __shared__ float weight_of[SMALL_PAIRS];  // of every pair
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int team = warp / WARPS, in_team = warp % WARPS;
    const int split = in_team % M::SPLITS, group = in_team / M::SPLITS, tiles = opaque(M::tiles_of(split));
    float4* const sums =
        reinterpret_cast<float4*>(shared + capacity * PITCH) + team * (SUMS_BYTES / TEAMS / sizeof(float4));

    if (thread < 32) chosen[thread] = 0;
    __syncthreads();
    if constexpr (UP) griddep_wait();  // and `down` may read ids before it waits: see few_tokens
    griddep_launch_dependents();
    if (thread < pairs) {
        const int id = (int)__ldcg(ids + thread);
        if (!UP) weight_of[thread] = __ldcg(weights + thread);
        expert_of[thread] = id;
        atomicOr(&chosen[id / 32], 1u << (id % 32));
    }
    __syncthreads();
    const unsigned work = __reduce_add_sync(ALL_LANES, __popc(chosen[lane])) * M::STRIP_GROUPS;
    const int begin = blockIdx.x * work / gridDim.x, end = (blockIdx.x + 1) * work / gridDim.x;
    if (begin == end) return;

    Stream<M> stream(values, scales);
    SmallRun run = {end, begin + team, 0};
    if (run.item < end) {
        const int n = run.item / M::STRIP_GROUPS;
        stream.aim(nth_set_bit(chosen[lane], n, lane), (run.item - n * M::STRIP_GROUPS) * M::GROUPS + group, split);
        stream.load_all(M::tiles_of(split));
    }
    for (int n = begin / M::STRIP_GROUPS; n * M::STRIP_GROUPS < end; n++) {
        const int expert = nth_set_bit(chosen[lane], n, lane), until = min((n + 1) * M::STRIP_GROUPS, end);
        const bool mine = thread < pairs && expert_of[thread] == expert;
        const unsigned vote = __ballot_sync(ALL_LANES, mine);
        __syncthreads();  // the last expert's votes and pairs have been read
        if (lane == 0 && warp < WARPS) votes[warp] = vote;
        __syncthreads();
        int count = 0, rank = __popc(vote & ((1u << lane) - 1));
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const int of_warp = __popc(votes[w]);
            count += of_warp;
            rank += w < warp ? of_warp : 0;
        }
        if (mine) pair_of[rank] = thread;
        if (!UP && n == begin / M::STRIP_GROUPS) griddep_wait();  // `up` has ended, h is visible

        for (int base = 0; base < count; base += capacity) {
            const int live = min(count - base, capacity);
            __syncthreads();  // pair_of is written, and `rows` have been read
            stage<M, UP, M::TILES, PITCH, TEAMS * THREADS>(rows, source, pair_of + base, live, top_k, 0);
            cp_async_commit();
            cp_async_wait<0>();
            __syncthreads();
            const unsigned lane_rows = matrix_address<PITCH>(rows, capacity - 1) + M::first_of(split) * 128;
            const SmallPairs in_rows = {pair_of + base, weight_of, lane_rows, live, base + capacity < count};
            const auto run_with = [&](auto number) {
                small_run<M, UP, decltype(number)::value>(run, stream, in_rows, sums, tiles, n, expert, until,
                                                          chosen[lane], bias, limit, out);
            };
            if (live <= 8)
                run_with(Number<1>());
            else if (live <= 16)
                run_with(Number<2>());
            else
                run_with(Number<3>());
        }
        while (run.item < until) run.item += TEAMS;
    }
}

#define SMALL_BATCH(NAME, MATRIX, UP)                                                                                  \
    extern "C" __global__ void __launch_bounds__(TEAMS* THREADS, 1)                                                    \
        NAME(const bf16* source, bf16* out, const uint4* values, const unsigned* scales, const bf16* bias,             \
             const long long* ids, const float* weights, int pairs, int top_k, int capacity, float limit) {            \
        griddep_wait_first();                                                                                          \
        small_batch<MATRIX, UP>(source, out, values, scales, bias, ids, weights, pairs, top_k, capacity, limit);       \
    }
SMALL_BATCH(experts_up_small, Up, true)
SMALL_BATCH(experts_down_small, Down, false)
