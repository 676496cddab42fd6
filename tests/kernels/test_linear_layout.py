"""The packed layout of dense weights and the kernels' index arithmetic, replayed in torch without a GPU."""

from itertools import pairwise

import pytest
import torch

from kernels.build import MOST_SHARED
from kernels.hopper.linear import (
    PITCH,
    ROWS,
    STEP,
    kernel_for,
    most_warps,
    narrow_shared,
    pack,
    shares_of,
    wide_grid,
    wide_shared,
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


def ldmatrix(memory, at):
    """ldmatrix.x4 as the PTX ISA lays it out: memory in bf16, at [32] bytes -> [32, 4, 2], per lane and register."""
    assert not (at % 16).any()
    rows = memory[at[:, None] // 2 + torch.arange(8)].unflatten(0, (4, 8))  # matrix, row, column
    return torch.stack([rows[matrix, GROUP[:, None], PLACE[:, None] * 2 + PAIR] for matrix in range(4)], 1)


def multiply_step(sums, first, second, b):
    """As in linear.cu: first, second [32, 8] are a lane's fragments, b [32, 4, 2] its registers of the tokens."""
    sums = mma(first.unflatten(1, (4, 2)), b[:, :2], sums)
    return mma(second.unflatten(1, (4, 2)), b[:, 2:], sums)


def partial_sums(sums):
    """store_partial: sums [32, 4] of a tile -> [8 tokens, 16 rows], through memory of the kernel's pitch."""
    memory = torch.full((8 * PITCH,), torch.nan)
    for i in range(4):
        memory[(PLACE * 2 + i % 2) * PITCH + GROUP + i // 2 * 8] = sums[:, i]
    return memory.view(8, PITCH)[:, :ROWS]


def token_banks(at):
    """Each matrix of an ldmatrix is eight rows of 16 bytes at once: the banks that each touches first."""
    return (at.view(4, 8) // 4 % 32).sort(1).values


def narrow(x, packed):
    """narrow_8 on the packed memory: every address as the kernel forms it."""
    tokens, columns = x.shape
    steps, shares = columns // STEP, shares_of(packed.rows, columns)
    memory, pitch = packed.tiles.flatten().view(-1, 8), x_pitch(columns)
    out = torch.zeros(tokens, packed.rows)
    for strip in range(packed.tiles.shape[0]):
        parts = []
        for share in range(shares):
            begin = share_begin(steps, share, shares)
            count = share_begin(steps, share + 1, shares) - begin
            size = narrow_shared("narrow_8", columns, shares, tokens) // 2
            flat = torch.full((size,), torch.nan)  # what this warp copies of x
            x_at = begin * STEP * 2
            for token in range(tokens):
                for i in range(count * 4):
                    to, source = (x_at + token * pitch + i * 16) // 2, token * columns + begin * STEP + i * 8
                    flat[to : to + 8] = x.flatten()[source : source + 8]
            sums = torch.zeros(32, 4)
            for step in range(count):
                piece = (strip * steps + begin + step) * PIECES + LANES
                at = x_at + (LANES % 8).clamp(max=tokens - 1) * pitch + LANES // 8 * 16 + step * STEP * 2
                sums = multiply_step(sums, memory[piece], memory[piece + 32], ldmatrix(flat, at))
            parts.append(partial_sums(sums))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        rows = min(ROWS, packed.rows - strip * ROWS)
        out[:, strip * ROWS : strip * ROWS + rows] = total[:tokens, :rows]
    return out


def wide(x, packed, tile, most, resident, depth):
    """wide_<tile>, every address as the kernel forms it: a share of x in each block, groups of strips dealt to
    clusters, weights in a ring of `depth` steps that runs on into the next group, sums met across the cluster."""
    tokens, columns = x.shape
    steps, strips, shares = columns // STEP, packed.tiles.shape[0], shares_of(packed.rows, columns)
    memory, tiles, step_bytes = packed.tiles.flatten().view(-1, 8), tile // 8, tile * STEP * 2
    warps, clusters = wide_grid(strips, most, resident)
    groups, size = -(-strips // warps), wide_shared(tile, columns, shares, warps)
    sums_at = -(-steps // shares) * step_bytes
    out, stores = torch.full((tokens, packed.rows), torch.nan), torch.zeros(tokens, packed.rows, dtype=torch.int)
    begins = [share_begin(steps, share, shares) for share in range(shares + 1)]
    for first in range(0, tokens, tile):
        copies = []
        for begin, end in pairwise(begins):
            flat = torch.full((sums_at // 2,), torch.nan)
            for i in range((end - begin) * tile * 4):
                piece, token, step = i % 4, i // 4 % tile, i // 4 // tile
                to = (step * step_bytes + token * STEP * 2 + (piece ^ token // 2 % 4) * 16) // 2
                source = (first + token) * columns + (begin + step) * STEP + piece * 8
                flat[to : to + 8] = x.flatten()[source : source + 8] if first + token < tokens else 0
            copies.append(flat)
        for cluster in range(clusters):
            rings = {}  # share, warp -> the pieces' addresses that each place of the ring holds
            for group in range(cluster, groups, clusters):
                received = torch.full((shares, (size - sums_at) // 4), torch.nan)  # by receiving block
                for share, (begin, end) in enumerate(pairwise(begins)):
                    for warp in range(warps):
                        slots = (group * warps + warp, (group + clusters) * warps + warp)
                        tile_at, next_at = ((min(slot, strips - 1) * steps + begin) * PIECES for slot in slots)
                        count = end - begin
                        ring = rings.setdefault(
                            (share, warp), {i: tile_at + i * PIECES for i in range(min(depth, count))}
                        )
                        sums = torch.zeros(tiles, 32, 4)
                        for step in range(count):
                            i = step % depth
                            piece = ring.pop(i) + LANES
                            for eight in range(tiles):
                                at = LANES % 8 * STEP * 2 + (LANES // 8 ^ LANES // 2 % 4) * 16
                                assert len(token_banks(at).unique(dim=0)) == 1
                                b = ldmatrix(copies[share], at + step * step_bytes + eight * 8 * STEP * 2)
                                sums[eight] = multiply_step(sums[eight], memory[piece], memory[piece + 32], b)
                            within = step + depth < count
                            if within or group + clusters < groups:
                                ring[i] = tile_at + (step + depth) * PIECES if within else next_at + i * PIECES
                        for eight in range(tiles):
                            unit = warp * tiles + eight
                            at = ((unit // shares * shares + share) * 32 + LANES) * 4
                            for i in range(4):
                                assert received[unit % shares, at + i].isnan().all()  # nobody else sends there
                                received[unit % shares, at + i] = sums[eight, :, i]
                for share in range(shares):
                    units = (warps * tiles - share + shares - 1) // shares
                    assert len([unit for unit in range(warps * tiles) if unit % shares == share]) == units
                    for slot in range(units):
                        unit = slot * shares + share
                        for i in range(4):
                            row = (group * warps + unit // tiles) * ROWS + LANES // 4 + i // 2 * 8
                            token = first + unit % tiles * 8 + LANES % 4 * 2 + i % 2
                            total = received[share, (slot * shares * 32 + LANES) * 4 + i]
                            for other in range(1, shares):
                                total = total + received[share, ((slot * shares + other) * 32 + LANES) * 4 + i]
                            there = (token < tokens) & (row < packed.rows)
                            out[token[there], row[there]] = total[there]
                            stores[token[there], row[there]] += 1
            assert not any(rings.values())
    assert (stores == 1).all()
    return out


@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (16, 64), (27, 64), (40, 288), (129, 160)])
def test_packing_keeps_every_weight_and_pads_with_zeros(rows, columns):
    weight = random(rows, columns)
    packed = pack(weight)
    assert (packed.rows, packed.columns) == (rows, columns)
    assert packed.tiles.is_contiguous()
    assert packed.tiles.shape == (-(-rows // 16), columns // 32, 2, 32, 8)
    row, column = torch.meshgrid(torch.arange(-(-rows // 16) * 16), torch.arange(columns), indexing="ij")
    h, g, s, p, t, e = row // 8 % 2, row % 8, column // 16 % 2, column // 8 % 2, column // 2 % 4, column % 2
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


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "most", "resident", "depth"),
    [(9, 40, 64, 20, 16, 4), (17, 150, 800, 2, 3, 2), (33, 150, 352, 3, 2, 4), (70, 20, 32, 16, 16, 6)],
)
def test_a_wide_cluster_adds_in_the_narrow_order(tokens, rows, columns, most, resident, depth):
    x, weight = random(tokens, columns), random(rows, columns, seed=1)
    packed = pack(weight)
    tile = int(kernel_for(tokens).split("_")[1])
    out = wide(x, packed, tile, most, resident, depth)
    torch.testing.assert_close(out, x.float() @ weight.float().T, rtol=1e-4, atol=1e-4)
    assert torch.equal(out[:8], narrow(x[:8], packed))


@pytest.mark.parametrize(
    ("rows", "columns"), [(16, 32), (2880, 512), (2880, 2048), (5120, 2880), (2880, 4096), (201088, 2880)]
)
def test_shares_cover_all_steps_once_and_fit_a_block(rows, columns):
    steps, shares = columns // STEP, shares_of(rows, columns)
    ends = [share_begin(steps, share, shares) for share in range(shares + 1)]
    assert ends[0] == 0
    assert ends[-1] == steps
    assert max(end - begin for begin, end in pairwise(ends)) == -(-steps // shares)
    assert wide_shared(64, columns, shares, most_warps(columns, shares)) <= MOST_SHARED
    own = shares * (8 * PITCH * 4 + 8)  # partial sums and barriers
    assert narrow_shared("narrow_8", columns, shares, 8) + own <= MOST_SHARED
    if rows == 5120:  # three blocks a multiprocessor, each with 1 KB of the system's
        assert 3 * (narrow_shared("narrow_2", columns, shares, 2) + own + 1024) <= 228 * 1024


def test_lanes_meet_no_shared_memory_bank_twice_when_sums_are_stored():
    for i in range(4):
        banks = ((PLACE * 2 + i % 2) * PITCH + GROUP + i // 2 * 8) % 32
        assert len(banks.unique()) == 32


@pytest.mark.parametrize("columns", [32, 2880, 4096])
def test_eight_tokens_are_read_from_different_banks(columns):
    narrow_at = LANES % 8 * x_pitch(columns) + LANES // 8 * 16
    wide_at = LANES % 8 * STEP * 2 + (LANES // 8 ^ LANES // 2 % 4) * 16
    for at in (narrow_at, wide_at):
        assert torch.equal(token_banks(at), torch.arange(0, 32, 4).expand(4, 8))


@pytest.mark.parametrize(
    ("rows", "columns", "resident", "expected"),
    [
        (5120, 2880, 16, (20, 16)),
        (2880, 4096, 16, (12, 15)),
        (201088, 2880, 32, (16, 32)),
        (5120, 2880, 14, (12, 14)),
        (640, 2880, 16, (3, 14)),
        (1, 32, 16, (1, 1)),
    ],
)
def test_strips_are_dealt_out_evenly_to_clusters_that_are_all_resident(rows, columns, resident, expected):
    strips, most = -(-rows // ROWS), most_warps(columns, shares_of(rows, columns))
    warps, clusters = wide_grid(strips, most, resident)
    assert (warps, clusters) == expected
    assert warps <= most
    assert clusters <= min(resident, -(-strips // warps))


@pytest.mark.parametrize(
    ("tokens", "name"),
    [
        (1, "narrow_2"),
        (2, "narrow_2"),
        (3, "narrow_8"),
        (8, "narrow_8"),
        (9, "wide_16"),
        (17, "wide_32"),
        (33, "wide_64"),
        (64, "wide_64"),
        (2048, "wide_64"),
    ],
)
def test_the_kernel_depends_on_the_number_of_tokens_only(tokens, name):
    assert kernel_for(tokens) == name
