"""The packed layout of the experts' weights, read as experts.cu reads it, on the CPU."""

import pytest
import torch

from kernels import reference
from kernels.hopper.experts import MAX_SCALE, pack, split_of

SIGN, REST = 0x80008000, 0x01C001C0
SHAPES = [(32, 64), (64, 96), (192, 160), (320, 2880)]


def random_experts(rows, columns, count=2, seed=0, low=100, high=141):
    draw = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (count, rows, columns // 32, 16), dtype=torch.uint8, generator=draw)
    scales = torch.randint(low, high, (count, rows, columns // 32), dtype=torch.uint8, generator=draw)
    return blocks, scales, torch.randn(count, rows, generator=draw).bfloat16()


def bf16_halves(word):
    """The two bf16 values of each 32-bit pattern (int64), as float64: [..., 2], the low half first."""
    bits = torch.stack((word & 0xFFFF, word >> 16 & 0xFFFF), -1)
    return (bits << 16).to(torch.uint32).view(torch.float32).double()


def fragments(packed):
    """What the lanes multiply: [E, strips, tiles, 32 lanes, 4 steps, 4 registers, 2] float64, with the bit operations
    of `dequantize` in experts.cu."""
    q = packed.values.long() & 0xFFFFFFFF  # [E, strips, tiles, 32, 4]
    lane, step = torch.arange(32), torch.arange(4)
    word = packed.scales.flatten(3).contiguous().view(torch.int32)[..., lane // 4, None].long()  # [..., 32, 1]
    block = 16 * (step // 2)
    low, high = (bf16_halves((word >> block + 8 * half & 0xFF) * 0x00800080)[..., 0] for half in range(2))
    registers = (
        (q & (SIGN | REST), low),
        ((q << 3) & (SIGN | REST), high),
        (((q << 2) & SIGN) | ((q << 6) & REST), low),
        (((q << 1) & SIGN) | ((q >> 3) & REST), high),
    )
    return torch.stack([bf16_halves(word) * scale.unsqueeze(-1) for word, scale in registers], -2)


def rows_and_columns(packed):
    """Row and column of the matrix for each element of `fragments` of one expert."""
    shape = (packed.values.shape[1], packed.values.shape[2], 32, 4, 4, 2)
    strip, tile, lane, step, register, odd = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    g, t, half = lane // 4, lane % 4, register % 2  # PTX ISA, m16n8k16: registers 1 and 3 are rows g + 8
    row = strip * 16 + (2 * g + half if packed.interleaved else g + 8 * half)
    return row, tile * 64 + step * 16 + register // 2 * 8 + t * 2 + odd


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_lanes_find_every_value_where_the_kernel_expects_it(rows, columns, interleaved):
    blocks, scales, bias = random_experts(rows, columns)
    packed = pack(blocks, scales, bias, interleaved)
    got = fragments(packed) * 2.0**32
    row, column = rows_and_columns(packed)
    inside = column < columns
    for expert, dense in enumerate(reference.dequantize(blocks, scales, torch.float64)):
        assert torch.equal(got[expert][inside], dense[row[inside], column[inside]])
        assert got[expert][~inside].abs().sum() == 0
    assert torch.zeros(rows, columns).index_put((row[inside], column[inside]), torch.ones(1), True).eq(1).all()


@pytest.mark.parametrize("scale", [27, 64, 100, 127, 140, MAX_SCALE])
def test_a_bf16_multiply_dequantises_every_code_exactly(scale):
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16).repeat(1, 1, 2, 1)
    scales = torch.full((1, 16, 2), scale, dtype=torch.uint8)
    values = fragments(pack(blocks, scales, torch.zeros(1, 16).bfloat16(), False))
    assert torch.equal(values.bfloat16().double(), values)  # subnormals included
    largest = 6 * 2.0 ** (scale - 127)
    assert values.max() * 2.0**32 == largest
    assert values.min() * 2.0**32 == -largest


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


def test_the_parts_of_k_have_at_most_six_tiles_up_to_3072_columns():
    assert [split_of(columns) for columns in (2880, 1440, 736, 384, 64)] == [(8, 6), (4, 6), (2, 6), (1, 6), (1, 1)]
    for columns in range(64, 4097, 32):
        shares, depth = split_of(columns)
        assert depth <= (6 if columns <= 3072 else 8)
        assert shares in (1, 2, 4, 8)
