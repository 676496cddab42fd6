"""The packed layout of dense weights, and the decode kernels' own index functions replayed on the CPU."""

from itertools import pairwise

import pytest
import torch

from kernels.build import MOST_SHARED
from kernels.hopper.linear import (
    STEP_COLUMNS,
    STRIP_ROWS,
    TILED_STATIC_BYTES,
    geometry,
    kernel_for,
    narrow_shared,
    pack,
    tile_for,
    tiles,
    wide_grid,
    wide_shared,
)
from kernels.hopper.linear.prefill import CLUSTER, CLUSTERS, GEOMETRIES, prefill_geometry
from tests.kernels.host import compile_for_host

LANES = torch.arange(32)
GROUP, PLACE = LANES // 4, LANES % 4
PAIR = torch.arange(2)
# The index functions of linear/decode.cu, in the form that ctypes calls.
CODE = """
#include "linear/layout.cuh"
extern "C" int begin(int split) { return split_begin(split); }
extern "C" long tile(int strip, int step) { return tile_piece(strip, step); }
extern "C" int tile_pieces() { return TILE; }
extern "C" int most_steps() { return MOST_STEPS; }
extern "C" int row_of(int lane, int i) { return accumulator_row(lane, i); }
extern "C" int token_of(int lane, int i) { return accumulator_token(lane, i); }
extern "C" int narrow_at(int token, int piece) { return narrow_x(0, token, piece); }
extern "C" int wide_at(int tokens, int step, int token, int piece) {
    if (tokens == 16) return wide_x<16>(0, step, token, piece);
    if (tokens == 32) return wide_x<32>(0, step, token, piece);
    return wide_x<64>(0, step, token, piece);
}
extern "C" int partial(int token, int row) { return partial_sum(token, row); }
extern "C" int adder(int unit) { return adding_split(unit); }
extern "C" int units(int split, int all) { return units_of(split, all); }
extern "C" int unit(int split, int n) { return unit_of(split, n); }
extern "C" int receive(int n, int from, int lane) { return received(n, from, lane); }
"""


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The index functions for a weight of so many rows and columns."""
    libraries = {}

    def library(rows, columns):
        layer = geometry(rows, columns)
        if layer not in libraries:
            libraries[layer] = compile_for_host(CODE, layer.defines(1), tmp_path_factory.mktemp("host"))
        return libraries[layer]

    return library


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
    """ldmatrix.x4 as the PTX ISA lays it out: memory in bf16, at [32] bytes -> [32, 4, 2], per lane and register.

    Each matrix is eight rows of 16 bytes, read at once: they begin in different banks.
    """
    assert not (at % 16).any()
    assert torch.equal((at.view(4, 8) // 4 % 32).sort(1).values, torch.arange(0, 32, 4).expand(4, 8))
    rows = memory[at[:, None] // 2 + torch.arange(8)].unflatten(0, (4, 8))  # matrix, row, column
    return torch.stack([rows[matrix, GROUP[:, None], PLACE[:, None] * 2 + PAIR] for matrix in range(4)], 1)


def multiply_step(sums, pieces, tile, b):
    """pieces [any, 8]: the packed weight. tile: a step's first piece. b [32, 4, 2]: tokens, by lane and register."""
    first, second = pieces[tile + LANES], pieces[tile + 32 + LANES]
    sums = mma(first.unflatten(1, (4, 2)), b[:, :2], sums)
    return mma(second.unflatten(1, (4, 2)), b[:, 2:], sums)


def add_in_order(partials):
    total = partials[0]
    for partial in partials[1:]:
        total = total + partial
    return total


def narrow(host, x, packed):
    """A narrow block for each strip, with tokens copied, multiplied and stored where the index functions say."""
    tokens, splits = x.shape[0], geometry(packed.rows, packed.columns).splits
    pieces = packed.tiles.flatten().view(-1, 8)
    begins = [host.begin(split) for split in range(splits + 1)]
    memory = torch.full((narrow_shared("narrow_8", geometry(packed.rows, packed.columns), tokens) // 2,), torch.nan)
    for token in range(tokens):
        for piece in range(packed.columns // 8):
            at = host.narrow_at(token, piece) // 2
            assert memory[at : at + 8].isnan().all()  # nothing else lies there
            memory[at : at + 8] = x[token, piece * 8 : piece * 8 + 8]
    token_at = torch.tensor([host.narrow_at(min(lane % 8, tokens - 1), lane // 8) for lane in range(32)])
    full_at = torch.tensor([host.narrow_at(lane % 8, lane // 8) for lane in range(32)])
    ldmatrix(torch.zeros(2**16), full_at)  # with 8 tokens, whose banks it checks
    places = torch.tensor(
        [[host.partial(host.token_of(lane, i), host.row_of(lane, i)) for i in range(4)] for lane in range(32)]
    )
    assert all(len((places[:, i] % 32).unique()) == 32 for i in range(4))  # a bank a lane
    out = torch.zeros(tokens, packed.rows)
    for strip in range(packed.tiles.shape[0]):
        partials = []
        for begin, end in pairwise(begins):
            sums = torch.zeros(32, 4)
            for step in range(begin, end):
                b = read(memory, token_at + step * STEP_COLUMNS * 2)
                sums = multiply_step(sums, pieces, host.tile(strip, step), b)
            stored = torch.full((int(places.max()) + 1,), torch.nan)
            stored[places] = sums
            partials.append(stored)
        total = add_in_order(partials)
        rows = range(min(STRIP_ROWS, packed.rows - strip * STRIP_ROWS))
        for token in range(tokens):
            at = torch.tensor([host.partial(token, row) for row in rows])
            out[token, strip * STRIP_ROWS : strip * STRIP_ROWS + len(rows)] = total[at]
    return out


def read(memory, at):
    """ldmatrix where lanes may name the same row, so that banks are not checked."""
    rows = memory[at[:, None] // 2 + torch.arange(8)].unflatten(0, (4, 8))
    return torch.stack([rows[matrix, GROUP[:, None], PLACE[:, None] * 2 + PAIR] for matrix in range(4)], 1)


def wide(host, x, packed, tile, warps):
    """A cluster for `tile` tokens: a split of x in each block, and sums that meet in the blocks which add them up."""
    tokens, layer, tiles = x.shape[0], geometry(packed.rows, packed.columns), tile // 8
    pieces, strips = packed.tiles.flatten().view(-1, 8), packed.tiles.shape[0]
    begins = [host.begin(split) for split in range(layer.splits + 1)]
    sums_at = host.most_steps() * tile * STEP_COLUMNS * 2  # bytes
    room = (wide_shared(tile, layer, warps) - sums_at) // 16
    token_at = torch.tensor([host.wide_at(tile, 0, lane % 8, lane // 8) for lane in range(32)])
    out, stores = torch.full((tokens, packed.rows), torch.nan), torch.zeros(tokens, packed.rows, dtype=torch.int)
    for first in range(0, tokens, tile):
        copies = []
        for begin, end in pairwise(begins):
            memory = torch.full((sums_at // 2,), torch.nan)
            for step in range(end - begin):
                for token in range(tile):
                    for piece in range(4):
                        at, column = (
                            host.wide_at(tile, step, token, piece) // 2,
                            (begin + step) * STEP_COLUMNS + piece * 8,
                        )
                        assert memory[at : at + 8].isnan().all()  # nothing else lies there
                        memory[at : at + 8] = x[first + token, column : column + 8] if first + token < tokens else 0
            copies.append(memory)
        for group in range(-(-strips // warps)):
            received = torch.full((layer.splits, room, 4), torch.nan)  # by the block that adds up
            for split, (begin, end) in enumerate(pairwise(begins)):
                for warp in range(warps):
                    strip = min(group * warps + warp, strips - 1)
                    sums = torch.zeros(tiles, 32, 4)
                    for step in range(end - begin):
                        for eight in range(tiles):
                            b = ldmatrix(copies[split], token_at + host.wide_at(tile, step, eight * 8, 0))
                            sums[eight] = multiply_step(sums[eight], pieces, host.tile(strip, begin + step), b)
                    for eight in range(tiles):
                        unit = warp * tiles + eight
                        at = [host.receive(unit // layer.splits, split, lane) for lane in range(32)]
                        assert received[host.adder(unit), at].isnan().all()  # nobody else sends there
                        received[host.adder(unit), at] = sums[eight]
            units = []
            for split in range(layer.splits):
                for n in range(host.units(split, warps * tiles)):
                    unit = host.unit(split, n)
                    units.append(unit)
                    arrived = [
                        received[split, [host.receive(n, other, lane) for lane in range(32)]]
                        for other in range(layer.splits)
                    ]
                    total = add_in_order(arrived)
                    for i in range(4):
                        row = torch.tensor([host.row_of(lane, i) for lane in range(32)])
                        row += (group * warps + unit // tiles) * STRIP_ROWS
                        token = torch.tensor([host.token_of(lane, i) for lane in range(32)]) + first + unit % tiles * 8
                        there = (token < tokens) & (row < packed.rows)
                        out[token[there], row[there]] = total[there, i]
                        stores[token[there], row[there]] += 1
            assert sorted(units) == list(range(warps * tiles))  # each is added up once
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
    with pytest.raises(ValueError, match=r"bias \(15,\)"):
        pack(random(16, 32), random(15))


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 16, 32), (3, 20, 96), (8, 37, 352), (2, 16, 4096)])
def test_a_narrow_block_multiplies_what_was_packed(host, tokens, rows, columns):
    x, weight = random(tokens, columns), random(rows, columns, seed=1)
    out = narrow(host(rows, columns), x, pack(weight))
    torch.testing.assert_close(out, x.float() @ weight.float().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "warps"), [(9, 40, 64, 2), (17, 90, 288, 3), (33, 70, 352, 3), (70, 20, 32, 2)]
)
def test_a_wide_cluster_adds_in_the_narrow_order(host, tokens, rows, columns, warps):
    x, weight = random(tokens, columns), random(rows, columns, seed=1)
    packed, functions = pack(weight), host(rows, columns)
    out = wide(functions, x, packed, int(kernel_for(tokens).split("_")[1]), warps)
    torch.testing.assert_close(out, x.float() @ weight.float().T, rtol=1e-4, atol=1e-4)
    assert torch.equal(out[:8], narrow(functions, x[:8], packed))


@pytest.mark.parametrize(
    ("rows", "columns"), [(16, 32), (2880, 512), (2880, 2048), (5120, 2880), (2880, 4096), (201088, 2880)]
)
def test_splits_cover_all_steps_once_and_fit_a_block(host, rows, columns):
    layer, functions = geometry(rows, columns), host(rows, columns)
    ends = [functions.begin(split) for split in range(layer.splits + 1)]
    assert ends[0] == 0
    assert ends[-1] == columns // STEP_COLUMNS
    assert max(end - begin for begin, end in pairwise(ends)) == layer.steps == functions.most_steps()
    assert wide_shared(64, layer, layer.most_warps) <= MOST_SHARED
    own = layer.splits * ((functions.partial(7, STRIP_ROWS - 1) + 5) * 4 + 8)  # partial sums and barriers
    assert narrow_shared("narrow_8", layer, 8) + own <= MOST_SHARED
    if rows == 5120:  # three blocks a multiprocessor, each with 1 KB of the system's
        assert 3 * (narrow_shared("narrow_2", layer, 2) + own + 1024) <= 228 * 1024


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
    strips, most = -(-rows // STRIP_ROWS), geometry(rows, columns).most_warps
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


@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "expected"),
    [
        (5120, 2880, 32, None),
        (5120, 2880, 33, (1, 64, 2, 1)),
        (5120, 2880, 96, (1, 96, 2, 1)),
        (5120, 2880, 128, (1, 128, 2, 1)),
        (5120, 2880, 129, (2, 96, 2, 2)),
        (2880, 4096, 64, None),
        (2880, 4096, 128, (1, 64, 2, 2)),
        (2880, 4096, 256, (1, 128, 2, 2)),
        (2880, 4096, 257, None),
        (640, 2880, 128, None),
        (201088, 2880, 8, None),
        (201088, 2880, 9, (3, 32, 2, 1)),
        (201088, 2880, 256, (3, 128, 1, 2)),
        (5120, 224, 128, None),  # fewer steps than runs
        (5001, 2880, 128, None),  # rows are stored by 8
    ],
)
def test_a_tile_is_chosen_by_shape_and_tokens(rows, columns, tokens, expected):
    assert tile_for(tokens, rows, columns) == expected


@pytest.mark.parametrize(("rows", "columns"), [(201088, 2880), (5120, 2880), (2880, 4096), (640, 2880), (2880, 512)])
def test_tiles_take_their_tokens_and_fit_a_block(rows, columns):
    for tile in tiles(rows, columns):
        assert tile.shared_bytes + TILED_STATIC_BYTES <= MOST_SHARED
        assert tile.stages >= 4
    for tokens in range(1, 300):
        if tile := tile_for(tokens, rows, columns):
            assert tile in tiles(rows, columns)
            assert tokens <= tile.tile_tokens * tile.cluster_tokens


@pytest.mark.parametrize("tiles", GEOMETRIES, ids=str)
def test_a_prefill_block_fits_a_multiprocessor(tiles):
    macros = tiles.defines(2880)
    assert macros["SHARED_BYTES"] + 16 * macros["STAGES"] <= MOST_SHARED  # two mbarriers a stage
    assert macros["STAGES"] >= 2
    # What a block starts with; a consumer's setmaxnreg waits forever for more.
    started = min(64 * 1024 // tiles.threads // 8 * 8, 240)
    taken = tiles.consumers * macros["CONSUMER_REGISTERS"] + macros["PRODUCER_REGISTERS"]
    assert taken <= started * (tiles.consumers + 1)


PREFILL_TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
PROJECTIONS = (5120, 2880, 2560, 1280, 640)  # rows of the 20b's, at tp 1, 2, 4 and 8


def test_prefill_tiles_keep_the_multiprocessors_busy():
    """As many clusters at work as there are, or nothing that would employ more of them."""
    for rows in PROJECTIONS:
        for tokens in PREFILL_TOKENS:
            items = prefill_geometry(rows, tokens).items(rows, tokens)
            turns = -(-items // CLUSTERS)
            most = max(tiles.items(rows, tokens) for tiles in GEOMETRIES)
            assert items / turns >= min(0.5 * CLUSTERS, most), (rows, tokens)


def test_every_kind_of_prefill_tile_is_taken_by_some_layer():
    taken = {prefill_geometry(rows, tokens) for rows in PROJECTIONS for tokens in PREFILL_TOKENS}
    assert taken == set(GEOMETRIES)


def test_a_prefill_tile_holds_whole_groups_of_the_swizzle_for_each_block():
    assert all(tiles.tokens % (8 * CLUSTER) == 0 for tiles in GEOMETRIES)
