// Dense layers of a prefill step: out [T, rows] = x [T, COLUMNS] * weight [rows, COLUMNS]^T + bias, by the pipeline of
// common/product.cuh. The weights are those of the decode kernels. bf16 in and out, float32 inside.
//
// Macros: COLUMNS, and those of common/product.cuh.

#include "common/product.cuh"
#include "common/ptx.cuh"

// A warp's weights, AHEAD turns of them under way: [strip of 16 rows][step of 32 columns][2 fragments][32 lanes] of 16
// bytes.
template <int AHEAD>
struct DenseWeights {
    static constexpr int STEPS = COLUMNS / 32, TURNS = (COLUMNS + DEPTH - 1) / DEPTH;
    const uint4* strip_at;
    uint4 next[AHEAD][4];

    __device__ __forceinline__ DenseWeights(const uint4* weight, int strip)
        : strip_at(weight + (size_t)strip * (STEPS * 64) + threadIdx.x % 32) {}

    __device__ __forceinline__ void load(int turn, int place) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // past the end, the last step again: its tokens are zeros
            const int step = COLUMNS % DEPTH == 0 ? turn * 2 + i / 2 : min(turn * 2 + i / 2, STEPS - 1);
            next[place][i] = ld_weight_nc(strip_at + (step * 2 + i % 2) * 32);
        }
    }

    __device__ __forceinline__ void operand(int turn, int place, unsigned (&a)[16]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // copies that ptxas keeps: it waits for a product whose operand a load writes
            const uint4 words = next[place][i];
            a[4 * i] = mov(words.x), a[4 * i + 1] = mov(words.y);
            a[4 * i + 2] = mov(words.z), a[4 * i + 3] = mov(words.w);
        }
        if (turn + AHEAD < TURNS) load(turn + AHEAD, place);
    }
};

struct DenseLayer {
    static constexpr int K = COLUMNS, OUT_COLUMNS = 64;
    template <int N>
    static constexpr int AHEAD = N <= 64 ? 2 : 1;

    const uint4* weight;
    const bf16 *bias, *source;
    bf16* out;
    int rows, tokens;

    __device__ __forceinline__ void find(Item& item, int) const { item.live = min(tokens - item.first, TOKENS); }
    __device__ __forceinline__ int row_of(const Item& item, int token) const { return item.first + token; }
    __device__ __forceinline__ int out_width() const { return rows; }

    template <int AHEAD>
    __device__ __forceinline__ DenseWeights<AHEAD> weights(int strip) const {
        return DenseWeights<AHEAD>(weight, min(strip, (rows + 15) / 16 - 1));  // past the end: sums that are not stored
    }
    static __device__ __forceinline__ int bias_row(int strip, int g, int half) { return strip * 16 + g + 8 * half; }
    __device__ __forceinline__ void finish(bf16* at, float low, float high, float bias_low, float bias_high) const {
        at[0] = round_bf16(low + bias_low), at[8] = round_bf16(high + bias_high);
    }
};

// bias may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    prefill_linear(const uint4* weight, const bf16* x, const bf16* bias, bf16* out, int rows, int tokens) {
    griddep_wait_first();
    griddep_launch_dependents();
    griddep_wait();
    multiply_tiles(DenseLayer{weight, bias, x, out, rows, tokens}, (tokens + TOKENS - 1) / TOKENS);
}
