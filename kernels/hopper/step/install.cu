// The start of a prefill step, over the state by slot: a kernel in place of fifty of torch's.
//
// PARTS blocks a chunk share its page table row and its sampling parameters: a few KB, latency is all. Where the chunk
// has penalties, each also has a part of the vocabulary: it clears the counts of a new request there, 5 bytes a token id,
// and counts those of the chunk's tokens that fall into it. So no block waits for another.
//
// Macros: THREADS of a block; PARTS; BIAS_ENTRIES, of a row of sampling parameters.

#include "common/ptx.cuh"
#include "sampler/penalties.cuh"

namespace {

// A sampling parameter's words, as they come by chunk and as they stand by slot.
struct Field {
    const int* given;
    int* state;
    int columns;
};

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS)
    install(const int* slots, const int* starts, const int* last, const int* given_table, const int* given_temperature,
            const int* given_top_k, const int* given_top_p, const int* given_min_p, const int* given_repetition,
            const int* given_frequency, const int* given_presence, const int* given_seed,
            const int* given_prompt_tokens, const int* given_bias_ids, const int* given_bias_values,
            const int* given_bias_until, const int* given_logprobs, const int* tokens, const int* positions, int* table,
            int* temperature, int* top_k, int* top_p, int* min_p, int* repetition, int* frequency, int* presence,
            int* seed, int* prompt_tokens, int* bias_ids, int* bias_values, int* bias_until, int* logprobs,
            int* output_counts, unsigned char* in_prompt, int* next_positions, int table_width, int vocab) {
    griddep_wait_first();
    griddep_launch_dependents();
    griddep_wait();
    const Field fields[] = {{given_temperature, temperature, 1},
                            {given_top_k, top_k, 1},
                            {given_top_p, top_p, 1},
                            {given_min_p, min_p, 1},
                            {given_repetition, repetition, 1},
                            {given_frequency, frequency, 1},
                            {given_presence, presence, 1},
                            {given_seed, seed, 2},
                            {given_prompt_tokens, prompt_tokens, 1},
                            {given_bias_ids, bias_ids, BIAS_ENTRIES},
                            {given_bias_values, bias_values, BIAS_ENTRIES},
                            {given_bias_until, bias_until, BIAS_ENTRIES},
                            {given_logprobs, logprobs, 1}};
    constexpr int FIELDS = sizeof(fields) / sizeof(Field);
    const int part = blockIdx.x, chunk = blockIdx.y, thread = threadIdx.x;
    const int slot = slots[chunk], start = starts[chunk], end = last[chunk], end_position = positions[end];
#pragma unroll
    for (int i = 0; i < FIELDS; ++i)
        if (i % PARTS == part)
            for (int at = thread; at < fields[i].columns; at += THREADS)
                fields[i].state[slot * fields[i].columns + at] = fields[i].given[chunk * fields[i].columns + at];
    for (int at = part * THREADS + thread; at < table_width; at += PARTS * THREADS)
        table[size_t(slot) * table_width + at] = given_table[size_t(chunk) * table_width + at];
    if (part == 0 && thread == 0) next_positions[chunk] = end_position + 1;
    if (!has_penalties(__int_as_float(given_repetition[chunk]), __int_as_float(given_frequency[chunk]),
                       __int_as_float(given_presence[chunk])))
        return;
    const int each = (vocab + PARTS - 1) / PARTS, first_id = part * each, past_id = min(first_id + each, vocab);
    int* const output_of = output_counts + size_t(slot) * vocab;
    unsigned char* const in_prompt_of = in_prompt + size_t(slot) * vocab;
    if (start == 0) {
        for (int id = first_id + thread; id < past_id; id += THREADS) output_of[id] = in_prompt_of[id] = 0;
        __syncthreads();
    }
    const int begin = end - (end_position - start), prompt_end = given_prompt_tokens[chunk];
    for (int at = begin + thread; at <= end; at += THREADS) {
        const int id = tokens[at];
        if (id < first_id || id >= past_id) continue;
        if (start + at - begin < prompt_end)
            in_prompt_of[id] = 1;
        else
            atomicAdd(output_of + id, 1);
    }
}
