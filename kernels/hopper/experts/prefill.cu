// The MXFP4 experts of a prefill step, by the pipeline of common/product.cuh:
//
//   prefill_experts_up     h [pairs, INTER]  = swiglu(x[token] . gate_up[expert] + bias)         x [T, HIDDEN]
//   prefill_experts_down   y [pairs, HIDDEN] = weight[pair] * (h[pair] . down[expert] + bias)
//
// A pair is (token, choice), pair = token * top_k + choice; experts/group.cu sorts them by expert. The weights are
// those of the decode kernels (layout.cuh): a few integer operations make them the A operand. bf16 in and out, float32
// inside.
//
// Macros: HIDDEN and INTER (this rank's shard), and those of common/product.cuh.

#include "common/mxfp4.cuh"
#include "common/product.cuh"
#include "common/ptx.cuh"
#include "experts/layout.cuh"
#include "experts/swiglu.cuh"

// A warp's weights, AHEAD turns of them under way: a tile a turn.
template <int TURNS, int AHEAD>
struct ExpertWeights {
    const uint4* values;
    const unsigned* scales;
    uint4 value[AHEAD];
    unsigned scale[AHEAD];

    __device__ __forceinline__ ExpertWeights(const uint4* expert_values, const unsigned* expert_scales, int strip)
        : values(expert_values + value_piece((size_t)strip * TURNS) + threadIdx.x % 32),
          scales(expert_scales + scale_word((size_t)strip * TURNS) + threadIdx.x % 32 / 4) {}

    __device__ __forceinline__ void load(int turn, int place) {
        value[place] = ld_weight_nc(values + turn * 32);
        scale[place] = ld_weight_nc_u32(scales + turn * 8);
    }

    __device__ __forceinline__ void operand(int turn, int place, unsigned (&a)[16]) {
        const unsigned s = scale[place];
        const unsigned low[2] = {multiplier_of(s, 0, 0), multiplier_of(s, 1, 0)};
        const unsigned high[2] = {multiplier_of(s, 0, 1), multiplier_of(s, 1, 1)};
        dequantize(value[place].x, low[0], high[0], a);
        dequantize(value[place].y, low[0], high[0], a + 4);
        dequantize(value[place].z, low[1], high[1], a + 8);
        dequantize(value[place].w, low[1], high[1], a + 12);
        if (turn + AHEAD < TURNS) load(turn + AHEAD, place);
    }
};

template <bool UP, int COLUMNS>
struct ExpertLayer {
    static constexpr int K = COLUMNS, OUT_COLUMNS = UP ? 32 : 64, TURNS = (K + DEPTH - 1) / DEPTH;
    static constexpr bool WEIGHTED = !UP;
    template <int N>
    static constexpr int AHEAD = N <= 64 ? 4 : 2;

    const uint4* values;  // of all experts, as are scales and bias
    const unsigned* scales;
    const bf16 *bias, *source;
    bf16* out;
    const int4* tiles;             // (expert, first place in order, pairs, 0), as experts_group makes them
    const int* order;              // pairs by expert
    const float* routing_weights;  // [pairs]
    int rows, top_k;
    float limit;

    __device__ __forceinline__ void find(Item& item, int tile) const {
        const int4 of_expert = __ldcg(tiles + tile);
        item.expert = of_expert.x, item.first = of_expert.y, item.live = of_expert.z;
    }
    __device__ __forceinline__ int row_of(const Item& item, int token) const {
        return token < item.live ? __ldcg(order + item.first + token) : 0;
    }
    __device__ __forceinline__ int source_row(int row) const { return UP ? row / top_k : row; }
    __device__ __forceinline__ float weight_of(int row) const { return __ldcg(routing_weights + row); }
    __device__ __forceinline__ int out_width() const { return UP ? rows / 2 : rows; }

    template <int AHEAD>
    __device__ __forceinline__ ExpertWeights<TURNS, AHEAD> weights(int expert, int strip) const {
        const int strips = (rows + 15) / 16;
        const size_t expert_strips = (size_t)expert * strips;
        return ExpertWeights<TURNS, AHEAD>(values + value_piece(expert_strips * TURNS),
                                           scales + scale_word(expert_strips * TURNS),
                                           min(strip, strips - 1));  // past the end: sums that are not stored
    }
    static __device__ __forceinline__ int bias_row(int strip, int g, int half) {
        return strip * STRIP_ROWS + row_in_strip<UP>(g, half);
    }
    __device__ __forceinline__ void finish(bf16* at, float low, float high, float bias_low, float bias_high,
                                           float weight) const {
        low = fmaf(low, DEFERRED_SCALE, bias_low), high = fmaf(high, DEFERRED_SCALE, bias_high);
        if (UP) {
            at[0] = round_bf16(swiglu(low, high, limit));
        } else {
            at[0] = round_bf16(weight * low), at[8] = round_bf16(weight * high);
        }
    }
};

#define PREFILL_EXPERTS(NAME, UP, COLUMNS)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                           \
        NAME(const uint4* values, const unsigned* scales, const bf16* bias, const bf16* source, bf16* out,             \
             const int4* tiles, const int* order, const float* routing_weights, int rows, int top_k, int tile_count,   \
             float limit) {                                                                                            \
        griddep_wait_first();                                                                                          \
        griddep_launch_dependents();                                                                                   \
        griddep_wait();                                                                                                \
        multiply_tiles(ExpertLayer<UP, COLUMNS>{values, scales, bias, source, out, tiles, order, routing_weights,      \
                                                rows, top_k, limit},                                                   \
                       tile_count);                                                                                    \
    }
PREFILL_EXPERTS(prefill_experts_up, true, HIDDEN)
PREFILL_EXPERTS(prefill_experts_down, false, INTER)
