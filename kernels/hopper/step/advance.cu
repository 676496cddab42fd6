// The start of a decode step, over the state by slot: a kernel in place of a dozen of torch's.
//
// A thread a row: note the page that begins here, take the slot's last token. A few hundred bytes a row: latency is all,
// 1 to 2 us. Macros: PAGE, tokens of a page; THREADS of a block.

#include "common/ptx.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    advance(const int* slots, const int* positions, const int* new_pages, int* page_table, const int* last_token,
            int* tokens, int* next_positions, int rows, int table_width) {
    griddep_wait_first();
    griddep_launch_dependents();
    griddep_wait();
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    const int slot = slots[row], position = positions[row], page = new_pages[row];
    if (page >= 0) page_table[static_cast<long long>(slot) * table_width + position / PAGE] = page;
    tokens[row] = last_token[slot];
    next_positions[row] = position + 1;
}
