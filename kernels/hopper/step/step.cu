// What begins and ends a step, over the state by slot: two kernels in place of two dozen of torch's.
//
// advance: a thread a row: note the page that begins here, take the slot's last token. emit: a warp a row: the drawn
// token becomes the slot's input and is counted; token, log probabilities and the likeliest go to the packed outputs.
// A few hundred bytes a row: latency is all, 1 to 2 us.

namespace {

constexpr int PAGE = 64;

__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace

extern "C" __global__ void __launch_bounds__(128) advance(
    const int* slots, const int* positions, const int* new_pages, int* page_table, const int* last_token, int* tokens,
    int* following, int rows, int width) {
    let_next_start();
    wait_for_previous();
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    const int slot = slots[row], position = positions[row], page = new_pages[row];
    if (page >= 0) page_table[static_cast<long long>(slot) * width + position / PAGE] = page;
    tokens[row] = last_token[slot];
    following[row] = position + 1;
}

extern "C" __global__ void __launch_bounds__(128) emit(
    const int* slots, const int* tokens, const int* logprobs, const int* top_ids, const int* top_logprobs,
    int* last_token, int* output_counts, int* outputs, int rows, int top, int vocab, int width) {
    let_next_start();
    wait_for_previous();
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    int* const out = outputs + row * width;
    if (lane == 0) {
        const int slot = slots[row], token = tokens[row];
        last_token[slot] = token;
        atomicAdd(output_counts + static_cast<long long>(slot) * vocab + token, 1);  // spare rows share a slot
        out[0] = token;
        out[1] = logprobs[row];
    }
    for (int i = lane; i < top; i += 32) {
        out[2 + i] = top_ids[row * top + i];
        out[width / 2 + 1 + i] = top_logprobs[row * top + i];
    }
}
