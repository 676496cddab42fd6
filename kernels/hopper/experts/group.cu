// Pairs (token, choice) sorted by expert, for the kernels that take many tokens of an expert at once.
//
// Macros, from kernels.hopper.experts: GROUP_THREADS and MOST_EXPERTS.

#include "common/ptx.cuh"

constexpr int THREADS = GROUP_THREADS, WARPS = THREADS / 32;
constexpr unsigned ALL_LANES = 0xFFFFFFFFu;

static_assert(WARPS == 32, "a lane for each warp");
static_assert(MOST_EXPERTS == THREADS, "each thread clears one expert's count");

// Sort pairs by expert, each expert's in ascending order, and cut them in as few tiles of one expert as tile_pairs, a
// multiple of 16, allows; these are as even as 16 pairs at a time allow, so that no block has a full tile where another
// has a remnant. ids [pairs]; order [pairs]; tiles [max_tiles]: (expert, first place in order, pairs, tiles with
// pairs), all 0 in those left over. Block e looks at every id and writes expert e's pairs and tiles: no block waits for
// another.
extern "C" __global__ void __launch_bounds__(THREADS)
    experts_group(const long long* ids, int* order, int4* tiles, int pairs, int experts, int max_tiles,
                  int tile_pairs) {
    __shared__ int load[MOST_EXPERTS];  // pairs of each expert
    __shared__ int of_warp[WARPS];
    griddep_wait_first();
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, expert = blockIdx.x;
    griddep_launch_dependents();
    load[thread] = 0;
    griddep_wait();
    __syncthreads();
    const int segment = (pairs + THREADS - 1) / THREADS * 32, begin = warp * segment;
    const int end = min(begin + segment, pairs);
    int mine = 0;
    for (int i = begin + lane; i - lane < end; i += 32) {
        const int id = i < end ? (int)__ldcg(ids + i) : -1;
        if (id >= 0) atomicAdd(&load[id], 1);
        mine += __popc(__ballot_sync(ALL_LANES, id == expert));
    }
    if (lane == 0) of_warp[warp] = mine;
    __syncthreads();
    int first = 0, first_tile = 0, all_tiles = 0;
    for (int e = lane; e < experts; e += 32) {
        const int needed = (load[e] + tile_pairs - 1) / tile_pairs;
        all_tiles += needed;
        if (e < expert) first += load[e], first_tile += needed;
    }
    first = __reduce_add_sync(ALL_LANES, first);
    first_tile = __reduce_add_sync(ALL_LANES, first_tile);
    all_tiles = __reduce_add_sync(ALL_LANES, all_tiles);
    int place = first + __reduce_add_sync(ALL_LANES, lane < warp ? of_warp[lane] : 0);
    for (int i = begin + lane; i - lane < end; i += 32) {
        const bool match = i < end && (int)__ldcg(ids + i) == expert;
        const unsigned vote = __ballot_sync(ALL_LANES, match);
        if (match) order[place + __popc(vote & ((1u << lane) - 1))] = i;
        place += __popc(vote);
    }
    const int units = (load[expert] + 15) / 16, count = (load[expert] + tile_pairs - 1) / tile_pairs;
    for (int i = thread; i < count; i += THREADS) {
        const int each = units / count, more = units % count;  // the first `more` tiles have a unit more
        const int at = (i * each + min(i, more)) * 16;
        tiles[first_tile + i] =
            make_int4(expert, first + at, min((each + (i < more)) * 16, load[expert] - at), all_tiles);
    }
    if (expert == experts - 1)
        for (int i = all_tiles + thread; i < max_tiles; i += THREADS) tiles[i] = make_int4(0, 0, 0, 0);
}
