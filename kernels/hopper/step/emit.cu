// The end of a step, over the state by slot: a kernel in place of a dozen of torch's.
//
// A warp a row: the drawn token becomes the slot's input and is counted; token, log probabilities and the likeliest
// tokens go to the packed outputs. A few hundred bytes a row: latency is all, 1 to 2 us. The macro THREADS: of a block.

#include "common/ptx.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    emit(const int* slots, const int* tokens, const int* logprobs, const int* top_ids, const int* top_logprobs,
         int* last_token, int* output_counts, int* outputs, int rows, int top, int vocab, int width) {
    griddep_wait_first();
    griddep_launch_dependents();
    griddep_wait();
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    int* const out = outputs + row * width;
    if (lane == 0) {
        const int slot = slots[row], token = tokens[row];
        last_token[slot] = token;
        atomicAdd(output_counts + static_cast<long long>(slot) * vocab + token, 1);  // padding rows share a slot
        out[0] = token;
        out[1] = logprobs[row];
    }
    for (int i = lane; i < top; i += 32) {
        out[2 + i] = top_ids[row * top + i];
        out[width / 2 + 1 + i] = top_logprobs[row * top + i];
    }
}
