// How decode cuts the keys that a token sees into KV splits. Index arithmetic alone, which tests compile for the host.
//
// A split is a run of WARPS, 2 WARPS, 4 WARPS ... whole pages, the shortest of which a token needs no more than
// MOST_SPLITS. It depends on the token's own position and on the window, so a token's bytes do not depend on the batch.
#pragma once

#include "attention/layout.cuh"

constexpr int log2_of(int power) { return power == 1 ? 0 : 1 + log2_of(power / 2); }

constexpr int LOG_WARPS = log2_of(WARPS);
static_assert(1 << LOG_WARPS == WARPS, "splits are shifted, not divided");

// The keys a token sees, and how they are cut.
struct Keys {
    int first, last;  // the keys themselves, by position
    int first_page;   // entry of the page table row
    int pages;        // entries from there
    int log_split;    // of the pages in a split
    int splits;

    LAYOUT Keys(int position, int window) {
        first = max(position - window + 1, 0);
        last = position;
        first_page = first / PAGE;
        pages = position / PAGE - first_page + 1;
        log_split = LOG_WARPS;
        while (MOST_SPLITS << log_split < pages) log_split++;
        splits = (pages + (1 << log_split) - 1) >> log_split;
    }

    // A warp's pages of a split are every WARPS-th from here on, counted from first_page,
    LAYOUT int first_of(int split, int warp) const { return (split << log_split) + warp; }
    // and so many: 0 to 32.
    LAYOUT int count_of(int split, int warp) const {
        return (min((split + 1) << log_split, pages) - first_of(split, warp) + WARPS - 1) / WARPS;
    }
};
