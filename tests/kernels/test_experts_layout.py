"""The packed layout of the experts' weights, read on the CPU by the kernels' own index functions and bit operations."""

import ctypes

import pytest
import torch

from kernels import reference
from kernels.hopper.experts import MAX_SCALE, cut_of, decode_defines, pack
from tests.kernels.host import compile_for_host

SHAPES = [(32, 64), (64, 96), (192, 160), (320, 2880)]
CODE = """
#define mul_bf16x2_low mul_bf16x2_low_in_ptx
#define mul_bf16x2_high mul_bf16x2_high_in_ptx
#include "common/ptx.cuh"
#undef mul_bf16x2_low
#undef mul_bf16x2_high
inline unsigned times(unsigned a, unsigned b) {  // b: a float; exact, since the products of dequantize are bf16 values
    const unsigned low = __float_as_uint(__uint_as_float(a << 16) * __uint_as_float(b));
    const unsigned high = __float_as_uint(__uint_as_float(a & 0xFFFF0000u) * __uint_as_float(b));
    return low >> 16 | (high & 0xFFFF0000u);
}
inline unsigned mul_bf16x2_low(unsigned a, unsigned b) { return times(a, b << 16); }
inline unsigned mul_bf16x2_high(unsigned a, unsigned b) { return times(a, b & 0xFFFF0000u); }
#include "common/mxfp4.cuh"
#include "experts/matrix.cuh"

// The A fragments that each lane makes of the tiles of a whole weight: [tiles, 32 lanes, 4 steps, 4 registers].
extern "C" void fragments(const unsigned* values, const unsigned* scales, int tiles, unsigned* a) {
    for (int tile = 0; tile < tiles; ++tile)
        for (int lane = 0; lane < 32; ++lane) {
            const unsigned* words = values + (value_piece(tile) + lane) * 4;
            const unsigned scale = scales[scale_word(tile) + lane / 4];
            for (int step = 0; step < 4; ++step, a += 4) dequantize(words[step], multipliers_of(scale, step / 2), a);
        }
}
extern "C" int packed_row(int interleaved, int g, int half) {
    return interleaved ? row_in_strip<true>(g, half) : row_in_strip<false>(g, half);
}
extern "C" float deferred_scale() { return DEFERRED_SCALE; }

// The tiles of one strip of expert 1's second strip, by split, in the order in which they are added.
template <class M>
int order(int* tile, int* split) {
    int count = 0;
    for (int s = 0; s < M::SPLITS; ++s)
        for (int j = 0; j < M::tiles_of(s); ++j, ++count) tile[count] = M::tile(1, 1, s) + j, split[count] = s;
    return count;
}
extern "C" int up_order(int* tile, int* split) { return order<Up>(tile, split); }
extern "C" int down_order(int* tile, int* split) { return order<Down>(tile, split); }
// The tiles that stream.cu asks for at a time.
template <class R>
int chunks(int* first, int* tiles, int* split) {
    int count = 0;
    for (Chunks<R, 3> chunk; chunk.tiles; chunk.advance(), ++count)
        first[count] = chunk.first, tiles[count] = chunk.tiles, split[count] = chunk.split;
    return count == Chunks<R, 3>::COUNT ? count : -1;
}
extern "C" int chunks_of(int columns, int splits, int* first, int* tiles, int* split) {
    if (columns == 2880 && splits == 8) return chunks<Runs<2880, 8>>(first, tiles, split);
    if (columns == 2880 && splits == 1) return chunks<Runs<2880, 1>>(first, tiles, split);
    if (columns == 1440 && splits == 4) return chunks<Runs<1440, 4>>(first, tiles, split);
    if (columns == 256 && splits == 1) return chunks<Runs<256, 1>>(first, tiles, split);
    return -1;
}
extern "C" int up_depth() { return Up::DEPTH; }
extern "C" int down_depth() { return Down::DEPTH; }
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    library = compile_for_host(CODE, decode_defines(2880, 1440), tmp_path_factory.mktemp("host"))
    library.deferred_scale.restype = ctypes.c_float
    return library


def random_experts(rows, columns, count=2, seed=0, low=100, high=141):
    draw = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (count, rows, columns // 32, 16), dtype=torch.uint8, generator=draw)
    scales = torch.randint(low, high, (count, rows, columns // 32), dtype=torch.uint8, generator=draw)
    return blocks, scales, torch.randn(count, rows, generator=draw).bfloat16()


def fragments(host, packed):
    """What the lanes multiply: [E, strips, tiles, 32 lanes, 4 steps, 4 registers, 2] float64, times the factor that the
    epilogue makes good."""
    tiles = packed.values[..., 0, 0].numel()
    a = torch.empty(tiles, 32, 4, 4, dtype=torch.int32)
    host.fragments(pointer(packed.values), pointer(packed.scales), tiles, pointer(a))
    halves = torch.stack((a << 16, a & -65536), -1).view(torch.float32).double()
    return halves.view(*packed.values.shape[:3], 32, 4, 4, 2) * host.deferred_scale()


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def rows_and_columns(host, packed):
    """Row and column of the matrix for each element of `fragments` of one expert: mma.m16n8k16 in the PTX ISA."""
    shape = (packed.values.shape[1], packed.values.shape[2], 32, 4, 4, 2)
    strip, tile, lane, step, register, odd = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    g, t, half = lane // 4, lane % 4, register % 2  # registers 1 and 3 are rows g + 8
    rows = torch.tensor([[host.packed_row(packed.interleaved, g, half) for half in range(2)] for g in range(8)])
    return strip * 16 + rows[g, half], tile * 64 + step * 16 + register // 2 * 8 + t * 2 + odd


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_lanes_find_every_value_where_the_kernel_expects_it(host, rows, columns, interleaved):
    blocks, scales, bias = random_experts(rows, columns)
    packed = pack(blocks, scales, bias, interleaved)
    values = fragments(host, packed)
    row, column = rows_and_columns(host, packed)
    inside = column < columns
    for expert, dense in enumerate(reference.dequantize(blocks, scales, torch.float64)):
        assert torch.equal(values[expert][inside], dense[row[inside], column[inside]])
        assert values[expert][~inside].abs().sum() == 0
    assert torch.zeros(rows, columns).index_put((row[inside], column[inside]), torch.ones(1), True).eq(1).all()


def test_a_gate_and_its_up_end_in_one_lane(host):
    assert [host.packed_row(True, g, half) for g in range(8) for half in range(2)] == list(range(16))


@pytest.mark.parametrize("scale", [27, 64, 100, 127, 140, MAX_SCALE])
def test_a_bf16_multiply_dequantises_every_code_exactly(host, scale):
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16).repeat(1, 1, 2, 1)
    scales = torch.full((1, 16, 2), scale, dtype=torch.uint8)
    packed = pack(blocks, scales, torch.zeros(1, 16).bfloat16(), False)
    row, column = rows_and_columns(host, packed)
    dense = reference.dequantize(blocks, scales, torch.float64)[0]
    assert torch.equal(fragments(host, packed)[0], dense[row, column])  # subnormals included
    assert dense.max() == 6 * 2.0 ** (scale - 127)


@pytest.mark.parametrize("scale", [MAX_SCALE + 1, 255])
def test_a_scale_out_of_range_is_refused_by_name(scale):
    blocks, scales, bias = random_experts(32, 64)
    scales[1, 3, 1] = scale
    with pytest.raises(ValueError, match=f"scale byte {scale}"):
        pack(blocks, scales, bias, False)


def test_nothing_is_padded_but_the_last_half_tile():
    for columns, tiles in ((2880, 45), (1440, 23), (736, 12), (384, 6), (96, 2)):
        packed = pack(*random_experts(32, columns, count=1), True)
        assert packed.values.shape == (1, 2, tiles, 32, 4)
        assert packed.scales.shape == (1, 2, tiles, 8, 2, 2)


@pytest.mark.parametrize(
    ("projection", "tiles", "strips", "splits"), [("up", 45, 2 * 1440 // 16, 8), ("down", 23, 2880 // 16, 4)]
)
def test_the_splits_of_a_strip_are_its_tiles_in_order(host, projection, tiles, strips, splits):
    tile, split = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    assert getattr(host, f"{projection}_order")(pointer(tile), pointer(split)) == tiles
    first = (strips + 1) * tiles  # of the second strip of the second expert
    assert tile[:tiles].tolist() == list(range(first, first + tiles))
    assert split[:tiles].tolist() == sorted(split[:tiles].tolist())
    lengths = split[:tiles].bincount().tolist()
    assert len(lengths) == splits
    assert max(lengths) == getattr(host, f"{projection}_depth")() == 6


@pytest.mark.parametrize(("columns", "splits"), [(2880, 8), (2880, 1), (1440, 4), (256, 1)])
def test_chunks_are_the_tiles_in_order_and_none_is_of_two_splits(host, columns, splits):
    first, tiles, split = (torch.zeros(64, dtype=torch.int32) for _ in range(3))
    count = host.chunks_of(columns, splits, *map(pointer, (first, tiles, split)))
    first, tiles, split = (values[:count].tolist() for values in (first, tiles, split))
    asked = [(tile, of) for at, size, of in zip(first, tiles, split, strict=True) for tile in range(at, at + size)]
    of_split = [len(part) for part in torch.arange(-(-columns // 64)).tensor_split(splits)]
    assert asked == list(enumerate(of for of, size in enumerate(of_split) for _ in range(size)))
    assert max(tiles) <= 3
    assert count == sum(-(-size // 3) for size in of_split)


def test_a_split_has_at_most_six_tiles_up_to_3072_columns():
    assert [cut_of(columns).splits for columns in (2880, 1440, 736, 384, 64)] == [8, 4, 2, 1, 1]
    for columns in range(64, 4097, 32):
        splits, tiles = cut_of(columns).splits, -(-columns // 64)
        assert -(-tiles // splits) <= (6 if columns <= 3072 else 8)
        assert splits in (1, 2, 4, 8)
