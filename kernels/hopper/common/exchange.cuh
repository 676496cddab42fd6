// What the ranks of a tensor-parallel group send each other: words written into areas of each other's memory.
//
// There are no flags. Every word of an area is EMPTY until another rank has written it, none that is sent has that
// value, and the reader makes it EMPTY again. Two areas take turns, one for the sum after attention, one for that after
// the experts; the sampler has a third and the scorer a fourth. A rank writes to an area again only after an exchange through another one,
// to which its peers contributed after their kernels that read and emptied the first had ended: so nothing counts
// steps, and buckets may follow each other in any order.
//
// Words: unsigned (two bf16), uint4 (eight), unsigned long long (the sampler's and the scorer's). The macro RANKS is the group's size.
#pragma once

#include "common/ptx.cuh"

#ifndef RANKS
#error "RANKS: that share the model"
#endif

// Of bf16 pairs: two NaNs that no rounding makes.
__device__ __forceinline__ bool has_come(unsigned long long word) { return word != ~0ull; }

__device__ __forceinline__ bool has_come(uint4 word) {
    return word.x != ~0u && word.y != ~0u && word.z != ~0u && word.w != ~0u;
}

__device__ __forceinline__ void make_empty(unsigned long long& word) { word = ~0ull; }

__device__ __forceinline__ void make_empty(uint4& word) { word = make_uint4(~0u, ~0u, ~0u, ~0u); }

// What is sent for a word that may have any value: never the empty one, but the next below.
__device__ __forceinline__ unsigned long long not_empty(unsigned long long word) { return min(word, ~0ull - 1); }

// The rank that is number `other` of all ranks but `rank`.
__device__ __forceinline__ int other_rank(int other, int rank) { return other < rank ? other : other + 1; }

// The other ranks' areas, in their order, for sending.
struct OtherAreas {
    char* at[RANKS];  // RANKS - 1 of them

    // `memories` holds addresses that never change: this may run before griddep_wait. offset: bytes.
    __device__ __forceinline__ void find(int other, const unsigned long long* memories, int offset, int rank) {
        at[other] = reinterpret_cast<char*>(memories[other_rank(other, rank)] + offset);
    }
    template <typename Word>
    __device__ __forceinline__ void send(int other, size_t bytes, Word word) const {
        st_relaxed_sys(reinterpret_cast<Word*>(at[other] + bytes), word);
    }
    template <typename Word>
    __device__ __forceinline__ void send_all(size_t bytes, Word word) const {
#pragma unroll
        for (int other = 0; other < RANKS - 1; ++other) send(other, bytes, word);
    }
};

// An area of every rank's memory as this rank sees it. Places count in words.
template <typename Word>
struct Area {
    int rank;
    Word* own;
    OtherAreas others;

    Area() = default;
    // own_place, others_place: words from the area's beginning that places count from.
    __device__ __forceinline__ Area(const unsigned long long* memories, int offset, int own_rank, size_t own_place = 0,
                                    size_t others_place = 0)
        : rank(own_rank) {
        if (RANKS == 1) return;
        own = reinterpret_cast<Word*>(memories[rank] + offset) + own_place;
#pragma unroll
        for (int other = 0; other < RANKS - 1; ++other) {
            others.find(other, memories, offset, rank);
            others.at[other] += others_place * sizeof(Word);
        }
    }
    __device__ __forceinline__ int rank_of(int other) const { return other_rank(other, rank); }
    __device__ __forceinline__ void send(int other, size_t place, Word word) const {
        others.send(other, place * sizeof(Word), word);
    }
    __device__ __forceinline__ void send_all(size_t place, Word word) const {
        others.send_all(place * sizeof(Word), word);
    }
    __device__ __forceinline__ Word look(size_t place) const { return ld_relaxed_sys(own + place); }
    __device__ __forceinline__ Word wait(size_t place) const {
        Word word = look(place);
        while (!has_come(word)) word = look(place);
        return word;
    }
    __device__ __forceinline__ void empty(size_t place) const { make_empty(own[place]); }
};
