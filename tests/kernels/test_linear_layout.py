"""The packed layout of dense weights and the kernels' index arithmetic, replayed in torch without a GPU."""

from itertools import pairwise

import pytest
import torch

from kernels.hopper.linear import (
    PITCH,
    ROWS,
    STEP,
    WIDE_STRIPS,
    kernel_for,
    pack,
    shared_bytes,
    shares_of,
    x_pitch,
)

LANES = torch.arange(32)
GROUP, PLACE = LANES // 4, LANES % 4
PAIR = torch.arange(2)
PIECES = ROWS * STEP // 8  # 16-byte pieces of a packed tile


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def share_begin(steps, share, shares):
    return steps * share // shares


def mma(a, b, sums):
    """mma.m16n8k16 as the PTX ISA lays it out: a [32, 4, 2], b [32, 2, 2], sums [32, 4], per lane and register."""
    left, right = torch.full((16, 16), torch.nan), torch.full((16, 8), torch.nan)
    for register in range(4):  # a0 a1 | a2 a3 | a4 a5 | a6 a7
        row = GROUP + 8 * (register % 2)
        left[row[:, None], PLACE[:, None] * 2 + PAIR + 8 * (register // 2)] = a[:, register].float()
    for register in range(2):
        right[PLACE[:, None] * 2 + PAIR + 8 * register, GROUP[:, None]] = b[:, register].float()
    product = left @ right
    out = sums.clone()
    for i in range(4):
        out[:, i] += product[GROUP + 8 * (i // 2), PLACE * 2 + i % 2]
    return out


def multiply_step(sums, first, second, tokens):
    """As in linear.cu: first, second [32, 8] are a lane's fragments, tokens [32, 8] its 16 bytes of token g."""
    tokens = tokens.unflatten(1, (4, 2))  # registers x, y, z, w
    sums = mma(first.unflatten(1, (4, 2)), tokens[:, :2], sums)
    return mma(second.unflatten(1, (4, 2)), tokens[:, 2:], sums)


def partial_sums(sums):
    """store_partial: sums [32, 4] of a tile -> [8 tokens, 16 rows], through memory of the kernel's pitch."""
    memory = torch.full((8 * PITCH,), torch.nan)
    for i in range(4):
        memory[(PLACE * 2 + i % 2) * PITCH + GROUP + i // 2 * 8] = sums[:, i]
    return memory.view(8, PITCH)[:, : ROWS]


def narrow(x, packed):
    """narrow_8 on the packed memory: every address as the kernel forms it."""
    tokens, columns = x.shape
    steps, shares = columns // STEP, shares_of(packed.rows, columns)
    memory, pitch = packed.tiles.flatten().view(-1, 8), x_pitch(columns)
    flat = torch.full((shared_bytes("narrow_8", columns, shares, tokens) // 2,), torch.nan)  # x in shared memory
    for piece in range(tokens * columns // 8):
        to = (piece // (columns // 8) * pitch + piece % (columns // 8) * 16) // 2
        flat[to : to + 8] = x.flatten()[piece * 8 : piece * 8 + 8]
    out = torch.zeros(tokens, packed.rows)
    for strip in range(packed.tiles.shape[0]):
        parts = []
        for share in range(shares):
            begin = share_begin(steps, share, shares)
            sums = torch.zeros(32, 4)
            for step in range(share_begin(steps, share + 1, shares) - begin):
                piece = (strip * steps + begin + step) * PIECES + LANES
                at = GROUP.clamp(max=tokens - 1) * pitch // 2 + (begin + step) * STEP + PLACE * 8
                b = flat[at[:, None] + torch.arange(8)] * (tokens > GROUP)[:, None]
                sums = multiply_step(sums, memory[piece], memory[piece + 32], b)
            parts.append(partial_sums(sums))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        rows = min(ROWS, packed.rows - strip * ROWS)
        out[:, strip * ROWS : strip * ROWS + rows] = total[:tokens, :rows]
    return out


def wide(x, packed, tile):
    """wide_<tile>: x through shared memory, a share of the columns a block, sums met across the cluster."""
    tokens, columns = x.shape
    steps, strips, shares = columns // STEP, packed.tiles.shape[0], shares_of(packed.rows, columns)
    memory = packed.tiles.flatten().view(-1, 8)
    out = torch.full((tokens, packed.rows), torch.nan)
    threads = WIDE_STRIPS * 32
    size = shared_bytes(f"wide_{tile}", columns, shares, tile)
    for first in range(0, tokens, tile):
        for group in range(-(-strips // WIDE_STRIPS)):
            sums_of = []
            for share in range(shares):
                begin = share_begin(steps, share, shares)
                count = share_begin(steps, share + 1, shares) - begin
                i = torch.arange(count * tile * 4)
                assert (len(i) * 16) <= size
                token, step = first + i // 4 % tile, i // 4 // tile
                shared = x[token.clamp(max=tokens - 1)].flatten(1)
                at = (begin + step) * STEP + i % 4 * 8
                shared = shared.gather(1, at[:, None] + torch.arange(8)) * (token < tokens)[:, None]
                floats = torch.full((size // 4,), torch.nan)
                for warp in range(WIDE_STRIPS):
                    strip = group * WIDE_STRIPS + warp
                    if strip * ROWS >= packed.rows:
                        continue
                    for eight in range(tile // 8):
                        sums = torch.zeros(32, 4)
                        for step in range(count):
                            piece = (strip * steps + begin + step) * PIECES + LANES
                            b = shared[(step * (tile // 8) + eight) * 32 + LANES]
                            sums = multiply_step(sums, memory[piece], memory[piece + 32], b)
                        base = (warp * tile + eight * 8) * PITCH
                        place = floats[base : base + 8 * PITCH].view(8, PITCH)
                        place[:, : ROWS] = partial_sums(sums)
                sums_of.append(floats)
            done = []
            for share in range(shares):
                for start in range(0, WIDE_STRIPS * tile * ROWS, shares * threads):
                    i = start + share * threads + torch.arange(threads)
                    i = i[i < WIDE_STRIPS * tile * ROWS]
                    done.append(i)
                    token, slot = i // ROWS % tile, i // ROWS // tile
                    row = (group * WIDE_STRIPS + slot) * ROWS + i % ROWS
                    at = (slot * tile + token) * PITCH + i % ROWS
                    total = sums_of[0][at]
                    for part in sums_of[1:]:
                        total = total + part[at]
                    stored = (first + token < tokens) & (row < packed.rows)
                    out[(first + token)[stored], row[stored]] = total[stored]
            assert torch.equal(torch.cat(done).sort().values, torch.arange(WIDE_STRIPS * tile * ROWS))
    return out


@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (16, 64), (27, 64), (40, 288), (129, 160)])
def test_packing_keeps_every_weight_and_pads_with_zeros(rows, columns):
    weight = random(rows, columns)
    packed = pack(weight)
    assert (packed.rows, packed.columns) == (rows, columns)
    assert packed.tiles.is_contiguous()
    assert packed.tiles.shape == (-(-rows // 16), columns // 32, 2, 32, 8)
    row, column = torch.meshgrid(torch.arange(-(-rows // 16) * 16), torch.arange(columns), indexing="ij")
    h, g, t, s, p, e = row // 8 % 2, row % 8, column // 8 % 4, column // 4 % 2, column // 2 % 2, column % 2
    whole = packed.tiles[row // 16, column // 32, s, 4 * g + t, 4 * p + 2 * h + e]
    assert torch.equal(whole[:rows], weight)
    assert not whole[rows:].any()


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="multiple of 32"):
        pack(random(16, 48))
    with pytest.raises(ValueError, match="float32"):
        pack(torch.zeros(16, 32))


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 16, 32), (3, 20, 96), (8, 37, 352), (2, 16, 4096)])
def test_a_narrow_block_multiplies_what_was_packed(tokens, rows, columns):
    x, weight = random(tokens, columns), random(rows, columns, seed=1)
    out = narrow(x, pack(weight))
    torch.testing.assert_close(out, x.float() @ weight.float().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(9, 40, 64), (17, 150, 224), (70, 20, 32)])
def test_a_wide_cluster_adds_in_the_narrow_order(tokens, rows, columns):
    x, weight = random(tokens, columns), random(rows, columns, seed=1)
    packed = pack(weight)
    tile = int(kernel_for(tokens).split("_")[1])
    out = wide(x, packed, tile)
    torch.testing.assert_close(out, x.float() @ weight.float().T, rtol=1e-4, atol=1e-4)
    assert torch.equal(out[:8], narrow(x[:8], packed))


@pytest.mark.parametrize(("rows", "columns"), [
    (16, 32), (2880, 512), (2880, 2048), (5120, 2880), (2880, 4096), (201088, 2880),
])
def test_shares_cover_all_steps_once_and_fit_a_block(rows, columns):
    steps, shares = columns // STEP, shares_of(rows, columns)
    ends = [share_begin(steps, share, shares) for share in range(shares + 1)]
    assert ends[0] == 0
    assert ends[-1] == steps
    assert max(end - begin for begin, end in pairwise(ends)) == -(-steps // shares)
    assert shared_bytes("wide_64", columns, shares, 64) <= 227 * 1024
    assert shared_bytes("narrow_8", columns, shares, 8) <= 227 * 1024


def test_lanes_meet_no_shared_memory_bank_twice_when_sums_are_stored():
    for i in range(4):
        banks = ((PLACE * 2 + i % 2) * PITCH + GROUP + i // 2 * 8) % 32
        assert len(banks.unique()) == 32


@pytest.mark.parametrize("columns", [32, 2880, 4096])
def test_eight_lanes_read_tokens_from_different_banks(columns):
    eight = (GROUP * x_pitch(columns) + PLACE * 16)[:8]  # a 16-byte load goes eight lanes at a time
    assert len((eight // 4 % 32).unique()) == 8


@pytest.mark.parametrize(("tokens", "name"), [
    (1, "narrow_8"), (8, "narrow_8"), (9, "wide_16"), (17, "wide_32"), (33, "wide_64"), (64, "wide_64"),
    (2048, "wide_64"),
])
def test_the_kernel_depends_on_the_number_of_tokens_only(tokens, name):
    assert kernel_for(tokens) == name
